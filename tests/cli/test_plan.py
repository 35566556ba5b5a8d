"""Tests of ``cpt plan``: its counts are those of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bench.shapes import Shape
from cpt_kernels import ContrastiveTrainer, cli
from cpt_kernels.cli import planned as planned_module
from cpt_kernels.planning.calibration import NotTimedError
from cpt_kernels.planning.counts import RowLengths
from cpt_kernels.planning.work import Work, packed_groups
from cpt_kernels.reference.moving import StagedReference
from tests.helpers.command import bpe_tokenizer, run, word_pairs, write_model, write_options, write_rows

MANY = {"max_tokens_per_batch": 96, "gradient_accumulation_steps": 2, "num_train_epochs": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A config with a tokenizer but no weights; 24 pairs, of which 8 share four prompts, and three unusable rows."""
    home = tmp_path_factory.mktemp("plan")
    pairs = word_pairs(24)
    for i in range(8):
        pairs[i]["prompt"] = pairs[i % 4]["prompt"]
        pairs[i]["chosen"] = pairs[i % 4]["chosen"]
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    write_model(home / "start", tokenizer)
    unusable = [pairs[0] | {"rejected": pairs[0]["chosen"]}, pairs[1] | {"chosen": ""}, pairs[2] | {"rejected": ""}]
    gaps = [row | {"gap": i % 3} for i, row in enumerate([*pairs, *unusable])]
    write_rows(home / "train.jsonl", gaps)
    return home


def no_calibration(*_) -> None:
    raise NotTimedError("a layer is too large")


def planned(home: Path, tmp_path: Path, options: dict) -> dict:
    """Returns the plan of a run with these options."""
    write_options(tmp_path / "plan.yaml", use_cpu=True, disable_tqdm=True, **options)
    model = options.get("model_name_or_path", home / "start")
    argv = [model, home / "train.jsonl", "--config", tmp_path / "plan.yaml", "--json", tmp_path / "plan.json"]
    assert cli.main(["plan", *map(str, argv)]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize(
    "options",
    [
        {},
        MANY,
        MANY | {"share_prompts": "false"},
        MANY | {"packing": "false"},
        {"sharing": "tree", "per_device_train_batch_size": 9},
        MANY | {"max_length": 10, "truncation_mode": "keep_end"},
        MANY | {"curriculum": {"column": "gap", "levels": 3}},
        {"loss_type": "sft", "max_steps": 5, "per_device_train_batch_size": 7},
        {"use_peft": True, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_steps_and_tokens_are_those_of_the_run(home, tmp_path, monkeypatch, capsys, options):
    plan = planned(home, tmp_path, options)
    printed = capsys.readouterr().out
    assert "chosen (scored)" in printed and "optimizer steps" in printed

    batches = []
    step = ContrastiveTrainer.training_step

    def recorded(trainer, model, inputs, *args):
        batches.append((inputs["input_ids"].numel(), len(inputs["targets"]), inputs["num_pairs"]))
        return step(trainer, model, inputs, *args)

    monkeypatch.setattr(ContrastiveTrainer, "training_step", recorded)
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "reference"))
    flags = ["--model_name_or_path", home / "start", "--dataset_name", home / "train.jsonl"]
    if "use_peft" in options:  # an adapter needs weights below it
        model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(home / "start"))
        model.save_pretrained(tmp_path / "start")
        flags += ["--model_name_or_path", tmp_path / "start", "--tokenizer_name", home / "start"]
    else:
        flags += ["--from_scratch"]
    assert run("--config", tmp_path / "plan.yaml", *flags, "--output_dir", tmp_path / "out") == 0
    state = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    tokens, rows, pairs = map(sum, zip(*batches))
    found = plan["run"]
    assert found["steps"] == state["step"] and found["micro_batches"] == len(batches)
    assert (found["work"]["tokens"], found["work"]["head_rows"]) == (tokens, rows)
    assert found["pairs"] == pairs and found["largest"]["tokens"] == max(batches)[0]
    assert found["work"]["tokens"] <= found["unshared"]["tokens"] <= found["peer"]["tokens"] or "packing" in options
    data = plan["data"]["train"]
    assert data["rows_in"] == 27 and data["kept"] + sum(data["dropped"].values()) == 27 and data["dropped"]


@pytest.mark.parametrize("tied", [True, False])
def test_operations_and_memory_are_those_of_the_model(home, tmp_path, tied):
    """Against the arithmetic for a model of this shape, and against its tensors and its optimizer's after a step."""
    write_model(tmp_path / "model", AutoTokenizer.from_pretrained(home / "start"), tie_word_embeddings=tied)
    plan = planned(home, tmp_path, {"model_name_or_path": str(tmp_path / "model")})["run"]
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tmp_path / "model"))
    shape = Shape(hidden=32, layers=2, heads=4, kv_heads=4, intermediate=64, vocab=model.config.vocab_size, tied=tied)
    for name in ("work", "unshared", "peer"):
        expected = Work(**plan[name]).flops(shape, gradient_checkpointing=True)["total"]
        assert plan["operations"][name] == expected
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key.startswith("exp_avg")]
    size = sum(p.nbytes for p in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    expected = {"weights": size + buffers, "gradients": size, "optimizer": sum(moment.nbytes for moment in moments)}
    assert plan["bytes"] == expected


@pytest.mark.parametrize("option", ["adapter_name_or_path", "model_name_or_path"])
def test_an_adapter_that_is_trained_further(home, tmp_path, option):
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(home / "start"))
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]))
    adapted.peft_config["default"].base_model_name_or_path = str(home / "start")
    adapted.save_pretrained(tmp_path / "lora")
    plan = planned(home, tmp_path, {option: str(tmp_path / "lora")})["run"]
    trained = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    assert plan["bytes"]["gradients"] == trained and plan["bytes"]["optimizer"] == 2 * trained
    assert plan["memory"]["with checkpointing"]["peak"] > sum(plan["bytes"].values())


