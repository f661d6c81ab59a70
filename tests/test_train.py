"""Whole runs of `python -m klq_fast.train` on tiny models: what they leave, that they learn, stop and go on exactly."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from klq_fast import models, plots
from klq_fast.batch import Rollout
from klq_fast.config import Config
from klq_fast.klq import KLQ
from klq_fast.metrics import read_lines
from klq_fast.models import Policy, load_policy
from klq_fast.train import finite, main

REWARDS = '''
def letters(prompts, responses):
    """Learnable from the first batch on, where one token in twenty is one: how many letters are of a to m."""
    return [float(sum("a" <= letter <= "m" for letter in response)) for response in responses]


def letter_a(prompts, responses):
    """Learnable: the share of the response that is the letter a."""
    return [10 * response.count("a") / (len(response) + 1) for response in responses]


calls = []


def fails_once(prompts, responses):
    """letter_a, but the fifth call (the evaluation after batch 3) raises."""
    calls.append(len(prompts))
    if len(calls) == 5:
        raise ConnectionError("the judge is away")
    return letter_a(prompts, responses)


def counted(prompts, responses):
    calls.append(len(prompts))
    return [float(len(response)) for response in responses]


def nan_later(prompts, responses):
    return [float("nan") if "prompt 7" in prompt else 0.0 for prompt in prompts]
'''

SMALL = (
    "--batch-size 16 --response-length 8 --learning-rate 1e-2 --eval-every 3 --checkpoint-every 4 --threads 1".split()
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts as text and as chats, a module of rewards, and the model folders."""
    folder = tmp_path_factory.mktemp("train")
    tiny.write_jsonl(folder / "prompts.jsonl", ({"prompt": f"prompt {i}:"} for i in range(40)))
    chats = ({"messages": [{"role": "user", "content": f"question {i}?"}]} for i in range(40))
    tiny.write_jsonl(folder / "chats.jsonl", chats)
    (folder / "tiny_rewards.py").write_text(REWARDS)
    for make in (tiny.neox, tiny.llama, tiny.gpt2, tiny.neox_reward, tiny.gpt2_reward, tiny.distilbert_reward):
        make(folder / make.__name__)
    return folder


@pytest.fixture(autouse=True)
def _importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(plots, "draw", lambda run: None)  # takes longer than these runs; those of processes draw


def arguments(folder: Path, run: Path, *more: str, policy: str = "neox", dataset: str = "prompts.jsonl") -> list[str]:
    reward = [] if {"--reward", "--reward-model"} & set(more) else ["--reward", "tiny_rewards:letter_a"]
    named = ["--policy", str(folder / policy), "--dataset", str(folder / dataset), "--output-dir", str(run)]
    return ["custom", *named, *reward, *SMALL, *more]


