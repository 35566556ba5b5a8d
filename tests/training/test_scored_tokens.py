"""Tests losses and log-probs of conversations in which only some tokens are scored, and of weighted pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset

from cpt_kernels.errors import UserError
from cpt_kernels.evaluation.pairs import evaluate_pairs
from cpt_kernels.losses import LOSSES, build_loss
from cpt_kernels.ops.linear_preference import Pairs, linear_preference_loss
from cpt_kernels.planning.counts import RowLengths
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import CHAT_TEMPLATE, MARKED_TEMPLATE, config, make_trainer, word_tokenizer
from tests.helpers.trl_runs import LOGPS, REWARDS, assert_same_steps, run_ours, run_trl


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def conversations(count: int = 6) -> list[dict]:
    """Returns pairs of which every second has answers of several turns, with a tool's result."""
    rows = []
    for i in range(count):
        chosen = [turn("assistant", f"w{10 + i} w{20 + i}")]
        if i % 2:
            chosen += [turn("user", f"w{30 + i}"), turn("tool", f"w{40 + i} w1"), turn("assistant", f"w{i} w2")]
        rejected = [turn("assistant", f"w{15 + i}"), turn("user", "w9"), turn("assistant", f"w{25 + i} w8")]
        rows.append({"prompt": [turn("user", f"w{i + 3} w5")], "chosen": chosen, "rejected": rejected})
    return rows


def trainer_of(folder, rows=None, model="llama", **options):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    data = Dataset.from_list(rows or conversations()) if not isinstance(rows, IterableDataset) else rows
    return make_trainer(folder, train_dataset=data, processing_class=tokenizer, model=model, **options)


def by_hand(model, row: dict, side: str) -> tuple[float, int]:
    """Returns the log-prob of the assistant's words and </s> of one conversation, and their number."""
    tokens, scored = [], []
    for place, message in enumerate([*row["prompt"], *row[side]]):
        words = [*message["content"].split(), "</s>"]
        is_answer = place >= len(row["prompt"]) and message["role"] == "assistant"
        tokens += [{"user": "w0", "assistant": "w1"}.get(message["role"], "w2"), *words]
        scored += [False, *[is_answer] * len(words)]
    ids = torch.tensor([word_tokenizer().convert_tokens_to_ids(tokens)])
    with torch.no_grad():
        logps = F.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[torch.tensor(scored[1:])].sum().item(), sum(scored)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_log_probs_are_those_of_the_assistants_words(packing, tmp_path):
    model = tiny_model("llama", torch.float64)
    trainer = trainer_of(tmp_path, model=model, assistant_only_loss=True, packing=packing, loss_type=["ipo"])
    (batch,) = trainer.get_eval_dataloader(trainer.train_dataset.select(range(4)))
    rows = conversations()[:4]
    expected = {(side, i): by_hand(model, row, side) for i, row in enumerate(rows) for side in ("chosen", "rejected")}
    scores = trainer.score(model, trainer._prepare_inputs(batch))
    for side in ("chosen", "rejected"):
        found = zip(getattr(scores.pair_logps, side).tolist(), getattr(scores.pair_logps, f"{side}_length").tolist())
        mine = [expected[side, i] for i in range(4)]
        assert [length for _, length in found] == [length for _, length in mine]
        torch.testing.assert_close(getattr(scores.pair_logps, side), torch.tensor([logp for logp, _ in mine]).double())
        # The policy is the reference, whose cached log-probs are those of all tokens.
        reference = getattr(scores.pair_logps, f"ref_{side}")
        torch.testing.assert_close(reference.double(), getattr(scores.pair_logps, side), rtol=0, atol=1e-5)
    assert batch["num_chosen_tokens"] == sum(expected["chosen", i][1] for i in range(4))
    whole = trainer.train_dataset[1]
    assert trainer.reference.cache.get(whole["prompt_ids"], whole["completion_ids"][0]).shape == (
        len(whole["completion_ids"][0]),
    )


