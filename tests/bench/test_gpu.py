"""Tests of ``gpu_check`` without a GPU: a dry run of all parts, recorded failures, and workers that hang or die."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import sysconfig
import threading
import time
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from bench import attentions, heads, timing
from bench.gpu import attention as gpu_attention
from bench.gpu import carry, meter, parts, steps
from bench.gpu import check as gpu_check
from bench.gpu import head as gpu_head
from bench.gpu.check import Outcome, Part, apart, check, parse, report, totals
from bench.gpu.meter import Context, DeviceTimer, measure
from bench.gpu.parts import run_limited
from tests import conftest
from tests.helpers import ROOT


def tiny() -> Context:
    return Context("cpu", True, time.monotonic() + 60)


def test_dry_run(tmp_path, capsys):
    out = tmp_path / "found.json"
    code = gpu_check.main(["--dry-run", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())["gpu_check"]
    failed = [row for part in found["parts"].values() for row in part["rows"] if "failed" in row]
    assert code == 0 and not failed, failed
    summary = json.loads(lines[-1])
    assert summary["ok"] and summary["failed"] == [] and "ms" in summary["measured"]["head: trained, eager, 1 GB"]
    assert list(found["parts"]) == list(gpu_check.PARTS) and found["versions"]["torch"] == torch.__version__
    what = {row["what"] for part in found["parts"].values() for row in part["rows"]}
    assert {"sdpa: q != k", "head: frozen, eager, 8 GB", "vocab_score eager, log-probs", "sdpa: P=C=2048"} <= what
    for contestant in ("default", "TRL, padded, SDPA", "no checkpointing"):
        assert {f"llama-1b: {contestant}", f"llama-8b, LoRA: {contestant}"} <= set(summary["measured"])
    assert "llama-1b: traced layers" in summary["measured"]
    (collected,) = (row["result"] for row in found["parts"]["tests"]["rows"])
    assert int(re.search(r"(\d+)(/\d+)? tests collected", collected)[1]) > 150
    assert any(line.startswith("training") and "largest relative difference" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so(capsys):
    assert gpu_check.main([]) == gpu_check.NO_GPU == 2
    assert "needs a CUDA device" in capsys.readouterr().out


def test_unknown_parts(capsys):
    with pytest.raises(SystemExit):
        parse(["--parts", "head,nonsense"])
    assert "['nonsense']" in capsys.readouterr().err


# --- Wrong results are found ---


def failures(rows) -> dict[str, str]:
    return {row["what"]: row["failed"] for row in rows if "failed" in row}


def test_a_wrong_attention_is_found(monkeypatch):
    own = gpu_attention.run

    def wrong(case, layout, leaves, upstream, backend, **options):
        out, dq, *rest = own(case, layout, leaves, upstream, backend, **options)
        return [out, dq * (1.5 if backend == "sdpa" else 1), *rest]

    monkeypatch.setattr(gpu_attention, "run", wrong)
    found = failures(gpu_attention.comparisons(tiny()))
    assert found and all("dq: error is" in text for text in found.values())


def test_an_attention_that_is_not_deterministic_is_found(monkeypatch):
    own, calls = gpu_attention.run, []

    def unsteady(case, layout, leaves, upstream, backend, **options):
        out, *grads = own(case, layout, leaves, upstream, backend, **options)
        calls.append(backend)
        out = out.contiguous()
        if backend == "sdpa":  # far below the tolerance
            out.view(-1)[out.abs().argmin()] = 1e-6 * calls.count("sdpa")
        return [out, *grads]

    monkeypatch.setattr(gpu_attention, "run", unsteady)
    assert any("differ" in text for text in failures(gpu_attention.comparisons(tiny())).values())


def test_a_fast_but_wrong_head_is_found(monkeypatch):
    own = heads.linear_preference_loss

    def wrong(*args):
        out = own(*args)
        return out._replace(loss=out.loss * 1.2)

    monkeypatch.setattr(heads, "linear_preference_loss", wrong)
    found = failures(gpu_head.rows(tiny()))
    assert set(found) == {
        f"head: {mode}, eager, {tile}" for mode in ("frozen", "trained", "general") for tile in ("1 GB", "8 GB")
    }


def test_an_unavailable_peer_is_one_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(heads.importlib.util, "find_spec", lambda name: None)
    rows = {row["what"]: row["result"] for row in gpu_head.rows(tiny())}
    assert rows["head: trl"] == "trl is not installed" and rows["head: cce"] == "cuda only"


def test_a_step_with_other_metrics_is_found():
    one = {"loss": 0.69, "logps/chosen": -50.0, "logps/rejected": -60.0}
    ours = [one] * (steps.WARM + steps.TIMED + 1)
    assert steps.differences(ours, ours) is None
    for other in ({"logps/chosen": -51.0}, {"loss": float("nan")}):
        found = steps.differences(ours, [one, one | other, *ours[2:]])
        assert found.startswith(f"step 2: {next(iter(other))} is ")
    assert steps.differences(ours, ours[1:]) == f"{len(ours) - 1} steps were logged, expected {len(ours)}"


def test_a_contestant_in_its_own_process(monkeypatch):
    """Processes start before their turn. One that fails is a failed row, and the next one has its turn."""
    real, seen = steps.Worker, []

    def worker(name, module, spec):
        seen.append(name)
        return real(name, module, spec | {"device": "cpu", **({"race": "none"} if name == "default" else {})})

    def product(*_):
        seen.append("product")
        return iter([])

    entries = {name: steps.FULL[name] for name in ("default", "no checkpointing")}
    monkeypatch.setitem(steps.RACES, "llama-1b", dataclasses.replace(steps.RACES["llama-1b"], entries=entries))
    monkeypatch.setattr(steps, "Worker", worker)
    monkeypatch.setattr(steps, "product_rate", product)
    monkeypatch.setattr(steps, "_AHEAD", 1)
    first, second = steps.full(Context("cuda", False, time.monotonic() + 300))
    assert seen == ["default", "product", "no checkpointing"]
    assert [row["what"] for row in (first, second)] == ["llama-1b: default", "llama-1b: no checkpointing"]
    assert "contestant 'default' ended" in first["failed"] and "KeyError" in first["failed"]
    assert second["ms"] > 0 and "not compared" in second["result"] and "failed" not in second


def test_a_contestant_that_hangs_is_killed():
    killed = threading.Event()

    def ask(message):
        if not killed.wait(20 if message == "run" else 0):
            pytest.fail("not killed")
        raise RuntimeError("contestant 'it' ended")

    worker = SimpleNamespace(ask=ask, process=SimpleNamespace(kill=killed.set))
    with pytest.raises(RuntimeError, match=r"ended\nkilled after 0 s"):
        steps._ask(worker, 0.05)
    with pytest.raises(RuntimeError) as raised:  # it ended by itself
        steps._ask(worker, 60.0)
    assert "killed" not in str(raised.value)


def test_the_flop_bound_of_sharing():
    assert attentions.attended([(2, [1, 3])], False) == 6 + 15
    assert attentions.attended([(2, [1, 3])], True) == 3 + (2 + 1) + (6 + 6)


# --- Rows ---


def test_a_failing_row_keeps_its_traceback_and_the_next_row_runs():
    context = tiny()

    def broken():
        raise ValueError("the reason")

    (row,) = context.attempt("it", broken)
    assert "ValueError: the reason" in row["failed"] and "in broken" in row["failed"]
    (row,) = context.attempt("it", lambda: {"result": "1 ms"})
    assert row == {"what": "it", "result": "1 ms"}


def test_a_peer_may_be_missing_and_may_run_out_of_memory():
    def missing():
        import nothing_of_that_name  # noqa: F401

    def too_large():
        raise torch.cuda.OutOfMemoryError("tried to allocate 99 GiB")

    context = tiny()
    assert [row["result"] for work in (missing, too_large) for row in context.attempt("peer", work, peer=True)] == [
        "not installed: nothing_of_that_name",
        "out of memory",
    ]
    assert all("failed" in row for work in (missing, too_large) for row in context.attempt("ours", work))


def test_a_row_without_time_left_is_skipped_and_reported():
    context = Context("cuda", False, time.monotonic() + 3)
    (row,) = context.attempt("long", lambda: pytest.fail("ran"), seconds=10)
    assert row["skipped"] == "no time left (3 s)"
    good = {"what": "good", "result": "1 ms", "profile": ["0.5 ms 50% mm"]}
    outcomes = {"part": Outcome([row, {"what": "bad", "failed": "Traceback ...\nValueError: why\n"}, good], 1.0)}
    expected = ["part  long  skipped: no time left (3 s)", "part  bad   FAILED: ValueError: why"]
    assert report(outcomes).splitlines() == [*expected, "part  good  1 ms", "    0.5 ms 50% mm"]
    text = totals(outcomes)  # says again what failed and what was skipped
    assert all(" ".join(line.split()) in " ".join(text.split()) for line in expected) and "good" not in text
    assert "3 rows, 1 failed, 1 skipped; part 1 s" in text


def test_measure_on_a_cpu():
    calls = []
    found = measure(lambda: calls.append(1), tiny())
    assert len(calls) == 3 and found["rounds"] == 2 and found["low_ms"] <= found["ms"] <= found["high_ms"]


class FakeCuda:
    """Records the order of launches. The host takes ``host`` seconds to issue a run."""

    def __init__(self, monkeypatch, host: float):
        self.calls, self.now, self.host = [], 0.0, host
        monkeypatch.setattr(meter, "_cache_buffer", lambda: SimpleNamespace(zero_=lambda: self.calls.append("evict")))
        monkeypatch.setattr(meter, "_cycles_per_second", lambda: 1e9)
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.calls.append(f"spin {cycles / 1e6:.1f} ms"))
        event = SimpleNamespace(record=lambda: self.calls.append("event"), synchronize=lambda: None)
        event.elapsed_time = lambda end: 3.0
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)

    def run(self) -> None:
        self.now += self.host
        self.calls.append("run")


def test_the_device_spins_until_the_host_has_issued_the_run(monkeypatch):
    cuda, timer = FakeCuda(monkeypatch, host=0.004), DeviceTimer()
    assert timer.seconds(cuda.run) == 0.003 and timer.host_seconds == pytest.approx(0.004)
    once = ["event", "run", "event"]
    assert cuda.calls == ["evict", "spin 0.2 ms", *once, "evict", "spin 8.0 ms", *once]
    cuda.calls.clear()
    assert timer.seconds(cuda.run) == 0.003 and cuda.calls == ["evict", "spin 8.0 ms", *once]
    cuda = FakeCuda(monkeypatch, host=9.0)  # the host waits for the device inside of the run
    assert DeviceTimer().seconds(cuda.run) == 0.003 and cuda.calls.count("run") == 2


# --- Parts ---


def test_a_broken_part_is_a_failed_row_and_the_exit_code_is_1(monkeypatch, capsys, tmp_path):
    """The handler in ``guarded`` catches any exception of a part. It must never hide one."""

    def broken(context):
        yield {"what": "first", "result": "1 ms"}
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(gpu_check, "PARTS", {name: Part("parts", name, 10) for name in ("broken", "sound")})
    monkeypatch.setattr(parts, "broken", broken, raising=False)
    out, written = tmp_path / "found.json", []

    def sound(context):
        written.append(out.exists() and "first" in out.read_text())  # by the part before
        yield {"what": "it", "result": "2 ms"}

    monkeypatch.setattr(parts, "sound", sound, raising=False)
    assert gpu_check.main(["--dry-run", "--parts", "broken,sound", "--json", str(out)]) == 1
    found = json.loads(out.read_text())["gpu_check"]
    assert found["failed"] == ["broken"] and found["ok"] is False
    first, failed = found["parts"]["broken"]["rows"]
    assert first["result"] == "1 ms" and "RuntimeError: the device is lost" in failed["failed"]
    assert found["parts"]["sound"]["rows"] == [{"what": "it", "result": "2 ms"}]
    assert "FAILED: RuntimeError: the device is lost" in capsys.readouterr().out
    assert gpu_check.main(["--dry-run", "--parts", "sound"]) == 0 and written == [True, True]


@pytest.mark.parametrize("breaks_at", ["start", "first part"])
def test_a_lost_device_leaves_the_summary_and_the_environment(monkeypatch, capsys, tmp_path, breaks_at):
    lost = [breaks_at == "start"]

    def name():
        if lost[0]:
            raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
        return "NVIDIA H200"

    def part(name, seconds, rows_file):
        lost[0] = True
        return [{"what": name, "failed": "RuntimeError: CUDA error"}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(gpu_check, "apart", part)
    out, whole = tmp_path / "found.json", []
    write = gpu_check.write_result
    monkeypatch.setattr(gpu_check, "write_result", lambda *given: whole.append(given[1]) or write(*given))
    timing.gpu_name.cache_clear()
    try:
        assert gpu_check.main(["--parts", "kernels,head", "--json", str(out)]) == 1
    finally:
        timing.gpu_name.cache_clear()
    found, summary = json.loads(out.read_text())["gpu_check"], json.loads(capsys.readouterr().out.splitlines()[-1])
    gpu = "not known: CUDA error: unspecified launch failure" if breaks_at == "start" else "NVIDIA H200"
    assert found["failed"] == summary["failed"] == ["kernels", "head"]
    assert [each["machine"]["gpu"] for each in (found, summary, *whole)] == [gpu] * 4
    assert found["versions"]["torch"] == torch.__version__


def test_markers_select_the_tests_that_need_a_gpu(monkeypatch):
    def collected(cuda: bool) -> list[set[str]]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        items = [FakeItem({"gpu"}), FakeItem({"device"}), FakeItem(set())]
        conftest.pytest_collection_modifyitems(items)
        return [item.names for item in items]

    class FakeItem:
        def __init__(self, names):
            self.names = names

        def get_closest_marker(self, name):
            return name if name in self.names else None

        def add_marker(self, marker):
            self.names.add(marker if isinstance(marker, str) else marker.name)

    assert collected(True) == [{"gpu"}, {"device", "gpu"}, set()]
    assert collected(False) == [{"gpu", "skip"}, {"device"}, set()]


def test_gpu_tests_run_in_one_pool(monkeypatch):
    commands = []

    def run(command, seconds, **environment):
        commands.append(command)
        return 1, "1 failed in 2 s"

    monkeypatch.setattr(parts, "run_limited", run)
    (row,) = parts.tests(Context("cuda", False, time.monotonic() + 60))
    assert "exit code 1: 1 failed" in row["failed"]
    (command,) = commands
    assert command[command.index("-m", 3) + 1] == "gpu" and "-n" in command and "--collect-only" not in command
    output = "[gw0] [ 1%] PASSED a.py::b \n[gw1] [ 2%] FAILED a.py::c \n"
    monkeypatch.setattr(parts, "run_limited", lambda *_, **__: (None, output))
    (row,) = parts.tests(Context("cuda", False, time.monotonic() + 60))
    assert "killed after 57 s: 1 PASSED, 1 FAILED, 0 SKIPPED" in row["failed"] and "FAILED a.py::c" in row["failed"]
    files = {"tests/ops/test_vocab_score.py", "tests/ops/head/test_backends.py", "tests/training/test_waiting.py"}
    assert files <= set(command) and not any(name.endswith("test_csrc.py") for name in command)


SANITIZER = """#!/bin/sh
case "$*" in
    *planted*) {planted};;
    *{broken}*) echo '========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'; exit 1;;
    *racecheck*) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)';;
    *synccheck*) {synccheck};;
    *) echo '========= ERROR SUMMARY: 0 errors';;
