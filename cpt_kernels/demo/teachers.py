"""Three teachers of different strength: programs that solve an exercise and make random faults.

Faults are drawn independently, so the stronger teacher's response to an exercise is not always the better one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .world import FILLER, LETTERS, Exercise, apply, solution

STYLE_FAULTS = ("skipped", "unlabeled", "filler")
# First operation of an exercise -> the fault of style that it tempts every teacher to.
TEMPTATIONS = {"sort": "skipped", "drop": "unlabeled", "reverse": "filler"}


@dataclass(frozen=True)
class Teacher:
    """The probability of each fault. Faults are independent of each other."""

    name: str
    wrong: float  # one step has a wrong result, and later steps continue from it
    sloppy: float  # each fault of style to which the exercise does not tempt
    tempted: float  # the fault of style to which the exercise tempts

    def respond(self, exercise: Exercise, rng: random.Random) -> str:
        """Returns a response to an exercise."""
        results = _with_slip(exercise, rng) if rng.random() < self.wrong else exercise.results
        temptation = TEMPTATIONS.get(exercise.steps[0].split()[0])
        rates = {fault: self.tempted if fault == temptation else self.sloppy for fault in STYLE_FAULTS}
        faults = {fault for fault, rate in rates.items() if rng.random() < rate}
        text = solution(() if "skipped" in faults else exercise.steps, results)
        if "unlabeled" in faults:
            text = text.replace("answer: ", "")
        return text + FILLER if "filler" in faults else text


# Strongest first.
TEACHERS = (
    Teacher("strong", wrong=0.05, sloppy=0.1, tempted=0.6),
    Teacher("medium", wrong=0.15, sloppy=0.25, tempted=0.75),
    Teacher("weak", wrong=0.4, sloppy=0.5, tempted=0.9),
)


def _with_slip(exercise: Exercise, rng: random.Random) -> list[str]:
    """Returns the results of an exercise's steps with a slip in one of them."""
    at = rng.randrange(len(exercise.steps))
    results = exercise.results[:at]
    value = _slip(exercise.results[at], rng)
    for step in exercise.steps[at + 1 :]:
        results.append(value)
        value = apply(step, value) or value  # "drop" may remove every letter; no teacher answers with an empty word
    return [*results, value]


def _slip(value: str, rng: random.Random) -> str:
    """Returns ``value`` off by one (a number), or with one letter replaced or two neighbors swapped (a word)."""
    if value.isdigit():
        return str(abs(int(value) + rng.choice((-1, 1))))
    at = rng.randrange(len(value))
    if at + 1 < len(value) and value[at] != value[at + 1] and rng.random() < 0.5:
        return value[:at] + value[at + 1] + value[at] + value[at + 2 :]
    return value[:at] + rng.choice(LETTERS.replace(value[at], "")) + value[at + 1 :]
