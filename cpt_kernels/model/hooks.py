"""Changes how a transformers model runs a packed row: attention, RoPE, NEFTune's noise and quantized layers.

Our attention is registered *over* the model's own. It runs only when a packed layout arrives as a keyword argument;
generation and plain forwards of the same model use the model's own attention.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UserError
from ..ops.attention import AttentionLayout, shared_prompt_attention
from ..ops.exchange import SequenceGroup

_PREFIX = "shared_prompt_over_"
# transformers checks that force a GPU sync; disabled during packed forwards. Not every version has both.
_SYNCING_CHECKS = [
    (owner, name)
    for owner, name in (
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    )
    if hasattr(owner, name)
]
# Read where the model builds its masks. Activation checkpointing recomputes layers only, so never that part.
_in_packed_forward = ContextVar("in_packed_forward", default=False)
_FIRST_STAND_IN = 2.0**16  # of `Windows`, divided by powers of two: exact in bf16 and fp16, and no value of a mask
# What a packed forward asks of attention, while `recorded_windows` is active.
_windows: ContextVar[Windows | None] = ContextVar("windows", default=None)
# Tensors that transformers passes to attention functions and that do not change a packed row's attention.
_HARMLESS = {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "position_embeddings", "s_aux"}


@dataclass
class Windows:
    """The sliding windows of a packed forward's attention calls and of their masks; None stands for none.

    In place of a mask the model gets one number, which attention calls return: it tells which mask a layer is given.
    """

    layers: list[tuple[int | None, int | None]] = field(default_factory=list)  # (layer, window) of every call
    masks: list[int | None] = field(default_factory=list)  # of every mask that the model asks for
    other_masks: list[int] = field(default_factory=list)  # of those, the ones that are neither causal nor a window
    differing: int = 0  # calls whose window is not that of their mask

    def stand_in(
        self, q_length: int = 1, mask_function: Callable | None = None, local_size: int | None = None, **_: Any
    ) -> Tensor:
        """Returns the number in place of a mask that a model asks transformers for."""
        if mask_function is not None and not _is_window(mask_function, local_size, q_length):
            self.other_masks.append(len(self.masks))
        self.masks.append(local_size)
        return torch.full((1, 1, 1, 1), _FIRST_STAND_IN * 2.0 ** -len(self.masks))

    def add(self, module: nn.Module, window: int | None, mask: Tensor | None) -> Tensor | None:
        """Notes an attention call. Returns its mask if that is the model's own, None for a stand-in."""
        self.layers.append((getattr(module, "layer_idx", None), window))
        if mask is None:
            return None
        stand_ins = [_FIRST_STAND_IN * 2.0 ** -(number + 1) for number in range(len(self.masks))]
        if mask.numel() != 1 or mask.item() not in stand_ins:
            return mask
        number = stand_ins.index(mask.item())
        self.differing += number in self.other_masks or self.masks[number] != window
        return None


def _is_window(mask_function: Callable, window: int | None, length: int) -> bool:
    """Whether a mask function of transformers is causal, within a window if there is one."""
    # All places of the row, and two by which a window differs from a chunk of the same size.
    places = [(q, k) for q in range(length) for k in range(length)]
    places += [(window, window - 1), (window, 0)] if window else []
    q, k = torch.tensor(places).unbind(1)
    expected = (k <= q) & (q - k < window) if window else k <= q
    try:
        found = torch.as_tensor(mask_function(torch.zeros_like(q), torch.zeros_like(q), q, k)).to("cpu")
    except (IndexError, RuntimeError):  # it depends on tensors of the row
        return False
    return torch.equal(found.expand_as(expected), expected)


