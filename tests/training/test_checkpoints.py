"""A checkpoint is whole or not there; resuming takes the last one that is whole, of this run, and has steps to come."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin

from cpt_kernels.errors import UserError
from cpt_kernels.training.checkpoints import UNFINISHED, find_damage, run_of
from cpt_kernels.training.run_folder import checkpoints_in
from tests.helpers import failed_save, killed_save
from tests.helpers.failed_save import CASES as FAILING_CASES
from tests.helpers.forked import run_ranks
from tests.helpers.killed_save import CASES, KILLED, SAVED, STEPS, make_trainer
from tests.helpers.toy import losses, preference_data


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[float]:
    """The losses of an uninterrupted run."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return losses(trainer)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run that kept its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, save_total_limit=None).train()
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_in(folder / "out")]


# --- Killed, and a full disk ---


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_ranks(folder, 1, killed_save.run_all, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_killed_while_it_saves_keeps_the_checkpoint_before(killed, case, whole):
    folder = killed / case
    assert names(folder) == [f"checkpoint-{SAVED}"] and find_damage(folder / f"out/checkpoint-{SAVED}") is None
    assert (folder / "out" / UNFINISHED / f"checkpoint-{KILLED}").is_dir()
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == whole
    assert names(folder) == [f"checkpoint-{STEPS}"] and not list((folder / "out" / UNFINISHED).glob("*"))


def limited(size: int):
    """Returns a method that saves with a limit on the size of files, as on a full disk."""

    def save(trainer, *args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.global_step == KILLED:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            type(trainer)._save_checkpoint(trainer, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return save


@pytest.mark.parametrize("size", [0, 100, 20_000, 60_000])
def test_a_disk_that_is_full_while_a_run_saves(tmp_path, size, whole):
    trainer = make_trainer(tmp_path)
    trainer._save_checkpoint = lambda *args: limited(size)(trainer, *args)
    message = rf"checkpoint-{KILLED} cannot be written \(.*\): make room, and resume from .*checkpoint-{SAVED}, which"
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert names(tmp_path) == [f"checkpoint-{SAVED}"]
    assert not list((tmp_path / "out" / UNFINISHED).glob("*")), "the part that was written takes no room"
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == whole


def test_a_disk_that_is_full_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"out cannot be written \(.*\): make room, .* .*checkpoint-{STEPS}"):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_tmpfs(tmp_path, whole):
    """Every size from none to enough for two checkpoints: the last complete one stays, and the run continues."""
    disk = tmp_path / "out"
    disk.mkdir()
    mount = lambda *options: subprocess.run(["mount", *options, disk], capture_output=True).returncode  # noqa: E731
    if mount("-t", "tmpfs", "-o", "size=64m", "tmpfs") != 0:
        pytest.skip("this process may not mount a tmpfs")
    try:
        make_trainer(tmp_path, max_steps=SAVED).train()
        size = sum(file.stat().st_blocks for file in disk.rglob("*")) // 2  # KiB
        for share in (0.1, 0.5, 0.9):
            mount("-o", f"remount,size={size + int(share * size)}k")
            with pytest.raises(UserError, match="cannot be written"):
                make_trainer(tmp_path).train(resume_from_checkpoint=True)
            assert names(tmp_path) == [f"checkpoint-{SAVED}"] and find_damage(disk / f"checkpoint-{SAVED}") is None
        mount("-o", "remount,size=64m")
        resumed = make_trainer(tmp_path)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == STEPS and losses(resumed)[SAVED:] != []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("failed")
    return folder, run_ranks(folder, 2, failed_save.run_all, folder)


@pytest.mark.parametrize("case", FAILING_CASES)
def test_a_save_that_fails_on_one_rank_ends_on_all(failed, case):
    """No rank waits for another, and all say the same."""
    folder, by_rank = failed
    out = folder / case / "out"
    (kind, message), other = by_rank[0][case], by_rank[1][case]
    if case == "no disk error":
        assert other == ["RuntimeError", "out of memory"]
        assert (kind, message) == (
            "RuntimeError",
            f"rank 1 could not save {out}/checkpoint-{KILLED}: {': '.join(other)}",
        )
    else:
        assert kind == "UserError" and f"make room, and resume from {out}/checkpoint-{SAVED}, which is" in message
        assert other == [kind, message]
    assert names(folder / case) == [f"checkpoint-{SAVED}"] and find_damage(out / f"checkpoint-{SAVED}") is None


def test_an_error_that_is_not_of_the_disk_stays(tmp_path):
    trainer = make_trainer(tmp_path)

    def fail(output_dir):
        raise RuntimeError("out of memory")

    trainer._save_rng_state = fail
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        trainer.train()


def test_sharded_weights_are_saved_whole(tmp_path, monkeypatch):
    """FSDP's state dicts are sharded by default, of which transformers would save nothing but checkpoints."""
    trainer = make_trainer(tmp_path)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    trainer.save_model()
    assert (tmp_path / "out/model.safetensors").is_file() and "SHARDED" in str(plugin.state_dict_type)


# --- Damage ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Changes a byte of the largest tensor in a file of torch."""
    with zipfile.ZipFile(file) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(file.read_bytes())
    content[largest.header_offset + len(content) // 3] ^= 255
    file.write_bytes(content)


def blank(file: Path) -> None:
    """Writes an object without entries into a file, and keeps its size."""
    file.write_bytes(b"{}".ljust(file.stat().st_size))


DAMAGE = {
    "weights": ("model.safetensors", cut, "is damaged: it has"),
    "optimizer": ("optimizer.pt", cut, "is damaged: it has"),
    "optimizer, its bytes": ("optimizer.pt", flip, "is damaged"),
    "schedule": ("scheduler.pt", lambda file: file.write_bytes(b""), "is damaged: it has 0 of"),
    "state": ("trainer_state.json", cut, "is damaged"),
    "record": ("run.json", cut, "is damaged"),
    "config": ("config.json", cut, "is damaged"),
    "record, no object": ("run.json", lambda file: file.write_text("[]"), "run.json is damaged"),
    "record, nothing": ("run.json", lambda file: file.write_text(""), "run.json is damaged"),
    "state, same size": ("trainer_state.json", blank, "trainer_state.json is damaged"),
    "config, same size": ("config.json", blank, "another model: its model_type is"),
    "weights, same size": ("model.safetensors", blank, "model.safetensors is damaged"),
    "random state, same size": ("rng_state.pth", blank, "rng_state.pth is damaged"),
    "no weights": ("model.safetensors", Path.unlink, "lacks model.safetensors"),
    "no optimizer": ("optimizer.pt", Path.unlink, "lacks optimizer.pt"),
    "no random state": ("rng_state.pth", Path.unlink, "lacks rng_state.pth"),
    "no state": ("trainer_state.json", Path.unlink, "lacks trainer_state.json"),
    "no tokenizer": ("tokenizer.json", Path.unlink, "lacks tokenizer.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(copied, case, whole, caplog):
    name, damage, message = DAMAGE[case]
    shutil.rmtree(copied / f"out/checkpoint-{STEPS}")
    newest = copied / f"out/checkpoint-{KILLED}"
    damage(newest / name)
    with pytest.raises(UserError, match=message):
        make_trainer(copied).train(resume_from_checkpoint=str(newest))
    resumed = make_trainer(copied)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == whole and f"not resumed: {newest}" in caplog.text and message in caplog.text


def test_all_are_damaged(copied):
    for path in checkpoints_in(copied / "out"):
        cut(path / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint that this run can resume from; .*6/model.*4/model.*2/model"):
        make_trainer(copied, max_steps=10).train(resume_from_checkpoint=True)


# --- Other runs, and no steps left ---


def test_a_checkpoint_without_steps_to_come(copied, whole, caplog):
    trainer = make_trainer(copied, max_steps=5, save_total_limit=None)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5 and len(losses(trainer)) == 5
    assert f"checkpoint-{STEPS} has 6 steps, and the run ends after 5: to train on, raise max_steps" in caplog.text
    for steps in (STEPS, STEPS - 1):
        with pytest.raises(UserError, match=f"has 6 steps, and the run ends after {steps}"):
            make_trainer(copied, max_steps=steps).train(resume_from_checkpoint=f"{copied}/out/checkpoint-{STEPS}")
    with pytest.raises(UserError, match=r"holds no checkpoint that this run can resume from.*ends after 2"):
        make_trainer(copied, max_steps=2).train(resume_from_checkpoint=True)


def test_steps_of_epochs(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 1}  # 6 steps
    make_trainer(tmp_path, **options).train()
    with pytest.raises(UserError, match="checkpoint-6 has 6 steps, and the run ends after 6"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=True)
    longer = make_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 12


def test_a_later_checkpoint_of_an_earlier_run(copied, caplog):
    """The second run has the options of the first but for its length, so only its id tells them apart."""
    again = make_trainer(copied, max_steps=3, save_total_limit=None)
    again.train()
    assert "begins anew" not in caplog.text and "holds a finished run (checkpoint-6)" in caplog.text
    resumed = make_trainer(copied, max_steps=8, save_total_limit=None)
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, *range(4, 9)]
    assert "checkpoint-6 is of another run in this folder; to continue that one, set" in caplog.text


def test_a_run_that_was_stopped_before_its_first_checkpoint(copied):
    make_trainer(copied, max_steps=1, save_strategy="no").train()
    with pytest.raises(UserError, match=r"no checkpoint that this run can resume from; .*6 is of another run"):
        make_trainer(copied, max_steps=10).train(resume_from_checkpoint=True)
    named = make_trainer(copied, max_steps=10)
    named.train(resume_from_checkpoint=f"{copied}/out/checkpoint-{STEPS}")
    assert named.state.global_step == 10


def test_a_run_finds_its_checkpoints_after_another_run(copied, caplog):
    options = {"max_steps": 5, "save_total_limit": None}
    make_trainer(copied, train_dataset=preference_data(24, seed=5), save_steps=5, **options).train()
    assert names(copied) == ["checkpoint-6", "checkpoint-5", "checkpoint-4", "checkpoint-2"]
    resumed = make_trainer(copied, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-5 cannot be resumed with another data" in caplog.text
    assert f"checkpoint-{KILLED} was saved with settings: max_steps 6, now 5" in caplog.text
    assert resumed.state.global_step == 5


def test_rotation_deletes_those_of_other_runs_first(copied):
    make_trainer(copied, max_steps=2, save_total_limit=2, beta=0.3).train()
    assert names(copied) == ["checkpoint-6", "checkpoint-2"]
    make_trainer(copied, max_steps=4, save_total_limit=2, beta=0.4).train()
    assert names(copied) == ["checkpoint-4", "checkpoint-2"]
    assert {run_of(path) for path in checkpoints_in(copied / "out")} == {run_of(copied / "out")}


# --- The best model ---


def best_of(folder: Path, **options):
    evaluation = {"eval_dataset": preference_data(8), "eval_strategy": "steps", "eval_steps": SAVED}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    return make_trainer(folder, **evaluation, **best, **options)


def test_the_best_checkpoint_stays_and_is_named(tmp_path):
    trainer = best_of(tmp_path)
    trainer.train()
    best = tmp_path / f"out/checkpoint-{SAVED}"  # the loss falls, and the metric is to grow
    assert trainer.state.best_model_checkpoint == str(best) and names(tmp_path) == [best.name]
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_the_best_checkpoint_is_gone_at_the_end(tmp_path, damage, caplog, monkeypatch):
    trainer = best_of(tmp_path, save_total_limit=3)
    best = tmp_path / f"out/checkpoint-{SAVED}"

    def break_best(*args):
        shutil.rmtree(best) if damage == "missing" else cut(best / "model.safetensors")
        return finalize(*args)

    finalize = trainer._finalize_training
    trainer._finalize_training = break_best
    trainer.train()
    assert "the best checkpoint cannot be loaded" in caplog.text and "model of the last step is kept" in caplog.text
    assert trainer.state.best_model_checkpoint is None and trainer.state.global_step == STEPS


def test_the_best_checkpoint_of_a_folder_that_was_moved(tmp_path, caplog):
    best_of(tmp_path / "a", max_steps=4, save_total_limit=None).train()
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = best_of(tmp_path / "b", save_total_limit=None)
    moved.train(resume_from_checkpoint=True)
    assert moved.state.best_model_checkpoint == f"{tmp_path}/b/out/checkpoint-{SAVED}"
    shutil.rmtree(tmp_path / f"b/out/checkpoint-{SAVED}")
    resumed = best_of(tmp_path / "b", max_steps=8, save_total_limit=None)
    resumed.train(resume_from_checkpoint=True)
    assert "the best checkpoint so far" in caplog.text
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-8"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
