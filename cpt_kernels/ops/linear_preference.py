"""The head: hidden rows -> log-probs -> preference loss and gradients, tile by tile, without storing the logits.

With ``G = onehot(y) - softmax(X W^T)``, the vocab score, and a loss that reads the batch only through completion
log-probs ``logp_s``,

    dX = diag(g) (G W),   dW = G^T (diag(g) X).

``g_i = dL/dlogp_i`` belongs to token i. It is ``dL/dlogp_s`` of the token's completion s, unless the tokens of a
completion have weights (ld_alpha, ``Pairs.token_weights``). ``g`` scales rows of X or of G W and never the
vocabulary-sized tile, so each tile of logits is turned into G in place and used while it is there:

    no gradient wanted       1 GEMM    logits
    head frozen              2 GEMMs   logits, G W (kept unscaled, (N, H)); the backward scales its rows; any loss
    head trained, separable  3 GEMMs   logits, G W, G^T (g X); a tile holds whole pair blocks, so g is known at once
                                       (4 for a block with more rows than a tile: its logits again, once g is known)
    head trained, general    4 GEMMs   log-sum-exp kept, logits again in the backward; any use of token log-probs
    the same, one tile       3 GEMMs   if one tile holds all rows it is kept, as G, until the backward

``linear_logprobs`` has the first, second, fourth and fifth mode; ``linear_preference_loss`` adds the third.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError
from ..losses import Loss
from .backends import autocast_dtype
from .gather import segment_sum
from .head.compiled import REFUSAL, compiled_logprobs, compiled_preference
from .head.passes import (
    Dtypes,
    GradientSums,
    Operands,
    PreferenceOutput,
    Wanted,
    finished_gradients,
    row_gradients,
    score_pair_blocks,
    score_rows,
    scored_gradients,
)
from .head.tiles import DTYPES, HeadOptions, Pairs, completion_tokens
from .pair_loss import has_kernel
from .vocab_score import VocabScore

__all__ = ["HeadOptions", "Pairs", "PreferenceOutput", "linear_logprobs", "linear_preference_loss"]


def linear_logprobs(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    bias: Tensor | None = None,  # (V,)
    options: HeadOptions | None = None,
) -> VocabScore:
    """Returns log-probs of ``targets`` under ``softmax(hidden @ weight.T + bias)`` and statistics, (N,) each.

    Results are fp32 (fp64 for fp64). ``logps`` is differentiable in hidden, weight and bias, with any upstream
    gradient; the statistics are not. Memory beside the inputs: one tile of logits, kept until the backward if it holds
    all rows and the head is trained, and (N, H) if the head is frozen. Example::

        score = linear_logprobs(hidden, model.lm_head.weight, targets)
        score.logps.sum().backward()

    Under autocast the products are computed in its dtype, as those of a linear layer would be.

    Raises:
        UserError: shapes, devices or dtypes that do not fit together; on a CPU, a target outside the vocabulary.
        RuntimeError: the backend asked for is not available.
    """
    operands = Operands(hidden, weight, targets, bias)
    options = _checked_options(operands, options or HeadOptions())
    wanted = Wanted.of(operands)
    if torch.compiler.is_compiling():
        return compiled_logprobs(operands, wanted, options)
    if not any(wanted):
        return score_rows(operands, wanted, options).tokens
    return VocabScore(*_LinearLogprobs.apply(*operands, wanted, options))


def linear_preference_loss(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (N,) int64
    pairs: Pairs,
    loss: Loss,
    bias: Tensor | None = None,  # (V,)
    options: HeadOptions | None = None,
    *,
    general: bool = False,
) -> PreferenceOutput:
    """Returns the sum of a preference loss over pairs of completions whose tokens are predicted by ``hidden``.

    Completions that have tokens in common share rows, see ``Pairs.token_map``.

    With a trained head and a separable loss, the forward finishes the gradients (3 GEMMs): then ``loss`` is the only
    differentiable output, and a backward through the log-probs raises. ``general=True`` keeps all outputs
    differentiable (4 GEMMs). A pair block with more rows than a tile takes 4 as well. Example::

        out = linear_preference_loss(hidden, head.weight, targets, pairs, build_loss("sigmoid", beta=0.1))
        (out.loss / num_pairs).backward()

    Raises:
        UserError: shapes, devices or dtypes that do not fit together, or pairs without something that the loss needs;
            on a CPU, a target outside the vocabulary, lengths that are not those of ``cu_completions``, or a pair that
            reaches into another block.
        RuntimeError: the backend asked for is not available.
    """
    operands = Operands(hidden, weight, targets, bias)
    options = _checked_options(operands, options or HeadOptions())
    pairs.check(loss, hidden.device, len(hidden))
    if loss.needs_log_sum_sq:
        options = replace(options, statistics=True)
    wanted = Wanted.of(operands)
    # Trained head, separable loss: the forward finishes the gradients.
    if wanted.head and loss.separable and not general:
        run = _run_preference
        if torch.compiler.is_compiling():
            run = compiled_preference if has_kernel(loss) and not pairs.has_weights else _outside_graph
        return run(operands, wanted, pairs, loss, options)
    # Other modes: differentiable log-probs, and autograd for the loss.
    tokens = completion_tokens(linear_logprobs(hidden, weight, targets, bias, options), pairs.token_map)
    weighed = pairs.weigh(tokens)
    completion_logps = segment_sum(weighed.logps, pairs.cu_completions)
    losses = pairs.losses(loss, pairs.pair_logps(completion_logps, loss=loss, tokens=weighed))
    return PreferenceOutput(losses.sum(), losses.detach(), completion_logps, tokens)


def _run_preference(
    operands: Operands, wanted: Wanted, pairs: Pairs, loss: Loss, options: HeadOptions
) -> PreferenceOutput:
    return PreferenceOutput.unflatten(_LinearPreference.apply(*operands, wanted, pairs, loss, options))


def _outside_graph(
    operands: Operands, wanted: Wanted, pairs: Pairs, loss: Loss, options: HeadOptions
) -> PreferenceOutput:
    """Breaks the graph once for weights and for losses without an operator; Dynamo would break it at many lines."""
    # Disabled here and not by a decorator, which would import Dynamo with this module.
    return torch.compiler.disable(_run_preference)(operands, wanted, pairs, loss, options)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probs. The backward weighs ``G W`` and a kept tile if the forward made them; else it computes tiles again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, wanted: Wanted, options: HeadOptions):
        operands = Operands(hidden, weight, targets, bias)
        out = score_rows(operands, wanted, options, keep=True)
        ctx.wanted, ctx.options, ctx.dtypes = wanted, options, Dtypes.of(operands)
        # A trained head whose tile was not kept: the backward computes the logits again from the operands.
        ctx.again = wanted.head and out.score is None
        rows = None if out.score is None else hidden
        ctx.save_for_backward(*(operands if ctx.again else (out.score_weight, out.score, rows)))
        ctx.mark_non_differentiable(*(tensor for tensor in out.tokens[1:] if tensor is not None))
        return tuple(out.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):  # -> gradients of hidden, weight, targets, bias, wanted, options
        if ctx.again:
            grads = row_gradients(grad, Operands(*ctx.saved_tensors), ctx.wanted, ctx.options)
        else:
            score_weight, score, rows = ctx.saved_tensors
            grads = scored_gradients(grad, score_weight, score, rows, ctx.wanted, ctx.dtypes, _is_last_backward())
        return grads.hidden, grads.weight, None, grads.bias, None, None


class _LinearPreference(torch.autograd.Function):
    """Trained head, separable loss: the forward finishes the gradients, and the backward scales them.

    If one tile holds all rows it is kept, and the backward computes the products for the gradient of the weight. That
    saves an accumulator and its scaling. Of several tiles the last is kept: the backward adds its product to the
    accumulator and scales the sum while it is in cache.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, wanted: Wanted, pairs: Pairs, loss: Loss, options: HeadOptions):
        operands = Operands(hidden, weight, targets, bias)
        out = score_pair_blocks(operands, wanted, pairs, loss, options, keep=True)
        ctx.save_for_backward(out.g, *out.sums, out.score, None if out.score is None else hidden)
        ctx.wanted, ctx.dtypes = wanted, Dtypes.of(operands)
        # Without this autograd passes zeros for unused outputs, and the backward could not tell them from gradients.
        ctx.set_materialize_grads(False)
        statistics = (tensor for tensor in out.output.tokens[1:] if tensor is not None)
        ctx.mark_non_differentiable(out.output.losses, *statistics)
        return out.output.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _, grad_completion_logps, grad_logps, *__):
        # -> gradients of hidden, weight, targets, bias, wanted, pairs, loss, options
        if grad_completion_logps is not None or grad_logps is not None:
            raise RuntimeError(REFUSAL)
        g, *sums, score, rows = ctx.saved_tensors
        made, last = GradientSums(*sums), _is_last_backward()
        if score is not None and len(score) == len(g):
            grads = scored_gradients(grad_loss * g, made.score_weight, score, rows, ctx.wanted, ctx.dtypes, last)
        else:
            grads = finished_gradients(grad_loss, g, made, ctx.dtypes, last, score, rows)
        return grads.hidden, grads.weight, None, grads.bias, *(None,) * 4


