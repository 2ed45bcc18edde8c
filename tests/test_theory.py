"""What the theory promises of the penalty, on problems whose answers are known.

"CQL" is Kumar et al., arXiv 2006.04779. Everything goes through cql.py's own functions.
"""

import math

import numpy as np
import pytest
import torch
from reference import box_task, in_float64, tiny

import cql

double = pytest.fixture(in_float64, autouse=True)

# ======================================================================================
# The soft maximum over proposals is an integral over actions
# ======================================================================================


def value_1d(actions):
    return 2 * torch.cos(3 * actions[..., 0]) + actions[..., 0]


def value_2d(actions):
    x, y = actions[..., 0], actions[..., 1]
    return 1.5 * torch.sin(2 * x) * y - (y - 0.3) ** 2


def integral(value, action_dim: int, temperature: float) -> float:
    """T log of the integral of exp(Q / T) over the box, by the midpoint rule."""
    n = 20_000 if action_dim == 1 else 600
    points = (torch.arange(n) + 0.5) * 2 / n - 1
    grid = torch.cartesian_prod(*[points] * action_dim).reshape(-1, action_dim)
    mass = (value(grid) / temperature).exp().sum() * (2 / n) ** action_dim
    return temperature * math.log(mass)


def soft_maximum(agent, value, K: int) -> torch.Tensor:
    """The gap above Q = 0 of the data, from one state's proposals of the agent, less
    T log 3K; [R]."""
    R, A = len(agent.log_alpha), agent.action_dim
    state = torch.ones(R, 1, 1)
    batch = cql.Batch(
        observations=state,
        actions=torch.zeros(R, 1, A),
        rewards=state[..., 0],
        next_observations=-state,
        terminations=state[..., 0],
    )
    samples = cql.sample_actions(agent.policy, batch, agent.draw(1))
    assert samples.proposals.shape == (R, 1, 3 * K, A)
    q, zero = value(samples.proposals).unsqueeze(1), torch.zeros(R, 1, 1)
    T = agent.sweep.cql_temp
    gap = cql.conservative_gap(q, samples.log_mu.unsqueeze(1), zero, T, agent.config)
    return gap[:, 0, 0] - T * math.log(3 * K)


def set_gaussian(policy):
    """Mean 0.4 at s = 1 and -0.4 at s = -1, std 1.1, in every action dimension: narrower
    policies give the weights a variance that no number of samples tames."""
    A = policy.layers[-1].bias.shape[-1] // 2
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        first, *middle, last = policy.layers
        first.weight[...] = torch.tensor([[1.0, -1.0]])  # s as relu(s), relu(-s)
        for layer in middle:
            layer.weight[...] = torch.eye(2)
        last.weight[..., :A] = torch.tensor([[0.4], [-0.4]])
        policy.log_std_offset.fill_(math.log(1.1))


@pytest.mark.parametrize("value, action_dim", [(value_1d, 1), (value_2d, 2)])
def test_soft_maximum_approaches_the_integral(value, action_dim):
    """For any temperature; every third of the proposals estimates the integral by itself
    if its densities are its own."""
    temperatures, errors = [0.5, 1.0, 3.0], []
    exact = [integral(value, action_dim, T) for T in temperatures]
    for K in (100, 100_000):
        config = tiny(cql_n_actions=K, cql_temp=temperatures, hidden_dim=2)
        task = box_task(observation_dim=1, action_dim=action_dim)
        agent = cql.ContinuousCQL(config, task)
        set_gaussian(agent.policy)
        errors.append(np.abs(soft_maximum(agent, value, K).detach().numpy() - exact))
    assert errors[1].max() < 0.01 < errors[0].max()


# ======================================================================================
# A tabular problem: three states in a ring, three actions (back, stay, on). Stepping on
# from the last state pays 1 and ends the episode half of the time; staying in the first
# pays 0.1 for ever, a trap for the short-sighted.
# ======================================================================================

STATES, ACTIONS, DISCOUNT = 3, 3, 0.8
NEXT = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 0]])
REWARD = torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)
END = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0.5]], dtype=torch.float64)
# How often the data tries what: mostly the trap and wandering; the best action is each
# state's rarest.
COUNTS = torch.tensor([[3, 5, 2], [4, 4, 2], [3, 3, 2]])
BETA = COUNTS / COUNTS.sum(1, keepdim=True)


def data_of(counts, R: int) -> cql.Batch:
    """All transitions, [R, B]; states and actions are indices."""
    kept = []
    for s in range(STATES):
        for a in range(ACTIONS):
            for i in range(int(counts[s, a])):
                kept.append((s, a, REWARD[s, a], NEXT[s, a], i % 2 * (END[s, a] > 0)))
    s, a, r, following, end = (
        torch.tensor(kept).double().T.unsqueeze(1).expand(-1, R, -1)
    )
    return cql.Batch(
        observations=s.unsqueeze(2),
        actions=a.unsqueeze(2),
        rewards=r,
        next_observations=following.unsqueeze(2),
        terminations=end,
    )


class Table(torch.nn.Module):
    """A critic that looks Q [R, S, A] up, for observations and actions that are indices:
    [R, B, 1], [R, B, M, 1] -> [R, 1, B, M]."""

    def __init__(self, initial):
        super().__init__()
        self.q = torch.nn.Parameter(initial.clone())

    def forward(self, observations, actions, dtype=None):
        run = torch.arange(len(self.q)).reshape(-1, 1, 1)
        return self.q[run, observations.long(), actions.squeeze(-1).long()].unsqueeze(1)


