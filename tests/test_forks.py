"""Changes of the kind that a student makes, in copies of cql.py.

Each is a diff in forks/, written as a paper or PyTorch's documentation would suggest.
Nothing else in the copy is changed. What holds for cql.py must hold for the copy:
stacked runs equal single runs, a resumed run equals an uninterrupted one, CUDA graphs
replay the update, best.pt holds the tensors of each run's best evaluation, and
evaluation, load_policy and the ONNX file choose the same actions."""

import importlib.util
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_data import arguments, d4rl_file, random_episodes, toy_dataset
from test_graph import load_copy, train_copy, use_cpu, with_graphs

import cql

HERE = Path(__file__).resolve().parent
# Enough updates that a graph of every stage is captured, checked and replayed.
SMALL = dict(
    seed=[0, 1], max_timesteps=16, eval_freq=8, log_freq=4, n_episodes=2,
    q_n_hidden_layers=2, policy_lr=1e-2, qf_lr=1e-2,
)  # fmt: skip
FORKS = {
    "clipped_gradients": {},
    "cosine_learning_rate": {},
    "critic_steps": {},
    "diverse_critics": {},
    "edac": {},
    "layer_norm": {},
    "max_penalty": {"penalty": "max", "cql_backward_actions": 1},
    "prioritized": {},
    "return_weighted": {},
    "running_mean": {},
    "running_scale": {},
    "td3_bc": {},
}
CASES = [(name, False) for name in FORKS]
CASES.append(("layer_norm", True))  # with discrete actions, which the critics choose


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags for data and environment; under the key True, with discrete actions."""
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
    """Apply the diff to a copy of cql.py in that directory; return the copy's text."""
    directory.mkdir()
    (directory / "cql.py").write_text(Path(cql.__file__).read_text())
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    diff = HERE / "forks" / f"{name}.diff"
    git = ["git", "apply", "-C1", str(diff)]
    subprocess.run(git, cwd=directory, env=environment, check=True)
    return (directory / "cql.py").read_text()


def fork(name, tmp_path):
    return load_copy(tmp_path / name / "cql.py", patched(name, tmp_path / name))


@pytest.fixture(scope="module")
def plain_returns(data, tmp_path_factory):
    """The evaluations of cql.py as it is, by the kind of actions."""
    root = tmp_path_factory.mktemp("plain")
    evaluations = {}
    for discrete, flags in data.items():
        _, tables = train_copy(cql, root / str(discrete), **SMALL, **flags)
        evaluations[discrete] = tables[1]
    return evaluations


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def whole(request, data, tmp_path_factory):
    """A fork and an uninterrupted training by it. `states` holds the tensors at each
    evaluation by step, `calls` the last evaluation's observations and actions."""
    name, discrete = request.param
    root = tmp_path_factory.mktemp("fork")
    module = fork(name, root)
    flags = {**SMALL, **data[discrete], **FORKS[name]}
    states = {}
    calls = []
    act = module.Agent.act
    episodes = module.Evaluator.episodes

    def spy_on_act(agent, observations, normals=None):
        actions = act(agent, observations, normals)
        calls.append((np.array(observations), actions))
        return actions

    def spy_on_episodes(evaluator, agent, step, *others):
        calls.clear()
        tensors = agent.run_tensors().items()
        states[step] = {name: tensor.detach().clone() for name, tensor in tensors}
        return episodes(evaluator, agent, step, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Agent, "act", spy_on_act)
        patch.setattr(module.Evaluator, "episodes", spy_on_episodes)
        agent, tables = train_copy(module, root / "whole", **flags)
    return SimpleNamespace(
        module=module, discrete=discrete, flags=flags, directory=root / "whole",
        agent=agent, tables=tables, states=states, calls=calls,
    )  # fmt: skip


def test_the_change_changes_something(whole, plain_returns):
    assert "" not in whole.tables
    assert whole.tables[1] != plain_returns[whole.discrete]


class Killed(BaseException):
    pass


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, monkeypatch):
    """To the last bit, after a kill in the middle."""
    module = whole.module
    checkpoint = module.Run.checkpoint

    def then_die(run):
        checkpoint(run)
        if run.step == 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "checkpoint", then_die)
        with pytest.raises(Killed):
            train_copy(module, tmp_path / "run", **whole.flags)
    agent, tables = train_copy(module, tmp_path / "run", **whole.flags)
    assert tables == whole.tables
    torch.testing.assert_close(agent, whole.agent, rtol=0, atol=0)


