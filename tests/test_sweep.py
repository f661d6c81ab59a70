"""The sweep: its plans, processes and figures, its statistics against hand-computed values, and one from a command."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny

from klq_fast.config import Config, InputError
from klq_fast.metrics import read_lines, write_lines, write_text
from klq_fast.pool import Job, Pool
from klq_fast.sweep import (
    FIGURES,
    TAUS,
    Run,
    SweepConfig,
    base_settings,
    best_rates,
    constant,
    difference,
    draw,
    figure_cells,
    heldout,
    in_order,
    interval,
    iqm,
    keep_settings,
    main,
    parse,
    resampled,
    summary,
)

# Statistics.


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([80, 0, 8, 1, 7, 3, 5, 4], 4.75),  # of 3, 4, 5, 7
        ([0, 0, 1, 2, 3, 4, 5, 6, 100, 100], 3.5),  # 10 seeds: two left out at each end
        ([-100, 1, 2, 6, 100], 3.0),  # 5 seeds: one
        ([1, 2, 9], 4.0),  # fewer than 4: the mean
    ],
)
def test_iqm_by_hand(values: list[float], expected: float) -> None:
    array = np.array(values, dtype=np.float64)
    assert iqm(array) == expected
    np.testing.assert_array_equal(iqm(np.stack([array, -array], axis=1)), [expected, -expected])
    np.testing.assert_array_equal(iqm(np.stack([array, -array]), axis=1), [expected, -expected])


def test_bootstrap_by_hand() -> None:
    """Two runs, 0 and 1: samples of two have the means 0, 1/2, 1 with the probabilities 1/4, 1/2, 1/4."""
    samples = resampled(np.array([0.0, 1.0]))
    for value, probability in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.25)):
        # five standard errors of a share among 2000
        assert (samples == value).mean() == pytest.approx(probability, abs=5 * (probability / 2 / 2000) ** 0.5)
    assert interval(samples) == [0.0, 1.0]
    assert interval(np.arange(2001.0)) == pytest.approx([50.0, 1950.0])


def test_the_bootstrap_takes_whole_runs() -> None:
    """Two points of a curve that are equal in each run are equal in each sample, and the interval holds the mean."""
    curves = np.random.default_rng(0).normal(size=(10, 1)).repeat(3, axis=1)
    numbers = summary(curves)
    assert numbers["low"] == [numbers["low"][0]] * 3 and numbers["high"] == [numbers["high"][0]] * 3
    assert numbers["low"][0] < numbers["iqm"][0] < numbers["high"][0]
    np.testing.assert_array_equal(numbers["values"], curves)
    assert numbers == summary(curves)  # the same numbers give the same interval


def test_the_interval_covers_the_truth() -> None:
    """Of 95 % intervals from 10 normal runs, 84 to 97 % hold the true mean: bootstraps of few runs are too narrow."""
    runs = np.random.default_rng(1).normal(size=(400, 10))
    held = [low < 0 < high for low, high in (interval(resampled(row)) for row in runs)]
    assert 0.84 < np.mean(held) < 0.97


def test_difference_by_hand() -> None:
    apart = difference([3, 3, 3], [1, 1, 1])
    assert apart == {"iqm": 2, "low": 2, "high": 2, "better": 1}
    assert difference([1, 2], [2, 3])["better"] == 0.125  # of 1<2, 1<3, 2=2, 2<3
    level = difference([0, 1], [0, 1])
    assert level["iqm"] == 0 and level["low"] == -level["high"] == -1 and level["better"] == 0.5


def test_the_best_rate_of_each_method() -> None:
    points = [("klq", 0.1, 1.0), ("klq", 0.2, 3.0), ("klq", 0.3, 2.0), ("ppo", 0.1, -1.0), ("ppo", 0.2, -2.0)]
    more = {"runs": ["a"], "missing": []}
    cells = [{"method": m, "x": x, "final": {"rlhf_reward": {"iqm": reward}}, **more} for m, x, reward in points]
    cells += [{"method": "ppo", "x": 0.3, "runs": [], "missing": ["a"]}]  # all failed
    cells += [{**cells[1], "x": 0.4, "final": {"rlhf_reward": {"iqm": 9.0}}, "missing": ["b"]}]  # one failed
    assert best_rates(cells) == {"klq": 0.2, "ppo": 0.1}


# Plans.


def plan(*figures: str, options: tuple[str, ...] = (), preset: str = "arithmetic") -> dict[str, list[Run]]:
    config, _ = parse([*figures, "--preset", preset, "--seeds", "3", "--ablation-seeds", "2"])
    base = base_settings(config.preset, options)
    return {figure: in_order(figure_cells(figure, config, base, {})) for figure in figures}  # type: ignore[arg-type]


def test_figures_share_runs() -> None:
    runs = plan(*FIGURES)
    counts = {name: len(set(own)) for name, own in runs.items()}
    assert counts == {
        "curves": 3 * 3,
        "budget": 3 * 3,
        "frontier": 3 * 5 * 3,
        "judge": 3 * 5 * 3,
        "weights": 5 * 5 * 2,
        "learning-rate": 5 * 5 * 2,
        "lam": 2 * 6 * 2,
        "constant": 5 * 2,
    }
    assert runs["budget"] == runs["curves"] and set(runs["curves"]) < set(runs["frontier"]) == set(runs["judge"])
    everything = {run for own in runs.values() for run in own}
    # Of weights two methods are new; of learning-rate four rates of five; of lam five values of six.
    assert len(everything) == 45 + 2 * 5 * 2 + 5 * 4 * 2 + 2 * 5 * 2 + 10
    assert len({run.name for run in everything}) == len(everything)
    assert [run.seed for run in runs["curves"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_a_method_is() -> None:
    def options(method: str, **more: bool) -> set[str]:
        return set(Run(method, tau=0.1, lam=0.5, learning_rate=1e-3, alpha=0.25, seed=7, **more).options)

    shared = {"--tau=0.1", "--lam=0.5", "--learning-rate=0.001", "--seed=7"}
    assert options("ppo") == shared | {"--algorithm=ppo"}
    klq = shared | {"--algorithm=klq", "--alpha=0.25"}
    assert options("klq") == options("klq-alpha-1") == klq | {"--policy-weight=10.0", "--value-weight=1.0"}
    assert options("klq-paper") == klq | {"--policy-weight=1.0", "--value-weight=1.0"}
    assert options("klq-value-0.1") == klq | {"--policy-weight=10.0", "--value-weight=0.1"}
    extra = {"--reward=klq_fast.sweep:constant", "--missing-eos-penalty=0.0"}
    assert options("klq", constant=True) == options("klq") | extra
    assert len(set(constant(["a", "b"], ["", "long"]))) == 1


def test_alpha_keeps_beta_over_tau() -> None:
    """β = τ(1 − α)/α, Eq. 18: of the preset's or the given α at the preset's τ."""
    runs = plan("weights", options=("--tau=0.1", "--alpha=0.25"))["weights"]
    for run in runs:
        if run.method in ("klq", "klq-value-0.1"):
            assert run.tau * (1 - run.alpha) / run.alpha == pytest.approx(0.3)
        else:
            assert run.alpha == 1.0


def test_options_reach_every_run() -> None:
    runs = plan("curves", "frontier", options=("--tau", "0.3", "--learning-rate", "0.5", "--lam=0.7"))
    assert {run.tau for run in runs["curves"]} == {0.3} and {run.tau for run in runs["frontier"]} == set(TAUS)
    assert {(run.lam, run.learning_rate) for run in runs["frontier"]} == {(0.7, 0.5)}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "FIGURE: got none"),
        (["curves", "--seeds", "0"], "--seeds: got 0"),
        (["curves", "--jobs", "-1"], "--jobs: got -1"),
        (["curves", "--", "--seed", "3"], "--seed behind --"),
        (["curves", "--", "--output_dir=x"], "--output-dir behind --"),
        (["curves", "--", "--tau", "-1"], "--tau: got -1.0"),
        (["curves", "--preset", "custom"], "--policy: got none"),
        (["curves", "--preset", "arithmetic", "--draw-only"], "expected one to draw with --draw-only"),
        (["curves", "--preset", "custom", "--", "--policy", "/no/such"], "dataset"),
    ],
)
def test_bad_input_is_refused(args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = args.index("--") if "--" in args else len(args)
    with pytest.raises(SystemExit) as stop:
        main([*args[:split], "--output-dir", str(tmp_path / "sweep"), *args[split:]])
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_folder_holds_runs_of_one_kind(tmp_path: Path) -> None:
    base = base_settings("arithmetic", ["--episodes", "640"])
    keep_settings(tmp_path, "arithmetic", base)
    keep_settings(tmp_path, "arithmetic", base)
    with pytest.raises(InputError, match=r"--episodes: got none, but the runs in .* have 640"):
        keep_settings(tmp_path, "arithmetic", base_settings("arithmetic", []))


# Processes.


def job(folder: Path, name: str, code: str) -> Job:
    """A child that runs `code`, in which `result` is the file that it has to write."""
    result = folder / name / "result"
    return Job(name, folder / name, [sys.executable, "-c", f"result = {str(result)!r}\n{code}"], result)


WRITE = "import time; start = time.time(); time.sleep(0.3); open(result, 'w').write(f'{start} {time.time()}')"


def test_a_pool_runs_so_many_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job(tmp_path, str(i), WRITE) for i in range(5)]
    jobs[3].folder.mkdir()
    write_text(jobs[3].result, "0 0")  # done before
    pool = Pool(2, [], tmp_path / "accounts.jsonl")
    assert pool.run(jobs) == 0 and not pool.failures
    assert jobs[3].result.read_text() == "0 0"
    times = [tuple(map(float, j.result.read_text().split())) for j in jobs if j.name != "3"]
    overlaps = [sum(start < other_end and other < start for other, other_end in times) for start, _ in times]
    assert max(overlaps) == 1
    accounts = read_lines(tmp_path / "accounts.jsonl")
    assert [account["job"] for account in accounts].count("3") == 0 and len(accounts) == 4
    for account in accounts:
        assert account["exit_code"] == 0 and account["seconds"] > 0.3
    assert "4/4" in capsys.readouterr().out


def test_a_failure_is_reported_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = job(tmp_path, "bad", "import sys\nfor i in range(50): print('line', i)\nsys.exit(3)")
    silent = job(tmp_path, "silent", "")  # exit code 0, and nothing made
    good = job(tmp_path, "good", WRITE)
    pool = Pool(1, [], tmp_path / "accounts.jsonl")
    assert pool.run([bad, silent, good]) == 0
    assert pool.failures.keys() == {"bad", "silent"} and good.result.exists()
    assert pool.failures["bad"].split("\n") == [f"line {i}" for i in range(38, 50)]
    output = capsys.readouterr().out
    assert "failed: bad, exit code 3" in output and "    line 49" in output and "exit code 0" in output


def test_a_signal_lets_the_running_end_and_starts_no_more(tmp_path: Path) -> None:
    code = """
