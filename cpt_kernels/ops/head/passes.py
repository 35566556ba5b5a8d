"""Passes of the head over its tiles of logits, without autograd: what ``linear_preference.py`` makes its modes of.

Every tile is a GEMM, is scored in place, serves the GEMMs of the gradients and is overwritten by the next. Where one
tile holds all rows, it can be kept for the backward instead, which then knows how to weigh its rows. Results that
nobody wants are ``None``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import Loss
from .. import backends, pair_loss, vocab_score
from ..gather import segment_sum
from ..vocab_score import VocabScore
from .tiles import HeadOptions, Pairs, Tile, logits_tiles, pair_block_tiles, tile_buffer, tile_logits

_BLOCK_ROWS = 4096
_HALF = (torch.bfloat16, torch.float16)


class Wanted(NamedTuple):
    """Which gradients a pass prepares. The caller says: inside of an autograd function all look wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, *tensors: Tensor | None) -> Wanted:
        """Of hidden, weight and bias, those that take a gradient here and now."""
        enabled = torch.is_grad_enabled()
        return cls(*(enabled and tensor is not None and tensor.requires_grad for tensor in tensors))

    @property
    def head(self) -> bool:
        """Whether the head is trained."""
        return self.weight or self.bias


def score_rows(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    wanted: Wanted,
    options: HeadOptions,
    keep: bool = False,
) -> tuple[Tensor | None, ...]:
    """The fields of ``VocabScore``; then what the backward needs to compute no logits again.

    Without a gradient of the head ``G W`` (N, H). With one, if ``keep`` and one tile holds all rows, both ``G W`` and
    ``G`` (N, V), the tile itself.
    """
    x, w, backend = _operands(hidden, weight, targets, options)
    buffer = tile_buffer(x, w, options)
    kept = keep and wanted.head
    wants_score_weight = wanted.hidden and (keep or not wanted.head)
    if len(buffer) == len(x):
        logits = tile_logits(x, w, buffer)
        out = options.score(logits, targets, bias, kept or wants_score_weight, backend)
        return *out, torch.mm(logits, w) if wants_score_weight else None, logits if kept else None
    out = empty_score(x, options)
    score_weight = torch.empty_like(x) if wanted.hidden and not wanted.head else None
    for rows, logits in logits_tiles(x, w, buffer):
        _store(out, rows, options.score(logits, targets[rows], bias, score_weight is not None, backend))
        if score_weight is not None:
            torch.mm(logits, w, out=score_weight[rows])
    return *out, score_weight, None


