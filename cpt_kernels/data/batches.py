"""Plans which rows form the micro-batches of each rank, by a number of rows or by a budget of tokens. Pure numpy.

Every rank computes the same plan and takes its own part of it. No row is repeated or left out, so the last micro-batch
of a rank may have no rows.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .curriculum import Draws

Row = TypeVar("Row")

# Best fit packs windows of this many micro-batches: enough rows to fill each one, few enough to keep a random order.
_WINDOW_BATCHES = 64
_FULL = 0.97  # share of the budget from which a micro-batch counts as full
# If the order of rows matters, a micro-batch is filled up with rows of at most this many following micro-batches.
_AHEAD = 4


@dataclass
class BatchSampler:
    """Batch sampler of a DataLoader: yields the micro-batches of one rank as lists of row indices.

    Raises:
        UserError: a row is longer than the budget.
    """

    tokens: NDArray[np.int64]  # (rows,) tokens that each row takes in a packed batch
    batch_size: int = 1  # rows per micro-batch, if ``max_tokens`` is not given
    max_tokens: int | None = None  # budget of a micro-batch in tokens. Whole rows are packed to fill it.
    shuffle: bool = True  # order the rows anew every epoch, equally on every rank. Resuming needs only the epoch.
    seed: int = 0  # of that order
    world_size: int = 1  # number of ranks; each takes every ``world_size``-th micro-batch
    rank: int = 0  # this rank
    # micro-batches of an optimizer step on this rank. With a budget, the plan depends only on the number of
    # micro-batches of a step on all ranks together, so a run can resume on another number of ranks.
    micro_batches: int = 1
    drop_last: bool = False  # leave out rows that do not fill a micro-batch on every rank (only without a budget)
    draws: Draws | None = None  # the curriculum's rows of each epoch in order, instead of all rows shuffled
    # (rows,) number of completions of each row if they run in padded rows; ``tokens`` are then those of the row's
    # longest sequence, and rows of similar length share a micro-batch
    sequences: NDArray[np.int64] | None = None
    # rows of a step on all ranks. With ``max_tokens``, these rows fill as few micro-batches as possible;
    # ``micro_batches`` becomes the number that every step needs.
    step_rows: int | None = None
    # (rows,) code of the tree of each row. Rows of a tree stay together, and trees are shuffled. With a budget and
    # no curriculum, a micro-batch holds whole trees, unless a tree alone exceeds the budget.
    trees: NDArray[np.int64] | None = None
    tree_tokens: NDArray[np.int64] | None = None  # (trees,) tokens that the rows of each tree take in one micro-batch
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = np.asarray(self.tokens, dtype=np.int64)
        sizes = self.tokens if self.sequences is None else self.tokens * self.sequences
        if self.max_tokens is not None and sizes.max(initial=0) > self.max_tokens:
            row = int(sizes.argmax())
            raise UserError(
                f"row {row} takes {sizes[row]} tokens, more than max_tokens_per_batch={self.max_tokens}:"
                f" raise it to at least {sizes[row]}, or lower max_length"
            )
        if self.step_rows is None:
            self._batches = len(self._plan(0))
        else:
            self.plan_epochs(1)

    def plan_epochs(self, epochs: int) -> None:
        """Gives all epochs the number of micro-batches of the longest one, because a trainer asks for it only once."""
        if self.step_rows is not None:
            plans = [self._steps(self._rows(epoch)) for epoch in range(epochs)]
            most = max(len(step) for steps in plans for step in steps)
            self.micro_batches = -(-most // self.world_size)
            self._batches = max(map(len, plans)) * self._multiple
        elif self.max_tokens and (self.shuffle or self.draws):
            self._batches = max(len(self._plan(epoch)) for epoch in range(epochs))

    def __len__(self) -> int:
        return self._batches // self.world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._epoch(self.epoch)[self.rank :: self.world_size]

    def count_draws(self, steps: int, micro_batches: int) -> NDArray[np.int64]:
        """Returns (rows,) how often each row runs in ``steps`` steps of ``micro_batches`` micro-batches per rank."""
        times = np.zeros(len(self.tokens), dtype=np.int64)
        epoch = 0
        while steps > 0:
            batches = self._epoch(epoch)[: steps * micro_batches * self.world_size]
            np.add.at(times, [row for batch in batches for row in batch], 1)
            steps -= -(-len(self) // micro_batches)
            epoch += 1
        return times

    @property
    def fill(self) -> float:
        """Share of the current epoch's token budget that rows fill; 1 without a budget. Pads within a row count."""
        if self.max_tokens and self.tree_tokens is not None and self.draws is None:
            return self.tree_tokens.sum() / (self._batches * self.max_tokens)
        tokens = self.tokens if self.sequences is None else self.tokens * self.sequences
        tokens = tokens if self.draws is None else tokens[self.draws.epoch(self.epoch)]
        return tokens.sum() / (self._batches * self.max_tokens) if self.max_tokens else 1.0

    def _epoch(self, epoch: int) -> list[list[int]]:
        return split_to(self._plan(epoch), self._batches, self._multiple)

    @property
    def _multiple(self) -> int:
        """The number of micro-batches is a multiple of this: a step's with a budget, else one per rank."""
        return self.world_size * (self.micro_batches if self.max_tokens else 1)

    def _rows(self, epoch: int, random: np.random.Generator | None = None) -> NDArray[np.int64]:
        """Returns the rows of an epoch in order; ``random`` is the epoch's generator, from its start."""
        if self.draws is not None:
            return self._by_tree(self.draws.epoch(epoch))
        rows = np.arange(len(self.tokens))
        random = random or np.random.default_rng([self.seed, epoch])
        if self.shuffle and self.trees is not None:
            return np.argsort(random.permutation(self.trees.max() + 1)[self.trees], kind="stable")
        if self.shuffle:
            random.shuffle(rows)
        return self._by_tree(rows)

    def _by_tree(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns rows in the same order, except that those of a tree follow the first one of them."""
        if self.trees is None:
            return rows
        _, first, codes = np.unique(self.trees[rows], return_index=True, return_inverse=True)
        return rows[np.argsort(first[codes], kind="stable")]

    def _pack_trees(self, rows: NDArray[np.int64], random: np.random.Generator | None) -> list[list[int]]:
        """Packs whole trees into micro-batches; of a tree that exceeds the budget, every row."""
        assert self.trees is not None and self.tree_tokens is not None and self.max_tokens is not None
        codes = self.trees[rows]
        fits = self.tree_tokens[codes] <= self.max_tokens
        # Rows between two changes of the tree are a unit, and so is every row of a tree that is too large.
        starts = np.flatnonzero((np.diff(codes, prepend=-1) != 0) | ~fits)
        sizes = np.where(fits, self.tree_tokens[codes], self.tokens[rows])[starts]
        units = np.split(rows, starts[1:])
        packed = pack_rows(range(len(units)), sizes, self.max_tokens, self._multiple, random)
        return [[int(row) for unit in batch for row in units[unit]] for batch in packed]

    def _steps(self, rows: NDArray[np.int64]) -> list[list[list[int]]]:
        """Packs the rows of each step into as few micro-batches of all ranks as possible."""
        assert self.step_rows is not None and self.max_tokens is not None
        steps = [rows[start : start + self.step_rows].tolist() for start in range(0, len(rows), self.step_rows)]
        if self.sequences is not None:
            return [pack_padded(step, self.tokens, self.sequences, self.max_tokens) for step in steps]
        return [_best_fit(step, self.tokens, self.max_tokens) for step in steps]

    def _plan(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        rows = self._rows(epoch, random)
        if self.step_rows is not None and self.max_tokens is not None:
            steps = [step + [[]] * (self._multiple - len(step)) for step in self._steps(rows)]
            if self.sequences is None:
                steps = [_even(step, self.tokens, self.max_tokens) for step in steps]
            return [batch for step in steps for batch in step]
        if self.max_tokens and self.sequences is not None:
            return pack_padded(rows, self.tokens, self.sequences, self.max_tokens, self._multiple, random)
        if self.max_tokens and self.draws is not None:
            *full, last = pack_in_order(rows.tolist(), self.tokens.__getitem__, self.max_tokens)
            return _with_even_end(full, [last], self.tokens, self.max_tokens, self._multiple)
        if self.max_tokens and self.trees is not None:
            return self._pack_trees(rows, random if self.shuffle else None)
        if self.max_tokens:
            return pack_rows(rows, self.tokens, self.max_tokens, self._multiple, random if self.shuffle else None)
        batches = [rows[i : i + self.batch_size].tolist() for i in range(0, len(rows), self.batch_size)]
        if self.drop_last:
            whole = len(rows) // (self.batch_size * self.world_size) * self.world_size
            batches = batches[:whole]
        batches += [[]] * (-len(batches) % self.world_size)
        in_order = self.sequences is not None or self.trees is not None or not (self.shuffle or self.draws)
        if self.world_size == 1 or in_order:
            return batches
        step = self.world_size * self.micro_batches
        cuts = range(0, len(batches), step)
        return [each for i in cuts for each in self._in_even_turns(batches[i : i + step])]

    def _in_even_turns(self, step: list[list[int]]) -> list[list[int]]:
        """Evens the micro-batches of a step, and puts those of similar size into one turn, where ranks wait."""
        step = _even(step, self.tokens, most_rows=self.batch_size)
        return sorted(step, key=lambda batch: -self.tokens[batch].sum())


def pack_padded(
    rows: Sequence[int] | NDArray[np.int64],
    longest: NDArray[np.int64],  # tokens of the longest sequence of every row of the dataset
    sequences: NDArray[np.int64],  # number of sequences of every row of the dataset
    budget: int,
    multiple: int = 1,
    random: np.random.Generator | None = None,
) -> list[list[int]]:
    """Packs whole rows into micro-batches whose sequences, padded to the longest, are at most ``budget`` tokens.

    Rows are sorted by length within windows, so that few pads are needed. The number of micro-batches is a multiple of
    ``multiple``; the last ones may be empty.
    """
    window = max(1, int(_WINDOW_BATCHES * budget / max(1.0, (longest * sequences)[rows].mean()))) if len(rows) else 1
    batches: list[list[int]] = []
    for start in range(0, len(rows), window):
        done: list[list[int]] = []
        width = count = 0  # of the micro-batch that is being filled
        for row in sorted(rows[start : start + window], key=lambda row: -longest[row]):
            if not done or (count + sequences[row]) * width > budget:
                done.append([])
                width, count = longest[row], 0
            done[-1].append(int(row))
            count += sequences[row]
        if random is not None:
            random.shuffle(done)
        batches += done
    return batches + [[] for _ in range(-len(batches) % multiple)]


def pack_rows(
    rows: Sequence[int] | NDArray[np.int64],
    tokens: NDArray[np.int64],  # of every row of the dataset
    budget: int,
    multiple: int = 1,
    random: np.random.Generator | None = None,
) -> list[list[int]]:
    """Packs whole rows into micro-batches of at most ``budget`` tokens; their number is a multiple of ``multiple``.

    Windows of rows are packed by best fit, longest first. Rows of a micro-batch that is less than 97 % full go into the
    next window. So gaps remain only at the end of the epoch, where they are spread over all ranks.
    """
    window = max(1, int(_WINDOW_BATCHES * budget / max(1.0, tokens[rows].mean()))) if len(rows) else 1
    full: list[list[int]] = []
    rest: list[int] = []
    for start in range(0, len(rows), window):
        batches = _best_fit([*rest, *rows[start : start + window]], tokens, budget)
        done = [batch for batch in batches if tokens[batch].sum() >= _FULL * budget]
        rest = [row for batch in batches if tokens[batch].sum() < _FULL * budget for row in batch]
        if random is not None:
            random.shuffle(done)  # best fit puts the longest rows into the first micro-batches
        full += done
    return _with_even_end(full, _best_fit(rest, tokens, budget), tokens, budget, multiple)


def _with_even_end(
    full: list[list[int]], last: list[list[int]], tokens: NDArray[np.int64], budget: int, multiple: int
) -> list[list[int]]:
    """Pads ``full + last`` with empty micro-batches to a multiple; spreads rows evenly over the last steps.

    Ranks wait for each other in every step, so uneven micro-batches cost time. If the rows of the last step are too few
    to spread evenly, up to two full steps before it are evened out together with it.
    """
    best: list[list[int]] = []
    smallest_gap = np.inf
    for steps_back in range(3):
        whole = max(len(full) // multiple - steps_back, 0) * multiple
        end = full[whole:] + last
        end = _even(end + [[]] * (-len(end) % multiple), tokens, budget)
        end.sort(key=lambda batch: -tokens[batch].sum())  # puts micro-batches of similar size into one step
        loads = np.array([tokens[batch].sum() for batch in end]).reshape(-1, multiple)
        gap = np.max((loads.max(axis=1) - loads.min(axis=1)) / loads.max(axis=1), initial=0.0)
        if gap < smallest_gap:
            best, smallest_gap = full[:whole] + end, gap
        if smallest_gap <= 1 - _FULL:
            break
    return best


def pack_in_order(rows: Iterable[Row], tokens: Callable[[Row], int], budget: int) -> Iterator[list[Row]]:
    """Packs whole rows into micro-batches of at most ``budget`` tokens, and nearly keeps their order.

    A micro-batch takes rows in order until one does not fit. The gap is filled with rows of the following ``_AHEAD``
    micro-batches, the longest that fits first. So no row comes later than in order, and none comes more than ``_AHEAD``
    micro-batches earlier.
    """
    rows = iter(rows)
    waiting: list[tuple[int, Row]] = []  # (tokens, row) in order
    held = 0  # tokens of the waiting rows
    while True:
        # Read ahead.
        while held < (1 + _AHEAD) * budget and (row := next(rows, None)) is not None:
            waiting.append((int(tokens(row)), row))
            held += waiting[-1][0]
        if not waiting:
            return
        # Take rows in order, then fill the gap.
        turn = list(itertools.accumulate(need for need, _ in waiting))
        taken = list(range(bisect.bisect_right(turn, budget)))
        room = budget - (turn[taken[-1]] if taken else 0)
        for place in sorted(range(len(taken), len(waiting)), key=lambda place: -waiting[place][0]):
            if waiting[place][0] <= room:
                taken.append(place)
                room -= waiting[place][0]
        assert taken, "a row longer than the budget"
        yield [waiting[place][1] for place in taken]
        held -= budget - room
        left = set(range(len(waiting))).difference(taken)
        waiting = [waiting[place] for place in sorted(left)]


def split_to(batches: list[list[int]], count: int, multiple: int = 1) -> list[list[int]]:
    """Splits steps of ``multiple`` micro-batches in two until there are ``count`` micro-batches.

    The split steps are spread evenly over the epoch, and both halves take the place of the step. If no step can be
    split further, empty micro-batches are appended.
    """
    steps = [batches[i : i + multiple] for i in range(0, len(batches), multiple)]
    while missing := count // multiple - len(steps):
        can_split = [i for i, step in enumerate(steps) if any(len(batch) > 1 for batch in step)]
        if not can_split:
            steps += [[[] for _ in range(multiple)] for _ in range(missing)]
            break
        now = min(missing, len(can_split))
        chosen = {can_split[i * len(can_split) // now] for i in range(now)}
        steps = [part for i, step in enumerate(steps) for part in (_halves(step) if i in chosen else [step])]
    return [batch for step in steps for batch in step]


def _halves(step: list[list[int]]) -> list[list[list[int]]]:
    """Splits each micro-batch into every other row, because its rows may be sorted by length."""
    return [[batch[half::2] for batch in step] for half in (0, 1)]


def _best_fit(rows: Sequence[int], tokens: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Packs the longest rows first, each into the fullest micro-batch that has room for it."""
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


def _even(
    batches: list[list[int]], tokens: NDArray[np.int64], budget: float = np.inf, most_rows: float = np.inf
) -> list[list[int]]:
    """Distributes the rows over the same number of micro-batches, longest first, each to the emptiest one with room."""
    loads = np.zeros(len(batches))
    even: list[list[int]] = [[] for _ in batches]
    for row in sorted((row for batch in batches for row in batch), key=lambda row: (-tokens[row], row)):
        emptiest = int(loads.argmin())
        even[emptiest].append(row)
        loads[emptiest] = loads[emptiest] + tokens[row] if len(even[emptiest]) < most_rows else np.inf
    fits = all(tokens[batch].sum() <= budget for batch in even)
    return even if fits else batches
