"""Computes metrics of held-out pairs from log-probs: reward accuracy and margins, over all pairs and by group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .win_rate import DEFAULT_BOOTSTRAP, Bootstrap, interval

if TYPE_CHECKING:
    import pyarrow as pa

    from ..data.preparation import PreparationReport
    from .drift import Drift

# Edges of the groups by tokens of chosen / tokens of rejected. GPT-4's answers are about four times as long as
# InstructGPT's.
RATIO_EDGES = (0.5, 0.8, 1.25, 2.0, 4.0)
LENGTH_EDGES = (32, 64, 128, 256, 512)  # edges of the groups by tokens of chosen
ALL = "all pairs"
BALANCED = "rewards/length_balanced"
MODEL_PAIR, LENGTH_RATIO, CHOSEN_LENGTH = "model pair", "chosen / rejected tokens", "chosen tokens"


@dataclass(frozen=True)
class Grouping:
    """A division of P pairs into groups, one for each value."""

    name: str
    values: list[str]
    codes: NDArray[np.int64]  # (P,) index into values


@dataclass(frozen=True)
class PairEvaluation:
    """P pairs scored by one or several models."""

    rows: NDArray[np.int64]  # (P,) row of each pair in the given data
    # (P, 2) positions of chosen and rejected among the completions of the row; 0 and 1 except in ranked rows
    completions: NDArray[np.int64]
    prompts: NDArray[np.uint64]  # (P,) hash of the prompt of each pair; intervals resample prompts
    lengths: NDArray[np.int64]  # (P, 2) tokens of chosen and rejected after truncation
    groupings: list[Grouping]  # by models, by length, and by the requested columns
    logps: dict[str, NDArray[np.float64]]  # model -> (P, 2) summed log-probs of chosen and rejected, in nats
    ref_logps: NDArray[np.float64] | None  # (P, 2) the same for the reference, or None without a reference
    beta: float  # factor of the rewards
    report: PreparationReport  # which rows of the data were used, truncated and dropped
    # rewards are of log-probs per token, as those of the loss that the models were trained with
    per_token: bool = False
    # "responses" or "text" -> model -> what training changed on their tokens, as far as it was measured
    drifts: dict[str, dict[str, Drift]] = field(default_factory=dict)

    def metrics(self, model: str) -> dict[str, NDArray[np.float64]]:
        """Returns the values of each metric for all pairs, (P,), by the trainer's name of the metric.

        An exact tie counts 1/2 in the accuracies, whereas the trainer logs it as 0. The two differ only while the
        policy equals its reference. Without a reference the reward is beta times the log-prob, as in training. Rewards
        are of sums over tokens, or of means where the loss takes means (``per_token``); log-probs are always sums.
        """
        logps = self.logps[model]
        rewards = self.beta * (logps if self.ref_logps is None else logps - self.ref_logps)
        if self.per_token:
            rewards = rewards / self.lengths
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "rewards/accuracies": (np.sign(margins) + 1) / 2,
            "rewards/margins": margins,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "logps/accuracies": (np.sign(logps[:, 0] - logps[:, 1]) + 1) / 2,
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }

    def summary(self, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> list[dict[str, Any]]:
        """Computes the mean of every metric for each model and each group that has pairs.

        Returns:
            A row for each model and group: ``model``, ``by``, ``value``, ``pairs``, ``prompts``, and every metric as
            ``{"mean", "low", "high"}`` with the ends of a bootstrap interval over prompts. The ends are None if there
            is one prompt, except for accuracies: their bounds give a wide interval. The row of all pairs also has
            ``rewards/length_balanced``, see `length_balanced`.
        """
        everything = Grouping(ALL, [ALL], np.zeros(len(self.rows), np.int64))
        metrics = {model: self.metrics(model) for model in self.logps}
        rows = []
        for grouping in (everything, *self.groupings):
            for code, value in enumerate(grouping.values):
                where = np.flatnonzero(grouping.codes == code)
                for model in metrics if len(where) else ():  # a bucket of lengths may be empty
                    prompts = self.prompts[where]
                    row = {"model": model, "by": grouping.name, "value": value}
                    row |= {"pairs": len(where), "prompts": len(np.unique(prompts))}
                    found = {name: values[where] for name, values in metrics[model].items()}
                    rows.append(row | _estimates(found, prompts, bootstrap))
                    if grouping is everything:
                        rows[-1][BALANCED] = self.length_balanced(found["rewards/margins"], bootstrap)
        return rows

    def length_balanced(self, margins: NDArray, bootstrap: Bootstrap) -> dict[str, float | None] | None:
        """Computes the accuracy over pairs of unequal length if either side were the longer one equally often.

        A model that prefers longer responses, or shorter ones, is at 1/2, however often the chosen one is longer.

        Returns:
            The mean of the accuracies over pairs with a longer chosen and over those with a longer rejected response,
            with its interval; None if one of the two has no pair.
        """
        sides = np.stack([self.lengths[:, 0] > self.lengths[:, 1], self.lengths[:, 0] < self.lengths[:, 1]])
        if not sides.any(axis=1).all():
            return None
        used = np.flatnonzero(sides.any(axis=0))
        weights = (sides / sides.sum(axis=1, keepdims=True)).sum(axis=0)[used]
        wins, prompts = (np.sign(margins[used]) + 1) / 2, self.prompts[used]
        bounds = (0, 1) if margins.any() else (-np.inf, np.inf)  # the reference itself ties on further pairs, too
        low, high = interval(wins, prompts=prompts, bootstrap=bootstrap, bounds=bounds, weights=weights).tolist()
        ends = {"low": None if np.isnan(low) else low, "high": None if np.isnan(high) else high}
        return {"mean": float(np.average(wins, weights=weights))} | ends

    def drift_summary(self, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> list[dict[str, Any]]:
        """Returns a row of `Drift.summary` for each model, on responses and on plain text as far as measured."""
        return [
            {"model": model, "on": on} | drift.summary(bootstrap)
            for on, of_models in self.drifts.items()
            for model, drift in of_models.items()
        ]

    def differences(self, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> list[dict[str, Any]]:
        """Computes the metrics of every further model minus those of the first, pair by pair, as `summary` does."""
        first, *others = self.logps
        base = self.metrics(first)
        rows = []
        for model in others:
            found = {name: values - base[name] for name, values in self.metrics(model).items()}
            rows.append({"model": model, "minus": first} | _estimates(found, self.prompts, bootstrap, shares=False))
        return rows

    def table(self) -> pa.Table:
        """Returns a row for each model and pair: its place in the data, groups, lengths, log-probs and metrics."""
        import pyarrow as pa

        shared = {
            "row": self.rows,
            "chosen": self.completions[:, 0],
            "rejected": self.completions[:, 1],
            **{grouping.name: np.array(grouping.values)[grouping.codes] for grouping in self.groupings},
            "chosen_tokens": self.lengths[:, 0],
            "rejected_tokens": self.lengths[:, 1],
        }
        if self.ref_logps is not None:
            shared |= {"ref_logps/chosen": self.ref_logps[:, 0], "ref_logps/rejected": self.ref_logps[:, 1]}
        parts = [{"model": [model] * len(self.rows)} | shared | self.metrics(model) for model in self.logps]
        return pa.concat_tables([pa.table(part) for part in parts])


def _estimates(
    values: dict[str, NDArray], prompts: NDArray, bootstrap: Bootstrap, shares: bool = True
) -> dict[str, dict[str, float | None]]:
    """Returns the mean and the interval of each metric.

    With ``shares``, accuracies are shares in [0, 1], else differences of shares in [-1, 1]. Their bounds widen an
    interval without spread, unless all margins are 0: the model is then the reference, or the two models are the same,
    and further pairs would tie as well.
    """
    bounded = {"rewards/accuracies", "logps/accuracies"}
    if not values["rewards/margins"].any():
        bounded = {"logps/accuracies"} if shares else set()
    upper = np.array([1 if name in bounded else np.inf for name in values])
    lower = np.where(np.isfinite(upper), 0 if shares else -1, -np.inf)
    columns = np.stack(list(values.values()), axis=1)
    ends = interval(columns, prompts=prompts, bootstrap=bootstrap, bounds=(lower, upper)).T.tolist()
    estimates = {}
    for (name, found), of_metric in zip(values.items(), ends):
        low, high = (None if np.isnan(end) else end for end in of_metric)  # JSON has no NaN
        estimates[name] = {"mean": float(found.mean()), "low": low, "high": high}
    return estimates
