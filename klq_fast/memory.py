"""How much memory a run will need, before anything is loaded: the table of `--dry-run`.

Weights and what goes with them are counted (bytes a parameter, below). Activations are not guessed from a formula, that
would have to know every architecture: the run's own forward and backward pass, loss included, is made on PyTorch's meta
device, which has shapes but no numbers, and every tensor's birth and death in it are counted. So a model's config.json
is all that is read. Where the meta device cannot make a model's pass, nothing is predicted: so it is for mixtures of
experts in float32, as on a CPU, whose grouped product it knows in bf16 alone.

Bytes a parameter of the policy, P in all and Pt of them trained, on each of K devices (distributed.py says why):

    CPU, K = 1   4·P weights, 4·Pt gradients, 8·Pt Adam, 4·P reference
    CPU, K > 1   4·Pt/K + 4·(P − Pt) master weights and 4·P that compute, 4·Pt, 8·Pt/K, 4·P
    GPU          4·Pt/K master weights and 2·P in bf16 that compute, 4·Pt, 8·Pt/K, 2·P in bf16

Frozen master weights are not cut, and stay on the CPU: beside a GPU they take nothing of its memory.
With 8-bit Adam 2·Pt·(1 + 4/256) stand for 8·Pt, with LoRA nothing for the reference. A reward model of R parameters
takes 4·R bytes on CPU and 2·R on a GPU. With --offload reference and reward model count in their phase alone.

The rollout, too, is run on the meta device: the prompts in parts of --microbatch-tokens, the cache of keys and values
(2 · layers · key-value heads · head size · (P + T) numbers for each of a device's rows, P the longest prompt), one step
and one sample. Nothing of it is left when it is done.
The optimizer's step takes nothing (Adam is fused), with several processes or 8-bit Adam twice the largest parameter.
Head's buffers in the update, for N response tokens: C·V·4 bytes of logits for a chunk of C (`chunk_rows`) and, unless
the head is frozen, V·D·4 of its gradient; N·D·4 of the gradient of the trunk's output.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv

from . import options
from .batch import Rollout, Sequences, microbatches
from .config import Config, InputError
from .decode import Decoder, sample
from .hub import only_here
from .kernels.linear_logprob.op import chunk_rows
from .klq import KLQ
from .models import Policy
from .ppo import PPO

META = torch.device("meta")
GPUS = (1, 4, 8)  # the paper's four, and what a machine has


@dataclass(frozen=True)
class Needs:
    """Bytes on each device. What stays all run long, what comes and goes, and the most that is there in each phase."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    reward_model: int
    kv_cache: int
    activations: int
    kernel_buffers: int
    rollout: int
    score: int
    logprobs: int
    update: int

    @property
    def peak(self) -> int:
        return max(self.rollout, self.score, self.logprobs, self.update)


