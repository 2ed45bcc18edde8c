"""The agent: its step, stacked runs, state, initialization, use as a library, and the
networks and buffers that a fork adds."""

import copy
import io
import itertools
import math
import pickle
from contextlib import contextmanager
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from reference import (
    ACT,
    OBS,
    answers,
    assert_close,
    box_task,
    in_float64,
    losses_of,
    mapped,
    rows,
    scrambled,
    tiny,
    tiny_agent,
    train,
    trained,
    transitions,
)
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import cql

double = pytest.fixture(in_float64)
FAST_BF16 = cql.fast_bf16
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAGRANGE = dict(cql_lagrange=True, cql_target_action_gap=3.0, cql_alpha=0.7)


def assert_equal(actual: dict, expected: dict):
    """Compare two dictionaries of tensors bit by bit."""
    assert_close(actual, expected, rtol=0, atol=0)


def update(agent, batch, noise, number=0):
    """The agent's update of this number, on a batch and noise."""
    return agent.update(batch, noise, *cql.stage_of(agent.config, number))


# ======================================================================================
# One step
# ======================================================================================


def test_update_is_adam_on_gradients_from_before_the_step(double):
    """All losses see the parameters from before the step, each group has its learning
    rate, and the bias-corrected moments are Adam's. After the step the targets move: in
    every second update here, by Polyak averaging, and not in between."""
    rates = {"policy": 3e-2, "log_alpha": 3e-2, "critic": 1e-2, "log_alpha_prime": 1e-2}
    agent = tiny_agent(
        policy_lr=3e-2, qf_lr=1e-2, bc_steps=1, target_update_period=2,
        soft_target_update_rate=0.1, **LAGRANGE,
    )  # fmt: skip
    names = [name for name, p in agent.named_parameters() if p.requires_grad]
    expected, moments = trained(agent), {name: (0.0, 0.0) for name in names}
    for t in range(1, 5):
        batch, noise = transitions(1, 4, seed=t), agent.draw(t - 1, 4)
        losses, _ = losses_of(agent, batch, noise, cloning=t == 1)
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
        update(agent, batch, noise, t - 1)
        assert_close(trained(agent), expected, rtol=1e-9, atol=1e-12)


def test_metrics_are_detached_and_from_before_the_step(double):
    agent = tiny_agent(**LAGRANGE)
    batch, noise = transitions(1, 4), agent.draw(0, 4)
    _, before = losses_of(agent, batch, noise)
    metrics = agent.update(batch, noise)
    assert not any(value.requires_grad for value in metrics.values())
    assert_equal(metrics, {name: value.detach() for name, value in before.items()})


def test_stages_follow_the_number_of_the_update():
    """The first bc_steps updates clone; every target_update_period-th moves targets."""
    config = tiny(bc_steps=2, target_update_period=3)
    cloning, moving = zip(*[cql.stage_of(config, update) for update in range(7)])
    assert cloning == (True, True, False, False, False, False, False)
    assert moving == (False, False, True, False, False, True, False)
    assert cql.stage_of(tiny(), 0) == (False, True)


def test_cloning_ends_after_bc_steps():
    """The policy's loss is that of behavior cloning for exactly bc_steps updates."""
    agent = tiny_agent(bc_steps=2)
    batch, noise, cloned = transitions(1, 4), agent.draw(0, 4), []
    one_batch, one_noise = (mapped(lambda x: x[0], x) for x in (batch, noise))
    for number in range(4):
        policy = mapped(lambda x: x[0], agent.weights["policy"])
        samples = agent.sample(policy, one_batch, one_noise)
        outputs = samples["mean"], samples["log_std"]
        worth = cql.data_log_prob(*outputs, one_batch["actions"])
        alpha = agent.log_alpha.detach().exp()
        wanted = (alpha * samples["log_pi"] - worth).mean().item()
        loss = update(agent, batch, noise, number)["policy_loss"].item()
        cloned.append(loss == pytest.approx(wanted, rel=1e-5))
    assert cloned == [True, True, False, False]


def test_behavior_cloning_clones():
    """Fault 'log_prob(s, a) ignores a': after the warm-up the policy's actions are the
    data's, a function of the state that it cannot guess."""
    config = tiny(bc_steps=10**6, hidden_dim=16, policy_lr=1e-2, alpha_multiplier=0.01)
    agent, data = cql.ContinuousCQL(config, box_task()), transitions(256)
    data["actions"] = (data["observations"][:, :ACT] * 2).tanh() * 0.9

    def error():
        actions = agent.act(data["observations"])
        return np.abs(actions - data["actions"].numpy()).mean()

    before = error()
    train(agent, data, 250, batch_size=32)
    assert error() < 0.15 < 0.5 < before


def test_multiplier_grows_above_its_target_and_shrinks_below():
    """Fault 'Lagrange multiplier with the wrong sign', with targets out of reach."""
    agent = tiny_agent(cql_lagrange=True, cql_target_action_gap=[-100.0, 100.0])
    before = agent.log_alpha_prime.detach().clone()
    metrics = train(agent, transitions(64), 5)
    assert (metrics["cql_qf{j}_diff"].abs() < 100).all()
    moved = (agent.log_alpha_prime - before).tolist()
    assert moved[0] > 0.02 and moved[1] < -0.02


def test_multiplier_stops_at_a_million():
    """There its gradient is zero, so that it stays."""
    agent = tiny_agent(**LAGRANGE)
    agent.log_alpha_prime.data.fill_(20.0)
    metrics = update(agent, transitions(1, 4), agent.draw(0, 4))
    assert metrics["alpha_prime"].item() == 1e6
    excess = metrics["cql_qf{j}_diff"] - LAGRANGE["cql_target_action_gap"]
    penalty = 1e6 * LAGRANGE["cql_alpha"] * excess
    torch.testing.assert_close(metrics["cql_min_qf{j}_loss"], penalty)
    assert agent.log_alpha_prime.item() == 20.0


def test_temperature_moves_entropy_to_its_target():
    """alpha grows while the entropy is below -A and shrinks while it is above -A."""
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
# Stacked runs
# ======================================================================================

