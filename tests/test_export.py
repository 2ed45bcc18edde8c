"""The ONNX export beside load_policy."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from make_data import minari_dataset, rollout, run, toy_dataset

import cql

onnxruntime = pytest.importorskip("onnxruntime", reason="an optional extra")
pytest.importorskip("onnxscript", reason="an optional extra")
import export_onnx  # noqa: E402

SMALL = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    max_timesteps=20, eval_freq=20, n_episodes=1, policy_lr=1e-2, qf_lr=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["box", "discrete"])
def test_an_exported_policy_acts_alike(kind, tmp_path):
    if kind == "box":
        bounds = {"low": [-2.0, 0.0], "high": [1.0, 4.0]}
        data = toy_dataset(tmp_path, env_kwargs=bounds)
    else:
        env = gym.make("CartPole-v1")
        data = minari_dataset(tmp_path, "cart/pole-v0", rollout(env, 20), env=env)
    directory = tmp_path / "run"
    assert run(env=data, resume=directory, seed="[0,1]", **SMALL)[0] == 0
    path = str(tmp_path / "policy.onnx")
    export_onnx.export(str(directory), path, run=1)
    policy = cql.load_policy(directory, run=1)
    dim = policy.task.observation_dim
    x = 3 * np.random.default_rng(0).normal(size=(40, dim)).astype(np.float32)
    session = onnxruntime.InferenceSession(path)
    for n in (1, 7, 40):
        (actions,) = session.run(["action"], {"observation": x[:n]})
        np.testing.assert_allclose(actions, policy(x[:n]), atol=1e-5)
    assert len(np.unique(actions)) > 1
    with pytest.raises(cql.UserError):
        export_onnx.export(str(directory), path, run=2)


def test_without_its_packages(tmp_path):
    """One line that says what to install."""
    data, directory = toy_dataset(tmp_path), tmp_path / "run"
    assert run(env=data, resume=directory, **SMALL)[0] == 0
    code = "import runpy, sys; sys.modules['onnxscript'] = None; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path('export_onnx.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "export_onnx.py", directory, "policy.onnx"]
    here = Path(export_onnx.__file__).parent
    result = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.search(r"error: .*onnxscript.*: pip install onnx==", result.stderr)
    assert "Traceback" not in result.stderr
