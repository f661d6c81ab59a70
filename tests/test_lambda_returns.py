"""lambda_returns and gae against Algorithms 1 and 2 (arXiv 2508.17000) written in Python floats, and their laws."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from klq_fast import LambdaReturns, gae, lambda_returns
from klq_fast.kernels.lambda_returns import op
from klq_fast.kernels.lambda_returns.op import lambda_returns_with_metrics

Batch = dict[str, Any]  # arguments by name
TAU = 0.05
IMPLS = ("torch", "reference", "triton")
FAST = ("torch", "triton")
MASKS = ("none", "full", "right-padded", "holes")
EPS32, EPS64 = 2.0**-24, 2.0**-53  # half a unit in the last place: the error of one rounding


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def interpreted(impl: str) -> bool:
    """Then a row costs 60 ms for each 128 tokens."""
    return impl == "triton" and torch.get_default_device().type == "cpu"


def precisions(impl: str) -> list[tuple[torch.dtype, float]]:
    return [(torch.float32, EPS32)] if impl == "triton" else [(torch.float64, EPS64), (torch.float32, EPS32)]


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
    """Every number within 10 roundings of the sizes that went into it.

    On a CPU a number passes 5 elementwise operations, 3 steps of a product and a sum among eight tokens, and one more
    for what follows them, itself as good as exact: 13, of both signs; the worst seen was 3.1.
    """
    for name, x, y in zip(LambdaReturns._fields, got, expected, strict=True):
        assert x.shape == y.shape
        error = (x.double() - y).abs()
        assert (error <= 10 * eps * (scale + 1e-30)).all(), (
            f"{name}: off by {(error / (eps * scale)).max():.3g} roundings"
        )


def assert_rounded_once(got: LambdaReturns, expected: LambdaReturns, scale: Tensor) -> None:
    """The kernel computes in float64 and rounds each number to float32, once."""
    for name, x, y in zip(LambdaReturns._fields, got, expected, strict=True):
        assert x.dtype == torch.float32 and x.shape == y.shape
        error, allowed = (x.double() - y).abs(), EPS32 * y.abs() + 16 * EPS64 * scale + 1e-45
        assert (error <= allowed).all(), f"{name}: off by {(error / allowed).max():.3g} roundings"


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


# Against the truth


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_is_algorithm_2(masks: str, per_token: bool, bootstrap: bool, impl: Any) -> None:
    few = interpreted(impl)
    for B, T in ((2, 7), (1, 200), (5, 0), (0, 5)) if few else ((3, 7), (18, 100), (1, 1), (5, 0), (0, 5)):
        for lam, gamma, alpha in ((0.95, 1.0, 1.0), (0.97, 0.99, 0.3), (1.0, 1.0, 1.0))[
            1 if few else 0 : 2 if few else 3
        ]:
            batch = make_batch(B, T, masks, per_token=per_token, bootstrap=bootstrap)
            if not per_token and batch["mask"] is not None:  # ignored where a row has no valid token
                batch["rewards"][~batch["mask"].any(1)] = float("nan")
            numbers: Batch = {"lam": lam, "gamma": gamma, "alpha": alpha}
            for dtype, eps in precisions(impl):
                batch = to(batch, dtype)
                expected, scale = truth(**batch, **numbers)
                got = lambda_returns(**batch, tau=TAU, **numbers, impl=impl)
                assert all(x.dtype == dtype for x in got)
                assert_close(got, expected, scale, eps)
                if impl == "triton":
                    assert_rounded_once(got, expected, scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("per_token", [False, True])
def test_gae_is_algorithm_1(masks: str, per_token: bool, impl: Any) -> None:
    """Algorithm 1 is Algorithm 2 with τ = 0, which the truth allows: Q is then V."""
    for B, T in ((2, 7), (5, 0), (0, 5)) if interpreted(impl) else ((3, 7), (18, 100), (1, 1), (5, 0), (0, 5)):
        batch = make_batch(B, T, masks, per_token=per_token)
        del batch["log_ratio"]
        for dtype, eps in precisions(impl):
            batch = to(batch, dtype)
            expected, scale = truth(**batch, log_ratio=torch.zeros(B, T), tau=0.0, lam=0.9, gamma=0.99)
            advantages, returns = gae(**batch, lam=0.9, gamma=0.99, impl=impl)
            assert advantages.dtype == returns.dtype == dtype
            got = LambdaReturns(returns, expected.action_values, expected.td_errors, advantages)
            assert_close(got, expected, scale, eps)


@pytest.mark.parametrize("impl", FAST)
def test_lengths_around_the_blocks(impl: Any) -> None:
    """Padded to 270 tokens a row is one block of the kernel, packed blocks of 128, 96, 96: the bits are the same."""
    if impl == "torch":
        lengths = torch.tensor([0, 1, 2, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025])
    else:
        lengths = torch.tensor([0, 1, 127, 128, 129, 224, 225])
    width = max(270, int(lengths.max()))
    batch = to(make_batch(len(lengths), width), torch.float32)
    batch["mask"] = torch.arange(width) < lengths[:, None]
    for name in ("log_ratio", "values", "rewards"):
        batch[name][~batch["mask"]] = float("nan")
    expected, scale = truth(**batch)
    padded = lambda_returns(**batch, tau=TAU, impl=impl)
    assert_close(padded, expected, scale, EPS32)
    packed = lambda_returns(**pack(batch | {"mask": None}, batch["mask"]), tau=TAU, impl=impl)
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


@pytest.mark.parametrize("impl", FAST)
def test_low_precision_inputs_are_read_as_float32(impl: Any) -> None:
    shape = (1, 40) if interpreted(impl) else (5, 100)
    options: Batch = {"tau": TAU, "impl": impl}
    for dtype in (torch.bfloat16, torch.float16):
        batch = to(make_batch(*shape, "right-padded"), dtype)
        got = lambda_returns(**batch, **options)
        assert all(x.dtype == torch.float32 for x in got)
        assert_equal(got, lambda_returns(**to(batch, torch.float32), **options))
    mixed = to(make_batch(*shape), torch.float32)
    expected = lambda_returns(**mixed, **options)
    mixed |= {"rewards": mixed["rewards"].double(), "bootstrap": mixed["bootstrap"].double()}
    assert_equal(lambda_returns(**mixed, **options), expected)  # float64 rewards do not make float64 returns
    double = mixed | {"values": mixed["values"].double()}
    assert lambda_returns(**double, tau=TAU).returns.dtype == torch.float64
    with pytest.raises(ValueError, match=r"impl: got .* with float64 tensors"):
        lambda_returns(**double, tau=TAU, impl="triton")


# Laws


def law_batch(impl: str, masks: str = "none") -> tuple[Batch, Batch]:
    """Arguments, float64 where the implementation takes it, and tolerances: both for sums of 40 numbers of size 1."""
    batch = make_batch(2 if interpreted(impl) else 6, 40, masks)
    if impl == "triton":
        return to(batch, torch.float32), {"rtol": 1e-5, "atol": 1e-5}
    return batch, {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("masks", MASKS)
def test_lambda_0_gives_the_td_error(masks: str, impl: Any) -> None:
    batch, _ = law_batch(impl, masks)
    got = lambda_returns(**to(batch, torch.float32), tau=TAU, lam=0.0, impl=impl)
    assert torch.equal(got.advantages, got.td_errors)


@pytest.mark.parametrize("impl", FAST)
def test_lambda_1_gives_monte_carlo(impl: Any) -> None:
    """With λ = γ = 1 the values telescope: G_t = r_t + Σ_{k>t} (r_k − τℓ_k) + bootstrap, whatever V."""
    batch, close = law_batch(impl)
    got = lambda_returns(**batch, tau=TAU, lam=1.0, impl=impl)
    penalised = batch["rewards"] - TAU * batch["log_ratio"]
    to_go = penalised.flip(1).cumsum(1).flip(1) + batch["bootstrap"][:, None]
    torch.testing.assert_close(got.returns, to_go + TAU * batch["log_ratio"], **close)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("masks", MASKS)
def test_alpha_near_0_gives_the_action_value(masks: str, impl: Any) -> None:
    batch, _ = law_batch(impl, masks)
    got = lambda_returns(**to(batch, torch.float32), tau=TAU, alpha=1e-30, impl=impl)
    assert torch.equal(got.returns, got.action_values)
    assert got.advantages.abs().max() > 1


@pytest.mark.parametrize("impl", FAST)
def test_linear_in_rewards_values_and_log_ratio(impl: Any) -> None:
    (one, close), (two, _) = law_batch(impl), law_batch(impl)
    options: Batch = {"tau": TAU, "gamma": 0.9, "alpha": 0.7, "impl": impl}
    both = {name: None if x is None else 2 * x - 3 * two[name] for name, x in one.items()}
    got = lambda_returns(**both, **options)
    for x, y, z in zip(got, lambda_returns(**one, **options), lambda_returns(**two, **options), strict=True):
        torch.testing.assert_close(x, 2 * y - 3 * z, **close)


@pytest.mark.parametrize("impl", FAST)
def test_shifted_values(impl: Any) -> None:
    """V + c everywhere (bootstrap too): δ moves by (γ − 1)c, Δ by the geometric sum of that, Q by c."""
    c, lam, gamma = 2.5, 0.8, 0.9
    batch, close = law_batch(impl)
    before = lambda_returns(**batch, tau=TAU, lam=lam, gamma=gamma, impl=impl)
    batch |= {"values": batch["values"] + c, "bootstrap": batch["bootstrap"] + c}
    after = lambda_returns(**batch, tau=TAU, lam=lam, gamma=gamma, impl=impl)
    left = 40 - torch.arange(40, dtype=batch["values"].dtype)
    moved = (gamma - 1) * c * (1 - (lam * gamma) ** left) / (1 - lam * gamma)
    torch.testing.assert_close(after.td_errors, before.td_errors + (gamma - 1) * c, **close)
    torch.testing.assert_close(after.advantages, before.advantages + moved, **close)
    torch.testing.assert_close(after.action_values, before.action_values + c, **close)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("cut", [1, 16, 39])
def test_split_and_bootstrap_equals_whole(cut: int, impl: Any) -> None:
    """The left part of a split row, bootstrapped with V(s_cut) + λ Δ_cut, has the λ-returns of the whole."""
    options: Batch = {"tau": TAU, "lam": 0.8, "gamma": 0.9, "impl": impl}
    batch, close = law_batch(impl)
    whole = lambda_returns(**batch, **options)
    tokens = {name: x for name, x in batch.items() if x is not None and x.ndim == 2}
    right_part, left_part = ({name: x[:, s] for name, x in tokens.items()} for s in (slice(cut, None), slice(cut)))
    right = lambda_returns(**right_part, bootstrap=batch["bootstrap"], **options)
    carried = right_part["values"][:, 0] + 0.8 * right.advantages[:, 0]
    left = lambda_returns(**left_part, bootstrap=carried, **options)
    for name in ("advantages", "returns", "action_values"):
        joined = torch.cat([getattr(left, name), getattr(right, name)], 1)
        torch.testing.assert_close(joined, getattr(whole, name), **close)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("masks", MASKS)
def test_advantages_are_gae_on_penalised_rewards(masks: str, impl: Any) -> None:
    """KLQ's Δ is PPO's Â on r − τℓ, with the same λ and γ."""
    batch, close = law_batch(impl, masks)
    options: Batch = {"bootstrap": batch["bootstrap"], "lam": 0.9, "gamma": 0.97, "impl": impl}
    penalised, values, mask = batch["rewards"] - TAU * batch["log_ratio"], batch["values"], batch["mask"]
    klq = lambda_returns(batch["log_ratio"], values, batch["rewards"], mask, tau=TAU, **options)
    advantages, returns = gae(penalised, values, mask, **options)
    torch.testing.assert_close(advantages, klq.advantages, **close)
    valid_values = values if mask is None else torch.where(mask, values, 0.0)
    torch.testing.assert_close(returns, klq.advantages + valid_values, **close)


# Metrics


def assert_metrics(batch: Batch, impl: Any, **numbers: float) -> None:
    """Against the formulas, on results of the specification in float64."""
    _, metrics = lambda_returns_with_metrics(**batch, tau=TAU, **numbers, impl=impl)
    exact = lambda_returns(**to(batch, torch.float64), tau=TAU, **numbers, impl="reference")
    valid = torch.ones_like(exact.returns, dtype=torch.bool) if batch["mask"] is None else batch["mask"]
    advantages, targets = exact.advantages[valid], (exact.action_values + exact.advantages)[valid]
    expected = {
        "td_error": exact.td_errors[valid].mean(),
        "kl": batch["log_ratio"][valid].double().mean(),
        "advantage": advantages.mean(),
        "advantage_std": advantages.std(correction=0),
        "explained_variance": 1 - advantages.var(correction=0) / targets.var(correction=0),
    }
    assert metrics.keys() == expected.keys()
    for name, x in metrics.items():
        assert x.shape == () and x.dtype == torch.float32
        # float32 results, whose roundings the float64 sums inherit; 1 − 1/3 loses a bit.
        torch.testing.assert_close(x.double(), expected[name], rtol=2e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
def test_metrics(masks: str, impl: Any) -> None:
    batch = to(make_batch(*((2, 150) if interpreted(impl) else (6, 1500)), masks, per_token=False), torch.float32)
    assert_metrics(batch, impl, lam=0.9, gamma=0.97, alpha=0.5)
    plain = lambda_returns(**batch, tau=TAU, lam=0.9, impl=impl)
    assert_equal(lambda_returns_with_metrics(**batch, tau=TAU, lam=0.9, impl=impl)[0], plain)
    with pytest.raises(TypeError, match="tau"):
        lambda_returns_with_metrics(**batch, impl=impl)
    with pytest.raises(ValueError, match="tau: got -1"):
        lambda_returns_with_metrics(**batch, tau=-1, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_metrics_of_packed_sequences_and_of_large_values(impl: Any) -> None:
    """Values of 10⁴ ± 1, of which a variance by E[x²] − E[x]² in float32 would leave nothing."""
    keep = torch.arange(40) < torch.tensor([[40], [0], [1], [25]])
    batch = pack(to(make_batch(4, 40), torch.float32), keep)
    assert_metrics(batch, impl)
    batch["values"] += 1e4
    batch["bootstrap"] += 1e4
    _, metrics = lambda_returns_with_metrics(**batch, tau=TAU, impl=impl)
    exact = lambda_returns(**to(batch, torch.float64), tau=TAU, impl="reference")
    variance = exact.advantages.var(correction=0) / (exact.action_values + exact.advantages).var(correction=0)
    # Results near 10⁴ are off by up to 5e-4 each, the variance's square root on average by much less.
    assert metrics["explained_variance"].item() == pytest.approx(1 - variance.item(), abs=2e-3)
    assert metrics["advantage_std"].item() == pytest.approx(exact.advantages.std(correction=0).item(), rel=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_metrics_of_nothing_and_of_constants(impl: Any) -> None:
    nan = torch.full((2, 5), float("nan"))
    _, metrics = lambda_returns_with_metrics(nan, nan, nan, torch.zeros(2, 5, dtype=torch.bool), tau=TAU, impl=impl)
    assert all(x == 0 for x in metrics.values())
    one = torch.ones(2, 5)
    _, metrics = lambda_returns_with_metrics(0 * one, one, 0 * one, tau=TAU, bootstrap=one[:, 0], impl=impl)
    assert all(x == 0 for x in metrics.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_explained_variance_of_constant_targets(impl: Any) -> None:
    """With λ = γ = 1 and ℓ = 0, Q + Δ is a row's score plus its bootstrap whatever V, up to rounding."""
    shapes = ((3, 40),) if interpreted(impl) else ((1, 1), (3, 40), (8, 300), *[(2, 4096)] * (impl == "torch"))
    numbers = ((0, 0.7, 0), (0, 0, 0), (10, 3.3, 0), (1000, 0.7, 1000.3))
    for (B, T), (mean, score, bootstrap) in product(shapes, numbers):
        for dtype, _ in precisions(impl):
            values = mean + torch.randn(B, T, dtype=dtype)
            scores, ends = (torch.full((B,), x, dtype=dtype) for x in (score, bootstrap))
            options: Batch = {"tau": TAU, "lam": 1.0, "bootstrap": ends, "impl": impl}
            _, metrics = lambda_returns_with_metrics(torch.zeros_like(values), values, scores, **options)
            assert metrics["explained_variance"] == 0
            if B == 1:
                continue
            scores += 0.01 * (mean + 1) * torch.arange(B)  # these do vary, if only by a hundredth of the values' size
            _, metrics = lambda_returns_with_metrics(torch.zeros_like(values), values, scores, **options)
            targets = (scores + ends)[:, None].expand(B, T).double()
            expected = 1 - (targets - values).var(correction=0) / targets.var(correction=0)
            assert metrics["explained_variance"].item() == pytest.approx(expected.item(), rel=0.01, abs=0.01)


