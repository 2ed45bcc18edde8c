"""DiscreteCQL: its loss against scalar loops, its data, its commands."""

import csv
import math
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from make_data import d4rl_file, minari_dataset, random_episodes, rollout, run
from reference import (
    OBS,
    answers,
    assert_close,
    bend_every_network,
    clamp,
    critic_outputs,
    in_float64,
    least_of_targets,
    logsumexp,
    losses_of,
    mapped,
    mean,
    of_run,
    scrambled,
    tiny,
    train,
)
from reference import transitions as continuous_transitions

import cql

N_ACTIONS = 4
close = dict(rtol=1e-9, atol=1e-9)
SMALL = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, qf_lr=1e-2,
    cql_alpha=1, max_timesteps=12, eval_freq=4, log_freq=3, n_episodes=2,
)  # fmt: skip


@pytest.fixture
def double():
    yield from in_float64()


def discrete_task(n_actions=N_ACTIONS, low=0, observation_dim=OBS) -> cql.Task:
    observations = gym.spaces.Box(-np.inf, np.inf, (observation_dim,))
    return cql.make_task(observations, gym.spaces.Discrete(n_actions, start=low))


def discrete_agent(low=0, **flags):
    return scrambled(cql.DiscreteCQL(tiny(**flags), discrete_task(low=low)))


def transitions(*shape, low=0):
    generator = torch.Generator().manual_seed(1)
    actions = torch.randint(N_ACTIONS, (*shape, 1), generator=generator)
    return {**continuous_transitions(*shape), "actions": actions + low}


# --- the loss -------------------------------------------------------------------------

CASES = {
    "defaults": {},
    "one_critic": dict(n_critics=1),
    "redq": dict(n_critics=4, n_target_critics=2),
    "lagrange": dict(cql_lagrange=True, cql_target_action_gap=1.5, cql_alpha=0.7),
    "temperature": dict(cql_temp=[0.5, 2.0]),
    "clip": dict(cql_clip_diff_min=1.0, cql_clip_diff_max=3.0),
    "from_one": dict(low=1),
    "discount": dict(discount=0.5, cql_alpha=[0.1, 3.0]),
    "n_steps": dict(n_steps=3),
}


class Row(NamedTuple):
    """One critic's values in one state, and the loss's numbers from them."""

    q: list
    q_data: complex
    error: complex
    gap: complex  # clamped


