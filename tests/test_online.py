"""The online phase: replay, environments, Cal-QL's returns, resume, recording."""

import csv
import json
import math

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from make_data import Toy, datasets_path, hopper_dataset, run, toy_dataset

import cql

BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-3, qf_lr=1e-3, cql_alpha=1, max_timesteps=6, online_iterations=50,
    eval_freq=20, log_freq=10, n_episodes=2,
)  # fmt: skip
NOTHING = dict(
    env="null", eval_env="CqlGoal-v0", normalize=False, cql_alpha=0, max_timesteps=0
)
SCORES = {"ref_min_score": -5.0, "ref_max_score": 15.0}


class Goal(Toy):
    """The toy, which tells of success where the point ends near the middle."""

    seeds = []

    def reset(self, seed=None, options=None):
        Goal.seeds.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"success": bool(np.linalg.norm(self.point) < 0.3)}


gym.register("CqlGoal-v0", Goal, max_episode_steps=10)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"), **SCORES)


@pytest.fixture
def go(toy, tmp_path):
    """go(name, **flags): trains in tmp_path / name; returns the directory."""

    def command(name, expected=0, **flags):
        values = {"env": toy, "resume": tmp_path / name, **BASE, **flags}
        status, out, err = run(**{k: v for k, v in values.items() if v is not ...})
        assert status == expected, (status, out, err)
        return tmp_path / name

    return command


def table(directory, name):
    with open(directory / name) as file:
        return list(csv.DictReader(file))


