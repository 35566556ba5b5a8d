"""Which pair is drawn next: the data curriculum of arXiv 2310.02263, from easy pairs to hard ones. Pure numpy.

Rows belong to levels, 0 the easiest to L-1 the hardest. At progress t of training a schedule gives a place
alpha(t) in [0, 1] between the two ends, and each row is drawn from one of the two levels next to alpha (L - 1): with
L = 2 from the hard level with probability alpha, from the easy one otherwise, which is the paper's rule.

An epoch is as many draws as there are rows in the levels. Each level is a shuffled deck of its own: every row of it is
drawn once before any is drawn again, also from one epoch to the next.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

SCHEDULES = ("linear", "reversed", "constant", "staged", "none")
PAIR_COLUMNS = ("chosen_model", "rejected_model")
NO_LEVEL = -1
PLACE = "curriculum_place"  # what a drawn row brings along, see Curriculum.places

Keys = list[str] | NDArray[np.float64]  # of rows: model pairs, or scores, the larger the harder
_WITH_PROGRESS = ("linear", "reversed", "staged")
_PERCENTILES = 100  # levels of a column that is named without a number of levels
_WINDOW = 0.2  # share of these levels that a draw is from


@dataclass(frozen=True)
class Curriculum:
    """What is asked for, before any data is seen.

    Attributes:
        levels: model pairs ``chosen>rejected`` from easy to hard, by the columns ``chosen_model`` and
            ``rejected_model``; or a number of quantiles of ``column``; or the name of a column, whose percentiles are
            then the levels, and a draw is from a window of 20 of them.
        schedule: ``linear``: alpha grows from 0 to 1 over ``epochs``, and stays there. ``reversed``: 1 - alpha.
            ``staged``: one level after another, each for its share of the rows. ``constant``: a fixed mix, ``shares``.
            ``none``: every row once an epoch, in random order, whatever its level.
        column: what ``levels`` quantiles are of; default ``gap``.
        easy: the end of the column that is easy, ``high`` or ``low``; default high for ``gap``, low for any other.
        shares: of each level in the constant mix; default equal.
        epochs: length of the schedule; default the first epoch, or the run where that is shorter or reads a stream
            (then a run that is resumed with another ``max_steps`` goes on by another schedule).
        buffer: rows of a stream that are held, all levels together; default 4096.
    """

    levels: tuple[str, ...] | int | str
    schedule: str = "linear"
    column: str | None = None
    easy: str | None = None
    shares: tuple[float, ...] | None = None
    epochs: float | None = None
    buffer: int | None = None

    @classmethod
    def parse(cls, option: Mapping[str, Any] | str) -> Curriculum:
        """The curriculum that a mapping, or its JSON, describes.

        Raises:
            UserError: an unknown key or value, or keys that do not go together; the message names the key.
        """
        if isinstance(option, str):
            try:
                option = json.loads(option)
            except json.JSONDecodeError as error:
                raise UserError(f"curriculum={option!r} is not a JSON object: {error}") from None
        if not isinstance(option, Mapping):
            raise UserError(f"curriculum={option!r} is not a mapping such as {{schedule: linear, levels: 2}}")
        known = [f.name for f in fields(cls)]
        if unknown := [str(key) for key in option if key not in known]:
            raise UserError(f"curriculum has no key {unknown[0]!r}: its keys are {', '.join(known)}")
        if option.get("levels") is None:
            raise UserError("curriculum needs levels: model pairs, a number of quantiles of gap, or a column")
        sequences = {key: tuple(value) for key, value in option.items() if isinstance(value, list)}
        return cls(**{**option, **sequences})

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"curriculum: schedule={self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        if isinstance(self.levels, tuple):
            object.__setattr__(self, "levels", tuple(map(_parse_pair, self.levels)))
            if twice := [pair for pair, count in Counter(self.levels).items() if count > 1]:
                raise UserError(f"curriculum: levels names {twice[0]} twice")
        elif not (_is_int(self.levels) and self.levels > 1) and not (
            self.is_continuous and self.levels and ">" not in self.levels
        ):
            raise UserError(
                f"curriculum: levels={self.levels!r} is neither a list of model pairs, nor a number of quantiles (2 or"
                " more), nor the name of a column"
            )
        if self.levels == ():
            raise UserError("curriculum: levels is an empty list")
        if self.column is not None and not (_is_int(self.levels) and isinstance(self.column, str)):
            raise UserError("curriculum: column names what a number of levels are quantiles of; leave it out")
        if self.easy is not None and isinstance(self.levels, tuple):
            raise UserError("curriculum: easy has no effect on model pairs, which stand from easy to hard")
        if self.easy not in (None, "high", "low"):
            raise UserError(f"curriculum: easy={self.easy!r} is neither high nor low")
        if self.epochs is not None and self.schedule not in _WITH_PROGRESS:
            raise UserError(f"curriculum: epochs has no effect with schedule={self.schedule}: leave it out")
        if self.epochs is not None and not (_is_number(self.epochs) and self.epochs > 0):
            raise UserError(f"curriculum: epochs={self.epochs!r} must be a positive number")
        if self.buffer is not None and not (_is_int(self.buffer) and self.buffer > 0):
            raise UserError(f"curriculum: buffer={self.buffer!r} must be a positive whole number")
        self._check_shares()

    def _check_shares(self) -> None:
        if self.shares is None:
            return
        if self.schedule != "constant" or isinstance(self.levels, str):
            raise UserError("curriculum: shares is the mix of schedule=constant over a list or number of levels")
        levels = len(self.levels) if isinstance(self.levels, tuple) else self.levels
        if not isinstance(self.shares, tuple) or len(self.shares) != levels:
            raise UserError(f"curriculum: shares={self.shares!r} must be {levels} numbers, one for each level")
        if not all(_is_number(share) and share >= 0 for share in self.shares) or sum(self.shares) <= 0:
            raise UserError(f"curriculum: shares={list(self.shares)} must be numbers from 0 on, not all of them 0")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the levels are read from."""
        if isinstance(self.levels, tuple):
            return PAIR_COLUMNS
        return (self.levels if isinstance(self.levels, str) else self.column or "gap",)

    @property
    def is_continuous(self) -> bool:
        """Whether the levels are percentiles of a column."""
        return isinstance(self.levels, str)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is logged: the share of each level, or the mean place on a scale of percentiles, 0 to 1."""
        if self.is_continuous:
            return (f"curriculum/{self.levels}",)
        names = self.levels if isinstance(self.levels, tuple) else _quantiles(self.columns[0], self.levels)
        return tuple(f"curriculum/{name}" for name in names)

    def places(self, levels: int) -> list[float]:
        """(L,) what a row of each level brings along to be logged: the level's number, or place between 0 and 1."""
        return [level / max(levels - 1, 1) if self.is_continuous else level for level in range(levels)]

    def check_columns(self, present: Iterable[str]) -> None:
        """Raise ValueError unless the data has what the levels are read from."""
        present = set(present)
        if missing := [name for name in self.columns if name not in present]:
            raise UserError(
                f"curriculum reads the column {missing[0]}, but the data has the columns {sorted(present)}; those that"
                " `cpt pairs` writes without --grouped are chosen_model, rejected_model and gap"
            )

    def choose(self, progress: NDArray, uniform: NDArray, sizes: NDArray) -> NDArray[np.int64]:
        """The level of each draw, (N,); not for ``none``, which does not choose.

        Args:
            progress: (N,) progress t of training, 1 where the schedule ends.
            uniform: (N,) random numbers from [0, 1).
            sizes: (L,) rows of each level.
        """
        count = len(sizes)
        t = np.clip(progress, 0.0, 1.0)
        if self.schedule == "constant":
            return _find(uniform, self.shares or np.ones(count))
        if self.schedule == "staged":
            return _find(t, sizes)
        alpha = 1.0 - t if self.schedule == "reversed" else t
        # With a width of 1: floor(alpha (L-1) + u), the level above with the probability of the remainder.
        width = max(1.0, _WINDOW * count) if self.is_continuous else 1.0
        place = np.abs(alpha * (count - 1) + 0.5 + width * (uniform - 0.5))
        place = np.where(place > count, 2 * count - place, place)  # a wide window is mirrored at both ends
        return np.minimum(np.floor(place).astype(np.int64), count - 1)


