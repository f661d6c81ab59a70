"""PPO's loss: the paper's Algorithm 1, clipped, or with the KL penalties of Eqs. 5 and 17."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Impl, check_count, check_number, check_tensor, compute_dtype, resolve_impl

MAX_LOG_RATIO = 80.0  # e^89 overflows float32, and the clipped branch would then have the gradient 0 · inf


class PPOLossOutput(NamedTuple):
    loss: Tensor  # ()
    metrics: dict[str, Tensor]  # () each, detached; means over the valid tokens, 0 where there are none


def ppo_loss(
    logprobs: Tensor,  # (…)
    old_logprobs: Tensor,  # (…)
    values: Tensor,  # (…)
    old_values: Tensor,  # (…)
    advantages: Tensor,  # (…)
    returns: Tensor,  # (…)
    mask: Tensor | None = None,  # (…) bool
    *,
    clip: float | None = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    forward_kl_coef: float = 0.0,
    reverse_kl_coef: float = 0.0,
    num_tokens: float | Tensor | None = None,
    impl: Impl = "auto",
) -> PPOLossOutput:
    """PPO-clip with value clipping (arXiv 2508.17000, Algorithm 1): Σ_valid (L_π + value_coef · L_V) / num_tokens with

        ρ   = exp(log π − log π_old)
        L_π = max(−Â ρ, −Â · clip(ρ, 1 − clip, 1 + clip))
        L_V = max((V − R)², (clip(V, V_old − value_clip, V_old + value_clip) − R)²)

    (the squares without the factor ½ of some other implementations). Gradients reach logprobs and values alone.

    To L_π come, where their coefficients are not 0, penalties on the KL to the old policy,

        forward_kl_coef · (ρ − 1 − log ρ) + reverse_kl_coef · (ρ log ρ − ρ + 1)

    whose means over tokens drawn from π_old are D(π_old‖π) and D(π‖π_old), and so for their gradients, since E[ρ] = 1
    whatever π is. Each is at least 0, and at π = π_old each token's gradient is 0, where that of the plain −log ρ and
    ρ log ρ would be ±∇log π, which is 0 only on average. With clip=None they make the paper's PPO-penalty:

        Eq. 5    forward_kl_coef = β, reverse_kl_coef = τ
        Eq. 17   reverse_kl_coef = β + τ  (τ/α, by Eq. 18)

    The reference π_b drops out of these: the equations have −τ D(π‖π_b) beside advantages (Eq. 16) that lack the
    token's own penalty −τ log(π_old/π_b), where Â of `gae` on penalised rewards has it, and
    E[(Â + τ log(π_old/π_b)) ρ] − τ D(π‖π_b) = E[Â ρ] − τ D(π‖π_old).

    logprobs, old_logprobs: log π(token) and log π_old(token), in nats; values, old_values: V(s_t) now and at the
    rollout; advantages, returns: Â and R as `gae` gives them (Â whitened or not); each (…), floating point. mask: (…)
    bool, None for all valid; an invalid slot is never read, NaN there does no harm. clip, value_clip: half-widths, > 0,
    of the intervals for ρ and (in units of V) for V; clip=None: L_π = −Â ρ. value_coef: ζ, ≥ 0, as the other
    coefficients. num_tokens: what the sum is divided by, for instance the number of valid tokens of all devices and
    microbatches together (a number above 0, or a 0-d tensor, whose value is not checked); None for the number of valid
    tokens here, and a loss of 0 where there are none.
    impl: a few elementwise operations on one number per token are specification and fast path at once (the logits they
    come from are 50,000 times larger), so "reference", "torch" and "auto" are the same function.

    Returns the loss (0-d) and the metrics, computed without a host sync: policy_loss and value_loss (means of L_π and
    L_V), clip_fraction and value_clip_fraction (shares of the tokens where the clipped term is the larger and the
    gradient stops), approx_kl (mean of ρ − 1 − log ρ, an estimate of KL(π_old‖π)), values and returns (means of V and
    R). All float32, or float64 where an argument is float64.
    Raises ValueError for wrong shapes, dtypes and devices, and for numbers out of range.
    """
    check_tensor("logprobs", logprobs)
    others = {
        "old_logprobs": old_logprobs,
        "values": values,
        "old_values": old_values,
        "advantages": advantages,
        "returns": returns,
    }
    shape, device = tuple(logprobs.shape), logprobs.device
    for name, value in others.items():
        check_tensor(name, value, shape=shape, like="logprobs", device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, like="logprobs", dtypes=(torch.bool,), device=device)
    if clip is not None:
        check_number("clip", clip, low=0.0, open_low=True)
    check_number("value_clip", value_clip, low=0.0, open_low=True)
    check_number("value_coef", value_coef, low=0.0)
    check_number("forward_kl_coef", forward_kl_coef, low=0.0)
    check_number("reverse_kl_coef", reverse_kl_coef, low=0.0)
    check_count("num_tokens", num_tokens)
    resolve_impl(impl, logprobs)
    if impl == "triton":
        raise ValueError(
            'impl: got "triton", expected "auto", "torch" or "reference": an elementwise loss needs no kernel'
        )

    dtype = compute_dtype(logprobs, *others.values())

    def read(x: Tensor) -> Tensor:  # invalid slots become 0 before anything is computed, so their gradient is 0
        return (x if mask is None else torch.where(mask, x, 0.0)).to(dtype)

    logprobs, values = read(logprobs), read(values)
    old_logprobs, old_values, advantages, returns = (
        read(x.detach()) for x in (old_logprobs, old_values, advantages, returns)
    )
    log_ratio = logprobs - old_logprobs
    if clip is not None:
        log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    policy_losses = policy_unclipped = policy_clipped = -advantages * ratio
    if clip is not None:
        policy_clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
        policy_losses = torch.maximum(policy_unclipped, policy_clipped)
    if forward_kl_coef:
        policy_losses = policy_losses + forward_kl_coef * (torch.expm1(log_ratio) - log_ratio)
    if reverse_kl_coef:
        policy_losses = policy_losses + reverse_kl_coef * (ratio * log_ratio - torch.expm1(log_ratio))
    value_unclipped = (values - returns).square()
    value_clipped = (values.clamp(old_values - value_clip, old_values + value_clip) - returns).square()
    value_losses = torch.maximum(value_unclipped, value_clipped)

    valid_tokens = torch.full((), logprobs.numel(), device=device) if mask is None else mask.sum()
    valid_tokens = valid_tokens.clamp(min=1)
    loss = (policy_losses + value_coef * value_losses).sum() / (valid_tokens if num_tokens is None else num_tokens)
    with torch.no_grad():
        sums = {
            "policy_loss": policy_losses,
            "value_loss": value_losses,
            "clip_fraction": policy_clipped > policy_unclipped,
            "value_clip_fraction": value_clipped > value_unclipped,
            "approx_kl": ratio - 1 - log_ratio,
            "values": values,
            "returns": returns,
        }
        metrics = {name: x.sum(dtype=dtype) / valid_tokens for name, x in sums.items()}
    return PPOLossOutput(loss, metrics)
