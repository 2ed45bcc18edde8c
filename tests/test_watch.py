"""scripts/watch.py, in an environment whose pictures say where the point is."""

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


class Pictured(Toy):
    """Twice as wide as high; its brightness is the number of steps, tenfold."""

    metadata = {"render_modes": ["rgb_array"]}

    def reset(self, seed=None, options=None):
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        return super().step(0 * action)  # stands still, so for 20 steps

    def render(self):
        return np.full((100, 200, 3), 10 * self.steps, np.uint8)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A run's, in the environment with pictures."""
    if "CqlPictured-v0" not in gym.registry:
        gym.register("CqlPictured-v0", entry_point=Pictured, max_episode_steps=20)
    flags = {"env": toy_dataset(tmp_path), "eval_env": "CqlPictured-v0"}
    status, _, err = run(**flags, resume=tmp_path / "run")
    assert status == 0, err
    return str(tmp_path / "run")


def test_a_film(directory, tmp_path, capsys):
    out = tmp_path / "a.gif"
    argv = [directory, directory, "--out", str(out), "--frames", "6", "--every", "5"]
    assert watch.main(argv) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    film = Image.open(out)
    assert film.size == (800, 200)
    # Another episode begins after 20 steps; equal pictures in a row would be one frame.
    brightness = []
    for frame in range(film.n_frames):
        film.seek(frame)
        brightness.append(film.convert("RGB").getpixel((300, 150))[0])
    assert brightness == [0, 50, 100, 150, 0, 50]


def test_bad_input_is_one_line(directory, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "a.gif")
    cases = {
        "checkpoint none: cannot be read": ["none", "--out", out],
        "holds runs 0 to 0, no 1": [directory, "--run", "1", "--out", out],
        "--frames: must be at least 1": [directory, "--frames", "0", "--out", out],
        "--every: must be at least 1": [directory, "--every", "0", "--out", out],
        "--out .*a.xyz: unknown file": [directory, "--out", str(tmp_path / "a.xyz")],
        "required: DIR": [],
        "invalid int value": [directory, "--seed", "x"],
    }
    for words, argv in cases.items():
        assert watch.main(argv) == 2, words
        error = capsys.readouterr().err
        assert re.fullmatch(f"watch.py: error: .*{words}.*\n", error), error
    monkeypatch.setattr(Pictured, "render", lambda self: 1 / 0)
    assert watch.main([directory, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.endswith("(MuJoCo: set MUJOCO_GL=egl): division by zero\n")
    assert not list(tmp_path.glob("a.*"))
