"""linear_klq_loss from hidden states and klq_loss from log-probs, forward and backward.

linear_klq_loss: 6·N·V·D floating-point operations, in three matrix products, which alone are the floor. A peer gives
log-probs, and the KLQ loss follows in plain PyTorch, so autograd hands it the loss's gradient for each token; since it
cannot know that in its forward pass, it computes the logits twice (8·N·V·D) or keeps them. Liger's fused linear PPO
takes the loss as a function and is given KLQ's.
klq_loss: elementwise; 4 numbers a token read, 3 written (log π, two gradients), 28 bytes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from klq_fast import klq_loss, linear_klq_loss

from . import linear_logprobs
from .harness import FLOOR, OURS, Case, Outputs, Peer, add_peers, copy_floor
from .linear_logprobs import GRADIENT_TOLERANCE, LOGPROB_TOLERANCE, Logprobs, products, truth

TAU = 0.05
CPU_GOAL = (2048, 512, 50304)  # at most 1.15 times the floor, and 0.15 of eager's memory
SIZES = {"cuda": linear_logprobs.SIZES["cuda"], "cpu": [*linear_logprobs.SIZES["cpu"], CPU_GOAL]}  # N, D, V
TOKENS = {"cuda": (8192, 2**20), "cpu": (2**18,)}
LIGER_SEQUENCE = 2048  # tokens in each of Liger's sequences, which are its chunks: as large as ours


def residuals(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, returns: Tensor) -> Tensor:
    return TAU * (logprobs - ref_logprobs) + values - returns


def eager(hidden: Tensor, weight: Tensor, values: Tensor, tokens: Tensor, ref_logprobs: Tensor, returns: Tensor):
    """The loss and log π."""
    logprobs = linear_logprobs.eager(hidden, weight, tokens)
    return residuals(logprobs, ref_logprobs, values, returns).square().mean(), logprobs


def build_liger_ppo():
    """Liger's fused linear PPO with KLQ's loss: the loss, log π and the residuals, for given V − G."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    class LigerKLQ(LigerFusedLinearPPOBase):
        @staticmethod
        def ppo_loss_fn(per_token_logps, full_attention_mask, ref_per_token_logps, old_per_token_logps, **_):
            # V − G comes in the place of the old log-probs; metrics with dimensions are concatenated over the chunks.
            error = TAU * (per_token_logps - ref_per_token_logps) + old_per_token_logps
            return error.square().sum() / full_attention_mask.sum(), (per_token_logps, error)

        @classmethod
        def forward(cls, ctx, hidden, weight, tokens, mask, advantages, ref_logprobs, values_less_returns):
            options = {"use_ref_model": True, "compiled": False, "chunk_size": 1}  # nothing to compile: elementwise
            return super().forward(
                cls,
                ctx,
                hidden,
                weight,
                tokens,
                mask,
                advantages,
                ref_per_token_logps=ref_logprobs,
                old_per_token_logps=values_less_returns,
                **options,
            )

    return LigerKLQ.apply


