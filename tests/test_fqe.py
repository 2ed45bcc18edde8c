"""Fitted Q evaluation: its loss against scalar loops, its value where that is known, and
what the command writes of it."""

import cmath
import csv
import math
import os
import re
import shutil
import signal
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from make_data import minari_dataset, random_episodes, run, toy_dataset, toy_episodes
from reference import (
    box_task,
    clamp,
    in_float64,
    mean,
    mlp,
    network_layers,
    of_run,
    scrambled,
    tiny,
    train,
    trained,
)
from reference import transitions as continuous_transitions
from test_discrete import N_ACTIONS, discrete_task
from test_discrete import transitions as discrete_transitions
from test_runs import die_at, differences, finish, start

import cql

close = dict(rtol=1e-9, atol=1e-9)
KINDS = ["continuous", "discrete"]
BOUNDS = {"low": [-2.0, 0.0], "high": [1.0, 4.0]}
STATISTICS = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.5, 2.0, 1.5])


@pytest.fixture
def double():
    yield from in_float64()


def judged(kind, r_min=-0.2, r_max=0.3, **flags):
    """An agent of other weights than it began with, and its fitted Q evaluation on data
    of such rewards."""
    task = discrete_task(low=2) if kind == "discrete" else box_task(**BOUNDS)
    statistics = [x.to(torch.get_default_dtype()) for x in STATISTICS]
    agent = cql.make_agent(tiny(**flags), task, "cpu", tuple(statistics))
    scrambled(agent)
    return agent, cql.FittedQ(agent, SimpleNamespace(r_min=r_min, r_max=r_max))


def transitions(kind, *shape):
    if kind == "discrete":
        return discrete_transitions(*shape, low=2)
    batch = continuous_transitions(*shape)
    low, high = torch.tensor(BOUNDS["low"]), torch.tensor(BOUNDS["high"])
    return batch._replace(actions=low + (high - low) * (batch.actions + 1) / 2)


# --- the loss -------------------------------------------------------------------------


class Loops:
    """One run's loss from the formula, by Python loops."""

    def __init__(self, agent, fitted, batch, r, bounds):
        self.agent = self.parameters_of(agent, r)
        self.fitted = self.parameters_of(fitted, r)
        self.config, self.batch, self.bounds = agent.config, of_run(batch, r), bounds
        self.discrete = agent.task.discrete

    @staticmethod
    def parameters_of(module, r):
        named = module.named_parameters()
        return {name: value.detach()[r].numpy().copy() for name, value in named}

    def state(self, observation):
        center, scale = (x.tolist() for x in STATISTICS)
        return [(x - m) / s for x, m, s in zip(observation, center, scale)]

    def unit(self, action):
        if self.discrete:
            return int(action[0]) - 2
        bounds = zip(action, BOUNDS["low"], BOUNDS["high"])
        return [2 * (x - low) / (high - low) - 1 for x, low, high in bounds]

    def policy(self, state):
        """Its deterministic action: the tanh of the mean, or the index of the largest
        mean Q."""
        if not self.discrete:
            means = mlp(network_layers(self.agent, "policy"), state)[:2]
            return [cmath.tanh(u).real for u in means]
        by_critic = []
        for j in range(self.config.n_critics):
            by_critic.append(mlp(network_layers(self.agent, "critic", j), state))
        means = [mean(q[a] for q in by_critic) for a in range(N_ACTIONS)]
        return means.index(max(means))

    def q(self, network, j, state, action):
        layers = network_layers(self.fitted, network, j)
        if self.discrete:
            return mlp(layers, state)[action]
        return mlp(layers, state + action)[0]

    def targets(self):
        """Before the bounds."""
        found = []
        for b, observation in enumerate(self.batch.next_observations):
            state = self.state(observation)
            action, value = self.policy(state), 0.0
            for j in range(self.config.n_critics):
                q = self.q("target_critic", j, state, action)
                value += q.real / self.config.n_critics
            kept = 0.0 if self.batch.terminations[b] else self.config.discount
            found.append(self.batch.rewards[b] + kept * value)
        return found

    def metrics(self):
        targets, losses, values = self.targets(), [], []
        bounded = [clamp(y, *self.bounds) for y in targets]
        for j in range(self.config.n_critics):
            q = []
            for pair in zip(self.batch.observations, self.batch.actions):
                q.append(self.q("critic", j, self.state(pair[0]), self.unit(pair[1])))
            losses.append(mean((x - y) ** 2 for x, y in zip(q, bounded)))
            values.append(mean(q))
        clipped = mean(float(x != y) for x, y in zip(targets, bounded))
        return {"fqe_loss{j}": losses, "fqe_q{j}": values, "clipped": clipped}

    def derivative(self, name, direction):
        """Of the loss, along a direction of the parameter's shape; complex step."""
        original = self.fitted[name]
        self.fitted[name] = original + 1e-30j * direction
        value = sum(self.metrics()["fqe_loss{j}"])
        self.fitted[name] = original
        return complex(value).imag / 1e-30


