"""Shapes of the models that the benchmarks train."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .lengths import FIRST_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PATCH = 14  # pixels


@dataclass(frozen=True)
class Shape:
    """A Qwen2-shaped model, or a hybrid as Qwen3.5: three of four layers are gated delta nets.

    With images it is a LLaVA whose text model and vision tower both have these layers.
    """

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 1024
    vocab: int = 32000
    tied: bool = True  # head and embeddings share one weight
    hybrid: bool = False
    image: int = 0  # tokens of an image, a square number

    @property
    def head_size(self) -> int:
        """The dimension of an attention head."""
        return self.hidden // self.heads

    @property
    def attention_layers(self) -> int:
        """The number of layers with attention."""
        return self.layers // 4 if self.hybrid else self.layers

    @property
    def layer_parameters(self) -> int:
        """The number of parameters in the matrices of all layers."""
        # Qwen3.5's queries have gates. A delta net has four projections of its heads, two numbers per head, and the
        # output's projection.
        attention = self.hidden * self.head_size * ((3 if self.hybrid else 2) * self.heads + 2 * self.kv_heads)
        delta_net = self.hidden * self.heads * (5 * self.head_size + 2)
        mixers = self.attention_layers * attention + (self.layers - self.attention_layers) * delta_net
        return mixers + self.layers * 3 * self.hidden * self.intermediate

    @property
    def image_flops(self) -> float:
        """The operations of the vision tower's forward for each token of an image."""
        matrices = self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        matrices += (3 * PATCH**2 + 2 * self.hidden) * self.hidden  # of patches, and the projector
        return 2 * matrices + 4 * self.layers * self.hidden * self.image

    image_backward = 2  # see planning.model_sizes.ModelSizes

    @property
    def parameters(self) -> int:
        """The number of parameters in all matrices, embeddings and head included."""
        return self.layer_parameters + (1 if self.tied else 2) * self.hidden * self.vocab

    @property
    def image_size(self) -> int:
        """The height and width of an image in pixels."""
        return PATCH * math.isqrt(self.image)

    def fitted(self, limit: float) -> Shape:
        """Returns the shape with as many of its layers as ``limit`` parameters allow.

        Raises:
            ValueError: Not even one layer fits.
        """
        a_layer = self.layer_parameters / self.layers
        rest = self.parameters - self.layer_parameters
        if rest + a_layer > limit:
            raise ValueError(
                f"one layer and the embeddings have {(rest + a_layer) / 1e6:.0f} million parameters, but the"
                f" memory suffices for {limit / 1e6:.0f} million per contestant: use a smaller --shape or fewer --peers"
            )
        return replace(self, layers=min(self.layers, int((limit - rest) / a_layer)))

    def config(self) -> PreTrainedConfig:
        """Returns the configuration of the model."""
        from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config, Qwen3_5TextConfig

        common: dict[str, Any] = {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": self.tied,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        if self.image:
            tower = {name: common[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
            tower |= {"intermediate_size": self.intermediate, "image_size": self.image_size, "patch_size": PATCH}
            return LlavaConfig(
                text_config=Qwen2Config(**common),
                vision_config=CLIPVisionConfig(**tower),
                image_token_id=FIRST_TOKEN,
                tie_word_embeddings=self.tied,
                vision_feature_layer=-1,
            )
        if not self.hybrid:
            return Qwen2Config(**common)
        return Qwen3_5TextConfig(
            **common,
            head_dim=self.head_size,
            layer_types=["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(self.layers)],
            linear_num_key_heads=self.heads,
            linear_num_value_heads=self.heads,
            linear_key_head_dim=self.head_size,
            linear_value_head_dim=self.head_size,
        )


# Sizes of published models. Two cores train "small" in seconds.
SHAPES = {
    "small": Shape(),
    "qwen-0.5b": Shape(896, 24, 14, 2, 4864, 151936),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256),
    "qwen-3b": Shape(2048, 36, 16, 2, 11008, 151936),
    "llama-8b": Shape(4096, 32, 32, 8, 14336, 128256, tied=False),
}
