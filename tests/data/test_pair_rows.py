"""Tests rows with preferences at several turns, steps, and trees."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from cpt_kernels.data.preparation import prepare
from cpt_kernels.errors import UserError
from tests.helpers.toy import CHAT_TEMPLATE, make_trainer, word_tokenizer


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def decoded(rows, stream: bool = False, **options) -> list[tuple[str, str, str]]:
    """Returns (prompt, chosen, rejected) of the prepared rows, as text."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    found, _ = prepare(data, tokenizer, **options)
    assert all(row["chosen"] == [0] and row["rejected"] == [1] for row in found)
    return [tuple(map(tokenizer.decode, (row["prompt_ids"], *row["completion_ids"]))) for row in found]


@pytest.mark.parametrize("stream", [False, True])
def test_a_preference_at_several_turns(stream):
    turns = [{"prompt": f"w{p}", "chosen": "w11", "rejected": r} for p, r in ((10, "w12"), (13, None), (15, "w17"))]
    assert decoded([{"turns": turns}], stream) == [
        ("w0 w10 </s> w1", "w11 </s>", "w12 </s>"),
        ("w0 w10 </s> w1 w11 </s> w0 w13 </s> w1 w11 </s> w0 w15 </s> w1", "w11 </s>", "w17 </s>"),
    ]


def test_a_key_of_a_turn_that_nothing_reads():
    turn = {"prompt": "w10", "chosen": "w11", "rejected": "w12"}
    with pytest.raises(UserError, match=r"row 1: `turns` cannot be read: `turns\[0\]` has the key `rejcted`"):
        decoded([{"turns": [turn | {"rejcted": None}]}, {"turns": [turn | {"rejected": None, "rejcted": "w13"}]}])


def test_turns_after_a_prompt_with_several_rejected_answers():
    row = {
        "prompt": [user("w9"), assistant("w8")],
        "turns": [{"prompt": "w10", "chosen": "w11", "rejected": ["w12", "w13"]}],
    }
    start = "w0 w9 </s> w1 w8 </s> w0 w10 </s> w1"
    assert decoded([row]) == [(start, "w11 </s>", "w12 </s>"), (start, "w11 </s>", "w13 </s>")]


STEP = {"prompt": "w20 ", "initial_reason_steps": "w21 ", "chosen": "w22", "rejected": "w23", "full_chosen": "w22 w24"}


def test_steps_end_no_answer():
    assert decoded([STEP]) == [("w20 w21", "w22", "w23")]
    assert decoded([STEP | {"initial_reason_steps": ""}]) == [("w20", "w22", "w23")]
    assert decoded([STEP], prompt_format="chat", assistant_only_loss=True) == [("w0 w20 </s> w1 w21", "w22", "w23")]
    names = {"initial_reason_steps": "initial_steps", "chosen": "chosen_step", "rejected": "rejected_step"}
    assert decoded([{names.get(name, name): value for name, value in STEP.items()}]) == [("w20 w21", "w22", "w23")]


def test_steps_with_the_rest_of_the_answers_end():
    row = STEP | {"prompt": [user("w20")], "chosen_rest": " w24", "rejected_rest": ""}
    assert decoded([row]) == [("w0 w20 </s> w1 w21", "w22 w24 </s>", "w23 </s>")]
    with pytest.raises(UserError, match="one of `chosen_rest` and `rejected_rest` is null"):
        decoded([row | {"rejected_rest": None}])


PATHS = [[user("w30"), assistant("w31"), user("w32"), assistant("w33")]]
PATHS += [[*PATHS[0][:3], assistant("w34")], [user("w30"), assistant("w35")]]


@pytest.mark.parametrize("named", [{"scores": [2.0, 3.0, 1.0]}, {"pairs": [[1, 0], [1, 2], [0, 2]]}])
def test_paths_of_messages(named):
    long, short = "w0 w30 </s> w1 w31 </s> w0 w32 </s> w1", "w0 w30 </s> w1"
    rest = long.removeprefix(short).strip()
    assert decoded([{"paths": PATHS, **named}]) == [
        (long, "w34 </s>", "w33 </s>"),
        (short, f"{rest} w34 </s>", "w35 </s>"),
        (short, f"{rest} w33 </s>", "w35 </s>"),
    ]


def test_columns_that_the_first_row_of_a_stream_lacks():
    rows = [{"paths": PATHS, "pairs": [[1, 0], [1, 2]]}, {"paths": PATHS, "scores": [1.0, 0.0, 0.0], "id": 5}]
    assert len(decoded(rows, stream=True)) == 4
    rows = [STEP, STEP | {"id": 5}, STEP | {"id": 6, "rejected": "w22"}]  # the last one is dropped
    assert decoded(rows, stream=True) == [("w20 w21", "w22", "w23")] * 2