def start(args: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "klq_fast.train", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def figures(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or eval.jsonl without the figures that the machine decides."""
    records = tiny.read_jsonl(run / f"{name}.jsonl")
    measured = ("tokens_per_second", "peak_memory_bytes", "tflops_per_device", "mfu", "update_mfu")
    return [{k: v for k, v in r.items() if not k.endswith("seconds") and k not in measured} for r in records]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 batches."""
    run = tmp_path_factory.mktemp("run") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        process = start(arguments(folder, run, "--episodes", "192"))
        output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return run


def test_a_run_leaves_its_folder(finished: Path) -> None:
    metrics, evaluations = figures(finished, "metrics"), figures(finished, "eval")
    assert [record["batch"] for record in metrics] == list(range(1, 13))
    assert [record["episodes"] for record in evaluations] == [0, 48, 96, 144, 192]
    for record in metrics + evaluations:
        assert record["rlhf_reward"] == pytest.approx(record["score"] - 0.05 * record["kl"], abs=1e-6)
        assert {"episodes", "score", "kl", "response_length", "no_eos"} <= record.keys()
    assert {"loss", "learning_rate", "grad_norm"} <= metrics[0].keys()
    for record in tiny.read_jsonl(finished / "metrics.jsonl"):
        phases = [record[f"{phase}_seconds"] for phase in ("rollout", "score", "logprobs", "update")]
        assert all(seconds > 0 for seconds in phases) and sum(phases) <= record["seconds"]
        assert record["tokens_per_second"] > 0 and record["skipped_steps"] == 0
        assert 10**8 < record["peak_memory_bytes"] < 10**10  # torch alone takes the first
    assert metrics[0]["kl"] == evaluations[0]["kl"] == 0.0  # the policy is its reference, bit for bit
    assert metrics[-1]["learning_rate"] == pytest.approx(1e-2 / 48)  # the last of 48 steps of a fall to 0
    samples = tiny.read_jsonl(finished / "samples.jsonl")
    assert len(samples) == 4
    assert samples[0].keys() == {"prompt", "response_before", "response_after", "score_before", "score_after"}
    plots = {path.name for path in (finished / "plots").iterdir()}
    assert plots == {f"{p}.png" for p in ("score", "rlhf_reward", "kl", "loss", "response_length", "reward_vs_kl")}
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["batch-000012"]
    assert "tau: 0.05" in (finished / "config.yaml").read_text()


def test_the_policy_folder_is_the_trained_policy(finished: Path, folder: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(finished / "policy")
    before = AutoModelForCausalLM.from_pretrained(folder / "neox")
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (finished / "policy", folder / "neox")]
    assert tokenizers[0]("def é")["input_ids"] == tokenizers[1]("def é")["input_ids"]
    head = load_file(finished / "policy" / "value_head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {"weight": (1, 32), "bias": (1,)}
    changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True)]
    assert all(changed)


@pytest.mark.parametrize(("algorithm", "dtype"), [("klq", torch.bfloat16), ("ppo", torch.float32)])
def test_it_learns(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(models, "compute_dtype", lambda device: dtype)  # bf16 as on a GPU
    main(
        arguments(
            folder, tmp_path / "run", "--episodes=480", f"--algorithm={algorithm}", "--reward", "tiny_rewards:letters"
        )
    )
    evaluations = tiny.read_jsonl(tmp_path / "run" / "eval.jsonl")
    # A random policy writes about one of them in 20 tokens; five of ten tokens leave no doubt.
    assert evaluations[0]["score"] < 1.5 and evaluations[-1]["score"] > 5


@pytest.mark.parametrize(
    ("policy", "dataset", "more"),
    [
        ("llama", "chats.jsonl", []),
        ("gpt2", "prompts.jsonl", ["--minibatch-size", "6"]),
        ("neox", "prompts.jsonl", ["--reward-model", "neox_reward"]),
        ("neox", "prompts.jsonl", ["--reward-model", "gpt2_reward"]),
        ("llama", "chats.jsonl", ["--reward-model", "distilbert_reward", "--algorithm", "ppo"]),
    ],
)
def test_custom_takes_models_of_any_family(
    folder: Path, tmp_path: Path, policy: str, dataset: str, more: list[str]
) -> None:
    more = [str(folder / word) if word.endswith("_reward") else word for word in more]
    run = tmp_path / "run"
    main(arguments(folder, run, "--episodes", "48", *more, policy=policy, dataset=dataset))
    metrics = tiny.read_jsonl(run / "metrics.jsonl")
    assert metrics[0]["kl"] == 0.0 and metrics[-1]["kl"] != 0.0
    reloaded = AutoModelForCausalLM.from_pretrained(run / "policy")
    if policy == "llama":
        assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight


def test_in_bfloat16_as_on_a_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that compute in bf16, and master weights in float32."""
    monkeypatch.setattr(models, "compute_dtype", lambda device: torch.bfloat16)
    reward_model = ["--reward-model", str(folder / "neox_reward"), "--activation-checkpointing"]
    main(arguments(folder, tmp_path / "run", "--episodes", "32", *reward_model))
    metrics, evaluations = figures(tmp_path / "run", "metrics"), figures(tmp_path / "run", "eval")
    assert metrics[0]["kl"] == evaluations[0]["kl"] == 0.0  # the policy is its reference, bit for bit
    assert metrics[-1]["kl"] != 0.0 and evaluations[-1]["score"] != evaluations[0]["score"]
    exported = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert all((weight != weight.bfloat16()).any() for weight in exported.values())  # the master weights


def test_the_shift_by_the_reference_is_measured_once(folder: Path, tmp_path: Path) -> None:
    import tiny_rewards  # type: ignore[import-not-found]

    tiny_rewards.calls.clear()
    run, shifted = tmp_path / "run", ["--reward", "tiny_rewards:counted", "--reward-shift", "reference"]
    main(arguments(folder, run, "--episodes", "16", *shifted))
    assert tiny_rewards.calls == [4, 16, 4]
    shift = float(Config.from_yaml((run / "config.yaml").read_text()).reward_shift)
    first, samples = figures(run, "eval")[0], tiny.read_jsonl(run / "samples.jsonl")
    assert first["score"] == first["rlhf_reward"] == 0.0 and shift < 0
    assert all(row["score_before"] == pytest.approx(len(row["response_before"]) + shift, abs=1e-5) for row in samples)
    assert all(row["score_after"] == pytest.approx(len(row["response_after"]) + shift, abs=1e-5) for row in samples)


def test_microbatches_do_not_change_the_result(folder: Path, tmp_path: Path) -> None:
    for name, tokens in (("one", "100000"), ("many", "40")):
        main(arguments(folder, tmp_path / name, "--episodes", "32", "--microbatch-tokens", tokens))
    one, many = figures(tmp_path / "one", "metrics"), figures(tmp_path / "many", "metrics")
    for a, b in zip(one, many, strict=True):
        for name in ("loss", "grad_norm", "kl", "td_error"):
            # fp32 sums in another order; Adam's first steps divide by gradients near 0, hence not 1e-6
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("batches", [0, 5])
def test_kill_and_resume_repeats_the_run(folder: Path, tmp_path: Path, finished: Path, batches: int) -> None:
    """Killed before the first checkpoint, and between two; the half line of a killed write is dropped."""
    run = tmp_path / "run"
    process = start(arguments(folder, run, "--episodes", "192"))
    wanted = run / ("metrics.jsonl" if batches else "config.yaml")
    wait_for(lambda: wanted.is_file() and (not batches or len(read_lines(wanted)) >= batches), process)
    process.kill()
    process.communicate()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"batch": 99, "episo')
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "partial-99").mkdir()  # as a crash while writing leaves it
    main(arguments(folder, run, "--episodes", "192", "--resume"))
    assert figures(run, "metrics") == figures(finished, "metrics")
    assert figures(run, "eval") == figures(finished, "eval")
    assert tiny.read_jsonl(run / "samples.jsonl") == tiny.read_jsonl(finished / "samples.jsonl")


def test_a_reward_that_fails_later_loses_nothing(
    folder: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_rewards  # type: ignore[import-not-found]

    tiny_rewards.calls.clear()
    args = arguments(folder, tmp_path / "run", "--episodes", "192", "--reward", "tiny_rewards:fails_once")
    error = refused(args, capsys)
    assert "the judge is away" in error and "prompt" in error
    assert (tmp_path / "run" / "checkpoints" / "batch-000003").is_dir()
    main([*args, "--resume"])
    assert figures(tmp_path / "run", "metrics") == figures(finished, "metrics")
    assert figures(tmp_path / "run", "eval") == figures(finished, "eval")


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    error = refused(arguments(folder, run, "--episodes", "96", "--learning-rate", "1e30"), capsys)
    assert "batch 1" in error and "finite" in error and "--learning-rate" in error
    assert not (run / "policy").exists() and not (run / "metrics.jsonl").exists()


def losses_not_finite(monkeypatch: pytest.MonkeyPatch, bad: Container[int]) -> None:
    """From now on the losses of the optimizer steps in `bad`, counted from 0, are NaN; a step is one microbatch."""
    loss, steps = KLQ.loss, iter(range(10**6))

    def spoiled(self: KLQ, *args: Any) -> Any:
        output = loss(self, *args)
        return output._replace(loss=output.loss * torch.nan) if next(steps) in bad else output

    monkeypatch.setattr(KLQ, "loss", spoiled)


def test_a_step_whose_loss_is_not_finite_is_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the midst of a batch; and at the end of one, after which the run fails: what was learned until then stays."""
    import tiny_rewards  # type: ignore[import-not-found]

    tiny_rewards.calls.clear()
    run, args = tmp_path / "run", arguments(folder, tmp_path / "run", "--episodes", "64", "--reward")
    losses_not_finite(monkeypatch, {5, 6, 10, 11})  # of four steps a batch
    assert "the judge is away" in refused([*args, "tiny_rewards:fails_once"], capsys)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["batch-000003"]
    main([*args, "tiny_rewards:fails_once", "--resume"])
    metrics = figures(run, "metrics")
    assert [record["skipped_steps"] for record in metrics] == [0, 2, 2, 0]
    assert all(isinstance(record[name], float) for record in metrics for name in ("loss", "grad_norm", "kl"))
    assert all(tensor.isfinite().all() for tensor in load_file(run / "policy" / "model.safetensors").values())


def test_weights_are_bad_that_give_no_finite_log_probs(folder: Path) -> None:
    policy, config = load_policy(str(folder / "neox"), 1.0, torch.device("cpu")), Config()
    lengths = torch.tensor([3, 5])
    rollout = Rollout(torch.randint(9, (2, 5)), lengths, torch.randint(9, (2, 5)), lengths, torch.ones(2).bool())
    assert finite(rollout, policy, config)
    policy.value_head.bias.data.fill_(torch.nan)
    assert not finite(rollout, policy, config)


def test_three_bad_steps_in_a_row_stop_the_run_with_what_is_good(
    folder: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps of the third batch: the weights that made it are kept, its rows can be read, and it can be redone."""
    run, args = tmp_path / "run", arguments(folder, tmp_path / "run", "--episodes", "192")
    with monkeypatch.context() as patch:
        losses_not_finite(patch, range(8, 12))
        with pytest.raises(SystemExit):
            main(args)
    output = capsys.readouterr()
    assert "batch 3: 3 optimizer steps in a row" in output.err and "loss nan" in output.err
    assert str(run / "not_finite-000003.jsonl") in output.out
    rows = tiny.read_jsonl(run / "not_finite-000003.jsonl")
    assert sorted(row["episode"] for row in rows) == list(range(32, 48))
    for row in rows:
        count = len(row["response_tokens"])
        assert 0 < count <= 8 and 0 < len(row["prompt_tokens"]) and isinstance(row["reward"], float)
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
            assert len(row[name]) == count and all(isinstance(number, float) for number in row[name])
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["batch-000002"]
    main([*args, "--resume"])
    assert figures(run, "metrics") == figures(finished, "metrics")


def test_out_of_memory_halves_the_microbatches_and_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that holds 100 tokens: 16 rows of about 18 do not fit, half of them do not, a quarter does."""
    main(arguments(folder, tmp_path / "roomy", "--episodes", "48"))
    forward = Policy.forward

    def limited(self: Policy, batch: Rollout, loss: Any = None, num_tokens: Any = None) -> Any:
        tokens = int((batch.prompt_lengths + batch.response_lengths).sum())
        if loss is not None and tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(self, batch, loss, num_tokens)

    monkeypatch.setattr(Policy, "forward", limited)
    main(arguments(folder, tmp_path / "tight", "--episodes", "48"))
    said = re.findall(r"out of memory: microbatches of (\d+) tokens from now on, not (\d+)", capsys.readouterr().out)
    assert len(said) == 1 and 50 < int(said[0][0]) <= 100 and said[0][1] == "16384"
    for name in ("loss", "grad_norm", "kl", "td_error"):
        ours, expected = ([r[name] for r in figures(tmp_path / run, "metrics")] for run in ("tight", "roomy"))
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-4), name  # as where microbatches differ from the start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(folder: Path, tmp_path: Path, finished: Path, number: int) -> None:
    run = tmp_path / "run"
    process = start(arguments(folder, run, "--episodes", "192"))
    wait_for(lambda: len(read_lines(run / "metrics.jsonl")) >= 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + number, output
    done = len(read_lines(run / "metrics.jsonl"))
    assert f"stopped after batch {done}" in output and f"--output-dir {run} --resume" in output
    assert (run / "checkpoints" / f"batch-{done:06d}").is_dir()
    main(["--resume", "--output-dir", str(run)])  # the run's own settings stand in for all that is not said
    assert figures(run, "metrics") == figures(finished, "metrics")


def test_a_finished_run_resumed_does_nothing(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main(arguments(folder, finished, "--episodes", "192", "--resume"))
    assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_another_run_is_not_overwritten(folder: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds another run" in refused(arguments(folder, finished), capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--policy", "/no/such/folder"], ["policy", "/no/such/folder"]),
        (["--dataset", "/no/such.jsonl"], ["dataset", "/no/such.jsonl"]),
        (["--reward", "no_such_module:f"], ["--reward", "no_such_module"]),
        (["--reward", "tiny_rewards:nan_later"], ["nan", "prompt 7"]),
        (["--response-length", "200"], ["positions", "--response-length 200"]),
    ],
)
def test_bad_input_is_refused_before_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    error = refused(arguments(folder, tmp_path / "run", *more), capsys)
    assert error.startswith("error: ") and all(word in error for word in words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(folder, tmp_path / "run", "--dry-run"))
    assert "36 prompts, 4 held out" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def wait_for(condition: "Any", process: subprocess.Popen[str], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_metrics_are_json(finished: Path) -> None:
    for name in ("metrics", "eval", "samples"):
        for line in (finished / f"{name}.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_one_process_at_a_time_writes_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    process = start(arguments(folder, run, "--episodes", "16000"))
    wait_for(lambda: len(read_lines(run / "metrics.jsonl")) >= 2, process)
    assert "another process" in refused(arguments(folder, run, "--episodes", "16000", "--resume"), capsys)
    process.kill()
    process.communicate()
    batches = [record["batch"] for record in read_lines(run / "metrics.jsonl")]
    assert batches == list(range(1, len(batches) + 1))
