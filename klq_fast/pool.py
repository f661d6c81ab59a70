"""Child processes, so many at a time: what is done is not done again, and what fails does not stop the others."""

import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

from .metrics import Record, append_line


@dataclass(frozen=True)
class Job:
    """A child process, which is done when it has left `result`."""

    name: str
    folder: Path
    command: list[str]
    result: Path


class Pool:
    """Child processes, each with a log in its job's folder. `accounts` gets a line for each: its time."""

    def __init__(self, slots: int, gpus: Sequence[str], accounts: Path) -> None:
        self.slots, self.gpus, self.accounts = slots, gpus, accounts
        self.free = deque(range(slots))
        self.running: dict[int, tuple[Job, int, float]] = {}  # by process id: job, slot, start
        self.failures: dict[str, str] = {}  # by job: the end of its log
        self.stopped = 0  # the signal's number

    def run(self, jobs: Sequence[Job]) -> int:
        """Does what is not done yet; returns the number of the signal that stopped it, or 0."""
        waiting = [job for job in jobs if not job.result.exists()]
        total, seconds = len(waiting), []
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup means it
        previous = {number: signal.signal(number, self._stop) for number in heard}
        try:
            while self.running or (waiting and not self.stopped):
                # A job in the hands of a process that a killed sweep has left behind waits for that one's end.
                waiting = [job for job in waiting if not (self._may_start() and self._started(job))]
                time.sleep(0.1)
                for pid in list(self.running):
                    if (account := self._reap(pid)) is not None:
                        seconds.append(account["seconds"])
                        self._report(account, len(seconds), total, sum(seconds) / len(seconds))
        finally:
            self._signal_all()  # none is left, but after an error
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.stopped

    def _may_start(self) -> bool:
        return bool(self.free) and not self.stopped

    def _started(self, job: Job) -> bool:
        """Starts a job, unless it is done meanwhile; False while another process works on it.

        The child inherits the lock and so holds it from its first to its last moment, whatever becomes of this process.
        """
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(job.folder / ".sweep.lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not job.result.exists():
                self._start(job, lock)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    def _start(self, job: Job, lock: int) -> None:
        slot = self.free.popleft()
        environment = dict(os.environ)
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        with (job.folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
        self.running[process.pid] = (job, slot, time.monotonic())
        process.returncode = 0  # it is waited for by wait4, which also tells its time
        if self.stopped:  # between the question and the start
            self._signal_all()

    def _reap(self, pid: int) -> Record | None:
        """What a process that has ended has used."""
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if not ended:
            return None
        job, slot, started = self.running.pop(pid)
        self.free.append(slot)
        code = os.waitstatus_to_exitcode(status)
        account = {
            "job": job.name,
            "seconds": time.monotonic() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "exit_code": code,
        }
        append_line(self.accounts, account)
        if not job.result.exists() and not self.stopped:
            self.failures[job.name] = "\n".join(tail(job.folder / "log.txt")) or f"no output, exit code {code}"
        return account

    def _report(self, account: Record, done: int, total: int, mean_seconds: float) -> None:
        name = account["job"]
        if name in self.failures:
            say(f"failed: {name}, exit code {account['exit_code']}; the end of its log:")
            say("\n".join(f"    {line}" for line in self.failures[name].split("\n")))
        elif not self.stopped:
            left = duration((total - done) * mean_seconds / self.slots)
            say(f"{done}/{total} {name}: {duration(account['seconds'])}; about {left} left")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Lets the runs save and end; a second signal makes them stop at once."""
        if not self.stopped:
            say("stopping: the runs in progress finish their batch; once more to stop at once")
        self.stopped = number
        self._signal_all()

    def _signal_all(self) -> None:
        for pid in self.running:
            os.kill(pid, signal.SIGTERM)


def tail(file: Path, lines: int = 12) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-lines:]


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def say(text: str) -> None:
    print(text, flush=True)
