"""Floating-point operations that a batch needs, by phase, and what share of the devices' peak that is: MFU."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .memory import reward_model_without_weights
from .metrics import Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .batch import Rollout
    from .config import Config
    from .models import Policy

# Dense bf16, operations a second: NVIDIA's data sheets of A100, H100 and H200, of which the latter two say 1979, 1671
# and 1513 TFLOP/s "with sparsity", twice as many. verl and torchtitan divide by the same.
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
}


# What transformers calls layers that do not attend, in a config's layer_types; "hybrid" ones do, beside a recurrence.
WITHOUT_HEADS = {"linear_attention", "mamba", "conv", "moe", "mlp"}


def peak_flops(name: str) -> float | None:
    """Of a device named so by CUDA, such as "NVIDIA H100 80GB HBM3"; None where it is not known, or a part of one."""
    match = re.search(r"\b([AH][12]00)\b(?:.*\b(PCIe|NVL)\b)?", name)
    if match is None or "MIG" in name.split():
        return None
    chip, form = match.groups()
    return PEAKS.get(f"{chip} {form}", PEAKS.get(chip))


def needed_flops(
    policy: "Policy", reward_model: "PreTrainedModel | None", epochs: int
) -> Callable[[Sequence[int], Sequence[int]], dict[str, float]]:
    """A function from the lengths of a batch's prompts and responses to the operations that each phase needs.

    They are those of the matrix products and of attention, without what a run does beyond need: padding, recomputation.
    A row of P + R tokens passes n = P + R − 1 of them through the trunk, as no token follows the last one. With M
    numbers in the trunk's matrices, A in a layer's queries of a token and L layers that attend, a forward pass is
    2·M·n + 2·A·n·(n + 1)·L + 2·R·V·D, of which the last is the head at the response's tokens. Layers without attention
    heads, such as Mamba's, make no products of pairs of tokens: none are counted for them.

    rollout: a forward pass, however it is cut into steps. score: the reward model's, at all P + R tokens (its own
    tokenizer may make others of them), attention as if it were causal. logprobs: policy and reference, a pass each.
    update: for each epoch a pass, one for its activations' gradients and one for those of the weights that are trained.
    A mixture's experts are not counted.
    """
    trunk, head = _matrices(policy.model.base_model), policy.model.get_output_embeddings().weight
    weights, trained = sum(p.numel() for p in trunk), sum(p.numel() for p in trunk if p.requires_grad)
    attention = _attention(policy.model.config)
    scoring = None
    if reward_model is not None:
        scoring = sum(p.numel() for p in _matrices(reward_model.base_model)), _attention(reward_model.config)

    def needed(prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> dict[str, float]:
        lengths = [p + r - 1 for p, r in zip(prompt_lengths, response_lengths, strict=True)]
        tokens, pairs, responses = sum(lengths), sum(n * (n + 1) // 2 for n in lengths), sum(response_lengths)
        forward = 2 * weights * tokens + attention * pairs + 2 * head.numel() * responses
        of_weights = 2 * trained * tokens + 2 * head.numel() * responses * head.requires_grad
        score = 0
        if scoring is not None:
            whole = [n + 1 for n in lengths]
            score = 2 * scoring[0] * sum(whole) + scoring[1] * sum(n * (n + 1) // 2 for n in whole)
        return {
            "rollout": float(forward),
            "score": float(score),
            "logprobs": float(2 * forward),
            # Attention has no weights: of its four products of the backward pass half are counted in either part.
            "update": float(epochs * (2 * forward + of_weights + attention * pairs)),
        }

    return needed


def _matrices(module: nn.Module) -> list[Tensor]:
    """Each once, whatever kind of layer holds it; a table of embeddings multiplies nothing."""
    tables = {id(each.weight) for each in module.modules() if isinstance(each, nn.Embedding)}
    found = {id(p): p for p in module.parameters() if p.dim() == 2 and id(p) not in tables}
    return list(found.values())


def _attention(config: Any) -> int:
    """Operations of a token that attends to another, in all layers: 2 for each product of a query with a key, and for
    each of its weight with a value. 0 for a model without attention heads; of a hybrid's layers those with them."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 4 * heads * size * sum(kind not in WITHOUT_HEADS for kind in kinds)


def throughput(policy: "Policy", config: "Config", devices: int) -> Callable[["Rollout", Mapping[str, Any]], Record]:
    """A function from a batch and its record, which holds the seconds, to

    tokens_per_second: prompts and responses, of all devices; tflops_per_device: 10¹² needed operations a second of one
    device; and on GPUs whose peak is known mfu, the share of it that this is, and update_mfu, the update's alone (what
    verl calls mfu/actor).
    """
    device = policy.value_head.weight.device
    peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    needed = needed_flops(policy, reward_model_without_weights(config), config.epochs)

    def measure(rollout: "Rollout", record: Mapping[str, Any]) -> Record:
        prompts, responses = rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist()
        flops = needed(prompts, responses)
        rate = sum(flops.values()) / record["seconds"] / devices  # of a device, as the next
        update = flops["update"] / record["update_seconds"] / devices
        found = {
            "tokens_per_second": (sum(prompts) + sum(responses)) / record["seconds"],
            "tflops_per_device": rate / 1e12,
        }
        return found if peak is None else found | {"mfu": rate / peak, "update_mfu": update / peak}

    return measure
