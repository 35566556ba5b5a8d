"""``cpt pairs``: builds a preference dataset from responses of models of different strength, and reports on it.

    cpt pairs gpt4.jsonl chatgpt.jsonl davinci.jsonl --order "gpt4 > chatgpt > td003" --output pairs.jsonl

Sources are .jsonl, .json, .parquet or .csv files, folders, or hub datasets. Their rows are
    prompt, model, response          one response; also as instruction, generator, output
    prompt, MODEL, MODEL, ...        a column for each ranked model
    prompt, completions              a list of {model, response, ratings}, as in UltraFeedback
    prompt, generations, generation_models, ratings      parallel lists
    prompt, chosen, rejected         with chosen_model, rejected_model, chosen_rating, rejected_rating
with text or chat messages. Responses to prompts with equal text are paired. A column images (or image) holds the images
of the prompt: paths, relative to the file, URLs, base64 text or bytes. Then prompts are equal only if their images are
(images of URLs by their URLs), and rows are written as messages with {"type": "image"} parts and the column images.

Output rows are prompt, chosen, rejected, chosen_model, rejected_model, and gap: the difference of ranks, win rates or
ratings, always above 0. With --grouped they are prompt, completions (best first), scores, models, and pairs: a list of
[chosen, rejected] positions among the completions. cpt-train reads both. With --sft, each chosen response is also
written once, as prompt, completion and model, for supervised training (NAME.sft.jsonl). With --steps, every answer of
the stronger model is paired with the answer of the weaker one that shares its longest beginning, in whole steps. Rows
are then prompt, initial_steps, chosen_step, chosen_rest, rejected_step and rejected_rest: remove the rests to compare
the steps alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import replacing
from ..pairs.order import Which, parse_order, parse_which
from .console import print_results
from .models import load_named_tokenizer
from .parsing import Parser

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..pairs.build import PairTable
    from ..pairs.files import Responses

# Columns of a leaderboard that may hold the models. AlpacaEval's has no name, which pandas calls "Unnamed: 0".
_MODEL_COLUMNS = ("model_name", "model", "generator", "name", "Unnamed: 0")
_WIN_RATE_COLUMNS = ("length_controlled_winrate", "win_rate")


def main(argv: Sequence[str], prog: str = "cpt pairs") -> None:
    """Builds pairs, and writes them, the report and its pictures."""
    args = _pairs_parser(prog).parse_args(argv)
    files = _check_options(args)
    # Imported after the options are checked, so that --help and mistakes are quick.
    from ..pairs.build import build_pairs, held_out
    from ..pairs.files import is_conversational, load_responses
    from ..pairs.report import make_report, report_lines, report_table
    from ..pairs.steps import step_pairs

    # Read the responses.
    which = parse_which(args.pairs or "all") if args.base is None else Which("base", base=args.base)
    ranking, meaning = _read_ranking(args)
    limits = {unit: most for unit in ("characters", "tokens") if (most := getattr(args, f"max_{unit}")) is not None}
    responses = load_responses(
        args.responses,
        config=args.config,
        split=args.split,
        columns=None if args.columns is None else dict(args.columns),
        models=list(ranking or ()),
        rating=args.ratings,
        tokenizer=load_named_tokenizer(args.tokenizer, "tokenizer") if args.tokenizer else None,
        max_length=limits,
        num_proc=args.num_proc,
    )

    # Build the pairs, and split them by prompt.
    if args.win_rates:
        ranking = _choose_ranked(ranking or {}, responses.models, args.win_rates)
    strength = responses.numbers("rating") if ranking is None else ranking
    pairs = build_pairs(
        *(responses.prompt_keys, responses.models, responses.response_keys, strength, which),
        drops=responses.drops,
        several=args.steps is not None,
    )
    cuts = None
    if args.steps is not None:
        pairs, cuts = step_pairs(responses, pairs, args.steps)
    for_validation = held_out(responses.prompt_keys[pairs.chosen], args.validation)
    chat = args.conversational or is_conversational(responses) or responses.has_images

    # Report and write.
    about = {
        "sources": list(responses.sources),
        "which": args.pairs or (f"against {args.base}" if args.base else "all"),
        "gap": f"difference in {meaning}",
        "strength": ranking,
        "form": "messages" if chat else "text",
        **({} if cuts is None else {"common_characters": float(cuts.mean())}),
    }
    report = make_report(responses, pairs, for_validation, "tokens" if args.tokenizer else "characters", about)
    _write_files(args, files, responses, pairs, for_validation, chat, report, cuts=cuts)
    print_results([report_table(report)], [*report_lines(report), f"written: {', '.join(map(str, files))}"])


def _write_files(
    args: argparse.Namespace,
    files: Sequence[Path],
    responses: Responses,
    pairs: PairTable,
    for_validation: NDArray,  # (P,)
    chat: bool,
    report: dict[str, Any],
    *,
    cuts: NDArray | None,  # (P,) of pairs of steps
) -> None:
    """Writes all files, or none if one cannot be written."""
    from ..pairs.files import group_batches, pair_batches, sft_batches, sft_rows, write_batches
    from ..pairs.report import write_report
    from ..pairs.steps import step_pair_batches

    parts = [~for_validation, *([for_validation] if args.validation else [])]
    batches: Any = group_batches if args.grouped else pair_batches
    if cuts is not None:
        batches = partial(step_pair_batches, cuts=cuts, separator=args.steps)
    with replacing(*files) as temporary:
        for written, path, part in zip(temporary, files, parts):
            total, title = pairs.count_prompts(part) if args.grouped else int(part.sum()), f"Writing {path.name}"
            write_batches(written, path.suffix, batches(responses, pairs, part, chat), total, title)
        if args.sft:
            rows, path = sft_rows(responses, pairs, parts[0]), files[-1]
            batch = sft_batches(responses, rows, chat)
            write_batches(temporary[-1], path.suffix, batch, len(rows), f"Writing {path.name}")
        pictures = {path.suffix[1:]: temporary[i] for i, path in enumerate(files) if path.suffix in (".png", ".svg")}
        write_report(report, temporary[len(parts)], pictures)


def _check_options(args: argparse.Namespace) -> list[Path]:
    """Checks the options, and returns the files to write.

    They are the pairs, the pairs for validation (if any), the report, its pictures, and the rows for SFT (if any).
    """
    files = _output_files(args)
    if sum(option is not None for option in (args.order, args.ratings, args.win_rates)) != 1:
        raise UserError(
            "say once which responses are better: give one of --order 'gpt4 > chatgpt > td003', --ratings COLUMN and"
            " --win_rates FILE"
        )
    for option, other in (("max_tokens", "tokenizer"), ("win_rate_column", "win_rates")):
        if getattr(args, option) is not None and getattr(args, other) is None:
            raise UserError(f"--{option} needs --{other}")
    if args.base is not None and args.pairs is not None:
        raise UserError("--base and --pairs both choose the pairs: give only one of them")
    if not 0 <= args.validation < 1:
        raise UserError(f"--validation {args.validation}: expected a share of the pairs, at least 0 and below 1")
    if args.steps is not None and args.grouped:
        raise UserError("--steps writes a row for each pair, and --grouped one for each prompt: give only one of them")
    if args.steps == "":
        raise UserError("--steps '': give the text with which a step ends, or no text for a line break")
    for option in ("max_characters", "max_tokens", "num_proc"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise UserError(f"--{option} {value}: expected at least 1")
    return files


def _output_files(args: argparse.Namespace) -> list[Path]:
    output = args.output.expanduser()
    if output.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"--output {args.output}: the name must end in .jsonl or .parquet")
    validation = output.with_suffix(f".validation{output.suffix}")
    parts = [output, validation] if args.validation else [output]
    files = [*parts, *(output.with_suffix(f".report{suffix}") for suffix in (".json", ".png", ".svg"))]
    files += [output.with_suffix(f".sft{output.suffix}")] if args.sft else []
    read = [Path(name).expanduser().resolve() for name in (*args.responses, args.win_rates) if name is not None]
    for path in files:
        if path.is_dir():
            raise UserError(f"--output {args.output}: {path} is a folder; choose another name")
        if path.is_file() and any(part in read for part in (path.resolve(), *path.resolve().parents)):
            raise UserError(f"--output {args.output} would replace a file that is read: {path}; choose another name")
    if validation not in files and validation.is_file():
        raise UserError(
            f"--output {args.output}: {validation} is left from an earlier run, and without --validation its prompts"
            " would be among the new pairs; remove it, or choose another name"
        )
    return files


# --- Strength ---


def _read_ranking(args: argparse.Namespace) -> tuple[dict[str, float] | None, str]:
    """Returns the strengths of models (None if ratings rank the responses), and the unit of gaps."""
    if args.order is not None:
        return parse_order(args.order), "ranks"
    if args.ratings is not None:
        return None, f"the rating {args.ratings}"
    from ..data.sources import load_data

    table = load_data(args.win_rates)
    model = next((name for name in _MODEL_COLUMNS if name in table.column_names), None)
    wanted = [args.win_rate_column] if args.win_rate_column else _WIN_RATE_COLUMNS
    column = next((name for name in wanted if name in table.column_names), None)
    if model is None or column is None:
        missing = "no column that names the models" if model is None else f"no column {' or '.join(wanted)}"
        raise UserError(f"{args.win_rates} has {missing}; its columns are {', '.join(table.column_names)}")
    rates: dict[str, float] = {}
    for row, (name, rate) in enumerate(zip(table[model], table[column])):
        if name in rates:
            raise UserError(f"{args.win_rates} row {row}: the model {name} occurs twice")
        try:
            rates[name] = float("nan" if rate is None else rate)
        except ValueError as error:
            raise UserError(f"{args.win_rates} row {row}: {column} of {name} is {rate!r}; expected a number") from error
    return rates, column


def _choose_ranked(rates: Mapping[str, float], models: Iterable[str], source: str) -> dict[str, float]:
    """Returns the win rates of the models that occur in the data."""
    here = list(dict.fromkeys(models))
    chosen = {name: rates[name] for name in here if name in rates}
    if unknown := [name for name, rate in chosen.items() if math.isnan(rate)]:
        raise UserError(f"{source} has no win rate of {unknown[0]}: choose another column with --win_rate_column")
    if len(chosen) < 2:
        raise UserError(
            f"{source} has win rates of {', '.join(chosen) or 'none'} of the models {', '.join(here[:8])}, but two are"
            f" needed; it names {', '.join(map(str, list(rates)[:8]))}, ..."
        )
    return chosen


# --- Options ---


def _pairs_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("responses", nargs="+", metavar="SOURCE", help="a file, a folder or a hub dataset of responses")
    beside = "a .jsonl or .parquet file; the report is written beside it"
    add("--output", type=Path, required=True, metavar="FILE", help=beside)
    add = parser.add_argument_group("which response is better (one of these)").add_argument
    add("--order", metavar="TEXT", help="as 'gpt4 > chatgpt > td003', with = between equal models")
    add("--ratings", metavar="COLUMN", help="column with the rating of each response; for pairs, without chosen_")
    add("--win_rates", metavar="FILE", help="table of models and win rates, like AlpacaEval's leaderboard")
    add("--win_rate_column", metavar="COLUMN", help=f"column of that table [{', else '.join(_WIN_RATE_COLUMNS)}]")
    add = parser.add_argument_group("which pairs").add_argument
    add("--pairs", metavar="TEXT", help="all, adjacent, or 'gpt4 > td003, ...' [all]")
    add("--base", metavar="MODEL", help="only pairs with this model on one side")
    add("--max_characters", type=int, metavar="N", help="longest prompt and response together")
    tokens = "the same in tokens, without those of a chat template or of images"
    add("--max_tokens", type=int, metavar="N", help=tokens)
    add("--tokenizer", metavar="NAME", help="folder or hub name; the report then gives lengths in tokens")
    add = parser.add_argument_group("output").add_argument
    add("--grouped", action="store_true", help="write one row per prompt, with each of its responses once")
    first_steps = (
        "pair the answers, of all that each model gave, that begin with the same steps, and write this beginning, the"
        " next step and the rest; TEXT ends a step [a line break]"
    )
    line_break = {"nargs": "?", "const": "\n", "type": lambda text: text.replace("\\n", "\n")}
    add("--steps", metavar="TEXT", help=first_steps, **line_break)
    add("--sft", action="store_true", help="also write each chosen response once, to NAME.sft.jsonl or .parquet")
    add("--conversational", action="store_true", help="write messages for a chat template, even if the data is text")
    share = "share of the pairs that goes to a second file, as close as whole prompts allow [0]"
    add("--validation", type=float, default=0.0, metavar="SHARE", help=share)
    add = parser.add_argument_group("reading").add_argument
    add("--columns", type=_rename, metavar="OLD=NEW", nargs="+", help="rename columns")
    add("--config", metavar="NAME", help="configuration of a hub dataset")
    add("--split", metavar="NAME", help="split of a folder or hub dataset [train]")
    add("--num_proc", type=int, metavar="N", help="number of processes that read")
    return parser


def _rename(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW")
    return old, new
