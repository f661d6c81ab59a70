"""The specification of klq_loss and linear_klq_loss, in plain PyTorch: only the valid tokens are ever read."""

import torch
from torch import Tensor

from ..linear_logprob import reference as linear_logprob_reference


def _weighted_gradient(value: Tensor, weight: float) -> Tensor:
    """The same value, whose gradient is multiplied by weight."""
    return value.detach() + weight * (value - value.detach())


def klq_loss(
    logprobs: Tensor,  # (…)
    ref_logprobs: Tensor,  # (…)
    values: Tensor,  # (…)
    returns: Tensor,  # (…)
    mask: Tensor | None = None,  # (…) bool
    *,
    tau: float,
    policy_weight: float = 1.0,
    value_weight: float = 1.0,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # (), (…)
    """Σ_valid (τ(log π − log π_ref) + V − G)² / num_tokens (Eq. 6 and 13), and log π with 0 in the invalid slots."""
    valid = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    dtype = torch.float32
    for each in (logprobs, ref_logprobs, values, returns):
        dtype = torch.promote_types(dtype, each.dtype)

    log_policy = logprobs[valid].to(dtype)  # (valid tokens,), as everything below
    log_ratio = _weighted_gradient(log_policy, policy_weight) - ref_logprobs[valid].detach().to(dtype)
    action_values = tau * log_ratio + _weighted_gradient(values[valid].to(dtype), value_weight)
    residuals = action_values - returns[valid].detach().to(dtype)
    if num_tokens is None:
        num_tokens = residuals.numel()
    loss = residuals.square().sum() / (num_tokens if num_tokens != 0 else 1)  # without a valid token, 0
    valid_logprobs = torch.zeros_like(logprobs, dtype=dtype).masked_scatter(valid, log_policy.detach())
    return loss, valid_logprobs


def linear_klq_loss(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    tokens: Tensor,  # (…) int64
    ref_logprobs: Tensor,  # (…)
    values: Tensor,  # (…)
    returns: Tensor,  # (…)
    mask: Tensor | None = None,  # (…) bool
    *,
    tau: float,
    policy_weight: float = 1.0,
    value_weight: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    num_tokens: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # (), (…)
    """klq_loss of linear_logprobs."""
    valid = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    valid_logprobs = linear_logprob_reference.linear_logprobs(
        hidden[valid], weight, tokens[valid], bias=bias, temperature=temperature, softcap=softcap
    )
    logprobs = torch.zeros_like(tokens, dtype=valid_logprobs.dtype).masked_scatter(valid, valid_logprobs)
    return klq_loss(
        logprobs,
        ref_logprobs,
        values,
        returns,
        mask,
        tau=tau,
        policy_weight=policy_weight,
        value_weight=value_weight,
        num_tokens=num_tokens,
    )
