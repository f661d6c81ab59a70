"""Triton kernels of the KLQ loss: the loss and its metrics from log-probs in two launches, its gradients in one.

Sums over the tokens are made without atomics, in an order that only their number decides: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens per program; a million tokens are 977 programs and as many columns of partial sums
BLOCK_PARTIALS = 128
NUM_METRICS = 6
NUM_PARTIALS = 13  # rows of the partial sums, in the order in which _klq_loss_kernel writes them


@triton.jit
def _residuals(
    logprobs_ptr, ref_logprobs_ptr, values_ptr, returns_ptr, mask_ptr, tau, num_slots, offsets
):  # the slots that count, log π, log π − log π_ref, V, G, Q − G; 0 where a slot does not count
    valid = offsets < num_slots
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + offsets, mask=valid, other=0) != 0
    logprobs = tl.load(logprobs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    ref_logprobs = tl.load(ref_logprobs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    values = tl.load(values_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    returns = tl.load(returns_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    log_ratio = logprobs - ref_logprobs
    return valid, logprobs, log_ratio, values, returns, tau * log_ratio + values - returns


@triton.jit
def _moments(x, valid, inverse_count):
    """A shift near the mean of x, and the sums of x − shift and of its square, over the valid entries.

    The variance of numbers near 1000 that differ by 0.01 is 1e-10 of their squares: a sum of squares would lose it.
    """
    shift = tl.sum(x, axis=0) * inverse_count
    x = tl.where(valid, x - shift, 0.0)
    return shift, tl.sum(x, axis=0), tl.sum(x * x, axis=0)


# Reads 16 bytes (float32) and a byte of mask per slot, writes 4 and 52 bytes per 1024 slots; some 30 operations a slot.
# tau is float32 and num_slots is not specialised: neither a new number nor a new length compiles anything.
@triton.jit(do_not_specialize=["num_slots"])
def _klq_loss_kernel(
    logprobs_ptr,  # (num_slots,), as ref_logprobs, values and returns; any floating-point dtype each
    ref_logprobs_ptr,
    values_ptr,
    returns_ptr,
    mask_ptr,  # (num_slots,) bool, or None
    valid_logprobs_ptr,  # (num_slots,) float32
    partials_ptr,  # (NUM_PARTIALS, number of programs) float32
    tau,
    num_slots,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    offsets = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid, logprobs, log_ratio, values, returns, residuals = _residuals(
        logprobs_ptr, ref_logprobs_ptr, values_ptr, returns_ptr, mask_ptr, tau, num_slots, offsets
    )
    tl.store(valid_logprobs_ptr + offsets, logprobs, mask=offsets < num_slots)

    count = tl.sum(valid.to(tl.float32), axis=0)
    inverse_count = 1.0 / tl.maximum(count, 1.0)
    value_errors = values - returns
    residual_shift, residual_sum, residual_squares = _moments(residuals, valid, inverse_count)
    return_shift, return_sum, return_squares = _moments(returns, valid, inverse_count)
    columns = tl.num_programs(0)
    out = partials_ptr + program
    tl.store(out, count)
    tl.store(out + columns, tl.sum(residuals * residuals, axis=0))
    tl.store(out + 2 * columns, tl.sum(log_ratio, axis=0))
    tl.store(out + 3 * columns, tl.sum(value_errors * value_errors, axis=0))
    tl.store(out + 4 * columns, tl.sum(values, axis=0))
    tl.store(out + 5 * columns, residual_shift)
    tl.store(out + 6 * columns, residual_sum)
    tl.store(out + 7 * columns, residual_squares)
    tl.store(out + 8 * columns, return_shift)
    tl.store(out + 9 * columns, return_sum)
    tl.store(out + 10 * columns, return_squares)
    tl.store(out + 11 * columns, tl.min(tl.where(valid, returns, float("inf")), axis=0))
    tl.store(out + 12 * columns, tl.max(tl.where(valid, returns, float("-inf")), axis=0))


@triton.jit
def _merge_moments(partials_ptr, columns, offsets, inside, counts, origin):
    """Of a few blocks: the sums of x − origin and of its square (Chan, Golub and LeVeque 1983), in float64."""
    shift = tl.load(partials_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
    total = tl.load(partials_ptr + columns + offsets, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(partials_ptr + 2 * columns + offsets, mask=inside, other=0.0).to(tl.float64)
    shift = tl.where(counts > 0, shift - origin, 0.0)
    return total + counts * shift, squares + shift * (2 * total + counts * shift)


# One program; float64 throughout, as a few thousand numbers cost nothing and nothing is then lost in merging them.
@triton.jit(do_not_specialize=["columns"])
def _klq_loss_metrics_kernel(
    partials_ptr,  # (NUM_PARTIALS, columns) float32
    num_tokens_ptr,  # () integer or float, or None
    loss_ptr,  # () float32
    inverse_count_ptr,  # () float32
    metrics_ptr,  # (6,) float32: td_error, kl, explained_variance, value_error, values, returns
    columns,
    BLOCK: tl.constexpr,
):
    count = tl.zeros([BLOCK], tl.float64)
    loss = tl.zeros([BLOCK], tl.float64)
    log_ratio = tl.zeros([BLOCK], tl.float64)
    value_errors = tl.zeros([BLOCK], tl.float64)
    values = tl.zeros([BLOCK], tl.float64)
    residual_sum = tl.zeros([BLOCK], tl.float64)
    residual_squares = tl.zeros([BLOCK], tl.float64)
    return_sum = tl.zeros([BLOCK], tl.float64)
    return_squares = tl.zeros([BLOCK], tl.float64)
    lowest_return = tl.full([BLOCK], float("inf"), tl.float32)
    highest_return = tl.full([BLOCK], float("-inf"), tl.float32)
    # Moments are merged about the shift of the first block with a valid token; an empty block's, 0, may be far away.
    first = columns
    residual_origin = tl.zeros([], tl.float64)
    return_origin = tl.zeros([], tl.float64)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        counts = tl.load(partials_ptr + offsets, mask=inside, other=0.0).to(tl.float64)
        first = tl.minimum(first, tl.min(tl.where(counts > 0, offsets, columns), axis=0))
        found = first < columns  # until then the sums are 0 about any origin
        residual_origin = tl.load(partials_ptr + 5 * columns + first, mask=found, other=0.0).to(tl.float64)
        return_origin = tl.load(partials_ptr + 8 * columns + first, mask=found, other=0.0).to(tl.float64)
        count += counts
        loss += tl.load(partials_ptr + columns + offsets, mask=inside, other=0.0).to(tl.float64)
        log_ratio += tl.load(partials_ptr + 2 * columns + offsets, mask=inside, other=0.0).to(tl.float64)
        value_errors += tl.load(partials_ptr + 3 * columns + offsets, mask=inside, other=0.0).to(tl.float64)
        values += tl.load(partials_ptr + 4 * columns + offsets, mask=inside, other=0.0).to(tl.float64)
        total, squares = _merge_moments(partials_ptr + 5 * columns, columns, offsets, inside, counts, residual_origin)
        residual_sum += total
        residual_squares += squares
        total, squares = _merge_moments(partials_ptr + 8 * columns, columns, offsets, inside, counts, return_origin)
        return_sum += total
        return_squares += squares
        lowest = tl.load(partials_ptr + 11 * columns + offsets, mask=inside, other=float("inf"))
        highest = tl.load(partials_ptr + 12 * columns + offsets, mask=inside, other=float("-inf"))
        lowest_return = tl.minimum(lowest_return, lowest)
        highest_return = tl.maximum(highest_return, highest)

    num_valid = tl.sum(count, axis=0)
    if num_tokens_ptr is None:
        num_tokens = num_valid
    else:
        num_tokens = tl.load(num_tokens_ptr).to(tl.float64)
    inverse_count = tl.where(num_tokens == 0, 0.0, 1.0 / tl.where(num_tokens == 0, 1.0, num_tokens))
    tl.store(inverse_count_ptr, inverse_count.to(tl.float32))
    tl.store(loss_ptr, (tl.sum(loss, axis=0) * inverse_count).to(tl.float32))

    some = num_valid > 0
    num_valid = tl.where(some, num_valid, 1.0)
    inverse_valid = 1.0 / num_valid
    residual_total, return_total = tl.sum(residual_sum, axis=0), tl.sum(return_sum, axis=0)
    td_error = tl.where(some, -(residual_total * inverse_valid + residual_origin), 0.0)
    returns = tl.where(some, return_total * inverse_valid + return_origin, 0.0)
    # Sums of squared deviations. A constant's is 0 as long as float64 holds (number of tokens · a few units in the last
    # place)² exactly, up to some 10^7 tokens. That of a spread below 1e-23 is 0 too, as float32 holds no such squares.
    residual_variation = tl.sum(residual_squares, axis=0) - residual_total * residual_total / num_valid
    return_variation = tl.sum(return_squares, axis=0) - return_total * return_total / num_valid
    varies = (tl.max(highest_return, axis=0) > tl.min(lowest_return, axis=0)) & (return_variation > 0)
    explained = tl.where(varies, 1.0 - residual_variation / tl.where(varies, return_variation, 1.0), 0.0)
    tl.store(metrics_ptr, td_error.to(tl.float32))
    tl.store(metrics_ptr + 1, (tl.sum(log_ratio, axis=0) * inverse_valid).to(tl.float32))
    tl.store(metrics_ptr + 2, explained.to(tl.float32))
    tl.store(metrics_ptr + 3, (tl.sum(value_errors, axis=0) * inverse_valid).to(tl.float32))
    tl.store(metrics_ptr + 4, (tl.sum(values, axis=0) * inverse_valid).to(tl.float32))
    tl.store(metrics_ptr + 5, returns.to(tl.float32))


# Reads 16 bytes (float32) and a byte of mask per slot and writes 8: computing Q − G again costs less than keeping it.
@triton.jit(do_not_specialize=["num_slots"])
def _klq_loss_gradients_kernel(
    logprobs_ptr,  # (num_slots,), as ref_logprobs, values and returns; any floating-point dtype each
    ref_logprobs_ptr,
    values_ptr,
    returns_ptr,
    mask_ptr,  # (num_slots,) bool, or None
    inverse_count_ptr,  # () float32
    grad_ptr,  # () float32, or None for 1
    policy_gradient_ptr,  # (num_slots,)
    value_gradient_ptr,  # (num_slots,)
    tau,
    policy_weight,
    value_weight,
    num_slots,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid, _, _, _, _, residuals = _residuals(
        logprobs_ptr, ref_logprobs_ptr, values_ptr, returns_ptr, mask_ptr, tau, num_slots, offsets
    )
    scale = 2.0 * tl.load(inverse_count_ptr)
    if grad_ptr is not None:
        scale *= tl.load(grad_ptr)
    gradient = tl.where(valid, residuals * scale, 0.0)  # 0 also where grad is inf or NaN
    inside = offsets < num_slots
    tl.store(policy_gradient_ptr + offsets, gradient * (tau * policy_weight), mask=inside)
    tl.store(value_gradient_ptr + offsets, gradient * value_weight, mask=inside)


def klq_loss(
    logprobs: Tensor,  # (…), as the next three
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,  # (…) bool
    num_tokens: Tensor | None,  # ()
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (), (…), (6,), ()
    """The loss, log π with 0 in the invalid slots, the metrics, and 1 / number of tokens (0 for 1 / 0)."""
    columns = triton.cdiv(logprobs.numel(), BLOCK)
    valid_logprobs, partials, loss, metrics, inverse_count = (
        torch.empty(shape, dtype=torch.float32, device=logprobs.device)
        for shape in (logprobs.shape, (NUM_PARTIALS, columns), (), (NUM_METRICS,), ())
    )
    with torch.cuda.device_of(logprobs):
        _klq_loss_kernel[(columns,)](
            *_contiguous(logprobs, ref_logprobs, values, returns, mask),
            valid_logprobs,
            partials,
            tau,
            logprobs.numel(),
            BLOCK=BLOCK,
        )
        num_tokens = None if num_tokens is None else num_tokens.to(logprobs.device)
        _klq_loss_metrics_kernel[(1,)](
            partials, num_tokens, loss, inverse_count, metrics, columns, BLOCK=BLOCK_PARTIALS
        )
    return loss, valid_logprobs, metrics, inverse_count


def klq_loss_gradients(
    grad: Tensor | None,  # () float32; None for 1
    inverse_count: Tensor,  # () float32
    logprobs: Tensor,  # (…), as the next three
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,  # (…) bool
    tau: float,
    policy_weight: float,
    value_weight: float,
) -> tuple[Tensor, Tensor]:  # (…), (…)
    """The gradients for log π and V, in their dtypes; 0 in the invalid slots."""
    policy_gradient, value_gradient = (
        torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (logprobs, values)
    )
    with torch.cuda.device_of(logprobs):
        _klq_loss_gradients_kernel[(triton.cdiv(logprobs.numel(), BLOCK),)](
            *_contiguous(logprobs, ref_logprobs, values, returns, mask),
            inverse_count,
            grad,
            policy_gradient,
            value_gradient,
            tau,
            policy_weight,
            value_weight,
            logprobs.numel(),
            BLOCK=BLOCK,
        )
    return policy_gradient, value_gradient


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else each.contiguous() for each in tensors)
