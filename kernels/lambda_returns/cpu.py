"""The λ-returns of op.py on a CPU, in C: cpu.c."""

from ctypes import c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..cpu import library


def lambda_returns(
    log_ratio: Tensor | None,  # (B, T), or (N,) with cu_seqlens; None: GAE, where Q = V
    values: Tensor,  # like log_ratio
    rewards: Tensor,  # like log_ratio, or (B,) / (S,)
    mask: Tensor | None,  # bool, like log_ratio
    bootstrap: Tensor | None,  # (B,) / (S,)
    cu_seqlens: Tensor | None,  # int32 (S + 1,)
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
) -> Tensor:
    """G, Δ, Q, δ, the rows of one buffer (4, values.numel()). Tensors of other devices are copied to the CPU, and the
    buffer is copied back.

    One buffer, since glibc hands four freed blocks of 2 MB (512×1024) back to the system but keeps one of 8 MB, and
    2000 page faults cost up to 4 ms where the scan takes 0.5.
    """
    dtype = compute_dtype(log_ratio, values)
    buffer = torch.empty(4, values.numel(), dtype=dtype)
    sequences, width = values.shape if cu_seqlens is None else (len(cu_seqlens) - 1, 0)
    dtypes = (dtype, dtype, dtype, dtype, torch.bool, torch.int32)
    tensors = [
        None if x is None else x.to("cpu", kind).resolve_neg().contiguous()
        for x, kind in zip((log_ratio, values, rewards, bootstrap, mask, cu_seqlens), dtypes, strict=True)
    ]
    _function(dtype)(
        *(None if x is None else x.data_ptr() for x in tensors),
        sequences,
        width,
        rewards.shape == values.shape,
        tau,
        lam * gamma,
        gamma,
        alpha,
        *(row.data_ptr() for row in buffer),
        torch.get_num_threads(),
    )
    return buffer.to(values.device)


@lru_cache
def _function(dtype: torch.dtype) -> Any:
    function = library("lambda_returns")[f"lambda_returns_{str(dtype).removeprefix('torch.')}"]
    function.argtypes = [*[c_void_p] * 6, *[c_int64] * 2, c_int, *[c_double] * 4, *[c_void_p] * 4, c_int]
    function.restype = None
    return function
