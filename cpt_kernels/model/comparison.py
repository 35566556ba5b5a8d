"""Compares log-probs of rows of the data: as training runs them, and by the model's own forward of each one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from ..data.collate import PackedCollator, Tokens
from ..data.images import ImageId, split_key
from .conditions import PinnedRouting, gathered, undisturbed
from .heads import logits_logps
from .hooks import in_training_mode
from .images import own_inputs
from .packed_model import PackedModel, base_model
from .proof import Probe, Truth, in_given_order, rounding_of, run_parts


@torch.no_grad()
def compare_rows(
    packed: PackedModel,
    sequences: Sequence[Tokens],
    collator: PackedCollator,
    images: Mapping[ImageId, Any] | None = None,
) -> tuple[float, float]:
    """Compares the log-probs of sequences under the model as it is, without noise; nothing of it changes.

    Args:
        sequences: (prompt key, completion ids), truncated.
        collator: the run's; says how they are laid out.
        images: of the prompts, by identity.

    Returns:
        The largest difference of a token's log-prob, and the largest that rounding explains, in nats.
    """
    model, device = packed.model, base_model(packed.model).device
    probe = Probe.of(base_model(model))
    routing = PinnedRouting()

    def alone(prompt: Sequence[int], completion: Sequence[int], rows: int = 1) -> Tensor:
        ids = [(*split_key(prompt)[1], *completion)] * rows
        row = torch.tensor(ids, device=device)
        more: dict[str, Tensor] = {}
        if packed.images is not None:
            more = own_inputs(base_model(model), packed.images, images or {}, [(prompt, ())], row)
        with routing.follow(ids, rows=rows):
            logits = model(input_ids=row, use_cache=False, **more).logits
        own = logits[0, -1 - len(completion) : -1]
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
        batch = collator.pack(sequences, [], [], [], images)
        with routing.follow(*run_parts(batch), len(batch["input_ids"]), packed.own_tokens(batch)):
            found = in_given_order(packed(send_to_device(batch, device)).tokens.logps, batch)
    return truth.difference(found), truth.bound
