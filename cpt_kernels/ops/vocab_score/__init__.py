"""A tile of logits -> log-probs of its targets, statistics and, in place, its score."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from .reference import VocabScore, vocab_score_reference

__all__ = ["KERNEL_DTYPES", "VocabScore", "check_targets", "score_tile", "vocab_score"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# An operator that writes to an argument must return a fixed number of tensors: the fields of VocabScore, with empty
# tensors for statistics that were not asked for.
_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def vocab_score(
    logits: Tensor,  # (R, V) fp64, fp32, bf16 or fp16; last dimension contiguous, any row stride
    targets: Tensor,  # (R,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    statistics: bool = False,
    score: bool = False,
    backend: str = "auto",
) -> VocabScore:
    """Log-prob of each row's target under ``softmax(softcap(logit_scale * (logits + bias)))``; see ``reference.py``.

    Kernels are fastest where rows are a multiple of 16 elements apart: pad the row stride of a tile of odd width.

    Args:
        vocab_size: columns at and above it are padding, with probability 0. Default: all columns are vocabulary.
        statistics: also return entropy, mean logit, target = largest and log sum p^2, each (R,).
        score: overwrite ``logits`` with ``d logp / d logits``: ``onehot - softmax``, through scale and cap.
        backend: ``auto``, ``eager``, ``triton`` or ``cuda``; see ``ops.backends``. fp64 is eager only.

    Returns:
        :class:`VocabScore`, fp32 (fp64 for fp64 logits). No autograd: gradients are built from the score.

    Raises:
        ValueError: wrong shapes, dtypes or strides; on a CPU, a target outside the vocabulary. On a GPU looking would
            cost a synchronisation: there the kernels return NaN for such a row, and eager fails a device assertion.
        RuntimeError: the backend asked for is not available.
    """
    _check(logits, targets, bias, vocab_size, score)
    vocab_size = logits.shape[1] if vocab_size is None else vocab_size
    operator = torch.ops.cpt_kernels.vocab_score_ if score else torch.ops.cpt_kernels.vocab_score
    with torch.no_grad():
        out = operator(logits, targets, bias, logit_scale, softcap, vocab_size, statistics, backend)
    return VocabScore(*(out if statistics else out[:2]))


@torch.library.custom_op("cpt_kernels::vocab_score", mutates_args=())
def _vocab_score(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int,
    statistics: bool,
    backend: str,
) -> _Outputs:
    return _score(logits, targets, bias, logit_scale, softcap, vocab_size, statistics, False, backend)


@torch.library.custom_op("cpt_kernels::vocab_score_", mutates_args=("logits",))
def _vocab_score_(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int,
    statistics: bool,
    backend: str,
) -> _Outputs:
    return _score(logits, targets, bias, logit_scale, softcap, vocab_size, statistics, True, backend)


def _score(logits: Tensor, *arguments) -> _Outputs:
    *arguments, backend = arguments
    backend = backends.resolve(backend, logits, KERNEL_DTYPES)
    out = score_tile(logits, *arguments, backend)
    return tuple(logits.new_empty(0) if tensor is None else tensor for tensor in out)


def score_tile(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int,
    statistics: bool,
    score: bool,
    backend: str,
) -> VocabScore:
    """``vocab_score`` on a resolved backend, without checks and without an operator: for operators made of it."""
    if backend == "eager":
        function = vocab_score_reference
    elif backend == "triton":
        from .triton import vocab_score_triton as function
    else:
        from .cuda import vocab_score_cuda as function
    return function(logits, targets, bias, logit_scale, softcap, vocab_size, statistics, score)


@_vocab_score.register_fake
@_vocab_score_.register_fake
def _(logits, targets, bias, logit_scale, softcap, vocab_size, statistics, backend) -> _Outputs:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = (logits.new_empty(logits.shape[0], dtype=d) for d in (dtype, dtype, dtype, dtype, torch.bool, dtype))
    return tuple(tensor if statistics or i < 2 else logits.new_empty(0) for i, tensor in enumerate(out))


def _check(logits: Tensor, targets: Tensor, bias: Tensor | None, vocab_size: int | None, score: bool) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be a floating (R, V) matrix, not {logits.dtype} {tuple(logits.shape)}")
    rows, columns = logits.shape
    if columns == 0:
        raise ValueError("logits have no columns")
    if columns > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must be contiguous along the vocabulary, their strides are {logits.stride()}")
    if score and rows > 1 and logits.stride(0) < columns:
        raise ValueError(f"rows overlap (strides {logits.stride()}): a score cannot be written over them")
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape ({rows},), not {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias must have shape ({columns},), not {tuple(bias.shape)}")
    if vocab_size is not None and not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} is not within the {columns} columns of logits")
    if any(t is not None and t.device != logits.device for t in (targets, bias)):
        raise ValueError(f"targets and bias must be on the logits' device, {logits.device}")
    if not torch.compiler.is_compiling():
        check_targets(targets, columns if vocab_size is None else vocab_size)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """On a CPU, where looking costs nothing, hold targets to the vocabulary.

    Raises:
        ValueError: one is outside.
    """
    if targets.device.type == "cpu" and len(targets):
        low, high = (x.item() for x in targets.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"targets must lie in [0, {vocab_size}), found {low} to {high}")
