"""Where a run's settings start: the paper's tasks (Tables 1 and 2), the demo, and the command line on top."""

import dataclasses
import inspect
import re
from collections import abc
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
import yaml

from .config import INVOCATION, OF_THE_MACHINE, Config, InputError
from .metrics import Record

if TYPE_CHECKING:
    from .data import Prompt
    from .models import Policy
    from .rollout import Generator


def custom() -> Config:
    return Config()


def demo() -> Config:
    """Docstring sentences for function signatures of the Python standard library, on a CPU in three minutes."""
    return Config(
        preset="demo",
        episodes=5120,
        batch_size=64,
        minibatch_size=16,
        prompt_length=64,
        response_length=32,
        temperature=1.0,
        learning_rate=3e-4,
        # Neither is the paper's, whose α = 1 lets one batch's target be Δ/τ nats away: docs/findings.md.
        alpha=0.1,
        policy_weight=20.0,  # 1/τ
        eval_every=20,
        eval_prompts=256,
        checkpoint_every=20,
        microbatch_tokens=8192,
        threads=1,  # as fast as two at this size, and a second busy process then takes no time from it
    )


def arithmetic() -> Config:
    """Sums of two digits, on a CPU in fifteen seconds: a task whose optimum, and the distance from it, are known."""
    return Config(
        preset="arithmetic",
        reward="klq_fast.arithmetic:score",
        episodes=6400,
        batch_size=128,
        minibatch_size=32,
        prompt_length=4,
        response_length=3,
        temperature=1.0,
        missing_eos_penalty=0.0,  # an answer without an end is wrong already
        learning_rate=1e-3,
        alpha=0.2,
        policy_weight=20.0,  # 1/τ
        eval_every=10,
        checkpoint_every=50,
        threads=1,
    )


# The paper's tasks. What is not said here is `custom`'s: the same for all three, with its sources in config.py.
#
# The paper's code is a fork of TRL that is not public. Responses stop at the end-of-sequence tokens that the policy's
# tokenizer and generation config name: "until a distinguished end-of-sequence token" (Section 2.2).


def imdb() -> Config:
    """Film reviews to be continued from their first tokens so that they read as good ones.

    Reads of the dataset: the column text of the splits train (25,000 rows) and test.
    Prompt: the first 8 tokens of the review, the beginning-of-sequence token among them.
    Scored: beginning and continuation together, by the classifier's logit for a good review.
    """
    return Config(
        preset="imdb",
        policy="meta-llama/Llama-3.2-1B",  # Table 1; gated: its page on the hub asks for a form
        reward_model="lvwerra/distilbert-imdb",  # Table 1
        reward_shift=0.0,  # a logit, and 0 is an undecided classifier: TRL's example takes it as it is
        dataset="stanfordnlp/imdb",  # the task's name in Table 1; the paper has no results for it
        prompt_length=8,  # not in the paper. TRL's example draws 2 to 7 tokens a review; Llama writes <|begin_of_text|>
        response_length=53,  # not in the paper: TRL's PPO, whose defaults it inherits
        temperature=0.7,  # likewise
        missing_eos_penalty=0.0,  # not in the paper. TRL's PPO has none; a review does not end within 53 tokens
    )


def tldr() -> Config:
    """Posts on Reddit to be summarised in a sentence or two.

    Reads of the dataset: the column prompt of the splits train (116,722 rows) and validation.
    Prompt: "SUBREDDIT: r/…\\n\\nTITLE: …\\n\\nPOST: …\\n\\nTL;DR:"; of a longer one the post is cut at a line break.
    Scored: prompt and response together, with <|endoftext|> behind a response that ended.
    """
    return Config(
        preset="tldr",
        policy="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",  # Table 1, which lost its underscores in print
        reward_model="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",  # Table 1, likewise
        reward_eos=True,  # not in the paper: TRL's PPO scores at it, as the model's authors do (Huang et al. 2024)
        # Not in the paper. Stiennon et al. and Huang et al. shift theirs to mean 0 on the reference's summaries.
        reward_shift="reference",
        dataset="trl-lib/tldr",  # TL;DR (Section 5) as TRL's example has it, from the filtered posts of Stiennon et al.
        prompt_length=512,  # not in the paper: Stiennon et al. 2020, and TRL's example
        response_length=53,  # not in the paper: TRL's PPO, after Huang et al. 2024
        temperature=0.7,  # not in the paper: TRL's PPO
        missing_eos_penalty=1.0,  # ω of Algorithm 2; the number is TRL's example's
    )


