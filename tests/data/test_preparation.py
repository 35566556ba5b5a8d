"""Tests which rows are kept, how dropped rows are counted, and that the cache of `datasets` is used."""

import gc
from collections import defaultdict

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk

from cpt_kernels.data import tokenize
from cpt_kernels.data.preparation import prepare
from tests.helpers.rows import (
    EOS,
    assistant,
    chat,
    make_tokenizer,
    nasty_pairs,
    pair,
    prepared,
    real_pairs,
    real_rows,
    reasons,
    user,
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


MIXED = [
    pair(),
    pair(chosen=None),
    pair(chosen=" "),
    pair("a b c d e f g h i j k l m n o p"),
    pair(rejected=" is blue" + EOS),
    pair(None, "abc d", "abc e"),
    pair("the sky", " is blue" * 9 + " and text", " is blue" * 9 + " and sun"),
]


def test_reasons_are_counted(tokenizer):
    kept, report = prepared(MIXED, tokenizer, max_length=10, name="eval")
    assert [row["row"] for row in kept] == [0, 2]
    assert reasons(report) == {
        "empty completion": (1, [1]),
        "prompt fills max_length": (1, [3]),
        "identical sides": (2, [4, 6]),
        "no prompt": (1, [5]),
    }
    assert report.rows_in == len(MIXED) == report.kept + sum(drop.count for drop in report.dropped.values())
    summary = report.summary()
    assert summary[0] == "eval data: 2 of 7 rows kept, 2 pairs"
    assert "dropped, identical sides: 2 (rows 4, 6; the first: all completions have the same tokens)" in summary


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 4, 10, 14])
def test_stream_is_as_map_style(tokenizer, max_length, mode):
    options = {"max_length": max_length, "truncation_mode": mode, "batch_size": 3}
    dataset, report = prepare(Dataset.from_list(MIXED), tokenizer, **options)
    streams = [Dataset.from_list(MIXED).to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(MIXED))]
    for stream in streams:
        stream, counts = prepare(stream, tokenizer, **options)
        assert counts.rows_in == 0
        assert list(stream) == dataset.to_list()
        assert counts.summary() == report.summary()
        # A second pass is not counted again.
        assert len(list(stream)) == len(dataset) and counts.summary() == report.summary()


def test_stream_resumes(tokenizer):
    rows = [pair(f"the sky {i}", chosen="" if i % 3 == 0 else " is blue") for i in range(20)]
    stream, report = prepare(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, batch_size=4)
    reader = iter(stream)
    first = [next(reader)["row"] for _ in range(5)]
    state = stream.state_dict()
    rest = [row["row"] for row in reader]
    stream.load_state_dict(state)
    assert [row["row"] for row in stream] == rest
    assert first + rest == [i for i in range(20) if i % 3]
    assert (report.rows_in, report.kept) == (20, 13)


def test_processes_do_not_change_the_result(tokenizer):
    one, two = (prepared(MIXED, tokenizer, max_length=10, num_proc=num_proc) for num_proc in (None, 2))
    assert one == two


def test_garbage_collection_is_off_during_preparation(tokenizer, monkeypatch):
    original, seen = tokenize.Tokenization.__call__, []

    def watched(*arguments):
        seen.append(gc.isenabled())
        return original(*arguments)

    monkeypatch.setattr(tokenize.Tokenization, "__call__", watched)
    prepared([pair()], tokenizer)
    with pytest.raises(ValueError, match="no row"):
        prepared([pair(chosen="")], tokenizer)
    assert seen == [False, False] and gc.isenabled()


@pytest.mark.parametrize(("prompt_tokens", "kept"), [(4, 1), (5, 0)])
def test_a_prompt_that_just_fits(prompt_tokens, kept, tokenizer):
    tokens = {"prompt_ids": [9] * prompt_tokens, "chosen_ids": [5, 6], "rejected_ids": [6, 5]}
    rows, report = prepared([tokens, {**tokens, "prompt_ids": [9]}], tokenizer, max_length=5)
    assert len(rows) == 1 + kept
    assert reasons(report) == ({} if kept else {"prompt fills max_length": (1, [0])})


def test_nothing_left(tokenizer):
    with pytest.raises(
        ValueError, match=r"no row can be trained on\n.*0 of 2 rows kept(.|\n)*empty completion: 2 \(rows 0"
    ):
        prepared([pair(chosen=""), pair(rejected="")], tokenizer)


def test_merged_seam_is_reported_once(tokenizer, caplog):
    _, report = prepared([pair(), *[pair("the ", "sky", "sun")] * 3], tokenizer)
    assert (report.merged, report.merged_example) == (3, "row 1: ' '")
    assert [("row 1: ' '" in record.getMessage()) for record in caplog.records] == [True]


def test_refused_by_the_template(tokenizer):
    kept, report = prepared([chat(), {**chat(), "prompt": user("a") + user("b")}, chat("sun?")], tokenizer)
    assert [row["row"] for row in kept] == [0, 2]
    assert "roles must alternate" in report.dropped["malformed row"].detail


def test_one_pair_of_a_row_falls_away(tokenizer):
    """Two completions that differ only after max_length."""
    rows = [{"prompt": "p", "completions": ["a b c d x", "a b c d y", "z"]}]
    (kept,), report = prepared(rows, tokenizer, max_length=4)
    assert list(zip(kept["chosen"], kept["rejected"])) == [(0, 2), (1, 2)]
    assert (report.pairs, report.pairs_dropped, report.truncated) == (2, 1, 2)


