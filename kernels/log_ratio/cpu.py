"""The row pass of op.py on a CPU, in C: cpu.c."""

from ctypes import c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cpu import library


def takes(*tensors: Tensor) -> bool:
    """Whether cpu.c reads and writes these where they lie: float32 on a CPU, each row in one piece."""
    return all(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
        and not x.is_neg()
        for x in tensors
    )


def target_softmax(
    logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…), in [0, V)
    *,
    temperature: float = 1.0,
    out: Tensor | None = None,  # (…, V); may be logits
    grad: Tensor | None = None,  # (…)
) -> tuple[Tensor, Tensor]:  # (…), (…)
    """log π(a) and total of logits / temperature. In out comes E, or, with ∂loss/∂log π(a) as grad, the gradient of the
    loss with respect to logits."""
    logprobs, totals = (torch.empty(tokens.shape, dtype=torch.float32, device="cpu") for _ in range(2))
    if tokens.numel() == 0:
        return logprobs, totals
    tensors = [
        *(logits, _row_starts(logits), tokens.contiguous()),
        *(out, None if out is None else _row_starts(out)),
        None if grad is None else grad.to(torch.float32).resolve_neg().contiguous(),
        *(logprobs, totals),
    ]
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    threads = torch.get_num_threads()
    _function()(tokens.numel(), logits.shape[-1], *addresses[:3], 1 / temperature, *addresses[3:], threads)
    return logprobs, totals


def _row_starts(x: Tensor) -> Tensor:
    """Where each row of x (…, V) starts, in elements from x's first; whatever the strides of the leading dimensions."""
    starts = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        starts = starts.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    return starts.contiguous()


@lru_cache
def _function() -> Any:
    function = library("log_ratio").target_softmax
    function.argtypes = [*[c_int64] * 2, *[c_void_p] * 3, c_double, *[c_void_p] * 5, c_int]
    function.restype = None
    return function
