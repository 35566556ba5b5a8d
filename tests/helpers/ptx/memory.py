"""Memory of a launch: checks of bounds, alignment, initialisation and order of accesses."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from .order import Order
from .program import PtxError

SHARED = 1 << 62  # generic addresses of shared memory: SHARED + block * SHARED_STRIDE + offset
SHARED_STRIDE = 1 << 24


class Range(NamedTuple):
    """Consecutive bytes that a kernel may access. Addresses are those of the host, but for shared memory."""

    name: str
    start: int
    size: int
    space: str = "global"
    readable: bool = True  # holds values at the start
    writable: bool = False


class Memory:
    """All ranges, their bytes one after another in an array.

    A byte remembers whether it is initialised, its last write and its last read. A write and an earlier access by
    another thread, or a read and an earlier write, must be ordered. Only the last read of a byte is remembered, so a
    write is compared with one of the earlier reads. Atomic accesses need no order.
    """

    def __init__(self, ranges: list[Range], order: Order):
        self.ranges, self.order = sorted(set(ranges), key=lambda r: r.start), order
        self.starts = np.array([r.start for r in self.ranges], np.uint64)
        self.sizes = np.array([r.size for r in self.ranges], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        if (self.starts[:-1] + self.sizes[:-1].astype(np.uint64) > self.starts[1:]).any():
            raise PtxError(f"ranges of memory overlap: {self.ranges}")
        self.spaces = np.array([r.space for r in self.ranges])
        self.writable = np.array([r.writable for r in self.ranges])
        total = int(self.first[-1])
        self.bytes = np.zeros(total, np.uint8)
        self.initialised = np.zeros(total, bool)
        self.written, self.read = np.zeros(total, np.int64), np.zeros(total, np.int64)  # stamps; 0 for no access
        for r, first in zip(self.ranges, self.first):
            if r.readable:
                self.bytes[first : first + r.size] = np.frombuffer(ctypes.string_at(r.start, r.size), np.uint8)
            self.initialised[first : first + r.size] = r.readable

    def fail(self, thread: int, problem: str) -> None:
        raise PtxError(f"{self.order.launch.describe(thread)} {problem}")

    def locate(self, address: np.ndarray, size: int, space: str, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the index of each accessed byte, (threads, size), and the range of each access.

        Raises PtxError for an access that is misaligned, outside of all ranges, or in another space than ``space``.
        """
        if (wrong := address % np.uint64(size) != 0).any():
            i = wrong.argmax()
            self.fail(threads[i], f"accesses {size} bytes at the misaligned address {address[i]:#x}")
        which = np.searchsorted(self.starts, address, side="right") - 1
        offset = (address - self.starts[which]).astype(np.int64)
        inside = (which >= 0) & (offset + size <= self.sizes[which])
        if not inside.all():
            i = (~inside).argmax()
            near = self.ranges[max(which[i], 0)]
            where = f"at byte {int(address[i]) - near.start} of {near.name} ({near.size} bytes)"
            self.fail(threads[i], f"accesses {size} bytes out of bounds, {where}")
        if space != "generic" and (wrong := self.spaces[which] != space).any():
            i = wrong.argmax()
            self.fail(threads[i], f"accesses {self.ranges[which[i]].name} as .{space}")
        return (self.first[which] + offset)[:, None] + np.arange(size), which

    def load(self, address, size: int, space: str, threads: np.ndarray, atomic: bool) -> np.ndarray:
        """Returns the bytes at each thread's address, (threads, size) uint8."""
        index, which = self.locate(address, size, space, threads)
        self.check_read(index, which, threads, atomic)
        return self.bytes[index]

    def check_read(self, index, which, threads, atomic: bool = False) -> None:
        if not (initialised := self.initialised[index].all(1)).all():
            i = (~initialised).argmax()
            self.fail(threads[i], f"reads bytes of {self.ranges[which[i]].name} that nothing has been written to")
        if not atomic and self.writable[which].any():
            self.check_order(self.written[index], "reads", "wrote", which, threads)
            self.read[index] = self.order.stamps(threads)[:, None]

    def store(self, address, values: np.ndarray, space: str, threads: np.ndarray, atomic: bool) -> None:
        """Writes ``values``, (threads, size) uint8."""
        index, which = self.locate(address, values.shape[1], space, threads)
        if atomic:
            self.bytes[index] = values
        else:
            self.check_write(index, which, threads)
            self.write(index, values, threads)

    def check_write(self, index, which, threads) -> None:
        if not (writable := self.writable[which]).all():
            i = (~writable).argmax()
            self.fail(threads[i], f"writes to {self.ranges[which[i]].name}, which is read-only")
        self.check_order(self.written[index], "writes", "wrote", which, threads)
        self.check_order(self.read[index], "writes", "read", which, threads)

    def write(self, index, values, threads) -> None:
        stamps = self.order.stamps(threads)[:, None]
        self.bytes[index], self.initialised[index], self.written[index] = values, True, stamps
        if (lost := (self.written[index] != stamps).any(1)).any():
            self.fail(threads[lost.argmax()], "and another thread write to the same byte at once")

    def check_order(self, earlier: np.ndarray, does: str, did: str, which, threads) -> None:
        """Raises PtxError if an access does not come after the ``earlier`` ones, (threads, size) stamps."""
        if not (after := self.order.after(earlier, threads[:, None])).all():
            i, byte = np.argwhere(~after)[0]
            other = self.order.launch.describe((earlier[i, byte] >> 32) - 1)
            name = self.ranges[which[i]].name
            self.fail(threads[i], f"{does} {name} where {other} {did}, and no barrier lies between")

    def copy_back(self) -> None:
        """Writes what the kernel wrote to global memory to the host's memory."""
        for r, first in zip(self.ranges, self.first):
            if r.space == "global" and r.writable:
                ok = self.initialised[first : first + r.size]
                host = np.frombuffer((ctypes.c_ubyte * r.size).from_address(r.start), np.uint8)
                host[ok] = self.bytes[first : first + r.size][ok]
