"""What a transformers model must do differently on a packed row: its attention, and RoPE that depends on lengths.

An attention implementation of ours is registered *over* the model's own: it takes part only where a packed layout
arrives as a keyword argument, so generation and plain forwards of the same model go on as before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError
from ..ops.attention import AttentionLayout, shared_prompt_attention

_PREFIX = "shared_prompt_over_"
_segments = torch.compiler.disable(shared_prompt_attention)  # a graph of it would hold for one batch's lengths alone
# What transformers asks the device about a row, and waits for: whether positions start again, whether it has pads.
_QUESTIONS = [
    (owner, name)
    for owner, name in (
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    )
    if hasattr(owner, name)  # not in every version
]
_packed = ContextVar("packed", default=False)  # masks are built by the model, outside of what checkpointing recomputes


def attention_over(implementation: str) -> str:
    """Name of the packed attention over ``implementation`` ("sdpa", "eager", ...), registered on first use."""
    if implementation.startswith(_PREFIX):
        return implementation
    # A name with "flash" or a slash in it transformers takes for a kernel that it has to import or to download.
    name = _PREFIX + implementation.replace("flash", "fa").replace("/", "-")
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attention(
        module: nn.Module,
        query: Tensor,  # (B, Hq, T, D)
        key: Tensor,  # (B, Hk, T, D)
        value: Tensor,
        attention_mask: Tensor | None,
        layout: AttentionLayout | None = None,
        attention_backend: str = "auto",
        **kwargs,
    ):
        if layout is None:
            eager = sys.modules[type(module).__module__].eager_attention_forward
            own = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
            with _named(module.config, implementation) if "flash" in implementation else contextlib.nullcontext():
                return own(module, query, key, value, attention_mask, **kwargs)
        out = _segments(
            *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
            layout,
            scale=kwargs.get("scaling"),
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            dropout=kwargs.get("dropout") or 0.0,
            backend=attention_backend,
        )
        return out[None], None

    def mask(*args, **kwargs):
        return None if _packed.get() else ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    return name


@contextlib.contextmanager
def _named(config: PreTrainedConfig, implementation: str) -> Iterator[None]:
    """transformers' flash attention imports the kernel that the config names."""
    ours, config._attn_implementation_internal = config._attn_implementation_internal, implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = ours


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """The forward inside runs a packed row, whose masking is the attention's own business."""
    token = _packed.set(True)
    own = [getattr(owner, name) for owner, name in _QUESTIONS]
    for owner, name in _QUESTIONS:
        setattr(owner, name, lambda *_: None)
    try:
        yield
    finally:
        for (owner, name), function in zip(_QUESTIONS, own):
            setattr(owner, name, function)
        _packed.reset(token)


def length_dependent_rotaries(model: nn.Module) -> list[nn.Module]:
    """Rotary embeddings that choose frequencies by the longest position of a *batch*: LongRoPE and dynamic NTK."""

    def depends(rope_type: str | dict | None) -> bool:
        kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        return any(kind is not None and ("dynamic" in kind or kind == "longrope") for kind in kinds)

    return [module for module in model.modules() if depends(getattr(module, "rope_type", None))]


def rope_length_limit(rotaries: list[nn.Module]) -> int | None:
    """Longest sequence for which frequencies are the same as for any shorter one; ``None`` without such rotaries."""
    limits = []
    for rotary in rotaries:
        parameters = rotary.config.rope_parameters
        for kind in parameters.values() if isinstance(rotary.rope_type, dict) else [parameters]:
            original = kind.get("original_max_position_embeddings")
            limits.append(original or rotary.config.max_position_embeddings)
    return min(limits, default=None)


