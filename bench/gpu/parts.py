"""Parts of ``gpu_check`` that are not benchmarks: the machine, the extension, tests, sanitizers, and a few steps."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from cpt_kernels.ops.attention.select import capabilities
from cpt_kernels.ops.attention.varlen import Abilities
from cpt_kernels.ops.backends import has_extension

from ..timing import MIB, ROOT, versions
from .meter import Context, Row


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
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none"  # Triton compiles C
        return {
            "result": f"extension {'built' if has_extension() else 'not built'},"
            f" triton {'installed' if triton else 'not installed'}, C compiler {compiler}"
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


# --- The extension ---


def extension(context: Context) -> Iterator[Row]:
    """Compiles the CUDA kernels for this Python if they are not there and nvcc is."""
    if has_extension():
        yield {"what": "extension", "result": "built before"}
    elif context.device == "cuda" and find_nvcc() is None:
        yield {"what": "extension", "skipped": "nvcc is not found, so the CUDA kernels are not checked"}
    elif context.device == "cuda":
        yield from context.attempt("extension", partial(_build, context), seconds=20.0)
    else:
        yield {"what": "extension", "result": "not built; on a GPU it is compiled here"}


def find_nvcc() -> str | None:
    """Returns the nvcc that ``setup.py`` takes, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


def _build(context: Context) -> Row:
    started = time.perf_counter()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output = run_limited(command, context.left, CPT_BUILD_CUDA="1")
    seconds = time.perf_counter() - started
    if code != 0:
        return {"failed": f"{output[-6000:]}\nexit code {code} after {seconds:.0f} s"}
    return {"result": f"compiled in {seconds:.0f} s", "seconds": seconds}


# --- The tests ---


def tests(context: Context) -> Iterator[Row]:
    """Runs the tests with the marker ``gpu`` in one pool of processes. A dry run only collects them."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.(gpu|device)|device_params", path.read_text()) and path.parent.name != "bench"
    ]
    yield from context.attempt(f"pytest -m gpu, {len(files)} files", partial(_pytest, context, files), seconds=20.0)


def _pytest(context: Context, files: list[str]) -> Row:
    """Runs the tests of these files that need a GPU. The result is pytest's last line."""
    options = ["--tb=short", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    options += ["-m", "gpu or device", "-q", "--collect-only"] if context.tiny else ["-m", "gpu"]
    if not context.tiny and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
        options += ["-v"]  # names every test as it ends, for a run that is killed
    limit = 0.95 * context.left
    command = [sys.executable, "-m", "pytest", *files, *options]
    code, output = run_limited(command, limit, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if code is None:
        counts = ", ".join(f"{output.count(f' {word} ')} {word}" for word in ("PASSED", "FAILED", "SKIPPED"))
        names = "\n".join(re.findall(r".* FAILED .*", output))
        return {"failed": f"{output[-3000:]}\n{names}\nkilled after {limit:.0f} s: {counts}"}
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if code != 0:
        return {"failed": f"{output[-12000:]}\nexit code {code}: {last}"}
    return {"result": last, "output": output[-2000:]}


# --- Compute Sanitizer ---

TOOLS = ("memcheck", "racecheck", "synccheck")


def sanitizers(context: Context) -> Iterator[Row]:
    """Runs the CUDA kernels on tiny shapes under each tool of Compute Sanitizer, all at the same time.

    Memcheck also gets a planted read behind the end of a tile, which it must find. A dry run runs the same program
    without the sanitizer.
    """
    if context.tiny:
        yield from context.attempt("no tool", partial(_sanitized, context, None, False))
        return
    if (program := find_sanitizer()) is None:
        yield {"what": ", ".join(TOOLS), "skipped": "compute-sanitizer is not found"}
        return
    if not has_extension():
        yield {"what": ", ".join(TOOLS), "skipped": "the CUDA kernels are not built"}
        return
    runs = {tool: (tool, False) for tool in TOOLS} | {"memcheck, planted error": ("memcheck", True)}
    with ThreadPoolExecutor(len(runs)) as pool:
        pending = {
            what: pool.submit(_sanitized, context, [program, "--tool", tool, "--error-exitcode", "1"], planted)
            for what, (tool, planted) in runs.items()
        }
        for what, future in pending.items():
            yield from context.attempt(what, future.result, seconds=0.0)


def find_sanitizer() -> str | None:
    """Returns the path of Compute Sanitizer, which lies beside nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    beside = [os.path.join(home, "bin"), os.path.join(home, "compute-sanitizer")]
    if nvcc := find_nvcc():
        beside.append(str(Path(nvcc).resolve().parent))
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(beside))


def _sanitized(context: Context, tool: list[str] | None, planted: bool) -> Row:
    """Runs :mod:`bench.gpu.sanitized`, and reads from the tool's summary if it found an error."""
    command = [*(tool or []), sys.executable, "-m", "bench.gpu.sanitized", context.device, *(["planted"] * planted)]
    # The allocator's cache would hide reads behind the end of a tensor.
    code, output = run_limited(command, 0.95 * context.left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if planted:
        found = re.search("Invalid __global__ read.*", output)
        return {"result": found[0]} if found else {"failed": f"{output[-8000:]}\nthe planted error was not found"}
    # A tool that does not support the device has no summary.
    summary = re.search(r"SUMMARY: (0 (?:errors|hazards)\b.*)", output) if tool else re.search(".* calls .*", output)
    if code != 0 or summary is None:
        return {"failed": f"{output[-8000:]}\nexit code {code}, {'no clean summary' if tool else 'no output'}"}
    return {"result": summary[summary.lastindex or 0]}


# --- Training ---


def training(context: Context) -> Iterator[Row]:
    """Trains a tiny Llama in bf16 for three steps with default and with eager attention and layers; compares losses."""
    logged: dict[str, list[dict[str, float]]] = {}
    for choice in ("auto", "eager"):
        what = f"3 steps, attention and layers {choice}"
        yield from context.attempt(what, partial(_train, context, choice, logged), 10.0)
    if len(logged) == 2:
        pairs = [(a[key], b[key]) for a, b in zip(*logged.values()) for key in _COMPARED]
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        row = {"what": "largest relative difference", "result": f"{difference:.1e} of {', '.join(_COMPARED)}"}
        yield row if difference < 0.02 else {**row, "failed": f"steps differ: {logged}"}


_COMPARED = ("loss", "logps/chosen", "logps/rejected")


def _train(context: Context, choice: str, logged: dict[str, list[dict[str, float]]]) -> Row:
    """Trains three steps with one choice of attention and layers. Adds its metrics to ``logged``."""
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
            attention_backend=choice,
            layers=choice,
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
    logged[choice] = steps = [
        {key: entry[key] for key in (*_COMPARED, "grad_norm")} for entry in trainer.state.log_history if "loss" in entry
    ]
    row = {"result": "losses " + ", ".join(f"{step['loss']:.4f}" for step in steps), "steps": steps}
    sound = len(steps) == 3 and all(0 < step["loss"] < 10 and step["grad_norm"] > 0 for step in steps)
    return row if sound else {**row, "failed": f"steps {steps}"}
