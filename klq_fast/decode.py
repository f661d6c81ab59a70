"""Decoding: samples exactly from softmax(logits / temperature), token by token, for a batch of prompts."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from .batch import to_device
from .models import Policy

SIZES = 4  # a batch shrinks to the rows left in steps of a quarter, so that few shapes of tensors occur
COLUMNS = 64  # on CUDA the cache is as long as a multiple of this, so that batches share its captured steps


def decode(
    decoder: "Decoder",
    prompt_tokens: Tensor,  # (B, P) int64, padded on the left
    prompt_lengths: Tensor,  # (B,) int64, on the CPU
    length: int,
    stops: Sequence[int],
    pad: int,
    numbers: Tensor | None,  # (B, length) float64 in [0, 1); None: the likeliest tokens
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T) int64; (B,) int64 and (B,) bool, on the CPU
    """Responses of at most `length` tokens, their lengths with the stop token counted, and whether they ended with one.

    A row's response depends on its prompt and its numbers alone (beyond rounding). The batch shrinks as rows end.
    """
    device, (size, _) = prompt_tokens.device, prompt_tokens.shape
    tokens = prompt_tokens.new_full((size, length), pad)
    rows = torch.arange(size, device=device)  # whose response each row of the batch is
    going = torch.ones(size, dtype=torch.bool, device=device)
    stop_tokens = torch.tensor(stops, device=device)
    scores = decoder.begin(prompt_tokens, prompt_lengths, length)
    for t in range(length):
        token = scores.argmax(-1) if numbers is None else sample(scores, numbers[rows, t], decoder.policy.temperature)
        tokens[rows, t] = token
        going = going & ~torch.isin(token, stop_tokens)
        left = int(going.sum())  # the host waits for the device here, once a token
        if left == 0 or t == length - 1:
            break
        if decoder.policy.packed and (fitting := _fitting(left, size)) < len(rows):
            kept = going.int().argsort(descending=True, stable=True)[:fitting]
            rows, going, token = rows[kept], going[kept], token[kept]
            decoder.keep(kept)
        scores = decoder.step(token)
    decoder.end()

    is_stop = np.isin(tokens.cpu().numpy(), stops)
    ended = is_stop.any(1)
    lengths = np.where(ended, is_stop.argmax(1) + 1, length)
    valid = to_device(np.arange(lengths.max()) < lengths[:, None], device)
    return tokens[:, : lengths.max()].where(valid, pad), torch.from_numpy(lengths), torch.from_numpy(ended)


def sample(
    logits: Tensor,  # (B, V)
    numbers: Tensor,  # (B,) float64 in [0, 1)
    temperature: float,
) -> Tensor:  # (B,) int64
    """The tokens at which the cumulative sum of softmax(logits / temperature) passes the numbers.

    With uniform numbers these are exact samples. One number a token, given beforehand, makes a row's response the same
    in whatever batch, on whatever device or rank it is generated (beyond rounding).
    """
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # Scaled by the sum, which rounding may leave a little off 1, a token of probability 0 is never reached.
    target = numbers[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_max(logits.shape[-1] - 1).squeeze(1)


def next_logits(policy: Policy, hidden: Tensor) -> Tensor:  # (B, D) -> (B, V), float32 or wider
    """Rounded to 16 bits they would sample from another distribution than the one whose log-probs are trained."""
    head: nn.Linear = policy.model.get_output_embeddings()  # type: ignore[assignment]
    if head.weight.dtype in (torch.float32, torch.float64):
        logits = head(hidden.to(head.weight.dtype))
    elif hidden.is_cuda:
        logits = torch.mm(hidden.to(head.weight.dtype), head.weight.T, out_dtype=torch.float32)
        logits = logits if head.bias is None else logits + head.bias
    else:
        bias = None if head.bias is None else head.bias.float()
        logits = nn.functional.linear(hidden.float(), head.weight.float(), bias)
    return logits if policy.softcap is None else policy.softcap * torch.tanh(logits / policy.softcap)


class Decoder:
    """Runs a policy over a batch of prompts, then a token of each row at a time, and holds the keys and values.

    They stand in a cache of fixed size, so that a step copies none of them and has the same shapes and addresses as
    the one before. On CUDA that lets it be captured once for each number of rows and replayed from then on: kernel by
    kernel the host takes longer to launch the step of a 1B model than the GPU to compute it. So the cache is kept for
    the next batch there: rows · columns · layers · 2 · (heads of keys · their size) numbers.

    Models that `packing` leaves as they are get a cache that grows.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by number of rows: a step, and its logits
        self.rows = self.used = 0  # of the present batch; columns of the cache
        self.tokens = self.positions = self.seen = torch.empty(0, 0)
        self.cache: Cache | None = None

    @torch.no_grad()
    def begin(self, prompt_tokens: Tensor, prompt_lengths: Tensor, length: int) -> Tensor:  # -> (B, V) logits
        """Reads the prompts, leaving room for `length` more tokens."""
        self.rows, self.used = prompt_tokens.shape
        device, columns = prompt_tokens.device, np.arange(self.used)
        self._reserve(self.rows, self.used + length, device)
        before = self.used - prompt_lengths.numpy()[:, None]
        positions = to_device((columns - before).clip(0), device)
        self.seen[: self.rows, : self.used] = to_device(columns >= before, device)
        self.positions[: self.rows] = positions[:, -1:]
        return self._logits(prompt_tokens, self.seen[: self.rows, : self.used].long(), positions)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:  # (B,) -> (B, V), overwritten by the next step
        """Reads one more token of each row."""
        self.tokens[: self.rows] = token[:, None]
        self.positions[: self.rows] += 1
        self.seen[: self.rows, self.used] = True
        self.used += 1
        if self.rows in self.graphs:
            graph, logits = self.graphs[self.rows]
            graph.replay()
            return logits
        logits = self._step()
        if token.is_cuda and self.policy.packed:  # everything that runs in it for the first time has done so
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.graphs[self.rows] = graph, self._step()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone, moved to the front of the cache."""
        assert isinstance(self.cache, StaticCache)
        self.rows = len(rows)
        layers: list[Any] = self.cache.layers
        for x in (self.positions, self.seen, *(x for layer in layers for x in (layer.keys, layer.values))):
            x[: self.rows] = x[rows]

    def end(self) -> None:
        """The batch is done."""
        if not self.seen.is_cuda:
            self.cache = None

    def _reserve(self, rows: int, columns: int, device: torch.device) -> None:
        """An empty cache that holds these rows and columns: the last one, where it does."""
        held = self.seen.shape
        if isinstance(self.cache, StaticCache) and rows <= held[0] and columns <= held[1]:
            self.cache.reset()
            self.seen.zero_()
            return
        self.cache = None  # freed before there is a new one
        self.graphs.clear()
        if device.type == "cuda":
            columns = -(-max(columns, held[1]) // COLUMNS) * COLUMNS
        config = self.policy.model.config
        self.cache = StaticCache(config, max_cache_len=columns) if self.policy.packed else DynamicCache(config=config)
        self.tokens, self.positions = (torch.zeros(rows, 1, dtype=torch.int64, device=device) for _ in range(2))
        self.seen = torch.zeros(rows, columns, dtype=torch.bool, device=device)

    def _step(self) -> Tensor:
        # A mask of four dimensions is taken as it is; other models make theirs, of windows for instance, of this one.
        seen = self.seen[: self.rows]
        mask = seen[:, None, None] if self.policy.packed else seen[:, : self.used].long()
        return self._logits(self.tokens[: self.rows], mask, self.positions[: self.rows])

    def _logits(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.policy.model.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._front(),
            use_cache=True,
        )
        return next_logits(self.policy, output.last_hidden_state[:, -1])

    def _front(self) -> Cache | None:
        """The cache of the present rows, which are the first: the same memory."""
        if not isinstance(self.cache, StaticCache) or self.rows == len(self.seen):
            return self.cache
        front = copy.copy(self.cache)
        front.layers = [copy.copy(layer) for layer in self.cache.layers]
        layers: list[Any] = front.layers
        for layer in layers:
            layer.keys, layer.values, layer.batch_size = layer.keys[: self.rows], layer.values[: self.rows], self.rows
        return front


def _fitting(left: int, size: int) -> int:
    """The smallest of the sizes that a batch of `size` rows shrinks to that holds the rows left."""
    step = -(-size // SIZES)
    return -(-left // step) * step
