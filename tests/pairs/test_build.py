"""Tests the pairs of ranked responses against a plain enumeration of all pairs."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest

from cpt_kernels.pairs.build import DropReason, Which, build_pairs, factorize, held_out, prompt_key
from tests.helpers.rows import grouped_rows, real_rows

MODELS = ["a", "b", "c", "d"]
ORDER = "a > b = c > d"
REAL_ORDER = ["gpt4", "gpt-3.5-turbo-0301", "text_davinci_003", "text_davinci_001"]


def random_rows(count=300, seed=0):
    """Returns rows with few different prompts and texts, so that all occur repeatedly; some are empty, some unrated."""
    rng = random.Random(seed)
    texts = ["", " ", *(f"text {i}" for i in range(6))]
    return [
        (f"prompt {rng.randrange(40)}", rng.choice([*MODELS, "e"]), rng.choice(texts), rng.choice([None, 1, 2, 3, 4.5]))
        for _ in range(count)
    ]


def columns(rows):
    return [list(column) for column in zip(*rows)]


def straightforward(rows, scores, wanted):
    """Builds pairs by a loop over all pairs of responses to a prompt.

    Args:
        scores: {model: strength}, or None for the rows' own ratings.

    Returns:
        A Counter of (prompt, model, text, model, text, gap), and the numbers of identical pairs, of tied pairs and of
        used rows.
    """
    answers: dict[str, list] = {}
    seen = set()
    for prompt, model, text, rating in rows:
        score = rating if scores is None else scores.get(model)
        key = (prompt, model, text) if scores is None else (prompt, model)
        if text.strip() and score is not None and key not in seen:
            seen.add(key)
            answers.setdefault(prompt, []).append((score, model, text))
    built, identical, tied, used = Counter(), 0, 0, set()
    for prompt, given in answers.items():
        for one, other in itertools.permutations(range(len(given)), 2):
            (score, model, text), (low, worse, bad) = given[one], given[other]
            levels = sorted({s for s, _, _ in given} if scores is None else set(scores.values()))
            apart = levels.index(score) - levels.index(low)
            if apart < 0 or (apart == 0 and one > other) or not wanted(model, worse, apart):
                continue
            if text == bad:
                identical += 1
            elif apart == 0:
                tied += 1
            else:
                built[prompt, model, text, worse, bad, score - low] += 1
                used |= {(prompt, one), (prompt, other)}
    return built, identical, tied, len(used)


WANTED = {
    "all": lambda better, worse, apart: True,
    "adjacent": lambda better, worse, apart: apart <= 1,
    "a > d, b > d": lambda better, worse, apart: (better, worse) in (("a", "d"), ("b", "d")),
    "base": lambda better, worse, apart: (better == "b") != (worse == "b"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rated", [False, True], ids=["order", "ratings"])
@pytest.mark.parametrize("which", WANTED)
def test_against_a_straightforward_count(which, rated, seed):
    rows = random_rows(seed=seed)
    prompts, models, responses, ratings = columns(rows)
    scores = None if rated else {"a": 2, "b": 1, "c": 1, "d": 0}
    wanted = WANTED[which]
    if rated and ">" in which:  # tied responses of two named models are asked for in both orders
        wanted = lambda x, y, apart: WANTED[which](x, y, apart) or (apart == 0 and WANTED[which](y, x, apart))  # noqa: E731
    expected, identical, tied, used = straightforward(rows, scores, wanted)
    asked = Which("base", base="b") if which == "base" else which
    pairs = build_pairs(prompts, models, responses, ratings if rated else ORDER, asked)
    got = Counter(tuple(row.values()) for row in pairs.rows(prompts, models, responses))
    reordered = Counter()
    for (prompt, chosen, rejected, better, worse, gap), count in got.items():
        reordered[prompt, better, chosen, worse, rejected, gap] += count
    assert reordered == expected and len(pairs) > 10
    assert (len(pairs.identical), len(pairs.tied)) == (identical, tied)
    counts = np.bincount(pairs.drops, minlength=len(DropReason))
    assert counts.sum() == len(rows) and counts[DropReason.KEPT] == used
    assert counts[DropReason.EMPTY_RESPONSE] == sum(not text.strip() for text in responses)
    assert (counts[DropReason.SECOND_RESPONSE] == 0) == rated


def test_real_responses():
    rows = [(row["prompt"], row["model"], row["response"], None) for row in real_rows("responses.jsonl")]
    prompts, models, responses, _ = columns(rows)
    pairs = build_pairs(prompts, models, responses, " > ".join(REAL_ORDER))
    expected, identical, tied, used = straightforward(rows, dict(zip(REAL_ORDER[::-1], range(4))), WANTED["all"])
    assert (len(pairs), len(pairs.identical), len(pairs.tied)) == (expected.total(), identical, tied) == (1747, 53, 0)
    assert (pairs.drops == DropReason.KEPT).sum() == used
    by_models = Counter((models[i], models[j]) for i, j in pairs.identical.tolist())
    assert [by_models[pair] for pair in itertools.combinations(REAL_ORDER, 2)] == [4, 10, 9, 3, 2, 25]
    built = [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs.rows(prompts, models, responses)]
    opposed = sum((prompt, rejected, chosen) in set(built) for prompt, chosen, rejected in built)
    assert pairs.count_echoes() == (len(built) - len(set(built)), opposed) == (45, 24)


def test_rows_may_come_in_any_order():
    rows = [row for row in {(p, m): (p, m, t, r) for p, m, t, r in random_rows()}.values()]
    shuffled = random.Random(1).sample(rows, len(rows))
    results = []
    for given in (rows, shuffled):
        prompts, models, responses, _ = columns(given)
        pairs = build_pairs(prompts, models, responses, ORDER)
        results.append({json.dumps(row) for row in pairs.rows(prompts, models, responses)})
        assert list(dict.fromkeys(pairs.prompt[pairs.chosen])) == sorted(set(pairs.prompt[pairs.chosen]))
    assert results[0] == results[1]


def test_digests_and_texts_give_the_same_pairs():
    prompts, models, responses, ratings = columns(random_rows())
    digests = [np.array([prompt_key(text) for text in texts]) for texts in (prompts, responses)]
    drops = np.array([DropReason.KEPT if text.strip() else DropReason.EMPTY_RESPONSE for text in responses], np.int8)
    for strength in (ORDER, ratings):
        by_text = build_pairs(prompts, models, responses, strength)
        by_digest = build_pairs(digests[0], np.array(models, object), digests[1], strength, drops=drops)
        assert (by_text.chosen == by_digest.chosen).all() and (by_text.rejected == by_digest.rejected).all()
        assert (by_text.drops == by_digest.drops).all() and (by_text.prompt == by_digest.prompt).all()
    assert (drops[drops != 0] == DropReason.EMPTY_RESPONSE).all(), "the caller's array was changed"


def test_groups_hold_each_response_once():
    prompts, models, responses, ratings = columns(random_rows())
    pairs = build_pairs(prompts, models, responses, ratings, "adjacent")
    flat = Counter((row["prompt"], row["chosen"], row["rejected"]) for row in pairs.rows(prompts, models, responses))
    grouped = Counter()
    responses_used = 0
    for row in grouped_rows(pairs, prompts, models, responses):
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert len(row["completions"]) == len(row["models"]) == len(row["scores"])
        assert {i for pair in row["pairs"] for i in pair} == set(range(len(row["completions"])))
        grouped.update((row["prompt"], row["completions"][i], row["completions"][j]) for i, j in row["pairs"])
        responses_used += len(row["completions"])
    assert grouped == flat and len({p for p, _, _ in flat}) == len(pairs.group())
    assert responses_used == (pairs.drops == DropReason.KEPT).sum()


def test_reasons_of_dropped_responses():
    rows = [
        ("p", "a", "yes", 1.0),
        ("p", "a", "yes", 2.0),  # a duplicate, with any rating
        ("p", "a", "no", 2.0),
        ("p", "b", "", 1.0),
        (" ", "b", "yes", 1.0),
        ("p", "e", "maybe", 1.0),
        ("q", "a", "alone", 1.0),
        ("p", "d", "other", None),
        ("r", "a", "same", 1.0),
        ("r", "d", "same", 1.0),
        ("r", "c", "same", 1.0),
    ]
    K, D = DropReason.KEPT, DropReason
    prompts, models, responses, ratings = columns(rows)
    drops = build_pairs(prompts, models, responses, "a > d").drops.tolist()
    assert drops == [
        *(K, D.DUPLICATE, D.SECOND_RESPONSE, D.EMPTY_RESPONSE, D.EMPTY_PROMPT, D.MODEL_NOT_RANKED),
        *(D.NO_OTHER_RESPONSE, K, D.NO_PAIR_LEFT, D.NO_PAIR_LEFT, D.MODEL_NOT_RANKED),
    ]
    pairs = build_pairs(prompts, models, responses, ratings)
    assert pairs.drops.tolist() == [
        *(K, D.DUPLICATE, K, D.EMPTY_RESPONSE, D.EMPTY_PROMPT, K),
        *(D.NO_OTHER_RESPONSE, D.NO_RATING, D.NO_PAIR_LEFT, D.NO_PAIR_LEFT, D.NO_PAIR_LEFT),
    ]
    assert [(responses[i], responses[j]) for i, j in zip(pairs.chosen, pairs.rejected)] == [
        ("no", "yes"),
        ("no", "maybe"),
    ]


def test_a_prompt_with_many_responses():
    n = 400
    pairs = build_pairs(["p"] * n, ["m"] * n, list(range(n)), np.arange(n) % 100, "adjacent")
    assert len(pairs) == 99 * 16 and (pairs.gap == 1).all() and len(pairs.tied) == 100 * 6


ROWS = (["p", "p", "q"], ["a", "b", "a"], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("rows", "strength", "which", "message"),
    [
        (([], [], []), "a > b", "all", "there are no responses"),
        ((["p"], ["a", "b"], ["x"]), "a > b", "all", "1 prompts, 2 models and 1 responses"),
        (ROWS, "a > bb", "all", "the order names the model bb, but there are a, b"),
        (ROWS, {"text_a": 1, "b": 2}, "all", "the order names the model text_a"),
        ((ROWS[0], ["gpt4", "gpt3", "gpt4"], ROWS[2]), "gpt4 > gtp3", "all", "did you mean gpt3?"),
        (ROWS, {"a": 1, "b": float("nan")}, "all", "the strength of b is nan"),
        (ROWS, {"a": 1, "b": 1}, "all", "a pair needs two models of different strength"),
        (ROWS, {}, "all", "no model: a pair needs two"),
        (ROWS, "a > b", "a > c", "the choice of pairs names the model c"),
        (ROWS, [1, 2, 3], "a > c", "the choice of pairs names the model c, but there are a, b"),
        (ROWS, "a > b", "b > a", "the pair b > a is asked for, but b is weaker"),
        (ROWS, "a > b", Which("base", base="c"), "the choice of pairs names the model c"),
        (ROWS, [1, 2], "all", "2 ratings for 3 responses"),
        (ROWS, [1, "good", 2], "all", "row 1: the rating is 'good'; expected a number"),
        (ROWS, [1, float("inf"), 2], "all", "row 1: the rating is infinite"),
        (ROWS, [1, 1, 2], "all", "no pair can be built of 3 responses: 1 no other response, 2 no pair left; .* 1 tied"),
        ((ROWS[0], ROWS[1], ["x", "", "z"]), "a > b", "all", "no response of b can be used: 1 empty response"),
        ((["p", "q"], ["a", "b"], ["x", "y"]), "a > b", "all", "a answers 1, b answers 1 prompts, none in common. "),
        (
            (["p", "p"], ["a", "b"], ["x", "y"]),
            [1.0, None],
            "all",
            r"a answers 1 .* in common \(dropped: 1 no rating\)",
        ),
    ],
)
def test_responses_that_cannot_be_paired(rows, strength, which, message):
    with pytest.raises(ValueError, match=message):
        build_pairs(*rows, strength, which)


def test_the_split_is_exact_and_depends_on_the_prompts_alone():
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(500) for _ in range(rng.integers(1, 7))]
    keys = [prompt_key(prompt) for prompt in prompts]
    small, large = held_out(keys, 0.05), held_out(keys, 0.2)
    for mask, share in ((small, 0.05), (large, 0.2)):
        assert abs(mask.sum() - share * len(keys)) <= 3  # half of the pairs of one prompt
        assert not {p for p, out in zip(prompts, mask) if out} & {p for p, out in zip(prompts, mask) if not out}
    assert not (small & ~large).any() and not held_out(keys, 0).any()
    order = rng.permutation(len(keys))
    assert (held_out(np.array(keys)[order], 0.05) == small[order]).all()
    # A change of the digest would move prompts between train and validation in users' data.
    assert np.flatnonzero(held_out([prompt_key(f"prompt {i}") for i in range(100)], 0.03)).tolist() == [2, 13, 24]
    for share in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            held_out(keys, share)


def test_a_split_leaves_no_part_empty():
    keys = [prompt_key(text) for text in ("a", "a", "a", "b")]
    for share in (1e-6, 0.5, 0.999):
        assert sorted(held_out(keys, share).tolist()) in ([False] * 3 + [True], [False] + [True] * 3)
    with pytest.raises(ValueError, match="needs at least 2 prompts"):
        held_out(keys[:3], 0.5)


def test_keys_take_any_text():
    assert prompt_key("half of a pair \ud83d") != prompt_key("half of a pair ?") and len(prompt_key("")) == 16


def test_codes_follow_first_appearance():
    for values in (["b", "a", "b", "c"], np.array(["b", "a", "b", "c"]), np.array([7, 3, 7, 9])):
        assert factorize(values).tolist() == [0, 1, 0, 2]
