"""The definition of ``vocab_score`` in PyTorch; it is also the implementation of the ``eager`` backend.

For a row ``x`` of a tile of logits with target ``y``:

    z = softcap(logit_scale * (x + bias)),   softcap(u) = c tanh(u / c) or u
    lse = log sum_v exp z_v,   log p = z_y - lse,   p = softmax(z)

over the columns below ``vocab_size``. Columns from there on are padding: probability 0, no gradient. Statistics:
entropy ``lse - sum p z``, mean logit ``mean_v z``, ``z_y == max z`` and ``log sum p^2``. The vocab score, which
overwrites the tile, is ``d log p / d x = (onehot(y) - p) dz/dx`` with ``dz/dx = logit_scale * (1 - (z/c)^2)``.

Log-probs, entropy and score are computed from ``z - max z``, so a large number that all logits of a row have in common
costs them no digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# On a CPU rows are computed in blocks whose fp32 temporaries stay in the cache: about 4 MiB each. A block runs some ten
# parallel regions, and threads wait for each other at the end of each, so smaller blocks are slower on a busy machine.
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class TileOptions:
    """How a tile of raw logits is read, and what is computed from it."""

    bias: Tensor | None = None  # (V,), added to the logits
    logit_scale: float = 1.0  # factor on logits + bias
    softcap: float | None = None  # logits become ``softcap * tanh(logits / softcap)``, after the scale
    # columns from here on are padding, with probability 0. ``None``: all columns are vocabulary.
    vocab_size: int | None = None
    statistics: bool = False  # also compute entropy, mean logit, top-1 and log sum p^2
    score: bool = False  # overwrite the tile with ``d log p / d logits``

    def vocabulary(self, columns: int) -> int:
        """Number of columns that are vocabulary, not padding."""
        return columns if self.vocab_size is None else self.vocab_size


class VocabScore(NamedTuple):
    """Results for R rows, fp32 (fp64 for an fp64 tile); the last four are ``None`` unless asked for."""

    logps: Tensor  # (R,) log-prob of the target, nats
    lse: Tensor  # (R,) log-sum-exp
    entropy: Tensor | None = None  # (R,) nats
    mean_logit: Tensor | None = None  # (R,)
    correct: Tensor | None = None  # (R,) bool, no logit is larger than the target's
    log_sum_sq: Tensor | None = None  # (R,) log sum_v p_v^2

    @classmethod
    def empty(cls, rows: int, like: Tensor, statistics: bool) -> VocabScore:
        """Allocates results for a tile of ``like``'s dtype and device, not initialised."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        kinds = (dtype, dtype, torch.bool, dtype) if statistics else ()
        logps, lse, *others = (like.new_empty(rows, dtype=kind) for kind in (dtype, dtype, *kinds))
        return cls(logps, lse, *others)

    def part(self, rows: slice) -> VocabScore:
        """Returns views of some rows."""
        return VocabScore(self.logps[rows], self.lse[rows], *(None if x is None else x[rows] for x in self[2:]))


def vocab_score_reference(
    logits: Tensor,  # (R, V) fp64, fp32, bf16 or fp16; last dimension contiguous
    targets: Tensor,  # (R,) int64 in [0, vocab_size)
    options: TileOptions,
) -> VocabScore:
    """Scores a tile; with ``options.score`` its contents become ``d log p / d logits`` in the tile's dtype."""
    rows, columns = logits.shape
    out = VocabScore.empty(rows, logits, options.statistics)
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1)) if logits.device.type == "cpu" else max(rows, 1)
    if rows <= step:
        _score_block(logits, targets, options, out)
        return out
    starts = range(0, rows, step)
    for start in starts[:1] if isinstance(logits, FakeTensor) else starts:  # one block tells the memory of all
        block = slice(start, start + step)
        _score_block(logits[block], targets[block], options, out.part(block))
    return out


def _score_block(
    logits: Tensor,  # (R, V)
    targets: Tensor,  # (R,)
    options: TileOptions,
    out: VocabScore,  # (R,) written
) -> None:
    # Logits z after bias, scale and soft-cap. `x` is the part of the tile that is vocabulary; z may be x itself.
    vocab, softcap = options.vocabulary(logits.shape[1]), options.softcap
    x = logits if vocab == logits.shape[1] else logits[:, :vocab]
    z = x.to(out.lse.dtype)
    if options.bias is not None:
        z = z + options.bias[:vocab].to(z.dtype)
    if options.logit_scale != 1.0:
        z = z * options.logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap

    # Log-sum-exp and log-prob. The normaliser stays in two parts, largest logit and log of the sum: e^(z - lse) would
    # carry the rounding of lse, which is large in a peaked row. The largest logit is clamped to stay finite, so that an
    # infinite logit shows as an infinite sum and not as inf - inf.
    target = targets[:, None]
    target_logit = z.gather(1, target)[:, 0]
    largest, bound = z.amax(dim=-1), torch.finfo(z.dtype).max
    shift = largest.clamp(-bound, bound)
    statistics = out.entropy is not None
    if statistics:
        torch.mean(z, dim=-1, out=out.mean_logit)
        torch.eq(largest, target_logit, out=out.correct)
    # z - shift, and then its exponential, may overwrite z, unless z is needed below or is the caller's tile, which only
    # a score may change.
    free = z if softcap is None and (z is not x or options.score) else None
    centred = torch.sub(z, shift[:, None], out=free)
    e = centred.exp() if statistics else centred.exp_()
    total = e.sum(dim=-1)
    log_total = total.log()
    torch.add(shift, log_total, out=out.lse)
    torch.sub(target_logit - shift, log_total, out=out.logps)
    if not (options.score or statistics):
        return

    minus_p = e.div_(-total[:, None])
    if statistics:
        # A logit of -inf has p = 0 and adds nothing, but 0 * -inf would be NaN.
        torch.add(log_total, torch.linalg.vecdot(minus_p, centred.clamp_(min=-bound)), out=out.entropy)
        torch.log(torch.linalg.vecdot(minus_p, minus_p), out=out.log_sum_sq)

    # The vocab score, (onehot(y) - p) dz/dx; `minus_p` is overwritten by it.
    if options.score:
        gradient = minus_p.scatter_add_(1, target, torch.ones_like(target, dtype=z.dtype))
        if softcap is not None:
            gradient *= 1 - (z / softcap) ** 2
        if options.logit_scale != 1.0:
            gradient *= options.logit_scale
        if gradient is not x:
            x.copy_(gradient)
        if vocab < logits.shape[1]:
            logits[:, vocab:] = 0
