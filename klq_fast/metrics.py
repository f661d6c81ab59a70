"""What a run reports: JSON lines in its folder, a progress bar or plain lines on the console, and to a tracker."""

import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .config import InputError

Record = dict[str, Any]


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line of JSON; a number that JSON cannot hold (NaN, infinity) becomes null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[Record]:
    """The complete lines of a file of JSON lines; a run killed while writing may leave half of one at the end."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def keep_lines(path: Path, keep: Callable[[Record], bool]) -> None:
    """Drops the lines that a resumed run will write again."""
    if path.is_file():
        write_lines(path, [record for record in read_lines(path) if keep(record)])


class Reporter:
    """A progress bar on a terminal; elsewhere a plain line for each batch; nothing where it is quiet."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.total = total
        self.tracked: Track | None = None
        self.failed = False  # the tracker
        self.closing = ExitStack()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches, left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        with self._without_harm():
            self.closing.close()

    def track(self, name: str, run: Path, settings: Mapping[str, Any], done: int) -> None:
        """From now on the records of batches and evaluations go to this tracker too, for as long as it takes them."""
        with self._without_harm():
            self.tracked = self.closing.enter_context(tracker(name, run, settings, done))

    @contextmanager
    def _without_harm(self) -> Iterator[None]:
        """A tracker that fails is given up: it may depend on a server, on which a run of hours should not."""
        try:
            yield
        except Exception as error:
            self.tracked = None
            if not self.failed:
                self.say(f"the tracker failed ({type(error).__name__}: {error}): the run goes on without it")
            self.failed = True

    def _track(self, kind: str, record: Record) -> None:
        if self.tracked:
            with self._without_harm():
                self.tracked(kind, record)

    def start_at(self, done: int) -> None:
        """From now on time is counted, for the batches after the first `done`."""
        self.started, self.first = time.monotonic(), done
        self.progress.reset(self.task, completed=done)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def batch(self, record: Record) -> None:
        self._track("train", record)
        if self.console.is_terminal:
            description = f"score {record['score']:+.2f}  KL {record['kl']:.2f}"
            self.progress.update(self.task, completed=record["batch"], description=description)
            return
        done = record["batch"] - self.first
        left = (time.monotonic() - self.started) / done * (self.total - record["batch"])
        self.say(
            f"batch {record['batch']}/{self.total}  score {record['score']:+.3f}  rlhf_reward "
            f"{record['rlhf_reward']:+.3f}  kl {record['kl']:.3f}  loss {record['loss']:.4f}  "
            f"{record['seconds']:.1f} s  left {int(left) // 60}:{int(left) % 60:02d}"
        )

    def evaluation(self, record: Record) -> None:
        self._track("eval", record)
        self.say(
            f"held out, after {record['episodes']} episodes: score {record['score']:+.3f}  rlhf_reward "
            f"{record['rlhf_reward']:+.3f}  kl {record['kl']:.3f}  length {record['response_length']:.1f}  "
            f"without end {record['no_eos']:.0%}"
        )

    def samples(self, samples: Sequence[Record], count: int = 8) -> None:
        """A table of held-out prompts with the response before and after."""
        table = Table("prompt", "before", "score", "after", "score", show_lines=True, title="Held-out samples")
        for sample in samples[:: -(-len(samples) // count)]:
            before, after = f"{sample['score_before']:+.2f}", f"{sample['score_after']:+.2f}"
            texts = (sample["prompt"][-300:], sample["response_before"].strip(), sample["response_after"].strip())
            prompt, first, last = (Text(text) for text in texts)  # Text: brackets in it are no markup
            table.add_row(prompt, first, before, last, after)
        self.console.print(table)


# Trackers. metrics.jsonl and eval.jsonl stay the record of a run; a tracker shows the same figures elsewhere.

Track = Callable[[str, Mapping[str, Any]], None]  # ("train" or "eval", a record with its batch)
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # the package and the extra
PROJECT = "klq_fast"


def check_tracker(name: str) -> None:
    """Refuses, before any work, a tracker that is not installed."""
    if name != "none":
        try:
            importlib.import_module(TRACKERS[name])
        except ImportError as error:
            raise InputError(
                f'--tracker {name}: needs {TRACKERS[name]} ({error}): pip install "klq_fast[{name}]"'
            ) from None


@contextmanager
def tracker(name: str, run: Path, settings: Mapping[str, Any], done: int) -> Iterator[Track | None]:
    """A function that sends a record's numbers to the tracker `name`, under train/ and eval/, at the record's batch.

    Resumed after batch `done`, a run goes on where it was: the same TensorBoard folder, of which what came after that
    batch is dropped, or the same W&B or trackio run, whose id is kept in the run's folder; they keep what was said of
    batches that are done again. Their own settings (WANDB_MODE=offline, WANDB_PROJECT, TRACKIO_DIR, …) hold.
    """
    check_tracker(name)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run / "tensorboard"), purge_step=done + 1 if done else None) as writer:

            def send(kind: str, record: Mapping[str, Any]) -> None:
                for key, value in _numbers(kind, record).items():
                    writer.add_scalar(key, value, record["batch"])
                writer.flush()  # so that what a killed run has shown is on disk, as its metrics.jsonl is

            yield send
    elif name == "wandb":
        import wandb

        tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=_tracker_id(run, resumed=done > 0),
            resume="allow",
            dir=str(run),
            config=plain,
        )
        # Its own step only grows, and so would drop what a resumed run says again, and an evaluation after its batch.
        tracked.define_metric("batch")
        tracked.define_metric("*", step_metric="batch")
        yield lambda kind, record: tracked.log({"batch": record["batch"], **_numbers(kind, record)})
        tracked.finish()
    elif name == "trackio":
        import trackio

        tracked = trackio.init(
            project=PROJECT, name=_tracker_id(run, resumed=done > 0), resume="allow", config=plain, embed=False
        )
        yield lambda kind, record: tracked.log(_numbers(kind, record), step=record["batch"])
        tracked.finish()
    else:
        yield None


def _numbers(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{kind}/{key}": value for key, value in record.items() if isinstance(value, int | float) and key != "batch"
    }


def _tracker_id(run: Path, resumed: bool) -> str:
    """The run's name and eight random characters: folders of one name, on two machines say, are two runs."""
    path = run / "tracker_id.txt"
    if not resumed or not path.is_file():
        write_text(path, f"{run.name}-{uuid.uuid4().hex[:8]}")
    return path.read_text(encoding="utf-8").strip()


def peak_memory_bytes(device: Any) -> int:
    """The most memory of this process so far: of the GPU's allocator, or on CPU what was resident."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux; getrusage there starts with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
