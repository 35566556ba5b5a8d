"""What does the reference cache ask of an object store, and what does its index take of a node's memory?

    PYTHONPATH=.venv/stores python -m bench stores          # after `make test-stores`

A server of the S3 protocol (moto's) on this machine holds the cache. Requests are counted at the server. Three parts:

- Writers: processes with local folders of their own add completions of 200 tokens; requests per upload and per reader.
- Look-ups: of completions whose values are local, and of those whose values stay on the store (one range for each
  prompt group of two).
- Memory: four processes of one node open ten million completions (of one token, in a local cache); the memory that
  opening adds to each, as the kernel counts it: private, and shared divided by its users (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cpt_kernels.data import stores
from cpt_kernels.reference import remote
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.shards import Rows, write_shard

from .cache import BATCH, FINGERPRINT, sequence, values
from .timing import add_output_options, finish, table

BUCKET, TOKENS, PROCESSES = "bucket", 200, 4
_KINDS = {
    "listings": r"GET 2.*list-type",
    "lists read": r"GET 2.*\.list\?",
    "objects or ranges read": r"GET 2.*\.arrow\?",
    "objects written": r"PUT 2.*\.arrow\?",
    "lists written": r"PUT 2.*\.list\?",
}


def counts(log: Path) -> dict[str, int]:
    """Returns the requests by kind since the last call."""
    lines = log.read_text().splitlines()
    log.write_text("")
    found = Counter(
        next((kind for kind, pattern in _KINDS.items() if re.match(pattern, line)), "others") for line in lines
    )
    return {kind: found[kind] for kind in (*_KINDS, "others")}


def write(url: str, writer: int, rows: int) -> None:
    """Adds completions of one writer."""
    with ReferenceCache(url, FINGERPRINT, flush_seconds=1e9) as cache:
        for start in range(writer * rows, (writer + 1) * rows, BATCH):
            some = range(start, min(start + BATCH, (writer + 1) * rows))
            cache.add_many([sequence(row, TOKENS) for row in some], [values(row, TOKENS) for row in some])


def read(url: str, rows: int, groups: int) -> dict[str, Any]:
    """Opens the cache and looks up random groups of two neighbors; returns seconds and look-ups per second."""
    started = time.perf_counter()
    cache = ReferenceCache(url, FINGERPRINT)
    opened = time.perf_counter() - started
    draw = np.random.default_rng(0)
    started, cpu = time.perf_counter(), time.process_time()
    for group in draw.integers(0, rows // 2, groups).tolist():
        pair = [2 * group, 2 * group + 1]
        found, _ = cache.look_up(cache.keys([sequence(row, TOKENS) for row in pair]), [TOKENS] * 2)
        assert np.array_equal(found, np.concatenate([values(row, TOKENS) for row in pair]))
    seconds = time.perf_counter() - started
    heads = [*cache.folder.glob("*.head")]
    return {
        "opened_s": opened,
        "lookups_per_s": 2 * groups / seconds,
        "lookups_per_cpu_s": 2 * groups / (time.process_time() - cpu),
        "local_bytes": sum(512 * path.stat().st_blocks for path in (heads or cache.folder.glob("*.arrow"))),
    }


def memory() -> dict[str, int]:
    """Returns the memory of this process in KB: PSS, and what is private."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split()[0].rstrip(":"): int(line.split()[1]) for line in lines}
    return {"pss": kilobytes["Pss"], "private": kilobytes["Private_Dirty"] + kilobytes["Private_Clean"]}


def open_many(folder: str, ready: Path, rows: int) -> dict[str, Any]:
    """Opens a cache, waits until all processes have, and returns what it took."""
    before, started = memory(), time.process_time()
    cache = ReferenceCache(folder, FINGERPRINT)
    seconds = time.process_time() - started
    draw = np.random.default_rng(os.getpid()).integers(0, rows, 20_000).tolist()
    started = time.process_time()
    for start in range(0, len(draw), BATCH):
        some = [sequence(row, 1) for row in draw[start : start + BATCH]]
        assert cache.look_up(cache.keys(some), [1] * len(some))[1].all()
    per_second = len(draw) / (time.process_time() - started)
    (ready / str(os.getpid())).touch()
    while len([*ready.iterdir()]) < PROCESSES:
        time.sleep(0.1)
    after = memory()
    time.sleep(5)  # while the others count
    mapped = len(cache._indexes[0].rows)
    grown = {f"{name}_mb": (after[name] - before[name]) / 1e3 for name in after}
    return {**grown, "open_cpu_s": seconds, "lookups_per_cpu_s": per_second, "mapped_rows": mapped}


