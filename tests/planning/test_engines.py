"""Tests of a plan on several processes: its bytes are those of the shards, and its tokens those that ranks run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, LlamaConfig

from cpt_kernels import ContrastiveTrainer, cli
from cpt_kernels.cli import launch
from cpt_kernels.errors import UserError
from cpt_kernels.planning.engines import Processes
from tests.helpers.command import bpe_tokenizer, run, word_pairs, write_model, write_options, write_rows
from tests.helpers.forked import run_ranks

COMMON = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_steps": 2, "gradient_accumulation_steps": 2}
FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
    "per_device_train_batch_size": 3,
}
LORA = {"use_peft": True, "dtype": "bfloat16", "lora_r": 3, "gradient_checkpointing": False}
RUNS = {
    "full": {**FSDP, "bf16": True, "save_steps": 2},
    "lora": {**FSDP, **LORA, "bf16": True, "max_tokens_per_batch": 120},
}
DDP = {"rounded": {"use_peft": True, "bf16": True, "save_steps": 2, "per_device_train_batch_size": 2}}
RANKS = 3  # divides no dimension of the model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("engines")
    pairs = word_pairs(37)
    write_rows(home / "train.jsonl", pairs)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    write_model(home / "start", tokenizer, initializer_range=0.1)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(home / "start")).save_pretrained(home / "start")
    for name, options in (RUNS | DDP).items():
        write_options(home / f"{name}.yaml", **COMMON, **options, dataset_name=str(home / "train.jsonl"))
    return home


def argv(home: Path, name: str) -> list[str]:
    return ["--config", str(home / f"{name}.yaml"), "--model_name_or_path", str(home / "start")]


def planned(home: Path, name: str, *flags: str) -> dict:
    """Returns the part "run" of the plan of a run."""
    file = home / f"{name}.json"
    assert cli.main(["plan", *argv(home, name), "--json", str(file), *flags]) == 0
    return json.loads(file.read_text())["run"]


def trained(home: Path, names: list[str]) -> dict[str, dict]:
    """Trains on this rank. Returns the tokens of its micro-batches, and the bytes that it holds at the last step."""
    found: dict = {}
    step = ContrastiveTrainer.training_step

    def size(tensors) -> int:
        return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors if t is not None)

    def recorded(trainer, model, inputs, *args):
        found["tokens"] = [*found.get("tokens", []), inputs["input_ids"].numel()]
        found["trainer"] = trainer
        return step(trainer, model, inputs, *args)

    def after_step(optimizer, *_) -> None:
        if "trainer" not in found:  # a trial of the optimizer
            return
        weights = [*found["trainer"].packed.model.parameters()]
        moments = [v for state in optimizer.state.values() for key, v in state.items() if key.startswith("exp_avg")]
        found["bytes"] = {
            "weights": size([*weights, *found["trainer"].packed.model.buffers()]),
            "gradients": size(p.grad for p in weights),
            "optimizer": size(moments),
        }

    ContrastiveTrainer.training_step = recorded
    hook = register_optimizer_step_post_hook(after_step)
    results = {}
    for name in names:
        found.clear()
        assert run(*argv(home, name), "--output_dir", home / f"out {name}", "--ref_cache_dir", home / "ref") == 0
        results[name] = {key: value for key, value in found.items() if key != "trainer"}
    hook.remove()
    return results


def stored(checkpoint: Path) -> dict[str, int]:
    """Returns the bytes of weights and moments in a checkpoint."""
    if (checkpoint / "optimizer_0").is_dir():
        folders = {"weights": "pytorch_model_fsdp_0", "optimizer": "optimizer_0"}
        files = {part: FileSystemReader(checkpoint / folder).read_metadata() for part, folder in folders.items()}
        entries = {part: file.state_dict_metadata.items() for part, file in files.items()}
        sizes = {
            part: {name: m.size.numel() * m.properties.dtype.itemsize for name, m in all_of if hasattr(m, "properties")}
            for part, all_of in entries.items()
        }
    else:
        state = torch.load(checkpoint / "optimizer.pt")["state"]
        moments = {f"{i} {name}": value for i, of in state.items() for name, value in of.items()}
        tensors = {"weights": load_file(checkpoint / "adapter_model.safetensors"), "optimizer": moments}
        sizes = {part: {name: tensor.nbytes for name, tensor in of.items()} for part, of in tensors.items()}
    return {part: sum(size for name, size in of.items() if not name.endswith("step")) for part, of in sizes.items()}


ZERO = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
OFFLOADED = {"num_processes": "3", "accelerate_config": "fsdp2", "fsdp_offload_params": "true"}
REPLICATED = {"num_processes": "8", "use_fsdp": None, "fsdp_version": "2", "use_parallelism_config": None}
REPLICATED |= {"parallelism_config_dp_replicate_size": "2", "parallelism_config_sp_size": "4"}


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({}, {}, Processes()),
        ({"num_processes": "3"}, {}, Processes(3)),
        ({"num_processes": "4"}, {"sp_size": 2}, Processes(4, 2)),
        ({"num_processes": "3", "use_fsdp": None, "fsdp_version": "2"}, {}, Processes(3, engine="FSDP2")),
        (OFFLOADED, {}, Processes(3, 1, 1, "FSDP2", True, True)),
        (REPLICATED, {}, Processes(8, 4, 2, "FSDP2")),
        ({"num_processes": "2", "accelerate_config": "zero1"}, {}, Processes(2, engine="ZeRO-1")),
        ({"num_processes": "2", "accelerate_config": "zero3"}, {}, Processes(2, engine="ZeRO-3")),
        ({"num_processes": "2"}, {"deepspeed": ZERO}, Processes(2, 1, 1, "ZeRO-2", False, True)),
        ({"num_processes": "2"}, {"fsdp": "full_shard"}, Processes(2, engine="FSDP2")),
        ({"num_processes": "2"}, {"fsdp": "shard_grad_op offload"}, Processes(2, 1, 1, "FSDP2", True, True, True)),
        (
            {"num_processes": "2"},
            {"fsdp": True, "fsdp_config": {"fsdp_reshard_after_forward": False}},
            Processes(2, engine="FSDP2", keeps_layers=True),
        ),
        # accelerate reads sizes only with use_parallelism_config, which a file without them unsets.
        ({"num_processes": "4", "parallelism_config_dp_replicate_size": "2"}, {}, Processes(4)),
        (
            {"num_processes": "2"},
            {"fsdp": True, "fsdp_config": {"reshard_after_forward": False, "cpu_offload": True}},
            Processes(2, 1, 1, "FSDP2", True, True, keeps_layers=True),
        ),
    ],
)
def test_processes_are_read_where_the_launcher_reads_them(options, given, expected):
    assert launch.planned_processes(options, given) == expected and not given


def test_the_launcher_s_mixed_precision_is_that_of_the_run():
    given: dict = {}
    launch.planned_processes({"num_processes": "2", "mixed_precision": "bf16"}, given)
    assert given == {"bf16": True}


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"use_fsdp": None}, {}, "FSDP1 is not supported"),
        ({}, {"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1 is not supported"),
        ({}, {"fsdp": True, "fsdp_config": {"offload_params": True}}, "transformers calls it cpu_offload"),
        ({}, {"fsdp": "hybrid_shard"}, "fsdp=hybrid_shard is not supported"),
        ({}, {"fsdp": True, "deepspeed": ZERO}, "exclude each other"),
        ({}, {"deepspeed": {"zero_optimization": {"stage": "auto"}}}, "stage='auto' of zero_optimization must be"),
        ({}, {"deepspeed": {"zero_optimization": {"stage": 7}}}, "stage=7 of zero_optimization must be"),
        ({}, {"deepspeed": {"zero_optimization": []}}, "must be JSON objects"),
        ({}, {"deepspeed": {"zero_optimization": {"offload_param": "cpu"}}}, "must be JSON objects"),
        ({}, {"deepspeed": {"gradient_accumulation_steps": 4}}, "contradicts gradient_accumulation_steps=1"),
        ({}, {"sp_size": 0}, "sp_size=0 must be at least 1"),
        ({"num_machines": "3"}, {}, "num_machines=3 must divide it"),
    ],
)
def test_a_launch_that_training_would_refuse(options, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        launch.planned_processes({"num_processes": "2", **options}, given)


@pytest.mark.parametrize("runs", [RUNS, DDP], ids=["fsdp2", "ddp"])
def test_bytes_are_those_of_the_shards_and_tokens_those_of_the_ranks(home, runs):
    ranks = run_ranks(home, RANKS, trained, home, [*runs])
    for name in runs:
        plan = planned(home, name, "--num_processes", str(RANKS))
        found = [rank[name] for rank in ranks]
        assert {part: plan["bytes"][part] for part in ("weights", "gradients", "optimizer")} == found[0]["bytes"], name
        if runs is DDP:
            assert plan["bytes"]["engine"] == plan["bytes"]["gradients"]  # buckets
        tokens = torch.tensor([rank["tokens"] for rank in found])
        assert plan["steps"] == 2 and plan["micro_batches"] == tokens.shape[1] and plan["processes"] == RANKS
        assert plan["work"]["tokens"] == tokens.sum() and plan["largest"]["tokens"] == tokens.max()
        assert plan["idle"] == pytest.approx(float(1 - tokens.double().mean() / tokens.double().amax(0).mean()))
        if "save_steps" in runs[name]:
            assert stored(home / f"out {name}" / "checkpoint-2") == plan["checkpoint"], name


def test_a_sequence_group_shares_the_activations_of_a_micro_batch(home):
    alone, group = (planned(home, "full", "--num_processes", "4", "--sp_size", size) for size in ("1", "2"))
    assert group["bytes"] == alone["bytes"] and group["checkpoint"] == alone["checkpoint"]
    assert (
        group["largest"] == alone["largest"] and group["pairs"] == 2 * 2 * 2 * 3
    )  # groups, steps, micro-batches, rows
    way = "with checkpointing"
    whole, part = (run["memory"][way] for run in (alone, group))
    assert part["activations"] == whole["activations"] // 2
    assert whole["peak"] - part["peak"] == whole["activations"] - part["activations"]
