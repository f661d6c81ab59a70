"""log π(token) from hidden states and the language-model head, without (N, V) logits.

`head_pass` holds the chunk loop, the matrix products and their order for linear_logprobs and for linear_klq_loss.
"""

from collections.abc import Callable

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
from ..log_ratio.op import target_softmax_
from . import reference


def linear_logprobs(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    tokens: Tensor,  # (…) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> Tensor:  # (…)
    """log softmax(softcap(hidden · weightᵀ + bias) / temperature)[token], in nats; softcap(x) = c·tanh(x / c).

    hidden: (…, D), weight: (V, D), bias: (V,), floating point, each in its own dtype. tokens: (…), int64, in [0, V).
    Returns (…), float32 (float64 where hidden or weight is float64), never above 0.
    Differentiable once with respect to hidden, weight and bias; a gradient has the dtype of its tensor. Forward costs
    2·N·V·D floating-point operations and keeps nothing but its inputs; backward computes the logits again, 6·N·V·D
    (4·N·V·D where hidden or weight is frozen). Logits exist for a chunk of tokens at a time.
    Raises ValueError for wrong shapes, dtypes and devices, a token outside [0, V), temperature or softcap ≤ 0.
    """
    check_head(hidden, weight, tokens, bias, temperature, softcap)
    if resolve_impl(impl, hidden, weight) == "reference":
        check_tokens("tokens", tokens, weight.shape[0])
        return reference.linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap)
    flat_hidden = hidden.reshape(tokens.numel(), weight.shape[1])
    out = _linear_logprobs(flat_hidden, weight, bias, tokens.reshape(-1), float(temperature), softcap)
    return out.view(tokens.shape)


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
    impl: Impl = "auto",
) -> Tensor:  # (…)
    """ℓ = log π(token) − log π_ref(token), in nats, both at the sampling temperature (arXiv 2508.17000, Eq. 13).

    Arguments, dtypes and errors as in `linear_logprobs`; the reference may have another hidden size D_ref. Both go
    through the same arithmetic, so that a policy equal to its reference gives exactly 0. No gradient reaches the
    reference.
    """
    check_head(hidden, weight, tokens, bias, temperature, softcap)
    check_head(ref_hidden, ref_weight, tokens, ref_bias, temperature, softcap, prefix="ref_")
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight: got V = {ref_weight.shape[0]}, expected {weight.shape[0]} (the V of weight)")
    check_tensor("ref_hidden", ref_hidden, device=hidden.device)
    with torch.no_grad():
        ref_logprobs = linear_logprobs(
            ref_hidden, ref_weight, tokens, bias=ref_bias, temperature=temperature, softcap=softcap, impl=impl
        )
    logprobs = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap, impl=impl)
    return logprobs - ref_logprobs


def check_head(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    prefix: str = "",
) -> None:
    """Everything about the arguments of the head except the range of the tokens."""
    check_tensor(f"{prefix}weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight: got shape {tuple(weight.shape)}, expected (V, D) with V of at least 1")
    check_tensor("tokens", tokens, dtypes=(torch.int64,), device=weight.device)
    expected = (*tokens.shape, weight.shape[1])
    like = f"tokens and D of {prefix}weight"
    check_tensor(f"{prefix}hidden", hidden, shape=expected, like=like, device=weight.device)
    if bias is not None:
        shape = (weight.shape[0],)
        check_tensor(f"{prefix}bias", bias, shape=shape, like=f"V of {prefix}weight", device=weight.device)
    check_head_numbers(temperature, softcap)


def check_head_numbers(temperature: float, softcap: float | None) -> None:
    check_number("temperature", temperature, low=0.0, open_low=True)
    if softcap is not None:
        check_number("softcap", softcap, low=0.0, open_low=True)