def test_a_stacked_run_is_the_single_one(whole, tmp_path):
    """In float64, where the two layouts differ by rounding only."""
    torch.set_default_dtype(torch.float64)
    try:
        stacked, _ = train_copy(whole.module, tmp_path / "stacked", **whole.flags)
        flags = {**whole.flags, "seed": 1}
        single, _ = train_copy(whole.module, tmp_path / "single", **flags)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in single.items():
        if name != "_extra_state" and not name.startswith("units."):
            torch.testing.assert_close(value, stacked[name][1:], rtol=1e-8, atol=1e-8)
    assert single["critic.net.0.weight"].dtype == torch.float64


def test_a_fork_trains_by_cuda_graphs(whole, tmp_path, monkeypatch):
    """What changes in the course of training, such as a learning rate, also changes in
    replays."""
    use_cpu(monkeypatch)
    text = with_graphs(Path(whole.module.__file__).read_text())
    (tmp_path / "graphs").mkdir()
    captured = load_copy(tmp_path / "graphs" / "cql.py", text)
    agent, tables = train_copy(captured, tmp_path / "run", **whole.flags)
    assert tables == whole.tables
    torch.testing.assert_close(agent, whole.agent, rtol=0, atol=0)


def test_best_holds_all_tensors_of_a_run_s_best_evaluation(whole):
    best = torch.load(whole.directory / "best.pt", weights_only=True)
    assert set(whole.states) == {8, 16}
    for run, step in enumerate(best["best"]["steps"]):
        for name, value in whole.states[step].items():
            assert torch.equal(best["agent"][name][run], value[run]), name


def load_exporter(module, monkeypatch):
    """scripts/export_onnx.py, which imports the fork as cql."""
    monkeypatch.setitem(sys.modules, "cql", module)
    script = HERE.parent / "scripts" / "export_onnx.py"
    spec = importlib.util.spec_from_file_location("export_of_a_fork", script)
    exporter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(exporter)
    return exporter


def assert_same_actions(actions, expected, discrete):
    actions = actions.reshape(expected.shape)
    if discrete:
        assert np.mean(actions == expected) > 0.99  # apart from near ties
    else:
        np.testing.assert_allclose(actions, expected, rtol=1e-4, atol=1e-5)


