"""``python -m bench SUBJECT [options]``; ``python -m bench SUBJECT --help`` lists a subject's options."""

from __future__ import annotations

import importlib
import sys

SUBJECTS = {
    "suite": "everything below that this machine can run, in one file of results, with pictures",
    "step": "a training step against TRL's: time, memory, equality of the losses",
    "scaling": "the same as pairs, tokens, vocabulary, prompt share, completions or ranks grow",
    "head": "the head against eager, TRL, Liger, PyTorch's own and more: time, memory, share of the roofline",
    "attention": "attention with shared prompts against separate sequences, FlexAttention and a dense mask",
    "tokenize": "tokenising pairs of real lengths, against TRL's",
    "packing": "pads, fill and balance of packed micro-batches over a file of responses",
    "cache": "the reference cache: filling, opening, look-ups, beside SQLite, LMDB and Arrow columns",
    "fingerprint": "digesting the weights of a reference",
    "crash": "builds of the reference cache, killed at random: nothing lost, nothing wrong",
    "reference_pass": "the reference pass over all pairs of a file of responses, against TRL's",
    "gpu_check": "all that wants a GPU: tests, comparisons and benchmarks, in eight minutes",
    "compile_report": "registers, shared memory and spills of every kernel; needs no GPU",
    "plot": "pictures of recorded results",
    "readme": "the figures of README.md and docs/benchmarks.md, from recorded results",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in SUBJECTS:
        lines = (f"  {name:<16}{text}" for name, text in SUBJECTS.items())
        print("usage: python -m bench SUBJECT [options]", *lines, sep="\n")
        return 0 if arguments in ([], ["-h"], ["--help"]) else 2
    subject, *rest = arguments
    module = "gpu.check" if subject == "gpu_check" else subject
    return importlib.import_module(f"bench.{module}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
