"""Findings of the experiment: win rates and shares of every arm, differences between arms, and sentences on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..evaluation.win_rate import WinRate, interval, win_rate
from .arms import ARMS
from .experiment import DECODINGS, Result, SeedResult
from .judge import Verdict

# (first arm, second arm): by the paper's results the first arm's win rate is above the second's.
_EXPECTED = (
    ("dpo-easy", "sft"),
    ("slic-easy", "sft"),
    ("dpo-easy", "slic-easy"),
    ("dpo-easy-to-hard", "dpo-easy"),
    ("dpo-easy-to-hard", "dpo-hard-to-easy"),
)
# Name of a column in tables -> criterion of the judge, a field of Verdict.
SHARES = {"right": "exact", "steps": "steps", "format": "format", "brief": "brief"}


class Summary(NamedTuple):
    """One model or teacher over all seeds."""

    title: str
    rates: dict[str, WinRate]  # decoding -> win rate against the medium teacher; a teacher is only sampled
    by_seed: list[float]  # win rates of the sampled responses
    shares: dict[str, dict[str, float]]  # decoding -> criterion of the judge -> share of responses
    speed: float | None  # tokens per second while training; None for teachers and the start model
    found: int  # completions whose reference log-probs were in the cache
    scored: int  # completions that the reference had to score

    @property
    def cached(self) -> float | None:
        """Share of the reference log-probs that were in the cache; ``None`` without a reference."""
        return self.found / (self.found + self.scored) if self.found + self.scored else None


class Comparison(NamedTuple):
    """Win rate of the first arm minus that of the second, on the same prompts."""

    first: str
    second: str
    differences: dict[str, tuple[float, float, float]]  # decoding -> mean, low, high; the interval is over prompts
    by_seed: list[float]  # mean differences of the sampled responses

    @property
    def conclusion(self) -> str:
        """Whether the interval of the sampled responses agrees with the paper."""
        _, low, high = self.differences["sampled"]
        if low > 0:
            return "as expected"
        return "against expectation" if high < 0 else "no difference that so few prompts can show"


@dataclass(frozen=True)
class Findings:
    """Summaries and comparisons over all seeds."""

    summaries: dict[str, Summary]  # teachers, start model and arms, by name
    comparisons: list[Comparison]  # of the pairs of arms in _EXPECTED that were both run

    def sentences(self) -> list[str]:
        """Returns the findings as sentences, computed from the numbers."""
        found = []
        for comparison in self.comparisons:
            sampled, greedy = (_points(comparison.differences[decoding]) for decoding in ("sampled", "greedy"))
            if len(comparison.by_seed) > 1:
                sampled += f", by seed {', '.join(f'{100 * value:+.1f}' for value in comparison.by_seed)}"
            arms = f"{comparison.first} against {comparison.second}"
            found.append(f"{arms}: {sampled}; greedily {greedy}: {comparison.conclusion}.")
        # DPO and SFT saw the same responses of the strong teacher: compare both with the teacher itself.
        compared = [self.summaries[name] for name in ("sft", "dpo-easy") if name in self.summaries]
        for summary in compared:
            gap = 100 * (summary.rates["sampled"].rate - self.summaries["strong"].rates["sampled"].rate)
            side = "above" if gap > 0 else "below"
            found.append(f"{summary.title} is {abs(gap):.1f} points {side} the strong teacher, whose responses it saw.")
        if len(compared) == 2:
            sft, dpo = (summary.shares["greedy"] for summary in compared)
            changes = [f"{name} {100 * (dpo[key] - sft[key]):+.1f}" for name, key in SHARES.items()]
            found.append(f"DPO easy against SFT continued, greedily, in points of responses: {', '.join(changes)}.")
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the summaries and comparisons as JSON-serializable dictionaries."""
        return {
            "results": {
                name: summary._asdict() | {"rates": {key: rate._asdict() for key, rate in summary.rates.items()}}
                for name, summary in self.summaries.items()
            },
            "comparisons": [each._asdict() | {"conclusion": each.conclusion} for each in self.comparisons],
        }


def find(results: Sequence[SeedResult]) -> Findings:
    """Computes the findings of all seeds together: means are over the prompts of all seeds."""
    groups = {name: (f"{name} teacher", [each.teachers[name] for each in results]) for name in results[0].teachers}
    groups["start"] = ("SFT (start)", [each.start for each in results])
    groups |= {name: (ARMS[name].title, [each.arms[name] for each in results]) for name in results[0].arms}
    return Findings(
        {name: _summarize_seeds(*group) for name, group in groups.items()},
        [_compare(groups[first], groups[second]) for first, second in _EXPECTED if {first, second} <= groups.keys()],
    )


def _summarize_seeds(title: str, of_seeds: Sequence[Result]) -> Summary:
    decodings = list(of_seeds[0].responses)
    trained = [result.training for result in of_seeds if result.training is not None]
    return Summary(
        title,
        {decoding: win_rate(_wins(of_seeds, decoding)) for decoding in decodings},
        [float(result.responses["sampled"].wins.mean()) for result in of_seeds],
        {
            decoding: {
                name: float(np.mean([result.responses[decoding].share(name) for result in of_seeds]))
                for name in Verdict._fields
            }
            for decoding in decodings
        },
        float(np.mean([each.tokens_per_second for each in trained])) if trained else None,
        sum(each.found for each in trained),
        sum(each.scored for each in trained),
    )


def _compare(first: tuple[str, Sequence[Result]], second: tuple[str, Sequence[Result]]) -> Comparison:
    differences = {name: _wins(first[1], name) - _wins(second[1], name) for name in DECODINGS}
    return Comparison(
        first[0],
        second[0],
        {name: (float(values.mean()), *interval(values).tolist()) for name, values in differences.items()},
        [float((_wins([a], "sampled") - _wins([b], "sampled")).mean()) for a, b in zip(first[1], second[1])],
    )


def _wins(of_seeds: Sequence[Result], decoding: str) -> NDArray[np.float64]:
    return np.concatenate([result.responses[decoding].wins for result in of_seeds])


def _points(difference: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"
