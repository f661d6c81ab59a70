"""A run's folder and a run's end: where it may start, what it leaves, and how it stops."""

import dataclasses
import math
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import plots
from .batch import PER_TOKEN, Rollout
from .checkpoint import rename_folder
from .config import Config, InputError
from .distributed import from_first, is_first, world
from .metrics import Record, Reporter, append_line, keep_lines, read_lines, write_lines, write_text
from .models import Policy
from .watch import watcher


def open_run(config: Config) -> Path:
    """The run's folder: refused if it holds another run, or on --resume one that is finished."""
    run = config.output_dir
    assert run is not None
    holds_run = (run / "config.yaml").exists()
    if run.exists() and not run.is_dir():
        raise InputError(f"--output-dir {run}: got a file, expected a folder")
    if config.resume and (run / "policy").exists():
        print(f"the run in {run} is finished: nothing to do")
        raise SystemExit(0)
    if config.resume and not holds_run:
        print(f"no run to go on with in {run}: starting one")
    if holds_run and not config.resume:
        raise InputError(f"--output-dir {run}: it holds another run; go on with it by --resume, or name another folder")
    return run


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """One run at a time writes a folder; the operating system frees the lock of a process that dies."""
    lock = FileLock(run / ".lock")

    def acquire() -> None:
        run.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"--output-dir {run}: another process is running in it") from None

    from_first(acquire)
    try:
        yield
    finally:
        lock.release()


class Journal:
    """What a run writes down while it goes on. Of several processes the first one writes; all call the same."""

    def __init__(self, run: Path, config: Config, reporter: Reporter) -> None:
        self.run, self.config, self.reporter = run, config, reporter

    def start(self, done: int) -> None:
        """After batch `done`; what an earlier process wrote about later ones is dropped, and will be written again."""

        def start() -> None:
            write_text(self.run / "config.yaml", self.config.to_yaml())
            for name in ("metrics.jsonl", "eval.jsonl"):
                keep_lines(self.run / name, lambda record: record["batch"] <= done)
            self.watch = watcher(self.config.tau, read_lines(self.run / "metrics.jsonl"))
            self.reporter.track(self.config.tracker, self.run, dataclasses.asdict(self.config), done)
            self.reporter.start_at(done)

        from_first(start)

    def batch(self, record: Record) -> None:
        if not is_first():
            return
        if warnings := self.watch(record):
            record = record | {"warnings": warnings}
        append_line(self.run / "metrics.jsonl", record)
        self.reporter.batch(record)
        for warning in warnings:
            self.reporter.say(f"warning: {warning}")

    def evaluated(self, batches: int) -> bool:
        path = self.run / "eval.jsonl"
        return from_first(lambda: any(record["batch"] == batches for record in read_lines(path)))

    def evaluation(self, record: Record, samples: Sequence[Record]) -> None:
        if is_first():
            write_samples(self.run / "samples.jsonl", samples, first=record["batch"] == 0)
            append_line(self.run / "eval.jsonl", record)
            self.reporter.evaluation(record)

    def draw(self) -> None:
        from_first(lambda: plots.draw(self.run))

    def show_samples(self) -> None:
        if is_first():
            self.reporter.samples(read_lines(self.run / "samples.jsonl"))

    def rows(self, name: str, rollout: Rollout, episodes: Sequence[int]) -> Path:
        """Writes down rows of a batch, one in a line, to be looked at; what is not finite becomes null."""
        path = self.run / name

        def plain(numbers: Tensor) -> list[float | None]:
            return [x if math.isfinite(x) else None for x in numbers.tolist()]

        def record(row: int) -> Record:
            prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
            return {
                "episode": episodes[row],
                "prompt_tokens": rollout.prompt_tokens[row, -prompt:].tolist(),
                "response_tokens": rollout.response_tokens[row, :response].tolist(),
                "ended": bool(rollout.ended[row]),
                "reward": plain(rollout.rewards[row : row + 1])[0],
                **{name: plain(getattr(rollout, name)[row, :response]) for name in PER_TOKEN},
            }

        from_first(lambda: write_lines(path, [record(row) for row in range(len(rollout))]))
        return path


class Clock:
    """Where a batch's seconds go."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self.last = self._now()
        self.phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """What was done since the last lap was this phase."""
        now = self._now()
        self.phases[f"{phase}_seconds"], self.last = now - self.last, now

    @property
    def seconds(self) -> float:
        return self._now() - self.started

    def _now(self) -> float:
        if self.device.type == "cuda":  # four waits a batch; else a phase would pay for the one before
            torch.cuda.synchronize(self.device)
        return time.monotonic()


def write_samples(path: Path, samples: Sequence[Record], first: bool) -> None:
    """The responses before training (the first evaluation's) and after it (the newest evaluation's), side by side."""
    if first:
        before = [{"response_before": sample["response"], "score_before": sample["score"]} for sample in samples]
    else:
        before = read_lines(path)
    records = [
        {
            "prompt": new["prompt"],
            "response_before": old["response_before"],
            "response_after": new["response"],
            "score_before": old["score_before"],
            "score_after": new["score"],
        }
        for old, new in zip(before, samples, strict=True)
    ]
    write_lines(path, records)


def export(run: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes policy/ last of all: its presence means that the run is finished. All processes call it."""
    partial = run / "policy.partial"
    from_first(lambda: shutil.rmtree(partial, ignore_errors=True))
    policy.save(partial, tokenizer)
    from_first(lambda: rename_folder(partial, run / "policy"))


class StopRequest:
    """Ctrl-C or SIGTERM lets the batch in progress end; a second one stops at once.

    A terminal's Ctrl-C reaches every process of a run, and torchrun passes on what it gets: a second signal within
    ECHO seconds of the first is the same one.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested, self.since = 0, 0.0  # the signal's number, and when it came
        self.say = say

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if world().size > 1 and time.monotonic() - self.since < ECHO:
                return
            raise KeyboardInterrupt
        self.requested, self.since = number, time.monotonic()
        self.say("stopping after this batch; once more to stop at once")


ECHO = 2.0


def resume_command(config: Config) -> str:
    launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', world().size)}"
    command = f"{'python' if world().size == 1 else launcher} -m klq_fast.train {config.preset}"
    return f"{command} --output-dir {shlex.quote(str(config.output_dir))} --resume"
