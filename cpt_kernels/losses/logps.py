"""What a loss may look at: the log-probs of the two sides of each pair, and what comes with them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """The numbers that a loss may look at, for P pairs.

    Log-probs are sums over a completion's tokens, in nats, fp32 (or fp64); lengths are token counts of the same dtype.
    Fields that do not apply are ``None``: ``rejected*`` for supervised rows, ``ref_*`` for losses without a reference,
    and what comes after ``tokens_per_pair`` for losses that do not ask for it (see :class:`Loss`).
    """

    chosen: Tensor  # (P,) policy log-prob of the chosen completion
    rejected: Tensor | None  # (P,)
    target: Tensor  # (P,) policy log-prob of y_ref, the regulariser's completion: chosen, unless rows say otherwise
    chosen_length: Tensor  # (P,)
    rejected_length: Tensor | None  # (P,)
    target_length: Tensor  # (P,)
    ref_chosen: Tensor | None = None  # (P,)
    ref_rejected: Tensor | None = None  # (P,)
    tokens_per_pair: Tensor | float = 1.0  # chosen tokens / pairs, over everything that is averaged together
    # The part of a log-prob that lies beyond the length of the pair's other side; 0 for the shorter one.
    chosen_tail: Tensor | None = None  # (P,)
    rejected_tail: Tensor | None = None  # (P,)
    ref_chosen_tail: Tensor | None = None  # (P,)
    ref_rejected_tail: Tensor | None = None  # (P,)
    # Sums over tokens of log sum_v p_v^2, the log of the probability that the policy draws the same token twice.
    chosen_log_sum_sq: Tensor | None = None  # (P,)
    rejected_log_sum_sq: Tensor | None = None  # (P,)
    gap: Tensor | None = None  # (P,) by how much chosen is better, on a scale of the data's, above 0

    def __getitem__(self, index) -> PairLogps:
        """The same numbers for some of the pairs; ``index`` is whatever indexes a (P,) tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PairLogps(
            **{k: v[index] if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()},
        )

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """``dw = lw - rw`` and ``dl = ll - rl``, (P,) each."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def log_ratio_difference(self) -> Tensor:
        """``h = dw - dl``, (P,)."""
        chosen, rejected = self.log_ratios()
        return chosen - rejected
