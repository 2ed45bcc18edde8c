"""Tests of scripts/watch.py, in an environment whose frames encode the step."""

import re
import sys
from pathlib import Path

import gymnasium as gym
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

    def reset(self, seed=None, options=None):
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
        "--out .*a.xyz: unknown file": [directory, "--out", str(tmp_path / "a.xyz")],
        "required: DIR": [],
        "invalid int value": [directory, "--seed", "x"],
    }
    for words, argv in cases.items():
        assert watch.main(argv) == 2, words
        error = capsys.readouterr().err
        assert re.fullmatch(f"watch.py: error: .*{words}.*\n", error), error
    monkeypatch.setattr(Rendered, "render", lambda self: 1 / 0)
    assert watch.main([directory, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.endswith("(MuJoCo: set MUJOCO_GL=egl): division by zero\n")
    assert not list(tmp_path.glob("a.*"))
