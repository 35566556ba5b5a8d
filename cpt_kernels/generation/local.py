"""Responses of a local model: a transformers model in memory, or vLLM's engine.

A response depends on its prompt, its number and the seed, not on what stands beside it in a batch: every row draws from
a generator of its own. What is left of the batch is rounding (other shapes, other kernels), and batches are planned
over all requests, answered or not, so that a run which was killed repeats the batches of an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UserError
from .prompts import Answer, Failure, Prompt, Record, Request, Sampling, Text


def generate_local(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    sampling: Sampling | None = None,
    *,
    n: int = 1,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Responses to prompts of text or messages, n to each: those of the first prompt, then those of the second, ...

    The model may be in training; its mode and generation config are afterwards as they were.

    Args:
        model: a transformers model, or a PEFT model around one.
        sampling: the defaults of :class:`Sampling` if None; ``Sampling(temperature=0)`` is greedy.
        batch_size: responses that are generated together; prompts of like length are.
        progress: called with the number of responses after every batch.

    Raises:
        UserError: a prompt that cannot be answered (too long, or no chat template), or too large a batch.
    """
    requests = [Request(Prompt(prompt), sample) for prompt in prompts for sample in range(n)]
    texts = [""] * len(requests)

    def record(answers: Sequence[tuple[int, Answer | Failure]]) -> None:
        for index, answer in answers:
            if isinstance(answer, Failure):
                raise UserError(f"prompt {index // n}: {answer.reason}: {answer.detail}")
            texts[index] = answer.text
        if progress is not None:
            progress(len(answers))

    LocalModel(model, tokenizer, sampling or Sampling(), batch_size).answer(requests, record)
    return texts


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, sampling: Sampling) -> list[int] | Failure:
    """The prompt's tokens, as in training: text as it is, messages through the chat template."""
    if isinstance(prompt.content, str) and not sampling.chat:
        ids = tokenizer(prompt.content, verbose=False)["input_ids"]
        # Some tokenizers end every text with eos, after which there is nothing to say.
        has_eos_added = ids[-1:] == [tokenizer.eos_token_id] and not prompt.content.endswith(tokenizer.eos_token)
        return ids[:-1] if has_eos_added else ids
    template_kwargs = {**sampling.template_kwargs, **prompt.template_kwargs}
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in template_kwargs:
        return Failure("no chat template", "the prompt is a conversation, but the tokenizer has no chat template")
    try:
        return tokenizer.apply_chat_template(
            prompt.messages(sampling.system_prompt),
            tools=prompt.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **template_kwargs,
        )["input_ids"]
    except (TemplateError, TypeError) as error:
        return Failure("not for the chat template", f"{type(error).__name__}: {error}")


def _encode_all(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    sampling: Sampling,
    context: int | None,
    record: Record,
    answered: Container[int],
) -> dict[int, list[int]]:
    """Tokens of every request's prompt, answered or not; what cannot be answered is recorded as a failure."""
    by_prompt: dict[str, list[int] | Failure] = {}
    encoded: dict[int, list[int]] = {}
    failed = []
    for index, (prompt, _) in enumerate(requests):
        if prompt.key not in by_prompt:
            by_prompt[prompt.key] = _check_length(encode(tokenizer, prompt, sampling), sampling, context)
        ids = by_prompt[prompt.key]
        if not isinstance(ids, Failure):
            encoded[index] = ids
        elif index not in answered:
            failed.append((index, ids))
    if failed:
        record(failed)
    return encoded


