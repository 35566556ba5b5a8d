"""Tests of ``cpt eval``: printed and written results of every command, and error messages."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from cpt_kernels import cli
from cpt_kernels.cli.evaluate import main
from tests.helpers import ROOT, stub_endpoint
from tests.helpers.command import bpe_tokenizer, run, word_pairs, write_model, write_rows
from tests.helpers.stub_endpoint import StubEndpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models trained by SFT and then DPO, and held-out pairs whose responses name their models."""
    home = tmp_path_factory.mktemp("evaluate")
    pairs = [
        {**row, "chosen_model": "strong", "rejected_model": "weak" if i % 3 else "middle"}
        for i, row in enumerate(word_pairs(36))
    ]
    write_model(home / "start", bpe_tokenizer(row[side] for row in pairs for side in ("prompt", "chosen", "rejected")))
    write_rows(home / "train.jsonl", pairs[:16])
    write_rows(home / "held_out.jsonl", pairs[16:])
    common = ["--dataset_name", home / "train.jsonl", "--use_cpu", "--disable_tqdm", "--ref_cache_dir", home / "cache"]
    common += ["--max_steps", 4, "--learning_rate", "1e-2", "--no_gradient_checkpointing", "--beta", 0.2]
    sft = ["--model_name_or_path", home / "start", "--from_scratch", "--loss_type", "sft", "--output_dir", home / "sft"]
    assert run(*sft, *common) == 0
    dpo = ["--model_name_or_path", home / "sft", "--output_dir", home / "dpo", "--eval_dataset_name"]
    assert run(*dpo, home / "held_out.jsonl", *common) == 0
    return home


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def evaluate(*argv) -> None:
    main([str(arg) for arg in argv])


def test_pairs(home, capsys, caplog):
    evaluate("pairs", "--models", home / "sft", home / "dpo", "--data", home / "held_out.jsonl", "--details", "d.jsonl")
    out = capsys.readouterr().out
    assert re.search(r"reward accuracy, % +50\.0 \[50\.0, 50\.0\] +\d+\.\d \[", out)
    assert "By model pair" in out and "strong > middle" in out and "By chosen tokens" in out
    assert "sft equals the reference" in out and "dpo minus sft, on the same prompts: accuracy " in out
    assert f"rewards against {home / 'sft'}, beta 0.2" in out and "20 of 20 rows kept" in out
    # Training cached the reference log-probs of these pairs in its evaluation.
    assert "all 40 reference log-probs were cached" in caplog.text
    results = json.loads(Path("runs/eval/pairs.json").read_text())
    assert results["settings"]["beta"] == 0.2 and results["settings"]["models"]["dpo"] == str(home / "dpo")
    (whole,) = [row for row in results["summary"] if row["model"] == "dpo" and row["by"] == "all pairs"]
    logged = [json.loads(line) for line in (home / "dpo" / "metrics.jsonl").read_text().splitlines()]
    logged = next(record for record in reversed(logged) if "eval_loss" in record)
    for metric in ("rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert whole[metric]["mean"] == pytest.approx(logged[f"eval_{metric}"], abs=1e-4)
    rows = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and {row["row"] for row in rows} == set(range(20))
    of_dpo = [row["rewards/margins"] for row in rows if row["model"] == "dpo"]
    assert np.mean(of_dpo) == pytest.approx(whole["rewards/margins"]["mean"])
    assert Path("runs/eval/pairs.png").stat().st_size > 10_000
    ElementTree.parse("runs/eval/pairs.svg")


def test_two_ranks_give_the_results_of_one(home):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    argv = ["eval", "pairs", "--models", home / "sft", home / "dpo", "--data", home / "held_out.jsonl", "--drift"]
    Path("plain.txt").write_text("w1 w2 w3 w4 w5")
    argv += ["--text", "plain.txt"]
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, "-m", "cpt_kernels.cli", *argv, "--ref_cache_dir", "two", "--output_dir", "two"],
        **{"env": os.environ | paths, "capture_output": True, "text": True, "timeout": 240},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("By model pair") == 1, "only one rank prints"
    assert re.search(r"Against the reference, on \d+ tokens of responses[^A]+KL[^A]+ sft +0.0000 \[", done.stdout)
    main([*map(str, argv), "--ref_cache_dir", "one", "--output_dir", "one"][1:])
    found = [json.loads(Path(folder, "pairs.json").read_text()) for folder in ("two", "one")]
    two, one = ([*each["summary"], *each["drift"]] for each in found)
    assert [(row["model"], row["on"]) for row in one[-4:]] == [
        (m, on) for on in ("responses", "text") for m in ("sft", "dpo")
    ]
    assert len(two) == len(one) > 5
    for ours, theirs in zip(two, one):
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, dict) else value)