# Masks, packing, independence: to the bit


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("per_token", [False, True])
def test_holes_equal_compact_scan_scatter(per_token: bool, impl: Any) -> None:
    B, T = (3, 140) if interpreted(impl) else (30, 140)
    for dtype, _ in precisions(impl):
        batch = to(make_batch(B, T, "holes", per_token=per_token), dtype)
        batch["mask"][2] = False
        got = lambda_returns(**batch, tau=TAU, gamma=0.99, impl=impl)
        for b in range(B):
            keep, row = batch["mask"][b], {n: x[b : b + 1] for n, x in batch.items()}
            alone = {n: x[:, keep] if x.ndim == 2 else x for n, x in row.items()} | {"mask": None}
            for x, y in zip(got, lambda_returns(**alone, tau=TAU, gamma=0.99, impl=impl), strict=True):
                # The kernel's groups of 32 tokens are other ones without the holes: float64 then rounds to the same.
                assert torch.equal(x[b, keep], y[0])
                assert (x[b, ~keep] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masks", MASKS)
def test_packed_equals_padded(masks: str, impl: Any) -> None:
    few = interpreted(impl)
    shapes = ((2, 140),) if few else ((1, 1), (3, 7)) if impl == "reference" else ((1, 1), (3, 7), (60, 48), (20, 300))
    options = ((False, True), (True, False)) if few else tuple(product((False, True), repeat=2))
    for (dtype, _), (B, T), (per_token, bootstrap) in product(precisions(impl), shapes, options):
        batch = to(make_batch(B, T, masks, per_token=per_token, bootstrap=bootstrap), dtype)
        keep = torch.arange(T) < torch.randint(0, T + 1, (B, 1))
        keep[0] = True
        packed = pack(batch, keep)
        padded = batch | {"mask": keep if batch["mask"] is None else keep & batch["mask"]}
        expected = lambda_returns(**padded, tau=TAU, alpha=0.5, impl=impl)
        assert_equal(lambda_returns(**packed, tau=TAU, alpha=0.5, impl=impl), tuple(x[keep] for x in expected))
        del packed["log_ratio"], padded["log_ratio"]
        assert_equal(gae(**packed, impl=impl), tuple(x[keep] for x in gae(**padded, impl=impl)))


@pytest.mark.parametrize("impl", FAST)
def test_a_row_is_the_same_in_any_batch(impl: Any) -> None:
    """Its bits do not depend on the other rows, on its place, on the width, on the layout or on the run."""
    few = interpreted(impl)
    for T in (53,) if few else (16, 17, 53, 320, 1100):
        batch = to(make_batch(4 if few else 300, T, "right-padded", per_token=False), torch.float32)
        got = lambda_returns(**batch, tau=TAU, impl=impl)
        assert_equal(lambda_returns(**batch, tau=TAU, impl=impl), got)
        for rows in [slice(1, 2)] if few else (slice(7, 8), slice(40, 43), slice(0, 12), slice(100, 299)):
            alone = {name: x[rows] for name, x in batch.items()}
            assert_equal(lambda_returns(**alone, tau=TAU, impl=impl), tuple(x[rows] for x in got))
        wider = {name: torch.cat([x, x[:, :9]], 1) if x.ndim == 2 else x for name, x in batch.items()}
        wider["mask"][:, T:] = False
        assert_equal(lambda_returns(**wider, tau=TAU, impl=impl), tuple(torch.cat([x, 0 * x[:, :9]], 1) for x in got))


@pytest.mark.parametrize("impl", FAST)
def test_a_broken_row_stays_alone(impl: Any) -> None:
    """A NaN among one row's valid tokens reaches that row only."""
    B, broken = (3, 1) if interpreted(impl) else (20, 7)
    batch = to(make_batch(B, 64), torch.float32)
    expected = lambda_returns(**batch, tau=TAU, impl=impl)
    batch["rewards"][broken, 20] = float("nan")
    packed = pack(batch, torch.ones(B, 64, dtype=torch.bool))
    others = torch.arange(B) != broken
    for got in (lambda_returns(**batch, tau=TAU, impl=impl), lambda_returns(**packed, tau=TAU, impl=impl)):
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x.view(B, 64)[others], y[others])
        assert got.returns.view(B, 64)[broken, :20].isnan().all()


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


