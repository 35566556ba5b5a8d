"""Tests of ``cpt`` and ``cpt-train``: mistakes in data, models and folders, bugs, and whole runs."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cpt_kernels import cli
from cpt_kernels.cli import train as run_module
from cpt_kernels.cli.options import ModelArguments
from cpt_kernels.cli.run import _lora
from cpt_kernels.errors import UnavailableError, UserError, user_error
from tests.helpers import ROOT
from tests.helpers.command import (
    NEEDED,
    bpe_tokenizer,
    one_error,
    read_metrics,
    run,
    word_pairs,
    write_model,
    write_options,
    write_rows,
)
from tests.helpers.rows import nasty_pairs, real_pairs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "reference"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model trained by SFT, its start config and tokenizer, and pairs."""
    home = tmp_path_factory.mktemp("cli")
    pairs = word_pairs(48)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    write_model(home / "start", tokenizer)
    write_rows(home / "train.jsonl", pairs[:32])
    write_rows(home / "test.jsonl", pairs[32:])
    write_options(
        home / "sft.yaml",
        model_name_or_path=str(home / "start"),
        from_scratch=True,
        dataset_name=str(home / "train.jsonl"),
        eval_dataset_name=str(home / "test.jsonl"),
        output_dir=str(home / "sft"),
        loss_type="sft",
        learning_rate="5e-3",
        max_steps=24,
        per_device_train_batch_size=8,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=12,
        eval_on_start=True,
        save_strategy=False,  # as YAML reads `save_strategy: no`
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    assert run("--config", home / "sft.yaml") == 0
    common = yaml.safe_load((home / "sft.yaml").read_text())
    del common["from_scratch"], common["loss_type"]
    write_options(
        home / "dpo.yaml",
        **common | {"model_name_or_path": str(home / "sft"), "output_dir": str(home / "dpo"), "learning_rate": 1e-3},
    )
    return home


# --- Input ---


def broken_tokenizer(home: Path, folder: Path) -> Path:
    return write_model(folder, bpe_tokenizer(["the sky is blue"], eos=None))


def small_vocabulary(home: Path, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(home / "start")
    return write_model(folder, tokenizer, vocab_size=280)


def model_without_tokenizer(home: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(home / "sft").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dataset_name", "{tmp}/nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("dataset_name", "{tmp}/folder", "holds no .json"),
        ("dataset_name", "no/such-set", "the hub did not return a dataset"),
        (
            "dataset_name",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "ch\n',
            "line 3, column 17",
        ),
        ("dataset_name", '{"prompt": "a", "response": "b"}\n', "has the columns `prompt`, `response`; expected one of"),
        ("dataset_name", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "dropped, identical sides: 1 (rows 0"),
        ("dataset_name", "", "is an empty file"),
        ("dataset_train_split", "validation", "only the split 'train', not 'validation'"),
        ("columns", "question=prompt", "columns names ['question']"),
        ("target_column", "sampled", "target_column names ['sampled']"),
        ("max_length", "3", "no row can be trained on; train data: 0 of 32 rows kept, 0 pairs; dropped, prompt fills"),
        ("eval_dataset_name", "{tmp}/nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("output_dir", "{home}/train.jsonl/out", "cannot be written to (Not a directory)"),
        ("output_dir", "{home}/sft", "is also model_name_or_path"),
        ("model_name_or_path", "{tmp}/nowhere", "nowhere: there is no such folder"),
        ("model_name_or_path", "no/such-model", "cannot be loaded: We couldn't connect"),
        ("model_name_or_path", "{home}/start", "set from_scratch=true"),
        ("model_name_or_path", broken_tokenizer, "the tokenizer has no eos token"),
        ("model_name_or_path", small_vocabulary, "beyond the model's vocabulary of 280"),
        ("ref_model_name_or_path", "{tmp}/nowhere", "ref_model_name_or_path={tmp}/nowhere: there is no such folder"),
        ("ref_model_name_or_path", "gpt", "the reference has a vocabulary of 99 tokens, the policy of"),
        ("resume_from_checkpoint", "{tmp}/nowhere", "there is no such folder"),
        ("resume_from_checkpoint", "last", "there is no checkpoint in"),
        ("resume_from_checkpoint", "{home}/start", "is a checkpoint of another model: its hidden_size is 48"),
        ("report_to", "wandbb", "wandbb is not supported"),
        ("report_to", "wandb", "report_to=wandb: this tracker is not installed"),
        ("attn_implementation", "flash_attention_2", "FlashAttention2"),
        ("max_tokens_per_batch", "4", "more than max_tokens_per_batch=4"),
        ("beta", "-1", "beta=-1.0: must be positive"),
        ("max_grad_norm", "-1", "max_grad_norm=-1.0: must not be negative"),
        ("per_device_train_batch_size", "0", "per_device_train_batch_size=0: must be positive"),
        ("gradient_accumulation_steps", "0", "gradient_accumulation_steps=0: must be positive"),
        ("seed", "-1", "seed=-1: must not be negative"),
        ("dataloader_num_workers", "-2", "dataloader_num_workers=-2: must not be negative"),
        ("metric_for_best_model", "foo", "metric_for_best_model=foo: there is no such metric; choose one of loss, "),
        ("model_init_kwargs", '{{"foo": 1}}', "unexpected keyword argument 'foo'"),
        ("lr_scheduler_kwargs", '{{"a": 1}}', "unexpected keyword argument 'a'"),
        ("optim_args", "x", "optim_args=x: expected name=value"),
        ("ddp_backend", "foo", "ddp_backend='foo' is unknown"),
    ],
)
def test_bad_input_is_one_line(home, tmp_path, capsys, option, value, message):
    (tmp_path / "folder").mkdir()
    flags = {"model_name_or_path": f"{home}/sft", "output_dir": f"{tmp_path}/out"}
    if callable(value):
        flags |= {option: value(home, tmp_path / "model"), "from_scratch": "true"}
    elif option == "dataset_name" and not value[:1].isalpha() and not value.startswith("{tmp}"):
        flags[option] = tmp_path / "data.jsonl"
        flags[option].write_text(value)
    elif value == "gpt":
        other = write_model(tmp_path / "gpt", AutoTokenizer.from_pretrained(home / "start"), vocab_size=99)
        (model := AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other))).save_pretrained(other)
        assert model.config.vocab_size == 99
        flags[option] = other
    elif "another model" in message:
        flags[option] = write_model(tmp_path / "big", AutoTokenizer.from_pretrained(home / "start"), hidden_size=48)
    else:
        flags[option] = value.format(home=home, tmp=tmp_path)
    if option == "target_column":
        flags["loss_type"] = "slic"
    argv = [part for name, given in flags.items() for part in (f"--{name}", given)]
    assert run("--config", home / "dpo.yaml", *argv) == 2
    assert message.format(home=home, tmp=tmp_path) in one_error(capsys)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_model_without_its_tokenizer(home, tmp_path, capsys):
    model = model_without_tokenizer(home, tmp_path / "bare")
    argv = ["--config", home / "dpo.yaml", "--model_name_or_path", model, "--output_dir", tmp_path / "out"]
    assert run(*argv) == 2
    assert f"model_name_or_path={model}" in one_error(capsys)
    assert run(*argv, "--tokenizer_name", home / "start", "--max_steps", 1) == 0


