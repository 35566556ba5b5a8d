"""One run at a time writes to a folder, and an earlier run in it is found."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import filelock
import pytest
from transformers import GenerationConfig

from cpt_kernels.cli import train_main
from cpt_kernels.errors import UserError
from cpt_kernels.training.run_folder import checkpoints_in, earlier_run, held, is_finished
from tests.helpers.architectures import tiny_model
from tests.helpers.command import bpe_tokenizer, one_error, run, word_pairs, write_model, write_rows
from tests.helpers.toy import make_trainer


class Other:
    """Another process, which holds a folder until it is killed."""

    def __init__(self, folder: Path) -> None:
        ready, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with held(folder):
                os.write(write, b"1")
                signal.pause()
        assert os.read(ready, 1) == b"1"

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def is_free(folder: Path) -> bool:
    """Whether another process could hold a folder."""
    child = os.fork()
    if child == 0:
        try:
            with held(folder):
                os._exit(0)
        except UserError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_that_another_process_holds(tmp_path):
    waiting = make_trainer(tmp_path, max_steps=1)
    message = r"output_dir=.*out is in use by another run, process {} on .*: wait until it ends, or choose another"
    with Other(tmp_path / "out") as other:
        with pytest.raises(UserError, match=message.format(other.pid)):
            make_trainer(tmp_path)
        with pytest.raises(UserError, match=message.format(other.pid)):
            waiting.train()
        assert make_trainer(tmp_path, train_dataset=None, eval_dataset=waiting.train_dataset).evaluate()
        make_trainer(tmp_path / "elsewhere", max_steps=1).train()
    waiting.train()
    assert waiting.state.global_step == 1


@pytest.mark.parametrize("end", ["returns", "raises", "is interrupted"])
def test_a_folder_is_held_while_a_run_trains(tmp_path, end):
    trainer = make_trainer(tmp_path, max_steps=2)
    step, free = trainer.training_step, []

    def training_step(*args):
        free.append(is_free(tmp_path / "out"))
        if end != "returns":
            raise {"raises": RuntimeError, "is interrupted": KeyboardInterrupt}[end]
        return step(*args)

    trainer.training_step = training_step
    assert is_free(tmp_path / "out"), "a trainer that does not train holds nothing"
    if end == "returns":
        trainer.train()
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            trainer.train()
    assert free and not any(free) and is_free(tmp_path / "out")


def test_one_process_may_hold_a_folder_several_times(tmp_path):
    with held(tmp_path):
        with held(tmp_path):
            make_trainer(tmp_path.parent, max_steps=1)
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    make_trainer(tmp_path, max_steps=1).train()
    assert "is on a file system without locks" in caplog.text


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/out cannot be written to \(Not a directory\)"),
        held(tmp_path / "file/out"),
    ):
        pass


# --- What Ctrl-C says ---


def interrupt_at(trainer, step: int) -> None:
    run_step = trainer.training_step

    def training_step(*args):
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return run_step(*args)

    trainer.training_step = training_step


def test_an_interrupted_run_says_how_to_resume(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    interrupt_at(trainer, 1)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 1, before the first checkpoint"):
        trainer.train()
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    interrupt_at(trainer, 3)
    with pytest.raises(KeyboardInterrupt, match=r"at step 3; to continue from .*checkpoint-2, set resume_from_check"):
        trainer.train()


# --- Earlier runs ---


@pytest.fixture
def flags(tmp_path, monkeypatch) -> list:
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    pairs = word_pairs(16)
    write_model(tmp_path / "start", bpe_tokenizer(text for row in pairs for text in row.values()))
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    model = ["--model_name_or_path", tmp_path / "start", "--from_scratch", "--dataset_name", data]
    steps = ["--max_steps", 2, "--save_steps", 1, "--per_device_train_batch_size", 4]
    return [*model, "--output_dir", tmp_path / "out", *steps, "--use_cpu", "--disable_tqdm", "--report_to", "none"]


def test_cpt_train_in_a_folder_with_a_run(tmp_path, flags, capsys):
    assert run(*flags) == 0
    capsys.readouterr()
    names = {path.name for path in (tmp_path / "out").iterdir()}

    # A finished run is neither replaced nor continued unasked, and the mistake is found before the data is read.
    missing = ["--dataset_name", tmp_path / "nowhere.jsonl"]
    assert run(*flags, *missing) == 2
    error = one_error(capsys)
    assert "out holds a finished run (checkpoint-2, model.safetensors): set resume_from_checkpoint=last" in error
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert run(*flags, "--overwrite_output_dir", "--resume_from_checkpoint", "last") == 2
    assert "leave one out" in one_error(capsys)

    # It can be continued, and be replaced.
    assert run(*flags, "--resume_from_checkpoint", "last", "--max_steps", 3) == 0
    assert checkpoints_in(tmp_path / "out")[0].name == "checkpoint-3"
    (tmp_path / "out/model-00001-of-00002.safetensors").write_bytes(b"of an earlier run")
    assert run(*flags, "--overwrite_output_dir") == 0
    assert not (tmp_path / "out/model-00001-of-00002.safetensors").exists()
    assert "overwrite_output_dir" not in (tmp_path / "out/training_config.yaml").read_text()


def test_cpt_train_in_a_folder_that_is_held(tmp_path, flags, capsys):
    with Other(tmp_path / "out"):
        assert run(*flags, "--dataset_name", tmp_path / "nowhere.jsonl") == 2
        assert "out is in use by another run" in one_error(capsys)
    assert run(*flags) == 0


def test_cpt_train_says_how_to_resume(tmp_path, flags, capsys, monkeypatch):
    from cpt_kernels import ContrastiveTrainer

    step = ContrastiveTrainer.training_step

    def training_step(self, *args):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(ContrastiveTrainer, "training_step", training_step)
    assert train_main([str(flag) for flag in flags]) == 130
    error = capsys.readouterr().err
    assert "stopped at step 1; to continue from" in error and "--resume_from_checkpoint last" in error


def test_what_an_earlier_run_is(tmp_path):
    assert earlier_run(tmp_path / "nowhere") is None and not is_finished(tmp_path)
    (tmp_path / "training_config.yaml").write_text("beta: 1")
    (tmp_path / "checkpoint-x").mkdir()
    assert earlier_run(tmp_path) is None, "a run that has saved nothing is not lost"
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10/trainer_state.json").write_text('{"global_step": 10, "max_steps": 20}')
    assert earlier_run(tmp_path) == "an earlier run (checkpoint-10)"
    (tmp_path / "checkpoint-10/trainer_state.json").write_text('{"global_step": 10, "max_steps": 10}')
    assert earlier_run(tmp_path) == "a finished run (checkpoint-10)"


# --- What could not be saved ---


def test_a_generation_config_that_could_not_be_saved(tmp_path, caplog):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.9, top_p=0.6, max_new_tokens=7)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    assert "has temperature=0.9, top_p=0.6, which have no effect with do_sample=False" in caplog.text
    trainer.train()
    trainer.save_model()
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert not saved.do_sample and saved.temperature in (None, 1.0) and saved.max_new_tokens == 7


def test_a_generation_config_that_is_wrong(tmp_path):
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = -3
    with pytest.raises(UserError, match=r"generation_config of LlamaForCausalLM is invalid, so the model could not be"):
        make_trainer(tmp_path, model=model)
