"""Runs in several processes, for real (gloo): the same as in one, on any number, whoever dies, wherever it goes on."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from klq_fast import distributed
from klq_fast.batch import Rollout
from klq_fast.config import InputError
from klq_fast.distributed import World, partition
from klq_fast.metrics import read_lines
from klq_fast.train import main

REWARDS = '''
import os
import signal
import time
from pathlib import Path

calls = []


def letter_a(prompts, responses):
    return [10 * response.count("a") / (len(response) + 1) for response in responses]


def fails_on_one(prompts, responses):
    """letter_a, but in the second process the sixth call (its share of the fourth batch) raises."""
    calls.append(len(prompts))
    if os.environ.get("RANK") == "1" and len(calls) == 6:
        raise ConnectionError("the judge is away")
    return letter_a(prompts, responses)


def dies(prompts, responses):
    """letter_a, but the second process dies there, as if killed from outside."""
    calls.append(len(prompts))
    if os.environ.get("RANK") == "1" and len(calls) == 6:
        Path(__file__).with_name("died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return letter_a(prompts, responses)
'''
# 16 rollouts for 3 processes; minibatches of 7, 7 and 2 rows, which is fewer than processes; several microbatches.
SMALL = (
    "--batch-size 16 --minibatch-size 7 --microbatch-tokens 120 --response-length 8 --learning-rate 1e-2 --epochs 1 "
    "--eval-every 2 --checkpoint-every 2 --threads 1 --episodes 64"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    # Of very different lengths, so that shares by tokens are not shares by rows.
    tiny.write_jsonl(folder / "prompts.jsonl", ({"prompt": f"prompt {i}:" * (1 + i % 4)} for i in range(40)))
    (folder / "distributed_rewards.py").write_text(REWARDS)
    for make in (tiny.neox, tiny.llama, tiny.neox_reward):
        make(folder / make.__name__)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _importable(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        yield


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    named = ["--policy", str(folder / "neox"), "--dataset", str(folder / "prompts.jsonl"), "--output-dir", str(run)]
    reward = [] if {"--reward", "--reward-model"} & set(more) else ["--reward", "distributed_rewards:letter_a"]
    return ["custom", *named, *reward, *SMALL, *more]


class Ranks:
    """The processes of a run, as a launcher starts them; what they print goes to one file each."""

    def __init__(self, count: int, args: list[str], logs: Path, prepare: Callable[[], None] | None = None) -> None:
        # A server that has imported all that takes long, and forks: 5 s a process less.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["klq_fast.train"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [logs / f"{logs.name}-rank-{rank}.txt" for rank in range(count)]
        logs.mkdir(parents=True, exist_ok=True)
        self.processes: list[BaseProcess] = []
        for rank in range(count):
            launched: dict[str, Any] = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
            }
            launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = context.Process(target=_rank, args=(launched, args, self.logs[rank], prepare))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 900) -> list[int | None]:
        """Their exit codes."""
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                for each in self.processes:
                    each.kill()
                pytest.fail(f"still running after {seconds} s:\n{self.said}")
        return [process.exitcode for process in self.processes]

    @property
    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


def _rank(launched: dict[str, Any], args: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    os.environ.update({name: str(value) for name, value in launched.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    if prepare:
        prepare()
    main(args)


def run_ranks(count: int, args: list[str], logs: Path) -> str:
    ranks = Ranks(count, args, logs)
    assert ranks.wait() == [0] * count, ranks.said
    return ranks.said


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four batches in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    main(arguments(folder, run))
    return run


MACHINE = ("tokens_per_second", "peak_memory_bytes", "mfu")


def figures(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or eval.jsonl without what the machine decides."""
    records = tiny.read_jsonl(run / f"{name}.jsonl")
    return [{k: v for k, v in r.items() if not k.endswith("seconds") and k not in MACHINE} for r in records]


def assert_same(run: Path, other: Path, weights: float = 1e-4) -> None:
    """The first batch to 1e-5: sums in another order. Later Adam has divided rounding by gradients near 0."""
    for name in ("metrics", "eval"):
        ours, theirs = figures(run, name), figures(other, name)
        assert [record.keys() for record in ours] == [record.keys() for record in theirs]
        for record, expected in zip(ours, theirs, strict=True):
            tolerance = 1e-5 if record["batch"] <= 1 else 1e-3
            assert record == pytest.approx(expected, rel=tolerance, abs=tolerance), name
    trained, expected_weights = weights_of(run), weights_of(other)
    assert trained.keys() == expected_weights.keys()
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, expected_weights[key], rtol=0, atol=weights)


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "policy" / "model.safetensors") | load_file(run / "policy" / "value_head.safetensors")


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_make_the_run_of_one(folder: Path, tmp_path: Path, one: Path, count: int) -> None:
    said = run_ranks(count, arguments(folder, tmp_path / "run"), tmp_path / "logs")
    assert_same(tmp_path / "run", one)
    assert said.count("batch 4/4") == 1 and f"{count} × cpu" in said  # the first process alone speaks
    left = {path.name for path in one.rglob("*")} - {".lock"}
    assert left <= {path.name for path in (tmp_path / "run").rglob("*")}


