"""Settings: where each value comes from, what is refused, and that a run's own config.yaml gives the run again."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import yaml

from klq_fast.config import INVOCATION, Config, InputError
from klq_fast.ppo import PPO
from klq_fast.presets import PRESETS, parse_command_line
from klq_fast.train import main


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parse(*args: str) -> Config:
    return parse_command_line(args)


def write(text: str, name: str = "settings.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def save_run(folder: str, config: Config) -> Config:
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return config


def settings(config: Config) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in INVOCATION}


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command line says, in one line: the parser draws a frame around it and breaks it."""
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    return " ".join(re.sub(r"[│|]?\n[│|]?", " ", capsys.readouterr().err).split())


# Where a value comes from.


def test_without_arguments_it_is_the_demo() -> None:
    assert settings(parse()) == settings(PRESETS["demo"]())


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = parse(name)
    assert config.preset == name
    assert settings(config) == settings(PRESETS[name]())


def test_the_paper_s_settings() -> None:
    """Table 2, and algorithm choices that the paper states."""
    for name in ("imdb", "tldr", "hh", "custom"):
        config = parse(name)
        assert (config.gamma, config.tau, config.lam, config.alpha) == (1.0, 0.05, 0.95, 1.0)
        assert (config.learning_rate, config.epochs, config.batch_size, config.episodes) == (1.41e-5, 4, 192, 75_000)
        assert config.minibatch_size is None and config.num_batches == 391
        assert (config.policy_weight, config.value_weight) == (1.0, 1.0)


def test_preset_then_file_then_options() -> None:
    file = write("tau: 0.5\nlam: 0.5\nlearning_rate: 1e-3\nbatch-size: 7\n")
    config = parse("tldr", "--config", file, "--lam", "0.25")
    assert config.policy == PRESETS["tldr"]().policy  # the preset's
    assert (config.tau, config.learning_rate, config.batch_size) == (0.5, 1e-3, 7)  # the file's
    assert config.lam == 0.25  # the option's
    assert parse("tldr", "--lam", "0.25", "--config", file) == config


def test_the_file_may_name_the_preset_and_the_command_line_wins() -> None:
    file = write("preset: imdb\nseed: 3\n")
    assert settings(parse("--config", file)) == settings(parse("imdb", "--seed", "3"))
    assert settings(parse("hh", "--config", file)) == settings(parse("hh", "--seed", "3"))


def test_booleans_in_a_file() -> None:
    assert not parse("--config", write("whiten: false\n")).whiten
    assert parse("--config", write("whiten: true\ndry_run: yes\n")).dry_run
    assert parse("--config", write("whiten: false\n"), "--algorithm", "ppo", "--whiten").whiten


def test_values_in_a_file_that_look_like_something_else() -> None:
    config = parse("custom", "--config", write("policy: -folder\ndataset: 'a b=c'\nminibatch_size: null\nreward: ~\n"))
    assert (config.policy, config.dataset, config.minibatch_size, config.reward) == ("-folder", "a b=c", None, None)


def test_a_reward_replaces_one_from_below() -> None:
    """The preset's reward model makes way for a function, the file's function for a reward model, and so on."""
    config = parse("tldr", "--reward", "module:function")
    assert (config.reward, config.reward_model) == ("module:function", None)
    file = write("reward: module:function\n")
    config = parse("tldr", "--config", file)
    assert (config.reward, config.reward_model) == ("module:function", None)
    config = parse("tldr", "--config", file, "--reward-model=folder")
    assert (config.reward, config.reward_model) == (None, "folder")
    save_run("earlier", parse("tldr", "--reward", "module:function"))
    config = parse("--config", "earlier/config.yaml", "--reward_model", "folder")
    assert (config.preset, config.reward, config.reward_model) == ("tldr", None, "folder")


def test_two_rewards_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "--reward", "m:f", "--reward-model", "folder")
    assert "--reward m:f" in message and "--reward-model" in message and "folder" in message


