"""The log-probs of both sides of each pair, which is what a loss computes from."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

# A tensor, or None where the field does not apply. Typed with Any, because a loss reads only the fields that its table
# entry declares, and needs no check for None.
_OptionalTensor = Tensor | Any


@dataclass(frozen=True)
class PairLogps:
    """What a loss computes from, for P pairs.

    Log-probs are sums over a completion's tokens, in nats, fp32 (or fp64); lengths are token counts in the same dtype.
    Fields that do not apply are ``None``: ``rejected*`` for supervised rows, ``ref_*`` for losses without a reference,
    and every field after ``tokens_per_pair`` for losses that do not ask for it (see :class:`Loss`).
    """

    chosen: Tensor  # (P,) the policy's log-prob of the chosen completion
    rejected: _OptionalTensor  # (P,) of the rejected completion
    target: Tensor  # (P,) of y_ref, the completion of SLiC's regularizer: chosen unless the row names another
    chosen_length: Tensor  # (P,)
    rejected_length: _OptionalTensor  # (P,)
    target_length: Tensor  # (P,)
    ref_chosen: _OptionalTensor = None  # (P,) the reference's log-prob of the chosen completion
    ref_rejected: _OptionalTensor = None  # (P,) of the rejected completion
    tokens_per_pair: Tensor | float = 1.0  # chosen tokens / pairs of the optimizer step, or of the evaluation
    # The part of a log-prob that lies beyond the length of the pair's other side; 0 for the shorter side.
    chosen_tail: _OptionalTensor = None  # (P,)
    rejected_tail: _OptionalTensor = None  # (P,)
    ref_chosen_tail: _OptionalTensor = None  # (P,)
    ref_rejected_tail: _OptionalTensor = None  # (P,)
    # Sums over tokens of log sum_v p_v^2, the log of the probability that the policy draws the same token twice.
    chosen_log_sum_sq: _OptionalTensor = None  # (P,)
    rejected_log_sum_sq: _OptionalTensor = None  # (P,)
    gap: _OptionalTensor = None  # (P,) by how much chosen is better, above 0, on the scale of the data
    hard: _OptionalTensor = None  # (P,) bool: the pair is hard, see :func:`.build.with_hard_pairs`

    def __getitem__(self, index: Any) -> PairLogps:
        """Selects pairs; ``index`` is anything that indexes a (P,) tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # tokens_per_pair may be a number or a tensor without dimensions, which all pairs share.
        return PairLogps(**{k: v[index] if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()})

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """Returns the log-ratios ``Δw = lw - rw`` and ``Δl = ll - rl``, (P,) each."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    def log_ratio_difference(self) -> Tensor:
        """Returns ``h = Δw - Δl``, (P,)."""
        chosen, rejected = self.log_ratios()
        return chosen - rejected
