"""Generates responses with a transformers model in memory.

A response depends on its prompt, its number and the seed, and not on the other rows of its batch, because every row
samples with its own random generator. The batch affects only rounding: other shapes select other GPU kernels. Batches
are planned over all requests, including the answered ones, so that a run that was killed repeats the batches of an
uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..data.formats import Example
from ..data.image_files import open_image
from ..data.images import ImageReader, is_processor
from ..data.messages import RowError
from ..errors import UserError
from .prompts import Answer, Failure, Prompt, RecordAnswers, Request, Sampling, Text


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
    """Generates n responses to each prompt.

    The model may be in training: its training mode and its generation config are restored at the end.

    Args:
        model: a transformers model, or a PEFT model around one.
        prompts: text or messages.
        sampling: the defaults of :class:`Sampling` if None; ``Sampling(temperature=0)`` is greedy.
        batch_size: responses per batch; prompts of similar length are batched together.
        progress: called after every batch with its number of responses.

    Returns:
        The n responses to the first prompt, then those to the second, and so on.

    Raises:
        UserError: a prompt cannot be answered (it is too long, or there is no chat template), or a batch does not fit
            into memory.
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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin, prompt: Prompt, sampling: Sampling
) -> list[int] | Failure:
    """Returns the token ids of a prompt as in training: text is encoded as it is, messages by the chat template."""
    is_text = isinstance(prompt.content, str) and not sampling.chat
    template_kwargs = {**sampling.template_kwargs, **prompt.template_kwargs}
    has_template = getattr(tokenizer, "chat_template", None) is not None or "chat_template" in template_kwargs
    if not is_text and not has_template:
        return Failure("no chat template", "the prompt is a conversation, but the tokenizer has no chat template")
    if is_processor(tokenizer):
        if prompt.images or not is_text:
            return _encode_images(tokenizer, prompt, sampling)
        tokenizer = tokenizer.tokenizer
    if is_text:
        ids = tokenizer(prompt.content, verbose=False)["input_ids"]
        # Some tokenizers append eos to every text, and a model generates nothing after eos.
        has_eos_added = ids[-1:] == [tokenizer.eos_token_id] and not prompt.content.endswith(tokenizer.eos_token)
        return ids[:-1] if has_eos_added else ids
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
        return Failure("rejected by the chat template", f"{type(error).__name__}: {error}")


def _render(processor: ProcessorMixin, prompt: Prompt, sampling: Sampling) -> str:
    """Returns the text of a prompt, in which the chat template puts a placeholder for each image of a conversation."""
    if isinstance(prompt.content, str) and not sampling.chat:
        return prompt.content
    turns = prompt.messages(sampling.system_prompt)
    kwargs = {**sampling.template_kwargs, **prompt.template_kwargs}
    example = Example(turns, [], [], tools=prompt.tools, template_kwargs=kwargs, images=[*prompt.images])
    return ImageReader(processor).render(example)[0]


def _encode_images(processor: ProcessorMixin, prompt: Prompt, sampling: Sampling) -> list[int] | Failure:
    try:
        text = _render(processor, prompt, sampling)
    except RowError as error:
        return Failure("rejected by the chat template", error.detail)
    try:
        return ImageReader(processor).encode(text, [*map(open_image, prompt.images)])
    except ValueError as error:  # of ours, or of a processor that finds no placeholders for the images
        return Failure("images", getattr(error, "detail", str(error)))


def _encode_all(
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    requests: Sequence[Request],
    sampling: Sampling,
    context: int | None,
    record: RecordAnswers,
    answered: Container[int],
) -> dict[int, list[int]]:
    """Encodes the prompt of every request, answered or not, and records a failure for each one that cannot be answered.

    Returns:
        Position of the request -> token ids of its prompt, without the failures.
    """
    by_prompt: dict[str, list[int] | Failure] = {}
    encoded: dict[int, list[int]] = {}
    failed = []
    for index, (prompt, _) in enumerate(requests):
        if prompt.key not in by_prompt:
            by_prompt[prompt.key] = _check_length(encode_prompt(tokenizer, prompt, sampling), sampling, context)
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
        return Failure("empty prompt", "the prompt has no tokens")
    if context is not None and len(ids) + sampling.max_new_tokens > context:
        detail = f"{len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the model's {context}"
        return Failure("prompt too long", detail)
    return ids


