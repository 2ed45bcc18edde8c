"""Tests of scripts/watch.py, in an environment whose frames encode the step."""

import re
import sys
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import pytest
from make_data import Toy, run, toy_dataset
from PIL import Image

import cql

sys.path.append(str(Path(cql.__file__).parent / "scripts"))
import watch


class Rendered(Toy):
    """Toy environment with frames of 200 x 100 pixels of brightness 10 x step."""

    metadata = {"render_modes": ["rgb_array"]}
    seeds = []

    def reset(self, seed=None, options=None):
        np.random.seed(seed)  # fails for a seed that has more than 32 bits
        self.seeds.append(seed)
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        # Without movement the episode reaches its limit of 20 steps.
        return super().step(0 * action)

    def render(self):
        return np.full((100, 200, 3), 10 * self.steps, np.uint8)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Train a run that is evaluated in Rendered, and return its directory."""
    if "CqlRendered-v0" not in gym.registry:
        gym.register("CqlRendered-v0", entry_point=Rendered, max_episode_steps=20)
    flags = {"env": toy_dataset(tmp_path), "eval_env": "CqlRendered-v0"}
    status, _, err = run(**flags, resume=tmp_path / "run")
    assert status == 0, err
    return str(tmp_path / "run")


def test_frames_of_two_runs(directory, tmp_path, capsys):
    out = tmp_path / "a.gif"
    argv = [directory, directory, "--out", str(out), "--frames", "6", "--every", "5"]
    assert watch.main(argv) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    gif = Image.open(out)
    assert gif.size == (800, 200)
    # A new episode starts after 20 steps. The GIF would merge equal consecutive frames.
    brightness = []
    for frame in range(gif.n_frames):
        gif.seek(frame)
        brightness.append(gif.convert("RGB").getpixel((300, 150))[0])
    assert brightness == [0, 50, 100, 150, 0, 50]


def test_invalid_input_gives_one_line(directory, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "a.gif")
    cases = {
        "checkpoint none: cannot be read": ["none", "--out", out],
        "holds runs 0 to 0, no 1": [directory, "--run", "1", "--out", out],
        "--frames 0: must be at least 1": [directory, "--frames", "0", "--out", out],
        "--every 0: must be at least 1": [directory, "--every", "0", "--out", out],
        "--seed -1: must be at least 0": [directory, "--seed", "-1", "--out", out],
        "holds runs 0 to 0, no -1": [directory, "--run", "-1", "--out", out],
        "--out .*a.xyz: not a file name that ends in .gif": (
            [directory, "--out", str(tmp_path / "a.xyz")]
        ),
        "--out .*run: not a file name that ends in": [directory, "--out", directory],
        "--out none/a.gif: no such directory": [directory, "--out", "none/a.gif"],
        "--out .*config.yaml/a.gif: no such directory": (
            [directory, "--out", f"{directory}/config.yaml/a.gif"]
        ),
        "File name too long": [directory, "--out", "中" * 90 + ".gif"],
        "required: DIR": [],
        "invalid int value": [directory, "--seed", "x"],
    }
    for words, argv in cases.items():
        assert watch.main(argv) == 2, words
        error = capsys.readouterr().err
        assert re.fullmatch(f"watch.py: error: .*{words}.*\n", error), error
    assert not list(tmp_path.glob("a.*"))


def test_seeds_of_environments_have_31_bits(directory, tmp_path):
    argv = [directory, "--out", str(tmp_path / "a.gif"), "--frames", "6", "--every", "5"]
    Rendered.seeds.clear()
    assert watch.main([*argv, "--seed", str(2**31 - 1)]) == 0
    assert watch.main([*argv, "--seed", str(2**40 + 3)]) == 0
    assert Rendered.seeds == [2**31 - 1, 0, 3, 4]


def failed(capsys, directory, out, status):
    """Return the line that watch.py prints when it fails with this status."""
    assert watch.main([directory, "--out", str(out), "--frames", "8"]) == status
    error = capsys.readouterr().err
    assert error.startswith("watch.py: ") and error.count("\n") == 1
    assert not Path(out).exists()
    return error


def test_an_environment_that_cannot_be_rendered(
    directory, tmp_path, capsys, monkeypatch
):
    """MUJOCO_GL is named only if MuJoCo renders the environment."""
    out = tmp_path / "a.gif"
    monkeypatch.setattr(Rendered, "render", lambda self: 1 / 0)
    error = failed(capsys, directory, out, 2)
    assert error.endswith("the environment cannot be rendered: division by zero\n")
    monkeypatch.setattr(Rendered, "__module__", "gymnasium_robotics.envs.kitchen")
    error = failed(capsys, directory, out, 2)
    assert error.endswith("(set MUJOCO_GL=egl or MUJOCO_GL=osmesa): division by zero\n")
    monkeypatch.undo()
    monkeypatch.setattr(Rendered, "render", lambda self: None)
    error = failed(capsys, directory, out, 2)
    assert error.endswith("render() returned None; expected an array\n")


@pytest.mark.parametrize("name", ["Hopper-v5", "PointMaze_UMaze-v3"])
def test_environments_that_mujoco_renders(name):
    gym.register_envs(gymnasium_robotics)
    assert watch.uses_mujoco(gym.make(name))
    assert not watch.uses_mujoco(gym.make("CartPole-v1"))


def test_an_environment_or_a_disk_that_fails(directory, tmp_path, capsys, monkeypatch):
    error = failed(capsys, directory, "/proc/a.gif", 1)
    assert error.startswith("watch.py: failed: cannot write /proc/a.gif: ")
    out = tmp_path / "a.gif"
    step = Rendered.step

    def jam(self, action):
        if self.steps == 3:
            raise RuntimeError("arm jammed")
        return step(self, action)

    monkeypatch.setattr(Rendered, "step", jam)
    error = failed(capsys, directory, out, 1)
    assert (
        error == f"watch.py: failed: {directory}: the environment failed: arm jammed\n"
    )
