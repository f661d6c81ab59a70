"""The specification of logprobs and log_ratio, in plain PyTorch: every intermediate is a full (…, V) tensor."""

import torch
from torch import Tensor


def logprobs(
    logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
) -> Tensor:  # (…)
    """log softmax(logits / temperature)[token]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_policy = (logits.to(dtype) / temperature).log_softmax(dim=-1)
    return log_policy.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def log_ratio(
    logits: Tensor,  # (…, V)
    ref_logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
) -> Tensor:  # (…)
    """log π(token) − log π_ref(token); no gradient reaches the reference."""
    ref_logprobs = logprobs(ref_logits.detach(), tokens, temperature=temperature)
    return logprobs(logits, tokens, temperature=temperature) - ref_logprobs
