"""Tests of the online phase: replay, environments, Cal-QL's returns, resume."""

import csv
import math
from fractions import Fraction

import gymnasium as gym
import numpy as np
import pytest
import torch
from make_data import (
    Toy,
    d4rl_file,
    hopper_dataset,
    minari_dataset,
    random_episodes,
    rollout,
    run,
    toy_dataset,
)
from reference import scrambled, trained
from test_runs import differences

import cql

BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-3, qf_lr=1e-3, cql_alpha=1, max_timesteps=6, online_iterations=50,
    eval_freq=20, log_freq=10, n_episodes=2,
)  # fmt: skip
NOTHING = dict(
    env="null", eval_env="CqlGoal-v0", normalize=False, cql_alpha=0, max_timesteps=0
)
CALIBRATED = dict(cal_ql=True, reward_scale=3.0, reward_bias=-1.0, discount=0.9)
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


class Single(Toy):
    """A simulator of which there can be `allowed` at a time."""

    allowed, opened = 1, 0

    def __init__(self, **kwargs):
        if Single.opened >= Single.allowed:
            raise RuntimeError("one instance only")
        Single.opened += 1
        super().__init__(**kwargs)

    def close(self):
        Single.opened -= 1


class Dial(gym.Env):
    """Turned by whole numbers, 2 to 4; the actions that it gets are noted."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Discrete(3, start=2)
    got = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.dial = self.np_random.normal(size=3)
        return self.dial.astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        Dial.got.append(int(action))
        self.dial = np.roll(self.dial, 1) + [0.3 * (action - 3), 0, 0]
        return self.dial.astype(np.float32), float(-abs(self.dial[0])), False, False, {}


gym.register("CqlDial-v0", f"{__name__}:Dial", max_episode_steps=10)
gym.register("CqlGoal-v0", Goal, max_episode_steps=10)
# The point moves so little that only the limit ends an episode.
gym.register("CqlTen-v0", Goal, max_episode_steps=10, kwargs={"push": 0.02})
gym.register("CqlLong-v0", Goal, max_episode_steps=99, kwargs={"push": 0.002})
gym.register("CqlOneAtATime-v0", Single, max_episode_steps=10)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"), **SCORES)


@pytest.fixture(scope="module")
def dial(tmp_path_factory):
    env = gym.make("CqlDial-v0")
    root = tmp_path_factory.mktemp("dial")
    return minari_dataset(root, "dial/random-v0", rollout(env, 6), env=env)


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


def replay_columns(directory):
    return saved(directory)["replay"]["columns"]


def n_updates(directory):
    return saved(directory)["updates"]


def test_rewards_of_an_environment():
    """An array of one number is a number (gym issue 3129); other shapes are named."""

    class Env:
        def step(self, action):
            return np.zeros(2), self.reward, False, False, {}

    player = cql.Player(Env())
    player.rewards = []
    player.success = None
    for reward in (1.5, np.array([1.5]), np.float32(1.5), np.array(1.5), [1.5]):
        player.env.reward = reward
        player.step(0)
    assert player.rewards == [1.5] * 5
    player.env.reward = np.zeros(2)
    with pytest.raises(ValueError, match=r"reward of shape \(2,\)"):
        player.step(0)
    for reward in (None, "1"):
        player.env.reward = reward
        with pytest.raises(ValueError, match="reward of .* type .* one number"):
            player.step(0)


# --- the replay -----------------------------------------------------------------------


def dataset(path, **flags):
    config = cql.TrainConfig(**{**BASE, "env": str(path), **flags})
    return cql.Dataset(config, *cql.read_data(config))


def replay_of(toy=None, seeds=(0, 1), **flags):
    config = cql.TrainConfig(
        **{**BASE, "env": toy and str(toy), "seed": list(seeds), **flags}
    )
    data = dataset(toy, **flags) if toy else None
    boxes = gym.spaces.Box(-2, 2, (3,)), gym.spaces.Box(-1, 1, (2,))
    agent = cql.make_agent(config, cql.make_task(*boxes))
    return cql.Replay(config, data, agent)


def add_steps(replay, r, rewards):
    """Add a transition for each reward; all its numbers follow from the reward."""
    for reward in rewards:
        transition = {
            "observations": np.full((1, 3), reward),
            "actions": np.full((1, 2), reward / 1000),
            "rewards": np.array([reward]),
            "next_observations": np.full((1, 3), reward + 1),
            "terminations": np.array([reward % 10 == 9]),
        }
        replay.add([r], transition)


def every(n, n_runs=2):
    """Fractions that select each of n rows once, in order."""
    return ((torch.arange(n) + 0.5) / n).double().expand(n_runs, -1)


@pytest.mark.parametrize("capacity", [7, 8, 50])
def test_the_first_in_go_first_out(capacity):
    """Against a list, step by step, until the ring is overwritten; run 0 has none."""
    replay, kept = replay_of(buffer_size=capacity), []
    for reward in range(30):
        add_steps(replay, 1, [reward])
        kept = (kept + [reward])[-capacity:]
        assert replay.filled.tolist() == [[0], [len(kept)]]
        batch = replay.sample(every(len(kept)))
        rewards = batch["rewards"][1]
        assert sorted(rewards.tolist()) == kept
        assert (batch["observations"][1] == rewards.unsqueeze(1)).all()
        assert (batch["next_observations"][1] == rewards.unsqueeze(1) + 1).all()
        assert torch.allclose(batch["actions"][1, :, 1], rewards / 1000)
        assert torch.equal(batch["terminations"][1], (rewards % 10 == 9).float())
        assert batch.keys() == set(cql.COLUMNS[:5])  # mc_returns only with cal_ql
    places = replay.columns["rewards"][1].tolist()
    assert [places[reward % capacity] for reward in kept] == kept


def test_one_buffer_is_uniform_over_data_and_own(toy):
    replay = replay_of(toy)
    n = len(replay.data)
    add_steps(replay, 0, range(1000, 1010))
    batch = replay.sample(every(n + 10))
    online = batch["rewards"] >= 1000
    assert online[0].tolist() == [False] * n + [True] * 10 and not online[1].any()
    assert batch["rewards"][0, n:].tolist() == list(range(1000, 1010))
    data = replay.data.gather(torch.arange(n).unsqueeze(0))
    for name in replay.columns:
        assert torch.equal(batch[name][0, :n], data[name][0]), name


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1, 0.7, 0.05, 0.95])
@pytest.mark.parametrize("batch_size", [8, 20, 256])
def test_any_first_rows_hold_both_sources_in_proportion(ratio, batch_size):
    """Row p is offline where floor((p + 1) r) > floor(p r), in exact numbers."""
    config = cql.TrainConfig(mixing_ratio=ratio, batch_size=batch_size)
    places = cql.offline_places(config).tolist()
    exact = Fraction(str(ratio))
    assert len(places) == batch_size
    for n in range(batch_size + 1):
        assert sum(places[:n]) == math.floor(n * exact), n
    assert cql.n_online_rows(config) == batch_size - sum(places)


@pytest.mark.parametrize("ratio, n_online", [(0.5, 4), (0.25, 6), (0.8, 2)])
def test_mixing_ratio_is_the_offline_share(toy, ratio, n_online):
    """All rows are offline until a run holds the online share of a batch."""
    replay, fractions = replay_of(toy, mixing_ratio=ratio), every(8)
    offline = replay.data.gather(replay.data.index(fractions))["rewards"]
    for added in range(n_online):
        assert torch.equal(replay.sample(fractions)["rewards"], offline), added
        add_steps(replay, 1, [1000 + added])
    rewards = replay.sample(fractions)["rewards"]
    places = cql.offline_places(replay.config)
    assert torch.equal(rewards[0], offline[0])
    assert torch.equal(rewards[1] < 1000, places)
    assert torch.equal(rewards[1][places], offline[1][places])


def test_either_source_is_drawn_from_uniformly(toy):
    replay = replay_of(toy, mixing_ratio=0.25, batch_size=40, online_iterations=100)
    add_steps(replay, 1, range(1000, 1100))
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(200):
        fractions = torch.rand(2, 40, dtype=torch.float64, generator=generator)
        drawn.append(replay.sample(fractions)["rewards"][1])
    drawn = torch.cat(drawn)
    own = drawn[drawn >= 1000].long() - 1000
    assert len(own) == 6000
    counts = torch.bincount(own, minlength=100)
    assert (counts - 60).abs().max() <= 5 * math.sqrt(60)


def test_a_checkpoint_holds_what_was_gathered_only():
    replay = replay_of(online_iterations=200_000)
    add_steps(replay, 0, range(10))
    state = replay.state()
    stored = [x.untyped_storage().nbytes() for x in state["columns"].values()]
    assert sum(stored) < 2 * 10 * 4 * 30
    other = replay_of(online_iterations=200_000)
    other.load(state)
    ours, theirs = (each.sample(every(10))["rewards"] for each in (replay, other))
    assert torch.equal(ours, theirs)
    assert other.added.tolist() == [10, 0] and other.filled.tolist() == [[10], [0]]


# --- return-to-go ---------------------------------------------------------------------


def loop_returns(rewards, discount):
    returns = []
    for t in range(len(rewards)):
        later = rewards[t:]
        returns.append(sum(r * discount**k for k, r in enumerate(later)))
    return returns


def test_return_to_go_of_the_data(toy):
    """Returns-to-go are of transformed rewards and end with their episode."""
    data = dataset(toy, **CALIBRATED)
    assert len(data.lengths) > 1
    raw = dataset(toy).columns["rewards"]
    rewards, returns = data.columns["rewards"], data.columns["mc_returns"]
    torch.testing.assert_close(rewards, raw * 3 - 1)
    wanted, first = [], 0
    for length in data.lengths:
        wanted += loop_returns(rewards[first : first + length].tolist(), 0.9)
        first += length
    np.testing.assert_allclose(returns, wanted, rtol=1e-5, atol=1e-6)
    batch = data.gather(torch.tensor([[0, 5, 7]]))
    assert torch.equal(batch["mc_returns"][0], returns[[0, 5, 7]])
    ended = cql.returns_to_go(
        np.array([1.0, 2.0, 4.0]), [0, 1, 0], cql.TrainConfig(discount=0.9), -9.0
    )
    np.testing.assert_allclose(ended, [1 + 0.9 * 2, 2, 4])  # a termination on the way


def test_sparse_rewards():
    """An episode in which every reward is the dataset's minimum has the return
    r_min / (1 - discount); any other episode has a plain sum."""
    sparse = cql.TrainConfig(is_sparse_reward=True, cal_ql=True, discount=0.9)
    dense = cql.TrainConfig(cal_ql=True, discount=0.9)
    failed = np.full(4, -5.0)
    worth = cql.returns_to_go(failed, np.zeros(4), sparse, -5.0)
    np.testing.assert_allclose(worth, [-50.0] * 4)
    plain = cql.returns_to_go(failed, np.zeros(4), dense, -5.0)
    np.testing.assert_allclose(plain, loop_returns(failed, 0.9))
    for rewards in ([-5.0, -5.0, 5.0], [5.0, -5.0, -5.0], [-4.0] * 3):
        worth = cql.returns_to_go(np.array(rewards), [0, 0, 1], sparse, -5.0)
        np.testing.assert_allclose(worth, loop_returns(rewards, 0.9))


def test_the_bound_comes_with_the_end_of_the_episode(toy):
    """Until then it is -inf, which bounds nothing; other runs' bounds do not change."""
    replay = replay_of(toy, **CALIBRATED)
    raw = dataset(toy).columns["rewards"].tolist()[:5]
    for t, reward in enumerate(raw, 1):
        add_steps(replay, 0, [reward])
        add_steps(replay, 1, [reward])
        assert (replay.columns["mc_returns"][:, :t] == -math.inf).all()
    replay.end_episode(0, raw)
    rewards, returns = replay.columns["rewards"], replay.columns["mc_returns"]
    wanted = loop_returns(rewards[0, :5].tolist(), 0.9)
    np.testing.assert_allclose(returns[0, :5], wanted, rtol=1e-6)
    assert (returns[1, :5] == -math.inf).all()
    add_steps(replay, 0, [7.0])
    assert returns[0, 5] == -math.inf
    np.testing.assert_allclose(returns[0, :5], wanted, rtol=1e-6)