def test_a_picture_is_drawn_and_a_machine_that_is_too_small_is_named(home, tmp_path, monkeypatch, capsys):
    argv = [home / "start", home / "train.jsonl", "--use_cpu", "--json", tmp_path / "plan.json"]
    pictures = [tmp_path / "plan.png", tmp_path / "plan.svg"]
    assert cli.main(["plan", *map(str, argv), "--picture", str(pictures[0])]) == 0
    time = json.loads((tmp_path / "plan.json").read_text())["time"]
    assert min(*time["seconds"].values(), *time["TRL / ours"].values()) > 0 and len(time["TRL / ours"]) == 4
    assert "TRL by an imitation" in capsys.readouterr().out

    monkeypatch.setattr(planned_module, "calibrate", no_calibration)
    assert cli.main(["plan", *map(str, argv), "--picture", str(pictures[1])]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["time"] == {"unknown": "a layer is too large"}
    assert "seconds are not predicted: a layer is too large" in capsys.readouterr().out
    assert pictures[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in pictures[1].read_bytes()


def test_the_reference_pass_scores_every_different_completion_once(home, tmp_path, monkeypatch):
    monkeypatch.setattr(planned_module, "calibrate", no_calibration)
    plan = planned(home, tmp_path, {})["run"]
    assert plan["reference"]["head_rows"] < plan["work"]["head_rows"] / 3  # of three epochs
    evaluates = {"eval_strategy": "epoch", "eval_dataset_name": str(home / "train.jsonl")}
    evaluated = planned(home, tmp_path, evaluates)["run"]["reference"]
    assert evaluated["tokens"] == 2 * plan["reference"]["tokens"]
    assert planned(home, tmp_path, {"loss_type": "sft"} | evaluates)["run"]["reference"]["tokens"] == 0


def test_the_reference_passes_of_all_stages_are_counted(home, tmp_path, monkeypatch):
    """Against the rows that the trainer scores."""
    monkeypatch.setattr(planned_module, "calibrate", no_calibration)
    curriculum = {"column": "gap", "levels": 3, "stages": 3, "refresh_reference": True}
    found = planned(home, tmp_path, {"curriculum": curriculum, "num_train_epochs": 2})["run"]["reference"]
    scored, fill = [], StagedReference.fill

    def recorded(reference, dataset, collator, *args):
        scored.append(packed_groups(RowLengths(dataset, collator).groups(range(len(dataset)))))
        fill(reference, dataset, collator, *args)

    monkeypatch.setattr(StagedReference, "fill", recorded)
    flags = ["--model_name_or_path", home / "start", "--dataset_name", home / "train.jsonl", "--from_scratch"]
    assert run("--config", tmp_path / "plan.yaml", *flags, "--output_dir", tmp_path / "out") == 0
    assert len(scored) == 3 and found["tokens"] == sum(work.tokens for work in scored)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "model_name_or_path is missing"),
        (["{home}/start"], "dataset_name is missing"),
        (["a", "b", "c"], "unexpected argument 'c'"),
        (["{home}/start", "{home}/train.jsonl", "--num_processes", "0"], "'0' is not a whole number above 0"),
        (["{home}/start", "{home}/train.jsonl", "--accelerate_config", "no.yaml"], "no.yaml is no file"),
        (["{home}/start", "{home}/train.jsonl", "--sp_size", "2"], "sp_size=2 needs a multiple of 2 processes"),
        (["{home}/start", "{home}/train.jsonl", "--dataset_streaming", "--max_steps", "3"], "rows of a stream"),
        (["{home}/start", "{home}/train.jsonl", "--picture", "plan.txt"], "must end in .png or .svg"),
        (["{home}/start", "{home}/train.jsonl", "--adapter_name_or_path", "{home}/start"], "holds no adapter"),
        (["{home}/start", "{home}/train.jsonl", "--max_tokens_per_batch", "4"], "more than max_tokens_per_batch=4"),
    ],
)
def test_mistakes(home, capsys, argv, message):
    assert cli.main(["plan", *(word.format(home=home) for word in argv)]) == 2
    assert message in capsys.readouterr().err