def _check_length(ids: list[int] | Failure, sampling: Sampling, context: int | None) -> list[int] | Failure:
    if isinstance(ids, Failure):
        return ids
    if not ids:
        return Failure("empty prompt", "it has no tokens")
    if context is not None and len(ids) + sampling.max_new_tokens > context:
        detail = f"{len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the model's {context}"
        return Failure("prompt too long", detail)
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int], continues: bool) -> str:
    """The text of a response. One that continues a text keeps the space before its first word, which some tokenizers
    drop from what they take for the start of a text."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    if continues:
        prompt, whole = tokenizer.decode(prompt_ids, **options), tokenizer.decode(prompt_ids + ids, **options)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
    return tokenizer.decode(ids, **options)


# --- transformers ---


class LocalModel:
    """A transformers model that answers, batch by batch.

    Args:
        model: on whichever device it is to run.
        sampling: how responses are drawn; nothing is taken from the model's own generation config but its ends.
        batch_size: responses that are generated together.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        own = getattr(model.generation_config, "eos_token_id", None)
        ends = [own] if isinstance(own, int) else own or []
        self.ends = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, *self.ends, 0)
        self.pad = next(pad for pad in pads if pad is not None)

    def answer(self, requests: Sequence[Request], record: Record, answered: Container[int] = ()) -> None:
        """Answer the requests that are not ``answered``, longest prompts first.

        Raises:
            UserError: a batch does not fit into memory. What was recorded stands.
        """
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        encoded = _encode_all(self.tokenizer, requests, self.sampling, context, record, answered)
        with _generating(self.model, self._generation_config()):
            for batch in self._plan(encoded, answered):
                seeds = [requests[index].seed(self.sampling) for index in batch]
                rows = zip(batch, self._generate([encoded[index] for index in batch], seeds))
                record([(i, self._read(requests[i].prompt, encoded[i], row)) for i, row in rows if i not in answered])

    def _plan(self, encoded: Mapping[int, list[int]], answered: Container[int]) -> list[list[int]]:
        """Batches of requests, longest first: those of an undisturbed run that are not done, since the same shapes give
        the same numbers. A killed run leaves one of them half done, which is repeated as a whole. Where more are half
        done, other prompts were asked then, and only what is missing is planned."""
        order = sorted(encoded, key=lambda index: -len(encoded[index]))
        batches = self._split(order)
        done = [sum(index in answered for index in batch) for batch in batches]
        if sum(0 < count < len(batch) for count, batch in zip(done, batches)) > 1:
            return self._split([index for index in order if index not in answered])
        return [batch for count, batch in zip(done, batches) if count < len(batch)]

    def _split(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _generation_config(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,  # _Draw makes the likeliest token a drawn one
            use_cache=True,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.pad,
            stop_strings=list(self.sampling.stop) or None,
        )

    def _generate(self, prompts: list[list[int]], seeds: list[int | None]) -> list[list[int]]:
        width = max(map(len, prompts))
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        processors = LogitsProcessorList(self._processors(seeds))
        # Only stop_strings needs the tokenizer.
        extra: dict[str, Any] = {"tokenizer": self.tokenizer} if self.sampling.stop else {}
        try:
            out = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **extra)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{len(prompts)} prompts of up to {width} tokens do not fit into memory together: lower batch_size"
            ) from error
        return [self._cut(row) for row in out[:, width:].tolist()]

    def _processors(self, seeds: list[int | None]) -> Iterator[LogitsProcessor]:
        sampling = self.sampling
        if sampling.is_greedy:
            return
        if sampling.temperature != 1:
            yield TemperatureLogitsWarper(float(sampling.temperature))
        if sampling.top_k:
            yield TopKLogitsWarper(sampling.top_k)
        if sampling.top_p < 1:
            yield TopPLogitsWarper(sampling.top_p)
        yield _Draw(seeds)

    def _cut(self, row: list[int]) -> list[int]:
        """Up to and with the first end; a row that was ended by a stop text is followed by pads."""
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        if end is not None:
            return row[: end + 1]
        while self.sampling.stop and row and row[-1] == self.pad:
            row = row[:-1]
        return row

    def _read(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> Answer:
        has_ended = bool(ids) and ids[-1] in self.ends
        is_text = isinstance(prompt.content, str) and not self.sampling.chat
        text = _decode(self.tokenizer, prompt_ids, ids[:-1] if has_ended else ids, is_text)
        stops = [text.index(stop) for stop in self.sampling.stop if stop in text]
        reason = "stop" if has_ended or stops or len(ids) < self.sampling.max_new_tokens else "length"
        return Answer(text[: min(stops)] if stops else text, reason, len(prompt_ids), len(ids))


class _Draw(LogitsProcessor):
    """Noise that makes the likeliest token a draw from the softmax (the Gumbel-max trick), each row from its own seed:
    ``torch.multinomial`` would draw for a whole batch from one generator."""

    def __init__(self, seeds: Sequence[int | None]) -> None:
        self.seeds = seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        if not self.generators:
            self.generators = [torch.Generator(scores.device) for _ in self.seeds]
            for generator, seed in zip(self.generators, self.seeds):
                generator.seed() if seed is None else generator.manual_seed(seed)
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        # A zero would give a filtered token, at -inf, the score nan.
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


@contextmanager
def _generating(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and exactly this config: generate() fills the gaps of one that is passed to it from the model's
    own, which may bring a repetition penalty or a list of suppressed tokens."""
    was_training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


# --- vLLM ---


class VllmModel:
    """vLLM's engine on prompts that are tokenised as for a transformers model.

    Args:
        name: folder or hub name of the model.
        batch_size: responses between two writes of the file; the engine itself runs as many at a time as it can.
        options: for ``vllm.LLM``.

    Raises:
        UserError: the vllm package is missing.
    """

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, batch_size: int = 1024, **options: Any
    ) -> None:
        if find_spec("vllm") is None:
            raise UserError("--backend vllm needs the vllm package: pip install vllm")
        from vllm import LLM

        self.llm = LLM(model=name, **options)
        self.tokenizer, self.sampling, self.batch_size = tokenizer, sampling, batch_size

    def answer(self, requests: Sequence[Request], record: Record, answered: Container[int] = ()) -> None:
        """Answer the requests that are not ``answered``."""
        context = self.llm.llm_engine.model_config.max_model_len
        encoded = _encode_all(self.tokenizer, requests, self.sampling, context, record, answered)
        order = [index for index in encoded if index not in answered]
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            prompts = [{"prompt_token_ids": encoded[index]} for index in batch]
            outputs = self.llm.generate(prompts, [self._params(requests[index]) for index in batch], use_tqdm=False)
            record([(index, self._read(output)) for index, output in zip(batch, outputs)])

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k or -1,
            stop=list(self.sampling.stop),
            seed=request.seed(self.sampling),
        )

    @staticmethod
    def _read(output: Any) -> Answer:
        (completion,) = output.outputs
        return Answer(
            completion.text, completion.finish_reason, len(output.prompt_token_ids), len(completion.token_ids)
        )
