"""λ-returns (KLQ) and GAE (PPO): one reverse scan over the valid tokens of each row or packed sequence.

The torch path has no loop over time. Blocks of 16 tokens, anchored at each sequence's first valid token, are scanned
by one matrix product with the Toeplitz matrix of powers of λγ; the scan over the blocks' first elements, 1/16 of the
data, takes log2(blocks) shifted additions; one more product hands each block what follows it. Padded rows are blocks as
they lie in memory; packed sequences are copied to blocks and back; holes in a mask are first squeezed out, which leaves
packed sequences. A token's bits depend on its own sequence alone, so packed equals padded bitwise.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Impl, check_number, check_tensor, compute_dtype, resolve_impl
from . import reference

# 512×1024 fp32 on one core: the product takes 0.24 ms with blocks of 16, 0.39 with 32, 0.71 with 64, the scan over the
# blocks 0.10, 0.05 and 0.03.
BLOCK = 16


class LambdaReturns(NamedTuple):
    """What `lambda_returns` gives: each like `values`, 0 in invalid slots, without gradient."""

    returns: Tensor  # G, the regression target
    action_values: Tensor  # Q
    td_errors: Tensor  # δ
    advantages: Tensor  # Δ


@torch.no_grad()
def lambda_returns(
    log_ratio: Tensor,  # (B, T), or (N,) with cu_seqlens
    values: Tensor,  # like log_ratio
    rewards: Tensor,  # like log_ratio, or one per row (B,) / sequence (S,)
    mask: Tensor | None = None,  # bool, like log_ratio
    *,
    tau: float,
    lam: float = 0.95,
    gamma: float = 1.0,
    alpha: float = 1.0,
    bootstrap: Tensor | None = None,  # (B,) / (S,)
    cu_seqlens: Tensor | None = None,  # int32 (S + 1,)
    impl: Impl = "auto",
) -> LambdaReturns:
    """λ-returns of KL-regularised Q-learning (arXiv 2508.17000, Eqs. 7, 13, 14 and Algorithm 2), over t from the end:

        Q_t = τ ℓ_t + V(s_t)
        δ_t = r_{t+1} + γ V(s_{t+1}) − Q_t
        Δ_t = δ_t + λγ Δ_{t+1}
        G_t = α Δ_t + Q_t

    The recurrence runs over the valid tokens in order: s_{t+1} is the state of the next valid token, and after the last
    one V(s_{t+1}) is `bootstrap`, Δ_{t+1} is 0.

    Args:
        log_ratio: ℓ_t = log π(a_t|s_t) − log π_ref(a_t|s_t), in nats.
        values: V(s_t), where s_t is the state that a_t was chosen in.
        rewards: r_{t+1} beside each token; or one number per row or sequence, paid on its last valid token. (With
            cu_seqlens and as many sequences as tokens, a (N,) tensor is taken as one per token.)
        mask: True on valid tokens, by default all; may have holes. Invalid slots are never read and come back 0. A row
            without a valid token is all zeros, and its reward and bootstrap are ignored.
        tau: strength of the KL regularisation, > 0.
        lam, gamma: λ and the discount, each in [0, 1].
        alpha: step towards the λ-return, in (0, 1].
        bootstrap: value of the state after the last valid token, for rows that were cut off; default 0 (terminal).
        cu_seqlens: offsets of packed sequences: sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1] - 1. They
            start at 0 and end at N. May come with a mask (N,).
        impl: "reference" is the loop over time, "torch" the fast path.

    Tensors may be float32, float64, bfloat16 or float16, on one device; results are float64 where log_ratio or values
    is, else float32. No gradient flows through. Raises ValueError on any other shape, dtype, device or number.
    """
    check_tensor("values", values)
    check_tensor("log_ratio", log_ratio, shape=tuple(values.shape), like="values", device=values.device)
    check_number("tau", tau, low=0.0, open_low=True)
    check_number("alpha", alpha, low=0.0, high=1.0, open_low=True)
    _check_common(values, rewards, mask, lam, gamma, bootstrap, cu_seqlens)
    if resolve_impl(impl, values.device) == "reference":
        _check_offsets(cu_seqlens, values)
        results = reference.lambda_returns(
            log_ratio,
            values,
            rewards,
            mask,
            tau=tau,
            lam=lam,
            gamma=gamma,
            alpha=alpha,
            bootstrap=bootstrap,
            cu_seqlens=cu_seqlens,
        )
        dtype = compute_dtype(log_ratio, values)
        returns, action_values, td_errors, advantages = (x.to(dtype) for x in results)
        return LambdaReturns(returns, action_values, td_errors, advantages)
    scan = _scan_op if torch.compiler.is_compiling() else _scan
    numbers = (float(tau), float(lam), float(gamma), float(alpha))
    buffer = scan(log_ratio, values, rewards, mask, bootstrap, cu_seqlens, *numbers)
    returns, action_values, advantages, td_errors = buffer[:, : values.numel()].view(4, *values.shape).unbind()
    return LambdaReturns(returns, action_values, td_errors, advantages)


@torch.no_grad()
def gae(
    rewards: Tensor,  # like values, or one per row (B,) / sequence (S,)
    values: Tensor,  # (B, T), or (N,) with cu_seqlens
    mask: Tensor | None = None,  # bool, like values
    *,
    lam: float = 0.95,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,  # (B,) / (S,)
    cu_seqlens: Tensor | None = None,  # int32 (S + 1,)
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (Algorithm 1 of arXiv 2508.17000): advantages and returns, each like `values`.

        δ_t = r_{t+1} + γ V(s_{t+1}) − V(s_t)
        Â_t = δ_t + λγ Â_{t+1}
        returns_t = Â_t + V(s_t)

    With rewards r − τℓ the advantages are `lambda_returns`' Δ. Arguments, dtypes and errors are as in `lambda_returns`;
    results are float64 where `values` is, else float32.
    """
    check_tensor("values", values)
    _check_common(values, rewards, mask, lam, gamma, bootstrap, cu_seqlens)
    if resolve_impl(impl, values.device) == "reference":
        _check_offsets(cu_seqlens, values)
        advantages, returns = reference.gae(
            rewards, values, mask, lam=lam, gamma=gamma, bootstrap=bootstrap, cu_seqlens=cu_seqlens
        )
        dtype = compute_dtype(values)
        return advantages.to(dtype), returns.to(dtype)
    scan = _scan_op if torch.compiler.is_compiling() else _scan
    buffer = scan(None, values, rewards, mask, bootstrap, cu_seqlens, 1.0, float(lam), float(gamma), 1.0)
    returns, _, advantages, _ = buffer[:, : values.numel()].view(4, *values.shape).unbind()
    return advantages, returns


