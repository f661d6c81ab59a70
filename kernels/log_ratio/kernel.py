"""Triton kernels over rows of logits: one read of a row gives log π(a) of its token a, and its gradient.

A row is anchored at its own token: S = Σ_{j≠a} exp(z[j] − z[a]) gives log π(a) = −log1p(S), never above 0 and exact for
confident tokens; and as z[a] can be read first, a block of logits is done with as soon as it has arrived. Only where a
block holds a logit that overshadows the token by RAISE_BITS is the anchor raised to that logit, and what was summed
(and stored) before is scaled down: no second pass over the logits, no flag, nothing for the host to wait for.

What should limit them is memory, if enough of it is under way: an H200 (4.8 TB/s, some 700 ns, 132 multiprocessors)
needs 25 KB on each multiprocessor. A program has 512 threads and asks for its next block before it works on the present
one; its at most 64 registers a thread (up to 128 with a bias, a softcap or rows that cannot be read as vectors) let two
programs share a multiprocessor: 2 · 16 KiB under way, as 4096 float32 or 8192 bfloat16 logits each. The work should
hide behind that: of bfloat16, the hardest case, 4.8 TB/s bring a multiprocessor 9.6 logits a cycle (1.9 GHz); it can
work on 128 / 10.3 = 12.4, at 10.3 instructions a logit in the compiled loop. Not measured yet.
"""

from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_THREADS = 512

# A sum over 2^18 columns stays below 2^78, far from float32's largest, 2^128. Gradients are divided by as much: one of
# 1e-9 becomes 1e-33 at the least, where float32 still has its full precision.
RAISE_BITS = tl.constexpr(60.0)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOAT32_MIN = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _log1p(x):
    """log(1 + x) for x ≥ 0; of a small x, the sum 1 + x has lost digits."""
    s = x / (x + 2.0)  # log(1 + x) = 2·artanh(s); s ≤ 1/3 where the series is used, and its next term below 2^-29 of it
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(x < 1.0, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def _expm1(x):
    """exp(x) − 1 for x ≤ 0."""
    # The next term, x^9 / 9!, is 2^-26 of the sum at x = −1/2; beyond, exp(x) − 1 loses a bit and a half.
    series = 1 + x * (
        1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))))
    )
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def _clamp(token, vocab):
    """A token outside [0, V), which check_tokens reports, must not become an address."""
    return tl.minimum(tl.maximum(token, 0), vocab - 1).to(tl.int32)


@triton.jit
def _activate(x, bias_ptr, columns, mask, inner, SOFTCAP: tl.constexpr):
    """y of z = scale·y, and dy/dx up to a constant: y = x + bias, or tanh((x + bias) / softcap) and 1 − tanh²."""
    y = x.to(tl.float32)
    slope = 1.0
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP:
        u = y * inner
        w = tl.exp(-2.0 * tl.abs(u))
        y = _expm1(-2.0 * tl.abs(u)) / (1.0 + w)
        y = tl.where(u < 0.0, y, -y)
        slope = 4.0 * w / ((1.0 + w) * (1.0 + w))
    return y, slope


