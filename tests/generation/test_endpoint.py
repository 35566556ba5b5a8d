"""Tests of generation/endpoint.py: each prompt is answered once, whatever fails."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from itertools import pairwise
from types import SimpleNamespace

import pytest

from cpt_kernels.generation import endpoint as module
from cpt_kernels.generation.endpoint import Endpoint, EndpointOptions, _retry_after
from cpt_kernels.generation.prompts import Answer, Failure, Prompt, Request, Sampling
from tests.helpers.stub_endpoint import StubEndpoint, answer_to, faults, shorten_waits

CHAT = Sampling(chat=True)
RETRIED = ("429", "500", "503", "drop", "cut", "malformed", "no JSON", "no choices", "odd choices")


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    shorten_waits(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def requests(count: int, samples: int = 1) -> list[Request]:
    return [Request(Prompt(f"prompt {i}"), sample) for i in range(count) for sample in range(samples)]


def ask(stub: StubEndpoint, asked: list[Request], sampling: Sampling = CHAT, answered=(), **options) -> dict:
    results: dict[int, Answer | Failure] = {}

    def record(new):
        for index, result in new:
            assert index not in results, "recorded twice"
            results[index] = result

    Endpoint(EndpointOptions("m", stub.url, **options), sampling).answer(asked, record, answered)
    return results


def test_every_fault_is_overcome():
    asked = requests(12)
    with StubEndpoint(faults(RETRIED), headers={"retry-after-ms": "1"}) as stub:
        results = ask(stub, asked, max_retries=len(RETRIED))
    assert len(results) == 12
    for index, result in results.items():
        prompt, seed = asked[index].prompt.content, asked[index].seed(CHAT)
        assert result.text == answer_to(prompt, seed) and result.finish_reason == "stop"
        assert result.response_tokens == len(result.text.split())
        assert stub.tries[prompt, seed] == len(RETRIED) + 1 and stub.delivered[prompt, seed] == 1


@pytest.mark.parametrize("fault", RETRIED)
def test_too_many_faults_are_a_failure_with_its_reason(fault):
    with StubEndpoint(faults([fault] * 9)) as stub:
        (result,) = ask(stub, requests(1), max_retries=2).values()
    reasons = {"429": "HTTP 429", "500": "HTTP 500", "503": "HTTP 503", "drop": "connection", "cut": "connection"}
    assert isinstance(result, Failure) and result.reason == reasons.get(fault, "malformed reply")
    assert len(stub.asked) == 3


def test_a_hanging_endpoint_runs_into_the_timeout():
    with StubEndpoint(faults(["hang"])) as stub:
        (result,) = ask(stub, requests(1), timeout=1, max_retries=3).values()
        assert isinstance(result, Answer) and len(stub.asked) >= 2
    with StubEndpoint(faults(["hang"] * 2)) as stub:
        (result,) = ask(stub, requests(1), timeout=0.2, max_retries=1).values()
    assert result.reason == "timeout" and "timeout=0.2" in result.detail


def test_refusals_are_not_repeated():
    with StubEndpoint(lambda prompt, _: {"prompt 1": "400", "prompt 2": "filtered"}.get(prompt)) as stub:
        results = ask(stub, requests(4))
    assert results[1] == Failure("HTTP 400", "the prompt is too long")
    assert results[2].reason == "no text, content_filter"
    assert all(isinstance(results[i], Answer) for i in (0, 3)) and len(stub.asked) == 4


def test_answered_requests_are_not_sent():
    with StubEndpoint() as stub:
        results = ask(stub, requests(5), answered={0, 3})
    assert set(results) == {1, 2, 4} and sorted(stub.prompts()) == ["prompt 1", "prompt 2", "prompt 4"]


def test_what_is_sent():
    sampling = Sampling(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop=("END",), chat=True, system_prompt="Be brief."
    )
    asked = requests(1, samples=2)
    with StubEndpoint() as stub:
        ask(stub, asked, sampling, extra_body={"min_p": 0.1})
        ask(stub, requests(1), Sampling(temperature=0, seed=4))
        ask(stub, requests(1), Sampling(seed=None, chat=True), extra_body={"max_completion_tokens": 9})
    first, second, text, other = stub.asked
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "prompt 0"}]
    assert {first.pop("seed"), second.pop("seed")} == {request.seed(sampling) for request in asked}
    assert first == second
    assert first == {
        **{"model": "m", "messages": turns, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["END"]},
        **{"top_k": 3, "min_p": 0.1},
    }
    assert text == {"model": "m", "prompt": "prompt 0", "max_tokens": 512, "temperature": 0, "top_p": 1.0}
    with StubEndpoint() as stub:
        ask(stub, requests(1), Sampling(temperature=None, top_p=None, seed=None))
    assert stub.asked == [{"model": "m", "prompt": "prompt 0", "max_tokens": 512}]
    assert "seed" not in other and "max_tokens" not in other and other["max_completion_tokens"] == 9


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("filtered", "no text, content_filter", "finish_reason=content_filter"),
        ("empty", "no text, stop", "finish_reason=stop"),
        ("thought too long", "no text, length", "raise max_new_tokens"),
        ("only thoughts", "no text, length", "raise max_new_tokens"),
    ],
)
def test_empty_answers_are_failures(fault, reason, detail):
    with StubEndpoint(faults([fault])) as stub:
        (result,) = ask(stub, requests(1)).values()
        assert isinstance(result, Failure) and result.reason == reason and detail in result.detail
        (again,) = ask(stub, requests(1)).values()
    assert isinstance(again, Answer)


def test_content_as_parts_is_text():
    with StubEndpoint(faults(["parts"])) as stub:
        (result,) = ask(stub, requests(1)).values()
    assert result.text == "one two" and result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        ("detail", "the model is loading"),
        ("validation", "body.temperature: must be 1 (temperature=none leaves the field out of the request)"),
        ("no top_p", "`top_p` is not supported (top_p=none leaves the field out of the request)"),
    ],
)
def test_details_of_refusals(fault, detail):
    with StubEndpoint(lambda prompt, _: fault if prompt == "prompt 1" else None) as stub:
        results = ask(stub, requests(2))
    assert results[1].detail == detail and isinstance(results[0], Answer)


def test_messages_are_sent_without_the_nulls_of_arrow():
    turn = {"role": "user", "content": "hello", "tool_calls": None}
    with StubEndpoint() as stub:
        ask(stub, [Request(Prompt([turn]))])
    assert stub.asked[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_concurrency():
    with StubEndpoint(lambda *_: time.sleep(0.05)) as stub:
        ask(stub, requests(30), concurrency=3)
    assert 1 < stub.most_running <= 3


def test_requests_per_minute():
    started = time.monotonic()
    with StubEndpoint(faults(["500"])) as stub:
        ask(stub, requests(4), requests_per_minute=1200)
    assert len(stub.asked) == 8 and time.monotonic() - started >= 7 * 60 / 1200


def test_a_reply_that_asks_to_wait_delays_all_requests():
    """Without the common wait, the other requests would be sent immediately."""
    times = []

    def plan(prompt: str, attempt: int) -> str | None:
        times.append(time.monotonic())
        return "429" if prompt == "prompt 0" and attempt == 0 else None

    with StubEndpoint(plan, headers={"retry-after": "0.4"}) as stub:
        ask(stub, requests(6), concurrency=1)
        assert times[1] - times[0] >= 0.4
        times.clear()
        stub.tries.clear()
        ask(stub, requests(30), concurrency=2)
    times.sort()
    longest = max(after - before for before, after in pairwise(times))
    assert longest >= 0.3, "one of two workers sent a request during the wait"


def test_retries_of_the_client_and_after_malformed_replies_count_together():
    with StubEndpoint(faults(["500", "malformed", "429", "no choices", "500"])) as stub:
        (result,) = ask(stub, requests(1), max_retries=3).values()
        assert result.reason == "malformed reply" and len(stub.asked) == 4
    with StubEndpoint(faults(["500", "malformed", "429", "no choices", "500"])) as stub:
        (result,) = ask(stub, requests(1), max_retries=5).values()
        assert isinstance(result, Answer) and len(stub.asked) == 6


def test_a_wait_longer_than_the_client_accepts_is_honored(caplog):
    """The client refuses a Retry-After of more than two minutes, so our code removes the header and waits."""

    async def aread():
        return b""

    headers = {"retry-after": "300", "x": "y"}
    endpoint = Endpoint(EndpointOptions("m"), CHAT)
    asyncio.run(endpoint._after_try(SimpleNamespace(is_error=True, headers=headers, aread=aread)))
    assert 299 < endpoint._not_before - time.monotonic() <= 300 and headers == {"x": "y"}
    assert "asks for a wait of 300 s" in caplog.text


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"retry-after": "2"}, 2, 2),
        ({"retry-after": "1.5", "retry-after-ms": "20"}, 0.02, 0.02),
        ({"retry-after": formatdate(time.time() + 9000, usegmt=True)}, 2000, 9000),
        ({"retry-after": formatdate(time.time() - 9000, usegmt=True)}, 0, 0),
    ],
)
def test_retry_after(headers, low, high):
    assert low <= _retry_after(headers) <= high


@pytest.mark.parametrize("value", ["", "soon", "inf", "nan"])
def test_unreadable_retry_after(value):
    assert _retry_after({"retry-after": value}) is None


def test_a_wrong_key_stops_at_once_and_is_not_printed():
    with (
        StubEndpoint(faults(["401"])) as stub,
        pytest.raises(ValueError, match="refuses the key of OPENAI_API_KEY") as e,
    ):
        ask(stub, requests(50), concurrency=2)
    assert len(stub.asked) <= 4 and stub.keys == {"Bearer sk-of-the-tests"}
    assert "sk-of-the-tests" not in str(e.value) and "***" in str(e.value)


@pytest.mark.parametrize(("fault", "message"), [("404", "no model 'm'"), ("quota", "quota is used up")])
def test_errors_that_every_prompt_would_have_stop_at_once(fault, message):
    with StubEndpoint(faults([fault])) as stub, pytest.raises(ValueError, match=message):
        ask(stub, requests(50), concurrency=2)
    assert len(stub.asked) <= 4


def test_an_unreachable_endpoint_stops_the_run():
    with StubEndpoint(lambda prompt, _: None if prompt < "prompt 3" else "drop") as stub:
        with pytest.raises(ValueError, match="the last 20 requests to the endpoint failed, the last one by connection"):
            ask(stub, requests(300), max_retries=1, concurrency=4)
        assert len(stub.asked) < 250
    with pytest.raises(ValueError, match="the last 20 requests"):  # the stub has stopped
        ask(stub, requests(300), max_retries=0, concurrency=4)


def test_refused_options_stop_the_run_but_refused_prompts_do_not():
    with StubEndpoint(faults(["400"])) as stub, pytest.raises(ValueError, match="failed, the last one by HTTP 400"):
        ask(stub, requests(300))
    with StubEndpoint(lambda prompt, _: "400" if prompt != "prompt 0" else None) as stub:
        results = ask(stub, requests(60), concurrency=1)
    assert len(results) == 60 and sum(isinstance(result, Failure) for result in results.values()) == 59


def test_options():
    with pytest.raises(ValueError, match="concurrency=0 is too small"):
        EndpointOptions("m", concurrency=0)


def test_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="set OPENAI_API_KEY in the environment"):
        Endpoint(EndpointOptions("m"), CHAT)
    with StubEndpoint() as stub:  # a local server needs no key
        assert len(ask(stub, requests(1))) == 1
    monkeypatch.setenv("OTHER_KEY", "abc")
    with StubEndpoint() as stub:
        ask(stub, requests(1), api_key_env="OTHER_KEY")
    assert stub.keys == {"Bearer abc"}


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cpt-kernels\[openai\]'"):
        Endpoint(EndpointOptions("m"), CHAT)


def test_rows_with_tools_are_refused():
    with StubEndpoint() as stub:
        (result,) = ask(stub, [Request(Prompt("x", tools=[{"type": "function"}]))]).values()
    assert result.reason == "tools" and not stub.asked