def hh() -> Config:
    """Dialogues with an assistant, whose last answer is to be given.

    Reads of the dataset: the column chosen of the splits train (160,800 rows) and test.
    Prompt: "\\n\\nHuman: …\\n\\nAssistant: …" up to the last "\\n\\nAssistant:"; a longer one loses its first turns.
    Scored: prompt and response together, as they stand, without an end-of-sequence token.
    """
    return Config(
        preset="hh",
        policy="yongzx/pythia-1b-sft-hh",  # Table 1
        reward_model="Ray2333/gpt2-large-helpful-reward_model",  # Table 1, there in lower case
        # Not in the paper. The model's card scores a dialogue without it, and pads with it, which GPT-2's head skips.
        reward_eos=False,
        reward_shift=0.0,  # not in the paper: the model's scores as they are
        dataset="Anthropic/hh-rlhf",  # Section 5: "a final response to a conversation between a user and an assistant"
        prompt_length=512,  # not in the paper: as TL;DR's
        response_length=53,  # not in the paper: TRL's PPO. Table 3 has HH run a little faster than TL;DR
        temperature=0.7,  # not in the paper: TRL's PPO
        missing_eos_penalty=1.0,  # ω of Algorithm 2; the number as TL;DR's
    )


PRESETS: dict[str, Callable[[], Config]] = {f.__name__: f for f in (demo, arithmetic, imdb, tldr, hh, custom)}
ONLY = {  # settings that one algorithm alone reads
    "klq": ("policy_weight", "value_weight"),
    "ppo": ("clip", "value_clip", "value_coef", "whiten", "ppo_penalty", "beta"),
}
EMBEDDED = ("demo", "arithmetic")  # they make on this machine the policy, prompts and reward that are not named


def parse_command_line(args: Sequence[str]) -> Config:
    """The preset, then --config's file, then the options; with --resume the run's own settings stand in for the preset.

    Raises:
        InputError: a setting that cannot be, an option of the other algorithm, or with --resume one that differs from
            the run's, or no run where no preset is named.
    """
    named = bool(args) and not args[0].startswith("-")
    preset, layers = (args[0], [list(args[1:])]) if named else (None, [list(args)])
    config = _parse(preset, layers, None)
    if config.config:
        file_preset, file_options = _read_config(config.config)
        preset, layers = preset or file_preset, [file_options, *layers]
        config = _parse(preset, layers, None)
    output_dir = config.output_dir or _default_output_dir(config)
    settings = output_dir / "config.yaml"
    if config.resume and settings.is_file():
        config = _resumed(preset, layers, output_dir, Config.from_yaml(settings.read_text(encoding="utf-8")))
    elif config.resume and not preset:
        # With a preset it starts one: the same command then begins a run and goes on with it when it is repeated.
        raise InputError(
            f"--resume: got no run in {output_dir} to go on with; look at --output-dir, or name a preset to start one"
        )
    _check_algorithm(config, layers[-1])
    return dataclasses.replace(config, output_dir=output_dir)


def _resumed(preset: str | None, layers: Sequence[Sequence[str]], output_dir: Path, saved: Config) -> Config:
    """The run's settings; refuses options that would change them."""
    config = _parse(preset or saved.preset, layers, saved)
    if config.reward_shift == "reference":  # said again; the run has the number that it found
        config = dataclasses.replace(config, reward_shift=saved.reward_shift)
    for field in dataclasses.fields(Config):
        given, before = getattr(config, field.name), getattr(saved, field.name)
        if given != before and field.name not in (*INVOCATION, *OF_THE_MACHINE):
            raise InputError(
                f"--{field.name.replace('_', '-')}: got {given}, but the run in {output_dir} has {before}: a resumed "
                "run keeps its settings; leave the option out, or start another run in another --output-dir"
            )
    return config


def _check_algorithm(config: Config, options: Sequence[str]) -> None:
    """Refuses what is said on the command line for the other algorithm; presets and files may hold both's settings."""
    other = "ppo" if config.algorithm == "klq" else "klq"
    for name in _names(options):
        if name.removeprefix("no-").replace("-", "_") in ONLY[other]:
            raise InputError(
                f"--{name}: it belongs to {other.upper()}, and this run's algorithm is {config.algorithm.upper()}; "
                f"leave it out, or add --algorithm {other}"
            )


def with_demo_models(config: Config) -> Config:
    """The embedded tasks bring their own policy, reward and prompts, made on first use; what the user names stays."""
    if config.preset == "arithmetic" and not (config.policy and config.dataset):
        from . import arithmetic

        policy, dataset = arithmetic.prepare()
        return dataclasses.replace(config, policy=config.policy or str(policy), dataset=config.dataset or str(dataset))
    if config.preset != "demo" or (config.policy and config.dataset and (config.reward_model or config.reward)):
        return config
    from .demo.prepare import prepare

    paths = prepare()
    return dataclasses.replace(
        config,
        policy=config.policy or str(paths.policy),
        reward_model=config.reward_model or (None if config.reward else str(paths.reward_model)),
        dataset=config.dataset or str(paths.dataset),
    )