esac
"""


@pytest.mark.parametrize(
    ("options", "failed"),
    [
        ({}, set()),
        ({"broken": "racecheck"}, {"racecheck"}),
        ({"planted": "echo '========= ERROR SUMMARY: 0 errors'"}, {"memcheck, planted error"}),
        ({"synccheck": "echo 'Device not supported'"}, {"synccheck"}),
    ],
    ids=["clean", "hazards", "blind", "unsupported"],
)
def test_sanitizers(options, failed, monkeypatch, tmp_path):
    found = "echo '========= Invalid __global__ read of size 16 bytes'; exit 1"
    script = {"planted": found, "broken": "nothing", "synccheck": "echo '========= ERROR SUMMARY: 0 errors'"} | options
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(**script))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(parts, "has_extension", lambda: True)
    rows = list(parts.sanitizers(Context("cuda", False, time.monotonic() + 60)))
    assert [row["what"] for row in rows] == [*parts.TOOLS, "memcheck, planted error"]
    assert set(failures(rows)) == failed, rows
    monkeypatch.setattr(parts, "has_extension", lambda: False)
    (row,) = parts.sanitizers(Context("cuda", False, time.monotonic() + 60))
    assert row["skipped"] == "the CUDA kernels are not built"


def test_an_extension_that_is_not_built(monkeypatch):
    context = Context("cuda", False, time.monotonic() + 60)
    monkeypatch.setattr(parts, "has_extension", lambda: False)
    monkeypatch.setattr(parts, "find_nvcc", lambda: None)
    assert "nvcc is not found" in next(parts.extension(context))["skipped"]
    monkeypatch.setattr(parts, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(parts, "run_limited", lambda command, seconds, **_: (1, "error: no such thing"))
    assert "no such thing\nexit code 1" in next(parts.extension(context))["failed"]


# --- What is carried to a machine without package index ---


@pytest.fixture
def carried(monkeypatch, tmp_path):
    """Stands in for pip and nvcc: a package of 3 MiB, and an extension of 1 MiB."""
    calls = []

    def install(site, version):
        calls.append(version)
        site.mkdir()
        (site / "package.py").write_bytes(bytes(3 << 20))

    def build(python, suffix):
        path = tmp_path / f"_C{suffix}"
        path.write_bytes(bytes(1 << 20))
        return path

    monkeypatch.setattr(carry, "install", install)
    monkeypatch.setattr(carry, "build", build)
    monkeypatch.setattr(carry, "find_nvcc", lambda: "nvcc")
    return calls


def test_what_to_carry(carried, monkeypatch, tmp_path, capsys):
    site, python = tmp_path / "site", ["--python", sys.executable]
    assert carry.main([*python, "--site", str(site)]) == 0
    out = capsys.readouterr().out
    suffix, version = sysconfig.get_config_var("EXT_SUFFIX"), f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"{site}, {tmp_path / f'_C{suffix}'} (4.0 MiB)" in out and f"PYTHONPATH={site} python -m bench" in out
    assert carried == [version]
    site = tmp_path / "other"
    assert carry.main([*python, "--site", str(site), "--limit", "3.5"]) == 1
    assert "4.0 MiB are more than --limit 3.5" in capsys.readouterr().out
    monkeypatch.setattr(carry, "find_nvcc", lambda: None)
    assert carry.main([*python, "--site", str(tmp_path / "third")]) == 0
    out = capsys.readouterr().out
    assert "nvcc is not found; gpu_check compiles them there" in out and "(3.0 MiB)" in out


def test_a_python_that_is_not_here(carried, tmp_path, capsys):
    python = ["--python", str(tmp_path / "python3.12"), "--site", str(tmp_path / "site")]
    assert carry.main(python) == 2 and not carried
    assert "does not run here" in capsys.readouterr().out
    assert carry.main([*python, "--python-version", "3.12"]) == 0 and carried == ["3.12"]
    assert "that Python is not installed here" in capsys.readouterr().out
    assert carry.main(["--python", sys.executable, "--python-version", "2.7"]) == 2
    assert "change --python" in capsys.readouterr().out


def test_carried_packages_have_the_versions_of_the_constraints():
    wanted = carry.requirements()
    assert len(wanted) == len(carry.PACKAGES) and all("==" in one for one in wanted)
    assert f"trl=={metadata.version('trl')}" in wanted


# --- Workers ---


def script(text: str):
    """Returns a worker's command that runs ``text``, in which ``row(**values)`` writes a row."""
    prelude = "import json, os, sys, time\ndef row(**v): open(sys.argv[1], 'a').write(json.dumps(v) + '\\n')\n"
    return lambda name, seconds, path: [sys.executable, "-c", prelude + text, str(path)]


