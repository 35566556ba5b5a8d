"""Counts the bytes that operators, compiled graphs and Triton's launches move, without a GPU.

A dispatch mode sees PyTorch's operators. It does not see into compiled graphs and launches of Triton, so these are
counted where they are made: a graph by the kernels that Inductor schedules for it, a launch by its arguments.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, fx
from torch._dynamo import register_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BACKEND = "count_bytes"  # the name of the backend of torch.compile that counts
# Matrix products, which have times of their own, and what allocates without touching memory.
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mkldnn_linear_pointwise"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operators that read as much of their first argument as they write.
_GATHERS = {"index_select", "index", "gather", "embedding"}
_OVERWRITING = {"copy_", "zero_", "fill_"}  # that do not read what they overwrite

_active: list[Traffic] = []


class Traffic(TorchDispatchMode):
    """Counts the bytes that are read and written inside, beside matrix products, by operator.

    An operator moves its arguments and its results once. Views and allocations move nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self._suspended = 0

    @property
    def total(self) -> int:
        """All bytes so far."""
        return self.by_operator.total()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Context whose operators are not counted."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets torch.compile compile inside, which it refuses to do in other dispatch modes."""
        return True

    def __enter__(self):
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _active.remove(self)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not self._suspended and name not in _PRODUCTS | _ALLOCATIONS:
            self.by_operator[name] += _moved(func, name, args, kwargs, out)
        return out


def _moved(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> int:
    """Returns the bytes that a call of an operator reads and writes."""
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if not func._schema.is_mutable:
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        if inputs and all(x.untyped_storage().data_ptr() in storages for x in outputs):
            return 0  # a view, or a copy to the dtype that the tensor has
    reads = inputs[1:] + outputs[:1] if name in _GATHERS else inputs
    if name in _OVERWRITING:
        reads = inputs[1:]
    return sum(map(_bytes, {id(x): x for x in reads}.values())) + sum(map(_bytes, outputs))


def _bytes(x: Tensor) -> int:
    """Returns the bytes of the elements of a tensor that lie at different places."""
    numel = 1
    for size, stride in zip(x.shape, x.stride()):
        numel *= size if stride or not size else 1
    return numel * x.element_size()


# --- Launches of Triton ---


@contextlib.contextmanager
def counted_launches(traffic: Traffic) -> Iterator[None]:
    """Context in which launches of Triton's kernels are counted and not run, so that their results are undefined."""
    from triton.runtime.jit import JITFunction

    def run(kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        given = inspect.signature(kernel.fn).bind_partial(
            *args, **{k: kwargs[k] for k in kernel.arg_names if k in kwargs}
        )
        accesses = _pointer_accesses(kernel)
        for name, value in given.arguments.items():
            if isinstance(value, Tensor):
                traffic.by_operator[kernel.fn.__name__] += accesses[name] * _bytes(value)

    own = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = own


def _pointer_accesses(kernel: Any) -> Counter[str]:
    """Returns how often a kernel goes over each of its pointers: 1 if it loads or stores, 2 if it does both.

    Pointers are followed through assignments, by name.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    roots = {name: {name} for name in kernel.arg_names}

    def names(node: ast.AST) -> set[str]:
        return set().union(*(roots.get(n.id, set()) for n in ast.walk(node) if isinstance(n, ast.Name)))

    found: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            calls = {getattr(n.func, "attr", "") for n in ast.walk(node.value) if isinstance(n, ast.Call)}
            if "load" not in calls:
                roots[node.targets[0].id] = roots.get(node.targets[0].id, set()) | names(node.value)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("load", "store"):
            found |= {(node.func.attr, name) for name in names(node.args[0])}
    return Counter(name for _, name in found)


# --- Compiled graphs ---


@register_backend(name=BACKEND)
def count_bytes(graph: fx.GraphModule, inputs: list, **_: Any) -> Callable:
    """A backend of torch.compile whose graphs add their bytes to the active :class:`Traffic` in every call.

    Graphs are cut, fused and scheduled as Inductor does for Triton; they run in eager mode.
    """
    from torch._inductor.compile_fx import compile_fx

    with torch._inductor.config.patch(cpu_backend="triton"):
        return compile_fx(graph, inputs, inner_compile=_compile_graph)


def _compile_graph(graph: fx.GraphModule, inputs: list, **_: Any) -> Callable:
    moved = scheduled_bytes(graph, inputs)
    # Symbol -> an input that is that length, or has it as a dimension, and the length now.
    lengths: dict[Any, tuple[int, int | None, int]] = {}
    for place, x in enumerate(inputs):
        for dimension, size in enumerate(x.shape) if isinstance(x, Tensor) else [(None, x)]:
            if isinstance(size, torch.SymInt):
                lengths[size.node.expr] = lengths[size.node._expr] = (place, dimension, size.node.hint)

    def run(values: list) -> Any:
        now: Counter[str] = Counter()
        for (name, symbols), count in moved.items():
            for place, dimension, hint in (lengths[symbol] for symbol in symbols):
                count *= (values[place] if dimension is None else values[place].shape[dimension]) / hint
            now[name] += round(count)
        with contextlib.ExitStack() as stack:
            for traffic in _active:
                traffic.by_operator.update(now)
                stack.enter_context(traffic.suspended())
            return fx.Interpreter(graph).boxed_run(values)

    run._boxed_call = True
    return run


def scheduled_bytes(graph: fx.GraphModule, inputs: list) -> Counter[tuple[str, frozenset]]:
    """Returns the bytes that the kernels of a graph move, beside matrix products, as Inductor schedules them.

    They are counted by the kind of kernel, and by the symbols of lengths to which a tensor's size is proportional.
    """
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode
    from torch._inductor.virtualized import V

    found: Counter[tuple[str, frozenset]] = Counter()
    compile_fx.view_to_reshape(graph)
    mode = compile_fx.fake_tensor_prop(graph, inputs)
    with V.set_fake_mode(mode), DebugContext(), V.set_debug_handler(DebugContext()):
        compile_fx._recursive_post_grad_passes(graph)
        compile_fx.record_original_output_strides(graph)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering._update_scheduler()
            for node in lowering.scheduler.nodes:
                name = "fused"
                if isinstance(node, ExternKernelSchedulerNode):
                    name = str(getattr(node.node, "python_kernel_name", None) or node.node.op_overload)
                    if name.removeprefix("extern_kernels.") in _PRODUCTS:
                        continue
                accesses = node.get_read_write_buffer_accesses(True, True)
                symbols = {buffer: _symbols(lowering, buffer) for buffer in accesses}
                whole = frozenset().union(*filter(None, symbols.values()))
                for buffer, moved in accesses.items():
                    own = symbols[buffer]
                    found[f"compiled: {name}", whole if own is None else own] += moved
    return found


def _symbols(lowering: Any, buffer: str) -> frozenset | None:
    """Returns the symbols of lengths in a tensor's size; None for the results of an operator that has several."""
    from torch._inductor.ir import MultiOutputLayout

    tensor = lowering.name_to_buffer.get(buffer) or lowering.graph_inputs[buffer]
    if isinstance(getattr(tensor, "layout", None), MultiOutputLayout):
        return None
    return frozenset().union(*(size.free_symbols for size in tensor.get_size()))
