"""Tests reading responses of every accepted form as one row each."""

from __future__ import annotations

import math

import pytest
from datasets import Dataset

from cpt_kernels.pairs.build import DropReason, prompt_key
from cpt_kernels.pairs.responses import TEXT, TURN, TURNS, as_messages, describe_columns, find_readings, read_responses
from tests.helpers.rows import assistant, make_tokenizer, user

ITEMS = [
    {"model": "a", "response": "yes", "overall_score": 4.0},
    {"model": "b", "response": "no", "overall_score": 1.0},
]
ASPECTS = {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}, "truth": {"Rating": "1"}}
FORMS = {
    "long": [{"prompt": "p", "model": "a", "response": "yes"}, {"prompt": "p", "model": "b", "response": "no"}],
    "as AlpacaEval": [
        {"instruction": "p", "generator": "a", "output": "yes", "dataset": "x"},
        {"instruction": "p", "generator": "b", "output": "no", "dataset": "x"},
    ],
    "wide": [{"id": 3, "prompt": "p", "a": "yes", "b": "no", "other": "none of it"}],
    "nested": [{"instruction": "p", "models": ["a", "b"], "completions": ITEMS}],
    "lists": [{"prompt": "p", "generations": ["yes", "no"], "generation_models": ["a", "b"]}],
    "pairs": [{"prompt": "p", "chosen": "yes", "rejected": "no", "chosen_model": "a", "rejected-model": "b"}],
    "chat": [
        {"prompt": user("p"), "model": "a", "response": assistant("yes")},
        {"prompt": user("p"), "model": "b", "response": user("p") + assistant("no")},
    ],
    "chat, pairs of whole conversations": [
        {"prompt": "p", "chosen": user("p") + assistant("yes"), "rejected": user("p") + assistant("no")}
        | {"chosen_model": "a", "rejected_model": "b"}
    ],
    "chat, whole conversations with a key that others use": [
        {"prompt": "p", "model": "a", "response": [{**turn, "name": None} for turn in user("p") + assistant("yes")]},
        {"prompt": "p", "model": "b", "response": [{**turn, "name": None} for turn in user("p") + assistant("no")]},
    ],
}
RATED = {
    "long": [{"prompt": "p", "response": "yes", "score": "4"}, {"prompt": "p", "response": "no", "score": "1.0"}],
    "nested": [{"instruction": "p", "completions": [{"score": i["overall_score"], **i} for i in ITEMS]}],
    "lists": [{"prompt": "p", "generations": ["yes", "no"], "score": [4, 1]}],
    "underscore": [{"prompt": "p", "chosen": "yes", "rejected": "no", "chosen_score": 4, "rejected_score": 1}],
    "hyphen": [{"prompt": "p", "chosen": "yes", "rejected": "no", "chosen-score": 4, "rejected-score": 1}],
    "reversed": [{"prompt": "p", "chosen": "yes", "rejected": "no", "score_chosen": 4, "score_rejected": 1}],
}


def read(rows, models=("a", "b"), rating=None, **options):
    return read_responses(Dataset.from_list(rows), models, rating, **options).to_list()


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    responses = read(FORMS[form])
    assert [(r["prompt"], r["model"], r["response"], r["drop"]) for r in responses] == [
        ("p", "a", "yes", DropReason.KEPT),
        ("p", "b", "no", DropReason.KEPT),
    ]
    for r in responses:
        assert (r["prompt_key"], r["response_key"]) == (prompt_key("p"), prompt_key(r["response"]))
        assert (r["prompt_characters"], r["response_characters"]) == (1, len(r["response"]))
        assert math.isnan(r["rating"]) and r["prompt_tokens"] is None
        assert (r["response_shape"] == TURN) == ("chat" in form)


@pytest.mark.parametrize("form", RATED)
def test_ratings(form):
    responses = read(RATED[form], (), "score")
    assert [(r["response"], r["rating"]) for r in responses] == [("yes", 4.0), ("no", 1.0)]


@pytest.mark.parametrize(
    ("given", "rating"),
    [("3.5", 3.5), ("N/A", None), (" ", None), (None, None), (2, 2.0), (math.nan, None), (ASPECTS, 2.5)],
)
def test_values_of_a_rating(given, rating):
    (response,) = read([{"prompt": "p", "completions": [{"response": "yes", "rating": given}]}], (), "rating")
    assert response["rating"] == rating or (rating is None and math.isnan(response["rating"]))
    assert response["drop"] == DropReason.KEPT


@pytest.mark.parametrize("given", ["good", math.inf, True, ["4"]])
def test_ratings_that_are_not_numbers(given):
    (response,) = read([{"prompt": "p", "completions": [{"response": "yes", "rating": given}]}], (), "rating")
    assert response["drop"] == DropReason.NO_RATING
    assert response["detail"] == f"the rating of `completions[0]` is {given!r}; expected a number"


