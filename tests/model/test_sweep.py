"""Every causal language model of transformers: packed exactly, in padded rows exactly, refused, or not buildable.

Each is built tiny, in fp64, from its class's own defaults, and held to the model's own forward of every completion
alone: log-probs and gradients. `outcomes.json` holds what is expected of each under the pinned transformers.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.errors import UserError
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers import ROOT
from tests.helpers.tiny_configs import VOCABULARY, causal_models, tiny_causal_lm

EXPECTED = json.loads(Path(__file__).with_name("outcomes.json").read_text())
# One of each kind of layer, for every run of the tests; the others: make test-models.
LIGHT = {
    *(
        "afmoe",
        "bamba",
        "bert",
        "bloom",
        "deepseek_v32",
        "deepseek_v3",
        "doge",
        "falcon",
        "gemma3_text",
        "gpt2",
        "gptj",
    ),
    *("granite", "lfm2", "llama", "llama4_text", "mamba2", "minicpm3", "nemotron", "opt", "qwen3_moe", "qwen3_next"),
    *("recurrent_gemma", "stablelm"),
}
KINDS = [kind if kind in LIGHT else pytest.param(kind, marks=pytest.mark.sweep) for kind in causal_models()]


def sequences() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Other tokens and lengths than those of the proof."""
    random = torch.Generator().manual_seed(7)
    draw = lambda n: tuple(torch.randint(5, VOCABULARY - 8, (n,), generator=random).tolist())  # noqa: E731
    first, second = draw(11), draw(3)
    return [(first, draw(7)), (first, draw(2)), (second, draw(9)), (second, draw(4))]


def alone(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def outcome(kind: str) -> str:
    """What becomes of a model; raises where it is run and not exact."""
    try:
        model = tiny_causal_lm(kind).eval()
        model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    except Exception as error:  # whatever a class raises that cannot be built from its own defaults
        return f"not buildable: {type(error).__name__}"
    try:
        packed = PackedModel(model)
    except UserError:
        return "refused"
    model.zero_grad()
    expected = torch.cat([alone(model, *sequence) for sequence in sequences()])
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_grads = torch.autograd.grad(expected.double() @ weights, parameters, allow_unused=True)
    found = packed(PackedCollator(padded=packed.padded).pack(sequences(), [], [], [])).tokens.logps
    grads = torch.autograd.grad(found.double() @ weights, parameters, allow_unused=True)
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), "log-probs differ"
    scale = max(g.abs().max().item() for g in expected_grads if g is not None)
    for (name, _), expected_grad, grad in zip(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], expected_grads, grads
    ):
        expected_grad, grad = (torch.zeros(()) if g is None else g for g in (expected_grad, grad))
        assert (grad - expected_grad).abs().max() < 1e-5 * scale, f"gradients of {name} differ"
    way = "padded rows" if packed.padded else "packed"
    return f"{way}, own logits" if packed.options is None else way


@pytest.mark.parametrize("kind", KINDS)
def test_every_causal_language_model_is_exact_or_refused(kind):
    assert outcome(kind) == EXPECTED["outcomes"].get(kind, "new")


def test_the_page_has_the_outcomes():
    found = runpy.run_path(str(ROOT / "docs" / "models.py"))
    page = (ROOT / "docs" / "models.md").read_text()
    assert found["updated"](page, EXPECTED) == page, "run python docs/models.py --table"


def test_a_wrong_model_is_caught(monkeypatch):
    """A planted fault: batches whose targets are one token off."""
    pack = PackedCollator.pack

    def shifted(self, *arguments):
        batch = pack(self, *arguments)
        return {**batch, "targets": batch["targets"].roll(1)}

    packed = PackedModel(tiny_causal_lm("llama").eval())
    assert not packed.padded
    monkeypatch.setattr(PackedCollator, "pack", shifted)
    with pytest.raises(UserError, match="does not run completions exactly"):
        PackedModel(tiny_causal_lm("llama").eval())
