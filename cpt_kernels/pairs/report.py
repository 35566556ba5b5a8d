"""What ``cpt pairs`` built, to look at: a table, JSON, a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from .build import DropReason, PairTable, factorize
from .files import Responses

# Column of the table -> figure and its format.
_COLUMNS = {
    "pairs": ("pairs", ",d"),
    "identical": ("identical", ",d"),
    "tied": ("tied", ",d"),
    "mean\ngap": ("gap", ".3g"),
    "chosen\nlength": ("chosen_length", ",.0f"),
    "rejected\nlength": ("rejected_length", ",.0f"),
    "length\nratio": ("length_ratio", ".2f"),
    "chosen\nlonger": ("chosen_is_longer", ".0%"),
    "prompt\nshare": ("prompt_share", ".0%"),
}
# How training reads the form that is written.
_FORMS = {
    "text": "trained on as it is; for a model that is asked through a chat template, give --conversational",
    "messages": "trained on through the chat template of the model's tokenizer",
}
_EXAMPLES = 5  # rows named for each reason
_MOST_ROWS, _MOST_BARS = 24, 12  # model pairs in the table and in the picture
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COLOURS = {
    **{"train": "#3b6ea8", "validation": "#93b8dd", "identical": "#d98b5f", "tied": "#e8c27a"},
    **{"prompt": "#9a9a9a", "chosen": "#3f8f6b", "rejected": "#c0626b", "responses": "#3b6ea8"},
}


def make_report(
    responses: Responses, pairs: PairTable, held_out: NDArray[np.bool_], unit: str, about: dict[str, Any]
) -> dict[str, Any]:
    """Counts and lengths of what was built, ready for JSON.

    Args:
        responses, pairs: from which, and what.
        held_out: (P,) which pairs are for validation.
        unit: "characters" or "tokens", of all lengths.
        about: what was asked for; it comes first. By its ``strength``, if there is one, models are sorted; its ``form``
            is that of the rows, "text" or "messages".

    Returns:
        ``responses``: in, kept, and dropped by reason; in == kept + all dropped. ``prompts``: in, in pairs, held out.
        ``pairs``: all of them, and candidates dropped; ``by_models``: the same for each pair of models. Of pairs,
        ``length_ratio`` is mean chosen length / mean rejected length, ``length_ratio_quantiles`` are of the pairs' own
        ratios, and ``prompt_share`` is p = P / (P + C) over all pairs, C the mean length of the two sides.
    """
    prompt = responses.numbers(f"prompt_{unit}")[pairs.chosen]
    lengths = responses.numbers(f"response_{unit}")
    lengths = {"prompt": prompt, "chosen": lengths[pairs.chosen], "rejected": lengths[pairs.rejected]}
    by_models = _summarize_models(pairs, responses.models, lengths, held_out)
    ranking = about["strength"] or {}
    by_models.sort(key=lambda e: (-ranking.get(e["chosen"], 0), -ranking.get(e["rejected"], 0), -e["pairs"]))
    repeated, opposed = pairs.count_echoes()
    everything = _summarize(pairs, np.arange(len(pairs)), lengths, held_out)
    return {
        **about,
        "unit": unit,
        "responses": _account(responses, pairs),
        "prompts": {
            "in": int(pairs.prompt.max()) + 1,
            "in_pairs": everything.pop("prompts"),
            "validation": pairs.count_prompts(held_out),
        },
        "pairs": {
            **everything,
            **{"identical": len(pairs.identical), "tied": len(pairs.tied), "repeated": repeated, "opposed": opposed},
        },
        "by_models": by_models,
    }


def _account(responses: Responses, pairs: PairTable) -> dict[str, Any]:
    counts = np.bincount(pairs.drops, minlength=len(DropReason))
    dropped = {}
    for reason in DropReason:
        if reason == DropReason.KEPT or not counts[reason]:
            continue
        rows = np.flatnonzero(pairs.drops == reason)[:_EXAMPLES].tolist()
        dropped[reason.label] = {"count": int(counts[reason]), "first": [responses.where(row) for row in rows]}
        if detail := responses.table["detail"][rows[0]].as_py():
            dropped[reason.label]["detail"] = detail
    return {"in": len(responses), "kept": int(counts[DropReason.KEPT]), "dropped": dropped}


def _summarize_models(
    pairs: PairTable, models: Sequence[str], lengths: dict, held_out: NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """As `_summarize`, for each two models that have pairs, or candidates that were dropped."""
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
        entry |= _summarize(pairs, some, lengths, held_out)
        entries.append(entry | {reason: found[key] for reason, found in counts.items()})
    return entries


def _summarize(pairs: PairTable, some: NDArray[np.int64], lengths: dict, held_out: NDArray[np.bool_]) -> dict[str, Any]:
    """The numbered pairs in figures."""
    numbers = {"pairs": len(some), "validation": int(held_out[some].sum()), "prompts": pairs.count_prompts(some)}
    if not len(some):
        return numbers
    prompt, chosen, rejected = (lengths[name][some].astype(np.float64) for name in ("prompt", "chosen", "rejected"))
    ratios = np.quantile(chosen / np.maximum(rejected, 1), _QUANTILES)
    return numbers | {
        "gap": float(pairs.gap[some].mean()),
        "prompt_length": float(prompt.mean()),
        "chosen_length": float(chosen.mean()),
        "rejected_length": float(rejected.mean()),
        "length_ratio": float(chosen.mean() / max(rejected.mean(), 1.0)),
        "length_ratio_quantiles": {f"{q:.2f}": float(ratio) for q, ratio in zip(_QUANTILES, ratios)},
        "chosen_is_longer": float((chosen > rejected).mean()),
        "prompt_share": float(prompt.sum() / (prompt + (chosen + rejected) / 2).sum()),
    }


# --- To look at ---


def report_table(report: dict[str, Any]) -> Table:
    """A row for each pair of models."""
    everything = {"chosen": "all", "rejected": "", **report["pairs"]}
    columns = [column for column in _COLUMNS if column != "tied" or everything["tied"]]
    table = Table(
        title=f"Pairs (lengths in {report['unit']})", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("chosen", "rejected"):
        table.add_column(f"{name}\nmodel", overflow="fold", min_width=12)
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
    """What became of the responses and prompts; what did not happen is left out."""
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
    lines.append(f"written as {report['form']}: {_FORMS[report['form']]}")
    if pairs["repeated"] or pairs["opposed"]:
        lines.append(
            f"as models gave identical responses, {pairs['repeated']:,} pairs repeat another and {pairs['opposed']:,}"
            " have their opposite here"
        )
    return lines


def write_report(report: dict[str, Any], json_file: Path, pictures: Mapping[str, Path]) -> None:
    """Write the report as JSON, and draw it into one file for each of matplotlib's formats that ``pictures`` names."""
    json_file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    entries = report["by_models"][:_MOST_BARS][::-1]  # the first at the top
    rows = max(len(entries), len(report["responses"]["dropped"]) + 1, 4)
    figure = Figure(figsize=(13, 2.6 + 0.8 * rows), layout="constrained")
    counts, ratios, tokens, drops = figure.subplots(2, 2).flat
    labels = [f"{entry['chosen']} > {entry['rejected']}" for entry in entries]
    _draw_counts(counts, entries, labels)
    _draw_ratios(ratios, entries)
    _draw_lengths(tokens, entries, labels, report["unit"])
    _draw_drops(drops, report["responses"])
    left_out = len(report["by_models"]) - len(entries)
    title = f"{report['pairs']['pairs']:,} pairs of {report['prompts']['in_pairs']:,} prompts"
    figure.suptitle(title + (f"; {left_out} more pairs of models are not shown" if left_out else ""))
    for axis in figure.axes:
        bars = len(entries) if axis is not drops else len(report["responses"]["dropped"]) + 1
        axis.set_ylim(bars - rows - 0.6, bars - 0.4)  # bars of one height, from the top
        axis.spines[["top", "right"]].set_visible(False)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold dollars
    for kind, picture in pictures.items():
        figure.savefig(picture, format=kind, dpi=120)


