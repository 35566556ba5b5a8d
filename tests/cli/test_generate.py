"""Tests of ``cpt generate`` from data to files, including runs that are killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_dataset

from cpt_kernels import cli
from cpt_kernels.data.formats import parse_row
from cpt_kernels.data.forms import Form
from tests.helpers import ROOT
from tests.helpers.architectures import tiny_model
from tests.helpers.command import write_rows
from tests.helpers.stub_endpoint import StubEndpoint, answer_to, faults, shorten_waits
from tests.helpers.toy import word_tokenizer

KEY = "sk-secret-of-the-tests"
LINES = 40
TIMEOUT = 120  # seconds; a command takes a few seconds


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    shorten_waits(monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("generate")
    tiny_model("llama").save_pretrained(home / "model")
    word_tokenizer().save_pretrained(home / "model")
    write_rows(home / "prompts.jsonl", [{"prompt": f"w{i} w{i % 7} w{i % 3}"[: 3 + i % 9]} for i in range(LINES)])
    write_rows(home / "pairs.jsonl", [{"prompt": f"w{i}", "chosen": " w1", "rejected": " w2"} for i in range(5)])
    return home


def argv(data: Path, output: Path, **options) -> list[str]:
    given = {"dataset_name": data, "output": output, **options}
    return ["generate", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def local(home: Path, output: Path, data: str = "prompts.jsonl", **options) -> list[str]:
    defaults = {"model_name_or_path": home / "model", "device": "cpu", "max_new_tokens": 8, "batch_size": 4}
    return argv(home / data, output, **{**defaults, **options})


def remote(home: Path, output: Path, stub: StubEndpoint, data: str = "prompts.jsonl", **options) -> list[str]:
    return argv(home / data, output, backend="openai", base_url=stub.url, model_name_or_path="m", **options)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def error_of(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt generate: ")]
    return line


def killed(command: list[str], when) -> None:
    """Runs the command in another process, and kills it as soon as ``when()`` is true."""
    process = subprocess.Popen([sys.executable, "-m", "cpt_kernels.cli", *command], cwd=ROOT)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not when():
            assert process.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("command", ["generate", "eval", "eval pairs", "eval win-rate"])
def test_help_is_quick(command):
    code = (
        "import sys, time\nfrom cpt_kernels.cli import main\n"
        f"try:\n    main([*{command.split()}, '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'openai', 'matplotlib'} & {*sys.modules}\n"
        "assert not heavy, heavy\nassert time.process_time() < 1, time.process_time()"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert process.returncode == 0 and "usage: cpt" in process.stdout, process.stderr


# --- An endpoint ---


def test_every_prompt_is_answered_once_despite_faults(home, tmp_path, capsys, caplog):
    output = tmp_path / "responses.jsonl"
    plan = faults(["429", "drop", "500", "malformed", "cut", "no choices"])
    data = "twice.jsonl"
    write_rows(home / data, rows_of(home / "pairs.jsonl") * 2)
    with StubEndpoint(plan, headers={"retry-after-ms": "1"}) as stub:
        assert cli.main(remote(home, output, stub, data, n=2)) == 0
        out = capsys.readouterr().out
        prompts = {row["prompt"] for row in rows_of(home / data)}
        assert "10 rows, 5 different prompts" in out
        assert f"{2 * len(prompts)} answered; 0 skipped (answered before); 0 failed" in out
        asked = len(stub.asked)
        assert cli.main(remote(home, output, stub, data, n=2)) == 0
        assert len(stub.asked) == asked, "answered prompts were requested again"
        assert f"0 answered; {2 * len(prompts)} skipped" in capsys.readouterr().out
        assert cli.main(remote(home, output, stub, data, n=3)) == 0  # only the new responses are requested
    rows = rows_of(output)
    assert Counter((row["prompt"], row["sample"]) for row in rows) == Counter(
        (prompt, sample) for prompt in prompts for sample in range(3)
    )
    assert all(row["response"] == answer_to(row["prompt"], row["seed"]) and row["model"] == "m" for row in rows)
    assert set(stub.delivered.values()) == {1} and len(stub.delivered) == len(rows)
    assert stub.keys == {f"Bearer {KEY}"} and KEY not in output.read_text() + caplog.text + out


def test_killed_and_started_again(home, tmp_path):
    """After three kills, no response in the file is requested again, and each one occurs once at the end."""
    output = tmp_path / "responses.jsonl"
    prompts = {row["prompt"] for row in rows_of(home / "prompts.jsonl")}

    def slow(prompt: str, attempt: int) -> str | None:
        time.sleep(0.05)
        return "500" if attempt == 0 and len(prompt) % 4 == 0 else None

    with StubEndpoint(slow) as stub:
        command = remote(home, output, stub, concurrency=3)
        kept: set[str] = set()
        for part in (1, 2, 3):
            asked = len(stub.asked)
            killed(command, lambda part=part: lines_in(output) >= 7 * part)
            assert kept.isdisjoint(stub.prompts()[asked:])
            kept = {row["prompt"] for row in rows_of(output)}
            if part == 2:  # half a line, as after a kill during a write
                kept.remove(rows_of(output)[-1]["prompt"])
                whole = output.read_bytes()
                output.write_bytes(whole[: whole.rstrip(b"\n").rindex(b"\n") + 30])
        asked = len(stub.asked)
        assert 21 <= len(kept) < len(prompts)
        assert cli.main(command) == 0
        assert kept.isdisjoint(stub.prompts()[asked:])
        assert Counter(row["prompt"] for row in rows_of(output)) == dict.fromkeys(prompts, 1)
        # Answered twice: at most the three requests in flight at each kill, and the line that was cut off.
        assert sum(stub.delivered.values()) <= len(prompts) + 3 * 3 + 1


def test_failures_are_reported_and_requested_again(home, tmp_path, capsys):
    output = tmp_path / "responses.jsonl"
    bad = {f"w{i}" for i in range(3)}
    with StubEndpoint(lambda prompt, attempt: "400" if prompt in bad and attempt < 1 else None) as stub:
        assert cli.main(remote(home, output, stub, data="pairs.jsonl")) == 2
        out, error = capsys.readouterr()
        assert "2 answered; 0 skipped (answered before); 3 failed (3 by HTTP 400)" in out
        assert "3 of 5 responses are missing, one by HTTP 400: the prompt is too long; run the same" in error
        assert cli.main(remote(home, output, stub, data="pairs.jsonl")) == 0
    assert "3 answered; 2 skipped" in capsys.readouterr().out
    assert len(rows_of(output)) == 5 and set(stub.delivered.values()) == {1}


def test_a_refused_key_is_a_one_line_error(home, tmp_path, capsys):
    with StubEndpoint(lambda *_: "401") as stub:
        assert cli.main(remote(home, tmp_path / "responses.jsonl", stub)) == 2
    error = error_of(capsys)
    assert "refuses the key" in error and KEY not in error


# --- A local model ---


@pytest.fixture(scope="module")
def undisturbed(home) -> list[dict]:
    assert cli.main(local(home, home / "undisturbed.jsonl", n=2, max_new_tokens=40)) == 0
    return rows_of(home / "undisturbed.jsonl")


def test_a_local_model(home, undisturbed):
    prompts = {row["prompt"] for row in rows_of(home / "prompts.jsonl")}
    assert Counter((row["prompt"], row["sample"]) for row in undisturbed) == Counter(
        (prompt, sample) for prompt in prompts for sample in range(2)
    )
    lengths = [row["prompt_tokens"] for row in undisturbed]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
    assert {row["finish_reason"] for row in undisturbed} == {"stop", "length"}
    assert {row["model"] for row in undisturbed} == {str(home / "model")}
    assert load_dataset("json", data_files=str(home / "undisturbed.jsonl"), split="train").num_rows == len(undisturbed)


def test_a_killed_local_run_gives_the_same_responses(home, tmp_path, undisturbed):
    output = tmp_path / "responses.jsonl"
    command = local(home, output, n=2, max_new_tokens=40)
    killed(command, lambda: lines_in(output) >= 5)
    whole, _, _ = output.read_bytes().rpartition(b"\n")  # the kill may have cut off the last line
    kept = [json.loads(line) for line in whole.splitlines()]
    assert 5 <= len(kept) < len(undisturbed)
    assert kept == undisturbed[: len(kept)]
    output.write_bytes(output.read_bytes()[:-40])
    assert cli.main(command) == 0
    assert rows_of(output) == undisturbed


def test_a_new_model_in_the_same_folder_is_detected(home, tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "responses.jsonl"
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    command = local(home, output, data="pairs.jsonl", model_name_or_path=folder)
    assert cli.main(command) == 0
    tiny_model("llama", seed=1).save_pretrained(folder)
    assert cli.main(command) == 2
    assert "with other settings (weights was" in error_of(capsys)
    assert cli.main([*command, "--model_label", "again"]) == 0
    assert Counter(row["model"] for row in rows_of(output)) == {str(folder): 5, "again": 5}


def test_prompt_formats(home, tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}{% if enable_thinking is defined %} w3{% endif %}"
    )
    tokenizer.save_pretrained(folder)

    def tokens(name: str, **options) -> int:
        output = tmp_path / f"{name}.jsonl"
        assert cli.main(local(home, output, data="pairs.jsonl", model_name_or_path=folder, **options)) == 0
        return rows_of(output)[0]["prompt_tokens"]

    assert tokens("chat") > tokens("text", prompt_format="text") == 1
    out = capsys.readouterr().out
    assert "become a user turn of the chat template" in out and "continued as text" in out
    column = {"add_column": "y_ref", "dataset_output": tmp_path / "data.jsonl"}
    assert tokens("column", **column) == 1, "training reads the column without a chat template"
    assert tokens("kwargs", chat_template_kwargs='{"enable_thinking": false}') > tokens("plain", prompt_format="chat")

    # The run's configuration says how prompts were rendered in training.
    capsys.readouterr()
    for saved, count in (("text", 1), ("chat", tokens("chat"))):
        (folder / "training_config.yaml").write_text(f"prompt_format: {saved}\n")
        assert tokens(f"as {saved}") == count
        assert f"as in training ({folder / 'training_config.yaml'})" in capsys.readouterr().out
    assert tokens("chat column", add_column="y_ref", dataset_output=tmp_path / "more.jsonl") == count
    assert tokens("against it", prompt_format="text") == 1
    assert "are continued as text, but training was on chat" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_for_slic(home, tmp_path, capsys, suffix):
    output, data = tmp_path / "responses.jsonl", tmp_path / f"pairs.{suffix}"
    pairs = tmp_path / "train.jsonl"
    write_rows(pairs, [*rows_of(home / "pairs.jsonl"), {"prompt": "w9", "chosen": "", "rejected": " w1"}])
    command = local(tmp_path, output, data="train.jsonl", model_name_or_path=home / "model")
    assert cli.main([*command, "--add_column", "y_ref", "--dataset_output", str(data)]) == 0
    assert "5 of 6 rows have `y_ref`" in capsys.readouterr().out
    responses = {row["prompt"]: row["response"] for row in rows_of(output)}
    rows = load_dataset("json" if suffix == "jsonl" else suffix, data_files=str(data), split="train").to_list()
    assert [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows] == rows_of(pairs)
    assert rows[5]["y_ref"] is None
    for row in rows[:5]:
        assert parse_row(row, Form.PREFERENCE, "y_ref").completions[-1] == responses[row["prompt"]]


def test_alpaca_eval(home, tmp_path, capsys):
    rows = [{"instruction": f"w{i}", "output": "no", "generator": "x", "dataset": "koala"} for i in (3, 1, 2, 1)]
    write_rows(tmp_path / "eval.jsonl", rows)
    output = tmp_path / "out" / "responses.jsonl"
    command = [
        *local(tmp_path, output, data="eval.jsonl", model_name_or_path=home / "model"),
        "--format",
        "alpaca_eval",
    ]
    assert cli.main([*command, "--model_label", "tiny"]) == 0
    responses = {row["prompt"]: row["response"] for row in rows_of(output)}
    assert json.loads((tmp_path / "out" / "model_outputs.json").read_text()) == [
        {"dataset": "koala", "instruction": prompt, "output": responses[prompt], "generator": "tiny"}
        for prompt in ("w3", "w1", "w2")
    ]
    assert {path.name for path in output.parent.glob("[!.]*")} == {"responses.jsonl", "model_outputs.json"}
    capsys.readouterr()
    assert cli.main([*command, "--model_label", "other"]) == 2
    assert "has the outputs of tiny: use one folder for each model" in error_of(capsys)
    assert len(rows_of(output)) == 3, "the error comes before any request"


def test_two_processes_at_once(home, tmp_path, capsys):
    output = tmp_path / "responses.jsonl"
    started = []

    def plan(prompt: str, attempt: int) -> str | None:
        if not started:
            started.append(cli.main(local(home, output)))
        return None

    with StubEndpoint(plan) as stub:
        assert cli.main(remote(home, output, stub, concurrency=1)) == 0
    assert started == [2] and "is being written by another process" in error_of(capsys)


def test_mistakes_are_one_line(home, tmp_path, capsys):
    output = tmp_path / "responses.jsonl"
    pairs = home / "pairs.jsonl"
    (tmp_path / "turns.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
    )
    (tmp_path / "empty.jsonl").write_text('{"prompt": ""}\n')
    column = {"add_column": "y_ref", "dataset_output": "x.jsonl"}
    for options, message in (
        ({"temperature": -1}, "temperature=-1.0 must be 0 (greedy) or more"),
        ({"n": 0}, "0 is not a number of responses"),
        ({"n": 2, "temperature": 0}, "would give the same response 2 times"),
        ({"top_p": "none"}, "--top_p none leaves the value to an endpoint"),
        ({"concurrency": 3}, "--concurrency has no effect with --backend transformers, only with openai"),
        ({"backend": "openai", "device": "cpu"}, "--device has no effect with --backend openai"),
        ({"model_kwargs": "[1]"}, "'[1]' is not a JSON object"),
        ({"model_kwargs": '{"device_map": "auto"}', "device": "cpu"}, "give only one of them"),
        ({"output": tmp_path / "responses.json"}, "responses go to a .jsonl file"),
        ({"add_column": "y_ref"}, "add_column needs dataset_output"),
        ({"dataset_output": "x.jsonl"}, "dataset_output needs add_column"),
        ({"add_column": "y_ref", "dataset_output": pairs}, "is the dataset itself"),
        ({"add_column": "chosen", "dataset_output": "x.jsonl"}, "already has a column of this name"),
        ({"n": 2, **column}, "add_column takes one response per prompt"),
        ({"n": 2, "format": "alpaca_eval"}, "alpaca_eval takes one response per prompt"),
        ({"dataset_name": tmp_path / "turns.jsonl", "format": "alpaca_eval"}, "a prompt has 2 turns"),
        (
            {"dataset_name": tmp_path / "empty.jsonl"},
            "no row of 1 has a prompt; dropped, no prompt: 1 (rows 0; the first: `prompt`",
        ),
        ({"system_prompt": "Be brief."}, "give --prompt_format chat"),
        (
            {"chat_template_kwargs": '{"x": 1}', "prompt_format": "text"},
            "has no effect on prompts that are continued as text",
        ),
        ({"model_name_or_path": tmp_path / "none"}, "there is no such folder"),
        ({"backend": "vllm"}, "vllm was removed: run `vllm serve MODEL`, and use --backend openai"),
    ):
        given = {"model_name_or_path": home / "model", **options}
        data = given.pop("dataset_name", pairs)
        assert cli.main(argv(data, given.pop("output", output), **given)) == 2, options
        assert message in error_of(capsys), options
    assert not output.exists() or not output.read_bytes()
