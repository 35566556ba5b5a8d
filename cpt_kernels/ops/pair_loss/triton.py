"""``pair_loss`` in Triton: one launch of a single program where that is fast, else two launches.

Losses need the log-probs of completions that other programs sum, and Triton has no barrier across programs. A batch of
a few short completions is therefore summed and scored by one program, with a barrier of its own in between; otherwise
the same kernel is launched once to sum and once to score. The order of every sum is fixed either way.

There are few numbers, so doubles cost nothing: sums of 100k tokens and closed forms need no care for rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import backends
from .reference import PairLossOutput

# One program does it all up to these sizes: some tens of microseconds at the worst, for one completion of all tokens.
_SINGLE_PROGRAM_TOKENS = 32768
_SINGLE_PROGRAM_COMPLETIONS = 64

_SCORED_COMPLETIONS = 32  # per program, against blocks of pairs
_PAIRS = 64


def pair_loss_triton(
    token_logps: Tensor,  # (N,) fp32
    cu_completions: Tensor,  # (S+1,) int32 or int64
    chosen: Tensor,  # (P,) int64, as the next two
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,  # (S,) fp32
    loss: str,
    tokens_per_pair: float,
    *,
    beta: float,
    label_smoothing: float,
    slic_delta: float,
    slic_lambda: float,
    slic_length_normalize: bool,
) -> PairLossOutput:
    """Losses and weights; arguments as ``pair_loss``, with every option of every built-in loss."""
    completions, tokens = len(cu_completions) - 1, len(token_logps)
    out = PairLossOutput(*(token_logps.new_empty(size) for size in (completions, len(chosen), completions)))
    if completions == 0:
        return out
    tensors = (
        None if tensor is None else tensor.contiguous()
        for tensor in (token_logps, cu_completions, chosen, rejected, targets, ref_logps)
    )
    sizes = (tokens, completions, len(chosen))
    # An integer would be another type of the kernel's.
    options = map(float, (beta, label_smoothing, slic_delta, slic_lambda, tokens_per_pair))
    arguments = (*tensors, *out, *sizes, *options)
    constants = {
        "LOSS": loss,
        "LENGTH_NORMALIZE": bool(slic_length_normalize),
        "SCORED": _SCORED_COMPLETIONS,
        "PAIRS": _PAIRS,
        "num_warps": 8,
    }
    with backends.on_device_of(token_logps):
        if tokens <= _SINGLE_PROGRAM_TOKENS and completions <= _SINGLE_PROGRAM_COMPLETIONS:
            _pair_loss_kernel[(1,)](*arguments, **constants, DO_SUMS=True, DO_LOSSES=True, SUMMED=16, TOKENS=256)
            return out
        summing = {"DO_SUMS": True, "DO_LOSSES": False, "SUMMED": 1, "TOKENS": 4096}
        _pair_loss_kernel[(completions,)](*arguments, **constants, **summing)
        scoring = {"DO_SUMS": False, "DO_LOSSES": True, "SUMMED": 1, "TOKENS": 1}
        grid = (triton.cdiv(completions, _SCORED_COMPLETIONS),)
        _pair_loss_kernel[grid](*arguments, **constants, **scoring)
    return out


@triton.jit
def _pair_loss_kernel(
    token_logps,  # (tokens,)
    cu_completions,  # (completions + 1,)
    chosen,  # (pairs,)
    rejected,  # (pairs,) or None
    targets,  # (pairs,) or None
    ref_logps,  # (completions,) or None
    completion_logps,  # (completions,)
    losses,  # (pairs,)
    weights,  # (completions,)
    tokens,
    completions,
    pairs,
    beta,
    label_smoothing,
    slic_delta,
    slic_lambda,
    tokens_per_pair,
    LOSS: tl.constexpr,
    LENGTH_NORMALIZE: tl.constexpr,
    DO_SUMS: tl.constexpr,
    DO_LOSSES: tl.constexpr,
    SUMMED: tl.constexpr,
    TOKENS: tl.constexpr,
    SCORED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)

    if DO_SUMS:
        for first in range(program * SUMMED, completions, programs * SUMMED):
            s = first + tl.arange(0, SUMMED)
            start, length = _extent(cu_completions, s, s < completions, tokens)
            total = tl.zeros([SUMMED, TOKENS], tl.float64)
            for offset in range(0, tl.max(length, axis=0), TOKENS):
                i = offset + tl.arange(0, TOKENS)[None, :]
                there = i < length[:, None]
                total += tl.load(token_logps + start[:, None] + i, mask=there, other=0.0).to(tl.float64)
            tl.store(completion_logps + s, tl.sum(total, axis=1).to(tl.float32), mask=s < completions)

    if DO_SUMS and DO_LOSSES:
        tl.debug_barrier()  # completion log-probs, written by some threads of this one program, are read by others

    if DO_LOSSES:
        for first in range(program * SCORED, completions, programs * SCORED):
            s = first + tl.arange(0, SCORED)
            weight = tl.zeros([SCORED], tl.float64)
            for first_pair in range(0, pairs, PAIRS):
                pair = first_pair + tl.arange(0, PAIRS)
                real = pair < pairs
                c = tl.load(chosen + pair, mask=real, other=-1)
                r, t = c, c
                if rejected is not None:
                    r = tl.load(rejected + pair, mask=real, other=-1)
                if targets is not None:
                    t = tl.load(targets + pair, mask=real, other=-1)
                loss, by_chosen, by_rejected, by_target = _losses(
                    *_side(completion_logps, ref_logps, cu_completions, c, completions, tokens),
                    *_side(completion_logps, ref_logps, cu_completions, r, completions, tokens),
                    *_side(completion_logps, ref_logps, cu_completions, t, completions, tokens),
                    beta,
                    label_smoothing,
                    slic_delta,
                    slic_lambda,
                    tokens_per_pair,
                    LOSS,
                    LENGTH_NORMALIZE,
                )
                weight += _scatter(s, c, by_chosen) + _scatter(s, r, by_rejected) + _scatter(s, t, by_target)
                # Every program computes the losses, as it needs their derivatives; the first one writes them.
                tl.store(losses + pair, loss.to(tl.float32), mask=real & (first == 0))
            tl.store(weights + s, weight.to(tl.float32), mask=s < completions)


@triton.jit
def _losses(
    chosen,  # (PAIRS,) fp64 log-probs, as the other sides'
    chosen_ref,
    chosen_length,
    rejected,
    rejected_ref,
    rejected_length,
    target,
    target_ref,
    target_length,
    beta,
    label_smoothing,
    slic_delta,
    slic_lambda,
    tokens_per_pair,
    LOSS: tl.constexpr,
    LENGTH_NORMALIZE: tl.constexpr,
):
    """The kernels' losses and their derivatives by the three log-probs; relu's is 1 at NaN, as in PyTorch."""
    zero = tl.zeros_like(chosen)
    h = (chosen - chosen_ref) - (rejected - rejected_ref)
    if LOSS == "sigmoid":
        loss = (1 - label_smoothing) * _softplus(-beta * h) + label_smoothing * _softplus(beta * h)
        slope = beta * (label_smoothing * _logistic(beta * h) - (1 - label_smoothing) * _logistic(-beta * h))
        return loss, slope, -slope, zero
    elif LOSS == "hinge":
        margin = 1 - beta * h
        slope = tl.where(margin <= 0, zero, -beta)
        return tl.where(margin <= 0, zero, margin), slope, -slope, zero
    elif LOSS == "ipo":
        h = (chosen - chosen_ref) / chosen_length - (rejected - rejected_ref) / rejected_length - 1 / (2 * beta)
        return h * h, 2 * h / chosen_length, -2 * h / rejected_length, zero
    elif LOSS == "slic":
        if not LENGTH_NORMALIZE:
            chosen_length, rejected_length, target_length = zero + 1, zero + 1, zero + 1
        margin = slic_delta - chosen / chosen_length + rejected / rejected_length
        active = tl.where(margin <= 0, zero, 1.0)
        loss = tl.where(margin <= 0, zero, margin) - slic_lambda * (target / target_length)
        return loss, -active / chosen_length, active / rejected_length, -slic_lambda / target_length
    else:
        tl.static_assert(LOSS == "sft")
        return -chosen / tokens_per_pair, (zero - 1) / tokens_per_pair, zero, zero


@triton.jit
def _extent(cu_completions, s, known, tokens):
    """Start and length of completions, kept inside the tokens whatever the caller passed; 0 if not ``known``."""
    start = tl.load(cu_completions + s, mask=known, other=0).to(tl.int64)
    end = tl.load(cu_completions + s + 1, mask=known, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.minimum(tl.maximum(end, 0), tokens)
    return start, tl.maximum(end - start, 0)


@triton.jit
def _side(completion_logps, ref_logps, cu_completions, s, completions, tokens):
    """Log-prob, reference log-prob and length of completions, fp64. NaN, not a read elsewhere, for unknown ones."""
    known = (s >= 0) & (s < completions)
    logp = tl.load(completion_logps + s, mask=known, other=float("nan")).to(tl.float64)
    ref_logp = logp
    if ref_logps is not None:
        ref_logp = tl.load(ref_logps + s, mask=known, other=float("nan")).to(tl.float64)
    _, length = _extent(cu_completions, s, known, tokens)
    return logp, ref_logp, length.to(tl.float64)


@triton.jit
def _scatter(s, index, values):
    """Sums of the ``values`` of pairs whose completion is ``s``: (PAIRS,) -> (SCORED,)."""
    return tl.sum(tl.where(s[:, None] == index[None, :], values[None, :], 0.0), axis=1)


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-6, e, tl.log(1 + e))


@triton.jit
def _logistic(x):
    return 1 / (1 + tl.exp(-x))
