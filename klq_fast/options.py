"""Ways to train in less memory: adapters, a frozen head, activation checkpointing, 8-bit Adam, models that wait on the
CPU. Each is one setting of config.py's section on memory and one function here; `--dry-run` prints what they save."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import Config, InputError
from .kernels import cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .models import Policy


def check(config: Config) -> None:
    """Refuses, before any work, what is not installed or cannot be on this machine."""
    if config.lora_rank is not None:
        require(f"--lora-rank {config.lora_rank}", "peft", "lora")
    if config.adam_8bit:
        require("--adam-8bit", "torchao", "adam-8bit")
    if config.offload and not torch.cuda.is_available():
        raise InputError("--offload: got no GPU here, so the models are in CPU memory all the time: leave it out")
    if not torch.cuda.is_available():
        try:
            for operation in ("lambda_returns", "log_ratio"):
                cpu.library(operation)
        except RuntimeError as error:
            raise InputError(str(error)) from None


def require(option: str, package: str, extra: str) -> Any:
    """The optional package that an option needs.

    Raises:
        InputError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f'{option}: needs {package} ({error}): pip install "klq_fast[{extra}]"') from None


def prepared(policy: "Policy", config: Config) -> "Policy":
    """The policy with a frozen head or adapters where the settings say so, changed in place, before it is sharded."""
    if config.freeze_head:
        freeze_head(policy)
    if config.lora_rank is not None:
        add_lora(policy, config.lora_rank, config.seed)
    return policy


def freeze_head(policy: "Policy") -> None:
    """No gradient for the language-model head: its third of the head's arithmetic and its (V, D) buffer are saved.

    Raises:
        InputError: the head is the input embedding too, which would be frozen with it.
    """
    model = policy.model
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        raise InputError(
            f"--freeze-head: the head of {type(model).__name__} is its input embedding too (tied), which would be "
            "frozen with it; expected a policy whose head has a weight of its own"
        )
    head.requires_grad_(False)


# LoRA (arXiv 2106.09685) through peft.


def add_lora(policy: "Policy", rank: int, seed: int) -> None:
    """Adapters B·A of this rank on every linear layer but the head; all other weights but the value head's are frozen.

    B starts at 0, so that the policy starts as its reference, bit for bit; A is drawn from `seed`, alike on every
    rank. The scale is 2 (peft's alpha = 2·rank): independent of the rank, so a learning rate suits any of them.
    """
    require(f"--lora-rank {rank}", "peft", "lora")
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    model = policy.model
    model.requires_grad_(False)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2's weights are (in, out)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)


class WithoutAdapters:
    """A view of a policy, or of a part of it, that runs without its adapters: the reference of a LoRA run.

    It has the attributes of what it looks at, and no weights of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **options: Any) -> Any:
        with adapters_off(self._module):
            return self._module(*args, **options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return WithoutAdapters(value) if isinstance(value, nn.Module) else value


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    # Not peft's enable_adapters, which also turns requires_grad off and on, of sharded or gathered parameters.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full state of a model with adapters as that of one without, under its own names: W + scale · B·A.

    Sums in float32, on whatever device the state is. The state of a model without adapters comes back as it is.
    """
    merged = {name: tensor for name, tensor in state.items() if ".lora_A." not in name and ".lora_B." not in name}
    if len(merged) == len(state):
        return merged
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        a, b = (state[f"{name}.lora_{which}.default.weight"].float() for which in "AB")  # (rank, in), (out, rank)
        change = layer.scaling["default"] * (b @ a)
        weight = merged[f"{name}.base_layer.weight"]
        change = change.T if getattr(layer, "fan_in_fan_out", False) else change
        merged[f"{name}.base_layer.weight"] = (weight.float() + change).to(weight.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items()}


# Activation checkpointing.


def blocks(model: "PreTrainedModel") -> list[nn.Module]:
    """The layers of the trunk: the modules of its longest list that is in no other one, as a layer's experts are."""
    lists: list[nn.ModuleList] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                lists.append(child)
            else:
                visit(child)

    visit(model.base_model)
    return list(max(lists, key=len, default=()))


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """A block keeps its input alone for the backward pass, and computes the rest again there.

    transformers' own checkpointing works in training mode only, which the loop never enters, as dropout is off; and
    there it would switch the cache of `generate` off. Without gradients a block runs as before.
    """
    for block in blocks(model):
        block.forward = _recomputed(block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        # Nothing in a block is random, so there is no random state to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return run


# The optimizer.


def adam(policy: "Policy", config: Config) -> torch.optim.Optimizer:
    """Adam over what is trained, with the ε of TL;DR PPO; its moments in float32 or, with --adam-8bit, in 8 bits.

    In float32 fused: one pass over memory and no temporary tensors, which on a GPU would be 4 bytes a parameter.
    8 bits: torchao's, whose state is a tensor for each parameter that may be sharded (FSDP2) and saved; tensors of less
    than 4096 numbers, or not a multiple of 256, keep float32.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if not config.adam_8bit:
        return torch.optim.Adam(trained, lr=config.learning_rate, eps=1e-5, fused=True)
    require("--adam-8bit", "torchao", "adam-8bit")
    from torchao.optim import Adam8bit

    optimizer = Adam8bit(trained, lr=config.learning_rate, eps=1e-5)
    if policy.value_head.weight.device.type == "cpu":
        # It compiles its arithmetic, which on a CPU needs a C++ compiler and a minute for every shape of parameter.
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # of 8-bit Adam, whose compiled step reads it from there
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


# Offloading.


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A frozen model that lives elsewhere is on `device` inside. Nothing is copied back: what is frozen stayed."""
    moved: dict[int, Tensor] = {}  # of tied weights one copy
    places = [
        (module, name, tensor)
        for module in model.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    try:
        for module, name, tensor in places:
            if id(tensor) not in moved:
                copy = tensor.detach().to(device, non_blocking=True)
                moved[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
            setattr(module, name, moved[id(tensor)])
        yield
    finally:
        for module, name, tensor in places:
            setattr(module, name, tensor)
