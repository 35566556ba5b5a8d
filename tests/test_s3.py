"""Object stores over the protocol of S3, with a server on this machine that fails now and then (`make test-stores`)."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cpt_kernels.data import stores
from cpt_kernels.reference import remote
from cpt_kernels.reference.cache import ReferenceCache
from tests.helpers import ROOT
from tests.helpers.s3_server import BUCKET
from tests.reference.test_cache import FINGERPRINT

pytest.importorskip("moto")
pytest.importorskip("s3fs")

SECRET = "a-secret-that-nobody-prints"
TOKENS, OBJECT_BYTES = 50, 32_000  # of a completion; of an object, so that uploads are frequent


@pytest.fixture
def serve(tmp_path, monkeypatch) -> Iterator[Callable[[float], Path]]:
    """Starts a server of which a share of all requests fails; returns the log of its requests."""
    servers = []

    def start(share: float) -> Path:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path / "requests.log"
        command = [sys.executable, str(ROOT / "tests/helpers/s3_server.py"), str(port), str(log), str(share)]
        servers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "someone"}
        for name, value in {**environment, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        deadline = time.time() + 60
        while time.time() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        in_child(lambda: stores.filesystem(f"s3://{BUCKET}")[0].mkdir(BUCKET))
        return log

    monkeypatch.setenv("CPT_LOCAL", str(tmp_path / "node"))
    yield start
    for server in servers:
        server.kill()
        server.wait()


def fork(function: Callable[[], object]) -> int:
    """Calls a function in a process of its own; the parent never opens a file system, whose threads do not survive."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        function()
        code = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def in_child(function: Callable[[], object]) -> None:
    assert os.waitpid(fork(function), 0)[1] == 0


def requests(log: Path) -> Counter[str]:
    """Counts requests that were answered by kind: listing, head, get, put of lists and of objects."""
    kinds = {r"GET 2.* .*\?.*list-type": "list", r"GET 2.*\.list\?": "get list", r"GET 2.*\.arrow\?": "get object"}
    kinds |= {r"PUT 2.*\.list\?": "put list", r"PUT 2.*\.arrow\?": "put object", "HEAD": "head"}
    found = ([kind for pattern, kind in kinds.items() if re.match(pattern, line)] for line in log.open())
    return Counter((*kind, "other")[0] for kind in found)


def values(seed: int) -> np.ndarray:
    return -np.random.default_rng(seed).random(TOKENS, dtype=np.float32)


def sequence(seed: int) -> tuple[list[int], list[int]]:
    return [seed], [*range(TOKENS)]


def score(url: str, node: Path, seeds: list[int], log: Path) -> None:
    """Scores the completions that are not stored yet, and writes each to a log before; one node's process."""
    os.environ["CPT_LOCAL"] = str(node)
    remote.OBJECT_BYTES = OBJECT_BYTES
    scored = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with ReferenceCache(url, FINGERPRINT, flush_seconds=0.1) as cache:
        for seed in seeds:
            if sequence(seed) not in cache:
                os.write(scored, f"{seed}\n".encode())
                time.sleep(0.006)
                cache.add(*sequence(seed), values(seed))


