"""Tests of reading data, of actions and scores, and of environments."""

import csv
import dataclasses
import fcntl
import json
import math
import re
import shutil
import sys
import tracemalloc
import warnings
from collections import namedtuple

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

FIELDS = cql.COLUMNS[:5]
Transitions = namedtuple("Transitions", FIELDS)


def config_of(env, **flags):
    """Return a config that accepts a single transition."""
    env = list(map(str, env)) if isinstance(env, list) else str(env)
    return cql.TrainConfig(**{"env": env, "batch_size": 1, **flags})


def load(env, **flags):
    """Return the Dataset of `env`."""
    config = config_of(env, **flags)
    return cql.Dataset(config, *cql.read_data(config))


def task_of(env):
    """Return the Task of `env`."""
    return cql.read_data(config_of(env))[1]


def loaded(env, **flags):
    """Return Dataset and Task as at the start of a run, after `eval_env` is made."""
    return cql.load(config_of(env, **flags), None, "cpu")[:2]


def everything(dataset):
    """Return all transitions, in order, as arrays [n, ...]."""
    batch = dataset.gather(torch.arange(len(dataset)).unsqueeze(0))
    return Transitions(*(batch[name].squeeze(0).numpy() for name in FIELDS))


def transitions(episodes, last_of_cut=True):
    """Return what `everything` should return, from a loop over episodes and steps. The
    last step of an episode without termination is included only if `last_of_cut`."""
    rows = []
    for e in episodes:
        n = len(e["rewards"])
        for t in range(n):
            if t == n - 1 and not (e["terminations"][t] or last_of_cut):
                continue
            s, after = e["observations"][t], e["observations"][t + 1]
            ended = float(e["terminations"][t])
            rows.append((s, e["actions"][t], e["rewards"][t], after, ended))
    return Transitions(*(np.array(column, np.float32) for column in zip(*rows)))


def same(actual, expected, ends=True):
    """Assert equal arrays; without `ends`, ignore next observations of terminations."""
    for field in FIELDS:
        a, b = getattr(actual, field), getattr(expected, field)
        assert a.dtype == np.float32 and a.shape == b.shape, field
        if field == "next_observations" and not ends:
            a, b = (x[expected.terminations == 0] for x in (a, b))
        np.testing.assert_array_equal(a, b, field)


def states(episodes):
    """Return the observations of all transitions, [n, O]."""
    return np.concatenate([e["observations"][:-1] for e in episodes])


def evaluations(directory):
    with open(directory / "evaluations.csv", newline="") as file:
        return list(csv.DictReader(file))


def line(out, start):
    """Return the only line of `out` that starts like this."""
    [found] = [each for each in out.splitlines() if each.startswith(start)]
    return found


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


Box, Dict, Tuple = gym.spaces.Box, gym.spaces.Dict, gym.spaces.Tuple


LEVERS = {
    "CqlThree-v0": gym.spaces.Discrete(3),
    "CqlUnit-v0": Box(-1, 1, (1,)),
    "CqlWide-v0": Box(-3, 3, (2,)),
    "CqlWhole-v0": Box(-2, 2, (2,), np.int64),
    "CqlSingle-v0": Box(-2, 2, (2,)),
}


class Levers(gym.Env):
    """Three constant observations, and actions checked by value and type."""

    observation_space = Box(-9, 9, (3,))
    done = []  # actions taken

    def __init__(self, name):
        self.action_space = LEVERS[name]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), repr(action)
        Levers.done.append(action)
        return np.zeros(3, np.float32), 1.0, False, False, {}


@pytest.fixture
def levers():
    """Register the environments of LEVERS during a test."""
    Levers.done.clear()
    for name in LEVERS:
        entry = f"{__name__}:Levers"
        gym.register(name, entry, max_episode_steps=5, kwargs={"name": name})
    yield
    for name in LEVERS:
        del gym.registry[name]


# --------------------------------------------------------------------------------------
# Sources of data
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
    """Without next_observations, the last step of a truncated episode is left out."""
    ends = "mixed" if following else "terminal"
    episodes = random_episodes([4, 1, 7, 2, 1, 1, 9], ends=ends)
    if timeouts and not following:
        for episode in episodes[1::2]:
            key = ("terminations", "truncations")
            episode |= {key[0]: episode[key[1]], key[1]: episode[key[0]]}
    left_out = {} if following else {"next_observations": None}
    left_out |= {} if timeouts else {"timeouts": None}
    file = d4rl_file(tmp_path / "some.hdf5", episodes, **left_out)
    dataset, task = load(file), task_of(file)
    same(everything(dataset), transitions(episodes, following), ends=following)
    cuts = sum(bool(episode["truncations"][-1]) for episode in episodes)
    assert dataset.left_out == (0 if following else cuts)
    assert task.env_id is None
    assert (task.action_low, task.action_high) == ([-1, -1], [1, 1])


def test_d4rl_and_minari_give_the_same_tensors(tmp_path):
    episodes = toy_episodes(12)
    assert {len(e["rewards"]) == 20 for e in episodes} == {True, False}  # both ends
    minari = load(toy_dataset(tmp_path, episodes=12))
    flat = load(d4rl_file(tmp_path / "toy.hdf5", episodes))
    same(everything(flat), everything(minari))
    for a, b in zip(flat.statistics(), minari.statistics()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name, env_id, dims",
    [
        ("hopper_medium-v2", "Hopper-v4", (11, 3)),
        ("halfcheetah-medium-expert-v2", "HalfCheetah-v4", (17, 6)),
        ("walker2d_medium_replay-v2", "Walker2d-v4", (17, 6)),
        ("ant_medium-v2", "Ant-v4", (111, 8)),
    ],
)
def test_a_d4rl_name_suggests_the_environment(name, env_id, dims, tmp_path, capsys):
    episodes = random_episodes([9, 9], obs_dim=dims[0], action_dim=dims[1])
    file = d4rl_file(tmp_path / f"{name}.hdf5", episodes)
    task = task_of(file)
    assert line(capsys.readouterr().out, file.name).count(env_id) == 1
    env = cql.make_env(config_of(file), task)
    assert env.spec.id == task.env_id == env_id
    assert env.observation_space.shape == dims[:1] and env.action_space.shape == dims[1:]


def test_a_name_is_only_a_guess(in_tmp):
    """A file of other sizes than its name's environment trains without evaluation."""
    file = d4rl_file(in_tmp / "hopper_robot_logs.hdf5")
    status, out, err = run(env=file, resume="out")
    assert (status, err) == (0, "")
    assert "Hopper-v4" in line(out, file.name) and "sizes" in line(out, file.name)
    assert line(out, "evaluation").startswith("evaluation: none")


def test_a_guess_gives_way_to_eval_env(in_tmp):
    """eval_env replaces the environment that the file's name suggests."""
    space = {"low": -2.0, "high": 2.0}
    hopper = gym.make("Hopper-v5", disable_env_checker=True).observation_space

    class Robot(make_data.Toy):
        def __init__(self, **_):
            super().__init__()
            self.observation_space = Box(-9, 9, hopper.shape)
            self.action_space = Box(shape=(3,), dtype=np.float32, **space)

        def _observation(self, reward):
            return np.zeros(hopper.shape, np.float32)

        def step(self, action):
            return self._observation(0.0), 0.0, False, False, {}

    gym.register("CqlRobot-v0", Robot, max_episode_steps=5)
    try:
        episodes = random_episodes([9, 9], obs_dim=hopper.shape[0], action_dim=3)
        for episode in episodes:
            episode["actions"] *= 2
        file = d4rl_file(in_tmp / "hopper_mine.hdf5", episodes)
        _, task = loaded(file, eval_env="CqlRobot-v0")
    finally:
        del gym.registry["CqlRobot-v0"]
    assert (task.action_low, task.action_high) == ([-2.0] * 3, [2.0] * 3)


def test_a_guess_gives_way_to_what_is_recorded(tmp_path):
    """A file joins data of another version of the environment of its name."""
    episodes = random_episodes([9, 9], obs_dim=11, action_dim=3)
    env = gym.make("Hopper-v5", disable_env_checker=True)
    recorded = minari_dataset(tmp_path, "toy/hop-v0", episodes, env=env)
    guessed = d4rl_file(tmp_path / "hopper_medium-v2.hdf5", episodes)
    for names in ([recorded, guessed], [guessed, recorded]):
        assert task_of(names).env_id == "Hopper-v5"
        assert len(load(names)) == 36


@pytest.mark.parametrize(
    "name, other",
    [
        ("antmaze-umaze-v2", "D4RL/antmaze/"),
        ("kitchen-complete-v0", "D4RL/kitchen/"),
        ("hopper-medium-v2", "mujoco/hopper/"),
    ],
)
def test_a_name_of_d4rl_s(name, other, refused):
    """The message names other data only if they exist."""
    error = refused(None, f"--env {name}", ".hdf5", env=name)
    assert "other data" not in error or other in error


