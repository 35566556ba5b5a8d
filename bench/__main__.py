"""Runs one benchmark: ``python -m bench SUBJECT [options]``. ``python -m bench SUBJECT --help`` lists its options."""

from __future__ import annotations

import importlib
import sys

SUBJECTS = {
    "suite": "run all subjects below that this machine supports; one result file, with plots",
    "step": "time and memory of a training step, compared with TRL; checks that the losses agree",
    "scaling": "time of a step as pairs, tokens, vocabulary, prompt share, completions or ranks grow",
    "head": "time, memory and share of the roofline of the head, compared with eager, TRL, Liger and others",
    "head_bytes": "bytes and peak of memory of the gradient of the head's weight, by arithmetic",
    "attention": "shared-prompt attention, compared with separate sequences, FlexAttention and a dense mask",
    "tokenize": "time to tokenize pairs of real lengths, compared with TRL",
    "packing": "pad tokens, fill and balance between ranks of packed micro-batches",
    "scale": "idle ranks, planning, preparation and files of a million pairs on 8 to 512 ranks; runs no model",
    "cache": "filling, opening and look-ups of the reference cache, compared with SQLite, LMDB and Arrow",
    "stores": "requests, look-ups and memory of the reference cache on an object store, with a server on this machine",
    "fingerprint": "time to compute the fingerprint of a reference",
    "crash": "kill builds of the reference cache at random; check that no value is lost or wrong",
    "plan": "steps, tokens and seconds that cpt plan predicts, compared with those of runs, ours and TRL's",
    "reference_pass": "time to score the reference on all pairs of a response file, compared with TRL",
    "gpu_check": "all tests, sanitizers, comparisons and benchmarks that need a GPU, in nine minutes",
    "compile_report": "registers, shared memory and spills of every kernel; needs no GPU",
    "bytes": "bytes that the layers move beside matrix products, eager, compiled and with Liger; needs no GPU",
    "win_rate": "length-controlled win rates, compared with those that AlpacaEval publishes, from a copy of its files",
    "plan_memory": "memory that cpt plan predicts, compared with that of training on a CPU",
    "plot": "plot recorded results",
    "readme": "write the figures of README.md and docs/benchmarks.md from recorded results",
}


def main(arguments: list[str]) -> int:
    """Runs the subject named first and returns its exit code."""
    if not arguments or arguments[0] not in SUBJECTS:
        lines = (f"  {name:<16}{text}" for name, text in SUBJECTS.items())
        print("usage: python -m bench SUBJECT [options]", *lines, sep="\n")
        return 0 if arguments in ([], ["-h"], ["--help"]) else 2
    subject, *rest = arguments
    module = "gpu.check" if subject == "gpu_check" else subject
    return importlib.import_module(f"bench.{module}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
