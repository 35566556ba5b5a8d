"""Tests of ``cpt study``: its arms are runs of cpt-train, a stopped study continues bit by bit, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from cpt_kernels.cli import main
from cpt_kernels.cli.study import make_arms
from cpt_kernels.config import ContrastiveConfig
from cpt_kernels.data.sources import load_data
from cpt_kernels.demo.quickstart import write_quickstart
from cpt_kernels.evaluation.pairs import evaluate_pairs
from cpt_kernels.reference.scorer import Reference
from cpt_kernels.training.report import Curve

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model and the responses of the quickstart, and a judge that prefers the shorter output."""
    folder = tmp_path_factory.mktemp("study")
    write_quickstart(folder)
    return folder


@pytest.fixture(autouse=True)
def _place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def run(output: str, *more: str, order: str = "large > medium > small") -> int:
    data = ["--data", "responses.jsonl", "--model", "model", "--order", order, "--validation", "0.4"]
    options = ["--learning_rate", "1e-3", "--use_cpu", "--disable_tqdm", "--ref_cache_dir", "cache"]
    answers = ["--prompts", "2", "--response_tokens", "4"]
    return main(["study", *data, "--output", output, "--steps", str(STEPS), *answers, *options, *more])


def results(folder, output: str) -> dict:
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / output / "arms").glob("*.json"))}


def test_arms_of_the_papers_comparison():
    pairs = ["large>small", "large>medium", "medium>small"]
    arms = make_arms(["large", "medium", "small"], pairs)
    ends = ["curriculum", "reversed", "mixed", "selected"]
    assert list(arms) == ["sft", "slic large>small", *(f"dpo {pair}" for pair in pairs), *ends]
    assert arms["curriculum"].options["curriculum"] == {"levels": pairs[:2], "schedule": "linear"}
    assert list(make_arms(["a", "b"], ["a>b"])) == ["sft", "slic a>b", "dpo a>b", "selected"]


def test_a_stopped_study_continues_and_its_arms_are_runs_of_cpt_train(folder, monkeypatch, capsys):
    score, scored = Reference.score, []

    def counted(self, sequences, *given):
        scored.extend((self.cache.fingerprint, self.cache.key(*each)) for each in sequences)
        return score(self, sequences, *given)

    monkeypatch.setattr(Reference, "score", counted)
    arms = ["--arms", "sft", "curriculum", "--slic_delta", "2", "--beta", "0.2", "--label_smoothing", "0.1"]
    assert run("whole", *arms, "--judge", "shorter:prefer") == 2  # there is no such module yet
    (folder / "shorter.py").write_text(
        "def prefer(prompt, one, two):\n    return 1.0 if len(one) < len(two) else 0.0\n"
    )
    assert run("whole", *arms, "--judge", "shorter:prefer") == 0
    whole = results(folder, "whole")
    assert [point["step"] for point in whole["curriculum"]["curve"]] == [1, 2, 3, 4]

    # Every completion was scored once by each model, also where the drift compares it with the start.
    assert scored and len(set(scored)) == len(scored)
    monkeypatch.setattr(Reference, "score", score)

    # A study that is stopped after a point of its arm, then by its budget, and continued.
    on_step_end, stops = Curve.on_step_end, []

    def stopping(self, args, state, control, **given):
        on_step_end(self, args, state, control, **given)
        if state.global_step == 3 and "curriculum" in str(self.file) and not stops:
            stops.append(state.global_step)
            raise KeyboardInterrupt

    monkeypatch.setattr(Curve, "on_step_end", stopping)
    arms.remove("sft")
    assert run("parts", *arms) == 130 and stops == [3]
    assert {*results(folder, "parts")} == {"start"}
    assert run("parts", *arms, "--minutes", "1e-9") == 0
    assert "start the command again to continue with curriculum" in capsys.readouterr().out
    assert run("parts", *arms) == 0
    assert results(folder, "parts") == {name: whole[name] for name in ("curriculum", "start")}

    # The report.
    found = json.loads((folder / "whole" / "results.json").read_text())
    assert found["arms"] == ["sft", "curriculum"] and found["judged"]["models"][1]["prompts"] == 2
    drifts = {row["model"]: row["kl"]["mean"] for row in found["drift"]}
    assert list(drifts) == ["sft", "curriculum"] and all(kl > 1e-6 for kl in drifts.values())
    plain, corrected = ([row["rewards/margins"] for row in rows] for rows in found["differences"])
    assert len(plain) == 1 and plain[0]["mean"] == corrected[0]["mean"]
    page = (folder / "whole" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 and "win rate, %" in page and "KL" in page

    # The same arm by cpt-train, which evaluates nothing on its way.
    curriculum = json.dumps(
        make_arms(["large", "medium", "small"], ["large>small", "large>medium"])["curriculum"].options
    )
    rows = [json.loads(line) for line in (folder / "whole" / "pairs.jsonl").open()]
    with (folder / "large.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if row["chosen_model"] == "large")
    curriculum = json.dumps(json.loads(curriculum)["curriculum"])
    options = [
        "--max_steps",
        str(STEPS),
        "--curriculum",
        curriculum,
        "--output_dir",
        "alone",
        "--ref_cache_dir",
        "cache",
    ]
    data = ["--model_name_or_path", "model", "--dataset_name", "large.jsonl", "--learning_rate", "1e-3"]
    data += ["--beta", "0.2", "--label_smoothing", "0.1"]
    assert main(["train", *data, *options, "--use_cpu", "--disable_tqdm", "--report_to", "none"]) == 0
    held_out = load_data(str(folder / "whole" / "pairs.validation.jsonl"))
    from transformers import AutoTokenizer

    args = ContrastiveConfig("unused", use_cpu=True, ref_cache_dir="cache")
    alone = evaluate_pairs({"alone": "alone"}, held_out, AutoTokenizer.from_pretrained("model"), args=args)
    assert np.array_equal(alone.logps["alone"], np.array(whole["curriculum"]["logps"]))
    shutil.rmtree(folder / "alone")


@pytest.mark.parametrize(
    ("more", "order", "message"),
    [
        (["--loss_type", "ipo"], "large > small", "loss_type is set by cpt study itself"),
        (["--arms", "ppo"], "large > medium > small", "'ppo' is none of this data"),
        (["--steps", "3"], "large > small", "--steps: 3 is not a number of steps: give a whole number, 4 or more"),
        (["--batch_size", "0"], "large > small", "--batch_size: 0 is not a batch size"),
        (["--sft_learning_rate", "nan"], "large > small", "--sft_learning_rate: nan is not a learning rate"),
        (["--response_temperature", "-1"], "large > small", "-1 is not a temperature"),
        (["--validation", "0"], "large > small", "--validation 0.0: give a share of the pairs, above 0 and below 1"),
        (["--simpo_gamma", "1"], "large > small", "simpo_gamma has no effect on the losses of the arms"),
        (["--beta", "0.2"], "large > medium > small", "holds a study with beta its default, not 0.2"),
        ([], "large > gpt", "gpt"),
    ],
)
def test_what_cannot_be_done_is_one_line(more, order, message, capsys, folder):
    output = "other" if order == "large > gpt" else "refused"
    if "holds" in message:
        run(output, "--arms", "ppo")
        capsys.readouterr()
    assert run(output, *more, order=order) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