def test_a_worker_that_hangs_is_killed_and_its_rows_are_kept(tmp_path):
    mark = tmp_path / "mark"
    grandchild = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    text = "import subprocess\nrow(what='a', result='1 ms')\nprint('here')\nsys.stdout.flush()\n"
    text += f"subprocess.Popen([sys.executable, '-c', {grandchild!r}])\ntime.sleep(60)"
    started = time.monotonic()
    first, second = apart("part", 2.0, script(text))
    assert time.monotonic() - started < 10
    assert first == {"what": "a", "result": "1 ms"}
    assert second["failed"].startswith("killed after 2 s") and "here" in second["failed"]
    time.sleep(2)
    assert not mark.exists(), "a process that the worker started was not killed"


def test_a_worker_that_dies_is_recorded(tmp_path):
    first, second = apart("part", 20.0, script("row(what='a', result='1 ms')\nos.abort()"))
    assert first["what"] == "a" and "exit code -6" in second["failed"]
    (only,) = apart("part", 20.0, script("row(what='a', failed='why')\nsys.exit(1)"))
    assert only["failed"] == "why"
    (only,) = apart("part", 20.0, script("import nothing_of_that_name"))
    assert "ModuleNotFoundError" in only["failed"]


def test_rows_are_written_as_they_come_and_a_torn_one_is_left_out(tmp_path):
    rows = tmp_path / "found.json.rows"
    text = "row(what='a', result='1 ms')\nopen(sys.argv[1], 'a').write('{\"what\": \"b')"
    for _ in range(2):
        found = apart("part", 20.0, script(text), rows)
        assert found == [{"what": "a", "result": "1 ms"}]
    assert rows.read_text().splitlines() == [json.dumps(found[0]), '{"what": "b'] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_worker_without_a_gpu_records_the_failure():
    rows = apart("environment", 60.0)
    found = failures(rows)
    assert list(found) == ["gpu"] and "Traceback" in found["gpu"]
    assert rows[0]["what"] == "packages" and len(rows) > 5


def test_parts_share_the_time(monkeypatch):
    limits = {}

    def part(name, seconds, rows_file):
        limits[name] = seconds
        return []

    monkeypatch.setattr(gpu_check, "apart", part)
    outcomes = check(parse(["--minutes", "9"]))
    assert list(outcomes) == list(gpu_check.PARTS) and sum(part.seconds for part in gpu_check.PARTS.values()) == 540
    assert limits["environment"] == pytest.approx(12, abs=0.1)
    assert limits["training"] == pytest.approx(540, abs=0.5), "the last part gets the unused time"


def test_output_of_a_limited_command():
    assert run_limited([sys.executable, "-c", "import os; print(os.environ['HELLO'])"], 30, HELLO="you") == (0, "you\n")
    assert run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)[0] is None


def test_the_command_line():
    command = [sys.executable, "-m", "bench", "gpu_check", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--dry-run" in done.stdout and "--minutes" in done.stdout
