"""``cpt cache``: what to do with reference log-probs outside of training.

``build``, ``verify``, ``import`` and ``info`` of a dataset take the options of ``cpt-train``, so that they mean the
same reference, tokens and truncation; where training starts with ``torchrun``, so can they. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..reference.cache import ReferenceCache, default_cache_dir
from ..reference.shards import KEY_BYTES, UNREADABLE, DamagedShardError, Shard
from .parsers import Help, Parser

_FINGERPRINT = "[0-9a-f]" * 32
_ABOUT = "reference.json"
_TEMPORARY_AGE = 3600.0  # seconds after which nobody is still writing a temporary file
_DAY = 86400.0
_ROUNDING = 1e-3  # nats per token that two packings of one model may differ by in fp32
_SAMPLE = {"sample": 64, "seed": 0, "tolerance": _ROUNDING}
_SUMS = ("ref_chosen_logps", "ref_rejected_logps")
# Of a dataset, which the options of cpt-train name; always, or as an alternative to all that is stored.
_OF_DATASET = {"build": True, "import": True, "info": False, "verify": False}


def main(argv: Sequence[str], prog: str = "cpt cache") -> None:
    """Run one of the commands.

    Raises:
        UserError: an unknown command or option, or one that cannot be done; the message says why.
    """
    args, rest = _parser(prog).parse_known_args(argv)
    if rest and args.command not in _OF_DATASET:
        raise UserError(f"unknown option {rest[0]}; see {prog} {args.command} --help")
    args.directory = Path(args.ref_cache_dir).expanduser() if args.ref_cache_dir else default_cache_dir()
    args.training = [*rest, *(["--ref_cache_dir", str(args.directory)] if rest else [])]
    args.prog = f"{prog} {args.command}"
    if not rest and _OF_DATASET.get(args.command):
        raise UserError(f"{args.prog} needs a model and a dataset: give the options of cpt-train")
    if rest and getattr(args, "reference", None):
        raise UserError(
            "--reference chooses among all that is stored: leave it out, as the options of cpt-train name one"
        )
    for name, default in _SAMPLE.items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)
        elif not rest:
            raise UserError(f"--{name} is of the sample that is scored again: give the options of cpt-train, too")
    if args.command in ("info", "verify") and not rest and not args.directory.is_dir():
        raise UserError(f"there is no cache in {args.directory}")
    _COMMANDS[args.command][0](args)


# --- Commands on folders alone ---


def info(args: argparse.Namespace) -> None:
    """Print what is stored; with a dataset, how much of it."""
    if args.training:
        with _open_dataset(args) as data:
            for name, missing in data.missing().items():
                share = missing.found / max(missing.completions, 1)
                _say(f"{name} data: {missing.found} of {missing.completions} completions are stored ({share:.1%})")
        return
    print(f"{args.directory}")
    for folder in _references(args.directory, args.reference):
        about = json.loads((folder / _ABOUT).read_text()) if (folder / _ABOUT).exists() else {}
        cache = ReferenceCache(args.directory, folder.name)
        tokens = sum(len(shard.values) for shard in cache.shards)
        sums = sum(len(shard) for shard in cache.shards if shard.kind == "sums")
        size = sum(path.stat().st_size for path in _files(folder))
        print(
            f"{folder.name}  {about.get('model') or 'unnamed'}, {about.get('compute_dtype', '?')}:"
            f" {cache.num_rows} completions{f' ({sums} as imported sums)' if sums else ''}, {tokens} tokens,"
            f" {size / 1e6:.1f} MB in {len(cache.shards)} shards"
        )


def verify(args: argparse.Namespace) -> None:
    """Check every checksum; with a dataset, score a random sample of it again.

    Raises:
        UserError: a shard is damaged, or a value differs by more than rounding explains.
    """
    if args.training:
        with _open_dataset(args) as data:
            gaps = data.rescore(args.sample, args.seed)
        if not gaps:
            raise UserError("no completion of this dataset is stored, so there is nothing to verify")
        _say(f"{len(gaps)} completions scored again; largest difference {max(gaps):.3g} nats per token")
        if max(gaps) > args.tolerance:
            raise UserError(
                f"values differ by up to {max(gaps):.3g} nats per token, more than --tolerance {args.tolerance}: they"
                " are of another model, kernel or precision; remove them with cpt cache prune --reference"
            )
        return
    damaged = 0
    for folder in _references(args.directory, args.reference):
        for path in sorted(folder.glob("*.arrow")):
            try:
                Shard.open(path, folder.name).check()
            except UNREADABLE as error:
                damaged += 1
                print(f"{path}: {error}", file=sys.stderr)
    if damaged:
        raise UserError(f"{damaged} shards are damaged; readers ignore them, and they can be deleted")
    print("every checksum is right")


def prune(args: argparse.Namespace) -> None:
    """Delete a reference, old shards, or the oldest beyond a size; and always what killed writers left."""
    if not args.directory.is_dir():
        raise UserError(f"there is no cache in {args.directory}")
    now = time.time()
    folders = list(_references(args.directory, args.reference))
    files = [(path, path.stat()) for folder in folders for path in _files(folder)]
    shards = sorted((about.st_mtime, path, about.st_size) for path, about in files if path.suffix == ".arrow")
    doomed = {path for path, about in files if path.suffix == ".tmp" and now - about.st_mtime > _TEMPORARY_AGE}
    limits = (args.older_than, args.max_gb)
    if args.reference and limits == (None, None):
        doomed |= {path for path, _ in files}
    if args.older_than is not None:
        old = {path for path, about in files if now - about.st_mtime > args.older_than * _DAY}
        doomed |= {path for path in old if path.name != _ABOUT}
    if args.max_gb is not None:
        kept = [shard for shard in shards if shard[1] not in doomed]
        excess = sum(size for *_, size in kept) - args.max_gb * 1e9
        for _, path, size in kept:
            if excess > 0:
                doomed.add(path)
                excess -= size
    freed = sum(about.st_size for path, about in files if path in doomed)
    for path in sorted(doomed):
        print(path)
        if not args.dry_run:
            path.unlink(missing_ok=True)
    for folder in folders if not args.dry_run else ():
        left = [path for path in folder.iterdir() if path.name != _ABOUT]
        if not left and doomed:
            (folder / _ABOUT).unlink(missing_ok=True)
            folder.rmdir()
    print(f"{len(doomed)} files, {freed / 1e6:.1f} MB{' would be' if args.dry_run else ''} deleted")


def merge(args: argparse.Namespace) -> None:
    """Put the rows of many small shards into few."""
    for folder in _references(args.directory, args.reference):
        cache = ReferenceCache(args.directory, folder.name)
        before = len(cache.shards)
        cache.merge(cache.shards)
        print(f"{folder.name}: {before} shards are {len(cache.shards)} now")


def export(args: argparse.Namespace) -> None:
    """Write one reference's rows to a Parquet file: key (16 bytes), logps, and kind (see ``shards.KINDS``)."""
    folders = list(_references(args.directory, args.reference))
    if len(folders) != 1:
        raise UserError(f"--reference must name one of the {len(folders)} references in {args.directory}")
    schema = pa.schema({"key": pa.binary(KEY_BYTES), "logps": pa.list_(pa.float32()), "kind": pa.string()})
    cache = ReferenceCache(args.directory, folders[0].name)
    with pq.ParquetWriter(args.to, schema.with_metadata({"fingerprint": folders[0].name})) as writer:
        for shard in cache.shards:
            try:
                rows = shard.rows()
            except DamagedShardError as error:
                raise UserError(f"{shard.path}: {error}; delete it, and what it held is scored again") from error
            stops = np.cumsum([0, *map(len, rows.values())], dtype=np.int32)
            logps = pa.ListArray.from_arrays(stops, np.concatenate(list(rows.values())))
            keys = pa.array(list(rows), schema.field("key").type)
            writer.write_table(pa.table([keys, logps, [shard.kind] * len(rows)], schema=schema))
    print(f"{cache.num_rows} completions written to {args.to}")


