"""Tests of ``gpu_check`` without a GPU: a dry run of all parts, recorded failures, and workers that hang or die."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from bench import attentions, heads
from bench.gpu import attention as gpu_attention
from bench.gpu import check as gpu_check
from bench.gpu import head as gpu_head
from bench.gpu.check import Outcome, apart, check, parse, report
from bench.gpu.meter import Context, measure
from bench.gpu.parts import run_limited
from tests.helpers import ROOT


def tiny() -> Context:
    return Context("cpu", True, time.monotonic() + 60)


def test_dry_run(tmp_path, capsys):
    out = tmp_path / "found.json"
    code = gpu_check.main(["--dry-run", "--minutes", "2", "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())["gpu_check"]
    failed = [row for part in found["parts"].values() for row in part["rows"] if "failed" in row]
    assert code == 0 and not failed, failed
    summary = json.loads(lines[-1])
    assert summary["ok"] and summary["failed"] == [] and "ms" in summary["measured"]["head: trained, eager"]
    assert list(found["parts"]) == list(gpu_check.PARTS) and found["versions"]["torch"] == torch.__version__
    what = {row["what"] for part in found["parts"].values() for row in part["rows"]}
    assert {"sdpa: q != k", "head: frozen, eager", "vocab_score eager", "sdpa: P=C=2048"} <= what
    assert any(line.startswith("training") and "largest relative difference" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so(capsys):
    assert gpu_check.main([]) == gpu_check.NO_GPU == 2
    assert "needs a CUDA device" in capsys.readouterr().out


def test_unknown_parts(capsys):
    with pytest.raises(SystemExit):
        parse(["--parts", "head speed,nonsense"])
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
    assert set(found) == {f"head: {mode}, eager" for mode in ("frozen", "trained", "general")}


def test_an_unavailable_peer_is_one_row_with_the_reason(monkeypatch):
    monkeypatch.setattr(heads.importlib.util, "find_spec", lambda name: None)
    rows = {row["what"]: row["result"] for row in gpu_head.rows(tiny())}
    assert rows["head: trl"] == "trl is not installed" and rows["head: cce"] == "cuda only"


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
    text = report({"part": Outcome([row, {"what": "bad", "failed": "Traceback ...\nValueError: why\n"}], 1.0)})
    assert "long  skipped: no time left (3 s)" in text and "bad   FAILED: ValueError: why" in text
    assert "2 rows, 1 failed, 1 skipped" in text


def test_measure_on_a_cpu():
    calls = []
    found = measure(lambda: calls.append(1), tiny())
    assert len(calls) == 3 and found["rounds"] == 2 and found["low_ms"] <= found["ms"] <= found["high_ms"]


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_worker_without_a_gpu_records_the_failure():
    rows = apart("environment", 60.0)
    found = failures(rows)
    assert list(found) == ["gpu"] and "Traceback" in found["gpu"]
    assert rows[0]["what"] == "packages" and len(rows) > 5


def test_parts_share_the_time(monkeypatch):
    limits = {}

    def part(name, seconds):
        limits[name] = seconds
        return []

    monkeypatch.setattr(gpu_check, "apart", part)
    outcomes = check(parse(["--minutes", "8"]))
    assert list(outcomes) == list(gpu_check.PARTS)
    assert limits["environment"] == pytest.approx(20, abs=0.1)
    assert limits["training"] == pytest.approx(480, abs=0.5), "the last part gets the unused time"


def test_output_of_a_limited_command():
    assert run_limited([sys.executable, "-c", "import os; print(os.environ['HELLO'])"], 30, HELLO="you") == (0, "you\n")
    assert run_limited([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)[0] is None


@pytest.mark.parametrize("name", [["bench.gpu.check"], ["bench", "gpu_check"]], ids=" ".join)
def test_the_command_line(name):
    root = ROOT
    done = subprocess.run([sys.executable, "-m", *name, "--help"], cwd=root, capture_output=True, text=True, check=True)
    assert "--dry-run" in done.stdout and "--minutes" in done.stdout
