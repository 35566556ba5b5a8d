"""Tests of ``cpt-train`` on several processes: options for the launcher, and two processes compared with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as launch_module
from accelerate.commands.config import config_args

from cpt_kernels.cli import launch
from cpt_kernels.cli.option_table import option_table
from cpt_kernels.errors import UserError
from tests.helpers import ROOT
from tests.helpers.command import (
    bpe_tokenizer,
    one_error,
    read_metrics,
    run,
    word_pairs,
    write_model,
    write_options,
    write_rows,
)


def test_options_of_the_trainer_are_not_passed_on():
    argv = [
        "--num-processes",
        "2",
        "--bf16",
        "--learning_rate=1e-5",
        "--mixed_precision=bf16",
        "--multi_gpu",
        "--seed",
        "3",
    ]
    options, rest = launch.split(argv, option_table().launch)
    assert options == {"num_processes": "2", "mixed_precision": "bf16", "multi_gpu": None}
    assert rest == ["--bf16", "--learning_rate=1e-5", "--seed", "3"]
    file = {"num_machines": 2, "use_fsdp": True, "multi_gpu": False, "learning_rate": 1e-5, "env": {"A": 1}}
    assert launch.of_file(file, option_table().launch) == {"num_machines": "2", "use_fsdp": None}
    with pytest.raises(ValueError, match="--num_processes: expected a value"):
        launch.split(["--num_processes"], option_table().launch)


@pytest.mark.parametrize("name", launch.CONFIGS)
def test_configurations_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(launch.CONFIGS[name]))
    assert config.num_machines == 1
    if "fsdp" in name:
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False  # ranks load slices
    if "zero" in name:
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        assert config.deepspeed_config["zero3_init_flag"] is (name == "zero3")


def test_configurations_are_those_of_trl_but_for_fsdp1():
    trl = pytest.importorskip("trl")
    theirs = {path.stem for path in Path(trl.__file__).with_name("accelerate_configs").glob("*.yaml")}
    assert theirs - set(launch.CONFIGS) == {"fsdp1"}


def test_an_unknown_configuration(tmp_path, capsys):
    assert run("--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--accelerate_config", "fsdp3") == 2
    assert "accelerate_config=fsdp3 is no file: give a file, or one of fsdp2, multi_gpu" in one_error(capsys)


@pytest.mark.parametrize(("text", "message"), [("a: [1", "mine.yaml: while parsing"), ("[1]", "mine.yaml must hold")])
def test_a_broken_configuration(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        launch.launch({"accelerate_config": str(tmp_path / "mine.yaml")}, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_processes": "2"}, True),
        ({"accelerate_config": "multi_gpu"}, False),
        ({"config_file": str(launch.CONFIGS["multi_gpu"])}, False),
    ],
)
def test_accelerate_gets_its_defaults_unless_a_file_has_them(tmp_path, monkeypatch, options, said):
    given = []
    monkeypatch.setattr(launch_module, "launch_command", given.append)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(launch.os, "environ", dict(os.environ))
    launch.launch(options, ["--beta", "1"])
    found = {given[0].num_machines, given[0].mixed_precision, given[0].dynamo_backend}
    assert found == ({1, "no"} if said else {None})


@pytest.mark.parametrize(("outcome", "code"), [("0", 0), ("2", 2), ("1 / 0", 1)])
def test_a_rank_that_succeeds_skips_the_teardown_of_the_interpreter(tmp_path, outcome, code):
    """The exit functions of other libraries run and nothing printed is lost, whatever the teardown would do."""
    script = f"""
import atexit, os, pathlib, sys
from cpt_kernels import cli
def command(command, argv, prog):
    atexit.register(pathlib.Path("tracker").touch)
    sys.stdout.write("last words")
    return {outcome}
cli._execute = command
class Thread:  # stands for a thread that gets no GIL any more
    def __del__(self, write=os.write):
        write(1, b"teardown")
thread = Thread()
sys.exit(cli.train_main())
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "tracker").exists() and "last words" in done.stdout
    assert ("teardown" in done.stdout) == (code != 0)


def test_two_launched_processes_take_the_steps_of_one(tmp_path):
    """The number of processes, a mixture of datasets and an environment variable come from the file."""
    pairs = word_pairs(24)
    write_model(tmp_path / "start", bpe_tokenizer(text for row in pairs for text in row.values()))
    write_rows(tmp_path / "a.jsonl", pairs[:12])
    write_rows(tmp_path / "b.jsonl", pairs[12:])
    options = {
        "model_name_or_path": str(tmp_path / "start"),
        "from_scratch": True,
        "datasets": [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}],
        "env": {"CPT_CACHE": str(tmp_path / "reference")},
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "use_cpu": True,
    }  # fmt: skip
    for name, processes, batch_size in (("one", {}, 8), ("two", {"num_processes": 2}, 4)):
        changes = {"output_dir": str(tmp_path / name), "per_device_train_batch_size": batch_size}
        file = write_options(tmp_path / f"{name}.yaml", **options, **processes, **changes)
        command = [sys.executable, "-m", "cpt_kernels.cli", "train", "--config", str(file)]
        root = ROOT
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "not passed to `accelerate launch`" not in done.stderr
    one, two = ([r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("one", "two"))
    assert len(one) == 6 and two == pytest.approx(one, abs=1e-4)
    saved = yaml.safe_load((tmp_path / "two" / "training_config.yaml").read_text())
    assert "num_processes" not in saved and len(saved["datasets"]) == 2
    assert (tmp_path / "reference").is_dir()
