"""Tokenizes rows of any form into prompt groups, one per row, with the same tokens as TRL.

A prompt group is the row that the filter, the packer and the collator work on:

    prompt_ids          list[int]        empty if there is no prompt text and the tokenizer has no bos token
    completion_ids      list[list[int]]  K different completions, each used by some pair
    chosen, rejected    list[int]        P pairs, as indices into completion_ids; a supervised row has no `rejected`
    targets             list[int]        P completions for SLiC's regularizer (y_ref): the target column, else `chosen`
    scored              list[list[float]]  weights of the tokens of each of K completions, 0 for those that are not
                                         scored; empty if each is 1
    weights             list[float]      P weights of the pairs' losses; empty if each is 1
    image_ids           list[int]        identities of the prompt's images, see `images.ImageReader.image_id`
    scores              list[float]      K ratings whose differences are the gaps. Ranked rows have them (without a
                                         column `scores`, the negated rank) and pairs with a gap column; else empty
    tree                int              equal for rows whose prompts begin alike: see `_of_prompt`
    row                 int              index in the source dataset; of a stream, in the rows that this process reads

Nothing here depends on `max_length`: tokens cached by `datasets` are reused when it changes.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

from datasets import Features, List, Value
from jinja2 import TemplateError
from xxhash import xxh3_64_intdigest

from ..errors import UserError
from .encoding import encode_groups, encode_texts, has_own_backend
from .formats import (
    EMPTY,
    IDENTICAL,
    TIED,
    Example,
    PromptFormat,
    RankedPairs,
    parse_row,
    ranked_pairs,
    read_gap,
)
from .forms import Form, Roles, in_backticks, read_by
from .image_files import open_image
from .images import ImageReader
from .masks import UNJOINED, scored_tokens, text_mask, turn_spans
from .messages import MALFORMED, RowError, has_images, with_images
from .rows import ExactJson, NullPlaces, drop_nulls
from .weights import read_weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDICES = List(Value("int32"))
GROUP_FEATURES = Features(
    {
        "prompt_ids": List(Value("int32")),
        "image_ids": List(Value("int64")),
        "completion_ids": List(List(Value("int32"))),
        "scored": List(List(Value("float32"))),
        "chosen": _INDICES,
        "rejected": _INDICES,
        "targets": _INDICES,
        "weights": List(Value("float32")),
        "scores": List(Value("float32")),
        "tree": Value("int64"),
        "row": Value("int64"),
    }
)
# What the filter needs to know about a row besides its group: `reason` and `detail` say why the row is dropped, and are
# empty for a usable row. `seam` is the text of the prompt's last tokens if a following completion changes them, else
# empty. `pairs_given` counts the pairs of the row before any is dropped. `is_chat` says whether the row is a
# conversation. `doubled` is the special token that follows itself at the start of the prompt or at the end of a
# completion, else empty. `digest` is equal for rows with equal groups.
REMARK_FEATURES = Features(
    {
        **{
            "reason": Value("string"),
            "detail": Value("string"),
            "seam": Value("string"),
            "pairs_given": Value("int32"),
        },
        **{"is_chat": Value("bool"), "doubled": Value("string"), "digest": Value("int64")},
    }
)

_LARGEST_ID = 2**31 - 1  # GROUP_FEATURES store ids as int32
_PART = 250  # rows that are encoded together

_OPTIONAL = ("image_ids", "scores", "scored", "weights")  # lists that a prepared row may lack
_GROUP_REST = ("chosen", "rejected", "targets", *_OPTIONAL)
_GROUP_LISTS = ("prompt_ids", "completion_ids", *_GROUP_REST)


@dataclass(frozen=True)
class Tokenization:
    """Batched `datasets.map` function (with indices): columns of a form -> GROUP_FEATURES, REMARK_FEATURES, `keep`.

    The fields are everything that the result depends on besides the rows, because `datasets` keys its cache by them.
    They must be plain values without paths or state. Raise `version` whenever the output of this module changes.

    `roles` says which columns hold the parts of a row, `nulls` where in a column Arrow may have inserted nulls, and
    `exact` which of the kept columns are `ExactJson`.
    """

    tokenizer: PreTrainedTokenizerBase
    form: Form
    target_column: str | None = None
    ranked_pairs: RankedPairs = "all"
    keep: tuple[str, ...] = ()
    gap_column: str | None = None
    nulls: Mapping[str, NullPlaces] = field(default_factory=dict)
    exact: tuple[str, ...] = ()
    roles: Roles = field(default_factory=dict)
    prompt_format: PromptFormat = "auto"
    reader: ImageReader | None = None  # of a dataset with a column of images
    weight_column: str | None = None
    assistant_only_loss: bool = False
    version: int = 10

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        read = read_by(self.form, self.roles).union(
            [self.target_column, self.gap_column, self.weight_column, "scores"], self.keep
        )
        columns = {name: batch[name] for name in batch if name in read}
        for name, places in self.nulls.items():
            if name in columns:
                columns[name] = [drop_nulls(value, places) for value in columns[name]]
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        if self.form in (Form.GROUP, Form.TOKENS):
            groups = [_attempt(self._read_group, row) for row in rows]
        elif self.reader is not None:
            groups = [_attempt(self._encode_with_images, row, index) for row, index in zip(rows, indices)]
        else:
            groups = self._encode_groups(rows)
        output: dict[str, list] = {name: [] for name in (*GROUP_FEATURES, *REMARK_FEATURES)}
        for index, row, group in zip(indices, rows, groups):
            if isinstance(group, RowError) and group.reason == UNJOINED:
                raise UserError(f"row {index}: {group.detail}")
            if isinstance(group, RowError):
                group = {**{name: [] for name in _GROUP_LISTS}, "reason": group.reason, "detail": group.detail}
            filled = {"row": index, "reason": "", "detail": "", "seam": "", "pairs_given": len(group["rejected"])}
            filled |= {"is_chat": False, "doubled": self._doubled(group), "digest": _group_digest(group)}
            filled["tree"] = _digest_ids(group["prompt_ids"])
            if self.form is Form.GROUP:
                filled |= {name: row[name] for name in ("row", "tree") if row.get(name) is not None}
            for name, value in (filled | group).items():
                output[name].append(value)
        for name in self.keep:
            is_exact = name in self.exact
            output[name] = list(map(ExactJson().encode_example, columns[name])) if is_exact else columns[name]
        return output

    # --- Rows that are tokenized already ---

    def _read_group(self, row: dict[str, Any]) -> dict[str, list]:
        if row.get("train_on") is not None:
            mend = "give `completion_mask`, a 0 or a 1 per token, or `token_weights`"
            raise RowError(MALFORMED, f"`train_on` is for turns of messages, and the row is tokenized: {mend}")
        prompt_ids = _token_list(row["prompt_ids"], "prompt_ids")
        if self.form is Form.TOKENS:
            names = ["chosen_ids", "rejected_ids"] + ([self.target_column] if self.target_column else [])
            completions = [_token_list(row[name], name) for name in names]
            scores = [1.0 if self.gap_column is None else read_gap(row, self.gap_column), 0.0]
            weights = 1.0 if self.weight_column is None else read_weight(row[self.weight_column], self.weight_column)
            has_target, masks = self.target_column is not None, _read_token_weights(row, completions)
            return self._build_group(prompt_ids, completions, scores, has_target, scored=masks, weights=weights)
        group = {name: row[name] for name in _GROUP_LISTS if name not in _OPTIONAL}
        group |= {name: row.get(name) or [] for name in _OPTIONAL}
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
        group["scored"] = _read_token_weights(row, group["completion_ids"])
        group["weights"] = [read_weight(weight, "weights") for weight in group["weights"]]
        if len(group["weights"]) not in (0, len(group["chosen"])):
            raise RowError(MALFORMED, f"`weights` holds {len(group['weights'])} for {len(group['chosen'])} pairs")
        return group

    # --- Rows with images ---

    def _encode_with_images(self, row: dict, index: int) -> dict[str, Any]:
        """Builds the group of a row with or without images as TRL does: prompt and completions are encoded apart.

        Raises:
            RowError: the row cannot be used.
            UserError: a completion has an image.
        """
        assert self.reader is not None
        example = self._parse(row)
        if any(has_images(completion) for completion in example.completions):
            raise UserError(f"row {index} has an image in a completion: only prompts may have images; remove the row")
        try:
            images = [open_image(image) for image in example.images]
        except UserError as error:
            raise RowError(MALFORMED, str(error)) from error
        prompt, completions = self.reader.render(example)
        if (count := prompt.count(self.reader.placeholder)) != len(images):
            held = f"the prompt holds {count} times {self.reader.placeholder}, and the row has {len(images)} images"
            raise RowError(MALFORMED, held)
        prompt_ids, reserved = self.reader.encode(prompt, images), {*self.reader.token_ids}
        if not images and not reserved.isdisjoint(prompt_ids):
            raise RowError(MALFORMED, "the prompt has the token of an image, and the row has no images")
        sides = encode_texts(self.tokenizer, completions, add_special_tokens=False)
        if not all(map(reserved.isdisjoint, sides)):
            raise UserError(f"row {index} has the token of an image in a completion: remove the row")
        group = self._build_group(
            *(prompt_ids, sides, example.scores, example.has_target, example.pairs),
            scored=self._image_masks(example, prompt, completions),
            weights=example.weights,
        )
        group["image_ids"] = [word for image in images for word in self.reader.image_id(image)]
        return group | {"pairs_given": example.count_pairs(self.ranked_pairs), "is_chat": example.is_chat}

    def _image_masks(self, example: Example, prompt: str, completions: list[str]) -> list[list[float]]:
        """Returns the weights of tokens of completions whose prompt was rendered with images; empty if each is 1."""
        if not self.assistant_only_loss and example.train_on is None:
            return []
        assert self.reader is not None
        options = {"tools": example.tools, **example.template_kwargs, "tokenize": False}
        render = partial(self.reader.processor.apply_chat_template, **options)
        messages = None
        if isinstance(example.prompt, list):
            messages = with_images(example.prompt, len(example.images))
            example = replace(example, completions=[with_images(list(side), 0) for side in example.completions])
        masks = []
        for i, text in enumerate(completions):
            spans = turn_spans(render, example, i, prompt + text, messages)
            inside = [(max(0, start - len(prompt)), stop - len(prompt), weight) for start, stop, weight in spans]
            masks.append(text_mask(self.tokenizer, text, inside)[1])
        return masks

    # --- Rows of text and messages ---

    def _parse(self, row: dict[str, Any]) -> Example:
        how = (self.form, self.target_column, self.gap_column, self.roles, self.prompt_format)
        return parse_row(row, *how, weight_column=self.weight_column, all_turns=self.assistant_only_loss)

    def _encode_groups(self, rows: list[dict]) -> list[dict | RowError]:
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        ahead = has_own_backend(self.tokenizer) and len(parts) > 1
        if ahead:
            encode_texts(self.tokenizer, [""])  # sets the backend's state before several threads use it
        # Threads overlap: Rust encodes one part while Python renders the next and builds groups of the previous one.
        with ThreadPoolExecutor(2) if ahead else contextlib.nullcontext() as pool:
            encoded = chain.from_iterable((pool.map if pool else map)(self._encode, parts))
            return [row if isinstance(row, RowError) else _attempt(self._finish, *row) for row in encoded]

    def _encode(self, rows: list[dict]) -> list[tuple[Example, list[int], list[list[int]]] | RowError]:
        """Parses and encodes rows: each becomes (example, prompt ids, ids of each prompt + completion) or an error."""
        results: list[Any] = [_attempt(self._parse, row) for row in rows]
        examples = {i: result for i, result in enumerate(results) if isinstance(result, Example)}
        encoded = self._encode_texts({i: example for i, example in examples.items() if not example.is_chat})
        for chats in _group_by_template_arguments({i: e for i, e in examples.items() if e.is_chat}):
            encoded |= self._encode_chats(chats)
        for i, tokens in encoded.items():
            results[i] = tokens if isinstance(tokens, RowError) else (examples[i], *tokens)
        return results

    def _encode_texts(self, examples: dict[int, Example]) -> dict[int, tuple[list[int], list[list[int]]]]:
        """Returns, by row, the ids of the prompt and of each prompt + completion + eos."""
        if not examples:
            return {}
        eos = self.tokenizer.eos_token
        texts = []
        for example in examples.values():
            prompt, completions = cast("str", example.prompt), cast("list[str]", example.completions)
            ends = ["" if example.is_open or c.endswith(eos) else eos for c in completions]
            texts.append([prompt + example.beginning, *(prompt + c + end for c, end in zip(completions, ends))])
        return {i: (ids[0], ids[1:]) for i, ids in zip(examples, encode_groups(self.tokenizer, texts))}

    def _encode_chats(self, examples: dict[int, Example]) -> dict[int, Any]:
        """Like `_encode_texts`, for conversations with equal tools and template arguments. Values may be RowErrors."""
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
        wholes = [cast("list", e.prompt) + cast("list", turns) for e in examples.values() for turns in e.completions]
        try:
            rendered = render(prompts, add_generation_prompt=True), render(wholes)
        except (TemplateError, TypeError) as error:
            # The template refuses some conversation (for instance because roles do not alternate). Each one is
            # rendered alone to find which.
            if len(examples) == 1:
                detail = f"the chat template cannot render it: {type(error).__name__}: {error}"
                return {i: RowError(MALFORMED, detail) for i in examples}
            return {j: tokens for i in examples for j, tokens in self._encode_chats({i: examples[i]}).items()}
        if not as_text and any(example.beginning or example.is_open for example in examples.values()):
            raise UserError("rows of steps need a tokenizer of transformers with a Rust backend: use one")
        starts, ends = rendered if as_text else [cast("dict", tokens)["input_ids"] for tokens in rendered]
        rest = iter(ends)
        groups = [[start, *islice(rest, len(e.completions))] for start, e in zip(starts, examples.values())]
        for group, example in zip(groups, examples.values()):
            if example.is_open:  # without the template's end of a turn
                group[1:] = [group[0] + turns[0]["content"] for turns in cast("list[list]", example.completions)]
            if example.beginning:
                group[0] += example.beginning
        if as_text:
            groups = encode_groups(self.tokenizer, groups, add_special_tokens=False)
        return {i: (ids[0], ids[1:]) for i, ids in zip(examples, groups)}

    def _finish(self, example: Example, prompt_ids: list[int], wholes: list[list[int]]) -> dict[str, Any]:
        """Builds the group: cuts each prompt + completion after the prompt tokens that all of them begin with.

        A token that spans the end of the prompt text belongs to the completion, as in TRL.
        """
        length = min(common_prefix_length(prompt_ids, whole) for whole in wholes)
        seam = repr(self.tokenizer.decode(prompt_ids[length:])) if length < len(prompt_ids) else ""
        completions = [whole[length:] for whole in wholes]
        masks: list[list[float]] = []
        if (self.assistant_only_loss and not (example.is_chat and example.is_open)) or example.train_on is not None:
            if not has_own_backend(self.tokenizer):
                raise UserError("scoring some turns needs a tokenizer of transformers with a Rust backend: use one")
            masks = [mask[length:] for mask in scored_tokens(self.tokenizer, example, wholes)]
        group = self._build_group(
            *(prompt_ids[:length], completions, example.scores, example.has_target, example.pairs),
            scored=masks,
            weights=example.weights,
        )
        remarks = {"seam": seam, "pairs_given": example.count_pairs(self.ranked_pairs), **_of_prompt(example)}
        return group | remarks

    def _doubled(self, group: Mapping[str, Any]) -> str:
        """Returns the bos token if a sequence begins with it twice, the eos token if one ends with it twice, or ""."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        starts = [(group["prompt_ids"] + ids)[:2] for ids in group["completion_ids"]]
        if bos is not None and [bos, bos] in starts:
            return self.tokenizer.bos_token
        return self.tokenizer.eos_token if [eos, eos] in [ids[-2:] for ids in group["completion_ids"]] else ""

    def _build_group(
        self,
        prompt_ids: list[int],
        completions: list[list[int]],
        scores: list[float],
        has_target: bool,
        pairs: list[tuple[int, int]] | None = None,
        *,
        scored: list[list[float]],
        weights: list[float] | float,
    ) -> dict[str, Any]:
        """Builds a prompt group from completions with descending ratings, then the target if there is one.

        Pairs are those given, or follow from the ratings. A completion that occurs several times counts once, with its
        best rating. A pair that is given several times counts once, with its first weight.

        Raises:
            RowError: no pair is left, or a completion of a pair has no tokens.
        """
        # Equal completions become one index, and completions without tokens none.
        sides = [tuple(ids) for ids in completions]
        index_of: dict[tuple[int, ...], int] = {}
        ranked_scores: list[float] = []
        masks: dict[tuple[int, ...], list[float]] = {}
        for ids, mask in zip(sides, scored):
            if masks.setdefault(ids, mask) != mask:
                raise RowError(MALFORMED, "two completions have the same tokens, but not the same weights of tokens")
        for ids, score in zip(sides, scores):
            if ids and ids not in index_of:
                index_of[ids] = len(index_of)
                ranked_scores.append(score)

        # Edges: (chosen, rejected), or (chosen,) of supervised rows.
        edges: list[tuple[int, ...]]
        if self.form in (Form.SUPERVISED, Form.MESSAGES):
            edges = [(i,) for i in range(len(index_of))]
        elif pairs is not None:
            each = weights if isinstance(weights, list) else [weights] * len(pairs)
            asked: dict[tuple, float] = {}
            for (better, worse), weight in zip(pairs, each):
                asked.setdefault((sides[better], sides[worse]), weight)
            asked = {(a, b): w for (a, b), w in asked.items() if a in index_of and b in index_of and a != b}
            edges, weights = [(index_of[a], index_of[b]) for a, b in asked], list(asked.values())
        else:
            edges = [*ranked_pairs(ranked_scores, self.ranked_pairs)]
        if (has_target and not sides[-1]) or (not edges and not all(sides)):
            raise RowError(EMPTY, "a completion without tokens")
        if not edges and (len(index_of) == 1 or pairs is not None):
            raise RowError(IDENTICAL, f"all {'completions' if pairs is None else 'pairs'} have the same tokens")
        if not edges:
            raise RowError(TIED, f"ranked_pairs={self.ranked_pairs!r} finds no two different scores in {scores}")

        # The group holds the completions that an edge or the target uses, in the order of their first use.
        group: dict[str, Any] = {"chosen": [], "rejected": [], "targets": [], "scores": []}
        target = index_of.setdefault(sides[-1], len(index_of)) if has_target else None
        used: dict[int, int] = {}  # index of a completion -> its place in the group
        for edge in edges:
            named = dict(zip(("chosen", "rejected"), edge))
            for name, i in {**named, "targets": named["chosen"] if target is None else target}.items():
                group[name].append(used.setdefault(i, len(used)))
        if (self.form is Form.RANKED or self.gap_column is not None) and _has_gaps(ranked_scores, edges):
            ranked_scores.append(0.0)  # for a target that is in no pair, so its value is never used
            group["scores"] = [ranked_scores[i] for i in used]
        tokens = list(index_of)
        found: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "image_ids": [],
            "completion_ids": [list(tokens[i]) for i in used],
        }
        found["scored"] = [masks[tokens[i]] for i in used] if masks else []
        if _are_ones(found["scored"]):
            found["scored"] = []
        each = weights if isinstance(weights, list) else [weights] * len(edges)
        found["weights"] = [] if all(weight == 1 for weight in each) else each
        return found | group


