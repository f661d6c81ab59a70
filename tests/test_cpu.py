"""The operations' parts in C: how they are compiled, and the row pass."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from klq_fast import logprobs
from klq_fast.kernels.cpu import library
from klq_fast.kernels.log_ratio import cpu

pytestmark = pytest.mark.cpu
build = library.__wrapped__  # without the cache in memory
OPERATIONS = ("lambda_returns", "log_ratio")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_once(operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:  # at the same time, as processes would
        for job in [threads.submit(build, operation) for _ in range(4)]:
            job.result()
    (made,) = (tmp_path / "klq_fast").iterdir()
    when = made.stat().st_mtime_ns
    build(operation)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "klq_fast").iterdir()] == [when]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    for compiler, said in (("no-such-compiler", "No such file"), (f"'{sys.executable}' -c 1/0", "ZeroDivisionError")):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(RuntimeError, match=rf"(?s){operation}/cpu.c .* C compiler: `{compiler}` failed: .*{said}"):
            build(operation)
    assert not list((tmp_path / "empty" / "klq_fast").iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(made))
    with pytest.raises(RuntimeError, match=r"kept in, or loaded from, .*Not a directory.*XDG_CACHE_HOME"):
        build(operation)


def test_threads_and_a_compiler_without_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, several, or none to be had: the same bits, of 13 rows and of the gradient."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nfor word; do [ "$word" = -fopenmp ] && exit 1; done\nexec cc "$@"\n')
    compiler.chmod(0o755)
    logits, tokens = torch.randn(13, 5003), torch.randint(5003, (13,))
    results = []
    for threads, cc in ((1, "cc"), (2, "cc"), (3, "cc"), (3, str(compiler))):
        monkeypatch.setenv("CC", cc)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / Path(cc).parent.name / "cache"))
        monkeypatch.setattr(cpu, "library", build)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        cpu._function.cache_clear()
        trained = logits.clone().requires_grad_()
        out = logprobs(trained, tokens)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), trained)))
    cpu._function.cache_clear()
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_exponential() -> None:
    """Of every magnitude down to the smallest normal number, then 0; to 1.5 units in the last place."""
    gaps = torch.cat([-torch.logspace(-8, 1.9395, 200_000), -torch.linspace(0, 87, 500_000)])
    logits = torch.cat([torch.zeros(1), gaps, torch.tensor([-87.1, -100.0, -1e30, -torch.inf])]).unsqueeze(0)
    exact = logits.double().exp()
    cpu.target_softmax(logits, torch.tensor([0]), out=logits)
    error = (logits[0, 1:-4] / exact[0, 1:-4] - 1).abs().max()
    assert error < 1.5 * 2**-23
    assert (logits[0, -4:] == 0).all()


@pytest.mark.parametrize("frame", [1e30, torch.nan])
def test_neighbours_are_untouched(frame: float) -> None:
    """Rows of every length modulo the vectors' width: a frame of larger numbers would be the maximum if it were read,
    and scaled to another number if it were written."""
    for vocab in (*range(1, 40), 511, 512, 513, 1030):
        around, out_around = torch.full((3, vocab + 2), frame), torch.full((3, vocab + 40), frame)
        row, out = around[1:2, 1:-1], out_around[1:2, 20:-20]
        row.copy_(torch.randn(1, vocab))
        before = around.clone()
        token = torch.tensor([vocab // 2])
        exact = row.double().log_softmax(dim=1)
        gradient = -2 * exact.exp()
        gradient[0, token] += 2
        logprob, _ = cpu.target_softmax(row, token, out=out, grad=torch.tensor([2.0]))
        torch.testing.assert_close(logprob.double(), exact[0, token], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.double(), gradient, rtol=1e-5, atol=1e-6)
        assert torch.equal(around.nan_to_num(), before.nan_to_num())
        _, total = cpu.target_softmax(row, token, out=row)
        torch.testing.assert_close(-2 * row.double() / total, gradient, rtol=1e-5, atol=1e-6)
        for whole, inner in ((around, row), (out_around, out)):
            inner.fill_(frame)
            assert torch.equal(whole, torch.full_like(whole, frame)) or (whole.isnan().all() and frame != frame)


COUNT_THREADS = """
import os, torch, klq_fast
torch.set_num_threads(3)
torch.randn(2**20).exp()
before = len(os.listdir("/proc/self/task"))
klq_fast.logprobs(torch.randn(100, 5000), torch.zeros(100, dtype=torch.int64))
klq_fast.lambda_returns(*torch.randn(2, 500, 100), torch.zeros(500), tau=0.05)
print(before, len(os.listdir("/proc/self/task")))
"""


def test_the_threads_are_pytorchs() -> None:
    """Others would compete with PyTorch's for the same cores."""
    run = subprocess.run([sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, check=True)
    before, after = run.stdout.split()
    assert before == after
