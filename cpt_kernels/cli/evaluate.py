"""``cpt eval``: evaluates models on held-out pairs, and by a judge on their outputs.

  cpt eval pairs --models runs/sft runs/dpo --data held_out.jsonl
  cpt eval win-rate --outputs dpo.jsonl --baseline sft.jsonl --judge my_package.judges:prefer
  cpt eval win-rate --outputs dpo.jsonl --baseline sft.jsonl --judge_model NAME --base_url URL
  cpt eval export --outputs dpo.jsonl --to model_outputs.json

Every figure has a bootstrap interval over prompts. The command prints tables, and writes the numbers (JSON) and
pictures (PNG, SVG) to --output_dir.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.judge import TEMPLATE, JudgePrompt, Verdicts, ask_endpoint, ask_function, load_judge
from ..evaluation.judged import OutputEvaluation, win_rate_differences
from ..evaluation.outputs import Comparisons, as_alpaca_outputs, join, read_outputs, select_models
from ..evaluation.pair_metrics import LENGTH_EDGES, RATIO_EDGES, PairEvaluation
from ..evaluation.report import (
    difference_lines,
    draw_judged,
    draw_pairs,
    drift_tables,
    length_lines,
    own_references,
    pair_tables,
    win_rate_notes,
    win_rate_table,
)
from ..evaluation.win_rate import DEFAULT_BOOTSTRAP, DEFAULT_LENGTH_PRIOR, Bootstrap, LengthPrior
from ..files import check_writable, replacing, write_text
from ..generation.endpoint import ENDPOINT_DEFAULTS, EndpointOptions
from ..generation.exports import write_alpaca_eval
from ..generation.prompts import Sampling
from .checkpoints import (
    SETTINGS,
    check_model_name,
    choose_reference,
    load_shared_tokenizer,
    loss_of,
    name_models,
    read_configs,
    training_options,
)
from .console import print_results
from .models import load_weights
from .parsing import Parser, add_endpoint_options, or_none, unknown_argument

if TYPE_CHECKING:
    from datasets import Dataset

_JUDGE_FILE = "judged.jsonl"
_DETAILS = (".jsonl", ".parquet")


def main(argv: Sequence[str], prog: str = "cpt eval") -> None:
    """Runs one of the commands."""
    args, rest = _evaluate_parser(prog).parse_known_args(argv)
    own = [name for name in vars(args) if name != "command"]
    args.prog, args.own, args.training = f"{prog} {args.command}", own, rest
    if rest and args.command != "pairs":  # which takes options of cpt-train
        raise UserError(unknown_argument(rest[0], own, args.prog))
    if args.command != "export":
        args.bootstrap = Bootstrap(args.resamples, args.confidence, args.seed)
        _prepare_output(args)
    _COMMANDS[args.command][0](args)


def score_pairs(args: argparse.Namespace) -> None:
    """Evaluates every model on held-out pairs, over all pairs and by group."""
    from accelerate import PartialState

    from ..data.images import holds_images
    from ..data.sources import load_data, parse_columns
    from ..evaluation.pairs import evaluate_pairs
    from .run import quieten

    # The models, their reference, and the options that they were trained with.
    models = name_models(args.models)
    names = list(models.values())
    configs = read_configs(names, args.config)
    reference = choose_reference(args.reference, configs, names)
    if reference is not None:
        check_model_name(reference, "reference")
    given = {"model": names[0], "data": args.data, "output_dir": args.output_dir, "reference": reference}
    options = training_options(configs, args.training, args.own, **given, prog=args.prog)
    quieten(options.training)
    data, loss = load_data(args.data, split=args.split, columns=parse_columns(args.columns)), loss_of(configs)
    tokenizer = load_shared_tokenizer(names, options, images=holds_images(data))

    def loader(name: str, option: str) -> Callable[[], Any]:
        return lambda: load_weights(name, option, options.model, options.training)

    # Evaluate on all ranks; only the main process reports.
    evaluation = evaluate_pairs(
        {name: loader(model, "models") for name, model in models.items()},
        data,
        tokenizer,
        reference=None if reference is None else loader(reference, "reference"),
        args=options.training,
        per_token=loss.per_token,
        by=args.by,
        ratio_edges=args.ratio_edges,
        length_edges=args.length_edges,
        drift=args.drift,
        text=None if args.text is None else _read_plain(args.text),
    )
    if PartialState().is_main_process:
        settings = {"models": models, "reference": reference, "data": args.data, **vars(args.bootstrap)}
        settings |= {name: getattr(options.training, name) for name in ("beta", "max_length", "truncation_mode")}
        settings |= {"loss": loss.name, "rewards": "per token" if loss.per_token else "sums over tokens"}
        notes = [f"rewards are of log-probs per token, as loss '{loss.name}' compares them"] if loss.per_token else []
        _report_pairs(evaluation, args, settings, [*notes, *(f"options from {file}" for file in [*configs][:1])])


def _read_plain(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not a file of plain text in UTF-8 ({error.reason})") from error


def _report_pairs(
    evaluation: PairEvaluation, args: argparse.Namespace, settings: dict[str, Any], notes: list[str]
) -> None:
    """Writes the files, then prints tables and notes."""
    summary, compared = evaluation.summary(args.bootstrap), evaluation.differences(args.bootstrap)
    drifts = evaluation.drift_summary(args.bootstrap)
    reference, data_report = settings["reference"], [*evaluation.report.notes, *evaluation.report.summary()]
    rewards = f"rewards against {reference}" if reference else "rewards from log-probs alone, without a reference"
    title = f"{args.data}: {rewards}, beta {evaluation.beta:g}"
    results = {"settings": settings, "data": data_report, "summary": summary, "differences": compared, "drift": drifts}
    written = [_write_json(args.output_dir / "pairs.json", results), *draw_pairs(summary, args.output_dir, title)]
    if args.details:
        from datasets import Dataset

        written.append(_write_details(args.details, Dataset(evaluation.table())))
    metrics = {"rewards/accuracies": ("accuracy", 100, "+.1f"), "rewards/margins": ("margin", 1, "+.3f")}
    lines = [
        *(f"{model} equals the reference: all its rewards are 0" for model in own_references(summary)),
        *difference_lines(compared, metrics),
        f"{title}; log-probs are sums over the tokens of a response, in nats",
        *notes,
        *data_report,
    ]
    print_results([*pair_tables(summary, args.confidence), *drift_tables(drifts)], [*lines, _written(written)])


def judge_outputs(args: argparse.Namespace) -> None:
    """Lets a judge compare outputs with a baseline's."""
    prior = LengthPrior(*args.length_prior)
    ask = make_judge(args)
    evaluations = [OutputEvaluation(each, ask(each)) for each in _read_comparisons(args)]
    summaries = [evaluation.summary(args.bootstrap, prior) for evaluation in evaluations]
    compared = win_rate_differences(evaluations, args.bootstrap)
    settings = {"outputs": args.outputs, "baseline": args.baseline, "judge": args.judge or args.judge_model}
    settings |= {"length_prior": vars(prior), **vars(args.bootstrap)}
    results = {"settings": settings, "models": summaries, "differences": compared}
    written = [_write_json(args.output_dir / "win_rate.json", results), *draw_judged(summaries, args.output_dir)]
    if args.details:
        from datasets import Dataset

        rows = [row for evaluation in evaluations for row in evaluation.rows()]
        written.append(_write_details(args.details, Dataset.from_list(rows)))
    lines = [
        *difference_lines(compared, {"win_rate": ("win rate", 100, "+.1f")}),
        *(note for summary in summaries for note in win_rate_notes(summary)),
        *length_lines(summaries, prior),
    ]
    print_results([win_rate_table(summaries, args.confidence)], [*lines, _written(written)])


