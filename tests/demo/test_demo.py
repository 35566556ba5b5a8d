"""Tests of ``cpt demo``: task, teachers, judge, report, a quick run, the quickstart's files; slow: the result."""

from __future__ import annotations

import io
import json
import logging
import math
import random
import re
from html.parser import HTMLParser
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_kernels import cli
from cpt_kernels.demo import ARM_NAMES, report
from cpt_kernels.demo.arms import ARMS, EASY, HARD, Trained
from cpt_kernels.demo.experiment import (
    FULL,
    QUICK,
    Experiment,
    JudgedResponses,
    Result,
    SeedResult,
    count_pairs,
    make_pairs,
    pair_kind,
)
from cpt_kernels.demo.findings import find
from cpt_kernels.demo.judge import judge, prefer
from cpt_kernels.demo.teachers import TEACHERS, TEMPTATIONS
from cpt_kernels.demo.world import FILLER, Exercise, make_exercises, make_tokenizer, solution

# --- World ---


def test_exercises_differ_and_are_parsed_from_their_prompts():
    exercises = make_exercises(2000, random.Random(1))
    assert exercises == make_exercises(2000, random.Random(1)) != make_exercises(2000, random.Random(2))
    assert len({exercise.prompt for exercise in exercises}) == 2000
    for exercise in exercises:
        assert Exercise.parse(exercise.prompt) == exercise and all(exercise.results)
    assert {len(exercise.steps) for exercise in exercises} == {1, 2}


@pytest.mark.parametrize(
    ("prompt", "results"),
    [
        ("reverse: abcd\n", ["dcba"]),
        ("sort, then next: hcah\n", ["achh", "bdaa"]),
        ("drop b, then count a: abba\n", ["aa", "2"]),
        ("next, then drop a: habh\n", ["abca", "bc"]),
        ("count e: abc\n", ["0"]),
    ],
)
def test_results_of_every_step(prompt, results):
    assert Exercise.parse(prompt).results == results


def test_the_tokenizer_restores_every_text(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for exercise in make_exercises(200, rng):
        text = exercise.prompt + rng.choice(TEACHERS).respond(exercise, rng) + FILLER
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        prompt = tokenizer(exercise.prompt)["input_ids"]
        assert ids[: len(prompt)] == prompt  # no token spans prompt and response


# --- Judge ---


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("reverse: bcdac; count c: 2; answer: 2.", (True, True, True, True)),
        ("answer: 2.", (True, False, True, True)),
        ("reverse: bcdac; count c: 2; 2.", (True, True, False, True)),
        ("reverse: bcdac; count c: 2; answer: 2", (True, True, False, True)),
        ("reverse: bcdac; count c: 2; answer: 2. hope this helps!", (True, True, True, False)),
        ("2. hope this helps!", (True, False, False, False)),
        ("reverse: bcdac; count c: 3; answer: 3.", (False, False, True, True)),
        ("reverse: bdcac; count c: 2; answer: 2.", (True, False, True, True)),  # one wrong step
        ("count c: 2; reverse: bcdac; answer: 2.", (True, False, True, True)),  # the steps in another order
        ("reverse: bcdac; answer: 2.", (True, False, True, True)),
        ("reverse: bcdac; reverse: bcdac; count c: 2; answer: 2.", (True, False, True, False)),
        ("reverse: bcdac; count c: 2; answer: 2. answer: 3.", (False, True, True, False)),  # two answers
        ("reverse: bcdac; count c: 2;", (False, True, False, False)),
        ("", (False, False, False, False)),
    ],
)
def test_verdicts(response, verdict):
    assert judge("reverse, then count c: cadcb\n", response) == verdict


def test_a_right_answer_beats_a_wrong_one_then_style_decides():
    prompt = "sort: cab\n"
    best, bare, sloppy = "sort: abc; answer: abc.", "answer: abc.", "abc" + FILLER
    wrong, worse = "sort: acb; answer: acb.", "acb"
    ranked = [best, bare, sloppy, wrong, worse]
    for i, first in enumerate(ranked):
        for j, second in enumerate(ranked):
            assert prefer(prompt, first, second) == (0.5 if i == j else float(i < j))


def test_the_model_solution_is_perfect():
    for exercise in make_exercises(500, random.Random(3)):
        assert all(judge(exercise.prompt, solution(exercise.steps, exercise.results)))


# --- Teachers ---


