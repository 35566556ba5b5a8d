"""Draws rows by the data curriculum of arXiv 2310.02263, from easy pairs to hard ones. Pure numpy.

Rows belong to levels, from 0 (the easiest) to L-1 (the hardest). At progress t of training the schedule gives a place
alpha(t) in [0, 1] between easy and hard, and each row is drawn from one of the two levels next to alpha (L - 1). With
L = 2, this is the paper's rule: the hard level with probability alpha, else the easy one.

An epoch has as many draws as the levels have rows. Each level is a shuffled deck: every row of it is drawn once before
any is drawn again, across epochs too.
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
from .weights import read_number

SCHEDULES = ("linear", "reversed", "constant", "staged", "none", "sqrt", "sorted")
PAIR_COLUMNS = ("chosen_model", "rejected_model")
NO_LEVEL = -1
# Columns that drawn rows get: the place for the metrics, see Curriculum.places; and whether `keep` makes the row hard.
PLACE, HARD = "curriculum_place", "curriculum_hard"

Keys = list[str] | NDArray[np.float64]  # one per row: its model pair, or its difficulty (larger is harder)
_WITH_PROGRESS = ("linear", "reversed", "sqrt", "sorted", "staged")
_PERCENTILES = 100  # number of levels if `levels` names a column
_WINDOW = 0.2  # share of these levels from which a row is drawn
_COMPETENCE = 0.01  # share of the rows that `sqrt` draws from at the start


@dataclass(frozen=True)
class Curriculum:
    """The options of a curriculum, which do not depend on the data.

    Attributes:
        levels: model pairs ``chosen>rejected`` from easy to hard, compared with the columns ``chosen_model`` and
            ``rejected_model``; or a number of quantiles of ``column``; or the name of a column: its percentiles are the
            levels, and each row is drawn from a window of 20 of them.
        schedule: ``linear``: alpha grows from 0 to 1 over ``epochs``, and stays 1. ``reversed``: 1 - alpha.
            ``sqrt``: uniform draws from the easiest share c of the rows, c = sqrt(c0^2 + (1 - c0^2) t) with c0 = 0.01
            (arXiv 1903.09848, eq. 7). ``sorted``: every row once per epoch, from the easiest to the hardest, equal ones
            in random order. ``staged``: one level after another, each for its share of the rows. ``constant``: a fixed
            mix, ``shares``. ``none``: every row once per epoch, in random order, of all levels.
        column: the column of the quantiles, if ``levels`` is their number; default ``gap``.
        easy: which values of the column are easy, ``high`` or ``low``; default high for ``gap``, low for any other.
        shares: share of each level in the constant mix; default equal.
        epochs: length of the schedule. The default is the first epoch, or the run if it is shorter. On a stream it is
            the run; a run resumed with another ``max_steps`` then continues with another schedule.
        buffer: number of rows of a stream that wait to be drawn, in all levels together; default 4096.
        keep: share of the rows that are kept, the easiest by the column. The others are hard: they are left out, unless
            ``hard_loss`` or ``hard_weight`` says otherwise (arXiv 2502.09650).
        hard_loss: loss of the hard pairs, a name that ``loss_type`` takes, such as ``sft`` (arXiv 2602.00954).
        hard_weight: factor of the loss of the hard pairs; default 1 with ``hard_loss``.
        stages: divides the run into so many stages of equal length. The schedule advances from stage to stage, and the
            rows of a stage come in random order. The schedule's length is that of the run.
        refresh_reference: the policy becomes the reference at the start of every stage but the first.
    """

    levels: tuple[str, ...] | int | str
    schedule: str = "linear"
    column: str | None = None
    easy: str | None = None
    shares: tuple[float, ...] | None = None
    epochs: float | None = None
    buffer: int | None = None
    keep: float | None = None
    hard_loss: str | None = None
    hard_weight: float | None = None
    stages: int | None = None
    refresh_reference: bool = False

    @classmethod
    def parse(cls, option: Mapping[str, Any] | str) -> Curriculum:
        """Parses a curriculum from a mapping or its JSON.

        Raises:
            UserError: a key or value is unknown, or two keys exclude each other; the message names the key.
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
        if option.get("levels") is None and option.get("column") is not None:  # its percentiles are the levels
            option = {**option, "levels": option["column"], "column": None}
        if option.get("levels") is None:
            raise UserError("curriculum needs levels: model pairs, a number of quantiles of gap, or a column")
        sequences = {key: tuple(value) for key, value in option.items() if isinstance(value, list)}
        return cls(**{**option, **sequences})

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"curriculum: schedule={self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        if isinstance(self.levels, tuple):
            is_known = True
            object.__setattr__(self, "levels", tuple(map(_parse_pair, self.levels)))
            if twice := [pair for pair, count in Counter(self.levels).items() if count > 1]:
                raise UserError(f"curriculum: levels names {twice[0]} twice")
        elif isinstance(self.levels, str):
            is_known = self.levels != "" and ">" not in self.levels
        else:
            is_known = _is_int(self.levels) and self.levels > 1
        if not is_known:
            raise UserError(
                f"curriculum: levels={self.levels!r} is neither a list of model pairs, nor a number of quantiles (2 or"
                " more), nor the name of a column"
            )
        if self.levels == ():
            raise UserError("curriculum: levels is an empty list")
        if self.column is not None and not (_is_int(self.levels) and isinstance(self.column, str)):
            raise UserError("curriculum: column has an effect only if levels is a number of quantiles: remove it")
        if self.easy is not None and isinstance(self.levels, tuple):
            raise UserError("curriculum: easy has no effect on model pairs, which are in order: remove it")
        if self.easy not in (None, "high", "low"):
            raise UserError(f"curriculum: easy={self.easy!r} is neither high nor low")
        if self.epochs is not None and self.schedule not in _WITH_PROGRESS:
            raise UserError(f"curriculum: epochs has no effect with schedule={self.schedule}: remove it")
        if self.epochs is not None and not (_is_number(self.epochs) and self.epochs > 0):
            raise UserError(f"curriculum: epochs={self.epochs!r} must be a positive number")
        if self.buffer is not None and not (_is_int(self.buffer) and self.buffer > 0):
            raise UserError(f"curriculum: buffer={self.buffer!r} must be a positive whole number")
        self._check_shares()
        self._check_selection()

    def _check_selection(self) -> None:
        """Checks the options of hard pairs and of stages."""
        keep, weight, stages, refresh = self.keep, self.hard_weight, self.stages, self.refresh_reference
        hard = next((name for name in ("hard_loss", "hard_weight") if getattr(self, name) is not None), None)
        by_pair = isinstance(self.levels, tuple)
        wrong = {
            "keep needs a column: leave the hard model pairs out of levels instead": keep is not None and by_pair,
            f"keep={keep!r} must be a share of the rows, above 0 and at most 1": keep is not None
            and not (_is_number(keep) and 0 < keep <= 1),
            f"{hard} is for the pairs beyond keep: set keep, or remove {hard}": hard is not None and keep is None,
            f"hard_loss={self.hard_loss!r} must be the name of a loss": not isinstance(self.hard_loss, str | None),
            f"hard_weight={weight!r} must be a positive number": weight is not None
            and not (_is_number(weight) and weight > 0),
            f"stages={stages!r} must be a whole number, 2 or more": stages is not None
            and not (_is_int(stages) and stages > 1),
            "stages divide the whole run: remove epochs": stages is not None and self.epochs is not None,
            f"refresh_reference={refresh!r} must be true or false": not isinstance(refresh, bool),
            "refresh_reference renews the reference in each of several stages: set stages": refresh and stages is None,
        }
        for message, holds in wrong.items():
            if holds:
                raise UserError(f"curriculum: {message}")

    def _check_shares(self) -> None:
        if self.shares is None:
            return
        if self.schedule != "constant" or isinstance(self.levels, str):
            raise UserError("curriculum: shares needs schedule=constant and a list or a number of levels")
        levels = len(self.levels) if isinstance(self.levels, tuple) else self.levels
        if not isinstance(self.shares, tuple) or len(self.shares) != levels:
            raise UserError(f"curriculum: shares={self.shares!r} must be {levels} numbers, one for each level")
        if not all(_is_number(share) and share >= 0 for share in self.shares) or sum(self.shares) <= 0:
            raise UserError(f"curriculum: shares={list(self.shares)} must be numbers >= 0, and not all of them 0")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that determine the level of a row."""
        if isinstance(self.levels, tuple):
            return PAIR_COLUMNS
        return (self.levels if isinstance(self.levels, str) else self.column or "gap",)

    @property
    def trains_hard_rows(self) -> bool:
        """Whether the rows beyond ``keep`` are trained on, with a loss or weight of their own."""
        return self.hard_loss is not None or self.hard_weight is not None

    @property
    def is_continuous(self) -> bool:
        """Whether the levels are percentiles of a column."""
        return isinstance(self.levels, str)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the logged metrics: the share of each level, or the mean place from 0 to 1 among percentiles."""
        if isinstance(self.levels, str):
            return (f"curriculum/{self.levels}",)
        names = self.levels if isinstance(self.levels, tuple) else _quantiles(self.columns[0], self.levels)
        return tuple(f"curriculum/{name}" for name in names)

    def places(self, levels: int) -> list[float]:
        """Returns (L,) the place of each level in the metrics: its number, or 0 to 1 if levels are percentiles."""
        return [level / max(levels - 1, 1) if self.is_continuous else level for level in range(levels)]

    def check_columns(self, present: Iterable[str]) -> None:
        """Raises a UserError unless the data has the columns that determine the levels."""
        present = set(present)
        if missing := [name for name in self.columns if name not in present]:
            raise UserError(
                f"curriculum reads the column {missing[0]}, but the data has the columns {sorted(present)}; `cpt pairs`"
                " without --grouped writes chosen_model, rejected_model and gap"
            )

    def choose(self, progress: NDArray, uniform: NDArray, sizes: NDArray) -> NDArray[np.int64]:
        """Returns (N,) the level of each draw. The schedule ``none`` does not use this.

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
        if self.schedule == "sqrt":
            return _find(uniform * np.sqrt(_COMPETENCE**2 + (1 - _COMPETENCE**2) * t), sizes)
        alpha = 1.0 - t if self.schedule == "reversed" else t
        # With a width of 1 this is floor(alpha (L-1) + u): of the two nearest levels the upper one is drawn with the
        # fractional part of alpha (L-1) as its probability.
        width = max(1.0, _WINDOW * count) if self.is_continuous else 1.0
        place = np.abs(alpha * (count - 1) + 0.5 + width * (uniform - 0.5))
        place = np.where(place > count, 2 * count - place, place)  # the part of a window outside [0, L] is reflected
        return np.minimum(np.floor(place).astype(np.int64), count - 1)


@dataclass(frozen=True)
class Levels:
    """The levels found in data."""

    names: tuple[str, ...]  # (L,) from easy to hard
    pairs: Mapping[str, int]  # model pair -> level, if levels are model pairs
    cuts: NDArray[np.float64]  # (L-1,) largest difficulty in each level but the last, if a column determines the levels

    def of(self, keys: Keys) -> NDArray[np.int64]:
        """Returns (rows,) the level of each row, ``NO_LEVEL`` for model pairs that are in no level."""
        if isinstance(keys, list):
            return np.array([self.pairs.get(key, NO_LEVEL) for key in keys], dtype=np.int64)
        return np.searchsorted(self.cuts, keys, side="left")


def read_keys(curriculum: Curriculum, columns: Sequence[Sequence], rows: Sequence[int]) -> Keys:
    """Returns the key that determines the level of each row: its model pair, or its difficulty (larger is harder).

    Args:
        columns: values of ``curriculum.columns``.
        rows: the rows' numbers in the source, for error messages.

    Raises:
        UserError: a value is missing or has the wrong type; the message names column and row.
    """
    by_pair = isinstance(curriculum.levels, tuple)
    for name, values in zip(curriculum.columns, columns):
        for row, value in zip(rows, values):
            if not (isinstance(value, str) if by_pair else _is_number(read_number(value))):
                hint = "; a row of several pairs has no level" if isinstance(value, list) else ""
                kind = "the name of a model" if by_pair else "a number"
                raise UserError(f"curriculum: {name} of row {row} is {value!r}, not {kind}{hint}")
    if by_pair:
        pairs = {pair: ">".join(pair) for pair in set(zip(*columns))}  # equal pairs share one string
        return [pairs[pair] for pair in zip(*columns)]
    easy = curriculum.easy or ("high" if curriculum.columns[0] == "gap" else "low")
    numbers = np.array([read_number(value) for value in columns[0]], dtype=np.float64)
    return numbers * (-1.0 if easy == "high" else 1.0)


def find_levels(curriculum: Curriculum, keys: Keys) -> Levels:
    """Finds the levels of the curriculum in data with these keys, or in a stream that begins with them.

    Rows with equal values are in the same level, that of their mean rank.

    Raises:
        UserError: there are no rows, or too few different values for the number of quantiles.
    """
    if isinstance(curriculum.levels, tuple):
        return Levels(curriculum.levels, {pair: i for i, pair in enumerate(curriculum.levels)}, np.zeros(0))
    name = curriculum.columns[0]
    if not len(keys):
        raise UserError(f"curriculum: there are no rows to find levels of {name} in")
    values, counts = np.unique(keys, return_counts=True)
    mean_rank = (np.cumsum(counts) - counts / 2) / counts.sum()
    wanted = _PERCENTILES if curriculum.is_continuous else int(curriculum.levels)
    level = _parts(mean_rank, wanted)
    used = np.unique(level)
    if not curriculum.is_continuous and len(used) < wanted:
        empty = min(set(range(wanted)).difference(used.tolist())) + 1
        possible = next(n for n in range(wanted - 1, 0, -1) if len(np.unique(_parts(mean_rank, n))) == n)
        mend = f"set levels to {possible} at most" if possible > 1 else "choose another column"
        raise UserError(
            f"curriculum: quantile {empty} of {wanted} of the column {name} has no row, as {counts.sum()} rows have"
            f" {len(values)} different values: {mend}"
        )
    cuts = values[np.flatnonzero(np.diff(level))]
    return Levels(_quantiles(name, len(used)), {}, cuts)


def split_by_difficulty(keys: Keys, keep: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the easiest rows, a share ``keep`` of them but at least one, and the others; both from easy to hard."""
    order = _from_easy_to_hard(np.asarray(keys), seed)
    count = max(1, round(keep * len(order)))
    return order[:count], order[count:]


