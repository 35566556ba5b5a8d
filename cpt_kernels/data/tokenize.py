"""Rows of any form -> tokenised prompt groups, one for each row, with TRL's tokens.

A group, the row that filter, packer and collator work on:

    prompt_ids          list[int]        may be empty: no prompt text and a tokenizer without bos
    completion_ids      list[list[int]]  K different completions, each used by some pair
    chosen, rejected    list[int]        P pairs, as indices into completion_ids; a supervised row has no `rejected`
    targets             list[int]        P completions for the regulariser (y_ref): the target column's, else `chosen`
    scores              list[float]      K values whose differences are the gaps: of ranked rows (without `scores`
                                         the rank, negated) and of pairs with a gap column; else empty
    row                 int              index in the source dataset; of a stream, in what this process reads

How long a sequence may be plays no part here, so that a change of `max_length` finds the tokens in datasets' cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from datasets import Features, List, Value
from jinja2 import TemplateError

from ..errors import UserError
from .encoding import encode_groups, encode_texts, has_own_backend
from .formats import (
    EMPTY,
    IDENTICAL,
    MALFORMED,
    READ_COLUMNS,
    TIED,
    Example,
    Form,
    RankedPairs,
    RowError,
    parse_row,
    ranked_pairs,
    read_gap,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDICES = List(Value("int32"))
GROUP_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(List(Value("int32"))),
        "chosen": _INDICES,
        "rejected": _INDICES,
        "targets": _INDICES,
        "scores": List(Value("float32")),
        "row": Value("int64"),
    }
)
# What the filter must know of a row besides its group. `reason` is empty for a usable row; `seam` is empty unless the
# prompt's last tokens change when the completion follows, else their text.
REMARK_FEATURES = Features(
    {"reason": Value("string"), "detail": Value("string"), "seam": Value("string"), "pairs_given": Value("int32")}
)

_LARGEST_ID = 2**31 - 1  # of GROUP_FEATURES' int32
_PART = 250  # rows that are encoded together

_NO_GROUP = {"prompt_ids": [], "completion_ids": [], "chosen": [], "rejected": [], "targets": [], "scores": []}


@dataclass(frozen=True)
class Tokenization:
    """Batched `datasets.map` function (with indices): columns of a form -> GROUP_FEATURES, REMARK_FEATURES, `keep`.

    Its fields are all that the result depends on besides the rows, and datasets' cache is keyed by them: plain values,
    no paths, nothing that changes when it is used. `version` goes up whenever this module's output changes.
    """

    tokenizer: PreTrainedTokenizerBase
    form: Form
    target_column: str | None = None
    ranked_pairs: RankedPairs = "all"
    keep: tuple[str, ...] = ()
    gap_column: str | None = None
    version: int = 4

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        read = READ_COLUMNS.union([self.target_column, self.gap_column], self.keep)
        columns = {name: batch[name] for name in batch if name in read}
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        if self.form in (Form.GROUP, Form.TOKENS):
            groups = [_attempt(self._read_group, row) for row in rows]
        else:
            groups = self._encode_groups(rows)
        output: dict[str, list] = {name: [] for name in (*GROUP_FEATURES, *REMARK_FEATURES)}
        for index, row, group in zip(indices, rows, groups):
            if isinstance(group, RowError):
                group = {**_NO_GROUP, "reason": group.reason, "detail": group.detail}
            filled = {"row": index, "reason": "", "detail": "", "seam": "", "pairs_given": len(group["rejected"])}
            if self.form is Form.GROUP and row.get("row") is not None:
                filled["row"] = row["row"]
            for name, value in (filled | group).items():
                output[name].append(value)
        return output | {name: columns[name] for name in self.keep}

    # --- Rows that bring their tokens ---

    def _read_group(self, row: dict[str, Any]) -> dict[str, list]:
        prompt_ids = _token_list(row["prompt_ids"], "prompt_ids")
        if self.form is Form.TOKENS:
            names = ["chosen_ids", "rejected_ids"] + ([self.target_column] if self.target_column else [])
            completions = [_token_list(row[name], name) for name in names]
            scores = [1.0 if self.gap_column is None else read_gap(row, self.gap_column), 0.0]
            return self._build_group(prompt_ids, completions, scores, self.target_column is not None)
        group = {name: row[name] for name in _NO_GROUP if name != "scores"}
        group["scores"] = row.get("scores") or []
        if not isinstance(group["completion_ids"], list):
            raise RowError(MALFORMED, "`completion_ids` is not a list of token lists")
        group["completion_ids"] = [_token_list(ids, "completion_ids") for ids in group["completion_ids"]]
        if not all(group["completion_ids"]):
            raise RowError(EMPTY, "`completion_ids` holds a completion without tokens")
        valid = range(len(group["completion_ids"]))
        for name in ("chosen", "rejected", "targets"):
            if not isinstance(group[name], list) or not all(index in valid for index in group[name]):
                raise RowError(MALFORMED, f"`{name}` is not a list of indices into the {len(valid)} completions")
        if not len(group["targets"]) == len(group["chosen"]) == (len(group["rejected"]) or len(group["chosen"])) > 0:
            raise RowError(MALFORMED, "`chosen`, `rejected` and `targets` differ in length, or are empty")
        if len(group["scores"]) not in (0, len(valid)):
            raise RowError(MALFORMED, f"`scores` holds {len(group['scores'])} for {len(valid)} completions")
        if group["scores"] and not _has_gaps(group["scores"], zip(group["chosen"], group["rejected"])):
            group["scores"] = []
        return group

    # --- Rows of text and messages ---

    def _encode_groups(self, rows: list[dict]) -> list[dict | RowError]:
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        ahead = has_own_backend(self.tokenizer) and len(parts) > 1
        if ahead:
            encode_texts(self.tokenizer, [""])  # what this changes in the backend must not change under another thread
        # Rust encodes a part while Python renders the next and makes groups of the one before.
        with ThreadPoolExecutor(2) if ahead else contextlib.nullcontext() as pool:
            encoded = chain.from_iterable((pool.map if pool else map)(self._encode, parts))
            return [row if isinstance(row, RowError) else _attempt(self._finish, *row) for row in encoded]

    def _encode(self, rows: list[dict]) -> list[tuple[Example, list[int], list[list[int]]] | RowError]:
        """What each row says, with the tokens of its prompt and of each prompt + completion."""
        results: list[Any] = [_attempt(parse_row, row, self.form, self.target_column, self.gap_column) for row in rows]
        examples = {i: result for i, result in enumerate(results) if isinstance(result, Example)}
        encoded = self._encode_texts({i: example for i, example in examples.items() if not example.is_chat})
        for chats in _group_by_template_arguments({i: e for i, e in examples.items() if e.is_chat}):
            encoded |= self._encode_chats(chats)
        for i, tokens in encoded.items():
            results[i] = tokens if isinstance(tokens, RowError) else (examples[i], *tokens)
        return results

    def _encode_texts(self, examples: dict[int, Example]) -> dict[int, tuple[list[int], list[list[int]]]]:
        """Row -> tokens of (prompt, each prompt + completion)."""
        if not examples:
            return {}
        eos = self.tokenizer.eos_token
        texts = [
            [example.prompt, *(example.prompt + (c if c.endswith(eos) else c + eos) for c in example.completions)]
            for example in examples.values()
        ]
        return {i: (ids[0], ids[1:]) for i, ids in zip(examples, encode_groups(self.tokenizer, texts))}

    def _encode_chats(self, examples: dict[int, Example]) -> dict[int, Any]:
        """As `_encode_texts`, for conversations that share their template arguments."""
        first = next(iter(examples.values()))
        if getattr(self.tokenizer, "chat_template", "") is None and "chat_template" not in first.template_kwargs:
            raise UserError(
                "the dataset is conversational, but the tokenizer has no chat template: set `tokenizer.chat_template`, "
                "or use text columns"
            )
        as_text = has_own_backend(self.tokenizer)
        render = partial(self.tokenizer.apply_chat_template, tools=first.tools, **first.template_kwargs)
        render = partial(render, tokenize=False) if as_text else partial(render, tokenize=True, return_dict=True)
        prompts = [example.prompt for example in examples.values()]
        wholes = [example.prompt + completion for example in examples.values() for completion in example.completions]
        try:
            rendered = render(prompts, add_generation_prompt=True), render(wholes)
        except (TemplateError, TypeError) as error:
            # A template may refuse one conversation (roles that do not alternate, no content): find which.
            if len(examples) == 1:
                detail = f"the chat template cannot render it: {type(error).__name__}: {error}"
                return {i: RowError(MALFORMED, detail) for i in examples}
            return {j: tokens for i in examples for j, tokens in self._encode_chats({i: examples[i]}).items()}
        starts, ends = rendered if as_text else [tokens["input_ids"] for tokens in rendered]
        ends = iter(ends)
        groups = [[start, *islice(ends, len(e.completions))] for start, e in zip(starts, examples.values())]
        if as_text:
            groups = encode_groups(self.tokenizer, groups, add_special_tokens=False)
        return {i: (ids[0], ids[1:]) for i, ids in zip(examples, groups)}

    def _finish(self, example: Example, prompt_ids: list[int], wholes: list[list[int]]) -> dict[str, Any]:
        """Cut where the prompt's tokens end in every completion. Tokens that merge across the seam are completion."""
        length = min(common_prefix_length(prompt_ids, whole) for whole in wholes)
        seam = repr(self.tokenizer.decode(prompt_ids[length:])) if length < len(prompt_ids) else ""
        completions = [whole[length:] for whole in wholes]
        group = self._build_group(prompt_ids[:length], completions, example.scores, example.has_target, example.pairs)
        return group | {"seam": seam, "pairs_given": example.count_pairs(self.ranked_pairs)}

    def _build_group(
        self,
        prompt_ids: list[int],
        completions: list[list[int]],
        scores: list[float],
        has_target: bool,
        pairs: list[tuple[int, int]] | None = None,
    ) -> dict[str, Any]:
        """Pairs of the different completions: those given, or by score, where one given more than once counts with its
        best."""
        sides = [tuple(ids) for ids in completions]
        number: dict[tuple[int, ...], int] = {}  # of each different completion, those without tokens left out
        ranked_scores: list[float] = []
        for ids, score in zip(sides, scores):
            if ids and ids not in number:
                number[ids] = len(number)
                ranked_scores.append(score)
        if self.form in (Form.SUPERVISED, Form.MESSAGES):
            edges = [(i,) for i in range(len(number))]
        elif pairs is not None:
            asked = dict.fromkeys(tuple(number.get(sides[i]) for i in pair) for pair in pairs)
            edges = [edge for edge in asked if None not in edge and edge[0] != edge[1]]
        else:
            edges = ranked_pairs(ranked_scores, self.ranked_pairs)
        if (has_target and not sides[-1]) or (not edges and not all(sides)):
            raise RowError(EMPTY, "a completion without tokens")
        if not edges and (len(number) == 1 or pairs is not None):
            raise RowError(IDENTICAL, f"all {'completions' if pairs is None else 'pairs'} have the same tokens")
        if not edges:
            raise RowError(TIED, f"ranked_pairs={self.ranked_pairs!r} finds no two different scores in {scores}")
        group: dict[str, Any] = {"chosen": [], "rejected": [], "targets": [], "scores": []}
        target = number.setdefault(sides[-1], len(number)) if has_target else None
        used: dict[int, int] = {}  # number of a completion -> its place in the group
        for edge in edges:
            named = dict(zip(("chosen", "rejected"), edge))
            for name, i in {**named, "targets": named["chosen"] if target is None else target}.items():
                group[name].append(used.setdefault(i, len(used)))
        if (self.form is Form.RANKED or self.gap_column is not None) and _has_gaps(ranked_scores, edges):
            ranked_scores.append(0.0)  # of a target that is in no pair by itself
            group["scores"] = [ranked_scores[i] for i in used]
        tokens = list(number)
        return {"prompt_ids": prompt_ids, "completion_ids": [list(tokens[i]) for i in used]} | group


