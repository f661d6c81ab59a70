"""Failure signatures, on made-up histories and on real runs that fail; and the trackers that show a run elsewhere."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from klq_fast import plots
from klq_fast.batch import Rollout
from klq_fast.config import Config, InputError
from klq_fast.metrics import Record, Reporter, check_tracker, read_lines
from klq_fast.train import main
from klq_fast.watch import SIGNATURES, diversity, findings, watcher

TAU = 0.05


def healthy(batches: int = 60, seed: int = 0, scale: float = 1.0) -> list[Record]:
    """A run that learns: the score rises by eight times its noise, more than τ·KL costs, and the entropy halves."""
    noise = random.Random(seed)
    records = []
    for i in range(batches):
        learned = 1 - math.exp(-i / 20)
        records.append(
            {
                "batch": i + 1,
                "episodes": 64 * (i + 1),
                "score_std": scale * 0.8,  # a batch's mean is off by an eighth of it
                "score": scale * (0.2 + 0.8 * learned + noise.gauss(0, 0.1)),
                "kl": scale * (6 * learned + noise.gauss(0, 0.2) * (i > 0)),
                "loss": scale**2 * 0.2 * noise.uniform(0.7, 1.3),
                "value_error": scale**2 * 0.2 * noise.uniform(0.7, 1.3),
                "grad_norm": noise.uniform(1, 3),
                "learning_rate": 3e-4 * (1 - i / batches),
                "explained_variance": 0.7 * learned + noise.gauss(0, 0.1),
                "response_length": 11 - learned + noise.gauss(0, 0.3),
                "entropy": 2 - learned,
                "distinct_2": 0.6 - 0.15 * learned,
            }
        )
    return with_reward(records)


def with_reward(records: list[Record]) -> list[Record]:
    return [record | {"rlhf_reward": record["score"] - TAU * record["kl"]} for record in records]


def changed(records: list[Record], start: int, **changes: Any) -> list[Record]:
    """From batch index `start` on, each named figure is a constant or a function of the batches since."""
    out = []
    for i, record in enumerate(records):
        if i >= start:
            new = {name: change(i - start) if callable(change) else change for name, change in changes.items()}
            record = record | new
        out.append(record)
    return with_reward(out)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_healthy_run_gives_no_warning(seed: int, scale: float) -> None:
    """Whatever the scale of the reward; τ scales with it, as it would have to."""
    watch = watcher(TAU)
    assert [text for record in healthy(seed=seed, scale=scale) for text in watch(record)] == []


def warnings(records: list[Record]) -> dict[int, list[str]]:
    watch = watcher(TAU)
    said = {record["batch"]: watch(record) for record in records}
    return {batch: texts for batch, texts in said.items() if texts}


FAILURES: dict[str, tuple[str, int, dict[str, Any]]] = {
    # The KL grows by a fifth a batch and the score gains nothing by it.
    "kl_runaway": ("KL is running away", 20, {"kl": lambda i: 6 * 1.2**i}),
    # The score falls below where it began.
    "kl_runaway, by the score": ("KL is running away", 20, {"score": lambda i: 0.8 - 0.1 * i}),
    # As in the first step of too high a learning rate: all batches but the first are of a policy that is worse.
    "kl_runaway, from the first step on": ("KL is running away", 1, {"score": -0.3, "kl": 1.0}),
    "swinging": ("thrown to and fro", 20, {"score": lambda i: 1.5 + 0.5 * (-1) ** i}),
    "not_moving": ("the policy is not moving: KL is 0", 0, {"kl": 0.0}),
    "not_moving, no gradient": ("the policy is not moving: the gradient was 0", 20, {"grad_norm": 0.0}),
    "not_moving, collapsed": ("KL has collapsed to zero", 30, {"kl": 1e-7}),
    "values_worthless": ("the value head is worse than a constant", 10, {"explained_variance": -0.8}),
    "values_explode": (
        "the value head explodes: its value_error",
        20,
        {"value_error": lambda i: 0.2 * 2.0**i, "explained_variance": -0.2},
    ),
    "values_explode, PPO": (
        "the value head explodes: its value_loss",
        20,
        {"value_error": None, "value_loss": lambda i: 0.01 * (1 if i < 28 else 100), "explained_variance": -0.2},
    ),
    "reward_hacking, length": ("reward hacking", 30, {"response_length": lambda i: max(1.0, 10 - i)}),
    "reward_hacking, one text": ("reward hacking", 30, {"distinct_2": lambda i: 0.4 * 0.8**i}),
    "reward_hacking, no entropy": ("reward hacking", 30, {"entropy": lambda i: 1.0 * 0.7**i}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_said_once_and_soon(name: str) -> None:
    text, start, changes = FAILURES[name]
    said = warnings(changed(healthy(), start, **changes))
    assert len(said) == 1, said
    (batch, texts), *_ = said.items()
    assert len(texts) == 1 and text in texts[0], texts
    assert start < batch <= start + 35  # values_worthless waits for 20 batches and a start of 8
    assert findings(changed(healthy(), start, **changes), TAU).keys() == {name.split(",")[0]}


def test_every_signature_has_a_failure_here() -> None:
    assert {name.split(",")[0] for name in FAILURES} == set(SIGNATURES)


def test_values_that_never_explain_anything_are_said_after_a_hundred_batches() -> None:
    said = warnings(changed(healthy(150), 0, explained_variance=lambda i: 0.01 * (-1) ** i))
    assert list(said) == [108] and "the value head explains nothing" in said[108][0]


def test_errors_that_grow_with_what_is_there_to_explain_are_no_explosion() -> None:
    """A rare reward that is found multiplies the returns' variance, and the values' error with it."""
    assert warnings(changed(healthy(), 20, value_error=lambda i: 0.2 * 2.0**i, explained_variance=0.3)) == {}


def test_a_rare_reward_has_noise() -> None:
    """Most batches score 0: the policy spends less KL than the few that do not are worth."""
    rare = changed(
        healthy(),
        0,
        score=lambda i: 0.4 if i % 4 == 3 else 0.0,  # the first batch has none, and so no spread
        score_std=lambda i: 2.0 if i % 4 == 3 else 0.0,
        kl=lambda i: 0.1 * i,
    )
    assert warnings(rare) == {}


def test_steps_one_way_are_no_swings() -> None:
    assert warnings(changed(healthy(), 0, score=lambda i: 0.2 + 2 * min(i, 12), kl=1.0)) == {}


def test_shorter_answers_without_a_rising_score_are_no_hacking() -> None:
    """A task may want short answers; only a reward that rises with the collapse is suspicious."""
    flat = changed(healthy(), 0, score=lambda i: 0.5 + 0.1 * (-1) ** i, kl=lambda i: 0.5 + 0.1 * (i % 3), entropy=1.0)
    assert warnings(changed(flat, 30, response_length=2.0)) == {}


def test_said_again_after_it_went_away_and_a_restart_repeats_nothing() -> None:
    records = healthy()
    for start in (15, 40):
        for i in range(start, start + 8):
            records[i] |= {"kl": 100.0}
    said = warnings(records)
    assert len(said) == 2
    first, second = said
    assert 15 < first <= 24 and 40 < second <= 49
    for cut in (first, first + 2):  # stopped after it was said, and gone on
        watch = watcher(TAU, records[:cut])
        assert [record["batch"] for record in records[cut:] if watch(record)] == [second]


def test_missing_figures_are_not_judged() -> None:
    bare = [{"batch": i + 1, "score": None, "kl": float("nan")} for i in range(200)]
    assert warnings(bare) == {}
    null = [record | {"explained_variance": None, "value_error": None} for record in healthy()]
    assert warnings(null) == {}


def test_diversity_of_a_batch() -> None:
    """Rows 1 2 1 2 and 1 2 3 (then padding): pairs 12 21 12, 12 23, of which 3 are distinct."""
    rollout = Rollout(
        prompt_tokens=torch.zeros(2, 1, dtype=torch.int64),
        prompt_lengths=torch.ones(2, dtype=torch.int64),
        response_tokens=torch.tensor([[1, 2, 1, 2], [1, 2, 3, 9]]),
        response_lengths=torch.tensor([4, 3]),
        ended=torch.tensor([False, True]),
        logprobs=torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, 100.0]]),
    )
    assert diversity(rollout) == {"entropy": 4.0, "distinct_2": 3 / 5}
    single = Rollout(
        prompt_tokens=torch.zeros(1, 1, dtype=torch.int64),
        prompt_lengths=torch.ones(1, dtype=torch.int64),
        response_tokens=torch.tensor([[7]]),
        response_lengths=torch.tensor([1]),
        ended=torch.tensor([True]),
        logprobs=torch.tensor([[-0.5]]),
    )
    assert diversity(single) == {"entropy": 0.5, "distinct_2": 1.0}  # no pair, so none is repeated


# Real runs.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    tiny.neox(folder / "neox")
    tiny.write_jsonl(folder / "prompts.jsonl", ({"prompt": f"prompt {i}:"} for i in range(40)))
    (folder / "watch_rewards.py").write_text(
        "import itertools\n"
        "def ascii(prompts, responses):\n"
        "    return [sum(letter < '\\x7f' for letter in response) / 2 for response in responses]\n"
        "def short(prompts, responses):\n"
        "    return [-float(len(response)) for response in responses]\n"
        "signs = itertools.cycle((1, -1))\n"
        "def turning(prompts, responses):\n"
        "    sign = next(signs)\n"
        "    return [sign * (10 + score) for score in ascii(prompts, responses)]\n"
    )
    return folder


def run(folder: Path, output: Path, reward: str, *more: str) -> list[Record]:
    main(
        f"custom --policy {folder / 'neox'} --dataset {folder / 'prompts.jsonl'} --reward watch_rewards:{reward} "
        f"--batch-size 16 --episodes 320 --response-length 8 --eval-every 100 --eval-prompts 2 --checkpoint-every 100 "
        f"--temperature 1 --output-dir {output}".split()
        + list(more)
    )
    return read_lines(output / "metrics.jsonl")


@pytest.mark.cpu
def test_runs_that_fail_say_so_and_one_that_learns_does_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(plots, "draw", lambda run: None)  # it takes longer than these runs

    def said(reward: str, *more: str) -> list[str]:
        records = run(folder, tmp_path / f"run{len(list(tmp_path.iterdir()))}", reward, *more)
        found = [text for record in records for text in record.get("warnings", [])]
        assert all({"entropy", "distinct_2", "tflops_per_device"} <= record.keys() for record in records)
        printed = capsys.readouterr().out.replace("\n", " ")
        assert all(f"warning: {text}" in printed for text in found)
        return found

    assert said("ascii", "--learning-rate", "3e-3", "--policy-weight", "20") == []
    # A step of 0.3 on weights of 0.02 puts the policy somewhere else at once, and with τ = 0.5 no score can pay for it.
    assert any("KL is running away" in text for text in said("ascii", "--learning-rate", "0.3", "--tau", "0.5"))
    # Whether steps of that size throw a policy to and fro is chance (4 of 16 seeds), so here the reward does it.
    assert any("thrown to and fro" in text for text in said("turning"))
    # The shortest answer is none: τ = 0.001 lets it go there.
    hacked = said("short", "--learning-rate", "1e-2", "--tau", "1e-3", "--policy-weight", "1000")
    assert any("reward hacking" in text and "the responses' length" in text for text in hacked)


# Trackers.


def test_tensorboard_shows_the_run_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done in (0, 3):  # stopped during batch 5, whose checkpoint was after batch 3
        with Reporter(6, quiet=True) as reporter:
            reporter.track("tensorboard", tmp_path, {"tau": 0.05, "output_dir": tmp_path}, done)
            reporter.start_at(done)
            for batch in range(done + 1, 6 if done == 0 else 7):
                record = {"batch": batch, "score": batch + done / 10, "rlhf_reward": 0.0, "kl": 0.0, "loss": 0.0}
                reporter.batch(record | {"seconds": 1.0, "note": "text is not drawn", "warnings": []})
            figures = {"batch": batch, "episodes": 9, "score": 7.0, "rlhf_reward": 0.0, "kl": 0.0}
            reporter.evaluation(figures | {"response_length": 1.0, "no_eos": 0.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True).Reload()
    scores = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/score")]
    assert scores == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.3), (5, 5.3), (6, 6.3)]
    assert [event.step for event in events.Scalars("eval/score")] == [6]
    assert "train/note" not in events.Tags()["scalars"]


class FakeRun:
    """What of W&B's and trackio's runs is used, written down."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.logged, self.finished = options, [], False  # type: ignore[var-annotated]

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def log(self, figures: Record, step: int | None = None) -> None:
        self.logged.append(figures | ({} if step is None else {"batch": step}))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_is_the_same_run_of_the_tracker(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[FakeRun] = []
    library: Any = type(sys)(name)

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    library.init = init
    monkeypatch.setitem(sys.modules, name, library)
    for folder, done in ((tmp_path / "a", 0), (tmp_path / "a", 3), (tmp_path / "b" / "a", 0)):
        folder.mkdir(parents=True, exist_ok=True)
        with Reporter(6, quiet=True) as reporter:
            reporter.track(name, folder, {"tau": 0.05, "output_dir": folder}, done)
            reporter.start_at(done)
            record = {"batch": done + 1, "score": 2.0, "rlhf_reward": 0.0, "kl": 0.0, "loss": 0.0, "seconds": 1.0}
            reporter.batch(record)
        assert runs[-1].finished and runs[-1].logged[0]["train/score"] == 2.0
        assert runs[-1].logged[0]["batch"] == done + 1
        json.dumps(runs[-1].options["config"])  # plain values
    key = "id" if name == "wandb" else "name"
    first, resumed, other = (run.options[key] for run in runs)
    assert first == resumed != other  # another run, in a folder of the same name
    assert {run.options["resume"] for run in runs} == {"allow"}


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def call(name: str) -> FakeRun:
        calls.append(name)
        if name == fails or (fails == "log" and name == "finish"):  # what failed once often fails again
            raise ConnectionError("no route to host")
        return tracked

    tracked: Any = FakeRun({})
    tracked.log, tracked.finish = lambda *args: call("log"), lambda: call("finish")
    library: Any = type(sys)("wandb")
    library.init = lambda **options: call("init")
    monkeypatch.setitem(sys.modules, "wandb", library)
    with Reporter(3) as reporter:
        reporter.track("wandb", tmp_path, {}, 0)
        reporter.start_at(0)
        for batch in (1, 2):
            reporter.batch({"batch": batch, "score": 2.0, "rlhf_reward": 0.0, "kl": 0.0, "loss": 0.0, "seconds": 1.0})
    said = capsys.readouterr().out
    assert "batch 2/3" in said
    assert said.count("the tracker failed (ConnectionError: no route to host): the run goes on without it") == 1
    assert (
        calls == {"init": ["init"], "log": ["init", "log", "finish"], "finish": ["init", "log", "log", "finish"]}[fails]
    )


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"--tracker {name}: needs {name} .*pip install \"klq_fast\[{name}\]\""):
        check_tracker(name)


def test_no_tracker_needs_nothing(tmp_path: Path) -> None:
    check_tracker(Config().tracker)
    with Reporter(1, quiet=True) as reporter:
        reporter.track("none", tmp_path, {}, 0)
        assert reporter.tracked is None
    assert list(tmp_path.iterdir()) == []
