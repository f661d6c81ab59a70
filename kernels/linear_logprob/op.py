"""log π(token) from hidden states and the language-model head, without (N, V) logits.

`head_pass` holds the chunk loop, the matrix products and their order for linear_logprobs and for linear_klq_loss.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    Impl,
    check_number,
    check_tensor,
    check_tokens,
    compute_dtype,
    gradient_dtype,
    refuse_double_backward,
    resolve_impl,
)
from ..log_ratio import cpu
from ..log_ratio.op import target_softmax_, tile_rows
from . import reference

BLOCK_SIZE = 2**22  # numbers that are converted at a time: 16 MiB in float32


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
    (4·N·V·D where hidden or weight is frozen). Logits exist for a chunk of tokens at a time, in float32; with Triton
    they are the float32 sums of products of hidden and weight as they are, of 16 bits or not.
    Raises ValueError for wrong shapes, dtypes and devices, a token outside [0, V), temperature or softcap ≤ 0;
    RuntimeError where a CPU is to compute and no C compiler is found.
    """
    check_head(hidden, weight, tokens, bias, temperature, softcap)
    chosen = resolve_impl(impl, hidden, weight)
    if chosen == "reference":
        check_tokens("tokens", tokens, weight.shape[0])
        return reference.linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, softcap=softcap)
    flat_hidden = hidden.reshape(tokens.numel(), weight.shape[1])
    out = _linear_logprobs(flat_hidden, weight, bias, tokens.reshape(-1), float(temperature), softcap, chosen)
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