# --- Commands on a dataset ---


def build(args: argparse.Namespace) -> None:
    """Score what the cache lacks of a dataset, on any number of ranks. Killed, it goes on where it was."""
    with _open_dataset(args) as data:
        data.fill()


def import_sums(args: argparse.Namespace) -> None:
    """Take over the sums that TRL put into a dataset, after a sample of them has been scored again."""
    with _open_dataset(args, keep_columns=_SUMS) as data:
        added, gaps = data.import_sums(_SUMS, args.sample, args.seed, args.tolerance)
    _say(f"{added} completions imported; of {len(gaps)} scored again the largest difference is {max(gaps):.3g} a token")


def _open_dataset(args: argparse.Namespace, keep_columns: Sequence[str] = ()) -> AbstractContextManager:
    from .cache_dataset import open_dataset  # takes seconds, as it brings transformers along

    return open_dataset(args.training, args.prog, keep_columns)


# --- Options ---

_COMMANDS = {
    "build": (build, "score a dataset without training"),
    "info": (info, "what is stored; with the options of cpt-train, how much of a dataset"),
    "verify": (verify, "check all checksums; with the options of cpt-train, score a sample again"),
    "prune": (prune, "delete by reference, age or size, and what killed writers left"),
    "merge": (merge, "put many small files into few, while no other machine reads them"),
    "export": (export, "write a reference's rows to a Parquet file"),
    "import": (import_sums, "take over the columns ref_chosen_logps and ref_rejected_logps of a TRL dataset"),
}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__, formatter_class=Help)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (_, help) in _COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False, formatter_class=Help)
        if name in _OF_DATASET:
            command.usage = f"{prog} {name} [--config run.yaml] [--option value ...]"
            command.epilog = (
                "The data and the reference are named by options of cpt-train: --config, --dataset_name, ..."
            )
            if not _OF_DATASET[name]:
                command.epilog += "\nWithout them it is about all that is stored."
        command.add_argument("--ref_cache_dir", metavar="FOLDER", help="the cache; default as in training")
        if name in ("info", "verify", "prune", "merge", "export"):
            command.add_argument("--reference", metavar="HEX", help="the first digits of one reference's fingerprint")
        if name in ("verify", "import"):
            command.add_argument("--sample", type=_count, help="completions to score again [64]")
            command.add_argument("--seed", type=int, help="of the sample [0]")
            command.add_argument("--tolerance", type=float, help=f"nats per token; bf16 needs 0.1 [{_ROUNDING}]")
        if name == "prune":
            command.add_argument("--older_than", type=float, metavar="DAYS", help="shards written before that")
            command.add_argument("--max_gb", type=float, metavar="GB", help="the oldest shards beyond so much")
            command.add_argument("--dry_run", action="store_true", help="only say what would be deleted")
        if name == "export":
            command.add_argument("--to", required=True, metavar="FILE", help="the Parquet file")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of completions")
    return int(text)


def _say(text: str) -> None:
    """Once, where a launcher started several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def _references(directory: Path, prefix: str | None) -> Iterator[Path]:
    found = [path for path in sorted(directory.glob(_FINGERPRINT)) if path.name.startswith(prefix or "")]
    if prefix and not found:
        raise UserError(f"--reference {prefix}: there is none in {directory} that begins so")
    yield from found


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]