def cases(device: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    for N, D, V in SIZES[device]:
        yield f"linear_klq_loss {N}x{D}x{V}", partial(linear_case, N, D, V, device)
    for N in TOKENS[device]:
        yield f"klq_loss {N}", partial(case, N, device)


def make_targets(N: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """ref_logprobs, values, returns."""
    values = torch.randn(N, device=device).requires_grad_()
    targets = torch.randn(N, device=device) - 6, values, torch.randn(N, device=device)
    for each in targets:
        torch._dynamo.maybe_mark_dynamic(each, 0)
    return targets


def linear_case(N: int, D: int, V: int, device: str) -> Case:
    hidden, weight, tokens = linear_logprobs.make_inputs(N, D, V, device)
    ref_logprobs, values, returns = make_targets(N, device)
    trained = hidden, weight, values

    def results(loss: Tensor, logprobs: Tensor) -> Outputs:
        gradients = torch.autograd.grad(loss, trained)
        named = dict(zip(("hidden", "weight", "values"), gradients, strict=True))
        return {"loss": loss.detach(), "logprobs": logprobs.detach(), **named}

    def ours() -> Outputs:
        out = linear_klq_loss(hidden, weight, tokens, ref_logprobs, values, returns, tau=TAU)
        return results(out.loss, out.logprobs)

    def plain(loss: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], Outputs]:
        return lambda: results(*loss(hidden, weight, values, tokens, ref_logprobs, returns))

    def wrap(logprobs: Logprobs) -> Callable[[], Outputs]:
        def run() -> Outputs:
            own = logprobs(hidden, weight, tokens)
            return results(residuals(own, ref_logprobs, values, returns).square().mean(), own)

        return run

    def wrap_liger_ppo(apply: Callable) -> Callable[[], Outputs]:
        shape = max(1, N // LIGER_SEQUENCE), -1

        def run() -> Outputs:
            known = (values.detach() - returns).view(shape)
            loss, (logprobs, error) = apply(
                hidden.view(*shape, D),
                weight,
                tokens.view(shape),
                torch.ones_like(known),
                known[:, 0],
                ref_logprobs.view(shape),
                known,
            )
            gradients = torch.autograd.grad(loss, (hidden, weight))
            value_gradient = error.view(-1) * (2 / N)
            return {
                "loss": loss.detach(),
                "logprobs": logprobs.view(-1),
                "hidden": gradients[0],
                "weight": gradients[1],
                "values": value_gradient,
            }

        return run

    contenders = {
        FLOOR: products(hidden, weight, backward=True),
        OURS: ours,
        "eager": plain(eager),
        "torch.compile": plain(torch.compile(eager)),
    }
    log_prob_peers = {name: peer for name, peer in linear_logprobs.PEERS.items() if "PPO" not in name}
    liger_ppo = {"Liger fused linear PPO": Peer("liger-kernel", build_liger_ppo)}
    if (N, D, V) == CPU_GOAL:
        absent = dict.fromkeys(log_prob_peers | liger_ppo, "not at this size: 4 to 10 s a call")
    else:
        absent = add_peers(contenders, log_prob_peers, device, wrap)
        absent |= add_peers(contenders, liger_ppo, device, wrap_liger_ppo)

    targets = [x.detach().double() for x in (ref_logprobs, values, returns)]
    truths = truth(
        hidden,
        weight,
        tokens,
        lambda logprobs, chunk: residuals(logprobs, *(x[chunk] for x in targets)).square().sum() / N,
    )
    error = residuals(truths["logprobs"], *targets)
    truths |= {"loss": error.square().mean(), "values": 2 / N * error}
    gradient_tolerance = GRADIENT_TOLERANCE[hidden.dtype]
    return Case(
        op="linear_klq_loss, forward and backward",
        size={"N": N, "D": D, "V": V},
        dtype=hidden.dtype,
        contenders=contenders,
        errors=lambda results: linear_logprobs.errors(results, truths),
        tolerances={
            "loss": 1e-5,  # a mean of float32 numbers that are off by LOGPROB_TOLERANCE · τ at most
            "logprobs": LOGPROB_TOLERANCE,
            "hidden": gradient_tolerance,
            "weight": gradient_tolerance,
            "values": 1e-5,
        },
        amount=6 * N * V * D,
        unit="TFLOP/s",
        floor="the three matrix products alone (6NVD)",
        absent=absent,
    )


def eager_from_logprobs(logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, returns: Tensor):
    """The loss and klq_loss's metrics."""
    error = residuals(logprobs, ref_logprobs, values, returns)
    with torch.no_grad():
        metrics = {
            "td_error": -error.mean(),
            "kl": (logprobs - ref_logprobs).mean(),
            "explained_variance": 1 - error.var(correction=0) / returns.var(correction=0),
            "value_error": (values - returns).square().mean(),
            "values": values.mean(),
            "returns": returns.mean(),
        }
    return error.square().mean(), metrics


def case(N: int, device: str) -> Case:
    torch.manual_seed(0)
    logprobs = (torch.randn(N, device=device) - 6).requires_grad_()
    ref_logprobs, values, returns = make_targets(N, device)

    def wrap(loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            value, metrics = loss(logprobs, ref_logprobs, values, returns)
            gradients = torch.autograd.grad(value, (logprobs, values))
            return {"loss": value.detach(), "logprobs": gradients[0], "values": gradients[1], **metrics}

        return run

    def ours(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out = klq_loss(*arguments, tau=TAU)
        return out.loss, {f"metric {name}": value for name, value in out.metrics.items()}

    def plain(loss: Callable) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        def run(*arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value, metrics = loss(*arguments)
            return value, {f"metric {name}": value for name, value in metrics.items()}

        return run

    wide = [x.detach().double().requires_grad_() for x in (logprobs, ref_logprobs, values, returns)]
    loss, metrics = eager_from_logprobs(*wide)
    gradients = torch.autograd.grad(loss, (wide[0], wide[2]))
    truths = {"loss": loss.detach(), "logprobs": gradients[0], "values": gradients[1]}
    truths |= {f"metric {name}": value for name, value in metrics.items()}

    def errors(results: Outputs) -> dict[str, float]:
        # Metrics are means around 0 of numbers of size 1, hence the absolute error.
        off = {name: abs(result - truths[name]).max().item() for name, result in results.items()}
        scale = {name: 1.0 if "metric" in name else truths[name].abs().max().item() for name in off}
        return {
            "gradients": max(off[name] / scale[name] for name in ("loss", "logprobs", "values")),
            "metrics": max(value for name, value in off.items() if "metric" in name),
        }

    return Case(
        op="klq_loss, forward and backward",
        size={"N": N},
        dtype=torch.float32,
        contenders={
            FLOOR: copy_floor(28 * N, device),
            OURS: wrap(ours),
            "eager": wrap(plain(eager_from_logprobs)),
            "torch.compile": wrap(plain(torch.compile(eager_from_logprobs))),
        },
        errors=errors,
        tolerances={"gradients": 1e-5, "metrics": 1e-4},
        amount=28 * N,
        unit="GB/s",
        floor="a copy of 28 bytes a token",
    )
