"""Packed = alone: a packed row with shared prompts has the losses and gradients of every completion run alone."""

from __future__ import annotations

import functools
from itertools import product

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.packing import scatter_rounds
from cpt_kernels.losses import build_loss
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.ops.gather import segment_sum
from tests.helpers.architectures import CONFIGS, LENGTH_DEPENDENT, MIXTURES, recompute_activations, tiny_model
from tests.helpers.exactness import (
    BATCHES,
    FLOOR,
    FLOORS,
    LOSSES,
    Result,
    Routing,
    alone,
    assert_as_exact,
    assert_equal,
    freeze_head,
    gradients,
    make_batch,
    make_rows,
    packed_result,
    run_alone,
    run_packed,
    sequences_in,
)

FROZEN, TRAINED, GENERAL = "frozen", "trained", "general"
KEPT, RECOMPUTED = "kept", "recomputed"  # activations: gradient checkpointing off and on
FP32, BF16 = torch.float32, torch.bfloat16

_FULL = ["llama", "gemma2", "gpt2"]
_PAIRWISE = [  # every pair of (dtype, head), (dtype, activations) and (head, activations)
    (FP32, FROZEN, KEPT),
    (FP32, TRAINED, RECOMPUTED),
    (FP32, GENERAL, KEPT),
    (BF16, FROZEN, RECOMPUTED),
    (BF16, TRAINED, KEPT),
    (BF16, GENERAL, RECOMPUTED),
]
_CASES = [
    (name, *case) for name in _FULL for case in product((FP32, BF16), (FROZEN, TRAINED, GENERAL), (KEPT, RECOMPUTED))
]
_CASES += [(name, *case) for name in CONFIGS if name not in _FULL for case in _PAIRWISE]


def _ids(value) -> str:
    return str(value).removeprefix("torch.")


def _loss_of(name: str, turn: int = 0) -> str:
    """Assigns losses to architectures in turn: a full cross product would test the same code again."""
    return list(LOSSES)[(list(CONFIGS).index(name) + turn) % len(LOSSES)]


def _rows(name: str, loss: str, seed: int = 0) -> list[dict]:
    return make_rows(loss, long=name in LENGTH_DEPENDENT, seed=seed)


def _floor(name: str) -> float:
    return FLOORS.get(name, FLOOR)


