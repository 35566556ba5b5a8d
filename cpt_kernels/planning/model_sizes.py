"""Sizes of a model that decide its operations; shapes suffice, no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..data.collate import PackedBatch
from ..model.packed_model import base_model
from ..model.states import state_layers

# Kinds of layers without attention, or with one whose operations grow with the length.
_LINEAR = {"linear_attention", "conv", "mlp", "moe"}


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that :meth:`.work.Work.flops` reads."""

    layer_parameters: int  # in the matrices of all layers; of experts, the share that a token is sent to
    layers: int
    attention_layers: int  # layers whose operations grow with the square of the length
    heads: int
    head_size: int
    hidden: int
    vocab: int
    image_flops: float = 0  # of a forward of the vision tower, for each token of an image
    image_backward: int = 0  # 2 if the tower is trained, 1 if only its adapters are, else 0


def sizes_of(model: nn.Module, images: PackedBatch | None = None) -> ModelSizes:
    """Returns the sizes of a transformers model or a PEFT model around one; parameters of adapters are left out.

    Args:
        images: a batch whose images tell the operations for each of their tokens.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 0  # 0 for models without attention
    embeddings = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    head = base.get_output_embeddings()
    outside = {id(p) for module in (*embeddings, head) if module is not None for p in module.parameters()}
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), 1)
    active = getattr(config, "num_experts_per_tok", experts) / experts
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    is_adapted, vision = hasattr(model, "peft_config"), getattr(base.config, "vision_config", None)
    decoder = base if vision is None else base.get_decoder()
    image_flops, image_backward = 0.0, 0
    if images is not None and images["images"] and vision is not None:
        others = outside | {id(p) for p in decoder.parameters()}
        tower = [p for p in base.parameters() if id(p) not in others]
        own = sum(p.numel() for p in tower if p.dim() > 1 and not (is_adapted and p.requires_grad))
        image_flops = _encoding_flops(own, vision, images["images"]) / sum(images["image_tokens"])
        image_backward = any(p.requires_grad for p in tower) * (1 if is_adapted else 2)
    matrices = [
        (name, p.numel())
        for name, p in decoder.named_parameters()
        if p.dim() > 1 and id(p) not in outside and not (is_adapted and p.requires_grad)
    ]
    return ModelSizes(
        layer_parameters=round(sum(size * (active if ".experts." in name else 1) for name, size in matrices)),
        layers=config.num_hidden_layers,
        attention_layers=sum(kind not in _LINEAR for kind in kinds),
        heads=heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        image_flops=image_flops,
        image_backward=image_backward,
    )


def _encoding_flops(parameters: int, vision: Any, inputs: Mapping[str, Tensor]) -> float:
    """Returns the operations of encoding images: 2 p n + 4 L D n^2 for n patches that attend to each other.

    Every matrix is taken to see every patch; a projector behind merged patches sees fewer. Attention within windows
    counts as attention within the image.
    """
    if (grid := inputs.get("image_grid_thw")) is not None:
        patches = grid.prod(1).tolist()
    else:
        *frames, _, height, width = inputs["pixel_values"].shape
        size = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        patches = [(height // size) * (width // size)] * math.prod(frames)
    layers = getattr(vision, "num_hidden_layers", None) or vision.depth
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    return sum(2.0 * parameters * n + 4.0 * layers * hidden * n * n for n in patches)


def layer_stack(base: nn.Module) -> nn.ModuleList | None:
    """Returns the list of a model's layers; None without a list of as many modules as its config has layers.

    It is also None for layers that differ: those of a hybrid or of several classes, and those that take keys from
    earlier layers. A vision tower may be as deep as the decoder, and its layers are not meant.
    """
    config: Any = base.config.get_text_config()
    if state_layers(base) or getattr(config, "num_kv_shared_layers", 0):
        return None
    decoder: Any = base.get_decoder() if hasattr(base.config, "vision_config") else base
    lists = (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers)
    stack = next(lists, None)
    return None if stack is None or len({type(layer) for layer in stack}) > 1 else stack
