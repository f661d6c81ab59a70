"""Every buffer from torch.empty starts as NaN, so that reading a slot nobody wrote fails a test."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the runs are compared bit for bit, which only CPU arithmetic repeats

import pytest
import torch

torch.set_num_threads(1)  # the tensors here are small, and a second busy process then costs nothing
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
