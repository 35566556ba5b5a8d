"""Bytes that operators read and write of large tensors, counted as they run."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WRITE_ONLY = ("zero_", "fill_", "copy_")  # in-place operators that do not read what they overwrite


class CountBytes(TorchDispatchMode):
    """Counts the bytes read from and written to tensors whose storage is larger than a cache.

    A block that fits the cache counts once while consecutive operators use it.

    Args:
        cache: bytes of the cache.
        is_counted: which tensors count.
    """

    def __init__(self, cache: int, is_counted: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.read = self.written = 0
        self._cache, self._is_counted = cache, is_counted
        self._block: tuple[int, int] | None = None
        self._written_blocks: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        schema = function._schema
        if function.is_view or "empty" in schema.name:
            return result
        writes: list[Tensor] = [] if schema.is_mutable else [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        reads: list[Tensor] = []
        for argument, value in [*zip(schema.arguments, args), *((a, kwargs.get(a.name)) for a in schema.arguments)]:
            tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written:
                writes += tensors
            if not is_written or not (argument.is_out or function._overloadpacket.__name__ in _WRITE_ONLY):
                reads += tensors
        self.read += sum(self._bytes(x) for x in reads)
        self.written += sum(self._bytes(x, True) for x in writes)
        return result

    def _bytes(self, x: Tensor, is_written: bool = False) -> int:
        storage, size = x.untyped_storage(), x.nbytes
        if storage.nbytes() <= self._cache or not self._is_counted(x):
            return 0
        block = (x.data_ptr(), size) if size <= self._cache else None
        if block != self._block:
            self._block, self._written_blocks = block, set()
        elif block is not None and not is_written:
            return 0
        if block is not None and is_written:
            if block in self._written_blocks:
                return 0
            self._written_blocks.add(block)
        return size
