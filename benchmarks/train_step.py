"""One batch of TL;DR's shape through klq_fast's loop and through TRL's PPO: `python -m benchmarks.train_step`.

On a GPU Pythia-1B's shape, 192 prompts of 100 to 512 tokens and 53 response tokens; on a CPU two layers, d = 64 and
128, 64 prompts of 12 to 64 tokens and 32 response tokens. Both load the same folders, with random weights, and do the
same: 4 epochs, an optimizer step each. Each run is a process of its own, in turn with the others'; its first batch is
kept apart. Prints tables, and writes them to benchmarks/results/train_step-cpu.json and .md (on a GPU train_step-gpu)
after every process. Stops with 1 where a run failed or did other work than it should have.

TRL 1.12.0, the last with a PPO trainer, has a virtual environment of its own:
    python -m venv trl && trl/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0
    python -m benchmarks.train_step --trl-python trl/bin/python
Where nothing can be installed, a folder made elsewhere by `pip install --no-deps --target DIR trl==1.12.0 datasets …`
will do, by --peer-packages DIR. Without either, TRL's lines say "not measured yet".

`--predict` measures nothing: it prints the tables of docs/budget.md.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import budget

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).with_name("train_step_worker.py")
PHASES = {"rollout": "rollout", "score": "score", "logprobs": "log-probs", "update": "update"}
NAMES = {"klq": "klq_fast, KLQ", "ppo": "klq_fast, PPO", "trl": "TRL 1.12.0, PPO"}
COLUMNS = ("", "s a batch: median (min to max)", *PHASES.values(), "episodes/s", "memory added, MiB", "speed", "memory")
NOT_MEASURED = "not measured yet"
READING = """\
A batch is timed from its prompts to its last optimizer step; the first of each process is left out, and "first" gives
it. Phases are medians; log-probs are those of the reference and the values, and on our side the policy's, which TRL
takes from generation at a cost in memory. Memory is the process's peak up to the end of the last batch minus what it
holds once its libraries are imported (on a GPU, the most that PyTorch had allocated); "at its end" counts what follows,
which is our checkpoint, saved policy and figures, and nothing in TRL. "speed" is TRL's time over this one's, "memory"
this one's over TRL's: medians of the rounds' ratios. End-of-sequence and padding tokens have logits 30 lower than
others in both, so that every response has its full length. Both have microbatches of as many rows, 16 as in TRL's own
example for TL;DR, ours without padding. Ours decodes responses and tokenizes them anew for the reward model, as it does
for any; TRL hands over tokens."""

Results = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is trained on what."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocab: int
    rows: int
    longest_prompt: int
    response: int
    microbatch: int  # rows in a forward and backward pass
    trl_rollout: int  # rows that TRL generates and scores at a time
    epochs: int = 4


PYTHIA_1B = Size("Pythia-1B", 16, 2048, 8, 50304, 192, 512, 53, microbatch=16, trl_rollout=64)
TINY = [Size(f"2 layers, d = {d}", 2, d, 4, 1024, 64, 64, 32, microbatch=16, trl_rollout=64) for d in (64, 128)]
GOALS = {"cpu": {"speed": 2.0, "memory": 0.6}, "cuda": {"speed": 8.0, "memory": 0.5, "minutes": 45.0}}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.batches is not None and options.batches < 2:
        parser().error(f"--batches: got {options.batches}, expected at least 2: the first is not counted")
    if options.predict:
        print(budget.tables())
        return 0
    import torch
    from rich.console import Console

    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = time.monotonic() + 60 * options.minutes
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    torch.set_num_threads(options.threads)
    sizes = [PYTHIA_1B] if device == "cuda" else TINY
    rounds = options.rounds or (1 if device == "cuda" else 3)
    path = options.results / f"train_step-{'gpu' if device == 'cuda' else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    batches = options.batches = options.batches or (4 if device == "cuda" else 6)
    results: Results = {"machine": describe(device), "rounds": rounds, "batches": batches, "sizes": []}

    def keep(entry: Results) -> None:
        done = results | {"sizes": [*results["sizes"], entry]}
        path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(done), encoding="utf-8")

    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="train_step-") as scratch:
            entry = measured(size, device, rounds, options, Path(scratch), deadline, console.print, keep)
        results["sizes"].append(entry)
        print_entry(console, entry)
    return 1 if any(entry["wrong"] for entry in results["sizes"]) else 0


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described.add_argument("--trl-python", type=Path, help="the Python of the virtual environment that has TRL")
    described.add_argument("--peer-packages", type=Path, help="a folder with TRL for this Python, instead")
    described.add_argument("--algorithms", nargs="+", choices=("klq", "ppo"), default=["klq", "ppo"])
    described.add_argument("--rounds", type=int, help="processes of each (default 3, on a GPU 1)")
    described.add_argument("--batches", type=int, help="in a process, with the first (default 6, on a GPU 4)")
    described.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default 1, the steadier)")
    described.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after them (default 8.5)")
    described.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    described.add_argument("--predict", action="store_true", help="only print the arithmetic of docs/budget.md")
    return described


def measured(
    size: Size,
    device: str,
    rounds: int,
    options: argparse.Namespace,
    scratch: Path,
    deadline: float,
    say: Callable[[str], None],
    keep: Callable[[Results], None],
) -> Results:
    """All runs of one size, and what was found about them; `keep` gets what there is after each of them."""
    make_stand_ins(size, scratch)
    trl = trl_command(options)
    contenders = [*options.algorithms[:1], *(["trl"] if trl else []), *options.algorithms[1:]]
    runs: dict[str, list[Results]] = {name: [] for name in contenders}
    found: Results = {"size": dataclasses.asdict(size), "device": device, "runs": runs, "missed": [], "wrong": []}
    failed = []
    for number in range(rounds):
        for name in contenders:
            which = f"{NAMES[name]}, round {number + 1}"
            spec = specification(name, size, device, options, scratch, record=name == "trl" and number == 0)
            left = deadline - time.monotonic()
            try:
                run = run_worker(spec, trl if name == "trl" else None, timeout=left + 60) if left > 0 else None
            except WorkerFailed as error:  # the others' figures are worth having
                failed.append(f"{size.name}, {which} failed: {error}")
                say(failed[-1])
                continue
            if run is None:
                found["missed"].append(which)
                continue
            runs[name].append(run | {"round": number})
            found["wrong"] = failed + wrong_runs(found)
            keep(found)
            say(f"{size.name}, {which}: {summary_line(run)}")
    if runs.get("trl"):
        try:
            checked = run_worker(specification("check", size, device, options, scratch, record=True), timeout=120)
            found["check"] = {what: checked[what] for what in ("logprobs", "ref_logprobs", "scores")} if checked else {}
        except WorkerFailed as error:
            failed.append(f"{size.name}, comparison with TRL's numbers failed: {error}")
    found["wrong"] = failed + wrong_runs(found)
    keep(found)
    return found


def trl_command(options: argparse.Namespace) -> tuple[str, str] | None:
    """The Python that has TRL, and its PYTHONPATH; None where there is none."""
    if options.trl_python is not None:
        if not options.trl_python.exists():
            sys.exit(f"--trl-python: got {options.trl_python}, expected an existing Python")
        return str(options.trl_python.absolute()), ""
    if options.peer_packages is not None:
        if not (options.peer_packages / "trl").is_dir():
            sys.exit(f"--peer-packages: got {options.peer_packages}, expected a folder with trl in it")
        return sys.executable, str(options.peer_packages.absolute())
    return None


def specification(
    contender: str, size: Size, device: str, options: argparse.Namespace, folder: Path, record: bool
) -> Results:
    """What the worker reads: one process's task."""
    return {
        "contender": contender,
        "size": dataclasses.asdict(size),
        "device": device,
        "threads": options.threads,
        "batches": options.batches,
        "microbatch_tokens": microbatch_tokens(size),
        "policy": str(folder / "policy"),
        "reward_model": str(folder / "reward_model"),
        "dataset": str(folder / "prompts"),
        "record": str(folder / "record.pt") if record else None,
        "result": str(folder / "result.json"),
    }


