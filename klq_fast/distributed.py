"""Processes and devices: the loop is written for any number of them, and one process is a world of size 1."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState


def start(threads: int | None) -> "PartialState":
    """This process's rank and device (CUDA where there is one), as torchrun or accelerate launch set them."""
    from accelerate import PartialState

    if threads is not None:
        torch.set_num_threads(threads)
    return PartialState(cpu=not torch.cuda.is_available())


def all_sum(value: Tensor) -> Tensor:
    """The sum over all processes."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