class Reference:
    """One run's loss from the formulas, by Python loops over its parameters."""

    def __init__(self, agent, batch, noise, r):
        self.parameters = {}
        for name, value in agent.named_parameters():
            self.parameters[name] = value.detach()[r].numpy().copy()
        self.config, self.sweep = agent.config, agent.runs[r]
        self.batch, self.keys = of_run(batch, r), of_run(noise, r).get("subset_keys")
        self.low = int(agent.task.action_low[0])

    def critics(self, network, state):
        return critic_outputs(self.parameters, network, self.config.n_critics, state)

    def next_value(self, b):
        following = self.batch["next_observations"][b]
        by_critic = self.critics("critic", following)
        means = [mean(q[a] for q in by_critic).real for a in range(N_ACTIONS)]
        best = means.index(max(means))
        values = [q[best].real for q in self.critics("target_critic", following)]
        return least_of_targets(values, self.keys, self.config.n_target_critics)

    def target(self, b):
        kept = 0.0 if self.batch["terminations"][b] else self.config.discount
        if self.config.n_steps > 1 and kept:
            kept = self.batch["discounts"][b]
        return self.batch["rewards"][b] + kept * self.next_value(b)

    def rows(self):
        """A Row for every critic and every state."""
        T, critics = self.sweep["cql_temp"], []
        low, high = self.config.cql_clip_diff_min, self.config.cql_clip_diff_max
        for j in range(self.config.n_critics):
            critics.append([])
            for b, state in enumerate(self.batch["observations"]):
                q = self.critics("critic", state)[j]
                q_data = q[int(self.batch["actions"][b][0]) - self.low]
                error = (q_data - self.target(b)) ** 2
                gap = T * logsumexp([x / T for x in q]) - q_data
                critics[-1].append(Row(q, q_data, error, clamp(gap, low, high)))
        return critics

    def loss(self):
        """The loss that trains the critics, and the loss that trains log alpha'."""
        alpha, wanted = self.sweep["cql_alpha"], self.sweep["cql_target_action_gap"]
        prime = np.exp(self.parameters["log_alpha_prime"].item())
        critics = self.rows()
        gaps = [mean(row.gap for row in rows) for rows in critics]
        total = sum(mean(row.error for row in rows) for rows in critics)
        if not self.config.cql_lagrange:
            return total + alpha * sum(gaps), 0.0
        total += alpha * prime.real * sum(gap - wanted for gap in gaps)
        return total, -mean(prime * alpha * (gap.real - wanted) for gap in gaps)

    def metrics(self):
        """All metrics; {j} stands for a list over critics."""
        critics = self.rows()

        def by_critic(value):
            return [mean(value(row) for row in rows) for rows in critics]

        values = [self.next_value(b) for b in range(len(self.batch["rewards"]))]
        alpha, wanted = self.sweep["cql_alpha"], self.sweep["cql_target_action_gap"]
        prime = np.exp(self.parameters["log_alpha_prime"].item()).real
        if not self.config.cql_lagrange:
            prime, wanted = 0.0, 0.0
        weight = alpha * prime if self.config.cql_lagrange else alpha
        gaps = by_critic(lambda row: row.gap)
        return {
            "alpha_prime": prime,
            "alpha_prime_loss": self.loss()[1],
            "qf{j}_loss": by_critic(lambda row: row.error),
            "cql_min_qf{j}_loss": [weight * (gap - wanted) for gap in gaps],
            "average_target_q": mean(values),
            "average_qf{j}": by_critic(lambda row: row.q_data),
            "cql_qf{j}_diff": by_critic(lambda row: row.gap),
            "cql_std_q{j}": by_critic(lambda row: np.std(row.q, ddof=1)),
            "cql_q{j}_rand": by_critic(lambda row: mean(row.q)),
            "cql_q{j}_current_actions": by_critic(lambda row: max(row.q, key=np.real)),
        }


def check_against_loops(agent, batch, noise):
    """Compare losses, metrics and gradients of every run with the loops. Gradients are
    compared tensor by tensor along a random direction (complex step, exact)."""
    agent.zero_grad()
    losses, metrics = losses_of(agent, agent.prepare(batch), noise)
    losses.sum().backward()
    generator, compared = np.random.default_rng(0), 0
    for r in range(len(agent.runs)):
        reference = Reference(agent, batch, noise, r)
        total, multiplier = reference.loss()
        np.testing.assert_allclose(losses[r].item(), (total + multiplier).real, **close)
        assert metrics.keys() == reference.metrics().keys()
        for name, value in reference.metrics().items():
            actual = metrics[name][r].detach().numpy()
            np.testing.assert_allclose(actual, np.real(value), **close, err_msg=name)
        parameters = reference.parameters
        for name, parameter in agent.named_parameters():
            if not parameter.requires_grad:
                fixed = name == "log_alpha_prime" and not agent.config.cql_lagrange
                assert name.startswith("target_critic.") or fixed
                continue
            direction = generator.standard_normal(parameter[r].shape)
            moved = parameters[name] + 1e-30j * direction
            reference.parameters = {**parameters, name: moved}
            part = reference.loss()[name == "log_alpha_prime"]
            wanted = complex(part).imag / 1e-30
            grad = parameter.grad
            actual = 0.0 if grad is None else (grad[r].numpy() * direction).sum()
            assert actual == pytest.approx(wanted, rel=1e-9, abs=1e-9), name
            compared += wanted != 0
    layers = 2 * (agent.config.q_n_hidden_layers + 1)
    assert compared == len(agent.runs) * (layers + agent.config.cql_lagrange)


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_loss_metrics_and_gradients_match_scalar_loops(flags, double):
    """Also the published faults: a mean over actions for the soft maximum, a truncation
    taken for a terminal, a (B) - (B, 1) broadcast."""
    agent = discrete_agent(**flags)
    batch = transitions(len(agent.runs), 5, low=flags.get("low", 0))
    check_against_loops(agent, batch, agent.draw(0, 5))


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_every_forward_pass_goes_through_the_network(seed, double, monkeypatch):
    """The network is written once: a change of its activation or forward is a change in
    the loss, in update, in act and in q."""
    agent = discrete_agent(seed=seed)
    R = len(agent.runs)
    batch = transitions(R, 40)
    noise, plain = agent.draw(0, 40), agent.act(batch["observations"])
    bend_every_network(monkeypatch)
    check_against_loops(agent, batch, noise)
    acted, q = agent.act(batch["observations"]), agent.q(batch["observations"])
    metrics = agent.update(batch, noise)
    agent = discrete_agent(seed=seed)  # as it was before the update
    for r in range(R):
        reference, wanted = Reference(agent, batch, noise, r), []
        for state in batch["observations"][r].tolist():
            wanted.append(np.real(reference.critics("critic", state)))
        wanted = np.stack(wanted, axis=1)  # [N, n, A]
        np.testing.assert_allclose(q[r], wanted, **close)
        np.testing.assert_array_equal(acted[r, :, 0], wanted.mean(0).argmax(-1))
        assert (plain[r] != acted[r]).any()
        expected = reference.metrics()
        for name in ("average_qf{j}", "cql_qf{j}_diff"):
            np.testing.assert_allclose(
                metrics[name][r], np.real(expected[name]), **close
            )


