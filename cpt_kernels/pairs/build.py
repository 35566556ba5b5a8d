"""Builds preference pairs from responses of models of different strength (arXiv 2310.02263). Pure numpy.

In each pair the response of the stronger model is chosen and that of the weaker one is rejected, without a judge or
human labels. Responses to equal prompts are paired, wherever they are in the data. Texts or their digests are only
compared.
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

TextsOrDigests = Sequence[Hashable] | NDArray


class DropReason(IntEnum):
    """Why a response is in no pair. KEPT means that it is in some pair, or may still be paired."""

    KEPT = 0
    MALFORMED_ROW = 1
    EMPTY_PROMPT = 2
    EMPTY_RESPONSE = 3
    NO_MODEL_NAMED = 4
    TOO_LONG = 5
    NO_RATING = 6
    MODEL_NOT_RANKED = 7
    DUPLICATE = 8  # the same model has given the same response to the same prompt before
    SECOND_RESPONSE = 9  # the same model has answered the same prompt before; not used if ratings rank the responses
    NO_OTHER_RESPONSE = 10  # no other response to the same prompt is left
    NO_PAIR_LEFT = 11  # all its pairs are identical, tied, or not asked for

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True)
class PairTable:
    """P pairs of n responses, by prompt in order of first appearance, then best chosen and best rejected first."""

    chosen: NDArray[np.int64]  # (P,) indices of responses
    rejected: NDArray[np.int64]  # (P,) indices of responses
    gap: NDArray[np.float64]  # (P,) strength of chosen minus strength of rejected, > 0
    identical: NDArray[np.int64]  # (D, 2) pairs dropped because both texts are equal, the stronger response first
    tied: NDArray[np.int64]  # (E, 2) pairs of different texts dropped because their strengths are equal
    drops: NDArray[np.int8]  # (n,) a `DropReason` for each response
    strength: NDArray[np.float64] = field(repr=False)  # (n,) nan if unknown
    prompt: NDArray[np.int64] = field(repr=False)  # (n,) code of each response's prompt, in order of first appearance
    content: NDArray[np.int64] = field(repr=False)  # (n,) code of each response's prompt and text

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, prompts: Sequence, models: Sequence[str], responses: Sequence) -> Iterator[dict[str, Any]]:
        """Yields a preference dataset: `prompt, chosen, rejected, chosen_model, rejected_model, gap` of each pair."""
        for chosen, rejected, gap in zip(self.chosen.tolist(), self.rejected.tolist(), self.gap.tolist()):
            yield {
                "prompt": prompts[chosen],
                "chosen": responses[chosen],
                "rejected": responses[rejected],
                "chosen_model": models[chosen],
                "rejected_model": models[rejected],
                "gap": gap,
            }

    def count_echoes(self) -> tuple[int, int]:
        """Counts pairs that repeat an earlier pair's texts, and pairs whose two texts are also paired the other way.

        Both occur if several models give identical responses. All these pairs are kept, because each has its own models
        and strengths.
        """
        n = len(self.content)
        keys = np.sort(self.content[self.chosen] * n + self.content[self.rejected])
        opposite = self.content[self.rejected] * n + self.content[self.chosen]
        found = np.searchsorted(keys, opposite)
        opposed = keys[np.minimum(found, len(keys) - 1)] == opposite
        return int((np.diff(keys) == 0).sum()), int(opposed.sum())

    def count_prompts(self, some: NDArray) -> int:
        """Returns the number of prompts of some pairs, given by a mask or by ascending indices."""
        return int((np.diff(self.prompt[self.chosen[some]], prepend=-1) != 0).sum())

    def group(self) -> Groups:
        """Groups the pairs by prompt. Each response occurs once, however many pairs contain it."""
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

    members: NDArray[np.int64]  # (M,) indices of responses, by prompt, the best response of each prompt first
    cu_members: NDArray[np.int64]  # (G+1,) where the members of each prompt begin
    edges: NDArray[np.int64]  # (P, 2) chosen and rejected, as positions among the members of their prompt
    cu_edges: NDArray[np.int64]  # (G+1,) where the pairs of each prompt begin

    def __len__(self) -> int:
        return len(self.cu_members) - 1


def build_pairs(
    prompts: TextsOrDigests,  # (n,)
    models: Sequence[str] | NDArray[np.object_],  # (n,)
    responses: TextsOrDigests,  # (n,)
    strength: str | Mapping[str, float] | Sequence[float | None] | NDArray,
    which: Which | str = "all",
    *,
    drops: NDArray[np.int8] | None = None,  # (n,)
    several: bool = False,
) -> PairTable:
    """Pairs the responses to equal prompts; the stronger response is chosen.

    Args:
        prompts, models: the prompt and the model of each response.
        responses: compared to find identical ones.
        strength: an order, `"gpt4 > chatgpt > td003"`, or a number per model, for instance its win rate. Then models
            left out are not paired, and only the first response of a model to a prompt counts. Or (n,) ratings, one per
            response, None or nan if unknown; then all different responses to a prompt count. The `gap` of a pair is the
            difference of ranks, win rates or ratings.
        which: the pairs asked for. `all`, `adjacent` or `"a>b, c>d"` may be given as text.
        drops: responses that are dropped already. The default drops empty prompts and responses.
        several: count all different responses of a model to a prompt, not only its first.

    Raises:
        UserError: the input cannot be used, or there is no pair; the message says why.
    """
    # Read the arguments. Prompts, texts and models become integer codes.
    n = _count_rows(prompts, models, responses)
    which = parse_which(which) if isinstance(which, str) else which
    strength = parse_order(strength) if isinstance(strength, str) else strength
    drops = _find_empty(prompts, responses) if drops is None else drops.astype(np.int8)
    prompt = factorize(prompts)
    content = factorize(prompt * n + factorize(responses))
    names, model = list(dict.fromkeys(models)), factorize(models)

    # Give each response its strength, and drop those that cannot be compared.
    if isinstance(strength, Mapping):
        ranking = _check_ranking(strength, names, which)
        strengths = np.array([ranking.get(name, np.nan) for name in names])[model]
        drop_where(drops, np.isnan(strengths), DropReason.MODEL_NOT_RANKED)
    else:
        ranking = None
        strengths = _read_ratings(strength, n)
        _check_known(which.models(), names, "the choice of pairs")
        drop_where(drops, np.isnan(strengths), DropReason.NO_RATING)
    _drop_repeats(drops, [content, model], DropReason.DUPLICATE)
    if ranking is not None:
        if not several:
            _drop_repeats(drops, [prompt, model], DropReason.SECOND_RESPONSE)
        _check_models_left(ranking, names, model, drops)

    # Sort the usable responses by prompt, the best response of each prompt first.
    usable = np.flatnonzero(drops == DropReason.KEPT)
    order = usable[np.lexsort((usable, -strengths[usable], prompt[usable]))]
    cu_prompts = _boundaries(prompt[order])
    drops[order[cu_prompts[:-1][np.diff(cu_prompts) == 1]]] = DropReason.NO_OTHER_RESPONSE

    # Enumerate the pairs asked for, and keep those with different texts and strengths.
    asked = _Asked(which, names, model, _strength_ranks(strengths, order, ranking))
    pairs = _keep_comparable(order[_enumerate(order, cu_prompts, asked)], drops, strengths, prompt, content)
    if not len(pairs):
        raise UserError(_explain_no_pair(pairs, names, model))
    return pairs


# --- Which pairs ---


def _strength_ranks(
    strengths: NDArray[np.float64], order: NDArray[np.int64], ranking: Mapping[str, float] | None
) -> NDArray[np.int64]:
    """Returns (n,) the rank of each response in strength, best first; `adjacent` pairs differ by at most 1.

    Models rank among all ranked models, also those that did not answer the prompt. Ratings rank within the prompt.
    """
    if ranking is not None:
        return np.searchsorted(-np.unique(list(ranking.values()))[::-1], -strengths)
    rank = np.zeros(len(strengths), np.int64)
    rank[order] = np.cumsum(np.diff(strengths[order], prepend=np.inf) != 0)
    return rank


def _enumerate(order: NDArray[np.int64], cu_prompts: NDArray[np.int64], asked: _Asked) -> NDArray[np.int64]:
    """Returns (2, P) positions in `order` of the pairs asked for, ascending. Both positions belong to one prompt."""
    # One round per distance between the two positions, with all prompts at once.
    end = np.repeat(cu_prompts[1:], np.diff(cu_prompts))
    found = [np.zeros((2, 0), np.int64)]
    position, offset = np.arange(len(order)), 1
    while len(position := position[position + offset < end[position]]):
        wanted = position[asked(order[position], order[position + offset])]
        found.append(np.stack([wanted, wanted + offset]))
        offset += 1
    pairs = np.concatenate(found, axis=1)
    return pairs[:, np.lexsort(pairs[::-1])]


def _keep_comparable(
    candidates: NDArray[np.int64],  # (2, P) chosen and rejected
    drops: NDArray[np.int8],
    strengths: NDArray[np.float64],
    prompt: NDArray[np.int64],
    content: NDArray[np.int64],
) -> PairTable:
    """Keeps the candidates that differ in text and strength, and drops the responses that are in none of them."""
    chosen, rejected = candidates
    identical = content[chosen] == content[rejected]
    tied = ~identical & (strengths[chosen] == strengths[rejected])
    kept = ~identical & ~tied
    in_pair = np.zeros(len(drops), bool)
    in_pair[candidates[:, kept]] = True
    drop_where(drops, ~in_pair, DropReason.NO_PAIR_LEFT)
    return PairTable(
        chosen[kept],
        rejected[kept],
        strengths[chosen[kept]] - strengths[rejected[kept]],
        candidates.T[identical],
        candidates.T[tied],
        drops,
        strengths,
        prompt,
        content,
    )


class _Asked:
    """Decides whether pairs (stronger, weaker) of responses are asked for."""

    def __init__(self, which: Which, names: list[str], model: NDArray, rank: NDArray) -> None:
        self.kind, self.model, self.rank = which.kind, model, rank
        self.base = names.index(which.base) if which.kind == "base" else -1
        self.named = np.zeros((len(names), len(names)), bool)
        for better, worse in which.named:
            self.named[names.index(better), names.index(worse)] = True

    def __call__(self, stronger: NDArray, weaker: NDArray) -> NDArray[np.bool_]:
        if self.kind == "adjacent":
            return self.rank[weaker] - self.rank[stronger] <= 1
        if self.kind == "base":
            return (self.model[stronger] == self.base) != (self.model[weaker] == self.base)
        if self.kind == "named":
            # Two of equal strength are in no order, so either may be the named one. They are counted as tied later.
            either = self.named[self.model[weaker], self.model[stronger]] & (self.rank[weaker] == self.rank[stronger])
            return self.named[self.model[stronger], self.model[weaker]] | either
        return np.ones(len(stronger), bool)


# --- Train and validation ---


def prompt_key(prompt: str) -> bytes:
    """Returns a digest of 16 bytes, which depends on the text alone."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def held_out(keys: Iterable[bytes] | NDArray[np.bytes_], share: float) -> NDArray[np.bool_]:
    """Returns (n,) whether each pair, given by the `prompt_key` of its prompt, is for validation.

    Whole prompts are held out, in the order of their digests, until the number of pairs is as close to ``share`` as
    whole prompts allow. At least one prompt is held out where ``share`` is above 0, and at least one is left. The order
    depends on the texts alone, so a larger share only adds prompts, and more data moves only the prompts at the border.

    Raises:
        UserError: ``share`` is not in [0, 1), or there are fewer than two prompts to split.
    """
    if not 0 <= share < 1:
        raise UserError(f"the share of pairs held out is {share}: give a number of at least 0 and below 1")
    keys = np.ascontiguousarray(keys if isinstance(keys, np.ndarray) else list(keys), dtype="S16")
    if share == 0:
        return np.zeros(len(keys), bool)
    digests, prompt, pairs = np.unique(keys, return_inverse=True, return_counts=True)
    if len(digests) < 2:
        raise UserError(f"{len(digests)} prompt has pairs: a part that is held out needs at least 2 prompts")
    held = np.cumsum(pairs)  # pairs of the first prompts
    number = 1 + int(np.abs(held[:-1] - share * len(keys)).argmin())
    return prompt < number


