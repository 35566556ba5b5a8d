"""Draws rows from a stream by a curriculum: rows wait in one buffer per level until they are drawn. Pure numpy.

The shares of levels in a stream differ from those that the curriculum draws, so some rows are passed over: when all
buffers together are full, the fullest drops its oldest row. If the drawn level has no waiting row, the stream is read
further, until as many rows as the buffers hold have passed without one of that level. Then the nearest level with a
waiting row replaces it. Both cases are counted. When the stream ends it starts again, and waiting rows are kept.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .curriculum import NO_LEVEL, PLACE, Curriculum, Keys, Levels, check_levels, find_levels, read_keys, seeded

StreamRow = dict[str, Any]
_ROWS = 4096


class StreamDraws:
    """Draws rows from a stream without end. Draws from the beginning are always the same.

    Levels of a column are found in the first rows, as many as the buffers hold. The stages of the schedule ``staged``
    have equal length.

    Args:
        curriculum: the options.
        seed: of the choice of levels.

    Attributes:
        read, drawn, passed_over, replaced: level -> number of rows, in the process that reads the stream: read; drawn;
            dropped from full buffers; replaced by another level.
        others: model pair that is in no level -> number of rows read.
    """

    def __init__(self, curriculum: Curriculum, seed: int) -> None:
        self.curriculum, self.seed = curriculum, seed
        self.capacity = curriculum.buffer or _ROWS
        self.levels: Levels | None = None  # None until rows are drawn
        self._reset()

    def draw(self, read: Callable[[int], Iterable[StreamRow]], progress: Callable[[], float]) -> Iterator[StreamRow]:
        """Yields rows, each with its place in the curriculum.

        Args:
            read: returns the rows of the n-th pass over the stream, from 0.
            progress: returns the progress t of the next draw, 1 where the schedule ends.

        Raises:
            UserError: the stream is empty, or a whole pass has no rows of some level.
        """
        self._reset()
        # Find the levels. Those of a column need some rows first; the first pass reads these rows again.
        head: list[StreamRow] = []
        if not isinstance(self.curriculum.levels, tuple):
            head = list(itertools.islice(read(0), self.capacity))
        self.levels = find_levels(self.curriculum, self._keys(head))
        count = len(self.levels.names)
        self._waiting: list[deque[StreamRow]] = [deque() for _ in range(count)]
        places = self.curriculum.places(count)
        self._since = [0] * count  # rows read since the last row of each level

        # Draw.
        rows, random = self._endless(read), seeded(self.seed)
        while True:
            if self.curriculum.schedule == "none":
                level = self._read_on(rows)
            else:
                choice = self.curriculum.choose(np.array([progress()]), random.random(1), np.ones(count))
                level = self._find(int(choice[0]), rows)
            self.drawn[level] += 1
            yield self._waiting[level].popleft() | {PLACE: places[level]}

    def report(self) -> list[str]:
        """Returns lines of text for the log, or none if another process read the stream."""
        if self.levels is None:
            return []
        lines = [f"curriculum, {self.curriculum.schedule}: {self.passes} whole passes over the stream"]
        if self.curriculum.is_continuous:
            every = list(range(len(self.levels.names)))
            named = {f"{self.curriculum.columns[0]} in {len(every)} parts": every}
        else:
            named = {name: [level] for level, name in enumerate(self.levels.names)}
        for name, levels in named.items():
            read, drawn, passed, replaced = (
                sum(counts[level] for level in levels)
                for counts in (self.read, self.drawn, self.passed_over, self.replaced)
            )
            lines.append(
                f"{name}: {read} rows read, {drawn} drawn, {passed} passed over because the buffers were full,"
                f" {read - drawn - passed} still waiting; replaced {replaced} times by another level"
            )
        if self.others:
            lines.append(f"in no level, so never drawn: {sum(self.others.values())} rows ({', '.join(self.others)})")
        return lines

    def _reset(self) -> None:
        self.levels = None
        self.read: Counter[int] = Counter()
        self.drawn: Counter[int] = Counter()
        self.passed_over: Counter[int] = Counter()
        self.replaced: Counter[int] = Counter()
        self.others: Counter[str] = Counter()
        self.passes = 0

    def _keys(self, rows: list[StreamRow]) -> Keys:
        columns = [[row[name] for row in rows] for name in self.curriculum.columns]
        return read_keys(self.curriculum, columns, [row["row"] for row in rows])

    def _endless(self, read: Callable[[int], Iterable[StreamRow]]) -> Iterator[StreamRow]:
        """Yields the rows of pass after pass, and checks after each that every level has occurred."""
        assert self.levels is not None
        for number in itertools.count():
            yield from read(number)
            sizes = [self.read[level] for level in range(len(self.levels.names))]
            check_levels(self.levels, sizes, self.others)
            self.passes += 1

    def _find(self, wanted: int, rows: Iterator[StreamRow]) -> int:
        """Returns the wanted level if a row of it is found, else the nearest (of two, the easier) that has a row."""
        while not self._waiting[wanted] and self._since[wanted] < self.capacity:
            self._read_on(rows)
        if self._waiting[wanted]:
            return wanted
        self.replaced[wanted] += 1
        while not any(self._waiting):
            self._read_on(rows)
        return min((level for level, there in enumerate(self._waiting) if there), key=lambda level: abs(level - wanted))

    def _read_on(self, rows: Iterator[StreamRow]) -> int:
        """Reads the stream's next row that is in some level into its buffer, and returns the level."""
        assert self.levels is not None
        while True:
            row = next(rows)
            keys = self._keys([row])
            level = int(self.levels.of(keys)[0])
            if level != NO_LEVEL:
                break
            self.others[str(keys[0])] += 1
        self.read[level] += 1
        self._since = [0 if other == level else since + 1 for other, since in enumerate(self._since)]
        self._waiting[level].append(row)
        if sum(map(len, self._waiting)) > self.capacity:
            fullest = max(range(len(self._waiting)), key=lambda other: (len(self._waiting[other]), other != level))
            self._waiting[fullest].popleft()
            self.passed_over[fullest] += 1
        return level