CASES = {
    "defaults": {},
    "runs": dict(seed=[0, 1], cql_alpha=[1.0, 9.0], n_critics=3),
    "one_critic": dict(n_critics=1),
    "clip": dict(discount=0.5, seed=[0, 1]),
    # What is of training alone.
    "training_s": dict(
        n_critics=3, n_target_critics=1, cql_lagrange=True, bc_steps=9,
        cql_max_target_backup=True, backup_entropy=True, target_update_period=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_loss_metrics_and_gradients_match_scalar_loops(kind, flags, double):
    agent, fitted = judged(kind, **flags)
    scrambled(fitted)
    n_runs, spread = len(agent.runs), 1 - agent.config.discount
    batch, bounds = transitions(kind, n_runs, 9), (-0.2 / spread, 0.3 / spread)
    losses, metrics = fitted(fitted.prepare(batch), fitted.draw(9), False)
    losses.sum().backward()
    generator, seen = np.random.default_rng(0), set()
    for r in range(n_runs):
        loops = Loops(agent, fitted, batch, r, bounds)
        seen.update(clamp(y, *bounds) for y in loops.targets())
        expected = loops.metrics()
        total = sum(expected["fqe_loss{j}"]).real
        np.testing.assert_allclose(losses[r].item(), total, **close)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            actual = metrics[name][r].detach().numpy()
            np.testing.assert_allclose(actual, np.real(value), **close, err_msg=name)
        for name, parameter in fitted.critic.named_parameters(prefix="critic"):
            direction = generator.standard_normal(parameter[r].shape)
            actual = (parameter.grad[r].numpy() * direction).sum()
            wanted = loops.derivative(name, direction)
            assert actual == pytest.approx(wanted, rel=1e-9, abs=1e-9), name
    assert (set(bounds) <= seen) == ("discount" in flags)  # both of them are at work
    for parameter in [*agent.parameters(), *fitted.target_critic.parameters()]:
        assert parameter.grad is None


@pytest.mark.parametrize(
    "r_min, r_max, discount, low, high",
    [
        (-3, -1, 0.9, -30, 0),  # an episode may end at once
        (1, 2, 0.9, 0, 20),
        (-1, 2, 0.5, -2, 4),
        (-1, 2, 0, -1, 2),
        (-1, 2, 1, -1e6, 1e6),  # no bound
        (-1e37, 1e37, 0.99, -1e6, 1e6),  # beyond what 32 bits hold
    ],
)
def test_the_bounds_of_a_return(r_min, r_max, discount, low, high):
    """By targets of +-1e6 for critics that say 0."""
    _, fitted = judged("continuous", r_min, r_max, discount=discount)
    batch = transitions("continuous", 2)._replace(
        rewards=torch.tensor([-1e6, 1e6]), terminations=torch.ones(2)
    )
    with torch.no_grad():
        for parameter in fitted.parameters():
            parameter.zero_()
    _, metrics = fitted(fitted.prepare(batch), fitted.draw(2), False)
    expected = torch.tensor([low**2 / 2 + high**2 / 2] * 2)
    torch.testing.assert_close(metrics["fqe_loss{j}"][0].detach(), expected)
    assert metrics["clipped"].item() == (abs(low) < 1e6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_stays_and_the_critics_learn(kind):
    agent, fitted = judged(kind, seed=[0, 1])
    before, critics = trained(agent), trained(fitted)
    train(fitted, transitions(kind, 200), 20)
    torch.testing.assert_close(trained(agent), before, rtol=0, atol=0)
    assert agent.updates == 0 and fitted.updates == 20
    after = trained(fitted)
    for name in after.keys() - {"log_alpha_prime"}:
        assert not torch.equal(after[name], critics[name]), name
    assert not any("policy" in name for name in fitted.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_draws_is_the_seed_s_alone(kind):
    """Not training's, whatever that has come to; runs of one seed are paired."""
    flags = {"seed": [3, 5], "cql_alpha": [1.0, 4.0]}
    agent, fitted = judged(kind, **flags)
    agent.updates = 70
    noise, own = fitted.draw(8).fractions, agent.draw(8).fractions
    _, solo = judged(kind, seed=5)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[2]) and torch.equal(
        noise[2:3], solo.draw(8).fractions
    )
    agent.updates = 0
    fresh = cql.make_agent(agent.config, agent.task)
    for drawn in (own, agent.draw(8).fractions):
        assert not torch.isclose(drawn, noise).any()
    for name, theirs in fresh.critic.named_parameters():
        ours = fitted.critic.get_parameter(name)
        assert torch.equal(ours[0], ours[1])
        assert torch.equal(ours[2], solo.critic.get_parameter(name)[0])
        if name.endswith("weight"):
            assert not torch.isclose(ours, theirs).all(-1).any()
            assert not torch.equal(ours[0], ours[2])
        assert torch.equal(ours, fitted.target_critic.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_runs_equal_solo_runs(kind, double):
    flags = dict(n_critics=3, discount=0.5)
    agent, fitted = judged(kind, seed=[3, 5], cql_alpha=[0.5, 2.0], **flags)
    data = transitions(kind, 200)
    train(fitted, data, 40)
    for r, each in enumerate(agent.runs):
        solo, fitted_solo = judged(kind, seed=each["seed"], **flags)
        with torch.no_grad():
            for ours, theirs in zip(solo.parameters(), agent.parameters()):
                ours.copy_(theirs[r : r + 1])
        train(fitted_solo, data, 40)
        for ours, theirs in zip(fitted.parameters(), fitted_solo.parameters()):
            torch.testing.assert_close(ours[r], theirs[0], **close)


# --- where the value is known ---------------------------------------------------------

# Four states in a row, left one by one; the end is behind the last. An action u in
# [-1, 1] goes on with probability 0.5 + 0.3 u and pays 1 + s / 2 - u^2.
N_STATES, DISCOUNT = 4, 0.9


def chain_value(actions):
    """Of a policy's action in every state, by its equations from the end."""
    values, following = [], 0.0
    for s in reversed(range(N_STATES)):
        goes_on, reward = 0.5 + 0.3 * actions[s], 1 + s / 2 - actions[s] ** 2
        total = reward + DISCOUNT * goes_on * following
        following = total / (1 - DISCOUNT * (1 - goes_on))
        values.insert(0, following)
    return np.array(values)


def chain_episodes(actions, explored, n_episodes, rng):
    """Of that policy, each action of which a random one of `explored` takes the place of
    in half of the cases; transitions s, u, r, s', end and the episodes' returns."""
    kept, starts, returns = [], rng.integers(N_STATES, size=n_episodes), []
    for s in starts:
        total, factor = 0.0, 1.0
        while s < N_STATES:
            u = actions[s]
            if len(explored) and rng.random() < 0.5:
                u = rng.choice(explored)
            following = s + (rng.random() < 0.5 + 0.3 * u)
            reward = 1 + s / 2 - u**2
            kept.append((s, u, reward, min(following, N_STATES - 1), following > 3))
            total, factor, s = total + factor * reward, factor * DISCOUNT, following
        returns.append(total)
    return np.array(kept), starts, np.array(returns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [False, True], ids=["its_own", "others_too"])
def test_the_value_of_a_policy_in_a_chain(kind, others):
    """Recorded by the policy itself, or half by another, whose return it is not."""
    flags = dict(discount=DISCOUNT, hidden_dim=24, qf_lr=3e-3, q_n_hidden_layers=2)
    flags |= dict(soft_target_update_rate=0.1)
    task = box_task(observation_dim=N_STATES, action_dim=1)
    explored = np.linspace(-1, 1, 9)
    if kind == "discrete":
        task = discrete_task(3, low=-1, observation_dim=N_STATES)
        explored = [-1, 0, 1]
    agent = scrambled(cql.make_agent(tiny(**flags), task), 0.3)
    states = np.eye(N_STATES, dtype=np.float32)
    actions, rng = agent.act(states)[:, 0], np.random.default_rng(0)
    explored = explored if others else []
    table, starts, returns = chain_episodes(actions, explored, 1500, rng)
    s, u, rewards, following, ends = table.T
    data = cql.Batch(
        observations=torch.tensor(states[s.astype(int)]),
        actions=torch.tensor(u).float().unsqueeze(1),
        rewards=torch.tensor(rewards).float(),
        next_observations=torch.tensor(states[following.astype(int)]),
        terminations=torch.tensor(ends).float(),
    )
    bounds = SimpleNamespace(r_min=rewards.min(), r_max=rewards.max())
    fitted = cql.FittedQ(agent, bounds)
    train(fitted, data, 600, batch_size=128)
    estimate = fitted.values(torch.tensor(states[starts])).mean().item()
    truth = chain_value(actions)[starts].mean()
    tolerance = max(0.02 * truth, 3 * returns.std() / math.sqrt(len(returns)))
    assert abs(estimate - truth) < tolerance
    assert (abs(returns.mean() - truth) < tolerance) != others


# --- the command ----------------------------------------------------------------------

BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-2, qf_lr=1e-2, cql_alpha=1, max_timesteps=4, eval_freq=5, log_freq=100,
    n_episodes=1, seed="[0,1]", fqe_updates=12, discount=0.9,
)  # fmt: skip


def discrete_episodes():
    episodes = random_episodes([10, 12, 9, 7])
    for each in episodes:
        each["actions"] = np.arange(len(each["actions"])) % 3 - 1
    return episodes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets by name; the path of the one of continuous actions has a word that
    normalize_reward looks for."""
    root = tmp_path_factory.mktemp("data")
    space = gym.spaces.Discrete(3, start=-1)
    options = {"id": "hopper/toy-v0", "env_kwargs": BOUNDS}
    return {
        "continuous": toy_dataset(root, **options),
        "other": toy_dataset(root / "other", seed=1, **options),
        "discrete": minari_dataset(
            root, "plain/discrete-v0", discrete_episodes(), action_space=space
        ),
    }


EPISODES = {
    "continuous": toy_episodes(**BOUNDS),
    "other": toy_episodes(seed=1, **BOUNDS),
    "discrete": discrete_episodes(),
}


@pytest.fixture
def go(data, tmp_path):
    """go(name, **flags): trains in tmp_path / name; returns the directory."""

    def command(name, expected=0, **flags):
        values = {"env": data["continuous"], "resume": tmp_path / name, **BASE, **flags}
        status, out, err = run(**{k: v for k, v in values.items() if v is not ...})
        assert status == expected, (status, out, err)
        (tmp_path / name / "output").write_text(out)
        return tmp_path / name

    return command


def table(directory, name="fqe.csv"):
    with open(directory / name, newline="") as file:
        return list(csv.DictReader(file))


def saved(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def discounted(rewards, discount):
    return sum(reward * discount**t for t, reward in enumerate(rewards))


def values_by_hand(directory, r, starts):
    """Q [N, episodes] of the actions that load_policy's function chooses at raw
    observations, by the critics that stand in the checkpoint."""
    policy = cql.load_policy(directory, run=r)
    agent = saved(directory)["fqe"]["agent"]
    parameters = {name: x[r] for name, x in agent.items() if name.startswith("critic")}
    center, scale = agent["observation_mean"].numpy(), agent["observation_std"].numpy()
    states, found = ((starts - center) / scale).tolist(), []
    for state, action in zip(states, policy(starts)):
        inputs, place = state, action + 1
        if not policy.task.discrete:
            inputs, place = state + ((action - [-0.5, 2]) / [1.5, 2]).tolist(), 0
        layers = [network_layers(parameters, "critic", j) for j in (0, 1)]
        found.append([mlp(each, inputs)[place] for each in layers])
    return np.transpose(found)


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
def test_the_table_of_values(go, data, kind, flags):
    """Value and errors by the critics that were saved, the data's by a loop, in rewards
    as they are learned from and in the data's own where they can be had."""
    directory = go("run", env=data[kind], **flags)
    episodes, rewards = EPISODES[kind], [each["rewards"] for each in EPISODES[kind]]
    discount, factor = flags.get("discount", 0.9), flags.get("reward_scale", 1)
    if "normalize_reward" in flags:
        factor *= 1000 / np.ptp([each.sum() for each in rewards])
    own = np.mean([discounted(each, discount) for each in rewards])
    bias = flags.get("reward_bias", 0)
    learned = np.mean([discounted(each * factor + bias, discount) for each in rewards])
    found = table(directory)
    places = [(row["step"], row["run"], row["seed"]) for row in found]
    assert places == [(s, r, r) for s in ("5", "10", "12") for r in "01"]
    starts = np.array([each["observations"][0] for each in episodes], np.float32)
    output = (directory / "output").read_text()
    for r, row in enumerate(found[-2:]):
        q = values_by_hand(directory, r, starts)
        expected = {
            "value": q.mean(),
            "value_error": q.mean(0).std(ddof=1) / math.sqrt(len(starts)),
            "value_error_critics": abs(q.mean(1)[0] - q.mean(1)[1]) / 2,
            "data_value": learned,
        }
        if not bias and factor:
            expected["discounted_return"] = q.mean() / factor
            error = expected["value_error"] / abs(factor)
            expected["discounted_return_error"] = error
            expected["data_discounted_return"] = own
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-4, abs=1e-7), name
        for name in ("discounted_return", "discounted_return_error"):
            assert (row[name] == "") == (name not in expected)
        value = re.escape(f"{float(row['value']):.4g}")
        assert re.search(rf"  fqe {value}(  Q ran away)?\n", output)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_of_an_agent_driven_by_hand(go, data, kind):
    """Update by update, with means over the interval."""
    directory = go("run", env=data[kind])
    agent = cql.load_policy(directory).agent
    config = agent.config
    offline = cql.Dataset(config, *cql.read_data(config))
    fitted, seen = cql.FittedQ(agent, offline), []
    found = {(int(row["step"]), int(row["run"])): row for row in table(directory)}
    assert len(found) == 3 * 2
    for step in range(1, 13):
        batch = offline.sample(fitted.draw(config.batch_size).fractions)
        seen.append({k: v.numpy().copy() for k, v in fitted.update(batch).items()})
        interval = seen[(step - 1) // 5 * 5 :]
        for r in (0, 1):
            if (step, r) not in found:
                continue
            values = fitted.values(offline.first_observations())[r]
            expected = {"value": values.mean().item()}
            for name in seen[0]:
                means = np.mean([each[name][r] for each in interval], 0)
                for j, mean_ in enumerate(np.atleast_1d(means), 1):
                    expected[name.replace("{j}", str(j))] = mean_
            assert len(expected) == 6
            for name, value in expected.items():
                shown = float(found[step, r][name])
                assert shown == pytest.approx(value, rel=1e-5), name


def test_a_run_that_diverged_is_not_judged(go):
    """The other one is as beside a sound one."""
    ours = table(go("run", expected=3, seed=0, cql_alpha="[1,3e38]", log_freq=1))
    theirs = table(go("sound", seed=0, cql_alpha="[1,2]", log_freq=1))
    assert ours == [row for row in theirs if row["run"] == "0"] and len(ours) == 3


def test_a_loaded_model_is_judged_as_after_its_training(go):
    """By the data it was trained on."""
    directory = go("run")
    model = go("model", fqe_updates=0)
    assert not (model / "fqe.csv").exists()
    flags = {name: ... for name in BASE if name not in ("device", "fqe_updates")}
    flags |= {"env": ..., "load_model": model, "max_timesteps": 0, "eval_env": "none"}
    again = go("again", **flags)
    assert table(again) == table(directory)
    assert not (again / "best.pt").exists()


def test_other_data_judge_a_loaded_model(go, data):
    """Whose observations it does not standardize anew."""
    model = go("model", fqe_updates=0)
    flags = {"load_model": model, "max_timesteps": 0}
    ours, theirs = go("own", **flags), go("other", env=data["other"], **flags)
    for name in ("observation_mean", "observation_std"):
        expected = saved(model)["agent"][name]
        assert torch.equal(saved(theirs)["fqe"]["agent"][name], expected)
    assert not torch.equal(
        cql.Dataset(*config_and_data(data["other"])).statistics()[0].float(),
        saved(model)["agent"]["observation_mean"],
    )
    row, own = table(theirs)[-1], table(ours)[-1]
    rewards = [each["rewards"] for each in EPISODES["other"]]
    expected = np.mean([discounted(each, 0.9) for each in rewards])
    assert float(row["data_value"]) == pytest.approx(expected)
    starts = [each["observations"][0] for each in EPISODES["other"]]
    q = values_by_hand(theirs, 1, np.array(starts, np.float32))
    assert float(row["value"]) == pytest.approx(q.mean(), rel=1e-4)
    assert row["value"] != own["value"]


def config_and_data(path):
    config = cql.TrainConfig(env=str(path), batch_size=8)
    return config, *cql.read_data(config)


# --- resume ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        {"fqe_updates": 0},
        {"fqe_updates": 5},
        {"fqe_updates": 7},
        {"max_timesteps": 0, "fqe_updates": 7},  # of the policy of then
        {"max_timesteps": 3},
    ],
    ids=str,
)
def test_a_run_made_longer_is_bit_exact(go, first):
    directory = go("run", **first)
    assert differences(go("whole"), go("run")) == []
    steps = [row["step"] for row in table(directory)]
    assert steps == "5 5 10 10 12 12".split()
    assert go("run") and [row["step"] for row in table(directory)] == steps


@pytest.mark.parametrize("update", [1, 5, 6, 11])
def test_a_signal_meanwhile(go, monkeypatch, update):
    def interrupt(self, *arguments):
        if self.updates == update - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return cql.Agent.update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cql.FittedQ, "update", interrupt)
        directory = go("run", expected=143)
    assert saved(directory)["fqe"]["agent"]["_extra_state"]["updates"] == update
    assert saved(directory)["step"] == 4
    assert differences(go("whole"), go("run")) == []


