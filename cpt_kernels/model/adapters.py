"""Facts about PEFT's adapters that decide how a model with adapters runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


def check_adapters(model: Any) -> None:
    """Raises UserError for adapters that put tokens of their own before the prompt: a batch has no place for them."""
    for config in _configs(model):
        if config.is_prompt_learning:
            raise UserError(
                f"{type(config).__name__} adds tokens to prompts, which packed rows do not support: use LoRA"
            )


def invocations(model: Any) -> list[list[int]]:
    """Returns the token ids that switch on each adapter of the kind aLoRA (arXiv 2504.12397) for what follows them."""
    return [tokens for config in _configs(model) if (tokens := getattr(config, "alora_invocation_tokens", None))]


def marked_tokens(model: Any) -> tuple[int, ...]:
    """Returns tokens that a proof must contain to run all of an adapter: an invocation, and tokens that are trained."""
    marked = list(*invocations(model)[:1])
    for config in _configs(model):
        for option in ("trainable_token_indices", "token_indices"):
            trained = getattr(config, option, None) or ()
            for tokens in trained.values() if isinstance(trained, dict) else [trained]:
                marked += tokens[:2]
    return tuple(marked)


def is_plain_lora(layer: Any, adapter: str) -> bool:
    """Whether an adapter on a layer adds ``s B A x`` and nothing else: no variant, such as DoRA, and no dropout."""
    parts = [getattr(layer, part, {}) for part in ("lora_A", "lora_B")]
    if not all(adapter in part and type(part[adapter]) is nn.Linear for part in parts):
        return False
    dropout = getattr(layer.lora_dropout[adapter], "p", 0.0)  # PEFT uses an Identity for no dropout
    return adapter not in layer.lora_variant and dropout == 0


def spare_input_copies(model: nn.Module) -> None:
    """Spares plain LoRA layers the copy of their input in fp32, the adapter's dtype, that autocast would cast back.

    PEFT makes the copy. Without it every product has the same operands, so outputs and gradients are bitwise the same.
    """
    for layer in model.modules():
        adapters = getattr(layer, "lora_A", None)
        if adapters and all(is_plain_lora(layer, name) for name in adapters):
            layer._cast_input_dtype = _cast_unless_autocast


def _cast_unless_autocast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Casts in place of PEFT's method, but not what autocast would cast back."""
    if x is None or (torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == x.dtype):
        return x
    return x.to(dtype)


def _configs(model: Any) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())
