"""Tile sweeps of the head, without autograd; ``linear_preference.py`` combines them into modes.

A tile is computed by one matrix product, scored in place, used by the products of the gradients, and overwritten by the
next tile. If one tile holds all rows it can be kept for the backward instead, which then knows the weights of its rows.
Of several tiles the last can be left to the backward, which adds it to the sums while it scales them.
Results that are not wanted are ``None``.

Notation: ``x`` and ``w`` are hidden rows (N, H) and weight (V, H) in the dtype of the products; ``G`` is the vocab
score (N, V); ``g`` (N,) is the derivative of the loss by each row's log-prob.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...losses import Loss
from .. import backends, pair_loss, vocab_score
from ..gather import segment_sum, token_values
from ..pair_loss import PairLossInput, PairLossOutput
from ..vocab_score import VocabScore, score_tile
from .tiles import (
    HeadOptions,
    Pairs,
    Tile,
    completion_tokens,
    logits_tiles,
    pair_block_tiles,
    tile_buffer,
    tile_logits,
)
from .units import in_unit, new_unit, unit_for

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 4096
_CACHED_BYTES = 2**25  # of a block of sums that stays in cache: an A100 has 40 MB of L2, an H200 50
_HALF = (torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """Inputs of the head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)


class Wanted(NamedTuple):
    """Which gradients a pass prepares. Passed in, because ctx.needs_input_grad is True even under no_grad."""

    hidden: bool
    weight: bool
    bias: bool

    @classmethod
    def of(cls, operands: Operands) -> Wanted:
        """Returns which of hidden, weight and bias take a gradient in the current grad mode."""

        def wants(tensor: Tensor | None) -> bool:
            return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad

        return cls(wants(operands.hidden), wants(operands.weight), wants(operands.bias))

    @property
    def head(self) -> bool:
        """Whether the head is trained."""
        return self.weight or self.bias