def test_online_numbers_are_the_data_s(tmp_path):
    """Rewards and returns-to-go of the same episode, to the last bit of float32."""
    (episode,) = random_episodes([30], ends="terminal")
    file = d4rl_file(tmp_path / "x.hdf5", [episode])
    flags = {**CALIBRATED, "reward_bias": -0.1}
    replay = replay_of(file, **flags)
    for reward in episode["rewards"]:
        add_steps(replay, 0, [reward])
    replay.end_episode(0, episode["rewards"].tolist())
    for name in ("rewards", "mc_returns"):
        ours, theirs = replay.columns[name][0, :30], replay.data.columns[name]
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("length", [3, 10, 25])
def test_the_bound_is_filled_in_for_rows_that_are_still_there(length):
    """In a ring of ten: an episode that wraps, one that fills it, and a longer one."""
    replay = replay_of(buffer_size=10, **CALIBRATED)
    add_steps(replay, 1, range(100, 108))  # an earlier episode
    replay.end_episode(1, list(range(100, 108)))
    before = dict(zip(range(100, 108), replay.columns["mc_returns"][1].tolist()))
    rewards = [float(r) for r in range(200, 200 + length)]
    add_steps(replay, 1, rewards)
    replay.end_episode(1, rewards)
    wanted = dict(zip(rewards, loop_returns([3 * r - 1 for r in rewards], 0.9)))
    kept = [*range(100, 108), *rewards][-10:]
    for reward in kept:
        place = (replay.columns["rewards"][1] == 3 * reward - 1).nonzero().item()
        found = replay.columns["mc_returns"][1, place].item()
        assert found == pytest.approx({**before, **wanted}[reward], rel=1e-6), reward
    assert (replay.columns["mc_returns"][0] == 0).all()


