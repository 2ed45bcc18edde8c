"""From files to tensors, and back to the environment's actions and scores."""

import csv
import dataclasses
import json
import re
import sys
import warnings

import gymnasium as gym
import h5py
import make_data
import numpy as np
import pytest
import torch
from make_data import (
    d4rl_file,
    hopper_dataset,
    minari_dataset,
    random_episodes,
    run,
    toy_dataset,
    toy_episodes,
)

import cql

FIELDS = cql.Batch._fields[:5]


def load(env, **flags):
    """A Dataset of one transition or more."""
    env = list(map(str, env)) if isinstance(env, list) else str(env)
    return cql.Dataset(cql.TrainConfig(**{"env": env, "batch_size": 1, **flags}))


def everything(dataset):
    """All transitions, in order, as arrays [n, ...]."""
    batch = dataset.gather(torch.arange(len(dataset)).unsqueeze(0))
    return cql.Batch(*(x.squeeze(0).numpy() for x in batch[:5]))


def transitions(episodes, last_of_cut=True):
    """What `everything` should return, written as a loop over episodes and steps; the
    last step of an episode that did not terminate only if `last_of_cut`."""
    rows = []
    for e in episodes:
        n = len(e["rewards"])
        for t in range(n):
            if t == n - 1 and not (e["terminations"][t] or last_of_cut):
                continue
            s, after = e["observations"][t], e["observations"][t + 1]
            ended = float(e["terminations"][t])
            rows.append((s, e["actions"][t], e["rewards"][t], after, ended))
    return cql.Batch(*(np.array(column, np.float32) for column in zip(*rows)))


def same(actual, expected, ends=True):
    """Equal arrays; without `ends`, but for the s' of terminations."""
    for field in FIELDS:
        a, b = getattr(actual, field), getattr(expected, field)
        assert a.dtype == np.float32 and a.shape == b.shape, field
        if field == "next_observations" and not ends:
            a, b = (x[expected.terminations == 0] for x in (a, b))
        np.testing.assert_array_equal(a, b, field)


