"""What a function allocates and multiplies, from PyTorch's own profiler (it sees inside custom operators)."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Watched(NamedTuple):
    largest: int  # bytes of the largest single allocation
    peak: int  # bytes, the most that was allocated at one time
    flops: int  # floating-point operations of the matrix products


def watch(function: Callable[[], object]) -> Watched:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiler:
        result = function()  # held, so that freeing it does not count
    largest = peak = held = flops = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            largest, peak = max(largest, event.nbytes()), max(peak, held)
        elif event.name() in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.shapes()[:2] if event.name() == "aten::mm" else event.shapes()[1:3]
            flops += 2 * prod(left) * right[-1]
    del result
    return Watched(largest, peak, flops)
