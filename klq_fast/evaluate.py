"""Evaluation on held-out prompts: `python -m klq_fast.evaluate RUN`; the loop and the judge use its parts."""

import dataclasses
import json
import math
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from . import distributed
from .batch import Responses, Rollout
from .config import Config, InputError
from .data import Prompt, check_dataset, load_prompts
from .distributed import share_rows
from .metrics import Record, write_text
from .models import Policy, check_folder, load_reference, load_tokenizer, max_positions
from .reward import load_reward, reward_from_function
from .rollout import EVAL_STREAM, Generator, with_logprobs

RESAMPLES = 2000  # the ends of a 95 % interval are then uncertain by 3 % of its half-width
NGRAMS = (1, 2, 3)
MAX_LOGITS = 2**24  # 64 MiB in fp32, of which the exact KL holds about six


def load_run(run: Path) -> tuple[str, Config]:
    """The policy that a finished run has trained, and its settings, whose `policy` is the one that it started from.

    Raises:
        InputError: no folder of a run, or a run that is not finished.
    """
    settings = run / "config.yaml"
    if not settings.is_file():
        raise InputError(f"{run}: got no config.yaml in it, expected the folder of a run")
    if not (run / "policy").is_dir():
        raise InputError(f"{run}: got no policy/ in it, expected a finished run; --resume goes on with it")
    return str(run / "policy"), Config.from_yaml(settings.read_text(encoding="utf-8"))


def respond_to_heldout(
    policy: str, config: Config, *, count: int | None = None, sample: int = 0, greedy: bool = False
) -> tuple[list[Prompt], list[str], list[bool]]:
    """What a policy (a folder or a hub name) answers to the first `count` held-out prompts, or to all there are.

    `config` gives the dataset and how to respond: prompt_length, response_length, temperature, seed. Which prompts are
    held out depends on the dataset alone, so that two runs of the same data get the same ones, in the same order, each
    as its own tokenizer writes it; a larger `count` extends a smaller one. sample: 0, 1, … are independent responses.
    Neither a reward nor a reference is loaded. For a run's folder:

        prompts, responses, ended = respond_to_heldout(*load_run(run), count=32)

    Returns:
        The prompts, the responses' texts, and which of them ended by themselves.
    Raises:
        InputError: what of `config` cannot be loaded.
    """
    if not config.dataset:
        raise InputError("--dataset: got none, expected the prompts to answer")
    device = distributed.start(config.threads).device
    tokenizer = load_tokenizer("policy", policy)
    prompts = load_prompts(config.dataset, tokenizer, config.prompt_length, config.eval_prompts).heldout[:count]
    model = load_reference(policy, config.temperature, device)
    check_lengths(prompts, model, config.response_length)
    generator = Generator(model, tokenizer, _never, config.response_length, 0.0, config.seed, config.microbatch_tokens)
    responses: list[str] = []
    ended: list[bool] = []
    for _, rollout in answers(generator, prompts, config.batch_size, sample=sample, greedy=greedy):
        responses += generator.texts(rollout)
        ended += rollout.ended.tolist()
    return prompts, responses, ended


def answers(
    generator: Generator, prompts: Sequence[Prompt], batch_size: int, *, sample: int = 0, greedy: bool = False
) -> Iterator[tuple[Sequence[Prompt], Rollout]]:
    """A response to each prompt, batch by batch. The seed, the prompt's place and `sample` decide the random numbers:
    they are the same at every evaluation."""
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        yield part, generator.respond(part, range(start, start + len(part)), EVAL_STREAM + sample, greedy=greedy)


def _never(prompts: Sequence[Prompt], responses: Sequence[str], ended: Sequence[bool]) -> Tensor:
    raise AssertionError("nothing is scored here")


def check_lengths(prompts: Sequence[Prompt], policy: Policy, response_length: int) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    positions = max_positions(policy.model)
    if positions is not None and longest + response_length > positions:
        raise InputError(
            f"--policy: it has {positions} positions, fewer than the longest prompt's {longest} tokens + "
            f"--response-length {response_length}; lower --prompt-length or --response-length"
        )


@dataclass(frozen=True)
class Answers:
    """K responses to each of P prompts, measured."""

    figures: dict[str, NDArray[np.float64]]  # (P, K) each, by name: score, kl, …
    texts: list[list[str]]  # K lists of P
    tokens: list[list[list[int]]]  # K lists of P responses, without the token that ends one


