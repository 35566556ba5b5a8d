"""The judge: a program that compares two responses. Training never sees it."""

from __future__ import annotations

import re
from typing import NamedTuple

from .world import LETTERS, OPERATIONS, Exercise

_VALUE = rf"[{LETTERS}]+|\d+"
_PART = re.compile(rf"((?:{'|'.join(OPERATIONS)})(?: [{LETTERS}])?|answer): ({_VALUE})")
_BARE = re.compile(rf"\b({_VALUE})\b")


class Verdict(NamedTuple):
    """What is right about a response, the most important first."""

    exact: bool  # one answer, and the right one
    steps: bool  # every step is shown, with its right result
    format: bool  # the answer stands as "answer: ... ."
    brief: bool  # and nothing else stands there

    @property
    def rank(self) -> tuple[bool, int]:
        """A right answer beats a wrong one; between two right or two wrong ones style decides."""
        return self.exact, self.steps + self.format + self.brief


def judge(prompt: str, response: str) -> Verdict:
    """Look at one response."""
    exercise = Exercise.parse(prompt)
    parts = _PART.findall(response)
    rest = _PART.sub("", response)
    shown = [part for part in parts if part[0] != "answer"]
    answers = [value for label, value in parts if label == "answer"] + _BARE.findall(rest)
    return Verdict(
        exact=answers == exercise.results[-1:],
        steps=shown == list(zip(exercise.steps, exercise.results)),
        format=re.search(rf"answer: (?:{_VALUE})\.", response) is not None,
        brief=len(answers) == 1 and len(shown) <= len(exercise.steps) and not re.search(r"\w", _BARE.sub("", rest)),
    )


def prefer(prompt: str, output_1: str, output_2: str) -> float:
    """1 where the first output wins, 0 where the second does, 1/2 for a tie."""
    first, second = judge(prompt, output_1).rank, judge(prompt, output_2).rank
    return 0.5 if first == second else float(first > second)
