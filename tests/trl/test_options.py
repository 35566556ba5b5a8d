"""Every option of `trl dpo` exists here and makes the same adapters, quantization and data."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from cpt_kernels import DPOTrainer
from cpt_kernels.cli import models as models_module
from cpt_kernels.cli import parsing
from cpt_kernels.cli import run as run_module
from cpt_kernels.cli.option_table import option_table
from cpt_kernels.cli.parsing import parse
from cpt_kernels.data.other_options import REMOVED_OPTIONS
from tests.helpers.command import NEEDED, bpe_tokenizer, read_metrics, run, word_pairs, write_model, write_rows

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")
dpo = pytest.importorskip("trl.scripts.dpo")

# A file as in TRL's documentation and recipes, with options of theirs that have no effect here.
YAML = """
model_name_or_path: {home}/model
model_revision: main
dtype: float32
attn_implementation: sdpa
trust_remote_code: false

dataset_name: {home}/data
dataset_train_split: train
dataset_test_split: test

use_peft: true
lora_r: 8
lora_alpha: 16
lora_dropout: 0.0
lora_target_modules: [q_proj, v_proj]
lora_task_type: CAUSAL_LM

output_dir: {home}/out
learning_rate: 5.0e-3
lr_scheduler_type: cosine
warmup_steps: 0.1
num_train_epochs: 1
max_steps: 4
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
gradient_accumulation_steps: 1
gradient_checkpointing: true
gradient_checkpointing_kwargs: {{use_reentrant: false}}
beta: 0.1
loss_type: sigmoid
max_length: 64
dataset_num_proc: 1
remove_unused_columns: false
padding_free: false
precompute_ref_log_probs: false
eval_strategy: steps
eval_steps: 2
logging_steps: 1
save_strategy: "no"
report_to: none
disable_tqdm: true
do_eval: true
use_cpu: true
bf16: false
seed: 42
"""


def trl_actions() -> dict:
    return {action.dest: action for action in dpo.make_parser()._actions if action.dest != "help"}


def test_no_option_of_trl_dpo_is_missing():
    ours = {*option_table().defaults, *parsing._ALIASES, *option_table().refused}
    assert sorted(set(trl_actions()) - ours) == []
    # The value of parallelism_config cannot be written as text.
    assert sorted(trl_actions().keys() & option_table().refused.keys()) == ["parallelism_config"]
    assert not REMOVED_OPTIONS.keys() & trl_actions().keys()


def test_no_argument_of_trls_constructor_is_missing():
    theirs, ours = (list(inspect.signature(cls.__init__).parameters) for cls in (trl.DPOTrainer, DPOTrainer))
    assert ours[: len(theirs)] == theirs  # in the same order


@pytest.mark.parametrize("name", ["_prepare_dataset", "compute_ref_log_probs", "compute_loss", "evaluate", "log"])
def test_methods_that_users_override_are_called_as_trls(name):
    theirs, ours = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (trl.DPOTrainer, DPOTrainer))
    assert ours == theirs


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--lora_r", "4", "--lora_alpha", "4", "--use_rslora", "--lora_target_modules", "all-linear"],
        ["--use_dora", "--lora_modules_to_save", "lm_head", "--lora_target_modules", "q_proj", "v_proj"],
        ["--lora_target_parameters", "self_attn.q_proj.weight", "--lora_dropout", "0.0"],
        ["--lora_target_modules", r".*self_attn\.(q|v)_proj"],
    ],
)
def test_adapters_are_trls(flags):
    flags = ["--use_peft", *flags]
    ours = run_module._lora(parse([*NEEDED, *flags]).model)
    _, _, model, _ = dpo.make_parser().parse_args_and_config(
        ["--output_dir", "x", "--use_cpu", "--bf16", "false", *flags]
    )
    theirs = trl.get_peft_config(model)
    assert ours.to_dict() == theirs.to_dict()


def test_quantisation_is_trls(monkeypatch):
    flags = [
        "--use_peft",
        "--load_in_4bit",
        "--bnb_4bit_quant_type",
        "fp4",
        "--use_bnb_nested_quant",
        "--dtype",
        "bfloat16",
    ]
    flags += ["--bnb_4bit_quant_storage", "bfloat16"]
    options = parse([*NEEDED, *flags])
    monkeypatch.setattr(models_module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="need the bitsandbytes package: pip install bitsandbytes"):
        models_module.quantization_config(options.model, options.training)
    monkeypatch.setattr(models_module, "find_spec", lambda _: True)
    _, _, model, _ = dpo.make_parser().parse_args_and_config(
        ["--output_dir", "x", "--use_cpu", "--bf16", "false", *flags]
    )
    ours, theirs = (
        models_module.quantization_config(options.model, options.training),
        trl.get_quantization_config(model),
    )
    assert ours.to_dict() == theirs.to_dict()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("trl-options")
    pairs = word_pairs(24)
    write_model(home / "model", bpe_tokenizer(text for row in pairs for text in row.values()))
    set_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / "model")).save_pretrained(home / "model")
    (home / "data").mkdir()
    write_rows(home / "data" / "train.jsonl", pairs[:16])
    write_rows(home / "data" / "test.jsonl", pairs[16:])
    (home / "dpo.yaml").write_text(YAML.format(home=home))
    return home


def test_a_yaml_file_for_trl_dpo(home, tmp_path, monkeypatch, capsys):
    """Both commands read the same file, and log the same losses and save an adapter of the same shapes."""
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    flags = ["--config", str(home / "dpo.yaml"), "--train_sampling_strategy", "sequential"]
    assert run(*flags, "--output_dir", tmp_path / "ours", "--no_remove_unused_columns") == 0
    ours = read_metrics(tmp_path / "ours")
    parsed = dpo.make_parser().parse_args_and_config([*flags, "--output_dir", str(tmp_path / "theirs")])
    trainers = []
    monkeypatch.setattr(trl.DPOTrainer, "train", _remembering(trl.DPOTrainer.train, trainers))
    dpo.main(*parsed)
    theirs = [record for record in trainers[0].state.log_history if "loss" in record or "eval_loss" in record]
    for name in ("loss", "eval_loss"):
        values = [[record[name] for record in log if name in record] for log in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], abs=1e-4) and len(values[0]) in (2, 4)
    layouts = [{file.name for file in (tmp_path / name).iterdir()} for name in ("ours", "theirs")]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "training_args.bin"} <= layouts[0]
    assert layouts[1] <= layouts[0] | {"README.md"}
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    shapes = []
    for name in ("ours", "theirs"):
        model = PeftModel.from_pretrained(base, tmp_path / name)
        shapes.append({n: p.shape for n, p in model.named_parameters() if "lora" in n})
        base = model.unload()
    assert shapes[0] == shapes[1] and shapes[0]


def _remembering(train, trainers):
    def wrapped(self, *args, **kwargs):
        trainers.append(self)
        return train(self, *args, **kwargs)

    return wrapped
