"""Checkpoints: written beside their place and renamed, so that a crash while writing never spoils the last good one.

They are of `torch.distributed.checkpoint`: every process writes its part, and any number of processes reads them.
"""

import os
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from .distributed import from_first
from .models import Policy

PREFIX = "batch-"

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save_checkpoint(folder: Path, batches: int, policy: Policy, optimizer: Optimizer) -> None:
    """Writes `folder`/batch-N, the state after N batches, and then removes the older ones. All processes call it."""
    final, partial = folder / f"{PREFIX}{batches:06d}", folder / f"partial-{batches}"

    def prepare() -> bool:
        if final.exists():
            return False
        folder.mkdir(exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        return True

    def finish() -> None:
        rename_folder(partial, final)
        for older in _checkpoints(folder)[:-1]:
            shutil.rmtree(older)

    if from_first(prepare):
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=_options(policy))
        state = {"policy": model_state, "optimizer": optimizer_state}
        dcp.save(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
        from_first(finish)


def restore_checkpoint(folder: Path, policy: Policy, optimizer: Optimizer) -> int:
    """Loads the newest checkpoint into policy and optimizer; returns how many batches it has seen, or 0."""

    def newest() -> Path | None:
        for leftover in folder.glob("partial-*"):
            shutil.rmtree(leftover)
        return next(reversed(_checkpoints(folder)), None)

    found = from_first(newest)
    if found is None:
        return 0
    options = _options(policy)
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=options)
    # Loads into these dictionaries in place.
    state = {"policy": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=found, no_dist=not dist.is_initialized())
    set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
    return int(found.name.removeprefix(PREFIX))


def _options(policy: Policy) -> StateDictOptions:
    """What is frozen is loaded from where it came from, and is not in a checkpoint."""
    frozen = any(not parameter.requires_grad for parameter in policy.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def rename_folder(partial: Path, final: Path) -> None:
    """Gives a complete folder its name once its bytes are on disk."""
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(PREFIX + "*"))
