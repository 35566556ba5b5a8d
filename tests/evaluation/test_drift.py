"""What training changed (KL, agreement, entropy, perplexity), compared with the models' own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from cpt_kernels.errors import UserError
from cpt_kernels.evaluation import drift
from cpt_kernels.evaluation.drift import measure_drift, text_sequences
from cpt_kernels.evaluation.outputs import distinct_bigrams
from cpt_kernels.evaluation.pair_metrics import BALANCED
from cpt_kernels.evaluation.pairs import evaluate_pairs
from cpt_kernels.evaluation.win_rate import Bootstrap, interval
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, preference_rows, word_tokenizer


def changed(name: str):
    """Returns a tiny model and a copy with other weights."""
    torch.manual_seed(1)
    start, model = (tiny_model(name.replace("clamped", "llama")) for _ in range(2))
    if name == "clamped":
        start.__class__ = model.__class__ = Clamping
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return start, model


@torch.no_grad()
def expected(model, start, prompt, completion):
    """Returns the sums of `Drift.NAMES` over a completion's tokens, from the models' own logits in fp64."""
    ids, targets = torch.tensor([[*prompt, *completion]]), torch.tensor(completion)[:, None]
    p, q = (each(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for each in (model, start))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    entropies = [torch.distributions.Categorical(logits=each).entropy().sum() for each in (p, q)]
    likelihoods = [each.gather(1, targets).sum() for each in (p, q)]
    return torch.stack([kl, (p.argmax(-1) == q.argmax(-1)).sum().double(), *entropies, *likelihoods])


class Clamping(LlamaForCausalLM):
    """A Llama whose logits do not follow from a product, a scale and a soft-cap."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.clamp(max=0.5)
        return output


# Packed and padded rows; heads with a soft-cap, a scale, a bias, and with another transform.
@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("llama", "auto"),
        ("llama", "false"),
        ("gemma2", "true"),
        ("cohere", "auto"),
        ("phi", "auto"),
        ("clamped", "auto"),
    ],
)
def test_every_number_against_logits(tmp_path, monkeypatch, name, packing):
    monkeypatch.setattr(drift, "_TILE", 500)  # several tiles in a batch
    start, model = changed(name)
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(4, 40, size=size).tolist()) for size in (3, 1, 5)]
    sequences = [(p, tuple(random.integers(4, 40, size=n).tolist())) for p in prompts for n in (1, 4, 7)]
    args = config(tmp_path, max_tokens_per_batch=20, packing=packing)
    found = measure_drift({"model": model}, start, {"responses": [*sequences, sequences[2]]}, args)["responses"][
        "model"
    ]
    assert sorted(found.tokens) == [1, 1, 1, 4, 4, 4, 7, 7, 7] and len(set(found.groups)) == 3
    start, model = changed(name)
    for (prompt, completion), row in zip(sorted(sequences, key=lambda each: (len(each[0]), each)), found.sums):
        np.testing.assert_allclose(row, expected(model, start, prompt, completion), rtol=1e-4, atol=1e-5)
    # Means are over tokens, and intervals over prompts.
    summary, kl = found.summary(Bootstrap(50)), found.sums[:, 0]
    assert summary["tokens"] == 36 and summary["prompts"] == 3
    assert summary["kl"]["mean"] == pytest.approx(kl.sum() / 36)
    ends = interval(kl / found.tokens, prompts=found.groups, bootstrap=Bootstrap(50), weights=found.tokens)
    assert [summary["kl"]["low"], summary["kl"]["high"]] == pytest.approx(ends.tolist())
    perplexity, of_start = (np.exp(-found.sums[:, i].sum() / 36) for i in (4, 5))
    assert summary["perplexity"]["mean"] == pytest.approx(perplexity)
    assert summary["perplexity_ratio"]["mean"] == pytest.approx(perplexity / of_start)
    assert summary["perplexity"]["low"] < perplexity < summary["perplexity"]["high"]


def test_a_model_has_not_moved_from_itself(tmp_path):
    start, _ = changed("llama")
    found = measure_drift({"same": start}, start, {"text": [((5,), (6, 7, 8))]}, config(tmp_path))["text"]["same"]
    summary = found.summary()
    assert summary["kl"] == {"mean": 0, "low": None, "high": None} and summary["agreement"]["mean"] == 1
    assert summary["perplexity_ratio"]["mean"] == 1 and summary["entropy_change"]["mean"] == 0


def test_windows_of_plain_text():
    tokenizer = word_tokenizer()
    ids = tokenizer("w1 w2 w3 " * 9, add_special_tokens=False)["input_ids"]
    sequences = text_sequences("w1 w2 w3 " * 9, tokenizer, 10)
    assert [len(p) + len(c) for p, c in sequences][:-1] == [10] * (len(sequences) - 1)
    assert [token for p, c in sequences for token in p + c] == ids[: sum(len(p) + len(c) for p, c in sequences)]
    with pytest.raises(UserError, match="at least two"):
        text_sequences("w1", tokenizer, None)


def test_held_out_pairs_and_plain_text(tmp_path):
    data, (start, model) = Dataset.from_list(preference_rows(12)), changed("llama")
    given = {"args": config(tmp_path), "drift": True, "text": preference_rows(12)[0]["chosen"] + "w1 w2 w3"}
    found = evaluate_pairs({"start": start, "model": model}, data, word_tokenizer(), reference=start, **given)
    rows = {(row["on"], row["model"]): row for row in found.drift_summary(Bootstrap(20))}
    assert list(rows) == [(on, name) for on in ("responses", "text") for name in ("start", "model")]
    assert rows["responses", "start"]["kl"]["mean"] == 0 < rows["responses", "model"]["kl"]["low"]
    # The likelihood of all responses is that of the log-probs beside it.
    assert rows["responses", "model"]["tokens"] == found.lengths.sum()
    total = found.logps["model"].sum() / found.lengths.sum()
    assert np.log(rows["responses", "model"]["perplexity"]["mean"]) == pytest.approx(-total, abs=1e-5)
    with pytest.raises(UserError, match="there is none: give one"):
        evaluate_pairs({"model": model}, data, word_tokenizer(), **given)


def test_a_preference_for_length_is_no_accuracy(tmp_path):
    """Chosen is longer in three of four pairs, and the model prefers the longer side: 75 %, balanced 50 %."""
    data, (start, model) = Dataset.from_list(preference_rows(8)), changed("llama")
    found = evaluate_pairs({"model": model}, data, word_tokenizer(), reference=start, args=config(tmp_path))
    found.lengths[:] = [[9, 5]] * 6 + [[5, 9]] * 2
    found.logps["model"][:] = found.ref_logps + found.lengths
    row = found.summary(Bootstrap(100))[0]
    assert row["rewards/accuracies"]["mean"] == 0.75 and row[BALANCED]["mean"] == 0.5
    found.logps["model"][0] = found.ref_logps[0]  # a tie of a pair with a longer chosen side
    assert found.summary(Bootstrap(100))[0][BALANCED]["mean"] == pytest.approx((5.5 / 6) / 2)
    found.lengths[:, 0] = 10  # no pair has a longer rejected side
    assert found.summary(Bootstrap(100))[0][BALANCED] is None


def test_distinct_bigrams():
    assert distinct_bigrams(["a b c", "A, b"], ["a b c d"]) == [pytest.approx(2 / 3), 1]
    assert distinct_bigrams(["a a a a a"], ["a b"]) == [1, 1]  # one pair of each
    assert distinct_bigrams(["a b"], ["a", ""]) == [None, None]
