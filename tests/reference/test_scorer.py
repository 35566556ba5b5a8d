"""Which changes of a run score rows again; cached and live references give the same training."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.missing import find_missing, read_sequences, scoring_batches
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, losses, preference_rows, word_tokenizer
from tests.reference.test_cache import FINGERPRINT, found, make_row

ROWS = preference_rows(10)


def dataset(rows) -> Dataset:
    return Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])


def train(folder, rows=ROWS, model=None, tokenizer=None, **options) -> tuple[ContrastiveTrainer, int]:
    """Returns a trainer over the cache in a folder, and the number of completions that it scored."""
    arguments = {key: options.pop(key) for key in ("peft_config", "ref_model", "eval_dataset") if key in options}
    before = stored(folder)
    trainer = ContrastiveTrainer(
        tiny_model("llama") if model is None else model,
        args=config(folder, **{"max_steps": 1, **options}),
        train_dataset=dataset(rows),
        processing_class=tokenizer or word_tokenizer(),
        **arguments,
    )
    return trainer, stored(folder) - before


def stored(folder) -> int:
    references = (folder / "ref").glob("?" * 32)
    return sum(ReferenceCache(folder / "ref", path.name).num_rows for path in references)


@pytest.fixture
def scored(tmp_path):
    """A folder whose cache holds the ten rows."""
    assert train(tmp_path)[1] == 20
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-5},
        {"beta": 0.7},
        {"loss_type": "ipo"},
        {"seed": 5, "train_sampling_strategy": "sequential"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 100},
        {"share_prompts": "false"},
        {"max_length": 64},
        {"rows": ROWS[3:6]},
        {"rows": ROWS[::-1]},
        {"rows": [*ROWS, *ROWS[:4]]},
    ],
    ids=str,
)
def test_changes_that_score_nothing_again(scored, options):
    assert train(scored, **options)[1] == 0


def test_another_split_scores_nothing_again(scored):
    assert train(scored, rows=ROWS[4:], eval_dataset={"a": dataset(ROWS[:2]), "b": dataset(ROWS[2:4])})[1] == 0
    assert train(scored, rows=ROWS[:5], eval_dataset=dataset([*ROWS[5:], *preference_rows(1, seed=9)]))[1] == 2


def test_padding_scores_nothing_again(scored):
    tokenizer = word_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", "<s>"
    assert train(scored, tokenizer=tokenizer)[1] == 0


def test_added_rows_are_all_that_is_scored(scored):
    assert train(scored, rows=[*ROWS, *preference_rows(3, seed=9)])[1] == 6
    pairs = [ROWS[0] | {"rejected": ROWS[1]["chosen"]}]
    assert train(scored, rows=pairs)[1] == 1


def test_truncation_scores_the_rows_that_it_cuts(scored):
    trainer, again = train(scored, max_length=18)
    cut = {
        (tuple(row["prompt_ids"]), tuple(ids))
        for row in trainer.train_dataset
        for ids in row["completion_ids"]
        if len(row["prompt_ids"]) + len(ids) > 18
    }
    assert 0 < len(cut) < 20 and again == len(cut)


def changed_weight():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    return model


def changed_rope():
    model = tiny_model("llama")
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return type(model)(model.config)


@pytest.mark.parametrize("model", [changed_weight, changed_rope, lambda: tiny_model("llama").to(torch.bfloat16)])
def test_another_reference_scores_everything_and_leaves_the_first_alone(scored, model):
    assert train(scored, model=model())[1] == 20
    assert train(scored)[1] == 0


def test_another_compute_type_scores_everything(scored):
    assert train(scored, bf16=True)[1] == 20
    assert train(scored, bf16=True)[1] == 0


def test_chat_template(tmp_path):
    def chat(template: str):
        tokenizer = word_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    def as_messages(text: str, role: str) -> list[dict]:
        return [{"role": role, "content": text}]

    rows = [
        {
            "prompt": as_messages(row["prompt"], "user"),
            "chosen": as_messages(row["chosen"], "assistant"),
            "rejected": as_messages(row["rejected"], "assistant"),
        }
        for row in ROWS
    ]
    template = "{% for m in messages %}START{{ m['content'] }} {% endfor %}"
    first, second = (template.replace("START", word) for word in ("w1 ", "w2 "))
    assert train(tmp_path, rows, tokenizer=chat(first))[1] == 20
    assert train(tmp_path, rows, tokenizer=chat(first))[1] == 0
    assert train(tmp_path, rows, tokenizer=chat(second))[1] == 20


@pytest.mark.parametrize("lora", [False, True])
def test_a_cached_reference_trains_like_a_live_one(tmp_path, lora):
    common = {"max_steps": 20, "learning_rate": 1e-3}
    if lora:
        common["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
    cached, _ = train(tmp_path / "cached", **copy.deepcopy(common))
    cached.train()
    own = {} if lora else {"ref_model": tiny_model("llama")}
    live, ahead = train(tmp_path / "live", precompute_ref_log_probs=False, **own, **copy.deepcopy(common))
    assert ahead == 0
    nothing = lambda keys, lengths: (np.full(sum(lengths), np.nan, np.float32), np.zeros(len(keys), bool))  # noqa: E731
    live.reference.cache.look_up = nothing  # every batch has to be scored
    live.train()
    assert len(losses(live)) == 20
    assert losses(live) == pytest.approx(losses(cached), abs=1e-5)
    assert losses(live)[-1] != pytest.approx(np.log(2), abs=1e-3)


def test_workers_of_a_loader_get_the_cache_without_the_model(tmp_path):
    trainer, _ = train(tmp_path)
    collate = trainer.get_train_dataloader().collate_fn
    pickled = pickle.dumps(collate)
    assert len(pickled) < 2000
    rows = [trainer.train_dataset[i] for i in range(4)]
    expected = collate(rows)["ref_token_logps"]
    assert pickle.loads(pickled)(rows)["ref_token_logps"].tolist() == expected.tolist() and expected.isfinite().all()


# --- The first step ---


def test_silence_where_rewards_start_at_zero(tmp_path, caplog):
    train(tmp_path)[0].train()
    assert "nats per token" not in caplog.text


def test_dropout_is_named_where_rewards_do_not_start_at_zero(tmp_path, caplog):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    train(tmp_path, model=model, disable_dropout=False)[0].train()
    assert "differ by" in caplog.text and "dropout is on" in caplog.text


def test_an_adapter_that_does_not_start_at_zero_is_named(tmp_path, caplog):
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    train(tmp_path, peft_config=adapter)[0].train()
    assert "does not start at zero" in caplog.text


def test_wrong_values_in_the_cache_are_noticed(tmp_path, caplog):
    trainer, _ = train(tmp_path)
    lookup = trainer.reference.cache.look_up
    trainer.reference.cache.look_up = lambda *of: [logps - np.float32(0.5) for logps in lookup(*of)]
    trainer.train()
    assert "differ by 0.5 nats per token" in caplog.text and "another kernel or program version" in caplog.text


def test_the_start_reports_cached_scored_seconds_and_bytes(tmp_path, caplog):
    train(tmp_path, rows=ROWS[:4])
    train(tmp_path)
    train(tmp_path)
    messages = [record.getMessage() for record in caplog.records if "log-probs were cached" in record.getMessage()]
    assert re.search(r"0 of 8 reference log-probs were cached; 8 were scored in [\d.]+ s \([\d.]+ MB\)", messages[0])
    assert "8 of 20 reference log-probs were cached; 12 were scored in" in messages[1]
    assert messages[2].endswith("all 20 reference log-probs were cached")


@pytest.mark.parametrize("keep", [False, True])
def test_log_probs_that_are_not_finite(tmp_path, keep):
    """They are not stored: the cache would return them from then on."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[12] = torch.nan
    with pytest.raises(ValueError, match=r"reference log-probs of some .* not finite: 1 of .*embed_tokens.weight"):
        train(tmp_path, model=model, precompute_ref_log_probs=not keep)[0].train()


