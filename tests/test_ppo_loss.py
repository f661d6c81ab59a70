"""ppo_loss against Algorithm 1 (arXiv 2508.17000, appendix B) written token by token in Python floats, and PPO's whole
arithmetic against TRL's numbers. test_theory.py has the penalties' meaning."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from klq_fast import gae, ppo_loss
from klq_fast.batch import Rollout
from klq_fast.ppo import PPO, whitened

Batch = dict[str, Any]  # tensors by the name of ppo_loss's argument
NAMES = ("logprobs", "old_logprobs", "values", "old_values", "advantages", "returns")


def make_batch(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 0.5) -> Batch:
    """With spread 0.5 two thirds of the ratios and of the values lie outside intervals of half-width 0.2."""
    old_logprobs, old_values = -3 * torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    batch = {
        "logprobs": old_logprobs + spread * torch.randn(shape, dtype=torch.float64),
        "old_logprobs": old_logprobs,
        "values": old_values + spread * torch.randn(shape, dtype=torch.float64),
        "old_values": old_values,
        "advantages": torch.randn(shape, dtype=torch.float64),
        "returns": torch.randn(shape, dtype=torch.float64),
    }
    batch = {name: x.to(dtype) for name, x in batch.items()}
    batch["logprobs"].requires_grad_()
    batch["values"].requires_grad_()
    return batch


def truth(
    batch: Batch,
    mask: Tensor | None,
    clip: float | None = 0.2,
    value_clip=0.2,
    value_coef=0.1,
    forward_kl_coef=0.0,
    reverse_kl_coef=0.0,
    num_tokens=None,
):
    """Loss, gradients by logprobs and values, and mean L_π, mean L_V and shares of clipped tokens: token by token."""
    flat = {name: x.detach().flatten().tolist() for name, x in batch.items()}
    count = len(flat["values"])
    valid = [True] * count if mask is None else mask.flatten().tolist()
    n = sum(valid)
    divisor = (n or 1) if num_tokens is None else num_tokens
    policy_sum = value_sum = 0.0
    clipped = value_clipped = 0
    policy_grad, value_grad = [0.0] * count, [0.0] * count
    for t in range(count):
        if not valid[t]:
            continue
        ratio = math.exp(flat["logprobs"][t] - flat["old_logprobs"][t])
        advantage, target = flat["advantages"][t], flat["returns"][t]
        inside = -advantage * ratio
        outside = inside if clip is None else -advantage * min(max(ratio, 1 - clip), 1 + clip)
        policy_sum += max(inside, outside)
        if inside >= outside:
            policy_grad[t] = inside / divisor  # d(−Âρ)/d log π = −Âρ
        else:
            clipped += 1
        policy_sum += forward_kl_coef * (ratio - 1 - math.log(ratio))
        policy_sum += reverse_kl_coef * (ratio * math.log(ratio) - ratio + 1)
        policy_grad[t] += forward_kl_coef * (ratio - 1) / divisor
        policy_grad[t] += reverse_kl_coef * ratio * math.log(ratio) / divisor
        value, old = flat["values"][t], flat["old_values"][t]
        inside = (value - target) ** 2
        outside = (min(max(value, old - value_clip), old + value_clip) - target) ** 2
        value_sum += max(inside, outside)
        if inside >= outside:
            value_grad[t] = value_coef * 2 * (value - target) / divisor
        else:
            value_clipped += 1
    loss = (policy_sum + value_coef * value_sum) / divisor
    means = [x / (n or 1) for x in (policy_sum, value_sum, clipped, value_clipped)]
    return loss, policy_grad, value_grad, means


def check(batch: Batch, mask: Tensor | None, tolerance: float, **options) -> None:
    loss, metrics = ppo_loss(**batch, mask=mask, **options)
    loss.backward()
    expected, policy_grad, value_grad, means = truth(batch, mask, **options)
    assert loss.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for x, grad in ((batch["logprobs"], policy_grad), (batch["values"], value_grad)):
        assert x.grad is not None
        torch.testing.assert_close(
            x.grad.double().flatten(), torch.tensor(grad, dtype=torch.float64), rtol=tolerance, atol=tolerance
        )
    names = ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction")
    for name, mean in zip(names, means, strict=True):
        assert metrics[name].item() == pytest.approx(mean, rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("shape", [(7, 13), (41,), (2, 3, 5), (0,), (4, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_is_algorithm_1(shape: tuple[int, ...], masked: bool) -> None:
    mask = torch.rand(shape) > 0.3 if masked else None
    check(make_batch(*shape), mask, 1e-13)
    check(make_batch(*shape), mask, 1e-13, clip=0.1, value_clip=0.7, value_coef=1.3, num_tokens=17.0)
    check(make_batch(*shape), mask, 1e-13, clip=None, forward_kl_coef=0.7)
    check(make_batch(*shape), mask, 1e-13, clip=None, forward_kl_coef=0.7, reverse_kl_coef=0.3, num_tokens=17.0)
    check(make_batch(*shape), mask, 1e-13, reverse_kl_coef=2.0)  # beside clipping


def test_float32_and_bfloat16_inputs() -> None:
    """Everything after the inputs is float32: a few roundings of 6e-8, of numbers up to e^2 · 4, averaged or not."""
    check(make_batch(50, 20, dtype=torch.float32), None, 2e-6)
    check(make_batch(50, 20, dtype=torch.float32), None, 2e-6, clip=None, forward_kl_coef=0.5, reverse_kl_coef=0.5)
    batch = make_batch(50, 20, dtype=torch.bfloat16)
    loss, metrics = ppo_loss(**batch)
    assert loss.dtype == metrics["approx_kl"].dtype == torch.float32
    assert loss.item() == pytest.approx(truth(batch, None)[0], rel=2e-6)
    loss.backward()
    assert batch["logprobs"].grad is not None and batch["logprobs"].grad.dtype == torch.bfloat16
    assert ppo_loss(**make_batch(3, dtype=torch.float64)).loss.dtype == torch.float64


def test_gradcheck() -> None:
    batch = make_batch(6, 5)
    fixed = {name: x for name, x in batch.items() if name not in ("logprobs", "values")}
    mask = torch.rand(6, 5) > 0.3

    for options in ({}, {"clip": None, "forward_kl_coef": 0.5, "reverse_kl_coef": 0.5}):

        def loss(logprobs: Tensor, values: Tensor, options: dict[str, Any] = options) -> Tensor:
            return ppo_loss(logprobs=logprobs, values=values, **fixed, mask=mask, **options).loss

        assert torch.autograd.gradcheck(loss, (batch["logprobs"], batch["values"]))


@pytest.mark.parametrize("options", [{}, {"clip": None, "forward_kl_coef": 0.5, "reverse_kl_coef": 0.5}])
def test_first_step_is_the_policy_gradient(options: dict[str, Any]) -> None:
    """With π = π_old the ratio is 1: the gradient by log π is −Â/n, nothing is clipped, the KL estimate is 0.

    The penalties change nothing in any token's gradient, which is why these estimators of them were chosen.
    """
    batch = make_batch(8, 9, dtype=torch.float32)
    batch["logprobs"] = batch["old_logprobs"].clone().requires_grad_()
    batch["values"] = batch["old_values"].clone().requires_grad_()
    mask = torch.rand(8, 9) > 0.3
    loss, metrics = ppo_loss(**batch, mask=mask, **options)
    loss.backward()
    n = mask.sum()
    # One division, and a multiplication by exactly 1: equal up to the order of the two, 1 unit in the last place.
    torch.testing.assert_close(
        batch["logprobs"].grad, torch.where(mask, -batch["advantages"] / n, 0.0), rtol=2e-7, atol=0.0
    )
    torch.testing.assert_close(
        batch["values"].grad,
        torch.where(mask, 0.1 * 2 * (batch["values"] - batch["returns"]) / n, 0.0).detach(),
        rtol=5e-7,
        atol=0.0,
    )
    for name in ("clip_fraction", "value_clip_fraction", "approx_kl"):
        assert metrics[name].item() == 0.0, name


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [
        (1.5, 1.0, False),  # already more likely than allowed, and rewarded: no further
        (1.5, -1.0, True),  # more likely, and punished: back
        (0.5, -1.0, False),
        (0.5, 1.0, True),
        (1.1, 1.0, True),
        (0.9, -1.0, True),
        (1.5, 0.0, True),  # a gradient of 0, but no clipping
    ],
)
def test_policy_clipping_stops_the_gradient_on_one_side(ratio: float, advantage: float, flows: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss, metrics = ppo_loss(logprobs, zero, zero, zero, zero + advantage, zero)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.item() == pytest.approx(-advantage * ratio if flows else 0.0)
    assert metrics["clip_fraction"].item() == (0.0 if flows else 1.0)
    bound = 1.2 if ratio > 1 else 0.8
    assert loss.item() == pytest.approx(-advantage * (ratio if flows else bound))


@pytest.mark.parametrize(
    ("value", "target", "flows"),
    [
        (1.0, 2.0, False),  # beyond old + clip and moving on towards the target
        (1.0, -2.0, True),  # beyond, and away from the target: back
        (0.1, 2.0, True),
        (-1.0, -2.0, False),
    ],
)
def test_value_clipping_stops_the_gradient_on_one_side(value: float, target: float, flows: bool) -> None:
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss, metrics = ppo_loss(zero, zero, values, zero, zero, zero + target, value_coef=1.0)
    (grad,) = torch.autograd.grad(loss, values)
    assert grad.item() == pytest.approx(2 * (value - target) if flows else 0.0)
    assert metrics["value_clip_fraction"].item() == (0.0 if flows else 1.0)
    assert loss.item() == pytest.approx((value - target) ** 2 if flows else (math.copysign(0.2, value) - target) ** 2)


def test_masked_slots_are_never_read() -> None:
    mask = torch.rand(9, 11) > 0.4
    clean = make_batch(9, 11)
    dirty: Batch = {}
    for i, (name, x) in enumerate(clean.items()):
        garbage = (float("nan"), float("inf"), -float("inf"))[i % 3]
        dirty[name] = torch.where(mask, x.detach(), garbage).requires_grad_(x.requires_grad)
    expected, expected_metrics = ppo_loss(**clean, mask=mask)
    loss, metrics = ppo_loss(**dirty, mask=mask)
    assert torch.equal(loss, expected)
    assert all(torch.equal(metrics[name], x) for name, x in expected_metrics.items())
    for name in ("logprobs", "values"):
        (grad,) = torch.autograd.grad(loss, dirty[name], retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, clean[name], retain_graph=True)
        assert torch.equal(grad, expected_grad)
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("num_tokens", [None, 7])
def test_all_masked(num_tokens: int | None) -> None:
    batch: Batch = {name: torch.full((3, 4), float("nan")) for name in NAMES}
    batch["logprobs"].requires_grad_()
    batch["values"].requires_grad_()
    loss, metrics = ppo_loss(**batch, mask=torch.zeros(3, 4, dtype=torch.bool), num_tokens=num_tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert all(x.item() == 0.0 for x in metrics.values())
    for name in ("logprobs", "values"):
        grad = batch[name].grad
        assert grad is not None and (grad == 0).all()


def test_microbatches_with_a_common_count_add_up() -> None:
    """Σ over microbatches of the loss with num_tokens = n equals the loss of the whole, whatever their lengths."""
    batch, mask = make_batch(6, 10), torch.rand(6, 10) > 0.5
    whole = ppo_loss(**batch, mask=mask).loss
    for n in (int(mask.sum()), mask.sum(), mask.sum().double()):
        parts = [
            ppo_loss(**{k: x[i : i + 2] for k, x in batch.items()}, mask=mask[i : i + 2], num_tokens=n).loss
            for i in range(0, 6, 2)
        ]
        assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-13)


def test_gradients_reach_logprobs_and_values_only() -> None:
    batch: Batch = {name: x.detach().requires_grad_() for name, x in make_batch(4, 5).items()}
    loss, metrics = ppo_loss(**batch)
    loss.backward()
    assert [name for name, x in batch.items() if x.grad is not None] == ["logprobs", "values"]
    assert not any(x.requires_grad for x in metrics.values())


def test_a_ratio_beyond_float32_is_clipped_with_gradient_zero() -> None:
    logprobs = torch.tensor([0.0], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    loss, _ = ppo_loss(logprobs, zero - 200, zero, zero, one, zero)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(-1.2) and grad.item() == 0.0


def test_approx_kl_estimates_the_divergence() -> None:
    """Over all tokens of a small vocabulary weighted by π_old, the mean of ρ − 1 − log ρ is KL(π_old‖π) exactly."""
    old, new = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    counts = (1000 * old.exp()).round()
    old = (counts / counts.sum()).log()  # probabilities that a finite sample can have
    tokens = torch.arange(5).repeat_interleave(counts.long())
    zero = torch.zeros(len(tokens), dtype=torch.float64)
    metrics = ppo_loss(new[tokens], old[tokens], zero, zero, zero, zero).metrics
    assert metrics["approx_kl"].item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-12)


def test_works_on_what_gae_returns() -> None:
    rewards, values = torch.randn(2, 5, 8)
    mask = torch.arange(8) < torch.tensor([8, 3, 0, 1, 5])[:, None]
    advantages, returns = gae(rewards, values, mask)
    logprobs = torch.randn(5, 8, requires_grad=True)
    loss, metrics = ppo_loss(logprobs, logprobs.detach(), values, values, advantages, returns, mask)
    assert loss.item() == pytest.approx((-advantages.sum() + 0.1 * advantages.square().sum()).item() / 17, rel=1e-5)
    assert metrics["returns"].item() == pytest.approx(returns.sum().item() / 17, rel=1e-5)


@pytest.mark.parametrize("penalty", ["none", "forward", "reverse"])
def test_the_algorithm_s_loss_is_this_one(penalty: Literal["none", "forward", "reverse"]) -> None:
    """`PPO.loss` on a microbatch, from hidden states, with the penalties' coefficients by Eqs. 5, 17 and 18."""
    B, T, V, D = 3, 5, 7, 4
    lengths = torch.tensor([5, 1, 3])
    batch = Rollout(
        prompt_tokens=torch.zeros(B, 1, dtype=torch.int64),
        prompt_lengths=torch.ones(B, dtype=torch.int64),
        response_tokens=torch.randint(V, (B, T)),
        response_lengths=lengths,
        ended=torch.zeros(B, dtype=torch.bool),
        logprobs=-torch.rand(B, T),
        values=torch.randn(B, T),
        advantages=torch.randn(B, T),
        returns=torch.randn(B, T),
    )
    hidden, head, values = torch.randn(B, T, D), torch.nn.Linear(D, V), torch.randn(B, T)
    ppo = PPO(
        tau=0.3,
        lam=0.9,
        gamma=1.0,
        alpha=0.25,
        clip=0.1,
        value_clip=0.15,
        value_coef=0.7,
        whiten=True,
        ppo_penalty=penalty,
        beta=0.6 if penalty == "forward" else None,
        temperature=0.8,
    )
    found = ppo.loss(batch.responses(), hidden[batch.mask], head, values[batch.mask], torch.tensor(11), None)
    logprobs = (head(hidden) / 0.8).log_softmax(-1).gather(-1, batch.response_tokens[..., None]).squeeze(-1)
    options: dict[str, dict[str, Any]] = {
        "none": {"clip": 0.1},
        "forward": {"clip": None, "forward_kl_coef": 0.6, "reverse_kl_coef": 0.3},
        "reverse": {"clip": None, "reverse_kl_coef": 0.3 / 0.25},
    }
    fixed = (batch.logprobs, values, batch.values, batch.advantages, batch.returns, batch.mask)
    expected = ppo_loss(logprobs, *fixed, value_clip=0.15, value_coef=0.7, num_tokens=11, **options[penalty])
    # The log-probabilities differ by float32's rounding, 1e-6 in sums of 9 numbers of size 1.
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for name, value in expected.metrics.items():
        assert found.metrics[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name


def test_compiles_without_a_break() -> None:
    batch, mask = make_batch(4, 6, dtype=torch.float32), torch.rand(4, 6) > 0.3
    compiled = torch.compile(ppo_loss, fullgraph=True, backend="aot_eager")
    loss, metrics = compiled(**batch, mask=mask)
    expected = ppo_loss(**batch, mask=mask)
    assert torch.equal(loss, expected.loss)
    assert all(torch.equal(metrics[name], x) for name, x in expected.metrics.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [0.0]}, "logprobs: got list, expected a tensor"),
        ({"logprobs": torch.zeros(4, 5, dtype=torch.int64)}, "logprobs: got dtype int64, expected float32 or"),
        *(({name: torch.zeros(4, 6)}, rf"{name}: got shape \(4, 6\), expected \(4, 5\)") for name in NAMES[1:]),
        ({"returns": torch.zeros(4, 5, device="meta")}, "returns: got a tensor on meta, expected cpu"),
        ({"mask": torch.ones(4, 5)}, "mask: got dtype float32, expected bool"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask: got shape \(5,\), expected \(4, 5\)"),
        ({"clip": 0.0}, r"clip: got 0.0, expected a number in \(0, inf\)"),
        ({"clip": float("nan")}, "clip: got nan"),
        ({"value_clip": -0.2}, "value_clip: got -0.2"),
        ({"forward_kl_coef": -1.0}, r"forward_kl_coef: got -1.0, expected a number in \[0, inf\)"),
        ({"reverse_kl_coef": float("inf")}, r"reverse_kl_coef: got inf, expected a number in \[0, inf\)"),
        ({"value_coef": -1.0}, r"value_coef: got -1.0, expected a number in \[0, inf\)"),
        ({"num_tokens": 0}, r"num_tokens: got 0, expected a number in \(0, inf\)"),
        ({"num_tokens": torch.ones(2)}, r"num_tokens: got shape \(2,\), expected \(\)"),
        ({"impl": "fast"}, "impl: got 'fast'"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {name: torch.zeros(4, 5) for name in NAMES} | change
    with pytest.raises(ValueError, match=message):
        ppo_loss(**arguments)


def test_has_no_triton_kernel() -> None:
    with pytest.raises(ValueError, match="impl"):
        ppo_loss(*torch.zeros(6, 4, 5), impl="triton")


# TRL 1.12.0's PPO trainer on its own inputs (tests/golden/make_trl_ppo.py ran it and wrote them down).

TRL: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "trl_ppo.json").read_text(encoding="utf-8"))
CONSTANTS = TRL["settings"]