@pytest.mark.parametrize("impl", FAST)
def test_as_many_sequences_as_tokens(impl: Any) -> None:
    """(N,) rewards with S = N are taken as one per token; for sequences of one token both readings agree."""
    log_ratio, values, rewards = torch.randn(3, 9)
    options: Batch = {"tau": TAU, "impl": impl}
    got = lambda_returns(log_ratio, values, rewards, **options, cu_seqlens=torch.arange(10, dtype=torch.int32))
    torch.testing.assert_close(got.advantages, rewards - TAU * log_ratio - values, rtol=1e-6, atol=1e-6)
    got = lambda_returns(log_ratio, values, rewards, **options, cu_seqlens=torch.tensor([0] * 9 + [9]).int())
    padded = lambda_returns(log_ratio[None], values[None], rewards[None], **options)
    assert_equal(got, tuple(x[0] for x in padded))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_packed(impl: Any) -> None:
    for cu_seqlens in (torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        none, rows = torch.zeros(0), torch.ones(len(cu_seqlens) - 1)
        got = lambda_returns(none, none, rows, tau=TAU, bootstrap=rows, cu_seqlens=cu_seqlens, impl=impl)
        assert all(x.shape == (0,) and x.dtype == torch.float32 for x in got)


# How it runs


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("masks", MASKS)
def test_no_gradient_and_no_change_of_the_arguments(masks: str, impl: Any) -> None:
    batch = to(make_batch(2, 33, masks), torch.float32)
    before = {name: x.clone() for name, x in batch.items() if x is not None}
    for x in batch.values():
        if x is not None and x.is_floating_point():
            x.requires_grad_()
    got = lambda_returns(**batch, tau=TAU, impl=impl)
    ppo = gae(**{name: x for name, x in batch.items() if name != "log_ratio"}, impl=impl)
    assert not any(x.requires_grad for x in (*got, *ppo))
    for name, x in before.items():
        assert torch.equal(torch.nan_to_num(batch[name].float()), torch.nan_to_num(x.float()))
    for x, y in pairwise(got):  # written to separately
        y_before = y.clone()
        x.add_(1)
        assert torch.equal(y, y_before)


@pytest.mark.parametrize("impl", FAST)
def test_any_strides_autocast_and_inference_mode(impl: Any, device: torch.device) -> None:
    B = 2 if interpreted(impl) else 24
    options: Batch = {"tau": TAU, "impl": impl}
    batch = to(make_batch(B, 48, "right-padded"), torch.float32)
    expected = lambda_returns(**batch, **options)
    strided = {n: x.repeat_interleave(2, -1)[..., ::2] if x.ndim == 1 else x.T.contiguous().T for n, x in batch.items()}
    assert_equal(lambda_returns(**strided, **options), expected)
    slices = {n: x if x.ndim == 1 else torch.cat([x, x], 1)[:, :48] for n, x in batch.items()}  # rows far apart
    assert_equal(lambda_returns(**slices, **options), expected)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_equal(lambda_returns(**batch, **options), expected)
    with torch.inference_mode():
        assert_equal(lambda_returns(**batch, **options), expected)
    row_mask = torch.ones(1, 48, dtype=torch.bool).expand(B, 48)
    full = to(make_batch(B, 48), torch.float32)
    assert_equal(lambda_returns(**full | {"mask": row_mask}, **options), lambda_returns(**full, **options))


@pytest.mark.cpu
def test_threads_at_the_same_time() -> None:
    """The scan runs without Python's lock."""
    batches = [to(make_batch(64, 500, masks), torch.float32) for masks in MASKS * 4]
    expected = [lambda_returns(**batch, tau=TAU) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        for got, alone in zip(
            threads.map(lambda batch: lambda_returns(**batch, tau=TAU), batches), expected, strict=True
        ):
            assert_equal(got, alone)


@pytest.mark.cpu
def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for masks in MASKS:
        batch = to(make_batch(100, 500, masks), torch.float32)
        results = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(lambda_returns(**batch, tau=TAU))
        assert_equal(results[1], results[0])
        assert_equal(results[2], results[0])


@pytest.mark.cpu
def test_tensors_that_are_not_what_they_seem() -> None:
    """A mask whose True is a byte other than 1, a lazily negated view, and tensors without contents."""
    batch = to(make_batch(5, 50, "holes"), torch.float32)
    expected = lambda_returns(**batch, tau=TAU)
    odd = (batch["mask"].to(torch.uint8) * torch.randint(1, 256, (5, 50), dtype=torch.uint8)).view(torch.bool)
    assert_equal(lambda_returns(**batch | {"mask": odd}, tau=TAU), expected)
    assert_equal(lambda_returns(**batch | {"values": torch._neg_view(-batch["values"])}, tau=TAU), expected)
    with FakeTensorMode():
        fake = torch.empty(5, 50)
        assert lambda_returns(fake, fake, fake, tau=TAU).returns.shape == (5, 50)
    meta = torch.empty(5, 50, device="meta")
    assert gae(meta, meta)[0].device.type == "meta"

    def scan(x: Tensor) -> Tensor:
        return lambda_returns(x, x, x, tau=TAU).returns

    x = torch.randn(2, 5, 50)
    assert torch.equal(make_fx(scan)(x[0])(x[1]), scan(x[1]))


@pytest.mark.parametrize("impl", FAST)
def test_custom_operator(impl: str) -> None:
    numbers = (TAU, 0.95, 1.0, 1.0)
    for masks, metrics in (("none", False), ("holes", True)):
        batch = to(make_batch(2, 20, masks), torch.float32)
        arguments = [batch[name] for name in ("log_ratio", "values", "rewards", "mask", "bootstrap")]
        torch.library.opcheck(op._scan_op, (*arguments, None, *numbers, metrics, impl))
    offsets = torch.tensor([0, 4, 20], dtype=torch.int32)
    gae_arguments = (None, torch.randn(20), torch.randn(2), None, None, offsets)
    torch.library.opcheck(op._scan_op, (*gae_arguments, *numbers, False, impl))


@pytest.mark.parametrize("impl", FAST)
def test_compiled_without_breaks_and_recompilation(impl: Any) -> None:
    def step(batch: Batch) -> tuple[Tensor, ...]:
        batch = batch | {"values": batch["values"] + 1}
        returns, metrics = lambda_returns_with_metrics(**batch, tau=TAU, impl=impl)
        del batch["log_ratio"]
        return (*returns, *metrics.values(), *gae(**batch, impl=impl))

    B, lengths = (2, (32, 40)) if interpreted(impl) else (6, (32, 40, 33, 31))
    for packed in (False, True):
        torch._dynamo.reset()
        counter = CompileCounter()  # runs the captured graph as it is
        compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
        for T in lengths:
            batch = to(make_batch(B, T, "holes" if packed else "right-padded", per_token=False), torch.float32)
            if packed:
                flat = {name: x.flatten() for name, x in batch.items()}
                inner = torch.randint(0, B * T + 1, (B - 1,)).sort().values
                offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([B * T])])
                batch = flat | {"cu_seqlens": offsets.int()}
            assert_equal(compiled(batch), step(batch))
        assert counter.frame_count == 1
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="expected a number"):
        torch.compile(lambda x: lambda_returns(x, x, x, tau=-1.0), backend="eager")(torch.zeros(2, 3))
    batch = to(make_batch(B, 32, "right-padded"), torch.float32)
    assert_equal(torch.compile(step, fullgraph=True, backend="aot_eager")(batch), step(batch))