def test_a_stream_is_not_scored_ahead(tmp_path):
    trainer = ContrastiveTrainer(
        tiny_model("llama"),
        args=config(tmp_path, max_steps=1, precompute_ref_log_probs=True),
        train_dataset=dataset(ROWS).to_iterable_dataset(),
        processing_class=word_tokenizer(),
    )
    with pytest.raises(ValueError, match="for a stream set precompute_ref_log_probs=false"):
        trainer.train()


def test_a_stream_reports_what_it_found_and_scored(tmp_path, caplog):
    def stream(rows) -> str:
        caplog.clear()
        ContrastiveTrainer(
            tiny_model("llama"),
            args=config(tmp_path, max_steps=len(rows) // 4),
            train_dataset=dataset(rows).to_iterable_dataset(),
            processing_class=word_tokenizer(),
        ).train()
        (message,) = [r.getMessage() for r in caplog.records if "while training" in r.getMessage()]
        return message

    rows = preference_rows(12)
    assert "16 completions while training: 0 found, 16 scored in " in stream(rows[:8])
    message = stream(rows)
    assert "24 completions while training: 16 found, 8 scored in " in message and "MB written)" in message


def test_the_folder_is_said_at_the_start(tmp_path, caplog):
    for there in (0, 20):
        caplog.clear()
        trainer, _ = train(tmp_path)
        (message,) = [r.getMessage() for r in caplog.records if "ref_cache_dir" in r.getMessage()]
        assert str(trainer.reference.cache.folder) in message and f"which holds {there} completions" in message


# --- Micro-batches of Reference.fill ---


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_the_bar_of_scoring_is_a_progress_bar_like_others(tmp_path, capsys, disable_tqdm):
    train(tmp_path, disable_tqdm=disable_tqdm)
    assert ("train data: reference log-probs" in capsys.readouterr().err) != disable_tqdm


def test_a_prompt_is_run_once_and_a_completion_scored_once(tmp_path):
    """With all pairs of four completions, each completion is in three pairs."""
    prepared = [
        {"prompt_ids": [7, prompt], "completion_ids": [[prompt, 1, a], [prompt, 1, b]]}
        for prompt in range(5)
        for a in range(4)
        for b in range(a)
    ]
    data, collator = Dataset.from_list(prepared), PackedCollator()
    missing = find_missing(data, ReferenceCache(tmp_path, FINGERPRINT), None, "keep_start")
    assert (missing.completions, missing.found, len(missing)) == (60, 0, 20)
    batches = scoring_batches(missing, collator, 28, 2)
    assert len(batches) % 2 == 0
    sequences = [read_sequences(data, missing, batch, collator)[0] for batch in batches]
    prompts = [len({prompt for prompt, _ in batch}) for batch in sequences]
    assert sum(prompts) == 5 and sum(map(len, sequences)) == 20
    assert {c for batch in sequences for _, c in batch} == {(p, 1, a) for p in range(5) for a in range(4)}


def test_conversations_are_scored_together(tmp_path):
    """Turn k's prompt holds the turns before it. Rows are shuffled, and all begin with 70 tokens of a system prompt."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(6):
        prompt = [3] * 70
        for _ in range(4):
            prompt = [*prompt, *random.integers(5, 1000, 60).tolist()]
            completions = [random.integers(5, 1000, 100).tolist() for _ in range(2)]
            rows.append({"prompt_ids": prompt, "completion_ids": completions})
            prompt = prompt + completions[0]
    data = Dataset.from_list([rows[i] for i in random.permutation(len(rows))])
    missing = find_missing(data, ReferenceCache(tmp_path, FINGERPRINT), None, "keep_start")
    trees, tokens = PackedCollator(minimum_shared=64), []
    for collator in (trees, PackedCollator()):
        batches = scoring_batches(missing, collator, 4000, 1)
        assert sorted(i for batch in batches for group in batch for i in group) == list(range(len(missing)))
        read = [read_sequences(data, missing, batch, collator)[0] for batch in batches]
        tokens.append([collator.pack(batch, [], [], [])["input_ids"].numel() for batch in read])
        assert max(tokens[-1]) <= 4000
    everything = read_sequences(data, missing, [np.arange(len(missing))], trees)[0]
    once = trees.pack(everything, [], [], [])["input_ids"].numel()
    assert sum(tokens[0]) < 1.3 * once < 0.6 * sum(tokens[1])


def test_a_group_beyond_the_budget_is_split(tmp_path):
    data = Dataset.from_list([{"prompt_ids": [5] * 10, "completion_ids": [[i] * 10 for i in range(20)]}])
    missing = find_missing(data, ReferenceCache(tmp_path, FINGERPRINT), None, "keep_start")
    batches = scoring_batches(missing, PackedCollator(), 64, 1)
    sizes = [sum(10 + 10 * len(group) for group in batch) for batch in batches]
    assert max(sizes) <= 64 and sum(len(group) for batch in batches for group in batch) == 20


# --- Merging ---


def test_merging_keeps_every_row_and_the_mappings_of_readers(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT, flush_seconds=0)
    for seed in range(30):
        cache.add(*make_row(seed))
    cache.flush()  # waits for the shard that is being written
    reader = ReferenceCache(tmp_path, FINGERPRINT)
    cache.merge()
    assert len(list((tmp_path / FINGERPRINT).glob("*.arrow"))) == 1
    assert found(reader, range(30)) == list(range(30)), "its mappings outlive the files"
    reader.refresh()
    for one in (cache, reader, ReferenceCache(tmp_path, FINGERPRINT)):
        assert found(one, range(30)) == list(range(30))


def test_a_damaged_shard_is_not_merged(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    for seed in range(3):
        cache.add(*make_row(seed))
        cache.flush()
    path = next(shard.path for shard in cache.shards if make_row(1)[2].tobytes() in shard.path.read_bytes())
    content = path.read_bytes()
    at = content.index(make_row(1)[2].tobytes())
    path.unlink()
    path.write_bytes(content[:at] + b"\xa5\xa5" + content[at + 2 :])
    fresh = ReferenceCache(tmp_path, FINGERPRINT)
    fresh.merge()
    assert found(fresh, range(3)) == [0, 2] and path.exists() and "it is damaged" in caplog.text