def chunk_rows(tokens: int, vocab: int, device: torch.device) -> int:
    """Tokens per chunk of logits: chunks of equal size, as large as the device wants them.

    On CPU about 50 MiB of float32 logits. V = 50304, D = 512 gives 256 rows and 1.08 times the time of the three
    matrix products; 128 rows 1.13, 64 rows 1.34, 512 rows 1.05 (one thread of an EPYC 9004).
    On CUDA about 1 GiB within [1024, 4096]: below some 800 rows the weight-gradient product is bound by memory.
    """
    if device.type == "cpu":
        most = min(1024, max(32, 50 * 2**20 // (4 * vocab)))
    else:
        most = min(4096, max(1024, 2**30 // (4 * vocab)))
    chunks = max(1, -(-tokens // most))
    return -(-tokens // chunks)


def head_pass(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (n,), in [0, V)
    temperature: float,
    softcap: float | None,
    *,
    rows: Tensor | None = None,  # (n,) int64: the rows of hidden that the tokens belong to; None: all of them
    row_gradient: Callable[[Tensor, slice], Tensor] | None = None,
    hidden_grad: bool = False,
    weight_grad: bool = False,
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (n,), (N, D), (V, D), (V,)
    """log π of the tokens and the gradients asked for, a chunk of tokens at a time.

    row_gradient(logprobs, chunk) gives ∂loss/∂log π of the tokens in `chunk`; the gradients follow in the same visit:
    2·n·V·D floating-point operations for the logits and for each of the two large gradients. Everything is computed
    and returned in float32 (float64 where hidden or weight is float64), whatever torch.autocast says; a gradient not
    asked for comes back with no elements. Memory: one chunk of logits (two with softcap) and the gradients.
    """
    dtype, device = compute_dtype(hidden, weight), hidden.device
    (size, depth), vocab = hidden.shape, weight.shape[0]
    # With fewer tokens than rows, the rows that no token owns keep gradient 0.
    new = torch.empty if rows is None else torch.zeros
    hidden_gradient = new((size, depth) if hidden_grad else (0,), dtype=dtype, device=device)
    weight_gradient = torch.empty((vocab, depth) if weight_grad else (0,), dtype=dtype, device=device)
    bias_gradient = torch.zeros(vocab if bias_grad else 0, dtype=dtype, device=device)
    logprobs = torch.empty(len(tokens), dtype=dtype, device=device)
    if weight_grad and len(tokens) == 0:
        weight_gradient.zero_()

    chunk_size = chunk_rows(len(tokens), vocab, device)
    buffer = torch.empty(chunk_size, vocab, dtype=dtype, device=device)
    slopes = torch.empty_like(buffer) if softcap is not None and row_gradient is not None else None
    inner = 1 / (temperature if softcap is None else softcap)
    scaled_bias = None if bias is None else bias.to(dtype) * inner
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(tokens), max(chunk_size, 1)):
            chunk = slice(start, min(start + chunk_size, len(tokens)))
            own_rows = chunk if rows is None else rows[chunk]
            inputs = hidden[own_rows].to(dtype)
            logits = buffer[: len(inputs)]
            _project(inputs * inner, weight, out=logits)
            if scaled_bias is not None:
                logits += scaled_bias
            if softcap is not None:
                logits.tanh_()
                if slopes is not None:
                    torch.square(logits, out=slopes[: len(inputs)])
                logits.mul_(softcap / temperature)
            chunk_logprobs, total = target_softmax_(logits, tokens[chunk])
            logprobs[chunk] = chunk_logprobs
            if row_gradient is None:
                continue

            # ∂loss/∂(hidden · weightᵀ + bias) = factor ⊙ logits, with the E of target_softmax_ in logits.
            factor = (row_gradient(chunk_logprobs, chunk) / (-temperature * total)).unsqueeze(1)
            if slopes is not None:
                logits.addcmul_(logits, slopes[: len(inputs)], value=-1)  # d tanh = 1 − tanh²
            if hidden_grad:
                hidden_gradient[own_rows] = _back_project(logits, weight).mul_(factor)
            if weight_grad:
                weight_gradient.addmm_(logits.T, inputs * factor, beta=0 if start == 0 else 1)
            if bias_grad:
                bias_gradient.addmv_(logits.T, factor.squeeze(1))
    return logprobs, hidden_gradient, weight_gradient, bias_gradient


def _project(inputs: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out = inputs · weightᵀ, in the dtype of inputs: a weight of another dtype is converted a block at a time."""
    if weight.dtype == inputs.dtype:
        torch.mm(inputs, weight.T, out=out)
        return
    for block in _vocab_blocks(weight):
        torch.mm(inputs, weight[block].to(inputs.dtype).T, out=out[:, block])


def _back_project(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient · weight, in the dtype of gradient."""
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    out = gradient.new_zeros(len(gradient), weight.shape[1])
    for block in _vocab_blocks(weight):
        out.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
    return out


def _vocab_blocks(weight: Tensor) -> list[slice]:
    size = max(256, 2**22 // max(1, weight.shape[1]))  # 16 MiB in float32
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


@torch.library.custom_op("klq_fast::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, softcap: float | None
) -> Tensor:
    check_tokens("tokens", tokens, weight.shape[0])
    return head_pass(hidden, weight, bias, tokens, temperature, softcap)[0]


@_linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, softcap: float | None
) -> Tensor:
    return hidden.new_empty(tokens.shape, dtype=compute_dtype(hidden, weight))


@torch.library.custom_op("klq_fast::linear_logprobs_backward", mutates_args=())
def _linear_logprobs_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    softcap: float | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, hidden_gradient, weight_gradient, bias_gradient = head_pass(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        row_gradient=lambda _, chunk: grad[chunk],
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return hidden_gradient.to(hidden.dtype), weight_gradient.to(weight.dtype), bias_gradient.to(bias_dtype)


@_linear_logprobs_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    softcap: float | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        weight.new_empty(weight.shape[0] if bias_grad else 0, dtype=bias_dtype),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, tokens, ctx.temperature, ctx.softcap = inputs
    ctx.save_for_backward(hidden, weight, bias, tokens)


def _backward(ctx, grad: Tensor):
    refuse_double_backward("linear_logprobs")
    needed = ctx.needs_input_grad[:3]
    gradients = _linear_logprobs_backward(grad, *ctx.saved_tensors, ctx.temperature, ctx.softcap, *needed)
    return *(each if need else None for each, need in zip(gradients, needed, strict=True)), None, None, None


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
