"""lambda_returns and gae against Algorithms 1 and 2 (arXiv 2508.17000) written in Python floats, and their laws."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from klq_fast import LambdaReturns, gae, lambda_returns
from klq_fast.kernels.lambda_returns import op

Batch = dict[str, Any]  # arguments by name
TAU = 0.05
IMPLS = ("torch", "reference")
MASKS = ("none", "full", "right-padded", "holes")
EPS32, EPS64 = 2.0**-24, 2.0**-53  # half a unit in the last place: the error of one rounding


def make_batch(B: int, T: int, masks: str = "none", *, per_token: bool = True, bootstrap: bool = True) -> Batch:
    """float64 arguments for `lambda_returns`; what a mask hides is NaN or inf."""
    log_ratio, values, rewards = torch.randn(3, B, T, dtype=torch.float64)
    mask = {
        "none": None,
        "full": torch.ones(B, T, dtype=torch.bool),
        "right-padded": torch.arange(T) < torch.randint(0, T + 1, (B, 1)),
        "holes": torch.rand(B, T) > 0.3,
    }[masks]
    if mask is not None:
        for x, garbage in ((log_ratio, "nan"), (values, "inf"), (rewards, "-inf")):
            x[~mask] = float(garbage)
    return {
        "log_ratio": log_ratio,
        "values": values,
        "rewards": rewards if per_token else torch.randn(B, dtype=torch.float64),
        "mask": mask,
        "bootstrap": torch.randn(B, dtype=torch.float64) if bootstrap else None,
    }


def to(batch: Batch, dtype: torch.dtype) -> Batch:
    return {name: x.to(dtype) if x is not None and x.is_floating_point() else x for name, x in batch.items()}


def pack(batch: Batch, keep: Tensor) -> Batch:
    """The tokens that `keep` (B, T) marks, packed; per-row arguments become per-sequence ones as they are."""
    shape = keep.shape
    packed = {name: x[keep] if x is not None and x.shape == shape else x for name, x in batch.items()}
    ends = keep.sum(1).cumsum(0)
    return packed | {"cu_seqlens": torch.cat([ends.new_zeros(1), ends]).int()}


def truth(
    log_ratio: Tensor,
    values: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    *,
    tau: float = TAU,
    lam: float = 0.95,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> tuple[LambdaReturns, Tensor]:
    """Algorithm 2 row by row in Python floats, and Σ_k (λγ)^k (|r| + |τℓ| + |γV'| + |V|), the scale of Δ's rounding."""
    B, T = values.shape
    results, scale = torch.zeros(4, B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        valid = [t for t in range(T) if mask is None or bool(mask[b, t])]
        ell, V = log_ratio[b].tolist(), values[b].tolist()
        r = rewards[b].tolist()
        following, error, size = 0.0 if bootstrap is None else bootstrap[b].item(), 0.0, 0.0
        out: dict[int, tuple[float, ...]] = {}
        for t in reversed(valid):
            reward = r[t] if isinstance(r, list) else (r if t == valid[-1] else 0.0)
            Q = tau * ell[t] + V[t]
            td_error = reward + gamma * following - Q
            error = td_error + lam * gamma * error
            size = abs(reward) + abs(tau * ell[t]) + abs(gamma * following) + abs(V[t]) + lam * gamma * size
            following = V[t]
            out[t] = (alpha * error + Q, Q, td_error, error, size)
        if valid:
            columns = torch.tensor(valid)
            table = torch.tensor([out[t] for t in valid], dtype=torch.float64)
            results[:, b, columns] = table[:, :4].T
            scale[b, columns] = table[:, 4]
    return LambdaReturns(*results), scale


def assert_close(got: LambdaReturns, expected: LambdaReturns, scale: Tensor, eps: float) -> None:
    """Every number within 16 roundings of the sizes that went into it.

    A number passes 5 elementwise operations, 15 additions in each of up to 4 levels of blocks, and 3 roundings of
    powers and products a level; their errors are of both signs, and the worst seen was 5.2 of 16.
    """
    for name, x, y in zip(LambdaReturns._fields, got, expected, strict=True):
        assert x.shape == y.shape
        error = (x.double() - y).abs()
        assert (error <= 16 * eps * (scale + 1e-30)).all(), (
            f"{name}: off by {(error / (eps * scale)).max():.3g} roundings"
        )


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# Against the truth


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_is_algorithm_2(masks: str, per_token: bool, bootstrap: bool, impl: Any) -> None:
    for B, T in ((3, 7), (18, 100), (1, 1), (5, 0), (0, 5)):
        for lam, gamma, alpha in ((0.95, 1.0, 1.0), (0.5, 0.9, 0.3), (1.0, 1.0, 1.0)):
            batch = make_batch(B, T, masks, per_token=per_token, bootstrap=bootstrap)
            if not per_token and batch["mask"] is not None:  # ignored where a row has no valid token
                batch["rewards"][~batch["mask"].any(1)] = float("nan")
            numbers: Batch = {"lam": lam, "gamma": gamma, "alpha": alpha}
            expected, scale = truth(**batch, **numbers)
            got = lambda_returns(**batch, tau=TAU, **numbers, impl=impl)
            assert all(x.dtype == torch.float64 for x in got)
            assert_close(got, expected, scale, EPS64)

            single = to(batch, torch.float32)
            expected, scale = truth(**single, **numbers)
            got = lambda_returns(**single, tau=TAU, **numbers, impl=impl)
            assert all(x.dtype == torch.float32 for x in got)
            assert_close(got, expected, scale, EPS32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("per_token", [False, True])
def test_gae_is_algorithm_1(masks: str, per_token: bool, impl: Any) -> None:
    """Algorithm 1 is Algorithm 2 with τ = 0, which the truth allows: Q is then V."""
    for B, T in ((3, 7), (18, 100), (1, 1), (5, 0), (0, 5)):
        batch = make_batch(B, T, masks, per_token=per_token)
        expected, scale = truth(**batch | {"log_ratio": torch.zeros(B, T)}, tau=0.0, lam=0.9, gamma=0.99)
        del batch["log_ratio"]
        for dtype, eps in ((torch.float64, EPS64), (torch.float32, EPS32)):
            if dtype == torch.float32:
                batch = to(batch, dtype)
                expected, scale = truth(**batch, log_ratio=torch.zeros(B, T), tau=0.0, lam=0.9, gamma=0.99)
            advantages, returns = gae(**batch, lam=0.9, gamma=0.99, impl=impl)
            assert advantages.dtype == returns.dtype == dtype
            got = LambdaReturns(returns, expected.action_values, expected.td_errors, advantages)
            assert_close(got, expected, scale, eps)


def test_lengths_around_the_blocks() -> None:
    lengths = torch.tensor([0, 1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513])
    batch = make_batch(len(lengths), 513)
    batch["mask"] = torch.arange(513) < lengths[:, None]
    for name in ("log_ratio", "values", "rewards"):
        batch[name][~batch["mask"]] = float("nan")
    expected, scale = truth(**batch)
    padded = lambda_returns(**batch, tau=TAU)
    assert_close(padded, expected, scale, EPS64)
    packed = lambda_returns(**pack(batch | {"mask": None}, batch["mask"]), tau=TAU)
    assert_equal(packed, tuple(x[batch["mask"]] for x in padded))


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 0.999, 1.0])
def test_long_rows(factor: float) -> None:
    """fp32 over 32768 tokens; the scale grows with 1/(1 − λγ), up to 6·10⁴ at λγ = 1."""
    splits: tuple[Batch, Batch] = ({"lam": factor, "gamma": 1.0}, {"lam": 1.0, "gamma": factor})
    for split in splits:
        batch = to(make_batch(2, 32768, "right-padded", per_token=False), torch.float32)
        batch["mask"][0] = True
        for name in ("log_ratio", "values"):
            batch[name] = torch.where(batch["mask"], torch.randn(2, 32768), float("nan"))
        expected, scale = truth(**batch, **split)
        assert_close(lambda_returns(**batch, tau=TAU, **split), expected, scale, EPS32)
        double = to(batch, torch.float64)
        assert_close(lambda_returns(**double, tau=TAU, **split), expected, scale, EPS64 * 16)  # the truth's own error


def test_small_penalties_beside_large_values_survive() -> None:
    """V = 10 and τℓ = 0.0012345 in every slot: Δ_0 = −10 − 32768·τℓ, of which r + V' − fl(τℓ + V) loses 3·10⁻⁴."""
    log_ratio, values, rewards = torch.full((1, 32768), 0.02469), torch.full((1, 32768), 10.0), torch.zeros(1)
    got = lambda_returns(log_ratio, values, rewards, tau=TAU, lam=1.0).advantages[0, 0].item()
    penalty = 32768 * TAU * log_ratio[0, 0].item()
    assert got == pytest.approx(-10 - penalty, rel=1e-6)


def test_low_precision_inputs_are_read_as_float32() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        batch = to(make_batch(5, 100, "right-padded"), dtype)
        got = lambda_returns(**batch, tau=TAU)
        assert all(x.dtype == torch.float32 for x in got)
        assert_equal(got, lambda_returns(**to(batch, torch.float32), tau=TAU))
    mixed = to(make_batch(5, 100), torch.float32)
    expected = lambda_returns(**mixed, tau=TAU)
    mixed |= {"rewards": mixed["rewards"].double(), "bootstrap": mixed["bootstrap"].double()}
    assert_equal(lambda_returns(**mixed, tau=TAU), expected)  # float64 rewards do not make float64 returns
    assert lambda_returns(**mixed | {"values": mixed["values"].double()}, tau=TAU).returns.dtype == torch.float64


# Laws


def test_lambda_0_gives_the_td_error() -> None:
    for masks in MASKS:
        got = lambda_returns(**to(make_batch(6, 40, masks), torch.float32), tau=TAU, lam=0.0)
        assert torch.equal(got.advantages, got.td_errors)


def test_lambda_1_gives_monte_carlo() -> None:
    """With λ = γ = 1 the values telescope: G_t = r_t + Σ_{k>t} (r_k − τℓ_k) + bootstrap, whatever V."""
    batch = make_batch(6, 40)
    got = lambda_returns(**batch, tau=TAU, lam=1.0)
    penalised = batch["rewards"] - TAU * batch["log_ratio"]
    to_go = penalised.flip(1).cumsum(1).flip(1) + batch["bootstrap"][:, None]
    torch.testing.assert_close(got.returns, to_go + TAU * batch["log_ratio"], rtol=1e-12, atol=1e-12)


def test_alpha_near_0_gives_the_action_value() -> None:
    for masks in MASKS:
        got = lambda_returns(**to(make_batch(6, 40, masks), torch.float32), tau=TAU, alpha=1e-30)
        assert torch.equal(got.returns, got.action_values)
        assert got.advantages.abs().max() > 1


def test_linear_in_rewards_values_and_log_ratio() -> None:
    one, two = make_batch(6, 40), make_batch(6, 40)
    numbers: Batch = {"tau": TAU, "gamma": 0.9, "alpha": 0.7}
    both = {name: None if x is None else 2 * x - 3 * two[name] for name, x in one.items()}
    got = lambda_returns(**both, **numbers)
    for x, y, z in zip(
        got,
        lambda_returns(**one, **numbers),
        lambda_returns(**two, **numbers),
        strict=True,
    ):
        torch.testing.assert_close(x, 2 * y - 3 * z, rtol=1e-12, atol=1e-12)


def test_shifted_values() -> None:
    """V + c everywhere (bootstrap too): δ moves by (γ − 1)c, Δ by the geometric sum of that, Q by c."""
    T, c, lam, gamma = 40, 2.5, 0.8, 0.9
    batch = make_batch(6, T)
    before = lambda_returns(**batch, tau=TAU, lam=lam, gamma=gamma)
    batch |= {"values": batch["values"] + c, "bootstrap": batch["bootstrap"] + c}
    after = lambda_returns(**batch, tau=TAU, lam=lam, gamma=gamma)
    left = T - torch.arange(T, dtype=torch.float64)
    moved = (gamma - 1) * c * (1 - (lam * gamma) ** left) / (1 - lam * gamma)
    torch.testing.assert_close(after.td_errors, before.td_errors + (gamma - 1) * c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.advantages, before.advantages + moved, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.action_values, before.action_values + c, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 39])
