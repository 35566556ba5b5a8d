"""Responses of models of different strength -> preference pairs. Pure numpy; text is compared, never copied.

The response of the stronger model is chosen, that of the weaker one rejected (arXiv 2310.02263): no judge, no human.
Responses belong together when their prompts are the same text, wherever they stand in the data.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .order import Which, parse_order, parse_which

Values = Sequence[Hashable] | NDArray  # of an array the elements are compared, so digests do as well as texts


class DropReason(IntEnum):
    """What became of a response: KEPT, or why it is in no pair."""

    KEPT = 0
    MALFORMED_ROW = 1
    EMPTY_PROMPT = 2
    EMPTY_RESPONSE = 3
    NO_MODEL_NAMED = 4
    TOO_LONG = 5
    NO_RATING = 6
    MODEL_NOT_RANKED = 7
    DUPLICATE = 8  # the same model gave the same prompt the same response before
    SECOND_RESPONSE = 9  # the same model answered the same prompt before; not with ratings, which rank responses
    NO_OTHER_RESPONSE = 10  # nothing to compare it with
    NO_PAIR_LEFT = 11  # all its pairs are identical, tied, or not asked for

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class PairTable:
    """P pairs of n responses, in the order in which their prompts first appear, best chosen and rejected first."""

    chosen: NDArray[np.int64]  # (P,) responses, as indices into the n given
    rejected: NDArray[np.int64]  # (P,)
    gap: NDArray[np.float64]  # (P,) strength of the chosen minus that of the rejected, > 0
    identical: NDArray[np.int64]  # (D, 2) pairs dropped because both responses are the same text, the stronger first
    tied: NDArray[np.int64]  # (E, 2) pairs of different text dropped because no one is stronger
    drops: NDArray[np.int8]  # (n,) a `DropReason` for each response
    strength: NDArray[np.float64] = field(repr=False)  # (n,) nan where there is none
    prompt: NDArray[np.int64] = field(repr=False)  # (n,) number of its prompt, in order of first appearance
    content: NDArray[np.int64] = field(repr=False)  # (n,) number of its prompt and text together

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, prompts: Sequence, models: Sequence[str], responses: Sequence) -> Iterator[dict[str, Any]]:
        """A preference dataset: `prompt, chosen, rejected, chosen_model, rejected_model, gap`, a row for each pair."""
        for chosen, rejected, gap in zip(self.chosen.tolist(), self.rejected.tolist(), self.gap.tolist()):
            yield {
                "prompt": prompts[chosen],
                "chosen": responses[chosen],
                "rejected": responses[rejected],
                "chosen_model": models[chosen],
                "rejected_model": models[rejected],
                "gap": gap,
            }

    def grouped_rows(self, prompts: Sequence, models: Sequence[str], responses: Sequence) -> Iterator[dict[str, Any]]:
        """A ranked dataset: `prompt, completions, scores, models, pairs`, a row for each prompt; see `Groups`."""
        groups = self.group()
        for g in range(len(groups)):
            members = groups.members[groups.cu_members[g] : groups.cu_members[g + 1]].tolist()
            yield {
                "prompt": prompts[members[0]],
                "completions": [responses[i] for i in members],
                "scores": self.strength[members].tolist(),
                "models": [models[i] for i in members],
                "pairs": groups.edges[groups.cu_edges[g] : groups.cu_edges[g + 1]].tolist(),
            }

    def count_echoes(self) -> tuple[int, int]:
        """Pairs that repeat an earlier one, and pairs whose opposite is there too: the same two texts, by other models.

        Both come of identical responses, and are kept: two models gave the text, each with its own strength.
        """
        n = len(self.content)
        keys = np.sort(self.content[self.chosen] * n + self.content[self.rejected])
        opposite = self.content[self.rejected] * n + self.content[self.chosen]
        found = np.searchsorted(keys, opposite)
        opposed = keys[np.minimum(found, len(keys) - 1)] == opposite
        return int((np.diff(keys) == 0).sum()), int(opposed.sum())

    def count_prompts(self, some: NDArray) -> int:
        """Prompts of some of the pairs, given by a mask or by ascending numbers."""
        return int((np.diff(self.prompt[self.chosen[some]], prepend=-1) != 0).sum())

    def group(self) -> Groups:
        """The pairs by prompt; a response is there once, however many pairs it is in."""
        members = np.flatnonzero(self.drops == DropReason.KEPT)
        members = members[np.lexsort((members, -self.strength[members], self.prompt[members]))]
        cu_members = _boundaries(self.prompt[members])
        place = np.zeros(len(self.drops), np.int64)
        place[members] = np.arange(len(members)) - np.repeat(cu_members[:-1], np.diff(cu_members))
        edges = np.stack([place[self.chosen], place[self.rejected]], axis=1)
        return Groups(members, cu_members, edges, _boundaries(self.prompt[self.chosen]))


@dataclass(frozen=True)
class Groups:
    """G prompts with M responses in P pairs."""

    members: NDArray[np.int64]  # (M,) responses, as indices into the n given; a prompt's best first
    cu_members: NDArray[np.int64]  # (G+1,) where each prompt's lie in the M
    edges: NDArray[np.int64]  # (P, 2) chosen and rejected, as positions among their prompt's members
    cu_edges: NDArray[np.int64]  # (G+1,)

    def __len__(self) -> int:
        return len(self.cu_members) - 1


def build_pairs(
    prompts: Values,  # (n,)
    models: Sequence[str],  # (n,)
    responses: Values,  # (n,)
    strength: str | Mapping[str, float] | Sequence[float | None] | NDArray,
    which: Which | str = "all",
    *,
    drops: NDArray[np.int8] | None = None,  # (n,)
) -> PairTable:
    """Pair the responses to equal prompts, the stronger one chosen.

    Args:
        prompts: what the responses answer; equal ones are joined.
        models: who gave each response.
        responses: compared to find identical ones.
        strength: an order, `"gpt4 > chatgpt > td003"`, or a number for each model, say its win rate; models left out
            are not paired, and of a model's several responses to a prompt the first counts. Or (n,) ratings, one for
            each response, None or nan where there is none; then all different responses count, whoever gave them.
            A pair's `gap` is the difference: of ranks, win rates or ratings.
        which: the pairs asked for; `all`, `adjacent` or `"a>b, c>d"` may be given as text.
        drops: what is dropped already. By default prompts and responses without any text are.

    Raises:
        UserError: columns differ in length, an unknown model or option, a rating that is no number, a named pair
            against the order, or no pair at all; the message says why.
    """
    n = len(prompts)
    if not len(models) == len(responses) == n:
        raise UserError(f"there are {n} prompts, {len(models)} models and {len(responses)} responses: not rows")
    if n == 0:
        raise UserError("there are no responses")
    which = parse_which(which) if isinstance(which, str) else which
    strength = parse_order(strength) if isinstance(strength, str) else strength
    drops = _find_empty(prompts, responses) if drops is None else drops.astype(np.int8)
    prompt = factorize(prompts)
    content = factorize(prompt * n + factorize(responses))
    names, model = list(dict.fromkeys(models)), factorize(models)
    ranking = None
    if isinstance(strength, Mapping):
        ranking = _check_ranking(strength, names, which)
        score = np.array([ranking.get(name, np.nan) for name in names])[model]
        drop_where(drops, np.isnan(score), DropReason.MODEL_NOT_RANKED)
    else:
        score = _read_ratings(strength, n)
        _check_known(which.models(), names, "the choice of pairs")
        drop_where(drops, np.isnan(score), DropReason.NO_RATING)
    _mark_repeats(drops, [content, model], DropReason.DUPLICATE)
    if ranking is not None:
        _mark_repeats(drops, [prompt, model], DropReason.SECOND_RESPONSE)
        _check_models_left(ranking, names, model, drops)

    usable = np.flatnonzero(drops == DropReason.KEPT)
    order = usable[np.lexsort((usable, -score[usable], prompt[usable]))]  # a prompt's together, its best first
    cu_prompts = _boundaries(prompt[order])
    drops[order[cu_prompts[:-1][np.diff(cu_prompts) == 1]]] = DropReason.NO_OTHER_RESPONSE
    asked = _Asked(which, names, model, _levels(score, order, ranking))
    candidates = order[_enumerate(order, cu_prompts, asked)]
    pairs = _choose(candidates, drops, score, prompt, content)
    if not len(pairs):
        raise UserError(_explain_no_pair(pairs, names, model))
    return pairs


# --- Which pairs ---


def _levels(
    score: NDArray[np.float64], order: NDArray[np.int64], ranking: Mapping[str, float] | None
) -> NDArray[np.int64]:
    """(n,) place of each response in strength, best first, by which two are `adjacent` or not. A model's is among all
    that are ranked: one that did not answer stands between two as well. A rating's is among those of its prompt."""
    if ranking is not None:
        return np.searchsorted(-np.unique(list(ranking.values()))[::-1], -score)
    level = np.zeros(len(score), np.int64)
    level[order] = np.cumsum(np.diff(score[order], prepend=np.inf) != 0)
    return level


