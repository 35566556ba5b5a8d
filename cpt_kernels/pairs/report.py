"""Reports what ``cpt pairs`` built, as a table, as JSON and as a picture of length ratios."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from ..plots import distinct, new_figure, save_figure
from .build import DropReason, PairTable, factorize
from .files import Responses

# Column of the table -> key of the report and format.
_COLUMNS = {
    "pairs": ("pairs", ",d"),
    "identical": ("identical", ",d"),
    "tied": ("tied", ",d"),
    "mean\ngap": ("gap", ".3g"),
    "chosen\nlength": ("chosen_length", ",.0f"),
    "rejected\nlength": ("rejected_length", ",.0f"),
    "ratio of\nmeans": ("length_ratio", ".2f"),
    "chosen\nlonger": ("chosen_is_longer", ".0%"),
    "prompt\nshare": ("prompt_share", ".0%"),
}
# How training uses each form of rows.
_FORMS = {
    "text": "training uses the text as it is; for a chat model, build the pairs with --conversational",
    "messages": "training applies the chat template of the model's tokenizer",
}
_EXAMPLES = 5  # number of rows named for each reason
_MOST_ROWS, _MOST_BARS = 24, 12  # model pairs in the table and in the picture
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def make_report(
    responses: Responses, pairs: PairTable, held_out: NDArray[np.bool_], unit: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Counts responses, prompts and pairs, and summarizes lengths, in values that JSON can hold.

    Args:
        responses, pairs: the responses, and the pairs built of them.
        held_out: (P,) whether each pair is for validation.
        unit: "characters" or "tokens", the unit of all lengths.
        about: facts about the run that begin the report. Its ``strength``, if not None, sorts the models; its ``form``
            is the form of the rows, "text" or "messages".

    Returns:
        ``responses``: in, kept, and dropped by reason (in == kept + all dropped). ``prompts``: in, in pairs, for
        validation, and with images. ``pairs``: counts and lengths of all pairs, and of candidates dropped;
        ``by_models``: the same for each pair of models. ``length_ratio`` is mean chosen length / mean rejected length,
        while ``length_ratio_quantiles`` are quantiles of the ratios of single pairs. ``prompt_share`` is p = P / (P +
        C) over all pairs, with C the mean length of the two sides.
    """
    prompt = responses.numbers(f"prompt_{unit}")[pairs.chosen]
    response = responses.numbers(f"response_{unit}")
    lengths = {"prompt": prompt, "chosen": response[pairs.chosen], "rejected": response[pairs.rejected]}
    by_models = _summarize_models(pairs, responses.models, lengths, held_out)
    ranking = about["strength"] or {}
    by_models.sort(key=lambda e: (-ranking.get(e["chosen"], 0), -ranking.get(e["rejected"], 0), -e["pairs"]))
    repeated, opposed = pairs.count_echoes()
    everything = _summarize_pairs(pairs, np.arange(len(pairs)), lengths, held_out)
    return {
        **about,
        "unit": unit,
        "responses": _count_responses(responses, pairs),
        "prompts": {
            "in": int(pairs.prompt.max()) + 1,
            "in_pairs": everything.pop("prompts"),
            "validation": pairs.count_prompts(held_out),
            **_count_images(responses, pairs),
        },
        "pairs": {
            **everything,
            **{"identical": len(pairs.identical), "tied": len(pairs.tied), "repeated": repeated, "opposed": opposed},
        },
        "by_models": by_models,
    }


def _count_responses(responses: Responses, pairs: PairTable) -> dict[str, Any]:
    counts = np.bincount(pairs.drops, minlength=len(DropReason))
    dropped: dict[str, Any] = {}
    for reason in DropReason:
        if reason == DropReason.KEPT or not counts[reason]:
            continue
        rows = np.flatnonzero(pairs.drops == reason)[:_EXAMPLES].tolist()
        dropped[reason.label] = {"count": int(counts[reason]), "first": [responses.name(row) for row in rows]}
        if detail := responses.table["detail"][rows[0]].as_py():
            dropped[reason.label]["detail"] = detail
    return {"in": len(responses), "kept": int(counts[DropReason.KEPT]), "dropped": dropped}