@pytest.mark.cuda
@pytest.mark.parametrize("packed", [False, True])
def test_no_host_sync_and_graph_capture(packed: bool) -> None:
    """Nothing waits on the host; a captured graph follows new inputs, masks and offsets included."""

    def run(batch: Batch) -> tuple[Tensor, ...]:
        results, metrics = lambda_returns_with_metrics(**batch, tau=TAU)
        return (*results, *metrics.values())

    batches = [to(make_batch(40, 300, "holes", per_token=False), torch.float32) for _ in range(2)]
    if packed:
        flat = [{name: x.flatten() for name, x in batch.items()} for batch in batches]
        inner = [torch.randint(0, 12001, (39,)).sort().values for _ in flat]
        ends = torch.tensor([0]), torch.tensor([12000])
        batches = [b | {"cu_seqlens": torch.cat([ends[0], x, ends[1]]).int()} for b, x in zip(flat, inner, strict=True)]
    expected = [run(batch) for batch in batches]
    static = {name: x.clone() for name, x in batches[0].items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    for batch, results in zip(batches, expected, strict=True):
        for name, x in batch.items():
            static[name].copy_(x)
        graph.replay()
        assert_equal(captured, results)


# Errors


PADDED: Batch = {"log_ratio": torch.zeros(4, 5), "values": torch.zeros(4, 5), "rewards": torch.zeros(4), "tau": TAU}
PACKED: Batch = {"log_ratio": torch.zeros(20), "values": torch.zeros(20), "rewards": torch.zeros(3), "tau": TAU,
          "cu_seqlens": torch.tensor([0, 4, 9, 20], dtype=torch.int32)}  # fmt: skip


@pytest.mark.cpu
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
