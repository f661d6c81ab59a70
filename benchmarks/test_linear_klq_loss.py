"""linear_klq_loss on CPU against the plain PyTorch loss and against its own three matrix products: time and memory.

All contenders run forward and backward on the same inputs, gradients for hidden, weight and values, in turn within one
process; memory is the peak resident set above the inputs, each contender in a new process.
The three matrix products cost 6·N·V·D = 316 GFLOP; (N, V) logits are 393 MiB, the weight and its gradient 98 MiB each.

    pytest benchmarks/test_linear_klq_loss.py
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from klq_fast import linear_klq_loss

N, D, V, TAU = 2048, 512, 50304, 0.05
ROUNDS = 5


def make_inputs(n: int = N, d: int = D, v: int = V) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(n, d).requires_grad_(),
        "weight": torch.randn(v, d).mul_(d**-0.5).requires_grad_(),
        "tokens": torch.randint(0, v, (n,)),
        "ref_logprobs": torch.randn(n) - 11,
        "values": torch.randn(n).requires_grad_(),
        "returns": torch.randn(n),
    }


def fused(inputs: dict[str, Tensor]) -> list[Tensor]:
    loss = linear_klq_loss(**inputs, tau=TAU).loss  # type: ignore[arg-type]
    return _backward(loss, inputs)


def eager(inputs: dict[str, Tensor]) -> list[Tensor]:
    logits = inputs["hidden"] @ inputs["weight"].T
    logprobs = logits.log_softmax(-1).gather(1, inputs["tokens"].unsqueeze(1)).squeeze(1)
    del logits  # autograd keeps only the log-softmax
    residuals = TAU * (logprobs - inputs["ref_logprobs"]) + inputs["values"] - inputs["returns"]
    return _backward(residuals.square().mean(), inputs)


def _backward(loss: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    trained = [inputs["hidden"], inputs["weight"], inputs["values"]]
    for each in trained:
        each.grad = None
    loss.backward()
    return [loss.detach(), *(each.grad for each in trained if each.grad is not None)]


def peak_memory(contender: str) -> float:
    """MiB above the inputs, in a new process."""
    command = [sys.executable, "-m", "benchmarks.test_linear_klq_loss", contender]
    root = Path(__file__).parents[1]
    return float(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)


def _measure_memory(run: Callable[[dict[str, Tensor]], list[Tensor]]) -> float:
    run(make_inputs(256, 256, 256))  # what the libraries load on first use
    inputs = make_inputs()
    before = _status("VmRSS")
    run(inputs)
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """MiB, of this process. (getrusage's maximum would include the parent's.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**10


def test_linear_klq_loss(benchmark, capsys) -> None:
    inputs = make_inputs()
    for name, ours, plain in zip(("loss", "hidden", "weight", "values"), fused(inputs), eager(inputs), strict=True):
        # Both are float32: sums of 50304 (weight: 2048) products in another order. 1e-5 of the largest entry is some
        # ten times what they differ by, and a hundredth of what a wrong scale or a lost chunk would.
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item(), msg=f"{name} differs")

    logits = torch.empty(N, V)
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, hidden)

    wall: dict[str, list[float]] = {"eager": [], "products": [], "fused": []}
    cpu: dict[str, list[float]] = {"eager": [], "products": [], "fused": []}

    def timed(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter(), time.process_time()
        run()
        wall[name].append(time.perf_counter() - start[0])
        cpu[name].append(time.process_time() - start[1])

    def peers() -> None:
        timed("products", products)
        timed("eager", lambda: eager(inputs))

    benchmark.pedantic(lambda: timed("fused", lambda: fused(inputs)), setup=peers, rounds=ROUNDS, warmup_rounds=1)
    memory = {"fused": peak_memory("fused"), "eager": peak_memory("eager")}
    figures: dict[str, object] = {"threads": torch.get_num_threads()}
    for clock, seconds in (("seconds", wall), ("CPU seconds", cpu)):
        seconds = {name: values[1:] for name, values in seconds.items()}  # without the warm-up
        figures |= {f"{clock}, {name}": [round(each, 3) for each in sorted(seconds[name])] for name in seconds}
        for peer in ("eager", "products"):
            ratios = [ours / theirs for ours, theirs in zip(seconds["fused"], seconds[peer], strict=True)]
            figures[f"{clock}, fused / {peer}"] = round(statistics.median(ratios), 3)
    figures |= {f"peak MiB, {name}": round(value) for name, value in memory.items()}
    figures["peak memory, fused / eager"] = round(memory["fused"] / memory["eager"], 3)
    benchmark.extra_info.update(figures)
    with capsys.disabled():
        print(f"\nlinear_klq_loss, N {N}, D {D}, V {V}, float32:")
        for name, figure in figures.items():
            print(f"  {name}: {figure}")


if __name__ == "__main__":
    print(_measure_memory({"fused": fused, "eager": eager}[sys.argv[1]]))
