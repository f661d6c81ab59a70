"""PPO: the paper's Algorithm 1, beside KLQ in the same loop. See klq.py: the two have one outline."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .batch import Rollout
from .distributed import all_sum
from .kernels.checks import Impl, check_number, check_tensor, resolve_impl
from .kernels.lambda_returns.op import gae
from .kernels.linear_logprob.op import linear_logprobs

if TYPE_CHECKING:
    from .config import Config


class PPOLossOutput(NamedTuple):
    loss: Tensor  # 0-d, carries gradients to logprobs and values
    metrics: dict[str, Tensor]  # 0-d tensors without gradient, each a mean over the valid tokens


def ppo_loss(
    logprobs: Tensor,  # (…)
    old_logprobs: Tensor,  # like logprobs
    values: Tensor,  # like logprobs
    old_values: Tensor,  # like logprobs
    advantages: Tensor,  # like logprobs
    returns: Tensor,  # like logprobs
    mask: Tensor | None = None,  # bool, like logprobs
    *,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    num_tokens: int | float | Tensor | None = None,
    impl: Impl = "auto",
) -> PPOLossOutput:
    """PPO-clip with value clipping: Algorithm 1 of arXiv 2508.17000 (appendix B), per valid token t

        ρ   = exp(log π(a_t|s_t) − log π_old(a_t|s_t))
        L_π = max(−Â ρ, −Â clip(ρ, 1 − clip, 1 + clip))
        L_V = max((V − R)², (clip(V, V_old − value_clip, V_old + value_clip) − R)²)

    with Â = `advantages` and R = `returns`, both fixed; loss = Σ_valid (L_π + value_coef · L_V) / num_tokens. The paper
    has no factor ½ before the square.
    """
    check_tensor("logprobs", logprobs)
    shape = tuple(logprobs.shape)
    for name, value in (
        ("old_logprobs", old_logprobs),
        ("values", values),
        ("old_values", old_values),
        ("advantages", advantages),
        ("returns", returns),
    ):
        check_tensor(name, value, shape=shape, like="logprobs", device=logprobs.device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, like="logprobs", dtypes=(torch.bool,), device=logprobs.device)
    check_number("clip", clip, low=0.0, open_low=True)
    check_number("value_clip", value_clip, low=0.0, open_low=True)
    check_number("value_coef", value_coef, low=0.0)
    resolve_impl(impl, logprobs.device)

    inputs = [logprobs, old_logprobs.detach(), values, old_values.detach(), advantages.detach(), returns.detach()]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    if mask is not None:  # a masked slot may hold anything: replaced before it is used, so its gradient is 0, not NaN
        inputs = [torch.where(mask, x, 0.0) for x in inputs]
    logprobs, old_logprobs, values, old_values, advantages, returns = (x.to(dtype) for x in inputs)
    count = mask.sum().clamp(min=1) if mask is not None else max(logprobs.numel(), 1)

    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    policy_losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    clipped_values = values.clamp(old_values - value_clip, old_values + value_clip)
    value_losses = torch.maximum((values - returns).square(), (clipped_values - returns).square())
    loss = (policy_losses + value_coef * value_losses).sum() / (count if num_tokens is None else num_tokens)
    with torch.no_grad():
        metrics = {
            "policy_loss": policy_losses.sum() / count,
            "value_loss": value_losses.sum() / count,
            "clip_fraction": ((ratio - 1).abs() > clip).sum() / count,
            "value_clip_fraction": ((values - old_values).abs() > value_clip).sum() / count,
            "approx_kl": (ratio - 1 - log_ratio).sum() / count,
        }
    return PPOLossOutput(loss, metrics)


@dataclass(frozen=True)
class PPO:
    """PPO-clip on the KL-penalised reward r − τ·log(π_old/π_b), with GAE."""

    tau: float
    lam: float
    gamma: float
    clip: float
    value_clip: float
    value_coef: float
    whiten: bool
    temperature: float

    @classmethod
    def from_config(cls, config: "Config") -> "PPO":
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def targets(self, rollout: Rollout) -> Rollout:
        """The batch with its advantages and the returns that the values are regressed on."""
        mask = rollout.mask
        last = mask & (mask.cumsum(1) == rollout.response_lengths[:, None])
        rewards = torch.where(last, rollout.rewards[:, None], 0.0) - self.tau * rollout.log_ratio
        advantages, returns = gae(rewards, rollout.values, mask, lam=self.lam, gamma=self.gamma)
        if self.whiten:
            advantages = whitened(advantages, mask)
        return replace(rollout, advantages=advantages, returns=returns)

    def loss(
        self,
        batch: Rollout,
        hidden: Tensor,  # (B, T, D) the states s_t
        head: nn.Linear,
        values: Tensor,  # (B, T)
        num_tokens: Tensor,  # () response tokens of the whole minibatch, over all devices
        softcap: float | None,
    ) -> PPOLossOutput:
        """This microbatch's share of the minibatch's loss."""
        logprobs = linear_logprobs(
            hidden,
            head.weight,
            batch.response_tokens,
            bias=head.bias,
            temperature=self.temperature,
            softcap=softcap,
        )
        return ppo_loss(
            logprobs,
            batch.logprobs,
            values,
            batch.values,
            batch.advantages,
            batch.returns,
            batch.mask,
            clip=self.clip,
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            num_tokens=num_tokens,
        )


def whitened(
    advantages: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
) -> Tensor:  # (B, T), 0 where masked
    """Shifted and scaled to mean 0 and variance 1 over all valid tokens of the batch, on all devices."""
    count = all_sum(mask.sum())
    mean = all_sum(torch.where(mask, advantages, 0.0).sum()) / count
    centred = torch.where(mask, advantages - mean, 0.0)
    variance = all_sum(centred.square().sum()) / (count - 1).clamp_min(1)
    return centred * torch.rsqrt(variance + 1e-8)
