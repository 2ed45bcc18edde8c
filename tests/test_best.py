"""Tests of what a run leaves for use: best policies, numbered checkpoints, Q."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from make_data import minari_dataset, random_episodes, run, toy_dataset
from reference import critic_outputs
from test_runs import after_update, differences, poison, signal_at

import cql

BOUNDS = {"low": [-2.0, 0.0], "high": [1.0, 4.0]}
BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-2, qf_lr=1e-2, cql_alpha=1, max_timesteps=12, eval_freq=4,
    log_freq=100, n_episodes=1, seed="[0,1]",
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"), env_kwargs=BOUNDS)


@pytest.fixture
def go(toy, tmp_path):
    """go(name, **flags) trains in tmp_path / name and returns the directory and the
    output."""

    def command(name, expected=0, **flags):
        values = {"env": toy, "resume": tmp_path / name, **BASE, **flags}
        status, out, err = run(**{k: v for k, v in values.items() if v is not ...})
        assert status == expected, (status, out, err)
        return tmp_path / name, out

    return command


@pytest.fixture
def returns(monkeypatch):
    """{step: returns by run}, which replace the true returns of that evaluation."""
    told, evaluate = {}, cql.Evaluator.evaluate

    def evaluate_so(self, agent, step, alive, stop):
        found = evaluate(self, agent, step, alive, stop)
        for r, row in (found or {}).items():  # none where a signal came
            row["return_mean"] = float(told.get(step, [0, 0])[r])
        return found

    monkeypatch.setattr(cql.Evaluator, "evaluate", evaluate_so)
    return told


def saved(directory, name):
    return torch.load(directory / name, weights_only=True)


def weights(payload, r):
    """Run r's part of all that leads with the runs, by name."""
    found = {}
    for name, value in payload["agent"].items():
        if "critic" in name or "policy" in name or name.startswith("log_alpha"):
            found[name] = value[r]
    assert len(found) > 15
    return found