@dataclass(frozen=True)
class Levels:
    """The levels of data that was seen.

    Attributes:
        names: (L,) from easy to hard.
        pairs: model pair -> level, where levels are model pairs.
        cuts: (L-1,) hardest score of each level but the last, where levels are by a column.
    """

    names: tuple[str, ...]
    pairs: Mapping[str, int]
    cuts: NDArray[np.float64]

    def of(self, keys: Keys) -> NDArray[np.int64]:
        """(rows,) level of each row, ``NO_LEVEL`` for a model pair that is in none."""
        if isinstance(keys, list):
            return np.array([self.pairs.get(key, NO_LEVEL) for key in keys], dtype=np.int64)
        return np.searchsorted(self.cuts, keys, side="left")


def read_keys(curriculum: Curriculum, columns: Sequence[Sequence], rows: Sequence[int]) -> Keys:
    """What decides the level of each row: its model pair, or its score, the larger the harder.

    Args:
        columns: values of ``curriculum.columns``.
        rows: their numbers in the source, for the message.

    Raises:
        UserError: a value is missing or of the wrong type; the message names column and row.
    """
    by_pair = isinstance(curriculum.levels, tuple)
    for name, values in zip(curriculum.columns, columns):
        for row, value in zip(rows, values):
            if not (isinstance(value, str) if by_pair else _is_number(value)):
                hint = "; a row of several pairs is in no one level" if isinstance(value, list) else ""
                kind = "the name of a model" if by_pair else "a number"
                raise UserError(f"curriculum: {name} of row {row} is {value!r}, not {kind}{hint}")
    if by_pair:
        pairs = {pair: ">".join(pair) for pair in set(zip(*columns))}  # one text, not one for each row
        return [pairs[pair] for pair in zip(*columns)]
    easy = curriculum.easy or ("high" if curriculum.columns[0] == "gap" else "low")
    return np.asarray(columns[0], dtype=np.float64) * (-1.0 if easy == "high" else 1.0)