PRECISE = dict(rtol=1e-12, atol=1e-12)
SINGLE = {**CASES, "temperature": dict(cql_temp=0.5), "discount": dict(discount=0.5)}


@pytest.mark.parametrize("flags", SINGLE.values(), ids=SINGLE)
def test_both_layouts_of_a_single_run_are_equal(flags, double):
    """Losses, metrics, gradients, act and q with vmap and with critics in a loop."""
    agent = discrete_agent(**flags)
    batch, noise = transitions(1, 6, low=flags.get("low", 0)), agent.draw(0, 6)
    found = []
    for batched in (False, True):
        agent.layout.batched = batched
        found.append(answers(agent, agent.prepare(batch), noise))
    assert_close(found[1], found[0], **PRECISE)


@pytest.mark.parametrize("flags", SINGLE.values(), ids=SINGLE)
def test_one_run_of_three_answers_as_it_does_alone(flags, double):
    """Losses, metrics, gradients, act and q of a stacked run equal those of a solo run
    with the same weights."""
    stacked, solo = discrete_agent(**flags, seed=[0, 1, 2]), discrete_agent(**flags)
    batch, noise = transitions(3, 6, low=flags.get("low", 0)), stacked.draw(0, 6)
    of_three = answers(stacked, stacked.prepare(batch), noise)
    for r in range(3):
        with torch.no_grad():
            for name, value in solo.run_tensors().items():
                value.copy_(stacked.run_tensors()[name][r : r + 1])
        parts = [mapped(lambda x: x[r : r + 1], x) for x in (batch, noise)]  # noqa: B023
        alone = answers(solo, solo.prepare(parts[0]), parts[1])
        own = mapped(lambda x: x[r : r + 1], of_three)  # noqa: B023
        assert_close(own, alone, **PRECISE)


def test_gap_is_the_exact_soft_maximum(double, monkeypatch):
    """The gap is T log sum_a exp(Q / T) - Q(s, a_data), over the actions alone."""
    agent = discrete_agent(cql_temp=0.3, n_critics=1)
    batch, gaps = transitions(1, 6), []
    gap_of = cql.conservative_gap

    def recorded(*inputs):
        gaps.append(gap_of(*inputs))
        return gaps[-1]

    monkeypatch.setattr(cql, "conservative_gap", recorded)
    losses_of(agent, batch, agent.draw(0, 6))
    q = agent.q(batch["observations"])[0, 0]
    q_data = q.gather(1, batch["actions"][0])[:, 0]
    (gap,) = gaps
    exact = 0.3 * torch.logsumexp(q / 0.3, -1) - q_data
    torch.testing.assert_close(gap.detach(), exact, **close)
    assert (gap > 0).all()


def test_stacked_runs_equal_solo_runs(double):
    """Parameters after 60 updates are the same in a stacked run and alone."""
    flags = dict(n_critics=3, n_target_critics=2, cql_lagrange=True)
    config, data = tiny(**flags, seed=[3, 5], cql_alpha=[0.5, 2.0]), transitions(200)
    stacked = cql.DiscreteCQL(config, discrete_task())
    train(stacked, data, 60)
    for r, run_ in enumerate(stacked.runs):
        config = tiny(**flags, seed=run_["seed"], cql_alpha=run_["cql_alpha"])
        solo = cql.DiscreteCQL(config, discrete_task())
        train(solo, data, 60)
        for ours, theirs in zip(stacked.parameters(), solo.parameters()):
            torch.testing.assert_close(ours[r], theirs[0], **close)


