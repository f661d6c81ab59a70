"""Loading models and tokenizers, and the policy: a causal language model with a value head on its trunk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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

transformers_logging.disable_progress_bar()  # the run has one of its own

VALUE_HEAD = "value_head.safetensors"

# What an algorithm does with a microbatch: (batch, hidden, head, values, num_tokens, softcap) -> loss output.
LossFunction = Callable[..., Any]


class Policy(nn.Module):
    """A causal language model and a value head: a linear layer on the trunk's output (the paper's "shared" head)."""

    def __init__(self, model: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
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
        if not self.value_head.weight.any() and not self.value_head.bias.any():
            self.value_head.bias.fill_(rewards.mean())

    def forward(self, batch: Rollout, loss: LossFunction | None = None, num_tokens: Tensor | None = None) -> Any:
        """The responses' (log-probs, values), both (B, T) and 0 in the padding; or `loss`'s output on this microbatch.

        The loss is computed in here because under FSDP the head's weight is whole only inside this module's forward.
        """
        hidden = self._hidden(batch)  # (B, T, D)
        values = self.value_head(hidden.float()).squeeze(-1)  # (B, T)
        head = self.model.get_output_embeddings()
        if loss is not None:
            return loss(batch, hidden, head, values, num_tokens, self.softcap)
        mask = batch.mask
        logprobs = linear_logprobs(
            hidden[mask],
            head.weight,
            batch.response_tokens[mask],
            bias=head.bias,
            temperature=self.temperature,
            softcap=self.softcap,
        )
        return torch.zeros_like(values).masked_scatter(mask, logprobs), values * mask

    def _hidden(self, batch: Rollout) -> Tensor:
        """The trunk's output at the states s_t: the column before each response token."""
        output = self.model.base_model(**batch.model_inputs(), use_cache=False).last_hidden_state
        return output[:, batch.prompt_tokens.shape[1] - 1 : -1]

    def save(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes what `AutoModelForCausalLM.from_pretrained` reads, the tokenizer, and the value head beside them."""
        self.model.generation_config = self.generation_config
        self.model.save_pretrained(folder)
        self.model.generation_config = GenerationConfig()
        tokenizer.save_pretrained(folder)
        save_file({name: t.contiguous() for name, t in self.value_head.state_dict().items()}, folder / VALUE_HEAD)


def placed(model: Any, device: torch.device) -> Any:
    """The model on its device, without dropout, in training either.

    On CUDA its trunk computes in bf16 from fp32 weights, wherever it is called from. Its head stays in fp32: bf16
    logits would sample from another distribution than the one whose log-probs are trained (0.1 nats off at worst).
    """
    if device.type == "cuda":
        trunk = model.base_model
        trunk.forward = torch.autocast("cuda", dtype=torch.bfloat16)(trunk.forward)
    return model.to(device).eval()


def load_policy(name: str, temperature: float, device: torch.device) -> Policy:
    """The policy in fp32 with a value head of zeros, or the one saved beside the model."""
    policy = Policy(placed(_load(AutoModelForCausalLM, "policy", name), device), temperature)
    if (saved := Path(name) / VALUE_HEAD).is_file():
        policy.value_head.load_state_dict(load_file(saved))
    policy.to(device).eval()
    _check_head(policy)
    return policy


def load_reference(name: str, temperature: float, device: torch.device) -> Policy:
    """The same model again, frozen; loaded in the same precision, so that at the start the log-ratio is exactly 0."""
    model = placed(_load(AutoModelForCausalLM, "policy", name), device)
    return Policy(model, temperature).to(device).eval().requires_grad_(False)


def load_reward_model(name: str, device: torch.device) -> PreTrainedModel:
    model = _load(AutoModelForSequenceClassification, "reward-model", name)
    return placed(model, device).requires_grad_(False)


def load_tokenizer(option: str, name: str) -> PreTrainedTokenizerBase:
    check_folder(option, name)
    try:
        return AutoTokenizer.from_pretrained(name)
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
    check_folder(option, name)
    try:
        model, report = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(option, name, "model", error) from None
    if report["missing_keys"]:  # else drawn at random: a language model has no score head, say
        raise InputError(
            f"--{option}: {name!r} does not hold {sorted(report['missing_keys'])} of {type(model).__name__}"
        )
    return model


def check_folder(option: str, name: str) -> None:
    """Refuses a folder that is not there, before any work."""
    if looks_like_path(name) and not Path(name).is_dir():
        raise InputError(f"--{option}: got {name!r}, expected an existing folder or a hub name")


def _not_loaded(option: str, name: str, what: str, error: Exception) -> InputError:
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