def find_levels(curriculum: Curriculum, keys: Keys) -> Levels:
    """The levels of the curriculum in data with these keys, or in a stream that starts with them.

    Equal scores are of one level, by their mean rank.

    Raises:
        UserError: equal scores leave a quantile without rows, or there are no rows.
    """
    if isinstance(curriculum.levels, tuple):
        return Levels(curriculum.levels, {pair: i for i, pair in enumerate(curriculum.levels)}, np.zeros(0))
    name = curriculum.columns[0]
    if not len(keys):
        raise UserError(f"curriculum: there is no row to find levels of {name} in")
    values, counts = np.unique(keys, return_counts=True)
    mean_rank = (np.cumsum(counts) - counts / 2) / counts.sum()
    wanted = _PERCENTILES if curriculum.is_continuous else int(curriculum.levels)
    level = _parts(mean_rank, wanted)
    used = np.unique(level)
    if not curriculum.is_continuous and len(used) < wanted:
        empty = min(set(range(wanted)).difference(used.tolist())) + 1
        possible = next(n for n in range(wanted - 1, 0, -1) if len(np.unique(_parts(mean_rank, n))) == n)
        mend = f"set levels to {possible} at most" if possible > 1 else "they make no levels"
        raise UserError(
            f"curriculum: quantile {empty} of {wanted} of the column {name} has no row, as {counts.sum()} rows have"
            f" {len(values)} different values: {mend}"
        )
    cuts = values[np.flatnonzero(np.diff(level))]
    return Levels(_quantiles(name, len(used)), {}, cuts)