# --- Codes and drops ---


def factorize(values: TextsOrDigests) -> NDArray[np.int64]:
    """Returns (n,) integer codes, equal for equal values and in order of first appearance."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[inverse]
    codes: dict[Hashable, int] = {}
    return np.fromiter((codes.setdefault(value, len(codes)) for value in values), np.int64, len(values))


def _boundaries(sorted_codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns where each run of equal codes begins, and the end."""
    starts = np.flatnonzero(np.diff(sorted_codes, prepend=-1) != 0)
    return np.append(starts, len(sorted_codes))


def drop_where(drops: NDArray[np.int8], where: NDArray[np.bool_], reason: DropReason) -> None:
    """Drops the responses of a mask (n,). Responses that are dropped already keep their first reason."""
    drops[where & (drops == DropReason.KEPT)] = reason


def _drop_repeats(drops: NDArray[np.int8], columns: list[NDArray[np.int64]], reason: DropReason) -> None:
    """Drops usable responses that equal an earlier usable one in all columns."""
    rows = np.flatnonzero(drops == DropReason.KEPT)
    columns = [column[rows] for column in columns]
    order = np.lexsort((rows, *columns))
    same = np.logical_and.reduce([np.diff(column[order]) == 0 for column in columns])
    drops[rows[order[1:][same]]] = reason


