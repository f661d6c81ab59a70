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
from . import cpu, reference


def logprobs(
    logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # (…)
    """log softmax(logits / temperature)[token], in nats: never above 0, and exact for confident tokens.

    logits: (…, V), floating point, any strides. tokens: (…), int64, in [0, V).
    Returns (…), float32 (float64 where logits is float64). Differentiable once with respect to logits; the gradient
    has the dtype of logits and is the only (…, V) tensor that is allocated. With inplace_backward not even that: the
    gradient is written over logits, which hold other numbers from then on, and a second backward pass through them
    raises autograd's RuntimeError. impl="reference" has no such option.
    Raises ValueError for wrong shapes, dtypes and devices, a token outside [0, V), temperature ≤ 0, inplace_backward
    with logits whose rows share memory; RuntimeError where a CPU is to compute and no C compiler is found.
    """
    _check("logits", logits, tokens, temperature)
    implementation = _resolve(impl, inplace_backward, logits)
    if implementation == "reference":
        check_tokens("tokens", tokens, logits.shape[-1])
        return reference.logprobs(logits, tokens, temperature=temperature)
    return _logprobs(logits, None, tokens, float(temperature), inplace_backward, implementation)[0]


def log_ratio(
    logits: Tensor,  # (…, V)
    ref_logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> Tensor:  # (…)
    """ℓ = log π(token) − log π_ref(token), in nats, both at the sampling temperature (arXiv 2508.17000, Eq. 13).

    Arguments, dtypes and errors as in `logprobs`; ref_logits: (…, V) as logits. Both go through the same arithmetic,
    so that equal logits give exactly 0. No gradient reaches ref_logits.
    """
    _check("logits", logits, tokens, temperature)
    check_tensor("ref_logits", ref_logits, shape=tuple(logits.shape), like="logits", device=logits.device)
    implementation = _resolve(impl, inplace_backward, logits, ref_logits)
    if implementation == "reference":
        check_tokens("tokens", tokens, logits.shape[-1])
        return reference.log_ratio(logits, ref_logits, tokens, temperature=temperature)
    own, ref = _logprobs(logits, ref_logits.detach(), tokens, float(temperature), inplace_backward, implementation)
    return own - ref


def _check(name: str, logits: Tensor, tokens: Tensor, temperature: float) -> None:
    check_tensor(name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(logits.shape)}, expected (…, V) with V of at least 1")
    shape = tuple(logits.shape[:-1])
    check_tensor("tokens", tokens, shape=shape, like=f"{name} without V", dtypes=(torch.int64,), device=logits.device)
    check_number("temperature", temperature, low=0.0, open_low=True)


def _resolve(impl: Impl, inplace_backward: bool, logits: Tensor, ref_logits: Tensor | None = None) -> str:
    if not isinstance(inplace_backward, bool):
        raise ValueError(f"inplace_backward: got {inplace_backward!r}, expected True or False")
    implementation = resolve_impl(impl, logits, ref_logits)
    if inplace_backward and implementation == "reference":
        raise ValueError('inplace_backward: got True with impl="reference", expected another impl')
    if inplace_backward and any(n > 1 and step == 0 for n, step in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"logits: got strides {logits.stride()}, expected rows apart for inplace_backward")
    return implementation


def target_softmax_(
    logits: Tensor,  # (n, V) float32 or float64, overwritten
    tokens: Tensor,  # (n,)
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (n,), (n,)
    """Replaces each row z of logits / temperature by E with E[j] = exp(z[j] − max z), E[a] = −S, a being its token.

    S = Σ_{j≠a} exp(z[j] − max z). Returns log π(a) and total = exp(z[a] − max z) + S. The gradient of log π(a) with
    respect to z is then −E / total, its entry at a being S / total = 1 − π(a) without a subtraction: in float32 the
    usual 1 − p is off by 60% at p = 1 − 1e-7. For the same reason log π(a) is −log1p(S) where a is the likeliest
    token, hence exact for confident tokens and never above 0.
    """
    if cpu.takes(logits):
        return cpu.target_softmax(logits, tokens, temperature=temperature, out=logits)
    if temperature != 1:
        logits.div_(temperature)
    target = tokens.unsqueeze(1)
    top = logits.amax(dim=1, keepdim=True)
    target_gap = logits.gather(1, target) - top
    others = logits.sub_(top).exp_().scatter_(1, target, 0.0).sum(dim=1, keepdim=True)
    logits.scatter_(1, target, -others)
    total = target_gap.exp() + others
    logprobs = torch.where(target_gap == 0, -others.log1p(), target_gap - total.log())
    return logprobs.squeeze(1), total.squeeze(1)


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of logits (…, V), a few at a time, as new float32 or float64 tensors (n, V)."""
    if logits.dim() == 1:
        logits = logits.unsqueeze(0)
    lead, vocab, dtype = logits.shape[:-1], logits.shape[-1], compute_dtype(logits)
    size = tile_rows(vocab, logits.device)
    for start in range(0, lead.numel(), size):
        rows = slice(start, min(start + size, lead.numel()))
        yield rows, logits[_row_index(rows, logits)].to(dtype)


def tile_rows(vocab: int, device: torch.device) -> int:
    """How many rows of logits to convert or pass over together: on CPU 4 MiB of float32, which stay in the cache."""
    return max(1, (2**20 if device.type == "cpu" else 2**26) // vocab)


def _row_index(rows: slice, logits: Tensor) -> tuple[Tensor, ...]:
    """The index of these rows of logits (…, V), where a view as (N, V) would copy the whole of logits[:, :-1]."""
    return torch.unravel_index(torch.arange(rows.start, rows.stop, device=logits.device), logits.shape[:-1])


def _logprobs_torch(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    if cpu.takes(logits):
        return cpu.target_softmax(logits, tokens, temperature=temperature)[0]
    out = torch.empty(tokens.numel(), dtype=compute_dtype(logits), device=logits.device)
    for rows, chunk in _chunks(logits):
        out[rows], _ = target_softmax_(chunk, tokens.reshape(-1)[rows], temperature)
    return out.view(tokens.shape)


def _gradient_torch(grad: Tensor, logits: Tensor, tokens: Tensor, out: Tensor, temperature: float) -> None:
    if cpu.takes(logits, out):
        cpu.target_softmax(logits, tokens, temperature=temperature, out=out, grad=grad)
        return
    grad, tokens = grad.reshape(-1), tokens.reshape(-1)
    rows_apart = out.view(-1, out.shape[-1]) if out.is_contiguous() else None
    for rows, chunk in _chunks(logits):
        _, total = target_softmax_(chunk, tokens[rows], temperature)
        chunk.mul_((grad[rows] / (-temperature * total)).unsqueeze(1))
        if rows_apart is not None:
            rows_apart[rows] = chunk
        else:
            out[_row_index(rows, out)] = chunk.to(out.dtype)


@torch.library.custom_op("klq_fast::logprobs", mutates_args=())
def _logprobs(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    temperature: float,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """log π(token) and log π_ref(token), the latter with no elements where there is no reference."""
    check_tokens("tokens", tokens, logits.shape[-1])
    if impl == "triton":
        from . import kernel

        return kernel.logprobs(logits, ref_logits, tokens, temperature=temperature)
    own = _logprobs_torch(logits, tokens, temperature)
    return own, own.new_empty(0) if ref_logits is None else _logprobs_torch(ref_logits, tokens, temperature)


@_logprobs.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens: Tensor,
    temperature: float,
    inplace_backward: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    own = logits.new_empty(tokens.shape, dtype=compute_dtype(logits))
    if ref_logits is None:
        return own, own.new_empty(0)
    return own, logits.new_empty(tokens.shape, dtype=compute_dtype(ref_logits))


@torch.library.custom_op("klq_fast::logprobs_backward", mutates_args=())
def _logprobs_backward(
    grad: Tensor, logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float, impl: str
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(grad, logits, tokens, logprobs, out, temperature, impl)
    return out


@_logprobs_backward.register_fake
def _(grad: Tensor, logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float, impl: str) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("klq_fast::logprobs_backward_", mutates_args=("logits",))
def _logprobs_backward_(
    grad: Tensor, logits: Tensor, tokens: Tensor, logprobs: Tensor, temperature: float, impl: str
) -> None:
    _write_gradient(grad, logits, tokens, logprobs, logits, temperature, impl)


def _write_gradient(
    grad: Tensor, logits: Tensor, tokens: Tensor, logprobs: Tensor, out: Tensor, temperature: float, impl: str
) -> None:
    if impl == "triton":
        from . import kernel

        kernel.logprobs_backward_(grad, logits, tokens, logprobs, out, temperature=temperature)
    else:
        _gradient_torch(grad, logits, tokens, out, temperature)


def _setup_context(ctx, inputs, output) -> None:
    logits, _, tokens, ctx.temperature, ctx.inplace_backward, ctx.impl = inputs
    ctx.save_for_backward(logits, tokens, output[0])


def _backward(ctx, grad: Tensor, _):
    refuse_double_backward("logprobs")
    logits, tokens, logprobs = ctx.saved_tensors
    if ctx.inplace_backward:
        _logprobs_backward_(grad, logits, tokens, logprobs, ctx.temperature, ctx.impl)
        gradient = logits.detach()
    else:
        gradient = _logprobs_backward(grad, logits, tokens, logprobs, ctx.temperature, ctx.impl)
    return gradient, None, None, None, None, None


_logprobs.register_autograd(_backward, setup_context=_setup_context)