def _raises(error: Exception):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize(
    ("faulty", "error"),
    [
        (lambda *_: np.zeros(2).reshape(3), ValueError),
        (lambda *_: int("ten"), ValueError),
        (lambda *_: torch.zeros(2) + torch.zeros(3), RuntimeError),
        (lambda *_: {}["beta"], KeyError),
        (_raises(ValueError("on purpose, but not for users")), ValueError),
        (_raises(ImportError("cannot import name 'x' from 'y'")), ImportError),
        (_raises(OSError("a library's own")), OSError),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, faulty, error):
    monkeypatch.setattr(run_module, "main", faulty)
    with pytest.raises(error):
        run(*NEEDED)
    assert "error:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (_raises(UserError("beta=-1: must be\n  positive;\n")), "beta=-1: must be; positive"),
        (_raises(UnavailableError("install it")), "install it"),
        (_raises(OSError(errno.ENOSPC, "No space left on device", "x.json")), "x.json: No space left on device"),
        (_raises(PermissionError(errno.EACCES, "Permission denied", "/x")), "/x: Permission denied"),
        (lambda *_: Path("/nowhere/x").read_text(), "/nowhere/x: No such file or directory"),
    ],
)
def test_a_users_mistake_is_a_one_line_error(monkeypatch, capsys, faulty, message):
    monkeypatch.setattr(run_module, "main", faulty)
    assert run(*NEEDED) == 2
    assert one_error(capsys) == f"cpt-train: error: {message}"


def test_errors_of_libraries_become_the_users():
    with pytest.raises(UserError, match=r"^model=x: no such file$") as raised, user_error("model=x"):
        raise OSError("no such file")
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(UserError, match=r"^KeyError$"), user_error(types=(KeyError,)):
        raise KeyError
    with pytest.raises(UnavailableError, match=r"^ours$"), user_error("model=x"):
        raise UnavailableError("ours")
    with pytest.raises(RuntimeError, match=r"^a bug$"), user_error("model=x"):
        raise RuntimeError("a bug")


