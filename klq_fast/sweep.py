"""The paper's figures with seeds and intervals: `python -m klq_fast.sweep FIGURE … --preset demo [-- options]`.

Each run is a child process `python -m klq_fast.train` with a folder of its own, named by what it differs in, so that
figures share runs. The same command goes on where it was stopped, and draws the figures of all runs that are finished.
"""

import dataclasses
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import transformers
import tyro
import yaml
from filelock import FileLock, Timeout
from numpy.typing import ArrayLike, NDArray

from . import plots
from .config import Config, InputError, Preset
from .metrics import Record, read_lines, write_text
from .pool import Job, Pool, duration, say
from .presets import PRESETS, parse_command_line, with_demo_models
from .train import check_names

Figure = Literal["learning-rate", "curves", "frontier", "weights", "lam", "constant", "budget", "judge"]
FIGURES: tuple[Figure, ...] = get_args(Figure)
ABLATIONS = ("learning-rate", "weights", "lam", "constant")

TAUS = (0.01, 0.02, 0.05, 0.1, 0.2)  # Figs. 2, 3 and 5
LAMS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)  # Fig. 7
RATE_FACTORS = (0.1, 1 / 3, 1.0, 10 / 3, 10.0)  # of the preset's learning rate, Fig. 6
METHODS = ("klq", "klq-alpha-1", "klq-value-0.1", "klq-paper", "ppo")
COMPARED = ("klq", "klq-paper", "ppo")  # where not KLQ's own settings are the question

# Of one thread of a server's CPU, to estimate with before the first run is done: a run's start and end, an episode.
SECONDS = {"demo": (12.0, 0.014), "arithmetic": (9.0, 0.0012)}

RESAMPLES = 2000
LEVEL = 0.95  # of the bootstrap intervals