def test_acts_greedily_by_the_mean_of_the_critics():
    agent = discrete_agent(low=2, seed=[0, 1])
    x = np.random.default_rng(0).normal(size=(2, 50, OBS))
    actions = agent.act(x)
    q = agent.q(x)
    assert q.shape == (2, 2, 50, N_ACTIONS)
    np.testing.assert_array_equal(actions[..., 0], q.mean(1).argmax(-1) + 2)
    assert actions.dtype == np.int64 and len(np.unique(actions)) > 1
    of_actions = q.take_along_dim(torch.as_tensor(actions - 2).unsqueeze(1), -1)
    torch.testing.assert_close(agent.q(x, actions), of_actions.squeeze(-1))


@pytest.mark.parametrize("flags", [{"penalty": "mean"}, {"cal_ql": True}], ids=str)
def test_formulas_of_continuous_actions_are_refused(flags):
    (name,) = flags
    with pytest.raises(cql.UserError, match=f"{name}.*discrete"):
        discrete_agent(**flags)


# --- data and commands ----------------------------------------------------------------


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    env = gym.make("CartPole-v1")
    path = tmp_path_factory.mktemp("cartpole")
    scores = {"ref_min_score": 20.0, "ref_max_score": 500.0}
    return minari_dataset(path, "cart/pole-v0", rollout(env, 20), env=env, **scores)