import signal, time
def stop(*_):
    open(result + "-stopped", "w").close()
    time.sleep(0.6 * ("/1/" in result))  # the first leaves its place while the second still saves
    exit(143)
signal.signal(signal.SIGTERM, stop)
open(result + "-started", "w").close()
time.sleep(60)"""
    jobs = [job(tmp_path, str(i), code) for i in range(3)]
    pool = Pool(2, [], tmp_path / "accounts.jsonl")

    def interrupt() -> None:
        wait_for(lambda: len(list(tmp_path.glob("*/result-started"))) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert pool.run(jobs) == signal.SIGINT
    thread.join()
    assert not pool.failures and len(list(tmp_path.glob("*/result-stopped"))) == 2
    assert not jobs[2].folder.exists()


def test_a_job_that_another_process_works_on_is_waited_for(tmp_path: Path) -> None:
    busy, other = job(tmp_path, "busy", "raise SystemExit('started twice')"), job(tmp_path, "other", WRITE)
    busy.folder.mkdir()
    with (busy.folder / ".sweep.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = f"import time; time.sleep(0.8); open({str(busy.result)!r}, 'w').write('by the other')"
        process = subprocess.Popen([sys.executable, "-c", code], pass_fds=[lock.fileno()])
    pool = Pool(1, [], tmp_path / "accounts.jsonl")
    assert pool.run([busy, other]) == 0 and not pool.failures
    assert busy.result.read_text() == "by the other" and other.result.exists()
    assert [account["job"] for account in read_lines(tmp_path / "accounts.jsonl")] == ["other"]
    assert process.wait() == 0


def test_gpus_are_shared_out(tmp_path: Path) -> None:
    code = "import os, time; open(result, 'w').write(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.3)"
    jobs = [job(tmp_path, str(i), code) for i in range(4)]
    Pool(4, ["3", "GPU-abc"], tmp_path / "accounts.jsonl").run(jobs)
    assert sorted(j.result.read_text() for j in jobs) == ["3", "3", "GPU-abc", "GPU-abc"]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Figures.


def fake_run(folder: Path, run: Run, exact: bool) -> None:
    """A finished run's folder whose figures are simple functions of what it is."""
    levels = {"klq": 0.8, "klq-alpha-1": 0.65, "klq-paper": 0.6, "klq-value-0.1": 0.7, "ppo": 0.75}
    level = levels[run.method] - abs(run.tau - 0.05)
    noise = np.random.default_rng(run.seed)
    evaluations, batches = [], []
    for batch in range(0, 41):
        share = batch / 40
        kl = 0.0 if run.constant else 4 * share / (1 + 20 * run.tau)
        score = level * share + 0.05 * noise.normal() * (batch > 0)
        record = {"batch": batch, "episodes": 64 * batch, "score": score, "kl": kl, "rlhf_reward": score - run.tau * kl}
        if batch:
            batches.append({**record, "seconds": 0.1 + run.seed / 100, "peak_memory_bytes": 2**29})
        if batch % 10 == 0:
            more = {
                "exact_reward": score + 1,
                "exact_kl": kl,
                "exact_rlhf_reward": score + 1 - run.tau * kl,
                "optimal_reward": 2.0 - run.tau,
                "optimal_kl": 4 / (1 + 20 * run.tau),
                "optimal_rlhf_reward": 2.0 - 2 * run.tau,
                "kl_to_optimum": 1.0,
            }
            evaluations.append(record | (more if exact else {}))
    (folder / "policy").mkdir(parents=True)
    write_lines(folder / "metrics.jsonl", batches)
    write_lines(folder / "eval.jsonl", evaluations)


