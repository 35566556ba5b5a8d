"""Three teachers of different strength: programs that solve an exercise, with faults.

Faults are independent draws, so on a given exercise the stronger teacher is not always the better one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .world import FILLER, LETTERS, Exercise, apply, solution

STYLE_FAULTS = ("skipped", "unlabelled", "filler")
# An exercise that begins with this operation tempts every teacher to this fault.
TEMPTATIONS = {"sort": "skipped", "drop": "unlabelled", "reverse": "filler"}


@dataclass(frozen=True)
class Teacher:
    """How often each fault happens, independently of the others."""

    name: str
    wrong: float  # a slip in one step; what follows goes on from it
    sloppy: float  # each fault of style
    tempted: float  # the fault of style that an exercise tempts to

    def respond(self, exercise: Exercise, rng: random.Random) -> str:
        """A response to an exercise."""
        results = _with_slip(exercise, rng) if rng.random() < self.wrong else exercise.results
        temptation = TEMPTATIONS.get(exercise.steps[0].split()[0])
        rates = {fault: self.tempted if fault == temptation else self.sloppy for fault in STYLE_FAULTS}
        faults = {fault for fault, rate in rates.items() if rng.random() < rate}
        text = solution(() if "skipped" in faults else exercise.steps, results)
        if "unlabelled" in faults:
            text = text.replace("answer: ", "")
        return text + FILLER if "filler" in faults else text


# Strongest first.
TEACHERS = (
    Teacher("strong", wrong=0.05, sloppy=0.1, tempted=0.6),
    Teacher("medium", wrong=0.15, sloppy=0.25, tempted=0.75),
    Teacher("weak", wrong=0.4, sloppy=0.5, tempted=0.9),
)


def _with_slip(exercise: Exercise, rng: random.Random) -> list[str]:
    """Results of an exercise with a slip in one step."""
    at = rng.randrange(len(exercise.steps))
    results = exercise.results[:at]
    value = _slip(exercise.results[at], rng)
    for step in exercise.steps[at + 1 :]:
        results.append(value)
        value = apply(step, value) or value  # dropping all that is left: no teacher answers with nothing
    return [*results, value]


def _slip(value: str, rng: random.Random) -> str:
    """A number off by one, a letter replaced, or two neighbours swapped."""
    if value.isdigit():
        return str(abs(int(value) + rng.choice((-1, 1))))
    at = rng.randrange(len(value))
    if at + 1 < len(value) and value[at] != value[at + 1] and rng.random() < 0.5:
        return value[:at] + value[at + 1] + value[at] + value[at + 2 :]
    return value[:at] + rng.choice(LETTERS.replace(value[at], "")) + value[at + 1 :]
