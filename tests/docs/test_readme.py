"""The generated figures of README.md and docs/benchmarks.md agree with the recorded results."""

from __future__ import annotations

import json

import pytest

from bench import readme


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_the_newest_results(page) -> None:
    text = page.read_text()
    assert readme._BLOCK.search(text), f"{page.name} has no figures"
    assert readme.updated(text) == text, "run: python -m bench readme"


def test_every_block_is_on_a_page() -> None:
    shown = {match[2] for page in readme.PAGES for match in readme._BLOCK.finditer(page.read_text())}
    assert shown == readme.BLOCKS.keys()


def test_a_block_is_replaced_and_the_rest_is_kept(monkeypatch) -> None:
    monkeypatch.setitem(readme.BLOCKS, "speed", lambda result: f"{result['value']} a second\n\n")
    monkeypatch.setattr(readme, "newest", lambda subject, machine: {"value": len(machine)})
    text = "before\n<!-- bench: speed a-machine -->\nold\nlines\n<!-- /bench -->\nafter\n"
    assert readme.updated(text) == text.replace("old\nlines", "9 a second")


def test_newest_result_of_a_subject(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    for name, day in (("b", 1), ("a", 3), ("c", 2)):
        (tmp_path / "m" / f"{name}.json").write_text(json.dumps({"step": {"date": f"2026-01-0{day}"}}))
    assert readme.newest("step", "m", tmp_path)["date"] == "2026-01-03"
    with pytest.raises(ValueError, match="no result of 'head'"):
        readme.newest("head", "m", tmp_path)
    with pytest.raises(ValueError, match="no block for 'nothing'"):
        readme.block("nothing", "m")