def test_turns_are_joined_as_text():
    system = [{"role": "system", "content": "be brief"}]
    rows = [
        {"prompt": user("p"), "model": "a", "response": assistant("yes")},
        {"prompt": system + user("p"), "model": "a", "response": assistant("yes")},
        {"prompt": user("p"), "model": "b", "response": assistant("no") + user("sure?") + assistant("yes")},
    ]
    one, two, three = read(rows)
    assert (one["prompt"], one["prompt_shape"], two["prompt_shape"]) == ("p", TURN, TURNS)
    assert one["prompt_key"] == prompt_key("p") == three["prompt_key"] != two["prompt_key"]
    for row, response in zip(rows, (one, two, three)):
        assert as_messages(response["prompt"], response["prompt_shape"], "user") == row["prompt"]
        assert as_messages(response["response"], response["response_shape"], "assistant") == row["response"]
    assert two["prompt_characters"] == len("be brief\np")
    assert as_messages("p", TEXT, "user") == user("p")


def test_rows_are_read_by_what_they_have():
    """Files of several forms put together have null in the columns that a form lacks."""
    rows = [
        {"prompt": "p", "model": "a", "response": "yes"},
        {"prompt": "p", "chosen": "no", "rejected": "never"},
        {"prompt": "p"},
    ]
    columns = dict.fromkeys(key for row in rows for key in row)
    responses = read([{column: row.get(column) for column in columns} for row in rows])
    assert [(r["model"], r["response"], r["row"], r["drop"]) for r in responses] == [
        ("a", "yes", 0, DropReason.KEPT),
        ("chosen", "no", 1, DropReason.KEPT),
        ("rejected", "never", 1, DropReason.KEPT),
        (None, "", 2, DropReason.EMPTY_RESPONSE),
    ]


def test_rows_that_cannot_be_read():
    image = [{"role": "user", "content": None}]
    rows = [{"prompt": "p", "generations": ["yes", "no"], "models": ["a"]}, {"prompt": "p", "generations": None}]
    rows += [
        {"prompt": "p", "generations": [], "models": []},
        {"prompt": "", "generations": ["yes", None], "models": ["a", "b"]},
    ]
    responses = read([{"models": None, **row} for row in rows])
    assert [(r["row"], DropReason(r["drop"]).label, r["detail"]) for r in responses] == [
        (0, "malformed row", "`models` is not a list of 2 values, one for each of `generations`"),
        (1, "malformed row", "`generations` is NoneType; expected a list"),
        (2, "malformed row", "`generations` is empty"),
        (3, "empty prompt", ""),
        (3, "empty prompt", ""),
    ]
    (response,) = read([{"prompt": image, "model": "a", "response": "yes"}])
    assert (
        response["drop"] == DropReason.MALFORMED_ROW and "`prompt` is neither text nor a list of" in response["detail"]
    )
    (response,) = read([{"prompt": "p", "model": "a", "response": user("another") + assistant("yes")}])
    assert response["drop"] == DropReason.MALFORMED_ROW
    assert response["detail"] == "`response` begins with a turn of user that the prompt does not begin with"


def test_tokens_are_counted():
    tokenizer = make_tokenizer(bos=True)
    responses = read(FORMS["long"], tokenizer=tokenizer)
    for r in responses:
        assert r["response_tokens"] == len(tokenizer.encode(r["response"], add_special_tokens=False))
        assert r["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("row", "rating", "message"),
    [
        ({"turns": "t", "model": "a"}, None, "data: rows of `turns` hold pairs and name no model of a response"),
        ({"text": "p", "model": "a"}, None, "data: there is no column `prompt` or `instruction`, but `text`, `model`"),
        ({"prompt": "p", "x": "yes"}, None, "nor columns for the models a, b: rename columns"),
        (
            {"prompt": "p", "model": "a", "response": "y"},
            "score",
            "no rating `score` of responses; the columns are `prom",
        ),
        ({"prompt": "p", "completions": ITEMS}, "score", r"`completions` of \{model, response, overall_score\}"),
        ({"prompt": "p", "a": "yes", "b": "no"}, "score", "no `model` with `response`"),
    ],
)
def test_columns_that_hold_no_responses(row, rating, message):
    with pytest.raises(ValueError, match=message):
        read([row], () if rating else ("a", "b"), rating, name="data")


def test_a_list_is_read_before_the_pair_made_of_it():
    """Rows as distilabel writes them: all generations, and the best and the worst of them."""
    row = {"prompt": "p", "generations": ["yes", "no"], "ratings": [4, 1], "chosen": "yes", "rejected": "no"}
    row |= {"chosen_rating": 4, "rejected_rating": 1}
    columns = describe_columns(Dataset.from_list([row]))
    assert find_readings(columns)[0].is_list
    assert [reading.is_list for reading in find_readings(columns, (), "ratings")] == [True]
    assert [reading.is_list for reading in find_readings(columns, (), "rating")] == [False]
