"""metrics.jsonl, the curves, and the closing table."""

from __future__ import annotations

import json
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from cpt_kernels.training.report import (
    ProgressLines,
    RunReport,
    draw_curves,
    eval_records,
    metrics_table,
    train_records,
)

NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "mean_token_accuracy")


def training(step, **more):
    return {**{name: step / 10 for name in NAMES}, "epoch": 0.1, "step": step, **more}


def evaluation(step, **more):
    return {**{f"eval_{name}": step / 20 for name in NAMES}, "eval_runtime": 0.5, "step": step, **more}


SUMMARY = {"train_runtime": 3.0, "train_loss": 0.5, "step": 4}


def play(report, logs, history=(), begin=True, main=True):
    """Calls a callback as the trainer does; returns the lines of metrics.jsonl on the main process."""
    state = SimpleNamespace(log_history=list(history), is_world_process_zero=main, num_input_tokens_seen=0)
    if begin:
        report.on_train_begin(None, state, None)
    for record in logs:
        state.log_history.append(record)
        report.on_log(None, state, None, logs=record)
    return [json.loads(line) for line in report.metrics_file.read_text().splitlines()] if main else None


def test_every_log_is_a_line(tmp_path):
    report = RunReport(tmp_path / "out", "title")
    lines = play(report, [evaluation(0), training(2), training(4), evaluation(4), SUMMARY])
    assert [line["step"] for line in lines] == [0, 2, 4, 4, 4] and lines == report.records
    assert next(iter(lines[1])) == "step" and lines[1]["loss"] == 0.2
    report.on_train_end(None, SimpleNamespace(is_world_process_zero=True, num_input_tokens_seen=0), None)
    assert [path.name for path in report.files] == ["curves.png", "curves.svg"]
    assert report.files[0].read_bytes().startswith(b"\x89PNG") and "<svg" in report.files[1].read_text()


def test_a_resumed_run_repeats_no_step(tmp_path):
    first = [evaluation(0), training(2), evaluation(2), training(4), evaluation(4)]
    play(RunReport(tmp_path), first)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    again = RunReport(tmp_path)
    lines = play(again, [evaluation(2), training(4), evaluation(4), training(6)], history=first[:3])
    assert [(line["step"], "loss" in line) for line in lines] == [
        *[(0, False), (2, True), (2, False)],
        *[(4, True), (4, False), (6, True)],
    ]


def test_a_fresh_run_in_the_same_folder_starts_anew(tmp_path):
    play(RunReport(tmp_path), [training(2), training(4)])
    assert [line["step"] for line in play(RunReport(tmp_path), [training(2)])] == [2]


def test_an_evaluation_before_training_is_kept(tmp_path):
    report = RunReport(tmp_path)
    play(report, [evaluation(0)], begin=False)
    assert [line["step"] for line in play(report, [training(2)])] == [0, 2]


def test_only_the_first_process_writes(tmp_path):
    report = RunReport(tmp_path / "out")
    play(report, [training(2)], main=False)
    assert not report.folder.exists() and len(report.records) == 1


def test_a_line_is_json_also_where_a_number_is_none(tmp_path):
    play(RunReport(tmp_path), [training(2, grad_norm=float("nan"), loss=float("inf"))])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line and json.loads(line)["grad_norm"] is None


@pytest.mark.parametrize("kept", ["pairs", "supervised", "evaluations", "nothing"])
def test_curves_of_what_there_is(tmp_path, kept):
    records = [training(2), evaluation(2), training(4), evaluation(4)]
    if kept == "supervised":
        records = [{k: v for k, v in record.items() if "rewards" not in k} for record in records]
    records = {"evaluations": eval_records(records) and records[1::2], "nothing": []}.get(kept, records)
    files = draw_curves(records, tmp_path)
    assert len(files) == (0 if kept == "nothing" else 2)
    if files:
        svg = files[1].read_text()
        assert svg.count("<!-- step -->") == {"pairs": 4, "supervised": 2, "evaluations": 4}[kept]


def test_curves_of_a_curriculum(tmp_path):
    shares = [{"curriculum/org/a>b": 1 - step / 10, "curriculum/org/a>c": step / 10} for step in (2, 4)]
    records = [training(2, **shares[0]), training(4, **shares[1])]
    svg = draw_curves(records, tmp_path)[1].read_text()
    assert "<!-- share of level -->" in svg and "<!-- org/a&gt;b -->" in svg and "held out" not in svg
    svg = draw_curves([training(2, **{"curriculum/difficulty": 0.5})], tmp_path)[1].read_text()
    assert "<!-- place in the curriculum -->" in svg


def test_tokens_per_second_leaves_evaluation_and_earlier_sessions_out(tmp_path):
    report = RunReport(tmp_path)
    assert report.tokens_per_second() is None
    play(report, [training(4), evaluation(4), SUMMARY, evaluation(4, other=1)], history=[evaluation(0), training(2)])
    report.on_train_end(None, SimpleNamespace(is_world_process_zero=False, num_input_tokens_seen=100), None)
    assert report.tokens == 100 and report.tokens_per_second() == pytest.approx(100 / 2.5)


def test_the_table_shows_first_and_last(tmp_path):
    records = [evaluation(0), training(2), training(4), training(6), evaluation(6), SUMMARY]
    console = Console(width=120, file=StringIO())
    console.print(metrics_table(records, "title"))
    text = console.file.getvalue()
    assert text.count("training") == 2 and text.count("held out") == 2 and "step 0" in text and "step 2" in text
    cells = next(line for line in text.splitlines() if "rewards/margins" in line).split("│")
    assert [cell.strip() for cell in cells[2:6]] == ["0.2", "0.6", "0", "0.3"]
    assert metrics_table([]).row_count == 0 and len(train_records(records)) == 3


def test_the_note_is_for_a_policy_that_is_its_reference(tmp_path):
    report = RunReport(tmp_path)
    assert report.note() is None
    report.records = [evaluation(0)]
    assert "equals its reference" in report.note()
    report.records = [{**evaluation(0), "eval_rewards/margins": 0.4}]
    assert report.note() is None


def test_progress_is_one_short_line_per_log(capsys):
    lines = ProgressLines()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)
    lines.on_train_begin(SimpleNamespace(disable_tqdm=False), state, None)
    lines.on_log(None, state, None, logs=training(2, learning_rate=np.float64(1e-5), tokens_per_second=12345.6))
    lines.on_log(None, state, None, logs=evaluation(2))
    lines.on_log(None, state, None, logs={"train_runtime": 1.0})
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "    step 2/4  loss 0.2  margin 0.2  accuracy 0.2  lr 1e-05  tokens/s 12,346",
        "    held out  loss 0.1  margin 0.1  accuracy 0.1",
    ]
