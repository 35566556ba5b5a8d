"""A model prepared for packed rows still runs plain forwards and generation as before."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cpt_kernels.model.hooks import (
    attention_over,
    length_dependent_rotaries,
    noise_per_sequence,
    packed_forward,
    replaced_forward,
)
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.ops.exchange import SequenceGroup
from tests.helpers.architectures import LENGTH_DEPENDENT, VOCAB, tiny_model
from tests.helpers.exactness import LOSSES, make_batch, make_rows

_ARCHITECTURES = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "mixtral",
    "gpt_oss",
    "llama-dynamic",
    "phi3-longrope",
]


def _padded() -> dict[str, torch.Tensor]:
    """Two rows, the second one padded on its left as for generation."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", _ARCHITECTURES)
@torch.no_grad()
def test_plain_forwards_and_generation_stay_as_they_were(name):
    inputs, real = _padded(), _padded()["attention_mask"].bool()
    plain, model = tiny_model(name), tiny_model(name)
    packed = PackedModel(model)
    packed(make_batch(make_rows("slic"), packed), LOSSES["slic"])
    expected, found = plain(**inputs).logits, model(**inputs).logits
    assert torch.equal(found[real], expected[real])
    assert not torch.allclose(model(inputs["input_ids"]).logits[real], expected[real])  # the mask matters
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_training_without_packing_stays_as_it_was():
    inputs, plain, model = _padded(), tiny_model("gemma2"), tiny_model("gemma2")
    PackedModel(model)
    for one in (plain, model):
        one(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters()))


@torch.no_grad()
def test_quantized_layers_compute_as_in_training_on_packed_rows_alone():
    """The layer has the module name of bitsandbytes, whose layers compute by mode on a CPU."""
    modes = []

    class Layer(torch.nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    Layer.__module__ = "bitsandbytes.nn.modules"
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj = Layer(32, 48, bias=False)
    packed = PackedModel(model.eval())
    modes.clear()
    packed(make_batch(make_rows("slic"), packed), LOSSES["slic"])
    model(torch.arange(3)[None])
    assert modes == [True, False]


def test_the_attention_is_registered_once_under_one_name():
    name = attention_over("sdpa")
    assert attention_over("sdpa") == name and attention_over(name) == name and name != attention_over("eager")
    model = tiny_model("llama")
    PackedModel(model)
    PackedModel(model)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_a_model_that_was_loaded_with_flash_attention(name, monkeypatch):
    """Flash attention imports the kernel that the config names. The check of the head must not run it."""
    own, named = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def flash(module, *args, **kwargs):
        named.append(module.config._attn_implementation)
        return own(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, flash)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, name, lambda *args, **kwargs: None)
    plain, model, ids = tiny_model("llama"), tiny_model("llama"), torch.tensor([[3, 4, 5, 6]])
    model.config._attn_implementation = name
    packed = PackedModel(model)
    packed(make_batch(make_rows("slic"), packed), LOSSES["slic"])
    assert named == [] and model.config._attn_implementation == attention_over(name)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert set(named) == {name} and model.config._attn_implementation == attention_over(name)


def test_an_exception_in_a_packed_forward_leaves_nothing_behind():
    model, inputs = tiny_model("llama-dynamic"), _padded()
    packed, (rotary,) = PackedModel(model), length_dependent_rotaries(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        batch = make_batch(make_rows("slic"), packed)
        with pytest.raises(ValueError, match="reference"):
            packed({**batch, "ref_token_logps": None}, LOSSES["sigmoid"])
        assert torch.equal(model(**inputs).logits, expected)
    assert "forward" not in vars(rotary) and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_hooks_on_a_rotary_embedding_survive(name):
    """accelerate's hooks set the forward on the instance. Ours replaces it for a packed forward only."""
    model = tiny_model(name)
    packed = PackedModel(model)
    (rotary,) = packed.rotaries
    own, calls = rotary.forward, []

    def hooked(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    rotary.forward = hooked
    for _ in range(2):
        packed(make_batch(make_rows("slic", long=True), packed), LOSSES["slic"])
        assert rotary.forward is hooked
    assert calls


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_rope_that_does_not_depend_on_lengths_is_left_alone(name):
    packed = PackedModel(tiny_model(name))
    assert packed.rotaries == [] and packed.share_limit is None


def test_noise_is_scaled_by_the_length_of_each_sequence():
    """NEFTune's noise is within alpha / sqrt(L d), also for a shared prompt, and is off in evaluation."""
    embeddings, ids = torch.nn.Embedding(10, 4096), torch.zeros(1, 60, dtype=torch.int64)
    embeddings.neftune_noise_alpha = 5.0
    handle = embeddings.register_forward_hook(neftune_post_forward_hook)
    segments = [(10, 10), (4, 8), (46, 46)]
    clean = torch.nn.functional.embedding(ids, embeddings.weight)
    with noise_per_sequence(embeddings, segments):
        noise = (embeddings(ids) - clean)[0].split([queries for queries, _ in segments])
        assert torch.equal(embeddings(ids[0, :7]), clean[0, :7])  # codes of images
    for part, (_, keys) in zip(noise, segments):
        assert part.abs().max().item() == pytest.approx(5 / (keys * 4096) ** 0.5, rel=1e-2)
        assert abs(part.mean().item()) < 1e-3 and part.std().item() == pytest.approx(
            part.abs().max().item() / 3**0.5, rel=0.02
        )
    assert embeddings.training and "forward" not in vars(embeddings)
    padded = [(60, 60), (7, 7)]
    with noise_per_sequence(embeddings, padded):
        noise = embeddings(ids.expand(2, -1)) - clean
    for part, (tokens, _) in zip(noise, padded):
        assert part.abs().max().item() == pytest.approx(5 / (tokens * 4096) ** 0.5, rel=1e-2)
    group = SequenceGroup(None, rank=1, size=3)
    with noise_per_sequence(embeddings, segments, group):  # of tokens 1, 4, 7 | 10, 13 | 16, ...
        noise = (embeddings(ids[:, 1::3]) - clean[:, 1::3])[0].split([3, 2, 15])
    for part, (_, keys) in zip(noise, segments):
        assert part.abs().max().item() == pytest.approx(5 / (keys * 4096) ** 0.5, rel=1e-2)
    with noise_per_sequence(embeddings.eval(), segments):
        assert torch.equal(embeddings(ids), clean)
    handle.remove()


def test_replaced_forwards_and_packed_forwards_nest():
    linear = torch.nn.Linear(2, 2)
    with replaced_forward(linear, lambda x: x + 1):
        with replaced_forward(linear, lambda x: x + 2):
            assert linear(torch.zeros(2)).tolist() == [2, 2]
        assert linear(torch.zeros(2)).tolist() == [1, 1]
    assert "forward" not in vars(linear)
    model, ids = tiny_model("llama"), torch.tensor([[3, 4, 5, 6]])
    PackedModel(model)
    with torch.no_grad():
        expected = model(ids).logits
        with packed_forward():
            pass
        assert torch.equal(model(ids).logits, expected)
