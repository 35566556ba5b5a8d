"""The judge: a program that compares two responses to an exercise. Training never uses it."""

from __future__ import annotations

import re
from typing import NamedTuple

from .world import LETTERS, OPERATIONS, Exercise

_VALUE = rf"[{LETTERS}]+|\d+"
_PART = re.compile(rf"((?:{'|'.join(OPERATIONS)})(?: [{LETTERS}])?|answer): ({_VALUE})")
_BARE = re.compile(rf"\b({_VALUE})\b")


class Verdict(NamedTuple):
    """The criteria that a response meets, the most important first."""

    exact: bool  # the response gives exactly one answer, the right one
    steps: bool  # every step is shown with its right result, in order
    format: bool  # the answer is written as "answer: ... ."
    brief: bool  # the response has no further text

    @property
    def rank(self) -> tuple[bool, int]:
        """Sort key: a right answer beats a wrong one; the number of style criteria breaks ties."""
        return self.exact, self.steps + self.format + self.brief


def judge(prompt: str, response: str) -> Verdict:
    """Returns the verdict on one response."""
    exercise = Exercise.parse(prompt)
    # Labeled parts ("sort: abc", "answer: abc") first; any value outside of them counts as another answer.
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
    """Returns 1 if the first response wins, 0 if the second does, and 1/2 for a tie."""
    first, second = judge(prompt, output_1).rank, judge(prompt, output_2).rank
    return 0.5 if first == second else float(first > second)
