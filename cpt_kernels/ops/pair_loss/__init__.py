"""``pair_loss``: token log-probs -> completion log-probs -> one loss per pair -> one weight per completion.

``reference`` defines it and runs any loss by autograd. For the losses in ``KERNEL_LOSSES``, ``BACKENDS`` lists a closed
form in eager PyTorch and the kernels ``triton`` and ``cuda``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...losses import LOSSES, Loss, build_loss
from .. import backends
from ..backends import Backend
from .closed_form import KernelLoss
from .reference import PairLossInput, PairLossOutput, pair_loss_reference

__all__ = [
    "BACKENDS",
    "KERNEL_LOSSES",
    "KernelLoss",
    "PairLossInput",
    "PairLossOutput",
    "check_pairs",
    "flat_loss",
    "has_kernel",
    "kernel_loss",
    "pair_loss",
    "unflatten_loss",
    "weigh_pairs",
]

_KERNEL_DTYPES = (torch.float32,)

# A function of this table takes (PairLossInput, KernelLoss) and returns PairLossOutput.
BACKENDS: dict[str, Backend] = {
    "eager": Backend(f"{__name__}.closed_form:pair_loss_closed_form"),
    "triton": Backend(f"{__name__}.triton:pair_loss_triton", _KERNEL_DTYPES, backends.check_triton),
    "cuda": Backend(f"{__name__}.cuda:pair_loss_cuda", _KERNEL_DTYPES, backends.check_extension),
}

# The losses that the kernels know, each with the options that they know of it. Others run in eager PyTorch.
KERNEL_LOSSES = {
    "sigmoid": ("beta", "label_smoothing"),
    "hinge": ("beta",),
    "ipo": ("beta",),
    "slic": ("slic_delta", "slic_lambda", "slic_length_normalize"),
    "sft": (),
}
_DEFAULTS = {
    loss: {option: inspect.signature(LOSSES[loss].function).parameters[option].default for option in options}
    for loss, options in KERNEL_LOSSES.items()
}


def has_kernel(loss: Loss) -> bool:
    """Whether ``loss`` is a built-in one that the kernels know, with options that they know."""
    return loss.options is not None and loss.name in KERNEL_LOSSES and set(loss.options) <= set(_DEFAULTS[loss.name])


def kernel_loss(loss: Loss, tokens_per_pair: Tensor | float = 1.0) -> KernelLoss:
    """Returns ``loss`` as the kernels take it. Options of other losses get their defaults, which are not read."""
    assert loss.options is not None, f"loss '{loss.name}' has no kernel"
    everything = {option: value for options in _DEFAULTS.values() for option, value in options.items()}
    return KernelLoss(loss.name, tokens_per_pair, **{**everything, **_DEFAULTS[loss.name], **loss.options})


def pair_loss(
    token_logps: Tensor,  # (N,) fp32 or fp64
    cu_completions: Tensor,  # (S+1,) int32 or int64, ascending from 0 to N; a completion may be empty
    chosen: Tensor,  # (P,) int64 indices of completions, as the next two; a completion may be in any number of pairs
    rejected: Tensor | None = None,  # None: for losses without a rejected side
    targets: Tensor | None = None,  # y_ref of the regulariser; None: the chosen completions
    ref_logps: Tensor | None = None,  # (S,) reference log-probs of the completions
    *,
    loss: str | Loss = "sigmoid",
    tokens_per_pair: float = 1.0,
    backend: str = "auto",
    **options,
) -> PairLossOutput:
    """Returns the losses of pairs, and the weight of each completion: the derivative of their sum by its log-prob.

    Deterministic. The losses of ``KERNEL_LOSSES`` take one launch in CUDA, and one or, above some size, two in Triton;
    other losses run in eager PyTorch. No autograd: the weights are the gradient.

    Args:
        loss: the name of a built-in loss, its options given as keywords; or a :class:`Loss`, built in or a user's.
        tokens_per_pair: the normaliser of ``sft``; see ``cpt_kernels.losses``.
        backend: ``auto``, ``eager``, ``triton`` or ``cuda``; see ``ops.backends``. fp64 is eager only.

    Returns:
        :class:`PairLossOutput`: completion log-probs (S,), losses (P,), weights (S,).

    Raises:
        UserError: wrong shapes or dtypes, or an unknown loss; a side or a reference that the loss needs is missing, or
            the loss needs more than a log-prob of each completion; a kernel is asked for that does not know the loss;
            on a CPU, offsets or indices out of range. On a GPU that check would cost a synchronisation: there the
            kernels keep offsets within the tokens and return NaN for a pair with an index out of range.
        TypeError: an option is not this loss's.
        RuntimeError: the backend asked for is not available.
    """
    if isinstance(loss, Loss) and options:
        raise UserError(f"loss '{loss.name}' has its options bound already: {', '.join(options)} cannot be given here")
    bound = loss if isinstance(loss, Loss) else build_loss(loss, **options)
    inputs = PairLossInput(token_logps, cu_completions, chosen, rejected, targets, ref_logps)
    _check_pair_loss(inputs, bound)
    if not has_kernel(bound):
        if backend not in ("auto", "eager"):
            raise UserError(f"loss '{bound.name}' has no kernel with its options: take backend 'auto' or 'eager'")
        backend = "eager"
    with torch.no_grad():
        if torch.compiler.is_compiling() and has_kernel(bound):
            flat = {**flat_loss(bound), "tokens_per_pair": tokens_per_pair, "backend": backend}
            return PairLossOutput(*torch.ops.cpt_kernels.pair_loss(*inputs, **flat))
        return weigh_pairs(inputs, bound, tokens_per_pair, backends.resolve(backend, token_logps, BACKENDS))


def weigh_pairs(
    inputs: PairLossInput,
    loss: Loss,
    tokens_per_pair: Tensor | float,  # a tensor only on the eager backend
    backend: str,
) -> PairLossOutput:
    """Runs ``pair_loss`` on a resolved backend, without checks and outside the dispatcher: for the head's passes."""
    if not has_kernel(loss):
        return pair_loss_reference(inputs, loss, tokens_per_pair)
    # Kernels take a missing tensor as "this loss has no such side", so tensors that the loss does not read are dropped.
    ref_logps = inputs.ref_logps if loss.needs_reference else None
    inputs = inputs._replace(
        rejected=inputs.rejected if loss.needs_rejected else None,
        ref_logps=None if ref_logps is None else ref_logps.to(inputs.token_logps.dtype),
    )
    function: Callable[[PairLossInput, KernelLoss], PairLossOutput] = BACKENDS[backend].load()
    return function(inputs, kernel_loss(loss, tokens_per_pair))


