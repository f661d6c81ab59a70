"""Figures of sweeps, from stored results."""

import json
from math import nan
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from klq_fast.plots import _cut, _draw_frontier

DEMO = Path(__file__).parents[1] / "docs" / "findings" / "demo"


def test_a_diverged_run_leaves_room_for_the_others() -> None:
    """One of five seeds has a KL of 110 nats, where the means go to 12: its interval is cut, and no mean is."""
    cells = json.loads((DEMO / "weights.json").read_text(encoding="utf-8"))["cells"]
    finals = [cell["final"] for cell in cells if cell["runs"]]
    figure = _draw_frontier(cells, ways=False)
    first, second = figure.axes
    for (low, high), name in (
        (first.get_xlim(), "kl"),
        (first.get_ylim(), "score"),
        (second.get_ylim(), "rlhf_reward"),
    ):
        means = [final[name]["iqm"] for final in finals]
        ends = [final[name][end] for final in finals for end in ("low", "high")]
        assert low < min(means) < max(means) < high
        assert high - low < 1.51 * (max(means) - min(means)) < max(ends) - min(ends)
    plt.close(figure)


@pytest.mark.parametrize("means", [[], [1.0], [2.0, 2.0], [None, nan, 1.0]])
def test_an_axis_without_a_spread_of_means_stays_as_it_is(means: list[float | None]) -> None:
    figure, axes = plt.subplots()
    axes.set_ylim(0, 5)
    _cut(axes.yaxis, means)
    assert axes.get_ylim() == (0, 5)
    _cut(axes.yaxis, [*means, 1.0, 3.0])  # those that are there count
    assert axes.get_ylim() == (0.5, 3.5)
    plt.close(figure)


def test_a_run_without_finite_numbers_leaves_the_others() -> None:
    cells = json.loads((DEMO / "weights.json").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["runs"]]
    cells[0]["final"] = {name: {"iqm": nan, "low": nan, "high": nan} for name in cells[0]["final"]}
    figure = _draw_frontier(cells, ways=False)
    kls = [cell["final"]["kl"]["iqm"] for cell in cells[1:]]
    low, high = figure.axes[0].get_xlim()
    assert low < min(kls) < max(kls) < high < 1.51 * max(kls)
    plt.close(figure)
