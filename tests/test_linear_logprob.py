"""linear_logprobs and linear_log_ratio from hidden states."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from watch import watch

from klq_fast import linear_klq_loss, linear_log_ratio, linear_logprobs, logprobs
from klq_fast.kernels.linear_logprob import op, reference

IMPLS = ("torch", "triton", "reference")
FUSED = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _tensors_on_the_device(device):
    with device if device.type == "cuda" else nullcontext():
        yield


def make_head(rows: int, depth: int, vocab: int, dtype=torch.float32, scale: float = 3.0) -> dict[str, Tensor]:
    """Logits of standard deviation `scale`; the first and the last token of the vocabulary occur."""
    tokens = torch.randint(0, vocab, (rows,))
    tokens[: min(rows, 2)] = torch.tensor([0, vocab - 1])[: min(rows, 2)]
    return {
        "hidden": torch.randn(rows, depth).to(dtype),
        "weight": (torch.randn(vocab, depth) * (scale * depth**-0.5)).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "tokens": tokens,
    }


def value_and_gradients(head: dict[str, Tensor], factors: Tensor, frozen: tuple[str, ...] = (), **options: Any):
    head = {
        name: each.detach().requires_grad_(name not in frozen) if each.is_floating_point() else each
        for name, each in head.items()
    }
    out = linear_logprobs(**head, **options)
    trained = [each for each in head.values() if each.requires_grad]
    return out.detach(), *torch.autograd.grad((out * factors).sum(), trained)


def doubled(head: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.double() if each.is_floating_point() else each for name, each in head.items()}


def exact(head: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
    """In float64, except for the kernels, which have none."""
    return head if impl == "triton" else doubled(head)


def eager_in_16_bits(head: dict[str, Tensor], factors: Tensor, temperature: float, softcap: float | None):
    """What a model's own head does: products and logits in 16 bits, and their gradients too; softmax in float32."""
    head = {name: each.detach().requires_grad_(each.is_floating_point()) for name, each in head.items()}
    logits = torch.nn.functional.linear(head["hidden"], head["weight"], head.get("bias"))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_policy = (logits.float() / temperature).log_softmax(dim=-1)
    out = log_policy.gather(1, head["tokens"].unsqueeze(1)).squeeze(1)
    return out.detach(), *torch.autograd.grad((out * factors).sum(), [h for h in head.values() if h.requires_grad])


def assert_no_worse_than_eager(ours, eager, truth, factor: float = 2.0, roundings: int = 1) -> None:
    """Row by row, the error is at most `factor` times eager's own plus a small absolute part.

    The absolute part: 32 float32 roundings of the largest entry (a sum of some hundred products in another order),
    and `roundings` times half a unit in the last place of the row where the result is rounded to 16 bits. A 16-bit
    bias is one row: a row of one entry could be right by chance. On the whole no result is off by a factor of 1.006.
    """
    for index, (mine, theirs, exact) in enumerate(zip(ours, eager, truth, strict=True)):
        rows = exact.shape[0] if exact.dim() == 2 or mine.dtype == torch.float32 else 1
        errors, their_errors, sizes = (
            each.abs().reshape(rows, -1).amax(dim=1) for each in (mine.double() - exact, theirs.double() - exact, exact)
        )
        rounding = torch.finfo(mine.dtype).eps if mine.dtype not in (torch.float32, torch.float64) else 0.0
        bound = factor * their_errors + 32 * 2**-24 * exact.abs().max() + roundings * rounding / 2 * sizes
        assert (errors <= bound).all(), f"result {index}: {(errors / bound).max()} times the bound"
        scale = ((mine * exact).sum() / exact.square().sum()).item()
        assert abs(scale - 1) < 0.006, f"result {index}: {scale} times what it should be"


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_logprobs_of_the_logits(impl) -> None:
    head = exact(make_head(9, 5, 17), impl)
    raw = head["hidden"] @ head["weight"].T
    capped = 2.5 * ((raw + head["bias"]) / 2.5).tanh()
    out = linear_logprobs(**head, temperature=0.7, softcap=2.5, impl=impl)
    torch.testing.assert_close(out, logprobs(capped, head["tokens"], temperature=0.7))
    del head["bias"]
    torch.testing.assert_close(linear_logprobs(**head, impl=impl), logprobs(raw, head["tokens"]))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", FUSED)
