"""What a model's output head computes: the operands of its product, its scale and soft-cap, log-probs of its logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UserError
from ..ops.linear_preference import HeadOptions
from ..ops.vocab_score import VocabScore, vocab_score
from .adapters import is_plain_lora
from .hooks import replaced_forward
from .proof import OwnForward, Probe


def head_operands(head: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Returns (rows, weight, bias) such that ``head`` computes ``rows @ weight.T + bias``, including PEFT's wrappers.

    None if an adapter on the head is not known to be a matrix product: of LoRA, only the plain kind without dropout is.

    Raises:
        UserError: the head is quantized.
    """
    # modules_to_save: a full copy of the head is trained.
    if hasattr(head, "modules_to_save"):
        trained = not head.disable_adapters and head.active_adapters
        head = head.modules_to_save[head.active_adapters[0]] if trained else head.original_module
    # trainable_token_indices: rows of an embedding that is tied to the head are trained.
    if hasattr(head, "token_adapter"):
        tokens = head.token_adapter
        trained = not (tokens.disable_adapters or tokens.merged) and tokens.active_adapters
        return rows, tokens.get_merged_weights(trained or []), None if trained else tokens.base_layer.bias
    # A plain head, or one whose adapter is off or merged.
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    weight, bias = base.weight, base.bias
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):  # bitsandbytes stores 4 bits in any dtype
        raise UserError(
            f"the output head is quantized ({weight.dtype}): load the model with an unquantized head"
            " (llm_int8_skip_modules=['lm_head'])"
        )
    if base is head or head.disable_adapters or head.merged:
        return rows, weight, bias
    # LoRA: X W^T + s (X A^T) B^T = [X, X A^T] [W, s B]^T, so an adapter adds columns to both operands.
    hidden_columns, weight_columns = [rows], [weight]
    if hasattr(head.base_layer, "get_base_layer"):  # adapters of two kinds, one around the other
        return None
    for name in head.active_adapters:
        if not any(name in getattr(head, part) for part in head.adapter_layer_names):
            continue  # this adapter leaves the head out
        if not is_plain_lora(head, name):
            return None
        a, b = head.lora_A[name].weight, head.lora_B[name].weight
        hidden_columns.append(rows.to(a.dtype) @ a.t())
        weight_columns.append(b * head.scaling[name])
        if (lora_bias := head.lora_B[name].bias) is not None:
            bias = lora_bias * head.scaling[name] + (0 if bias is None else bias)
    dtype = rows.dtype
    return (
        torch.cat([c.to(dtype) for c in hidden_columns], 1),
        torch.cat([c.to(dtype) for c in weight_columns], 1),
        bias,
    )


def head_options(model: PreTrainedModel, memory_mb: float | None) -> HeadOptions:
    """Returns the logit scale and soft-cap of a model. Configs keep them under several names."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            scale = float(value)
            break
    else:
        if (value := getattr(config, "logits_scaling", None)) is not None:
            scale = float(value) if config.model_type == "hyperclovax" else 1 / float(value)
    return HeadOptions(scale, getattr(config, "final_logit_softcapping", None), memory_mb=memory_mb)


def logits_logps(logits: Tensor, targets: Tensor, statistics: bool) -> VocabScore:
    """Returns log-probs of targets (N,) under logits (N, V), differentiable, and statistics if they are asked for."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = z.log_softmax(-1)
    logps, lse = log_p.gather(-1, targets[:, None])[:, 0], z.detach().logsumexp(-1)
    if not statistics:
        return VocabScore(logps, lse)
    with torch.no_grad():
        # A logit of -inf has p = 0 and adds nothing, but 0 * -inf would be NaN.
        entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(z.dtype).min)).sum(-1)
        correct = z.gather(-1, targets[:, None])[:, 0] >= z.amax(-1)
    return VocabScore(logps, lse, entropy, z.detach().mean(-1), correct, (2 * log_p).logsumexp(-1))


@torch.no_grad()
def find_head_options(model: PreTrainedModel, read: HeadOptions, own: OwnForward, probe: Probe) -> HeadOptions | None:
    """Returns the scale and soft-cap that turn the head's product into the model's logits.

    Candidates are those read from the config, none at all, and a scale measured on the logits, because a config may
    name a scale that the model does not apply. Returns None if no candidate gives the log-probs of the model's logits.

    Raises:
        UserError: the head is quantized.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    plain_head = head.get_base_layer() if hasattr(head, "get_base_layer") else getattr(head, "original_module", head)
    if not {name for name, _ in plain_head.named_parameters()} <= {"weight", "bias"}:
        return None  # it trains more than a product, such as a scale
    ids = torch.tensor([probe.sequences[0][0]], device=model.device)
    seen: list[tuple[Tensor, Tensor]] = []  # the head's output, and the product of its operands
    forward = head.forward

    def recording(hidden: Tensor, *args, **kwargs) -> Tensor:
        output = forward(hidden, *args, **kwargs)
        if output.shape[:2] == ids.shape:
            operands = head_operands(head, hidden[0])  # inside, where an engine has gathered the weight
            if operands is not None:
                seen.append((output[0].float(), torch.nn.functional.linear(*operands).float()))
        return output

    with replaced_forward(head, recording):
        logits = own(ids)[0]
    if len(seen) != 1:
        return None
    ((raw, product),) = seen
    # The product itself must be the head's output: an adapter may do more than the operands say.
    eps = max(torch.finfo(logits.dtype).eps, torch.finfo(probe.dtype).eps, torch.finfo(torch.float32).eps)
    logits = logits.float()
    if (product - raw).abs().max() > 20 * eps * (1 + raw.abs().max()):
        return None
    measured = float((logits * product).sum() / (product * product).sum())
    plain = dataclasses.replace(read, logit_scale=1.0, softcap=None)
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    expected = vocab_score(logits, targets).logps
    differences: dict[HeadOptions, float] = {}
    for options in (read, plain, dataclasses.replace(plain, logit_scale=measured)):
        found = vocab_score(product, targets, logit_scale=options.logit_scale, softcap=options.softcap).logps
        # Relative to the product: a model may set logits of tokens that it never gives to the lowest number.
        scale = 1 + (options.logit_scale * product).abs().max()
        differences[options] = ((expected - found).abs().max() / scale).nan_to_num(float("inf")).item()
    options = min(differences, key=differences.__getitem__)
    return options if differences[options] <= 20 * eps else None
