"""``cpt difficulty``: scores against independent runs, resuming, cheap scorers, folds, and wrong inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cpt_kernels import cli
from cpt_kernels.cli import difficulty as command
from cpt_kernels.evaluation.difficulty import spearman, split_folds
from tests.helpers.command import bpe_tokenizer, run, word_pairs, write_model, write_rows

TRAINING = ("--learning_rate", "1e-2", "--beta", "0.5", "--use_cpu", "--disable_tqdm", "--seed", "7")
ROWS = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, and pairs of which two share a prompt and one, row 5, cannot be trained on."""
    home = tmp_path_factory.mktemp("difficulty")
    rows = [row | {"gap": i % 3 - 1.5, "id": f"row {i}"} for i, row in enumerate(word_pairs(ROWS))]
    rows[3]["prompt"] = rows[2]["prompt"]
    rows[5]["rejected"] = rows[5]["chosen"]
    tokenizer = bpe_tokenizer(text for row in rows for text in (row["chosen"], row["rejected"]))
    write_model(home / "start", tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / "start")).save_pretrained(home / "start")
    write_rows(home / "pairs.jsonl", rows)
    return home


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(command, "_CALIBRATION", 0.0)


def difficulty(home: Path, output: Path, *argv: str) -> list[dict]:
    given = ["difficulty", str(home / "start"), str(home / "pairs.jsonl"), "--output", str(output), *argv]
    assert cli.main([*given, *TRAINING, "--ref_cache_dir", str(home / "ref")]) == 0
    return [json.loads(line) for line in output.open(encoding="utf-8")]