def test_tied_embeddings_and_whitened_advantages(folder: Path, tmp_path: Path) -> None:
    """One batch of 5, PPO with a learned reward, updated weights to 1e-5; and what is exported is what was trained."""
    more = (
        f"--policy {folder / 'llama'} --reward-model {folder / 'neox_reward'} --algorithm ppo --missing-eos-penalty 0"
    )
    more += " --batch-size 5 --minibatch-size 3 --episodes 5 --learning-rate 1e-3 --eval-every 1"
    main(arguments(folder, tmp_path / "one", *more.split()))
    run_ranks(2, arguments(folder, tmp_path / "two", *more.split()), tmp_path / "logs")
    assert_same(tmp_path / "two", tmp_path / "one", weights=1e-5)

    before = load_file(folder / "llama" / "model.safetensors")
    exported = load_file(tmp_path / "two" / "policy" / "model.safetensors")
    assert exported.keys() == before.keys() and "lm_head.weight" not in exported
    assert not any(torch.equal(exported[name], before[name]) for name in before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "policy")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trained = {"policy": {f"model.{name}": torch.empty_like(tensor) for name, tensor in exported.items()}}
    dcp.load(trained, checkpoint_id=tmp_path / "two" / "checkpoints" / "batch-000001", no_dist=True)
    for name, tensor in exported.items():
        assert torch.equal(trained["policy"][f"model.{name}"], tensor), name