def _of_prompt(example: Example) -> dict[str, Any]:
    """Returns `is_chat` and `tree`: conversations are of one tree if they are equal up to the user's first turn, and
    texts if their prompts are equal without the steps with which an answer begins. Rows with images or token ids are of
    one tree if their prompts have equal tokens.
    """
    start: Any = example.prompt
    if example.is_chat:
        first = next((i for i, turn in enumerate(start) if turn["role"] == "user"), len(start) - 1)
        start = start[: first + 1]
    return {"is_chat": example.is_chat, "tree": xxh3_64_intdigest(repr(start).encode("utf-8", "surrogatepass")) >> 1}


def _digest_ids(ids: Sequence[int]) -> int:
    return xxh3_64_intdigest(array("i", ids).tobytes()) >> 1


def _group_digest(group: Mapping[str, Any]) -> int:
    """Returns 63 bits that are equal for groups with equal tokens and pairs."""
    tokens = [group["prompt_ids"], *group["completion_ids"]]
    rest = repr([[len(ids) for ids in tokens], *(group[name] for name in _GROUP_REST)]).encode()
    return xxh3_64_intdigest(b"".join(array("i", ids).tobytes() for ids in tokens) + rest) >> 1


def _has_gaps(scores: Sequence[float], pairs: Iterable[tuple[int, ...]]) -> bool:
    """Returns whether the chosen side of every pair has the higher rating. Pairs given by a row may contradict it."""
    return all(scores[chosen] > scores[rejected] for chosen, rejected in pairs)


