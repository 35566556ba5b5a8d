"""Tests of generation/local.py: responses do not depend on their batch and follow the right distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from cpt_kernels.generation.local import LocalModel, _decode, _GumbelNoise, encode_prompt, generate_local
from cpt_kernels.generation.prompts import Answer, Failure, Prompt, Request, Sampling
from tests.helpers.architectures import CONFIGS, tiny_model
from tests.helpers.rows import make_tokenizer, user
from tests.helpers.toy import word_tokenizer

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w1 w14 w15 w16 w17", "w3 w3"]
GREEDY = Sampling(temperature=0, max_new_tokens=12)
DRAWN = Sampling(temperature=2, max_new_tokens=12, seed=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_greedy_equals_the_models_own_generation(model, tokenizer):
    got = generate_local(model, tokenizer, PROMPTS, GREEDY, batch_size=4)
    for prompt, text in zip(PROMPTS, got):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
        assert text == tokenizer.decode(out, skip_special_tokens=True)[len(prompt) :]
        assert text.startswith(" w"), "the space before the response is lost"


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "mistral", "qwen3", "gpt_neox", "phi"])
def test_padding_does_not_change_responses(tokenizer, name):
    """Checks models with attention windows and learned positions, padded on the left."""
    other = tiny_model(name)
    alone = generate_local(other, tokenizer, PROMPTS, DRAWN, batch_size=1)
    assert generate_local(other, tokenizer, PROMPTS, DRAWN, batch_size=6) == alone


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(max_new_tokens=12, top_k=5, top_p=0.8)])
def test_a_response_does_not_depend_on_its_batch(model, tokenizer, sampling):
    alone = {prompt: generate_local(model, tokenizer, [prompt], sampling, n=3, batch_size=1) for prompt in PROMPTS}
    assert all(len(set(texts)) == 3 for texts in alone.values())
    for batch_size in (2, 5, 18):
        together = generate_local(model, tokenizer, PROMPTS[::-1], sampling, n=3, batch_size=batch_size)
        assert together == [text for prompt in PROMPTS[::-1] for text in alone[prompt]]


def test_seeds(model, tokenizer):
    def draw(seed):
        return generate_local(model, tokenizer, PROMPTS, Sampling(max_new_tokens=12, seed=seed))

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_draws_have_the_right_shares():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf])
    count = 20_000
    picked = _GumbelNoise(list(range(count)))(None, logits.expand(count, -1)).argmax(-1)
    shares = picked.bincount(minlength=5) / count
    expected = logits.softmax(-1)
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 4 * spread).all(), shares
    draw = _GumbelNoise([7])
    first, second = (draw(None, torch.zeros(1, 1000)).argmax().item() for _ in range(2))
    assert first != second, "two steps used the same noise"


def test_responses_have_a_finish_reason(model, tokenizer):
    answers: dict[int, Answer] = {}
    requests = [Request(Prompt(prompt), sample) for prompt in PROMPTS for sample in range(8)]
    LocalModel(model, tokenizer, Sampling(max_new_tokens=30), 16).answer(requests, answers.update)
    ended = [answer for answer in answers.values() if answer.finish_reason == "stop"]
    assert 0 < len(ended) < len(requests)
    for index, answer in answers.items():
        words = len(answer.text.split())
        assert answer.prompt_tokens == len(requests[index].prompt.content.split())
        if answer.finish_reason == "length":
            assert answer.response_tokens == 30
        else:
            assert words < answer.response_tokens <= 30
        assert "<" not in answer.text


def test_stop_texts():
    tokenizer = make_tokenizer()  # transformers' stop_strings does not support a WordLevel tokenizer
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    config.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(config).eval()
    prompts = ["the sky is", "hello", "text about the sun"]

    def answer(stop: tuple[str, ...]) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        sampling = Sampling(temperature=0, max_new_tokens=20, stop=stop)
        LocalModel(model, tokenizer, sampling, 3).answer([Request(Prompt(p)) for p in prompts], answers.update)
        return answers

    without = answer(())
    stop = without[0].text[5:7]
    stopped = answer((stop, "never"))
    assert stopped[0].text == without[0].text.split(stop)[0] and stopped[0].finish_reason == "stop"
    assert 0 < stopped[0].response_tokens < without[0].response_tokens
    assert [stopped[i].text == without[i].text.split(stop)[0] for i in (1, 2)] == [True, True]


def test_the_models_own_generation_config_is_ignored(model, tokenizer):
    want = generate_local(model, tokenizer, PROMPTS, GREEDY)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=1, max_length=3, eos_token_id=[2, 9]
    )
    model.train()
    try:
        changed = model.generation_config
        got = generate_local(model, tokenizer, PROMPTS, GREEDY)
        assert model.training and model.generation_config is changed
    finally:
        model.generation_config = own
        model.eval()
    # Its end tokens are used, because those of a chat model often differ from the tokenizer's.
    assert got == [text.split(" w6")[0] for text in want]
    assert got != want


def test_conversations(model):
    tokenizer = make_tokenizer()
    prompt = Prompt(user("the sky?"))
    ids = encode_prompt(tokenizer, prompt, Sampling(system_prompt="Be brief."))
    assert tokenizer.decode(ids) == "[system]Be brief.</s>[user]the sky?</s>[assistant]"
    as_text = encode_prompt(
        tokenizer, Prompt("the sky?"), Sampling(chat=True, template_kwargs={"enable_thinking": False})
    )
    assert tokenizer.decode(as_text) == "[user]the sky?</s>[assistant]<think>"
    own = encode_prompt(tokenizer, Prompt(user("x"), [{"name": "f"}], {"enable_thinking": False}), Sampling())
    assert tokenizer.decode(own) == '[tools][{"name": "f"}][user]x</s>[assistant]<think>'
    assert tokenizer.decode(encode_prompt(tokenizer, Prompt("the sky?"), Sampling())) == "the sky?"


def test_prompts_that_cannot_be_answered(model, tokenizer):
    failures: dict[int, Failure] = {}
    prompts = ["", user("x"), " ".join(["w1"] * 120), "w1"]
    LocalModel(model, tokenizer, GREEDY).answer([Request(Prompt(prompt)) for prompt in prompts], failures.update)
    reasons = [failures[i].reason for i in range(3)]
    assert reasons == ["empty prompt", "no chat template", "prompt too long"]
    assert failures[2].detail == "120 tokens and max_new_tokens=12 exceed the model's 128"
    assert isinstance(failures[3], Answer)
    with pytest.raises(ValueError, match="prompt 1: prompt too long"):
        generate_local(model, tokenizer, ["w1", prompts[2]], GREEDY)
    twice = Request(Prompt(user("x") + user("y")))
    chat = make_tokenizer()
    LocalModel(model, chat, GREEDY).answer([twice], failures.update)
    assert failures[0] == Failure("rejected by the chat template", "TemplateError: roles must alternate")


def test_an_end_token_that_the_tokenizer_adds_is_removed(tokenizer):
    class Ends(type(tokenizer)):
        def __call__(self, *args, **kwargs):
            ids = super().__call__(*args, **kwargs)
            ids["input_ids"] = [*ids["input_ids"], self.eos_token_id]
            return ids

    ends = Ends(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert encode_prompt(ends, Prompt("w1 w2"), GREEDY) == encode_prompt(tokenizer, Prompt("w1 w2"), GREEDY)
    assert encode_prompt(tokenizer, Prompt("w1 </s>"), GREEDY)[-1] == tokenizer.eos_token_id


def test_a_character_that_prompt_and_response_share():
    tokenizer = make_tokenizer()
    first, second = tokenizer("é")["input_ids"]
    assert _decode(tokenizer, [first], [second], continues=True) == "\ufffd"
    sky = tokenizer(" sky")["input_ids"]
    assert _decode(tokenizer, tokenizer("the")["input_ids"], sky, continues=True) == " sky"


def test_a_killed_run_repeats_its_batches(model, tokenizer, monkeypatch):
    """After a kill, the rest runs in the batches of an uninterrupted run, so that shapes are the same."""
    shapes: list[list[tuple]] = []
    inner = LocalModel._generate

    def generate(self, inputs, seeds):
        shapes[-1].append((inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), tuple(seeds)))
        return inner(self, inputs, seeds)

    monkeypatch.setattr(LocalModel, "_generate", generate)
    requests = [Request(Prompt(prompt), sample) for prompt in PROMPTS for sample in range(2)]
    results = []
    answered = {4, 5, 8, 9, 0}  # the first batch, and one request of the second
    for done in (set(), answered):
        shapes.append([])
        results.append({})
        LocalModel(model, tokenizer, DRAWN, batch_size=4).answer(requests, results[-1].update, done)
    assert results[1] == {index: answer for index, answer in results[0].items() if index not in answered}
    assert len(results[1]) == 7 and shapes[1] == shapes[0][1:]


def test_added_prompts_do_not_repeat_what_is_answered(model, tokenizer, monkeypatch):
    sizes = []
    inner = LocalModel._generate
    monkeypatch.setattr(
        LocalModel, "_generate", lambda self, inputs, seeds: sizes.append(len(seeds)) or inner(self, inputs, seeds)
    )
    results: dict = {}
    requests = [Request(Prompt(prompt), sample) for prompt in PROMPTS for sample in range(3)]
    answered = {index for index in range(18) if index % 3 < 2}
    LocalModel(model, tokenizer, DRAWN, batch_size=4).answer(requests, results.update, answered)
    assert set(results) == set(range(18)) - answered and sizes == [4, 2]


def test_too_large_a_batch_is_one_clear_error(model, tokenizer, monkeypatch):
    def fail(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(ValueError, match=r"6 prompts of up to 7 tokens do not fit into memory together: lower batch"):
        generate_local(model, tokenizer, PROMPTS, GREEDY)


def test_progress(model, tokenizer):
    counts = []
    generate_local(model, tokenizer, PROMPTS, GREEDY, batch_size=4, progress=counts.append)
    assert counts == [4, 2]
