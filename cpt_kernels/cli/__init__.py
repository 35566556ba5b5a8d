"""The commands ``cpt`` and ``cpt-train``: which there are, and how they end.

A user's mistake ends in one line on stderr and exit code 2. Anything else keeps its traceback.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

# Command -> module with a function main(argv, prog), imported on use (transformers takes seconds), and what it does.
COMMANDS = {
    "train": (".train", "train a model on preference pairs or on their chosen side"),
    "pairs": (".pairs", "build preference pairs from the responses of models of different strength"),
    "cache": (".cache", "build, look into, check, prune, export and import reference log-probs"),
    "generate": (".generate", "responses of a model, local or behind an endpoint, to a set of prompts"),
    "eval": (".evaluate", "evaluate models on held-out pairs, or by a judge on what they generate"),
    "demo": ("..demo", "the paper in miniature: a small model, three teachers, SFT, SLiC and DPO; no network"),
}
# Those who call a user's mistake ValueError. The same from torch or numpy is a mistake of ours.
_SPEAK_TO_USERS = ("cpt_kernels", "transformers", "accelerate", "datasets", "peft", "multiprocess")


def main(argv: Sequence[str] | None = None) -> int:
    """``cpt COMMAND ...``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: cpt COMMAND [...]\n")
        for name, (_, help) in COMMANDS.items():
            print(f"  cpt {name:10}{help}")
        print("\n  cpt COMMAND --help shows its options")
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        return _fail(
            "cpt", f"unknown command {command}; " + (f"did you mean {close[0]}?" if close else "see cpt --help")
        )
    return _execute(command, rest, f"cpt {command}")


def train_main(argv: Sequence[str] | None = None) -> int:
    """``cpt-train ...``; returns the exit code."""
    return _execute("train", sys.argv[1:] if argv is None else argv, "cpt-train")


def _execute(command: str, argv: Sequence[str], prog: str) -> int:
    module, _ = COMMANDS[command]
    try:
        import_module(module, __package__).main(argv, prog)
    except KeyboardInterrupt:
        return _fail(prog, "stopped", 130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if not _is_for_users(error):
            raise
        return _fail(prog, _one_line(error))
    return 0


def _is_for_users(error: Exception) -> bool:
    """Whether it was raised on purpose, by a ``raise`` statement, in a package that speaks to users that way."""
    raised = error.__traceback__
    while raised.tb_next is not None:
        raised = raised.tb_next
    if dis.opname[raised.tb_frame.f_code.co_code[raised.tb_lasti]] != "RAISE_VARARGS":
        return False  # by Python itself: int("x"), open(...) and the like
    module = raised.tb_frame.f_globals.get("__name__", "")
    if isinstance(error, RuntimeError):  # a tracker that is not installed; elsewhere a RuntimeError is a bug
        return module.startswith("transformers.integrations")
    return module.split(".")[0] in _SPEAK_TO_USERS


def _one_line(error: Exception) -> str:
    return "; ".join(line.strip().rstrip(";") for line in str(error).splitlines() if line.strip())


def _fail(prog: str, message: str, code: int = 2) -> int:
    rank = int(os.environ.get("RANK", "0"))
    print(f"{prog}: {f'rank {rank}: ' if rank else ''}error: {message}", file=sys.stderr)
    return code
