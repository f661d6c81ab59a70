"""The λ-returns of op.py on a CPU: compiles cpu.c at its first use, as Triton does its kernels, and calls it."""

import os
import platform
import shlex
import subprocess
from ctypes import CDLL, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..checks import compute_dtype

OPTIONS = ("-std=gnu11", "-O2", "-shared", "-fPIC")


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
    2000 page faults cost up to 4 ms where the scan takes 0.3.
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
    )
    return buffer.to(values.device)


@lru_cache
def _function(dtype: torch.dtype) -> Any:
    function = library()[f"lambda_returns_{str(dtype).removeprefix('torch.')}"]
    function.argtypes = [*[c_void_p] * 6, *[c_int64] * 2, c_int, *[c_double] * 4, *[c_void_p] * 4]
    function.restype = None
    return function


@lru_cache
def library() -> CDLL:
    """cpu.c, compiled in 0.3 s by `$CC` or `cc` and kept in `$XDG_CACHE_HOME/klq_fast` or `~/.cache/klq_fast`.

    Raises RuntimeError where there is no compiler, or no folder to keep it in.
    """
    source = Path(__file__).with_name("cpu.c")
    machine = (platform.system(), platform.machine(), *platform.libc_ver())
    made_of = repr((OPTIONS, machine, source.read_text(encoding="utf-8")))
    name = f"lambda_returns-{sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klq_fast"
    try:
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=cache) as folder:  # a process beside this one never loads half a library
                _compile(source, Path(folder) / name)
                (Path(folder) / name).replace(cache / name)
        return CDLL(str(cache / name))
    except OSError as error:
        raise RuntimeError(
            f"the λ-returns' scan in C cannot be kept in, or loaded from, {cache}: {error}; "
            "XDG_CACHE_HOME names another folder"
        ) from error


def _compile(source: Path, target: Path) -> None:
    compiler = os.environ.get("CC") or "cc"
    try:
        command = [*shlex.split(compiler), *OPTIONS, str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "").strip() or error
        raise RuntimeError(
            "on a CPU the λ-returns' scan in C is compiled at first use, which needs a C compiler: "
            f"`{compiler}` failed: {reason}; install one (gcc, clang), or name yours in CC"
        ) from error
