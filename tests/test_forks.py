"""Changes of the kind that a student makes, in copies of cql.py.

Each is a diff in forks/, as short as it is there; nothing else of the copy follows it.
What must hold of cql.py must hold of the copy: it stacks, resumes to the last bit, goes
by CUDA graphs, and evaluation, load_policy and the ONNX file choose the same actions."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import arguments, d4rl_file, random_episodes, toy_dataset
from test_graph import load_copy, train_copy, use_cpu, with_graphs

import cql

HERE = Path(__file__).resolve().parent
SMALL = dict(
    seed=[0, 1], max_timesteps=4, eval_freq=2, log_freq=1, n_episodes=2,
    q_n_hidden_layers=2, policy_lr=1e-2, qf_lr=1e-2,
)  # fmt: skip
FORKS = {
    "layer_norm": {},
    "cosine_learning_rate": {},
    "n_step_returns": {},
    "max_penalty": {"penalty": "max", "cql_backward_actions": 1},
    "critic_steps": {},
}
CASES = [(name, False) for name in FORKS]
CASES.append(("layer_norm", True))  # there the critics choose the action


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of data and environment; by the key True, of discrete actions."""
    root = tmp_path_factory.mktemp("data")
    episodes = random_episodes([40, 20], obs_dim=4)
    for episode in episodes:
        episode["actions"] = np.arange(len(episode["rewards"])) % 2
    file = d4rl_file(root / "d.hdf5", episodes)
    return {
        False: {"env": toy_dataset(root)},
        True: {"env": file, "eval_env": "CartPole-v1"},
    }


def patched(name, directory):
    """cql.py in that directory, with the diff applied; returns its text."""
    directory.mkdir()
    (directory / "cql.py").write_text(Path(cql.__file__).read_text())
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    diff = HERE / "forks" / f"{name}.diff"
    git = ["git", "apply", "-C1", str(diff)]
    subprocess.run(git, cwd=directory, env=environment, check=True)
    return (directory / "cql.py").read_text()


def fork(name, tmp_path):
    return load_copy(tmp_path / name / "cql.py", patched(name, tmp_path / name))


class Killed(BaseException):
    pass


def kill_after_a_checkpoint(module, monkeypatch, step):
    """The next training by the module ends there, and saves nothing more."""
    checkpoint = module.Run.checkpoint

    def then_die(run):
        checkpoint(run)
        if run.step == step:
            raise Killed

    monkeypatch.setattr(module.Run, "checkpoint", then_die)


def recorded_actions(module, monkeypatch):
    """What evaluations ask `act` for, and its answers, in a list that fills."""
    act, calls = module.Agent.act, []

    def spy(agent, observations, normals=None):
        actions = act(agent, observations, normals)
        calls.append((agent.updates, np.array(observations), actions))
        return actions

    monkeypatch.setattr(module.Agent, "act", spy)
    return calls


@pytest.mark.parametrize("name, discrete", CASES)
def test_a_fork_is_whole(name, discrete, data, tmp_path, monkeypatch):
    """Two updates, killed, resumed for two more, and evaluated."""
    module = fork(name, tmp_path)
    flags = {**SMALL, **data[discrete], **FORKS[name]}
    with monkeypatch.context() as patch:
        kill_after_a_checkpoint(module, patch, step=2)
        with pytest.raises(Killed):
            train_copy(module, tmp_path / "killed", **flags)
    calls = recorded_actions(module, monkeypatch)
    agent, tables = train_copy(module, tmp_path / "killed", **flags)
    resumed = list(calls)
    whole, whole_tables = train_copy(module, tmp_path / "whole", **flags)
    assert tables == whole_tables and "" not in tables
    torch.testing.assert_close(agent, whole, rtol=0, atol=0)

    policies = [module.load_policy(tmp_path / "killed", run=r) for r in (0, 1)]
    last = [call for call in resumed if call[0] == 4]
    assert len(last) > 5
    for _, observations, actions in last:
        for r, policy in enumerate(policies):
            chosen = policy(observations[r]).reshape(actions[r].shape)
            np.testing.assert_allclose(chosen, actions[r], rtol=1e-5, atol=1e-6)

    solo, _ = train_copy(module, tmp_path / "solo", **{**flags, "seed": 1})
    plain, _ = train_copy(cql, tmp_path / "plain", **SMALL, **data[discrete])
    for key, weight in solo.items():
        if key.startswith(("policy", "critic")):
            torch.testing.assert_close(weight, whole[key][1:], rtol=1e-4, atol=1e-5)
    key = "critic.layers.0.weight"
    assert not torch.equal(plain[key], whole[key])  # the change changes something


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_goes_by_graphs(name, data, tmp_path, monkeypatch):
    """What changes in the course of training, a learning rate say, does in replays."""
    use_cpu(monkeypatch)
    flags = {**SMALL, **data[False], **FORKS[name], "max_timesteps": 16}
    flags |= {"eval_freq": 100, "n_episodes": 1}
    text = patched(name, tmp_path / name)
    plain = load_copy(tmp_path / name / "cql.py", text)
    (tmp_path / f"{name}_graphs").mkdir()
    captured = load_copy(tmp_path / f"{name}_graphs" / "cql.py", with_graphs(text))
    agents, tables = zip(
        train_copy(plain, tmp_path / "plain", **flags),
        train_copy(captured, tmp_path / "graphs", **flags),
    )
    assert tables[0] == tables[1]
    torch.testing.assert_close(*agents, rtol=0, atol=0)


