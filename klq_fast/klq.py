"""KLQ: KL-regularised Q-learning, the paper's Algorithm 2. ppo.py has the same outline."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .batch import Responses, Rollout
from .kernels.klq_loss.op import KLQLossOutput, linear_klq_loss
from .kernels.lambda_returns.op import lambda_returns

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class KLQ:
    """Q_θ = τ·log(π_θ/π_b) + V_θ (Eq. 13), regressed on λ-returns (Eqs. 6, 7)."""

    tau: float
    lam: float
    gamma: float
    alpha: float
    policy_weight: float
    value_weight: float
    temperature: float

    @classmethod
    def from_config(cls, config: "Config") -> "KLQ":
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def targets(self, rollout: Rollout) -> Rollout:
        """The batch with its λ-returns G and error terms Δ."""
        target = lambda_returns(
            rollout.log_ratio,
            rollout.values,
            rollout.rewards,
            rollout.mask,
            tau=self.tau,
            lam=self.lam,
            gamma=self.gamma,
            alpha=self.alpha,
        )
        return replace(rollout, advantages=target.advantages, returns=target.returns)

    def loss(
        self,
        batch: Responses,
        hidden: Tensor,  # (N, D) the states s_t
        head: nn.Linear,
        values: Tensor,  # (N,)
        num_tokens: float | Tensor,  # response tokens of the whole minibatch, over all devices
        softcap: float | None,
    ) -> KLQLossOutput:
        """This microbatch's share of the minibatch's loss."""
        return linear_klq_loss(
            hidden,
            head.weight,
            batch.tokens,
            batch.ref_logprobs,
            values,
            batch.returns,
            tau=self.tau,
            policy_weight=self.policy_weight,
            value_weight=self.value_weight,
            bias=head.bias,
            temperature=self.temperature,
            softcap=softcap,
            num_tokens=num_tokens,
        )
