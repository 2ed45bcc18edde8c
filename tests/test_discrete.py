"""DiscreteCQL: its loss against scalar loops, its data, its commands."""

import csv
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from make_data import d4rl_file, minari_dataset, random_episodes, rollout, run
from reference import in_float64, least, logsumexp, mean, mlp, scrambled, tiny

import cql

OBS, N_ACTIONS = 3, 4
close = dict(rtol=1e-9, atol=1e-9)
SMALL = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, qf_lr=1e-2,
    cql_alpha=1, max_timesteps=12, eval_freq=4, log_freq=3, n_episodes=2,
)  # fmt: skip


@pytest.fixture
def double():
    yield from in_float64()


def discrete_agent(low=0, **flags):
    agent = cql.DiscreteCQL(tiny(**flags), OBS, N_ACTIONS, action_low=low)
    return scrambled(agent)


def transitions(*shape, low=0, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*shape, *size, generator=generator)

    return cql.Batch(
        normal(OBS),
        torch.randint(N_ACTIONS, (*shape, 1), generator=generator) + low,
        normal(),
        normal(OBS),
        (torch.rand(shape, generator=generator) < 1 / 3).to(normal()),
    )


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
}


class Reference:
    """One run's loss from the formulas, parameters name -> array, by Python loops."""

    def __init__(self, parameters, config, sweep, batch, keys, low):
        self.parameters, self.config, self.sweep = parameters, config, sweep
        self.batch, self.keys, self.low = [x.tolist() for x in batch[:5]], keys, low

    def critics(self, network, state):
        layers = [
            [
                self.parameters[f"{network}.layers.{i}.{kind}"]
                for kind in ("weight", "bias")
            ]
            for i in range(self.config.q_n_hidden_layers + 1)
        ]
        return [
            mlp([(w[j].tolist(), b[j].tolist()) for w, b in layers], state)
            for j in range(self.config.n_critics)
        ]

    def target(self, b):
        _, _, rewards, following, terminations = self.batch
        by_critic = self.critics("critic", following[b])
        means = [mean(q[a] for q in by_critic).real for a in range(N_ACTIONS)]
        best = means.index(max(means))
        values = [q[best].real for q in self.critics("target_critic", following[b])]
        if self.keys:
            order = sorted(range(len(values)), key=lambda j: -self.keys[j])
            values = [values[j] for j in order[: self.config.n_target_critics]]
        kept = 0.0 if terminations[b] else self.config.discount
        return rewards[b] + kept * least(values)

    def loss(self):
        """[0] what trains the critics, [1] what trains log alpha'."""
        T, weight, wanted = self.sweep["cql_temp"], self.sweep["cql_alpha"], 0.0
        prime = np.exp(self.parameters["log_alpha_prime"].item())
        if self.config.cql_lagrange:
            weight, wanted = weight * prime.real, self.sweep["cql_target_action_gap"]
        total, gaps = 0.0, []
        for j in range(self.config.n_critics):
            errors, clamped = [], []
            for b, state in enumerate(self.batch[0]):
                q = self.critics("critic", state)[j]
                q_data = q[int(self.batch[1][b][0]) - self.low]
                errors.append((q_data - self.target(b)) ** 2)
                gap = T * logsumexp([x / T for x in q]) - q_data
                low, high = self.config.cql_clip_diff_min, self.config.cql_clip_diff_max
                clamped.append(low if gap.real < low else min(gap, high, key=np.real))
            gaps.append(mean(clamped))
            total += mean(errors) + weight * (gaps[-1] - wanted)
        if not self.config.cql_lagrange:
            return total, 0.0
        weight = self.sweep["cql_alpha"]
        return total, -mean(prime * weight * (gap.real - wanted) for gap in gaps)


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_loss_and_gradients_match_scalar_loops(flags, double):
    """Parameter by parameter, along a random direction (complex step, exact). Also the
    published faults: a mean over actions for the soft maximum, a truncation taken for a
    terminal, a (B) - (B, 1) broadcast."""
    flags = dict(flags)
    low = flags.pop("low", 0)
    agent = discrete_agent(low, **flags)
    R = len(agent.runs)
    batch, noise = transitions(R, 5, low=low), agent.draw(5)
    losses, metrics = agent.losses(agent.prepare(batch), noise, False)
    losses.sum().backward()
    generator, compared = np.random.default_rng(0), 0
    for r in range(R):
        parameters = {k: v.detach()[r].numpy() for k, v in agent.named_parameters()}
        one, keys = [x[r] for x in batch[:5]], noise.keys[r].tolist()
        reference = Reference(parameters, agent.config, agent.runs[r], one, keys, low)
        total, multiplier = reference.loss()
        np.testing.assert_allclose(losses[r].item(), (total + multiplier).real, **close)
        for name, parameter in agent.named_parameters():
            if not parameter.requires_grad:
                assert name.startswith("target_critic.")
                continue
            direction = generator.standard_normal(parameter[r].shape)
            reference.parameters = {
                **parameters, name: parameters[name] + 1e-30j * direction
            }  # fmt: skip
            part = reference.loss()[name == "log_alpha_prime"]
            wanted = complex(part).imag / 1e-30
            grad = parameter.grad
            actual = 0.0 if grad is None else (grad[r].numpy() * direction).sum()
            assert actual == pytest.approx(wanted, rel=1e-9, abs=1e-9), name
            compared += wanted != 0
    layers = 2 * (agent.config.q_n_hidden_layers + 1)
    assert compared == R * (layers + agent.config.cql_lagrange)
    gap = metrics["cql_qf{j}_diff"]
    assert gap.shape == (R, agent.config.n_critics)


