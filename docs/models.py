"""Sweeps transformers' language models, and writes the outcomes: ``python docs/models.py`` (some minutes).

``tests/model/outcomes.json`` gets what tests expect of each model under the installed version of transformers, and
docs/models.md the tables of the newest version. ``--table`` writes the tables alone, from the outcomes that are there.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTCOMES, PAGE = ROOT / "tests" / "model" / "outcomes.json", ROOT / "docs" / "models.md"
_BLOCK = re.compile(r"(?<=<!-- sweep -->\n).*?(?=<!-- /sweep -->)", re.DOTALL)
_TITLES = {
    "causal": "classes for causal language modeling, by model type",
    "decoder": "encoders with `is_decoder=True`, by model type",
    "image-text": "image-text classes on rows of text, by model type",
}
# Outcome -> its words in the table.
_MEANINGS = {
    "packed": "packed rows",
    "padded rows": "padded rows",
    "padded rows, own logits": "padded rows, with log-probs from the model's own logits",
}


def tables(found: dict) -> str:
    """Returns the models of each outcome under the newest version, as Markdown tables."""
    newest = max(found, key=lambda version: [int(part) for part in version.split(".")])
    parts = []
    for table, outcomes in found[newest].items():
        kinds: dict[str, list[str]] = {outcome: [] for outcome in _MEANINGS}
        for kind, outcome in outcomes.items():
            kinds.setdefault(outcome, []).append(kind)
        lines = [f"transformers {newest}, {_TITLES[table]}:\n", "| how completions run | models |", "|---|---|"]
        for outcome, members in sorted(kinds.items(), key=lambda item: (item[0] not in _MEANINGS, item[0])):
            if members:
                lines.append(f"| {_MEANINGS.get(outcome, outcome)} ({len(members)}) | {', '.join(members)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def updated(page: str, found: dict) -> str:
    """Returns the page with the tables of these outcomes."""
    return _BLOCK.sub(lambda _: tables(found), page)


def main() -> None:
    found = json.loads(OUTCOMES.read_text())
    if sys.argv[1:] != ["--table"]:
        sys.path.insert(0, str(ROOT))
        warnings.simplefilter("ignore")
        import transformers

        from tests.helpers.sweep import TABLES, outcome
        from tests.helpers.tiny_configs import tiny_lm

        for table, (models, changes) in TABLES.items():
            outcomes = found.setdefault(transformers.__version__, {})[table] = {}
            for kind, name in models.items():
                with tempfile.TemporaryDirectory() as folder:
                    outcomes[kind] = outcome(partial(tiny_lm, kind, name, **changes), Path(folder))
                print(f"{kind}: {outcomes[kind]}", flush=True)
        OUTCOMES.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(updated(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