def what_it_reads(config: Config) -> abc.Generator[str, None, list[int]]:
    """Lines for --dry-run: the policy, reward and prompts, what is done with them, and the prompts' number where they
    can be read. Without a connection to the hub: how to do without. Returns the training prompts' lengths in tokens,
    none where they cannot be read.

    Raises:
        InputError: a file or folder of the user's is not what it should be.
    """
    named = {"policy": config.policy, "reward-model": config.reward_model, "dataset": config.dataset}
    of_the_hub = {option: name for option, name in named.items() if name and not Path(name).exists()}
    for option, name in named.items():
        if name:
            yield f"{option}: {name}, " + ("of the Hugging Face hub" if option in of_the_hub else "on this machine")
    if config.reward:
        yield f"reward: the Python function {config.reward}"
    if config.preset in EMBEDDED and not (config.policy and config.dataset):
        cost = "90 s" if config.preset == "demo" else "5 s"
        yield f"what is not named of the policy, reward and prompts is made first, in about {cost} of one CPU core"
        return []
    if config.preset not in (*EMBEDDED, "custom"):
        yield from filter(None, (inspect.getdoc(PRESETS[config.preset]) or "").split("\n"))
    from .data import load_prompts
    from .hub import HubError, download
    from .models import load_tokenizer

    assert config.policy and config.dataset
    try:
        tokenizer = load_tokenizer("policy", config.policy)
        prompts = load_prompts(config.dataset, tokenizer, config.prompt_length, config.eval_prompts)
    except HubError:
        yield "The hub does not answer, and not all of that is in this machine's cache. Where it does:"
        yield from (f"    {download(option, name, folder=f'./{option}')}" for option, name in of_the_hub.items())
        yield "Then, beside these folders (any others in the same form will do):"
        options = " ".join(f"--{option} ./{option}" for option in of_the_hub)
        yield f"    python -m klq_fast.train {config.preset} {options}"
        return []
    yield (
        f"{len(prompts.train)} prompts, {len(prompts.heldout)} held out, {prompts.truncated} cut to "
        f"{config.prompt_length} tokens; the first: {prompts.train[0].text!r:.200}"
    )
    return [len(prompt.tokens) for prompt in prompts.train]


def exact_evaluation(
    config: Config, generator: "Generator", reference: "Policy", heldout: Sequence["Prompt"]
) -> Callable[[], Record]:
    """A function that returns what is known of the policy without sampling: nothing, but for arithmetic."""
    if config.preset != "arithmetic":
        return dict
    from . import arithmetic

    return arithmetic.exact_evaluation(generator, reference, heldout, config.tau)


def _parse(preset: str | None, layers: Sequence[Sequence[str]], config: Config | None) -> Config:
    """`config`, by default the preset's, with each layer of options put over what is below it."""
    preset = preset or "demo"
    config = config or PRESETS.get(preset, demo)()
    for options in layers:
        # A run has one reward: the layer that names one takes away what is below.
        names = _names(options)
        if "reward" in names and "reward-model" not in names:
            config = dataclasses.replace(config, reward_model=None)
        if "reward-model" in names and "reward" not in names:
            config = dataclasses.replace(config, reward=None)
        config = tyro.cli(
            Config, args=[preset, *options], default=config, prog=f"python -m klq_fast.train [{'|'.join(PRESETS)}]"
        )
    return config


def _names(options: Sequence[str]) -> list[str]:
    """Of "--lam 0.5 --batch_size=3": lam and batch-size."""
    return [o.split("=")[0].removeprefix("--").replace("_", "-") for o in options if o.startswith("--")]


def _read_config(file: Path) -> tuple[str | None, list[str]]:
    """A YAML file as its preset and command-line options, so that both are checked by the same parser."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {file}: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {file}: got {type(values).__name__}, expected lines of NAME: VALUE")
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Config) if field.name != "config"]
    options: list[str] = []
    for name, value in values.items():
        flag = str(name).replace("_", "-")
        if flag not in names:
            nearest = get_close_matches(flag, names, n=1)
            raise InputError(
                f"--config {file}: got {name}, expected an option" + "".join(f"; perhaps {n}" for n in nearest)
            )
        if isinstance(value, list | dict):
            raise InputError(f"--config {file}: {name}: got {value}, expected one value")
        if flag != "preset":
            options.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
    return str(values["preset"]) if "preset" in values else None, options


def _default_output_dir(config: Config) -> Path:
    """A new folder, or with --resume the newest."""
    numbers = {  # runs/demo is 1, runs/demo-2 is 2
        int(match[1] or 1): path
        for path in Path("runs").glob(f"{config.preset}*")
        if (match := re.fullmatch(rf"{config.preset}(?:-(\d+))?", path.name))
    }
    newest = max(numbers, default=0)
    if config.resume and newest:
        return numbers[newest]
    return Path("runs") / (f"{config.preset}-{newest + 1}" if newest else config.preset)