def _enumerate(order: NDArray[np.int64], cu_prompts: NDArray[np.int64], asked: _Asked) -> NDArray[np.int64]:
    """(2, P) positions in `order` of the pairs asked for, a prompt's own between two boundaries, in that order."""
    end = np.repeat(cu_prompts[1:], np.diff(cu_prompts))
    found = [np.zeros((2, 0), np.int64)]
    position, offset = np.arange(len(order)), 1
    while len(position := position[position + offset < end[position]]):
        wanted = position[asked(order[position], order[position + offset])]
        found.append(np.stack([wanted, wanted + offset]))
        offset += 1
    pairs = np.concatenate(found, axis=1)
    return pairs[:, np.lexsort(pairs[::-1])]


def _choose(
    candidates: NDArray[np.int64],  # (2, P) chosen and rejected
    drops: NDArray[np.int8],
    score: NDArray[np.float64],
    prompt: NDArray[np.int64],
    content: NDArray[np.int64],
) -> PairTable:
    """The candidates of different text and strength, and apart from them the others; what is in none is dropped."""
    chosen, rejected = candidates
    identical = content[chosen] == content[rejected]
    tied = ~identical & (score[chosen] == score[rejected])
    kept = ~identical & ~tied
    in_pair = np.zeros(len(drops), bool)
    in_pair[candidates[:, kept]] = True
    drop_where(drops, ~in_pair, DropReason.NO_PAIR_LEFT)
    return PairTable(
        chosen[kept],
        rejected[kept],
        score[chosen[kept]] - score[rejected[kept]],
        candidates.T[identical],
        candidates.T[tied],
        drops,
        score,
        prompt,
        content,
    )