def _find_empty(prompts: TextsOrDigests, responses: TextsOrDigests) -> NDArray[np.int8]:
    drops = np.zeros(len(prompts), np.int8)
    for values, reason in ((prompts, DropReason.EMPTY_PROMPT), (responses, DropReason.EMPTY_RESPONSE)):
        blank = (value is None or (isinstance(value, str) and not value.strip()) for value in values)
        drop_where(drops, np.fromiter(blank, bool, len(values)), reason)
    return drops


def _read_ratings(ratings: Sequence[float | None] | NDArray, n: int) -> NDArray[np.float64]:
    if len(ratings) != n:
        raise UserError(f"there are {len(ratings)} ratings for {n} responses: give one per response")
    for row, rating in enumerate(ratings if not isinstance(ratings, np.ndarray) else ()):
        if rating is not None and (isinstance(rating, (str, bytes, bool)) or not np.isscalar(rating)):
            raise UserError(f"row {row}: the rating is {rating!r}; expected a number")
    strengths = np.array(ratings, np.float64)
    if infinite := np.flatnonzero(np.isinf(strengths)).tolist():
        raise UserError(f"row {infinite[0]}: the rating is infinite; expected a finite number")
    return strengths


# --- Checks and messages ---


def _count_rows(prompts: TextsOrDigests, models: TextsOrDigests, responses: TextsOrDigests) -> int:
    n = len(prompts)
    if not len(models) == len(responses) == n:
        raise UserError(
            f"there are {n} prompts, {len(models)} models and {len(responses)} responses: give one of each per row"
        )
    if n == 0:
        raise UserError("there are no responses")
    return n


def _check_ranking(strength: Mapping[str, float], names: list[str], which: Which) -> dict[str, float]:
    _check_known(strength, names, "the order")
    ranking = {name: float(value) for name, value in strength.items()}
    if wrong := [name for name, value in ranking.items() if not np.isfinite(value)]:
        raise UserError(f"the strength of {wrong[0]} is {ranking[wrong[0]]}; expected a finite number")
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
            f"no prompt has two responses to compare: {answers} prompts, none in common{others}. Only prompts with"
            " exactly equal text are joined"
        )
    more = f"; {len(pairs.identical)} pairs are identical, {len(pairs.tied)} tied"
    return f"no pair can be built of {len(pairs.drops)} responses: {describe_drops(pairs.drops)}{more}"


def describe_drops(drops: NDArray[np.int8]) -> str:
    """Returns counts of the reasons as text, for instance `"12 empty response, 3 duplicate"`."""
    counts = np.bincount(drops, minlength=len(DropReason))
    return ", ".join(f"{counts[reason]} {reason.label}" for reason in DropReason if reason and counts[reason]) or "none"


def _list(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(re.sub(r"\s+", " ", str(name)) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
