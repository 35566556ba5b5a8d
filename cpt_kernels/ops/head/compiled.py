"""The passes of ``head.py`` as operators, functional and with autograd, so that ``torch.compile`` takes the head whole.

Outside of a graph nobody needs them: there the autograd functions of ``linear_preference.py`` run the same passes, with
no operator's boundary, and whoever counts or watches products sees them. An operator takes tensors, numbers and lists
of them, so options, pairs and losses cross its boundary field by field; what a pass leaves out is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...losses import Loss, build_loss
from ..vocab_score import VocabScore
from .passes import (
    Wanted,
    empty_gradients,
    empty_score,
    finished_gradients,
    row_gradients,
    scale,
    score_pair_blocks,
    score_rows,
)
from .tiles import HeadOptions, Pairs

REFUSAL = (
    "a gradient reached the log-probs of linear_preference_loss, whose gradients were finished for its loss alone: pass"
    " general=True (head_mode='general' in the trainer) for losses built on the log-probs"
)

_ROWS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, bool[] wanted"
_OPTIONS = (
    "float logit_scale, float? softcap, SymInt? vocab_size, bool statistics, float? memory_mb,"
    " ScalarType? compute_dtype, str backend"
)
_PAIRS = (
    "Tensor cu_completions, SymInt[] completion_lengths, Tensor chosen, Tensor? rejected, Tensor sft_targets,"
    " SymInt[] pair_blocks, Tensor? ref_logps, Tensor tokens_per_pair"
)
_LOSS = "str loss, str[] loss_options, Scalar[] loss_values"
_STATISTICS = len(VocabScore._fields)


def _tensors(number: int) -> str:
    return "(" + ", ".join(["Tensor"] * number) + ")"


# --- linear_logprobs ---


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, wanted: Wanted, options: HeadOptions
) -> VocabScore:
    """Differentiable ``head.score_rows``."""
    out = torch.ops.cpt_kernels.linear_logprobs(hidden, weight, targets, bias, wanted, *_flat_options(options))
    return VocabScore(*(out[:_STATISTICS] if options.statistics else out[:2]))


@torch.library.custom_op(
    "cpt_kernels::linear_logprobs",
    mutates_args=(),
    schema=f"({_ROWS}, {_OPTIONS}) -> {_tensors(_STATISTICS + 1)}",
)
def _linear_logprobs(hidden, weight, targets, bias, wanted, *options) -> tuple[Tensor, ...]:
    *out, _ = score_rows(hidden, weight, targets, bias, Wanted(*wanted), HeadOptions(*options))
    return _filled(hidden, out)


@_linear_logprobs.register_fake
def _(hidden, weight, targets, bias, wanted, *options) -> tuple[Tensor, ...]:
    wanted, options = Wanted(*wanted), HeadOptions(*options)
    x = torch.empty_like(hidden, dtype=options.compute_dtype)
    return _filled(hidden, (*empty_score(x, options), x if wanted.hidden and not wanted.head else None))


def _setup_logprobs(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, wanted, *options = inputs
    *statistics, score_weight = output
    ctx.wanted, ctx.options, ctx.dtype = Wanted(*wanted), options, hidden.dtype
    ctx.save_for_backward(*((hidden, weight, targets, bias) if ctx.wanted.head else (score_weight,)))
    ctx.mark_non_differentiable(*statistics[1:], score_weight)


@once_differentiable
def _logprobs_backward(ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (1 + len(ctx.options))
    if not ctx.wanted.head:
        (score_weight,) = ctx.saved_tensors
        return scale(score_weight, grad[:, None], ctx.dtype), None, None, None, *nothing
    grads = torch.ops.cpt_kernels.linear_logprobs_backward(grad, *ctx.saved_tensors, ctx.wanted, *ctx.options)
    grad_hidden, grad_weight, grad_bias = (g if wants else None for g, wants in zip(grads, ctx.wanted))
    return grad_hidden, grad_weight, None, grad_bias, *nothing


_linear_logprobs.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


@torch.library.custom_op(
    "cpt_kernels::linear_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ROWS}, {_OPTIONS}) -> {_tensors(3)}",
)
def _linear_logprobs_backward(grad, hidden, weight, targets, bias, wanted, *options) -> tuple[Tensor, ...]:
    wanted, options = Wanted(*wanted), HeadOptions(*options)
    return _filled(hidden, row_gradients(grad, hidden, weight, targets, bias, wanted, options))


@_linear_logprobs_backward.register_fake
def _(grad, hidden, weight, targets, bias, wanted, *options) -> tuple[Tensor, ...]:
    leaves = zip((hidden, weight, bias), wanted)
    return _filled(hidden, (torch.empty_like(leaf) if wants else None for leaf, wants in leaves))


# --- linear_preference ---


def linear_preference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    wanted: Wanted,
    pairs: Pairs,
    loss: Loss,
    options: HeadOptions,
) -> tuple[Tensor | None, ...]:
    """Differentiable ``head.score_pair_blocks``, without what it has for the backward."""
    ours = (loss.name, list(loss.options), list(loss.options.values()))
    out = torch.ops.cpt_kernels.linear_preference(
        hidden, weight, targets, bias, wanted, *_flat_pairs(pairs), *ours, *_flat_options(options)
    )
    statistics = out[3 : 3 + _STATISTICS] if options.statistics else (*out[3:5], *(None,) * (_STATISTICS - 2))
    return *out[:3], *statistics


@torch.library.custom_op(
    "cpt_kernels::linear_preference",
    mutates_args=(),
    schema=f"({_ROWS}, {_PAIRS}, {_LOSS}, {_OPTIONS}) -> {_tensors(3 + _STATISTICS + 4)}",
)
def _linear_preference(hidden, weight, targets, bias, wanted, *flat) -> tuple[Tensor, ...]:
    pairs, loss, options = _unflatten(flat)
    *out, _ = score_pair_blocks(hidden, weight, targets, bias, Wanted(*wanted), pairs, loss, options)
    return _filled(hidden, out)


@_linear_preference.register_fake
def _(hidden, weight, targets, bias, wanted, *flat) -> tuple[Tensor, ...]:
    wanted, (pairs, _, options) = Wanted(*wanted), _unflatten(flat)
    x = torch.empty_like(hidden, dtype=options.compute_dtype)
    tokens = empty_score(x, options)
    sums = (tokens.logps.new_empty(size) for size in ((), len(pairs.chosen), len(pairs.cu_completions) - 1))
    finished = (torch.empty_like(tokens.logps), *empty_gradients(x, weight, bias, wanted))
    return _filled(hidden, (*sums, *tokens, *finished))


def _setup_preference(ctx, inputs, output) -> None:
    hidden, weight, _, bias, wanted, *_ = inputs
    _, losses, _, _, *others = output
    ctx.wanted, ctx.inputs = Wanted(*wanted), len(inputs)
    ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(*output[-4:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(losses, *others)


@once_differentiable
def _preference_backward(ctx, grad_loss, _, grad_completion_logps, grad_logps, *__) -> tuple[Tensor | None, ...]:
    for grad in (grad_completion_logps, grad_logps):
        if grad is not None:  # zeros stand for an output that nobody used, so a graph must look at the values
            torch._assert_async((grad == 0).all(), REFUSAL)
    if grad_loss is None:
        return (None,) * ctx.inputs
    g, *finished = ctx.saved_tensors
    finished = (tensor if wants else None for tensor, wants in zip(finished, ctx.wanted))
    grad_hidden, grad_weight, grad_bias = finished_gradients(grad_loss, g, *finished, ctx.dtypes)
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * (ctx.inputs - 4)


_linear_preference.register_autograd(_preference_backward, setup_context=_setup_preference)


# --- Across the boundary ---


def _flat_options(options: HeadOptions) -> tuple:
    return (
        options.logit_scale,
        options.softcap,
        options.vocab_size,
        options.statistics,
        options.memory_mb,
        options.compute_dtype,
        options.backend,
    )


def _flat_pairs(pairs: Pairs) -> tuple:
    return (
        pairs.cu_completions,
        list(pairs.completion_lengths),
        pairs.chosen,
        pairs.rejected,
        pairs.sft_targets,
        [number for block in pairs.pair_blocks for number in block],
        pairs.ref_logps,
        # A product, of which a graph can make one of tensors: another number each step would compile another graph.
        torch.ones((), dtype=torch.float64) * pairs.tokens_per_pair,
    )


def _unflatten(flat: tuple) -> tuple[Pairs, Loss, HeadOptions]:
    offsets, lengths, chosen, rejected, sft_targets, pair_blocks, ref_logps, tokens_per_pair = flat[:8]
    name, options, values = flat[8:11]
    pair_blocks = list(zip(pair_blocks[::2], pair_blocks[1::2]))
    return (
        Pairs(offsets, lengths, chosen, rejected, sft_targets, pair_blocks, ref_logps, tokens_per_pair),
        build_loss(name, **dict(zip(options, values))),
        HeadOptions(*flat[11:]),
    )


def _filled(like: Tensor, results: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if result is None else result for result in results)
