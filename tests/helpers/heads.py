"""Problems for the head: hidden rows of completions of different lengths, and the results of eager PyTorch for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from cpt_kernels.losses import Loss, PairLogps, build_loss
from cpt_kernels.ops.gather import TokenMap
from cpt_kernels.ops.head.tiles import row_stride
from cpt_kernels.ops.linear_preference import HeadOptions, Pairs, linear_preference_loss
from tests.numerics import assert_close

torch.set_num_threads(1)  # at tiny shapes, several threads are slower

# Pair blocks: completion lengths, and pairs (chosen, target, rejected) among them. Some completions have one token, and
# one is in no pair.
BLOCKS: list[tuple[list[int], list[tuple[int, int, int]]]] = [
    ([1, 4], [(0, 0, 1)]),
    ([3, 1, 16, 2], [(0, 3, 1), (0, 3, 2), (3, 3, 1)]),
    ([4], []),
    ([12, 9, 1], [(0, 2, 1)]),
    ([1, 1], [(1, 1, 0)]),
    ([11, 3, 2], [(1, 1, 0), (1, 2, 2), (0, 0, 2)]),
    ([2, 21], [(1, 0, 0)]),
]
FROZEN, FUSED, GENERAL = "frozen", "fused", "general"  # modes of the head
_VALUES = ("loss", "losses", "completion_logps", "logps")
_GRADS = ("hidden", "weight", "bias")


@dataclass
class Head:
    """One problem in fp64; ``eager`` and ``run`` take a dtype and return tensors by name."""

    loss: Loss = field(default_factory=lambda: build_loss("sigmoid", beta=0.3, label_smoothing=0.1))
    blocks: list = field(default_factory=lambda: BLOCKS)
    columns: int = 301
    width: int = 24
    bias: bool = False
    options: HeadOptions = field(default_factory=HeadOptions)
    trained: tuple[str, ...] = _GRADS
    scale: float = 1.0  # factor of the hidden rows
    shared: bool = False  # completions of a block have up to two first tokens in common
    weighted: bool = False  # tokens have weights
    near: bool = False  # reference log-probs are a few nats from those of a uniform policy
    upstream: float = 1.0  # upstream gradient of the loss
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.lengths = [n for lengths, _ in self.blocks for n in lengths]
        index = []  # the row of each completion token
        for lengths, _ in self.blocks:
            first = len(set(index))
            for i, n in enumerate(lengths):
                common = min(n, 2, lengths[0]) if self.shared and i else 0
                new = len(set(index))
                index += [*range(first, first + common), *range(new, new + n - common)]
        self.index, tokens = torch.tensor(index), len(index)
        rows, vocab = len(set(index)), self.options.vocab_size or self.columns
        normal = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in self.shapes(rows)]
        self.tensors = dict(zip(("hidden", "weight", "bias"), normal))
        self.tensors["hidden"] *= self.scale
        self.tensors["weight"] *= self.width**-0.5
        if not self.bias:
            del self.tensors["bias"]
        self.targets = torch.randint(0, vocab, (rows,), generator=generator)
        self.ref_logps = -4.0 * torch.rand(len(self.lengths), generator=generator).mul(64).round().div(8)
        if self.near:
            uniform = torch.tensor(self.lengths) * float(torch.tensor(float(vocab)).log())
            self.ref_logps = self.ref_logps / 8 - uniform.mul(8).round().div(8)
        starts = [sum(len(lengths) for lengths, _ in self.blocks[:u]) for u in range(len(self.blocks))]
        edges = [[start + i for i in pair] for start, (_, pairs) in zip(starts, self.blocks) for pair in pairs]
        self.chosen, self.sft_targets, self.rejected = torch.tensor(edges).t()
        self.tokens_per_pair = sum(self.lengths[i] for i in self.chosen) / len(edges)
        self.ref_token_logps = -torch.rand(tokens, generator=generator).mul(64).round().div(16)
        self.gaps = torch.rand(len(edges), generator=generator).mul(64).round().add(1).div(16)
        self.hard = torch.arange(len(edges)) % 3 == 0
        self.token_weights = torch.ones(tokens)
        if self.weighted:
            self.token_weights = torch.rand(tokens, generator=generator).mul(16).round().add(1).div(8)

    def shapes(self, rows: int) -> list[tuple[int, ...]]:
        return [(rows, self.width), (self.columns, self.width), (self.columns,)]

    def with_options(self, **changes) -> Head:
        return replace(self, options=replace(self.options, **changes))

    def tile(self, rows: int, itemsize: int) -> Head:
        """Returns the same problem with a memory budget for tiles of ``rows`` rows."""
        return self.with_options(memory_mb=rows * row_stride(self.columns, self.targets.device) * itemsize / 2**20)

    def pairs(self) -> Pairs:
        cumulative = torch.tensor([0, *self.lengths]).cumsum(0)
        pair_blocks = [(len(lengths), len(pairs)) for lengths, pairs in self.blocks]
        parts = self.index.split(self.lengths)
        ends = [0, *torch.stack([part.max() + 1 for part in parts]).cummax(0).values.tolist()]
        offsets = torch.tensor([0, *self.index.bincount().cumsum(0)])
        shared = TokenMap(self.index, self.index.argsort(stable=True), offsets) if self.shared else None
        return Pairs(
            cumulative, self.lengths, self.chosen, self.rejected, self.sft_targets, pair_blocks, self.ref_logps,
            self.tokens_per_pair, self.ref_token_logps, self.gaps, self.hard, shared,
            [stop - start for start, stop in pairwise(ends)] if self.shared else None,
            token_weights=self.token_weights if self.weighted else None,
        )  # fmt: skip

    def leaves(self, dtype: torch.dtype, rounded: torch.dtype | None = None) -> dict[str, Tensor]:
        return {
            name: tensor.to(rounded or dtype).to(dtype).requires_grad_(name in self.trained)
            for name, tensor in self.tensors.items()
        }

    def run(self, dtype: torch.dtype, general: bool = False) -> dict[str, Tensor]:
        """Returns the results of ``linear_preference_loss`` and its gradients."""
        leaves = self.leaves(dtype)
        out = linear_preference_loss(
            leaves["hidden"], leaves["weight"], self.targets, self.pairs(), self.loss, leaves.get("bias"), self.options,
            general=general,
        )  # fmt: skip
        (out.loss * self.upstream).backward()
        values = out.loss, out.losses, out.completion_logps, out.tokens.logps
        return self._results(values, leaves)

    def eager(
        self, dtype: torch.dtype, rounded: torch.dtype | None = None, autocast: bool = False
    ) -> dict[str, Tensor]:
        """Returns the same by autograd through all logits: logits in ``dtype``, softmax in fp32, as in TRL."""
        leaves, options = self.leaves(dtype, rounded), self.options
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = F.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        logits = logits[:, : options.vocab_size] * options.logit_scale
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        log_softmax = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)[self.index]
        logps = log_softmax.gather(1, self.targets[self.index, None])[:, 0]
        weights = self.token_weights.to(logps.dtype)
        weighed = weights * logps
        completion_logps = torch.stack([part.sum() for part in weighed.split(self.lengths)])
        lengths = torch.stack([part.sum() for part in weights.split(self.lengths)])
        ref = self.ref_logps.to(logps.dtype)
        w, y, x = self.chosen, self.sft_targets, self.rejected
        log_sum_sq = weights * (2 * log_softmax).logsumexp(-1)
        log_sum_sq = torch.stack([part.sum() for part in log_sum_sq.split(self.lengths)])
        losses = self.loss(
            PairLogps(
                completion_logps[w], completion_logps[x], completion_logps[y], lengths[w], lengths[x], lengths[y],
                ref[w], ref[x], self.tokens_per_pair,
                self._tails(weighed, w, x), self._tails(weighed, x, w),
                self._tails(self.ref_token_logps.to(logps.dtype), w, x),
                self._tails(self.ref_token_logps.to(logps.dtype), x, w),
                log_sum_sq[w], log_sum_sq[x], self.gaps.to(logps.dtype), self.hard,
            )
        )  # fmt: skip
        (losses.sum() * self.upstream).backward()
        return self._results((losses.sum(), losses, completion_logps, logps), leaves)

    def _tails(self, tokens: Tensor, side: Tensor, other: Tensor) -> Tensor:
        """Returns, for each pair, the sum of a completion's tokens beyond the length of the other side."""
        parts = tokens.split(self.lengths)
        return torch.stack([parts[s][self.lengths[o] :].sum() for s, o in zip(side.tolist(), other.tolist())])

    def _results(self, values: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        grads = {f"grad {name}": leaf.grad for name, leaf in leaves.items() if name in self.trained}
        return dict(zip(_VALUES, (value.detach() for value in values))) | grads


def in_mode(head: Head, mode: str) -> Head:
    return replace(head, trained=("hidden",)) if mode == FROZEN else head


def check(head: Head, mode: str, dtype: torch.dtype, *, autocast: bool = False, draws: int = 6) -> None:
    """Compares by the tolerance rule, pooled over several draws, because few pairs make rounding errors erratic."""
    kinds: list[dict[str, list]] = [{}, {}, {}]
    for seed in range(1 if dtype == torch.float64 else draws):
        drawn = in_mode(replace(head, seed=seed), mode)
        results = (
            drawn.run(dtype, general=mode == GENERAL),
            drawn.eager(dtype, autocast=autocast),
            drawn.eager(torch.float64, rounded=dtype),
        )
        for kind, result in zip(kinds, results):
            for name, tensor in result.items():
                kind.setdefault(name, []).append(tensor.flatten())
    # In fp64, only the order of sums differs.
    eps = 1e-13 if dtype == torch.float64 else torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for name in kinds[0]:
        assert_close(*(torch.cat(kind[name]) for kind in kinds), f"{mode} {name}", eps)


class CountProducts(TorchDispatchMode):
    """Counts the multiplications of all matrix products in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"):
            a, b = args[1:3] if "add" in name else args[:2]
            self.count += a.numel() * b.shape[-1]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Appends the peak number of bytes allocated in the context and not yet freed (PyTorch's CPU allocator)."""
    peak: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        largest = max(largest, live)
    peak.append(largest)
