"""The count of bytes: operators, compiled graphs and launches of Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaMLP

from bench.bytes import CASES, LAYERS, build, count
from bench.traffic import BACKEND, Traffic, counted_launches
from tests.helpers import ROOT

N = 1024
FULL_BF16 = CASES[2]


def test_operators_move_their_arguments_and_results_once():
    x, weight, index = torch.ones(N, 8), torch.ones(8, 8), torch.tensor([0, 2])
    with Traffic() as traffic:
        y = x.t().exp()  # reads and writes 8 N floats; the view moves nothing
        y.add_(1.0)  # reads and writes them
        torch.zeros(N)  # writes
        x[:, :1].expand(N, 8).contiguous()  # reads N, writes 8 N
        x.index_select(0, index)  # reads two rows, two indices, writes two rows
        x @ weight
    expected = {"exp": 64 * N, "add_": 64 * N, "zeros": 4 * N, "clone": 36 * N, "index_select": 64 + 64 + 16}
    assert {name: n for name, n in traffic.by_operator.items() if n} == expected


@torch.library.custom_op("cpt_tests::planted_copy", mutates_args=())
def planted_copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


planted_copy.register_fake(torch.empty_like)
planted_copy.register_autograd(lambda ctx, grad: grad.clone())


class Layer(nn.Module):
    """A norm and a product, and in between, if it is planted, a copy that no fusion can remove."""

    def __init__(self, planted: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.planted = nn.RMSNorm(64), nn.Linear(64, 64, bias=False), planted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        if self.planted:
            x = planted_copy(x)
        return self.linear(x)


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted"])
def test_a_compiled_graph_is_counted_as_its_kernels_are_fused(planted):
    torch._dynamo.reset()
    counters.clear()
    layer = torch.compile(Layer(planted), backend=BACKEND, dynamic=True)
    moved = []
    for rows in (N, 3 * N):
        x = torch.randn(rows, 64)
        with Traffic() as traffic, torch.no_grad():
            layer(x)
        moved.append(traffic.total)
    # The norm reads and writes x, and reads its weight; longer rows are counted without another compilation.
    assert counters["stats"]["unique_graphs"] == 1
    copies = 2 if planted else 1
    assert moved == [copies * 2 * 4 * 64 * rows + 4 * 64 for rows in (N, 3 * N)]


# Bytes per token, hidden unit and layer of compiled layers, by case. They may fall, not rise.
BUDGETS = {
    **{"full, bf16": 176, "full, fp32": 242, "LoRA, bf16 base": 256, "LoRA, fp32 base": 314},
    **{"full, bf16, checkpointing": 233, "full, fp32, checkpointing": 319},
    **{"LoRA, bf16 base, checkpointing": 356, "LoRA, fp32 base, checkpointing": 436},
}
IN_CI = ("full, bf16", "LoRA, bf16 base, checkpointing")


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in BUDGETS]
)
def test_compiled_layers_keep_to_their_budget(name):
    (case,) = (case for case in CASES if str(case) == name)
    assert count(build(case, LAYERS["compiled"])).per_token <= BUDGETS[name]


def test_a_copy_planted_into_a_compiled_decoder_layer_raises_its_count(monkeypatch):
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, planted_copy(x)))
    planted = count(build(FULL_BF16, LAYERS["compiled"])).per_token
    assert planted > BUDGETS["full, bf16"]  # one copy reads and writes two bytes, and so does its gradient


def ligers_norm() -> None:
    """Counts Liger's norm in a process of its own, because the tests define Triton's kernels for its interpreter."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = torch.ones(N, 64, requires_grad=True), torch.ones(64)
    with Traffic() as traffic, counted_launches(traffic):
        LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    # The norm reads x and its weight, and writes its result and one number per row.
    assert traffic.total == 2 * 4 * 64 * N + 4 * 64 + 4 * N, traffic.by_operator


def test_liger_is_counted_by_the_arguments_of_its_launches():
    pytest.importorskip("liger_kernel", reason="needs Liger: pip install liger-kernel==0.8.5")
    command = [sys.executable, "-c", "from tests.bench import test_bytes; test_bytes.ligers_norm()"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
