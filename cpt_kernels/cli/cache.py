"""``cpt cache``: works on cached reference log-probs outside of training.

``build``, ``verify``, ``import`` and ``info`` of a dataset take the options of ``cpt-train``, which name the reference,
the data and the truncation. Like training, they can be started by ``torchrun``. They train nothing.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .parsing import Parser, number_type, unknown_argument

if TYPE_CHECKING:
    from .cache_dataset import DatasetReference

_ROUNDING = 1e-3  # nats per token by which two packings of one model may differ in fp32
_SAMPLE = {"sample": 64, "seed": 0, "tolerance": _ROUNDING}
_SUMS = ("ref_chosen_logps", "ref_rejected_logps")
# Commands on a dataset, which the options of cpt-train name -> whether they need one.
_OF_DATASET = {"build": True, "import": True, "info": False, "verify": False}


def main(argv: Sequence[str], prog: str = "cpt cache") -> None:
    """Runs one of the commands."""
    args, rest = _cache_parser(prog).parse_known_args(argv)
    if rest and args.command not in _OF_DATASET:
        raise UserError(unknown_argument(rest[0], vars(args), f"{prog} {args.command}"))

    from ..data.stores import local_path, url_of
    from ..reference.cache import default_cache_dir  # imports pyarrow, which --help does not need

    # What argparse does not know are options of cpt-train. They select a dataset.
    args.directory = local_path(args.ref_cache_dir) if args.ref_cache_dir else default_cache_dir()
    args.training = [*rest, *(["--ref_cache_dir", str(args.directory)] if rest else [])]
    args.prog = f"{prog} {args.command}"
    if not rest and _OF_DATASET.get(args.command):
        raise UserError(f"{args.prog} needs a model and a dataset: give the options of cpt-train")
    if rest and getattr(args, "reference", None):
        raise UserError("--reference selects a stored reference: leave it out, as the options of cpt-train name one")
    for name, default in _SAMPLE.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)
        elif not rest:
            raise UserError(f"--{name} applies only when a dataset is given: give the options of cpt-train, too")
    on_all = args.command in ("info", "verify", "prune", "merge", "export") and not rest
    if on_all and url_of(args.directory) is None and not args.directory.is_dir():
        raise UserError(f"there is no cache in {args.directory}")
    _COMMANDS[args.command][0](args)


# --- Commands on all that is stored ---


def show_info(args: argparse.Namespace) -> None:
    """Prints what is stored; with a dataset, how much of the dataset is stored."""
    from ..reference.maintenance import stored_references, summarize_reference

    if args.training:
        with _open_dataset(args) as data:
            for name, missing in data.missing().items():
                found, completions = missing.found, missing.completions
                share = found / max(completions, 1)
                _print_once(f"{name} data: {found} of {completions} completions are stored ({share:.1%})")
        return
    print(args.ref_cache_dir or args.directory)
    for fingerprint in stored_references(args.directory, args.reference):
        stored = summarize_reference(args.directory, fingerprint)
        about = stored.description
        variant = f", beside {about['variant_of'][:8]}" if "variant_of" in about else ""
        unproven = "" if stored.is_proven else ", without a probe"
        print(
            f"{fingerprint}  {about.get('model') or 'unnamed'}, {about.get('compute_dtype', '?')}{variant}{unproven}:"
            f" {stored.completions} completions{f' ({stored.imported} as imported sums)' if stored.imported else ''},"
            f" {stored.tokens} tokens, {stored.nbytes / 1e6:.1f} MB in {stored.shards} shards"
        )


def verify(args: argparse.Namespace) -> None:
    """Verifies every checksum; with a dataset, scores a random sample again."""
    from ..reference.maintenance import damaged_shards, stored_references

    if args.training:
        with _open_dataset(args) as data:
            gaps = data.rescore(args.sample, args.seed)
        if not gaps:
            raise UserError("no completion of this dataset is stored, so there is nothing to verify")
        _print_once(f"{len(gaps)} completions scored again; largest difference {max(gaps):.3g} nats per token")
        if max(gaps) > args.tolerance:
            raise UserError(
                f"values differ by up to {max(gaps):.3g} nats per token, more than --tolerance {args.tolerance}:"
                " another model, kernel or precision computed them; remove them with cpt cache prune --reference"
            )
        return
    references = stored_references(args.directory, args.reference)
    damaged = [shard for fingerprint in references for shard in damaged_shards(args.directory, fingerprint)]
    for path, reason in damaged:
        print(f"{path}: {reason}", file=sys.stderr)
    if damaged:
        raise UserError(f"{len(damaged)} shards are damaged; readers ignore them, and they can be deleted")
    print("every checksum is right")


def prune_files(args: argparse.Namespace) -> None:
    """Deletes a reference, old shards, or the oldest shards beyond a size, and what killed writers left."""
    from ..reference.maintenance import prune, stored_references

    for name in ("older_than", "max_gb"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value:g}: must not be negative, and must be finite; nothing was deleted")
    choice = functools.partial(
        prune,
        args.directory,
        stored_references(args.directory, args.reference),
        everything=bool(args.reference) and args.older_than is None and args.max_gb is None,
        older_than_days=args.older_than,
        max_gb=args.max_gb,
    )
    planned = choice(dry_run=True)
    for path in planned.paths:
        print(path)
    size = f"{len(planned.paths)} files, {planned.nbytes / 1e6:.1f} MB"
    if args.dry_run or not planned.paths:
        print(f"{size} would be deleted")
        return
    if not args.yes:
        answer = input(f"delete these {size}? [y/N] ") if sys.stdin.isatty() else ""  # without a terminal it is no
        if answer.strip().lower() not in ("y", "yes"):
            raise UserError("nothing was deleted: answer y, or give --yes")
    pruned = choice(dry_run=False)
    print(f"{len(pruned.paths)} files, {pruned.nbytes / 1e6:.1f} MB deleted")


def merge(args: argparse.Namespace) -> None:
    """Replaces many small shards by a few large ones."""
    from ..reference.cache import ReferenceCache
    from ..reference.maintenance import stored_references

    for fingerprint in stored_references(args.directory, args.reference):
        cache = ReferenceCache(args.directory, fingerprint)
        before = len(cache.shards)
        cache.merge()
        print(f"{fingerprint}: {before} shards are {len(cache.shards)} now")


def export_rows(args: argparse.Namespace) -> None:
    """Writes one reference's rows to a Parquet file."""
    from ..reference.maintenance import export_parquet, stored_references

    if Path(args.to).suffix != ".parquet":
        raise UserError(f"--to {args.to}: must end in .parquet")
    references = stored_references(args.directory, args.reference)
    if len(references) != 1:
        raise UserError(f"--reference must name one of the {len(references)} references in {args.directory}")
    if not Path(args.to).absolute().parent.is_dir():
        raise UserError(f"--to {args.to}: the folder {Path(args.to).absolute().parent} does not exist")
    rows = export_parquet(args.directory, references[0], args.to)
    print(f"{rows} completions written to {args.to}")