def common_prefix_length(ids: Sequence[int], others: Sequence[int]) -> int:
    """Returns the number of leading tokens that are equal."""
    if others[: len(ids)] == ids:
        return len(ids)
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None, max_token_id: int | None = None
) -> None:
    """Checks that a model with `vocab_size` embeddings can be trained with the tokenizer, and sets a missing pad token.

    `max_token_id` is the largest id in the data (`PreparationReport.max_token_id`). A tokenizer may have tokens beyond
    the model's embeddings if none of them occurs in the data.

    Raises:
        UserError: there is no eos token, or a token that occurs has no embedding.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no eos token, which teaches the model where a completion ends: set "
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
    """Checks that the reference, which scores the policy's token ids, reads them as the same tokens.

    The reference may have further tokens, and the policy a pad token of its own.

    Raises:
        UserError: some tokens differ; the message names the first.
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
    """Calls the function, and returns its RowError if it raises one: the filter counts rows that cannot be used."""
    try:
        return function(*arguments)
    except RowError as error:
        return error


def _group_by_template_arguments(examples: dict[int, Example]) -> list[dict[int, Example]]:
    """Groups conversations that one call can render: those with equal `tools` and template arguments."""
    groups: dict[str, dict[int, Example]] = {}
    for i, example in examples.items():
        groups.setdefault(repr((example.tools, example.template_kwargs)), {})[i] = example
    return list(groups.values())


