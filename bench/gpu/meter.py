"""Shared by all parts of ``gpu_check``: report rows that record failures, and timing with a cold cache."""

from __future__ import annotations

import functools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..timing import MIB, summarize

Row = dict[str, Any]  # "what", "result" and measurements; "failed" holds a traceback, "skipped" a reason

_LEAST, _MOST = 5, 30  # limits of the rounds of a measurement
_LONGEST_SPIN = 0.1  # seconds
_SUSTAINED = 1.0  # seconds of matrix products without a pause


@dataclass
class Context:
    """The device of a part, and its deadline."""

    device: str
    tiny: bool  # use shapes that a CPU runs in an instant
    deadline: float  # as time.monotonic()
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def attempt(
        self, what: str, work: Callable[[], Row | None], seconds: float = 2.0, peer: bool = False
    ) -> Iterator[Row]:
        """Yields one row: the result of ``work``, its traceback if it failed, or that there was no time for it.

        A ``peer`` that is not installed or runs out of memory is not a failure. A tiny run has time for every row.
        """
        if not self.tiny and self.left < seconds:
            yield {"what": what, "skipped": f"no time left ({max(self.left, 0):.0f} s)"}
            return
        try:
            found = work() or {}
        except Exception as error:  # records the traceback and goes on with the next row
            if peer and isinstance(error, ModuleNotFoundError):
                found = {"result": f"not installed: {error.name}"}
            elif peer and isinstance(error, torch.cuda.OutOfMemoryError):
                found = {"result": "out of memory"}
            else:
                found = {"failed": traceback.format_exc()}
            del error  # its frames hold tensors
            free_memory()
        yield {"what": what, **found}


def free_memory() -> None:
    """Returns unused memory to the device, so that the next contestant can use all of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure(run: Callable[[], Any], context: Context, seconds: float = 3.0) -> Row:
    """Returns the median milliseconds of ``run`` with a cold L2 cache, and its peak of additional memory.

    Two runs warm up (compilation, autotuning); then as many runs as ``seconds`` allow are timed. ``host_ms`` is the
    time that the host takes to issue one run.
    """
    if context.device == "cpu":
        times = [1e3 * wall_seconds(run) for _ in range(3)][1:]
        return {"ms": statistics.median(times), "rounds": len(times), **_spread(times)}
    run()
    free_memory()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    once = wall_seconds(run)
    peak = torch.cuda.max_memory_allocated() - before
    rounds = max(_LEAST, min(_MOST, int(min(seconds, context.left / 2) / (once + 1e-3))))
    timer = DeviceTimer()
    times = [1e3 * timer.seconds(run) for _ in range(rounds)]
    found = {"ms": statistics.median(times), "rounds": rounds, "peak_mib": round(peak / MIB, 1), **_spread(times)}
    return found | {"host_ms": 1e3 * timer.host_seconds}


@dataclass
class DeviceTimer:
    """Times runs on the GPU, with a cold L2 cache and without the time that the host takes to issue them.

    A kernel spins in front of the start event until the host has issued the whole run. Otherwise the device would wait
    between both events for the host, which takes longer to issue a small kernel than the device to run it.
    """

    spin: float = 2e-4  # seconds
    host_seconds: float = 0.0  # of the last run

    def seconds(self, run: Callable[[], Any]) -> float:
        """Returns the seconds of one ``run``. It is repeated with a longer spin if the host took longer than the spin.

        A run in which the host waits for the device never fits; it is timed behind the longest spin.
        """
        while True:
            _cache_buffer().zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(self.spin * _cycles_per_second()))
            started = time.perf_counter()
            start.record()
            run()
            end.record()
            self.host_seconds = time.perf_counter() - started
            end.synchronize()
            if self.host_seconds < self.spin or self.spin >= _LONGEST_SPIN:
                return start.elapsed_time(end) / 1e3
            self.spin = min(2 * self.host_seconds, _LONGEST_SPIN)


@functools.cache
def _cycles_per_second() -> float:
    """Returns the rate at which the spinning kernel counts."""
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # the first launch loads the kernel
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


def wall_seconds(run: Callable[[], Any]) -> float:
    """Returns the wall time of one ``run`` in seconds; waits for the GPU, if there is one."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _spread(times: list[float]) -> Row:
    quartiles = summarize(times)
    return {"low_ms": quartiles["low"], "high_ms": quartiles["high"]}


@functools.cache
def _cache_buffer() -> torch.Tensor:
    """Returns a buffer larger than the L2 cache; writing it evicts all other data."""
    size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 128 * MIB)
    return torch.empty(size, dtype=torch.int8, device="cuda")


def kernel_microseconds(run: Callable[[], Any], repeat: int = 50) -> float:
    """Returns the device time of one ``run`` in microseconds, without launch overhead, from a replayed CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # everything must be compiled and allocated before the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1e3 / repeat


def copy_rate(context: Context) -> Iterator[Row]:
    """Measures the copy bandwidth, as bytes read and written per second."""

    def copy() -> Row:
        source = torch.ones(MIB if context.tiny else 1024 * MIB, dtype=torch.int8, device=context.device)
        target = torch.empty_like(source)
        found = measure(lambda: target.copy_(source), context, 0.5)
        context.rates["copy_gb_s"] = 2 * source.numel() / found["ms"] / 1e6
        return {"result": f"{context.rates['copy_gb_s']:.0f} GB/s", **context.rates, **found}

    yield from context.attempt("copy bandwidth", copy)


def product_rate(context: Context, rows: int, hidden: int, vocab: int) -> Iterator[Row]:
    """Measures the rate of the head's product, (rows, hidden) x (hidden, vocab), repeated for a second without a pause.

    Under this load the device reaches the clock that it can hold, which a single product does not show.
    """

    def product() -> Row:
        dtype = torch.float32 if context.tiny else torch.bfloat16
        a, b = (torch.randn(n, hidden, dtype=dtype, device=context.device) for n in (rows, vocab))
        out = torch.empty(rows, vocab, dtype=dtype, device=context.device)
        once = wall_seconds(lambda: torch.mm(a, b.t(), out=out))
        once = wall_seconds(lambda: torch.mm(a, b.t(), out=out))
        count = 2 if context.tiny else max(5, int(_SUSTAINED / once))

        def repeated() -> None:
            for _ in range(count):
                torch.mm(a, b.t(), out=out)

        rate = 2 * rows * hidden * vocab * count / wall_seconds(repeated) / 1e12
        context.rates["matmul_tflop_s"] = rate
        return {"result": f"{rate:.4g} TFLOP/s, {count} products without a pause", "matmul_tflop_s": rate}

    yield from context.attempt(f"product of {rows} x {hidden} and {hidden} x {vocab}", product)


def describe(found: Mapping[str, Any], *notes: str) -> str:
    """Formats milliseconds, memory and notes as one cell."""
    parts = [f"{found['ms']:.2f} ms"]
    if "peak_mib" in found:
        parts.append(f"{found['peak_mib']:.0f} MiB")
    return ", ".join([*parts, *filter(None, notes)])
