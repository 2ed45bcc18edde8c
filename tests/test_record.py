"""Tests of scripts/record.py, against plain loops over the environment."""

import importlib
import json
import math
import re
import sys
from collections import namedtuple
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from make_data import Toy, minari_dataset, rollout, run, toy_dataset

import cql

sys.path.append(str(Path(cql.__file__).parent / "scripts"))
import record

TOY = "make_data:CqlToy-v0"


def trained(data, directory, **flags):
    """Train two stacked runs, perturb their networks, and return the directory."""
    status, _, err = run(env=data, resume=directory, seed="[0,1]", **flags)
    assert status == 0, err
    payload = torch.load(directory / "checkpoint.pt", weights_only=True)
    generator = torch.Generator().manual_seed(1)
    for name, values in payload["agent"].items():
        if name.endswith(("weight", "bias")):
            values += 0.3 * torch.randn(values.shape, generator=generator)
    torch.save(payload, directory / "checkpoint.pt")
    return directory


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Two runs in CqlToy-v0 with other action bounds and dictionary observations."""
    root = tmp_path_factory.mktemp("toy")
    settings = {"low": [-2.0, 0.0], "high": [1.0, 4.0], "layout": "dict"}
    return trained(toy_dataset(root, env_kwargs=settings), root / "run")


@pytest.fixture(scope="module")
def cart_run(tmp_path_factory):
    """Two discrete runs in CartPole-v1, on data with reference returns."""
    root = tmp_path_factory.mktemp("cart")
    env = gym.make("CartPole-v1")
    references = {"ref_min_score": 20.0, "ref_max_score": 500.0}
    data = minari_dataset(root, "cart/pole-v0", rollout(env, 20), env=env, **references)
    return trained(data, root / "run", q_n_hidden_layers=2)


def recorded(out, *argv):
    """Record with the command line, and return the episodes and the task."""
    assert record.main([*map(str, argv), "--out", str(out)]) == 0
    return cql.read_episodes(str(out))


def plain_loop(env, act, steps, seed):
    """Play the episodes that record.py should record.

    Return for each its flattened observations, actions, rewards, and whether it
    terminated."""
    episodes = []
    while steps:
        start = cql.environment_seed([record.START, seed, len(episodes)])
        observation, _ = env.reset(seed=start)
        flat = [gym.spaces.flatten(env.observation_space, observation)]
        actions, rewards, done = [], [], False
        while steps and not done:
            actions.append(act(observation))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            flat.append(gym.spaces.flatten(env.observation_space, observation))
            rewards.append(reward)
            done = terminated or truncated
            steps -= 1
        episodes.append((np.array(flat), np.array(actions), np.array(rewards)))
        episodes[-1] += (bool(terminated),)
    return episodes


def check_equal(episodes, expected):
    assert len(episodes) == len(expected) > 2
    for episode, (observations, actions, rewards, terminated) in zip(episodes, expected):
        np.testing.assert_array_equal(episode.observations, observations)
        np.testing.assert_array_equal(episode.actions, actions.reshape(len(rewards), -1))
        np.testing.assert_array_equal(episode.rewards, rewards)
        assert not episode.terminations[:-1].any()
        assert bool(episode.terminations[-1]) == terminated
        assert episode.whole  # terminated or truncated, also the last one


def actions_of(episodes):
    """Return all observations with an action, and all actions."""
    observations = np.concatenate([each.observations[:-1] for each in episodes])
    return observations, np.concatenate([each.actions for each in episodes])


def test_a_policys_episodes(toy_run, tmp_path):
    """A policy acts in the environment of its data, with the recorded settings."""
    argv = [toy_run, "--run", 1, "--steps", 50, "--seed", 3]
    episodes, task = recorded(tmp_path / "toy-v0", *argv)
    policy = cql.load_policy(toy_run, run=1)
    env = gym.make("CqlToy-v0", **policy.task.env_kwargs)
    check_equal(episodes, plain_loop(env, policy, 50, seed=3))
    assert task.env_kwargs == policy.task.env_kwargs != {}
    assert (task.env_id, task.max_episode_steps) == ("CqlToy-v0", 20)
    assert task.action_high == [1.0, 4.0]
    other, _ = recorded(tmp_path / "other-v0", toy_run, "--steps", 50, "--seed", 3)
    assert (actions_of(other)[1][0] != actions_of(episodes)[1][0]).all()


def test_random_episodes(tmp_path, capsys):
    episodes, task = recorded(tmp_path / "r-v0", "random", "--env", TOY, "--steps", 45)
    env = gym.make("CqlToy-v0")
    env.action_space.seed(cql.seed_from([record.DRAW, 0]))
    check_equal(
        episodes, plain_loop(env, lambda _: env.action_space.sample(), 45, seed=0)
    )
    assert task.reference is None
    printed = capsys.readouterr().out
    flags = f"--config_path configs/fast.yaml --env {tmp_path}/r-v0 --eval_env {TOY}"
    assert f"train on it: python cql.py {flags}\n" in printed


def test_the_last_episode_is_truncated(tmp_path):
    out = tmp_path / "r-v0"
    recorded(out, "random", "--env", "make_data:CqlEndless-v0", "--steps", 7)
    (last,) = list(record.minari.dataset.minari_dataset.MinariDataset(out / "data"))[-1:]
    assert last.truncations[-1] != last.terminations[-1]
    assert not last.truncations[:-1].any()
    metadata = json.loads((out / "data" / "metadata.json").read_text())
    assert metadata["total_steps"] == 7
    # cql.py also gives a time limit to an environment without one.
    assert json.loads(metadata["env_spec"])["max_episode_steps"] == 1000


def test_seeds(toy_run, tmp_path):
    """The same command records the same numbers; another seed records other numbers."""

    def numbers(name, seed, *argv):
        argv = [toy_run, "--steps", 60, "--seed", seed, *argv]
        return np.concatenate(actions_of(recorded(tmp_path / name, *argv)[0]), axis=1)

    for i, flags in enumerate((["--noise", 0.3], ["--stochastic"])):
        first = numbers(f"{i}-v0", 0, *flags)
        np.testing.assert_array_equal(first, numbers(f"{i}-v1", 0, *flags))
        other = numbers(f"{i}-v2", 1, *flags)
        assert (first != other).any(axis=0).all()


def test_noise(toy_run, tmp_path):
    """Noise is in units of half the action range.

    Noisy actions stay within the bounds."""
    argv = [toy_run, "--steps", 1000, "--noise", 0.05]
    observations, actions = actions_of(recorded(tmp_path / "n-v0", *argv)[0])
    low, high = np.array([-2.0, 0.0]), np.array([1.0, 4.0])
    assert (actions >= low).all() and (actions <= high).all()
    without = cql.load_policy(toy_run)(observations)
    units = (actions - without) / ((high - low) / 2)
    inside = ((without > low + 0.5) & (without < high - 0.5)).all(axis=1)
    assert inside.sum() > 300
    assert units[inside].std(axis=0) == pytest.approx(0.05, rel=0.15)
    assert units[inside].mean(axis=0) == pytest.approx(0, abs=0.01)
    argv = [toy_run, "--steps", 200, "--noise", 5]
    _, actions = actions_of(recorded(tmp_path / "n-v1", *argv)[0])
    at_bounds = np.isin(actions, [low.tolist(), high.tolist()])
    assert 0.7 < at_bounds.mean() < 0.95 and (actions[~at_bounds] > -2).all()


def test_sampled_actions(toy_run, tmp_path):
    """Sampled actions are normally distributed around the policy's mean.

    Standardized by the policy's mean and standard deviation they have mean 0 and
    standard deviation 1."""
    argv = [toy_run, "--run", 1, "--steps", 500, "--stochastic"]
    observations, actions = actions_of(recorded(tmp_path / "s-v0", *argv)[0])
    agent = cql.load_policy(toy_run).agent
    x = torch.as_tensor(observations)[None].expand(2, -1, -1)
    weights = {name: value[1] for name, value in agent.weights["policy"].items()}
    with torch.no_grad():
        mean, log_std = cql.call(agent.policy, weights, agent.units.standardize(x[1]))
    units = agent.units.unit_actions(actions).clamp(-0.9999, 0.9999)
    normals = (units.atanh() - mean) / log_std.exp()
    normals = normals[(units.abs() < 0.999).all(-1)]
    assert len(normals) > 300
    torch.testing.assert_close(normals.mean(0), torch.zeros(2), atol=0.2, rtol=0)
    torch.testing.assert_close(normals.std(0), torch.ones(2), atol=0.2, rtol=0)


def test_discrete_actions(cart_run, tmp_path):
    """Noise is the probability of a uniform action.

    Half of the uniform actions equal the greedy one, because there are two."""
    policy = cql.load_policy(cart_run)
    for noise, share in ((0, 0), (0.4, 0.2), (1, 0.5)):
        argv = [cart_run, "--steps", 1000, "--noise", noise]
        episodes, task = recorded(tmp_path / f"{noise}-v0", *argv)
        assert task.discrete
        observations, actions = actions_of(episodes)
        other = actions[:, 0] != policy(observations)
        assert other.mean() == pytest.approx(share, abs=0.05)


def mean_return(env, act):
    """Return the mean return of 20 episodes with record.py's seeds."""
    returns = []
    for number in range(20):
        observation, _ = env.reset(
            seed=cql.environment_seed([record.MEASURE, 0, number])
        )
        returns.append(0.0)
        done = False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            returns[-1] += reward
            done = terminated or truncated
    return np.mean(returns)


