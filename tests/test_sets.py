"""Tests of benchmarks/sets.py, with random policies in the public files' formats."""

import io
import json
import sys
import zipfile
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

import cql

sys.path.append(str(Path(cql.__file__).parent / "benchmarks"))
import sets

OBSERVATIONS, ACTIONS = 11, 3  # of Hopper
SPACE = gym.spaces.Box(np.float32([-1, -2, 0]), np.float32([1, 2, 3]))
BOX = gym.spaces.Box(-1, 1, (3,))
NAMES = {
    "hopper-medium": "sac-hopper-medium-v0",
    "hopper-replay": "trpo-hopper-replay-v0",
    "hopper-medium-expert": "sac-trpo-hopper-medium-expert-v0",
}


def write_trpo(path, iterations):
    """Write snapshots of random policies with two hidden layers of 8 units."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for iteration in iterations:
            group = file.create_group(f"snapshots/iter{iteration:07d}/GaussianPolicy")
            sizes = {
                "hidden/FeedforwardNet/layer_0": (OBSERVATIONS, 8),
                "hidden/FeedforwardNet/layer_2": (8, 8),
                "out": (8, ACTIONS),
            }
            for name, size in sizes.items():
                group[f"{name}/AffineLayer/W"] = rng.standard_normal(size)
                group[f"{name}/AffineLayer/b"] = rng.standard_normal((1, size[1]))
            mean = rng.standard_normal((1, OBSERVATIONS))
            group["obsnorm/Standardizer/mean_1_D"] = mean
            variance = rng.uniform(0.1, 2, (1, OBSERVATIONS))
            group["obsnorm/Standardizer/meansq_1_D"] = mean**2 + variance
            group["logstdevs_1_Da"] = rng.uniform(-2, -1, (1, ACTIONS))


class Actor(torch.nn.Module):
    """The actor of Stable-Baselines3's SAC, with two hidden layers of 8 units."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        relu = torch.nn.ReLU()
        layers = [linear(OBSERVATIONS, 8), relu, linear(8, 8), relu]
        self.latent_pi = torch.nn.Sequential(*layers)
        self.mu = linear(8, ACTIONS)
        self.log_std = linear(8, ACTIONS)

    def forward(self, observation, noise):
        features = self.latent_pi(observation)
        std = self.log_std(features).clamp(-20, 2).exp()
        return torch.tanh(self.mu(features) + std * noise)