def test_sequences_that_share_tokens_score_their_own(tmp_path):
    """The same tokens are scored in one completion and not in another, whose prompt or mask is another."""
    first = {"prompt": [turn("user", "w3")], "train_on": [[1, 0, 1]] * 2}
    middle, ends = [turn("assistant", "w4 w5"), turn("user", "w6")], ("w7 w8", "w7 w9")
    whole = {side: [*middle, turn("assistant", end)] for side, end in zip(("chosen", "rejected"), ends)}
    late = {side: [turn("assistant", end)] for side, end in zip(("chosen", "rejected"), ends)}
    later = {"prompt": [*first["prompt"], *middle], "train_on": [[1], [1]]}
    rows = [first | whole, first | whole | {"train_on": [[0, 0, 1], [0, 0, 1]]}, later | late]
    losses, gradients = [], []
    for sharing in ("tree", "prompt", "none"):
        model = tiny_model("llama", torch.float64)
        trainer = trainer_of(tmp_path, rows, model=model, sharing=sharing, loss_type=["sigmoid_norm"])
        (batch,) = trainer.get_eval_dataloader(trainer.train_dataset)
        assert sorted(batch["completion_lengths"]) == [3, 3, 3, 3, 6, 6]
        assert (batch["token_index"] is not None) == (sharing == "tree")
        value, scores = trainer.compute_loss(model, trainer._prepare_inputs(batch), return_outputs=True)
        value.backward()
        losses.append(sorted(scores.pair_logps.chosen.tolist()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert scores.pair_logps.chosen_length.tolist().count(3) == 2
    for other in (1, 2):
        assert losses[0] == pytest.approx(losses[other], rel=1e-9)
        torch.testing.assert_close(gradients[0], gradients[other])


@pytest.mark.parametrize("options", [{"sharing": "prompt"}, {"packing": "false"}], ids=str)
def test_a_plan_counts_the_rows_of_the_head(options, tmp_path):
    trainer = trainer_of(tmp_path, assistant_only_loss=True, loss_type=["simpo"], **options)
    batch = trainer.collator(trainer.train_dataset.to_list())
    work = RowLengths(trainer.train_dataset, trainer.collator).work(range(6))
    assert (work.head_rows, work.tokens) == (len(batch["targets"]), batch["input_ids"].numel())


def test_held_out_pairs_are_scored_alike(tmp_path):
    model, rows = tiny_model("llama", torch.float64), conversations(3)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    args = config(tmp_path, assistant_only_loss=True)
    found = evaluate_pairs({"model": model}, Dataset.from_list(rows), tokenizer, args=args)
    for side, name in enumerate(("chosen", "rejected")):
        expected = [by_hand(model, row, name) for row in rows]
        assert found.lengths[:, side].tolist() == [length for _, length in expected]
        assert found.logps["model"][:, side] == pytest.approx([logp for logp, _ in expected], abs=1e-4)


def test_a_run_that_scores_all_tokens_uses_the_same_cache(tmp_path):
    trainer_of(tmp_path, assistant_only_loss=True)
    rows = trainer_of(tmp_path).reference.cache.num_rows
    assert rows == trainer_of(tmp_path, assistant_only_loss=True).reference.cache.num_rows == 12


@pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"use_weighting": True}])
def test_a_stream_scores_what_a_stored_dataset_scores(options, tmp_path):
    rows = conversations()
    given = {"assistant_only_loss": True, "train_sampling_strategy": "sequential", "max_steps": 2, **options}
    stored = trainer_of(tmp_path / "stored", rows, **given)
    stream = trainer_of(tmp_path / "stream", IterableDataset.from_generator(lambda: iter(rows)), **given)
    for trainer in (stored, stream):
        trainer.train()
    a, b = (trainer.state.log_history for trainer in (stored, stream))
    for name in ("loss", "rewards/margins", "logps/rejected", "mean_token_accuracy"):
        if name in a[0]:
            assert a[0][name] == pytest.approx(b[0][name], abs=2e-5), name


def test_supervised_steps_are_trls(tmp_path):
    """TRL scores the assistant's turns, with the marks of the template; ours finds them without marks as well."""
    trl = pytest.importorskip("trl", reason="parity needs TRL: pip install trl==1.16.0")
    messages = [{"messages": [*row["prompt"], *row["rejected"]]} for row in conversations(8)]
    options = {"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2, "use_cpu": True}
    options |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "bf16": False}
    options |= {"assistant_only_loss": True, "train_sampling_strategy": "sequential", "gradient_checkpointing": False}
    tokenizer = word_tokenizer()
    tokenizer.chat_template = MARKED_TEMPLATE
    config = trl.SFTConfig(output_dir=str(tmp_path / "trl"), **options)
    theirs = trl.SFTTrainer(
        tiny_model("llama"), args=config, train_dataset=Dataset.from_list(messages), processing_class=tokenizer
    )
    theirs.train()
    ours = trainer_of(tmp_path, messages, loss_type=["sft"], **options)
    ours.train()
    a, b = ([log["loss"] for log in each.state.log_history if "loss" in log] for each in (ours, theirs))
    assert a == pytest.approx(b, abs=1e-4) and a[-1] < a[0]


