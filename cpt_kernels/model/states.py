"""Runs layers that carry a state on packed rows: what sequences share once, its final state forked where they part.

The state of a layer is the last inputs of its causal convolution, the memory of its recurrence, or both. Functions in
transformers' modules compute them. They are wrapped here, and run as before outside packed rows. The projections around
them run on the packed row as they are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.packing import scatter_rounds
from ..ops.gather import Rounds, gather_rows
from .hooks import in_packed_forward


class Recurrence(NamedTuple):
    """Arguments of a function of transformers that runs a recurrence over (B, L, ...) tensors."""

    sequences: tuple[str, ...]  # tensors with one entry per token
    initial_state: str | None  # None: the function takes no state
    final_state: str  # asks for the state behind the last token
    time: int = 1  # dimension of the tokens
    returns_pair: bool = False  # (outputs, state or None) in any case; else the state only if it is asked for


_DELTA = Recurrence(("query", "key", "value", "g", "beta"), "initial_state", "output_final_state", returns_pair=True)
# Name in a module of transformers -> its arguments. A token of zeros leaves a state of zeros as it is in each of them.
_RECURRENCES = {
    "torch_chunk_gated_delta_rule": _DELTA,
    "chunk_kimi_delta_attention": _DELTA,
    "mamba2_chunk_scan": Recurrence(("hidden_states", "dt", "B", "C"), "initial_states", "return_final_states"),
    "mamba_selective_scan": Recurrence(("hidden_states", "dt", "B", "C", "z"), None, "return_last_state", time=2),
}
_CONVOLUTION = "causal_conv1d_fn"
# Kernels that run a whole layer and know no packed row. A result of None makes the layer take its own steps.
_WHOLE_LAYERS = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
_WRAPPED = {*_RECURRENCES, _CONVOLUTION, *_WHOLE_LAYERS}


class _Gather(NamedTuple):
    """Where the tokens of a (B, L) batch lie in a packed row of T tokens; T stands for a token of zeros."""

    index: Tensor  # (B * L,) int64
    rounds: Rounds  # of the index without T
    places: NDArray[np.int64]  # (B, L), the index on the host
    has_zeros: bool

    @classmethod
    def of(cls, places: NDArray[np.int64], rows: int, device: torch.device) -> _Gather:
        flat = places.reshape(-1)
        held = np.flatnonzero(flat < rows)
        rounds = [(to, held[source]) for to, source in scatter_rounds(flat[held], rows)]
        arrays = [flat, *itertools.chain.from_iterable(rounds)]
        # One copy for all, and from pinned memory, so that the CPU does not wait for the GPU.
        whole = torch.from_numpy(np.concatenate(arrays))
        if device.type == "cuda" and type(whole) is Tensor:  # the fake tensors of planning.memory cannot be pinned
            whole = whole.pin_memory()
        index, *parts = whole.to(device, non_blocking=True).split([len(array) for array in arrays])
        return cls(index, list(zip(parts[::2], parts[1::2])), places, len(held) < len(flat))

    def __call__(self, rows: Tensor) -> Tensor:  # (T, ...) -> (B, L, ...)
        if self.has_zeros:
            rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        return gather_rows(rows, self.index, self.rounds).view(*self.places.shape, *rows.shape[1:])


@dataclass
class StateLayout:
    """The trees of a packed row of T tokens, for layers that carry a state, cut into nodes where sequences part.

    A trunk starts without a state: the root of a tree, or a sequence that shares nothing. Every other node starts with
    the state behind its parent: a branch is a leaf, and a fork has children.
    """

    segment_lengths: Sequence[tuple[int, int]]  # (queries, keys) of the attention's segments, see ``data.packing``
    device: torch.device
    trunks: list[tuple[int, int]] = field(init=False)  # (start, stop) of each in the packed row
    # (start, stop, parent) in the order in which they run: parents are numbered through trunks, forks and branches.
    # Forks of one list have one length and one depth, so that none needs pads, which would change its state.
    forks: list[list[tuple[int, int, int]]] = field(init=False)
    branches: list[tuple[int, int, int]] = field(init=False)
    tokens: int = field(init=False)  # T
    _rows_of_width: dict[int, tuple[_Gather, _Gather]] = field(default_factory=dict, init=False)  # of `convolved`

    def __post_init__(self) -> None:
        nodes = _find_nodes(self.segment_lengths)
        self.tokens = nodes[-1][1]
        parents, depths = {parent for *_, parent in nodes}, list[int]()
        for *_, parent in nodes:
            depths.append(0 if parent < 0 else depths[parent] + 1)

        def kind(n: int) -> tuple[int, int, int]:
            start, stop, parent = nodes[n]
            return (0, 0, 0) if parent < 0 else (1, depths[n], stop - start) if n in parents else (2, 0, 0)

        order = sorted(range(len(nodes)), key=kind)
        number = {n: i for i, n in enumerate(order)}
        groups = [
            [(*nodes[n][:2], number.get(nodes[n][2], -1)) for n in group] for _, group in itertools.groupby(order, kind)
        ]
        self.trunks = [node[:2] for node in groups.pop(0)]
        self.branches = groups.pop() if groups else []
        self.forks = groups

    @functools.cached_property
    def trunk_tokens(self) -> _Gather:
        """Tokens of the trunks, with zeros before them."""
        return self._gather([range(*trunk) for trunk in self.trunks], pads_first=True)

    @functools.cached_property
    def branch_tokens(self) -> _Gather:
        """Tokens of the branches, with zeros behind them."""
        return self._gather([range(start, stop) for start, stop, _ in self.branches])

    @functools.cached_property
    def fork_tokens(self) -> list[_Gather]:
        """Tokens of each list of forks."""
        return [self._gather([range(start, stop) for start, stop, _ in forks]) for forks in self.forks]

    @functools.cached_property
    def sequence_tokens(self) -> _Gather:
        """Tokens of the trunks, and of the branches behind their ancestors, with zeros behind them."""
        paths = self._paths()
        return self._gather([*paths[: len(self.trunks)], *paths[len(paths) - len(self.branches) :]])

    @functools.cached_property
    def starts(self) -> list[_Gather]:
        """The parent of every fork of each list, and of every branch: a (1, nodes) batch each."""
        found, count = [], len(self.trunks)
        for nodes in (*self.forks, self.branches):
            found.append(_Gather.of(np.array([[parent for *_, parent in nodes]]), count, self.device))
            count += len(nodes)
        return found

    @functools.cached_property
    def forked_places(self) -> _Gather:
        """Place of every token among the outputs of trunks, forks and branches, a (1, T) batch."""
        branches = [*self.fork_tokens, self.branch_tokens] if self.branches else []
        return self._places([self.trunk_tokens, *branches])

    @functools.cached_property
    def sequence_places(self) -> _Gather:
        """Place of every token among the outputs of the whole sequences; of a trunk's token, in the trunk."""
        return self._places([self.sequence_tokens])

    def convolved(self, width: int) -> tuple[_Gather, _Gather]:
        """Returns the row a convolution runs on, (1, T'), and the place of every token in it, (1, T).

        Each trunk follows ``width - 1`` zeros there, and each other node the tokens before it.
        """
        if width not in self._rows_of_width:
            before = [self.tokens] * (width - 1)
            lengths = [stop - start for start, stop, *_ in self._nodes()]
            pieces = [[*before, *path][-length - width + 1 :] for path, length in zip(self._paths(), lengths)]
            row = np.concatenate(pieces)
            own = np.concatenate([np.arange(len(piece)) >= width - 1 for piece in pieces])
            places = np.empty(self.tokens, np.int64)
            places[row[own]] = np.flatnonzero(own)
            self._rows_of_width[width] = (
                _Gather.of(row[None], self.tokens, self.device),
                _Gather.of(places[None], len(row), self.device),
            )
        return self._rows_of_width[width]

    def _nodes(self) -> list[tuple[int, int, int]]:
        trunks = [(*trunk, -1) for trunk in self.trunks]
        return [*trunks, *itertools.chain.from_iterable(self.forks), *self.branches]

    def _paths(self) -> list[list[int]]:
        """Returns the tokens of every node behind those of its ancestors."""
        paths: list[list[int]] = []
        for start, stop, parent in self._nodes():
            paths.append([*(paths[parent] if parent >= 0 else ()), *range(start, stop)])
        return paths

    def _gather(self, pieces: Sequence[Sequence[int]], pads_first: bool = False) -> _Gather:
        longest = max(map(len, pieces))
        places = np.full((len(pieces), longest), self.tokens)
        for row, piece in zip(places, pieces):
            row[longest - len(piece) if pads_first else 0 :][: len(piece)] = piece
        return _Gather.of(places, self.tokens, self.device)

    def _places(self, gathers: Sequence[_Gather]) -> _Gather:
        row = np.concatenate([gather.places.reshape(-1) for gather in gathers])
        places = np.empty(self.tokens + 1, np.int64)
        places[row[::-1]] = np.arange(len(row))[::-1]  # the first of several places stays
        return _Gather.of(places[None, :-1], len(row), self.device)


