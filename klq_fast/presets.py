"""Where a run's settings start: the paper's tasks (Tables 1 and 2), the demo, and the command line on top."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
import yaml

from .config import INVOCATION, Config, InputError
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
        # 1/τ. With the paper's weight 1, most of the gradient on the shared trunk is the value's (2e against 2τe): the
        # held-out RLHF reward rose by 0.23 (one seed), with this one by 0.63 to 0.68 (three seeds).
        policy_weight=20.0,
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
        learning_rate=3e-4,
        policy_weight=20.0,  # 1/τ, as in the demo
        eval_every=10,
        checkpoint_every=50,
        threads=1,
    )


def imdb() -> Config:
    return Config(
        preset="imdb",
        policy="meta-llama/Llama-3.2-1B",
        reward_model="lvwerra/distilbert-imdb",
        dataset="stanfordnlp/imdb",
    )


def tldr() -> Config:
    return Config(
        preset="tldr",
        policy="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
        reward_model="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr",
        dataset="trl-lib/tldr",
    )


def hh() -> Config:
    return Config(
        preset="hh",
        policy="yongzx/pythia-1b-sft-hh",
        reward_model="ray2333/gpt2-large-helpful-reward_model",
        dataset="Anthropic/hh-rlhf",
    )


PRESETS: dict[str, Callable[[], Config]] = {f.__name__: f for f in (demo, arithmetic, imdb, tldr, hh, custom)}
EMBEDDED = ("demo", "arithmetic")  # they make on this machine the policy, prompts and reward that are not named


def parse_command_line(args: Sequence[str]) -> Config:
    """The preset, then --config's file, then the options; with --resume the run's own settings stand in for the preset.

    Raises:
        InputError: a setting that cannot be, or with --resume one that differs from the run's.
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
        saved = Config.from_yaml(settings.read_text(encoding="utf-8"))
        config = _parse(preset or saved.preset, layers, saved)
        for field in dataclasses.fields(Config):
            given, before, option = (
                getattr(config, field.name),
                getattr(saved, field.name),
                field.name.replace("_", "-"),
            )
            if given != before and field.name not in INVOCATION:
                raise InputError(
                    f"--{option}: got {given}, but the run in {output_dir} has {before}: a resumed run keeps its "
                    "settings; leave the option out, or start another run in another --output-dir"
                )
    return dataclasses.replace(config, output_dir=output_dir)


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
        names = {option.split("=")[0].replace("_", "-") for option in options}
        if "--reward" in names and "--reward-model" not in names:
            config = dataclasses.replace(config, reward_model=None)
        if "--reward-model" in names and "--reward" not in names:
            config = dataclasses.replace(config, reward=None)
        config = tyro.cli(
            Config, args=[preset, *options], default=config, prog=f"python -m klq_fast.train [{'|'.join(PRESETS)}]"
        )
    return config


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
