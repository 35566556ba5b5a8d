"""Tests of evaluation/judge.py: a Python function or an endpoint as judge, failures, and reuse of replies."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch

from cpt_kernels.errors import UserError
from cpt_kernels.evaluation.judge import NO_VERDICT, JudgePrompt, Verdicts, ask_endpoint, ask_function, load_judge
from cpt_kernels.evaluation.outputs import Comparisons
from cpt_kernels.generation.endpoint import EndpointOptions
from cpt_kernels.generation.prompts import Sampling
from tests.helpers import stub_endpoint
from tests.helpers.stub_endpoint import StubEndpoint, faults, shorten_waits

SAMPLING = Sampling(temperature=0, chat=True)


def comparisons(count: int = 6) -> Comparisons:
    """Outputs of 1, 2, 3, ... letters against three letters of the baseline; the outputs of three letters are equal."""
    outputs = ["m" * (i + 1) if i != 2 else "bbb" for i in range(count)]
    return Comparisons("m", "b", [f"prompt {i}" for i in range(count)], outputs, ["bbb"] * count, 0, 0)


# --- A Python function ---


@pytest.mark.parametrize(
    ("value", "preference"),
    [
        *[("output_1", 1), ("output_2", 0), ("tie", 0.5), (0.25, 0.25), (1, 1), (True, 1)],
        *[(np.float32(0.5), 0.5), (np.bool_(True), 1), (np.str_("tie"), 0.5), (torch.tensor(0.25), 0.25)],
    ],
)
def test_values_that_a_function_may_return(value, preference):
    found = ask_function(lambda *_: value, comparisons(2))
    assert found.orders.tolist() == [[preference]] * 2 and found.preferences.tolist() == [preference] * 2
    assert found.first_rate() is None and found.consistency() is None


@pytest.mark.parametrize("value", ["yes", 2, -0.1, None, float("nan"), "1", [1.0], {}, np.zeros(2)])
def test_other_values_are_an_error(value):
    with pytest.raises(ValueError, match=r"the judge returned .* for comparison 0: expected a preference"):
        ask_function(lambda *_: value, comparisons(2))


def test_both_orders_and_position_bias():
    seen = []

    def longer_or_first(prompt, first, second):
        seen.append((prompt, first, second))
        return 0.5 if first == second else 0.9 if len(first) >= len(second) else 0.4

    found = ask_function(longer_or_first, comparisons(4), both_orders=True)
    assert seen[:2] == [("prompt 0", "m", "bbb"), ("prompt 0", "bbb", "m")]
    np.testing.assert_allclose(found.orders, [[0.4, 0.1], [0.4, 0.1], [0.5, 0.5], [0.9, 0.6]])
    np.testing.assert_allclose(found.preferences, [0.25, 0.25, 0.5, 0.75])
    assert found.first_rate() == pytest.approx((2 * (0.4 + 0.9) + (0.5 + 0.5) + (0.9 + 0.4)) / 8)
    assert found.consistency() == 1
    always_first = ask_function(lambda *_: "output_1", comparisons(4), both_orders=True)
    assert always_first.first_rate() == 1 and always_first.consistency() == 0
    assert always_first.preferences.tolist() == [0.5] * 4


def test_load_judge(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text(
        "prefer = lambda prompt, a, b: 1.0\nclass Judges:\n    tie = staticmethod(lambda *_: 'tie')\nnumber = 3\n"
    )
    (tmp_path / "needs.py").write_text("import surely_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_judge("my_judges:prefer")("p", "a", "b") == 1.0
    assert load_judge("my_judges:Judges.tie")("p", "a", "b") == "tie"
    for name, message in (
        ("my_judges", "expected module:function"),
        ("no_such_module:prefer", "the module no_such_module does not exist"),
        ("my_judges.deeper:prefer", "the module my_judges.deeper does not exist"),
        ("my_judges:prefers", "my_judges has no prefers"),
        ("my_judges:number", "number is of type int, not a function"),
    ):
        with pytest.raises(ValueError, match=message):
            load_judge(name)
    with pytest.raises(UserError, match=r"needs cannot be imported: ModuleNotFoundError: .*surely_not_installed"):
        load_judge("needs:prefer")


# --- The prompt ---


def test_the_prompt_holds_instruction_and_both_outputs_unescaped():
    text = JudgePrompt()("is 1 < 2?", "yes & {{ no }}", "[[1]]")
    assert "is 1 < 2?" in text and "yes & {{ no }}" in text
    assert text.index("<answer_1>") < text.index("yes & ") < text.index("<answer_2>") < text.index("[[1]]\n")


@pytest.mark.parametrize(
    ("reply", "preference"),
    [
        ("reasons\n[[1]]", 1.0),
        ("I thought of [[1]] first.\n\n[[2]]\n", 0.0),
        ("Verdict: **[[TIE]]**", 0.5),
        ("[[1]] or [[2]]", None),
        ("[[1]]\nHope this helps!", None),
        ("Answer 1 is better.", None),
        ("[[3]]", None),
        ("", None),
    ],
)
def test_reading_a_verdict(reply, preference):
    assert JudgePrompt.read(reply) == preference


def test_custom_templates(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ prompt }}|{{ output_1 }}|{{ output_2 }}")
    assert JudgePrompt(path)("p", "a", "b") == "p|a|b"
    for text, message in (
        ("{{ prompt }} {{ output_1 }}", r"uses the variables \['output_1', 'prompt'\], expected"),
        ("{{ prompt }} {{ output_1 }} {{ output_2 }} {{ answer }}", "answer"),
        ("{% if %}", "cannot be used"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            JudgePrompt(path)
    with pytest.raises(ValueError, match="No such file"):
        JudgePrompt(tmp_path / "none.jinja")


# --- An endpoint ---


def longer_wins(question: str, seed: int | None) -> str:
    """Prefers the longer output, and gives no verdict on prompt 5."""
    assert seed is None
    first, second = re.findall(r"<answer_\d>\n(.*)\n</answer_\d>", question)
    verdict = "tie" if len(first) == len(second) else "1" if len(first) > len(second) else "2"
    return "I cannot tell." if "prompt 5" in question else f"Lengths.\n[[{verdict}]]"


@pytest.fixture(autouse=True)
def _judging(monkeypatch):
    monkeypatch.setattr(stub_endpoint, "answer_to", longer_wins)
    shorten_waits(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests")


def ask(stub: StubEndpoint, file, asked: Comparisons, **options) -> Verdicts:
    return ask_endpoint(asked, EndpointOptions("judge", stub.url, **options), SAMPLING, file)


def test_endpoint_is_asked_in_both_orders(tmp_path):
    with StubEndpoint(faults(["429", "drop"]), headers={"retry-after-ms": "1"}) as stub:
        found = ask(stub, tmp_path / "j.jsonl", comparisons())
    assert found.identical == 1 and found.failures == {NO_VERDICT: 2}
    assert found.orders[:5].tolist() == [[0, 0], [0, 0], [0.5, 0.5], [1, 1], [1, 1]]
    assert np.isnan(found.orders[5]).all() and np.isnan(found.preferences[5])
    assert found.first_rate() == 0.5 and found.consistency() == 1
    questions = stub.prompts()
    assert len(set(questions)) == 10, "five comparisons are asked in both orders; equal outputs tie without a request"
    assert all(count == 1 for count in stub.delivered.values())
    assert stub.asked[0]["temperature"] == 0 and stub.asked[0]["model"] == "judge"


def test_no_request_is_sent_twice(tmp_path):
    file = tmp_path / "j.jsonl"
    with StubEndpoint() as stub:
        ask(stub, file, comparisons(4))
        assert len(stub.asked) == 6
        more = ask(stub, file, comparisons(6))
        assert len(stub.asked) == 10
        again = ask(stub, file, comparisons(6))
        assert len(stub.asked) == 10
    np.testing.assert_array_equal(again.orders, more.orders)
    assert again.failures == {NO_VERDICT: 2}, "a reply without a verdict counts each time"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 10 and {row["model"] for row in rows} == {"judge"}


def test_an_interrupted_run_resumes(tmp_path):
    file = tmp_path / "j.jsonl"

    def dies(question: str, attempt: int) -> str | None:
        return "401" if "prompt 3" in question else None

    with StubEndpoint(dies) as stub:
        with pytest.raises(ValueError, match="refuses the key"):
            ask(stub, file, comparisons(), concurrency=1)
        delivered = set(stub.delivered)
    assert len(delivered) == 4
    with StubEndpoint() as stub:
        found = ask(stub, file, comparisons())
        assert len(stub.asked) == 6 and not delivered & set(stub.delivered)
    assert found.orders[:5].tolist() == [[0, 0], [0, 0], [0.5, 0.5], [1, 1], [1, 1]]


def test_failed_requests_are_counted_and_sent_again(tmp_path):
    def plan(question: str, attempt: int) -> str | None:
        return "400" if "prompt 1" in question else None

    with StubEndpoint(plan) as stub:
        found = ask(stub, tmp_path / "j.jsonl", comparisons(4))
    assert found.failures == {"HTTP 400": 2} and np.isnan(found.preferences).tolist() == [False, True, False, False]
    with StubEndpoint() as stub:
        found = ask(stub, tmp_path / "j.jsonl", comparisons(4))
        assert len(stub.asked) == 2
    assert found.failures == {} and found.preferences.tolist() == [0, 0, 0.5, 1]