def collect(
    generator: Generator,
    reference: Policy | None,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_tokens: int,
    samples: int = 1,
    greedy: bool = False,
    exact: bool = False,
) -> Answers:
    """Answers each prompt `samples` times, scores the answers and, with a reference, estimates the KL from it.

    The figures: score; response_length (tokens, the ending one counted); eos_rate (1 where the response ended by
    itself); kl, kl_k3 and, where asked for, kl_exact: three estimates of KL(π(y|x)‖π_b(y|x)) in nats that are unbiased
    for responses drawn from π (see `sequence_kl` and `exact_kl`).
    """

    def answer(sample: int, rows: Sequence[int]) -> list[tuple[dict[str, float], str, list[int]]]:
        part = [prompts[row] for row in rows]
        rollout = generator.respond(part, rows, EVAL_STREAM + sample, greedy=greedy)
        scores, responses = generator.score(part, rollout)
        columns = {"score": scores}
        if reference is not None:
            rollout = with_logprobs(rollout, generator.policy, reference, max_tokens)
            columns["kl"], columns["kl_k3"] = sequence_kl(rollout.log_ratio)
            if exact:
                columns["kl_exact"] = exact_kl(rollout, generator.policy, reference, max_tokens)
        columns |= {"response_length": rollout.response_lengths, "eos_rate": rollout.ended}
        lists = [column.double().tolist() for column in columns.values()]
        figures = [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
        lengths = rollout.response_lengths - rollout.ended.long()
        tokens = [row[:n] for row, n in zip(rollout.response_tokens.tolist(), lengths.tolist(), strict=True)]
        return list(zip(figures, responses, tokens, strict=True))

    answered = []
    for sample in range(samples):
        for start in range(0, len(prompts), batch_size):
            batch = range(start, min(start + batch_size, len(prompts)))
            sizes = [len(prompts[row].tokens) for row in batch]
            answered += share_rows(sizes, lambda mine: answer(sample, [batch[i] for i in mine]))  # noqa: B023
    figures, texts, tokens = zip(*answered, strict=True)
    shape = samples, len(prompts)
    return Answers(
        {name: np.array([row[name] for row in figures]).reshape(shape).T for name in figures[0]},
        [list(texts[i : i + len(prompts)]) for i in range(0, len(texts), len(prompts))],
        [list(tokens[i : i + len(prompts)]) for i in range(0, len(tokens), len(prompts))],
    )


def evaluate(
    generator: Generator,
    reference: Policy,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    tau: float,
    max_tokens: int,
) -> tuple[Record, list[Record]]:
    """The loop's evaluation: one sampled response to each prompt, with the same random numbers every time.

    Returns:
        Means over the prompts: score, kl (Σ log π/π_b, per sequence), rlhf_reward (score − τ·kl, Eq. 3),
        response_length (tokens), no_eos (the share that did not end by itself).
        And a record for each prompt: prompt, response, score.
    """
    found = collect(generator, reference, prompts, batch_size=batch_size, max_tokens=max_tokens)
    mean = {name: float(values.mean()) for name, values in found.figures.items()}
    record = {
        "score": mean["score"],
        "rlhf_reward": mean["score"] - tau * mean["kl"],
        "kl": mean["kl"],
        "response_length": mean["response_length"],
        "no_eos": 1 - mean["eos_rate"],
    }
    scores = found.figures["score"][:, 0].tolist()
    samples: list[Record] = [
        {"prompt": prompt.text, "response": text, "score": score}
        for prompt, text, score in zip(prompts, found.texts[0], scores, strict=True)
    ]
    return record, samples


# The KL of a response's distribution from the reference's.


def sequence_kl(log_ratio: Tensor) -> tuple[Tensor, Tensor]:  # (B, T), 0 in the padding -> (B,), (B,)
    """Two estimates of KL(π(y|x)‖π_b(y|x)) from y ~ π and its ℓ_t = log π/π_b: Σ ℓ_t and Σ (e^−ℓ_t − 1 + ℓ_t).

    Both are unbiased, since E_π[π_b/π | s_t] = 1 wherever π is positive. The second (k3) is never below 0 and, where
    the two policies are close, varies far less: as ℓ²/2 against ℓ.
    """
    log_ratio = log_ratio.double()
    return log_ratio.sum(1), (torch.expm1(-log_ratio) + log_ratio).sum(1)


@torch.no_grad()
def exact_kl(rollout: Rollout, policy: Policy, reference: Policy, max_tokens: int) -> Tensor:  # (B,)
    """Σ_t D(π‖π_b)(s_t) (Eq. 2) along each response, each term summed over the whole vocabulary, in nats.

    Its mean over y ~ π is KL(π(y|x)‖π_b(y|x)); only the states are sampled. Logits exist for MAX_LOGITS / V tokens at a
    time.
    """
    result = torch.zeros(len(rollout), dtype=torch.float64, device=rollout.prompt_tokens.device)
    for rows in rollout.microbatches(max_tokens):
        batch = rollout.rows(rows)
        (hidden, head), (ref_hidden, ref_head) = policy(batch, _states), reference(batch, _states)
        step = max(1, MAX_LOGITS // len(head.weight))
        divergences = []
        for some, ref_some in zip(hidden.split(step), ref_hidden.split(step), strict=True):
            logprobs, ref_logprobs = _logprobs(policy, head, some), _logprobs(reference, ref_head, ref_some)
            divergences.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1, dtype=torch.float64))
        mask = batch.mask
        per_token = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        result[rows] = per_token.masked_scatter(mask, torch.cat(divergences)).sum(1)
    return result


