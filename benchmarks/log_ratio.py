"""logprobs and log_ratio from logits.

Bytes: forward, each logit is read once (twice as many for log_ratio, which reads the reference's too); with the
gradient, it is read again and the gradient written. The floor is a copy that moves as many bytes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from klq_fast import log_ratio, logprobs

from .harness import FLOOR, OURS, Case, Outputs, Peer, absolute_error, add_peers, copy_floor, relative_error
from .linear_logprobs import DTYPES, GRADIENT_TOLERANCE, LOGPROB_TOLERANCE

SIZES = {  # N, V
    "cuda": [(N, V) for V in (50304, 128256, 152064) for N in (8192, 2048, 32768)],
    "cpu": [(64, 50304), (256, 50304)],
}
PASSES = ("logprobs, forward", "logprobs, forward and backward", "log_ratio, forward")
TRL_SEQUENCE = 1024  # TRL's function loops over sequences; here of that many tokens

Logprobs = Callable[[Tensor, Tensor], Tensor]  # logits (N, V), tokens (N,) -> (N,)


def eager(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def build_trl() -> Logprobs:
    from trl.trainer.utils import selective_log_softmax

    def trl_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
        shape = max(1, len(tokens) // TRL_SEQUENCE), -1
        return selective_log_softmax(logits.view(*shape, logits.shape[-1]), tokens.view(shape)).view(-1)

    return trl_logprobs


PEERS = {"TRL selective_log_softmax": Peer("trl==1.12.0", build_trl)}


def cases(device: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    for N, V in SIZES[device]:
        for op in PASSES:
            yield f"{op} {N}x{V}", partial(case, N, V, op, device)


def case(N: int, V: int, op: str, device: str) -> Case:
    torch.manual_seed(0)
    dtype, backward, both = DTYPES[device], op.endswith("backward"), op.startswith("log_ratio")
    logits = torch.randn(N, V, device=device, dtype=dtype)
    tokens = torch.randint(V, (N,), device=device)
    weights = torch.randn(N, device=device)  # what a later loss sends back
    # As sampled tokens are, some are likely: up to 20 nats above the others.
    logits.scatter_add_(1, tokens[:, None], 20 * torch.rand(N, 1, device=device, dtype=dtype))
    ref_logits = logits + torch.randn(N, 1, device=device, dtype=dtype) * 0.1 * logits if both else None
    for each in (logits, tokens, *([] if ref_logits is None else [ref_logits])):
        torch._dynamo.maybe_mark_dynamic(each, 0)
    logits.requires_grad_(backward)

    def wrap(function: Logprobs) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with torch.set_grad_enabled(backward):
                results = function(logits, tokens)
                if ref_logits is not None:
                    results = results - function(ref_logits, tokens)
            if not backward:
                return {"logprobs": results}
            (gradient,) = torch.autograd.grad(results, logits, weights.to(results.dtype))
            return {"logprobs": results.detach(), "logits": gradient}

        return run

    def ours() -> Outputs:
        if ref_logits is None:
            return wrap(logprobs)()
        return {"logprobs": log_ratio(logits, ref_logits, tokens)}

    contenders = {
        FLOOR: copy_floor((3 if backward else 2 if both else 1) * logits.nbytes, device),
        OURS: ours,
        "eager": wrap(eager),
        "torch.compile": wrap(torch.compile(eager)),
    }
    absent = add_peers(contenders, PEERS, device, wrap)

    def errors(results: Outputs) -> dict[str, float]:
        """A block of rows at a time, since 32768×152064 numbers are 40 GB in float64."""
        found = dict.fromkeys(results, 0.0)
        largest = 0.0
        for start in range(0, N, 512):
            rows = slice(start, start + 512)
            wide = logits[rows].detach().double().requires_grad_(backward)
            own = wide.log_softmax(-1).gather(1, tokens[rows, None]).squeeze(1)
            true = own if ref_logits is None else own - eager_float64(ref_logits[rows], tokens[rows])
            found["logprobs"] = _worst(found["logprobs"], absolute_error(results["logprobs"][rows], true.detach()))
            if backward:
                (gradient,) = torch.autograd.grad(true, wide, weights[rows].double())
                scale = gradient.abs().max().item()
                largest = max(largest, scale)
                found["logits"] = _worst(found["logits"], relative_error(results["logits"][rows], gradient) * scale)
        if backward:
            found["logits"] /= largest
        return found

    return Case(
        op=op,
        size={"N": N, "V": V},
        dtype=dtype,
        contenders=contenders,
        errors=errors,
        tolerances={"logprobs": LOGPROB_TOLERANCE, "logits": GRADIENT_TOLERANCE[dtype]},
        amount=(3 if backward else 2 if both else 1) * logits.nbytes,
        unit="GB/s",
        floor="a copy of as many bytes",
        absent=absent,
    )


def eager_float64(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.double().log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)


def _worst(first: float, second: float) -> float:
    return second if not second <= first else first  # unlike max(), NaN stays