class Draws:
    """Draws rows of a map-style dataset. The draws of an epoch depend only on the data, the seed and the epoch.

    Args:
        curriculum: the options.
        keys: one per row, see :func:`read_keys`.
        seed: of the choice of levels and the order of rows.

    Attributes:
        levels: the levels found in the data.
        sizes: (L,) number of rows of each level.
        level: (rows,) level of each row.
        places: place of each row for the metrics, see :meth:`Curriculum.places`.
        hard: (rows,) which rows are beyond ``keep``, and have a loss or weight of their own.
        epochs: length of the schedule.

    Raises:
        UserError: a level without rows.
    """

    def __init__(self, curriculum: Curriculum, keys: Keys, seed: int) -> None:
        self.curriculum, self.seed = curriculum, seed
        self.levels = find_levels(curriculum, keys)
        self.level = self.levels.of(keys)
        self.sizes = np.bincount(self.level[self.level >= 0], minlength=len(self.levels.names))
        places = [*curriculum.places(len(self.sizes)), None]  # NO_LEVEL is -1, the last element
        self.places = [places[level] for level in self.level]
        self._others = Counter(key for key, level in zip(keys, self.level) if level < 0)
        check_levels(self.levels, self.sizes, self._others)
        self.epochs = curriculum.epochs or 1.0
        self._staged: NDArray[np.int64] | None = None  # the draws of the run, shuffled within each stage
        self.hard = np.zeros(len(keys), dtype=bool)
        if curriculum.trains_hard_rows:
            assert curriculum.keep is not None
            self.hard[split_by_difficulty(keys, curriculum.keep, seed)[1]] = True
        if curriculum.schedule == "sorted":
            order = _from_easy_to_hard(self.level if isinstance(keys, list) else keys, seed)
            self._sorted = order[self.level[order] >= 0]
        # One deck per level, or a single deck for the schedule that does not choose levels.
        in_levels = [np.flatnonzero(self.level == number) for number in range(len(self.sizes))]
        self._decks = [np.flatnonzero(self.level >= 0)] if curriculum.schedule == "none" else in_levels
        self._dealt = [np.zeros(len(self._decks), dtype=np.int64)]  # number of draws from each deck before each epoch

    def __len__(self) -> int:
        """Number of draws of an epoch."""
        return int(self.sizes.sum())

    def end_with_run(self, epochs: float) -> None:
        """Ends the schedule with the run if that is shorter than one epoch or has stages; `epochs` overrules it."""
        run = epochs if self.curriculum.stages else min(1.0, epochs)
        self.epochs = self.curriculum.epochs or run or 1.0
        self._staged = None
        del self._dealt[1:]

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Returns (draws,) the rows of an epoch, in order."""
        if self.curriculum.schedule == "sorted":  # a schedule of several epochs draws each row several times in a row
            return self._sorted[np.floor(self._draws(number) / self.epochs).astype(np.int64) % len(self)]
        while len(self._dealt) <= number:
            decks = self._choose(len(self._dealt) - 1)
            self._dealt.append(self._dealt[-1] + np.bincount(decks, minlength=len(self._decks)))
        decks = self._choose(number)
        rows = np.empty(len(self), dtype=np.int64)
        for deck in range(len(self._decks)):
            places = np.flatnonzero(decks == deck)
            rows[places] = self._deal(deck, int(self._dealt[number][deck]), len(places))
        return rows

    def _draws(self, epoch: int) -> NDArray[np.int64]:
        """Returns (draws,) the numbers of an epoch's draws in the order of the schedule, shuffled within each stage."""
        count, stages = len(self), self.curriculum.stages
        if stages is None or epoch >= self.epochs:
            return epoch * count + np.arange(count)
        if self._staged is None:
            run = np.arange(math.ceil(self.epochs) * count)
            random = seeded(self.seed, 0, 0, 1).random(len(run))
            self._staged = np.lexsort((random, np.floor(run * stages / (count * self.epochs))))
        return self._staged[epoch * count : (epoch + 1) * count]

    def report(self, times: NDArray[np.int64]) -> list[str]:
        """Returns lines of text for the log; ``times`` (rows,) is how often each row is drawn."""
        schedule = self.curriculum.schedule
        over = f" over {self.epochs:.3g} epochs" if schedule in _WITH_PROGRESS else ""
        over += f" in {self.curriculum.stages} stages" if self.curriculum.stages else ""
        lines = [f"curriculum, {schedule}{over}: an epoch is {len(self)} draws; levels from easy to hard:"]
        if self.curriculum.is_continuous:
            lines.append(f"{self.curriculum.columns[0]} in {len(self.sizes)} parts: {_often(times)}")
        else:
            for level, name in enumerate(self.levels.names):
                lines.append(f"{name}: {_often(times[self.level == level])}")
        if self._others:
            lines.append(f"in no level, so never drawn: {_counts(self._others)}")
        if self.curriculum.trains_hard_rows:
            loss, weight = self.curriculum.hard_loss or "the run's loss", self.curriculum.hard_weight or 1
            lines.append(
                f"keep {self.curriculum.keep:g}: the {self.hard.sum()} hardest of {len(self.hard)} rows are trained"
                f" with {loss}, weight {weight:g}"
            )
        return lines

    def _choose(self, epoch: int) -> NDArray[np.int64]:
        """Returns (draws,) the deck of each draw."""
        if len(self._decks) == 1:
            return np.zeros(len(self), dtype=np.int64)
        passes, place = np.divmod(self._draws(epoch), len(self))
        progress = (passes + place / len(self)) / self.epochs
        return self.curriculum.choose(progress, seeded(self.seed, epoch).random(len(self)), self.sizes)

    def _deal(self, deck: int, first: int, count: int) -> NDArray[np.int64]:
        """Returns the rows ``first`` to ``first + count`` of a deck that is shuffled anew after each pass."""
        cards = self._decks[deck]
        passes = range(first // len(cards), -(-(first + count) // len(cards)))
        dealt = [seeded(self.seed, deck, number).permutation(cards) for number in passes]
        start = first % len(cards)
        return np.concatenate([*dealt, cards[:0]])[start : start + count]


def check_levels(levels: Levels, sizes: Sequence[int] | NDArray, others: Mapping[str, int]) -> None:
    """Raises a UserError that names the model pairs in the data if a level has no rows.

    Args:
        sizes: (L,) number of rows of each level.
        others: model pair that is in no level -> number of rows.
    """
    if empty := [name for name, size in zip(levels.names, sizes) if not size]:
        found = {name: int(size) for name, size in zip(levels.names, sizes) if size} | dict(others)
        raise UserError(f"curriculum: level {empty[0]} has no rows; the data has {_counts(found) or 'no rows at all'}")


def seeded(seed: int, *key: int) -> np.random.Generator:
    """Returns a random generator for a key. Keys that differ only in trailing zeros have different generators."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _find(place: NDArray, shares: Sequence[float] | NDArray) -> NDArray[np.int64]:
    """Returns the part of the unit interval that each place lies in, if it is divided by these shares."""
    bounds = np.cumsum(shares) / np.sum(shares)
    return np.minimum(np.searchsorted(bounds, place, side="right"), np.flatnonzero(shares)[-1])


def _from_easy_to_hard(keys: NDArray, seed: int) -> NDArray[np.int64]:
    """Returns the rows sorted by difficulty, equal ones in random order."""
    return np.lexsort((seeded(seed, 0, 0, 2).random(len(keys)), keys))


def _parts(place: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Returns which of ``count`` equal parts of the unit interval each place lies in."""
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
        raise UserError(f"curriculum: level {text!r} is not a model pair; expected chosen>rejected, as gpt4>gpt-3.5")
    return ">".join(parts)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
