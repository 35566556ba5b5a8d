"""Wrong inputs of every command: exit code 2, and one message that names the option, file or row, and the mend.

All cases run in this process. An option of ``cpt-train`` that is wrong by itself is refused before the data is read,
and wrong data before anything is tokenized.
"""

from __future__ import annotations

import errno
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer, cli
from cpt_kernels.cli import run as run_module
from cpt_kernels.cli.parsing import parse
from cpt_kernels.data import preparation
from cpt_kernels.errors import UserError
from tests.helpers.command import bpe_tokenizer, word_pairs, write_model, write_rows


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with models, pairs, responses, outputs and judges."""
    home = tmp_path_factory.mktemp("inputs")
    pairs = word_pairs(12)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    model = AutoModelForCausalLM.from_config(_config(write_model(home / "model", tokenizer)))
    model.save_pretrained(home / "model")
    write_model(home / "start", tokenizer)
    for name, config in (
        ("gpt2", GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=1)),
        ("t5", T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    ):
        tokenizer.save_pretrained(home / name)
        config.save_pretrained(home / name)
    GPT2LMHeadModel(GPT2Config.from_pretrained(home / "gpt2")).save_pretrained(home / "gpt2")
    _damage(home, tokenizer)
    _write_data(home, pairs)
    (home / "empty").mkdir()
    _write_adapters(home, model)
    return home


def _config(folder: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _write_adapters(home: Path, model) -> None:
    """Writes an adapter, one with damaged weights, one without weights, and one of a model that is not there."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.base_model.model.config._name_or_path = adapted.peft_config["default"].base_model_name_or_path = str(
        home / "model"
    )
    for name in ("lora", "torn_lora", "half_lora", "other_lora"):
        adapted.save_pretrained(home / name)
    weights = home / "torn_lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:99])
    (home / "half_lora" / "adapter_model.safetensors").unlink()
    config = home / "other_lora" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(home / "model"), str(home / "gone")))


