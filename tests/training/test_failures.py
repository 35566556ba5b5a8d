"""Four ranks: one is killed and the launcher's restart goes on; one hangs or is stopped and is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from cpt_kernels.training import failures
from tests.helpers import ROOT
from tests.helpers.command import bpe_tokenizer, read_metrics, word_pairs, write_model, write_options, write_rows
from tests.helpers.failing_run import RANK, STEP

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "--max-restarts"]
FSDP2 = ["-m", "accelerate.commands.launch", f"--config_file={ROOT}/cpt_kernels/cli/accelerate_configs/fsdp2.yaml"]
FSDP2 += ["--num_processes=4", "--main_process_port=0", "--max_restarts"]


def launch(
    folder: Path, failure: str, restarts: int = 0, launcher: Sequence[str] = TORCHRUN, **options
) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    script = [str(restarts), "-m", "tests.helpers.failing_run", str(folder), failure]
    command = [sys.executable, *launcher, *script, json.dumps(options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def pairs_by_step(folder: Path, attempt: int) -> dict[int, list[str]]:
    found = defaultdict(list)
    for file in folder.glob(f"out/pairs-{attempt}-*.jsonl"):
        for step, pairs in map(json.loads, file.read_text().splitlines()):
            found[step] += pairs
    return {step: sorted(pairs) for step, pairs in sorted(found.items())}


def losses(folder: Path) -> list[float]:
    state = json.loads(Path(folder, "out/checkpoint-10/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP2], ids=["torchrun", "accelerate launch, FSDP2"])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path, launcher):
    done = launch(tmp_path / "killed", "kill", 2, launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search("restarted after a process failed: the run goes on from .*checkpoint-6", done.stderr)
    whole = launch(tmp_path / "whole", "none")
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected = pairs_by_step(tmp_path / "whole", 0)
    assert [*expected] == list(range(10)) and all(len(pairs) in (4, 8) for pairs in expected.values())
    resumed = pairs_by_step(tmp_path / "killed", 1)
    assert resumed == {step: expected[step] for step in range(6, 10)}
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["sleep", "stop"])
def test_a_rank_that_hangs_is_named(tmp_path, failure):
    done = launch(tmp_path, failure, ddp_timeout=40)
    assert done.returncode != 0
    (line,) = (line for line in done.stderr.splitlines() if "ddp_timeout=40" in line)
    if failure == "stop":
        assert f"rank {RANK} is not answering" in line
    else:
        assert re.search(rf"rank {RANK} is hanging at \S+failing_run.py:\d+ \(training_step\), after step {STEP}", line)
    assert line.count("hanging") == (failure == "sleep") and "ranks 1, 3 are waiting" in line


RUNS = """
import os, signal, sys
from cpt_kernels.cli import train_main
from cpt_kernels.training.loop import PackedLoop
own, attempt = PackedLoop.training_step, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and attempt < 2 and self.state.global_step == (1, 5)[attempt]:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(self, *args, **kwargs)
PackedLoop.training_step = training_step
def save_model(self, *args, **kwargs):
    if attempt == 2 and os.environ["RANK"] == "0" and self._unfinished is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return PackedLoop.__mro__[1].save_model(self, *args, **kwargs)
PackedLoop.save_model = save_model
code = train_main(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.slow
def test_cpt_train_goes_on_by_itself(tmp_path):
    """It is killed before its first checkpoint, after it, and after the last step while the model is saved."""
    pairs = word_pairs(24)
    write_model(tmp_path / "start", bpe_tokenizer(text for row in pairs for text in row.values()))
    write_rows(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "killed.py").write_text(RUNS)
    options = {"model_name_or_path": str(tmp_path / "start"), "from_scratch": True, "max_steps": 7, "save_steps": 3}
    options |= {"save_strategy": "steps", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": 1}
    options |= {"dataset_name": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "out")}
    options |= {"per_device_train_batch_size": 2, "env": {"CPT_CACHE": str(tmp_path / "reference")}}
    file = write_options(tmp_path / "run.yaml", **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command = [sys.executable, *torchrun, str(tmp_path / "killed.py"), "--config", str(file)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"the run goes on from \S+(checkpoint-\d+)", done.stderr)
    assert lines == ["checkpoint-3", "checkpoint-7"]
    steps = [record["step"] for record in read_metrics(tmp_path / "out") if "loss" in record]
    assert steps == list(range(1, 8)) and (tmp_path / "out/model.safetensors").is_file()
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode != 0 and "set resume_from_checkpoint=last to continue it" in again.stderr


def test_what_is_said_of_ranks():
    at = {0: (True, "step 3", "a.py:1 (f)"), 1: (False, "step 2", "b.py:2 (g)"), 4: (True, "step 3", "a.py:1 (f)")}
    posts = {rank: failures._Post(1, *post) for rank, post in at.items()}
    assert failures._describe(posts, [2, 3]) == (
        "ranks 2, 3 are not answering (stopped, or the machine is lost); rank 1 is hanging at b.py:2 (g), after step 2;"
        " ranks 0, 4 are waiting at a.py:1 (f), after step 3"
    )