def test_an_own_dataset_of_such_a_name(tmp_path, monkeypatch):
    """A dataset on the disk is read although its name is one of D4RL's."""
    toy_dataset(tmp_path, "hopper-mine-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    same(everything(load("hopper-mine-v0")), transitions(toy_episodes()))


def test_float64_data(tmp_path):
    """Statistics are exact even where float32 sums are not."""
    episodes = random_episodes([400] * 5)
    for e in episodes:
        e["observations"] = 1000 + e["observations"].astype(np.float64)
        e["actions"] = e["actions"].astype(np.float64)
    spaces = {"observation_space": Box(-np.inf, np.inf, (3,), np.float64)}
    spaces["action_space"] = Box(-1, 1, (2,), np.float64)
    for path in (
        minari_dataset(tmp_path, "toy/wide-v0", episodes, **spaces),
        d4rl_file(tmp_path / "wide.hdf5", episodes),
    ):
        dataset = load(path)
        same(everything(dataset), transitions(episodes))
        mean, std = dataset.statistics()
        np.testing.assert_allclose(mean, states(episodes).mean(0), rtol=1e-7)
        np.testing.assert_allclose(std, states(episodes).std(0) + 1e-3, rtol=1e-4)


def test_memory(tmp_path):
    """Next observations are not stored twice: 1.2 times the size of the data."""
    episodes = random_episodes([500] * 4, obs_dim=11, action_dim=3)
    dataset = load(d4rl_file(tmp_path / "big.hdf5", episodes))
    kept = [*vars(dataset).values(), *dataset.columns.values()]
    size = sum(x.nbytes for x in kept if hasattr(x, "nbytes"))
    numbers = 4 * len(dataset) * (11 + 3 + 1 + 1)
    assert numbers <= size <= 1.2 * numbers


def test_other_files_are_left_alone(tmp_path):
    """Training does not write into a dataset, not even its times."""
    path, file = toy_dataset(tmp_path / "datasets"), d4rl_file(tmp_path / "toy.hdf5")
    files = [file, *path.rglob("*.*")]
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    for env in (path, file):
        assert run(env=env, checkpoints_path="null")[0] == 0
    assert [(f.read_bytes(), f.stat().st_mtime_ns) for f in files] == before
    with h5py.File(file, "a"):
        pass  # opening for writing shows that the file was closed


@pytest.mark.parametrize("form", ["minari", "d4rl"])
def test_a_file_that_another_process_writes(form, tmp_path):
    """The message says that the file is locked, not that it is damaged."""
    path = file = d4rl_file(tmp_path / "toy.hdf5")
    if form == "minari":
        path = toy_dataset(tmp_path / "datasets")
        file = path / "data" / "main_data.hdf5"
    with open(file, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(cql.UserError, match="locked") as error:
            load(path)
    assert str(path) in str(error.value) and "damaged" not in str(error.value)
    assert len(load(path)) == len(transitions(toy_episodes()).rewards)


def test_a_file_of_many_episodes_gets_a_short_message(tmp_path, refused):
    """The message does not list all names in the file."""
    with h5py.File(tmp_path / "many.hdf5", "w") as file:
        for i in range(3000):
            file.create_group(f"episode_{i}")
    error = refused(None, "observations", "episode_0", env=tmp_path / "many.hdf5")
    assert len(error) < 500


# --------------------------------------------------------------------------------------
# Several files
# --------------------------------------------------------------------------------------


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
        mean, std = dataset.statistics()
        np.testing.assert_allclose(mean, states(episodes).mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(std, states(episodes).std(0) + 1e-3, rtol=1e-5)


def test_joined_data_of_other_settings(in_tmp):
    paths = [toy_dataset(in_tmp / str(p), env_kwargs={"push": p}) for p in (0.3, 0.9)]
    status, out, _ = run(env=paths, resume="out")
    assert status == 0 and "0.9" in out and "the first dataset" in out


@pytest.mark.parametrize("form", ["minari", "d4rl"])
def test_two_kinds_of_actions_do_not_join(form, tmp_path, refused):
    """Both orders are refused."""
    moved = random_episodes([9, 9], action_dim=1)
    chosen = [{**e, "actions": (e["actions"] > 0).astype(int)} for e in moved]
    paths = [d4rl_file(tmp_path / "moved.hdf5", moved)]
    if form == "minari":
        flat = [{**e, "actions": e["actions"].ravel()} for e in chosen]
        space = {"action_space": gym.spaces.Discrete(2)}
        paths.append(minari_dataset(tmp_path, "toy/chosen-v0", flat, **space))
    else:
        paths.append(d4rl_file(tmp_path / "chosen.hdf5", chosen))
    for order in (paths, paths[::-1]):
        refused(None, "2 discrete", "1 number in [-1, 1]", env=order)


def test_ids_that_one_of_the_files_lacks(tmp_path):
    """The joined data has all actions of its files."""
    paths = []
    for first in (0, 2):
        episodes = random_episodes([8, 8], seed=first)
        actions = first + np.arange(16) % 2
        path = tmp_path / f"{first}.hdf5"
        paths.append(d4rl_file(path, episodes, actions=actions))
    for order in (paths, paths[::-1]):
        task = task_of(order)
        assert task.discrete and (task.action_low, task.action_high) == ([0], [3])
        actions = everything(load(order)).actions
        assert sorted(set(actions.ravel().tolist())) == [0, 1, 2, 3]


# --------------------------------------------------------------------------------------
# Episodes
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_nothing_crosses_an_episode_s_end(seed, tmp_path):
    """Every (s, s') is a pair of consecutive rows of one episode; none is missing."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 1, 2, 3, 5, 17], rng.integers(3, 30))
    episodes = random_episodes(lengths, seed)
    flagged = [e for e in episodes if e["terminations"][-1] or e["truncations"][-1]]
    for path, source in (
        (minari_dataset(tmp_path, "toy/a-v0", episodes), episodes),
        (d4rl_file(tmp_path / "b.hdf5", episodes), episodes),
        (d4rl_file(tmp_path / "c.hdf5", episodes, timeouts=None), episodes),
        (d4rl_file(tmp_path / "d.hdf5", flagged, next_observations=None), flagged),
    ):
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
    assert batch.keys() == set(FIELDS)
    assert [x.shape[:2] for x in batch.values()] == [(2, 3)] * 5
    for field in FIELDS:
        np.testing.assert_array_equal(batch[field], getattr(rows, field)[indices])


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


@pytest.mark.parametrize("form", ["minari", "d4rl"])
@pytest.mark.parametrize("truth", [100, -1, 0.5])
def test_a_flag_that_is_not_zero_is_true(form, truth, tmp_path):
    """Flags are true for any number but zero."""
    episodes = random_episodes([4, 1, 7])  # a terminal, a time limit, a cut
    flags = [
        {key: e[key] * truth for key in ("terminations", "truncations")}
        for e in episodes
    ]
    if form == "minari":
        path = minari_dataset(tmp_path, "toy/flags-v0", episodes)
        with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
            for i, each in enumerate(flags):
                for key, value in each.items():
                    del file[f"episode_{i}/{key}"]
                    file[f"episode_{i}/{key}"] = value
    else:
        terminals, timeouts = (
            np.concatenate([each[key] for each in flags]) for key in flags[0]
        )
        path = tmp_path / "flags.hdf5"
        d4rl_file(path, episodes, terminals=terminals, timeouts=timeouts)
    dataset = load(path)
    same(everything(dataset), transitions(episodes))
    returns = [e["rewards"].sum() for e in episodes]  # the last one is cut
    np.testing.assert_allclose(dataset.returns, returns[:2])


def test_jumps_split_episodes(tmp_path):
    """An end without a flag shows as a next observation that is not the next row. The
    return of such an episode does not count as a whole episode's."""
    episodes = random_episodes([4, 6, 3], ends="cut")
    dataset = load(d4rl_file(tmp_path / "a.hdf5", episodes, timeouts=None))
    same(everything(dataset), transitions(episodes))
    assert list(dataset.lengths) == [4, 6, 3]


def test_rounding_is_no_jump(tmp_path):
    """Rounding of next_observations to float32 does not split episodes."""
    episodes = random_episodes([4, 6, 3], ends="timeout")
    for episode in episodes:
        episode["observations"][:, 2] = 7.0  # a constant column
    after = np.concatenate([e["observations"][1:] for e in episodes])
    rounded = after * (1 + np.finfo(np.float32).eps)
    file = d4rl_file(tmp_path / "a.hdf5", episodes, next_observations=rounded)
    dataset = load(file)
    assert list(dataset.lengths) == [4, 6, 3]
    for actual, expected in zip(everything(dataset)[:5], transitions(episodes)):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("centre", [0.0, 3e4])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_shuffled_rows_keep_their_own_next_observations(centre, kind, tmp_path):
    """Rows far from zero are told apart, too; a relative tolerance would not do."""
    rng = np.random.default_rng(0)
    [episode] = random_episodes([400], ends="timeout")
    walk = (centre + rng.normal(size=(401, 3))).astype(kind)
    order = rng.permutation(400)
    file = d4rl_file(
        tmp_path / "shuffled.hdf5",
        [episode],
        observations=walk[:-1][order],
        next_observations=walk[1:][order],
        timeouts=None,
    )
    dataset = load(file)
    batch = everything(dataset)
    np.testing.assert_array_equal(batch.observations, walk[:-1][order].astype("f4"))
    roundings = 8 * np.finfo(np.float32).eps * max(centre, 1)
    wanted = walk[1:][order]
    np.testing.assert_allclose(batch.next_observations, wanted, rtol=0, atol=roundings)
    assert np.median(dataset.lengths) == 1


def test_a_file_of_one_transition(tmp_path):
    file = d4rl_file(tmp_path / "a.hdf5", random_episodes([1], ends="terminal"))
    assert len(load(file)) == 1


def test_the_run_says_what_is_left_out(in_tmp):
    episodes = random_episodes([5, 6, 7], ends="timeout")
    path = d4rl_file(in_tmp / "bare.hdf5", episodes, next_observations=None)
    status, out, _ = run(env=path, resume="out")
    assert status == 0
    told = line(out, "data:")
    assert "3 episodes, 15 transitions (3 more" in told and "left out" in told


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_next_observations_in_another_type(tmp_path, kind, capsys):
    """Numbers that were rounded to their type are the same numbers."""
    episodes = random_episodes([20, 20, 20], ends="timeout")
    after = np.concatenate([e["observations"][1:] for e in episodes]).astype(kind)
    dataset = load(d4rl_file(tmp_path / "x.hdf5", episodes, next_observations=after))
    assert list(dataset.lengths) == [20, 20, 20] and capsys.readouterr().out == ""
    batch = everything(dataset)
    np.testing.assert_array_equal(batch.next_observations[19::20], after[19::20])


def test_a_file_in_float16(tmp_path, recwarn):
    """Sums of its numbers exceed float16; there is no warning and no infinity."""
    episodes = random_episodes([400, 400], ends="timeout")
    arrays = {}
    for name in ("actions", "rewards"):
        whole = np.concatenate([e[name] for e in episodes])
        arrays[name] = (500 * whole if name == "rewards" else whole).astype("f2")
    after = np.concatenate([e["observations"][1:] for e in episodes])
    arrays["observations"] = (1000 * states(episodes)).astype("f2")
    arrays["next_observations"] = (1000 * after).astype("f2")
    dataset = load(d4rl_file(tmp_path / "x.hdf5", episodes, **arrays))
    assert list(dataset.lengths) == [400, 400] and not list(recwarn)
    returns = arrays["rewards"].astype(float).reshape(2, 400).sum(axis=1)
    np.testing.assert_allclose(dataset.returns, returns)
    mean = arrays["observations"].astype(float).mean(axis=0)
    np.testing.assert_allclose(dataset.statistics()[0], mean, rtol=1e-6)


def test_rounded_next_observations_are_reported(in_tmp):
    """Coarser rounding cuts episodes, which one message counts."""
    episodes = random_episodes([20, 20, 20], ends="timeout")
    after = np.concatenate([e["observations"][1:] for e in episodes]).round(2)
    file = d4rl_file(in_tmp / "x.hdf5", episodes, next_observations=after)
    status, out, _ = run(env=file, resume="out")
    assert status == 0 and "x.hdf5: 57 episodes end without terminals or timeouts" in out


@pytest.mark.parametrize("roundings, n", [(3, 2), (6, 4)])
def test_a_few_roundings_do_not_end_an_episode(tmp_path, roundings, n):
    """Observations around 0 with a standard deviation of 1."""
    rng = np.random.default_rng(0)
    episodes = random_episodes([500, 500], ends="timeout")
    for episode in episodes:
        episode["observations"] = rng.normal(size=(501, 3)).astype("f4")
    after = np.concatenate([e["observations"][1:] for e in episodes]).astype(float)
    place = np.abs(after[:, 0]).argsort()[:2]  # where only the deviation allows for them
    after[place, 0] += roundings * np.finfo(np.float32).eps
    file = d4rl_file(tmp_path / "x.hdf5", episodes, next_observations=after)
    assert len(load(file).lengths) == n


def test_every_episode_of_a_minari_dataset(tmp_path):
    episodes = random_episodes([3] * 35)
    path = minari_dataset(tmp_path, "toy/many-v0", episodes)
    same(everything(load(path)), transitions(episodes))


def test_other_readers_while_a_minari_dataset_is_read(tmp_path):
    """Reading it leaves Minari as it is between two episodes."""
    path = minari_dataset(tmp_path, "toy/many-v0", random_episodes([3] * 3))
    decode = cql.hdf5_storage._decode_info
    one, other = (iter(cql.read_data(config_of(path))[0]) for _ in range(2))
    next(one), next(other)
    assert cql.hdf5_storage._decode_info is decode


@pytest.mark.parametrize("n_steps", [1, 3, 100])
def test_transitions_of_n_steps(tmp_path, n_steps):
    """Compared with a loop over the episodes."""
    file = d4rl_file(tmp_path / "x.hdf5", random_episodes([1, 20, 3], ends="timeout"))
    plain, found = load(file, cal_ql=True), load(file, cal_ql=True, n_steps=n_steps)
    every = torch.arange(len(plain)).unsqueeze(0)
    whole, batch = plain.gather(every), found.gather(every)
    first = 0
    for length in plain.lengths:
        for t in range(first, first + length):
            steps = min(n_steps, first + length - t)
            rewards = whole["rewards"][0, t : t + steps].tolist()
            expected = sum(r * 0.99**k for k, r in enumerate(rewards))
            assert float(batch["rewards"][0, t]) == pytest.approx(expected, rel=1e-5)
            if n_steps > 1:
                discount = float(batch["discounts"][0, t])
                assert discount == pytest.approx(0.99**steps)
            for name in ("next_observations", "terminations"):
                reached = whole[name][0, t + steps - 1]
                assert torch.equal(batch[name][0, t], reached), name
        first += length
    for name in ("observations", "actions", "mc_returns"):
        assert torch.equal(batch[name], whole[name])
    assert ("discounts" in batch) == (n_steps > 1)
    assert (found.r_min, found.fingerprint) == (plain.r_min, plain.fingerprint)


def test_a_reward_scale_of_null(tmp_path):
    """The largest return-to-go becomes 100, in whatever unit the data have rewards."""
    learned = []
    for unit in (1.0, 1e-6, 1e4):
        episodes = random_episodes([5, 40])
        for each in episodes:
            each["rewards"] *= unit
        file = d4rl_file(tmp_path / f"{unit}.hdf5", episodes)
        config = config_of(file, reward_scale=None, cal_ql=True)
        dataset = cql.Dataset(config, *cql.read_data(config))
        rewards = dataset.columns["rewards"]
        largest = dataset.columns["mc_returns"].abs().max()
        assert float(largest) == pytest.approx(100)
        learned.append(rewards)
        raw = cql.original_returns(rewards, dataset.reward_factor, config)
        np.testing.assert_allclose(raw, everything(load(file)).rewards, rtol=1e-5)
        assert (dataset.returns == load(file).returns).all()
    torch.testing.assert_close(learned[1], learned[0])
    torch.testing.assert_close(learned[2], learned[0])


def test_a_reward_scale_of_null_where_all_rewards_are_0(tmp_path):
    episodes = random_episodes([5])
    episodes[0]["rewards"][:] = 0
    file = d4rl_file(tmp_path / "x.hdf5", episodes)
    with pytest.raises(cql.UserError, match="all rewards of the dataset are 0; pass a"):
        load(file, reward_scale=None)


def probabilities(dataset, n=200_000):
    """Return how often evenly spread numbers select each transition, [n]."""
    index = dataset.index(torch.arange(n, dtype=torch.float64).unsqueeze(0) / n)
    return np.bincount(index.squeeze(0), minlength=len(dataset)) / n


def expected_probabilities(first, returns, lengths, weight):
    """Probabilities of trajectory_weighting, by an augmented least-squares problem."""
    x = (first - first.mean(0)) / first.std(0)
    d = x.shape[1]
    rows = np.concatenate([x, np.sqrt(d) * np.eye(d)])
    centered = np.concatenate([returns - returns.mean(), np.zeros(d)])
    advantages = returns - x @ np.linalg.lstsq(rows, centered)[0]
    scaled = (advantages - advantages.min()) / np.ptp(returns)
    each = np.repeat(np.exp(weight * scaled), lengths)
    return each / each.sum()


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_trajectory_weighting(tmp_path, weight):
    lengths = [1, 20, 3, 7, 12]
    episodes = random_episodes(lengths, ends="timeout")
    file = d4rl_file(tmp_path / "x.hdf5", episodes)
    # Transformed rewards and sums of several steps do not change it.
    more = dict(n_steps=3, reward_scale=-2.0, reward_bias=1.0)
    found = probabilities(load(file, trajectory_weighting=weight, **more))
    first = np.array([e["observations"][0] for e in episodes], float)
    returns = np.array([e["rewards"].sum() for e in episodes])
    expected = expected_probabilities(first, returns, lengths, weight)
    np.testing.assert_allclose(found, expected, atol=1.1 / 200_000)


def test_trajectory_weighting_of_what_the_first_observation_decides(tmp_path):
    """The return is a function of where an episode starts, so none is better."""
    episodes = random_episodes([5] * 400, ends="timeout")
    for each in episodes:
        each["rewards"][:] = 7 + each["observations"][0] @ [1.0, -2.0, 3.0]
        each["rewards"][0] += 1e-3 * each["observations"][1, 0]
    config = config_of("", trajectory_weighting=10.0)
    source, task = cql.read_data(config_of(d4rl_file(tmp_path / "x.hdf5", episodes)))
    dataset = cql.Dataset(config, source, task)
    returns = np.repeat(dataset.returns, dataset.lengths)
    likely = probabilities(dataset)
    assert abs((likely * returns).sum() - returns.mean()) < 0.1 * returns.std()


@pytest.mark.parametrize("unit", [1.0, 1e-11])
def test_trajectory_weighting_of_equal_returns_is_uniform(tmp_path, unit):
    """Sums of the same numbers in another order differ by rounding errors alone."""
    rewards = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25] * 4])
    episodes = random_episodes([4] * 3, ends="timeout")
    for each, own in zip(episodes, rewards):
        each["rewards"][:] = unit * own
        each["observations"][0] = 0.0
    file = d4rl_file(tmp_path / "x.hdf5", episodes)
    found = probabilities(load(file, trajectory_weighting=10.0))
    np.testing.assert_allclose(found, 1 / 12, rtol=0.05)


