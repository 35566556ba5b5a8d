"""Parts of ``gpu_check`` that are not benchmarks: the machine, the tests, and a few training steps."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from cpt_kernels.ops.attention.select import capabilities
from cpt_kernels.ops.attention.varlen import Abilities
from cpt_kernels.ops.backends import has_extension

from ..timing import MIB, ROOT, versions
from .meter import Context, Row

# Test files that use the GPU, kernels first.
TESTS = (
    "ops/test_vocab_score.py",
    "ops/test_pair_loss.py",
    "ops/attention/test_varlen.py",
    "ops/test_linear_preference.py",
    "ops/head/test_backends.py",
    "ops/attention/test_attention.py",
    "ops/test_csrc.py",
    "model/test_packed_model.py",
    "training/test_waiting.py",
)


def run_limited(command: Sequence[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Runs a command for at most ``seconds``. Returns (exit code, output).

    After the time limit, the command is killed with all processes that it started, and the exit code is ``None``.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, **environment},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return code, output.read()


# --- The machine ---


def environment(context: Context) -> Iterator[Row]:
    """Reports packages, GPU, kernels, and the abilities of every attention kernel."""

    def packages() -> Row:
        found = versions()
        return {"result": ", ".join(f"{name} {version}" for name, version in found.items()), "versions": found}

    def gpu() -> Row:
        about = torch.cuda.get_device_properties(0)
        memory, cache = about.total_memory / MIB / 1024, about.L2_cache_size / MIB
        text = f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} SMs, {memory:.0f} GiB"
        return {"result": f"{text}, L2 {cache:.0f} MiB, CUDA {torch.version.cuda}"}

    def kernels() -> Row:
        triton = importlib.util.find_spec("triton") is not None
        return {
            "result": f"extension {'built' if has_extension() else 'not built'},"
            f" triton {'installed' if triton else 'not installed'}"
        }

    yield from context.attempt("packages", packages)
    if context.device == "cuda":
        yield from context.attempt("gpu", gpu)
    yield from context.attempt("kernels", kernels)
    for name, abilities in capabilities().items():
        yield {"what": f"attention: {name}", "result": abilities if isinstance(abilities, str) else _words(abilities)}


def _words(abilities: Abilities) -> str:
    """Describes what an attention kernel supports."""
    can = [name for name in ("gqa", "window", "softcap", "sinks", "dropout") if getattr(abilities, name)]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in abilities.dtypes or ()] or ["all dtypes"]
    heads = f"head size {abilities.head_size or 'any'}"
    return "; ".join([" ".join(can), ", ".join(dtypes), heads, f"on {abilities.device or 'any device'}"])


# --- The tests ---


def tests(context: Context) -> Iterator[Row]:
    """Runs pytest on every file of kernel tests, each in its own process."""
    there = [name for name in TESTS if (ROOT / "tests" / name).exists()]
    for i, name in enumerate(["ops/attention/test_attention.py"] if context.tiny else there):
        share = 1.0 if i == len(there) - 1 else 0.6  # limits a slow file, so that time is left for the others
        yield from context.attempt(f"tests/{name}", partial(_pytest, context, name, share), seconds=8.0)


def _pytest(context: Context, name: str, share: float) -> Row:
    """Runs one test file in a share of the time left. The result is pytest's last line."""
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts="]
    if context.tiny:
        options += ["-k", "completions_do_not_see"]
    elif importlib.util.find_spec("xdist") is not None and (os.cpu_count() or 1) >= 4:
        options += ["-n", str(min(6, os.cpu_count() // 2))]
    limit = context.left * share
    command = [sys.executable, "-m", "pytest", f"tests/{name}", *options]
    code, output = run_limited(command, limit, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="2")
    if code is None:
        return {"failed": f"{output[-6000:]}\nkilled after {limit:.0f} s"}
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if code != 0:
        return {"failed": f"{output[-12000:]}\nexit code {code}: {last}"}
    return {"result": last, "output": output[-2000:]}


# --- Training ---


def training(context: Context) -> Iterator[Row]:
    """Trains a tiny Llama in bf16 for three steps with ``auto`` and with eager attention, and compares the losses."""
    logged: dict[str, list[dict[str, float]]] = {}
    for backend in ("auto", "eager"):
        yield from context.attempt(f"3 steps, attention {backend}", partial(_train, context, backend, logged), 10.0)
    if len(logged) == 2:
        pairs = [(a[key], b[key]) for a, b in zip(*logged.values()) for key in _COMPARED]
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        row = {"what": "largest relative difference", "result": f"{difference:.1e} of {', '.join(_COMPARED)}"}
        yield row if difference < 0.02 else {**row, "failed": f"steps differ: {logged}"}


_COMPARED = ("loss", "logps/chosen", "logps/rejected")


def _train(context: Context, backend: str, logged: dict[str, list[dict[str, float]]]) -> Row:
    """Trains three steps with one attention backend. Adds its metrics to ``logged``."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from cpt_kernels import ContrastiveConfig, ContrastiveTrainer

    from ..lengths import preference_rows
    from ..trainers import tokenizer

    # A model, data and options that take seconds.
    size, layers, preset = (32, 1, "tiny") if context.tiny else (512, 4, "mixed")
    vocab = 200 if context.tiny else 4000
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=size,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            intermediate_size=2 * size,
            vocab_size=vocab,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    cuda = context.device == "cuda"
    rows = Dataset.from_list(preference_rows(preset, 12, vocab))
    with tempfile.TemporaryDirectory() as folder:
        args = ContrastiveConfig(
            folder,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=cuda,
            use_cpu=not cuda,
            attention_backend=backend,
            ref_cache_dir=f"{folder}/reference",
            train_sampling_strategy="sequential",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        vocabulary = tokenizer(vocab)
        trainer = ContrastiveTrainer(model, args=args, train_dataset=rows, processing_class=vocabulary)
        trainer.train()
    # The row fails if a loss or a gradient norm is implausible.
    logged[backend] = steps = [
        {key: entry[key] for key in (*_COMPARED, "grad_norm")} for entry in trainer.state.log_history if "loss" in entry
    ]
    row = {"result": "losses " + ", ".join(f"{step['loss']:.4f}" for step in steps), "steps": steps}
    sound = len(steps) == 3 and all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in steps)
    return row if sound else {**row, "failed": f"steps {steps}"}