def test_keep_columns(tokenizer):
    rows = [pair(tier=i, source={"name": "s"}) for i in range(2)]
    kept, _ = prepared(rows, tokenizer, keep_columns=["tier", "source"])
    assert [(row["tier"], row["source"]["name"]) for row in kept] == [(0, "s"), (1, "s")]
    with pytest.raises(ValueError, match=r"keep_columns names \['tiers'\], but the dataset has the columns \['chosen'"):
        prepared(rows, tokenizer, keep_columns=["tiers"])
    with pytest.raises(ValueError, match=r"names \['chosen'\], which the prepared dataset uses itself"):
        prepared(rows, tokenizer, keep_columns=["chosen"])


def test_options_and_types_are_checked(tokenizer):
    with pytest.raises(ValueError, match="choose one of its splits: train, test"):
        prepare(DatasetDict(train=Dataset.from_list([pair()]), test=Dataset.from_list([pair()])), tokenizer)
    with pytest.raises(ValueError, match="has no rows"):
        prepare(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), tokenizer)
    with pytest.raises(ValueError, match="truncation_mode='middle'"):
        prepared([pair()], tokenizer, truncation_mode="middle")
    with pytest.raises(ValueError, match="ranked_pairs='best'"):
        prepared([pair()], tokenizer, ranked_pairs="best")
    with pytest.raises(ValueError, match="no chat template"):
        plain = make_tokenizer()
        plain.chat_template = None
        prepared([chat()], plain)


def test_cache_is_found_again(tmp_path, monkeypatch):
    Dataset.from_list(MIXED).save_to_disk(tmp_path)
    first, _ = prepare(load_from_disk(tmp_path), make_tokenizer(), max_length=10)

    def tokenized_again(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(tokenize.Tokenization, "__call__", tokenized_again)
    used = make_tokenizer()
    used.pad_token = EOS
    used(["the sky", "sun " * 99], padding="max_length", truncation=True, max_length=7)
    again, _ = prepare(load_from_disk(tmp_path), used, max_length=10)
    assert again.to_list() == first.to_list()
    _, report = prepare(load_from_disk(tmp_path), used, max_length=9, num_proc=2)
    assert report.rows_in == len(MIXED)
    with pytest.raises(AssertionError, match="tokenized again"):
        prepare(load_from_disk(tmp_path), used, max_length=10, ranked_pairs="adjacent")


def test_promptless_rows(tokenizer):
    rows = [pair("", "hello world", "hello sky"), pair("", "a", "hello")]
    kept, report = prepared(rows, tokenizer)
    assert kept[0]["prompt_ids"] == [] and (report.promptless, len(kept)) == (4, 2)
    single = [
        {"prompt_ids": [], "chosen_ids": [3], "rejected_ids": [4, 5]},
        {"prompt_ids": [3], "chosen_ids": [6, 7, 8, 9], "rejected_ids": [6, 5, 7]},
    ]
    kept, report = prepared(single, tokenizer, max_length=3, truncation_mode="keep_end")
    assert (report.promptless, report.truncated) == (2, 2)
    assert reasons(report) == {"empty completion": (1, [0])}


def test_real_pairs(tokenizer):
    rows = real_pairs()
    kept, report = prepared(rows, tokenizer, max_length=1024, num_proc=2)
    identical = sum(row["chosen"] == row["rejected"] for row in rows)
    assert identical > 0 and report.dropped["identical sides"].count >= identical
    assert len(kept) + sum(drop.count for drop in report.dropped.values()) == len(rows) == 300
    assert report.truncated > 0
    longest = max(len(row["prompt_ids"]) for row in kept)
    assert longest < 1024 and report.max_token_id < len(tokenizer)


def test_real_rankings(tokenizer):
    order = ["gpt4", "gpt-3.5-turbo-0301", "text_davinci_003", "text_davinci_001"]
    answers = defaultdict(dict)
    for row in real_rows("responses.jsonl"):
        answers[row["prompt"]][row["model"]] = row["response"]
    rows = [{"prompt": p, "completions": [by_model.get(m) for m in order]} for p, by_model in answers.items()]
    kept, report = prepared(rows, tokenizer)
    for row in kept:
        source = list(dict.fromkeys(c for c in rows[row["row"]]["completions"] if c))
        assert len(row["completion_ids"]) == len(source)
        assert len(row["chosen"]) == len(source) * (len(source) - 1) // 2
    assert report.pairs_dropped > 0


def test_nasty_rows(tokenizer):
    rows = nasty_pairs()
    for options in ({}, {"max_length": 64}, {"max_length": 64, "truncation_mode": "keep_end"}):
        kept, report = prepared(rows, tokenizer, **options)
        assert report.rows_in == len(rows) == len(kept) + sum(drop.count for drop in report.dropped.values())
        assert report.dropped["empty completion"].count == sum(not row["chosen"] for row in rows)
        identical = sum(row["chosen"] == row["rejected"] for row in rows)
        assert report.dropped["identical sides"].count >= identical == 42
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    chats = [{"prompt": user(row["prompt"]), "completion": assistant(row["chosen"])} for row in rows]
    for supervised in (texts, chats):
        _, report = prepared(supervised, tokenizer)
        assert report.rows_in == len(rows) and set(report.dropped) == {"empty completion"}
