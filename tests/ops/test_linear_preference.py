"""The head against autograd through all logits: values, gradients and number of products of every mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpt_kernels.losses import PairLogps, build_loss, user_loss
from cpt_kernels.losses.build import with_hard_pairs
from cpt_kernels.ops.head import tiles
from cpt_kernels.ops.linear_preference import HeadOptions, Pairs, linear_logprobs, linear_preference_loss
from tests.helpers.heads import BLOCKS, FROZEN, FUSED, GENERAL, CountProducts, Head, check, in_mode
from tests.numerics import assert_close

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MODES = [FROZEN, FUSED, GENERAL]


def _ids(value) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("rows", [1, 7, 10_000], ids="tile{}".format)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=_ids)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_tile_size(mode, dtype, rows):
    """At one row and at seven most blocks are larger than the tile."""
    check(Head().tile(rows, dtype.itemsize), mode, dtype)


@pytest.mark.parametrize("loss", ["sigmoid", "ld", "slic"])
@pytest.mark.parametrize("rows", [7, 25, 10_000], ids="tile{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_completions_that_have_tokens_in_common(mode, rows, loss):
    """A token of several completions has one row of logits, and the sum of their weights."""
    options = {"slic": {"slic_delta": 20.0}, "ld": {"ld_alpha": 0.5, "beta": 0.3}, "sigmoid": {"beta": 0.3}}[loss]
    head = Head(build_loss("sigmoid" if loss == "ld" else loss, **options), shared=True)
    assert len(head.targets) < len(head.index)
    check(replace(head, bias=True).tile(rows, 8), mode, FP64)
    check(head.tile(rows, 4), mode, FP32)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_with_weights(mode, shared):
    """A token of several completions has a weight in each; lengths are sums of weights."""
    losses = [build_loss("sigmoid_norm", beta=3.0), build_loss("sigmoid", ld_alpha=0.5), build_loss("aot", beta=0.3)]
    losses += [build_loss("sigmoid", use_weighting=True, beta=0.3), build_loss("slic", slic_delta=20.0)]
    for loss in losses:
        check(Head(loss, weighted=True, shared=shared, near=True).tile(25, 8), mode, FP64)
    for dtype in (FP32, BF16, FP16):
        check(Head(losses[0], weighted=True, shared=shared, near=True).tile(7, dtype.itemsize), mode, dtype)


def test_a_weighted_log_prob_by_hand():
    """Logits log 1, log 2, log 3, log 2: p = 1/8, 2/8, 3/8, 2/8. Weights 2 and 1/2 against weights 1/4 and 1."""
    weight = torch.tensor([1.0, 2.0, 3.0, 2.0]).log()[:, None].double()
    hidden = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    given = (torch.tensor([0, 2, 4]), [2, 2], *torch.tensor([[0], [1], [0]]), [(2, 1)])
    pairs = Pairs(*given, token_weights=torch.tensor([2.0, 0.5, 0.25, 1.0]))
    loss = build_loss("simpo", beta=1.0, simpo_gamma=0.0)
    out = linear_preference_loss(hidden, weight, torch.tensor([0, 1, 2, 3]), pairs, loss)
    p = torch.tensor([1, 2, 3, 2]).double() / 8
    chosen, rejected = 2 * p[0].log() + p[1].log() / 2, p[2].log() / 4 + p[3].log()
    torch.testing.assert_close(out.completion_logps.detach(), torch.stack([chosen, rejected]))
    margin = chosen / 2.5 - rejected / 1.25
    torch.testing.assert_close(out.loss.detach(), (1 + (-margin).exp()).log())
    # d loss / d hidden row = d loss / d margin * w_t / sum w * (its own logit - the mean logit)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    shares = torch.tensor([2.0 / 2.5, 0.5 / 2.5, -0.25 / 1.25, -1.0 / 1.25]).double()
    logits = weight[:, 0]
    torch.testing.assert_close(grad[:, 0], -torch.sigmoid(-margin) * shares * (logits - (p * logits).sum()))


@pytest.mark.parametrize("few_rows", [0, 1000], ids=["whole", "pieces"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_in_one_product_and_in_transposed_pieces(mode, few_rows, monkeypatch):
    monkeypatch.setattr(tiles, "_CPU_FEW_ROWS", few_rows)
    monkeypatch.setattr(tiles, "_CPU_COLUMN_BLOCK", 100)  # of 301 columns
    check(Head().tile(25, 4), mode, FP32)


@pytest.mark.parametrize("rows", [22, 23, 24, 30])
def test_tiles_that_just_hold_the_largest_blocks(rows):
    check(Head().tile(rows, 4), FUSED, FP32)


@pytest.mark.parametrize("loss", ["hinge", "ipo", "slic", "sft"])
@pytest.mark.parametrize("mode", MODES)
def test_every_loss(mode, loss):
    options = {"slic": {"slic_delta": 20.0}, "hinge": {"beta": 0.05}}.get(loss, {})
    check(Head(build_loss(loss, **options)).tile(25, 4), mode, FP32)


@pytest.mark.parametrize("mode", MODES)
def test_hard_pairs_have_a_loss_of_their_own(mode):
    loss = with_hard_pairs(build_loss("sigmoid", beta=0.3), build_loss("sft"), 0.7)
    for rows, dtype in ((7, FP64), (25, FP32)):
        check(Head(loss).tile(rows, dtype.itemsize), mode, dtype)
    head = Head(loss)
    found, easy = (replace(head, loss=each).run(FP64)["losses"] for each in (loss, build_loss("sigmoid", beta=0.3)))
    assert torch.equal(found[~head.hard], easy[~head.hard]) and not torch.equal(found, easy)
    nll = -head.eager(FP64)["completion_logps"][head.chosen[head.hard]]
    torch.testing.assert_close(found[head.hard], 0.7 * nll / head.tokens_per_pair)
    with pytest.raises(ValueError, match="loss 'aot' is not known to be one of single pairs"):
        with_hard_pairs(build_loss("aot"), None, 0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU; on a GPU see head/test_backends.py")
@pytest.mark.parametrize(("loss", "rows"), [("slic", 7), ("sigmoid", 25)])
def test_kernels_between_the_products(loss, rows):
    """The Triton kernels, interpreted, on uneven blocks: several pairs, none, larger than the tile."""
    options = {"slic": {"slic_delta": 20.0, "slic_lambda": 0.3}, "sigmoid": {"beta": 0.3}}[loss]
    head = Head(build_loss(loss, **options), columns=61).with_options(backend="triton")
    check(head.tile(rows, 4), FUSED, FP32, draws=2)


_VARIANTS = {
    "bias": {"bias": True},
    "scale": {"options": HeadOptions(logit_scale=0.25)},
    "softcap": {"options": HeadOptions(softcap=2.0)},
    "padded-vocabulary": {"options": HeadOptions(vocab_size=290)},
    "all": {"bias": True, "options": HeadOptions(logit_scale=1.5, softcap=3.0, vocab_size=290)},
}


@pytest.mark.parametrize("variant", _VARIANTS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=_ids)
@pytest.mark.parametrize("mode", MODES)
def test_between_product_and_softmax(mode, dtype, variant):
    check(Head(**_VARIANTS[variant]).tile(25, dtype.itemsize), mode, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    """fp32 weights, bf16 products: gradients come back in fp32."""
    head = Head(bias=True).with_options(compute_dtype=BF16)
    check(head.tile(25, 2), mode, FP32, autocast=True)
    assert in_mode(head, mode).run(FP32)["grad hidden"].dtype == FP32


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=_ids)
@pytest.mark.parametrize("mode", MODES)
def test_peaked_rows(mode, dtype):
    check(Head(scale=100.0).tile(25, dtype.itemsize), mode, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_small_weights_of_the_pairs_do_not_underflow(mode):
    """In fp16, g (G W) is below the smallest number until it is multiplied by the loss scale."""
    tiny = user_loss(lambda numbers: 5e-5 * (numbers.rejected - numbers.chosen), needs_reference=False, separable=True)
    check(Head(tiny, upstream=2.0**12), mode, FP16)


def _with_margins(margins: list[float], rows: int, mode: str = FUSED, seed: int = 0, **fields) -> Head:
    """Returns a problem whose pairs, one per block of 13 rows, have these differences of log-ratios."""
    blocks = [([4, 9], [(0, 0, 1)])] * len(margins)
    # The largest loss scale with which gradients stay within fp16.
    fields = {"upstream": 2.0**16 if min(margins) >= 30 else 2.0**11, **fields}
    head = Head(build_loss("sigmoid", beta=0.5), blocks, bias=True, seed=seed, **fields).tile(rows, 2)
    head = in_mode(head, mode)
    half = torch.tensor([sign * margin / 2 for margin in margins for sign in (-1, 1)])
    head.ref_logps = head.eager(FP64, rounded=FP16)["completion_logps"].float() + half
    return head


# One unit for all tiles; one that grows from tile to tile; one that starts where a weight is 0; one that is too large.
_MARGINS = {
    "small": [30.0] * 6,
    "growing": [34.0, 26.0, 10.0, 0.0, -10.0, -30.0],
    "from zero": [400.0, 400.0, 30.0, 30.0, 10.0, 30.0],
    "from almost zero": [165.0, 165.0, 10.0, 10.0, 10.0, 10.0],  # weights of 1e-36, below any unit but the first
    "falling": [-10.0, 0.0, 5.0, 0.0, 10.0, 10.0],
}


@pytest.mark.parametrize("rows", [5, 13, 10_000], ids="tile{}".format)
@pytest.mark.parametrize("margins", _MARGINS)
@pytest.mark.parametrize("mode", MODES)
def test_weights_of_any_size_in_fp16(mode, margins, rows):
    """g X is rounded to fp16 before the loss scale is known, so it is divided by a power of two."""
    pooled: list[dict[str, list]] = [{}, {}, {}]
    for seed in range(3):
        head = _with_margins(_MARGINS[margins], rows, mode, seed)
        results = head.run(FP16, general=mode == GENERAL), head.eager(FP16), head.eager(FP64, rounded=FP16)
        for kind, result in zip(pooled, results):
            for name in result:
                kind.setdefault(name, []).append(result[name].flatten())
    for name in (name for name in pooled[0] if name.startswith("grad")):
        assert_close(*(torch.cat(kind[name]) for kind in pooled), f"{mode} {name}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on a CPU")
@pytest.mark.parametrize("margins", ["growing", "from zero"])
def test_units_of_the_triton_kernel_in_fp16(margins):
    results = []
    for backend in ("triton", "eager"):
        head = _with_margins(_MARGINS[margins], 13, columns=61, options=HeadOptions(backend=backend))
        results.append(head.run(FP16))
    found, expected = results
    for name in ("grad weight", "grad bias"):
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-3 * largest)


def test_no_overflow_that_a_later_rounding_would_not_have():
    """In fp16, S g x exceeds 65504 although the gradient, its product with a small score, does not."""
    for rows in (13, 10_000):
        head = _with_margins([-30.0] * 2, rows, upstream=2.0**17)
        head.tensors["hidden"] /= 8
        for general in (False, True):
            found, eager = head.run(FP16, general=general), head.eager(FP16)
            for name in ("grad weight", "grad bias"):
                assert (found[name].isfinite() | ~eager[name].isfinite()).all(), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab_size", [290, 288, 10])
@pytest.mark.parametrize("rows", [25, 10_000], ids="tile{}".format)
@pytest.mark.parametrize("mode", MODES)
def test_padding_rows_of_the_weight_that_are_not_finite(mode, rows, vocab_size, value):
    """They take no part in the softmax, and 0 * NaN must not enter the gradient of the hidden rows."""
    head = in_mode(Head(bias=True, options=HeadOptions(vocab_size=vocab_size)), mode).tile(rows, 4)
    expected = head.run(FP32, general=mode == GENERAL)
    for name in ("weight", "bias"):
        head.tensors[name][vocab_size:] = value
    found = _trained(head, head.trained).run(FP32, general=mode == GENERAL)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        if name in ("grad weight", "grad bias"):
            assert not found[name][vocab_size:].any() and found[name][:vocab_size].any()


@pytest.mark.parametrize("mode", MODES)
def test_columns_that_are_masked_with_minus_infinity(mode):
    head = Head(bias=True)
    unused = torch.ones(head.columns, dtype=torch.bool)
    unused[head.targets] = False
    head.tensors["bias"][unused.nonzero()[::3, 0]] = -torch.inf
    head = _trained(head, ("hidden",) if mode == FROZEN else ("hidden", "weight"))
    found = head.run(FP32, general=mode == GENERAL)
    eager, reference = (head.eager(dtype, rounded=FP32) for dtype in (FP32, FP64))
    for name in eager:
        assert_close(found[name], eager[name], reference[name], name)


def _trained(head: Head, trained: tuple[str, ...]) -> Head:
    """Returns the same problem with other leaves trained; ``replace`` alone would draw its tensors again."""
    other = replace(head, trained=trained)
    other.tensors = head.tensors
    return other


@pytest.mark.parametrize("mode", MODES)
def test_nan_is_not_hidden(mode):
    head = in_mode(Head(), mode)
    head.tensors["hidden"][3, 5] = torch.nan
    found = head.run(FP32, general=mode == GENERAL)
    assert found["loss"].isnan() and found["logps"][3].isnan() and found["grad hidden"][3].isnan().all()
    assert not found["logps"][4:].isnan().any()
    if mode != FROZEN:
        assert found["grad weight"].isnan().any()


# -- which leaves are trained ---


@pytest.mark.parametrize("general", [False, True], ids=[FUSED, GENERAL])
@pytest.mark.parametrize(
    "trained", [("weight",), ("bias",), ("weight", "bias"), ("hidden", "bias"), ("hidden", "weight")], ids="+".join
)
def test_only_some_leaves_are_trained(trained, general):
    head = Head(bias=True, trained=trained).tile(25, 8)
    found, reference = head.run(FP64, general=general), head.eager(FP64)
    assert found.keys() == reference.keys()
    for name in found:
        assert_close(found[name], reference[name], reference[name], name, 1e-13)


def test_without_gradients_nothing_is_saved():
    head = Head(trained=())
    with torch.no_grad():
        leaves = replace(head, trained=("hidden", "weight")).leaves(FP32)
        out = linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss)
    assert out.loss.grad_fn is None and out.tokens.logps.grad_fn is None
    leaves = head.leaves(FP32)
    out = linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss)
    assert out.loss.grad_fn is None


# -- work ---


def _products(head: Head, mode: str, no_grad: bool = False, trained: tuple[str, ...] | None = None) -> float:
    """Matrix products in units of the logits' (N V H multiplications)."""
    head = replace(in_mode(head, mode), **({"trained": trained} if trained else {}))
    with CountProducts() as products:
        if no_grad:
            with torch.no_grad():
                leaves = head.leaves(FP32)
                linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss)
        else:
            head.run(FP32, general=mode == GENERAL)
    return products.count / (sum(head.lengths) * head.columns * head.width)


