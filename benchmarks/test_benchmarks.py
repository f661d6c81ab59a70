"""Every operation beside its peers, under pytest-benchmark: `pytest benchmarks/` (`-k lambda_returns` for one of them).

pytest-benchmark's own table is of klq_fast; the contenders, which take turns with it, stand in the table printed here
and in the extra information of `--benchmark-json`.
"""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from . import harness, klq_loss, lambda_returns, linear_logprobs, log_ratio
from .harness import OURS, Case
from .report import print_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = dict(case for module in (log_ratio, linear_logprobs, klq_loss, lambda_returns) for case in module.cases(DEVICE))
SECONDS = 2  # for the rounds of a case


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_benchmark(build: Callable[[], Case], benchmark, capsys) -> None:
    case = build()
    rows = harness.first_calls(case, DEVICE)
    others = [name for name in rows if name != OURS]
    rounds = harness.plan_rounds(rows, SECONDS)

    def peers() -> None:
        harness.one_round(case, rows, DEVICE, others)

    def own() -> None:
        harness.one_round(case, rows, DEVICE, [OURS])

    benchmark.pedantic(own, setup=peers, rounds=rounds)
    results = harness.summary(case, rows)
    benchmark.extra_info.update(results)
    with capsys.disabled():
        print_case(Console(), results)
    assert "another result" not in {row.status for row in rows.values()}
