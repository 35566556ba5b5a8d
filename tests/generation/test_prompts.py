"""Tests of generation/prompts.py: prompts of every dataset form, their keys, and the column of responses."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from cpt_kernels.data.formats import parse_row
from cpt_kernels.data.forms import Form
from cpt_kernels.generation.prompts import Prompt, Request, Sampling, as_completion, read_prompts
from cpt_kernels.pairs.responses import read_responses
from tests.helpers.rows import MORE, REAL_DATA, assistant, chat, pair, user


def contents(rows, column=None):
    prompts, dropped = read_prompts(Dataset.from_list(rows), column)
    return [prompt and prompt.content for prompt in prompts], {reason: drop.count for reason, drop in dropped.items()}


def test_forms():
    turns = user("the sky?")
    for row in (
        chat(),
        {"prompt": turns},
        {"chosen": turns + assistant("blue"), "rejected": turns + assistant("red")},
        {"prompt": "the sky?", "chosen": turns + assistant("blue"), "rejected": turns + assistant("red")},
        {"messages": turns + assistant("blue")},
        {"messages": turns},
        {"prompt": turns, "completion": assistant("blue")},
        {"prompt": turns, "completions": [assistant("blue"), assistant("red")]},
    ):
        assert contents([row]) == ([turns], {}), row
    for row in (pair(), {"prompt": "the sky", "x": 1}, {"instruction": "the sky", "output": "no", "input": ""}):
        assert contents([row]) == (["the sky"], {}), row
    assert contents([{"chosen": "the sky is", "rejected": "the sky was"}]) == (["the sky"], {})
    assert contents([{"question": "the sky", "prompt": "no"}], "question") == (["the sky"], {})


def test_several_turns():
    rows = [{"messages": user("a") + MORE + assistant("yes")}]
    assert contents(rows) == ([user("a") + MORE], {})


def test_rows_without_prompt_are_counted():
    rows = [{"prompt": "a"}, {"prompt": None}, {"prompt": ""}]
    assert contents(rows) == (["a", None, None], {"no prompt": 2})
    assert contents([pair(), pair(chosen="")]) == (["the sky", None], {"empty completion": 1})
    assert contents([{"messages": assistant("hello")}]) == ([None], {"no prompt": 1})


def test_tools_and_template_arguments():
    row = {
        "prompt": user("x"),
        "tools": json.dumps([{"name": "f"}]),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (prompt,), _ = read_prompts(Dataset.from_list([row]))
    assert prompt.tools == [{"name": "f"}] and prompt.template_kwargs == {"enable_thinking": False}
    assert len({prompt.key, Prompt(user("x")).key, Prompt(user("x"), prompt.tools).key}) == 3


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        ({"text": "a"}, None, "columns text; prompts are expected in `chosen` and `rejected`, `prompt`"),
        ({"prompt": "a"}, "question", "columns prompt; prompts are expected in `question`"),
    ],
)
def test_data_without_prompts(row, column, message):
    with pytest.raises(ValueError, match=message):
        contents([row], column)


def test_the_key_does_not_depend_on_arrow():
    turn = {"role": "user", "content": "x"}
    assert Prompt([turn]).key == Prompt([dict(reversed(turn.items())) | {"tool_calls": None}]).key


def test_text_and_its_one_user_turn_are_one_prompt_here_and_in_cpt_pairs():
    texts = ["x", user("x"), [{"role": "user", "content": "x", "name": None}], "y", user("x") + assistant("x")]
    texts += [assistant("x"), [{"role": "system", "content": "x"}]]
    rows = [Dataset.from_list([{"prompt": text, "model": "m", "response": "r"}]) for text in texts]
    for keys in ([Prompt(text).key for text in texts], [read_responses(row)[0]["prompt_key"] for row in rows]):
        assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 5
    assert Prompt("x").key == "9eb90e3e2e72a5c34f867e1f0a8703d4", "seeds depend on the key, so it must not change"


def test_seeds():
    sampling = Sampling(seed=3)
    one, two, other = Request(Prompt("x"), 0), Request(Prompt("x"), 1), Request(Prompt("y"), 0)
    assert one.seed(sampling) == Request(Prompt("x"), 0).seed(sampling)
    assert len({request.seed(Sampling(seed=s)) for request in (one, two, other) for s in (3, 4)}) == 6
    assert 0 <= one.seed(sampling) < 2**31
    assert one.seed(Sampling(temperature=0)) is None and one.seed(Sampling(seed=None)) is None


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"stop": ("",)}]
)
def test_sampling_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_system_prompt():
    assert Prompt("x").messages("S") == [{"role": "system", "content": "S"}, *user("x")]
    own = [{"role": "system", "content": "T"}, *user("x")]
    assert Prompt(own).messages("S") == own


@pytest.mark.parametrize(
    "row",
    [
        pair(),
        {"chosen": "the sky is blue", "rejected": "the sky was"},
        chat(),
        {"chosen": user("a") + assistant("blue"), "rejected": user("a") + assistant("red")},
        {"prompt": "a", "chosen": user("a") + assistant("blue"), "rejected": user("a") + assistant("red")},
    ],
)
def test_a_column_of_responses_is_what_training_takes_for_a_target(row):
    (row,) = Dataset.from_list([row])
    example = parse_row(row, Form.PREFERENCE)
    value = as_completion(row, Prompt(example.prompt), " grey")
    (row,) = Dataset.from_list([row]).add_column("y_ref", [value])
    again = parse_row(row, Form.PREFERENCE, "y_ref")
    assert again.prompt == example.prompt
    assert again.completions == [
        *example.completions,
        " grey" if isinstance(example.prompt, str) else assistant(" grey"),
    ]


def test_real_data():
    path = REAL_DATA / "responses.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}")
    prompts, dropped = read_prompts(Dataset.from_json(str(path)))
    assert len(prompts) == 1200 and len({prompt.key for prompt in prompts}) == 300 and not dropped
