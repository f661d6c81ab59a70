"""The theorems behind KLQ on random finite MDPs, in float64 (arXiv 2508.17000, Sections 2–4, Appendices A and C).

Each test states one result of the paper from its equations. States s, actions a: |S| = 6, |A| = 3, discount γ < 1,
reference policy π_b, temperature τ. The public operations `lambda_returns` and `gae` take part where the paper's
statement is about returns along trajectories (Eqs. 7, 8, 14, 38, Algorithms 1 and 2), `ppo_loss` where it is about
PPO's objective (Eqs. 5, 17), `klq_loss` where it is about KLQ's gradient (Eq. 6).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from klq_fast import gae, klq_loss, lambda_returns, ppo_loss
from klq_fast.ppo import PPO

S, A = 6, 3
SEEDS = range(3)
LAMBDAS = (0.0, 0.5, 0.95)


@dataclass(frozen=True)
class MDP:
    """P(s'|s, a) may sum to less than 1: what is missing ends the episode, and the terminal state is worth 0."""

    transition: Tensor  # (S, A, S)
    reward: Tensor  # (S, A): E[r_{t+1} | s_t, a_t]
    reference: Tensor  # (S, A): π_b(a|s)
    gamma: float
    tau: float

    def next_mean(self, state_function: Tensor) -> Tensor:
        """E[f(s') | s, a]: (…, S) -> (…, S, A)."""
        return (self.transition @ state_function[..., None, :, None]).squeeze(-1)


def uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()


def random_policy(*shape: int, spread: float = 1.0) -> Tensor:
    """π(a|s), or any leading shape of such tables: softmax of normal logits."""
    return (spread * torch.randn(*shape, S, A, dtype=torch.float64)).softmax(-1)


def random_values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=SEEDS)
def mdp(request: pytest.FixtureRequest) -> MDP:
    """A random MDP without end, in which each (s, a) leads to two or three states."""
    torch.manual_seed(request.param)
    transition = torch.rand(S, A, S, dtype=torch.float64) * (torch.rand(S, A, S).argsort(-1) < 3)
    return MDP(
        transition=transition / transition.sum(-1, keepdim=True),
        reward=random_values(S, A),
        reference=random_policy(),
        gamma=uniform(0.6, 0.9),
        tau=uniform(0.05, 1.0),
    )


def kl(policy: Tensor, other: Tensor) -> Tensor:
    """Eq. 2: D(π‖π')(s) = Σ_a π(a|s) log(π(a|s)/π'(a|s))."""
    return (policy * (policy / other).log()).sum(-1)


