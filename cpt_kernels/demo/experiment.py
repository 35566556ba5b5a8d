"""One seed of the experiment: a world, pairs from its teachers, a model from nothing, and every arm from there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ..data.pairs import build_pairs
from ..generate import generate_local
from ..prompts import Sampling
from .arms import ARMS, EASY, HARD, Trained, make_model, train
from .judge import Verdict, judge, prefer
from .teachers import TEACHERS
from .world import Exercise, make_exercises, make_tokenizer

BATCH = 64  # responses a step of the start model's training
ARM_BATCH = 32  # prompts a step of every arm
_PRETRAINING = {"loss_type": "sft", "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
_SFT = {"loss_type": "sft", "learning_rate": 5e-4, "lr_scheduler_type": "linear"}
_GENERATION_BATCH = 256
DECODINGS = {"sampled": 1.0, "greedy": 0.0}  # -> temperature


@dataclass(frozen=True)
class Size:
    """How long there is to learn, and how many prompts are held out."""

    pretraining_steps: int
    sft_steps: int
    arm_steps: int
    held_out: int

    def work(self, arms: Sequence[str]) -> int:
        """Sequences that are trained on or generated, which take about the same time each."""
        start = BATCH * (self.pretraining_steps + self.sft_steps)
        prompts = ARM_BATCH * self.arm_steps
        trained = sum(prompts * (2 if ARMS[name].pairs else 1) for name in arms)
        sampled = prompts * any("target_column" in ARMS[name].options for name in arms)
        return start + trained + sampled + 2 * self.held_out * (1 + len(arms))


FULL = Size(pretraining_steps=1000, sft_steps=300, arm_steps=120, held_out=800)
QUICK = Size(pretraining_steps=60, sft_steps=20, arm_steps=8, held_out=60)


@dataclass(frozen=True)
class Outputs:
    """Responses to the held-out prompts, one each, and what the judge makes of them."""

    texts: list[str]
    verdicts: list[Verdict]
    wins: NDArray[np.float64]  # against the medium teacher's responses

    def share(self, criterion: str) -> float:
        """How many of the responses meet a criterion of the judge."""
        return float(np.mean([getattr(verdict, criterion) for verdict in self.verdicts]))


@dataclass(frozen=True)
class Result:
    """What became of one model, or of a teacher."""

    outputs: dict[str, Outputs]  # decoding ->
    training: Trained | None = None


@dataclass(frozen=True)
class SeedResult:
    """All that the report is made of."""

    seed: int
    prompts: list[str]  # held out
    baseline: list[str]  # the medium teacher's responses to them
    pairs: dict[str, dict[str, float]]  # teachers -> how many pairs, and how the judge sees them
    teachers: dict[str, Result]
    start: Result
    arms: dict[str, Result]


# Called with a stage's title while it runs, and with the sequences that were done since the last call.
Progress = Callable[[str, int], object]


def run_seed(seed: int, arms: Sequence[str], size: Size, folder: Path, progress: Progress) -> SeedResult:
    """Run the experiment once; everything that is random follows from ``seed``.

    Args:
        arms: names in ``ARMS``.
        folder: data, models, metrics and outputs go there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    # No prompt is in two of these.
    counts = (BATCH * size.pretraining_steps // 2, BATCH * size.sft_steps, ARM_BATCH * size.arm_steps, size.held_out)
    exercises = iter(make_exercises(sum(counts), rng))
    pretraining, sft, prompts, held_out = ([next(exercises) for _ in range(count)] for count in counts)

    strong, medium, _ = TEACHERS
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    for title, steps, rows, options in (
        ("pretraining", size.pretraining_steps, _answers(pretraining, TEACHERS, rng), _PRETRAINING),
        ("SFT", size.sft_steps, _answers(sft, [strong], rng), _SFT),
    ):
        train(
            model,
            tokenizer,
            rows,
            folder / title.lower(),
            title,
            lambda title=title: progress(title, BATCH),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            seed=seed,
            **options,
        )
    start = folder / "sft"

    responses = _respond_all(prompts, rng)
    _write(folder / "responses.jsonl", responses)
    pairs = _make_pairs(responses)
    _write(folder / "pairs.jsonl", pairs)
    if any("target_column" in ARMS[name].options for name in arms):
        drawn = _generate(model, tokenizer, [e.prompt for e in prompts], 1.0, seed, "SLiC's targets", progress)
        sampled = dict(zip((e.prompt for e in prompts), drawn))
        pairs = [pair | {"sampled": sampled[pair["prompt"]]} for pair in pairs]

    baseline = [medium.respond(exercise, rng) for exercise in held_out]
    examine = _Examination([exercise.prompt for exercise in held_out], baseline, seed, progress)
    teachers = {
        teacher.name: Result({"sampled": examine.judge([teacher.respond(exercise, rng) for exercise in held_out])})
        for teacher in TEACHERS
    }
    results = {"start": Result(examine(model, tokenizer, "start"))}
    for name in arms:
        arm = ARMS[name]
        model = LlamaForCausalLM.from_pretrained(start)
        trained = train(
            model,
            tokenizer,
            [row for row in pairs if _teachers_of(row) in arm.pairs]
            or [row for row in _as_completions(responses) if row["model"] == strong.name],
            folder / name,
            arm.title,
            lambda arm=arm: progress(arm.title, ARM_BATCH * (2 if arm.pairs else 1)),
            max_steps=size.arm_steps,
            per_device_train_batch_size=ARM_BATCH,
            lr_scheduler_type="constant",
            ref_cache_dir=str(folder / "reference"),
            seed=seed,
            **arm.options,
        )
        results[name] = Result(examine(model, tokenizer, arm.title), trained)
    _write(folder / "outputs.jsonl", examine.rows(results))
    return SeedResult(seed, examine.prompts, baseline, _pair_counts(pairs), teachers, results.pop("start"), results)


# --- Data ---


def _answers(exercises: Iterable[Exercise], teachers: Sequence, rng: random.Random) -> list[dict[str, str]]:
    """Supervised rows, each by a teacher drawn at random."""
    return [{"prompt": e.prompt, "completion": rng.choice(teachers).respond(e, rng)} for e in exercises]


def _respond_all(exercises: Iterable[Exercise], rng: random.Random) -> list[dict[str, str]]:
    """Every teacher's response to every prompt, in the form that ``cpt pairs`` reads."""
    return [
        {"prompt": exercise.prompt, "model": teacher.name, "response": teacher.respond(exercise, rng)}
        for exercise in exercises
        for teacher in TEACHERS
    ]


def _make_pairs(responses: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Pairs by the teachers' rank alone; no judge, no filter."""
    columns = [[row[name] for row in responses] for name in ("prompt", "model", "response")]
    order = " > ".join(teacher.name for teacher in TEACHERS)
    return list(build_pairs(*columns, order, which=f"{EASY}, {HARD}").rows(*columns))


def _teachers_of(pair: Mapping[str, Any]) -> str:
    return f"{pair['chosen_model']}>{pair['rejected_model']}"


def _as_completions(responses: Iterable[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["response"], "model": row["model"]} for row in responses]


def _pair_counts(pairs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How often the judge agrees with the teachers' rank. For the report alone."""
    counts = {}
    for kind in (EASY, HARD):
        of_kind = [pair for pair in pairs if _teachers_of(pair) == kind]
        preferences = np.array([prefer(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in of_kind])
        counts[kind] = {
            "pairs": len(of_kind),
            "judge agrees": float((preferences == 1).mean()),
            "judge disagrees": float((preferences == 0).mean()),
        }
    return counts


# --- Examination ---


def _generate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    temperature: float,
    seed: int,
    title: str,
    progress: Progress,
) -> list[str]:
    return generate_local(
        model,
        tokenizer,
        prompts,
        Sampling(max_new_tokens=40, temperature=temperature, seed=seed),
        batch_size=_GENERATION_BATCH,
        progress=lambda count: progress(title, count),
    )


@dataclass(frozen=True)
class _Examination:
    """The held-out prompts, and the responses that a model's are compared with."""

    prompts: list[str]
    baseline: list[str]
    seed: int
    progress: Progress

    def __call__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, title: str) -> dict[str, Outputs]:
        return {
            decoding: self.judge(
                _generate(model, tokenizer, self.prompts, temperature, self.seed, title, self.progress)
            )
            for decoding, temperature in DECODINGS.items()
        }

    def judge(self, texts: list[str]) -> Outputs:
        wins = [prefer(*outputs) for outputs in zip(self.prompts, texts, self.baseline)]
        return Outputs(texts, [judge(*output) for output in zip(self.prompts, texts)], np.array(wins))

    def rows(self, results: Mapping[str, Result]) -> list[dict[str, Any]]:
        """Every response with its verdict, for those who want to look."""
        return [
            {"arm": name, "decoding": decoding, "prompt": prompt, "output": text, "baseline": baseline, "win": win}
            | verdict._asdict()
            for name, result in results.items()
            for decoding, outputs in result.outputs.items()
            for prompt, baseline, text, verdict, win in zip(
                self.prompts, self.baseline, outputs.texts, outputs.verdicts, outputs.wins.tolist()
            )
        ]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