def _states(_: Responses, hidden: Tensor, head: nn.Linear, *__: object) -> tuple[Tensor, nn.Linear]:
    """What `exact_kl` needs of a policy's forward: the trunk's output (N, D) at the response's tokens, and the head."""
    return hidden, head


def _logprobs(policy: Policy, head: nn.Linear, hidden: Tensor) -> Tensor:  # (n, D) -> (n, V)
    # In fp32 where the head is in bf16: rounded logits would not sum to a distribution of these states' log-probs.
    logits = nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())
    if policy.softcap is not None:
        logits = policy.softcap * torch.tanh(logits / policy.softcap)
    return (logits / policy.temperature).log_softmax(-1)


# Means over prompts, and how sure they are.


def bootstrap(
    values: NDArray[np.float64],  # (P, M)
    confidence: float,
    seed: int = 0,
) -> NDArray[np.float64]:  # (2, M)
    """Percentile intervals of the columns' means: their quantiles over RESAMPLES drawings of P rows with replacement.

    A row is a prompt (the mean over its samples): responses to one prompt are alike, so that drawing them one by one
    would make the intervals too narrow. NaN for fewer than two rows, which say nothing about how prompts differ.
    """
    count = len(values)
    if count < 2:
        return np.full((2, values.shape[1]), np.nan)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.quantile(draws @ values / count, _tails(confidence), axis=0)


def distinct(
    tokens: Sequence[Sequence[Sequence[int]]],  # K lists of P responses
    n: int,
    confidence: float,
) -> tuple[float, float, float]:
    """distinct-n (arXiv 1510.03055): of the n-grams of P responses, one to each prompt, the share that are different.

    The mean over the K lists, and its interval. Repetition within a response and across prompts both lower it; it
    depends on P and on the responses' length. NaN where no response has n tokens.

    The interval is the jackknife's, from what the share would be without each prompt, and rather wide (Efron and Stein
    1981): prompts drawn with replacement, as in `bootstrap`, would repeat n-grams that the policy did not repeat.
    """
    size = len(tokens[0])
    shares, without = [], []
    for responses in tokens:
        counts = [Counter(zip(*(response[i:] for i in range(n)), strict=False)) for response in responses]
        owners = Counter(gram for counter in counts for gram in counter)  # in how many responses each occurs
        alone = np.array([sum(owners[gram] == 1 for gram in counter) for counter in counts])
        totals = np.array([counter.total() for counter in counts])
        with np.errstate(invalid="ignore"):
            shares.append(len(owners) / totals.sum())
            without.append((len(owners) - alone) / (totals.sum() - totals))
    value, left = float(np.mean(shares)), np.mean(without, axis=0)  # (P,)
    error = math.sqrt((size - 1) * left.var()) if size > 1 else math.nan
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    low, high = np.clip([value - reach, value + reach], 0, 1).tolist()
    return value, low, high


