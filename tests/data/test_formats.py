"""Tests every accepted dataset form, from rows to prompt groups."""

import pytest
from datasets import Dataset

from cpt_kernels.data.formats import parse_row, ranked_pairs
from cpt_kernels.data.forms import Form, detect_form
from cpt_kernels.data.messages import RowError
from cpt_kernels.data.preparation import prepare
from tests.helpers.rows import EOS, MORE, assistant, chat, decoded, make_tokenizer, pair, prepared, reasons, user


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("the sky is blue", "the sky was", "the sky"),  # the space belongs to the completions
        ("the skies", "the sky", "the sk"),
        ("the sky", "the", "th"),
        ("blue ", "yellow", ""),
    ],
)
def test_implicit_text_prompt(chosen, rejected, prompt):
    example = parse_row({"chosen": chosen, "rejected": rejected}, Form.PREFERENCE)
    assert example.prompt == prompt
    assert [prompt + completion for completion in example.completions] == [chosen, rejected]


def test_text_prompt_beside_whole_conversations(tokenizer):
    """Rows like those of ultrafeedback_binarized."""
    sides = {key: user("the sky?") + value for key, value in chat().items() if key != "prompt"}
    whole, _ = prepared([{"prompt": "the sky?", **sides}], tokenizer)
    assert whole == prepared([chat()], tokenizer)[0]


def test_target_column(tokenizer):
    rows = [pair(best=" is the sun"), pair(best=" is bright"), pair(best="")]
    kept, report = prepared(rows, tokenizer, target_column="best")
    assert [len(row["completion_ids"]) for row in kept] == [3, 2]
    assert [row["targets"] for row in kept] == [[2], [1]]
    assert decoded(kept[0], tokenizer)[2] == " is the sun" + EOS
    assert reasons(report) == {"empty completion": (1, [2])}


def test_implicit_prompt_of_messages_with_other_keys():
    """Arrow adds the keys of all messages of a column to each of them: here `name` in one column only."""
    chosen, rejected = user("the sky?") + assistant("blue"), user("the sky?") + assistant("red")
    row = {"chosen": [{**turn, "name": None} for turn in chosen], "rejected": rejected}
    example = parse_row(row, Form.PREFERENCE)
    assert [turn["content"] for turn in example.prompt] == ["the sky?"]
    assert example.completions == [row["chosen"][1:], rejected[1:]]


def test_target_of_an_implicit_prompt_starts_with_it(tokenizer):
    sides = {"chosen": "the sky is blue", "rejected": "the sky was"}
    kept, report = prepared(
        [{**sides, "best": "the sky fell"}, {**sides, "best": "sun"}], tokenizer, target_column="best"
    )
    assert tokenizer.decode(kept[0]["prompt_ids"]) + decoded(kept[0], tokenizer)[2] == "the sky fell" + EOS
    assert reasons(report) == {"malformed row": (1, [1])}


def test_gaps_of_pairs_and_of_ranked_rows(tokenizer):
    """The gap of a pair is the difference of its completions' ratings."""
    rows = [pair(gap=gap) for gap in (0.25, 0, -1.0, None, 3)]
    kept, report = prepared(rows, tokenizer, gap_column="gap")
    assert [row["scores"] for row in kept] == [[0.25, 0.0], [3.0, 0.0]]
    assert reasons(report) == {"malformed row": (3, [1, 2, 3])}
    assert "`gap` is 0.0; expected a number above 0" in report.summary()[1]
    assert [row["scores"] for row in prepared([pair()], tokenizer)[0]] == [[]]

    ranked = {"prompt": "the sky", "completions": [" was", " is blue", " fell"], "scores": [0.5, 2.0, -1.0]}
    (by_score,), _ = prepared([ranked], tokenizer)
    found = dict(zip(decoded(by_score, tokenizer), by_score["scores"]))
    assert found == {" is blue" + EOS: 2.0, " was" + EOS: 0.5, " fell" + EOS: -1.0}
    (by_rank,), _ = prepared([{key: ranked[key] for key in ("prompt", "completions")}], tokenizer)
    assert by_rank["scores"] == [0.0, -1.0, -2.0]
    own = [ranked | {"pairs": pairs} for pairs in ([[1, 0]], [[1, 0], [2, 0]])]
    kept, _ = prepared(own, tokenizer)
    assert [row["scores"] for row in kept] == [[2.0, 0.5], []]  # these scores do not rate " fell" above " was"
    with pytest.raises(ValueError, match="gap_column='gap' needs rows of one pair; the dataset's form is ranked"):
        prepared([ranked | {"gap": 1.0}], tokenizer, gap_column="gap")
    with pytest.raises(ValueError, match=r"gap_column names \['gap'\], but the dataset has the columns"):
        prepared([pair()], tokenizer, gap_column="gap")


