"""Scripts written for TRL run with TRL and, with only the import changed, with this package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, set_seed

from cpt_kernels.data.batches import BatchSampler
from tests.helpers.command import bpe_tokenizer, word_pairs, write_model, write_rows

SCRIPTS = sorted(Path(__file__).with_name("scripts").glob("*.py"))
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("scripts")
    pairs = word_pairs(28)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    tokenizer.chat_template = CHAT
    for name, seed in (("model", 0), ("reference", 1)):
        write_model(home / name, tokenizer)
        set_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(home / name)).save_pretrained(home / name)
    write_rows(home / "train.jsonl", pairs[:16])
    write_rows(home / "test.jsonl", pairs[16:24])  # whole batches, because TRL's evaluation is a mean of batch means
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    chats = [
        {"prompt": turn("user", p["prompt"]), **{k: turn("assistant", p[k]) for k in ("chosen", "rejected")}}
        for p in pairs
    ]
    write_rows(home / "chats.jsonl", chats)
    return home


def run(script: Path, package: str, home: Path, folder: Path, monkeypatch) -> tuple[list[dict], Path]:
    """Runs a script with the import changed in a folder of its own; returns its trainer's logs and the folder."""
    folder.mkdir()
    for file in home.iterdir():
        (folder / file.name).symlink_to(file)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CPT_CACHE", str(folder / "cache"))
    text = script.read_text()
    assert text.count("from trl import DPOConfig, DPOTrainer") == 1
    space = {"__name__": "__main__"}
    exec(compile(text.replace("from trl import", f"from {package} import"), script.name, "exec"), space)
    return space["trainer"].state.log_history, folder


def our_name(name: str, record: dict) -> str:
    """Returns our name of TRL's metric; with several evaluation sets TRL names the set only in its loss and times."""
    sets = [match.group(1) for key in record if (match := re.fullmatch(r"eval_(\w+)_loss", key))]
    if not sets or not name.startswith("eval_") or name.startswith(f"eval_{sets[0]}_"):
        return name
    return name.replace("eval_", f"eval_{sets[0]}_", 1)


@pytest.fixture(autouse=True)
def _order_of_the_data(monkeypatch):
    """Makes both trainers read the rows in order, as they shuffle differently."""
    monkeypatch.setattr(Trainer, "_get_train_sampler", lambda self, data: SequentialSampler(data))
    start = BatchSampler.__post_init__

    def start_in_order(self):
        self.shuffle = False
        start(self)

    monkeypatch.setattr(BatchSampler, "__post_init__", start_in_order)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_with_the_import_changed(script, home, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    theirs, _ = run(script, "trl", home, tmp_path / "trl", monkeypatch)
    ours, folder = run(script, "cpt_kernels", home, tmp_path / "ours", monkeypatch)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for our, their in zip(ours, theirs):
        names = {name: our_name(name, their) for name in their}
        assert set(names.values()) <= our.keys()
        for name, own in names.items():
            if re.search("loss$|rewards/|logps/", name):
                assert our[own] == pytest.approx(their[name], abs=1e-3 if "/" in name else 1e-4), (name, our["step"])
    written = {path.name for path in (folder / "out").iterdir()}
    if script.stem in ("quick_start", "lora"):
        assert any((folder / "out").rglob("*.safetensors"))
    if script.stem == "evaluation_sets":
        assert "eval_results.json" in written
    if script.stem == "callbacks":
        assert "tiny-dpo" in (folder / "out/README.md").read_text()
