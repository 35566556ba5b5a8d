"""Which accesses of a launch are ordered, by barriers and atomic variables, whatever the schedule of the threads.

Each thread has an epoch, and a vector clock over its peers, the threads that it can wait for: those of its cluster, or
of the whole grid of a cooperative launch. An access of thread t in epoch e happens before the next instruction of its
peer u if ``seen[u, t] > e``, where t counts from the first of its peers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .program import PtxError


@dataclass(frozen=True)
class Launch:
    """Sizes of a launch."""

    blocks: int
    threads: int  # of a block, a multiple of 32
    shared_bytes: int
    cluster: int = 1  # blocks of a cluster
    cooperative: bool = False  # blocks may wait for each other

    def describe(self, thread: int) -> str:
        return f"thread {thread % self.threads} of block {thread // self.threads}"


class Order:
    """Epochs and clocks of all threads, and the state of the clusters' barriers."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.peers = launch.threads * (launch.blocks if launch.cooperative else launch.cluster)
        count, self.size = launch.threads * launch.blocks, launch.threads * launch.cluster  # of a cluster
        self.epoch = np.zeros(count, np.int64)
        self.seen = np.zeros((count, self.peers), np.int32)
        self.published: dict[int, np.ndarray] = {}  # address of an atomic variable -> clock of what was released there
        # Arrivals and waits of each thread at its cluster's barrier, its clock at the last arrival, and the joint clock
        # of each cluster's threads at the arrivals of the last complete phase.
        self.arrivals, self.waits = np.zeros((2, count), np.int64)
        self.arriving = np.zeros((count, self.peers), np.int32)
        self.arrived = np.zeros((count // self.size, self.peers), np.int32)
        self.remote: list[tuple[int, int, int]] = []  # (block, thread of another one that accesses it, its epoch)

    def stamps(self, threads: np.ndarray) -> np.ndarray:
        """Returns what memory remembers of an access by ``threads``: (thread + 1) << 32 | epoch."""
        return (threads + 1) << 32 | self.epoch[threads]

    def after(self, stamps: np.ndarray, by: np.ndarray) -> np.ndarray:
        """Returns whether the accesses happened before the next instruction of ``by``. Stamp 0 stands for no access."""
        thread = np.maximum((stamps >> 32) - 1, 0)
        seen = self.seen[by, thread % self.peers] > (stamps & 0xFFFFFFFF)
        return (stamps == 0) | (thread == by) | (seen & (thread // self.peers == by // self.peers))

    def release(self, threads: np.ndarray) -> np.ndarray:
        """Ends an epoch of ``threads``; returns the joint clock of all that happened before, if they are peers."""
        self.epoch[threads] += 1
        self.seen[threads, threads % self.peers] = self.epoch[threads]
        return self.seen[threads].max(0)

    def acquire(self, threads: np.ndarray, clock: np.ndarray) -> None:
        """Orders all that ``clock`` (of peers, or of each thread) knows of before the threads' next instruction."""
        self.seen[threads] = np.maximum(self.seen[threads], clock)

    def atomic(self, threads: np.ndarray, address: int, release: bool) -> None:
        """An atomic access releases what its thread did before, or acquires what others released at this address."""
        if not self.launch.cooperative:
            raise PtxError("atomic accesses between blocks that may not run at the same time")
        published = self.published.setdefault(address, np.zeros(self.peers, np.int32))
        if release:
            np.maximum(published, self.release(threads), out=published)
        else:
            self.acquire(threads, published)

    def arrive(self, threads: np.ndarray, release: bool) -> np.ndarray:
        """Counts arrivals at the clusters' barriers; returns all threads of the clusters whose phase they complete."""
        if (self.arrivals[threads] != self.waits[threads]).any():
            raise PtxError("a thread arrives twice at its cluster's barrier")
        self.arrivals[threads] += 1
        if release:
            self.release(threads)
            self.arriving[threads] = self.seen[threads]
        clusters = np.unique(threads // self.size)
        complete = clusters[np.ptp(self.arrivals.reshape(-1, self.size)[clusters], axis=1) == 0]
        self.arrived[complete] = self.arriving.reshape(-1, self.size, self.peers)[complete].max(1)
        return (complete[:, None] * self.size + np.arange(self.size)).ravel()

    def wait(self, threads: np.ndarray) -> np.ndarray:
        """Returns which threads need not wait for their cluster's barrier any more, because its phase is complete."""
        if (self.arrivals[threads] == self.waits[threads]).any():
            raise PtxError("a thread waits for its cluster's barrier without an arrival")
        complete = self.arrivals.reshape(-1, self.size).min(1)[threads // self.size] >= self.arrivals[threads]
        self.acquire(threads[complete], self.arrived[threads[complete] // self.size])
        self.waits[threads[complete]] += 1
        return complete

    def check_lifetimes(self) -> None:
        """Raises PtxError if a block may have left while a thread of another block accesses its shared memory."""
        for block, thread, epoch in self.remote:
            members = slice(block * self.launch.threads, (block + 1) * self.launch.threads)
            if (self.seen[members, thread % self.peers] <= epoch).all():
                raise PtxError(f"block {block} may have left before {self.launch.describe(thread)} accesses its memory")