# --- Commands on a dataset ---


def build(args: argparse.Namespace) -> None:
    """Scores the completions of a dataset that the cache lacks, on any number of ranks. A killed build is resumed."""
    with _open_dataset(args) as data:
        data.fill()


def import_sums(args: argparse.Namespace) -> None:
    """Imports the sums that TRL added to a dataset, after a sample of them has been scored again."""
    with _open_dataset(args, keep_columns=_SUMS) as data:
        added, gaps = data.import_sums(_SUMS, args.sample, args.seed, args.tolerance)
    _print_once(
        f"{added} completions imported; {len(gaps)} were scored again, with a largest difference of {max(gaps):.3g}"
        " nats per token"
    )


def _open_dataset(
    args: argparse.Namespace, keep_columns: Sequence[str] = ()
) -> AbstractContextManager[DatasetReference]:
    from .cache_dataset import open_dataset  # imports transformers, which takes seconds

    return open_dataset(args.training, args.prog, keep_columns)


# --- Options ---

_COMMANDS = {
    "build": (build, "score a dataset without training"),
    "info": (show_info, "show what is stored; with the options of cpt-train, how much of a dataset"),
    "verify": (verify, "verify all checksums; with the options of cpt-train, score a sample again"),
    "prune": (prune_files, "delete by reference, age or size, and what killed writers left"),
    "merge": (merge, "replace many small files by a few large ones, while no other machine reads them"),
    "export": (export_rows, "write a reference's rows to a Parquet file"),
    "import": (import_sums, "import the columns ref_chosen_logps and ref_rejected_logps of a TRL dataset"),
}


def _cache_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (_, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if name in _OF_DATASET:
            command.usage = f"{prog} {name} [--config run.yaml] [--option value ...]"
            command.epilog = "Options of cpt-train name the data and the reference: --config, --dataset_name, ..."
            if not _OF_DATASET[name]:
                command.epilog += "\nWithout them, the command covers all that is stored."
        command.add_argument(
            "--ref_cache_dir", metavar="FOLDER", help="the cache, a folder or URL; default as in training"
        )
        if name in ("info", "verify", "prune", "merge", "export"):
            command.add_argument("--reference", metavar="HEX", help="the first digits of one reference's fingerprint")
        if name in ("verify", "import"):
            count, nats = number_type("a number of completions", 1), number_type("a tolerance", 0, float)
            command.add_argument("--sample", type=count, help="number of completions to score again [64]")
            command.add_argument("--seed", type=number_type("a seed", 0), help="seed of the sample [0]")
            command.add_argument("--tolerance", type=nats, help=f"nats per token; bf16 needs 0.1 [{_ROUNDING}]")
        if name == "prune":
            command.add_argument("--older_than", type=float, metavar="DAYS", help="delete shards older than this")
            command.add_argument("--max_gb", type=float, metavar="GB", help="delete the oldest shards beyond this size")
            command.add_argument("--yes", action="store_true", help="delete without a question")
            command.add_argument("--dry_run", action="store_true", help="only list what would be deleted")
        if name == "export":
            command.add_argument("--to", required=True, metavar="FILE", help="the Parquet file")
    return parser


def _print_once(text: str) -> None:
    """Prints on rank 0 only: a launcher may have started several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
