"""Tests of scripts/judge.py: its loss against scalar loops, values where they are known,
and the command."""

import csv
import importlib.util
import itertools
import math
import re
import shutil
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import files_below
from make_data import (
    d4rl_file,
    minari_dataset,
    random_episodes,
    run,
    toy_dataset,
    toy_episodes,
)

import cql

# benchmarks/judge.py has the same name, so the script is loaded by its path.
SCRIPT = Path(cql.__file__).parent / "scripts" / "judge.py"
BENCHMARK = Path(cql.__file__).parent / "benchmarks" / "judge.py"
spec = importlib.util.spec_from_file_location("judge_script", SCRIPT)
judge = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = judge
spec.loader.exec_module(judge)

KINDS = ["continuous", "discrete"]
LOW, HIGH = [-2.0, 0.0], [1.0, 4.0]  # bounds of continuous actions
N_ACTIONS, FIRST_ACTION = 3, -1  # discrete actions are -1, 0 and 1
OBSERVATION_DIM = 3


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few updates of the behavior model, where a test does not ask for more."""
    monkeypatch.setattr(judge, "BEHAVIOR_UPDATES", 60)


def make_task(kind, observation_dim=OBSERVATION_DIM, low=LOW, high=HIGH):
    observations = gym.spaces.Box(-np.inf, np.inf, (observation_dim,))
    actions = gym.spaces.Box(np.float32(low), np.float32(high))
    if kind == "discrete":
        actions = gym.spaces.Discrete(N_ACTIONS, start=FIRST_ACTION)
    return cql.make_task(observations, actions)


def make_data(kind, episodes=None, task=None, **flags):
    """Return judge.Data of episodes of random numbers, or of these: dictionaries."""
    rng = np.random.default_rng(0)
    if episodes is None:
        episodes = random_episodes([6, 9, 4], ends="terminal")
        for each in episodes:
            n = len(each["rewards"])
            each["actions"] = rng.uniform(LOW, HIGH, (n, 2))
            if kind == "discrete":
                each["actions"] = rng.integers(-1, 2, (n, 1))
    known = []
    for i, each in enumerate(episodes):
        arrays = [each[name] for name in ("observations", "actions", "rewards")]
        ends = each["terminations"]
        known.append(cql.Episode(*arrays, ends, f"episode {i}", True, each["rewards"]))
    flags = {"env": "made", "batch_size": 4, "discount": 0.9, **flags}
    task = task or make_task(kind)
    data = judge.Data(cql.TrainConfig(**flags), known, task)
    # The action at an episode's last observation, which `judge` fills otherwise.
    last = np.setdiff1d(np.arange(len(data.recorded)), data.rows.numpy())
    data.recorded[last] = data.actions[: len(last)]
    return data


def random_policies(data, n, seed=0):
    """Return n policies that take random actions, half of them supported, the same ones
    at every call."""
    generator = torch.Generator().manual_seed(seed)
    size = (n, len(data.observations), len(data.task.action_low))
    actions = 2 * torch.rand(size, generator=generator) - 1
    if data.task.discrete:
        actions = torch.randint(N_ACTIONS, size, generator=generator)
    actions = actions.to(torch.get_default_dtype())
    supported = torch.rand(actions.shape[:2], generator=generator) < 0.5
    found = []
    for p in range(n):
        found.append(judge.Policy(actions[p], run=p, supported=supported[p]))
    return found


def small(**changes):
    defaults = dict(updates=30, batch_size=8, hidden_dim=6, lr=1e-2, log_freq=10)
    return judge.Options(**{**defaults, **changes})


# --- the loss -------------------------------------------------------------------------


def mlp(layers, x):
    """Return the outputs of linear layers [(weight, bias)] with ReLU between them."""
    for i, (weight, bias) in enumerate(layers):
        if i:
            x = [v if v.real > 0 else 0.0 for v in x]
        products = []
        for row, b in zip(weight, bias):
            products.append(b + sum(w * v for w, v in zip(row, x)))
        x = products
    return x


class Loops:
    """Loss of one policy's critics, computed by Python loops from the formula."""

    def __init__(self, critics, p, index):
        data = critics.data
        self.data = data
        self.critic = {k: x[p].detach().numpy() for k, x in critics.weights.items()}
        self.target = {k: x[p].numpy() for k, x in critics.target_weights.items()}
        self.policy = critics.policy_actions[p].tolist()
        self.supported = critics.supported[p].tolist()
        self.recorded = data.recorded.tolist()
        self.n_critics = critics.options.n_critics
        self.index = index.tolist()
        raw = data.dataset.observations.double().numpy()
        rows = data.dataset.rows.numpy()
        spread = raw[rows].std(axis=0) + 1e-3
        self.states = ((raw - raw[rows].mean(axis=0)) / spread).tolist()

    def q(self, parameters, j, row, action):
        layers = []
        for name in sorted({name.rpartition(".")[0] for name in parameters}):
            weight = parameters[f"{name}.weight"][j].tolist()
            layers.append((weight, parameters[f"{name}.bias"][j].tolist()))
        if self.data.task.discrete:
            return mlp(layers, self.states[row])[int(action[0])]
        return mlp(layers, self.states[row] + list(action))[0]

    def unit(self, action):
        if self.data.task.discrete:
            return [action[0] - FIRST_ACTION]
        found = []
        for x, low, high in zip(action, LOW, HIGH):
            found.append(2 * (x - low) / (high - low) - 1)
        return found

    def targets(self, j):
        """Return the targets of critic j before they are clipped."""
        columns = {k: x.tolist() for k, x in self.data.dataset.columns.items()}
        found = []
        for i in self.index[j]:
            row = self.data.dataset.rows[i].item() + 1
            value = self.q(self.target, j, row, self.policy[row])
            if not self.supported[row]:
                recorded = self.q(self.target, j, row, self.recorded[row])
                value = min(value, recorded)
            following = 0.0
            if not columns["terminations"][i]:
                following = self.data.config.discount * value
            found.append(columns["rewards"][i] + following)
        return found

    def bounded(self, j):
        rewards = self.data.dataset.columns["rewards"]
        horizon = 1 / (1 - self.data.config.discount)
        low = min(rewards.min().item(), 0) * horizon
        high = max(rewards.max().item(), 0) * horizon
        return [min(max(y, low), high) for y in self.targets(j)]

    def loss(self):
        total = 0.0
        actions = self.data.dataset.columns["actions"].tolist()
        for j in range(self.n_critics):
            for i, y in zip(self.index[j], self.bounded(j)):
                row = self.data.dataset.rows[i].item()
                q = self.q(self.critic, j, row, self.unit(actions[i]))
                total += (q - y) ** 2 / len(self.index[j])
        return total

    def derivative(self, name, direction):
        """Return the loss's derivative along a direction, by a complex step."""
        original = self.critic[name]
        self.critic[name] = original + 1e-30j * direction
        value = complex(self.loss()).imag / 1e-30
        self.critic[name] = original
        return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_critics, discount", [(2, 0.9), (3, 0.2), (1, 0.5)])
def test_loss_and_gradients_match_scalar_loops(kind, n_critics, discount, double):
    data = make_data(kind, discount=discount)
    policies = random_policies(data, 3)
    critics = judge.Critics(policies, data, small(n_critics=n_critics))
    generator = torch.Generator().manual_seed(1)
    tensors = [*critics.weights.values(), *critics.target_weights.values()]
    with torch.no_grad():
        for tensor in tensors:
            tensor += 1.5 * torch.randn(tensor.shape, generator=generator)
    batch = critics.batch(4)
    index = (
        (data.rewards == batch["rewards"][0].unsqueeze(-1)).int().argmax(-1)
    )  # [N, B]
    assert n_critics == 1 or not torch.equal(index[0], index[1])  # own batches
    inputs = critics.weights, critics.target_weights, batch
    losses, clipped = torch.func.vmap(critics.losses)(*inputs)
    losses.sum().backward()
    rng = np.random.default_rng(0)
    seen = []
    for p in range(3):
        loops = Loops(critics, p, index)
        assert losses[p].item() == pytest.approx(loops.loss().real, rel=1e-9)
        outside = []
        for j in range(n_critics):
            outside += [x != y for x, y in zip(loops.targets(j), loops.bounded(j))]
        assert clipped[p].item() == pytest.approx(np.mean(outside))
        seen += outside
        for name, parameter in critics.weights.items():
            direction = rng.standard_normal(parameter[p].shape)
            actual = (parameter.grad[p].numpy() * direction).sum()
            expected = loops.derivative(name, direction)
            assert actual == pytest.approx(expected, rel=1e-8, abs=1e-9), name
    assert any(seen) or discount > 0.5  # some targets are clipped


@pytest.mark.parametrize(
    "rewards, discount, low, high",
    [
        ([-3, -1], 0.9, -30, 0),  # an episode may end at once
        ([1, 2], 0.9, 0, 20),
        ([-1, 2], 0.5, -2, 4),
        ([-1, 2], 0, -1, 2),
        ([-1, 2], 1, -math.inf, math.inf),
        ([-1e37, 1e37], 0.99, -3.4028234663852886e38, 3.4028234663852886e38),
    ],
)
def test_bounds_of_a_return(rewards, discount, low, high):
    episodes = random_episodes([4], ends="terminal")
    episodes[0]["rewards"] = np.array([*rewards, *rewards], float)
    episodes[0]["actions"] = np.full((4, 2), 0.5)
    data = make_data("continuous", episodes, discount=discount)
    assert data.bounds == pytest.approx([low, high])