@pytest.fixture(scope="module")
def killed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int, float]:
    """Two processes of torchrun, one of them killed in the fourth batch: the run, what was said, the exit code, and
    the seconds from the kill to the end."""
    run = tmp_path_factory.mktemp("killed") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "klq_fast.train"]
    command = [*torchrun, *arguments(folder, run, "--reward", "distributed_rewards:dies")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    return run, done.stdout, done.returncode, time.time() - float((folder / "died").read_text())


def test_when_a_process_dies_the_others_say_so_and_stop(killed: tuple[Path, str, int, float]) -> None:
    run, said, code, seconds = killed
    assert code != 0 and seconds < 60  # 1 when quiet
    assert [record["batch"] for record in read_lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert said.count("error: process 1 of 2 is gone") == 1
    assert f"torchrun --nproc-per-node 2 -m klq_fast.train custom --output-dir {run} --resume" in said
    assert "gloo" not in said  # no traceback of a collective
    assert not (run / "policy").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_goes_on_in_another_number_of_processes(
    folder: Path, tmp_path: Path, one: Path, killed: tuple[Path, str, int, float], count: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed[0], run)
    assert [path.name for path in (run / "checkpoints").glob("batch-*")] == ["batch-000002"]
    if count == 1:
        main(["--resume", "--output-dir", str(run)])
    else:
        assert "going on after batch 2" in run_ranks(count, ["--resume", "--output-dir", str(run)], tmp_path / "logs")
    assert_same(run, one)


def test_an_error_of_one_is_the_error_of_all_and_the_run_goes_on_in_two(
    folder: Path, tmp_path: Path, one: Path
) -> None:
    args = arguments(folder, tmp_path / "run", "--reward", "distributed_rewards:fails_on_one")
    ranks = Ranks(2, args, tmp_path / "logs")
    assert ranks.wait() == [2, 2], ranks.said
    assert ranks.said.count("the judge is away") == 1 and "Traceback" not in ranks.said
    assert ranks.said.count("failed after batch 3") == 1
    assert (tmp_path / "run" / "checkpoints" / "batch-000003").is_dir()
    # What one process began two go on with, and the other way round above.
    run_ranks(2, [*args, "--resume"], tmp_path / "again")
    assert_same(tmp_path / "run", one)


def out_of_memory_in_one() -> None:
    """Makes the second process's first update run out of memory."""
    from klq_fast.models import Policy

    forward = Policy.forward

    def failing(self: Policy, rollout: Rollout, loss: Any = None, num_tokens: Any = None) -> Any:
        if loss is not None and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(self, rollout, loss, num_tokens)

    Policy.forward = failing  # type: ignore[method-assign, assignment]


def test_one_out_of_memory_stops_all_with_one_message(folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(2, arguments(folder, tmp_path / "run"), tmp_path / "logs", out_of_memory_in_one)
    codes = ranks.wait()
    assert codes[1] == 2 and codes[0] not in (0, None), ranks.said
    assert ranks.said.count("error:") == 1, ranks.said
    assert "out of memory" in ranks.said and "--microbatch-tokens" in ranks.said and "Traceback" not in ranks.said


def test_one_signal_to_one_process_stops_all_after_the_batch(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = Ranks(2, arguments(folder, run, "--episodes", "16000"), tmp_path / "logs")
    while len(read_lines(run / "metrics.jsonl")) < 1:
        assert all(process.is_alive() for process in ranks.processes), ranks.said
        time.sleep(0.002)
    for _ in range(2):  # a launcher and a terminal may both send it
        os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
    assert ranks.wait() == [128 + signal.SIGTERM] * 2, ranks.said
    done = len(read_lines(run / "metrics.jsonl"))
    assert f"stopped after batch {done}; go on with: torchrun --nproc-per-node 2" in ranks.said
    assert (run / "checkpoints" / f"batch-{done:06d}").is_dir()


# What processes share, without processes.


def make_rollout(prompts: Sequence[int], responses: Sequence[int]) -> Rollout:
    generator = torch.Generator().manual_seed(0)
    size, width, length = len(prompts), max(prompts), max(responses)
    return Rollout(
        torch.randint(9, (size, width), generator=generator),
        torch.tensor(prompts),
        torch.randint(9, (size, length), generator=generator),
        torch.tensor(responses),
        torch.ones(size, dtype=torch.bool),
        values=torch.randn(size, length, generator=generator),
        rewards=torch.randn(size, generator=generator),
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_partitions_are_balanced(parts: int) -> None:
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, 600, size=seed).tolist()
        lists = partition(sizes, parts)
        assert len(lists) == parts and sorted(i for part in lists for i in part) == list(range(len(sizes)))
        totals = [sum(sizes[i] for i in part) for part in lists]
        # Where the last one put into the fullest list went, least was: the rest of that list is at most the mean.
        assert max(totals) <= sum(sizes) / parts + max(sizes, default=0)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_microbatches_of_all_processes_are_the_minibatch(monkeypatch: pytest.MonkeyPatch, size: int, rows: int) -> None:
    lengths = np.random.default_rng(rows).integers(1, 30, size=(2, rows)).tolist()
    minibatch = make_rollout(*lengths)
    seen: list[int] = []
    counts = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_world", World(rank, size, torch.device("cpu")))
        plan = distributed.microbatches(minibatch, 60, packed=True)
        counts.append(len(plan))
        for taken, weight in plan:
            assert weight in (0.0, float(size))
            seen += taken.tolist() if weight else []
            tokens = sum(distributed.row_sizes(minibatch)[row] for row in taken)
            assert tokens <= 60 or len(taken) == 1
    assert len(set(counts)) == 1 and counts[0] > 0  # FSDP's collectives come in step
    assert sorted(seen) == list(range(rows))


def test_shares_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, played one after the other: the rollouts' parts, padded differently, make the whole again."""
    whole = make_rollout([3, 9, 1, 4, 4, 2], [5, 1, 8, 2, 2, 7])
    sizes = distributed.row_sizes(whole)
    shares = partition(sizes, 3)
    parts = [whole.rows(torch.tensor(rows)) for rows in shares]

    def all_gather_object(outcomes: list[Any], mine: Any) -> None:
        outcomes[:] = parts

    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(distributed, "_world", World(0, 3, torch.device("cpu")))
    found = distributed.share_rollout(sizes, lambda rows: whole.rows(torch.tensor(rows)))
    mask = whole.mask
    for name in (field.name for field in fields(Rollout)):
        expected, got = getattr(whole, name), getattr(found, name)
        if expected is None:
            assert got is None
        elif name == "prompt_tokens":
            for row, length in enumerate(whole.prompt_lengths.tolist()):
                assert torch.equal(got[row, -length:], expected[row, -length:])
        elif expected.ndim == 2:
            assert torch.equal(got[mask], expected[mask])
        else:
            assert torch.equal(got, expected)


def test_an_input_error_of_another_process_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(outcomes: list[Any], mine: Any) -> None:
        outcomes[:] = [mine, InputError("--reward: it raised")]

    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(distributed, "_world", World(0, 2, torch.device("cpu")))
    with pytest.raises(InputError, match="it raised"):
        distributed.share_rows([1, 1], lambda rows: rows)
