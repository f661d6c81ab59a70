"""Sums that the implementations leave of a scan, and the metrics that come of them."""

import torch
from torch import Tensor

# Of a row, a sequence or a whole batch, in float64: the number of valid tokens; Σδ, Σℓ, ΣΔ, Σ(Q + Δ); and of Δ and
# Q + Δ the sums of squared differences from their means.
STATISTICS = 7

# Where Q + Δ is constant, as with λ = γ = 1 and one score for all, float32 leaves it a variance, which grows with the
# number of tokens in a row: of Q's and Δ's own squares up to 3e-12 at 1024 tokens, 8e-11 at 32768 (the worst of 300).
CONSTANT = 4e-10


def batch_statistics(
    log_ratio: Tensor,
    mask: Tensor | None,
    advantages: Tensor,  # this and the following 0 where the mask is False
    action_values: Tensor,
    td_errors: Tensor,
) -> Tensor:
    """Of the whole batch, (1, STATISTICS)."""
    valid = torch.ones_like(advantages, dtype=torch.bool) if mask is None else mask
    advantages = advantages.double()
    targets = action_values + advantages
    count = valid.sum(dtype=torch.float64)
    terms = (td_errors, torch.where(valid, log_ratio, 0.0), advantages, targets)
    sums = torch.stack([x.sum(dtype=torch.float64) for x in terms])
    means = sums / count.clamp(min=1.0)
    differences = (advantages - means[2], targets - means[3])
    squares = torch.stack([torch.where(valid, x, 0.0).square().sum() for x in differences])
    return torch.cat([count[None], sums, squares])[None]


def metrics_of(statistics: Tensor) -> dict[str, Tensor]:  # (rows, STATISTICS)
    """The metrics of `lambda_returns_with_metrics`.

    Squares are about a row's own mean, and the rows' means about the batch's, so that large means do no harm. Q + Δ is
    taken for constant where it spreads by less than 2e-5 of its size and Δ's.
    """
    counts = statistics[:, :1]
    total = statistics.sum(0)
    count = total[0].clamp(min=1.0)
    td_error, kl, advantage, target = means = total[1:5] / count
    between = (counts * (statistics[:, 3:5] / counts.clamp(min=1.0) - means[2:]).square()).sum(0)
    advantage_variance, target_variance = (total[5:] + between) / count
    size = target.square() + advantage.square() + advantage_variance
    explained = torch.where(target_variance > CONSTANT * size, 1 - advantage_variance / target_variance, 0.0)
    return {
        "td_error": td_error.float(),
        "kl": kl.float(),
        "advantage": advantage.float(),
        "advantage_std": advantage_variance.sqrt().float(),
        "explained_variance": explained.float(),
    }
