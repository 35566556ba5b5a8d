"""Writes the tables of docs/losses.md from the losses and their options: ``python docs/losses.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from cpt_kernels.losses import LOSSES, LossOptions, loss_options
from cpt_kernels.losses.options import SYMBOLS, default_of

PAGE = Path(__file__).with_suffix(".md")
_BLOCK = re.compile(r"(<!-- (\w+): python docs/losses.py -->\n).*?(<!-- end -->)", re.DOTALL)


def loss_rows() -> Iterator[str]:
    """Yields the table of losses, a Markdown line each."""
    yield "| `loss_type` | loss of a pair | source | reference | separable | TRL 1.16 |"
    yield "|---|---|---|---|---|---|"
    for name, entry in LOSSES.items():
        reference, separable = ("yes" if holds else "no" for holds in (entry.needs_reference, entry.separable))
        trl = "—" if entry.trl is None else re.sub(r"\b[a-z_]+$", r"`\g<0>`", entry.trl)
        yield f"| `{name}` | `{entry.equation}` | {entry.source} | {reference} | {separable} | {trl} |"


def option_rows(options: type[LossOptions] = LossOptions) -> Iterator[str]:
    """Yields the table of the options of single losses, a Markdown line each."""
    yield "| option | in equations | default | losses | meaning |"
    yield "|---|---|---|---|---|"
    for option in fields(options):
        takers = [f"`{name}`" for name in LOSSES if option.name in loss_options(name)]
        others = [f"`{name}`" for name in LOSSES if option.name not in loss_options(name)]
        if takers:
            shown = ", ".join(takers) if len(takers) <= len(others) else f"all but {', '.join(others)}"
            symbol, default = SYMBOLS.get(option.name, ""), str(default_of(option)).lower()
            yield f"| `{option.name}` | {symbol} | {default} | {shown} | {option.metadata['help']} |"


def reward_rows() -> Iterator[str]:
    """Yields the table of rewards, a Markdown line each."""
    yield "| reward of chosen, in logs and `cpt eval pairs` | losses |"
    yield "|---|---|"
    losses: dict[str, list[str]] = {}
    for name, entry in LOSSES.items():
        reward = "β·Δw" if entry.needs_reference else "β·lw/nw" if entry.per_token else "β·lw"
        losses.setdefault(reward, []).append(f"`{name}`")
    for reward, names in losses.items():
        yield f"| `{reward}` | {', '.join(names)} |"


def written(text: str) -> str:
    """Returns the page with its tables replaced."""
    rows = {"losses": lambda: (*loss_rows(), "", *reward_rows()), "options": option_rows}
    return _BLOCK.sub(lambda match: match[1] + "\n".join(rows[match[2]]()) + "\n" + match[3], text)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