def _decode(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], ids: list[int], continues: bool) -> str:
    """Returns the text of a response.

    Some tokenizers drop the space before the first word of a text. A response that continues a text prompt needs that
    space, so it is decoded together with the prompt.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    if continues:
        # If a character is split between prompt and response, the decoded prompt is no prefix of the whole text.
        prompt, whole = tokenizer.decode(prompt_ids, **options), tokenizer.decode(prompt_ids + ids, **options)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
    return tokenizer.decode(ids, **options)


class LocalModel:
    """Answers requests with a transformers model, batch by batch.

    Args:
        model: a model on the device on which it shall run.
        tokenizer: the tokenizer, or the processor of a model for prompts with images.
        sampling: how responses are sampled. Of the model's own generation config only the end tokens are used.
        batch_size: responses per batch.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        sampling: Sampling,
        batch_size: int = 16,
    ) -> None:
        if None in (sampling.temperature, sampling.top_p):
            raise UserError("temperature and top_p can be left to an endpoint only: give a local model numbers")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.processor: Any = tokenizer  # or the tokenizer again
        tokenizer = tokenizer.tokenizer if is_processor(tokenizer) else tokenizer
        self.model, self.tokenizer, self.sampling, self.batch_size = model, tokenizer, sampling, batch_size
        # A chat model may end a turn with another token than the tokenizer's eos.
        own = getattr(model.generation_config, "eos_token_id", None)
        ends = [own] if isinstance(own, int) else own or []
        self.ends = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, *self.ends, 0)
        self.pad = next(pad for pad in pads if pad is not None)
        if tokenizer.pad_token is None:  # a processor pads by it
            tokenizer.pad_token = tokenizer.eos_token

    def answer(self, requests: Sequence[Request], record: RecordAnswers, answered: Container[int] = ()) -> None:
        """Answers the requests whose positions are not in ``answered``, longest prompts first.

        Raises:
            UserError: a batch does not fit into memory. The results recorded before stay valid.
        """
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        encoded = _encode_all(self.processor, requests, self.sampling, context, record, answered)
        # Prompts with images are batched apart, because the processor makes the model's inputs.
        parts: dict[Hashable, list[int]] = {}
        for index in encoded:
            parts.setdefault(self._images_alike(requests[index].prompt), []).append(index)
        with _generating(self.model, self._generation_config()):
            for batch in (b for part in parts.values() for b in self._plan({i: encoded[i] for i in part}, answered)):
                seeds = [requests[index].seed(self.sampling) for index in batch]
                prompts = [requests[index].prompt for index in batch]
                inputs = self._inputs(prompts, [encoded[index] for index in batch])
                rows = zip(batch, self._generate(inputs, seeds))
                record(
                    [(i, self._to_answer(requests[i].prompt, encoded[i], row)) for i, row in rows if i not in answered]
                )

    def _images_alike(self, prompt: Prompt) -> Hashable:
        """Returns what is equal for prompts that may be in one batch: in some models images of padding count."""
        has_tower = hasattr(self.model.config, "vision_config")
        if not prompt.images or (has_tower and hasattr(self.model, "get_image_features")):
            return bool(prompt.images)
        return len(prompt.images) if has_tower else tuple(open_image(image).size for image in prompt.images)

    def _plan(self, encoded: Mapping[int, list[int]], answered: Container[int]) -> list[list[int]]:
        """Returns the batches of requests to run, longest prompts first.

        They are the batches of an uninterrupted run without those that are finished: equal shapes give equal numbers. A
        killed run leaves at most one batch partly answered, which is repeated as a whole. If more batches are partly
        answered, the earlier run had other prompts, and the batches are planned over the missing requests alone.
        """
        order = sorted(encoded, key=lambda index: -len(encoded[index]))
        batches = self._batches(order)
        done = [sum(index in answered for index in batch) for batch in batches]
        if sum(0 < count < len(batch) for count, batch in zip(done, batches)) > 1:
            return self._batches([index for index in order if index not in answered])
        return [batch for count, batch in zip(done, batches) if count < len(batch)]

    def _batches(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def _generation_config(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,  # _GumbelNoise turns the argmax into a sample
            use_cache=True,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.pad,
            stop_strings=list(self.sampling.stop) or None,
        )

    def _inputs(self, prompts: Sequence[Prompt], ids: list[list[int]]) -> dict[str, Tensor]:
        """Returns the model's inputs for a batch, padded on the left: every row's next token is at one position."""
        device = self.model.get_input_embeddings().weight.device
        if prompts[0].images:
            texts = [_render(self.processor, prompt, self.sampling) for prompt in prompts]
            images = [[*map(open_image, prompt.images)] for prompt in prompts]
            options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
            inputs = self.processor(text=texts, images=images, **options)
            return dict(inputs.to(device, dtype=self.model.dtype))
        width = max(map(len, ids))
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        padded = torch.tensor([[self.pad] * (width - len(row)) + row for row in ids], device=device)
        return {"input_ids": padded, "attention_mask": mask}

    def _generate(self, inputs: Mapping[str, Tensor], seeds: list[int | None]) -> list[list[int]]:
        count, width = inputs["input_ids"].shape
        processors = LogitsProcessorList(self._processors(seeds))
        # generate() needs the tokenizer only for stop_strings.
        extra: dict[str, Any] = {"tokenizer": self.tokenizer} if self.sampling.stop else {}
        try:
            out = self.model.generate(**inputs, logits_processor=processors, **extra)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{count} prompts of up to {width} tokens do not fit into memory together: lower batch_size"
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
        yield _GumbelNoise(seeds)

    def _cut(self, row: list[int]) -> list[int]:
        """Returns the tokens up to and including the first end token, without the padding after a stop text."""
        end = next((i for i, token in enumerate(row) if token in self.ends), None)
        if end is not None:
            return row[: end + 1]
        while self.sampling.stop and row and row[-1] == self.pad:
            row = row[:-1]
        return row

    def _to_answer(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> Answer:
        has_ended = bool(ids) and ids[-1] in self.ends
        is_text = isinstance(prompt.content, str) and not self.sampling.chat
        text = _decode(self.tokenizer, prompt_ids, ids[:-1] if has_ended else ids, is_text)
        # generate() stops after the token that completes a stop text, which may hold further characters.
        stops = [text.index(stop) for stop in self.sampling.stop if stop in text]
        reason = "stop" if has_ended or stops or len(ids) < self.sampling.max_new_tokens else "length"
        return Answer(text[: min(stops)] if stops else text, reason, len(prompt_ids), len(ids))


class _GumbelNoise(LogitsProcessor):
    """Adds noise that makes the argmax a sample from the softmax (the Gumbel-max trick), with one seed per row.

    ``torch.multinomial`` samples a whole batch from one generator, so a response would depend on its batch.
    """

    def __init__(self, seeds: Sequence[int | None]) -> None:
        self.seeds = seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        # The generators are created at the first step, because only the scores tell the device.
        if not self.generators:
            self.generators = [torch.Generator(scores.device) for _ in self.seeds]
            for generator, seed in zip(self.generators, self.seeds):
                generator.seed() if seed is None else generator.manual_seed(seed)
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        # -log(E) of an exponential E is Gumbel noise. The clamp avoids log(0): for a filtered token -inf + inf is NaN.
        return scores - noise.clamp_min_(torch.finfo(torch.float32).tiny).log_()


@contextmanager
def _generating(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Puts the model into evaluation mode and replaces its generation config while the context lasts.

    The config is replaced, not passed to generate(), because generate() fills unset fields of a passed config from the
    model's own, for example a repetition penalty or suppressed tokens.
    """
    was_training = model.training
    # generate() of a PEFT model reads the config of the model inside, or replaces it by its own: its class decides.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    model.eval()
    model.generation_config = inner.generation_config = config
    try:
        yield
    finally:
        model.generation_config = inner.generation_config = own
        model.train(was_training)
