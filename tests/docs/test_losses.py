"""docs/losses.md: its table is the table in the code, its equations are executed, its example runs."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from cpt_kernels.losses import LOSSES, PairLogps, build_loss, loss_options
from cpt_kernels.losses.transforms import f_divergence
from tests.helpers import ROOT
from tests.helpers.pairs import random_pairs

TEXT = (ROOT / "docs/losses.md").read_text()
ROWS = [re.split(r"\s*\|\s*", line.strip("| ")) for line in TEXT.splitlines() if line.startswith("| `")]
TABLE = {row[0].strip("`"): row[1:] for row in ROWS if len(row) == 6 and row[0] != "`loss_type`"}
# Symbol -> the option that it stands for; α and λ are those of the loss.
SYMBOLS = {"beta": "β", "label_smoothing": "ε", "discopop_tau": "τ", "odpo_alpha": "α", "cpo_alpha": "α",
           "dpop_lambda": "λ", "slic_lambda": "λ", "slic_delta": "δ", "simpo_gamma": "γ"}  # fmt: skip
VALUES = {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.7, "odpo_alpha": 0.4, "cpo_alpha": 0.6,
          "dpop_lambda": 2.0, "slic_lambda": 0.2, "slic_delta": 3.0, "simpo_gamma": 0.9}  # fmt: skip


def evaluate(equation: str, pairs: PairLogps, symbols: dict[str, float]) -> torch.Tensor:
    """A documented equation on numbers. Its notation is Python's but for three signs."""
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


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_is_the_one_in_the_code(name):
    row = LOSSES[name]
    equation, source, reference, separable, trl = TABLE[name]
    assert source == row.source
    assert (reference, separable) == tuple("yes" if is_so else "no" for is_so in (row.needs_reference, row.separable))
    assert trl.replace("`", "") == (row.trl or "—")
    assert "gap" in equation or not row.needs_gap


@pytest.mark.parametrize("name", LOSSES)
def test_the_equations_are_what_is_computed(name):
    pairs = random_pairs(scale=8.0)
    options = {option: VALUES[option] for option in loss_options(name) if option in VALUES}
    symbols = {SYMBOLS[option]: value for option, value in options.items()}
    found = evaluate(TABLE[name][0], pairs, symbols)
    torch.testing.assert_close(build_loss(name, **options)(pairs), found)


def test_nothing_else_is_in_the_table():
    assert list(TABLE) == list(LOSSES)
    for option in {option for name in LOSSES for option in loss_options(name)}:
        assert f"`{option}`" in TEXT, option


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
