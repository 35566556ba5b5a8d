"""Tests of ``cpt-train --check``: it passes for runs of all kinds, changes nothing, and finds what is wrong."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path

import pytest
import torch

from cpt_kernels.cli import check as check_module
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.model.comparison import compare_rows
from cpt_kernels.model.conditions import magnified
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.reference.cache import ReferenceCache
from tests.helpers.architectures import tiny_model
from tests.helpers.command import bpe_tokenizer, one_error, run, word_pairs, write_model, write_rows
from tests.helpers.forked import run_ranks


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("check")
    pairs = word_pairs(24)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    write_model(home / "start", tokenizer)
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(home / "start")).save_pretrained(home / "start")
    write_rows(home / "train.jsonl", pairs)
    return home


@pytest.fixture
def argv(home, tmp_path, monkeypatch) -> list:
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "reference"))
    flags = {"model_name_or_path": home / "start", "dataset_name": home / "train.jsonl", "output_dir": tmp_path / "out"}
    options = [part for name, value in flags.items() for part in (f"--{name}", value)]
    return [*options, "--use_cpu", "--disable_tqdm", "--check"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [f"{math.log(2):.6g} over 8 pairs", "rewards start at 0", "packed rows"]),
        (["--loss_type", "hinge", "--gradient_accumulation_steps", 2], ["1 over 16 pairs, at 0 it is 1"]),
        (["--use_peft", "--lora_target_modules", "all-linear", "--bf16", "--loss_type", "ipo"], ["at 0 it is 25"]),
        (["--max_tokens_per_batch", 64, "--packing", "false"], ["padded rows"]),
        (["--sync_ref_model", "--loss_type", "sigmoid", "sft", "--ld_alpha", 0.5], ["rewards start at 0"]),
        (["--dataset_streaming", "--max_steps", 4], [f"{math.log(2):.6g}"]),
    ],
)
def test_a_run_that_can_be_trained(argv, home, tmp_path, capsys, flags, expected):
    weights = (home / "start" / "model.safetensors").read_bytes()
    assert run(*argv, *flags) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in expected), printed
    assert "chosen (scored)" in printed and "</s>" in printed and "FAILED" not in printed
    assert (home / "start" / "model.safetensors").read_bytes() == weights and not (tmp_path / "out").exists()


def test_losses_and_references_without_a_start_at_zero(argv, home, capsys):
    assert run(*argv, "--loss_type", "sft") == 0
    assert "rewards start at 0" not in capsys.readouterr().out
    assert run(*argv, "--ref_model_name_or_path", home / "start") == 0
    assert "rewards start at 0" not in capsys.readouterr().out


def test_an_output_folder_keeps_its_files(argv, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(*argv) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def _shifted(method):
    return lambda self, sequences: method(self, sequences) - 0.1


def _damaged(method):
    def save(trainer, folder):
        with torch.no_grad():
            next(trainer.packed.model.parameters()).add_(1e-3)
        method(trainer, folder)

    return save


@pytest.mark.parametrize(
    ("owner", "name", "fault", "failed"),
    [
        (ReferenceCache, "log_probs", _shifted, "rewards start at 0"),
        (check_module.CheckedTrainer, "save_model", _damaged, "load again"),
        (check_module, "compare_rows", lambda _: lambda *_: (0.5, 1e-4), "run alone"),
    ],
)
def test_what_is_wrong_is_found(argv, monkeypatch, capsys, tmp_path, owner, name, fault, failed):
    monkeypatch.setattr(owner, name, fault(getattr(owner, name)))
    with pytest.raises(SystemExit, match=r"^1$"):
        run(*argv)
    lines = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert any(failed in line for line in lines) and not (tmp_path / "out").exists()


def test_a_run_that_resumes_is_not_checked(argv, capsys):
    assert run(*argv, "--resume_from_checkpoint", "last") == 2
    assert "leave out resume_from_checkpoint" in one_error(capsys)


class _WrongPositions(PackedCollator):
    def pack(self, *args):
        batch = super().pack(*args)
        return batch | {"position_ids": torch.arange(batch["input_ids"].numel())[None]}


def test_a_wrong_layout_differs_by_more_than_rounding_explains():
    packed = PackedModel(tiny_model("llama"))
    sequences = [((3, 4, 5), (6, 7)), ((3, 4, 5), (8, 9, 10)), ((9,), (4, 5, 6))]
    for dtype in (torch.float32, torch.bfloat16):
        packed.model.to(dtype)
        difference, bound = compare_rows(packed, sequences, PackedCollator())
        assert difference <= bound < 1
    packed.model.float()
    with magnified(packed.model):  # small random weights hardly see positions
        difference, bound = compare_rows(packed, sequences, _WrongPositions())
    assert difference > 10 * bound


def _code_and_output(argv: list) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return run(*argv), printed.getvalue()


@pytest.mark.slow
def test_a_run_whose_weights_are_sharded(argv, tmp_path):
    """Two processes of FSDP2 check the run as one does."""
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    environment |= {"CPT_CACHE": str(tmp_path / "reference"), "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    found = run_ranks(tmp_path, 2, _code_and_output, argv, environment=environment)
    assert [code for code, _ in found] == [0, 0]
    assert "rewards start at 0" in found[0][1] and "FAILED" not in found[0][1]
