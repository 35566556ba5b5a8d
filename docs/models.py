"""Sweeps transformers' causal language models, and writes the outcomes: ``python docs/models.py`` (some minutes).

``tests/model/outcomes.json`` gets what tests expect of each model, and docs/models.md a table of it. ``--table`` writes
the table alone, from the outcomes that are there.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTCOMES, PAGE = ROOT / "tests" / "model" / "outcomes.json", ROOT / "docs" / "models.md"
_BLOCK = re.compile(r"(?<=<!-- sweep -->\n).*?(?=<!-- /sweep -->)", re.DOTALL)
# Outcome -> what it means for a user.
_MEANINGS = {
    "packed": "packed rows",
    "padded rows": "padded rows",
    "padded rows, own logits": "padded rows, with log-probs from the model's own logits",
    "refused": "refused: not causal as its config is by default, or its own forward is not reproducible",
    "not buildable": "not run: the class cannot be built from its own defaults",
}


def table(found: dict) -> str:
    """Returns the models of each outcome as a Markdown table."""
    lines = [f"transformers {found['transformers']}:\n", "| how completions run | models |", "|---|---|"]
    for outcome, meaning in _MEANINGS.items():
        kinds = [kind for kind, text in found["outcomes"].items() if text.split(":")[0] == outcome]
        lines.append(f"| {meaning} ({len(kinds)}) | {', '.join(kinds)} |")
    return "\n".join(lines) + "\n"


def updated(page: str, found: dict) -> str:
    """Returns the page with the table of these outcomes."""
    return _BLOCK.sub(lambda _: table(found), page)


def main() -> None:
    if sys.argv[1:] != ["--table"]:
        sys.path.insert(0, str(ROOT))
        warnings.simplefilter("ignore")
        import transformers

        from tests.helpers.tiny_configs import causal_models
        from tests.model.test_sweep import outcome

        outcomes = {}
        for kind in causal_models():
            outcomes[kind] = outcome(kind)
            print(f"{kind}: {outcomes[kind]}", flush=True)
        found = {"transformers": transformers.__version__, "outcomes": outcomes}
        OUTCOMES.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(updated(PAGE.read_text(), json.loads(OUTCOMES.read_text())))


if __name__ == "__main__":
    main()
