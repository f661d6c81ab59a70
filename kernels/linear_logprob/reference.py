"""The specification of linear_logprobs and linear_log_ratio, in plain PyTorch with (…, V) logits."""

import torch
from torch import Tensor

from ..log_ratio import reference as log_ratio_reference


def head_logits(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
) -> Tensor:  # (…, V)
    """softcap(hidden · weightᵀ + bias), in float32 (float64 where hidden or weight is float64)."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def linear_logprobs(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    tokens: Tensor,  # (…) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (…)
    """log softmax(softcap(hidden · weightᵀ + bias) / temperature)[token]."""
    logits = head_logits(hidden, weight, bias, softcap)
    return log_ratio_reference.logprobs(logits, tokens, temperature=temperature)


def linear_log_ratio(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (…, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    tokens: Tensor,  # (…) int64
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # (…)
    """log π(token) − log π_ref(token); no gradient reaches the reference."""
    logprobs = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap)
    with torch.no_grad():
        ref_logprobs = linear_logprobs(
            ref_hidden, ref_weight, tokens, bias=ref_bias, temperature=temperature, softcap=softcap
        )
    return logprobs - ref_logprobs
