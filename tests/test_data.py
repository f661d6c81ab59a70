"""Prompts: what is read, what is refused and where it stands, how a long one is cut, and in which order they come."""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from klq_fast.config import InputError
from klq_fast.data import Prompt, Prompts, load_prompts


@pytest.fixture(autouse=True)
def _cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.byte_tokenizer(eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a beginning-of-sequence token that the tokenizer writes before a text, as Llama's does."""
    tokenizer = tiny.byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def load(path: Path, tokenizer: PreTrainedTokenizerBase, *, prompt_length: int = 64, eval_prompts: int = 4) -> Prompts:
    return load_prompts(str(path), tokenizer, prompt_length, eval_prompts)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def everything(prompts: Prompts) -> list[str]:
    return sorted(texts(prompts.train + prompts.heldout))


def numbered(count: int, name: str = "prompt") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}"} for i in range(count)]


def cut(text: str, limit: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Prompt:
    """The text as it comes out of a dataset, with a token a byte."""
    path = tiny.write_jsonl(tmp_path / "cut.jsonl", [{"prompt": text}, {"prompt": "\x01"}])
    prompts = load(path, tokenizer, prompt_length=limit)
    (prompt,) = (p for p in prompts.train + prompts.heldout if p.text != "\x01")
    assert prompts.truncated == 1
    assert prompt.tokens == tokenizer(prompt.text)["input_ids"]
    assert len(prompt.tokens) <= limit
    return prompt


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


# What is read.


def test_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [*numbered(20), {"prompt": "ünï\u2028co\u0085de\x0b 🙂 \n and spaces ", "more": [1]}]
    prompts = load(tiny.write_jsonl(tmp_path / "prompts.jsonl", records), tokenizer)
    assert everything(prompts) == sorted(record["prompt"] for record in records)
    assert prompts.truncated == 0
    for prompt in prompts.train + prompts.heldout:
        assert prompt.messages is None
        assert tokenizer.decode(prompt.tokens) == prompt.text


def test_lines_end_at_a_newline_and_nowhere_else(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """JSON may hold U+2028, U+0085 and the like unescaped; Windows ends lines with \\r\\n; some editors write a BOM."""
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"a{c}b"}, ensure_ascii=False) for c in "\u2028\u2029\u0085\x7f"]
    path.write_bytes(("\ufeff" + "\r\n".join([lines[0], "", "  ", *lines[1:]])).encode())
    assert everything(load(path, tokenizer)) == sorted(f"a{c}b" for c in "\u2028\u2029\u0085\x7f")


