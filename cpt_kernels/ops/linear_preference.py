"""The head: hidden rows -> log-probs -> preference loss and gradients, tile by tile, without storing the logits.

With ``G = onehot(y) - softmax(X W^T)`` and a loss that sees the batch only through completion log-probs ``logp_s``,

    dX = diag(g) (G W),   dW = G^T (diag(g) X),   g_i = dL/dlogp_i of token i: dL/dlogp_s of its completion s, or more
                                                  where a loss weighs the tokens of a completion (ld_alpha).

``g`` never touches the vocabulary-sized tile, so each tile of logits is scored in place and used while it is there:

    no gradient wanted       1 GEMM    logits
    head frozen              2 GEMMs   logits, G W (kept unscaled, (N, H)); the backward scales rows; any loss
    head trained, separable  3 GEMMs   logits, G W, G^T (g X); tiles hold whole pair blocks, so g is known at once
                                       (4 for a block with more rows than a tile: its logits again, once g is known)
    head trained, general    4 GEMMs   log-sum-exp kept, logits again in the backward; any use of token log-probs
    the same, one tile       3 GEMMs   where one tile holds all rows it is kept, scored, until the backward

``linear_logprobs`` is the first, second and fourth, ``linear_preference_loss`` adds the third.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..losses import Loss
from .gather import segment_sum
from .head import compiled as head_operators
from .head.passes import Wanted, finished_gradients, row_gradients, score_pair_blocks, score_rows, scored_gradients
from .head.tiles import HeadOptions, Pairs
from .pair_loss import has_kernel
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
    """Log-probs of ``targets`` under ``softmax(hidden @ weight.T + bias)`` and statistics, (N,) each, fp32 (or fp64).

    ``logps`` is differentiable in hidden, weight and bias, with any upstream gradient; the rest is not. Memory beside
    the inputs: one tile of logits, kept until the backward where it holds all rows and the head is trained, and (N, H)
    where it is frozen. Example::

        score = linear_logprobs(hidden, model.lm_head.weight, targets)
        score.logps.sum().backward()

    Raises:
        ValueError: shapes that do not fit together; on a CPU, a target outside the vocabulary.
        RuntimeError: the backend asked for is not available.
    """
    options = options or HeadOptions()
    _check(hidden, weight, targets, bias, options)
    wanted = Wanted.of(hidden, weight, bias)
    if torch.compiler.is_compiling():
        return head_operators.linear_logprobs(hidden, weight, targets, bias, wanted, options)
    run = _LinearLogprobs.apply if any(wanted) else score_rows
    return VocabScore(*run(hidden, weight, targets, bias, wanted, options)[:6])


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
    (4 GEMMs). A pair block with more rows than a tile takes 4 as well. Example::

        out = linear_preference_loss(hidden, head.weight, targets, pairs, build_loss("sigmoid", beta=0.1))
        (out.loss / num_pairs).backward()

    Raises:
        ValueError: shapes that do not fit together, or the loss needs what the pairs do not have; on a CPU, a target
            outside the vocabulary, or a pair that reaches into another block.
        RuntimeError: the backend asked for is not available.
    """
    options = options or HeadOptions()
    _check(hidden, weight, targets, bias, options)
    pairs.check(loss, hidden.device, len(hidden))
    if loss.needs_log_sum_sq:
        options = replace(options, statistics=True)
    wanted = Wanted.of(hidden, weight, bias)
    if wanted.head and loss.separable and not general:
        run = _LinearPreference.apply
        if torch.compiler.is_compiling():
            run = head_operators.linear_preference if has_kernel(loss) else _outside_of_graphs
        total, losses, completion_logps, *tokens = run(hidden, weight, targets, bias, wanted, pairs, loss, options)
        return PreferenceOutput(total, losses, completion_logps, VocabScore(*tokens[:6]))
    tokens = linear_logprobs(hidden, weight, targets, bias, options)
    completion_logps = segment_sum(tokens.logps, pairs.cu_completions)
    losses = loss(pairs.pair_logps(completion_logps, loss=loss, tokens=tokens))
    return PreferenceOutput(losses.sum(), losses.detach(), completion_logps, tokens)


