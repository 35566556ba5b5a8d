"""Every causal language model and image-text model of transformers, tiny, from its class's own defaults.

Each runs completions exactly, packed or in padded rows, or is refused; see :mod:`tests.helpers.sweep` for what is
compared. `outcomes.json` holds what is expected of each, by the version of transformers; ``python docs/models.py``
writes it.
"""

from __future__ import annotations

import json
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from cpt_kernels.model.packed_model import PackedModel
from tests.helpers import ROOT
from tests.helpers.sweep import TABLES, check_forward, outcome
from tests.helpers.tiny_configs import tiny_causal_lm, tiny_lm
from tests.model.test_proof import OwnAttention

EXPECTED = json.loads(Path(__file__).with_name("outcomes.json").read_text())
# One of each kind of layer, for every run of the tests; the others: make test-models.
LIGHT = {
    *("afmoe", "bamba", "bert", "bloom", "deepseek_v32", "doge", "falcon", "gemma3_text", "gpt2", "gptj", "granitemoe"),
    *("lfm2", "llama", "llama4_text", "mamba2", "minicpm3", "nemotron", "opt", "phimoe", "qwen3_moe", "qwen3_next"),
    *("recurrent_gemma", "roberta", "blip", "llava", "qwen2_vl"),
}
CASES = [
    pytest.param(table, kind, name, changes, id=f"{table}-{kind}", marks=() if kind in LIGHT else pytest.mark.sweep)
    for table, (models, changes) in TABLES.items()
    for kind, name in models.items()
]


@pytest.mark.parametrize(("table", "kind", "name", "changes"), CASES)
def test_every_model_is_exact_or_refused(table, kind, name, changes, tmp_path):
    found = outcome(partial(tiny_lm, kind, name, **changes), tmp_path)
    # Under a version without outcomes all that counts is that nothing is wrong and nothing crashes.
    if transformers.__version__ in EXPECTED:
        assert found == EXPECTED[transformers.__version__][table].get(kind, "new")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("nemotron", {}),  # its layers drop keyword arguments
        ("lfm2", {}),  # a short convolution
        ("roberta", {"is_decoder": True}),  # positions that do not start at 0
        ("bert", {"is_decoder": True}),
        ("marian", {}),  # a decoder's half, without position_ids
        # Temperature by the place in the row, without chunks.
        ("llama4_text", {"layer_types": ["full_attention"] * 4, "no_rope_layers": [0] * 4, "floor_scale": 2}),
        ("phimoe", {"sliding_window": 5}),  # a window in the mask alone
        ("deepseek_v32", {}),  # an indexer
        ("afmoe", {}),  # a view of the attention's result
        ("granitemoe", {}),  # no auxiliary loss by default
        ("opt", {}),
        ("minicpm3", {}),  # a logit scale in the config that the model does not apply as it says
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_were_wrong_or_refused_are_exact(kind, changes):
    rows = [((5,), (6,)), ((7,), (8,)), (tuple(range(10, 22)), (9, 8, 7)), (tuple(range(10, 22)), (30, 31, 32, 33))]
    packed = PackedModel(tiny_causal_lm(kind, **changes).eval())
    check_forward(packed, tiny_causal_lm(kind, **changes).eval(), rows)


def test_the_pinned_versions_have_outcomes():
    for file in ("constraints.txt", "constraints-oldest.txt"):
        (version,) = re.findall(r"^transformers==([\d.]+)", (ROOT / file).read_text(), re.MULTILINE)
        assert version in EXPECTED


def test_the_page_has_the_outcomes():
    found = runpy.run_path(str(ROOT / "docs" / "models.py"))
    page = (ROOT / "docs" / "models.md").read_text()
    assert found["updated"](page, EXPECTED) == page, "run python docs/models.py --table"


def test_a_layer_that_drops_the_layout_is_caught(tmp_path, monkeypatch):
    """Planted faults: layers that do not hand on the layout, in models that are packed although the proof fails."""
    monkeypatch.setattr(PackedModel, "_try", lambda *_: None)

    def own_attention(**changes):
        torch.manual_seed(0)
        return OwnAttention(tiny_causal_lm("llama", **changes).config).double()

    with pytest.raises(AssertionError, match="log-probs differ"):
        outcome(own_attention, tmp_path)
    found = outcome(partial(tiny_causal_lm, "nemotron"), tmp_path)
    assert found == "refused: NemotronAttention is not given the layout of the packed row"