def test_preference_steps_are_trls_where_both_score_the_same(tmp_path):
    """TRL scores all turns, as ours does without the option, which changes nothing in answers of one turn."""
    rows = {
        "several": conversations(8),
        "one": [row | {"rejected": row["rejected"][:1]} for row in conversations(16)[::2]],
    }
    found = {}
    for name, given in rows.items():
        data, options = Dataset.from_list(given), {"max_steps": 1}
        theirs = run_trl(tmp_path / "trl" / name, data, **options)
        for alone in (False, True):
            found[name, alone] = run_ours(tmp_path / "ours", data, assistant_only_loss=alone, **options)
            if name == "one" or not alone:
                assert_same_steps(found[name, alone], theirs, (*REWARDS, *LOGPS))
    everything, alone = (found["several", only].logs[0] for only in (False, True))
    assert alone["logps/rejected"] > everything["logps/rejected"] + 1  # nats of the turns that are left out


def token_rows() -> list[dict]:
    """Returns pairs of tokens: those of the first row have weights, a mask is in the second, nothing in the third."""
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7, 10]},
        {"prompt_ids": [5], "chosen_ids": [6, 7, 8, 9, 3], "rejected_ids": [11, 12]},
        {"prompt_ids": [14, 6], "chosen_ids": [17, 8], "rejected_ids": [7, 10, 20, 22]},
    ]
    weights = [[[2.0, 0.5, 0.0], [0.25, 1.0]], [[0, 1, 1, 1, 0], [1, 1]], None]
    return [row | {"token_weights": each} for row, each in zip(rows, weights)]


