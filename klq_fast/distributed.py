"""Processes and devices: ranks, what they agree on, how they share work, and FSDP2. One process is a world of size 1.

Small things are replicated: every process knows all prompts, holds the whole batch of rollouts, and draws the same
random numbers. Work is shared by `share`, which gathers the results and lets an error of one process be raised by all.
The policy is whole in every process too; what is sharded are its master weights, which are trained, and the optimizer's
state. So a process computes alone, on its own rows, and meets the others in a few places only: where results are
gathered, gradients summed and new weights handed out. One that runs out of memory in between can start again.
"""

import copy
import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

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
    tensors, gloo for those of the CPU. Without a launcher this process is alone, and there is no group.

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
        _return_freed_memory()
    if size > 1 and not dist.is_initialized():
        store = next(dist.rendezvous("env://"))[0]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        _world = World(rank, size, device, dist.PrefixStore("klq_fast", store))
    elif size == 1:
        _world = World(0, 1, device)
    return _world


def _return_freed_memory() -> None:
    """Lets tensors of 2 MiB or more go back to the system when they are freed.

    glibc moves that limit up to the largest that was freed (at most 32 MiB), and what is below it comes from a heap,
    which is soon full of holes: a run of a small model that grew by 126 to 139 MiB grows by 114 to 118 with it fixed.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        ctypes.CDLL(None).mallopt(-3, 2 * 2**20)  # M_MMAP_THRESHOLD


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

    The processes need not do equally much: nothing in `work` may be collective. Not called for no rows. Where it runs
    out of memory it is called again, for half of the rows at a time, which must not change their results.

    Returns:
        The rows in the order of the results, and the results: one of each call of `work`.
    Raises:
        InputError: of whichever process, on all of them; or memory does not suffice for a single row.
    """
    mine = partition(sizes, _world.size)[_world.rank]
    outcome: list[tuple[list[int], T]] | InputError = []
    try:
        if mine:
            outcome = _in_memory(mine, work)
    except InputError as error:
        outcome = error
    except torch.OutOfMemoryError as error:
        outcome = InputError(f"with a single row: {out_of_memory(error)}")
    outcomes: list[Any] = [outcome]
    if _world.size > 1:
        outcomes = [None] * _world.size
        dist.all_gather_object(outcomes, outcome)
    for each in outcomes:
        if isinstance(each, InputError):
            raise each
    if is_first() and (parts := max(map(len, outcomes))) > 1:
        _say_once(f"out of memory: a process does its rows in {parts} parts, whenever they do not fit at once")
    done = [call for each in outcomes for call in each]
    return [row for rows, _ in done for row in rows], [result for _, result in done]


def _in_memory(rows: list[int], work: Callable[[list[int]], T]) -> list[tuple[list[int], T]]:
    """The rows of each call of `work`, and what it returned."""
    try:
        return [(rows, work(rows))]
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
    torch.cuda.empty_cache()  # out here, where the exception and with it the tensors of the failed call are gone
    middle = len(rows) // 2
    return [*_in_memory(rows[:middle], work), *_in_memory(rows[middle:], work)]


@cache
def _say_once(message: str) -> None:
    print(message)


def out_of_memory(error: torch.OutOfMemoryError) -> str:
    return (
        f"{(str(error) or 'out of memory').splitlines()[0]} --dry-run says what takes how much, and these take less: "
        "--adam-8bit, --activation-checkpointing, --offload, --lora-rank, more GPUs, shorter prompts and responses"
    )


def share_rows(sizes: Sequence[int], work: Callable[[list[int]], Sequence[T]]) -> list[T]:
    """`share` for work with a result for each row: all results, in the order of the rows."""
    rows, parts = share(sizes, work)
    results = [result for part in parts for result in part]
    return [result for _, result in sorted(zip(rows, results, strict=True), key=lambda pair: pair[0])]


