"""The cache's benchmarks run, at the sizes of continuous integration, and find nothing wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def bench(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ten_kills():
    result = bench("crash", "--kills", "10", "--prompts", "100")
    assert result["kills"] == 10 and result["problems"] == [] and result["largest_difference"] <= 1e-5


def test_quick_speed():
    result = bench("cache", "--quick", "--rows", "20000")
    assert result["Ours of 200000"]["peak_anonymous_mb"] < 100
    assert result["Ours"]["lookups_per_cpu_s"] > result["SQLite"]["lookups_per_cpu_s"]


def test_reference_pass(tmp_path):
    rows = [
        {"prompt_id": f"p{p}", "prompt": f"prompt number {p}", "model": f"m{m}", "response": f"answer {m} to it " * 4}
        for p in range(3)
        for m in range(4)
    ]
    data = tmp_path / "responses.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    result = bench("reference_pass", "--data", str(data))
    assert (result["trl"]["completions"], result["trl"]["prompts"]) == (36, 36)
    assert (result["ours"]["completions"], result["ours"]["prompts"]) == (12, 3)
