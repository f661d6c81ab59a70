"""How every benchmark is run: contenders in turn, each checked against one float64 truth, with time and memory.

An operation's file (log_ratio.py, linear_logprobs.py, klq_loss.py, lambda_returns.py) says what is compared, as cases;
this file measures a case, for `pytest benchmarks/` and for `python -m benchmarks.report` alike.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

OURS, FLOOR = "klq_fast", "floor"

# Every size is compiled for its own V and D, as a user's would be; N alone is dynamic (linear_logprobs.py marks it).
torch._dynamo.config.automatic_dynamic_shapes = False
torch._dynamo.config.recompile_limit = 64

Outputs = dict[str, Tensor]


class Peer(NamedTuple):
    """Someone else's implementation of a case."""

    install: str  # what `pip install` takes
    build: Callable[..., Any]  # imports it and returns a function; the operation's file says what is given and returned
    needs_cuda: bool = False


# The log-probs of a peer that works in bfloat16 are rounded to 2^-8 of 20 nats, and its gradients come from logits that
# are as coarse; a wrong sign or a lost factor is far beyond either number.
PEER_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Case:
    """One comparison: what each contender computes, and how to tell that it is right."""

    op: str  # the operation and the pass: "linear_klq_loss, forward and backward"
    size: dict[str, int]  # "N", "D", "V", …
    dtype: torch.dtype
    contenders: dict[str, Callable[[], Outputs]]  # OURS and FLOOR among them; the floor returns {}
    errors: Callable[[Outputs], dict[str, float]]  # against the float64 truth; of log-probs in nats, else relative
    tolerances: dict[str, float]  # for the errors of OURS
    amount: float  # the work that the floor does: floating-point operations or bytes
    unit: str  # "TFLOP/s" or "GB/s"
    floor: str  # in words
    absent: dict[str, str] = field(default_factory=dict)  # peers that are not among the contenders, and why
    in_graph: tuple[str, ...] = ()  # contenders whose time on a GPU is also taken without the host's

    @property
    def name(self) -> str:
        return f"{self.op}, {' '.join(f'{key} {value}' for key, value in self.size.items())}, {short(self.dtype)}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def add_peers(
    contenders: dict[str, Callable[[], Outputs]],
    peers: dict[str, Peer],
    device: str,
    wrap: Callable[[Any], Callable[[], Outputs]],
) -> dict[str, str]:
    """Adds the peers that can run here, wrapped, to the contenders; returns the others with the reason."""
    absent = {}
    for name, peer in peers.items():
        if peer.needs_cuda and device != "cuda":
            absent[name] = "runs on a GPU only"
            continue
        try:
            contenders[name] = wrap(peer.build())
        except Exception as error:  # an import can fail with anything, for instance where a library looks for a driver
            absent[name] = f"pip install {peer.install} ({type(error).__name__}: {error})"
    return absent


@dataclass
class Row:
    """What was found for one contender."""

    status: str = "ok"  # or what went wrong
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0  # the most that was allocated at one time beyond the inputs; the results count
    estimate: float = 0.0  # seconds of the second call
    seconds: list[float] = field(default_factory=list)
    in_a_row: list[float] = field(default_factory=list)  # on a CPU, of calls under 0.1 s: repeated, one after another
    device_seconds: float | None = None


def first_calls(case: Case, device: str) -> dict[str, Row]:
    """Every contender twice: for its errors (this call also compiles), and for its memory. A wrong OURS raises."""
    rows = {}
    for name, run in case.contenders.items():
        row = rows[name] = Row()
        try:
            row.errors = case.errors(run()) if name != FLOOR else {}
            start = time.perf_counter()
            row.peak_bytes = peak_memory(run, device)
            row.estimate = time.perf_counter() - start
            if device == "cuda" and name in case.in_graph:
                row.device_seconds = seconds_in_graph(run)
        except torch.OutOfMemoryError:
            row.status = "out of memory"
        except Exception as error:  # of a peer: a result, not the end of the run
            if name in (OURS, FLOOR):
                raise
            row.status = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if name == OURS:
            wrong = {key: error for key, error in row.errors.items() if not error <= case.tolerances[key]}
            assert not wrong, f"{case.name}: errors {wrong}, expected at most {case.tolerances}"
        elif not all(error <= PEER_TOLERANCE[case.dtype] for error in row.errors.values()):
            row.status = "another result"
        free_memory(device)
    return rows


def one_round(case: Case, rows: dict[str, Row], device: str, names: Iterable[str] | None = None) -> None:
    """Each contender (or those named) once, timed; in turn, so that a slower minute of the machine meets all alike."""
    for name in rows if names is None else names:
        if rows[name].status in ("ok", "another result"):
            try:
                rows[name].seconds.append(timed(case.contenders[name], device, crowded=is_crowded(rows, device)))
            except torch.OutOfMemoryError:
                rows[name] = Row(status="out of memory")
                free_memory(device)


