"""Tests parsing of orders of models and choices of pairs."""

from __future__ import annotations

import pytest

from cpt_kernels.pairs.order import Which, parse_order, parse_which


@pytest.mark.parametrize(
    ("order", "strengths"),
    [
        ("gpt4 > chatgpt > td003", {"gpt4": 2, "chatgpt": 1, "td003": 0}),
        ("gpt4 > chatgpt = claude>td003", {"gpt4": 2, "chatgpt": 1, "claude": 1, "td003": 0}),
        ("b > c, a > b", {"a": 2, "b": 1, "c": 0}),
        ("a > b, c = b, d = c > e", {"a": 2, "b": 1, "c": 1, "d": 1, "e": 0}),
    ],
)
def test_orders(order, strengths):
    assert parse_order(order) == strengths


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("gpt4", "names one model"),
        ("a > b > a", r"has a cycle: (a > b > a|b > a > b)"),
        ("a > b > c, c > a, x > y", r"has a cycle: . > . > . > ."),
        ("a > a", "names one model"),
        ("a = b > a", "has a cycle: a > a"),
        ("a > c, b > c", "does not say which of a and b is stronger"),
        ("a = b", "makes all models equal"),
        ("a > > b", "lacks a model before or after '>'"),
        ("a > b,", "lacks a model before or after ','"),
        ("", "lacks a model"),
    ],
)
def test_invalid_orders(order, message):
    with pytest.raises(ValueError, match=message):
        parse_order(order)


def test_choices():
    assert parse_which("adjacent") == Which("adjacent")
    assert parse_which("a > b, c>b") == Which("named", named=(("a", "b"), ("c", "b")))
    for wrong in ("al", "a > b > c", "a > a", "a"):
        with pytest.raises(ValueError, match="is not a pair of two models: give all, adjacent"):
            parse_which(wrong)
    with pytest.raises(ValueError, match="'some' is unknown"):
        Which("some")
    with pytest.raises(ValueError, match="the choice of pairs 'base' needs `base`"):
        Which("all", base="a")
