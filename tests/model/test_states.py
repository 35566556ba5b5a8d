"""Layers that carry a state fork it where a prompt ends; see also the hybrid models in test_packed_model.py."""

from __future__ import annotations

import functools

import pytest
import torch

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.model import states
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.model.states import StateLayout
from tests.helpers.architectures import STATES, tiny_model
from tests.helpers.exactness import FLOOR, LOSSES, assert_equal, make_rows, run_alone, run_packed
from tests.helpers.sweep import check_forward
from tests.helpers.tiny_configs import tiny_causal_lm

SILENT = ["jamba", "mamba", "falcon_mamba", "mamba2"]  # their models or blocks hand no keywords on
# Prompt 0 1, completions 2 3 and 4; a sequence that shares nothing, 5 6 7.
SEGMENTS = [(4, 4), (1, 3), (3, 3)]
T = 8  # stands for zeros


def test_trunks_and_branches():
    layout = StateLayout(SEGMENTS, torch.device("cpu"))
    assert layout.trunks == [(0, 2), (5, 8)]
    assert layout.branches == [(2, 4, 0), (4, 5, 0)]
    tokens = torch.arange(T, dtype=torch.float64)[:, None] + 1  # 0 is a token of zeros
    assert layout.trunk_tokens(tokens)[..., 0].tolist() == [[0, 1, 2], [6, 7, 8]]
    assert layout.branch_tokens(tokens)[..., 0].tolist() == [[3, 4], [5, 0]]
    assert layout.sequence_tokens(tokens)[..., 0].tolist() == [[1, 2, 0, 0], [6, 7, 8, 0], [1, 2, 3, 4], [1, 2, 5, 0]]
    # A convolution of width 4 reads three tokens before each of its own.
    row, places = layout.convolved(4)
    assert row(tokens)[0, :, 0].tolist() == [
        *(0, 0, 0, 1, 2),
        *(0, 0, 0, 6, 7, 8),
        *(0, 1, 2, 3, 4),
        *(0, 1, 2, 5),
    ]
    assert torch.equal(places(row(tokens)[0])[0], tokens)


def test_forks():
    """a b [c d [e | f] | g], then [h]: the tree of the paths abcde, abcdf, abg and h."""
    layout = StateLayout([(5, 5), (1, 5), (1, 3), (1, 1)], torch.device("cpu"))
    assert layout.trunks == [(0, 2), (7, 8)] and layout.forks == [[(2, 4, 0)]]
    assert layout.branches == [(4, 5, 2), (5, 6, 2), (6, 7, 0)]
    tokens = torch.arange(8, dtype=torch.float64)[:, None] + 1
    assert layout.sequence_tokens(tokens)[2:, :, 0].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 0, 0]]
    row, places = layout.convolved(3)
    assert row(tokens)[0, :, 0].tolist() == [0, 0, 1, 2, 0, 0, 8, 1, 2, 3, 4, 3, 4, 5, 3, 4, 6, 1, 2, 7]
    assert torch.equal(places(row(tokens)[0])[0], tokens)


@pytest.mark.parametrize("segments", [SEGMENTS, [(5, 5), (1, 5), (1, 3), (1, 1), (1, 1)]])
def test_outputs_return_to_their_tokens(segments):
    layout = StateLayout(segments, torch.device("cpu"))
    tokens = torch.arange(T + len(layout.forks), dtype=torch.float64)[:, None] + 1
    gathers = [layout.trunk_tokens, *layout.fork_tokens, layout.branch_tokens]
    batches = [gather(tokens).flatten(0, 1) for gather in gathers]
    assert torch.equal(layout.forked_places(torch.cat(batches))[0], tokens)
    assert torch.equal(layout.sequence_places(layout.sequence_tokens(tokens).flatten(0, 1))[0], tokens)


def test_the_indices_of_a_gather_are_copied_to_the_device_at_once(monkeypatch):
    copied = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: copied.append(x) or to(x, *args, **kwargs))
    layout = StateLayout(SEGMENTS, torch.device("meta"))
    gathers = [layout.trunk_tokens, layout.branch_tokens, layout.starts[0], layout.forked_places]
    gathers += layout.convolved(4)
    assert len(copied) == len(gathers) == 6
    assert sum(1 + 2 * len(gather.rounds) for gather in gathers) == 24
    assert {rows.device.type for gather in gathers for rows in (gather.index, *gather.rounds[0])} == {"meta"}


def test_the_gradient_of_a_prompt_is_the_sum_over_its_completions():
    layout = StateLayout(SEGMENTS, torch.device("cpu"))
    tokens = torch.zeros(T, 1, dtype=torch.float64, requires_grad=True)
    layout.sequence_tokens(tokens).sum().backward()
    assert tokens.grad[:, 0].tolist() == [3, 3, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "kind",
    [
        "kimi_linear",
        "granitemoehybrid",
        "falcon_h1",
        "nemotron_h",
        "zamba2",
        "zamba",
        "qwen3_5_text",
        *SILENT,
        "lfm2_moe",
    ],
)
def test_families_are_packed_and_exact(kind):
    """Six groups with 1 to 4 completions, a one-token prompt and one-token completions, in fp64."""
    rows = [(tuple(row["prompt_ids"]), tuple(c)) for row in make_rows("sft") for c in row["completion_ids"]]
    packed = PackedModel(tiny_causal_lm(kind).eval(), packing="true")
    assert packed.state_layers
    check_forward(packed, tiny_causal_lm(kind).eval(), rows)


# --- Planted faults ---