def test_measured_references(tmp_path, capsys, monkeypatch):
    """Reference returns are measured with random actions and with the policy.

    The policy here does not move, which is better than random actions."""
    directory = trained(toy_dataset(tmp_path), tmp_path / "run")
    still = lambda self, x, normals=None: torch.zeros(*x.shape[:-1], 2)  # noqa: E731
    monkeypatch.setattr(cql.ContinuousCQL, "actions", still)
    argv = [directory, "--steps", 30, "--noise", 1]
    episodes, task = recorded(tmp_path / "m-v0", *argv)
    env = gym.make("CqlToy-v0")
    env.action_space.seed(cql.seed_from([record.MEASURE, 0]))
    low = mean_return(env, lambda _: env.action_space.sample())
    high = mean_return(env, lambda _: np.zeros(2, np.float32))
    assert task.reference == pytest.approx([low, high])
    printed = capsys.readouterr().out
    assert f"random actions return {low:.1f}, the policy without noise {high:.1f}" in (
        printed
    )
    # The printed mean excludes the last episode, which --steps truncates.
    returns = [each.rewards.sum() for each in list(episodes)[:-1]]
    score = cql.normalized_score(np.mean(returns), [low, high])
    assert len(episodes) > 1 and f"return {np.mean(returns):.1f} +- " in printed
    assert f", score {score:.1f}\n" in printed