def scored_gradients(
    grad: Tensor,  # (N,) that arrives at the log-probs
    score_weight: Tensor | None,  # (N, H) G W
    score: Tensor | None,  # (N, V) G
    hidden: Tensor | None,  # (N, H), with the score
    wanted: Wanted,
    dtypes: tuple[torch.dtype | None, ...],  # of hidden, weight and bias
    in_place: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias from the score of all rows; ``in_place`` as below."""
    grad_weight = grad_bias = None
    if wanted.weight:
        gx = scale(hidden.to(score.dtype), grad[:, None], score.dtype)
        if score.dtype == dtypes[1] and (score.is_cuda or score.dtype not in _HALF):
            grad_weight = score.t() @ gx
        else:
            grad_weight = hidden.new_zeros(score.shape[1], hidden.shape[1], dtype=torch.float32)
            _add_product(grad_weight, score, gx)
            grad_weight = grad_weight.to(dtypes[1])
    if wanted.bias:
        grad_bias = (score.t() @ grad[:, None].to(score.dtype))[:, 0].to(dtypes[2])
    grad_hidden = None if score_weight is None else scale(score_weight, grad[:, None], dtypes[0], in_place)
    return grad_hidden, grad_weight, grad_bias


def row_gradients(
    grad: Tensor,  # (N,) that arrives at the log-probs
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    wanted: Wanted,
    options: HeadOptions,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, from tiles that are computed again."""
    score_weight, grad_weight, grad_bias = _sum_gradients(grad, hidden, weight, targets, bias, wanted, options)
    return (
        None if score_weight is None else scale(score_weight, grad[:, None], hidden.dtype),
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )


def _sum_gradients(grad, hidden, weight, targets, bias, wanted, options):
    """A function of its own, so that the tile is gone when gradients are rounded."""
    x, w, backend = _operands(hidden, weight, targets, options)
    score_weight, grad_weight, grad_bias = empty_gradients(x, weight, bias, wanted)
    for rows, logits in logits_tiles(x, w, tile_buffer(x, w, options)):
        options.score(logits, targets[rows], bias, True, backend)
        _add_gradients(logits, x[rows], w, grad[rows], score_weight, rows, grad_weight, grad_bias)
    return score_weight, grad_weight, grad_bias


def score_pair_blocks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    wanted: Wanted,
    pairs: Pairs,
    loss: Loss,
    options: HeadOptions,
    keep: bool = False,
) -> tuple[Tensor | None, ...]:
    """A separable loss with its gradients: a tile holds whole pair blocks, so they are finished while it is there.

    Returns:
        Sum of the losses, losses (P,), completion log-probs (S,), the six fields of ``VocabScore``; then, for the
        backward, ``g`` (N,), ``G W`` (N, H) unscaled, and the gradients of weight (V, H) and bias (V,) in fp32; or, if
        ``keep`` and one tile holds all rows, in place of these two the tile itself, ``G`` (N, V), last.
    """
    x, w, backend = _operands(hidden, weight, targets, options)
    buffer = tile_buffer(x, w, options)
    if keep and len(buffer) == len(x):
        logits = tile_logits(x, w, buffer)
        tokens = options.score(logits, targets, bias, True, backend)
        everything = Tile(slice(0, len(x)), (0, 0), (len(pairs.completion_lengths), len(pairs.chosen)))
        completion_logps, losses, g = _weigh_tile(everything, tokens, pairs, loss, options.backend)
        score_weight = torch.mm(logits, w) if wanted.hidden else None
        return losses.sum(), losses, completion_logps, *tokens, g, score_weight, None, None, logits
    tokens = empty_score(x, options)
    completion_logps = tokens.logps.new_empty(len(pairs.completion_lengths))
    losses = tokens.logps.new_empty(len(pairs.chosen))
    g = torch.empty_like(tokens.logps)
    score_weight, grad_weight, grad_bias = empty_gradients(x, weight, bias, wanted)
    for tile in pair_block_tiles(pairs, len(buffer)):
        whole = tile.rows.stop - tile.rows.start <= len(buffer)
        for rows, logits in logits_tiles(x, w, buffer, tile.rows):
            _store(tokens, rows, options.score(logits, targets[rows], bias, whole, backend))
        part = VocabScore(*(None if tensor is None else tensor[tile.rows] for tensor in tokens))
        completions, some = slice(tile.first[0], tile.last[0]), slice(tile.first[1], tile.last[1])
        completion_logps[completions], losses[some], g[tile.rows] = _weigh_tile(
            tile, part, pairs, loss, options.backend
        )
        if whole:
            _add_gradients(logits, x[rows], w, g[rows], score_weight, rows, grad_weight, grad_bias)
            continue
        # The block is larger than a tile: its logits are computed again, now that g is known.
        for rows, logits in logits_tiles(x, w, buffer, tile.rows):
            options.score(logits, targets[rows], bias, True, backend)
            _add_gradients(logits, x[rows], w, g[rows], score_weight, rows, grad_weight, grad_bias)
    return losses.sum(), losses, completion_logps, *tokens, g, score_weight, grad_weight, grad_bias, None