@pytest.mark.parametrize("kind", KINDS)
def test_one_update_moves_critics_and_then_targets(kind, double):
    """Adam's first step is lr in each direction; targets follow by the rate."""
    data = make_data(kind)
    options = small(lr=0.25, soft_target_update_rate=0.125)
    critics = judge.Critics(random_policies(data, 2), data, options)
    before = {name: x.detach().clone() for name, x in critics.weights.items()}
    for name, target in critics.target_weights.items():
        assert torch.equal(target, before[name])
    critics.update(0)
    for name, now in critics.weights.items():
        step = now.detach() - before[name]
        gradient = now.grad
        expected = -0.25 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(step, expected)
        moved = critics.target_weights[name] - before[name]
        torch.testing.assert_close(moved, 0.125 * step)


# --- values that are known ------------------------------------------------------------

# Four states in a row, which are left one by one; the episode ends behind the last. An
# action u in [-1, 1] leaves the state with probability 0.5 + 0.3 u and pays
# 1 + s / 2 - u^2.
N_STATES, DISCOUNT = 4, 0.9


def chain_value(actions, costs=(0.0,) * N_STATES):
    """Return the true value of each state under a policy's action in each state; each
    step costs what its state costs."""
    values = []
    following = 0.0
    for s in reversed(range(N_STATES)):
        leaves = 0.5 + 0.3 * actions[s]
        reward = 1 + s / 2 - actions[s] ** 2 - costs[s]
        total = reward + DISCOUNT * leaves * following
        following = total / (1 - DISCOUNT * (1 - leaves))
        values.insert(0, following)
    return np.array(values)


def chain_episodes(actions, explored, n_episodes, bonus=0.0):
    """Return episodes of a policy in which half of the actions are replaced by random
    ones of `explored`, if there are any; also their first states. Each step pays
    `bonus` more."""
    rng = np.random.default_rng(0)
    states = np.eye(N_STATES, dtype=np.float32)
    episodes = []
    starts = rng.integers(N_STATES, size=n_episodes)
    for s in starts:
        visited, taken, rewards = [s], [], []
        while s < N_STATES:
            u = actions[s]
            if len(explored) and rng.random() < 0.5:
                u = rng.choice(explored)
            rewards.append(1 + s / 2 - u**2 + bonus)
            taken.append([u])
            s += int(rng.random() < 0.5 + 0.3 * u)
            visited.append(min(s, N_STATES - 1))
        last = np.arange(len(rewards)) == len(rewards) - 1
        episodes.append(
            {
                "observations": states[visited],
                "actions": np.array(taken),
                "rewards": np.array(rewards),
                "terminations": last,
            }
        )
    return episodes, starts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [False, True], ids=["its_own_data", "mixed_data"])
def test_value_of_policies_in_a_chain(kind, others):
    """Value of a policy from data that it recorded itself, or in which half of the
    actions are random. From mixed data a second policy is judged too."""
    if kind == "discrete":
        task = make_task(kind, N_STATES)
        by_state = [[0, 0, 0, 1], [1, 1, 1, 0]]
        explored = [-1, 0, 1]
    else:
        task = make_task(kind, N_STATES, low=[-1.0], high=[1.0])
        by_state = [[0.1, 0.2, 0.0, 0.1], [-0.7, 0.2, 0.4, 0.8]]
        explored = np.linspace(-1, 1, 9)
    explored = explored if others else []
    episodes, starts = chain_episodes(by_state[0], explored, 1500)
    data = make_data(kind, episodes, task, discount=DISCOUNT)
    policies = []
    for actions in by_state[: 1 + others]:
        unit = np.array(actions, np.float32) - (
            FIRST_ACTION if kind == "discrete" else 0
        )
        visited = data.dataset.observations.argmax(1)
        policies.append(judge.Policy(torch.tensor(unit)[visited].unsqueeze(1)))
    options = judge.Options(
        updates=1500 if others else 750,
        batch_size=512 if others else 256,
        hidden_dim=32,
        n_critics=4 if others else 2,
        lr=2e-3,
        log_freq=250,
    )
    table = judge.judge(policies, data, options)
    returns = []
    for each in episodes:
        steps = np.arange(len(each["rewards"]))
        returns.append((each["rewards"] * DISCOUNT**steps).sum())
    assert data.value == pytest.approx(np.mean(returns), rel=1e-6)
    error = np.std(returns, ddof=1) / math.sqrt(len(returns))
    assert data.value_error == pytest.approx(error, rel=1e-6)
    for actions, row in zip(by_state, table[-len(policies) :]):
        truth = chain_value(actions)[starts].mean()
        tolerance = max(0.02 * truth, 3 * error)
        assert abs(row["value"] - truth) < tolerance
        assert row["clipped"] < 0.01
        if actions == by_state[0]:
            assert (abs(data.value - truth) < tolerance) != others
    if others:
        assert judge.last_rows(table)[0]["policy"] == int(
            chain_value(by_state[1])[starts].mean()
            > chain_value(by_state[0])[starts].mean()
        )


def chain_policy(data, actions, kind):
    """Return the policy with this action in each state."""
    first = FIRST_ACTION if kind == "discrete" else 0
    unit = torch.tensor(np.array(actions, np.float32) - first)
    return judge.Policy(unit[data.dataset.observations.argmax(1)].unsqueeze(1))


CHAIN = dict(updates=1000, hidden_dim=32, n_critics=2, lr=2e-3, log_freq=250)


