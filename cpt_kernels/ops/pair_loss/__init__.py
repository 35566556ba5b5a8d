"""Token log-probs -> completion log-probs -> one loss per pair -> one weight per completion."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from ...losses import LOSSES, Loss, build_loss
from .. import backends
from .reference import PairLossOutput, pair_loss_reference

__all__ = ["KERNEL_LOSSES", "PairLossOutput", "pair_loss"]

_KERNEL_DTYPES = (torch.float32,)

# The built-in losses whose closed form the kernels have; the others run in eager PyTorch.
KERNEL_LOSSES = ("sigmoid", "hinge", "ipo", "slic", "sft")
# Every option of every one of them, with its default.
_OPTIONS = {
    parameter.name: parameter.default
    for name in KERNEL_LOSSES
    for parameter in inspect.signature(LOSSES[name].function).parameters.values()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


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
    """Losses of pairs, and how much each completion's log-prob moves their sum; for ``KERNEL_LOSSES`` one launch.

    Deterministic. CUDA does it in one launch, Triton in one or, from some size, two. No autograd: the weights are the
    gradient.

    Args:
        loss: the name of a built-in loss, its options given as keywords; or a :class:`Loss` (any function), which runs
            in eager PyTorch.
        tokens_per_pair: the normaliser of ``sft``; see ``losses.py``.
        backend: ``auto``, ``eager``, ``triton`` or ``cuda``; see ``ops.backends``. fp64 is eager only.

    Returns:
        :class:`PairLossOutput`: completion log-probs (S,), losses (P,), weights (S,).

    Raises:
        ValueError: wrong shapes or dtypes, an unknown loss, a side or a reference that the loss needs is missing, or it
            needs more than a log-prob of each completion; on a CPU, offsets or indices out of range. On a GPU looking
            would cost a synchronisation: there the kernels keep offsets within the tokens and give NaN for a pair with
            an index out of range.
        TypeError: an option is not this loss's.
        RuntimeError: the backend asked for is not available.
    """
    bound = loss if isinstance(loss, Loss) else build_loss(loss, **options)
    _check(token_logps, cu_completions, chosen, rejected, targets, ref_logps, bound)
    if isinstance(loss, Loss) and options:
        raise ValueError("a Loss has its options bound; give a built-in loss by name")
    if isinstance(loss, Loss) or loss not in KERNEL_LOSSES or bound.options is None:
        if backend not in ("auto", "eager"):
            raise ValueError(
                f"backend='{backend}' has kernels for {', '.join(KERNEL_LOSSES)} by name; a Loss and any other built-in"
                " loss run in eager PyTorch"
            )
        backend = "eager"
    backend = backends.resolve(backend, token_logps, _KERNEL_DTYPES)
    rejected = rejected if bound.needs_rejected else None
    ref_logps = ref_logps if bound.needs_reference else None
    tensors = (token_logps, cu_completions, chosen, rejected, targets, ref_logps)
    with torch.no_grad():
        if backend == "eager":
            return pair_loss_reference(*tensors, bound, tokens_per_pair)
        values = {**_OPTIONS, **options}.values()
        return PairLossOutput(*torch.ops.cpt_kernels.pair_loss(*tensors, loss, *values, tokens_per_pair, backend))


@torch.library.custom_op("cpt_kernels::pair_loss", mutates_args=())
def _pair_loss(  # the kernels; eager PyTorch needs no operator
    token_logps: Tensor,
    cu_completions: Tensor,
    chosen: Tensor,
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    slic_delta: float,
    slic_lambda: float,
    slic_length_normalize: bool,
    tokens_per_pair: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values = (beta, label_smoothing, slic_delta, slic_lambda, slic_length_normalize)
    options = dict(zip(_OPTIONS, values, strict=True))
    tensors = (token_logps, cu_completions, chosen, rejected, targets, ref_logps)
    if backend == "triton":
        from .triton import pair_loss_triton as function
    else:
        from .cuda import pair_loss_cuda as function
    return tuple(function(*tensors, loss, tokens_per_pair, **options))


@_pair_loss.register_fake
def _(token_logps, cu_completions, chosen, *_) -> tuple[Tensor, Tensor, Tensor]:
    completions = cu_completions.shape[0] - 1
    return (
        token_logps.new_empty(completions),
        token_logps.new_empty(chosen.shape[0]),
        token_logps.new_empty(completions),
    )


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
    if cu_completions.dim() != 1 or len(cu_completions) == 0 or cu_completions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_completions must be int32 or int64 (S+1,), not {cu_completions.dtype}")
    completions = len(cu_completions) - 1
    sides = {"chosen": chosen, "rejected": rejected, "targets": targets}
    for name, side in sides.items():
        if side is not None and (side.shape != chosen.shape or side.dim() != 1 or side.dtype != torch.int64):
            raise ValueError(f"{name} must be int64 ({len(chosen)},), not {side.dtype} {tuple(side.shape)}")
    if loss.needs_rejected and rejected is None:
        raise ValueError(f"loss '{loss.name}' needs rejected completions")
    if loss.needs_reference and ref_logps is None:
        raise ValueError(f"loss '{loss.name}' needs ref_logps")
    if loss.needs_gap or loss.needs_tails or loss.needs_log_sum_sq:
        raise ValueError(f"loss '{loss.name}' needs more than completion log-probs: use linear_preference_loss")
    if ref_logps is not None and (ref_logps.shape != (completions,) or ref_logps.dtype != token_logps.dtype):
        raise ValueError(f"ref_logps must be {token_logps.dtype} ({completions},), not {ref_logps.dtype}")
    tensors = [cu_completions, ref_logps, *sides.values()]
    if any(t is not None and t.device != token_logps.device for t in tensors):
        raise ValueError(f"all tensors must be on one device, {token_logps.device}")
    if token_logps.device.type == "cpu" and not torch.compiler.is_compiling():
        if cu_completions[0] != 0 or cu_completions[-1] != len(token_logps) or (cu_completions.diff() < 0).any():
            raise ValueError(f"cu_completions must ascend from 0 to {len(token_logps)}")
        for name, side in sides.items():
            if side is not None and ((side < 0) | (side >= completions)).any():
                raise ValueError(f"{name} must index the {completions} completions")