def logps(folder: Path, rows: list[dict]) -> np.ndarray:
    """Returns (rows, 2, 2) log-probs and tokens of chosen and rejected by the model's plain forward."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"])["input_ids"]
            both = tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                tokens = model(torch.tensor([both])).logits[0, :-1].double().log_softmax(-1)
            own = tokens.gather(1, torch.tensor(both)[1:, None])[len(prompt) - 1 :, 0]
            found.append((float(own.sum()), len(own)))
    return np.array(found).reshape(-1, 2, 2)


def test_scores_are_held_out_losses_of_runs_on_the_other_folds(home, tmp_path, capsys):
    rows = difficulty(home, tmp_path / "scored.jsonl", "--folds", "2", "--seeds", "2")
    given = [json.loads(line) for line in (home / "pairs.jsonl").open(encoding="utf-8")]
    assert [{name: row[name] for name in given[0]} for row in rows] == given
    scores = np.array([np.nan if row.get("difficulty") is None else row["difficulty"] for row in rows])
    assert np.flatnonzero(np.isnan(scores)).tolist() == [5] and rows[5].get("difficulty_std") is None
    shown = capsys.readouterr().out
    assert "2 folds x 2 seeds: 4 runs, 0 done" in shown and "15 of 16 rows scored" in shown
    assert "s; 4 runs: " in shown and "Spearman correlation of two seeds" in shown
    files = sorted((tmp_path / "scored.difficulty").iterdir())
    assert [file.name.split("-seed-")[1] for file in files] == [
        f"{seed}-fold-{fold}-of-2.npz" for seed in (7, 8) for fold in (1, 2)
    ]
    # Each seed holds out every pair once, and never trains on its prompt.
    by_seed = np.full((2, ROWS), np.nan)
    start = logps(home / "start", given)[..., 0]
    for number, file in enumerate(files):
        stored = np.load(file)
        margins = np.diff(stored["logps"] - start[stored["rows"]])[:, 0]
        assert np.isnan(by_seed[number // 2, stored["rows"]]).all()
        by_seed[number // 2, stored["rows"]] = F.softplus(torch.from_numpy(0.5 * margins)).numpy()
        assert ({2, 3} <= {*stored["rows"].tolist()}) or not {2, 3} & {*stored["rows"].tolist()}
    scored = ~np.isnan(scores)
    np.testing.assert_allclose(by_seed.mean(0)[scored], scores[scored], atol=1e-5)
    spread = [row["difficulty_std"] for row in rows if row.get("difficulty_std") is not None]
    np.testing.assert_allclose(by_seed[:, scored].std(0, ddof=1), spread, atol=1e-5)
    # The first run is cpt-train on the other fold.
    held_out = np.load(files[0])["rows"]
    others = [row for i, row in enumerate(given) if i not in held_out]
    write_rows(tmp_path / "others.jsonl", others)
    model = ("--model_name_or_path", home / "start", "--dataset_name", tmp_path / "others.jsonl")
    assert run(*model, *TRAINING, "--output_dir", tmp_path / "run", "--ref_cache_dir", home / "ref") == 0
    expected = logps(tmp_path / "run", [given[row] for row in held_out])[..., 0]
    np.testing.assert_allclose(np.load(files[0])["logps"], expected, atol=1e-3)
    assert abs(expected - start[held_out]).max() > 0.1


def test_runs_under_autocast(home, tmp_path):
    """The trained model is scored without the autocast that accelerate puts around its forward in training."""
    rows = difficulty(home, tmp_path / "scored.jsonl", "--seeds", "1", "--max_steps", "1", "--bf16")
    assert sum(row.get("difficulty") is not None for row in rows) == 15


def test_a_stopped_command_continues_and_other_options_begin_anew(home, tmp_path, monkeypatch):
    done, own_run = [], command.CrossFit._run

    def counted(self, file, *arguments):
        if len(done) == 1:
            raise KeyboardInterrupt
        own_run(self, file, *arguments)
        done.append(file.name)

    options = ("--seeds", "1", "--measure", "margin")
    whole = difficulty(home, tmp_path / "whole.jsonl", *options)
    monkeypatch.setattr(command.CrossFit, "_run", counted)
    given = ["difficulty", str(home / "start"), str(home / "pairs.jsonl"), "--output", str(tmp_path / "new.jsonl")]
    given += [*options, *TRAINING, "--ref_cache_dir", str(home / "ref")]
    assert cli.main(given) == 130 and not (tmp_path / "new.jsonl").exists()
    monkeypatch.setattr(command.CrossFit, "_run", own_run)
    trained = []
    monkeypatch.setattr(command.CrossFit, "_run", lambda *args: (trained.append(args[1].name), own_run(*args)))
    assert difficulty(home, tmp_path / "new.jsonl", *options) == whole and len(trained) == 1
    # Another measure needs no run; another learning rate needs all.
    difficulty(home, tmp_path / "new.jsonl", "--seeds", "1", "--measure", "reference-free")
    assert len(trained) == 1
    difficulty(home, tmp_path / "new.jsonl", *options, "--lr_scheduler_type", "constant")
    assert len(trained) == 3


def test_scorers_that_train_nothing(home, tmp_path):
    given = [json.loads(line) for line in (home / "pairs.jsonl").open(encoding="utf-8")]
    values, tokens = np.moveaxis(logps(home / "start", given), -1, 0)
    expected = {
        "reference-margin": values[:, 1] - values[:, 0],
        "log-ratio": values[:, 1] / tokens[:, 1] - values[:, 0] / tokens[:, 0],
        "gap": [-row["gap"] for row in given],
    }
    for scorer, scores in expected.items():
        rows = difficulty(home, tmp_path / "scored.jsonl", "--scorer", scorer)
        found = [row["difficulty"] for i, row in enumerate(rows) if i != 5]
        np.testing.assert_allclose(found, np.delete(scores, 5), atol=1e-4)
        assert "difficulty_std" not in rows[0] and not (tmp_path / "scored.difficulty").exists()


def test_rows_of_several_pairs_become_a_row_for_each(home, tmp_path):
    pairs = [json.loads(line) for line in (home / "pairs.jsonl").open(encoding="utf-8")][:2]
    paths = [
        {"prompt": row["prompt"], "paths": [[row["rejected"]], [row["chosen"]]], "pairs": [[1, 0]]} for row in pairs
    ]
    write_rows(tmp_path / "paths.jsonl", [paths[0] | {"pairs": [[1, 0], [0, 1]]}, paths[1]])
    argv = ["--output", str(tmp_path / "scored.jsonl"), "--scorer", "reference-margin", "--use_cpu"]
    assert cli.main(["difficulty", str(home / "start"), str(tmp_path / "paths.jsonl"), *argv]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").open(encoding="utf-8")]
    values = logps(home / "start", pairs)[..., 0]
    expected = [values[0, 1] - values[0, 0], values[0, 0] - values[0, 1], values[1, 1] - values[1, 0]]
    np.testing.assert_allclose([row["difficulty"] for row in rows], expected, atol=1e-4)


def test_folds_hold_whole_prompts():
    prompts = np.random.default_rng(0).integers(0, 40, 200).astype(np.uint64)
    folds = split_folds(prompts, 3, 5)
    assert all(len(np.unique(folds[prompts == prompt])) == 1 for prompt in np.unique(prompts))
    of_prompt = [folds[prompts == prompt][0] for prompt in np.unique(prompts)]
    assert np.ptp(np.bincount(of_prompt)) <= 1
    assert (split_folds(prompts, 3, 6) != folds).any() and (split_folds(prompts, 3, 5) == folds).all()
    with pytest.raises(ValueError, match="folds=3 needs as many different prompts, but the data has 2"):
        split_folds(np.array([1, 1, 2], np.uint64), 3, 0)


def test_rank_correlation():
    value, low, high = spearman(np.array([1.0, 2, 2, 4, 5]), np.array([1.0, 3, 2, 4, 5]))
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([1, 3, 2, 4, 5])
    assert value == pytest.approx(np.corrcoef(*ranks)[0, 1]) and low < value < high
    rng = np.random.default_rng(0)  # the interval covers the true value, 6 / pi arcsin(0.3), as often as it says
    draws = (rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 100).T for _ in range(1000))
    covered = [low <= 6 / np.pi * np.arcsin(0.3) <= high for _, low, high in (spearman(*both) for both in draws)]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--output", "scored.csv"), "--output scored.csv: its name must end in .jsonl or .parquet"),
        (("--folds", "1"), "--folds: 1 is not a number of folds: give a whole number, 2 or more"),
        (("--seeds", "0"), "--seeds: 0 is not a number of seeds"),
        (("--folds", "16"), "folds=16 needs as many different prompts, but the data has 14"),
        (("--scorer", "gap", "--folds", "3"), "--folds has no effect with --scorer gap"),
        (("--scorer", "gap", "--dataset_name", "ranked.jsonl"), "the data has no column gap"),
        (("--scorer", "gap", "--dataset_name", "words.jsonl"), "gap of row 1 is 'wide', not a number"),
        (("--curriculum", '{"levels": 2}'), "curriculum has no meaning for cpt difficulty"),
        (("--num_processes", "2"), "unknown option --num_processes"),
        (("--loss_type", "sft"), "loss 'sft' needs more than the log-probs of single pairs: set --measure margin"),
        (("--loss_type", "aot"), "loss 'aot' needs more than the log-probs of single pairs"),
        (("--dataset_name", "scored.jsonl"), "scored.jsonl has a column difficulty already"),
        (("--dataset_name", "ranked.jsonl"), "row 1 has several pairs, so its difficulty is not one number"),
    ],
)
def test_wrong_inputs_are_one_clear_error(home, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (home / "pairs.jsonl").open(encoding="utf-8")]
    write_rows(tmp_path / "scored.jsonl", [row | {"difficulty": 1.0} for row in rows])
    write_rows(tmp_path / "words.jsonl", [rows[0], rows[1] | {"gap": "wide"}])
    ranked = [{"prompt": "the sky", "completions": [" is", " or", " with"][: 2 + i]} for i in range(2)]
    write_rows(tmp_path / "ranked.jsonl", ranked)
    data = () if "--dataset_name" in argv else ("--dataset_name", str(home / "pairs.jsonl"))
    given = ["--model_name_or_path", str(home / "start"), *data, "--output", "out.jsonl", *argv, *TRAINING]
    assert cli.main(["difficulty", *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out.jsonl").exists()