# --- each is what it says -------------------------------------------------------------


def agent_of(module, data, **flags):
    """An agent of the copy, and its dataset."""
    values = {**SMALL, **data[False], **flags, "max_timesteps": 4}
    config = module.read_config(arguments(**values))
    episodes, task = module.read_data(config)
    dataset = module.Dataset(config, episodes, task)
    return module.make_agent(config, task), dataset


def test_layers_are_normalized(data, tmp_path):
    """Of the critics, not of the policy, and not the last ones."""
    module = fork("layer_norm", tmp_path)
    agent, dataset = agent_of(module, data)
    kinds = []
    for network in (agent.critic, agent.target_critic, agent.policy):
        kinds.append([type(layer).__name__ for layer in network.layers])
    critics = ["NormedLinear", "NormedLinear", "EnsembleLinear"]
    assert kinds == [critics, critics, ["EnsembleLinear"] * 4]
    outputs, layer = [], agent.critic.layers[0]
    layer.register_forward_hook(lambda layer, inputs, x: outputs.append(x.clone()))
    noise = agent.draw(8)
    agent.update(dataset.sample(noise.fractions), noise)
    assert outputs and layer.scale.grad.abs().min() > 0
    for x in outputs:
        torch.testing.assert_close(x.mean(-1), 0 * x[..., 0], atol=1e-5, rtol=0)
        assert (x.std(-1, correction=0) - 1).abs().max() < 0.2  # eps in the root


@pytest.mark.parametrize("n_steps", [1, 3, 100])
def test_returns_of_n_steps(n_steps, data, tmp_path):
    """Against a loop over the episodes; a field of its own lands in its own place."""
    module = fork("n_step_returns", tmp_path)
    _, dataset = agent_of(module, data, n_steps=n_steps, cal_ql=True)
    plain = agent_of(cql, data)[1]
    batch = dataset.gather(torch.arange(len(plain)).unsqueeze(0))
    whole = plain.gather(torch.arange(len(plain)).unsqueeze(0))
    first = 0
    for length in plain.lengths:
        for t in range(first, first + length):
            steps = min(n_steps, first + length - t)
            rewards = whole.rewards[0, t : t + steps].tolist()
            wanted = sum(r * 0.99**k for k, r in enumerate(rewards))
            assert float(batch.rewards[0, t]) == pytest.approx(wanted, rel=1e-5)
            assert float(batch.discounts[0, t]) == pytest.approx(0.99**steps)
            for name in ("next_observations", "terminations"):
                reached = getattr(whole, name)[0, t + steps - 1]
                assert torch.equal(getattr(batch, name)[0, t], reached), name
        first += length
    for name in ("observations", "actions"):
        assert torch.equal(getattr(batch, name), getattr(whole, name))
    returns = dataset.columns["mc_returns"]
    assert torch.equal(batch.mc_returns[0], returns)


def test_the_new_penalty(data, tmp_path):
    module = fork("max_penalty", tmp_path)
    agent, _ = agent_of(module, data, penalty="max")
    q, q_data = torch.randn(2, 2, 8, 6), torch.randn(2, 2, 8)
    temperature = agent.sweep.cql_temp
    gap = module.conservative_gap(q, 0 * q[:, :1], q_data, temperature, agent.config)
    assert torch.equal(gap, q.amax(-1) - q_data)


def test_the_actor_sits_out(data, tmp_path):
    """Neither it nor its moments move; a zero gradient would have moved it."""
    module = fork("critic_steps", tmp_path)
    agent, dataset = agent_of(module, data, critic_steps=3)
    weight = agent.policy.layers[0].weight
    for update in range(1, 7):
        before = [weight.detach().clone(), agent.log_alpha.detach().clone()]
        critic = agent.critic.layers[0].weight.detach().clone()
        noise = agent.draw(8)
        agent.update(dataset.sample(noise.fractions), noise)
        moved = not torch.equal(before[0], weight)
        assert moved == (update % 3 == 0)
        assert moved != torch.equal(before[1], agent.log_alpha)
        assert not torch.equal(critic, agent.critic.layers[0].weight)
        assert agent.optimizer.state[weight]["step"] == update // 3


def test_the_normalized_critics_are_exported(data, tmp_path, monkeypatch):
    """The ONNX file chooses the fork's discrete actions."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="an optional extra")
    pytest.importorskip("onnxscript", reason="an optional extra")
    module = fork("layer_norm", tmp_path)
    monkeypatch.setitem(sys.modules, "cql", module)
    script = HERE.parent / "scripts" / "export_onnx.py"
    spec = importlib.util.spec_from_file_location("export_of_a_fork", script)
    export_onnx = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export_onnx)
    flags = {**SMALL, **data[True], "max_timesteps": 50, "eval_env": "none"}
    train_copy(module, tmp_path / "run", **flags)
    export_onnx.export(str(tmp_path / "run"), str(tmp_path / "policy.onnx"), run=1)
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    (actions,) = session.run(["action"], {"observation": x})
    expected = module.load_policy(tmp_path / "run", run=1)(x)
    assert set(expected.ravel()) == {0, 1}
    assert np.mean(actions.ravel() == expected.ravel()) > 0.99  # but for near ties
