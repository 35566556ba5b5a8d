"""Tests of the options of ``cpt-train`` from YAML and flags: values, error messages and ``--help``."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from transformers import TrainingArguments

from cpt_kernels.cli import options as arguments
from cpt_kernels.cli.option_table import option_table
from cpt_kernels.cli.parsing import convert, parse
from cpt_kernels.config import ContrastiveConfig
from tests.helpers import ROOT
from tests.helpers.command import NEEDED, one_error, run, write_options


def test_flags_override_the_file(tmp_path):
    file = write_options(tmp_path / "run.yaml", beta=0.3, max_steps=7, model_name_or_path="from/file")
    options = parse(["--config", str(file), "--beta", "0.5", "--dataset-name=d.jsonl", "--no_disable_dropout"])
    assert (options.training.beta, options.training.max_steps) == (0.5, 7)
    assert options.model.model_name_or_path == "from/file" and options.script.dataset_name == "d.jsonl"
    assert options.training.disable_dropout is False and options.training.output_dir == "file-CPT"


@pytest.mark.parametrize(
    ("name", "written", "read"),
    [
        ("learning_rate", "1e-5", 1e-5),  # YAML 1.1 reads it as text
        ("learning_rate", "1", 1.0),
        ("max_length", "null", None),
        ("bf16", "false", False),
        ("eval_strategy", "no", "no"),  # YAML reads it as false
        ("share_prompts", "true", "true"),
        ("lora_target_modules", "all-linear", ["all-linear"]),
        ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("report_to", "none", "none"),
        ("gradient_checkpointing_kwargs", "{use_reentrant: false}", {"use_reentrant": False}),
        ("model_init_kwargs", "'{\"x\": 1}'", {"x": 1}),
        ("columns", "{question: prompt, chosen: chosen}", ["question=prompt", "chosen=chosen"]),
        ("curriculum", "{schedule: linear, levels: [a>b, a>c]}", {"schedule": "linear", "levels": ["a>b", "a>c"]}),
        ("resume_from_checkpoint", "true", "true"),
        ("model_init_kwargs", "{min_lr: 1e-5, eta: +2E3, name: e5}", {"min_lr": 1e-5, "eta": 2e3, "name": "e5"}),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("run_name", "2024", "2024"),
    ],
)
def test_yaml_values(tmp_path, name, written, read):
    (tmp_path / "run.yaml").write_text(f"{name}: {written}\nuse_peft: true\n")
    assert parse([*NEEDED, "--config", str(tmp_path / "run.yaml")]).values[name] == read


@pytest.mark.parametrize(
    ("flags", "name", "read"),
    [
        (["--max_length", "none"], "max_length", None),
        (["--eval_on_start"], "eval_on_start", True),
        (["--eval-on-start", "false"], "eval_on_start", False),
        (["--columns", "question=prompt", "chosen"], "columns", ["question=prompt", "chosen"]),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--report_to", "none"], "report_to", "none"),
        (["--model_init_kwargs", '{"x": 1}'], "model_init_kwargs", {"x": 1}),
        (["--curriculum", '{"levels": 2}'], "curriculum", {"levels": 2}),
    ],
)
def test_flag_values(flags, name, read):
    assert parse([*NEEDED, *flags]).values[name] == read


@pytest.mark.parametrize(
    ("flags", "reshards", "offloads"),
    [
        (["--fsdp"], True, False),
        (["--fsdp", "full_shard auto_wrap"], True, False),
        (["--fsdp", "shard_grad_op offload auto_wrap"], False, True),
        (["--fsdp", "true", "--fsdp_config", '{"reshard_after_forward": false, "cpu_offload": true}'], False, True),
    ],
)
def test_fsdp_as_flags(flags, reshards, offloads):
    plugin = parse([*NEEDED, *flags]).training.fsdp_plugin_args
    assert plugin["fsdp_version"] == 2 and plugin["reshard_after_forward"] is reshards
    assert plugin.get("cpu_offload", False) is offloads


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_needs_its_package(tmp_path, capsys):
    (tmp_path / "ds.json").write_text("{}")
    assert run(*NEEDED, "--deepspeed", tmp_path / "ds.json") == 2
    assert "deepspeed needs the deepspeed package: pip install deepspeed" in one_error(capsys)


def test_the_saved_options_are_the_options(tmp_path):
    options = parse([*NEEDED, "--beta", "0.7", "--max_length", "none", "--columns", "a=b", "--hub_token", "secret"])
    (tmp_path / "saved.yaml").write_text(options.to_yaml())
    assert "secret" not in options.to_yaml()
    again = parse(["--config", str(tmp_path / "saved.yaml")])
    assert again.values == options.values | {"hub_token": None}


def test_every_option_is_shown_in_one_group_and_ours_come_first(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    out = capsys.readouterr().out
    first = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert len(first) == len(set(first))
    assert set(first) == {
        "--config",
        *(f"--{name}" for name in option_table().options),
    }
    titles = list(arguments.groups())
    places = [out.index(f"\n{title}:") for title in titles]
    assert places == sorted(places) and titles[-1].endswith("TrainingArguments")
    ours = set(arguments.NAMES[ContrastiveConfig]) - set(TrainingArguments.__dataclass_fields__)
    assert not ours.intersection(arguments.groups()[titles[-1]])
    assert max(map(len, out.splitlines())) <= 120


def test_several_losses_in_flags_and_in_the_file(tmp_path):
    (tmp_path / "run.yaml").write_text("loss_type: [sigmoid, sft]\nloss_weights: [1, 0.2]\n")
    flags = ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2"]
    for argv in (["--config", str(tmp_path / "run.yaml")], flags):
        loss = parse([*NEEDED, *argv]).training.build_loss()
        assert loss.name == "sigmoid + 0.2 sft"
    assert parse([*NEEDED, "--loss_type", "ipo"]).training.loss_type == ["ipo"]


def test_convert_names_the_types_that_it_expects():
    with pytest.raises(ValueError, match="a whole number or text"):
        convert([1], arguments.kinds_of(int | str | None))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("betta: 1", "run.yaml: unknown option betta; did you mean beta?"),
        ("beta: high", "run.yaml: beta: 'high' is not a number"),
        ("beta: .nan", "beta: nan is not a number"),
        ("beta: null", "beta: None is not a number"),
        ("beta: [0.1, 0.2]", "beta: [0.1, 0.2] is not a number"),
        ("max_steps: ten", "max_steps: 'ten' is not a whole number"),
        ("max_steps: 10.5", "max_steps: 10.5 is not a whole number"),
        ("max_steps: true", "max_steps: True is not a whole number"),
        ("bf16: maybe", "bf16: 'maybe' is not true or false"),
        ("loss_type: sigmod", "loss_type='sigmod' is unknown: choose one of sigmoid, sigmoid_norm, hinge"),
        ("dtype: bf16", "dtype: 'bf16' is not one of auto, bfloat16, float16, float32; did you mean bfloat16?"),
        ("eval_strategy: step", "did you mean steps?"),
        ("parallelism_config: {tp_size: 2}", "parallelism_config cannot be set here: set sp_size"),
        ("use_peft: true\nbnb_4bit_quant_type: fp4", "bnb_4bit_quant_type has no effect without load_in_4bit=true"),
        ("use_peft: true\nlora_task_type: SEQ_CLS", "lora_task_type: 'SEQ_CLS' is not one of CAUSAL_LM"),
        ("slic_delta: 2", "slic_delta has no effect on loss_type 'sigmoid'"),
        ("loss_type: [sigmoid, sftt]", "loss_type='sftt' is unknown"),
        ("loss_type: [sigmoid, sft]\nloss_weights: 1", "loss_weights has 1 weights for the 2 losses"),
        (
            "target_column: best",
            "target_column has no effect with loss_type=sigmoid: leave it out, or set loss_type=slic",
        ),
        ("loss_type: [ipo, sft]\ngap_column: x", "gap_column has no effect with loss_type=ipo sft"),
        ("rpo_alpha: 1.0", "run.yaml: rpo_alpha was removed: set loss_type=[sigmoid, sft] and loss_weights"),
        ("loss_type: sft\nref_model_name_or_path: x", "ref_model_name_or_path has no effect with loss_type=sft"),
        ("lora_r: 4", "set use_peft=true"),
        ("load_in_4bit: true", "load_in_4bit needs use_peft=true"),
        ("dataset_streaming: true", "needs max_steps"),
        ("from_scratch: true\nmodel_init_kwargs: {x: 1}", "from_scratch=true, which loads no weights"),
        ("beta: 0.1\n  max_steps: 3", "run.yaml, line 2: mapping values are not allowed here"),
        ("beta: 0.1\nseed: 1\nbeta: 0.2", "run.yaml, line 3: beta is given twice"),
        ("- beta", "expected lines of 'option: value', found list"),
        ("model_init_kwargs: '{x}'", "is not a JSON object"),
        ("curriculum: {schedule: linar, levels: 2}", "curriculum: schedule='linar' is unknown: choose one of linear"),
        ("curriculum: {schedule: linear, level: 2}", "curriculum has no key 'level': its keys are levels, schedule"),
        ("curriculum: linear", "curriculum='linear' is not a JSON object"),
        ("curriculum: {levels: 2}\ntrain_sampling_strategy: sequential", "leave train_sampling_strategy at random"),
    ],
)
def test_wrong_options_in_the_file(tmp_path, capsys, written, message):
    (tmp_path / "run.yaml").write_text(written + "\n")
    assert run(*NEEDED, "--config", tmp_path / "run.yaml") == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--betta", "1"], "unknown option --betta; did you mean --beta?"),
        (["--learning-rat=1"], "did you mean --learning_rate?"),
        (["--beta", "high"], "--beta: 'high' is not a number"),
        (["--beta"], "--beta: expected one argument"),
        (["run.yaml"], "did you mean --config run.yaml?"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read (No such file or directory)"),
        (["--label_smoothing", "0.9"], "flip probability"),
        (["--reference_free"], "--reference_free was removed: set loss_type=cpo"),
        (["--max_prompt_length", "512"], "--max_prompt_length was removed: set max_length"),
        (["--bf16", "--fp16", "--use_cpu"], "fp16 and bf16"),
    ],
)
def test_wrong_flags(capsys, flags, message):
    assert run(*NEEDED, *flags) == 2
    assert message in one_error(capsys)


@pytest.mark.parametrize("missing", [0, 2])
def test_model_and_data_are_needed(capsys, missing):
    assert run(*NEEDED[missing : missing + 2]) == 2
    assert "is missing: give --" in one_error(capsys)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples").glob("*.yaml")), ids=str)
def test_recipes_are_valid(recipe):
    losses = {"sft": "sft", "dpo": "sigmoid", "curriculum": "sigmoid"}
    assert parse(["--config", str(recipe)]).training.loss_type == [losses[recipe.stem]]
