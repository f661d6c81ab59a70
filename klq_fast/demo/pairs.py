"""(function signature → first docstring sentence) pairs from the Python standard library's sources."""

import ast
import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Folders whose docstrings are not about the functions they document, or that belong to other packages.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
PROMPT_CHARACTERS = 80
SENTENCE_CHARACTERS = (15, 100)
HELD_OUT = 0.08  # share of the groups of related functions
LARGEST_HELD_OUT_GROUP = 8  # `def close(self):` and its like tie hundreds of pairs together: those stay in training


class Pair(NamedTuple):
    prompt: str  # "def name(arguments):"
    sentence: str  # " Return the name." with the leading space that begins a response


class Pairs(NamedTuple):
    train: list[Pair]
    heldout: list[Pair]
    more: list[Pair]  # later sentences of the same docstrings, and those of classes and modules: text to learn from


def stdlib_sources() -> list[Path]:
    """The standard library's Python files, in one order on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def sentences(paragraph: str) -> Iterator[str]:
    """Each plain English sentence of useful length, on one line, with the space before it that begins a response."""
    text = " ".join(paragraph.split())
    if text[-1:].isalnum():  # a one-line docstring without its full stop
        text += "."
    shortest, longest = SENTENCE_CHARACTERS
    for sentence in re.split(r"(?<=[.!?:])(?<!e\.g\.)(?<!i\.e\.)(?<!vs\.)\s", text):
        # Letters, digits and plain punctuation: no code, table or beginning of a list.
        plain = re.fullmatch(r"[A-Z][a-z][A-Za-z0-9 ,.'_-]*\.", sentence) and sentence.count(" ") >= 2
        yield " " + sentence if plain and shortest <= len(sentence) <= longest else ""


def _heading(node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"class {node.name}:" if isinstance(node, ast.ClassDef) else ""
    for child in ast.walk(node.args):
        if isinstance(child, ast.arg):
            child.annotation = None
    return f"def {node.name}({ast.unparse(node.args)}):"


def pairs_of(source: bytes) -> tuple[list[Pair], list[Pair]]:
    """One file's pairs, and the further sentences of its docstrings; nothing of a file that does not parse here."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # sources kept for other Python versions
        return [], []
    first: list[Pair] = []
    more: list[Pair] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            continue
        docstring = ast.get_docstring(node)
        heading = _heading(node) if docstring else ""
        if not docstring or len(heading) > PROMPT_CHARACTERS:
            continue
        for index, sentence in enumerate(s for paragraph in docstring.split("\n\n") for s in sentences(paragraph)):
            if sentence:
                (first if index == 0 and heading.startswith("def ") else more).append(Pair(heading, sentence))
    return first, more


def _words(text: str) -> str:
    return re.sub(r"[^a-z]+", " ", text.lower())


def _split(pairs: list[Pair], more: list[Pair]) -> Pairs:
    """Held-out pairs share neither a signature nor a sentence (up to case, digits and punctuation) with training."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for prompt, sentence in pairs:
        parent[find(prompt)] = find(_words(sentence))
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[find(pair.prompt)].append(pair)
    train: list[Pair] = []
    heldout: list[Pair] = []
    for group in groups.values():
        digest = hashlib.sha256(group[0].prompt.encode()).digest()
        drawn = int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32
        (heldout if drawn and len(group) <= LARGEST_HELD_OUT_GROUP else train).extend(group)
    unseen = {pair.prompt for pair in heldout} | {_words(pair.sentence) for pair in heldout}
    known = set(train)
    more = [pair for pair in more if not {pair.prompt, _words(pair.sentence)} & unseen and pair not in known]
    return Pairs(train, heldout, more)


def collect() -> Pairs:
    """About 5,000 distinct pairs, split by function; the same interpreter gives the same lists in the same order."""
    files = [pairs_of(path.read_bytes()) for path in stdlib_sources()]
    first, more = (list(dict.fromkeys(pair for file in files for pair in file[part])) for part in (0, 1))
    if len(first) < 1000:
        raise RuntimeError(
            f"the demo needs the Python standard library's sources: found {len(first)} documented functions under "
            f"{sysconfig.get_path('stdlib')}, expected about 5,000; train on your own prompts with --dataset instead"
        )
    return _split(first, more)
