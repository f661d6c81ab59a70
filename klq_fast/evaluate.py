"""Evaluation on held-out prompts: what the policy answers, what it scores, how far it is from the reference."""

from collections.abc import Sequence

from .data import Prompt
from .metrics import Record
from .models import Policy
from .rollout import EVAL_STREAM, Generator, with_logprobs


def evaluate(
    generator: Generator,
    reference: Policy,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    tau: float,
    max_tokens: int,
) -> tuple[Record, list[Record]]:
    """One sampled response to each prompt, with the same random numbers at every evaluation.

    Returns:
        Means over the prompts: score, kl (Σ log π/π_b, per sequence), rlhf_reward (score − τ·kl, Eq. 3),
        response_length (tokens), no_eos (the share that did not end by itself).
        And a record for each prompt: prompt, response, score.
    """
    scores: list[float] = []
    kls: list[float] = []
    lengths: list[int] = []
    ended: list[bool] = []
    samples: list[Record] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        rollout = generator.respond(part, range(start, start + len(part)), EVAL_STREAM)
        part_scores, texts = generator.score(part, rollout)
        rollout = with_logprobs(rollout, generator.policy, reference, max_tokens)
        scores += part_scores.tolist()
        kls += rollout.log_ratio.sum(1).tolist()
        lengths += rollout.response_lengths.tolist()
        ended += rollout.ended.tolist()
        for prompt, text, score in zip(part, texts, part_scores.tolist(), strict=True):
            samples.append({"prompt": prompt.text, "response": text, "score": score})
    count = len(prompts)
    score, kl = sum(scores) / count, sum(kls) / count
    record = {
        "score": score,
        "rlhf_reward": score - tau * kl,
        "kl": kl,
        "response_length": sum(lengths) / count,
        "no_eos": 1 - sum(ended) / count,
    }
    return record, samples