@pytest.mark.parametrize("exact", [False, True])
def test_every_figure_is_drawn_from_finished_runs(exact: bool, tmp_path: Path) -> None:
    config = SweepConfig(("all",), preset="arithmetic", seeds=4, ablation_seeds=3)
    base = base_settings("arithmetic", [])
    cells = {figure: figure_cells(figure, config, base, {}) for figure in FIGURES}
    accounts = []
    for run in {run for own in cells.values() for run in in_order(own)}:
        if not (run.method == "ppo" and run.seed == 3):  # one is not finished
            fake_run(tmp_path / "runs" / run.name, run, exact)
            account = {"job": run.name, "seconds": 9.0 + run.seed, "cpu_seconds": 8.0}
            accounts.append(account | {"exit_code": 0})
            verdict = {"wins": 30, "losses": 20, "ties": 14, "unparsed": 0, "win_rate": 0.6, "interval": [0.5, 0.7]}
            (tmp_path / "judge" / run.name).mkdir(parents=True)
            write_text(tmp_path / "judge" / run.name / "verdicts.json", json.dumps(verdict))
    write_lines(tmp_path / "processes.jsonl", accounts)
    drawn = FIGURES if exact else ("curves", "frontier", "budget")
    for figure in drawn:
        draw(figure, cells[figure], tmp_path, base, {})
    for figure in set(drawn) - {"budget"}:
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000
    results = {figure: json.loads((tmp_path / f"{figure}.json").read_text()) for figure in drawn}

    frontier = {(cell["method"], cell["x"]): cell for cell in results["frontier"]["cells"]}
    own = frontier["klq", 0.1]
    last = [read_lines(tmp_path / "runs" / name / "eval.jsonl")[-1] for name in own["runs"]]
    assert own["final"]["score"]["values"] == [record["exact_reward" if exact else "score"] for record in last]
    assert own["final"]["score"]["iqm"] == pytest.approx(np.sort(own["final"]["score"]["values"])[1:3].mean())
    assert own["final"]["score"]["low"] <= own["final"]["score"]["iqm"] <= own["final"]["score"]["high"]
    assert len(own["runs"]) == 4 and own["missing"] == []
    assert len(frontier["ppo", 0.1]["runs"]) == 3 and frontier["ppo", 0.1]["missing"] == [
        run.name
        for cell in cells["frontier"]
        for run in cell.runs
        if (run.method, run.tau, run.seed) == ("ppo", 0.1, 3)
    ]
    against = {(row["method"], row["x"], row["of"]): row for row in results["frontier"]["against_ppo"]}
    assert len(against) == 2 * 5 * (4 if exact else 3)
    assert against["klq", 0.1, "score"]["iqm"] == pytest.approx(
        own["final"]["score"]["iqm"] - frontier["ppo", 0.1]["final"]["score"]["iqm"]
    )
    if exact:
        gaps = [record["optimal_rlhf_reward"] - record["exact_rlhf_reward"] for record in last]
        assert own["final"]["gap"]["values"] == pytest.approx(gaps)
    assert results["curves"]["cells"][0]["heldout"]["episodes"] == [0, 640, 1280, 1920, 2560]
    assert len(results["curves"]["cells"][0]["training"]["kl"]["iqm"]) == 40
    budget = {cell["method"]: cell for cell in results["budget"]["cells"]}
    assert budget["klq"]["training_seconds"]["values"] == pytest.approx([4.0, 4.4, 4.8, 5.2])
    assert budget["klq"]["seconds"]["iqm"] == 10.5
    table = (tmp_path / "budget.md").read_text()
    assert "| KLQ | 4 | 4.6 (" in table and table.count("\n| ") == 5
    if exact:
        judged = results["judge"]["cells"][0]
        assert judged["wins"] == 120 and judged["win_rate"]["iqm"] == pytest.approx(0.6)
    assert results["curves"]["machine"]["torch"] and results["curves"]["settings"]["preset"] == "arithmetic"


