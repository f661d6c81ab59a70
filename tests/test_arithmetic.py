"""The arithmetic task: its listing of all responses against brute force, the exact optimum, and a run towards it."""

import math
from itertools import product
from pathlib import Path

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from klq_fast import arithmetic
from klq_fast.batch import Rollout
from klq_fast.config import InputError
from klq_fast.data import load_prompts
from klq_fast.models import Policy, load_policy, load_reference, load_tokenizer
from klq_fast.reward import reward_from_function
from klq_fast.rollout import Generator
from klq_fast.train import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command line's own preparation will find."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def paths(cache: Path) -> arithmetic.Paths:
    return arithmetic.prepare(cache / "klq_fast", lambda line: None)


def make_generator(paths: arithmetic.Paths, penalty: float = 0.0, length: int = 3) -> Generator:
    policy, tokenizer = load_policy(str(paths.policy), 1.0, CPU), load_tokenizer("policy", str(paths.policy))
    return Generator(policy, tokenizer, reward_from_function("klq_fast.arithmetic:score"), length, penalty, seed=0)


@pytest.mark.parametrize(
    ("response", "expected"),
    [("12", 1.0), ("11", 0.75), ("14", 0.5), ("8", 0.0), ("1", 0.0), ("012", 0.0), ("+12", 0.0), ("12=", 0.0), ("", 0)],
)
def test_score(response: str, expected: float) -> None:
    assert arithmetic.score(["5+7="], [response]) == [expected]


