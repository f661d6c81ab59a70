"""Scores: a reward model's are those of each text alone, and a function's mistakes are told with the prompt."""

import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
)

from klq_fast.config import InputError
from klq_fast.data import Prompt
from klq_fast.reward import Reward, load_reward, reward_from_function, reward_from_model, shifted

CPU = torch.device("cpu")
LONG = "Lorem ipsum dolor sit amet, consectetur adipisici elit, sed eiusmod tempor incidunt. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reward models whose weights are eight times the usual 0.02, so that every token shows in the score."""
    folder = tmp_path_factory.mktemp("reward")
    for make in (tiny.neox_reward, tiny.gpt2_reward, tiny.distilbert_reward):
        path = make(folder / make.__name__)
        model = AutoModelForSequenceClassification.from_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        model.save_pretrained(path)
    return folder


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text, [1]) for text in texts]


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    return (
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


def direct(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """The last label's logit of one row, without padding: with one row, the last column is the last token."""
    model.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0, -1]


# Functions.


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Reward]]:
    module = types.ModuleType("some_rewards")
    monkeypatch.setitem(sys.modules, "some_rewards", module)

    def make(body: Any) -> Reward:
        module.score = body  # type: ignore[attr-defined]
        return reward_from_function("some_rewards:score")

    yield make


def test_a_function_sees_texts_and_gives_scores(function: Callable[[Any], Reward]) -> None:
    seen = []

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        assert isinstance(prompts, list) and isinstance(responses, list)
        seen.append((list(prompts), list(responses)))
        return [len(p) + 0.5 * len(r) for p, r in zip(prompts, responses, strict=True)]

    prompts, responses = prompts_of("a", "bcd"), ["", "xy"]
    scores = function(score)(prompts, responses, [True, False])
    assert torch.equal(scores, torch.tensor([1.0, 4.0])) and scores.dtype == torch.float32
    assert seen == [(["a", "bcd"], ["", "xy"])]


@pytest.mark.parametrize(
    "result",
    [
        [1, -2],
        (1.0, -2.0),
        torch.tensor([1.0, -2.0]),
        torch.tensor([1, -2]),
        torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
        torch.tensor([[1.0], [-2.0]]),
        [torch.tensor(1.0, dtype=torch.float64), torch.tensor([-2.0])],
        np.array([1.0, -2.0]),
        [np.float32(1), np.int64(-2)],
        iter([1.0, -2.0]),
    ],
)
def test_results_that_are_numbers(function: Callable[[Any], Reward], result: Any) -> None:
    scores = function(lambda prompts, responses: result)(prompts_of("a", "b"), ["x", "y"], [True, True])
    assert torch.equal(scores, torch.tensor([1.0, -2.0])) and scores.dtype == torch.float32


def test_a_function_may_change_its_lists(function: Callable[[Any], Reward]) -> None:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        scores = [float(len(prompts)) for _ in prompts]
        prompts.clear()
        responses.append("more")
        return scores

    prompts, responses = prompts_of("a", "b"), ["x", "y"]
    assert function(score)(prompts, responses, [True, True]).tolist() == [2.0, 2.0]
    assert (len(prompts), responses) == (2, ["x", "y"])


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        torch.tensor(float("nan")),
        np.float64("inf"),
        None,
        "1.0",
        [1.0, 2.0],
        torch.tensor([1.0, 2.0]),
        np.ones(2),
        1j,
        1e300,  # infinite in float32
        10**400,
    ],
)
def test_a_value_that_is_no_finite_number(function: Callable[[Any], Reward], value: Any) -> None:
    """The message shows the value, and the prompt and response that it is for."""
    score = function(lambda prompts, responses: [0.5, value])
    with pytest.raises(InputError, match="--reward some_rewards:score: got ") as error:
        score(prompts_of("first prompt", "second prompt"), ["one", "two"], [True, True])
    message = str(error.value)
    assert "'second prompt'" in message and "'two'" in message and "first" not in message
    assert "expected a finite number" in message


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1.0], "got 1 scores, expected 2"),
        ([1.0, 2.0, 3.0], "got 3 scores, expected 2"),
        ([], "got 0 scores, expected 2"),
        (None, "got None, expected a list"),
        (1.0, "got 1.0, expected a list"),
        ("12", "got '12', expected a list"),
        ({1.0: 2.0, 3.0: 4.0}, "got {1.0: 2.0, 3.0: 4.0}, expected a list"),
    ],
)
def test_a_result_that_is_no_list_for_each(function: Callable[[Any], Reward], result: Any, said: str) -> None:
    score = function(lambda prompts, responses: result)
    with pytest.raises(InputError) as error:
        score(prompts_of("first prompt", "second prompt"), ["one", "two"], [True, True])
    assert said in str(error.value) and "'first prompt'" in str(error.value) and "'one'" in str(error.value)


