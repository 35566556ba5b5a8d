"""A run continues only from a checkpoint of the same run: weights, state, data, reference, loss and optimizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.digest import digest_rows
from cpt_kernels.model.pretrained import load_pretrained
from tests.helpers import toy
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import losses, preference_data, preference_rows

SAVED, STEPS = 3, 6
make_trainer = partial(
    toy.make_trainer, rows=20, max_steps=STEPS, save_strategy="steps", save_steps=SAVED, learning_rate=1e-2
)
LORA = {"r": 2, "target_modules": ["q_proj"]}


def base(folder: Path, name: str) -> torch.nn.Module:
    """Returns a tiny model that has a folder, as PEFT names the base model of an adapter by its folder."""
    if not (folder / name).exists():
        tiny_model(name).save_pretrained(folder / name)
    return AutoModelForCausalLM.from_pretrained(folder / name)


def several(folder: Path) -> torch.nn.Module:
    """Returns a model whose adapter "policy" is active and trained, beside two others."""
    model = get_peft_model(base(folder, "llama"), LoraConfig(**LORA))
    model.add_adapter("policy", LoraConfig(r=3, target_modules=["v_proj"], modules_to_save=["lm_head"]))
    model.add_adapter("other", LoraConfig(**LORA, init_lora_weights=False))
    model.set_adapter("policy")
    return model


def both_active(folder: Path) -> torch.nn.Module:
    model = get_peft_model(base(folder, "llama"), LoraConfig(**LORA), adapter_name="a")
    model.add_adapter("b", LoraConfig(**LORA))
    model.base_model.set_adapter(["a", "b"])
    return model


def adapted(name: str = "llama", adapter: str = "default", **options):
    return lambda folder: get_peft_model(base(folder, name), LoraConfig(**LORA, **options), adapter_name=adapter)


MODELS = {
    "whole": partial(base, name="llama"),
    "whole, tied": partial(base, name="llama-tied"),
    "experts": partial(base, name="qwen3_moe"),  # their files have one weight per expert, the model has one for all
    "lora": adapted(),
    "lora, tied, whole embedding": adapted("llama-tied", modules_to_save=["embed_tokens"]),
    "dora": adapted(use_dora=True),
    "biases": adapted("qwen2", bias="all"),
    "named policy": adapted(adapter="policy", modules_to_save=["lm_head"]),
    "several": several,
    "several active": both_active,
}


@torch.no_grad()
def log_probs(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(5, 15)[None]).logits.log_softmax(-1)


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory) -> tuple[Path, str, ContrastiveTrainer]:
    """Returns the folder of a finished run with two checkpoints, the kind of its model, and its trainer."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, model=MODELS[request.param](folder))
    trainer.train()
    trainer.save_model()
    return folder, request.param, trainer


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(run):
    folder, kind, whole = run
    resumed = make_trainer(folder / "again", model=MODELS[kind](folder), ref_cache_dir=f"{folder}/ref")
    resumed.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{SAVED}")
    assert losses(resumed) == losses(whole)
    start = MODELS[kind](folder).state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in whole.model.state_dict().items())


