"""The head: hidden rows -> log-probs -> preference loss and gradients, tile by tile, without storing the logits.

With ``G = onehot(y) - softmax(X W^T)`` and a loss that sees the batch only through completion log-probs ``logp_s``,

    dX = diag(g) (G W),   dW = G^T (diag(g) X),   g_i = dL/dlogp_i of token i: dL/dlogp_s of its completion s, or more
                                                  where a loss weighs the tokens of a completion (ld_alpha).

``g`` never touches the vocabulary-sized tile, so each tile of logits is scored in place and used while it is there:

    no gradient wanted       1 GEMM    logits
    head frozen              2 GEMMs   logits, G W (kept unscaled, (N, H)); the backward scales rows; any loss
    head trained, separable  3 GEMMs   logits, G W, G^T (g X); tiles hold whole units of pairs, so g is known at once
    head trained, general    4 GEMMs   log-sum-exp kept, logits again in the backward; any use of token log-probs

``linear_logprobs`` is the first, second and fourth, ``linear_preference_loss`` adds the third.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..losses import Loss
from . import backends
from .gather import segment_sum
from .pair_loss import KERNEL_LOSSES, PairLossOutput, pair_loss
from .tiles import HeadOptions, Pairs, Tile, logits_tiles, tile_buffer, unit_tiles
from .vocab_score import VocabScore

__all__ = ["HeadOptions", "Pairs", "PreferenceOutput", "linear_logprobs", "linear_preference_loss"]


class PreferenceOutput(NamedTuple):
    """Result of :func:`linear_preference_loss`; tokens are completion tokens."""

    loss: Tensor  # () sum of the losses over the pairs
    losses: Tensor  # (P,) without gradient
    completion_logps: Tensor  # (S,)
    tokens: VocabScore  # (N,) log-probs and statistics


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    options: HeadOptions | None = None,
) -> VocabScore:
    """Log-probs of ``targets`` under ``softmax(hidden @ weight.T + bias)`` and statistics, (N,) each, fp32.

    ``logps`` is differentiable in hidden, weight and bias, with any upstream gradient; the rest is not. Memory beside
    the inputs: one tile of logits, and (N, H) where the head is frozen. Example::

        score = linear_logprobs(hidden, model.lm_head.weight, targets)
        score.logps.sum().backward()

    Raises:
        ValueError: shapes that do not fit together.
    """
    options = options or HeadOptions()
    _check(hidden, weight, targets, bias)
    if not torch.is_grad_enabled() or not _any_requires_grad(hidden, weight, bias):
        return _score_rows(hidden, weight, targets, bias, options, None)
    return VocabScore(*_LinearLogprobs.apply(hidden, weight, targets, bias, options))


def linear_preference_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    pairs: Pairs,
    loss: Loss,
    bias: Tensor | None = None,  # (V,)
    options: HeadOptions | None = None,
    general: bool = False,
) -> PreferenceOutput:
    """Sum of a preference loss over pairs of completions whose tokens are predicted by ``hidden``.

    With a trained head and a separable loss, gradients are finished here (3 GEMMs): then ``loss`` is the only
    differentiable output, and a backward through the log-probs raises. ``general=True`` keeps everything differentiable
    (4 GEMMs). Example::

        out = linear_preference_loss(hidden, head.weight, targets, pairs, build_loss("sigmoid", beta=0.1))
        (out.loss / num_pairs).backward()

    Raises:
        ValueError: shapes that do not fit together, or the loss needs what the pairs do not have.
    """
    options = options or HeadOptions()
    _check(hidden, weight, targets, bias)
    pairs.check(loss)
    if loss.needs_log_sum_sq:
        options = replace(options, statistics=True)
    trained = torch.is_grad_enabled() and _any_requires_grad(weight, bias)
    if trained and loss.separable and not general:
        total, losses, completion_logps, *tokens = _LinearPreference.apply(
            hidden, weight, targets, bias, pairs, loss, options
        )
        return PreferenceOutput(total, losses, completion_logps, VocabScore(*tokens))
    tokens = linear_logprobs(hidden, weight, targets, bias, options)
    completion_logps = segment_sum(tokens.logps, pairs.cu_completions)
    losses = loss(pairs.numbers(completion_logps, loss=loss, tokens=tokens))
    return PreferenceOutput(losses.sum(), losses.detach(), completion_logps, tokens)


class _LinearLogprobs(torch.autograd.Function):
    """Frozen head: G W is stored and the backward scales its rows. Trained: the backward computes the tiles again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions):
        ctx.frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[3])
        ctx.options, ctx.dtype = options, hidden.dtype
        score_weight = torch.empty_like(hidden, dtype=options.compute_dtype) if ctx.frozen else None
        out = _score_rows(hidden, weight, targets, bias, options, score_weight)
        ctx.save_for_backward(*((score_weight,) if ctx.frozen else (hidden, weight, targets, bias)))
        ctx.mark_non_differentiable(*(tensor for tensor in out[1:] if tensor is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        if ctx.frozen:
            (score_weight,) = ctx.saved_tensors
            return _scale_rows(score_weight, grad, ctx.dtype), None, None, None, None
        hidden, weight, targets, bias = ctx.saved_tensors
        needs_hidden, needs_weight, _, needs_bias, _ = ctx.needs_input_grad
        x, w = _cast(ctx.options, hidden, weight)
        score_weight = torch.empty_like(x) if needs_hidden else None
        grad_weight, grad_bias = _empty_gradients(weight if needs_weight else None, bias if needs_bias else None)
        for rows, logits in logits_tiles(x, w, tile_buffer(x, w, ctx.options)):
            ctx.options.score(logits, targets[rows], bias, score=True)
            _add_gradients(logits, x[rows], w, grad[rows], score_weight, rows, grad_weight, grad_bias)
        return (
            None if score_weight is None else _scale_rows(score_weight, grad, hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


class _LinearPreference(torch.autograd.Function):
    """Trained head, separable loss: a tile holds whole units, so its gradients are finished while it is there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, pairs: Pairs, loss: Loss, options: HeadOptions):
        needs_hidden, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad
        x, w = _cast(options, hidden, weight)
        tokens = _empty_score(x, options)
        completion_logps = tokens.logps.new_empty(len(pairs.completion_lengths))
        losses = tokens.logps.new_empty(len(pairs.chosen))
        g = torch.empty_like(tokens.logps)
        score_weight = torch.empty_like(x) if needs_hidden else None
        grad_weight, grad_bias = _empty_gradients(weight if needs_weight else None, bias if needs_bias else None)
        buffer = tile_buffer(x, w, options)
        for tile in unit_tiles(pairs, len(buffer)):
            whole = tile.rows.stop - tile.rows.start <= len(buffer)
            for rows, logits in logits_tiles(x, w, buffer, tile.rows):
                _store(tokens, rows, options.score(logits, targets[rows], bias, score=whole))
            _tile_loss(tile, tokens, completion_logps, losses, g, pairs, loss, options.backend)
            if whole:
                _add_gradients(logits, x[rows], w, g[rows], score_weight, rows, grad_weight, grad_bias)
                continue
            for rows, logits in logits_tiles(
                x, w, buffer, tile.rows
            ):  # a unit beyond the budget: its tiles a second time
                options.score(logits, targets[rows], bias, score=True)
                _add_gradients(logits, x[rows], w, g[rows], score_weight, rows, grad_weight, grad_bias)
        ctx.save_for_backward(g, score_weight, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, *(tensor for tensor in tokens[1:] if tensor is not None))
        return losses.sum(), losses, completion_logps, *tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _, grad_completion_logps, grad_logps, *__):
        if grad_completion_logps is not None or grad_logps is not None:
            raise RuntimeError(
                "a gradient reached the log-probs of linear_preference_loss, whose gradients were finished for its loss"
                " alone: pass general=True (head_mode='general' in the trainer) for losses built on the log-probs"
            )
        g, score_weight, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if score_weight is None else _scale_rows(score_weight, grad_loss * g, hidden_dtype),
            None if grad_weight is None else (grad_loss * grad_weight).to(weight_dtype),
            None,
            None if grad_bias is None else (grad_loss * grad_bias).to(bias_dtype),
            *(None,) * 3,
        )


def _score_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    score_weight: Tensor | None,  # (N, H), receives G W
) -> VocabScore:
    x, w = _cast(options, hidden, weight)
    out = _empty_score(x, options)
    for rows, logits in logits_tiles(x, w, tile_buffer(x, w, options)):
        _store(out, rows, options.score(logits, targets[rows], bias, score=score_weight is not None))
        if score_weight is not None:
            torch.mm(logits, w, out=score_weight[rows])
    return out


def _tile_loss(
    tile: Tile,
    tokens: VocabScore,  # (N,)
    completion_logps: Tensor,  # (S,) written
    losses: Tensor,  # (P,) written
    g: Tensor,  # (N,) written: d(sum of losses)/dlogp of each row
    pairs: Pairs,
    loss: Loss,
    backend: str,
) -> None:
    completions = slice(tile.first[0], tile.last[0])
    offsets = pairs.cu_completions[completions.start : completions.stop + 1] - tile.rows.start
    # A normaliser that is still on the device would have to be waited for to become a kernel's argument.
    closed_form = loss.options is not None and loss.name in KERNEL_LOSSES
    closed_form &= not (loss.name == "sft" and isinstance(pairs.tokens_per_pair, Tensor))
    if closed_form and backends.resolve(backend, tokens.logps, (torch.float32,)) != "eager":
        sums, tile_losses, weights = _pair_loss(tile, tokens.logps, offsets, pairs, loss, backend)
        weights = weights.repeat_interleave(offsets.diff(), output_size=tile.rows.stop - tile.rows.start)
    else:
        with torch.enable_grad():
            part = VocabScore(*(None if tensor is None else tensor[tile.rows] for tensor in tokens))
            part = part._replace(logps=part.logps.detach().requires_grad_())
            sums = segment_sum(part.logps, offsets)
            tile_losses = loss(pairs.numbers(sums, tile.first, tile.last, loss, part))
            (weights,) = torch.autograd.grad(tile_losses.sum(), part.logps)
    completion_logps[completions] = sums.detach()
    losses[tile.first[1] : tile.last[1]] = tile_losses.detach()
    g[tile.rows] = weights


def _pair_loss(tile: Tile, logps: Tensor, offsets: Tensor, pairs: Pairs, loss: Loss, backend: str) -> PairLossOutput:
    some = slice(tile.first[1], tile.last[1])
    indices = (pairs.chosen, pairs.rejected, pairs.sft_targets)
    return pair_loss(
        logps[tile.rows],
        offsets,
        *(None if index is None else index[some] - tile.first[0] for index in indices),
        None if pairs.ref_logps is None else pairs.ref_logps[tile.first[0] : tile.last[0]],
        loss=loss.name,
        tokens_per_pair=1.0 if isinstance(pairs.tokens_per_pair, Tensor) else pairs.tokens_per_pair,
        backend=backend,
        **loss.options,
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
        gx = _scale_rows(x, g, x.dtype)
        if score.dtype == grad_weight.dtype:
            grad_weight.addmm_(score.t(), gx)
        elif score.is_cuda:
            torch.addmm(grad_weight, score.t(), gx, out_dtype=grad_weight.dtype, out=grad_weight)
        else:  # a CPU has no half-precision product that accumulates in fp32 across calls
            grad_weight.addmm_(score.t().to(grad_weight.dtype), gx.to(grad_weight.dtype))
    if grad_bias is not None:
        grad_bias += (score.t() @ g[:, None].to(score.dtype))[:, 0]


def _scale_rows(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """``diag(g) x``, multiplied in the precision of ``g`` (fp32): small weights times half-precision rows underflow."""
    return (x * g[:, None]).to(dtype)


def _cast(options: HeadOptions, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if options.compute_dtype is None else t.to(options.compute_dtype) for t in tensors)


def _empty_gradients(*tensors: Tensor | None) -> list[Tensor | None]:
    """Zeros to accumulate in: fp32, or fp64 for fp64."""
    return [
        None if t is None else torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors
    ]


def _empty_score(x: Tensor, options: HeadOptions) -> VocabScore:
    dtype = torch.promote_types(x.dtype, torch.float32)
    kinds = (dtype, dtype, *((dtype, dtype, torch.bool, dtype) if options.statistics else (None,) * 4))
    return VocabScore(*(None if kind is None else x.new_empty(x.shape[0], dtype=kind) for kind in kinds))


def _store(out: VocabScore, rows: slice, part: VocabScore) -> None:
    for whole, tensor in zip(out, part):
        if whole is not None:
            whole[rows] = tensor


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (N, H) and weight (V, H) do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape ({hidden.shape[0]},), not {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
