"""Figures of a run, drawn from its metrics.jsonl and eval.jsonl, and of a sweep, from the numbers of its figures."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.font_manager import FontProperties

from .metrics import Record, read_lines, write_text

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


# A sweep's methods: label, colour (Okabe and Ito's, which differ to all kinds of colour vision), marker, line.
METHOD_STYLES = {
    "klq": ("KLQ", "#0072B2", "o", "-"),
    "klq-alpha-1": ("KLQ, α = 1", "#CC79A7", "v", ":"),
    "klq-value-0.1": ("KLQ, value weight 0.1", "#009E73", "^", "-."),
    "klq-paper": ("KLQ as in the paper: α = 1, both weights 1", "#56B4E9", "s", "--"),
    "ppo": ("PPO", "#D55E00", "D", "-"),
}
OPTIMUM = "black"


def draw_sweep(results: Record, folder: Path) -> None:
    """Writes a figure of a sweep, `folder`/FIGURE.png, from what FIGURE.json holds; of budget a table, budget.md."""
    name = results["figure"]
    if name == "budget":
        return write_text(folder / "budget.md", _budget_table(results))
    cells = [cell for cell in results["cells"] if cell["runs"]]
    with plt.rc_context({"axes.titlesize": "medium", "axes.labelsize": "medium"}):
        match name:
            case "curves":
                figure = _draw_curves(cells)
            case "constant":
                figure = _draw_constant(cells)
            case "frontier" | "weights":
                figure = _draw_frontier(cells, ways=name == "frontier")
            case "learning-rate":
                figure = _draw_ablation(cells, "learning rate", log=True)
            case "lam":
                figure = _draw_ablation(cells, "λ", log=False)
            case "judge":
                figure = _draw_judge(cells)
        counts = {cell["runs"] if isinstance(cell["runs"], int) else len(cell["runs"]) for cell in cells}
        seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
        title = f"{results['preset']}: {SWEEP_TITLES[name]}"
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
        note = f"seeds: {seeds}; lines: interquartile mean; bands and bars: {results['interval']}"
        figure.legends[0].set_title(note, FontProperties(size="x-small"))
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)


SWEEP_TITLES = {
    "curves": "RLHF reward over training",
    "frontier": "score against KL over τ",
    "weights": "gradient weights of KLQ over τ",
    "learning-rate": "learning rates",
    "lam": "truncation rate λ",
    "constant": "a constant reward: nothing to learn",
    "judge": "the judge's choice between KLQ and PPO",
}


def _draw_curves(cells: list[Record]) -> plt.Figure:
    known = _is_exact(cells)
    figure, panels = _panels(3 if known else 2)
    for cell in cells:
        _band(panels[0], cell["training"]["episodes"], cell["training"]["rlhf_reward"], cell["method"])
        _band(panels[1], cell["heldout"]["episodes"], cell["heldout"]["rlhf_reward"], cell["method"], marker=True)
        if known:
            _band(panels[2], cell["heldout"]["episodes"], cell["heldout"]["gap"], cell["method"], marker=True)
    panels[0].set(title="training batches", xlabel="episodes", ylabel="RLHF reward: score − τ·KL")
    panels[1].set(title=_where(cells), xlabel="episodes", ylabel="RLHF reward")
    if known:
        optimum = cells[0]["heldout"]["optimal_rlhf_reward"]["iqm"][-1]
        panels[1].axhline(optimum, color=OPTIMUM, linestyle=":", label="optimum")
        panels[2].set(title="distance to the optimum", xlabel="episodes", ylabel="J* − J = τ·KL(π‖π*)", yscale="log")
    _legend(figure, panels[1])
    return figure


def _draw_constant(cells: list[Record]) -> plt.Figure:
    figure, panels = _panels(2)
    for cell in cells:
        _band(panels[0], cell["training"]["episodes"], cell["training"]["kl"], cell["method"])
        _band(panels[1], cell["heldout"]["episodes"], cell["heldout"]["kl"], cell["method"], marker=True)
    for axes, title in zip(panels, ("training batches", _where(cells)), strict=True):
        axes.axhline(0, color=OPTIMUM, linestyle=":", label="optimum")
        axes.set(title=title, xlabel="episodes", ylabel="KL to the reference, nats")
    _legend(figure, panels[1])
    return figure


def _draw_frontier(cells: list[Record], ways: bool) -> plt.Figure:
    """Score against KL, RLHF reward and distance to the optimum over τ; then, with `ways`, each method's scores over
    training (Fig. 5)."""
    known = _is_exact(cells)
    groups = _by_method(cells)
    count = 3 if known else 2
    figure, panels = _panels(count + (len(groups) if ways else 0))
    if ways:
        _draw_ways(panels[count:], groups, "τ", "score")
    for method, own in groups:
        _, color, marker, line = METHOD_STYLES[method]
        final = {name: [cell["final"][name] for cell in own] for name in own[0]["final"]}
        x, y = ([point["iqm"] for point in final[name]] for name in ("kl", "score"))
        panels[0].errorbar(
            x, y, _errors(final["score"]), _errors(final["kl"]), color=color, marker=marker, linestyle=line, capsize=2
        )
        taus = [cell["x"] for cell in own]
        _band(panels[1], taus, _joined(final["rlhf_reward"]), method, marker=True)
        if known:
            _band(panels[2], taus, _joined(final["gap"]), method, marker=True)
    if known:
        own = max((own for _, own in groups), key=len)
        kls, scores, best = (
            [cell["final"][f"optimal_{name}"]["iqm"] for cell in own] for name in ("kl", "reward", "rlhf_reward")
        )
        panels[0].plot(kls, scores, color=OPTIMUM, linestyle=":", marker=".")
        panels[1].plot([cell["x"] for cell in own], best, color=OPTIMUM, linestyle=":", marker=".", label="optimum")
        panels[2].set(title="distance to the optimum", xlabel="τ", ylabel="J* − J = τ·KL(π‖π*)", yscale="log")
    panels[0].set(title=f"{_where(cells)}; a point for each τ", xlabel="KL to the reference, nats", ylabel="score")
    panels[1].set(title=f"{_where(cells)}; at the end", xlabel="τ", ylabel="RLHF reward: score − τ·KL")
    for axes in panels[1:count]:
        _log_ticks(axes, sorted({cell["x"] for cell in cells}))
    for axis, name in ((panels[0].xaxis, "kl"), (panels[0].yaxis, "score"), (panels[1].yaxis, "rlhf_reward")):
        _cut(axis, [cell["final"][name]["iqm"] for cell in cells])
    _legend(figure, panels[1])
    return figure


def _cut(axis: Axis, means: list[float | None]) -> None:
    """Ends an axis not far beyond the means, or the interval of one diverged run would leave no room for them. Where
    they do not differ it stays as it is; None and NaN are those of runs that came to no finite number."""
    known = [mean for mean in means if mean is not None and np.isfinite(mean)]
    room = 0.25 * (max(known, default=0.0) - min(known, default=0.0))
    if room == 0:
        return
    low, high = axis.get_view_interval()
    axis.set_view_interval(max(low, min(known) - room), min(high, max(known) + room), ignore=True)


def _draw_ablation(cells: list[Record], label: str, log: bool) -> plt.Figure:
    """The end of training against x, then for each method the way there, a curve for each x."""
    groups = _by_method(cells)
    figure, panels = _panels(1 + len(groups))
    xs = sorted({cell["x"] for cell in cells})
    for method, own in groups:
        places = [cell["x"] if log else xs.index(cell["x"]) for cell in own]
        _band(panels[0], places, _joined([cell["final"]["rlhf_reward"] for cell in own]), method, marker=True)
    _draw_ways(panels[1:], groups, label, "rlhf_reward")
    panels[0].set(title=f"{_where(cells)}; at the end", xlabel=label, ylabel="RLHF reward: score − τ·KL")
    if log:
        _log_ticks(panels[0], xs)
    else:
        panels[0].set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    lowest = min(cell["heldout"]["rlhf_reward"]["iqm"][0] for cell in cells)
    highest = max(max(cell["heldout"]["rlhf_reward"]["high"]) for cell in cells)
    for axes in panels:  # a diverged run would leave no room for the others
        axes.set_ylim(lowest - 0.4 * (highest - lowest), highest + 0.05 * (highest - lowest))
    _legend(figure, panels[0])
    return figure


def _draw_ways(panels: list[plt.Axes], groups: list[tuple[str, list[Record]]], label: str, name: str) -> None:
    """For each method a panel of held-out curves over training, one for each x."""
    xs = sorted({cell["x"] for _, own in groups for cell in own})
    shades = dict(zip(xs, plt.get_cmap("viridis")(np.linspace(0, 0.92, len(xs))), strict=True))
    for axes, (method, own) in zip(panels, groups, strict=True):
        for cell in own:
            episodes, curve, color = cell["heldout"]["episodes"], cell["heldout"][name], shades[cell["x"]]
            axes.plot(episodes, curve["iqm"], color=color, label=f"{cell['x']:g}")
            axes.fill_between(episodes, curve["low"], curve["high"], color=color, alpha=0.12, linewidth=0)
        axes.set(title=METHOD_STYLES[method][0], xlabel="episodes", ylabel=name.replace("rlhf_", "RLHF "))
        axes.legend(title=label, fontsize="x-small", title_fontsize="x-small", frameon=False)


def _draw_judge(cells: list[Record]) -> plt.Figure:
    figure, (axes,) = _panels(1)
    for method, own in _by_method([cell for cell in cells if "win_rate" in cell]):
        _band(axes, [cell["x"] for cell in own], _joined([cell["win_rate"] for cell in own]), method, marker=True)
    axes.axhline(0.5, color=OPTIMUM, linestyle=":")
    axes.set(xlabel="τ", ylabel="win rate against PPO", ylim=(0, 1))
    _log_ticks(axes, sorted({cell["x"] for cell in cells}))
    _legend(figure, axes)
    return figure


def _budget_table(results: Record) -> str:
    """Table 3 with the interquartile mean and interval of each figure."""

    def entry(point: Record, digits: int = 1) -> str:
        return f"{point['iqm']:.{digits}f} ({point['low']:.{digits}f} to {point['high']:.{digits}f})"

    head = ("algorithm", "runs", "training, s", "a batch, s", "whole process, s", "CPU, s", "peak memory, MiB")
    names = ("training_seconds", "batch_seconds", "seconds", "cpu_seconds", "peak_memory_mib")
    rows = [
        [METHOD_STYLES[cell["method"]][0], str(cell["runs"])]
        + [entry(cell[name], 3 if name == "batch_seconds" else 1) for name in names]
        for cell in results["cells"]
        if cell["runs"]
    ]
    lines = [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *rows)]
    machine = results["machine"]
    where = f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    note = f"Preset {results['preset']}; {results['interval']}; {where}. "
    note += "Memory: the GPU's, or without one the process's, its libraries included."
    return "\n".join([note, "", *lines, ""])


def _panels(count: int) -> tuple[plt.Figure, list[plt.Axes]]:
    """So many panels, three in a row at most."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(6.0, 4.2 * columns), 3.4 * rows + 0.6), layout="constrained"
    )
    panels = list(np.ravel(axes))
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[count:]:
        panel.remove()
    return figure, panels[:count]