def table(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_discrete_dataset_trains_evaluates_and_resumes(cartpole, tmp_path):
    flags = {**SMALL, "env": cartpole, "seed": "[0,1]", "cql_alpha": "[0.5,2]"}
    flags["log_freq"] = 4  # update 8, where a half ends, is on the schedule
    status, out, err = run(resume=tmp_path / "whole", **flags)
    assert status == 0, err
    rows = table(tmp_path / "whole" / "evaluations.csv")
    assert len(rows) == 12 and all(float(row["length_mean"]) >= 8 for row in rows)
    run(resume=tmp_path / "halves", **{**flags, "max_timesteps": 8})
    assert run(resume=tmp_path / "halves", **flags)[0] == 0
    for name in ("metrics.csv", "evaluations.csv"):
        texts = [(tmp_path / d / name).read_text() for d in ("whole", "halves")]
        assert texts[0] == texts[1]
    metrics = table(tmp_path / "whole" / "metrics.csv")[0]
    assert float(metrics["cql_qf1_diff"]) > 0 and "policy_loss" not in metrics
    policy = cql.load_policy(tmp_path / "whole", run=1)
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        action = policy(observation)
        assert env.action_space.contains(action)
        observation, *_ = env.step(action)
    several = policy(np.stack([observation] * 3))
    assert several.shape == (3,) and env.action_space.contains(several[0])


def test_its_score_equals_a_loop_over_load_policy(cartpole, tmp_path):
    flags = {**SMALL, "env": cartpole, "max_timesteps": 4, "n_episodes": 3}
    assert run(resume=tmp_path / "run", **flags)[0] == 0
    policy, env = cql.load_policy(tmp_path / "run"), gym.make("CartPole-v1")
    returns = []
    for i in range(3):
        seed = cql.environment_seed([cql.EVALUATE, 0, 0, 4, i])  # eval_seed, seed, step
        (observation, _), over = env.reset(seed=seed), False
        returns.append(0.0)
        while not over:
            observation, reward, ended, cut, _ = env.step(policy(observation))
            returns[-1], over = returns[-1] + reward, ended or cut
    row = table(tmp_path / "run" / "evaluations.csv")[-1]
    assert float(row["return_mean"]) == pytest.approx(np.mean(returns))
    score = 100 * (np.mean(returns) - 20) / 480
    assert float(row["d4rl_normalized_score"]) == pytest.approx(score)


def integers(episodes, dtype=np.int64, n=3, low=0):
    rng = np.random.default_rng(0)
    for episode in episodes:
        shape = len(episode["rewards"])
        episode["actions"] = rng.integers(low, low + n, shape).astype(dtype)
    return episodes


def test_whole_numbers_in_a_plain_file_are_discrete(tmp_path):
    """Integers in one column are actions from 0 to the largest one."""
    episodes = integers(random_episodes([10, 12, 9]))
    for name, actions in (("flat", None), ("column", (31, 1))):
        path = d4rl_file(tmp_path / f"{name}.hdf5", episodes)
        if actions:
            joined = np.concatenate([e["actions"] for e in episodes]).reshape(actions)
            path = d4rl_file(path, episodes, actions=joined)
        _, task = cql.read_data(cql.TrainConfig(env=str(path)))
        assert task.discrete and task.action_low == [0.0] and task.action_high == [2.0]
        assert isinstance(cql.make_agent(cql.TrainConfig(), task), cql.DiscreteCQL)
        status, out, err = run(env=path, **{**SMALL, "checkpoints_path": "null"})
        assert status == 0, err


def test_spaces_that_start_elsewhere(tmp_path):
    episodes = integers(random_episodes([10, 12, 9]), low=-1)
    space = gym.spaces.Discrete(3, start=-1)
    path = minari_dataset(tmp_path, "minus/one-v0", episodes, action_space=space)
    run_ = tmp_path / "run"
    status, _, err = run(env=path, resume=run_, **SMALL)
    assert status == 0, err
    actions = cql.load_policy(run_)(np.random.default_rng(0).normal(size=(90, 3)))
    assert set(actions.tolist()) <= {-1, 0, 1}


def test_actions_out_of_the_space_are_refused(tmp_path, refused):
    space = gym.spaces.Discrete(2)
    for name, n, dtype in (("high", 3, np.int64), ("half", 2, np.float32)):
        episodes = integers(random_episodes([10, 12, 9]), dtype, n)
        if name == "half":
            episodes[1]["actions"] = episodes[1]["actions"] / 2
        path = minari_dataset(tmp_path, f"{name}/x-v0", episodes, action_space=space)
        refused(None, path, "episode", "action", env=path)


def test_an_eval_env_of_the_other_kind_is_refused(cartpole, tmp_path, refused):
    path = d4rl_file(
        tmp_path / "box.hdf5", random_episodes([20, 20], obs_dim=4, action_dim=1)
    )
    refused(
        None, "--eval_env", env=cartpole, eval_env="InvertedPendulum-v5", batch_size=8
    )
    box = {"env": path, "eval_env": "CartPole-v1", "batch_size": 8}
    refused(None, "whole numbers", **box)


def test_flags_of_continuous_actions_say_that_they_do_nothing(cartpole):
    flags = {**SMALL, "policy_lr": 1, "bc_steps": 3, "cql_states": 2}
    status, out, _ = run(env=cartpole, checkpoints_path="null", **flags)
    (line,) = [line for line in out.splitlines() if "no effect" in line]
    assert status == 0 and all(f" {name}" in line for name in flags.keys() - SMALL)
    assert "qf_lr" not in line and "precision" not in line


def test_load_model_refuses_the_other_kind(cartpole, tmp_path, refused):
    assert run(env=cartpole, resume=tmp_path / "run", **SMALL)[0] == 0
    path = d4rl_file(
        tmp_path / "box.hdf5", random_episodes([20], obs_dim=4, action_dim=1)
    )
    flags = {"env": path, "batch_size": 8, "load_model": tmp_path / "run"}
    refused(None, "discrete", **flags)


def test_learns_what_the_data_show(double):
    """Two states, two actions, one step: the agent is greedy on the rewards, and the gap
    shrinks."""
    rng = np.random.default_rng(0)
    states = rng.integers(2, size=400)
    actions = rng.integers(2, size=400)
    observations = np.eye(2)[states]
    agent = cql.DiscreteCQL(tiny(cql_alpha=0.1), discrete_task(2, observation_dim=2))
    batch = {
        "observations": observations,
        "actions": actions[:, None],
        "rewards": np.where(actions == states, 1.0, 0.0),
        "next_observations": observations,
        "terminations": np.ones(400),
    }
    for update in range(300):
        metrics = agent.update(batch, agent.draw(update, 400))
    assert agent.act(np.eye(2))[:, 0].tolist() == [0, 1]
    assert metrics["cql_qf{j}_diff"].max() < math.log(2) + 0.5