def test_a_policy_no_better_than_random_measures_nothing(tmp_path, monkeypatch, capsys):
    directory = trained(toy_dataset(tmp_path), tmp_path / "run")
    away = lambda self, x, normals=None: torch.ones(*x.shape[:-1], 2)  # noqa: E731
    monkeypatch.setattr(cql.ContinuousCQL, "actions", away)
    _, task = recorded(tmp_path / "m-v0", directory, "--steps", 30)
    assert task.reference is None
    assert "not scored: the policy is no better than random: " in capsys.readouterr().out


def test_known_references(cart_run, tmp_path):
    """Reference returns come from --reference, the dataset, or D4RL, in this order.

    Those of the dataset count only in the same environment."""
    argv = [cart_run, "--steps", 50]
    assert recorded(tmp_path / "a-v0", *argv)[1].reference == [20, 500]
    _, task = recorded(tmp_path / "b-v0", *argv, "--reference", -1, 2.5)
    assert task.reference == [-1, 2.5]
    argv = ["random", "--env", "Hopper-v5", "--steps", 5]
    d4rl = list(cql.REFERENCE_RETURNS["Hopper-"])
    assert recorded(tmp_path / "c-v0", *argv)[1].reference == d4rl


def test_another_environments_references_do_not_count(cart_run, tmp_path):
    _, task = recorded(
        tmp_path / "c-v0", cart_run, "--steps", 50, "--env", "CartPole-v0"
    )
    assert task.env_id == "CartPole-v0" and task.reference != [20, 500]
    assert task.max_episode_steps == 200


