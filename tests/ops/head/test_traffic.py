"""Memory traffic of the gradient of the head's weight, and when one tile of all rows takes the place of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.head_bytes import gradient_bytes, peak_bytes
from cpt_kernels.ops.head import passes
from cpt_kernels.ops.head.tiles import tile_buffer
from cpt_kernels.ops.linear_preference import linear_preference_loss
from tests.helpers.heads import FUSED, GENERAL, Head, check, peak_memory
from tests.helpers.traffic import CountBytes

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {"bf16": (BF16, BF16), "fp16": (FP16, FP16), "fp32 under autocast": (FP32, BF16), "fp32": (FP32, FP32)}
COLUMNS, WIDTH, ROWS = 4096, 32, 64


def problem(tokens: int, kind: str, columns: int = COLUMNS, **fields) -> Head:
    """Returns pairs of 16 tokens, with tiles of 64 rows."""
    dtype, compute_dtype = DTYPES[kind]
    head = Head(blocks=[([8, 8], [(0, 0, 1)])] * (tokens // 16), columns=columns, width=WIDTH, **fields)
    return head.with_options(compute_dtype=None if compute_dtype == dtype else compute_dtype).tile(
        ROWS, compute_dtype.itemsize
    )


def forward(head: Head, leaves: dict[str, Tensor], general: bool = False) -> Tensor:
    return linear_preference_loss(
        leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss, leaves.get("bias"), head.options,
        general=general,
    ).loss  # fmt: skip


def rows_of_one_tile(kind: str, general: bool) -> int:
    """Returns tile rows + 2 H for half-precision weights, + H where the backward computes the logits again."""
    return ROWS + (0 if DTYPES[kind][0] == FP32 else WIDTH if general else 2 * WIDTH)


# --- Bytes ---


def count(head: Head, kind: str, monkeypatch) -> float:
    """Returns the bytes moved for the gradient per element of the weight."""
    # A block of sums is an eighth of the gradient, and is cached.
    monkeypatch.setattr(passes, "_CACHED_BYTES", 4 * COLUMNS * WIDTH // 8)
    dtype, compute_dtype = DTYPES[kind]
    leaves = head.leaves(dtype)
    weight = leaves["weight"].untyped_storage().data_ptr()

    def is_gradient(x: Tensor) -> bool:
        is_cast_weight = dtype != compute_dtype and x.dtype == compute_dtype
        return x.dim() == 2 and x.shape[1] == WIDTH and x.untyped_storage().data_ptr() != weight and not is_cast_weight

    with CountBytes(4 * COLUMNS * WIDTH // 8, is_gradient) as counted:
        forward(head, leaves).backward()
    return (counted.read + counted.written) / leaves["weight"].numel()


@pytest.mark.parametrize("tokens", [64, 128, 144, 256, 384])
@pytest.mark.parametrize("kind", DTYPES)
def test_bytes(kind, tokens, monkeypatch):
    """What the table in bench/NOTES.md says, counted."""
    tiles = 1 if tokens <= rows_of_one_tile(kind, False) else -(-tokens // ROWS)
    found = count(problem(tokens, kind), kind, monkeypatch)
    expected = gradient_bytes(tiles, DTYPES[kind][0].itemsize)
    assert found == pytest.approx(expected, rel=0.02), f"{tiles} tiles"


def test_the_accumulator_was_zeroed_and_scaled_before(monkeypatch):
    """Planted: the sums as zeros, and no tile left to the backward, move the bytes that they did."""
    add = passes._add_gradients

    def with_all_tiles(sums, rows, score, x, w, g, options, leave=False):
        if rows.start == 0:
            sums.weight.zero_()
            sums.weight.add_(0)
        add(sums, rows, score, x, w, g, options)

    expected = count(problem(256, "bf16"), "bf16", monkeypatch)
    monkeypatch.setattr(passes, "_add_gradients", with_all_tiles)
    assert count(problem(256, "bf16"), "bf16", monkeypatch) > expected + 12


# --- Which is taken ---


@pytest.mark.parametrize("general", [False, True], ids=[FUSED, GENERAL])
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_the_smaller_of_both_is_taken(kind, general, monkeypatch):
    """Around the most rows of one tile, the peak is that of the smaller way, and the other one is larger."""
    monkeypatch.setattr(passes, "_CACHED_BYTES", 2**16)
    monkeypatch.setattr("cpt_kernels.ops.vocab_score.reference._BLOCK_ELEMENTS", 1 << 14)
    dtype, most = DTYPES[kind][0], rows_of_one_tile(kind, general)

    def peak(tokens: int) -> int:
        head = problem(tokens, kind, columns=4 * COLUMNS)
        leaves = head.leaves(dtype)
        with peak_memory() as found:
            forward(head, leaves, general).backward()
        return found[0]

    def peaks(tokens: int) -> tuple[int, int, int]:
        """Of one tile, of several, and of what is taken."""
        found = [peak(tokens)]
        for beyond in (10_000, 0):
            with monkeypatch.context() as patch:
                patch.setattr(passes, "_rows_beyond", lambda *_, beyond=beyond, **__: beyond)
                found.append(peak(tokens))
        return found[1], found[2], found[0]

    one, several, taken = peaks(most + 64)
    assert taken == several < one
    if most > ROWS:
        one, several, taken = peaks(most - 16)
        assert taken == one < several
    if not general:
        expected = peak_bytes(most + 64, ROWS, WIDTH, 4 * COLUMNS, dtype.itemsize, dtype.itemsize)
        assert (one if most == ROWS else peaks(most + 64)[0]) == pytest.approx(expected[0], rel=0.1)


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "bias")], ids="+".join)
def test_without_a_gradient_of_the_weight_the_budget_holds(trained, monkeypatch):
    head = replace(problem(128, "bf16", bias=True), trained=trained)
    tiles = []
    monkeypatch.setattr(passes, "tile_buffer", lambda *arguments: tiles.append(tile_buffer(*arguments)) or tiles[-1])
    forward(head, head.leaves(BF16)).backward()
    assert {len(tile) for tile in tiles} == {ROWS}


# --- Exactness ---


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("rows", [48, 94])
def test_one_tile_beyond_the_budget(dtype, rows):
    """In half precision 94 rows are one tile where 48 are allowed."""
    options = {"logit_scale": 1.5, "softcap": 3.0, "vocab_size": 290}
    head = Head(bias=True).with_options(**options).tile(rows, dtype.itemsize)
    for mode in (FUSED, GENERAL):
        check(head, mode, dtype)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tokens", [64, 160, 256])
def test_gradients_accumulate_and_a_kept_graph_gives_the_same_again(tokens, kind):
    """A second backward must find the sums of the forward as they were."""
    head = problem(tokens, kind, columns=96, bias=True)
    leaves = head.leaves(DTYPES[kind][0])
    loss = forward(head, leaves)
    wanted = [leaves[name] for name in ("hidden", "weight", "bias")]
    first, second = (torch.autograd.grad(loss, wanted, torch.tensor(0.5), retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(loss, wanted, torch.tensor(0.5))
    assert all(torch.equal(a, b) and torch.equal(a, c) and a.any() for a, b, c in zip(first, second, last))
    for _ in range(2):
        (forward(head, leaves) / 2).backward()
    for leaf, gradient in zip(wanted, first):
        assert torch.equal(leaf.grad, gradient + gradient)


# --- Products with a wider result ---


@pytest.fixture
def device_products(monkeypatch):
    """Stand-ins for the products that only CUDA has: half-precision operands, a result in fp32. Returns the calls."""
    calls: list[str] = []
    mm, addmm = torch.mm, torch.addmm

    def stand_in_mm(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return mm(a, b, out=out)
        assert a.dtype in (BF16, FP16) and out_dtype == FP32
        calls.append("mm")
        return mm(a.float(), b.float(), out=out)

    def stand_in_addmm(total, a, b, *, out_dtype, out):
        assert a.dtype in (BF16, FP16) and out_dtype == FP32 and out is total
        calls.append("addmm")
        return addmm(total, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", stand_in_mm)
    monkeypatch.setattr(torch, "addmm", stand_in_addmm)
    monkeypatch.setattr(passes, "_widens", lambda score: True)
    return calls


def test_fp32_weights_take_one_product_of_one_tile(device_products):
    check(problem(64, "fp32 under autocast", columns=301), FUSED, FP32, autocast=True, draws=1)
    assert device_products == ["mm"]


@pytest.mark.parametrize("kind", ["bf16", "fp32 under autocast", "fp16"])
def test_the_first_tile_writes_and_the_last_is_added_in_the_backward(kind, device_products):
    head, dtype = problem(256, kind, columns=301), DTYPES[kind][0]
    check(head, FUSED, dtype, autocast=kind == "fp32 under autocast", draws=1)
    assert device_products == ["mm", "addmm", "addmm", "addmm"]


def test_a_device_without_such_products_copies_the_operands_and_says_so(monkeypatch, caplog):
    def refuse(*_, **__):
        raise NotImplementedError("not implemented for 'gfx90a'\nmore")

    monkeypatch.setattr(torch, "addmm", refuse)
    passes._device_widens.cache_clear()
    assert not passes._device_widens(torch.device("cpu"), BF16)
    assert "computed in fp32, slowly: not implemented for 'gfx90a'" in caplog.messages[0]
    passes._device_widens.cache_clear()


def test_a_tensor_without_values_is_not_tried(monkeypatch):
    """As ``cpt plan`` runs the head; a verdict on a fake device would be kept for the real one."""
    monkeypatch.setattr(passes, "_device_widens", lambda *_: 1 / 0)
    with FakeTensorMode():
        assert passes._widens(torch.empty(2, 2, dtype=BF16, device="cuda"))
        assert not passes._widens(torch.empty(2, 2, dtype=BF16))
