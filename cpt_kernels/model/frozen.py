"""Keeps frozen linear weights in autocast's dtype while a model trains, where that changes no number.

Autocast casts a frozen fp32 weight in every forward and in every recomputation, 6 bytes of traffic per parameter each
time. The cast weight has the same values, so a weight that only linear layers under autocast read may be cast once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from ..ops.backends import autocast_dtype
from .conditions import undisturbed
from .hooks import in_training_mode
from .packed_model import PackedModel, base_model


@contextlib.contextmanager
def rounded_weights(packed: PackedModel, dtype: torch.dtype) -> Iterator[str | None]:
    """Holds frozen fp32 weights of linear layers in ``dtype``, that of autocast, inside.

    Gives a line for the log; None if there are no such weights.

    Afterwards the weights are as before, bit by bit. Those that ``dtype`` does not hold exactly wait in the host's
    memory. Outside autocast, as in a callback that generates, layers compute with the exact weights. Adapters cannot be
    merged inside.
    """
    layers = rounded_layers(packed, dtype)
    weights = {layer.weight: _exact_values(layer.weight, dtype) for layer in layers}
    holders: list[Any] = [m for m in packed.model.modules() if getattr(m, "base_layer", None) in layers]
    try:
        for weight in weights:
            weight.data = weight.data.to(dtype)
        for layer in layers:
            layer.__class__, layer.exact_weight = _RoundedLinear, weights[layer.weight]
        for holder in holders:
            holder.merge = holder.unmerge = _refuse_merge
        size = sum(weight.nbytes for weight in weights) / 2**30
        name = str(dtype).removeprefix("torch.")
        yield f"{len(layers)} frozen linear layers hold {size:.3g} GiB of {name} while training" if layers else None
    finally:
        for weight, exact in weights.items():
            weight.data = exact().to(weight.device)
        for layer in layers:
            layer.__class__ = nn.Linear
            vars(layer).pop("exact_weight", None)
        for holder in holders:
            vars(holder).pop("merge", None), vars(holder).pop("unmerge", None)


class _RoundedLinear(nn.Linear):
    """A linear layer whose weight is held in autocast's dtype."""

    exact_weight: Callable[[], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        is_same = autocast_dtype(input) == self.weight.dtype
        return F.linear(input, self.weight if is_same else self.exact_weight().to(input.device), self.bias)


def _exact_values(weight: nn.Parameter, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a function that gives the fp32 values of a weight that will be rounded."""
    held = weight.detach()
    if torch.equal(held.to(dtype).float(), held):
        return lambda: weight.detach().float()
    held = held.cpu()
    return lambda: held  # a function, because a deep copy of the model shall not copy the values


def _refuse_merge(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "adapters cannot be merged while the model trains, because its frozen weights are rounded until train() ends:"
        " merge them then, merge a checkpoint by cpt merge, or pass the trainer a model instead of a name"
    )


# --- Which weights ---


class _Uses(TorchFunctionMode):
    """Records which weights linear layers under autocast use, and which are used in another way."""

    def __init__(self, weights: set[nn.Parameter]) -> None:
        super().__init__()
        self.weights, self.linear, self.other = weights, set[Any](), set[Any]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = [x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter) and x in self.weights]
        is_linear = function is F.linear and len(args) > 1 and autocast_dtype(args[0]) is not None
        for weight in used:
            (self.linear if is_linear and weight is args[1] and len(used) == 1 else self.other).add(weight)
        return function(*args, **(kwargs or {}))


def rounded_layers(packed: PackedModel, dtype: torch.dtype) -> list[Any]:
    """Returns the layers whose weights are read by nothing else than themselves, under autocast.

    A few tokens are run as in training. A model may read a weight elsewhere, for example in a kernel that takes several
    of them, or ask for its dtype. Such a weight, and one that these tokens do not reach, stays as it is.
    """
    layers = [layer for layer in packed.model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    plain = {w for layer in layers if type(w := layer.weight) in (nn.Parameter, FakeTensor) and not w.requires_grad}
    uses = _Uses({w for w in plain if w.dtype == torch.float32 and (isinstance(w, FakeTensor) or not w.is_meta)})
    if not uses.weights:
        return []
    is_fake = any(isinstance(weight, FakeTensor) for weight in uses.weights)  # a plan's, without values to restore
    with (
        contextlib.nullcontext() if is_fake else undisturbed(packed.model),
        in_training_mode(packed.quantized),
        torch.no_grad(),
        torch.autocast(base_model(packed.model).device.type, dtype),
        torch.compiler.set_stance("force_eager"),
    ):
        packed.model.train()
        for probe in packed.probes():
            batch = packed.probe_batch(probe)
            with uses:
                packed(batch)
    return [layer for layer in layers if layer.weight in uses.linear - uses.other]