del StateLayout.__dataclass_fields__  # FSDP2 would copy a dataclass among the inputs of every layer


def _find_nodes(segment_lengths: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Returns (start, stop, parent) of the nodes in the order of the row; the parent of a trunk is -1."""
    ends: list[set[int]] = []  # of each segment, the lengths of its path at which nodes end
    parents: list[tuple[int, int]] = []  # of each segment, (segment, length of its path) where it begins
    path: list[tuple[int, int]] = []  # (segment, tokens of the path before it) that the current path goes through
    for segment, (queries, keys) in enumerate(segment_lengths):
        shared = keys - queries
        while path and path[-1][1] >= shared:
            path.pop()
        parents.append((path[-1][0], shared) if path else (-1, 0))
        if path:
            ends[path[-1][0]].add(shared)
        ends.append({keys})
        path.append((segment, shared))
    nodes: list[tuple[int, int, int]] = []
    number = {(-1, 0): -1}
    row = 0  # token at which the segment begins
    for segment, (queries, keys) in enumerate(segment_lengths):
        start, parent = keys - queries, number[parents[segment]]
        for end in sorted(ends[segment]):
            number[segment, end] = len(nodes)
            nodes.append((row, row + end - start, parent))
            row, start, parent = row + end - start, end, len(nodes) - 1
    return nodes


# The layout of the packed row that the layer at hand runs on, and of the one that the model runs on.
_layout: ContextVar[StateLayout | None] = ContextVar("state_layout", default=None)
_row: ContextVar[StateLayout | None] = ContextVar("state_row", default=None)


def state_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a model whose convolutions and recurrences can run on packed rows."""
    return [module for module in model.modules() if _functions_of(type(module)) & {*_RECURRENCES, _CONVOLUTION}]


def prepare_state_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Makes a model's state-carrying layers run the packed row of :func:`state_row`, and returns them."""
    layers = state_layers(model)
    for layer in layers:
        module = sys.modules[inspect.unwrap(type(layer).forward).__module__]
        for name in _functions_of(type(layer)):
            function = getattr(module, name)
            if not hasattr(function, "outside_packed_rows"):
                setattr(module, name, _wrapped(name, function))
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and state_layers(m)]
    for kind in {type(block) for block in blocks}:
        _hand_layout_on(kind)
    inside = {id(layer) for block in blocks for layer in block.modules()}
    for layer in layers:
        if id(layer) not in inside and _before_layer not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
            layer.register_forward_hook(_behind_layer, always_call=True)
    return layers


