"""Decoding: samples exactly from softmax(logits / temperature), token by token, for a batch of prompts."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache

from .batch import Sequences, microbatches, to_device
from .models import Policy

SIZES = 4  # a batch shrinks to the rows left in steps of a quarter, so that few shapes of tensors occur
# The number of experts by the names that configs have for it; transformers' own aliases cover the rest.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def decode(
    policy: Policy,
    prompt_tokens: Tensor,  # (B, P) int64, padded on the left
    prompt_lengths: Tensor,  # (B,) int64, on the CPU
    length: int,
    stops: Sequence[int],
    pad: int,
    numbers: Tensor | None,  # (B, length) float64 in [0, 1); None: the likeliest tokens
    max_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # (B, T) int64; (B,) int64 and (B,) bool, on the CPU
    """Responses of at most `length` tokens, their lengths with the stop token counted, and whether they ended with one.

    A row's response depends on its prompt and its numbers alone (beyond rounding). The batch shrinks as rows end.
    `max_tokens` of prompts are read at a time; a model that `packing` leaves as it is reads all of them at once.
    """
    device, (size, _) = prompt_tokens.device, prompt_tokens.shape
    tokens = prompt_tokens.new_full((size, length), pad)
    rows = torch.arange(size, device=device)  # whose response each row of the batch is
    going = torch.ones(size, dtype=torch.bool, device=device)
    stop_tokens = torch.tensor(stops, device=device)
    decoder = Decoder(policy)
    scores = decoder.begin(prompt_tokens, prompt_lengths, length, max_tokens)
    for t in range(length):
        token = scores.argmax(-1) if numbers is None else sample(scores, numbers[rows, t], policy.temperature)
        tokens[rows, t] = token
        going = going & ~torch.isin(token, stop_tokens)
        left = int(going.sum())  # the host waits for the device here, once a token
        if left == 0 or t == length - 1:
            break
        if policy.packed and (fitting := _fitting(left, size)) < len(rows):
            kept = going.int().argsort(descending=True, stable=True)[:fitting]
            rows, going, token = rows[kept], going[kept], token[kept]
            decoder.keep(kept)
        scores = decoder.step(token)

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
    elif hidden.device.type != "cpu":
        logits = torch.mm(hidden.to(head.weight.dtype), head.weight.T, out_dtype=torch.float32)
        logits = logits if head.bias is None else logits + head.bias
    else:
        bias = None if head.bias is None else head.bias.float()
        logits = nn.functional.linear(hidden.float(), head.weight.float(), bias)
    return logits if policy.softcap is None else policy.softcap * torch.tanh(logits / policy.softcap)


class Decoder:
    """Runs a policy over one batch of prompts, then a token of each row at a time, and holds the keys and values.

    They stand in a cache of fixed size, rows · columns · layers · 2 · (heads of keys · their size) numbers, so that a
    step copies none of them and has the same shapes and addresses as the one before. On CUDA that lets it be captured
    once for each number of rows and replayed from then on: kernel by kernel the host takes longer to launch the step of
    a 1B model than the GPU to compute it. A capture costs about one such launch. Cache and captured step go with the
    batch: the update needs the memory, 14 GB of 192 rows of 565 tokens in Pythia-1B's case.

    Models that `packing` leaves as they are get a cache that grows.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache_name = cache_name(policy.model.base_model)
        self.graph: torch.cuda.CUDAGraph | None = None  # the captured step of the present rows
        self.cache: Cache | None = None
        self.used = 0  # columns of the cache
        self.tokens = self.positions = self.seen = self.logits = torch.empty(0, 0)

    @torch.no_grad()
    def begin(
        self, prompt_tokens: Tensor, prompt_lengths: Tensor, length: int, max_tokens: int
    ) -> Tensor:  # (B, P), (B,) on the CPU -> (B, V) logits
        """Reads the prompts, packed and `max_tokens` at a time, and leaves room for `length` more tokens."""
        device, lengths = prompt_tokens.device, prompt_lengths.numpy()
        size, self.used = prompt_tokens.shape
        columns = np.arange(self.used + length)
        seen = (columns >= self.used - lengths[:, None]) & (columns < self.used)
        self.seen = to_device(seen, device)  # (B, columns)
        self.positions = to_device(lengths[:, None] - 1, device)  # (B, 1) of the last token
        self.tokens = torch.zeros_like(self.positions)  # (B, 1)
        config = self.policy.model.config
        if not self.policy.packed:
            self.cache = DynamicCache(config=config)
            seen = seen[:, : self.used]
            positions = to_device((seen.cumsum(1) - 1).clip(0), device)
            return self._logits(prompt_tokens, to_device(seen.astype(np.int64), device), positions)
        self.cache = StaticCache(config, max_cache_len=len(columns))
        parts = [np.array(rows) for rows in microbatches(lengths.tolist(), [0] * size, max_tokens, packed=True)]
        states = torch.cat([self._read(prompt_tokens, seen[:, : self.used], rows) for rows in parts])
        layers: list[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(self.used)
        return next_logits(self.policy, states.index_select(0, to_device(np.concatenate(parts).argsort(), device)))

    def _read(self, prompt_tokens: Tensor, seen: NDArray[np.bool_], rows: NDArray[np.int64]) -> Tensor:  # (b, D)
        """Reads these rows' prompts, packed, and puts their keys and values into the cache; their last states."""
        device, size = prompt_tokens.device, len(prompt_tokens)
        places = np.nonzero(seen[rows])  # row by row, as they are packed
        at, column = to_device(rows[places[0]], device), to_device(places[1], device)
        sequences, read = Sequences(seen[rows].sum(1), device), DynamicCache(config=self.policy.model.config)
        inputs: dict[str, Any] = {self.cache_name: read} | sequences.model_inputs()
        output = self.policy.model.base_model(input_ids=prompt_tokens[at, column][None], use_cache=True, **inputs)
        assert self.cache is not None
        layers: list[tuple[Any, Any]] = list(zip(self.cache.layers, read.layers, strict=True))
        for layer, new in layers:
            if not layer.is_initialized:  # of all rows' shape: (B, heads, columns, size of a head)
                layer.lazy_initialization(*(x[:, :, :0].expand(size, -1, -1, -1) for x in (new.keys, new.values)))
            layer.keys[at, :, column] = new.keys[0].transpose(0, 1)
            layer.values[at, :, column] = new.values[0].transpose(0, 1)
        return output.last_hidden_state[0].index_select(0, sequences.bounds[1:] - 1)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:  # (B,) -> (B, V), overwritten by the next step
        """Reads one more token of each row."""
        self.tokens.copy_(token[:, None])
        self.positions += 1
        self.seen[:, self.used] = True
        self.used += 1
        if self.graph is not None:
            self.graph.replay()
            return self.logits
        logits = self._step()
        if _capturable(self.policy, token.device):  # everything that runs in it for the first time has done so
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone."""
        assert isinstance(self.cache, StaticCache)
        self.graph = None  # which knows the addresses of what is replaced here
        self.tokens, self.positions, self.seen = (x[rows] for x in (self.tokens, self.positions, self.seen))
        layers: list[Any] = self.cache.layers
        for layer in layers:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                held[: len(rows)] = held[rows]
                setattr(layer, name, held[: len(rows)])

    def _step(self) -> Tensor:
        # A mask of four dimensions is taken as it is; other models make theirs, of windows for instance, of this one.
        mask = self.seen[:, None, None] if self.policy.packed else self.seen[:, : self.used].long()
        return self._logits(self.tokens, mask, self.positions)

    def _logits(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        output = self.policy.model.base_model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        return next_logits(self.policy, output.last_hidden_state[:, -1])


def cache_name(model: nn.Module) -> str:
    """What a model calls its cache of keys and values: `cache` since transformers 5.24, which warns of the old name."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _capturable(policy: Policy, device: torch.device) -> bool:
    """Whether a step runs on CUDA from its first kernel to its last without the host waiting for a result."""
    config = policy.model.config.get_text_config()
    # A mixture's host reads from the device how many tokens each expert got: PyTorch's grouped_mm does so on GPUs below
    # sm_90 (pytorch issue 169970), a loop over the chosen experts on any.
    parts = (config, getattr(config, "ffn_config", None))  # the latter in DBRX
    mixture = any(getattr(part, name, None) for part in parts for name in EXPERTS)
    # And how long the longest text is, where the frequencies of rotary positions follow it.
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(each for each in found.values() if isinstance(each, dict))]  # some have them by kind of layer
    follows = any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)
    return device.type == "cuda" and policy.packed and not mixture and not follows


def _fitting(left: int, size: int) -> int:
    """The smallest of the sizes that a batch of `size` rows shrinks to that holds the rows left."""
    step = -(-size // SIZES)
    return -(-left // step) * step