def recorded(name: str, source: dict[str, Any] = TRL) -> Tensor:
    return torch.tensor(source[name])


def trl_masks() -> tuple[Tensor, Tensor]:
    """The response's tokens, and TRL's wider mask for values.

    TRL pays a score one step after the last token (the end-of-sequence token), to the state behind it, which it gives a
    value and trains it on the score; where the response fills the length, and has no such state, on the last token, as
    the paper's Algorithm 1 and we always do. So a row of its `rewards` and `values` is one step longer than ours.
    """
    return ~recorded("padding_mask"), ~recorded("padding_mask_p1")


def test_gae_is_trl_s() -> None:
    """On TRL's rewards and values, with its mask for values. Six float32 sums of numbers up to 8: 6 · 5e-7 at most."""
    _, mask = trl_masks()
    lam, gamma = CONSTANTS["lam"], CONSTANTS["gamma"]
    advantages, returns = gae(recorded("rewards"), recorded("values"), mask, lam=lam, gamma=gamma)
    assert mask.sum(1).unique().tolist() == [3, 4, 5, 6]
    assert advantages.abs().max() > 5
    torch.testing.assert_close(advantages[mask], recorded("advantages")[mask], rtol=0, atol=3e-6)
    torch.testing.assert_close(returns[mask], recorded("returns")[mask], rtol=0, atol=3e-6)