class WorkerFailed(RuntimeError):
    """A process that did not end well, with the end of what it said."""


def run_worker(spec: Results, trl: tuple[str, str] | None = None, timeout: float = 600) -> Results | None:
    """Runs one process to its end; None if that takes more than `timeout` seconds."""
    python, packages = trl or (sys.executable, "")
    paths = [packages] if trl else [str(Path(__file__).parents[1])]
    environment = dict(
        os.environ,
        OMP_NUM_THREADS=str(spec["threads"]),
        TOKENIZERS_PARALLELISM="false",
        PYTHONSAFEPATH="1",  # this folder's modules are not to stand in the way of others of their names
    )
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, paths), os.environ.get("PYTHONPATH", "")]).strip(":")
    if trl and spec["device"] == "cuda":
        environment["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch --mixed_precision bf16` sets it
    with tempfile.TemporaryDirectory(prefix="train_step-") as scratch:
        file = Path(scratch) / "specification.json"
        file.write_text(json.dumps(spec | {"scratch": scratch}), encoding="utf-8")
        started = time.monotonic()
        try:
            done = subprocess.run(
                [python, WORKER, file], env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return None
        if done.returncode:
            raise WorkerFailed(f"exit status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    result: Results = json.loads(Path(spec["result"]).read_text(encoding="utf-8"))
    return result | {"process_seconds": time.monotonic() - started}


def make_stand_ins(size: Size, folder: Path) -> None:
    """Writes policy/, reward_model/ (GPT-NeoX, random) and prompts/, whose training split is one batch of prompts."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        GPTNeoXForSequenceClassification,
        PreTrainedTokenizerFast,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    # A token is a word between spaces, so that what is decoded gives the same tokens again.
    special = {"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}
    words = [*special.values(), *(f"w{i}" for i in range(2, size.vocab))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[2]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    config = GPTNeoXConfig(  # type: ignore[call-arg]
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        num_labels=1,
    )
    torch.manual_seed(0)
    for name, kind in (("policy", GPTNeoXForCausalLM), ("reward_model", GPTNeoXForSequenceClassification)):
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # 2·10⁹ random numbers take a CPU a minute
            model = kind(config)
        if name == "policy":
            never_ends(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    random = np.random.default_rng(0)
    tokens = [random.integers(2, size.vocab, length).tolist() for length in prompt_lengths(size)]
    (folder / "prompts").mkdir()
    for split, rows in (("train", tokens), ("test", tokens[:1])):
        lines = (json.dumps({"prompt": " ".join(words[token] for token in row)}) + "\n" for row in rows)
        (folder / "prompts" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompts" / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")


def never_ends(model: Any) -> None:
    """Gives the head a constant input, and with it the special tokens logits that are 30 lower than random ones.

    TRL takes a sampled padding token for a response's end, and the two sample different responses: only where none
    ends early do both have the same number of tokens.
    """
    import torch

    norm, head = model.base_model.final_layer_norm, model.get_output_embeddings()
    with torch.no_grad():
        norm.weight[-1], norm.bias[-1] = 0.0, 1.0
        head.weight[:, -1] = 0.0
        head.weight[:2, -1] = -30.0


def prompt_lengths(size: Size) -> list[int]:
    """One batch's, like TL;DR's where the longest is 512: 100 to 512 tokens, 310 on average, one of the longest."""
    import numpy as np

    scale, random = size.longest_prompt / 512, np.random.default_rng(1)
    drawn = random.normal(310, 120, 10 * size.rows)
    kept = scale * drawn[(drawn >= 100) & (drawn <= 512)][: size.rows]
    lengths = kept.round().astype(int).tolist()
    lengths[lengths.index(max(lengths))] = size.longest_prompt
    return lengths


def microbatch_tokens(size: Size) -> int:
    """Of as many rows as TRL's microbatch has, on average."""
    return math.ceil(size.microbatch * (statistics.mean(prompt_lengths(size)) + size.response))


def wrong_runs(found: Results) -> list[str]:
    """In words, where a run did not do the work that it should have done, or the two loops disagree."""
    size, problems = Size(**found["size"]), []
    for name, runs in found["runs"].items():
        # At the start the policy is the reference, and ours bitwise so. TRL sums log-probs of generation and of another
        # forward pass; on a GPU they come in two precisions.
        noise = 0.0 if name != "trl" else 1e-4 if found["device"] == "cpu" else 1.0
        for run in runs:
            batches = len(run["seconds"])
            expected = {
                "optimizer steps": (run["steps"], batches * size.epochs),
                "response tokens": (run["response_tokens"], [size.rows * size.response] * batches),
                "end-of-sequence tokens": (run["eos"], [0] * batches),
                "losses that are numbers": (sum(abs(loss) < 1e6 for loss in run["loss"]), batches),
                "moved weights": (run["moved"] > 0, True),
                "KL of 0 in the first batch": (abs(run["kl"][0]) <= noise, True),
            }
            problems += [
                f"{size.name}, {NAMES[name]}: {what}: got {got}, expected {right}"
                for what, (got, right) in expected.items()
                if got != right
            ]
    # Sums of float32 products in another order on a CPU; bf16 has 2⁻⁸ of logits up to 5, and of scores.
    tolerance = 1e-4 if found["device"] == "cpu" else 0.15
    problems += [
        f"{size.name}, {what} of TRL's first batch: ours differ by {error}, expected at most {tolerance}"
        for what, error in found.get("check", {}).items()
        if not error <= tolerance
    ]
    return problems


def seconds_of(run: Results) -> list[float]:
    """Of each batch but the first."""
    return run["seconds"][1:]


def cpu_seconds(run: Results) -> list[float]:
    """The processor's, of each batch but the first: what a busy machine disturbs less."""
    return [end - begin for begin, end in itertools.pairwise(run["cpu_seconds"])]


def summary_line(run: Results) -> str:
    return (
        f"{statistics.median(seconds_of(run)):.3f} s a batch, first {run['seconds'][0]:.3f}, "
        f"{statistics.median(cpu_seconds(run)):.3f} s of the processor, {run['peak_bytes'] / 2**20:.0f} MiB added, "
        f"process {run['process_seconds']:.0f} s"
    )


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def figures(entry: Results, name: str) -> Results:
    """One contender's: seconds, phases, memory, and its ratios to TRL, each with its spread over processes."""
    runs, others = entry["runs"].get(name, []), entry["runs"].get("trl", [])
    if not runs:
        return {}
    seconds = [statistics.median(seconds_of(run)) for run in runs]
    found: Results = {
        "seconds": spread(second for run in runs for second in seconds_of(run)),
        "first": spread(run["seconds"][0] for run in runs),
        "memory": spread(run["peak_bytes"] for run in runs),
        "end_memory": spread(run["end_peak_bytes"] for run in runs),
        "rate": entry["size"]["rows"] / statistics.median(seconds),
        "phases": {},
    }
    for phase in PHASES:
        measured = [second for run in runs for second in run["phases"][phase][1:] if second is not None]
        found["phases"][phase] = statistics.median(measured) if measured else None
    pairs = [(run, other) for run in runs for other in others if run["round"] == other["round"]]
    if pairs and name != "trl":
        found["speed"] = spread(
            statistics.median(seconds_of(other)) / statistics.median(seconds_of(run)) for run, other in pairs
        )
        found["less_memory"] = spread(run["peak_bytes"] / other["peak_bytes"] for run, other in pairs)
    return found


def lines(entry: Results) -> list[list[str]]:
    """The table of one size: a line for each contender, with the ratios to TRL last."""
    table = []
    for name in dict.fromkeys([*entry["runs"], "trl"]):
        found = figures(entry, name)
        if not found:
            table.append([NAMES[name], NOT_MEASURED, *[""] * (len(COLUMNS) - 2)])
            continue
        phases = [found["phases"][phase] for phase in PHASES]
        table.append(
            [
                NAMES[name],
                f"{ranged(found['seconds'], 3)}; first {found['first']['median']:.3g}",
                *("" if phase is None else f"{phase:.3g}" for phase in phases),
                f"{found['rate']:.3g}",
                f"{ranged(found['memory'], 0, 2**20)}; at its end {found['end_memory']['median'] / 2**20:.0f}",
                f"{ranged(found['speed'], 2)} ×" if "speed" in found else "",
                f"{ranged(found['less_memory'], 2)} ×" if "less_memory" in found else "",
            ]
        )
    return table


def ranged(found: dict[str, float], digits: int, unit: float = 1) -> str:
    middle, low, high = (f"{found[key] / unit:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def remarks(entry: Results) -> list[str]:
    """What stands below the table: the goals, the hours of a whole run, and what was checked."""
    size, goals = Size(**entry["size"]), GOALS[entry["device"]]
    said = []
    for name in entry["runs"]:
        found = figures(entry, name)
        if found and size == PYTHIA_1B:
            hours = budget.EPISODES / found["rate"] / 3600
            verdict = f", the goal of {goals['minutes']:.0f} minutes {kept(60 * hours <= goals['minutes'])}"
            said.append(
                f"{NAMES[name]}: {budget.EPISODES:,} episodes in {hours:.2f} h and GPU-hours"
                f"{verdict if name != 'trl' else ''}; the paper: 5 h 16 on four A100s, "
                f"{budget.PAPER_GPU_HOURS:.1f} GPU-hours"
            )
        if "speed" in found:
            fast, lean = found["speed"]["median"] >= goals["speed"], found["less_memory"]["median"] <= goals["memory"]
            said.append(
                f"{NAMES[name]}: at least {goals['speed']:.3g} times TRL's speed: {kept(fast)}; at most "
                f"{goals['memory']} of its memory: {kept(lean)}"
            )
    shape, batch = budget.Model(size.layers, size.hidden, size.vocab), budget.Batch(*batch_of(size))
    ours, theirs = (sum(count(shape, batch).values()) / 1e9 for count in (budget.flops, budget.trl_flops))
    said.append(
        f"By arithmetic (docs/budget.md): {ours:,.0f} GFLOP a batch in our loop, {theirs:,.0f} in TRL's, "
        f"{theirs / ours:.2f} times as many"
    )
    if size == PYTHIA_1B:
        predicted = budget.seconds(shape, batch, budget.H200, 1).items()
        phases = ", ".join(f"{phase} {second:.2f} s" for phase, second in predicted if second)
        said.append(f"Predicted for one H200 (docs/budget.md): {phases}")
    else:
        said.append(f"Pythia-1B on a GPU: {NOT_MEASURED}")
    if entry.get("check"):
        errors = ", ".join(f"{key} {error:.1e}" for key, error in entry["check"].items())
        said.append(f"On the responses of TRL's first batch ours differ from its own numbers by at most: {errors}")
    runs = [run for runs in entry["runs"].values() for run in runs]
    if runs and not entry["wrong"]:
        said.append(
            f"Checked in each of the {len(runs)} processes: {runs[0]['steps']} optimizer steps, "
            f"{sum(runs[0]['response_tokens'])} response tokens in {len(runs[0]['seconds'])} batches, finite losses, "
            "weights moved, a KL of 0 at the start"
        )
    said += [f"Not measured, the time was up: {missed}" for missed in entry["missed"]]
    return said + [f"WRONG: {problem}" for problem in entry["wrong"]]


def batch_of(size: Size) -> tuple[int, float, int, int, int]:
    return size.rows, statistics.mean(prompt_lengths(size)), size.longest_prompt, size.response, size.epochs


def kept(yes: bool) -> str:
    return "kept" if yes else "missed"


def title(entry: Results) -> str:
    size = Size(**entry["size"])
    lengths = prompt_lengths(size)
    return (
        f"{size.name}: {size.rows} prompts of {min(lengths)} to {max(lengths)} tokens "
        f"({statistics.mean(lengths):.0f} on average), {size.response} response tokens, {size.epochs} epochs, "
        f"V = {size.vocab}"
    )


def print_entry(console: Any, entry: Results) -> None:
    from rich.table import Table

    table = Table(*COLUMNS, title=title(entry), title_justify="left")
    for line in lines(entry):
        table.add_row(*line)
    console.print(table)
    for remark in remarks(entry):
        console.print(remark)


def describe(device: str) -> dict[str, str]:
    """The machine, the versions of our process, and the command."""
    from .report import describe_machine

    machine = describe_machine(device) | {"command": f"python -m benchmarks.train_step {' '.join(sys.argv[1:])}"}
    return {key: value for key, value in machine.items() if value != "not installed"}


def markdown(results: Results) -> str:
    machine = dict(results["machine"])
    versions = [run["versions"] for entry in results["sizes"] for run in entry["runs"].get("trl", [])]
    if versions:
        machine["TRL's environment"] = ", ".join(f"{name} {version}" for name, version in versions[0].items())
    command = re.sub(r"(--\S+) \S*/", r"\1 …/", machine.pop("command"))
    parts = [
        f"# A batch through klq_fast and through TRL: {machine.pop('device')}",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
        f"    {command}",
        f"{results['rounds']} processes of each, in turn; {results['batches'] - 1} batches in each after the first.",
        READING,
    ]
    for entry in results["sizes"]:
        table = [list(COLUMNS), ["---"] * len(COLUMNS), *lines(entry)]
        parts += [f"## {title(entry)}", "\n".join(f"| {' | '.join(line)} |" for line in table)]
        parts.append("\n".join(f"- {remark}" for remark in remarks(entry)))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
