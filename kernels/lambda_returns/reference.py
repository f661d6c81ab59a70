"""λ-returns and GAE as the paper writes them: loops over time in float64, the specification of op.py.

Arguments are those of the public functions, already checked. Packed sequences are taken one at a time, as a batch of
one row, so there is one recurrence to read in each function.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def lambda_returns(
    log_ratio: Tensor,  # (B, T), or (N,) with cu_seqlens
    values: Tensor,  # like log_ratio
    rewards: Tensor,  # like log_ratio, or one per row (B,) / sequence (S,)
    mask: Tensor | None,  # bool, like log_ratio
    *,
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
    bootstrap: Tensor | None,  # (B,) / (S,)
    cu_seqlens: Tensor | None,  # (S + 1,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """G, Q, δ, Δ of Algorithm 2 (arXiv 2508.17000, appendix B), in float64."""
    if cu_seqlens is not None:

        def one_sequence(values, rewards, mask, bootstrap, log_ratio):
            return lambda_returns(
                log_ratio,
                values,
                rewards,
                mask,
                tau=tau,
                lam=lam,
                gamma=gamma,
                alpha=alpha,
                bootstrap=bootstrap,
                cu_seqlens=None,
            )

        packed = _each_sequence(4, one_sequence, values, rewards, mask, bootstrap, cu_seqlens, log_ratio)
        G, Q, td_errors, errors = packed
        return G, Q, td_errors, errors

    values, rewards, mask, next_value = _prepare(values, rewards, mask, bootstrap)
    Q = torch.where(mask, tau * log_ratio.double() + values, 0.0)  # Eq. 13
    td_errors, errors = torch.zeros_like(Q), torch.zeros_like(Q)
    error = torch.zeros_like(next_value)  # Δ_T = 0
    for t in reversed(range(Q.shape[1])):
        valid = mask[:, t]
        td_error = rewards[:, t] + gamma * next_value - Q[:, t]  # Eq. 14: δ_t = r_{t+1} + γ V(s_{t+1}) - Q_t
        error = torch.where(valid, td_error + lam * gamma * error, error)  # Δ_t = δ_t + λγ Δ_{t+1}
        next_value = torch.where(valid, values[:, t], next_value)  # a hole hands on what came from its right
        td_errors[:, t] = torch.where(valid, td_error, 0.0)
        errors[:, t] = torch.where(valid, error, 0.0)
    return alpha * errors + Q, Q, td_errors, errors  # Eq. 7: G_t = α Δ_t + Q_t


def gae(
    rewards: Tensor,  # like values, or one per row (B,) / sequence (S,)
    values: Tensor,  # (B, T), or (N,) with cu_seqlens
    mask: Tensor | None,  # bool, like values
    *,
    lam: float,
    gamma: float,
    bootstrap: Tensor | None,  # (B,) / (S,)
    cu_seqlens: Tensor | None,  # (S + 1,)
) -> tuple[Tensor, Tensor]:
    """Advantages and returns as in Algorithm 1 (arXiv 2508.17000, appendix B), in float64."""
    if cu_seqlens is not None:

        def one_sequence(values, rewards, mask, bootstrap):
            return gae(rewards, values, mask, lam=lam, gamma=gamma, bootstrap=bootstrap, cu_seqlens=None)

        advantages, returns = _each_sequence(2, one_sequence, values, rewards, mask, bootstrap, cu_seqlens)
        return advantages, returns

    values, rewards, mask, next_value = _prepare(values, rewards, mask, bootstrap)
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(next_value)  # Â_T = 0
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t]
        td_error = rewards[:, t] + gamma * next_value - values[:, t]  # δ_t = r_{t+1} + γ V(s_{t+1}) - V(s_t)
        advantage = torch.where(valid, td_error + lam * gamma * advantage, advantage)  # Â_t = δ_t + λγ Â_{t+1}
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = torch.where(valid, advantage, 0.0)
    return advantages, advantages + values


def _prepare(
    values: Tensor, rewards: Tensor, mask: Tensor | None, bootstrap: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and rewards (B, T) in float64 with zeros in the invalid slots, the mask, and the value after the end."""
    if mask is None:
        mask = torch.ones_like(values, dtype=torch.bool)
    if rewards.ndim == 1:  # paid on the row's last valid token: the one with no valid token to its right
        to_the_right = mask.flip(1).cumsum(1).flip(1) - mask.long()
        rewards = torch.where(to_the_right == 0, rewards[:, None], 0.0)
    values, rewards = (torch.where(mask, x.double(), 0.0) for x in (values, rewards))
    next_value = values.new_zeros(values.shape[0]) if bootstrap is None else bootstrap.double()
    return values, rewards, mask, next_value


def _each_sequence(
    outputs: int,
    function: Callable[..., tuple[Tensor, ...]],
    values: Tensor,  # (N,)
    rewards: Tensor,  # (N,) or (S,)
    mask: Tensor | None,  # (N,)
    bootstrap: Tensor | None,  # (S,)
    cu_seqlens: Tensor,  # (S + 1,)
    *others: Tensor,  # (N,) each
) -> list[Tensor]:
    """Applies `function` to one packed sequence at a time, as a batch of one row, and packs what it returns."""
    if values.numel() == 0:
        return [values.double()] * outputs
    results = []
    for s, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        one = slice(start, end)
        results.append(
            function(
                values[None, one],
                rewards[None, one] if rewards.shape == values.shape else rewards[s : s + 1],
                None if mask is None else mask[None, one],
                None if bootstrap is None else bootstrap[s : s + 1],
                *(x[None, one] for x in others),
            )
        )
    return [torch.cat(parts, 1)[0] for parts in zip(*results, strict=True)]