def _forgets_states(layout, recurrence, own, args, kwargs, recur=states._recur):
    """Completions that start without a state."""

    @functools.wraps(own)
    def forgetful(*args, forgotten=None, **kwargs):
        return own(*args, **kwargs)

    return recur(layout, recurrence._replace(initial_state="forgotten"), forgetful, args, kwargs)


def _swaps_states(layout, recurrence, own, args, kwargs, recur=states._recur):
    """Completions that start with the state of another prompt."""
    others = StateLayout(layout.segment_lengths, layout.device)
    others.branches = [(start, stop, (trunk + 1) % len(others.trunks)) for start, stop, trunk in others.branches]
    return recur(others, recurrence, own, args, kwargs)


def _sees_neighbours(layout, own, args, kwargs):
    """A convolution over the packed row as if it were one sequence."""
    return own(*args, **kwargs)


FAULTS = [("_recur", _forgets_states), ("_recur", _swaps_states), ("_convolve", _sees_neighbours)]


@pytest.mark.parametrize(
    ("name", "function", "fault"),
    [(name, *fault) for name in STATES for fault in FAULTS if name != "lfm2" or fault[0] == "_convolve"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_faults_are_seen(name, function, fault, monkeypatch, caplog):
    rows = make_rows("sigmoid")
    expected = run_alone(tiny_model(name, torch.float64), rows, LOSSES["sigmoid"])
    sound = PackedModel(tiny_model(name, torch.float64))
    assert not sound.padded
    monkeypatch.setattr(states, function, fault)
    with pytest.raises(AssertionError):
        assert_equal(run_packed(sound, rows, LOSSES["sigmoid"]), expected, FLOOR)
    # The proof at construction sees it, too.
    assert PackedModel(tiny_model(name, torch.float64)).padded
    assert "in a packed row log-probs differ" in caplog.text


def test_a_recurrence_that_is_not_known_is_not_packed(monkeypatch, caplog):
    """Its convolution alone would fork, and the recurrence would run over all sequences as if they were one."""
    monkeypatch.delitem(states._RECURRENCES, "mamba2_chunk_scan")
    assert PackedModel(tiny_model("bamba")).padded
    assert "layers of the kind linear_attention are not supported" in caplog.text


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "jamba", "mamba2", "lfm2", "zamba2"])
def test_a_recomputed_block_has_the_row_of_its_forward(kind, reentrant):
    """Another packed row and a plain forward run between forward and backward."""
    collator = PackedCollator()
    prompt = (5, 6, 7)
    batch = collator.pack([(prompt, (8, 9)), (prompt, (3,)), ((5,), (6, 4))], [], [], [])
    other = collator.pack([((4, 8), (9,)), ((4, 8), (5, 6, 7))], [], [], [])
    found = []
    for recompute in (False, True):
        model = tiny_causal_lm(kind)
        packed = PackedModel(model, packing="true")
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_input_embeddings().weight.requires_grad_(True)
        logps = packed(batch).tokens.logps
        with torch.no_grad():
            packed(other)
            model(batch["input_ids"], use_cache=False)
        logps.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def _runs_on(layout, recurrence, own, args, kwargs):
    """A recurrence over the packed row as if it were one sequence."""
    return own(*args, **kwargs)


@pytest.mark.parametrize("kind", SILENT)
@pytest.mark.parametrize(("function", "fault"), [("_recur", _runs_on), ("_convolve", _sees_neighbours)])
def test_faults_are_seen_where_no_keywords_are_handed_on(kind, function, fault, monkeypatch, caplog):
    rows = [(tuple(row["prompt_ids"]), tuple(c)) for row in make_rows("sft") for c in row["completion_ids"]]

    def model() -> torch.nn.Module:
        made = tiny_causal_lm(kind).eval()
        for parameter in made.parameters():  # with small weights a state is small
            parameter.data *= 4 if parameter.dim() > 1 else 1
        return made

    sound = PackedModel(model(), packing="true")
    check_forward(sound, model(), rows)
    monkeypatch.setattr(states, function, fault)
    with pytest.raises(AssertionError, match="differ"):
        check_forward(sound, model(), rows)
    assert PackedModel(model()).padded
    assert "in a packed row log-probs differ" in caplog.text


# --- What a packed row costs, and what stays as it is ---


def test_each_prompt_runs_once(monkeypatch):
    """Every projection runs T tokens, and every recurrence as many prompts and completions as there are."""
    packed, shapes = PackedModel(tiny_model("bamba")), []
    mixer = packed.state_layers[0]
    mixer.in_proj.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
    run = states._recur

    def recur(layout, recurrence, own, args, kwargs):
        @functools.wraps(own)
        def counted(*args, **kwargs):
            shapes.append(tuple(args[0].shape[:2]))
            return own(*args, **kwargs)

        return run(layout, recurrence, counted, args, kwargs)

    monkeypatch.setattr(states, "_recur", recur)
    prompt = (5, 6, 7)
    packed(PackedCollator().pack([(prompt, (8, 9)), (prompt, (3,)), (prompt, (4,)), ((5,), (6,))], [], [], []))
    assert shapes == [(1, 9), (2, 3), (3, 2)]


@pytest.mark.parametrize("name", STATES)
def test_plain_forwards_and_generation_are_the_models_own(name):
    ids = torch.arange(3, 20)[None]
    own = tiny_model(name)
    expected, text = own(ids).logits, own.generate(ids, max_new_tokens=4, do_sample=False)
    packed = PackedModel(tiny_model(name))
    packed(PackedCollator().pack([((5, 6), (7,)), ((5, 6), (8,))], [], [], []))
    assert torch.equal(packed.model(ids).logits, expected)
    assert torch.equal(packed.model.generate(ids, max_new_tokens=4, do_sample=False), text)
