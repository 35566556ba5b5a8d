"""Passes of the head over its tiles of logits, without autograd: what ``linear_preference.py`` makes its modes of.

Every tile is a GEMM, is scored in place, serves the GEMMs of the gradients and is overwritten by the next. Results that
nobody wants are ``None``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import Loss
from . import backends, pair_loss, vocab_score
from .gather import segment_sum
from .tiles import HeadOptions, Pairs, Tile, logits_tiles, tile_buffer, unit_tiles
from .vocab_score import VocabScore

_BLOCK_ROWS = 4096


class Wanted(NamedTuple):
    """Which gradients a pass prepares. The caller says: inside of an autograd function all look wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, *tensors: Tensor | None) -> Wanted:
        enabled = torch.is_grad_enabled()
        return cls(*(enabled and tensor is not None and tensor.requires_grad for tensor in tensors))

    @property
    def head(self) -> bool:
        return self.weight or self.bias


def score_rows(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,)
    bias: Tensor | None,  # (V,)
    wanted: Wanted,
    options: HeadOptions,
) -> tuple[Tensor | None, ...]:
    """The fields of ``VocabScore``, and ``G W`` (N, H) where the hidden rows alone want a gradient."""
    x, w, backend = _operands(hidden, weight, targets, options)
    out = empty_score(x, options)
    score_weight = torch.empty_like(x) if wanted.hidden and not wanted.head else None
    for rows, logits in logits_tiles(x, w, tile_buffer(x, w, options)):
        _store(out, rows, options.score(logits, targets[rows], bias, score_weight is not None, backend))
        if score_weight is not None:
            torch.mm(logits, w, out=score_weight[rows])
    return *out, score_weight


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


def score_units(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    wanted: Wanted,
    pairs: Pairs,
    loss: Loss,
    options: HeadOptions,
) -> tuple[Tensor | None, ...]:
    """A separable loss with its gradients: a tile holds whole units, so that they are finished while it is there.

    Returns:
        Sum of the losses, losses (P,), completion log-probs (S,), the six fields of ``VocabScore``; then, for the
        backward, ``g`` (N,), ``G W`` (N, H) unscaled, and the gradients of weight (V, H) and bias (V,) in fp32.
    """
    x, w, backend = _operands(hidden, weight, targets, options)
    tokens = empty_score(x, options)
    completion_logps = tokens.logps.new_empty(len(pairs.completion_lengths))
    losses = tokens.logps.new_empty(len(pairs.chosen))
    g = torch.empty_like(tokens.logps)
    score_weight, grad_weight, grad_bias = empty_gradients(x, weight, bias, wanted)
    buffer = tile_buffer(x, w, options)
    for tile in unit_tiles(pairs, len(buffer)):
        whole = tile.rows.stop - tile.rows.start <= len(buffer)
        for rows, logits in logits_tiles(x, w, buffer, tile.rows):
            _store(tokens, rows, options.score(logits, targets[rows], bias, whole, backend))
        _weigh_units(tile, tokens, completion_logps, losses, g, pairs, loss, options.backend)
        if whole:
            _add_gradients(logits, x[rows], w, g[rows], score_weight, rows, grad_weight, grad_bias)
            continue
        for rows, logits in logits_tiles(x, w, buffer, tile.rows):  # a unit beyond the budget: its tiles a second time
            options.score(logits, targets[rows], bias, True, backend)
            _add_gradients(logits, x[rows], w, g[rows], score_weight, rows, grad_weight, grad_bias)
    return losses.sum(), losses, completion_logps, *tokens, g, score_weight, grad_weight, grad_bias


def finished_gradients(
    grad_loss: Tensor,  # ()
    g: Tensor,  # the last four results of score_units
    score_weight: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    dtypes: tuple[torch.dtype | None, ...],  # of hidden, weight and bias
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias; what they are made from stays as it is, for a second backward."""
    return (
        None if score_weight is None else scale(score_weight, (grad_loss * g)[:, None], dtypes[0]),
        None if grad_weight is None else scale(grad_weight, grad_loss, dtypes[1]),
        None if grad_bias is None else scale(grad_bias, grad_loss, dtypes[2]),
    )


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * factor`` in the wider of their precisions, rounded once: small weights times half-precision rows underflow.

    In blocks of rows, as a CPU computes what it has to round or to widen in a temporary.
    """
    if x.dtype == factor.dtype == dtype:
        return x * factor
    out = torch.empty_like(x, dtype=dtype)
    factors = factor.split(_BLOCK_ROWS) if factor.dim() else [factor] * -(-len(x) // _BLOCK_ROWS)
    for part, some, into in zip(x.split(_BLOCK_ROWS), factors, out.split(_BLOCK_ROWS)):
        torch.mul(part, some, out=into)
    return out


def _weigh_units(
    tile: Tile,
    tokens: VocabScore,  # (N,)
    completion_logps: Tensor,  # (S,) written
    losses: Tensor,  # (P,) written
    g: Tensor,  # (N,) written: d(sum of losses)/dlogp of each row
    pairs: Pairs,
    loss: Loss,
    backend: str,
) -> None:
    completions, some = slice(tile.first[0], tile.last[0]), slice(tile.first[1], tile.last[1])
    offsets = pairs.cu_completions[completions.start : completions.stop + 1] - tile.rows.start
    logps = tokens.logps[tile.rows]
    if pair_loss.has_kernel(loss):
        sums, tile_losses, weights = _closed_form(tile, logps, offsets, pairs, loss, backend)
        weights = weights.repeat_interleave(offsets.diff(), output_size=len(logps))
    else:
        with torch.enable_grad():
            part = VocabScore(*(None if tensor is None else tensor[tile.rows] for tensor in tokens))
            part = part._replace(logps=logps.detach().requires_grad_())
            sums = segment_sum(part.logps, offsets)
            tile_losses = loss(pairs.numbers(sums, tile.first, tile.last, loss, part))
            (weights,) = torch.autograd.grad(tile_losses.sum(), part.logps)
    completion_logps[completions], losses[some], g[tile.rows] = sums.detach(), tile_losses.detach(), weights


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
        gx = scale(x, g[:, None], x.dtype)
        if score.dtype == grad_weight.dtype:
            grad_weight.addmm_(score.t(), gx)
        elif score.is_cuda:
            torch.addmm(grad_weight, score.t(), gx, out_dtype=grad_weight.dtype, out=grad_weight)
        else:  # a CPU has no half-precision product that accumulates in fp32 across calls; blocks, as both are copied
            gx = gx.to(grad_weight.dtype)
            for columns, into in zip(score.t().split(_BLOCK_ROWS), grad_weight.split(_BLOCK_ROWS)):
                into.addmm_(columns.to(grad_weight.dtype), gx)
    if grad_bias is not None:
        grad_bias += (score.t() @ g[:, None].to(score.dtype))[:, 0]


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
    dtype = torch.promote_types(x.dtype, torch.float32)
    kinds = (dtype, dtype, *((dtype, dtype, torch.bool, dtype) if options.statistics else (None,) * 4))
    return VocabScore(*(None if kind is None else x.new_empty(x.shape[0], dtype=kind) for kind in kinds))


def _store(out: VocabScore, rows: slice, part: VocabScore) -> None:
    for whole, tensor in zip(out, part):
        if whole is not None:
            whole[rows] = tensor