def _damage(home: Path, tokenizer) -> None:
    """Writes models with damaged weights, weights of another shape, and a damaged config."""
    for name in ("torn", "shape", "config"):
        write_model(home / name, tokenizer)
    weights = (home / "model" / "model.safetensors").read_bytes()
    (home / "torn" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    write_model(home / "shape", tokenizer, hidden_size=64)
    (home / "shape" / "model.safetensors").write_bytes(weights)
    (home / "config" / "config.json").write_text("{")


def _write_data(home: Path, pairs: list[dict[str, str]]) -> None:
    write_rows(home / "train.jsonl", pairs)
    write_rows(home / "models.jsonl", [row | {"chosen_model": "a", "rejected_model": "b"} for row in pairs])
    # The third line has an empty side, so the longest row is the second one that is kept, in line 4.
    long = {"prompt": "the sky " * 40, "chosen": " is blue", "rejected": " is grey"}
    write_rows(home / "long.jsonl", [*pairs[:2], pairs[2] | {"chosen": ""}, long])
    (home / "torn.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "cho\n')
    write_rows(home / "other.jsonl", [{"number": 1, "label": "x"}])
    write_rows(home / "orca.jsonl", [{"question": "a", "context": "b", "chosen": "c", "rejected": "d"}])
    (home / "nothing.jsonl").touch()
    (home / "notes.txt").write_text("hello\n")
    responses = [
        {"prompt": row["prompt"], "model": model, "response": row[side], "rating": number}
        for row in pairs
        for number, (model, side) in enumerate((("b", "rejected"), ("a", "chosen")))
    ]
    write_rows(home / "responses.jsonl", responses)
    write_rows(home / "a.jsonl", [row for row in responses if row["model"] == "a"])
    write_rows(home / "b.jsonl", [row for row in responses if row["model"] == "b"])
    (home / "options.yaml").write_text("beta: 0.1\n")
    (home / "wrong_judges.py").write_text(
        "def fails(prompt, output_1, output_2):\n    return 1 / 0\n\n\n"
        "def scores(prompt, output_1, output_2):\n    return 7\n\n\n"
        "def none(prompt, output_1, output_2):\n    return None\n\n\nnumber = 3\n"
    )
    (home / "broken_judges.py").write_text("import no_such_package\n")


def attempt(argv: list[str], capsys) -> tuple[int, str]:
    """Runs ``cpt`` with ``argv``; returns the exit code and the only line of the error."""
    capsys.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse's own end would print its usage
        pytest.fail(f"the command ended by SystemExit({end.code})")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt")]
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return code, lines[0]


def fill(words: str, home: Path, tmp: Path) -> list[str]:
    """Returns the arguments in ``words``, separated by blanks; ``~~`` stands for a blank inside an argument."""
    return [word.replace("~~", " ").format(home=home, tmp=tmp) for word in words.split()]


# --- cpt train ---

_TRAIN = "train --model_name_or_path {home}/model --dataset_name {home}/train.jsonl --output_dir {tmp}/out --use_cpu"
_TRAIN += " --disable_tqdm --report_to none --max_steps 2"

# Options -> the message. These are answered before the data is read.
_WRONG_OPTIONS = {
    # numbers
    "--learning_rate -1e-3": "learning_rate=-0.001: must not be negative",
    "--learning_rate=-1": "learning_rate=-1.0: must not be negative",
    "--learning_rate nan": "--learning_rate: 'nan' is not a number",
    "--learning_rate inf": "--learning_rate: 'inf' is not a number",
    "--learning_rate fast": "--learning_rate: 'fast' is not a number",
    "--beta 0": "beta=0.0: must be positive",
    "--beta -.5e0": "beta=-0.5: must be positive",
    "--beta nan": "'nan' is not a number",
    "--label_smoothing 0.7": "a flip probability",
    "--max_steps 0": "max_steps=0: must be positive, or -1 to train for num_train_epochs",
    "--max_steps -5": "max_steps=-5: must be positive",
    "--max_steps -1 --num_train_epochs 0": "num_train_epochs=0.0: must be positive",
    "--max_steps -1 --num_train_epochs -2": "num_train_epochs=-2.0: must be positive",
    "--max_steps 1.5": "--max_steps: '1.5' is not a whole number",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps=0: must be positive",
    "--per_device_train_batch_size 0": "per_device_train_batch_size=0: must be positive",
    "--per_device_eval_batch_size -1": "per_device_eval_batch_size=-1: must be positive",
    "--max_length 0": "max_length=0: must be positive",
    "--max_length -5": "max_length=-5: must be positive",
    "--max_tokens_per_batch 0": "max_tokens_per_batch=0: must be positive",
    "--max_tokens_per_batch -1": "max_tokens_per_batch=-1: must be positive",
    "--head_memory_mb 0": "head_memory_mb=0.0: must be positive",
    "--weight_decay -0.1": "weight_decay=-0.1: must not be negative",
    "--warmup_steps 1.5": "warmup_steps=1.5: must be a whole number of steps, or below 1 a share",
    "--warmup_steps -1": "warmup_steps=-1.0: must not be negative",
    "--max_grad_norm -1": "max_grad_norm=-1.0: must not be negative",
    "--adam_beta1 1": "adam_beta1=1.0: must lie in [0, 1)",
    "--adam_beta2 -0.1": "adam_beta2=-0.1: must lie in [0, 1)",
    "--adam_epsilon 0": "adam_epsilon=0.0: must be positive",
    "--logging_steps 0": "logging_steps=0.0: must be positive",
    "--logging_steps -10": "logging_steps=-10.0: must be positive",
    "--save_steps 0": "save_steps=0.0: must be positive",
    "--eval_strategy steps --eval_steps -1": "eval_steps=-1.0: must be positive",
    "--save_total_limit 0": "save_total_limit=0: must be positive, or not set",
    "--seed -1": "seed=-1: must not be negative",
    "--dataset_num_proc 0": "dataset_num_proc=0: must be positive",
    "--dataloader_num_workers -1": "dataloader_num_workers=-1: must not be negative",
    "--dataloader_prefetch_factor 2": "dataloader_prefetch_factor has no effect without dataloader_num_workers",
    "--neftune_noise_alpha -1": "neftune_noise_alpha=-1.0: must not be negative",
    "--sync_ref_model --ref_model_sync_steps 0": "ref_model_sync_steps=0: must be positive",
    "--sync_ref_model --ref_model_mixup_alpha 2": "ref_model_mixup_alpha=2.0: must lie in [0, 1]",
    "--use_peft --lora_r 0": "lora_r=0: must be positive",
    "--use_peft --lora_alpha -1": "lora_alpha=-1: must be positive",
    "--use_peft --lora_dropout 1": "lora_dropout=1.0: must lie in [0, 1)",
    "--test_split_size 0": "test_split_size=0.0: give a share of the rows below 1, or a whole number of rows",
    "--test_split_size 1.5": "test_split_size=1.5: give a share",
    "--val_size -2": "test_split_size=-2.0: give a share",
    "--val_set_size 0.1 --dataset_streaming": "a stream has none: split the data beforehand",
    "--test_split_size 0.1 --eval_dataset_name x": "test_split_size and eval_dataset_name both choose",
    # names of options
    "--betta 1": "unknown option --betta; did you mean --beta?",
    "--dataset_mixer x": "--dataset_mixer has another name here: set datasets",
    "--gamma_beta_ratio 0.5": "set simpo_gamma, which is gamma_beta_ratio times beta",
    "--use_lora": "--use_lora has another name here: set use_peft",
    "--lora_rank 8": "set lora_r",
    "--cutoff_len 512": "set max_length",
    "--base_model x": "set model_name_or_path",
    "--rpo_alpha 1": "--rpo_alpha was removed: set loss_type=[sigmoid, sft]",
    "--warmup_ratio 0.1": "--warmup_ratio was removed: set warmup_steps",
    "run.yaml": "did you mean --config run.yaml?",
    "--beta": "--beta: expected one argument",
    "--config {tmp}/no.yaml": "no.yaml cannot be read (No such file or directory)",
    "--config {home}/train.jsonl": "train.jsonl",
    # choices
    "--loss_type dpo": "loss_type='dpo' is unknown: choose one of sigmoid, sigmoid_norm, hinge",
    "--loss_type DPO": "; did you mean sigmoid?",
    "--loss_type dpo_norm": "did you mean sigmoid_norm?",
    "--loss_type IPO": "did you mean ipo?",
    "--loss_type simpoo": "did you mean simpo?",
    "--loss_type sigmoid sft --loss_weights 1": "loss_weights has 1 weights for the 2 losses",
    "--simpo_gamma 1": "simpo_gamma has no effect on loss_type 'sigmoid'",
    "--optim foo": "--optim: 'foo' is not one of adamw_torch, adamw_torch_fused",
    "--optim adamw_bnb_8bit": "optim=adamw_bnb_8bit: You need to install `bitsandbytes`",
    "--optim galore_adamw --optim_target_modules all-linear": "optim=galore_adamw: You need to install `galore_torch`",
    "--optim_args x": "optim_args=x: expected name=value",
    "--lr_scheduler_type cosinus": "did you mean cosine",
    "--report_to wandbb": "report_to=wandbb: wandbb is not supported; choose one of",
    "--report_to comet_ml": "report_to=comet_ml: this tracker is not installed",
    "--eval_strategy steps --metric_for_best_model foo": "metric_for_best_model=foo: there is no such metric",
    "--eval_strategy epoch --loss_type sft --metric_for_best_model rewards/margins": "there is no such metric; choose",
    "--load_best_model_at_end": "requires the save and eval strategy to match",
    "--attention_backend flash": "attention_backend='flash' is unknown",
    "--truncation_mode middle": "truncation_mode='middle' is unknown",
    "--packing maybe": "packing='maybe' is unknown",
    "--curriculum easy": "curriculum='easy' is not a JSON object",
    '--curriculum {{"levels":1}}': "curriculum: levels=1 is neither",
    '--curriculum {{"schedule":"liner","levels":2}}': "schedule='liner' is unknown",
    "--dtype float8": "--dtype: 'float8' is not one of",
    "--fp16": "fp16=true needs a GPU",
    "--accelerate_config nine": "accelerate_config=nine is no file: give a file, or one of",
    "--num_processes two": "--num_processes: 'two' is not a whole number above 0",
    "--num_processes 0": "--num_processes: '0' is not a whole number above 0",
    "--num_processes": "--num_processes: expected a value",
    "--lr_scheduler_type cosine_with_min_lr": "lr_scheduler_type=cosine_with_min_lr: One of min_lr",
    '--lr_scheduler_kwargs {{"a":1}}': "unexpected keyword argument 'a'",
    '--gradient_checkpointing_kwargs {{"foo":1}}': "gradient_checkpointing_kwargs has no keyword 'foo'",
    '--accelerator_config {{"foo":1}}': "accelerator_config has no keyword 'foo': its keywords are",
    "--torch_compile_backend foo": "torch_compile_backend=foo is unknown: choose one of",
    # options together
    "--lora_r 4": "lora_r has no effect without an adapter: set use_peft=true",
    "--load_in_4bit": "load_in_4bit needs use_peft=true",
    "--max_tokens_per_batch 512 --auto_find_batch_size": "auto_find_batch_size halves per_device_train_batch_size",
    "--ref_model_sync_steps 5": "ref_model_sync_steps has no effect without sync_ref_model=true",
    "--loss_type sft --sync_ref_model": "sync_ref_model has no effect on loss_type 'sft'",
    "--gap_column gap": "gap_column has no effect with loss_type=sigmoid",
    # models and folders
    "--model_name_or_path {tmp}/no": "model_name_or_path={tmp}/no: there is no such folder",
    "--model_name_or_path {home}/train.jsonl": "train.jsonl is a file: give the folder of a model",
    "--model_name_or_path {home}/empty": "has no config.json or adapter_config.json or tokenizer_config.json; give",
    "--model_name_or_path no/such-model": "model_name_or_path=no/such-model cannot be loaded",
    "--tokenizer_name {tmp}/no": "tokenizer_name={tmp}/no: there is no such folder",
    "--output_dir {home}/model": "is also model_name_or_path, which would be overwritten",
    "--output_dir {home}/notes.txt/out": "cannot be written to (Not a directory)",
    "--output_dir ~~": "output_dir is blank: name a folder",
    "--model_name_or_path ~~": "model_name_or_path is missing: give --model_name_or_path with a folder or hub name",
    "--output_dir /proc/cpt": "output_dir=/proc/cpt cannot be written to",
    "--ref_cache_dir {home}/notes.txt/cache": "ref_cache_dir={home}/notes.txt/cache: {home}/notes.txt is a file",
    "--resume_from_checkpoint last": "there is no checkpoint in",
    "--resume_from_checkpoint {tmp}/no": "resume_from_checkpoint={tmp}/no: there is no such folder",
}


@pytest.mark.parametrize("words", _WRONG_OPTIONS)
def test_wrong_options_are_refused_before_data_is_read(home, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(run_module, "_load_data", lambda *_: pytest.fail("data is read"))
    code, line = attempt(fill(f"{_TRAIN} {words}", home, tmp_path), capsys)
    assert code == 2 and _WRONG_OPTIONS[words].format(home=home, tmp=tmp_path) in line


_WRONG_DATA = {
    "--dataset_name {tmp}/no.jsonl": "{tmp}/no.jsonl does not exist",
    "--dataset_name {home}/empty": "holds no .json",
    "--dataset_name {home}/nothing.jsonl": "nothing.jsonl is an empty file",
    "--dataset_name {home}/torn.jsonl": "line 2",
    "--dataset_name {home}/notes.txt": "notes.txt is not a",
    "--dataset_name no/such-data": "'no/such-data' is not a local file or folder, and the hub did not return a dataset",
    "--dataset_train_split test": "only the split 'train', not 'test'",
    "--columns question=prompt": "columns names ['question'], but",
    "--columns prompt chosen rejectedd": "rename by --columns",
    "--eval_dataset_name {tmp}/no.jsonl": "{tmp}/no.jsonl does not exist",
    "--eval_strategy steps": "to evaluate, set dataset_test_split or eval_dataset_name",
    "--test_split_size 12": "test_split_size=12 of 12 rows leaves none",
    "--model_name_or_path {home}/torn": "cannot be loaded",
    "--model_name_or_path {home}/shape": "holds weights of another shape",
    "--model_name_or_path {home}/config": "cannot be loaded",
    "--model_name_or_path {home}/start": "set from_scratch=true",
    "--model_name_or_path {home}/t5": "is not a causal language model (T5Config)",
    "--model_name_or_path {home}/gpt2 --max_length 65": "max_length=65: GPT2LMHeadModel has 64 positions",
    "--attn_implementation flash_attention_2": "FlashAttention2",
    "--ref_model_name_or_path {home}/torn": "ref_model_name_or_path",
    '--model_init_kwargs {{"foo":1}}': "unexpected keyword argument 'foo'",
    "--attention_backend flash_attn": "attention backend 'flash_attn'",
}


@pytest.mark.parametrize("words", _WRONG_DATA)
def test_wrong_data_and_models_are_refused_before_tokenizing(home, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr(preparation.Tokenization, "__call__", lambda *_: pytest.fail("rows are tokenized"))
    code, line = attempt(fill(f"{_TRAIN} {words}", home, tmp_path), capsys)
    assert code == 2 and _WRONG_DATA[words].format(home=home, tmp=tmp_path) in line


_WRONG_COLUMNS = {
    "--dataset_name {home}/other.jsonl": "expected one of: ",
    "--dataset_name {home}/orca.jsonl": "looks like a prompt and would not be used",
    "--columns prompt chosen=completion": "loss 'sigmoid' needs pairs, and the train data has none",
    "--eval_dataset_name {home}/orca.jsonl": "looks like a prompt and would not be used",
    '--curriculum {{"levels":2}}': "curriculum reads the column gap",
    '--dataset_name {home}/models.jsonl --curriculum {{"levels":["a>b","a>c"]}}': "level a>c has no rows; the data has",
    "--loss_type slic --target_column sampled": "target_column names ['sampled']",
    "--loss_type odpo --gap_column size": "gap_column names ['size']",
    "--ranked_pairs all": "ranked_pairs=all has no effect",
    "--prompt_format chat": "prompt_format=chat needs a chat template",
}


@pytest.mark.parametrize("words", _WRONG_COLUMNS)
def test_wrong_columns_are_refused_before_the_model_is_loaded(home, tmp_path, monkeypatch, capsys, words):
    trainer, callbacks, _, _, data = run_module.make_trainer.__defaults__
    monkeypatch.setattr(run_module.make_trainer, "__defaults__", (trainer, callbacks, _loads, _loads, data))
    code, line = attempt(fill(f"{_TRAIN} {words}", home, tmp_path), capsys)
    assert code == 2 and _WRONG_COLUMNS[words] in line


def _loads(*_) -> None:
    pytest.fail("a model is loaded")


def test_wrong_columns_are_refused_before_the_trainer_loads_a_model(home, tmp_path, monkeypatch):
    monkeypatch.setattr("cpt_kernels.trainer.load_models", _loads)
    args = ContrastiveConfig(str(tmp_path / "out"), use_cpu=True, report_to="none")
    rows = Dataset.from_list([{"question": "a", "context": "b", "chosen": "c", "rejected": "d"}])
    with pytest.raises(UserError, match="looks like a prompt and would not be used"):
        ContrastiveTrainer(str(home / "model"), args=args, train_dataset=rows)


_WRONG_ROWS = {
    "--use_peft --lora_modules_to_save nothing": "modules_to_save names nothing, and the model has no such module",
    "--dataset_name {home}/long.jsonl --max_tokens_per_batch 32": "row 3 of the train data takes",
    "--eval_dataset_name {home}/long.jsonl --max_tokens_per_batch 32": "row 3 of the eval data takes",
    "--model_name_or_path {home}/gpt2 --dataset_name {home}/long.jsonl": "row 3 of the train data has",
    "--max_length 2": "no row can be trained on",
}


@pytest.mark.parametrize("words", _WRONG_ROWS)
def test_wrong_rows_are_refused_before_the_reference_scores(home, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr("cpt_kernels.trainer.Reference", lambda *_, **__: pytest.fail("the reference is made"))
    code, line = attempt(fill(f"{_TRAIN} {words}", home, tmp_path), capsys)
    assert code == 2 and _WRONG_ROWS[words] in line


# --- The other commands ---

_PAIRS = "pairs {home}/responses.jsonl --output {tmp}/pairs.jsonl"
_GENERATE = "generate --model_name_or_path {home}/model --dataset_name {home}/train.jsonl --output {tmp}/new.jsonl"
_EVAL = "eval pairs --models {home}/model --data {home}/train.jsonl --reference none --output_dir {tmp}/eval"
_WIN = "eval win-rate --outputs {home}/a.jsonl --baseline {home}/b.jsonl --output_dir {tmp}/eval"

_MERGE = "merge {home}/lora --output {tmp}/merged"

_PLAN = "plan {home}/model {home}/train.jsonl"

_WRONG_COMMANDS = {
    "trian": "unknown command trian; did you mean train?",
    # cpt pairs
    f"{_PAIRS}": "give one of --order",
    f"{_PAIRS} --order a>b --ratings rating": "give one of --order",
    f"{_PAIRS} --ordr a>b": "unknown option --ordr; did you mean --order?",
    f"{_PAIRS} --order a": "the order 'a' names one model: name two or more",
    f"{_PAIRS} --order a>c": "c",
    f"{_PAIRS} --ratings stars": "stars",
    f"{_PAIRS} --order a>b --validation -1": "--validation -1",
    f"{_PAIRS} --order a>b --validation 1": "expected a share",
    f"{_PAIRS} --order a>b --validation nan": "--validation nan",
    f"{_PAIRS} --order a>b --max_characters 0": "--max_characters 0: expected at least 1",
    f"{_PAIRS} --order a>b --max_tokens 5": "--max_tokens needs --tokenizer",
    f"{_PAIRS} --order a>b --num_proc 0": "--num_proc 0: expected at least 1",
    f"{_PAIRS} --order a>b --columns x": "'x' is not OLD=NEW",
    f"{_PAIRS} --order a>b --base a --pairs all": "give only one of them",
    f"{_PAIRS} --win_rates {{tmp}}/no.csv": "no.csv does not exist",
    f"{_PAIRS} --order a>b --tokenizer {{tmp}}/no": "there is no such folder",
    "pairs {home}/responses.jsonl --order a>b --output {tmp}/pairs.txt": "must end in .jsonl or .parquet",
    "pairs {home}/responses.jsonl --order a>b --output {home}/responses.jsonl": "would replace a file that is read",
    "pairs {home}/responses.jsonl --order a>b --output {home}/notes.txt/pairs.jsonl": "notes.txt",
    "pairs {home}/responses.jsonl --order a>b --output /proc/pairs.jsonl": "/proc",
    "pairs {tmp}/no.jsonl --order a>b --output {tmp}/pairs.jsonl": "no.jsonl does not exist",
    "pairs {home}/torn.jsonl --order a>b --output {tmp}/pairs.jsonl": "line 2",
    "pairs --order a>b --output {tmp}/pairs.jsonl": "SOURCE",
    # cpt generate
    f"{_GENERATE} --temprature 1": "unknown option --temprature; did you mean --temperature?",
    f"{_GENERATE} --temperature -1": "temperature",
    f"{_GENERATE} --top_p 2": "top_p",
    f"{_GENERATE} --top_k -1": "top_k",
    f"{_GENERATE} --max_new_tokens 0": "max_new_tokens",
    f"{_GENERATE} --batch_size 0": "0 is not a batch size: give a whole number, 1 or more",
    f"{_GENERATE} --batch_size many": "--batch_size",
    f"{_GENERATE} --n 2 --temperature 0": "--n 2 needs --temperature above 0",
    f"{_GENERATE} --backend vllm": "vllm was removed",
    f"{_GENERATE} --concurrency 3": "--concurrency has no effect with --backend transformers",
    f"{_GENERATE} --prompt_column question": "question",
    f"{_GENERATE} --model_kwargs x": "is not a JSON object",
    f"{_GENERATE} --device cuda:99": "cuda:99",
    f"{_GENERATE} --device gpu": "gpu",
    f"{_GENERATE} --model_name_or_path {{home}}/torn": "cannot be loaded",
    f"{_GENERATE} --model_name_or_path {{home}}/t5": "is not a causal language model (T5Config)",
    f"{_GENERATE} --dataset_name {{tmp}}/no.jsonl": "no.jsonl does not exist",
    f"{_GENERATE} --output {{home}}/notes.txt/new.jsonl": "notes.txt",
    f"{_GENERATE} --output /proc/new.jsonl": "/proc/new.jsonl",
    f"{_GENERATE} --output {{home}}/train.jsonl": "train.jsonl",
    f'{_GENERATE} --model_kwargs {{{{"foo":1}}}}': "unexpected keyword argument 'foo'",
    f"{_GENERATE} --backend openai --base_url nonsense": "base_url=nonsense: must begin with http:// or https://",
    # cpt eval
    "eval paris": "choose from",
    f"{_EVAL} --moodels x": "unknown option --moodels; did you mean --models?",
    f"{_EVAL} --confidence 2": "confidence",
    f"{_EVAL} --resamples 0": "resamples",
    f"{_EVAL} --max_length 0": "max_length=0: must be positive",
    f"{_EVAL} --columns a=b": "columns names ['a']",
    f"{_EVAL} --by nothing": "nothing",
    f"{_EVAL} --details {{tmp}}/x.txt": "expected a .jsonl or .parquet file",
    f"{_EVAL} --config {{tmp}}/no.yaml": "no.yaml cannot be read",
    f"{_EVAL} --config {{home}}/notes.txt": "notes.txt",
    f"{_EVAL} --data {{tmp}}/no.jsonl": "no.jsonl does not exist",
    f"{_EVAL} --output_dir {{home}}/notes.txt/x": "cannot be written to (Not a directory)",
    f"{_EVAL} --models {{tmp}}/no": "there is no such folder",
    f"{_EVAL} --models {{home}}/torn": "cannot be loaded",
    f"{_EVAL} --models {{home}}/model {{home}}/model": "give it once",
    f"{_EVAL} --ratio_edges x": "--ratio_edges",
    f"{_WIN}": "--judge",
    f"{_WIN} --judge wrong_judges": "expected module:function",
    f"{_WIN} --judge no_such_module:prefer": "the module no_such_module does not exist",
    f"{_WIN} --judge wrong_judges:no": "the module wrong_judges has no no",
    f"{_WIN} --judge wrong_judges:number": "number is of type int, not a function",
    f"{_WIN} --judge broken_judges:prefer": "broken_judges cannot be imported: ModuleNotFoundError",
    f"{_WIN} --judge wrong_judges:fails": "the judge failed at comparison 0: ZeroDivisionError: division by zero",
    f"{_WIN} --judge wrong_judges:scores": "the judge returned 7 for comparison 0",
    f"{_WIN} --judge wrong_judges:none": "the judge returned None for comparison 0",
    f"{_WIN} --judge wrong_judges:fails --concurrency 2": "concurrency has no effect with a Python function",
    f"{_WIN} --judge wrong_judges:fails --baseline_model zz": "baseline_model",
    f"{_WIN} --judge wrong_judges:fails --length_prior 0 -1": "length_prior",
    f"{_WIN} --judge_model x --judge_template {{tmp}}/no.jinja": "judge_template={tmp}/no.jinja cannot be used",
    "eval export --outputs {home}/responses.jsonl --to {tmp}/x.json": "choose one by --model",
    "eval export --outputs {home}/a.jsonl --to {home}/notes.txt/x.json": "notes.txt",
    f"{_EVAL} --seed -1": "seed=-1: must not be negative",
    f"{_EVAL} --reference {{tmp}}/no": "reference={tmp}/no: there is no such folder",
    f"{_EVAL} --reference {{home}}/notes.txt": "reference={home}/notes.txt is a file: give the model's folder",
    f"{_EVAL} --reference no_such_model": "reference=no_such_model cannot be loaded",
    # cpt cache
    "cache merge --ref_cache_dir {tmp}/no": "there is no cache in {tmp}/no",
    "cache prun": "choose from",
    "cache info --ref_cache_dir {tmp}/no": "there is no cache in {tmp}/no",
    "cache build --ref_cache_dir {tmp}/no": "give the options of cpt-train",
    "cache prune --ref_cache_dir {home}/empty --max_gb -1": "--max_gb -1: must not be negative",
    "cache prune --ref_cache_dir {home}/empty --older_than nan": "--older_than nan: must not be negative",
    "cache prune --ref_cache_dir {home}/empty --max_gib 1": "unknown option --max_gib; did you mean --max_gb?",
    "cache prune --ref_cache_dir {home}/empty --reference abc": "no fingerprint in",
    "cache verify --ref_cache_dir {home}/empty --sample 0": "is not a number of completions",
    "cache verify --ref_cache_dir {home}/empty --tolerance -1": "is not a tolerance",
    "cache export --ref_cache_dir {home}/empty --to {tmp}/x.parquet": "--reference must name one",
    # cpt plan
    "plan": "model_name_or_path is missing",
    "plan {home}/model": "dataset_name is missing",
    f"{_PLAN} c": "unexpected argument 'c': expected MODEL and DATA, then options",
    f"{_PLAN} --bta 1": "unknown option --bta; did you mean --beta?",
    f"{_PLAN} --beta 0": "beta=0",
    f"{_PLAN} --jsn x": "--jsn",
    f"{_PLAN} --num_processes 3 --sp_size 2": "sp_size=2 needs a multiple of 2 processes",
    f"{_PLAN} --num_processes 2 --sp_size 2 --packing false": "cuts packed rows: leave out packing=false",
    f"{_PLAN} --load_in_4bit": "load_in_4bit needs use_peft=true",
    f"{_PLAN} --device_gib nan": "--device_gib nan: must be a positive number",
    f"{_PLAN} --dataset_streaming --max_steps 2": "the rows of a stream are not known before training",
    f"{_PLAN} --max_tokens_per_batch 4": "more than max_tokens_per_batch=4",
    f"{_PLAN} --max_tokens_per_batch most": "max_tokens_per_batch=most: must be a number of tokens, or auto",
    f"{_PLAN} --loss_type dpo": "sigmoid",
    f"{_PLAN} --adapter_name_or_path {{tmp}}/no": "adapter_name_or_path={tmp}/no: there is no such folder",
    f"{_PLAN} --adapter_name_or_path {{home}}/model": "{home}/model holds no adapter",
    f"{_PLAN} --adapter_name_or_path {{home}}/lora --use_peft": "use_peft",
    f"{_PLAN} --picture {{tmp}}/x.gif": "its name must end in .png or .svg",
    f"{_PLAN} --json {{home}}/notes.txt/plan.json": "notes.txt",
    "plan {tmp}/no {home}/train.jsonl": "{tmp}/no: there is no such folder",
    "plan {home}/t5 {home}/train.jsonl": "is not a causal language model (T5Config)",
    "plan {home}/config {home}/train.jsonl": "cannot be loaded",
    "plan {home}/model {tmp}/no.jsonl": "no.jsonl",
    "plan {home}/model {home}/other.jsonl": "number",
    "plan {home}/model {home}/torn.jsonl": "line 2",
    "plan {home}/other_lora {home}/train.jsonl": "{home}/gone",
    "cache export --ref_cache_dir {home}/empty --reference x --to {tmp}/x.csv": "x.csv: must end in .parquet",
    # cpt merge
    "merge": "--output",
    "merge {home}/lora": "--output",
    f"{_MERGE} --outputs x": "unknown option --outputs; did you mean --output?",
    "merge {tmp}/no --output {tmp}/merged": "{tmp}/no: there is no such folder",
    "merge no/such-adapter --output {tmp}/merged": "no/such-adapter",
    "merge {home}/model --output {tmp}/merged": "{home}/model holds no adapter (adapter_config.json): name the folder",
    "merge {home}/empty --output {tmp}/merged": "{home}/empty holds no adapter",
    "merge {home}/notes.txt --output {tmp}/merged": "notes.txt",
    "merge {home}/torn_lora --output {tmp}/merged": "torn_lora",
    "merge {home}/half_lora --output {tmp}/merged": "half_lora",
    "merge {home}/other_lora --output {tmp}/merged": "{home}/gone as base model, and there is no such folder",
    "merge {home}/lora --output {home}/model": "--output {home}/model exists already",
    "merge {home}/lora --output {home}/notes.txt": "--output {home}/notes.txt exists already",
    "merge {home}/lora --output {home}/notes.txt/x": "--output {home}/notes.txt/x cannot be written to",
    "merge {home}/lora --output /proc/merged": "--output /proc/merged cannot be written to",
    f"{_MERGE} --dtype fp8": "invalid choice: 'fp8'",
    f"{_MERGE} --adapters other": "holds no adapter other",
    f"{_MERGE} --base {{tmp}}/no": "{tmp}/no",
    f"{_MERGE} --base {{home}}/torn": "torn",
    f"{_MERGE} --base {{home}}/gpt2": "Target modules {{'q_proj'}} not found in the base model",
    f"{_MERGE} --base {{home}}/shape": "shape",
    f"{_MERGE} --load_in_4bit --load_in_8bit": "exclude each other",
    f"{_MERGE} --bnb_4bit_quant_type nf4": "has no effect without --load_in_4bit",
    # cpt demo
    "demo --arm sft": "unknown option --arm; did you mean --arms?",
    "demo --arms best": "invalid choice: 'best'",
    "demo --seeds -1 --output {tmp}/demo": "--seeds -1: must be at least 0",
    "demo --output {home}/notes.txt/x --quick": "cannot be written to (Not a directory)",
    "demo --quickstart {home}": "responses.jsonl is there already and would be overwritten",
}


@pytest.mark.parametrize("words", _WRONG_COMMANDS)
def test_wrong_inputs_of_the_other_commands(home, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(home))
    before = _files(home)
    code, line = attempt(fill(words, home, tmp_path), capsys)
    assert code == 2 and _WRONG_COMMANDS[words].format(home=home, tmp=tmp_path) in line
    assert _files(home) == before


def _files(folder: Path) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".lock")
    }


# --- What is not wrong ---


def test_values_and_names_that_are_understood(capsys):
    base = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--use_cpu"]
    assert parse([*base, "--learning_rate", "1e-3", "--eval_delay", "0"]).training.learning_rate == 1e-3
    with pytest.raises(UserError, match=r"^learning_rate=-0.001: must not be negative$"):
        parse([*base, "--learning_rate", "-1e-3"])
    for alias in ("--val_size", "--val_set_size", "--test_split_size"):
        assert parse([*base, alias, "0.1"]).script.test_split_size == 0.1
    for command in (["--version"], ["train", "--version"]):
        assert cli.main(command) == 0 and capsys.readouterr().out.startswith("cpt-kernels ")
    assert cli.train_main(["--version"]) == 0 and capsys.readouterr().out.startswith("cpt-kernels ")


def test_rows_are_split_off_from_a_dataset(home, tmp_path, capsys):
    argv = fill(f"{_TRAIN} --eval_strategy steps --eval_steps 1 --val_size 0.25", home, tmp_path)
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "9 of 9 rows kept" in printed and "3 of 3 rows kept" in printed
    # The saved configuration names folders absolutely, so that it is read in any folder.
    saved = yaml.safe_load((tmp_path / "out" / "training_config.yaml").read_text())
    assert saved["dataset_name"] == str(home / "train.jsonl") and saved["test_split_size"] == 0.25


def test_eval_finds_the_reference_from_any_folder(home, tmp_path, monkeypatch, capsys):
    """The paths of a run that was started with relative paths are absolute; relative ones are tried beside the file."""
    monkeypatch.chdir(home)
    argv = "train --model_name_or_path model --dataset_name train.jsonl --use_cpu --disable_tqdm --report_to none"
    assert cli.main([*argv.split(), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    command = ["eval", "pairs", "--models", str(tmp_path / "run"), "--data", str(home / "train.jsonl")]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert f"rewards against {home / 'model'}" in capsys.readouterr().out
    config = tmp_path / "run" / "training_config.yaml"
    values = yaml.safe_load(config.read_text()) | {"model_name_or_path": "../base"}
    config.write_text(yaml.safe_dump(values))
    (home / "model").rename(tmp_path / "base")
    try:
        assert cli.main(command) == 0
    finally:
        (tmp_path / "base").rename(home / "model")
    assert "rewards against" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "model.safetensors"), 2),
        (OSError(errno.EROFS, "Read-only file system", "curves.png"), 2),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 1),
        (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"), 1),
    ],
)
@pytest.mark.parametrize("command", ["train", "pairs", "cache", "generate", "eval", "study", "demo"])
def test_a_full_disk_is_no_traceback(monkeypatch, capsys, command, error, code):
    def fails(*_):
        raise error

    module = import_module(cli.COMMANDS[command][0], "cpt_kernels.cli")
    monkeypatch.setattr(module, "main", fails)
    found, line = attempt([command], capsys)
    assert found == code and any(word in line for word in ("No space left", "Read-only", "failed writing"))
