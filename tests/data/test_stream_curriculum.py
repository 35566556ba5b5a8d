"""Tests the curriculum of a stream: shares, order, rows passed over, levels replaced, and the report."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from cpt_kernels.data.curriculum import PLACE, SCHEDULES, Curriculum
from cpt_kernels.data.stream_curriculum import StreamDraws

DRAWS = 10_000


def rows_of(levels: str, start: int = 0) -> list[dict]:
    """Returns a row for each letter: ``b`` is the pair a>b, with the letter's place in the alphabet as its score."""
    return [
        {"row": i, "chosen_model": "a", "rejected_model": letter, "score": float(ord(letter))}
        for i, letter in enumerate(levels, start)
    ]


def draw(option: dict, rows: list[dict], count: int = DRAWS, seed: int = 0, rows_read: list | None = None):
    """Returns the first drawn rows of a stream with equal passes, and the object that drew them."""
    draws = StreamDraws(Curriculum.parse(option), seed)
    taken: list[dict] = []

    def read(number: int):
        for row in rows:
            if rows_read is not None:
                rows_read.append(row["row"])
            yield row

    stream = draws.draw(read, lambda: len(taken) / count)
    while len(taken) < count:
        taken.append(next(stream))
    return taken, draws


@pytest.mark.parametrize("schedule", sorted({*SCHEDULES} - {"sorted"}))  # which a stream refuses
def test_shares_follow_the_schedule(schedule):
    """Shares follow the schedule even if a quarter of the stream is hard; only `none` keeps the stream's shares."""
    letters = "".join(np.random.default_rng(0).choice(["b", "c"], p=[0.75, 0.25], size=DRAWS))
    taken, draws = draw({"schedule": schedule, "levels": ["a>b", "a>c"], "buffer": 256}, rows_of(letters))
    hard = np.array([row[PLACE] for row in taken])
    t = np.arange(DRAWS) / DRAWS
    alpha = {
        "linear": t,
        "reversed": 1 - t,
        "staged": (t >= 0.5).astype(float),
        "constant": np.full(DRAWS, 0.5),
        "none": np.full(DRAWS, 0.25),
        "sqrt": np.clip(1 - 0.5 / np.sqrt(1e-4 + (1 - 1e-4) * t), 0, 1),  # all draws are from the easiest share
    }[schedule]
    assert [row["rejected_model"] == "c" for row in taken] == hard.tolist()
    for part in np.array_split(np.arange(DRAWS), 20):
        deviation = np.sqrt((alpha[part] * (1 - alpha[part])).sum())
        assert abs(hard[part].sum() - alpha[part].sum()) <= 4 * deviation + 1e-6
    assert not draws.replaced and draws.passes == (0 if schedule == "none" else draws.passes)
    assert (sum(draws.passed_over.values()) == 0) == (schedule == "none")


def test_no_row_is_lost_or_drawn_twice_in_a_pass():
    """For each level, read = drawn + passed over + still waiting, and its rows are drawn in the stream's order."""
    letters = "".join(np.random.default_rng(1).choice(["b", "c", "x"], size=3000))
    taken, draws = draw({"levels": ["a>b", "a>c"], "buffer": 100}, rows_of(letters), count=600)
    assert draws.passes == 0
    waiting = [len(rows) for rows in draws._waiting]
    for level in (0, 1):
        assert draws.read[level] == draws.drawn[level] + draws.passed_over[level] + waiting[level]
        numbers = [row["row"] for row in taken if row[PLACE] == level]
        assert numbers == sorted(set(numbers)) and draws.drawn[level] == len(numbers)
    assert sum(waiting) <= 100 and draws.passed_over[0] + draws.passed_over[1] > 0
    lines = draws.report()
    assert lines[0] == "curriculum, linear: 0 whole passes over the stream"
    counts = f"a>c: {draws.read[1]} rows read, {draws.drawn[1]} drawn, {draws.passed_over[1]} passed over"
    assert lines[2].startswith(counts) and f", {waiting[1]} still waiting; replaced 0 times" in lines[2]
    assert lines[3] == f"in no level, so never drawn: {draws.others['a>x']} rows (a>x)"


