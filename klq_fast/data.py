"""Prompts: from a .jsonl file, a folder or the datasets library, to tokens, in an order that only the seed decides."""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .config import InputError, looks_like_path

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
        InputError: no such dataset; a line that is no prompt, or an empty one; fewer than two different prompts.
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
        # A prompt that stands in several lines is held out of all of them.
        texts = {prompt.text for prompt in heldout}
        train = [train[i] for i in sorted(order[count:]) if train[i].text not in texts]
    if not train or not heldout:
        raise InputError(
            f"--dataset {dataset}: got {len(train)} prompts to train on and {len(heldout)} to hold out, expected "
            "at least 2 different prompts, or some in each split"
        )
    return Prompts(train, heldout, truncated)


def check_dataset(dataset: str) -> None:
    """Refuses a file or folder that is not there, before any work."""
    if (Path(dataset).suffix == ".jsonl" or looks_like_path(dataset)) and not Path(dataset).exists():
        raise InputError(f"--dataset: got {dataset!r}, expected an existing .jsonl file, a folder or a hub name")


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
        # At "\n" only: str.splitlines would also split at U+2028 and the like, which JSON allows inside a text.
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"--dataset {path}: {error.strerror}, expected a .jsonl file") from None
    kind = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--dataset {path}, line {number}"
        try:
            record = _checked(json.loads(line), where)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{where}: {error}, expected JSON in UTF-8") from None
        (name,) = record.keys() & {"prompt", "messages"}
        if name != (kind := kind or name):
            raise InputError(f'{where}: got "{name}" after lines with "{kind}", expected one kind')
        yield record


def _read_with_datasets(dataset: str) -> dict[str, list[Any]]:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"--dataset {dataset}: neither a .jsonl file nor a folder with train.jsonl; anything else is read by the "
            'datasets library: pip install "klq_fast[hub]"'
        ) from None
    try:
        loaded = datasets.load_dataset(dataset)
    except Exception as error:  # the library raises a dozen kinds for a dataset that is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--dataset {dataset}: could not be loaded: {reason}") from None
    names = {"train": ("train",), "test": ("validation", "test")}
    splits = {}
    for split, candidates in names.items():
        for name in candidates:
            if name in loaded and split not in splits:
                splits[split] = [
                    _checked(r, f"--dataset {dataset}, {name}, row {i}") for i, r in enumerate(loaded[name])
                ]
    if "train" not in splits:
        raise InputError(f"--dataset {dataset}: got the splits {sorted(loaded)}, expected train")
    return splits


def _checked(record: Any, where: str) -> dict[str, Any]:
    keys = sorted(record) if isinstance(record, dict) else type(record).__name__
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise InputError(f'{where}: got {keys}, expected either "prompt" or "messages"')
    if "prompt" in record:
        if not isinstance(record["prompt"], str):
            raise InputError(f"{where}: prompt: got {type(record['prompt']).__name__}, expected text")
        if not record["prompt"].strip():
            raise InputError(f"{where}: prompt: got an empty text, expected some words")
        texts = [record["prompt"]]
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
        record = {"messages": messages}
        texts = [m["content"] for m in messages]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape and no tokenizer reads
        raise InputError(f"{where}: {error}") from None
    return record


def _tokenize(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Prompt], int]:
    chats = [record.get("messages") for record in records]
    is_chat = bool(chats) and chats[0] is not None
    texts = [render(chat, tokenizer) if chat else record["prompt"] for chat, record in zip(chats, records, strict=True)]
    # A chat template writes its own special tokens.
    encoded = tokenizer(texts, add_special_tokens=not is_chat)["input_ids"] if texts else []
    prompts, truncated = [], 0
    for text, tokens, chat in zip(texts, encoded, chats, strict=True):
        if len(tokens) > limit:
            truncated += 1
            text, tokens = _truncate(text, tokenizer, limit, add_special_tokens=not is_chat)
        if not tokens:
            raise InputError(f"--dataset: the prompt {text[:80]!r} has no tokens")
        prompts.append(Prompt(text, tokens, chat))
    return prompts, truncated


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the policy reads it, up to where the answer starts."""
    if tokenizer.chat_template is None:
        raise InputError("--dataset: it holds chat messages, but the policy's tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:  # such as a template that knows no system role
        raise InputError(f"--dataset: the policy's chat template refuses {str(messages)[:200]}: {error}") from None


def _truncate(
    text: str, tokenizer: PreTrainedTokenizerBase, limit: int, add_special_tokens: bool
) -> tuple[str, list[int]]:
    """Keeps the last line (TL;DR's cue for the answer) and drops lines before it from the end until the rest fits, as
    the TL;DR task does with a post; where one line is left before it, that line's end; of a single line, its start."""

    def tokenize(shorter: str) -> list[int]:
        return tokenizer(shorter, add_special_tokens=add_special_tokens)["input_ids"]

    # A longer text has more tokens, so each cut is found by bisection: a prompt may have thousands of lines.
    body = text[: text.rstrip("\n").rfind("\n") + 1].rstrip("\n")
    cue = text[len(body) :]
    line_ends = [i for i, character in enumerate(body) if character == "\n" and i > 0]
    for ends in (line_ends, range(len(body))):
        fitting = bisect_right(ends, limit, key=lambda end: len(tokenize(body[:end] + cue)))
        if fitting and ends[fitting - 1] > 0:
            shorter = body[: ends[fitting - 1]] + cue
            return shorter, tokenize(shorter)
    start = bisect_left(range(len(cue)), -limit, key=lambda start: -len(tokenize(cue[start:])))
    return cue[start:], tokenize(cue[start:])
