"""The head under ``torch.compile``: one graph, one operator each way, the results of eager mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from cpt_kernels.losses import Loss, PairLogps, build_loss, user_loss
from cpt_kernels.ops.head import compiled as head_operators
from cpt_kernels.ops.head.passes import Wanted
from cpt_kernels.ops.linear_preference import HeadOptions, linear_logprobs, linear_preference_loss
from cpt_kernels.ops.pair_loss import KERNEL_LOSSES
from tests.helpers.heads import BLOCKS, Head

FP32, BF16 = torch.float32, torch.bfloat16
FROZEN, TRAINED = ("hidden",), ("hidden", "weight", "bias")
MODES = {"frozen": (FROZEN, False), "fused": (TRAINED, False), "general": (TRAINED, True)}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def preference(head: Head, general: bool = False):
    def function(leaves, targets, pairs):
        return linear_preference_loss(
            leaves["hidden"],
            leaves["weight"],
            targets,
            pairs,
            head.loss,
            leaves.get("bias"),
            head.options,
            general=general,
        )

    return function


def results(function, head: Head, dtype: torch.dtype = FP32) -> list[torch.Tensor]:
    """Returns the outputs of a preference loss, and the gradients of twice the loss."""
    leaves = head.leaves(dtype)
    out = function(leaves, head.targets, head.pairs())
    (2 * out.loss).backward()
    values = [out.loss, out.losses, out.completion_logps, *(x for x in out.tokens if x is not None)]
    return [value.detach() for value in values] + [leaves[name].grad for name in head.trained if name in leaves]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("loss", KERNEL_LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_preference_loss(mode, loss):
    trained, general = MODES[mode]
    head = Head(build_loss(loss), bias=True, trained=trained, options=HeadOptions(statistics=loss == "slic"))
    function = preference(head.tile(25, 4), general)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = results(function, head)
    assert equal(results(compiled, head), expected)
    assert equal(results(compiled, head), expected)


@pytest.mark.parametrize("mode", MODES)
def test_completions_that_have_tokens_in_common(mode):
    trained, general = MODES[mode]
    head = Head(bias=True, trained=trained, shared=True, options=HeadOptions(statistics=True)).tile(25, 4)
    function = preference(head, general)
    assert equal(results(torch.compile(function, fullgraph=True, backend="aot_eager"), head), results(function, head))


@pytest.mark.parametrize("mode", MODES)
def test_fp16_has_a_unit_of_its_sums(mode):
    trained, general = MODES[mode]
    head = Head(bias=True, trained=trained).tile(25, 2)
    function = preference(head, general)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert equal(results(compiled, head, torch.float16), results(function, head, torch.float16))


@pytest.mark.parametrize("mode", ["frozen", "fused"])
def test_inductor(mode):
    trained, general = MODES[mode]
    head = Head(build_loss("sigmoid", beta=0.3), trained=trained).with_options(compute_dtype=BF16)
    function = preference(head, general)
    found = results(torch.compile(function, fullgraph=True), head)
    torch.testing.assert_close(found, results(function, head))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("trained", [FROZEN, TRAINED, ("weight",), ("bias",), ()], ids="-".join)
def test_logprobs(trained, dtype):
    """Any upstream gradient, with gradients of some operands or of none."""
    head = Head(bias=True, trained=trained, options=HeadOptions(1.5, 3.0, 290, statistics=True))
    upstream = torch.randn(len(head.targets), generator=torch.Generator().manual_seed(1))

    def function(leaves, targets):
        return linear_logprobs(leaves["hidden"], leaves["weight"], targets, leaves["bias"], head.options)

    found = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = head.leaves(dtype)
        out = run(leaves, head.targets)
        assert [x.requires_grad for x in out] == [bool(trained), *[False] * 5]
        if trained:
            (out.logps * upstream).sum().backward()
        found.append([x.detach() for x in out] + [leaves[name].grad for name in trained])
    assert equal(*found)


def test_without_gradients():
    head = Head()
    function = preference(head)
    arguments = head.leaves(FP32), head.targets, head.pairs()
    with torch.no_grad():
        found, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments), function(*arguments)
    assert found.loss.grad_fn is None and torch.equal(found.losses, expected.losses)


def test_a_normaliser_that_is_a_tensor():
    head = Head(build_loss("sft"))
    pairs = replace(head.pairs(), tokens_per_pair=torch.tensor(head.tokens_per_pair))
    compiled = torch.compile(preference(head), fullgraph=True, backend="aot_eager")
    found = compiled(head.leaves(FP32), head.targets, pairs)
    torch.testing.assert_close(found.losses, head.run(FP32)["losses"])


def test_other_lengths_and_numbers_of_pairs():
    """One graph serves batches of any size: after the first batch its sizes are symbols."""
    head = Head()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(preference(head), fullgraph=True, backend=counter)
    for lengths in ([3, 4], [5, 7], [8, 13], [2, 40], [9, 9]):
        head = Head(blocks=[(lengths, [(0, 0, 1)]), (lengths, [(1, 1, 0)])])
        assert equal(results(compiled, head), results(preference(head), head))
    assert counter.frame_count == 2


# --- One operator ---


class Operators(TorchDispatchMode):
    """Collects the names of our operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cpt_kernels":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [
        ("frozen", "linear_logprobs", []),
        ("fused", "linear_preference", []),
        ("general", "linear_logprobs", ["linear_logprobs_backward"]),
    ],
)
def test_one_operator_each_way_in_a_graph_and_none_outside(mode, forward, backward):
    trained, general = MODES[mode]
    head = Head(bias=True, trained=trained).tile(25, 4)
    with Operators() as outside:
        results(preference(head, general), head)
    assert outside.names == []

    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _):
        targets = [node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        graphs.append([target._opname for target in targets if target.namespace == "cpt_kernels"])
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    results(torch.compile(preference(head, general), fullgraph=True, backend=backend), head)
    assert graphs == [[forward], backward]


def test_opcheck():
    head = Head(bias=True)
    leaves, pairs = head.leaves(FP32), head.pairs()
    tensors = [leaves["hidden"], leaves["weight"], head.targets, leaves["bias"]]
    for statistics, wanted in (
        (True, (True, False, False)),
        (False, (True, True, True)),
        (False, (False, True, False)),
    ):
        options = head_operators.flat_options(HeadOptions(0.5, 3.0, 301, statistics, compute_dtype=BF16))
        keywords = {"wanted": wanted, **options}
        operands = [x.detach() for x in tensors]
        for operand, wants in zip((operands[0], operands[1], operands[3]), wanted):
            operand.requires_grad_(wants)
        torch.library.opcheck(torch.ops.cpt_kernels.linear_logprobs.default, tuple(operands), keywords)
        operands = [x.detach() for x in operands]
        arguments = (torch.ones(len(head.targets)), *operands)
        torch.library.opcheck(torch.ops.cpt_kernels.linear_logprobs_backward.default, arguments, keywords)
    loss = {"loss": "sigmoid", "loss_options": ["beta", "label_smoothing"], "loss_values": [0.3, 0.1]}
    pair_tensors, lists = head_operators.flat_pairs(pairs)
    arguments, keywords = (*tensors, *pair_tensors), {"wanted": Wanted(True, True, True), **lists, **loss, **options}
    operator = torch.ops.cpt_kernels.linear_preference.default
    # The other checks send gradients through the log-probs, which this operator refuses. test_preference_loss covers
    # what they would check.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(operator, arguments, keywords, test_utils=checks).values()) == {"SUCCESS"}


# --- Gradients that are refused, and losses that leave the graph ---


def test_a_gradient_through_the_log_probs_of_the_fused_mode_raises():
    head = Head()
    compiled = torch.compile(preference(head), fullgraph=True, backend="aot_eager")
    for outputs in (lambda out: out.loss + out.completion_logps.sum(), lambda out: out.tokens.logps.sum()):
        leaves = head.leaves(FP32)
        out = compiled(leaves, head.targets, head.pairs())
        with pytest.raises(RuntimeError, match="general=True"):
            outputs(out).backward()

    def inside(leaves, targets, pairs):
        out = preference(head)(leaves, targets, pairs)
        return out.loss + out.tokens.logps.mean()

    with pytest.raises(RuntimeError, match="general=True"):
        torch.compile(inside, fullgraph=True, backend="aot_eager")(
            head.leaves(FP32), head.targets, head.pairs()
        ).backward()


def _own(logps: PairLogps) -> torch.Tensor:
    return torch.exp(-0.1 * logps.log_ratio_difference() / logps.chosen_length)


@pytest.mark.parametrize(
    "loss",
    [
        user_loss(_own, separable=True),
        Loss("unknown to the kernels", _own, needs_reference=True, options={}),
        build_loss("simpo"),
        build_loss("sigmoid", ld_alpha=0.5),
    ],
    ids=["own", "built in", "simpo", "ld_alpha"],
)
def test_losses_without_a_kernel_break_the_graph_and_are_right(loss):
    head = Head(loss, blocks=BLOCKS[:4])
    expected = results(preference(head), head)
    counter = CompileCounterWithBackend("aot_eager")
    assert equal(results(torch.compile(preference(head), backend=counter), head), expected)
    assert counter.op_count == 0, "the pass itself was compiled, piece by piece"
    general = preference(head, general=True)
    found = results(torch.compile(general, fullgraph=True, backend="aot_eager"), head)
    assert equal(found, results(general, head))


@pytest.mark.parametrize("loss", [build_loss("aot"), build_loss("sigmoid", use_weighting=True)], ids=["aot", "WPO"])
def test_losses_that_go_the_general_way_stay_in_one_graph(loss):
    head = Head(loss, blocks=BLOCKS[:4])
    function = preference(head, general=loss.separable)
    found = results(torch.compile(function, fullgraph=True, backend="aot_eager"), head)
    assert equal(found, results(function, head))