def table(config: Config, prompt_lengths: Sequence[int] = ()) -> list[str]:
    """What the run needs on each device, here and on GPUs, in lines of text; one line where that cannot be predicted.

    prompt_lengths: the prompts' tokens; without them every prompt is taken to be as long as --prompt-length allows.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    here = ("GPU" if torch.cuda.is_available() else "CPU", world_size)
    columns = list(dict.fromkeys([here, *(("GPU", count) for count in GPUS)]))
    try:
        needs = [predict(config, prompt_lengths, device=kind, world_size=count) for kind, count in columns]
    except (InputError, NotImplementedError) as error:
        return [f"memory: not predicted: {error}"]
    heads = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in columns]
    lines = [f"memory on each device, predicted (here: {heads[0]}), in GiB", _line("", heads)]
    for field in fields(Needs):
        if field.name == "rollout":
            lines.append("the most in each phase:")
        name = field.name.replace("_", " ").replace("kv", "KV")
        lines.append(_line(name, [_gib(getattr(need, field.name)) for need in needs]))
    lines.append(_line("peak", [_gib(need.peak) for need in needs]))
    lines.append("beside it: on a CPU 0.5 GiB of Python and libraries, on a GPU 0.5 to 1 of CUDA and 5% of fragments")
    return lines


def _line(name: str, cells: Sequence[str]) -> str:
    return f"  {name:16}" + "".join(f"{cell:>10}" for cell in cells)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}" if size >= 2**30 // 10 else f"{size / 2**30:.3f}"


def predict(config: Config, prompt_lengths: Sequence[int] = (), *, device: str, world_size: int = 1) -> Needs:
    """The memory that a run with these settings needs on each of `world_size` devices, "CPU" or "GPU".

    Raises:
        InputError: the config of the policy or reward model cannot be read.
        NotImplementedError: PyTorch's meta device cannot make a pass of one of them.
    """
    assert config.policy is not None
    gpu = device == "GPU"
    dtype = torch.bfloat16 if gpu else torch.float32
    reward = reward_model_without_weights(config, dtype)
    if reward is not None:
        _count_attention(reward, device)
    model = _model(AutoModelForCausalLM, "policy", config.policy, dtype)
    # Whether packing works is asked of the model's numbers, in a first pass; they are taken to say yes.
    with Counter(), _passes():
        policy = Policy(model, config.temperature)
    with Counter():
        policy.to(META)
        policy = options.prepared(policy, config)
        _count_attention(policy.model, device)
    size = sum(parameter.numel() for parameter in policy.parameters())
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    trained_size = sum(parameter.numel() for parameter in trained)
    width = dtype.itemsize

    parameters = 4 * trained_size // world_size + (0 if gpu else 4 * (size - trained_size))  # of the master weights
    if gpu or world_size > 1:
        parameters += width * size
    gradients = 4 * trained_size
    moments = 2 * trained_size * (1 + 4 / 256) if config.adam_8bit else 8 * trained_size
    optimizer = int(moments / world_size)
    reference = 0 if config.lora_rank is not None else width * size
    reward_model = 0 if reward is None else width * sum(parameter.numel() for parameter in reward.parameters())

    rows = -(-config.batch_size // world_size)
    prompts = _quantiles(prompt_lengths or [config.prompt_length], rows)
    minibatch = _quantiles(prompts, -(-(config.minibatch_size or config.batch_size) // world_size))
    with _passes():
        cache, decoding = _rollout(policy, prompts, config, gpu=gpu)
        logprobs = _logprobs(policy, prompts, config)
        activations, buffers, update = _update(policy, minibatch, config, world_size=world_size)
        scoring = 0 if reward is None else _scoring(reward, prompts, config)
    stays = parameters + optimizer + (0 if config.offload else reference + reward_model)
    return Needs(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        reward_model=reward_model,
        kv_cache=cache,
        activations=activations,
        kernel_buffers=buffers,
        rollout=stays + decoding,
        score=stays + scoring + (reward_model if config.offload else 0),
        logprobs=stays + logprobs + (reference if config.offload else 0),
        update=stays + update,
    )


def reward_model_without_weights(config: Config, dtype: torch.dtype = torch.float32) -> PreTrainedModel | None:
    """What config.json says of the reward model, on PyTorch's meta device; None for a Python function.

    Raises:
        InputError: it cannot be read.
    """
    if config.reward_model is None:
        return None
    return _model(AutoModelForSequenceClassification, "reward-model", config.reward_model, dtype)


def _model(auto: Any, option: str, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a config.json describes, without weights."""
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=only_here(name))
        with META:
            return auto.from_config(config, dtype=dtype).eval()
    except (OSError, ValueError) as error:  # not there, no connection, or nothing that transformers knows
        raise InputError(f"--{option}: no config.json could be read from {name!r}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _passes() -> Iterator[None]:
    """Around passes on the meta device, which has no answer to some operators, or to some of their types."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        raise NotImplementedError(_first_line(error)) from error


def _quantiles(lengths: Sequence[int], count: int) -> list[int]:
    """`count` lengths that are distributed as these are, the longest among them."""
    ordered = sorted(lengths)
    return [ordered[(len(ordered) * (i + 1) - 1) // count] for i in range(count)]


# The phases on the meta device.


def _update(policy: Policy, prompts: Sequence[int], config: Config, *, world_size: int) -> tuple[int, int, int]:
    """Bytes of activations, of the head's buffers, and the most beside the weights, of a minibatch's update.

    Two microbatches stand for all: in the second the gradients of the first are there.
    """
    loss = (KLQ if config.algorithm == "klq" else PPO).from_config(config).loss
    batches = [_rollout_of(rows, config.response_length) for rows in _largest(policy, prompts, config)]
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad_dtype = torch.float32
    if config.activation_checkpointing:
        options.checkpoint_activations(policy.model)
    with Counter() as count:
        for batch in batches[:1]:  # the first alone: what it keeps between its forward and backward pass
            hidden = policy._hidden(batch)
        activations = count.now
        del hidden
    with Counter() as count:
        for batch in batches:
            output = policy(batch, loss, 1.0)
            output.loss.backward()
            del output
        largest = 4 * max(parameter.numel() for parameter in trained)
        if world_size > 1 or config.adam_8bit:
            # What a parameter's gradient is summed in over processes, and padded for; or its moments in float32.
            count.peak = max(count.peak, count.now + 2 * largest)
    for parameter in trained:
        parameter.grad = None
    return activations, count.buffers, count.peak


def _logprobs(policy: Policy, prompts: Sequence[int], config: Config) -> int:
    batch = _rollout_of(_largest(policy, prompts, config)[0], config.response_length)
    with Counter() as count, torch.no_grad():
        policy(batch)
    return count.peak


def _scoring(model: PreTrainedModel, prompts: Sequence[int], config: Config) -> int:
    longest = min(prompts[-1] + config.response_length, getattr(model.config, "max_position_embeddings", 2**31))
    rows = min(len(prompts), max(1, config.microbatch_tokens // longest))
    tokens = torch.empty(rows, longest, dtype=torch.int64, device=META)
    model.config.get_text_config().pad_token_id = 0  # causal classifiers look for it
    with Counter() as count, torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.empty_like(tokens))
    return count.peak


def _rollout(policy: Policy, prompts: Sequence[int], config: Config, *, gpu: bool) -> tuple[int, int]:
    """Bytes of the KV cache, and the most beside the weights: while the prompts are read, or in a step."""
    rows, length = len(prompts), config.response_length
    tokens = torch.empty(rows, prompts[-1], dtype=torch.int64, device=META)
    numbers = torch.empty(rows, dtype=torch.float64, device=META)
    with Counter() as count, torch.no_grad():
        decoder = Decoder(policy)
        logits = decoder.begin(tokens, torch.tensor(prompts), length, config.microbatch_tokens)
        assert decoder.cache is not None
        layers: list[Any] = decoder.cache.layers
        held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
        cache = sum(x.nbytes for x in held if x is not None)  # a recurrent layer has neither
        logits = decoder.step(sample(logits, numbers, policy.temperature))
        if gpu:  # the captured step's logits, and those that it was tried with
            count.peak = max(count.peak, count.now + 2 * logits.nbytes)
    return cache, count.peak


def _largest(policy: Policy, prompts: Sequence[int], config: Config) -> list[list[int]]:
    """The prompt lengths of the two microbatches with the most tokens, the largest first."""
    responses = [config.response_length] * len(prompts)
    found = microbatches(prompts, responses, config.microbatch_tokens, packed=policy.packed)
    ordered = sorted(found, key=lambda rows: -sum(prompts[row] for row in rows) - len(rows) * config.response_length)
    return [[prompts[row] for row in rows] for rows in ordered[:2]]


def _rollout_of(prompts: Sequence[int], response_length: int) -> Rollout:
    rows = len(prompts)
    tokens = {
        "prompt_tokens": torch.empty(rows, max(prompts), dtype=torch.int64, device=META),
        "response_tokens": torch.empty(rows, response_length, dtype=torch.int64, device=META),
    }
    per_token = ("logprobs", "ref_logprobs", "values", "advantages", "returns")
    return Rollout(
        **tokens,
        prompt_lengths=torch.tensor(prompts),
        response_lengths=torch.full((rows,), response_length),
        ended=torch.zeros(rows, dtype=torch.bool),
        rewards=torch.empty(rows, device=META),
        **{name: torch.empty(rows, response_length, device=META) for name in per_token},
    )


# Counting.


class Counter(TorchDispatchMode):
    """The bytes of all tensors that were made inside and still are, and the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.buffers = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a question about numbers, which are not there: "are all of them …?" is answered by yes
        for tensor in _meta_tensors((args, kwargs)):  # what was there before, of which the output may be a view
            self._seen(tensor.untyped_storage(), 0)
        output = func(*args, **(kwargs or {}))
        for tensor in _meta_tensors(output):
            storage = tensor.untyped_storage()
            self._seen(storage, storage.nbytes())
        if func.namespace == "klq_fast" and "linear" in func.name():
            self._head(args, [x for x in tree_leaves(output) if isinstance(x, Tensor)])
        return output

    def _seen(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key not in self.sizes:
            self.sizes[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def _head(self, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """What an operator with a head makes inside of itself: a chunk of logits, and the two products of it."""
        matrices = [x for x in args if isinstance(x, Tensor) and x.dim() == 2]
        (tokens, depth), vocab = matrices[0].shape, matrices[1].shape[0]
        gradients = sum(x.nbytes for x in outputs if x.dim() == 2)
        kind = torch.device("cuda" if matrices[1].dtype == torch.bfloat16 else "cpu")
        rows = chunk_rows(tokens, vocab, kind, weight_grad=any(x.shape == matrices[1].shape for x in outputs))
        buffers = 4 * rows * (vocab + (2 * depth if gradients else 0))
        self.peak = max(self.peak, self.now + buffers)
        self.buffers = max(self.buffers, buffers + gradients)


def _meta_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == "meta"]


class _Flash(torch.autograd.Function):
    """The shapes of fused attention: it keeps its operands, its output and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module,
    query: Tensor,  # (B, H, L, d), packed (1, H, S, d)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequences: Sequences | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """packing.attention as it is on a CPU: packed sequences are padded for it. PyTorch's own would make all scores on
    the meta device, as no real one does."""
    if sequences is None:
        return cast(Tensor, _Flash.apply(query, key, value)).transpose(1, 2), None
    # A list, which holds the padded ones until the output is without padding, as the variables there do.
    padded = [sequences.pad(x[0].transpose(0, 1)).transpose(1, 2) for x in (query, key, value)]
    return sequences.unpad(cast(Tensor, _Flash.apply(*padded)).transpose(1, 2))[None], None


def _attention_unpadded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """packing.attention as it is on a GPU."""
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    return cast(Tensor, _Flash.apply(query, key, value)).transpose(1, 2), None


COUNTED = {"CPU": "klq_fast_counted_cpu", "GPU": "klq_fast_counted_gpu"}
AttentionInterface.register(COUNTED["CPU"], _attention)
AttentionInterface.register(COUNTED["GPU"], _attention_unpadded)
for _name in COUNTED.values():
    AttentionMaskInterface.register(_name, lambda *args, **options: None)  # a mask is small beside the scores


def _count_attention(model: PreTrainedModel, device: str) -> None:
    if model._supports_attention_backend:
        model.set_attn_implementation(COUNTED[device])
