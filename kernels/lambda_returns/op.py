"""λ-returns (KLQ) and GAE (PPO): one reverse scan over the valid tokens of each row or packed sequence.

reference.py is the specification, kernel.py the scan on a GPU, cpu.c the one on a CPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import Impl, check_number, check_tensor, compute_dtype, resolve_impl
from . import cpu, reference
from .statistics import STATISTICS, batch_statistics, metrics_of


class LambdaReturns(NamedTuple):
    """What `lambda_returns` gives: each like `values`, 0 in invalid slots, without gradient; one allocation for all."""

    returns: Tensor  # G, the regression target
    action_values: Tensor  # Q
    td_errors: Tensor  # δ
    advantages: Tensor  # Δ


def lambda_returns(
    log_ratio: Tensor,  # (B, T), or (N,) with cu_seqlens
    values: Tensor,  # like log_ratio
    rewards: Tensor,  # like log_ratio, or one per row (B,) / sequence (S,)
    mask: Tensor | None = None,  # bool, like log_ratio
    *,
    tau: float,
    lam: float = 0.95,
    gamma: float = 1.0,
    alpha: float = 1.0,
    bootstrap: Tensor | None = None,  # (B,) / (S,)
    cu_seqlens: Tensor | None = None,  # int32 (S + 1,)
    impl: Impl = "auto",
) -> LambdaReturns:
    """λ-returns of KL-regularised Q-learning (arXiv 2508.17000, Eqs. 7, 13, 14 and Algorithm 2), over t from the end:

        Q_t = τ ℓ_t + V(s_t)
        δ_t = r_{t+1} + γ V(s_{t+1}) − Q_t
        Δ_t = δ_t + λγ Δ_{t+1}
        G_t = α Δ_t + Q_t

    The recurrence runs over the valid tokens in order: s_{t+1} is the state of the next valid token, and after the last
    one V(s_{t+1}) is `bootstrap`, Δ_{t+1} is 0.

    Args:
        log_ratio: ℓ_t = log π(a_t|s_t) − log π_ref(a_t|s_t), in nats.
        values: V(s_t), where s_t is the state that a_t was chosen in.
        rewards: r_{t+1} beside each token; or one number per row or sequence, paid on its last valid token. (With
            cu_seqlens and as many sequences as tokens, a (N,) tensor is taken as one per token.)
        mask: True on valid tokens, by default all; may have holes. Invalid slots are never read and come back 0. A row
            without a valid token is all zeros, and its reward and bootstrap are ignored.
        tau: strength of the KL regularisation, > 0.
        lam, gamma: λ and the discount, each in [0, 1].
        alpha: step towards the λ-return, in (0, 1].
        bootstrap: value of the state after the last valid token, for rows that were cut off; default 0 (terminal).
        cu_seqlens: offsets of packed sequences: sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1. They
            start at 0 and end at N. May come with a mask (N,).
        impl: "reference" is the loop over time; "torch" runs anywhere, as C on the CPU: tensors on other devices
            are copied there and the results back; "triton" is one launch on a GPU, not for float64.

    Tensors may be float32, float64, bfloat16 or float16, on one device; results are float64 where log_ratio or values
    is, else float32. No gradient flows through. Raises ValueError on any other shape, dtype, device or number, and
    RuntimeError where "torch" finds no C compiler.
    """
    options: dict[str, Any] = {"tau": tau, "lam": lam, "gamma": gamma, "alpha": alpha, "impl": impl}
    options |= {"bootstrap": bootstrap, "cu_seqlens": cu_seqlens}
    return _lambda_returns(log_ratio, values, rewards, mask, **options, metrics=False)[0]


_DEFAULTS = dict(lambda_returns.__kwdefaults__ or {})


def lambda_returns_with_metrics(
    log_ratio: Tensor, values: Tensor, rewards: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[LambdaReturns, dict[str, Tensor]]:
    """`lambda_returns`, which has the same arguments, and what one watches of them, over all valid tokens.

    The metrics are 0-d float32 tensors, 0 where nothing is valid; with impl="triton" nothing waits for the device:

        td_error            mean of δ
        kl                  mean of ℓ: the KL divergence from the reference, per token
        advantage           mean of Δ
        advantage_std       its standard deviation
        explained_variance  1 − Var(Δ) / Var(Q + Δ): how much of the λ-returns (α = 1) the action values know; at most
                            1, and 0 where they are constant
    """
    results, statistics = _lambda_returns(log_ratio, values, rewards, mask, metrics=True, **(_DEFAULTS | options))
    return results, metrics_of(statistics)


@torch.no_grad()
def _lambda_returns(
    log_ratio: Tensor,
    values: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    *,
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: Impl,
    metrics: bool,
) -> tuple[LambdaReturns, Tensor]:
    """The checks, the results and, if asked for, the rows' statistics (rows, 7)."""
    check_tensor("values", values)
    check_tensor("log_ratio", log_ratio, shape=tuple(values.shape), like="values", device=values.device)
    check_number("tau", tau, low=0.0, open_low=True)
    check_number("alpha", alpha, low=0.0, high=1.0, open_low=True)
    _check_common(values, rewards, mask, lam, gamma, bootstrap, cu_seqlens)
    impl = resolve_impl(impl, log_ratio, values)
    if impl == "reference":
        _check_offsets(cu_seqlens, values)
        exact = reference.lambda_returns(
            log_ratio,
            values,
            rewards,
            mask,
            tau=tau,
            lam=lam,
            gamma=gamma,
            alpha=alpha,
            bootstrap=bootstrap,
            cu_seqlens=cu_seqlens,
        )
        dtype = compute_dtype(log_ratio, values)
        returns, action_values, td_errors, advantages = (x.to(dtype) for x in exact)
        statistics = batch_statistics(log_ratio, mask, advantages, action_values, td_errors)
        return LambdaReturns(returns, action_values, td_errors, advantages), statistics
    numbers = (float(tau), float(lam), float(gamma), float(alpha))
    buffer, statistics = _scan_op(log_ratio, values, rewards, mask, bootstrap, cu_seqlens, *numbers, metrics, impl)
    returns, advantages, action_values, td_errors = _rows(buffer, values)
    return LambdaReturns(returns, action_values, td_errors, advantages), statistics


