"""``vocab_score``: a tile of logits -> log-probs of its targets, statistics and, in place, the vocab score.

``reference`` defines it, ``triton`` and ``cuda`` are kernels; ``BACKENDS`` lists all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import UserError
from .. import backends
from ..backends import Backend
from .reference import TileOptions, VocabScore

__all__ = ["BACKENDS", "TileOptions", "VocabScore", "check_targets", "fill_absent", "score_tile", "vocab_score"]

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A function of this table takes (logits, targets, TileOptions), scores in place where asked to, returns VocabScore.
BACKENDS: dict[str, Backend] = {
    "eager": Backend(f"{__name__}.reference:vocab_score_reference"),
    "triton": Backend(f"{__name__}.triton:vocab_score_triton", _KERNEL_DTYPES, backends.check_triton),
    "cuda": Backend(f"{__name__}.cuda:vocab_score_cuda", _KERNEL_DTYPES, backends.check_extension),
}


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
    """Returns the log-prob of each row's target under ``softmax(softcap(logit_scale * (logits + bias)))``.

    The formulas are in ``reference.py``. Kernels are fastest where rows are a multiple of 16 elements apart: pad the
    row stride of a tile with an odd number of columns.

    Args:
        vocab_size: columns from here on are padding, with probability 0. Default: all columns are vocabulary.
        statistics: also return entropy, mean logit, target = largest and log sum p^2, each (R,).
        score: overwrite ``logits`` with ``d logp / d logits``: ``onehot - softmax``, through scale and cap. In fp16,
            probabilities below 6e-5 are subnormal and lose digits. Sums over rows average that: a weight's gradient is
            as exact as PyTorch's with a scaled loss for vocabularies up to 131,072, and beyond that from some 16 rows
            on. bf16 has no such limit.
        backend: ``auto``, ``eager``, ``triton`` or ``cuda``; see ``ops.backends``. fp64 is eager only.

    Returns:
        :class:`VocabScore`, fp32 (fp64 for fp64 logits). No autograd: gradients are built from the vocab score.

    Raises:
        UserError: wrong shapes, dtypes or strides; on a CPU, a target outside the vocabulary. On a GPU that check
            would cost a synchronisation: there the kernels return NaN for such a row, and eager fails an assertion on
            the device.
        RuntimeError: the backend asked for is not available.
    """
    _check_tile(logits, targets, TileOptions(bias, logit_scale, softcap, vocab_size, statistics, score))
    operator = torch.ops.cpt_kernels.vocab_score_ if score else torch.ops.cpt_kernels.vocab_score
    with torch.no_grad():
        out = operator(
            logits,
            targets,
            bias,
            logit_scale=logit_scale,
            softcap=softcap,
            vocab_size=logits.shape[1] if vocab_size is None else vocab_size,
            statistics=statistics,
            backend=backend,
        )
    return VocabScore(*(out if statistics else out[:2]))


def score_tile(logits: Tensor, targets: Tensor, options: TileOptions, backend: str) -> VocabScore:
    """Runs ``vocab_score`` on a resolved backend, without checks and outside the dispatcher: for the head's passes."""
    if isinstance(logits, FakeTensor) and logits.device.type != "cpu":  # kernels allocate nothing but their results
        return VocabScore.empty(len(logits), logits, options.statistics)
    function: Callable[[Tensor, Tensor, TileOptions], VocabScore] = BACKENDS[backend].load()
    return function(logits, targets, options)


# --- Operators: flat schemas, one that writes to the tile and one that does not ---

# Such an operator must return a fixed number of tensors: the fields of VocabScore, empty where not asked for.
_SCHEMA = (
    " targets, Tensor? bias, *, float logit_scale, float? softcap, SymInt vocab_size, bool statistics, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("cpt_kernels::vocab_score", mutates_args=(), schema=f"(Tensor logits, Tensor{_SCHEMA}")
def _vocab_score(logits, targets, bias, *, backend, **options) -> tuple[Tensor, ...]:
    return _score_flat(logits, targets, TileOptions(bias, score=False, **options), backend)


@torch.library.custom_op(
    "cpt_kernels::vocab_score_", mutates_args=("logits",), schema=f"(Tensor(a!) logits, Tensor{_SCHEMA}"
)
def _vocab_score_(logits, targets, bias, *, backend, **options) -> tuple[Tensor, ...]:
    return _score_flat(logits, targets, TileOptions(bias, score=True, **options), backend)


def _score_flat(logits: Tensor, targets: Tensor, options: TileOptions, backend: str) -> tuple[Tensor, ...]:
    return fill_absent(logits, score_tile(logits, targets, options, backends.resolve(backend, logits, BACKENDS)))


@_vocab_score.register_fake
@_vocab_score_.register_fake
def _fake_vocab_score(logits, targets, bias, *, statistics, **_) -> tuple[Tensor, ...]:
    return fill_absent(logits, VocabScore.empty(logits.shape[0], logits, statistics))


def fill_absent(like: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Puts an empty tensor in place of each result that is ``None``: operators return tensors alone."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


# --- Checks ---


def _check_tile(logits: Tensor, targets: Tensor, options: TileOptions) -> None:
    if logits.dim() != 2 or logits.dtype not in (torch.float64, *_KERNEL_DTYPES):
        raise UserError(
            f"logits must be a (R, V) matrix in fp64, fp32, bf16 or fp16, not {logits.dtype} {tuple(logits.shape)}"
        )
    rows, columns = logits.shape
    bias, vocab_size = options.bias, options.vocab_size
    if columns == 0:
        raise UserError("logits have no columns")
    if columns > 1 and logits.stride(1) != 1:
        raise UserError(f"logits must be contiguous along the vocabulary, their strides are {logits.stride()}")
    if options.score and rows > 1 and logits.stride(0) < columns:
        raise UserError(f"rows overlap (strides {logits.stride()}): a score cannot be written over them")
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise UserError(f"targets must be int64 of shape ({rows},), not {targets.dtype} {tuple(targets.shape)}")
    if bias is not None and (bias.shape != (columns,) or not bias.is_floating_point()):
        raise UserError(f"bias must be floating and have shape ({columns},), not {bias.dtype} {tuple(bias.shape)}")
    if options.softcap is not None and not 0 < options.softcap < math.inf:
        raise UserError(f"softcap={options.softcap}: must be positive and finite, or None for no cap")
    if vocab_size is not None and not 0 < vocab_size <= columns:
        raise UserError(f"vocab_size={vocab_size} is not within the {columns} columns of logits")
    if any(t is not None and t.device != logits.device for t in (targets, bias)):
        raise UserError(f"targets and bias must be on the logits' device, {logits.device}")
    if not torch.compiler.is_compiling():
        check_targets(targets, options.vocabulary(columns))


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Checks that targets lie in the vocabulary, on a CPU only: reading GPU tensors would cost a synchronisation.

    Raises:
        UserError: a target is outside.
    """
    if targets.device.type == "cpu" and len(targets) and not isinstance(targets, FakeTensor):
        low, high = (x.item() for x in targets.aminmax())
        if low < 0 or high >= vocab_size:
            raise UserError(f"targets must lie in [0, {vocab_size}), found {low} to {high}")
