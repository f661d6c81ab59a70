"""The λ-returns of op.py in PyTorch's own operations, without a loop over time.

Blocks of 16 tokens, anchored at each sequence's first valid token, are scanned by one matrix product with the Toeplitz
matrix of powers of λγ. What follows each block is found from the blocks' first elements, 1/16 of the data: groups of 64
of them go through another product, and the groups' first elements through the same again. Padded rows are blocks as
they lie in memory; packed sequences are copied to blocks and back; holes in a mask are first squeezed out, which leaves
packed sequences. A token's bits depend on its own sequence alone, so packed equals padded bitwise.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import compute_dtype

R = TypeVar("R")
Sequences = tuple[int, int] | Tensor  # rows and width, x[: rows · width]; or the offsets in x (S + 1,)

# Of 512×1024 fp32 on one core, the product takes 0.24 ms with blocks of 16, 0.39 with 32, 0.70 with 64.
BLOCK = 16
GROUP = 64  # blocks: rows of up to 1024 tokens need no third product


def _kept_on_cpu(function: Callable[..., R]) -> Callable[..., R]:
    """A cache of the last 32 results on the CPU; its last argument is the device.

    Elsewhere made each time, on the device: a CUDA graph that first needed them in its capture would own them, and they
    would hold nothing until its replay; nor may a capture copy them from the CPU.
    """
    kept = lru_cache(maxsize=32)(function)

    @wraps(function)
    def choose(*arguments: Any) -> R:
        return (kept if arguments[-1].type == "cpu" else function)(*arguments)

    return choose


def block_count(blocks: int) -> int:
    """Rows to give a product of more than that many, so that the bits of each depend on nothing but its contents.

    MKL multiplies by other routines, with other last bits, where a thread has few rows (below 12 seen) and for the last
    rows % 4 (in fp64). So: multiples of 64, and at least 256.
    """
    return max(256, (blocks // 64 + 1) * 64)


def lambda_returns(
    log_ratio: Tensor | None,  # (B, T), or (N,) with cu_seqlens; None: GAE, where Q = V
    values: Tensor,  # like log_ratio
    rewards: Tensor,  # like log_ratio, or (B,) / (S,)
    mask: Tensor | None,  # bool, like log_ratio
    bootstrap: Tensor | None,  # (B,) / (S,)
    cu_seqlens: Tensor | None,  # int32 (S + 1,)
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
) -> Tensor:
    """G, Δ, Q, δ: the first N = values.numel() slots of the four rows of one buffer, whose other slots are 0.

    One buffer, since glibc hands four freed blocks of 2 MB (512×1024) back to the system but keeps one of 8 MB, and
    2000 page faults cost up to 4 ms where the scan takes 1. The spare slots, at least 16, take what has no place: the
    last rewards of sequences without tokens, the ends of partly filled blocks. On CUDA nothing here waits for the
    device.
    """
    shape, device = values.shape, values.device
    N, dtype = values.numel(), compute_dtype(log_ratio, values)
    buffer = torch.empty(4, BLOCK * block_count(N // BLOCK), dtype=dtype, device=device)
    if N == 0:
        return buffer.zero_()
    per_token = rewards.shape == shape
    V, r = values.to(dtype).reshape(-1), rewards.to(dtype).reshape(-1)
    log_ratio = None if log_ratio is None else log_ratio.to(dtype).reshape(-1)
    bootstrap = None if bootstrap is None else bootstrap.to(dtype)

    # `last` is each sequence's last valid token, as a slice or (S,), N if it has none; `home` (N,) is where each token
    # goes when holes are squeezed out, N if it is one; `shortest` the number of columns that are valid in every row.
    work, home, offsets, shortest = buffer, None, None, N
    if cu_seqlens is None and (mask is None or (not mask.is_cuda and _right_padded(mask))):
        T = shape[1]
        last: slice | Tensor = slice(T - 1, N, T)
        if mask is not None:
            lengths = mask.view(torch.uint8).sum(1, dtype=torch.int32)
            last = torch.where(lengths > 0, torch.arange(-1, N - 1, T, device=device) + lengths, N)
            shortest = int(lengths.min())
    else:
        offsets = torch.arange(0, N + 1, shape[1], device=device) if cu_seqlens is None else cu_seqlens.long()
        if mask is not None:
            work = torch.empty_like(buffer)
            home, offsets = _squeeze(mask.reshape(-1), offsets)
            V = _move(V, home)
            log_ratio = None if log_ratio is None else _move(log_ratio, home)
            r = _move(r, home) if per_token else torch.cat([r, r.new_zeros(1)])
            bootstrap = None if bootstrap is None else torch.cat([bootstrap, bootstrap.new_zeros(1)])
        last = torch.where(offsets.diff() > 0, offsets[1:] - 1, N)

    returns, advantages, Q, _ = work[:, :N].unbind()
    _td_errors(log_ratio, V, r, bootstrap, last, per_token, tau, gamma, Q, work[3])
    if offsets is None and mask is not None and shortest < shape[1]:
        _zero_padding(work[:, :N].view(4, *shape), mask, shortest)
    scanned, exact = work[1], work[3]
    if device.type == "cuda":  # where a product in float32 may be TF32
        scanned, exact = torch.empty_like(exact, dtype=torch.float64), exact.double()
    if offsets is None:
        _scan(exact, (shape[0], shape[1]), shape[1], lam * gamma, out=scanned)
    else:
        _scan(exact, offsets, N if offsets.is_cuda else int(offsets.diff().max()), lam * gamma, out=scanned)
    if device.type == "cuda":
        advantages.copy_(scanned[:N])
    if alpha == 1.0:
        torch.add(Q, advantages, out=returns)
    else:
        torch.addcmul(Q, advantages, _scalar(alpha, dtype, device), out=returns)
    work[:, N:] = 0.0
    if home is not None:
        buffer[:, N:] = 0.0
        for source, result in zip(work.unbind(), buffer.unbind(), strict=True):
            torch.index_select(source, 0, home, out=result[:N])
    return buffer


def _td_errors(
    log_ratio: Tensor | None,  # (N,)
    V: Tensor,  # (N,)
    r: Tensor,  # (N,) or (S,)
    bootstrap: Tensor | None,  # (S,)
    last: slice | Tensor,  # (S,)
    per_token: bool,
    tau: float,
    gamma: float,
    Q: Tensor,  # (N,), written
    td_errors: Tensor,  # (N + spare,), written, with 0 in the spare slots
) -> None:
    """Q = τℓ + V and δ = γV' − V − τℓ + r.

    In this order, since with fp32 values near 10 and τℓ near 0.001, r + γV' − Q would lose the last 13 bits of τℓ, and
    at λγ = 1 the loss adds up over the sequence.
    """
    N = V.shape[0]
    valid, inner = td_errors[:N], td_errors[: N - 1]
    if gamma == 1.0:
        torch.sub(V[1:], V[:-1], out=inner)
    else:
        torch.mul(V[1:], gamma, out=inner).sub_(V[:-1])
    end_value = V[last if isinstance(last, slice) else last.clamp(max=N - 1)]
    td_errors[last] = -end_value if bootstrap is None else gamma * bootstrap - end_value
    if log_ratio is None:
        Q.copy_(V)
    else:
        torch.addcmul(V, log_ratio, _scalar(tau, V.dtype, V.device), out=Q)
        valid.addcmul_(log_ratio, _scalar(-tau, V.dtype, V.device))
    if per_token:
        valid.add_(r)  # `+=` of a slice would copy the result to itself: one more pass
    else:
        td_errors[last] += r
    td_errors[N:] = 0.0


@_kept_on_cpu
def _scalar(x: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A factor for addcmul, which multiplies and adds in one pass over memory."""
    return torch.full((), x, dtype=dtype, device=device)