def test_split_and_bootstrap_equals_whole(cut: int) -> None:
    """The left part of a split row, bootstrapped with V(s_cut) + λ Δ_cut, has the λ-returns of the whole."""
    lam, gamma = 0.8, 0.9
    batch = make_batch(6, 40)
    whole = lambda_returns(**batch, tau=TAU, lam=lam, gamma=gamma)
    parts = [{name: x[:, s] for name, x in batch.items() if x is not None and x.ndim == 2} for s in
             (slice(None, cut), slice(cut, None))]  # fmt: skip
    right = lambda_returns(**parts[1], bootstrap=batch["bootstrap"], tau=TAU, lam=lam, gamma=gamma)
    carried = parts[1]["values"][:, 0] + lam * right.advantages[:, 0]
    left = lambda_returns(**parts[0], bootstrap=carried, tau=TAU, lam=lam, gamma=gamma)
    for name in ("advantages", "returns", "action_values"):
        joined = torch.cat([getattr(left, name), getattr(right, name)], 1)
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_advantages_are_gae_on_penalised_rewards() -> None:
    """KLQ's Δ is PPO's Â on r − τℓ, with the same λ and γ."""
    for masks in MASKS:
        batch = make_batch(6, 40, masks)
        klq = lambda_returns(**batch, tau=TAU, lam=0.9, gamma=0.97)
        advantages, returns = gae(
            batch["rewards"] - TAU * batch["log_ratio"],
            batch["values"],
            batch["mask"],
            lam=0.9,
            gamma=0.97,
            bootstrap=batch["bootstrap"],
        )
        torch.testing.assert_close(advantages, klq.advantages, rtol=1e-12, atol=1e-12)
        values = batch["values"] if batch["mask"] is None else torch.where(batch["mask"], batch["values"], 0.0)
        torch.testing.assert_close(returns, klq.advantages + values, rtol=1e-12, atol=1e-12)


