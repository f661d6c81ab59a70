"""Failure signatures of RLHF runs, said in plain words when they show in the figures of metrics.jsonl.

Every bound is one that a healthy run keeps whatever the scale of its reward: rewards are compared with each other and
with their own noise, lengths and diversities with those at the start.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median

import torch

from .batch import Rollout
from .metrics import Record

START = 1  # batch that stands for the policy before training: the second may come from one that is ruined
RECENT = 5  # batches that stand for now
EARLIEST = 8  # no finding before this batch: some healthy runs fall in their first steps, and have recovered by then
NOISE = 4.0  # standard deviations of a difference of two means
DIFFERENCE = math.sqrt(1 / START + 1 / RECENT)  # of the two above, in standard deviations of one batch's mean
SWINGS = 3  # times in WINDOW batches; of 500 runs that did not fail two swung once, and none twice
WINDOW = 10
FAR = 0.1  # nats a sequence: below it a whole response is a tenth likelier than under the reference
STILL = 1e-5  # nats; an estimate of a KL from a policy that moves has noise of √(2·KL / batch size), far above it
COLLAPSE = 0.5  # of the length or of distinct_2 at the start
ENTROPY_COLLAPSE = 0.1  # of the entropy at the start: a healthy optimum is sharper than its reference, several times
WORTHLESS = -0.5  # explained variance of values worse than their mean by half of the returns' variance
VALUE_BATCHES = 20  # batches of it, as a fresh value head needs several to settle
NOTHING = 0.02  # explained variance that is none
NOTHING_BATCHES = 100  # batches of it: 400 optimizer steps with the paper's 4 epochs
EXPLOSION = 20.0  # times the value error's median so far


def diversity(rollout: Rollout) -> Record:
    """What falls when a policy collapses, at no cost.

    entropy: nats a token, at the sampling temperature: the mean of −log π over the sampled tokens, which estimates it
    without bias. distinct_2: the share of pairs of neighbouring response tokens, over the batch, that are distinct.
    """
    mask = rollout.mask
    tokens, both = rollout.response_tokens, mask[:, 1:]
    pairs = torch.stack([tokens[:, :-1][both], tokens[:, 1:][both]], dim=1)
    distinct = len(pairs.unique(dim=0)) / len(pairs) if len(pairs) else 1.0
    return {"entropy": -float(rollout.logprobs[mask].mean()), "distinct_2": distinct}


def watcher(tau: float, records: Iterable[Record] = ()) -> Callable[[Record], list[str]]:
    """A function that takes the records of metrics.jsonl one by one and returns what is new to say.

    records: those of before a restart. A signature is said when it shows, and again only after it went away.
    """
    history: list[Record] = []
    shown: set[str] = set()

    def watch(record: Record) -> list[str]:
        history.append(record)
        found = findings(history, tau)
        new = [text for name, text in found.items() if name not in shown]
        shown.clear()
        shown.update(found)
        return new

    for record in records:
        watch(record)
    return watch


def findings(records: Sequence[Record], tau: float) -> dict[str, str]:
    """The signatures that the run shows after these batches: a name and a sentence for each, none in a healthy run.

    records: a line of metrics.jsonl for each batch, in order. What a record lacks, or has as null, is not judged.
    """
    if len(records) < EARLIEST:
        return {}
    found = {}
    for name, check in SIGNATURES.items():
        if text := check(records, tau):
            found[name] = text
    return found


def _runaway(records: Sequence[Record], tau: float) -> str | None:
    """By Eq. 3 training maximises score − τ·KL, which was the score alone at the start: less is worse than no training.

    A KL that is paid for is no failure however large it is: at the optimum it is up to (highest − mean reward) / τ.
    """
    before, scores, kls = _at_start(records, "score"), _recent(records, "score"), _recent(records, "kl")
    if not (before and scores and kls):
        return None
    start, score, kl = fmean(before), fmean(scores), fmean(kls)
    lost = start - (score - tau * kl)
    if lost <= NOISE * DIFFERENCE * _noise(records) or kl <= FAR:
        return None
    return (
        f"KL is running away: over {RECENT} batches it is {kl:.3g} nats a sequence and costs {tau * kl:.3g} (τ·KL), "
        f"while the score went from {start:.3g} to {score:.3g}: worse than the reference by {lost:.3g}. "
        "Try a lower --learning-rate, then fewer --epochs, then a larger --tau"
    )


def _swinging(records: Sequence[Record], tau: float) -> str | None:
    """A policy that learns goes one way; one whose steps are too long is thrown back by the next."""
    recent = records[-WINDOW:]
    scores = _values(recent, "score")
    steps, least = [b - a for a, b in itertools.pairwise(scores)], NOISE * math.sqrt(2) * _noise(recent)
    swings = [abs(b) for a, b in itertools.pairwise(steps) if a * b < 0 and min(abs(a), abs(b)) > least]
    if len(swings) < SWINGS:
        return None
    return (
        f"the policy is thrown to and fro: in {len(recent)} batches the score swung {len(swings)} times, by "
        f"{fmean(swings):.3g} on average, where the sampling of responses explains {least / NOISE:.2g}. Try a lower "
        "--learning-rate, then fewer --epochs"
    )


def _still(records: Sequence[Record], tau: float) -> str | None:
    """Samples of a policy equal to its reference have a log-ratio of exactly 0."""
    kls, norms, rates = (_recent(records, name) for name in ("kl", "grad_norm", "learning_rate"))
    if not (kls and norms and rates) or min(rates) <= 0:
        return None
    if max(norms) == 0:
        return (
            f"the policy is not moving: the gradient was 0 in {RECENT} batches. Does the reward tell responses apart? "
            "Is anything of the policy trained?"
        )
    if max(map(abs, kls)) >= STILL:
        return None
    top = max(_values(records, "kl"))
    if top > 1e3 * STILL:
        return (
            f"KL has collapsed to zero: {max(kls):.2g} nats a sequence after {top:.3g} before: the policy is back at "
            "its reference. Is --tau far above the scale of the reward?"
        )
    return (
        f"the policy is not moving: KL is {max(kls):.2g} nats a sequence after {len(records)} batches with a learning "
        f"rate of {rates[-1]:.2g} and a gradient norm of {norms[-1]:.2g}. Try a higher --learning-rate; is the "
        "reward's scale tiny?"
    )


def _values_worthless(records: Sequence[Record], tau: float) -> str | None:
    """Values that say one constant explain 0 of the returns' variance; below that they add noise to every target."""
    explained = _values(records, "explained_variance")
    # One batch with nearly equal returns has any value below 0: medians, not means.
    if len(explained) >= EARLIEST + VALUE_BATCHES and (low := median(explained[-VALUE_BATCHES:])) < WORTHLESS:
        return (
            f"the value head is worse than a constant: it explains {low:.2g} of the returns' variance (median of "
            f"{VALUE_BATCHES} batches). Try a lower --learning-rate or a smaller --value-weight or --value-coef"
        )
    if len(explained) >= EARLIEST + NOTHING_BATCHES and max(explained[-NOTHING_BATCHES:]) < NOTHING:
        return (
            f"the value head explains nothing: at most {max(explained[-NOTHING_BATCHES:]):.2g} of the returns' "
            f"variance in {NOTHING_BATCHES} batches. Try a larger --value-weight or --value-coef, or more --epochs; if "
            "the reward cannot be foreseen at all, nothing is wrong"
        )
    return None


