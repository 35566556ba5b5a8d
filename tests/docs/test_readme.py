"""README and recorded results agree."""

from __future__ import annotations

import json

import pytest

from bench import readme


def test_figures_are_those_of_the_newest_results() -> None:
    text = readme.README.read_text()
    assert readme._BLOCK.search(text), "the README has no figures"
    assert readme.written(text) == text, "run: python -m bench readme"


def test_a_block_is_replaced_and_the_rest_is_kept(monkeypatch) -> None:
    monkeypatch.setitem(readme.BLOCKS, "speed", lambda result: f"{result['value']} a second\n\n")
    monkeypatch.setattr(readme, "newest", lambda subject, machine: {"value": len(machine)})
    text = "before\n<!-- bench: speed a-machine -->\nold\nlines\n<!-- /bench -->\nafter\n"
    assert readme.written(text) == text.replace("old\nlines", "9 a second")


def test_newest_result_of_a_subject(tmp_path) -> None:
    (tmp_path / "m").mkdir()
    for name, day in (("b", 1), ("a", 3), ("c", 2)):
        (tmp_path / "m" / f"{name}.json").write_text(json.dumps({"step": {"date": f"2026-01-0{day}"}}))
    assert readme.newest("step", "m", tmp_path)["date"] == "2026-01-03"
    with pytest.raises(ValueError, match="no result of 'head'"):
        readme.newest("head", "m", tmp_path)
    with pytest.raises(ValueError, match="no block for 'nothing'"):
        readme.block("nothing", "m")
