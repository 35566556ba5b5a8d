"""Compares log-probs of rows of the data: as training runs them, and by the model's own forward of each one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..data.collate import PackedBatch, PackedCollator, Tokens
from .conditions import PinnedRouting, gathered, undisturbed
from .heads import logits_logps
from .hooks import in_training_mode
from .packed_model import PackedModel, base_model
from .proof import Probe, Truth, rounding_of


@torch.no_grad()
def compare_rows(packed: PackedModel, sequences: Sequence[Tokens], collator: PackedCollator) -> tuple[float, float]:
    """Compares the log-probs of sequences under the model as it is, without noise; nothing of it changes.

    Args:
        sequences: (prompt ids, completion ids), truncated; those of one prompt are consecutive.
        collator: the run's; says how they are laid out.

    Returns:
        The largest difference of a token's log-prob, and the largest that rounding explains, in nats.
    """
    model, device = packed.model, base_model(packed.model).device
    probe = Probe.of(base_model(model))
    routing = PinnedRouting()

    def alone(prompt: Sequence[int], completion: Sequence[int], rows: int = 1) -> Tensor:
        ids = [(*prompt, *completion)] * rows
        with routing.follow(ids, rows=rows):
            logits = model(input_ids=torch.tensor(ids, device=device), use_cache=False).logits
        own = logits[0, len(prompt) - 1 : -1]
        dtypes.add(own.dtype)
        return logits_logps(own, torch.tensor(completion, device=device), statistics=False).logps

    dtypes = {probe.dtype}
    with undisturbed(model), gathered(model), in_training_mode(packed.quantized):
        # The truth, and by how much a batch moves it.
        own = [alone(prompt, completion) for prompt, completion in sequences]
        longest = max(range(len(sequences)), key=lambda s: len(sequences[s][1]))
        noise = (own[longest] - alone(*sequences[longest], rows=2)).abs().max().item()
        logps = torch.cat(own)
        epsilon, is_coarse = rounding_of(logps, dtypes)
        truth = Truth(logps, noise, epsilon, fault=float("inf"), look_ahead=0.0, is_coarse=is_coarse)
        # The same sequences as in training.
        batch = collator.pack(sequences, [], [], [])
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        shared = [] if packed.padded else [keys - queries for queries, keys in batch["segment_lengths"]]
        with routing.follow([p + c for p, c in sequences], shared, len(batch["input_ids"])):
            found = packed(cast("PackedBatch", moved)).tokens.logps
    return truth.difference(found), truth.bound
