"""Ten steps of a real chat model equal TRL's."""

from __future__ import annotations

import random

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_kernels.demo.real.experiment import convert_model
from cpt_kernels.demo.real.instructions import make_instructions
from cpt_kernels.demo.teachers import TEACHERS
from tests.helpers.smollm2 import smollm2  # noqa: F401, a fixture
from tests.helpers.trl_runs import assert_same_steps, run_ours, run_trl


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2")
def test_ten_steps_of_smollm2_are_trls(tmp_path):
    """All weights in fp32, on the same pairs in the same order, rendered by the model's own chat template."""
    convert_model(tmp_path / "chat")
    rng = random.Random(0)
    strong, _, weak = TEACHERS
    rows = [
        {
            "prompt": [{"role": "user", "content": each.prompt}],
            "chosen": [{"role": "assistant", "content": each.respond(strong, rng)}],
            "rejected": [{"role": "assistant", "content": each.respond(weak, rng)}],
        }
        for each in make_instructions({"train": 30}, rng)["train"]
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]][:10]  # ours leaves out pairs of equal responses
    options = {"max_steps": 10, "per_device_train_batch_size": 1, "learning_rate": 1e-5}
    options["processing_class"] = AutoTokenizer.from_pretrained(tmp_path / "chat")
    records = {}
    for name, run in (("trl", run_trl), ("ours", run_ours)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
        records[name] = run(tmp_path / name, Dataset.from_list(rows), model=model, **options)
    losses = {name: [log["loss"] for log in record.logs] for name, record in records.items()}
    print("losses:", losses, "largest difference:", max(abs(a - b) for a, b in zip(*losses.values())))
    assert_same_steps(records["ours"], records["trl"], ())
    assert sum(losses["ours"][5:]) < 5 * losses["ours"][0]  # the model learns