def _values_explode(records: Sequence[Record], tau: float) -> str | None:
    """The squared error of the values, KLQ's value_error or PPO's value_loss, against its own median.

    It may grow with the returns' variance, when a rare reward is found, say; so long as the values explain some of
    that, nothing is wrong.
    """
    explained = _recent(records, "explained_variance")
    if explained and max(explained) >= NOTHING:
        return None
    for name in ("value_error", "value_loss"):
        errors, recent = _values(records[START:-RECENT], name), _recent(records, name)
        if len(errors) >= RECENT and recent and min(recent) > EXPLOSION * median(errors) > 0:
            return (
                f"the value head explodes: its {name} is {fmean(recent):.3g} over {RECENT} batches, after a median of "
                f"{median(errors):.3g}. Try a lower --learning-rate or a smaller --value-weight or --value-coef"
            )
    return None


def _hacking(records: Sequence[Record], tau: float) -> str | None:
    """The reward rises by a way that leaves less and less of a language model."""
    before, scores = _at_start(records, "score"), _recent(records, "score")
    if not (before and scores) or fmean(scores) - fmean(before) <= NOISE * DIFFERENCE * _noise(records):
        return None
    fallen = []
    for name, what, least in (
        ("response_length", "the responses' length", COLLAPSE),
        ("distinct_2", "the share of distinct token pairs", COLLAPSE),
        ("entropy", "the entropy per token", ENTROPY_COLLAPSE),
    ):
        first, now = _at_start(records, name), _recent(records, name)
        if first and now and fmean(now) < least * fmean(first):
            fallen.append(f"{what} fell from {fmean(first):.3g} to {fmean(now):.3g}")
    if not fallen:
        return None
    return (
        f"this looks like reward hacking: the score rose from {fmean(before):.3g} to {fmean(scores):.3g} while "
        f"{' and '.join(fallen)}. Read samples.jsonl; try a larger --tau, or a reward that sees it"
    )


# Run in this order; the names keep track of what was said.
SIGNATURES: dict[str, Callable[[Sequence[Record], float], str | None]] = {
    "kl_runaway": _runaway,
    "swinging": _swinging,
    "not_moving": _still,
    "values_worthless": _values_worthless,
    "values_explode": _values_explode,
    "reward_hacking": _hacking,
}


def _values(records: Sequence[Record], name: str) -> list[float]:
    found = (record.get(name) for record in records)
    return [float(value) for value in found if value is not None and math.isfinite(value)]


def _at_start(records: Sequence[Record], name: str) -> list[float]:
    return _values(records[:START], name)


def _recent(records: Sequence[Record], name: str) -> list[float]:
    return _values(records[-RECENT:], name)


def _noise(records: Sequence[Record]) -> float:
    """The standard deviation of a batch's mean score, if the policy did not change: from the spread of the scores in
    all these batches, as a rare reward leaves many of them without any."""
    spreads, last = _values(records, "score_std"), records[-1]
    if not (spreads and "episodes" in last):
        return math.inf
    return math.sqrt(fmean(spread**2 for spread in spreads) * last["batch"] / last["episodes"])
