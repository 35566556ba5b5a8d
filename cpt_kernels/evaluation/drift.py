"""Measures what training changed besides preferences: KL, agreement, entropy and likelihood, token by token.

For every token of given sequences, the next-token distribution p of a model is compared with q of the model that it
was trained from, over the whole vocabulary and in the same context:

    KL(p || q) = sum_v p_v log(p_v / q_v)      agreement: argmax p = argmax q      entropy = -sum_v p_v log p_v

KL is the exact one of each token, not an estimate from sampled tokens. On text that nobody trained on, the
log-likelihood shows what a model lost; a fall of the entropy shows lost diversity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

from ..config import ContrastiveConfig
from ..data.collate import PackedCollator, ScoredTokens, Tokens
from ..data.images import IMAGES
from ..errors import UserError
from ..model.heads import head_operands
from ..model.loading import load_model
from ..model.packed_model import PackedModel, base_model
from ..reference.missing import iter_sequences
from ..reference.scorer import scoring_budget
from .win_rate import DEFAULT_BOOTSTRAP, Bootstrap, interval

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = nn.Module | str | Callable[[], nn.Module]

TEXT = "text"  # the name of plain text among sequences
_TILE = 1 << 24  # logits of each model in memory at one time
_WINDOW = 512  # tokens of plain text that are read together


class Drift(NamedTuple):
    """C sequences under a model and the one that it was trained from; sums over the tokens of each, in nats."""

    tokens: NDArray[np.int64]  # (C,)
    groups: NDArray[np.uint64]  # (C,) hash of the prompt; intervals resample prompts
    sums: NDArray[np.float64]  # (C, 6) in the order of `NAMES`

    NAMES = ("kl", "agreement", "entropy", "start_entropy", "log_likelihood", "start_log_likelihood")

    def summary(self, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> dict[str, Any]:
        """Returns means over all tokens with bootstrap intervals over prompts, as ``{"mean", "low", "high"}``.

        ``perplexity`` is exp of minus the mean log-likelihood, and ``perplexity_ratio`` that of the model divided by
        that of the start. The ends are None for a single prompt.
        """
        per_token = self.sums / self.tokens[:, None]
        columns = [*per_token.T, per_token[:, 2] - per_token[:, 3], per_token[:, 5] - per_token[:, 4]]
        names = (*self.NAMES, "entropy_change", "perplexity_ratio")
        values, weights = np.stack(columns, axis=1), self.tokens.astype(np.float64)
        means = np.average(values, axis=0, weights=weights)
        ends = interval(values, prompts=self.groups, weights=weights, bootstrap=bootstrap)
        found = {name: np.array([mean, *pair]) for name, mean, pair in zip(names, means, ends.T)}
        found["perplexity_ratio"] = np.exp(found["perplexity_ratio"])
        for prefix in ("", "start_"):
            found[f"{prefix}perplexity"] = np.exp(-found.pop(f"{prefix}log_likelihood"))[[0, 2, 1]]
        estimates = {
            name: dict(zip(("mean", "low", "high"), (None if np.isnan(v) else float(v) for v in three)))
            for name, three in found.items()
        }
        return {"tokens": int(self.tokens.sum()), "prompts": len(np.unique(self.groups))} | estimates


def text_sequences(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[Tokens]:
    """Cuts plain text into windows of at most 512 tokens; the first token of each is given, and the others predicted.

    Raises:
        UserError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    window = min(_WINDOW, max_length or _WINDOW)
    cut = [ids[start : start + window] for start in range(0, len(ids), window)]
    if not (sequences := [((part[0],), tuple(part[1:])) for part in cut if len(part) > 1]):
        raise UserError(f"the plain text has {len(ids)} tokens: give a text of at least two")
    return sequences


def dataset_sequences(dataset: Dataset, args: ContrastiveConfig) -> list[ScoredTokens]:
    """Returns all completions of a prepared dataset with their prompts and masks, truncated as in training.

    Raises:
        UserError: prompts have images.
    """
    if IMAGES in dataset.column_names:
        raise UserError("the change of a model is measured on text alone, and this data has images")
    parts = iter_sequences(dataset, args.max_length, args.truncation_mode)
    return [
        (tuple(each.prompt_ids.tolist()), tuple(each.completion_ids.tolist()), *mask)
        for part in parts
        for each in part
        if (mask := () if each.scored is None else (tuple(each.scored.tolist()),)) == () or any(*mask)
    ]


def measure_drift(
    models: Mapping[str, Model], start: Model, sequences: Mapping[str, Sequence[ScoredTokens]], args: ContrastiveConfig
) -> dict[str, dict[str, Drift]]:
    """Compares every model with the start on the same sequences; two models are in memory at a time.

    Works on any number of ranks with whole models on each; every rank gets the result.

    Args:
        sequences: name -> (prompt ids, completion ids) and, if not all are scored, a mask; the scored tokens of
            completions are compared. Repeated ones count once. Intervals resample prompts, and those of ``TEXT`` its
            windows.

    Returns:
        name -> model -> :class:`Drift`.

    Raises:
        UserError: the models have vocabularies of different sizes, or one cannot be loaded.
    """
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision)
    budget = scoring_budget(args.max_tokens_per_batch, accelerator.device)
    reference = _logits_model(start, args, accelerator)
    found: dict[str, dict[str, Drift]] = {name: {} for name in sequences}
    for model_name, model in models.items():
        packed = _logits_model(model, args, accelerator)
        for name, given in sequences.items():
            # Completions of one prompt are consecutive, as packing needs them.
            unique = sorted(dict.fromkeys(given), key=lambda each: (len(each[0]), each))
            own = [*_batches(unique, budget)][accelerator.process_index :: accelerator.num_processes]
            sums = {place: row for batch in own for place, row in _token_sums(packed, reference, batch, accelerator)}
            for others in gather_object([sums]):
                sums |= others
            groups = [xxh3_64_intdigest(np.array(p + c if name == TEXT else p).tobytes()) for p, c, *_ in unique]
            tokens = np.array([_scored(each) for each in unique])
            rows = np.stack([sums[place] for place in range(len(unique))])
            found[name][model_name] = Drift(tokens, np.array(groups, np.uint64), rows)
    return found


