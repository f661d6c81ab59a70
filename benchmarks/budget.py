"""The arithmetic of one batch: operations and bytes by phase, and from them seconds on one GPU or many.

What is counted is exact for GPT-NeoX (tests/test_train_step.py counts a model's own operations). What turns it into
seconds is assumed, and stands in `Machine` and the constants below: predictions, until results/train_step-gpu.json
exists. `python -m benchmarks.train_step --predict` prints the tables of docs/budget.md from here.
"""

import math
from dataclasses import dataclass

EPISODES = 75_000
PAPER_GPU_HOURS = 4 * (5 + 16 / 60)  # Table 3 of arXiv 2508.17000: 5 h 16 on TL;DR, on four A100s

# Assumed of every machine.
HOST_SECONDS = 0.3  # of a batch: tokenizing, decoding texts, bookkeeping, with the GPU idle
STEP_SECONDS = 1e-3  # of a decoding step beside the bytes: a replayed graph of some 200 kernels, and sampling
MICROBATCH_TOKENS = 16_384  # Config's
GPUS_IN_A_NODE = 8
GPUS = (1, 4, 8, 16, 64)


Held = dict[str, float]  # bytes, by what holds them


@dataclass(frozen=True)
class Machine:
    """A GPU. The first four are from data sheets: dense bf16, HBM, NVLink one way, network by GPU between nodes."""

    name: str
    flops: float  # a second
    bandwidth: float  # bytes a second, as the next two
    link: float
    network: float
    forward_share: float  # of the flops, assumed, without a backward pass
    training_share: float  # likewise, of forward and backward
    bandwidth_share: float = 0.7  # of the bandwidth, assumed, while decoding and in the optimizer


A100 = Machine("A100 80 GB", 312e12, 2.0e12, 300e9, 25e9, forward_share=0.45, training_share=0.40)
H200 = Machine("H200", 989e12, 4.8e12, 450e9, 50e9, forward_share=0.40, training_share=0.35)


@dataclass(frozen=True)
class Model:
    """GPT-NeoX's shape; policy, reference and reward model have the same."""

    layers: int
    hidden: int
    vocab: int

    @property
    def head(self) -> int:  # parameters, as the next two
        return self.vocab * self.hidden

    @property
    def trunk(self) -> int:
        """Blocks and the last norm: a token passes them once, and the embedding costs no operations."""
        return self.layers * (12 * self.hidden**2 + 13 * self.hidden) + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.trunk + 2 * self.head

    def trunk_flops(self, tokens: float, length: float) -> float:
        """Of a forward pass over sequences of this length: matrix products, and causal attention to half of it."""
        return self.layers * tokens * (24 * self.hidden**2 + 2 * length * self.hidden)

    def head_flops(self, tokens: float) -> float:
        return 2.0 * tokens * self.head


@dataclass(frozen=True)
class Batch:
    """What is generated and trained on."""

    rows: int
    prompt: float  # tokens on average
    longest: int  # tokens of the longest prompt, to which generation pads the others
    response: int
    epochs: int = 4

    @property
    def tokens(self) -> float:
        return self.rows * (self.prompt + self.response)

    @property
    def padded_tokens(self) -> int:
        return self.rows * (self.longest + self.response)


PYTHIA_1B = Model(layers=16, hidden=2048, vocab=50304)
TLDR = Batch(rows=192, prompt=310, longest=512, response=53)


def flops(model: Model, batch: Batch) -> dict[str, float]:
    """Of our loop, by phase: no padding but in the cache, and the head at response tokens only."""
    responses, length = batch.rows * batch.response, batch.prompt + batch.response
    forward = model.trunk_flops(batch.tokens, length)
    with_head = forward + model.head_flops(responses)
    return {
        **generation_flops(model, batch, batch.prompt),
        "score": forward,
        "log-probs": 2 * with_head,  # policy and reference, once each; the values come with the policy's
        "update": batch.epochs * 3 * with_head,
    }