def test_whitening_is_trl_s() -> None:
    """A mean and a variance of 32 float32 numbers, each in its own order of summing: a few roundings of 1e-7."""
    mask, _ = trl_masks()
    torch.testing.assert_close(whitened(recorded("advantages"), mask), recorded("whitened"), rtol=1e-6, atol=1e-6)


def test_targets_are_trl_s_where_the_conventions_agree() -> None:
    """From log-probs, values and scores, on the rows that fill the length: their score comes with their last token."""
    mask, _ = trl_masks()
    full = mask.all(1)
    assert full.sum() == 2
    lengths = mask.sum(1)[full]
    rollout = Rollout(
        prompt_tokens=torch.zeros(2, 1, dtype=torch.int64),
        prompt_lengths=torch.ones(2, dtype=torch.int64),
        response_tokens=torch.zeros(2, mask.shape[1], dtype=torch.int64),
        response_lengths=lengths,
        ended=torch.zeros(2, dtype=torch.bool),
        logprobs=recorded("logprobs")[full],
        ref_logprobs=recorded("ref_logprobs")[full],
        values=recorded("values")[full],
        rewards=recorded("scores")[full],
    )
    ppo = PPO(
        tau=CONSTANTS["kl_coef"],
        lam=CONSTANTS["lam"],
        gamma=CONSTANTS["gamma"],
        alpha=1.0,
        clip=0.2,
        value_clip=0.2,
        value_coef=0.1,
        whiten=False,
        ppo_penalty="none",
        beta=None,
        temperature=1.0,
    )
    targets = ppo.targets(rollout)
    torch.testing.assert_close(targets.advantages, recorded("advantages")[full], rtol=0, atol=3e-6)
    torch.testing.assert_close(targets.returns, recorded("returns")[full], rtol=0, atol=3e-6)