def test_everything_that_acts_chooses_the_same_actions(whole, tmp_path, monkeypatch):
    """The last evaluation, load_policy, and the ONNX file of the second run."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="an optional extra")
    pytest.importorskip("onnxscript", reason="an optional extra")
    observations = np.concatenate([each[0] for each in whole.calls], axis=1)
    actions = np.concatenate([each[1] for each in whole.calls], axis=1)
    assert observations.shape[:2] == actions.shape[:2]
    for run in (0, 1):
        policy = whole.module.load_policy(whole.directory, run=run)
        chosen = policy(observations[run])
        assert_same_actions(chosen, actions[run], whole.discrete)
    path = str(tmp_path / "policy.onnx")
    load_exporter(whole.module, monkeypatch).export(str(whole.directory), path, run=1)
    session = onnxruntime.InferenceSession(path)
    inputs = {"observation": observations[1].astype(np.float32)}
    (exported,) = session.run(["action"], inputs)
    assert_same_actions(exported, actions[1], whole.discrete)
    assert actions[1].std() > 0


# --- each does what it says -----------------------------------------------------------


def agent_of(module, data, discrete=False, **flags):
    """An agent of the copy, and its dataset."""
    values = {**SMALL, **data[discrete], **flags}
    config = module.read_config(arguments(**values))
    episodes, task = module.read_data(config)
    dataset = module.Dataset(config, episodes, task)
    return module.make_agent(config, task), dataset


def update_once(agent, dataset, number=0, *stage):
    """Make an update; return its batch, prepared, and its metrics."""
    noise = agent.draw(number, 8)
    batch = dataset.gather(dataset.index(noise["fractions"]))
    return agent.prepare(batch), agent.update(batch, noise, *stage)


@pytest.mark.parametrize("discrete", [False, True])
def test_layers_are_normalized(discrete, data, tmp_path):
    """In the critics, except after the last layer, and not in the policy. Every critic
    of every run computes what its own plain modules do."""
    module = fork("layer_norm", tmp_path)
    agent, dataset = agent_of(module, data, discrete)
    layers = ["Linear", "LayerNorm", "ReLU"]
    for network in (agent.critic, agent.target_critic):
        kinds = [type(layer).__name__ for layer in network.net]
        assert kinds == [*layers, *layers, "Linear"]
    if not discrete:
        assert not any("LayerNorm" in str(layer) for layer in agent.policy.net)
    for number in range(3):
        batch, _ = update_once(agent, dataset, number)
    scale = agent.critic.net[1].weight
    assert scale.shape == (2, 2, 8) and len(scale.flatten(0, 1).unique(dim=0)) == 4
    sizes = agent.column_sizes["observations"][0], 2
    kind = module.DiscreteCritic if discrete else module.Critic
    for run in (0, 1):
        weights = {name: x[run] for name, x in agent.critic.state_dict().items()}
        x = batch["observations"][run]
        for number in (0, 1):
            critic = kind(agent.config, *sizes)
            critic.load_state_dict({name: w[number] for name, w in weights.items()})
            if discrete:
                expected = critic.net(x)
                q = agent.q_values(weights, x)[number]
            else:
                actions = batch["actions"][run]
                expected = critic.net(torch.cat([x, actions], dim=1)).squeeze(1)
                q = agent.q_of(weights, x, actions)[number]
            torch.testing.assert_close(q, expected)


def test_the_last_layer_starts_small(data, tmp_path):
    """The normalized layers leave the initialization of the others as it was."""
    module = fork("layer_norm", tmp_path)
    for orthogonal in (False, True):
        plain, _ = agent_of(cql, data, orthogonal_init=orthogonal)
        agent, _ = agent_of(module, data, orthogonal_init=orthogonal)
        linear = [x for x in agent.critic.net if isinstance(x, torch.nn.Linear)]
        for layer, of_plain in zip(linear, plain.critic.net[::2], strict=True):
            assert torch.equal(layer.weight, of_plain.weight)
            assert torch.equal(layer.bias, of_plain.bias)


def test_the_new_penalty(data, tmp_path):
    module = fork("max_penalty", tmp_path)
    agent, _ = agent_of(module, data, penalty="max")
    q = torch.randn(8, 7)
    gap = module.conservative_gap(q, torch.zeros(8, 6), torch.ones(()), agent.config)
    assert torch.equal(gap, q[:, 1:].amax(-1) - q[:, 0])


def test_the_actor_sits_out(data, tmp_path):
    """Neither the actor nor its moments change; a zero gradient would change them."""
    module = fork("critic_steps", tmp_path)
    agent, dataset = agent_of(module, data, critic_steps=3)
    weight = agent.policy.net[0].weight
    for number in range(6):
        before = [weight.detach().clone(), agent.log_alpha.detach().clone()]
        critic = agent.critic.net[0].weight.detach().clone()
        update_once(agent, dataset, number, *module.stage_of(agent.config, number))
        moved = not torch.equal(before[0], weight)
        assert moved == ((number + 1) % 3 == 0)
        assert moved != torch.equal(before[1], agent.log_alpha)
        assert not torch.equal(critic, agent.critic.net[0].weight)
        assert agent.optimizer.state[weight]["step"] == (number + 1) // 3


def test_td3_bc_is_the_paper_s(data, tmp_path):
    """The loss of each run, its own mean |Q| in the denominator."""
    module = fork("td3_bc", tmp_path)
    agent, dataset = agent_of(module, data)
    noise = agent.draw(0, 8)
    batch = dataset.gather(dataset.index(noise["fractions"]))
    actions = agent.actions(batch["observations"])
    q = agent.q(batch["observations"], actions)[:, 0]  # of the first critic, [R, B]
    metrics = agent.update(batch, noise)
    for run in (0, 1):
        error = (actions[run] - batch["actions"][run]).square().mean()
        expected = -2.5 * q[run].mean() / q[run].abs().mean() + error
        torch.testing.assert_close(metrics["policy_loss"][run], expected)


def test_a_running_scale_belongs_to_its_run(data, tmp_path):
    module = fork("running_scale", tmp_path)
    agent, dataset = agent_of(module, data)
    update_once(agent, dataset)
    scales = agent.q_scale.clone()
    assert scales.shape == (2,) and scales[0] != scales[1] and (scales < 1).all()
    update_once(agent, dataset, 1)
    assert not torch.equal(agent.q_scale, scales)


def test_running_means_belong_to_their_networks(data, tmp_path):
    """To policies, critics and target critics, which copy those of the critics."""
    module = fork("running_mean", tmp_path)
    agent, dataset = agent_of(module, data)
    batch, _ = update_once(agent, dataset)
    means = 0.1 * batch["observations"].mean(1)  # [R, O]
    torch.testing.assert_close(agent.policy.mean, means)
    for network in (agent.critic, agent.target_critic):
        torch.testing.assert_close(network.mean, torch.stack([means, means], dim=1))


def test_returns_weight_the_sampling(data, tmp_path):
    """Offline, and in the dataset's share of online batches."""
    module = fork("return_weighted", tmp_path)
    flags = {"online_iterations": 100, "eval_env": "CqlToy-v0"}
    agent, dataset = agent_of(module, data, **flags)
    shares = torch.diff(dataset.cumulative, prepend=torch.zeros(1))  # by transition
    n = 2000
    fractions = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    index = dataset.index(fractions.expand(2, n))
    counts = index[0].bincount(minlength=len(dataset)) / n
    assert (counts - shares).abs().max() <= 1 / n
    ends = np.cumsum(dataset.lengths)
    returns = []
    for first, last in zip(ends - dataset.lengths, ends):
        returns.append(float(dataset.columns["rewards"][first:last].sum()))
        of_episode = shares[first:last]
        torch.testing.assert_close(of_episode, of_episode[:1].expand_as(of_episode))
    order = np.argsort(returns)
    assert (np.diff(shares[ends - 1].numpy()[order]) >= 0).all()
    assert shares.max() / shares.min() == pytest.approx(np.e, rel=1e-3)
    batch = module.Replay(agent.config, dataset, agent).sample(fractions.expand(2, n))
    assert torch.equal(batch["rewards"], dataset.columns["rewards"][index])


