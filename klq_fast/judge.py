"""Which of two runs answers better? `python -m klq_fast.judge RUN_A RUN_B`: the paper's protocol (Section 5.3, Fig. 3).

Both runs answer the same held-out prompts. A judge sees the two responses to each prompt twice, in both orders, writes
a comparison first and then its choice. The judge is a model behind an OpenAI-compatible endpoint (--model), a chat
model on this machine (--local-model) or a reward (by default the runs' own).
"""

import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import Config, InputError
from .evaluate import load_run, respond_to_heldout
from .judges import CRITERIA, ORDERS, Comparison, Judge, endpoint_judge, local_judge, reward_judge
from .metrics import Record, append_line, write_text

OPENAI = "https://api.openai.com/v1"


@dataclass(frozen=True)
class JudgeConfig:
    """Which of two runs answers held-out prompts better? Without --model and --local-model the runs' reward decides."""

    run_a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")]
    """The folder of a finished run."""
    run_b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")]
    """The folder of another, on the same prompts."""
    output: Path = Path("judge.jsonl")
    """A line for each verdict, FILE.jsonl; the summary goes to FILE.json. With verdicts of the same runs, prompts and
    judge in it, only those that are missing are asked for."""

    # The judge.
    model: str | None = None
    """A model behind an OpenAI-compatible endpoint. Its key is read from the environment variable OPENAI_API_KEY."""
    base_url: str | None = None
    """The endpoint of --model, such as http://localhost:8000/v1; by default OpenAI's own."""
    local_model: str | None = None
    """A chat model on this machine: a folder or a hub name."""
    reward_model: str | None = None
    """A reward model, which prefers the higher score: a folder or a hub name."""
    reward: str | None = None
    """A Python function MODULE:FUNCTION from (prompts, responses) to a list of floats, which does the same."""
    criteria: str | None = None
    """What makes a response better: tldr, hh, imdb, demo, general or your own words; RUN_A's preset decides."""

    # The comparisons.
    prompts: int = 32
    """Held-out prompts: the first ones, each judged in both orders."""
    greedy: bool = False
    """The runs' likeliest responses instead of sampled ones."""
    alpha: float = 0.2
    """The interval of the win rate holds 1 − α of the probability."""

    # The endpoint.
    concurrency: int = 8
    """Comparisons that are asked for at one time."""
    retries: int = 6
    """Repetitions of a request after no connection, no answer in time, or a status of 408, 409, 429 or from 500."""
    timeout: float = 120.0
    """Seconds to wait for one answer."""
    price: tuple[float, float] | None = None
    """Dollars for a million tokens of input and of output, for the estimate of the cost."""
    dry_run: bool = False
    """Answer the prompts, estimate the cost and the time, and stop."""

    def __post_init__(self) -> None:
        for name in ("prompts", "concurrency", "timeout"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise InputError(f"--{name}: got {value}, expected more than 0, and finite")
        if self.retries < 0:
            raise InputError(f"--retries: got {self.retries}, expected at least 0")
        if not 0 < self.alpha < 1:
            raise InputError(f"--alpha: got {self.alpha}, expected between 0 and 1")
        if self.price and not all(0 <= price < math.inf for price in self.price):
            raise InputError(f"--price: got {self.price}, expected two numbers of at least 0, and finite")
        if self.output.suffix != ".jsonl":
            raise InputError(f"--output: got {self.output}, expected a name that ends in .jsonl")
        judges = [n for n in ("model", "local_model", "reward_model", "reward") if getattr(self, n) is not None]
        if len(judges) > 1:
            options = " and ".join("--" + name.replace("_", "-") for name in judges)
            raise InputError(f"got {options}, expected one judge")
        if self.base_url is not None and self.model is None:
            raise InputError("--model: got none beside --base-url, expected the name of a model that it serves")
        if self.criteria is not None and self.criteria not in CRITERIA and " " not in self.criteria.strip():
            raise InputError(
                f"--criteria: got {self.criteria!r}, expected one of {', '.join(CRITERIA)}, or a sentence of your own"
            )


def main(args: Sequence[str] | None = None) -> None:
    try:
        compare_runs(tyro.cli(JudgeConfig, args=args, prog="python -m klq_fast.judge"))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def compare_runs(config: JudgeConfig) -> Record:
    """Asks for the verdicts that `config.output` lacks, writes the summary beside it, and returns it (see `summarise`).

    Raises:
        InputError: a run, judge or file that cannot be used, or an endpoint that stays away. Verdicts so far are kept.
    """
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    runs = load_run(config.run_a), load_run(config.run_b)
    preset = runs[0][1].preset
    criteria = config.criteria or (preset if preset in CRITERIA else "general")
    judge = open_judge(config, criteria, (runs[0][1], runs[1][1]), say)
    settings = {
        "run_a": str(config.run_a.resolve()),
        "run_b": str(config.run_b.resolve()),
        "judge": judge.name,
        "criteria": criteria,
    }
    config.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with locked(config.output):
        read_verdicts(config.output, settings)  # a file of other runs is refused before any work
        say("both runs answer their held-out prompts")
        comparisons = heldout_comparisons(config, *runs)
        verdicts = read_verdicts(config.output, settings, comparisons)
        missing = [comparison for comparison in comparisons if comparison.key not in verdicts]
        if len(comparisons) < 2 * config.prompts:
            say(f"the runs hold out {len(comparisons) // 2} prompts, fewer than --prompts {config.prompts}")
        say(
            f"{len(comparisons)} comparisons by {judge.name}, {len(missing)} of them to be made"
            + (f": {judge.estimate(missing)}" if missing else "")
        )
        if config.dry_run:
            return {}
        summary_file = config.output.with_suffix(".json")
        if missing:
            summary_file.unlink(missing_ok=True)  # it was of fewer verdicts
        drop_half_line(config.output)

        with progress(console, len(comparisons), len(verdicts)) as advance:

            def record(comparison: Comparison, verdict: Record) -> None:
                line = {
                    "number": comparison.number,
                    "prompt": comparison.prompt.text,
                    "order": comparison.order,
                    **verdict,
                    "response_a": comparison.response_a,
                    "response_b": comparison.response_b,
                    **settings,
                }
                append_line(config.output, line)
                verdicts[comparison.key] = line
                advance()

            def record_answer(comparison: Comparison, answer: str) -> None:
                record(comparison, comparison.verdict(answer))

            try:
                refused = judge.ask(missing, record_answer) if missing else []
                if refused and not verdicts:  # it takes nothing at all, which is not about the texts
                    raise InputError(f"{judge.name}: {refused[0][1]}")
                for comparison, reason in refused:
                    record(comparison, {"preferred": None, "comparison": None, "refused": reason})
            except (InputError, KeyboardInterrupt):
                say(
                    f"stopped with {len(verdicts)} of {len(comparisons)} verdicts in {config.output}; the same command "
                    "asks for the others"
                )
                raise
        summary = settings | {"prompts": len(comparisons) // 2, "greedy": config.greedy}
        summary |= summarise([verdicts[comparison.key] for comparison in comparisons], config.alpha)
        write_text(summary_file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    say(describe(summary))
    say(f"verdicts in {config.output}, summary in {summary_file}")
    return summary


def open_judge(config: JudgeConfig, criteria: str, runs: Sequence[Config], say: Callable[[str], None]) -> Judge:
    if config.model is not None:
        return endpoint_judge(
            config.model,
            config.base_url or OPENAI,
            criteria,
            concurrency=config.concurrency,
            retries=config.retries,
            timeout=config.timeout,
            price=config.price,
            say=say,
        )
    if config.local_model is not None:
        return local_judge(config.local_model, criteria, batch_size=config.concurrency)
    if config.reward or config.reward_model:
        return reward_judge(config.reward, config.reward_model, runs[0])
    rewards = [run.reward or run.reward_model for run in runs]
    if rewards[0] != rewards[1]:
        raise InputError(
            f"the runs have two rewards, {rewards[0]} and {rewards[1]}: expected one of them by --reward or "
            "--reward-model, or another judge by --model or --local-model"
        )
    return reward_judge(runs[0].reward, runs[0].reward_model, runs[0])


def heldout_comparisons(config: JudgeConfig, run_a: tuple[str, Config], run_b: tuple[str, Config]) -> list[Comparison]:
    """Both runs' responses to the first held-out prompts, each pair in both orders.

    Raises:
        InputError: the two runs hold out different prompts.
    """
    prompts, responses_a, ended_a = respond_to_heldout(*run_a, count=config.prompts, greedy=config.greedy)
    prompts_b, responses_b, ended_b = respond_to_heldout(*run_b, count=config.prompts, greedy=config.greedy)
    texts, texts_b = ([prompt.messages or prompt.text for prompt in found] for found in (prompts, prompts_b))
    if texts != texts_b:
        same = sum(a == b for a, b in zip(texts, texts_b, strict=False))
        raise InputError(
            f"{config.run_b}: {same} of its {len(texts_b)} held-out prompts are those of {config.run_a}, which has "
            f"{len(texts)}; expected the same ones: two runs with one --dataset, --prompt-length and --eval-prompts"
        )
    ended = zip(ended_a, ended_b, strict=True)
    rows = zip(prompts, responses_a, responses_b, ended, strict=True)
    return [Comparison(number, order, *row) for number, row in enumerate(rows) for order in ORDERS]


# The file of verdicts.


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """One process at a time writes a file of verdicts."""
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"--output {output}: another process is writing to it") from None
    try:
        yield
    finally:
        lock.release()


def read_verdicts(
    output: Path, settings: dict[str, str], comparisons: Sequence[Comparison] | None = None
) -> dict[tuple[int, str], Record]:
    """The verdicts of an earlier call, by prompt number and order. A process killed while it wrote may have left half a
    line at the end, which is passed over.

    Raises:
        InputError: the file holds something else, or verdicts on other runs, by another judge, of other texts.
    """
    if not output.exists():
        return {}
    *lines, half = output.read_bytes().split(b"\n")
    verdicts = {}
    start = b'{"number": '
    if not half.startswith(start[: len(half)]):
        raise InputError(f"--output {output}: its last line is no verdict; name another file")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            verdicts[int(record["number"]), str(record["order"])] = record
        except (ValueError, LookupError, TypeError):
            raise InputError(f"--output {output}: line {number} is no verdict; name another file") from None

    def check(name: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise InputError(
                f"--output {output}: its verdicts have {name} {found!r:.200}, these would have {expected!r:.200}; name "
                "another file"
            )

    for record in verdicts.values():
        for name, value in settings.items():
            check(name, record.get(name), value)
    expected = {comparison.key: comparison for comparison in comparisons or ()}
    for key, record in verdicts.items() if comparisons is not None else ():
        if key not in expected:
            raise InputError(
                f"--output {output}: it has a verdict on prompt {key[0]}, expected none from {len(expected) // 2} on "
                "(they count from 0); ask for more --prompts, or name another file"
            )
        comparison = expected[key]
        check(f"prompt {key[0]}", record.get("prompt"), comparison.prompt.text)
        check(f"RUN_A's response {key[0]}", record.get("response_a"), comparison.response_a)
        check(f"RUN_B's response {key[0]}", record.get("response_b"), comparison.response_b)
    return verdicts


def drop_half_line(output: Path) -> None:
    if output.exists():
        with output.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


# The result.


def summarise(verdicts: Sequence[Record], alpha: float) -> Record:
    """What the verdicts say of RUN_A.

    wins, losses, ties, unparsed: numbers of verdicts. A tie counts as half a win and half a loss; what was no verdict
    counts as nothing. (The paper's judge could not answer "tie", so that this choice is ours.)
    win_rate: of RUN_A, or None without a verdict.
    interval: Jeffreys', with probability 1 − α (`jeffreys_interval`), over the verdicts, as in Fig. 3. The two orders
    of one prompt are not independent, which makes it too narrow, by up to √2; hence also
    interval_by_prompt: the same over prompts, where a prompt counts once, with the mean of its orders.
    position_bias: RUN_A's win rate when shown first, less that when shown second; 1 if the first always wins, −1 if the
    second does, None if there is no verdict in one of the orders.
    """
    points = {"a": 1.0, "b": 0.0, "tie": 0.5}
    by_prompt: dict[int, list[float]] = {}
    by_order: dict[str, list[float]] = {order: [] for order in ORDERS}
    for verdict in verdicts:
        if verdict["preferred"] is not None:
            by_prompt.setdefault(verdict["number"], []).append(points[verdict["preferred"]])
            by_order[verdict["order"]].append(points[verdict["preferred"]])
    counts = {name: sum(v["preferred"] == name for v in verdicts) for name in ("a", "b", "tie", None)}
    every = [point for found in by_prompt.values() for point in found]
    prompts = [sum(found) / len(found) for found in by_prompt.values()]
    first, second = by_order.values()
    return {
        "wins": counts["a"],
        "losses": counts["b"],
        "ties": counts["tie"],
        "unparsed": counts[None],
        "win_rate": sum(every) / len(every) if every else None,
        "alpha": alpha,
        "interval": jeffreys_interval(sum(every), len(every), alpha),
        "interval_by_prompt": jeffreys_interval(sum(prompts), len(prompts), alpha),
        "position_bias": sum(first) / len(first) - sum(second) / len(second) if first and second else None,
    }


def describe(summary: Record) -> str:
    def span(interval: Sequence[float]) -> str:
        return f"{interval[0]:.1%} to {interval[1]:.1%}"

    counts = ", ".join(f"{summary[name]} {name}" for name in ("wins", "losses", "ties", "unparsed"))
    if summary["win_rate"] is None:
        return f"RUN_A: {counts}"
    lines = [
        f"RUN_A wins {summary['win_rate']:.1%} ({counts})",
        f"{1 - summary['alpha']:.0%} interval {span(summary['interval'])} over verdicts, "
        f"{span(summary['interval_by_prompt'])} over prompts",
    ]
    if summary["position_bias"] is not None:
        lines.append(
            f"position bias {summary['position_bias']:+.1%} (win rate when shown first less when shown second)"
        )
    return "\n".join(lines)


def jeffreys_interval(wins: float, count: float, alpha: float) -> list[float]:
    """The α/2 and 1 − α/2 quantiles of Beta(wins + ½, count − wins + ½), the posterior of the win rate under Jeffreys'
    prior (Brown, Cai & DasGupta 2001, without their exception for no wins or no losses)."""
    a, b = wins + 0.5, count - wins + 0.5
    ends = []
    for quantile in (alpha / 2, 1 - alpha / 2):
        low, high = 0.0, 1.0
        while low < (middle := (low + high) / 2) < high:  # down to neighbouring floats
            low, high = (middle, high) if incomplete_beta(middle, a, b) < quantile else (low, middle)
        ends.append(high)
    return ends


def incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), the distribution function of Beta(a, b) at 0 ≤ x ≤ 1: the continued fraction DLMF 8.17.22."""
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below the mean: √(a + b) terms or so
        return 1 - incomplete_beta(1 - x, b, a)
    if x == 0:
        return 0.0
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    factor = math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a
    # Its convergents p/q by the forward recurrence, both divided by q at each step, which keeps them near 1.
    p_before, q_before, p, q = 1.0, 0.0, 1.0, 1.0
    for step in itertools.count(1):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        new_p = p + term * p_before
        new_q = (q + term * q_before) / new_p
        p_before, q_before, p = p / new_p, q / new_p, 1.0
        if abs(new_q - q) <= 1e-16 * new_q:
            break
        q = new_q
    return factor * q


@contextmanager
def progress(console: Console, total: int, done: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; elsewhere a line every ten seconds."""
    bar = Progress(
        TextColumn("comparisons"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=total, completed=done)

    said = time.monotonic()

    def advance() -> None:
        nonlocal done, said
        done += 1
        bar.update(task, completed=done)
        if not console.is_terminal and time.monotonic() - said > 10:
            console.print(f"{done} of {total} comparisons")
            said = time.monotonic()

    with bar:
        yield advance


if __name__ == "__main__":
    main()
