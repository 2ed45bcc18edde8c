"""What the theory says of the penalty, on problems with known answers.

"CQL" is Kumar et al., arXiv 2006.04779. All numbers come from cql.py's own functions.
"""

import math

import numpy as np
import pytest
import torch
from reference import box_task, in_float64, losses_of, tiny

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
    """Return T log of the integral of exp(Q / T) over the box, by the midpoint rule."""
    n = 20_000 if action_dim == 1 else 600
    points = (torch.arange(n) + 0.5) * 2 / n - 1
    grid = torch.cartesian_prod(*[points] * action_dim).reshape(-1, action_dim)
    mass = (value(grid) / temperature).exp().sum() * (2 / n) ** action_dim
    return temperature * math.log(mass)


def soft_maximum(agent, value, K: int) -> torch.Tensor:
    """Return the gap above Q = 0 of the data, from the agent's proposals in one state,
    minus T log 3K; [R]."""
    state = torch.ones(len(agent.runs), 1, 1)
    batch = {"observations": state, "next_observations": -state}

    def of_run(policy, batch, noise, T):
        samples = agent.sample(policy, batch, noise)
        proposals = samples["proposals"]
        assert proposals.shape == (1, 3 * K, agent.action_dim)
        q = torch.cat([torch.zeros(1, 1), value(proposals)], dim=1)
        gap = cql.conservative_gap(q, samples["log_mu"], T, agent.config)
        return gap - T * math.log(3 * K)

    inputs = agent.weights["policy"], batch, agent.draw(0, 1), agent.sweep["cql_temp"]
    return agent.layout(of_run, *inputs).squeeze(1)


def set_gaussian(policy):
    """Set the mean to 0.4 at s = 1 and -0.4 at s = -1, and the std to 1.1, in every
    action dimension. Narrower policies give the weights a variance that no number of
    samples tames."""
    first, *middle, last = [x for x in policy.net if isinstance(x, torch.nn.Linear)]
    A = last.bias.shape[-1] // 2
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        first.weight[...] = torch.tensor([[1.0], [-1.0]])  # s as relu(s), relu(-s)
        for layer in middle:
            layer.weight[...] = torch.eye(2)
        last.weight[:, :A] = torch.tensor([0.4, -0.4])
        policy.log_std_offset.fill_(math.log(1.1))


@pytest.mark.parametrize("value, action_dim", [(value_1d, 1), (value_2d, 2)])
def test_soft_maximum_approaches_the_integral(value, action_dim):
    """The error falls with the number of proposals at every temperature. Each third of
    the proposals estimates the integral by itself if its densities are its own."""
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
# A tabular problem: three states in a row, three actions (back, stay, on). The action
# `on` in the last state pays 1, and half of the time ends the episode. The action `stay`
# in the first state pays 0.1, for ever: a trap for the short-sighted.
# ======================================================================================

STATES, ACTIONS, DISCOUNT = 3, 3, 0.8
NEXT = torch.tensor([[0, 0, 1], [0, 1, 2], [1, 2, 0]])
REWARD = torch.tensor([[0, 0.1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.float64)
END = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 0.5]], dtype=torch.float64)
# How often the data has each action: mostly the trap and wandering. The best action of
# each state is its rarest.
COUNTS = torch.tensor([[3, 5, 2], [4, 4, 2], [3, 3, 2]])
BETA = COUNTS / COUNTS.sum(1, keepdim=True)


def data_of(counts, R: int) -> dict:
    """All transitions, [R, B]; states and actions are indices."""
    kept = []
    for s in range(STATES):
        for a in range(ACTIONS):
            for i in range(int(counts[s, a])):
                kept.append((s, a, REWARD[s, a], NEXT[s, a], i % 2 * (END[s, a] > 0)))
    s, a, r, following, end = (
        torch.tensor(kept).double().T.unsqueeze(1).expand(-1, R, -1)
    )
    return {
        "observations": s.unsqueeze(2),
        "actions": a.unsqueeze(2),
        "rewards": r,
        "next_observations": following.unsqueeze(2),
        "terminations": end,
    }


class Table(torch.nn.Module):
    """A critic that looks up Q [S, A] by the indices of states [n, 1] and actions
    [n, M, 1]."""

    def __init__(self, config, obs_dim, action_dim):
        super().__init__()
        self.q = torch.nn.Parameter(torch.zeros(STATES, ACTIONS))

    def forward(self, observations, actions, bf16=False):
        return self.q[observations.long(), actions.squeeze(-1).long()]


class TabularCQL(cql.ContinuousCQL):
    """CQL whose 3K = 3 proposals and whose next actions are all three actions, each of
    density 1."""

    def sample(self, policy, batch, noise):
        samples = super().sample(policy, batch, noise)
        n = len(batch["rewards"])
        every = torch.arange(ACTIONS).double().expand(n, ACTIONS)
        for name in ("next_actions", "proposals"):
            samples[name] = every.unsqueeze(-1)
        for name in ("next_log_pi", "log_mu"):
            samples[name] = torch.zeros(n, ACTIONS)
        return samples


def true_values(policy):
    """Return Q of a policy [S, A] in the problem itself, from the linear equations."""
    n = STATES * ACTIONS
    following = torch.nn.functional.one_hot(NEXT, STATES) * (1 - END).unsqueeze(-1)
    transition = (following.unsqueeze(-1) * policy).view(n, n)  # to every state-action
    system = torch.eye(n) - DISCOUNT * transition
    return torch.linalg.solve(system, REWARD.flatten()).view(STATES, ACTIONS)


