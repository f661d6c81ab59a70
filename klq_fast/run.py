"""A run's folder and a run's end: where it may start, what it leaves, and how it stops."""

import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from .checkpoint import rename_folder
from .config import Config, InputError
from .metrics import Record, read_lines, write_lines
from .models import Policy


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
    """One process at a time writes a run's folder; the operating system frees the lock of a process that dies."""
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"--output-dir {run}: another process is running in it") from None
    try:
        yield
    finally:
        lock.release()


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
    """Writes policy/ last of all: its presence means that the run is finished."""
    partial = run / "policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    policy.save(partial, tokenizer)
    rename_folder(partial, run / "policy")


class StopRequest:
    """Ctrl-C or SIGTERM lets the batch in progress end; a second one stops at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = 0  # the signal's number
        self.say = say

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number
        self.say("stopping after this batch; once more to stop at once")


def resume_command(config: Config) -> str:
    return f"python -m klq_fast.train {config.preset} --output-dir {shlex.quote(str(config.output_dir))} --resume"
