"""A packed row cut over the ranks of a sequence group has the losses and every gradient of one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.flop_counter import FlopCounterMode

from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.ops.exchange import SequenceGroup, heads_of_ranks
from tests.helpers.architectures import CONFIGS, LENGTH_DEPENDENT, _config, recompute_activations, tiny_model
from tests.helpers.exactness import (
    FLOOR,
    FLOORS,
    LOSSES,
    assert_equal,
    freeze_head,
    make_batch,
    make_rows,
    run_alone,
    run_packed,
)
from tests.helpers.forked import run_ranks
from tests.helpers.trees import tree_rows

UNEVEN = "llama-6-3"  # heads that no number of ranks divides into even groups
CONFIGS[UNEVEN] = _config("Llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
ONE_KEY = "llama-4-1"
CONFIGS[ONE_KEY] = _config("Llama", num_key_value_heads=1)


def joined(size: int) -> SequenceGroup:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group, _ = dist.new_subgroups(group_size=size)
    return SequenceGroup(group, dist.get_rank(group), size)


def rows_of(case: dict[str, Any]) -> list[dict]:
    if case.get("short"):  # fewer tokens than ranks
        return [{"prompt_ids": [5, 9], "completion_ids": [[6]], "chosen": [0], "rejected": [], "targets": [0]}]
    if case.get("tree"):
        rows = tree_rows(0)
        return [row | {"scored": weights_of(row)} for row in rows] if case.get("weights") else rows
    return make_rows(case.get("loss", "slic"), long=case["name"] in LENGTH_DEPENDENT, seed=case.get("seed", 0))


def weights_of(row: dict) -> list[list[float]]:
    """Returns weights of the tokens of each completion, of which some are 0."""
    random = np.random.default_rng(row["prompt_ids"])
    weights = [random.choice([0.0, 0.5, 1.0, 3.0], len(ids)).tolist() for ids in row["completion_ids"]]
    return [[*mask[:-1], mask[-1] or 2.0] for mask in weights]


def model_of(case: dict[str, Any]) -> torch.nn.Module:
    model = tiny_model(case["name"], torch.float64)
    if case.get("frozen"):
        freeze_head(model)
    if case.get("lora"):
        torch.manual_seed(1)
        modules = ["q_proj", "down_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=modules, init_lora_weights=False)).double()
    return model


def compare(size: int, cases: list[dict[str, Any]]) -> None:
    """Compares each case with the definition: every completion in a forward of its own, all in fp64."""
    group = joined(size)
    for case in cases:
        rows, loss, model = rows_of(case), LOSSES[case.get("loss", "slic")], model_of(case)
        if case.get("checkpointing"):
            recompute_activations(model)
        packed = PackedModel(model, case.get("tile"), group=group)
        if case.get("fsdp"):
            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (size,)))
            fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        how = {"share_prompts": case.get("share", True), "minimum_shared": 1 if case.get("tree") else None}
        batch = make_batch(rows, packed, **how)
        found = run_packed(packed, rows, loss, batch=batch, general=case.get("general", False))
        if case.get("fsdp"):
            found.grads = {name: grad.full_tensor() for name, grad in found.grads.items()}
        else:  # the mean of the gradients over the ranks, as DDP computes it
            found.grads = {name: group.sum(grad) / size for name, grad in found.grads.items()}
        if group.rank == 0:
            if case.get("weights"):
                one = PackedModel(model_of(case))
                expected = run_packed(one, rows, loss, batch=make_batch(rows, one, **how))
            else:
                expected = run_alone(model_of(case), rows, loss)
            try:
                assert_equal(found, expected, FLOORS.get(case["name"], FLOOR))
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error


CASES = [
    dict(name="llama", short=True, loss="sft"),
    dict(name=UNEVEN, share=False, tile=1e-4),  # tiles of one row: four products
    dict(name=ONE_KEY, lora=True),
    dict(name="gemma2", frozen=True, checkpointing=True),  # windows, soft-caps
    dict(name="gpt_oss"),  # sinks, experts
    dict(name="llama-tied", loss="sigmoid", checkpointing=True, general=True),
    dict(name="phi3-longrope", seed=1),
    dict(name="gpt2", tree=True, loss="sigmoid"),
    dict(name="qwen3", fsdp=True),
    dict(name="llama", weights=True, tree=True, loss="sigmoid"),
    dict(name="qwen3", fsdp=True, weights=True, tree=True, loss="sigmoid"),
]


@pytest.mark.parametrize("size", [2, 4, pytest.param(3, marks=pytest.mark.slow)])
def test_a_cut_row_is_exact(tmp_path, size):
    run_ranks(tmp_path, size, compare, size, CASES[:5] if size == 4 else CASES)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (8, 1), (14, 2), (6, 3), (9, 3), (32, 8)])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_query_head_has_its_key_head(heads, key_heads, ranks):
    seen = []
    for own in heads_of_ranks(heads, key_heads, ranks):
        queries = range(heads)[own.queries]
        keys = [key for some in own.keys for key in range(key_heads)[some]]
        assert len(queries) % len(keys) == 0 and own.key_count == len(keys)
        expected = [query // (heads // key_heads) for query in queries]
        assert [keys[i // (len(queries) // len(keys))] for i in range(len(queries))] == expected
        seen += queries
    assert seen == [*range(heads)]


def refusals(size: int) -> dict[str, str]:
    group, found = joined(size), {}
    few = tf.LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    bloom = tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    models = {"lfm2": tiny_model("lfm2"), "llama": tiny_model("llama")}
    models |= {
        name: tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, config in (("bloom", bloom), ("few", few))
    }
    for name, model in models.items():
        with pytest.raises(ValueError) as error:
            PackedModel(model, packing="false" if name == "llama" else "auto", group=group)
        found[name] = str(error.value)
    with pytest.raises(ValueError, match="sp_size=3 needs packed rows of text: leave it out for rows with images"):
        PackedModel(tiny_model("llama"), images=object(), group=group)
    return found


def test_models_that_cannot_be_cut_are_named(tmp_path):
    for found in run_ranks(tmp_path, 3, refusals, 3):
        assert "carry a state from token to token (Lfm2ShortConv)" in found["lfm2"]
        assert "in a packed row" in found["bloom"]
        assert "attention has 2 heads, fewer than the 3 ranks" in found["few"]
        assert all("sp_size=3 needs packed rows of text" in text for text in found.values())


def count(size: int, tokens: int, backward: bool) -> tuple[int, int]:
    """Counts the FLOPs of one rank, and the bytes that its forward saves for the backward."""
    group = joined(size) if size > 1 else None
    packed = PackedModel(tiny_model("llama"), group=group, attention_backend="eager" if backward else "sdpa")
    random = np.random.default_rng(0)
    rows = []
    for _ in range(max(1, tokens // 4096)):
        prompt, *completions = random.integers(3, 61, (3, min(tokens, 4096) // 3)).tolist()
        rows.append(
            {"prompt_ids": prompt, "completion_ids": completions, "chosen": [0], "rejected": [1], "targets": [0]}
        )
    # Prompts are not shared where memory is measured: a CPU's attention would save a mask for each later completion.
    batch = make_batch(rows, packed, share_prompts=backward)
    saved: dict[int, int] = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with FlopCounterMode(display=False) as flops:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
            scores = packed(batch, LOSSES["slic"])
        if backward:
            scores.loss.backward()
    return flops.get_total_flops(), sum(saved.values())


def test_work_of_a_rank_is_its_share(tmp_path):
    (alone,) = run_ranks(tmp_path, 1, count, 1, 600, True)
    for flops, _ in run_ranks(tmp_path, 4, count, 4, 600, True):
        assert flops == pytest.approx(alone[0] / 4, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [8192, 16384, 32768, 65536])
def test_activations_of_a_rank_are_its_share(tmp_path, tokens):
    (alone,) = run_ranks(tmp_path, 1, count, 1, tokens, False)
    assert alone[1] > 4000 * tokens
    for size in (2, 4):
        found = run_ranks(tmp_path, size, count, size, tokens, False)
        print(tokens, size, [kept / alone[1] for _, kept in found])
        for _, kept in found:
            assert kept == pytest.approx(alone[1] / size, rel=0.05)
