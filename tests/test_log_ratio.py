"""logprobs and log_ratio from logits."""

import math

import pytest
import torch
from torch import Tensor
from watch import watch

from klq_fast import log_ratio, logprobs
from klq_fast.kernels.log_ratio import reference
from klq_fast.kernels.log_ratio.op import _logprobs

IMPLS = ("torch", "reference")


def value_and_gradient(logits: Tensor, tokens: Tensor, weights: Tensor, **options) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    out = logprobs(logits, tokens, **options)
    (gradient,) = torch.autograd.grad((out * weights).sum(), logits)
    return out.detach(), gradient


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl) -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.25, 0.5]], dtype=torch.float64)
    tokens = torch.tensor([2, 0])
    out = logprobs(probabilities.log() + 3.0, tokens, impl=impl)
    torch.testing.assert_close(out, torch.tensor([0.7, 0.25], dtype=torch.float64).log())
    # At temperature 1/2 a probability is squared before it is normalised.
    squared = torch.tensor([0.49 / 0.54, 0.0625 / 0.375], dtype=torch.float64).log()
    out = logprobs(probabilities.log(), tokens, temperature=0.5, impl=impl)
    torch.testing.assert_close(out, squared)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 37, 4099])
def test_error_is_at_most_twice_eager(vocab, dtype, temperature) -> None:
    logits = (torch.randn(13, vocab) * 5).to(dtype)
    tokens = torch.randint(0, vocab, (13,))
    tokens[0], tokens[1] = 0, vocab - 1
    weights = torch.randn(13)
    truth = value_and_gradient(logits.double(), tokens, weights.double(), temperature=temperature, impl="reference")
    eager = value_and_gradient(logits, tokens, weights, temperature=temperature, impl="reference")
    ours = value_and_gradient(logits, tokens, weights, temperature=temperature)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    # The absolute part: a few float32 roundings of logits up to 30, and of gradients up to 3.
    for mine, theirs, exact, absolute in zip(ours, eager, truth, (4e-6, 1e-6), strict=True):
        rows = [(each.double() - exact).abs().reshape(13, -1).amax(dim=1) for each in (mine, theirs)]
        assert (rows[0] <= 2 * rows[1] + absolute).all(), (rows[0] - 2 * rows[1]).max()


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
def test_hard_logits(case) -> None:
    """Relative precision of log π(a) and of every entry of its gradient, where fp32 1 − p would have none left."""
    logits, tokens = HARD[case], torch.tensor([0])
    truth_logits = logits.double().requires_grad_()
    others = truth_logits[:, 1:].logsumexp(dim=1) - truth_logits[:, 0]  # log of (1 − p) / p
    truth = -torch.nn.functional.softplus(others, threshold=1e9)  # log p
    probabilities = truth_logits.softmax(dim=1).detach()
    out, gradient = value_and_gradient(logits, tokens, torch.ones(1))
    expected_gradient = -probabilities
    expected_gradient[:, 0] = torch.sigmoid(others.detach())
    # float32: the spacing of logits of size x is 1.2e-7·x, which moves a probability by as much, relatively. Here the
    # gaps between logits, not the logits, count: at most 690.
    torch.testing.assert_close(out.double(), truth.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-37)


def test_never_above_zero() -> None:
    logits = torch.randn(2000, 64) * 0.1
    tokens = torch.randint(0, 64, (2000,))
    logits[torch.arange(2000), tokens] += torch.linspace(0, 40, 2000)
    out = logprobs(logits, tokens)
    assert (out <= 0).all()
    assert (out[:1000] < 0).all()  # 1 − p stays visible far below 1.2e-7: up to a gap of 40 it is above 1e-17
    assert (logprobs(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)) == 0).all()


def test_log_ratio() -> None:
    logits = torch.randn(3, 7, 301, dtype=torch.bfloat16, requires_grad=True)
    ref_logits = torch.randn(3, 7, 301, requires_grad=True)
    tokens = torch.randint(0, 301, (3, 7))
    out = log_ratio(logits, ref_logits, tokens, temperature=0.7)
    expected = reference.log_ratio(logits.double(), ref_logits.double(), tokens, temperature=0.7)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)  # two log-probs of size 10 in float32
    out.sum().backward()
    assert logits.grad is not None
    assert ref_logits.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_ratio_of_equals_is_exactly_zero(dtype) -> None:
    logits = (torch.randn(40, 5003) * 10).to(dtype)
    tokens = torch.randint(0, 5003, (40,))
    assert (log_ratio(logits, logits.clone(), tokens, temperature=0.7) == 0).all()


def test_gradcheck() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64).transpose(0, 1).requires_grad_()
    tokens = torch.randint(0, 5, (3, 2))
    assert torch.autograd.gradcheck(lambda each: logprobs(each, tokens, temperature=0.7), logits)


