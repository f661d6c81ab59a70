"""λ-returns and GAE in one launch: a program walks its row or packed sequence in blocks, from the end to the start.

Tokens lie in a block in reverse order, so that the recurrence is an inclusive forward scan. Triton scans 32 tokens at a
time, in the lanes of a warp, and chains these from left to right: x + a·c, with c from the 32 before. Blocks after a
row's first begin with 32 slots that hold the carry, so the chain runs on through them and, the groups of 32 being
counted from the row's start, every token goes through the same operations whatever the block and whatever follows it:
packed equals padded bitwise, and a row is the same in any batch.

In float64, whatever comes in. So λγ and its powers are as good as exact, where in float32 λγ = 0.999 alone is off by
3e-8, 1/(1 − λγ) times as much in Δ; and each number is the recurrence's rounded once, at λγ = 1 over 32768 tokens too.

Bytes: 12 a token read (ℓ, V, r in float32), 16 written. 512×1024 is 14.7 MB: 3.1 µs at an H200's 4.8 TB/s, less where
the inputs lie in its 50 MB of L2. A block of 1024 is 4 warps of 1184 instructions (sm_90), 3.9 such rows on each of 132
multiprocessors at least 1184 · 3.9 cycles, 2.6 µs, beside the loads and stores of other rows. Not measured yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .statistics import STATISTICS

# By the mean length of the rows: up to 256, up to 1024, above. Left to itself, ptxas spills a register of the one warp
# rather than use more than 72 (sm_90).
SHORT = {"BLOCK": 128, "num_warps": 1, "maxnreg": 96}
SHORT_WITH_STATISTICS = SHORT | {"maxnreg": 128}
MIDDLE = {"BLOCK": 1024, "num_warps": 4}
LONG = {"BLOCK": 2048, "num_warps": 8}


@triton.jit
def _compose(later_a, later_x, a, x):
    """c ↦ a·(later_a·c + later_x) + x"""
    return a * later_a, x + a * later_x


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _load(ptr, index, inside):
    """In float64, by way of float32, in which every implementation reads its arguments."""
    return tl.load(ptr + index, mask=inside, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def _add_moments(x, valid, added, count, total, squares):
    """Adds a block's sum, and its squared differences from the mean, to those of the `count` numbers before it."""
    block_total = tl.sum(tl.where(valid, x, 0.0))
    mean = block_total / tl.maximum(added, 1).to(tl.float64)
    shift = mean - total / tl.maximum(count, 1).to(tl.float64)
    share = count.to(tl.float64) * added.to(tl.float64) / tl.maximum(count + added, 1).to(tl.float64)
    difference = tl.where(valid, x - mean, 0.0)
    return total + block_total, squares + tl.sum(difference * difference) + shift * shift * share


