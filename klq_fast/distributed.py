"""Processes and devices: ranks, what they agree on, how they share work, and FSDP2. One process is a world of size 1.

Small things are replicated: every process knows all prompts, holds the whole batch of rollouts, and draws the same
random numbers. Work is shared by `share`, which gathers the results and lets an error of one process be raised by all.
What is sharded are the trained parameters, their gradients and the optimizer's state.
"""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from . import batch
from .batch import ON_HOST, Rollout
from .config import InputError
from .options import blocks

if TYPE_CHECKING:
    from .models import Policy

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None  # what the launcher's processes share beside the group; it outlives any but rank 0


_world = World(0, 1, torch.device("cpu"))


def start(threads: int | None) -> World:
    """Joins the processes that torchrun or accelerate launch started, with a group that fits the device: NCCL for CUDA
    tensors, gloo for those of the CPU. Without a launcher this process is alone; then CUDA gets a group of one, which
    FSDP2 wants, and the CPU none.

    Raises:
        InputError: more processes on this machine than it has GPUs.
    """
    global _world
    if threads is not None:
        torch.set_num_threads(threads)
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _LAUNCHED)
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(
                f"--nproc-per-node: got {os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes, expected at most "
                f"one for each of the {torch.cuda.device_count()} GPUs of this machine"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if (size > 1 or device.type == "cuda") and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0] if size > 1 else dist.HashStore()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend if size > 1 else "nccl", store=store, rank=rank, world_size=size)
        _world = World(rank, size, device, dist.PrefixStore("klq_fast", store))
    elif not dist.is_initialized():
        _world = World(0, 1, device)
    return _world


_LAUNCHED = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # the launchers' protocol, and a lone process


def world() -> World:
    return _world


def described() -> str:
    return f"{_world.size} × {_world.device.type}" if _world.size > 1 else str(_world.device)


def is_first() -> bool:
    """Whether this is the process that writes files and the console."""
    return _world.rank == 0


# What processes agree on.


def from_first(work: Callable[[], T]) -> T:
    """The first process does the work; all get its result, or raise its InputError or SystemExit."""
    if _world.size == 1:
        return work()
    outcome: list[Any] = [None]
    if is_first():
        try:
            outcome = [work()]
        except (InputError, SystemExit) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], InputError | SystemExit):
        raise outcome[0]
    return outcome[0]