def weighted_sums(model, row: dict, side: str) -> tuple[torch.Tensor, float]:
    """Returns the sum of w_t logp_t of one completion, run alone behind its prompt, and the sum of w_t."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    logps = F.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0]
    given = row["token_weights"] and row["token_weights"][side == "rejected"]
    weights = torch.tensor(given or [1.0] * len(row[f"{side}_ids"])).double()
    return (weights * logps[len(row["prompt_ids"]) - 1 :]).sum(), weights.sum().item()


@pytest.mark.parametrize("head_mode", ["auto", "general"])
@pytest.mark.parametrize(
    "options",
    [{"sharing": "tree"}, {"sharing": "none"}, {"packing": "false"}, {"head_memory_mb": 1e-4}, {"freeze": True}],
    ids=str,
)
@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "sft"])
def test_a_weight_multiplies_the_log_prob_of_its_token(loss, options, head_mode, tmp_path):
    """Losses and all gradients in fp64; with trees, two completions weigh a token that they share differently."""
    rows, options = token_rows(), {"loss_type": [loss], **options}
    model, plain = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    frozen = options.pop("freeze", False)
    model.get_output_embeddings().requires_grad_(not frozen)
    trainer = trainer_of(tmp_path, rows, model=model, head_mode=head_mode, **options)
    (batch,) = trainer.get_eval_dataloader(trainer.train_dataset)
    assert (batch["token_index"] is not None) == (options.get("sharing") == "tree")
    value, scores = trainer.compute_loss(model, trainer._prepare_inputs(batch), return_outputs=True)
    value.backward()
    # The reference has the policy's weights: a difference of log-ratios is 0, and its gradient the policy's.
    sides = [[weighted_sums(plain, row, side) for side in ("chosen", "rejected")] for row in rows]
    if loss == "sft":
        expected = -sum(chosen for (chosen, _), _ in sides) / sum(length for (_, length), _ in sides)
    else:
        values = [[logp / length if loss == "sigmoid_norm" else logp for logp, length in pair] for pair in sides]
        margins = torch.stack([chosen - rejected for chosen, rejected in values])
        expected = -F.logsigmoid(trainer.args.beta * (margins - margins.detach())).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    found = sorted(scores.pair_logps.chosen_length.tolist())
    assert found == sorted(length for (_, length), _ in sides) == [2.0, 2.5, 3.0]
    for (name, one), other in zip(model.named_parameters(), plain.parameters()):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.25}, {"use_weighting": True}], ids=str)
def test_token_weights_in_tails_and_wpo(options, tmp_path):
    """A tail sums the weighted tokens beyond the other side's number of scored ones; WPO's mean is the weighted one."""
    rows = token_rows()
    model = tiny_model("llama", torch.float64)
    trainer = trainer_of(tmp_path, rows, model=model, **options)
    (batch,) = trainer.get_eval_dataloader(trainer.train_dataset)
    with torch.no_grad():
        scores = trainer.score(model, trainer._prepare_inputs(batch))
    first = scores.pair_logps.chosen_length.tolist().index(2.5)  # two scored tokens on each side
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        log_p = F.log_softmax(model(ids).logits[0, 1:3], -1)
    weights = torch.tensor([2.0, 0.5]).double()
    if "ld_alpha" in options:
        assert scores.pair_logps.chosen_tail[first] == scores.pair_logps.rejected_tail[first] == 0
        tokens = weighted_sums(model, rows[1] | {"token_weights": [[0, 0, 0, 1, 0], [1, 1]]}, "chosen")[0]
        second = scores.pair_logps.chosen_length.tolist().index(3.0)
        assert scores.pair_logps.chosen_tail[second].item() == pytest.approx(tokens.item())
    else:
        expected = (weights * (2 * log_p).logsumexp(-1)).sum()
        assert scores.pair_logps.chosen_log_sum_sq[first].item() == pytest.approx(expected.item())


def test_token_weights_of_1_and_0_are_masks_bit_for_bit(tmp_path):
    """So are the same weights in a stream, in micro-batches of a token budget, and in a resumed run."""
    rows = [row for row in token_rows() if row["token_weights"]] * 3
    masks = [[[1, 1, 0], [0, 1]], [[0, 1, 1, 1, 0], [1, 1]]] * 3
    named = [
        [{k: v for k, v in row.items() if k != "token_weights"} | {name: mask} for row, mask in zip(rows, masks)]
        for name in ("completion_mask", "token_weights")
    ]
    given = {"train_sampling_strategy": "sequential", "max_steps": 3, "logging_steps": 1, "num_train_epochs": 9}
    logs = []
    for i, each in enumerate(named):
        trainer = trainer_of(tmp_path / str(i), each, **given)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1]


def test_runs_with_token_weights_resume(tmp_path):
    rows = token_rows() * 4
    given = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "save_strategy": "steps", "max_tokens_per_batch": 24}
    losses = []
    for folder in ("whole", "resumed"):
        trainer = trainer_of(tmp_path / folder, rows, **given)
        if folder == "whole":
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    streamed = trainer_of(tmp_path / "stream", stream, train_sampling_strategy="sequential", max_steps=2)
    stored = trainer_of(tmp_path / "stored", rows, train_sampling_strategy="sequential", max_steps=2)
    for trainer in (streamed, stored):
        trainer.train()
    a, b = (trainer.state.log_history[0] for trainer in (streamed, stored))
    assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)


def test_held_out_pairs_with_token_weights(tmp_path):
    model, rows = tiny_model("llama", torch.float64), token_rows()
    found = evaluate_pairs({"model": model}, Dataset.from_list(rows), word_tokenizer(), args=config(tmp_path))
    for side, name in enumerate(("chosen", "rejected")):
        expected = [weighted_sums(model, row, name) for row in rows]
        assert found.lengths[:, side].tolist() == [length for _, length in expected]
        assert found.logps["model"][:, side] == pytest.approx([logp.item() for logp, _ in expected], abs=1e-4)


def test_imported_sums_have_no_token_weights(tmp_path, monkeypatch):
    rows = [token_rows()[0] | {"token_weights": [[2.0, 0.5, 1.0], [0.25, 1.0]]}]  # all tokens are scored
    trainer = trainer_of(tmp_path, rows)
    monkeypatch.setattr(type(trainer.reference.cache), "imported_keys", {b"key"})
    with pytest.raises(UserError, match="masks and weights of tokens need the reference log-prob of every token"):
        trainer.evaluate(trainer.train_dataset)


def test_overridden_reference_sums_have_no_token_weights(tmp_path):
    class Own(type(trainer_of(tmp_path))):
        def compute_ref_log_probs(self, model, inputs):
            return super().compute_ref_log_probs(model, inputs)

    trainer = make_trainer(tmp_path, Own, train_dataset=Dataset.from_list(token_rows()))
    with pytest.raises(UserError, match="weights of tokens need token log-probs"):
        trainer.evaluate(trainer.train_dataset)


def text_rows(weights) -> list[dict]:
    texts = [
        {"prompt": f"w{i + 3} ", "chosen": f"w{10 + i} w{i}", "rejected": f"w{20 + i}"} for i in range(len(weights))
    ]
    return [row | {"weight": weight, "gap": 1.0 + i} for i, (row, weight) in enumerate(zip(texts, weights))]


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if entry.separable])
def test_a_weight_multiplies_the_loss_of_its_pair(loss):
    """In every mode of the head: frozen, trained and general."""
    generator = torch.Generator().manual_seed(0)
    lengths, weights = [3, 2, 1, 4, 2, 3], torch.tensor([0.0, 2.0, 0.5])
    hidden, head = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (sum(lengths), 11))
    targets = torch.randint(0, 11, (sum(lengths),), generator=generator)
    offsets, places = torch.tensor([0, *lengths]).cumsum(0), torch.arange(0, 6, 2)
    given = (offsets, lengths, places, places + 1, places, [(2, 1)] * 3, torch.randn(6, generator=generator).double())
    pairs = Pairs(*given, tokens_per_pair=2.0, gaps=torch.tensor([1.0, 2.0, 3.0]))
    built = build_loss(loss, **({"label_smoothing": 0.1} if loss == "exo_pair" else {}))

    def run(pairs: Pairs, trained: bool, general: bool):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        out = linear_preference_loss(*leaves, targets, pairs, built, general=general)
        return out, torch.autograd.grad(out.loss, leaves if trained else leaves[:1])

    losses = run(pairs, False, False)[0].losses * weights
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logps = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    seen = pairs.pair_logps(torch.stack([part.sum() for part in logps.split(lengths)]))
    expected = torch.autograd.grad((built(replace(seen, gap=pairs.gaps)) * weights).sum(), leaves)
    for mode in ((False, False), (True, False), (True, True)):
        out, gradients = run(replace(pairs, weights=weights), *mode)
        torch.testing.assert_close(out.losses, losses)
        torch.testing.assert_close(out.loss, losses.sum())
        torch.testing.assert_close(gradients, expected[: len(gradients)])


def test_a_loss_that_sorts_the_pairs_has_no_weights(tmp_path):
    with pytest.raises(UserError, match="loss 'aot' has no weights of pairs"):
        trainer_of(tmp_path, text_rows([1.0]), weight_column="weight", loss_type=["aot"])
    prepared = trainer_of(tmp_path, text_rows([1.0, 2.0]), weight_column="weight").train_dataset
    for data in (prepared, prepared.to_iterable_dataset()):
        with pytest.raises(UserError, match=r"loss 'sigmoid [+] aot_unpaired' has no weights of pairs"):
            trainer = make_trainer(tmp_path, train_dataset=data, loss_type=["sigmoid", "aot_unpaired"], max_steps=1)
            trainer.train()


def test_prepared_rows_are_evaluated_as_they_are(tmp_path):
    """They have their masks and weights, so the options that name columns or need messages are not applied again."""
    for i, (rows, options) in enumerate(
        [(text_rows([1.0, 3.0]), {"weight_column": "weight"}), (conversations(), {"assistant_only_loss": True})]
    ):
        trainer = trainer_of(tmp_path / str(i), rows, eval_dataset=Dataset.from_list(rows), **options)
        assert trainer.evaluate(trainer.train_dataset)["eval_logps/chosen"] == trainer.evaluate()["eval_logps/chosen"]
    with pytest.raises(UserError, match="data is list"):
        trainer.evaluate([1])
    args = config(tmp_path, weight_column="weight")
    found = evaluate_pairs({"m": tiny_model("llama")}, Dataset.from_list(text_rows([1.0])), word_tokenizer(), args=args)
    assert any("every pair counts once" in note for note in found.report.notes)


def test_metrics_are_weighted_means(tmp_path):
    rows = text_rows([1.0, 0.0, 3.0])
    trainer = trainer_of(tmp_path, rows, weight_column="weight", eval_dataset=Dataset.from_list(rows))
    alone = [trainer.evaluate(Dataset.from_list([row])) for row in (rows[0], rows[2])]
    both = trainer.evaluate()
    for name in ("eval_logps/chosen", "eval_logps/rejected", "eval_rewards/margins"):
        assert both[name] == pytest.approx((alone[0][name] + 3 * alone[1][name]) / 4, abs=1e-4), name
    assert both["eval_loss"] == pytest.approx((alone[0]["eval_loss"] + alone[1]["eval_loss"]) / 3, rel=1e-5)


def test_a_padding_collator_knows_no_masks(tmp_path):
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=0)
    with pytest.raises(
        UserError, match="tokens with weights or that are not scored, which a data_collator for padded batches"
    ):
        trainer = trainer_of(tmp_path, assistant_only_loss=True, data_collator=collator)
        next(iter(trainer.get_train_dataloader()))