def test_gradients_are_clipped_by_run(data, tmp_path):
    """One run's large gradients leave the other's as they are."""
    module = fork("clipped_gradients", tmp_path)
    agent, _ = agent_of(module, data)
    for each in agent.parameters():
        each.grad = torch.zeros_like(each)
        each.grad[0] = 5.0
        each.grad[1] = 1e-4
    module.clip_by_run(list(agent.parameters()), max_norm=1.0)
    squares = sum(x.grad.reshape(2, -1).square().sum(1) for x in agent.parameters())
    assert squares[0].sqrt() == pytest.approx(1.0, rel=1e-4)
    assert agent.log_alpha.grad[1] == pytest.approx(1e-4)


def test_dropout_is_refused(data, tmp_path):
    """Before anything is written, in one line."""
    module = fork("dropout", tmp_path)
    for discrete in (False, True):
        for seed in (0, [0, 1]):
            flags = {**SMALL, **data[discrete], "seed": seed, "resume": tmp_path / "run"}
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
                assert module.main(arguments(**flags)) == 2
            assert err.getvalue().startswith("cql.py: error: ")
            assert "dropout" in err.getvalue() and err.getvalue().count("\n") == 1
            assert not (tmp_path / "run").exists()


def test_edac_is_the_paper_s(data, tmp_path):
    """The mean cosine of every two critics' gradients, by loops (arXiv 2110.01548)."""
    module = fork("edac", tmp_path)
    agent, dataset = agent_of(module, data)
    noise = agent.draw(0, 8)
    batch = dataset.gather(dataset.index(noise["fractions"]))
    prepared = agent.prepare(batch)
    expected = []
    for run in (0, 1):
        gradients = []
        for j in range(2):
            critic = {k: x[run, j] for k, x in agent.weights["critic"].items()}
            actions = prepared["actions"][run].clone().requires_grad_()
            inputs = prepared["observations"][run], actions.unsqueeze(1)
            q = module.call(agent.critic, critic, *inputs)
            gradients.append(torch.autograd.grad(q.sum(), actions)[0])
        cosine = torch.cosine_similarity(*gradients, dim=-1).mean()
        expected.append(2 * cosine)  # of the first with the second, and back
    metrics = agent.update(batch, noise)
    torch.testing.assert_close(metrics["diversity_loss"], torch.stack(expected))