@pytest.mark.parametrize("kind", KINDS)
def test_no_credit_for_actions_that_are_not_in_the_data(kind, monkeypatch):
    """The critics know nothing of an action that nobody took, and may think anything of
    it. A policy that takes it is worth at most what the recorded actions are. Rewards of
    discrete actions are negative, so that an output that nothing trains looks good."""
    monkeypatch.setattr(judge, "BEHAVIOR_UPDATES", 500)
    actions, explored, tried, bonus = [0, 0, 0, 0], [0, 1], -1, -4.0
    if kind == "continuous":
        actions, explored, tried, bonus = [0.1] * 4, [0.0, 0.1, 0.2], -0.9, 0.0
    task = make_task(kind, N_STATES, low=[-1.0], high=[1.0])
    episodes, starts = chain_episodes(actions, explored, 1000, bonus)
    data = make_data(kind, episodes, task, discount=DISCOUNT)
    policies = [chain_policy(data, actions, kind)]
    for s in range(N_STATES):
        wrong = list(actions)
        wrong[s] = tried
        policies.append(chain_policy(data, wrong, kind))
    everywhere = torch.ones(len(data.recorded), dtype=torch.bool)
    plain = [judge.replace(each, supported=everywhere) for each in policies]
    together = [*policies, *plain[1:]]
    rows = judge.judge(together, data, judge.Options(**CHAIN))[-len(together) :]
    own = rows[0]
    assert own["unsupported"] < 0.05
    truth = chain_value(actions, [-bonus] * N_STATES)[starts].mean()
    error = 3 * data.value_error  # of the recorded transitions
    assert own["value"] == pytest.approx(truth, rel=0.02, abs=error)
    recorded = own["recorded_value"]
    assert recorded == pytest.approx(data.value, rel=0.02, abs=error)
    limit = max(recorded, own["value"])
    limit += 0.02 * abs(limit)
    states = data.dataset.observations[data.rows].argmax(1)
    for s in range(N_STATES):
        row = rows[1 + s]
        share = (states == s).double().mean().item()
        assert row["unsupported"] == pytest.approx(share, abs=0.05)
        assert row["value"] < limit
    # Fitted Q evaluation alone thinks more of some of them.
    assert max(row["value"] for row in rows[1 + N_STATES :]) > limit + 0.1


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("judge_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_how_ways_are_compared(benchmark):
    values = [4.0, 3.0, 2.0, 9.0]
    table = {name: values for name in ("supported", "plain", "conservative", "least")}
    table |= {"one step": [1.0, 2.0, 3.0, 4.0], "final Q": values, "gap": values}
    table |= {"unsupported": [0.0, 0.1, 0.2, 0.6], "ran_away": [0, 0, 0, 1]}
    table |= {"falls": [1, 1, 1, 1], "recommended": [0, 1, 0, 0]}
    table |= {"seed": [0, 1, 2, 3], "cql_alpha": [5.0, 1.0, 1.0, 0.0]}
    returns = np.array([[10.0, 10.0], [6.0, 6.0], [5.0, 7.0], [0.0, 0.0]])
    table = pd.DataFrame(table)
    before = table.copy()
    ways = benchmark.compare(table, returns).set_index("chosen by")
    pd.testing.assert_frame_equal(table, before)
    assert ways["regret"]["highest"] == 0 and ways["cql_alpha"]["highest"] == 5
    # It recommends one within the errors whose value is not the highest.
    assert ways["regret"]["supported"] == 0.4 and ways["seed"]["supported"] == 1
    assert ways["rank"]["supported"] == ways["rank"]["highest"]
    # Ranks 4 3 2 1 beside 4 2.5 2.5 1: the marked policy comes last.
    assert ways["rank"]["supported"] == pytest.approx(math.sqrt(0.9))
    assert ways["regret"]["plain"] == 1 and ways["seed"]["plain"] == 3
    assert ways["regret"]["not diverged"] == 0
    assert ways["seed"]["support first"] == 0  # the others leave the data more often
    assert ways["regret"]["smallest gap"] == pytest.approx(0.4)
    assert math.isnan(ways["regret"]["workflow"])  # each run falls, so it has no choice
    assert ways["regret"]["chance"] == pytest.approx((10 - 5.5) / 10)


def test_what_a_measurement_notes_of_the_recommendation(benchmark, monkeypatch):
    """It notes what would be recommended even if the script recommends none."""
    known = pd.DataFrame({"run": [0, 1, 2, 3]})
    rows = []
    for p, value in enumerate([8.0, 1.0, 9.0, 99.0]):
        row = {"policy": p, "value": value, "update": 10, "ran_away": int(p == 3)}
        row |= {"unsupported": 0.1 * p, "settled": int(p != 2), "moved": 0.0}
        rows.append({**row, "behind": 9 - value, "behind_error": 0.5})
        rows[-1]["value_error_critics"] = 1.0
    monkeypatch.setattr(benchmark.script, "judge", lambda *_: rows)
    values = benchmark.recommended([], make_data("discrete"), judge.Options(), known)
    assert values == [8.0, 1.0, 9.0, 99.0]
    assert list(known["recommended"]) == [1, 0, 0, 0]
    assert list(known["outside"]) == [0, 1, 0, 0]
    assert list(known["settled"]) == [1, 1, 0, 1]
    assert "has not settled" in known["abstains"][0]


def test_the_printed_table(benchmark, tmp_path, capsys):
    names = ["policies", "ways"]
    policies = {"true": [5.0, 4.0, 6.0, 1.0, 0.0], "recommended": [0, 0, 0, 1, 0]}
    policies |= {"supported": [9.0, 2.0, 1.0, 8.0, 99.0], "outside": [0, 1, 1, 0, 0]}
    policies |= {"unsupported": [0.1] * 5, "ran_away": [0, 0, 0, 0, 1]}
    policies = pd.DataFrame(policies)
    # Both are compared with the first policy; the fifth one is marked.
    assert benchmark.claims(policies) == "2, 1"
    directories = []
    for name, regrets in ("a", [0.1, 0.4]), ("b", [0.3, math.nan]):
        directories.append(tmp_path / name)
        directories[-1].mkdir()
        ways = pd.DataFrame({"chosen by": ["one", "two"], "regret": regrets})
        ways["rank"] = [0.5, math.nan]
        for what, table in zip(names, (policies, ways)):
            table.to_csv(directories[-1] / f"{what}.csv", index=False)
    benchmark.show_table(directories)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| chosen by | a | b | mean rank, most regret |"
    assert lines[2] == "| one | 0.50, 0.100 | 0.50, 0.300 | 0.50, 0.300 |"
    assert lines[3] == "| two | -, 0.400 | -, - | -, 0.400 |"
    assert lines[4].startswith("| outside the errors, worse | 2, 1 | 2, 1 |")


def test_the_least_of_the_critics(benchmark):
    data = make_data("continuous")
    policies = random_policies(data, 2)
    critics = judge.Critics(policies, data, small(), benchmark.Least)
    batch = critics.batch(0)
    assert torch.equal(batch["rewards"][:, 0], batch["rewards"][:, 1])  # the same batch
    of_first = {name: x[0] for name, x in batch.items()}
    of_first["next_supported"] = torch.ones_like(of_first["next_supported"])
    next_q = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    target = critics.estimator.target(next_q, next_q - 100, of_first)
    following = 0.9 * (1 - of_first["terminations"]) * next_q.amin(0)
    torch.testing.assert_close(target, of_first["rewards"] + following)
    least = critics.estimator.value(next_q, next_q, of_first["next_supported"][0])
    assert torch.equal(least.mean(0), next_q.amin(0))
    lower = benchmark.fitted(policies, data, small(), benchmark.Least)
    plain = benchmark.fitted(policies, data, small(), judge.SupportedQ)
    assert all(a < b for a, b in zip(lower, plain))


def test_conservative_evaluation_of_a_chain(benchmark):
    """benchmarks/judge.py's, against its closed form in a table of Q: each step costs
    w / 2 * (1 / beta(pi(s) | s) - 1), so the value is a lower bound."""
    task = make_task("discrete", N_STATES)
    by_state = [[0, 0, 0, 1], [1, 1, 1, 0]]
    episodes, starts = chain_episodes(by_state[0], [-1, 0, 1], 3000)
    data = make_data("discrete", episodes, task, discount=DISCOUNT)
    policies = [chain_policy(data, actions, "discrete") for actions in by_state]
    options = judge.Options(**{**CHAIN, "updates": 2000, "batch_size": 512})
    found = benchmark.fitted(policies, data, options, benchmark.Conservative)
    togo = []
    for each in episodes:
        for t in range(len(each["rewards"])):
            togo.append(discounted(each["rewards"][t:], DISCOUNT))
    weight = (1 - DISCOUNT) * np.std(togo)
    assert benchmark.Conservative(data).weight == pytest.approx(weight, rel=1e-5)
    for actions, value in zip(by_state, found):
        costs = []
        for s in range(N_STATES):
            likely = 1 / 6 + (0.5 if actions[s] == by_state[0][s] else 0)
            costs.append(weight / 2 * (1 / likely - 1))
        bound = chain_value(actions, costs)[starts].mean()
        assert value == pytest.approx(bound, rel=0.03)
        assert value < chain_value(actions)[starts].mean()


# --- support --------------------------------------------------------------------------


def behavior_data(kind, n=4000):
    """Return data whose actions are normal with mean x / 4 and deviation 0.2, x being
    the first observation; uniform in [-1, 1]; or 0 and 1, a tenth of them 1."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (n + 1, 1)).astype(np.float32)
    actions = x[:n] / 4 + 0.2 * rng.standard_normal((n, 1))
    if kind == "uniform":
        actions = rng.uniform(-1, 1, (n, 1))
    if kind == "discrete":
        actions = (rng.random((n, 1)) < 0.1).astype(int)
    episode = {"observations": x, "actions": actions, "rewards": np.ones(n)}
    episode["terminations"] = np.zeros(n, bool)
    task = make_task(kind, 1, low=[-1.0], high=[1.0])
    return make_data(kind, [episode], task)


def supported_share(behavior, actions):
    return (behavior.unusual(actions) <= behavior.limit).double().mean().item()


@pytest.fixture
def enough(monkeypatch):
    monkeypatch.setattr(judge, "BEHAVIOR_UPDATES", 1000)


def test_how_unusual_a_normal_action_is(enough):
    data = behavior_data("continuous")
    behavior = judge.Behavior(data, judge.Options(hidden_dim=16))
    mean = data.dataset.observations / 4
    assert behavior.limit.item() == pytest.approx(1.92, rel=0.2)  # half of chi squared
    assert (behavior.likeliest() - mean).abs().mean() < 0.1
    for distance in (1, 2):  # in standard deviations
        found = behavior.unusual(mean + 0.2 * distance).median().item()
        assert found == pytest.approx(distance**2 / 2, abs=0.3)
    assert supported_share(behavior, mean) > 0.99
    assert supported_share(behavior, mean + 0.6) < 0.05


def test_all_actions_are_usual_where_all_were_recorded(enough):
    """Also those at the ends of the range, where policies like to be."""
    data = behavior_data("uniform")
    behavior = judge.Behavior(data, judge.Options(hidden_dim=16))
    assert behavior.limit.item() == pytest.approx(math.log(1 / 0.3))
    for action in (-1, -0.5, 0, 1):
        assert supported_share(behavior, torch.full_like(data.recorded, action)) > 0.9


def test_how_unusual_a_discrete_action_is(enough):
    """Action 1 of 0, 1 and 2, counted from 0, is nine times as likely as action 2."""
    data = behavior_data("discrete")
    behavior = judge.Behavior(data, judge.Options(hidden_dim=16))
    assert (behavior.likeliest() == 1).all()
    for action, expected in ((1, 0.0), (2, math.log(9))):
        found = behavior.unusual(torch.full_like(data.recorded, action))
        assert found.median().item() == pytest.approx(expected, abs=0.2)
    never = torch.zeros_like(data.recorded)
    assert supported_share(behavior, never) == 0
    # A tenth of the recorded actions are 2; the half of these that the model finds more
    # unusual are the 5 % left out.
    share = supported_share(behavior, torch.full_like(data.recorded, 2))
    assert share == pytest.approx(0.5, abs=0.1)


def test_no_network_judges_an_action_it_learned_from(monkeypatch):
    monkeypatch.setattr(judge, "LOOK", 1000)
    monkeypatch.setattr(judge, "OUTSIDE", 0.0)
    data = behavior_data("continuous", n=600)
    behavior = judge.Behavior(data, small())
    tried = torch.zeros_like(data.recorded)
    before = behavior.unusual(tried)
    for half in range(2):
        other = behavior_data("continuous", n=600)
        rows = other.rows[behavior.half[other.rows] == half]
        other.recorded[rows] *= 0.5
        again = judge.Behavior(other, small())
        changed = again.unusual(tried) != before
        assert not changed[behavior.half == half].any()
        assert changed[behavior.half != half].double().mean() > 0.9


def test_unusual_sums_over_dimensions():
    """Each dimension has parts of its own, between quantiles of its own."""
    data = make_data("continuous")
    data.recorded[:2] = torch.tensor([[30.0, -30.0], [-0.2, 0.3]])
    behavior = judge.Behavior(data, small())
    ends = np.quantile(data.actions.numpy(), [0.005, 0.995], axis=0)
    found = behavior.unusual(data.recorded)
    seen = 0
    for rows, ratios in behavior.log_ratios():
        assert ratios.shape == (len(rows), 2, judge.BINS)
        assert (ratios.amin(-1) == 0).all()
        for i, row in enumerate(rows.tolist()):
            total = 0.0
            for d in range(2):
                low, high = ends[:, d]
                place = (data.recorded[row, d].item() - low) / (high - low)
                place *= judge.BINS - 2
                k = min(max(math.floor(place), 0), judge.BINS - 3) + 1
                if place < -1 or place > judge.BINS - 1:
                    k = 0 if place < 0 else judge.BINS - 1
                total += ratios[i, d, k].item()
            assert found[row].item() == pytest.approx(total, rel=1e-4)
            seen += 1
    assert seen == len(data.recorded)


def test_a_far_action_does_not_widen_the_parts(enough):
    data = behavior_data("continuous")
    before = judge.Behavior(data, judge.Options(hidden_dim=16)).ends
    data.actions[:5] = 100.0
    data.recorded[data.rows] = data.actions
    behavior = judge.Behavior(data, judge.Options(hidden_dim=16))
    torch.testing.assert_close(behavior.ends, before, atol=0.05, rtol=0)
    assert supported_share(behavior, torch.full_like(data.recorded, 50.0)) < 0.01


def test_an_action_that_never_changes(enough):
    """A network cannot output it exactly; nearly the same is supported, another not."""
    data = behavior_data("continuous")
    data.actions[:] = 0.25
    data.recorded[:] = 0.25
    behavior = judge.Behavior(data, judge.Options(hidden_dim=16))
    for action, share in (0.245, 1), (0.255, 1), (0.3, 0), (0.2, 0), (-1.0, 0), (1.0, 0):
        assert supported_share(behavior, torch.full_like(data.recorded, action)) == share


def test_small_data_are_not_learned_by_heart(enough):
    """From 200 steps, actions ten deviations away are still unsupported."""
    data = behavior_data("continuous", n=200)
    behavior = judge.Behavior(data, judge.Options())
    mean = data.dataset.observations / 4
    assert supported_share(behavior, mean) > 0.9
    assert supported_share(behavior, mean.sign() * 0.99) < 0.2


@pytest.mark.parametrize("length", [3, 4, 250])
def test_halves_hold_every_step_of_an_episode(length):
    """A network that knew only even steps could not judge odd ones. Blocks of 100 steps
    of one episode are in one half; a single short episode is divided into steps."""
    rewards = np.ones(length)
    episodes = []
    for _ in range(2000 // length):
        x = np.zeros((length + 1, 1))
        ends = np.zeros(length, bool)
        each = {"observations": x, "actions": np.zeros((length, 1)), "rewards": rewards}
        episodes.append({**each, "terminations": ends})
    task = make_task("continuous", 1, low=[-1.0], high=[1.0])
    data = make_data("continuous", episodes, task)
    half = judge.Behavior(data, small()).half.reshape(len(episodes), length + 1)
    for first in range(0, length, 100):
        block = half[:, first : min(first + 100, length)]
        assert (block == block[:, :1]).all()
        assert 0 < block[:, 0].double().mean() < 1
    if length == 4:
        alone = make_data("continuous", episodes[:1], task)
        assert set(judge.Behavior(alone, small()).half.tolist()) == {0, 1}


def test_the_seed_of_the_support():
    data = behavior_data("continuous", n=40)
    torch.rand(2)  # the global generator does not matter
    first = judge.Behavior(data, small())
    torch.rand(2)
    tried = torch.zeros_like(data.recorded)
    again = judge.Behavior(data, small()).unusual(tried)
    other = judge.Behavior(data, small(seed=1)).unusual(tried)
    assert torch.equal(first.unusual(tried), again)
    assert not torch.isclose(first.unusual(tried), other).any()
    wide = judge.Behavior(data, small(support=0.99))
    narrow = judge.Behavior(data, small(support=0.01))
    assert wide.limit > first.limit >= narrow.limit > 0


# --- the recommendation ---------------------------------------------------------------


def advise(values, **changes):
    """Return the recommended policy and the reason, for policies of these values whose
    differences have the error 0.5."""
    rows = []
    for p, value in enumerate(values):
        row = {"policy": p, "update": 10, "value": value, "settled": 1, "ran_away": 0}
        row |= {"unsupported": 0.1, "recorded_value": 5.0, "value_error_critics": 0.5}
        row |= {"checkpoint": "a.pt", "run": p, "seed": 10 + p}
        rows.append(row)
    for name, of in changes.items():
        for row in rows:
            row[name] = of.get(row["policy"], row[name])
    best = judge.best_of(rows)["value"]
    for row in rows:
        row |= {"behind": best - row["value"], "behind_error": 0.5, "moved": 0.0}
    row, reason = judge.recommend(rows, enough=25_000)
    return (None if row is None else row["policy"]), reason


def test_what_is_recommended():
    chosen, reason = advise([3.0, 9.0, 8.0, 1.0])  # all support each policy as much
    assert chosen == 1 and "mark that are outside the errors: 2 of 3" in reason
    words = "the highest value; none of the settled ones within its errors has fewer uns"
    assert reason.startswith(words) and "(10.0%)" in reason
    assert "worth more" not in reason
    chosen, reason = advise([3.0, 4.9, -9.0])
    assert chosen == 1 and reason.endswith("recorded actions are worth more: 5")
    chosen, reason = advise([3.0, 9.0, 0.0], ran_away={1: 1})
    assert chosen == 0 and reason.startswith("the highest value without a mark; 10.0%")
    assert "outside the errors: 1 of 1" in reason
    assert advise([3.0, 9.0, 0.0], unsupported={1: 0.51})[0] == 0
    assert advise([9.0, 1.0, 0.0], ran_away={1: 1})[1].startswith("the highest value; ")
    assert advise([3.0, math.nan, 0.0])[0] == 0
    chosen, reason = advise([6.0])  # a single policy
    assert chosen == 0 and "10.0% of its actions are unsupported; the rec" in reason
    assert reason.endswith("the recorded actions are worth 5")
    chosen, reason = advise([math.nan, math.nan])
    assert chosen is None and "no value is finite" in reason


def test_the_fewest_unsupported_actions_within_the_errors_are_recommended():
    shares = {0: 0.02, 1: 0.03, 2: 0.01, 3: 0.04}
    chosen, reason = advise([7.0, 9.0, 6.9, 8.0], unsupported=shares)
    assert chosen == 0  # 2 is outside, 3 leaves the data more often
    words = (
        "of the highest value and the settled ones within its errors, this one has the"
    )
    assert reason.startswith(words)
    words = (
        "unsupported actions (2.0%); its value is 2 lower; others without a mark that"
    )
    assert words in reason and reason.endswith("the recorded actions are worth 5")
    values = [7.0, 9.0, 1.0, 8.0, 99.0]
    chosen, reason = advise(values, unsupported=shares, ran_away={4: 1})
    assert chosen == 0 and reason.startswith("of the highest value without a mark and")
    chosen, reason = advise([7.0, 9.0, 1.0], unsupported=shares, recorded_value={0: 7.5})
    assert chosen == 0 and reason.endswith("worth more: 7.5")  # than its own value
    assert advise([7.0, 9.0, 1.0], unsupported={0: 0.03, 1: 0.02})[0] == 1
    # Equally supported to 0.1 %: the higher value
    assert advise([7.0, 9.0, 8.0, 1.0], unsupported={0: 0.0102, 2: 0.0104})[0] == 2
    assert advise([7.0, 9.0, 8.0, 1.0], unsupported={0: 0.0094, 2: 0.0106})[0] == 0
    # One that has not settled is passed over.
    chosen, reason = advise([7.0, 9.0, 1.0, 8.5], unsupported=shares, settled={0: 0})
    assert chosen == 1
    chosen, reason = advise([7.0, 9.0], unsupported=shares)
    assert chosen is None
    words = "; if one has to be chosen: a.pt run 0  seed 10 has the fewest unsupported"
    assert reason.endswith(f"{words} actions (2.0%)")


def test_the_candidate_does_not_depend_on_the_order_of_rows():
    rows = []
    for p, (value, share) in enumerate([(7.0, 0.01), (9.0, 0.02), (8.0, 0.01)]):
        row = {"policy": p, "value": value, "unsupported": share, "ran_away": 0}
        rows.append({**row, "behind": 9 - value, "behind_error": 1.0, "moved": 0.0})
    for order in itertools.permutations(rows):
        for settled, expected in (1, 2), (0, 2):  # none has settled: as if all had
            found = judge.candidate_of([{**row, "settled": settled} for row in order])
            assert found["policy"] == expected
    marked = [{**row, "ran_away": 1, "settled": 1} for row in rows]
    assert judge.candidate_of(marked)["policy"] == 1  # for benchmarks/judge.py


def test_a_noisy_value_is_not_within_the_errors_below_one_that_is_outside():
    rows = []
    for p, (value, error) in enumerate([(5.0, 2.0), (9.0, 0.0), (8.0, 0.1), (8.5, 0.5)]):
        row = {"policy": p, "value": value, "unsupported": 0.1, "ran_away": 0}
        rows.append({**row, "behind": 9 - value, "behind_error": error, "moved": 0.0})
    assert [judge.is_behind(row) for row in rows] == [False, False, True, False]
    assert [row["policy"] for row in judge.within_errors(rows)] == [1, 3]
    assert judge.within_errors([{**row, "ran_away": 1} for row in rows]) == []


def test_when_nothing_is_recommended():
    for values in [8.0, 9.0], [9.0]:
        chosen, reason = advise(values, settled={len(values) - 1: 0})
        assert chosen is None and "not settled; pass --updates 25000 or" in reason
    assert advise([3.0, 9.0], settled={0: 0})[0] == 1
    chosen, reason = advise([3.0, 9.0], settled={1: 0})  # however far behind others are
    assert chosen is None and "not settled" in reason
    chosen, reason = advise([3.0, 9.0], unsupported={0: 0.6, 1: 0.6})
    assert chosen is None and "more than 50% of the states" in reason
    chosen, reason = advise([3.0, 9.0], ran_away={0: 1, 1: 1})
    assert chosen is None and "diverged" in reason
    for more in ({}, {"ran_away": {3: 1}}, {"unsupported": {3: 0.6}}):
        chosen, reason = advise([8.0, 9.0, 8.5] + [20.0] * bool(more), **more)
        assert chosen is None
        assert "all policies without a mark (3) are within the errors" in reason
    assert advise([8.0, 9.0, 1.0], ran_away={0: 1, 2: 1})[0] == 1  # the only one left
    unknown = {0: math.nan, 1: math.nan}
    chosen, reason = advise([0.0, 100.0], value_error_critics=unknown)
    assert chosen is None and "pass --n_critics 4" in reason


def test_errors_of_a_difference():
    values = np.array([[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]])  # [critics, episodes]
    over_episodes = 2 / math.sqrt(3)  # deviation 2 of the episodes' means
    over_critics = math.sqrt(0.5) / math.sqrt(2)
    expected = math.hypot(over_episodes, over_critics)
    assert judge.error_of(values) == pytest.approx(expected)
    assert judge.error_of(values[:, :1]) == pytest.approx(over_critics)
    assert math.isnan(judge.error_of(values[:1]))  # a single critic tells nothing


@pytest.mark.parametrize(
    "behind, error, moved, expected",
    [
        (3.0, 0.74, 0.0, True),
        (3.0, 0.75, 0.0, False),
        (3.0, 0.0, 2.99, True),
        (3.0, 0.0, -3.0, False),
        (3.0, 0.5, 1.0, False),  # together
        (3.0, math.nan, 0.0, False),
        (3.0, 0.0, math.nan, False),
    ],
)
def test_what_is_behind_by_more_than_the_errors(behind, error, moved, expected):
    row = {"behind": behind, "behind_error": error, "moved": moved}
    assert judge.is_behind(row) is expected


def test_the_order_of_a_ranking():
    rows = []
    for p, value in enumerate([3.0, 9.0, 8.0, math.nan, 7.0]):
        row = {"policy": p, "value": value, "ran_away": int(p == 1)}
        rows.append({**row, "unsupported": 0.51 if p == 4 else 0.5})
    assert [row["policy"] for row in judge.ranked(rows)] == [2, 0, 1, 4, 3]


def test_how_much_a_difference_moved():
    data = make_data("continuous", discount=0.5)  # 12 updates are enough
    policies = random_policies(data, 3)
    options = small(updates=40, log_freq=5, soft_target_update_rate=0.5)
    table = judge.judge(policies, data, options)
    early = [row["moved"] for row in table if row["update"] < 12]
    assert len(early) == 2 * 3 and all(map(math.isnan, early))
    then = [row["value"] for row in table if row["update"] == 30]
    last = table[-3:]
    best = judge.best_of(last)["policy"]
    for p, row in enumerate(last):
        moved = row["behind"] - (then[best] - then[p])
        assert row["moved"] == pytest.approx(moved, abs=1e-12)
        assert (moved == 0) == (p == best)
        assert row["recommended"] == int(row is judge.recommend(table, 12)[0])
    seldom = judge.judge(policies, data, small(updates=41, log_freq=40))
    assert [row["update"] for row in seldom[::3]] == [10, 20, 30, 40, 41]


def test_others_are_compared_with_the_best_that_may_be_recommended():
    data = make_data("continuous")
    policies = random_policies(data, 3)
    free = judge.judge(policies, data, small(updates=10))[-3:]
    highest = max(free, key=lambda row: row["value"])["policy"]
    policies[highest].ran_away = True
    rows = judge.judge(policies, data, small(updates=10))[-3:]
    best = max(row["value"] for row in rows if not row["ran_away"])
    for row, other in zip(rows, free):
        assert row["value"] == other["value"]
        assert row["behind"] == pytest.approx(best - row["value"])
    assert rows[highest]["behind"] < 0


def test_equally_good_policies_are_seldom_told_apart():
    """Values differ by the critics' independent errors alone, as the docstring says."""
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(500):
        values = rng.normal(size=(12, 4, 1))
        rows = []
        for p, each in enumerate(values):
            row = {"policy": p, "value": each.mean(), "ran_away": 0, "moved": 0.0}
            rows.append({**row, "unsupported": 0.0})
        judge.compare_with_best(rows, list(values))
        told += any(map(judge.is_behind, rows))
    assert 0.03 < told / 500 < 0.11


def test_an_error_is_at_least_the_median_of_the_others():
    differences = np.array([0.0, 1.0, 2.0, 3.0])
    spread = np.array([[0.0], [1.0], [10.0], [100.0]])  # [policies, 1]
    values = -differences[:, None] + spread * np.array([-1.0, 1.0])  # two critics each
    rows = []
    for p, each in enumerate(values):
        row = {"policy": p, "value": each.mean(), "ran_away": 0, "unsupported": 0.0}
        rows.append(row)
    judge.compare_with_best(rows, list(values[:, :, None]))
    assert [row["behind"] for row in rows] == pytest.approx(differences)
    assert [row["behind_error"] for row in rows] == pytest.approx([0, 10, 10, 100])
    # A value that is not finite leaves the median as it is.
    values = np.concatenate([values, np.full((1, 2), math.nan)])
    rows.append({**rows[0], "policy": 4, "value": math.nan})
    judge.compare_with_best(rows, list(values[:, :, None]))
    errors = [row["behind_error"] for row in rows]
    assert errors[:4] == pytest.approx([0, 10, 10, 100]) and math.isnan(errors[4])


# --- one seed for all policies --------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_values_do_not_depend_on_the_other_policies(kind, double):
    data = make_data(kind)
    policies = random_policies(data, 4)
    together = judge.judge(policies, data, small())
    backward = judge.judge(policies[::-1], data, small())
    assert len(together) == 3 * 4
    for row in together:
        alone = judge.judge([policies[row["run"]]], data, small())
        same = [each for each in backward if each["run"] == row["run"]]
        for rows in (alone, same):
            other = next(each for each in rows if each["update"] == row["update"])
            for name in ("value", "value_error", "value_error_critics", "loss"):
                assert row[name] == pytest.approx(other[name], rel=1e-9), name
            assert row["clipped"] == other["clipped"]
            assert row["settled"] == other["settled"]
    values = {row["value"] for row in together[-4:]}
    assert len(values) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_seed_determines(kind):
    data = make_data(kind)
    policies = random_policies(data, 1) * 2
    critics = judge.Critics(policies, data, small())
    again = judge.Critics(policies, data, small())
    other = judge.Critics(policies, data, small(seed=1))
    for name, weights in critics.weights.items():
        assert torch.equal(weights[0], weights[1])  # policies start alike
        assert torch.equal(weights, again.weights[name])
        assert not torch.isclose(weights, other.weights[name]).any()
        assert not torch.isclose(weights[:, 0], weights[:, 1]).any()  # critics differ
    torch.rand(3)  # the global generator does not matter
    for update in (0, 7):
        drawn = critics.batch(update)["rewards"]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn, again.batch(update)["rewards"])
        assert not torch.equal(drawn, other.batch(update)["rewards"])
    assert not torch.equal(critics.batch(0)["rewards"], critics.batch(1)["rewards"])
    first, second = judge.judge(policies, data, small())[-2:]
    assert first["value"] == pytest.approx(second["value"], rel=1e-5)


