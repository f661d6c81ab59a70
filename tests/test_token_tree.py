"""KLQ against the exact optimum, on token trees small enough to list every response (equations of arXiv 2508.17000).

A tree holds every response over a vocabulary of 3 up to 4 tokens long, as in the token-level view of Section 2.2: a
state is the tokens so far, an action the next token, and a score R(y) is paid on the last token (γ = 1). With τ > 0 the
optimum of the RLHF objective E_π[R(y) − τ log π(y)/π_b(y)], Eq. 3, is known in closed form:

    π*(y) ∝ π_b(y) exp(R(y)/τ)        V*(s) = τ log E_{y∼π_b}[exp(R(y)/τ) | s]        Q* = τ log(π*/π_b) + V*

KLQ is run here as Algorithm 2 has it, with the public `lambda_returns` for the targets and `klq_loss` for the
gradients, and a table of logits and values in place of the language model: first with exact expectations over all
responses, then on samples.
"""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from klq_fast import klq_loss, lambda_returns

VOCAB, DEPTH = 3, 4
EOS = 2


@dataclass(frozen=True)
class Tree:
    """N responses of at most T tokens through S states, with a random reference policy and random scores."""

    states: Tensor  # (N, T) int64: the state in which each token is chosen; 0 past the end
    tokens: Tensor  # (N, T) int64: 0 past the end
    mask: Tensor  # (N, T) bool
    scores: Tensor  # (N,): R(y)
    ref_logprobs: Tensor  # (S, V): log π_b(a|s)

    def along(self, table: Tensor) -> Tensor:
        """The entries of a (S, V) table that each response meets: (N, T), 0 past the end."""
        return torch.where(self.mask, table[self.states, self.tokens], 0)

    def take(self, rows: Tensor) -> "Tree":
        """The responses of these rows, in this order."""
        mask, scores = self.mask[rows], self.scores[rows]
        return replace(self, states=self.states[rows], tokens=self.tokens[rows], mask=mask, scores=scores)

    def logprobs(self, logprobs: Tensor) -> Tensor:
        """log π(y) of each response: (N,)."""
        return self.along(logprobs).sum(-1)

    def total(self, weights: Tensor, amounts: Tensor) -> Tensor:
        """Σ_y weight(y) · amount(y, t) over the responses that take token a in state s: (N,), (N, T) -> (S, V)."""
        where = torch.where(self.mask, self.states * VOCAB + self.tokens, self.ref_logprobs.numel())
        visits = torch.nn.functional.one_hot(where, self.ref_logprobs.numel() + 1)[..., :-1].double()  # (N, T, S·V)
        return torch.einsum("n,nt,ntk->k", weights, amounts, visits).view_as(self.ref_logprobs)

    def visits(self, probs: Tensor) -> Tensor:
        """The probability that a response drawn with `probs` takes token a in state s: (N,) -> (S, V)."""
        return self.total(probs, torch.ones_like(self.along(self.ref_logprobs)))