class _Asked:
    """Whether pairs (stronger, weaker) of responses are asked for."""

    def __init__(self, which: Which, names: list[str], model: NDArray, level: NDArray) -> None:
        self.kind, self.model, self.level = which.kind, model, level
        self.base = names.index(which.base) if which.kind == "base" else -1
        self.named = np.zeros((len(names), len(names)), bool)
        for better, worse in which.named:
            self.named[names.index(better), names.index(worse)] = True

    def __call__(self, stronger: NDArray, weaker: NDArray) -> NDArray[np.bool_]:
        if self.kind == "adjacent":
            return self.level[weaker] - self.level[stronger] <= 1
        if self.kind == "base":
            return (self.model[stronger] == self.base) != (self.model[weaker] == self.base)
        if self.kind == "named":
            either = self.named[self.model[weaker], self.model[stronger]] & (self.level[weaker] == self.level[stronger])
            return self.named[self.model[stronger], self.model[weaker]] | either
        return np.ones(len(stronger), bool)


# --- Train and validation ---


def prompt_key(prompt: str) -> bytes:
    """A digest of 16 bytes, the same for the same text everywhere."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def held_out(keys: Iterable[bytes] | NDArray[np.bytes_], share: float) -> NDArray[np.bool_]:
    """Which prompts, given by `prompt_key`, are for validation. It depends on nothing but their text and `share`: more
    rows move no prompt to the other side, and a larger share only adds prompts."""
    if not 0 <= share < 1:
        raise UserError(f"the share of prompts held out is {share}; it is at least 0 and below 1")
    keys = np.ascontiguousarray(keys if isinstance(keys, np.ndarray) else list(keys), dtype="S16")
    return keys.view("<u8").reshape(-1, 2)[:, 0] < np.uint64(int(share * 2**64))


# --- Numbers for values ---


def factorize(values: Values) -> NDArray[np.int64]:
    """(n,) numbers, equal for equal values, in order of first appearance."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse]
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values))