def trl_flops(model: Model, batch: Batch) -> dict[str, float]:
    """Of TRL 1.12.0: everything padded, a value model of its own, the head at every token in reference and update."""
    forward = model.trunk_flops(batch.padded_tokens, batch.longest + batch.response)
    with_head = forward + model.head_flops(batch.padded_tokens)
    return {
        **generation_flops(model, batch, batch.longest),
        "score": forward,
        "log-probs": with_head + forward,  # reference and value model; the policy's are those of generation
        "update": batch.epochs * 3 * (with_head + forward),
    }


def generation_flops(model: Model, batch: Batch, prompt: float) -> dict[str, float]:
    """A pass over prompts of so many tokens, with padding or without, and a step a token but the first, which the
    prompts' pass makes."""
    steps = batch.response - 1
    return {
        "prefill": model.trunk_flops(batch.rows * prompt, prompt) + model.head_flops(batch.rows),
        # A step looks back at everything: twice the causal average.
        "decode": model.trunk_flops(batch.rows * steps, 2 * (batch.longest + batch.response))
        + model.head_flops(batch.rows * steps),
    }


def cache_bytes(model: Model, batch: Batch) -> float:
    """Keys and values of a batch in bf16, at full length."""
    return 4.0 * model.layers * model.hidden * batch.padded_tokens


def seconds(model: Model, batch: Batch, machine: Machine, gpus: int) -> dict[str, float]:
    """Of one batch by phase, as predicted. Communication is counted in full: nothing hides it."""
    work = flops(model, batch)
    forward, training = (gpus * machine.flops * share for share in (machine.forward_share, machine.training_share))
    bandwidth = machine.bandwidth * machine.bandwidth_share
    step_bytes = 2.0 * (model.trunk + model.head) + cache_bytes(model, batch) / gpus
    microbatches = math.ceil(batch.tokens / gpus / MICROBATCH_TOKENS)
    # Of a parameter Adam moves 28 bytes, the gradient's norm 4, clipping 8 and the new weight in bf16 6; and each
    # microbatch 20 of its gradient: written in bf16, made float32 and added to what is there.
    optimizer = batch.epochs * (46.0 / gpus + 20.0 * microbatches) * model.parameters / bandwidth
    return {
        "rollout": work["prefill"] / forward + (batch.response - 1) * (STEP_SECONDS + step_bytes / bandwidth),
        "score": work["score"] / forward,
        "log-probs": work["log-probs"] / forward,
        "update": work["update"] / training + optimizer,
        # A step scatters float32 gradients and gathers the new weights in bf16.
        "communication": batch.epochs * exchange_seconds((4 + 2) * model.parameters, machine, gpus),
        "host": HOST_SECONDS,
    }


def exchange_seconds(size: float, machine: Machine, gpus: int) -> float:
    """To gather or scatter so many bytes: a GPU's link moves all but its own part, a node's networks other nodes'."""
    nodes = math.ceil(gpus / GPUS_IN_A_NODE)
    inside, between = (gpus - 1) / gpus * size / machine.link, (nodes - 1) / nodes * size / machine.network
    return max(inside, between / GPUS_IN_A_NODE)


def memory(model: Model, batch: Batch, gpus: int, microbatch_tokens: int = MICROBATCH_TOKENS) -> dict[str, Held]:
    """Bytes on each GPU, by what holds them, in the phases that hold the most.

    Of activations a block keeps 34·D bytes a token in bf16, and the loss the head's gradient and a chunk of logits.
    Prompts are read a microbatch at a time, with keys and values of their own until these are put into the cache, and
    25·D bytes a token of one layer's activations.
    """
    size, tokens = float(model.parameters), min(microbatch_tokens, batch.tokens / gpus)
    stay = {"weights in bf16": 2 * size, "reference, reward model": 2 * 2 * size}
    return {
        "update": {
            "weights, gradients, moments": (4 + 8) * size / gpus + 4 * size,  # float32
            **stay,
            "keys and values": 0.0,
            "activations": 34.0 * model.hidden * model.layers * tokens,
            "logits": 4.0 * model.head + 4.0 * 2048 * model.vocab,
        },
        "rollout": {
            "weights, gradients, moments": (4 + 8) * size / gpus,
            **stay,
            "keys and values": cache_bytes(model, batch) / gpus + 4.0 * model.layers * model.hidden * tokens,
            "activations": 25.0 * model.hidden * tokens,
            "logits": 8.0 * model.vocab * batch.rows / gpus,
        },
    }


