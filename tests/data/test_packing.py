"""Tests index arrays of packed rows by brute force: tokens carry their identity, and the arrays must agree with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cpt_kernels.data.packing import GroupLengths, Layout, pack, pair_block_boundaries, scatter_rounds

Token = tuple[int, int, int, int]  # group, copy of its prompt, completion or -1 for the prompt, index in the piece


def random_groups(seed: int) -> list[GroupLengths]:
    random = np.random.default_rng(seed)
    return [
        GroupLengths(
            int(random.integers(1, 9)), random.integers(1, 7, random.integers(1, 5)).tolist(), random.random() < 0.7
        )
        for _ in range(random.integers(1, 8))
    ]


def tokens_of(groups: list[GroupLengths]) -> list[Token]:
    """Returns the packed row, token by token."""
    row: list[Token] = []
    for g, group in enumerate(groups):
        for i, length in enumerate(group.completions):
            copy = 0 if group.share else i
            if i == 0 or not group.share:
                row += [(g, copy, -1, t) for t in range(group.prompt)]
            row += [(g, copy, i, t) for t in range(length)]
    return row


def position(token: Token, groups: list[GroupLengths]) -> int:
    group, _, completion, place = token
    return place if completion < 0 else groups[group].prompt + place


def segments(layout: Layout) -> list[tuple[range, list[int]]]:
    """Returns, for every attention segment, its queries and its keys as places in the row."""
    q, k = layout.cu_seqlens_q, layout.cu_seqlens_k
    return [(range(q[i], q[i + 1]), layout.kv_index[k[i] : k[i + 1]].tolist()) for i in range(len(q) - 1)]


@pytest.mark.parametrize("seed", range(25))
def test_pack_by_brute_force(seed):
    groups = random_groups(seed)
    layout, row = pack(groups), tokens_of(groups)
    assert len(row) == sum(group.tokens() for group in groups) == len(layout.position_ids)
    assert layout.position_ids.tolist() == [position(token, groups) for token in row]

    # Every token is a query of one segment, and sees its prompt and its completion up to itself, in order.
    asked: list[int] = []
    for queries, keys in segments(layout):
        for query in queries:
            asked.append(query)
            group, copy, completion, _ = row[query]
            last = len(keys) - (queries.stop - query)
            seen = [row[key] for key in keys[: last + 1]]
            expected = [t for t in row if t[:2] == (group, copy) and t[2] in (-1, completion)]
            if completion < 0:
                expected = [t for t in expected if t[2] == -1]
            assert seen == [t for t in expected if position(t, groups) <= position(row[query], groups)]
    assert asked == list(range(len(row)))


@pytest.mark.parametrize("seed", range(25))
def test_predictions_by_brute_force(seed):
    groups = random_groups(seed)
    layout, row = pack(groups), tokens_of(groups)
    predicted = [token for g, group in enumerate(groups) for token in row if token[0] == g and token[2] >= 0]
    assert len(layout.predictor_index) == len(predicted)
    for predictor, target in zip(layout.predictor_index, predicted):
        group, copy, completion, place = target
        before = (group, copy, completion, place - 1) if place else (group, copy, -1, groups[group].prompt - 1)
        assert row[predictor] == before
    lengths = [length for group in groups for length in group.completions]
    assert layout.cu_completions.tolist() == [0, *itertools.accumulate(lengths)]
    # The queries of a segment are a completion, the first one together with the prompt.
    assert len(layout.cu_seqlens_q) == len(lengths) + 1


def test_layout_of_one_small_row():
    layout = pack([GroupLengths(2, [1, 2]), GroupLengths(1, [2, 1], share=False)])
    assert layout.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 0, 1]
    assert layout.cu_seqlens_q.tolist() == [0, 3, 5, 8, 10]
    assert layout.cu_seqlens_k.tolist() == [0, 3, 7, 10, 12]
    assert layout.kv_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert layout.predictor_index.tolist() == [1, 1, 3, 5, 6, 8]
    assert layout.cu_completions.tolist() == [0, 1, 3, 5, 6]
    dtypes = {
        name: getattr(layout, name).dtype.name for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_index", "position_ids")
    }
    assert dtypes == {"cu_seqlens_q": "int32", "cu_seqlens_k": "int32", "kv_index": "int64", "position_ids": "int64"}


@pytest.mark.parametrize(("prompt", "completions"), [(0, [1]), (1, []), (1, [2, 0])])
def test_groups_that_cannot_be_packed(prompt, completions):
    with pytest.raises(AssertionError):
        pack([GroupLengths(prompt, completions)])


@pytest.mark.parametrize("seed", range(25))
def test_scatter_rounds_sum_like_add_at(seed):
    random = np.random.default_rng(seed)
    rows = int(random.integers(1, 40))
    index = random.integers(0, rows, random.integers(0, 90))
    gradient = random.normal(size=(len(index), 3))
    expected = np.zeros((rows, 3))
    np.add.at(expected, index, gradient)
    total = np.zeros((rows, 3))
    rounds = scatter_rounds(index, rows)
    for number, (to, source) in enumerate(rounds):
        assert len(set(to.tolist())) == len(to), "a row occurs twice in a round, which is a race"
        assert number > 0 or set(to) == set(index)
        total[to] += gradient[source]
    np.testing.assert_allclose(total, expected)
    assert len(rounds) == np.bincount(index, minlength=1).max()
    assert sorted(source for _, sources in rounds for source in sources) == list(range(len(index)))


def test_a_packed_row_has_as_many_rounds_as_its_largest_group_has_completions():
    layout = pack([GroupLengths(3, [1, 2]), GroupLengths(2, [1, 1, 1, 1]), GroupLengths(1, [5])])
    assert len(scatter_rounds(layout.kv_index, len(layout.position_ids))) == 4
    assert len(scatter_rounds(layout.predictor_index, len(layout.position_ids))) == 4


@pytest.mark.parametrize("seed", range(40))
def test_pair_block_boundaries_by_brute_force(seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(0, 12))
    edges = [
        tuple(random.integers(0, count, random.integers(1, 4)).tolist())
        for _ in range(random.integers(0, 5) if count else 0)
    ]
    allowed = [
        cut for cut in range(count + 1) if not any(min(edge) < cut <= max(edge) for edge in edges)
    ]  # boundary c is before completion c
    assert pair_block_boundaries(count, edges) == allowed