def _draw_counts(axis: Any, entries: Sequence[dict], labels: list[str]) -> None:
    kinds = {"train": [entry["pairs"] - entry["validation"] for entry in entries]}
    kinds |= {name: [entry[name] for entry in entries] for name in ("validation", "identical", "tied")}
    kinds = {name: values for name, values in kinds.items() if name == "train" or any(values)}
    _draw_bars(axis, labels, kinds, [f"{entry['pairs']:,}" for entry in entries])
    axis.set(xlabel="pairs; identical and tied ones are dropped")
    axis.set_title("pairs", loc="left")


def _draw_lengths(axis: Any, entries: Sequence[dict], labels: list[str], unit: str) -> None:
    kinds = {n: [entry.get(f"{n}_length", 0.0) for entry in entries] for n in ("prompt", "chosen", "rejected")}
    _draw_bars(axis, labels, kinds, [f"{entry['prompt_share']:.0%}" if entry["pairs"] else "" for entry in entries])
    axis.set(xlabel=f"{unit}; at the end the prompt's share of prompt + response")
    axis.set_title("mean lengths", loc="left")


def _draw_drops(axis: Any, responses: dict[str, Any]) -> None:
    counts = {"in pairs": responses["kept"]} | {r: drop["count"] for r, drop in responses["dropped"].items()}
    labels, values = list(counts)[::-1], list(counts.values())[::-1]
    _draw_bars(axis, labels, {"responses": values}, [f"{value:,}" for value in values])
    axis.get_legend().remove()
    axis.set(xlabel="responses")
    axis.set_title(f"what became of {responses['in']:,} responses", loc="left")


def _draw_bars(axis: Any, labels: list[str], kinds: dict[str, list[float]], notes: list[str]) -> None:
    """Stacked horizontal bars, with a note at the end of each."""
    left = np.zeros(len(labels))
    for name, values in kinds.items():
        axis.barh(labels, values, left=left, height=0.7, color=_COLOURS[name], label=name)
        left += values
    for row, note in enumerate(notes):
        axis.annotate(note, (left[row], row), (4, 0), textcoords="offset points", va="center", fontsize="small")
    axis.set_xlim(0, 1.1 * max(left.max(), 1))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    axis.legend(fontsize="small", frameon=False, ncols=len(kinds), **place)


def _draw_ratios(axis: Any, entries: Sequence[dict]) -> None:
    for row, entry in enumerate(entries):
        if entry["pairs"]:
            low, first, median, third, high = entry["length_ratio_quantiles"].values()
            axis.plot([low, high], [row, row], color="black", linewidth=1)
            axis.barh(row, third - first, left=first, height=0.6, color=_COLOURS["validation"], edgecolor="black")
            axis.plot([median, median], [row - 0.3, row + 0.3], color="black", linewidth=2)
            place = {"textcoords": "offset points", "va": "center", "fontsize": "small"}
            axis.annotate(f"{median:.2g}", (high, row), (4, 0), **place)
    axis.axvline(1, color="grey", linestyle="--", linewidth=1)
    axis.set_xscale("log")
    axis.margins(x=0.1)
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which(FuncFormatter(lambda ratio, _: f"{ratio:g}" if f"{ratio:e}"[0] in "125" else ""))
    axis.set(xlabel="ratio in a pair: 5, 25, 50, 75 and 95 %; at the end the median", yticks=[])
    axis.set_title("length of chosen / length of rejected", loc="left")
