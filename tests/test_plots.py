"""Figures stay readable: names fit, legends cover no curve, and one outlier does not flatten the rest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cpt_kernels.plots import color_of, cut_off_outlier, distinct, head_figure, legend_above, new_figure, shorten

LONG = [f"organisation/a-model-with-a-long-name-{i}-70B-Instruct" for i in range(12)]


def test_names():
    assert shorten("short") == "short" and shorten("x" * 40) == "x" * 40
    assert shorten(f"{'a' * 30}{'b' * 30}", 11) == "aaaaa…bbbbb"
    short = distinct(["a" * 30 + str(i) + "b" * 30 for i in range(3)], 21)
    assert len({*short.values()}) == 3 and all(len(text) <= 25 for text in short.values())


def test_the_colors_of_twelve_arms_differ():
    from matplotlib.colors import to_rgba

    colors = [to_rgba(color_of(number)) for number in range(12)]
    assert len({*colors}) == 12


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[0.5], [0.6], [700.0]], 700.0),
        ([[0.5], [0.6], [-700.0]], -700.0),
        ([[value] for value in np.linspace(0.7, 0.4, 60)] + [[float("nan")], [None], [1e5]], 1e5),
        ([[0.4, 0.5, 0.6], [0.5, 0.6, 0.7], [900, 1000, 1100]], 1100.0),
        ([[0.5], [700.0]], None),  # none of two is an outlier
        ([[0.5], [0.5], [0.9]], None),
        ([[5 * 0.9**step] for step in range(60)], None),  # a loss that falls
        ([], None),
    ],
)
def test_an_outlier_is_cut_off(groups, expected):
    axis = new_figure(4, 3).add_subplot()
    values = [value for group in groups for value in group if value is not None]
    axis.plot(range(len(values)), values)
    assert cut_off_outlier(axis, "y", groups) == expected
    low, high = axis.get_ylim()
    if expected is not None:
        assert high - low < 2 and sum(low <= value <= high for value in values) >= len(values) - 3


def test_legends_of_many_long_names_cover_nothing():
    figure = new_figure(5, 8)
    axes = figure.subplots(2)
    for axis, (number, name) in itertools.product(axes, enumerate(distinct(LONG).values())):
        axis.plot([0, 1], [0, number], label=name)
    legend_above(axes[1], 5)
    head_figure(figure, "a title " * 40, axes[0])
    figure.draw_without_rendering()
    frames = [axis.get_window_extent() for axis in axes]
    legends = [axes[1].get_legend().get_window_extent(), figure.legends[0].get_window_extent()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations([*frames, *legends], 2))
    assert all(frame.height > 50 and frame.width > 200 for frame in frames)
