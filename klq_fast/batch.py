"""A batch of rollouts: named tensors with shapes. Lengths are carried, never inferred from the ids of pad tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LATER: Any = None  # a later step of the batch's way fills it in
ON_HOST = ("prompt_lengths", "response_lengths", "ended")
PER_TOKEN = ("logprobs", "ref_logprobs", "values", "advantages", "returns")


@dataclass(frozen=True)
class Rollout:
    """B prompts, a response to each, and what the algorithms need of them.

    Prompts are padded on the left to P tokens and responses on the right to T, so that the response starts in one
    column and the trunk's output at column P − 1 + t is the state that chose response token t.

    Which tokens a response has is known on the host, so that a microbatch can be cut, packed and counted without
    waiting for the device: `prompt_lengths`, `response_lengths` and `ended` are CPU tensors, the others lie on the
    device.
    """

    prompt_tokens: Tensor  # (B, P) int64
    prompt_lengths: Tensor  # (B,) int64, on the CPU
    response_tokens: Tensor  # (B, T) int64
    response_lengths: Tensor  # (B,) int64 from 1, the end-of-sequence token counted, on the CPU
    ended: Tensor  # (B,) bool: the response ends with an end-of-sequence token, on the CPU
    logprobs: Tensor = _LATER  # (B, T) log π_old, at the sampling temperature
    ref_logprobs: Tensor = _LATER  # (B, T) log π_b, likewise
    values: Tensor = _LATER  # (B, T) V_old(s_t)
    rewards: Tensor = _LATER  # (B,) paid on the last token: score − ω·1[not ended]
    advantages: Tensor = _LATER  # (B, T)
    returns: Tensor = _LATER  # (B, T) what the values (PPO) or action values (KLQ) are regressed on

    def __post_init__(self) -> None:
        for name in ON_HOST:
            if (device := getattr(self, name).device).type != "cpu":
                raise ValueError(f"{name}: got a tensor on {device}, expected one on the CPU")

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def device(self) -> torch.device:
        return self.prompt_tokens.device

    @property
    def mask(self) -> Tensor:  # (B, T) bool: the response's tokens
        columns = np.arange(self.response_tokens.shape[1])
        return to_device(columns < self.response_lengths.numpy()[:, None], self.device)

    @property
    def last(self) -> Tensor:  # (B, T) bool: the response's last token
        columns = np.arange(self.response_tokens.shape[1])
        return to_device(columns == self.response_lengths.numpy()[:, None] - 1, self.device)

    @property
    def num_tokens(self) -> int:  # response tokens
        return int(self.response_lengths.numpy().sum())

    @property
    def log_ratio(self) -> Tensor:  # (B, T) log π_old − log π_b
        return self.logprobs - self.ref_logprobs

    def rows(self, index: Tensor) -> "Rollout":
        """These rows, with the padding that they do not need cut off; `index` on the CPU, where the lengths are."""
        places = index.numpy()
        on_device = to_device(places, self.device)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: torch.from_numpy(values.pop(name).numpy()[places]) for name in ON_HOST}
        taken |= {name: None if x is None else x[on_device] for name, x in values.items()}
        prompt_length = int(taken["prompt_lengths"].numpy().max())
        response_length = int(taken["response_lengths"].numpy().max())
        taken["prompt_tokens"] = taken["prompt_tokens"][:, -prompt_length:]
        for name in ("response_tokens", *PER_TOKEN):
            if taken[name] is not None:
                taken[name] = taken[name][:, :response_length]
        return Rollout(**taken)

    def microbatches(self, max_tokens: int, *, packed: bool = False) -> list[Tensor]:
        """`microbatches` of these rows, as tensors on the CPU."""
        lengths = self.prompt_lengths.tolist(), self.response_lengths.tolist()
        return [torch.tensor(rows) for rows in microbatches(*lengths, max_tokens, packed=packed)]

    # What a model and a loss take.

    def model_inputs(self) -> dict[str, Tensor]:
        """What a causal language model takes: prompt + response (B, P + T), mask, and positions in the text."""
        width, length = self.prompt_tokens.shape[1], self.response_tokens.shape[1]
        prompts, responses = self.prompt_lengths.numpy()[:, None], self.response_lengths.numpy()[:, None]
        columns = np.arange(width + length)
        mask = (columns >= width - prompts) & (columns < width + responses)
        positions = (columns - (width - prompts)).clip(0, prompts + responses - 1)
        return {
            "input_ids": torch.cat([self.prompt_tokens, self.response_tokens], dim=1),
            "attention_mask": to_device(mask.astype(np.int64), self.device),
            "position_ids": to_device(positions, self.device),
        }

    def states(self) -> Tensor:  # (N,) int64
        """Where in the model's flattened outputs (B · (P + T)) the states s_t are: before each response token."""
        width, length = self.prompt_tokens.shape[1], self.response_tokens.shape[1]
        starts = np.arange(len(self)) * (width + length) + width - 1
        return to_device(_ranges(starts, self.response_lengths.numpy()), self.device)

    def packed_inputs(self) -> tuple[dict[str, Any], Tensor]:
        """What a model takes whose attention is that of packing.py, and the states' places (N,) in its outputs (1, S).

        S tokens: each row's prompt and its response without the last token, whose output no state needs.
        """
        width, length = self.prompt_tokens.shape[1], self.response_tokens.shape[1]
        prompts, responses = self.prompt_lengths.numpy(), self.response_lengths.numpy()
        lengths = prompts + responses - 1
        starts = np.arange(len(self)) * (width + length) + width - prompts
        tokens = torch.cat([self.prompt_tokens, self.response_tokens], dim=1).flatten()
        tokens = tokens.index_select(0, to_device(_ranges(starts, lengths), self.device))
        inputs = {"input_ids": tokens[None], **Sequences(lengths, self.device).model_inputs()}
        return inputs, to_device(_ranges(lengths.cumsum() - responses, responses), self.device)

    def response_slots(self, index: Tensor | None = None) -> Tensor:  # (N,) int64
        """Places in the flattened (B, T) of the response tokens of these rows (all; `index` on the CPU), in order."""
        rows = np.arange(len(self)) if index is None else index.numpy()
        slots = _ranges(rows * self.response_tokens.shape[1], self.response_lengths.numpy()[rows])
        return to_device(slots, self.device)

    def responses(self) -> "Responses":
        """The response tokens, and what there is of each, without padding."""
        slots = self.response_slots()
        per_token = {name: getattr(self, name) for name in PER_TOKEN}
        flat: dict[str, Any] = {
            name: None if x is None else x.flatten().index_select(0, slots) for name, x in per_token.items()
        }
        return Responses(self.response_tokens.flatten().index_select(0, slots), **flat)