def test_error_is_at_most_twice_eager(monkeypatch, impl, dtype, with_bias, temperature, softcap) -> None:
    rows = 67 if impl == "torch" else 7
    head = make_head(rows, 130, 1031, dtype)  # primes, and 2 more than a multiple of 128
    if not with_bias:
        del head["bias"]
    factors = torch.randn(rows)
    options = {"temperature": temperature, "softcap": softcap}
    truth = value_and_gradients(doubled(head), factors.double(), **options, impl="reference")
    # Eager here multiplies in float32; a 16-bit product, and 16-bit logits, are off by a hundred times as much.
    eager = value_and_gradients(head, factors, **options, impl="reference")
    if impl == "triton":
        monkeypatch.setattr(op, "chunk_rows", lambda *_: 3)
    ours = value_and_gradients(head, factors, **options, impl=impl)
    assert [each.dtype for each in ours] == [torch.float32] + [dtype] * (len(ours) - 1)
    if impl == "triton" and dtype == torch.bfloat16:
        # The gradients' operands are rounded to bfloat16, E twice as much where the interpreter truncates it; the
        # log-probs' are not.
        assert_no_worse_than_eager(ours[:1], eager[:1], truth[:1])
        eager = eager_in_16_bits(head, factors, **options)
        assert_no_worse_than_eager(ours[1:], eager[1:], truth[1:], roundings=4)
    else:
        assert_no_worse_than_eager(ours, eager, truth)


def test_a_wrong_gradient_fails_the_error_bound() -> None:
    head, factors = make_head(67, 130, 1031), torch.randn(67)
    truth = value_and_gradients(doubled(head), factors.double(), impl="reference")
    eager = value_and_gradients(head, factors, impl="reference")
    value, hidden, weight, bias = value_and_gradients(head, factors, impl="torch")
    for wrong in ((value, hidden * 1.01, weight, bias), (value * 1.01, hidden, weight, bias)):
        with pytest.raises(AssertionError, match="times the bound"):
            assert_no_worse_than_eager(wrong, eager, truth)
    head = {name: each.bfloat16() if each.is_floating_point() else each for name, each in head.items()}
    truth = value_and_gradients(doubled(head), factors.double(), impl="reference")
    eager = eager_in_16_bits(head, factors, 1.0, None)
    _, hidden, weight, bias = value_and_gradients(head, factors, impl="torch")
    for each in ((hidden * 1.01, weight, bias), (hidden, weight * 1.01, bias), (hidden, weight, bias * 1.01)):
        with pytest.raises(AssertionError, match="times what it should be"):
            assert_no_worse_than_eager(each, eager[1:], truth[1:], roundings=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(("rows", "chunk"), [(0, 4), (1, 4), (4, 4), (5, 4), (7, 4), (7, 1), (7, 100)])
def test_chunks(monkeypatch, impl, dtype, rows, chunk) -> None:
    """Any number of rows against any chunk, and vocabulary blocks that end with one column (16-bit weights)."""
    head, factors = make_head(rows, 24, 513, dtype), torch.randn(rows)
    expected = value_and_gradients(head, factors, temperature=0.7, impl="reference")
    monkeypatch.setattr(op, "chunk_rows", lambda *_: chunk)
    monkeypatch.setattr(op, "BLOCK_SIZE", 1)  # hence the smallest blocks, of 256
    ours = value_and_gradients(head, factors, temperature=0.7, impl=impl)
    # float32: sums of 24 or 513 products in another order; bfloat16: one unit in the last place of the result, and for
    # "triton" of every operand of the gradients, which are of size 1.
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 1e-3 if impl == "torch" else 2**-6)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def test_chunk_rows() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert op.chunk_rows(2048, 50304, cpu, True) == 342
    assert op.chunk_rows(2185, 50304, cpu, True) == 313  # 7 equal chunks, not 6 and one of a single row
    assert op.chunk_rows(5000, 50304, cpu, False) == 358
    assert op.chunk_rows(0, 50304, cpu, True) == 0
    assert op.chunk_rows(3, 50304, cpu, True) == 3
    assert op.chunk_rows(10**6, 10**9, cpu, True) == 32
    assert op.chunk_rows(0, 128256, cuda, True) == 0
    assert op.chunk_rows(3, 128256, cuda, True) == 3
    assert op.chunk_rows(8192, 128256, cuda, True) == 2048
    assert op.chunk_rows(8193, 128256, cuda, True) == 1664  # 5 chunks in multiples of 128
    assert op.chunk_rows(8192, 128256, cuda, False) == 512
    for tokens in (2049, 5000, 10**6):  # whatever N·D/V
        assert 1024 <= op.chunk_rows(tokens, 10, cuda, True) == op.chunk_rows(tokens, 10**6, cuda, True) <= 4096