def test_trajectory_weighting_in_another_unit(tmp_path):
    found = []
    for unit in (1.0, 1e-11, 1e6):
        episodes = random_episodes([4, 9, 3, 5], ends="timeout")
        for each in episodes:
            each["rewards"] *= unit
        file = d4rl_file(tmp_path / f"{unit}.hdf5", episodes)
        found.append(probabilities(load(file, trajectory_weighting=5.0)))
    np.testing.assert_allclose(found[1:], found[:1] * 2, atol=2e-5)


def test_trajectory_weighting_of_unfinished_episodes(tmp_path):
    """A short rest of an episode, with few negative rewards, is not a good one."""
    lengths = [9, 8, 7, 9, 2]
    episodes = random_episodes(lengths, ends="timeout")
    for i, each in enumerate(episodes):
        each["rewards"][:] = -1.0 - 0.01 * i
    episodes[-1]["truncations"][:] = False
    config = config_of(minari_dataset(tmp_path, "toy/x-v0", episodes))
    source, task = cql.read_data(config)
    config = dataclasses.replace(config, trajectory_weighting=5.0)
    found = probabilities(cql.Dataset(config, source, task))
    whole = probabilities(cql.Dataset(config, list(source)[:-1], task))
    np.testing.assert_allclose(found[:-2] / found[0], whole / whole[0], rtol=0.01)
    assert whole.min() / whole[0] < found[-1] / found[0] < whole.max() / whole[0]


