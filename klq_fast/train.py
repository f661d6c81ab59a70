"""The training loop: `python -m klq_fast.train [demo|imdb|tldr|hh|custom] [options]`, readable from top to bottom."""

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import distributed, plots
from .batch import Rollout
from .checkpoint import restore_checkpoint, save_checkpoint
from .config import Config, InputError
from .data import check_dataset, load_prompts
from .evaluate import check_lengths, evaluate
from .klq import KLQ
from .metrics import Record, Reporter, append_line, keep_lines, read_lines, write_text
from .models import Policy, check_folder, load_policy, load_reference, load_tokenizer
from .ppo import PPO
from .presets import EMBEDDED, exact_evaluation, parse_command_line, with_demo_models
from .reward import load_reward, reward_from_function
from .rollout import TRAIN_STREAM, Generator, with_logprobs
from .run import StopRequest, export, locked, open_run, resume_command, write_samples


class Algorithm(Protocol):
    """What the loop asks of an algorithm; klq.py and ppo.py provide it."""

    def targets(self, rollout: Rollout) -> Rollout: ...

    def loss(
        self, batch: Rollout, hidden: Tensor, head: nn.Linear, values: Tensor, num_tokens: Tensor, softcap: float | None
    ) -> "LossOutput": ...


class LossOutput(Protocol):
    @property
    def loss(self) -> Tensor: ...

    @property
    def metrics(self) -> dict[str, Tensor]: ...


ALGORITHMS: dict[str, Callable[[Config], Algorithm]] = {"klq": KLQ.from_config, "ppo": PPO.from_config}