def test_loaders_read_what_the_trainer_had(run):
    """Ours, and plain transformers or PEFT."""
    folder, _, trainer = run
    expected = log_probs(trainer.model)
    assert torch.equal(log_probs(load_pretrained(str(folder / "out"))), expected)
    assert torch.equal(log_probs(load_pretrained(f"{folder}/out/checkpoint-{STEPS}")), expected)
    if not hasattr(trainer.model, "peft_config"):
        plain = AutoModelForCausalLM.from_pretrained(folder / "out")
    else:
        names = list(trainer.model.peft_config)
        folders = {name: folder / "out" / ("" if name == "default" else name) for name in names}
        start = base(folder, Path(trainer.model.get_base_model().config._name_or_path).name)
        plain = PeftModel.from_pretrained(start, folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            plain.load_adapter(folders[name], name)
        plain.base_model.set_adapter(trainer.model.active_adapters)
    assert torch.equal(log_probs(plain), expected)


@pytest.mark.parametrize("kind", ["whole", "experts", "named policy", "several"])
def test_the_best_model_is_loaded_at_the_end(tmp_path, kind):
    """The first evaluation counts as the best, because the metric is to grow and the loss falls."""
    trainer = make_trainer(
        tmp_path,
        model=MODELS[kind](tmp_path),
        eval_dataset=preference_data(20),
        eval_strategy="steps",
        eval_steps=SAVED,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=3e-3,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{SAVED}"
    found = log_probs(trainer.model)
    assert torch.equal(found, log_probs(load_pretrained(str(best))))
    assert not torch.equal(found, log_probs(load_pretrained(str(best.with_name(f"checkpoint-{STEPS}")))))


# --- What must be there ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_trainer(folder, max_steps=SAVED).train()
    return folder / "out" / f"checkpoint-{SAVED}"


def resume(folder: Path, checkpoint: Path, **changes) -> ContrastiveTrainer:
    trainer = make_trainer(folder, **{"ref_cache_dir": str(checkpoint.parents[1] / "ref"), **changes})
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_without_a_part_of_its_state(tmp_path, checkpoint, name):
    file = checkpoint / name
    kept = file.read_bytes()
    file.unlink()
    try:
        with pytest.raises(ValueError, match=f"lacks {name}, without which that state would begin anew: restore"):
            resume(tmp_path, checkpoint)
    finally:
        file.write_bytes(kept)


def test_a_checkpoint_of_save_only_model(tmp_path):
    make_trainer(tmp_path, max_steps=SAVED, save_only_model=True).train()
    folder = tmp_path / f"out/checkpoint-{SAVED}"
    with pytest.raises(ValueError, match=r"save_only_model=true, so it has no optimizer\.pt, .*model_name_or_path="):
        resume(tmp_path, folder)


def test_a_checkpoint_without_a_record_is_said(tmp_path, checkpoint, caplog):
    record = checkpoint / "run.json"
    kept = record.read_text()
    record.unlink()
    resume(tmp_path, checkpoint)
    assert "does not record its run (run.json), so it is unknown whether data, reference, loss" in caplog.text
    record.write_text(kept)


# --- What must be equal ---


def other_rows(count: int = 20) -> Dataset:
    rows = preference_rows(count)
    rows[7] = {**rows[7], "rejected": "w1 w2 "}
    return Dataset.from_list(rows)


REFUSED = {
    "other rows": ({"train_dataset": other_rows}, "another data: it was saved with digest"),
    "another order of rows": (
        {"train_dataset": lambda: preference_data(20).select(range(19, -1, -1))},
        "another data: it was saved with digest",
    ),
    "truncation": ({"max_length": 9}, "another data: it was saved with .*max_length 1024, now 9"),
    "reference": (
        {"ref_model": lambda: tiny_model("llama", seed=1)},
        "another reference: it was saved with .*fingerprint",
    ),
    "start weights": ({"model": lambda: tiny_model("llama", seed=1)}, "another reference: it was saved with"),
    "loss": ({"loss_type": "ipo"}, r"another loss: .*loss_type \['sigmoid'\], now \['ipo'\]"),
    "beta": ({"beta": 0.2}, "another loss: it was saved with beta 0.1, now 0.2. To continue, keep the loss"),
    "own loss": ({"loss": lambda: lambda logps: -logps.log_ratio_difference()}, "another loss: it was saved with"),
    "learning rate": ({"learning_rate": 2e-2}, "another optimizer: it was saved with learning_rate 0.01, now 0.02"),
    "weight decay": ({"weight_decay": 0.1}, "another optimizer: it was saved with weight_decay"),
    "optimizer": ({"optim": "sgd"}, "another optimizer: it was saved with optim"),
    "seed": ({"seed": 1}, "another order of pairs: it was saved with seed 42, now 1"),
    "batch size": (
        {"per_device_train_batch_size": 2},
        "another order of pairs: it was saved with rows a step 4, now 2",
    ),
    "order": ({"train_sampling_strategy": "sequential"}, "another order of pairs"),
    "curriculum": ({"curriculum": {"levels": ["a>b", "a>c"]}}, "another order of pairs: it was saved with curriculum"),
    "trees": (
        {"group_by_prefix": True},
        r"another order of pairs: it was saved with group_by_prefix None, now \[False\]",
    ),
    "stream": ({"train_dataset": lambda: preference_data(20).to_iterable_dataset()}, "another data: .*kind rows, now"),
    "frozen": ({"model": lambda: frozen()}, "another trained parameters: it was saved with .*number 21, now 20"),
}


def frozen() -> torch.nn.Module:
    model = tiny_model("llama")
    model.get_input_embeddings().requires_grad_(False)
    return model


def made(changes: dict) -> dict:
    return {name: value() if callable(value) else value for name, value in changes.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_is_refused(tmp_path, checkpoint, case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"checkpoint-{SAVED} cannot be resumed with {message}"):
        resume(tmp_path, checkpoint, **made(changes))


SAID = {
    "steps": ({"max_steps": 5}, "settings: max_steps 3, now 5"),
    "epochs": ({"max_steps": -1, "num_train_epochs": 1}, "settings: max_steps 3, now -1, num_train_epochs 3.0, now 1"),
    "schedule": ({"lr_scheduler_type": "constant"}, "lr_scheduler_type linear, now constant"),
    "warmup": ({"warmup_steps": 2}, "warmup_steps 0, now 2"),
    "clipping": ({"max_grad_norm": 0.5}, "max_grad_norm 1.0, now 0.5"),
    "other rows, skipped": ({"train_dataset": other_rows, "ignore_data_skip": True}, "saved with data: digest"),
    "seed, skipped": ({"seed": 1, "ignore_data_skip": True}, "saved with order of pairs: seed 42, now 1"),
}


@pytest.mark.parametrize("case", SAID)
def test_another_run_is_said(tmp_path, checkpoint, case, caplog):
    changes, message = SAID[case]
    resume(tmp_path, checkpoint, **made(changes))
    assert message in caplog.text


def test_what_changes_no_result_is_not_said(tmp_path, caplog):
    make_trainer(tmp_path).train()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options = {"logging_steps": 2, "save_steps": 100, "dataloader_num_workers": 1, "head_memory_mb": 1.0}
    moved = preference_data(20).map(lambda row: row)  # another table with the same rows
    resume(tmp_path, tmp_path / f"out/checkpoint-{SAVED}", train_dataset=moved, **options, **split)
    assert "was saved with" not in caplog.text and "cannot be" not in caplog.text


def test_another_adapter_is_refused(tmp_path):
    def make(**changes) -> ContrastiveTrainer:
        return make_trainer(tmp_path, model=base(tmp_path, "llama"), peft_config=LoraConfig(**LORA | changes))

    make().train()
    checkpoint = str(tmp_path / f"out/checkpoint-{SAVED}")
    for changes, message in (
        ({"lora_alpha": 32}, "another adapter 'default': lora_alpha 8, now 32; give it the same"),
        ({"r": 4}, "another adapter 'default': r 2, now 4"),
        ({"target_modules": ["k_proj"]}, r"target_modules \['q_proj'\], now \['k_proj'\]"),
        ({"use_rslora": True}, "use_rslora False, now True"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes).train(resume_from_checkpoint=checkpoint)
    for model, message in (
        (adapted(adapter="policy")(tmp_path), "has no adapter_config.json of 'policy'"),
        (several(tmp_path), "has no adapter_config.json of 'policy'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, model=model).train(resume_from_checkpoint=checkpoint)
    make(lora_dropout=0.1).train(resume_from_checkpoint=checkpoint)


def test_other_active_adapters_are_refused(tmp_path):
    make_trainer(tmp_path, model=several(tmp_path), loss_type="cpo").train()
    model = several(tmp_path)
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r"another trained parameters|active \['policy'\], now \['other'\]"):
        make_trainer(tmp_path, model=model, loss_type="cpo").train(
            resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{SAVED}")
        )


def test_a_parameter_that_is_not_saved_with_the_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(**LORA))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight requires a gradient, but PEFT does not save it"):
        make_trainer(tmp_path, model=model)


# --- Data ---


def test_the_digest_of_rows():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "level": None, "row": 0},
            {"prompt_ids": [], "completion_ids": [[6, 7]], "level": "a", "row": 3}]  # fmt: skip
    whole = digest_rows(Dataset.from_list(rows))
    padded = Dataset.from_list([rows[1], *rows, rows[0]])
    assert digest_rows(padded.select([1, 2])) == digest_rows(padded.skip(1).take(2)) == whole
    assert digest_rows(Dataset.from_list([{**row, "row": 9} for row in rows])) == whole
    for i, change in (
        (0, {"prompt_ids": [1, 3]}),
        (0, {"prompt_ids": [1]}),
        (0, {"completion_ids": [[3, 4], [5]]}),
        (0, {"level": ""}),
        (1, {"completion_ids": [[6], [7]]}),
    ):
        other = [dict(row) for row in rows]
        other[i] |= change
        assert digest_rows(Dataset.from_list(other)) != whole, change
    assert digest_rows(Dataset.from_list(rows[::-1])) != whole


def test_a_stream_must_begin_with_the_rows_that_were_read(tmp_path):
    stream = lambda rows: {"train_dataset": rows.to_iterable_dataset()}  # noqa: E731
    make_trainer(tmp_path, **stream(preference_data(30)), max_steps=SAVED).train()
    checkpoint = tmp_path / f"out/checkpoint-{SAVED}"
    assert json.loads((checkpoint / "run.json").read_text())["stream"]["number"] >= 12
    resume(tmp_path, checkpoint, **stream(preference_data(30)))
    for rows in (other_rows(30), preference_data(30).skip(1)):
        with pytest.raises(ValueError, match="rows of the stream are not those that the checkpoint's run was"):
            resume(tmp_path, checkpoint, **stream(rows))
    resume(tmp_path, checkpoint, **stream(other_rows(30)), ignore_data_skip=True)


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    make_trainer(tmp_path).train()
    again = make_trainer(tmp_path, max_steps=STEPS + 1)
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry][-2:] == [STEPS, STEPS + 1]
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_an_adapter_of_transformers_own(tmp_path, monkeypatch):
    """It is saved without its name, and in the folder itself."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)  # wants a newer PEFT

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        made = base(tmp_path, "llama")
        made.add_adapter(LoraConfig(**LORA), "policy")
        return made

    whole, resumed = (make_trainer(tmp_path, model=model()) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{SAVED}"))
    assert losses(resumed) == losses(whole)
    expected = log_probs(whole.model)
    assert torch.equal(log_probs(resumed.model), expected)
    assert torch.equal(log_probs(load_pretrained(str(tmp_path / f"out/checkpoint-{STEPS}"))), expected)
