"""Packed sequences: the states, log-probs and gradients of padded ones, without work, waits or memory for padding."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from watch import watch

from klq_fast.batch import Responses, Rollout, Sequences, microbatches
from klq_fast.data import Prompt
from klq_fast.evaluate import evaluate
from klq_fast.klq import KLQ
from klq_fast.models import Policy
from klq_fast.packing import ATTENTION, attention, enable_packing
from klq_fast.ppo import PPO
from klq_fast.rollout import Generator, with_logprobs

V, D = 50, 32
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
NEOX_LIKE = {k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "pad_token_id")}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX_LIKE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_positions=64, n_embd=D, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE, head_dim=8)),
}
PADDED = {"window": lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=4))}
LENGTHS = ((5, 1, 9, 3, 9), (4, 6, 1, 6, 2))  # of prompts and responses


def make(family: Callable[[], PreTrainedModel], scale: float = 8.0) -> Policy:
    """In fp64, with weights so large that every token of the context shows in the state."""
    model = family().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    policy = Policy(model, 0.7).eval()
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    policy.value_head.double()
    return policy


def some_rollout(lengths: tuple[Sequence[int], Sequence[int]] = LENGTHS, vocab: int = V) -> Rollout:
    """Random tokens, also in the padding, and random figures of each token."""
    prompts, responses = lengths
    shape = len(prompts), max(responses)
    return Rollout(
        torch.randint(vocab, (len(prompts), max(prompts))),
        torch.tensor(prompts),
        torch.randint(vocab, shape),
        torch.tensor(responses),
        torch.ones(len(prompts), dtype=torch.bool),
        rewards=torch.randn(len(prompts)).double(),
        **{
            name: torch.randn(shape).double()
            for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns")
        },
    )


def states(batch: Responses, hidden: Tensor, *_: object) -> tuple[Responses, Tensor]:
    return batch, hidden


KLQ_LOSS = KLQ(tau=0.5, lam=0.9, gamma=1.0, alpha=1.0, policy_weight=1.0, value_weight=1.0, temperature=0.7)
PPO_LOSS = PPO(0.5, 0.9, 1.0, 1.0, 0.2, 0.2, 0.1, True, "none", None, 0.7)


# The same numbers.


@pytest.mark.parametrize("family", [*FAMILIES, "window"])
def test_states_are_those_of_single_rows(family: str) -> None:
    """Against a plain forward of each row alone. In fp64 the two differ by its rounding, 1e-16 of sums of size 10."""
    policy, rollout = make((FAMILIES | PADDED)[family]), some_rollout()
    assert policy.packed == (family in FAMILIES)
    alone = (FAMILIES | PADDED)[family]().double().eval()  # with transformers' own attention
    alone.load_state_dict(policy.model.state_dict())
    expected, tokens = [], []
    for row, (p, n) in enumerate(zip(*LENGTHS, strict=True)):
        prompt = rollout.prompt_tokens[row, max(LENGTHS[0]) - p :]
        response = rollout.response_tokens[row, :n]
        output = alone.base_model(input_ids=torch.cat([prompt, response])[None]).last_hidden_state[0]
        expected.append(output[p - 1 : p + n - 1])
        tokens.append(response)
    batch, hidden = policy(rollout, states)
    assert torch.equal(batch.tokens, torch.cat(tokens))
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=0, atol=1e-11)
    # A token of another sequence, or a position one off, would be seen.
    assert torch.cat(expected).std(0).min() > 1e-3


@pytest.mark.parametrize("algorithm", [KLQ_LOSS, PPO_LOSS])
@pytest.mark.parametrize("family", ["neox", "llama", "gpt2"])
def test_gradients_are_those_of_padded_rows(family: str, algorithm: KLQ | PPO) -> None:
    policy, rollout = make(FAMILIES[family]), some_rollout()
    found = []
    for packed in (True, False):
        policy.packed = packed
        output = policy(rollout, algorithm.loss, 19)
        names, parameters = zip(*policy.named_parameters(), strict=True)
        found.append((output.loss, *torch.autograd.grad(output.loss, parameters)))
    for name, packed_one, padded_one in zip(("loss", *names), *found, strict=True):
        assert padded_one.abs().max() > 0, name
        error = (packed_one - padded_one).abs().max() / padded_one.abs().max()
        assert error < 1e-10, name  # fp64's rounding through two layers; fp32's would be 1e-6


def test_the_padded_way_is_exact_too() -> None:
    """Log-probs and values (N,), packed and padded, in microbatches of any size."""
    policy, rollout = make(FAMILIES["llama"]), some_rollout()
    whole = with_logprobs(rollout, policy, policy, 10**6)
    for packed in (True, False):
        policy.packed = packed
        for max_tokens in (1, 20, 10**6):
            parts = with_logprobs(rollout, policy, policy, max_tokens)
            for name in ("logprobs", "values"):
                # Stored in fp32.
                torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=2e-6)
    assert (whole.logprobs[~rollout.mask] == 0).all() and (whole.logprobs[rollout.mask] < 0).all()


def test_attention_checkpointing_sees_the_sequences_again() -> None:
    """Activation checkpointing runs a layer's forward a second time, in the backward pass."""
    policy, rollout = make(FAMILIES["neox"]), some_rollout()
    parameters = tuple(policy.parameters())
    plain = torch.autograd.grad(policy(rollout, KLQ_LOSS.loss, 19).loss, parameters)
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()  # transformers checkpoints in training alone; these models have no dropout
    again = torch.autograd.grad(policy(rollout, KLQ_LOSS.loss, 19).loss, parameters)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# Which models.


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=8, sliding_window=4)),  # and a softcap in attention
        Gemma2ForCausalLM(Gemma2Config(**LLAMA_LIKE, head_dim=8, layer_types=["full_attention"] * 2)),
        BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=D, n_layer=1, n_head=2)),  # ALiBi
        MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=1, state_size=4)),
    ],
    ids=["window", "softcap", "alibi", "recurrent"],
)
def test_models_with_more_than_plain_attention_stay_padded(model: PreTrainedModel) -> None:
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before


