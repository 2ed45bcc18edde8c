"""The agent: its step, runs side by side, state, initialization, use as a library."""

import copy
import io
import itertools
import math
import pickle
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from reference import (
    ACT,
    OBS,
    box_task,
    in_float64,
    mapped,
    rows,
    tiny,
    tiny_agent,
    train,
    trained,
    transitions,
)
from torch.utils._python_dispatch import TorchDispatchMode

import cql

double = pytest.fixture(in_float64)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAGRANGE = dict(cql_lagrange=True, cql_target_action_gap=3.0, cql_alpha=0.7)


def assert_equal(actual: dict, expected: dict, **tolerance):
    """Of dicts of tensors; bit by bit unless a tolerance is given."""
    assert actual.keys() == expected.keys()
    tolerance = tolerance or dict(rtol=0, atol=0)
    for name, value in expected.items():
        message = f"{name} differs: {actual[name]} is not {value}"
        torch.testing.assert_close(actual[name], value, **tolerance, msg=message)


# ======================================================================================
# One step
# ======================================================================================


def test_update_is_adam_on_gradients_from_before_the_step(double):
    """All losses see the parameters from before the step, each group has its learning
    rate, the bias-corrected moments are Adam's, and only then do the targets move: every
    second update here, by the soft rate, and not in between."""
    rates = {"policy": 3e-2, "log_alpha": 3e-2, "critic": 1e-2, "log_alpha_prime": 1e-2}
    agent = tiny_agent(
        policy_lr=3e-2, qf_lr=1e-2, bc_steps=1, target_update_period=2,
        soft_target_update_rate=0.1, **LAGRANGE,
    )  # fmt: skip
    names = [name for name, p in agent.named_parameters() if p.requires_grad]
    expected, moments = trained(agent), {name: (0.0, 0.0) for name in names}
    for t in range(1, 5):
        batch, noise = transitions(1, 4, seed=t), agent.draw(4)
        losses, _ = agent(batch, noise, agent.stage()[0])
        parameters = [agent.get_parameter(name) for name in names]
        for name, g in zip(names, torch.autograd.grad(losses.sum(), parameters)):
            m, v = moments[name]
            m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            m, v = m / (1 - 0.9**t), v / (1 - 0.999**t)
            rate = rates[name.split(".")[0]]
            expected[name] = expected[name] - rate * m / (v.sqrt() + 1e-8)
        for name in names:
            if t % 2 == 0 and name.startswith("critic."):
                old, new = expected[f"target_{name}"], expected[name]
                expected[f"target_{name}"] = 0.9 * old + 0.1 * new
        agent.update(batch, noise)
        assert_equal(trained(agent), expected, rtol=1e-9, atol=1e-12)


def test_metrics_are_detached_and_from_before_the_step(double):
    agent = tiny_agent(**LAGRANGE)
    batch, noise = transitions(1, 4), agent.draw(4)
    _, before = agent(batch, noise, agent.stage()[0])
    metrics = agent.update(batch, noise)
    assert not any(value.requires_grad for value in metrics.values())
    assert_equal(metrics, {name: value.detach() for name, value in before.items()})


def test_cloning_ends_after_bc_steps():
    """The policy's loss is the cloning one for exactly bc_steps updates."""
    agent = tiny_agent(bc_steps=2)
    batch, noise, cloned = transitions(1, 4), agent.draw(4), []
    for _ in range(4):
        samples = cql.sample_actions(agent.policy, batch, noise)
        alpha = agent.log_alpha.detach().exp()
        wanted = cql.cloning_loss(batch, samples, alpha)[0].item()
        loss = agent.update(batch, noise)["policy_loss"].item()
        cloned.append(loss == pytest.approx(wanted, rel=1e-5))
    assert cloned == [True, True, False, False]


def test_behaviour_cloning_clones():
    """Fault 'log_prob(s, a) ignores a': after the warm-up the policy's actions are the
    data's, a function of the state that it cannot guess."""
    config = tiny(bc_steps=10**6, hidden_dim=16, policy_lr=1e-2, alpha_multiplier=0.01)
    agent, data = cql.ContinuousCQL(config, box_task()), transitions(256)
    data = data._replace(actions=(data.observations[:, :ACT] * 2).tanh() * 0.9)

    def error():
        return np.abs(agent.act(data.observations) - data.actions.numpy()).mean()

    before = error()
    train(agent, data, 250, batch_size=32)
    assert error() < 0.15 < 0.5 < before


