"""Tests the forms of other trainers: small files as people have them give the same tokens as our own form."""

import json
import logging

import pytest
from datasets import Dataset

from cpt_kernels.data.forms import Form, find_roles
from cpt_kernels.data.preparation import prepare
from cpt_kernels.data.sources import load_data
from cpt_kernels.errors import UserError
from tests.helpers.rows import EOS, MORE, assistant, chat, make_tokenizer, pair, prepared, reasons, user

TOKENS = ("prompt_ids", "completion_ids", "chosen", "rejected", "targets", "scores", "row")
SYSTEM = [{"role": "system", "content": "be brief"}]
HUMAN, GPT = ({"from": "human", "value": "the sky?"}, {"from": "gpt", "value": "is blue"})
RED = {"from": "gpt", "value": "is bright"}
WHOLE = {side: user("the sky?") + assistant(f"is {side}") for side in ("chosen", "rejected")}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=True)


def text(prompt="the sky", **sides):
    return {"prompt": prompt, **sides}


ALPACA = text("the sky\nand the sun", completion="is blue")
JOINED = text("the sky\nand the sun", chosen="is blue", rejected="is bright")
SPOKEN = chat("the sky?") | {"prompt": SYSTEM + user("the sky?")}
ULTRA = [
    {"model": "a", "response": "is bright", "overall_score": 3.0, "fine-grained_score": 2.5, "annotations": {"x": {}}},
    {"model": "b", "response": "is blue", "overall_score": 8.5, "fine-grained_score": 4.5, "annotations": {"x": {}}},
    {"model": "c", "response": "is text", "overall_score": 6.0, "fine-grained_score": 3.5, "annotations": {"x": {}}},
]
RANKED = text(completions=["is blue", "is text", "is bright"], scores=[8.5, 6.0, 3.0])
TURNS = "\n\nHuman: the sky?\n\nAssistant: blue\n\nHuman: and the sun?\n\nAssistant:"

