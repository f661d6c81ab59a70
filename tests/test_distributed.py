"""Runs in several processes, for real (gloo): the same as in one, on any number, whoever dies, wherever it goes on."""

import copy
import faulthandler
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from klq_fast import distributed, models, plots
from klq_fast.batch import Rollout
from klq_fast.config import Config, InputError
from klq_fast.distributed import World, partition
from klq_fast.evaluate import main as evaluate_main
from klq_fast.klq import KLQ
from klq_fast.memory import Counter
from klq_fast.metrics import read_lines
from klq_fast.models import Policy, load_policy
from klq_fast.options import blocks
from klq_fast.rollout import Generator, with_logprobs
from klq_fast.train import main
from klq_fast.update import Algorithm, Limits, gradients_in_memory

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
CPU = torch.device("cpu")
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
        patch.setattr(plots, "draw", lambda run: None)  # takes longer than these runs
        yield


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    named = ["--policy", str(folder / "neox"), "--dataset", str(folder / "prompts.jsonl"), "--output-dir", str(run)]
    reward = [] if {"--reward", "--reward-model"} & set(more) else ["--reward", "distributed_rewards:letter_a"]
    return ["custom", *named, *reward, *SMALL, *more]


class Ranks:
    """The processes of a run, as a launcher starts them; what they print goes to one file each."""

    def __init__(self, count: int, args: list[str], logs: Path, work: Callable[[list[str]], None] = main) -> None:
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
            process = context.Process(target=_rank, args=(launched, args, self.logs[rank], work))
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