def trl_memory(model: Model, microbatch_tokens: int) -> Held:
    """TRL's update on one GPU, in bf16 autocast, with frozen models in bf16 (which is not its default)."""
    size = float(model.parameters)
    return {
        "weights, gradients, moments": 2 * 16 * size,  # policy and value model
        "weights in bf16": 2 * 2 * size,  # autocast's copies
        "reference, reward model": 2 * 2 * size,
        "keys and values": 0.0,
        "activations": 2 * 34.0 * model.hidden * model.layers * microbatch_tokens,
        # In bf16, in float32, and the gradient of that, of all tokens; and generation's.
        "logits": 10.0 * model.vocab * microbatch_tokens,
    }


def most(held: dict[str, Held]) -> float:
    return max(sum(each.values()) for each in held.values())


def limit(found: dict[str, float]) -> str:
    """The longest phase, and its share."""
    name = max(found, key=found.__getitem__)
    return f"{name} {found[name] / sum(found.values()):.0%}"


def tables() -> str:
    """docs/budget.md's, in Markdown."""
    model, batch = PYTHIA_1B, TLDR
    ours, theirs = flops(model, batch), trl_flops(model, batch)
    work = [["", "klq_fast, TFLOP", "TRL's PPO, TFLOP"]]
    work += [[phase, f"{ours[phase] / 1e12:.0f}", f"{theirs[phase] / 1e12:.0f}"] for phase in ours]
    work.append(["together", *(f"{sum(each.values()) / 1e12:.0f}" for each in (ours, theirs))])

    one_gpu = {machine: seconds(model, batch, machine, 1) for machine in (A100, H200)}
    phases = [["seconds, one GPU", *(machine.name for machine in one_gpu)]]
    phases += [[phase, *(f"{found[phase]:.2f}" for found in one_gpu.values())] for phase in one_gpu[A100]]
    phases.append(["a batch", *(f"{sum(found.values()):.1f}" for found in one_gpu.values())])

    scaling = [["GPUs", "", "s a batch", "75,000 episodes, h", "GPU-hours", "of the paper's", "longest", "GB a GPU"]]
    batches = math.ceil(EPISODES / batch.rows)
    for machine in (A100, H200):
        for gpus in GPUS:
            found = seconds(model, batch, machine, gpus)
            hours = batches * sum(found.values()) / 3600
            scaling.append(
                [
                    str(gpus),
                    machine.name,
                    f"{sum(found.values()):.2f}",
                    f"{hours:.2f}",
                    f"{gpus * hours:.1f}",
                    f"1/{PAPER_GPU_HOURS / (gpus * hours):.1f}",
                    limit(found),
                    f"{most(memory(model, batch, gpus)) / 1e9:.0f}",
                ]
            )
    # Microbatches as benchmarks/train_step.py's on a GPU: 16 rows, TRL's padded.
    own, padded = round(16 * batch.tokens / batch.rows), 16 * (batch.longest + batch.response)
    columns = [*memory(model, batch, 1, own).values(), trl_memory(model, padded)]
    held = [["GB on one GPU", *(f"klq_fast, {phase}" for phase in ("update", "rollout")), "TRL's PPO, update"]]
    held += [[name, *(f"{column[name] / 1e9:.1f}" for column in columns)] for name in columns[0]]
    held.append(["together", *(f"{sum(column.values()) / 1e9:.0f}" for column in columns)])
    return "\n\n".join(map(markdown_table, (work, phases, held, scaling)))


def markdown_table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])
