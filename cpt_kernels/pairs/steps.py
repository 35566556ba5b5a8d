"""Chooses pairs of answers that begin with the same steps, and cuts them where they part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import UserError
from .build import DropReason, PairTable, drop_where
from .files import Responses, pair_batches, take
from .responses import TURNS

_COLUMNS = ("initial_steps", "chosen_step", "chosen_rest", "rejected_step", "rejected_rest")


def step_pairs(responses: Responses, pairs: PairTable, separator: str) -> tuple[PairTable, NDArray[np.int64]]:
    """Returns, for every chosen answer and every other model, the pair whose answers share the longest beginning.

    A beginning is a number of whole steps; a step ends with the separator. Pairs without a step in common are left out,
    and so are pairs of an answer with its own continuation, and answers of several messages.

    Returns:
        The pairs, and (P,) the characters of their common beginning.

    Raises:
        UserError: no pair is left.
    """
    rows = np.unique(np.concatenate([pairs.chosen, pairs.rejected]))
    texts = dict(zip(rows.tolist(), take(responses.table["response"], rows).to_pylist()))
    shapes = responses.numbers("response_shape")
    best: dict[tuple, tuple[int, int]] = {}  # chosen answer and model of the other -> (characters, pair)
    for p, (chosen, rejected) in enumerate(zip(pairs.chosen.tolist(), pairs.rejected.tolist())):
        one, other = texts[chosen], texts[rejected]
        common = len(os.path.commonprefix([one, other]))  # noqa: RUF071 (of characters)
        cut = one.rfind(separator, 0, common) + len(separator)
        is_text = TURNS not in (shapes[chosen], shapes[rejected])
        if not is_text or cut < len(separator) or common == min(len(one), len(other)):
            continue
        key = (chosen, responses.models[rejected])
        if cut > best.get(key, (0, 0))[0]:
            best[key] = (cut, p)
    if not best:
        raise UserError(
            f"no two answers to a prompt have a first step in common, where steps end with {separator!r}: give --steps"
            " another separator, or more answers of each model"
        )
    found = sorted(best.values(), key=lambda each: each[1])
    kept = np.array([p for _, p in found])
    drops = pairs.drops.copy()
    unused = np.ones(len(drops), bool)
    unused[pairs.chosen[kept]] = unused[pairs.rejected[kept]] = False
    drop_where(drops, unused, DropReason.NO_PAIR_LEFT)
    chosen, rejected, gap = pairs.chosen[kept], pairs.rejected[kept], pairs.gap[kept]
    return replace(pairs, chosen=chosen, rejected=rejected, gap=gap, drops=drops), np.array([cut for cut, _ in found])


def step_pair_batches(
    responses: Responses,
    pairs: PairTable,
    part: NDArray,  # (P,) bool
    chat: bool,
    cuts: NDArray[np.int64],  # (P,) characters
    separator: str,
) -> Iterator[pa.Table]:
    """Yields the rows of :func:`.files.pair_batches` with the beginning, the next step and the rest of both answers."""
    left = iter(cuts[part].tolist())
    texts = zip(*(take(responses.table["response"], side[part]).to_pylist() for side in (pairs.chosen, pairs.rejected)))
    for batch in pair_batches(responses, pairs, part, chat):
        columns: dict[str, list[str]] = {name: [] for name in _COLUMNS}
        for _ in range(len(batch)):
            (one, other), cut = next(texts), next(left)
            ends = [text.find(separator, cut) + len(separator) for text in (one, other)]
            ends = [end if end >= len(separator) + cut else len(text) for end, text in zip(ends, (one, other))]
            values = (one[:cut], one[cut : ends[0]], one[ends[0] :], other[cut : ends[1]], other[ends[1] :])
            for name, value in zip(_COLUMNS, values):
                columns[name].append(value)
        others = {name: batch[name] for name in batch.column_names if name not in ("chosen", "rejected")}
        yield pa.table({"prompt": others.pop("prompt"), **columns, **others})
