"""(function signature → first docstring sentence) pairs from the Python standard library: real text on every machine."""

import ast
import hashlib
import re
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

# Folders whose docstrings are not about the functions they document, or that belong to other packages.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
PROMPT_CHARACTERS = 70
SENTENCE_CHARACTERS = (15, 90)
HELD_OUT = 0.08  # share of the groups of related functions
LARGEST_HELD_OUT_GROUP = 8  # `def close(self):` and its like tie hundreds of pairs together: those stay in training


class Pair(NamedTuple):
    prompt: str  # "def name(arguments):"
    sentence: str  # " Return the name." with the leading space that begins a response


class Pairs(NamedTuple):
    train: list[Pair]
    heldout: list[Pair]


def stdlib_sources() -> list[Path]:
    """The standard library's Python files, in one order on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = (path for path in root.rglob("*.py") if not SKIPPED.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def first_sentence(docstring: str) -> str | None:
    """The docstring's first sentence on one line, or None where it is no plain English sentence of useful length."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    if paragraph[-1:].isalnum():  # a one-line docstring without its full stop
        paragraph += "."
    match = re.match(r"[A-Z][a-z].*?(?<!e\.g)(?<!i\.e)(?<!vs)\.(?=\s|$)", paragraph)
    if match is None:
        return None
    sentence = match.group()
    shortest, longest = SENTENCE_CHARACTERS
    words = re.findall(r"[A-Za-z']+", sentence)
    prose = sum(map(len, words)) + sentence.count(" ")
    if not (shortest <= len(sentence) <= longest and sentence.isascii() and len(words) >= 3):
        return None
    return sentence if prose >= 0.85 * len(sentence) else None


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"def {function.name}({ast.unparse(function.args)}):"


def pairs_of(source: bytes) -> list[Pair]:
    """Every pair of one file, in the file's order; a file that this interpreter cannot parse has none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # sources kept for other Python versions
        return []
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            sentence = first_sentence(docstring)
            if sentence is not None and len(prompt := _signature(node)) <= PROMPT_CHARACTERS:
                pairs.append(Pair(prompt, " " + sentence))
    return pairs


def _split(pairs: list[Pair]) -> Pairs:
    """Held-out pairs share neither a signature nor a sentence (up to case, digits and punctuation) with training."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for prompt, sentence in pairs:
        parent[find(prompt)] = find(re.sub(r"[^a-z]+", " ", sentence.lower()))
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[find(pair.prompt)].append(pair)
    train, heldout = [], []
    for group in groups.values():
        digest = hashlib.sha256(group[0].prompt.encode()).digest()
        drawn = int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32
        (heldout if drawn and len(group) <= LARGEST_HELD_OUT_GROUP else train).extend(group)
    return Pairs(train, heldout)


def collect() -> Pairs:
    """About 5,000 distinct pairs, split by function; the same interpreter gives the same lists in the same order."""
    distinct = dict.fromkeys(pair for path in stdlib_sources() for pair in pairs_of(path.read_bytes()))
    return _split(list(distinct))
