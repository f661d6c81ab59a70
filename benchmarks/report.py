"""Correctness first, then every operation beside its peers: `python -m benchmarks.report [--device cpu|cuda]`.

Prints a table for each comparison and writes it to benchmarks/results/NAME.json (NAME being the GPU's name, or cpu),
so that a run that is cut off keeps what it had; at the end NAME.md and NAME.png, which `--page NAME.json` writes again.
On a GPU it takes at most some ten minutes, compilation included. Stops with 1 where a result is wrong.

Peers that are not installed are listed with what installs them; for all of them `pip install -e ".[peers]"`. Where
nothing can be installed, a folder made by `pip install --no-deps --target DIR …` and PYTHONPATH=DIR will do.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from . import correctness, harness, klq_loss, lambda_returns, linear_logprobs, log_ratio
from .harness import FLOOR, OURS, Case

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "torchrl")
COLUMNS = ("", "ms: median (min to max)", "rate", "÷ floor", "÷ klq_fast", "peak MiB", "errors against float64")
READING = """\
Each call is timed whole, the contenders in turn, once the results were found right. On a CPU those under 0.1 s are
afterwards called in a row for 50 ms (at least 3 calls), where what fits stays in the caches: the median of the later
half, and of five such rows. ÷ floor and ÷ klq_fast are medians of the rounds' ratios of times, in a row the ratio of
the medians; the rate is the floor's work over the contender's time. Peak memory is what PyTorch allocated at one time
beyond the inputs, results included. Errors of log-probs and of λ-returns are absolute, in nats and in units of reward,
the others relative to the largest entry of the float64 truth; all are maxima."""

Results = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default 1, the steadier)")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after that time (default 8.5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    parser.add_argument("--page", type=Path, metavar="NAME.json", help="only write .md and .png again, from this file")
    options = parser.parse_args()
    if options.page is not None:
        write_page(options.page)
        return 0
    device: str = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch sees no GPU here")
    torch.set_num_threads(options.threads)
    deadline = time.perf_counter() + 60 * options.minutes
    console = Console(width=None if sys.stdout.isatty() else 180)

    wrong = failed_checks(correctness.value_checks(device), device, console)
    broken = failed_checks(correctness.promise_checks(device), device, console)
    if wrong:
        console.print("Nothing is measured, since results are wrong.")
        return 1

    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()) if device == "cuda" else "cpu"
    if device == "cpu" and options.threads > 1:
        name += f"-{options.threads}-threads"
    path: Path = options.results / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results: Results = {"machine": describe_machine(device), "broken": broken, "cases": [], "not_run": []}
    cases = [case for module in (klq_loss, lambda_returns, log_ratio, linear_logprobs) for case in module.cases(device)]
    for number, (label, build) in enumerate(cases):
        left = deadline - time.perf_counter()
        if left <= 0:
            results["not_run"].append(label)
            continue
        try:
            # The first calls (compilation, memory, errors) take about as long as the rounds should.
            results["cases"].append(measured(build, device, seconds=0.4 * left / (len(cases) - number)))
            print_case(console, results["cases"][-1])
        except Exception as error:  # the other comparisons are worth having
            broken.append(f"{label}: {type(error).__name__}: {error}")
            console.print(broken[-1])
        harness.free_memory(device)
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    for name in results["not_run"]:
        console.print(f"not measured, the time was up: {name}")
    write_page(path)
    return 1 if broken else 0


def failed_checks(checks: correctness.Checks, device: str, console: Console) -> list[str]:
    """Runs all of them; what those that failed said."""
    failed = []
    for name, check in checks:
        start = time.perf_counter()
        verdict = "right"
        try:
            check()
        except torch.OutOfMemoryError:
            verdict = "left out, too little memory"
        except Exception as error:  # on a GPU whose minutes count, the other checks run as well
            failed.append(f"{name}: {type(error).__name__}: {error}")
            verdict = f"FAILED, {type(error).__name__}: {error}"
        harness.free_memory(device)
        console.print(f"{name}: {verdict} ({time.perf_counter() - start:.1f} s)")
    return failed


def measured(build: Callable[[], Case], device: str, seconds: float) -> Results:
    case = build()
    return harness.summary(case, harness.measure(case, device, seconds))


def describe_machine(device: str) -> dict[str, str]:
    found = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {processor()}, threads used: {torch.get_num_threads()}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": time.strftime("%d %B %Y"),
        "command": f"python -m benchmarks.report {' '.join(sys.argv[1:])}".strip(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":
        found["CUDA"] = str(torch.version.cuda)
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=RESULTS.parent, capture_output=True, text=True)
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.processor()}, {len(names)} virtual cores"


def title(case: Results) -> str:
    size = ", ".join(f"{key} = {value}" for key, value in case["size"].items())
    return f"{case['op']}: {size}, {case['dtype']}"


def lines(case: Results) -> list[list[str]]:
    """A case's table: a line for each contender, one for each absent peer."""
    table = []
    for name, entry in case["contenders"].items():
        label = f"floor: {case['floor']}" if name == FLOOR else name
        if "seconds" not in entry:
            table.append([label, entry["status"], *[""] * 5])
            continue
        low, middle, high = (f"{1e3 * entry['seconds'][key]:.4g}" for key in ("min", "median", "max"))
        in_a_row = f"; in a row {1e3 * entry['seconds_in_a_row']['median']:.4g}" if "seconds_in_a_row" in entry else ""
        over_ours = f"{entry['over_ours']:.2f}"
        over_ours += f"; in a row {entry['over_ours_in_a_row']:.2f}" if "over_ours_in_a_row" in entry else ""
        alone = f"; {1e6 * entry['device_seconds']:.3g} µs on the GPU alone" if "device_seconds" in entry else ""
        errors = ", ".join(f"{key} {error:.0e}" for key, error in entry["errors"].items())
        flag = "" if entry["status"] == "ok" else f"{entry['status']}: "
        table.append(
            [
                label,
                f"{middle} ({low} to {high}){in_a_row}{alone}",
                f"{entry['rate']:.3g} {case['unit']}",
                f"{entry['over_floor']:.2f}",
                over_ours,
                f"{entry['peak_bytes'] / 2**20:.1f}",
                flag + errors,
            ]
        )
    return table + [[name, f"absent: {reason}", *[""] * 5] for name, reason in case["absent"].items()]


