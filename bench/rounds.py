"""Shared parts of the operator benchmarks (head, attention): workers that run one contestant, and interleaved rounds.

A worker (:func:`serve`) answers ``size ...`` with the results and the peak memory of one run, after a warm-up run that
compiles. It answers ``run`` with the seconds of each run of one round, about 50 ms of runs. On CUDA the L2 cache is
cold, and each worker frees its unused memory, because all workers share the device.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .gpu.meter import DeviceTimer, wall_seconds
from .timing import MIB, Channel, Worker, close_all, interleave, peak_mib, reset_peak, resident_mib

REFERENCE = "reference"  # the contestant that computes the expected results and times the matrix products
_ROUND = 0.05  # seconds of runs per round

Found = dict[str, dict[str, Any]]  # contestant -> its answers, and "runs": the seconds of all its runs


class Timed(ABC):
    """A contestant at one size, which can run repeatedly."""

    def __init__(self, device: str):
        self.device = device
        self.timer = DeviceTimer()

    @abstractmethod
    def run(self) -> Any:
        """Runs the contestant once."""

    @abstractmethod
    def results(self) -> dict[str, Any]:
        """Returns numbers of the last run that are compared with the reference."""

    @abstractmethod
    def clear(self) -> None:
        """Frees the results of the last run."""

    def first(self) -> dict[str, Any]:
        """Warms up, then returns results and peak memory of one run. Sets the number of runs per round."""
        self.run()
        self.clear()
        before = self._reset_memory()
        seconds = wall_seconds(self.run)
        peak = torch.cuda.max_memory_allocated() / MIB if self.device == "cuda" else peak_mib()
        results = self.results()
        self.clear()
        self.repeats = repeats(seconds)
        return {"mib": peak - before, "results": results}

    def round(self) -> list[float]:
        """Returns the seconds of each run of one round."""
        seconds = []
        for _ in range(self.repeats):
            seconds.append(timed(self.run, self.device, self.timer))
            self.clear()
        return seconds

    def _reset_memory(self) -> float:
        """Resets the peak and returns the memory in use, in MiB."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        resident = resident_mib()
        if not reset_peak():
            raise RuntimeError(
                "this kernel cannot reset VmHWM (/proc/self/clear_refs), so the peak of one run cannot be measured"
            )
        return resident


class Products:
    """Times matrix products into allocated memory, for the roofline. Also passes the expected results on."""

    def __init__(self, device: str, results: dict[str, Any], *products: tuple[torch.Tensor, torch.Tensor]):
        self.device, self.results = device, results
        self.products = [(*operands, operands[0] @ operands[1]) for operands in products]

    def first(self) -> dict[str, Any]:
        """Returns the expected results. Sets the number of runs per round."""
        self.repeats = repeats(sum(wall_seconds(self._run(product)) for product in self.products))
        return {"results": self.results}

    def round(self) -> list[list[float]]:
        """Returns the seconds of every product, for each run of one round."""
        timer = DeviceTimer()
        return [[timed(self._run(one), self.device, timer) for one in self.products] for _ in range(self.repeats)]

    @staticmethod
    def _run(product: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Callable[[], Any]:
        a, b, out = product
        return lambda: torch.mm(a, b, out=out)


def repeats(seconds: float) -> int:
    """Returns the number of runs per round for a run of ``seconds``."""
    return max(1, min(100, int(_ROUND / seconds)))


def timed(run: Callable[[], Any], device: str, timer: DeviceTimer) -> float:
    """Returns the seconds of one run, on CUDA with a cold L2 cache and without the host's time."""
    return timer.seconds(run) if device == "cuda" else wall_seconds(run)


def serve(device: str, build: Callable[..., Timed | Products]) -> None:
    """Runs a worker's loop. ``build`` makes the contestant from the words of a size."""
    channel = Channel()
    channel.reply(ready=True)
    contestant = None
    while message := channel.receive():
        if message.startswith("size "):
            contestant = None  # frees its memory before the next one is built
            gc.collect()
            contestant = build(*message.split()[1:])
            channel.reply(**contestant.first())
        else:
            channel.reply(seconds=contestant.round())
        if device == "cuda":
            torch.cuda.empty_cache()


def compete(
    module: str,
    specs: Mapping[str, Mapping[str, Any]],  # contestant -> settings of its worker
    sizes: Sequence[str],
    rounds: int,
    check: Callable[[Found], None],
) -> dict[str, Found]:
    """Runs all contestants at all sizes. Returns size -> contestant -> results, memory and seconds.

    ``check`` gets all results of a size before anything is timed, and raises if they disagree.
    """
    workers: list[Worker] = []
    measured = {}
    try:
        workers += [Worker(name, module, spec) for name, spec in specs.items()]
        for size in sizes:
            found = {worker.name: worker.ask(f"size {size}") for worker in workers}
            check(found)
            for name, answers in interleave(workers, rounds, "run").items():
                found[name]["runs"] = [seconds for answer in answers for seconds in answer["seconds"]]
            measured[size] = found
    finally:
        close_all(workers)
    return measured