def test_a_level_that_is_missing_is_replaced_by_its_neighbour_and_counted():
    """The hard rows are at the end of the stream, beyond the reach of the buffers."""
    rows = rows_of("b" * 300 + "c" * 500)
    read: list[int] = []
    taken, draws = draw({"schedule": "constant", "levels": ["a>b", "a>c"], "buffer": 50}, rows, 400, rows_read=read)
    places = [row[PLACE] for row in taken]
    first_hard = places.index(1)
    assert draws.replaced[1] > 50 and first_hard > 200
    assert len(read) < 700, "each draw of a missing level reads the whole stream"
    assert f"replaced {draws.replaced[1]} times by another level" in draws.report()[2]
    near, draws = draw({"schedule": "constant", "levels": ["a>b", "a>c"], "buffer": 500}, rows, 400)
    assert sum(row[PLACE] for row in near) == pytest.approx(200, abs=4 * 10) and not draws.replaced


def test_full_buffers_drop_the_oldest_row_of_the_fullest_level():
    draws = StreamDraws(Curriculum.parse({"levels": ["a>b", "a>c"], "buffer": 4}), 0)
    stream = draws.draw(lambda _: rows_of("cccbcccb"), lambda: 0.0)
    assert [next(stream)["row"] for _ in range(2)] == [3, 7]
    assert [row["row"] for row in draws._waiting[1]] == [4, 5, 6] and draws.passed_over == Counter({1: 3})


def test_three_levels_with_a_buffer_of_one_row():
    taken, draws = draw({"levels": ["a>b", "a>c", "a>d"], "buffer": 1}, rows_of("bcd" * 50), 60)
    assert len(taken) == 60 and all(len(rows) <= 1 for rows in draws._waiting)


def test_waiting_rows_are_kept_when_the_stream_starts_again():
    taken, draws = draw({"levels": ["a>b", "a>c"]}, rows_of("bc" * 20), 100)
    assert draws.passes >= 1 and not draws.passed_over
    times = Counter(row["row"] for row in taken)
    for parity in (0, 1):
        of_level = [times[row] for row in range(parity, 40, 2)]
        assert max(of_level) - min(of_level) <= 1


def test_the_same_stream_and_seed_give_the_same_rows():
    rows = rows_of("".join(np.random.default_rng(2).choice(["b", "c"], size=300)))
    option = {"levels": ["a>b", "a>c"], "buffer": 20}
    once, draws = draw(option, rows, 200)
    assert draw(option, rows, 200)[0] == once and draw(option, rows, 200, seed=1)[0] != once
    again = draws.draw(lambda _: rows, lambda: 0.0)  # the same object from the start, like a resumed run
    first = list(itertools.islice(again, 50))
    assert all(row[PLACE] == 0 for row in first) and draws.drawn == Counter({0: 50})


def test_levels_by_a_column_come_from_the_first_rows():
    letters = "".join(np.random.default_rng(3).permutation([chr(c) for c in range(97, 123)] * 20))
    taken, draws = draw({"levels": 2, "column": "score", "buffer": 400}, rows_of(letters), 300)
    assert draws.levels.names == ("score_1of2", "score_2of2")
    assert all(row[PLACE] == (row["rejected_model"] > "m") for row in taken)
    taken, draws = draw({"levels": "score", "buffer": 400}, rows_of(letters), 300)
    third = [np.mean([row[PLACE] for row in part]) for part in (taken[:100], taken[100:200], taken[200:])]
    assert third == pytest.approx([1 / 6, 1 / 2, 5 / 6], abs=0.06)
    assert len(draws.report()) == 2 and draws.report()[1].startswith("score in 26 parts: ")


def test_streams_that_are_refused():
    for rows, message in (
        (rows_of("bbb"), r"level a>c has no rows; the data has a>b \(3 rows\)"),
        (rows_of("xx"), r"level a>b has no rows; the data has a>x \(2 rows\)"),
        ([], "level a>b has no rows; the data has no rows at all"),
    ):
        with pytest.raises(ValueError, match=message):
            draw({"levels": ["a>b", "a>c"]}, rows)
    with pytest.raises(ValueError, match="there are no rows to find levels of score in"):
        draw({"levels": 2, "column": "score"}, [])
    with pytest.raises(ValueError, match="score of row 1 is 'high', not a number"):
        draw({"levels": 2, "column": "score"}, [*rows_of("b"), {**rows_of("c", 1)[0], "score": "high"}])
