"""The proof that completions are run exactly: log-probs of a few tokens, as in training and by the model's own forward.

Nothing is assumed of the architecture. The truth is the model's own forward of each completion alone behind its
prompt, with the model's own attention, masks, positions and logits. The same forward in a batch measures how far
rounding moves a log-prob. The same forward of everything in one plain row measures how far a wrong layout would move
it. A proof counts only if the second distance is far above the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collate import Tokens
from ..errors import UserError

OwnForward = Callable[[Tensor], Tensor]  # token ids (B, L) -> logits (B, L, V)

_SIGNAL = 8  # a wrong layout must move a log-prob by so many bounds to be told from rounding
_FP64_PARTS = 2e-8  # epsilon of an fp64 model, parts of which (routers, states) may compute in fp32


@dataclass(frozen=True)
class Probe:
    """The tokens of a proof: two prompts, one of them with three uneven completions.

    They are longer than a convolution's kernel, and the tokens are drawn by a fixed seed.
    """

    sequences: list[Tokens]
    pad: int
    device: torch.device

    @classmethod
    def of(cls, model: Any, mark: Sequence[int] = ()) -> Probe:
        """The probe of a transformers model, within its vocabulary.

        Args:
            mark: tokens that change how a model runs the tokens after them. They lie in a prompt and in a completion.
        """
        config = model.config.get_text_config()
        size = min(model.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size", None) or 1 << 30)
        random = torch.Generator().manual_seed(0)
        low = min(5, size // 2)  # special tokens come first

        def draw(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(low, size, (count,), generator=random).tolist())

        first, second = draw(4) + tuple(mark) + draw(5), draw(4)
        pad = getattr(config, "pad_token_id", None)
        pad = pad if isinstance(pad, int) and 0 <= pad < size else 0
        last = draw(2) + tuple(mark) + draw(4)
        return cls([(first, draw(5)), (first, draw(8)), (first, draw(3)), (second, last)], pad, model.device)


@dataclass(frozen=True)
class Truth:
    """What the model's own forward says of a probe."""

    logps: Tensor  # (N,) fp32 or fp64: of the tokens of all completions, each completion run alone behind its prompt
    noise: float  # how far a batch moves one of them
    epsilon: float  # how far rounding may move one of them at least
    fault: float  # how far one moves if completions see the sequences before them
    look_ahead: float  # how far one moves with the token after it

    @property
    def bound(self) -> float:
        """The largest difference of a log-prob that rounding explains."""
        return 2 * self.noise + self.epsilon

    def is_clear(self) -> bool:
        """Whether a wrong layout can be told from rounding."""
        return self.fault > _SIGNAL * self.bound

    def difference(self, logps: Tensor) -> float:
        """The largest difference of log-probs (N,) from the truth; NaN where one is not finite."""
        return (logps.to(self.logps) - self.logps).abs().max().item()

    def check(self, name: str) -> None:
        """Raises UserError if the model is not causal, or if nothing can be proven of it."""
        if self.look_ahead > self.bound:
            raise UserError(
                f"{name} is not causal: a token's log-prob changes by {self.look_ahead:.2g} with the token after it;"
                " for an encoder, such as a BERT, set is_decoder=True in its config"
            )
        if not self.is_clear():
            raise UserError(
                f"{name} cannot be proven to run completions exactly: its own log-probs differ by {self.noise:.2g}"
                f" between one sequence alone and two of it in a batch, and by {self.fault:.2g} with another context"
            )


@torch.no_grad()
def find_truth(own: OwnForward, probe: Probe) -> Truth:
    """Runs the model's own forward on the probe: each sequence alone, twice in a batch, and in a wrong layout."""

    def row(tokens: Sequence[int]) -> Tensor:
        return own(torch.tensor([tokens], device=device))[0]

    device = probe.device
    sequences = probe.sequences
    alone = [row(p + c) for p, c in sequences]
    logps = torch.cat([_logps(logits, p, c) for logits, (p, c) in zip(alone, sequences)])
    # Rounding: other shapes take other kernels. Every sequence twice, so that a batch has one length: frequencies of
    # RoPE may depend on the longest sequence of a batch.
    twice = [own(torch.tensor([p + c] * 2, device=device))[1] for p, c in sequences]
    doubled = torch.cat([_logps(logits, p, c) for logits, (p, c) in zip(twice, sequences)])
    noise = (logps - doubled).abs().max().item()
    # A wrong layout: every sequence behind all those before it.
    before: tuple[int, ...] = ()
    misplaced = []
    for p, c in sequences:
        misplaced.append(_logps(row(before + p + c), before + p, c))
        before += p + c
    # Another last token, which no token before it may notice.
    p, c = max(sequences, key=lambda sequence: len(sequence[1]))
    last = next(token for token in p if token != c[-1])
    other = (*c[:-1], last)
    ahead = (_logps(row(p + c), p, c) - _logps(row(p + other), p, other))[:-1]
    return Truth(
        logps,
        noise,
        32 * max(torch.finfo(alone[0].dtype).eps, _FP64_PARTS) * (1 + logps.abs().max().item()),
        (logps - torch.cat(misplaced)).abs().max().item(),
        ahead.abs().max().item(),
    )


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards modes, buffers and random states are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in modes if module._buffers}
    copies = {id(b): b.clone() for own in buffers.values() for b in own.values() if b is not None and not b.is_meta}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(list(devices)):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, own in buffers.items():
            for name, buffer in own.items():
                module._buffers[name] = buffer
                if id(buffer) in copies and not torch.equal(buffer, copies[id(buffer)]):
                    buffer.copy_(copies[id(buffer)])


@contextlib.contextmanager
def magnified(model: nn.Module) -> Iterator[None]:
    """Weights in fp32, and matrices four times as large, so that tokens differ more; afterwards as they were.

    Both can be undone exactly: bf16 and fp16 are subsets of fp32, and 4 is a power of two.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter]  # quantized weights have classes of their own
    dtypes = {p: p.dtype for p in plain if p.dtype in (torch.bfloat16, torch.float16)}
    matrices = [p for p in plain if p.is_floating_point() and p.dtype.itemsize > 1 and p.dim() >= 2]
    try:
        for p in dtypes:
            p.data = p.data.float()
        for p in matrices:
            p.data.mul_(4)
        yield
    finally:
        for p in matrices:
            p.data.div_(4)
        for p, dtype in dtypes.items():
            p.data = p.data.to(dtype)


def _logps(logits: Tensor, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    rows = logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
    return rows.gather(-1, torch.tensor(completion, device=rows.device)[:, None])[:, 0]
