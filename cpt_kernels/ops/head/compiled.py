"""The passes of the head as ``torch.library`` operators, so that ``torch.compile`` takes the head as one node.

Only graphs use them. Eager mode calls the passes directly (the autograd functions of ``linear_preference.py``), so
profilers see the matmuls, and no call pays for the dispatcher. An operator takes tensors, numbers and lists of them:
tensors are positional, because autograd needs them so, and options, pairs and losses are keywords, field by field. It
returns tensors alone: an empty tensor stands for a result that is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...losses import Loss
from ..gather import TokenMap
from ..pair_loss import flat_loss, unflatten_loss
from ..vocab_score import VocabScore, fill_absent
from .passes import (
    Dtypes,
    GradientSums,
    Operands,
    PreferenceOutput,
    ScoredPairs,
    Wanted,
    empty_sums,
    finished_gradients,
    row_gradients,
    scale,
    score_pair_blocks,
    score_rows,
)
from .tiles import HeadOptions, Pairs, completion_tokens

REFUSAL = (
    "a gradient reached the log-probs of linear_preference_loss, which finished its gradients for the loss alone: pass"
    " general=True (head_mode='general' in the trainer) for losses built on the log-probs"
)

_OPERANDS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
_PAIR_TENSORS = (
    "Tensor cu_completions, Tensor chosen, Tensor? rejected, Tensor sft_targets, Tensor? ref_logps,"
    " Tensor tokens_per_pair, Tensor? token_index, Tensor? token_order, Tensor? token_offsets"
)
_PAIR_LISTS = "SymInt[] completion_lengths, SymInt[] row_lengths, SymInt[] pair_blocks"
_LOSS = "str loss, str[] loss_options, Scalar[] loss_values"
_OPTIONS = (
    "bool[] wanted, float logit_scale, float? softcap, SymInt? vocab_size, bool statistics, float? memory_mb,"
    " ScalarType? compute_dtype, str backend"
)
_STATISTICS = len(VocabScore._fields)
_OUTPUTS = 3 + _STATISTICS  # tensors of a PreferenceOutput
_RESULTS = _OUTPUTS + 1 + len(GradientSums._fields)  # tensors of ScoredPairs without its tile


def _tensors(number: int) -> str:
    return "(" + ", ".join(["Tensor"] * number) + ")"


# --- linear_logprobs ---


def compiled_logprobs(operands: Operands, wanted: Wanted, options: HeadOptions) -> VocabScore:
    """Differentiable ``score_rows``, as one operator."""
    out = torch.ops.cpt_kernels.linear_logprobs(*operands, wanted=wanted, **flat_options(options))
    return VocabScore(*(out[:_STATISTICS] if options.statistics else out[:2]))


@torch.library.custom_op(
    "cpt_kernels::linear_logprobs",
    mutates_args=(),
    schema=f"({_OPERANDS}, *, {_OPTIONS}) -> {_tensors(_STATISTICS + 1)}",
)
def _linear_logprobs(hidden, weight, targets, bias, *, wanted, **options) -> tuple[Tensor, ...]:
    operands = Operands(hidden, weight, targets, bias)
    out = score_rows(operands, Wanted(*wanted), HeadOptions(**options))
    return fill_absent(hidden, (*out.tokens, out.score_weight))


@_linear_logprobs.register_fake
def _fake_linear_logprobs(hidden, weight, targets, bias, *, wanted, **flat) -> tuple[Tensor, ...]:
    wanted, options = Wanted(*wanted), HeadOptions(**flat)
    x = torch.empty_like(hidden, dtype=options.compute_dtype)
    tokens = VocabScore.empty(x.shape[0], x, options.statistics)
    return fill_absent(hidden, (*tokens, x if wanted.hidden and not wanted.head else None))


def _setup_logprobs(ctx, inputs, keyword_only_inputs, output) -> None:
    *statistics, score_weight = output
    ctx.wanted, ctx.keywords = Wanted(*keyword_only_inputs["wanted"]), keyword_only_inputs
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*(inputs if ctx.wanted.head else (score_weight,)))
    ctx.mark_non_differentiable(*statistics[1:], score_weight)


@once_differentiable
def _logprobs_backward(ctx, grad: Tensor, *_):  # -> gradients of hidden, weight, targets, bias
    if not ctx.wanted.head:
        (score_weight,) = ctx.saved_tensors
        return scale(score_weight, grad[:, None], ctx.dtype), None, None, None
    grads = torch.ops.cpt_kernels.linear_logprobs_backward(grad, *ctx.saved_tensors, **ctx.keywords)
    grad_hidden, grad_weight, grad_bias = (g if wants else None for g, wants in zip(grads, ctx.wanted))
    return grad_hidden, grad_weight, None, grad_bias


_linear_logprobs.register_autograd(_logprobs_backward, setup_context=_setup_logprobs)


@torch.library.custom_op(
    "cpt_kernels::linear_logprobs_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_OPERANDS}, *, {_OPTIONS}) -> {_tensors(3)}",
)
def _linear_logprobs_backward(grad, hidden, weight, targets, bias, *, wanted, **options) -> tuple[Tensor, ...]:
    operands = Operands(hidden, weight, targets, bias)
    return fill_absent(hidden, row_gradients(grad, operands, Wanted(*wanted), HeadOptions(**options)))


@_linear_logprobs_backward.register_fake
def _fake_linear_logprobs_backward(grad, hidden, weight, targets, bias, *, wanted, **_) -> tuple[Tensor, ...]:
    leaves = zip((hidden, weight, bias), wanted)
    return fill_absent(hidden, (torch.empty_like(leaf) if wants else None for leaf, wants in leaves))


# --- linear_preference ---


def compiled_preference(
    operands: Operands, wanted: Wanted, pairs: Pairs, loss: Loss, options: HeadOptions
) -> PreferenceOutput:
    """Differentiable ``score_pair_blocks``, as one operator."""
    tensors, lists = flat_pairs(pairs)
    flat = {**lists, **flat_loss(loss), **flat_options(options)}
    out = torch.ops.cpt_kernels.linear_preference(*operands, *tensors, wanted=wanted, **flat)
    output = _unflatten_result(out).output
    return output if options.statistics else output._replace(tokens=VocabScore(*output.tokens[:2]))


@torch.library.custom_op(
    "cpt_kernels::linear_preference",
    mutates_args=(),
    schema=f"({_OPERANDS}, {_PAIR_TENSORS}, *, {_PAIR_LISTS}, {_LOSS}, {_OPTIONS}) -> {_tensors(_RESULTS)}",
)
def _linear_preference(*tensors, wanted, loss, loss_options, loss_values, **keywords) -> tuple[Tensor, ...]:
    operands, pairs, options = _unflatten(tensors, **keywords)
    bound = unflatten_loss(loss, loss_options, loss_values)
    out = score_pair_blocks(operands, Wanted(*wanted), pairs, bound, options)
    return fill_absent(operands.hidden, _flat_result(out))


@_linear_preference.register_fake
def _fake_linear_preference(*tensors, wanted, loss, loss_options, loss_values, **keywords) -> tuple[Tensor, ...]:
    operands, pairs, options = _unflatten(tensors, **keywords)
    x = torch.empty_like(operands.hidden, dtype=options.compute_dtype)
    rows = VocabScore.empty(x.shape[0], x, options.statistics)
    tokens = completion_tokens(rows, pairs.token_map)
    new = tokens.logps.new_empty
    output = PreferenceOutput(new(()), new(pairs.chosen.shape[0]), new(pairs.cu_completions.shape[0] - 1), tokens)
    sums = empty_sums(x, operands, Wanted(*wanted))
    return fill_absent(operands.hidden, _flat_result(ScoredPairs(output, torch.empty_like(rows.logps), sums, None)))


def _setup_preference(ctx, inputs, keyword_only_inputs, output) -> None:
    out = _unflatten_result(output)
    ctx.wanted, ctx.inputs = Wanted(*keyword_only_inputs["wanted"]), len(inputs)
    ctx.dtypes = Dtypes.of(Operands(*inputs[:4]))
    ctx.save_for_backward(out.g, *out.sums)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.output.losses, *out.output.tokens[1:], out.g, *out.sums)


@once_differentiable
def _preference_backward(ctx, grad_loss, _, grad_completion_logps, grad_logps, *__):  # -> gradients of all tensors
    for grad in (grad_completion_logps, grad_logps):
        # A graph passes zeros for an output that is not used, so only the values tell whether a gradient arrived.
        if grad is not None:
            torch._assert_async((grad == 0).all(), REFUSAL)
    if grad_loss is None:
        return (None,) * ctx.inputs
    # The operator returned an empty tensor for a sum that is not wanted.
    g, *sums = ctx.saved_tensors
    present = (*ctx.wanted, sums[-1].dim() == 0)  # a unit that is absent is an empty vector
    finished = GradientSums(*(tensor if is_there else None for tensor, is_there in zip(sums, present)))
    grads = finished_gradients(grad_loss, g, finished, ctx.dtypes)
    return grads.hidden, grads.weight, None, grads.bias, *(None,) * (ctx.inputs - 4)


_linear_preference.register_autograd(_preference_backward, setup_context=_setup_preference)


# --- Flatten and rebuild operator arguments and results ---


def _flat_result(out: ScoredPairs) -> tuple[Tensor | None, ...]:
    return (*out.output.flatten(), out.g, *out.sums)


def _unflatten_result(flat: Sequence[Tensor]) -> ScoredPairs:
    """Inverse of :func:`_flat_result`; an absent result is an empty tensor, and there is no kept tile."""
    g, *sums = flat[_OUTPUTS:]
    return ScoredPairs(PreferenceOutput.unflatten(flat[:_OUTPUTS]), g, GradientSums(*sums), None)


def flat_options(options: HeadOptions) -> dict[str, Any]:
    """Returns options as keywords of an operator. Written out, because Dynamo traces this function."""
    return {
        "logit_scale": options.logit_scale,
        "softcap": options.softcap,
        "vocab_size": options.vocab_size,
        "statistics": options.statistics,
        "memory_mb": options.memory_mb,
        "compute_dtype": options.compute_dtype,
        "backend": options.backend,
    }


def flat_pairs(pairs: Pairs) -> tuple[tuple[Tensor | None, ...], dict[str, list[int]]]:
    """Returns pairs as arguments of an operator: the tensors of ``_PAIR_TENSORS``, and the lists."""
    # The normaliser becomes a tensor, by a product because a graph can make that of numbers and of tensors. As a number
    # it would be a constant of the graph, and each step with another number would compile again.
    tokens_per_pair = torch.ones((), dtype=torch.float64) * pairs.tokens_per_pair
    tensors = (
        pairs.cu_completions,
        pairs.chosen,
        pairs.rejected,
        pairs.sft_targets,
        pairs.ref_logps,
        tokens_per_pair,
        *(pairs.token_map or (None, None, None)),
    )
    lists = {"completion_lengths": list(pairs.completion_lengths), "row_lengths": list(pairs.row_lengths)}
    return tensors, lists | {"pair_blocks": [count for block in pairs.pair_blocks for count in block]}


def _unflatten(
    tensors: tuple, *, completion_lengths: list[int], row_lengths: list[int], pair_blocks: list[int], **options
) -> tuple[Operands, Pairs, HeadOptions]:
    cu_completions, chosen, rejected, sft_targets, ref_logps, tokens_per_pair, *token_map = tensors[4:]
    pairs = Pairs(
        cu_completions,
        completion_lengths,
        chosen,
        rejected,
        sft_targets,
        list(zip(pair_blocks[::2], pair_blocks[1::2])),
        ref_logps,
        tokens_per_pair,
        token_map=None if token_map[0] is None else TokenMap(*token_map),
        prediction_lengths=row_lengths,
    )
    return Operands(*tensors[:4]), pairs, HeadOptions(**options)