def export_outputs(args: argparse.Namespace) -> None:
    """Writes a model's outputs in the form that ``alpaca_eval --model_outputs`` reads."""
    found = read_outputs(args.outputs)
    chosen = select_models(found, [args.model] if args.model else list(found), "model")
    if len(chosen) > 1:
        raise UserError(f"{args.outputs} has outputs of {', '.join(found)}: choose one by --model")
    write_alpaca_eval(args.to, chosen[0].model, as_alpaca_outputs(chosen[0]))
    print(f"{len(chosen[0])} outputs of {chosen[0].model} written to {args.to}")


# --- Outputs and their judge ---


def _read_comparisons(args: argparse.Namespace) -> list[Comparisons]:
    """Reads the outputs of the baseline and of every model, and pairs them by prompt."""
    of_baseline = read_outputs(args.baseline)
    wanted = [args.baseline_model] if args.baseline_model else list(of_baseline)
    if len(wanted) > 1:
        raise UserError(f"{args.baseline} has outputs of {', '.join(wanted)}: choose one by --baseline_model")
    (baseline,) = select_models(of_baseline, wanted, "baseline_model")
    outputs = [each for path in args.outputs for each in read_outputs(path).values()]
    names = [each.model for each in outputs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"outputs of {twice[0]} are in several files: give only one of the files")
    if args.models:
        outputs = select_models({each.model: each for each in outputs}, args.models, "models")
    elif len(outputs) > 1:
        outputs = [each for each in outputs if each != baseline]
    return [join(each, baseline) for each in outputs]


