"""Tests of all benchmarks at toy size: each prints its table and ends with one line of JSON."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import __main__ as command_line
from bench import attention, attentions, head, heads, readme, step, timing
from bench.lengths import checked, draw_groups, preference_rows
from bench.shapes import SHAPES, Shape
from bench.trainers import build_model
from cpt_kernels.planning.work import packed, padded
from tests.helpers import ROOT


@pytest.fixture
def bench(capsys, monkeypatch):
    """Runs ``python -m bench ...`` in this process. Gives the printed text and the JSON of the last line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that it starts: more would slow down other tests

    def run(*arguments: object) -> tuple[str, dict]:
        assert command_line.main(list(map(str, arguments))) == 0
        *text, last = capsys.readouterr().out.rstrip().splitlines()
        result = json.loads(last)
        assert {"machine", "versions", "commit"} <= set(result)
        return "\n".join(text), result

    return run


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="the peer is not installed: pip install trl==1.16.0"
)
def test_step(bench, tmp_path) -> None:
    out = tmp_path / "result.json"
    text, result = bench("step", "--quick", "--peers", "trl,ours-padded", "--json", out)
    for word in ("ours", "trl", "s/step", "quartiles", "peak MiB", "predicted"):
        assert word in text
    assert result["ratio_trl"] > 0 and result["memory_ratio_trl"] > 0 and result["predicted_ratio_trl"] > 1
    assert result["predicted_ratio_trl"] > result["predicted_ratio_ours_padded"] > 1
    assert result["max_loss_difference"] < 1e-4 and result["max_margin_difference"] < 1e-3
    saved = json.loads(out.read_text())["step"]
    assert len(saved["measured"]["trl"]["metrics"]) == saved["options"]["steps"]
    assert plotted(out, tmp_path) == ["step.png", "step.svg"]


def test_head(bench, tmp_path) -> None:
    out = tmp_path / "result.json"
    text, result = bench("head", "--quick", "--modes", "trained,score", "--peers", "eager,liger-ce", "--json", out)
    for word in ("x best peer", "of floor", "GFLOP/s", "liger-ce: not run, cuda only", "one matrix of logits: 8 MiB"):
        assert word in text
    assert result["growth"]["4096"]["trained"] < 0.5 < result["growth"]["4096"]["eager"]
    assert result["memory_ratio"]["4096"]["1024"]["trained"]["eager"] < 0.5
    assert set(result["speed_ratio"]["4096"]["1024"]["trained"]) == {"eager"}
    assert set(result["speed_ratio"]["4096"]["1024"]["score"]) == {"eager-score"}
    saved = json.loads(out.read_text())["head"]
    assert "| trained |" in readme.head(saved) and "Not run: liger-ce: cuda only" in readme.head(saved)
    found = saved["measured"]["4096"]["512"]
    assert found["trained"]["floor_s"] > found["score"]["floor_s"] > 0
    assert plotted(out, tmp_path) == ["head.png", "head.svg"]


def test_a_head_too_small_to_see_its_memory_has_no_ratio() -> None:
    found = {name: {"mib": 0.0, "seconds": {"median": 1.0}} for name in ("trained", "eager")}
    assert head.ratios(list(found), {"64": {"2": found}}, "memory") == {"64": {"2": {"trained": {"eager": None}}}}


def test_head_takes_the_vocabulary_of_a_shape_and_completions_that_fit(capsys) -> None:
    options = head.parse(["--shape", "llama-8b", "--tokens", "48,16"])
    assert (options.hidden, options.vocab, options.tokens) == (4096, [128256], [16, 48])
    assert head.parse(["--shape", "qwen-3b", "--hidden", "64"]).hidden == 64
    assert [head.completion_of(n, 64) for n in (16, 48, 1024, 2, 126)] == [8, 24, 64, 1, 63]
    for arguments, message in (["--tokens", "7"], "must be even"), (["--peers", "nobody"], "unknown peers"):
        with pytest.raises(SystemExit):
            head.parse(arguments)
        assert message in capsys.readouterr().err


def test_a_wrong_head_is_found() -> None:
    problem = heads.Problem.make(32, 16, 50, 4, "cpu", torch.float32)
    expected = problem.expected()
    for name, contestant in heads.contestants().items():
        if contestant.absent("cpu") or contestant.compiles:
            continue
        hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
        loss = contestant.build(problem)(hidden, weight)
        loss.backward()
        found = {"loss": loss.item(), **heads.norms(hidden.grad, weight.grad)}
        assert heads.disagreement(found, expected[contestant.kind], half=False) is None, name
        wrong = {**found, "dW": 1.01 * found["dW"]}
        assert "dW is" in heads.disagreement(wrong, expected[contestant.kind], half=False)