def test_trajectory_weighting_counts_rewards_of_steps_that_are_left_out(tmp_path):
    """Without next_observations an episode lacks its last step, but not its reward."""
    episodes = random_episodes([5] * 4, ends="timeout")
    for i, each in enumerate(episodes):
        each["observations"][0] = 0.0
        each["rewards"][:] = [0, 0, 0, 0, i % 2]
    file = d4rl_file(tmp_path / "x.hdf5", episodes, next_observations=None)
    found = probabilities(load(file, trajectory_weighting=2.0)).reshape(4, 4)
    np.testing.assert_allclose(found[1] / found[0], np.e**2, rtol=1e-3)


def test_trajectory_weighting_stays_within_the_data(tmp_path):
    file = d4rl_file(tmp_path / "x.hdf5", random_episodes([3] * 50))
    dataset = load(file, trajectory_weighting=5.0)
    assert dataset.cumulative.dtype == torch.float64
    largest = torch.full((1, 1), 1 - 2**-53, dtype=torch.float64)
    assert int(dataset.index(largest)) < len(dataset)


def test_trajectory_weighting_of_continued_episodes(tmp_path):
    """An episode that continues another one has the weight of both. What the first
    episode of the data continues is unknown."""
    path = minari_dataset(tmp_path, "toy/x-v0", random_episodes([5, 4, 6, 3]))
    config = config_of(path, trajectory_weighting=2.0)
    source, task = cql.read_data(config)
    episodes = list(source)
    first = np.array([episodes[i].observations[0] for i in (0, 2)], float)
    returns = [sum(episodes[i].rewards.sum() for i in pair) for pair in ((0, 1), (2, 3))]
    for i in (1, 3):
        episodes[i] = episodes[i]._replace(initial=False)
    expected = expected_probabilities(first, np.array(returns), [9, 9], 2.0)
    for begins in (True, False):
        episodes[0] = episodes[0]._replace(initial=begins)
        found = probabilities(cql.Dataset(config, episodes, task))
        np.testing.assert_allclose(found, expected, atol=1.1 / 200_000)


@pytest.mark.parametrize("kind", [list, iter])
def test_a_source_of_your_own_may_be_a_generator(tmp_path, kind):
    config = config_of(toy_dataset(tmp_path))
    episodes, task = cql.read_data(config)
    dataset = cql.Dataset(config, kind(list(episodes)), task)
    same(everything(dataset), everything(cql.Dataset(config, episodes, task)))


@pytest.mark.parametrize("kind", [np.ndarray.tolist, torch.as_tensor])
def test_a_source_of_your_own_may_hold_lists_or_tensors(tmp_path, kind):
    config = config_of(toy_dataset(tmp_path))
    episodes, task = cql.read_data(config)
    own = []
    for each in episodes:
        arrays = {k: kind(x) for k, x in each._asdict().items() if np.ndim(x)}
        own.append(each._replace(**arrays))
    dataset = cql.Dataset(config, own, task)
    same(everything(dataset), everything(cql.Dataset(config, episodes, task)))


def test_a_source_of_your_own_with_too_few_recorded_rewards(tmp_path):
    config = config_of(toy_dataset(tmp_path))
    episodes, task = cql.read_data(config)
    own = [each._replace(recorded_rewards=each.rewards[:2]) for each in episodes]
    with pytest.raises(cql.UserError, match="episode 0: 2 recorded_rewards; expected"):
        cql.Dataset(config, own, task)


def test_joined_files_that_float32_cannot_tell_apart(tmp_path):
    files = []
    for day in range(2):
        episodes = random_episodes([20])
        observations = np.concatenate([e["observations"] for e in episodes])
        observations = observations.astype(float)
        observations[:, 0] = 1e9 + 10 * day
        episodes[0]["observations"] = observations
        files.append(d4rl_file(tmp_path / f"{day}.hdf5", episodes))
        load(files[-1])
    with pytest.raises(cql.UserError, match="column 0 .* float32 cannot resolve"):
        load(files)