def _read_token_weights(row: Mapping[str, Any], completions: Sequence[Sequence[int]]) -> list[list[float]]:
    """Returns the weights of each completion's tokens, by one of three columns; empty without them, or if each is 1.

    ``completion_mask`` holds weights of 0 and 1, ``token_weights`` any, and ``scored`` those of a prepared row.
    """
    given = {name: row[name] for name in ("scored", "completion_mask", "token_weights") if row.get(name) is not None}
    given = {name: value for name, value in given.items() if name != "scored" or value != []}
    if len(given) > 1:
        raise RowError(MALFORMED, f"{in_backticks(given)} all say which tokens are scored: give one of them")
    if not given:
        return []
    ((column, masks),) = given.items()
    lengths = [len(mask) if isinstance(mask, list) else -1 for mask in masks] if isinstance(masks, list) else []
    if lengths != [len(ids) for ids in completions]:
        raise RowError(MALFORMED, f"`{column}` does not hold a list per completion, with a number for each token")
    if column == "completion_mask" and any(value not in (0, 1) for mask in masks for value in mask):
        mend = "weights go into a column `token_weights`"
        raise RowError(MALFORMED, f"`{column}` holds a value that is not 0 or 1: {mend}")
    weights = [[read_weight(float(w) if w is True or w is False else w, column) for w in mask] for mask in masks]
    return [] if _are_ones(weights) else weights


def _are_ones(masks: Iterable[Iterable[float]]) -> bool:
    """Returns whether all tokens have weight 1."""
    return all({*mask} <= {1} for mask in masks)


def _token_list(value: Any, field: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token <= _LARGEST_ID for token in value):
        raise RowError(MALFORMED, f"`{field}` is not a list of token ids")
    return value
