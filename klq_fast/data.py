"""Prompts: from a .jsonl file, a folder or the datasets library, to tokens, in an order that only the seed decides."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from .config import InputError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    text: str  # what the policy reads, a chat rendered by its template
    tokens: list[int]
    messages: Messages | None = None  # the chat, for a reward model with a template of its own


@dataclass(frozen=True)
class Prompts:
    train: list[Prompt]
    heldout: list[Prompt]
    truncated: int  # how many of both were longer than the limit

    def take(self, seed: int, first: int, count: int) -> list[Prompt]:
        """The prompts of episodes first, first + 1, …: each pass over the prompts has its own order."""
        size = len(self.train)
        orders: dict[int, np.ndarray] = {}
        taken = []
        for episode in range(first, first + count):
            epoch, position = divmod(episode, size)
            if epoch not in orders:
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(size)
            taken.append(self.train[orders[epoch][position]])
        return taken


def load_prompts(dataset: str, tokenizer: PreTrainedTokenizerBase, prompt_length: int, eval_prompts: int) -> Prompts:
    """Reads and tokenizes a dataset. Its test split is held out, or a tenth of it (at most `eval_prompts`) without one.

    Raises:
        InputError: no such dataset; a line that is no prompt, or an empty one; fewer than two prompts.
    """
    splits = _read(dataset)
    train, truncated = _tokenize(splits["train"], tokenizer, prompt_length)
    if "test" in splits:
        heldout, more = _tokenize(splits["test"][:eval_prompts], tokenizer, prompt_length)
        truncated += more
    else:
        # The same prompts are held out whatever the seed, so that runs with different seeds compare.
        order = np.random.default_rng(0).permutation(len(train))
        count = min(eval_prompts, max(1, len(train) // 10))
        heldout = [train[i] for i in order[:count]]
        train = [train[i] for i in sorted(order[count:])]
    if not train or not heldout:
        raise InputError(f"dataset {dataset}: got fewer than 2 prompts, expected some to train on and some to hold out")
    return Prompts(train, heldout, truncated)


def _read(dataset: str) -> dict[str, list[Any]]:
    """Split name ("train", perhaps "test") to records with a prompt (str) or messages (list of dicts)."""
    path = Path(dataset)
    if path.suffix == ".jsonl":
        return {"train": list(_read_lines(path))}
    if (path / "train.jsonl").is_file():
        splits = {"train": list(_read_lines(path / "train.jsonl"))}
        if (path / "test.jsonl").is_file():
            splits["test"] = list(_read_lines(path / "test.jsonl"))
        return splits
    return _read_with_datasets(dataset)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"dataset {path}: {error.strerror}, expected a .jsonl file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"dataset {path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: {error}, expected JSON") from None
        yield _checked(record, where)


def _read_with_datasets(dataset: str) -> dict[str, list[Any]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"dataset {dataset}: neither a .jsonl file nor a folder with train.jsonl; anything else is read by the "
            'datasets library: pip install "klq_fast[hub]"'
        ) from None
    try:
        loaded = datasets.load_dataset(dataset)
    except Exception as error:  # the library raises a dozen kinds for a dataset that is not there
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"dataset {dataset}: could not be loaded: {reason}") from None
    names = {"train": ("train",), "test": ("validation", "test")}
    splits = {}
    for split, candidates in names.items():
        for name in candidates:
            if name in loaded and split not in splits:
                splits[split] = [_checked(r, f"dataset {dataset}, {name}, row {i}") for i, r in enumerate(loaded[name])]
    if "train" not in splits:
        raise InputError(f"dataset {dataset}: got the splits {sorted(loaded)}, expected train")
    return splits


def _checked(record: Any, where: str) -> dict[str, Any]:
    keys = sorted(record) if isinstance(record, dict) else type(record).__name__
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError(f'{where}: got {keys}, expected either "prompt" or "messages"')
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise InputError(f"{where}: prompt: got {type(record['prompt']).__name__}, expected text")
        if not record["prompt"].strip():
            raise InputError(f"{where}: prompt: got an empty text")
    else:
        messages = record["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        while good and messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # the answer to come is the policy's
        if not good or not messages or not messages[-1]["content"].strip():
            raise InputError(
                f'{where}: messages: expected a list of {{"role": …, "content": …}} with something to answer at its end'
            )
        return {"messages": messages}
    return record


def _tokenize(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Prompt], int]:
    chats = [record.get("messages") for record in records]
    is_chat = bool(chats) and chats[0] is not None
    if any((chat is not None) != is_chat for chat in chats):
        raise InputError('dataset: some lines have a "prompt" and some "messages", expected one kind')
    texts = [render(chat, tokenizer) if chat else record["prompt"] for chat, record in zip(chats, records, strict=True)]
    # A chat template writes its own special tokens.
    encoded = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"] if texts else []
    prompts, truncated = [], 0
    for text, tokens, chat in zip(texts, encoded, chats, strict=True):
        if len(tokens) > limit:
            truncated += 1
            text, tokens = _truncate(text, tokenizer, limit, add_special_tokens=not is_chat)
        if not tokens:
            raise InputError(f"dataset: the prompt {text[:80]!r} has no tokens")
        prompts.append(Prompt(text, tokens, chat))
    return prompts, truncated


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the policy reads it, up to where the answer starts."""
    if tokenizer.chat_template is None:
        raise InputError("dataset: it holds chat messages, but the policy's tokenizer has no chat template")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _truncate(
    text: str, tokenizer: PreTrainedTokenizerBase, limit: int, add_special_tokens: bool
) -> tuple[str, list[int]]:
    """Keeps the last line (TL;DR's cue for the answer) and drops lines before it from the end until the rest fits, as
    the TL;DR task does with a post; of a single line too long, the last tokens are kept."""
    split = re.match(r"(.*?)(\n+[^\n]*\n*)\Z", text, re.DOTALL)
    body, cue = split.groups() if split else ("", text)
    for end in _line_ends(body):
        shorter = body[:end] + cue
        tokens = tokenizer(shorter, add_special_tokens=add_special_tokens)["input_ids"]
        if len(tokens) <= limit:
            return shorter, tokens
    tokens = tokenizer(cue, add_special_tokens=add_special_tokens)["input_ids"][-limit:]
    return tokenizer.decode(tokens, skip_special_tokens=False), tokens


def _line_ends(body: str) -> Iterable[int]:
    """Where the body's lines end, from the last to the first."""
    end = body.rfind("\n")
    while end > 0:
        yield end
        end = body.rfind("\n", 0, end)
