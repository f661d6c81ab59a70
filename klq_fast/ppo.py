"""PPO: the paper's Algorithm 1, the baseline. klq.py has the same outline."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .batch import Responses, Rollout
from .kernels.lambda_returns.op import gae
from .kernels.linear_logprob.op import linear_logprobs
from .kernels.ppo_loss.op import PPOLossOutput, ppo_loss

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class PPO:
    """PPO-clip, or PPO-penalty (Eqs. 5, 17), on the KL-penalised reward r − τ·log(π_old/π_b), with GAE."""

    tau: float
    lam: float
    gamma: float
    alpha: float
    clip: float
    value_clip: float
    value_coef: float
    whiten: bool
    ppo_penalty: Literal["none", "forward", "reverse"]
    beta: float | None
    temperature: float

    @classmethod
    def from_config(cls, config: "Config") -> "PPO":
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def targets(self, rollout: Rollout) -> Rollout:
        """The batch with its advantages and the returns that the values are regressed on."""
        mask = rollout.mask
        rewards = torch.where(rollout.last, rollout.rewards[:, None], 0.0) - self.tau * rollout.log_ratio
        advantages, returns = gae(rewards, rollout.values, mask, lam=self.lam, gamma=self.gamma)
        if self.whiten:
            advantages = whitened(advantages, mask)
        return replace(rollout, advantages=advantages, returns=returns)

    def loss(
        self,
        batch: Responses,
        hidden: Tensor,  # (N, D) the states s_t
        head: nn.Linear,
        values: Tensor,  # (N,)
        num_tokens: float | Tensor,  # response tokens of the whole minibatch, over all devices
        softcap: float | None,
    ) -> PPOLossOutput:
        """This microbatch's share of the minibatch's loss."""
        clip, forward, reverse = self.trust_region()
        logprobs = linear_logprobs(
            hidden,
            head.weight,
            batch.tokens,
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
            clip=clip,
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            forward_kl_coef=forward,
            reverse_kl_coef=reverse,
            num_tokens=num_tokens,
        )

    def trust_region(self) -> tuple[float | None, float, float]:
        """What holds π near π_old: the ratio's clip, and the coefficients of D(π_old‖π) and D(π‖π_old)."""
        if self.ppo_penalty == "none":
            return self.clip, 0.0, 0.0
        beta = self.tau * (1 - self.alpha) / self.alpha if self.beta is None else self.beta  # Eq. 18
        # `ppo_loss` says why τ D(π‖π_b) of Eqs. 5 and 17 is τ D(π‖π_old) here.
        return (None, beta, self.tau) if self.ppo_penalty == "forward" else (None, 0.0, beta + self.tau)


def whitened(
    advantages: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
) -> Tensor:  # (B, T), 0 where masked
    """Shifted and scaled to mean 0 and variance 1 over all valid tokens of the batch, which every process holds."""
    count = mask.sum()
    mean = torch.where(mask, advantages, 0.0).sum() / count
    centred = torch.where(mask, advantages - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp_min(1)
    return centred * torch.rsqrt(variance + 1e-8)
