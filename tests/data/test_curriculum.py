"""Tests the curriculum: levels, shares of each schedule against independent formulas, decks, and errors."""

from __future__ import annotations

import numpy as np
import pytest

from cpt_kernels.data.curriculum import (
    SCHEDULES,
    Curriculum,
    Draws,
    find_levels,
    read_keys,
    seeded,
    split_by_difficulty,
)

DRAWS = 10_000


def draws_of(curriculum: Curriculum, sizes: list[int], seed: int = 0) -> Draws:
    """Returns draws over rows of the levels ``m0>w``, ``m1>w``, ..., in order."""
    return Draws(curriculum, [f"m{level}>w" for level, size in enumerate(sizes) for _ in range(size)], seed)


def by_pairs(levels: int, schedule: str, **more) -> Curriculum:
    return Curriculum.parse({"levels": [f"m{level}>w" for level in range(levels)], "schedule": schedule, **more})


def probabilities(schedule: str, t: np.ndarray, levels: int) -> np.ndarray:
    """Returns (draws, L) the expected share of each of L equally large levels at progress t.

    The shares are hat functions around alpha (L - 1), steps, or a constant mix.
    """
    number = np.arange(levels)
    alpha = {"linear": t, "reversed": 1 - t}.get(schedule)
    if alpha is not None:
        return np.maximum(0, 1 - abs(alpha[:, None] * (levels - 1) - number))
    if schedule == "sqrt":
        pool = np.sqrt(1e-4 + (1 - 1e-4) * t)[:, None]
        return np.clip(pool * levels - number, 0, 1) / (pool * levels)
    if schedule in ("staged", "sorted"):
        return (np.minimum((t * levels).astype(int), levels - 1)[:, None] == number).astype(float)
    return np.full((len(t), levels), 1 / levels)


