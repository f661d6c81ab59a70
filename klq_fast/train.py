"""The training loop: `python -m klq_fast.train [demo|imdb|tldr|hh|custom] [options]`, readable from top to bottom.

It runs in one process or, by `torchrun --nproc-per-node K -m klq_fast.train …` (or `accelerate launch -m …`), in K that
do the same steps: what they share goes through distributed.py, and what a run writes through run.py's Journal.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import distributed, memory, options
from .batch import Rollout
from .checkpoint import restore_checkpoint, save_checkpoint
from .config import Config, InputError
from .data import Prompt, Prompts, check_dataset, load_prompts
from .distributed import share_rollout, share_rows
from .evaluate import check_lengths, evaluate
from .flops import throughput
from .klq import KLQ
from .metrics import Record, Reporter, check_tracker, peak_memory_bytes
from .models import Policy, check_folder, load_policy, load_reference, load_tokenizer
from .ppo import PPO
from .presets import EMBEDDED, exact_evaluation, parse_command_line, what_it_reads, with_demo_models
from .reward import load_reward, reward_from_function, shifted
from .rollout import TRAIN_STREAM, Generator, with_logprobs
from .run import Clock, Journal, StopRequest, export, locked, open_run, resume_command
from .update import Algorithm, Limits, NotFinite, update
from .watch import diversity

ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {"klq": KLQ.from_config, "ppo": PPO.from_config}


def main(args: Sequence[str] | None = None) -> None:
    try:
        distributed.start(None)
        train(distributed.from_first(lambda: parse_command_line(sys.argv[1:] if args is None else args)))
        distributed.stop()
    except (InputError, FloatingPointError) as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(distributed.out_of_memory(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def fail(message: str) -> None:
    if distributed.first_to_say(otherwise=False):
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def train(config: Config) -> None:
    """A whole run: checks what it can, loads, trains batch by batch, and exports the policy."""
    check_names(config)
    run = distributed.from_first(lambda: open_run(config))
    if config.dry_run:
        return distributed.from_first(lambda: describe(config))
    options.check(config)
    check_tracker(config.tracker)
    device = distributed.start(config.threads).device
    config = distributed.from_first(lambda: with_demo_models(config))
    parts = load(config, device)

    with (
        locked(run),
        Reporter(config.num_batches, quiet=not distributed.is_first()) as reporter,
        StopRequest(reporter.say) as stop,
        distributed.watched(f"go on with: {resume_command(config)}"),
    ):
        config, parts, first = with_shift(config, parts)
        journal = Journal(run, config, reporter)
        done = restore_checkpoint(run / "checkpoints", parts.masters, parts.optimizer)
        distributed.refresh(parts.policy, parts.masters)
        journal.start(done)
        limits = Limits(config.microbatch_tokens, reporter.say)
        checkpoint = partial(save_checkpoint, run / "checkpoints", policy=parts.masters, optimizer=parts.optimizer)
        good = True  # the weights

        def evaluate_if_due() -> None:
            due = done % config.eval_every == 0 or done == config.num_batches
            if due and not journal.evaluated(done):
                record, samples = first if first and not done else evaluated(config, parts)
                journal.evaluation({"batch": done, "episodes": done * config.batch_size} | record, samples)

        reporter.say(opening(config, parts, run, done))
        try:
            evaluate_if_due()
            while done < config.num_batches:
                rollout, record = one_batch(config, parts, done, limits, Clock(device))
                done, good = done + 1, not limits.skipped_in_a_row
                if not good:  # the last step was not made: were the weights what is wrong?
                    good = finite(rollout, parts.policy, config)
                (memory_bytes,) = distributed.all_max(peak_memory_bytes(device))
                journal.batch(record | parts.speed(rollout, record) | {"peak_memory_bytes": memory_bytes})

                evaluate_if_due()
                (signal_number,) = distributed.all_max(stop.requested)
                if good and (signal_number or done % config.checkpoint_every == 0 or done == config.num_batches):
                    checkpoint(done)
                    journal.draw()
                if signal_number and done < config.num_batches:
                    reporter.say(f"stopped after batch {done}; go on with: {resume_command(config)}")
                    raise SystemExit(128 + signal_number)
        except InputError:  # a reward may fail at any time: what was learned until then is kept
            if done and good:
                checkpoint(done)
            reporter.say(f"failed after batch {done}; once mended, go on with: {resume_command(config)}")
            raise
        except NotFinite as error:
            if done and error.good:
                checkpoint(done)
            chosen = [episodes_of(config, done)[row] for row in error.rows]
            rows = journal.rows(f"not_finite-{done + 1:06d}.jsonl", error.minibatch, chosen)
            reporter.say(f"the rows of the last of these steps are in {rows}")
            raise

        journal.draw()
        export(run, parts.masters, parts.tokenizer)
        journal.show_samples()
        reporter.say(f"done: the policy is in {run / 'policy'}, figures in {run / 'plots'}")


@dataclass(frozen=True)
class Parts:
    """What a run works with, loaded and on its device."""

    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    policy: Policy  # computes
    masters: Policy  # is trained; see distributed.sharded
    reference: Policy
    fetched: Callable[[], AbstractContextManager[None]]  # inside, the reference is on the device
    generator: Generator
    algorithm: Algorithm
    optimizer: torch.optim.Optimizer
    exact: Callable[[], Record]  # what is known of the policy without sampling
    speed: Callable[[Rollout, Record], Record]


def load(config: Config, device: torch.device) -> Parts:
    assert config.policy and config.dataset
    tokenizer = load_tokenizer("policy", config.policy)
    prompts = load_prompts(config.dataset, tokenizer, config.prompt_length, config.eval_prompts)
    reward = load_reward(
        config.reward,
        config.reward_model,
        device,
        config.microbatch_tokens,
        eos=config.reward_eos,
        shift=config.reward_shift,
        offload=config.offload,
    )
    loaded = options.prepared(load_policy(config.policy, config.temperature, torch.device("cpu")), config)
    check_lengths([*prompts.train, *prompts.heldout], loaded, config.response_length)
    policy, masters = distributed.sharded(loaded, device)
    if config.activation_checkpointing:
        options.checkpoint_activations(policy.model)
    if config.lora_rank:
        reference = cast(Policy, options.WithoutAdapters(policy))
    else:
        reference = load_reference(config.policy, config.temperature, device)
    waits = config.offload and not config.lora_rank
    fetched = partial(options.on_device, reference.to("cpu"), device) if waits else nullcontext
    generator = Generator(
        policy,
        tokenizer,
        reward,
        config.response_length,
        config.missing_eos_penalty,
        config.seed,
        config.microbatch_tokens,
    )
    algorithm = ALGORITHMS[config.algorithm](config)
    optimizer = options.adam(masters, config)
    with fetched():
        exact = exact_evaluation(config, generator, reference, prompts.heldout)
    speed = throughput(policy, config, distributed.world().size)
    return Parts(prompts, tokenizer, policy, masters, reference, fetched, generator, algorithm, optimizer, exact, speed)


def with_shift(config: Config, parts: Parts) -> tuple[Config, Parts, tuple[Record, list[Record]] | None]:
    """With the number for --reward-shift reference, by which the first evaluation, which comes with it, starts at 0."""
    if config.reward_shift != "reference":
        return config, parts, None
    record, samples = evaluated(config, parts)
    shift = -record["score"]
    reward = shifted(parts.generator.reward, shift)
    record["rlhf_reward"] += shift
    for each in (record, *samples):
        each["score"] += shift
    parts = replace(parts, generator=replace(parts.generator, reward=reward))
    return replace(config, reward_shift=shift), parts, (record, samples)


def opening(config: Config, parts: Parts, run: Path, done: int) -> str:
    prompts = parts.prompts
    return (
        f"{config.algorithm.upper()} on {distributed.described()}: {len(prompts.train)} prompts, "
        f"{len(prompts.heldout)} held out, {prompts.truncated} cut to {config.prompt_length} tokens; "
        f"{config.num_batches} batches of {config.batch_size}; run folder {run}"
        + ("" if parts.policy.packed else "; padded, as the policy's attention does not take packed sequences")
        + (f"; going on after batch {done}" if done else "")
    )


def evaluated(config: Config, parts: Parts) -> tuple[Record, list[Record]]:
    with parts.fetched():
        record, samples = evaluate(
            parts.generator,
            parts.reference,
            parts.prompts.heldout,
            batch_size=config.batch_size,
            tau=config.tau,
            max_tokens=config.microbatch_tokens,
        )
        return record | parts.exact(), samples


def one_batch(config: Config, parts: Parts, done: int, limits: Limits, clock: Clock) -> tuple[Rollout, Record]:
    """The batch after `done` ones, from prompts to new weights; its record."""
    episodes, generator = episodes_of(config, done), parts.generator
    prompts = parts.prompts.take(config.seed, episodes.start, len(episodes))
    rollout = respond(generator, prompts, episodes)
    clock.lap("rollout")
    scores = score(generator, prompts, rollout)
    rollout = generator.rewarded(rollout, scores)
    clock.lap("score")
    if done == 0:
        parts.masters.start_values(rollout.rewards)
        distributed.refresh(parts.policy, parts.masters)
    with parts.fetched():
        rollout = measure(rollout, parts.policy, parts.reference, limits.max_tokens)
    rollout = parts.algorithm.targets(rollout)
    clock.lap("logprobs")
    losses = update(parts.policy, parts.masters, parts.optimizer, parts.algorithm, rollout, config, done, limits)
    clock.lap("update")
    record: Record = {"batch": done + 1, "episodes": episodes.stop}
    # The KL of whole sequences before the update stands for the loss's, of tokens during it.
    record |= losses | rollout_metrics(rollout, scores, config.tau) | diversity(rollout)
    return rollout, record | clock.phases | {"seconds": clock.seconds}


def episodes_of(config: Config, done: int) -> range:
    """The episodes of the batch after `done` ones: they are numbered through all batches."""
    return range(done * config.batch_size, (done + 1) * config.batch_size)


# A batch's work before the update, shared by the processes.


def respond(generator: Generator, prompts: Sequence[Prompt], episodes: Sequence[int]) -> Rollout:
    def work(rows: list[int]) -> Rollout:
        return generator.respond([prompts[i] for i in rows], [episodes[i] for i in rows], TRAIN_STREAM)

    return share_rollout([len(prompt.tokens) for prompt in prompts], work)


def score(generator: Generator, prompts: Sequence[Prompt], rollout: Rollout) -> Tensor:  # (B,)
    def work(rows: list[int]) -> list[float]:
        scores, _ = generator.score([prompts[i] for i in rows], rollout.rows(torch.tensor(rows)))
        return scores.tolist()

    return torch.tensor(share_rows(distributed.row_sizes(rollout), work), device=rollout.device)


def measure(rollout: Rollout, policy: Policy, reference: Policy, max_tokens: int) -> Rollout:
    """With old and reference log-probs, and old values."""
    return share_rollout(
        distributed.row_sizes(rollout),
        lambda rows: with_logprobs(rollout.rows(torch.tensor(rows)), policy, reference, max_tokens),
    )


def finite(rollout: Rollout, policy: Policy, config: Config) -> bool:
    """Whether the policy as it is gives this batch finite log-probs and values."""
    found = measure(rollout, policy, policy, config.microbatch_tokens)
    return bool(torch.cat([found.logprobs, found.values]).isfinite().all())


def rollout_metrics(rollout: Rollout, scores: Tensor, tau: float) -> Record:
    """Means over the batch's sequences; kl is Σ log π_old/π_b over a sequence, rlhf_reward Eq. 3."""
    score, kl = float(scores.mean()), float(rollout.log_ratio.sum(1).mean())
    returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
    variance = returns.var(correction=0)
    explained = 1 - (returns - values).var(correction=0) / variance
    return {
        "score": score,
        "score_std": float(scores.std(correction=0)),
        "rlhf_reward": score - tau * kl,
        "kl": kl,
        "response_length": float(rollout.response_lengths.float().mean()),
        "no_eos": float((~rollout.ended).float().mean()),
        "explained_variance": float(torch.where(variance > 0, explained, 0.0)),  # of the returns, by the values
    }


def check_names(config: Config) -> None:
    """What can be known before any work: is everything named, and there? Embedded tasks make what is not named."""
    if config.preset not in EMBEDDED:
        for name in ("policy", "dataset"):
            if getattr(config, name) is None:
                none = f"; nor is there a run in {config.output_dir} to go on with" if config.resume else ""
                raise InputError(f"--{name}: got none, and the preset {config.preset} does not name one{none}")
        if not config.reward and not config.reward_model:
            raise InputError("--reward-model: got none, and no --reward, a Python function: expected one of them")
    if config.reward:
        reward_from_function(config.reward)
    if config.policy:
        check_folder("policy", config.policy)
    if config.reward_model:
        check_folder("reward-model", config.reward_model)
    if config.dataset:
        check_dataset(config.dataset)


def describe(config: Config) -> None:
    """--dry-run: reads the prompts, loads no model and writes nothing."""

    def lines() -> Iterator[str]:
        yield f"{config.num_batches} batches; run folder {config.output_dir}"
        prompt_lengths = yield from what_it_reads(config)
        if config.policy:
            yield from memory.table(config, prompt_lengths)

    print(config.to_yaml(), end="")
    for line in lines():
        print(f"# {line}")


if __name__ == "__main__":
    main()
