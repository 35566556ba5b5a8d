"""Arguments of the public operators: mixed dtypes run as autocast would or are refused; contradictions are refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cpt_kernels import (
    AttentionLayout,
    HeadOptions,
    linear_logprobs,
    linear_preference_loss,
    pair_loss,
    shared_prompt_attention,
    vocab_score,
)
from cpt_kernels.errors import UserError
from cpt_kernels.losses import build_loss
from tests.helpers.heads import FROZEN, FUSED, GENERAL, Head, in_mode

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP64, FP32, BF16, FP16)
_PAIRS_OF_DTYPES = list(itertools.product(DTYPES, DTYPES))


def _leaves(head: Head, *dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = zip(head.tensors.items(), dtypes)
    return {name: tensor.to(dtype).requires_grad_(name in head.trained) for (name, tensor), dtype in tensors}


def _loss(head: Head, leaves: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
    operands = leaves["hidden"], leaves["weight"], head.targets
    return linear_preference_loss(
        *operands, head.pairs(), head.loss, leaves["bias"], head.options, general=mode == GENERAL
    ).loss


@pytest.mark.parametrize("autocast", [None, BF16, FP16], ids=str)
@pytest.mark.parametrize(("hidden", "weight"), _PAIRS_OF_DTYPES, ids=str)
@pytest.mark.parametrize("mode", [FROZEN, FUSED, GENERAL])
def test_dtypes_of_the_head(mode, hidden, weight, autocast):
    """Runs wherever a linear layer would, and then as with operands of the layer's dtype; gradients are the leaves'."""
    head = in_mode(Head(bias=True, blocks=[([2, 3], [(0, 0, 1)])] * 3, columns=33), mode).tile(5, 2)
    leaves = _leaves(head, hidden, weight, weight)
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        try:
            product = F.linear(leaves["hidden"], leaves["weight"]).dtype
        except RuntimeError:
            with pytest.raises(UserError, match=r"hidden is .* and weight .*: cast one of them"):
                _loss(head, leaves, mode)
            with pytest.raises(UserError, match=r"hidden is .* and weight .*: cast one of them"):
                linear_logprobs(leaves["hidden"], leaves["weight"], head.targets)
            return
        loss = _loss(head, leaves, mode)
        logps = linear_logprobs(leaves["hidden"], leaves["weight"], head.targets).logps
    loss.backward()
    assert all(leaf.grad is None or leaf.grad.dtype == leaf.dtype for leaf in leaves.values())

    cast = {name: leaf.detach().to(product).requires_grad_(name in head.trained) for name, leaf in leaves.items()}
    cast["bias"] = leaves["bias"].detach().clone().requires_grad_("bias" in head.trained)  # is added in fp32
    expected = _loss(head, cast, mode)
    expected.backward()
    assert torch.equal(loss, expected)
    for name in head.trained:
        torch.testing.assert_close(leaves[name].grad.to(cast[name].dtype), cast[name].grad, rtol=1e-2, atol=1e-3)
    assert torch.equal(logps, linear_logprobs(cast["hidden"], cast["weight"], head.targets).logps)


@pytest.mark.parametrize("asked", [*DTYPES, torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize(("hidden", "weight"), [*_PAIRS_OF_DTYPES, (torch.int64, FP32), (FP32, torch.int8)], ids=str)
def test_a_dtype_of_products_that_is_asked_for(hidden, weight, asked):
    head = Head(columns=33)
    operands = head.tensors["hidden"].to(hidden), head.tensors["weight"].to(weight), head.targets
    possible = {FP32, BF16, FP16} if {hidden, weight} <= {FP32, BF16, FP16} else set()
    if asked in (possible or {FP64}) and (possible or {hidden, weight} == {FP64}):
        found = linear_logprobs(*operands, options=HeadOptions(compute_dtype=asked)).logps
        assert torch.equal(found, linear_logprobs(*(x.to(asked) for x in operands[:2]), head.targets).logps)
    else:
        with pytest.raises(UserError, match=r"compute_dtype=torch|must be one of torch\.float64"):
            linear_logprobs(*operands, options=HeadOptions(compute_dtype=asked))


@pytest.mark.parametrize("bias", [*DTYPES, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int64], ids=str)
def test_dtypes_of_a_tile(dtype, bias):
    logits, targets = torch.arange(15.0).reshape(3, 5).to(dtype), torch.arange(3)
    column = torch.tensor([0.5, 0, -1, 2, 0]).to(bias)
    if dtype in DTYPES and bias in DTYPES:
        expected = (logits.double() + column.double()).log_softmax(1).diagonal()
        found = vocab_score(logits.clone(), targets, bias=column, statistics=True, score=True)
        assert found.logps.dtype == torch.promote_types(dtype, FP32)
        torch.testing.assert_close(found.logps.double(), expected, rtol=1e-6, atol=1e-6)
    else:
        with pytest.raises(UserError, match=r"logits must be|bias must be floating"):
            vocab_score(logits, targets, bias=column)


@pytest.mark.parametrize(("tokens", "reference"), [*_PAIRS_OF_DTYPES, (FP32, torch.int64)], ids=str)
def test_dtypes_of_pair_loss(tokens, reference):
    arguments = -torch.ones(4, dtype=tokens), torch.tensor([0, 1, 4]), torch.tensor([0]), torch.tensor([1]), None
    if tokens == reference in (FP32, FP64):
        assert pair_loss(*arguments, torch.zeros(2, dtype=reference)).losses.dtype == tokens
    else:
        with pytest.raises(UserError, match=r"token_logps must be fp32 or fp64|ref_logps must be"):
            pair_loss(*arguments, torch.zeros(2, dtype=reference))


def _layout(**changes) -> AttentionLayout:
    """A prompt of two tokens with completions of one and two."""
    kv_index = torch.tensor([0, 1, 2, 0, 1, 3, 4])
    rounds = [
        (torch.arange(5), torch.tensor([0, 1, 2, 5, 6])),
        (torch.arange(2), torch.tensor([3, 4])),
    ]
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
    given = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), offsets)) | {"kv_index": kv_index, "kv_rounds": rounds}
    return AttentionLayout(**{**given, "segment_lengths": [(3, 3), (2, 4)], "shared": True, **changes})


@pytest.mark.parametrize("autocast", [None, BF16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("query", "others"), _PAIRS_OF_DTYPES, ids=str)
def test_dtypes_of_attention(query, others, backend, autocast):
    q, k, v = torch.randn(3, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = q.to(query), k.to(others), v.to(others)
    with torch.autocast("cpu", BF16, enabled=autocast is not None):
        if query == others or (autocast and FP64 not in (query, others)):
            out = shared_prompt_attention(q, k, v, _layout(), backend=backend)
            dtype = BF16 if autocast and query != FP64 else query
            expected = shared_prompt_attention(q.double(), k.double(), v.double(), _layout(), backend=backend)
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)
        else:
            with pytest.raises(UserError, match=r"query, key and value differ in dtype .*: cast them, or run under"):
                shared_prompt_attention(q, k, v, _layout(), backend=backend)


_CONTRADICTIONS = {
    "cu_seqlens_q has 1 segments, but segment_lengths has 2": {"cu_seqlens_q": torch.tensor([0, 5])},
    "cu_seqlens_q .* other lengths": {"cu_seqlens_q": torch.tensor([0, 2, 5])},
    "cu_seqlens_k does not start at 0": {"cu_seqlens_k": torch.tensor([1, 4, 8])},
    "kv_index has 6 rows": {"kv_index": torch.arange(6)},
    "cu_seqlens_k .* other lengths": {"segment_lengths": [(3, 4), (2, 3)]},
}


@pytest.mark.parametrize("message", _CONTRADICTIONS)
def test_layouts_that_contradict_themselves(message):
    with pytest.raises(UserError, match=message):
        _layout(**_CONTRADICTIONS[message])


def test_shapes_and_numbers_of_attention():
    q = torch.randn(5, 4, 8)
    for message, arguments in {
        "do not fit": (q, q[..., :4], q),
        "must have the 5 tokens of query": (q, q[:4], q[:4]),
        "divides its 4": (q, q[:, :3], q[:, :3]),
        "the layout has 5 queries": (q[:3], q[:3], q[:3]),
    }.items():
        with pytest.raises(UserError, match=message):
            shared_prompt_attention(*arguments, _layout())
    for option, value in (("window", 0), ("softcap", 0.0), ("softcap", -1.0), ("dropout", 1.0), ("scale", torch.nan)):
        with pytest.raises(UserError, match=f"{option}={value}: must"):
            shared_prompt_attention(q, q, q, _layout(), **{option: value})
    with pytest.raises(UserError, match=r"sinks must have shape \(4,\)"):
        shared_prompt_attention(q, q, q, _layout(), sinks=torch.zeros(3), backend="eager")


_OUT_OF_RANGE = [
    *(("softcap", value) for value in (0.0, -1.0, torch.inf, torch.nan)),
    *(("logit_scale", value) for value in (torch.inf, torch.nan)),
    *(("memory_mb", value) for value in (0, -1, torch.nan)),
    *(("vocab_size", value) for value in (0, 34)),
]


@pytest.mark.parametrize(("option", "value"), _OUT_OF_RANGE)
def test_options_of_the_head_that_are_out_of_range(option, value):
    head = Head(columns=33)
    options = HeadOptions(**{option: value})
    with pytest.raises(UserError, match=f"{option}={value}"):
        linear_logprobs(head.tensors["hidden"], head.tensors["weight"], head.targets, options=options)


@pytest.mark.parametrize("general", [False, True])
def test_lengths_that_contradict_the_offsets(general):
    """The sum is the same, so that only a comparison of each completion finds it."""
    head = Head().tile(7, 4)
    leaves, pairs = head.leaves(FP32), head.pairs()
    swapped = [pairs.completion_lengths[1], pairs.completion_lengths[0], *pairs.completion_lengths[2:]]
    shifted = pairs.cu_completions.clone()
    shifted[0] = 1
    for message, wrong in {
        "completion 0 has 4 tokens in completion_lengths, but lies from 0 to 1": {"completion_lengths": swapped},
        "completion 0 has 1 tokens in completion_lengths, but lies from 1 to 1": {"cu_completions": shifted},
        r"gaps must have shape \(10,\)": {"gaps": pairs.gaps[:-1]},
        r"ref_token_logps must have shape \(94,\)": {"ref_token_logps": pairs.ref_token_logps[:-1]},
        "ref_logps must be floating": {"ref_logps": pairs.ref_logps.long()},
    }.items():
        with pytest.raises(UserError, match=message):
            linear_preference_loss(
                leaves["hidden"],
                leaves["weight"],
                head.targets,
                replace(pairs, **wrong),
                build_loss("sigmoid"),
                options=head.options,
                general=general,
            )