def write_sac(path):
    """Write a random policy and return its actor. A pickle lies beside its weights."""
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    actor = Actor()
    with torch.no_grad():
        actor.log_std.bias.add_(torch.tensor([-50.0, 0.0, 50.0]))  # both clamps
    policy = torch.nn.ModuleDict({"actor": actor, "critic": torch.nn.Linear(1, 1)})
    content = io.BytesIO()
    torch.save(policy.state_dict(), content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("policy.pth", content.getvalue())
        archive.writestr("pytorch_variables.pth", b"not read")
    return actor


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The directory of both repositories, with the policies of Hopper."""
    root = tmp_path_factory.mktemp("policies")
    write_trpo(root / sets.policy_path("hopper", 0), [0, 20, 40, 500])
    write_sac(root / sets.policy_path("hopper", "sac"))
    return root


def record(root, out, *argv):
    """Record the sets of Hopper with 300 steps each and return their arrays."""
    argv = ["--policies", root, "--out", out, "--steps", 300, "--only", *NAMES, *argv]
    assert sets.main([*map(str, argv)]) == 0
    arrays = {}
    for name in NAMES.values():
        episodes, _ = cql.read_episodes(str(out / name))
        arrays[name] = list(episodes)
    return arrays


def content(episodes):
    """Return the bytes of the episodes' arrays."""
    fields = ("observations", "actions", "rewards", "terminations")
    return [getattr(e, field).tobytes() for e in episodes for field in fields]


def refused(capsys, *argv):
    """Return the one line that invalid input gets."""
    assert sets.main([*map(str, argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sets.py: error: ") and error.count("\n") == 1, error
    return error


def test_trpo_policy_equals_a_loop(root):
    path = root / sets.policy_path("hopper", 40)
    sample = sets.read_trpo(path, 40, SPACE)
    rng = np.random.default_rng(1)
    n_clipped = 0
    with h5py.File(path) as file:
        group = file["snapshots/iter0000040/GaussianPolicy"]
        mean = group["obsnorm/Standardizer/mean_1_D"][0]
        square = group["obsnorm/Standardizer/meansq_1_D"][0]
        for _ in range(20):
            observation = rng.standard_normal(OBSERVATIONS)
            noise = rng.standard_normal(ACTIONS)
            units = []
            for i, value in enumerate(observation):
                std = (square[i] - mean[i] ** 2) ** 0.5 + 1e-6
                units.append((value - mean[i]) / std)
            for layer in ("layer_0", "layer_2"):
                part = group[f"hidden/FeedforwardNet/{layer}/AffineLayer"]
                weight, bias = part["W"][()], part["b"][0]
                units = [
                    np.tanh(sum(u * w for u, w in zip(units, weight[:, j])) + bias[j])
                    for j in range(8)
                ]
            part = group["out/AffineLayer"]
            action = sample(observation, noise)
            for j in range(ACTIONS):
                value = (
                    sum(u * w for u, w in zip(units, part["W"][:, j])) + part["b"][0, j]
                )
                value += np.exp(group["logstdevs_1_Da"][0, j]) * noise[j]
                expected = min(max(value, SPACE.low[j]), SPACE.high[j])
                n_clipped += value != expected
                assert action[j] == pytest.approx(expected, rel=1e-9)
    assert 0 < n_clipped < 60


def test_sac_policy_equals_torch(tmp_path):
    actor = write_sac(tmp_path / "sac" / "policy.zip")
    sample = sets.read_sac(tmp_path / "sac" / "policy.zip", SPACE)
    rng = np.random.default_rng(1)
    for _ in range(20):
        observation = rng.standard_normal(OBSERVATIONS)
        noise = rng.standard_normal(ACTIONS)
        with torch.no_grad():
            inputs = torch.tensor(observation, dtype=torch.float32)
            unit = actor(inputs, torch.tensor(noise))
        expected = SPACE.low + (unit.numpy() + 1) / 2 * (SPACE.high - SPACE.low)
        assert np.allclose(sample(observation, noise), expected, atol=1e-5)


def test_sets_are_datasets_of_cql(root, tmp_path, capsys):
    table = tmp_path / "table.csv"
    arrays = record(root, tmp_path / "sets", "--table", table)
    printed = capsys.readouterr().out
    rows = table.read_text().splitlines()
    assert rows[0] == ",".join(sets.COLUMNS) and len(rows) == 4
    for row, name in zip(rows[1:], NAMES.values()):
        episodes, task = cql.read_episodes(str(tmp_path / "sets" / name))
        assert task.env_id == "Hopper-v5"
        assert task.reference == [-20.272305, 3234.3]
        assert sum(episodes.lengths) == 300
        assert all(episode.actions.dtype == np.float32 for episode in episodes)
        cells = row.split(",")
        assert cells[0] == name and f"| {name} | Hopper-v5 |" in printed
        file = tmp_path / "sets" / name / "data" / "metadata.json"
        metadata = json.loads(file.read_text())
        assert "MIT license" in metadata["description"]
        assert metadata["total_steps"] == 300
    # The shares of the replay set and the halves of medium-expert begin new episodes.
    for name, ends in {
        "hopper-replay": (60, 240),
        "hopper-medium-expert": (150,),
    }.items():
        lengths = [len(episode.rewards) for episode in arrays[NAMES[name]]]
        assert set(ends) <= set(np.cumsum(lengths))


def test_recorded_steps_equal_a_plain_loop(root, tmp_path):
    episodes = record(root, tmp_path / "sets")["sac-hopper-medium-v0"]
    sample = sets.read_sac(root / sets.policy_path("hopper", "sac"), BOX)
    rng = np.random.default_rng(cql.seed_from([sets.ACTIONS, 0, 0, 0]))
    env = gym.make("Hopper-v5")
    seed = cql.seed_from([sets.EPISODES, 0, 0, 0])
    for number, episode in enumerate(episodes):
        start = cql.environment_seed([sets.record.START, seed, number])
        observation, _ = env.reset(seed=start)
        for t, action in enumerate(episode.actions):
            assert np.array_equal(observation, episode.observations[t])
            expected = sample(observation, rng.standard_normal(3)).astype(np.float32)
            assert np.array_equal(action, expected)
            observation, reward, terminated, _, _ = env.step(action)
            assert reward == episode.rewards[t]
            assert terminated == episode.terminations[t]
        assert np.array_equal(observation, episode.observations[-1])


def test_the_seed_determines_every_byte(root, tmp_path):
    first = record(root, tmp_path / "first")
    again = record(root, tmp_path / "again")
    other = record(root, tmp_path / "other", "--seed", 1)
    for name in NAMES.values():
        assert content(first[name]) == content(again[name])
        assert content(first[name]) != content(other[name])


def test_a_set_alone_is_the_same(root, tmp_path):
    first = record(root, tmp_path / "first")
    argv = ["--policies", root, "--out", tmp_path / "alone", "--steps", 300]
    assert sets.main([*map(str, argv), "--only", "hopper-replay"]) == 0
    path = tmp_path / "alone" / NAMES["hopper-replay"]
    assert [path] == list(path.parent.iterdir())
    assert content(first[path.name]) == content(cql.read_episodes(str(path))[0])


def test_shares_sum_to_the_steps():
    for name, shares in sets.SETS.items():
        for steps in (100, 997, 100_000):
            parts = sets.split(steps, list(shares.values()))
            assert sum(parts) == steps and min(parts) > 0, name
    assert sets.split(100_000, [1, 3, 1]) == [20_000, 60_000, 20_000]


def test_summary_leaves_out_incomplete_episodes():
    def episode(rewards, terminated):
        last = np.arange(len(rewards)) == len(rewards) - 1
        return sets.record.EpisodeBuffer(
            observations=np.zeros((len(rewards) + 1, 1)),
            actions=np.zeros((len(rewards), 1)),
            rewards=np.array(rewards, float),
            terminations=last & terminated,
            truncations=last & (not terminated),
        )

    played = [episode([1, 1], True), episode([2] * 4, False), episode([9], False)]
    row = sets.summarize(played, 4, [0.0, 10.0])
    expected = {"steps": 7, "episodes": 3, "return_mean": 5, "return_std": 3}
    assert row == {**expected, "score": 50, "terminated": 0.5}


def test_missing_files_get_one_line(root, tmp_path, capsys):
    out = ["--out", tmp_path / "sets"]
    error = refused(capsys, "--policies", tmp_path, *out, "--only", "hopper-medium")
    assert "rl-trained-agents/sac/Hopper-v3_1/Hopper-v3.zip: does not exist" in error
    assert "git clone --depth 1 https://github.com/DLR-RM/rl-trained-agents " in error
    error = refused(capsys, "--policies", root, *out)  # only Hopper's files exist
    assert "log_HalfCheetah-v1_2.h5: does not exist" in error
    assert "git clone --depth 1 https://github.com/openai/imitation " in error
    assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("policy", ["sac", 20])
def test_invalid_files_get_one_line(tmp_path, capsys, policy):
    path = tmp_path / sets.policy_path("hopper", policy)
    path.parent.mkdir(parents=True)
    name = "hopper-medium" if policy == "sac" else "hopper-replay"
    argv = ["--policies", tmp_path, "--out", tmp_path / "sets", "--only", name]
    path.write_bytes(b"not a policy")
    assert f"{path}: is not the file of https" in refused(capsys, *argv)
    path.unlink()
    path.parent.rmdir()
    if policy != "sac":  # snapshots 0 and 40 are missing
        write_trpo(path, [20])
        assert f"{path}: is not the file of https" in refused(capsys, *argv)


def test_options_are_checked(root, tmp_path, capsys):
    argv = ["--policies", root, "--out", tmp_path / "sets", "--only", "hopper-medium"]
    assert "--steps 99: expected at least 100" in refused(capsys, *argv, "--steps", 99)
    assert "--seed -1: expected" in refused(capsys, *argv, "--seed", -1)
    assert sets.main([*map(str, argv), "--steps", "100"]) == 0
    capsys.readouterr()
    assert "pass --overwrite" in refused(capsys, *argv, "--steps", 100)
    assert sets.main([*map(str, argv), "--steps", "120", "--overwrite"]) == 0
    path = tmp_path / "sets" / "sac-hopper-medium-v0"
    assert sum(cql.read_episodes(str(path))[0].lengths) == 120
