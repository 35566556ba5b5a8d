"""Token log-probs -> completion log-probs -> one loss per pair -> one weight per completion."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ...losses import LOSSES, Loss, build_loss
from .. import backends
from .reference import PairLossOutput, pair_loss_reference

__all__ = ["KERNEL_DTYPES", "KERNEL_LOSSES", "PairLossOutput", "check_pairs", "has_kernel", "pair_loss", "weigh_pairs"]

KERNEL_DTYPES = (torch.float32,)

# The losses that the kernels know, each with those of its options that they know. Any other runs in eager PyTorch.
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


def kernel_options(loss: Loss) -> dict[str, float]:
    """What the kernels are given: the options of all their losses, with this loss's values for those that it has."""
    everything = {option: value for options in _DEFAULTS.values() for option, value in options.items()}
    return {**everything, **_DEFAULTS[loss.name], **loss.options}


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
    """Losses of pairs, and how much each completion's log-prob moves their sum.

    Deterministic. The losses of ``KERNEL_LOSSES`` are one launch of CUDA, and one of Triton's or, from some size, two;
    any other runs in eager PyTorch. No autograd: the weights are the gradient.

    Args:
        loss: the name of a built-in loss, its options given as keywords; or a :class:`Loss`, built in or a user's.
        tokens_per_pair: the normaliser of ``sft``; see ``cpt_kernels.losses``.
        backend: ``auto``, ``eager``, ``triton`` or ``cuda``; see ``ops.backends``. fp64 is eager only.

    Returns:
        :class:`PairLossOutput`: completion log-probs (S,), losses (P,), weights (S,).

    Raises:
        ValueError: wrong shapes or dtypes, an unknown loss, a side or a reference that the loss needs is missing, or it
            needs more than a log-prob of each completion; a kernel asked for that does not know the loss; on a CPU,
            offsets or indices out of range. On a GPU looking would cost a synchronisation: there the kernels keep
            offsets within the tokens and give NaN for a pair with an index out of range.
        TypeError: an option is not this loss's.
        RuntimeError: the backend asked for is not available.
    """
    if isinstance(loss, Loss) and options:
        raise ValueError(f"loss '{loss.name}' has its options bound already: {', '.join(options)} cannot be given here")
    bound = loss if isinstance(loss, Loss) else build_loss(loss, **options)
    _check(token_logps, cu_completions, chosen, rejected, targets, ref_logps, bound)
    if not has_kernel(bound):
        if backend not in ("auto", "eager"):
            raise ValueError(f"loss '{bound.name}' has no kernel with its options: take backend 'auto' or 'eager'")
        backend = "eager"
    tensors = (token_logps, cu_completions, chosen, rejected, targets, ref_logps)
    with torch.no_grad():
        if torch.compiler.is_compiling() and has_kernel(bound):
            given = (bound.name, list(bound.options), list(bound.options.values()), tokens_per_pair, backend)
            return PairLossOutput(*torch.ops.cpt_kernels.pair_loss(*tensors, *given))
        return weigh_pairs(*tensors, bound, tokens_per_pair, backends.resolve(backend, token_logps, KERNEL_DTYPES))