def chunk_rows(tokens: int, vocab: int, device: torch.device, weight_grad: bool) -> int:
    """Tokens per chunk of logits: chunks of about equal size, as large as the device wants them.

    On CPU at most 70 MiB of float32 logits. V = 50304, D = 512, N = 2048 gives 342 rows, with which the whole
    takes 1.07 to 1.13 of the time of the three matrix products; 256 rows cost 0.04 more.

    On CUDA 2048 rows (1 GiB of logits for V = 131072), or 512 where the weight has no gradient; in multiples of 128,
    the rows of a tile of the matrix products. The weight's gradient costs 2·C·V·D operations a chunk of C rows, and
    moves 8·V·D bytes of itself and 2·C·V of E: it is bound by memory below C = 4·D / (D·bandwidth / speed − 1), for
    D = 2048 some 700 rows on an A100 or H200 (2.0 and 4.8 TB/s, 312 and 790 TFLOP/s), 900 on an H100. Of 2048 rows the
    memory takes half the time of the arithmetic that hides it; 4096 would save little and double the logits. Without
    that gradient the weight is read, 2·V·D bytes for 2·C·V·D operations: 512 rows are three times what that needs.
    """
    if device.type == "cpu":
        most = min(1024, max(32, 70 * 2**20 // (4 * vocab)))
    else:
        most = 2048 if weight_grad else 512
    chunks = max(1, -(-tokens // most))
    rows = -(-tokens // chunks)
    return rows if device.type == "cpu" or chunks == 1 else -(-rows // 128) * 128


def head_pass(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    tokens: Tensor,  # (n,), in [0, V)
    temperature: float,
    softcap: float | None,
    *,
    impl: str,  # "torch" or "triton"
    rows: Tensor | None = None,  # (n,) int64: the rows of hidden that the tokens belong to; None: all of them
    valid: Tensor | None = None,  # (n,) bool: the rows of hidden that count; None: all of them. Only for "triton"
    row_gradient: Callable[[Tensor, slice], Tensor] | None = None,
    hidden_grad: bool = False,
    weight_grad: bool = False,
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (n,), (N, D), (V, D), (V,)
    """log π of the tokens and the gradients asked for, a chunk of tokens at a time.

    row_gradient(logprobs, chunk) gives ∂loss/∂log π of the tokens in `chunk`; the gradients follow in the same visit:
    2·n·V·D floating-point operations for the logits and for each of the two large gradients. Everything is summed
    and returned in float32 (float64 where hidden or weight is float64), whatever torch.autocast says; a gradient not
    asked for comes back with no elements. Memory: one chunk of logits and the gradients.
    A row that is not valid may hold anything; its log π and its gradients are 0, if row_gradient's are.

    "torch" multiplies in float32. "triton" multiplies 16-bit operands as they are, on CUDA; of bfloat16 ones, E and
    factor ⊙ hidden are rounded to bfloat16 too, E in place. The gradients of float16 ones are multiplied in float32,
    where nothing overflows.
    """
    dtype, device, triton = compute_dtype(hidden, weight), hidden.device, impl == "triton"
    (size, depth), vocab = hidden.shape, weight.shape[0]
    operands = torch.promote_types(hidden.dtype, weight.dtype) if triton else dtype
    e_dtype = torch.bfloat16 if operands == torch.bfloat16 else dtype
    # With fewer tokens than rows, the rows that no token owns keep gradient 0.
    new = torch.empty if rows is None else torch.zeros
    hidden_gradient = new((size, depth) if hidden_grad else (0,), dtype=dtype, device=device)
    weight_gradient = torch.empty((vocab, depth) if weight_grad else (0,), dtype=dtype, device=device)
    bias_gradient = torch.zeros((vocab, 1) if bias_grad else (0, 1), dtype=dtype, device=device)
    logprobs = torch.empty(len(tokens), dtype=dtype, device=device)
    if weight_grad and len(tokens) == 0:
        weight_gradient.zero_()

    chunk_size = chunk_rows(len(tokens), vocab, device, weight_grad)
    # With "triton" the rows start at multiples of 16 bytes, in bfloat16 too, as the fast matrix products want them.
    # Otherwise they are an odd number of cache lines of 64 bytes apart: where a power of two divides that distance,
    # they crowd into few sets of the caches, which cost the products 0.04 of their time for V = 50304.
    line = 8 if triton else 64 // dtype.itemsize
    columns = line * (-(-vocab // line) | (not triton))
    buffer = torch.empty(chunk_size, columns, dtype=dtype, device=device)[:, :vocab]
    slopes = None
    if softcap is not None and row_gradient is not None and not triton:
        slopes = torch.empty_like(buffer[: tile_rows(vocab, device)])
    inner = 1 / (temperature if softcap is None else softcap)
    scaled_bias = None if bias is None or triton else bias.to(dtype) * inner
    if triton:
        from ..log_ratio import kernel  # Triton is not installed everywhere, and slow to import

        activation: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap}
    with torch.autocast(device.type, enabled=False):
        for start in range(0, len(tokens), max(chunk_size, 1)):
            chunk = slice(start, min(start + chunk_size, len(tokens)))
            own_rows = chunk if rows is None else rows[chunk]
            own_valid = None if valid is None else valid[chunk]
            inputs = hidden[own_rows].to(operands)
            if own_valid is not None:
                inputs = torch.where(own_valid.unsqueeze(1), inputs, 0)  # in Eᵀ · hidden, 0 · NaN would be NaN
            e = buffer[: len(inputs)]
            _project_(e, inputs, weight, 1.0 if triton else inner)
            if not triton:
                chunk_logprobs, total = _row_pass_(e, tokens[chunk], scaled_bias, softcap, temperature, slopes)
            elif row_gradient is None:
                chunk_logprobs = kernel.target_logprobs(e, tokens[chunk], valid=own_valid, **activation)
            else:
                e, chunk_logprobs, total = kernel.target_softmax_(
                    e, tokens[chunk], valid=own_valid, dtype=e_dtype, **activation
                )
            logprobs[chunk] = chunk_logprobs
            if row_gradient is None:
                continue

            # ∂loss/∂(hidden · weightᵀ + bias) = factor ⊙ E.
            factor = (row_gradient(chunk_logprobs, chunk) / (-temperature * total)).unsqueeze(1)
            if hidden_grad:
                hidden_gradient[own_rows] = _back_project(e, weight, dtype).mul_(factor)
            if weight_grad:
                scaled = torch.mul(inputs, factor, out=torch.empty(inputs.shape, dtype=e_dtype, device=device))
                _accumulate_(weight_gradient, e, scaled, beta=0 if start == 0 else 1)
            if bias_grad:
                _accumulate_(bias_gradient, e, factor.to(e_dtype), beta=0 if start == 0 else 1)
    return logprobs, hidden_gradient, weight_gradient, bias_gradient.squeeze(1)


def _row_pass_(
    logits: Tensor,  # (n, V), hidden · weightᵀ / temperature, or / softcap where there is one; overwritten with E
    tokens: Tensor,  # (n,)
    bias: Tensor | None,  # (V,), divided by the same number
    softcap: float | None,
    temperature: float,
    slopes: Tensor | None,  # (tile_rows, V); needed for gradients through the softcap
) -> tuple[Tensor, Tensor]:  # (n,), (n,)
    """Without Triton what target_softmax_ of ../log_ratio/kernel.py does: log π(a) and total."""
    if bias is None and softcap is None and cpu.takes(logits):  # row by row, which needs no tiles
        return target_softmax_(logits, tokens)
    size = tile_rows(logits.shape[1], logits.device)
    parts = []
    for tile, tile_tokens in zip(logits.split(size), tokens.split(size), strict=True):
        if bias is not None:
            tile += bias
        if softcap is not None:
            tile.tanh_()
            if slopes is not None:
                torch.square(tile, out=slopes[: len(tile)])
            tile.mul_(softcap / temperature)
        parts.append(target_softmax_(tile, tile_tokens))
        if slopes is not None:
            tile.addcmul_(tile, slopes[: len(tile)], value=-1)  # d tanh = 1 − tanh²
    logprobs, totals = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(totals)


# The three matrix products. Where PyTorch does not multiply two operands as they are, they are converted, a block of
# the vocabulary at a time.


def _project_(out: Tensor, inputs: Tensor, weight: Tensor, scale: float) -> None:
    """out = scale · inputs · weightᵀ."""
    for block in _vocab_blocks(inputs, weight, out.dtype, weight.shape):
        _multiply_(out[:, block], inputs, weight[block].T, alpha=scale)


def _back_project(e: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """e · weight, in dtype."""
    out = torch.empty(len(e), weight.shape[1], dtype=dtype, device=e.device)
    for block in _vocab_blocks(e, weight, dtype, weight.shape):
        _multiply_(out, e[:, block], weight[block], beta=0 if block.start == 0 else 1)
    return out


def _accumulate_(out: Tensor, e: Tensor, inputs: Tensor, *, beta: int) -> None:
    """out = beta · out + eᵀ · inputs."""
    for block in _vocab_blocks(e, inputs, out.dtype, out.shape):
        _multiply_(out[block], e[:, block].T, inputs, beta=beta)


def _vocab_blocks(left: Tensor, right: Tensor, dtype: torch.dtype, shape: torch.Size) -> list[slice]:
    vocab, depth = shape
    size = vocab if _direct(left, right, dtype) else max(256, BLOCK_SIZE // max(1, depth))
    return [slice(start, start + size) for start in range(0, vocab, size)]


def _direct(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies these as they are with sums in dtype; of 16 bits with float32 sums, only on CUDA."""
    return left.dtype == right.dtype and (left.dtype == dtype or left.is_cuda)


def _multiply_(out: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0, beta: int = 0) -> None:
    """out = alpha · left · right + beta · out; whatever the operands, every product and sum in the dtype of out."""
    if _direct(left, right, out.dtype) and left.dtype != out.dtype:
        # One call of cuBLAS, which adds to out in place: self and out are the same tensor, neither is copied.
        torch.addmm(out, left, right, out_dtype=out.dtype, alpha=alpha, beta=beta, out=out)
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype), alpha=alpha, beta=beta)


@torch.library.custom_op("klq_fast::linear_logprobs", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    temperature: float,
    softcap: float | None,
    impl: str,
) -> Tensor:
    check_tokens("tokens", tokens, weight.shape[0])
    return head_pass(hidden, weight, bias, tokens, temperature, softcap, impl=impl)[0]


@_linear_logprobs.register_fake
def _(hidden, weight, bias, tokens, temperature, softcap, impl):
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
    impl: str,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return head_pass(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        impl=impl,
        row_gradient=lambda _, chunk: grad[chunk],
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )[1:]


@_linear_logprobs_backward.register_fake
def _(grad, hidden, weight, bias, tokens, temperature, softcap, impl, hidden_grad, weight_grad, bias_grad):
    like = torch.empty(0, dtype=compute_dtype(hidden, weight), device=hidden.device)
    return (
        like.new_empty(hidden.shape if hidden_grad else (0,)),
        like.new_empty(weight.shape if weight_grad else (0,)),
        like.new_empty(weight.shape[0] if bias_grad else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx, grad: Tensor):
    refuse_double_backward("linear_logprobs")
    needed = ctx.needs_input_grad[:3]
    gradients = _linear_logprobs_backward(grad, *ctx.saved_tensors, *ctx.options, *needed)
    results = (
        each.to(gradient_dtype(source)) if need else None
        for each, source, need in zip(gradients, ctx.saved_tensors, needed, strict=False)
    )
    return *results, *(None,) * 4


_linear_logprobs.register_autograd(_backward, setup_context=_setup_context)