def test_blocks_of_a_16_bit_weight() -> None:
    """V·D of some blocks, the last of one row, in the sizes that the operation itself chooses."""
    depth = 4096
    head = make_head(3, depth, 2 * (op.BLOCK_SIZE // depth) + 1, torch.bfloat16)
    del head["bias"]
    truth = value_and_gradients(doubled(head), torch.ones(3).double(), impl="reference")
    eager = value_and_gradients(head, torch.ones(3), impl="reference")
    assert_no_worse_than_eager(value_and_gradients(head, torch.ones(3), impl="torch"), eager, truth)


HARD = {
    "all near -100": {"bias": -100.0},
    "all near +100": {"bias": 100.0},
    "shifted by -5000": {"bias": -5000.0},
    "p = 0.9999": {"bias": 0.0, "target": 16.0},
    "p = 1 - 1e-9": {"bias": 0.0, "target": 27.0},
    "p = 1e-30": {"bias": 0.0, "target": -63.0},
    "p = 1e-60": {"bias": 0.0, "target": -132.0},
}


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("case", HARD)
def test_hard_logits(case, impl) -> None:
    head = make_head(8, 16, 400, scale=1.0)
    head["tokens"] = torch.full((8,), 7)
    head["bias"] = torch.full((400,), HARD[case]["bias"])
    head["bias"][7] += HARD[case].get("target", 0.0)
    head["bias"][100:200] = float("-inf")
    ours = value_and_gradients(head, torch.ones(8), impl=impl)
    truth = value_and_gradients(doubled(head), torch.ones(8).double(), impl="reference")
    assert all(each.isfinite().all() for each in ours)
    # Relative to the gradient itself, which is as small as 1 − p. A logit of size x is known to 1.2e-7·x (x ≤ 5000).
    relative = 1e-5 + 3e-7 * abs(HARD[case]["bias"])
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=relative * exact.abs().max().item())


@pytest.mark.parametrize("impl", FUSED)
def test_never_above_zero(impl) -> None:
    head = make_head(500 if impl == "torch" else 50, 64, 200, torch.bfloat16, scale=10.0)
    head["hidden"] = (head["weight"][head["tokens"]] * 0.5).to(torch.bfloat16)  # confident: the token's own direction
    out = linear_logprobs(**head, impl=impl)
    assert (out <= 0).all()
    assert (out > -1e-6).any()


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", FUSED)
def test_log_ratio_of_equals_is_exactly_zero(impl, dtype, softcap) -> None:
    head = make_head(300, 64, 5003, dtype) if impl == "torch" else make_head(11, 64, 1003, dtype)
    own = {name: each.requires_grad_() for name, each in head.items() if name != "tokens"}
    out = linear_log_ratio(
        own["hidden"],
        own["weight"],
        own["hidden"].detach().clone(),
        own["weight"].detach().clone(),
        head["tokens"],
        bias=own["bias"],
        ref_bias=own["bias"].detach().clone(),
        temperature=0.7,
        softcap=softcap,
        impl=impl,
    )
    assert (out == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_log_ratio(impl) -> None:
    head, ref = exact(make_head(6, 5, 17), impl), exact(make_head(6, 3, 17), impl)
    for each in (*head.values(), *ref.values()):
        each.requires_grad_(each.is_floating_point())
    out = linear_log_ratio(
        *(head["hidden"], head["weight"], ref["hidden"], ref["weight"], head["tokens"]),
        bias=head["bias"],
        ref_bias=ref["bias"],
        temperature=0.7,
        impl=impl,
    )
    expected = reference.linear_log_ratio(
        *(head["hidden"], head["weight"], ref["hidden"], ref["weight"], head["tokens"]),
        bias=head["bias"],
        ref_bias=ref["bias"],
        temperature=0.7,
    )
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)  # two float32 log-probs of size 10
    out.sum().backward()
    assert all(head[name].grad is not None and ref[name].grad is None for name in ("hidden", "weight", "bias"))


def test_gradcheck() -> None:
    head = doubled(make_head(6, 4, 11, scale=1.0))
    tokens = head.pop("tokens").view(2, 3)
    inputs = [head["hidden"].view(2, 3, 4), head["weight"].T.contiguous().T, head["bias"]]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, tokens, bias=bias, temperature=0.7, softcap=3.0)

    assert torch.autograd.gradcheck(function, [each.requires_grad_() for each in inputs])