@contextlib.contextmanager
def state_row(layout: StateLayout) -> Iterator[None]:
    """Context of a model's forward on a packed row of this layout, which the model gets as ``state_layout``, too."""
    token = _row.set(layout)
    try:
        yield
    finally:
        _row.reset(token)


def _hand_layout_on(block: type[nn.Module]) -> None:
    """Makes blocks of a class set the layout for the state-carrying layers in them, also when they are recomputed.

    Mamba's model hands no keywords on to its blocks, and Jamba's blocks hand none on to these layers.
    """
    call, forward = block.__call__, block.forward
    if hasattr(forward, "hands_layout_on"):
        return

    @functools.wraps(call)
    def given_layout(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Inside a block that is recomputed, only that block's own layout is set.
        if (layout := _row.get() or _layout.get()) is not None:
            kwargs["state_layout"] = layout  # activation checkpointing keeps the keywords of a block
        return call(self, *args, **kwargs)

    @functools.wraps(forward)
    def handing_on(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = _enter(kwargs.pop("state_layout", None))
        try:
            return forward(self, *args, **kwargs)
        finally:
            _leave(before)

    handing_on.hands_layout_on = True
    block.__call__, block.forward = given_layout, handing_on
    super(block, block).__init_subclass__()  # transformers' checkpointing wraps the forward


def unpackable_layers(model: PreTrainedModel) -> set[str]:
    """Returns the kinds of layers, as the config names them, that a packed row does not support.

    A short probe does not show attention in chunks, which are longer, and hardly a state if weights are small. So a
    layer of another kind than attention must have a recurrence that is known here, or be a convolution alone.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    functions = {getattr(layer, "layer_idx", None): _functions_of(type(layer)) for layer in state_layers(model)}
    unsupported = {
        kind
        for layer, kind in enumerate(kinds)
        if not functions.get(layer, frozenset()) & ({_CONVOLUTION} if kind == "conv" else _RECURRENCES.keys())
    }
    stateful = {"stateful layers"} if getattr(model, "_is_stateful", False) and not functions else set()
    return unsupported - {"full_attention", "sliding_attention", "mlp", "moe"} | stateful


def leave_out_of_graphs(model: nn.Module) -> None:
    """Makes torch.compile interrupt its graphs once at each state layer, not at each function inside."""
    for kind in {type(layer) for layer in state_layers(model)}:
        if not hasattr(kind.forward, "outside_graphs"):
            kind.forward = torch.compiler.disable(kind.forward)
            kind.forward.outside_graphs = True


@functools.cache
def _functions_of(layer: type[nn.Module]) -> frozenset[str]:
    """Names of the functions in ``_WRAPPED`` that a layer's forward calls."""
    return frozenset(inspect.unwrap(layer.forward).__code__.co_names) & _WRAPPED


@torch.compiler.disable
def _enter(layout: StateLayout | None) -> StateLayout | None:
    """Sets the layout of the layers that follow, None to keep it, and returns the one before."""
    before = _layout.get()
    layout = before if layout is None else layout
    assert layout is not None or not in_packed_forward()
    _layout.set(layout)
    return before


@torch.compiler.disable
def _leave(before: StateLayout | None) -> None:
    _layout.set(before)


def _before_layer(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _enter(kwargs.get("state_layout"))


def _behind_layer(layer: nn.Module, args: Any, output: Any) -> None:
    _leave(None)


def _wrapped(name: str, own: Callable) -> Callable:
    """Returns a function of transformers that also runs packed rows."""

    @torch.compiler.disable
    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        layout = _layout.get()
        if layout is None:
            return own(*args, **kwargs)
        if name in _WHOLE_LAYERS:
            return None
        if name == _CONVOLUTION:
            return _convolve(layout, own, args, kwargs)
        return _recur(layout, _RECURRENCES[name], own, args, kwargs)

    function.outside_packed_rows = own
    return function


def _convolve(layout: StateLayout, own: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Runs a causal convolution of width w, whose arguments are ``hidden_states`` (1, C, T), ``weight`` (C, w), ..."""
    hidden_states, *others = args
    weight = others[0] if others else kwargs["weight"]
    to_row, places = layout.convolved(weight.shape[-1])
    convolved = own(to_row(hidden_states[0].T).transpose(1, 2).contiguous(), *others, **kwargs)
    return places(convolved[0].T).transpose(1, 2)


def _recur(
    layout: StateLayout, recurrence: Recurrence, own: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Runs a recurrence over the trunks, and then over forks and branches from the states behind their parents."""
    names = list(inspect.signature(own).parameters)
    given = dict(zip(names, args)) | kwargs

    def run(tokens: _Gather, **states: Any) -> tuple[Tensor, Tensor | None]:
        batch = dict(given)
        for name in recurrence.sequences:
            if batch.get(name) is not None:
                rows = batch[name].movedim(recurrence.time, 1)[0]
                batch[name] = tokens(rows).movedim(1, recurrence.time)
        batch |= states
        positional = [batch.pop(name) for name in names[: len(args)]]  # a kernel's names may differ from transformers'
        result = own(*positional, **batch)
        outputs, state = result if isinstance(result, tuple) else (result, None)
        return outputs.movedim(recurrence.time, 1).flatten(0, 1), state

    if recurrence.initial_state is None:
        outputs, _ = run(layout.sequence_tokens)
        places = layout.sequence_places
    else:
        outputs, states = run(layout.trunk_tokens, **{recurrence.final_state: bool(layout.branches)})
        if layout.branches:
            *forks, branches = layout.starts
            parts = [outputs]
            for tokens, starts in zip(layout.fork_tokens, forks):
                begin = {recurrence.initial_state: starts(states)[0], recurrence.final_state: True}
                outputs, behind = run(tokens, **begin)
                states = torch.cat([states, behind])
                parts.append(outputs)
            begin = {recurrence.initial_state: branches(states)[0], recurrence.final_state: False}
            outputs = torch.cat([*parts, run(layout.branch_tokens, **begin)[0]])
        places = layout.forked_places
    result = places(outputs).movedim(1, recurrence.time)
    return (result, None) if recurrence.returns_pair else result