@dataclass(frozen=True)
class SweepConfig:
    """Train KLQ and PPO with several seeds and draw the paper's figures with bootstrap intervals over the seeds.

    What stands behind a -- goes to every run: `python -m klq_fast.sweep curves --preset demo -- --episodes 2560`."""

    figures: Annotated[tuple[Figure | Literal["all"], ...], tyro.conf.Positional]
    """learning-rate (Fig. 6): each method's best is then what the others use; curves (Figs. 1 and 4); frontier: score
    against KL over τ (Figs. 2 and 5); weights: the frontier for each choice of gradient weights; lam (Fig. 7);
    constant: a reward that teaches nothing; budget: time and memory (Table 3); judge: win rates against PPO over τ
    (Fig. 3); or all."""
    preset: Preset = "demo"
    """The task, with its settings."""
    seeds: int = 10
    """Runs for each point of curves, frontier, budget and judge: with the seeds 0, 1, …"""
    ablation_seeds: int = 5
    """The same for learning-rate, weights, lam and constant."""
    jobs: int | None = None
    """Runs at a time; by default one for each GPU, or for each CPU core where there is none."""
    output_dir: Path | None = None
    """The runs, the figures and their numbers; by default sweeps/PRESET."""
    judge: str = ""
    """Options of klq_fast.judge, such as "--model NAME --base-url URL"; by default the runs' own reward judges."""
    draw_only: bool = False
    """Start nothing: draw what is finished."""
    dry_run: bool = False
    """List the runs, estimate the time, and stop."""

    def __post_init__(self) -> None:
        if not self.figures:
            raise InputError(f"FIGURE: got none, expected all, or some of {', '.join(FIGURES)}")
        for name in ("seeds", "ablation_seeds", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")


@dataclass(frozen=True)
class Run:
    """What runs of one sweep differ in."""

    method: str
    tau: float
    lam: float
    learning_rate: float
    alpha: float
    seed: int
    constant: bool = False

    @property
    def name(self) -> str:
        task = "constant-" if self.constant else ""
        return f"{task}{self.method}-tau{self.tau:g}-lam{self.lam:g}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def options(self) -> list[str]:
        klq = self.method != "ppo"
        values: dict[str, Any] = {"algorithm": "klq" if klq else "ppo"}
        if klq:
            # Over τ, 1/τ makes the policy's share of the gradient independent of τ, as PPO's whitening does.
            values["policy_weight"] = 1.0 if self.method == "klq-paper" else 1 / self.tau
            values["value_weight"] = 0.1 if self.method == "klq-value-0.1" else 1.0
            values["alpha"] = self.alpha
        values |= {"tau": self.tau, "lam": self.lam, "learning_rate": self.learning_rate, "seed": self.seed}
        if self.constant:
            values |= {"reward": "klq_fast.sweep:constant", "missing_eos_penalty": 0.0}
        return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@dataclass(frozen=True)
class Cell:
    """One point or curve of a figure: runs that differ in their seed alone."""

    method: str
    x: float | None  # τ, λ or the learning rate, whatever the figure is about
    runs: list[Run]


def main(args: Sequence[str] | None = None) -> None:
    try:
        sweep(*parse(sys.argv[1:] if args is None else args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(args: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The sweep's own options, and those behind -- for its runs."""
    split = list(args).index("--") if "--" in args else len(args)
    return tyro.cli(SweepConfig, args=list(args[:split]), prog="python -m klq_fast.sweep"), list(args[split + 1 :])


def constant(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """A reward that prefers nothing: the optimum is the reference itself."""
    return [1.0] * len(prompts)


def sweep(config: SweepConfig, options: Sequence[str]) -> None:
    output = config.output_dir or Path("sweeps") / config.preset
    if config.draw_only and not options and (output / "base.yaml").exists():
        options = ["--config", str(output / "base.yaml")]  # what is to be drawn says what it was run with
    base = base_settings(config.preset, options)
    figures = [figure for figure in FIGURES if figure in config.figures or "all" in config.figures]
    # The best learning rates are known after the first stage, and the others' runs are made with them.
    stages = [[f for f in figures if (f == "learning-rate") == first] for first in (True, False)]
    gpus = visible_gpus()
    slots = config.jobs or len(gpus) or os.cpu_count() or 1
    announce(figures, config, base, output, slots)
    if config.dry_run:
        return
    if config.draw_only and not output.is_dir():
        raise InputError(f"--output-dir {output}: got no folder of a sweep, expected one to draw with --draw-only")
    output.mkdir(parents=True, exist_ok=True)
    keep_settings(output, config.preset, base)
    if config.draw_only:
        return draw_all(figures, config, base, output, {})

    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"--output-dir {output}: another sweep is running in it") from None
    with_demo_models(base)  # once, before several runs want them
    pool = Pool(slots, gpus, output / "processes.jsonl")
    for stage in stages:
        cells = {figure: figure_cells(figure, config, base, tuned_rates(output)) for figure in stage}
        runs = dict.fromkeys(run for figure in stage for run in in_order(cells[figure]))
        stopped = pool.run([train_job(run, config.preset, output) for run in runs])
        if "judge" in stage and not stopped:
            stopped = pool.run(judgements(cells["judge"], output, shlex.split(config.judge)))
        draw_all(stage, config, base, output, pool.failures)
        if stopped:
            say("stopped; the same command goes on")
            raise SystemExit(128 + stopped)
    lock.release()
    if pool.failures:
        say(f"{len(pool.failures)} failed: {', '.join(pool.failures)}; the same command tries them again")
        raise SystemExit(1)


def announce(figures: Sequence[Figure], config: SweepConfig, base: Config, output: Path, slots: int) -> None:
    rates = tuned_rates(output)
    cells = [cell for figure in figures for cell in figure_cells(figure, config, base, rates)]
    jobs = [train_job(run, config.preset, output) for run in dict.fromkeys(run for cell in cells for run in cell.runs)]
    to_do = [job for job in jobs if not job.result.exists()]
    estimate = run_seconds(output, base)
    left = "time unknown until the first is done" if estimate is None else duration(len(to_do) * estimate / slots)
    say(f"{len(jobs)} runs for {', '.join(figures)}: {len(jobs) - len(to_do)} are finished, {len(to_do)} are to do")
    say(f"{slots} at a time: {left}" + (", and the judge's time" if "judge" in figures else ""))
    if figures != ["learning-rate"]:
        each = ", ".join(f"{method} {rates.get(method, base.learning_rate):g}" for method in METHODS)
        say(f"learning rates: {each} ({'the best' if rates else 'the same for all, not tuned'})")
    if config.dry_run:
        for job in to_do:
            say(shlex.join(job.command))


# What to run.


def base_settings(preset: Preset, options: Sequence[str]) -> Config:
    """The settings that all runs share, checked as a run would check them."""
    swept = "seed algorithm policy-weight value-weight output-dir resume dry-run".split()
    for option in options:
        if (name := option.split("=")[0].removeprefix("--").replace("_", "-")) in swept and option.startswith("--"):
            raise InputError(f"--{name} behind --: expected none, the sweep gives each run its own")
    base = parse_command_line([preset, *options])
    check_names(base)
    if not torch.cuda.is_available():
        base = dataclasses.replace(base, threads=base.threads or 1)  # as many runs at a time as there are cores
    return dataclasses.replace(base, output_dir=None, config=None)


def keep_settings(output: Path, preset: Preset, base: Config) -> None:
    """Writes base.yaml, where each run reads what differs from its preset; refuses a folder of other settings."""
    defaults = PRESETS[preset]()
    changed = {
        field.name: getattr(base, field.name)
        for field in dataclasses.fields(Config)
        if getattr(base, field.name) != getattr(defaults, field.name)
    }
    settings = {"preset": preset, **changed}
    file = output / "base.yaml"
    before = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else settings
    for name in sorted(settings.keys() | before.keys()):
        if settings.get(name) != before.get(name):
            raise InputError(
                f"--{name.replace('_', '-')}: got {settings.get(name, 'none')}, but the runs in {output} have "
                f"{before.get(name, 'none')} (none: as the preset); go on with theirs, or name another --output-dir"
            )
    write_text(file, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def tuned_rates(output: Path) -> dict[str, float]:
    """Each method's best learning rate, once the figure learning-rate has found it."""
    file = output / "learning-rate.json"
    return json.loads(file.read_text(encoding="utf-8"))["best"] if file.exists() else {}


def figure_cells(figure: Figure, config: SweepConfig, base: Config, rates: Mapping[str, float]) -> list[Cell]:
    seeds = range(config.ablation_seeds if figure in ABLATIONS else config.seeds)

    def cell(method: str, x: float | None = None, **values: Any) -> Cell:
        values = {"tau": base.tau, "lam": base.lam, "learning_rate": rates.get(method, base.learning_rate), **values}
        # The preset's β of Eq. 18 at every τ, so that one batch moves log-probs towards Δ/(τ + β) more, not Δ/τ.
        beta = base.tau * (1 - base.alpha) / base.alpha
        values["alpha"] = values["tau"] / (values["tau"] + beta) if method in ("klq", "klq-value-0.1") else 1.0
        return Cell(method, x, [Run(method, seed=seed, **values) for seed in seeds])

    match figure:
        case "learning-rate":
            grid = [float(f"{factor * base.learning_rate:.1g}") for factor in RATE_FACTORS]
            grid[RATE_FACTORS.index(1.0)] = base.learning_rate
            return [cell(method, rate, learning_rate=rate) for method in METHODS for rate in grid]
        case "frontier" | "judge":
            return [cell(method, tau, tau=tau) for method in COMPARED for tau in TAUS]
        case "weights":
            return [cell(method, tau, tau=tau) for method in METHODS for tau in TAUS]
        case "lam":
            return [cell(method, lam, lam=lam) for method in ("klq", "ppo") for lam in LAMS]
        case "constant":
            return [cell(method, constant=True) for method in METHODS]
        case "curves" | "budget":
            return [cell(method) for method in COMPARED]


def in_order(cells: Sequence[Cell]) -> list[Run]:
    """All first seeds, then all second ones, …: a sweep that is stopped early has some of each."""
    return [run for runs in zip(*(cell.runs for cell in cells), strict=True) for run in runs]


def train_job(run: Run, preset: Preset, output: Path) -> Job:
    folder = output / "runs" / run.name
    command = [sys.executable, "-m", "klq_fast.train", preset, "--config", str(output / "base.yaml")]
    command += [*run.options, "--output-dir", str(folder), "--resume"]
    return Job(run.name, folder, command, folder / "policy")


def judgements(cells: Sequence[Cell], output: Path, options: Sequence[str]) -> list[Job]:
    """Each method's run against PPO's of the same τ and seed."""
    baseline = {(cell.x, run.seed): run for cell in cells if cell.method == "ppo" for run in cell.runs}
    jobs = []
    for cell in cells:
        for run in cell.runs if cell.method != "ppo" else []:
            pair = [str(output / "runs" / r.name) for r in (run, baseline[cell.x, run.seed])]
            result = judgement_file(output, run)
            command = [sys.executable, "-m", "klq_fast.judge", *pair, "--output", str(result.with_suffix(".jsonl"))]
            jobs.append(Job(f"judge-{run.name}", result.parent, [*command, *options], result))
    return jobs


def judgement_file(output: Path, run: Run) -> Path:
    return output / "judge" / run.name / "verdicts.json"


def visible_gpus() -> list[str]:
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",") if torch.cuda.is_available() else []
    return [str(index) for index in range(torch.cuda.device_count())]


def run_seconds(output: Path, base: Config) -> float | None:
    """How long a run takes: as those before it, or as measured elsewhere, or unknown."""
    accounts = read_lines(output / "processes.jsonl")
    seconds = [a["seconds"] for a in accounts if not a["exit_code"] and not a["job"].startswith("judge-")]
    if seconds:
        return float(np.mean(seconds[-20:]))
    if base.preset not in SECONDS:
        return None
    start, episode = SECONDS[base.preset]
    return start + episode * base.episodes


# What came out.


def iqm(values: NDArray[np.float64], axis: int = 0) -> NDArray[np.float64]:
    """Interquartile mean: a quarter of the values, rounded down, is left out at each end (as rliable does)."""
    count = values.shape[axis]
    middle = np.sort(values, axis=axis).take(range(count // 4, count - count // 4), axis=axis)
    return np.asarray(middle.mean(axis))


def resampled(values: NDArray[np.float64], stream: int = 0) -> NDArray[np.float64]:
    """(seeds, …) -> (RESAMPLES, …): the interquartile means of bootstrap samples of whole runs."""
    count = len(values)
    rows = np.random.default_rng(stream).integers(count, size=(RESAMPLES, count))
    return iqm(values[rows], axis=1)


def interval(samples: NDArray[np.float64]) -> list[Any]:
    """The percentiles between which LEVEL of the bootstrap samples lie."""
    return [np.quantile(samples, q, axis=0).tolist() for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]


def summary(values: ArrayLike) -> Record:
    """(seeds, …) numbers with their interquartile mean and interval."""
    array = np.asarray(values, dtype=np.float64)
    low, high = interval(resampled(array))
    return {"iqm": iqm(array).tolist(), "low": low, "high": high, "values": array.tolist()}


def difference(values: Sequence[float], baseline: Sequence[float]) -> Record:
    """Between the interquartile means; each group is resampled on its own (a stratified bootstrap).

    better: the share of pairs, one run of each group, in which the first is higher, ties as half (rliable's
    probability of improvement).
    """
    a, b = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    low, high = interval(resampled(a, stream=1) - resampled(b, stream=2))
    better = (a[:, None] > b).mean() + (a[:, None] == b).mean() / 2
    return {"iqm": float(iqm(a) - iqm(b)), "low": low, "high": high, "better": float(better)}


def heldout(record: Record) -> Record:
    """An evaluation's figures: exact ones where the task knows them, with the distance from the optimum."""
    if "exact_rlhf_reward" not in record:
        return {name: record[name] for name in ("score", "kl", "rlhf_reward")}
    exact = {"score": "exact_reward", "kl": "exact_kl", "rlhf_reward": "exact_rlhf_reward"}
    rest = ("kl_to_optimum", "optimal_reward", "optimal_kl", "optimal_rlhf_reward")
    figures = {name: record[key] for name, key in exact.items()} | {name: record[name] for name in rest}
    return figures | {"gap": record["optimal_rlhf_reward"] - record["exact_rlhf_reward"]}


def columns(records: Iterable[Record]) -> dict[str, list[float]]:
    rows = list(records)
    return {name: [row[name] for row in rows] for name in rows[0]}


def cell_numbers(cell: Cell, output: Path) -> Record:
    """A cell's numbers over its finished runs: final ones, held-out curves and training curves."""
    folders = {run.name: output / "runs" / run.name for run in cell.runs}
    finished = {name: folder for name, folder in folders.items() if (folder / "policy").exists()}
    numbers: Record = {
        "method": cell.method,
        "x": cell.x,
        "runs": list(finished),
        "missing": [name for name in folders if name not in finished],
    }
    if not finished:
        return numbers
    evaluations = [read_lines(folder / "eval.jsonl") for folder in finished.values()]
    training = [read_lines(folder / "metrics.jsonl") for folder in finished.values()]
    curves = [columns(map(heldout, records)) for records in evaluations]
    batches = [columns({n: r[n] for n in ("score", "kl", "rlhf_reward")} for r in records) for records in training]
    numbers["final"] = {name: summary([curve[name][-1] for curve in curves]) for name in curves[0]}
    numbers["heldout"] = {"episodes": [r["episodes"] for r in evaluations[0]]}
    numbers["heldout"] |= {name: summary([curve[name] for curve in curves]) for name in curves[0]}
    numbers["training"] = {"episodes": [r["episodes"] for r in training[0]]}
    numbers["training"] |= {name: summary([batch[name] for batch in batches]) for name in batches[0]}
    return numbers


def budget_numbers(cell: Cell, output: Path) -> Record:
    """Seconds of training, the process's, and the peak memory that the run has measured of itself."""
    accounts: dict[str, list[Record]] = {}
    for account in read_lines(output / "processes.jsonl"):
        accounts.setdefault(account["job"], []).append(account)
    rows = []
    for run in cell.runs:
        records = read_lines(output / "runs" / run.name / "metrics.jsonl")
        # A run that was interrupted has several processes, whose time says little.
        if len(mine := accounts.get(run.name, [])) == 1 and records and not mine[0]["exit_code"]:
            seconds = [record["seconds"] for record in records]
            row = {"training_seconds": sum(seconds), "batch_seconds": float(np.median(seconds))}
            row |= {name: mine[0][name] for name in ("seconds", "cpu_seconds")}
            rows.append(row | {"peak_memory_mib": max(record["peak_memory_bytes"] for record in records) / 2**20})
    numbers: Record = {"method": cell.method, "x": None, "runs": len(rows)}
    return numbers | {name: summary(values) for name, values in (columns(rows) if rows else {}).items()}


def judge_numbers(cell: Cell, output: Path) -> Record:
    """Win rates against PPO for each seed, and the verdicts of all seeds together."""
    verdicts = [json.loads(f.read_text("utf-8")) for r in cell.runs if (f := judgement_file(output, r)).exists()]
    numbers: Record = {"method": cell.method, "x": cell.x, "runs": len(verdicts)}
    if verdicts:
        totals = {name: sum(v[name] for v in verdicts) for name in ("wins", "losses", "ties", "unparsed")}
        rates = [v["win_rate"] for v in verdicts if v["win_rate"] is not None]
        numbers |= totals | ({"win_rate": summary(rates)} if rates else {})
        numbers["intervals"] = [v["interval"] for v in verdicts]
    return numbers


def differences(cells: Sequence[Record]) -> list[Record]:
    """Each method against PPO at the same x, in final figures on held-out prompts."""
    baseline = {cell["x"]: cell for cell in cells if cell["method"] == "ppo"}
    rows = []
    for cell in cells:
        other = baseline.get(cell["x"], {})
        if cell["method"] != "ppo" and "final" in cell and "final" in other:
            for name in ("rlhf_reward", "score", "kl", "gap"):
                if name in cell["final"]:
                    both = (numbers["final"][name]["values"] for numbers in (cell, other))
                    rows.append({"method": cell["method"], "x": cell["x"], "of": name, **difference(*both)})
    return rows


def best_rates(cells: Sequence[Record]) -> dict[str, float]:
    """The learning rate with the highest final held-out RLHF reward, for each method. A rate at which a run failed, or
    is not finished yet, is not among them."""
    best: dict[str, tuple[float, float]] = {}
    for cell in cells:
        if cell["runs"] and not cell["missing"]:
            reward = cell["final"]["rlhf_reward"]["iqm"]
            best[cell["method"]] = max(best.get(cell["method"], (-math.inf, 0.0)), (reward, cell["x"]))
    return {method: rate for method, (_, rate) in best.items()}


def machine() -> Record:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor is empty, or the architecture, on Linux
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {
        "processor": models[0].partition(": ")[2] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "system": platform.platform(),
        **versions,
        "transformers": transformers.__version__,
    }


def draw_all(
    figures: Sequence[Figure], config: SweepConfig, base: Config, output: Path, failures: Mapping[str, str]
) -> None:
    for figure in figures:  # learning-rate first, as it says which runs the others have
        draw(figure, figure_cells(figure, config, base, tuned_rates(output)), output, base, failures)


def draw(figure: Figure, cells: Sequence[Cell], output: Path, base: Config, failures: Mapping[str, str]) -> None:
    """Writes FIGURE.json, the raw numbers, and FIGURE.png; of budget a table, budget.md."""
    collect = {"budget": budget_numbers, "judge": judge_numbers}.get(figure, cell_numbers)
    numbers = [collect(cell, output) for cell in cells]
    names = {run.name for cell in cells for run in cell.runs}
    results: Record = {
        "figure": figure,
        "preset": base.preset,
        "settings": yaml.safe_load(base.to_yaml()),
        "interval": f"{LEVEL:.0%} bootstrap of the interquartile mean over seeds",
        "machine": machine(),
        "failures": {name: log for name, log in failures.items() if name.removeprefix("judge-") in names},
    }
    if collect is cell_numbers:
        results["against_ppo"] = differences(numbers)
    if figure == "learning-rate":
        results["best"] = best_rates(numbers)
    results["cells"] = numbers
    write_text(output / f"{figure}.json", json.dumps(results, ensure_ascii=False) + "\n")
    if not any(cell["runs"] for cell in numbers):
        return say(f"{figure}: no run is finished yet")
    plots.draw_sweep(results, output)
    say(f"{figure}: drawn beside its numbers in {output / figure}.json")


if __name__ == "__main__":
    main()
