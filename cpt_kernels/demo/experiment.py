"""One seed of the experiment: draw exercises, build pairs from the teachers' responses, train and examine all arms."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from ..generation.local import generate_local
from ..generation.prompts import Sampling
from ..model.pretrained import load_whole
from ..pairs.build import build_pairs
from .arms import ARM_OPTIONS, ARMS, EASY, HARD, Trained, make_model, train_in_place
from .judge import Verdict, judge, prefer
from .teachers import TEACHERS, Teacher
from .world import make_exercises, make_tokenizer

BATCH = 64  # responses per step of pre-training and SFT
ARM_BATCH = ARM_OPTIONS["per_device_train_batch_size"]  # prompts per step of an arm
DECODINGS = {"sampled": 1.0, "greedy": 0.0}  # name -> temperature
_PRETRAINING = {"loss_type": "sft", "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
_SFT = {"loss_type": "sft", "learning_rate": 5e-4, "lr_scheduler_type": "linear"}
_STRONG, _MEDIUM, _ = TEACHERS

DemoRow = dict[str, Any]
# Called with the title of a stage and the number of sequences that it has processed since the last call.
Progress = Callable[[str, int], object]


@dataclass(frozen=True)
class Size:
    """Steps of each stage, the number of held-out prompts, and the sizes of model and exercises."""

    pretraining_steps: int
    sft_steps: int
    arm_steps: int
    held_out: int
    hidden: int = 128
    layers: int = 3
    longest: int = 5  # letters of the longest word
    two_steps: float = 0.6  # probability of a second step

    def work(self, arms: Sequence[str]) -> int:
        """Returns the number of sequences that are trained on or generated; each takes about the same time."""
        start = BATCH * (self.pretraining_steps + self.sft_steps)
        prompts = ARM_BATCH * self.arm_steps
        trained = sum(prompts * (2 if ARMS[name].pairs else 1) for name in arms)
        targets = prompts if _need_targets(arms) else 0
        return start + trained + targets + len(DECODINGS) * self.held_out * (1 + len(arms))


FULL = Size(pretraining_steps=1000, sft_steps=300, arm_steps=120, held_out=800)
QUICK = Size(pretraining_steps=60, sft_steps=20, arm_steps=8, held_out=60)


@dataclass(frozen=True)
class JudgedResponses:
    """One response to each held-out prompt, with the judge's verdicts. All three fields are in the prompts' order."""

    texts: list[str]
    verdicts: list[Verdict]
    wins: NDArray[np.float64]  # 1, 1/2 or 0 against the medium teacher's response to the same prompt

    def share(self, criterion: str) -> float:
        """Returns the share of the responses that meet a criterion, a field of :class:`Verdict`."""
        return float(np.mean([getattr(verdict, criterion) for verdict in self.verdicts]))


@dataclass(frozen=True)
class Result:
    """The responses of one model or teacher, and the training that led to the model."""

    responses: dict[str, JudgedResponses]  # by decoding; a teacher is only sampled
    training: Trained | None = None  # of an arm


@dataclass(frozen=True)
class SeedResult:
    """The results of one seed: everything that the report needs."""

    seed: int
    prompts: list[str]  # held out
    baseline: list[str]  # the medium teacher's responses to the held-out prompts
    pairs: dict[str, dict[str, float]]  # kind of pairs -> their number, and how often the judge agrees with them
    teachers: dict[str, Result]
    start: Result
    arms: dict[str, Result]


class Experiment:
    """The experiment with one seed. All randomness follows from the seed.

    Args:
        folder: receives data, models, metrics and responses.
    """

    def __init__(self, seed: int, size: Size, folder: Path, progress: Progress) -> None:
        self.seed, self.size, self.folder, self.progress = seed, size, folder, progress
        self.tokenizer = make_tokenizer()
        self.rng = random.Random(seed)
        counts = {
            "pretraining": BATCH * size.pretraining_steps // 2,  # two passes over these
            "sft": BATCH * size.sft_steps,
            "arms": ARM_BATCH * size.arm_steps,
            "held out": size.held_out,
        }
        exercises = iter(make_exercises(sum(counts.values()), self.rng, size.longest, size.two_steps))
        # All exercises differ, so no prompt is used in two stages.
        self.exercises = {name: list(islice(exercises, count)) for name, count in counts.items()}
        self.prompts = [exercise.prompt for exercise in self.exercises["held out"]]
        self.baseline = self._respond(_MEDIUM)

    def run(self, arms: Sequence[str]) -> SeedResult:
        """Trains the start model and the named arms of ``ARMS``, and judges the responses of all of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.train_start()
        # Pairs from the teachers' responses, by the order of strength alone.
        responses = self.ask_teachers()
        pairs = make_pairs(responses)
        self.write("responses.jsonl", responses)
        self.write("pairs.jsonl", pairs)
        self.write("held_out.jsonl", _as_responses(self.prompts, _MEDIUM, self.baseline))
        # SFT trains on the strong teacher's responses; SLiC regularizes on samples of the start model.
        strong = (row for row in responses if row["model"] == _STRONG.name)
        completions = [{"prompt": row["prompt"], "completion": row["response"]} for row in strong]
        if _need_targets(arms):
            prompts = [row["prompt"] for row in completions]
            targets = dict(zip(prompts, self.generate(start, prompts, 1.0, "targets of SLiC")))
            pairs = [pair | {"sampled": targets[pair["prompt"]]} for pair in pairs]
        # Train and examine.
        results = {"start": Result(self._examine(start, "start"))}
        for name in arms:
            results[name] = self._run_arm(name, [p for p in pairs if pair_kind(p) in ARMS[name].pairs] or completions)
        self.write("outputs.jsonl", self._response_rows(results))
        teachers = {teacher.name: Result({"sampled": self.judge_texts(self._respond(teacher))}) for teacher in TEACHERS}
        return SeedResult(
            self.seed, self.prompts, self.baseline, count_pairs(pairs), teachers, results.pop("start"), results
        )

    # --- Data ---

    def _respond(self, teacher: Teacher) -> list[str]:
        return [teacher.respond(exercise, self.rng) for exercise in self.exercises["held out"]]

    def ask_teachers(self) -> list[DemoRow]:
        """Returns every teacher's response to every prompt of the arms, as rows that ``cpt pairs`` reads."""
        exercises = self.exercises["arms"]
        prompts = [exercise.prompt for exercise in exercises]
        answered = (_as_responses(prompts, t, [t.respond(e, self.rng) for e in exercises]) for t in TEACHERS)
        return [row for rows in answered for row in rows]

    def write(self, name: str, rows: Iterable[DemoRow]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    # --- Training ---

    def train_start(self) -> LlamaForCausalLM:
        model = make_model(self.tokenizer, self.seed, self.size.hidden, self.size.layers)
        self._supervise(model, "pretraining", TEACHERS, self.size.pretraining_steps, _PRETRAINING)
        self._supervise(model, "sft", [_STRONG], self.size.sft_steps, _SFT)
        return model

    def _supervise(
        self, model: LlamaForCausalLM, stage: str, teachers: Sequence[Teacher], steps: int, options: Mapping[str, Any]
    ) -> None:
        rows = [
            {"prompt": exercise.prompt, "completion": self.rng.choice(teachers).respond(exercise, self.rng)}
            for exercise in self.exercises[stage]
        ]
        options = {**options, "max_steps": steps, "per_device_train_batch_size": BATCH}
        self._train(model, stage, stage, rows, BATCH, options)

    def _run_arm(self, name: str, rows: Sequence[DemoRow]) -> Result:
        arm = ARMS[name]
        model = load_whole(LlamaForCausalLM, str(self.folder / "sft"))
        options = {
            **ARM_OPTIONS,
            **arm.options,
            "max_steps": self.size.arm_steps,
            "ref_cache_dir": str(self.folder / "reference"),
        }
        trained = self._train(model, name, arm.title, rows, ARM_BATCH * (2 if arm.pairs else 1), options)
        return Result(self._examine(model, arm.title), trained)

    def _train(
        self,
        model: LlamaForCausalLM,
        name: str,
        title: str,
        rows: Sequence[DemoRow],
        sequences: int,
        options: Mapping[str, Any],
    ) -> Trained:
        def on_step() -> None:
            self.progress(title, sequences)

        folder = self.folder / name
        return train_in_place(model, self.tokenizer, rows, folder, title, on_step, seed=self.seed, **options)

    # --- Examination ---

    def generate(
        self, model: LlamaForCausalLM, prompts: Sequence[str], temperature: float, title: str = "", n: int = 1
    ) -> list[str]:
        sampling = Sampling(max_new_tokens=40, temperature=temperature, seed=self.seed)
        return generate_local(
            model,
            self.tokenizer,
            prompts,
            sampling,
            n=n,
            batch_size=256 * n,
            progress=lambda count: self.progress(title, count),
        )

    def _examine(self, model: LlamaForCausalLM, title: str) -> dict[str, JudgedResponses]:
        return {
            decoding: self.judge_texts(self.generate(model, self.prompts, temperature, title))
            for decoding, temperature in DECODINGS.items()
        }

    def judge_texts(self, texts: list[str]) -> JudgedResponses:
        verdicts = [judge(prompt, text) for prompt, text in zip(self.prompts, texts)]
        wins = [prefer(prompt, text, other) for prompt, text, other in zip(self.prompts, texts, self.baseline)]
        return JudgedResponses(texts, verdicts, np.array(wins))

    def _response_rows(self, results: Mapping[str, Result]) -> Iterable[DemoRow]:
        """Yields a row for every response of the start model and the arms, with its verdict."""
        for name, result in results.items():
            for decoding, judged in result.responses.items():
                for prompt, text, verdict, win in zip(self.prompts, judged.texts, judged.verdicts, judged.wins):
                    row = {"arm": name, "decoding": decoding, "prompt": prompt, "response": text, "win": float(win)}
                    yield row | verdict._asdict()


def _need_targets(arms: Iterable[str]) -> bool:
    """Returns whether one of the arms regularizes on responses of the start model."""
    return any("target_column" in ARMS[name].options for name in arms)


def _as_responses(prompts: Iterable[str], teacher: Teacher, responses: Iterable[str]) -> list[DemoRow]:
    return [{"prompt": p, "model": teacher.name, "response": response} for p, response in zip(prompts, responses)]


def make_pairs(responses: Sequence[DemoRow]) -> list[DemoRow]:
    """Returns preference pairs by the teachers' order of strength alone, without a judge or a filter."""
    columns = [[row[name] for row in responses] for name in ("prompt", "model", "response")]
    order = " > ".join(teacher.name for teacher in TEACHERS)
    return list(build_pairs(*columns, order, which=f"{EASY}, {HARD}").rows(*columns))


def pair_kind(pair: DemoRow) -> str:
    """Returns ``EASY`` or ``HARD``."""
    return f"{pair['chosen_model']}>{pair['rejected_model']}"


def count_pairs(pairs: Sequence[DemoRow]) -> dict[str, dict[str, float]]:
    """Returns the number of pairs of each kind, and how often the judge agrees with them; used by the report only."""
    counts = {}
    for name in (EASY, HARD):
        preferences = np.array([prefer(p["prompt"], p["chosen"], p["rejected"]) for p in pairs if pair_kind(p) == name])
        counts[name] = {
            "pairs": len(preferences),
            "judge agrees": float((preferences == 1).mean()),
            "judge disagrees": float((preferences == 0).mean()),
        }
    return counts