# Masks, packing, independence: to the bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_token", [False, True])
def test_holes_equal_compact_scan_scatter(dtype: torch.dtype, per_token: bool) -> None:
    batch = to(make_batch(30, 70, "holes", per_token=per_token), dtype)
    batch["mask"][3] = False
    got = lambda_returns(**batch, tau=TAU, gamma=0.99)
    for b in range(30):
        keep = batch["mask"][b]
        row = {n: None if x is None else x[b : b + 1, keep] if x.ndim == 2 else x[b : b + 1] for n, x in batch.items()}
        alone = lambda_returns(**row | {"mask": None}, tau=TAU, gamma=0.99)
        for x, y in zip(got, alone, strict=True):
            assert torch.equal(x[b, keep], y[0])
            assert (x[b, ~keep] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_packed_equals_padded(dtype: torch.dtype, masks: str, per_token: bool, bootstrap: bool) -> None:
    for B, T in ((1, 1), (3, 7), (60, 48), (20, 300)):
        batch = to(make_batch(B, T, masks, per_token=per_token, bootstrap=bootstrap), dtype)
        keep = torch.arange(T) < torch.randint(0, T + 1, (B, 1))
        keep[0] = True
        packed = pack(batch, keep)
        padded = batch | {"mask": keep if batch["mask"] is None else keep & batch["mask"]}
        expected = lambda_returns(**padded, tau=TAU, alpha=0.5)
        assert_equal(lambda_returns(**packed, tau=TAU, alpha=0.5), tuple(x[keep] for x in expected))
        reference = lambda_returns(**packed, tau=TAU, alpha=0.5, impl="reference")
        torch.testing.assert_close(reference.returns, expected.returns[keep], rtol=1e-4, atol=1e-4)
        for name in ("log_ratio", "tau"):
            packed.pop(name, None), padded.pop(name, None)
        assert_equal(gae(**packed), tuple(x[keep] for x in gae(**padded)))


def test_a_row_is_the_same_in_any_batch() -> None:
    """Its bits do not depend on the other rows, on its place, on the width, on the layout or on the run."""
    for T in (16, 17, 53, 320):
        batch = to(make_batch(300, T, "right-padded", per_token=False), torch.float32)
        got = lambda_returns(**batch, tau=TAU)
        assert_equal(lambda_returns(**batch, tau=TAU), got)
        for rows in (slice(7, 8), slice(40, 43), slice(0, 12), slice(100, 299)):
            alone = {name: x[rows] for name, x in batch.items()}
            assert_equal(lambda_returns(**alone, tau=TAU), tuple(x[rows] for x in got))
        wider = {name: torch.cat([x, x[:, :9]], 1) if x.ndim == 2 else x for name, x in batch.items()}
        wider["mask"][:, T:] = False
        assert_equal(lambda_returns(**wider, tau=TAU), tuple(torch.cat([x, 0 * x[:, :9]], 1) for x in got))


def test_threads_do_not_change_the_result() -> None:
    batches = [to(make_batch(B, T), torch.float32) for B, T in ((1, 16), (3, 16), (17, 64), (600, 128))]
    one = [lambda_returns(**batch, tau=TAU) for batch in batches]
    torch.set_num_threads(2)
    try:
        two = [lambda_returns(**batch, tau=TAU) for batch in batches]
    finally:
        torch.set_num_threads(1)
    for x, y in zip(one, two, strict=True):
        assert_equal(x, y)


def test_a_broken_row_stays_alone() -> None:
    """A NaN among one row's valid tokens reaches that row only."""
    batch = to(make_batch(20, 64), torch.float32)
    expected = lambda_returns(**batch, tau=TAU)
    batch["rewards"][7, 20] = float("nan")
    packed = pack(batch, torch.ones(20, 64, dtype=torch.bool))
    others = torch.arange(20) != 7
    for got in (lambda_returns(**batch, tau=TAU), lambda_returns(**packed, tau=TAU)):
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x.view(20, 64)[others], y[others])
        assert got.returns.view(20, 64)[7, :20].isnan().all()


