"""A task whose optimum is known: sums of two digits, and a policy that is right about a third of the time.

Every response to a prompt can be listed (1885 of them, of at most 3 tokens over a vocabulary of 13), so that the
objective J(π) = E_π[R(y) − τ·log π(y)/π_b(y)] (Eq. 3) is known without sampling, and so is its optimum:

    π*(y) ∝ π_b(y)·exp(R(y)/τ)        J* = J(π*) = τ·log E_{π_b}[exp(R/τ)]        J* − J(π) = τ·KL(π‖π*)
"""

import hashlib
import os
import platform
import random
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .checkpoint import rename_folder
from .config import InputError
from .data import Prompt
from .metrics import Record, write_lines
from .models import Policy, stop_tokens
from .rollout import Generator

CHARACTERS = "0123456789+="
END = "<|endoftext|>"
# Large enough for the sums to be learned exactly, and small enough to list all responses in half a second.
WIDTH, LAYERS, HEADS = 32, 2, 4
STEPS, ROWS, LEARNING_RATE = 300, 128, 3e-3
SPREAD = 1.3  # of the errors in the answers that the policy learns from: 30 % of them are right
MOST_STATES = 20_000  # to list for each prompt


class Paths(NamedTuple):
    policy: Path
    dataset: Path  # a folder with train.jsonl and test.jsonl, lines of {"prompt": …}


