"""Evaluation of held-out pairs, compared with eager log-probs per sequence and with the trainer's evaluation."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from cpt_kernels.data.preparation import prepare
from cpt_kernels.evaluation.pair_metrics import CHOSEN_LENGTH, LENGTH_RATIO, MODEL_PAIR
from cpt_kernels.evaluation.pairs import evaluate_pairs
from cpt_kernels.evaluation.win_rate import Bootstrap, interval, win_rate
from cpt_kernels.trainer import ContrastiveTrainer
from tests.helpers.architectures import tiny_model
from tests.helpers.rows import make_tokenizer, pair
from tests.helpers.toy import config, preference_rows, word_tokenizer


def rows() -> list[dict]:
    """Returns 24 pairs of 12 prompts and 3 model pairs. Two pairs will be dropped, one of them the first."""
    made = preference_rows(24)
    models = ["strong", "middle", "weak"]
    for i, row in enumerate(made):
        row["prompt"] = made[i % 12]["prompt"]
        row["chosen_model"], row["rejected_model"] = models[i % 3 // 2], models[1 + i % 3 % 2]
        row["topic"] = "even" if i % 2 == 0 else "odd"
    made[0]["rejected"] = made[0]["chosen"]
    made[7]["chosen"] = ""
    return made


@torch.no_grad()
def eager_logps(model, prompt: list[int], completion: list[int]) -> float:
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum().item()


def models():
    torch.manual_seed(1)
    other = tiny_model("llama")
    for p in other.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return tiny_model("llama"), other


def test_every_number_against_eager(tmp_path):
    data, tokenizer = Dataset.from_list(rows()), word_tokenizer()
    reference, policy = models()
    found = evaluate_pairs({"policy": policy}, data, tokenizer, reference=reference, args=config(tmp_path, beta=0.3))
    kept = [i for i in range(24) if i not in (0, 7)]
    assert found.rows.tolist() == kept and found.report.kept == 22
    assert (found.completions == [0, 1]).all()
    prepared, _ = prepare(data, tokenizer, max_length=1024)
    reference, policy = models()
    for i, row in enumerate(prepared):
        for side, name in enumerate(("chosen", "rejected")):
            ids = row["prompt_ids"], row["completion_ids"][row[name][0]]
            assert found.lengths[i, side] == len(ids[1])
            assert found.ref_logps[i, side] == pytest.approx(eager_logps(reference, *ids), abs=1e-4)
            assert found.logps["policy"][i, side] == pytest.approx(eager_logps(policy, *ids), abs=1e-4)
    metrics = found.metrics("policy")
    rewards = 0.3 * (found.logps["policy"] - found.ref_logps)
    np.testing.assert_allclose(metrics["rewards/margins"], rewards[:, 0] - rewards[:, 1])
    np.testing.assert_array_equal(metrics["rewards/accuracies"], rewards[:, 0] > rewards[:, 1])
    np.testing.assert_array_equal(metrics["logps/accuracies"], np.diff(found.logps["policy"])[:, 0] < 0)
    assert 0 < metrics["rewards/accuracies"].mean() < 1
    assert len(set(found.prompts.tolist())) == 12
    assert [found.prompts[kept.index(i)] == found.prompts[kept.index(i + 12)] for i in (1, 2, 11)] == [True] * 3


@pytest.mark.parametrize(
    "options", [{}, {"max_length": 12, "truncation_mode": "keep_end"}, {"sharing": "none"}, {"sharing": "tree"}]
)
def test_agrees_with_the_trainers_evaluation(tmp_path, options):
    data, tokenizer = Dataset.from_list(rows()), word_tokenizer()
    reference, policy = models()
    args = config(tmp_path, **options)
    found = evaluate_pairs({"policy": policy}, data, tokenizer, reference=reference, args=args).summary(Bootstrap(10))[
        0
    ]
    reference, policy = models()
    trainer = ContrastiveTrainer(policy, reference, args, eval_dataset=data, processing_class=tokenizer)
    expected = trainer.evaluate()
    assert found["by"] == "all pairs" and found["model"] == "policy" and found["pairs"] == trainer.reports["eval"].pairs
    for metric in ("accuracies", "margins", "chosen", "rejected"):
        assert found[f"rewards/{metric}"]["mean"] == pytest.approx(expected[f"eval_rewards/{metric}"], abs=1e-5)
    assert found["logps/chosen"]["mean"] == pytest.approx(expected["eval_logps/chosen"], abs=1e-3)


def test_summary_by_groups(tmp_path):
    data, tokenizer = Dataset.from_list(rows()), word_tokenizer()
    reference, policy = models()
    found = evaluate_pairs(
        {"start": reference, "policy": policy},
        data,
        tokenizer,
        reference=reference,
        args=config(tmp_path),
        by=["topic"],
        ratio_edges=[1],
        length_edges=[4, 8],
    )
    summary = found.summary(Bootstrap(50))
    table = found.table().to_pandas()
    assert len(table) == 44 and set(table["model"]) == {"start", "policy"}
    kept = [row for i, row in enumerate(rows()) if i not in (0, 7)]
    counts = {(row["by"], row["value"]): row["pairs"] for row in summary if row["model"] == "policy"}
    pairs = [f"{row['chosen_model']} > {row['rejected_model']}" for row in kept]
    lengths = [[len(row[side].split()) + 1 for side in ("chosen", "rejected")] for row in kept]  # with eos
    assert counts == {
        ("all pairs", "all pairs"): 22,
        **{(MODEL_PAIR, pair): pairs.count(pair) for pair in ("strong > middle", "strong > weak", "middle > middle")},
        **{("topic", topic): sum(row["topic"] == topic for row in kept) for topic in ("even", "odd")},
        (LENGTH_RATIO, "below 1"): sum(c < r for c, r in lengths),
        (LENGTH_RATIO, "from 1"): sum(c >= r for c, r in lengths),
        (CHOSEN_LENGTH, "below 4"): sum(c < 4 for c, _ in lengths),
        (CHOSEN_LENGTH, "4 to 8"): sum(4 <= c < 8 for c, _ in lengths),
        (CHOSEN_LENGTH, "from 8"): sum(c >= 8 for c, _ in lengths),
    }
    for row in summary:
        of_row = table[(table["model"] == row["model"])]
        of_row = of_row if row["by"] == "all pairs" else of_row[of_row[row["by"]] == row["value"]]
        assert row["rewards/margins"]["mean"] == pytest.approx(of_row["rewards/margins"].mean())
        assert row["logps/rejected"]["mean"] == pytest.approx(of_row["logps/rejected"].mean())
        assert (
            row["rewards/accuracies"]["low"] <= row["rewards/accuracies"]["mean"] <= row["rewards/accuracies"]["high"]
        )
    start = summary[0]
    assert start["model"] == "start" and start["rewards/accuracies"]["mean"] == 0.5, (
        "a model compared with itself ties on every pair"
    )
    overall = summary[1]
    assert overall["prompts"] == 12
    values = found.metrics("policy")
    expected = interval(values["rewards/margins"], prompts=found.prompts, bootstrap=Bootstrap(50))
    assert [overall["rewards/margins"][end] for end in ("low", "high")] == pytest.approx(expected.tolist())
    accuracy = win_rate(values["rewards/accuracies"], prompts=found.prompts, bootstrap=Bootstrap(50))
    assert overall["rewards/accuracies"] == {"mean": accuracy.rate, "low": accuracy.low, "high": accuracy.high}
    (difference,) = found.differences(Bootstrap(50))
    assert (difference["model"], difference["minus"]) == ("policy", "start")
    assert difference["rewards/accuracies"]["mean"] == pytest.approx(accuracy.rate - 0.5)


def test_one_prompt(tmp_path):
    """One prompt shows no spread: a wide interval of an accuracy, which has bounds, and none of other metrics."""
    data = Dataset.from_list(rows()[1:2])
    reference, policy = models()
    found = evaluate_pairs(
        {"start": reference, "policy": policy, "same": policy},
        data,
        word_tokenizer(),
        reference=reference,
        args=config(tmp_path),
    )
    summary = {row["model"]: row for row in found.summary(Bootstrap(20)) if row["by"] == "all pairs"}
    assert summary["policy"]["rewards/margins"]["low"] is summary["policy"]["rewards/margins"]["high"] is None
    accuracy = summary["policy"]["rewards/accuracies"]
    assert (accuracy["low"], accuracy["high"]) == pytest.approx(win_rate([accuracy["mean"]])[1:3])
    assert summary["start"]["rewards/accuracies"] == {"mean": 0.5, "low": None, "high": None}
    difference = found.differences(Bootstrap(20))[0]
    assert difference["rewards/margins"]["low"] is None
    assert difference["rewards/accuracies"]["low"] < difference["rewards/accuracies"]["high"]
    json.dumps(list(summary.values()), allow_nan=False)


def test_models_that_equal_one_another_have_no_difference(tmp_path):
    found = evaluate_pairs(
        {"one": tiny_model("llama"), "two": tiny_model("llama")},
        Dataset.from_list(rows()),
        word_tokenizer(),
        args=config(tmp_path),
    )
    (difference,) = found.differences(Bootstrap(20))
    assert difference["rewards/accuracies"] == difference["logps/accuracies"] == {"mean": 0, "low": 0, "high": 0}


def test_no_completion_is_scored_twice(tmp_path, caplog):
    data, tokenizer = Dataset.from_list(rows()), word_tokenizer()
    reference, policy = models()
    args = config(tmp_path)
    first = evaluate_pairs({"policy": policy}, data, tokenizer, reference=reference, args=args)
    assert "held-out data: 0 of 44 policy log-probs were cached" in caplog.text
    caplog.clear()
    again = evaluate_pairs({"policy": lambda: policy}, data, tokenizer, reference=reference, args=args, by=["topic"])
    assert len(re.findall(r"all \d+ \w+ log-probs were cached", caplog.text)) == 2
    np.testing.assert_array_equal(first.logps["policy"], again.logps["policy"])


def test_ranked_rows_have_several_pairs(tmp_path):
    made = preference_rows(4)
    data = Dataset.from_list(
        [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"], r["sampled"]]} for r in made]
    )
    policy = tiny_model("llama")
    found = evaluate_pairs({"policy": policy}, data, word_tokenizer(), args=config(tmp_path))
    assert found.rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert found.completions[:3].tolist() == [[0, 1], [0, 2], [1, 2]]
    logps = found.logps["policy"]
    assert logps[0, 1] == logps[2, 0] and logps[1, 1] == logps[2, 1]
    assert [grouping.name for grouping in found.groupings] == [LENGTH_RATIO, CHOSEN_LENGTH]
    np.testing.assert_allclose(found.metrics("policy")["rewards/chosen"], 0.1 * logps[:, 0])


def test_a_prompt_counts_once_however_it_is_tokenized(tmp_path):
    """A prompt's last tokens may depend on the completion."""
    tokenizer = make_tokenizer()
    made = [pair("the sk", "y is blue", "y"), pair("the sk", " is", "!"), pair("the sun", " is", "!")]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    found = evaluate_pairs({"m": model}, Dataset.from_list(made), tokenizer, args=config(tmp_path))
    assert found.report.merged == 1
    assert found.prompts[0] == found.prompts[1] != found.prompts[2]
    prepared, _ = prepare(Dataset.from_list(made), tokenizer)
    tokens = evaluate_pairs({"m": model}, prepared, tokenizer, args=config(tmp_path))
    np.testing.assert_array_equal(tokens.prompts, found.prompts)
    np.testing.assert_array_equal(tokens.logps["m"], found.logps["m"])
    implicit = [{"chosen": f"{start} is", "rejected": f"{start}!"} for start in ("the sun", "the sky", "the sun")]
    some = evaluate_pairs({"m": model}, Dataset.from_list(implicit), tokenizer, args=config(tmp_path))
    assert some.prompts[0] == some.prompts[2] != some.prompts[1]