def share_rollout(sizes: Sequence[int], work: Callable[[list[int]], Rollout]) -> Rollout:
    """`share` for work that makes the rows' part of a batch: the whole batch, in the order of the rows."""
    if _world.size == 1:
        rows, parts = share(sizes, work)
        return parts[0] if len(parts) == 1 else _joined(parts)
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

    The weight is 1; a process that has no rows gets the shortest one with weight 0, to know what the loss consists of.
    """
    sizes = row_sizes(minibatch)
    mine = torch.tensor(partition(sizes, _world.size)[_world.rank], dtype=torch.int64)
    if not len(mine):
        return [(torch.tensor([sizes.index(min(sizes))]), 0.0)]
    return [(mine[rows], 1.0) for rows in minibatch.rows(mine).microbatches(max_tokens, packed=packed)]


def row_sizes(rollout: Rollout) -> list[int]:
    """Tokens of each row, prompt and response."""
    return (rollout.prompt_lengths + rollout.response_lengths).tolist()


# What computes, and what is trained.


def sharded(loaded: "Policy", device: torch.device) -> tuple["Policy", "Policy"]:
    """The policy that computes, and the master weights: a policy that does not, but is trained, saved and exported.

    loaded: in float32, on the CPU; it becomes the master weights. On the CPU in one process they are the policy too.

    Otherwise the policy is a whole and plain copy on `device`, on CUDA in bfloat16 but for the value head, with
    gradients in float32. It generates, is measured and makes the gradients (mixed precision; arXiv 1710.03740).
    `collect_gradients` hands these to the master weights and `refresh` brings back what the optimizer made of them.
    The master weights are in float32 on `device`, but for frozen ones, which stay on the CPU until they are exported;
    of several processes each has a part of them, of their gradients and of the optimizer's state, as FSDP2 lays it out.
    FSDP2's own way to compute, which gathers weights and scatters gradients within each forward and backward pass, is
    not used: a process that ran out of memory there would leave the others waiting, and before torch 2.13 FSDP2 itself
    in a state that it cannot leave.
    """
    from . import models

    if _world.size == 1 and models.compute_dtype(device) == torch.float32:
        return loaded.to(device), loaded
    policy = models.to_compute(copy.deepcopy(loaded), device)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float32
    if _world.size == 1:
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().to(device)))
        return policy, loaded
    mesh = init_device_mesh(device.type, (_world.size,))
    frozen = {parameter for parameter in loaded.parameters() if not parameter.requires_grad}
    # Block by block, as each comes to the device whole before it is cut; then what is left.
    for module in (*blocks(loaded.model), loaded):
        fully_shard(module, mesh=mesh, ignored_params=frozen)
    return policy, loaded


@torch.no_grad()
def collect_gradients(policy: "Policy", masters: "Policy") -> None:
    """Moves the policy's gradients, summed over the processes, to the master weights. Parameter by parameter: what is
    summed takes a process's share of the memory, and what was not is gone."""
    if masters is policy:
        return
    for parameter, master in zip(policy.parameters(), masters.parameters(), strict=True):
        if not parameter.requires_grad:
            continue
        gradient, parameter.grad = parameter.grad, None
        if isinstance(master, DTensor):
            if gradient is None:  # no part of the loss here, but perhaps in another process
                gradient = torch.zeros_like(parameter, dtype=master.dtype)
            mine = DTensor.from_local(gradient, master.device_mesh, [Partial()])
            gradient = mine.redistribute(placements=master.placements)
        master.grad = gradient


@torch.no_grad()
def refresh(policy: "Policy", masters: "Policy") -> None:
    """Gives the policy the trained weights, one at a time; between processes they travel in its precision."""
    if masters is policy:
        return
    for parameter, master in zip(policy.parameters(), masters.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.copy_(whole(master.to(parameter.dtype)))


def whole(tensor: Tensor) -> Tensor:
    """A tensor without its sharding; collective where it has one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# Processes that fail alone.


def first_to_say(otherwise: bool) -> bool:
    """True for the first process that asks: when all fail, one says why. `otherwise`: the answer where the store went
    with the process that held it, which has said it, unless it was killed."""
    try:
        return _world.store is None or _world.size == 1 or _world.store.add("said", 1) == 1
    except RuntimeError:
        return otherwise


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
            if first_to_say(otherwise=True):
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
