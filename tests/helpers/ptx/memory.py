"""Memory of a launch: checks of bounds, alignment, initialisation and order of accesses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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
    racy_reads: bool = False  # reads need not come before other threads' writes


class Accesses(NamedTuple):
    """What some threads access at once: of each thread its bytes, as indices into memory, and the range around them."""

    bytes: np.ndarray  # (threads, size)
    ranges: np.ndarray  # (threads,)
    threads: np.ndarray  # (threads,)


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
        self.writable, self.racy = np.array([(r.writable, r.racy_reads) for r in self.ranges]).T
        self.owner = np.where(self.spaces == "shared", (self.starts.astype(np.int64) - SHARED) // SHARED_STRIDE, -1)
        self.bytes = np.zeros(self.first[-1], np.uint8)
        self.initialised = np.repeat([r.readable for r in self.ranges], self.sizes)
        self.written, self.read = np.zeros((2, self.first[-1]), np.int64)  # stamps; 0 for no access
        self.there = [slice(first, first + r.size) for r, first in zip(self.ranges, self.first)]
        for r, there in zip(self.ranges, self.there):
            if r.readable:
                self.bytes[there] = np.frombuffer(ctypes.string_at(r.start, r.size), np.uint8)

    def require(self, good: np.ndarray, threads: np.ndarray, problem: Callable[[int], str]) -> None:
        """Raises PtxError for the first access, i, that is not good; ``problem(i)`` says what its thread does."""
        if not good.all():
            i = int(good.argmin())
            raise PtxError(f"{self.order.launch.describe(threads[i])} {problem(i)}")

    def locate(self, address: np.ndarray, size: int, space: str, threads: np.ndarray) -> Accesses:
        """Finds ``size`` bytes at each thread's address; they must be aligned and in one range of ``space``."""
        which = np.searchsorted(self.starts, address, side="right") - 1
        offset = (address - self.starts[which]).astype(np.int64)
        near = lambda i: f"at byte {offset[i]} of {self.ranges[which[i]].name} ({self.sizes[which[i]]} bytes)"  # noqa: E731
        aligned = address % np.uint64(size) == 0
        self.require(aligned, threads, lambda i: f"accesses {size} bytes at the misaligned address {address[i]:#x}")
        inside = (which >= 0) & (offset + size <= self.sizes[which])
        self.require(inside, threads, lambda i: f"accesses {size} bytes out of bounds, {near(i)}")
        there = (self.spaces[which] == space) | (space == "generic")
        self.require(there, threads, lambda i: f"accesses memory that is not .{space}, {near(i)}")
        # Other blocks must not leave before their shared memory is accessed.
        owner = self.owner[which]
        remote = (owner >= 0) & (owner != threads // self.order.launch.threads)
        self.order.remote += zip(owner[remote], threads[remote], self.order.epoch[threads[remote]])
        return Accesses((self.first[which] + offset)[:, None] + np.arange(size), which, threads)

    def load(self, accesses: Accesses, atomic: bool = False) -> np.ndarray:
        """Returns the bytes, (threads, size) uint8."""
        index, which, threads = accesses
        unwritten = lambda i: f"reads bytes of {self.ranges[which[i]].name} that nothing has been written to"  # noqa: E731
        self.require(self.initialised[index].all(1), threads, unwritten)
        if not atomic and self.writable[which].any():
            self.check_order(self.written[index], "reads", "wrote", accesses)
            self.read[index] = self.order.stamps(threads)[:, None]
        return self.bytes[index]

    def check_write(self, accesses: Accesses) -> None:
        index, which, threads = accesses
        self.require(self.writable[which], threads, lambda i: f"writes to read-only {self.ranges[which[i]].name}")
        self.check_order(self.written[index], "writes", "wrote", accesses)
        self.check_order(np.where(self.racy[which, None], 0, self.read[index]), "writes", "read", accesses)

    def store(self, accesses: Accesses, values: np.ndarray, atomic: bool = False) -> None:
        """Writes ``values``, (threads, size) uint8."""
        index, _, threads = accesses
        if not atomic:
            self.check_write(accesses)
        stamps = self.order.stamps(threads)[:, None]
        self.bytes[index], self.initialised[index], self.written[index] = values, True, stamps
        kept = (self.bytes[index] == values).all(1)
        self.require(kept, threads, lambda i: "and another thread write different values to a byte at once")

    def check_order(self, earlier: np.ndarray, does: str, did: str, accesses: Accesses) -> None:
        """Raises PtxError if an access does not come after the ``earlier`` ones, (threads, size) stamps."""
        after = self.order.after(earlier, accesses.threads[:, None])

        def race(i: int) -> str:
            other = self.order.launch.describe((earlier[i, after[i].argmin()] >> 32) - 1)
            return f"{does} {self.ranges[accesses.ranges[i]].name} where {other} {did}, and no barrier lies between"

        self.require(after.all(1), accesses.threads, race)

    def copy_back(self) -> None:
        """Writes what the kernel wrote to global memory to the host's memory."""
        for r, there in zip(self.ranges, self.there):
            if r.space == "global" and r.writable:
                host = np.frombuffer((ctypes.c_ubyte * r.size).from_address(r.start), np.uint8)
                np.copyto(host, self.bytes[there], where=self.initialised[there])