@pytest.mark.slow
def test_random_kills_of_writers_while_the_store_fails(serve, tmp_path):
    """Kills three writers 50 times; every second time the disk of its node is lost, too."""
    requests_log = serve(0.05)
    url, draw, writers, rows, kills = f"s3://{BUCKET}/cache", random.Random(0), 3, 6000, 0
    seeds = [list(range(writer * rows, (writer + 1) * rows)) for writer in range(writers)]
    nodes, logs = ([tmp_path / f"{kind}-{writer}" for writer in range(writers)] for kind in ("node", "scored"))
    start = lambda writer: fork(lambda: score(url, nodes[writer], seeds[writer], logs[writer]))  # noqa: E731
    running = {writer: start(writer) for writer in range(writers)}
    lost = 0
    while kills < 50:
        time.sleep(draw.uniform(0.2, 0.8))
        writer = draw.choice([*running])
        assert os.waitpid(running[writer], os.WNOHANG)[0] == 0, "a writer ended before 50 kills: give it more rows"
        os.kill(running[writer], signal.SIGKILL)
        os.waitpid(running[writer], 0)
        kills += 1
        if draw.random() < 0.5:
            shutil.rmtree(nodes[writer], ignore_errors=True)
            lost += 1
        running[writer] = start(writer)
    for process in running.values():
        assert os.waitpid(process, 0)[1] == 0

    def check() -> None:
        os.environ["CPT_LOCAL"] = str(tmp_path / "reader")
        cache = ReferenceCache(url, FINGERPRINT)
        for some in seeds:
            found, there = cache.look_up(cache.keys([sequence(seed) for seed in some]), [TOKENS] * rows)
            assert there.all()
            np.testing.assert_array_equal(found, np.concatenate([values(seed) for seed in some]))

    in_child(check)
    scored = Counter(line for log in logs for line in log.read_text().split())
    repeated = sum(scored.values()) - len(scored)
    an_object = OBJECT_BYTES / (4 * TOKENS + 24)
    print(f"{kills} kills, {lost} disks lost, {repeated} of {len(scored)} rows repeated, {an_object:.0f} an object")
    print(requests(requests_log), "failed:", sum(" 50" in line for line in requests_log.read_text().splitlines()))
    assert len(scored) == writers * rows
    assert repeated <= kills * an_object, "at most one upload's work for each kill"


def test_requests_are_those_of_the_plan(serve, tmp_path):
    """Four nodes with two objects each: two requests for an upload, one listing and two reads of what others wrote."""
    log = serve(0.0)
    url = f"s3://{BUCKET}/cache"

    def write(node: int) -> None:
        score(url, tmp_path / f"{node}", [*range(node * 130, (node + 1) * 130)], tmp_path / "scored")

    for node in range(4):
        in_child(lambda: write(node))  # noqa: B023
    counts = requests(log)
    objects = counts["put object"]
    assert counts["put list"] == objects and objects <= 8
    log.write_text("")

    def read() -> None:
        os.environ["CPT_LOCAL"] = str(tmp_path / "reader")
        cache = ReferenceCache(url, FINGERPRINT)
        cache.refresh()
        assert cache.num_rows == 520

    in_child(read)
    counts = requests(log)
    assert (counts["list"], counts["get list"], counts["get object"]) == (2, 4, objects), counts


def test_a_run_on_a_store_that_fails(serve, tmp_path, caplog):
    """Every tenth request fails; a run that stops resumes on another node with the losses of an undisturbed one."""
    serve(0.1)

    def run() -> None:
        from tests.helpers import toy
        from tests.training.test_output_store import Dying, make

        whole = toy.make_trainer(tmp_path / "whole", save_strategy="no", max_steps=8, **{"learning_rate": 1e-3})
        whole.train()
        options = {"loss_type": "sigmoid", "ref_cache_dir": f"s3://{BUCKET}/cache"}
        with pytest.raises(Dying.Death):
            make(f"s3://{BUCKET}/run", Dying, **options).train()
        os.environ["CPT_LOCAL"] = str(tmp_path / "other")
        trainer = make(f"s3://{BUCKET}/run", **options)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()
        assert toy.losses(trainer) == toy.losses(whole) and trainer.reference.scored == 0
        names = stores.list_files(f"s3://{BUCKET}/run")
        assert {"model.safetensors", "checkpoint-8/_complete.json"} <= names.keys() and "_owner.json" not in names

    in_child(run)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_messages_name_the_request_and_no_secret(serve, monkeypatch):
    serve(0.0)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    def refuse() -> None:
        with pytest.raises(stores.UserError, match=r"s3://no-such/x cannot be written .*bucket") as raised:
            stores.write_bytes("s3://no-such/x", b"")
        assert SECRET not in str(raised.value)
        os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        stores.filesystem("s3://x")[0].clear_instance_cache()
        with pytest.raises(stores.UserError, match="cannot be listed") as raised:
            stores.list_files(f"s3://{BUCKET}/x")
        assert SECRET not in str(raised.value)

    in_child(refuse)
