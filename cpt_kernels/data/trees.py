"""Finds what several sequences begin with, so that a packed row holds it once. Pure numpy; ``packing`` lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Tokens that `sharing=auto` wants to save beyond a shared prompt. A branch may add a round to the sums of the gradients
# of keys and values (`packing.scatter_rounds`): ten small kernels, some 50 microseconds a layer on a GPU that waits for
# them, in which a layer of 2048 dimensions runs 67 tokens (6 * 12 * 2048^2 operations each, at 400 TFLOP/s).
MINIMUM_SHARED = 64


class Branch(NamedTuple):
    """A segment of a packed row."""

    shared: int  # tokens at the beginning of its path that the branch before it has as well, and that are not run again
    sequences: list[int]  # that end in this segment, in the order of their ends; the last one is the whole path


def find_branches(
    paths: Sequence[NDArray[np.int64]],  # tokens of each sequence
    prompts: Sequence[int],  # tokens of the prompt of each
    minimum: int = 1,
) -> list[Branch]:
    """Returns the segments of sequences that share their beginnings, depth first.

    Children that are single sequences come before larger ones, because the sides of a pair then lie close together in
    conversations with a pair at every turn. Otherwise children are in the order of their first sequence.

    Args:
        minimum: a beginning is shared if that saves so many tokens beyond the sequence's prompt, or beyond nothing if
            the prompt is not shared. A prompt that another sequence contains is always shared.
    """
    branches: list[Branch] = []
    last = np.empty(0, np.int64)  # the path of the last branch
    for s in _depth_first(paths):
        common = _common(last, paths[s])
        base = prompts[s] if prompts[s] <= common else 0
        shared = common if common - base >= minimum else base
        if branches and shared == len(last):  # the sequence goes on from the end of the branch
            branches[-1].sequences.append(s)
        else:
            branches.append(Branch(shared, [s]))
        last = paths[s]
    return branches


def _depth_first(paths: Sequence[NDArray[np.int64]]) -> list[int]:
    """Returns the sequences in an order in which those with a common beginning are consecutive."""
    # Equal beginnings are consecutive among sorted bytes, too. `common[i]` are the first tokens of sorted i - 1 and i.
    texts = [path.tobytes() for path in paths]
    by_text = sorted(range(len(paths)), key=texts.__getitem__)
    common = [0, *(_common(paths[a], paths[b]) for a, b in pairwise(by_text))]
    order: list[int] = []
    nodes = [(0, len(paths))]  # ranges of sorted sequences, the next one last
    while nodes:
        start, stop = nodes.pop()
        if stop - start == 1:
            order.append(by_text[start])
            continue
        depth = min(common[start + 1 : stop])
        cuts = [start, *(i for i in range(start + 1, stop) if common[i] == depth), stop]

        def rank(child: tuple[int, int], depth: int = depth) -> tuple[bool, bool, int]:
            members = by_text[slice(*child)]
            # Sequences that end here come first: those after them go on where they end.
            return len(paths[members[0]]) > depth, len(members) > 1, min(members)

        nodes += sorted(pairwise(cuts), key=rank, reverse=True)
    return order


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Returns the number of tokens that two sequences begin with."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