def test_priorities_belong_to_their_run(data, tmp_path):
    """Each run draws by its own priorities, which become its TD errors."""
    module = fork("prioritized", tmp_path)
    agent, dataset = agent_of(module, data)
    replay = module.Replay(agent.config, dataset, agent)
    replay.priorities.fill_(1e-9)
    replay.priorities[0, 5] = replay.priorities[1, 7] = 1e9
    noise = agent.draw(0, 8)
    replay.sample(noise["fractions"])
    assert replay.index.tolist() == [[5] * 8, [7] * 8]
    state, _ = train_copy(module, tmp_path / "run", **SMALL, **data[False])
    payload = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    first, second = payload["replay"]["priorities"]
    assert (first != 1).any() and not torch.equal(first, second)


# --- what would go wrong without a message is refused --------------------------------

TARGET = "            target = td_target(batch, next_q, config)\n\n"
FINISH = "        self.finish(actor, list(self.critic.parameters()), device)\n"
VALUE = "[nn.Linear(task.observation_dim, 1) for _ in self.runs], (n_runs,))\n"
METRIC = '            "alpha": alpha,\n'
GRADIENT = """        actions = batch["actions"].clone().requires_grad_()
        q = self.q_of(weights["critic"], batch["observations"], actions)
        slope = torch.autograd.grad(q.sum(), actions, create_graph=True)[0]
        policy_loss = policy_loss + slope.square().mean()
"""
SAMPLED = "            return self.data.gather(self.data.index(fractions))\n"
TRAPS = {
    "a network without a seed": (
        FINISH,
        f"        self.value = stack({VALUE}        actor += self.value.parameters()\n"
        + FINISH,
        "a network: draws from torch's global generator; make networks inside `seeded`",
    ),
    "a network that nothing trains": (
        FINISH,
        f"        with seeded([INIT, 0]):\n            self.value = stack({VALUE}"
        + FINISH,
        "value.weight: no optimizer trains it; pass it to `finish`",
    ),
    "noise in the batch": (
        SAMPLED,
        SAMPLED.replace("return", "batch =")
        + '            batch["rewards"] += torch.randn_like(batch["rewards"])\n'
        + "            return batch\n",
        "an update: draws from torch's global generator; draw noise in draw_run",
    ),
    "a target of two dimensions": (
        TARGET,
        TARGET.replace("config)\n", "config).unsqueeze(-1)\n"),
        "losses: the TD target has shape (2, 1) for Q (2,)",
    ),
    "a target for each critic": (
        TARGET,
        TARGET.replace("\n\n", "\n            target = target.expand(2, 2)\n\n"),
        "losses: the TD target has shape (2, 2) for Q (2,)",
    ),
    "a loss of each row": (
        "            policy_loss = (alpha * log_pi - q).mean()\n",
        "            policy_loss = alpha * log_pi - q\n",
        "losses: the loss has shape (2,); return a mean or sum",
    ),
    "a number as metric": (
        METRIC,
        f'{METRIC}            "one": 1.0,\n',
        "metric one: 1.0",
    ),
    "a gradient by autograd": (
        "        # TD target: SAC eq. 2-3",
        GRADIENT + "        # TD target: SAC eq. 2-3",
        "torch.autograd.grad fails in vmap; use torch.func.grad",
    ),
    "other proposals": (
        'torch.cat([noise["uniforms"], current, following], dim=1)',
        'noise["uniforms"]',
        "losses: 4 proposals; keep 3 x cql_n_actions",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("seed", [0, [0, 1]])
def test_a_silent_fault_is_refused(trap, seed, data, tmp_path):
    before, after, message = TRAPS[trap]
    text = Path(cql.__file__).read_text()
    assert text.count(before) == 1
    (tmp_path / "copy").mkdir()
    module = load_copy(tmp_path / "copy/cql.py", text.replace(before, after))
    flags = {**SMALL, **data[False], "seed": seed, "cql_n_actions": 4}
    flags |= {"cql_importance_sample": False, "checkpoints_path": None}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        assert module.main(arguments(**flags)) == 2
    assert message in err.getvalue() and err.getvalue().count("\n") == 1
