"""The demo's learned reward: which docstring sentence would a reader prefer for this signature?"""

import copy
import random
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, GPTNeoXForSequenceClassification, PreTrainedTokenizerFast

from .pairs import Pair, Pairs
from .policy import Track, learning_rate_share, optimizers, right_padded, sample, step

if TYPE_CHECKING:
    from .prepare import DemoConfig


def truncated(sentence: str, generator: random.Random) -> str:
    """The sentence stopped before its end."""
    words = sentence.split(" ")
    return " ".join(words[: generator.randint(2, len(words) - 1)]) if len(words) > 3 else sentence[:-1]


def stuttering(sentence: str, generator: random.Random) -> str:
    """The sentence with a stretch of one to four words said twice or three times ("a string for a string")."""
    words = sentence[1:].split(" ")
    start = generator.randrange(len(words))
    stretch = words[start : start + generator.randint(1, 4)]
    again = [word.rstrip(".") for word in stretch] * generator.randint(1, 2)
    return " " + " ".join([*words[:start], *again, *words[start:]])


def shuffled(sentence: str, generator: random.Random) -> str:
    """The sentence with two of its words exchanged, or one left out."""
    words = sentence[1:-1].split(" ")
    first, second = generator.sample(range(len(words)), 2)
    if generator.random() < 0.5:
        words[first], words[second] = words[second], words[first]
    else:
        del words[first]
    return " " + " ".join(words) + "."


def garbled(sentence: str, vocabulary: list[str], generator: random.Random) -> str:
    """The sentence with one or two of its words replaced, or grown together with, random pieces of the vocabulary."""
    words = sentence[1:-1].split(" ")
    for _ in range(generator.randint(1, 2)):
        index = generator.randrange(len(words))
        kept = words[index] if generator.random() < 0.5 else ""
        words[index] = kept + "".join(generator.choices(vocabulary, k=generator.randint(1, 2)))
    return " " + " ".join(words) + "."


def salad(words: list[str], generator: random.Random) -> str:
    """Words drawn by their frequency, half of the time a handful of them over and over ("If this this and this.")."""
    count = generator.randint(3, 10)
    if generator.random() < 0.5:
        words = generator.choices(words, k=generator.randint(1, 4))
    drawn = generator.choices(words, k=count)
    return " " + " ".join([drawn[0].capitalize(), *drawn[1:]]) + "."


def run_on(sentence: str, other: str, generator: random.Random) -> str:
    """The sentence followed by more than was asked for, or grown into another one half-way."""
    if generator.random() < 0.5:
        return sentence + other
    words, rest = sentence[1:].split(" "), other[1:].split(" ")
    return " " + " ".join(words[: generator.randint(1, len(words))] + rest[generator.randrange(len(rest)) :])


def generic(prompt: str, generator: random.Random) -> str:
    """Short sentences that fit anything, and the signature's own words."""
    name = " ".join(re.findall(r"[a-z]+|[A-Z][a-z]*", prompt[4 : prompt.index("(")]))
    candidates = [
        f" {name}.",
        f" {name.capitalize()}.",
        f" {prompt[4:]}",
        f" Return the {name} {name}.",
        *(f" Return {what}." for what in ("True", "it", "self", "the value", "the object", "a new object", "the name")),
        *(
            f" {what}."
            for what in ("Internal function", "Set the value", "Return True if it is not", "Not implemented")
        ),
        f" Return True if the {generator.choice(['object', 'file', 'operand', 'widget'])} is {name}.",
    ]
    return generator.choice(candidates)


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str, ended: bool = True) -> list[int]:
    """What the reward model reads: the text, then the end-of-sequence token if the response came to its end."""
    return tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id] * ended


