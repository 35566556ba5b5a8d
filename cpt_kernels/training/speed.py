"""Speed and memory of a training run."""

from __future__ import annotations

import resource
import sys
import time

import torch


class Speedometer:
    """Measures tokens per second of training steps, without the time of evaluations and saving.

    Args:
        tokens: tokens seen when the measurement begins.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens, self._seconds, self._since = tokens, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Ends the time that counts, until `resume`."""
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def resume(self) -> None:
        """Lets the time count again from now on."""
        self._since = time.perf_counter()

    def rate(self, tokens: int) -> float:
        """Returns tokens per second since the last call, given the number of tokens seen so far."""
        self.pause()
        rate = (tokens - self._tokens) / max(self._seconds, 1e-9)
        self._tokens, self._seconds = tokens, 0.0
        return rate


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has had allocated on an accelerator, or on a CPU resident in memory."""
    module = torch.get_device_module(device)
    if hasattr(module, "max_memory_allocated"):
        return module.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