@triton.jit
def _sum_others(
    x_ptr,  # the row
    column_stride,
    bias_ptr,
    e_ptr,  # the row of E, or None; may lie on the row of logits
    token,
    vocab,
    inner,
    scale,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """anchor, gap and others: with z in bits, gap = z[a] − anchor and others = Σ_{j≠a} 2^(z[j] − anchor).

    Stores E[j] = 2^(z[j] − anchor)·slope[j] and E[a] = −others·slope[a] where e_ptr is given.
    """
    bits = scale * LOG2_E
    block = tl.arange(0, BLOCK_V)
    x = tl.load(x_ptr + block.to(tl.int64) * column_stride, mask=block < vocab, other=0.0).to(tl.float32)
    # With other=-inf above, x would be a mere conversion, which LLVM joins with the one at the end of the loop into one
    # at its start, and carries packed halves from round to round: an instruction more for every 16-bit logit.
    x = tl.where(block < vocab, x, -float("inf"))
    own_x = tl.load(x_ptr + token.to(tl.int64) * column_stride).to(tl.float32)
    own, own_slope = _activate(own_x, bias_ptr, token, token < vocab, inner, SOFTCAP)
    anchor = tl.maximum(own * bits, FLOAT32_MIN)  # −inf − −inf would be NaN
    sums = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab, BLOCK_V):
        columns = start + block
        ahead = columns + BLOCK_V
        x_ahead = tl.load(x_ptr + ahead.to(tl.int64) * column_stride, mask=ahead < vocab, other=-float("inf"))
        y, slope = _activate(x, bias_ptr, columns, columns < vocab, inner, SOFTCAP)
        if SOFTCAP:
            y = tl.where(columns < vocab, y, -float("inf"))
        top = tl.max(y) * bits
        if e_ptr is not None:
            # E may lie on the logits, and in bfloat16 on other threads' logits: of this block at start = 0, of blocks
            # before this one later. Every thread has read those, and the token's, once it arrives here.
            tl.debug_barrier()
        if top - anchor > RAISE_BITS:
            shrink = tl.exp2(anchor - top)
            sums *= shrink
            if e_ptr is not None:
                half = tl.arange(0, BLOCK_V // 2)  # a whole block would cost registers
                for stored in range(0, start, BLOCK_V // 2):
                    e = tl.load(e_ptr + stored + half)
                    tl.store(e_ptr + stored + half, (e.to(tl.float32) * shrink).to(e_ptr.dtype.element_ty))
            anchor = top
        e = tl.exp2(tl.fma(y, bits, -anchor))
        if (token >= start) & (token < start + BLOCK_V):
            e = tl.where(columns == token, 0.0, e)
        sums += e
        if e_ptr is not None:
            tl.store(e_ptr + columns, (e * slope).to(e_ptr.dtype.element_ty), mask=columns < vocab)
        x = x_ahead.to(tl.float32)
    others = tl.sum(sums)
    if e_ptr is not None:
        tl.debug_barrier()  # after the 0 that its block left there
        tl.store(e_ptr + token, (-others * own_slope).to(e_ptr.dtype.element_ty))
    return anchor, tl.fma(own, bits, -anchor), others


@triton.jit
def _finish(gap, others):
    """log π(a), in nats, and the sum of all 2^(z − anchor)."""
    total = tl.exp2(gap) + others
    # Where the anchor was not raised, the gap is the anchor's rounding and no more.
    near = -_log1p(others * tl.exp2(-tl.maximum(gap, -1.0)))
    return tl.where(gap > -1.0, near, gap * LN_2 - tl.log(total)), total


# Bytes: 4NV read, 4NV written (2NV for E in bfloat16). About 6 float32 operations and an exponential a logit.
@triton.jit
def _target_softmax_kernel(
    logits_ptr,  # (n, V) float32
    e_ptr,  # (n, V) float32 or bfloat16; may lie on the logits, row by row
    tokens_ptr,  # (n,) int64
    valid_ptr,  # (n,) bool, or None
    bias_ptr,  # (V,), or None
    logprobs_ptr,  # (n,) float32
    total_ptr,  # (n,) float32
    vocab,
    row_stride,
    e_row_stride,
    inner,  # 1 / softcap
    scale,  # 1 / temperature, or softcap / temperature
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    e_row_ptr = e_ptr + row.to(tl.int64) * e_row_stride
    if valid_ptr is not None and not tl.load(valid_ptr + row):
        zeros = tl.zeros([BLOCK_V], e_ptr.dtype.element_ty)
        for start in range(0, vocab, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            tl.store(e_row_ptr + columns, zeros, mask=columns < vocab)
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(total_ptr + row, 1.0)
        return
    token = _clamp(tl.load(tokens_ptr + row), vocab)
    x_ptr = logits_ptr + row.to(tl.int64) * row_stride
    _, gap, others = _sum_others(x_ptr, 1, bias_ptr, e_row_ptr, token, vocab, inner, scale, SOFTCAP, BLOCK_V)
    logprob, total = _finish(gap, others)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(total_ptr + row, total)


@triton.jit
def _row_start(row, inner_rows, outer_stride, inner_stride):
    """Where row (i, j) of logits (…, inner_rows, V) starts: the leading dimensions are two at most."""
    return (row // inner_rows).to(tl.int64) * outer_stride + (row % inner_rows).to(tl.int64) * inner_stride


# Bytes: NV read, of logits and of reference logits. About 5 float32 operations and an exponential a logit.
@triton.jit(do_not_specialize=["inner_rows"])  # a new sequence length compiles nothing
def _logprobs_kernel(
    logits_ptr,  # (outer, inner, V) float32, bfloat16 or float16
    ref_logits_ptr,  # (outer, inner, V), or None
    tokens_ptr,  # (N,) int64
    valid_ptr,  # (N,) bool, or None
    bias_ptr,  # (V,), or None
    logprobs_ptr,  # (N,) float32
    ref_logprobs_ptr,  # (N,) float32
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    column_stride,
    ref_outer_stride,
    ref_inner_stride,
    ref_column_stride,
    inner,
    scale,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    if valid_ptr is not None and not tl.load(valid_ptr + row):
        tl.store(logprobs_ptr + row, 0.0)
        return
    token = _clamp(tl.load(tokens_ptr + row), vocab)
    x_ptr = logits_ptr + _row_start(row, inner_rows, outer_stride, inner_stride)
    _, gap, others = _sum_others(x_ptr, column_stride, bias_ptr, None, token, vocab, inner, scale, SOFTCAP, BLOCK_V)
    tl.store(logprobs_ptr + row, _finish(gap, others)[0])
    if ref_logits_ptr is not None:
        x_ptr = ref_logits_ptr + _row_start(row, inner_rows, ref_outer_stride, ref_inner_stride)
        _, gap, others = _sum_others(
            x_ptr, ref_column_stride, bias_ptr, None, token, vocab, inner, scale, SOFTCAP, BLOCK_V
        )
        tl.store(ref_logprobs_ptr + row, _finish(gap, others)[0])


# Bytes: NV read, NV written, of as many bits as the logits. About 4 float32 operations and an exponential a logit.
@triton.jit(do_not_specialize=["inner_rows"])  # a new sequence length compiles nothing
def _logprobs_backward_kernel(
    grad_ptr,  # (N,) float32
    logits_ptr,  # (outer, inner, V)
    gradient_ptr,  # (outer, inner, V); may be the logits
    tokens_ptr,  # (N,) int64
    logprobs_ptr,  # (N,) float32
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    column_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    gradient_column_stride,
    scale,  # 1 / temperature
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    token = _clamp(tl.load(tokens_ptr + row), vocab)
    factor = tl.load(grad_ptr + row) * scale
    logprob = tl.load(logprobs_ptr + row)
    x_ptr = logits_ptr + _row_start(row, inner_rows, outer_stride, inner_stride)
    out_ptr = gradient_ptr + _row_start(row, inner_rows, gradient_outer_stride, gradient_inner_stride)
    # π(j) = exp(z[j] − z[a] + log π(a)); where π(a) is 0, from the sum over the others instead.
    bits = scale * LOG2_E
    anchor = tl.load(x_ptr + token.to(tl.int64) * column_stride).to(tl.float32)
    offset = logprob * LOG2_E
    if logprob == -float("inf"):
        top, _, others = _sum_others(x_ptr, column_stride, None, None, token, vocab, 1.0, scale, False, BLOCK_V)
        anchor = 0.0
        offset = -top - tl.log2(others)
    tl.debug_barrier()  # every thread has read the token's logit, on which the gradient may be written
    for start in range(0, vocab, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        mask = columns < vocab
        x = tl.load(x_ptr + columns.to(tl.int64) * column_stride, mask=mask, other=-float("inf")).to(tl.float32)
        gradient = tl.exp2(tl.fma(x - anchor, bits, offset)) * -factor
        out = out_ptr + columns.to(tl.int64) * gradient_column_stride
        tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # after the −π(a) that its block left there
    own = -_expm1(logprob) * factor  # 1 − π(a)
    tl.store(out_ptr + token.to(tl.int64) * gradient_column_stride, own.to(out_ptr.dtype.element_ty))


def launch_options(vocab: int, per_thread: int = 8) -> dict[str, int | bool]:
    """How a kernel of this file is compiled and launched for rows of this length and so many logits a thread."""
    block = min(MAX_THREADS * per_thread, max(32, triton.next_power_of_2(vocab)))
    # Without fused multiply-adds of the compiler's choosing the same row gives the same bits in every kernel.
    return {"BLOCK_V": block, "num_warps": max(1, block // (32 * per_thread)), "enable_fp_fusion": False}


def _logits_per_thread(*rows: Tensor) -> int:
    """How many logits a thread works on at a time: 16 where they are bfloat16 and can be read as vectors."""
    for each in rows:  # (outer, inner, V)
        places = (each.data_ptr(), each.shape[2], *each.stride()[:2])
        aligned = each.stride(2) == 1 and all(n % 16 == 0 for n in places)
        if each.dtype != torch.bfloat16 or not aligned:
            return 8
    return 16


def target_softmax_(
    logits: Tensor,  # (n, V) float32, the last dimension contiguous; overwritten
    tokens: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    valid: Tensor | None = None,  # (n,) bool
    dtype: torch.dtype = torch.float32,  # of E: float32 or bfloat16
) -> tuple[Tensor, Tensor, Tensor]:  # (n, V), (n,), (n,)
    """Turns each row x of logits into E in place; returns E, log π(a) and total, where a is the row's token.

    z = softcap(x + bias) / temperature, and A is an anchor for which no exp(z[j] − A) is beyond 2^60.
    E[j] = exp(z[j] − A) and E[a] = −S with S = Σ_{j≠a} exp(z[j] − A); total = exp(z[a] − A) + S. The gradient of
    log π(a) with respect to z is −E / total. With softcap E is multiplied by 1 − tanh², S and total are not: then
    −E / total is the gradient with respect to (x + bias) / temperature.
    E in bfloat16 lies in the front half of each row: a view (n, V) with a row stride of 2V.
    A row that is not valid is never read; its E is 0, its log π(a) 0 and its total 1. A token outside [0, V) gives
    no error here and a meaningless row.
    """
    rows, vocab = logits.shape
    plain = bias is None and softcap is None
    e = logits if dtype == torch.float32 else logits.view(dtype)[:, :vocab]
    logprobs, total = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows:
        with torch.cuda.device_of(logits):
            _target_softmax_kernel[(rows,)](
                logits,
                e,
                tokens.contiguous(),
                None if valid is None else valid.contiguous(),
                None if bias is None else bias.contiguous(),
                logprobs,
                total,
                vocab,
                logits.stride(0),
                e.stride(0),
                **_head_numbers(temperature, softcap),
                **launch_options(vocab),
                # Left alone, ptxas fits a plain pass into 64 registers, and some others too, at the price of spills.
                maxnreg=None if plain and vocab % 16 == logits.stride(0) % 16 == 0 else 128,
            )
    return e, logprobs, total


def target_logprobs(
    logits: Tensor,  # (n, V)
    tokens: Tensor,  # (n,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    valid: Tensor | None = None,  # (n,) bool
) -> Tensor:  # (n,)
    """The log π(a) of `target_softmax_`, to the bit, from logits that stay as they are."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            _logprobs_kernel[(rows,)](
                logits,
                None,
                tokens.contiguous(),
                None if valid is None else valid.contiguous(),
                None if bias is None else bias.contiguous(),
                out,
                out,
                vocab,
                1,
                *(logits.stride(0), 0, logits.stride(1)),
                *(0, 0, 0),
                **_head_numbers(temperature, softcap),
                **launch_options(vocab),
                maxnreg=64 if bias is None and softcap is None else 128,
            )
    return out


def logprobs(
    logits: Tensor,  # (…, V)
    ref_logits: Tensor | None,  # (…, V)
    tokens: Tensor,  # (…) int64
    *,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (…), (…) or (0,)
    """log π(a) from logits and, where given, from reference logits, read where they lie whatever their strides."""
    out = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    ref_out = torch.empty(tokens.shape if ref_logits is not None else 0, dtype=torch.float32, device=logits.device)
    flat_tokens, flat_out, flat_ref_out = tokens.contiguous().view(-1), out.view(-1), ref_out.view(-1)
    with torch.cuda.device_of(logits):
        for rows, (x, *refs) in _strided_rows(*(each for each in (logits, ref_logits) if each is not None)):
            ref = refs[0] if refs else None
            _logprobs_kernel[(rows.stop - rows.start,)](
                x,
                ref,
                flat_tokens[rows],
                None,
                None,
                flat_out[rows],
                flat_ref_out[rows] if refs else flat_out,
                x.shape[2],
                x.shape[1],
                *x.stride(),
                *((0, 0, 0) if ref is None else ref.stride()),
                **_head_numbers(temperature, None),
                **launch_options(x.shape[2], _logits_per_thread(x, *refs)),
                maxnreg=64,
            )
    return out, ref_out


def logprobs_backward_(
    grad: Tensor,  # (…) of log π(a)
    logits: Tensor,  # (…, V)
    tokens: Tensor,  # (…) int64
    logprobs: Tensor,  # (…)
    gradient: Tensor,  # (…, V), overwritten; may be logits
    *,
    temperature: float = 1.0,
) -> None:
    """gradient = ∂(Σ grad · log π(a)) / ∂logits."""
    flat_grad, flat_tokens, flat_logprobs = (each.contiguous().view(-1) for each in (grad, tokens, logprobs))
    with torch.cuda.device_of(logits):
        for rows, (x, out) in _strided_rows(logits, gradient):
            _logprobs_backward_kernel[(rows.stop - rows.start,)](
                flat_grad[rows],
                x,
                out,
                flat_tokens[rows],
                flat_logprobs[rows],
                x.shape[2],
                x.shape[1],
                *x.stride(),
                *out.stride(),
                1 / temperature,
                **launch_options(x.shape[2], _logits_per_thread(x, out)),
                maxnreg=64,
            )


def _head_numbers(temperature: float, softcap: float | None) -> dict[str, float | bool]:
    if softcap is None:
        return {"inner": 1.0, "scale": 1 / temperature, "SOFTCAP": False}
    return {"inner": 1 / softcap, "scale": softcap / temperature, "SOFTCAP": True}


def _strided_rows(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Tensors (…, V) with the same leading shape as views (outer, inner, V), and which of the flattened rows they are.

    Leading dimensions are merged where every tensor's strides allow it. Where more than two remain, there is a view
    for each index of the others.
    """
    dims: list[tuple[int, list[int]]] = []
    for dim, size in enumerate(tensors[0].shape[:-1]):
        strides = [tensor.stride(dim) for tensor in tensors]
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (size * dims[-1][0], strides)
        else:
            dims.append((size, strides))
    dims = [(1, [0] * len(tensors))] * (2 - len(dims)) + dims
    *others, (outer, outer_strides), (inner, inner_strides) = dims
    for step, index in enumerate(product(*(range(size) for size, _ in others))):
        views = []
        for i, tensor in enumerate(tensors):
            start = sum(
                (at * strides[i] for at, (_, strides) in zip(index, others, strict=True)), tensor.storage_offset()
            )
            shape = outer, inner, tensor.shape[-1]
            views.append(tensor.as_strided(shape, (outer_strides[i], inner_strides[i], tensor.stride(-1)), start))
        rows = outer * inner
        if rows:
            yield slice(step * rows, (step + 1) * rows), views