def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """R(y): 1 for the right number, a quarter less for each unit that it is off, and 0 for what is no number."""
    return [_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _score(prompt: str, response: str) -> float:
    first, second = prompt.rstrip("=").split("+")
    if not response.isdecimal() or (len(response) > 1 and response.startswith("0")):
        return 0.0
    return max(0.0, 1 - abs(int(response) - int(first) - int(second)) / 4)


def prompts() -> list[str]:
    return [f"{first}+{second}=" for first in range(10) for second in range(10)]


def prepare(cache: Path | None = None, progress: Callable[[str], None] = print) -> Paths:
    """Makes, in some three seconds of one core, or finds in the cache the prompts and the policy.

    All 100 prompts are both trained and evaluated on: what is measured is the distance from the optimum of the very
    objective that is trained, not what is made of sums that were never seen.
    cache: as the demo's, `$XDG_CACHE_HOME/klq_fast` or `~/.cache/klq_fast`. progress: receives the lines to show.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klq_fast"
    versions = (sys.version, platform.machine(), torch.__version__, transformers.__version__, tokenizers.__version__)
    digest = hashlib.sha256(repr(versions).encode() + Path(__file__).read_bytes()).hexdigest()[:12]
    root = Path(cache) / f"arithmetic-{digest}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{root}.lock"):  # runs that start together wait for the first of them
        if not root.exists():
            progress(f"arithmetic: the policy learns from sums of which some are right ({STEPS} steps)")
            partial = root.with_name(f"{root.name}.partial")
            partial.mkdir(exist_ok=True)
            for split in ("train", "test"):
                write_lines(partial / f"{split}.jsonl", [{"prompt": prompt} for prompt in prompts()])
            tokenizer = make_tokenizer()
            with torch.random.fork_rng(devices=[]):
                make_policy(tokenizer).save_pretrained(partial / "policy")
            tokenizer.save_pretrained(partial / "policy")
            rename_folder(partial, root)
    return Paths(root / "policy", root)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and one to end with."""
    vocab = {token: index for index, token in enumerate([*CHARACTERS, END])}
    tokenizer = Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def make_policy(tokenizer: PreTrainedTokenizerFast, steps: int = STEPS) -> GPT2LMHeadModel:
    """A small language model, trained from random weights on sums whose answers are off by a rounded normal error."""
    torch.manual_seed(0)
    generator = random.Random(0)
    end = tokenizer.eos_token_id
    policy = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=16,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            initializer_range=0.1,  # 0.02 is for widths near 1000
            bos_token_id=end,
            eos_token_id=end,
        )
    ).eval()  # no dropout
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    for step in range(steps):
        texts = []
        for _ in range(ROWS):
            first, second = generator.randrange(10), generator.randrange(10)
            texts.append(f"{first}+{second}={max(0, first + second + round(generator.gauss(0, SPREAD)))}")
        rows = [[*row, end] for row in tokenizer(texts)["input_ids"]]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [end] * (width - len(row)) for row in rows])  # (B, S)
        targets = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
        targets[:, :4] = -100  # the prompt
        logits = policy(input_ids=tokens[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    return policy


def responses(vocab_size: int, stops: Sequence[int], length: int) -> tuple[list[list[int]], list[bool]]:
    """Every response of at most `length` tokens, in the order of `response_logprobs`, and whether it ended."""
    others = [token for token in range(vocab_size) if token not in stops]
    ended = [[*prefix, stop] for t in range(length) for prefix in product(others, repeat=t) for stop in stops]
    unended = [list(prefix) for prefix in product(others, repeat=length)]
    return ended + unended, [True] * len(ended) + [False] * len(unended)


@torch.no_grad()
def response_logprobs(policy: Policy, prompt: Sequence[int], stops: Sequence[int], length: int) -> Tensor:
    """log π(y) of every response to a prompt, at the policy's temperature: (N,) float64."""
    device = policy.value_head.weight.device
    vocab_size = policy.model.config.get_text_config().vocab_size
    others = [token for token in range(vocab_size) if token not in stops]  # W of them
    # A row for each state before the last token; the states above it stand in the same rows.
    states = torch.tensor(list(product(others, repeat=length - 1)), dtype=torch.int64, device=device)
    tokens = torch.cat([torch.tensor(prompt, device=device).expand(len(states), -1), states], dim=1)
    logits = policy.model(input_ids=tokens).logits[:, len(prompt) - 1 :]  # (W^(T-1), T, V)
    logprobs = (logits.double() / policy.temperature).log_softmax(-1)
    reached = torch.zeros(1, dtype=torch.float64, device=device)  # log-prob of each state with t tokens, (W^t,)
    ended = []
    for t in range(length):
        here = reached[:, None] + logprobs[:: len(others) ** (length - 1 - t), t]  # (W^t, V)
        ended.append(here[:, list(stops)].flatten())
        reached = here[:, others].flatten()
    return torch.cat([*ended, reached])


def exact(
    logprobs: Tensor,  # (..., N) log π(y), over all responses y
    ref_logprobs: Tensor,  # (..., N) log π_b(y)
    rewards: Tensor,  # (..., N) R(y)
    tau: float,
) -> Record:
    """J, J* and what they are made of, and KL(π‖π*); each computed on its own, and averaged over prompts."""
    log_partition = (ref_logprobs + rewards / tau).logsumexp(-1, keepdim=True)
    best = ref_logprobs + rewards / tau - log_partition  # log π*
    probs, best_probs = logprobs.exp(), best.exp()
    reward, kl = (probs * rewards).sum(-1).mean(), (probs * (logprobs - ref_logprobs)).sum(-1).mean()
    return {
        "exact_reward": float(reward),
        "exact_kl": float(kl),
        "exact_rlhf_reward": float(reward - tau * kl),
        "optimal_reward": float((best_probs * rewards).sum(-1).mean()),
        "optimal_kl": float((best_probs * (best - ref_logprobs)).sum(-1).mean()),
        "optimal_rlhf_reward": float(tau * log_partition.mean()),
        "kl_to_optimum": float((probs * (logprobs - best)).sum(-1).mean()),
    }


def exact_evaluation(
    generator: Generator, reference: Policy, heldout: Sequence[Prompt], tau: float
) -> Callable[[], Record]:
    """A function that returns `exact` of the policy as it then is.

    The reward is the one that is trained on: the score less ω where a response does not end, so that the optimum is
    that of training (with γ = 1) whatever ω is.

    Raises:
        InputError: the responses are too many to list.
    """
    policy, length = generator.policy, generator.response_length
    stops = stop_tokens(policy, generator.tokenizer)
    vocab_size = policy.model.config.get_text_config().vocab_size
    if (states := (vocab_size - len(stops)) ** (length - 1)) > MOST_STATES:
        raise InputError(
            f"--policy: the optimum of the arithmetic task is found by listing all responses; got a vocabulary of "
            f"{vocab_size} and --response-length {length}, {states} states for each prompt, expected at most "
            f"{MOST_STATES}"
        )
    tokens, ended = responses(vocab_size, stops, length)
    texts = generator.tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    penalty = generator.missing_eos_penalty * (~torch.tensor(ended)).double()
    scores = torch.stack([generator.reward([prompt] * len(texts), texts, ended) for prompt in heldout])
    rewards = scores.double() - penalty

    def logprobs(of: Policy) -> Tensor:  # (prompts, N)
        return torch.stack([response_logprobs(of, prompt.tokens, stops, length) for prompt in heldout]).cpu()

    ref_logprobs = logprobs(reference)
    return lambda: exact(logprobs(policy), ref_logprobs, rewards, tau)
