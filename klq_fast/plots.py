"""Figures of a run, drawn from its metrics.jsonl and eval.jsonl."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt

from .metrics import Record, read_lines

TITLES = {
    "score": "Score",
    "rlhf_reward": "RLHF reward: score − τ·KL",
    "kl": "KL to the reference, per sequence",
    "loss": "Loss",
    "response_length": "Response length, tokens",
}


def draw(run: Path) -> None:
    """Writes plots/<metric>.png for each of TITLES, and plots/reward_vs_kl.png."""
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    training, heldout = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    for name, title in TITLES.items():
        figure, axes = plt.subplots(figsize=(6, 3.6))
        _curve(axes, training, name, label="training batches", color="tab:blue", alpha=0.35, linewidth=1)
        _curve(axes, _smoothed(training, name), name, label="their moving average", color="tab:blue")
        _curve(axes, heldout, name, label="held out", color="tab:orange", marker="o")
        axes.set(title=title, xlabel="episodes")
        _finish(figure, axes, folder / f"{name}.png")
    figure, axes = plt.subplots(figsize=(6, 3.6))
    if heldout:
        points = [(record["kl"], record["score"], record["episodes"]) for record in heldout]
        kls, scores, episodes = zip(*points, strict=True)
        axes.plot(kls, scores, color="lightgrey", zorder=1)
        dots = axes.scatter(kls, scores, c=episodes, cmap="viridis", zorder=2, label="held out")
        figure.colorbar(dots, label="episodes")
    axes.set(title="Score against KL", xlabel="KL to the reference, per sequence", ylabel="score")
    _finish(figure, axes, folder / "reward_vs_kl.png")


def _curve(axes: plt.Axes, records: list[Record], name: str, **style: Any) -> None:
    points = [(r["episodes"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _smoothed(records: list[Record], name: str, window: int = 10) -> list[Record]:
    """A trailing moving average over at most a tenth of the run, so that a short run keeps its shape."""
    window = max(1, min(window, len(records) // 10))
    values = [record.get(name) for record in records]
    smoothed = []
    for i, record in enumerate(records):
        recent = [v for v in values[max(0, i - window + 1) : i + 1] if v is not None]
        if recent:
            smoothed.append({"episodes": record["episodes"], name: sum(recent) / len(recent)})
    return smoothed


def _finish(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    figure.subplots_adjust(left=0.12, right=0.97, bottom=0.14, top=0.91)
    figure.savefig(path, dpi=120)
    plt.close(figure)