def test_pairs_without_a_reference(home, capsys):
    evaluate(
        *("pairs", "--models", f"one={home / 'sft'}", "--data", home / "held_out.jsonl", "--reference", "none"),
        *("--by", "rejected_model", "--output_dir", "out", "--details", "d.parquet", "--resamples", 20),
    )
    out = capsys.readouterr().out
    assert "rewards from log-probs alone, without a reference" in out and "By rejected_model" in out
    table = pq.read_table("d.parquet").to_pandas()
    assert set(table["model"]) == {"one"} and set(table["rejected_model"]) == {"weak", "middle"}
    assert (table["rewards/chosen"] - 0.2 * table["logps/chosen"]).abs().max() < 1e-9
    assert "ref_logps/chosen" not in table.columns
    assert Path("out/pairs.json").exists()


def outputs(path: Path, model: str, texts: list[str]) -> Path:
    return write_rows(path, [{"prompt": f"p{i}", "model": model, "response": text} for i, text in enumerate(texts)])


def write_outputs() -> list[str]:
    """Writes outputs of the models a, b and c; a has no output for p9."""
    outputs(Path("a.jsonl"), "a", ["x" * (2 + i % 3) for i in range(9)])
    outputs(Path("b.jsonl"), "b", ["y" * (1 + i % 5) for i in range(10)])
    outputs(Path("c.jsonl"), "c", ["zzz"] * 10)
    Path("judges.py").write_text(
        "def longer(prompt, a, b):\n    return 0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b)))\n"
    )
    return ["win-rate", "--outputs", "a.jsonl", "b.jsonl", "--baseline", "c.jsonl"]


def test_win_rate_by_a_function(capsys):
    evaluate(*write_outputs(), "--judge", "judges:longer", "--both_orders", "--details", "d.jsonl")
    out = capsys.readouterr().out
    assert "Against c" in out and re.search(r"a +50\.0 \[", out) and re.search(r"b +50\.0 \[", out)
    assert "a: 1 prompts were left out because a did not answer them" in out
    assert "preferred the first position in 50.0%" in out and "b minus a, on the same prompts: win rate " in out
    assert "arXiv 2404.04475" in out and "the prior 1 +- 0.1 instead (--length_prior)" in out
    assert re.search(r"length effect in log-odds: a 1\.\d\d \(\d+\.\d\d without a prior\), b 1\.", out)
    results = json.loads(Path("runs/eval/win_rate.json").read_text())
    assert [(row["model"], row["wins"], row["ties"], row["losses"]) for row in results["models"]] == [
        ("a", 3, 3, 3),
        ("b", 4, 2, 4),
    ]
    rows = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()]
    assert len(rows) == 19 and rows[0]["preference"] == 0.0
    assert Path("runs/eval/win_rate.png").stat().st_size > 5_000 and Path("runs/eval/win_rate.svg").exists()


def test_length_prior(capsys):
    argv = [*write_outputs(), "--models", "a", "--judge", "judges:longer"]
    found = {}
    for mean in ("-1", "2.5"):
        evaluate(*argv, "--length_prior", mean, "0.01")
        results = json.loads(Path("runs/eval/win_rate.json").read_text())
        assert results["settings"]["length_prior"] == {"mean": float(mean), "sd": 0.01}
        found[mean] = results["models"][0]["length_controlled"]
        assert found[mean]["length_effect"] == pytest.approx(float(mean), abs=0.01)
    assert found["-1"]["length_effect_without_prior"] == found["2.5"]["length_effect_without_prior"] > 3


def test_win_rate_by_an_endpoint(capsys, monkeypatch):
    monkeypatch.setattr(stub_endpoint, "answer_to", lambda question, seed: "[[1]]" if "p3" not in question else "Hm.")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests")
    argv = [*write_outputs(), "--models", "a", "--judge_model", "judge", "--base_url"]
    with StubEndpoint() as stub:
        evaluate(*argv, stub.url)
        asked = len(stub.asked)
        evaluate(*argv, stub.url)
        assert len(stub.asked) == asked == len(Path("runs/eval/judged.jsonl").read_text().splitlines()) == 18
    out = capsys.readouterr().out
    assert (
        "1 comparisons have no verdict and are left out of the rates (missing answers: 2 by no verdict in the reply)"
        in out
    )
    assert "preferred the first position in 100.0%" in out and "same verdict in both orders in 0.0%" in out


