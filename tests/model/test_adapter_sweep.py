"""Every tuner of PEFT, every variant of LoRA, and combinations of adapters: exact after ten steps, or refused.

`adapter_outcomes.json` holds what is expected of each under the pinned PEFT; ``python docs/adapters.py`` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.errors import UserError
from cpt_kernels.model import packed_model
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers import ROOT
from tests.helpers.adapter_sweep import alone, outcome
from tests.helpers.adapters import LORA, NOT_VARIANTS, TUNERS, cases, plain_model

EXPECTED = json.loads(Path(__file__).with_name("adapter_outcomes.json").read_text())
CASES = cases()
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, about FRoD's matrices


def test_every_tuner_has_a_case():
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} == set(TUNERS)


def test_every_option_of_lora_has_a_case():
    common = {field.name for field in dataclasses.fields(peft.PeftConfig)} | {"target_modules", "exclude_modules"}
    options = {field.name for field in dataclasses.fields(peft.LoraConfig)} - common
    assert options - NOT_VARIANTS == {name for variant in LORA.values() for name in variant} - NOT_VARIANTS


# One of each kind, for every run of the tests; the others: make test-models.
LIGHT = {
    *(
        "adaption_prompt / model",
        "boft / mlp",
        "ia3 / attention",
        "lily / attention",
        "loha / head",
        "poly / attention",
    ),
    *("prefix_tuning / model", "pvera / attention", "shadow / model", "trainable_tokens / model", "vera / attention"),
    *(
        "lora / attention",
        "lora / embedding",
        "lora alora / attention",
        "lora alora / head",
        "lora bias all / attention",
    ),
    *("lora dora / head", "lora kasa / head", "lora layer_replication / attention", "lora lora_bias / head"),
    *("lora modules_to_save head / attention", "lora modules_to_save embedding tied / attention"),
    *("lora pissa / attention", "lora target_parameters / head", "lora trainable_token_indices tied / attention"),
    *("two loras active / head", "the second of two loras / attention", "lora of another name / mlp"),
    *("mixed lora and loha / attention", "lora from a folder / head", "merged lora / head", "arrow / attention"),
}


@pytest.mark.parametrize("name", [n if n in LIGHT else pytest.param(n, marks=pytest.mark.sweep) for n in CASES])
def test_every_adapter_is_exact_or_refused(name, tmp_path):
    assert CASES.keys() >= LIGHT
    assert outcome(CASES[name], tmp_path) == EXPECTED["outcomes"].get(name, "new")


def test_the_page_has_the_outcomes():
    found = runpy.run_path(str(ROOT / "docs" / "adapters.py"))
    page = (ROOT / "docs" / "models.md").read_text()
    assert found["updated"](page, EXPECTED) == page, "run python docs/adapters.py --table"


# -- planted faults ---


def test_an_adapter_that_forgets_its_bias(monkeypatch, tmp_path):
    """The proof finds a head without its bias, which is zero until it is trained; the sweep finds it afterwards."""
    operands, train = packed_model.head_operands, ContrastiveTrainer.train

    def without_bias(head, rows):
        rows, weight, _ = operands(head, rows)
        return rows, weight, None

    name = "lora lora_bias / head"
    assert outcome(CASES[name], tmp_path / "right") == "packed"
    with monkeypatch.context() as patch:
        patch.setattr(packed_model, "head_operands", without_bias)
        assert outcome(CASES[name], tmp_path / "proof") == "padded rows, own logits"

    def train_with_fault(trainer):
        monkeypatch.setattr(packed_model, "head_operands", without_bias)
        return train(trainer)

    monkeypatch.setattr(ContrastiveTrainer, "train", train_with_fault)
    with pytest.raises(AssertionError, match="differ"):
        outcome(CASES[name], tmp_path / "sweep")


def test_an_adapter_that_mixes_the_row():
    """It sums over the tokens before, so a packed row would mix completions; until it is trained it adds zero."""
    model = peft.get_peft_model(plain_model(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_B["default"].register_forward_hook(lambda _, args, output: output.cumsum(1))
    with pytest.raises(UserError, match=r"in a packed row (log-probs|gradients) differ"):
        PackedModel(model, packing="true")
    assert PackedModel(model).padded


def test_pads_are_no_invocation():
    """The pad token belongs to aLoRA's invocation, which PEFT would find at the end of the shorter row."""
    options = {"target_modules": ["q_proj"], "alora_invocation_tokens": [9, 0], "init_lora_weights": False}
    model = peft.get_peft_model(plain_model(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)).double()
    packed = PackedModel(model)
    rows = [((5, 9, 0, 7), (11, 12, 9)), ((5, 9, 0, 7), (11, 12, 13, 14, 15))]
    found = packed(PackedCollator(padded=True).pack(rows, [], [], [])).tokens.logps
    torch.testing.assert_close(found, alone(model, rows))