def test_an_online_failure_is_known_by_the_data_s_least_reward(toy):
    """Whatever rounding does to a transformed reward."""
    flags = {"reward_bias": -0.1, "discount": 0.9, "cal_ql": True}
    replay = replay_of(toy, is_sparse_reward=True, **flags)
    raw = float(dataset(toy).columns["rewards"].min())
    add_steps(replay, 0, [raw] * 4)
    replay.end_episode(0, [raw] * 4)
    wanted = replay.data.r_min / (1 - 0.9)
    np.testing.assert_allclose(replay.columns["mc_returns"][0, :4], wanted, rtol=1e-6)
    add_steps(replay, 0, [raw, raw + 1])
    replay.end_episode(0, [raw, raw + 1])
    assert (replay.columns["mc_returns"][0, 4:6] > wanted / 2).all()


def test_normalize_reward_holds_online(tmp_path):
    """By the factor of the data's returns, in the environments that have one."""
    path = hopper_dataset(tmp_path, episodes=4)
    flags = {**BASE, "env": str(path), "normalize_reward": True}
    config = cql.TrainConfig(**flags)
    episodes, task = cql.read_data(config)
    data = cql.Dataset(config, episodes, task)
    replay = cql.Replay(config, data, cql.make_agent(config, task))
    factor = 1000 / np.ptp(data.returns)
    assert abs(factor - 1) > 0.1
    transition = {
        "observations": np.zeros((1, 11)),
        "actions": np.zeros((1, 3)),
        "rewards": np.array([2.0]),
        "next_observations": np.zeros((1, 11)),
        "terminations": np.array([False]),
    }
    replay.add([0], transition)
    assert float(replay.columns["rewards"][0, 0]) == pytest.approx(2 * factor)


