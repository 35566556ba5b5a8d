"""Tests of docs/losses.md: its tables come from the code, its equations hold, its example runs."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F

from cpt_kernels.losses import LOSSES, LossOptions, PairLogps, build_loss, loss_options
from cpt_kernels.losses.options import SYMBOLS, default_of
from cpt_kernels.losses.transforms import f_divergence
from docs import losses as page
from tests.helpers import ROOT
from tests.helpers.pairs import random_pairs

TEXT = page.PAGE.read_text()
# Option -> a value that is not its default.
VALUES = {f.name: 0.7 * default_of(f) + 0.1 for f in fields(LossOptions) if f.name in SYMBOLS}


def evaluate(equation: str, pairs: PairLogps, symbols: dict[str, float]) -> torch.Tensor:
    """Evaluates a documented equation, which is Python except for three signs."""
    expression = equation.strip("`").replace("−", "-").replace("·", "*").replace("²", "**2")
    chosen, rejected = pairs.log_ratios()
    smoothing = symbols.get("ε", 0.0)
    names = {
        "lw": pairs.chosen, "ll": pairs.rejected, "ly": pairs.target, "rw": pairs.ref_chosen, "rl": pairs.ref_rejected,
        "nw": pairs.chosen_length, "nl": pairs.rejected_length, "ny": pairs.target_length, "gap": pairs.gap,
        "Δw": chosen, "Δl": rejected, "h": chosen - rejected, "N": pairs.tokens_per_pair,
        "σ": torch.sigmoid, "log": lambda x: torch.as_tensor(x).log(), "exp": torch.exp,
        "sort": lambda x: x.sort().values, "max": lambda least, x: x.clamp(min=least),
        "S": lambda x: -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x),
        "odds": lambda m: m - torch.log(1 - torch.exp(m)),
    }  # fmt: skip
    return eval(expression, {"__builtins__": {}}, names | symbols)


def test_the_tables_are_written_from_the_code():
    assert len(page._BLOCK.findall(TEXT)) == 2
    assert page.written(TEXT) == TEXT, "run: python docs/losses.py"


@pytest.mark.parametrize("name", LOSSES)
def test_the_equations_are_what_is_computed(name):
    pairs = random_pairs(scale=8.0)
    options = {option: VALUES[option] for option in loss_options(name) if option in VALUES}
    symbols = {SYMBOLS[option]: value for option, value in options.items()}
    found = evaluate(LOSSES[name].equation, pairs, symbols)
    torch.testing.assert_close(build_loss(name, **options)(pairs), found)


@pytest.mark.parametrize("name", LOSSES)
def test_what_an_entry_says_of_its_equation(name):
    entry, words = LOSSES[name], set(re.findall(r"\w+", LOSSES[name].equation))
    assert entry.needs_gap == ("gap" in words) and entry.uses_target == ("ly" in words)
    assert entry.needs_reference == bool(words & {"rw", "rl", "Δw", "Δl", "h"})
    assert entry.needs_rejected == bool(words & {"ll", "Δl", "h"})
    symbols = {SYMBOLS[option] for option in loss_options(name) if option in SYMBOLS}
    used = words & set(SYMBOLS.values()) | ({"ε"} if "S" in words else set())
    assert used == symbols, "an option without a symbol, or a symbol without an option"


@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_the_equations_of_divergences(kind):
    (equation,) = re.findall(rf"`([^`]+)` \(`{kind}`", TEXT)
    pairs = random_pairs(scale=4.0)
    for found, ratio in zip(f_divergence(pairs, kind, 0.3).log_ratios(), pairs.log_ratios()):
        torch.testing.assert_close(found, evaluate(equation, pairs, {"Δ": ratio, "a": 0.3}))


def test_the_example_runs():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    space: dict = {}
    exec(compile(block, "docs/losses.md", "exec"), space)
    assert space["loss"](random_pairs()).shape == (16,)


def test_files_that_are_named_exist():
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / "docs" / link).resolve().is_file(), link