def saved(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


# --- the replay -----------------------------------------------------------------------


def replay_of(toy=None, seeds=(0, 1), **flags):
    config = cql.TrainConfig(
        **{**BASE, "env": toy and str(toy), "seed": list(seeds), **flags}
    )
    data = cql.Dataset(config) if toy else None
    agent = cql.ContinuousCQL(config, 3, 2)
    return cql.Replay(config, data, agent)


def episode(T, first):
    """Numbers that tell where they stand: step t holds first + t."""
    t = first + np.arange(T + 1.0)
    return np.stack([t] * 3, 1), np.stack([t[:-1]] * 2, 1) / 100, t[:-1], t[:-1] == -1


@pytest.mark.parametrize("capacity", [7, 8, 50])
def test_the_first_in_go_first_out(capacity):
    """Against a list; episodes that fill the buffer exactly, and longer ones."""
    replay, kept = replay_of(buffer_size=capacity), []
    for T, first in ((3, 0), (4, 100), (1, 200), (20, 300), (6, 400)):
        replay.add(1, *episode(T, first))
        kept = (kept + [first + t for t in range(T)])[-capacity:]
        size = int(replay.sizes[1])
        assert size == len(kept) and int(replay.sizes[0]) == 0
        rows = ((torch.arange(size) + 0.5) / size).double().expand(2, -1)
        batch = replay.sample(rows)
        assert sorted(batch.rewards[1].tolist()) == sorted(kept)
        assert (batch.observations[1, :, 0] == batch.rewards[1]).all()
        assert (batch.next_observations[1, :, 2] == batch.rewards[1] + 1).all()
        assert torch.allclose(batch.actions[1, :, 0], batch.rewards[1] / 100)


def test_one_buffer_is_uniform_over_data_and_own(toy):
    replay = replay_of(toy)
    n = replay.offline
    replay.add(0, *episode(10, 1000))
    rows = ((torch.arange(n + 10) + 0.5) / (n + 10)).double().expand(2, -1)
    batch = replay.sample(rows)
    mine = batch.rewards >= 1000
    assert mine[0].tolist() == [False] * n + [True] * 10 and not mine[1].any()
    assert batch.rewards[0, n:].tolist() == list(range(1000, 1010))
    data = replay.data.gather(torch.arange(n).unsqueeze(0))
    for ours, theirs in zip(batch[:5], data[:5]):
        assert torch.equal(ours[0, :n], theirs[0])


@pytest.mark.parametrize("ratio, offline", [(0.5, 8), (0.25, 4), (0.0, 0), (1.0, 16)])
def test_mixing_ratio_is_the_offline_share(toy, ratio, offline):
    replay = replay_of(toy, mixing_ratio=ratio)
    rows = torch.rand(2, 16, dtype=torch.float64)
    before = replay.sample(rows)
    assert (before.rewards < 1000).all()  # nothing online yet: all offline
    replay.add(1, *episode(10, 1000))
    batch = replay.sample(rows)
    assert torch.equal(batch.rewards[0], before.rewards[0])
    assert ((batch.rewards[1] < 1000).sum()) == offline
    assert torch.equal(batch.rewards[1, :offline], before.rewards[1, :offline])
    assert before.mc_returns is None  # no cal_ql
    own = replay.sample(torch.rand(2, 8000, dtype=torch.float64)).rewards[1]
    counts = torch.bincount((own[own >= 1000] - 1000).long(), minlength=10)
    expected = 8000 * (1 - ratio) / 10
    assert (counts - expected).abs().max() <= 5 * math.sqrt(expected) + 1e-9


# --- return-to-go ---------------------------------------------------------------------


def loop_returns(rewards, discount):
    return [
        sum(r * discount**k for k, r in enumerate(rewards[t:]))
        for t in range(len(rewards))
    ]


def test_return_to_go_of_the_data(toy):
    """Of transformed rewards, episode by episode: nothing leaks across an end."""
    flags = {"reward_scale": 3.0, "reward_bias": -1.0, "discount": 0.9, "cal_ql": True}
    config = cql.TrainConfig(**{**BASE, **flags, "env": str(toy)})
    data = cql.Dataset(config)
    assert len(data.lengths) > 1
    wanted, first = [], 0
    for length in data.lengths:
        rewards = data.rewards[first : first + length].tolist()
        wanted += loop_returns(rewards, 0.9)
        first += length
    np.testing.assert_allclose(data.mc_returns, wanted, rtol=1e-5)
    ended = cql.returns_to_go(np.array([1.0, 2.0, 4.0]), [0, 1, 0], config, -9.0)
    np.testing.assert_allclose(ended, [1 + 0.9 * 2, 2, 4])  # a termination on the way
    batch = data.gather(torch.tensor([[0, 5, 7]]))
    assert torch.equal(batch.mc_returns[0], data.mc_returns[[0, 5, 7]])


def test_sparse_rewards():
    """An episode of the data's least reward alone is worth r_min / (1 - discount); any
    other reward in it, and it is a plain sum."""
    config = cql.TrainConfig(is_sparse_reward=True, cal_ql=True, discount=0.9)
    failed = cql.returns_to_go(np.full(4, -5.0), np.zeros(4), config, -5.0)
    np.testing.assert_allclose(failed, [-50.0] * 4)
    succeeded = cql.returns_to_go(np.array([-5.0, -5.0, 5.0]), [0, 0, 1], config, -5.0)
    np.testing.assert_allclose(succeeded, loop_returns([-5.0, -5.0, 5.0], 0.9))
    dense = cql.TrainConfig(cal_ql=True, discount=0.9)
    plain = cql.returns_to_go(np.full(4, -5.0), np.zeros(4), dense, -5.0)
    np.testing.assert_allclose(plain, loop_returns([-5.0] * 4, 0.9))


def test_online_episodes_are_transformed_as_the_data(toy):
    flags = {"reward_scale": 3.0, "reward_bias": -1.0, "discount": 0.9, "cal_ql": True}
    replay = replay_of(toy, mixing_ratio=0.0, **flags)
    observations, actions, rewards, ends = episode(5, 0)
    replay.add(0, observations, actions, rewards, ends)
    wanted = loop_returns((rewards * 3 - 1).tolist(), 0.9)
    batch = replay.sample(((torch.arange(5) + 0.5) / 5).double().expand(2, -1))
    np.testing.assert_allclose(batch.rewards[0], rewards * 3 - 1)
    np.testing.assert_allclose(batch.mc_returns[0], wanted, rtol=1e-6)
    offline = replay.data.gather(torch.zeros(1, 1, dtype=torch.long))
    first = replay.sample(torch.zeros(2, 1, dtype=torch.float64))
    assert first.mc_returns[1] == offline.mc_returns[0]  # run 1 has none of its own


def test_an_online_failure_is_known_by_the_data_s_least_reward(toy):
    """Whatever rounding does to a transformed reward."""
    flags = {"reward_bias": -0.1, "discount": 0.9, "cal_ql": True}
    replay = replay_of(toy, is_sparse_reward=True, mixing_ratio=0.0, **flags)
    least = (replay.data.rewards == replay.data.rewards.min()).nonzero()[0, 0]
    raw = toy_rewards(toy)[least]
    observations, actions, _, ends = episode(4, 0)
    replay.add(0, observations, actions, np.full(4, raw), ends)
    wanted = float(replay.data.rewards.min()) / (1 - 0.9)
    np.testing.assert_allclose(replay.own.mc_returns[0, :4], wanted, rtol=1e-5)


def toy_rewards(toy):
    """The raw rewards of the toy data."""
    data = cql.Dataset(cql.TrainConfig(env=str(toy), batch_size=8))
    return data.rewards.numpy()


def test_normalize_reward_holds_online(tmp_path):
    """By the factor of the data's returns, in the environments that have one."""
    data = hopper_dataset(tmp_path)
    config = {**BASE, "env": str(data), "normalize_reward": True, "mixing_ratio": 0.0}
    config = cql.TrainConfig(**config)
    dataset = cql.Dataset(config)
    agent = cql.ContinuousCQL(config, 11, 3)
    replay = cql.Replay(config, dataset, agent)
    observations, rewards = np.zeros((5, 11)), np.arange(4.0)
    replay.add(0, observations, np.zeros((4, 3)), rewards, rewards < 0)
    factor = 1000 / np.ptp(dataset.returns)
    assert abs(factor - 1) > 0.1
    np.testing.assert_allclose(replay.own.rewards[0, :4], rewards * factor, rtol=1e-5)


def test_a_bound_of_minus_infinity_is_cql(toy):
    """Cal-QL is a lower bound in the data; one that bounds nothing changes nothing."""
    config = {"hidden_dim": 8, "cql_n_actions": 3, "cql_backward_actions": 2}
    plain = cql.ContinuousCQL(cql.TrainConfig(**config), 3, 2)
    bounded = cql.ContinuousCQL(cql.TrainConfig(**config, cal_ql=True), 3, 2)
    data = cql.Dataset(cql.TrainConfig(env=str(toy), batch_size=8))
    for _ in range(5):
        noise = plain.draw(8)
        batch = data.sample(noise.rows)
        never = torch.full_like(batch.rewards, -math.inf)
        plain.update(batch, noise)
        bounded.update(batch._replace(mc_returns=never), noise)
    for ours, theirs in zip(plain.parameters(), bounded.parameters()):
        assert torch.equal(ours, theirs)


# --- the phase ------------------------------------------------------------------------


def test_offline_then_online(go):
    directory = go("run", seed="[0,1]", utd=2, cql_alpha_online=0.25)
    checkpoint = saved(directory)
    assert (checkpoint["step"], checkpoint["phase"]) == (56, "online")
    agent = checkpoint["agent"]["_extra_state"]
    assert agent["step"] == 6 + 2 * 50
    online = checkpoint["online"]
    inside = [0 if x is None else len(x[2]) for x in online["partial"]]
    added = online["replay"]["added"].tolist()
    assert [a + b for a, b in zip(added, inside)] == [50, 50]  # every step, once
    steps = [int(row["step"]) for row in table(directory, "evaluations.csv")]
    assert steps == [6, 6, 20, 20, 40, 40, 56, 56]
    rows = table(directory, "metrics.csv")
    assert [int(row["step"]) for row in rows[::2]] == [10, 20, 30, 40, 50, 56]
    # The penalty is weight x gap: its weight shows which alpha was at work.
    weights = [float(r["cql_min_qf1_loss"]) / float(r["cql_qf1_diff"]) for r in rows]
    np.testing.assert_allclose(weights[2:], 0.25, rtol=1e-5)
    assert 0.25 < weights[0] < 1  # six updates at 1, the others at 0.25


def test_returns_and_regret(go):
    directory = go("run", eval_env="CqlGoal-v0", log_freq=4)
    rows = table(directory, "metrics.csv")
    returns = [float(row["train_return"]) for row in rows if row["train_return"]]
    assert len(returns) >= 3
    regret = float(rows[-1]["train_regret"])
    assert 0 <= regret <= 1
    told = [row["train_success"] for row in rows if row["train_return"]]
    assert all(0 <= float(x) <= 1 for x in told)
    evaluations = table(directory, "evaluations.csv")
    assert all(0 <= float(row["success_rate"]) <= 1 for row in evaluations)
    assert evaluations[0]["eval_regret"] == ""  # step 6 is the last of offline
    rates = [float(row["success_rate"]) for row in evaluations[1:]]
    for n, row in enumerate(evaluations[1:], 1):
        expected = 1 - np.mean(rates[:n])
        assert float(row["eval_regret"]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_regret_by_score_where_nobody_tells_of_success(go):
    directory = go("run", log_freq=4)
    evaluations = table(directory, "evaluations.csv")
    assert all(row["success_rate"] == "" for row in evaluations)
    scores = [float(row["d4rl_normalized_score"]) for row in evaluations[1:]]
    for n, row in enumerate(evaluations[1:], 1):
        expected = 1 - np.mean(scores[:n]) / 100
        assert float(row["eval_regret"]) == pytest.approx(expected, rel=1e-5)
    rows = table(directory, "metrics.csv")
    returns = [float(row["train_return"]) for row in rows if row["train_return"]]
    scores = [5 * x + 25 for x in returns]  # one episode in a row, at most
    assert float(rows[-1]["train_regret"]) == pytest.approx(1 - np.mean(scores) / 100)


def test_training_and_evaluation_have_their_own_seeds(go):
    Goal.seeds.clear()
    go("run", eval_env="CqlGoal-v0", eval_seed=3)
    first = [seed for seed in Goal.seeds if seed is not None]
    assert len(set(first)) == len(first)  # no two episodes start alike
    Goal.seeds.clear()
    go("again", eval_env="CqlGoal-v0", eval_seed=4)
    second = [seed for seed in Goal.seeds if seed is not None]
    common = set(first) & set(second)
    assert common and len(common) < len(first)  # training's stay, evaluation's move


def test_a_time_limit_bootstraps(go):
    directory = go("run", eval_env="CqlGoal-v0", online_iterations=60)
    own = saved(directory)["online"]["replay"]["own"]
    ends = own[4][0]
    assert 0 < len(ends) and ends.sum() < 60 / 10  # episodes end mostly by the limit
    after, here = own[3][0][:-1], own[0][0][1:]
    jumps = (after != here).any(1)
    assert jumps.any()  # a next observation is its own episode's


def test_a_stacked_run_equals_its_solo_run(go):
    stacked = go("stacked", seed="[3,5]", cql_alpha="[0.5,2]")
    solo = go("solo", seed=5, cql_alpha=0.5)
    rows = [r for r in table(stacked, "metrics.csv") if r["run"] == "2"]
    for ours, theirs in zip(rows, table(solo, "metrics.csv"), strict=True):
        for name in set(ours) - {"run"}:
            assert float(ours[name] or 0) == pytest.approx(
                float(theirs[name] or 0), rel=1e-3, abs=1e-4
            ), name


@pytest.mark.parametrize("stop", [4, 6, 26, 41])
def test_resume_inside_either_phase(go, stop):
    """Offline exactly; online every transition before the checkpoint is there, the
    counts go on, and each step stands in the tables once."""
    short = {"max_timesteps": 4, "online_iterations": 0}
    if stop >= 6:
        short = {"online_iterations": stop - 6}
    go("run", **short)
    directory = go("run")
    checkpoint = saved(directory)
    online = checkpoint["online"]
    inside = sum(len(x[2]) for x in online["partial"] if x is not None)
    assert int(online["replay"]["added"][0]) + inside == 50
    assert checkpoint["agent"]["_extra_state"]["step"] == 56
    for name in ("metrics.csv", "evaluations.csv"):
        steps = [int(row["step"]) for row in table(directory, name)]
        assert steps == sorted(set(steps)) and steps[-1] == 56
    if stop > 6:  # no episode starts as one before did
        starts = [x[0] for x in first_observations(checkpoint)]
        assert len(set(starts)) == len(starts) > 1
    if stop <= 6:
        whole = go("whole")
        for name in ("metrics.csv", "evaluations.csv"):
            assert (whole / name).read_text() == (directory / name).read_text()


def first_observations(checkpoint):
    """Of each online episode in the replay, going by the jumps."""
    own = checkpoint["online"]["replay"]["own"]
    here, after = own[0][0], own[3][0]
    ends = (here[1:] != after[:-1]).any(1).nonzero().flatten()
    jumps = [0, *(1 + ends).tolist()]
    return [tuple(here[i].tolist()) for i in jumps]


@pytest.mark.parametrize("weight", [0.25, 0.0])
def test_the_online_weight_survives_a_resume(go, weight):
    flags = {"cql_alpha_online": weight, "log_freq": 5}
    go("run", online_iterations=24, **flags)
    directory = go("run", **flags)
    rows = [r for r in table(directory, "metrics.csv") if int(r["step"]) > 30]
    weights = [float(r["cql_min_qf1_loss"]) / float(r["cql_qf1_diff"]) for r in rows]
    np.testing.assert_allclose(weights, weight, rtol=1e-5)


def test_online_actions_are_sampled(go):
    """They differ from the deterministic ones of the policy that made them, whose
    learning rate is zero here."""
    directory = go("run", policy_lr=0)
    own = saved(directory)["online"]["replay"]["own"]
    policy = cql.load_policy(directory)
    actions = torch.as_tensor(policy(own[0][0].numpy()))
    difference = (own[1][0] - actions).abs().mean(0)
    assert (difference > 0.05).all()


def test_success_is_told_anew_in_each_episode(go, monkeypatch):
    """One success, in the second episode, is one success."""

    def step(self, action):
        *rest, _ = Toy.step(self, action)
        done = len(Goal.seeds) == before[0] + 2 and self.training
        return *rest, {"success": done}

    def reset(self, seed=None, options=None):
        Goal.seeds.append(seed)
        self.training = True
        return Toy.reset(self, seed=seed)

    monkeypatch.setattr(Goal, "step", step)
    monkeypatch.setattr(Goal, "reset", reset)
    before = [len(Goal.seeds) + 2]  # after the evaluation at the offline phase's end
    directory = go("run", eval_env="CqlGoal-v0", eval_freq=1000, log_freq=100)
    (row,) = table(directory, "metrics.csv")
    episodes = len(first_observations(saved(directory)))
    rate = float(row["train_success"])
    assert episodes >= 4 and rate <= 1 / (episodes - 2) and rate > 0
    assert float(row["train_regret"]) == pytest.approx(1 - rate)


def test_a_run_that_diverges_online_stops_alone(go, monkeypatch):
    step = cql.Online.step

    def poisoned(online, alive):
        if online.begun[1] == 2:
            with torch.no_grad():
                online.agent.policy.layers[0].weight[1].fill_(math.nan)
        step(online, alive)

    monkeypatch.setattr(cql.Online, "step", poisoned)
    directory = go("run", expected=3, seed="[0,1]")
    steps = [row["step"] for row in table(directory, "metrics.csv") if row["run"] == "0"]
    assert steps[-1] == "56"


def test_fewer_columns_after_a_resume_keep_the_rows(go):
    """The online phase announced, stopped before it, taken back, announced again."""
    flags = {"eval_freq": 4, "log_freq": 4}
    stopped = {"max_timesteps": 8, "online_iterations": 0}
    go("run", **flags, **{**stopped, "online_iterations": 4})
    directory = go("run", **flags, **{**stopped, "online_iterations": 12})
    for name in ("metrics.csv", "evaluations.csv"):
        steps = [int(row["step"]) for row in table(directory, name)]
        assert steps == [4, 8, 12, 16, 20], name
    tables = cql.Table(directory, "metrics.csv")
    tables.keep(20)
    tables.append([{"step": 24, "run": 0}])  # a row without the last columns
    rows = cql.Table(directory, "metrics.csv").keep(24)
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 20, 24]


def test_online_needs_the_offline_updates_first(go, capsys):
    go("run", max_timesteps=20, online_iterations=0)
    go("run", expected=2, max_timesteps=10, online_iterations=20)


def test_the_training_environment_stays(go):
    go("run", eval_env="CqlGoal-v0", online_iterations=20)
    go("run", expected=2, eval_env="CqlToy-v0")


def test_a_model_from_nothing_is_evaluated(go, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"env": "null", "eval_env": "CqlGoal-v0", "normalize": False, "cql_alpha": 0}
    model = go("run", max_timesteps=0, **flags)
    command = {"load_model": model, "max_timesteps": 0, "device": "cpu"}
    status, out, err = run(resume=tmp_path / "evaluated", n_episodes=3, **command)
    assert status == 0, err
    assert len(table(tmp_path / "evaluated", "evaluations.csv")) == 1


def test_a_checkpoint_holds_what_was_gathered_only():
    replay = replay_of(online_iterations=200_000)
    replay.add(0, *episode(10, 0))
    stored = sum(x.untyped_storage().nbytes() for x in replay.state()["own"])
    assert stored < 2 * 10 * 4 * 30


def test_an_offline_run_gets_the_columns_of_an_online_one(go):
    directory = go("run", online_iterations=0, max_timesteps=20)
    head = (directory / "evaluations.csv").read_text().splitlines()[0]
    assert head.endswith("d4rl_normalized_score")
    go("run", max_timesteps=20, online_iterations=20)
    rows = table(directory, "evaluations.csv")
    assert [int(row["step"]) for row in rows] == [20, 40]
    assert rows[0]["eval_regret"] == "" and float(rows[1]["eval_regret"])
    assert all(None not in row and None not in row.values() for row in rows)


def test_fine_tuning_from_an_offline_checkpoint(go, tmp_path):
    offline = go("offline", online_iterations=0, cql_alpha="[1,5]")
    flags = {"load_model": offline, "max_timesteps": 0, "cql_alpha": ...}
    directory = go("fine", online_iterations=20, **flags)
    steps = [int(row["step"]) for row in table(directory, "metrics.csv")]
    assert steps == [10, 10, 20, 20]
    before, after = (saved(x)["agent"] for x in (offline, directory))
    assert not torch.equal(
        before["policy.layers.0.weight"], after["policy.layers.0.weight"]
    )
    assert torch.equal(before["observation_mean"], after["observation_mean"])


def test_plain_sac_from_nothing(go, tmp_path, monkeypatch):
    """Uniform actions until there is a batch; then updates on what was gathered."""
    monkeypatch.chdir(tmp_path)
    flags = {"env": "null", "eval_env": "CqlGoal-v0", "normalize": False, "cql_alpha": 0}
    directory = go("run", max_timesteps=0, batch_size=30, **flags)
    checkpoint = saved(directory)
    updates = checkpoint["agent"]["_extra_state"]["step"]
    assert 0 < updates <= 50 - 30
    actions = checkpoint["online"]["replay"]["own"][1][0][:25]
    assert actions.max() > 0.7 and actions.min() < -0.7 and actions.abs().max() <= 1
    assert table(directory, "metrics.csv")[-1]["qf1_loss"]
    policy = cql.load_policy(directory)
    assert policy(np.zeros(3)).shape == (2,)


@pytest.mark.parametrize("form", ["directory", "relative", "id"])
def test_recorded_episodes_are_a_dataset(go, tmp_path, form, monkeypatch):
    """Raw rewards and actions, whole; cql.py trains on them."""
    monkeypatch.chdir(tmp_path)
    name = "mine/toy-v0" if form == "id" else "./mine/toy-v0"
    name = str(tmp_path / name) if form == "directory" else name
    flags = {"reward_scale": 3.0, "record_dataset": name, "seed": "[0,1]"}
    with datasets_path(tmp_path / "minari"):
        directory = go("run", online_iterations=60, **flags)
        config = cql.TrainConfig(env=name, batch_size=8)
        data = cql.Dataset(config)
        assert data.task.env_id == "CqlToy-v0" and data.task.reference == [-5.0, 15.0]
    online = saved(directory)["online"]
    assert int(data.lengths.sum()) == 2 * 60  # the cut ones too
    own = online["replay"]["own"]
    n = [int(x) for x in online["replay"]["added"]]
    rewards = [own[2][r][: n[r]] for r in range(2)]
    rewards += [3 * x[2] for x in online["partial"] if x is not None]
    rewards = sorted(torch.cat(rewards).tolist())
    assert sorted((3 * data.rewards).tolist()) == pytest.approx(rewards)
    if form == "id":
        with datasets_path(tmp_path / "minari"):
            assert minari.load_dataset(name).total_episodes == len(data.lengths)


def test_a_longer_run_does_not_pass_over_its_recording(go, tmp_path):
    name = tmp_path / "mine/toy-v0"
    flags = {"record_dataset": str(name)}
    go("run", online_iterations=20, **flags)
    go("run", online_iterations=20, **flags)  # nothing new
    go("run", expected=1, online_iterations=40, **flags)
    name.rename(tmp_path / "mine/old-v0")
    go("run", online_iterations=40, **flags)
    steps = [minari_steps(tmp_path / "mine" / x) for x in ("old-v0", "toy-v0")]
    assert steps == [20, 40]


def minari_steps(directory):
    return json.loads((directory / "data/metadata.json").read_text())["total_steps"]


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ({"env": "null"}, "--eval_env"),
        (
            {"env": "null", "eval_env": "CqlGoal-v0", "normalize": False},
            "--max_timesteps",
        ),
        (
            {"env": "null", "eval_env": "CqlGoal-v0", "max_timesteps": 0},
            "--normalize must be false",
        ),
        (
            {"env": "null", "eval_env": "CqlGoal-v0", "online_iterations": 0},
            "--online_iterations",
        ),
        ({"record_dataset": "mine"}, "--record_dataset"),
        ({"record_dataset": "./a.b/c"}, "--record_dataset"),
        ({"record_dataset": "a.b/c-v0"}, "--record_dataset"),
        ({"record_dataset": ""}, "--record_dataset"),
        ({"record_dataset": "/proc/x/y-v0"}, "--record_dataset"),
        ({"mixing_ratio": 1}, "--mixing_ratio"),
        ({"mixing_ratio": 0}, "--mixing_ratio"),
        ({"buffer_size": 4}, "--buffer_size"),
        ({"buffer_size": 10**12, "online_iterations": 10**12}, "--buffer_size"),
        (
            {**NOTHING, "online_iterations": 20, "batch_size": 30},
            "--online_iterations",
        ),
        ({"record_dataset": "mine-v0", "online_iterations": 0}, "--online_iterations"),
        ({"mixing_ratio": -0.5}, "--mixing_ratio"),
        ({"utd": 0}, "--utd"),
    ],
)
def test_flags_that_contradict(toy, refused, flags, fragment):
    refused(None, fragment, **{"env": toy, **BASE, **flags})


def test_a_recording_does_not_overwrite(toy, refused, tmp_path):
    (tmp_path / "old-v0").mkdir()
    refused(None, "exists", env=toy, record_dataset="./old-v0", **BASE)


def test_an_environment_that_fails(go, monkeypatch):
    def fail(self, action):
        raise ValueError("broken gripper")

    go("run", max_timesteps=40, online_iterations=0)
    monkeypatch.setattr(Goal, "step", fail)
    flags = {"eval_env": "CqlGoal-v0", "max_timesteps": 40}
    directory = go("run", expected=1, online_iterations=20, **flags)
    assert saved(directory)["step"] == 40