@torch.library.custom_op(
    "cpt_kernels::pair_loss",
    mutates_args=(),
    schema="(Tensor token_logps, Tensor cu_completions, Tensor chosen, Tensor? rejected, Tensor? targets,"
    " Tensor? ref_logps, str loss, str[] options, Scalar[] values, float tokens_per_pair, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
def _pair_loss(*arguments) -> tuple[Tensor, Tensor, Tensor]:  # for graphs alone
    *tensors, loss, options, values, tokens_per_pair, backend = arguments
    backend = backends.resolve(backend, tensors[0], KERNEL_DTYPES)
    return tuple(weigh_pairs(*tensors, build_loss(loss, **dict(zip(options, values))), tokens_per_pair, backend))


@_pair_loss.register_fake
def _(token_logps, cu_completions, chosen, *_) -> tuple[Tensor, Tensor, Tensor]:
    completions = cu_completions.shape[0] - 1
    return (
        token_logps.new_empty(completions),
        token_logps.new_empty(chosen.shape[0]),
        token_logps.new_empty(completions),
    )


def weigh_pairs(
    token_logps: Tensor,
    cu_completions: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,
    loss: Loss,
    tokens_per_pair: Tensor | float,
    backend: str,
) -> PairLossOutput:
    """``pair_loss`` on a resolved backend, without checks and without an operator: for operators made of it."""
    if not has_kernel(loss):
        return pair_loss_reference(
            token_logps, cu_completions, chosen, rejected, targets, ref_logps, loss, tokens_per_pair
        )
    if backend == "eager":
        from .closed_form import pair_loss_closed_form as function
    elif backend == "triton":
        from .triton import pair_loss_triton as function
    else:
        from .cuda import pair_loss_cuda as function
    rejected = rejected if loss.needs_rejected else None
    ref_logps = ref_logps.to(token_logps.dtype) if loss.needs_reference else None
    tensors = (token_logps, cu_completions, chosen, rejected, targets, ref_logps)
    return function(*tensors, loss.name, tokens_per_pair, **kernel_options(loss))


def _check(
    token_logps: Tensor,
    cu_completions: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,
    loss: Loss,
) -> None:
    if token_logps.dim() != 1 or token_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"token_logps must be fp32 or fp64 (N,), not {token_logps.dtype} {tuple(token_logps.shape)}")
    check_pairs(token_logps.device, cu_completions, chosen, rejected, targets, ref_logps)
    if loss.needs_rejected and rejected is None:
        raise ValueError(f"loss '{loss.name}' needs rejected completions")
    if loss.needs_reference and ref_logps is None:
        raise ValueError(f"loss '{loss.name}' needs ref_logps")
    if loss.needs_gap or loss.needs_tails or loss.needs_log_sum_sq:
        raise ValueError(f"loss '{loss.name}' needs more than completion log-probs: use linear_preference_loss")
    if ref_logps is not None and ref_logps.dtype != token_logps.dtype:
        raise ValueError(f"ref_logps must be {token_logps.dtype} as token_logps, not {ref_logps.dtype}")
    if token_logps.device.type == "cpu" and not torch.compiler.is_compiling():
        if cu_completions[0] != 0 or cu_completions[-1] != len(token_logps) or (cu_completions.diff() < 0).any():
            raise ValueError(f"cu_completions must ascend from 0 to {len(token_logps)}")
        completions = len(cu_completions) - 1
        for name, side in {"chosen": chosen, "rejected": rejected, "targets": targets}.items():
            if side is not None and ((side < 0) | (side >= completions)).any():
                raise ValueError(f"{name} must index the {completions} completions")


def check_pairs(
    device: torch.device,
    cu_completions: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,
) -> None:
    """Hold pairs to their shapes, dtypes and device.

    Raises:
        ValueError: they do not fit.
    """
    if cu_completions.dim() != 1 or len(cu_completions) == 0 or cu_completions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_completions must be int32 or int64 (S+1,), not {cu_completions.dtype}")
    completions = len(cu_completions) - 1
    sides = {"chosen": chosen, "rejected": rejected, "targets": targets}
    for name, side in sides.items():
        if side is not None and (side.shape != chosen.shape or side.dim() != 1 or side.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 ({len(chosen)},), not {side.dtype} {tuple(side.shape)}")
    if ref_logps is not None and ref_logps.shape != (completions,):
        raise ValueError(f"ref_logps must have shape ({completions},), not {tuple(ref_logps.shape)}")
    if any(t is not None and t.device != device for t in (cu_completions, ref_logps, *sides.values())):
        raise ValueError(f"log-probs and pairs must be on one device, {device}")
