"""Figures of sweeps, from stored results."""

import json
from pathlib import Path

from matplotlib import pyplot as plt

from klq_fast.plots import _draw_frontier

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
