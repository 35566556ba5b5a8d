"""Trackers get the numbers of the trainer's own log, and the names of model and data; each is read back from disk.

``make test-trackers`` installs the trackers and runs this file.
"""

from __future__ import annotations

import importlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.integrations.integration_utils import rewrite_logs

from tests.helpers.toy import make_trainer, preference_data

pytestmark = pytest.mark.slow
Numbers = dict[tuple[int, str], float]  # (step, metric) -> value
# transformers gives wandb these once for a run, and trackio not at all.
_OF_RUN = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def read_tensorboard(folder: Path) -> tuple[Numbers, dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    numbers = {(event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    return numbers, json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])


def read_wandb(folder: Path) -> tuple[Numbers, dict]:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("*.wandb")
    numbers, config = {}, {}
    for data in leveldb_records(file.read_bytes()):
        record = Record.FromString(data)
        values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if values:
            step = values.pop("train/global_step")
            numbers |= {(step, name): value for name, value in values.items() if not name.startswith("_")}
        for item in record.summary.update:
            if (name := item.key or item.nested_key[0]) in _OF_RUN:
                numbers[-1, f"train/{name}"] = json.loads(item.value_json)
        config |= {item.key: json.loads(item.value_json) for item in record.config.update}
    return numbers, config


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yields the records of a log file of LevelDB: parts with a header of 7 bytes, in blocks of 32 KiB.

    The file of wandb begins with 7 bytes of its own.
    """
    block, header, last_kinds = 1 << 15, 7, (1, 4)  # a whole record, and the last part of one
    position, parts = header, b""
    while position + header <= len(log):
        if block - position % block < header:  # padding
            position += block - position % block
            continue
        size, kind = int.from_bytes(log[position + 4 : position + 6], "little"), log[position + 6]
        parts += log[position + header : position + header + size]
        position += header + size
        if kind in last_kinds:
            yield parts
            parts = b""


def read_trackio(folder: Path) -> tuple[Numbers, dict]:
    (file,) = folder.rglob("*.db")
    with sqlite3.connect(file) as connection:
        rows = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
        config = json.loads(connection.execute("SELECT config FROM configs").fetchone()[0])
    steps = [row.pop("train/global_step") for row in rows]
    return {(step, name): value for step, row in zip(steps, rows) for name, value in row.items()}, config


def read_mlflow(folder: Path) -> tuple[Numbers, dict]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs(["0"])
    history = [each for name in run.data.metrics for each in client.get_metric_history(run.info.run_id, name)]
    return {(each.step, each.key): each.value for each in history}, run.data.params


READERS: dict[str, Callable[[Path], tuple[Numbers, dict]]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


def expected(tracker: str, log_history: list[dict[str, Any]]) -> Numbers:
    """Returns the numbers of a trainer's log, by the names that transformers gives a tracker."""
    numbers: Numbers = {}
    for record in log_history:
        logs = {name: value for name, value in record.items() if name != "step"}
        once = {name: logs.pop(name) for name in _OF_RUN if name in logs} if tracker in ("wandb", "trackio") else {}
        named = logs if tracker == "mlflow" else rewrite_logs(logs)
        numbers |= {(record["step"], name): value for name, value in named.items()}
        numbers |= {(-1, f"train/{name}"): value for name, value in once.items() if tracker == "wandb"}
    return numbers


@pytest.mark.parametrize("tracker", READERS)
def test_a_tracker_has_the_numbers_of_the_log(tmp_path, monkeypatch, tracker):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)  # for what ignores the variables below
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", f"{tmp_path}/tensorboard")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", f"{tmp_path}/trackio")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    pytest.importorskip(tracker)
    evaluation = {"eval_dataset": preference_data(4), "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    trainer = make_trainer(tmp_path, max_steps=5, report_to=[tracker], **evaluation)
    trainer.dataset_name = "org/pairs"
    trainer.model.config._name_or_path = "org/base"
    trainer.train()
    if tracker == "wandb":
        importlib.import_module("wandb").teardown()  # its process writes the file

    found, config = READERS[tracker](tmp_path)
    wanted = expected(tracker, trainer.state.log_history)
    assert len(wanted) > 60 and found.keys() == wanted.keys()
    for key, value in wanted.items():
        # TensorBoard keeps fp32.
        assert np.float32(found[key]) == np.float32(value) if tracker == "tensorboard" else found[key] == value, key
    assert (config["model_name_or_path"], config["dataset_name"]) == ("org/base", "org/pairs")
    assert float(config["beta"]) == trainer.args.beta and int(config["max_steps"]) == 5
