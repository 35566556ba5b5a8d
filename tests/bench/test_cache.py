"""Tests of the benchmarks of the reference cache at small sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from bench import __main__ as command_line
from bench import cache
from tests.helpers import ROOT


@pytest.fixture
def bench(capsys, monkeypatch):
    """Runs ``python -m bench ...`` in this process, and gives the JSON of its last line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that it starts

    def run(*arguments: str) -> dict:
        assert command_line.main([*arguments]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills(kills):
    # The benchmark forks, so it has a process of its own.
    command = [sys.executable, "-m", "bench", "crash", "--kills", str(kills), "--prompts", str(20 * kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills and result["problems"] == [] and result["largest_difference"] <= 1e-5
    assert result["completions"] == 80 * kills and result["repeated"] < result["scored"] / 2


def test_quick_speed(bench, tmp_path):
    bench("cache", "--quick", "--stores", "Ours,SQLite", "--json", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())["cache"]
    assert result["large"]["Ours"]["peak_anonymous_mb"] < 100
    assert result["stores"]["Ours"]["lookups_per_cpu_s"] > result["stores"]["SQLite"]["lookups_per_cpu_s"]
    assert 0 < result["step"]["share_of_step"] < 0.1


@pytest.mark.parametrize("store", ["LMDB", "ArrowColumn", "TrlColumns"])
def test_other_stores(tmp_path, store):
    if store == "LMDB":
        pytest.importorskip("lmdb")
    assert cache.fill(store, str(tmp_path), "0", "2000", "10")["fill_mb_per_s"] > 0
    assert cache.read(store, str(tmp_path), "2000", "10", rounds=2, batches=2)["lookups_per_s"] > 0


def test_fingerprint(bench):
    result = bench("fingerprint", "--gb", "0.1")
    assert result["gb"] == pytest.approx(0.1, rel=0.2)


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the peer is not installed: pip install trl==1.16.0"
)
def test_reference_pass(bench, tmp_path):
    rows = [
        {"prompt_id": f"p{p}", "prompt": f"prompt number {p}", "model": f"m{m}", "response": f"answer {m} to it " * 4}
        for p in range(3)
        for m in range(4)
    ]
    rows.append(rows[0] | {"model": "m4"})  # repeats a response
    data, out = tmp_path / "responses.jsonl", tmp_path / "result.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    options = ("--quick", "--contestants", "ours,trl", "--data", str(data), "--json", str(out))
    summary = bench("reference_pass", *options)
    assert summary["largest_difference"] < 1e-3 and summary["ratio_trl"] > 0 and summary["predicted_ratio_trl"] > 1
    measured = json.loads(out.read_text())["reference_pass"]["measured"]
    for name, counts in (("trl", (36, 36)), ("ours", (12, 3))):
        assert (measured[name][0]["completions"], measured[name][0]["prompts"]) == counts
