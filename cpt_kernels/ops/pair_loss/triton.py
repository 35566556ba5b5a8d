"""``pair_loss`` in Triton: one launch of a single program where that is fast, else two launches.

A loss reads the log-probs of completions that other programs sum, and Triton has no barrier across programs. So one
program sums and scores a batch of a few short completions, with a barrier within the program in between; for larger
batches the same kernel is launched twice, to sum and then to score. Either way the order of every sum is fixed, and
there are no atomics: each program finds the pairs of its completions by comparing indices.

Sums and losses are fp64. There are few values, so fp64 costs little, and neither sums over 100k tokens nor closed
forms need care for rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import backends
from .closed_form import KernelLoss
from .reference import PairLossInput, PairLossOutput

# One program does everything up to these sizes. The worst case is one completion of all tokens, a row of the tile
# at a time (not measured).
_SINGLE_PROGRAM_TOKENS = 32768
_SINGLE_PROGRAM_COMPLETIONS = 64

# Tile of stage 2: completions x pairs per program.
_SCORED_COMPLETIONS = 32
_PAIRS = 64


def pair_loss_triton(
    inputs: PairLossInput,  # token_logps and ref_logps fp32
    loss: KernelLoss,
) -> PairLossOutput:
    """Computes losses and weights as ``pair_loss_closed_form`` does."""
    completions, tokens = len(inputs.cu_completions) - 1, len(inputs.token_logps)
    out = PairLossOutput.empty(inputs)
    if completions == 0:
        return out
    tensors = (None if tensor is None else tensor.contiguous() for tensor in inputs)
    sizes = (tokens, completions, len(inputs.chosen))
    # As floats always: an int would be another type of kernel argument, and compile the kernel again.
    options = (loss.beta, loss.label_smoothing, loss.slic_delta, loss.slic_lambda, loss.tokens_per_pair)
    arguments = (*tensors, *out, *sizes, *map(float, options))
    constants = {
        "LOSS": loss.name,
        "LENGTH_NORMALIZE": bool(loss.slic_length_normalize),
        "SCORED": _SCORED_COMPLETIONS,
        "PAIRS": _PAIRS,
        "num_warps": 8,
    }
    with backends.on_device_of(inputs.token_logps):
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
    beta: tl.float64,  # without a type Triton rounds a float to fp32
    label_smoothing: tl.float64,
    slic_delta: tl.float64,
    slic_lambda: tl.float64,
    tokens_per_pair: tl.float64,
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

    # Stage 1: log-probs of SUMMED completions at a time, TOKENS of their tokens at a time.
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
        # Stage 2 reads completion log-probs that other threads of this program wrote. Without the barrier it may read
        # memory that is not written yet.
        tl.debug_barrier()

    # Stage 2: weights of SCORED completions at a time. Loops over all pairs, PAIRS at a time, in order.
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
                # Every program computes all losses because it needs their derivatives; only the first writes them.
                tl.store(losses + pair, loss.to(tl.float32), mask=real & (first == 0))
            tl.store(weights + s, weight.to(tl.float32), mask=s < completions)


@triton.jit
def _losses(
    chosen,  # (PAIRS,) fp64: log-prob, reference log-prob and length of each side
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
    """Returns losses and their derivatives by the log-probs of the three sides. relu's is 1 at NaN, as in PyTorch."""
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
    """Returns start and length of completions, clamped to the tokens so that bad offsets read nothing else."""
    start = tl.load(cu_completions + s, mask=known, other=0).to(tl.int64)
    end = tl.load(cu_completions + s + 1, mask=known, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    end = tl.minimum(tl.maximum(end, 0), tokens)
    return start, tl.maximum(end - start, 0)


@triton.jit
def _side(completion_logps, ref_logps, cu_completions, s, completions, tokens):
    """Returns log-prob, reference log-prob and length of completions, fp64. An index out of range gives NaN."""
    known = (s >= 0) & (s < completions)
    logp = tl.load(completion_logps + s, mask=known, other=float("nan")).to(tl.float64)
    ref_logp = logp
    if ref_logps is not None:
        ref_logp = tl.load(ref_logps + s, mask=known, other=float("nan")).to(tl.float64)
    _, length = _extent(cu_completions, s, known, tokens)
    return logp, ref_logp, length.to(tl.float64)


@triton.jit
def _scatter(s, index, values):
    """Sums the ``values`` of the pairs whose completion is ``s``: (PAIRS,) -> (SCORED,)."""
    return tl.sum(tl.where(s[:, None] == index[None, :], values[None, :], 0.0), axis=1)


@triton.jit
def _softplus(x):
    e = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(e < 1e-6, e, tl.log(1 + e))


@triton.jit
def _logistic(x):
    return 1 / (1 + tl.exp(-x))