def assert_weights(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- the best policies ----------------------------------------------------------------


def test_each_run_s_weights_at_its_best_evaluation(go, returns):
    """Of equal evaluations the first counts. The weights are those of the numbered
    checkpoints."""
    returns |= {2: [-9, -5], 4: [3, -7], 6: [3, -7], 8: [2, -4], 10: [-1, -6]}
    returns[12] = [0, -8]
    directory, out = go("run", eval_freq=2, checkpoint_freq=2)
    best, x = saved(directory, "best.pt"), np.random.default_rng(0).normal(size=(9, 3))
    for r, step in enumerate((4, 8)):
        path = directory / f"checkpoint_{step}.pt"
        assert_weights(weights(best, r), weights(saved(directory, path), r))
        ours = cql.load_policy(directory / "best.pt", run=r)
        theirs = cql.load_policy(path, run=r)
        np.testing.assert_array_equal(ours(x), theirs(x))
        assert (ours(x) != cql.load_policy(directory, run=r)(x)).any()
        assert best["best"]["steps"][r] == step
        assert best["best"]["returns"][r] == returns[step][r]
    lines = [line for line in out.splitlines() if line.startswith("run ")]
    assert "best 3.00 at 4" in lines[0] and "best -4.00 at 8" in lines[1]


class Running:
    """A network with a buffer that its training changes in place."""

    def __init__(self, config, obs_dim, *sizes):
        super().__init__(config, obs_dim, *sizes)
        self.register_buffer("running_mean", torch.zeros(obs_dim))

    def forward(self, observations, *inputs):
        if torch.is_grad_enabled():
            self.running_mean.mul_(0.5).add_(observations.mean(0) / 2)
        return super().forward(observations - self.running_mean, *inputs)


BUFFERS = {"policy.running_mean": 2, "critic.running_mean": 3}  # [R, O], [R, N, O]


def test_each_run_s_buffers_at_its_best_evaluation(go, returns, monkeypatch):
    """A policy of best.pt acts with the buffers of its own run's best evaluation."""
    for name in ("Policy", "Critic"):
        kind = type(f"Running{name}", (Running, getattr(cql, name)), {})
        monkeypatch.setattr(cql, name, kind)
    returns |= {step: [-9, -9] for step in range(2, 13, 2)}
    returns |= {4: [3, -9], 8: [2, -4]}
    steps = [4, 8]
    directory, _ = go("run", eval_freq=2, checkpoint_freq=2)
    best, x = saved(directory, "best.pt"), np.random.default_rng(0).normal(size=(9, 3))
    assert best["best"]["steps"] == steps
    last = saved(directory, "checkpoint.pt")
    for r, step in enumerate(steps):
        path = directory / f"checkpoint_{step}.pt"
        kept = saved(directory, path.name)
        assert_weights(weights(best, r), weights(kept, r))
        policy = cql.load_policy(directory / "best.pt", run=r)
        buffers = dict(policy.agent.named_buffers())
        for name, ndim in BUFFERS.items():
            assert buffers[name].ndim == ndim
            assert torch.equal(buffers[name][r], kept["agent"][name][r])
            assert not torch.equal(buffers[name][r], last["agent"][name][r])
            assert not torch.equal(buffers[name][0], buffers[name][-1])
        theirs = cql.load_policy(path, run=r)
        np.testing.assert_array_equal(policy(x), theirs(x))
        assert (policy(x) != cql.load_policy(directory, run=r)(x)).any()
        with torch.no_grad():  # the actions follow from the buffer
            policy.agent.policy.running_mean[r] += 1
        assert (policy(x) != theirs(x)).any()


@pytest.mark.parametrize("half", [0, 3, 4, 6, 7])
def test_a_run_made_longer_keeps_its_best(go, returns, half):
    """Also that of an evaluation off the schedule, at the run's first end; a signal
    shortly after changes nothing."""
    returns |= {0: [9, 9], 3: [9, 9], 6: [9, 9], 7: [9, 9]}
    returns |= {4: [1, 2], 8: [2, 1], 12: [0, 0]}
    directory, _ = go("run", max_timesteps=half)
    first = saved(directory, "checkpoint.pt")
    with pytest.MonkeyPatch.context() as patch:
        after_update(patch, signal_at(1))
        go("run", expected=143)
    _, out = go("run")
    assert differences(go("whole")[0], directory, first_end=half) == []
    best = saved(directory, "best.pt")
    steps = [8, 4] if half == 4 else [half, half]
    assert best["best"]["steps"] == steps
    for r, step in enumerate(steps):
        assert re.search(rf"^run {r} .* best \d\.00 at {step}$", out, re.M)
        if step == half:
            assert_weights(weights(best, r), weights(first, r))


def test_the_evaluation_before_the_online_phase_stays(go, returns):
    """It is on the schedule of the longer run, too."""
    returns |= {6: [9, 1], 8: [1, 9]}
    go("run", max_timesteps=6)
    directory, _ = go("run", max_timesteps=6, online_iterations=6)
    whole, _ = go("whole", max_timesteps=6, online_iterations=6)
    assert differences(whole, directory, first_end=6) == []
    assert saved(directory, "best.pt")["best"]["steps"] == [6, 8]


def test_a_best_pt_that_a_kill_came_before(go):
    """A resumed run repairs a best.pt that is missing or incomplete, even if it has
    nothing else to do."""
    directory, _ = go("run")
    before = (directory / "best.pt").read_bytes()
    for damage in (b"", b"PK\x03\x04", None):
        (directory / "best.pt").unlink()
        if damage is not None:
            (directory / "best.pt").write_bytes(damage)
        go("run")
        assert (directory / "best.pt").read_bytes() == before


def test_no_evaluation_no_best(go):
    directory, out = go("run", eval_env="none")
    assert not (directory / "best.pt").exists() and ", best " not in out


def test_a_run_goes_on_from_its_best(go, returns):
    """--load_model starts from best.pt, with a new Adam, and says so."""
    returns |= {4: [1, 2], 8: [2, 1]}
    source, _ = go("run")
    flags = {name: ... for name in BASE} | {"device": "cpu", "max_timesteps": 0}
    again, out = go("again", load_model=source / "best.pt", **flags)
    assert f"{source / 'best.pt'}: holds no optimizer" in out
    best, begun = saved(source, "best.pt"), saved(again, "checkpoint.pt")
    for r in (0, 1):
        assert_weights(weights(begun, r), weights(best, r))
    moments = begun["agent"]["_extra_state"]["optimizer"]
    assert len(moments) > 15
    for each in moments.values():
        assert not any(tensor.any() for tensor in each.values())
    for name in ("units.observation_mean", "units.observation_std"):
        assert torch.equal(begun["agent"][name], best["agent"][name])
    flags["max_timesteps"] = 2
    trained, _ = go("trained", load_model=source / "best.pt", **flags)
    state = saved(trained, "checkpoint.pt")["agent"]["_extra_state"]
    assert {int(each["step"]) for each in state["optimizer"].values()} == {2}
    _, out = go("third", load_model=source, **flags)
    assert "Adam" not in out


def test_the_best_of_a_run_that_diverged_later(go, monkeypatch):
    """Run 1 at update 6, after its evaluation at 4; run 2 before any."""
    seeds = {"seed": "[0,1,2]"}
    early, _ = go("early", max_timesteps=4, **seeds)
    after_update(monkeypatch, poison(6, 1))
    after_update(monkeypatch, poison(2, 2))
    directory, _ = go("run", expected=3, **seeds)
    ours, theirs = saved(directory, "best.pt"), saved(early, "checkpoint.pt")
    assert_weights(weights(ours, 1), weights(theirs, 1))
    assert np.isfinite(cql.load_policy(directory / "best.pt", run=1)(np.ones(3))).all()
    with pytest.raises(cql.UserError, match="run 1 diverged"):
        cql.load_policy(directory, run=1)
    with pytest.raises(cql.UserError, match="run 2 diverged"):
        cql.load_policy(directory / "best.pt", run=2)


# --- kept checkpoints -----------------------------------------------------------------


@pytest.mark.parametrize("stops", [[10], [5, 10], [6, 10]])
def test_checkpoints_that_are_kept(go, stops):
    """Each is what a run of that length ends with, also in a resumed run."""
    for stop in stops:
        directory, _ = go("run", max_timesteps=stop, checkpoint_freq=3)
    kept = {path.name for path in directory.glob("checkpoint_*")}
    assert kept == {"checkpoint_3.pt", "checkpoint_6.pt", "checkpoint_9.pt"}
    short, _ = go("short", max_timesteps=6)
    ours, theirs = saved(directory, "checkpoint_6.pt"), saved(short, "checkpoint.pt")
    assert ours["step"] == 6
    moments = [x["agent"].pop("_extra_state") for x in (ours, theirs)]
    assert_weights(ours["agent"], theirs["agent"])
    assert_weights(*moments)
    assert not list(short.glob("checkpoint_*"))
    policy = cql.load_policy(directory / "checkpoint_6.pt", run=1)
    x = np.random.default_rng(0).normal(size=(9, 3))
    np.testing.assert_array_equal(policy(x), cql.load_policy(short, run=1)(x))


# --- Q for use ------------------------------------------------------------------------


def critics_by_hand(policy, observation, action):
    """Outputs of the critics [N, outputs] for a raw observation and a unit action."""
    agent, r = policy.agent, 1
    parameters = {}
    for name, x in agent.named_parameters():
        parameters[name] = x.detach()[r]
    mean, std = agent.units.observation_mean, agent.units.observation_std
    x = ((torch.tensor(observation) - mean) / std).tolist()
    n_critics = agent.config.n_critics
    return np.array(critic_outputs(parameters, "critic", n_critics, x + list(action)))


def trained(data, directory, **flags):
    """Train two runs of three critics and change all weights; return run 1's policy."""
    flags = {"max_timesteps": 2, "n_critics": 3, **flags}
    status, _, err = run(env=data, resume=directory, **{**BASE, **flags})
    assert status == 0, err
    payload, generator = saved(directory, "checkpoint.pt"), torch.Generator()
    for name, values in payload["agent"].items():
        if name.endswith(("weight", "bias")):
            values += 0.3 * torch.randn(values.shape, generator=generator.manual_seed(0))
    torch.save(payload, directory / "checkpoint.pt")
    return cql.load_policy(directory, run=1)


def check_q(q, each):
    """Assert that q is minimum, mean and all of the critics' values [N, ...]."""
    for values, expected in zip(q, (each.min(0), each.mean(0), each)):
        assert np.shape(values) == expected.shape
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert q._fields == ("least", "mean", "each")
    assert (each.max(0) - each.min(0) > 1e-3).all()


def test_q_of_continuous_actions(toy, tmp_path):
    policy, rng = trained(toy, tmp_path / "run"), np.random.default_rng(0)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    actions = rng.uniform(BOUNDS["low"], BOUNDS["high"], (4, 2)).astype(np.float32)
    unit = (actions - [-0.5, 2]) / [1.5, 2]
    each = [critics_by_hand(policy, *pair)[:, 0] for pair in zip(x, unit)]
    check_q(policy.q(x, actions), np.transpose(each))
    check_q(policy.q(x[1], actions[1]), each[1])


def test_q_of_a_dictionary(tmp_path):
    kwargs = {**BOUNDS, "layout": "dict"}
    policy = trained(toy_dataset(tmp_path, env_kwargs=kwargs), tmp_path / "run")
    point, last = np.float32([0.3, -0.4]), np.float32([0.2])
    parts = {"point": point, "last": last}
    action = policy(parts)
    flat = gym.spaces.flatten(gym.make("CqlToy-v0", **kwargs).observation_space, parts)
    unit = (action - [-0.5, 2]) / [1.5, 2]
    check_q(policy.q(parts, action), critics_by_hand(policy, flat, unit)[:, 0])


def test_q_of_discrete_actions(tmp_path):
    """Q of every action, which count from -1 here, or of given ones."""
    episodes = random_episodes([10, 12, 9])
    for each in episodes:
        each["actions"] = np.arange(len(each["actions"])) % 4 - 1
    space = gym.spaces.Discrete(4, start=-1)
    data = minari_dataset(tmp_path, "minus/one-v0", episodes, action_space=space)
    policy = trained(data, tmp_path / "run")
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    every = np.stack([critics_by_hand(policy, row, []) for row in x], axis=1)
    assert every.shape == (3, 6, 4)
    check_q(policy.q(x), every)
    check_q(policy.q(x[2]), every[:, 2])
    actions = np.array([-1, 0, 1, 2, 2, -1])
    check_q(policy.q(x, actions), every[:, range(6), actions + 1])
    check_q(policy.q(x[2], actions[2]), every[:, 2, 2])
    check_q(policy.q(x[2], 1), every[:, 2, 2])
    np.testing.assert_array_equal(policy(x), policy.q(x).mean.argmax(-1) - 1)
    with pytest.raises(ValueError, match="actions are"):
        policy.q(x[2], -2)
