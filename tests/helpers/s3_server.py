"""A server of the S3 protocol (moto's) that fails now and then, for tests/test_s3.py; it logs its requests.

    python tests/helpers/s3_server.py PORT LOG SHARE

Of all requests, SHARE get an error: half of these before they are done, and half after, as if the answer were lost. The
errors are 500, 503 (SlowDown) and answers that are cut off or slow. A line of LOG is "METHOD status path?query".
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator

BUCKET = "bucket"
_SLOW = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_FAULT = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


class Unreliable:
    """Passes requests on to an app, except for some."""

    def __init__(self, app, log: str, share: float) -> None:
        self.app, self.share, self.draw = app, share, random.Random(0)
        self.log = open(log, "a", buffering=1)  # noqa: SIM115
        self.lock = threading.Lock()

    def __call__(self, environ, start_response) -> Iterable[bytes]:
        with self.lock:
            fault = self.draw.choice(["500", "503", "lost", "cut", "slow"]) if self.draw.random() < self.share else None
        statuses = []

        def start(status, headers, exc_info=None):
            statuses.append((status, headers))
            return lambda _: None

        if fault in ("500", "503"):
            body = [_FAULT if fault == "500" else _SLOW]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{fault} Error", [("Content-Type", "application/xml"), ("Content-Length", str(len(body[0])))])
        else:
            body = [*self.app(environ, start)]
            if fault == "lost":
                body = [_FAULT]
                start("500 Error", [("Content-Type", "application/xml"), ("Content-Length", str(len(_FAULT)))])
            elif fault in ("cut", "slow") and environ["REQUEST_METHOD"] == "GET":
                body = self._late(b"".join(body), fault == "cut")
        status, headers = statuses[-1]
        self.log.write(f"{environ['REQUEST_METHOD']} {status[:3]} {environ['PATH_INFO']}?{environ['QUERY_STRING']}\n")
        start_response(status, headers)
        return body

    def _late(self, body: bytes, cut: bool) -> Iterator[bytes]:
        """Sends half of a body, and the rest later or not at all; its announced length stays."""
        yield body[: len(body) // 2]
        if cut:
            raise ConnectionAbortedError
        time.sleep(0.5)
        yield body[len(body) // 2 :]


def main(port: int, log: str, share: float) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, run_simple

    class Quiet(WSGIRequestHandler):
        def log(self, *_) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except ConnectionError:
                self.close_connection = True

    app = Unreliable(DomainDispatcherApplication(create_backend_app), log, share)
    run_simple("127.0.0.1", port, app, threaded=True, request_handler=Quiet)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