def test_chats(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat is rendered up to where the answer starts; an answer that is already there is the policy's to give."""
    asked = [chat(f"question {i}") for i in range(6)] + [chat("one", "two", "three")]
    answered = [*asked[0], {"role": "assistant", "content": "SECRET"}]
    records = [{"messages": messages} for messages in (answered, *asked[1:])]
    prompts = load(tiny.write_jsonl(tmp_path / "chats.jsonl", records), chat_tokenizer)
    found = {prompt.text: prompt for prompt in prompts.train + prompts.heldout}
    assert sorted(str(prompt.messages) for prompt in found.values()) == sorted(map(str, asked))
    for prompt in found.values():
        assert prompt.messages is not None
        expected = "".join(f"<|{m['role']}|>{m['content']}\n" for m in prompt.messages) + "<|assistant|>"
        assert prompt.text == expected
        # The template writes the special tokens that it wants; the tokenizer adds none.
        assert prompt.tokens == chat_tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert prompt.tokens[0] != chat_tokenizer.bos_token_id
    assert "<|user|>one\n<|assistant|>two\n<|user|>three\n<|assistant|>" in found


def test_a_folder_with_both_splits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", numbered(30, "train"))
    tiny.write_jsonl(tmp_path / "test.jsonl", numbered(9, "test"))
    prompts = load(tmp_path, tokenizer)
    assert texts(prompts.train) == [f"train {i}" for i in range(30)]
    assert texts(prompts.heldout) == [f"test {i}" for i in range(4)]


def test_a_folder_with_train_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", numbered(30))
    prompts = load(tmp_path, tokenizer)
    assert (len(prompts.train), len(prompts.heldout)) == (27, 3)


def test_the_datasets_library(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Folders of parquet files and of `DatasetDict.save_to_disk`, with text and with chats."""
    splits = {"train": numbered(12, "train"), "validation": numbered(3, "validation"), "test": numbered(3, "test")}
    DatasetDict({k: Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(tmp_path / "text")
    prompts = load(tmp_path / "text", tokenizer)
    assert texts(prompts.train) == [record["prompt"] for record in splits["train"]]
    assert sorted(texts(prompts.heldout)) == [record["prompt"] for record in splits["validation"]]
    (tmp_path / "chats").mkdir()
    records = [{"messages": chat(f"question {i}")} for i in range(12)]
    Dataset.from_list(records).to_parquet(tmp_path / "chats" / "data.parquet")
    prompts = load(tmp_path / "chats", chat_tokenizer)
    assert (len(prompts.train), len(prompts.heldout)) == (11, 1)
    assert sorted(str(p.messages) for p in prompts.train + prompts.heldout) == sorted(
        str(record["messages"]) for record in records
    )


def test_bad_rows_of_the_datasets_library(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]).to_parquet(tmp_path / "data" / "data.parquet")
    with pytest.raises(InputError, match=r"data, train, row 1: prompt: got an empty text"):
        load(tmp_path / "data", tokenizer)
    DatasetDict({"validation": Dataset.from_list(numbered(3))}).save_to_disk(tmp_path / "dev")
    with pytest.raises(InputError, match=r"dev: got the splits \['validation'\], expected train"):
        load(tmp_path / "dev", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"dataset .*empty: could not be loaded"):
        load(tmp_path / "empty", tokenizer)


# What is refused.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "expected JSON"),
        ("prompt", "expected JSON"),
        ('{"prompt": "a\tb"}', "expected JSON"),  # JSON has no bare control characters
        ("NaN", 'got float, expected either "prompt" or "messages", or else a dialogue "chosen" or a "text"'),
        ('["a"]', "got list"),
        ("null", "got NoneType"),
        ("{}", r"got \[\]"),
        ('{"texts": "a"}', r"got \['texts'\]"),
        ('{"text": "a"}', 'got "text" after lines with "prompt"'),
        ('{"chosen": ["a"]}', "chosen: got list, expected text"),
        ('{"chosen": "Human: a\\n\\n Assistant: b"}', "chosen: got 'Human: a.*, expected a dialogue"),
        ('{"prompt": "a", "messages": []}', "expected either"),
        ('{"prompt": null}', "prompt: got NoneType, expected text"),
        ('{"prompt": ["a"]}', "prompt: got list, expected text"),
        ('{"prompt": ""}', "prompt: got an empty text"),
        ('{"prompt": " \\n\\t"}', "prompt: got an empty text"),
        ('{"prompt": "half \\ud83d of a pair"}', "surrogates"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'got "messages" after lines with "prompt"'),
        ("[" * 100_000, "expected JSON"),
    ],
)
def test_bad_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, line: str, said: str) -> None:
    """The error gives file and line, blank lines counted."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n\n' + line + '\n{"prompt": "good too"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=rf"prompts\.jsonl, line 3: .*{said}"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    "messages",
    [
        "[]",
        "null",
        '"hello"',
        '{"role": "user", "content": "a"}',
        '["hello"]',
        '[{"role": "user"}]',
        '[{"content": "a"}]',
        '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": ["a"]}]',
        '[{"role": 1, "content": "a"}]',
        '[{"role": "user", "content": " "}]',
        '[{"role": "assistant", "content": "a"}]',
        '[{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]',
    ],
)
def test_bad_chats(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, messages: str) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": chat("good")})
    path.write_text(f'{good}\n{{"messages": {messages}}}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"chats\.jsonl, line 2: messages: expected a list of "):
        load(path, chat_tokenizer)


def test_bytes_that_are_no_utf8(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 2: .*utf-8"):
        load(path, tokenizer)


def test_too_few_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """None, one, the same one twice, or a split without any."""
    for records in ([], numbered(1), numbered(1) * 5):
        with pytest.raises(InputError, match=r"few\.jsonl: got 0 prompts to train on"):
            load(tiny.write_jsonl(tmp_path / "few.jsonl", records), tokenizer)
    prompts = load(tiny.write_jsonl(tmp_path / "few.jsonl", numbered(2)), tokenizer)
    assert (len(prompts.train), len(prompts.heldout)) == (1, 1)
    tiny.write_jsonl(tmp_path / "train.jsonl", numbered(3))
    tiny.write_jsonl(tmp_path / "test.jsonl", [])
    with pytest.raises(InputError, match="got 3 prompts to train on and 0 to hold out"):
        load(tmp_path, tokenizer)


def test_datasets_that_are_not_there(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        load(tmp_path / "none.jsonl", tokenizer)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"folder\.jsonl: Is a directory"):
        load(tmp_path / "folder.jsonl", tokenizer)
    with pytest.raises(InputError, match=r"dataset .*/none: could not be loaded"):
        load(tmp_path / "none", tokenizer)


def test_chats_need_a_template_that_takes_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tiny.write_jsonl(tmp_path / "chats.jsonl", ({"messages": chat(f"hello {i}")} for i in range(3)))
    with pytest.raises(InputError, match="no chat template"):
        load(path, tokenizer)
    strict = tiny.byte_tokenizer(eos_token="</s>")
    strict.chat_template = "{{ raise_exception('only sevens, please') }}"
    with pytest.raises(InputError, match=r"hello 0.*only sevens, please"):
        load(path, strict)


# How a long prompt is cut (a token a byte).


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (34, "TITLE: a\nfirst\nsecond\nthird\nTL;DR:"),
        (33, "TITLE: a\nfirst\nsecond\nTL;DR:"),
        (28, "TITLE: a\nfirst\nsecond\nTL;DR:"),
        (27, "TITLE: a\nfirst\nTL;DR:"),
        (21, "TITLE: a\nfirst\nTL;DR:"),
        (20, "TITLE: a\nTL;DR:"),
        (15, "TITLE: a\nTL;DR:"),
        (14, "TITLE: \nTL;DR:"),  # no line break is left: the line itself is cut
        (8, "T\nTL;DR:"),
        (7, "\nTL;DR:"),
        (6, "TL;DR:"),
        (5, "L;DR:"),  # the end of the text is what an answer follows
        (1, ":"),
    ],
)
def test_cut_at_the_last_line_breaks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, limit: int, expected: str
) -> None:
    text = "TITLE: a\nfirst\nsecond\nthird\nTL;DR:"
    if limit == len(text):
        path = tiny.write_jsonl(tmp_path / "whole.jsonl", [{"prompt": text}, {"prompt": "short"}])
        assert text in everything(load(path, tokenizer, prompt_length=limit))
    else:
        assert cut(text, limit, tokenizer, tmp_path).text == expected


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("abcdefghij", 4, "ghij"),  # a single line: its end
        ("abcdefghij\n", 4, "hij\n"),
        ("abcdefghij\n\n\n", 5, "ij\n\n\n"),
        ("\nabcdefghij", 4, "ghij"),
        ("a\n\n\nb\n\nQ:\n", 8, "a\n\n\n\nQ:\n"),  # the blank lines before the cue belong to it
        ("a\n\n\n\n\nb\nQ:", 8, "a\n\n\n\n\nQ:"),
        ("one long paragraph\n\nQ:", 10, "one lo\n\nQ:"),  # a line and a cue: the line's start and the cue
        ("éééé\nQ:", 8, "éé\nQ:"),  # two bytes each, and none is halved
        ("éééé", 5, "éé"),
        ("🙂🙂", 5, "🙂"),
    ],
)
def test_cuts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, text: str, limit: int, expected: str) -> None:
    assert cut(text, limit, tokenizer, tmp_path).text == expected