def test_multiplier_grows_above_its_target_and_shrinks_below():
    """Fault 'Lagrange multiplier with the wrong sign': targets out of reach."""
    agent = tiny_agent(cql_lagrange=True, cql_target_action_gap=[-100.0, 100.0])
    before = agent.log_alpha_prime.detach().clone()
    metrics = train(agent, transitions(64), 5)
    assert (metrics["cql_qf{j}_diff"].abs() < 100).all()
    moved = (agent.log_alpha_prime - before).tolist()
    assert moved[0] > 0.02 and moved[1] < -0.02


def test_multiplier_stops_at_a_million():
    """... where its gradient is zero, so that it can only stay."""
    agent = tiny_agent(**LAGRANGE)
    agent.log_alpha_prime.data.fill_(20.0)
    metrics = agent.update(transitions(1, 4))
    assert metrics["alpha_prime"].item() == 1e6
    assert agent.log_alpha_prime.item() == 20.0


def test_temperature_moves_entropy_to_its_target():
    """alpha grows while the entropy is below -A and shrinks while it is above."""
    for log_std, sign in ((-6.0, 1), (-0.5, -1)):
        agent = cql.ContinuousCQL(tiny(), box_task())
        agent.policy.log_std_offset.data.fill_(log_std)
        train(agent, transitions(64), 5)
        assert sign * agent.log_alpha.item() > 0.02


@pytest.mark.parametrize(
    "flags, still",
    [
        (dict(), "log_alpha_prime"),
        (dict(use_automatic_entropy_tuning=False, **LAGRANGE), "log_alpha"),
    ],
)
def test_what_a_flag_turns_off_stays_and_all_else_moves(flags, still):
    agent = tiny_agent(**flags)
    before = trained(agent)
    train(agent, transitions(64), 3)
    for name, value in trained(agent).items():
        assert torch.equal(value, before[name]) == (name == still), name


# ======================================================================================
# Runs side by side
# ======================================================================================

WEIGHTS = dict(cql_alpha=[0.5, 5.0], cql_temp=[0.5, 2.0])
PRODUCT = dict(seed=[0, 1], cql_target_action_gap=[1.0, 6.0], **WEIGHTS)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-9)])
def test_stacked_runs_equal_solo_runs(dtype, tolerance, k, request):
    """Sixteen runs at once, and each alone: the same data, noise and parameters after
    100 updates. Nothing of a run reaches another, not even through an optimizer."""
    if dtype == "float64":
        request.getfixturevalue("double")
    flags = dict(cql_lagrange=True, policy_lr=1e-3, qf_lr=1e-3, q_n_hidden_layers=2)
    flags, data = dict(flags, cql_backward_actions=k), transitions(64)
    stacked = cql.ContinuousCQL(tiny(**flags, **PRODUCT), box_task())
    train(stacked, data, 100)
    for r in (5, 10):  # both values of every list
        run = {name: stacked.runs[r][name] for name in cql.SWEPT}
        solo = cql.ContinuousCQL(tiny(**flags, **run), box_task())
        train(solo, data, 100)
        own = {name: value[r : r + 1] for name, value in trained(stacked).items()}
        assert_equal(trained(solo), own, rtol=0, atol=tolerance)
    # ... which says something only if the runs differ by more than the tolerance.
    flat = [value.reshape(16, -1) for value in trained(stacked).values()]
    distances = torch.nn.functional.pdist(torch.cat(flat, 1), p=math.inf)
    assert distances.min() > 5 * tolerance


