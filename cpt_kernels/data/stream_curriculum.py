"""What a curriculum draws of a stream: rows wait in one buffer per level until they are wanted. Pure numpy.

A stream gives its levels as they come, a curriculum wants other shares of them, so some rows have to be passed over:
when all buffers together are full, the fullest gives up its oldest row. When the wanted level has no row waiting, the
stream is read on, by as many rows as the buffers hold at most since the level last occurred; then the nearest level
that has one steps in. Both are counted. The stream starts again when it ends, and what waits is kept.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .curriculum import NO_LEVEL, PLACE, Curriculum, Keys, Levels, check_levels, find_levels, read_keys, seeded

Row = dict[str, Any]
_ROWS = 4096


class StreamDraws:
    """The rows that a curriculum draws of a stream, without end; the same whenever it starts from the beginning.

    Levels by a column are found in the rows that fill the buffers first. Stages are of equal length.

    Args:
        curriculum: what is asked for.
        seed: of the choice of levels.

    Attributes:
        read, drawn, passed_over, replaced: level -> rows, in the process that reads: read of the stream; drawn;
            given up for want of room; wanted, where another level had to step in.
        others: model pair in no level -> rows read.
    """

    def __init__(self, curriculum: Curriculum, seed: int) -> None:
        self.curriculum, self.seed = curriculum, seed
        self.capacity = curriculum.buffer or _ROWS
        self._forget()

    def draw(self, read: Callable[[int], Iterable[Row]], progress: Callable[[], float]) -> Iterator[Row]:
        """Rows, each with its place in the curriculum.

        Args:
            read: the rows of the stream's n-th pass, from 0.
            progress: t of the next draw, 1 where the schedule ends.

        Raises:
            UserError: the stream is empty, or a whole pass has no row of some level.
        """
        self._forget()
        head: list[Row] = []
        if not isinstance(self.curriculum.levels, tuple):
            head = list(itertools.islice(read(0), self.capacity))
        self.levels = find_levels(self.curriculum, self._keys(head))
        count = len(self.levels.names)
        self._waiting = [deque() for _ in range(count)]
        places = self.curriculum.places(count)
        self._since = [0] * count  # rows read since the level last occurred
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
        """Lines of text for the log; none where another process read the stream."""
        if self.levels is None:
            return []
        lines = [f"curriculum, {self.curriculum.schedule}: {self.passes} whole passes over the stream"]
        if self.curriculum.is_continuous:
            named = {f"{self.curriculum.columns[0]} in {len(self.levels.names)} parts": range(len(self.levels.names))}
        else:
            named = {name: [level] for level, name in enumerate(self.levels.names)}
        for name, levels in named.items():
            read, drawn, passed, replaced = (
                sum(counts[level] for level in levels)
                for counts in (self.read, self.drawn, self.passed_over, self.replaced)
            )
            lines.append(
                f"{name}: {read} rows read, {drawn} drawn, {passed} passed over as the buffers were full,"
                f" {read - drawn - passed} still waiting; {replaced} times another level stepped in"
            )
        if self.others:
            lines.append(f"in no level, so never drawn: {sum(self.others.values())} rows ({', '.join(self.others)})")
        return lines

    def _forget(self) -> None:
        self.levels: Levels | None = None
        self.read, self.drawn, self.passed_over, self.replaced = Counter(), Counter(), Counter(), Counter()
        self.others: Counter[str] = Counter()
        self.passes = 0

    def _keys(self, rows: list[Row]) -> Keys:
        columns = [[row[name] for row in rows] for name in self.curriculum.columns]
        return read_keys(self.curriculum, columns, [row["row"] for row in rows])

    def _endless(self, read: Callable[[int], Iterable[Row]]) -> Iterator[Row]:
        for number in itertools.count():
            yield from read(number)
            sizes = [self.read[level] for level in range(len(self.levels.names))]
            check_levels(self.levels, sizes, self.others)
            self.passes += 1

    def _find(self, wanted: int, rows: Iterator[Row]) -> int:
        """The wanted level with a row waiting, or the nearest to it that has one; the easier of two."""
        while not self._waiting[wanted] and self._since[wanted] < self.capacity:
            self._read_on(rows)
        if self._waiting[wanted]:
            return wanted
        self.replaced[wanted] += 1
        while not any(self._waiting):
            self._read_on(rows)
        return min((level for level, there in enumerate(self._waiting) if there), key=lambda level: abs(level - wanted))

    def _read_on(self, rows: Iterator[Row]) -> int:
        """Put the stream's next row that is in a level into its buffer."""
        while True:
            row = next(rows)
            keys = self._keys([row])
            level = int(self.levels.of(keys)[0])
            if level != NO_LEVEL:
                break
            self.others[keys[0]] += 1
        self.read[level] += 1
        self._since = [0 if other == level else since + 1 for other, since in enumerate(self._since)]
        self._waiting[level].append(row)
        if sum(map(len, self._waiting)) > self.capacity:
            fullest = max(range(len(self._waiting)), key=lambda other: (len(self._waiting[other]), other != level))
            self._waiting[fullest].popleft()
            self.passed_over[fullest] += 1
        return level