def test_a_bound_of_minus_infinity_is_cql(toy):
    """Cal-QL with lower bounds of -inf equals CQL."""
    flags = {**BASE, "env": str(toy), "cql_backward_actions": 2, "cql_states": 3}
    agents = []
    for cal_ql in (False, True):
        config = cql.TrainConfig(**flags, cal_ql=cal_ql)
        agents.append(cql.make_agent(config, cql.read_data(config)[1]))
    data = dataset(toy)
    for update in range(5):
        noise = agents[0].draw(update, 8)
        batch = data.gather(data.index(noise["fractions"]))
        never = torch.full_like(batch["rewards"], -math.inf)
        agents[0].update(batch, noise)
        agents[1].update({**batch, "mc_returns": never}, noise)
    torch.testing.assert_close(trained(agents[0]), trained(agents[1]), rtol=0, atol=0)


# --- the phase ------------------------------------------------------------------------


def test_offline_then_online(go):
    directory = go("run", seed="[0,1]", utd=2, cql_alpha_online=0.25)
    checkpoint = saved(directory)
    assert checkpoint["step"] == 56
    assert n_updates(directory) == 6 + 2 * 50
    assert checkpoint["replay"]["added"] == [50, 50]
    steps = [int(row["step"]) for row in table(directory, "evaluations.csv")]
    assert steps == [6, 6, 20, 20, 40, 40, 56, 56]
    rows = table(directory, "metrics.csv")
    assert [int(row["step"]) for row in rows[::2]] == [10, 20, 30, 40, 50, 56]
    # The penalty is weight x gap: its weight shows which alpha was at work.
    weights = [float(r["cql_min_qf1_loss"]) / float(r["cql_qf1_diff"]) for r in rows]
    np.testing.assert_allclose(weights[2:], 0.25, rtol=1e-5)
    assert 0.25 < weights[0] < 1  # six updates at 1, the others at 0.25


def test_an_episode_longer_than_the_phase_is_learned_from(go):
    """Its only episode has not ended when the phase does."""
    alone = go("alone", online_iterations=0, max_timesteps=56, eval_env="none")
    flags = {"eval_env": "CqlLong-v0", "cal_ql": True, "mixing_ratio": 0.25}
    directory = go("run", **flags)
    checkpoint = saved(directory)
    online = checkpoint["online"]
    assert online["finished"] == [[]] and online["begun"] == [1]
    assert checkpoint["replay"]["added"] == [50] and n_updates(directory) == 56
    columns = replay_columns(directory)
    assert (columns["mc_returns"] == -math.inf).all()
    here, after = columns["observations"][0], columns["next_observations"][0]
    assert torch.equal(here[1:], after[:-1])
    weights = [saved(x)["agent"]["critic.net.0.weight"] for x in (alone, directory)]
    assert not torch.equal(*weights)
    assert table(directory, "metrics.csv")[-1]["qf1_loss"]


def test_plain_sac_from_nothing(go):
    """Uniform actions until there is a batch; then an update a step on what was
    gathered, in an episode that has not ended."""
    directory = go("run", batch_size=30, **{**NOTHING, "eval_env": "CqlLong-v0"})
    assert n_updates(directory) == 50 - 29
    actions = replay_columns(directory)["actions"][0, :29]
    assert actions.max() > 0.7 and actions.min() < -0.7 and actions.abs().max() <= 1
    rows = table(directory, "metrics.csv")
    assert [bool(row["qf1_loss"]) for row in rows] == [False] * 2 + [True] * 3
    assert cql.load_policy(directory)(np.zeros(3)).shape == (2,)


def test_a_model_from_nothing_is_evaluated(go, tmp_path):
    model = go("run", **NOTHING)
    flags = {"load_model": model, "max_timesteps": 0, "device": "cpu"}
    status, out, err = run(resume=tmp_path / "evaluated", n_episodes=3, **flags)
    assert status == 0, err
    (row,) = table(tmp_path / "evaluated", "evaluations.csv")
    assert row["episodes"] == "3"