def _rank(launched: dict[str, Any], args: list[str], log: Path, work: Callable[[list[str]], None]) -> None:
    os.environ.update({name: str(value) for name, value in launched.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    faulthandler.enable()  # a crash in native code, of a rare race perhaps, should say where
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    plots.draw = lambda run: None  # takes longer than these runs
    work(args)


def run_ranks(count: int, args: list[str], logs: Path, work: Callable[[list[str]], None] = main) -> str:
    ranks = Ranks(count, args, logs, work)
    assert ranks.wait(300) == [0] * count, ranks.said
    return ranks.said


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four batches in one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    main(arguments(folder, run))
    return run


MACHINE = ("tokens_per_second", "peak_memory_bytes", "tflops_per_device", "mfu", "update_mfu")


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


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB."


def main_in_little_memory(args: list[str]) -> None:
    """The run in processes of which the second has memory for the update of 70 tokens and for 3 rows elsewhere."""
    if os.environ["RANK"] == "1":
        forward, respond = Policy.forward, Generator.respond

        def limited_forward(self: Policy, rollout: Rollout, loss: Any = None, num_tokens: Any = None) -> Any:
            if (loss and sum(distributed.row_sizes(rollout)) > 70) or (not loss and len(rollout) > 3):
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return forward(self, rollout, loss, num_tokens)

        def limited_respond(self: Generator, prompts: Any, *args: Any, **options: Any) -> Rollout:
            if len(prompts) > 3:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return respond(self, prompts, *args, **options)

        Policy.forward, Generator.respond = limited_forward, limited_respond  # type: ignore[method-assign, assignment]
    main(args)


@pytest.mark.parametrize(("count", "work"), [(2, main), (3, main_in_little_memory)])
def test_several_processes_make_the_run_of_one(
    folder: Path, tmp_path: Path, one: Path, count: int, work: Callable[[list[str]], None]
) -> None:
    said = run_ranks(count, arguments(folder, tmp_path / "run"), tmp_path / "logs", work)
    assert_same(tmp_path / "run", one)
    if work is main_in_little_memory:
        smaller = re.findall(r"out of memory: microbatches of (\d+) tokens from now on, not 120; the loss is", said)
        assert len(smaller) == 1 and 30 <= int(smaller[0]) <= 70
        assert said.count("out of memory: a process does its rows in 2 parts") == 1 and "Traceback" not in said
    else:
        assert "out of memory" not in said
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
    """Two processes of accelerate launch, which starts them as torchrun does, one of them killed in the fourth batch:
    the run, what was said, the exit code, and the seconds from the kill to the end."""
    run = tmp_path_factory.mktemp("killed") / "run"
    # On a machine with several GPUs --multi_gpu is what it does anyway; with --cpu it would start one process.
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 -m klq_fast.train".split()
    command = [sys.executable, "-m", *launch, *arguments(folder, run, "--reward", "distributed_rewards:dies")]
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


def main_slow_to_speak(args: list[str]) -> None:
    """The run in processes of which the second, when all fail, comes to that after the first has gone."""
    first_to_say = distributed.first_to_say

    def later(otherwise: bool) -> bool:
        time.sleep(5 if os.environ["RANK"] == "1" else 0)
        return first_to_say(otherwise)

    distributed.first_to_say = later  # type: ignore[assignment]
    main(args)


def test_an_error_of_one_is_the_error_of_all_and_the_run_goes_on_in_two(
    folder: Path, tmp_path: Path, one: Path
) -> None:
    args = arguments(folder, tmp_path / "run", "--reward", "distributed_rewards:fails_on_one")
    ranks = Ranks(2, args, tmp_path / "logs", main_slow_to_speak)
    assert ranks.wait() == [2, 2], ranks.said
    assert ranks.said.count("the judge is away") == 1 and "Traceback" not in ranks.said
    assert ranks.said.count("failed after batch 3") == 1
    assert (tmp_path / "run" / "checkpoints" / "batch-000003").is_dir()
    # What one process began two go on with, and the other way round above.
    run_ranks(2, [*args, "--resume"], tmp_path / "again")
    assert_same(tmp_path / "run", one)


def main_without_memory(args: list[str]) -> None:
    """The run in processes of which the second has no memory for the update of a single row."""
    forward = Policy.forward

    def failing(self: Policy, rollout: Rollout, loss: Any = None, num_tokens: Any = None) -> Any:
        if loss is not None and os.environ["RANK"] == "1":
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return forward(self, rollout, loss, num_tokens)

    Policy.forward = failing  # type: ignore[method-assign, assignment]
    main(args)


def test_one_out_of_memory_at_a_single_row_stops_all_with_one_message(folder: Path, tmp_path: Path) -> None:
    ranks = Ranks(2, arguments(folder, tmp_path / "run"), tmp_path / "logs", main_without_memory)
    codes = ranks.wait(120)
    assert codes[1] == 2 and codes[0] not in (0, None), ranks.said
    assert ranks.said.count("error:") == 1, ranks.said
    assert OUT_OF_MEMORY in ranks.said and "--lora-rank" in ranks.said and "Traceback" not in ranks.said


def same_after_out_of_memory(args: list[str]) -> None:
    """One of any number of processes: gradients of a minibatch of which the last process ran out of memory anywhere
    are bit for bit those of the smaller microbatches that it takes then, and but for rounding those of one pass."""
    name, tolerance = args
    distributed.start(1)
    torch.manual_seed(0)
    loaded, algorithm = load_policy(name, 1.0, CPU), KLQ.from_config(Config())
    rollout = rollout_to_train(loaded, algorithm)
    reference = copy.deepcopy(loaded)
    total = algorithm_loss(reference, algorithm, rollout)
    total.backward()
    expected = vector([parameter.grad for parameter in reference.parameters()])
    policy, masters = distributed.sharded(loaded, CPU)
    last = distributed.world().rank == distributed.world().size - 1
    assert all(isinstance(master, DTensor) for master in masters.parameters()) == (distributed.world().size > 1)

    said: list[str] = []

    def found(max_tokens: int) -> Tensor:
        sums = gradients_in_memory(policy, algorithm, rollout, Limits(max_tokens, said.append))
        distributed.collect_gradients(policy, masters)
        torch.testing.assert_close(distributed.all_sum(sums["loss"]), total.detach(), rtol=float(tolerance), atol=0)
        gradients = [distributed.whole(cast(Tensor, master.grad)) for master in masters.parameters()]
        masters.zero_grad()
        assert all(parameter.grad is None for parameter in policy.parameters())
        return vector(gradients)

    smaller = found(20 if last else 40)
    assert (smaller - expected).norm() < float(tolerance) * expected.norm()
    said.clear()
    for where in ("forward", "backward"):
        for microbatch in (0, 1):
            with out_of_memory_once(policy, where, microbatch if last else -1):
                assert torch.equal(found(40), smaller), (where, microbatch)
    assert said == ["out of memory: microbatches of 20 tokens from now on, not 40; the loss is the same"] * 4
    distributed.stop()


def rollout_to_train(policy: Policy, algorithm: Algorithm) -> Rollout:
    """Ten rows of 7 to 17 tokens."""
    rollout = make_rollout([5, 9, 3, 8, 8, 2, 7, 4, 6, 5], [5, 8, 6, 8, 8, 5, 7, 4, 3, 8])
    rollout = with_logprobs(rollout, policy, policy, 1000)
    noise = torch.randn(rollout.logprobs.shape) * rollout.mask
    return algorithm.targets(replace(rollout, ref_logprobs=rollout.logprobs + noise))


def algorithm_loss(policy: Policy, algorithm: Algorithm, rollout: Rollout) -> Tensor:
    return policy(rollout, algorithm.loss, rollout.num_tokens).loss


def vector(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


@contextmanager
def out_of_memory_once(policy: Policy, where: str, microbatch: int) -> Iterator[None]:
    """In the middle of this microbatch's forward or backward pass, where it is made for the first time."""
    calls = iter(range(100))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    def hook(module: Any, inputs: Any, output: Any) -> None:
        if next(calls) == microbatch:
            if where == "forward":
                fail()
            (output if isinstance(output, Tensor) else output[0]).register_hook(fail)

    handle = blocks(policy.model)[0].register_forward_hook(hook)
    yield
    handle.remove()


def test_gradients_after_out_of_memory_are_those_without(folder: Path) -> None:
    same_after_out_of_memory([str(folder / "neox"), "1e-5"])


def test_gradients_after_out_of_memory_in_one_of_two_processes(folder: Path, tmp_path: Path) -> None:
    run_ranks(2, [str(folder / "neox"), "1e-5"], tmp_path / "logs", same_after_out_of_memory)


def test_a_policy_in_bfloat16_has_gradients_and_master_weights_in_float32(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, in one process."""
    monkeypatch.setattr(models, "compute_dtype", lambda device: torch.bfloat16)
    same_after_out_of_memory([str(folder / "neox"), "0.03"])  # of a bf16's 8 bits, through two layers

    loaded, algorithm = load_policy(str(folder / "neox"), 1.0, CPU), KLQ.from_config(Config())
    rollout = rollout_to_train(loaded, algorithm)
    policy, masters = distributed.sharded(loaded, CPU)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*policy.value_head.parameters(), *masters.parameters())} == {torch.float32}
    gradients_in_memory(policy, algorithm, rollout, Limits(20, print))
    distributed.collect_gradients(policy, masters)
    summed = [cast(Tensor, master.grad) for master in masters.model.parameters()]
    assert all((gradient != gradient.bfloat16()).any() for gradient in summed)  # a sum in bf16 would be a bf16
    torch.optim.SGD(masters.parameters(), lr=1e-3).step()
    distributed.refresh(policy, masters)
    for ours, master in zip(policy.parameters(), masters.parameters(), strict=True):
        assert torch.equal(ours, master.to(ours.dtype))


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


def test_an_evaluation_in_two_processes_is_that_of_one(folder: Path, tmp_path: Path, one: Path) -> None:
    args = [str(one), "--samples", "2", "--threads", "1", "--batch-size", "2", "--output"]
    evaluate_main([*args, str(tmp_path / "one.json")])
    run_ranks(2, [*args, str(tmp_path / "two.json")], tmp_path / "logs", evaluate_main)
    expected, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for kind in ("sampled", "greedy"):
        for name, row in expected[kind].items():
            assert found[kind][name] == pytest.approx(row, rel=1e-5, abs=1e-5), (kind, name)

    ranks = Ranks(2, [*args, "none.json", "--reward", "distributed_rewards:dies"], tmp_path / "dies", evaluate_main)
    codes = ranks.wait(120)
    assert codes == [1, -signal.SIGKILL], ranks.said
    assert ranks.said.count("error: process 1 of 2 is gone, so all stop; start it again") == 1, ranks.said


def test_loading_takes_no_more_of_a_device_than_what_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU: every tensor that is made there is counted."""
    monkeypatch.setattr(models, "compute_dtype", lambda device: torch.bfloat16)
    meta, loaded = torch.device("meta"), load_policy(str(folder / "neox"), 1.0, CPU)
    loaded.model.get_input_embeddings().requires_grad_(False)
    with Counter() as count:
        policy, masters = distributed.sharded(loaded, meta)
    buffers = sum(buffer.nbytes for buffer in policy.buffers())
    assert buffers > 0 and {buffer.dtype for buffer in policy.buffers()} == {torch.float32}  # rotary frequencies
    whole, head = (sum(p.numel() for p in part.parameters()) for part in (policy.model, policy.value_head))
    trained = [p for p in masters.parameters() if p.requires_grad]
    assert {p.device for p in trained} == {meta} and {p.device for p in masters.parameters()} == {meta, CPU}
    stays = 2 * whole + 4 * head + buffers + 4 * sum(p.numel() for p in trained)
    assert count.peak == count.now == stays

    frozen = load_policy(str(folder / "neox"), 1.0, CPU)
    with Counter() as count:
        reference = models.to_compute(frozen, meta)
    assert count.peak == count.now == 2 * whole + 4 * head + buffers and reference is frozen
    classifier = models.load_reward_model(str(folder / "neox_reward"), CPU)
    monkeypatch.setattr(models, "_load_classifier", lambda name: classifier.float())
    with Counter() as count:
        reward_model = models.load_reward_model("", meta)
    stays = sum(tensor.nbytes for tensor in (*reward_model.parameters(), *reward_model.buffers()))
    assert count.peak == count.now == stays
    assert {p.dtype for p in reward_model.base_model.parameters()} == {torch.bfloat16}


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
            assert weight in (0.0, 1.0)
            seen += taken.tolist() if weight else []
            tokens = sum(distributed.row_sizes(minibatch)[row] for row in taken)
            assert tokens <= 60 or len(taken) == 1
    assert min(counts) > 0  # each process knows what a loss consists of
    assert sorted(seen) == list(range(rows))


def test_shares_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, played one after the other: the rollouts' parts, padded differently, make the whole again."""
    whole = make_rollout([3, 9, 1, 4, 4, 2], [5, 1, 8, 2, 2, 7])
    sizes = distributed.row_sizes(whole)
    shares = partition(sizes, 3)
    parts = [whole.rows(torch.tensor(rows)) for rows in shares]

    def all_gather_object(outcomes: list[Any], mine: Any) -> None:
        outcomes[:] = [[(rows, part)] for rows, part in zip(shares, parts, strict=True)]

    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(distributed, "_world", World(0, 3, torch.device("cpu")))
    found = distributed.share_rollout(sizes, lambda rows: whole.rows(torch.tensor(rows)))
    assert_same_rows(found, whole)


def assert_same_rows(found: Rollout, whole: Rollout) -> None:
    """Beside the padding."""
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


def test_work_that_does_not_fit_is_done_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_rollout([3, 9, 1, 4, 4, 2], [5, 1, 8, 2, 2, 7])

    def work(rows: list[int]) -> Rollout:
        if len(rows) > limit:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return whole.rows(torch.tensor(rows))

    limit = 2
    for _ in range(2):  # said once
        found = distributed.share_rollout(distributed.row_sizes(whole), work)
        assert_same_rows(found, whole)
    said = "out of memory: a process does its rows in 4 parts, whenever they do not fit at once\n"
    assert capsys.readouterr().out == said
    limit = 0
    with pytest.raises(InputError, match="with a single row: CUDA out of memory"):
        distributed.share_rows([1, 1], lambda rows: [work(rows)])


def test_an_input_error_of_another_process_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(outcomes: list[Any], mine: Any) -> None:
        outcomes[:] = [mine, InputError("--reward: it raised")]

    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(distributed, "_world", World(0, 2, torch.device("cpu")))
    with pytest.raises(InputError, match="it raised"):
        distributed.share_rows([1, 1], lambda rows: rows)