def boltzmann(mdp: MDP, action_values: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs. 10 and 11: (π[Q], V[Q])."""
    values = mdp.tau * (mdp.reference.log() + action_values / mdp.tau).logsumexp(-1)
    return mdp.reference * ((action_values - values[..., None]) / mdp.tau).exp(), values


def action_values_of(mdp: MDP, policy: Tensor, values: Tensor) -> Tensor:
    """Eq. 12: Q[π, V](s, a) = τ log(π(a|s)/π_b(a|s)) + V(s)."""
    return mdp.tau * (policy / mdp.reference).log() + values[..., None]


def bellman(mdp: MDP, policy: Tensor, action_values: Tensor) -> Tensor:
    """Eq. 22: [B^π Q](s, a) = E_π[r_{t+1} + γ (Q(s_{t+1}, a_{t+1}) − τ D_π(s_{t+1}))]."""
    next_values = (policy * action_values).sum(-1) - mdp.tau * kl(policy, mdp.reference)
    return mdp.reward + mdp.gamma * mdp.next_mean(next_values)


def lambda_bellman(mdp: MDP, policy: Tensor, action_values: Tensor, lam: float) -> Tensor:
    """Eq. 37: B_λ = (1 − λ) Σ_{n≥1} λ^{n−1} [B^π]^n, summed until the terms left out weigh λ^n < 1e-16."""
    total = torch.zeros_like(action_values)
    terms = 1 if lam == 0 else math.ceil(math.log(1e-16) / math.log(lam))
    for n in range(1, terms + 1):
        action_values = bellman(mdp, policy, action_values)
        total = total + (1 - lam) * lam ** (n - 1) * action_values
    return total


def rollout_values(mdp: MDP, policy: Tensor, steps: int = 350) -> Tensor:
    """Eq. 21, summed forwards along the state distribution of a rollout: Q^π (0.9^350 = 1e-16 of it is left out).

    It never uses B^π: from each (s, a) it follows P(s_k, a_k) and adds γ^{k−t} (r_{k+1} − τγ D_π(s_{k+1})).
    """
    divergence = kl(policy, mdp.reference)
    occupancy = torch.eye(S * A, dtype=torch.float64).view(S, A, S, A)  # P(s_k, a_k | s_t = s, a_t = a) at k = t
    action_values = torch.zeros(S, A, dtype=torch.float64)
    for k in range(steps):
        next_states = torch.tensordot(occupancy, mdp.transition, dims=2)  # P(s_{k+1} | s_t, a_t): (S, A, S)
        step = (occupancy * mdp.reward).sum((-2, -1)) - mdp.tau * mdp.gamma * (next_states * divergence).sum(-1)
        action_values = action_values + mdp.gamma**k * step
        occupancy = next_states[..., None] * policy
    return action_values


def linear_part(operator: Callable[[Tensor], Tensor]) -> Tensor:
    """The matrix of an affine map of Q: row (s, a) of the result, column (s', a') of the argument. (S·A, S·A)."""
    units = torch.eye(S * A, dtype=torch.float64).view(S * A, S, A)
    return (operator(units) - operator(torch.zeros(S, A, dtype=torch.float64))).view(S * A, S * A).T


def check_contraction(operator: Callable[[Tensor], Tensor], modulus: float, fixed_point: Tensor) -> None:
    """The operator is affine, its ℓ^∞ Lipschitz constant is exactly `modulus`, and its iterates reach `fixed_point`."""
    first, second = 10 * random_values(S, A), 10 * random_values(S, A)
    matrix = linear_part(operator)
    difference = operator(first) - operator(second)
    torch.testing.assert_close(difference.flatten(), matrix @ (first - second).flatten(), rtol=0, atol=1e-10)
    # An affine map's Lipschitz constant in ℓ^∞ is the largest absolute row sum of its matrix: it bounds every pair.
    assert matrix.abs().sum(-1).max().item() == pytest.approx(modulus, rel=1e-11)
    assert difference.abs().max() <= modulus * (first - second).abs().max() * (1 + 1e-12)
    # It is attained: Q and Q + c, which differ by the same amount everywhere, come closer by the modulus and no more.
    shifted = operator(first + 7.0) - operator(first)
    torch.testing.assert_close(shifted, torch.full_like(shifted, 7.0 * modulus), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(operator(fixed_point), fixed_point, rtol=0, atol=1e-11)
    iterate = first
    for n in range(1, 6):
        iterate = operator(iterate)
        bound = modulus**n * (first - fixed_point).abs().max()
        assert (iterate - fixed_point).abs().max() <= bound * (1 + 1e-11) + 1e-11


def test_soft_action_value_satisfies_the_bellman_recursion(mdp: MDP) -> None:
    """Lemma A.1 (Eqs. 21–28): B^π Q^π = Q^π, with Q^π summed from its definition along rollouts.

    Fails if the KL penalty is charged in s_t instead of s_{t+1}, or lacks γ or τ.
    """
    policy = random_policy()
    action_values = rollout_values(mdp, policy)
    torch.testing.assert_close(bellman(mdp, policy, action_values), action_values, rtol=0, atol=1e-11)


def test_soft_bellman_operator_contracts_by_gamma(mdp: MDP) -> None:
    """Theorem A.2 (Eqs. 29–36): B^π contracts with modulus γ, attained, towards the unique fixed point Q^π.

    Fails for any other modulus, smaller or larger.
    """
    policy = random_policy()
    check_contraction(lambda q: bellman(mdp, policy, q), mdp.gamma, rollout_values(mdp, policy))


@pytest.mark.parametrize("lam", LAMBDAS)
def test_lambda_operator_contracts_by_its_modulus(mdp: MDP, lam: float) -> None:
    """Theorem A.3 (Eqs. 39–50): B_λ of Eq. 37 contracts with modulus γ(1 − λ)/(1 − λγ), attained, towards Q^π.

    Fails for any other modulus, smaller or larger, or if the weights (1 − λ)λ^{n−1} do not sum to 1.
    """
    policy = random_policy()
    modulus = mdp.gamma * (1 - lam) / (1 - lam * mdp.gamma)
    check_contraction(lambda q: lambda_bellman(mdp, policy, q, lam), modulus, rollout_values(mdp, policy))


@pytest.mark.parametrize("lam", LAMBDAS)
def test_lambda_operator_sums_discounted_bellman_errors(mdp: MDP, lam: float) -> None:
    """Eqs. 7 and 37: B_λ Q − Q = Σ_k (λγ P^π)^k (B^π Q − Q) = (I − λγ P^π)^{-1} (B^π Q − Q).

    This is why the n-step mixture of Eq. 37 is computed by one reverse recursion over TD errors. Fails if that
    recursion's decay is not λγ.
    """
    policy, action_values = random_policy(), random_values(S, A)
    error = bellman(mdp, policy, action_values) - action_values
    decay = lam * linear_part(lambda q: bellman(mdp, policy, q))  # λγ P^π
    resolvent = torch.linalg.solve(torch.eye(S * A, dtype=torch.float64) - decay, error.flatten()).view(S, A)
    expected = action_values + resolvent
    torch.testing.assert_close(lambda_bellman(mdp, policy, action_values, lam), expected, rtol=0, atol=1e-11)


def random_episodic_mdp(layers: int = 3) -> MDP:
    """An MDP whose S states lie in layers, each leading to the next or, with some probability, to the end."""
    transition = torch.zeros(S, A, S, dtype=torch.float64)
    width = S // layers
    for state in range(S - width):
        first = (state // width + 1) * width
        chances = torch.rand(A, width + 1, dtype=torch.float64)  # the last: the episode ends here
        transition[state, :, first : first + width] = (chances / chances.sum(-1, keepdim=True))[:, :width]
    return MDP(transition, random_values(S, A), random_policy(), gamma=uniform(0.6, 0.9), tau=uniform(0.05, 1.0))


def trajectories(mdp: MDP, policy: Tensor, state: int, action: int) -> list[tuple[float, list[tuple[int, int]]]]:
    """Every episode from (s, a) with its probability."""
    paths = []
    successors = mdp.transition[state, action]
    end = 1 - successors.sum().item()
    if end > 1e-9:
        paths.append((end, [(state, action)]))
    for successor in successors.nonzero().flatten().tolist():
        for choice in range(A):
            chance = (successors[successor] * policy[successor, choice]).item()
            tails = trajectories(mdp, policy, successor, choice)
            paths += [(chance * weight, [(state, action), *tail]) for weight, tail in tails]
    return paths


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_expected_lambda_return_is_the_lambda_operator(seed: int, lam: float, alpha: float) -> None:
    """Eqs. 38, 88 and 89: E[G^{λ,α}_t | s, a] = α B_λ Q + (1 − α) Q, summed exactly over all episodes from each (s, a).

    The left side comes from the public `lambda_returns`, with π and V Boltzmann in Q; the right from Eq. 37. Fails if
    its TD error, decay, discount or α differ from Eqs. 7 and 14.
    """
    torch.manual_seed(seed)
    mdp = random_episodic_mdp()
    action_values = random_values(S, A)
    policy, values = boltzmann(mdp, action_values)
    paths = [(s, a, path) for s in range(S) for a in range(A) for path in trajectories(mdp, policy, s, a)]
    longest = max(len(path) for _, _, (_, path) in paths)
    weights = torch.tensor([weight for _, _, (weight, _) in paths], dtype=torch.float64)
    mask = torch.tensor([[t < len(path) for t in range(longest)] for _, _, (_, path) in paths])
    padded = [path + [(0, 0)] * (longest - len(path)) for _, _, (_, path) in paths]
    states, actions = torch.tensor(padded).unbind(-1)  # (N, T) each
    log_ratio = (policy / mdp.reference).log()[states, actions]
    rewards = mdp.reward[states, actions]
    returns = lambda_returns(
        log_ratio, values[states], rewards, mask, tau=mdp.tau, lam=lam, gamma=mdp.gamma, alpha=alpha
    ).returns
    expected = torch.zeros(S, A, dtype=torch.float64)
    expected.index_put_((states[:, 0], actions[:, 0]), weights * returns[:, 0], accumulate=True)
    operator = alpha * lambda_bellman(mdp, policy, action_values, lam) + (1 - alpha) * action_values
    torch.testing.assert_close(expected, operator, rtol=0, atol=1e-11)


def rollouts(mdp: MDP, policy: Tensor, states: Tensor, actions: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Trajectories sampled from each (s, a): states (N, steps + 1), actions (N, steps)."""
    all_states, all_actions = [states], [actions]
    for _ in range(steps):
        states = mdp.transition[states, actions].multinomial(1).squeeze(-1)
        actions = policy[states].multinomial(1).squeeze(-1)
        all_states.append(states)
        all_actions.append(actions)
    return torch.stack(all_states, 1), torch.stack(all_actions[:-1], 1)


def every_pair(repeats: int) -> tuple[Tensor, Tensor]:
    """Each (s, a) `repeats` times: (S·A·repeats,) twice."""
    pairs = torch.arange(S * A).repeat_interleave(repeats)
    return pairs // A, pairs % A


def test_td_error_of_the_parametrised_q(mdp: MDP) -> None:
    """Eq. 8 = Eq. 14: with π = π[Q], Σ_a π Q − τ D(π‖π_b) is V[Q], so the TD error needs neither the sum nor D.

    Eq. 14 is what `lambda_returns` gives as `td_errors`, compared at every step of sampled trajectories. Fails if it
    reads V at s_t instead of s_{t+1}, drops τ or γ, or flips the log-ratio.
    """
    action_values = random_values(S, A)
    policy, values = boltzmann(mdp, action_values)
    states, actions = rollouts(mdp, policy, *every_pair(4), steps=10)
    expected_next = (policy * action_values).sum(-1) - mdp.tau * kl(policy, mdp.reference)
    equation_8 = (
        mdp.reward[states[:, :-1], actions]
        + mdp.gamma * expected_next[states[:, 1:]]
        - action_values[states[:, :-1], actions]
    )
    equation_14 = lambda_returns(
        (policy / mdp.reference).log()[states[:, :-1], actions],
        values[states[:, :-1]],
        mdp.reward[states[:, :-1], actions],
        tau=mdp.tau,
        gamma=mdp.gamma,
        bootstrap=values[states[:, -1]],
    ).td_errors
    torch.testing.assert_close(equation_14, equation_8, rtol=0, atol=1e-12)


def test_sampled_lambda_returns_average_to_the_operator(mdp: MDP) -> None:
    """Eq. 38 by sampling, in an MDP without end: the mean of G over 400 trajectories from each (s, a) is B_λ Q.

    Trajectories are cut after 100 steps with V of the last state as bootstrap, which misses less than (λγ)^100 = 2e-7
    of the error term. All 18 means must lie within 5 standard errors: a correct estimator fails once in 10^5 draws, and
    the draws are fixed.
    """
    repeats = 400
    action_values = random_values(S, A)
    policy, values = boltzmann(mdp, action_values)
    states, actions = rollouts(mdp, policy, *every_pair(repeats), steps=100)
    log_ratio = (policy / mdp.reference).log()[states[:, :-1], actions]
    rewards, bootstrap = mdp.reward[states[:, :-1], actions], values[states[:, -1]]
    for lam in LAMBDAS:
        returns = lambda_returns(
            log_ratio, values[states[:, :-1]], rewards, tau=mdp.tau, lam=lam, gamma=mdp.gamma, bootstrap=bootstrap
        ).returns
        first = returns[:, 0].view(S, A, repeats)
        gap = first.mean(-1) - lambda_bellman(mdp, policy, action_values, lam)
        assert (gap.abs() < 5 * first.std(-1) / repeats**0.5 + 1e-5).all()


def test_policy_and_value_map_to_action_values_and_back(mdp: MDP) -> None:
    """Eqs. 10–12: Q → (π[Q], V[Q]) → Q and (π, V) → Q[π, V] → (π, V) are inverse to each other.

    Fails if either map loses its τ or its reference, or if V[Q] does not normalise π[Q].
    """
    action_values = 5 * random_values(S, A)
    policy, values = boltzmann(mdp, action_values)
    torch.testing.assert_close(policy.sum(-1), torch.ones(S, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(action_values_of(mdp, policy, values), action_values, rtol=0, atol=1e-11)
    policy, values = random_policy(), random_values(S)
    again, values_again = boltzmann(mdp, action_values_of(mdp, policy, values))
    torch.testing.assert_close(again, policy, rtol=0, atol=1e-12)
    torch.testing.assert_close(values_again, values, rtol=0, atol=1e-12)


def test_boltzmann_policy_is_greedy(mdp: MDP) -> None:
    """Theorem A.4 (Eqs. 9, 52–54, 71–77): J(π) = V_B − τ D(π‖π_B), so π_B alone maximises Eq. 52, with maximum V_B.

    Checked for 1000 random policies, from near uniform to near deterministic. Fails if π_B or V_B has another
    temperature or reference.
    """
    action_values = random_values(S, A)
    best, values = boltzmann(mdp, action_values)

    def objective(policy: Tensor) -> Tensor:  # Eq. 55, (…, S)
        return (policy * (action_values - mdp.tau * (policy / mdp.reference).log())).sum(-1)

    torch.testing.assert_close(objective(best), values, rtol=0, atol=1e-12)
    others = torch.cat([random_policy(250, spread=spread) for spread in (0.1, 1.0, 3.0, 10.0)])
    gap = values - objective(others)
    assert (gap > 0).all()
    torch.testing.assert_close(gap, mdp.tau * kl(others, best), rtol=0, atol=1e-11)


def test_moving_towards_the_boltzmann_policy_improves(mdp: MDP) -> None:
    """Theorem A.5 (Eqs. 70–85): D(π_new‖π_B) ≤ D(π‖π_B) in every state implies Q^{π_new} ≥ Q^π, strictly where (s, a)
    can step into a state where the inequality is strict.

    States 0–2 are closed here and keep their policy, so Q must not change there at all; in states 3–5 π_new is the one
    of 200 random policies that satisfies Eq. 70 most narrowly. The one that violates it most narrowly must lose. Fails
    if π_B is taken from another Q, or if the divergence is reversed.
    """
    transition = mdp.transition.clone()
    transition[:3, :, 3:] = 0
    transition[:3] += 0.1 * torch.rand(3, A, S, dtype=torch.float64) * torch.tensor([1, 1, 1, 0, 0, 0])
    mdp = replace(mdp, transition=transition / transition.sum(-1, keepdim=True))
    policy = random_policy()
    action_values = rollout_values(mdp, policy)
    best, _ = boltzmann(mdp, action_values)
    candidates = random_policy(200)
    margin = kl(policy, best) - kl(candidates, best)  # Eq. 70: at least 0
    closer, further = policy.clone(), policy.clone()
    for state in range(3, S):
        closer[state] = candidates[torch.where(margin > 0, margin, torch.inf)[:, state].argmin(), state]
        further[state] = candidates[torch.where(margin < 0, margin, -torch.inf)[:, state].argmax(), state]
    strict = kl(closer, best) < kl(policy, best)
    assert (kl(further, best) > kl(policy, best)).equal(strict)
    assert strict.tolist() == [False] * 3 + [True] * 3
    into_strict = mdp.next_mean(strict.double()) > 0  # (S, A)
    assert into_strict.any()
    gain = rollout_values(mdp, closer) - action_values
    loss = action_values - rollout_values(mdp, further)
    for change in (gain, loss):
        assert (change > -1e-12).all()
        assert (change[into_strict] > 1e-9).all()
        assert (change[:3].abs() < 1e-12).all()


def optimal_action_values(mdp: MDP) -> Tensor:
    """Q*, the fixed point of Q = r + γ E[V[Q](s')] (Eq. 11)."""
    optimal = torch.zeros(S, A, dtype=torch.float64)
    for _ in range(350):  # 0.9^350 = 1e-16
        optimal = mdp.reward + mdp.gamma * mdp.next_mean(boltzmann(mdp, optimal)[1])
    return optimal


def test_boltzmann_updates_improve_up_to_the_optimum(mdp: MDP) -> None:
    """Corollary A.6 (Eqs. 86, 87): Q^{π_B} ≥ Q^π, strictly unless π = π_B where (s, a) leads; repeated, it ends at Q*.

    Q* is found on its own, from its own equation. Fails if a Boltzmann step ever loses.
    """
    optimal = optimal_action_values(mdp)
    action_values = rollout_values(mdp, random_policy())
    improved = rollout_values(mdp, boltzmann(mdp, action_values)[0])
    assert (improved > action_values).all()
    for _ in range(12):
        assert (improved >= action_values - 1e-11).all()
        action_values, improved = improved, rollout_values(mdp, boltzmann(mdp, improved)[0])
    torch.testing.assert_close(improved, optimal, rtol=0, atol=1e-10)


def maximise(objective: Callable[[Tensor], Tensor], states: Tensor, rate: float) -> Tensor:
    """The policy at which a concave objective is stationary, by mirror ascent from the uniform policy: (S, A).

    It knows the objective only through its gradient: log π(a|s) moves by the gradient to π(a|s), each state's divided
    by its weight in the objective, then π is normalised.
    """
    logits = torch.zeros(S, A, dtype=torch.float64)
    for _ in range(80):
        policy = logits.softmax(-1).requires_grad_()
        (gradient,) = torch.autograd.grad(objective(policy), policy)
        gradient = gradient / states[:, None]
        gradient = gradient - (policy.detach() * gradient).sum(-1, keepdim=True)
        logits = logits + rate * gradient
    assert gradient.abs().max() < 1e-9  # no direction within the simplex is uphill
    return logits.softmax(-1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_klq_iterates_equal_those_of_penalised_ppo(mdp: MDP, alpha: float, lam: float) -> None:
    """Proposition 4.1: five iterates of Eq. 15 in Q space are those of Eqs. 17–20 in (π, V) space, β = τ(1 − α)/α.

    The sides share the MDP and the start. Q space: Q_{k+1} = α B_λ Q_k + (1 − α) Q_k (Eqs. 37, 89), B_λ under π[Q_k].
    (π, V) space: expected advantages from the TD errors of Eq. 14 (Eqs. 7, 16), the policy by ascent on the objective
    of Eq. 17 as it stands, the value by least squares on Eqs. 19 and 20, both weighted with the states that π_k visits.
    Fails for another β, for the other direction of either KL, for π_k in Eq. 20, or for λ-returns there without α.
    """
    action_values = random_values(S, A)
    policy, values = boltzmann(mdp, action_values)
    beta = mdp.tau * (1 - alpha) / alpha  # Eq. 18
    identity = torch.eye(S * A, dtype=torch.float64)
    for _ in range(5):
        under = boltzmann(mdp, action_values)[0]
        action_values = alpha * lambda_bellman(mdp, under, action_values, lam) + (1 - alpha) * action_values

        pair_transition = torch.einsum("ijk,kl->ijkl", mdp.transition, policy).reshape(S * A, S * A)
        # The discounted visits of π_k from a uniform start: every state has some, as the proposition needs.
        start = (policy / S).flatten()
        visits = torch.linalg.solve(identity - mdp.gamma * pair_transition.T, (1 - mdp.gamma) * start).view(S, A)
        states = visits.sum(-1)
        current = action_values_of(mdp, policy, values)
        td_errors = mdp.reward + mdp.gamma * mdp.next_mean(values) - current  # E[δ_t | s, a], Eq. 14
        decay = lam * mdp.gamma * pair_transition
        errors = torch.linalg.solve(identity - decay, td_errors.flatten()).view(S, A)  # E[Σ (λγ)^k δ_k | s, a], Eq. 7
        advantages = current + errors - values[:, None]  # Eq. 16

        def objective(new: Tensor, old=policy, advantages=advantages, states=states) -> Tensor:  # Eq. 17
            surrogate = (old * (new / old) * advantages).sum(-1)
            return (states * (surrogate - beta * kl(new, old) - mdp.tau * kl(new, mdp.reference))).sum()

        policy = maximise(objective, states, rate=0.5 / (beta + mdp.tau))
        target = alpha * errors + current - mdp.tau * (policy / mdp.reference).log()  # Eq. 20
        weight = visits.sqrt().flatten()[:, None]
        is_state = torch.eye(S, dtype=torch.float64).repeat_interleave(A, 0)  # the row of (s, a) picks V(s)
        values = torch.linalg.lstsq(weight * is_state, weight * target.view(-1, 1)).solution.squeeze(-1)  # Eq. 19

        torch.testing.assert_close(action_values_of(mdp, policy, values), action_values, rtol=0, atol=1e-10)
        torch.testing.assert_close(policy, boltzmann(mdp, action_values)[0], rtol=0, atol=1e-10)


def penalised_ppo(penalty: Literal["forward", "reverse"], tau: float, alpha: float, beta: float | None) -> PPO:
    return PPO(
        tau=tau,
        lam=0.95,
        gamma=1.0,
        alpha=alpha,
        clip=0.2,
        value_clip=0.2,
        value_coef=0.0,
        whiten=False,
        ppo_penalty=penalty,
        beta=beta,
        temperature=1.0,
    )


def expected_ppo_loss(ppo: PPO, states: Tensor, old: Tensor, policy: Tensor, advantages: Tensor) -> Tensor:
    """The mean of the public loss over s ~ `states` and a ~ π_old(·|s), each token's loss by itself: ()."""
    clip, forward, reverse = ppo.trust_region()
    zero = torch.zeros(1, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for s in range(S):
        for a in range(A):
            log_new, log_old, advantage = (x[s, a].view(1) for x in (policy.log(), old.log(), advantages))
            loss = ppo_loss(
                log_new,
                log_old,
                zero,
                zero,
                advantage,
                zero,
                clip=clip,
                value_coef=0.0,
                forward_kl_coef=forward,
                reverse_kl_coef=reverse,
            ).loss
            total = total + states[s] * old[s, a] * loss
    return total


@pytest.mark.parametrize("penalty", ["forward", "reverse"])
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_penalised_ppo_loss_is_the_paper_s_objective(
    mdp: MDP, penalty: Literal["forward", "reverse"], beta: float
) -> None:
    """Eqs. 5 and 17: the expected loss is minus the objective, in value and in gradient, for any π, π_old, π_b, V.

    The right side sums the divergences over all actions (Eq. 2), with the advantages of Eq. 16 and the penalty to π_b;
    the left side, sampled from π_old, has GAE's advantages, which differ from these by the token's own penalty (tested
    below), and no π_b. Fails if a penalty's estimator is biased, or if a direction, β or τ is mistaken.
    """
    old, states = random_policy(), torch.rand(S, dtype=torch.float64)
    logits = torch.randn(S, A, dtype=torch.float64, requires_grad=True)
    policy = logits.softmax(-1)
    errors = random_values(S, A)  # E[Σ (λγ)^k δ_k | s, a]: GAE on the KL-penalised reward
    advantages = errors + mdp.tau * (old / mdp.reference).log()  # Eq. 16, by Eqs. 7 and 12
    surrogate = (old * (policy / old) * advantages).sum(-1)
    to_old = kl(old, policy) if penalty == "forward" else kl(policy, old)
    objective = (states * (surrogate - beta * to_old - mdp.tau * kl(policy, mdp.reference))).sum()
    loss = expected_ppo_loss(penalised_ppo(penalty, mdp.tau, 1.0, beta), states, old, policy, errors)
    torch.testing.assert_close(loss, -objective, rtol=0, atol=1e-12)
    (expected,) = torch.autograd.grad(-objective, logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, logits)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_reverse_penalised_ppo_ends_at_klq_s_next_policy(mdp: MDP, alpha: float) -> None:
    """Proposition 4.1 for the public loss: with β = τ(1 − α)/α, its default, one batch's loss has its minimum at the
    policy of the next Q, Q + α E[Σ (λγ)^k δ_k] (Eqs. 7, 15), whatever the states' weights.

    Fails for any other default of β, and for the forward penalty in its place.
    """
    old, values = boltzmann(mdp, random_values(S, A))
    states, errors = torch.rand(S, dtype=torch.float64) + 0.1, random_values(S, A)
    best, _ = boltzmann(mdp, action_values_of(mdp, old, values) + alpha * errors)

    def gradient(ppo: PPO, policy: Tensor) -> Tensor:
        logits = policy.log().requires_grad_()
        return torch.autograd.grad(expected_ppo_loss(ppo, states, old, logits.softmax(-1), errors), logits)[0]

    reverse = penalised_ppo("reverse", mdp.tau, alpha, None)
    assert gradient(reverse, best).abs().max() < 1e-12
    assert gradient(reverse, old).abs().max() > 1e-3
    forward = penalised_ppo("forward", mdp.tau, alpha, mdp.tau * (1 - alpha) / alpha)
    assert (gradient(forward, best).abs().max() > 1e-3) == (alpha < 1)  # with β = 0 they are the same


def klq_gradients(
    mdp: MDP, logits: Tensor, values: Tensor, lam: float, weights: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """KLQ's expected on-policy gradients (Eq. 6) to logits (S, A) and values (S,), by the public loss, each state with
    weight 1; and the expected residual E[Q − G | s, a] (S, A) itself, from Eqs. 7 and 14."""
    policy = logits.softmax(-1)
    action_values = action_values_of(mdp, policy, values)
    pair_transition = torch.einsum("ijk,kl->ijkl", mdp.transition, policy).reshape(S * A, S * A)
    td_errors = mdp.reward + mdp.gamma * mdp.next_mean(values) - action_values
    decay = lam * mdp.gamma * pair_transition
    errors = torch.linalg.solve(torch.eye(S * A, dtype=torch.float64) - decay, td_errors.flatten()).view(S, A)
    logprobs = policy.log().requires_grad_()
    token_values = values[:, None].repeat(1, A).requires_grad_()
    loss = klq_loss(
        logprobs,
        mdp.reference.log(),
        token_values,
        action_values + errors,  # E[G | s, a]: the gradient is linear in G
        tau=mdp.tau,
        policy_weight=weights[0],
        value_weight=weights[1],
        num_tokens=1,
    ).loss
    to_logprobs, to_values = (policy * g for g in torch.autograd.grad(loss, (logprobs, token_values)))  # a ~ π(·|s)
    to_logits = to_logprobs - policy * to_logprobs.sum(-1, keepdim=True)  # through log-softmax
    return to_logits, to_values.sum(-1), -errors


@pytest.mark.parametrize("lam", LAMBDAS)
def test_gradient_weights_leave_the_fixed_point_where_it_is(mdp: MDP, lam: float) -> None:
    """For any w_π, w_V > 0 the on-policy gradients are 0 at (π*, V*), and nowhere else.

    Nowhere else, since they determine the residual: e = g_logits/(2 τ w_π π) + g_V/(2 w_V), its parts that vary with a
    and that do not; so both are 0 only where E[Q − G | s, a] = 0 for every (s, a), where Q is the fixed point of B_λ
    under π[Q], which is Q* alone (Theorem A.5, Corollary A.6). Fails if a weight enters the residual or the targets.
    """
    best, best_values = boltzmann(mdp, optimal_action_values(mdp))
    for _ in range(10):
        policy_weight, value_weight = (10 ** (4 * torch.rand(2, dtype=torch.float64) - 2)).tolist()
        weights = (policy_weight, value_weight)
        to_logits, to_values, residual = klq_gradients(mdp, best.log(), best_values, lam, weights)
        for gradient in (to_logits / policy_weight, to_values / value_weight, residual):
            assert gradient.abs().max() < 1e-11
        logits, values = random_values(S, A), random_values(S)
        to_logits, to_values, residual = klq_gradients(mdp, logits, values, lam, weights)
        assert residual.abs().max() > 0.1
        varying = to_logits / (2 * mdp.tau * policy_weight * logits.softmax(-1))
        constant = to_values[:, None] / (2 * value_weight)
        torch.testing.assert_close(varying + constant, residual, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (2.0, 1.0), (2.0, 0.1), (0.5, 1.0), (1.0, 2.0)], ids=["1,1", "2,1", "2,0.1", "0.5,1", "1,2"]
)
def test_gradient_steps_reach_the_optimum_whatever_their_weights(mdp: MDP, weights: tuple[float, float]) -> None:
    """From a random (π, V), on-policy gradient steps end at (π*, V*) for the paper's weights and four others, such as
    w_π = 1/τ with w_V = 0.1 (τ = 0.5).

    A step moves Q's varying part by 2 τ² w_π and its constant part by 2 w_V times the residual; the rate makes the
    larger of the two 0.4. The logits' steps are divided by π(a|s), which moves no stationary point, lest an unlikely
    action takes a million steps. After 40 times the inverse of the smaller step, an error that decays at its pace is
    e^−16 of what it was.
    """
    mdp = replace(mdp, tau=0.5)
    best, best_values = boltzmann(mdp, optimal_action_values(mdp))
    logits, values = random_values(S, A), random_values(S)
    assert (logits.softmax(-1) - best).abs().max() > 0.1 and (values - best_values).abs().max() > 0.1
    paces = (2 * mdp.tau**2 * weights[0], 2 * weights[1])
    rate = 0.4 / max(paces)
    for _ in range(round(40 * max(paces) / min(paces))):
        to_logits, to_values, _ = klq_gradients(mdp, logits, values, 0.95, weights)
        logits = logits - rate * to_logits / logits.softmax(-1)
        values = values - rate * to_values
    torch.testing.assert_close(logits.softmax(-1), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(values, best_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_klq_error_term_is_gae_on_the_penalised_reward(lam: float, gamma: float) -> None:
    """Δ of Algorithm 2 is Â of Algorithm 1: GAE on r − τ log π/π_b, by the public operations and by the pseudocode.

    Fails if one of the two scans differs from the other in its bootstrap, its mask or where a row's reward is paid.
    """
    rows, steps, tau = 5, 12, 0.3
    log_ratio, values, rewards = random_values(3, rows, steps)
    lengths = torch.tensor([12, 1, 7, 0, 11])
    mask = torch.arange(steps) < lengths[:, None]
    bootstrap = random_values(rows)
    errors = lambda_returns(
        log_ratio, values, rewards, mask, tau=tau, lam=lam, gamma=gamma, bootstrap=bootstrap
    ).advantages
    advantages, _ = gae(rewards - tau * log_ratio, values, mask, lam=lam, gamma=gamma, bootstrap=bootstrap)
    torch.testing.assert_close(errors, advantages, rtol=0, atol=1e-12)
    for row, length in enumerate(lengths.tolist()):
        advantage, next_value = 0.0, bootstrap[row].item()
        for t in reversed(range(length)):  # Algorithm 1, line for line
            adjusted = (rewards[row, t] - tau * log_ratio[row, t]).item()
            advantage = adjusted + gamma * next_value - values[row, t].item() + lam * gamma * advantage
            next_value = values[row, t].item()
            assert advantages[row, t].item() == pytest.approx(advantage, abs=1e-12)