def make_judge(args: argparse.Namespace) -> Callable[[Comparisons], Verdicts]:
    """Returns a function that asks the judge for its verdicts.

    Args:
        args: has the options of :func:`add_judge_options`, and ``output_dir``.
    """
    if args.judge:
        given = [name for name, default in JUDGE_MODEL_DEFAULTS.items() if getattr(args, name) != default]
        if given:
            raise UserError(f"{given[0]} has no effect with a Python function as judge, only with --judge_model")
        judge = load_judge(args.judge)
        return lambda comparisons: ask_function(judge, comparisons, args.both_orders)
    endpoint = EndpointOptions(args.judge_model, **{name: getattr(args, name) for name in ENDPOINT_DEFAULTS})
    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, chat=True)
    template = JudgePrompt(args.judge_template)
    file = args.judge_file or args.output_dir / _JUDGE_FILE
    return lambda comparisons: ask_endpoint(comparisons, endpoint, sampling, file, template)


# --- Results ---


def _prepare_output(args: argparse.Namespace) -> None:
    """Creates the output folder before anything is scored, so that a mistake does not cost a run."""
    if args.details and args.details.suffix not in _DETAILS:
        raise UserError(f"details={args.details}: expected a {' or '.join(_DETAILS)} file")
    check_writable(args.output_dir, f"output_dir={args.output_dir}")


def _write_json(path: Path, results: dict[str, Any]) -> Path:
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return path


def _write_details(path: Path, rows: Dataset) -> Path:
    from ..data.rows import write_rows

    with replacing(path) as (temporary,):
        write_rows(rows, temporary, path.suffix)
    return path


def _written(files: Iterable[Path]) -> str:
    return f"written: {', '.join(map(str, files))}"


# --- Options ---

_COMMANDS = {
    "pairs": (score_pairs, "implicit reward accuracy, margins and log-probs on held-out pairs"),
    "win-rate": (judge_outputs, "win rate against a baseline's outputs, plain and length-controlled"),
    "export": (export_outputs, "outputs in the form of alpaca_eval's model_outputs.json"),
}
JUDGE_MODEL_DEFAULTS = {
    **ENDPOINT_DEFAULTS,
    "judge_file": None,
    "judge_template": TEMPLATE,
    "max_new_tokens": 1024,
    "temperature": 0.0,
}


def _evaluate_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    made = {name: commands.add_parser(name, help=help, description=help) for name, (_, help) in _COMMANDS.items()}
    _add_pairs_options(made["pairs"])
    _add_win_rate_options(made["win-rate"])
    default = DEFAULT_BOOTSTRAP
    for name in ("pairs", "win-rate"):
        group = made[name].add_argument_group("Intervals and files")
        group.add_argument("--confidence", type=float, default=default.confidence, metavar="P", help="[%(default)s]")
        group.add_argument("--resamples", type=int, default=default.resamples, metavar="N", help="[%(default)s]")
        group.add_argument(
            "--seed", type=int, default=default.seed, metavar="N", help="of the resampling [%(default)s]"
        )
        group.add_argument("--output_dir", type=Path, default=Path("runs/eval"), metavar="FOLDER", help="[%(default)s]")
        group.add_argument("--details", type=Path, metavar="FILE", help="also write each pair: .jsonl or .parquet")
    add = made["export"].add_argument
    add("--outputs", required=True, metavar="FILE", help="outputs of cpt generate")
    add("--model", metavar="NAME", help="the model to export, if the file has several")
    add("--to", required=True, type=Path, metavar="FILE", help="the JSON file to write")
    return parser


