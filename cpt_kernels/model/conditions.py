"""The conditions of a proof: a model's state is put back, its weights are magnified, and its routing is pinned."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

_CHOOSERS = (torch.topk, Tensor.topk, torch.max, Tensor.max)  # that return values and indices
_ARGMAX = (torch.argmax, Tensor.argmax)
_HALF = (torch.bfloat16, torch.float16)
_OF_MACHINE = ("can't allocate memory", "out of memory", "CUDA error", "NCCL", "gloo", "[enforce fail")
_PERTURBATION = 0.02  # of an adapter's parameters that are zero, about what ten steps of training make of them


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards modes, buffers, plain attributes of modules and random states are as before.

    After an error the attention implementation is as before, too.
    """
    plain = {
        module: {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        for module in model.modules()
    }
    buffers = {module: dict(module._buffers) for module in plain if module._buffers}
    copies = {id(b): b.clone() for own in buffers.values() for b in own.values() if b is not None and not b.is_meta}
    attributes = (getattr(module, "config", None) for module in plain)
    configs: dict[int, Any] = {id(config): config for config in attributes if isinstance(config, PretrainedConfig)}
    attention = [(config, config._attn_implementation_internal) for config in configs.values()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            model.eval()
            yield
    except BaseException:
        for config, implementation in attention:
            config._attn_implementation_internal = implementation
        raise
    finally:
        for module, values in plain.items():
            vars(module).update(values)
        for module, own in buffers.items():
            for name, buffer in own.items():
                module._buffers[name] = buffer
                if id(buffer) in copies and not torch.equal(buffer, copies[id(buffer)]):
                    buffer.copy_(copies[id(buffer)])


@contextlib.contextmanager
def magnified(model: nn.Module) -> Iterator[None]:
    """Weights in fp32, and matrices four times as large, so that tokens differ more; afterwards as they were.

    Both can be undone exactly: bf16 and fp16 are subsets of fp32, and 4 is a power of two. Sharded weights keep their
    dtype, because their engine holds them by their storage.
    """
    # FSDP2 keeps the head gathered after a forward, in the compute dtype. A change of its slice would not reach it.
    _reshard(model)
    whole = [p for p in model.parameters() if type(p) is nn.Parameter and not is_sharded(p)]
    dtypes = {p: p.dtype for p in whole if p.dtype in _HALF}
    # Quantized weights have classes or dtypes of their own.
    matrices = [p for p in [*whole, *filter(is_sharded, model.parameters())] if _is_matrix(p)]
    try:
        for p in dtypes:
            p.data = p.data.float()
        for p in matrices:
            _held(p).mul_(4)
        yield
    finally:
        for p in matrices:
            _held(p).div_(4)
        for p, dtype in dtypes.items():
            p.data = p.data.to(dtype)


@contextlib.contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Trained parameters of an adapter that are zero have small values inside; afterwards they are zero again.

    An adapter whose last factor is zero changes nothing, so a proof would not see how the adapter is applied.
    """
    zero: list[Tensor] = []
    if hasattr(model, "peft_config"):
        trained = (_held(p) for p in model.parameters() if p.requires_grad and p.is_floating_point())
        zero = [values for values in trained if values.numel() and not values.any()]
    try:
        for values in zero:
            angles = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.float32)
            values.copy_((_PERTURBATION * angles.sin()).view_as(values))
        yield
    finally:
        for values in zero:
            values.zero_()


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers weights that ZeRO-3 has partitioned, for every module just while it runs, as its engine does later.

    All ranks must run the same modules. Weights that an engine has gathered are left to it. Weights of FSDP2 are left
    to its own hooks; they are resharded at the end.
    """
    handles = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_tensor")]
        if own:
            ours: list[Any] = []
            handles += [
                module.register_forward_pre_hook(lambda *_, own=own, ours=ours: ours.extend(_gather(own))),
                module.register_forward_hook(lambda *_, ours=ours: _partition(ours), always_call=True),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _reshard(model)


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _gather(parameters: Sequence[Any]) -> list[Any]:
    """Gathers the parameters that ZeRO-3 has partitioned and no engine has gathered; returns these."""
    missing = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
    if missing:
        missing[0].all_gather(param_list=missing)
    return missing


def _partition(gathered: list[Any]) -> None:
    if gathered:
        gathered[0].partition(param_list=gathered)
    gathered.clear()


@torch.no_grad()
def whole_tensor(tensor: Any) -> Tensor:
    """Returns all values of a tensor. Those of a sharded one are gathered on every rank, and all ranks must call it."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()
    if not hasattr(tensor, "ds_tensor"):
        return tensor.detach()
    ours = _gather([tensor])
    values = tensor.detach().clone()
    _partition(ours)
    return values


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process holds only a part of a parameter: FSDP2 or ZeRO-3."""
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "to_local")


def _held(parameter: Any) -> Tensor:
    """Returns the part of a parameter that this process holds; changes of it in place are changes of the parameter."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.data


def _is_matrix(parameter: Any) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return parameter.is_floating_point() and parameter.dtype.itemsize > 1 and len(shape) >= 2


class PinnedRouting(TorchFunctionMode):
    """The experts of every token in a mixture of experts: those that its first run chose, in all runs.

    Rounding can flip the choice between two experts with nearly equal scores, and the difference is then as large as
    the output itself. So runs are compared under one choice. Each run still computes its own weights of the experts.

    A token is known by the tokens up to it. A choice is a call of topk, max or argmax over the last dimension of a
    tensor with rows for all tokens, one or several (groups of experts) each. Calls are told apart by the number of
    columns and counted, so calls over keys, whose number depends on the length, do not mix with those over experts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ids: dict[tuple[int, ...], int] = {}  # tokens up to a token -> number of the token
        self._choices: dict[tuple, dict[int, Tensor]] = {}  # call -> number of a token -> indices
        self._shape = (0, 0)  # batch and length of the current run
        self._tokens: list[int] = []  # of the current run, -1 at pads
        self._calls: Counter[tuple] = Counter()  # of the current run

    @contextlib.contextmanager
    def follow(
        self, parts: Sequence[Sequence[int]], shared: Sequence[int] = (), rows: int = 1, cut: slice = slice(None)
    ) -> Iterator[None]:
        """Context of a run whose tokens are those of ``parts``, one after the other.

        Args:
            parts: token ids from the start of a sequence.
            shared: tokens at the start of each part that are not run, because an earlier part has them.
            rows: of the batch; with several, each is one part, padded on the right.
            cut: the tokens that this process runs, of a row that is cut over processes.
        """
        length = max(map(len, parts)) if rows > 1 else 0
        self._tokens, self._calls = [], Counter()
        for part, skipped in zip(parts, shared or [0] * len(parts)):
            numbers = [self._ids.setdefault(tuple(part[: end + 1]), len(self._ids)) for end in range(len(part))]
            self._tokens += numbers[skipped:] + [-1] * (length - len(part))
        self._tokens = self._tokens[cut]
        self._shape = rows, len(self._tokens) // rows
        with self:
            yield

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        is_choice = function in _ARGMAX or (function in _CHOOSERS and not isinstance(out, Tensor))
        return self._pin(function.__name__, args[0], out) if is_choice and args else out

    def _pin(self, function: str, scores: Tensor, out: Any) -> Any:
        indices = out if isinstance(out, Tensor) else out[1]
        has_rows = scores.shape[0] == len(self._tokens) or (scores.dim() > 2 and scores.shape[:2] == self._shape)
        if scores.dim() < 2 or not has_rows or indices.shape[: scores.dim() - 1] != scores.shape[:-1]:
            return out
        # Tokens that were seen in this call of an earlier run keep their choice; others make theirs.
        kind = (function, scores.dim(), scores.shape[-1])
        call = (*kind, self._calls[kind])
        self._calls[kind] += 1
        known = self._choices.setdefault(call, {})
        found = indices.reshape(len(self._tokens), -1)
        chosen = found.clone()
        for place, token in enumerate(self._tokens):
            if token >= 0:
                chosen[place] = known.setdefault(token, found[place].clone())
        chosen = chosen.view_as(indices)
        if isinstance(out, Tensor):
            return chosen
        is_kept = chosen.dim() == scores.dim()
        values = scores.gather(-1, chosen if is_kept else chosen[..., None])
        return type(out)((values if is_kept else values[..., 0], chosen))


def is_of_machine(error: BaseException) -> bool:
    """Whether an error says something of the machine (memory, device, other ranks) rather than of the model."""
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError, MemoryError, OSError)
    return isinstance(error, kinds) or any(words in str(error) for words in _OF_MACHINE)


def why_not_finite(model: PreTrainedModel) -> str:
    """Returns the likely cause of log-probs that are NaN or inf, and the mend, for an error message."""
    tensors = *model.named_parameters(), *model.named_buffers()
    if broken := [name for name, tensor in tensors if not tensor.float().isfinite().all()]:
        return (
            f"{len(broken)} of its weights hold NaN or inf, such as {broken[0]}: its files are damaged, or training"
            " had diverged when they were saved; load an earlier checkpoint"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    return f"its weights are finite, but its forward overflows in {dtype}; load it with dtype bfloat16 or float32"