def _logits_model(model: Model, args: ContrastiveConfig, accelerator: Accelerator) -> _LogitsModel:
    if not isinstance(model, nn.Module):
        model = load_model(model, args) if isinstance(model, str) else model()
    if not getattr(base_model(model), "is_quantized", False):  # a quantized model cannot be moved
        model.to(accelerator.device)
    return _LogitsModel(model, args.head_memory_mb, args.attention_backend, args.packing)


def _scored(sequence: ScoredTokens) -> int:
    """Returns the number of scored tokens of a sequence's completion."""
    return sum(sequence[2]) if len(sequence) > 2 else len(sequence[1])


def _batches(sequences: Sequence[ScoredTokens], budget: int) -> Iterator[list[tuple[int, ScoredTokens]]]:
    """Yields numbered sequences in parts of at most ``budget`` tokens, or of one sequence."""
    part: list[tuple[int, ScoredTokens]] = []
    longest = 0
    for place, each in enumerate(sequences):
        longest = max(longest, len(each[0]) + len(each[1]))
        if part and longest * (len(part) + 1) > budget:
            yield part
            part, longest = [], len(each[0]) + len(each[1])
        part.append((place, each))
    if part:
        yield part


@torch.no_grad()
def _token_sums(
    model: _LogitsModel, start: _LogitsModel, batch: Sequence[tuple[int, ScoredTokens]], accelerator: Accelerator
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yields the place of each sequence and the sums of `NAMES` over its tokens."""
    sequences = [each for _, each in batch]
    for packed in (model, start):
        was_training = packed.model.training
        packed.model.eval()
        collator = PackedCollator(share_limit=packed.share_limit, padded=packed.padded)
        inputs = send_to_device(collator.pack(sequences, [], [], []), accelerator.device)
        with accelerator.autocast():
            packed(inputs)
        packed.model.train(was_training)
    targets, lengths = inputs["targets"], [*map(_scored, sequences)]
    assert inputs["completion_lengths"] == lengths and inputs["token_index"] is None
    columns = model.vocabulary
    if columns != start.vocabulary:
        raise UserError(
            f"the vocabularies have {columns} and {start.vocabulary} tokens: compare models of one tokenizer"
        )
    rows = []
    for first in range(0, len(targets), step := max(1, _TILE // columns)):
        tile = slice(first, first + step)
        log_p, log_q = model.log_probs(tile), start.log_probs(tile)
        p, q = log_p.exp(), log_q.exp()
        # Each term p log(p/q) - p + q is at least 0, so rounding makes no negative KL; p and q add up to 1.
        kl = (p * (log_p - log_q) - p + q).sum(-1)
        agreement = log_p.argmax(-1) == log_q.argmax(-1)
        entropies = [-(each * log_each).sum(-1) for each, log_each in ((p, log_p), (q, log_q))]
        likelihoods = [each.gather(-1, targets[tile, None])[:, 0] for each in (log_p, log_q)]
        rows.append(torch.stack([kl, agreement.to(kl), *entropies, *likelihoods], 1).double().cpu())
    parts = np.split(torch.cat(rows).numpy(), np.cumsum(lengths)[:-1])
    yield from ((place, part.sum(0)) for (place, _), part in zip(batch, parts))


class _LogitsModel(PackedModel):
    """A packed model that keeps what its head multiplies, to compute the logits of single tiles from it."""

    def _run_head(self, head, hidden, batch, *rest):
        self.operands = head_operands(head, hidden[batch["predictor_index"]])
        return super()._run_head(head, hidden, batch, *rest)

    def _score_logits(self, logits, batch, *rest):
        self.operands = (logits.flatten(0, -2)[batch["predictor_index"]],)
        return super()._score_logits(logits, batch, *rest)

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return self.operands[0].shape[1] if self.options is None else len(self.operands[1])

    def log_probs(self, tile: slice) -> Tensor:
        """Returns (R, V) log-probs of the tile's rows, in fp32 or fp64 for fp64.

        Logits are products in fp32: rounded to bf16, as in training, they would give two models a KL of their own.
        """
        rows, *others = self.operands
        dtype = torch.promote_types(rows.dtype, torch.float32)
        logits = rows[tile].to(dtype)
        if others:
            weight, bias = (each if each is None else each.to(dtype) for each in others)
            logits = self.options.logit_scale * nn.functional.linear(logits, weight, bias)
            cap = self.options.softcap
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1).clamp(min=torch.finfo(dtype).min)  # 0 * -inf would be NaN
