"""Variable-length kernels against attention segment by segment: stand-ins on a CPU, the real kernels on CUDA."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import Tensor

from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.ops.attention import AttentionLayout, shared_prompt_attention, varlen
from cpt_kernels.ops.attention import select as attention_backends
from cpt_kernels.ops.attention.flash import flash_kernel
from cpt_kernels.ops.attention.select import choose_attention, kernels
from cpt_kernels.ops.attention.varlen import Abilities, Need, TorchKernel
from tests.helpers import dense_flash
from tests.helpers.architectures import tiny_model
from tests.helpers.exactness import FLOOR, FLOORS, LOSSES, assert_equal, make_rows, run_packed
from tests.numerics import assert_close
from tests.ops.attention.test_attention import (
    BF16,
    CASES,
    FP64,
    Case,
    dense_attention,
    dense_mask,
    make_inputs,
    make_layout,
    run,
)

HERE = Abilities(device="cpu", head_size=256)

STAND_INS = {
    "flash_attn_2": lambda: flash_kernel("flash_attn_2", dense_flash.flash_attn_2_8(), "2.8.3", HERE),
    "flash_attn_3": lambda: flash_kernel("flash_attn_3", dense_flash.flash_attn_3(), "3.0", HERE),
    "flash_attn_4": lambda: flash_kernel("flash_attn_4", dense_flash.flash_attn_4(), "4.0", HERE),
    "varlen": lambda: TorchKernel(
        dense_flash.torch_operators(), dataclasses.replace(HERE, softcap=False, dropout=False), version="2.13"
    ),
}


@pytest.fixture
def install(monkeypatch):
    """Returns a function that replaces the table of variable-length kernels."""

    def put(**found):
        monkeypatch.setattr(attention_backends, "kernels", lambda: found)
        choose_attention.cache_clear()
        attention_backends._announce.cache_clear()
        dense_flash.backwards.clear()

    yield put
    choose_attention.cache_clear()


def hold(found: Tensor, eager: Tensor, exact: Tensor, what: str, eps: float) -> None:
    """Checks by the tolerance rule; where the exact gradient is 0 (a query that sees only itself), up to rounding."""
    if exact.any():
        assert_close(found, eager, exact, what, eps)
    else:
        assert found.abs().max() <= 64 * eps, what


def attention_of(case: Case, layout: AttentionLayout, backend: str, **options):
    return lambda **x: shared_prompt_attention(**x, layout=layout, backend=backend, **case.options(), **options)


# --- Stand-ins ---


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("dtype", [FP64, BF16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", STAND_INS)
def test_one_call_for_all_segments(install, name, case, dtype, share):
    kernel, case = STAND_INS[name](), CASES[case]
    install(**{name: kernel})
    layout, mask = make_layout(share), dense_mask(share, case.window)
    attention = attention_of(case, layout, name)
    if case.softcap and name == "varlen":
        with pytest.raises(ValueError, match=r"varlen 2.13 lacks soft-cap"):
            run(attention, make_inputs(case, len(mask), dtype, 0), case, dtype)
        return
    pools: dict[str, list] = {}
    for seed in range(1 if dtype == FP64 else 6):
        inputs = make_inputs(case, len(mask), dtype, seed)
        found = run(attention, inputs, case, dtype)
        eager = run(attention_of(case, layout, "eager"), inputs, case, dtype)
        exact = run(lambda **x: dense_attention(**x, mask=mask, case=case), inputs, case, FP64)
        for key in found:
            assert found[key].dtype == dtype
            pools.setdefault(key, []).append([t.flatten() for t in (found[key], eager[key], exact[key])])
    assert dense_flash.backwards and all(dense_flash.backwards), "the backward was not asked to be deterministic"
    for key, triples in pools.items():
        eps = 1e-14 if dtype == FP64 else torch.finfo(dtype).eps
        hold(*(torch.cat(parts) for parts in zip(*triples)), f"{name} {key}", eps)


@pytest.mark.parametrize("name", STAND_INS)
def test_determinism_may_be_given_up_and_leaves_no_trace(install, name):
    install(**{name: STAND_INS[name]()})
    case, layout = CASES["gpt-oss"], make_layout(True)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    run(attention_of(case, layout, name, deterministic=False), inputs, case, FP64)
    assert dense_flash.backwards == [False]
    assert torch.get_deterministic_debug_mode() == 0 and torch.utils.deterministic.fill_uninitialized_memory


def test_a_process_that_is_deterministic_is_left_alone(install, monkeypatch):
    install(varlen=STAND_INS["varlen"]())
    case, layout = CASES["gpt-oss"], make_layout(True)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.use_deterministic_algorithms(True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "set_deterministic_debug_mode", lambda _: 1 / 0)
            run(attention_of(case, layout, "varlen"), inputs, case, FP64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert dense_flash.backwards == [True]


def test_a_failing_backward_leaves_the_process_as_it_was(install):
    operators = dense_flash.torch_operators()
    operators._flash_attention_backward = lambda *_, **__: 1 / 0
    install(varlen=TorchKernel(operators, HERE))
    case, layout = CASES["plain"], make_layout(True)
    with pytest.raises(ZeroDivisionError):
        run(attention_of(case, layout, "varlen"), make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0), case, FP64)
    assert torch.get_deterministic_debug_mode() == 0 and torch.utils.deterministic.fill_uninitialized_memory


def _lse_as_it_was(monkeypatch, kernel):
    monkeypatch.setattr(torch, "logaddexp", lambda lse, sink: lse)
    return kernel


def _sink_beside_the_kernel(monkeypatch, kernel):
    """out * sigmoid(lse - sink) by autograd: the gradient of the log-sum-exp is dropped."""

    def apply(q, k, v, sinks, kernel, call):
        out, lse = dense_flash.Flash.apply(
            q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.max_q, call.max_k, True, call.scale, True,
            -1 if call.window is None else call.window - 1, 0, call.softcap,
        )  # fmt: skip
        return out * torch.sigmoid(lse - sinks[:, None]).t()[..., None]

    monkeypatch.setattr(varlen._FlashAttention, "apply", apply)
    return kernel


def _window_of_one_more(monkeypatch, kernel):
    scores = dense_flash.capped_scores
    monkeypatch.setattr(
        dense_flash,
        "capped_scores",
        lambda q, k, scale, causal, left, right, softcap: scores(q, k, scale, causal, left + 1, right, softcap),
    )
    return kernel


def _aligned_at_the_start(monkeypatch, kernel):
    def capped_scores(q, k, scale, *_):
        scores = torch.einsum("qhd,khd->hqk", q, dense_flash.grouped(k, q)) * scale
        mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril()
        return scores.masked_fill(~mask, -torch.inf), torch.ones_like(scores)

    monkeypatch.setattr(dense_flash, "capped_scores", capped_scores)
    return kernel


@pytest.mark.parametrize(
    ("case", "bug", "wrong"),
    [
        ("gpt-oss", _lse_as_it_was, "grad"),
        ("gpt-oss", _sink_beside_the_kernel, "grad"),
        ("window", _window_of_one_more, "out"),
        ("grouped", _aligned_at_the_start, "out"),
    ],
)
def test_a_planted_bug_is_found(install, monkeypatch, case, bug, wrong):
    case, layout = CASES[case], make_layout(True)
    install(flash_attn_2=bug(monkeypatch, STAND_INS["flash_attn_2"]()))
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    found, expected = (run(attention_of(case, layout, name), inputs, case, FP64) for name in ("flash_attn_2", "eager"))
    differ = [key for key in found if not torch.allclose(found[key], expected[key])]
    assert differ and ("out" in differ) == (wrong == "out")


def test_autocast_casts_as_it_would(install):
    install(flash_attn_2=STAND_INS["flash_attn_2"]())
    case, layout = CASES["grouped"], make_layout(True)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), torch.float32, 0)
    query, key, value = (inputs[name].requires_grad_() for name in ("query", "key", "value"))
    with torch.autocast("cpu", BF16):  # norms of queries and keys leave them in fp32, values are in bf16
        out = shared_prompt_attention(query, key, value.to(BF16), layout, backend="flash_attn_2")
        expected = shared_prompt_attention(query, key, value.to(BF16), layout, backend="eager")
    out.float().sum().backward()
    assert out.dtype == expected.dtype == BF16 and query.grad.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


def test_a_second_backward_is_the_same(install):
    install(varlen=STAND_INS["varlen"]())
    case, layout = CASES["gpt-oss"], make_layout(True)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    leaves = [inputs[name].requires_grad_() for name in ("query", "key", "value", "sinks")]
    out = attention_of(case, layout, "varlen")(**dict(zip(("query", "key", "value", "sinks"), leaves)))
    first = torch.autograd.grad(out, leaves, inputs["upstream"], retain_graph=True)
    second = torch.autograd.grad(out, leaves, inputs["upstream"])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second))


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: flash_kernel("flash_attn_2", dense_flash.flash_attn_2_5(), "2.5.9", HERE),
        lambda: flash_kernel("flash_attn_3", dense_flash.flash_attn_3(always_returns_lse=True), "3.0b", HERE),
    ],
    ids=["2.5", "3-returns-lse"],
)
def test_older_releases(install, kernel):
    kernel = kernel()
    install(**{kernel.name: kernel})
    case, layout = CASES["window"], make_layout(True)
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), FP64, 0)
    found, expected = (run(attention_of(case, layout, name), inputs, case, FP64) for name in (kernel.name, "eager"))
    for key in found:
        torch.testing.assert_close(found[key], expected[key])


# --- Whole models ---


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_a_model_runs_on_the_backend_that_it_was_given(install, name):
    rows, loss = make_rows("sigmoid"), LOSSES["sigmoid"]
    expected = run_packed(PackedModel(tiny_model(name, FP64)), rows, loss)
    kernel = STAND_INS["flash_attn_2"]()
    install(flash_attn_2=kernel)
    packed = PackedModel(tiny_model(name, FP64), attention_backend="flash_attn")
    assert_equal(run_packed(packed, rows, loss), expected, FLOORS.get(name, FLOOR))
    assert len(dense_flash.backwards) == packed.model.config.num_hidden_layers


# --- The real ones ---


def _cuda_kernels() -> list[str]:
    return (
        [name for name, kernel in kernels().items() if not isinstance(kernel, str)] if torch.cuda.is_available() else []
    )


# Segments around the sizes of kernel tiles (64 and 128). The first has one completion, so nothing is gathered for it.
LONG = [(1, [129]), (128, [64, 1, 127]), (300, [65, 513]), (37, [1, 1])]
CUDA_CASES = {
    "plain": Case(size=64, value_size=64),
    "grouped": Case(heads=8, kv_heads=2, size=128, value_size=128),
    "window": Case(heads=8, kv_heads=2, size=64, value_size=64, window=100),
    "window-of-one": Case(size=64, value_size=64, window=1),
    "one-kv-head-odd-sizes": Case(heads=3, kv_heads=1, size=36, value_size=52, scale=0.2),
    "gemma2": Case(kv_heads=2, size=256, value_size=256, window=90, softcap=5.0, scale=0.06),
    "sinks": Case(sinks=True, size=64, value_size=64),
    "gpt-oss": Case(heads=8, kv_heads=1, size=64, value_size=64, window=128, sinks=True),
}


def cuda_layout(share: bool) -> AttentionLayout:
    layout = make_layout(share, LONG)
    rounds = [tuple(x.cuda() for x in turn) for turn in layout.kv_rounds]
    tensors = {name: getattr(layout, name).cuda() for name in ("cu_seqlens_q", "cu_seqlens_k", "kv_index")}
    return dataclasses.replace(layout, kv_rounds=rounds, **tensors)


def cuda_inputs(case: Case, layout: AttentionLayout, dtype: torch.dtype, seed: int) -> dict:
    inputs = make_inputs(case, int(layout.cu_seqlens_q[-1]), dtype, seed)
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CUDA_CASES)
@pytest.mark.parametrize("name", _cuda_kernels())
def test_on_cuda(name, case, dtype, share):
    case, layout = CUDA_CASES[case], cuda_layout(share)
    inputs = cuda_inputs(case, layout, dtype, 0)
    need = Need.of(inputs["query"], inputs["key"], inputs["value"], case.window, case.softcap, case.sinks or None, 0.0)
    if lacking := kernels()[name].abilities.lacks(need):
        pytest.skip(f"{name} lacks {', '.join(lacking)}")
    found = run(attention_of(case, layout, name), inputs, case, dtype)
    eager = run(attention_of(case, layout, "eager"), inputs, case, dtype)
    exact = run(attention_of(case, layout, "eager"), inputs, case, FP64)
    for key in found:
        hold(found[key], eager[key], exact[key], f"{name} {key}", torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["grouped", "window", "gpt-oss"])
@pytest.mark.parametrize("name", [name for name in _cuda_kernels() if kernels()[name].abilities.deterministic])
def test_two_runs_give_the_same_bits_on_cuda(name, case):
    case, layout = CUDA_CASES[case], cuda_layout(True)
    inputs = cuda_inputs(case, layout, BF16, 0)
    first, second = (run(attention_of(case, layout, name), inputs, case, BF16) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
def test_it_is_what_varlen_attn_computes(window):
    from torch.nn.attention.varlen import varlen_attn

    has = inspect.signature(varlen_attn).parameters
    if window is not None and "window_size" not in has:
        pytest.skip("varlen_attn of this PyTorch has no windows")
    case, layout = dataclasses.replace(CUDA_CASES["plain"], window=window), cuda_layout(True)
    inputs = cuda_inputs(case, layout, BF16, 0)
    causal = {"window_size": (-1 if window is None else window - 1, 0)} if "window_size" in has else {"is_causal": True}
    longest = [max(lengths) for lengths in zip(*layout.segment_lengths)]
    key, value = (inputs[name][layout.kv_index] for name in ("key", "value"))
    expected = varlen_attn(inputs["query"], key, value, layout.cu_seqlens_q, layout.cu_seqlens_k, *longest, **causal)
    found = attention_of(case, layout, "varlen")(**{name: inputs[name] for name in ("query", "key", "value")})
    assert torch.equal(found, expected)