def test_a_function_that_raises(function: Callable[[Any], Reward]) -> None:
    def score(prompts: list[str], responses: list[str]) -> Iterator[float]:
        yield 1.0
        raise KeyError("nothing here")

    for body in (score, lambda prompts, responses: list(score(prompts, responses))):
        with pytest.raises(InputError) as error:
            function(body)(prompts_of("first prompt"), ["one"], [True])
        line = score.__code__.co_firstlineno + 2
        assert f"it raised KeyError: 'nothing here', at {__file__}:{line} (" in str(error.value)
        assert "'first prompt'" in str(error.value) and "'one'" in str(error.value)


def test_a_function_that_calls_a_library_which_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line said is the function's own."""
    file = tmp_path / "rewards_of_json.py"
    file.write_text("import json\n\ndef score(prompts, responses):\n    return [json.loads(r) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError) as error:
        reward_from_function("rewards_of_json:score")(prompts_of("first prompt"), ["{"], [True])
    assert "it raised JSONDecodeError: " in str(error.value) and f", at {file}:4 (" in str(error.value)


def test_a_long_prompt_is_shown_in_part(function: Callable[[Any], Reward]) -> None:
    with pytest.raises(InputError) as error:
        function(lambda prompts, responses: [])(prompts_of("x" * 10_000), ["y" * 10_000], [True])
    assert 200 < len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("some_rewards:nothing", "has no attribute 'nothing'"),
        ("some_rewards", "expected MODULE:FUNCTION"),
        ("some_rewards:", "expected MODULE:FUNCTION"),
        (":score", "expected MODULE:FUNCTION"),
        (".relative:score", "expected MODULE:FUNCTION"),
        ("some_rewards:number", "got a int, expected a function"),
        ("no_python:score", "SyntaxError"),
        ("divides_by_zero:score", "ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there(
    function: Callable[[Any], Reward], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    function(len)
    sys.modules["some_rewards"].number = 3  # type: ignore[attr-defined]
    (tmp_path / "no_python.py").write_text("def score(:\n")
    (tmp_path / "divides_by_zero.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=f"^--reward {re.escape(name)}: .*{said}"):
        load_reward(name, None, CPU, 8192)


def test_no_reward_at_all() -> None:
    with pytest.raises(InputError, match="expected one of them"):
        load_reward(None, None, CPU, 8192)


# Reward models.

PROMPTS = ["Q: one?", "Q: a longer question, much longer?", "Q", "Q: four?", "Q: five five five?"]
RESPONSES = [" yes", " no", "", " perhaps, perhaps not", " y"]
ENDED = [True, False, True, False, True]


@pytest.mark.parametrize("name", ["neox_reward", "gpt2_reward", "distilbert_reward"])
@pytest.mark.parametrize("max_tokens", [1, 40, 100, 16_384])
def test_scores_are_those_of_each_text_alone(folder: Path, name: str, max_tokens: int) -> None:
    """Whatever it shares a batch with, and in whatever order. fp64 scores of size 1, kept as float32: 1e-6."""
    model, tokenizer = load(folder / name)
    score = reward_from_model(model, tokenizer, max_tokens)
    scores = score(prompts_of(*PROMPTS), RESPONSES, ENDED)
    assert scores.dtype == torch.float32
    expected = []
    for prompt, response, ended in zip(PROMPTS, RESPONSES, ENDED, strict=True):
        ends = ended and tokenizer.eos_token_id is not None
        tokens = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id] * ends
        expected.append(float(direct(model, tokens)))
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 4) for value in expected}) == len(expected)  # else nothing could be seen to go wrong
    order = [3, 1, 4, 0, 2]
    again = score(prompts_of(*(PROMPTS[i] for i in order)), [RESPONSES[i] for i in order], [ENDED[i] for i in order])
    assert again.tolist() == pytest.approx([expected[i] for i in order], abs=1e-6)


