"""The commands ``cpt`` and ``cpt-train``.

A mistake of the user, which is a :class:`UserError`, ends in one line on stderr and exit code 2. So does a refusal of
the operating system, such as a full disk. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

from ..errors import UserError
from .launch import is_launched
from .option_table import package_version

# Command -> the module whose function main(argv, prog) runs it, and its line in `cpt --help`. The module is imported
# when the command runs, because transformers takes seconds.
COMMANDS = {
    "train": (".train", "train a model on preference pairs or on their chosen side"),
    "plan": (".plan", "count the rows, steps, tokens and memory of a training run before it starts"),
    "difficulty": (".difficulty", "score how difficult each pair is for a model, for a curriculum"),
    "study": (".study", "compare SFT, SLiC, DPO and curricula on your model and your responses, with intervals"),
    "pairs": (".pairs", "build preference pairs from the responses of models of different strength"),
    "cache": (".cache", "build, inspect, verify, prune, export and import reference log-probs"),
    "generate": (".generate", "generate a model's responses to a set of prompts, locally or through an endpoint"),
    "eval": (".evaluate", "evaluate models on held-out pairs, or by a judge on what they generate"),
    "merge": (".merge", "merge adapters into their base model, exactly, and write the whole model"),
    "export": (".export", "write the weights of a sharded checkpoint to one folder of safetensors"),
    "demo": ("..demo", "the paper in miniature: a small model, three teachers, SFT, SLiC and DPO; no network"),
    "demo-real": ("..demo.real", "the same with a real chat model, on instructions whose answers a program can check"),
}
_DISK_SIGNS = ("No space left on device", "Read-only file system", "PytorchStreamWriter failed writing file")
_PACKAGES = ("cpt-kernels", "torch", "transformers")  # whose versions --version prints


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``cpt COMMAND ...`` and returns the exit code."""
    if argv is None:
        return _run_process(main)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: cpt COMMAND [...]\n")
        for name, (_, help) in COMMANDS.items():
            print(f"  cpt {name:10}{help}")
        print("\n  cpt COMMAND --help shows the options of a command; cpt --version the version")
        return 0 if argv else 2
    if argv[0] == "--version":
        return _print_version()
    command, *rest = argv
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        return _fail(
            "cpt", f"unknown command {command}; " + (f"did you mean {close[0]}?" if close else "see cpt --help")
        )
    return _execute(command, rest, f"cpt {command}")


def train_main(argv: Sequence[str] | None = None) -> int:
    """Runs ``cpt-train ...`` and returns the exit code."""
    if argv is None:
        return _run_process(train_main)
    return _execute("train", argv, "cpt-train")


def _run_process(command: Callable[[Sequence[str]], int]) -> int:
    """Runs a command with the arguments of this process and returns the exit code.

    A launched rank that succeeds skips the teardown of the interpreter: there a thread of gloo that still holds Python
    objects aborts the process now and then (pytorch#190489), and the launcher reports a finished run as failed.
    """
    succeeded = False

    def leave() -> None:
        if succeeded:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    if is_launched():
        atexit.register(leave)  # registered first, so it runs last, after the exit functions of trackers
    code = command(sys.argv[1:])
    succeeded = code == 0
    return code


def _execute(command: str, argv: Sequence[str], prog: str) -> int:
    if [*argv[:1]] == ["--version"]:
        return _print_version()
    module, _ = COMMANDS[command]
    # Each of five retries would print four lines before the error that says the same.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    try:
        import_module(module, __package__).main(argv, prog)
    except KeyboardInterrupt as stop:
        return _fail(prog, str(stop) or "stopped", 130)
    except UserError as error:
        return _fail(prog, str(error))
    except OSError as error:
        if error.errno is None:  # not from the operating system, but a library's own
            raise
        return _fail(prog, ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None))
    except Exception as error:
        # safetensors, tokenizers and torch report a full disk by errors of their own.
        if not (text := str(error)) or not any(sign in text for sign in _DISK_SIGNS):
            raise
        return _fail(prog, f"a file could not be written: {text.splitlines()[0]}; is the disk full?", 1)
    return 0


def _print_version() -> int:
    print(", ".join(f"{name} {package_version(name)}" for name in _PACKAGES))
    return 0


def _fail(prog: str, message: str, code: int = 2) -> int:
    line = "; ".join(part.strip().rstrip(";") for part in message.splitlines() if part.strip())
    rank = int(os.environ.get("RANK", "0"))
    print(f"{prog}: {f'rank {rank}: ' if rank else ''}error: {line}", file=sys.stderr)
    return code