def test_a_batch_holds_transitions_and_the_policies_actions():
    data = make_data("continuous")
    critics = judge.Critics(random_policies(data, 2), data, small(batch_size=500))
    # Of the third critic
    batch = {name: x[:, 2] for name, x in critics.batch(3).items()}
    counts = []
    for i, row in enumerate(data.dataset.rows.tolist()):
        places = (batch["rewards"][0] == data.rewards[i]).nonzero().squeeze(1)
        counts.append(len(places))
        b = places[0]
        for p in range(2):
            expected = {
                "observations": data.observations[row],
                "next_observations": data.observations[row + 1],
                "actions": data.actions[i],
                "terminations": data.terminations[i],
                "policy_actions": critics.policy_actions[p, row],
                "next_policy_actions": critics.policy_actions[p, row + 1],
                "next_recorded_actions": data.recorded[row + 1],
                "next_supported": critics.supported[p, row + 1],
            }
            for name, value in expected.items():
                assert torch.equal(batch[name][p, b], value), name
    assert sum(counts) == 500
    assert min(counts) > 500 / 19 / 3 and max(counts) < 500 / 19 * 3  # uniform
    assert batch["terminations"].sum() > 0


def test_loss_and_clipped_are_means_over_the_interval():
    data = make_data("continuous")
    data.bounds = [-0.5, 0.5]
    policies = random_policies(data, 2)
    options = small(updates=25)
    table = judge.judge(policies, data, options)
    # The recorded actions are judged too, and clipping does not depend on others.
    critics = judge.Critics(policies, data, options)
    found = torch.stack([torch.stack(critics.update(i)) for i in range(25)])
    for i, (first, end) in enumerate([(0, 10), (10, 20), (20, 25)]):
        losses, clipped = found[first:end].mean(0).tolist()
        for p in (0, 1):
            row = table[2 * i + p]
            assert row["update"] == end
            assert row["loss"] == pytest.approx(losses[p], rel=1e-4)
            assert row["clipped"] == pytest.approx(clipped[p], abs=1e-6)
    assert 0 < found[:, 1].mean() < 1