def test_a_text_is_scored_at_its_end_of_sequence(folder: Path) -> None:
    """The reward model's only special token ends a text; padding with it, as is common, would hide where texts end."""
    model, tokenizer = load(folder / "gpt2_reward")
    assert tokenizer.pad_token_id is None and tokenizer.all_special_ids == [tokenizer.eos_token_id] == [0]
    prompts, responses = prompts_of("short", "quite a bit longer"), [" a", " b"]
    for max_tokens in (1, 1000):
        score = reward_from_model(model, tokenizer, max_tokens)
        for ended in ([True, True], [False, True], [True, False], [False, False]):
            expected = [
                direct(model, tokenizer(p.text + r)["input_ids"] + [0] * e)
                for p, r, e in zip(prompts, responses, ended, strict=True)
            ]
            torch.testing.assert_close(score(prompts, responses, ended), torch.stack(expected).float())
    ended_score, open_score = (float(score(prompts[:1], responses[:1], [ended])) for ended in (True, False))
    assert abs(ended_score - open_score) > 1e-3


def test_texts_that_end_with_the_tokens_used_as_padding(folder: Path) -> None:
    """Padding takes a token that no row of the batch ends with; rows here end with the first ids of the vocabulary."""
    model, tokenizer = load(folder / "gpt2_reward")
    texts = ["a" * i + tokenizer.decode([i]) for i in range(1, 9)]
    assert [tokenizer(text)["input_ids"][-1] for text in texts] == list(range(1, 9))
    ended = [i % 3 == 0 for i in range(8)]
    scores = reward_from_model(model, tokenizer, 10_000)(prompts_of(*texts), [""] * 8, ended)
    expected = [direct(model, tokenizer(t)["input_ids"] + [0] * e).float() for t, e in zip(texts, ended, strict=True)]
    torch.testing.assert_close(scores, torch.stack(expected))


@pytest.mark.parametrize("length", [62, 63, 64, 65, 66, 90])
@pytest.mark.parametrize("ended", [True, False])
def test_a_text_as_long_as_the_positions(folder: Path, length: int, ended: bool) -> None:
    """GPT-2 with 64 positions, a token a byte: all of them are used, and only the beginning is lost."""
    model, tokenizer = load(folder / "gpt2_reward")
    text = (LONG * 2)[:length]
    tokens = [*tokenizer(text)["input_ids"], *([0] if ended else [])][-64:]
    score = reward_from_model(model, tokenizer, 10_000)
    (found,) = score(prompts_of(text[:50]), [text[50:]], [ended])
    torch.testing.assert_close(found, direct(model, tokens).float())
    if len(tokens) == 64:  # and it would have been seen
        assert abs(found - direct(model, tokens[1:])) > 1e-3


@pytest.mark.parametrize("letters", [61, 62, 63, 90])
def test_truncation_keeps_the_tokenizer_s_own_special_tokens(folder: Path, letters: int) -> None:
    """DistilBERT reads [CLS] … [SEP]: a long text loses its beginning, but neither of them, and no place is wasted."""
    model, tokenizer = load(folder / "distilbert_reward")
    words = [chr(97 + i % 26) for i in range(letters)]
    middle = tokenizer.convert_tokens_to_ids(words)[-62:]
    tokens = [tokenizer.cls_token_id, *middle, tokenizer.sep_token_id]
    score = reward_from_model(model, tokenizer, 10_000)
    (found,) = score(prompts_of(" ".join(words[:30])), [" " + " ".join(words[30:])], [True])
    torch.testing.assert_close(found, direct(model, tokens).float())
    assert abs(found - direct(model, [tokens[0], *middle[1:], tokens[-1]])) > 1e-3


def test_a_tokenizer_that_ends_texts_itself(folder: Path) -> None:
    """RoBERTa's and others' write the end-of-sequence token: it is not added twice."""
    model, tokenizer = load(folder / "neox_reward")
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    assert tokenizer("a")["input_ids"][-1] == end
    for length in (10, 127, 128, 140):
        text = (LONG * 2)[:length]
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        (found,) = reward_from_model(model, tokenizer, 10_000)(prompts_of(text), [""], [True])
        torch.testing.assert_close(found, direct(model, [*plain, end][-128:]).float())