def print_case(console: Console, case: Results) -> None:
    table = Table(*COLUMNS, title=title(case), title_justify="left")
    for line in lines(case):
        table.add_row(*line)
    console.print(table)


def write_page(path: Path) -> None:
    """NAME.md and NAME.png from NAME.json."""
    results = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(results, path.stem))
    draw(results, path.with_suffix(".png"))


def markdown(results: Results, name: str) -> str:
    machine = results["machine"]
    parts = [
        f"# {machine['device']}",
        "\n".join(f"- {key}: {value}" for key, value in machine.items() if key not in ("device", "command")),
        f"    {machine['command']}",
        READING,
        f"![times, memory, ratios]({name}.png)",
    ]
    for case in results["cases"]:
        table = [COLUMNS, ["---"] * len(COLUMNS), *lines(case)]
        rows = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in table]
        parts += [f"## {title(case)}", "\n".join(rows)]
    if results["broken"]:
        parts.insert(4, "Checks that failed: " + "; ".join(results["broken"]) + ".")
    if results["not_run"]:
        parts.append("Not measured, the time was up: " + "; ".join(results["not_run"]) + ".")
    return "\n\n".join(parts) + "\n"


def draw(results: Results, path: Path) -> None:
    """For each operation and model: time, memory and the ratio to the floor, against the number of tokens."""
    groups: dict[str, list[Results]] = {}
    for case in results["cases"]:
        model = ", ".join(f"{key} = {case['size'][key]}" for key in ("D", "V") if key in case["size"])
        groups.setdefault(f"{case['op']}  {model}", []).append(case)
    peers = {name: None for case in results["cases"] for name in case["contenders"] if name not in (OURS, FLOOR)}
    # C7 is grey too.
    colours = {OURS: "black", FLOOR: "grey", **{name: f"C{number + (number > 6)}" for number, name in enumerate(peers)}}
    groups = {label: cases for label, cases in groups.items() if len(cases) > 1} or groups  # one point says little
    figure, rows = pyplot.subplots(len(groups), 3, figsize=(14, 3 * len(groups)), squeeze=False, layout="constrained")
    for axes, (label, cases) in zip(rows, groups.items(), strict=True):
        cases = sorted(cases, key=lambda case: case["size"]["N"])
        for name in colours:
            points = [(case["size"]["N"], case["contenders"].get(name, {})) for case in cases]
            points = [(tokens, entry) for tokens, entry in points if "seconds" in entry]
            quantities = [
                [1e3 * entry["seconds"]["median"] for _, entry in points],
                [entry["peak_bytes"] / 2**20 for _, entry in points],
                [entry["over_floor"] for _, entry in points],
            ]
            for axis, numbers in zip(axes[: 1 if name == FLOOR else 3], quantities, strict=False):
                if points:
                    width = 2.5 if name == OURS else 1
                    line = [tokens for tokens, _ in points]
                    axis.plot(line, numbers, "o-", color=colours[name], linewidth=width, markersize=4, label=name)
        for axis, quantity in zip(axes, ("time, ms", "peak memory, MiB", "time ÷ floor"), strict=True):
            axis.set(xscale="log", yscale="log", ylabel=quantity)
            tokens = sorted({case["size"]["N"] for case in cases})
            axis.set_xticks(tokens, [f"{each} tokens" for each in tokens], fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].set_title(label, fontsize=10, loc="left")
        axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(results["machine"]["device"])
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
