"""Metrics under TRL's names: sums kept on the device, brought to the host only when they are logged."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.collate import PackedBatch
from ..data.curriculum import Curriculum
from ..losses import PairLogps
from ..losses.transforms import desensitize
from ..model.packed_model import Scores
from ..ops.gather import segment_sum

# Metric -> the count that it is a mean over.
_MEAN_OVER = {
    "rewards/chosen": "pairs",
    "rewards/rejected": "preferences",
    "rewards/accuracies": "preferences",
    "rewards/margins": "preferences",
    "logps/chosen": "pairs",
    "logps/rejected": "preferences",
    "logits/chosen": "chosen_tokens",
    "logits/rejected": "rejected_tokens",
    "entropy": "all_tokens",
    "mean_token_accuracy": "chosen_tokens",
    "aux_loss": "aux_losses",
}
_COUNTS = ("pairs", "preferences", "chosen_tokens", "rejected_tokens", "all_tokens", "aux_losses")
_NAMES = (*_MEAN_OVER, *_COUNTS)


def pair_rewards(numbers: PairLogps, beta: float) -> Tensor:
    """Implicit rewards ``beta (logp - reference logp)`` of chosen and rejected, (P, 2); without a rejected side (P, 1).

    Without a reference ``beta logp``.
    """
    sides = [numbers.chosen] if numbers.rejected is None else [numbers.chosen, numbers.rejected]
    references = [numbers.ref_chosen, numbers.ref_rejected]
    rewards = [logps if ref is None else logps - ref for logps, ref in zip(sides, references)]
    return beta * torch.stack(rewards, dim=1).float()


class Metrics:
    """Running sums of one mode, training or evaluation.

    A pair weighs 1, a token 1 in each pair that its completion is in: exact means however the pairs were batched. With
    ``ld_alpha`` log-probs and rewards are those that the loss sees, as in TRL.
    """

    def __init__(self, accelerator: Accelerator, beta: float, ld_alpha: float | None = None) -> None:
        self.accelerator, self.beta, self.ld_alpha = accelerator, beta, ld_alpha
        self.total: Tensor | None = None  # (len(_NAMES),) on the device

    def numbers(self, scores: Scores) -> PairLogps:
        """The log-probs of a micro-batch's pairs that metrics are made of."""
        return desensitize(scores.numbers, self.ld_alpha)

    @torch.no_grad()
    def add(self, batch: PackedBatch, scores: Scores) -> None:
        """Add a micro-batch that was scored with statistics."""
        offsets, chosen, rejected = batch["cu_completions"], batch["chosen"], batch["rejected"]
        lengths = offsets.diff().float()
        numbers = self.numbers(scores)
        rewards = pair_rewards(numbers, self.beta).unbind(1)
        per_completion = {
            "entropy": segment_sum(scores.tokens.entropy, offsets),
            "logits": segment_sum(scores.tokens.mean_logit, offsets),
            "correct": segment_sum(scores.tokens.correct.float(), offsets),
        }
        sums = {
            "pairs": lengths.new_full((), batch["num_pairs"]),
            "chosen_tokens": lengths[chosen].sum(),
            "logps/chosen": numbers.chosen.sum(),
            "rewards/chosen": rewards[0].sum(),
            "logits/chosen": per_completion["logits"][chosen].sum(),
            "mean_token_accuracy": per_completion["correct"][chosen].sum(),
        }
        sides = [chosen]
        if scores.aux_loss is not None:
            sums |= {"aux_losses": lengths.new_ones(()), "aux_loss": scores.aux_loss.detach()}
        if rejected is not None:
            margins = rewards[0] - rewards[1]
            sums |= {
                "preferences": sums["pairs"],
                "rejected_tokens": lengths[rejected].sum(),
                "logps/rejected": numbers.rejected.sum(),
                "rewards/rejected": rewards[1].sum(),
                "logits/rejected": per_completion["logits"][rejected].sum(),
                "rewards/margins": margins.sum(),
                "rewards/accuracies": (margins > 0).sum(),
            }
            sides.append(rejected)
        both = torch.cat(sides)
        sums |= {"all_tokens": lengths[both].sum(), "entropy": per_completion["entropy"][both].sum()}
        zero = lengths.new_zeros(())
        vector = torch.stack([sums.get(name, zero).float() for name in _NAMES])
        self.total = vector if self.total is None else self.total + vector

    def reset(self) -> None:
        """Forget all sums."""
        self.total = None

    def compute(self) -> dict[str, float]:
        """Means over all ranks since the last call, of what occurred on any of them; the sums start again."""
        if self.total is None:
            return {}
        total = dict(zip(_NAMES, self.accelerator.reduce(self.total, "sum").tolist()))
        self.reset()
        return {name: total[name] / total[count] for name, count in _MEAN_OVER.items() if total[count]}


class PlaceMetrics:
    """Where in a curriculum the rows were that a rank ran since the last log: shares of levels, or their mean place."""

    def __init__(self, accelerator: Accelerator, curriculum: Curriculum) -> None:
        self.accelerator, self.curriculum = accelerator, curriculum
        self.reset()

    def add(self, batch: PackedBatch) -> None:
        """Add the rows of a micro-batch; one of a collator that knows no curriculum has none."""
        for place in batch.get("places", []):
            self.rows += 1
            if self.curriculum.is_continuous:
                self.sums[0] += place
            else:
                self.sums[int(place)] += 1

    def reset(self) -> None:
        """Forget all rows."""
        self.sums, self.rows = [0.0] * len(self.curriculum.metrics), 0

    def compute(self) -> dict[str, float]:
        """Means over all ranks since the last call."""
        vector = torch.tensor([*self.sums, self.rows], dtype=torch.float32, device=self.accelerator.device)
        *totals, rows = self.accelerator.reduce(vector, "sum").tolist()
        self.reset()
        return {name: total / rows for name, total in zip(self.curriculum.metrics, totals)} if rows else {}