def test_fine_tuning_from_an_offline_checkpoint(go):
    offline = go("offline", online_iterations=0, cql_alpha="[1,5]")
    flags = {"load_model": offline, "max_timesteps": 0, "cql_alpha": ...}
    directory = go("fine", online_iterations=20, **flags)
    steps = [int(row["step"]) for row in table(directory, "metrics.csv")]
    assert steps == [10, 10, 20, 20]
    before, after = (saved(x)["agent"] for x in (offline, directory))
    name = "policy.net.0.weight"
    assert not torch.equal(before[name], after[name])
    name = "units.observation_mean"
    assert torch.equal(before[name], after[name])


def test_training_and_evaluation_have_their_own_seeds(go):
    Goal.seeds.clear()
    go("run", eval_env="CqlGoal-v0", eval_seed=3)
    first = list(Goal.seeds)
    assert None not in first and len(set(first)) == len(first)  # no two starts alike
    Goal.seeds.clear()
    go("again", eval_env="CqlGoal-v0", eval_seed=4)
    common = set(first) & set(Goal.seeds)
    assert common and len(common) < len(first)  # training's stay, evaluation's move


def test_a_time_limit_bootstraps(go):
    directory = go("run", eval_env="CqlTen-v0")
    columns = replay_columns(directory)
    assert not columns["terminations"].any()
    here, after = columns["observations"][0], columns["next_observations"][0]
    jumps = (after[:-1] != here[1:]).any(1).nonzero().flatten() + 1
    assert jumps.tolist() == [10, 20, 30, 40]  # a next observation is its own episode's


def test_a_stacked_run_equals_its_solo_run(go):
    stacked = go("stacked", seed="[3,5]", cql_alpha="[0.5,2]")
    solo = go("solo", seed=5, cql_alpha=0.5)
    rows = [r for r in table(stacked, "metrics.csv") if r["run"] == "2"]
    for ours, theirs in zip(rows, table(solo, "metrics.csv"), strict=True):
        for name in set(ours) - {"run"}:
            assert float(ours[name] or 0) == pytest.approx(
                float(theirs[name] or 0), rel=1e-3, abs=1e-4
            ), name


def test_an_environment_that_fails(go, monkeypatch):
    step = Goal.step

    taken = []

    def fail(self, action):
        taken.append(action)
        if len(taken) == 4:  # not in the first step, in which it is tried
            raise ValueError("broken gripper")
        return step(self, action)

    flags = {"eval_env": "CqlGoal-v0", "max_timesteps": 40}
    go("run", online_iterations=0, **flags)
    monkeypatch.setattr(Goal, "step", fail)
    directory = go("run", expected=1, online_iterations=20, **flags)
    assert saved(directory)["step"] == 40


def test_the_phase_takes_an_environment_of_its_own(go, monkeypatch):
    """One for training beside one for evaluation, all closed at the end; where there is
    only one, evaluation is possible and the phase is not."""
    flags = {"eval_env": "CqlOneAtATime-v0", "max_timesteps": 6}
    monkeypatch.setattr(Single, "allowed", 1)
    monkeypatch.setattr(Single, "opened", 0)
    go("offline", online_iterations=0, **flags)
    assert Single.opened == 0
    directory = go("refused", expected=2, **flags)
    assert not directory.exists()
    monkeypatch.setattr(Single, "allowed", 2)
    monkeypatch.setattr(Single, "opened", 0)
    go("online", **flags)
    assert Single.opened == 0


def test_a_run_that_diverges_online_stops_alone(go, monkeypatch):
    step = cql.Online.step

    def poisoned(online, *arguments):
        if online.begun[1] == 2:
            with torch.no_grad():
                online.agent.policy.net[0].weight[1].fill_(math.nan)
        step(online, *arguments)

    monkeypatch.setattr(cql.Online, "step", poisoned)
    directory = go("run", expected=3, seed="[0,1]")
    rows = table(directory, "metrics.csv")
    assert [row["step"] for row in rows if row["run"] == "0"][-1] == "56"
    assert [row["step"] for row in rows if row["run"] == "1"][-1] != "56"
    assert saved(directory)["replay"]["added"][0] == 50


# --- exploration ----------------------------------------------------------------------


def online_of(toy, nothing=False, **flags):
    """An online phase whose replay holds a batch from the start, or nothing."""
    values = {**BASE, "env": str(toy), "eval_env": "CqlToy-v0", **flags}
    config = cql.TrainConfig(**values)
    episodes, task = cql.read_data(config)
    data = None if nothing else cql.Dataset(config, episodes, task)
    agent = cql.make_agent(config, task)
    return cql.Online(config, task, agent, cql.Replay(config, data, agent))


def actions_at(online, step):
    """What it does in a state, [R, A]."""
    runs = range(len(online.players))
    for player in online.players:
        player.observation = np.array([0.1, -0.2, 0.3])
    return online.act(list(runs), step)