def _has_gaps(scores: Sequence[float], pairs: Iterable[tuple[int, int]]) -> bool:
    """Whether the scores say of all pairs what they are pairs for; those that a row gives itself may contradict."""
    return all(scores[chosen] > scores[rejected] for chosen, rejected in pairs)


def common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of leading tokens that are the same."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None, max_token_id: int | None = None
) -> None:
    """Make sure that a model of `vocab_size` rows can be trained with the tokenizer. A missing pad token becomes eos.

    `max_token_id` is the largest id in the data (`PreparationReport.max_token_id`). A tokenizer with more tokens than
    the model has rows is fine as long as none of them occurs.

    Raises:
        UserError: no eos token, or a token that the model has no embedding for.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no eos token, so the model could not learn where a completion ends: set "
            '`tokenizer.eos_token` to one of its tokens, for instance "</s>"'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids = {"eos_token_id": tokenizer.eos_token_id, "largest token id in the data": max_token_id}
    for name, token_id in ids.items():
        if vocab_size is not None and token_id is not None and token_id >= vocab_size:
            raise UserError(
                f"the {name}, {token_id} ({tokenizer.convert_ids_to_tokens(token_id)!r}), is beyond the model's "
                f"vocabulary of {vocab_size} (the tokenizer has {len(tokenizer)} tokens): use the model's own "
                "tokenizer, or call `model.resize_token_embeddings(len(tokenizer))`"
            )


def check_same_tokenizer(policy: PreTrainedTokenizerBase, reference: PreTrainedTokenizerBase) -> None:
    """Make sure that token ids of the policy mean the same to the reference, which scores them.

    Tokens that only the reference has are fine, and so is a pad token that only the policy has.

    Raises:
        UserError: some token differs; the message names the first.
    """
    theirs = reference.get_vocab()
    different = [
        (token_id, token)
        for token, token_id in policy.get_vocab().items()
        if theirs.get(token) != token_id and token != policy.pad_token
    ]
    if different:
        token_id, token = min(different)
        raise UserError(
            f"policy and reference do not share a tokenizer: {len(different)} tokens differ, the first is {token!r}, "
            f"{token_id} for the policy and {theirs.get(token, 'unknown')} for the reference; use a reference of the "
            "policy's family"
        )


def _attempt(function, *arguments) -> Any:
    """The result, or the RowError: a row that cannot be used is a result, which the report counts."""
    try:
        return function(*arguments)
    except RowError as error:
        return error


def _group_by_template_arguments(examples: dict[int, Example]) -> list[dict[int, Example]]:
    """One call renders any number of conversations, but with one `tools` and one set of template arguments."""
    groups: dict[str, dict[int, Example]] = {}
    for i, example in examples.items():
        groups.setdefault(repr((example.tools, example.template_kwargs)), {})[i] = example
    return list(groups.values())


def _token_list(value: Any, field: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token <= _LARGEST_ID for token in value):
        raise RowError(MALFORMED, f"`{field}` is not a list of token ids")
    return value