def test_another_estimator_is_a_subclass():
    """With a penalty on Q of the policy's actions (CQL, eq. 1 and 2) values fall."""

    class Conservative(judge.SupportedQ):
        def loss(self, q_of, batch, target):
            q_policy = q_of(batch["observations"], batch["policy_actions"])
            q_data = q_of(batch["observations"], batch["actions"])
            gap = (q_policy - q_data).mean()
            return super().loss(q_of, batch, target) + 5 * gap

        def value(self, q, recorded_q, supported):
            return super().value(q, recorded_q, supported).amin(0, keepdim=True)

    data = make_data("continuous")
    policies = random_policies(data, 2)
    plain = judge.judge(policies, data, small())
    lower = judge.judge(policies, data, small(), estimator=Conservative)
    for row, other in zip(plain[-2:], lower[-2:]):
        assert other["value"] < row["value"] - 0.1


# --- whether values have settled ------------------------------------------------------


def settled(values, update=10_000, of_data=0.0, **errors):
    """Judge rows of these values at equal intervals up to an update. of_data: the
    recorded episodes' value."""
    data = make_data("continuous", discount=0.99)
    data.value = of_data
    rows = []
    for i, value in enumerate(values):
        errors = {"value_error": 0.0, "value_error_critics": math.nan, **errors}
        at = update * (i + 1) // len(values)
        rows.append({"update": at, "value": value, **errors})
    return judge.has_settled(rows, data, judge.Options())