@pytest.mark.parametrize(
    "post", ["one\ntwo\n\nthree, longer\nfour", "no line break in it", "ä\n\n\nö\n", "a TITLE: b\nTL;DR: c"]
)
def test_of_a_tldr_prompt_the_post_is_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, post: str) -> None:
    """To every length: at its last line break until it fits, by a character where there is none (Stiennon et al.)."""
    head, cue = "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: ", "\n\nTL;DR:"
    whole = len(f"{head}{post}{cue}".encode())
    for limit in range(len(head + cue) + 2, whole):
        left = post
        while len(f"{head}{left}{cue}".encode()) > limit:
            left = left[: left.rindex("\n") if "\n" in left else -1]
        assert cut(f"{head}{post}{cue}", limit, tokenizer, tmp_path).text == f"{head}{left}{cue}"


TURNS = [
    "\n\nHuman: First?\n\nAssistant: One",  # 31
    "\n\nHuman: Second?\n\nAssistant: Two",  # 32
    "\n\nHuman: Third?\n\nAssistant:",  # 27
]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (90, "".join(TURNS)),
        (89, "".join(TURNS[1:])),
        (59, "".join(TURNS[1:])),
        (58, TURNS[2]),
        (27, TURNS[2]),
        (26, "\nHuman: Third?\n\nAssistant:"),  # no turn fits: the question's beginning goes
        (13, "?\n\nAssistant:"),
    ],
)
def test_a_long_dialogue_loses_its_first_turns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, limit: int, expected: str
) -> None:
    """Whole ones, and never the cue for the answer; the chosen answer is none of the prompt."""
    dialogues = ["".join(TURNS) + " The answer.", "\n\nHuman:\n\nAssistant: ok"]
    path = tiny.write_jsonl(tmp_path / "hh.jsonl", [{"chosen": text, "rejected": ""} for text in dialogues])
    prompts = load(path, tokenizer, prompt_length=limit)
    assert expected in everything(prompts)
    assert all(len(prompt.tokens) <= limit for prompt in prompts.train + prompts.heldout)
    assert prompts.truncated == (limit < 90) + (limit < 20)