def test_the_tokenizer_s_own_limit_counts_too(folder: Path) -> None:
    model, tokenizer = load(folder / "gpt2_reward")
    tokenizer.model_max_length = 20
    (found,) = reward_from_model(model, tokenizer, 10_000)(prompts_of(LONG), [""], [False])
    torch.testing.assert_close(found, direct(model, tokenizer(LONG)["input_ids"][-20:]).float())


def test_a_model_without_a_limit(folder: Path) -> None:
    """Bloom has no positions to run out of, and its tokenizer need not name a limit."""
    config = BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=1, n_head=2)
    config.num_labels = 1
    model = BloomForSequenceClassification(config).double().eval()
    tokenizer: Any = tiny.byte_tokenizer(eos_token="<|endoftext|>")
    assert tokenizer.model_max_length > 2**63
    scores = reward_from_model(model, tokenizer, 10_000)(prompts_of(LONG * 5, "Q"), [" a", " b"], [True, False])
    expected = [direct(model, [*tokenizer(LONG * 5 + " a")["input_ids"], 0]), direct(model, tokenizer("Q b").input_ids)]
    torch.testing.assert_close(scores, torch.stack(expected).float())


def test_two_labels_mean_bad_and_good(folder: Path) -> None:
    model, tokenizer = load(folder / "distilbert_reward")
    assert model.config.num_labels == 2
    (found,) = reward_from_model(model, tokenizer, 1000)(prompts_of("a b"), [" c"], [True])
    with torch.no_grad():
        bad, good = model(**tokenizer("a b c", return_tensors="pt")).logits[0].float()
    torch.testing.assert_close(found, good)
    assert bad != good


def test_more_labels_are_refused(folder: Path) -> None:
    config = GPT2Config(vocab_size=tiny.VOCAB, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    config.num_labels = 3
    _, tokenizer = load(folder / "gpt2_reward")
    with pytest.raises(InputError, match=r"--reward-model: got 3 labels, expected 1 .* or 2"):
        reward_from_model(GPT2ForSequenceClassification(config), tokenizer, 1000)


def test_a_chat_goes_through_the_reward_model_s_own_template(folder: Path) -> None:
    model, tokenizer = load(folder / "neox_reward")
    messages = [{"role": "user", "content": "hello?"}]
    prompt = Prompt("what the policy reads", [1], messages)
    text_score = reward_from_model(model, tokenizer, 1000)([prompt], [" hi"], [False])
    torch.testing.assert_close(text_score[0], direct(model, tokenizer(prompt.text + " hi").input_ids).float())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}<|endoftext|>"
    score = reward_from_model(model, tokenizer, 1000)
    found = score([prompt, Prompt("a text", [1])], [" hi", " there"], [True, False])
    tokens = tokenizer("user=hello?;assistant= hi;<|endoftext|>").input_ids
    assert tokens[-1] == tokenizer.eos_token_id != tokens[-2]
    expected = [direct(model, tokens), direct(model, tokenizer("a text there").input_ids)]
    torch.testing.assert_close(found, torch.stack(expected).float())
    assert prompt.messages == [{"role": "user", "content": "hello?"}]


def test_a_long_chat_keeps_its_end(folder: Path) -> None:
    model, tokenizer = load(folder / "gpt2_reward")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    prompt = Prompt("", [1], [{"role": "user", "content": LONG}])
    (found,) = reward_from_model(model, tokenizer, 1000)([prompt], [" hi"], [True])
    tokens = tokenizer(f"user={LONG};assistant= hi;").input_ids[-64:]
    torch.testing.assert_close(found, direct(model, tokens).float())