def test_the_rule_for_settled_values():
    rising = [50, 80, 90, 95, 98, 100, 100, 101]
    assert settled(rising)
    assert not settled(rising, update=5999)  # fewer than 3 / (0.05 * 0.01)
    assert settled(rising, update=6000)
    assert not settled([50, 80, 90, 95, 98, 97, 100, 101])
    assert settled([50, 80, 90, 95, 98, 97, 100, 101], value_error=4.0)
    assert settled([50, 80, 90, 95, 98, 97, 100, 101], value_error_critics=4.0)
    assert not settled([50, 80, 90, 95, 98, 97, 100, 101], value_error=3.9)
    assert settled([-98, -99, -100, -101]) and settled([0, 0, 0, 0])
    assert settled([2, 2, 2, 0], of_data=-100.0) and not settled([2, 2, 2, 0])
    assert not settled([100])  # a single row
    assert settled([100, 100]) and not settled([100, 110])
    assert settled([100, 50, 50])  # since two thirds of the updates
    assert not settled([1, 1, 1, math.nan])


def test_updates_that_are_enough():
    options = judge.Options(soft_target_update_rate=0.1)
    data = make_data("continuous", discount=0.5)
    assert data.enough_updates(options) == 60
    data = make_data("continuous", discount=1)  # episodes of 19 / 3 steps
    assert data.enough_updates(options) == pytest.approx(190)


# --- the command ----------------------------------------------------------------------

BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-2, qf_lr=1e-2, cql_alpha=1, max_timesteps=4, eval_freq=4, log_freq=100,
    n_episodes=1, seed="[0,1]", discount=0.9,
)  # fmt: skip
FAST = ["--updates", 20, "--log_freq", 10, "--batch_size", 8, "--hidden_dim", 8]
BOUNDS = {"low": LOW, "high": HIGH}


def discrete_episodes():
    episodes = random_episodes([10, 12, 9, 7])
    for each in episodes:
        each["actions"] = np.arange(len(each["actions"])) % 3 - 1
    return episodes