@pytest.mark.parametrize("rows", [25, 10_000], ids="tile{}".format)
def test_number_of_products(rows):
    head = Head().tile(rows, 4)
    assert _products(head, FROZEN) == 2
    assert _products(head, FUSED) == 3
    assert _products(head, GENERAL) == (4 if rows == 25 else 3)  # one tile is kept, several are computed again
    for mode in MODES:
        assert _products(head, mode, no_grad=True) == 1
    assert _products(head, FUSED, trained=("weight",)) == 2


def test_only_blocks_beyond_the_budget_are_computed_twice():
    """Tiles of 22 rows: the block of 23 rows needs its logits again."""
    head = Head().tile(22, 4)
    assert max(sum(lengths) for lengths, _ in BLOCKS) == 23
    oversize = [sum(lengths) for lengths, _ in BLOCKS if sum(lengths) > 22]
    assert _products(head, FUSED) == pytest.approx(3 + sum(oversize) / sum(head.lengths))
    assert _products(head, FROZEN) == 2


def test_losses_that_are_not_separable_take_the_general_route():
    loss = user_loss(lambda numbers: torch.relu(1 - numbers.chosen + numbers.chosen.mean()), needs_reference=False)
    assert _products(Head(loss).tile(25, 4), FUSED) == 4
    assert _products(Head(loss), FROZEN) == 2
    for mode in MODES:
        check(Head(loss).tile(25, 8), mode, FP64)


