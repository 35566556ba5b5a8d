"""Tests which beginnings sequences share, and the batches that follow, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.trees import find_branches
from tests.helpers.exactness import sequences_in
from tests.helpers.trees import random_paths, tree_rows


def _nodes(paths: list[list[int]]) -> int:
    """Returns the tokens of a trie: every beginning counts once."""
    return len({tuple(path[: end + 1]) for path in paths for end in range(len(path))})


@pytest.mark.parametrize("seed", range(30))
def test_every_token_of_a_trie_is_run_once(seed):
    random = np.random.default_rng(seed)
    paths = [path for _ in range(3) for path in random_paths(random)]
    paths = [paths[i] for i in random.permutation(len(paths))]
    arrays = [np.array(path) for path in paths]
    branches = find_branches(arrays, [int(random.integers(1, len(path))) for path in paths])
    assert sorted(s for branch in branches for s in branch.sequences) == list(range(len(paths)))
    before: list[int] = []
    tokens = 0
    for branch in branches:
        path = paths[branch.sequences[-1]]
        assert before[: branch.shared] == path[: branch.shared] and branch.shared < len(path)
        # Sequences end one after the other in the branch's own tokens.
        ends = [branch.shared + 1, *(len(paths[s]) for s in branch.sequences)]
        assert ends == sorted(ends) and all(paths[s] == path[: len(paths[s])] for s in branch.sequences)
        before, tokens = path, tokens + len(path) - branch.shared
    assert tokens == _nodes(paths)


@pytest.mark.parametrize("minimum", [2, 4, 10])
@pytest.mark.parametrize("seed", range(5))
def test_short_beginnings_are_not_shared(seed, minimum):
    rows = tree_rows(seed)
    whole, some, none = (PackedCollator(minimum_shared=m)(rows) for m in (1, minimum, None))
    assert whole["input_ids"].numel() <= some["input_ids"].numel() <= none["input_ids"].numel()
    assert set(sequences_in(some)) == set(sequences_in(whole)) == set(sequences_in(none))
    # Each segment saves so many tokens, or shares a whole prompt.
    prompts = {len(prompt) for prompt, _ in sequences_in(some)}
    assert all(
        keys - queries in prompts | {0} or keys - queries >= minimum for queries, keys in some["segment_lengths"]
    )


def test_a_conversation_with_a_pair_at_every_turn():
    """Turn k's prompt is turn k - 1's prompt and chosen answer: pair blocks have two completions."""
    rows, prompt = [], [5, 6, 7]
    for turn in range(6):
        chosen, rejected = [10 + turn, 11, 12], [20 + turn, 21]
        rows.append({"prompt_ids": prompt, "completion_ids": [chosen, rejected], "chosen": [0], "rejected": [1]})
        rows[-1]["targets"] = [0]
        prompt = [*prompt, *chosen, 30, 31]
    batch = PackedCollator(minimum_shared=1)(rows)
    assert batch["input_ids"].numel() == 3 + 6 * (3 + 2) + 5 * 2 and batch["token_index"] is None
    assert batch["pair_blocks"] == [(2, 1)] * 6 and len(batch["segment_lengths"]) == 7
    assert [batch[name].tolist() for name in ("chosen", "rejected")] == [[1, 3, 5, 7, 9, 10], [0, 2, 4, 6, 8, 11]]


@pytest.mark.parametrize("seed", range(10))
def test_batches_of_trees(seed):
    rows = tree_rows(seed)
    batch, plain = PackedCollator(minimum_shared=1)(rows), PackedCollator()(rows)
    sequences, others = sequences_in(batch), sequences_in(plain)
    assert sorted(sequences) == sorted(others) and len(set(sequences)) == len(sequences)
    sides = ("chosen", "rejected", "sft_targets")
    found, expected = (
        sorted(tuple(each[i] for i in pair) for pair in zip(*(b[side].tolist() for side in sides)))
        for each, b in ((sequences, batch), (others, plain))
    )
    assert found == expected
    for name in ("num_pairs", "num_chosen_tokens", "num_sequence_tokens"):
        assert batch[name] == plain[name]

    # Every prediction belongs to one block, whose predictions and tokens are consecutive.
    index, lengths = batch["token_index"], batch["completion_lengths"]
    assert len(batch["targets"]) == len(set(zip(*(batch[n].tolist() for n in ("predictor_index", "targets")))))
    assert sum(batch["prediction_lengths"]) == len(batch["targets"]) == len(batch["predictors"])
    row = completion = 0
    parts = index.split(lengths)
    for completions, _ in batch["pair_blocks"]:
        own = slice(completion, completion + completions)
        used = torch.cat(parts[own]).unique()
        assert used.tolist() == list(range(row, row + sum(batch["prediction_lengths"][own])))
        row, completion = row + len(used), own.stop
    assert torch.equal(index[batch["token_order"]], index.sort().values)
    assert batch["token_offsets"].tolist() == [0, *torch.bincount(index).cumsum(0).tolist()]


def test_rows_without_deeper_sharing_are_packed_as_ever():
    rows = [
        {
            "prompt_ids": [5, 6],
            "completion_ids": [[7, 8], [9], [10, 11]],
            "chosen": [2],
            "rejected": [0],
            "targets": [2],
        },
        {"prompt_ids": [12], "completion_ids": [[13]], "chosen": [], "rejected": [], "targets": []},
        {"prompt_ids": [14, 15], "completion_ids": [[7], [8, 9]], "chosen": [0], "rejected": [1], "targets": [0]},
    ]
    found, expected = PackedCollator(minimum_shared=1)(rows), PackedCollator()(rows)
    for name, value in expected.items():
        pairs = zip(value, found[name]) if name.endswith("_rounds") else [([value], [found[name]])]
        for one, other in pairs:
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b) for a, b in zip(one, other)
            ), name


def test_sequences_beyond_the_limit_share_nothing():
    rows = [
        {
            "prompt_ids": [1, 2, 3],
            "completion_ids": [[4], [4, 5], [4, 5, 6, 7]],
            "chosen": [],
            "rejected": [],
            "targets": [],
        }
    ]
    batch = PackedCollator(share_limit=5, minimum_shared=1)(rows)
    assert batch["segment_lengths"] == [(5, 5), (7, 7)] and batch["completion_lengths"] == [1, 2, 4]