EPISODES = {
    "continuous": toy_episodes(**BOUNDS),
    "other": toy_episodes(seed=1, **BOUNDS),
    "discrete": discrete_episodes(),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Directories of datasets. The one of continuous actions has a name that
    normalize_reward looks for."""
    root = tmp_path_factory.mktemp("data")
    space = gym.spaces.Discrete(N_ACTIONS, start=FIRST_ACTION)
    options = {"id": "hopper/toy-v0", "env_kwargs": BOUNDS}
    return {
        "continuous": toy_dataset(root, **options),
        "other": toy_dataset(root / "other", seed=1, **options),
        "discrete": minari_dataset(
            root, "plain/discrete-v0", discrete_episodes(), action_space=space
        ),
    }


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """trained(**flags) trains two runs, once for each set of flags, and returns their
    directory, which tests must not change."""
    root = tmp_path_factory.mktemp("runs")
    known = {}

    def command(expected=0, **flags):
        key = str(flags)
        if key not in known:
            known[key] = root / f"run{len(known)}"
            values = {"env": data["continuous"], **BASE, **flags}
            values = {k: v for k, v in values.items() if v is not ...}
            status, out, err = run(**values, resume=known[key])
            assert status == expected, (status, out, err)
        return known[key]

    return command


@pytest.fixture
def command(capsys, tmp_path):
    """command(*arguments) judges with few updates and returns the rows of judge.csv and
    the output."""

    def call(*arguments, expected=0):
        out = tmp_path / "judged" / "judge.csv"
        argv = [*arguments, *FAST, "--device", "cpu", "--out", out]
        status = judge.main(list(map(str, argv)))
        output = capsys.readouterr()
        assert status == expected, output
        with open(out, newline="") as file:
            return list(csv.DictReader(file)), output.out

    return call


def discounted(rewards, discount=0.9):
    return sum(reward * discount**t for t, reward in enumerate(rewards))


def numbers(row):
    return {k: v for k, v in row.items() if k not in ("policy", "checkpoint", "run")}


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("continuous", {}),
        ("continuous", {"normalize_reward": True, "reward_scale": 0.2}),
        ("continuous", {"reward_scale": -2}),
        ("continuous", {"reward_scale": 0}),
        ("continuous", {"reward_bias": -0.5}),
        ("discrete", {"discount": 1}),
    ],
    ids=str,
)
def test_the_table_and_the_ranking(command, trained, data, kind, flags):
    directory = trained(env=data[kind], **flags)
    table, out = command(directory)
    rewards = [each["rewards"] for each in EPISODES[kind]]
    discount = flags.get("discount", 0.9)
    factor = flags.get("reward_scale", 1)
    bias = flags.get("reward_bias", 0)
    if "normalize_reward" in flags:
        factor *= 1000 / np.ptp([each.sum() for each in rewards])
    own = np.mean([discounted(each, discount) for each in rewards])
    learned = np.mean([discounted(each * factor + bias, discount) for each in rewards])
    assert [(row["update"], row["run"]) for row in table] == [
        ("10", "0"), ("10", "1"), ("20", "0"), ("20", "1"),
    ]  # fmt: skip
    for row in table:
        assert row["checkpoint"] == str(directory / "checkpoint.pt")
        assert row["seed"] == row["run"] and row["cql_alpha"] == "1"
        assert float(row["data_value"]) == pytest.approx(learned, rel=1e-5, abs=1e-7)
        known = factor != 0 and bias == 0
        for name in ("discounted_return", "discounted_return_error"):
            assert (row[name] != "") == known
        if known:
            assert float(row["data_discounted_return"]) == pytest.approx(own, rel=1e-5)
            for name, source in (("", "value"), ("_error", "value_error")):
                expected = float(row[source]) / (abs(factor) if name else factor)
                found = float(row["discounted_return" + name])
                assert found == pytest.approx(expected, rel=1e-6)
    last = sorted(table[-2:], key=lambda row: -float(row["value"]))
    lines = out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith("rank")]
    assert ("return" in lines[head]) == (known and factor != 1)
    for rank, row in enumerate(last, 1):
        words = lines[head + rank].split()
        assert words[:2] == [str(rank), f"{float(row['value']):.4g}"]
        place = lines[head].split().index("within")
        marked = row["ran_away"] == "1" or float(row["unsupported"]) > 0.5
        # These are too few updates to tell policies apart.
        assert words[place] == ("-" if rank == 1 or marked else "yes")
        assert f"{directory}/checkpoint.pt run {row['run']}  seed" in lines[head + rank]
    again = f"{float(last[0]['recorded_value']):.4g}"
    assert again in lines[head + 3] and "recorded actions" in lines[head + 3]
    assert f"{learned:.4g}" in lines[head + 4] or not factor
    assert "recorded episodes" in lines[head + 4]
    assert lines[head + 5].startswith("no recommendation: ")
    assert float(last[0]["behind"]) == 0 < float(last[1]["behind"])
    assert "too few for values to settle; pass" in out  # 20 updates
    assert [row["settled"] for row in table] == ["0"] * 4
    assert out.count("\nupdate ") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_of_the_actions_that_load_policy_takes(trained, data, kind):
    """The library's functions, with an agent's actions and the critics by hand."""
    directory = trained(env=data[kind])
    policies, recorded = judge.load([directory], batch_size=8)
    observations = np.concatenate([each["observations"] for each in EPISODES[kind]])
    low, high = np.array(LOW), np.array(HIGH)
    for policy in policies:
        taken = cql.load_policy(directory, run=policy.run)(observations)
        unit = taken.reshape(-1, 1) - FIRST_ACTION
        if kind == "continuous":
            unit = 2 * (taken - low) / (high - low) - 1
        np.testing.assert_allclose(policy.actions, unit, atol=1e-5)
    policies = judge.mark_supported(policies, recorded, small())
    critics = judge.Critics(policies, recorded, small())
    q = critics.values()
    starts = np.array([each["observations"][0] for each in EPISODES[kind]])
    rows = [np.flatnonzero((observations == x).all(1))[0] for x in starts]
    index = torch.tensor([0])
    for p in range(2):
        loops = Loops(critics, p, index)
        for j in range(4):
            for e, row in enumerate(rows):
                both = []
                for actions in policies[p].actions, recorded.recorded:
                    both.append(loops.q(loops.critic, j, row, actions[row].tolist()))
                hand = both[0] if policies[p].supported[row] else min(both)
                assert q[p, j, e].item() == pytest.approx(hand, rel=1e-4, abs=1e-6)
    values = q[0].detach().double().numpy()
    found = judge.summarize(values, recorded)
    assert found["value"] == pytest.approx(values.mean())
    error = values.mean(0).std(ddof=1) / math.sqrt(len(starts))
    assert found["value_error"] == pytest.approx(error)
    error = values.mean(1).std(ddof=1) / math.sqrt(4)
    assert found["value_error_critics"] == pytest.approx(error)


def test_several_directories_of_different_networks(command, trained, data, tmp_path):
    """Widths, statistics and seeds differ; each value is as judged alone."""
    first = trained()
    others = [
        trained(hidden_dim=12, normalize=False, q_n_hidden_layers=1, seed=7),
        trained(cql_alpha="[0.5,2]", seed=3, n_critics=3),
    ]
    table, out = command(first, *others)
    assert "policies: 5, of 3 checkpoint(s)" in out
    assert len(table) == 2 * 5
    for directory in (first, *others):
        alone, _ = command(directory)
        path = str(directory / "checkpoint.pt")
        together = [row for row in table if row["checkpoint"] == path]
        assert len(together) == len(alone)
        for row, other in zip(together, alone):
            assert row["run"] == other["run"]
            for name, value in numbers(other).items():
                if value != "" and not name.startswith("behind"):
                    found = float(row[name])
                    assert found == pytest.approx(float(value), rel=1e-3), name
    # A directory of runs, such as a sweep's, stands for all of them.
    sweep = tmp_path / "sweep"
    for i, directory in enumerate((first, *others)):
        shutil.copytree(directory, sweep / str(i))
    (sweep / "unfinished").mkdir()
    again, _ = command(sweep)
    assert list(map(numbers, again)) == list(map(numbers, table))
    # So does a checkpoint file.
    file, _ = command(first / "checkpoint.pt", *others)
    assert file == table


def test_best_checkpoints(command, trained):
    """best.pt holds other policies than checkpoint.pt after more evaluations."""
    directory = trained(max_timesteps=40, eval_freq=4, policy_lr=0.1)
    last, _ = command(directory)
    best, _ = command(directory, "--checkpoint", "best.pt")
    assert {row["checkpoint"] for row in best} == {str(directory / "best.pt")}
    policies, _ = judge.load([directory], "best.pt", batch_size=8)
    observations = np.concatenate([x["observations"] for x in EPISODES["continuous"]])
    taken = cql.load_policy(directory / "best.pt", run=1)(observations)
    unit = 2 * (taken - np.array(LOW)) / (np.array(HIGH) - np.array(LOW)) - 1
    np.testing.assert_allclose(policies[1].actions, unit, atol=1e-5)
    assert [row["value"] for row in best] != [row["value"] for row in last]


def test_a_fork_does_not_bend_values(command, trained, monkeypatch):
    """Its losses, optimizer, critics, sampling and returns are not the judge's."""
    directory = trained()
    expected, _ = command(directory)

    def bent(*_, **__):
        raise AssertionError("the judge does not use this")

    plain = cql.Dataset.__init__

    def n_steps(self, *arguments, **more):
        plain(self, *arguments, **more)
        self.columns["rewards"] = 3 * self.columns["rewards"]
        self.columns["terminations"] = 1 - self.columns["terminations"]

    for place, name in (
        (cql.Agent, "update"),
        (cql.Agent, "draw"),
        (cql.Critic, "forward"),
        (cql.Dataset, "gather"),
        (cql.Dataset, "index"),
        (cql.Dataset, "statistics"),
        (cql.Replay, "sample"),
        (cql, "penalized_td_loss"),
        (cql, "conservative_gap"),
    ):
        monkeypatch.setattr(place, name, bent)
    monkeypatch.setattr(cql.Agent, "check_networks", lambda self: None)
    monkeypatch.setattr(cql.Dataset, "__init__", n_steps)
    assert command(directory)[0] == expected


def test_diverged_runs_are_left_out(command, trained):
    directory = trained(expected=3, seed=0, cql_alpha="[1,3e38]", log_freq=1)
    table, out = command(directory)
    assert f"{directory}/checkpoint.pt run 1: diverged by update" in out
    assert "policies: 1, of 1" in out and {row["run"] for row in table} == {"0"}
    alone, _ = command(trained(seed=0, log_freq=1))
    for row, other in zip(table, alone):
        assert float(row["value"]) == pytest.approx(float(other["value"]), rel=1e-3)


def altered(directory, path, **values):
    """Write a checkpoint with other values, and return its path."""
    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint, **values}, path)
    return path


def test_runs_whose_q_ran_away_are_marked(command, trained, tmp_path):
    path = altered(trained(), tmp_path / "a.pt", warned=[False, True])
    table, out = command(path)
    assert [row["ran_away"] for row in table] == ["0", "1", "0", "1"]
    assert len(re.findall(r"a.pt run 1  seed 1  cql_alpha 1.0  Q diverged\n", out)) == 1
    assert out.count("Q diverged") == 1


def test_flags_that_do_not_matter_here(command, trained, tmp_path):
    """The policy of a compiled run is not compiled. Actions in a box of integers are
    rounded, as for the environment."""
    directory = trained(seed=0)
    saved = torch.load(directory / "checkpoint.pt", weights_only=True)
    path = tmp_path / "compiled.pt"
    altered(directory, path, config={**saved["config"], "compile": True})
    table, out = command(path)
    plain, _ = command(directory)
    assert "compiling" not in out
    assert list(map(numbers, table)) == list(map(numbers, plain))
    task = {**saved["task"], "action_dtype": "int64"}
    altered(directory, tmp_path / "integers.pt", task=task)
    (policy,), data = judge.load([tmp_path / "integers.pt"], batch_size=8)
    actions = data.units.environment_actions(policy.actions)
    torch.testing.assert_close(actions, actions.round(), atol=1e-5, rtol=0)
    (other,), _ = judge.load([directory], batch_size=8)
    difference = data.units.environment_actions(other.actions) - actions
    assert 0.01 < difference.abs().max() <= 0.5001


def test_an_online_run_is_judged_on_its_offline_data(command, trained, data):
    flags = {"online_iterations": 10, "max_timesteps": 4, "mixing_ratio": 0.5}
    table, out = command(trained(**flags))
    n = sum(len(each["rewards"]) for each in EPISODES["continuous"])
    assert f"data: {n} transitions" in out
    rewards = [each["rewards"] for each in EPISODES["continuous"]]
    expected = np.mean([discounted(each) for each in rewards])
    assert float(table[0]["data_value"]) == pytest.approx(expected, rel=1e-5)


def test_other_data(command, trained, data):
    """--env judges on other data, also runs that had none or unequal ones."""
    directory = trained()
    other = trained(env=data["other"])
    nothing = trained(
        env="null", eval_env="CqlToy-v0", max_timesteps=0, normalize=False,
        online_iterations=20,
    )  # fmt: skip
    rewards = [each["rewards"] for each in EPISODES["other"]]
    expected = np.mean([discounted(each) for each in rewards])
    env = ["--env", data["other"]]
    table, _ = command(directory, other, *env)
    assert float(table[0]["data_value"]) == pytest.approx(expected, rel=1e-5)
    for each in (directory, other):
        alone, _ = command(each, *env)
        path = str(each / "checkpoint.pt")
        both = [row["value"] for row in table if row["checkpoint"] == path]
        found = np.array(both, float)
        wanted = np.array([row["value"] for row in alone], float)
        np.testing.assert_allclose(found, wanted, rtol=1e-3)
    joined = f"[{data['continuous']}, {data['other']}]"
    _, out = command(directory, "--env", joined)
    assert "16 episodes" in out
    plain = toy_dataset(data["other"].parent, id="toy/plain-v0")
    table, _ = command(nothing, "--env", plain)
    assert len(table) == 4


def test_moved_data(command, trained, data, tmp_path, capsys):
    """Equal data under another path are the same data; changed data are refused."""
    moved = shutil.copytree(data["continuous"], tmp_path / "moved")
    directory = trained()
    other = trained(env=moved, hidden_dim=9)
    table, _ = command(directory, other)
    assert len(table) == 8
    shutil.rmtree(moved)
    shutil.copytree(data["other"], moved)
    refuse(capsys, "or other numbers; pass --env", other)