def test_rows_without_a_valid_token_are_zero() -> None:
    for mask in (
        torch.zeros(3, 5, dtype=torch.bool),
        torch.eye(3, 5, dtype=torch.bool) & (torch.arange(3) != 1)[:, None],
    ):
        nan = torch.full((3, 5), float("nan"))
        empty = ~mask.any(1)
        per_row = torch.where(empty, float("nan"), 1.0)
        log_ratio, values = torch.where(mask, 0.0, nan), torch.where(mask, 2.0, nan)
        for impl in IMPLS:
            got = lambda_returns(log_ratio, values, per_row, mask, tau=TAU, bootstrap=per_row, impl=impl)
            for x, expected in zip(got, (2.0, 2.0, 0.0, 0.0), strict=True):
                assert torch.equal(x, torch.where(mask, expected, 0.0))
            advantages, returns = gae(per_row, values, mask, bootstrap=per_row, impl=impl)
            assert torch.equal(returns, torch.where(mask, 2.0, 0.0)) and (advantages == 0).all()


def test_empty_sequences_between_others() -> None:
    offsets = [0, 0, 3, 3, 3, 20, 37, 37]
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    log_ratio, values = torch.randn(2, 37)
    rewards, bootstrap = torch.randn(2, 7)
    for impl in IMPLS:
        got = lambda_returns(
            log_ratio, values, rewards, tau=TAU, bootstrap=bootstrap, cu_seqlens=cu_seqlens, impl=impl
        )  # fmt: skip
        for s, (start, end) in enumerate(pairwise(offsets)):
            one = lambda_returns(
                log_ratio[None, start:end],
                values[None, start:end],
                rewards[s : s + 1],
                tau=TAU,
                bootstrap=bootstrap[s : s + 1],
                impl=impl,
            )
            assert_equal(tuple(x[start:end] for x in got), tuple(x[0] for x in one))


