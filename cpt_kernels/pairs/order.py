"""Parses the order of models (which is stronger) and the choice of pairs from text. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast, get_args

from ..errors import UserError

Kind = Literal["all", "adjacent", "base", "named"]


@dataclass(frozen=True)
class Which:
    """The choice of pairs.

    `all`: every two responses to a prompt. `adjacent`: two that follow each other in strength: among all ranked models,
    or with ratings, among the responses to the prompt. `base`: pairs with a response of the model `base` on one side.
    `named`: pairs whose (chosen, rejected) models are in `named`.
    """

    kind: Kind = "all"
    base: str = ""
    named: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(Kind)):
            raise UserError(f"the choice of pairs {self.kind!r} is unknown: choose one of {', '.join(kinds)}")
        if (self.kind == "base") != bool(self.base) or (self.kind == "named") != bool(self.named):
            raise UserError(
                "the choice of pairs 'base' needs `base`, 'named' needs `named`, and no other takes either; got"
                f" {self.kind!r}"
            )

    def models(self) -> list[str]:
        """Returns the models that the choice names."""
        return [self.base] if self.base else [name for pair in self.named for name in pair]


def parse_order(text: str) -> dict[str, float]:
    """Parses an order such as `"gpt4 > chatgpt = claude > td003"` into strengths: the number of ranks below each model.

    The text may hold several chains, separated by commas. Together they must rank every model.

    Raises:
        UserError: there is one model only, the order has a cycle, or the chains do not compare two of the models.
    """
    # Join models that are equally strong: each is represented by the first of its equals.
    chains = [
        [_split_names(tie, "=", text) for tie in _split_names(chain, ">", text)]
        for chain in _split_names(text, ",", text)
    ]
    models = dict.fromkeys(name for chain in chains for tie in chain for name in tie)
    alike = {name: name for name in models}  # model -> the first of its equals
    for tie in (tie for chain in chains for tie in chain):
        merged = {alike[name] for name in tie}
        first = next(name for name in models if name in merged)
        alike = {name: first if other in merged else other for name, other in alike.items()}
    if len(models) < 2:
        raise UserError(f"the order {text!r} names one model: name two or more, as in 'gpt4 > chatgpt > td003'")

    # Sort topologically, the weakest first. An order of all models has exactly one candidate at every step.
    weaker: dict[str, set[str]] = {first: set() for first in alike.values()}
    for chain in chains:
        for better, worse in pairwise(chain):
            weaker[alike[better[0]]].add(alike[worse[0]])
    tiers: list[str] = []  # worst first
    while weaker:
        lowest = [name for name, below in weaker.items() if not below - set(tiers)]
        if not lowest:
            raise UserError(f"the order {text!r} has a cycle: {' > '.join(_find_cycle(weaker, tiers))}")
        if len(lowest) > 1:
            raise UserError(
                f"the order {text!r} does not say which of {lowest[0]} and {lowest[1]} is stronger: put all models into"
                " one chain, with '=' between equal ones"
            )
        tiers.append(lowest[0])
        del weaker[lowest[0]]
    if len(tiers) < 2:
        raise UserError(f"the order {text!r} makes all models equal: put '>' between at least two of them")
    return {name: float(tiers.index(alike[name])) for name in models}


def parse_which(text: str) -> Which:
    """Parses `"all"`, `"adjacent"`, or named pairs such as `"gpt4 > td003, chatgpt > td003"`, chosen first."""
    if text in ("all", "adjacent"):
        return Which(cast("Kind", text))
    named = [_split_names(pair, ">", text) for pair in _split_names(text, ",", text)]
    if wrong := [pair for pair in named if len(pair) != 2 or pair[0] == pair[1]]:
        raise UserError(
            f"{' > '.join(wrong[0])} is not a pair of two models: give all, adjacent, or pairs as in"
            " 'gpt4 > text_davinci_003, chatgpt > text_davinci_003'"
        )
    return Which("named", named=tuple((better, worse) for better, worse in named))


def _split_names(text: str, separator: str, whole: str) -> list[str]:
    parts = [part.strip() for part in text.split(separator)]
    if not all(parts):
        raise UserError(f"{whole!r} lacks a model before or after {separator!r}")
    return parts


def _find_cycle(weaker: Mapping[str, set[str]], done: Sequence[str]) -> list[str]:
    path = [next(iter(weaker))]
    while path[-1] not in path[:-1]:
        path.append(next(name for name in weaker if name in weaker[path[-1]] - set(done)))
    return path[path.index(path[-1]) :]