# A loaded token is 4 bytes whatever its address: loads in reverse order are not joined into wider ones.
@triton.jit(
    do_not_specialize=["width", "log_ratio_stride", "values_stride", "rewards_stride", "mask_stride"],
    do_not_specialize_on_alignment=[
        "log_ratio_ptr",
        "values_ptr",
        "rewards_ptr",
        "mask_ptr",
        "bootstrap_ptr",
        "cu_seqlens_ptr",
    ],
)
def _lambda_returns_kernel(
    log_ratio_ptr,  # (B, T), or (N,) with cu_seqlens; None: GAE, where Q = V
    values_ptr,  # like log_ratio
    rewards_ptr,  # like log_ratio, or (B,) / (S,)
    mask_ptr,  # uint8 like log_ratio, or None
    bootstrap_ptr,  # (B,) / (S,), or None
    cu_seqlens_ptr,  # (S + 1,), or None
    results_ptr,  # (4, N) float32: G, Δ, Q, δ; without log_ratio (2, N)
    statistics_ptr,  # (B or S, STATISTICS) float64, or None; with log_ratio only
    width,  # T, or N with cu_seqlens
    log_ratio_stride,  # from row to row; 1 with cu_seqlens
    values_stride,
    rewards_stride,
    mask_stride,
    tau: tl.float64,
    gamma: tl.float64,
    decay: tl.float64,  # λγ
    alpha: tl.float64,
    PER_TOKEN: tl.constexpr,  # rewards
    STATISTICS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        start, length = row, width
        results_ptr += row * width
        plane = tl.num_programs(0).to(tl.int64) * width
    else:
        # The host asserts that the offsets rise from 0 to N; until it hears of others they must not become addresses.
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row), 0), width).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + row + 1), width)
        length = (end - start).to(tl.int32)
        results_ptr += start
        plane = tl.cast(width, tl.int64)
    values_ptr += start * values_stride
    if log_ratio_ptr is not None:
        log_ratio_ptr += start * log_ratio_stride
    if mask_ptr is not None:
        mask_ptr += start * mask_stride
    if PER_TOKEN:
        rewards_ptr += start * rewards_stride
    else:
        score = tl.load(rewards_ptr + row).to(tl.float32).to(tl.float64)
    end_value = 0.0
    if bootstrap_ptr is not None:
        end_value = tl.load(bootstrap_ptr + row).to(tl.float32).to(tl.float64)

    back = tl.arange(0, BLOCK)
    carry = tl.zeros([], tl.float64)  # Δ of the token to the right of a block
    following = length  # the first valid token to the right; `length` where there is none
    count = 0
    td_sum, ratio_sum, error_sum, error_squares = carry, carry, carry, carry
    target_sum, target_squares = carry, carry

    high = tl.cdiv(length, 32) * 32
    lead = 0  # slots before the block's first token, of which the last holds the carry
    while high > 0:
        t = high - 1 - (back - lead)
        inside = (t >= 0) & (t < tl.minimum(high, length))
        V = _load(values_ptr, t, inside)
        if mask_ptr is None:
            valid = inside
            next_t = t + 1
        else:
            valid = tl.load(mask_ptr + t, mask=inside, other=0) != 0
            is_next = tl.load(mask_ptr + t + 1, mask=inside & (t + 1 < length), other=0) != 0
            next_t = tl.associative_scan(tl.where(is_next, t + 1, following), 0, _smaller)
            following = tl.min(tl.where(valid, t, following))
        is_last = next_t >= length
        next_V = tl.where(is_last, end_value, _load(values_ptr, next_t, valid & (next_t < length)))
        td_error = gamma * next_V - V
        Q = V
        if log_ratio_ptr is not None:
            log_ratio = _load(log_ratio_ptr, t, inside)
            td_error -= tau * log_ratio
            Q += tau * log_ratio
        if PER_TOKEN:
            td_error += _load(rewards_ptr, t, inside)
        else:
            td_error += tl.where(is_last, score, 0.0)
        Q = tl.where(valid, Q, 0.0)
        td_error = tl.where(valid, td_error, 0.0)
        if statistics_ptr is not None:
            added = tl.sum(valid.to(tl.int32))
            td_sum += tl.sum(td_error)
            ratio_sum += tl.sum(tl.where(valid, log_ratio, 0.0))
        x = tl.where(back == lead - 1, carry, td_error)
        _, error = tl.associative_scan((tl.where(valid, decay, tl.full([], 1.0, tl.float64)), x), 0, _compose)
        carry = tl.sum(tl.where(back == BLOCK - 1, error, 0.0))
        error = tl.where(valid, error, 0.0)

        tl.store(results_ptr + t, Q + alpha * error, mask=inside)
        tl.store(results_ptr + plane + t, error, mask=inside)
        if log_ratio_ptr is not None:
            tl.store(results_ptr + 2 * plane + t, Q, mask=inside)
            tl.store(results_ptr + 3 * plane + t, td_error, mask=inside)
        if statistics_ptr is not None:
            error_sum, error_squares = _add_moments(error, valid, added, count, error_sum, error_squares)
            target_sum, target_squares = _add_moments(Q + error, valid, added, count, target_sum, target_squares)
            count += added
        high -= BLOCK - lead
        lead = 32

    if statistics_ptr is not None:
        statistics_ptr += row * STATISTICS
        tl.store(statistics_ptr, count)
        tl.store(statistics_ptr + 1, td_sum)
        tl.store(statistics_ptr + 2, ratio_sum)
        tl.store(statistics_ptr + 3, error_sum)
        tl.store(statistics_ptr + 4, target_sum)
        tl.store(statistics_ptr + 5, error_squares)
        tl.store(statistics_ptr + 6, target_squares)


def lambda_returns(
    log_ratio: Tensor | None,  # (B, T), or (N,) with cu_seqlens; None: GAE
    values: Tensor,  # like log_ratio
    rewards: Tensor,  # like log_ratio, or (B,) / (S,)
    mask: Tensor | None,  # bool, like log_ratio
    bootstrap: Tensor | None,  # (B,) / (S,)
    cu_seqlens: Tensor | None,  # int32 (S + 1,)
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
    metrics: bool,
) -> tuple[Tensor, Tensor]:
    """G, Δ and, with log_ratio, Q and δ, (4 or 2, N) float32; the rows' statistics, (rows, 7) float64, if asked for."""
    N, device = values.numel(), values.device
    rows = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    results = torch.empty(2 if log_ratio is None else 4, N, dtype=torch.float32, device=device)
    statistics = torch.empty(rows if metrics else 0, STATISTICS, dtype=torch.float64, device=device)
    if rows == 0:
        return results, statistics
    short = SHORT_WITH_STATISTICS if metrics else SHORT
    configuration = short if N <= 256 * rows else MIDDLE if N <= 1024 * rows else LONG
    per_token = rewards.shape == values.shape
    tensors = [
        x if x is None or x.stride(-1) == 1 else x.contiguous()
        for x in (log_ratio, values, rewards, None if mask is None else mask.view(torch.uint8), bootstrap, cu_seqlens)
    ]
    with torch.cuda.device_of(values):
        _lambda_returns_kernel[(rows,)](
            *tensors,
            results,
            statistics if metrics else None,
            N if cu_seqlens is not None else values.shape[1],
            *(0 if x is None else x.stride(0) for x in tensors[:4]),
            tau,
            gamma,
            lam * gamma,
            alpha,
            PER_TOKEN=per_token,
            STATISTICS=STATISTICS,
            **configuration,
        )
    return results, statistics