def main(args: Sequence[str] | None = None) -> None:
    try:
        train(parse_command_line(sys.argv[1:] if args is None else args))
    except (InputError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def train(config: Config) -> None:
    check_names(config)
    run = open_run(config)
    if config.dry_run:
        return describe(config)
    state = distributed.start(config.threads)
    config = with_demo_models(config)
    assert config.policy and config.dataset

    tokenizer = load_tokenizer("policy", config.policy)
    prompts = load_prompts(config.dataset, tokenizer, config.prompt_length, config.eval_prompts)
    reward = load_reward(config.reward, config.reward_model, state.device, config.microbatch_tokens)
    policy = load_policy(config.policy, config.temperature, state.device)
    reference = load_reference(config.policy, config.temperature, state.device)
    check_lengths([*prompts.train, *prompts.heldout], policy, config.response_length)
    generator = Generator(policy, tokenizer, reward, config.response_length, config.missing_eos_penalty, config.seed)
    algorithm = ALGORITHMS[config.algorithm](config)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, eps=1e-5)
    exact = exact_evaluation(config, generator, reference, prompts.heldout)

    run.mkdir(parents=True, exist_ok=True)
    with locked(run), Reporter(config.num_batches) as reporter, StopRequest(reporter.say) as stop:
        write_text(run / "config.yaml", config.to_yaml())
        done = restore_checkpoint(run / "checkpoints", policy, optimizer)
        keep_lines(run / "metrics.jsonl", lambda record: record["batch"] <= done)
        keep_lines(run / "eval.jsonl", lambda record: record["batch"] <= done)

        def evaluate_if_due(batches: int) -> None:
            due = batches % config.eval_every == 0 or batches == config.num_batches
            if not due or any(record["batch"] == batches for record in read_lines(run / "eval.jsonl")):
                return
            record, samples = evaluate(
                generator,
                reference,
                prompts.heldout,
                batch_size=config.batch_size,
                tau=config.tau,
                max_tokens=config.microbatch_tokens,
            )
            record = {"batch": batches, "episodes": batches * config.batch_size, **record, **exact()}
            write_samples(run / "samples.jsonl", samples, first=batches == 0)
            append_line(run / "eval.jsonl", record)
            reporter.evaluation(record)

        reporter.start_at(done)
        reporter.say(
            f"{config.algorithm.upper()} on {state.device}: {len(prompts.train)} prompts, {len(prompts.heldout)} held "
            f"out, {prompts.truncated} cut to {config.prompt_length} tokens; {config.num_batches} batches of "
            f"{config.batch_size}; run folder {run}" + (f"; going on after batch {done}" if done else "")
        )
        try:
            evaluate_if_due(done)
            while done < config.num_batches:
                started = time.monotonic()
                episodes = range(done * config.batch_size, (done + 1) * config.batch_size)
                batch_prompts = prompts.take(config.seed, episodes.start, len(episodes))
                rollout = generator.respond(batch_prompts, episodes, TRAIN_STREAM)
                scores, _ = generator.score(batch_prompts, rollout)
                rollout = generator.rewarded(rollout, scores)
                if done == 0:
                    policy.start_values(rollout.rewards)
                rollout = with_logprobs(rollout, policy, reference, config.microbatch_tokens)
                rollout = algorithm.targets(rollout)
                losses = update(policy, optimizer, algorithm, rollout, config, done)
                done += 1
                record: Record = {"batch": done, "episodes": episodes.stop}
                # The KL of whole sequences before the update stands for the loss's, of tokens during it.
                record |= losses | rollout_metrics(rollout, scores, config.tau)
                record["seconds"] = time.monotonic() - started
                append_line(run / "metrics.jsonl", record)
                reporter.batch(record)

                evaluate_if_due(done)
                if stop.requested or done % config.checkpoint_every == 0 or done == config.num_batches:
                    save_checkpoint(run / "checkpoints", done, policy, optimizer)
                    plots.draw(run)
                if stop.requested and done < config.num_batches:
                    reporter.say(f"stopped after batch {done}; go on with: {resume_command(config)}")
                    raise SystemExit(128 + stop.requested)
        except InputError:  # a reward may fail at any time: what was learned until then is kept
            if done:
                save_checkpoint(run / "checkpoints", done, policy, optimizer)
            reporter.say(f"failed after batch {done}; once mended, go on with: {resume_command(config)}")
            raise

        plots.draw(run)
        export(run, policy, tokenizer)
        reporter.samples(read_lines(run / "samples.jsonl"))
        reporter.say(f"done: the policy is in {run / 'policy'}, figures in {run / 'plots'}")


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, algorithm: Algorithm, rollout: Rollout, config: Config, batch: int
) -> Record:
    """Epochs × minibatches × microbatches over one batch of rollouts; the minibatch is the optimizer's step."""
    size = config.minibatch_size or config.batch_size
    steps_per_epoch = -(-len(rollout) // size)
    total_steps = config.num_batches * config.epochs * steps_per_epoch
    step = batch * config.epochs * steps_per_epoch
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0) + value

    for epoch in range(config.epochs):
        order = torch.from_numpy(np.random.default_rng([config.seed, batch, epoch]).permutation(len(rollout)))
        for rows in order.to(rollout.prompt_tokens.device).split(size):
            minibatch = rollout.rows(rows)
            num_tokens = distributed.all_sum(minibatch.num_tokens)
            for microbatch_rows in minibatch.microbatches(config.microbatch_tokens):
                microbatch = minibatch.rows(microbatch_rows)
                output = policy(microbatch, algorithm.loss, num_tokens)
                output.loss.backward()
                share = microbatch.num_tokens / num_tokens
                add("loss", output.loss.detach())
                for name, value in output.metrics.items():
                    add(name, value * share)
            add("grad_norm", nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
            learning_rate = config.learning_rate * (1 - step / total_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    steps = config.epochs * steps_per_epoch
    means = {name: float(value) / steps for name, value in sums.items()}
    # Of the residuals of a microbatch, not a mean over tokens; rollout_metrics has the values' own, of the batch.
    means.pop("explained_variance", None)
    if not math.isfinite(means["loss"] + means["grad_norm"]):
        raise FloatingPointError(
            f"batch {batch + 1}: got loss {means['loss']} and gradient norm {means['grad_norm']}, expected finite "
            "numbers; the last checkpoint is good; a lower --learning-rate may help"
        )
    return means | {"learning_rate": learning_rate}


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
    if config.policy and config.dataset:
        tokenizer = load_tokenizer("policy", config.policy)
        prompts = load_prompts(config.dataset, tokenizer, config.prompt_length, config.eval_prompts)
        print(
            f"# {len(prompts.train)} prompts, {len(prompts.heldout)} held out, {prompts.truncated} cut to "
            f"{config.prompt_length} tokens"
        )
    else:
        cost = "90 s" if config.preset == "demo" else "5 s"
        print(f"# what is not named of the policy, reward and prompts is made first, in about {cost} of one CPU core")


if __name__ == "__main__":
    main()