def test_length_control_is_not_identified_if_all_outputs_are_longer(capsys):
    write_outputs()
    outputs(Path("long.jsonl"), "long", ["xxxx"] * 10)
    evaluate("win-rate", "--outputs", "long.jsonl", "--baseline", "c.jsonl", "--judge", "judges:longer")
    out = capsys.readouterr().out
    assert "not identified" in out and "all its outputs are longer than the baseline's" in out


def test_export(capsys):
    write_outputs()
    evaluate("export", "--outputs", "a.jsonl", "--to", "model_outputs.json")
    assert "9 outputs of a written to model_outputs.json" in capsys.readouterr().out
    assert json.loads(Path("model_outputs.json").read_text())[1] == {
        "instruction": "p1",
        "output": "xxx",
        "generator": "a",
    }
    evaluate("win-rate", "--outputs", "model_outputs.json", "--baseline", "c.jsonl", "--judge", "judges:longer")


def test_one_file_of_several_models(capsys):
    write_outputs()
    Path("all.jsonl").write_text("".join(Path(f"{name}.jsonl").read_text() for name in "abc"))
    base = ["win-rate", "--outputs", "all.jsonl", "--baseline", "all.jsonl", "--judge", "judges:longer"]
    evaluate(*base, "--baseline_model", "b")
    assert [row["model"] for row in json.loads(Path("runs/eval/win_rate.json").read_text())["models"]] == ["a", "c"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["judge"], "invalid choice"),
        (["pairs", "--models", "./none", "--data", "d"], "models=./none: there is no such folder"),
        (["pairs", "--models", "org/none", "--data", "d"], "no training_config.yaml beside org/none"),
        (["pairs", "--models", "DPO", "--data", "HELD", "--learning_rate", "1"], "unknown option --learning_rate"),
        (["pairs", "--models", "DPO", "--data", "none.jsonl"], "none.jsonl does not exist"),
        (["pairs", "--models", "DPO", "--data", "HELD", "--by", "topic"], "by names the column 'topic'"),
        (["pairs", "--models", "DPO", "--data", "HELD", "--ratio_edges", "2", "1"], "must increase"),
        (["pairs", "--models", "DPO", "--data", "HELD", "--details", "d.csv"], "details=d.csv: expected a .jsonl or"),
        (["pairs", "--models", "DPO", "START", "--data", "HELD"], "models=.*start cannot be loaded"),
        (["win-rate", "WIN"], "one of the arguments --judge --judge_model is required"),
        (["win-rate", "WIN", "--judge", "judges:no"], "judges has no no"),
        (
            ["win-rate", "WIN", "--judge", "judges:longer", "--timeout", "3"],
            "timeout has no effect with a Python function",
        ),
        (["win-rate", "WIN", "--judge", "judges:longer", "--models", "d"], "models=d: the file has outputs of a, b"),
        (["win-rate", "WIN", "--judge", "judges:longer", "--baseline_model", "d"], "baseline_model=d"),
        (
            ["win-rate", "WIN", "--judge", "judges:longer", "--confidence", "95"],
            "confidence=95.0 must lie between 0 and 1",
        ),
        (["win-rate", "WIN", "--judge", "judges:longer", "--length_prior", "1", "0"], "length_prior=1.0 0.0: expected"),
        (["win-rate", "WIN", "--judge_model", "gpt", "--timeout", "0"], "timeout=0.0 is too small"),
        (["win-rate", "WIN", "--judge", "judges:longer", "--output_dir", "a.jsonl"], "output_dir=a.jsonl cannot be"),
        (
            ["win-rate", "WIN", "--judge_model", "gpt", "--judge_file", "j.jsonl", "--extra_body", "[1]"],
            "no.* JSON object",
        ),
        (["win-rate", "WIN", "--judge", "judges:longer", "--judgee", "x"], "unknown option --judgee"),
        (["export", "--outputs", "a.jsonl", "--model", "b", "--to", "x"], "model=b: the file has outputs of a"),
    ],
)
def test_mistakes_are_one_line(home, capsys, argv, message):
    files = write_outputs()[1:]
    places = {
        "DPO": [str(home / "dpo")],
        "START": [str(home / "start")],
        "HELD": [str(home / "held_out.jsonl")],
        "WIN": files,
    }
    argv = [part for arg in argv for part in places.get(arg, [arg])]
    assert cli.main(["eval", *argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt eval: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines


def test_no_common_prompt(capsys):
    write_outputs()
    outputs(Path("other.jsonl"), "other", ["x"])
    Path("other.jsonl").write_text(Path("other.jsonl").read_text().replace("p0", "q0"))
    argv = ["win-rate", "--outputs", "other.jsonl", "--baseline", "c.jsonl", "--judge", "judges:longer"]
    assert cli.main(["eval", *argv]) == 2
    assert "no prompt of other is among those of c" in capsys.readouterr().err
