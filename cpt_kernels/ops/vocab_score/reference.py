"""The definition of ``vocab_score`` in PyTorch, and its implementation on any device without a kernel of ours.

For a row ``x`` of a tile of logits with target ``y``:

    z = softcap(logit_scale * (x + bias)),   softcap(u) = c tanh(u / c) or u
    lse = log sum_v exp z_v,   log p = z_y - lse,   p = softmax(z)

over the columns below ``vocab_size``; those above are padding: probability 0, no gradient. Statistics:
entropy ``lse - sum p z``, mean logit ``mean_v z``, ``z_y == max z`` and ``log sum p^2``. The score, written over the
tile, is ``d log p / d x = (onehot(y) - p) dz/dx`` with ``dz/dx = logit_scale * (1 - (z/c)^2)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Rows are worked on in blocks whose fp32 temporaries stay in cache: about 4 MiB each. Each block is some ten parallel
# regions, at whose ends threads wait for each other: on a machine that is busy otherwise, fewer blocks are faster.
_BLOCK_ELEMENTS = 1 << 20


class VocabScore(NamedTuple):
    """Statistics of R rows, fp32 (fp64 for an fp64 tile); the last four are ``None`` unless asked for."""

    logps: Tensor  # (R,) log-prob of the target
    lse: Tensor  # (R,) log-sum-exp
    entropy: Tensor | None = None  # (R,) nats
    mean_logit: Tensor | None = None  # (R,)
    correct: Tensor | None = None  # (R,) bool, no logit is larger than the target's
    log_sum_sq: Tensor | None = None  # (R,) log sum_v p_v^2


def vocab_score_reference(
    logits: Tensor,  # (R, V) fp64, fp32, bf16 or fp16; last dimension contiguous
    targets: Tensor,  # (R,) int64 in [0, vocab_size)
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    statistics: bool = False,
    score: bool = False,
) -> VocabScore:
    """Score a tile; with ``score=True`` its contents are replaced by ``d log p / d logits`` in the tile's dtype."""
    rows, columns = logits.shape
    vocab = columns if vocab_size is None else vocab_size
    dtype = torch.promote_types(logits.dtype, torch.float32)
    out = VocabScore(
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        *(logits.new_empty(rows, dtype=d) if statistics else None for d in (dtype, dtype, torch.bool, dtype)),
    )
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1)) if logits.device.type == "cpu" else max(rows, 1)
    if rows <= step:
        _score_block(logits, targets, bias, logit_scale, softcap, vocab, out, score)
        return out
    for start in range(0, rows, step):
        block = slice(start, start + step)
        out_block = VocabScore(*(None if tensor is None else tensor[block] for tensor in out))
        _score_block(logits[block], targets[block], bias, logit_scale, softcap, vocab, out_block, score)
    return out


def _score_block(
    logits: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    vocab: int,
    out: VocabScore,
    score: bool,
) -> None:
    x = logits if vocab == logits.shape[1] else logits[:, :vocab]
    z = x.to(out.lse.dtype)
    if bias is not None:
        z = z + bias[:vocab]
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap

    target = targets[:, None]
    target_logit = z.gather(1, target)[:, 0]
    # The normaliser stays in two parts: e^(z - lse) would carry the rounding of lse, which is large in a peaked row.
    # The largest logit stays finite, so that an infinite one shows as an infinite sum.
    largest, bound = z.amax(dim=-1), torch.finfo(z.dtype).max
    shift = largest.clamp(-bound, bound)
    needed = softcap is not None or out.entropy is not None or (z is x and not score)
    e = torch.sub(z, shift[:, None], out=None if needed else z).exp_()
    total = e.sum(dim=-1)
    log_total = total.log()
    torch.add(shift, log_total, out=out.lse)
    torch.sub(target_logit - shift, log_total, out=out.logps)
    if not (score or out.entropy is not None):
        return

    minus_p = e.div_(-total[:, None])
    if out.entropy is not None:
        torch.mean(z, dim=-1, out=out.mean_logit)
        torch.eq(largest, target_logit, out=out.correct)
        # A logit of -inf has p = 0 and adds nothing, but 0 * -inf would be NaN.
        torch.add(out.lse, torch.linalg.vecdot(minus_p, z.clamp(min=-bound)), out=out.entropy)
        torch.log(torch.linalg.vecdot(minus_p, minus_p), out=out.log_sum_sq)
    if score:
        gradient = minus_p.scatter_add_(1, target, torch.ones_like(target, dtype=z.dtype))
        if softcap is not None:
            gradient *= 1 - (z / softcap) ** 2
        if logit_scale != 1.0:
            gradient *= logit_scale
        if gradient is not x:
            x.copy_(gradient)
        if vocab < logits.shape[1]:
            logits[:, vocab:] = 0