@pytest.mark.parametrize("nothing", [False, True])
def test_exploration_is_a_function_of_seed_and_step(toy, nothing):
    """Whatever was drawn before, and whoever shares the device."""
    stacked = online_of(toy, nothing, seed=[3, 5], cql_alpha=[1.0, 4.0])
    solo = online_of(toy, nothing, seed=5)
    at_7, at_8 = actions_at(stacked, 7), actions_at(stacked, 8)
    assert np.array_equal(at_7[0], at_7[1]) and np.array_equal(at_7[2], at_7[3])
    assert not np.isclose(at_7[0], at_7[2]).any()
    assert not np.isclose(at_7, at_8).any()
    np.testing.assert_allclose(actions_at(solo, 7)[0], at_7[2], rtol=1e-6)
    assert np.array_equal(actions_at(stacked, 7), at_7)


def test_exploration_is_the_policy_s_own_noise(toy):
    """Mean and spread of many steps' actions, before the squashing, are the policy's."""
    online = online_of(toy)
    agent, x = online.agent, torch.tensor([[0.1, -0.2, 0.3]])
    weights = {name: weight[0] for name, weight in agent.weights["policy"].items()}
    mean, log_std = cql.call(agent.policy, weights, x)
    actions = np.stack([actions_at(online, step)[0] for step in range(400)])
    before = torch.as_tensor(actions).atanh()
    std = log_std.exp().flatten()
    error = (before.mean(0) - mean.flatten()).abs() / std
    assert (error < 5 / math.sqrt(400)).all()
    torch.testing.assert_close(before.std(0), std, rtol=0.2, atol=0)


def test_without_a_batch_actions_are_uniform(toy):
    online = online_of(toy, nothing=True)
    actions = np.stack([actions_at(online, step)[0] for step in range(400)])
    assert np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions.mean(0), 0, atol=0.15)
    np.testing.assert_allclose(actions.std(0), 1 / math.sqrt(3), atol=0.08)


# --- discrete actions -----------------------------------------------------------------


def dials(dial, n_steps, nothing=False, **flags):
    """What runs do in one state, [steps, R], and what is best there, [R]."""
    online = online_of(dial, nothing, eval_env="CqlDial-v0", **flags)
    scrambled(online.agent)
    actions = [actions_at(online, step)[:, 0] for step in range(n_steps)]
    state = np.array([[[0.1, -0.2, 0.3]]] * len(online.players))
    return np.array(actions), online.agent.act(state)[:, 0, 0]


def check_counts(actions, chances):
    """How often 2, 3 and 4 occur, within five standard errors."""
    counts = np.array([(actions == action).sum() for action in (2, 3, 4)])
    assert counts.sum() == len(actions)
    errors = np.sqrt(len(actions) * np.multiply(chances, np.subtract(1, chances)))
    assert (np.abs(counts - len(actions) * np.array(chances)) <= 5 * errors).all()


@pytest.mark.parametrize("epsilon", [0, 0.1, 1])
def test_the_best_action_but_for_a_share_of_uniform_ones(dial, epsilon):
    flags = {} if epsilon == 0.1 else {"exploration_epsilon": epsilon}  # the default
    actions, best = dials(dial, 1500, seed=[0, 1], **flags)
    for r in (0, 1):
        chances = [epsilon / 3 + (1 - epsilon) * (best[r] == a) for a in (2, 3, 4)]
        check_counts(actions[:, r], chances)


def test_without_a_batch_discrete_actions_are_uniform(dial):
    actions, _ = dials(dial, 600, nothing=True, exploration_epsilon=0)
    check_counts(actions[:, 0], [1 / 3] * 3)


def test_discrete_exploration_is_a_function_of_seed_and_step(dial):
    """Both when to explore and what then, whoever shares the device."""
    flags = {"exploration_epsilon": 0.5}
    stacked, best = dials(dial, 60, seed=[3, 5], cql_alpha=[1.0, 4.0], **flags)
    solo, solo_best = dials(dial, 60, seed=5, **flags)
    explored = stacked != best
    assert explored.any(0).all() and (explored[:, 0] != explored[:, 2]).any()
    for r in (2, 3):  # of seed 5, where their best actions let it be seen
        seen = (stacked[:, r] != best[r]) & (stacked[:, r] != solo_best[0])
        assert seen.any() and (stacked[seen, r] == solo[seen, 0]).all()


@pytest.mark.parametrize("nothing", [False, True])
def test_discrete_actions_online(go, dial, nothing):
    """After the data, and from nothing: the replay holds what was done, and an update
    takes its actions from 0."""
    Dial.got.clear()
    flags = {"env": dial, "eval_freq": 1000, "utd": 2, "exploration_epsilon": 0.5}
    if nothing:
        flags |= {**NOTHING, "eval_env": "CqlDial-v0"}
    directory = go("run", **flags)
    waiting = 7 if nothing else 0
    offline = 0 if nothing else 6
    assert n_updates(directory) == offline + 2 * (50 - waiting)
    columns = replay_columns(directory)
    actions = columns["actions"][0, :, 0]
    done = Dial.got[21:71]  # after one step to try it, and two episodes of evaluation
    assert actions.tolist() == done and set(done) == {2, 3, 4}
    here, after = columns["observations"][0], columns["next_observations"][0]
    turned = here.roll(1, dims=1)
    turned[:, 0] += 0.3 * (actions - 3)
    torch.testing.assert_close(after, turned)
    torch.testing.assert_close(columns["rewards"][0], -after[:, 0].abs())
    assert table(directory, "metrics.csv")[-1]["train_return"]
    agent = cql.load_policy(directory).agent
    assert torch.equal(agent.prepare(columns)["actions"][0, :, 0], actions - 2)