def test_cql_trains_on_it(toy_run, tmp_path):
    out = tmp_path / "below" / "toy-v0"
    recorded(out, toy_run, "--steps", 100, "--noise", 0.3, "--reference", 0, 10)
    status, printed, err = run(env=out, resume=tmp_path / "run")
    assert status == 0, err
    assert "100 transitions" in printed and "evaluation: CqlToy-v0 with" in printed
    assert "scored by the dataset's reference returns" in printed


def test_minari_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    recorded(tmp_path / "toy-v0", "random", "--env", TOY, "--steps", 45)
    dataset = record.minari.load_dataset("toy-v0")
    assert dataset.total_steps == 45 and dataset.env_spec.id == "CqlToy-v0"
    assert dataset.recover_environment().observation_space.shape == (3,)
    assert list(record.minari.list_local_datasets()) == ["toy-v0"]


def test_overwriting(tmp_path, capsys):
    out = tmp_path / "toy-v0"
    argv = ["random", "--env", TOY, "--steps", "10", "--out", str(out)]
    assert record.main(argv) == 0
    before = (out / "data" / "main_data.hdf5").read_bytes()
    assert record.main([*argv, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    hint = "choose another directory or pass --overwrite"
    assert error == f"record.py: error: --out {out}: already exists; {hint}\n"
    assert (out / "data" / "main_data.hdf5").read_bytes() == before
    assert record.main([*argv, "--seed", "1", "--overwrite"]) == 0
    assert (out / "data" / "main_data.hdf5").read_bytes() != before
    assert len(cql.read_episodes(str(out))[0]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["toy-v0"]


@pytest.mark.parametrize("kind", [OSError, RuntimeError, ValueError])  # from h5py
def test_nothing_is_half_written(kind, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise kind("No space left on device")

    out = tmp_path / "toy-v0"
    argv = ["random", "--env", TOY, "--steps", "10", "--out", str(out), "--overwrite"]
    assert record.main(argv) == 0
    before = (out / "data" / "main_data.hdf5").read_bytes()
    storage = type(record.MinariStorage.read(out / "data"))
    monkeypatch.setattr(storage, "update_episodes", full)
    assert record.main([*argv, "--seed", "1"]) == 1
    error = capsys.readouterr().err
    assert error == f"record.py: failed: cannot write {out}: No space left on device\n"
    assert (out / "data" / "main_data.hdf5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["toy-v0"]


def test_a_disk_without_room(tmp_path, capsys, monkeypatch):
    """A full disk is detected before anything is written.

    One episode of ten steps needs a little more than 20 kB."""
    usage = namedtuple("Usage", "free")(20_000)
    monkeypatch.setattr(record.shutil, "disk_usage", lambda _: usage)
    out = tmp_path / "toy-v0"
    argv = ["random", "--env", TOY, "--steps", "10", "--out", str(out)]
    assert record.main(argv) == 1
    error = capsys.readouterr().err
    sizes = "0.02 MB free, up to 0.02 MB needed; free some disk space"
    assert error == f"record.py: failed: cannot write {out}: {tmp_path}: {sizes}\n"
    assert list(tmp_path.iterdir()) == []
    usage = namedtuple("Usage", "free")(30_000)
    assert record.main(argv) == 0


@pytest.mark.parametrize("name", ["record", "plot", "watch", "export_onnx"])
def test_help_fits_a_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main(["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"    python scripts/{name}.py ") for line in lines)


class Reusing(Toy):
    """Toy environment that returns the same array at every step."""

    array = np.zeros(3, np.float32)

    def _observation(self, reward):
        self.array[:] = super()._observation(reward)
        return self.array


def test_observations_are_copied():
    action = np.array([0.2, 0.2])
    episode = record.play_episode(Reusing(), lambda _: action, seed=0, max_steps=3)
    last_rewards = episode.observations[:, 2]
    assert last_rewards == pytest.approx([0, *episode.rewards])
    assert len(set(last_rewards)) == 4


class Faulty(Toy):
    """Toy environment with other rewards, or that fails at a step or reset."""

    failing_reset = math.inf
    failing_step = math.inf
    reward = None
    resets = 0
    steps = 0

    def __init__(self, table=None, **settings):
        super().__init__(**settings)

    def reset(self, seed=None, options=None):
        np.random.seed(seed)  # fails for a seed that has more than 32 bits
        self.resets += 1
        if self.resets == self.failing_reset:
            raise ValueError("no\nsignal")
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.steps == self.failing_step:
            raise RuntimeError("arm jammed")
        observation, reward, *rest = super().step(action)
        if self.reward is not None:
            reward = self.reward
        return observation, reward, *rest


def make_faulty(**settings):
    return Faulty(**settings)


class Outer:
    class Inner(Faulty):
        pass


@pytest.fixture
def register(monkeypatch):
    """Register Faulty as CqlFaulty-v0 until the end of the test."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))

    def function(entry_point=Faulty, **settings):
        gym.register(
            "CqlFaulty-v0", entry_point=entry_point, max_episode_steps=20, **settings
        )

    return function


FAULTY = ["random", "--env", "CqlFaulty-v0", "--steps", "50"]


@pytest.mark.parametrize("creator", [Faulty, make_faulty])
def test_classes_and_functions_are_recorded_by_name(creator, register, tmp_path):
    """The dataset is equal to one of an environment that is registered by text."""
    register(creator)
    episodes, task = recorded(tmp_path / "class-v0", *FAULTY)
    metadata = json.loads((tmp_path / "class-v0/data/metadata.json").read_text())
    spec = json.loads(metadata["env_spec"])
    assert spec["entry_point"] == f"{__name__}:{creator.__name__}"
    assert task.env_id == "CqlFaulty-v0" and task.max_episode_steps == 20
    dataset = record.minari.dataset.minari_dataset.MinariDataset(
        tmp_path / "class-v0" / "data"
    )
    assert isinstance(dataset.recover_environment().unwrapped, Faulty)
    plain, _ = recorded(tmp_path / "text-v0", "random", "--env", TOY, "--steps", "50")
    for one, other in zip(episodes, plain):
        np.testing.assert_array_equal(one.observations, other.observations)


ARRAY = np.zeros(2, np.float32)
RESCALE = {"min_action": ARRAY - 1, "max_action": ARRAY + 1}
WRAPPER = gym.envs.registration.WrapperSpec(
    "RescaleAction", "gymnasium.wrappers:RescaleAction", RESCALE
)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"entry_point": lambda **_: Faulty()}, "entry_point <function <lambda> at"),
        ({"entry_point": Outer.Inner}, "entry_point <class '.*Inner'> cannot be"),
        ({"kwargs": {"table": ARRAY}}, "not JSON .*ndarray is not JSON"),
        ({"kwargs": {"table": max}}, "not JSON .*builtin_function"),
        ({"additional_wrappers": (WRAPPER,)}, "not JSON .*ndarray is not JSON"),
    ],
)
def test_environments_that_cannot_be_recorded(
    settings, words, register, tmp_path, capsys, monkeypatch
):
    """They are refused in one line, before the first reset."""
    register(**settings)
    monkeypatch.setattr(Faulty, "failing_reset", 1)
    assert record.main([*FAULTY, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"record.py: error: CqlFaulty-v0: .*{words}.*\n", error), error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reward", [[2.0], np.array([[2.0]]), np.float32(2), 2])
def test_a_reward_is_one_number(reward, register, tmp_path, monkeypatch):
    register()
    monkeypatch.setattr(Faulty, "reward", reward)
    episodes, _ = recorded(tmp_path / "x-v0", *FAULTY)
    assert all((each.rewards == 2).all() for each in episodes)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"reward": [1.0, 2.0]}, r"reward of shape \(2,\)"),
        ({"failing_reset": 1}, "no signal"),
        ({"failing_step": 1}, "arm jammed"),
        (
            {"failing_step": 40},
            r"CqlFaulty-v0 failed in episode \d+; nothing is written",
        ),
    ],
)
def test_an_environment_that_fails(
    values, words, register, tmp_path, capsys, monkeypatch
):
    """It gives one line. An environment that always fails is not recorded in."""
    register()
    for name, value in values.items():
        monkeypatch.setattr(Faulty, name, value)
    status = record.main([*FAULTY, "--out", str(tmp_path / "x")])
    printed, error = capsys.readouterr()
    late = values.get("failing_step") == 40
    assert status in ([1] if late else [1, 2])
    assert ("recording in" in printed) == late
    (line,) = [each for each in error.splitlines() if "record.py" in each]
    assert re.fullmatch(f"record.py: (error|failed): .*{words}.*", line), line
    assert "--env none" not in line and "--eval_env" not in line
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_an_environment_that_fails_while_returns_are_measured(
    toy_run, register, tmp_path, capsys, monkeypatch
):
    """Nothing has been recorded yet, so no steps are lost."""
    register(kwargs={"low": [-2.0, 0.0], "high": [1.0, 4.0], "layout": "dict"})
    monkeypatch.setattr(Faulty, "failing_step", 10)
    argv = [str(toy_run), "--env", "CqlFaulty-v0", "--out", str(tmp_path / "x")]
    assert record.main(argv) == 1
    printed, error = capsys.readouterr()
    assert "recording in" not in printed
    where = "CqlFaulty-v0 failed while reference returns were measured"
    hint = "pass --reference LOW HIGH instead"
    assert error == f"record.py: failed: {where}; {hint}: arm jammed\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a directory that holds a file and a directory that is no dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    return tmp_path


def test_invalid_input_gives_one_line(toy_run, cart_run, here, capsys):
    toy = ["random", "--env", TOY, "--out", "x"]
    policy = [str(toy_run), "--out", "x"]
    cases = {
        "checkpoint none: cannot be read": ["none", "--out", "x"],
        "holds runs 0 to 1, no 2": [*policy, "--run", "2"],
        "random: records no environment; pass --env": ["random", "--out", "x"],
        "--env No-v0: cannot be made": ["random", "--env", "No-v0", "--out", "x"],
        "--env CartPole-v1: .* do not match the policy's 3 and": (
            [*policy, "--env", "CartPole-v1"]
        ),
        "--steps 0: must be at least 1": [*toy, "--steps", "0"],
        "--seed -1: must be at least 0": [*toy, "--seed", "-1"],
        "--noise -0.1: must be finite": [*policy, "--noise", "-0.1"],
        "--noise nan: must be finite": [*policy, "--noise", "nan"],
        "--noise 1.5: a probability for discrete actions": (
            [str(cart_run), "--out", "x", "--noise", "1.5"]
        ),
        "--stochastic: a discrete policy is always greedy": (
            [str(cart_run), "--out", "x", "--stochastic"]
        ),
        "random: --noise and --stochastic need": [*toy, "--noise", "1"],
        "--reference 2 1: LOW and HIGH must be finite": [*toy, "--reference", "2", "1"],
        "invalid int value: 'many'": [*toy, "--steps", "many"],
        "--out full: exists but is not a dataset": (
            ["random", "--env", TOY, "--out", "full", "--overwrite"]
        ),
        "--out file/x: cannot be written": [*toy[:-1], "file/x"],
        "--out /proc/x: cannot be written": [*toy[:-1], "/proc/x"],
        "--out /proc/x/y: cannot be written": [*toy[:-1], "/proc/x/y"],
        "--out file: exists but is not a dataset": [*toy[:-1], "file", "--overwrite"],
        "File name too long": [*toy[:-1], "中" * 90],
        "holds runs 0 to 1, no -1": [*policy, "--run", "-1"],
        "checkpoint full/checkpoint.pt: cannot be read": ["full", "--out", "x"],
        "required: --out": ["random"],
    }
    before = sorted(here.rglob("*"))
    for words, argv in cases.items():
        assert record.main(argv) == 2, words
        error = capsys.readouterr().err
        assert re.fullmatch(f"record.py: error: .*{words}.*\n", error), error
    assert sorted(here.rglob("*")) == before