WEIGHTS = dict(cql_alpha=[0.5, 5.0], cql_temp=[0.5, 2.0])
PRODUCT = dict(seed=[0, 1], cql_target_action_gap=[1.0, 6.0], **WEIGHTS)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-9)])
def test_stacked_runs_equal_solo_runs(dtype, tolerance, k, request):
    """A run among sixteen and the same run alone have the same parameters after 100
    updates. Nothing of a run reaches another, not even through an optimizer."""
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
        assert_close(trained(solo), own, rtol=0, atol=tolerance)
    # The comparison says something only if the runs differ by more than the tolerance.
    flat = [value.reshape(16, -1) for value in trained(stacked).values()]
    distances = torch.nn.functional.pdist(torch.cat(flat, 1), p=math.inf)
    assert distances.min() > 5 * tolerance


def test_noise_and_initialization_depend_on_the_seed_alone():
    """Neither depends on the other runs, their order, or the penalty."""
    flags = dict(cql_backward_actions=1, n_critics=3, n_target_critics=2)
    agents = []
    for seeds, alphas in (([7, 8], 1.0), ([8, 3, 7], 9.0), (7, [1.0, 5.0])):
        config = tiny(seed=seeds, cql_alpha=alphas, **flags)
        agents.append(cql.ContinuousCQL(config, box_task()))
    drawn = [agent.draw(0, 5) for agent in agents]
    initial = [trained(agent) for agent in agents]
    for a, r, seed in ((0, 0, 7), (1, 2, 7), (2, 0, 7), (2, 1, 7), (0, 1, 8), (1, 0, 8)):
        assert drawn[a].keys() == drawn[0].keys()
        for name, first in drawn[0].items():
            assert torch.equal(drawn[a][name][r], first[seed - 7])
        for name, first in initial[0].items():
            assert torch.equal(initial[a][name][r], first[seed - 7])
    for values in drawn[0].values():
        assert not torch.isclose(values[0], values[1]).any()
    for layer in linear_layers(agents[0].policy, agents[0].critic):
        assert not torch.equal(layer.weight[0], layer.weight[1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_noise_is_a_function_of_the_number_of_the_update(device):
    """Fault 'no RNG state': none is needed. The noise of update n does not depend on
    earlier draws, and no two updates share it, not even in a GPU's blocks."""
    config = tiny(seed=[3, 4], cql_backward_actions=1, n_critics=3, n_target_critics=2)
    one, other = (cql.ContinuousCQL(config, box_task(), device) for _ in range(2))
    numbers, draws = [0, 1, 2, 31, 32, 65], []
    for number in numbers:
        draws.append(one.draw(number, 5))
    torch.rand(3)
    state = torch.get_rng_state()
    for number, first in reversed(list(zip(numbers, draws))):
        assert other.draw(number, 3)["fractions"].shape == (2, 3)  # another batch size
        assert_equal(other.draw(number, 5), first)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own is not touched
    for first, second in itertools.combinations(draws, 2):
        for name, values in first.items():
            assert not torch.isclose(values, second[name]).any()


def test_construction_leaves_torchs_generator_alone():
    """Initial weights come from a forked generator, whose state is restored."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = trained(cql.ContinuousCQL(tiny(seed=[0, 1]), box_task()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = trained(cql.ContinuousCQL(tiny(seed=[0, 1]), box_task()))
    assert_equal(second, first)


def test_no_two_draws_share_a_seed():
    """Every stream, run and counter has its own seed; initialization has no counter."""
    streams = [cql.UPDATE, cql.EXPLORE, cql.RESET, cql.EVALUATE]
    numbers = [[cql.INIT, seed] for seed in range(20)]
    numbers += map(list, itertools.product(streams, range(20), range(20)))
    assert len(set(map(cql.seed_from, numbers))) == len(numbers) == 20 + 4 * 400


def test_uniform_actions_fill_the_box():
    """Fault 'random actions uniform in the wrong range ([0,1], or a single point)':
    every dimension of every action is distributed uniformly on [-1, 1]."""
    agent = tiny_agent(cql_n_actions=3)
    noise = agent.draw(0, 4000)
    uniforms = noise["uniforms"].flatten(2)[0]  # [B, K * A]
    assert uniforms.shape == (4000, 6)
    ideal = torch.linspace(-1, 1, 4000).unsqueeze(1)
    assert (uniforms.sort(0).values - ideal).abs().max() < 0.1  # Kolmogorov-Smirnov
    assert (torch.corrcoef(uniforms.T) - torch.eye(6)).abs().max() < 0.08
    names = "normals", "next_normals", "proposal_normals"
    normals = torch.cat([noise[name] for name in names], 2).flatten(2)[0]
    assert normals.shape == (4000, 2 * (3 + 1) * ACT)
    assert (torch.cov(normals.T) - torch.eye(16)).abs().max() < 0.1
    assert normals.mean(0).abs().max() < 0.08


def test_indices_are_uniform_over_the_data():
    """Each transition is drawn equally often, the first and the last one included."""
    fractions = tiny_agent(seed=[0, 1]).draw(0, 7000)["fractions"]
    assert fractions.dtype == torch.float64
    assert 0 <= fractions.min() < fractions.max() < 1
    counts = (7 * fractions).long()
    assert counts.shape == (2, 7000)
    for run in counts:
        assert ((run.bincount() - 1000).abs() < 150).all() and len(run.bincount()) == 7


def test_noise_holds_what_is_used():
    """The maximum backup has normals for K actions; what no flag asks for is absent."""

    def shapes(**flags):
        noise = tiny_agent(**flags).draw(0, 5)
        assert all(len(values) == 1 for values in noise.values())
        return {name: tuple(values.shape[1:]) for name, values in noise.items()}

    plain = {
        "fractions": (5,),
        "normals": (5, 1, ACT),
        "next_normals": (5, 1, ACT),
        "proposal_normals": (5, 2 * 3, ACT),
        "uniforms": (5, 3, ACT),
    }
    assert shapes(cql_n_actions=3) == plain
    found = shapes(cql_n_actions=3, cql_max_target_backup=True)
    assert found == {**plain, "next_normals": (5, 3, ACT)}
    found = shapes(cql_n_actions=3, cql_states=2, cql_backward_actions=1)
    assert found == {
        **plain,
        "proposal_normals": (2, 2 * 3, ACT),
        "uniforms": (2, 3, ACT),
        "resampling_offset": (2, 2),
    }
    flags = dict(cql_backward_actions=1, n_critics=4, n_target_critics=4)
    found = shapes(cql_n_actions=3, **flags)
    assert found == {**plain, "resampling_offset": (4, 5), "subset_keys": (4,)}
    offsets = tiny_agent(**flags).draw(0, 5)["resampling_offset"]
    assert len(offsets.unique()) == 4 * 5  # each critic's its own


# ======================================================================================
# Units: the environment's at the boundary, [-1, 1] and standardized observations inside
# ======================================================================================


def test_environment_units_are_undone_at_the_boundary(double):
    """Fault 'random actions not rescaled with the policy's': training on raw actions in
    [-2, 6] and raw observations equals training on both scaled by hand."""
    low, high = np.array([-2.0, 0.1]), np.array([6.0, 0.3])
    mean, std = np.array([5.0, -1.0, 0.0]), np.array([2.0, 0.1, 30.0])
    scaled, inside = transitions(64), tiny_agent()
    task = box_task(low, high)
    outside = cql.ContinuousCQL(tiny(), task, "cpu", (mean, std))
    for own, other in zip(outside.parameters(), inside.parameters()):
        own.data.copy_(other.data)
    raw = dict(scaled)
    for name in ("observations", "next_observations"):
        raw[name] = torch.as_tensor(mean + std * scaled[name].numpy())
    actions = low + (high - low) * (scaled["actions"].numpy() + 1) / 2
    raw["actions"] = torch.as_tensor(actions)
    for agent, data in ((inside, scaled), (outside, raw)):
        train(agent, data, 10)
    assert_close(trained(outside), trained(inside), rtol=1e-9, atol=1e-9)
    for noise in (None, torch.randn(1, 64, ACT)):
        actions = inside.act(scaled["observations"], noise)
        expected = low + (high - low) * (actions + 1) / 2
        actual = outside.act(raw["observations"], noise)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)
    q = inside.q(scaled["observations"], scaled["actions"])
    torch.testing.assert_close(outside.q(raw["observations"], raw["actions"]), q)


def test_actions_stay_within_bounds_when_saturated():
    """In float32 center + half the range exceeds these bounds by rounding; act clips."""
    low, high = np.float32([-2.3, -1.0]), np.float32([0.1, 0.1])
    center = (high + low) / 2
    assert (center + (high - center) > high).all()
    agent = cql.ContinuousCQL(tiny(), box_task(low, high))
    for sign, bound in ((1, high), (-1, low)):
        agent.policy.net[-1].bias.data.fill_(sign * 100.0)
        for noise in (None, torch.randn(1, 50, ACT)):
            actions = agent.act(np.zeros((50, OBS)), noise)
            assert actions.dtype == np.float32
            assert (actions >= low).all() and (actions <= high).all()
            np.testing.assert_allclose(actions, np.broadcast_to(bound, (50, ACT)), 1e-6)


def test_act_is_the_mode_or_follows_its_noise(double):
    """act gives tanh(mean), or tanh(mean + std * normal) where normals are given."""
    agent, x = tiny_agent(seed=[0, 1]), torch.randn(2, 5, OBS)
    policy = partial(cql.call, agent.policy)
    mean, log_std = agent.layout(policy, agent.weights["policy"], x)
    normals = torch.randn(2, 5, ACT)
    np.testing.assert_allclose(agent.act(x), mean.tanh().detach())
    sampled = (mean + log_std.exp() * normals).tanh().detach()
    np.testing.assert_allclose(agent.act(x, normals), sampled)


# ======================================================================================
# State
# ======================================================================================


def saved(agent) -> dict:
    """The agent's state after a way through a file, as a checkpoint has it."""
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(agent) -> dict:
    """All tensors of the state by name, including the optimizer's."""
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
    """The tensors that a captured graph would hold on to."""
    found = list(agent.parameters())
    for state in agent.optimizer.state.values():
        found += state.values()
    return found


@pytest.mark.parametrize("bc_steps", [0, 7])
def test_a_loaded_agent_goes_on_as_if_nothing_had_happened(bc_steps):
    """Faults 'loading rebinds alpha and alpha', whose optimizers keep the old tensors',
    'no RNG state' and 'checkpoint without observation statistics': the trajectory is the
    same bit by bit, noise and alphas included."""
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
    assert all(x is y for x, y in zip(live_tensors(other), tensors))
    assert_equal(everything(other), everything(one))
    before = trained(other)
    for agent in (one, other):
        train(agent, data, 5, first=5)
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


def test_weights_and_run_tensors_are_the_live_tensors():
    """They hold every parameter and buffer but those of units, each leading with R."""
    agent = tiny_agent(seed=[0, 1, 2])
    tensors = agent.run_tensors()
    live = {**dict(agent.named_parameters()), **dict(agent.named_buffers())}
    left_out = {name for name in live if name.startswith("units.")}
    assert tensors.keys() == live.keys() - left_out and len(left_out) == 5
    assert tensors.keys() < agent.state_dict().keys()
    for name, tensor in tensors.items():
        assert tensor is live[name] and len(tensor) == 3
        network, _, rest = name.partition(".")
        found = agent.weights[network]
        assert (found[rest] if rest else found) is tensor
    agent.load_state_dict(saved(tiny_agent(seed=[3, 4, 5])))
    assert all(agent.run_tensors()[name] is x for name, x in tensors.items())


# ======================================================================================
# Initialization
# ======================================================================================

SHAPES = dict(hidden_dim=24, seed=[0, 1], n_critics=3, policy_log_std_multiplier=0.7)


def linear_layers(*networks) -> list:
    """The linear layers of networks, in order."""
    layers = [layer for network in networks for layer in network.net]
    return [layer for layer in layers if isinstance(layer, torch.nn.Linear)]


def gram(weight):
    """The smaller one of W^T W and W W^T, [..., n, n]."""
    tall = weight.shape[-2] >= weight.shape[-1]
    return weight.mT @ weight if tall else weight @ weight.mT


def assert_torch_default(layer):
    """Check nn.Linear's rule: weights and biases uniform within 1 / sqrt(fan-in)."""
    bound = layer.weight.shape[-1] ** -0.5
    for tensor in (layer.weight, layer.bias):
        values = tensor.detach().flatten() / bound
        assert values.abs().max() <= 1 and values.abs().max() > 0.9
        assert values.std().item() == pytest.approx(3**-0.5, rel=0.15)


def assert_small_last(layer):
    """Check a last layer: Xavier-uniform weights of gain 1e-2, bias 0."""
    bound = 1e-2 * math.sqrt(6 / sum(layer.weight.shape[-2:]))
    values = layer.weight.detach().flatten() / bound
    assert values.abs().max() <= 1 + 1e-6 and values.abs().max() > 0.9
    assert (layer.bias == 0).all()


@pytest.mark.parametrize("orthogonal_init", [True, False])
def test_initialization_follows_corl(orthogonal_init):
    """Critics are orthogonal if the flag says so (hidden gain sqrt 2, last 1e-2, biases
    0), the policy never. Targets equal critics. No two members are alike."""
    config = tiny(orthogonal_init=orthogonal_init, **SHAPES)
    agent = cql.ContinuousCQL(config, box_task())
    *hidden, last = linear_layers(agent.critic)
    for layer in linear_layers(agent.critic) if orthogonal_init else ():
        gain = 1e-2 if layer is last else math.sqrt(2)
        product = gram(layer.weight.detach())
        expected = gain**2 * torch.eye(product.shape[-1]).expand_as(product)
        torch.testing.assert_close(product, expected, rtol=0, atol=1e-5 * gain**2)
        assert (layer.bias == 0).all()
    if not orthogonal_init:
        for layer in hidden:
            assert_torch_default(layer)
        assert_small_last(last)
    *policy_hidden, policy_last = linear_layers(agent.policy)
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
    """The targets follow the critics through Polyak averaging only."""
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
    """A record of the operations that make the host wait for the device."""

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
    """Forbid Python to read a tensor; on the CPU some ways to do so run no operation."""

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
        dict(n_steps=3, policy_average_rate=0.1, bc_weight=0.4),
    ],
    ids=["lagrange", "cloning_max_backup", "fixed_alpha", "sampled", "redq", "average"],
)
@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_update_never_waits_for_the_device(flags, seed, monkeypatch):
    agent, data = tiny_agent(seed=seed, **flags), transitions(64)
    with Waits() as waits, no_way_to_the_host(monkeypatch):
        train(agent, data, 3)
    assert waits.seen == []
    with Waits() as waits:  # these checks themselves work
        agent.log_alpha[0].item()
    assert len(waits.seen) == 1
    with pytest.raises(AssertionError), no_way_to_the_host(monkeypatch):
        agent.log_alpha.tolist()


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_the_average_policy_acts(seed):
    """Compared with the average of the policies after each update: at first their mean,
    later an exponential one. The policy itself trains as without an average."""
    agent = tiny_agent(seed=seed, policy_average_rate=0.2)
    plain = tiny_agent(seed=seed)
    data = transitions(64)
    average = [torch.zeros_like(x) for x in agent.policy.parameters()]
    for update in range(8):
        for each in (agent, plain):
            noise = each.draw(update, 4)
            each.update(rows(data, noise["fractions"]), noise)
        rate = max(1 / (update + 1), 0.2)
        policy = list(agent.policy.parameters())
        for x, own, of_plain in zip(average, policy, plain.policy.parameters()):
            x.copy_((1 - rate) * x + rate * own.detach())
            assert torch.equal(own, of_plain)
        for x, found in zip(average, agent.average_policy.parameters(), strict=True):
            torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)
    observations = torch.randn(len(agent.runs), 5, OBS)
    for normals in (None, torch.randn(len(agent.runs), 5, ACT)):
        acts = agent.act(observations, normals)
        with torch.no_grad():
            for own, x in zip(plain.policy.parameters(), average):
                own.copy_(x)
        expected = plain.act(observations, normals)
        np.testing.assert_allclose(acts, expected, rtol=1e-4, atol=1e-5)