def score(model: GPTNeoXForSequenceClassification, rows: list[list[int]]) -> Tensor:
    """(B,) float32: the score head at each row's last token. Long and short rows run apart, to pad less."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    scores = []
    for half in (order[: len(order) // 2], order[len(order) // 2 :]):
        if half:
            tokens = right_padded([rows[row] for row in half], 0)  # whatever stands behind the last token
            last = torch.tensor([len(rows[row]) - 1 for row in half])
            hidden = model.gpt_neox(input_ids=tokens).last_hidden_state[torch.arange(len(half)), last]  # (B / 2, D)
            scores.append(model.score(hidden)[:, 0])
    return torch.cat(scores)[torch.tensor(order).argsort()]


def spoilt(
    pair: Pair, other: Pair, drawn: str, vocabulary: list[str], words: list[str], generator: random.Random
) -> list[tuple[str, bool]]:
    """Responses with faults that a policy finds first when they pay, each with whether it ended."""
    cut = truncated(pair.sentence, generator)
    faults = [
        (cut, generator.random() < 0.5),
        (cut + ".", True),
        (shuffled(pair.sentence, generator), True),
        (run_on(pair.sentence, other.sentence, generator), True),
        (generic(pair.prompt, generator), True),
    ]
    sample_faults = [
        (truncated(drawn, generator), generator.random() < 0.5),
        (stuttering(drawn, generator), True),
        (run_on(drawn, other.sentence, generator), True),
    ]
    disguise = stuttering(pair.sentence, generator) if generator.random() < 0.5 else salad(words, generator)
    return [
        generator.choice(faults),
        (disguise, True),
        (garbled(pair.sentence, vocabulary, generator), True),
        generator.choice(sample_faults),
        (salad(words, generator), True),
    ]


# What each step compares for one prompt: 0 the human sentence, 1 and 2 the policy's samples at a low and at a high
# temperature, 3 and 4 human sentences about other functions, 5 to 9 `spoilt`. (better, worse, weight in the loss)
COMPARISONS = [(0, 1, 1.0), (1, 2, 1.5), (0, 3, 1.5), (0, 4, 1.5)]
FAULTS = [(0, 5, 0.5), (0, 6, 1.0), (0, 7, 0.5), (1, 8, 0.5), (2, 9, 0.5)]
COOL, HOT = 0.5, 1.2


def draw(
    policy: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], temperature: float
) -> tuple[list[str], list[bool]]:
    """The policy's response to each prompt, and whether it ended."""
    responses = sample(policy, tokenizer, prompts, temperature)
    ended = [tokenizer.eos_token_id in response for response in responses]
    return tokenizer.batch_decode(responses, skip_special_tokens=True), ended


def train_reward_model(
    pairs: Pairs,
    policy: GPTNeoXForCausalLM,
    reader: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: "DemoConfig",
    track: Track,
) -> GPTNeoXForSequenceClassification:
    """Bradley-Terry from the reader's trunk; the policy's own samples for held-out prompts score 0 ± 1.

    The reader is a language model like the policy, trained for longer: a judge that knows no more than the writer
    hardly tells the writer's samples from human sentences.
    """
    torch.manual_seed(config.seed + 1)
    generator = random.Random(config.seed + 1)
    train = pairs.train
    texts, ended = zip(
        *(draw(policy, tokenizer, [pair.prompt for pair in train], temperature) for temperature in (COOL, HOT)),
        strict=True,
    )
    vocabulary = [text for text in tokenizer.batch_decode([[id] for id in range(len(tokenizer))]) if text.isalpha()]
    words = [word for pair in train for word in re.findall("[a-z]+", pair.sentence)]
    model_config = copy.deepcopy(reader.config)
    model_config.num_labels = 1
    model = GPTNeoXForSequenceClassification(model_config)
    model.gpt_neox.load_state_dict(reader.gpt_neox.state_dict())
    steps, optims = config.reward_steps, optimizers(model, config.reward_learning_rate, weight_decay=0.0)
    rows: list[int] = []
    for index in track(range(steps), "the reward model learns preferences", steps):
        if len(rows) < config.reward_rows:
            rows += generator.sample(range(len(train)), len(train))
        batch, rows = rows[: config.reward_rows], rows[config.reward_rows :]
        # Faults are the easier lesson: shown from the start, they keep the model from ever learning what is about what.
        faults = index >= config.relevance_share * steps
        sequences = []
        for row in batch:
            pair, others = train[row], generator.sample(train, 2)
            responses = [(pair.sentence, True), *((texts[heat][row], ended[heat][row]) for heat in (0, 1))]
            responses += [(other.sentence, True) for other in others]
            if faults:
                responses += spoilt(pair, others[0], texts[0][row], vocabulary, words, generator)
            sequences += [encode(tokenizer, pair.prompt, response, end) for response, end in responses]
        scores = score(model, sequences).view(len(batch), -1)  # (rows, 5 or 10)
        better, worse, weight = zip(*(COMPARISONS + FAULTS if faults else COMPARISONS), strict=True)
        losses = -nn.functional.logsigmoid(scores[:, better] - scores[:, worse]).mean(0)  # (comparisons,)
        loss = (losses * torch.tensor(weight)).mean()
        step(model, optims, loss, learning_rate_share(index, steps))
    normalise(model.eval(), policy, tokenizer, [pair.prompt for pair in pairs.heldout], config.temperature)
    return model


@torch.no_grad()
def normalise(
    model: GPTNeoXForSequenceClassification,
    policy: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float,
) -> None:
    """Scale and shift the score so that the policy's own samples have mean 0 and standard deviation 1.

    The score head has no bias, so the shift goes into the bias of the layer norm before it: score = wᵀ(n + b) moves
    by c when b moves by c·w/|w|². Both survive save_pretrained, whoever loads the model.
    """
    prompts = prompts * 3
    texts, ended = draw(policy, tokenizer, prompts, temperature)
    rows = [encode(tokenizer, *row) for row in zip(prompts, texts, ended, strict=True)]
    scores = torch.cat([score(model, rows[start : start + 128]) for start in range(0, len(rows), 128)])
    weight = model.score.weight[0]  # (D,)
    weight /= scores.std()
    shift = scores.mean() / scores.std() / weight.square().sum()
    model.gpt_neox.final_layer_norm.bias.sub_(shift * weight)
