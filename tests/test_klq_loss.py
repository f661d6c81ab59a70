"""klq_loss and linear_klq_loss: values, gradients, metrics, masks, and what they cost."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from watch import watch

from klq_fast import KLQLoss, KLQLossOutput, LinearKLQLoss, klq_loss, linear_klq_loss, linear_logprobs
from klq_fast.kernels.klq_loss import op
from klq_fast.kernels.linear_logprob import op as head_op

IMPLS = ("torch", "triton", "reference")
FUSED = ("torch", "triton")
TRAINED = ("logprobs", "hidden", "weight", "bias", "values")


@pytest.fixture(autouse=True)
def _tensors_on_the_device(device):
    with device if device.type == "cuda" else nullcontext():
        yield


def make_targets(shape: tuple[int, ...], dtype=torch.float32) -> dict[str, Tensor]:
    return {
        "ref_logprobs": torch.randn(shape, dtype=dtype) - 3,
        "values": torch.randn(shape, dtype=dtype),
        "returns": torch.randn(shape, dtype=dtype),
        "mask": torch.rand(shape) < 0.7,
    }


def make_plain(shape: tuple[int, ...] = (5, 9), dtype=torch.float32) -> dict[str, Any]:
    return {"logprobs": torch.randn(shape, dtype=dtype) - 3, **make_targets(shape, dtype)}


def make_linear(
    shape: tuple[int, ...] = (5, 9), depth: int = 12, vocab: int = 37, dtype=torch.float32, target_dtype=torch.float32
) -> dict[str, Any]:
    tokens = torch.randint(0, vocab, shape)
    if tokens.numel() >= 2:
        tokens.view(-1)[:2] = torch.tensor([0, vocab - 1])
    return {
        "hidden": torch.randn(*shape, depth).to(dtype),
        "weight": (torch.randn(vocab, depth) * (3 * depth**-0.5)).to(dtype),
        "tokens": tokens,
        **make_targets(shape, target_dtype),
        "bias": torch.randn(vocab).to(dtype),
    }


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each
        for name, each in arguments.items()
    }


def run(arguments: dict[str, Any], frozen: tuple[str, ...] = (), grad_output: float = 1.0, **options: Any):
    """The output, and the gradients by name."""
    arguments = {
        name: each.detach().requires_grad_() if name in TRAINED and name not in frozen and each is not None else each
        for name, each in arguments.items()
    }
    function = klq_loss if "logprobs" in arguments else linear_klq_loss
    out: KLQLossOutput = function(**arguments, tau=0.3, **options)
    trained = {name: each for name, each in arguments.items() if isinstance(each, Tensor) and each.requires_grad}
    gradients = torch.autograd.grad(out.loss, list(trained.values()), torch.full((), grad_output, dtype=out.loss.dtype))
    return out, dict(zip(trained, gradients, strict=True))


def assert_same(ours, theirs, rtol: float, atol: float) -> None:
    """Loss, logprobs, metrics and gradients; atol relative to the largest entry of each."""
    flat = [
        {"loss": out.loss, "logprobs": out.logprobs, **out.metrics, **gradients} for out, gradients in (ours, theirs)
    ]
    assert flat[0].keys() == flat[1].keys()
    for name, expected in flat[1].items():
        absolute = atol * (expected.abs().max().item() if expected.numel() else 0.0)
        torch.testing.assert_close(
            flat[0][name].double(), expected.double(), rtol=rtol, atol=absolute, msg=partial("{}: {}".format, name)
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl) -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    values = torch.tensor([1.0, 3.0], requires_grad=True)
    out = klq_loss(logprobs, torch.tensor([-2.0, -2.5]), values, torch.tensor([2.0, 2.0]), tau=0.5, impl=impl)
    # Q = 0.5·(1, 0.5) + (1, 3) = (1.5, 3.25); Q − G = (−0.5, 1.25).
    assert out.loss.item() == (0.25 + 1.5625) / 2
    expected = {
        "td_error": -0.375,
        "kl": 0.75,
        "explained_variance": 0.0,  # G is constant
        "value_error": 1.0,
        "values": 2.0,
        "returns": 2.0,
    }
    assert {name: metric.item() for name, metric in out.metrics.items()} == expected
    out.loss.backward()
    assert logprobs.grad is not None
    assert values.grad is not None
    assert logprobs.grad.tolist() == [-0.5 * 0.5, 1.25 * 0.5]  # 2·τ·(Q − G) / 2
    assert values.grad.tolist() == [-0.5, 1.25]
    assert not out.logprobs.requires_grad
    assert out.logprobs.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("make", [make_plain, make_linear])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("num_tokens", [None, 17, 40.5, torch.tensor(23), torch.tensor(11.0)])
def test_equals_reference(make, masked, num_tokens) -> None:
    arguments = make()
    if not masked:
        arguments["mask"] = None
    options = {"num_tokens": num_tokens, "policy_weight": 2.5, "value_weight": 0.3}
    truth = run(doubled(arguments), **options, impl="reference")
    assert_same(run(doubled(arguments), **options, impl="torch"), truth, rtol=1e-12, atol=1e-13)
    # float32: some ten roundings.
    assert_same(run(arguments, **options, impl="triton"), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FUSED)
def test_error_is_at_most_twice_eager(monkeypatch, impl, dtype, with_bias, temperature, softcap) -> None:
    arguments = make_linear((67,) if impl == "torch" else (11,), 130, 1031, dtype)
    if not with_bias:
        del arguments["bias"]
    options = {"temperature": temperature, "softcap": softcap}
    truth = run(doubled(arguments), **options, impl="reference")
    eager = run(arguments, **options, impl="reference")  # multiplies in float32
    if impl == "triton":
        monkeypatch.setattr(head_op, "chunk_rows", lambda *_: 4)
    ours = run(arguments, **options, impl=impl)
    assert ours[0].loss.dtype == ours[0].logprobs.dtype == torch.float32
    assert all(each.dtype == arguments[name].dtype for name, each in ours[1].items())
    assert (ours[0].loss.double() - truth[0].loss).abs() < 1e-5 * truth[0].loss
    rounded = impl == "triton" and dtype == torch.bfloat16
    for name, exact in truth[1].items():
        one_row = rounded and name == "bias"  # a row of one entry could be right by chance
        errors, their_errors, sizes = (
            each.abs().reshape(1 if one_row else len(exact), -1).amax(dim=1)
            for each in (ours[1][name].double() - exact, eager[1][name].double() - exact, exact)
        )
        # 32 float32 roundings of the largest entry, half a unit in the last place of a 16-bit row. bfloat16 operands
        # of the gradients add one and a half such units, where the interpreter truncates E.
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 and name != "values" else 0.0
        bound = 2 * their_errors + 32 * 2**-24 * exact.abs().max() + rounding / 2 * sizes * (4 if rounded else 1)
        if dtype == torch.float16:
            bound += 2**-25  # half of float16's smallest number
        assert (errors <= bound).all(), f"{name}: {(errors / bound).max()} times the bound"
        scale = ((ours[1][name] * exact).sum() / exact.square().sum()).item()
        assert abs(scale - 1) < 0.006, f"{name}: {scale} times what it should be"


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("impl", "dtype"), [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)]
)
def test_fused_equals_the_composition(impl, dtype, softcap) -> None:
    """linear_klq_loss is klq_loss of linear_logprobs: every output and every gradient."""
    arguments = make_linear((20,), 16, 101, dtype, dtype)
    options: dict[str, Any] = {"policy_weight": 3.0, "value_weight": 0.1, "num_tokens": 31, "impl": impl}
    head: dict[str, Any] = {"temperature": 0.7, "softcap": softcap}
    fused = run(arguments, **options, **head)

    trained = {name: arguments[name].requires_grad_() for name in TRAINED if name in arguments}
    logprobs = linear_logprobs(
        arguments["hidden"], arguments["weight"], arguments["tokens"], bias=arguments["bias"], impl=impl, **head
    )
    targets = {name: arguments[name] for name in ("ref_logprobs", "values", "returns", "mask")}
    out = klq_loss(logprobs, **targets, tau=0.3, **options)
    composed = out, dict(zip(trained, torch.autograd.grad(out.loss, list(trained.values())), strict=True))
    precision = 1e-12 if dtype == torch.float64 else 1e-5
    assert_same(fused, composed, rtol=precision, atol=precision)


@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_gradcheck(make) -> None:
    arguments = doubled(make((2, 3)))
    arguments["mask"] = torch.tensor([[True, True, False], [True, False, True]])
    names = [name for name in TRAINED if name in arguments]
    function = klq_loss if make is make_plain else linear_klq_loss

    def loss(*trained: Tensor) -> Tensor:
        return function(**(arguments | dict(zip(names, trained, strict=True))), tau=0.3, num_tokens=5).loss

    assert torch.autograd.gradcheck(loss, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_weights_scale_gradients_and_leave_the_loss(make, impl) -> None:
    arguments = make()
    plain, weighted = run(arguments, impl=impl), run(arguments, policy_weight=4.0, value_weight=0.5, impl=impl)
    assert torch.equal(plain[0].loss, weighted[0].loss)
    for name, gradient in plain[1].items():  # powers of 2: exact
        torch.testing.assert_close(weighted[1][name], gradient * (0.5 if name == "values" else 4.0))
    none = run(arguments, policy_weight=0.0, value_weight=0.0, impl=impl)
    assert torch.equal(plain[0].loss, none[0].loss)
    assert all((gradient == 0).all() for gradient in none[1].values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_what_carries_no_gradient(make, impl) -> None:
    arguments = make()
    targets = [arguments[name].requires_grad_() for name in ("ref_logprobs", "returns")]
    function = klq_loss if make is make_plain else linear_klq_loss
    assert not function(**arguments, tau=0.3, impl=impl).loss.requires_grad
    arguments["values"].requires_grad_()
    out = function(**arguments, tau=0.3, impl=impl)
    assert not any(each.requires_grad for each in (out.logprobs, *out.metrics.values()))
    out.loss.backward()
    assert all(each.grad is None for each in targets)
    assert arguments["values"].grad is not None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_masked_slots_are_never_read(make, impl) -> None:
    clean = make()
    mask = clean["mask"]
    poisoned = {name: each.clone() for name, each in clean.items()}
    for name in ("logprobs", "hidden", "ref_logprobs", "values", "returns"):
        if name in poisoned:
            poisoned[name][~mask] = float("nan")
    if "tokens" in poisoned:
        poisoned["tokens"][~mask] = -100
    expected, ours = run(clean, impl=impl), run(poisoned, impl=impl)
    assert_same(ours, expected, rtol=0, atol=0)
    assert (ours[0].logprobs[~mask] == 0).all()
    assert all((ours[1][name][~mask] == 0).all() for name in ("logprobs", "hidden", "values") if name in ours[1])
    with torch.no_grad():
        out = (klq_loss if make is make_plain else linear_klq_loss)(**poisoned, tau=0.3, impl=impl)
    assert_same((out, {}), (expected[0], {}), rtol=0, atol=0)


@pytest.mark.parametrize("impl", FUSED)
def test_masked_equals_selected(impl) -> None:
    arguments = make_linear((5, 9))
    mask = arguments.pop("mask")
    masked, masked_gradients = run({**arguments, "mask": mask}, impl=impl)
    per_token = ("hidden", "tokens", "ref_logprobs", "values", "returns")
    part = {name: each[mask] if name in per_token else each for name, each in arguments.items()}
    selected, gradients = run(part, impl=impl)
    torch.testing.assert_close(masked.loss, selected.loss)
    torch.testing.assert_close(masked.logprobs[mask], selected.logprobs)
    for name, metric in masked.metrics.items():
        torch.testing.assert_close(metric, selected.metrics[name])
    for name, gradient in gradients.items():
        whole = masked_gradients[name]
        torch.testing.assert_close(whole[mask] if name in per_token else whole, gradient)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", [make_plain, make_linear])
@pytest.mark.parametrize("shape", [(5, 9), (0,), (3, 0)])
def test_no_valid_token(make, impl, shape) -> None:
    arguments = make(shape)
    arguments["mask"] = torch.zeros(shape, dtype=torch.bool)
    for name in ("logprobs", "hidden", "values"):
        if name in arguments:
            arguments[name] = torch.full_like(arguments[name], float("nan"))
    out, gradients = run(arguments, impl=impl)
    assert out.loss == 0
    assert out.logprobs.shape == shape
    assert (out.logprobs == 0).all()
    assert all(metric == 0 for metric in out.metrics.values())
    assert all((gradient == 0).all() for gradient in gradients.values())
    assert {name: each.shape for name, each in gradients.items()} == {n: arguments[n].shape for n in gradients}
    counted = run(arguments, impl=impl, num_tokens=arguments["mask"].sum())
    assert_same(counted, (out, gradients), rtol=0, atol=0)
    del arguments["mask"]
    if 0 in shape:
        assert run(arguments, impl=impl)[0].loss == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(6, 500), (140, 1000)])  # some of the kernel's blocks; more than it merges at a time
def test_metrics(impl, shape) -> None:
    arguments = make_plain(shape)
    exact = doubled(arguments)
    logprobs, ref_logprobs, values, returns = (
        exact[name][arguments["mask"]] for name in ("logprobs", "ref_logprobs", "values", "returns")
    )
    td_errors = returns - (0.3 * (logprobs - ref_logprobs) + values)
    expected = {
        "td_error": td_errors.mean(),
        "kl": (logprobs - ref_logprobs).mean(),
        "explained_variance": 1 - td_errors.var(correction=0) / returns.var(correction=0),
        "value_error": (values - returns).square().mean(),
        "values": values.mean(),
        "returns": returns.mean(),
    }
    arguments["returns"][~arguments["mask"]] = float("nan")
    out = klq_loss(**arguments, tau=0.3, impl=impl)
    assert out.metrics.keys() == expected.keys()
    for name, metric in out.metrics.items():
        torch.testing.assert_close(metric.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert metric.shape == ()
        assert not metric.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_explained_variance_of_large_returns(impl) -> None:
    """A difference of means of squares would lose a small spread in float32."""
    for size in (4, 11, 5000):
        returns = 1000 + 0.01 * torch.arange(size) / size
        mask = torch.arange(size) % 1023 != 0 if size > 4 else None
        zeros = torch.zeros(size)
        out = klq_loss(zeros, zeros, returns, returns, mask, tau=1.0, impl=impl)
        assert out.metrics["explained_variance"] == 1
        out = klq_loss(zeros, zeros, zeros, returns, mask, tau=1.0, impl=impl)
        torch.testing.assert_close(out.metrics["explained_variance"], torch.tensor(0.0), rtol=0, atol=1e-3)
        half = returns.double().sub(1000).div(2)  # explains half of every deviation: 1 − 1/4
        out = klq_loss(zeros, zeros, half.float(), returns, mask, tau=1.0, impl=impl)
        torch.testing.assert_close(out.metrics["explained_variance"], torch.tensor(0.75), rtol=0, atol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_explained_variance_of_constant_returns(impl) -> None:
    """0, whatever the rounding of their mean, and where the kernel's first block of 1024 slots has no valid token."""
    for case in range(50):
        size = int(torch.randint(1025, 6000, ()) if case % 2 else torch.randint(1, 1500, ()))
        mask = torch.arange(size) >= 1024 if case % 2 else None
        returns = (torch.randn(()) * 10 ** (8 * torch.rand(()) - 4)).expand(size)
        zeros = torch.zeros(size)
        out = klq_loss(zeros, zeros, torch.randn(size), returns, mask, tau=1.0, impl=impl)
        assert out.metrics["explained_variance"] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_explained_variance_after_an_empty_block(impl) -> None:
    """A variance of 5e-15 of the mean's square: about 0, not about a number near these, even float64 sums lose it."""
    size = 5000
    returns = 1e6 + torch.randint(0, 4, (size,)) / 16
    values = returns - torch.randint(0, 2, (size,)) / 16
    mask = torch.arange(size) >= 1024
    zeros = torch.zeros(size)
    out = klq_loss(zeros, zeros, values, returns, mask, tau=1.0, impl=impl)
    unexplained, variance = (x[mask].double().var() for x in (values - returns, returns))
    expected = (1 - unexplained / variance).float()
    torch.testing.assert_close(out.metrics["explained_variance"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_leading_shapes_and_strides(make, impl) -> None:
    flat = make((12,))
    shaped = dict(flat)
    per_token = ("logprobs", "hidden", "tokens", "ref_logprobs", "values", "returns", "mask")
    for name in per_token:
        if name in flat:  # (2, 3, 2), not contiguous
            tail = flat[name].shape[1:]
            shaped[name] = flat[name].reshape(2, 2, 3, *tail).transpose(1, 2)
    if "weight" in flat:
        shaped["weight"] = flat["weight"].T.contiguous().T
        shaped["bias"] = torch.stack((flat["bias"], flat["bias"]), dim=1)[:, 0]
    out, gradients = run(flat, impl=impl)
    shaped_out, shaped_gradients = run(shaped, impl=impl)
    assert shaped_out.logprobs.shape == (2, 3, 2)
    torch.testing.assert_close(shaped_out.loss, out.loss)
    torch.testing.assert_close(shaped_out.logprobs.transpose(1, 2).reshape(12), out.logprobs)
    for name, gradient in gradients.items():
        mine = shaped_gradients[name]
        torch.testing.assert_close(
            mine.transpose(1, 2).reshape(gradient.shape) if name in per_token else mine, gradient
        )
    one = {name: each[0] if name in per_token else each for name, each in flat.items()}
    one_out, one_gradients = run(one, impl=impl)
    assert one_out.loss.shape == one_out.logprobs.shape == one_gradients["values"].shape == ()


@pytest.mark.parametrize("impl", FUSED)
def test_mixed_dtypes(impl) -> None:
    arguments = make_linear()
    arguments |= {
        "hidden": arguments["hidden"].bfloat16(),
        "bias": arguments["bias"].half(),
        "values": arguments["values"].bfloat16(),
        "returns": arguments["returns"].double(),
    }
    out, gradients = run(arguments, impl=impl)
    assert out.loss.dtype == out.logprobs.dtype == torch.float32
    assert {name: each.dtype for name, each in gradients.items()} == {
        "hidden": torch.bfloat16,
        "weight": torch.float32,
        "bias": torch.float16,
        "values": torch.bfloat16,
    }
    assert_same((out, gradients), run(doubled(arguments), impl="reference"), rtol=2**-7, atol=2**-8)
    plain = make_plain() | {"values": torch.randn(5, 9).bfloat16(), "returns": torch.randn(5, 9).half()}
    out, gradients = run(plain, impl=impl)
    assert_same((out, gradients), run(doubled(plain), impl="reference"), rtol=2**-7, atol=2**-8)
    assert (out.loss.dtype, gradients["logprobs"].dtype, gradients["values"].dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_grad_output_and_second_backward(make, impl) -> None:
    arguments = make()
    expected, scaled = run(arguments, impl=impl), run(arguments, grad_output=-2.5, impl=impl)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(scaled[1][name], -2.5 * gradient)

    trained = {name: each.requires_grad_() for name, each in arguments.items() if name in TRAINED}
    loss = (klq_loss if make is make_plain else linear_klq_loss)(**arguments, tau=0.3, impl=impl).loss
    loss.backward(retain_graph=True)
    for each in trained.values():
        assert each.grad is not None
        each.grad.mul_(0)  # what an optimizer does to a gradient must not reach the second backward
    (3 * loss).backward(retain_graph=True)
    loss.backward()
    for name, each in trained.items():
        torch.testing.assert_close(each.grad, 4 * expected[1][name])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_double_backward_raises(make, impl) -> None:
    arguments = make()
    values = arguments["values"].requires_grad_()
    loss = (klq_loss if make is make_plain else linear_klq_loss)(**arguments, tau=0.3, impl=impl).loss
    with pytest.raises(RuntimeError, match="klq_loss: double backward"):
        torch.autograd.grad(loss, values, create_graph=True)


@pytest.mark.parametrize("impl", FUSED)
def test_float16_gradients_survive_loss_scaling(impl) -> None:
    """A gradient below float16's range times a loss scale of 2^16 is exact: nothing is rounded before scaling."""
    arguments = make_linear(dtype=torch.float16)
    _, scaled = run(arguments, grad_output=2.0**16, num_tokens=10**7, impl=impl)
    _, truth = run(doubled(arguments), grad_output=2.0**16, num_tokens=10**7, impl="reference")
    for name in ("hidden", "weight", "bias"):
        scale = truth[name].abs().max().item()
        assert scale / 2**16 < 2e-6  # where float16 numbers lie 6e-8 apart
        torch.testing.assert_close(scaled[name].double(), truth[name], rtol=2**-10, atol=1e-5 * scale)
    plain = {name: each.half() if name in ("logprobs", "values") else each for name, each in make_plain().items()}
    _, scaled = run(plain, grad_output=2.0**16, num_tokens=10**7, impl=impl)
    _, truth = run(doubled(plain), grad_output=2.0**16, num_tokens=10**7, impl="reference")
    for name, gradient in scaled.items():
        torch.testing.assert_close(gradient.double(), truth[name], rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("impl", FUSED)
def test_tied_weight(impl) -> None:
    prompt = torch.randint(0, 37, (5, 9))
    arguments = make_linear()
    weight = arguments["weight"].requires_grad_()
    arguments["hidden"] = weight[prompt]
    gradients = [
        torch.autograd.grad(linear_klq_loss(**arguments, tau=0.3, impl=each).loss, weight, retain_graph=True)[0]
        for each in (impl, "reference")
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", FUSED)
def test_repeats_bitwise_and_whatever_the_chunks(monkeypatch, impl) -> None:
    arguments = make_linear((61,) if impl == "torch" else (23,), 24, 257)
    first, again = run(arguments, impl=impl), run(arguments, impl=impl)
    assert_same(first, again, rtol=0, atol=0)
    for chunk in (1, 7, 22, 1000):
        monkeypatch.setattr(head_op, "chunk_rows", lambda *_, chunk=chunk: chunk)
        # Sums of at most 257 float32 products in another order.
        assert_same(run(arguments, impl=impl), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", FUSED)
def test_plain_loss_repeats_bitwise(impl) -> None:
    arguments = make_plain((3, 1001))
    assert_same(run(arguments, impl=impl), run(arguments, impl=impl), rtol=0, atol=0)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", FUSED)
def test_memory_and_work(monkeypatch, impl, dtype) -> None:
    """Extra memory: 4·C·V bytes for one chunk of logits, 4·V·D for the weight's gradient, nothing if it is frozen.

    Masked tokens cost nothing with "torch", and their arithmetic with "triton".
    """
    rows, depth, vocab, rows_per_chunk = 32, 32, 40_000, 4
    arguments = make_linear((rows,), depth, vocab, dtype)
    arguments["mask"] = torch.arange(rows) % 4 == 0
    if impl == "triton":
        arguments = {n: each[::4] if n not in ("weight", "bias") else each for n, each in arguments.items()}
        arguments["mask"][1] = False
    monkeypatch.setattr(head_op, "chunk_rows", lambda *_: rows_per_chunk)
    product, bias_product, some = 2 * (rows // 4) * vocab * depth, 2 * (rows // 4) * vocab, 2**19
    chunk = 4 * vocab * rows_per_chunk
    weight_bytes = 4 * vocab * depth  # in float32: of the gradient, and of the one block that a bfloat16 weight makes
    block = 0 if dtype == torch.float32 else weight_bytes
    if impl == "triton" and block:  # off CUDA, where bfloat16 is not multiplied as it is: a block of E too
        block += chunk
    cases: list[tuple[tuple[str, ...], int]] = [
        ((), 3),
        (("weight", "bias"), 2),
        (("hidden", "bias"), 2),
        (("hidden", "weight"), 1),
        (("hidden", "weight", "bias"), 1),
    ]
    for frozen, products in cases:
        seen = watch(partial(run, arguments, frozen, impl=impl))
        assert seen.flops == products * product + ("bias" not in frozen) * bias_product, frozen
        # In bfloat16 the weight's gradient takes the weight's dtype at the end, when the chunk is gone.
        gradient = weight_bytes * ("weight" not in frozen)
        assert seen.peak < max(chunk + block, gradient / 2 * (block > 0)) + gradient + some, frozen
    for name in ("hidden", "weight", "bias"):
        arguments[name].requires_grad_()
    with torch.no_grad():
        seen = watch(lambda: linear_klq_loss(**arguments, tau=0.3, impl=impl))
    assert seen.flops == product
    assert seen.peak < chunk + block + some


@pytest.mark.cpu
@pytest.mark.parametrize("impl", FUSED)
def test_backward_hands_over_the_weight_gradient(impl) -> None:
    """The buffer of the forward pass becomes weight.grad: backward allocates nothing of its size."""
    arguments = make_linear((8,), 64, 10_000)
    weight = arguments["weight"].requires_grad_()
    for factor in (1.0, 0.25):
        weight.grad = None
        loss = linear_klq_loss(**arguments, tau=0.3, impl=impl).loss * factor
        assert watch(loss.backward).largest < 4 * weight.numel() / 100
        assert weight.grad is not None


@pytest.mark.parametrize("impl", FUSED)
def test_autocast_changes_nothing(device, impl) -> None:
    arguments = make_linear()
    expected = run(arguments, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        ours = run(arguments, impl=impl)
    assert_same(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_modules(impl) -> None:
    plain, linear = make_plain(), make_linear()
    module = KLQLoss(tau=0.3, policy_weight=2.0, value_weight=0.5, impl=impl)
    out = module(*plain.values(), num_tokens=12)
    expected = klq_loss(**plain, tau=0.3, policy_weight=2.0, value_weight=0.5, num_tokens=12, impl=impl)
    assert_same((out, {}), (expected, {}), rtol=0, atol=0)
    assert repr(module) == "KLQLoss(tau=0.3, policy_weight=2.0, value_weight=0.5)"

    options = {"tau": 0.3, "policy_weight": 2.0, "temperature": 0.7, "softcap": 5.0}
    linear_module = LinearKLQLoss(**options, impl=impl)  # type: ignore[arg-type]
    bias = linear.pop("bias")
    linear_out = linear_module(*linear.values(), bias=bias, num_tokens=12)
    expected = linear_klq_loss(**linear, **options, bias=bias, num_tokens=12, impl=impl)
    assert_same((linear_out, {}), (expected, {}), rtol=0, atol=0)
    assert "temperature=0.7, softcap=5.0" in repr(linear_module)
    for wrong in ({"tau": 0.0}, {"tau": 0.3, "temperature": 0.0}, {"tau": 0.3, "softcap": -1.0}):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            LinearKLQLoss(**wrong)
    with pytest.raises(ValueError, match="value_weight"):
        KLQLoss(tau=0.3, value_weight=-1.0)


@pytest.mark.cpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("token", [-1, 37, 2**40])
def test_token_out_of_range(impl, token) -> None:
    arguments = make_linear()
    arguments["mask"][2, 3] = True
    arguments["tokens"][2, 3] = token
    with pytest.raises(ValueError, match=rf"tokens: got a token {token}, expected \[0, 37\)"):
        linear_klq_loss(**arguments, tau=0.3, impl=impl)


NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"tau": 0.0}, r"tau: got 0.0, expected a number in \(0, "),
    ({"tau": -0.05}, "tau: got -0.05"),
    ({"tau": float("nan")}, "tau: got nan"),
    ({"tau": torch.tensor(1.0)}, "tau: got tensor"),
    ({"policy_weight": -1.0}, r"policy_weight: got -1.0, expected a number in \[0, "),
    ({"value_weight": -1e-9}, "value_weight: got -1e-09"),
    ({"num_tokens": 0}, r"num_tokens: got 0, expected a number in \(0, "),
    ({"num_tokens": -5}, "num_tokens: got -5"),
    ({"num_tokens": torch.ones(2)}, r"num_tokens: got shape \(2,\), expected \(\)"),
    ({"ref_logprobs": torch.randn(5, 8)}, r"ref_logprobs: got shape \(5, 8\), expected \(5, 9\)"),
    ({"values": torch.randn(5, 9, 1)}, r"values: got shape \(5, 9, 1\), expected \(5, 9\)"),
    ({"returns": torch.randn(45)}, r"returns: got shape \(45,\), expected \(5, 9\)"),
    ({"values": torch.ones(5, 9, dtype=torch.int64)}, "values: got dtype int64, expected float32"),
    ({"returns": torch.ones(5, 9, device="meta")}, "returns: got a tensor on meta, expected cpu"),
    ({"mask": torch.ones(5, 9)}, "mask: got dtype float32, expected bool"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask: got shape \(5,\), expected \(5, 9\)"),
    ({"impl": "fused"}, "impl: got 'fused', expected"),
]


@pytest.mark.cpu
@pytest.mark.parametrize("make", [make_plain, make_linear])
@pytest.mark.parametrize(("change", "message"), NUMBERS)
def test_bad_arguments(make, change, message) -> None:
    arguments = make() | {"tau": 0.3} | change
    with pytest.raises(ValueError, match=message):
        (klq_loss if make is make_plain else linear_klq_loss)(**arguments)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(5, 9, 11)}, r"hidden: got shape \(5, 9, 11\), expected \(5, 9, 12\)"),
        ({"weight": torch.randn(12)}, r"weight: got shape \(12,\), expected \(V, D\)"),
        ({"bias": torch.randn(36)}, r"bias: got shape \(36,\), expected \(37,\)"),
        ({"tokens": torch.zeros(5, 9, dtype=torch.int32)}, "tokens: got dtype int32, expected int64"),
        ({"temperature": 0}, "temperature: got 0"),
        ({"softcap": -1.0}, "softcap: got -1.0"),
    ],
)
def test_bad_head(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear_klq_loss(**(make_linear() | {"tau": 0.3} | change))


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl) -> None:
    linear = {name: each.requires_grad_(name in TRAINED) for name, each in make_linear((7,)).items()}
    order = ("hidden", "weight", "bias", "values", "tokens", "ref_logprobs", "returns", "mask")
    tensors = [linear[name] for name in order]
    numbers = 0.3, 2.0, 0.5, 0.7, 4.0
    torch.library.opcheck(op._linear_klq_loss, (*tensors, None, *numbers, True, True, True, impl))
    frozen = [tensors[0].detach().bfloat16(), tensors[1].bfloat16(), None, *tensors[3:7], None]
    torch.library.opcheck(op._linear_klq_loss, (*frozen, torch.tensor(5), *numbers[:4], None, False, True, False, impl))
    plain = {name: each.requires_grad_(name in TRAINED) for name, each in make_plain((7,)).items()}
    tensors = [plain[name] for name in ("logprobs", "values", "ref_logprobs", "returns", "mask")]
    torch.library.opcheck(op._klq_loss, (*tensors, None, *numbers[:3], impl))


@pytest.mark.parametrize("impl", FUSED)
def test_compiles_whole_and_once_for_every_length(impl) -> None:
    def function(**arguments: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        plain = {name: arguments[name] for name in ("ref_logprobs", "values", "returns", "mask")}
        fused = linear_klq_loss(**arguments, tau=0.3, temperature=0.7, policy_weight=2.0, impl=impl)
        composed = klq_loss(arguments["hidden"].mean(dim=-1), **plain, tau=0.3, impl=impl)
        return fused.loss + 0.5 * composed.loss, fused.logprobs, fused.metrics

    torch._dynamo.reset()  # what it learned of the other implementation's lengths
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    weight = torch.randn(37, 12)
    for length in (6, 9, 13, 22):
        arguments = make_linear((2, length)) | {"weight": weight, "num_tokens": length + 5}
        trained = [arguments[name].requires_grad_() for name in TRAINED if name in arguments]
        results = []
        for each in (function, compiled):
            loss, logprobs, metrics = each(**arguments)
            results.append([loss, logprobs, *metrics.values(), *torch.autograd.grad(loss, trained)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert backend.frame_count == 2  # the first length, then any length


@pytest.mark.cuda
@pytest.mark.parametrize("num_tokens", [None, 40.5])
@pytest.mark.parametrize("make", [make_plain, make_linear])
def test_no_host_sync_and_graph_capture(make, num_tokens) -> None:
    """Forward and backward wait for nothing on the host; a captured graph follows new inputs, masks included.

    To the bit without matrix products. For these cuBLAS may choose another algorithm in a capture: sums of up to 45
    float32 products in another order are off by at most 45 · 6e-8 of their terms, and the metrics, differences of such,
    by a few times more of their own size. An input that was not followed changes everything by its own size.
    """
    tolerance = 0.0 if make is make_plain else 1e-4
    first, second = make(), make()
    expected = [run(arguments, num_tokens=num_tokens) for arguments in (first, second)]
    static = {name: each.clone() for name, each in first.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(static, num_tokens=num_tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static, num_tokens=num_tokens)
    for arguments, results in zip((first, second), expected, strict=True):
        for name, each in arguments.items():
            static[name].copy_(each)
        graph.replay()
        assert_same(captured, results, rtol=0, atol=tolerance)


@pytest.mark.cuda
def test_peak_memory_on_cuda() -> None:
    """At most 4·V·D bytes for the weight's gradient and 4·C·V for a chunk of logits, plus what is of size N·D."""
    rows, depth, vocab = 4096, 1024, 50_257
    arguments = make_linear((rows,), depth, vocab, torch.bfloat16)
    run(arguments)  # cuBLAS's workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, gradients = run(arguments)
    peak = torch.cuda.max_memory_allocated() - before
    chunk_size = head_op.chunk_rows(rows, vocab, torch.device("cuda"), True)
    assert peak < 4 * vocab * depth + 4 * chunk_size * (vocab + 8) + 16 * rows * depth + 2**22
    del out, gradients


@pytest.mark.cuda
def test_full_size_on_cuda() -> None:
    """More than 65535 rows and N·V beyond 2^31: the last rows against float64."""
    rows, depth, vocab = 70_000, 64, 50_304
    arguments = make_linear((rows,), depth, vocab, torch.bfloat16)
    out, gradients = run(arguments)
    tail = slice(rows - 500, rows)
    part = {name: each[tail] if len(each) == rows else each for name, each in arguments.items()}
    part_out, part_gradients = run(doubled(part), num_tokens=int(arguments["mask"].sum()), impl="reference")
    torch.testing.assert_close(out.logprobs[tail].double(), part_out.logprobs, rtol=0, atol=1e-4)
    exact = part_gradients["hidden"]
    assert (gradients["hidden"][tail].double() - exact).abs().max() < 0.02 * exact.abs().max()