def test_gap_is_the_exact_soft_maximum(double):
    """T log sum_a exp(Q / T) - Q(s, a_data), over the actions and nothing else."""
    config = cql.TrainConfig(cql_alpha=0)
    q = torch.randn(1, 2, 6, N_ACTIONS)
    gap = cql.conservative_gap(
        q, torch.zeros_like(q), q[..., 2], torch.tensor([0.3]), config
    )
    exact = 0.3 * torch.logsumexp(q / 0.3, -1) - q[..., 2]
    torch.testing.assert_close(gap, exact, **close)
    assert (gap > 0).all()


def train(agent, n_updates):
    data = transitions(200)
    for _ in range(n_updates):
        noise = agent.draw(8)
        indices = (200 * noise.rows).long()
        agent.update(cql.Batch(*(x[indices] for x in data[:5])), noise)


def test_stacked_runs_equal_solo_runs(double):
    flags = dict(n_critics=3, n_target_critics=2, cql_lagrange=True)
    make = lambda **f: cql.DiscreteCQL(tiny(**flags, **f), OBS, N_ACTIONS)  # noqa: E731
    stacked = make(seed=[3, 5], cql_alpha=[0.5, 2.0])
    train(stacked, 60)
    for r, run_ in enumerate(stacked.runs):
        solo = make(seed=run_["seed"], cql_alpha=run_["cql_alpha"])
        train(solo, 60)
        for ours, theirs in zip(stacked.parameters(), solo.parameters()):
            torch.testing.assert_close(ours[r], theirs[0], **close)


def test_acts_greedily_by_the_mean_of_the_critics():
    agent = discrete_agent(low=2, seed=[0, 1])
    x = np.random.default_rng(0).normal(size=(2, 50, OBS))
    actions = agent.act(x)
    q = agent.critic(torch.tensor(x).float()).mean(1)
    np.testing.assert_array_equal(actions[..., 0], q.argmax(-1) + 2)
    np.testing.assert_array_equal(agent.on_host()(x), actions[..., 0])
    assert actions.dtype == np.int64 and len(np.unique(actions)) > 1


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
        seed = np.random.SeedSequence([0, 4, i]).generate_state(1)[0]
        (observation, _), over = env.reset(seed=int(seed)), False
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
    """Integers in one column; 0 is the first of them, and the largest the last."""
    episodes = integers(random_episodes([10, 12, 9]))
    for name, actions in (("flat", None), ("column", (31, 1))):
        path = d4rl_file(tmp_path / f"{name}.hdf5", episodes)
        if actions:
            joined = np.concatenate([e["actions"] for e in episodes]).reshape(actions)
            path = d4rl_file(path, episodes, actions=joined)
        data = cql.Dataset(cql.TrainConfig(env=str(path), batch_size=8))
        assert data.task.discrete and data.task.action_high == [2.0]
        assert isinstance(cql.make_agent(cql.TrainConfig(), data.task), cql.DiscreteCQL)
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
        refused(None, f"--env {path}", "action", env=path)


def test_an_eval_env_of_the_other_kind_is_refused(cartpole, tmp_path, refused):
    path = d4rl_file(
        tmp_path / "box.hdf5", random_episodes([20, 20], obs_dim=4, action_dim=1)
    )
    refused(
        None, "--eval_env", env=cartpole, eval_env="InvertedPendulum-v5", batch_size=8
    )
    box = {"env": path, "eval_env": "CartPole-v1", "batch_size": 8}
    refused(None, "whole numbers", **box)


@pytest.mark.parametrize(
    "flags", [{"policy_lr": 1}, {"bc_steps": 3}, {"cql_n_actions": 2}]
)
def test_flags_of_continuous_actions_say_that_they_do_nothing(cartpole, flags):
    status, out, _ = run(
        **{**SMALL, **flags, "env": cartpole, "checkpoints_path": "null"}
    )
    (name,) = flags
    assert status == 0 and f"{name} has no effect on discrete actions\n" in out


@pytest.mark.parametrize("flags", [{"penalty": "mean"}, {"cal_ql": True}])
def test_formulas_of_continuous_actions_are_refused(cartpole, flags, refused):
    (name,) = flags
    refused(None, f"--{name}", "discrete", env=cartpole, **{**SMALL, **flags})


def test_load_model_refuses_the_other_kind(cartpole, tmp_path, refused):
    assert run(env=cartpole, resume=tmp_path / "run", **SMALL)[0] == 0
    path = d4rl_file(
        tmp_path / "box.hdf5", random_episodes([20], obs_dim=4, action_dim=1)
    )
    flags = {"env": path, "batch_size": 8, "load_model": tmp_path / "run"}
    refused(None, "holds a DiscreteCQL", **flags)


def test_learns_what_the_data_show(double):
    """Two states, two actions, one step: greedy on the rewards, and the gap shrinks."""
    rng = np.random.default_rng(0)
    states = rng.integers(2, size=400)
    actions = rng.integers(2, size=400)
    rewards = np.where(actions == states, 1.0, 0.0)
    observations = np.eye(2)[states]
    agent = cql.DiscreteCQL(tiny(cql_alpha=0.1), 2, 2)
    done = np.ones(400)
    batch = cql.Batch(observations, actions[:, None], rewards, observations, done)
    for _ in range(300):
        metrics = agent.update(batch)
    assert agent.act(np.eye(2))[:, 0].tolist() == [0, 1]
    assert metrics["cql_qf{j}_diff"].max() < math.log(2) + 0.5