def test_killed_at_every_file_operation(go, tmp_path, data):
    """After training, and after what every start does (test_runs.py); a checkpoint is
    written after every update, a row after two."""
    changes = {"fqe_updates": 3, "eval_freq": 2, "seed": 0}
    reference = go("whole", **changes)
    begun, wrong = go("begun", **{**changes, "fqe_updates": 0}), {}
    for call in range(13, 1000):
        directory = shutil.copytree(begun, tmp_path / str(call))
        flags = {**BASE, **changes, "env": data["continuous"], "resume": directory}
        argv = [f"--{name}={value}" for name, value in flags.items()]
        code = finish(start(argv, os.devnull, die_at, call))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        go(str(call), **changes)
        if found := differences(reference, directory):
            wrong[call] = found
    assert call > 24 and wrong == {}, f"of {call - 13} moments"


# --- what is refused; the truth beside it ---------------------------------------------


def test_it_needs_data(refused):
    flags = {"eval_env": "CqlToy-v0", "max_timesteps": 0, "normalize": False}
    flags |= {"online_iterations": 20, "fqe_updates": 5, "env": "null"}
    refused(None, "--fqe_updates", "--env", **flags)


def test_it_needs_episodes_of_several_steps(tmp_path, refused):
    """Of one step there is nothing to bootstrap from: a contextual bandit's."""
    for name, lengths in (("short", [1, 2] * 10), ("enough", [1, 3] * 10)):
        episodes = random_episodes(lengths, ends="terminal")
        path = minari_dataset(tmp_path, f"{name}/x-v0", episodes)
        if name == "short":
            refused(None, "--fqe_updates", "two steps", env=path, fqe_updates=5)
    assert run(env=path, fqe_updates=2, resume=tmp_path / "run")[0] == 0


def test_rewards_beyond_32_bits_leave_no_traceback(go):
    go("run", expected=3, reward_scale=1e38)
    go("untrained", max_timesteps=0, reward_scale=1e38, eval_env="none")


def test_the_discounted_return_of_an_evaluation(go):
    """By a loop over load_policy."""
    directory = go("run", n_episodes=3, fqe_updates=0)
    env = gym.make("CqlToy-v0", **BOUNDS)
    for r, row in enumerate(table(directory, "evaluations.csv")[-2:]):
        policy, returns = cql.load_policy(directory, run=r), []
        for i in range(3):
            seed = cql.seed_from([cql.EVALUATE, 0, r, 4, i])  # eval_seed, seed, step
            (observation, _), rewards, over = env.reset(seed=seed), [], False
            while not over:
                observation, reward, ended, cut, _ = env.step(policy(observation))
                rewards.append(reward)
                over = ended or cut
            returns.append(discounted(rewards, 0.9))
        shown = float(row["discounted_return_mean"])
        assert shown == pytest.approx(np.mean(returns), rel=1e-6)
        assert abs(shown - float(row["return_mean"])) > 0.1
