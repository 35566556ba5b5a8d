"""Tests the collator: merged prompts and completions, counts, pair blocks, truncation, and batches without padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from cpt_kernels.data.collate import PackedBatch, PackedCollator
from cpt_kernels.data.truncation import truncate


def row(prompt, completions, pairs=(), targets=None, supervised=False) -> dict:
    """Returns a prepared row. Pairs are (chosen, rejected), or (chosen,) of a supervised row."""
    chosen = [pair[0] for pair in pairs]
    return {
        "prompt_ids": list(prompt),
        "completion_ids": [list(completion) for completion in completions],
        "chosen": chosen,
        "rejected": [] if supervised else [pair[1] for pair in pairs],
        "targets": chosen if targets is None else targets,
    }


def random_rows(seed: int) -> list[dict]:
    """Returns rows in which some prompts and some completions occur several times."""
    random = np.random.default_rng(seed)
    prompts = [random.integers(1, 50, random.integers(1, 8)).tolist() for _ in range(4)]
    rows = []
    for _ in range(random.integers(1, 8)):
        count = int(random.integers(2, 5))
        completions = [random.integers(1, 4, random.integers(1, 4)).tolist() for _ in range(count)]
        pairs = [tuple(random.permutation(count)[:2].tolist()) for _ in range(random.integers(0, 4))]
        targets = random.integers(0, count, len(pairs)).tolist()
        rows.append(row(prompts[random.integers(len(prompts))], completions, pairs, targets))
    return rows


def sequences(batch: PackedBatch) -> list[tuple[tuple, tuple]]:
    """Returns (prompt, completion) of every completion, read from the keys of its segment and from its targets."""
    keys = batch["input_ids"][0][batch["kv_index"]].split([k for _, k in batch["segment_lengths"]])
    completions = batch["targets"].split(batch["completion_lengths"])
    found = []
    for key, completion in zip(keys, completions):
        assert torch.equal(key[len(key) - len(completion) :], completion)
        found.append((tuple(key[: len(key) - len(completion)].tolist()), tuple(completion.tolist())))
    return found


def content(row: dict, i: int) -> tuple[tuple, tuple]:
    return tuple(row["prompt_ids"]), tuple(row["completion_ids"][i])


def test_the_example_of_the_docstring():
    batch = PackedCollator()([row([1, 2], [[3, 4], [5]], [(0, 1)]), row([6], [[7], [8, 9]], [(0, 1)])])
    lines = [line.split() for line in PackedBatch.__doc__.splitlines()]
    shown = {}
    for name, *words in (line for line in lines if line and line[0] in batch):
        numbers = list(itertools.takewhile(lambda word: word.isdigit() or word == "|", words))
        shown[name] = [int(word) for word in numbers if word != "|"]
    assert len(shown) == 11
    for name, numbers in shown.items():
        assert torch.as_tensor(batch[name]).flatten().tolist() == numbers, name


@pytest.mark.parametrize("seed", range(5))
def test_gaps_go_with_their_pairs(seed):
    """After pairs are sorted and completions merged, each gap is still the difference of its completions' ratings."""
    rows = random_rows(seed)

    def value(ids: list[int]) -> float:
        return float(sum(ids) + 10 * len(ids))  # depends on the content only, so merged completions have one rating

    scored = [r | {"scores": [value(ids) for ids in r["completion_ids"]]} for r in rows]
    batch = PackedCollator()(scored)
    parts = batch["targets"].split(batch["completion_lengths"])
    values = torch.tensor([value(part.tolist()) for part in parts])
    assert torch.equal(batch["gaps"], values[batch["chosen"]] - values[batch["rejected"]])
    assert PackedCollator()(rows)["gaps"] is None or not batch["num_pairs"]
    some = PackedCollator()([row([1], [[2], [3]], [(0, 1)]), row([4], [[5], [6]], [(0, 1)]) | {"scores": [1.0, 0.0]}])
    assert some["gaps"] is None
    assert PackedCollator()([row([1], [[2]], [(0,)], supervised=True) | {"scores": []}])["gaps"] is None


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("seed", range(20))
def test_batches_by_brute_force(seed, share):
    rows = random_rows(seed)
    batch = PackedCollator(share_prompts=share)(rows)
    unique = list(dict.fromkeys(content(r, i) for r in rows for i in range(len(r["completion_ids"]))))
    found = sequences(batch)
    assert sorted(found) == sorted(unique)

    # No padding and no repetition: T is the total length of the unique prompts and completions.
    prompts = dict.fromkeys(prompt for prompt, _ in unique) if share else [prompt for prompt, _ in unique]
    assert batch["input_ids"].shape == (1, sum(map(len, prompts)) + sum(len(completion) for _, completion in unique))
    assert batch["position_ids"].shape == batch["input_ids"].shape
    assert batch["shared"] == (share and len(prompts) < len(unique))

    # The pairs, in any order.
    edges = [
        (content(r, w), content(r, y), content(r, x))
        for r in rows
        for w, y, x in zip(r["chosen"], r["targets"], r["rejected"])
    ]
    sides = [batch[name].tolist() for name in ("chosen", "sft_targets", "rejected")]
    assert sorted(tuple(found[i] for i in pair) for pair in zip(*sides)) == sorted(edges)
    assert batch["num_pairs"] == len(edges)
    assert batch["num_chosen_tokens"] == sum(len(w[1]) for w, _, _ in edges)
    assert batch["num_sequence_tokens"] == sum(len(s[0]) + len(s[1]) for w, _, x in edges for s in (w, x))

    # Pair blocks cover all completions and pairs, and no pair crosses the boundary of its block.
    assert [sum(part) for part in zip(*batch["pair_blocks"])] == [len(unique), len(edges)]
    completion = pair = 0
    for completions, pairs in batch["pair_blocks"]:
        for side in sides:
            assert all(completion <= i < completion + completions for i in side[pair : pair + pairs])
        completion, pair = completion + completions, pair + pairs


