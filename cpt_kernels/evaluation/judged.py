"""Judged outputs against a baseline's: win rate, length-controlled win rate, and the bias of the judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..pairs.build import factorize
from .judge import Verdicts
from .outputs import Comparisons, distinct_bigrams
from .win_rate import (
    DEFAULT_BOOTSTRAP,
    DEFAULT_LENGTH_PRIOR,
    Bootstrap,
    LengthPrior,
    interval,
    length_controlled_win_rate,
    win_rate,
)


@dataclass(frozen=True)
class OutputEvaluation:
    """Comparisons of one model with the baseline, and their verdicts.

    Raises:
        UserError: the judge gave no verdict at all.
    """

    comparisons: Comparisons
    verdicts: Verdicts

    def __post_init__(self) -> None:
        if not self.judged.any():
            reasons = ", ".join(f"{count} for {reason}" for reason, count in self.verdicts.failures.items())
            raise UserError(f"the judge compared no output of {self.comparisons.model} ({reasons})")

    @property
    def judged(self) -> NDArray[np.bool_]:
        """(n,) True for each comparison with a verdict."""
        return ~np.isnan(self.verdicts.preferences)

    def summary(
        self, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP, length_prior: LengthPrior = DEFAULT_LENGTH_PRIOR
    ) -> dict[str, Any]:
        """Computes rates with bootstrap intervals over prompts, mean lengths in characters, counts and position bias.

        The rates leave out comparisons without a verdict. ``length_controlled`` is None if all outputs are longer
        than the baseline's, or all are shorter. ``characters`` and ``baseline_characters`` are means over
        the judged comparisons, and ``longer`` is the share of them in which the output is the longer one.
        """
        pairs, judged = self.comparisons, self.judged
        # Rates, lengths and prompts of the judged comparisons.
        wins = self.verdicts.preferences[judged]
        lengths = np.array([len(text) for text in pairs.outputs])[judged]
        baseline_lengths = np.array([len(text) for text in pairs.baseline_outputs])[judged]
        prompts = factorize(pairs.prompts)[judged]
        distinct = distinct_bigrams(pairs.outputs, pairs.baseline_outputs)
        controlled = length_controlled_win_rate(
            wins, lengths, baseline_lengths, prompts=prompts, bootstrap=bootstrap, prior=length_prior
        )
        return {
            "model": pairs.model,
            "baseline": pairs.baseline,
            "win_rate": win_rate(wins, prompts=prompts, bootstrap=bootstrap)._asdict(),
            "length_controlled": None if controlled is None else controlled._asdict(),
            "prompts": len(np.unique(prompts)),
            "wins": int((wins > 0.5).sum()),
            "ties": int((wins == 0.5).sum()),
            "losses": int((wins < 0.5).sum()),
            "characters": float(lengths.mean()),
            "baseline_characters": float(baseline_lengths.mean()),
            "longer": float((lengths > baseline_lengths).mean()),
            **dict(zip(("distinct_bigrams", "baseline_distinct_bigrams"), distinct)),
            "first_rate": self.verdicts.first_rate(),
            "consistency": self.verdicts.consistency(),
            "identical": self.verdicts.identical,
            "not_judged": int((~judged).sum()),
            "failures": dict(self.verdicts.failures),
            "empty_outputs": sum(not text.strip() for text in pairs.outputs),
            "empty_baseline_outputs": sum(not text.strip() for text in pairs.baseline_outputs),
            "without_baseline": pairs.without_baseline,
            "without_output": pairs.without_output,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each comparison: its texts, its preference (None without a verdict), and that of each order
        that was asked."""
        pairs, rows = self.comparisons, []
        for i, preference in enumerate(self.verdicts.preferences.tolist()):
            # JSON has no NaN.
            orders = [None if np.isnan(value) else value for value in self.verdicts.orders[i].tolist()]
            rows.append(
                {
                    "prompt": pairs.prompts[i],
                    "model": pairs.model,
                    "baseline": pairs.baseline,
                    "preference": None if np.isnan(preference) else preference,
                    "preference_in_each_order": orders,
                    "output": pairs.outputs[i],
                    "baseline_output": pairs.baseline_outputs[i],
                }
            )
        return rows

    def by_prompt(self) -> dict[str, float]:
        """Returns prompt -> mean preference over its comparisons with a verdict."""
        sums, counts = Counter[str](), Counter[str]()
        for prompt, preference, judged in zip(self.comparisons.prompts, self.verdicts.preferences, self.judged):
            if judged:
                sums[prompt] += preference
                counts[prompt] += 1
        return {prompt: float(sums[prompt] / count) for prompt, count in counts.items()}


def win_rate_differences(
    evaluations: Sequence[OutputEvaluation], bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> list[dict[str, Any]]:
    """Computes the win rate of every further model minus that of the first, over the prompts on which both were
    judged."""
    first, *others = ((each.comparisons.model, each.by_prompt()) for each in evaluations)
    rows = []
    for model, preferences in others:
        values = np.array([value - first[1][prompt] for prompt, value in preferences.items() if prompt in first[1]])
        row = {"model": model, "minus": first[0], "prompts": len(values)}
        if len(values):  # two models may have no judged prompt in common
            low, high = interval(values, bootstrap=bootstrap, bounds=(-1, 1))
            row["win_rate"] = {"mean": float(values.mean()), "low": float(low), "high": float(high)}
            rows.append(row)
    return rows
