"""The update: epochs × minibatches × microbatches over one batch of rollouts, and what it does when a step fails."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed, options
from .batch import Responses, Rollout
from .config import Config
from .metrics import Record
from .models import Policy


class Algorithm(Protocol):
    """What the loop asks of an algorithm; klq.py and ppo.py provide it."""

    def targets(self, rollout: Rollout) -> Rollout: ...

    def loss(
        self,
        batch: Responses,
        hidden: Tensor,
        head: nn.Linear,
        values: Tensor,
        num_tokens: float,
        softcap: float | None,
    ) -> "LossOutput": ...


class LossOutput(Protocol):
    @property
    def loss(self) -> Tensor: ...

    @property
    def metrics(self) -> dict[str, Tensor]: ...


@dataclass
class Limits:
    """What the update has learned about what is possible."""

    max_tokens: int  # of a microbatch; halved where memory runs out
    say: Callable[[str], None]
    skipped_in_a_row: int = 0  # steps not taken, as their loss or gradient was not finite


MAX_SKIPPED = 2  # in a row; the next one stops the run


class NotFinite(FloatingPointError):
    def __init__(self, message: str, minibatch: Rollout, rows: list[int], good: bool) -> None:
        super().__init__(message)
        self.minibatch, self.rows = minibatch, rows
        self.good = good  # the weights, which are those that gave the batch's finite log-probs


def update(
    policy: Policy,
    masters: Policy,
    optimizer: torch.optim.Optimizer,
    algorithm: Algorithm,
    rollout: Rollout,
    config: Config,
    batch: int,
    limits: Limits,
) -> Record:
    """Epochs × minibatches × microbatches over one batch of rollouts; the minibatch is the optimizer's step.

    The policy computes and the master weights are trained (distributed.py's `sharded`).
    """
    size = config.minibatch_size or config.batch_size
    steps_per_epoch = -(-len(rollout) // size)
    total_steps = config.num_batches * config.epochs * steps_per_epoch
    step = first = batch * config.epochs * steps_per_epoch
    taken: list[Record] = []  # the figures of each step
    for epoch in range(config.epochs):
        order = torch.from_numpy(np.random.default_rng([config.seed, batch, epoch]).permutation(len(rollout)))
        for rows in order.split(size):
            minibatch = rollout.rows(rows)
            sums = gradients_in_memory(policy, algorithm, minibatch, limits)
            distributed.collect_gradients(policy, masters)
            norm = distributed.whole(nn.utils.clip_grad_norm_(masters.parameters(), config.max_grad_norm))
            summed = distributed.all_sum(torch.stack(list(sums.values())))
            # The one wait for the device in a minibatch.
            figures = dict(zip((*sums, "grad_norm"), torch.cat([summed, norm[None]]).tolist(), strict=True))
            learning_rate = config.learning_rate * (1 - step / total_steps)
            finite = math.isfinite(figures["loss"] + figures["grad_norm"])
            if finite:
                options.set_learning_rate(optimizer, learning_rate)
                optimizer.step()
                distributed.refresh(policy, masters)
                taken.append(figures)
            optimizer.zero_grad()
            step += 1
            limits.skipped_in_a_row = 0 if finite else limits.skipped_in_a_row + 1
            if limits.skipped_in_a_row > MAX_SKIPPED:
                found = torch.cat([rollout.logprobs, rollout.values]).isfinite().all()
                raise NotFinite(
                    f"batch {batch + 1}: {limits.skipped_in_a_row} optimizer steps in a row had no finite loss and "
                    f"gradient (the last: loss {figures['loss']}, gradient norm {figures['grad_norm']}) and were not "
                    "made; a checkpoint is from before them; a lower --learning-rate may help",
                    minibatch,
                    rows.tolist(),
                    good=not taken and bool(found),
                )
    means = {name: sum(each[name] for each in taken) / len(taken) if taken else math.nan for name in figures}
    # Of the residuals of a microbatch, not a mean over tokens; rollout_metrics has the values' own, of the batch.
    means.pop("explained_variance", None)
    return means | {"learning_rate": learning_rate, "skipped_steps": step - first - len(taken)}


def gradients_in_memory(policy: Policy, algorithm: Algorithm, minibatch: Rollout, limits: Limits) -> dict[str, Tensor]:
    """`gradients` in microbatches that fit: where memory runs out they are halved, which does not change the sums.

    A process that runs out of memory starts its part again, for which the others wait at the end: nothing before that
    is collective.

    Raises:
        torch.OutOfMemoryError: a row alone is too large.
    """
    sizes, max_tokens = distributed.row_sizes(minibatch), limits.max_tokens
    longest, mine = max(sizes), sum(sizes) // distributed.world().size
    while True:
        try:
            sums = gradients(policy, algorithm, minibatch, max_tokens)
            break
        except torch.OutOfMemoryError:
            if max_tokens <= longest:
                raise
        # Out here, where the exception and with it the tensors of the failed attempt are gone.
        policy.zero_grad()
        torch.cuda.empty_cache()
        max_tokens = max(longest, min(max_tokens, mine) // 2)
    max_tokens = -distributed.all_max(-max_tokens)[0]  # what fits one device but not another may not fit it next time
    if max_tokens < limits.max_tokens:
        limits.say(
            f"out of memory: microbatches of {max_tokens} tokens from now on, not {limits.max_tokens}; "
            "the loss is the same"
        )
        limits.max_tokens = max_tokens
    return sums


def gradients(policy: Policy, algorithm: Algorithm, minibatch: Rollout, max_tokens: int) -> dict[str, Tensor]:
    """Adds this process's part of the minibatch's gradients to the policy's; returns its part of loss and metrics."""
    sums: dict[str, Tensor] = {}
    for rows, weight in distributed.microbatches(minibatch, max_tokens, policy.packed):
        microbatch = minibatch.rows(rows)
        output = policy(microbatch, algorithm.loss, minibatch.num_tokens)
        (output.loss * weight).backward()
        counted = weight > 0
        means = {name: value * (microbatch.num_tokens / minibatch.num_tokens) for name, value in output.metrics.items()}
        for name, value in ({"loss": output.loss.detach()} | means).items():
            sums[name] = sums.get(name, 0) + value * counted
    return sums
