"""An OpenAI-compatible endpoint on 127.0.0.1 that fails on demand."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openai import _base_client

from cpt_kernels.generation import endpoint

# (prompt, n) -> the fault of the n-th try (from 0) for this prompt: a name in _FAULTS, or None to answer.
Plan = Callable[[str, int], str | None]


class StubEndpoint:
    """Context manager that runs the endpoint.

    Attributes:
        asked: bodies of all requests.
        tries: (prompt, seed) -> number of requests.
        delivered: (prompt, seed) -> number of replies with an answer.
    """

    def __init__(self, plan: Plan = lambda prompt, attempt: None, headers: dict[str, str] | None = None) -> None:
        self.plan, self.headers = plan, headers or {}
        self.lock = threading.Lock()
        self.asked: list[dict] = []
        self.keys: set[str | None] = set()
        self.tries: Counter = Counter()
        self.delivered: Counter = Counter()
        self.running = self.most_running = 0
        self.stopping = threading.Event()

    def __enter__(self) -> StubEndpoint:
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.stub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def prompts(self) -> list[str]:
        return [prompt_of(body) for body in self.asked]


def prompt_of(body: dict) -> str:
    content = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "image") for part in content)


def answer_to(prompt: str, seed: int | None) -> str:
    return f"an answer to {prompt} ({seed})"


def faults(kinds: Sequence[str | None]) -> Plan:
    """Returns a plan in which the n-th try of every prompt has the n-th fault, and later tries are answered."""
    return lambda prompt, attempt: kinds[attempt] if attempt < len(kinds) else None


def shorten_waits(monkeypatch) -> None:
    """Shortens the waits before retries, including those of the openai client."""
    monkeypatch.setattr(endpoint, "_FIRST_WAIT", 0.005)
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.005)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # the client was killed, or this endpoint closed the connection
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        stub: StubEndpoint = self.server.stub
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        identity = (prompt_of(body), body.get("seed"))
        with stub.lock:
            stub.asked.append(body)
            stub.keys.add(self.headers["authorization"])
            attempt = stub.tries[identity]
            stub.tries[identity] += 1
            stub.running += 1
            stub.most_running = max(stub.most_running, stub.running)
        try:
            fault = stub.plan(identity[0], attempt)
            if fault is not None:
                _FAULTS[fault](self)
                return
            self._send(200, self._reply(body, *identity))
            with stub.lock:
                stub.delivered[identity] += 1
        finally:
            with stub.lock:
                stub.running -= 1

    def _reply(self, body: dict, prompt: str, seed: int | None) -> dict:
        text = answer_to(prompt, seed)
        content = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split()), "total_tokens": 0}
        return {"id": "x", "choices": [{"index": 0, "finish_reason": "stop", **content}], "usage": usage}

    def _send(self, status: int, body: dict | str, kind: str = "application/json", cut: int = 0, **headers) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) - cut])
        if cut:
            self._drop()

    def _drop(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _answer(self, content: str | list | None, reason: str) -> None:
        self._send(200, {"choices": [{"message": {"content": content}, "finish_reason": reason}]})

    def _error(self, status: int, message: str, code: str | None = None, **headers) -> None:
        error = {"message": message, "type": "x", "code": code}
        self._send(status, {"error": error}, **headers, **(self.server.stub.headers if status == 429 else {}))


_FAULTS: dict[str, Callable[[_Handler], object]] = {
    "429": lambda http: http._error(429, "slow down"),
    "quota": lambda http: http._error(429, "no money left", "insufficient_quota"),
    "500": lambda http: http._error(500, "oh"),
    "503": lambda http: http._send(503, "<html>down</html>", "text/html"),
    "400": lambda http: http._error(400, "the prompt is too long"),
    "401": lambda http: http._error(401, f"wrong key {http.headers['authorization']}"),
    "404": lambda http: http._error(404, "no such model"),
    "drop": lambda http: http._drop(),
    "cut": lambda http: http._send(200, {"choices": [{"message": {"content": "half"}}]}, cut=10),
    "malformed": lambda http: http._send(200, '{"choices": [{"mess'),
    "no JSON": lambda http: http._send(200, "<html>hello</html>", "text/html"),
    "no choices": lambda http: http._send(200, {"error": {"message": "overloaded"}, "choices": None}),
    "odd choices": lambda http: http._send(200, {"choices": [{"message": None}]}),
    "filtered": lambda http: http._answer(None, "content_filter"),
    "empty": lambda http: http._answer("", "stop"),
    "thought too long": lambda http: http._answer(None, "length"),
    "only thoughts": lambda http: http._answer([{"type": "thinking", "text": "hm"}], "length"),
    "parts": lambda http: http._answer(
        [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        "stop",
    ),
    "detail": lambda http: http._send(400, {"detail": "the model is loading"}),
    "validation": lambda http: http._send(422, {"detail": [{"loc": ["body", "temperature"], "msg": "must be 1"}]}),
    "no top_p": lambda http: http._error(400, "`top_p` is not supported"),
    "hang": lambda http: http.server.stub.stopping.wait(30),
}
