"""Prompts: from a .jsonl file, a folder or the datasets library, to tokens, in an order that only the seed decides.

What a record holds decides how it becomes a prompt, and how one of more than `prompt_length` tokens is cut:

    prompt     the text; lines before its last one are dropped from their end, of TL;DR's the post's alone
    messages   a chat, rendered by the policy's template up to where the answer starts; likewise
    chosen     a dialogue as Anthropic's hh-rlhf writes it, up to and with its last "\n\nAssistant:"; its first turns go
    text       the beginning of a text, to be continued: the first tokens
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .config import InputError, looks_like_path
from .hub import hub_answers, not_here

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how a turn begins in hh-rlhf
TLDR = re.compile(r"(.*?\n\nPOST: )(.*)(\n\nTL;DR:)", re.DOTALL)

Messages = list[dict[str, str]]
Tokenize = Callable[[str], list[int]]

COLUMNS = ("prompt", "messages", "chosen", "text")  # of which the first one there is taken


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
    """Reads and tokenizes a dataset. Its test split is held out, or a tenth of it, of both at most `eval_prompts`.

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
        train = [train[i] for i in sorted(order[count:])]
    if splits.get("test") != splits["train"]:  # all prompts in both is meant so, as in the arithmetic task
        # A prompt that stands in several lines is held out of all of them.
        texts = {prompt.text for prompt in heldout}
        train = [prompt for prompt in train if prompt.text not in texts]
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
    """Split name ("train", perhaps "test") to records, each with one of the four columns."""
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
        (name,) = record
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
    datasets.disable_progress_bars()  # each rank would draw its own
    silent = not Path(dataset).exists() and not looks_like_path(dataset) and not hub_answers()
    if silent:
        datasets.config.HF_HUB_OFFLINE = True  # what is in its cache still loads, without retries for 23 s
    try:
        loaded = datasets.load_dataset(dataset)
    except Exception as error:  # the library raises a dozen kinds for a dataset that is not there
        if silent:
            raise not_here("dataset", dataset) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--dataset {dataset}: could not be loaded: {reason}") from None
    splits = {}
    for split, candidates in (("train", ("train",)), ("test", ("validation", "test"))):
        name = next((name for name in candidates if name in loaded), None)
        if name is not None:
            records = loaded[name].select_columns([c for c in loaded[name].column_names if c in COLUMNS]).to_list()
            splits[split] = [_checked(r, f"--dataset {dataset}, {name}, row {i}") for i, r in enumerate(records)]
    if "train" not in splits:
        raise InputError(f"--dataset {dataset}: got the splits {sorted(loaded)}, expected train")
    if "test" in splits:
        # Not in their order, of which the first would be taken: IMDb's 12,500 bad reviews come before the good ones.
        order = np.random.default_rng(0).permutation(len(splits["test"]))
        splits["test"] = [splits["test"][i] for i in order]
    return splits


def _checked(record: Any, where: str) -> dict[str, Any]:
    """The record with one of the four columns alone, a dialogue without its answer."""
    keys = sorted(record) if isinstance(record, dict) else type(record).__name__
    named = [column for column in COLUMNS if isinstance(record, dict) and column in record]
    if not named or named[:2] == ["prompt", "messages"]:
        raise InputError(
            f'{where}: got {keys}, expected either "prompt" or "messages", or else a dialogue "chosen" or a "text"'
        )
    column = named[0]
    if column == "messages":
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
    else:
        text = record[column]
        if not isinstance(text, str):
            raise InputError(f"{where}: {column}: got {type(text).__name__}, expected text")
        if not text.strip():
            raise InputError(f"{where}: {column}: got an empty text, expected some words")
        if column == "chosen":
            end = text.rfind(ASSISTANT)
            if end < 0:
                raise InputError(f"{where}: chosen: got {text[:80]!r}, expected a dialogue with {ASSISTANT!r} in it")
            text = text[: end + len(ASSISTANT)]
        record = {column: text}
        texts = [text]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape and no tokenizer reads
        raise InputError(f"{where}: {error}") from None
    return record


def _tokenize(
    records: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[Prompt], int]:
    (column,) = records[0] if records else ("prompt",)
    is_chat = column == "messages"
    texts = [render(record[column], tokenizer) if is_chat else record[column] for record in records]

    def tokenize(text: str | list[str]) -> Any:
        return tokenizer(text, add_special_tokens=not is_chat)["input_ids"]  # a chat template writes its own

    prompts, truncated = [], 0
    for record, text, tokens in zip(records, texts, tokenize(texts) if texts else [], strict=True):
        if len(tokens) > limit:
            truncated += 1
            if column == "text":
                text, tokens = _beginning(tokens[:limit], tokenizer)
            else:
                text = (_last_turns if column == "chosen" else _without_lines)(text, tokenize, limit)
                tokens = tokenize(text)
        if not tokens:
            raise InputError(f"--dataset: the prompt {text[:80]!r} has no tokens")
        prompts.append(Prompt(text, tokens, record[column] if is_chat else None))
    return prompts, truncated


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat as the policy reads it, up to where the answer starts."""
    if tokenizer.chat_template is None:
        raise InputError("--dataset: it holds chat messages, but the policy's tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:  # such as a template that knows no system role
        raise InputError(f"--dataset: the policy's chat template refuses {str(messages)[:200]}: {error}") from None


# How a text of more than `limit` tokens is cut. A longer text has more tokens, so each cut is found by bisection.


def _without_lines(text: str, tokenize: Tokenize, limit: int) -> str:
    """Keeps the last line (TL;DR's cue for the answer) and drops lines before it from the end until the rest fits;
    where one line is left before it, that line's end; of a single line, its start. Of a TL;DR prompt it is the post
    that is cut, as in the task's first publication (Stiennon et al. 2020): at its last line break that fits."""
    body = text[: text.rstrip("\n").rfind("\n") + 1].rstrip("\n")
    parts = [("", body, text[len(body) :])]
    if post := TLDR.fullmatch(text):
        parts.insert(0, (post[1], post[2], post[3]))
    for head, body, cue in parts:
        line_ends = [i for i, character in enumerate(body) if character == "\n" and i > 0]
        for ends in (line_ends, range(len(body))):
            fitting = bisect_right(ends, limit, key=lambda end: len(tokenize(head + body[:end] + cue)))
            if fitting and ends[fitting - 1] > 0:
                return head + body[: ends[fitting - 1]] + cue
    return _end(cue, tokenize, limit)


def _last_turns(text: str, tokenize: Tokenize, limit: int) -> str:
    """Drops turns from a dialogue's beginning, up to one of the human's; of a last turn that is too long, its start."""
    turns = [match.start() for match in re.finditer(HUMAN, text)]
    first = bisect_left(turns, -limit, key=lambda start: -len(tokenize(text[start:])))
    return text[turns[first] :] if first < len(turns) else _end(text, tokenize, limit)


def _beginning(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """The tokens as they are, which the text up to there alone need not have, less those of half a character."""
    while True:
        text = str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if not text.endswith("\ufffd"):
            return text, tokens
        tokens = tokens[:-1]


def _end(text: str, tokenize: Tokenize, limit: int) -> str:
    return text[bisect_left(range(len(text)), -limit, key=lambda start: -len(tokenize(text[start:]))) :]
