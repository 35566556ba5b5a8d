"""The log records of a run, TRL's and ours: the closing record has the metrics of the steps after the last log."""

from __future__ import annotations

import pytest
from transformers import PrinterCallback, TrainerCallback

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import word_tokenizer
from tests.helpers.trl_runs import LOGPS, METRIC_TOLERANCE, REWARDS, one_thread, rows

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")

OURS = ("tokens_per_second", "peak_memory_gib")
COMPARED = ("loss", "train_loss", "learning_rate", *REWARDS, *LOGPS)


class StopAfterFour(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == 4


def records(trainer_class, config_class, folder, stream=False, eval_sets=False, stop=False, resume=False, **options):
    """Trains on 6 steps of 4 rows an epoch; returns the log records of training and what train() returns."""
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
    defaults |= {"bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"gradient_checkpointing": False, "output_dir": str(folder)}
    if config_class is ContrastiveConfig:
        defaults["ref_cache_dir"] = f"{folder}/cache"

    def trainer():
        made = trainer_class(
            tiny_model("qwen2"),
            tiny_model("qwen2"),
            args=config_class(**{**defaults, **options}),
            train_dataset=rows().to_iterable_dataset() if stream else rows(),
            eval_dataset={"a": rows(5), "b": rows(9)} if eval_sets else None,
            processing_class=word_tokenizer(),
            callbacks=[StopAfterFour()] if stop else [],
        )
        made.remove_callback(PrinterCallback)
        return made

    made = trainer()
    if resume:
        made.train()
        made = trainer()
    output = made.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if resume else None)
    return [record for record in made.state.log_history if not any(k.startswith("eval_") for k in record)], output


@pytest.mark.parametrize(
    ("options", "steps", "tail"),
    [
        ({"max_steps": 5, "logging_steps": 10}, [5], True),
        ({"max_steps": 5, "logging_strategy": "no"}, [5], True),
        ({"max_steps": 7, "logging_steps": 0.4}, [3, 6, 7], True),
        ({"max_steps": 8, "logging_strategy": "epoch"}, [6, 8, 8], False),
        ({"max_steps": 4, "logging_steps": 2}, [2, 4, 4], False),
        ({"max_steps": 9, "logging_steps": 3, "stop": True}, [3, 4], True),
        ({"max_steps": 5, "logging_steps": 3, "stream": True}, [3, 5], True),
        ({"max_steps": 5, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2, "resume": True}, [4, 5], True),
    ],
    ids=["none", "no", "share", "epoch", "whole", "stopped", "stream", "resumed"],
)
def test_every_record_is_trls(tmp_path, options, steps, tail):
    theirs, _ = records(trl.DPOTrainer, trl.DPOConfig, tmp_path / "trl", **options)
    ours, output = records(ContrastiveTrainer, ContrastiveConfig, tmp_path / "ours", **options)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == steps
    for a, b in zip(ours, theirs):
        assert a.keys() - set(OURS) == b.keys()
        for name in b.keys() & set(COMPARED):
            assert a[name] == pytest.approx(b[name], abs=METRIC_TOLERANCE), (a["step"], name)
    assert ("rewards/margins" in ours[-1]) == ("rewards/margins" in output.metrics) == tail


def test_an_evaluation_leaves_the_closing_record_whole(tmp_path):
    """TRL loses the last steps' metrics if an evaluation of several sets came in between."""
    options = {"max_steps": 5, "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "eval_sets": True}
    plain = {"max_steps": 5, "logging_steps": 3}
    ours, expected = (
        records(ContrastiveTrainer, ContrastiveConfig, tmp_path, **given)[0] for given in (options, plain)
    )
    for name in (*REWARDS, *LOGPS, "num_tokens"):
        assert ours[-1][name] == expected[-1][name]