@contextlib.contextmanager
def rope_per_sequence(rotaries: list[nn.Module], limit: int | None, segments: list[tuple[int, int]]) -> Iterator[None]:
    """Let every sequence longer than ``limit`` take its frequencies by its own length, as if it were run alone.

    ``segments`` are the (queries, keys) of the row; a longer sequence shares nothing, so it is one segment. All shorter
    ones have the same frequencies and are done together.
    """
    if not rotaries:
        yield
        return
    spans: list[int] = []
    in_short_span = False
    for queries, keys in segments:
        short = keys <= limit
        if short and in_short_span:
            spans[-1] += queries
        else:
            spans.append(queries)
        in_short_span = short

    def patched(rotary: nn.Module, forward):
        def per_sequence(x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
            parts = []
            for positions in position_ids.split(spans, dim=1):
                _reset(rotary, x.device)
                parts.append(forward(x, positions, *args, **kwargs))
            return tuple(torch.cat(part, dim=1) for part in zip(*parts))

        return per_sequence

    with contextlib.ExitStack() as stack:
        for rotary in rotaries:
            stack.enter_context(replaced_forward(rotary, patched(rotary, rotary.forward)))
        yield


def quantised_layers(model: nn.Module) -> list[nn.Module]:
    """Linear layers of bitsandbytes, which on a CPU compute in another way in eval mode, see :func:`as_in_training`.

    Raises:
        UserError: a forward in eval mode has packed 4-bit weights for inference already; DoRA over 8 bits on a CPU.
    """
    for module in model.modules():
        # After each forward there PEFT puts weights in place that have no scales, which the next one lacks.
        if getattr(module, "lora_magnitude_vector", None) and _is_int8_on_cpu(module.get_base_layer()):
            raise UserError(
                "DoRA over weights of 8 bits cannot be run by PEFT on a CPU: load the model in 4 bits (nf4 or fp4), or"
                " set use_dora=False"
            )
    layers = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    if any(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False) for layer in layers):
        raise UserError(
            "a forward in eval mode on a CPU has made bitsandbytes pack the model's 4-bit weights for inference, which"
            " has no gradient: load the model anew"
        )
    for layer in layers:  # nor shall anybody else's forward, such as generation between two steps
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return layers


def _is_int8_on_cpu(layer: nn.Module) -> bool:
    return layer.weight.dtype == torch.int8 and layer.weight.device.type == "cpu"


@contextlib.contextmanager
def as_in_training(layers: list[nn.Module]) -> Iterator[None]:
    """Let quantised layers compute as in training, so that a reference (eval mode) is scored as the policy is trained.

    On a CPU, bitsandbytes' 8-bit layers round their inputs to 8 bits, too, in eval mode alone.
    """
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes):
            layer.training = mode


@contextlib.contextmanager
def noise_per_sequence(embeddings: nn.Module, segments: list[tuple[int, int]]) -> Iterator[None]:
    """Let NEFTune's noise (arXiv 2310.05914, algorithm 1), uniform within ``alpha / sqrt(L d)``, take every sequence's
    own length for L. That which transformers adds while training would take the row's.

    ``segments`` are the (queries, keys) of the row.
    """
    alpha = getattr(embeddings, "neftune_noise_alpha", None)
    if alpha is None or not embeddings.training:
        yield
        return
    queries, keys = zip(*segments)
    forward = embeddings.forward

    @torch.compiler.disable  # a graph of it would hold for one batch's lengths alone
    def noisy(ids: Tensor) -> Tensor:
        rows = forward(ids)  # (1, T, d)
        bound = torch.from_numpy(alpha / np.sqrt(np.repeat(keys, queries) * rows.shape[-1]))[:, None]
        return rows + torch.empty_like(rows).uniform_(-1, 1) * bound.to(rows.device, rows.dtype, non_blocking=True)

    embeddings.neftune_noise_alpha = 0.0
    try:
        with replaced_forward(embeddings, noisy):
            yield
    finally:
        embeddings.neftune_noise_alpha = alpha


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let a module run ``forward`` instead of its own, behind its hooks."""
    own = module.__dict__.get("forward")  # set on the instance, e.g. by accelerate's hooks
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _reset(rotary: nn.Module, device: torch.device) -> None:
    """Dynamic NTK remembers the longest sequence that it ever saw; forget it."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    for layer_type, kind in kinds.items():
        if "dynamic" in kind:
            prefix = "" if layer_type is None else f"{layer_type}_"
            original = getattr(rotary, f"{prefix}original_inv_freq").to(device)
            rotary.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