def _tails(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def summarise(found: Answers, tau: float, confidence: float) -> dict[str, Record]:
    """Each figure's mean over prompts and samples, and its interval's ends: {"score": {"mean": …, "low": …, …}, …}."""
    figures = dict(found.figures)
    if "kl" in figures:
        figures["rlhf_reward"] = figures["score"] - tau * figures["kl"]  # Eq. 3
    figures = {name: figures[name] for name in LABELS if name in figures}
    by_prompt = np.stack([values.mean(1) for values in figures.values()], axis=1)  # (P, M)
    lows, highs = bootstrap(by_prompt, confidence)
    rows = list(zip(by_prompt.mean(0), lows, highs, strict=True))
    rows += [distinct(found.tokens, n, confidence) for n in NGRAMS]
    names = [*figures, *(f"distinct_{n}" for n in NGRAMS)]
    return {
        name: {part: None if math.isnan(x) else float(x) for part, x in zip(("mean", "low", "high"), row, strict=True)}
        for name, row in zip(names, rows, strict=True)
    }


# The command.

LABELS = {
    "score": "score",
    "rlhf_reward": "RLHF reward, score − τ·KL",
    "kl": "KL (k1)",
    "kl_k3": "KL (k3)",
    "kl_exact": "KL (exact)",
    "response_length": "length (tokens)",
    "eos_rate": "EOS rate",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
}


@dataclass(frozen=True)
class Options:
    """Answers held-out prompts and measures the answers: a table, and JSON. What is not said is the run's, or without
    a run that of `python -m klq_fast.train custom`."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """A finished run's folder."""
    policy: str | None = None
    """The causal language model to evaluate: a folder or a hub name; by default the one that the run has trained."""
    reference: str | None = None
    """What KL is measured from; by default the policy that the run started from. Without a run and this, there is no
    KL."""
    reward_model: str | None = None
    """A sequence-classification model that scores prompt + response: a folder or a hub name."""
    reward: str | None = None
    """Instead of a reward model, a Python function MODULE:FUNCTION from (prompts, responses) to a list of floats."""
    dataset: str | None = None
    """Prompts, as for training: those held out of it are answered."""
    output: Path | None = None
    """Where the JSON goes; by default RUN/evaluation.json, and nowhere without a run."""
    samples: int = 4
    """Responses sampled to each prompt; one more is the greedy one."""
    exact_kl: bool = False
    """Also the KL summed over the whole vocabulary at each token, which costs one more forward pass of each."""
    confidence: float = 0.95
    """Of the intervals: bootstrap over prompts."""
    eval_prompts: int | None = None
    """Held-out prompts: the dataset's test split, or this many (at most a tenth) taken out of the prompts."""
    prompt_length: int | None = None
    """Tokens of the prompt at most; a longer one is cut at its last line breaks."""
    response_length: int | None = None
    """Tokens of the response at most."""
    temperature: float | None = None
    """Sampling temperature, and the temperature of every log-probability."""
    tau: float | None = None
    """τ: strength of the KL penalty in the RLHF reward."""
    seed: int | None = None
    """Sampling; the run's seed gives the last responses of its own evaluations again, as the first sample."""
    batch_size: int | None = None
    """Responses generated at a time."""
    microbatch_tokens: int | None = None
    """Tokens, padding included, in one forward pass: it bounds memory and does not change the result."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""


def main(args: Sequence[str] | None = None) -> None:
    try:
        distributed.start(None)
        run_command(distributed.from_first(lambda: tyro.cli(Options, args=args, prog="python -m klq_fast.evaluate")))
        distributed.stop()
    except InputError as error:
        if distributed.first_to_say(otherwise=False):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def run_command(options: Options) -> None:
    policy_name, reference_name, config = resolve(options)
    output = options.output or (options.run / "evaluation.json" if options.run else None)
    if output and not output.parent.is_dir():
        raise InputError(f"--output {output}: got a folder that does not exist, {output.parent}")
    assert config.dataset

    device = distributed.start(config.threads).device
    tokenizer = load_tokenizer("policy", policy_name)
    prompts = load_prompts(config.dataset, tokenizer, config.prompt_length, config.eval_prompts).heldout
    reward = load_reward(
        config.reward,
        config.reward_model,
        device,
        config.microbatch_tokens,
        eos=config.reward_eos,
        shift=config.reward_shift,
    )
    policy = load_reference(policy_name, config.temperature, device)
    reference = load_reference(reference_name, config.temperature, device) if reference_name else None
    check_lengths(prompts, policy, config.response_length)
    if reference is not None and (vocab := _vocab(policy)) != _vocab(reference):
        raise InputError(f"--reference: got a vocabulary of {_vocab(reference)}, expected the policy's {vocab}")
    generator = Generator(policy, tokenizer, reward, config.response_length, 0.0, config.seed, config.microbatch_tokens)

    measure = partial(
        collect, generator, prompts=prompts, batch_size=config.batch_size, max_tokens=config.microbatch_tokens
    )
    with distributed.watched("start it again"):
        sampled = measure(reference, samples=options.samples, exact=options.exact_kl)
        # A greedy response is no draw from the policy, so nothing about it estimates the policy's KL.
        greedy = measure(None, greedy=True)
    result: dict[str, Any] = {
        "policy": policy_name,
        "reference": reference_name,
        "reward": config.reward or config.reward_model,
        "dataset": config.dataset,
        "prompts": len(prompts),
        "samples": options.samples,
        "response_length": config.response_length,
        "temperature": config.temperature,
        "tau": config.tau,
        "seed": config.seed,
        "confidence": options.confidence,
        "sampled": summarise(sampled, config.tau, options.confidence),
        "greedy": summarise(greedy, config.tau, options.confidence),
    }
    if not distributed.is_first():
        return
    show(result)
    if output:
        write_text(output, json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        print(f"written to {output}")


def resolve(options: Options) -> tuple[str, str | None, Config]:
    """The policy, the reference and all other settings: the run's, with the options put over them."""
    if options.samples < 1:
        raise InputError(f"--samples: got {options.samples}, expected at least 1")
    if not 0 < options.confidence < 1:
        raise InputError(f"--confidence: got {options.confidence}, expected more than 0 and less than 1")
    if options.reward and options.reward_model:
        raise InputError(f"--reward {options.reward}: expected no --reward-model beside it, got {options.reward_model}")
    if options.exact_kl and not options.run and not options.reference:
        raise InputError("--exact-kl: got no --reference, expected the policy to measure from")
    if options.run:
        trained, config = load_run(options.run)
        policy, reference = options.policy or trained, options.reference or config.policy
    elif options.policy:
        config, policy, reference = Config(), options.policy, options.reference
    else:
        raise InputError("RUN: got none, and no --policy: expected a run's folder or a policy's")
    names = {field.name for field in dataclasses.fields(Config)} - {"policy"}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.reward or options.reward_model:  # the run's makes way
        given |= {"reward": options.reward, "reward_model": options.reward_model}
        given |= {"reward_eos": True, "reward_shift": 0.0}
    config = dataclasses.replace(config, minibatch_size=None, **given)  # the run's may not suit this batch size
    if not config.dataset:
        raise InputError("--dataset: got none, expected the prompts to answer")
    if not config.reward and not config.reward_model:
        raise InputError("--reward-model: got none, and no --reward, a Python function: expected one of them")
    if config.reward:
        reward_from_function(config.reward)
    for name, folder in (("policy", policy), ("reference", reference), ("reward-model", config.reward_model)):
        if folder:
            check_folder(name, folder)
    check_dataset(config.dataset)
    return policy, reference, config


def _vocab(policy: Policy) -> int:
    return len(policy.model.get_output_embeddings().weight)


def show(result: Record) -> None:
    title = f"{result['policy']}: {result['prompts']} held-out prompts, {result['confidence']:.0%} intervals"
    table = Table("", f"sampled, {result['samples']} each", "greedy", title=title)
    for name, label in LABELS.items():
        cells = []
        for kind in ("sampled", "greedy"):
            row = result[kind].get(name)
            if row is None or row["mean"] is None:
                cells.append("–")
            else:
                ends = "" if row["low"] is None else f" [{row['low']:.4g}, {row['high']:.4g}]"
                cells.append(f"{row['mean']:.4g}{ends}")
        if cells != ["–", "–"]:
            table.add_row(label, *cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if result["reference"] is None:
        console.print("no KL: there is no --reference to measure it from")


if __name__ == "__main__":
    main()
