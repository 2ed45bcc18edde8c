"""scripts/export_onnx.py: the exported policy beside load_policy."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_data import minari_dataset, random_episodes, rollout, run, toy_dataset

import cql

onnxruntime = pytest.importorskip("onnxruntime", reason="an optional extra")
pytest.importorskip("onnxscript", reason="an optional extra")
sys.path.append(str(Path(cql.__file__).parent / "scripts"))
import export_onnx  # noqa: E402


def box_data(root):
    return toy_dataset(root, env_kwargs={"low": [-2.0, 0.0], "high": [1.0, 4.0]})


def discrete_data(root):
    env = gym.make("CartPole-v1")
    return minari_dataset(root, "cart/pole-v0", rollout(env, 20), env=env)


def integer_data(root):
    """Without an environment; actions are matrices of the integers 0 to 3."""
    space, rng = gym.spaces.Box(0, 3, (2, 2), np.int32), np.random.default_rng(0)
    episodes = random_episodes([20, 20])
    for each in episodes:
        each["actions"] = rng.integers(0, 4, (20, 2, 2), dtype=np.int32)
    return minari_dataset(root, "box/of-integers-v0", episodes, action_space=space)


def trained(data, directory):
    """A run directory of two stacked runs, whose networks are then made to differ."""
    status, _, err = run(env=data, resume=directory, seed="[0,1]", q_n_hidden_layers=2)
    assert status == 0, err
    payload = torch.load(directory / "checkpoint.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, values in payload["agent"].items():
        if name.endswith(("weight", "bias")):
            values += 0.3 * torch.randn(values.shape, generator=generator)
    torch.save(payload, directory / "checkpoint.pt")
    return directory


def observations(policy):
    dim = policy.task.observation_dim
    return 3 * np.random.default_rng(0).normal(size=(40, dim)).astype(np.float32)


def both(directory, path):
    """Actions of run 1 for random observations, by load_policy and by its export."""
    assert export_onnx.main([str(directory), str(path), "--run", "1"]) == 0
    policy = cql.load_policy(directory, run=1)
    x = observations(policy)
    session = onnxruntime.InferenceSession(str(path))
    for n in (1, 7, 40):
        (actions,) = session.run(["action"], {"observation": x[:n]})
        expected = policy(x[:n])
        assert actions.dtype == expected.dtype and actions.shape == expected.shape
        np.testing.assert_allclose(actions, expected, atol=1e-4)
    other = cql.load_policy(directory, run=0)(x)
    assert (other != expected).any()  # the runs' policies can be told apart
    return actions


@pytest.mark.parametrize("data", [box_data, discrete_data, integer_data])
def test_an_exported_policy_acts_alike(data, tmp_path, capsys):
    directory = trained(data(tmp_path), tmp_path / "run")
    actions = both(directory, tmp_path / "policy.onnx")
    assert len(np.unique(actions)) > 1
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'policy.onnx'}\n")


def test_a_run_s_best_policies_are_exported(tmp_path):
    directory = trained(box_data(tmp_path), tmp_path / "run")
    both(directory / "best.pt", tmp_path / "policy.onnx")


def test_a_changed_layer_is_exported(tmp_path, monkeypatch):
    """As in a fork that normalizes its layers: the export has no forward of its own."""
    directory = trained(box_data(tmp_path), tmp_path / "run")
    policy = cql.load_policy(directory, run=1)
    plain = policy(observations(policy))
    forward = torch.nn.Linear.forward

    def normalized(layer, x):
        x = forward(layer, x)
        return F.layer_norm(x, x.shape[-1:])

    monkeypatch.setattr(torch.nn.Linear, "forward", normalized)
    changed = both(directory, tmp_path / "changed.onnx")
    assert np.abs(changed - plain).max() > 0.1


def test_without_its_packages(tmp_path):
    """One line that says what to install."""
    directory = trained(toy_dataset(tmp_path), tmp_path / "run")
    script = export_onnx.__file__
    code = "import runpy, sys; sys.modules['onnxscript'] = None; sys.argv = sys.argv[1:]"
    code += f"; runpy.run_path({script!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, script, directory, "policy.onnx"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    line = "export_onnx.py: error: .*onnxscript.*: pip install onnx==.*\n"
    assert re.fullmatch(line, result.stderr), result.stderr
    assert not (tmp_path / "policy.onnx").exists()


def test_bad_input_is_one_line(tmp_path, capsys):
    directory = str(trained(toy_dataset(tmp_path), tmp_path / "run"))
    path = str(tmp_path / "policy.onnx")
    cases = {
        "none/checkpoint.pt: cannot be read": [
            str(tmp_path / "none/checkpoint.pt"),
            path,
        ],
        "holds runs 0 to 1, no 2": [directory, path, "--run", "2"],
        "no such directory": [directory, str(tmp_path / "no" / "policy.onnx")],
        "run/config.yaml/x: no such directory": [
            directory,
            f"{directory}/config.yaml/x",
        ],
        "run: a directory; pass the name of a file": [directory, directory],
        "File name too long": [directory, "中" * 90],
        "holds runs 0 to 1, no -1": [directory, path, "--run", "-1"],
        "required: path": [directory],
    }
    before = sorted(tmp_path.rglob("*"))
    for words, argv in cases.items():
        capsys.readouterr()
        assert export_onnx.main(argv) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(f"export_onnx.py: error: .*{words}.*\n", error), error
    assert sorted(tmp_path.rglob("*")) == before
    for full in ("/dev/full", "/proc/policy.onnx"):
        assert export_onnx.main([directory, full]) == 1
        error = capsys.readouterr().err
        assert re.fullmatch(f"export_onnx.py: failed: cannot write {full}: .*\n", error)
