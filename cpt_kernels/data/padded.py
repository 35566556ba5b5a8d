"""Adapts collators that return TRL's padded batches, so that they can be used where packed batches are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .collate import PackedBatch, PackedCollator, ReferenceLookup, Tokens, gap_of
from .curriculum import HARD, PLACE

_PADDED = ("input_ids", "attention_mask", "completion_mask")


@dataclass(frozen=True)
class UnpaddingCollator:
    """Collate function that packs the batches of a padding one: rows -> :class:`PackedBatch`.

    Attributes:
        padding: takes one row per pair with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, and returns
            ``input_ids``, ``attention_mask`` and ``completion_mask``, each (2P, L): all chosen sides, then all rejected
            ones. It must truncate sequences that are too long, as in TRL.
        packing: packs the sequences without their padding.

    Raises:
        UserError: a row does not consist of pairs, or ``padding`` does not return such a batch.
    """

    padding: Callable[[list[dict]], Mapping[str, Any]]
    packing: PackedCollator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PackedBatch:
        examples = [example for row in rows for example in _pair_examples(row)]
        sides = _sequences(self.padding(examples), len(examples)) if examples else []
        # TRL's padded batches have no regularizer target, so the chosen side takes its place.
        edges = [(chosen, chosen, rejected) for chosen, rejected in zip(sides, sides[len(examples) :])]
        gaps = [gap_of(row, *edge) for row in rows for edge in zip(row["chosen"], row["rejected"])]
        hard = [row.get(HARD, False) for row in rows for _ in row["chosen"]]
        weights = [weight for row in rows for weight in row.get("weights") or [1.0] * len(row["chosen"])]
        places = [row[PLACE] for row in rows if PLACE in row]
        return self.packing.pack(sides, edges, gaps, places, hard=hard, weights=weights)


def packed_collator(given: Callable | None, default: PackedCollator) -> PackedCollator | UnpaddingCollator:
    """Returns a collator of packed batches: the given one, the given one adapted, or ``default`` if none is given."""
    if given is None or isinstance(given, (PackedCollator, UnpaddingCollator)):
        return given or default
    return UnpaddingCollator(given, default)


def with_reference(
    collator: PackedCollator | UnpaddingCollator, lookup: ReferenceLookup | None
) -> PackedCollator | UnpaddingCollator:
    """Returns the collator with a lookup of reference log-probs. A lookup that a PackedCollator has already stays."""
    if isinstance(collator, UnpaddingCollator):
        return replace(collator, packing=replace(collator.packing, reference=lookup))
    return collator if collator.reference is not None else replace(collator, reference=lookup)


def _pair_examples(row: Mapping[str, Any]) -> list[dict]:
    if row.get("image_ids"):
        raise UserError(
            f"row {row['row']} has images, which a data_collator for padded batches does not hand on: leave it out"
        )
    if row.get("scored"):
        raise UserError(
            f"row {row['row']} has tokens with weights or that are not scored, which a data_collator for padded batches"
            " does not know: leave data_collator out, or set assistant_only_loss=false and remove the masks and weights"
        )
    if not row["rejected"] or row["targets"] != row["chosen"]:
        raise UserError(
            f"row {row['row']} does not consist of pairs of chosen and rejected, but a data_collator for padded batches"
            " takes only pairs: remove the row, or use a PackedCollator"
        )
    completions = row["completion_ids"]
    return [
        {**row, "chosen_ids": completions[chosen], "rejected_ids": completions[rejected]}
        for chosen, rejected in zip(row["chosen"], row["rejected"])
    ]


def _sequences(batch: Mapping[str, Any], pairs: int) -> list[Tokens]:
    """Returns (prompt, completion) ids of all chosen sides, then of all rejected ones."""
    if not all(name in batch for name in _PADDED):
        raise UserError(
            f"data_collator returned {', '.join(batch)}: use a PackedCollator, or a collator that returns the padded"
            f" batches of TRL's DataCollatorForPreference, with {', '.join(_PADDED)}"
        )
    ids, attended, completed = (batch[name].tolist() for name in _PADDED)
    if len(ids) != 2 * pairs:
        raise UserError(f"data_collator returned {len(ids)} sequences for {pairs} pairs; expected {2 * pairs}")
    return [_sequence(*row) for row in zip(ids, attended, completed)]


def _sequence(ids: list[int], attended: list[int], completed: list[int]) -> Tokens:
    tokens = [(token, bool(inside)) for token, seen, inside in zip(ids, attended, completed) if seen]
    start = next((i for i, (_, inside) in enumerate(tokens) if inside), len(tokens))
    if not all(inside for _, inside in tokens[start:]):
        raise UserError("data_collator's completion_mask has gaps: a completion must be the end of its sequence")
    start = max(start, 1)  # nothing predicts the first token
    if start >= len(tokens):
        raise UserError(
            "data_collator truncated a whole completion: raise its maximum length, or set max_length to the same value,"
            " so that such rows are dropped beforehand"
        )
    return tuple(token for token, _ in tokens[:start]), tuple(token for token, _ in tokens[start:])
