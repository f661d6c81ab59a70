"""The demo's tokenizer, and its policy before reinforcement learning: a small GPT-NeoX that writes docstrings."""

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from ..decode import sample as sample_tokens
from .pairs import Pair, Pairs

if TYPE_CHECKING:
    from .prepare import DemoConfig

Track = Callable[..., Iterator[Any]]


def train_tokenizer(pairs: list[Pair], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose pieces end where words end, camelCase included, so that names and prose share them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(?<=[a-z])(?=[A-Z])"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((pair.prompt + pair.sentence for pair in pairs), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|endoftext|>")


def token_batches(lengths: list[int], rows: int, generator: random.Random) -> Iterator[list[int]]:
    """Endless epochs of batches of row indices, each of similar lengths, so that padding wastes a few per cent."""
    while True:
        order = list(range(len(lengths)))
        generator.shuffle(order)
        batches = []
        for start in range(0, len(order), 16 * rows):
            chunk = sorted(order[start : start + 16 * rows], key=lengths.__getitem__)
            batches += [chunk[first : first + rows] for first in range(0, len(chunk), rows)]
        generator.shuffle(batches)
        yield from batches


def right_padded(rows: list[list[int]], filler: int) -> Tensor:
    """(B, longest) int64. Behind a causal trunk nothing reads the padding, so no attention mask is needed."""
    width = max(map(len, rows))
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def optimizers(model: nn.Module, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest: a third fewer steps than AdamW alone to the same loss here."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers." in name)]
    return [
        torch.optim.Muon(blocks, lr=10 * learning_rate, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, share: float) -> None:
    """One update at `share` of the peak learning rate."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = share * group["peak"]
        optimizer.step()
        optimizer.zero_grad()


def learning_rate_share(index: int, steps: int, warmup: int = 40) -> float:
    """Linear warm-up, then linear to 0."""
    return min((index + 1) / warmup, (steps - index) / steps)


def train_policy(
    pairs: Pairs, tokenizer: PreTrainedTokenizerFast, config: "DemoConfig", steps: int, track: Track, role: str
) -> GPTNeoXForCausalLM:
    """Supervised fine-tuning from random weights: first on all docstring sentences, then on the pairs alone.

    The signature's tokens count a little in the loss too: what names are made of helps with what is said of them.
    """
    torch.manual_seed(config.seed)
    generator = random.Random(config.seed)
    policy = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.hidden_size,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            initializer_range=0.05,  # 0.02 is for widths near 1000; at 96 it costs 0.1 nats a token
            hidden_dropout=0.0,
            attention_dropout=0.0,
            classifier_dropout=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = [*pairs.train, *pairs.more]
    # A module's sentences have no signature; the end of an earlier text stands before them.
    prompts = [ids or [tokenizer.eos_token_id] for ids in tokenizer([pair.prompt for pair in texts])["input_ids"]]
    responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([pair.sentence for pair in texts])["input_ids"]]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    optims = optimizers(policy, config.policy_learning_rate, weight_decay=0.3)
    everything = token_batches(lengths, config.policy_rows, generator)
    task = token_batches(lengths[: len(pairs.train)], config.policy_rows, generator)
    for index in track(range(steps), f"the {role} learns to write docstrings", steps):
        batch = next(everything if index < config.general_share * steps else task)
        rows = [prompts[row] + responses[row] for row in batch]
        tokens = right_padded(rows, tokenizer.pad_token_id)  # (B, S)
        weights = torch.zeros(tokens.shape)
        for weight, row in zip(weights, batch, strict=True):
            weight[: lengths[row]] = 1.0
            weight[: len(prompts[row])] = config.prompt_weight
        counted = weights[:, 1:] > 0
        hidden = policy.gpt_neox(input_ids=tokens[:, :-1]).last_hidden_state  # (B, S - 1, D)
        logits = policy.get_output_embeddings()(hidden[counted])
        losses = nn.functional.cross_entropy(logits, tokens[:, 1:][counted], reduction="none")
        loss = (losses * weights[:, 1:][counted]).sum() / weights[:, 1:].sum()
        step(policy, optims, loss, learning_rate_share(index, steps))
    # top_k = 0: the whole distribution, as reinforcement learning needs it; transformers would keep the best 50.
    policy.generation_config = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.response_length,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return policy.eval()


class Sampler(LogitsProcessor):
    """The training loop's sampler, for `generate`: torch.multinomial, which do_sample uses, takes more time here than
    the model."""

    def __init__(self, numbers: Tensor, temperature: float) -> None:
        self.numbers = iter(numbers.unbind(1))  # (B, T) uniform in [0, 1), float64
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, ·), (B, V) -> (B, V)
        tokens = sample_tokens(scores, next(self.numbers), self.temperature)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@torch.no_grad()
def sample(
    policy: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], temperature: float
) -> list[list[int]]:
    """One response per prompt, as token ids up to and with the first end-of-sequence token (none if cut off)."""
    ids = tokenizer(prompts)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda row: len(ids[row]))
    length = policy.generation_config.max_new_tokens
    responses: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), 256):
        batch = order[start : start + 256]
        width = max(len(ids[row]) for row in batch)
        padding = [width - len(ids[row]) for row in batch]
        sampler = Sampler(torch.rand(len(batch), length, dtype=torch.float64), temperature)
        generated = policy.generate(  # type: ignore[misc]
            input_ids=torch.tensor(
                [[tokenizer.pad_token_id] * pad + ids[row] for pad, row in zip(padding, batch, strict=True)]
            ),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding]),
            logits_processor=LogitsProcessorList([sampler]),
            do_sample=False,
        )[:, width:].tolist()
        for row, response in zip(batch, generated, strict=True):
            end = response.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in response else len(response)
            responses[row] = response[:end]
    return responses