def test_a_resumed_discrete_run_is_exact(go, dial):
    """Between two episodes of ten steps; a stacked run equals its solo run."""
    flags = {"env": dial, "eval_freq": 10, "exploration_epsilon": 0.3}
    stacked = {**flags, "seed": "[0,1]"}
    go("run", **stacked, online_iterations=20)
    whole = go("whole", **stacked)
    assert differences(whole, go("run", **stacked), first_end=26) == []
    solo = go("solo", **flags, seed=1)
    ours, theirs = (replay_columns(directory) for directory in (whole, solo))
    for name in ours:
        torch.testing.assert_close(ours[name][1], theirs[name][0], msg=name)


# --- resume ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [4, 6, 16, 26])
def test_resume_between_two_episodes_is_exact(go, stop):
    """Of ten steps each: an offline phase of 6 stopped before its end and at it, an
    online one after its first episode and its second."""
    flags = {"eval_env": "CqlTen-v0", "cal_ql": True, "cql_alpha_online": 0.5}
    flags |= {"seed": "[0,1]", "eval_freq": 10}
    short = {"max_timesteps": 4, "online_iterations": 0}
    if stop >= 6:
        short = {"online_iterations": stop - 6}
    directory = go("run", **{**flags, **short})
    assert saved(directory)["step"] == stop
    assert differences(go("whole", **flags), go("run", **flags), first_end=stop) == []


def test_resume_within_an_episode_begins_it_anew(go):
    """The transitions before the checkpoint stay, the counts continue, and the tables
    have each step once. The episode that was cut gets no bound."""
    flags = {"eval_env": "CqlTen-v0", "cal_ql": True}
    go("run", online_iterations=23, **flags)
    directory, whole = go("run", **flags), go("whole", **flags)
    checkpoint = saved(directory)
    assert checkpoint["replay"]["added"] == [50] and n_updates(directory) == 56
    assert checkpoint["online"]["begun"] == [6]  # two whole, one cut, three after it
    ours, theirs = replay_columns(directory), replay_columns(whole)
    for name in ours:
        assert torch.equal(ours[name][:, :20], theirs[name][:, :20]), name
        if name != "mc_returns":
            assert torch.equal(ours[name][:, 20:23], theirs[name][:, 20:23]), name
    bounded = ours["mc_returns"][0] > -math.inf
    assert bounded.tolist() == [True] * 20 + [False] * 3 + [True] * 20 + [False] * 7
    here, after = ours["observations"][0], ours["next_observations"][0]
    jumps = (after[:-1] != here[1:]).any(1).nonzero().flatten() + 1
    assert jumps.tolist() == [10, 20, 23, 33, 43]
    starts = [tuple(here[i].tolist()) for i in (0, *jumps.tolist())]
    assert len(set(starts)) == 6  # none as one before
    for name, freq in (("metrics.csv", 10), ("evaluations.csv", 20)):
        steps = [int(row["step"]) for row in table(directory, name)]
        assert steps == sorted(set(steps)) and steps[-1] == 56
        regular = set(range(freq, 56, freq))
        assert regular | {29} <= set(steps) <= regular | {6, 29, 56}  # 29: the first end


@pytest.mark.parametrize("weight", [0.25, 0.0])
def test_the_online_weight_survives_a_resume(go, weight):
    flags = {"cql_alpha_online": weight, "log_freq": 5}
    go("run", online_iterations=24, **flags)
    directory = go("run", **flags)
    rows = [r for r in table(directory, "metrics.csv") if int(r["step"]) > 30]
    weights = [float(r["cql_min_qf1_loss"]) / float(r["cql_qf1_diff"]) for r in rows]
    np.testing.assert_allclose(weights, weight, rtol=1e-5)


def test_an_offline_run_gets_the_columns_of_an_online_one(go):
    directory = go("run", online_iterations=0, max_timesteps=20)
    assert "train_return" not in table(directory, "metrics.csv")[0]
    go("run", max_timesteps=20, online_iterations=20)
    for name in ("evaluations.csv", "metrics.csv"):
        rows = table(directory, name)
        steps = [int(row["step"]) for row in rows]
        assert steps == sorted(set(steps)) and steps[-1] == 40, name
        assert all(None not in row and None not in row.values() for row in rows)
    assert rows[0]["train_return"] == "" and float(rows[-1]["train_return"])


def test_what_a_run_that_went_online_cannot_change(go):
    go("run", eval_env="CqlGoal-v0", online_iterations=20)
    go("run", expected=2, eval_env="CqlToy-v0")
    go("run", expected=2, eval_env="CqlGoal-v0", max_episode_steps=5)
    go("run", expected=2, eval_env="CqlGoal-v0", max_timesteps=10)
    go("run", expected=2, eval_env="CqlGoal-v0", online_iterations=10)
    go("offline", max_timesteps=20, online_iterations=0)
    go("offline", expected=2, max_timesteps=10)