class Draws:
    """The rows that a curriculum draws of data of known size: a pure function of the data, the seed and the epoch.

    Args:
        curriculum: what is asked for.
        keys: of the rows, see :func:`read_keys`.
        seed: of choice and order.

    Attributes:
        levels: the levels found; ``sizes`` (L,) their rows.
        level: (rows,) level of each row; ``places``: what a row brings along, see :meth:`Curriculum.places`.
        epochs: length of the schedule.

    Raises:
        UserError: a level without rows.
    """

    def __init__(self, curriculum: Curriculum, keys: Keys, seed: int) -> None:
        self.curriculum, self.seed = curriculum, seed
        self.levels = find_levels(curriculum, keys)
        self.level = self.levels.of(keys)
        self.sizes = np.bincount(self.level[self.level >= 0], minlength=len(self.levels.names))
        places = [*curriculum.places(len(self.sizes)), None]  # no level is -1
        self.places = [places[level] for level in self.level]
        self._others = Counter(key for key, level in zip(keys, self.level) if level < 0)
        check_levels(self.levels, self.sizes, self._others)
        self.epochs = curriculum.epochs or 1.0
        in_levels = [np.flatnonzero(self.level == number) for number in range(len(self.sizes))]
        self._decks = [np.flatnonzero(self.level >= 0)] if curriculum.schedule == "none" else in_levels
        self._dealt = [np.zeros(len(self._decks), dtype=np.int64)]  # cards of each deck before each epoch

    def __len__(self) -> int:
        """Draws of an epoch."""
        return int(self.sizes.sum())

    def end_with_run(self, epochs: float) -> None:
        """Let the schedule end with a run of less than one epoch, unless its length was given."""
        self.epochs = self.curriculum.epochs or min(1.0, epochs) or 1.0
        del self._dealt[1:]

    def epoch(self, number: int) -> NDArray[np.int64]:
        """(draws,) the rows of an epoch, in order."""
        while len(self._dealt) <= number:
            decks = self._choose(len(self._dealt) - 1)
            self._dealt.append(self._dealt[-1] + np.bincount(decks, minlength=len(self._decks)))
        decks = self._choose(number)
        rows = np.empty(len(self), dtype=np.int64)
        for deck in range(len(self._decks)):
            places = np.flatnonzero(decks == deck)
            rows[places] = self._deal(deck, int(self._dealt[number][deck]), len(places))
        return rows

    def report(self, times: NDArray[np.int64]) -> list[str]:
        """Lines of text for the log; ``times`` (rows,) is how often each row is drawn."""
        schedule = self.curriculum.schedule
        over = f" over {self.epochs:.3g} epochs" if schedule in _WITH_PROGRESS else ""
        lines = [f"curriculum, {schedule}{over}: an epoch is {len(self)} draws; levels from easy to hard:"]
        if self.curriculum.is_continuous:
            lines.append(f"{self.curriculum.columns[0]} in {len(self.sizes)} parts: {_often(times)}")
        else:
            for level, name in enumerate(self.levels.names):
                lines.append(f"{name}: {_often(times[self.level == level])}")
        if self._others:
            lines.append(f"in no level, so never drawn: {_counts(self._others)}")
        return lines

    def _choose(self, epoch: int) -> NDArray[np.int64]:
        """(draws,) the deck of each draw."""
        if len(self._decks) == 1:
            return np.zeros(len(self), dtype=np.int64)
        progress = (epoch + np.arange(len(self)) / len(self)) / self.epochs
        return self.curriculum.choose(progress, seeded(self.seed, epoch).random(len(self)), self.sizes)

    def _deal(self, deck: int, first: int, count: int) -> NDArray[np.int64]:
        """Cards ``first`` to ``first + count`` of a deck that is shuffled anew whenever it has been dealt out."""
        cards = self._decks[deck]
        passes = range(first // len(cards), -(-(first + count) // len(cards)))
        dealt = [seeded(self.seed, deck, number).permutation(cards) for number in passes]
        start = first % len(cards)
        return np.concatenate([*dealt, cards[:0]])[start : start + count]


def check_levels(levels: Levels, sizes: Sequence[int] | NDArray, others: Mapping[str, int]) -> None:
    """Raise ValueError, naming the model pairs that there are, for a level without rows.

    Args:
        sizes: (L,) rows of each level.
        others: model pair in no level -> rows.
    """
    if empty := [name for name, size in zip(levels.names, sizes) if not size]:
        found = {name: int(size) for name, size in zip(levels.names, sizes) if size} | dict(others)
        raise UserError(f"curriculum: level {empty[0]} has no row; there are {_counts(found) or 'no rows at all'}")


def seeded(seed: int, *key: int) -> np.random.Generator:
    """A generator for each key, also for keys that differ in zeros at their end alone."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _find(place: NDArray, shares: Sequence[float] | NDArray) -> NDArray[np.int64]:
    """In which of the parts of the unit interval that have these shares the places lie."""
    bounds = np.cumsum(shares) / np.sum(shares)
    return np.minimum(np.searchsorted(bounds, place, side="right"), np.flatnonzero(shares)[-1])


def _parts(place: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """In which of so many equal parts of the unit interval the places lie."""
    return np.minimum((place * count).astype(np.int64), count - 1)


def _quantiles(column: str, number: int) -> tuple[str, ...]:
    return tuple(f"{column}_{k + 1}of{number}" for k in range(number))


def _often(times: NDArray[np.int64]) -> str:
    words = {0: "never", 1: "once", 2: "twice"}
    parts = [f"{count} {word}" for number, word in words.items() if (count := int((times == number).sum()))]
    if more := int((times > 2).sum()):
        parts.append(f"{more} more often, up to {times.max()} times")
    return f"{len(times)} rows, drawn {', '.join(parts)}"


def _counts(pairs: Mapping[str, int]) -> str:
    return ", ".join(f"{pair} ({count} rows)" for pair, count in sorted(pairs.items()))


def _parse_pair(text: Any) -> str:
    parts = [part.strip() for part in text.split(">")] if isinstance(text, str) else []
    if len(parts) != 2 or not all(parts):
        raise UserError(f"curriculum: level {text!r} is no model pair; expected chosen>rejected, as gpt4>gpt-3.5-turbo")
    return ">".join(parts)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