@pytest.mark.parametrize("chunk", [1, 7, 20, 1000])
def test_the_size_of_chunks_changes_nothing(tmp_path, chunk, monkeypatch):
    episodes = random_episodes([1, 20, 3, 30], ends="timeout")
    file = d4rl_file(tmp_path / "x.hdf5", episodes, timeouts=None)
    monkeypatch.setattr(cql, "chunk_rows", lambda array: chunk)
    dataset = load(file)
    assert list(dataset.lengths) == [1, 20, 3, 30]
    same(everything(dataset), transitions(episodes))
    mean, std = dataset.statistics()
    np.testing.assert_allclose(mean, states(episodes).mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(std, states(episodes).std(0) + 1e-3, rtol=1e-6)


@pytest.mark.parametrize(
    "kind, lengths",
    [("minari", [1000] * 60), ("hdf5", [1000] * 60), ("hdf5", [60_000])],
)
def test_loading_takes_little_more_memory_than_the_dataset(tmp_path, kind, lengths):
    """The largest memory of Python and NumPy is at most twice the Dataset's; with a
    single episode, which is read as a whole, four times."""
    episodes = random_episodes(lengths, obs_dim=40)
    path = tmp_path / "x.hdf5"
    if kind == "hdf5":
        d4rl_file(path, episodes)
    else:
        path = minari_dataset(tmp_path, "toy/large-v0", episodes)
    del episodes
    load(path)  # libraries are imported
    tracemalloc.start()
    try:
        dataset = load(path)
        dataset.statistics()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    tensors = [dataset.observations, dataset.rows, *dataset.columns.values()]
    size = sum(tensor.nbytes for tensor in tensors)
    assert size < peak < (2 if len(lengths) > 1 else 4) * size


def test_a_d4rl_file_that_does_not_say_where_episodes_end(in_tmp, capsys):
    episodes = random_episodes([30, 30], ends="timeout")
    nothing = {"timeouts": None, "next_observations": None}
    dataset = load(d4rl_file(in_tmp / "x.hdf5", episodes, **nothing))
    assert "timeouts" in line(capsys.readouterr().out, "x.hdf5")
    assert list(dataset.lengths) == [59] and dataset.left_out == 1
    dataset = load(d4rl_file(in_tmp / "y.hdf5", episodes, timeouts=None))
    assert (
        "y.hdf5: 1 episodes end without terminals or timeouts" in capsys.readouterr().out
    )
    assert list(dataset.lengths) == [30, 30] and dataset.left_out == 0


# --------------------------------------------------------------------------------------
# Observations
# --------------------------------------------------------------------------------------

VECTOR = Box(-9, 9, (2,))
COUNTED = {
    "discrete": gym.spaces.Discrete(4),
    "discrete from 3": gym.spaces.Discrete(4, start=3),
    "multi-discrete": gym.spaces.MultiDiscrete([3, 1, 4]),
    "multi-discrete from -1": gym.spaces.MultiDiscrete([3, 2], start=[-1, 5]),
    "a table of them": gym.spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "multi-binary": gym.spaces.MultiBinary(5),
    "a table of bits": gym.spaces.MultiBinary([2, 3]),
}
NESTED = {
    "dictionary": Dict({"z": VECTOR, "a": Box(-9, 9, (1,)), "M": Box(-9, 9, (2, 2))}),
    "ordered": Dict([("z", VECTOR), ("a", Box(-9, 9, (3,)))]),
    "tuple": Tuple([Box(-9, 9, (i % 3 + 1,)) for i in range(12)]),
    "nested": Dict(b=Tuple((VECTOR, Dict(y=VECTOR, x=Box(-9, 9, ())))), a=VECTOR),
    "matrix": Box(-9, 9, (2, 3)),
    "integers": Dict(a=Box(0, 9, (2,), np.int64), b=VECTOR),
    "all of them": Dict(a=Tuple(list(COUNTED.values())), b=VECTOR),
    **COUNTED,
}


@pytest.mark.parametrize("kind", NESTED)
def test_observations_are_flattened_as_gymnasium_does(kind, tmp_path):
    """Integer observations become one-hot vectors."""
    space, episodes = NESTED[kind], random_episodes([5, 1, 4])
    space.seed(0)
    flat = []
    for episode in episodes:
        samples = [space.sample() for _ in episode["observations"]]
        episode["observations"] = make_data.stacked(samples)
        vectors = np.stack([gym.spaces.flatten(space, s) for s in samples])
        flat.append({**episode, "observations": vectors})
    path = minari_dataset(tmp_path, "toy/nested-v0", episodes, observation_space=space)
    same(everything(load(path)), transitions(flat))
    assert task_of(path).observation_dim == gym.spaces.flatdim(space)


@pytest.mark.parametrize("value", [-1, 3])
def test_a_number_outside_its_space_is_refused(value, tmp_path):
    """Such a number would set another entry of the one-hot vector."""
    space = Dict(a=gym.spaces.MultiDiscrete([3, 3]), b=gym.spaces.Discrete(3))
    for key in "ab":
        episodes = random_episodes([5, 1, 4])
        for episode in episodes:
            n = len(episode["observations"])
            parts = {"a": np.zeros((n, 2), int), "b": np.zeros(n, int)}
            episode["observations"] = parts
        episodes[1]["observations"][key][1] = value
        name = f"toy/outside-{key}-v0"
        path = minari_dataset(tmp_path, name, episodes, observation_space=space)
        with pytest.raises(cql.UserError, match=re.escape(str(path))):
            load(path)


class Spy(make_data.Toy):
    """The toy environment; it records observations and actions."""

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
    """Evaluation and load_policy choose the same actions for raw observations of each
    layout, and for flat observations in the data's order."""
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
    del Spy.seen[0]  # the environment was tried before training
    assert len(Spy.seen) >= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shown, action in Spy.seen:
            np.testing.assert_allclose(policy(shown), action, rtol=1e-4, atol=1e-6)
    env = gym.make("CqlToy-v0", layout=layout.split()[0])
    first, vector = env.reset(seed=0)[0], everything(load(path)).observations[0]
    np.testing.assert_allclose(policy(first), policy(vector), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["FrozenLake-v1", "Blackjack-v1"])
def test_counted_observations_are_evaluated(name, in_tmp):
    """Integers and tuples of integers are evaluated, with discrete actions."""
    env = gym.make(name)
    episodes = make_data.rollout(env, 12)
    path = minari_dataset(in_tmp, "toy/counted-v0", episodes, env=env)
    status, _, err = run(env=path, resume="out", cql_n_actions=None)
    assert (status, err) == (0, "") and len(evaluations(in_tmp / "out")) == 1
    policy = cql.load_policy("out/checkpoint.pt")
    shown, _ = env.reset(seed=0)
    vector = gym.spaces.flatten(env.observation_space, shown)
    assert env.action_space.contains(policy(shown)) and policy(shown) == policy(vector)


# --------------------------------------------------------------------------------------
# Actions
# --------------------------------------------------------------------------------------

WHOLE = np.arange(40) % 3 - 1  # -1, 0, 1
ACTIONS = {
    "one integer column": (abs(WHOLE), "2 discrete, 0 and 1", ""),
    "a column of its own": (abs(WHOLE)[:, None], "2 discrete, 0 and 1", ""),
    "bytes": ((WHOLE + 1).astype(np.uint8), "3 discrete, 0 to 2", ""),
    "truth values": (WHOLE == 0, "2 discrete, 0 and 1", ""),
    "ids from -1": (WHOLE, "3 discrete, -1 to 1", ""),
    "ids with a gap": (abs(WHOLE) * 2 + 1, "3 discrete, 1 to 3", "do not occur"),
    "two integer columns": (
        np.stack([WHOLE] * 2, 1),
        "2 numbers in [-1, 1]",
        "whole numbers",
    ),
    "whole floats": (WHOLE.astype(float), "1 number in [-1, 1]", "whole numbers"),
    "three numbers": (np.stack([WHOLE / 2] * 3, 1), "3 numbers in [-1, 1]", ""),
}


@pytest.mark.parametrize("kind", ACTIONS)
def test_what_the_actions_are_taken_to_be(kind, in_tmp):
    """The opening lines describe the actions, and a policy returns such actions."""
    actions, described, word = ACTIONS[kind]
    episodes = random_episodes([20, 20])
    file = d4rl_file(in_tmp / "table.hdf5", episodes, actions=actions)
    status, out, err = run(env=file, resume="out")
    assert (status, err) == (0, "")
    assert line(out, "actions:") == f"actions: {described}"
    said = "do not occur" in out or "whole numbers" in out
    assert said == bool(word) and word in out
    action = cql.load_policy("out/checkpoint.pt")(states(episodes))
    if "discrete" in described:
        assert np.isin(action, np.arange(actions.min(), actions.max() + 1)).all()
    else:
        assert action.size == 40 * int(described[0]) and (abs(action) <= 1).all()


@pytest.mark.parametrize(
    "actions, name, described",
    [
        (abs(WHOLE), "CqlThree-v0", "3 discrete, 0 to 2"),  # one action never occurs
        (abs(WHOLE).astype(np.float32), "CqlThree-v0", "3 discrete, 0 to 2"),
        (WHOLE, "CqlUnit-v0", "1 number in [-1, 1]"),
        (np.stack([WHOLE * 3] * 2, 1), "CqlWide-v0", "2 numbers in [-3, 3]"),
        (np.stack([WHOLE * 2] * 2, 1), "CqlWhole-v0", "2 numbers in [-2, 2]"),
        (np.stack([WHOLE * 2.0] * 2, 1), "CqlWhole-v0", "2 numbers in [-2, 2]"),
    ],
)
def test_eval_env_says_what_the_actions_are(actions, name, described, levers, in_tmp):
    """The environment's space decides, whatever the stored type. The environment
    refuses actions of another type."""
    file = d4rl_file(in_tmp / "x.hdf5", random_episodes([20, 20]), actions=actions)
    status, out, err = run(env=file, eval_env=name, resume="out")
    assert (status, err) == (0, "")
    assert line(out, "actions:") == f"actions: {described}"
    assert "taken as a box" not in out or "discrete" not in described
    assert len(Levers.done) == 6  # one when it was tried before training
    assert np.all(Levers.done[0] == 0)  # the middle of a box, the first of others
    taken = everything(loaded(file, eval_env=name)[0]).actions
    np.testing.assert_array_equal(taken.ravel(), actions.ravel())


def test_ids_that_eval_env_does_not_have(levers, tmp_path):
    actions = abs(WHOLE) * 2 + 1  # 1 and 3
    file = d4rl_file(tmp_path / "x.hdf5", random_episodes([20, 20]), actions=actions)
    with pytest.raises(cql.UserError, match="0 to 2"):
        loaded(file, eval_env="CqlThree-v0")


def test_eval_env_gives_a_bare_file_its_bounds(in_tmp, levers):
    episodes = random_episodes([20, 20])
    for episode in episodes:
        episode["actions"] *= 3
    file = d4rl_file(in_tmp / "wider.hdf5", episodes)
    data, task = loaded(file, eval_env="CqlWide-v0")
    assert (task.action_low, task.action_high) == ([-3, -3], [3, 3])
    same(everything(data), transitions(episodes))
    with pytest.raises(cql.UserError, match="actions.*--eval_env"):
        loaded(file)


def test_actions_of_a_box_of_integers_are_rounded():
    task = cql.make_task(Box(-9, 9, (3,)), LEVERS["CqlWhole-v0"])
    actions = task.to_environment(np.array([[1.6, -1.6], [-0.4, 2.0]]))
    assert actions.dtype == np.int64 and actions.tolist() == [[2, -2], [0, 2]]


@pytest.mark.parametrize("stored", [np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["CqlWhole-v0", "CqlSingle-v0"])
def test_actions_are_cast_to_the_environment_s_type(name, stored, levers, in_tmp):
    """Actions have the environment's type, whatever type the dataset recorded. The
    environment refuses others."""
    episodes = random_episodes([9, 9])
    for episode in episodes:
        episode["actions"] = np.rint(2 * episode["actions"]).astype(stored)
    env = gym.make(name, disable_env_checker=True)
    path = minari_dataset(in_tmp, "toy/cast-v0", episodes, env=env)
    file = path / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    space = json.loads(metadata["action_space"])
    space["dtype"] = np.dtype(stored).name
    file.write_text(json.dumps({**metadata, "action_space": json.dumps(space)}))
    flags = {"max_timesteps": 60, "policy_lr": 1e-2}  # far from acting like zero
    status, _, err = run(env=path, resume="out", **flags)
    assert (status, err) == (0, "") and len(Levers.done) == 6
    action = cql.load_policy("out/checkpoint.pt")(np.zeros(3, np.float32))
    np.testing.assert_allclose(action, Levers.done[1], rtol=1e-5)


@pytest.mark.parametrize(
    "bound, outcome",
    [
        (1.0, ""),
        (20.0, ""),  # 40 times as wide as the actions are large
        (30.0, "reported"),
        (4e4, "reported"),
        (6e4, "refused"),
        (1e6, "refused"),  # what a simulator records for "no bounds"
        (3e38, "refused"),
    ],
)
def test_bounds_far_wider_than_the_actions(bound, outcome, tmp_path, capsys):
    env = gym.make("CqlToy-v0", low=[-bound, -1], high=[bound, 1])
    episodes = random_episodes([40])
    actions = episodes[0]["actions"]
    actions[:, 0] *= 1 / np.abs(actions[:, 0]).max()
    actions[:, 1] = 0.5 + 1e-7 * (np.arange(40) % 2)  # a constant but for noise
    path = minari_dataset(tmp_path, "toy/wide-v0", episodes, env=env)
    if outcome == "refused":
        with pytest.raises(cql.UserError, match="action 0 .* too wide for float32"):
            load(path)
    else:
        load(path)
        out = capsys.readouterr().out
        assert ("action 0 is at most 1 in size" in out) == (outcome == "reported")
        assert "action 1" not in out


@pytest.mark.parametrize("low, high", [([-2, 0], [6, 0.5]), ([0, -1e-3], [100, 1e-3])])
def test_actions_keep_their_bounds_from_end_to_end(low, high, in_tmp):
    """A cloned policy returns actions near the bounds, and evaluation works in an
    environment that refuses actions out of bounds."""
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


# --------------------------------------------------------------------------------------
# Statistics, rewards, returns
# --------------------------------------------------------------------------------------


def test_statistics_are_of_the_transitions_states(in_tmp):
    """Statistics are over s; an outlier in next observations has no effect."""
    episodes = random_episodes([5, 1, 7])
    episodes[1]["observations"][-1] = 1e6
    path = minari_dataset(in_tmp, "toy/outlier-v0", episodes)
    mean, std = load(path).statistics()
    np.testing.assert_allclose(mean, states(episodes).mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std, states(episodes).std(0) + 1e-3, rtol=1e-5)
    for normalize in (True, False):
        out = in_tmp / f"normalize-{normalize}"
        assert run(env=path, normalize=normalize, resume=out)[0] == 0
        agent = torch.load(out / "checkpoint.pt", weights_only=True)["agent"]
        expected = (mean, std) if normalize else (torch.zeros(3), torch.ones(3))
        for name, value in zip(("observation_mean", "observation_std"), expected):
            torch.testing.assert_close(agent[f"units.{name}"], value.float())


def with_column(tmp_path, form, column):
    """Return a dataset of 400 states with this second column, [401]."""
    [episode] = random_episodes([400], ends="timeout")
    observations = episode["observations"].astype(column.dtype)
    observations[:, 1] = column
    episode["observations"] = observations
    if form == "d4rl":
        return d4rl_file(tmp_path / "column.hdf5", [episode])
    space = Box(-np.inf, np.inf, (3,), column.dtype)
    return minari_dataset(tmp_path, "toy/column-v0", [episode], observation_space=space)


STEPS = np.arange(401.0)


@pytest.mark.parametrize("form", ["minari", "d4rl"])
@pytest.mark.parametrize("column", [1.7e9 + STEPS, -3e4 + 1e-3 * STEPS])
def test_a_column_that_float32_would_flatten(form, column, tmp_path, refused):
    """Unix time of 400 seconds has four different values in float32."""
    assert len(np.unique(column.astype(np.float32))) < 401
    refused(
        None, "--env", "column 1", "float32", env=with_column(tmp_path, form, column)
    )


@pytest.mark.parametrize("form", ["minari", "d4rl"])
@pytest.mark.parametrize(
    "column",
    [
        0.3 + 1e-7 * np.sin(STEPS),  # the pose of an object at rest
        1000 + np.sin(STEPS),
        np.full(401, 1.7e9),
        np.full(401, 1e12 + 0.1),
        np.full(401, 1200.3, np.float32),  # float32 sums of it are inexact
        np.full(401, 12345.678, np.float32),
        np.full(401, 0.0),
    ],
)
def test_a_column_that_float32_holds_well_enough(form, column, tmp_path):
    dataset = load(with_column(tmp_path, form, column))
    wanted = column[:-1].astype(np.float32)
    np.testing.assert_array_equal(everything(dataset).observations[:, 1], wanted)


def test_the_fingerprint_is_of_what_is_learned_from(tmp_path):
    """The fingerprint is the number of transitions, and the float64 sums of transformed
    float32 rewards and of |observations|."""
    episodes = toy_episodes()
    rewards = np.concatenate([e["rewards"] for e in episodes])
    seen = np.concatenate([e["observations"] for e in episodes]).astype(float)
    learned = np.float32(rewards).astype(float)
    wanted = [len(rewards), learned.sum(), np.abs(seen).sum()]
    file = d4rl_file(tmp_path / "one.hdf5", episodes)
    minari = toy_dataset(tmp_path / "datasets")
    for dataset in (load(file), load(minari), load(file, cal_ql=True)):
        np.testing.assert_allclose(dataset.fingerprint, wanted, rtol=1e-9)
    scaled = np.float32(np.float32(rewards) * np.float32(3)).astype(float)
    fingerprint = load(file, reward_scale=3.0).fingerprint
    np.testing.assert_allclose(fingerprint[1], scaled.sum(), rtol=1e-9)
    others = {
        "rewards": {"rewards": -rewards},
        "observations": {"observations": 1.001 * states(episodes)},
    }
    for change in others.values():
        other = load(d4rl_file(tmp_path / "other.hdf5", episodes, **change))
        assert not np.allclose(other.fingerprint, wanted, rtol=1e-6)


def test_data_may_move_between_two_halves_of_a_run(in_tmp):
    """A resumed run accepts moved data, but not other data."""
    path = toy_dataset(in_tmp / "here")
    assert run(env=path, resume="out", max_timesteps=2)[0] == 0
    moved = in_tmp / "there"
    shutil.move(path, moved)
    status, _, err = run(env=moved, resume="out", max_timesteps=4)
    assert (status, err) == (0, "")
    assert [row["step"] for row in evaluations(in_tmp / "out")][-1] == "4"
    other = toy_dataset(in_tmp / "other", seed=1)
    status, _, err = run(env=other, resume="out", max_timesteps=6)
    assert status == 2 and "--env" in err and "the run began with 54" in err


@pytest.mark.parametrize("form", ["minari", "d4rl", "d4rl without next observations"])
def test_normalize_reward(form, tmp_path):
    """Rewards are multiplied by 1000 / range of whole returns, then transformed."""
    episodes = random_episodes([5, 6, 9, 7], obs_dim=11, action_dim=3, ends="terminal")
    episodes[0]["truncations"] = episodes[0]["terminations"]
    episodes[0]["terminations"] = np.zeros(5, bool)
    episodes[0]["rewards"][-1] -= 20  # the smallest return includes the last step
    returns = [e["rewards"].sum() for e in episodes]
    cut = random_episodes([4], obs_dim=11, action_dim=3, ends="cut")
    cut[0]["rewards"] += 1e4
    episodes += cut
    file, following = tmp_path / "hopper_medium-v2.hdf5", {}
    if form == "minari":
        env = gym.make("Hopper-v5")
        path = minari_dataset(tmp_path, "toy/hop-v0", episodes, env=env)
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
    # A second dataset takes the factor of the first.
    config = config_of(path, normalize_reward=True, **flags)
    second = cql.Dataset(config, *cql.read_data(config), factor=0.5)
    assert second.reward_factor == 0.5
    rewards = everything(second).rewards
    np.testing.assert_allclose(rewards, raw * 0.5 * 2 - 3, rtol=1e-6, atol=1e-6)


def test_rewards_of_several_columns_are_named(refused, tmp_path):
    """The message names rewards and their shape, not the actions (d3rlpy issue 391)."""
    episodes = random_episodes([5, 6])
    for episode in episodes:
        episode["rewards"] = np.stack([episode["rewards"]] * 2, axis=1)
    file = d4rl_file(tmp_path / "two.hdf5", episodes)
    refused(None, "two.hdf5: rewards have shape (11, 2)", env=file, batch_size=2)


def test_boolean_observations(tmp_path):
    """With next_observations, too."""
    episodes = random_episodes([5, 6])
    for episode in episodes:
        episode["observations"] = episode["observations"] > 0
    dataset = load(d4rl_file(tmp_path / "bool.hdf5", episodes))
    expected = transitions(episodes)
    assert h5py.File(tmp_path / "bool.hdf5")["observations"].dtype == bool
    assert (everything(dataset).observations == expected.observations).all()
    assert (everything(dataset).next_observations == expected.next_observations).all()


def test_normalize_reward_elsewhere_says_that_it_does_nothing(tmp_path, capsys):
    path = toy_dataset(tmp_path)
    raw = transitions(toy_episodes()).rewards
    flags = {"reward_scale": 10.0, "reward_bias": -5.0}
    rewards = everything(load(path, normalize_reward=True, **flags)).rewards
    [told] = capsys.readouterr().out.splitlines()
    assert "normalize_reward" in told and "no effect" in told
    np.testing.assert_allclose(rewards, raw * 10 - 5, rtol=1e-6)
    plain = everything(load(path, **flags)).rewards
    np.testing.assert_allclose(plain, raw * 10 - 5, rtol=1e-6)
    assert capsys.readouterr().out == ""


def test_normalize_reward_goes_by_the_data_s_environment(tmp_path):
    """The factor depends on the recorded environment, not on eval_env."""
    episodes = random_episodes([5, 6], obs_dim=11, action_dim=3, ends="terminal")
    path = minari_dataset(tmp_path, "toy/hop-v0", episodes, env=gym.make("Hopper-v5"))
    factors = [
        load(path, normalize_reward=True, eval_env=name).reward_factor
        for name in (None, "Hopper-v4", "CqlToy-v0")
    ]
    assert factors[0] != 1 and factors == factors[:1] * 3


def test_normalize_reward_without_a_whole_episode(tmp_path):
    episodes = random_episodes([9, 9], obs_dim=11, action_dim=3, ends="cut")
    file = d4rl_file(tmp_path / "hopper_medium-v2.hdf5", episodes)
    with pytest.raises(cql.UserError, match="--normalize_reward.*complete episodes"):
        load(file, normalize_reward=True)


def test_returns_to_go_end_with_their_episode(tmp_path):
    """Returns-to-go use transformed rewards of the transitions that are kept."""
    parts = [random_episodes([5, 1, 3], 1), random_episodes([4, 2], 2, ends="timeout")]
    paths = [
        minari_dataset(tmp_path, "toy/one-v0", parts[0]),
        d4rl_file(tmp_path / "two.hdf5", parts[1], next_observations=None),
    ]
    data = load(paths, cal_ql=True, discount=0.9, reward_scale=2.0, reward_bias=1.0)
    kept = [e["rewards"] for e in parts[0]] + [e["rewards"][:-1] for e in parts[1]]
    wanted = []
    for rewards in kept:
        for t in range(len(rewards)):
            wanted.append(sum((2 * r + 1) * 0.9**k for k, r in enumerate(rewards[t:])))
    np.testing.assert_allclose(data.columns["mc_returns"], wanted, rtol=1e-5, atol=1e-6)


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
    assert line(out, "evaluation: none") and "--eval_env" in out
    assert "left out" not in out
    with open("out/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    for column in ("average_qf1", "cql_q1_current_actions", "cql_q1_rand"):
        assert all(np.isfinite(float(row[column])) for row in rows)
    table = in_tmp / "out" / "evaluations.csv"
    assert not table.exists() or evaluations(in_tmp / "out") == []
    assert (in_tmp / "out" / "checkpoint.pt").exists()


def test_the_evaluation_environment_comes_first(in_tmp):
    """The environment recorded for evaluation is preferred; here nothing moves in it."""
    still = gym.make("CqlToy-v0", push=0.0, max_episode_steps=9)
    path = toy_dataset(in_tmp, eval_env=still)
    assert run(env=path, resume="out", n_episodes=3)[0] == 0
    assert float(evaluations(in_tmp / "out")[0]["length_mean"]) == 9
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    assert json.loads(metadata["env_spec"])["max_episode_steps"] == 20


def test_the_recorded_environment_by_its_name(tmp_path):
    """The recorded settings apply if eval_env names the recorded environment."""
    path = toy_dataset(tmp_path, env_kwargs={"push": 0.1})
    task = task_of(path)
    for name, push in (
        (None, 0.1),
        ("CqlToy-v0", 0.1),
        ("make_data:CqlToy-v0", 0.1),
        ("CqlEndless-v0", 0.3),
    ):
        env = cql.make_env(config_of(path, eval_env=name), task)
        assert env.unwrapped.push == push


def limit(env, **flags):
    """Return the time limit of evaluation in `env`'s environment."""
    config = config_of(env, **flags)
    made = cql.make_env(config, cql.read_data(config)[1])
    return made.get_wrapper_attr("_max_episode_steps")


def test_the_limit_is_the_environment_s(tmp_path):
    """The recorded limit applies in the recorded environment, the registered limit in
    others; the flag overrides both."""
    env = gym.make("CqlToy-v0", max_episode_steps=11)
    path = minari_dataset(tmp_path, "toy/limit-v0", toy_episodes(), env=env)
    assert limit(path) == limit(path, eval_env="CqlToy-v0") == 11
    bare = d4rl_file(tmp_path / "bare.hdf5")
    assert limit(bare, eval_env="CqlToy-v0") == 20
    assert limit(path, max_episode_steps=7) == 7
    assert limit(bare, eval_env="CqlEndless-v0", max_episode_steps=30) == 30


def test_without_any_limit_it_is_the_data_s_longest_recorded_episode(tmp_path):
    """The longest episode counts steps that are left out. The limit is at least 1,000,
    also if shuffled rows make episodes of one step."""
    short, long = random_episodes([13, 5]), random_episodes([5, 1200], ends="timeout")
    endless = {"eval_env": "CqlEndless-v0"}
    env = gym.make("CqlEndless-v0")
    recorded = minari_dataset(tmp_path, "toy/endless-v0", short, env=env)
    assert limit(recorded) == 1000
    assert limit(minari_dataset(tmp_path, "toy/long-v0", long, env=env)) == 1200
    order = np.random.default_rng(0).permutation(18)
    batch = transitions(short)
    shuffled = d4rl_file(
        tmp_path / "shuffled.hdf5",
        short,
        observations=batch.observations[order],
        next_observations=batch.next_observations[order],
    )
    assert max(load(shuffled).lengths) < 5 and limit(shuffled, **endless) == 1000
    cut = d4rl_file(tmp_path / "cut.hdf5", long, next_observations=None)
    assert max(load(cut).lengths) == 1199 and limit(cut, **endless) == 1200
    assert limit([recorded, cut]) == limit([cut, recorded]) == 1200


def test_an_environment_without_a_time_limit_ends(in_tmp):
    """The episode ends at the limit that the opening line names."""
    env = gym.make("CqlEndless-v0", push=0.0)
    assert env.spec.max_episode_steps is None
    path = minari_dataset(in_tmp, "toy/endless-v0", random_episodes([4, 13, 5]), env=env)
    with make_data.deadline(60):
        status, out, _ = run(env=path, resume="out")
    assert status == 0 and "1,000 steps" in line(out, "evaluation")
    assert float(evaluations(in_tmp / "out")[0]["length_mean"]) == 1000


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
    assert "D4RL" in line(out, "evaluation")
    row = evaluations(in_tmp / "out")[0]
    score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)
    assert float(row["d4rl_normalized_score"]) == pytest.approx(score, rel=1e-6)


def test_no_score_without_references(in_tmp):
    status, out, _ = run(env=toy_dataset(in_tmp), resume="out")
    assert status == 0 and "no reference returns" in line(out, "evaluation")
    assert evaluations(in_tmp / "out")[0]["d4rl_normalized_score"] in ("", "nan")


def task_in(env_id, **more):
    """Return a task of the toy's spaces, recorded in this environment."""
    return cql.make_task(Box(-9, 9, (3,)), Box(-1, 1, (2,)), env_id=env_id, **more)


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
def test_the_table_of_references(env_id, low, high):
    settings = {"continuing_task": False} if "AntMaze" in env_id else {}
    task = task_in(env_id, env_kwargs=settings)
    limit = 100 if "Pen" in env_id else 1000
    reference, whose = cql.reference_returns(task, env_id, limit)
    assert reference == [low, high] and "D4RL" in whose
    assert cql.normalized_score((low + high) / 2, reference) == pytest.approx(50)
    own = dataclasses.replace(task, reference=[1.0, 2.0])
    reference, whose = cql.reference_returns(own, env_id)
    assert reference == [1, 2] and "D4RL" not in whose


@pytest.mark.parametrize("limit", [None, 200])
def test_longer_episodes_of_the_pen_are_not_scored(limit):
    """D4RL's returns are those of 100 steps; gymnasium-robotics plays 200."""
    task = task_in("AdroitHandPen-v1")
    reference, why = cql.reference_returns(task, "AdroitHandPen-v1", limit)
    assert reference is None and "100 steps" in why
    own = dataclasses.replace(task, reference=[1.0, 2.0])
    assert cql.reference_returns(own, "AdroitHandPen-v1", limit)[0] == [1, 2]


@pytest.mark.parametrize(
    "env_id, kwargs, recorded",
    [
        ("AntMaze_UMaze-v4", {"continuing_task": True}, True),
        ("AntMaze_UMaze-v4", {}, True),  # the default is true
        ("AntMaze_UMaze-v4", {"continuing_task": False}, False),  # --eval_env's default
        ("FrankaKitchen-v1", {"remove_task_when_completed": False}, True),
    ],
)
def test_no_d4rl_score_where_returns_are_others(env_id, kwargs, recorded):
    """With these settings every step pays what D4RL pays once."""
    task = task_in(env_id if recorded else "Other-v0", env_kwargs=kwargs)
    reference, why = cql.reference_returns(task, env_id)
    assert reference is None and "not scored" in why
    assert math.isnan(cql.normalized_score(1.0, reference))


def test_whose_references():
    """D4RL's references are preferred to those recorded for another environment. The
    recorded ones apply if no environment is recorded."""
    task = task_in("PointMaze_UMaze-v3", reference=[1.0, 2.0])
    assert cql.reference_returns(task, "PointMaze_UMaze-v3")[0] == [1, 2]
    reference, whose = cql.reference_returns(task, "PointMaze_Medium-v3")
    assert reference == [13.13, 277.39] and "D4RL" in whose
    reference, whose = cql.reference_returns(task, "X-v0")
    assert reference == [1, 2] and "PointMaze_UMaze-v3" in whose
    nowhere = dataclasses.replace(task, env_id=None)
    assert cql.reference_returns(nowhere, "X-v0")[0] == [1, 2]


# --------------------------------------------------------------------------------------
# Nothing that a dataset names is run
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
CODE = {"entry_point": "planted:Env", "additional_wrappers": [WRAPPER]}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Return a function that records a spec, and the file that its code writes."""
    marker = tmp_path / "ran"
    (tmp_path / "modules").mkdir()
    source = PLANTED.format(marker=str(marker))
    (tmp_path / "modules" / "planted.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    path = toy_dataset(tmp_path / "datasets")
    file = path / "data" / "metadata.json"

    def record(without=(), also=(), **spec):
        metadata = json.loads(file.read_text())
        spec = {**json.loads(metadata["env_spec"]), **spec}
        metadata |= {"env_spec": json.dumps(spec), "eval_env_spec": json.dumps(spec)}
        metadata |= dict(also)
        for key in without:
            del metadata[key]
        file.write_text(json.dumps(metadata))
        return path

    yield record, marker
    sys.modules.pop("planted", None)
    gym.registry.pop("Planted-v0", None)


def test_the_planted_code_would_run(planted):
    """--eval_env runs the planted code, so the tests below can fail."""
    record, marker = planted
    assert run(env=record(), eval_env="planted:Planted-v0")[0] == 0
    assert marker.read_text() == "ran"


def test_an_entry_point_and_a_wrapper_are_not_run(planted):
    record, marker = planted
    status, out, err = run(env=record(**CODE))
    assert (status, err) == (0, "") and "return" in out  # it was evaluated
    assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("missing", ["observation_space", "action_space"])
@pytest.mark.parametrize("form", ["hdf5", "arrow"])
def test_no_environment_is_made_to_learn_spaces(missing, form, planted, refused):
    record, marker = planted
    path = record([missing], {"data_format": form}, **CODE)
    refused(None, path, missing, env=path)
    assert not marker.exists() and "planted" not in sys.modules


@pytest.mark.parametrize("name", ["planted:Planted-v0", "planted:CqlToy-v0", "planted:"])
def test_an_id_that_names_a_module_is_not_run(name, planted, refused):
    record, marker = planted
    for flags in ({}, {"eval_env": "CqlToy-v0"}):
        refused(None, name, env=record(id=name, entry_point="planted:Env"), **flags)
    assert not marker.exists() and "planted" not in sys.modules


def test_the_other_spec_s_id_is_not_run_either(planted):
    """The id of env_spec is not run if eval_env_spec is plain."""
    record, marker = planted
    plain = json.dumps({"id": "CqlToy-v0"})
    path = record((), {"eval_env_spec": plain}, id="planted:Planted-v0", **CODE)
    assert run(env=path, checkpoints_path="null")[0] in (0, 2)
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


# --------------------------------------------------------------------------------------
# Bad numbers
# --------------------------------------------------------------------------------------


FINITE = ("observations", "actions", "rewards")
FAULTS = [(field, x) for field in FINITE for x in (math.nan, math.inf, -math.inf, 1e300)]
FAULTS.append(("terminations", math.nan))  # any other number but zero is true


@pytest.mark.parametrize("field, value", FAULTS)
def test_a_number_that_is_not_finite_is_named(field, value, tmp_path):
    """The message names file, episode and field, for the first and the last row."""
    for row in (0, -1):  # the last observation follows the last action
        episodes = random_episodes([5, 1, 6, 1, 7])
        episodes = [{**e, field: e[field].astype(float)} for e in episodes]
        episodes[3][field][row, ...] = value
        path = minari_dataset(tmp_path, f"toy/{field}{-row}-v0", episodes)
        named = field.removesuffix("inations").removesuffix("s")
        with pytest.raises(cql.UserError, match=f"{path}.*episode 3.*{named}"):
            load(path)
        file = d4rl_file(tmp_path / "toy.hdf5", episodes)
        # A bad next observation differs from the next row, which splits the episode.
        number = "" if field == "observations" else "3"
        with pytest.raises(cql.UserError, match=f"{file}.*episode {number}.*{named}"):
            load(file)


@pytest.mark.parametrize("fault", ["infinite", "infinite action", "huge", "complex"])
def test_bad_numbers_are_told_in_one_line(fault, in_tmp, recwarn):
    """Neither NumPy nor torch adds a warning."""
    changes, episodes = {}, random_episodes([20, 20], ends="terminal")
    table = states(episodes)
    if fault == "complex":
        changes["observations"] = table.astype(complex)
    elif fault == "infinite action":
        changes["actions"] = np.full((40, 2), np.inf)
    else:
        table[3] = np.inf if fault == "infinite" else 2e38
        changes["observations"] = table
    path = d4rl_file(in_tmp / "bad.hdf5", episodes, **changes)
    status, _, error = run(env=path, resume="out", normalize=False, max_timesteps=30)
    assert (status, error.count("\n")) == ((3, 0) if fault == "huge" else (2, 1))
    assert not [str(warning.message) for warning in recwarn]
