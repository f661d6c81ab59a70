"""lambda_returns on CPU against the Python loop over time that RLHF libraries run: time, one thread.

The loop is a reversed range over T with (B,) vector operations, lists, and a stack of each list at the end, as TRL and
OpenRLHF write GAE; it gives the same four tensors. It knows neither masks nor packed sequences, so it is given padded
rows with zeros in the padding, ready made. Both run in turn in one process, so ours starts with what the loop left in
the caches (1.9 ms for 512×1024 where a second call in a row takes 1.1). One thread, since the loop's vectors are too
short for a second, and since OpenMP's barriers cost two busy cores 8 ms each.
Bytes: the inputs are read and G, Q, Δ and δ written, 28 a token in float32 with rewards per token.

    pytest benchmarks/test_lambda_returns.py
"""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klq_fast import lambda_returns

TAU, LAM, GAMMA = 0.05, 0.95, 1.0
ROUNDS = 7


def loop(log_ratio: Tensor, values: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, Q, δ, Δ of (B, T) tensors, one column at a time."""
    T = values.shape[1]
    action_values = TAU * log_ratio + values
    td_errors: list[Tensor] = []
    advantages: list[Tensor] = []
    advantage = torch.zeros(values.shape[0])
    for t in reversed(range(T)):
        next_values = values[:, t + 1] if t < T - 1 else 0.0
        td_error = rewards[:, t] + GAMMA * next_values - action_values[:, t]
        advantage = td_error + GAMMA * LAM * advantage
        td_errors.append(td_error)
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked + action_values, action_values, torch.stack(td_errors[::-1], dim=1), stacked


@pytest.mark.parametrize("layout", ["full", "mask", "packed"])
@pytest.mark.parametrize(("B", "T"), [(192, 53), (512, 1024), (64, 32768), (2000, 1000)], ids=lambda n: str(n))
def test_lambda_returns(B: int, T: int, layout: str, benchmark, capsys) -> None:
    """full: no mask. mask: right-padded rows of T/2 to T tokens. packed: the same rows without padding."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    log_ratio, values = torch.randn(2, B, T)
    lengths = torch.full((B, 1), T) if layout == "full" else torch.randint(T // 2, T + 1, (B, 1))
    mask = torch.arange(T) < lengths
    scores = torch.randn(B)
    rewards = torch.zeros(B, T).scatter_(1, lengths - 1, scores[:, None])
    padded = torch.where(mask, log_ratio, 0.0), torch.where(mask, values, 0.0), rewards
    offsets = torch.cat([torch.zeros(1), lengths[:, 0].cumsum(0)]).int()
    packed = log_ratio[mask], values[mask]

    def ours() -> tuple[Tensor, ...]:
        numbers = {"tau": TAU, "lam": LAM, "gamma": GAMMA}
        if layout == "full":
            return lambda_returns(log_ratio, values, rewards, **numbers)
        if layout == "mask":
            return lambda_returns(log_ratio, values, scores, mask, **numbers)
        return lambda_returns(*packed, scores, **numbers, cu_seqlens=offsets)

    for x, y in zip(ours(), loop(*padded), strict=True):
        # Both float32, and the last token of a padded row is the loop's next value of 0: some 20 roundings of 6e-8 of
        # sums up to 1/(1 − λγ) = 20 numbers of size 5.
        torch.testing.assert_close(x if layout == "packed" else x[mask], y[mask], rtol=0, atol=1e-4)

    seconds: dict[str, list[float]] = {"loop": [], "lambda_returns": []}

    def timed(name: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(
        lambda: timed("lambda_returns", ours),
        setup=lambda: timed("loop", lambda: loop(*padded)),
        rounds=ROUNDS,
        warmup_rounds=2,
    )
    seconds = {name: values[2:] for name, values in seconds.items()}  # without the warm-up
    ratios = [theirs / ours for ours, theirs in zip(seconds["lambda_returns"], seconds["loop"], strict=True)]
    milliseconds = {name: [round(1e3 * each, 3) for each in sorted(x)] for name, x in seconds.items()}
    benchmark.extra_info.update(
        {f"ms, {name}": x for name, x in milliseconds.items()},
        tokens=int(mask.sum()),
        loop_over_ours=round(statistics.median(ratios), 1),
    )
    with capsys.disabled():
        low, middle, high = (f(milliseconds["lambda_returns"]) for f in (min, statistics.median, max))
        print(
            f"\n  {B}×{T} {layout}: {middle:.2f} ms ({low:.2f} to {high:.2f}), loop "
            f"{statistics.median(milliseconds['loop']):.1f} ms: {statistics.median(ratios):.1f} times as fast "
            f"({min(ratios):.1f} to {max(ratios):.1f})"
        )