def all_sum(value: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if _world.size > 1:
        dist.all_reduce(value)
    return value


def all_max(*numbers: int) -> list[int]:
    """Each number's largest over all processes."""
    if _world.size == 1:
        return list(numbers)
    tensor = torch.tensor(numbers)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def partition(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """The indices of `sizes` in `parts` lists whose sums are alike: the largest goes first, to where least is."""
    lists: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = totals.index(min(totals))
        lists[least].append(index)
        totals[least] += sizes[index]
    return [sorted(part) for part in lists]


def share(sizes: Sequence[int], work: Callable[[list[int]], T]) -> tuple[list[int], list[T]]:
    """Every process does the work for some rows, alike in the sum of their sizes, and gets the results of all.

    The processes need not do equally much: nothing in `work` may be collective. Not called for no rows.

    Returns:
        The rows in the order of the results, and the results: one of each process that had rows.
    Raises:
        InputError: of whichever process, on all of them.
    """
    if _world.size == 1:
        rows = list(range(len(sizes)))
        return rows, [work(rows)]
    shares = partition(sizes, _world.size)
    outcome: T | InputError | None = None
    try:
        if shares[_world.rank]:
            outcome = work(shares[_world.rank])
    except InputError as error:
        outcome = error
    outcomes: list[Any] = [None] * _world.size
    dist.all_gather_object(outcomes, outcome)
    for result in outcomes:
        if isinstance(result, InputError):
            raise result
    done = [(rows, result) for rows, result in zip(shares, outcomes, strict=True) if rows]
    return [row for rows, _ in done for row in rows], [result for _, result in done]


def share_rows(sizes: Sequence[int], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """`share` for work with a result for each row: all results, in the order of the rows."""
    rows, parts = share(sizes, work)
    results = [result for part in parts for result in part]
    return [result for _, result in sorted(zip(rows, results, strict=True), key=lambda pair: pair[0])]


def share_rollout(sizes: Sequence[int], work: Callable[[list[int]], Rollout]) -> Rollout:
    """`share` for work that makes the rows' part of a batch: the whole batch, in the order of the rows."""
    if _world.size == 1:
        return work(list(range(len(sizes))))
    rows, parts = share(sizes, lambda mine: _to(work(mine), torch.device("cpu")))
    order = torch.empty(len(rows), dtype=torch.int64)
    order[torch.tensor(rows)] = torch.arange(len(rows))
    return _to(_joined(parts).rows(order), _world.device)


def _to(rollout: Rollout, device: torch.device) -> Rollout:
    tensors = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return Rollout(**{n: x if x is None or n in ON_HOST else x.to(device) for n, x in tensors.items()})


def _joined(parts: Sequence[Rollout]) -> Rollout:
    """The rows of several rollouts one below the other, padded to the widest."""
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(Rollout)):
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is not None and tensors[0].ndim == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            left = name == "prompt_tokens"
            tensors = [nn.functional.pad(t, (w, 0) if left else (0, w)) for t in tensors for w in [width - t.shape[1]]]
        columns[name] = None if tensors[0] is None else torch.cat(tensors)
    return Rollout(**columns)


def microbatches(minibatch: Rollout, max_tokens: int, packed: bool) -> list[tuple[Tensor, float]]:
    """This process's microbatches of a minibatch that all hold: row indices (on the CPU), and the loss's weight.

    FSDP averages gradients over the processes, so the weight is their number; and it wants equally many microbatches
    of each, so a process with fewer adds some of one short row and weight 0.
    """
    if _world.size == 1:
        return [(rows, 1.0) for rows in minibatch.microbatches(max_tokens, packed=packed)]
    prompts, responses = minibatch.prompt_lengths, minibatch.response_lengths
    sizes = row_sizes(minibatch)
    plans = []
    for rows in partition(sizes, _world.size):
        parts = batch.microbatches(prompts[rows].tolist(), responses[rows].tolist(), max_tokens, packed=packed)
        plans.append([[rows[i] for i in part] for part in parts])
    mine = [(torch.tensor(rows), float(_world.size)) for rows in plans[_world.rank]]
    idle = (torch.tensor([sizes.index(min(sizes))]), 0.0)
    return mine + [idle] * (max(map(len, plans)) - len(mine))


def row_sizes(rollout: Rollout) -> list[int]:
    """Tokens of each row, prompt and response."""
    return (rollout.prompt_lengths + rollout.response_lengths).tolist()


# FSDP2.


def sharded(policy: "Policy") -> tuple["Policy", "Policy"]:
    """The policy to train, and the actor: the policy that generates and is measured, which `refresh` keeps the same.

    On the CPU in one process both are the policy given. Otherwise it is sharded in place (FSDP2), parameters,
    gradients and optimizer state in float32; on CUDA it computes in bfloat16, the value head excepted. The actor is a
    whole and plain copy, on CUDA in bfloat16: its weights stay in one place, which CUDA graphs want, and nothing that
    is done with it is collective, so that processes may generate for as long as each of them needs.
    """
    if _world.size == 1 and _world.device.type == "cpu":
        return policy, policy
    from .models import frozen

    actor = frozen(copy.deepcopy(policy))
    mesh = init_device_mesh(_world.device.type, (_world.size,))
    cuda = _world.device.type == "cuda"
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if cuda else MixedPrecisionPolicy()
    # Activations are in bf16 from the embedding on; a batch's returns and log-probs are to keep their precision.
    half = replace(half, cast_forward_inputs=False)
    for block in blocks(policy.model):
        fully_shard(block, mesh=mesh, reshard_after_forward=False, mp_policy=half)
    fully_shard(policy.value_head, mesh=mesh, reshard_after_forward=False)  # float32
    # Embedding, last norm and head, tied or not, are one group, whole wherever `Policy.forward` needs them.
    fully_shard(policy, mesh=mesh, reshard_after_forward=False, mp_policy=half)
    return policy, actor


def usable_after_error(policy: "Policy") -> bool:
    """Whether a policy whose forward or backward pass raised can go on: a sharded one keeps that pass's gradients."""
    return not isinstance(policy, FSDPModule)


@torch.no_grad()
def refresh(actor: "Policy", policy: "Policy") -> None:
    """Gives the actor the policy's weights, one at a time."""
    if actor is not policy:
        for copied, parameter in zip(actor.parameters(), policy.parameters(), strict=True):
            if parameter.requires_grad:
                copied.copy_(whole(parameter))


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding; collective where it has one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Processes that fail alone.


def first_to_say() -> bool:
    """True for the first process that asks: when all fail, one says why."""
    try:
        return _world.store is None or _world.size == 1 or _world.store.add("said", 1) == 1
    except RuntimeError:  # the store went with the process that held it
        return True


@contextmanager
def watched(advice: str) -> Iterator[None]:
    """Inside, a process that dies takes the others with it, within a second, whatever they are doing.

    A collective with a dead process may wait for ever (NCCL) or raise an error that says nothing (gloo). So each
    process has a thread that waits for a message of the next one, over a connection that breaks when that one dies;
    then the thread ends its own process, which the one before notices in turn. The first to notice says it.
    """
    if _world.size == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    rank, size = _world.rank, _world.size
    following, leaving, heard = (rank + 1) % size, threading.Event(), torch.zeros(1, dtype=torch.int64)

    def watch() -> None:
        with suppress(RuntimeError):
            dist.recv(heard, src=following, group=group)
            if not heard:  # it is done
                return
            leaving.wait(GRACE)  # it failed: with an error that all raise, or alone?
        if not leaving.is_set():
            if first_to_say():
                print(f"error: process {following} of {size} is gone, so all stop; {advice}", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def leave(failed: bool) -> None:
        leaving.set()
        with suppress(RuntimeError):  # it is gone already
            dist.send(torch.tensor([int(failed)]), dst=(rank - 1) % size, group=group)
        watcher.join(GRACE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (InputError, FloatingPointError, SystemExit):  # all raise it
        leave(failed=True)
        raise
    except (KeyboardInterrupt, torch.OutOfMemoryError):  # this process's own: by its end the others notice
        raise
    except BaseException:
        watcher.join(GRACE)  # perhaps of a collective that a dead process has left: the watcher will say so
        raise
    leave(failed=False)


GRACE = 10.0  # seconds


def stop() -> None:
    """Leaves the group, at a run's regular end."""
    if _world.size > 1:
        dist.destroy_process_group()