def test_an_interrupted_run(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "main", interrupted)
    assert run(*NEEDED) == 130 and "stopped" in one_error(capsys)


def test_cpt_lists_its_commands(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"cpt-kernels \S+, torch \d\S+, transformers \d\S+\n", capsys.readouterr().out)
    assert cli.main(["--help"]) == 0 and cli.main([]) == 2
    assert capsys.readouterr().out.count("cpt demo-real") == 2
    assert cli.main(["trian"]) == 2 and "did you mean train?" in capsys.readouterr().err
    assert cli.main(["train", "--betta", "1"]) == 2 and "cpt train: error: unknown" in capsys.readouterr().err


def test_the_installed_command(tmp_path):
    """A process ends with exit code 2, one line on stderr and nothing on stdout."""
    root = ROOT
    command = [sys.executable, "-m", "cpt_kernels.cli", "train", *NEEDED, "--dataset_name", str(tmp_path / "no.csv")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], cwd=root, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("cpt train: error: ") and "Traceback" not in done.stderr


# --- Whole runs ---


def test_sft_then_dpo(home, tmp_path, capsys):
    sft = read_metrics(home / "sft")
    assert sft[-2]["eval_loss"] < 0.7 * sft[0]["eval_loss"]
    assert run("--config", home / "dpo.yaml") == 0
    printed = capsys.readouterr().out
    assert "rewards/margins" in printed and "32 of 32 rows kept" in printed and f"written to {home / 'dpo'}" in printed
    metrics = read_metrics(home / "dpo")
    train = [record for record in metrics if "loss" in record]
    held_out = [record for record in metrics if "eval_loss" in record]
    assert [record["step"] for record in train] == [4, 8, 12, 16, 20, 24]
    assert [record["step"] for record in held_out] == [0, 12, 24]
    assert held_out[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert held_out[-1]["eval_rewards/margins"] > 0.05 and held_out[-1]["eval_rewards/accuracies"] > 0.7
    written = {path.name for path in (home / "dpo").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "training_config.yaml", "curves.png", "curves.svg"} <= written
    trained = AutoModelForCausalLM.from_pretrained(home / "dpo")
    assert trained.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(home / "dpo").eos_token == "</s>"
    # The saved options reproduce the run: the losses are the same.
    assert run("--config", home / "dpo" / "training_config.yaml", "--output_dir", tmp_path / "again") == 0
    again = [record["loss"] for record in read_metrics(tmp_path / "again") if "loss" in record]
    assert again == [record["loss"] for record in train]


def test_resume(home, tmp_path, capsys):
    options = ["--config", home / "dpo.yaml", "--save_strategy", "steps", "--save_steps", 12, "--max_steps", 24]
    assert run(*options, "--output_dir", tmp_path / "out") == 0
    whole = read_metrics(tmp_path / "out")
    tokens = {record["step"]: record["num_tokens"] for record in whole if "loss" in record}
    assert f"{tokens[24]:,} tokens, " in capsys.readouterr().out
    first = tmp_path / "out" / "checkpoint-12"
    assert run(*options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", first) == 0
    assert f"{tokens[24] - tokens[12]:,} tokens, " in capsys.readouterr().out
    resumed = read_metrics(tmp_path / "out")
    keys = ("step", "loss", "eval_loss", "eval_rewards/margins")
    assert [[record.get(key) for key in keys] for record in resumed] == [[r.get(key) for key in keys] for r in whole]
    assert run(*options, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "last") == 0  # no step is left
    steps = [record["step"] for record in read_metrics(tmp_path / "out") if "loss" in record]
    assert steps == [4, 8, 12, 16, 20, 24]
    saved = yaml.safe_load((tmp_path / "out" / "training_config.yaml").read_text())
    assert "resume_from_checkpoint" not in saved


@pytest.mark.parametrize("way", ["lora", "ref", "sum", "moving", "stream", "split", "evaluated at the end", "best"])
def test_other_ways_to_run(home, tmp_path, way, capsys, caplog):
    flags = {
        "lora": ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", 4, "--bf16"],
        "ref": ["--ref_model_name_or_path", home / "sft", "--loss_type", "ipo"],
        "sum": ["--loss_type", "sigmoid", "sft", "--loss_weights", 1, 0.2, "--ld_alpha", 0.5, "--padding_free"],
        "moving": ["--sync_ref_model", "--ref_model_sync_steps", 2, "--loss_type", "apo_zero", "--use_weighting"],
        "stream": ["--dataset_streaming"],
        "split": ["--eval_dataset_name", tmp_path / "data", "--dataset_test_split", "validation"],
        "evaluated at the end": ["--eval_strategy", "no", "--eval_on_start", "false"],
        "best": ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", 2, "--eval_steps", 2],
    }[way]
    if way == "split":
        (tmp_path / "data").mkdir()
        write_rows(tmp_path / "data" / "validation.jsonl", word_pairs(5, seed=3))
    options = ["--config", home / "dpo.yaml", "--output_dir", tmp_path / "out", "--max_steps", 4, "--logging_steps", 2]
    assert run(*options, *flags) == 0
    metrics = read_metrics(tmp_path / "out")
    assert [record["step"] for record in metrics if "eval_loss" in record][-1] == 4
    assert all(np.isfinite(record["loss"]) for record in metrics if "loss" in record)
    printed, errors = capsys.readouterr()
    assert ("frozen linear layers hold" in errors + caplog.text) == (way == "lora")
    assert (tmp_path / "out" / "adapter_config.json").exists() == (way == "lora")
    assert ("adapter, tokenizer" in printed) == (way == "lora") and ("the best so far" in printed) == (way == "best")
    assert (way == "split") == ("5 of 5 rows kept" in printed)


# --- Real data ---


def test_real_pairs(tmp_path, capsys):
    """Trains a tokenizer on real text, then SFT on the chosen side, then DPO."""
    pairs = real_pairs()
    train, held_out = pairs[:40], pairs[100:120]
    tokenizer = bpe_tokenizer((text for row in train for text in row.values()), size=600)
    write_model(tmp_path / "start", tokenizer, hidden_size=64, intermediate_size=128)
    write_options(
        tmp_path / "run.yaml",
        dataset_name=str(write_rows(tmp_path / "train.jsonl", train)),
        eval_dataset_name=str(write_rows(tmp_path / "test.jsonl", held_out)),
        max_length=160,
        max_tokens_per_batch=1280,
        max_steps=8,
        learning_rate=3e-3,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=8,
        eval_on_start=True,
        save_strategy=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    common = ("--config", tmp_path / "run.yaml")
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    flags = ("--from_scratch", "--loss_type", "sft")
    assert run(*common, *flags, "--model_name_or_path", tmp_path / "start", "--output_dir", sft) == 0
    assert run(*common, "--model_name_or_path", sft, "--output_dir", dpo, "--learning_rate", 1e-3) == 0
    before, after = ([r for r in read_metrics(folder) if "eval_loss" in r] for folder in (sft, dpo))
    assert before[-1]["eval_loss"] < before[0]["eval_loss"] - 0.3
    assert after[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert after[-1]["eval_rewards/margins"] > 0.1 and after[-1]["eval_rewards/accuracies"] > 0.6
    assert "sequences truncated to max_length=160" in capsys.readouterr().out


def test_nasty_rows(tmp_path, capsys):
    """Every row is trained on, or dropped and counted: empty or identical sides, control characters, long texts."""
    rows = nasty_pairs()
    tokenizer = bpe_tokenizer((row["chosen"][:2000] for row in rows), size=400)
    write_model(tmp_path / "start", tokenizer)
    flags = ["--dataset_name", write_rows(tmp_path / "nasty.jsonl", rows), "--output_dir", tmp_path / "out"]
    flags += ["--max_length", 512, "--max_tokens_per_batch", 4096, "--num_train_epochs", 1, "--use_cpu"]
    assert run("--model_name_or_path", tmp_path / "start", "--from_scratch", *flags, "--disable_tqdm") == 0
    printed = capsys.readouterr().out
    identical = sum(row["chosen"] == row["rejected"] for row in rows)
    empty = sum(not row["chosen"] or not row["rejected"] for row in rows)
    assert identical > 30 and empty > 3
    assert f"dropped, identical sides: {identical} (" in printed and f"dropped, empty completion: {empty} (" in printed
    assert [
        record["step"] for record in read_metrics(tmp_path / "out") if "loss" in record
    ]  # the last step is logged, though it is not the tenth
    kept = int(printed.split("train data: ")[1].split(" of ")[0])
    fills = printed.split("prompt fills max_length: ")[1].split(" ")[0] if "prompt fills" in printed else 0
    assert kept + int(fills) + identical + empty == len(rows) and kept > 20


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["q_proj"], {"q_proj"}), (["attn.q_proj"], {"attn.q_proj"}), (["all-linear"], "all-linear"), ([".*q"], ".*q")],
)
def test_one_module_of_an_adapter_is_a_name_or_a_pattern(given, expected):
    assert _lora(ModelArguments("m", use_peft=True, lora_target_modules=given)).target_modules == expected