def test_as_many_sequences_as_tokens() -> None:
    """(N,) rewards with S = N are taken as one per token; for sequences of one token both readings agree."""
    log_ratio, values, rewards = torch.randn(3, 9)
    cu_seqlens = torch.arange(10, dtype=torch.int32)
    got = lambda_returns(log_ratio, values, rewards, tau=TAU, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(got.advantages, rewards - TAU * log_ratio - values, rtol=1e-6, atol=1e-6)
    cu_seqlens = torch.tensor([0] * 9 + [9], dtype=torch.int32)
    got = lambda_returns(log_ratio, values, rewards, tau=TAU, cu_seqlens=cu_seqlens)
    reference = lambda_returns(log_ratio, values, rewards, tau=TAU, cu_seqlens=cu_seqlens, impl="reference")
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)
    padded = lambda_returns(log_ratio[None], values[None], rewards[None], tau=TAU)
    assert_equal(got, tuple(x[0] for x in padded))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_packed(impl: Any) -> None:
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        none, rows = torch.zeros(0), torch.ones(len(cu_seqlens) - 1)
        got = lambda_returns(none, none, rows, tau=TAU, bootstrap=rows, cu_seqlens=cu_seqlens, impl=impl)
        assert all(x.shape == (0,) and x.dtype == torch.float32 for x in got)


