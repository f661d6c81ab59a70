"""lambda_returns: λ-returns of padded rows, rows with a mask, and packed sequences.

Bytes a token in float32: log-ratios, values and (where there is one for each token) rewards read, 12, and G, Q, δ, Δ
written, 16. The floor is a copy of as many. The peers know neither masks nor the KL term: they get zero-padded rows
ready made, and τℓ is taken from the rewards before and Q added after, in plain PyTorch.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from klq_fast import lambda_returns

from .harness import FLOOR, OURS, Case, Outputs, Peer, absolute_error, add_peers, copy_floor

TAU, LAM, GAMMA = 0.05, 0.95, 1.0
SIZES = {  # B, T, layout
    "cuda": [
        (512, 1024, "padded"),
        (512, 1024, "masked"),
        (192, 53, "padded"),
        (64, 32768, "padded"),
        (1024, 1365, "packed"),  # lengths of T/2 to T: 1 M tokens
    ],
    "cpu": [
        (192, 53, "padded"),
        (512, 1024, "padded"),
        (512, 1024, "masked"),
        (8, 32768, "padded"),
        (256, 1365, "packed"),
    ],
}
# Float32: some 20 roundings of 6e-8 of sums up to 1/(1 − λγ) = 20 numbers of size 5.
TOLERANCE = 1e-4

Scan = Callable[[Tensor, Tensor], Tensor]  # KL-penalised rewards (B, T), values (B, T) -> Δ (B, T)


def loop(rewards: Tensor, values: Tensor) -> Tensor:
    """GAE one column at a time, as TRL, OpenRLHF and verl write it."""
    T = values.shape[1]
    advantage = torch.zeros_like(values[:, 0])
    advantages: list[Tensor] = []
    for t in reversed(range(T)):
        next_values = values[:, t + 1] if t < T - 1 else 0.0
        td_error = rewards[:, t] + GAMMA * next_values - values[:, t]
        advantage = td_error + GAMMA * LAM * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], dim=1)


def build_torchrl() -> Scan:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def scan(rewards: Tensor, values: Tensor) -> Tensor:
        done = torch.zeros_like(values, dtype=torch.bool)
        done[:, -1] = True
        next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        columns = (x.unsqueeze(-1) for x in (values, next_values, rewards, done))
        return vec_generalized_advantage_estimate(GAMMA, LAM, *columns)[0].squeeze(-1)

    return scan


PEERS = {"TorchRL vec_generalized_advantage_estimate": Peer("torchrl", build_torchrl)}


def cases(device: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    for B, T, layout in SIZES[device]:
        yield f"lambda_returns {B}x{T} {layout}", partial(case, B, T, layout, device)


def case(B: int, T: int, layout: str, device: str) -> Case:
    torch.manual_seed(0)
    log_ratio, values = torch.randn(2, B, T, device=device)
    scores = torch.randn(B, device=device)
    lengths = torch.full((B,), T) if layout == "padded" else torch.randint(T // 2, T + 1, (B,))
    lengths = lengths.to(device)
    mask = torch.arange(T, device=device) < lengths[:, None]
    # The peers' form: one reward a token, zeros in the padding.
    rewards = torch.zeros(B, T, device=device).scatter_(1, lengths[:, None] - 1, scores[:, None])
    padded_log_ratio, padded_values = torch.where(mask, log_ratio, 0.0), torch.where(mask, values, 0.0)
    offsets = torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0)]).int()
    flat_log_ratio, flat_values = log_ratio[mask], values[mask]

    def wrap(scan: Scan) -> Callable[[], Outputs]:
        return lambda: results(scan, padded_log_ratio, padded_values, rewards)

    def ours() -> Outputs:
        numbers = {"tau": TAU, "lam": LAM, "gamma": GAMMA}
        if layout == "packed":
            out = lambda_returns(flat_log_ratio, flat_values, scores, cu_seqlens=offsets, **numbers)
        elif layout == "masked":
            out = lambda_returns(log_ratio, values, scores, mask, **numbers)
        else:
            out = lambda_returns(log_ratio, values, rewards, **numbers)
        return out._asdict()

    tokens = len(flat_values)
    amount = (28 if layout == "padded" else 24) * tokens
    contenders = {FLOOR: copy_floor(amount, device), OURS: ours, "loop over T": wrap(loop)}
    absent = add_peers(contenders, PEERS, device, wrap)
    truths = results(loop, padded_log_ratio.double(), padded_values.double(), rewards.double())

    def errors(outputs: Outputs) -> dict[str, float]:
        packed = {name: x if x.dim() == 1 else x[mask] for name, x in outputs.items()}
        return {name: absolute_error(x, truths[name][mask]) for name, x in packed.items()}

    return Case(
        op=f"lambda_returns, {layout}",
        size={"B": B, "T": T, "N": tokens},
        dtype=torch.float32,
        contenders=contenders,
        errors=errors,
        tolerances=dict.fromkeys(truths, TOLERANCE),
        amount=amount,
        unit="GB/s",
        floor="a copy of as many bytes",
        absent=absent,
        in_graph=(FLOOR, OURS),
    )


def results(scan: Scan, log_ratio: Tensor, values: Tensor, rewards: Tensor) -> Outputs:
    """What lambda_returns gives, of padded rows, from a scan that gives Δ."""
    penalised = rewards - TAU * log_ratio
    advantages = scan(penalised, values)
    action_values = TAU * log_ratio + values
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return {
        "returns": advantages + action_values,
        "action_values": action_values,
        "td_errors": penalised + GAMMA * next_values - values,
        "advantages": advantages,
    }