@dataclass(frozen=True)
class Responses:
    """The N response tokens of a microbatch, one row's after the other's, as a loss takes them."""

    tokens: Tensor  # (N,) int64
    logprobs: Tensor = _LATER  # (N,) each, as in Rollout
    ref_logprobs: Tensor = _LATER
    values: Tensor = _LATER
    advantages: Tensor = _LATER
    returns: Tensor = _LATER


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin and end that stand in one row, one after the other: what attention must know of them."""

    lengths: NDArray[np.int64]  # (B,) from 1
    device: torch.device

    def model_inputs(self) -> dict[str, Any]:
        positions = to_device(_ranges(np.zeros_like(self.lengths), self.lengths), self.device)[None]  # (1, S)
        # Models take a mask of four dimensions as it is, and make none, whose size would be S².
        mask = torch.empty(0, 0, 0, 0, device=self.device)
        return {"position_ids": positions, "attention_mask": mask, "sequences": self}

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @cached_property
    def bounds(self) -> Tensor:  # (B + 1,) int32: offsets of the sequences
        return to_device(np.append(0, self.lengths.cumsum()).astype(np.int32), self.device)

    @cached_property
    def slots(self) -> Tensor:  # (S,) int64: the tokens' places in the flattened (B, longest)
        return to_device(_ranges(np.arange(len(self.lengths)) * self.longest, self.lengths), self.device)

    def pad(self, x: Tensor) -> Tensor:  # (S, …) -> (B, longest, …), 0 on the right
        size = len(self.lengths) * self.longest
        return x.new_zeros(size, *x.shape[1:]).index_copy_(0, self.slots, x).unflatten(0, (-1, self.longest))

    def unpad(self, x: Tensor) -> Tensor:  # (B, longest, …) -> (S, …)
        return x.flatten(0, 1).index_select(0, self.slots)


def microbatches(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], max_tokens: int, *, packed: bool = False
) -> list[list[int]]:
    """Rows of microbatches, alike in length, of at most `max_tokens` tokens each (or one row).

    packed: whether the model takes them packed, so that tokens count, or padded, so that the padding does too.
    """
    lengths = list(zip(prompt_lengths, response_lengths, strict=True))
    batches: list[list[int]] = []
    prompt = response = total = 0
    for row in sorted(range(len(lengths)), key=lambda row: (sum(lengths[row]), row)):
        # Prompt and response are padded apart, so the longest of each may come from two rows.
        wider = max(prompt, lengths[row][0]), max(response, lengths[row][1])
        longer = total + sum(lengths[row])
        if batches and (longer if packed else (len(batches[-1]) + 1) * sum(wider)) <= max_tokens:
            batches[-1].append(row)
            (prompt, response), total = wider, longer
        else:
            batches.append([row])
            (prompt, response), total = lengths[row], sum(lengths[row])
    return batches


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, … of each length, one after the other."""
    before = lengths.cumsum() - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy that the host does not wait for: from pageable memory it could have to."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