@pytest.mark.parametrize("impl", FUSED)
def test_leading_shapes_strides_and_mixed_dtypes(impl) -> None:
    hidden = torch.randn(4, 7, 10).bfloat16()[:, 1:, ::2].requires_grad_()  # (4, 6, 5)
    weight = torch.randn(5, 17, dtype=torch.float32).T.requires_grad_()
    bias = torch.randn(34, dtype=torch.float64)[::2].requires_grad_()
    tokens = torch.randint(0, 17, (6, 4)).T
    out = linear_logprobs(hidden, weight, tokens, bias=bias, impl=impl)
    assert out.dtype == torch.float32
    expected = reference.linear_logprobs(hidden.double(), weight.double(), tokens, bias=bias)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(out.square().sum(), (hidden, weight, bias))
    theirs = torch.autograd.grad(expected.square().sum(), (hidden, weight, bias))
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.float32, torch.float64]
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=2**-7 if mine.dtype == torch.bfloat16 else 1e-5, atol=1e-4)

    one = linear_logprobs(hidden[0, 0], weight, tokens[0, 0], bias=bias, impl=impl)
    torch.testing.assert_close(one, out[0, 0])
    assert linear_logprobs(hidden[:, :0], weight, tokens[:, :0], impl=impl).shape == (4, 0)


def test_float64_of_either_makes_all_of_it_float64() -> None:
    hidden, weight, tokens = torch.randn(6, 5).requires_grad_(), torch.randn(17, 5).requires_grad_(), torch.arange(6)
    expected = reference.linear_logprobs(hidden.double(), weight.double(), tokens)
    for pair in ((hidden, weight.double()), (hidden.double(), weight)):
        out = linear_logprobs(*pair, tokens)
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        ours = torch.autograd.grad(out.square().sum(), pair)
        assert [each.dtype for each in ours] == [each.dtype for each in pair]
        with pytest.raises(ValueError, match='impl: got "triton" with float64 tensors'):
            linear_logprobs(*pair, tokens, impl="triton")


@pytest.mark.parametrize("impl", FUSED)
def test_repeats_bitwise_whatever_the_other_rows(impl) -> None:
    rows = 64 if impl == "torch" else 12
    head, factors = make_head(rows, 32, 501), torch.randn(rows)
    first, again = (value_and_gradients(head, factors, impl=impl) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, again, strict=True))
    part = {name: each[: rows - 5] if name in ("hidden", "tokens") else each for name, each in head.items()}
    # A matrix product of another size may add in another order.
    torch.testing.assert_close(first[0][: rows - 5], linear_logprobs(**part, impl=impl), rtol=0, atol=2e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("impl", FUSED)
def test_memory_and_work(monkeypatch, impl) -> None:
    """Chunks of logits only, and nothing for a frozen tensor: neither memory nor arithmetic."""
    rows, depth, vocab, some = 8, 32, 40_000, 2**19
    head = make_head(rows, depth, vocab)
    monkeypatch.setattr(op, "chunk_rows", lambda *_: 4)
    chunk = 4 * vocab * 4
    product, bias_product, whole_weight = 2 * rows * vocab * depth, 2 * rows * vocab, 4 * vocab * depth
    seen = watch(lambda: linear_logprobs(**head, impl=impl))
    assert seen.flops == product
    assert chunk <= seen.peak < chunk + some

    cases: list[tuple[tuple[str, ...], int]] = [
        ((), 4),
        (("weight", "bias"), 3),
        (("hidden", "bias"), 3),
        (("hidden", "weight"), 2),
    ]
    for frozen, products in cases:
        seen = watch(partial(value_and_gradients, head, torch.ones(rows), frozen, impl=impl))
        assert seen.flops == products * product + ("bias" not in frozen) * bias_product, frozen
        gradients = whole_weight * ("weight" not in frozen) + 4 * rows * depth * ("hidden" not in frozen)
        assert chunk + gradients <= seen.peak < chunk + gradients + some, frozen


@pytest.mark.parametrize("impl", FUSED)
def test_autocast_changes_nothing(device, impl) -> None:
    head, factors = make_head(20, 16, 101), torch.randn(20)
    expected = value_and_gradients(head, factors, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        ours = value_and_gradients(head, factors, impl=impl)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))