def test_paths_of_steps():
    row = {"prompt": "w20 ", "paths": [["w21 ", "w22 ", "w24"], ["w21 ", "w23"]], "pairs": [[0, 1]], "id": 5}
    assert decoded([row]) == [("w20 w21", "w22 w24 </s>", "w23 </s>")]
    tokenizer = word_tokenizer()
    (kept,), _ = prepare(Dataset.from_list([row]), tokenizer, keep_columns=["id"])
    assert kept["id"] == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": [{"prompt": "w1", "rejected": "w2"}]}, "row 0: `turns` cannot be read: lacks 'chosen'"),
        ({"paths": PATHS, "pairs": [[0, 3]]}, "`pairs` is [[0, 3]]; expected [better, worse] positions in the 3 paths"),
        ({"paths": PATHS, "pairs": [[0, 1, 2]]}, "`pairs` is [[0, 1, 2]]; expected"),
        ({"paths": PATHS, "pairs": [[1, 1]]}, "`pairs` is [[1, 1]]; expected"),
        ({"paths": PATHS, "scores": None}, "row 0: `paths` cannot be read: `pairs` and `scores` are null"),
        ({"paths": PATHS, "scores": [1.0]}, "`scores` is [1.0]; expected a finite number for each of the 3 paths"),
        ({"paths": PATHS, "scores": [1.0, 2.0, float("nan")]}, "expected a finite number for each of the 3 paths"),
        (
            {"turns": None, "paths": PATHS, "pairs": [[0, 1]]},
            "row 0: `turns` cannot be read: expected a list",
        ),
        ({"turns": [{"prompt": "w1", "chosen": "w2"}]}, "no row of `turns` has a pair"),
    ],
)
def test_rows_that_cannot_be_split(row, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        decoded([row])


def conversations(count: int, turns: int) -> list[dict]:
    """Returns conversations with a preference at each turn."""
    texts = [[f"w{(7 * i + 3 * turn) % 50} w{turn}" for turn in range(turns)] for i in range(count)]
    return [{"turns": [{"prompt": text, "chosen": "w51 w52", "rejected": "w53"} for text in row]} for row in texts]


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens_per_batch": 90}, {"curriculum": {"column": "level", "levels": 2}}], ids=str
)
def test_rows_of_one_tree_stay_together(options, tmp_path):
    rows = Dataset.from_list([row | {"level": float(i)} for i, row in enumerate(conversations(6, 4))])
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    given = {"processing_class": tokenizer, "group_by_prefix": True, "loss_type": ["simpo"], **options}
    trainers = [make_trainer(tmp_path, train_dataset=rows, seed=seed, **given) for seed in (0, 0, 1)]
    orders = [[row for batch in trainer.get_train_dataloader().batch_sampler for row in batch] for trainer in trainers]
    assert orders[0] == orders[1] != orders[2]
    assert "curriculum" in options or sorted(orders[0]) == list(range(24))
    for order in orders:
        trees = [row // 4 for row in order]
        assert len([tree for tree, before in zip(trees, [-1, *trees]) if tree != before]) == len({*trees}), order


def test_trees_need_stored_rows_that_share(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    given = {"processing_class": tokenizer, "group_by_prefix": True, "loss_type": ["simpo"], "max_steps": 1}
    rows = conversations(2, 2)
    with pytest.raises(UserError, match="group_by_prefix=true needs all rows"):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        make_trainer(tmp_path, train_dataset=stream, **given).get_train_dataloader()
    with pytest.raises(UserError, match="group_by_prefix=true has no effect here"):
        make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), packing="false", **given).get_train_dataloader()


def test_each_pair_of_a_row_has_a_weight():
    turns = [{"prompt": f"w{p}", "chosen": "w11", "rejected": r} for p, r in ((10, "w12"), (13, None), (15, "w17"))]
    for rows in ([{"turns": turns}], [{"paths": [], "pairs": []}, {"paths": PATHS, "pairs": [[1, 0], [1, 2]]}]):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        weights = [*[[] for _ in rows[1:]], [2.0, 0.5]]
        data = Dataset.from_list([row | {"weight": weight} for row, weight in zip(rows, weights)])
        found, _ = prepare(data, tokenizer, weight_column="weight")
        assert [row["weights"] for row in found] == [[2.0], [0.5]]
        with pytest.raises(UserError, match=r"row [01]: `weight` holds 1 weights for 2 pairs"):
            prepare(data.map(lambda row: {"weight": row["weight"][1:]}), tokenizer, weight_column="weight")


def test_steps_of_ranked_rows_and_a_target():
    ranked = {"prompt": "w20 ", "initial_steps": "w21 ", "completions": ["w22", "w23"]}
    assert decoded([ranked]) == [("w20 w21", "w22", "w23")]
    tokenizer = word_tokenizer()
    row = {"prompt": "w20 ", "initial_steps": "w21 ", "chosen_step": "w22", "rejected_step": "w23", "other": "w24 w25"}
    (found,), _ = prepare(Dataset.from_list([row]), tokenizer, target_column="other")
    assert tokenizer.decode(found["prompt_ids"]) == "w20 w21"
    assert [*map(tokenizer.decode, found["completion_ids"])] == ["w22", "w23", "w24 w25"] and found["targets"] == [2]
