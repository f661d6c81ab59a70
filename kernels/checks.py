"""Argument checks shared by every operation: an error names the argument, what came and what was expected."""

from numbers import Real
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Tensor,
    *,
    shape: tuple[int, ...] | None = None,
    like: str = "",  # where `shape` comes from, for the message: "tokens", "weight.shape[1]"
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got dtype {str(value.dtype).removeprefix('torch.')}, expected {expected}")
    if shape is not None and tuple(value.shape) != shape:
        source = f" (the shape of {like})" if like else ""
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}{source}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}, where the other arguments are")


def check_number(name: str, value: float, *, low: float, high: float = float("inf"), open_low: bool = False) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not (low < value if open_low else low <= value) or not value <= high or value == float("inf"):
        left, right = "(" if open_low else "[", ")" if high == float("inf") else "]"
        raise ValueError(f"{name}: got {value!r}, expected a number in {left}{low:g}, {high:g}{right}")


def check_count(name: str, value: float | Tensor | None) -> None:
    """A number of tokens to divide by: a number above 0, or a 0-d tensor, whose value is not looked at."""
    if isinstance(value, Tensor):
        check_tensor(name, value, shape=(), dtypes=(torch.int64, torch.int32, torch.float32, torch.float64))
    elif value is not None:
        check_number(name, value, low=0.0, open_low=True)


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Token ids must lie in [0, vocab_size). On CUDA the check runs on the device and costs no synchronisation."""
    if tokens.is_cuda:
        torch._assert_async(((tokens >= 0) & (tokens < vocab_size)).all(), f"{name}: a token outside [0, {vocab_size})")
    elif tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"{name}: got a token {low if low < 0 else high}, expected [0, {vocab_size})")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any of the tensors is float64, else float32: what an operation computes in and returns."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """What autograd takes this tensor's gradient in: a parameter in 16 bits may ask for float32 (`grad_dtype`)."""
    return (tensor.grad_dtype or tensor.dtype) if tensor.is_leaf else tensor.dtype


def refuse_double_backward(name: str) -> None:
    """Called in a backward pass: with create_graph=True, its gradients would silently count as constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: double backward (create_graph=True) is not supported; impl='reference' supports it"
        )


def resolve_impl(impl: Impl, *tensors: Tensor | None) -> Literal["triton", "torch", "reference"]:
    """The implementation that will run on these tensors; an explicit choice that cannot run raises.

    "auto" is Triton for CUDA tensors, except in float64, which the kernels do not compute in; elsewhere torch.
    "triton" also takes CPU tensors where Triton interprets its kernels (TRITON_INTERPRET=1 before it is imported).
    """
    if impl not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f'impl: got {impl!r}, expected "auto", "triton", "torch" or "reference"')
    on_cuda = all(tensor is None or tensor.is_cuda for tensor in tensors)
    in_float64 = compute_dtype(*tensors) == torch.float64
    if impl == "auto":
        return "triton" if on_cuda and not in_float64 else "torch"
    if impl == "triton":
        if in_float64:
            raise ValueError(
                'impl: got "triton" with float64 tensors, expected "auto", "torch" or "reference" for them'
            )
        # torch.compile cannot trace Triton's knobs; there the launch itself raises where nothing interprets it.
        if not on_cuda and not torch.compiler.is_compiling() and not _interpreted():
            raise ValueError('impl: got "triton" with tensors on the CPU, expected CUDA tensors')
    return impl


def _interpreted() -> bool:
    from triton import knobs  # not installed everywhere, and slow to import

    return knobs.runtime.interpret
