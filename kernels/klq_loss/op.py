"""The KLQ loss: (Q − G)² over the valid tokens, its gradients and its metrics, from log-probs or from hidden states."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import (
    Impl,
    check_count,
    check_number,
    check_tensor,
    check_tokens,
    compute_dtype,
    gradient_dtype,
    refuse_double_backward,
    resolve_impl,
)
from ..linear_logprob.op import check_head, check_head_numbers, head_pass
from . import reference

METRICS = ("td_error", "kl", "explained_variance", "value_error", "values", "returns")


class KLQLossOutput(NamedTuple):
    loss: Tensor  # ()
    logprobs: Tensor  # (…), log π of the tokens, detached; 0 in the invalid slots
    metrics: dict[str, Tensor]  # () each, detached; means over the valid tokens, 0 where there are none


def klq_loss(
    logprobs: Tensor,  # (…)
    ref_logprobs: Tensor,  # (…)
    values: Tensor,  # (…)
    returns: Tensor,  # (…)
    mask: Tensor | None = None,  # (…) bool
    *,
    tau: float,
    policy_weight: float = 1.0,
    value_weight: float = 1.0,
    num_tokens: float | Tensor | None = None,
    impl: Impl = "auto",
) -> KLQLossOutput:
    """Σ_valid (Q − G)² / num_tokens with Q = τ(log π − log π_ref) + V (arXiv 2508.17000, Eq. 6, 13 and Algorithm 2).

    logprobs: log π(token) in nats; ref_logprobs: log π_ref(token); values: V(s_t); returns: the λ-returns G; each
    (…), floating point. mask: (…) bool, None for all valid; an invalid slot is never read, NaN there does no harm.
    tau: the KL coefficient, in reward per nat. num_tokens: what the sum is divided by, for instance the number of
    valid tokens of all devices and microbatches together (a number above 0, or a 0-d tensor, whose value is not
    checked, where the other tensors are, as a copy from the CPU is a host sync); None for the number of valid tokens
    here. A count of 0 gives loss 0.
    policy_weight and value_weight (≥ 0) multiply the gradients 2τ(Q − G) and 2(Q − G) that reach logprobs and values;
    the loss value does not change. No gradient reaches ref_logprobs and returns.

    Returns the loss (0-d), logprobs with 0 in the invalid slots, and the metrics, computed without a host sync:
    td_error (mean of G − Q), kl (mean of log π − log π_ref: an estimate of KL(π‖π_ref) on the policy's own samples),
    explained_variance (1 − Var(G − Q) / Var(G); 0 where G is constant), value_error (mean of (V − G)²), values and
    returns (means of V and of G). All float32, or float64 where an argument is float64.
    Raises ValueError for wrong shapes, dtypes and devices, tau ≤ 0, a negative weight, num_tokens ≤ 0.
    """
    check_tensor("logprobs", logprobs)
    _check_targets(logprobs, "logprobs", ref_logprobs, values, returns, mask)
    _check_numbers(tau, policy_weight, value_weight, num_tokens)
    ref_logprobs, returns = ref_logprobs.detach(), returns.detach()
    chosen = resolve_impl(impl, logprobs, ref_logprobs, values, returns)
    if chosen == "reference":
        loss, valid_logprobs = reference.klq_loss(
            logprobs,
            ref_logprobs,
            values,
            returns,
            mask,
            tau=tau,
            policy_weight=policy_weight,
            value_weight=value_weight,
            num_tokens=num_tokens,
        )
        metrics = _metrics(valid_logprobs, ref_logprobs, values, returns, mask, tau)
    else:
        loss, valid_logprobs, metrics, _ = _klq_loss(
            logprobs,
            values,
            ref_logprobs,
            returns,
            mask,
            _count_tensor(num_tokens, logprobs.device),
            float(tau),
            float(policy_weight),
            float(value_weight),
            chosen,
        )
    return KLQLossOutput(loss, valid_logprobs, dict(zip(METRICS, metrics.unbind(), strict=True)))


def linear_klq_loss(
    hidden: Tensor,  # (…, D)
    weight: Tensor,  # (V, D)
    tokens: Tensor,  # (…) int64
    ref_logprobs: Tensor,  # (…)
    values: Tensor,  # (…)
    returns: Tensor,  # (…)
    mask: Tensor | None = None,  # (…) bool
    *,
    tau: float,
    policy_weight: float = 1.0,
    value_weight: float = 1.0,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    num_tokens: float | Tensor | None = None,
    impl: Impl = "auto",
) -> KLQLossOutput:
    """`klq_loss` with log π = log softmax(softcap(hidden · weightᵀ + bias) / temperature)[token], without the logits.

    hidden: (…, D), weight: (V, D), bias: (V,), floating point, each in its own dtype; tokens: (…) int64, in [0, V)
    wherever the mask is true. What the invalid slots of hidden and tokens hold does not matter either. The other
    arguments, the result and the errors are those of `klq_loss`; the logits follow `linear_logprobs`, and with them
    the dtype of the result: float64 where hidden or weight is float64.

    The gradient is produced in the forward pass, as Q − G is known token by token: 6·n·V·D floating-point operations
    for n valid tokens, 4·n·V·D where hidden or weight is frozen, 2·n·V·D without gradients. With Triton n counts all
    slots: to leave the invalid ones out, their number would have to reach the host, which would wait for the device.
    Where it is known there anyhow, pass packed tokens (hidden[mask], …), which cost what they are. Logits exist for a
    chunk of tokens at a time. A gradient is accumulated in the dtype of the result, held until backward, and takes the
    dtype of its tensor there. A second backward (retain_graph=True) computes everything again; double backward raises.
    """
    check_head(hidden, weight, tokens, bias, temperature, softcap)
    _check_targets(tokens, "tokens", ref_logprobs, values, returns, mask)
    _check_numbers(tau, policy_weight, value_weight, num_tokens)
    ref_logprobs, returns = ref_logprobs.detach(), returns.detach()
    chosen = resolve_impl(impl, hidden, weight)
    if chosen == "reference":
        check_tokens("tokens", tokens if mask is None else tokens[mask], weight.shape[0])
        loss, logprobs = reference.linear_klq_loss(
            hidden,
            weight,
            tokens,
            ref_logprobs,
            values,
            returns,
            mask,
            tau=tau,
            policy_weight=policy_weight,
            value_weight=value_weight,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            num_tokens=num_tokens,
        )
        metrics = _metrics(logprobs, ref_logprobs, values, returns, mask, tau)
    else:
        wanted = torch.is_grad_enabled()
        loss, flat_logprobs, metrics, *_ = _linear_klq_loss(
            hidden.reshape(tokens.numel(), weight.shape[1]),
            weight,
            bias,
            values.reshape(-1),
            tokens.reshape(-1),
            ref_logprobs.reshape(-1),
            returns.reshape(-1),
            None if mask is None else mask.reshape(-1),
            _count_tensor(num_tokens, hidden.device),
            float(tau),
            float(policy_weight),
            float(value_weight),
            float(temperature),
            softcap,
            wanted and hidden.requires_grad,
            wanted and weight.requires_grad,
            wanted and bias is not None and bias.requires_grad,
            chosen,
        )
        logprobs = flat_logprobs.view(tokens.shape)
    return KLQLossOutput(loss, logprobs, dict(zip(METRICS, metrics.unbind(), strict=True)))


class KLQLoss(nn.Module):
    """`klq_loss` with its numbers fixed; forward takes (logprobs, ref_logprobs, values, returns, mask)."""

    def __init__(self, *, tau: float, policy_weight: float = 1.0, value_weight: float = 1.0, impl: Impl = "auto"):
        super().__init__()
        _check_numbers(tau, policy_weight, value_weight, None)
        self.tau, self.policy_weight, self.value_weight, self.impl = tau, policy_weight, value_weight, impl

    def forward(
        self,
        logprobs: Tensor,  # (…)
        ref_logprobs: Tensor,  # (…)
        values: Tensor,  # (…)
        returns: Tensor,  # (…)
        mask: Tensor | None = None,  # (…) bool
        *,
        num_tokens: float | Tensor | None = None,
    ) -> KLQLossOutput:
        return klq_loss(
            logprobs,
            ref_logprobs,
            values,
            returns,
            mask,
            tau=self.tau,
            policy_weight=self.policy_weight,
            value_weight=self.value_weight,
            num_tokens=num_tokens,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"tau={self.tau}, policy_weight={self.policy_weight}, value_weight={self.value_weight}"


class LinearKLQLoss(nn.Module):
    """`linear_klq_loss` with its numbers fixed; forward takes (hidden, weight, tokens, ref_logprobs, …, mask)."""

    def __init__(
        self,
        *,
        tau: float,
        policy_weight: float = 1.0,
        value_weight: float = 1.0,
        temperature: float = 1.0,
        softcap: float | None = None,
        impl: Impl = "auto",
    ):
        super().__init__()
        _check_numbers(tau, policy_weight, value_weight, None)
        check_head_numbers(temperature, softcap)
        self.tau, self.policy_weight, self.value_weight, self.impl = tau, policy_weight, value_weight, impl
        self.temperature, self.softcap = temperature, softcap

    def forward(
        self,
        hidden: Tensor,  # (…, D)
        weight: Tensor,  # (V, D)
        tokens: Tensor,  # (…) int64
        ref_logprobs: Tensor,  # (…)
        values: Tensor,  # (…)
        returns: Tensor,  # (…)
        mask: Tensor | None = None,  # (…) bool
        *,
        bias: Tensor | None = None,  # (V,)
        num_tokens: float | Tensor | None = None,
    ) -> KLQLossOutput:
        return linear_klq_loss(
            hidden,
            weight,
            tokens,
            ref_logprobs,
            values,
            returns,
            mask,
            tau=self.tau,
            policy_weight=self.policy_weight,
            value_weight=self.value_weight,
            bias=bias,
            temperature=self.temperature,
            softcap=self.softcap,
            num_tokens=num_tokens,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        weights = f"policy_weight={self.policy_weight}, value_weight={self.value_weight}"
        return f"tau={self.tau}, {weights}, temperature={self.temperature}, softcap={self.softcap}"


def _check_targets(
    like: Tensor, like_name: str, ref_logprobs: Tensor, values: Tensor, returns: Tensor, mask: Tensor | None
) -> None:
    shape, device = tuple(like.shape), like.device
    for name, value in (("ref_logprobs", ref_logprobs), ("values", values), ("returns", returns)):
        check_tensor(name, value, shape=shape, like=like_name, device=device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, like=like_name, dtypes=(torch.bool,), device=device)


def _check_numbers(tau: float, policy_weight: float, value_weight: float, num_tokens: float | Tensor | None) -> None:
    check_number("tau", tau, low=0.0, open_low=True)
    check_number("policy_weight", policy_weight, low=0.0)
    check_number("value_weight", value_weight, low=0.0)
    check_count("num_tokens", num_tokens)


# The mathematics of the loss in PyTorch, once for both operations; kernel.py has the same two functions in Triton.


def _forward(
    logprobs: Tensor,
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    num_tokens: Tensor | None,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, log π with 0 in the invalid slots, the metrics, and 1 / number of tokens."""
    residuals, valid_logprobs = _residuals(logprobs, values, ref_logprobs, returns, mask, tau)
    inverse_count = _inverse_count(num_tokens, mask, residuals)
    valid_logprobs = valid_logprobs.clone(memory_format=torch.contiguous_format)  # an output may not alias an argument
    metrics = _metrics(valid_logprobs, ref_logprobs, values, returns, mask, tau)
    return residuals.square().sum() * inverse_count, valid_logprobs, metrics, inverse_count


def _gradients(
    grad: Tensor | None,
    inverse_count: Tensor,
    logprobs: Tensor,
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    tau: float,
    policy_weight: float,
    value_weight: float,
) -> tuple[Tensor, Tensor]:
    """The gradients for log π and V, in their dtypes, times grad; 0 in the invalid slots."""
    residuals, _ = _residuals(logprobs, values, ref_logprobs, returns, mask, tau)
    scale = inverse_count if grad is None else inverse_count * grad
    policy_gradient = residuals * (scale * (2 * tau * policy_weight))
    value_gradient = residuals * (scale * (2 * value_weight))
    return policy_gradient.to(logprobs.dtype), value_gradient.to(values.dtype)


def _residuals(
    logprobs: Tensor, values: Tensor, ref_logprobs: Tensor, returns: Tensor, mask: Tensor | None, tau: float
) -> tuple[Tensor, Tensor]:
    """Q − G with Q = τ(log π − log π_ref) + V (Eq. 13), and log π; both 0 in the invalid slots.

    Q − G is minus the TD error of Algorithm 2 where G is fresh.
    """
    dtype = compute_dtype(logprobs, values, ref_logprobs, returns)
    logprobs, values, ref_logprobs, returns = (
        each.to(dtype) if mask is None else torch.where(mask, each, 0).to(dtype)
        for each in (logprobs, values, ref_logprobs, returns)
    )
    return tau * (logprobs - ref_logprobs) + values - returns, logprobs


def _inverse_count(num_tokens: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor:
    """1 / num_tokens as a 0-d tensor, by default 1 / number of valid tokens; 0 for 1 / 0. No host sync."""
    if num_tokens is None:
        num_tokens = torch.full((), like.numel(), device=like.device) if mask is None else mask.sum()
    num_tokens = num_tokens.detach().to(like.device, torch.float64)
    return torch.where(num_tokens == 0, 0, num_tokens.reciprocal()).to(like.dtype)


def _metrics(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, returns: Tensor, mask: Tensor | None, tau: float
) -> Tensor:  # (6,), in the order of METRICS
    inverse_count = _inverse_count(None, mask, logprobs)
    ref_logprobs, values, returns = (each.detach().to(logprobs.dtype) for each in (ref_logprobs, values, returns))

    def mean(each: Tensor) -> Tensor:
        return (each if mask is None else torch.where(mask, each, 0)).sum() * inverse_count

    def variance(each: Tensor, its_mean: Tensor) -> Tensor:
        deviations = each - its_mean
        return mean((deviations - mean(deviations)).square())  # its_mean is rounded, which counts where each is large

    residuals, _ = _residuals(logprobs, values, ref_logprobs, returns, mask, tau)
    td_error, returns_mean = -mean(residuals), mean(returns)
    returns_variance = variance(returns, returns_mean)
    unexplained = variance(residuals, -td_error) / returns_variance
    explained_variance = torch.where(_varies(returns, mask) & (returns_variance > 0), 1 - unexplained, 0)
    value_error = mean((values - returns).square())
    kl = mean(logprobs - ref_logprobs)
    return torch.stack((td_error, kl, explained_variance, value_error, mean(values), returns_mean))


def _varies(x: Tensor, mask: Tensor | None) -> Tensor:  # () bool
    """Whether two valid entries differ, which a variance does not tell: rounded, a constant's need not be 0."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=x.device)
    low, high = (x, x) if mask is None else (torch.where(mask, x, each) for each in (torch.inf, -torch.inf))
    return high.amax() > low.amin()


def _count_tensor(num_tokens: float | Tensor | None, device: torch.device) -> Tensor | None:
    if num_tokens is None or isinstance(num_tokens, Tensor):
        return num_tokens
    return torch.full((), num_tokens, dtype=torch.float64, device=device)


# klq_loss: elementwise; the backward pass computes Q − G again.


@torch.library.custom_op("klq_fast::klq_loss", mutates_args=())
def _klq_loss(
    logprobs: Tensor,
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    num_tokens: Tensor | None,
    tau: float,
    policy_weight: float,
    value_weight: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, log π with 0 in the invalid slots, the metrics, and 1 / number of tokens."""
    forward, _ = _functions(impl)
    return forward(logprobs, values, ref_logprobs, returns, mask, num_tokens, tau)


@_klq_loss.register_fake
def _(logprobs, values, ref_logprobs, returns, mask, num_tokens, tau, policy_weight, value_weight, impl):
    dtype = compute_dtype(logprobs, ref_logprobs, values, returns)
    each = torch.empty(logprobs.shape, dtype=dtype, device=logprobs.device)
    return each.new_empty(()), each, each.new_empty(len(METRICS)), each.new_empty(())


@torch.library.custom_op("klq_fast::klq_loss_backward", mutates_args=())
def _klq_loss_backward(
    grad: Tensor,
    inverse_count: Tensor,
    logprobs: Tensor,
    values: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    tau: float,
    policy_weight: float,
    value_weight: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _, gradients = _functions(impl)
    return gradients(
        grad, inverse_count, logprobs, values, ref_logprobs, returns, mask, tau, policy_weight, value_weight
    )


@_klq_loss_backward.register_fake
def _(grad, inverse_count, logprobs, values, *rest):
    return tuple(torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in (logprobs, values))


def _functions(
    impl: str,
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]:
    """The forward pass and the gradients, of this file or of the Triton kernels."""
    if impl == "torch":
        return _forward, _gradients
    from . import kernel  # Triton is not installed everywhere, and slow to import

    return kernel.klq_loss, kernel.klq_loss_gradients


def _klq_loss_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1], *inputs[:5])
    ctx.numbers = inputs[6:]


def _klq_loss_autograd(ctx, grad: Tensor | None, *_):
    refuse_double_backward("klq_loss")
    if grad is None:
        return (None,) * 10
    return *_klq_loss_backward(grad, *ctx.saved_tensors, *ctx.numbers), *(None,) * 8


_klq_loss.register_autograd(_klq_loss_autograd, setup_context=_klq_loss_context)


# linear_klq_loss: the head's gradients are made in the forward pass and handed over in the backward pass.


@torch.library.custom_op("klq_fast::linear_klq_loss", mutates_args=())
def _linear_klq_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    tokens: Tensor,
    ref_logprobs: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    num_tokens: Tensor | None,
    tau: float,
    policy_weight: float,
    value_weight: float,
    temperature: float,
    softcap: float | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, log π with 0 in the invalid slots, the metrics, the gradients for hidden, weight, bias and V."""
    dtype, size = compute_dtype(hidden, weight), len(hidden)
    ref_logprobs, values, returns = ref_logprobs.to(dtype), values.to(dtype), returns.to(dtype)
    rows = None
    if mask is not None and impl == "triton":  # all slots, valid or not: nothing waits for the host
        tokens = torch.where(mask, tokens, 0)
    elif mask is not None:  # only the valid tokens
        rows, mask = mask.nonzero().squeeze(1), None
        tokens, ref_logprobs, values, returns = (each[rows] for each in (tokens, ref_logprobs, values, returns))
    check_tokens("tokens", tokens, weight.shape[0])
    forward, gradients = _functions(impl)
    inverse_count = _inverse_count(num_tokens, mask, values)

    def loss_gradients(logprobs: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        targets = (None if each is None else each[chunk] for each in (values, ref_logprobs, returns, mask))
        return gradients(None, inverse_count, logprobs, *targets, tau, policy_weight, value_weight)

    logprobs, hidden_gradient, weight_gradient, bias_gradient = head_pass(
        hidden,
        weight,
        bias,
        tokens,
        temperature,
        softcap,
        impl=impl,
        rows=rows,
        valid=mask,
        row_gradient=(lambda *of: loss_gradients(*of)[0]) if hidden_grad or weight_grad or bias_grad else None,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )
    _, value_gradient = loss_gradients(logprobs, slice(None))
    loss, logprobs, metrics, _ = forward(logprobs, values, ref_logprobs, returns, mask, num_tokens, tau)
    if rows is not None:
        zeros = logprobs.new_zeros(size)
        logprobs, value_gradient = (zeros.index_copy(0, rows, each) for each in (logprobs, value_gradient))
    return loss, logprobs, metrics, hidden_gradient, weight_gradient, bias_gradient, value_gradient


@_linear_klq_loss.register_fake
def _(hidden, weight, bias, values, *rest):
    hidden_grad, weight_grad, bias_grad, _ = rest[-4:]
    like = torch.empty(0, dtype=compute_dtype(hidden, weight), device=hidden.device)
    return (
        like.new_empty(()),
        like.new_empty(hidden.shape[0]),
        like.new_empty(len(METRICS)),
        like.new_empty(hidden.shape if hidden_grad else (0,)),
        like.new_empty(weight.shape if weight_grad else (0,)),
        like.new_empty(weight.shape[0] if bias_grad else 0),
        like.new_empty(hidden.shape[0]),
    )


def _linear_klq_loss_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no (V, D) zeros for the outputs that have no gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:9])
    ctx.numbers = inputs[9:]
    # Not among the saved tensors: backward gives these buffers away, and a parameter takes a gradient without a copy
    # only where nobody else holds it.
    ctx.gradients = output[3:]


def _linear_klq_loss_backward(ctx, grad: Tensor | None, *_):
    refuse_double_backward("linear_klq_loss")
    if grad is None:
        return (None,) * 18
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:  # a second backward
        gradients = _linear_klq_loss(*ctx.saved_tensors, *ctx.numbers)[3:]
    results = []
    for gradient, source, needed in zip(gradients, ctx.saved_tensors, ctx.needs_input_grad, strict=False):
        results.append(_scaled_(gradient, grad, gradient_dtype(source)) if needed else None)
    return *results, *(None,) * 14


def _scaled_(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient · grad in dtype; in place, as nobody else holds gradient, except while a compiler traces."""
    if type(grad) is not Tensor:
        return (gradient * grad).to(dtype)
    if grad.is_cuda and gradient.dtype != dtype:  # one pass over memory; on the CPU it would make a copy first
        return torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype))
    if grad.is_cuda or grad != 1:  # on CUDA, looking at grad would cost a host sync
        gradient.mul_(grad)
    return gradient.to(dtype)


_linear_klq_loss.register_autograd(_linear_klq_loss_backward, setup_context=_linear_klq_loss_context)
