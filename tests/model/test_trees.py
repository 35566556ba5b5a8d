"""Trees = alone: sequences that share beginnings have the log-probs, losses and gradients of every one run alone."""

from __future__ import annotations

import contextlib

import pytest
import torch

from cpt_kernels.data import collate
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers.architectures import CONFIGS, STATES, tiny_model
from tests.helpers.exactness import (
    BATCHES,
    FLOOR,
    FLOORS,
    LOSSES,
    Result,
    WithoutFp32,
    assert_as_exact,
    assert_equal,
    freeze_head,
    make_batch,
    packed_result,
    run_alone,
    run_packed,
)
from tests.helpers.trees import tree_rows

_FEW = ["llama", "gemma2", "qwen3_next"]  # gemma2 has windows of 5 tokens, shorter than most paths
_HEADS = ["frozen", "trained", "general"]


def _compare(name: str, head: str, seed: int, loss: str = "sigmoid") -> None:
    rows = tree_rows(seed, loss)
    model = tiny_model(name, torch.float64)
    # Sums of the fp32 parts of a recurrence would be rounded in another order.
    wide = WithoutFp32 if name in STATES else contextlib.nullcontext
    with wide():
        expected = run_alone(model, rows, LOSSES[loss])
    model.zero_grad()
    if head == "frozen":
        freeze_head(model)
    packed = PackedModel(model, packing="true")
    assert packed.trees
    batch = make_batch(rows, packed, minimum_shared=1)
    plain = make_batch(rows, packed)
    assert batch["token_index"] is not None and len(batch["targets"]) < sum(batch["completion_lengths"])
    assert batch["input_ids"].numel() < plain["input_ids"].numel()
    with wide():
        result = run_packed(packed, rows, LOSSES[loss], batch=batch, general=head == "general")
    assert_equal(result, expected, FLOORS.get(name, FLOOR))


@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("name", _FEW)
def test_random_tries(name, head):
    _compare(name, head, _FEW.index(name), "slic" if head == "trained" else "sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("name", CONFIGS)
def test_more_random_tries(name, head):
    for seed, loss in enumerate(["sigmoid", "slic", "sft", "sigmoid"], 10):
        _compare(name, head, seed, loss)


# --- The comparison fails for a wrong tree ---


def _sees_its_sibling(batch) -> None:
    """A segment reads its first own token's key in the place of the last token that it shares."""
    at = next(i for i, (queries, keys) in enumerate(batch["segment_lengths"]) if keys > queries)
    queries, _ = batch["segment_lengths"][at]
    end = batch["cu_seqlens_k"][at + 1].item() - queries
    batch["kv_index"][end - 1] = batch["cu_seqlens_q"][at] - 1  # the token before it in the row


def _positions_restart(batch) -> None:
    at = next(i for i, (queries, keys) in enumerate(batch["segment_lengths"]) if keys > queries)
    start, stop = batch["cu_seqlens_q"][at : at + 2].tolist()
    batch["position_ids"][0, start:stop] -= batch["position_ids"][0, start].item()


def _shared(batch) -> int:
    """Returns a prediction that several completions hold."""
    return int(batch["token_index"].bincount().argmax())


def _counts_a_token_twice(batch) -> None:
    """A completion has a token that several share twice, and its own next one not at all."""
    places = (batch["token_index"] == _shared(batch)).nonzero()[:, 0]
    ends = set(batch["cu_completions"].tolist())
    place = next(place for place in places.tolist() if place + 1 not in ends)
    _map(batch, place + 1, _shared(batch))


def _forgets_a_weight(batch) -> None:
    """The backward adds the weight of one of the completions that share a token to another token."""
    start = batch["token_offsets"][_shared(batch) + 1].item()
    batch["token_offsets"][_shared(batch) + 1] = start - 1


def _map(batch, place: int, prediction: int) -> None:
    batch["token_index"][place] = prediction
    batch["token_order"] = batch["token_index"].argsort(stable=True)
    counts = batch["token_index"].bincount(minlength=len(batch["targets"]))
    batch["token_offsets"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@pytest.mark.parametrize(
    "corrupt",
    [_sees_its_sibling, _positions_restart, _counts_a_token_twice, _forgets_a_weight],
    ids=lambda corrupt: corrupt.__name__,
)
def test_a_broken_tree_is_found(corrupt):
    rows = tree_rows(0)
    model = tiny_model("llama", torch.float64)
    expected = run_alone(model, rows, LOSSES["sigmoid"])
    model.zero_grad()
    packed = PackedModel(model)
    intact, batch = (make_batch(rows, packed, minimum_shared=1) for _ in range(2))
    corrupt(batch)
    scores = packed(batch, LOSSES["sigmoid"])
    scores.loss.backward()
    found = packed_result(model, intact, scores)
    parts = [Result({}, {}, found.grads)]
    if corrupt is not _forgets_a_weight:
        parts += [Result(found.completion_logps), Result({}, found.losses)]
    for part in parts:
        with pytest.raises(AssertionError, match="max error"):
            assert_equal(part, expected, FLOOR)


@pytest.mark.parametrize("fault", ["keys", "positions"])
def test_the_proof_runs_a_tree(fault, monkeypatch):
    """A model that runs prompt groups exactly and deeper trees not is proven for prompt groups alone."""
    lay_out = collate.lay_out

    def broken(segments, completions, *masks):
        layout = lay_out(segments, completions, *masks)
        prompts = {0, *(span.start for span in completions)}
        deep = [i for i, (queries, keys) in enumerate(segments) if keys - queries not in prompts]
        for i in deep:
            if fault == "positions":
                layout.position_ids[layout.cu_seqlens_q[i] : layout.cu_seqlens_q[i + 1]] += 1
            else:
                layout.kv_index[layout.cu_seqlens_k[i]] += 1
        return layout

    monkeypatch.setattr(collate, "lay_out", broken)
    packed = PackedModel(tiny_model("llama"), packing="true")
    assert not packed.trees and not packed.padded and "log-probs differ" in packed.tree_failure


@pytest.mark.slow
@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_low_precision_by_the_one_rule(name, dtype, head):
    """Pooled over six batches, as prompt groups are in ``test_packed_model.py``."""
    found, eager, reference = [], [], []
    for seed in range(BATCHES):
        rows = tree_rows(seed)
        for results, kind in ((reference, torch.float64), (eager, dtype)):
            results.append(run_alone(tiny_model(name, kind, weights=dtype), rows, LOSSES["sigmoid"]))
        model = tiny_model(name, dtype)
        if head == "frozen":
            freeze_head(model)
        packed = PackedModel(model)
        batch = make_batch(rows, packed, minimum_shared=1)
        found.append(run_packed(packed, rows, LOSSES["sigmoid"], batch=batch, general=head == "general"))
    assert_as_exact(found, eager, reference, torch.finfo(dtype).eps)