def _is_last_backward() -> bool:
    """Whether the saved tensors may be overwritten: the graph is not kept for another backward."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _checked_options(operands: Operands, options: HeadOptions) -> HeadOptions:
    """Checks operands and options, and returns the options with the dtype of the products, if it is not that of hidden.

    Raises:
        UserError: they do not fit together.
    """
    hidden, weight, targets, bias = operands
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise UserError(f"hidden (N, H) and weight (V, H) do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise UserError(
            f"targets must have shape ({hidden.shape[0]},) in int64, not {tuple(targets.shape)} in {targets.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise UserError(
            f"bias must be floating and have shape ({weight.shape[0]},), not {bias.dtype} {tuple(bias.shape)}"
        )
    if any(t is not None and t.device != hidden.device for t in (weight, targets, bias)):
        raise UserError(f"weight, targets and bias must be on the device of hidden, {hidden.device}")
    options.check(weight.shape[0])
    return replace(options, compute_dtype=_product_dtype(hidden, weight, options.compute_dtype))


def _product_dtype(hidden: Tensor, weight: Tensor, asked: torch.dtype | None) -> torch.dtype | None:
    """Returns the dtype of the head's products: the one asked for, else autocast's; None for that of the operands."""
    if asked is None:
        asked = autocast_dtype(hidden, weight)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise UserError(f"{name} is {tensor.dtype}: it must be one of {', '.join(map(str, DTYPES))}")
    if asked is None and hidden.dtype != weight.dtype:
        raise UserError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them, run under torch.autocast, or set"
            " HeadOptions(compute_dtype=...)"
        )
    wide = [t.dtype for t in (hidden, weight) if t.dtype == torch.float64]
    if asked is not None and (asked not in DTYPES or (asked == torch.float64) != (len(wide) == 2) or len(wide) == 1):
        raise UserError(f"compute_dtype={asked} is not possible for {hidden.dtype} hidden and {weight.dtype} weight")
    return asked