# --- returns and success --------------------------------------------------------------


def test_returns_of_episodes_and_their_success(go):
    """Of those that ended since the last row."""
    directory = go("run", eval_env="CqlTen-v0", seed="[0,1]")
    rewards = replay_columns(directory)["rewards"].double()
    rows = table(directory, "metrics.csv")
    for row in rows:
        # The k-th ends with step 6 + 10 k, and rows come every ten.
        k, r = int(row["step"]) // 10 - 1, int(row["run"])
        if k == 0:
            assert row["train_return"] == row["train_success"] == ""
        elif row["step"] != "56":
            wanted = float(rewards[r, 10 * k - 10 : 10 * k].sum())
            assert float(row["train_return"]) == pytest.approx(wanted, rel=1e-6)
            assert row["train_success"] in ("0", "1")


@pytest.mark.parametrize("reach", [0.3, 0.0])
def test_success_rates_of_evaluations(go, monkeypatch, reach):
    """A rate of 0 is a rate."""

    def step(self, action):
        *rest, _ = Toy.step(self, action)
        return *rest, {"success": bool(np.linalg.norm(self.point) < reach)}

    monkeypatch.setattr(Goal, "step", step)
    rows = table(go("run", eval_env="CqlGoal-v0"), "evaluations.csv")
    rates = [float(row["success_rate"]) for row in rows]
    assert sum(rates) > 0 if reach else rates == [0, 0, 0, 0]


def test_no_success_rate_where_nobody_tells_of_it(go):
    directory = go("run")
    rows = table(directory, "evaluations.csv")
    assert all(row["success_rate"] == "" for row in rows)
    rows = table(directory, "metrics.csv")
    assert all(row["train_success"] == "" for row in rows)
    assert any(row["train_return"] for row in rows)


@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success_told_only_when_it_comes(go, monkeypatch, key):
    """An episode that is not told of has not succeeded yet; one success is one."""
    starts = []

    def reset(self, seed=None, options=None):
        starts.append(seed)
        self.number, self.steps = len(starts), 0
        return Toy.reset(self, seed=seed)

    def step(self, action):
        *rest, _ = Toy.step(self, action)
        self.steps += 1
        return *rest, {key: True} if (self.number, self.steps) in lucky else {}

    monkeypatch.setattr(Goal, "reset", reset)
    monkeypatch.setattr(Goal, "step", step)
    lucky = {(2, 1), (4, 3)}  # of evaluation the second start, of training too
    flags = {"eval_env": "CqlTen-v0", "eval_freq": 1000, "log_freq": 100}
    directory = go("run", **flags)
    first, last = table(directory, "evaluations.csv")
    assert float(first["success_rate"]) == 0.5
    assert last["success_rate"] == ""  # no episode of this evaluation was told of
    (row,) = table(directory, "metrics.csv")
    assert float(row["train_success"]) == pytest.approx(1 / 5)


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ({"env": "null"}, "--eval_env"),
        ({**NOTHING, "max_timesteps": 6}, "--max_timesteps"),
        ({**NOTHING, "normalize": True}, "--normalize"),
        ({**NOTHING, "online_iterations": 0}, "--online_iterations"),
        ({**NOTHING, "eval_env": "none"}, "--eval_env"),
        ({"eval_env": "none"}, "--eval_env"),
        ({"mixing_ratio": 1}, "--mixing_ratio"),
        ({"mixing_ratio": 0}, "--mixing_ratio"),
        ({"mixing_ratio": -0.5}, "--mixing_ratio"),
        ({**NOTHING, "buffer_size": 4}, "--buffer_size"),
        ({"mixing_ratio": 0.25, "buffer_size": 5}, "--buffer_size"),
        ({"buffer_size": 10**12, "online_iterations": 10**12}, "--buffer_size"),
        ({**NOTHING, "batch_size": 30, "online_iterations": 29}, "--online_iterations"),
        ({"mixing_ratio": 0.25, "online_iterations": 5}, "--online_iterations"),
        ({"utd": 0}, "--utd"),
        ({"cql_alpha_online": -1}, "--cql_alpha_online"),
    ],
)
def test_flags_that_contradict(toy, refused, flags, fragment):
    refused(None, fragment, **{"env": toy, **BASE, **flags})


def test_a_phase_just_long_enough(go):
    flags = {"mixing_ratio": 0.25, "eval_freq": 1000, "n_episodes": 1}
    assert n_updates(go("mixed", online_iterations=6, **flags)) == 12
    flags = {**NOTHING, "eval_freq": 1000, "n_episodes": 1}
    assert n_updates(go("nothing", online_iterations=8, **flags)) == 1


def test_data_of_no_environment_need_one(tmp_path, refused):
    file = d4rl_file(tmp_path / "x.hdf5", random_episodes([30, 20]))
    refused(
        None,
        "--online_iterations",
        "--eval_env",
        **{**BASE, "env": file, "eval_env": None},
    )