def _count_images(responses: Responses, pairs: PairTable) -> dict[str, int]:
    """Returns the number of prompts in pairs that have images, and of these images; nothing if there are none."""
    first = pairs.chosen[np.unique(pairs.prompt[pairs.chosen], return_index=True)[1]]  # one response of each prompt
    images = responses.numbers("images")[first]
    return {"with_images": int((images > 0).sum()), "images": int(images.sum())} if images.any() else {}


def _summarize_models(
    pairs: PairTable, models: NDArray[np.object_], lengths: dict[str, NDArray], held_out: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Summarizes the pairs of each two models that have pairs, or candidates that were dropped."""
    names, model = list(dict.fromkeys(models)), factorize(models)

    def code(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> NDArray[np.int64]:
        return model[chosen] * len(names) + model[rejected]

    codes = code(pairs.chosen, pairs.rejected)
    dropped = {"identical": code(*pairs.identical.T), "tied": code(*pairs.tied.T)}
    counts = {reason: Counter(of_reason.tolist()) for reason, of_reason in dropped.items()}
    order = np.argsort(codes, kind="stable")
    entries = []
    for key in np.unique(np.concatenate([codes, *dropped.values()])).tolist():
        some = order[slice(*np.searchsorted(codes, [key, key + 1], sorter=order))]
        entry = {"chosen": names[key // len(names)], "rejected": names[key % len(names)]}
        entry |= _summarize_pairs(pairs, some, lengths, held_out)
        entries.append(entry | {reason: found[key] for reason, found in counts.items()})
    return entries


def _summarize_pairs(
    pairs: PairTable, some: NDArray[np.int64], lengths: dict[str, NDArray], held_out: NDArray[np.bool_]
) -> dict[str, Any]:
    """Returns counts and mean lengths of the pairs with the indices ``some``."""
    counts: dict[str, Any] = {"pairs": len(some), "validation": int(held_out[some].sum())}
    counts["prompts"] = pairs.count_prompts(some)
    if not len(some):
        return counts
    prompt, chosen, rejected = (lengths[name][some].astype(np.float64) for name in ("prompt", "chosen", "rejected"))
    ratios = np.quantile(chosen / np.maximum(rejected, 1), _QUANTILES)
    return counts | {
        "gap": float(pairs.gap[some].mean()),
        "prompt_length": float(prompt.mean()),
        "chosen_length": float(chosen.mean()),
        "rejected_length": float(rejected.mean()),
        "length_ratio": float(chosen.mean() / max(rejected.mean(), 1.0)),
        "length_ratio_quantiles": {f"{q:.2f}": float(ratio) for q, ratio in zip(_QUANTILES, ratios)},
        "chosen_is_longer": float((chosen > rejected).mean()),
        "prompt_share": float(prompt.sum() / (prompt + (chosen + rejected) / 2).sum()),
    }


# --- Table ---


def report_table(report: dict[str, Any]) -> Table:
    """Returns a table with a row for each pair of models, and one for all pairs."""
    everything = {"chosen": "all", "rejected": "", **report["pairs"]}
    columns = [column for column in _COLUMNS if column != "tied" or everything["tied"]]
    table = Table(
        title=f"Pairs (lengths in {report['unit']})", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("chosen", "rejected"):
        table.add_column(f"{name}\nmodel", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    shown = report["by_models"][:_MOST_ROWS]
    for entry in [*shown, everything] if len(report["by_models"]) > 1 else shown:
        if entry is everything:
            if more := len(report["by_models"]) - len(shown):
                table.add_row(f"... and {more} more")
            table.add_section()
        cells = (_COLUMNS[column] for column in columns)
        row = (f"{entry[name]:{form}}" if name in entry else "-" for name, form in cells)
        table.add_row(escape(entry["chosen"]), escape(entry["rejected"]), *row)
    return table


def report_lines(report: dict[str, Any]) -> list[str]:
    """Returns lines of text with the counts of responses, prompts and drops, without the counts that are zero."""
    responses, prompts, pairs = report["responses"], report["prompts"], report["pairs"]
    lines = [f"{responses['kept']:,} of {responses['in']:,} responses are in pairs"]
    for reason, drop in responses["dropped"].items():
        more = ", ..." if drop["count"] > len(drop["first"]) else ""
        detail = f"; the first: {drop['detail']}" if "detail" in drop else ""
        lines.append(f"dropped, {reason}: {drop['count']:,} ({', '.join(drop['first'])}{more}{detail})")
    line = f"{prompts['in_pairs']:,} of {prompts['in']:,} prompts are in pairs"
    if prompts["validation"]:
        line += f"; {prompts['validation']:,} of them, with {pairs['validation']:,} pairs, are for validation"
    lines.append(line)
    if prompts.get("images"):
        lines.append(f"{prompts['with_images']:,} prompts in pairs have images, {prompts['images']:,} in all")
    lines.append(f"written as {report['form']}: {_FORMS[report['form']]}")
    if pairs["repeated"] or pairs["opposed"]:
        lines.append(
            f"because models gave identical responses, {pairs['repeated']:,} pairs repeat another pair and"
            f" {pairs['opposed']:,} pairs repeat another pair with chosen and rejected swapped"
        )
    return lines


# --- Picture: kept, because only a picture shows the spread of length ratios, by which training may learn length ---


def write_report(report: dict[str, Any], json_file: Path, pictures: Mapping[str, Path]) -> None:
    """Writes the report as JSON, and a picture of the length ratios into one file per matplotlib format."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    everything = [entry for entry in report["by_models"] if entry["pairs"]]
    entries = everything[:_MOST_BARS][::-1]  # the first at the top
    figure = new_figure(8, 1.5 + 0.4 * len(entries))
    axis = figure.add_subplot()
    for row, entry in enumerate(entries):
        low, first, median, third, high = entry["length_ratio_quantiles"].values()
        axis.plot([low, high], [row, row], color="black", linewidth=1)
        axis.barh(row, third - first, left=first, height=0.6, color="#93b8dd", edgecolor="black")
        axis.plot([median, median], [row - 0.3, row + 0.3], color="black", linewidth=2)
        axis.annotate(f"{median:.2g}", (high, row), (4, 0), textcoords="offset points", va="center", fontsize="small")
    axis.axvline(1, color="grey", linestyle="--", linewidth=1)
    names = distinct((name for entry in entries for name in (entry["chosen"], entry["rejected"])), 24)
    axis.set_yticks(range(len(entries)), [f"{names[e['chosen']]} > {names[e['rejected']]}" for e in entries])
    axis.set_xscale("log")
    axis.margins(x=0.1)
    # 1, 2 and 5 of every decade have a number; with more than two decades only the decades.
    low, high = axis.get_xlim()
    shown = "125" if high / low < 200 else "1"
    numbers = FuncFormatter(lambda ratio, _: f"{ratio:g}" if f"{ratio:e}"[0] in shown else "")
    axis.xaxis.set_major_formatter(numbers)
    axis.xaxis.set_minor_formatter(numbers if shown == "125" else NullFormatter())
    more = len(everything) - len(entries)
    figure.supxlabel(
        "length of chosen / length of rejected: 5, 25, 50, 75 and 95 % of the pairs; beside it the median"
        + (f"\n{more} more pairs of models are not shown" if more else ""),
        fontsize="medium",
    )
    axis.spines[["top", "right"]].set_visible(False)
    for kind, picture in pictures.items():
        save_figure(figure, picture, format=kind)