def test_turns_of_a_conversation_count_as_one_prompt(tmp_path):
    turns = [{"prompt": f"{word} w2", "chosen": "w3 w4", "rejected": "w5"} for word in ("w6", "w7", "w8")]
    rows = [{"turns": turns}, {"turns": turns[1:]}]
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' </s> ' }}{% endfor %}"
    found = evaluate_pairs({"m": tiny_model("llama")}, Dataset.from_list(rows), tokenizer, args=config(tmp_path))
    assert len(found.prompts) == 5
    assert np.unique(found.prompts, return_counts=True)[1].tolist() in ([2, 3], [3, 2])


def test_grouped_rows_are_evaluated_as_their_pairs(tmp_path):
    """Grouped rows of `cpt pairs`: the completions of a prompt, best first, their models, and the pairs."""
    made = preference_rows(6)
    names = ["strong", "middle", "weak"]
    grouped = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], row["sampled"]],
            "scores": [3.0, 2.0, 1.0],
            "models": names,
            "pairs": [[0, 2], [1, 2]] if i % 2 else [[0, 1]],
            "topic": f"topic {i % 3}",
        }
        for i, row in enumerate(made)
    ]
    pairs = [
        {
            "prompt": row["prompt"],
            **{name: row["completions"][side] for name, side in zip(("chosen", "rejected"), pair)},
            **{f"{name}_model": names[side] for name, side in zip(("chosen", "rejected"), pair)},
            "topic": row["topic"],
        }
        for row in grouped
        for pair in row["pairs"]
    ]
    found, expected = (
        evaluate_pairs(
            {"policy": tiny_model("llama")},
            Dataset.from_list(rows),
            word_tokenizer(),
            args=config(tmp_path),
            by=["topic"],
        )
        for rows in (grouped, pairs)
    )
    assert found.summary(Bootstrap(20)) == expected.summary(Bootstrap(20))
    assert found.groupings[0].values == ["strong > middle", "strong > weak", "middle > weak"]
    assert found.rows.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert found.completions.tolist() == [pair for row in grouped for pair in row["pairs"]]
    grouped[3]["pairs"] = [[0, 3]]
    with pytest.raises(ValueError, match="row 3: models and pairs do not belong to its 3 completions"):
        evaluate_pairs({"policy": tiny_model("llama")}, Dataset.from_list(grouped), word_tokenizer())
    grouped[2]["pairs"] = None
    with pytest.raises(ValueError, match="row 2 has no pairs, which grouped rows need"):
        evaluate_pairs({"policy": tiny_model("llama")}, Dataset.from_list(grouped), word_tokenizer())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": ["nowhere"]}, "by names the column 'nowhere'"),
        ({"by": ["model"]}, "by names the column 'model', which is a column of the result"),
        ({"by": ["chosen"]}, "by names the column 'chosen', which is a column of the result"),
        ({"by": ["number"]}, "number has 120 different values"),
        ({"ratio_edges": [2, 1]}, "must increase"),
        ({"models": {}}, "no model"),
        ({"columns": ["prompt", "completion"]}, "has no pairs"),
    ],
)
def test_mistakes_of_the_user(tmp_path, change, message):
    made = [
        {**row, "number": i, "model": "m", "completion": row["chosen"]} for i, row in enumerate(preference_rows(120))
    ]
    columns = change.pop("columns", ["prompt", "chosen", "rejected", "number", "model"])
    data = Dataset.from_list(made).select_columns(columns)
    given = {"models": {"policy": tiny_model("llama")}} | change
    with pytest.raises(ValueError, match=message):
        evaluate_pairs(data=data, tokenizer=word_tokenizer(), args=config(tmp_path), **given)


def test_tokenizer_of_another_model(tmp_path):
    policy = tiny_model("llama")
    policy.resize_token_embeddings(20)
    data = Dataset.from_list(preference_rows(5))
    with pytest.raises(ValueError, match="beyond the model's vocabulary of 20"):
        evaluate_pairs({"policy": policy}, data, word_tokenizer(), args=config(tmp_path))
