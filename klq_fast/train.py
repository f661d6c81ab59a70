"""The training loop: `python -m klq_fast.train [demo|imdb|tldr|hh|custom] [options]`, readable from top to bottom.

It runs in one process or, by `torchrun --nproc-per-node K -m klq_fast.train …`, in K that do the same steps: what is
shared among them goes through distributed.py, and what a run writes through run.py's Journal.
"""

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor

from . import distributed, memory, options
from .batch import Rollout
from .checkpoint import restore_checkpoint, save_checkpoint
from .config import Config, InputError
from .data import Prompt, check_dataset, load_prompts
from .distributed import share_rollout, share_rows
from .evaluate import check_lengths, evaluate
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
        fail(f"{str(error).splitlines()[0]} A smaller --microbatch-tokens takes less memory, for the same loss")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def fail(message: str) -> None:
    if distributed.first_to_say():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def train(config: Config) -> None:
    check_names(config)
    run = distributed.from_first(lambda: open_run(config))
    if config.dry_run:
        return distributed.from_first(lambda: describe(config))
    options.check(config)
    check_tracker(config.tracker)
    device = distributed.start(config.threads).device
    config = distributed.from_first(lambda: with_demo_models(config))
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
    policy = options.prepared(load_policy(config.policy, config.temperature, device), config)
    policy, actor = distributed.sharded(policy)  # what is trained, and what answers; one and the same on a CPU
    if config.activation_checkpointing:
        options.checkpoint_activations(policy.model)
    if config.lora_rank:
        reference = cast(Policy, options.WithoutAdapters(actor))
    else:
        reference = load_reference(config.policy, config.temperature, device)
    waits = config.offload and not config.lora_rank
    fetched = partial(options.on_device, reference.to("cpu"), device) if waits else nullcontext
    check_lengths([*prompts.train, *prompts.heldout], actor, config.response_length)
    generator = Generator(actor, tokenizer, reward, config.response_length, config.missing_eos_penalty, config.seed)
    algorithm = ALGORITHMS[config.algorithm](config)
    optimizer = options.adam(policy, config)
    with fetched():
        exact = exact_evaluation(config, generator, reference, prompts.heldout)

    with (
        locked(run),
        Reporter(config.num_batches, quiet=not distributed.is_first()) as reporter,
        StopRequest(reporter.say) as stop,
        distributed.watched(f"go on with: {resume_command(config)}"),
    ):
        measured = partial(
            evaluate,
            reference=reference,
            prompts=prompts.heldout,
            batch_size=config.batch_size,
            tau=config.tau,
            max_tokens=config.microbatch_tokens,
        )
        if config.reward_shift == "reference":  # the first evaluation then starts at 0; config.yaml gets the number
            with fetched():
                shift = -measured(generator)[0]["score"]
            config = dataclasses.replace(config, reward_shift=shift)
            generator = dataclasses.replace(generator, reward=shifted(reward, shift))
        journal = Journal(run, config, reporter)
        done = restore_checkpoint(run / "checkpoints", policy, optimizer)
        distributed.refresh(actor, policy)
        journal.start(done)
        limits = Limits(config.microbatch_tokens, reporter.say)
        checkpoint = partial(save_checkpoint, run / "checkpoints", policy=policy, optimizer=optimizer)

        def evaluate_if_due(batches: int) -> None:
            due = batches % config.eval_every == 0 or batches == config.num_batches
            if not due or journal.evaluated(batches):
                return
            with fetched():
                record, samples = measured(generator)
                record = {"batch": batches, "episodes": batches * config.batch_size, **record, **exact()}
            journal.evaluation(record, samples)

        reporter.say(
            f"{config.algorithm.upper()} on {distributed.described()}: {len(prompts.train)} prompts, "
            f"{len(prompts.heldout)} held out, {prompts.truncated} cut to {config.prompt_length} tokens; "
            f"{config.num_batches} batches of {config.batch_size}; run folder {run}"
            + ("" if policy.packed else "; padded, as the policy's attention does not take packed sequences")
            + (f"; going on after batch {done}" if done else "")
        )
        try:
            evaluate_if_due(done)
            while done < config.num_batches:
                clock = Clock(device)
                episodes = range(done * config.batch_size, (done + 1) * config.batch_size)
                batch_prompts = prompts.take(config.seed, episodes.start, len(episodes))
                rollout = respond(generator, batch_prompts, episodes)
                clock.lap("rollout")
                scores = score(generator, batch_prompts, rollout)
                rollout = generator.rewarded(rollout, scores)
                clock.lap("score")
                if done == 0:
                    policy.start_values(rollout.rewards)
                    actor.start_values(rollout.rewards)
                with fetched():
                    rollout = measure(rollout, actor, reference, config.microbatch_tokens)
                rollout = algorithm.targets(rollout)
                clock.lap("logprobs")
                losses = update(policy, optimizer, algorithm, rollout, config, done, limits)
                distributed.refresh(actor, policy)
                clock.lap("update")
                done += 1
                record: Record = {"batch": done, "episodes": episodes.stop}
                # The KL of whole sequences before the update stands for the loss's, of tokens during it.
                record |= losses | rollout_metrics(rollout, scores, config.tau) | diversity(rollout)
                record |= clock.phases | {"seconds": clock.seconds}
                record["tokens_per_second"] = sum(distributed.row_sizes(rollout)) / record["seconds"]
                (record["peak_memory_bytes"],) = distributed.all_max(peak_memory_bytes(device))
                journal.batch(record)

                evaluate_if_due(done)
                (signal_number,) = distributed.all_max(stop.requested)
                due = signal_number or done % config.checkpoint_every == 0 or done == config.num_batches
                if due and not limits.skipped_in_a_row:  # else the weights may be what is wrong
                    checkpoint(done)
                    journal.draw()
                if signal_number and done < config.num_batches:
                    reporter.say(f"stopped after batch {done}; go on with: {resume_command(config)}")
                    raise SystemExit(128 + signal_number)
        except InputError:  # a reward may fail at any time: what was learned until then is kept
            if done and not limits.skipped_in_a_row:
                checkpoint(done)
            reporter.say(f"failed after batch {done}; once mended, go on with: {resume_command(config)}")
            raise
        except NotFinite as error:
            if done and error.good:
                checkpoint(done)
            rows = journal.rows(
                f"not_finite-{done + 1:06d}.jsonl", error.minibatch, [episodes[row] for row in error.rows]
            )
            reporter.say(f"the rows of the last of these steps are in {rows}")
            raise

        journal.draw()
        export(run, policy, tokenizer)
        journal.show_samples()
        reporter.say(f"done: the policy is in {run / 'policy'}, figures in {run / 'plots'}")


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


def measure(rollout: Rollout, actor: Policy, reference: Policy, max_tokens: int) -> Rollout:
    """With old and reference log-probs, and old values."""
    return share_rollout(
        distributed.row_sizes(rollout),
        lambda rows: with_logprobs(rollout.rows(torch.tensor(rows)), actor, reference, max_tokens),
    )


def rollout_metrics(rollout: Rollout, scores: Tensor, tau: float) -> Record:
    """Means over the batch's sequences; kl is Σ log π_old/π_b over a sequence, rlhf_reward Eq. 3."""
    score, kl = float(scores.mean()), float(rollout.log_ratio.sum(1).mean())
    returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
    variance = returns.var(correction=0)
    explained = 1 - (returns - values).var(correction=0) / variance
    return {
        "score": score,
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
                raise InputError(f"--{name}: got none, and the preset {config.preset} does not name one")
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
    print(config.to_yaml(), end="")
    print(f"# {config.num_batches} batches; run folder {config.output_dir}")
    for line in what_it_reads(config):
        print(f"# {line}")
    if config.policy:
        print(memory.table(config))


if __name__ == "__main__":
    main()
