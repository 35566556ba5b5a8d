"""The model card: its metadata for the hub, and its text."""

from __future__ import annotations

from huggingface_hub import ModelCard

from cpt_kernels.training.model_card import write_model_card
from tests.helpers.toy import config


def test_card(tmp_path):
    args = config(tmp_path, loss_type="ipo", beta=0.3)
    write_model_card(
        tmp_path / "README.md",
        name="me/tiny",
        base="org/base",
        dataset="org/pairs",
        tags=["cpt-kernels", "ipo"],
        args=args,
        chat=True,
        log_history=[{"loss": 1.0}, {"eval_loss": 0.6, "step": 1}, {"eval_loss": 0.5, "eval_rewards/margins": 0.125}],
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/pairs"]
    assert card.data.tags == ["cpt-kernels", "ipo"] and card.data.library_name == "transformers"
    for part in ("# me/tiny", "| beta | 0.3 |", "| loss_type | ipo |", "| eval_loss | 0.5 |", "| eval_rewards/margins"):
        assert part in card.text


def test_local_sources_are_left_out(tmp_path):
    write_model_card(
        tmp_path / "README.md",
        name="tiny",
        base=str(tmp_path),
        dataset=None,
        tags=[],
        args=config(tmp_path),
        chat=False,
        log_history=[],
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert f"`{tmp_path.name}` after contrastive post-training with the loss `sigmoid`, by" in card.text
    assert 'prompt = "Why' in card.text and '"role"' not in card.text
    assert card.data.base_model is None and str(tmp_path) not in card.content and "Last evaluation" not in card.text