# --- Custom operator, used only under torch.compile ---


@torch.library.custom_op(
    "cpt_kernels::pair_loss",
    mutates_args=(),
    schema="(Tensor token_logps, Tensor cu_completions, Tensor chosen, Tensor? rejected, Tensor? targets,"
    " Tensor? ref_logps, *, str loss, str[] loss_options, Scalar[] loss_values, float tokens_per_pair, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def _pair_loss(*tensors, tokens_per_pair, backend, **loss) -> tuple[Tensor, ...]:
    inputs = PairLossInput(*tensors)
    backend = backends.resolve(backend, inputs.token_logps, BACKENDS)
    return tuple(weigh_pairs(inputs, unflatten_loss(**loss), tokens_per_pair, backend))


@_pair_loss.register_fake
def _fake_pair_loss(*tensors, **_) -> tuple[Tensor, ...]:
    return tuple(PairLossOutput.empty(PairLossInput(*tensors)))


def flat_loss(loss: Loss) -> dict[str, Any]:
    """Returns a loss of the kernels as arguments of an operator: its name, and names and values of its options."""
    assert loss.options is not None, f"loss '{loss.name}' has no kernel"
    return {"loss": loss.name, "loss_options": list(loss.options), "loss_values": list(loss.options.values())}


def unflatten_loss(loss: str, loss_options: list[str], loss_values: list[float]) -> Loss:
    """Inverse of :func:`flat_loss`."""
    return _cached_loss(loss, tuple(zip(loss_options, loss_values)))


@functools.cache  # an operator builds its loss in every call
def _cached_loss(loss: str, options: tuple[tuple[str, Any], ...]) -> Loss:
    return build_loss(loss, **dict(options))


# --- Checks ---


def _check_pair_loss(inputs: PairLossInput, loss: Loss) -> None:
    token_logps, cu_completions, _, rejected, _, ref_logps = inputs
    if token_logps.dim() != 1 or token_logps.dtype not in (torch.float32, torch.float64):
        raise UserError(f"token_logps must be fp32 or fp64 (N,), not {token_logps.dtype} {tuple(token_logps.shape)}")
    check_pairs(token_logps.device, *inputs[1:])
    if loss.needs_rejected and rejected is None:
        raise UserError(f"loss '{loss.name}' needs rejected completions")
    if loss.needs_reference and ref_logps is None:
        raise UserError(f"loss '{loss.name}' needs ref_logps")
    if loss.needs_gap or loss.needs_hard or loss.needs_tails or loss.needs_log_sum_sq:
        raise UserError(f"loss '{loss.name}' needs more than completion log-probs: use linear_preference_loss")
    if ref_logps is not None and ref_logps.dtype != token_logps.dtype:
        raise UserError(f"ref_logps must be {token_logps.dtype} as token_logps, not {ref_logps.dtype}")
    if token_logps.device.type == "cpu" and not torch.compiler.is_compiling():
        if cu_completions[0] != 0 or cu_completions[-1] != len(token_logps) or (cu_completions.diff() < 0).any():
            raise UserError(f"cu_completions must ascend from 0 to {len(token_logps)}")
        completions = len(cu_completions) - 1
        for name in ("chosen", "rejected", "targets"):
            side = getattr(inputs, name)
            if side is not None and ((side < 0) | (side >= completions)).any():
                raise UserError(f"{name} must index the {completions} completions")


def check_pairs(
    device: torch.device,
    cu_completions: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,
) -> None:
    """Checks shapes, dtypes and device of pairs.

    Raises:
        UserError: they do not fit.
    """
    if cu_completions.dim() != 1 or len(cu_completions) == 0 or cu_completions.dtype not in (torch.int32, torch.int64):
        raise UserError(f"cu_completions must be int32 or int64 (S+1,), not {cu_completions.dtype}")
    completions = len(cu_completions) - 1
    sides = {"chosen": chosen, "rejected": rejected, "targets": targets}
    for name, side in sides.items():
        if side is not None and (side.shape != chosen.shape or side.dim() != 1 or side.dtype != torch.int64):
            raise UserError(f"{name} must be int64 ({len(chosen)},), not {side.dtype} {tuple(side.shape)}")
    if ref_logps is not None and (ref_logps.shape != (completions,) or not ref_logps.is_floating_point()):
        found = f"{ref_logps.dtype} {tuple(ref_logps.shape)}"
        raise UserError(f"ref_logps must be floating and have shape ({completions},), not {found}")
    if any(t is not None and t.device != device for t in (cu_completions, ref_logps, *sides.values())):
        raise UserError(f"log-probs and pairs must be on one device, {device}")