# How it runs


def test_no_gradient_and_no_change_of_the_arguments() -> None:
    for masks in MASKS:
        batch = to(make_batch(6, 33, masks), torch.float32)
        before = {name: x.clone() for name, x in batch.items() if x is not None}
        for x in batch.values():
            if x is not None and x.is_floating_point():
                x.requires_grad_()
        got = lambda_returns(**batch, tau=TAU)
        ppo = gae(**{name: x for name, x in batch.items() if name != "log_ratio"})
        assert not any(x.requires_grad for x in (*got, *ppo))
        for name, x in before.items():
            assert torch.equal(torch.nan_to_num(batch[name].float()), torch.nan_to_num(x.float()))
        for x, y in pairwise(got):  # written to separately
            y_before = y.clone()
            x.add_(1)
            assert torch.equal(y, y_before)


def test_any_strides_autocast_and_inference_mode() -> None:
    batch = to(make_batch(24, 48, "right-padded"), torch.float32)
    expected = lambda_returns(**batch, tau=TAU)
    strided = {n: x.repeat_interleave(2, -1)[..., ::2] if x.ndim == 1 else x.T.clone().T for n, x in batch.items()}
    assert_equal(lambda_returns(**strided, tau=TAU), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(lambda_returns(**batch, tau=TAU), expected)
    op._powers.cache_clear()
    with torch.inference_mode():
        assert_equal(lambda_returns(**batch, tau=TAU), expected)
    assert_equal(lambda_returns(**batch, tau=TAU), expected)  # with the powers cached in inference mode
    row_mask = torch.ones(1, 48, dtype=torch.bool).expand(24, 48)
    full = to(make_batch(24, 48), torch.float32)
    assert_equal(lambda_returns(**full | {"mask": row_mask}, tau=TAU), lambda_returns(**full, tau=TAU))


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masks", MASKS)
def test_no_loop_over_time(masks: str) -> None:
    """64 times the tokens are 2 more levels of blocks of blocks, at most 70 operations and views each."""
    counts = []
    for T in (64, 4096):
        batch = make_batch(8, T, masks)
        with CountOperations() as operations:
            lambda_returns(**batch, tau=TAU, lam=1.0)
        counts.append(operations.count)
    assert counts[1] <= counts[0] + 2 * 70
    assert counts[1] < 400


def test_custom_operator() -> None:
    for masks in ("none", "right-padded", "holes"):
        batch = to(make_batch(3, 20, masks), torch.float32)
        arguments = [batch[name] for name in ("log_ratio", "values", "rewards", "mask", "bootstrap")]
        torch.library.opcheck(op._scan_op, (*arguments, None, TAU, 0.95, 1.0, 1.0))
    offsets = torch.tensor([0, 4, 20], dtype=torch.int32)
    torch.library.opcheck(
        op._scan_op, (None, torch.randn(20), torch.randn(2), None, None, offsets, 1.0, 0.95, 1.0, 1.0)
    )


def test_compiled_without_breaks_and_recompilation() -> None:
    def step(batch: Batch) -> tuple[Tensor, ...]:
        batch = batch | {"values": batch["values"] + 1}
        returns = lambda_returns(**batch, tau=TAU)
        del batch["log_ratio"]
        return (*returns, *gae(**batch))

    for packed in (False, True):
        torch._dynamo.reset()
        counter = CompileCounter()  # runs the captured graph as it is
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for _ in range(4):
            batch = to(make_batch(6, 32, "holes" if packed else "right-padded", per_token=False), torch.float32)
            if packed:
                flat = {name: x.flatten() for name, x in batch.items()}
                inner = torch.randint(0, 193, (5,)).sort().values
                offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([192])])
                batch = flat | {"cu_seqlens": offsets.int()}
            assert_equal(compiled(batch), step(batch))
        assert counter.frame_count == 1
        with pytest.raises(ValueError, match="expected a number"):
            torch.compile(lambda x: lambda_returns(x, x, x, tau=-1.0), backend="eager")(torch.zeros(2, 3))
    torch._dynamo.reset()
    batch = to(make_batch(6, 32, "right-padded"), torch.float32)
    assert_equal(torch.compile(step, fullgraph=True, backend="aot_eager")(batch), step(batch))