def _boundaries(sorted_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where runs of equal numbers begin, and the end."""
    starts = np.flatnonzero(np.diff(sorted_numbers, prepend=-1) != 0)
    return np.append(starts, len(sorted_numbers))


def drop_where(drops: NDArray[np.int8], where: NDArray[np.bool_], reason: DropReason) -> None:
    """Drop responses, given by a mask (n,), but for those that are dropped already."""
    drops[where & (drops == DropReason.KEPT)] = reason


def _mark_repeats(drops: NDArray[np.int8], columns: list[NDArray[np.int64]], reason: DropReason) -> None:
    """All usable rows that are equal to an earlier one in all columns."""
    rows = np.flatnonzero(drops == DropReason.KEPT)
    columns = [column[rows] for column in columns]
    order = np.lexsort((rows, *columns))
    same = np.logical_and.reduce([np.diff(column[order]) == 0 for column in columns])
    drops[rows[order[1:][same]]] = reason


def _find_empty(prompts: Values, responses: Values) -> NDArray[np.int8]:
    drops = np.zeros(len(prompts), np.int8)
    for values, reason in ((prompts, DropReason.EMPTY_PROMPT), (responses, DropReason.EMPTY_RESPONSE)):
        blank = (value is None or (isinstance(value, str) and not value.strip()) for value in values)
        drop_where(drops, np.fromiter(blank, bool, len(values)), reason)
    return drops


def _read_ratings(ratings: Sequence[float | None] | NDArray, n: int) -> NDArray[np.float64]:
    if len(ratings) != n:
        raise UserError(f"there are {len(ratings)} ratings of {n} responses")
    for row, rating in enumerate(ratings if not isinstance(ratings, np.ndarray) else ()):
        if rating is not None and (isinstance(rating, (str, bytes, bool)) or not np.isscalar(rating)):
            raise UserError(f"row {row}: the rating is {rating!r}, no number")
    score = np.array(ratings, np.float64)
    if infinite := np.flatnonzero(np.isinf(score)).tolist():
        raise UserError(f"row {infinite[0]}: the rating is infinite, and so would be the gap")
    return score


# --- Checks and messages ---


def _check_ranking(strength: Mapping[str, float], names: list[str], which: Which) -> dict[str, float]:
    _check_known(strength, names, "the order")
    ranking = {name: float(value) for name, value in strength.items()}
    if wrong := [name for name, value in ranking.items() if not np.isfinite(value)]:
        raise UserError(f"the strength of {wrong[0]} is {ranking[wrong[0]]}: no number to rank it by")
    if len(set(ranking.values())) < 2:
        raise UserError(f"{_list(list(ranking)) or 'no model'}: a pair needs two models of different strength")
    _check_known(which.models(), list(ranking), "the choice of pairs")
    for better, worse in which.named:
        if ranking[better] <= ranking[worse]:
            relation = "weaker" if ranking[better] < ranking[worse] else "no stronger"
            raise UserError(f"the pair {better} > {worse} is asked for, but {better} is {relation} in the order")
    return ranking


def _check_known(asked: Iterable[str], names: Sequence[str], where: str) -> None:
    for name in asked:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"{where} names the model {name}, but there are {_list(names)}{hint}")


def _check_models_left(ranking: Mapping[str, float], names: list[str], model: NDArray, drops: NDArray) -> None:
    left = np.bincount(model[drops == DropReason.KEPT], minlength=len(names))
    for name in ranking:
        if not left[names.index(name)]:
            reasons = describe_drops(drops[model == names.index(name)])
            raise UserError(f"no response of {name} can be used: {reasons}")


def _explain_no_pair(pairs: PairTable, names: list[str], model: NDArray) -> str:
    alone = pairs.drops == DropReason.NO_OTHER_RESPONSE
    if alone.any() and not (pairs.drops == DropReason.NO_PAIR_LEFT).any():
        counts = np.bincount(model[alone], minlength=len(names))
        answers = ", ".join(f"{names[i]} answers {count}" for i, count in enumerate(counts) if count)
        others = f" (dropped: {describe_drops(pairs.drops[~alone])})" if not alone.all() else ""
        return (
            f"no prompt has two responses to compare: {answers} prompts, none in common{others}. Prompts are joined"
            " when their text is the same to the character"
        )
    more = f"; {len(pairs.identical)} pairs are identical, {len(pairs.tied)} tied"
    return f"no pair can be built of {len(pairs.drops)} responses: {describe_drops(pairs.drops)}{more}"


def describe_drops(drops: NDArray[np.int8]) -> str:
    """`"12 empty response, 3 duplicate"`."""
    counts = np.bincount(drops, minlength=len(DropReason))
    return ", ".join(f"{counts[reason]} {reason.label}" for reason in DropReason if reason and counts[reason]) or "none"


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(re.sub(r"\s+", " ", str(name)) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