@pytest.mark.parametrize("teacher", TEACHERS, ids=lambda teacher: teacher.name)
def test_faults_have_their_stated_rates(teacher):
    rng = random.Random(4)
    exercises = make_exercises(4000, rng)
    responses = [teacher.respond(exercise, rng) for exercise in exercises]
    temptations = [TEMPTATIONS.get(exercise.steps[0].split()[0]) for exercise in exercises]
    faults = {
        "skipped": [exercise.steps[0] + ":" not in text for exercise, text in zip(exercises, responses)],
        "unlabeled": ["answer" not in text for text in responses],
        "filler": [FILLER in text for text in responses],
    }
    for fault, happened in faults.items():
        for tempted, rate in ((True, teacher.tempted), (False, teacher.sloppy)):
            some = [fault_here for fault_here, t in zip(happened, temptations) if (t == fault) == tempted]
            assert abs(np.mean(some) - rate) < 4 * math.sqrt(rate * (1 - rate) / len(some))
    together = np.corrcoef([faults[fault] for fault in faults])[np.triu_indices(3, 1)]
    assert np.abs(together).max() < 0.25  # independent except through the temptations
    wrong = 1 - np.mean([judge(exercise.prompt, text).exact for exercise, text in zip(exercises, responses)])
    assert 0.7 * teacher.wrong < wrong < 1.1 * teacher.wrong  # sorting, dropping or counting corrects some slips


def test_the_stronger_teacher_wins_more_often_but_not_always():
    rng = random.Random(5)
    exercises = make_exercises(1500, rng)
    for stronger, weaker in pairwise(TEACHERS):
        wins = [prefer(e.prompt, stronger.respond(e, rng), weaker.respond(e, rng)) for e in exercises]
        assert 0.6 < np.mean(wins) < 0.9 and wins.count(0.0) > 100


# --- Data ---


def test_the_seed_determines_all_data_and_no_prompt_is_used_twice(tmp_path):
    first, again, other = (Experiment(seed, QUICK, tmp_path, lambda title, done: None) for seed in (7, 7, 8))
    assert first.exercises == again.exercises != other.exercises
    assert first.baseline == again.baseline != other.baseline
    prompts = [exercise.prompt for stage in first.exercises.values() for exercise in stage]
    assert len(set(prompts)) == len(prompts) == 32 * 60 + 64 * 20 + 32 * 8 + 60


def test_pairs_follow_the_order_of_teachers_whatever_they_answered():
    best, worst = "sort: abc; answer: abc.", "cab"
    rows = [
        {"prompt": prompt, "model": model, "response": response}
        for prompt, responses in {
            "sort: cab\n": {"weak": best, "strong": worst, "medium": best},
            "sort: bca\n": {"strong": best, "medium": best, "weak": worst},  # equal responses make no hard pair
        }.items()
        for model, response in responses.items()
    ]
    pairs = make_pairs(rows)
    assert [(pair["prompt"], pair_kind(pair), pair["chosen"]) for pair in pairs] == [
        ("sort: cab\n", HARD, worst),
        ("sort: cab\n", EASY, worst),
        ("sort: bca\n", EASY, best),
    ]
    counts = count_pairs(pairs)
    assert counts[EASY] == {"pairs": 2, "judge agrees": 0.5, "judge disagrees": 0.5}
    assert counts[HARD] == {"pairs": 1, "judge agrees": 0.0, "judge disagrees": 1.0}


# --- Report ---


def result(rate: float, seed: int, trained: bool = True) -> Result:
    """Returns the result of a model that wins about a share ``rate`` of 400 prompts, drawn with ``seed``."""
    wins = (np.random.default_rng(seed).random(400) < rate).astype(float)
    texts = ["answer: abc." if win else "<b>" for win in wins]
    outputs = JudgedResponses(texts, [judge("sort: cab\n", text) for text in texts], wins)
    records = [{"step": step, "loss": 1.0, "rewards/margins": 0.1 * step, "rewards/accuracies": 0.5} for step in (1, 2)]
    training = Trained(records, 12345.0, 30, 10) if trained else None
    return Result({"sampled": outputs, "greedy": outputs}, training)


def seed_result(**rates: float) -> SeedResult:
    return SeedResult(
        0,
        ["sort: cab\n"] * 400,
        ["abc"] * 400,
        {kind: {"pairs": 400, "judge agrees": 0.7, "judge disagrees": 0.2} for kind in (EASY, HARD)},
        {teacher.name: Result({"sampled": result(0.6, 1).responses["sampled"]}) for teacher in TEACHERS},
        result(0.5, 2, trained=False),
        {name.replace("_", "-"): result(rate, seed) for seed, (name, rate) in enumerate(rates.items())},
    )


@pytest.mark.parametrize(
    ("sft", "dpo", "conclusion"),
    [(0.5, 0.7, "as expected"), (0.7, 0.5, "against expectation"), (0.6, 0.6, "no difference")],
)
def test_the_conclusion_follows_from_the_numbers(sft, dpo, conclusion):
    findings = find([seed_result(sft=sft, dpo_easy=dpo)])
    (found,) = findings.comparisons
    mean, low, high = found.differences["sampled"]
    assert low <= mean <= high and abs(mean - (dpo - sft)) < 0.1 and conclusion in found.conclusion
    first = findings.sentences()[0]
    assert first.startswith("DPO easy against SFT continued") and conclusion in first and f"{100 * mean:+.1f}" in first