@pytest.mark.parametrize(
    ("row", "completion"),
    [
        ({"prompt": "the sky", "completion": " is blue"}, " is blue" + EOS),
        ({"prompt": user("sky?"), "completion": assistant("blue")}, "blue" + EOS),
        ({"messages": user("sky?") + MORE + assistant("yellow")}, "yellow" + EOS),
    ],
    ids=["text", "chat", "messages"],
)
def test_supervised(row, completion, tokenizer):
    (kept,), report = prepared([row], tokenizer)
    assert decoded(kept, tokenizer) == [completion]
    assert (kept["chosen"], kept["rejected"], kept["targets"]) == ([0], [], [0])
    assert (report.kept, report.pairs) == (1, 0)


def test_messages_without_an_answer(tokenizer):
    rows = [user("a") + assistant("b"), user("a"), [], assistant("b"), user("a") + assistant("")]
    kept, report = prepared([{"messages": messages} for messages in rows], tokenizer)
    assert [row["row"] for row in kept] == [0]
    assert reasons(report) == {
        "no assistant turn": (1, [1]),
        "malformed row": (1, [3]),
        "empty completion": (2, [2, 4]),
    }


def test_ranked_pairs():
    assert ranked_pairs([3, 2, 1], "all") == [(0, 1), (0, 2), (1, 2)]
    assert ranked_pairs([3, 2, 2, 1], "all") == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert ranked_pairs([3, 2, 2, 1], "adjacent") == [(0, 1), (2, 3)]
    assert ranked_pairs([3, 2, 1], "extremes") == [(0, 2)]
    assert ranked_pairs([3, 3], "extremes") == ranked_pairs([1], "extremes") == ranked_pairs([], "all") == []
    with pytest.raises(ValueError, match="ranked_pairs='best'"):
        ranked_pairs([2, 1], "best")