def test_user_losses_that_are_separable_are_fused():
    def loss(numbers: PairLogps) -> torch.Tensor:
        return torch.exp(-0.1 * numbers.log_ratio_difference() / numbers.chosen_length)

    head = Head(user_loss(loss, separable=True))
    assert _products(head, FUSED) == 3
    check(head, FUSED, FP32)


# -- one differentiable output ---


@pytest.mark.parametrize("output", ["completion_logps", "tokens"])
@pytest.mark.parametrize("with_loss", [False, True])
def test_a_gradient_through_the_log_probs_of_the_fused_mode_raises(output, with_loss):
    head = Head()
    leaves = head.leaves(FP32)
    out = linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss)
    logps = out.tokens.logps if output == "tokens" else out.completion_logps
    with pytest.raises(RuntimeError, match="general=True"):
        (logps.sum() + out.loss * with_loss).backward()


@pytest.mark.parametrize("mode", [FROZEN, GENERAL])
def test_a_gradient_through_loss_and_log_probs(mode):
    head = in_mode(Head().tile(25, 8), mode)
    leaves = head.leaves(FP64)
    out = linear_preference_loss(
        leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss, None, head.options, general=True
    )
    (2 * out.loss + out.completion_logps[3] ** 2 + (out.tokens.logps[5:9] * 0.5).sum()).backward()
    found = {name: leaves[name].grad for name in leaves if leaves[name].requires_grad}

    leaves = head.leaves(FP64)
    logps = (leaves["hidden"] @ leaves["weight"].t()).log_softmax(-1).gather(1, head.targets[:, None])[:, 0]
    sums = torch.stack([part.sum() for part in logps.split(head.lengths)])
    loss = head.loss(head.pairs().pair_logps(sums)).sum()
    (2 * loss + sums[3] ** 2 + (logps[5:9] * 0.5).sum()).backward()
    for name, grad in found.items():
        assert_close(grad, leaves[name].grad, leaves[name].grad, name, 1e-13)