def true_values(policy):
    """Q of a policy [S, A] in the problem itself, by its linear equations."""
    n = STATES * ACTIONS
    following = torch.nn.functional.one_hot(NEXT, STATES) * (1 - END).unsqueeze(-1)
    transition = (following.unsqueeze(-1) * policy).view(n, n)  # to every state-action
    system = torch.eye(n) - DISCOUNT * transition
    return torch.linalg.solve(system, REWARD.flatten()).view(STATES, ACTIONS)


def optimal_values():
    """By policy iteration, of one round for every policy."""
    q = REWARD
    for _ in range(ACTIONS**STATES):
        q = true_values(torch.nn.functional.one_hot(q.argmax(1), ACTIONS).double())
    return q


def fitted(alphas, counts=COUNTS, greedy=False, optimism=0.0, T=1.0, **flags):
    """Q [R, S, A], a run for each of alphas, that minimizes cql.critic_loss on the data,
    all three actions enumerated with density 1. Targets are those of its own policy:
    the greedy one, or softmax(Q / T)."""
    R = len(alphas)
    sweep = cql.Sweep(torch.tensor(alphas), torch.full((R,), T), torch.zeros(R))
    config = cql.TrainConfig(discount=DISCOUNT, cql_max_target_backup=True, **flags)
    batch = data_of(counts, R)
    shape = R, batch.rewards.shape[1], ACTIONS
    every, zeros = torch.arange(ACTIONS).expand(shape).unsqueeze(-1), torch.zeros(shape)
    samples = cql.Samples(**dict.fromkeys(cql.Samples._fields))._replace(
        target_actions=every, target_log_pi=zeros, proposals=every.double(),
        log_mu=zeros,
    )  # fmt: skip
    table = Table(torch.full((R, STATES, ACTIONS), optimism))
    optimizer = torch.optim.SGD(table.parameters(), lr=2.0)
    for _ in range(500):
        if greedy:
            target, _ = cql.td_target(table, batch, samples, None, None, config)
        else:
            q = table.q.detach()
            value = ((q / T).softmax(-1) * q).sum(-1)
            following = value.gather(1, batch.next_observations.squeeze(-1).long())
            target = batch.rewards + DISCOUNT * (1 - batch.terminations) * following
        args = batch, samples, None, target, None, sweep, config
        loss, _ = cql.critic_loss(table, *args)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return table.q.detach()


@pytest.mark.parametrize("T", [0.5, 1.0])
def test_table_stands_at_the_minimum_in_closed_form(T):
    """Where the gradient is zero, 2 beta (Q - y) + cql_alpha (pi - beta) = 0, beta the
    data's policy and pi = softmax(Q / T): no factor 1/2 on the squared error, none of T
    on the penalty's gradient; with cql_alpha = 0 it is the policy's true value."""
    alphas = [0.0, 0.05, 0.2]
    for q, cql_alpha in zip(fitted(alphas, T=T), alphas):
        pi = (q / T).softmax(1)
        backup = REWARD + DISCOUNT * (1 - END) * (pi * q).sum(1)[NEXT]
        expected = backup - cql_alpha / 2 * (pi / BETA - 1)
        torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)
        if cql_alpha == 0.0:
            torch.testing.assert_close(q, true_values(pi), rtol=0, atol=1e-6)


def test_values_lie_below_the_true_values_of_the_policy():
    """CQL theorem 3.2: in every state the policy's value is underestimated, and so is Q
    averaged over the data's actions, and Q of each action that the policy takes more
    often than the data does. More penalty, lower values."""
    before = math.inf
    for q in fitted([0.05, 0.1, 0.2, 0.4]):
        pi = q.softmax(1)
        true, favoured = true_values(pi), pi >= BETA
        assert ((pi * q).sum(1) < (pi * true).sum(1)).all()
        assert ((BETA * q).sum(1) < (BETA * true).sum(1)).all()
        assert favoured.any() and (q[favoured] < true[favoured]).all()
        assert ((pi * q).sum(1) < before).all()
        before = (pi * q).sum(1)


def test_greedy_policy_is_optimal_and_its_values_are_lower_bounds():
    """With greedy targets: the best actions are found although the data prefers others,
    and their Q's stay below the true values, which they reach without a penalty."""
    optimal = optimal_values()
    assert optimal.argmax(1).tolist() == [2, 2, 2] and (COUNTS.argmin(1) == 2).all()
    exact, *penalized = fitted([0.0, 0.05, 0.1], greedy=True)
    torch.testing.assert_close(exact, optimal, rtol=0, atol=1e-6)
    for q in penalized:
        assert torch.equal(q.argmax(1), optimal.argmax(1))
        assert (q.amax(1) < optimal.amax(1)).all()


@pytest.mark.parametrize("importance", [True, False], ids=["weighted", "unweighted"])
def test_actions_outside_the_data_are_held_down(importance):
    """Offline learning's fault and CQL's cure: never tried, 'back' keeps its optimistic
    first value and rules Q-learning's policy; the penalty takes it below the data's."""
    counts, optimal = COUNTS.clone(), optimal_values()
    counts[:, 0] = 0
    flags = dict(greedy=True, optimism=5.0, cql_importance_sample=importance)
    naive, q = fitted([0.0, 0.1], counts, **flags)
    assert naive.argmax(1).tolist() == [0, 0, 0]
    assert naive[0, 1].item() == pytest.approx(0.1 + DISCOUNT * 5.0)  # learned from it
    assert torch.equal(q.argmax(1), optimal.argmax(1))
    assert (q[:, 0] < q[:, 1:].amin(1)).all()
    assert (q.amax(1) < optimal.amax(1)).all()
