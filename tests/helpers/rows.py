"""Rows and a tokenizer for them, shared by the tests of the data modules."""

import json
from collections import defaultdict

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpt_kernels.data.preparation import prepare
from tests.helpers import ROOT

REAL_DATA = ROOT.parent / "shared" / "data"
EOS = "</s>"
TEXT = ["hello world, this is text about the sky. The sky is blue and the sun is bright yellow."] * 20
# Renders the prompt alone with a thought block that the whole conversation does not have, like some real templates.
TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}"
    "{% if loop.index0 and messages[loop.index0 - 1].role == m.role %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}" + EOS + "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and enable_thinking is false %}<think>"
    "{% endif %}{% endif %}"
)


def make_tokenizer(bos=False):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", EOS, "<think>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TEXT, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=EOS, chat_template=TEMPLATE)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


MORE = assistant("blue") + user("and the sun?")  # turns to insert into a conversation


def pair(prompt="the sky", chosen=" is blue", rejected=" is bright", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def chat(prompt="the sky?", chosen="is blue", rejected="is bright", **more):
    return {"prompt": user(prompt), "chosen": assistant(chosen), "rejected": assistant(rejected), **more}


def prepared(rows, tokenizer, **options):
    dataset, report = prepare(Dataset.from_list(rows), tokenizer, **options)
    return dataset.to_list(), report


def reasons(report):
    return {reason: (drop.count, drop.rows) for reason, drop in report.dropped.items()}


def decoded(row, tokenizer):
    return [tokenizer.decode(ids) for ids in row["completion_ids"]]


def real_rows(name):
    if not REAL_DATA.is_dir():
        pytest.skip(f"needs the real data in {REAL_DATA}, which does not exist")
    return [json.loads(line) for line in (REAL_DATA / name).read_text().splitlines()]


def real_pairs(better="gpt4", worse="text_davinci_003"):
    answers = defaultdict(dict)
    for row in real_rows("responses.jsonl"):
        answers[row["prompt"]][row["model"]] = row["response"]
    return [{"prompt": p, "chosen": by_model[better], "rejected": by_model[worse]} for p, by_model in answers.items()]


def nasty_pairs():
    rows = [item["row"] for item in real_rows("nasty.jsonl")]
    return [pair(r["prompt"], r.get("chosen", r.get("response", "yes")), r.get("rejected", "no")) for r in rows]


def grouped_rows(pairs, prompts, models, responses):
    """Yields the ranked rows that hold the pairs of a ``PairTable``: `prompt, completions, scores, models, pairs`."""
    groups = pairs.group()
    for g in range(len(groups)):
        members = groups.members[groups.cu_members[g] : groups.cu_members[g + 1]].tolist()
        yield {
            "prompt": prompts[members[0]],
            "completions": [responses[i] for i in members],
            "scores": pairs.strength[members].tolist(),
            "models": [models[i] for i in members],
            "pairs": groups.edges[groups.cu_edges[g] : groups.cu_edges[g + 1]].tolist(),
        }