# Errors


PADDED: Batch = {"log_ratio": torch.zeros(4, 5), "values": torch.zeros(4, 5), "rewards": torch.zeros(4), "tau": TAU}
PACKED: Batch = {"log_ratio": torch.zeros(20), "values": torch.zeros(20), "rewards": torch.zeros(3), "tau": TAU,
          "cu_seqlens": torch.tensor([0, 4, 9, 20], dtype=torch.int32)}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (PADDED, {"tau": 0.0}, r"tau: got 0.0, expected a number in \(0, inf\)"),
        (PADDED, {"tau": float("nan")}, "tau: got nan"),
        (PADDED, {"tau": "0.05"}, "tau: got '0.05'"),
        (PADDED, {"lam": 1.01}, r"lam: got 1.01, expected a number in \[0, 1\]"),
        (PADDED, {"lam": -0.01}, "lam: got -0.01"),
        (PADDED, {"gamma": 2}, r"gamma: got 2, expected a number in \[0, 1\]"),
        (PADDED, {"alpha": 0.0}, r"alpha: got 0.0, expected a number in \(0, 1\]"),
        (PADDED, {"alpha": 1.5}, "alpha: got 1.5"),
        (PADDED, {"log_ratio": torch.zeros(5, 4)}, r"log_ratio: got shape \(5, 4\), expected \(4, 5\)"),
        (PADDED, {"log_ratio": torch.zeros(4, 5, dtype=torch.int64)}, "log_ratio: got dtype int64, expected float32"),
        (PADDED, {"values": torch.zeros(4, 5, device="meta")}, "log_ratio: got a tensor on cpu, expected meta"),
        (PADDED, {"values": [[0.0]]}, "values: got list, expected a tensor"),
        (PADDED, {"rewards": torch.zeros(5)}, r"rewards: got shape \(5,\), expected \(4, 5\) .* or \(4,\)"),
        (PADDED, {"rewards": torch.zeros(4, 1)}, r"rewards: got shape \(4, 1\)"),
        (PADDED, {"rewards": torch.zeros(4, dtype=torch.int32)}, "rewards: got dtype int32"),
        (PADDED, {"rewards": torch.zeros(4, device="meta")}, "rewards: got a tensor on meta, expected cpu"),
        (PADDED, {"mask": torch.ones(4, 5)}, "mask: got dtype float32, expected bool"),
        (PADDED, {"mask": torch.ones(4, dtype=torch.bool)}, r"mask: got shape \(4,\), expected \(4, 5\)"),
        (PADDED, {"mask": torch.ones(4, 5, dtype=torch.bool, device="meta")}, "mask: got a tensor on meta"),
        (PADDED, {"bootstrap": torch.zeros(5)}, r"bootstrap: got shape \(5,\), expected \(4,\)"),
        (PADDED, {"bootstrap": 0.0}, "bootstrap: got float, expected a tensor"),
        (PADDED, {"cu_seqlens": PACKED["cu_seqlens"]}, r"values: got shape \(4, 5\) with cu_seqlens, expected \(N,\)"),
        (PADDED, {"impl": "fast"}, "impl: got 'fast', expected"),
        (PACKED, {"cu_seqlens": None}, r"values: got shape \(20,\), expected \(B, T\), or \(N,\)"),
        (PACKED, {"cu_seqlens": torch.tensor([0, 4, 9, 20])}, "cu_seqlens: got dtype int64, expected int32"),
        (PACKED, {"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, r"cu_seqlens: got shape \(2, 2\)"),
        (PACKED, {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens: got shape \(0,\)"),
        (PACKED, {"cu_seqlens": [0, 20]}, "cu_seqlens: got list"),
        (PACKED, {"cu_seqlens": torch.tensor([1, 4, 9, 20]).int()}, "cu_seqlens: got offsets from 1 to 20"),
        (PACKED, {"cu_seqlens": torch.tensor([0, 4, 9, 19]).int()}, "offsets from 0 to 19, expected 0 to 20"),
        (PACKED, {"cu_seqlens": torch.tensor([0, 9, 4, 20]).int()}, r"cu_seqlens: got falling offsets \[0, 9, 4, 20\]"),
        (PACKED, {"rewards": torch.zeros(4)}, r"rewards: got shape \(4,\), expected \(20,\) .* or \(3,\)"),
        (PACKED, {"bootstrap": torch.zeros(20)}, r"bootstrap: got shape \(20,\), expected \(3,\)"),
        (PACKED, {"mask": torch.ones(1, 20, dtype=torch.bool)}, r"mask: got shape \(1, 20\), expected \(20,\)"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments: dict, change: dict, message: str, impl: str) -> None:
    arguments = {"impl": impl} | arguments | change
    with pytest.raises(ValueError, match=message):
        lambda_returns(**arguments)
    if not {"tau", "alpha", "log_ratio"} & change.keys() and "log_ratio" not in message:
        del arguments["log_ratio"], arguments["tau"]
        with pytest.raises(ValueError, match=message):
            gae(**arguments)


def test_triton_does_not_exist_yet() -> None:
    with pytest.raises(ValueError, match="impl"):
        lambda_returns(**PADDED, impl="triton")