def _check_common(
    values: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    lam: float,
    gamma: float,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Everything but the contents of cu_seqlens, which _check_offsets reads (torch.compile cannot, here)."""
    shape, device = tuple(values.shape), values.device
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"values: got shape {shape}, expected (B, T), or (N,) together with cu_seqlens")
        rows, row, source = shape[0], "one per row", "the first dimension of values"
    else:
        if len(shape) != 1:
            raise ValueError(f"values: got shape {shape} with cu_seqlens, expected (N,)")
        check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32,), device=device)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected (S + 1,)")
        rows, row, source = cu_seqlens.shape[0] - 1, "one per sequence", "the sequences in cu_seqlens"
    check_tensor("rewards", rewards, device=device)
    if tuple(rewards.shape) not in (shape, (rows,)):
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected {shape} (values) or {(rows,)} ({row})")
    if mask is not None:
        check_tensor("mask", mask, shape=shape, like="values", dtypes=(torch.bool,), device=device)
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, shape=(rows,), like=source, device=device)
    check_number("lam", lam, low=0.0, high=1.0)
    check_number("gamma", gamma, low=0.0, high=1.0)


def _check_offsets(cu_seqlens: Tensor | None, values: Tensor) -> None:
    """0 = cu_seqlens[0] ≤ … ≤ cu_seqlens[-1] = N; on CUDA checked on the device, without a synchronisation."""
    if cu_seqlens is None:
        return
    total = values.shape[0]
    if cu_seqlens.is_cuda:
        ordered = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(ordered, f"cu_seqlens: expected offsets that rise from 0 to {total}")
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != total:
        raise ValueError(f"cu_seqlens: got offsets from {first} to {last}, expected 0 to {total} (tokens in values)")
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens: got falling offsets {cu_seqlens.tolist()}, expected a non-decreasing sequence")


def _block_count(blocks: int) -> int:
    """Rows to give a product of that many blocks, so that the bits of each depend on nothing but its contents.

    MKL multiplies by other routines, with other last bits, where a thread has few rows (below 12 seen) and for the last
    rows % 4 (in fp64). So: multiples of 64, and at least 256, 4 for each of 64 threads.
    """
    return (blocks // 64 + 4) * 64


def _scan(
    log_ratio: Tensor | None,  # None: GAE, where Q = V
    values: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    tau: float,
    lam: float,
    gamma: float,
    alpha: float,
) -> Tensor:
    """G, Q, Δ, δ: the first N = values.numel() slots of the four rows of one buffer, whose other slots are 0.

    One buffer, since glibc hands four freed blocks of 2 MB (512×1024) back to the system but keeps one of 8 MB, and
    2000 page faults cost up to 4 ms where the scan takes 1. The spare slots, at least 16, take what has no place: the
    last rewards of sequences without tokens, the ends of partly filled blocks. On CUDA nothing here waits for the
    device.
    """
    _check_offsets(cu_seqlens, values)
    shape, device = values.shape, values.device
    N, dtype = values.numel(), compute_dtype(log_ratio, values)
    buffer = torch.empty(4, BLOCK * _block_count(N // BLOCK), dtype=dtype, device=device)
    if N == 0:
        return buffer.zero_()
    per_token = rewards.shape == shape
    V, r = values.to(dtype).reshape(-1), rewards.to(dtype).reshape(-1)
    log_ratio = None if log_ratio is None else log_ratio.to(dtype).reshape(-1)
    bootstrap = None if bootstrap is None else bootstrap.to(dtype)

    # `last` (S,) is each sequence's last valid token, N if it has none; `home` (N,) is where each token goes when holes
    # are squeezed out, N if it is one; `shortest` is the number of columns that are valid in every row.
    work, home, offsets, shortest = buffer, None, None, N
    if cu_seqlens is None and (mask is None or (not mask.is_cuda and _right_padded(mask))):
        T = shape[1]
        last = torch.arange(T - 1, N, T, device=device)
        if mask is not None:
            lengths = mask.view(torch.uint8).sum(1, dtype=torch.int64)
            last = torch.where(lengths > 0, last + (lengths - T), N)
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

    returns, Q, advantages, td_errors = work.unbind()
    _td_errors(log_ratio, V, r, bootstrap, last, per_token, tau, gamma, Q, td_errors, scratch=advantages)
    if offsets is None:
        if mask is not None and shortest < shape[1]:
            _zero_padding(work[:, :N].view(4, *shape), mask, shortest)
        _scan_rows(td_errors, shape, lam * gamma, out=advantages)
    else:
        _scan_packed(td_errors, N, offsets, lam * gamma, out=advantages)
    if alpha == 1.0:
        torch.add(Q[:N], advantages[:N], out=returns[:N])
    else:
        torch.addcmul(Q[:N], advantages[:N], _scalar(alpha, Q), out=returns[:N])
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
    last: Tensor,  # (S,)
    per_token: bool,
    tau: float,
    gamma: float,
    Q: Tensor,  # (N + spare,), written
    td_errors: Tensor,  # (N + spare,), written, with 0 in the spare slots
    scratch: Tensor,  # (N + spare,)
) -> None:
    """Q = τℓ + V and δ = (r − τℓ) + (γV' − V).

    In this order, since with fp32 values near 10 and τℓ near 0.001, r + γV' − Q would lose the last 13 bits of τℓ, and
    at λγ = 1 the loss adds up over the sequence.
    """
    N = V.shape[0]
    Q, scratch, inner = Q[:N], scratch[:N], td_errors[: N - 1]
    if gamma == 1.0:
        torch.sub(V[1:], V[:-1], out=inner)
    else:
        torch.mul(V[1:], gamma, out=inner).sub_(V[:-1])
    td_errors[N - 1 :] = 0.0  # token N - 1 is the last of some sequence, written below
    here = last.clamp(max=N - 1)
    end_value = V.index_select(0, here)
    end_difference = end_value.neg() if bootstrap is None else gamma * bootstrap - end_value
    end_reward = r.index_select(0, here) if per_token else r
    if log_ratio is None:
        Q.copy_(V)
        if per_token:
            td_errors[:N] += r
    else:
        torch.addcmul(V, log_ratio, _scalar(tau, V), out=Q)
        minus_tau = _scalar(-tau, V)
        if per_token:
            td_errors[:N] += torch.addcmul(r, log_ratio, minus_tau, out=scratch)
        else:
            td_errors[:N].addcmul_(log_ratio, minus_tau)
        end_reward = torch.addcmul(end_reward, log_ratio.index_select(0, here), minus_tau)
    td_errors.scatter_(0, last, end_reward + end_difference)
    td_errors[N] = 0.0


def _scalar(x: float, like: Tensor) -> Tensor:
    """A factor for addcmul, which multiplies and adds in one pass over memory."""
    return torch.full((), x, dtype=like.dtype, device=like.device)


def _zero_padding(work: Tensor, mask: Tensor, shortest: int) -> None:
    """Zeros Q and δ, rows 1 and 3 of work (4, B, T), where a right-padded mask is False; row 2 is scratch.

    By an AND with all ones or zeros: 0.05 ms for 512×1024 where `where` takes 0.3 to 1.2; and NaN & 0 = 0.
    """
    bits = work.view(torch.int64 if work.dtype == torch.float64 else torch.int32)[:, :, shortest:]
    keep = bits[2].copy_(mask[:, shortest:]).neg_()
    bits[1].bitwise_and_(keep)
    bits[3].bitwise_and_(keep)


def _scan_rows(td_errors: Tensor, shape: torch.Size, factor: float, out: Tensor) -> None:
    """Δ (N + spare,) of padded rows δ (N + spare,), N = B·T, each of which ends in zeros where it is shorter than T."""
    B, T = shape
    blocks = -(-T // BLOCK)  # per row
    if T == blocks * BLOCK:
        _scan_blocks(td_errors.view(-1, BLOCK), factor, blocks, out=out.view(-1, BLOCK))
        return
    padded = td_errors.new_zeros(_block_count(B * blocks), BLOCK)
    padded[: B * blocks].view(B, -1)[:, :T] = td_errors[: B * T].view(B, T)
    scanned = _scan_blocks(padded, factor, blocks, out=torch.empty_like(padded))
    out[: B * T].view(B, T).copy_(scanned[: B * blocks].view(B, -1)[:, :T])


def _scan_packed(td_errors: Tensor, N: int, offsets: Tensor, factor: float, out: Tensor) -> None:
    """Δ (N + spare,) of packed sequences δ (N + spare,), by way of blocks that start where a sequence starts."""
    device = out.device
    lengths = offsets.diff()
    blocks = (lengths + (BLOCK - 1)) // BLOCK  # per sequence
    ends = blocks.cumsum(0)
    longest = -(-N // BLOCK) if offsets.is_cuda else int(blocks.max())
    # At least ends[-1] and known without asking the device; one more sequence, of no tokens, takes the spare blocks.
    count = _block_count(N // BLOCK + lengths.shape[0])
    blocks = torch.cat([blocks, count - ends[-1:]])
    ends = torch.cat([ends, ends.new_full((1,), count)])
    stops = torch.cat([offsets[1:], offsets[-1:]])
    sequence = torch.arange(blocks.shape[0], device=device).repeat_interleave(blocks, output_size=count)
    block = torch.arange(count, device=device)
    start = (offsets - (ends - blocks) * BLOCK).index_select(0, sequence) + block * BLOCK

    # The token in each slot; slots without one read and write the 16 places from N on.
    token = start.clamp_(max=N)[:, None] + torch.arange(BLOCK, device=device)
    partial = (ends - 1).clamp(min=0)  # each sequence's last block
    tail = token.index_select(0, partial)
    stop = stops.index_select(0, sequence.index_select(0, partial))
    token.index_copy_(0, partial, torch.where(tail < stop[:, None], tail, N))
    token = token.view(-1)

    padded = td_errors.index_select(0, token).view(-1, BLOCK)
    remaining = ends.index_select(0, sequence) - block
    scanned = _scan_blocks(padded, factor, longest, out=torch.empty_like(padded), remaining=remaining)
    out.scatter_(0, token, scanned.view(-1))


def _scan_blocks(
    blocks: Tensor,  # (_block_count(…), BLOCK)
    factor: float,
    longest: int,
    out: Tensor,  # like blocks
    remaining: Tensor | None = None,  # (blocks,): blocks of the same sequence from this one on; None: rows of `longest`
) -> Tensor:
    """Δ in the layout of `blocks`, which hold δ; every sequence starts at a block and its last block ends in zeros.

    Sums of 16 terms, then trees of depth log2(T / 16): at T = 32768 fp32 was off by at most 3.4e-7 of
    Σ_k (λγ)^k |δ_{t+k}| for λγ = 0.5 and 5.7e-8 for λγ = 1. On CUDA the product is taken in fp64, since fp32 may mean
    TF32 there.
    """
    matrix, carry_weights = _powers(factor, torch.float64 if blocks.is_cuda else blocks.dtype, blocks.device)
    # `out=` keeps the product out of autocast's reach
    scanned = out if out.dtype == matrix.dtype else torch.empty_like(out, dtype=matrix.dtype)
    torch.mm(blocks.to(matrix.dtype), matrix, out=scanned)
    rows = 1 if remaining is not None else blocks.shape[0] // longest
    first = scanned[:, 0].contiguous()
    table = first[: rows * longest].view(rows, -1) if remaining is None else first[None]
    shift, tiny = 1, torch.finfo(matrix.dtype).tiny  # table[i] is the scan over the `shift` blocks from i on
    while shift < longest and (weight := factor ** (BLOCK * shift)) > tiny:
        table[:, :-shift] += weight * _following(table, shift, remaining)
        shift *= 2
    carry = torch.zeros_like(first)
    if longest > 1:
        carry[: table.numel()].view(rows, -1)[:, :-1] = _following(table, 1, remaining)
    scanned.addcmul_(carry[:, None], carry_weights)
    return out if out is scanned else out.copy_(scanned)


def _following(table: Tensor, shift: int, remaining: Tensor | None) -> Tensor:
    """What lies `shift` blocks to the right, 0 where that is another sequence's."""
    following = table[:, shift:]
    return following if remaining is None else torch.where(remaining[:-shift] > shift, following, 0.0)


@lru_cache(maxsize=32)
def _powers(factor: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """M (BLOCK, BLOCK) with M[j, i] = factor^(j − i) for j ≥ i, so that δ @ M scans a block, and factor^(BLOCK − i)."""
    with torch.inference_mode(False):
        i = torch.arange(BLOCK, dtype=torch.float64, device=device)
        powers = factor ** (i[:, None] - i).clamp(min=0)
        return powers.tril().to(dtype), (factor ** (BLOCK - i)).to(dtype)


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


_scan_op = torch.library.custom_op("klq_fast::lambda_returns", _scan, mutates_args=())


@_scan_op.register_fake
def _(log_ratio, values, rewards, mask, bootstrap, cu_seqlens, tau, lam, gamma, alpha):
    slots = BLOCK * _block_count(values.numel() // BLOCK)
    return torch.empty(4, slots, dtype=compute_dtype(log_ratio, values), device=values.device)