def test_the_penalty_s_beta() -> None:
    """Eq. 18 is the reverse penalty's default, and a number given wins over it."""
    config = parse(*"--algorithm ppo --ppo-penalty reverse --alpha 0.2 --tau 0.5".split())
    assert PPO.from_config(config).trust_region() == (None, 0.0, pytest.approx(0.5 * 0.8 / 0.2 + 0.5))
    config = parse(*"--algorithm ppo --ppo-penalty reverse --alpha 0.2 --tau 0.5 --beta 0".split())
    assert PPO.from_config(config).trust_region() == (None, 0.0, 0.5)
    config = parse(*"--algorithm ppo --ppo-penalty forward --beta 3 --tau 0.5".split())
    assert PPO.from_config(config).trust_region() == (None, 3.0, 0.5)
    config = parse(*"--algorithm ppo --clip 0.1".split())
    assert PPO.from_config(config).trust_region() == (0.1, 0.0, 0.0)


def test_a_shift_is_a_number_or_to_be_measured() -> None:
    assert (parse("tldr").reward_shift, parse("hh").reward_shift) == ("reference", 0.0)
    assert parse("hh", "--reward-shift", "reference").reward_shift == "reference"
    assert parse("tldr", "--reward-shift", "-1.5").reward_shift == -1.5
    assert parse("tldr", "--config", write("reward_shift: 2\n")).reward_shift == 2.0
    assert parse("hh", "--config", write("reward_shift: reference\n")).reward_shift == "reference"


# What is refused.


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            "--clip 0.1",
            "--clip: it belongs to PPO, and this run's algorithm is KLQ; leave it out, or add --algorithm ppo",
        ),
        ("--no-whiten", "--no-whiten: it belongs to PPO"),
        ("tldr --value_coef=0.5", "--value-coef: it belongs to PPO"),
        ("--algorithm ppo --policy-weight 2", "--policy-weight: it belongs to KLQ, and this run's algorithm is PPO"),
    ],
)
def test_options_of_the_other_algorithm(capsys: pytest.CaptureFixture[str], args: str, said: str) -> None:
    """Said on the command line they would do nothing; presets, files and runs hold both algorithms' settings."""
    assert said in error_of(capsys, *args.split())
    assert parse(*"demo --algorithm ppo".split()).policy_weight == 20  # the preset's
    file = write("algorithm: ppo\npolicy_weight: 3\nclip: 0.3\n")
    assert parse("--config", file).policy_weight == 3
    assert parse("--config", file, "--algorithm", "klq").clip == 0.3
    assert parse(*"--algorithm ppo --clip 0.1 --alpha 0.5".split()).alpha == 0.5  # of both