@pytest.mark.parametrize("seed", range(5))
def test_scatter_rounds_add_up_the_gradients_of_gathered_rows(seed):
    batch = PackedCollator()(random_rows(seed))
    for name in ("kv", "predictor"):
        index, total = batch[f"{name}_index"], torch.zeros(batch["input_ids"].shape[1], dtype=torch.float64)
        gradient = torch.rand(len(index), dtype=torch.float64)
        for rows, sources in batch[f"{name}_rounds"]:
            total[rows] += gradient[sources]
        torch.testing.assert_close(total, torch.zeros_like(total).index_add(0, index, gradient))


def test_equal_prompts_and_completions_are_run_once():
    rows = [
        row([1, 2], [[3], [4, 5]], [(0, 1)]),
        row([1, 2], [[4, 5], [6]], [(0, 1)]),
        row([9], [[3], [4]], [(1, 0)]),
        row([1, 2], [[3], [4, 5]], [(0, 1)]),  # repeats the first row: one pair more, no token more
    ]
    batch = PackedCollator()(rows)
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 4, 5, 6, 9, 3, 4]
    assert sequences(batch)[:3] == [((1, 2), (3,)), ((1, 2), (4, 5)), ((1, 2), (6,))]
    assert list(zip(batch["chosen"].tolist(), batch["rejected"].tolist())) == [(0, 1), (0, 1), (1, 2), (4, 3)]
    assert batch["pair_blocks"] == [(3, 3), (2, 1)] and batch["num_chosen_tokens"] == 5


def test_targets_of_the_regularizer():
    batch = PackedCollator()([row([1], [[2], [3], [4, 4]], [(0, 1), (1, 0)], targets=[2, 1])])
    assert batch["sft_targets"].tolist() == [2, 1]
    assert PackedCollator()([row([1], [[2], [3]], [(1, 0)])])["sft_targets"].tolist() == [1]


def test_supervised_rows_have_no_rejected_side():
    batch = PackedCollator()(
        [row([1], [[2], [3, 3]], [(0,), (1,)], supervised=True), row([4], [[5]], [(0,)], supervised=True)]
    )
    assert batch["rejected"] is None and batch["chosen"].tolist() == batch["sft_targets"].tolist() == [0, 1, 2]
    assert batch["pair_blocks"] == [(1, 1)] * 3 and batch["num_chosen_tokens"] == 4


def test_a_completion_in_no_pair_is_a_pair_block_without_pairs():
    batch = PackedCollator()([row([1], [[2], [3], [4]], [(0, 1)]), row([5], [[6]])])
    assert batch["pair_blocks"] == [(2, 1), (1, 0), (1, 0)] and batch["num_pairs"] == 1


