"""Loading models and tokenizers, and the policy: a causal language model with a value head on its trunk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from . import linear_logprobs
from .batch import Rollout
from .config import InputError, looks_like_path
from .distributed import is_first, whole
from .hub import hub_answers, not_here, only_here
from .options import merged
from .packing import enable_packing

transformers_logging.disable_progress_bar()  # the run has one of its own

VALUE_HEAD = "value_head.safetensors"

# What an algorithm does with a microbatch: (responses, hidden, head, values, num_tokens, softcap) -> loss output.
LossFunction = Callable[..., Any]


class Policy(nn.Module):
    """A causal language model and a value head: a linear layer on the trunk's output (the paper's "shared" head)."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.packed = enable_packing(model)  # whether a microbatch goes through the trunk without padding
        # `generate` takes over what a saved generation config says (top-k, penalties, …), which would make samples
        # come from another distribution than the log-probs: set it aside until the model is saved.
        self.generation_config = model.generation_config
        model.generation_config = GenerationConfig()
        self.softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        size = model.get_output_embeddings().in_features
        self.value_head = nn.Linear(size, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    @torch.no_grad()
    def start_values(self, rewards: Tensor) -> None:
        """Lets a fresh value head say the mean reward in every state; one that was trained stays.

        So V is right on average from the first target on. The errors of a random head are advantages until they are
        learned away: it leaves the arithmetic task's policies twice as far from their optimum (docs/findings.md).
        """
        weight, bias = whole(self.value_head.weight), whole(self.value_head.bias)
        if not weight.any() and not bias.any():
            self.value_head.bias.fill_(float(rewards.mean()))

    def forward(
        self, batch: Rollout, loss: LossFunction | None = None, num_tokens: float | Tensor | None = None
    ) -> Any:
        """(log-probs, values) of the response tokens, both (N,), row after row; or `loss`'s output on them."""
        responses, hidden = batch.responses(), self._hidden(batch)  # N tokens; (N, D)
        values = self.value_head(hidden.to(self.value_head.weight.dtype)).squeeze(-1)  # (N,) fp32
        head = self.model.get_output_embeddings()
        if loss is not None:
            return loss(responses, hidden, head, values, num_tokens, self.softcap)
        logprobs = linear_logprobs(
            hidden,
            head.weight,
            responses.tokens,
            bias=head.bias,
            temperature=self.temperature,
            softcap=self.softcap,
        )
        return logprobs, values

    def _hidden(self, batch: Rollout) -> Tensor:
        """The trunk's output at the states s_t: before each response token."""
        inputs, states = batch.packed_inputs() if self.packed else (batch.model_inputs(), batch.states())
        output = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return output.flatten(0, 1).index_select(0, states)

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes what `AutoModelForCausalLM.from_pretrained` reads, the tokenizer, and the value head beside them.

        Of a sharded policy every process must call it: the first one gets all weights, in CPU memory, and writes.
        """
        whole_on_cpu = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = get_model_state_dict(self, options=whole_on_cpu)
        if not is_first():
            return
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "value_head": {}}
        for name, tensor in state.items():
            part, _, inner = name.partition(".")
            parts[part][inner] = tensor.contiguous()
        model = self.model
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            # One tensor under two names, which gathering has made two: the file of a tied model holds the input's.
            tied = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
            parts["model"].pop(f"{tied}.weight", None)
        model.generation_config = self.generation_config
        model.save_pretrained(folder, state_dict=merged(model, parts["model"]))
        model.generation_config = GenerationConfig()
        tokenizer.save_pretrained(folder)
        save_file(parts["value_head"], folder / VALUE_HEAD)


def load_policy(name: str, temperature: float, device: torch.device) -> Policy:
    """The policy in fp32, without dropout, with a value head of zeros, or the one saved beside the model."""
    policy = Policy(_load(AutoModelForCausalLM, "policy", name), temperature)
    if (saved := Path(name) / VALUE_HEAD).is_file():
        policy.value_head.load_state_dict(load_file(saved))
    policy.eval()
    _check_head(policy)
    return policy.to(device)


def load_reference(name: str, temperature: float, device: torch.device) -> Policy:
    """The same model again, frozen, to be measured from or generated with, as `to_compute` has it."""
    return to_compute(load_policy(name, temperature, torch.device("cpu")).requires_grad_(False), device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Of models' parameters where they compute; value and score heads have float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def to_compute(policy: Policy, device: torch.device) -> Policy:
    """The policy, which is on the CPU in fp32, moved to `device` with its parameters in `compute_dtype`, without ever
    being there in fp32. Buffers, such as rotary frequencies, stay in fp32."""
    _cast(policy.model, compute_dtype(device))
    return policy.to(device)


def load_reward_model(name: str, device: torch.device) -> PreTrainedModel:
    """The classifier, frozen, with the head that its checkpoint holds, whatever its config or architecture says of it.

    On CUDA its trunk is in bf16, and what reads the trunk's output in fp32: in bf16 a score of 5 is off by up to 0.01.
    """
    model = _load_classifier(name).eval().requires_grad_(False)
    if (dtype := compute_dtype(device)) != torch.float32:
        _cast(model.base_model, dtype)
        for child in model.children():
            if child is not model.base_model:
                child.register_forward_pre_hook(lambda module, inputs: tuple(each.float() for each in inputs))
    return model.to(device)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    check_folder(option, name)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=only_here(name))
    except (OSError, ValueError) as error:
        raise _not_loaded(option, name, "tokenizer", error) from None


def stop_tokens(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's and the model's own end-of-sequence tokens."""
    stops = policy.generation_config.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    if not stops:
        raise InputError("--policy: neither its tokenizer nor its generation config names an end-of-sequence token")
    return sorted(set(stops))


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill padding with. Lengths are carried beside the tokens, so any token will do: Llama has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0


def max_positions(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _load(auto: Any, option: str, name: str) -> Any:
    model, report = _load_with_report(auto, option, name)
    _check_report(model, report, option, name)
    return model


def _load_classifier(name: str) -> Any:
    option = "reward-model"
    model, report = _load_with_report(AutoModelForSequenceClassification, option, name)
    heads = {key: held for key, held, _ in report["mismatched_keys"] if key.endswith("score.weight")}
    if heads:  # a config that does not say how many labels it has means two
        (held,) = heads.values()
        model, report = _load_with_report(AutoModelForSequenceClassification, option, name, num_labels=held[0])
    if "score.bias" in report["unexpected_keys"]:
        # Reward models are shifted through it (by 1 to 10), and then saved as an architecture that has none.
        model, report = _load_with_report(_with_score_bias(type(model)), option, name, config=model.config)
    _check_report(model, report, option, name)
    return model


def _with_score_bias(architecture: type) -> Any:
    def init(self: Any, config: Any) -> None:
        architecture.__init__(self, config)  # type: ignore[misc]
        self.score = nn.Linear(self.score.in_features, self.score.out_features)

    return type(architecture.__name__, (architecture,), {"__init__": init})


def _load_with_report(auto: Any, option: str, name: str, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model in fp32, and how the checkpoint's tensors differ from the model's."""
    check_folder(option, name)
    here = only_here(name)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it prints that report, of which what matters is told by the caller
    try:
        model, report = auto.from_pretrained(
            name,
            dtype=torch.float32,
            local_files_only=here,
            adapter_kwargs={"local_files_only": here},  # with peft installed, an adapter is looked for by itself
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(option, name, "model", error) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, report


def _check_report(model: Any, report: dict[str, Any], option: str, name: str) -> None:
    """Refuses a model of which something was drawn at random: a language model has no score head, say."""
    if report["missing_keys"]:
        raise InputError(
            f"--{option}: {name!r} does not hold {sorted(report['missing_keys'])} of {type(model).__name__}"
        )
    if report["mismatched_keys"]:
        key, held, expected = sorted(report["mismatched_keys"])[0]
        raise InputError(
            f"--{option}: {name!r} holds {key} of shape {tuple(held)}, and its config.json says {tuple(expected)}"
        )


def check_folder(option: str, name: str) -> None:
    """Refuses a folder that is not there, before any work."""
    if looks_like_path(name) and not Path(name).is_dir():
        raise InputError(f"--{option}: got {name!r}, expected an existing folder or a hub name")


def _not_loaded(option: str, name: str, what: str, error: Exception) -> InputError:
    if not Path(name).exists() and not hub_answers():
        return not_here(option, name)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"--{option}: no {what} could be loaded from {name!r}: {reason} "
        "(a folder in Hugging Face format works without a connection)"
    )


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """The losses take a linear head, with softcap at most, on the trunk's output: refuse a model that does more."""
    model = policy.model
    tokens = torch.arange(min(4, model.config.get_text_config().vocab_size), device=model.device)[None]
    head = model.get_output_embeddings()
    logits = head(model.base_model(input_ids=tokens).last_hidden_state)
    if policy.softcap is not None:
        logits = policy.softcap * torch.tanh(logits / policy.softcap)
    expected = model(input_ids=tokens).logits
    error, scale = (logits - expected).abs().max(), expected.abs().max()
    if error > 1e-3 * scale + 1e-5:  # the two are the same arithmetic: rounding is far below this
        raise InputError(
            f"--policy: {type(model).__name__} scales or changes its logits after the head "
            f"(by up to {error:.3g}), which the losses do not know"
        )
