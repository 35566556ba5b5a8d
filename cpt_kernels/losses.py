"""Preference losses: pure functions of completion log-probs, one loss per pair.

Every function takes a :class:`PairLogps` and returns a (P,) tensor. Notation in the docstrings: ``lw, ll`` are the
policy's summed log-probs of the chosen and the rejected completion, ``rw, rl`` the reference's, ``nw, nl`` the
completions' lengths in tokens, and ``h = (lw - rw) - (ll - rl)``.

A trainer averages over the pairs of an optimizer step, so a loss with a normaliser of its own (``sft``: tokens) divides
by the known ratio of the two, ``tokens_per_pair``. That keeps every built-in loss *separable*: a sum over pairs of a
function of that pair's numbers and of constants. Separable losses let the head finish its backward while the logits are
still there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """The numbers that a loss may look at, for P pairs.

    Log-probs are sums over a completion's tokens, in nats, fp32 (or fp64); lengths are token counts of the same dtype.
    Fields that do not apply are ``None``: ``rejected*`` for supervised rows, ``ref_*`` for losses without a reference.
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

    def __getitem__(self, index) -> PairLogps:
        """The same numbers for some of the pairs; ``index`` is whatever indexes a (P,) tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return PairLogps(
            **{k: v[index] if isinstance(v, Tensor) and v.dim() else v for k, v in values.items()},
        )

    def log_ratio_difference(self) -> Tensor:
        """``h = (lw - rw) - (ll - rl)``, (P,)."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def sigmoid(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO, ``-(1-e) log s(b h) - e log s(-b h)``. With e = ``label_smoothing`` = 0: Rafailov et al., arXiv 2305.18290,
    eq. 7; else conservative DPO, e the flip probability (E. Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    h = beta * logps.log_ratio_difference()
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def hinge(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """RSO's hinge on the reference ratios, ``max(0, 1 - b h)``: Liu et al., arXiv 2309.06657. TRL's ``hinge``."""
    return torch.relu(1 - beta * logps.log_ratio_difference())


def ipo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """IPO, ``(h' - 1/(2 b))^2`` with per-token averages, ``h' = (lw-rw)/nw - (ll-rl)/nl``: Azar et al.,
    arXiv 2310.12036, eq. 17, length-normalised as TRL does.
    """
    chosen = (logps.chosen - logps.ref_chosen) / logps.chosen_length
    rejected = (logps.rejected - logps.ref_rejected) / logps.rejected_length
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def slic(
    logps: PairLogps, *, slic_delta: float = 1.0, slic_lambda: float = 1.0, slic_length_normalize: bool = False
) -> Tensor:
    """SLiC, ``max(0, d - lw + ll) - lambda log p(y_ref)``: Zhao et al., arXiv 2305.10425, eq. 3, as used by Xu et al.,
    arXiv 2310.02263. No reference model. ``slic_length_normalize`` takes per-token means instead of sums.
    """
    chosen, rejected, target = logps.chosen, logps.rejected, logps.target
    if slic_length_normalize:
        chosen = chosen / logps.chosen_length
        rejected = rejected / logps.rejected_length
        target = target / logps.target_length
    return torch.relu(slic_delta - chosen + rejected) - slic_lambda * target


def sft(logps: PairLogps) -> Tensor:
    """Supervised fine-tuning on the chosen completions: negative log-likelihood, a mean over the step's *tokens*."""
    return -logps.chosen / logps.tokens_per_pair


@dataclass(frozen=True)
class Loss:
    """A loss with its options bound, and what the trainer must know about it.

    Attributes:
        name: as given to ``loss_type``.
        function: ``PairLogps -> (P,)``.
        needs_reference: ``ref_chosen`` and ``ref_rejected`` are read.
        needs_rejected: pairs must have a rejected side.
        separable: the loss of a subset of pairs is the subset of the losses, so gradients may be taken tile by tile.
        options: those of a built-in loss, whose closed form the kernels have; ``None`` for a user's function.
    """

    name: str
    function: Callable[[PairLogps], Tensor] = field(repr=False)
    needs_reference: bool
    needs_rejected: bool = True
    separable: bool = True
    options: dict[str, float] | None = None

    def __call__(self, logps: PairLogps) -> Tensor:
        return self.function(logps)

    def check_separable(self) -> None:
        """Hold a declared ``separable`` to its meaning on random numbers.

        Raises:
            ValueError: the losses of some pairs change when other pairs leave the batch.
        """
        generator = torch.Generator().manual_seed(0)
        chosen, rejected, target, ref_chosen, ref_rejected = (
            -20 * torch.rand(5, 8, generator=generator, dtype=torch.float64)
        ).unbind()
        lengths = torch.arange(1, 9, dtype=torch.float64)
        numbers = PairLogps(chosen, rejected, target, lengths, lengths.flip(0), lengths, ref_chosen, ref_rejected, 4.0)
        some = torch.tensor([1, 4, 6])
        if not torch.allclose(self(numbers)[some], self(numbers[some])):
            raise ValueError(
                f"loss '{self.name}' is declared separable, but the losses of a subset of pairs are not the subset of"
                " the losses: declare it separable=False"
            )


@dataclass(frozen=True)
class _Builtin:
    function: Callable[..., Tensor]
    needs_reference: bool
    needs_rejected: bool = True


LOSSES: dict[str, _Builtin] = {
    "sigmoid": _Builtin(sigmoid, needs_reference=True),
    "hinge": _Builtin(hinge, needs_reference=True),
    "ipo": _Builtin(ipo, needs_reference=True),
    "slic": _Builtin(slic, needs_reference=False),
    "sft": _Builtin(sft, needs_reference=False, needs_rejected=False),
}


def loss_options(name: str) -> list[str]:
    """Names of the options that loss ``name`` takes."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def build_loss(name: str, **options) -> Loss:
    """The built-in loss ``name`` with its options bound; options of other losses are not accepted.

    Raises:
        ValueError: the name is unknown.
        TypeError: an option is not one of this loss's (see :func:`loss_options`).
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss_type '{name}': choose one of {', '.join(LOSSES)}")
    builtin = LOSSES[name]
    if unknown := set(options) - set(loss_options(name)):
        raise TypeError(f"loss '{name}' takes {loss_options(name)}, not {sorted(unknown)}")

    def function(logps: PairLogps) -> Tensor:
        return builtin.function(logps, **options)

    return Loss(name, function, builtin.needs_reference, builtin.needs_rejected, options=options)


def user_loss(
    function: Callable[[PairLogps], Tensor],
    *,
    needs_reference: bool = True,
    needs_rejected: bool = True,
    separable: bool = False,
    name: str | None = None,
) -> Loss:
    """A user's own function of log-probs, ``PairLogps -> (P,)``, as a :class:`Loss`.

    ``separable=True`` (each pair's loss depends on that pair alone) saves one of four matrix products in the head; it
    is checked here, once.

    Raises:
        ValueError: declared separable, but it is not.
    """
    loss = Loss(name or getattr(function, "__name__", "user"), function, needs_reference, needs_rejected, separable)
    if separable:
        loss.check_separable()
    return loss
