"""Pairs with fixed and random log-probs on which the losses are tested."""

from __future__ import annotations

import torch

from cpt_kernels.losses import PairLogps


def _of(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two pairs. dw = lw - rw = 2 and -1.5, dl = ll - rl = -1 and 0.5, h = dw - dl = 3 and -2.
PAIRS = PairLogps(
    chosen=_of(-10, -8),
    rejected=_of(-15, -6),
    target=_of(-10, -4),
    chosen_length=_of(5, 4),
    rejected_length=_of(3, 1),
    target_length=_of(5, 2),
    ref_chosen=_of(-12, -6.5),
    ref_rejected=_of(-14, -6.5),
    tokens_per_pair=4.5,
    chosen_tail=_of(-3, -5),  # chosen is longer than rejected in both pairs
    rejected_tail=_of(0, 0),
    ref_chosen_tail=_of(-4, -3),
    ref_rejected_tail=_of(0, 0),
    chosen_log_sum_sq=_of(-7.5, -6),
    rejected_log_sum_sq=_of(-12, -5.5),
    gap=_of(0.5, 3),
)


def random_pairs(count: int = 16, scale: float = 40.0, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int) -> torch.Tensor:
        return torch.rand(rows, count, generator=generator, dtype=torch.float64)

    logps = -scale * random(5)
    lengths = torch.randint(1, 30, (3, count), generator=generator).double()
    tails = random(4) * logps[[0, 1, 3, 4]]
    sums, gap, hard = -5 * random(2), 4 * random(1)[0], random(1)[0] < 0.5
    return PairLogps(*logps[:3], *lengths, *logps[3:], 7.25, *tails, *sums, gap, hard)