def test_attention(bench, tmp_path) -> None:
    out = tmp_path / "result.json"
    text, result = bench("attention", "--quick", "--backends", "sdpa", "--peers", "separate", "--json", out)
    for word in ("x ours", "of floor", "14 Hq D A", "1 prompt of 32, completions 9,1,5: forward and backward"):
        assert word in text
    assert result["ratio"]["1 32 2x16"]["forward"]["ours-sdpa"] == 1
    separate = 2 * 48 * 49 / 2 / (32 * 33 / 2 + 2 * (32 * 16 + 16 * 17 / 2))
    assert result["predicted_ratio"]["1 32 2x16"]["separate"] == pytest.approx(separate, abs=1e-3)
    assert plotted(out, tmp_path) == ["attention.png", "attention.svg"]
    assert "separate / ours (by pairs)" in readme.attention(json.loads(out.read_text())["attention"])
    assert "flex" in attention.parse([]).peers


def test_a_wrong_attention_is_found() -> None:
    groups, case = [(5, [3, 1]), (1, [4])], attentions.Case(4, 2, 16, dtype=torch.float32)
    found = {"reference": {"results": attention.expected(groups, case, "cpu")}}
    for name in ("ours-sdpa", "ours-eager", "separate", "dense"):
        contestant = attention.AttentionRun(groups, case, {"device": "cpu", "name": name, "backward": True})
        contestant.run()
        found[name] = {"results": contestant.results()}
    attention.check(found, "float32")
    contestant.found[1] = contestant.found[1].flip(0)  # flipping keeps the norm of dq
    with pytest.raises(RuntimeError, match="'dense' computes wrong results: dq"):
        attention.check({**found, "dense": {"results": contestant.results()}}, "float32")


def test_packing(bench) -> None:
    table, result = bench("packing", "--quick", "--lengths", "hh", "--rows", "60")
    assert "imbalance" in table
    assert result["pads"] == 0 and 0.5 < result["fill"] <= 1
    assert 0 <= result["imbalance_mean"] <= result["imbalance_worst"] < 1


def test_scaling(bench, tmp_path) -> None:
    out = tmp_path / "result.json"
    table, result = bench("scaling", "--quick", "--peers", "ours-unshared", "--json", out)
    for word in ("ranks", "ours-unshared", "of floor"):
        assert word in table
    assert result["ratios"]["ranks"]["ours-unshared"]["2"] > 0
    # With 3 completions, a shared prompt runs once, and an unshared one three times.
    point = json.loads(out.read_text())["scaling"]["axes"]["ranks"]["2"]
    assert point["ours"]["tokens"] < point["ours-unshared"]["tokens"]
    assert point["ours"]["gflop"] < point["ours-unshared"]["gflop"]
    assert plotted(out, tmp_path) == ["scaling.png", "scaling.svg"]


def test_suite_runs_what_it_can_and_names_the_rest(bench, tmp_path) -> None:
    out = tmp_path / "result.json"
    text, result = bench("suite", "--quick", "--subjects", "packing,tokenize,gpu_check", "--json", out)
    assert result["ok"] and set(json.loads(out.read_text())) == {"packing"}
    assert "### python -m bench packing --quick" in text
    assert re.search(r"tokenize +skipped: needs --data", text) and re.search(r"gpu_check +not on cpu", text)
    assert (tmp_path / "packing.svg").exists()


def plotted(result: Path, folder: Path) -> list[str]:
    from bench import plot

    plot.main([str(result), "--out", str(folder / "pictures")])
    return sorted(path.name for path in (folder / "pictures").iterdir())


def test_a_result_of_an_older_form_is_named_and_the_others_are_drawn(tmp_path, capsys) -> None:
    recorded = ROOT / "bench/results/amd-epyc-2-cores/2026-11-23-6feaec2e11.json"
    assert plotted(recorded, tmp_path) == ["packing.png", "packing.svg", "step.png", "step.svg"]
    assert f"head is not drawn: {recorded} lacks its field 'trained'" in capsys.readouterr().out


def test_usage_and_unknown_subject() -> None:
    for arguments, code in (([], 0), (["nothing"], 2)):
        done = subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and "usage" in done.stdout


def test_a_failing_worker_shows_its_error() -> None:
    contestant = timing.Worker("nobody", "bench.trainers", {"side": "nobody"})
    with pytest.raises(RuntimeError, match="KeyError: 'steps'"):
        contestant.ask("step")
    contestant.close()


def test_results_of_subjects_share_a_file(tmp_path) -> None:
    path = tmp_path / "machine" / "day.json"
    for subject, value in (("step", 1), ("head", 2), ("step", 3)):
        timing.write_result(subject, {"value": value}, path)
    assert json.loads(path.read_text()) == {"step": {"value": 3}, "head": {"value": 2}}
    assert timing.result_path().parent.parent == timing.RESULTS


