"""What `python -m benchmarks.report` checks first; on a GPU at full size: V to 152064, over 65535 rows, N·V > 2^31.

`value_checks` are of results, without which times mean nothing; `promise_checks` of memory, synchronisation and graphs.
Each check raises AssertionError with what it found.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from klq_fast import lambda_returns, linear_klq_loss, linear_log_ratio, log_ratio, logprobs

from . import lambda_returns as scan_benchmark
from . import linear_logprobs as head_benchmark
from .harness import absolute_error, peak_memory, relative_error
from .klq_loss import TAU, residuals
from .linear_logprobs import DTYPES, GRADIENT_TOLERANCE, LOGPROB_TOLERANCE


class Sizes(NamedTuple):
    logits: tuple[int, int]  # N, V
    head: tuple[int, int, int]  # N, D, V
    wide_head: tuple[int, int, int]
    memory: tuple[int, int, int]
    graph: tuple[int, int, int]
    scans: tuple[tuple[int, int], ...]  # B, T


SIZES = {
    "cuda": Sizes(
        logits=(70001, 152064),  # 1.06e10 logits, 21 GB
        head=(66001, 2048, 152064),
        wide_head=(64, 8704, 262144),  # V·D > 2^31
        memory=(8192, 3584, 152064),
        graph=(4096, 2048, 50304),
        scans=((70001, 37), (64, 32768), (1024, 1365)),
    ),
    "cpu": Sizes(
        logits=(301, 10007),
        head=(301, 64, 10007),
        wide_head=(3, 300, 50304),
        memory=(2048, 64, 20011),
        graph=(301, 64, 10007),
        scans=((301, 37), (3, 5000), (20, 65)),
    ),
}


Checks = Iterator[tuple[str, Callable[[], None]]]


def value_checks(device: str) -> Checks:
    sizes = SIZES[device]
    yield "logprobs, log_ratio: values, gradients, equal policies", partial(check_logits, *sizes.logits, device)
    yield "linear_klq_loss: loss and gradients", partial(check_head, *sizes.head, device)
    yield "linear_klq_loss: loss and gradients, wide head", partial(check_head, *sizes.wide_head, device)
    yield "linear_log_ratio: equal policies", partial(check_equal_policies, *sizes.head, device)
    for B, T in sizes.scans:
        yield f"lambda_returns {B}x{T}: values, packed equals padded", partial(check_scan, B, T, device)


def promise_checks(device: str) -> Checks:
    sizes = SIZES[device]
    yield "linear_klq_loss: the same bits run to run", partial(check_same_bits, *sizes.memory, device)
    yield "linear_klq_loss: memory", partial(check_memory, *sizes.memory, device)
    if device == "cuda":
        yield "no host synchronisation", partial(check_no_sync, *sizes.graph)
        yield "CUDA graphs", partial(check_graphs, *sizes.graph)


def check_logits(N: int, V: int, device: str) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[device]
    logits = torch.randn(N, V, device=device, dtype=dtype)
    tokens = torch.randint(V, (N,), device=device)
    logits.scatter_add_(1, tokens[:, None], 20 * torch.rand(N, 1, device=device, dtype=dtype))
    weights = torch.randn(N, device=device)
    # The first and last rows, those around the limits of 16-bit grids and 32-bit offsets, and 200 others.
    marks = [0, 65535, 65536, 2**31 // V, 2**31 // V + 1, 2**32 // V, 2**32 // V + 1, N - 1]
    rows = torch.tensor([mark for mark in marks if mark < N] + torch.randint(N, (200,)).tolist(), device=device)

    policy = logits.requires_grad_()
    results = logprobs(policy, tokens)
    (gradient,) = torch.autograd.grad(results, policy, weights)
    wide = logits.detach()[rows].double().requires_grad_()
    true = wide.log_softmax(-1).gather(1, tokens[rows, None]).squeeze(1)
    (true_gradient,) = torch.autograd.grad(true, wide, weights[rows].double())
    at_most("log-probs", absolute_error(results.detach()[rows], true.detach()), LOGPROB_TOLERANCE)
    at_most("gradient", relative_error(gradient[rows], true_gradient), GRADIENT_TOLERANCE[dtype])
    assert torch.isfinite(results).all(), "a log-prob is not finite"
    assert (results <= 0).all(), "a log-prob is above 0"
    del gradient
    ratio = log_ratio(logits.detach(), logits.detach().clone(), tokens)
    assert (ratio == 0).all(), "equal policies have a log-ratio other than 0"


def make_loss(N: int, D: int, V: int, device: str) -> tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]:
    """hidden, weight, tokens, ref_logprobs, values, returns; and what gives log π, the loss and its gradients."""
    hidden, weight, tokens = head_benchmark.make_inputs(N, D, V, device)
    ref_logprobs, values, returns = torch.randn(3, N, device=device)
    values.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        out = linear_klq_loss(hidden, weight, tokens, ref_logprobs, values, returns, tau=TAU)
        return out.logprobs, out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight, values))

    return [hidden, weight, tokens, ref_logprobs, values, returns], run


def check_head(N: int, D: int, V: int, device: str) -> None:
    (hidden, weight, tokens, *others), run = make_loss(N, D, V, device)
    ref_logprobs, values, returns = (x.detach().double() for x in others)

    def loss(logprobs: Tensor, rows: slice) -> Tensor:
        return residuals(logprobs, ref_logprobs[rows], values[rows], returns[rows]).square().sum() / N

    true = head_benchmark.truth(hidden, weight, tokens, loss, rows=512)
    own, value, hidden_gradient, weight_gradient, value_gradient = run()
    error = residuals(true["logprobs"], ref_logprobs, values, returns)
    at_most("log-probs", absolute_error(own, true["logprobs"]), LOGPROB_TOLERANCE)
    at_most("loss", relative_error(value, error.square().mean()), 1e-5)
    at_most("values", relative_error(value_gradient, 2 / N * error), 1e-5)
    at_most("hidden", relative_error(hidden_gradient, true["hidden"]), GRADIENT_TOLERANCE[hidden.dtype])
    at_most("weight", relative_error(weight_gradient, true["weight"]), GRADIENT_TOLERANCE[hidden.dtype])


def check_equal_policies(N: int, D: int, V: int, device: str) -> None:
    hidden, weight, tokens = (x.detach() for x in head_benchmark.make_inputs(N, D, V, device))
    ratio = linear_log_ratio(hidden, weight, hidden.clone(), weight.clone(), tokens)
    assert (ratio == 0).all(), "equal policies have a log-ratio other than 0"


def check_scan(B: int, T: int, device: str) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, T + 1, (B,), device=device)
    mask = torch.arange(T, device=device) < lengths[:, None]
    log_ratio_, values = torch.where(mask, torch.randn(2, B, T, device=device), torch.nan)  # padding is never read
    scores = torch.randn(B, device=device)
    rewards = torch.zeros(B, T, device=device).scatter_(1, lengths[:, None] - 1, scores[:, None])
    numbers = {"tau": scan_benchmark.TAU, "lam": scan_benchmark.LAM, "gamma": scan_benchmark.GAMMA}
    padded = lambda_returns(log_ratio_, values, scores, mask, **numbers)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = lambda_returns(log_ratio_[mask], values[mask], scores, cu_seqlens=offsets, **numbers)
    zeroed = (torch.where(mask, x, 0.0).double() for x in (log_ratio_, values, rewards))
    true = scan_benchmark.results(scan_benchmark.loop, *zeroed)
    for name, own, own_packed in zip(padded._fields, padded, packed, strict=True):
        at_most(name, absolute_error(own[mask], true[name][mask]), scan_benchmark.TOLERANCE)
        assert torch.equal(own[mask], own_packed), f"{name}: packed and padded sequences differ"
        assert (own[~mask] == 0).all(), f"{name}: not 0 in the padding"


def check_same_bits(N: int, D: int, V: int, device: str) -> None:
    _, run = make_loss(N, D, V, device)
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True)), "two runs differ"


def check_memory(N: int, D: int, V: int, device: str) -> None:
    """At most 4·V·D + 4·C·V bytes: the weight's gradient in float32 and one chunk of C logits; and what is (N, D)."""
    _, run = make_loss(N, D, V, device)
    run()  # compiles, and fills what is kept on first use
    rows = 2048 if device == "cuda" else 1024
    bound = 4 * V * D + 4 * rows * V + 12 * N * D + 2**26  # the last: what is (N,), and cuBLAS's workspace
    at_most("bytes", peak_memory(run, device), bound)


def check_no_sync(N: int, D: int, V: int) -> None:
    _, run = make_loss(N, D, V, "cuda")
    scan = scan_benchmark.case(64, 1024, "masked", "cuda").contenders["klq_fast"]
    for each in (run, scan):
        each()  # compiles, which synchronises
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            each()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_graphs(N: int, D: int, V: int) -> None:
    _, run = make_loss(N, D, V, "cuda")
    scan = scan_benchmark.case(64, 1024, "masked", "cuda").contenders["klq_fast"]
    for each in (run, lambda: tuple(scan().values())):
        expected = each()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            each()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = each()
        for result in results:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for own, other in zip(results, expected, strict=True):  # cuBLAS may choose another algorithm in a capture
            at_most("graph against eager", relative_error(own, other), GRADIENT_TOLERANCE[torch.bfloat16])


def at_most(what: str, found: float, bound: float) -> None:
    assert found <= bound, f"{what}: {found:.3g}, expected at most {bound:.3g}"  # NaN fails, too
