"""What the operators' benchmarks share: a worker that runs one contestant at size after size, and rounds over them all.

A worker (:func:`serve`) answers ``size ...`` with the results and the memory of one run, after a run that warms up and
compiles, and ``run`` with the seconds of as many runs as fit 50 ms. On CUDA the L2 cache is cold, and what a worker
does not use is given back: all of them share the device.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .gpu.meter import cold_seconds, wall_seconds
from .timing import MIB, Channel, Contestant, close_all, interleave, peak_mib, reset_peak, resident_mib

REFERENCE = "reference"  # the contestant that has the expected results and the rate of the products
_ROUND = 0.05  # seconds

Found = dict[str, dict[str, Any]]  # contestant -> what it answered, and "runs": all seconds


class Timed(ABC):
    """Something that can be run again and again."""

    def __init__(self, device: str):
        self.device = device

    @abstractmethod
    def run(self) -> Any:
        """Once, all of it."""

    @abstractmethod
    def results(self) -> dict[str, Any]:
        """Numbers of the last run that others must agree with."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the last run."""

    def first(self) -> dict[str, Any]:
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
        seconds = []
        for _ in range(self.repeats):
            seconds.append(timed(self.run, self.device))
            self.clear()
        return seconds

    def _reset_memory(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        resident = resident_mib()
        if not reset_peak():
            raise RuntimeError("this kernel does not reset VmHWM (/proc/self/clear_refs): peaks cannot be told apart")
        return resident


class Products:
    """Matrix products alone, each into memory that is there, and results that were computed beside."""

    def __init__(self, device: str, results: dict[str, Any], *products: tuple[torch.Tensor, torch.Tensor]):
        self.device, self.results = device, results
        self.products = [(*operands, operands[0] @ operands[1]) for operands in products]

    def first(self) -> dict[str, Any]:
        self.repeats = repeats(sum(wall_seconds(self._run(product)) for product in self.products))
        return {"results": self.results}

    def round(self) -> list[list[float]]:
        """Of every run the seconds of every product."""
        return [[timed(self._run(product), self.device) for product in self.products] for _ in range(self.repeats)]

    @staticmethod
    def _run(product: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Callable[[], Any]:
        a, b, out = product
        return lambda: torch.mm(a, b, out=out)


def repeats(seconds: float) -> int:
    return max(1, min(100, int(_ROUND / seconds)))


def timed(run: Callable[[], Any], device: str) -> float:
    return cold_seconds(run) if device == "cuda" else wall_seconds(run)


def serve(device: str, build: Callable[..., Timed | Products]) -> None:
    """A worker's loop; ``build`` is given the words of a size."""
    channel = Channel()
    channel.reply(ready=True)
    contestant = None
    while message := channel.receive():
        if message.startswith("size "):
            contestant = None  # what it holds is free before the next one is built
            gc.collect()
            contestant = build(*message.split()[1:])
            channel.reply(**contestant.first())
        else:
            channel.reply(seconds=contestant.round())
        if device == "cuda":
            torch.cuda.empty_cache()


def compete(
    module: str,
    specs: Mapping[str, Mapping[str, Any]],  # name -> what its worker is told
    sizes: Sequence[str],
    rounds: int,
    check: Callable[[Found], None],
) -> dict[str, Found]:
    """size -> contestant -> its results, memory and seconds. ``check`` sees all results before anything is timed."""
    workers: list[Contestant] = []
    measured = {}
    try:
        workers += [Contestant(name, module, spec) for name, spec in specs.items()]
        for size in sizes:
            found = {worker.name: worker.ask(f"size {size}") for worker in workers}
            check(found)
            for name, answers in interleave(workers, rounds, "run").items():
                found[name]["runs"] = [seconds for answer in answers for seconds in answer["seconds"]]
            measured[size] = found
    finally:
        close_all(workers)
    return measured
