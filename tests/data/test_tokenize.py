"""Tests that tokens are the same as TRL's, and the checks of a tokenizer."""

import json
import random
from types import SimpleNamespace

import pytest
from datasets import Dataset, load_dataset

from cpt_kernels.data import tokenize
from cpt_kernels.data.forms import Form
from cpt_kernels.data.preparation import prepare
from tests.helpers.rows import EOS, MORE, assistant, chat, make_tokenizer, nasty_pairs, pair, prepared, real_pairs, user


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "the sky", "parameters": {}}}]
SAME_TOKENS = {
    "text": [
        pair(),
        pair("the sky ", "is blue", "text"),
        pair("hello wor", "ld", "m" + EOS),
        pair("", "sun", "the sky"),
    ],
    "chat": [chat(), {**chat(), "prompt": user("sky?") + MORE}, chat(chosen="  é\u200b", rejected=EOS)],
    "implicit text": [
        {"chosen": "the sky is blue", "rejected": "the sky is"},
        {"chosen": "the sky is blue", "rejected": "the sun"},
        {"chosen": "the sky is blue", "rejected": "the sky was"},
        {"chosen": "hello world", "rejected": "text"},
    ],
    "implicit chat": [
        {"chosen": user("sky?") + assistant("blue"), "rejected": user("sky?") + assistant("text")},
        {"chosen": user("sky?") + MORE + assistant("it is"), "rejected": user("sky?") + MORE + assistant("hello")},
        {
            "chosen": user("sky?") + assistant("blue"),
            "rejected": user("sky?") + assistant("text") + user("a") + MORE[:1],
        },
    ],
    "tools": [chat(tools=TOOLS), chat("sun?", tools=[]), chat("sun?", tools=TOOLS * 2)],
    "tools as JSON": [chat(tools=json.dumps(TOOLS)), chat("sun?", tools=json.dumps(TOOLS * 2))],
    "template arguments": [
        chat(chat_template_kwargs={"enable_thinking": False}),
        chat("sun?", chat_template_kwargs={"enable_thinking": True}),
    ],
}


def assert_same_tokens_as_trl(dataset, tokenizer, keep=lambda row: True):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is needed for the comparison").DPOTrainer
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    theirs = trainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, options, "train")
    theirs = [row for row in theirs if keep(row)]
    ours, _ = prepare(dataset, tokenizer)
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs):
        assert (our["chosen"], our["rejected"], our["targets"]) == ([0], [1], [0])
        assert [our["prompt_ids"], *our["completion_ids"]] == [
            their[f"{k}_ids"] for k in ("prompt", "chosen", "rejected")
        ]


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
@pytest.mark.parametrize("rows", SAME_TOKENS.values(), ids=SAME_TOKENS)
def test_tokens_are_trls(rows, bos):
    assert_same_tokens_as_trl(Dataset.from_list(rows), make_tokenizer(bos))


def test_tokens_are_trls_when_messages_differ_in_shape(tokenizer, tmp_path):
    """Different tool calls in one column make `datasets` store messages as JSON; otherwise messages get null fields."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"n": 1}}]}
    rows = [chat(), {**chat(), "prompt": [*user("sky?"), call, {"role": "tool", "content": "blue", "name": "weather"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert_same_tokens_as_trl(dataset, tokenizer)


def test_tokens_are_trls_on_real_data(tokenizer):
    rows = [row for row in real_pairs() + nasty_pairs() if row["chosen"] and row["rejected"]]
    differ = lambda row: row["chosen_ids"] != row["rejected_ids"]  # noqa: E731
    assert_same_tokens_as_trl(Dataset.from_list(rows), tokenizer, keep=differ)


def test_the_size_of_encoded_parts_does_not_change_the_result(tokenizer, monkeypatch):
    mixed = [*SAME_TOKENS["chat"], *SAME_TOKENS["tools"], *SAME_TOKENS["template arguments"]]
    refused = [{**chat(), "prompt": user("sky?") + user("sky?")}, {**chat(), "chosen": 3}, chat(chosen="is bright")]
    for rows in ([*mixed, *refused] * 3, [*SAME_TOKENS["text"], pair(chosen=None), pair(prompt=None)] * 5):
        rows = random.Random(0).sample(rows, len(rows))
        batch = {name: [row.get(name) for row in rows] for name in {name: 0 for row in rows for name in row}}
        results = []
        for size in (1000, 4, 1):
            monkeypatch.setattr(tokenize, "_PART", size)
            results.append(tokenize.Tokenization(tokenizer, Form.PREFERENCE)(batch, range(len(rows))))
        assert results[0] == results[1] == results[2] and 0 < sum(map(bool, results[0]["reason"])) < len(rows)


def test_check_tokenizer():
    checked = make_tokenizer()
    tokenize.check_tokenizer(checked, vocab_size=280, max_token_id=279)
    assert checked.pad_token == EOS
    with pytest.raises(
        ValueError, match=r"largest token id in the data, 280 \('.*'\), is beyond .* of 280 .* has 304 tok"
    ):
        tokenize.check_tokenizer(checked, vocab_size=280, max_token_id=280)
    checked.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        prepared([pair()], checked)


def test_check_same_tokenizer():
    policy, reference = make_tokenizer(), make_tokenizer(bos=True)
    tokenize.check_same_tokenizer(policy, reference)
    policy.add_special_tokens({"pad_token": "<pad>"})
    tokenize.check_same_tokenizer(policy, reference)
    policy.add_tokens(["<new>"])
    with pytest.raises(
        ValueError, match="1 tokens differ, the first is '<new>', 305 for the policy and unknown for the"
    ):
        tokenize.check_same_tokenizer(policy, reference)
