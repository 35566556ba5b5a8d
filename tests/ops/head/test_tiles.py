"""Checks of pairs, what a loss sees of the pairs of one tile, and the row stride of a tile."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from cpt_kernels.losses import PairLogps, user_loss
from cpt_kernels.ops.head.tiles import row_stride
from cpt_kernels.ops.linear_preference import linear_preference_loss
from cpt_kernels.ops.vocab_score import VocabScore
from tests.helpers.heads import Head


@pytest.mark.parametrize("general", [False, True])
def test_pairs_that_are_not_of_these_rows(general):
    """Rows outside all blocks would be in no tile: their gradients would be whatever was in memory."""
    head = Head().tile(7, 4)
    leaves, pairs = head.leaves(torch.float32), head.pairs()
    wrong = {
        "completion_lengths describes": replace(pairs, completion_lengths=[*pairs.completion_lengths[:-1], 1000]),
        "completions .* tokens.*, but cu_completions has": replace(
            pairs, completion_lengths=pairs.completion_lengths[:-1]
        ),
        "pair_blocks cover": replace(pairs, pair_blocks=pairs.pair_blocks[:-1]),
        "pair_blocks cover .* pairs; expected": replace(
            pairs, pair_blocks=[*pairs.pair_blocks[:-1], (pairs.pair_blocks[-1][0], 0)]
        ),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            linear_preference_loss(
                leaves["hidden"],
                leaves["weight"],
                head.targets,
                given,
                head.loss,
                None,
                head.options,
                general=general,
            )


@pytest.mark.parametrize("side", ["chosen", "rejected", "sft_targets"])
def test_a_pair_that_reaches_into_another_block(side):
    """If a tile ended between the two blocks, the pair would read log-probs of other completions, or of none."""
    head = Head(blocks=[([4, 3], [(0, 1, 0)]), ([2, 5, 3], [(0, 1, 2)] * 2)])
    leaves, pairs = head.leaves(torch.float32), head.pairs()
    for pair, index, message in (
        (0, 2, f"pair 0 is in block 0, but its {side} completion 2 is in block 1"),
        (2, 1, f"pair 2 is in block 1, but its {side} completion 1 is in block 0"),
        (1, -1, f"pair 1 is in block 1, but its {side} completion -1 is in no block"),
        (1, 5, f"pair 1 is in block 1, but its {side} completion 5 is in no block"),
    ):
        wrong = getattr(pairs, side).clone()
        wrong[pair] = index
        with pytest.raises(ValueError, match=f"{message}$"):
            linear_preference_loss(
                leaves["hidden"], leaves["weight"], head.targets, replace(pairs, **{side: wrong}), head.loss
            )


def test_pair_logps_of_a_part():
    """A loss sees the same of a tile's pairs as of these pairs in the whole batch."""
    head = Head()
    loss = user_loss(lambda numbers: numbers.chosen, needs_tails=True, needs_log_sum_sq=True, needs_gap=True)
    loss = replace(loss, needs_hard=True)
    pairs, sums = head.pairs(), torch.arange(len(head.lengths), dtype=torch.float64)
    tokens = VocabScore(*torch.rand(6, sum(head.lengths), dtype=torch.float64))
    whole, completion, pair = pairs.pair_logps(sums, loss=loss, tokens=tokens), 0, 0
    for completions, block_pairs in pairs.pair_blocks:
        last = (completion + completions, pair + block_pairs)
        rows = slice(pairs.cu_completions[completion], pairs.cu_completions[last[0]])
        part_tokens = VocabScore(*(tensor[rows] for tensor in tokens))
        part = pairs.pair_logps(sums[completion : last[0]], (completion, pair), last, loss, part_tokens)
        for name in (field.name for field in fields(PairLogps) if field.name != "tokens_per_pair"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[pair : last[1]]), name
        completion, pair = last
    assert (completion, pair) == (len(head.lengths), len(head.chosen))


@pytest.mark.parametrize("columns", [1, 64, 1000, 32000, 32768, 131072])
def test_rows_of_a_tile_do_not_evict_each_other(columns):
    stride = row_stride(columns, torch.device("cpu"))
    assert columns <= stride < columns + 128
    assert len({row * stride * 4 % 4096 for row in range(16)}) == 16