class _LinearLogprobs(torch.autograd.Function):
    """What the forward scored, ``G W`` and a single tile, the backward weighs; else it computes the tiles again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, wanted: Wanted, options):
        *out, score_weight, score = score_rows(hidden, weight, targets, bias, wanted, options, keep=True)
        ctx.wanted, ctx.options, ctx.dtypes = wanted, options, _dtypes(hidden, weight, bias)
        ctx.again = wanted.head and score is None
        rows = None if score is None else hidden
        ctx.save_for_backward(*((hidden, weight, targets, bias) if ctx.again else (score_weight, score, rows)))
        ctx.mark_non_differentiable(*(tensor for tensor in out[1:] if tensor is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        if ctx.again:
            grads = row_gradients(grad, *ctx.saved_tensors, ctx.wanted, ctx.options)
        else:
            grads = scored_gradients(grad, *ctx.saved_tensors, ctx.wanted, ctx.dtypes, _is_last_backward())
        grad_hidden, grad_weight, grad_bias = grads
        return grad_hidden, grad_weight, None, grad_bias, None, None


class _LinearPreference(torch.autograd.Function):
    """Trained head, separable loss: the gradients are finished in the forward and scaled in the backward.

    Where one tile holds all rows it is kept and the products of the weight's gradient are left to the backward, which
    spares an accumulator and its scaling.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, wanted: Wanted, pairs: Pairs, loss: Loss, options: HeadOptions):
        *out, g, score_weight, grad_weight, grad_bias, score = score_pair_blocks(
            hidden, weight, targets, bias, wanted, pairs, loss, options, keep=True
        )
        rows = None if score is None else hidden
        ctx.save_for_backward(g, score_weight, grad_weight, grad_bias, score, rows)
        ctx.wanted, ctx.dtypes = wanted, _dtypes(hidden, weight, bias)
        ctx.set_materialize_grads(False)
        _, losses, _, _, *statistics = out
        ctx.mark_non_differentiable(losses, *(tensor for tensor in statistics if tensor is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _, grad_completion_logps, grad_logps, *__):
        if grad_completion_logps is not None or grad_logps is not None:
            raise RuntimeError(head_operators.REFUSAL)
        g, score_weight, grad_weight, grad_bias, score, rows = ctx.saved_tensors
        if score is None:
            made = (g, score_weight, grad_weight, grad_bias)
            grads = finished_gradients(grad_loss, *made, ctx.dtypes, _is_last_backward())
        else:
            weighed = (grad_loss * g, score_weight, score, rows)
            grads = scored_gradients(*weighed, ctx.wanted, ctx.dtypes, _is_last_backward())
        grad_hidden, grad_weight, grad_bias = grads
        return grad_hidden, grad_weight, None, grad_bias, *(None,) * 4


def _is_last_backward() -> bool:
    """Whether what was saved may be written over: nobody keeps the graph for another backward."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


def _dtypes(*leaves: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if leaf is None else leaf.dtype for leaf in leaves)


def _outside_of_graphs(*arguments):
    """Losses that no operator carries break a graph here, and not at each line of the pass."""
    return torch.compiler.disable(_LinearPreference.apply)(*arguments)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (N, H) and weight (V, H) do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must have shape ({hidden.shape[0]},) in int64, not {tuple(targets.shape)} in {targets.dtype}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), not {tuple(bias.shape)}")
    if any(t is not None and t.device != hidden.device for t in (weight, targets, bias)):
        raise ValueError(f"weight, targets and bias must be on the device of hidden, {hidden.device}")
    if options.vocab_size is not None and not 0 < options.vocab_size <= weight.shape[0]:
        raise ValueError(f"vocab_size={options.vocab_size} is not within the {weight.shape[0]} rows of weight")
