"""log π(token) and log π(token) − log π_ref(token) from logits, without a float32 copy of the logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import (
    Impl,
    check_number,
    check_tensor,
    check_tokens,
    compute_dtype,
    refuse_double_backward,
    resolve_impl,
)
from . import reference


def logprobs(
    logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # (…)
    """log softmax(logits / temperature)[token], in nats: never above 0, and exact for confident tokens.

    logits: (…, V), floating point, any strides. tokens: (…), int64, in [0, V).
    Returns (…), float32 (float64 where logits is float64). Differentiable once with respect to logits; the gradient
    has the dtype of logits and is the only (…, V) tensor that is allocated.
    Raises ValueError for wrong shapes, dtypes and devices, a token outside [0, V), temperature ≤ 0.
    """
    _check("logits", logits, tokens, temperature)
    if resolve_impl(impl, logits) == "reference":
        check_tokens("tokens", tokens, logits.shape[-1])
        return reference.logprobs(logits, tokens, temperature=temperature)
    return _logprobs(logits, tokens, float(temperature))


def log_ratio(
    logits: Tensor,  # (…, V)
    ref_logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:  # (…)
    """ℓ = log π(token) − log π_ref(token), in nats, both at the sampling temperature (arXiv 2508.17000, Eq. 13).

    Arguments, dtypes and errors as in `logprobs`; ref_logits: (…, V) as logits. Both go through the same arithmetic,
    so that equal logits give exactly 0. No gradient reaches ref_logits.
    """
    check_tensor("logits", logits)
    check_tensor("ref_logits", ref_logits, shape=tuple(logits.shape), like="logits", device=logits.device)
    ref_logprobs = logprobs(ref_logits.detach(), tokens, temperature=temperature, impl=impl)
    return logprobs(logits, tokens, temperature=temperature, impl=impl) - ref_logprobs


def _check(name: str, logits: Tensor, tokens: Tensor, temperature: float) -> None:
    check_tensor(name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, expected (…, V) with V of at least 1")
    shape = tuple(logits.shape[:-1])
    check_tensor("tokens", tokens, shape=shape, like=f"{name} without V", dtypes=(torch.int64,), device=logits.device)
    check_number("temperature", temperature, low=0.0, open_low=True)


def target_softmax_(
    logits: Tensor,  # (n, V) float32 or float64, overwritten
    tokens: Tensor,  # (n,)
) -> tuple[Tensor, Tensor]:  # (n,), (n,)
    """Replaces each row z of logits by E with E[j] = exp(z[j] − max z), E[a] = −S, where a is the row's token.

    S = Σ_{j≠a} exp(z[j] − max z). Returns log π(a) and total = exp(z[a] − max z) + S. The gradient of log π(a) with
    respect to z is then −E / total, its entry at a being S / total = 1 − π(a) without a subtraction: in float32 the
    usual 1 − p is off by 60% at p = 1 − 1e-7. For the same reason log π(a) is −log1p(S) where a is the likeliest
    token, hence exact for confident tokens and never above 0.
    """
    target = tokens.unsqueeze(1)
    top = logits.amax(dim=1, keepdim=True)
    target_gap = logits.gather(1, target) - top
    others = logits.sub_(top).exp_().scatter_(1, target, 0.0).sum(dim=1, keepdim=True)
    logits.scatter_(1, target, -others)
    total = target_gap.exp() + others
    logprobs = torch.where(target_gap == 0, -others.log1p(), target_gap - total.log())
    return logprobs.squeeze(1), total.squeeze(1)


def _chunks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """The rows of logits (…, V) / temperature, a few at a time, as new float32 or float64 tensors (n, V)."""
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    lead, vocab, dtype = logits.shape[:-1], logits.shape[-1], compute_dtype(logits)
    # 4 MiB on CPU, so that the passes over a chunk find it in the cache (1.4 times as fast as 128 MiB in bfloat16).
    size = max(1, (2**20 if logits.device.type == "cpu" else 2**26) // vocab)
    for start in range(0, lead.numel(), size):
        rows = torch.arange(start, min(start + size, lead.numel()), device=logits.device)
        # An index, where a view as (N, V) would copy the whole of logits[:, :-1].
        chunk = logits[torch.unravel_index(rows, lead)].to(dtype)
        yield slice(start, start + len(rows)), chunk if temperature == 1 else chunk.div_(temperature)


@torch.library.custom_op("klq_fast::logprobs", mutates_args=())
def _logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    check_tokens("tokens", tokens, logits.shape[-1])
    out = torch.empty(tokens.numel(), dtype=compute_dtype(logits), device=logits.device)
    for rows, chunk in _chunks(logits, temperature):
        out[rows], _ = target_softmax_(chunk, tokens.reshape(-1)[rows])
    return out.view(tokens.shape)


@_logprobs.register_fake
def _(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return logits.new_empty(tokens.shape, dtype=compute_dtype(logits))


@torch.library.custom_op("klq_fast::logprobs_backward", mutates_args=())
def _logprobs_backward(grad: Tensor, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grad, tokens, flat_out = grad.reshape(-1), tokens.reshape(-1), out.view(-1, logits.shape[-1])
    for rows, chunk in _chunks(logits, temperature):
        _, total = target_softmax_(chunk, tokens[rows])
        flat_out[rows] = chunk.mul_((grad[rows] / (-temperature * total)).unsqueeze(1))
    return out


@_logprobs_backward.register_fake
def _(grad: Tensor, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx, inputs, output) -> None:
    logits, tokens, ctx.temperature = inputs
    ctx.save_for_backward(logits, tokens)


def _backward(ctx, grad: Tensor):
    refuse_double_backward("logprobs")
    return _logprobs_backward(grad, *ctx.saved_tensors, ctx.temperature), None, None


_logprobs.register_autograd(_backward, setup_context=_setup_context)