def test_summary_is_median_and_quartiles() -> None:
    assert timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert timing.summarize([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}


def test_work_of_a_step_counted_by_hand() -> None:
    pairs = [([1, 2, 3], [4, 5], [6]), ([7], [8], [1, 2, 3, 4])]  # prompt, chosen, rejected
    ours = packed(pairs)
    assert ours.tokens == (3 + 2 + 1) + (1 + 1 + 4)
    assert ours.attended == (5 * 6 // 2 + 1 * 3 + 1) + (2 * 3 // 2 + 4 * 1 + 4 * 5 // 2)
    assert (ours.head_rows, ours.head_gemms) == (8, 3)
    assert packed(pairs, share_prompts=False).tokens == ours.tokens + 3 + 1
    assert packed(pairs, share_prompts=False).attended == (15 + 10) + (3 + 15)
    trl = padded(pairs, completion_rows_only=False)
    assert (trl.tokens, trl.attended, trl.head_rows, trl.head_gemms) == (4 * 5, 4 * 15, 4 * 4, 4)
    assert padded(pairs, completion_rows_only=True).head_rows == 8
    # Each completion is in two pairs and runs once.
    three = [([1, 2], a, b) for a, b in combinations(([3], [4, 5], [6, 7, 8]), 2)]
    assert packed(three).tokens == 2 + 1 + 2 + 3 and packed(three).head_rows == 1 + 2 + 3
    assert padded(three, True).tokens == 6 * 5 and padded(three, True).head_rows == 2 * (1 + 2 + 3)
    shape = Shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10)
    assert shape.layer_parameters == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    flops = ours.flops(shape)
    assert flops["layers"] == 6 * shape.layer_parameters * ours.tokens
    assert flops["attention"] == 14 * 2 * 8 * ours.attended
    assert flops["head"] == 2 * 8 * 8 * 10 * 3
    assert flops["total"] == flops["layers"] + flops["attention"] + flops["head"]
    frozen = ours.flops(shape, gradient_checkpointing=True, adapters=True)
    assert frozen["layers"] == flops["layers"] and frozen["attention"] == 18 * 2 * 8 * ours.attended
    assert frozen["head"] == 2 * 8 * 8 * 10 * 2


def test_a_shape_counts_the_models_parameters_and_fits_layers_into_memory() -> None:
    shape = SHAPES["small"]
    matrices = sum(p.numel() for p in build_model(shape).parameters() if p.ndim == 2)
    assert shape.parameters == matrices
    assert shape.fitted(1e9) == shape
    assert shape.fitted(shape.parameters - 1).layers == shape.layers - 1
    with pytest.raises(ValueError, match="smaller --shape"):
        shape.fitted(shape.hidden * shape.vocab)


def test_lengths_of_presets_of_the_table_and_of_a_file(tmp_path) -> None:
    rows = preference_rows("ultrafeedback", 6, vocab=100, completions=3)
    assert len(rows) == 6 * 3 and len({tuple(row["prompt_ids"]) for row in rows}) == 6
    assert rows[0]["rejected_ids"] == rows[2]["chosen_ids"]  # pairs (1, 2), (1, 3), (2, 3)
    assert max(max(ids) for row in rows for ids in row.values()) < 100
    every = draw_groups("responses", 300, 2, np.random.default_rng(0))
    # Few prompts share their lengths, so this many distinct ones show that no prompt is drawn twice.
    assert len({(prompt, *sides) for prompt, sides in every}) > 290
    assert draw_groups("uniform:5:7", 2, 3, None) == [(5, [7, 7, 7])] * 2
    path = tmp_path / "pairs.jsonl"
    words = "the quick brown fox jumps over the lazy dog"
    path.write_text("\n".join(json.dumps({"prompt": words, "model": m, "response": r * 9}) for m, r in ("ab", "cd")))
    ((prompt, sides),) = draw_groups(str(path), 1, 2, np.random.default_rng(0))
    assert prompt > 0 and len(sides) == 2
    table = checked(str(path), 2, tmp_path)
    assert Path(table).name == "pairs.csv" and draw_groups(table, 1, 2, np.random.default_rng(0)) == [(prompt, sides)]
    assert checked("hh", 2, tmp_path) == "hh"
    with pytest.raises(ValueError, match="no prompt has 3"):
        draw_groups(str(path), 1, 3, np.random.default_rng(0))
    path.write_text(json.dumps({"text": words}))
    with pytest.raises(ValueError, match="row 1: needs prompt with"):
        draw_groups(str(path), 1, 2, None)
    with pytest.raises(ValueError, match="no preset and no file"):
        draw_groups("nothing", 1, 2, None)
    with pytest.raises(ValueError, match="must be uniform:P:C"):
        draw_groups("uniform:5", 1, 2, None)
    with pytest.raises(SystemExit, match="bench step: error: --lengths nothing: no preset and no file"):
        step.main(["--lengths", "nothing"])


def test_predicted_memory_is_measured(tmp_path):
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "plan_memory", "--quick", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "predicted / measured" in done.stdout and json.loads(done.stdout.splitlines()[-1])["within_bound"]
    assert 0.85 < json.loads(out.read_text())["plan_memory"]["settings"]["quick"]["ratio"] < 1.15
