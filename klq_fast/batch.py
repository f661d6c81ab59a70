"""A batch of rollouts: named tensors with shapes. Lengths are carried, never inferred from the ids of pad tokens."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

_LATER: Any = None  # a later step of the batch's way fills it in


@dataclass(frozen=True)
class Rollout:
    """B prompts, a response to each, and what the algorithms need of them.

    Prompts are padded on the left to P tokens and responses on the right to T, so that the response starts in one
    column and the trunk's output at column P − 1 + t is the state that chose response token t.
    """

    prompt_tokens: Tensor  # (B, P) int64
    prompt_lengths: Tensor  # (B,) int64
    response_tokens: Tensor  # (B, T) int64
    response_lengths: Tensor  # (B,) int64, the end-of-sequence token counted
    ended: Tensor  # (B,) bool: the response ends with an end-of-sequence token
    logprobs: Tensor = _LATER  # (B, T) log π_old, at the sampling temperature
    ref_logprobs: Tensor = _LATER  # (B, T) log π_b, likewise
    values: Tensor = _LATER  # (B, T) V_old(s_t)
    rewards: Tensor = _LATER  # (B,) paid on the last token: score − ω·1[not ended]
    advantages: Tensor = _LATER  # (B, T)
    returns: Tensor = _LATER  # (B, T) what the values (PPO) or action values (KLQ) are regressed on

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def mask(self) -> Tensor:  # (B, T) bool: the response's tokens
        columns = torch.arange(self.response_tokens.shape[1], device=self.response_tokens.device)
        return columns < self.response_lengths[:, None]

    @property
    def num_tokens(self) -> Tensor:  # () int64: response tokens
        return self.response_lengths.sum()

    @property
    def log_ratio(self) -> Tensor:  # (B, T) log π_old − log π_b
        return self.logprobs - self.ref_logprobs

    def model_inputs(self) -> dict[str, Tensor]:
        """What a causal language model takes: prompt + response (B, P + T), mask, and positions in the text."""
        prompt_columns = torch.arange(self.prompt_tokens.shape[1], device=self.prompt_tokens.device)
        prompt_mask = prompt_columns >= self.prompt_tokens.shape[1] - self.prompt_lengths[:, None]
        attention_mask = torch.cat([prompt_mask, self.mask], dim=1).long()
        return {
            "input_ids": torch.cat([self.prompt_tokens, self.response_tokens], dim=1),
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),
        }

    def rows(self, index: Tensor) -> "Rollout":
        """These rows, with the padding that they do not need cut off."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: None if value is None else value[index] for name, value in values.items()}
        prompt_length = int(taken["prompt_lengths"].max())
        response_length = int(taken["response_lengths"].max())
        taken["prompt_tokens"] = taken["prompt_tokens"][:, -prompt_length:]
        for name in ("response_tokens", "logprobs", "ref_logprobs", "values", "advantages", "returns"):
            if taken[name] is not None:
                taken[name] = taken[name][:, :response_length]
        return Rollout(**taken)

    def microbatches(self, max_tokens: int) -> list[Tensor]:
        """Row indices of microbatches, alike in length, whose padded size is at most `max_tokens` (or one row)."""
        prompts, responses = self.prompt_lengths.tolist(), self.response_lengths.tolist()
        order = sorted(range(len(self)), key=lambda row: (prompts[row] + responses[row], row))
        batches: list[list[int]] = []
        prompt = response = 0
        for row in order:
            # Prompt and response are padded apart, so the longest of each may come from two rows.
            wider = max(prompt, prompts[row]) + max(response, responses[row])
            if batches and (len(batches[-1]) + 1) * wider <= max_tokens:
                batches[-1].append(row)
                prompt, response = max(prompt, prompts[row]), max(response, responses[row])
            else:
                batches.append([row])
                prompt, response = prompts[row], responses[row]
        return [torch.tensor(batch, device=self.prompt_lengths.device) for batch in batches]