def attention_over(implementation: str) -> str:
    """Returns the name of the packed attention over ``implementation`` ("sdpa", "eager", ...).

    The first call registers it with transformers, both as an attention and as a mask function.
    """
    if implementation.startswith(_PREFIX):
        return implementation
    # transformers would import or download a kernel for a name that contains "flash" or a slash.
    name = _PREFIX + implementation.replace("flash", "fa").replace("/", "-")
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    @torch.compiler.disable  # its graph would be valid for the lengths of one batch only
    def attention(
        module: nn.Module,
        query: Tensor,  # (B, Hq, T, D)
        key: Tensor,  # (B, Hk, T, D)
        value: Tensor,  # (B, Hk, T, Dv)
        attention_mask: Tensor | None,
        layout: AttentionLayout | None = None,
        attention_backend: str = "auto",
        **kwargs,
    ):
        # A plain forward: the model's own attention.
        if layout is None:
            if _in_packed_forward.get():
                raise UserError(f"{type(module).__name__} is not given the layout of the packed row")
            eager = sys.modules[type(module).__module__].eager_attention_forward
            own = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
            is_flash = "flash" in implementation
            with _implementation_named(module.config, implementation) if is_flash else contextlib.nullcontext():
                return own(module, query, key, value, attention_mask, **kwargs)
        # A packed row. What would change the attention and is not known here must not be ignored.
        # A mask is the model's own, because those that transformers builds are None in a packed forward.
        if (record := _windows.get()) is not None:
            attention_mask = record.add(module, kwargs.get("sliding_window"), attention_mask)
        given = {**kwargs, "attention_mask": attention_mask}
        unknown = [name for name, x in given.items() if isinstance(x, Tensor) and name not in _HARMLESS]
        if unknown or kwargs.get("is_causal") is False:
            raise UserError(
                f"{type(module).__name__} passes {', '.join(unknown) or 'is_causal=False'} to its attention, which a"
                " packed row does not support"
            )
        out = shared_prompt_attention(
            *(x.squeeze(0).transpose(0, 1) for x in (query, key, value)),
            layout,
            scale=kwargs.get("scaling"),
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            dropout=kwargs.get("dropout") or 0.0,
            backend=attention_backend,
        )
        return out[None].contiguous(), None  # some models call .view on it

    def mask(*args, **kwargs):
        if not _in_packed_forward.get():
            return ALL_MASK_ATTENTION_FUNCTIONS[implementation](*args, **kwargs)
        record = _windows.get()
        return None if record is None else record.stand_in(**kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    return name


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Sets the attention implementation of a model's text, where the model has a choice.

    Parts for images and sounds keep their own, because they may support fewer.
    """
    config, text = model.config, model.config.get_text_config()
    if implementation == config._attn_implementation == text._attn_implementation:
        return
    if not model._can_set_attn_implementation():
        return
    parts = {"": implementation}
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            is_text = text is config or part.get_text_config() is text
            parts[name] = implementation if is_text else part._attn_implementation
    model.set_attn_implementation(parts)


@contextlib.contextmanager
def _implementation_named(config: Any, implementation: str) -> Iterator[None]:
    """Sets the name in the config: transformers' flash attention imports the kernel that the config names."""
    ours, config._attn_implementation_internal = config._attn_implementation_internal, implementation
    try:
        yield
    finally:
        config._attn_implementation_internal = ours


@contextlib.contextmanager
def packed_forward() -> Iterator[None]:
    """Context of a forward on a packed row: the model builds no mask, and skips checks that force a GPU sync."""
    token = _in_packed_forward.set(True)
    own = [getattr(owner, name) for owner, name in _SYNCING_CHECKS]
    for owner, name in _SYNCING_CHECKS:
        setattr(owner, name, lambda *_: None)
    try:
        yield
    finally:
        for (owner, name), function in zip(_SYNCING_CHECKS, own):
            setattr(owner, name, function)
        _in_packed_forward.reset(token)


def in_packed_forward() -> bool:
    """Whether the model runs on a packed row. False while activation checkpointing recomputes its layers."""
    return _in_packed_forward.get()


@contextlib.contextmanager
def recorded_windows() -> Iterator[Windows]:
    """Records the windows of all masks and attention calls of a packed forward."""
    record = Windows()
    token = _windows.set(record)
    try:
        yield record
    finally:
        _windows.reset(token)


def lacks_window(model: PreTrainedModel, windows: Windows) -> bool:
    """Whether a layer that slides, by the config or by its mask, is given no window or another one in a packed row.

    A probe of a few tokens is shorter than most windows, so it does not show this.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    sliding = {layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"}
    if getattr(config, "sliding_window", None) is None:
        sliding = set()
    given = {layer for layer, window in windows.layers if window is not None}
    return windows.differing > 0 or not sliding <= given


def length_dependent_rotaries(model: nn.Module) -> list[nn.Module]:
    """Returns rotary embeddings whose frequencies depend on a batch's longest position: LongRoPE and dynamic NTK."""

    def depends(rope_type: str | dict | None) -> bool:
        kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        return any(kind is not None and ("dynamic" in kind or kind == "longrope") for kind in kinds)

    return [module for module in model.modules() if depends(getattr(module, "rope_type", None))]


def rope_length_limit(rotaries: Sequence[Any]) -> int | None:
    """Returns the length up to which all sequences have the same frequencies; None without such rotaries."""
    limits: list[int] = []
    for rotary in rotaries:
        parameters = rotary.config.rope_parameters
        for kind in parameters.values() if isinstance(rotary.rope_type, dict) else [parameters]:
            original = kind.get("original_max_position_embeddings")
            limits.append(original or rotary.config.max_position_embeddings)
    return min(limits, default=None)


@contextlib.contextmanager
def rope_per_sequence(
    rotaries: list[nn.Module],
    limit: int | None,
    segments: list[tuple[int, int]],
    positions: Tensor | None = None,
    group: SequenceGroup | None = None,
) -> Iterator[None]:
    """Context in which every sequence longer than ``limit`` gets the frequencies of its own length, as if run alone.

    Args:
        limit: see `rope_length_limit`.
        segments: (queries, keys) of the packed row. A sequence longer than ``limit`` shares no prompt, so it is one
            segment.
        positions: (1, T) of the whole row, for a ``group`` over whose ranks it is cut: the longest position of a
            sequence may lie on another rank.
    """
    if not rotaries:
        yield
        return
    assert limit is not None, "rotaries have a limit"
    # Cut the row into spans of equal frequencies: one per long sequence, one for consecutive short ones.
    spans: list[int] = []
    in_short_span = False
    for queries, keys in segments:
        is_short = keys <= limit
        if is_short and in_short_span:
            spans[-1] += queries
        else:
            spans.append(queries)
        in_short_span = is_short

    def patched(rotary: nn.Module, forward: Callable) -> Callable:
        def per_sequence(x: Tensor, position_ids: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
            parts = []
            for some in (position_ids if group is None else positions).split(spans, dim=1):
                _forget_longest(rotary, x.device)
                parts.append(forward(x, some, *args, **kwargs))
            whole = (torch.cat(part, dim=1) for part in zip(*parts))
            return tuple(part if group is None else group.take(part, 1) for part in whole)

        return per_sequence

    with contextlib.ExitStack() as stack:
        for rotary in rotaries:
            stack.enter_context(replaced_forward(rotary, patched(rotary, rotary.forward)))
        yield


def bitsandbytes_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the linear layers of bitsandbytes. On a CPU their eval mode computes differently, see `in_training_mode`.

    Raises:
        UserError: a forward in eval mode has packed 4-bit weights for inference; DoRA is used over 8 bits on a CPU.
    """
    modules: list[Any] = [*model.modules()]
    for module in modules:
        # After every forward, PEFT puts back weights without the scales that the next forward needs.
        if getattr(module, "lora_magnitude_vector", None) and _is_int8_on_cpu(module.get_base_layer()):
            raise UserError(
                "PEFT cannot run DoRA over 8-bit weights on a CPU: load the model in 4 bits (nf4 or fp4), or set"
                " use_dora=False"
            )
    layers = [module for module in modules if type(module).__module__.startswith("bitsandbytes.")]
    if any(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False) for layer in layers):
        raise UserError(
            "a forward in eval mode on a CPU made bitsandbytes pack the model's 4-bit weights for inference, which has"
            " no gradient: load the model again"
        )
    # Forwards outside of this package, such as generation between two steps, must not pack the weights either.
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return layers


def _is_int8_on_cpu(layer: Any) -> bool:
    return layer.weight.dtype == torch.int8 and layer.weight.device.type == "cpu"


@contextlib.contextmanager
def in_training_mode(layers: list[nn.Module]) -> Iterator[None]:
    """Context in which layers are in training mode, so that policy (training) and reference (eval) compute the same.

    On a CPU, bitsandbytes' 8-bit layers round their inputs to 8 bits in eval mode, but not in training mode.
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
def noise_per_sequence(
    embeddings: Any, segments: list[tuple[int, int]], group: SequenceGroup | None = None
) -> Iterator[None]:
    """Context in which NEFTune's noise (arXiv 2310.05914, algorithm 1) depends on the length of every sequence.

    The noise is uniform within ``alpha / sqrt(L d)``. L is the length of the sequence here; transformers' own hook,
    which is off meanwhile, would take the length of the packed row, or of the longest padded row.

    Args:
        segments: (queries, keys) of the packed row; (tokens, tokens) of each padded row.
        group: over whose ranks the packed row is cut.
    """
    alpha = getattr(embeddings, "neftune_noise_alpha", None)
    if alpha is None or not embeddings.training:
        yield
        return
    queries, keys = zip(*segments)
    forward = embeddings.forward

    @torch.compiler.disable  # its graph would be valid for the lengths of one batch only
    def noisy(ids: Tensor) -> Tensor:
        rows = forward(ids)  # (1, tokens, d), or (S, L, d) of padded rows
        is_padded = len(rows) == len(segments) and rows.shape[1] >= max(queries)
        if not is_padded and group is None and rows.shape[:-1].numel() != sum(queries):
            return rows  # of codes of images, which some models embed as text
        lengths = np.array(keys)[:, None] if is_padded else np.repeat(keys, queries)
        bound = torch.from_numpy(alpha / np.sqrt(lengths * rows.shape[-1]))[..., None]
        if group is not None:
            bound = group.take(bound)
        return rows + torch.empty_like(rows).uniform_(-1, 1) * bound.to(rows.device, rows.dtype, non_blocking=True)

    embeddings.training = False  # transformers' hook acts in training mode only, and fails on codes of images
    try:
        with replaced_forward(embeddings, noisy):
            yield
    finally:
        embeddings.training = True


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Context in which a module runs ``forward`` in place of its own forward; the module's hooks still run."""
    own = module.__dict__.get("forward")  # set on the instance, for example by accelerate's hooks
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _forget_longest(rotary: Any, device: torch.device) -> None:
    """Resets a dynamic-NTK rotary embedding, which otherwise remembers the longest sequence that it has seen."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    for layer_type, kind in kinds.items():
        if "dynamic" in kind:
            prefix = "" if layer_type is None else f"{layer_type}_"
            original = getattr(rotary, f"{prefix}original_inv_freq").to(device)
            rotary.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