def test_held_out_figures_are_exact_where_they_are_known() -> None:
    sampled = {"score": 1.0, "kl": 2.0, "rlhf_reward": 0.9, "no_eos": 0.0}
    assert heldout(sampled) == {"score": 1.0, "kl": 2.0, "rlhf_reward": 0.9}
    names = (
        "exact_reward exact_kl exact_rlhf_reward optimal_reward optimal_kl optimal_rlhf_reward kl_to_optimum".split()
    )
    exact = heldout(sampled | dict(zip(names, [1, 2, 3, 4, 5, 6, 7], strict=True)))
    assert (exact["score"], exact["kl"], exact["rlhf_reward"], exact["gap"]) == (1, 2, 3, 3)


# From the command line.


def test_a_sweep_killed_and_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed with two runs at work, which live on; the second sweep waits for them and makes what is left, once each.

    One run's folder is spoiled: it is reported, and the others and the figure are made without it.
    """
    tiny.neox(tmp_path / "neox")
    tiny.write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": f"prompt {i}:"} for i in range(40)))
    output = tmp_path / "sweep"
    args = ["curves", "budget", "--preset", "custom", "--seeds", "1", "--jobs", "2", "--output-dir", str(output), "--"]
    args += ["--policy", str(tmp_path / "neox"), "--dataset", str(tmp_path / "prompts.jsonl"), "--episodes", "160"]
    args += ["--reward", "klq_fast.sweep:constant", "--batch-size", "16", "--response-length", "8", "--eval-every", "5"]
    config, options = parse(args)
    runs = {run.method: run for run in in_order(figure_cells("curves", config, base_settings("custom", options), {}))}
    spoiled = output / "runs" / runs["ppo"].name
    spoiled.mkdir(parents=True)
    (spoiled / "config.yaml").write_text("no settings")

    process = subprocess.Popen([sys.executable, "-m", "klq_fast.sweep", *args], start_new_session=True)
    metrics = [output / "runs" / runs[method].name / "metrics.jsonl" for method in ("klq", "klq-paper")]
    wait_for(lambda: all(len(read_lines(file)) >= 2 for file in metrics))
    process.kill()
    process.wait()

    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert f"failed: {runs['ppo'].name}, exit code 2" in printed and "config.yaml" in printed
    for file in metrics:
        assert [record["batch"] for record in read_lines(file)] == list(range(1, 11))
        assert (file.parent / "policy" / "model.safetensors").is_file()
    results = json.loads((output / "curves.json").read_text())
    assert [len(cell["runs"]) for cell in results["cells"]] == [1, 1, 0]
    assert list(results["failures"]) == [runs["ppo"].name] and (output / "curves.png").is_file()

    # The two that the killed sweep had begun were finished by the processes that it left, and not made again.
    assert [account["job"] for account in read_lines(output / "processes.jsonl")] == [runs["ppo"].name]
    main([*args[:2], "--draw-only", *args[2 : args.index("--")]])  # the options are in base.yaml
    assert "3 runs for curves, budget: 2 are finished, 1 are to do" in capsys.readouterr().out
    ours, papers = (Config.from_yaml((file.parent / "config.yaml").read_text()) for file in metrics)
    assert ours.policy_weight == 20 and ours == dataclasses.replace(papers, policy_weight=20.0)