def finished_gradients(
    grad_loss: Tensor,  # ()
    g: Tensor,  # and the next three: as from score_pair_blocks
    score_weight: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    dtypes: tuple[torch.dtype | None, ...],  # of hidden, weight and bias
    in_place: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, ``in_place`` written over what they are made from, where dtypes allow."""
    return (
        None if score_weight is None else scale(score_weight, (grad_loss * g)[:, None], dtypes[0], in_place),
        None if grad_weight is None else scale(grad_weight, grad_loss, dtypes[1], in_place),
        None if grad_bias is None else scale(grad_bias, grad_loss, dtypes[2], in_place),
    )


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """``x * factor`` in the wider of their precisions, rounded once: small weights times half-precision rows underflow.

    In blocks of rows, as a CPU computes what it has to round or to widen in a temporary.
    """
    if x.dtype == factor.dtype == dtype:
        return x.mul_(factor) if in_place else x * factor
    out = x if in_place and x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    factors = factor.split(_BLOCK_ROWS) if factor.dim() else [factor] * -(-len(x) // _BLOCK_ROWS)
    for part, some, into in zip(x.split(_BLOCK_ROWS), factors, out.split(_BLOCK_ROWS)):
        torch.mul(part, some, out=into)
    return out


def _weigh_tile(
    tile: Tile,
    tokens: VocabScore,  # of its rows
    pairs: Pairs,
    loss: Loss,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tile: log-probs of its completions, losses of its pairs, and ``g``, d(sum of losses)/dlogp of each row."""
    offsets = pairs.cu_completions[tile.first[0] : tile.last[0] + 1] - tile.rows.start
    if pair_loss.has_kernel(loss):
        sums, losses, weights = _closed_form(tile, tokens.logps, offsets, pairs, loss, backend)
        return sums, losses, weights.repeat_interleave(offsets.diff(), output_size=len(tokens.logps))
    with torch.enable_grad():
        tokens = tokens._replace(logps=tokens.logps.detach().requires_grad_())
        sums = segment_sum(tokens.logps, offsets)
        losses = loss(pairs.pair_logps(sums, tile.first, tile.last, loss, tokens))
        (g,) = torch.autograd.grad(losses.sum(), tokens.logps)
    return sums.detach(), losses.detach(), g


def _closed_form(
    tile: Tile, logps: Tensor, offsets: Tensor, pairs: Pairs, loss: Loss, backend: str
) -> pair_loss.PairLossOutput:
    completions, some = slice(tile.first[0], tile.last[0]), slice(tile.first[1], tile.last[1])
    backend = backends.resolve(backend, logps, pair_loss.KERNEL_DTYPES)
    normaliser = pairs.tokens_per_pair
    if isinstance(normaliser, Tensor):
        if normaliser.device.type == "cpu":
            normaliser = normaliser.item()
        elif loss.name != "sft":
            normaliser = 1.0  # nobody else looks at it
        else:
            backend = "eager"  # it would have to be waited for to become a kernel's argument
    indices = (pairs.chosen, pairs.rejected, pairs.sft_targets)
    return pair_loss.weigh_pairs(
        logps,
        offsets,
        *(None if index is None else index[some] - completions.start for index in indices),
        None if pairs.ref_logps is None else pairs.ref_logps[completions],
        loss,
        normaliser,
        backend,
    )


def _add_gradients(
    score: Tensor,  # (R, V)
    x: Tensor,  # (R, H)
    w: Tensor,  # (V, H)
    g: Tensor,  # (R,)
    score_weight: Tensor | None,  # (N, H), its rows are written
    rows: slice,
    grad_weight: Tensor | None,  # (V, H) fp32, added to
    grad_bias: Tensor | None,  # (V,) fp32, added to
) -> None:
    if score_weight is not None:
        torch.mm(score, w, out=score_weight[rows])
    if grad_weight is not None:
        _add_product(grad_weight, score, scale(x, g[:, None], x.dtype))
    if grad_bias is not None:
        grad_bias += (score.t() @ g[:, None].to(score.dtype))[:, 0]


def _add_product(
    grad_weight: Tensor,  # (V, H) fp32, added to
    score: Tensor,  # (R, V)
    gx: Tensor,  # (R, H)
) -> None:
    if score.dtype == grad_weight.dtype:
        grad_weight.addmm_(score.t(), gx)
    elif score.is_cuda:
        torch.addmm(grad_weight, score.t(), gx, out_dtype=grad_weight.dtype, out=grad_weight)
    else:  # a CPU has no half-precision product that accumulates in fp32 across calls; blocks, as both are copied
        gx = gx.to(grad_weight.dtype)
        for columns, into in zip(score.t().split(_BLOCK_ROWS), grad_weight.split(_BLOCK_ROWS)):
            into.addmm_(columns.to(grad_weight.dtype), gx)


def _operands(hidden: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor, str]:
    """Operands of the GEMMs in their dtype, and the backend of the kernels between them."""
    vocab_score.check_targets(targets, weight.shape[0] if options.vocab_size is None else options.vocab_size)
    dtype = options.compute_dtype or hidden.dtype
    x, w = hidden.to(dtype), weight if options.compute_dtype is None else weight.to(dtype)
    return x, w, backends.resolve(options.backend, x, vocab_score.KERNEL_DTYPES)


def empty_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for ``G W``, and zeros to accumulate in: fp32, or fp64 for fp64."""
    zeros = (
        torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) if wants else None
        for t, wants in ((weight, wanted.weight), (bias, wanted.bias))
    )
    return torch.empty_like(x) if wanted.hidden else None, *zeros


def empty_score(x: Tensor, options: HeadOptions) -> VocabScore:
    """Room for the statistics of all rows, of those that the options ask for."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    kinds = (dtype, dtype, *((dtype, dtype, torch.bool, dtype) if options.statistics else (None,) * 4))
    return VocabScore(*(None if kind is None else x.new_empty(x.shape[0], dtype=kind) for kind in kinds))


def _store(out: VocabScore, rows: slice, part: VocabScore) -> None:
    for whole, tensor in zip(out, part):
        if whole is not None:
            whole[rows] = tensor
