"""An output folder on a store: a checkpoint there is complete or absent, and any node resumes from the newest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data import stores
from cpt_kernels.errors import UserError
from cpt_kernels.training.output_store import OutputStore, _known
from cpt_kernels.training.run_folder import earlier_run, held, is_finished
from tests.helpers import toy

Memory: Any = type(fsspec.filesystem("memory"))
SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 1e-3, "loss_type": "simpo"}


@pytest.fixture
def url(tmp_path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/run"
    Memory.store.clear()


@pytest.fixture
def node(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Continues in a new process on the node of this name."""

    def enter(name: str) -> None:
        _known.clear()
        monkeypatch.setenv("CPT_LOCAL", str(tmp_path / name))

    enter("one")
    return enter


def make(url: str, cls: type[ContrastiveTrainer] = ContrastiveTrainer, **options: Any) -> ContrastiveTrainer:
    return toy.make_trainer(Path("unused"), cls, output_dir=url, **{**SAVING, **options})


class Dying(ContrastiveTrainer):
    """Stops in step 6, as if it had been killed: nothing is uploaded, and its name stays on the store."""

    class Death(BaseException):
        pass

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise self.Death
        return super().training_step(*args, **kwargs)


def names(url: str) -> set[str]:
    return set(stores.list_files(url))


def test_a_run_resumes_on_another_node_with_the_same_losses(url, node, tmp_path, caplog):
    whole = toy.make_trainer(tmp_path / "whole", **SAVING)
    whole.train()
    with pytest.raises(Dying.Death):
        make(url, Dying).train()
    assert "checkpoint-4/_complete.json" in names(url) and "_owner.json" in names(url)
    node("two")
    caplog.clear()
    trainer = make(url, save_total_limit=1)
    assert earlier_run(trainer.args.output_dir) == "an earlier run (checkpoint-4)"
    local = Path(trainer.args.output_dir)
    assert not (local / "checkpoint-4" / "optimizer.pt").exists(), "it is downloaded when it is needed"
    trainer.train(resume_from_checkpoint=True)
    assert f"{url} belongs to process" in caplog.text
    assert toy.losses(trainer) == toy.losses(whole)
    trainer.save_model()
    there = names(url)
    assert {"checkpoint-8/_complete.json", "model.safetensors", "README.md", "run.json"} <= there
    assert not [name for name in there if name.startswith(("checkpoint-4", "_", "."))] and is_finished(local)
    record = json.loads(stores.read_bytes(f"{url}/checkpoint-8/_complete.json"))
    assert {f"checkpoint-8/{name}" for name in record} < there
    # The store decides: what is not there is not here either.
    stores.remove(url, [*there])
    node("two")
    make(url)
    assert earlier_run(local) is None and {path.suffix for path in local.glob("[!.]*")} <= {".lock"}
    # A checkpoint by its own URL.
    node("one")
    with pytest.raises(UserError, match="there is no such folder"):
        make(url).train(resume_from_checkpoint=f"{url}/checkpoint-4")


@pytest.mark.parametrize("failing", ["put_file", "pipe_file"])
def test_a_checkpoint_that_was_not_uploaded_whole_is_not_resumed_from(url, node, monkeypatch, failing):
    make(url, max_steps=4).train()
    original = getattr(Memory, failing)

    def refuse(self, *args, **kwargs):
        if "checkpoint-8" in str(args) and not str(args).endswith(("model.safetensors')",)):
            raise PermissionError("AccessDenied")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Memory, failing, refuse)
        with pytest.raises(UserError, match="cannot be written"):
            make(url).train(resume_from_checkpoint=True)
    assert any(name.startswith("checkpoint-8/") for name in names(url))
    for name in ("one", "two"):
        node(name)
        trainer = make(url)
        assert "(checkpoint-4)" in earlier_run(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8 and "checkpoint-8/_complete.json" in names(url)


def test_files_that_two_runs_mixed_are_not_resumed_from(url, node):
    make(url, max_steps=4).train()
    file = f"{url}/checkpoint-4/optimizer.pt"
    content = stores.read_bytes(file)
    stores.write_bytes(file, content[:-1] + bytes([content[-1] ^ 1]))
    for name in ("one", "two"):  # one has the whole checkpoint
        node(name)
        if name == "two":
            with pytest.raises(UserError, match=r"optimizer.pt is not what was uploaded there"):
                make(url).train(resume_from_checkpoint=True)
        else:
            make(url).train(resume_from_checkpoint=True)
            stores.remove(url, [n for n in names(url) if n.startswith("checkpoint-8")])


def test_a_run_that_was_taken_over_ends_at_its_next_checkpoint(url, node):
    class Overtaken(ContrastiveTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                OutputStore(url, Path("elsewhere")).take()
            return super().training_step(*args, **kwargs)

    with pytest.raises(UserError, match=r"taken over by process \d+ on .*: this run ends"):
        make(url, Overtaken).train()
    assert "checkpoint-4/_complete.json" in names(url) and not any("checkpoint-8" in name for name in names(url))


def test_a_second_run_on_the_same_machine_is_refused_and_changes_nothing(url, node, tmp_path):
    trainer = make(url)
    with held(trainer.args.output_dir):
        before = names(url)
        lock = Path(trainer.args.output_dir, "_run.lock")
        assert before == {"_owner.json"} and lock.exists()
    assert not names(url)


def test_models_are_saved_to_any_url(url, node):
    trainer = toy.make_trainer(stores.local_root(), loss_type="simpo")
    trainer.save_model(f"{url}/model")
    assert "model/model.safetensors" in names(url)
    shutil.rmtree(stores.local_root())
    assert make(url).args.output_dir == str(stores.local_path(url))