class Dtypes(NamedTuple):
    """Dtypes of the leaves, in which gradients are returned."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None

    @classmethod
    def of(cls, operands: Operands) -> Dtypes:
        bias = operands.bias
        return cls(operands.hidden.dtype, operands.weight.dtype, None if bias is None else bias.dtype)


class Gradients(NamedTuple):
    """Gradients of the leaves."""

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)


class GradientSums(NamedTuple):
    """What the tiles add up to before the upstream gradient is known."""

    score_weight: Tensor | None  # (N, H) G W, not scaled by g: small weights times half-precision rows underflow
    weight: Tensor | None  # (V, H) G^T (g X) in fp32, or fp64 for fp64
    bias: Tensor | None  # (V,) G^T g likewise
    unit: Tensor | None  # () what weight and bias are multiples of, see ``units``; None: 1


class ScoredRows(NamedTuple):
    """Result of :func:`score_rows`."""

    tokens: VocabScore  # (N,)
    score_weight: Tensor | None  # (N, H) G W
    score: Tensor | None  # (N, V) G, the kept tile


class PreferenceOutput(NamedTuple):
    """Result of ``linear_preference_loss``; tokens are completion tokens."""

    loss: Tensor  # () sum of the losses over the pairs
    losses: Tensor  # (P,) without gradient
    completion_logps: Tensor  # (S,)
    tokens: VocabScore  # (M,) log-probs and statistics

    def flatten(self) -> tuple[Tensor | None, ...]:
        """Returns the results as one flat tuple, as an autograd function returns them."""
        return (*self[:3], *self.tokens)

    @classmethod
    def unflatten(cls, flat: Sequence[Tensor]) -> PreferenceOutput:
        """Inverse of :meth:`flatten`."""
        loss, losses, completion_logps, *tokens = flat
        return cls(loss, losses, completion_logps, VocabScore(*tokens))


class ScoredPairs(NamedTuple):
    """Result of :func:`score_pair_blocks`."""

    output: PreferenceOutput
    g: Tensor  # (N,)
    sums: GradientSums  # without weight and bias if the kept tile holds all rows
    score: Tensor | None  # (R, V) G, the kept tile: of all rows, or of the last ones


class WeighedTile(NamedTuple):
    """What the pairs of a tile give."""

    completion_logps: Tensor
    losses: Tensor
    g: Tensor  # d(sum of losses)/dlogp of each row


# --- Log-probs ---


def score_rows(operands: Operands, wanted: Wanted, options: HeadOptions, keep: bool = False) -> ScoredRows:
    """Scores all rows, and prepares what the backward needs to compute no logits again.

    If the head is frozen that is ``G W`` (1 more product). If it is trained, ``keep`` is set and one tile holds all
    rows, it is ``G W`` and the tile itself. In the remaining cases the backward computes the logits again.
    """
    x, w, backend = _prepare(operands, options)
    targets = operands.targets
    kept = keep and wanted.head
    buffer = tile_buffer(x, w, options, _rows_beyond(operands, x, wanted) if kept else 0)
    wants_score_weight = wanted.hidden and (keep or not wanted.head)
    # One tile holds everything: its results are returned without a copy, and the tile may be kept.
    if len(buffer) == len(x):
        logits = tile_logits(x, w, buffer)
        out = score_tile(logits, targets, options.of_tile(operands.bias, kept or wants_score_weight), backend)
        score_weight = _score_weight(logits, w[: options.vocab_size]) if wants_score_weight else None
        return ScoredRows(out, score_weight, logits if kept else None)
    # Several tiles: each is used while it is in the buffer.
    out = VocabScore.empty(len(x), x, options.statistics)
    score_weight = torch.empty_like(x) if wanted.hidden and not wanted.head else None
    tile_options = options.of_tile(operands.bias, score_weight is not None)
    for rows, logits in logits_tiles(x, w, buffer):
        _store(out, rows, score_tile(logits, targets[rows], tile_options, backend))
        if score_weight is not None:
            _score_weight(logits, w[: options.vocab_size], score_weight[rows])
    return ScoredRows(out, score_weight, None)


def scored_gradients(
    grad: Tensor,  # (N,) that arrives at the log-probs
    score_weight: Tensor | None,  # (N, H) G W
    score: Tensor | None,  # (N, V) G, if the head is trained
    hidden: Tensor | None,  # (N, H), if the head is trained
    wanted: Wanted,
    dtypes: Dtypes,
    in_place: bool = False,
) -> Gradients:
    """Computes gradients from the vocab score of all rows; ``in_place`` as in :func:`finished_gradients`."""
    grad_weight = grad_bias = None
    if score is not None and hidden is not None:
        x, g, unit = hidden.to(score.dtype), grad, None
        narrow = score.dtype == dtypes.weight and (score.is_cuda or score.dtype not in _HALF)
        if score.dtype == torch.float16:
            # A product that is itself fp16 must not leave its range in the unit, so it takes none below 1.
            unit = unit_for(x, g).clamp(min=1 if narrow else 0)
            g = g / unit
        gx = scale(x, g[:, None], score.dtype) if wanted.weight else x
        if wanted.weight and narrow:
            grad_weight = _in_dtype(score.t() @ gx, unit, dtypes.weight)
        elif wanted.weight:  # the gradient is wider than the product, or a CPU would accumulate in half precision
            grad_weight = _finish_weight(None, score, gx, unit, dtypes.weight)
        if wanted.bias:
            grad_bias = _in_dtype(_bias_product(score, g, unit), unit, dtypes.bias)
    grad_hidden = None if score_weight is None else scale(score_weight, grad[:, None], dtypes.hidden, in_place)
    return Gradients(grad_hidden, grad_weight, grad_bias)


def row_gradients(grad: Tensor, operands: Operands, wanted: Wanted, options: HeadOptions) -> Gradients:
    """Computes gradients from tiles that are computed again; ``grad`` (N,) arrives at the log-probs."""
    sums, dtypes = _sum_gradients(grad, operands, wanted, options), Dtypes.of(operands)
    return Gradients(
        None if sums.score_weight is None else scale(sums.score_weight, grad[:, None], dtypes.hidden),
        None if sums.weight is None else _in_dtype(sums.weight, sums.unit, dtypes.weight),
        None if sums.bias is None else _in_dtype(sums.bias, sums.unit, dtypes.bias),
    )


def _sum_gradients(grad: Tensor, operands: Operands, wanted: Wanted, options: HeadOptions) -> GradientSums:
    """A function of its own, so that the tile is freed before the gradients are rounded to their dtype."""
    x, w, backend = _prepare(operands, options)
    sums = _new_sums(x, operands, wanted)
    tile_options = options.of_tile(operands.bias, score=True)
    for rows, logits in logits_tiles(x, w, tile_buffer(x, w, options)):
        score_tile(logits, operands.targets[rows], tile_options, backend)
        _add_gradients(sums, rows, logits, x[rows], w, grad[rows], options)
    return sums


# --- Losses of pairs ---


def score_pair_blocks(
    operands: Operands, wanted: Wanted, pairs: Pairs, loss: Loss, options: HeadOptions, keep: bool = False
) -> ScoredPairs:
    """Computes a separable loss with its gradients: a tile holds whole pair blocks, so they are finished in one go.

    With ``keep``, one tile that holds all rows is returned in place of the sums for weight and bias. Of several tiles
    the last is returned, and is missing in the sum for the weight.
    """
    x, w, backend = _prepare(operands, options)
    targets = operands.targets
    buffer = tile_buffer(x, w, options, _rows_beyond(operands, x, wanted, last=True) if keep else 0)
    scoring = options.of_tile(operands.bias, score=True)

    # One tile holds everything: it is kept for the backward.
    if keep and len(buffer) == len(x):
        logits = tile_logits(x, w, buffer)
        tokens = score_tile(logits, targets, scoring, backend)
        ends = (len(pairs.completion_lengths), len(pairs.chosen))
        everything = Tile(slice(0, len(x)), slice(0, sum(pairs.completion_lengths)), (0, 0), ends)
        found = _weigh_tile(everything, tokens, pairs, loss, options.backend)
        score_weight = _score_weight(logits, w[: options.vocab_size]) if wanted.hidden else None
        sums = GradientSums(score_weight, None, None, None)
        tokens = completion_tokens(tokens, pairs.token_map)
        output = PreferenceOutput(found.losses.sum(), found.losses, found.completion_logps, tokens)
        return ScoredPairs(output, found.g, sums, logits)

    tokens = VocabScore.empty(len(x), x, options.statistics)
    completion_logps = tokens.logps.new_empty(len(pairs.completion_lengths))
    losses = tokens.logps.new_empty(len(pairs.chosen))
    g = torch.empty_like(tokens.logps)
    sums, left = _new_sums(x, operands, wanted), None
    for tile in pair_block_tiles(pairs, len(buffer)):
        # Log-probs of the tile. Its logits become the vocab score at once if they all fit the buffer; else only the
        # log-probs are kept.
        whole = tile.rows.stop - tile.rows.start <= len(buffer)
        tile_options = options.of_tile(operands.bias, score=whole)
        for rows, logits in logits_tiles(x, w, buffer, tile.rows):
            _store(tokens, rows, score_tile(logits, targets[rows], tile_options, backend))
        # Losses of its pairs, and with them g.
        found = _weigh_tile(tile, tokens.part(tile.rows), pairs, loss, options.backend)
        completion_logps[tile.completions], losses[tile.pairs], g[tile.rows] = found
        # Gradients. For a block larger than the buffer the logits are computed again, now that g is known.
        scored = [(rows, logits)] if whole else logits_tiles(x, w, buffer, tile.rows)
        for rows, logits in scored:
            if not whole:
                score_tile(logits, targets[rows], scoring, backend)
            leave = keep and wanted.weight and rows.stop == len(x)
            _add_gradients(sums, rows, logits, x[rows], w, g[rows], options, leave=leave)
            left = logits if leave else None
    output = PreferenceOutput(losses.sum(), losses, completion_logps, completion_tokens(tokens, pairs.token_map))
    return ScoredPairs(output, g, sums, left)


def finished_gradients(
    grad_loss: Tensor,  # ()
    g: Tensor,  # (N,)
    sums: GradientSums,
    dtypes: Dtypes,
    in_place: bool = False,
    score: Tensor | None = None,  # (R, V) G of the last tile, if the sum for the weight lacks it
    hidden: Tensor | None = None,  # (N, H), with ``score``
) -> Gradients:
    """Scales the sums by the gradient that arrives at the loss; ``in_place`` overwrites them if dtypes allow."""
    score_weight, weight, bias, unit = sums
    factor = grad_loss if unit is None else grad_loss * unit
    if weight is not None and score is not None and hidden is not None:
        last_g = g[-len(score) :] if unit is None else g[-len(score) :] / unit
        gx = scale(hidden[-len(score) :].to(score.dtype), last_g[:, None], score.dtype)
        weight = _finish_weight(weight, score, gx, factor, dtypes.weight, in_place)
    elif weight is not None:
        weight = scale(weight, factor, dtypes.weight, in_place)
    return Gradients(
        None if score_weight is None else scale(score_weight, (grad_loss * g)[:, None], dtypes.hidden, in_place),
        weight,
        None if bias is None or dtypes.bias is None else scale(bias, factor, dtypes.bias, in_place),
    )


def _weigh_tile(
    tile: Tile,
    tokens: VocabScore,  # of its rows
    pairs: Pairs,
    loss: Loss,
    backend: str,
) -> WeighedTile:
    offsets = pairs.cu_completions[tile.first[0] : tile.last[0] + 1] - tile.tokens.start
    token_map = None if pairs.token_map is None else pairs.token_map.part(tile.rows, tile.tokens)
    if pair_loss.has_kernel(loss) and not pairs.has_weights:
        logps = token_values(tokens.logps, token_map)
        sums, losses, weights = _weigh_closed_form(tile, logps, offsets, pairs, loss, backend)
        g = weights.repeat_interleave(offsets.diff(), output_size=len(logps))
        return WeighedTile(sums, losses, g if token_map is None else token_map.sums(g))
    # A loss without a kernel: autograd over the log-probs, which are few. Passes run without grad, so it is enabled.
    with torch.enable_grad():
        rows = tokens.logps.detach().requires_grad_()
        tokens = pairs.weigh(completion_tokens(tokens._replace(logps=rows), token_map), tile.tokens)
        sums = segment_sum(tokens.logps, offsets)
        losses = pairs.losses(loss, pairs.pair_logps(sums, tile.first, tile.last, loss, tokens), tile.pairs)
        (g,) = torch.autograd.grad(losses.sum(), rows)
    return WeighedTile(sums.detach(), losses.detach(), g)


def _weigh_closed_form(
    tile: Tile, logps: Tensor, offsets: Tensor, pairs: Pairs, loss: Loss, backend: str
) -> PairLossOutput:
    backend = backends.resolve(backend, logps, pair_loss.BACKENDS, vocab_score.BACKENDS)
    # A kernel takes the normaliser as a number. A tensor on a GPU is not read, because that would synchronise.
    normaliser = pairs.tokens_per_pair
    if isinstance(normaliser, Tensor):
        if normaliser.device.type == "cpu":
            normaliser = normaliser.item()
        elif loss.name != "sft":
            normaliser = 1.0  # only sft reads it
        else:
            backend = "eager"
    # Indices and reference log-probs of this tile alone.
    chosen, rejected, targets = (
        None if index is None else index[tile.pairs] - tile.first[0]
        for index in (pairs.chosen, pairs.rejected, pairs.sft_targets)
    )
    assert chosen is not None
    ref_logps = None if pairs.ref_logps is None else pairs.ref_logps[tile.completions]
    inputs = PairLossInput(logps, offsets, chosen, rejected, targets, ref_logps)
    return pair_loss.weigh_pairs(inputs, loss, normaliser, backend)


# --- Products and sums ---


def _add_gradients(
    sums: GradientSums,  # added to; the first tile writes that of the weight, and each its rows of score_weight
    rows: slice,
    score: Tensor,  # (R, V) G of these rows
    x: Tensor,  # (R, H)
    w: Tensor,  # (V, H)
    g: Tensor,  # (R,)
    options: HeadOptions,
    *,
    leave: bool = False,  # leaves the product for the weight to the backward
) -> None:
    if sums.score_weight is not None:
        _score_weight(score, w[: options.vocab_size], sums.score_weight[rows])
    if sums.unit is not None:
        g = in_unit(sums.unit, (sums.weight, sums.bias), x, g, options.backend)
    if sums.weight is not None and not leave:
        _weight_product(sums.weight, score, scale(x, g[:, None], x.dtype), add=rows.start > 0)
    if sums.bias is not None:
        sums.bias.add_(_bias_product(score, g, sums.unit))


def _score_weight(
    score: Tensor,  # (R, V)
    vocabulary: Tensor,  # rows of the weight that are vocabulary, not padding: (V, H) or fewer
    out: Tensor | None = None,  # (R, H)
) -> Tensor:
    """Computes ``G W`` without the padding rows of W, which may hold NaN or inf: their G is 0, but 0 * NaN is NaN."""
    known = len(vocabulary)
    if known == score.shape[1]:
        return torch.mm(score, vocabulary, out=out)
    # Products are fast over a multiple of 16 columns, so the few that remain are a product of their own.
    whole = known - known % 16
    if whole == known:
        return torch.mm(score[:, :whole], vocabulary, out=out)
    rest = torch.mm(score[:, whole:known], vocabulary[whole:], out=out)
    return rest.addmm_(score[:, :whole], vocabulary[:whole]) if whole else rest


def _bias_product(score: Tensor, g: Tensor, unit: Tensor | None) -> Tensor:
    """Computes ``G^T g``, (V,); in a unit as fp32, because a sum of many weights would leave the range of fp16."""
    if unit is None:
        return (score.t() @ g[:, None].to(score.dtype))[:, 0]
    total = g.new_empty(score.shape[1], 1)
    _weight_product(total, score, g[:, None].to(score.dtype))
    return total[:, 0]


def _weight_product(
    out: Tensor,  # (V, H) fp32, or fp64 for fp64
    score: Tensor,  # (R, V)
    gx: Tensor,  # (R, H)
    add: bool = False,
) -> None:
    """Writes ``G^T (g X)`` to ``out``, or adds it, in the dtype of ``out`` although the operands may be narrower."""
    if score.dtype == out.dtype:
        out.addmm_(score.t(), gx) if add else torch.mm(score.t(), gx, out=out)
    elif _widens(score):
        wide: dict[str, Any] = {"out_dtype": out.dtype, "out": out}
        torch.addmm(out, score.t(), gx, **wide) if add else torch.mm(score.t(), gx, **wide)
    else:
        # The operands are copied to fp32, block by block.
        gx = gx.to(out.dtype)
        for columns, into in zip(score.t().split(_BLOCK_ROWS), out.split(_BLOCK_ROWS)):
            _weight_product(into, columns.t().to(out.dtype), gx, add)


def _widens(score: Tensor) -> bool:
    """Whether the device has products of half-precision operands with a result in fp32; a CPU has none."""
    return score.is_cuda and (isinstance(score, FakeTensor) or _device_widens(score.device, score.dtype))


@functools.cache
def _device_widens(device: torch.device, dtype: torch.dtype) -> bool:
    operand, out = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, operand, operand, out_dtype=out.dtype, out=out)
    except RuntimeError as error:
        logger.warning("gradients of the head's weight are computed in fp32, slowly: %s", str(error).splitlines()[0])
        return False
    return True


def _finish_weight(
    total: Tensor | None,  # (V, H) fp32, the sum over other tiles; overwritten if `in_place`
    score: Tensor,  # (R, V) G of the tile that is left
    gx: Tensor,  # (R, H)
    factor: Tensor | None,  # ()
    dtype: torch.dtype,
    in_place: bool = False,
) -> Tensor:
    """Returns ``(total + G^T (g X)) * factor``, (V, H), added up in fp32 and rounded once to ``dtype``.

    The product goes in blocks of rows whose sums stay in a GPU's L2 cache until they are scaled. So memory is read once
    (4 bytes per element) and written once (in ``dtype``). A product of all rows, and then the scaling, would read and
    write the sums twice.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if in_place and total is not None and dtype == wide:
        out = total
    else:
        out = gx.new_empty(score.shape[1], gx.shape[1], dtype=dtype)
    if total is None and factor is None and dtype == wide:
        _weight_product(out, score, gx)
        return out
    rows = max(1, min(_BLOCK_ROWS, _CACHED_BYTES // (gx.shape[1] * wide.itemsize)))
    buffer = None if dtype == wide else gx.new_empty(min(rows, len(out)), gx.shape[1], dtype=wide)
    starts = range(0, len(out), rows)
    for start in starts[:1] if isinstance(out, FakeTensor) else starts:  # one block tells the memory of all
        into = out[start : start + rows]
        block = into if buffer is None else buffer[: len(into)]
        if total is not None and out is not total:
            block.copy_(total[start : start + rows])
        _weight_product(block, score[:, start : start + rows], gx, add=total is not None)
        torch.mul(block, 1 if factor is None else factor, out=into)
    return out


def scale(x: Tensor, factor: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    """Returns ``x * factor``, computed in the wider of their dtypes and rounded once to ``dtype``.

    Small weights times half-precision rows would underflow otherwise. The work goes in blocks of rows, because a CPU
    makes a temporary of whatever it has to round or widen.
    """
    if x.dtype == factor.dtype == dtype:
        return x.mul_(factor) if in_place else x * factor
    out = x if in_place and x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    factors: Sequence[Tensor] = factor.split(_BLOCK_ROWS) if factor.dim() else [factor] * -(-len(x) // _BLOCK_ROWS)
    for part, some, into in zip(x.split(_BLOCK_ROWS), factors, out.split(_BLOCK_ROWS)):
        torch.mul(part, some, out=into)
    return out


def _in_dtype(total: Tensor, unit: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Returns a gradient in the dtype of its leaf; it may overwrite ``total``."""
    assert dtype is not None
    return total.to(dtype) if unit is None else scale(total, unit, dtype, in_place=True)


def _prepare(operands: Operands, options: HeadOptions) -> tuple[Tensor, Tensor, str]:
    """Returns x and w in the dtype of the products, and the backend of ``vocab_score``. Checks the targets."""
    hidden, weight, targets, _ = operands
    vocab_score.check_targets(targets, weight.shape[0] if options.vocab_size is None else options.vocab_size)
    dtype = options.compute_dtype or hidden.dtype
    x, w = hidden.to(dtype), weight if options.compute_dtype is None else weight.to(dtype)
    return x, w, backends.resolve(options.backend, x, vocab_score.BACKENDS, pair_loss.BACKENDS)


def _rows_beyond(operands: Operands, x: Tensor, wanted: Wanted, last: bool = False) -> int:
    """Returns by how many rows one tile may exceed the budget and take no more memory than several tiles.

    With R rows in a tile and N in all, the bytes at the peak are

        one tile       N V product + V H leaf           a tile beside the gradient, in the backward
        several tiles  R V product + V H sum            a tile beside the sum for the weight
                       R V product + V H (sum + leaf)   with ``last``, the tile that is left to the backward, if the
                                                        gradient is narrower than the sum and so not made in its place
    """
    if not wanted.weight:
        return 0
    leaf, total = operands.weight.dtype.itemsize, _sum_dtype(operands.weight).itemsize
    saved = total - (0 if last and leaf < total else leaf)
    return x.shape[1] * saved // x.element_size()


def empty_sums(x: Tensor, operands: Operands, wanted: Wanted) -> GradientSums:
    """Allocates the sums: fp32, or fp64 for fp64. The tiles write ``G W``, and the first one the sum for the weight."""
    _, weight, _, bias = operands
    return GradientSums(
        torch.empty_like(x) if wanted.hidden else None,
        torch.empty_like(weight, dtype=_sum_dtype(weight)) if wanted.weight else None,
        torch.zeros_like(bias, dtype=_sum_dtype(bias)) if wanted.bias and bias is not None else None,
        new_unit(x) if wanted.head else None,
    )


def _new_sums(x: Tensor, operands: Operands, wanted: Wanted) -> GradientSums:
    sums = empty_sums(x, operands, wanted)
    if len(x) == 0 and sums.weight is not None:  # there is no first tile
        sums.weight.zero_()
    return sums


def _sum_dtype(leaf: Tensor) -> torch.dtype:
    return torch.promote_types(leaf.dtype, torch.float32)


def _store(out: VocabScore, rows: slice, part: VocabScore) -> None:
    for whole, values in zip(out, part):
        if whole is not None and values is not None:
            whole[rows] = values