def test_noise_and_initialization_depend_on_the_seed_alone():
    """Whoever shares the device, in whatever order, with whatever penalty."""
    flags = dict(cql_backward_actions=1, n_critics=3, n_target_critics=2)
    agents = []
    for seeds, alphas in (([7, 8], 1.0), ([8, 3, 7], 9.0), (7, [1.0, 5.0])):
        config = tiny(seed=seeds, cql_alpha=alphas, **flags)
        agents.append(cql.ContinuousCQL(config, box_task()))
    drawn = [agent.draw(5) for agent in agents]
    initial = [trained(agent) for agent in agents]
    for a, r, seed in ((0, 0, 7), (1, 2, 7), (2, 0, 7), (2, 1, 7), (0, 1, 8), (1, 0, 8)):
        for values, first in zip(drawn[a], drawn[0]):
            assert torch.equal(values[r], first[seed - 7])
        for name, first in initial[0].items():
            assert torch.equal(initial[a][name][r], first[seed - 7])
    for values in drawn[0]:
        assert not torch.isclose(values[0], values[1]).any()
    for layer in (*agents[0].policy.layers, *agents[0].critic.layers):
        assert not torch.equal(layer.weight[0], layer.weight[1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_noise_is_a_function_of_the_number_of_the_update(device):
    """Fault 'no RNG state': there is none. Whatever was drawn before, by whomever, the
    noise of update n is the same; no two updates share it, not in a GPU's blocks."""
    config = tiny(seed=[3, 4], cql_backward_actions=1, n_critics=3, n_target_critics=2)
    one, other = (cql.ContinuousCQL(config, box_task(), device) for _ in range(2))
    numbers, draws = [0, 1, 2, 31, 32, 65], []
    for number in numbers:
        one.updates = number
        draws.append(one.draw(5))
    torch.rand(3)
    state = torch.get_rng_state()
    for number, first in reversed(list(zip(numbers, draws))):
        other.updates = number
        assert other.draw(3).fractions.shape == (2, 3)  # another batch in between
        assert_equal(other.draw(5)._asdict(), first._asdict())
    assert torch.equal(torch.get_rng_state(), state)  # nor is torch's own touched
    for first, second in itertools.combinations(draws, 2):
        for values, others in zip(first, second):
            assert not torch.isclose(values, others).any()


def test_no_two_draws_share_a_seed():
    """Of any stream, run and counter; initialization has no counter."""
    streams = [cql.UPDATE, cql.EXPLORE, cql.RESET, cql.EVALUATE]
    numbers = [[cql.INIT, seed] for seed in range(20)]
    numbers += map(list, itertools.product(streams, range(20), range(20)))
    assert len(set(map(cql.seed_from, numbers))) == len(numbers) == 20 + 4 * 400


def test_uniform_actions_fill_the_box():
    """Fault 'random actions uniform in the wrong range ([0,1], or a single point)':
    every dimension of every action has the uniform distribution on [-1, 1]."""
    agent = tiny_agent(cql_n_actions=3)
    noise = agent.draw(4000)
    uniforms = noise.uniforms.flatten(2)[0]  # [B, K * A]
    assert uniforms.shape == (4000, 6)
    ideal = torch.linspace(-1, 1, 4000).unsqueeze(1)
    assert (uniforms.sort(0).values - ideal).abs().max() < 0.1  # Kolmogorov-Smirnov
    assert (torch.corrcoef(uniforms.T) - torch.eye(6)).abs().max() < 0.08
    parts = noise.normals, noise.next_normals, noise.proposal_normals
    normals = torch.cat(parts, 2).flatten(2)[0]
    assert normals.shape == (4000, 2 * (3 + 1) * ACT)
    assert (torch.cov(normals.T) - torch.eye(16)).abs().max() < 0.1
    assert normals.mean(0).abs().max() < 0.08


def test_indices_are_uniform_over_the_data():
    """First and last transition included, nothing beyond."""
    fractions = tiny_agent(seed=[0, 1]).draw(7000).fractions
    assert fractions.dtype == torch.float64
    assert 0 <= fractions.min() < fractions.max() < 1
    counts = (7 * fractions).long()
    assert counts.shape == (2, 7000)
    for run in counts:
        assert ((run.bincount() - 1000).abs() < 150).all() and len(run.bincount()) == 7


def test_noise_holds_what_is_used():
    """Max backup has an action for each of K; what no flag asks for is None."""
    noise = tiny_agent(cql_n_actions=3).draw(5)
    assert noise.normals.shape == noise.next_normals.shape == (1, 5, 1, ACT)
    assert noise.proposal_normals.shape == (1, 5, 2 * 3, ACT)
    assert noise.resampling_offset is None and noise.subset_keys is None
    noise = tiny_agent(cql_n_actions=3, cql_max_target_backup=True).draw(5)
    assert noise.next_normals.shape == (1, 5, 3, ACT)
    noise = tiny_agent(cql_n_actions=3, cql_states=2, cql_backward_actions=1).draw(5)
    assert noise.normals.shape == noise.next_normals.shape == (1, 5, 1, ACT)
    assert noise.proposal_normals.shape == (1, 2, 2 * 3, ACT)
    assert noise.uniforms.shape == (1, 2, 3, ACT)
    assert noise.resampling_offset.shape == (1, 2, 2)
    noise = tiny_agent(cql_backward_actions=1, n_critics=4, n_target_critics=4).draw(5)
    assert noise.resampling_offset.shape == (1, 4, 5)
    assert len(noise.resampling_offset.unique()) == 4 * 5  # each critic's its own
    assert noise.subset_keys.shape == (1, 4)


# ======================================================================================
# Units: the environment's at the boundary, [-1, 1] and standardized observations inside
# ======================================================================================


def test_environment_units_are_undone_at_the_boundary(double):
    """Fault 'random actions not rescaled with the policy's': training on raw actions in
    [-2, 6] and raw observations is training on both scaled by hand, whatever the
    proposals."""
    low, high = np.array([-2.0, 0.1]), np.array([6.0, 0.3])
    mean, std = np.array([5.0, -1.0, 0.0]), np.array([2.0, 0.1, 30.0])
    scaled, inside = transitions(64), tiny_agent()
    task = box_task(low, high)
    outside = cql.ContinuousCQL(tiny(), task, "cpu", (mean, std))
    for own, other in zip(outside.parameters(), inside.parameters()):
        own.data.copy_(other.data)
    raw = scaled._replace(
        observations=torch.as_tensor(mean + std * scaled.observations.numpy()),
        next_observations=torch.as_tensor(mean + std * scaled.next_observations.numpy()),
        actions=torch.as_tensor(low + (high - low) * (scaled.actions.numpy() + 1) / 2),
    )
    for agent, data in ((inside, scaled), (outside, raw)):
        train(agent, data, 10)
    assert_equal(trained(outside), trained(inside), rtol=1e-9, atol=1e-9)
    for noise in (None, torch.randn(1, 64, ACT)):
        actions = inside.act(scaled.observations, noise)
        expected = low + (high - low) * (actions + 1) / 2
        actual = outside.act(raw.observations, noise)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_actions_stay_within_bounds_when_saturated():
    """In float32 center + half the range passes these bounds by rounding; act clamps."""
    low, high = np.float32([-2.3, -1.0]), np.float32([0.1, 0.1])
    center = (high + low) / 2
    assert (center + (high - center) > high).all()
    agent = cql.ContinuousCQL(tiny(), box_task(low, high))
    for sign, bound in ((1, high), (-1, low)):
        agent.policy.layers[-1].bias.data.fill_(sign * 100.0)
        for noise in (None, torch.randn(1, 50, ACT)):
            actions = agent.act(np.zeros((50, OBS)), noise)
            assert actions.dtype == np.float32
            assert (actions >= low).all() and (actions <= high).all()
            np.testing.assert_allclose(actions, np.broadcast_to(bound, (50, ACT)), 1e-6)


def test_act_is_the_mode_or_follows_its_noise(double):
    """tanh(mean), or tanh(mean + std * normal) where normals are given."""
    agent, x = tiny_agent(seed=[0, 1]), torch.randn(2, 5, OBS)
    mean, log_std = agent.policy(x)
    normals = torch.randn(2, 5, ACT)
    np.testing.assert_allclose(agent.act(x), mean.tanh().detach())
    sampled = (mean + log_std.exp() * normals).tanh().detach()
    np.testing.assert_allclose(agent.act(x, normals), sampled)


# ======================================================================================
# State
# ======================================================================================


def saved(agent) -> dict:
    """The agent's state by way of a file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(agent) -> dict:
    """All tensors of the state by name, the optimizer's included."""
    flat, stack = {}, [("", agent.state_dict())]
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{prefix}/{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [(f"{prefix}/{i}", item) for i, item in enumerate(value)]
        else:
            flat[prefix] = torch.as_tensor(value).clone()
    return flat


def live_tensors(agent) -> list:
    """What a captured graph would hold on to."""
    found = list(agent.parameters())
    for state in agent.optimizer.state.values():
        found += state.values()
    return found


@pytest.mark.parametrize("bc_steps", [0, 7])
def test_a_loaded_agent_goes_on_as_if_nothing_had_happened(bc_steps):
    """Faults 'loading rebinds alpha and alpha', whose optimizers keep the old tensors',
    'no RNG state' and 'checkpoint without observation statistics': bit by bit the same
    trajectory, noise and alphas included."""
    flags = dict(
        seed=[0, 1], bc_steps=bc_steps, target_update_period=3, hidden_dim=8, **LAGRANGE
    )
    data, config = transitions(64), tiny(**flags)
    statistics = torch.full((OBS,), 0.3), torch.full((OBS,), 2.0)
    one = cql.ContinuousCQL(config, box_task([-2, 0], [6, 1]), "cpu", statistics)
    train(one, data, 5)
    state = saved(one)
    other = tiny_agent(**flags)
    train(other, data, 2)  # its optimizer and draws have a past of their own
    tensors = live_tensors(other)
    other.load_state_dict(state)
    assert other.updates == 5
    assert all(x is y for x, y in zip(live_tensors(other), tensors))
    assert_equal(everything(other), everything(one))
    before = trained(other)
    for agent in (one, other):
        train(agent, data, 5)
    assert_equal(everything(other), everything(one))
    for name, value in trained(other).items():
        if bc_steps == 0 or not name.startswith("critic."):
            assert (value != before[name]).any(), name
    for name in ("log_alpha", "log_alpha_prime"):  # both, in both runs
        assert (trained(other)[name] != before[name]).all(), name
    raw = np.ones((2, 4, OBS))  # observation statistics and bounds travel too
    np.testing.assert_array_equal(one.act(raw), other.act(raw))


def test_a_state_is_not_loaded_into_an_agent_that_trains_other_things():
    state = saved(tiny_agent())
    for flags in (LAGRANGE, dict(use_automatic_entropy_tuning=False)):
        with pytest.raises(ValueError, match="optimizer"):
            tiny_agent(**flags).load_state_dict(state)
    for flags in (dict(hidden_dim=7), dict(seed=[0, 1]), dict(n_critics=3)):
        with pytest.raises(RuntimeError, match="size"):
            tiny_agent(**flags).load_state_dict(state)


def test_counting_from_nought_is_a_fresh_run_of_the_same_weights():
    """As load_model has it: nothing but `updates` says where a run stands."""
    flags = dict(seed=[3, 4], bc_steps=2, target_update_period=2)
    agent, fresh = tiny_agent(**flags), tiny_agent(**flags)
    train(agent, transitions(64), 3)
    agent.updates = 0
    assert_equal(agent.draw(5)._asdict(), fresh.draw(5)._asdict())
    assert agent.stage() == fresh.stage() == (True, False)


# ======================================================================================
# Initialization
# ======================================================================================

SHAPES = dict(hidden_dim=24, seed=[0, 1], n_critics=3, policy_log_std_multiplier=0.7)


def gram(weight):
    """W^T W or W W^T, whichever is the smaller: [..., n, n]."""
    tall = weight.shape[-2] >= weight.shape[-1]
    return weight.mT @ weight if tall else weight @ weight.mT


def assert_torch_default(layer):
    """nn.Linear's rule: uniform within 1 / sqrt(fan-in), weights and biases."""
    bound = layer.weight.shape[-2] ** -0.5
    for tensor in (layer.weight, layer.bias):
        values = tensor.detach().flatten() / bound
        assert values.abs().max() <= 1 and values.abs().max() > 0.9
        assert values.std().item() == pytest.approx(3**-0.5, rel=0.15)


def assert_small_last(layer):
    """Xavier-uniform with gain 1e-2, bias 0."""
    bound = 1e-2 * math.sqrt(6 / sum(layer.weight.shape[-2:]))
    values = layer.weight.detach().flatten() / bound
    assert values.abs().max() <= 1 + 1e-6 and values.abs().max() > 0.9
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("orthogonal_init", [True, False])
def test_initialization_follows_corl(orthogonal_init):
    """Critics orthogonal when the flag says so (hidden gain sqrt 2, last 1e-2, biases
    0); the policy never; targets equal critics; no two members of an ensemble alike."""
    config = tiny(orthogonal_init=orthogonal_init, **SHAPES)
    agent = cql.ContinuousCQL(config, box_task())
    *hidden, last = agent.critic.layers
    for layer in agent.critic.layers if orthogonal_init else ():
        gain = 1e-2 if layer is last else math.sqrt(2)
        product = gram(layer.weight.detach())
        expected = gain**2 * torch.eye(product.shape[-1]).expand_as(product)
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-5 * gain**2)
        assert (layer.bias == 0).all()
    if not orthogonal_init:
        for layer in hidden:
            assert_torch_default(layer)
        assert_small_last(last)
    *policy_hidden, policy_last = agent.policy.layers
    assert len(policy_hidden) == 3
    for layer in policy_hidden:
        assert_torch_default(layer)
    assert_small_last(policy_last)
    assert_equal(agent.target_critic.state_dict(), agent.critic.state_dict())
    assert (agent.policy.log_std_multiplier == 0.7).all()
    assert (agent.policy.log_std_offset == -1.0).all()
    assert (agent.log_alpha == 0).all() and (agent.log_alpha_prime == 1).all()
    for layer in (*hidden, *policy_hidden, last, policy_last):
        flat = layer.weight.detach().reshape(-1, math.prod(layer.weight.shape[-2:]))
        assert torch.pdist(flat).min() > 0


def test_targets_are_a_copy():
    """The targets do not follow the critics but through the soft update."""
    agent = tiny_agent(soft_target_update_rate=0.0)
    before = trained(agent)
    train(agent, transitions(64), 3)
    for name, value in trained(agent).items():
        if "critic" in name:
            assert torch.equal(value, before[name]) == name.startswith("target"), name


# ======================================================================================
# On the device, without waiting for it
# ======================================================================================


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.NAMES):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def no_way_to_the_host(monkeypatch):
    """Within, no tensor can be read by Python: on the CPU some ways run no operation."""

    def refuse(*_):
        raise AssertionError("a tensor crossed to the host")

    ways = "item tolist numpy cpu __bool__ __float__ __int__ __index__".split()
    with monkeypatch.context() as patch:
        for name in ways:
            patch.setattr(torch.Tensor, name, refuse)
        yield


@pytest.mark.parametrize(
    "flags",
    [
        dict(LAGRANGE, cql_clip_diff_max=5.0),
        dict(bc_steps=1, cql_max_target_backup=True, backup_entropy=True),
        dict(use_automatic_entropy_tuning=False, cql_importance_sample=False),
        dict(cql_backward_actions=2, precision="bf16", cal_ql=True),
        dict(cal_ql=True, n_critics=3, n_target_critics=2),
    ],
    ids=["lagrange", "cloning_max_backup", "fixed_alpha", "sampled", "redq"],
)
def test_update_never_waits_for_the_device(flags, monkeypatch):
    agent, data = tiny_agent(seed=[0, 1], **flags), transitions(64)
    with Waits() as waits, no_way_to_the_host(monkeypatch):
        train(agent, data, 3)
    assert waits.seen == []
    with Waits() as waits:  # the watch itself is awake
        agent.log_alpha[0].item()
    assert len(waits.seen) == 1
    with pytest.raises(AssertionError), no_way_to_the_host(monkeypatch):
        agent.log_alpha.tolist()


SAMPLED = dict(cql_backward_actions=2)


@NEEDS_GPU
@pytest.mark.parametrize("flags", [LAGRANGE, dict(bc_steps=1), SAMPLED], ids=str)
def test_update_on_a_gpu_never_waits_and_equals_the_cpu(flags):
    """CUDA's own watch for synchronization; the same noise on both."""
    config, data = tiny(seed=[0, 1], **flags), transitions(64)
    agents = [cql.ContinuousCQL(config, box_task(), name) for name in ("cpu", "cuda")]
    noise = agents[0].draw(8)
    batch = rows(data, noise.fractions)
    agents[1].load_state_dict(saved(agents[0]))
    for agent in agents:
        its_batch = mapped(lambda x, agent=agent: x.to(agent.device), batch)
        its_noise = mapped(lambda x, agent=agent: x.to(agent.device), noise)
        agent.update(its_batch, its_noise)
        try:
            torch.cuda.set_sync_debug_mode("error")
            agent.update(its_batch, its_noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    on_gpu = {name: value.cpu() for name, value in trained(agents[1]).items()}
    assert_equal(on_gpu, trained(agents[0]), rtol=1e-3, atol=1e-4)


# ======================================================================================
# As a library
# ======================================================================================


def test_update_takes_arrays_of_one_run():
    """numpy arrays [B, ...] in float64, terminations of booleans: taken as R = 1."""
    batch, agents = transitions(1, 6), [tiny_agent(), tiny_agent()]
    arrays = mapped(lambda array: array[0].double().numpy(), batch)
    arrays = arrays._replace(terminations=arrays.terminations.astype(bool))
    noise = agents[0].draw(6)
    metrics = [agent.update(b, noise) for agent, b in zip(agents, (batch, arrays))]
    assert_equal(metrics[1], metrics[0])
    assert_equal(trained(agents[1]), trained(agents[0]))
    assert all(value.dtype == torch.float32 for value in trained(agents[1]).values())


def test_update_is_a_function_of_batch_and_noise():
    """Without noise, the agent takes what it draws for that update."""
    agents, batch = [tiny_agent(), tiny_agent()], transitions(1, 6)
    for _ in range(2):
        agents[0].update(batch)
        agents[1].update(batch, agents[1].draw(6))
        assert_equal(trained(agents[1]), trained(agents[0]))
    agents[0].update(batch, agents[0].draw(6))
    agents[1].update(batch, tiny_agent(seed=9).draw(6))
    name = "critic.layers.0.weight"
    assert not torch.equal(trained(agents[1])[name], trained(agents[0])[name])


def test_update_leaves_its_inputs_alone():
    agent, batch = tiny_agent(), transitions(1, 6)
    noise = agent.draw(6)
    copies = mapped(torch.clone, batch), mapped(torch.clone, noise)
    agent.update(batch, noise)
    assert_equal(batch._asdict(), copies[0]._asdict())
    assert_equal(noise._asdict(), copies[1]._asdict())


def test_act_takes_observations_of_any_leading_shape():
    """[O], [n, O] and [R, n, O]; each run has its own policy."""
    one, three = tiny_agent(), tiny_agent(seed=[0, 1, 2])
    x = np.random.default_rng(0).normal(size=(3, 5, OBS))
    assert one.act(x[0, 0]).shape == (ACT,)
    assert one.act(x[0]).shape == (5, ACT) and one.act(x[0, :0]).shape == (0, ACT)
    assert one.act(x[:1]).shape == (1, 5, ACT)
    np.testing.assert_allclose(one.act(x[0])[2], one.act(x[0, 2]), rtol=1e-5)
    actions = three.act(x)
    assert actions.shape == (3, 5, ACT)
    same = three.act(np.tile(x[:1], (3, 1, 1)))
    np.testing.assert_allclose(same[0], actions[0], rtol=1e-5)
    assert (same[1] != actions[0]).all() and (same[2] != same[1]).all()
    for wrong in (x[0], x[:2], x[..., 1:], x[:, :, :, None]):
        with pytest.raises(ValueError, match=r"3 runs of \(3,\)"):
            three.act(wrong)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_is_its_own(compiled, monkeypatch):
    """Neither a deep copy nor a pickled one learns from the other's weights."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    agent = tiny_agent(compile=compiled)
    for other in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        before, own = trained(agent), trained(other)
        other.update(transitions(1, 4))
        assert_equal(trained(agent), before)
        name = "critic.layers.0.weight"
        assert not torch.equal(trained(other)[name], own[name])


def test_shapes_of_other_runs_are_refused():
    """Never a silent answer: rows of [n, O] are not dealt out to three runs, and a batch
    of one run is not trained on by two, nor one of three by one."""
    three, one = tiny_agent(seed=[0, 1, 2]), tiny_agent()
    for shape in ((OBS,), (6, OBS), (2, 6, OBS)):
        with pytest.raises(ValueError):
            three.act(np.zeros(shape))
    for agent, lead in ((three, (6,)), (three, (1, 6)), (one, (3, 6))):
        for noise in (None, three.draw(6), one.draw(6)):
            with pytest.raises(ValueError):
                agent.update(transitions(*lead), noise)


def test_a_column_of_rewards_is_refused():
    """Fault 'a (B) - (B, 1) broadcast': replay buffers that keep rewards as [B, 1]. One
    critic is the shape where it would pass unnoticed."""
    agent, batch = tiny_agent(n_critics=1), transitions(6)
    rewards, terminations = batch.rewards[:, None], batch.terminations[:, None]
    for columns in (
        dict(rewards=rewards),
        dict(terminations=terminations),
        dict(rewards=rewards, terminations=terminations),
    ):
        with pytest.raises(ValueError):
            agent.update(batch._replace(**columns))


def test_cal_ql_needs_returns_to_go():
    """Never plain CQL in silence."""
    agent, batch = tiny_agent(cal_ql=True), transitions(1, 6)
    agent.update(batch)
    with pytest.raises(ValueError, match="mc_returns"):
        agent.update(batch._replace(mc_returns=None))
    tiny_agent().update(batch._replace(mc_returns=None))
