"""Rollouts: batched generation whose samples depend on (seed, episode) alone, then scores, log-probs and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from .batch import Rollout
from .data import Prompt
from .models import Policy, pad_token, stop_tokens
from .reward import Reward

TRAIN_STREAM, EVAL_STREAM = 0, 1  # training and evaluation draw from different random streams


class Sampler(LogitsProcessor):
    """Chooses the next token by inverting the distribution's cumulative sum at a uniform number given beforehand.

    This samples softmax(scores / temperature) exactly, needs one number a token, and gives a row the same response
    in whatever batch, on whatever device or rank it is generated (beyond rounding).
    """

    def __init__(self, uniforms: Tensor, temperature: float) -> None:
        self.uniforms = uniforms  # (B, T) float64 in [0, 1)
        self.temperature = temperature
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, ·), (B, V) -> (B, V)
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        # Scaled by the sum, which rounding may leave a little off 1, a token of probability 0 is never reached.
        target = self.uniforms[:, self.step, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp_max(scores.shape[-1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def uniforms(seed: int, stream: int, episodes: Sequence[int], length: int) -> Tensor:
    """(episodes, length) float64: a counter-based generator (Philox) keyed by (seed, episode) for each row."""
    rows = [
        np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream])).random(length)
        for key in (np.array([seed, episode], dtype=np.uint64) for episode in episodes)
    ]
    return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Generator:
    """Everything that turns prompts into a scored batch."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    reward: Reward
    response_length: int
    missing_eos_penalty: float
    seed: int

    def respond(
        self, prompts: Sequence[Prompt], episodes: Sequence[int], stream: int, *, greedy: bool = False
    ) -> Rollout:
        """Samples a response to each prompt; `episodes` decide the random numbers. greedy: the likeliest tokens."""
        device = self.policy.value_head.weight.device
        stops, pad = stop_tokens(self.policy, self.tokenizer), pad_token(self.tokenizer)
        lengths = torch.tensor([len(p.tokens) for p in prompts])
        width = int(lengths.max())
        prompt_tokens = torch.tensor([[pad] * (width - len(p.tokens)) + p.tokens for p in prompts], device=device)
        lengths = lengths.to(device)
        attention_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        sampler = Sampler(
            uniforms(self.seed, stream, episodes, self.response_length).to(device), self.policy.temperature
        )
        with torch.no_grad():
            sequences = self.policy.model.generate(  # type: ignore[operator]
                input_ids=prompt_tokens,
                attention_mask=attention_mask,
                # Greedy over what the sampler leaves, which is one token; or over all.
                generation_config=GenerationConfig(
                    max_new_tokens=self.response_length, do_sample=False, eos_token_id=stops, pad_token_id=pad
                ),
                logits_processor=LogitsProcessorList([] if greedy else [sampler]),
            )
        response_tokens = sequences[:, width:]
        is_stop = torch.isin(response_tokens, torch.tensor(stops, device=device))
        ended = is_stop.any(1)
        first_stop = is_stop.long().argmax(1)
        response_lengths = torch.where(ended, first_stop + 1, response_tokens.shape[1])
        return Rollout(prompt_tokens, lengths, response_tokens, response_lengths, ended)

    def texts(self, rollout: Rollout) -> list[str]:
        """The responses as text, without special tokens."""
        kept = rollout.response_lengths - rollout.ended.long()  # without the token that ends it
        responses = [row[:n] for row, n in zip(rollout.response_tokens.tolist(), kept.tolist(), strict=True)]
        lengths = rollout.prompt_lengths.tolist()
        prompts = [row[len(row) - n :] for row, n in zip(rollout.prompt_tokens.tolist(), lengths, strict=True)]
        # Behind its prompt, because SentencePiece tokenizers drop the space at the beginning of what they decode.
        before = self._decode(prompts)
        after = self._decode([prompt + response for prompt, response in zip(prompts, responses, strict=True)])
        return [whole[len(prompt) :] for prompt, whole in zip(before, after, strict=True)]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def score(self, prompts: Sequence[Prompt], rollout: Rollout) -> tuple[Tensor, list[str]]:
        """The reward's scores (B,), and the responses' texts."""
        texts = self.texts(rollout)
        scores = self.reward(prompts, texts, rollout.ended.tolist())
        return scores.to(rollout.prompt_tokens.device), texts

    def rewarded(self, rollout: Rollout, scores: Tensor) -> Rollout:
        """With the rewards of Algorithm 2: the score, less ω where the response did not end."""
        return replace(rollout, rewards=scores - self.missing_eos_penalty * (~rollout.ended))


@torch.no_grad()
def with_logprobs(rollout: Rollout, policy: Policy, reference: Policy, max_tokens: int) -> Rollout:
    """With old and reference log-probs and old values, one forward each, in microbatches of at most `max_tokens`."""
    shape = rollout.response_tokens.shape
    logprobs, ref_logprobs, values = (torch.zeros(shape, device=rollout.prompt_tokens.device) for _ in range(3))
    for rows in rollout.microbatches(max_tokens):
        batch = rollout.rows(rows)
        columns = slice(batch.response_tokens.shape[1])
        logprobs[rows, columns], values[rows, columns] = policy(batch)
        ref_logprobs[rows, columns], _ = reference(batch)
    return replace(rollout, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
