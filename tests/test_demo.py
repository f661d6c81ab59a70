"""The demo's ingredients: pairs from the real standard library, and a tiny preparation from end to end."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from klq_fast.config import Config
from klq_fast.data import load_prompts
from klq_fast.demo import prepare as module
from klq_fast.demo.pairs import Pairs, collect, sentences
from klq_fast.demo.policy import sample
from klq_fast.demo.prepare import DemoConfig, DemoPaths, prepare
from klq_fast.demo.reward_model import encode, garbled, run_on, salad, score, shuffled, stuttering, truncated
from klq_fast.models import load_tokenizer
from klq_fast.presets import with_demo_models

TINY = DemoConfig(
    pairs=60,
    vocab_size=400,
    hidden_size=32,
    layers=1,
    policy_steps=30,
    policy_rows=8,
    reader_steps=4,
    reward_steps=6,
    reward_rows=2,
    response_length=12,
)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return collect()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def paths(pairs: Pairs, tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> DemoPaths:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "collect", lambda: pairs)  # collecting takes 3 s; one test does it for real
        return prepare(tmp_path_factory.mktemp("cache"), lines.append, TINY)


def test_thousands_of_distinct_pairs_of_useful_length(pairs: Pairs) -> None:
    both = pairs.train + pairs.heldout
    assert len(both) > 3000 and len(pairs.heldout) > 200
    assert len(set(both)) == len(both)
    for prompt, sentence in both:
        assert re.fullmatch(r"def \w+\(.*\):", prompt) and len(prompt) <= 80
        assert re.fullmatch(r" [A-Z].*\.", sentence) and 15 <= len(sentence) - 1 <= 100
    assert collect() == pairs


def test_no_function_and_no_sentence_crosses_into_the_held_out_split(pairs: Pairs) -> None:
    def words(text: str) -> str:
        return " ".join(re.findall("[a-z]+", text.lower()))

    seen = pairs.train + pairs.more
    assert not {pair.prompt for pair in pairs.heldout} & {pair.prompt for pair in seen}
    assert not {words(pair.sentence) for pair in pairs.heldout} & {words(pair.sentence) for pair in seen}


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("Return the\n    name. Or None.", [" Return the name.", ""]),
        ("Return the name", [" Return the name."]),  # its full stop was forgotten
        ("Return it, e.g. as bytes.", [" Return it, e.g. as bytes."]),
        (">>> f(x)", [""]),
        ("S.find(sub) -> int", [""]),
        ("Too short.", [""]),
    ],
)
def test_sentences(paragraph: str, expected: list[str]) -> None:
    assert list(sentences(paragraph)) == expected


def test_spoilt_sentences_differ_from_the_sentence() -> None:
    generator = random.Random(0)
    sentence, other = " Return the number of items in the queue.", " Close the connection to the server."
    for _ in range(200):
        cut = truncated(sentence, generator)
        assert sentence.startswith(cut) and cut != sentence
        assert len(stuttering(sentence, generator).split()) > len(sentence.split())
        assert garbled(sentence, ["qu", "zen"], generator) != sentence
        assert shuffled(sentence, generator).endswith(".")
        assert run_on(sentence, other, generator) != sentence
        assert set(salad(["the", "of"], generator)[1:-1].lower().split()) <= {"the", "of"}


def test_the_folders_load_and_the_prompts_are_a_dataset(paths: DemoPaths) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.policy)
    policy = AutoModelForCausalLM.from_pretrained(paths.policy)
    reward_model = AutoModelForSequenceClassification.from_pretrained(paths.reward_model)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert policy.config.vocab_size == len(tokenizer) and reward_model.config.num_labels == 1
    assert reward_model.config.pad_token_id == tokenizer.pad_token_id
    for file in (paths.dataset / "train.jsonl", paths.dataset / "test.jsonl"):
        prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        assert len(set(prompts)) == len(prompts) > 10
        assert tokenizer.batch_decode(tokenizer(prompts)["input_ids"]) == prompts
    # A response begins a token of its own, so that prompt and response tokenise apart as they do together.
    prompt, response = "def close(self):", " Close the file."
    together = tokenizer(prompt + response)["input_ids"]
    assert together == tokenizer(prompt)["input_ids"] + tokenizer(response)["input_ids"]


def test_the_policys_samples_score_zero_with_unit_spread_after_reloading(paths: DemoPaths) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths.policy)
    policy = AutoModelForCausalLM.from_pretrained(paths.policy).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(paths.reward_model).eval()
    prompts = 8 * [json.loads(line)["prompt"] for line in (paths.dataset / "test.jsonl").read_text().splitlines()]
    responses = sample(policy, tokenizer, prompts, TINY.temperature)
    ended = [tokenizer.eos_token_id in response for response in responses]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    rows = [encode(tokenizer, *row) for row in zip(prompts, texts, ended, strict=True)]
    with torch.no_grad():
        scores = score(reward_model, rows)
        padded = tokenizer.pad({"input_ids": rows[:32]}, return_tensors="pt", padding_side="right")
        logits = reward_model(**padded).logits[:, 0]
    torch.testing.assert_close(logits, scores[:32], rtol=1e-4, atol=1e-4)  # transformers reads the same token
    # About 450 fresh samples against the 170 that the scale was taken from: both means have a spread of 0.1 at most.
    assert abs(scores.mean()) < 0.4 and 0.7 < scores.std() < 1.4


def test_a_second_preparation_reuses_the_first(
    paths: DemoPaths, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in paths.policy.parent.rglob("*") if path.is_file()}

    before, said = files(), len(lines)
    assert said > 0
    monkeypatch.setattr(module, "train_policy", None)
    monkeypatch.setattr(module, "train_reward_model", None)
    assert prepare(paths.policy.parents[1], lines.append, TINY) == paths
    assert files() == before and len(lines) == said
    assert not list(paths.policy.parent.glob(".*"))


def test_other_settings_and_sources_have_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    name = module._fingerprint(TINY)
    assert module._fingerprint(TINY) == name
    assert module._fingerprint(dataclasses.replace(TINY, seed=1)) != name
    monkeypatch.setattr(module, "stdlib_sources", lambda: [])
    assert module._fingerprint(TINY) != name


@pytest.mark.parametrize("stage", ["train_policy", "train_reward_model", "rename"])
def test_an_interruption_leaves_nothing_that_is_taken_for_complete(
    stage: str, paths: DemoPaths, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "collect", lambda: pairs)
    state = torch.get_rng_state()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stage == "rename":  # everything is written, and the folder has not yet its name
            patch.setattr(Path, "rename", interrupted)
        else:
            patch.setattr(module, stage, interrupted)
        prepare(tmp_path, lambda line: None, TINY)
    done = {path.name for path in next(tmp_path.iterdir()).iterdir()}
    assert done == {"train_policy": {"data"}, "train_reward_model": {"data", "policy"}, "rename": set()}[stage]
    again = prepare(tmp_path, lambda line: None, TINY)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is untouched
    for mine, theirs in zip(dataclasses.astuple(again)[:2], dataclasses.astuple(paths)[:2], strict=True):
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()  # same bits


def test_the_demo_is_evaluated_on_prompts_that_nothing_was_trained_on(
    paths: DemoPaths, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "prepare", lambda: paths)
    config = with_demo_models(Config(preset="demo", policy=str(paths.policy)))
    assert config.dataset and config.reward_model == str(paths.reward_model)
    prompts = load_prompts(config.dataset, load_tokenizer("policy", str(paths.policy)), 64, 1000)
    assert {prompt.text for prompt in prompts.heldout} <= {pair.prompt for pair in pairs.heldout}
    assert not {prompt.text for prompt in prompts.heldout} & {prompt.text for prompt in prompts.train}
