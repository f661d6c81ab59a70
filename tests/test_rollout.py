"""Rollouts: samples from exactly softmax(logits / temperature), whatever the batch; lengths, log-probs and values."""

import argparse
import contextlib
import copy
import dataclasses
import json
import shutil
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from watch import watch

import klq_fast.decode
import klq_fast.rollout
from benchmarks import rollout as rollout_benchmark
from benchmarks import rollout_worker, train_step
from klq_fast.batch import Rollout
from klq_fast.data import Prompt
from klq_fast.decode import Decoder, _capturable, cache_name, next_logits, sample
from klq_fast.models import Policy, load_policy, load_reference
from klq_fast.rollout import EVAL_STREAM, TRAIN_STREAM, Generator, uniforms, with_logprobs

CPU = torch.device("cpu")
TEMPERATURE = 0.7
LENGTH = 12
FAMILIES = ("neox", "llama", "gpt2")
TEXTS = ("a", "hello, world", "one two three four five six", "?!", "a", "zz top of the")
EPISODES = (7, 3, 1000, 0, 8, 2**40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models whose weights are 16 times the usual 0.02, so that every token of the context shows in the next one."""
    folder = tmp_path_factory.mktemp("rollout")
    for make in (tiny.neox, tiny.llama, tiny.gpt2):
        path = make(folder / make.__name__)
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(16 if "embed" not in name else 4)
        model.save_pretrained(path)
    return folder


def never(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
    raise AssertionError("no reward is asked for")


def load(folder: Path, *, seed: int = 5, length: int = LENGTH) -> Generator:
    policy = load_policy(str(folder), TEMPERATURE, CPU)
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)  # a trained one: a fresh one says 0 everywhere
    return Generator(policy, AutoTokenizer.from_pretrained(folder), never, length, 1.0, seed)


def exact(folder: Path) -> Generator:
    """In fp64, where rounding cannot push a sample over the border between two tokens."""
    generator = load(folder)
    generator.policy.model.double()
    return generator


def prompts_of(generator: Generator, texts: Sequence[str] = TEXTS) -> list[Prompt]:
    tokenizer: Any = generator.tokenizer
    return [Prompt(text, tokenizer(text)["input_ids"]) for text in texts]


def responses_of(rollout: Rollout) -> list[list[int]]:
    rows = zip(rollout.response_tokens.tolist(), rollout.response_lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


@torch.no_grad()
def next_distribution(policy: Policy, tokens: list[int]) -> Tensor:
    """(V,) float64: softmax(logits / temperature) after these tokens, without padding, cache or batch."""
    logits = policy.model(input_ids=torch.tensor([tokens])).logits[0, -1]
    return (logits.double() / policy.temperature).softmax(-1)


def sample_one_by_one(generator: Generator, prompt: Prompt, numbers: Tensor, stops: set[int]) -> list[int]:
    tokens: list[int] = []
    for number in numbers.tolist():
        cumulative = next_distribution(generator.policy, prompt.tokens + tokens).cumsum(-1)
        tokens.append(int((cumulative <= number).sum()))
        if tokens[-1] in stops:
            break
    return tokens


def force(
    monkeypatch: pytest.MonkeyPatch, generator: Generator, prompts: list[Prompt], wanted: list[list[int]]
) -> None:
    """Makes the generator's uniform numbers those that choose the wanted tokens."""
    numbers = torch.full((len(prompts), generator.response_length), 0.5, dtype=torch.float64)
    for row, (prompt, tokens) in enumerate(zip(prompts, wanted, strict=True)):
        for t, token in enumerate(tokens):
            p = next_distribution(generator.policy, prompt.tokens + tokens[:t])
            assert p[token] > 1e-12  # far above fp64's rounding
            numbers[row, t] = p[:token].sum() + p[token] / 2
    monkeypatch.setattr(klq_fast.rollout, "uniforms", lambda *_: numbers)


# The sampler.


def chosen(scores: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    tokens = sample(scores, numbers, temperature)
    assert tokens.shape == numbers.shape and tokens.dtype == torch.int64
    return tokens


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_the_sampler_is_exact(temperature: float) -> None:
    """On a grid of N uniform numbers a token of probability p is chosen N·p times, within the one at each border."""
    inf = torch.inf
    scores = torch.tensor([-inf, 0.3, -2.0, -inf, -inf, 1.5, -0.2, -30.0, 0.3, -inf])
    weights = np.exp(scores.double().numpy() / temperature)
    number = 20_000
    grid = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    counts = torch.bincount(chosen(scores.expand(number, -1), grid, temperature), minlength=len(scores))
    assert np.abs(counts.numpy() - number * weights / weights.sum()).max() <= 1
    assert (counts[scores == -inf] == 0).all()


def test_the_ends_of_the_interval() -> None:
    """0 chooses the first possible token and the largest number below 1 the last one, never an impossible one."""
    generator = torch.Generator().manual_seed(1)
    for vocab in (1, 2, 5, 1000, 50_304):
        scores = 10 * torch.randn(20, vocab, generator=generator)
        possible = torch.rand(20, vocab, generator=generator) < 0.5
        possible[:, vocab // 2] = True
        scores[~possible] = -torch.inf
        first, last = possible.long().argmax(1), vocab - 1 - possible.flip(1).long().argmax(1)
        ends = torch.zeros(20, dtype=torch.float64), torch.full((20,), 1 - 2**-53, dtype=torch.float64)
        assert torch.equal(chosen(scores, ends[0], 1.0), first)
        at_the_end = chosen(scores, ends[1], 1.0)
        assert possible.gather(1, at_the_end[:, None]).all()
        # Tokens of less than 2⁻⁵³ in all may stand behind it.
        behind = torch.arange(vocab) > at_the_end[:, None]
        assert (torch.where(behind, scores.double().softmax(1), 0).sum(1) < 1e-12).all()
        assert (at_the_end <= last).all()


def test_tokens_too_unlikely_for_float64_are_never_chosen() -> None:
    scores = torch.tensor([[-1000.0, 0.0, -1000.0]])
    for number in (0.0, 0.5, 1 - 2**-53):
        assert chosen(scores, torch.tensor([number], dtype=torch.float64), 1.0).item() == 1


def test_each_row_has_its_own_number() -> None:
    numbers = torch.tensor([0.1, 0.6, 0.3, 0.0, 0.9, 0.26], dtype=torch.float64)
    assert chosen(torch.zeros(6, 4), numbers, 1.0).tolist() == [0, 2, 1, 0, 3, 1]


def test_uniform_numbers() -> None:
    """Of (seed, stream, episode) alone, whatever length and company; uniform by Kolmogorov–Smirnov at 0.1%."""
    numbers = uniforms(3, TRAIN_STREAM, range(400), 50)
    assert numbers.shape == (400, 50) and numbers.dtype == torch.float64
    assert (numbers >= 0).all() and (numbers < 1).all() and len(numbers.unique()) == 400 * 50
    ordered, size = numbers.flatten().sort().values, numbers.numel()
    grid = torch.arange(size, dtype=torch.float64) / size
    assert max((ordered - grid).abs().max(), (ordered - grid - 1 / size).abs().max()) < 1.95 / size**0.5
    # The same for what neighbours share: successive episodes, steps, seeds and streams are not correlated (4.5 σ).
    others = [numbers.roll(1, 0), numbers.roll(1, 1), uniforms(4, 0, range(400), 50), uniforms(3, 1, range(400), 50)]
    for other in others:
        assert abs(((numbers - 0.5) * (other - 0.5)).mean() * 12) < 4.5 / size**0.5
    assert torch.equal(uniforms(3, TRAIN_STREAM, [17, 5], 20), numbers[[17, 5], :20])
    # Every bit of a seed counts: rounded to float64, these two would be one.
    assert (uniforms(2**64 - 1, EVAL_STREAM, [2**40], 5) != uniforms(2**64 - 2, EVAL_STREAM, [2**40], 5)).all()


# Responses.


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_are_exact_samples(folder: Path, family: str) -> None:
    """Batched, left-padded and cached generation gives what a loop of single forward passes gives."""
    generator = exact(folder / family)
    prompts = prompts_of(generator)
    rollout = generator.respond(prompts, EPISODES, TRAIN_STREAM)
    stop: Any = generator.tokenizer.eos_token_id
    numbers = uniforms(generator.seed, TRAIN_STREAM, EPISODES, LENGTH)
    expected = [sample_one_by_one(generator, p, n, {stop}) for p, n in zip(prompts, numbers, strict=True)]
    assert responses_of(rollout) == expected
    assert expected[0] != expected[4]  # the same prompt, another episode
    assert len({token for row in expected for token in row}) > 20  # far from one token always


@pytest.mark.parametrize("family", FAMILIES)
def test_responses_do_not_depend_on_the_batch(folder: Path, family: str) -> None:
    generator = load(folder / family)
    prompts = prompts_of(generator)
    together = responses_of(generator.respond(prompts, EPISODES, TRAIN_STREAM))
    order = [4, 2, 0, 5, 1, 3]
    shuffled = generator.respond([prompts[i] for i in order], [EPISODES[i] for i in order], TRAIN_STREAM)
    assert responses_of(shuffled) == [together[i] for i in order]
    for i, episode in enumerate(EPISODES):
        assert responses_of(generator.respond([prompts[i]], [episode], TRAIN_STREAM)) == [together[i]]
    part = generator.respond(prompts[:2], EPISODES[:2], TRAIN_STREAM)
    assert responses_of(part) == together[:2]


def test_responses_depend_on_seed_episode_and_stream(folder: Path) -> None:
    generator = load(folder / "neox")
    prompts = prompts_of(generator, ["hello"] * 3)
    base = responses_of(generator.respond(prompts, [0, 1, 2], TRAIN_STREAM))
    assert responses_of(generator.respond(prompts, [0, 1, 2], TRAIN_STREAM)) == base
    assert len({tuple(row) for row in base}) == 3
    others = [
        generator.respond(prompts, [3, 4, 5], TRAIN_STREAM),
        generator.respond(prompts, [0, 1, 2], EVAL_STREAM),
        dataclasses.replace(generator, seed=6).respond(prompts, [0, 1, 2], TRAIN_STREAM),
    ]
    for other in others:
        assert all(a != b for a, b in zip(base, responses_of(other), strict=True))
    torch.manual_seed(123)  # nor on torch's own random state
    torch.rand(5)
    assert responses_of(generator.respond(prompts, [0, 1, 2], TRAIN_STREAM)) == base
    short = load(folder / "neox", length=5).respond(prompts, [0, 1, 2], TRAIN_STREAM)
    assert responses_of(short) == [row[:5] for row in base]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_saved_generation_settings_do_not_leak(folder: Path, tmp_path: Path, where: str) -> None:
    """A model folder may ask for top-k, penalties, beams or another temperature: the samples stay those of π."""
    plain = exact(folder / "neox")
    expected = responses_of(plain.respond(prompts_of(plain), EPISODES, TRAIN_STREAM))
    changed = Path(shutil.copytree(folder / "neox", tmp_path / "changed"))
    leaks: dict[str, Any] = {
        "do_sample": True,
        "top_k": 1,
        "top_p": 0.1,
        "temperature": 0.01,
        "repetition_penalty": 5.0,
    }
    leaks |= {
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 12,
        "max_length": 3,
        "num_beams": 3,
        "num_return_sequences": 2,
    }
    leaks |= {"suppress_tokens": [5, 6, 7], "begin_suppress_tokens": list(range(100)), "eos_token_id": 0}
    path = changed / where
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | leaks))
    if where == "config.json":
        (changed / "generation_config.json").unlink(missing_ok=True)
    generator = exact(changed)
    assert responses_of(generator.respond(prompts_of(generator), EPISODES, TRAIN_STREAM)) == expected
    generator.policy.save(tmp_path / "saved", generator.tokenizer)  # and they are still there for who uses the model
    if where == "generation_config.json":
        assert json.loads((tmp_path / "saved" / where).read_text())["repetition_penalty"] == 5.0


def test_stop_tokens_of_the_generation_config_end_a_response_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 3's <|eot_id|>, which its tokenizer does not call the end of a sequence."""
    changed = Path(shutil.copytree(folder / "llama", tmp_path / "changed"))
    (changed / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 100]}))
    generator = exact(changed)
    prompts = prompts_of(generator, ["a", "bcd", "ef"])
    wanted = [[50, 100, 60], [60, 50, 1], [40] * LENGTH]
    force(monkeypatch, generator, prompts, wanted)
    rollout = generator.respond(prompts, [0, 1, 2], TRAIN_STREAM)
    assert responses_of(rollout) == [[50, 100], [60, 50, 1], [40] * LENGTH]
    assert rollout.ended.tolist() == [True, True, False]
    tokenizer: Any = generator.tokenizer
    # The token that ends a response is not part of its text, special or not.
    assert generator.texts(rollout) == [tokenizer.decode(tokens) for tokens in ([50], [60, 50], [40] * LENGTH)]


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_carried(folder: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """With [PAD] sampled on the way and at the end (NeoX), and with the end of sequence as padding (Llama, GPT-2)."""
    generator = exact(folder / family)
    tokenizer: Any = generator.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id if family == "neox" else 9
    prompts = prompts_of(generator)
    wanted = [
        [end],
        [pad, 20, pad, end],
        [20, 21, *[pad] * (LENGTH - 2)],
        [pad] * LENGTH,
        [30] * (LENGTH - 1) + [end],
        [pad, end],
    ]
    force(monkeypatch, generator, prompts, wanted)
    rollout = generator.respond(prompts, range(6), TRAIN_STREAM)
    assert responses_of(rollout) == wanted
    assert rollout.response_lengths.tolist() == [1, 4, LENGTH, LENGTH, LENGTH, 2]
    assert rollout.ended.tolist() == [True, True, False, False, True, True]
    assert rollout.mask.sum(1).tolist() == rollout.response_lengths.tolist()
    assert rollout.num_tokens == sum(rollout.response_lengths)
    assert rollout.prompt_lengths.tolist() == [len(prompt.tokens) for prompt in prompts]
    for row, prompt in zip(rollout.prompt_tokens, prompts, strict=True):
        assert row[len(row) - len(prompt.tokens) :].tolist() == prompt.tokens


def test_a_batch_that_ends_early_is_narrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = exact(folder / "neox")
    prompts = prompts_of(generator, ["a", "bc"])
    force(monkeypatch, generator, prompts, [[0], [5, 0]])
    rollout = generator.respond(prompts, [0, 1], TRAIN_STREAM)
    assert rollout.response_tokens.shape == (2, 2)
    assert (rollout.response_lengths.tolist(), rollout.ended.tolist()) == ([1, 2], [True, True])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_leave_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """In steps of a quarter of the rows; those that stay write what they would have written."""
    generator = exact(folder / family)
    end: Any = generator.tokenizer.eos_token_id
    texts = [*TEXTS, "bc", "the end"]
    prompts = prompts_of(generator, texts)
    wanted = [[30 + row, *range(20, 20 + count), end][:LENGTH] for row, count in enumerate([0, 9, 1, 3, 3, 20, 0, 1])]
    force(monkeypatch, generator, prompts, wanted)
    sizes: list[int] = []
    plain = Decoder.step

    def step(self: Decoder, token: Tensor) -> Tensor:
        sizes.append(len(token))
        return plain(self, token)

    monkeypatch.setattr(Decoder, "step", step)
    assert responses_of(generator.respond(prompts, range(8), TRAIN_STREAM)) == wanted
    # 8 rows; after 2 tokens 6 are left, after 3 tokens 4, after 5 tokens 2, of which one ends with the 11th.
    assert sizes == [8, 6, 4, 4, *[2] * 7]


@pytest.mark.filterwarnings("error::FutureWarning")  # of names that transformers is about to drop
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_in_parts(folder: Path, family: str, packed: bool) -> None:
    """Their keys, values and next logits are those of each prompt alone, however many are read at a time."""
    policy = exact(folder / family).policy
    policy.packed = packed  # else they are padded and read at once
    lengths = torch.tensor([3, 1, 9, 9, 2, 5, 1])
    tokens = torch.randint(2, 200, (len(lengths), 9), generator=torch.Generator().manual_seed(0))
    alone = [policy.model(input_ids=row[9 - n :][None], use_cache=True) for row, n in zip(tokens, lengths, strict=True)]
    expected = torch.cat([output.logits[:, -1] for output in alone])
    after, cache = torch.full((len(lengths), 1), 7), cache_name(policy.model)
    expected_after = torch.cat(
        [policy.model(input_ids=after[:1], **{cache: getattr(output, cache)}).logits[:, -1] for output in alone]
    )
    for max_tokens in (1, 10, 12, 10**6):
        decoder = Decoder(policy)
        torch.testing.assert_close(decoder.begin(tokens, lengths, 4, max_tokens), expected, rtol=0, atol=1e-10)
        assert decoder.cache is not None
        layers: list[tuple[Any, ...]] = list(zip(decoder.cache.layers, *(getattr(o, cache).layers for o in alone)))  # noqa: B905
        for layer, *rows in layers if packed else []:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                for one, n, row in zip(held, lengths, rows, strict=True):
                    right = getattr(row, name)[0, :, :n]
                    torch.testing.assert_close(one[:, 9 - n : 9], right, rtol=0, atol=1e-10)
                    assert not one[:, : 9 - n].any() and not one[:, 9:].any()
        torch.testing.assert_close(decoder.step(after[:, 0]), expected_after, rtol=0, atol=1e-10)
    assert expected.std(0).min() > 0.1  # a token of another prompt, or a position one off, would be seen


def test_reading_prompts_in_parts_takes_less_memory(folder: Path) -> None:
    policy = load(folder / "neox").policy
    tokens, lengths = torch.full((64, 40), 5), torch.arange(64) % 20 + 21

    def activations(max_tokens: int) -> int:
        decoder = Decoder(policy)
        peak = watch(lambda: decoder.begin(tokens, lengths, 1, max_tokens)).peak
        assert decoder.cache is not None
        layers: list[Any] = decoder.cache.layers
        return peak - sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    # A tenth of the tokens at a time; logits and masks of all rows are there in both.
    assert activations(195) < activations(1950) / 3


def test_nothing_is_kept_of_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the cache would take the update's memory: it is gone as soon as there are responses."""
    caches: list[Any] = []
    plain = Decoder.begin

    def begin(self: Decoder, *args: Any) -> Tensor:
        logits = plain(self, *args)
        caches.append(weakref.ref(self.cache))
        return logits

    monkeypatch.setattr(Decoder, "begin", begin)
    generator = load(folder / "neox")
    generator.respond(prompts_of(generator), EPISODES, TRAIN_STREAM)
    assert [cache() for cache in caches] == [None]


class Captures:
    """Stands in for torch.cuda's graphs: a capture executes nothing, a replay reads and writes what it knew then.

    That is memory by its address and shape, and numbers of the host, such as a count of columns, by their values.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured: list[int] = []  # the rows at each capture, and at each replay
        self.replayed: list[int] = []
        captures, begin = self, Decoder.begin

        class Graph:
            def replay(self) -> None:
                decoder = captures.decoder
                assert captures.at(self.static) == captures.at(captures.tensors()) == self.at, "what is captured moved"
                captures.replayed.append(len(decoder.tokens))
                used, decoder.used = decoder.used, self.used
                decoder.logits.copy_(decoder._step())
                decoder.used = used

            @contextlib.contextmanager
            def capture(self) -> Iterator[None]:
                decoder = captures.decoder
                state = captures.tensors()[:-1]  # without the logits, which come to be in the capture
                before = [tensor.clone() for tensor in state]
                yield
                for tensor, old in zip(state, before, strict=True):
                    tensor.copy_(old)
                decoder.logits.fill_(torch.nan)
                captures.captured.append(len(decoder.tokens))
                self.used = decoder.used
                self.static = captures.tensors()  # held, so that no other tensor gets their addresses
                assert captures.at(state) == captures.at(self.static[:-1]), "moved while it was captured"
                self.at = captures.at(self.static)

        def remember(decoder: Decoder, *args: Any) -> Tensor:
            self.decoder = decoder
            return begin(decoder, *args)

        monkeypatch.setattr(Decoder, "begin", remember)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Graph.capture)
        monkeypatch.setattr(klq_fast.decode, "_capturable", lambda policy, device: policy.packed)

    def tensors(self) -> list[Tensor]:
        """All that a step reads and writes, the logits last."""
        decoder = self.decoder
        assert decoder.cache is not None
        layers: list[Any] = decoder.cache.layers
        cached = [tensor for layer in layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]
        return [decoder.tokens, decoder.positions, decoder.seen, *cached, decoder.logits]

    @staticmethod
    def at(tensors: list[Tensor]) -> list[Any]:
        return [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_captured_steps(folder: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """As on CUDA, with a double for its graphs: a capture for each number of rows, replayed from then on."""
    generator = exact(folder / family)
    end: Any = generator.tokenizer.eos_token_id
    prompts = prompts_of(generator, [*TEXTS, "bc", "the end"])
    counts = [2, 10, 3, 5, 6, 20, 2, 3]  # tokens before the one that ends a response
    wanted = [[30 + row, *range(20, 19 + count), end][:LENGTH] for row, count in enumerate(counts)]
    force(monkeypatch, generator, prompts, wanted)
    assert responses_of(generator.respond(prompts, range(8), TRAIN_STREAM)) == wanted
    captures = Captures(monkeypatch)
    assert responses_of(generator.respond(prompts, range(8), TRAIN_STREAM)) == wanted
    # 8 rows; after 3 tokens 6 are left, after 4 tokens 4, after 7 tokens 2. The first step of each runs uncaptured.
    assert captures.captured == [8, 6, 4, 2]
    assert captures.replayed == [8, 4, 4, *[2] * 4]


NARROW = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "changes", "capturable"),
    [
        ("llama", {"rope_type": "default"}, True),
        ("llama", {"rope_type": "linear", "factor": 2.0}, True),
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, False),
        ("llama", {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}, False),
        ("granitemoe", {"num_local_experts": 4}, False),
        ("qwen2_moe", {"num_experts": 8, "shared_expert_intermediate_size": 32}, False),
        ("deepseek_v3", {"n_routed_experts": 8}, False),
        (
            "dbrx",
            {
                "d_model": 32,
                "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8},
                "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            },
            False,
        ),
    ],
)
def test_steps_that_wait_for_the_device_are_not_captured(kind: str, changes: dict[str, Any], capturable: bool) -> None:
    """For the longest text, which decides the frequencies of positions; for the number of tokens of each expert."""
    if kind == "llama":
        changes = {"rope_parameters": changes | {"rope_theta": 10_000.0}, "original_max_position_embeddings": 64}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(NARROW | changes)))
    policy = Policy(model.eval(), 1.0)
    assert policy.packed and _capturable(policy, torch.device("cuda")) == capturable
    assert not _capturable(policy, CPU)


def test_logits_of_a_16_bit_head_are_not_rounded(folder: Path) -> None:
    """bf16 logits are off by up to 2⁻⁹ of their size; sums in fp32 of exact products by 1e-6."""
    policy = load(folder / "neox").policy
    policy.model.get_output_embeddings().bfloat16()
    hidden = torch.randn(5, 32).bfloat16()
    found = next_logits(policy, hidden)
    expected = hidden.double() @ policy.model.get_output_embeddings().weight.double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_a_prompt_may_hold_end_tokens(folder: Path) -> None:
    """And pad tokens: a chat's do."""
    generator = exact(folder / "neox")
    prompts = [Prompt("", [0, 1, 50, 0, 1]), Prompt("", [60])]
    rollout = generator.respond(prompts, [0, 1], TRAIN_STREAM)
    numbers = uniforms(generator.seed, TRAIN_STREAM, [0, 1], LENGTH)
    expected = [sample_one_by_one(generator, p, n, {0}) for p, n in zip(prompts, numbers, strict=True)]
    assert responses_of(rollout) == expected


def test_texts_keep_their_first_space() -> None:
    """SentencePiece tokenizers (Llama 2, Mistral) drop the space at the start of what they decode: prompt + response
    would read "yes?no"."""
    pieces = ["<s>", "</s>", "<unk>", "▁", "▁yes", "▁no", "?", "y", "e", "s", "n", "o", "▁y", "▁n", "ye", "es"]
    merges = [("▁", "y"), ("▁", "n"), ("e", "s"), ("▁y", "es"), ("▁n", "o")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    whole, prompt = tokenizer("yes? no yes")["input_ids"], [0, *tokenizer("yes?")["input_ids"]]
    response = whole[len(prompt) - 1 :]
    assert tokenizer.decode(response) == "no yes"
    generator = Generator(None, tokenizer, never, 3, 1.0, 0)  # type: ignore[arg-type]
    rollout = Rollout(
        torch.tensor([[9, *prompt], [9, *prompt]]),
        torch.tensor([len(prompt)] * 2),
        torch.tensor([[*response, 1], [*response, 6]]),
        torch.tensor([len(response) + 1] * 2),
        torch.tensor([True, False]),
    )
    assert generator.texts(rollout) == [" no yes", " no yes?"]


def test_scores_and_rewards(folder: Path) -> None:
    """The reward sees prompts, texts without special tokens, and whether each ended; ω is taken where none did."""
    seen: list[Any] = []

    def reward(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
        seen.append((list(prompts), list(responses), list(ended)))
        return torch.tensor([1.0, 2.0, 3.0])

    generator = dataclasses.replace(load(folder / "neox"), reward=reward, missing_eos_penalty=0.25)
    tokenizer: Any = generator.tokenizer
    x, y = tokenizer("xy")["input_ids"]
    prompts = prompts_of(generator, ["a", "bc", "d"])
    rollout = Rollout(
        torch.tensor([[1, *prompts[0].tokens], prompts[1].tokens, [1, *prompts[2].tokens]]),
        torch.tensor([1, 2, 1]),
        torch.tensor([[x, y, 0], [x, 1, y], [0, y, y]]),  # 0 ends, 1 is [PAD]
        torch.tensor([3, 3, 1]),
        torch.tensor([True, False, True]),
    )
    scores, texts = generator.score(prompts, rollout)
    assert texts == ["xy", "xy", ""]
    assert seen == [(prompts, texts, [True, False, True])]
    rewarded = generator.rewarded(rollout, scores)
    assert rewarded.rewards is not None and rewarded.rewards.tolist() == [1.0, 1.75, 3.0]
    assert scores.tolist() == [1.0, 2.0, 3.0]


# Log-probs and values.


@torch.no_grad()
def directly(policy: Policy, rollout: Rollout, row: int) -> tuple[Tensor, Tensor]:
    """(log-probs, values) of one row's response in fp64, from a forward pass of it alone, by their definitions."""
    length, count = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
    prompt = rollout.prompt_tokens[row, rollout.prompt_tokens.shape[1] - length :]
    response = rollout.response_tokens[row, :count]
    tokens = torch.cat([prompt, response])[None]
    output = policy.model(input_ids=tokens, output_hidden_states=True)
    at = torch.arange(count)
    states = slice(length - 1, length - 1 + count)  # before each response token
    logprobs = (output.logits[0, states].double() / TEMPERATURE).log_softmax(-1)[at, response]
    head = policy.value_head
    values = output.hidden_states[-1][0, states].double() @ head.weight[0].double() + head.bias.double()
    return logprobs, values


@pytest.fixture(scope="module", params=FAMILIES)
def rolled(folder: Path, request: pytest.FixtureRequest) -> tuple[Generator, Policy, Rollout]:
    """A policy, a reference, and a rollout with responses of 1 to LENGTH tokens."""
    generator = load(folder / request.param)
    reference = load_reference(str(folder / request.param), TEMPERATURE, CPU)
    rollout = generator.respond(prompts_of(generator), EPISODES, TRAIN_STREAM)
    lengths = torch.tensor([1, 12, 3, 5, 2, 7]).minimum(rollout.response_lengths)
    return generator, reference, dataclasses.replace(rollout, response_lengths=lengths)


@pytest.mark.parametrize("max_tokens", [1, 60, 100_000])
def test_logprobs_and_values(rolled: tuple[Generator, Policy, Rollout], folder: Path, max_tokens: int) -> None:
    """Against fp64 passes of single rows. fp32 errs by up to 7e-6 in log-probs of size 8 after two layers; 5e-5 leaves
    room for another machine's order of sums."""
    generator, reference, rollout = rolled
    precise = copy.deepcopy(generator.policy).double()
    truth = [directly(precise, rollout, row) for row in range(len(rollout))]
    result = with_logprobs(rollout, generator.policy, reference, max_tokens)
    assert result.logprobs is not None and result.values is not None and result.ref_logprobs is not None
    assert result.logprobs.dtype == result.values.dtype == torch.float32
    for row, (logprobs, values) in enumerate(truth):
        count = len(logprobs)
        assert (result.logprobs[row, :count] - logprobs).abs().max() < 5e-5
        assert (result.values[row, :count] - values).abs().max() < 5e-5
    for name in ("logprobs", "ref_logprobs", "values"):
        assert (getattr(result, name)[~rollout.mask] == 0).all()
    # A policy equal to its reference: bit for bit the same.
    assert torch.equal(result.logprobs, result.ref_logprobs)
    assert (result.log_ratio == 0).all()
    # Shifting by one state would be seen.
    assert torch.stack([values.std() for _, values in truth if len(values) > 2]).min() > 0.05


def test_microbatches_change_nothing_beyond_rounding(rolled: tuple[Generator, Policy, Rollout]) -> None:
    generator, reference, rollout = rolled
    whole = with_logprobs(rollout, generator.policy, reference, 100_000)
    for max_tokens in (1, 40, 80):
        parts = with_logprobs(rollout, generator.policy, reference, max_tokens)
        for name in ("logprobs", "ref_logprobs", "values"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=2e-5, rtol=0)


def test_the_reference_is_another_model(rolled: tuple[Generator, Policy, Rollout]) -> None:
    generator, reference, rollout = rolled
    with torch.no_grad():
        before = [p.clone() for p in reference.model.parameters()]
        for parameter in reference.model.parameters():
            parameter.mul_(1.1)
    try:
        result = with_logprobs(rollout, generator.policy, reference, 80)
        for row in range(len(rollout)):
            logprobs, _ = directly(generator.policy, rollout, row)
            ref_logprobs, _ = directly(reference, rollout, row)
            found = result.log_ratio[row, : len(logprobs)]
            assert (found - (logprobs - ref_logprobs)).abs().max() < 1e-4
        assert result.log_ratio.abs().max() > 0.1
    finally:
        with torch.no_grad():
            for parameter, value in zip(reference.model.parameters(), before, strict=True):
                parameter.copy_(value)


def test_what_the_padding_holds_does_not_matter(rolled: tuple[Generator, Policy, Rollout]) -> None:
    generator, reference, rollout = rolled
    other = dataclasses.replace(
        rollout,
        prompt_tokens=rollout.prompt_tokens.clone(),
        response_tokens=torch.where(rollout.mask, rollout.response_tokens, 77),
    )
    for row, length in enumerate(rollout.prompt_lengths.tolist()):
        other.prompt_tokens[row, : other.prompt_tokens.shape[1] - length] = 88
    results = [with_logprobs(r, generator.policy, reference, 100_000) for r in (rollout, other)]
    assert not torch.equal(rollout.prompt_tokens, other.prompt_tokens)
    for name in ("logprobs", "ref_logprobs", "values"):
        assert torch.equal(*(getattr(result, name) for result in results))


# The batch.


def some_rollout(prompt_lengths: Sequence[int], response_lengths: Sequence[int], spare: int = 0) -> Rollout:
    """Row r holds 1000·(r + 1) + k as its k-th token, prompt and response counted through, and 0 in the padding."""
    width, length = max(prompt_lengths) + spare, max(response_lengths) + spare
    size = len(prompt_lengths)
    prompt, response = torch.zeros(size, width, dtype=torch.long), torch.zeros(size, length, dtype=torch.long)
    for row, (p, r) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        prompt[row, width - p :] = 1000 * (row + 1) + torch.arange(p)
        response[row, :r] = 1000 * (row + 1) + p + torch.arange(r)
    floats = {
        name: response + offset
        for offset, name in enumerate(("logprobs", "ref_logprobs", "values", "advantages", "returns"), start=1)
    }
    lengths = torch.tensor(prompt_lengths), torch.tensor(response_lengths)
    return Rollout(
        prompt,
        lengths[0],
        response,
        lengths[1],
        torch.arange(size) % 2 == 0,
        rewards=torch.arange(size).float(),
        **floats,
    )


def test_rows_cut_the_padding() -> None:
    rollout = some_rollout([3, 1, 5, 2], [2, 6, 1, 4], spare=3)
    part = rollout.rows(torch.tensor([3, 0]))
    assert part.prompt_tokens.tolist() == [[0, 4000, 4001], [1000, 1001, 1002]]
    assert part.response_tokens.tolist() == [[4002, 4003, 4004, 4005], [1003, 1004, 0, 0]]
    assert (part.prompt_lengths.tolist(), part.response_lengths.tolist()) == ([2, 3], [4, 2])
    assert (part.ended.tolist(), len(part)) == ([False, True], 2)
    assert part.rewards is not None and part.rewards.tolist() == [3.0, 0.0]
    for offset, name in enumerate(("logprobs", "ref_logprobs", "values", "advantages", "returns"), start=1):
        assert torch.equal(getattr(part, name), part.response_tokens + offset)
    one = rollout.rows(torch.tensor([2]))
    assert (one.prompt_tokens.tolist(), one.response_tokens.tolist()) == ([[3000, 3001, 3002, 3003, 3004]], [[3005]])
    bare = Rollout(*(getattr(rollout, field.name) for field in dataclasses.fields(Rollout)[:5])).rows(
        torch.tensor([1, 1])
    )
    assert bare.prompt_tokens.tolist() == [[2000], [2000]]


def test_lengths_stay_on_the_host() -> None:
    rollout = some_rollout([2, 1], [1, 3])
    for name in ("prompt_lengths", "response_lengths", "ended"):
        with pytest.raises(ValueError, match=f"{name}: got a tensor on meta, expected one on the CPU"):
            dataclasses.replace(rollout, **{name: getattr(rollout, name).to("meta")})


def test_packed_inputs() -> None:
    rollout = some_rollout([2, 1], [1, 3], spare=1)
    inputs, states = rollout.packed_inputs()
    # Without the last token of each response: no state comes after it.
    assert inputs["input_ids"].tolist() == [[1000, 1001, 2000, 2001, 2002]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert states.tolist() == [1, 2, 3, 4]
    assert inputs["sequences"].bounds.tolist() == [0, 2, 5] and inputs["sequences"].longest == 3
    assert rollout.response_slots().tolist() == [0, 4, 5, 6]
    assert rollout.response_slots(torch.tensor([1])).tolist() == [4, 5, 6]
    responses = rollout.responses()
    assert responses.tokens.tolist() == [1002, 2001, 2002, 2003]
    for offset, name in enumerate(("logprobs", "ref_logprobs", "values", "advantages", "returns"), start=1):
        assert torch.equal(getattr(responses, name), responses.tokens + offset)
    assert rollout.states().tolist() == [2, 7 + 2, 7 + 3, 7 + 4]
    assert rollout.last.tolist() == [[True, False, False, False], [False, False, True, False]]


def test_model_inputs() -> None:
    inputs = some_rollout([2, 1], [1, 3], spare=1).model_inputs()
    assert inputs["input_ids"].tolist() == [[0, 1000, 1001, 1002, 0, 0, 0], [0, 0, 2000, 2001, 2002, 2003, 0]]
    assert inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]
    positions = inputs["position_ids"]
    assert positions[0, 1:4].tolist() == [0, 1, 2] and positions[1, 2:6].tolist() == [0, 1, 2, 3]
    assert positions.min() >= 0 and positions.max() <= 3  # no position that the model may not have


@pytest.mark.parametrize("max_tokens", [1, 20, 60, 200, 100_000])
def test_microbatches_cover_each_row_once(max_tokens: int) -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 17, 64):
        rollout = some_rollout(random.integers(1, 20, size).tolist(), random.integers(1, 20, size).tolist(), spare=2)
        batches = rollout.microbatches(max_tokens)
        assert sorted(torch.cat(batches).tolist()) == list(range(size))
        sizes = []
        for rows in batches:
            part = rollout.rows(rows)
            sizes.append(part.prompt_tokens.numel() + part.response_tokens.numel())
            assert sizes[-1] <= max_tokens or len(rows) == 1
        assert [rows.tolist() for rows in rollout.microbatches(max_tokens)] == [rows.tolist() for rows in batches]
        needed = int((rollout.prompt_lengths + rollout.response_lengths).sum())
        assert sum(sizes) <= 2 * needed + 40  # alike in length: at most about half is padding
        if max_tokens == 100_000:
            assert len(batches) == 1


# The benchmark.


def test_the_benchmark_finds_wrong_responses(tmp_path: Path) -> None:
    """One token that is not the likeliest, or a response too short; and right ones pass."""
    size = train_step.Size("2 layers", 2, 32, 2, 64, rows=6, longest_prompt=12, response=5, microbatch=2, trl_rollout=6)
    train_step.make_stand_ins(size, tmp_path)
    options = argparse.Namespace(threads=torch.get_num_threads(), batches=2)
    entry: dict[str, Any] = {"size": dataclasses.asdict(size), "case": next(iter(rollout_benchmark.ENDS)), "runs": {}}
    entry |= {"missed": [], "wrong": []}
    workers = {"transformers": rollout_worker.transformers, "klq_fast": rollout_worker.klq_fast}
    for name, load in workers.items():
        spec = rollout_benchmark.specification(name, size, "cpu", options, tmp_path, greedy=True)
        greedy = load(spec)(0, True)
        short = partial(rollout_benchmark.short_of_best, spec["model"], spec["prompts"], device="cpu")
        run = {"seconds": [2.0, 1.0], "tokens": [30, 30], "peak_bytes": 2**20, "same_rows": 6, "round": 0}
        entry["runs"][name] = [run | {"short_of_best": short(greedy)}]
        rollout_benchmark.check(entry, spec)
    assert entry["wrong"] == []
    table = [line for line in rollout_benchmark.page(entry) if line.startswith("| klq_fast |")]
    assert table == ["| klq_fast | 1.000 (1.000 to 1.000); first 2 | 30 | 1 (1 to 1) | 1.00 (1.00 to 1.00) | 6 of 6 |"]
    greedy[3][2] = (greedy[3][2] + 1) % 60 + 2
    entry["runs"]["klq_fast"] = [run | {"short_of_best": short(greedy), "tokens": [30, 29]}]
    rollout_benchmark.check(entry, spec)
    assert len(entry["wrong"]) == 2 and "short of the largest logit" in entry["wrong"][1]