def test_no_rows():
    """A rank without rows runs one token, without a pair."""
    batch = PackedCollator(pad_token_id=7, reference=lambda sequences: pytest.fail("nothing to look up"))([])
    assert batch["input_ids"].tolist() == [[7, 7]] and batch["position_ids"].tolist() == [[0, 1]]
    assert batch["num_pairs"] == batch["num_chosen_tokens"] == 0 and batch["pair_blocks"] == [(1, 0)]
    for name in ("chosen", "rejected", "sft_targets"):
        assert batch[name].shape == (0,) and batch[name].dtype == torch.int64
    assert batch["ref_token_logps"].shape == (1,) and batch["ref_missing"] == []


# --- Truncation ---


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("seed", range(8))
def test_truncation(seed, mode):
    rows = random_rows(seed)
    for r in rows:
        r["prompt_ids"] = r["prompt_ids"][:4]
    batch = PackedCollator(max_length=5, truncation_mode=mode)(rows)
    cut = {
        tuple(map(tuple, truncate(r["prompt_ids"], completion, 5, mode)))
        for r in rows
        for completion in r["completion_ids"]
    }
    assert set(sequences(batch)) == cut and max(len(p) + len(c) for p, c in sequences(batch)) <= 5


def test_keep_end_leaves_chosen_and_rejected_with_different_prompts():
    batch = PackedCollator(max_length=5, truncation_mode="keep_end")([row([1, 2, 3, 4], [[5], [6, 7, 8]], [(0, 1)])])
    assert sequences(batch) == [((1, 2, 3, 4), (5,)), ((3, 4), (6, 7, 8))]
    assert not batch["shared"] and batch["pair_blocks"] == [(2, 1)]
    assert batch["chosen"].tolist() == [0] and batch["rejected"].tolist() == [1]


def test_keep_end_can_merge_prompts_that_were_different():
    rows = [row([1, 2, 3], [[5, 6], [7, 8]], [(0, 1)]), row([9, 9, 3], [[5, 6], [8, 8]], [(0, 1)])]
    batch = PackedCollator(max_length=3, truncation_mode="keep_end")(rows)
    assert batch["input_ids"].tolist() == [[3, 5, 6, 7, 8, 8, 8]]
    assert batch["chosen"].tolist() == [0, 0] and batch["rejected"].tolist() == [1, 2]


def test_completions_of_which_nothing_is_left():
    """Without a prompt, the first token becomes one. The filter drops the pairs of a completion that is empty then."""
    batch = PackedCollator()([row([], [[5], [6, 7], [6, 8, 9]], [(1, 2)])])
    assert sequences(batch) == [((6,), (7,)), ((6,), (8, 9))]
    assert batch["chosen"].tolist() == [0] and batch["rejected"].tolist() == [1]


# --- Sharing and references ---


def test_long_groups_do_not_share():
    rows = [row([1, 2, 3], [[4], [5, 6]], [(0, 1)]), row([7, 8], [[4], [5, 6]], [(0, 1)])]
    batch = PackedCollator(share_limit=4)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 3, 5, 6, 7, 8, 4, 5, 6]]
    assert batch["segment_lengths"] == [(4, 4), (5, 5), (3, 3), (2, 4)] and batch["shared"]


def test_reference_log_probs_are_in_the_order_of_the_targets():
    def reference(sequences):
        assert all(isinstance(ids, tuple) for sequence in sequences for ids in sequence)
        return np.array([-sum(p) - token / 64 for p, c in sequences for token in c], dtype=np.float32)

    batch = PackedCollator(reference=reference)(random_rows(3))
    assert batch["ref_token_logps"].dtype == torch.float32
    assert batch["ref_token_logps"].tolist() == reference(sequences(batch)).tolist()
    assert PackedCollator()(random_rows(3))["ref_token_logps"] is None


def test_missing_reference_log_probs_are_named_and_are_nan():
    def reference(sequences):
        return np.array([np.nan if c == (3, 3) else 0.0 for _, c in sequences for _ in c], dtype=np.float32)

    batch = PackedCollator(reference=reference)([row([1], [[2], [3, 3], [4]], [(0, 1), (0, 2)])])
    assert batch["ref_missing"] == [(1, (1,), (3, 3))]
    assert batch["ref_token_logps"].isnan().tolist() == [False, True, True, False]