@pytest.mark.parametrize("rows", [25, 10_000], ids="tile{}".format)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=_ids)
@pytest.mark.parametrize("mode", MODES)
def test_backward_twice(mode, dtype, rows):
    """Saved tensors are overwritten only if the graph is not kept."""
    head = in_mode(Head().tile(rows, dtype.itemsize), mode)
    leaves = head.leaves(dtype)
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    out = linear_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        head.targets,
        head.pairs(),
        head.loss,
        None,
        head.options,
        general=mode == GENERAL,
    )
    upstream = torch.tensor(0.5)
    first = torch.autograd.grad(out.loss, trained, upstream, retain_graph=True)
    second = torch.autograd.grad(out.loss, trained, upstream)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second))
    if mode == FUSED:
        with pytest.raises(RuntimeError, match=r"does not require grad|differentiate twice"):
            out = linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss)
            (grad,) = torch.autograd.grad(out.loss, leaves["hidden"], create_graph=True)
            grad.sum().backward()


# -- linear_logprobs ---


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", FROZEN])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=_ids)
def test_linear_logprobs_with_any_upstream_gradient(dtype, frozen):
    head = Head(
        bias=True, options=HeadOptions(statistics=True), trained=("hidden",) if frozen else ("hidden", "weight")
    )
    upstream = torch.randn(len(head.targets), generator=torch.Generator().manual_seed(1))
    results = []
    for kind in (dtype, dtype, FP64):
        leaves = head.leaves(kind, dtype)
        if not results:
            options = head.tile(25, dtype.itemsize).options
            out = linear_logprobs(leaves["hidden"], leaves["weight"], head.targets, leaves["bias"], options)
            logps = out.logps
            assert not any(field.requires_grad for field in out[1:])
        else:
            logits = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves["bias"])
            log_softmax = logits.to(logps.dtype if kind != FP64 else FP64).log_softmax(-1)
            logps = log_softmax.gather(1, head.targets[:, None])[:, 0]
            if kind == FP64:
                p = log_softmax.exp()
                entropy, log_sum_sq = -(p * log_softmax).sum(-1), p.square().sum(-1).log()
        (logps * upstream).sum().backward()
        results.append({"logps": logps.detach()} | {n: leaves[n].grad for n in head.trained})
    found, eager, reference = results
    for name in found:
        assert_close(found[name], eager[name], reference[name], name, torch.finfo(dtype).eps)
    tolerance = 100 * torch.finfo(dtype).eps
    assert (out.entropy - entropy).abs().max() < tolerance and (out.log_sum_sq - log_sum_sq).abs().max() < tolerance


