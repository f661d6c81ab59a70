"""The demo's ingredients, each made once and kept in a cache folder: prompts, policy, reward model."""

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tokenizers
import torch
import transformers
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from .pairs import Pair, Pairs, collect, stdlib_sources
from .policy import train_policy, train_tokenizer
from .reward_model import train_reward_model

Item = TypeVar("Item")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes chosen so that the whole preparation takes about 90 s of one CPU core."""

    seed: int = 0
    pairs: int | None = None  # use only the first so many training and held-out pairs
    vocab_size: int = 3072  # most words whole: with 1024 the samples are full of words that do not exist
    hidden_size: int = 96
    layers: int = 2
    heads: int = 4
    policy_steps: int = 350
    reader_steps: int = 550  # of the language model that becomes the reward model: it must know more than the policy
    policy_rows: int = 24  # pairs per optimizer step
    policy_learning_rate: float = 6e-3
    general_share: float = 0.65  # of the steps, on all docstring sentences; the rest on the pairs alone
    prompt_weight: float = 0.3  # of the signature's tokens in the loss
    reward_steps: int = 420
    relevance_share: float = 0.4  # of those steps, before the spoilt responses come in
    reward_rows: int = 8  # prompts per optimizer step, each with one human sentence and several worse ones
    reward_learning_rate: float = 5e-4
    temperature: float = 1.0  # at which the policy's samples score 0 ± 1: the one to train with
    response_length: int = 32  # tokens, with the end-of-sequence token


@dataclass(frozen=True)
class DemoPaths:
    """Where the demo's ingredients lie; the folders load with `from_pretrained`, tokenizer included."""

    policy: Path
    reward_model: Path
    dataset: Path  # a folder with train.jsonl and test.jsonl, lines of {"prompt": …}


@contextmanager
def _atomically(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes its final name only once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield unfinished
        try:
            unfinished.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _fingerprint(config: DemoConfig) -> str:
    """Changes with anything that the artefacts depend on, so that a stale cache is never reused."""
    digest = hashlib.sha256()
    versions = (sys.version, platform.machine(), torch.__version__, transformers.__version__, tokenizers.__version__)
    digest.update(repr((config, versions)).encode())
    for source in [*sorted(Path(__file__).parent.glob("*.py")), *stdlib_sources()]:
        data = source.read_bytes()
        digest.update(f"{source.name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()[:12]


def _tracker(progress: Callable[[str], None]) -> Callable[[Iterable[Item], str, int], Iterator[Item]]:
    """A bar on a terminal, else one line per stage."""

    def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        if progress is print and sys.stdout.isatty():
            from rich.progress import track as bar

            yield from bar(items, f"demo: {description}", total=total)
        else:
            progress(f"demo: {description} ({total} steps)")
            yield from items

    return track


def _write_prompts(folder: Path, pairs: Pairs) -> None:
    """train.jsonl and test.jsonl with each distinct prompt once; pairs.json keeps the human sentences."""
    for name, part in (("train", pairs.train), ("test", pairs.heldout)):
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in dict.fromkeys(pair.prompt for pair in part))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "pairs.json").write_text(json.dumps(pairs._asdict()))


def _read_pairs(folder: Path) -> Pairs:
    parts = json.loads((folder / "pairs.json").read_text())
    return Pairs(*([Pair(*pair) for pair in parts[name]] for name in Pairs._fields))


def prepare(
    cache: Path | None = None, progress: Callable[[str], None] = print, config: DemoConfig | None = None
) -> DemoPaths:
    """Make, or find in the cache, the demo's prompts, SFT policy and learned reward model.

    cache: the folder for one subfolder per version of the ingredients; default `$XDG_CACHE_HOME/klq_fast`
    or `~/.cache/klq_fast`. progress: receives the lines to show; with `print` on a terminal, bars are shown instead.
    A stage interrupted at any moment leaves nothing behind that is taken for complete; complete stages are reused.
    The same machine and versions make the same bits again. The caller's random state is left as it was.
    """
    config = config or DemoConfig()
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klq_fast"
    root = Path(cache) / f"demo-{_fingerprint(config)}"
    data, policy_folder, reward_folder = root / "data", root / "policy", root / "reward_model"
    track = _tracker(progress)

    transformers_logging.disable_progress_bar()  # they would only name files
    if not data.exists():
        progress("demo: reading signatures and docstrings from the Python standard library")
        pairs = collect()
        if config.pairs is not None:
            pairs = Pairs(*(part[: config.pairs] for part in pairs))
        with _atomically(data) as folder:
            _write_prompts(folder, pairs)
    if not policy_folder.exists():
        pairs = _read_pairs(data)
        with torch.random.fork_rng(devices=[]), _atomically(policy_folder) as folder:
            tokenizer = train_tokenizer(pairs.train, config.vocab_size)
            policy = train_policy(pairs, tokenizer, config, config.policy_steps, track, "policy")
            policy.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    if not reward_folder.exists():
        pairs = _read_pairs(data)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(policy_folder)
        policy = GPTNeoXForCausalLM.from_pretrained(policy_folder)
        with torch.random.fork_rng(devices=[]), _atomically(reward_folder) as folder:
            reader = train_policy(pairs, tokenizer, config, config.reader_steps, track, "reward model")
            reward_model = train_reward_model(pairs, policy, reader, tokenizer, config, track)
            reward_model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        progress(f"demo: ready in {root}")
    return DemoPaths(policy_folder, reward_folder, data)