def series(case: Case, rows: dict[str, Row], device: str) -> None:
    """On a CPU, each contender that takes less than 0.1 s, called for 50 ms in a row: in the caches, memory at hand."""
    for name, row in rows.items():
        if device == "cpu" and row.seconds and row.seconds[-1] < 0.1:
            row.in_a_row.append(timed_in_a_row(case.contenders[name]))


def plan_rounds(rows: dict[str, Row], seconds: float) -> int:
    """How many rounds fit in about so many seconds; at least 3, at most 50."""
    return max(3, min(50, int(seconds / sum(row.estimate for row in rows.values()))))


def measure(case: Case, device: str, seconds: float) -> dict[str, Row]:
    """Every contender's errors and memory, its time in rounds that take about so many seconds, and in series."""
    rows = first_calls(case, device)
    for _ in range(plan_rounds(rows, seconds)):
        one_round(case, rows, device)
    for _ in range(5):
        series(case, rows, device)
    return rows


def timed(run: Callable[[], object], device: str, crowded: bool = False) -> float:
    """Seconds of one call: on a GPU between two events, after its L2 cache was overwritten."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    if crowded:  # else the allocator would return one contender's memory to the driver within another's time
        free_memory(device)
        run()
    _flush_buffer().zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def timed_in_a_row(run: Callable[[], object], seconds: float = 0.05) -> float:
    """Seconds of one call among its like: the median of the later half of the calls that fill `seconds`, at least 3."""
    calls: list[float] = []
    while len(calls) < 3 or sum(calls) < seconds:
        calls.append(timed(run, "cpu"))
    return statistics.median(calls[len(calls) // 2 :])


def is_crowded(rows: dict[str, Row], device: str) -> bool:
    """Whether the memory that the allocator would like to keep for all contenders together may not be there."""
    if device == "cpu":
        return False
    return sum(row.peak_bytes for row in rows.values()) > 0.6 * torch.cuda.get_device_properties(0).total_memory


@lru_cache(maxsize=1)
def _flush_buffer() -> Tensor:
    return torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")  # L2 caches: A100 40, H200 50, B200 126 MiB


def peak_memory(run: Callable[[], object], device: str) -> int:
    """The most bytes that PyTorch held at one time during a call beyond those before it; what it returns counts."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler of PyTorch 2.13 prints two lines there for every start and stop, past Python's sys.stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def seconds_in_graph(run: Callable[[], object], calls: int = 20) -> float:
    """Seconds of one call on the GPU alone: a graph of many calls, replayed, so that the host launches once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills what is cached on first use
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    return statistics.median(timed(graph.replay, "cuda") / calls for _ in range(9))


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def absolute_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference; NaN where there is one."""
    # In blocks, since of the gradients of a large weight the whole difference would be 20 GB in float64.
    pairs = zip(result.reshape(-1).split(2**26), truth.reshape(-1).split(2**26), strict=True)
    return torch.stack([(left - right).abs().max() for left, right in pairs]).max().item()


def relative_error(result: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest entry of the truth."""
    return absolute_error(result, truth) / max(abs(bound.item()) for bound in truth.aminmax())


def copy_floor(total_bytes: int, device: str) -> Callable[[], Outputs]:
    """A copy that reads half of these bytes and writes the other half."""
    source = torch.ones(max(1, total_bytes // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def floor() -> Outputs:
        target.copy_(source)
        return {}

    return floor


def summary(case: Case, rows: dict[str, Row]) -> dict[str, Any]:
    """A case as it stands in the results file."""
    contenders: dict[str, Any] = {}
    for name, row in rows.items():
        entry: dict[str, Any] = {"status": row.status, "errors": row.errors, "peak_bytes": row.peak_bytes}
        if row.seconds:
            entry |= {
                "seconds": spread(row.seconds),
                "rate": case.amount / statistics.median(row.seconds) / (1e12 if case.unit == "TFLOP/s" else 1e9),
                "over_floor": ratio(row.seconds, rows[FLOOR].seconds),
                "over_ours": ratio(row.seconds, rows[OURS].seconds),
            }
        if row.in_a_row and rows[OURS].in_a_row:
            over_ours = statistics.median(row.in_a_row) / statistics.median(rows[OURS].in_a_row)
            entry |= {"seconds_in_a_row": spread(row.in_a_row), "over_ours_in_a_row": over_ours}
        if row.device_seconds is not None:
            entry["device_seconds"] = row.device_seconds
        contenders[name] = entry
    return {
        "op": case.op,
        "size": case.size,
        "dtype": short(case.dtype),
        "unit": case.unit,
        "floor": case.floor,
        "absent": case.absent,
        "contenders": contenders,
    }


def spread(seconds: list[float]) -> dict[str, Any]:
    low, high = min(seconds), max(seconds)
    return {"median": statistics.median(seconds), "min": low, "max": high, "rounds": len(seconds)}


def ratio(seconds: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios; NaN where the others could not run."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True)) if others else float("nan")