def test_ranked(tokenizer):
    rows = [
        {"prompt": "p", "completions": ["b", "a", "c"], "scores": [2.0, 3.0, 1.0]},
        {"prompt": "p", "completions": ["a", "", "b", "a"], "scores": None},  # "a" occurs twice
        {"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 1.0]},
        {"prompt": "p", "completions": ["a", "a"], "scores": [2.0, 1.0]},
        {"prompt": "p", "completions": ["a", ""], "scores": [2.0, 1.0]},
        {"prompt": "p", "completions": ["a"], "scores": [2.0]},
        {"prompt": "p", "completions": ["a", "b"], "scores": [2.0]},
        {"prompt": "p", "completions": ["a", "b"], "scores": [2.0, float("nan")]},
        {"prompt": "p", "completions": ["a", "b"], "scores": [float("inf"), 1.0]},
    ]
    kept, report = prepared(rows, tokenizer)
    assert [decoded(row, tokenizer) for row in kept] == [[c + EOS for c in "abc"], [c + EOS for c in "ab"]]
    assert [list(zip(row["chosen"], row["rejected"])) for row in kept] == [[(0, 1), (0, 2), (1, 2)], [(0, 1)]]
    assert reasons(report) == {
        "tied scores": (1, [2]),
        "identical sides": (1, [3]),
        "empty completion": (1, [4]),
        "malformed row": (4, [5, 6, 7, 8]),
    }
    assert (report.pairs, report.pairs_dropped) == (4, 5)  # three of them have the empty completion
    (extremes, *_), _ = prepared(rows[:1], tokenizer, ranked_pairs="extremes")
    assert decoded(extremes, tokenizer) == ["a" + EOS, "c" + EOS]  # "b" is in no pair


def test_ranked_rows_may_say_their_pairs(tokenizer):
    """Given pairs count even against the scores. Equal completions are merged, and pairs refer to the merged ones."""
    rows = [
        {
            "prompt": "p",
            "completions": [" c", " a", " b", " a"],
            "scores": [1, 3, 2, 0],
            "pairs": [[1, 0], [2, 3], [0, 3]],
        },
        {"prompt": "p", "completions": ["", " a", " b", ""], "scores": [9, 1, 2, 0], "pairs": [[0, 1], [1, 2]]},
        {"prompt": "p", "completions": [" a", " b"], "scores": [1, 0], "pairs": None},
        {"prompt": "p", "completions": [" a", " a", " b"], "scores": [2, 1, 0], "pairs": [[0, 1]]},
        {"prompt": "p", "completions": [" a", " b", ""], "scores": [2, 1, 0], "pairs": [[0, 2]]},
    ]
    kept, report = prepared(rows, tokenizer, ranked_pairs="extremes")
    sides = [
        [
            tuple(decoded(row, tokenizer)[i].removesuffix(EOS) for i in pair)
            for pair in zip(row["chosen"], row["rejected"])
        ]
        for row in kept
    ]
    assert sides == [[(" a", " c"), (" b", " a"), (" c", " a")], [(" a", " b")], [(" a", " b")]]
    assert reasons(report) == {"identical sides": (1, [3]), "empty completion": (1, [4])}
    assert (report.pairs, report.pairs_dropped) == (5, 1)  # the dropped pair of row 1 has the empty completion


@pytest.mark.parametrize("pairs", [[], [[0]], [[0, 0]], [[0, 2]], [[-1, 0]], [[0, 1, 1]], [[[0], [1]]], ["01"]])
def test_invalid_pairs(pairs, tokenizer):
    rows = [{"prompt": "p", "completions": [" a", " b"], "pairs": pairs}]
    with pytest.raises(ValueError, match=r"`pairs` is not a list of \[better, worse\] positions in the 2 completions"):
        prepared(rows, tokenizer)


def test_ranked_conversations(tokenizer):
    (kept,), _ = prepared([{"prompt": user("p"), "completions": [assistant(c) for c in "abc"]}], tokenizer)
    assert decoded(kept, tokenizer) == [c + EOS for c in "abc"]


def test_invalid_token_ids(tokenizer):
    rows = [{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [id]} for id in (7, -1, 2**31)]
    kept, report = prepared(rows, tokenizer)
    assert len(kept) == 1 and reasons(report) == {"malformed row": (2, [1, 2])}
    assert "`rejected_ids` is not a list of token ids" in str(report.dropped["malformed row"])


def test_tokens_pass_through(tokenizer):
    rows = [
        {
            "prompt_ids": [5],
            "chosen_ids": [6, 7],
            "rejected_ids": [8],
            "ref_chosen_logps": -1.5,
            "ref_rejected_logps": -2,
        },
        {"prompt_ids": [5], "chosen_ids": [], "rejected_ids": [8], "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0},
        {
            "prompt_ids": None,
            "chosen_ids": [6],
            "rejected_ids": [8],
            "ref_chosen_logps": 0.0,
            "ref_rejected_logps": 0.0,
        },
    ]
    (kept,), report = prepared(rows, tokenizer)
    assert (kept["prompt_ids"], kept["completion_ids"]) == ([5], [[6, 7], [8]])
    assert (kept["ref_chosen_logps"], kept["ref_rejected_logps"]) == (-1.5, -2.0)
    assert reasons(report) == {"empty completion": (1, [1]), "malformed row": (1, [2])}


def test_output_is_an_accepted_form(tokenizer):
    rows = [pair(chosen="", tier=0), pair(tier=1), pair("a b c d e f g h i j", tier=2)]
    once, first = prepare(Dataset.from_list(rows), tokenizer, max_length=12, keep_columns=["tier"])
    twice, second = prepare(once, tokenizer, max_length=12, keep_columns=["tier"])
    assert first.kept == 1
    assert once.to_list() == twice.to_list()
    assert (once[0]["row"], once[0]["tier"], second.rows_in, second.kept) == (1, 1, 1, 1)
    broken = once.map(lambda row: {"rejected": [7]})
    with pytest.raises(ValueError, match="`rejected` is not a list of indices into the 2 completions"):
        prepare(broken, tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "chosen"], r"columns `chosen`, `prompt`; expected one of: .*`chosen`, `rejected`"),
        (["prompt", "chosen", "rejected", "images"], "column `images`.*reads no images"),
        (["prompt", "completion", "label"], "unpaired preferences"),
    ],
)
def test_unknown_columns(columns, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        prepare(Dataset.from_list([dict.fromkeys(columns, "x")]), tokenizer)


def test_detect_form_prefers_preferences():
    assert detect_form(["prompt", "messages", "chosen", "rejected", "score"]) is Form.PREFERENCE


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(prompt=5), "`prompt` is int; expected text or a list"),
        (pair(chosen=["a", "b"]), "`chosen` is a list of str; expected"),
        (pair(chosen=[{"content": "a"}]), "`chosen` is a list of dict"),
        (pair(prompt=user("a")), "`prompt` is a list of messages, but `chosen` is text"),
        (pair(chosen=assistant("a")), "`chosen`, `rejected` mix text and messages"),
        (chat(prompt=""), None),
        ({**chat(), "prompt": []}, "`prompt` holds no message"),
        ({**chat(), "prompt": "the sky?"}, "`prompt` is text, but `chosen` is a list of messages, and no turn"),
        ({"chosen": user("a"), "rejected": user("b")}, "no turn comes before the completion in `chosen`, `rejected`"),
        ({**chat(), "prompt": user([{"type": "image"}])}, "`prompt` holds a part that is not text"),
        (chat(tools="{not JSON"), "`tools` is text that is not JSON"),
        (chat(tools={"name": "weather"}), "`tools` is dict"),
        (chat(chat_template_kwargs={"add_generation_prompt": True}), "may not set `add_generation_prompt`"),
        (chat(chat_template_kwargs={"tools": [], "padding": True}), "may not set `padding`, `tools`"),
    ],
)
def test_malformed_rows_name_the_field(row, message):
    if message is None:
        assert parse_row(row, Form.PREFERENCE).prompt == user("")
        return
    with pytest.raises(RowError, match=message) as caught:
        parse_row(row, Form.PREFERENCE)
    assert caught.value.reason == "malformed row"
