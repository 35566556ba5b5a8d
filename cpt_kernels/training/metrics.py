"""Metrics under TRL's names, summed on the device and copied to the CPU only when they are logged."""

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

# Metric -> the count that its sum is divided by.
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
    "aux_loss": "aux_pairs",
}
_COUNTS = ("pairs", "preferences", "chosen_tokens", "rejected_tokens", "all_tokens", "aux_pairs")
_NAMES = (*_MEAN_OVER, *_COUNTS)
METRIC_NAMES = tuple(_MEAN_OVER)
PREFERENCE_METRICS = tuple(name for name, count in _MEAN_OVER.items() if count in ("preferences", "rejected_tokens"))


def pair_rewards(pair_logps: PairLogps, beta: float, per_token: bool = False) -> Tensor:
    """Returns the implicit rewards ``beta * (policy - reference log-prob)``, (P, 2) of chosen and rejected.

    Without a rejected side they are (P, 1). Without a reference they are ``beta * policy log-prob``. With ``per_token``
    they are divided by the number of tokens.
    """
    sides = [pair_logps.chosen] if pair_logps.rejected is None else [pair_logps.chosen, pair_logps.rejected]
    references = [pair_logps.ref_chosen, pair_logps.ref_rejected]
    rewards = [logps if ref is None else logps - ref for logps, ref in zip(sides, references)]
    if per_token:
        lengths = (pair_logps.chosen_length, pair_logps.rejected_length)
        rewards = [reward / length for reward, length in zip(rewards, lengths)]
    return beta * torch.stack(rewards, dim=1).float()


class Metrics:
    """Running sums of the metrics of training or of evaluation.

    Every pair has the weight that its loss has, by default 1, and every token has that weight in each pair of its
    completion, so the means do not depend on how pairs are packed into micro-batches.

    Args:
        beta: factor of the rewards.
        ld_alpha: weight of the tokens beyond the other side's length (LD-DPO). With it, log-probs and rewards are
            those that the loss sees, as in TRL.
        per_token: rewards are of log-probs per token, see :class:`Loss`.
    """

    def __init__(
        self, accelerator: Accelerator, beta: float, ld_alpha: float | None = None, per_token: bool = False
    ) -> None:
        self.accelerator, self.beta, self.ld_alpha, self.per_token = accelerator, beta, ld_alpha, per_token
        self.total: Tensor | None = None  # (len(_NAMES),) sums of this rank, on the device

    def pair_logps(self, scores: Scores) -> PairLogps:
        """Returns the log-probs of a micro-batch's pairs, (P,) each, that log-probs and rewards are computed from."""
        return desensitize(scores.pair_logps, self.ld_alpha)

    def rewards(self, scores: Scores) -> Tensor:
        """Returns the rewards of a micro-batch's pairs, (P, 2), or (P, 1) without a rejected side."""
        return pair_rewards(self.pair_logps(scores), self.beta, self.per_token)

    @torch.no_grad()
    def add(self, batch: PackedBatch, scores: Scores) -> None:
        """Adds a micro-batch; ``scores`` must hold the token statistics. Does not wait for the device."""
        offsets, chosen, rejected = batch["cu_completions"], batch["chosen"], batch["rejected"]
        lengths = offsets.diff().float()
        pair_logps = self.pair_logps(scores)
        rewards = self.rewards(scores).unbind(1)
        weights = lengths.new_ones(len(chosen)) if batch["weights"] is None else batch["weights"]
        # Sums over the tokens of each completion, (S,).
        per_completion = {
            "entropy": segment_sum(scores.tokens.entropy, offsets),
            "logits": segment_sum(scores.tokens.mean_logit, offsets),
            "correct": segment_sum(scores.tokens.correct.float(), offsets),
        }

        def total(values: Tensor, of: Tensor = weights) -> Tensor:
            return (of * values).sum()

        sums = {
            "pairs": weights.sum(),
            "chosen_tokens": total(lengths[chosen]),
            "logps/chosen": total(pair_logps.chosen),
            "rewards/chosen": total(rewards[0]),
            "logits/chosen": total(per_completion["logits"][chosen]),
            "mean_token_accuracy": total(per_completion["correct"][chosen]),
        }
        sides = [chosen]
        if scores.aux_loss is not None:
            # A micro-batch counts with its pairs, as in the loss; the pad of a batch without pairs counts 0.
            pairs = lengths.new_full((), batch["num_pairs"])
            sums |= {"aux_pairs": pairs, "aux_loss": scores.aux_loss.detach() * pairs}
        if rejected is not None:
            margins = rewards[0] - rewards[1]
            sums |= {
                "preferences": sums["pairs"],
                "rejected_tokens": total(lengths[rejected]),
                "logps/rejected": total(pair_logps.rejected),
                "rewards/rejected": total(rewards[1]),
                "logits/rejected": total(per_completion["logits"][rejected]),
                "rewards/margins": total(margins),
                "rewards/accuracies": total((margins > 0).float()),
            }
            sides.append(rejected)
        both, twice = torch.cat(sides), torch.cat([weights] * len(sides))
        sums |= {"all_tokens": total(lengths[both], twice), "entropy": total(per_completion["entropy"][both], twice)}
        # One vector, so that compute() needs one collective and one copy. What the batch lacks counts 0.
        zero = lengths.new_zeros(())
        vector = torch.stack([sums.get(name, zero).float() for name in _NAMES])
        self.total = vector if self.total is None else self.total + vector

    def reset(self) -> None:
        """Sets all sums to zero."""
        self.total = None

    def compute(self) -> dict[str, float]:
        """Returns the means over all ranks since the last call, of metrics that occurred on any rank, and resets."""
        if self.total is None:
            return {}
        total = dict(zip(_NAMES, self.accelerator.reduce(self.total, "sum").tolist()))
        self.reset()
        return {name: total[name] / total[count] for name, count in _MEAN_OVER.items() if total[count]}


class PlaceMetrics:
    """Where the rows since the last log lie in the curriculum: the share of each level, or their mean place."""

    def __init__(self, accelerator: Accelerator, curriculum: Curriculum) -> None:
        self.accelerator, self.curriculum = accelerator, curriculum
        self.reset()

    def add(self, batch: PackedBatch) -> None:
        """Adds the rows of a micro-batch. A batch from a collator without a curriculum holds no places."""
        for place in batch.get("places", []):
            self.rows += 1
            if self.curriculum.is_continuous:
                self.sums[0] += place
            else:
                self.sums[int(place)] += 1

    def reset(self) -> None:
        """Sets all sums to zero."""
        self.sums, self.rows = [0.0] * len(self.curriculum.metrics), 0

    def compute(self) -> dict[str, float]:
        """Returns the means over all ranks since the last call, and resets."""
        vector = torch.tensor([*self.sums, self.rows], dtype=torch.float32, device=self.accelerator.device)
        *totals, rows = self.accelerator.reduce(vector, "sum").tolist()
        self.reset()
        return {name: total / rows for name, total in zip(self.curriculum.metrics, totals)} if rows else {}