def evaluations(directory):
    with open(directory / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------
# Where data comes from
# --------------------------------------------------------------------------------------


def test_a_minari_dataset_by_id_and_by_directory(tmp_path, monkeypatch):
    path = toy_dataset(tmp_path, "toy/random-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(path.parent)
    expected = transitions(toy_episodes())
    for name in ("toy/random-v0", path, path / "data", "random-v0", "./random-v0/data/"):
        same(everything(load(name)), expected)


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("timeouts", [True, False])
def test_a_d4rl_file(following, timeouts, tmp_path):
    """Without next_observations, what follows a cut is unknown and its step left out."""
    ends = "mixed" if following else "terminal"
    episodes = random_episodes([4, 1, 7, 2, 1, 1, 9], ends=ends)
    if timeouts and not following:
        for episode in episodes[1::2]:
            key = ("terminations", "truncations")
            episode |= {key[0]: episode[key[1]], key[1]: episode[key[0]]}
    left_out = {} if following else {"next_observations": None}
    left_out |= {} if timeouts else {"timeouts": None}
    file = d4rl_file(tmp_path / "some.hdf5", episodes, **left_out)
    dataset = load(file)
    same(everything(dataset), transitions(episodes, following), ends=following)
    cuts = sum(bool(episode["truncations"][-1]) for episode in episodes)
    assert dataset.left_out == (0 if following else cuts)
    assert dataset.task.env_id is None
    assert (dataset.task.action_low, dataset.task.action_high) == ([-1, -1], [1, 1])


def test_d4rl_and_minari_give_the_same_tensors(tmp_path):
    episodes = toy_episodes(12)
    assert {len(e["rewards"]) == 20 for e in episodes} == {True, False}  # both ends
    minari = load(toy_dataset(tmp_path, episodes=12))
    flat = load(d4rl_file(tmp_path / "toy.hdf5", episodes))
    same(everything(flat), everything(minari))
    for a, b in zip(flat.statistics(), minari.statistics()):
        assert torch.equal(a, b)


def test_a_list_is_joined_in_its_order(tmp_path):
    parts = [random_episodes([5, 3], 1), random_episodes([1, 8, 2], 2)]
    a = minari_dataset(tmp_path, "toy/one-v0", parts[0])
    b = d4rl_file(tmp_path / "two.hdf5", parts[1])
    for names, episodes in (
        ([a, b], parts[0] + parts[1]),
        ([b, a], parts[1] + parts[0]),
    ):
        dataset = load(names)
        same(everything(dataset), transitions(episodes))
        assert len(dataset) == 19
        observations = np.concatenate([e["observations"][:-1] for e in episodes])
        mean, std = dataset.statistics()
        np.testing.assert_allclose(mean, observations.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(std, observations.std(0) + 1e-3, rtol=1e-5)


@pytest.mark.parametrize(
    "name, env_id, dims",
    [
        ("hopper_medium-v2", "Hopper-v4", (11, 3)),
        ("halfcheetah-medium-expert-v2", "HalfCheetah-v4", (17, 6)),
        ("walker2d_medium_replay-v2", "Walker2d-v4", (17, 6)),
        ("ant_medium-v2", "Ant-v4", (111, 8)),
    ],
)
def test_a_d4rl_name_chooses_the_environment(name, env_id, dims, tmp_path):
    episodes = random_episodes([9, 9], obs_dim=dims[0], action_dim=dims[1])
    task = load(d4rl_file(tmp_path / f"{name}.hdf5", episodes)).task
    env = cql.make_env(task)
    assert env.spec.id == task.env_id == env_id
    assert env.observation_space.shape == dims[:1] and env.action_space.shape == dims[1:]


def test_float64_data(tmp_path):
    """Statistics are exact even where float32 sums would not be."""
    episodes = random_episodes([400] * 5)
    for e in episodes:
        e["observations"] = 1000 + e["observations"].astype(np.float64)
        e["actions"] = e["actions"].astype(np.float64)
    spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)}
    spaces["action_space"] = gym.spaces.Box(-1, 1, (2,), np.float64)
    for path in (
        minari_dataset(tmp_path, "toy/wide-v0", episodes, **spaces),
        d4rl_file(tmp_path / "wide.hdf5", episodes),
    ):
        dataset = load(path)
        same(everything(dataset), transitions(episodes))
        observations = np.concatenate([e["observations"][:-1] for e in episodes])
        mean, std = dataset.statistics()
        np.testing.assert_allclose(mean, observations.mean(0), rtol=1e-7)
        np.testing.assert_allclose(std, observations.std(0) + 1e-3, rtol=1e-4)


def test_memory(tmp_path):
    """Next observations are not stored twice: 1.2 times the numbers themselves."""
    episodes = random_episodes([500] * 4, obs_dim=11, action_dim=3)
    dataset = load(d4rl_file(tmp_path / "big.hdf5", episodes))
    kept = [x.nbytes for x in vars(dataset).values() if hasattr(x, "nbytes")]
    assert sum(kept) <= 1.2 * 4 * len(dataset) * (11 + 3 + 1 + 1)


# --------------------------------------------------------------------------------------
# Episodes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_nothing_crosses_an_episode_s_end(seed, tmp_path):
    """Every (s, s') is a consecutive pair of one episode, and none is missing."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 1, 2, 3, 5, 17], rng.integers(1, 30))
    episodes = random_episodes(lengths, seed)
    flagged = [e for e in episodes if e["terminations"][-1] or e["truncations"][-1]]
    for path, source in (
        (minari_dataset(tmp_path, "toy/a-v0", episodes), episodes),
        (d4rl_file(tmp_path / "b.hdf5", episodes), episodes),
        (d4rl_file(tmp_path / "c.hdf5", episodes, timeouts=None), episodes),
        (d4rl_file(tmp_path / "d.hdf5", flagged, next_observations=None), flagged),
    ):
        if not source:
            continue
        following = path.name != "d.hdf5"
        batch, where = everything(load(path)), {}
        for e, episode in enumerate(source):
            for t, s in enumerate(episode["observations"]):
                where[s.tobytes()] = e, t
        for s, after, ended in zip(*batch[0::3], batch.terminations):
            e, t = where[s.tobytes()]
            if following or not ended:
                assert where[after.tobytes()] == (e, t + 1)
        same(batch, transitions(source, following), ends=following)


def test_indices_of_several_runs(tmp_path):
    dataset = load(d4rl_file(tmp_path / "a.hdf5", random_episodes([4, 1, 6])))
    indices = torch.tensor([[0, 4, 10], [3, 3, 5]])
    batch, rows = dataset.gather(indices), everything(dataset)
    assert [x.shape[:2] for x in batch[:5]] == [(2, 3)] * 5
    for field in FIELDS:
        np.testing.assert_array_equal(
            getattr(batch, field), getattr(rows, field)[indices]
        )


def test_a_truncation_is_no_termination(tmp_path):
    for ends, expected in (("terminal", 1), ("timeout", 0), ("cut", 0)):
        episodes = random_episodes([5, 1, 7], ends=ends)
        for path in (
            minari_dataset(tmp_path, f"toy/{ends}-v0", episodes),
            d4rl_file(tmp_path / f"{ends}.hdf5", episodes),
        ):
            terminations = everything(load(path)).terminations
            assert terminations[[4, 5, 12]].tolist() == [expected] * 3
            assert np.delete(terminations, [4, 5, 12]).max() == 0


def test_jumps_split_episodes(tmp_path):
    """An end that no flag marks shows as an s' that is not the next row's s; the return
    of such an episode is no whole episode's."""
    episodes = random_episodes([4, 6, 3], ends="cut")
    dataset = load(d4rl_file(tmp_path / "a.hdf5", episodes, timeouts=None))
    same(everything(dataset), transitions(episodes))
    assert list(dataset.lengths) == [4, 6, 3]


def test_rounding_is_no_jump(tmp_path):
    """next_observations that went through other arithmetic; NaN is refused."""
    episodes = random_episodes([4, 6, 3], ends="timeout")
    for episode in episodes:
        episode["observations"][:, 2] = 7.0  # a column without spread
    after = np.concatenate([e["observations"][1:] for e in episodes])
    file = d4rl_file(tmp_path / "a.hdf5", episodes, next_observations=after * (1 + 1e-6))
    dataset = load(file)
    assert list(dataset.lengths) == [4, 6, 3]
    for actual, expected in zip(everything(dataset)[:5], transitions(episodes)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    after[1, 0] = np.nan
    file = d4rl_file(tmp_path / "b.hdf5", episodes, next_observations=after)
    with pytest.raises(cql.UserError, match="NaN"):
        load(file)


def test_a_file_of_one_transition(tmp_path):
    file = d4rl_file(tmp_path / "a.hdf5", random_episodes([1], ends="terminal"))
    assert len(load(file, batch_size=1)) == 1


# --------------------------------------------------------------------------------------
# Spaces
# --------------------------------------------------------------------------------------

Box, Dict, Tuple = gym.spaces.Box, gym.spaces.Dict, gym.spaces.Tuple
VECTOR = Box(-9, 9, (2,))
NESTED = {
    "dictionary": Dict({"z": VECTOR, "a": Box(-9, 9, (1,)), "M": Box(-9, 9, (2, 2))}),
    "ordered": Dict([("z", VECTOR), ("a", Box(-9, 9, (3,)))]),
    "tuple": Tuple([Box(-9, 9, (i % 3 + 1,)) for i in range(12)]),
    "nested": Dict(b=Tuple((VECTOR, Dict(y=VECTOR, x=Box(-9, 9, ())))), a=VECTOR),
    "matrix": Box(-9, 9, (2, 3)),
    "integers": Dict(a=Box(0, 9, (2,), np.int64), b=VECTOR),
}


@pytest.mark.parametrize("kind", NESTED)
def test_observations_are_flattened_as_gymnasium_does(kind, tmp_path):
    space, episodes = NESTED[kind], random_episodes([5, 1, 4])
    space.seed(0)
    for episode in episodes:
        samples = [space.sample() for _ in episode["observations"]]
        episode["observations"] = make_data.stacked(samples)
        episode["flat"] = np.stack([gym.spaces.flatten(space, s) for s in samples])
    raw = [{k: v for k, v in e.items() if k != "flat"} for e in episodes]
    path = minari_dataset(tmp_path, "toy/nested-v0", raw, observation_space=space)
    dataset = load(path)
    expected = transitions([{**e, "observations": e["flat"]} for e in episodes])
    same(everything(dataset), expected)
    assert dataset.task.observation_dim == gym.spaces.flatdim(space)


class Spy(make_data.Toy):
    """Keeps what it showed and what was done."""

    seen = []

    def reset(self, **kw):
        self.shown, info = super().reset(**kw)
        return self.shown, info

    def step(self, action):
        Spy.seen.append((self.shown, action))
        self.shown, *rest = super().step(action)
        return self.shown, *rest


@pytest.mark.parametrize("layout", ["box", "dict", "tuple", "dict recorded backwards"])
def test_evaluation_flattens_as_the_data(layout, in_tmp):
    """What the policy does in evaluation is what load_policy's does with the raw
    observation, dictionary or not, and with the vector in the data's order."""
    gym.register("CqlSpy-v0", Spy, max_episode_steps=5)
    try:
        path = toy_dataset(in_tmp, env_kwargs={"layout": layout.split()[0]})
        file = path / "data" / "metadata.json"
        metadata = json.loads(file.read_text())
        metadata["env_spec"] = metadata["env_spec"].replace("CqlToy-v0", "CqlSpy-v0")
        if "backwards" in layout:
            space = json.loads(metadata["observation_space"])
            space["subspaces"] = dict(reversed(space["subspaces"].items()))
            metadata["observation_space"] = json.dumps(space)
        file.write_text(json.dumps(metadata))
        Spy.seen.clear()
        flags = {"max_timesteps": 60, "policy_lr": 1e-2}  # far from acting like zero
        assert run(env=path, resume="out", n_episodes=2, **flags)[0] == 0
    finally:
        del gym.registry["CqlSpy-v0"]
    policy = cql.load_policy("out/checkpoint.pt")
    assert len(Spy.seen) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shown, action in Spy.seen:
            np.testing.assert_allclose(policy(shown), action, rtol=1e-4, atol=1e-6)
    env = gym.make("CqlToy-v0", layout=layout.split()[0])
    first, vector = env.reset(seed=0)[0], everything(load(path)).observations[0]
    np.testing.assert_allclose(policy(first), policy(vector), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "low, high", [(-2, 6), ([-2, 0], [6, 0.5]), ([0, -1e-3], [100, 1e-3])]
)
def test_actions_keep_their_bounds_from_end_to_end(low, high, in_tmp):
    """A policy that clones actions near the bounds returns those actions; an environment
    that refuses any out of bounds runs its evaluation."""
    bounds = {"low": low, "high": high}
    env = gym.make("CqlToy-v0", **bounds)
    low, high = env.action_space.low, env.action_space.high
    target = low + [0.9, 0.2] * (high - low)
    episodes = random_episodes([20] * 10)
    for episode in episodes:
        episode["actions"] = np.tile(target, (20, 1))
    path = minari_dataset(in_tmp, "toy/odd-v0", episodes, env=env)
    flags = {"max_timesteps": 150, "bc_steps": 150, "policy_lr": 1e-2}
    status, _, err = run(env=path, resume="out", **flags)
    assert (status, err) == (0, "")
    actions = cql.load_policy("out/checkpoint.pt")(episodes[0]["observations"])
    assert (np.abs(actions - target) < 0.1 * (high - low)).all()
    saved = torch.load("out/checkpoint.pt", weights_only=True)["task"]
    assert (saved["action_low"], saved["action_high"]) == (low.tolist(), high.tolist())


def test_eval_env_gives_a_bare_file_its_bounds(in_tmp):
    gym.register(
        "CqlWider-v0",
        "make_data:Toy",
        max_episode_steps=20,
        kwargs={"low": -2, "high": [6, 3]},
    )
    try:
        episodes = toy_episodes(low=-2, high=[6, 3])
        file = d4rl_file(in_tmp / "wider.hdf5", episodes)
        task = load(file, eval_env="CqlWider-v0").task
        assert (task.action_low, task.action_high) == ([-2, -2], [6, 3])
        assert run(env=file, eval_env="CqlWider-v0", resume="out")[0] == 0
        assert len(evaluations(in_tmp / "out")) == 1
        status, _, err = run(env=file)
        assert status == 2 and "bounds" in err or "outside" in err
    finally:
        del gym.registry["CqlWider-v0"]


# --------------------------------------------------------------------------------------
# Statistics and rewards
# --------------------------------------------------------------------------------------


def test_statistics_are_of_the_transitions_states(in_tmp):
    """Over s, not s': an outlier that is only ever an s' does not count."""
    episodes = random_episodes([5, 1, 7])
    episodes[1]["observations"][-1] = 1e6
    path = minari_dataset(in_tmp, "toy/outlier-v0", episodes)
    observations = np.concatenate([e["observations"][:-1] for e in episodes])
    mean, std = load(path).statistics()
    np.testing.assert_allclose(mean, observations.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, observations.std(0) + 1e-3, rtol=1e-5)
    for normalize in (True, False):
        out = in_tmp / f"normalize-{normalize}"
        assert run(env=path, normalize=normalize, resume=out)[0] == 0
        agent = torch.load(out / "checkpoint.pt", weights_only=True)["agent"]
        expected = (mean, std) if normalize else (torch.zeros(3), torch.ones(3))
        for name, value in zip(("observation_mean", "observation_std"), expected):
            torch.testing.assert_close(agent[name], value.float())


@pytest.mark.parametrize("form", ["minari", "d4rl", "d4rl without next observations"])
def test_normalize_reward(form, tmp_path):
    """1000 over the spread of whole episodes' returns, then scale and bias."""
    episodes = random_episodes([5, 6, 9, 7], obs_dim=11, action_dim=3, ends="terminal")
    episodes[0]["truncations"] = episodes[0]["terminations"]
    episodes[0]["terminations"] = np.zeros(5, bool)
    episodes[0]["rewards"][-1] -= 20  # the least return, its last step included
    returns = [e["rewards"].sum() for e in episodes]
    cut = random_episodes([4], obs_dim=11, action_dim=3, ends="cut")
    cut[0]["rewards"] += 1e4
    episodes += cut
    file, following = tmp_path / "hopper_medium-v2.hdf5", {}
    if form == "minari":
        path = minari_dataset(
            tmp_path, "toy/hop-v0", episodes, env=gym.make("Hopper-v5")
        )
    else:
        following = {"next_observations": None} if "without" in form else {}
        path = d4rl_file(file, episodes, **following)
    raw = transitions(episodes, last_of_cut=not following).rewards
    factor = 1000 / (max(returns) - min(returns))
    flags = {"reward_scale": 2.0, "reward_bias": -3.0}
    rewards = everything(load(path, normalize_reward=True, **flags)).rewards
    np.testing.assert_allclose(rewards, raw * factor * 2 - 3, rtol=1e-4, atol=1e-4)
    rewards = everything(load(path, **flags)).rewards
    np.testing.assert_allclose(rewards, raw * 2 - 3, rtol=1e-6, atol=1e-6)


def test_normalize_reward_elsewhere_says_that_it_does_nothing(tmp_path, capsys):
    path = toy_dataset(tmp_path)
    raw = transitions(toy_episodes()).rewards
    flags = {"reward_scale": 10.0, "reward_bias": -5.0}
    rewards = everything(load(path, normalize_reward=True, **flags)).rewards
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "normalize_reward" in lines[0] and "no effect" in lines[0]
    np.testing.assert_allclose(rewards, raw * 10 - 5, rtol=1e-6)
    np.testing.assert_allclose(
        everything(load(path, **flags)).rewards, raw * 10 - 5, rtol=1e-6
    )
    assert capsys.readouterr().out == ""


def test_normalize_reward_goes_by_the_data_s_environment(tmp_path):
    """Not by where it is evaluated, which a resumed run may change."""
    episodes = random_episodes([5, 6], obs_dim=11, action_dim=3, ends="terminal")
    path = minari_dataset(tmp_path, "toy/hop-v0", episodes, env=gym.make("Hopper-v5"))
    factors = [
        load(path, normalize_reward=True, eval_env=name).reward_factor
        for name in (None, "Hopper-v4", "CqlToy-v0")
    ]
    assert factors[0] != 1 and factors == factors[:1] * 3


def test_normalize_reward_without_a_whole_episode(refused, tmp_path):
    episodes = random_episodes([9, 9], obs_dim=11, action_dim=3, ends="cut")
    file = d4rl_file(tmp_path / "hopper_medium-v2.hdf5", episodes)
    refused(
        None, "--normalize_reward", "whole episodes", env=file, normalize_reward=True
    )


# --------------------------------------------------------------------------------------
# Environments and scores
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["minari", "d4rl"])
def test_without_an_environment_there_is_no_evaluation(form, in_tmp):
    episodes = random_episodes([9, 9])
    path = d4rl_file(in_tmp / "bare.hdf5", episodes)
    if form == "minari":
        path = minari_dataset(in_tmp, "toy/bare-v0", episodes)
    status, out, err = run(env=path, resume="out", log_freq=1)
    assert (status, err) == (0, "")
    assert "evaluation" in out and "--eval_env" in out and "left out" not in out
    with open("out/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    for column in ("average_qf1", "cql_q1_current_actions", "cql_q1_rand"):
        assert all(np.isfinite(float(row[column])) for row in rows)
    table = in_tmp / "out" / "evaluations.csv"
    assert not table.exists() or evaluations(in_tmp / "out") == []
    assert (in_tmp / "out" / "checkpoint.pt").exists()


def test_the_evaluation_environment_comes_first(in_tmp):
    """Recorded beside that of the recording: there nothing moves, 9 steps are all."""
    still = gym.make("CqlToy-v0", push=0.0, max_episode_steps=9)
    path = toy_dataset(in_tmp, eval_env=still)
    assert run(env=path, resume="out", n_episodes=3)[0] == 0
    assert float(evaluations(in_tmp / "out")[0]["length_mean"]) == 9
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    assert json.loads(metadata["env_spec"])["max_episode_steps"] == 20
    gym.register("CqlShort-v0", "make_data:Toy", max_episode_steps=7, kwargs={"push": 0})
    try:
        flags = {"resume": "other", "eval_env": "CqlShort-v0"}
        assert run(env=path, n_episodes=3, **flags)[0] == 0
        assert float(evaluations(in_tmp / "other")[0]["length_mean"]) == 7
    finally:
        del gym.registry["CqlShort-v0"]


def test_recorded_limits_and_arguments_are_used(in_tmp):
    env = gym.make("CqlToy-v0", push=0.0, max_episode_steps=11, render_mode=None)
    path = minari_dataset(in_tmp, "toy/limit-v0", toy_episodes(), env=env)
    task = load(path).task
    assert (task.env_kwargs, task.max_episode_steps) == ({"push": 0.0}, 11)
    assert run(env=path, resume="out")[0] == 0
    assert float(evaluations(in_tmp / "out")[0]["length_mean"]) == 11


def test_an_environment_without_a_time_limit_ends(in_tmp):
    env = gym.make("CqlEndless-v0", push=0.0)
    assert env.spec.max_episode_steps is None
    path = minari_dataset(in_tmp, "toy/endless-v0", random_episodes([4, 13, 5]), env=env)
    with make_data.deadline(20):
        assert run(env=path, resume="out")[0] == 0
    assert float(evaluations(in_tmp / "out")[0]["length_mean"]) == 13


def test_scores_by_the_dataset_s_own_references(in_tmp):
    path = toy_dataset(in_tmp, ref_min_score=-5.0, ref_max_score=20.0)
    status, out, _ = run(env=path, resume="out", n_episodes=2)
    row = evaluations(in_tmp / "out")[0]
    score = 100 * (float(row["return_mean"]) + 5) / 25
    assert float(row["d4rl_normalized_score"]) == pytest.approx(score, rel=1e-6)
    assert status == 0 and "D4RL" not in out


def test_scores_by_the_table(in_tmp):
    path = hopper_dataset(in_tmp, episodes=4)
    status, out, err = run(env=path, resume="out")
    assert (status, err) == (0, "")
    assert len([line for line in out.splitlines() if "D4RL" in line]) == 1
    row = evaluations(in_tmp / "out")[0]
    score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)
    assert float(row["d4rl_normalized_score"]) == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(
    "env_id, low, high",
    [
        ("Hopper-v5", -20.272305, 3234.3),
        ("HalfCheetah-v4", -280.178953, 12135.0),
        ("Walker2d-v5", 1.629008, 4592.3),
        ("Ant-v4", -325.6, 3879.7),
        ("AntMaze_UMaze-v4", 0, 1),
        ("AntMaze_Large_Diverse_GR-v4", 0, 1),
        ("FrankaKitchen-v1", 0, 4),
        ("PointMaze_UMaze-v3", 23.85, 161.86),
        ("PointMaze_Medium-v3", 13.13, 277.39),
        ("PointMaze_Large-v3", 6.7, 273.99),
        ("AdroitHandPen-v1", 96.262799, 3076.8331),
        ("AdroitHandHammer-v1", -274.856578, 12794.1348),
        ("AdroitHandDoor-v1", -56.512833, 2880.5693),
        ("AdroitHandRelocate-v1", -6.425911, 4233.8778),
    ],
)
def test_the_table_of_references(env_id, low, high, capsys):
    protocol = {"continuing_task": False} if "AntMaze" in env_id else {}
    task = cql.Task("", [-1.0], [1.0], env_id, protocol)
    reference = cql.reference_returns(task, env_id)
    assert list(reference) == [low, high] and "D4RL" in capsys.readouterr().out
    assert cql.normalized_score(np.array([low, high]), reference) == pytest.approx(50)
    own = dataclasses.replace(task, reference=[1.0, 2.0])
    assert list(cql.reference_returns(own, env_id)) == [1, 2]


@pytest.mark.parametrize(
    "env_id, kwargs, recorded",
    [
        ("AntMaze_UMaze-v4", {"continuing_task": True}, True),
        ("AntMaze_UMaze-v4", {}, True),  # its own default is true
        ("AntMaze_UMaze-v4", {"continuing_task": False}, False),  # --eval_env's default
        ("FrankaKitchen-v1", {"remove_task_when_completed": False}, True),
    ],
)
def test_no_d4rl_score_where_returns_are_others(env_id, kwargs, recorded, capsys):
    """These settings pay at every step what D4RL pays once."""
    task = cql.Task("", [-1.0], [1.0], env_id if recorded else "Other-v0", kwargs)
    assert cql.reference_returns(task, env_id) is None
    assert re.search(f"scores: none.*{env_id}", capsys.readouterr().out)


def test_whose_references(capsys):
    """The table's for an environment that it knows, before the data's of another one;
    the data's where no environment is recorded."""
    task = cql.Task("", [-1.0], [1.0], "PointMaze_UMaze-v3", reference=[1.0, 2.0])
    assert cql.reference_returns(task, "PointMaze_UMaze-v3") == [1, 2]
    assert cql.reference_returns(task, "PointMaze_Medium-v3") == [13.13, 277.39]
    assert cql.reference_returns(dataclasses.replace(task, env_id=None), "X-v0") == [
        1,
        2,
    ]
    assert "D4RL" in capsys.readouterr().out
    assert cql.reference_returns(task, "X-v0") == [1, 2]
    assert "which are PointMaze_UMaze-v3's" in capsys.readouterr().out


def test_no_score_without_references(in_tmp):
    status, out, _ = run(env=toy_dataset(in_tmp), resume="out")
    assert status == 0 and "no reference returns" in out
    assert evaluations(in_tmp / "out")[0]["d4rl_normalized_score"] in ("", "nan")


# --------------------------------------------------------------------------------------
# A dataset is data: none of what it names is run
# --------------------------------------------------------------------------------------

PLANTED = """
from pathlib import Path
Path({marker!r}).write_text("ran")
import gymnasium as gym
from make_data import Toy as Env
class Wrapper(gym.Wrapper):
    def __init__(self, env):
        Path({marker!r}).write_text("wrapped")
        super().__init__(env)
gym.register("Planted-v0", entry_point="planted:Env")
"""
WRAPPER = {"name": "Wrapper", "entry_point": "planted:Wrapper", "kwargs": {}}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A dataset maker that records a spec, and the file that the spec's code writes."""
    marker = tmp_path / "ran"
    (tmp_path / "modules").mkdir()
    source = PLANTED.format(marker=str(marker))
    (tmp_path / "modules" / "planted.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    path = toy_dataset(tmp_path / "datasets")
    file = path / "data" / "metadata.json"

    def record(without=(), **spec):
        metadata = json.loads(file.read_text())
        spec = {**json.loads(metadata["env_spec"]), **spec}
        metadata |= {"env_spec": json.dumps(spec), "eval_env_spec": json.dumps(spec)}
        file.write_text(
            json.dumps({k: metadata[k] for k in metadata if k not in without})
        )
        return path

    yield record, marker
    sys.modules.pop("planted", None)
    gym.registry.pop("Planted-v0", None)


def test_the_planted_code_would_run(planted):
    """The user's own --eval_env runs it, so the tests below are able to fail."""
    record, marker = planted
    assert run(env=record(), eval_env="planted:Planted-v0")[0] == 0
    assert marker.read_text() == "ran"


def test_an_entry_point_and_a_wrapper_are_not_run(planted):
    record, marker = planted
    path = record(entry_point="planted:Env", additional_wrappers=[WRAPPER])
    status, out, err = run(env=path)
    assert (status, err) == (0, "") and "return" in out  # it was evaluated
    assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("missing", ["observation_space", "action_space"])
def test_no_environment_is_made_to_learn_spaces(missing, planted, refused):
    record, marker = planted
    path = record([missing], entry_point="planted:Env", additional_wrappers=[WRAPPER])
    refused(None, path, missing, env=path)
    assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("name", ["planted:Planted-v0", "planted:CqlToy-v0", "planted:"])
def test_an_id_that_names_a_module_is_not_run(name, planted, refused):
    record, marker = planted
    refused(None, name, "--eval_env", env=record(id=name, entry_point="planted:Env"))
    assert not marker.exists() and "planted" not in sys.modules


def test_arguments_that_name_code_are_not_run(planted, refused):
    record, marker = planted
    for kwargs in (
        {"entry_point": "planted:Env"},
        {"additional_wrappers": [WRAPPER]},
        {"id": "planted:Planted-v0"},
        {"vector_entry_point": "planted:Env"},
    ):
        refused(None, env=record(kwargs=kwargs))
    assert not marker.exists() and "planted" not in sys.modules


def test_another_format_is_no_way_around(planted):
    """Minari's own reader, which makes the recorded environment, is not reached."""
    record, marker = planted
    path = record(["observation_space"], entry_point="planted:Env")
    file = path / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps({**metadata, "data_format": "arrow"}))
    assert run(env=path)[0] == 2
    assert not marker.exists() and "planted" not in sys.modules


def test_other_files_are_left_alone(tmp_path):
    """Nothing is written into a dataset, not even its times."""
    path, file = toy_dataset(tmp_path / "datasets"), d4rl_file(tmp_path / "toy.hdf5")
    files = [file, *path.rglob("*.*")]
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    for env in (path, file):
        assert run(env=env, checkpoints_path="null")[0] == 0
    assert [(f.read_bytes(), f.stat().st_mtime_ns) for f in files] == before
    with h5py.File(file, "a"):
        pass  # and it is closed again


def test_a_d4rl_file_that_does_not_say_where_episodes_end(tmp_path, in_tmp):
    episodes = random_episodes([30, 30], ends="timeout")
    file = d4rl_file(
        tmp_path / "x.hdf5", episodes, timeouts=None, next_observations=None
    )
    _, out, _ = run(env=file, resume="out")
    assert "without timeouts, so only terminals end an episode" in out
    assert "59 transitions (1 left out, of unknown next observations), 1 ep" in out
    _, out, _ = run(
        env=d4rl_file(tmp_path / "y.hdf5", episodes, timeouts=None), resume="b"
    )
    assert "without timeouts" not in out and "60 transitions, 2 episodes" in out


def test_joined_data_of_other_settings(in_tmp):
    paths = [toy_dataset(in_tmp / str(p), env_kwargs={"push": p}) for p in (0.3, 0.9)]
    status, out, _ = run(env=paths, resume="out")
    assert status == 0 and "0.9" in out and "those of the first" in out


@pytest.mark.parametrize("kind", ["d4rl", "minari", "observations"])
def test_an_array_larger_than_its_file(tmp_path, refused, kind):
    """As damaged files announce; to read it would take all memory."""
    if kind == "d4rl":
        path = file = d4rl_file(tmp_path / "data.hdf5")
        name = "rewards"
    else:
        path = toy_dataset(tmp_path / "root")
        [file] = path.rglob("*.hdf5")
        name = "episode_1/" + ("rewards" if kind == "minari" else kind)
    with h5py.File(file, "a") as data:
        del data[name]
        data.create_dataset(name, (10**12,), "?", chunks=(100,))
    refused(None, "damaged", "1,000,000,000,000 bytes", env=path)


def test_the_recorded_environment_by_its_name(in_tmp):
    """eval_env that names it keeps the recorded settings, which the scores hold for."""
    path = toy_dataset(in_tmp, env_kwargs={"push": 0.1})
    task = load(path).task
    for name, push in ((None, 0.1), ("CqlToy-v0", 0.1), ("CqlEndless-v0", 0.3)):
        assert cql.make_env(task, name).unwrapped.push == push


def test_the_run_says_what_is_left_out(in_tmp):
    episodes = random_episodes([5, 6, 7], ends="timeout")
    path = d4rl_file(in_tmp / "bare.hdf5", episodes, next_observations=None)
    status, out, _ = run(env=path, resume="out")
    assert status == 0
    assert "data: 15 transitions (3 left out, of unknown next observations), 3 ep" in out


@pytest.mark.parametrize("fault", ["infinite", "huge", "complex", "one action"])
def test_bad_numbers_are_told_in_one_line(in_tmp, recwarn, fault):
    """No warning of NumPy's or torch's beside it."""
    changes, episodes = {}, random_episodes([20, 20], ends="terminal")
    states = np.concatenate([e["observations"][:-1] for e in episodes])
    if fault == "complex":
        changes["observations"] = states.astype(complex)
    elif fault == "one action":
        changes["actions"] = np.zeros((40, 1), int)
    else:
        states[3] = np.inf if fault == "infinite" else 3e38
        changes["observations"] = states
    path = d4rl_file(in_tmp / "bad.hdf5", episodes, **changes)
    status, _, error = run(env=path, resume="out", normalize=False, max_timesteps=3)
    assert (status, error.count("\n")) == ((3, 0) if fault == "huge" else (2, 1))
    assert not [str(warning.message) for warning in recwarn]