@pytest.mark.parametrize("impl", FUSED)
def test_tied_weight(impl) -> None:
    weight = torch.randn(17, 5, requires_grad=True)
    prompt, tokens = torch.randint(0, 17, (9,)), torch.randint(0, 17, (9,))
    gradients = [
        torch.autograd.grad(linear_logprobs(weight[prompt], weight, tokens, impl=each).sum(), weight)[0]
        for each in (impl, "reference")
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.cpu
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("token", [-1, -100, 17, 2**40])
def test_token_out_of_range(impl, token) -> None:
    head = make_head(3, 5, 17)
    head["tokens"][2] = token
    with pytest.raises(ValueError, match=rf"tokens: got a token {token}, expected \[0, 17\)"):
        linear_logprobs(**head, impl=impl)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(3, 6)}, r"hidden: got shape \(3, 6\), expected \(3, 5\)"),
        ({"hidden": torch.randn(4, 5)}, r"hidden: got shape \(4, 5\), expected \(3, 5\)"),
        ({"hidden": torch.ones(3, 5, dtype=torch.int64)}, "hidden: got dtype int64, expected float32"),
        ({"hidden": torch.ones(3, 5, device="meta")}, "hidden: got a tensor on meta, expected cpu"),
        ({"weight": torch.randn(17)}, r"weight: got shape \(17,\), expected \(V, D\)"),
        ({"weight": torch.randn(0, 5)}, r"weight: got shape \(0, 5\), expected \(V, D\)"),
        ({"weight": None}, "weight: got NoneType, expected a tensor"),
        ({"bias": torch.randn(16)}, r"bias: got shape \(16,\), expected \(17,\)"),
        ({"bias": torch.ones(17, dtype=torch.int64)}, "bias: got dtype int64"),
        ({"tokens": torch.zeros(3)}, "tokens: got dtype float32, expected int64"),
        ({"tokens": torch.zeros(3, 1, dtype=torch.int64)}, r"hidden: got shape \(3, 5\), expected \(3, 1, 5\)"),
        ({"temperature": 0.0}, r"temperature: got 0.0, expected a number in \(0, "),
        ({"temperature": -1.0}, r"temperature: got -1.0"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"softcap": 0.0}, r"softcap: got 0.0, expected a number in \(0, "),
        ({"softcap": -30.0}, "softcap: got -30.0"),
        ({"impl": "cuda"}, "impl: got 'cuda', expected"),
    ],
)
def test_bad_arguments(change, message) -> None:
    arguments: dict[str, Any] = make_head(3, 5, 17) | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": torch.randn(3, 6)}, r"ref_hidden: got shape \(3, 6\), expected \(3, 4\)"),
        ({"ref_weight": torch.randn(16, 4)}, r"ref_weight: got V = 16, expected 17 \(the V of weight\)"),
        ({"ref_weight": torch.randn(17, 4, device="meta")}, "tokens: got a tensor on cpu, expected meta"),
        ({"ref_bias": torch.randn(16)}, r"ref_bias: got shape \(16,\), expected \(17,\)"),
        ({"hidden": torch.randn(3, 4)}, r"hidden: got shape \(3, 4\), expected \(3, 5\)"),
    ],
)
def test_bad_arguments_of_log_ratio(change, message) -> None:
    arguments: dict[str, Any] = make_head(3, 5, 17)
    arguments |= {"ref_hidden": torch.randn(3, 4), "ref_weight": torch.randn(17, 4), **change}
    with pytest.raises(ValueError, match=message):
        linear_log_ratio(**arguments)