FORMS = {  # name: (a row as people have it, the same row in our form)
    "alpaca": ({"instruction": "the sky", "input": "and the sun", "output": "is blue", "text": "x"}, ALPACA),
    "alpaca without input": ({"instruction": "the sky", "input": "", "output": "is blue"}, text(completion="is blue")),
    "alpaca with system and history": (
        {
            "instruction": "and the sun?",
            "input": "",
            "output": "yellow",
            "system": "be brief",
            "history": [["the sky?", "blue"]],
        },
        {"prompt": SYSTEM + user("the sky?") + MORE, "completion": assistant("yellow")},
    ),
    "sharegpt": ({"conversations": [HUMAN, GPT]}, {"messages": user("the sky?") + assistant("is blue")}),
    "sharegpt with system": (
        {"conversations": [HUMAN, GPT], "system": "be brief", "id": "x1"},
        {"messages": SYSTEM + user("the sky?") + assistant("is blue")},
    ),
    "sharegpt with a system turn": (
        {"conversations": [{"from": "system", "value": "be brief"}, HUMAN, GPT]},
        {"messages": SYSTEM + user("the sky?") + assistant("is blue")},
    ),
    "llama-factory, ranking": (
        {"instruction": "the sky", "input": "and the sun", "chosen": "is blue", "rejected": "is bright"},
        JOINED,
    ),
    "llama-factory, sharegpt ranking": ({"conversations": [HUMAN], "chosen": GPT, "rejected": RED}, chat()),
    "orca pairs": (
        {"system": "be brief", "question": "the sky?", "chosen": "is blue", "rejected": "is bright"},
        SPOKEN,
    ),
    "hh": (
        {"chosen": TURNS + " is blue", "rejected": TURNS + " is bright"},
        text(TURNS, chosen=" is blue", rejected=" is bright"),
    ),
    "hh, answers that begin alike": (
        {"chosen": TURNS + " the sun is blue", "rejected": TURNS + " the sun is bright"},
        text(TURNS, chosen=" the sun is blue", rejected=" the sun is bright"),
    ),
    "ultrafeedback": (
        {"source": "x", "instruction": "the sky", "models": ["a", "b", "c"], "completions": ULTRA},
        RANKED,
    ),
    "ultrafeedback binarized": (
        {"prompt": "the sky?", "prompt_id": "0f", "messages": WHOLE["chosen"], "score_chosen": 8.5, **WHOLE},
        {**chat(chosen="is chosen", rejected="is rejected")},
    ),
    "argilla": (
        {
            "source": "x",
            "instruction": "the sky",
            "chosen_response": "is blue",
            "rejected_response": "is bright",
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 3.75,
            "chosen_model": "gpt-4",
        },
        text(chosen="is blue", rejected="is bright"),
    ),
    "argilla, orca pairs": (
        {
            "system": "be brief",
            "input": "the sky?",
            "chosen": "is blue",
            "rejected": "is bright",
            "generations": ["is blue", "is bright"],
            "rating": [9.0, 2.0],
            "status": "unchanged",
        },
        SPOKEN,
    ),
    "distilabel": (
        {"instruction": "the sky", "generations": ["is bright", "is blue"], "ratings": [1, 4], "model_name": "j"},
        text(completions=["is blue", "is bright"], scores=[4.0, 1.0]),
    ),
    "openai": (
        {
            "input": {"messages": user("the sky?"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": assistant("is blue"),
            "non_preferred_output": assistant("is bright"),
        },
        chat(),
    ),
    "openai with tools": (
        {
            "input": {"messages": user("the sky?"), "tools": [{"name": "f"}], "parallel_tool_calls": True},
            "preferred_output": assistant("is blue"),
            "non_preferred_output": assistant("is bright"),
        },
        chat(tools=[{"name": "f"}]),
    ),
    "content in parts": (
        {
            "prompt": user([{"type": "text", "text": "the "}, {"type": "text", "text": "sky?"}]),
            "chosen": assistant([{"type": "text", "text": "is blue"}]),
            "rejected": assistant([{"type": "text", "text": "is bright"}]),
        },
        chat(),
    ),
    "one message without a list": (
        {"prompt": user("the sky?"), "chosen": assistant("is blue")[0], "rejected": assistant("is bright")[0]},
        chat(),
    ),
    "a conversation beside whole conversations": (
        {"prompt": user("the sky?"), **WHOLE},
        chat(chosen="is chosen", rejected="is rejected"),
    ),
    "ms-swift": ({"messages": user("the sky?") + assistant("is blue"), "rejected_response": "is bright"}, chat()),
    "stack exchange": (
        {"qid": 1, "question": "the sky", "response_j": "is blue", "response_k": "is bright"},
        text(chosen="is blue", rejected="is bright"),
    ),
    "questions and answers": ({"question": "the sky", "answer": "is blue"}, text(completion="is blue")),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_other_trainers(name, streaming, tokenizer, tmp_path):
    given, plain = FORMS[name]
    kept = []
    for number, row in enumerate((given, plain)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in (row, row)))
        dataset, _ = prepare(load_data(path, streaming=streaming), tokenizer)
        kept.append([{column: row[column] for column in TOKENS} for row in dataset])
    assert kept[0] == kept[1] and len(kept[0]) == 2


@pytest.mark.parametrize("name", ["orca pairs", "hh", "alpaca", "argilla", "ultrafeedback"])
def test_text_becomes_turns(name, tokenizer):
    """With prompt_format=chat, text has the tokens of the messages that it means; transcripts become their turns."""
    given, plain = FORMS[name]
    if name == "hh":
        plain = {
            "prompt": user("the sky?") + MORE,
            "chosen": assistant("is blue"),
            "rejected": assistant("is bright"),
        }
    elif name != "orca pairs":
        sides = {key: [assistant(c) for c in v] if key == "completions" else v for key, v in plain.items()}
        sides |= {key: assistant(v) for key, v in plain.items() if key in ("chosen", "rejected", "completion")}
        plain = {**sides, "prompt": user(plain["prompt"])}
    assert prepared([given], tokenizer, prompt_format="chat")[0] == prepared([plain], tokenizer)[0]


def test_rows_without_a_system_prompt_are_conversations_too(tokenizer):
    rows = [
        {"system": s, "question": "the sky?", "chosen": "is blue", "rejected": "is bright"} for s in ("be brief", "")
    ]
    kept, report = prepared(rows, tokenizer)
    spoken, _ = prepared([SPOKEN, chat()], tokenizer)
    assert kept == spoken and (report.chats, report.texts) == (2, 0)
    rows = [{**row, "system": ""} for row in rows]
    plain = make_tokenizer()
    plain.chat_template = None
    assert (
        prepared(rows, plain)[0] == prepared([text("the sky?", chosen="is blue", rejected="is bright")] * 2, plain)[0]
    )
    with pytest.raises(ValueError, match="conversational, but the tokenizer has no chat template"):
        prepared([{**rows[0], "system": "be brief"}], plain)


def test_function_calls_of_sharegpt(tokenizer):
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [HUMAN, {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "7"}, GPT]
    (kept,), _ = prepared([{"conversations": turns}], tokenizer)
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    messages = [*user("the sky?"), called, {"role": "tool", "content": "7"}, *assistant("is blue")]
    assert [kept] == prepared([{"messages": messages}], tokenizer)[0]
    _, report = prepared(
        [{"conversations": [HUMAN, GPT]}, {"conversations": [{"from": "x", "value": ""}, GPT]}], tokenizer
    )
    assert "`conversations` has a message from 'x'" in report.dropped["malformed row"].detail


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(question="x"), r"`question` looks like a prompt and would not be used \(the prompt is `prompt`\): give"),
        (
            pair(question="x"),
            "give --columns question=prompt chosen rejected to use `question`, or --columns prompt chosen",
        ),
        ({"chosen": "a b", "rejected": "a c", "user_task": "x"}, "--columns user_task=prompt chosen rejected to use"),
        ({"chosen": "a b", "rejected": "a c", "myContext": "x"}, "`myContext` looks like a prompt"),
        ({**FORMS["llama-factory, ranking"][0], "question": "x"}, "--columns question=prompt chosen rejected to use"),
        ({"question": "x", "context": "y", "answer": "z"}, "`context` looks like a prompt"),
        (pair(instruction="x", query="y"), "columns `instruction`, `query` look like a prompt"),
        (
            {"instruction": "x", "output": "y", "rejected": "z"},
            "`rejected` looks like a side of a pair and would not be",
        ),
        (
            {"instruction": "x", "output": "y", "rejected": "z"},
            "--columns output=chosen rejected=rejected instruction to",
        ),
        ({"messages": assistant("x"), "kto_tag": True}, "would ignore `kto_tag`"),
        ({"text": "x"}, "rename columns with --columns, for instance --columns question=prompt better=chosen"),
    ],
)
def test_columns_that_would_be_ignored(row, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepared([row], tokenizer)


def test_columns_that_are_not_used_are_said(tokenizer):
    _, report = prepared([pair(prompt_id="x", score=2)], tokenizer)
    assert report.notes[-1] == "train data: the columns `prompt_id`, `score` are not used"
    _, report = prepared([{"chosen": "a b", "rejected": "a c", "prompt_tokens": 3, "source": "x"}], tokenizer)
    assert report.notes[-1] == "train data: the columns `prompt_tokens`, `source` are not used"
    _, report = prepared([FORMS["alpaca"][0]], tokenizer)
    assert report.notes[0].endswith(
        "read as prompt and completion rows: prompt from `instruction` and, on a line of its own, `input`, completion"
        " from `output`"
    )
    # Whole conversations begin with their prompt, so other columns of prompts are not missed.
    _, report = prepared([{"prompt": "the sky?", "question": "the sky?", **WHOLE}], tokenizer)
    assert report.kept == 1 and report.notes[-1] == "train data: the column `question` is not used"


def test_null_prompts_are_dropped(tokenizer):
    rows = [pair(), pair(None), {"prompt": None, "chosen": "a b", "rejected": "a c"}]
    assert reasons(prepared(rows, tokenizer)[1]) == {"no prompt": (2, [1, 2])}
    rows = [
        {"instruction": None, "input": None, "output": "x"},
        {"instruction": None, "input": "the sky", "output": "x"},
    ]
    kept, report = prepared(rows, tokenizer)
    assert reasons(report) == {"no prompt": (1, [0])} and len(kept) == 1
    assert report.dropped["no prompt"].detail == "`instruction` is null"
    rows = [{"prompt": None, "completion": "x"}, text(completion="x")]
    assert reasons(prepared(rows, tokenizer)[1]) == {"no prompt": (1, [0])}


def test_repeated_rows_are_counted(tokenizer):
    rows = [pair(), pair("x"), pair(), pair(note="x"), pair(chosen=" was"), pair()]
    _, report = prepared([{"note": None, **row} for row in rows], tokenizer)
    assert (report.repeated, report.first_repeated) == (3, 2)
    assert "3 rows repeat an earlier row token by token (the first: row 2)" in report.summary()
    assert prepared([pair(), pair("x")], tokenizer)[1].repeated == 0


def test_text_beside_a_chat_template_is_said(tokenizer):
    _, report = prepared([pair()], tokenizer)
    assert "set prompt_format=chat" in report.notes[0] and report.prompt_format == "text"
    for rows, options in (([pair()], {"prompt_format": "text"}), ([chat()], {})):
        assert prepared(rows, tokenizer, **options)[1].notes == []
    assert prepared([chat()], tokenizer)[1].prompt_format == "chat"
    _, report = prepare(Dataset.from_list([chat()]).to_iterable_dataset(), tokenizer)
    assert report.prompt_format == "chat"
    with pytest.raises(ValueError, match="prompt_format=text refuses: set prompt_format=auto"):
        prepared([chat()], tokenizer, prompt_format="text")
    plain = make_tokenizer()
    plain.chat_template = None
    assert prepared([pair()], plain)[1].notes == []
    with pytest.raises(ValueError, match="prompt_format=chat needs a chat template"):
        prepared([pair()], plain, prompt_format="chat")


def test_doubled_special_tokens_are_said(tokenizer, caplog):
    _, report = prepared([pair(), pair("<s>the sky"), pair("<s>x")], tokenizer)
    assert (report.doubled, report.doubled_example) == (2, "row 1: <s>")
    assert "2 rows with a bos or eos token twice in succession (row 1: <s>)" in report.summary()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        _, report = prepared([chat(chosen="is blue" + EOS)] * 2, tokenizer, name="eval")
    assert (report.doubled, report.doubled_example) == (2, f"row 0: {EOS}")
    assert ["row 0: </s>" in record.getMessage() for record in caplog.records] == [True]
    assert prepared([pair(), pair("x", chosen=" blue" + EOS)], tokenizer)[1].doubled == 0


def test_a_template_that_prints_the_date_is_named(tokenizer):
    dated = make_tokenizer()
    dated.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    )
    dated.chat_template += "{{ date_string }}" + tokenizer.chat_template
    _, report = prepared([chat()], dated)
    assert "the chat template prints today's date" in report.notes[0] and "date_string" in report.notes[0]
    assert prepared([chat(chat_template_kwargs={"date_string": "1 May"})], dated)[1].notes == []


def test_preferences_come_first():
    assert find_roles(["prompt", "messages", "chosen", "rejected", "score"])[0] is Form.PREFERENCE
    assert find_roles(["instruction", "response", "conversations"])[0] is Form.MESSAGES


@pytest.mark.parametrize(
    ("columns", "mend"),
    [
        (["Prompt", "Chosen", "rejected "], r"--columns Chosen=chosen Prompt=prompt 'rejected =rejected'$"),
        (["prompt;chosen;rejected"], "separate the columns by commas, not by ';'"),
        (["prompt\tchosen\trejected"], r"separate the columns by commas, not by '\\t', or by tabs in a .tsv file"),
        (["a", "b"], "for instance --columns question=prompt"),
        (["prompt ", "chosen", "rejected"], "give --columns 'prompt =prompt' chosen rejected to use"),
    ],
)
def test_the_mend_of_unknown_columns_can_be_copied(columns, mend):
    with pytest.raises(UserError, match=mend):
        prepare(Dataset.from_list([dict.fromkeys(columns, "a b")]), make_tokenizer())