@pytest.mark.parametrize("index", range(4))
def test_loss_is_trl_s(index: int) -> None:
    """Policy loss, value loss, clipped shares and both gradients, in the four steps of two epochs.

    TRL takes the policy's mean over the response's tokens and the value's over its wider mask, with a factor ½; so each
    is compared by itself. A few float32 roundings of numbers up to 40 (squares) and 3 (ratios times advantages).
    """
    step = TRL["steps"][index]
    rows = step["micro_batch_inds"]
    tokens, states = (mask[rows] for mask in trl_masks())
    names = "new_logprobs mb_logprobs vpred mb_values mb_advantage mb_return".split()
    arguments = [recorded(name, step) for name in names]
    logprobs, values = arguments[0].requires_grad_(), arguments[2].requires_grad_()
    options = {"clip": CONSTANTS["cliprange"], "value_clip": CONSTANTS["cliprange_value"]}

    loss, metrics = ppo_loss(*arguments, mask=tokens, **options, value_coef=0.0)
    assert loss.item() == pytest.approx(step["pg_loss"], rel=1e-6, abs=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(step["pg_clipfrac"], rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(grad, recorded("grad_logprobs", step), rtol=1e-6, atol=1e-7)

    value_coef = CONSTANTS["vf_coef"] / 2
    _, metrics = ppo_loss(*arguments, mask=states, **options)
    assert metrics["value_loss"].item() / 2 == pytest.approx(step["vf_loss"], rel=1e-6)
    assert metrics["value_clip_fraction"].item() == pytest.approx(step["vf_clipfrac"], rel=1e-6)
    loss = ppo_loss(*arguments, mask=states, **options, value_coef=value_coef).loss
    (grad,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(grad, recorded("grad_values", step), rtol=1e-6, atol=1e-7)
    if index:
        assert 0.2 < step["pg_clipfrac"] < 0.9 and 0.2 < step["vf_clipfrac"] < 0.9  # the clipping takes part
