"""Checkpoints: written beside their place and renamed, so that a crash while writing never spoils the last good one."""

import os
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from .models import Policy

PREFIX = "batch-"

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save_checkpoint(folder: Path, batches: int, policy: Policy, optimizer: Optimizer) -> None:
    """Writes `folder`/batch-N, the state after N batches, and then removes the older ones."""
    final = folder / f"{PREFIX}{batches:06d}"
    if final.exists():
        return
    folder.mkdir(exist_ok=True)
    partial = folder / f"partial-{batches}"
    shutil.rmtree(partial, ignore_errors=True)
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    dcp.save({"policy": model_state, "optimizer": optimizer_state}, checkpoint_id=partial, no_dist=True)
    rename_folder(partial, final)
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)


def restore_checkpoint(folder: Path, policy: Policy, optimizer: Optimizer) -> int:
    """Loads the newest checkpoint into policy and optimizer; returns how many batches it has seen, or 0."""
    for leftover in folder.glob("partial-*"):
        shutil.rmtree(leftover)
    found = _checkpoints(folder)
    if not found:
        return 0
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    # Loads into these dictionaries in place.
    dcp.load({"policy": model_state, "optimizer": optimizer_state}, checkpoint_id=found[-1], no_dist=True)
    set_state_dict(policy, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return int(found[-1].name.removeprefix(PREFIX))


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