def test_resume_without_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped folder is not a new run; with its preset named, one command starts a run and goes on with it."""
    Path("empty").mkdir()
    for args, folder in (
        (["--output-dir", "ruins/demo"], "ruins/demo"),
        (["--output-dir", "empty"], "empty"),
        ([], "runs/demo"),
    ):
        assert f"--resume: got no run in {folder} to go on with" in error_of(capsys, "--resume", *args)
    assert not Path("ruins").exists()
    assert parse("tldr", "--resume", "--output-dir", "new").output_dir == Path("new")
    assert parse("--config", write("preset: tldr\n"), "--resume").output_dir == Path("runs/tldr")


def test_a_measured_shift_stays_with_the_run() -> None:
    """config.yaml holds the number; the command that started the run, with --resume, goes on with it."""
    assert parse("tldr", "--output-dir", "out").reward_shift == "reference"
    save_run("out", dataclasses.replace(parse("tldr"), reward_shift=-1.25))
    for args in (["tldr"], [], ["tldr", "--reward-shift", "reference"], ["--reward-shift", "-1.25"]):
        assert parse(*args, "--output-dir", "out", "--resume").reward_shift == -1.25
    with pytest.raises(InputError, match=r"reward-shift: got 2.0, but the run in out has -1.25"):
        parse("--reward-shift", "2", "--output-dir", "out", "--resume")


def test_a_penalty_and_its_beta_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--beta: got 0.1, expected --ppo-penalty" in error_of(capsys, "--beta", "0.1")
    assert "--beta: got none, expected a number" in error_of(capsys, "--ppo-penalty", "forward")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tau", "0"),
        ("--tau", "-1"),
        ("--tau", "nan"),
        ("--tau", "inf"),
        ("--temperature", "0"),
        ("--learning-rate", "0"),
        ("--learning-rate", "inf"),
        ("--max-grad-norm", "0"),
        ("--max-grad-norm", "nan"),
        ("--lam", "1.01"),
        ("--lam", "-0.01"),
        ("--lam", "nan"),
        ("--gamma", "2"),
        ("--alpha", "0"),
        ("--alpha", "1.5"),
        ("--batch-size", "0"),
        ("--episodes", "0"),
        ("--epochs", "-1"),
        ("--eval-every", "0"),
        ("--eval-prompts", "0"),
        ("--checkpoint-every", "0"),
        ("--response-length", "0"),
        ("--prompt-length", "0"),
        ("--microbatch-tokens", "0"),
        ("--threads", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--missing-eos-penalty", "-1"),
        ("--missing-eos-penalty", "inf"),
        ("--reward-shift", "nan"),
        ("--reward-shift", "-inf"),
        ("--policy-weight", "nan"),
        ("--value-weight", "-0.5"),
        ("--minibatch-size", "0"),
        ("--minibatch-size", "65"),  # the demo's batch has 64
        ("--clip", "0"),
        ("--value-clip", "-1"),
        ("--beta", "-0.5"),
        ("--beta", "inf"),
    ],
)
def test_values_that_cannot_be(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    """The message names the option, what came and what was expected."""
    message = error_of(capsys, option, value)
    number = float(value)
    assert f"{option}: got {int(value) if value.isdigit() and value in message else value}" in message or (
        f"{option}: got {number}" in message
    )
    assert "expected" in message


def test_values_at_the_edge() -> None:
    config = parse(*"--lam 0 --gamma 0 --alpha 1 --missing-eos-penalty 0 --policy-weight 0 --max-grad-norm inf".split())
    assert (config.lam, config.gamma, config.missing_eos_penalty, config.policy_weight) == (0, 0, 0, 0)
    assert config.max_grad_norm == math.inf
    assert parse("--minibatch-size", "64", "--seed", str(2**64 - 1)).minibatch_size == 64


@pytest.mark.parametrize(("option", "value"), [("--tau", "much"), ("--seed", "1.5"), ("--algorithm", "dpo")])
def test_values_of_another_kind(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    message = error_of(capsys, option, value)
    assert option.strip("-") in message and value in message


@pytest.mark.parametrize(
    ("given", "meant"),
    [("--tua", "--tau"), ("--learning-rat", "--learning-rate"), ("--reward-modle", "--reward-model")],
)
def test_an_unknown_option_suggests_the_nearest(capsys: pytest.CaptureFixture[str], given: str, meant: str) -> None:
    message = error_of(capsys, given, "1")
    assert given in message and re.search(rf"Perhaps you meant:\W+{meant} ", message)
    message = error_of(capsys, "--config", write(f"{given.strip('-')}: 1\n"))
    assert f"got {given.strip('-')}, expected an option; perhaps {meant.strip('-')}" in message


def test_an_unknown_preset_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["tdlr"], ["--config", write("preset: tdlr\n")]):
        message = error_of(capsys, *args)
        assert "tdlr" in message and all(f"'{name}'" in message for name in PRESETS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- tau\n- lam\n", "got list"),
        (b"", "got NoneType"),
        (b"tau 0.1", "got str"),
        (b"tau: [0.1, 0.2]", "tau: got [0.1, 0.2]"),
        (b"policy: {name: x}", "policy: got {'name': 'x'}"),
        (b"config: other.yaml", "got config, expected an option"),
        (b"1: 2", "got 1, expected an option"),
        (b"tau: 0.1: 2", "mapping values"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_files_that_are_no_settings(capsys: pytest.CaptureFixture[str], content: bytes, said: str) -> None:
    Path("settings.yaml").write_bytes(content)
    message = error_of(capsys, "--config", "settings.yaml")
    assert message.startswith("error: --config settings.yaml: ") and said in message


def test_a_missing_file_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config none.yaml: " in error_of(capsys, "--config", "none.yaml")
    assert "--config .: " in error_of(capsys, "--config", ".")


def test_nothing_is_written_before_the_settings_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    error_of(capsys, "--tau", "0")
    error_of(capsys, "custom", "--output-dir", "out")  # names no policy
    assert list(Path().iterdir()) == []


# A run's own settings.


def test_yaml_round_trip() -> None:
    config = parse(
        *(
            "tldr --policy ./π --reward module:function --dataset x.jsonl --learning-rate 1e-5 --tau 1e-7 --no-whiten "
            "--algorithm ppo --no-reward-eos"
        ).split(),
        *"--minibatch-size 64 --seed 18446744073709551615 --threads 2 --output-dir out --dry-run".split(),
    )
    saved = Config.from_yaml(config.to_yaml())
    assert settings(saved) == settings(config)
    assert (saved.output_dir, saved.dry_run, saved.resume) == (None, False, False)  # of the invocation, not the run
    assert set(yaml.safe_load(config.to_yaml())) == set(settings(config))


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_s_config_yaml_gives_its_settings_again(name: str) -> None:
    config = save_run("earlier", parse(name, "--seed", "5", "--learning-rate", "3e-7", "--reward-shift", "-0.5"))
    assert settings(parse("--config", "earlier/config.yaml")) == settings(config)
    assert settings(parse(name, "--config", "earlier/config.yaml", "--seed", "6")) == settings(config) | {"seed": 6}


@pytest.mark.parametrize("text", ["", "tau: 0.1\nunknown: 1\n", "tau: abc\n", "a: b: c\n", "[]"])
def test_a_damaged_config_yaml(text: str) -> None:
    with pytest.raises(InputError, match=r"config\.yaml"):
        Config.from_yaml(text)


def test_resume_keeps_the_run_s_settings() -> None:
    config = save_run("out", parse("tldr", "--tau", "0.5", "--seed", "9"))
    for args in ([], ["tldr"], ["tldr", "--tau", "0.5"], ["--seed", "9"]):
        resumed = parse(*args, "--output-dir", "out", "--resume")
        assert settings(resumed) == settings(config)
        assert resumed.resume and resumed.output_dir == Path("out")
    less = parse("--microbatch-tokens", "512", "--threads", "1", "--output-dir", "out", "--resume")  # out of memory
    assert settings(less) == settings(config) | {"microbatch_tokens": 512, "threads": 1}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--tau", "0.25"], "tau: got 0.25, but the run in out has 0.5"),
        (["demo"], "preset: got demo, but the run in out has tldr"),
        (["--config", "settings.yaml"], "seed: got 1, but the run in out has 9"),
        (["--reward", "m:f"], "reward-model: got None, but the run in out has "),
        (["--no-reward-eos"], "reward-eos: got False"),
    ],
)
def test_resume_refuses_other_settings(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    save_run("out", parse("tldr", "--tau", "0.5", "--seed", "9"))
    write("seed: 1\n")
    assert said in error_of(capsys, *args, "--output-dir", "out", "--resume")


def test_output_dirs_are_numbered() -> None:
    assert parse().output_dir == Path("runs/demo")
    Path("runs/demo").mkdir(parents=True)
    assert parse().output_dir == Path("runs/demo-2")
    assert parse("tldr").output_dir == Path("runs/tldr")
    Path("runs/demo-2").mkdir()
    Path("runs/demo-10").mkdir()  # some in between were removed
    Path("runs/demo-old").mkdir()
    assert parse().output_dir == Path("runs/demo-11")
    assert parse("--output-dir", "elsewhere").output_dir == Path("elsewhere")


def test_resume_takes_the_newest_run() -> None:
    for name, seed in (("demo", 1), ("demo-2", 2), ("demo-10", 10), ("custom", 3)):
        save_run(f"runs/{name}", parse(name.split("-")[0], "--seed", str(seed)))
    for args, folder, seed in ((["demo"], "demo-10", 10), ([], "demo-10", 10), (["custom"], "custom", 3)):
        config = parse(*args, "--resume")
        assert (config.output_dir, config.seed) == (Path("runs") / folder, seed)