def _is_exact(cells: list[Record]) -> bool:
    return "gap" in cells[0]["final"]


def _where(cells: list[Record]) -> str:
    """What the figures were measured on."""
    return "all prompts, exact" if _is_exact(cells) else "held-out prompts"


def _by_method(cells: list[Record]) -> list[tuple[str, list[Record]]]:
    """Each method's cells, by x, in the order of METHOD_STYLES."""
    groups = ((method, [cell for cell in cells if cell["method"] == method]) for method in METHOD_STYLES)
    return [(method, sorted(own, key=lambda cell: cell["x"] or 0)) for method, own in groups if own]


def _band(axes: plt.Axes, x: list[float], points: Record, method: str, marker: bool = False) -> None:
    """A line with its interval; `points` holds lists iqm, low and high."""
    label, color, shape, line = METHOD_STYLES[method]
    axes.plot(
        x, points["iqm"], color=color, linestyle=line, marker=shape if marker else None, markersize=3.5, label=label
    )
    axes.fill_between(x, points["low"], points["high"], color=color, alpha=0.18, linewidth=0)


def _joined(points: list[Record]) -> Record:
    return {name: [point[name] for point in points] for name in ("iqm", "low", "high")}


def _errors(points: list[Record]) -> list[list[float]]:
    """Below and above the mean, as error bars take them; an interval by percentiles need not hold the mean."""
    below = [max(0.0, point["iqm"] - point["low"]) for point in points]
    return [below, [max(0.0, point["high"] - point["iqm"]) for point in points]]


def _log_ticks(axes: plt.Axes, values: list[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def _legend(figure: plt.Figure, axes: plt.Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    wide = figure.get_figwidth() > 10
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=5 if wide else 2,
        frameon=False,
        fontsize="small",
        alignment="left",
    )


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
