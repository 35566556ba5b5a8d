"""Collators written for TRL's padded batches, in the place of one for packed batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .collate import PackedBatch, PackedCollator, ReferenceLookup, Tokens, gap_of
from .curriculum import PLACE

_PADDED = ("input_ids", "attention_mask", "completion_mask")


@dataclass(frozen=True)
class UnpaddingCollator:
    """Collate function that packs what another one padded: rows -> :class:`PackedBatch`.

    Attributes:
        padding: gets one row with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` for every pair, and returns
            ``input_ids``, ``attention_mask`` and ``completion_mask``, (2P, L): all chosen sides, then all rejected
            ones. It has to cut what is too long, as in TRL.
        packing: packs what is left.

    Raises:
        UserError: rows that are no pairs, or a batch that is no such batch.
    """

    padding: Callable[[list[dict]], Mapping[str, Any]]
    packing: PackedCollator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PackedBatch:
        examples = [example for row in rows for example in _pair_examples(row)]
        sides = _sequences(self.padding(examples), len(examples)) if examples else []
        edges = [(chosen, chosen, rejected) for chosen, rejected in zip(sides, sides[len(examples) :])]
        gaps = [gap_of(row, *edge) for row in rows for edge in zip(row["chosen"], row["rejected"])]
        return self.packing.pack(sides, edges, gaps, [row[PLACE] for row in rows if PLACE in row])


def packed_collator(given: Callable | None, default: PackedCollator) -> PackedCollator | UnpaddingCollator:
    """What a user gave, as a collator of packed batches, in the way of ``default``."""
    if given is None or isinstance(given, (PackedCollator, UnpaddingCollator)):
        return given or default
    return UnpaddingCollator(given, default)


def with_reference(
    collator: PackedCollator | UnpaddingCollator, lookup: ReferenceLookup | None
) -> PackedCollator | UnpaddingCollator:
    """The collator, looking up reference log-probs."""
    if isinstance(collator, UnpaddingCollator):
        return replace(collator, packing=replace(collator.packing, reference=lookup))
    return collator if collator.reference is not None else replace(collator, reference=lookup)


def _pair_examples(row: Mapping[str, Any]) -> list[dict]:
    if not row["rejected"] or row["targets"] != row["chosen"]:
        raise UserError(
            f"row {row['row']} is more or less than pairs of chosen and rejected, which is all that a data_collator for"
            " padded batches takes: leave it out, or give a PackedCollator"
        )
    completions = row["completion_ids"]
    return [
        {**row, "chosen_ids": completions[chosen], "rejected_ids": completions[rejected]}
        for chosen, rejected in zip(row["chosen"], row["rejected"])
    ]


def _sequences(batch: Mapping[str, Any], pairs: int) -> list[Tokens]:
    """(prompt, completion) of all chosen sides, then of all rejected ones."""
    if not all(name in batch for name in _PADDED):
        raise UserError(
            f"data_collator returned {', '.join(batch)}: it must be a PackedCollator, or give the padded batches of"
            f" TRL's DataCollatorForPreference, with {', '.join(_PADDED)}"
        )
    ids, attended, completed = (batch[name].tolist() for name in _PADDED)
    if len(ids) != 2 * pairs:
        raise UserError(f"data_collator returned {len(ids)} sequences for {pairs} pairs, expected {2 * pairs}")
    return [_sequence(*row) for row in zip(ids, attended, completed)]


def _sequence(ids: list[int], attended: list[int], completed: list[int]) -> Tokens:
    tokens = [(token, bool(inside)) for token, seen, inside in zip(ids, attended, completed) if seen]
    start = next((i for i, (_, inside) in enumerate(tokens) if inside), len(tokens))
    if not all(inside for _, inside in tokens[start:]):
        raise UserError("data_collator's completion_mask has gaps: a completion must be the end of its sequence")
    start = max(start, 1)  # nothing predicts the first token
    if start >= len(tokens):
        raise UserError(
            "data_collator left nothing of a completion: let it cut at a greater length, or set max_length to its own,"
            " for which such rows are dropped beforehand"
        )
    return tuple(token for token, _ in tokens[:start]), tuple(token for token, _ in tokens[start:])