@pytest.mark.parametrize(
    ("limit", "expected"), [(15, "A café, 🙂!"), (14, "A café, 🙂"), (13, "A café, "), (10, "A café, "), (7, "A caf")]
)
def test_a_text_to_be_continued_keeps_its_beginning(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, limit: int, expected: str
) -> None:
    """Whole characters of it, é of two bytes and 🙂 of four, behind the beginning-of-sequence token."""
    texts = [{"text": "A café, 🙂!", "label": 1}, {"text": "B", "label": 0}]
    prompts = load(tiny.write_jsonl(tmp_path / "texts.jsonl", texts), chat_tokenizer, prompt_length=limit)
    (prompt,) = (p for p in prompts.train + prompts.heldout if p.text != "B")
    assert prompt.text == expected
    assert prompt.tokens == chat_tokenizer(expected)["input_ids"] and prompt.tokens[0] == chat_tokenizer.bos_token_id
    assert prompts.truncated == (limit < 15)


def test_a_cut_text_keeps_its_first_special_token(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("abcdefghij", "abc\ndef\nQ:", "abcdefghij\nQ:"):
        prompt = cut(text, 6, chat_tokenizer, tmp_path)
        assert prompt.tokens[0] == chat_tokenizer.bos_token_id
        assert prompt.tokens.count(chat_tokenizer.bos_token_id) == 1
        assert chat_tokenizer.bos_token not in prompt.text


def test_a_long_chat_keeps_the_start_of_the_answer(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    records = [{"messages": chat("line one\nline two is long")}, {"messages": chat("b")}]
    prompts = load(tiny.write_jsonl(tmp_path / "chats.jsonl", records), chat_tokenizer, prompt_length=35)
    assert "<|user|>line one\n<|assistant|>" in everything(prompts)
    assert prompts.truncated == 1


def test_cuts_are_counted_in_both_splits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", ({"prompt": "x" * i} for i in range(1, 21)))
    tiny.write_jsonl(tmp_path / "test.jsonl", ({"prompt": "y" * i} for i in range(1, 21)))
    assert load(tmp_path, tokenizer, prompt_length=10, eval_prompts=15).truncated == 10 + 5
    assert load(tmp_path, tokenizer, prompt_length=20, eval_prompts=15).truncated == 0


def test_a_prompt_of_many_lines_is_cut_quickly(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Trying every line end in turn takes 14 s at 2000 lines; blank lines once cost their number cubed."""
    started = time.perf_counter()
    lines = "\n".join(f"line {i}" for i in range(4000))
    assert cut(lines + "\nQ:", 30, tokenizer, tmp_path).text == "line 0\nline 1\nline 2\nline 3\nQ:"
    cut("x" * 30 + "\n" * 4000 + "y\nQ:", 20, tokenizer, tmp_path)
    assert time.perf_counter() - started < 5


# Held out, and in order.


def test_a_sorted_test_split_is_held_out_in_part_of_each(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """IMDb's begins with all of its bad reviews; which ones are held out is the same in every run."""
    (tmp_path / "imdb").mkdir()
    reviews = [{"text": f"{('bad', 'good')[i // 50]} {i}", "label": i // 50} for i in range(100)]
    Dataset.from_list(reviews[:2]).to_parquet(tmp_path / "imdb" / "train.parquet")
    Dataset.from_list(reviews).to_parquet(tmp_path / "imdb" / "test.parquet")
    heldout = texts(load(tmp_path / "imdb", tokenizer, eval_prompts=20).heldout)
    assert len(heldout) == 20 and 5 <= sum(text.startswith("bad") for text in heldout) <= 15
    assert heldout == texts(load(tmp_path / "imdb", tokenizer, eval_prompts=20).heldout)


def test_what_is_held_out_is_not_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A prompt of both splits, such as a review's first words."""
    tiny.write_jsonl(tmp_path / "train.jsonl", numbered(5))
    tiny.write_jsonl(tmp_path / "test.jsonl", numbered(9)[3:])
    prompts = load(tmp_path, tokenizer)
    assert texts(prompts.train) == ["prompt 0", "prompt 1", "prompt 2"]
    assert texts(prompts.heldout) == [f"prompt {i}" for i in range(3, 7)]


def test_held_out_prompts_are_others(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A tenth, at most `eval_prompts`, spread over the file; a prompt that stands there twice is in one part only."""
    records = numbered(100) + numbered(50)
    path = tiny.write_jsonl(tmp_path / "prompts.jsonl", records)
    for eval_prompts, count in ((4, 4), (1000, 15)):
        prompts = load(path, tokenizer, eval_prompts=eval_prompts)
        assert len(prompts.heldout) == count
        assert not set(texts(prompts.train)) & set(texts(prompts.heldout))
        assert set(everything(prompts)) == {record["prompt"] for record in records}
        again = load(path, tokenizer, eval_prompts=eval_prompts)
        assert again == prompts  # nothing random is left: every seed has the same prompts held out
    assert [int(p.text.split()[1]) for p in prompts.heldout] != sorted(int(p.text.split()[1]) for p in prompts.heldout)
    few, many = (load(path, tokenizer, eval_prompts=n).heldout for n in (4, 8))
    assert many[:4] == few


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts([Prompt(str(i), [i]) for i in range(13)], [Prompt("held out", [0])], 0)


def test_every_prompt_once_per_epoch(prompts: Prompts) -> None:
    order = prompts.take(7, 0, 13 * 4)
    epochs = [texts(order[start : start + 13]) for start in range(0, 52, 13)]
    assert all(sorted(epoch) == sorted(texts(prompts.train)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert texts(prompts.train) not in epochs


def test_order_depends_on_seed_and_episode_alone(prompts: Prompts) -> None:
    order = prompts.take(7, 0, 60)
    for size in (1, 5, 13, 17, 60):
        taken = [p for first in range(0, 60, size) for p in prompts.take(7, first, min(size, 60 - first))]
        assert taken == order
    assert prompts.take(7, 41, 3) == order[41:44]
    assert prompts.take(8, 0, 60) != order
    assert prompts.take(7, 10**9, 2) == prompts.take(7, 10**9, 3)[:2]
    assert prompts.take(2**64 - 1, 0, 13) != prompts.take(0, 0, 13)
