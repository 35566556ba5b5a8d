"""Scores how difficult preference pairs are for a model: folds, measures, averages and their agreement.

A pair is difficult if a model that was trained on other pairs does not prefer its chosen side (Gao et al., arXiv
2502.09650). The pairs are split into folds by prompt; a run trains on all folds but one, and scores that one. Each seed
splits the pairs anew, so every pair gets one score per seed, never from a run that was trained on its prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from ..losses import LossOptions, PairLogps


class MeasuredPairs(NamedTuple):
    """Summed log-probs of P pairs in nats, (P, 2) of chosen and rejected, and what a measure needs besides."""

    logps: NDArray[np.float64]
    ref_logps: NDArray[np.float64]
    lengths: NDArray[np.int64]  # (P, 2) tokens
    options: LossOptions


def split_folds(prompts: NDArray[np.uint64], folds: int, seed: int) -> NDArray[np.int64]:
    """Returns (P,) the fold of each pair: prompts in random order, in folds of equal numbers of prompts.

    Args:
        prompts: (P,) hash of the prompt of each pair.

    Raises:
        UserError: there are fewer prompts than folds.
    """
    unique, codes = np.unique(prompts, return_inverse=True)
    if len(unique) < folds:
        few = f"folds={folds} needs as many different prompts, but the data has {len(unique)}"
        raise UserError(f"{few}: add prompts or lower it")
    return np.random.default_rng(seed).permutation(len(unique))[codes.reshape(-1)] * folds // len(unique)


def _loss(pairs: MeasuredPairs) -> NDArray[np.float64]:
    loss = pairs.options.build_loss()
    if not loss.needs_rejected or not loss.separable or loss.needs_tails or loss.needs_log_sum_sq or loss.needs_gap:
        raise UserError(f"loss '{loss.name}' needs more than the log-probs of single pairs: set --measure margin")
    values = (torch.from_numpy(side.astype(np.float64)) for sides in pairs[:3] for side in sides.T)
    chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length = values
    lengths = chosen_length, rejected_length, chosen_length
    tokens_per_pair = float(chosen_length.mean())
    return loss(PairLogps(chosen, rejected, chosen, *lengths, ref_chosen, ref_rejected, tokens_per_pair)).numpy()


def _minus_margin(pairs: MeasuredPairs, logps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns (P,) the reward of rejected minus that of chosen; rewards are beta times ``logps``."""
    per_token = pairs.options.build_loss().per_token
    return pairs.options.beta * np.diff(logps / pairs.lengths if per_token else logps)[:, 0]


# Name -> function of pairs that a run held out, or of untrained ones, to (P,) difficulties; larger is harder.
MEASURES: dict[str, Callable[[MeasuredPairs], NDArray[np.float64]]] = {
    "loss": _loss,
    "margin": lambda pairs: _minus_margin(pairs, pairs.logps - pairs.ref_logps),
    "reference-free": lambda pairs: _minus_margin(pairs, pairs.logps),
}
UNTRAINED: dict[str, Callable[[MeasuredPairs], NDArray[np.float64]]] = {
    "reference-margin": lambda pairs: np.diff(pairs.ref_logps)[:, 0],
    "log-ratio": lambda pairs: np.diff(pairs.ref_logps / pairs.lengths)[:, 0],
}


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float, float]:
    """Returns Spearman's rank correlation of (P,) values, and the ends of its 95 % interval.

    The interval is Fisher's with the standard error of Bonett and Wright (2000), sqrt((1 + r^2 / 2) / (P - 3)).
    """
    value = float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])
    if len(one) < 4 or not abs(value) < 1:
        return value, np.nan, np.nan
    width = 1.959964 * np.sqrt((1 + value**2 / 2) / (len(one) - 3))
    low, high = np.tanh(np.arctanh(value) + np.array([-width, width]))
    return value, float(low), float(high)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ranks, in which equal values share their mean rank."""
    _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes.reshape(-1)]
