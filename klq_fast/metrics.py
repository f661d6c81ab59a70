"""What a run reports: JSON lines in its folder, and a progress bar or plain lines on the console."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
    """A progress bar on a terminal; elsewhere a plain line for each batch."""

    def __init__(self, total: int) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.total = total
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches, left"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def start_at(self, done: int) -> None:
        """From now on time is counted, for the batches after the first `done`."""
        self.started, self.first = time.monotonic(), done
        self.progress.reset(self.task, completed=done)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def batch(self, record: Record) -> None:
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