def optimal_values():
    """Return the optimal Q, by a round of policy iteration for every policy."""
    q = REWARD
    for _ in range(ACTIONS**STATES):
        q = true_values(torch.nn.functional.one_hot(q.argmax(1), ACTIONS).double())
    return q


@pytest.fixture
def fitted(monkeypatch):
    """Return the function `fit`."""
    monkeypatch.setattr(cql, "Critic", Table)
    return fit


def fit(alphas, counts=COUNTS, greedy=False, optimism=0.0, T=1.0, **flags):
    """Return the Q [R, S, A], one run per alpha, that minimizes the loss on the data.
    Targets are of its own policy: the greedy one, or softmax(Q / T)."""
    config = tiny(
        cql_alpha=alphas, cql_temp=T, cql_n_actions=1, n_critics=1, discount=DISCOUNT,
        cql_max_target_backup=True, **flags,
    )  # fmt: skip
    agent = TabularCQL(config, box_task(observation_dim=1, action_dim=1))
    data = data_of(counts, len(alphas))
    noise = agent.draw(0, data["rewards"].shape[1])
    table, target = agent.critic.q, agent.target_critic.q
    table.data.fill_(optimism)
    for _ in range(500):
        target.copy_(table.detach())
        batch = dict(data)
        if not greedy:
            # The target of a terminal transition is its reward.
            q = table.detach().squeeze(1)
            value = ((q / T).softmax(-1) * q).sum(-1)
            following = value.gather(1, data["next_observations"].squeeze(-1).long())
            kept = 1 - data["terminations"]
            batch["rewards"] = data["rewards"] + DISCOUNT * kept * following
            batch["terminations"] = torch.ones_like(kept)
        loss, _ = losses_of(agent, batch, noise)
        (gradient,) = torch.autograd.grad(loss.sum(), table)
        table.data -= 2.0 * gradient
    return table.detach().squeeze(1)


@pytest.mark.parametrize("T", [0.5, 1.0])
def test_the_table_is_the_minimum_in_closed_form(T, fitted):
    """Where the gradient is zero, 2 beta (Q - y) + cql_alpha (pi - beta) = 0, with the
    data's policy beta and pi = softmax(Q / T). So there is no factor 1/2 on the squared
    error, and no factor T on the penalty's gradient. With cql_alpha = 0 the solution is
    the policy's true value."""
    alphas = [0.0, 0.05, 0.2]
    for q, cql_alpha in zip(fitted(alphas, T=T), alphas):
        pi = (q / T).softmax(1)
        backup = REWARD + DISCOUNT * (1 - END) * (pi * q).sum(1)[NEXT]
        expected = backup - cql_alpha / 2 * (pi / BETA - 1)
        torch.testing.assert_close(q, expected, rtol=0, atol=1e-6)
        if cql_alpha == 0.0:
            torch.testing.assert_close(q, true_values(pi), rtol=0, atol=1e-6)


def test_values_lie_below_the_true_values_of_the_policy(fitted):
    """CQL theorem 3.2: in every state the policy's value is underestimated, and so are Q
    averaged over the data's actions, and Q of each action that the policy takes more
    often than the data does. More penalty gives lower values."""
    before = math.inf
    for q in fitted([0.05, 0.1, 0.2, 0.4]):
        pi = q.softmax(1)
        true, favoured = true_values(pi), pi >= BETA
        assert ((pi * q).sum(1) < (pi * true).sum(1)).all()
        assert ((BETA * q).sum(1) < (BETA * true).sum(1)).all()
        assert favoured.any() and (q[favoured] < true[favoured]).all()
        assert ((pi * q).sum(1) < before).all()
        before = (pi * q).sum(1)


def test_greedy_policy_is_optimal_and_its_values_are_lower_bounds(fitted):
    """With greedy targets the best actions are found, although the data prefers others.
    Their values stay below the true ones, which they reach without a penalty."""
    optimal = optimal_values()
    assert optimal.argmax(1).tolist() == [2, 2, 2] and (COUNTS.argmin(1) == 2).all()
    exact, *penalized = fitted([0.0, 0.05, 0.1], greedy=True)
    torch.testing.assert_close(exact, optimal, rtol=0, atol=1e-6)
    for q in penalized:
        assert torch.equal(q.argmax(1), optimal.argmax(1))
        assert (q.amax(1) < optimal.amax(1)).all()


@pytest.mark.parametrize("importance", [True, False], ids=["weighted", "unweighted"])
def test_actions_outside_the_data_are_held_down(importance, fitted):
    """The fault of offline Q-learning and CQL's cure: 'back', which the data never has,
    keeps its optimistic initial value and rules Q-learning's policy. The penalty takes
    its value below those of the data's actions."""
    counts, optimal = COUNTS.clone(), optimal_values()
    counts[:, 0] = 0
    flags = dict(greedy=True, optimism=5.0, cql_importance_sample=importance)
    naive, q = fitted([0.0, 0.1], counts, **flags)
    assert naive.argmax(1).tolist() == [0, 0, 0]
    assert naive[0, 1].item() == pytest.approx(0.1 + DISCOUNT * 5.0)  # learned from it
    assert torch.equal(q.argmax(1), optimal.argmax(1))
    assert (q[:, 0] < q[:, 1:].amin(1)).all()
    assert (q.amax(1) < optimal.amax(1)).all()