def _zero_padding(work: Tensor, mask: Tensor, shortest: int) -> None:
    """Zeros Q and δ, rows 2 and 3 of work (4, B, T), where a right-padded mask is False; row 1 is scratch.

    By an AND with all ones or zeros: 0.05 ms for 512×1024 where `where` takes 0.3 to 1.2; and NaN & 0 = 0.
    """
    bits = work.view(torch.int64 if work.dtype == torch.float64 else torch.int32)[:, :, shortest:]
    bits[2:].bitwise_and_(bits[1].copy_(mask[:, shortest:].view(torch.int8).neg()))


def _scan(
    x: Tensor,  # (n,), of which the last is 0
    sequences: Sequences,
    longest: int,  # at least the length of any
    factor: float,
    out: Tensor,  # (n,)
) -> None:
    blocks, place, inner = _split(x, sequences, BLOCK)
    in_place = blocks.data_ptr() == x.data_ptr()
    matrix, weights = _powers(factor, BLOCK, 0, x.dtype, x.device)
    scanned = out.view(-1, BLOCK) if in_place else torch.empty_like(blocks)
    torch.mm(blocks, matrix, out=scanned)  # `out=` keeps it out of autocast's reach
    if longest > BLOCK:
        following = _follow(scanned[:, 0], inner, -(-longest // BLOCK), factor**BLOCK)
        scanned[: len(following)].addcmul_(following[:, None], weights)
    if not in_place:
        _join(scanned, sequences, place, out)


def _follow(firsts: Tensor, sequences: Sequences, longest: int, factor: float) -> Tensor:
    """For each block what follows it: Σ_k factor^(k − 1) · (the first element of the k-th block after it)."""
    groups, place, inner = _split(firsts, sequences, GROUP)
    matrix, weights = _powers(factor, GROUP, 1, firsts.dtype, firsts.device)
    following = torch.mm(groups, matrix, out=torch.empty_like(groups))
    if longest > GROUP:
        heads = groups[:, 0] + factor * following[:, 0]
        following.addcmul_(_follow(heads, inner, -(-longest // GROUP), factor**GROUP)[:, None], weights)
    if isinstance(sequences, tuple) and sequences[1] % GROUP == 0:
        return following.view(-1)[: len(firsts)]
    out = torch.zeros_like(firsts, memory_format=torch.contiguous_format)
    _join(following, sequences, place, out)
    return out


def _split(x: Tensor, sequences: Sequences, size: int) -> tuple[Tensor, Tensor | None, Sequences]:
    """Blocks (a `block_count`, size), 0 where a sequence ends before its last; their places in x; them as sequences."""
    if isinstance(sequences, tuple):
        rows, width = sequences
        per_row = -(-width // size)
        used, count = rows * per_row, block_count(rows * per_row)
        if width == per_row * size and len(x) == count * size and x.is_contiguous():
            return x.view(count, size), None, (rows, per_row)
        # Copied, but the product needs no spare rows here.
        if width == per_row * size and used == max(256, used // 64 * 64):
            return x[: used * size].reshape(used, size), None, (rows, per_row)
        padded = x.new_zeros(count, size)
        padded[:used].view(rows, -1)[:, :width] = x[: rows * width].view(rows, width)
        return padded, None, (rows, per_row)
    n, device = len(x), x.device
    blocks = (sequences.diff() + (size - 1)) // size  # per sequence
    ends = blocks.cumsum(0)
    # More than ends[-1], and known without asking the device. One more sequence, of no tokens, takes the spare blocks.
    count = block_count(n // size + len(blocks))
    blocks = torch.cat([blocks, count - ends[-1:]])
    ends = torch.cat([ends, ends.new_full((1,), count)])
    sequence = torch.arange(len(blocks), device=device).repeat_interleave(blocks, output_size=count)
    block = torch.arange(0, count * size, size, device=device)
    starts = (sequences - (ends - blocks) * size).index_select(0, sequence) + block

    # The slot of x for each slot of the blocks; slots without a token read and write the spare one.
    place = (starts[:, None] + torch.arange(size, device=device)).clamp_(max=n - 1)
    partial = (ends - 1).clamp(min=0)  # each sequence's last block
    stops = torch.cat([sequences[1:], sequences[-1:]]).index_select(0, sequence.index_select(0, partial))
    tails = place.index_select(0, partial)
    place.index_copy_(0, partial, torch.where(tails < stops[:, None], tails, n - 1))
    inner = torch.cat([ends.new_zeros(1), ends[:-1]])
    place = place.view(-1)
    return x.index_select(0, place).view(-1, size), place, inner


def _join(blocks: Tensor, sequences: Sequences, place: Tensor | None, out: Tensor) -> None:
    """Puts back in `out` what `_split` cut."""
    if isinstance(sequences, tuple):
        rows, width = sequences
        used = rows * -(-width // blocks.shape[1])
        out[: rows * width].view(rows, width).copy_(blocks[:used].view(rows, -1)[:, :width])
    elif place is not None:
        out.scatter_(0, place, blocks.view(-1))


@_kept_on_cpu
def _powers(factor: float, size: int, gap: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """M (size, size) with M[j, i] = factor^(j − i − gap) for j ≥ i + gap, else 0; factor^(size − i − gap)."""
    i = torch.arange(size, dtype=torch.float64, device=device)
    matrix = (factor ** (i[:, None] - i - gap).clamp(min=0)).tril(-gap)
    weights = factor ** (size - i - gap)
    tiny = torch.finfo(dtype).tiny  # arithmetic with smaller numbers is slow, and of no consequence
    return torch.where(matrix < tiny, 0.0, matrix).to(dtype), torch.where(weights < tiny, 0.0, weights).to(dtype)


def _right_padded(mask: Tensor) -> bool:
    """Whether each row of a CPU mask (B, T) is True up to some point and False after it."""
    bits = mask.view(torch.uint8)
    return mask.shape[1] == 1 or not bool((bits[:, 1:] > bits[:, :-1]).view(torch.uint8).max())


def _squeeze(mask: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token of packed sequences goes (N: nowhere), and the offsets of the valid tokens packed in order.

    One more sequence holds the slots left over at the end, so that every size is known without asking the device.
    """
    N = mask.shape[0]
    rank = offsets.new_zeros(N + 1)
    torch.cumsum(mask, 0, out=rank[1:])
    offsets = rank.index_select(0, offsets)
    home = rank[1:].sub_(N + 1).mul_(mask).add_(N)  # rank - 1, or N
    return home, torch.cat([offsets, offsets.new_full((1,), N)])


def _move(x: Tensor, home: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0] + 1).scatter_(0, home, x)[:-1]