def test_interrupted(command, trained, monkeypatch, capsys, tmp_path):
    """Rows that are due before Ctrl-C stay."""
    update = judge.Critics.update

    def stop(self, number):
        if number == 15:
            raise KeyboardInterrupt
        return update(self, number)

    monkeypatch.setattr(judge.Critics, "update", stop)
    table, _ = command(trained(), expected=130)
    assert [row["update"] for row in table] == ["10", "10"]


def test_values_that_are_not_finite(command, trained, monkeypatch):
    """They are ranked last, and the status says so."""
    plain = judge.Critics.values

    def broken(self):
        values = plain(self)
        values[0] = math.nan
        return values

    monkeypatch.setattr(judge.Critics, "values", broken)
    table, out = command(trained(), expected=3)
    lines = out.splitlines()
    (head,) = [i for i, line in enumerate(lines) if line.startswith("rank")]
    assert " run 1 " in lines[head + 1] and " run 0 " in lines[head + 2]
    assert [row["value"] != "" for row in table] == [False, True] * 2


def test_the_printed_recommendation(command, trained, monkeypatch):
    def second(table, enough=0):
        return judge.last_rows(table)[1], "a reason"

    monkeypatch.setattr(judge, "recommend", second)
    monkeypatch.setattr(judge, "is_behind", lambda row: True)
    table, out = command(trained())
    recommended = min(table[-2:], key=lambda row: float(row["value"]))
    assert [row["recommended"] == "1" for row in table[-2:]] == [
        row is recommended for row in table[-2:]
    ]
    path = recommended["checkpoint"]
    lines = out.splitlines()
    (line,) = [line for line in lines if line.startswith("recommended: ")]
    assert f"{path} run {recommended['run']}  " in line and line.endswith(": a reason")
    (head,) = [i for i, line in enumerate(lines) if line.startswith("rank")]
    place = lines[head].split().index("within")
    assert [lines[head + k].split()[place] for k in (1, 2)] == ["-", "no"]
    export = f"scripts/export_onnx.py {path} policy.onnx --run {recommended['run']}"
    assert f"next: python {export}" in lines


def test_figure(command, trained, tmp_path):
    path = tmp_path / "values.png"
    directory = altered(trained(), tmp_path / "a.pt", warned=[False, True])
    _, out = command(directory, "--figure", path)
    assert f"judge.csv, {path}\n" in out
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_out_is_a_file_or_a_directory(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory = trained()
    argv = [str(directory), *map(str, FAST), "--device", "cpu"]
    assert judge.main(argv) == 0
    assert judge.main([*argv, "--out", "below/a"]) == 0
    assert judge.main([*argv, "--out", "b.csv"]) == 0
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    names = ["b.csv", "below/a/judge.csv", "judge.csv"]
    assert [str(path.relative_to(tmp_path)) for path in written] == names
    assert written[0].read_text() == written[1].read_text() == written[2].read_text()
    assert "wrote judge.csv\n" in capsys.readouterr().out


# --- bad input ------------------------------------------------------------------------


def refuse(capsys, words, *arguments):
    """Check that the command refuses the arguments in one line with these words."""
    status = judge.main([*map(str, FAST), *map(str, arguments)])
    error = capsys.readouterr().err
    assert status == 2, error
    assert re.fullmatch(f"judge.py: error: .*{words}.*\n", error), error
    assert len(error) < 1000


@pytest.mark.parametrize(
    "flag, other, words",
    [
        (
            "discount",
            0.8,
            "discount 0.8, but 0.9 in .*; judge them in separate commands",
        ),
        ("reward_scale", 2.0, "reward_scale 2.0, but 1.0 in"),
        ("reward_bias", -1.0, "reward_bias -1.0, but 0.0 in"),
        ("normalize_reward", True, "normalize_reward True, but False in"),
    ],
)
def test_runs_that_are_not_comparable(trained, capsys, flag, other, words):
    refuse(capsys, words, trained(), trained(**{flag: other}))


def test_differing_data_and_spaces(trained, data, capsys, tmp_path):
    first = trained()
    refuse(
        capsys, "or other numbers; .* or pass --env", first, trained(env=data["other"])
    )
    refuse(capsys, "discrete actions .*separate", first, trained(env=data["discrete"]))
    path = tmp_path / "a.pt"
    task = torch.load(first / "checkpoint.pt", weights_only=True)["task"]
    altered(first, path, task={**task, "action_high": [1.0, 5.0]})
    refuse(capsys, r"continuous actions .* to \[1.0, 5.0\], but", first, path)


def test_bad_input(trained, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = trained()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pt").write_text("no checkpoint")
    before = files_below(tmp_path)
    cases = {
        "no checkpoint.pt in it or one level below; pass a run": ["empty"],
        "no other.pt in it": [directory, "--checkpoint", "other.pt"],
        "nowhere: does not exist; pass a run directory": ["nowhere"],
        "damaged, or not": ["file.pt"],
        "found twice; pass each run once": [directory, f"{directory}/checkpoint.pt"],
        "required: RUN": [],
        "--env null: judging needs data; pass a dataset": [directory, "--env", "null"],
        "--env nowhere.*directory": [directory, "--env", "nowhere"],
        "5000: .* transitions; pass a smaller --batch_size": [
            directory, "--batch_size", "5000",
        ],
        "--updates 0: must be at least 1": [directory, "--updates", "0"],
        "--n_critics 0: must be at least 1": [directory, "--n_critics", "0"],
        "--seed -1: must be at least 0": [directory, "--seed", "-1"],
        "--lr 0.0: must be above 0": [directory, "--lr", "0"],
        "--lr nan: must be above 0": [directory, "--lr", "nan"],
        "--soft_target_update_rate 1.5: must lie in": [
            directory, "--soft_target_update_rate", "1.5",
        ],
        "invalid int value: 'x'": [directory, "--hidden_dim", "x"],
        "--support 1.0: must lie in": [directory, "--support", "1"],
        "unrecognized arguments: --fqe_updates": [directory, "--fqe_updates", "3"],
        "--device cuda:77: not available": [directory, "--device", "cuda:77"],
        "cannot draw .xyz; pass a .png": [directory, "--figure", "a.xyz"],
        "its directory does not exist": [directory, "--figure", "nowhere/a.png"],
        "--out file.pt: cannot be written": [directory, "--out", "file.pt"],
    }  # fmt: skip
    for words, arguments in cases.items():
        refuse(capsys, words, *arguments)
    assert files_below(tmp_path) == before
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    refuse(capsys, "pip install matplotlib", directory, "--figure", "a.png")


def test_all_runs_diverged(trained, capsys, tmp_path):
    path = altered(trained(), tmp_path / "a.pt", diverged=[3, 4])
    refuse(capsys, "all runs diverged; no policy is left; pass a run<k>_before", path)


def test_a_run_without_data_needs_some(trained, capsys):
    flags = {"env": "null", "eval_env": "CqlToy-v0", "max_timesteps": 0}
    directory = trained(**flags, normalize=False, online_iterations=20)
    refuse(capsys, "had no dataset; judging needs one; pass --env", directory)


def test_episodes_of_one_step_are_refused(trained, capsys, tmp_path):
    """There is nothing to bootstrap from, as in a contextual bandit."""
    for name, lengths in (("short", [1, 2] * 10), ("enough", [1, 3] * 10)):
        episodes = random_episodes(lengths, ends="terminal")
        path = minari_dataset(tmp_path, f"{name}/x-v0", episodes)
        directory = trained(env=path, eval_env="none")
        if name == "short":
            words = "have 1.5 steps on average; .* at least 2; judge on longer"
            refuse(capsys, words, directory)
    out = tmp_path / "out"
    assert judge.main([str(directory), *map(str, FAST), "--out", str(out)]) == 0


def test_a_full_disk_is_the_machine_s_fault(trained, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(judge.csv, "DictWriter", full)
    argv = [str(trained()), *map(str, FAST), "--out", str(tmp_path)]
    assert judge.main(argv) == 1
    error = capsys.readouterr().err
    assert re.fullmatch("judge.py: failed: could not write .*No space left.*\n", error)


def test_training_s_flag_names_the_script(capsys):
    status, _, err = run(["--fqe_updates", "10"])
    assert status == 2 and "scripts/judge.py" in err


def test_d4rl_files(command, trained, tmp_path):
    """A D4RL file, and the flags that a config file repeats."""
    path = d4rl_file(tmp_path / "toy.hdf5")
    directory = trained(env=path, eval_env="none")
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["env"] == str(path)
    table, _ = command(directory)
    assert len(table) == 4


def test_the_discounted_return_of_an_evaluation(trained):
    """The true value of a policy in evaluations.csv, by a loop over load_policy."""
    directory = trained(n_episodes=3)
    env = gym.make("CqlToy-v0", **BOUNDS)
    with open(directory / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))[-2:]
    for r, row in enumerate(rows):
        policy = cql.load_policy(directory, run=r)
        returns = []
        for i in range(3):
            numbers = [cql.EVALUATE, 0, r, 4, i]  # eval_seed, seed, step
            seed = cql.environment_seed(numbers)
            observation, _ = env.reset(seed=seed)
            rewards = []
            over = False
            while not over:
                observation, reward, ended, cut, _ = env.step(policy(observation))
                rewards.append(reward)
                over = ended or cut
            returns.append(discounted(rewards))
        shown = float(row["discounted_return_mean"])
        assert shown == pytest.approx(np.mean(returns), rel=1e-6)
        assert abs(shown - float(row["return_mean"])) > 0.1