def test_no_rows():
    hidden = torch.zeros(0, 4, requires_grad=True)
    out = linear_logprobs(hidden, torch.ones(7, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    out.logps.sum().backward()
    assert out.logps.shape == (0,) and hidden.grad.shape == (0, 4)


# -- nothing that was not written is read ---


@pytest.fixture
def poisoned_memory():
    """Makes torch.empty and similar functions return NaN (and the largest integer)."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=_ids)
@pytest.mark.parametrize("mode", MODES)
def test_memory_that_was_not_written_is_not_read(mode, dtype):
    check(Head(**_VARIANTS["all"]).tile(25, dtype.itemsize), mode, dtype)
    check(Head().tile(7, dtype.itemsize), mode, dtype)


def test_shapes_that_do_not_fit():
    hidden, weight, targets = torch.zeros(5, 4), torch.zeros(7, 4), torch.zeros(5, dtype=torch.int64)
    for arguments in ((hidden, weight[:, :3], targets), (hidden[0], weight, targets), (hidden, weight, targets[:4])):
        with pytest.raises(ValueError, match=r"do not fit|must have shape"):
            linear_logprobs(*arguments)
    with pytest.raises(ValueError, match="bias"):
        linear_logprobs(hidden, weight, targets, torch.zeros(6))
    with pytest.raises(ValueError, match="targets must lie"):
        linear_logprobs(hidden, weight, targets + 7)


def test_what_a_loss_needs():
    head = Head()
    leaves = head.leaves(FP32)
    without_reference = replace(head.pairs(), ref_logps=None)
    with pytest.raises(ValueError, match="'sigmoid' needs reference"):
        linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, without_reference, head.loss)
    without_rejected = replace(head.pairs(), rejected=None)
    with pytest.raises(ValueError, match="'slic' needs pairs with a rejected"):
        linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, without_rejected, build_loss("slic"))
    linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, without_rejected, build_loss("sft"))
    without_gaps = replace(head.pairs(), gaps=None)
    with pytest.raises(ValueError, match="'odpo' needs the gap"):
        linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, without_gaps, build_loss("odpo"))
    without_tokens = replace(head.pairs(), ref_token_logps=None)
    desensitised = build_loss("ipo", ld_alpha=0.5)
    with pytest.raises(ValueError, match="'ipo' with ld_alpha needs the reference log-prob of every token"):
        linear_preference_loss(leaves["hidden"], leaves["weight"], head.targets, without_tokens, desensitised)


def test_a_loss_that_is_declared_separable_but_is_not():
    with pytest.raises(ValueError, match="separable"):
        user_loss(lambda numbers: numbers.chosen - numbers.chosen.mean(), separable=True)
