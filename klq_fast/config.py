"""The settings of a run: one flat dataclass, so that a setting has one name in Python, YAML and on the command line."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml


class InputError(ValueError):
    """Something the user gave cannot work: the command line shows its message instead of a traceback."""


Preset = Literal["demo", "arithmetic", "imdb", "tldr", "hh", "custom"]


@dataclass(frozen=True)
class Config:
    """KL-regularised Q-learning for language models. The defaults of `custom` are the paper's (arXiv 2508.17000) where
    it states them, and those of TRL's PPO, which it says it inherits (Section 5), or of TRL's example for TL;DR where
    it does not."""

    preset: Annotated[Preset, tyro.conf.Positional] = "custom"
    """Where the defaults come from; without one, the demo. custom: the paper's settings, and no models or prompts."""
    config: Path | None = None
    """A YAML file of these options, by their names; options on the command line win over it."""

    # What is trained, on what, for what.
    algorithm: Literal["klq", "ppo"] = "klq"
    """KL-regularised Q-learning, or the paper's PPO baseline."""
    policy: str | None = None
    """The causal language model to train, which is also the reference: a folder or a hub name."""
    reward_model: str | None = None
    """A sequence-classification model that scores prompt + response: a folder or a hub name. Of two labels the second
    is the good one."""
    reward: str | None = None
    """Instead of a reward model, a Python function MODULE:FUNCTION from (prompts, responses) to a list of floats."""
    reward_eos: bool = True
    """The reward model reads its end-of-sequence token, if it has one, behind a response that ended."""
    reward_shift: float | Literal["reference"] = 0.0
    """Added to every score. reference: what makes the policy's mean on held-out prompts 0 before training; the number
    measured goes into config.yaml. Learning does not depend on it (γ = 1): a fresh value head starts at the mean."""
    dataset: str | None = None
    """Prompts: a .jsonl file with a "prompt" or "messages" in every line, a folder with train.jsonl and test.jsonl, or
    anything that the datasets library loads. Instead, "chosen" may hold a dialogue written as in Anthropic's hh-rlhf,
    or "text" a text to be continued from its first tokens."""

    # The run.
    output_dir: Path | None = None
    """The run's folder; by default a new one, runs/PRESET, runs/PRESET-2, …"""
    resume: bool = False
    """Go on with the run in --output-dir, by default the newest runs/PRESET; where there is none and the preset is
    named, start it, so that one command serves both."""
    dry_run: bool = False
    """Check the settings, say what would run, and stop."""
    seed: int = 0
    """Sampling and the order of prompts derive from the seed and the episode's index alone."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    eval_every: int = 20
    """Batches between evaluations on held-out prompts; one before and one after training are always made."""
    eval_prompts: int = 256
    """Held-out prompts: the dataset's test split, or this many (at most a tenth) taken out of the prompts."""
    checkpoint_every: int = 20
    """Batches between checkpoints."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where the figures of metrics.jsonl and eval.jsonl also go; a resumed run goes on in the same place."""

    # Rollouts.
    episodes: int = 75_000
    """Prompts answered in the whole run, rounded up to whole batches (Section 5)."""
    batch_size: int = 192
    """Rollouts per batch, over all devices (Table 2: 48 on each of 4)."""
    prompt_length: int = 512
    """Tokens of the prompt at most (TRL's example); a longer one is cut at its last line breaks, a dialogue by whole
    turns from its beginning."""
    response_length: int = 53
    """Tokens of the response at most (TRL's PPO)."""
    temperature: float = 0.7
    """Sampling temperature, and the temperature of every log-probability (TRL's PPO)."""
    missing_eos_penalty: float = 1.0
    """ω: taken from the reward of a response that did not end by itself (Algorithm 2; the number: TRL's example)."""

    # The update.
    minibatch_size: int | None = None
    """Rollouts per optimizer step; by default the whole batch (Table 2)."""
    epochs: int = 4
    """Passes over each batch (Table 2)."""
    learning_rate: float = 1.41e-5
    """Adam's, falling linearly to 0 over the run (Table 2)."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm (TRL's default)."""
    microbatch_tokens: int = 16_384
    """Tokens, padding included, in one forward pass: it bounds memory and does not change the result."""
    tau: float = 0.05
    """τ: strength of the KL penalty (Table 2)."""
    lam: float = 0.95
    """λ of the λ-returns (KLQ) and of GAE (PPO) (Table 2)."""
    gamma: float = 1.0
    """γ: discount (Table 2)."""
    alpha: float = 1.0
    """α: conservativeness of the λ-returns, Eq. 7 (KLQ), and through it β of the reverse penalty, Eq. 18 (PPO); the
    paper's experiments have 1 (Remark 3.1)."""
    policy_weight: float = 1.0
    """Multiplies the loss's gradient to the log-probabilities (KLQ)."""
    value_weight: float = 1.0
    """Multiplies the loss's gradient to the values (KLQ)."""
    clip: float = 0.2
    """ε: range of the probability ratio (PPO)."""
    value_clip: float = 0.2
    """η: range of the change in values (PPO)."""
    value_coef: float = 0.1
    """ζ: weight of the value loss (PPO)."""
    whiten: bool = True
    """Advantages of a batch are shifted and scaled to mean 0 and standard deviation 1 (PPO)."""
    ppo_penalty: Literal["none", "forward", "reverse"] = "none"
    """Instead of clipping the ratio, a penalty of β times the KL to the policy before the batch: forward for Eq. 5,
    reverse for Eq. 17, which are exactly these with --no-whiten (PPO)."""
    beta: float | None = None
    """β of the penalty; for the reverse one by default τ(1 − α)/α, Eq. 18 (PPO)."""

    # Memory. What each one saves is printed by --dry-run.
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: the same gradients, a third more
    arithmetic in the update."""
    adam_8bit: bool = False
    """Adam's two moments in 8 bits, in blocks of 256 with a scale each (torchao)."""
    offload: bool = False
    """The reference and the reward model wait in CPU memory while they are not in use (GPU)."""
    lora_rank: int | None = None
    """Train adapters of this rank on every linear layer of the blocks (peft), with scale 2 and without dropout,
    instead of all weights; the policy without them is the reference, which then takes no memory."""
    freeze_head: bool = False
    """The language-model head stays as it is."""

    @property
    def num_batches(self) -> int:
        return math.ceil(self.episodes / self.batch_size)

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise InputError(f"{_option(name)}: got {value}, expected more than 0, and finite")
        if not self.max_grad_norm > 0:  # infinity turns it off
            raise InputError(f"--max-grad-norm: got {self.max_grad_norm}, expected more than 0")
        for name in ("missing_eos_penalty", "policy_weight", "value_weight", "value_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{_option(name)}: got {getattr(self, name)}, expected at least 0, and finite")
        if self.reward_shift != "reference" and not (
            isinstance(self.reward_shift, float | int) and math.isfinite(self.reward_shift)
        ):
            raise InputError(f"--reward-shift: got {self.reward_shift}, expected a finite number, or reference")
        if not 0 <= self.seed < 2**64:  # it is half of Philox's key
            raise InputError(f"--seed: got {self.seed}, expected 0 to 2**64 - 1")
        for name in ("lam", "gamma", "alpha"):
            low_allowed = name != "alpha"
            value = getattr(self, name)
            if not (0 <= value <= 1) or (value == 0 and not low_allowed):
                raise InputError(f"{_option(name)}: got {value}, expected {'[' if low_allowed else '('}0, 1]")
        if self.minibatch_size is not None and not 0 < self.minibatch_size <= self.batch_size:
            raise InputError(
                f"--minibatch-size: got {self.minibatch_size}, expected 1 to --batch-size {self.batch_size}"
            )
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise InputError(f"--beta: got {self.beta}, expected at least 0, and finite")
        if self.beta is not None and self.ppo_penalty == "none":
            raise InputError(f"--beta: got {self.beta}, expected --ppo-penalty forward or reverse beside it")
        if self.beta is None and self.ppo_penalty == "forward":
            raise InputError("--beta: got none, expected a number beside --ppo-penalty forward: Eq. 5 leaves it open")
        if self.reward and self.reward_model:
            raise InputError(f"--reward {self.reward}: expected no --reward-model beside it, got {self.reward_model}")

    def to_yaml(self) -> str:
        """The run's settings, without those of one invocation."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in INVOCATION}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> "Config":
        """
        Raises:
            InputError: the text is not one that `to_yaml` of this version wrote.
        """
        try:
            return cls(**yaml.safe_load(text))
        except (yaml.YAMLError, TypeError) as error:
            raise InputError(f"config.yaml: {error}") from None


INVOCATION = ("config", "output_dir", "resume", "dry_run")
# A resumed run may have others of these: they do not change what it computes, and a machine may want them.
OF_THE_MACHINE = ("threads", "microbatch_tokens", "offload", "tracker")
_POSITIVE = tuple(
    "episodes batch_size epochs prompt_length response_length temperature learning_rate microbatch_tokens tau clip "
    "value_clip eval_every eval_prompts checkpoint_every threads lora_rank".split()
)


def looks_like_path(name: str) -> bool:
    """Not a hub name, which is NAME or OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
