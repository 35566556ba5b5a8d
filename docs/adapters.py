"""Sweeps PEFT's adapters, and writes the outcomes: ``python docs/adapters.py`` (some minutes).

``tests/model/adapter_outcomes.json`` gets what tests expect of each adapter, and docs/models.md tables of it.
``--table`` writes the tables alone, from the outcomes that are there.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTCOMES, PAGE = ROOT / "tests" / "model" / "adapter_outcomes.json", ROOT / "docs" / "models.md"
_BLOCK = re.compile(r"(?<=<!-- adapters -->\n).*?(?=<!-- /adapters -->)", re.DOTALL)
_PLACES = ("attention", "mlp", "head", "embedding")
_BY_PEFT = ("refused: peft_config", "not buildable")  # outcomes of combinations that PEFT itself does not have


def tables(found: dict) -> str:
    """Returns adapters by what becomes of them on each kind of module, and why some are refused, as Markdown tables."""
    rows: dict[str, dict[str, str]] = {}
    reasons: dict[str, list[str]] = {}
    for case, outcome in found["outcomes"].items():
        adapter, place = case.split(" / ")
        cells = rows.setdefault(adapter, {})
        if outcome.startswith(_BY_PEFT):
            cells[place] = "-"
        else:
            cells[place], _, reason = outcome.partition(": ")
            if reason and adapter not in reasons.setdefault(reason, []):
                reasons[reason].append(adapter)
    # Adapters with the same cells share a line.
    lines: dict[tuple[str, ...], list[str]] = {}
    for adapter, cells in rows.items():
        lines.setdefault(tuple(cells.get(place, cells.get("model", "")) for place in _PLACES), []).append(adapter)
    table = [f"| {', '.join(adapters)} | {' | '.join(cells)} |" for cells, adapters in lines.items()]
    refused = [f"| {', '.join(adapters)} | {reason} |" for reason, adapters in reasons.items()]
    return "\n".join(
        [
            f"PEFT {found['peft']}; - stands for what PEFT does not have, or has with packages that are missing:\n",
            "| adapter | on attention | on the MLP | on the head | on the embedding |\n|---|---|---|---|---|",
            *table,
            "\n| refused | why |\n|---|---|",
            *refused,
            "",
        ]
    )


def updated(page: str, found: dict) -> str:
    """Returns the page with the tables of these outcomes."""
    return _BLOCK.sub(lambda _: tables(found), page)


def main() -> None:
    if sys.argv[1:] != ["--table"]:
        sys.path.insert(0, str(ROOT))
        warnings.simplefilter("ignore")
        import peft

        from tests.helpers.adapter_sweep import outcome
        from tests.helpers.adapters import cases

        outcomes = {}
        for name, build in cases().items():
            with tempfile.TemporaryDirectory() as folder:
                outcomes[name] = outcome(build, Path(folder))
            print(f"{name}: {outcomes[name]}", flush=True)
        OUTCOMES.write_text(json.dumps({"peft": peft.__version__, "outcomes": outcomes}, indent=1) + "\n")
    PAGE.write_text(updated(PAGE.read_text(), json.loads(OUTCOMES.read_text())))


if __name__ == "__main__":
    main()
