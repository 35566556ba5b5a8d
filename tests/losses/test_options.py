"""Tests that every option of a loss has its field, and that a new loss needs a function and a field only."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from transformers import HfArgumentParser

from cpt_kernels.config import ContrastiveConfig
from cpt_kernels.losses import LOSSES, Builtin, LossOptions, PairLogps, loss_options
from cpt_kernels.losses.options import SYMBOLS, default_of, option
from docs.losses import loss_rows, option_rows
from tests.helpers.pairs import random_pairs

FIELDS = {f.name: f for f in fields(LossOptions)}


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_has_its_field(name):
    for taken in loss_options(name):
        default = inspect.signature(LOSSES[name].function).parameters[taken].default
        line = f"    {taken}: {type(default).__name__} = option({default!r}, ...)"
        assert taken in FIELDS, f"add to LossOptions in cpt_kernels/losses/options.py:\n{line}"
        # EXO is not defined at label_smoothing 0, so its function has the paper's value.
        if (name, taken) != ("exo_pair", "label_smoothing"):
            assert default_of(FIELDS[taken]) == default, f"LossOptions and losses.functions.{name} differ:\n{line}"


def test_every_field_has_help_and_is_an_option_of_the_configuration():
    for name, field in FIELDS.items():
        assert field.metadata["help"][-1] in ".:", name
        assert ContrastiveConfig.__dataclass_fields__[name].metadata == field.metadata


def scaled(logps: PairLogps, *, beta: float = 0.1, scaled_by: float = 2.0) -> torch.Tensor:
    """DPO times a constant."""
    return -scaled_by * F.logsigmoid(beta * logps.log_ratio_difference())


@dataclass
class WithScale(LossOptions):
    scaled_by: float = option(2.0, "Factor of the scaled loss.")


@dataclass
class ConfigWithScale(WithScale, ContrastiveConfig):
    pass


def test_a_loss_is_a_function_with_its_entry_and_a_field(monkeypatch, tmp_path):
    """The recipe of docs/losses.md: configuration, checks, flag, help and documentation derive from both."""
    monkeypatch.setitem(LOSSES, "scaled", Builtin(scaled, "−κ·log(σ(β·h))", "nobody"))
    monkeypatch.setitem(SYMBOLS, "scaled_by", "κ")
    pairs = random_pairs()
    config = ConfigWithScale(str(tmp_path), loss_type="scaled", scaled_by=3.0, use_cpu=True, report_to="none")
    torch.testing.assert_close(config.build_loss()(pairs), scaled(pairs, scaled_by=3.0))
    with pytest.raises(ValueError, match="scaled_by has no effect on loss_type 'sigmoid'"):
        ConfigWithScale(str(tmp_path), scaled_by=3.0, use_cpu=True, report_to="none")
    parser = HfArgumentParser(ConfigWithScale)
    assert "Factor of the scaled loss." in parser.format_help()
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    (parsed,) = parser.parse_args_into_dataclasses([*argv, "--loss_type", "scaled", "--scaled_by", "4"])
    torch.testing.assert_close(parsed.build_loss()(pairs), scaled(pairs, scaled_by=4.0))
    assert list(loss_rows())[-1] == "| `scaled` | `−κ·log(σ(β·h))` | nobody | yes | yes | — |"
    assert list(option_rows(WithScale))[-1] == "| `scaled_by` | κ | 2.0 | `scaled` | Factor of the scaled loss. |"


def test_a_forgotten_field_breaks_its_own_loss_only(monkeypatch):
    monkeypatch.setitem(LOSSES, "scaled", Builtin(scaled, "−κ·log(σ(β·h))", "nobody"))
    assert LossOptions(loss_type=["sigmoid"]).check_loss().name == "sigmoid"
    with pytest.raises(AttributeError, match="scaled_by"):
        LossOptions(loss_type=["scaled"]).check_loss()