def token_tree(eos: int | None, seed: int) -> Tree:
    """All responses: with `eos`, they stop there or after DEPTH tokens; without, all have DEPTH tokens."""
    responses = [
        response
        for length in range(1, DEPTH + 1)
        for response in product(range(VOCAB), repeat=length)
        if eos not in response[:-1] and (length == DEPTH or response[-1] == eos)
    ]
    prefixes = sorted({response[:t] for response in responses for t in range(len(response))}, key=len)
    index = {prefix: state for state, prefix in enumerate(prefixes)}  # the empty response is state 0
    padding = [[0] * (DEPTH - len(response)) for response in responses]
    states = [[index[y[:t]] for t in range(len(y))] + pad for y, pad in zip(responses, padding, strict=True)]
    tokens = [[*y, *pad] for y, pad in zip(responses, padding, strict=True)]
    mask = [[True] * len(y) + [False] * len(pad) for y, pad in zip(responses, padding, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    return Tree(
        states=torch.tensor(states),
        tokens=torch.tensor(tokens),
        mask=torch.tensor(mask),
        scores=torch.rand(len(responses), generator=generator, dtype=torch.float64),
        ref_logprobs=torch.randn(len(index), VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1),
    )


@dataclass(frozen=True)
class Optimum:
    probs: Tensor  # (N,): π*(y)
    logprobs: Tensor  # (S, V): log π*(a|s)
    values: Tensor  # (S,): V*(s)
    action_values: Tensor  # (S, V): Q*(s, a)


def optimum(tree: Tree, tau: float) -> Optimum:
    """The closed form, each part from the list of responses on its own: none is derived from another."""
    ref = tree.along(tree.ref_logprobs)  # (N, T)
    to_go = ref.flip(-1).cumsum(-1).flip(-1)  # log π_b(the rest of y | s_t), this token included
    num_states = len(tree.ref_logprobs)

    def soft_mean(index: Tensor, logprobs: Tensor, size: int) -> Tensor:
        """τ log E_{π_b}[exp(R/τ) | index]: a log-sum-exp over the responses that pass through each index."""
        table = torch.full((size, len(tree.scores)), -torch.inf, dtype=torch.float64)
        rows = torch.arange(len(tree.scores))[:, None].expand_as(index)
        table[index[tree.mask], rows[tree.mask]] = (logprobs + tree.scores[:, None] / tau)[tree.mask]
        return tau * table.logsumexp(-1)

    probs = (tree.logprobs(tree.ref_logprobs) + tree.scores / tau).softmax(-1)
    visits = tree.visits(probs)
    return Optimum(
        probs=probs,
        logprobs=(visits / visits.sum(-1, keepdim=True)).log(),
        values=soft_mean(tree.states, to_go, num_states),
        action_values=soft_mean(tree.states * VOCAB + tree.tokens, to_go - ref, num_states * VOCAB).view(-1, VOCAB),
    )


def rlhf_reward(tree: Tree, logprobs: Tensor, tau: float) -> Tensor:
    """J(π) = E_π[R(y) − τ log π(y)/π_b(y)], the expectation of Eq. 3."""
    sequence = tree.logprobs(logprobs)
    return (sequence.exp() * (tree.scores - tau * (sequence - tree.logprobs(tree.ref_logprobs)))).sum()


def targets(tree: Tree, logprobs: Tensor, values: Tensor, **options: float) -> Tensor:
    """The λ-return of every token of every response, by the public operation: (N, T)."""
    log_ratio = tree.along(logprobs - tree.ref_logprobs)
    return lambda_returns(log_ratio, values[tree.states], tree.scores, tree.mask, **options).returns


def token_gradients(
    tree: Tree, logprobs: Tensor, values: Tensor, returns: Tensor, **options: float
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ (Q − G)² to the log-probability and the value of each token, by the public loss: (N, T) each."""
    token_logprobs = tree.along(logprobs).requires_grad_()
    token_values = values[tree.states].requires_grad_()
    ref_logprobs = tree.along(tree.ref_logprobs)
    output = klq_loss(token_logprobs, ref_logprobs, token_values, returns, tree.mask, num_tokens=1, **options)
    grad_logprobs, grad_values = torch.autograd.grad(output.loss, (token_logprobs, token_values))
    return grad_logprobs, grad_values


def table_gradients(
    tree: Tree, probs: Tensor, logprobs: Tensor, gradients: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Their expectation over responses drawn with `probs`, carried to the tables: logits (S, V), values (S,)."""
    grad_logprobs, grad_values = (tree.total(probs, gradient) for gradient in gradients)
    grad_logits = grad_logprobs - logprobs.exp() * grad_logprobs.sum(-1, keepdim=True)  # through log-softmax
    return grad_logits, grad_values.sum(-1)


def regress(
    tree: Tree, logprobs: Tensor, values: Tensor, *, tau: float, lam: float, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One batch of KLQ with exact expectations: the (π, V) whose Q minimises Eq. 15 over responses drawn from π_old."""
    probs = tree.logprobs(logprobs).exp()
    returns = targets(tree, logprobs, values, tau=tau, lam=lam, alpha=alpha)
    _, grad_values = token_gradients(tree, logprobs, values, returns, tau=tau)
    # In Q space the loss is a parabola of curvature 2·P(s, a): one Newton step from its gradient ends at the minimum.
    action_values = tau * (logprobs - tree.ref_logprobs) + values[:, None]  # Eq. 12
    action_values = action_values - tree.total(probs, grad_values) / (2 * tree.visits(probs))
    values = tau * (tree.ref_logprobs + action_values / tau).logsumexp(-1)  # Eq. 11
    return tree.ref_logprobs + (action_values - values[:, None]) / tau, values  # Eq. 10


def error(tree: Tree, logprobs: Tensor, values: Tensor, tau: float, depth: int = 0) -> float:
    """The largest error of any log π(a|s), V(s) or Q(s, a) from `depth` tokens on, in all states, however unlikely."""
    best = optimum(tree, tau)
    action_values = tau * (logprobs - tree.ref_logprobs) + values[:, None]
    pairs = ((logprobs, best.logprobs), (values, best.values), (action_values, best.action_values))
    first = tree.states[tree.mask[:, depth], depth].min()  # states are in order of their depth
    return max((found - exact)[first:].abs().max().item() for found, exact in pairs)


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_the_closed_form_is_the_optimum(eos: int | None, tau: float) -> None:
    """π*, V* and Q*, each summed over responses on its own, satisfy Eqs. 10–12, and no policy has a higher J (Eq. 3).

    Fails if the truth that the other tests compare with is wrong: J(π*) must be V* of the empty response, and any other
    policy must fall short of it by exactly τ KL(π‖π*).
    """
    tree = token_tree(eos, seed=0)
    best = optimum(tree, tau)
    log_ratio = best.logprobs - tree.ref_logprobs
    torch.testing.assert_close(tau * log_ratio + best.values[:, None], best.action_values, rtol=0, atol=1e-12)
    torch.testing.assert_close(tree.logprobs(best.logprobs).exp(), best.probs, rtol=1e-12, atol=0)
    torch.testing.assert_close(rlhf_reward(tree, best.logprobs, tau), best.values[0], rtol=0, atol=1e-12)
    for _ in range(20):
        logprobs = torch.randn_like(tree.ref_logprobs).log_softmax(-1)
        sequence = tree.logprobs(logprobs)
        divergence = (sequence.exp() * (sequence - best.probs.log())).sum()
        shortfall = best.values[0] - rlhf_reward(tree, logprobs, tau)
        torch.testing.assert_close(shortfall, tau * divergence, rtol=0, atol=1e-12)
        assert divergence > 0


@pytest.mark.parametrize("eos", [EOS, None])
def test_token_and_completion_level_divergences_agree(eos: int | None) -> None:
    """Section 2.2, Remark 2.1: with γ = 1, KL(π(y)‖π_b(y)) is the expected sum of D(π‖π_b)(s_t) along the response.

    So E_π[Σ_t log π/π_b], which training reports, is the divergence of Eq. 3. Fails if a token past the end is counted.
    """
    tree = token_tree(eos, seed=0)
    logprobs = torch.randn_like(tree.ref_logprobs).log_softmax(-1)
    sequence = tree.logprobs(logprobs)
    completion_level = (sequence.exp() * (sequence - tree.logprobs(tree.ref_logprobs))).sum()
    divergence = (logprobs.exp() * (logprobs - tree.ref_logprobs)).sum(-1)  # Eq. 2, (S,)
    token_level = (tree.visits(sequence.exp()).sum(-1) * divergence).sum()
    torch.testing.assert_close(token_level, completion_level, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("tau", [0.05, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_exact_regression_reaches_the_optimum(eos: int | None, tau: float, lam: float) -> None:
    """With α = 1 each batch makes one more layer of the tree exact, from the leaves up (Eqs. 6, 7, 10–14, Theorem A.3).

    The last layer's Q is R after one batch; a layer whose successors are exact has E[G] = V*(s') whatever λ is. So the
    optimum is reached after DEPTH batches, to rounding. One-step returns (λ = 0) are not there a batch earlier, and no
    λ is there after the first. Fails if a target or the residual uses a wrong τ, sign or time step.
    """
    tree = token_tree(eos, seed=1)
    logprobs, values = tree.ref_logprobs, torch.randn(len(tree.ref_logprobs), dtype=torch.float64)
    errors = []
    for batch in range(DEPTH):
        logprobs, values = regress(tree, logprobs, values, tau=tau, lam=lam)
        assert error(tree, logprobs, values, tau, depth=DEPTH - 1 - batch) < 1e-9
        errors.append(error(tree, logprobs, values, tau))
    assert errors[0] > 1e-2
    if lam == 0:
        assert errors[DEPTH - 2] > 1e-2


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("tau", [0.05, 0.5])
@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_conservative_exact_regression_reaches_the_optimum(eos: int | None, tau: float, alpha: float) -> None:
    """With α < 1 (Remark 3.1) the same optimum is approached geometrically, at the rate 1 − α in the last layer.

    The error of layer d after k batches is a polynomial in k of degree < DEPTH times (1 − α)^k, hence the number of
    batches. Fails if α scales anything but the error term of Eq. 7.
    """
    tree = token_tree(eos, seed=2)
    logprobs, values = tree.ref_logprobs, torch.randn(len(tree.ref_logprobs), dtype=torch.float64)
    last = int(tree.mask.all(-1).nonzero()[0])
    end = (tree.states[last, -1], tree.tokens[last, -1])
    before = optimum(tree, tau).action_values[end] - values[end[0]]  # π = π_b, so Q = V
    logprobs, values = regress(tree, logprobs, values, tau=tau, lam=0.95, alpha=alpha)
    after = optimum(tree, tau).action_values[end] - (tau * (logprobs - tree.ref_logprobs) + values[:, None])[end]
    torch.testing.assert_close(after, (1 - alpha) * before, rtol=1e-9, atol=0)
    for _ in range(round(40 / alpha)):
        logprobs, values = regress(tree, logprobs, values, tau=tau, lam=0.95, alpha=alpha)
    assert error(tree, logprobs, values, tau) < 1e-6


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.1)])
def test_the_gradient_vanishes_where_the_regression_ends(eos: int | None, weights: tuple[float, float]) -> None:
    """The gradients of the public loss to logits and values are zero at the minimum of a batch's loss (Eqs. 6, 13).

    `regress` moves Q by the gradient to the values alone, so this also ties the gradient to the log-probabilities to
    the same minimum, and shows that positive gradient weights leave it where it is: there E[Q − G | s, a] = 0 for every
    (s, a). Fails if the loss uses another τ or reference than `lambda_returns`, or if a weight changes the residual.
    """
    tree, tau = token_tree(eos, seed=3), 0.5
    logprobs = torch.randn_like(tree.ref_logprobs).log_softmax(-1)
    values = torch.randn(len(logprobs), dtype=torch.float64)
    probs = tree.logprobs(logprobs).exp()
    returns = targets(tree, logprobs, values, tau=tau, lam=0.95)
    options = {"tau": tau, "policy_weight": weights[0], "value_weight": weights[1]}
    start = table_gradients(tree, probs, logprobs, token_gradients(tree, logprobs, values, returns, **options))
    logprobs, values = regress(tree, logprobs, values, tau=tau, lam=0.95)
    end = table_gradients(tree, probs, logprobs, token_gradients(tree, logprobs, values, returns, **options))
    for before, after in zip(start, end, strict=True):
        assert before.abs().max() > 1e-2
        assert after.abs().max() < 1e-12


def descend(
    tree: Tree, logits: Tensor, values: Tensor, *, tau: float, lam: float, rate: float, batches: int, **weights: float
) -> tuple[Tensor, Tensor]:
    """KLQ with exact expectations by gradient steps, 4 epochs on each batch's fixed targets (Algorithm 2): (log π, V).

    Each parameter's step is divided by how often the batch's states meet it, under the old or the new policy: otherwise
    an action of probability 1e-6 would need a million times more steps. A positive factor moves no stationary point.
    """
    for _ in range(batches):
        old_logprobs = logits.log_softmax(-1)
        probs = tree.logprobs(old_logprobs).exp()
        visits = tree.visits(probs).sum(-1)  # (S,)
        returns = targets(tree, old_logprobs, values, tau=tau, lam=lam)
        for _ in range(4):
            logprobs = logits.log_softmax(-1)
            gradients = token_gradients(tree, logprobs, values, returns, tau=tau, **weights)
            grad_logits, grad_values = table_gradients(tree, probs, logprobs, gradients)
            logits = logits - rate * grad_logits / (visits[:, None] * torch.maximum(old_logprobs, logprobs).exp())
            values = values - rate * grad_values / visits
    return logits.log_softmax(-1), values


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize(
    ("tau", "rate", "weights"),
    [
        (0.5, 0.5, {"policy_weight": 1.0, "value_weight": 1.0}),
        (0.5, 0.5, {"policy_weight": 2.0, "value_weight": 0.1}),
        (0.05, 2.5, {"policy_weight": 20.0, "value_weight": 0.1}),
    ],
    ids=["paper", "weighted", "weighted, small τ"],
)
def test_exact_gradient_steps_reach_the_optimum(
    eos: int | None, tau: float, rate: float, weights: dict[str, float]
) -> None:
    """Gradient steps on the public loss (Eq. 6, Algorithm 2) end at π*, V*, Q*, with the paper's weights and others.

    With policy_weight = 1/τ and value_weight = 0.1 the steps are those of no single loss, yet the only policy and value
    that they leave alone are the optimum. Fails if a gradient has the wrong sign, goes to the wrong token, or if a
    weight enters the residual.
    """
    tree = token_tree(eos, seed=4)
    values = torch.randn(len(tree.ref_logprobs), dtype=torch.float64)
    start = error(tree, tree.ref_logprobs, values, tau)
    logprobs, values = descend(tree, tree.ref_logprobs, values, tau=tau, lam=0.95, rate=rate, batches=60, **weights)
    assert start > 1
    assert error(tree, logprobs, values, tau) < 1e-6


@pytest.mark.parametrize("eos", [EOS, None])
def test_a_constant_reward_leaves_the_policy_at_the_reference(eos: int | None) -> None:
    """With R(y) = c, π* = π_b and V* = c (Eqs. 10, 11): every gradient is zero there, and KLQ returns there.

    From V = c each response's residual is zero, not only their mean. From another V the policy moves away while V is
    wrong, and comes back. Fails if the log-ratio is not zero at π = π_b or a response's end is mistaken.
    """
    tree, tau, constant = token_tree(eos, seed=5), 0.5, -0.7
    tree = replace(tree, scores=torch.full_like(tree.scores, constant))
    values = torch.full((len(tree.ref_logprobs),), constant, dtype=torch.float64)
    returns = targets(tree, tree.ref_logprobs, values, tau=tau, lam=0.95)
    for gradient in token_gradients(tree, tree.ref_logprobs, values, returns, tau=tau):
        assert gradient.abs().max() < 1e-13
    wrong = torch.randn_like(values)
    moved, _ = descend(tree, tree.ref_logprobs, wrong, tau=tau, lam=0.95, rate=0.5, batches=1)
    assert (moved - tree.ref_logprobs).abs().max() > 1e-2
    logprobs, found = descend(tree, tree.ref_logprobs, wrong, tau=tau, lam=0.95, rate=0.5, batches=60)
    torch.testing.assert_close(logprobs, tree.ref_logprobs, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, values, rtol=0, atol=1e-6)


BATCHES, ROLLOUTS, EPOCHS, MINIBATCH = 50, 256, 4, 64


def train_on_samples(tree: Tree, *, tau: float, lam: float, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    """KLQ on samples as in Algorithm 2, from π_b and random values: (log π, V) after the last batch."""
    generator = torch.Generator().manual_seed(seed)
    logits = tree.ref_logprobs.clone().requires_grad_()
    values = torch.randn(len(logits), generator=generator, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([logits, values], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=BATCHES)
    for _ in range(BATCHES):
        old_logprobs = logits.detach().log_softmax(-1)
        rollouts = tree.take(
            tree.logprobs(old_logprobs).exp().multinomial(ROLLOUTS, replacement=True, generator=generator)
        )
        returns = targets(rollouts, old_logprobs, values.detach(), tau=tau, lam=lam)
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROLLOUTS, generator=generator).split(MINIBATCH):
                batch = rollouts.take(rows)
                logprobs, ref_logprobs = batch.along(logits.log_softmax(-1)), batch.along(tree.ref_logprobs)
                output = klq_loss(logprobs, ref_logprobs, values[batch.states], returns[rows], batch.mask, tau=tau)
                optimizer.zero_grad()
                output.loss.backward()
                optimizer.step()
        schedule.step()
    return logits.detach().log_softmax(-1), values.detach()


@pytest.mark.parametrize(
    ("eos", "seed", "kl_bound", "value_bound"),
    [(EOS, 8, 0.043, 0.14), (None, 6, 0.038, 0.09)],
)
def test_samples_reach_the_optimum(eos: int | None, seed: int, kl_bound: float, value_bound: float) -> None:
    """KLQ on 50 batches of 256 samples, 4 epochs of 4 minibatches (Algorithm 2), ends near π* and V* at τ = 0.1.

    KL(π‖π*) starts at 1.9 nats; the error of V, rms over the states π* visits, at about 1. Over 40 seeds they end at
    log10 KL = −2.00 ± 0.25 and log10 error = −1.65 ± 0.31 (mean and standard deviation) with an end-of-sequence token,
    at −1.78 ± 0.15 and −1.51 ± 0.18 without. The bounds hold for the geometric mean of 4 seeds and lie 5 of its
    standard deviations, half of those, above the mean. J falls short of J(π*) by τ KL, so by less than 0.005 of scores
    in [0, 1].
    """
    tree, tau = token_tree(eos, seed), 0.1
    best = optimum(tree, tau)
    occupancy = tree.visits(best.probs).sum(-1)
    divergences, errors = [], []
    for run in range(4):
        logprobs, values = train_on_samples(tree, tau=tau, lam=0.95, rate=0.06, seed=run)
        sequence = tree.logprobs(logprobs)
        divergences.append((sequence.exp() * (sequence - best.probs.log())).sum())
        errors.append(((values - best.values).square() * occupancy).sum().div(occupancy.sum()).sqrt())
    assert torch.stack(divergences).log().mean().exp() < kl_bound
    assert torch.stack(errors).log().mean().exp() < value_bound
