"""linear_logprobs: log π(token) from hidden states, forward, and forward and backward.

Work: 2·N·V·D floating-point operations forward; a gradient of any later loss needs 4·N·V·D more, and 2·N·V·D again
where the logits are not kept. The floor is the products alone, logits kept: one of (N, D)·(D, V), and for the backward
pass (N, V)·(V, D) and (V, N)·(N, D).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from klq_fast import linear_logprobs

from .harness import FLOOR, OURS, Case, Outputs, Peer, absolute_error, add_peers, relative_error

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), tokens (N,) -> (N,)

MODELS = ((2048, 50304), (2048, 128256), (3584, 152064))  # D, V of Pythia-1B, Llama-3.2-1B, Qwen2.5-7B
SIZES = {  # N, D, V
    "cuda": [(N, D, V) for D, V in MODELS for N in (8192, 2048, 32768)],
    "cpu": [(64, 256, 50304), (256, 256, 50304)],
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# The logits of bfloat16 inputs are summed in float32, and the inputs are exact: 1e-4 nats, the project's goal, is some
# five times the rounding of float32 logits of size 20. Gradients come out in the inputs' dtype, from products of
# bfloat16 numbers: 8e-3 of the largest entry is four roundings of 2^-9.
LOGPROB_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 2e-5}


def make_inputs(N: int, D: int, V: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight, tokens. The token's logit is 0 to 20 above the others', whose spread is 1: π from e^-11 to 1."""
    torch.manual_seed(0)
    dtype = DTYPES[device]
    weight = torch.randn(V, D, device=device, dtype=dtype).mul_(D**-0.5)
    tokens = torch.randint(V, (N,), device=device)
    hidden = torch.randn(N, D, device=device, dtype=dtype)
    hidden += 20 * torch.rand(N, 1, device=device, dtype=dtype) * weight[tokens]
    torch._dynamo.maybe_mark_dynamic(hidden, 0)
    torch._dynamo.maybe_mark_dynamic(tokens, 0)
    return hidden.requires_grad_(), weight.requires_grad_(), tokens


def eager(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def build_liger_cross_entropy() -> Logprobs:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        # bias, class weights, ignore_index, z-loss, label smoothing, reduction, softcap, return z-loss, accum_dtype
        options = (None, None, -100, 0.0, 0.0, "none", None, False, torch.float32)
        return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, tokens, *options)[0]

    return logprobs


def build_liger_chunked() -> Logprobs:
    """The log-probs inside Liger's fused linear GRPO and PPO losses."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    def logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, tokens[None])[0]

    return logprobs


def build_cut_cross_entropy() -> Logprobs:
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, tokens, reduction="none")

    return logprobs


def build_torch_cross_entropy() -> Logprobs:
    def logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        # On CPU it would by itself take chunks of one to a few rows, which take over ten times as long.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if hidden.is_cuda else 256)
        return -F.linear_cross_entropy(hidden, weight, tokens, reduction="none", options=options)

    return logprobs


PEERS = {
    "Liger fused linear cross-entropy": Peer("liger-kernel", build_liger_cross_entropy, needs_cuda=True),
    "Liger fused linear GRPO/PPO's log-probs": Peer("liger-kernel", build_liger_chunked),
    "cut-cross-entropy": Peer("cut-cross-entropy", build_cut_cross_entropy, needs_cuda=True),
    "torch F.linear_cross_entropy": Peer('"torch>=2.13"', build_torch_cross_entropy),
}


def products(hidden: Tensor, weight: Tensor, backward: bool) -> Callable[[], Outputs]:
    """The matrix products of the loss alone, in the inputs' dtype, with all logits in memory that is already there."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    gradients = torch.empty_like(hidden), torch.empty_like(weight)

    def floor() -> Outputs:
        torch.mm(hidden, weight.T, out=logits)
        if backward:
            torch.mm(logits, weight, out=gradients[0])
            torch.mm(logits.T, hidden, out=gradients[1])
        return {}

    return floor


def truth(
    hidden: Tensor, weight: Tensor, tokens: Tensor, loss: Callable[[Tensor, slice], Tensor] | None, rows: int = 1024
) -> Outputs:
    """log π in float64, and the gradients of Σ loss(log π of some rows, which rows): a chunk of rows at a time."""
    wide_hidden, wide_weight = (x.detach().double().requires_grad_(loss is not None) for x in (hidden, weight))
    logprobs = []
    for start in range(0, len(tokens), rows):
        chunk = slice(start, start + rows)
        logits = wide_hidden[chunk] @ wide_weight.T
        logprobs.append(logits.log_softmax(-1).gather(1, tokens[chunk, None]).squeeze(1))
        del logits
        if loss is not None:
            loss(logprobs[-1], chunk).backward()
            logprobs[-1] = logprobs[-1].detach()
    results = {"logprobs": torch.cat(logprobs)}
    if wide_hidden.grad is not None and wide_weight.grad is not None:
        results |= {"hidden": wide_hidden.grad, "weight": wide_weight.grad}
    return results


def errors(results: Outputs, truths: Outputs) -> dict[str, float]:
    """Of log-probs in nats; of the others relative to the largest entry."""
    return {
        name: (absolute_error if name == "logprobs" else relative_error)(result.detach(), truths[name])
        for name, result in results.items()
    }


def cases(device: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    for N, D, V in SIZES[device]:
        for backward in (False, True):
            yield f"linear_logprobs {N}x{D}x{V}{' backward' * backward}", partial(case, N, D, V, backward, device)


def case(N: int, D: int, V: int, backward: bool, device: str) -> Case:
    hidden, weight, tokens = make_inputs(N, D, V, device)
    weights = torch.randn(N, device=device)  # what a later loss sends back

    def wrap(logprobs: Logprobs) -> Callable[[], Outputs]:
        def forward() -> Outputs:
            with torch.no_grad():
                return {"logprobs": logprobs(hidden, weight, tokens)}

        def forward_and_backward() -> Outputs:
            results = logprobs(hidden, weight, tokens)
            gradients = torch.autograd.grad(results, (hidden, weight), weights.to(results.dtype))
            return {"logprobs": results.detach(), "hidden": gradients[0], "weight": gradients[1]}

        return forward_and_backward if backward else forward

    contenders = {
        FLOOR: products(hidden, weight, backward),
        OURS: wrap(linear_logprobs),
        "eager": wrap(eager),
        "torch.compile": wrap(torch.compile(eager)),
    }
    absent = add_peers(contenders, PEERS, device, wrap)
    truths = truth(
        hidden, weight, tokens, (lambda logprobs, chunk: (logprobs * weights[chunk]).sum()) if backward else None
    )
    gradient_tolerance = GRADIENT_TOLERANCE[hidden.dtype]
    return Case(
        op=f"linear_logprobs, {'forward and backward' if backward else 'forward'}",
        size={"N": N, "D": D, "V": V},
        dtype=hidden.dtype,
        contenders=contenders,
        errors=lambda results: errors(results, truths),
        tolerances={"logprobs": LOGPROB_TOLERANCE, "hidden": gradient_tolerance, "weight": gradient_tolerance},
        amount=(6 if backward else 2) * N * V * D,
        unit="TFLOP/s",
        floor="the three matrix products alone (6NVD)" if backward else "the matrix product alone (2NVD)",
        absent=absent,
    )
