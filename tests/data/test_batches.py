"""Tests the micro-batches of data/batches.py: all rows occur, order is kept, epochs are equally long, ranks agree."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from cpt_kernels.data.batches import _AHEAD, BatchSampler, pack_in_order, pack_padded, pack_rows, split_to
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.curriculum import Curriculum, Draws
from cpt_kernels.data.loader import longest_sequence, row_tokens
from tests.helpers.exactness import make_rows

BUDGET = 4096


def lengths(count: int, seed: int = 0, scale: float = 330.0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(np.log(scale), 0.7, count).clip(20, 1400).astype(np.int64)


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def leveled(easy: int, hard: int, **more) -> tuple[Draws, np.ndarray]:
    """Returns draws over long easy rows and short hard rows, and the lengths of the rows."""
    option = {"levels": ["a>b", "a>c"], **more}
    tokens = np.concatenate([lengths(easy, scale=500.0), lengths(hard, seed=1, scale=200.0)])
    return Draws(Curriculum.parse(option), ["a>b"] * easy + ["a>c"] * hard, seed=3), tokens


@pytest.mark.parametrize("budget", [1400, 2048, BUDGET, 16384])
def test_packing_in_order(budget):
    tokens = lengths(3000)
    batches = list(pack_in_order(range(3000), tokens.__getitem__, budget))
    assert sorted(flat(batches)) == list(range(3000))
    assert max(tokens[batch].sum() for batch in batches) <= budget
    assert tokens.sum() / (len(batches) * budget) > {1400: 0.93, 2048: 0.97}.get(budget, 0.985)
    waiting = list(range(3000))
    for batch in batches:
        in_turn = np.searchsorted(np.cumsum(tokens[waiting]), budget, side="right")
        assert set(waiting[:in_turn]) <= set(batch), "a row came later than in order"
        before = np.cumsum(tokens[waiting]) - tokens[waiting]
        assert all(before[waiting.index(row)] < (1 + _AHEAD) * budget for row in batch), "a row came too early"
        waiting = [row for row in waiting if row not in set(batch)]


def test_packing_in_order_reads_only_as_far_as_it_looks():
    read = []
    rows = iter(lambda: read.append(100) or 100, None)  # endless
    first = next(pack_in_order(rows, int, 1000))
    assert len(first) == 10 and len(read) == 10 * (1 + _AHEAD)
    assert list(pack_in_order([], int, 10)) == []
    with pytest.raises(AssertionError, match="longer than the budget"):
        list(pack_in_order([11], int, 10))


def share_differences(batches: list[list[int]], order: np.ndarray, level: np.ndarray, count: int) -> list[float]:
    """Returns, for each of `parts` parts of the run, how far the share of hard rows is from that of the given order."""
    differences, start = [], 0
    for part in np.array_split(np.arange(len(batches)), count):
        rows = flat([batches[i] for i in part])
        differences.append(abs(level[rows].mean() - level[order[start : start + len(rows)]].mean()))
        start += len(rows)
    return differences


@pytest.mark.parametrize(("rows", "parts", "bound"), [(4000, 20, 0.01), (400, 5, 0.03)])
def test_packing_keeps_the_shares_of_a_curriculum(rows, parts, bound):
    """In each part of a run of 829 (80) micro-batches, the share of hard rows is within 0.01 (0.03) of the drawn share.

    Hard rows are short here, and short rows fill gaps. Packing in windows of 64 micro-batches is far off.
    """
    draws, tokens = leveled(rows, rows)
    order = draws.epoch(0)
    batches = list(BatchSampler(tokens, max_tokens=BUDGET, draws=draws))
    assert sorted(flat(batches)) == sorted(order.tolist())
    assert max(share_differences(batches, order, draws.level, parts)) < bound
    windows = pack_rows(order.tolist(), tokens, BUDGET, random=np.random.default_rng(0))
    assert max(share_differences(windows, order, draws.level, parts)) > 5 * bound


@pytest.mark.parametrize("max_tokens", [None, BUDGET])
def test_ranks_split_one_plan(max_tokens):
    draws, tokens = leveled(150, 151)
    samplers = [BatchSampler(tokens, 4, max_tokens, draws=draws, world_size=2, rank=rank) for rank in (0, 1)]
    for sampler in samplers:
        sampler.plan_epochs(3)
    alone = BatchSampler(tokens, 8, max_tokens, draws=draws)
    for epoch in (0, 2, 1):
        for sampler in (*samplers, alone):
            sampler.set_epoch(epoch)
        first, second = map(list, samplers)
        assert len(first) == len(second) == len(samplers[0])
        assert Counter(flat(first) + flat(second)) == Counter(flat(list(alone))) == Counter(draws.epoch(epoch).tolist())
        if max_tokens is None:  # in every step, two ranks of 4 rows take the rows that one rank of 8 takes
            assert [sorted(a + b) for a, b in zip(first, second)] == list(map(sorted, alone))


def test_epochs_have_as_many_micro_batches_though_levels_differ_in_length():
    """Later epochs draw only short rows and need fewer steps, so steps are split; the order of rows is kept."""
    draws, tokens = leveled(300, 300)
    sampler = BatchSampler(tokens, max_tokens=BUDGET, draws=draws, world_size=2)
    sampler.plan_epochs(2)
    plans = [sampler._epoch(epoch) for epoch in (0, 1)]
    assert len(plans[0]) == len(plans[1]) == 2 * len(sampler) and len(sampler._plan(1)) < 0.7 * len(plans[1])
    for epoch, plan in enumerate(plans):
        assert Counter(flat(plan)) == Counter(draws.epoch(epoch).tolist())
        assert max(tokens[batch].sum() for batch in plan) <= BUDGET
    assert min(map(len, plans[1])) > 0 and 0.95 < sampler.fill <= 1


def test_splitting_steps():
    assert split_to([[1, 2, 3], [4]], 3) == [[1, 3], [2], [4]]
    assert split_to([[1, 2, 3, 4], [5, 6]], 6) == [[1], [3], [2], [4], [5], [6]]
    assert split_to([[1, 2], [3, 4], [5], []], 6, multiple=2) == [[1], [3], [2], [4], [5], []]
    assert split_to([[1]], 3) == [[1], [], []]
    even = split_to([[i, i + 1] for i in range(0, 20, 2)], 15)
    assert flat(even) == list(range(20)) and [len(batch) for batch in even] == [1, 1, 2] * 5


@pytest.mark.parametrize(("steps", "micro_batches"), [(3, 1), (10, 4), (31, 5)])
def test_count_draws_matches_the_rows_that_a_trainer_takes(steps, micro_batches):
    draws, tokens = leveled(60, 30)
    sampler = BatchSampler(tokens, 4, draws=draws, world_size=2)
    taken: Counter[int] = Counter()
    left = steps
    for epoch in range(11):
        batches = iter(sampler._epoch(epoch))
        while left and (step := list(itertools.islice(batches, 2 * micro_batches))):
            taken.update(flat(step))
            left -= 1
    assert left == 0
    assert sampler.count_draws(steps, micro_batches).tolist() == [taken[row] for row in range(90)]


@pytest.mark.parametrize("case", ["by rows", "by tokens", "a curriculum by tokens"])
def test_steps_have_the_same_rows_on_any_number_of_ranks(case):
    """The plan is the same for 4 micro-batches per step on any number of ranks."""
    draws, tokens = leveled(300, 300) if "curriculum" in case else (None, lengths(601))
    by = {"max_tokens": BUDGET} if "tokens" in case else {"batch_size": 3}

    def steps(world: int) -> list[list[list[int]]]:
        parts = []
        for rank in range(world):
            sampler = BatchSampler(tokens, world_size=world, rank=rank, micro_batches=4 // world, draws=draws, **by)
            sampler.plan_epochs(3)
            epochs = []
            for epoch in range(3):
                sampler.set_epoch(epoch)
                batches = list(sampler)
                assert len(batches) == len(sampler)
                epochs.append([flat(batches[i : i + 4 // world]) for i in range(0, len(batches), 4 // world)])
            parts.append(epochs)
        return [[sorted(flat(step)) for step in zip(*epoch)] for epoch in zip(*parts)]

    alone = steps(1)
    assert steps(2) == alone and steps(4) == alone and len(alone[0]) > 5
    assert alone[0] != alone[1]


@pytest.mark.parametrize(("world", "micro_batches", "most"), [(64, 1, 0.03), (8, 1, 0.03), (16, 4, 0.03)])
def test_ranks_that_take_rows_wait_little(world, micro_batches, most):
    """Every step has the shuffled rows of one rank, each rank as many as asked for, and all ranks as many tokens."""
    tokens = np.random.default_rng(0).lognormal(6.5, 0.6, 20_480).clip(max=3072).astype(np.int64)
    sampler = BatchSampler(tokens, batch_size=8, world_size=world, micro_batches=micro_batches)
    alone = BatchSampler(tokens, batch_size=8 * world * micro_batches)
    plan, size = sampler._epoch(0), world * micro_batches
    steps = [plan[i : i + size] for i in range(0, len(plan), size)]
    assert [sorted(flat(step)) for step in steps] == list(map(sorted, alone))
    assert all(len(batch) == 8 for step in steps for batch in step)
    loads = np.array([tokens[batch].sum() for batch in plan]).reshape(-1, world)
    assert 1 - loads.sum() / (world * loads.max(axis=1).sum()) < most
    # In the order of the shuffle, ranks wait for a fifth of the time and more.
    order = np.concatenate(list(alone))
    naive = tokens[order].reshape(-1, world, 8).sum(2)
    assert 1 - naive.sum() / (world * naive.max(axis=1).sum()) > 0.15


@pytest.mark.parametrize("selected", [False, True])
def test_lengths_are_those_of_the_rows_that_are_selected(selected):
    rows = make_rows("sigmoid", seed=1) + make_rows("sigmoid", seed=2)
    data = concatenate_datasets([Dataset.from_list(rows[:3]), Dataset.from_list(rows[3:])])
    data = data.select([4, 1, 1, 5, 0]).select([3, 2, 0]) if selected else data.select(range(1, 5))
    for layout in (PackedCollator(), PackedCollator(max_length=9, share_prompts=False)):
        assert row_tokens(data, layout).tolist() == row_tokens(list(data), layout).tolist()
    assert longest_sequence(data, None)[0] == max(
        len(row["prompt_ids"] + ids) for row in data for ids in row["completion_ids"]
    )


def test_padded_micro_batches_hold_every_row_once_within_the_budget():
    random = np.random.default_rng(0)
    longest, sequences = random.integers(1, 50, 200), random.integers(1, 5, 200)
    batches = pack_padded(np.arange(200), longest, sequences, 256, multiple=3, random=random)
    assert sorted(row for batch in batches for row in batch) == list(range(200)) and len(batches) % 3 == 0
    assert all(sequences[batch].sum() * longest[batch].max() <= 256 for batch in batches if batch)
    padded = sum(sequences[batch].sum() * longest[batch].max() for batch in batches if batch)
    assert (longest * sequences).sum() > 0.9 * padded  # rows of similar length share a micro-batch
    sampler = BatchSampler(longest, sequences=sequences, max_tokens=256)
    assert sampler.fill == (longest * sequences).sum() / (256 * len(sampler)) > 0.7