@torch.no_grad()
def gae(
    rewards: Tensor,  # like values, or one per row (B,) / sequence (S,)
    values: Tensor,  # (B, T), or (N,) with cu_seqlens
    mask: Tensor | None = None,  # bool, like values
    *,
    lam: float = 0.95,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,  # (B,) / (S,)
    cu_seqlens: Tensor | None = None,  # int32 (S + 1,)
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Algorithm 1 of arXiv 2508.17000): advantages and returns, each like `values`.

        δ_t = r_{t+1} + γ V(s_{t+1}) − V(s_t)
        Â_t = δ_t + λγ Â_{t+1}
        returns_t = Â_t + V(s_t)

    With rewards r − τℓ the advantages are `lambda_returns`' Δ. Arguments, dtypes and errors are as in `lambda_returns`;
    results are float64 where `values` is, else float32.
    """
    check_tensor("values", values)
    _check_common(values, rewards, mask, lam, gamma, bootstrap, cu_seqlens)
    impl = resolve_impl(impl, values)
    if impl == "reference":
        _check_offsets(cu_seqlens, values)
        advantages, returns = reference.gae(
            rewards, values, mask, lam=lam, gamma=gamma, bootstrap=bootstrap, cu_seqlens=cu_seqlens
        )
        dtype = compute_dtype(values)
        return advantages.to(dtype), returns.to(dtype)
    numbers = (1.0, float(lam), float(gamma), 1.0)
    buffer, _ = _scan_op(None, values, rewards, mask, bootstrap, cu_seqlens, *numbers, False, impl)
    returns, advantages, *_ = _rows(buffer, values)
    return advantages, returns


def _check_common(
    values: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    lam: float,
    gamma: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything but the contents of cu_seqlens, which _check_offsets reads (torch.compile cannot, here)."""
    shape, device = tuple(values.shape), values.device
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"values: got shape {shape}, expected (B, T), or (N,) together with cu_seqlens")
        rows, row, source = shape[0], "one per row", "the first dimension of values"
    else:
        if len(shape) != 1:
            raise ValueError(f"values: got shape {shape} with cu_seqlens, expected (N,)")
        check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32,), device=device)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (S + 1,)")
        rows, row, source = cu_seqlens.shape[0] - 1, "one per sequence", "the sequences in cu_seqlens"
    check_tensor("rewards", rewards, device=device)
    if tuple(rewards.shape) not in (shape, (rows,)):
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected {shape} (values) or {(rows,)} ({row})")
    if mask is not None:
        check_tensor("mask", mask, shape=shape, like="values", dtypes=(torch.bool,), device=device)
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, shape=(rows,), like=source, device=device)
    check_number("lam", lam, low=0.0, high=1.0)
    check_number("gamma", gamma, low=0.0, high=1.0)


def _check_offsets(cu_seqlens: Tensor | None, values: Tensor) -> None:
    """0 = cu_seqlens[0] ≤ … ≤ cu_seqlens[-1] = N; on CUDA checked on the device, without a synchronisation."""
    if cu_seqlens is None:
        return
    total = values.shape[0]
    if cu_seqlens.is_cuda:
        ordered = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(ordered, f"cu_seqlens: expected offsets that rise from 0 to {total}")
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != total:
        raise ValueError(f"cu_seqlens: got offsets from {first} to {last}, expected 0 to {total} (tokens in values)")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: got falling offsets {cu_seqlens.tolist()}, expected a non-decreasing sequence")


def _scan(
    log_ratio: Tensor | None,  # None: GAE, where Q = V
    values: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
    metrics: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """G, Δ, Q, δ, the rows of one buffer (4, values.numel()); the statistics, or nothing."""
    _check_offsets(cu_seqlens, values)
    tensors = (log_ratio, values, rewards, mask, bootstrap, cu_seqlens)
    if impl == "triton":
        from . import kernel  # Triton is not installed everywhere, and slow to import

        return kernel.lambda_returns(*tensors, tau, lam, gamma, alpha, metrics)
    buffer = cpu.lambda_returns(*tensors, tau, lam, gamma, alpha)
    if not metrics or log_ratio is None:
        return buffer, buffer.new_empty(0, STATISTICS, dtype=torch.float64)
    _, advantages, action_values, td_errors = _rows(buffer, values)
    return buffer, batch_statistics(log_ratio, mask, advantages, action_values, td_errors)


_scan_op = torch.library.custom_op("klq_fast::lambda_returns", _scan, mutates_args=())


@_scan_op.register_fake
def _(log_ratio, values, rewards, mask, bootstrap, cu_seqlens, tau, lam, gamma, alpha, metrics, impl):
    rows, sequences = 4, 1
    if impl == "triton":
        rows = 2 if log_ratio is None else 4
        sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    statistics = values.new_empty(sequences if metrics else 0, STATISTICS, dtype=torch.float64)
    return values.new_empty(rows, values.numel(), dtype=compute_dtype(log_ratio, values)), statistics


def _rows(buffer: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    return buffer.view(len(buffer), *values.shape).unbind()