@pytest.mark.parametrize(("name", "dtype", "head", "activations"), _CASES, ids=_ids)
def test_packed_is_as_exact_as_alone(name, dtype, head, activations):
    loss = _loss_of(name, turn=dtype == BF16)
    reference, routings = alone(name, dtype, torch.float64, loss)
    eager, _ = alone(name, dtype, dtype, loss)
    model = tiny_model(name, dtype)
    if head == FROZEN:
        freeze_head(model)
    if activations == RECOMPUTED:
        recompute_activations(model.train())
    packed, results = PackedModel(model), []
    for seed in range(BATCHES):
        routing = Routing(model, routings[seed]) if name in MIXTURES else None
        model.zero_grad()
        rows = _rows(name, loss, seed)
        results.append(run_packed(packed, rows, LOSSES[loss], general=head == GENERAL, routing=routing))
    assert_as_exact(results, eager, reference, torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("head", [FROZEN, TRAINED, GENERAL])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_packed_on_a_gpu_is_as_exact_as_alone_on_a_cpu(name, head):
    """In bf16, with the attention and the kernels that are chosen on the GPU."""
    loss, results = _loss_of(name), []
    (reference, _), (eager, _) = (alone(name, BF16, dtype, loss) for dtype in (torch.float64, BF16))
    model = tiny_model(name, BF16).cuda()
    if head == FROZEN:
        freeze_head(model)
    packed = PackedModel(model)
    for seed in range(BATCHES):
        model.zero_grad()
        rows = _rows(name, loss, seed)
        batch = send_to_device(make_batch(rows, packed), model.device)
        found = run_packed(packed, rows, LOSSES[loss], batch=batch, general=head == GENERAL)
        results.append(Result(**send_to_device(vars(found), "cpu")))
    assert_as_exact(results, eager, reference, torch.finfo(BF16).eps)


@pytest.mark.parametrize("head", [FROZEN, TRAINED, GENERAL])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_alone_in_fp64(name, head):
    loss = _loss_of(name, turn=2 if head == TRAINED else head == GENERAL)
    model = tiny_model(name, torch.float64)
    expected = run_alone(model, _rows(name, loss), LOSSES[loss])
    model.zero_grad()
    frozen = 0
    if head == FROZEN:
        freeze_head(model)
        frozen = len(list(model.get_output_embeddings().parameters()))
    result = run_packed(PackedModel(model), _rows(name, loss), LOSSES[loss], general=head == GENERAL)
    assert len(result.grads) == len(expected.grads) - frozen
    assert all(grad.any() for grad in result.grads.values())
    assert_equal(result, expected, _floor(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_do_not_share_their_prompts_give_the_same(name):
    loss = _loss_of(name, turn=2)
    rows = _rows(name, loss)
    expected = run_alone(tiny_model(name, torch.float64), rows, LOSSES[loss])
    packed = PackedModel(tiny_model(name, torch.float64))
    batch = make_batch(rows, packed, share_prompts=False)
    assert not batch["shared"] and make_batch(rows, packed)["shared"]
    assert_equal(run_packed(packed, rows, LOSSES[loss], batch=batch), expected, _floor(name))


@pytest.mark.parametrize("loss", ["sigmoid", "slic"])
def test_rows_with_one_prompt_are_one_group(loss):
    """With one row per pair, repeated prompts and completions are run once, and every pair counts."""
    rows, split = make_rows(loss), []
    for row in rows:
        for w, y, x in zip(row["chosen"], row["targets"], row["rejected"]):
            completions = [row["completion_ids"][i] for i in (w, y, x)]
            split.append(row | {"completion_ids": completions, "chosen": [0], "targets": [1], "rejected": [2]})
    split += [row for row in rows if not row["chosen"]]
    expected = run_alone(tiny_model("llama", torch.float64), rows, LOSSES[loss])
    packed, batch = PackedModel(tiny_model("llama", torch.float64)), make_batch(split)
    result = run_packed(packed, split, LOSSES[loss], batch=batch)
    assert batch["input_ids"].numel() == make_batch(rows)["input_ids"].numel()
    assert_equal(result, expected, FLOOR)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_rope_that_depends_on_lengths_meets_both_kinds(name):
    packed = PackedModel(tiny_model(name))
    batch = make_batch(_rows(name, "sigmoid"), packed)
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences_in(batch)]
    assert packed.share_limit == 16 and min(lengths) < 16 and sum(n > 16 for n in lengths) >= 4
    assert all(queries == keys for queries, keys in batch["segment_lengths"] if keys > 16)
    assert any(queries < keys for queries, keys in batch["segment_lengths"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_autocast_is_as_exact_as_autocast_alone(name):
    reference, _ = alone(name, FP32, torch.float64, "sigmoid")
    model, eager = tiny_model(name), []
    for seed in range(BATCHES):
        model.zero_grad()
        with torch.autocast("cpu", BF16):
            eager.append(run_alone(model, _rows(name, "sigmoid", seed), LOSSES["sigmoid"]))
    for frozen, general in ((True, False), (False, False), (False, True)):
        model, results = tiny_model(name), []
        if frozen:
            freeze_head(model)
        packed = PackedModel(model)
        for seed in range(BATCHES):
            model.zero_grad()
            with torch.autocast("cpu", BF16):
                results.append(run_packed(packed, _rows(name, "sigmoid", seed), LOSSES["sigmoid"], general=general))
        assert all(grad.dtype == FP32 for grad in results[0].grads.values())
        assert_as_exact(results, eager, reference, torch.finfo(BF16).eps)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncated_rows(mode):
    """`keep_end` leaves chosen and rejected with different prompts: a pair then spans two groups of one completion."""
    rows = _rows("llama", "slic")
    kept = slice(11) if mode == "keep_start" else slice(-11, None)
    cut = []  # for every row, the (prompt, completion) of its completions
    for row in rows:
        completions = row["completion_ids"]
        wholes = [(row["prompt_ids"] + c)[kept] for c in completions]
        ends = [
            len(row["prompt_ids"]) if mode == "keep_start" else len(w) - len(c) for w, c in zip(wholes, completions)
        ]
        cut.append([(tuple(whole[:end]), tuple(whole[end:])) for whole, end in zip(wholes, ends)])
    expected = _slic_alone(tiny_model("llama", torch.float64), rows, cut)
    model = tiny_model("llama", torch.float64)
    packed = PackedModel(model)
    batch = PackedCollator(max_length=11, truncation_mode=mode)(rows)
    assert_equal(run_packed(packed, rows, LOSSES["slic"], batch=batch), expected, FLOOR)
    if mode == "keep_end":
        assert len({prompt for prompt, _ in sequences_in(batch)}) > len(rows)
        assert max(completions for completions, _ in batch["pair_blocks"]) > 1


def _slic_alone(model: nn.Module, rows: list[dict], cut: list[list[tuple]]) -> Result:
    """Computes SLiC step by step for rows whose completions have different prompts."""
    logps, losses = {}, {}
    for prompt, completion in (sequence for sequences in cut for sequence in sequences):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        targets = torch.tensor(completion)[:, None]
        logps[prompt, completion] = logits.log_softmax(-1).gather(1, targets).sum()
    for row, sequences in zip(rows, cut):
        for pair in zip(row["chosen"], row["targets"], row["rejected"]):
            pair = tuple(sequences[i] for i in pair)
            chosen, target, rejected = (logps[sequence] for sequence in pair)
            losses[pair] = torch.relu(40.0 - chosen + rejected) - 0.5 * target
    sum(losses.values()).backward()
    detached = ({key: value.detach() for key, value in values.items()} for values in (logps, losses))
    return Result(*detached, gradients(model))


# --- Uses of one forward ---


@pytest.mark.parametrize("head", [FROZEN, TRAINED, GENERAL])
def test_a_second_backward_gives_the_same_gradients(head):
    model = tiny_model("llama")
    if head == FROZEN:
        freeze_head(model)
    packed, batch = PackedModel(model), make_batch(make_rows("sigmoid"))
    scores = packed(batch, LOSSES["sigmoid"], general=head == GENERAL)
    scores.loss.backward(retain_graph=True)
    first = packed_result(model, batch, scores).grads
    model.zero_grad()
    scores.loss.backward()
    second = packed_result(model, batch, scores).grads
    assert all(torch.equal(first[name], second[name]) and first[name].any() for name in first)


def test_the_gradient_is_scaled_by_what_arrives():
    packed, batch = PackedModel(tiny_model("gemma2", torch.float64)), make_batch(make_rows("slic"))
    (packed(batch, LOSSES["slic"]).loss * -0.25).backward()
    scaled = [p.grad.clone() for p in packed.model.parameters()]
    packed.model.zero_grad()
    packed(batch, LOSSES["slic"]).loss.backward()
    for one, other in zip(packed.model.parameters(), scaled):
        torch.testing.assert_close(-0.25 * one.grad, other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss", "phi3-longrope"])
def test_scoring_without_a_loss(name):
    rows = _rows(name, "sft")
    expected = run_alone(tiny_model(name, torch.float64), rows, LOSSES["sft"])
    packed = PackedModel(tiny_model(name, torch.float64))
    batch = make_batch(rows, packed)
    with torch.no_grad():
        scores = packed(batch, statistics=True)
    assert scores.loss is None and scores.losses is None and not scores.tokens.logps.requires_grad
    found = Result(packed_result(packed.model, batch, scores).completion_logps)
    assert_equal(found, expected, _floor(name))
    assert scores.tokens.entropy.min() > 0 and scores.tokens.correct.dtype == torch.bool
    torch.testing.assert_close(segment_sum(scores.tokens.logps, batch["cu_completions"]), scores.completion_logps)
    # Log-probs are differentiable if gradients are enabled; their sum is the sft loss.
    (-packed(batch).completion_logps.sum() * batch["num_pairs"] / batch["num_chosen_tokens"]).backward()
    assert_equal(packed_result(packed.model, batch, scores), expected, _floor(name))


def test_log_probs_that_lost_their_gradient_say_so():
    packed, batch = PackedModel(tiny_model("llama")), make_batch(make_rows("sigmoid"))
    with pytest.raises(RuntimeError, match="general"):
        packed(batch, LOSSES["sigmoid"]).completion_logps.sum().backward()
    scores = packed(batch, LOSSES["sigmoid"], general=True)
    (scores.loss + scores.completion_logps.mean()).backward()
    assert all(parameter.grad.any() for parameter in packed.model.parameters())


def test_a_rank_without_rows_takes_part():
    packed, batch = PackedModel(tiny_model("llama")), PackedCollator()([])
    for loss in (build_loss("slic"), build_loss("sft")):
        packed.model.zero_grad()
        scores = packed(batch, loss)
        assert scores.loss.item() == 0 and scores.losses.shape == (0,)
        scores.loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in packed.model.parameters())


def test_a_rank_without_rows_takes_part_with_a_reference():
    packed, batch = PackedModel(tiny_model("llama")), make_batch([])
    packed(batch, LOSSES["sigmoid"]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in packed.model.parameters())


def test_the_wrapped_model_and_the_heads_hooks_run():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **kwargs):
            self.calls += 1
            return self.module(**kwargs)

    model = tiny_model("llama")
    packed, wrapped, seen = PackedModel(model), Wrapper(model), []
    model.lm_head.register_forward_pre_hook(lambda *_: seen.append("pre"))
    model.lm_head.register_full_backward_hook(lambda *_: seen.append("backward"))
    own = model.lm_head.forward = functools.partial(nn.Linear.forward, model.lm_head)  # like accelerate's hooks
    packed(make_batch(make_rows("slic")), LOSSES["slic"], wrapped=wrapped).loss.backward()
    assert wrapped.calls == 1 and seen == ["pre", "backward"] and model.lm_head.forward is own


def test_checkpointing_recomputes_every_layer():
    model = tiny_model("llama")
    recompute_activations(model.train())
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    packed = PackedModel(model)
    calls.clear()
    run_packed(packed, make_rows("slic"), LOSSES["slic"])
    assert len(calls) == 2 * len(model.model.layers)


# --- The comparison fails for a wrong batch ---


def _positions_go_on(batch) -> None:
    """Positions of completion 2 continue those of completion 1, rather than the prompt's."""
    start, end = batch["cu_seqlens_q"][1:3].tolist()
    batch["position_ids"][0, start:end] += batch["completion_lengths"][0]


def _sees_the_one_before(batch) -> None:
    """Completion 2 also sees the keys of completion 1."""
    queries, keys = batch["segment_lengths"][1]
    at, row = batch["cu_seqlens_k"][2].item() - queries, batch["cu_seqlens_q"][1].item()
    strays = torch.arange(row - batch["completion_lengths"][0], row)
    batch["kv_index"] = torch.cat([batch["kv_index"][:at], strays, batch["kv_index"][at:]])
    batch["segment_lengths"][1] = (queries, keys + len(strays))
    batch["cu_seqlens_k"][2:] += len(strays)
    _sum_again(batch, "kv")


def _predicts_its_first_token_from_its_own_row(batch) -> None:
    """The first token of completion 2 is predicted by its own row, rather than by the prompt's last row."""
    first = batch["cu_completions"][1]
    batch["predictor_index"][first] = batch["predictor_index"][first + 1]
    _sum_again(batch, "predictor")


def _sum_again(batch, name: str) -> None:
    rounds = scatter_rounds(batch[f"{name}_index"].numpy(), batch["input_ids"].shape[1])
    batch[f"{name}_rounds"] = [(torch.from_numpy(rows), torch.from_numpy(sources)) for rows, sources in rounds]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "corrupt", [_positions_go_on, _sees_the_one_before, _predicts_its_first_token_from_its_own_row]
)
def test_a_broken_layout_is_found(name, corrupt):
    reference, _ = alone(name, FP32, torch.float64, "slic")
    eager, _ = alone(name, FP32, FP32, "slic")
    model = tiny_model(name)
    intact, batch = make_batch(_rows(name, "slic")), make_batch(_rows(name, "slic"))
    corrupt(batch)
    scores = PackedModel(model)(batch, LOSSES["slic"])
    scores.loss.backward()
    result = packed_result(model, intact, scores)
    for part in (Result(result.completion_logps), Result({}, result.losses), Result({}, {}, result.grads)):
        with pytest.raises(AssertionError, match="max error"):
            assert_as_exact([part], eager[:1], reference[:1], torch.finfo(FP32).eps)