def test_results_of_several_seeds_are_pooled():
    results = [seed_result(sft=0.2), seed_result(sft=0.8)]
    summary = find(results).summaries["sft"]
    assert summary.rates["sampled"].n == 800 and abs(summary.rates["sampled"].rate - 0.5) < 0.05
    assert np.mean(summary.by_seed) == pytest.approx(summary.rates["sampled"].rate)
    assert (summary.found, summary.scored, summary.cached) == (60, 20, 0.75)


class Page(HTMLParser):
    """Checks that tags are closed in order, and keeps the text and the sources of images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open[-1] != tag and self.open[-1] == "li":  # HTML allows li without an end tag
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_table_fits_into_80_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(report.make_table(find([seed_result(**{name.replace("-", "_"): 0.7 for name in ARMS})])))
    lines = console.file.getvalue().splitlines()
    assert not [line for line in lines if "…" in line]
    assert all(any(line.strip().startswith(arm.title) for line in lines) for arm in ARMS.values())


def test_the_report_is_self_contained_and_escapes_text(tmp_path):
    results = [seed_result(sft=0.5, dpo_easy=0.7)]
    report.write_findings(find(results), results, FULL, 12.3, tmp_path, "cpt demo <x>")
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.images) == 2 and all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    assert "cpt demo <x>" in page.text and "<b>" in page.text and "DPO easy" in page.text
    json.loads((tmp_path / "results.json").read_text())


# --- The command ---


@pytest.fixture
def _process_settings():
    """Restores the settings that the command changes for its whole process."""
    logger, threads = logging.getLogger("cpt_kernels"), torch.get_num_threads()
    level = logger.level
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.usefixtures("_process_settings")
def test_quick_demo(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["results"]) == ["strong", "medium", "weak", "start", *ARMS]
    for name, row in results["results"].items():
        rates = row["rates"].values()
        assert len(rates) == (1 if name in ("strong", "medium", "weak") else 2)
        assert all(0 <= rate["low"] <= rate["rate"] <= rate["high"] <= 1 for rate in rates)
        assert row["title"] in printed
    assert len(results["comparisons"]) == 5
    # Easy and hard pairs are scored once each; the curriculum over both finds all of them in the cache.
    scored = {name: row["scored"] for name, row in results["results"].items()}
    assert scored["dpo-easy"] > 0 < scored["dpo-hard"] and scored["dpo-easy-to-hard"] == 0
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.images) == 2 and all(ARMS[name].title in page.text for name in ARMS)
    folder = tmp_path / "seed-0"
    outputs = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in outputs} == {"start", *ARMS} and len(outputs) == 7 * 2 * 60
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert {(row["chosen_model"], row["rejected_model"]) for row in pairs} == {("strong", "weak"), ("strong", "medium")}
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in outputs}
    for name in ARMS:
        AutoModelForCausalLM.from_pretrained(folder / name)
        assert {"tokenizer.json", "metrics.jsonl", "curves.png"} <= {path.name for path in (folder / name).iterdir()}


def test_an_unknown_arm_is_named(capsys):
    assert tuple(ARMS) == ARM_NAMES
    assert cli.main(["demo", "--arms", "sft", "ppo"]) == 2
    error = capsys.readouterr().err
    assert "ppo" in error and all(re.search(rf"\b{name}\b", error) for name in ARMS)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    assert "cannot be written to" in capsys.readouterr().err


@pytest.mark.usefixtures("_process_settings")
def test_files_of_the_quickstart(tmp_path, capsys):
    assert cli.main(["demo", "--quickstart", str(tmp_path / "new" / "quickstart")]) == 0
    folder = tmp_path / "new" / "quickstart"
    assert f"written to {folder}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len({(row["prompt"], row["model"]) for row in rows}) == len(rows) == 51
    assert {row["model"] for row in rows} == {"large", "medium", "small"}
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert model.num_parameters() < 300_000 and len(tokenizer) == model.config.vocab_size
    for row in rows:
        ids = tokenizer(row["response"])["input_ids"]
        assert tokenizer.decode(ids) == row["response"] and len(ids) < 80


def test_a_quickstart_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--quickstart", str(tmp_path / "file" / "quickstart")]) == 2
    assert "--quickstart" in (error := capsys.readouterr().err) and "cannot be written to" in error


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.usefixtures("_process_settings")
def test_dpo_beats_continued_sft(seed, tmp_path):
    """DPO's win rate is at least 4 points higher, for every seed, with sampling and with greedy decoding."""
    torch.set_num_threads(1)
    arms = Experiment(seed, FULL, tmp_path, lambda title, done: None).run(["sft", "dpo-easy"]).arms
    for decoding in ("sampled", "greedy"):
        sft, dpo = (arms[name].responses[decoding].wins.mean() for name in ("sft", "dpo-easy"))
        assert dpo - sft >= 0.04, f"{decoding}: {100 * dpo:.1f} against {100 * sft:.1f}"
