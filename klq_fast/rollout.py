"""Rollouts: batched generation whose samples depend on (seed, episode) alone, then scores, log-probs and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .batch import Rollout, to_device
from .config import Config
from .data import Prompt
from .decode import decode
from .models import Policy, pad_token, stop_tokens
from .reward import Reward

TRAIN_STREAM, EVAL_STREAM = 0, 1  # training and evaluation draw from different random streams


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
    max_tokens: int = Config.microbatch_tokens  # of prompts read at a time

    def respond(
        self, prompts: Sequence[Prompt], episodes: Sequence[int], stream: int, *, greedy: bool = False
    ) -> Rollout:
        """Samples a response to each prompt; `episodes` decide the random numbers. greedy: the likeliest tokens."""
        device = self.policy.value_head.weight.device
        stops, pad = stop_tokens(self.policy, self.tokenizer), pad_token(self.tokenizer)
        lengths = np.array([len(prompt.tokens) for prompt in prompts])
        padded = np.full((len(prompts), lengths.max()), pad)
        for row, prompt in zip(padded, prompts, strict=True):
            row[len(row) - len(prompt.tokens) :] = prompt.tokens
        prompt_tokens, prompt_lengths = to_device(padded, device), torch.from_numpy(lengths)
        numbers = None if greedy else uniforms(self.seed, stream, episodes, self.response_length).to(device)
        response = decode(
            self.policy, prompt_tokens, prompt_lengths, self.response_length, stops, pad, numbers, self.max_tokens
        )
        return Rollout(prompt_tokens, prompt_lengths, *response)

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
        return scores.to(rollout.device), texts

    def rewarded(self, rollout: Rollout, scores: Tensor) -> Rollout:
        """With the rewards of Algorithm 2: the score, less ω where the response did not end."""
        return replace(rollout, rewards=scores - self.missing_eos_penalty * (~rollout.ended).to(scores.device))


@torch.no_grad()
def with_logprobs(rollout: Rollout, policy: Policy, reference: Policy, max_tokens: int) -> Rollout:
    """With old and reference log-probs and old values, one forward each, in microbatches of at most `max_tokens`."""
    shape = rollout.response_tokens.shape
    logprobs, ref_logprobs, values = (torch.zeros(shape, device=rollout.device) for _ in range(3))
    for rows in rollout.microbatches(max_tokens, packed=policy.packed and reference.packed):
        batch, slots = rollout.rows(rows), rollout.response_slots(rows)
        for model, names in ((policy, (logprobs, values)), (reference, (ref_logprobs,))):
            for whole, found in zip(names, model(batch), strict=False):
                whole.view(-1).index_copy_(0, slots, found.to(whole.dtype))
    return replace(rollout, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