@pytest.mark.parametrize(("stops", "length", "temperature"), [([3], 3, 1.0), ([0, 3], 2, 0.7), ([2], 1, 1.0)])
def test_all_responses_and_their_log_probs_against_brute_force(
    stops: list[int], length: int, temperature: float
) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_positions=8, n_embd=8, n_layer=1, n_head=1)).eval()
    policy, prompt = Policy(model, temperature), [1, 2]
    tokens, ended = arithmetic.responses(4, stops, length)
    everything = {
        response
        for count in range(1, length + 1)
        for response in product(range(4), repeat=count)
        if not set(response[:-1]) & set(stops) and (count == length or response[-1] in stops)
    }
    assert len(tokens) == len(everything) and {tuple(response) for response in tokens} == everything
    assert ended == [response[-1] in stops for response in tokens]

    def logprob(response: list[int]) -> float:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        return float((logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())

    with torch.no_grad():
        expected = torch.tensor([logprob(response) for response in tokens], dtype=torch.float64)
        found = arithmetic.response_logprobs(policy, prompt, stops, length)
    # Both read fp32 logits of order 1, computed in batches of other sizes: a few units of 1e-7 for each of 3 tokens.
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("tau", [0.01, 0.2, 3.0])
def test_the_gap_is_tau_times_the_kl_to_the_optimum(tau: float) -> None:
    """J* − J(π) = τ·KL(π‖π*), and no policy is above J*; each of the three is computed on its own."""
    logprobs, ref_logprobs = torch.randn(2, 5, 40, dtype=torch.float64).log_softmax(-1)
    rewards = torch.rand(5, 40, dtype=torch.float64)
    record = arithmetic.exact(logprobs, ref_logprobs, rewards, tau)
    gap = record["optimal_rlhf_reward"] - record["exact_rlhf_reward"]
    assert gap > 0 and gap == pytest.approx(tau * record["kl_to_optimum"], rel=1e-10)
    best = (ref_logprobs + rewards / tau).log_softmax(-1)
    at_best = arithmetic.exact(best, ref_logprobs, rewards, tau)
    assert at_best["kl_to_optimum"] == pytest.approx(0, abs=1e-12)
    assert at_best["exact_rlhf_reward"] == pytest.approx(record["optimal_rlhf_reward"], rel=1e-12)
    assert at_best["exact_reward"] == pytest.approx(record["optimal_reward"], rel=1e-12)
    assert at_best["exact_kl"] == pytest.approx(record["optimal_kl"], rel=1e-12)
    for scale in (0.01, 0.1):
        near = (best + scale * torch.randn_like(best)).log_softmax(-1)
        assert arithmetic.exact(near, ref_logprobs, rewards, tau)["exact_rlhf_reward"] < record["optimal_rlhf_reward"]


def test_two_responses_by_hand() -> None:
    """π_b = (1/4, 3/4), R = (1, 0), τ = 1/log 3: π* = (3/4, 3/4)/(3/2), and J* = τ·log(3/4 + 3/4)."""
    tau = 1 / math.log(3)
    reference = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    record = arithmetic.exact(reference, reference, torch.tensor([[1.0, 0.0]], dtype=torch.float64), tau)
    assert record["exact_reward"] == record["exact_rlhf_reward"] == pytest.approx(0.25)
    assert record["exact_kl"] == 0
    assert record["optimal_reward"] == pytest.approx(0.5)
    assert record["optimal_rlhf_reward"] == pytest.approx(tau * math.log(1.5))
    assert record["kl_to_optimum"] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_the_prepared_policy_is_mediocre_and_is_made_once(paths: arithmetic.Paths, cache: Path) -> None:
    tokenizer, reference = load_tokenizer("policy", str(paths.policy)), load_reference(str(paths.policy), 1.0, CPU)
    prompts = load_prompts(str(paths.dataset), tokenizer, 4, 256)
    assert {p.text for p in prompts.train} == {p.text for p in prompts.heldout} == set(arithmetic.prompts())
    tokens, _ = arithmetic.responses(13, [tokenizer.eos_token_id], 3)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    right = torch.zeros(())
    for prompt in prompts.heldout:
        probs = arithmetic.response_logprobs(reference, prompt.tokens, [tokenizer.eos_token_id], 3).exp()
        right = right + sum(probs[i] for i, s in enumerate(arithmetic.score([prompt.text] * 1885, texts)) if s == 1)
    assert 0.2 < right / 100 < 0.4
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert arithmetic.prepare(cache / "klq_fast", pytest.fail) == paths
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_the_same_machine_makes_the_same_policy_again() -> None:
    tokenizer = arithmetic.make_tokenizer()
    assert tokenizer("5+7=12")["input_ids"] == [5, 10, 7, 11, 1, 2] and tokenizer.eos_token_id == 12
    one, two = (arithmetic.make_policy(tokenizer, steps=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_exact_figures_are_what_samples_tend_to(paths: arithmetic.Paths) -> None:
    """The generator's own samples, texts, scores and penalty against the listing, for another policy than π_b."""
    generator = make_generator(paths, penalty=0.5)
    policy = generator.policy
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(0.2)  # flatter: more than one in ten does not end
    reference = load_reference(str(paths.policy), 1.0, CPU)
    prompts = load_prompts(str(paths.dataset), generator.tokenizer, 4, 256).heldout[:3]
    record = arithmetic.exact_evaluation(generator, reference, prompts, tau=0.05)()
    rows = [prompt for prompt in prompts for _ in range(2000)]
    rollout: Rollout = generator.respond(rows, range(len(rows)), stream=0)
    assert 0.1 < (~rollout.ended).float().mean() < 0.9
    rewards = generator.rewarded(rollout, generator.score(rows, rollout)[0]).rewards
    error = float(rewards.std()) / len(rows) ** 0.5
    assert float(rewards.mean()) == pytest.approx(record["exact_reward"], abs=4 * error)
    stops = [generator.tokenizer.eos_token_id]
    both = [[arithmetic.response_logprobs(p, x.tokens, stops, 3) for x in prompts] for p in (policy, reference)]
    logprobs, ref_logprobs = (torch.stack(rows) for rows in both)
    assert record["exact_kl"] == pytest.approx(float((logprobs.exp() * (logprobs - ref_logprobs)).sum(1).mean()))


def test_a_policy_with_too_many_responses_is_refused(paths: arithmetic.Paths) -> None:
    reference = load_reference(str(paths.policy), 1.0, CPU)
    with pytest.raises(InputError, match=r"--response-length 6.*248832 states"):
        arithmetic.exact_evaluation(make_generator(paths, length=6), reference, [], tau=0.05)


@pytest.mark.parametrize("algorithm", ["klq", "ppo"])
def test_training_comes_nearer_to_the_optimum(
    algorithm: str, paths: arithmetic.Paths, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line, with the preset's own settings at 2/5 of its length."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    options = ["--algorithm", algorithm, "--eval-every", "100", "--output-dir", str(tmp_path / "run")]
    main(["arithmetic", "--episodes", "2560", *options])
    first, last = tiny.read_jsonl(tmp_path / "run" / "eval.jsonl")
    assert first["kl"] == first["exact_kl"] == 0
    assert first["optimal_rlhf_reward"] == last["optimal_rlhf_reward"]
    for record in (first, last):
        gap = record["optimal_rlhf_reward"] - record["exact_rlhf_reward"]
        assert gap == pytest.approx(0.05 * record["kl_to_optimum"], rel=1e-9)
    assert last["kl_to_optimum"] < 0.9 * first["kl_to_optimum"]
    # 100 sampled answers, each within [0, 1]: a standard error of at most 0.05
    assert last["score"] == pytest.approx(last["exact_reward"], abs=0.2)