@pytest.mark.parametrize("impl", FUSED)
def test_double_backward_raises(impl) -> None:
    head = make_head(3, 5, 17)
    weight = head["weight"].requires_grad_()
    out = linear_logprobs(**head, impl=impl).sum()
    with pytest.raises(RuntimeError, match="linear_logprobs: double backward"):
        torch.autograd.grad(out, weight, create_graph=True)
    (first,) = torch.autograd.grad(out, weight, retain_graph=True)
    (second,) = torch.autograd.grad(out, weight)
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl) -> None:
    head = {name: each.requires_grad_(each.is_floating_point()) for name, each in make_head(3, 5, 17).items()}
    inputs = head["hidden"], head["weight"], head["bias"], head["tokens"]
    torch.library.opcheck(op._linear_logprobs, (*inputs, 0.7, 3.0, impl))
    half = inputs[0].detach().bfloat16(), inputs[1].detach().bfloat16().requires_grad_(), None, inputs[3]
    torch.library.opcheck(op._linear_logprobs, (*half, 1.0, None, impl))


@pytest.mark.parametrize("impl", FUSED)
def test_compiles_whole_and_once_for_every_length(impl) -> None:
    def function(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        ratio = linear_log_ratio(hidden, weight, hidden * 1.1, weight.detach(), tokens, temperature=0.7, impl=impl)
        return ratio.square().sum() + logprobs(hidden @ weight.T, tokens, impl=impl).sum()

    torch._dynamo.reset()  # what it learned of the other implementation's lengths
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    weight = torch.randn(17, 5, requires_grad=True)
    for rows in (6, 9, 13, 22):
        hidden, tokens = torch.randn(2, rows, 5, requires_grad=True), torch.randint(0, 17, (2, rows))
        results = []
        for each in (function, compiled):
            loss = each(hidden, weight, tokens)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert backend.frame_count == 2  # the first length, then any length


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_host_sync_and_graph_capture(dtype) -> None:
    """Forward and backward wait for nothing on the host; a captured graph follows new inputs.

    Not to the bit, as cuBLAS may choose another algorithm in a capture. Sums of up to 1000 products in another order
    differ by at most 1000 · 6e-8 of their terms; 16-bit results, and the 16-bit gradients of the logits that go into
    them, may then round to a neighbour, a unit in the last place away each.
    """
    heads, factors = [make_head(30, 64, 1000, dtype) for _ in range(2)], torch.randn(30)
    expected = [value_and_gradients(head, factors, softcap=5.0) for head in heads]
    static = {name: each.clone() for name, each in heads[0].items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(static, factors, softcap=5.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(static, factors, softcap=5.0)
    for head, results in zip(heads, expected, strict=True):
        for name, each in head.items():
            static[name].copy_(each)
        graph.replay()
        for mine, theirs in zip(captured, results, strict=True):
            tolerance = 1e-4 if mine.dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            assert (mine.double() - theirs.double()).abs().max() <= tolerance * theirs.abs().max().double()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("through", ["linear_logprobs", "linear_klq_loss"])
def test_a_parameter_in_16_bits_may_take_its_gradient_in_float32(through: str, impl: str) -> None:
    """As mixed precision wants, where microbatches' gradients are summed: the float32 sums are not rounded before."""
    head, others = make_head(20, 16, 300, torch.bfloat16), torch.randn(3, 20)

    def loss(hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor) -> Tensor:
        if through == "linear_logprobs":
            return (linear_logprobs(hidden, weight, tokens, bias=bias, impl=impl) * others[0]).sum()
        return linear_klq_loss(hidden, weight, tokens, *others, bias=bias, tau=0.5, impl=impl).loss

    found = {name: nn.Parameter(head[name]) for name in ("weight", "bias")}
    for parameter in found.values():
        parameter.grad_dtype = torch.float32
    loss(**(head | found)).backward()
    expected = {name: nn.Parameter(head[name]) for name in found}
    loss(**(head | expected)).backward()
    for name, parameter in found.items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float())
        assert torch.equal(parameter.grad.bfloat16(), expected[name].grad)  # type: ignore[arg-type]