def test_models_that_look_beyond_attention_stay_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that mixes in the token before, as recurrent ones do: no configuration tells, two sequences do."""
    model = FAMILIES["neox"]().eval()
    plain = type(model.base_model.layers[0]).forward

    def shifted(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        before = torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return plain(self, hidden_states + 0.5 * before, *args, **kwargs)

    assert enable_packing(model)
    monkeypatch.setattr(type(model.base_model.layers[0]), "forward", shifted)
    other = FAMILIES["neox"]().eval()
    assert not enable_packing(other)
    assert other.config._attn_implementation == "sdpa" and model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux", "position_bias"])
def test_attention_it_does_not_know_is_refused(name: str) -> None:
    x = torch.randn(1, 2, 5, 8)
    sequences = Sequences(np.array([2, 3]), x.device)
    with pytest.raises(ValueError, match=rf"got {name}, expected full causal attention"):
        attention(torch.nn.Module(), x, x, x, None, sequences, **{name: 3})


def test_a_saved_model_does_not_name_this_attention(tmp_path: Any) -> None:
    policy = make(FAMILIES["neox"])
    policy.model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


# What is left out: padding, waiting, logits.


def test_packed_microbatches_count_real_tokens() -> None:
    random = np.random.default_rng(0)
    prompts, responses = (random.integers(1, 30, 64).tolist() for _ in range(2))
    padded, packed = (microbatches(prompts, responses, 100, packed=packed) for packed in (False, True))
    assert sorted(row for rows in packed for row in rows) == list(range(64)) and len(packed) < len(padded)
    sizes = [sum(prompts[row] + responses[row] for row in rows) for rows in packed]
    assert all(size <= 100 or len(rows) == 1 for size, rows in zip(sizes, packed, strict=True))
    # Each is full: the first row of the next one would not fit.
    firsts = [prompts[rows[0]] + responses[rows[0]] for rows in packed[1:]]
    assert all(size + first > 100 for size, first in zip(sizes, firsts, strict=False))


def test_the_trunk_sees_no_padding() -> None:
    policy, rollout = make(FAMILIES["llama"]), some_rollout()
    seen: list[tuple[int, ...]] = []
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[:-1])))
    policy(rollout, KLQ_LOSS.loss, 19)
    # Each row's prompt and response but for the last token, of which nothing is asked.
    assert set(seen) == {(1, sum(LENGTHS[0]) + sum(LENGTHS[1]) - len(LENGTHS[0]))}


WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "repeat_interleave.Tensor")


class NoWaiting(TorchDispatchMode):
    """Raises at what makes the host wait for a GPU: values read, and shapes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for x in arg
        )
        assert not name.startswith(WAITING) and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("algorithm", [KLQ_LOSS, PPO_LOSS])
def test_a_microbatch_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, algorithm: KLQ | PPO) -> None:
    """From the numbers of its rows to the loss, or to the log-probs. (The losses' own tests look at their backward.)"""

    def refuse(self: Tensor) -> None:
        raise AssertionError("tolist() waits for the device")

    policy, rollout = make(FAMILIES["llama"]), some_rollout()
    monkeypatch.setattr(Tensor, "tolist", refuse)
    with NoWaiting():
        batch = rollout.rows(torch.tensor([3, 0, 4]))
        policy(batch, algorithm.loss, batch.num_tokens)
        with torch.no_grad():
            policy(batch)
        rollout.response_slots(torch.tensor([3, 0, 4]))


def test_a_batch_never_holds_the_logits_of_its_tokens() -> None:
    """Log-probs, update and evaluation, with a vocabulary of 16384: no tensor of tokens × vocabulary, 100 MB, is made.

    The operations work through blocks of at most 73 MB; a step of decoding has one token of each row, 6 MB in float64.
    """
    size, length, vocab = 48, 33, 2**14
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX_LIKE | {"vocab_size": vocab, "eos_token_id": vocab - 1}))
    policy = Policy(model.eval(), 1.0)
    reference = copy.deepcopy(policy)
    tokenizer: Any = Endless(vocab - 1)

    def reward(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
        return torch.zeros(len(prompts))

    generator = Generator(policy, tokenizer, reward, length, 1.0, 0)
    prompts = [Prompt("", list(range(row % 7 + 1))) for row in range(size)]
    rollout = some_rollout(([4] * size, [length - row % 2 for row in range(size)]), vocab)
    logits = rollout.num_tokens * vocab * 4  # bytes
    found = {"log-probs": watch(lambda: with_logprobs(rollout, policy, reference, 10**6))}
    for name, algorithm in (("klq", KLQ_LOSS), ("ppo", PPO_LOSS)):
        found[name] = watch(lambda: policy(rollout, algorithm.loss, rollout.num_tokens).loss.backward())  # noqa: B023
    options: dict[str, Any] = {"batch_size": size, "tau": 0.1, "max_tokens": 10**6}
    found["evaluation"] = watch(lambda: evaluate(generator, reference, prompts, **options))
    for name, watched in found.items():
        assert 6e6 < watched.largest < logits / 1.3, name


class Endless:
    """A tokenizer whose end-of-sequence token an untrained policy hardly ever samples."""

    def __init__(self, end: int) -> None:
        self.eos_token_id = self.pad_token_id = end

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]