def test_strides_and_leading_shapes() -> None:
    logits = torch.randn(4, 6, 11)
    tokens = torch.randint(0, 11, (4, 6))
    expected = reference.logprobs(logits, tokens)
    views = {
        "window": (logits[:, 2:-1], tokens[:, 2:-1], expected[:, 2:-1]),
        "transposed": (logits.transpose(0, 1), tokens.T, expected.T),
        "strided vocabulary": (torch.stack((logits, logits), dim=-1)[..., 1], tokens, expected),
        "expanded": (logits[:1].expand(4, 6, 11), tokens[:1].expand(4, 6), expected[:1].expand(4, 6)),
        "one row": (logits[0, 0], tokens[0, 0], expected[0, 0]),
        "no rows": (logits[:0], tokens[:0], expected[:0]),
        "no rows, 1 dimension": (logits[0, :0], tokens[0, :0], expected[0, :0]),
    }
    for name, (view, view_tokens, truth) in views.items():
        torch.testing.assert_close(logprobs(view, view_tokens), truth, msg=f"{name} differs")
        _, gradient = value_and_gradient(view, view_tokens, torch.ones(()))
        _, expected_gradient = value_and_gradient(view, view_tokens, torch.ones(()), impl="reference")
        torch.testing.assert_close(gradient, expected_gradient, msg=f"{name}: gradient differs")


def test_rows_are_independent_and_repeat_bitwise() -> None:
    logits = torch.randn(7, 300_000)  # chunks of 3 rows
    tokens = torch.randint(0, 300_000, (7,))
    whole, gradient = value_and_gradient(logits, tokens, torch.ones(()))
    again, gradient_again = value_and_gradient(logits, tokens, torch.ones(()))
    assert torch.equal(whole, again)
    assert torch.equal(gradient, gradient_again)
    for row in range(7):
        alone, gradient_alone = value_and_gradient(logits[row : row + 1], tokens[row : row + 1], torch.ones(()))
        assert torch.equal(whole[row], alone[0])
        assert torch.equal(gradient[row], gradient_alone[0])


def test_memory() -> None:
    logits = torch.randn(2, 201, 20_000, dtype=torch.bfloat16)  # 16 MiB
    tokens = torch.randint(0, 20_000, (2, 200))
    assert watch(lambda: logprobs(logits[:, 1:], tokens)).peak < 11 * 2**20  # a chunk in bfloat16 and in float32

    trained = logits.requires_grad_()
    whole = trained.numel() * 2
    seen = watch(lambda: logprobs(trained, torch.cat((tokens, tokens[:, :1]), dim=1)).sum().backward())
    assert whole <= seen.peak < whole + 11 * 2**20


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("token", [-1, -100, 7, 2**40])
def test_token_out_of_range(impl, token) -> None:
    with pytest.raises(ValueError, match=rf"tokens: got a token {token}, expected \[0, 7\)"):
        logprobs(torch.randn(3, 7), torch.tensor([0, token, 6]), impl=impl)


def test_bad_arguments() -> None:
    logits, tokens = torch.randn(3, 7), torch.tensor([0, 1, 6])
    for message, call in {
        r"logits: got dtype int64, expected float32": lambda: logprobs(tokens.unsqueeze(1), tokens),
        r"logits: got list, expected a tensor": lambda: logprobs(logits.tolist(), tokens),
        r"logits: got shape \(\), expected \(…, V\)": lambda: logprobs(torch.tensor(1.0), tokens),
        r"logits: got shape \(3, 0\), expected \(…, V\)": lambda: logprobs(logits[:, :0], tokens),
        r"tokens: got shape \(2,\), expected \(3,\)": lambda: logprobs(logits, tokens[:2]),
        r"tokens: got shape \(3, 1\), expected \(3,\)": lambda: logprobs(logits, tokens.unsqueeze(1)),
        r"tokens: got dtype int32, expected int64": lambda: logprobs(logits, tokens.int()),
        r"tokens: got a tensor on meta, expected cpu": lambda: logprobs(logits, tokens.to("meta")),
        r"temperature: got 0, expected a number in \(0, ": lambda: logprobs(logits, tokens, temperature=0),
        r"temperature: got nan": lambda: logprobs(logits, tokens, temperature=math.nan),
        r"temperature: got 'hot'": lambda: logprobs(logits, tokens, temperature="hot"),  # type: ignore[arg-type]
        r'impl: got \'fast\', expected "auto"': lambda: logprobs(logits, tokens, impl="fast"),  # type: ignore[arg-type]
        r"ref_logits: got shape \(3, 6\), expected \(3, 7\)": lambda: log_ratio(logits, logits[:, :6], tokens),
        r"ref_logits: got a tensor on meta": lambda: log_ratio(logits, logits.to("meta"), tokens),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_double_backward_raises() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    out = logprobs(logits, torch.tensor([0, 1, 6])).sum()
    with pytest.raises(RuntimeError, match="logprobs: double backward"):
        torch.autograd.grad(out, logits, create_graph=True)
    (first,) = torch.autograd.grad(out, logits, retain_graph=True)
    (second,) = torch.autograd.grad(out, logits)
    assert torch.equal(first, second)


def test_opcheck() -> None:
    logits = torch.randn(3, 4, 7, requires_grad=True)
    tokens = torch.randint(0, 7, (3, 4))
    torch.library.opcheck(_logprobs, (logits, tokens, 0.7))
    torch.library.opcheck(_logprobs, (logits.detach().bfloat16(), tokens, 1.0))