def _add_pairs_options(parser: argparse.ArgumentParser) -> None:
    names = textwrap.wrap(", ".join(f"--{name}" for name in SETTINGS), 112, break_on_hyphens=False)
    parser.epilog = "\n  ".join(["options of cpt-train, with the values of training or else their defaults:", *names])
    group = parser.add_argument_group("Models and data")
    add = group.add_argument
    add("--models", nargs="+", required=True, metavar="MODEL", help="folders or hub names; NAME=MODEL names one")
    add("--data", required=True, metavar="DATA", help="pairs: a file, a folder or a hub name")
    add("--split", metavar="NAME", help="split of the data")
    add("--columns", nargs="+", metavar="NAME", help="columns to read: name, or 'name in the data=name here'")
    of_reference = "folder or hub name, or none [from the training_config.yaml beside the models]"
    add("--reference", metavar="MODEL", help=of_reference)
    add("--config", type=Path, metavar="FILE", help="training configuration with the options and the reference")
    add = parser.add_argument_group("What training changed, against the reference").add_argument
    measures = "on every token of the responses: KL, likeliest tokens, entropy, perplexity"
    add("--drift", action="store_true", help=measures)
    add("--text", type=Path, metavar="FILE", help="the same on a file of plain text, which shows what a model lost")
    add = parser.add_argument_group("Groups").add_argument
    add("--by", nargs="+", default=[], metavar="COLUMN", help="columns to group by, besides the models of a pair")
    ratios, lengths = (" ".join(map(str, edges)) for edges in (RATIO_EDGES, LENGTH_EDGES))
    of_ratios = f"chosen / rejected tokens [{ratios}]"
    add("--ratio_edges", nargs="+", type=float, default=RATIO_EDGES, metavar="X", help=of_ratios)
    add("--length_edges", nargs="+", type=float, default=LENGTH_EDGES, metavar="N", help=f"chosen tokens [{lengths}]")


def _add_win_rate_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Outputs").add_argument
    form = "prompt, model, response (cpt generate), or instruction, output, generator (AlpacaEval)"
    add("--outputs", nargs="+", required=True, metavar="FILE", help=form)
    add("--baseline", required=True, metavar="FILE", help="the baseline's outputs")
    add("--models", nargs="+", metavar="NAME", help="use only the outputs of these models")
    add("--baseline_model", metavar="NAME", help="the baseline, if its file has several models")
    add_judge_options(parser, required=True)
    parser.add_argument(
        "--length_prior",
        nargs=2,
        type=float,
        default=(DEFAULT_LENGTH_PRIOR.mean, DEFAULT_LENGTH_PRIOR.sd),
        metavar=("MEAN", "SD"),
        help="the judge's preference for length in log-odds, for the length-controlled rate; 0 0.1: it has none"
        f" [{DEFAULT_LENGTH_PRIOR.mean:g} {DEFAULT_LENGTH_PRIOR.sd:g}, GPT-4's]",
    )


def add_judge_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the options of a judge, which :func:`make_judge` reads with ``output_dir``."""
    group = parser.add_argument_group("The judge")
    judge = group.add_mutually_exclusive_group(required=required)
    judge.add_argument(
        "--judge",
        metavar="MODULE:FUNCTION",
        help="called with prompt, output_1, output_2; returns a preference for output_1 in [0, 1], or 'output_1',"
        " 'output_2' or 'tie'",
    )
    judge.add_argument("--judge_model", metavar="NAME", help="a model behind an OpenAI-compatible endpoint")
    group.add_argument(
        "--both_orders", action="store_true", help="also ask with the outputs swapped [always for --judge_model]"
    )
    group = parser.add_argument_group("The judging model")
    add = group.add_argument
    of_file = f"file of its replies, which are reused [{_JUDGE_FILE} in --output_dir]"
    add("--judge_file", type=Path, metavar="FILE", help=of_file)
    add("--judge_template", type=Path, metavar="FILE", help=f"jinja: prompt, output_1, output_2 [{TEMPLATE.name}]")
    add("--max_new_tokens", type=int, metavar="N", help="[%(default)s]")
    add("--temperature", type=or_none(float), metavar="T", help="none: leave it to the endpoint [%(default)s]")
    add_endpoint_options(group)
    parser.set_defaults(**JUDGE_MODEL_DEFAULTS)