@pytest.mark.parametrize("levels", [2, 3, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shares_follow_the_schedule_within_binomial_error(schedule, levels):
    draws = draws_of(by_pairs(levels, schedule), [DRAWS // levels] * levels)
    drawn = draws.level[draws.epoch(0)]
    expected = probabilities(schedule, np.arange(len(draws)) / len(draws), levels)
    for part in np.array_split(np.arange(len(draws)), 20):
        counts = np.bincount(drawn[part], minlength=levels)
        deviation = np.sqrt((expected[part] * (1 - expected[part])).sum(axis=0))
        assert (abs(counts - expected[part].sum(axis=0)) <= 4 * deviation + 1e-6).all(), (schedule, counts)


def test_two_levels_are_the_papers_rule():
    """The hard level has probability alpha = t, which reaches 1 at the end of the first epoch and stays there."""
    draws = draws_of(by_pairs(2, "linear"), [7000, 3000])
    hard = draws.level[draws.epoch(0)]
    t = np.arange(DRAWS) / DRAWS
    assert abs(hard.sum() - t.sum()) <= 4 * np.sqrt((t * (1 - t)).sum())
    assert abs((hard * t).mean() - (t * t).mean()) < 0.01  # the share follows t, not only on average
    assert hard[:50].mean() < 0.1 and hard[-50:].mean() > 0.9
    assert draws.level[draws.epoch(1)].all() and draws.level[draws.epoch(2)].all()


def test_a_custom_mix():
    draws = draws_of(by_pairs(3, "constant", shares=[1, 0, 3]), [DRAWS // 4, DRAWS // 2, DRAWS // 4])
    counts = np.bincount(draws.level[draws.epoch(0)], minlength=3)
    assert counts[1] == 0 and abs(counts[2] - 0.75 * DRAWS) <= 4 * np.sqrt(0.75 * 0.25 * DRAWS)


@pytest.mark.parametrize("epochs", [0.5, 2])
def test_the_length_of_a_schedule(epochs):
    draws = draws_of(by_pairs(2, "linear", epochs=epochs), [500, 500])
    draws.end_with_run(0.1)  # has no effect, because the length was given
    hard = np.concatenate([draws.level[draws.epoch(number)] for number in range(3)])
    end = int(1000 * epochs)
    assert hard[end:].all() and 0.75 < hard[end * 3 // 4 : end].mean() < 1 and hard[: end // 4].mean() < 0.25


def test_a_run_shorter_than_an_epoch_goes_through_the_whole_schedule():
    draws = draws_of(by_pairs(2, "linear"), [500, 500])
    draws.end_with_run(0.4)
    hard = draws.level[draws.epoch(0)]
    assert hard[400:].all() and abs(hard[:400].mean() - 0.5) < 0.1
    draws.end_with_run(7)
    assert draws.epochs == 1
    assert draws.report(np.zeros(1000))[0].startswith("curriculum, linear over 1 epochs: an epoch is 1000 draws;")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_level_is_a_deck_without_replacement_over_all_epochs(schedule):
    sizes = [300, 50, 1, 149]
    draws = draws_of(by_pairs(4, schedule), sizes)
    times = np.zeros(500, dtype=int)
    for number in range(5):
        rows = draws.epoch(number)
        assert len(rows) == len(draws) == 500
        times += np.bincount(rows, minlength=500)
        for level in range(4):
            assert np.ptp(times[draws.level == level]) <= 1, "a row was drawn again before all others of its level"
        if schedule == "none":
            assert (times == number + 1).all()
        if (schedule == "staged" and number == 0) or schedule == "sorted":
            assert (times == number + 1).all() and (np.diff(draws.level[rows]) >= 0).all()
    assert times.sum() == 2500


def test_an_epoch_is_a_function_of_data_seed_and_number():
    curriculum = by_pairs(2, "linear", epochs=3)
    ahead = draws_of(curriculum, [70, 30]).epoch(3)
    one_by_one = draws_of(curriculum, [70, 30])
    epochs = [one_by_one.epoch(number) for number in range(4)]
    assert (epochs[3] == ahead).all() and (one_by_one.epoch(1) == epochs[1]).all()
    assert (epochs[0] != epochs[1]).any() and (draws_of(curriculum, [70, 30], seed=1).epoch(0) != epochs[0]).any()
    mix = draws_of(by_pairs(2, "constant"), [50, 50])
    assert (mix.level[mix.epoch(0)] != mix.level[mix.epoch(1)]).any()
    assert seeded(0, 1).random() != seeded(0, 1, 0).random() != seeded(0).random()


def test_rows_of_no_level_are_never_drawn_and_reported():
    keys = ["a>b", "x>y", "a>c", "a>b", "x>y"]
    draws = Draws(Curriculum.parse({"levels": ["a > b", "a>c"], "schedule": "none"}), keys, 0)
    assert sorted(draws.epoch(0).tolist()) == [0, 2, 3] and draws.places == [0, None, 1, 0, None]
    lines = draws.report(np.array([0, 0, 4, 2, 0]))
    assert lines[0] == "curriculum, none: an epoch is 3 draws; levels from easy to hard:"
    assert lines[1] == "a>b: 2 rows, drawn 1 never, 1 twice"
    assert lines[2] == "a>c: 1 rows, drawn 1 more often, up to 4 times"
    assert lines[3] == "in no level, so never drawn: x>y (2 rows)"


def test_the_hardest_rows_are_marked_and_equal_rows_are_split_at_random():
    values = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    option = {"column": "difficulty", "keep": 0.5, "hard_loss": "sft"}
    found = [Draws(Curriculum.parse(option), np.array(values), seed).hard.tolist() for seed in range(20)]
    assert all(hard[0] and not hard[1] and sum(hard) == 3 for hard in found)
    assert len({tuple(hard) for hard in found}) > 3
    easy, hard = split_by_difficulty(np.array(values), 0.01, 0)
    assert easy.tolist() == [1] and hard[-1] == 0
    gap = read_keys(Curriculum.parse({"levels": 2}), [[1, 5, 3]], range(3))  # a large gap is easy
    assert split_by_difficulty(gap, 0.34, 0)[0].tolist() == [1]


def test_sorted_is_the_exact_order_of_a_column():
    values = np.random.default_rng(0).permutation(np.repeat(np.arange(200.0), 2))
    draws = Draws(Curriculum.parse({"column": "difficulty", "schedule": "sorted"}), values, 0)
    draws.end_with_run(5)
    for number in range(3):
        assert (values[draws.epoch(number)] == np.sort(values)).all()
    assert any(np.diff(draws.epoch(0).reshape(-1, 2)) < 0)  # equal rows come in random order
    draws.end_with_run(0.5)  # half an epoch goes from the easiest to the hardest, too
    assert (values[draws.epoch(0)[:200]] == np.arange(200)).all()


@pytest.mark.parametrize("epochs", [1, 2.5])
@pytest.mark.parametrize("schedule", ["sorted", "linear", "sqrt"])
def test_stages_advance_over_the_run_and_shuffle_within(schedule, epochs):
    values = np.arange(3000.0)
    draws = Draws(Curriculum.parse({"column": "difficulty", "schedule": schedule, "stages": 3}), values, 0)
    plain = Draws(Curriculum.parse({"column": "difficulty", "schedule": schedule, "epochs": epochs}), values, 0)
    draws.end_with_run(epochs)
    numbers = range(int(np.ceil(epochs)))
    drawn, ordered = (np.concatenate([each.epoch(n) for n in numbers])[: int(3000 * epochs)] for each in (draws, plain))
    for stage, in_order in zip(np.array_split(drawn, 3), np.array_split(ordered, 3)):
        for part in np.array_split(np.arange(len(stage)), 3):  # each third of a stage is like the stage
            assert abs(stage[part].mean() - in_order.mean()) < 5 * in_order.std() / np.sqrt(len(part))
    if schedule == "sorted":
        assert (np.sort(drawn) == np.sort(ordered)).all()
        assert (np.sort(np.unique(drawn // 1000, return_index=True)[1]) == np.arange(3) * 1000 * epochs).all()


# --- Levels ---


def levels_of(option: dict, values: list[float]) -> list[int]:
    curriculum = Curriculum.parse(option)
    keys = read_keys(curriculum, [values], range(len(values)))
    return find_levels(curriculum, keys).of(keys).tolist()


def test_quantiles():
    assert levels_of({"levels": 2}, [5.0, 1.0, 9.0, 3.0]) == [0, 1, 0, 1]  # a large gap is easy
    assert levels_of({"levels": 2, "easy": "low"}, [5.0, 1.0, 9.0, 3.0]) == [1, 0, 1, 0]
    assert levels_of({"levels": 2, "column": "length"}, [5.0, 1.0, 9.0, 3.0]) == [1, 0, 1, 0]
    assert levels_of({"levels": 4, "column": "length"}, [5, 1, 9, 3]) == [2, 0, 3, 1]
    values = np.random.default_rng(0).permutation(1000).astype(float)
    assert levels_of({"levels": 10, "column": "x"}, values.tolist()) == (values // 100).astype(int).tolist()


def test_equal_values_are_of_one_level():
    """If every model pair has one gap, three pairs give three levels, even with very different numbers of rows."""
    values = [40.0] * 280 + [60.0] * 300 + [90.0] * 290
    assert levels_of({"levels": 3}, values) == [2] * 280 + [1] * 300 + [0] * 290
    assert levels_of({"levels": "gap"}, values) == [2] * 280 + [1] * 300 + [0] * 290
    assert set(levels_of({"levels": 2}, values)) == {0, 1}


def test_a_column_is_a_continuous_scale():
    """Each row is drawn from a window of 20 percentiles around alpha, and an epoch draws nearly every row once."""
    curriculum = Curriculum.parse({"levels": "difficulty"})
    scores = np.random.default_rng(0).normal(size=DRAWS)
    draws = Draws(curriculum, read_keys(curriculum, [scores.tolist()], range(DRAWS)), 0)
    rank = scores.argsort().argsort() / DRAWS
    rows = draws.epoch(0)
    alpha = np.arange(DRAWS) / DRAWS
    assert abs(rank[rows] - alpha).max() <= 0.1 + 0.02  # half the window, and the rounding to percentiles
    for part in np.array_split(np.arange(DRAWS), 20)[2:-2]:
        assert rank[rows[part]].mean() == pytest.approx(alpha[part].mean(), abs=4 * 0.2 / np.sqrt(12 * len(part)))
    times = np.bincount(rows, minlength=DRAWS)
    assert (times == 1).mean() > 0.85 and times.max() <= 3
    assert draws.places[int(scores.argmax())] == 1.0 and curriculum.metrics == ("curriculum/difficulty",)


def test_metrics_name_the_levels():
    assert by_pairs(2, "linear").metrics == ("curriculum/m0>w", "curriculum/m1>w")
    assert Curriculum.parse({"levels": 2}).metrics == ("curriculum/gap_1of2", "curriculum/gap_2of2")


# --- Errors ---


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("{", "is not a JSON object"),
        ("[1]", "is not a mapping"),
        ({}, "curriculum needs levels"),
        ({"levels": 2, "schedul": "linear"}, "curriculum has no key 'schedul': its keys are levels, schedule, column"),
        ({"levels": 2, "schedule": None}, "schedule=None is unknown: choose one of linear, reversed, constant, staged"),
        ({"levels": 2, "schedule": ["linear"]}, "is unknown: choose one of linear"),
        ({"levels": 1}, "levels=1 is neither a list of model pairs, nor a number of quantiles"),
        ({"levels": True}, "levels=True is neither"),
        ({"levels": "a>b"}, "levels='a>b' is neither a list of model pairs"),
        ({"levels": ""}, "levels='' is neither a list of model pairs"),
        ({"levels": 2.5}, "levels=2.5 is neither"),
        ({"levels": []}, "levels is an empty list"),
        ({"levels": ["a>b", "a"]}, "level 'a' is not a model pair; expected chosen>rejected"),
        ({"levels": ["a>b>c"]}, "level 'a>b>c' is not a model pair"),
        ({"levels": ["a>b", 3]}, "level 3 is not a model pair"),
        ({"levels": ["a>b", "a > b"]}, "levels names a>b twice"),
        ({"levels": ["a>b"], "column": "gap"}, "column has an effect only if levels is a number of quantiles"),
        ({"levels": "gap", "column": "gap"}, "column has an effect only if levels"),
        ({"levels": ["a>b"], "easy": "low"}, "easy has no effect on model pairs"),
        ({"levels": 2, "easy": "large"}, "easy='large' is neither high nor low"),
        ({"levels": 2, "schedule": "constant", "epochs": 1}, "epochs has no effect with schedule=constant"),
        ({"levels": 2, "epochs": 0}, "epochs=0 must be a positive number"),
        ({"levels": 2, "epochs": "two"}, "epochs='two' must be a positive number"),
        ({"levels": ["a>b"], "keep": 0.5}, "keep needs a column"),
        ({"column": "x", "keep": 0}, "keep=0 must be a share of the rows"),
        ({"column": "x", "keep": "half"}, "keep='half' must be a share"),
        ({"column": "x", "keep": 60}, "keep=60 must be a share"),
        ({"column": "x", "hard_loss": "sft"}, "hard_loss is for the pairs beyond keep: set keep"),
        ({"column": "x", "hard_weight": 0.5}, "hard_weight is for the pairs beyond keep: set keep"),
        ({"column": "x", "keep": 0.5, "hard_weight": 0}, "hard_weight=0 must be a positive number"),
        ({"column": "x", "keep": 0.5, "hard_loss": 1}, "hard_loss=1 must be the name of a loss"),
        ({"column": "x", "stages": 1}, "stages=1 must be a whole number, 2 or more"),
        ({"column": "x", "stages": 2, "epochs": 1}, "stages divide the whole run: remove epochs"),
        ({"column": "x", "refresh_reference": True}, "set stages"),
        ({"column": "x", "stages": 2, "refresh_reference": "yes"}, "refresh_reference='yes' must be true or false"),
        ({"levels": 2, "buffer": 0}, "buffer=0 must be a positive whole number"),
        ({"levels": 2, "shares": [1, 1]}, "shares needs schedule=constant"),
        ({"levels": 2, "schedule": "constant", "shares": [1, 1, 1]}, "must be 2 numbers, one for each level"),
        ({"levels": 2, "schedule": "constant", "shares": 0.5}, "must be 2 numbers"),
        ({"levels": 2, "schedule": "constant", "shares": [0, 0]}, "not all of them 0"),
        ({"levels": 2, "schedule": "constant", "shares": [-1, 2]}, "must be numbers >= 0"),
    ],
)
def test_options_that_are_refused(option, message):
    with pytest.raises(ValueError, match=r"^curriculum") as caught:
        Curriculum.parse(option)
    assert message in str(caught.value)


def test_data_that_is_refused():
    pairs, gap = Curriculum.parse({"levels": ["a>b", "a>d"]}), Curriculum.parse({"levels": 4})
    with pytest.raises(ValueError, match=r"reads the column chosen_model, but the data has the columns .*'prompt'"):
        pairs.check_columns(["prompt", "chosen", "rejected_model"])
    with pytest.raises(ValueError, match=r"level a>d has no rows; the data has a>b \(2 rows\), a>c \(1 rows\)"):
        Draws(pairs, ["a>b", "a>b", "a>c"], 0)
    with pytest.raises(ValueError, match="chosen_model of row 7 is None, not the name of a model"):
        read_keys(pairs, [["a", None], ["b", "b"]], [3, 7])
    with pytest.raises(ValueError, match=r"rejected_model of row 3 is \['b', 'c'\], .* a row of several pairs"):
        read_keys(pairs, [["a"], [["b", "c"]]], [3])
    for value in (None, "high", float("nan"), True):
        with pytest.raises(ValueError, match=f"gap of row 1 is {value!r}, not a number"):
            read_keys(gap, [[1.0, value]], [0, 1])
    for values, message in (
        (
            [1.0] * 5 + [2.0] * 4,
            "quantile 2 of 4 of the column gap has no row, as 9 rows have 2 different values: set levels to 2",
        ),
        ([1.0] * 9, "9 rows have 1 different values: choose another column"),
    ):
        with pytest.raises(ValueError, match=message):
            Draws(gap, read_keys(gap, [values], range(9)), 0)
