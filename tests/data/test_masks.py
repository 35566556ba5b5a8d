"""Tests which tokens are scored (assistant's turns, own masks), weights of pairs, and rows dropped for them."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset
from PIL import Image

from cpt_kernels.data.formats import UNSCORED
from cpt_kernels.data.forms import Form
from cpt_kernels.data.preparation import prepare
from cpt_kernels.data.tokenize import Tokenization
from cpt_kernels.errors import UserError
from tests.helpers.image_models import tiny_processor
from tests.helpers.toy import CHAT_TEMPLATE, MARKED_TEMPLATE, word_tokenizer


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# prompt: w0 w10 </s> w1       chosen: w11 w12 </s> | w0 w13 </s> | w2 w14 </s> | w1 w15 </s>       rejected: w16 </s>
ROW = {
    "prompt": [turn("user", "w10")],
    "chosen": [turn("assistant", "w11 w12"), turn("user", "w13"), turn("tool", "w14"), turn("assistant", "w15")],
    "rejected": [turn("assistant", "w16")],
}
CHOSEN_MASK = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]


@pytest.fixture(params=[CHAT_TEMPLATE, MARKED_TEMPLATE], ids=["turn by turn", "marked"])
def tokenizer(request):
    found = word_tokenizer()
    found.chat_template = request.param
    return found


def prepared(rows: list[dict], tokenizer=None, **options):
    if tokenizer is None:
        tokenizer = word_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
    return prepare(Dataset.from_list(rows), tokenizer, **options)


def test_the_turns_of_the_assistant(tokenizer):
    (row,), report = prepared([ROW], tokenizer, assistant_only_loss=True)
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == ["w0", "w10", "</s>", "w1"]
    assert tokenizer.convert_ids_to_tokens(row["completion_ids"][0]) == (
        ["w11", "w12", "</s>", "w0", "w13", "</s>", "w2", "w14", "</s>", "w1", "w15", "</s>"]
    )
    assert [[int(scored) for scored in mask] for mask in row["scored"]] == [CHOSEN_MASK, [1, 1]]
    assert (report.scored_tokens, report.completion_tokens) == (7, 14)
    assert "50.0% of the completions' tokens are scored" in report.summary()
    # Without the option, and where every turn is the assistant's, all tokens are scored.
    (row,), _ = prepared([ROW], tokenizer)
    assert row["scored"] == []
    (row,), _ = prepared([ROW | {"chosen": ROW["chosen"][:1]}], tokenizer, assistant_only_loss=True)
    assert row["scored"] == []


def test_all_turns_of_a_conversation_as_in_trl(tokenizer):
    messages = [*ROW["prompt"], *ROW["chosen"]]
    (row,), _ = prepared([{"messages": messages}], tokenizer, assistant_only_loss=True)
    tokenizer.chat_template = MARKED_TEMPLATE
    trls = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert row["prompt_ids"] + row["completion_ids"][0] == trls["input_ids"]
    assert [0] * len(row["prompt_ids"]) + row["scored"][0] == trls["assistant_masks"]
    (row,), _ = prepared([{"messages": messages}], tokenizer)
    assert tokenizer.decode(row["completion_ids"][0]) == "w15 </s>"  # the last turn alone


def test_turns_that_a_row_names():
    rows = [ROW | {"train_on": [[0, 0, 0, 1], [1]]}, ROW | {"train_on": [[0, 0, 0, 0], [1]]}, ROW | {"train_on": [[1]]}]
    data, report = prepared(rows)
    assert [int(scored) for scored in data[0]["scored"][0]] == [0] * 10 + [1, 1]
    assert report.dropped[UNSCORED].count == 1 and report.dropped["malformed row"].count == 1
    (row,), _ = prepared([{"messages": [*ROW["prompt"], *ROW["chosen"]], "train_on": [0, 1, 0, 0, 0]}])
    assert row["scored"] == [[1, 1, 1] + [0] * 9]


def test_masks_of_tokens():
    tokens = {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]}
    masks = ([[0, 1, 1], [0, 1]], [[1, 1, 1], [1, 1]], [[0, 1], [0, 1]], [[0, 0, 0], [0, 1]], [])
    data, report = prepared([tokens | {"completion_mask": mask} for mask in masks])
    assert data["scored"][:] == [[[False, True, True], [False, True]], []]
    assert (report.dropped["malformed row"].count, report.dropped[UNSCORED].count) == (2, 1)
    with pytest.raises(UserError, match="`train_on` is for turns of messages, and the row is tokenized"):
        prepared([tokens | {"train_on": [[1], [1]]}])
    again, _ = prepare(data, word_tokenizer())
    assert again["scored"][:] == data["scored"][:] and again["chosen"][:] == data["chosen"][:]


def test_weights_of_tokens():
    tokens = {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]}
    usable = [[[0.0, 0.5, 2.0], [1, 0.25]], [[1, 1.0, 1], [1, 1]], [["0.5", 1, 1], [1, 1]]]
    unusable = [
        *([[-1.0, 1, 1], [1, 1]], [[math.nan, 1, 1], [1, 1]], [[1e300, 1, 1], [1, 1]], [[None, 1, 1], [1, 1]]),
        *([[1.0, 1], [1, 1]], [[1.0, 1, 1, 1], [1, 1]], [[1.0, 1, 1]], [], [[1.0, 1, 1], None], [1.0, 1.0], 0.5),
    ]
    given = [tokens | {"token_weights": value} for value in usable[:2]]
    data, report = prepared([*given, tokens | {"token_weights": [[0.0] * 3, [1, 1]]}])
    assert data["scored"][:] == [usable[0], []] and report.dropped[UNSCORED].count == 1
    assert (report.scored_tokens, report.completion_tokens) == (9, 10)
    tokenize = Tokenization(word_tokenizer(), Form.TOKENS)
    batch = [tokens | {"token_weights": value, "completion_mask": None} for value in [*usable, *unusable]]
    batch.append(tokens | {"token_weights": usable[0], "completion_mask": [[0, 1, 1], [1, 1]]})
    found = tokenize({name: [row[name] for row in batch] for name in batch[0]}, range(len(batch)))
    assert found["scored"][:3] == [usable[0], [], [[0.5, 1, 1], [1, 1]]]
    assert found["reason"] == [""] * 3 + ["malformed row"] * (len(unusable) + 1), found["detail"]
    assert "`completion_mask`, `token_weights` all say which tokens are scored" in found["detail"][-1]
    again, _ = prepare(data, word_tokenizer())
    assert again["scored"][:] == data["scored"][:]
    with pytest.raises(UserError, match=r"`completion_mask` holds a value that is not 0 or 1: .*`token_weights`"):
        prepared([tokens | {"completion_mask": [[0.5, 1, 1], [1, 1]]}])


@pytest.mark.parametrize("name", ["completion_mask", "token_weights"])
def test_text_has_no_masks_of_tokens(name):
    with pytest.raises(UserError, match=f"`{name}` is for tokens, and the row is not tokenized: .*`train_on`"):
        prepared([{"prompt": "w1 ", "chosen": "w2", "rejected": "w3", name: [[1], [1]]}])


def weighed(*weights, name: str = "chosen") -> dict:
    return {name: [t if w is None else t | {"weight": w} for t, w in zip(ROW[name], weights)]}


def test_weights_in_messages(tokenizer):
    """As in OpenAI's format: 1 for the assistant's turns without a weight, in rows that have one anywhere."""
    rows = [ROW | weighed(0, None, None, None), ROW | weighed(0.5, None, None, 2), ROW | weighed(None, 1, None, None)]
    data, report = prepared([*rows, ROW, ROW | weighed(0, None, None, 0), ROW | weighed(-1, None, None, 0)], tokenizer)
    assert data["scored"][:] == [
        [[0] * 10 + [1, 1], [1, 1]],
        [[0.5] * 3 + [0] * 7 + [2, 2], [1, 1]],
        [[1] * 6 + [0] * 4 + [1, 1], [1, 1]],  # a turn of the user has its header
        [],
    ]
    assert report.dropped[UNSCORED].count == 1 and "chosen: weight" in report.dropped["malformed row"].detail
    with pytest.raises(UserError, match="`train_on` and a `weight` in messages both say"):
        prepared([rows[0] | {"train_on": [[0, 0, 0, 1], [1]]}], tokenizer)


def test_weights_in_conversations(tokenizer):
    messages = [*ROW["prompt"], *weighed(0, None, None, 0.5)["chosen"]]
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], "tool"), "value": t["content"]} for t in messages
    ]
    sharegpt = [turn | ({"weight": t["weight"]} if "weight" in t else {}) for turn, t in zip(sharegpt, messages)]
    for name, value in (("messages", messages), ("conversations", sharegpt)):
        (row,), _ = prepared([{name: value}], tokenizer)
        assert tokenizer.decode(row["completion_ids"][0]) == "w15 </s>" and row["scored"] == [[0.5, 0.5]]
    # Whole conversations as sides: the weights do not change where the sides part.
    sides = {
        name: [*ROW["prompt"], *turns]
        for name, turns in (weighed(0, None, None, 1) | weighed(2, name="rejected")).items()
    }
    (row,), _ = prepared([sides], tokenizer)
    assert row["scored"] == [[0] * 10 + [1, 1], [2, 2]] and tokenizer.decode(row["prompt_ids"]) == "w0 w10 </s> w1"


def test_conversations_that_end_with_the_user(tokenizer):
    """TRL's SFT trainer scores the assistant's turns wherever they are."""
    messages = [*ROW["prompt"], *ROW["chosen"], turn("user", "w20")]
    (row,), report = prepared([{"messages": messages}, {"messages": messages[:1]}], tokenizer, assistant_only_loss=True)
    assert row["scored"] == [[*CHOSEN_MASK, 0, 0, 0]]
    assert report.dropped["no assistant turn"].count == 1
    with pytest.raises(UserError, match=r"no assistant turn: 1 .*`messages` does not end with an assistant turn"):
        prepared([{"messages": messages}], tokenizer)


@pytest.mark.parametrize(("max_length", "scored"), [(16, CHOSEN_MASK), (8, [1, 1, 1, 0])])
def test_a_mask_is_cut_with_its_completion(max_length, scored):
    (row,), _ = prepared([ROW], max_length=max_length, assistant_only_loss=True)
    assert [int(value) for value in row["scored"][0]][: max_length - 4] == scored
    late = ROW | {"train_on": [[0, 0, 0, 1], [1]]}
    if max_length == 8:
        with pytest.raises(UserError, match=f"{UNSCORED}: 1 .*when cut to max_length=8"):
            prepared([late], max_length=max_length)


def test_answers_to_prompts_with_images():
    processor = tiny_processor("llava")
    row = ROW | {"images": [Image.new("RGB", (8, 8))], "chosen": [t for t in ROW["chosen"] if t["role"] != "tool"]}
    (found,), _ = prepared([row], processor, assistant_only_loss=True)
    assert processor.tokenizer.decode(found["completion_ids"][0]) == "w11 w12 </s> w0 w13 </s> w1 w15 </s>"
    assert [int(value) for value in found["scored"][0]] == [1, 1, 1, 0, 0, 0, 0, 1, 1]


def test_a_template_whose_turns_do_not_join_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "w{{ messages | length }} " + CHAT_TEMPLATE
    with pytest.raises(UserError, match=r"row 1: turn 1 of the conversation cannot be told apart.*generation"):
        prepared([ROW | {"chosen": ROW["chosen"][:1]}, ROW], tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "w1", "chosen": "w2", "rejected": "w3"},
        {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]},
    ],
    ids=["text", "tokens"],
)
def test_rows_without_turns_are_refused(row):
    with pytest.raises(UserError, match="assistant_only_loss=true finds the assistant's turns in messages"):
        prepared([row], assistant_only_loss=True)
    if "prompt" in row:
        (found,), _ = prepared([row], assistant_only_loss=True, prompt_format="chat")
        assert found["scored"] == []


@pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf, 1e39, None, "heavy"])
def test_weights_that_are_none(weight):
    text = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}
    weights = [2.0, weight] if not isinstance(weight, str) else ["2", weight]
    data, report = prepared([text | {"weight": value} for value in weights], weight_column="weight")
    assert data["weights"][:] == [[2.0]]
    (drop,) = report.dropped.values()
    assert drop.count == 1 and "expected a weight: a finite number of at least 0" in drop.detail


def test_weights_of_ranked_rows():
    ranked = {"prompt": "w1 ", "completions": ["w2", "w3", "w4"], "pairs": [[0, 2], [1, 2], [0, 2]]}
    data, _ = prepared([ranked | {"weight": [1.0, 0.0, 5.0]}, ranked | {"weight": [3.0] * 3}], weight_column="weight")
    assert data["weights"][:] == [[1.0, 0.0], [3.0, 3.0]]  # of a repeated pair the first counts
    data, _ = prepared([ranked | {"weight": 1.0}], weight_column="weight")
    assert data["weights"][:] == [[]]
    with pytest.raises(UserError, match="`weight` holds 2 weights for 3 `pairs`"):
        prepared([ranked | {"weight": [1.0, 2.0]}], weight_column="weight")
    with pytest.raises(UserError, match="weight_column"):
        prepared([ranked], weight_column="missing")