SAMPLED = dict(cql_backward_actions=2)


@NEEDS_GPU
@pytest.mark.parametrize("flags", [LAGRANGE, dict(bc_steps=1), SAMPLED], ids=str)
def test_update_on_a_gpu_never_waits_and_equals_the_cpu(flags):
    """CUDA itself reports a synchronization. Both devices get the same noise."""
    config, data = tiny(seed=[0, 1], **flags), transitions(64)
    agents = [cql.ContinuousCQL(config, box_task(), name) for name in ("cpu", "cuda")]
    noise = agents[0].draw(0, 8)
    batch = rows(data, noise["fractions"])
    agents[1].load_state_dict(saved(agents[0]))
    for agent in agents:
        its_batch = mapped(lambda x, agent=agent: x.to(agent.device), batch)
        its_noise = mapped(lambda x, agent=agent: x.to(agent.device), noise)
        update(agent, its_batch, its_noise)
        try:
            torch.cuda.set_sync_debug_mode("error")
            update(agent, its_batch, its_noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    on_gpu = {name: value.cpu() for name, value in trained(agents[1]).items()}
    assert_close(on_gpu, trained(agents[0]), rtol=1e-3, atol=1e-4)


# ======================================================================================
# As a library
# ======================================================================================


def test_update_takes_arrays_of_one_run():
    """NumPy arrays [B, ...], float64 and boolean ones, are those of a single run."""
    batch, agents = transitions(1, 6), [tiny_agent(), tiny_agent()]
    arrays = mapped(lambda array: array[0].double().numpy(), batch)
    arrays["terminations"] = arrays["terminations"].astype(bool)
    noise = agents[0].draw(0, 6)
    metrics = [update(agent, b, noise) for agent, b in zip(agents, (batch, arrays))]
    assert_equal(metrics[1], metrics[0])
    assert_equal(trained(agents[1]), trained(agents[0]))
    assert all(value.dtype == torch.float32 for value in trained(agents[1]).values())


def test_update_is_a_function_of_batch_and_noise():
    """Two agents with the same inputs stay equal; other noise gives other weights."""
    agents, batch = [tiny_agent(), tiny_agent()], transitions(1, 6)
    for number in range(2):
        for agent in agents:
            agent.update(batch, agent.draw(number, 6))
        assert_equal(trained(agents[1]), trained(agents[0]))
    agents[0].update(batch, agents[0].draw(2, 6))
    agents[1].update(batch, tiny_agent(seed=9).draw(2, 6))
    name = "critic.net.0.weight"
    assert not torch.equal(trained(agents[1])[name], trained(agents[0])[name])


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_update_leaves_its_inputs_alone(seed):
    agent = tiny_agent(seed=seed, cql_backward_actions=1, cal_ql=True)
    batch, noise = transitions(len(agent.runs), 6), agent.draw(0, 6)
    copies = mapped(torch.clone, batch), mapped(torch.clone, noise)
    agent.update(batch, noise)
    assert_equal(batch, copies[0])
    assert_equal(noise, copies[1])


def test_act_takes_observations_of_any_leading_shape():
    """act takes [O], [n, O] and [R, n, O]; each run has its own policy."""
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
    """Neither a deep copy nor a pickled copy shares weights with the agent."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    agent = tiny_agent(compile=compiled)
    x = torch.randn(4, OBS)
    acted = agent.act(x)
    for other in (copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))):
        before, own = trained(agent), trained(other)
        assert (other.act(x) == acted).all()
        update(other, transitions(1, 4), other.draw(0, 4))
        assert_equal(trained(agent), before)
        name = "critic.net.0.weight"
        assert not torch.equal(trained(other)[name], own[name])
        assert (agent.act(x) == acted).all() and (other.act(x) != acted).any()


def test_shapes_of_other_runs_are_refused():
    """Other shapes raise an error, never give a silent answer: rows of [n, O] are not
    dealt out to three runs, and two runs do not train on a batch of one run, nor one run
    on a batch or noise of three."""
    three, one = tiny_agent(seed=[0, 1, 2]), tiny_agent()
    for shape in ((OBS,), (6, OBS), (2, 6, OBS)):
        with pytest.raises(ValueError):
            three.act(np.zeros(shape))
    for agent, lead in ((three, (6,)), (three, (1, 6)), (one, (3, 6))):
        for noise in (three.draw(0, 6), one.draw(0, 6)):
            with pytest.raises(ValueError):
                agent.update(transitions(*lead), noise)
    for agent, lead, other in ((three, (3, 6), one), (one, (1, 6), three)):
        with pytest.raises((ValueError, RuntimeError)):
            agent.update(transitions(*lead), other.draw(0, 6))
        with pytest.raises((ValueError, RuntimeError)):
            agent.update(transitions(*lead), agent.draw(0, 5))
        with pytest.raises((ValueError, RuntimeError)):
            agent.q(torch.zeros(4 - lead[0], 6, OBS), torch.zeros(4 - lead[0], 6, ACT))


def test_a_column_of_rewards_is_refused():
    """Fault 'a (B) - (B, 1) broadcast': replay buffers that keep rewards as [B, 1]. With
    one critic it would pass unnoticed."""
    agent, batch = tiny_agent(n_critics=1), transitions(6)
    noise, names = agent.draw(0, 6), ("rewards", "terminations")
    agent.update(batch, noise)
    for wrong in (names[:1], names[1:], names):
        columns = {name: batch[name][:, None] for name in wrong}
        with pytest.raises(ValueError, match="a batch of"):
            agent.update({**batch, **columns}, noise)


def test_cal_ql_needs_returns_to_go():
    """A batch without a column is refused; without cal_ql mc_returns is not needed."""
    agent, batch = tiny_agent(cal_ql=True), transitions(1, 6)
    noise = agent.draw(0, 6)
    agent.update(batch, noise)
    del batch["mc_returns"]
    with pytest.raises(ValueError, match="mc_returns"):
        agent.update(batch, noise)
    tiny_agent().update(batch, noise)
    del batch["rewards"]
    with pytest.raises(ValueError, match="rewards"):
        tiny_agent().update(batch, noise)


# ======================================================================================
# What a fork adds: layers, buffers, losses as papers write them
# ======================================================================================

ACCURATE = dict(rtol=1e-9, atol=1e-9)
FORK_FLAGS = dict(cql_lagrange=True, cql_target_action_gap=1.0, target_update_period=3)
FORK_RUNS = dict(seed=[0, 1, 2], cql_alpha=[0.5, 5.0])
BOTH_KINDS = pytest.mark.parametrize("network", ["Policy", "Critic", "DiscreteCritic"])


def discrete_task():
    observations = gym.spaces.Box(-np.inf, np.inf, (OBS,))
    return cql.make_task(observations, gym.spaces.Discrete(3))


def change(monkeypatch, network: str, changed):
    """Let changed(module, config) work on each module of a class of networks once it is
    made, as a fork's own lines at the end of __init__ would."""

    class Changed(getattr(cql, network)):
        def __init__(self, config, *sizes):
            super().__init__(config, *sizes)
            changed(self, config)

    monkeypatch.setattr(cql, network, Changed)


def insert(make, place=1):
    """A change that inserts the layer make(width) into a network."""

    def changed(module, config):
        module.net.insert(place, make(config.hidden_dim))

    return changed


def agent_with(network: str, **flags):
    """An agent of the kind that has this network."""
    if network == "DiscreteCritic":
        return cql.make_agent(tiny(**flags), discrete_task())
    return cql.make_agent(tiny(**flags), box_task())


def data_for(agent, *shape):
    """Random transitions with actions of the agent's kind."""
    batch = transitions(*shape)
    if agent.task.discrete:
        generator = torch.Generator().manual_seed(1)
        batch["actions"] = torch.randint(3, (*shape, 1), generator=generator)
    return batch


def check_runs_do_not_mix(make, n_updates=12, **flags):
    """Compare a run among three with the same run alone after some updates, and both
    layouts of a single run. make(**flags) makes an agent."""
    flags = {**FORK_FLAGS, **flags}
    stacked = make(**flags, **FORK_RUNS)
    data = data_for(stacked, 64)
    data["rewards"] *= 3
    train(stacked, data, n_updates)
    found = stacked.run_tensors()
    for r in (0, 3, 5):
        run = {name: stacked.runs[r][name] for name in ("seed", "cql_alpha")}
        for batched in (False, True):
            solo = make(**flags, **run)
            assert not solo.layout.batched
            solo.layout.batched = batched
            train(solo, data, n_updates)
            assert_close(
                {name: x.detach() for name, x in solo.run_tensors().items()},
                {name: x[r : r + 1].detach() for name, x in found.items()},
                **ACCURATE,
            )
    return stacked


def check_answers_do_not_mix(stacked, make):
    """Compare losses, metrics, gradients, act and q of each stacked run with those of a
    solo run with the same weights. Return the stacked ones'."""
    batch, noise = data_for(stacked, len(stacked.runs), 5), stacked.draw(0, 5)
    found = answers(stacked, batch, noise)
    for r, run in enumerate(stacked.runs):
        solo = make(**FORK_FLAGS, seed=run["seed"], cql_alpha=run["cql_alpha"])
        for name, tensor in solo.run_tensors().items():
            tensor.data.copy_(stacked.run_tensors()[name][r : r + 1])
        parts = [mapped(lambda x: x[r : r + 1], x) for x in (batch, noise)]  # noqa: B023
        own = mapped(lambda x: x[r : r + 1], found)  # noqa: B023
        assert_close(own, answers(solo, *parts), rtol=1e-12, atol=1e-12)
    return found


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
@BOTH_KINDS
def test_dropout_is_refused(network, seed, monkeypatch):
    """Its randomness would not be an input, and it would stay on in evaluation."""
    change(monkeypatch, network, insert(lambda _: torch.nn.Dropout(0.1)))
    with pytest.raises(cql.UserError, match="random"):
        agent_with(network, seed=seed)


def test_randomness_in_the_losses_is_refused():
    class Noisy(cql.ContinuousCQL):
        def losses(self, weights, batch, noise, sweep, cloning):
            smoothed = {**batch, "rewards": torch.randn_like(batch["rewards"])}
            return super().losses(weights, smoothed, noise, sweep, cloning)

    with pytest.raises(cql.UserError, match="random"):
        Noisy(tiny(), box_task())


REFUSED = {
    "BatchNorm1d": insert(torch.nn.BatchNorm1d),
    "SpectralNorm": lambda module, _: parametrizations.spectral_norm(module.net[2]),
}


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
@pytest.mark.parametrize("kind", REFUSED)
@BOTH_KINDS
def test_layers_that_keep_statistics_are_refused(network, kind, seed, monkeypatch):
    """The message names the layer, and what to take in its place."""
    change(monkeypatch, network, REFUSED[kind])
    with pytest.raises(cql.UserError, match=f"{kind}.*LayerNorm or weight_norm"):
        agent_with(network, seed=seed)


def every_linear(normalize):
    def changed(module, _):
        for layer in list(module.net):
            if isinstance(layer, torch.nn.Linear):
                normalize(layer)

    return changed


STACKABLE = {
    "LayerNorm": insert(torch.nn.LayerNorm),
    "GroupNorm": insert(lambda n: torch.nn.GroupNorm(2, n)),
    "weight_norm": every_linear(parametrizations.weight_norm),
}


@pytest.mark.parametrize("kind", STACKABLE)
@BOTH_KINDS
def test_layers_that_stack(network, kind, monkeypatch, double):
    """Losses, metrics, gradients, act and q of each stacked run are those of the solo
    run, and so are all tensors after some updates. The layer's own parameters train."""
    make = partial(agent_with, network)
    plain = trained(make()).keys()
    change(monkeypatch, network, STACKABLE[kind])
    before = trained(make(**FORK_FLAGS, **FORK_RUNS))
    stacked = check_runs_do_not_mix(make)
    own = {name for name in before if name not in plain}
    assert own
    for name in own:  # in every run
        moved = trained(stacked)[name] != before[name]
        assert moved.flatten(1).any(1).all(), name
    check_answers_do_not_mix(scrambled(stacked, 0.1), make)


class Rebound(torch.nn.Module):
    """A running mean that is assigned anew in every call."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("center", torch.zeros(width))

    def forward(self, x):
        self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
        return x - self.center


class Centered(torch.nn.Module):
    """A running mean that changes in place, and a count of calls."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("center", torch.full((width,), 0.25))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.center.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        self.calls += 1
        return x - self.center


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
@BOTH_KINDS
def test_a_rebound_buffer_is_refused(network, seed, monkeypatch):
    """Its new value would be lost, so the message says how to change a buffer."""
    change(monkeypatch, network, insert(Rebound))
    with pytest.raises(cql.UserError, match="net.1.center.*in place"):
        agent_with(network, seed=seed)


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
@pytest.mark.parametrize("network", ["Policy", "DiscreteCritic"])
def test_a_buffer_that_acting_would_change_is_refused(network, seed, monkeypatch):
    """Otherwise evaluations would change training."""
    change(monkeypatch, network, insert(Centered))
    with pytest.raises(cql.UserError, match="evaluation.*change it in losses"):
        agent_with(network, seed=seed)


def test_the_check_of_networks_leaves_no_trace(monkeypatch):
    """Dummy data does not reach a buffer that changes in place."""
    change(monkeypatch, "Critic", insert(Centered))
    agent = agent_with("Critic", seed=[0, 1])
    buffers = {k: x for k, x in agent.run_tensors().items() if ".net.1." in k}
    assert len(buffers) == 4  # target critics have them too
    for name, buffer in buffers.items():
        assert (buffer == (0.25 if name.endswith("center") else 0)).all()
        assert buffer.shape[:2] == (2, 2)
        assert not buffer.requires_grad and name in agent.state_dict()
    for parameter in agent.parameters():
        assert parameter.grad is None


def test_a_buffer_that_changes_in_place_stacks(monkeypatch, double):
    """After some updates a stacked run's buffers, one per run and critic, are those of
    the solo run."""
    change(monkeypatch, "Critic", insert(Centered))
    stacked = check_runs_do_not_mix(partial(agent_with, "Critic"))
    center = stacked.run_tensors()["critic.net.1.center"]
    calls = stacked.run_tensors()["critic.net.1.calls"]
    assert (calls == calls.flatten()[0]).all() and calls.flatten()[0] >= 12
    assert torch.pdist(center.reshape(-1, center.shape[-1])).min() > 0


class Rebinding(cql.ContinuousCQL):
    """A fork whose losses assign a buffer's new value to `weights`."""

    def finish(self, *arguments):
        self.register_buffer("size", torch.ones(len(self.runs)))
        super().finish(*arguments)

    def losses(self, weights, batch, noise, sweep, cloning):
        weights["size"] = 0.9 * weights["size"] + 0.1 * batch["rewards"].abs().mean()
        return super().losses(weights, batch, noise, sweep, cloning)


def test_losses_that_rebind_a_weight_are_refused():
    with pytest.raises(cql.UserError, match="in place"):
        Rebinding(tiny(), box_task())


def test_bf16_on_a_processor_without_it(monkeypatch, capsys):
    """One line before training, none from a loaded policy, and the numbers of fp32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(cql, "fast_bf16", FAST_BF16)
    batch = transitions(64)
    trained = []
    for precision in ("fp32", "bf16"):
        agent = tiny_agent(precision=precision)
        agent.update(batch, agent.draw(0, 64))
        trained.append(agent.state_dict())
        assert capsys.readouterr().out == ""
        cql.pick_device(agent.config)
        told = capsys.readouterr().out
        assert ("lacks avx512_bf16, so fp32 is used" in told) == (precision == "bf16")
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_buffers_change_in_bf16_as_in_fp32(seed, monkeypatch):
    """Casting the critics' weights copies them; buffers must not be copied."""
    change(monkeypatch, "Critic", insert(Centered))
    calls = []
    for precision in ("fp32", "bf16"):
        agent = agent_with("Critic", seed=seed, precision=precision)
        agent.update(data_for(agent, len(agent.runs), 5), agent.draw(0, 5))
        calls.append(agent.critic.net[1].calls)
        assert (agent.critic.net[1].center != 0.25).any()
    assert torch.equal(*calls) and calls[0].min() > 0


def test_a_loss_that_changes_what_critics_share_is_refused():
    """In the loop over a single run's critics it would change the next one's input."""

    class Fork(cql.ContinuousCQL):
        def critic_loss(self, own, batch, samples, target, *others):
            target.mul_(0.9)
            return super().critic_loss(own, batch, samples, target, *others)

    for seed in (0, [0, 1]):
        with pytest.raises(RuntimeError, match="memory|in-place|inplace"):
            Fork(tiny(seed=seed), box_task())


def test_losses_that_count_are_refused():
    """A resumed run would count from 0, and a captured graph would not count at all."""

    class Fork(cql.ContinuousCQL):
        def finish(self, *arguments):
            self.calls = 0
            super().finish(*arguments)

        def losses(self, *inputs):
            self.calls += 1
            return super().losses(*inputs)

    with pytest.raises(cql.UserError, match="self.calls"):
        Fork(tiny(), box_task())


def test_an_agents_buffer_cannot_be_rebound():
    """`weights` would keep the old tensor; in place both change."""
    agent = Scaled(tiny(), box_task())
    with pytest.raises(cql.UserError, match="reward_size.*in place"):
        agent.reward_size = 2 * agent.reward_size
    agent.reward_size.fill_(3.0)
    assert agent.weights["reward_size"].item() == 3.0


@pytest.mark.parametrize("name, size", [("size", ()), ("size{j}", (2,)), ("{j}", (3,))])
def test_metrics_of_another_shape_are_refused(name, size):
    """A metric is one number, or one for each critic under a name with {j}."""

    class Fork(cql.ContinuousCQL):
        def losses(self, *inputs):
            loss, metrics = super().losses(*inputs)
            return loss, {**metrics, name: torch.zeros(size)}

    if size == (3,):
        with pytest.raises(cql.UserError, match=r"\(3,\), expected \(2,\)"):
            Fork(tiny(), box_task())
    else:
        Fork(tiny(), box_task())
    with pytest.raises(cql.UserError, match="metric loss"):
        name, size = "loss", (2,)
        Fork(tiny(), box_task())


def test_a_buffer_without_runs_is_refused():
    class Fork(cql.ContinuousCQL):
        def finish(self, *arguments):
            self.register_buffer("size", torch.ones(()))
            super().finish(*arguments)

    with pytest.raises(cql.UserError, match=r"size: shape \(\), expected \(1, ...\)"):
        Fork(tiny(), box_task())


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_target_critics_get_a_copy_of_buffers(seed, monkeypatch):
    """A target step copies the critics' buffers; between two steps the targets keep
    their own."""
    change(monkeypatch, "Critic", insert(Centered))
    agent = agent_with("Critic", seed=seed, soft_target_update_rate=0.1)
    batch = data_for(agent, len(agent.runs), 5)

    def buffers(which):
        tensors = dict(getattr(agent, which).named_buffers())
        return {name: x.clone() for name, x in tensors.items()}

    agent.update(batch, agent.draw(0, 5), move_targets=False)
    for name, value in buffers("critic").items():
        assert (buffers("target_critic")[name] != value).all(), name
    agent.update(batch, agent.draw(1, 5), move_targets=True)
    assert_equal(buffers("target_critic"), buffers("critic"))
    for name, value in trained(agent).items():
        if name.startswith("critic."):
            assert not torch.equal(value, trained(agent)[f"target_{name}"])


def test_acting_with_buffers_takes_the_runs_own(monkeypatch, double):
    """act and q use each run's buffers, and single runs do so too."""

    class Shifted(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.register_buffer("shift", torch.zeros(width))

        def forward(self, x):
            return x + self.shift

    for network in ("Policy", "Critic"):
        change(monkeypatch, network, insert(Shifted))
    agent, x = agent_with("Policy", seed=[0, 1]), torch.randn(2, 5, OBS)
    solo, actions = agent_with("Policy", seed=1), torch.rand(2, 5, ACT)
    first = agent.act(x), agent.q(x, actions)
    for each in (agent, solo):
        each.policy.net[1].shift[-1] = 2.0  # of the last run
        each.critic.net[1].shift[-1] = 2.0
    second = agent.act(x), agent.q(x, actions)
    for before, after in zip(first, second):
        before, after = torch.as_tensor(before), torch.as_tensor(after)
        assert torch.equal(before[0], after[0]) and (before[1] != after[1]).all()
    np.testing.assert_allclose(solo.act(x[1]), second[0][1], rtol=1e-12)
    q = solo.q(x[1:], actions[1:])
    torch.testing.assert_close(q, second[1][1:], rtol=1e-12, atol=1e-12)


class Scaled(cql.ContinuousCQL):
    """A fork that divides rewards by a running scale, a buffer by run."""

    def finish(self, *arguments):
        self.register_buffer("reward_size", torch.ones(len(self.runs)))
        super().finish(*arguments)

    def losses(self, weights, batch, noise, sweep, cloning):
        size = weights["reward_size"]
        assert size.shape == ()
        rewards = batch["rewards"] / size
        size.mul_(0.5).add_(batch["rewards"].abs().mean(), alpha=0.5)
        batch = {**batch, "rewards": rewards}
        return super().losses(weights, batch, noise, sweep, cloning)


def test_an_agents_own_buffer_is_a_weight(double):
    """A buffer by run reaches the losses by `weights`, changes in place there, and
    stacked runs equal solo runs. It is saved and loaded."""

    def make(**flags):
        return Scaled(tiny(**flags), box_task())

    fresh = make(seed=[0, 1])
    assert (fresh.reward_size == 1).all()  # the check left no trace
    assert fresh.weights["reward_size"] is fresh.reward_size
    stacked = check_runs_do_not_mix(make)
    size = stacked.reward_size
    assert size.shape == (6,) and (size != 1).all() and len(size.unique()) == 3
    other = make(**FORK_FLAGS, **{**FORK_RUNS, "seed": [5, 6, 7]})
    other.load_state_dict(saved(stacked))
    assert torch.equal(other.reward_size, size)
    assert other.weights["reward_size"] is other.reward_size


class Td3Bc(cql.ContinuousCQL):
    """The policy's loss of TD3+BC (arXiv 2106.06860) as the paper writes it, added to
    the others."""

    def losses(self, weights, batch, noise, sweep, cloning):
        loss, metrics = super().losses(weights, batch, noise, sweep, cloning)
        critics = {name: x.detach() for name, x in weights["critic"].items()}
        actions = self.action(weights, batch["observations"])
        q = self.q_of(critics, batch["observations"], actions)[0]
        q = q / q.abs().mean().detach()
        cloned = (actions - batch["actions"]).square()
        policy_loss = -2.5 * q.mean() + cloned.mean()
        return loss + policy_loss, {**metrics, "td3_bc": policy_loss}


class GradientPenalty(cql.ContinuousCQL):
    """The README's torch.func.grad: the slope of Q over actions costs."""

    def critic_loss(self, own, batch, *others):
        loss, metrics = super().critic_loss(own, batch, *others)
        critic = partial(cql.call, self.critic, own["critic"])
        observations = batch["observations"]
        actions = batch["actions"].unsqueeze(1)
        slope = torch.func.grad(lambda a: critic(observations, a).sum())(actions)
        penalty = slope.square().mean()
        return loss + 3 * penalty, {**metrics, "slope{j}": penalty}


def test_a_gradient_penalty(double):
    """Stacked runs equal solo runs, and its gradient is that of a plain network."""

    def make(**flags):
        return GradientPenalty(tiny(**flags), box_task())

    check_runs_do_not_mix(make)
    critic = scrambled(cql.Critic(tiny(), OBS, ACT))
    weights = dict(critic.named_parameters())
    x, actions = torch.randn(7, OBS), torch.rand(7, 1, ACT, requires_grad=True)
    slope = torch.func.grad(lambda a: cql.call(critic, weights, x, a).sum())(actions)
    q = critic.net(torch.cat([x, actions.squeeze(1)], 1))
    (wanted,) = torch.autograd.grad(q.sum(), actions, create_graph=True)
    gradients = []
    for each in (slope, wanted):
        last_bias_unused = dict(allow_unused=True, materialize_grads=True)
        squares = each.square().mean()
        gradients.append(
            torch.autograd.grad(squares, list(weights.values()), **last_bias_unused)
        )
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_means_in_a_loss_are_of_one_run(double):
    """TD3+BC's normalization `q / q.abs().mean().detach()` does not couple runs, though
    their Q values are of other sizes."""

    def make(**flags):
        return Td3Bc(tiny(**flags), box_task())

    stacked = check_runs_do_not_mix(make)
    stacked.critic.net[-1].weight.data[::2] *= 30
    found = check_answers_do_not_mix(scrambled(stacked, 0.1), make)
    assert "td3_bc" in found
    observations = transitions(6, 50)["observations"]
    sizes = stacked.q(observations, stacked.act(observations))[:, 0].abs().mean(1)
    assert sizes.max() > 5 * sizes.min()
