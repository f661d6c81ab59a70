"""logprobs and log_ratio from logits."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton import knobs
from watch import watch

from klq_fast import log_ratio, logprobs
from klq_fast.kernels.log_ratio import kernel, op, reference

IMPLS = ("torch", "triton", "reference")
FUSED = ("torch", "triton")
INTERPRETED = knobs.runtime.interpret  # by Triton, on the CPU; see conftest.py


@pytest.fixture(autouse=True)
def _on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def value_and_gradient(logits: Tensor, tokens: Tensor, weights: Tensor, **options) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    out = logprobs(logits, tokens, **options)
    (gradient,) = torch.autograd.grad((out * weights).sum(), logits)
    return out.detach(), gradient


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl) -> None:
    dtype = torch.float32 if impl == "triton" else torch.float64
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.25, 0.5]], dtype=dtype)
    tokens = torch.tensor([2, 0])
    out = logprobs(probabilities.log() + 3.0, tokens, impl=impl)
    torch.testing.assert_close(out, torch.tensor([0.7, 0.25], dtype=dtype).log())
    # At temperature 1/2 a probability is squared before it is normalised.
    squared = torch.tensor([0.49 / 0.54, 0.0625 / 0.375], dtype=dtype).log()
    out = logprobs(probabilities.log(), tokens, temperature=0.5, impl=impl)
    torch.testing.assert_close(out, squared)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# The kernels' blocks: 4096, or 8192 where V % 16 = 0 in bfloat16.
@pytest.mark.parametrize("vocab", [1, 2, 37, 4095, 4096, 4097, 8208])
@pytest.mark.parametrize("impl", FUSED)
def test_error_is_at_most_twice_eager(impl, vocab, dtype, temperature) -> None:
    rows = 13 if vocab < 100 else 5
    logits = (torch.randn(rows, vocab) * 5).to(dtype)
    tokens = torch.randint(0, vocab, (rows,))
    tokens[0], tokens[1] = 0, vocab - 1
    weights = torch.randn(rows)
    truth = value_and_gradient(logits.double(), tokens, weights.double(), temperature=temperature, impl="reference")
    eager = value_and_gradient(logits, tokens, weights, temperature=temperature, impl="reference")
    ours = value_and_gradient(logits, tokens, weights, temperature=temperature, impl=impl)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    # A few float32 roundings of logits up to 30, and of gradients up to 3.
    absolute = [torch.tensor(4e-6), torch.tensor(1e-6)]
    if impl == "triton":  # its gradient comes from log π as rounded, and the interpreter truncates to bfloat16
        rounding = 2**-22 * truth[0].abs() + (2**-7 if INTERPRETED and dtype == torch.bfloat16 else 0.0)
        absolute[1] = absolute[1] + rounding * truth[1].abs().amax(dim=1)
    for mine, theirs, exact, extra in zip(ours, eager, truth, absolute, strict=True):
        worst = [(each.double() - exact).abs().reshape(rows, -1).amax(dim=1) for each in (mine, theirs)]
        assert (worst[0] <= 2 * worst[1] + extra).all(), (worst[0] - 2 * worst[1]).max()


HARD = {
    "all -100": torch.full((1, 50), -100.0),
    "all +100": torch.full((1, 50), 100.0),
    "shifted by -1000": torch.linspace(-1, 1, 50).unsqueeze(0) - 1000,
    "p = 0.9999": torch.tensor([[math.log(0.9999 / (1e-4 / 49))] + [0.0] * 49]),
    "p = 1 - 1e-9": torch.tensor([[math.log(49e9)] + [0.0] * 49]),
    "p = 1e-30": torch.tensor([[-math.log(49e30)] + [0.0] * 49]),
    "p = 1e-300": torch.tensor([[-690.0] + [0.0] * 49]),
    "-inf columns": torch.tensor([[0.5] + [0.0, float("-inf")] * 24 + [1.0]]),
    "one finite column": torch.tensor([[2.0] + [float("-inf")] * 49]),
}


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("impl", FUSED)
def test_hard_logits(impl, case, device) -> None:
    """Relative precision of log π(a) and of every entry of its gradient, where fp32 1 − p would have none left."""
    logits, tokens = HARD[case].to(device), torch.tensor([0])
    truth_logits = logits.double().requires_grad_()
    others = truth_logits[:, 1:].logsumexp(dim=1) - truth_logits[:, 0]  # log of (1 − p) / p
    truth = -torch.nn.functional.softplus(others, threshold=1e9)  # log p
    probabilities = truth_logits.softmax(dim=1).detach()
    out, gradient = value_and_gradient(logits, tokens, torch.ones(1), impl=impl)
    expected_gradient = -probabilities
    expected_gradient[:, 0] = torch.sigmoid(others.detach())
    # float32: the spacing of logits of size x is 1.2e-7·x, which moves a probability by as much, relatively. Here the
    # gaps between logits, not the logits, count: at most 690. The interpreter rounds the product of a fused
    # multiply-add: logits of 1000 in bits by 6e-5.
    rtol = 5e-5 if impl == "triton" and "1000" in case else 1e-5
    torch.testing.assert_close(out.double(), truth.detach(), rtol=rtol, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("impl", FUSED)
def test_probability_zero(impl) -> None:
    """A token that cannot happen: log π = −∞, and the gradient of the others is theirs."""
    logits = torch.randn(2, 4100)
    logits[0, :4096] = logits[1, 4099] = -torch.inf  # a whole block, and one
    tokens = torch.tensor([7, 4099])
    out, gradient = value_and_gradient(logits, tokens, torch.ones(2), impl=impl)
    assert (out == -torch.inf).all()
    expected = -logits.double().softmax(dim=1)
    expected[torch.arange(2), tokens] = 1.0
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from numpy, in the interpreter
@pytest.mark.parametrize("impl", FUSED)
def test_nan_and_infinity_stay_in_their_row(impl) -> None:
    logits = torch.randn(5, 4100)
    clean, clean_gradient = value_and_gradient(logits, torch.arange(5), torch.ones(5), impl=impl)
    logits[1, 4099] = logits[2, 2] = torch.nan
    logits[3, 5] = torch.inf
    out, gradient = value_and_gradient(logits, torch.arange(5), torch.ones(5), impl=impl)
    expected = clean.where(torch.tensor([True, False, False, False, True]), torch.nan)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(gradient[[0, 4]], clean_gradient[[0, 4]])
    assert gradient[1:4].isnan().any(dim=1).all()


@pytest.mark.parametrize("impl", FUSED)
def test_never_above_zero(impl, device) -> None:
    rows = 2000 if impl == "torch" or device.type == "cuda" else 60
    logits = torch.randn(rows, 64) * 0.1
    tokens = torch.randint(0, 64, (rows,))
    logits[torch.arange(rows), tokens] += torch.linspace(0, 40, rows)
    out = logprobs(logits, tokens, impl=impl)
    assert (out <= 0).all()
    assert (out[: rows // 2] < 0).all()  # 1 − p stays visible far below 1.2e-7: up to a gap of 40 it is above 1e-17
    assert (logprobs(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64), impl=impl) == 0).all()


@pytest.mark.parametrize("impl", FUSED)
def test_log_ratio(impl) -> None:
    logits = torch.randn(3, 7, 301, dtype=torch.bfloat16, requires_grad=True)
    ref_logits = torch.randn(3, 7, 301, requires_grad=True)
    tokens = torch.randint(0, 301, (3, 7))
    out = log_ratio(logits, ref_logits, tokens, temperature=0.7, impl=impl)
    expected = reference.log_ratio(logits.double(), ref_logits.double(), tokens, temperature=0.7)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)  # two log-probs of size 10 in float32
    out.sum().backward()
    assert logits.grad is not None
    assert ref_logits.grad is None
    assert not log_ratio(logits.detach(), ref_logits, tokens, impl=impl).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", FUSED)
def test_log_ratio_of_equals_is_exactly_zero(impl, dtype) -> None:
    logits = (torch.randn(40 if impl == "torch" else 10, 5003) * 10).to(dtype)
    tokens = torch.randint(0, 5003, (len(logits),))
    wide = torch.stack((logits, logits), dim=1)[:, 1]  # other strides
    turned = logits.T.contiguous().T  # a vocabulary that is not in one piece
    exact = logits.float()  # another dtype with the same numbers
    for equal in (wide, turned, exact):
        assert (log_ratio(logits, equal, tokens, temperature=0.7, impl=impl) == 0).all()


def test_gradcheck() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64).transpose(0, 1).requires_grad_()
    tokens = torch.randint(0, 5, (3, 2))
    assert torch.autograd.gradcheck(lambda each: logprobs(each, tokens, temperature=0.7), logits)


@pytest.mark.parametrize("impl", FUSED)
def test_strides_and_leading_shapes(impl) -> None:
    logits = torch.randn(3, 5, 11)
    tokens = torch.randint(0, 11, (3, 5))
    expected = reference.logprobs(logits, tokens)
    four = torch.randn(2, 4, 3, 11)
    four_tokens = torch.randint(0, 11, (2, 4, 3))
    views = {
        "window": (logits[:, 2:-1], tokens[:, 2:-1], expected[:, 2:-1]),
        "transposed": (logits.transpose(0, 1), tokens.T, expected.T),
        "strided vocabulary": (torch.stack((logits, logits), dim=-1)[..., 1], tokens, expected),
        "expanded": (logits[:1].expand(2, 5, 11), tokens[:1].expand(2, 5), expected[:1].expand(2, 5)),
        "every other": (logits[0, ::2], tokens[0, ::2], expected[0, ::2]),
        "one row": (logits[0, 0], tokens[0, 0], expected[0, 0]),
        "no rows": (logits[:0], tokens[:0], expected[:0]),
        "no rows, 1 dimension": (logits[0, :0], tokens[0, :0], expected[0, :0]),
        "4 dimensions, 3 apart": (
            four[:, 1:3, 1:],
            four_tokens[:, 1:3, 1:],
            reference.logprobs(four, four_tokens)[:, 1:3, 1:],
        ),
    }
    for name, (view, view_tokens, truth) in views.items():
        torch.testing.assert_close(logprobs(view, view_tokens, impl=impl), truth, msg=f"{name} differs")
        ratio = log_ratio(view, view.flip(0), view_tokens, impl=impl)
        expected_ratio = truth - reference.logprobs(view.flip(0), view_tokens)
        torch.testing.assert_close(ratio, expected_ratio, msg=f"{name}: ratio differs", rtol=0, atol=2e-6)
        _, gradient = value_and_gradient(view, view_tokens, torch.ones(()), impl=impl)
        _, expected_gradient = value_and_gradient(view, view_tokens, torch.ones(()), impl="reference")
        torch.testing.assert_close(gradient, expected_gradient, msg=f"{name}: gradient differs")


@pytest.mark.parametrize("impl", FUSED)
def test_rows_are_independent_and_repeat_bitwise(impl) -> None:
    vocab = 300_000 if impl == "torch" else 9000  # chunks of 3 rows; blocks of 4096
    logits = torch.randn(7, vocab)
    tokens = torch.randint(0, vocab, (7,))
    whole, gradient = value_and_gradient(logits, tokens, torch.ones(()), impl=impl)
    again, gradient_again = value_and_gradient(logits, tokens, torch.ones(()), impl=impl)
    assert torch.equal(whole, again)
    assert torch.equal(gradient, gradient_again)
    for row in range(7):
        one = slice(row, row + 1)
        alone, gradient_alone = value_and_gradient(logits[one], tokens[one], torch.ones(()), impl=impl)
        assert torch.equal(whole[row], alone[0])
        assert torch.equal(gradient[row], gradient_alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", FUSED)
def test_inplace_backward(impl, dtype) -> None:
    """The gradient of the copy, bit for bit, on the logits; and a second backward pass is refused."""
    base = torch.randn(2, 4, 4100).to(dtype)
    tokens, weights = torch.randint(0, 4100, (2, 3)), torch.randn(2, 3)
    for view in (lambda x: x[:, 1:], lambda x: x[:, :-1].clone()):
        leaf = base.clone().requires_grad_()
        expected = torch.autograd.grad((logprobs(view(leaf), tokens, impl=impl) * weights).sum(), leaf)[0]
        logits = view(leaf * 1)
        loss = (logprobs(logits, tokens, impl=impl, inplace_backward=True) * weights).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(gradient, expected)
        assert torch.equal(logits, view(expected))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("impl", FUSED)
def test_inplace_backward_of_log_ratio_and_of_a_leaf(impl) -> None:
    logits, ref_logits = torch.randn(2, 3, 50)
    tokens = torch.tensor([4, 0, 49])
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_ratio(leaf, ref_logits, tokens, temperature=0.7).sum(), leaf)
    unread = ref_logits.clone().requires_grad_()
    out = log_ratio(leaf, unread, tokens, temperature=0.7, impl=impl, inplace_backward=True).sum()
    out.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)
    assert torch.equal(leaf, leaf.grad)
    assert torch.equal(unread, ref_logits)
    assert unread.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_memory() -> None:
    logits = torch.randn(2, 201, 20_000, dtype=torch.bfloat16, device="cpu")  # 16 MiB
    tokens = torch.randint(0, 20_000, (2, 201), device="cpu")
    # A chunk in bfloat16 and in float32.
    assert watch(lambda: logprobs(logits[:, 1:], tokens[:, 1:])).peak < 11 * 2**20

    trained = logits.requires_grad_()
    whole = trained.numel() * 2
    seen = watch(lambda: logprobs(trained, tokens).sum().backward())
    assert whole <= seen.peak < whole + 11 * 2**20
    trained.grad = None
    assert watch(lambda: logprobs(trained, tokens, inplace_backward=True).sum().backward()).peak < 11 * 2**20


@pytest.mark.parametrize("token", [-1, -100, 7, 2**40])
def test_token_out_of_range(token) -> None:
    tokens = torch.tensor([0, token, 6], device="cpu")
    for impl in IMPLS if INTERPRETED else ("torch", "reference"):
        with pytest.raises(ValueError, match=rf"tokens: got a token {token}, expected \[0, 7\)"):
            logprobs(torch.randn(3, 7, device="cpu"), tokens, impl=impl)  # type: ignore[arg-type]


def test_bad_arguments(device) -> None:
    logits, tokens = torch.randn(3, 7), torch.tensor([0, 1, 6])
    shared = torch.randn(7).expand(3, 7)
    for message, call in {
        r"logits: got dtype int64, expected float32": lambda: logprobs(tokens.unsqueeze(1), tokens),
        r"logits: got list, expected a tensor": lambda: logprobs(logits.tolist(), tokens),
        r"logits: got shape \(\), expected \(…, V\)": lambda: logprobs(torch.tensor(1.0), tokens),
        r"logits: got shape \(3, 0\), expected \(…, V\)": lambda: logprobs(logits[:, :0], tokens),
        r"tokens: got shape \(2,\), expected \(3,\)": lambda: logprobs(logits, tokens[:2]),
        r"tokens: got shape \(3, 1\), expected \(3,\)": lambda: logprobs(logits, tokens.unsqueeze(1)),
        r"tokens: got dtype int32, expected int64": lambda: logprobs(logits, tokens.int()),
        rf"tokens: got a tensor on meta, expected {device}": lambda: logprobs(logits, tokens.to("meta")),
        r"temperature: got 0, expected a number in \(0, ": lambda: logprobs(logits, tokens, temperature=0),
        r"temperature: got nan": lambda: logprobs(logits, tokens, temperature=math.nan),
        r"temperature: got 'hot'": lambda: logprobs(logits, tokens, temperature="hot"),  # type: ignore[arg-type]
        r'impl: got \'fast\', expected "auto"': lambda: logprobs(logits, tokens, impl="fast"),  # type: ignore[arg-type]
        r'impl: got "triton" with float64': lambda: logprobs(logits.double(), tokens, impl="triton"),
        r'impl: got "triton" with float64 ': lambda: log_ratio(logits, logits.double(), tokens, impl="triton"),
        r"inplace_backward: got 1, expected True or False": lambda: logprobs(logits, tokens, inplace_backward=1),  # type: ignore[arg-type]
        r'inplace_backward: got True with impl="reference"': lambda: log_ratio(
            logits, logits, tokens, inplace_backward=True, impl="reference"
        ),
        r"logits: got strides \(0, 1\), expected rows apart": lambda: logprobs(shared, tokens, inplace_backward=True),
        r"ref_logits: got shape \(3, 6\), expected \(3, 7\)": lambda: log_ratio(logits, logits[:, :6], tokens),
        r"ref_logits: got a tensor on meta": lambda: log_ratio(logits, logits.to("meta"), tokens),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("impl", FUSED)
def test_double_backward_raises(impl) -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    out = logprobs(logits, torch.tensor([0, 1, 6]), impl=impl).sum()
    with pytest.raises(RuntimeError, match="logprobs: double backward"):
        torch.autograd.grad(out, logits, create_graph=True)
    (first,) = torch.autograd.grad(out, logits, retain_graph=True)
    (second,) = torch.autograd.grad(out, logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl) -> None:
    logits = torch.randn(3, 4, 7, requires_grad=True)
    half = torch.randn(3, 5, 7, dtype=torch.bfloat16)[:, 1:]
    tokens = torch.randint(0, 7, (3, 4))
    torch.library.opcheck(op._logprobs, (logits, None, tokens, 0.7, False, impl))
    torch.library.opcheck(op._logprobs, (logits, half, tokens, 0.7, False, impl))
    torch.library.opcheck(op._logprobs, (half, logits.detach(), tokens, 1.0, False, impl))
    grad, saved = torch.randn(3, 4), -torch.rand(3, 4)
    torch.library.opcheck(op._logprobs_backward, (grad, half, tokens, saved, 0.7, impl))
    torch.library.opcheck(op._logprobs_backward_, (grad, half.clone(), tokens, saved, 0.7, impl))


@pytest.mark.parametrize("impl", FUSED)
def test_compiles_whole_and_once_for_every_length(impl) -> None:
    def function(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
        plain = logprobs(logits[:, :-1], tokens, temperature=0.7, impl=impl)
        return plain * log_ratio(logits[:, 1:] * 2, ref_logits[:, 1:], tokens, inplace_backward=True, impl=impl)

    torch._dynamo.reset()  # what it learned of the other implementation's lengths
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for length in (3, 5, 7, 8):
        logits, ref_logits = torch.randn(2, 2, length, 37)
        tokens = torch.randint(0, 37, (2, length - 1))
        results = []
        for each in (function, compiled):
            out = each(logits.requires_grad_(), ref_logits, tokens)
            results.append((out, *torch.autograd.grad(out.sum(), logits)))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert backend.frame_count == 2  # the first length, then any length


def test_many_rows_and_large_offsets(device) -> None:
    """On a GPU more than 65535 rows and more than 2^31 logits; elsewhere the same code on a few."""
    rows, vocab = (70_001, 32_000) if device.type == "cuda" else (17, 320)
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16)
    tokens = torch.randint(0, vocab, (rows,))
    last = slice(rows - 5, rows)
    expected = value_and_gradient(logits[last].float(), tokens[last], torch.ones(()), impl="reference")
    out, gradient = value_and_gradient(logits, tokens, torch.ones(()), impl="triton")
    torch.testing.assert_close(out[last], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[last].float(), expected[1], rtol=2**-7, atol=0)  # interpreted, it truncates


def softmax_truth(
    logits: Tensor, tokens: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """log π(a), and its gradient with respect to (logits + bias) / temperature, its entry at a without cancellation."""
    z = logits.double() if bias is None else logits.double() + bias.double()
    slope = torch.ones_like(z)
    if softcap is not None:
        slope = 1 / torch.cosh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    z, own = z / temperature, tokens.unsqueeze(1)
    log_policy = z.log_softmax(dim=1)
    others = z.scatter(1, own, -torch.inf).logsumexp(dim=1, keepdim=True)
    gradient = (-log_policy.exp()).scatter(1, own, torch.sigmoid(others - z.gather(1, own)))
    return log_policy.gather(1, own).squeeze(1), gradient * slope


def close_softmax(e: Tensor, total: Tensor, gradient: Tensor) -> None:
    # float32: the interpreter rounds the product of a fused multiply-add, here of logits up to 360 bits, by 2e-5.
    # bfloat16 rounds by 2^-9, and once more where the anchor is raised; the interpreter truncates, by 2^-8 each time.
    rtol = 5e-5 if e.dtype == torch.float32 else 2**-6
    torch.testing.assert_close(-e.double() / total.double().unsqueeze(1), gradient, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature, softcap", [(1.0, None), (0.7, None), (0.7, 5.0)])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 4097])
def test_target_softmax(vocab, bias_dtype, temperature, softcap, dtype, monkeypatch) -> None:
    """E, log π and total of a chunk of the head's logits, in place; the forward-only kernel gives the same bits."""
    if vocab < 4096:
        monkeypatch.setattr(kernel, "MAX_THREADS", 8)  # blocks of 64
    storage = torch.randn(4, vocab + 3) * 4  # rows apart, as the head pads them
    logits = storage[:, :vocab]
    bias = None if bias_dtype is None else torch.randn(vocab).to(bias_dtype)
    tokens = torch.randint(0, vocab, (4,))
    tokens[0], tokens[1] = 0, vocab - 1
    truth = softmax_truth(logits, tokens, bias, temperature, softcap)
    before, padding = storage.data_ptr(), storage[:, vocab:].clone()
    alone = kernel.target_logprobs(logits, tokens, bias=bias, temperature=temperature, softcap=softcap)
    e, out, total = kernel.target_softmax_(
        logits, tokens, bias=bias, temperature=temperature, softcap=softcap, dtype=dtype
    )
    torch.testing.assert_close(out.double(), truth[0], rtol=2e-6, atol=2e-6)
    assert (out <= 0).all()
    assert torch.equal(out, alone)
    close_softmax(e, total, truth[1])
    assert e.dtype == dtype
    assert e.data_ptr() == before
    assert torch.equal(storage[:, vocab:], padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchor_raised_again_and_again(dtype, monkeypatch) -> None:
    """Logits that climb by 50 nats a block, and what was stored and summed before is scaled down each time."""
    monkeypatch.setattr(kernel, "MAX_THREADS", 8)  # blocks of 64
    climb = torch.linspace(0, 250, 320).repeat(4, 1) + torch.randn(4, 320)
    climb[1] = climb[1].flip(0)  # the anchor is raised once, in the first block
    climb[2] /= 10  # 25 nats: never
    climb[3, 5] = -torch.inf  # the token itself: from nothing
    tokens = torch.tensor([0, 319, 1, 5])
    truth = softmax_truth(climb, tokens, None, 1.0, None)
    e, out, total = kernel.target_softmax_(climb.clone(), tokens, dtype=dtype)
    torch.testing.assert_close(out.double(), truth[0], rtol=2e-6, atol=0)  # −∞ included
    close_softmax(e, total, truth[1])
    assert torch.equal(kernel.target_logprobs(climb, tokens), out)
    # No exp(z − anchor) is beyond 2^60, and there are 320.
    assert (total < 320 * 2.0**60).all()
    # Where the last block holds the largest logit, what the first one stored is 0 or next to it.
    assert (e[0, 1:64].abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invalid_rows_are_never_read(dtype) -> None:
    logits = torch.randn(6, 4100)
    tokens = torch.tensor([3, 2**40, 4099, -100, 7, -(2**40)])
    valid = torch.tensor([True, False, True, False, True, False])
    clean = kernel.target_softmax_(logits[valid].clone(), tokens[valid], temperature=0.7, dtype=dtype)
    logits[~valid] = torch.nan
    alone = kernel.target_logprobs(logits, tokens, temperature=0.7, valid=valid)
    e, out, total = kernel.target_softmax_(logits, tokens, temperature=0.7, valid=valid, dtype=dtype)
    for mine, theirs in zip((e, out, total), clean, strict=True):
        assert torch.equal(mine[valid], theirs)
    assert torch.equal(alone, out)
    assert (e[~valid] == 0).all()
    assert (out[~valid] == 0).all()
    assert (total[~valid] == 1).all()


def test_a_token_out_of_range_is_no_address() -> None:
    """check_tokens reports it, on CUDA later; the kernels must not have read or written elsewhere by then."""
    logits = torch.randn(4, 50)
    inner = logits[1:3]
    before = logits.clone()
    kernel.target_softmax_(inner, torch.tensor([2**40, -1]))
    assert torch.equal(logits[0], before[0])
    assert torch.equal(logits[3], before[3])
    assert inner.isfinite().all()
