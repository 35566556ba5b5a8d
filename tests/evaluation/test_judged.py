"""Tests of evaluation/judged.py: rates, counts and lengths of verdicts, and the comparison of models."""

from __future__ import annotations

import numpy as np
import pytest

from cpt_kernels.evaluation.judge import Verdicts, ask_function
from cpt_kernels.evaluation.judged import OutputEvaluation, win_rate_differences
from cpt_kernels.evaluation.outputs import Comparisons, ModelOutputs, join
from cpt_kernels.evaluation.win_rate import Bootstrap, LengthPrior, interval, length_controlled_win_rate, win_rate
from tests.helpers.rows import real_rows

NAN = float("nan")


def evaluation(orders, model="m", prompts=None, **verdicts) -> OutputEvaluation:
    orders = np.array(orders, np.float64).reshape(len(orders), -1)
    prompts = prompts or [f"prompt {i}" for i in range(len(orders))]
    outputs, baseline = [
        ["x" * (1 + i % 4) for i in range(len(orders))],
        ["x" * (4 - i % 4) for i in range(len(orders))],
    ]
    return OutputEvaluation(Comparisons(model, "b", prompts, outputs, baseline, 3, 4), Verdicts(orders, **verdicts))


def test_summary():
    made = evaluation([[1, 1], [1, 0], [0, 0], [NAN, 1], [0.5, 1]], failures={"no verdict": 1}, identical=2)
    found = made.summary(Bootstrap(50))
    wins = [1, 0.5, 0, 0.75]
    prompts = [0, 1, 2, 4]
    lengths, baseline = [1, 2, 3, 1], [4, 3, 2, 4]
    rate = win_rate(wins, prompts=prompts, bootstrap=Bootstrap(50))
    assert found["win_rate"] == rate._asdict() and rate.n == 4
    controlled = length_controlled_win_rate(wins, lengths, baseline, prompts=prompts, bootstrap=Bootstrap(50))
    assert found["length_controlled"] == controlled._asdict()
    assert (found["wins"], found["ties"], found["losses"], found["prompts"]) == (2, 1, 1, 4)
    assert (found["characters"], found["baseline_characters"], found["longer"]) == (7 / 4, 13 / 4, 1 / 4)
    assert (found["not_judged"], found["failures"], found["identical"]) == (1, {"no verdict": 1}, 2)
    assert (found["without_baseline"], found["without_output"]) == (3, 4)
    assert (found["empty_outputs"], found["empty_baseline_outputs"]) == (0, 0)
    assert found["first_rate"] == pytest.approx((1 + 0 + 1 + 1 + 0 + 1 + 0.5 + 0) / 8) and found["consistency"] == 0.5


def test_rows():
    rows = evaluation([[1, 0], [NAN, 1]]).rows()
    assert [row["preference"] for row in rows] == [0.5, None]
    assert [row["preference_in_each_order"] for row in rows] == [[1, 0], [None, 1]]
    assert rows[0]["output"] == "x" and rows[0]["baseline_output"] == "xxxx" and rows[0]["prompt"] == "prompt 0"


def test_no_verdicts():
    with pytest.raises(ValueError, match=r"compared no output of m \(2 for HTTP 400\)"):
        evaluation([[NAN, 1], [NAN, NAN]], failures={"HTTP 400": 2})


def test_several_responses_to_a_prompt_are_one_draw():
    once = evaluation([1, 0, 1, 1] * 5)
    many = evaluation([1, 0, 1, 1] * 5, prompts=[f"prompt {i // 4}" for i in range(20)])
    rate = many.summary(Bootstrap(50))["win_rate"]
    assert once.summary(Bootstrap(50))["win_rate"]["rate"] == rate["rate"] == 0.75
    five = win_rate(np.full(5, 0.75))
    assert (rate["low"], rate["high"], rate["n"]) == (five.low, five.high, 20), "all five prompts have the same mean"
    assert many.by_prompt() == {f"prompt {i}": 0.75 for i in range(5)}


def test_differences_are_paired():
    random = np.random.default_rng(0)
    base = (random.random(80) < 0.5).astype(float)
    better = np.where(random.random(80) < 0.2, 1.0, base)
    prompts = [f"prompt {i}" for i in range(80)]
    a = evaluation(base, "a", prompts)
    b = evaluation(better[:70], "b", prompts[:70])
    other = evaluation([1], "c", ["elsewhere"])
    (found,) = win_rate_differences([a, b, other], Bootstrap(100))
    low, high = interval(better[:70] - base[:70], bootstrap=Bootstrap(100))
    assert found["win_rate"] == {"mean": pytest.approx((better - base)[:70].mean()), "low": low, "high": high}
    assert (found["model"], found["minus"], found["prompts"]) == ("b", "a", 70)
    unpaired = b.summary(Bootstrap(100))["win_rate"]
    assert high - low < unpaired["high"] - unpaired["low"]


def test_length_alone_on_real_outputs():
    """A judge that prefers longer outputs gives GPT-4 95 % over InstructGPT, whose outputs are four times shorter.

    The prior removes the length effect of a judge like GPT-4, not that of a judge of nothing else.
    """
    responses: dict[str, dict[str, list[str]]] = {}
    for row in real_rows("responses.jsonl"):
        responses.setdefault(row["model"], {})[row["prompt"]] = [row["response"]]
    outputs = [ModelOutputs(model, responses[model]) for model in ("gpt4", "text_davinci_003")]

    def longer(prompt, first, second):
        return 0.5 + 0.5 * np.sign(len(first) - len(second))

    comparisons = join(*outputs)
    evaluated = OutputEvaluation(comparisons, ask_function(longer, comparisons))
    found = evaluated.summary(Bootstrap(200))
    assert found["win_rate"]["rate"] > 0.9 and found["prompts"] == 300
    assert 0.8 < found["length_controlled"]["rate"] < found["win_rate"]["rate"] - 0.02
    controlled = evaluated.summary(Bootstrap(200), LengthPrior(0, 100))["length_controlled"]
    assert controlled["rate"] == pytest.approx(0.5, abs=0.1) and controlled["low"] < 0.5 < controlled["high"]