def fill_many(folder: Path, rows: int) -> None:
    """Writes shards of one-token completions."""
    cache = ReferenceCache(folder, FINGERPRINT)
    cache.folder.mkdir(parents=True)
    size = 80_000  # about as many rows as an object of 64 MB has
    for start in range(0, rows, size):
        some = [sequence(row, 1) for row in range(start, min(start + size, rows))]
        shard = Rows()
        shard.add(cache.keys(some), [values(row, 1) for row in range(start, start + len(some))])
        with (cache.folder / f"{start:032x}.arrow").open("xb") as file:
            write_shard(file, shard, FINGERPRINT)


def call(function: str, node: Path, *arguments: object) -> subprocess.Popen:
    """Starts a function of this file in a process of a node."""
    command = [sys.executable, "-m", "bench.stores", "--call", function, *map(str, arguments)]
    environment = {**os.environ, "CPT_LOCAL": str(node)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> Any:
    """Returns what the function returned."""
    output, _ = process.communicate()
    assert process.returncode == 0, process.args
    return json.loads(output.splitlines()[-1])


def serve(log: Path) -> subprocess.Popen:
    """Starts a server without faults, and makes the bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "tests/helpers/s3_server.py"), str(port), str(log), "0"],
        stderr=subprocess.DEVNULL,
    )
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something"}
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.2)
    stores.filesystem(f"s3://{BUCKET}")[0].mkdir(BUCKET)
    return server


def main(arguments: list[str]) -> None:
    """Runs the three parts."""
    if arguments[:1] == ["--call"]:
        function, *given = arguments[1:]
        print(json.dumps(globals()[function](*(int(text) if text.isdecimal() else _path(text) for text in given))))
        return
    parser = argparse.ArgumentParser(prog="python -m bench stores", description=__doc__)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200_000, help="completions of a writer [%(default)s]")
    parser.add_argument("--many", type=int, default=10_000_000, help="completions of the index [%(default)s]")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    folder, url = Path(tempfile.mkdtemp(prefix="bench-stores-")), f"s3://{BUCKET}/cache"
    server = serve(folder / "log")
    try:
        # Writers, one after another, so that each sees what the earlier ones have uploaded.
        requests: dict[str, dict[str, int]] = {}
        counts(folder / "log")
        for writer in range(args.writers):
            result(call("write", folder / f"node{writer}", url, writer, args.rows))
            requests[f"writer {writer + 1}"] = counts(folder / "log")
        rows = args.writers * args.rows
        reads = {"local": result(call("read", folder / "reader", url, rows, 20_000))}
        requests["reader, values local"] = counts(folder / "log")
        os.environ["BENCH_FULL_DISK"] = "1"
        reads["ranges"] = result(call("read", folder / "small", url, rows, 1000))
        requests["reader, 1000 groups by range"] = counts(folder / "log")
        # Memory of a node's processes; the first of them writes the index.
        fill_many(folder / "many", args.many)
        (folder / "ready").mkdir()
        processes = [
            call("open_many", folder / "node", folder / "many", folder / "ready", args.many) for _ in range(PROCESSES)
        ]
        opened = [result(process) for process in processes]
    finally:
        server.kill()
        shutil.rmtree(folder)
    print(
        table(["requests", *next(iter(requests.values()))], [[who, *found.values()] for who, found in requests.items()])
    )
    print(table(["process", *opened[0]], [[i, *(f"{v:.4g}" for v in each.values())] for i, each in enumerate(opened)]))
    summary = {f"{name}_{key}": value for name, found in reads.items() for key, value in found.items()}
    summary["index_pss_mb"] = sum(each["pss_mb"] for each in opened)
    finish("stores", {"requests": requests, "reads": reads, "memory": opened}, summary, args)


def _path(text: str) -> Any:
    return Path(text) if text.startswith("/") else text


if __name__ == "__main__":
    if os.environ.get("BENCH_FULL_DISK"):
        remote.shutil.disk_usage = lambda _: argparse.Namespace(free=0)  # type: ignore[attr-defined]
    main(sys.argv[1:])