def test_reward_models_are_loaded_frozen_without_dropout(folder: Path) -> None:
    """Twice the same scores: GPT-2's config has dropout."""
    score = load_reward(None, str(folder / "gpt2_reward"), CPU, 8192)
    first, second = (score(prompts_of(*PROMPTS), RESPONSES, ENDED) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    model, tokenizer = load(folder / "gpt2_reward")
    torch.testing.assert_close(
        first, reward_from_model(model, tokenizer, 1000)(prompts_of(*PROMPTS), RESPONSES, ENDED), atol=1e-5, rtol=1e-5
    )


def test_without_the_end_of_sequence_token(folder: Path) -> None:
    """For reward models that never saw it: what ended and what did not read the same."""
    model, tokenizer = load(folder / "neox_reward")
    scores = reward_from_model(model, tokenizer, 1000, eos=False)(prompts_of("Q:", "Q:"), [" a", " a"], [True, False])
    expected = direct(model, tokenizer("Q: a").input_ids).float()
    torch.testing.assert_close(scores, torch.stack([expected, expected]))
    assert abs(expected - direct(model, [*tokenizer("Q: a").input_ids, tokenizer.eos_token_id])) > 1e-3
    kept = load_reward(None, str(folder / "neox_reward"), CPU, 1000, eos=False)
    torch.testing.assert_close(kept(prompts_of("Q:"), [" a"], [True]), expected[None], atol=1e-5, rtol=1e-5)


def test_a_shift_is_added(function: Callable[[Any], Reward]) -> None:
    score = function(lambda prompts, responses: [1.0, -2.0])
    assert shifted(score, 0.5)(prompts_of("a", "b"), ["x", "y"], [True, True]).tolist() == [1.5, -1.5]
    for shift, expected in ((-3.0, [-2.0, -5.0]), (0.0, [1.0, -2.0]), ("reference", [1.0, -2.0])):  # not measured yet
        loaded = load_reward("some_rewards:score", None, CPU, 1000, shift=shift)  # type: ignore[arg-type]
        assert loaded(prompts_of("a", "b"), ["x", "y"], [True, True]).tolist() == expected


def test_a_model_that_waits_elsewhere_scores_the_same(folder: Path) -> None:
    name = str(folder / "gpt2_reward")
    stays, waits = (load_reward(None, name, CPU, 1000, offload=offload) for offload in (False, True))
    for _ in range(2):
        assert torch.equal(*(score(prompts_of(*PROMPTS), RESPONSES, ENDED) for score in (stays, waits)))


# Checkpoints that their architecture or config does not describe.


def changed(folder: Path, place: Path, tensors: dict[str, Tensor], without: Sequence[str] = ()) -> Path:
    """The GPT-2 reward model with other tensors, and without some settings."""
    shutil.copytree(folder / "gpt2_reward", place)
    save_file(load_file(place / "model.safetensors") | tensors, place / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in without}))
    return place


def test_a_score_s_bias_is_kept(folder: Path, tmp_path: Path) -> None:
    """transformers' classifiers have none and drop it, and with it the shift of scores that their authors made."""
    place = changed(folder, tmp_path / "biased", {"score.bias": torch.tensor([1.5])})
    plain, biased = (load_reward(None, str(path), CPU, 1000) for path in (folder / "gpt2_reward", place))
    scores = plain(prompts_of(*PROMPTS), RESPONSES, ENDED)
    torch.testing.assert_close(biased(prompts_of(*PROMPTS), RESPONSES, ENDED), scores + 1.5)


def test_a_config_that_does_not_count_its_labels(folder: Path, tmp_path: Path) -> None:
    """It means two; the checkpoint has one, with and without a bias."""
    plain = load_reward(None, str(folder / "gpt2_reward"), CPU, 1000)
    scores = plain(prompts_of(*PROMPTS), RESPONSES, ENDED)
    for name, tensors, shift in (("one", {}, 0.0), ("biased", {"score.bias": torch.tensor([-2.0])}, -2.0)):
        place = changed(folder, tmp_path / name, tensors, ["id2label", "label2id", "num_labels"])
        found = load_reward(None, str(place), CPU, 1000)(prompts_of(*PROMPTS), RESPONSES, ENDED)
        torch.testing.assert_close(found, scores + shift)


def test_checkpoints_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    """Rather than drawn at random, in part or whole."""
    place = changed(folder, tmp_path / "positions", {"transformer.wpe.weight": torch.zeros(32, 32)})
    with pytest.raises(InputError, match=r"wpe.weight of shape \(32, 32\), and its config.json says \(64, 32\)"):
        load_reward(None, str(place), CPU, 1000)
    language_model = tiny.gpt2(tmp_path / "language_model")
    with pytest.raises(InputError, match=r"does not hold \['score.weight'\] of GPT2ForSequenceClassification"):
        load_reward(None, str(language_model), CPU, 1000)
