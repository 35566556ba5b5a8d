"""Which rows make a micro-batch, on which rank: by a number of rows, or by a budget of tokens. Pure numpy.

Every rank computes the same plan and takes its own part of it; nothing is repeated and nothing is left out, so ranks
may end with a micro-batch that has no rows.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Rows that are packed together: enough choice to fill every micro-batch, few enough that order stays random.
_WINDOW_BATCHES = 64
_FULL = 0.97


@dataclass
class BatchSampler:
    """Micro-batches of row indices for one rank; pass it as a DataLoader's ``batch_sampler``.

    Args:
        tokens: (rows,) tokens that each row takes in a packed batch.
        batch_size: rows per micro-batch, where ``max_tokens`` is not given.
        max_tokens: budget of a micro-batch in tokens; whole rows are packed to fill it.
        shuffle, seed: a new order every epoch, the same on every rank; resuming needs only the epoch.
        world_size, rank: this rank takes every ``world_size``-th micro-batch.
        drop_last: leave out rows that do not fill a micro-batch on every rank (by rows only).

    Raises:
        ValueError: a row is longer than the budget.
    """

    tokens: NDArray[np.int64]
    batch_size: int = 1
    max_tokens: int | None = None
    shuffle: bool = True
    seed: int = 0
    world_size: int = 1
    rank: int = 0
    drop_last: bool = False
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int64)
        if self.max_tokens is not None and self.tokens.max(initial=0) > self.max_tokens:
            row = int(self.tokens.argmax())
            raise ValueError(
                f"row {row} takes {self.tokens[row]} tokens, more than max_tokens_per_batch={self.max_tokens}:"
                f" raise it to at least {self.tokens[row]}, or lower max_length"
            )
        self._batches = len(self._plan(0))

    def plan_epochs(self, epochs: int) -> None:
        """Give each of so many epochs as many micro-batches as the one that needs most: a trainer asks only once."""
        if self.max_tokens and self.shuffle:
            self._batches = max(len(self._plan(epoch)) for epoch in range(epochs))

    def __len__(self) -> int:
        return self._batches // self.world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        plan = split_to(self._plan(self.epoch), self._batches)
        yield from plan[self.rank :: self.world_size]

    @property
    def fill(self) -> float:
        """Tokens over budget of the current epoch's micro-batches; 1 where no budget is set."""
        return self.tokens.sum() / (self._batches * self.max_tokens) if self.max_tokens else 1.0

    def _plan(self, epoch: int) -> list[list[int]]:
        rows = np.arange(len(self.tokens))
        random = np.random.default_rng([self.seed, epoch])
        if self.shuffle:
            random.shuffle(rows)
        if self.max_tokens:
            return pack_rows(rows, self.tokens, self.max_tokens, self.world_size, random if self.shuffle else None)
        batches = [rows[i : i + self.batch_size].tolist() for i in range(0, len(rows), self.batch_size)]
        if self.drop_last:
            whole = len(rows) // (self.batch_size * self.world_size) * self.world_size
            return batches[:whole]
        return batches + [[]] * (-len(batches) % self.world_size)


def pack_rows(
    rows: Sequence[int],
    tokens: NDArray[np.int64],
    budget: int,
    multiple: int = 1,
    random: np.random.Generator | None = None,
) -> list[list[int]]:
    """Pack whole rows into micro-batches of at most ``budget`` tokens; their number is a multiple of ``multiple``.

    Windows of rows are packed by best fit, longest first. What is less than 97 % full goes back into the next window,
    so only the end of the epoch has to live with gaps, which all ranks share.
    """
    window = max(1, int(_WINDOW_BATCHES * budget / max(1.0, tokens[rows].mean()))) if len(rows) else 1
    full: list[list[int]] = []
    rest: list[int] = []
    for start in range(0, len(rows), window):
        batches = _best_fit([*rest, *rows[start : start + window]], tokens, budget)
        rest = []
        done = [batch for batch in batches if tokens[batch].sum() >= _FULL * budget]
        rest = [row for batch in batches if tokens[batch].sum() < _FULL * budget for row in batch]
        if random is not None:
            random.shuffle(done)  # best fit leaves the longest rows in the first
        full += done
    return _with_even_end(full, _best_fit(rest, tokens, budget), tokens, budget, multiple)


def _with_even_end(
    full: list[list[int]], last: list[list[int]], tokens: NDArray[np.int64], budget: int, multiple: int
) -> list[list[int]]:
    """``full + last`` and empty ones up to a multiple, the last steps' rows spread evenly over their micro-batches.

    Ranks step together, and all gaps are at the end. Where what is left is too little to share, the full steps before
    it are taken along, two at most.
    """
    best: list[list[int]] = []
    smallest_gap = np.inf
    for steps_back in range(3):
        whole = max(len(full) // multiple - steps_back, 0) * multiple
        end = full[whole:] + last
        end = _even(end + [[]] * (-len(end) % multiple), tokens, budget)
        end.sort(key=lambda batch: -tokens[batch].sum())  # a step's micro-batches are neighbours
        loads = np.array([tokens[batch].sum() for batch in end]).reshape(-1, multiple)
        gap = np.max((loads.max(axis=1) - loads.min(axis=1)) / loads.max(axis=1), initial=0.0)
        if gap < smallest_gap:
            best, smallest_gap = full[:whole] + end, gap
        if smallest_gap <= 1 - _FULL:
            break
    return best


def split_to(batches: list[list[int]], count: int) -> list[list[int]]:
    """Split the fullest micro-batches in two until there are ``count``; empty ones where no rows are left to split."""
    batches = [list(batch) for batch in batches]
    while len(batches) < count:
        longest = max(range(len(batches)), key=lambda i: len(batches[i]))
        half = len(batches[longest]) // 2
        batches.append(batches[longest][:half])
        batches[longest] = batches[longest][half:]
    return batches


def _best_fit(rows: Sequence[int], tokens: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Longest first, each into the fullest micro-batch that still has room."""
    batches: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, batch), sorted
    for row in sorted(rows, key=lambda row: (-tokens[row], row)):
        need = int(tokens[row])
        place = bisect.bisect_left(room, (need, -1))
        if place == len(room):
            batches.append([])
            free, batch = budget, len(batches) - 1
        else:
            free, batch = room.pop(place)
        batches[batch].append(int(row))
        bisect.insort(room, (free - need, batch))
    return batches


def _even(batches: list[list[int]], tokens: NDArray[np.int64], budget: int) -> list[list[int]]:
    """The same rows over the same number of micro-batches, longest first, each to the emptiest."""
    loads = np.zeros(len(batches), dtype=np.int64)
    even: list[list[int]] = [[] for _ in batches]
    for row in sorted((row for batch in batches for row in batch), key=lambda row: (-tokens[row], row)):
        emptiest = int(loads.argmin())
        even[emptiest].append(row)
        loads[emptiest] += tokens[row]
    return even if loads.max(initial=0) <= budget else batches
