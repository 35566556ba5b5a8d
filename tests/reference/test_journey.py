"""`Reference.fill` calls functions in the order in which docs/architecture.md lists them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import cpt_kernels
from cpt_kernels import ContrastiveTrainer
from cpt_kernels.reference.scorer import Reference
from tests.helpers import ROOT
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, preference_data, word_tokenizer

PACKAGE = Path(cpt_kernels.__file__).parent


def listed() -> list[str]:
    """The functions of the journey from the model to disk."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    steps = text.split("From the model to disk, in `fill`:")[1].split("From disk to the loss")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", steps, flags=re.MULTILINE)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified name")
def test_the_journey_is_in_the_order_of_the_calls(tmp_path, monkeypatch):
    called: dict[str, None] = {}  # in the order of the first calls
    fill = Reference.fill

    def record(frame, event, _) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
            called[f"{module}.{frame.f_code.co_qualname}"] = None

    def recorded_fill(*arguments) -> None:
        sys.setprofile(record)
        try:
            fill(*arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setattr(Reference, "fill", recorded_fill)
    ContrastiveTrainer(
        tiny_model("llama"),
        args=config(tmp_path, max_steps=1),
        train_dataset=preference_data(4),
        processing_class=word_tokenizer(),
    )
    names = listed()
    assert len(names) > 8 and [name for name in called if name in names] == names
