"""Networks and losses against scalar loops, closed forms and autograd's own checks."""

import math

import numpy as np
import pytest
import torch
from reference import (
    ACT,
    OBS,
    Reference,
    bend_every_layer,
    in_float64,
    mapped,
    tiny_agent,
    transitions,
)
from torch.distributions import (
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

import cql

double = pytest.fixture(in_float64, autouse=True)
close = dict(rtol=1e-9, atol=1e-9)
INF = math.inf

# ======================================================================================
# Every loss, metric and gradient against tests/reference.py
# ======================================================================================

LAGRANGE = dict(cql_lagrange=True, cql_target_action_gap=3.0, cql_alpha=0.7)
CASES = {
    "defaults": {},
    "unweighted": dict(cql_importance_sample=False),
    "lagrange": LAGRANGE,
    "lagrange_unweighted": dict(LAGRANGE, cql_importance_sample=False),
    "temperature_0.5": dict(cql_temp=0.5),
    "temperature_2": dict(cql_temp=2.0),
    "temperature_unweighted": dict(cql_temp=0.5, cql_importance_sample=False),
    "temperature_list": dict(cql_temp=[0.5, 2.0]),
    "clip_min": dict(cql_clip_diff_min=3.3),
    "clip_max": dict(cql_clip_diff_max=3.3),
    "clip_lagrange": dict(LAGRANGE, cql_clip_diff_min=2.7, cql_clip_diff_max=5.0),
    "max_backup": dict(cql_max_target_backup=True, cql_n_actions=4),
    "max_backup_entropy": dict(
        cql_max_target_backup=True, backup_entropy=True, cql_n_actions=4
    ),
    "backup_entropy": dict(backup_entropy=True, alpha_multiplier=0.3),
    "cloning": dict(bc_steps=1),
    "cloning_over": dict(bc_steps=1, updates=1),
    "alpha_multiplier": dict(alpha_multiplier=0.3),
    "fixed_alpha": dict(use_automatic_entropy_tuning=False, alpha_multiplier=0.3),
    "fixed_alpha_cloning": dict(
        use_automatic_entropy_tuning=False, alpha_multiplier=0.3, bc_steps=5
    ),
    "one_critic": dict(n_critics=1, **LAGRANGE),
    "four_critics": dict(n_critics=4, **LAGRANGE),
    "shallow_critics": dict(q_n_hidden_layers=1),
    "deep_critics": dict(q_n_hidden_layers=5),
    "no_discount": dict(discount=0.0),
    "discount": dict(discount=0.5),
    "one_action": dict(cql_n_actions=1, cql_max_target_backup=True),
    "four_actions": dict(cql_n_actions=4),
    "orthogonal_off": dict(orthogonal_init=False),
    "wide_policy": dict(log_std=2.0),  # half the states at the upper clamp
    "narrow_policy": dict(log_std=-20.0),  # and at the lower one
    "cal_ql": dict(cal_ql=True, cql_n_actions=3),
    "cal_ql_unweighted": dict(cal_ql=True, cql_importance_sample=False),
    "cal_ql_mean": dict(cal_ql=True, penalty="mean", cql_temp=2.0),
    "two_proposals": dict(penalty="two_proposals", cql_temp=0.5, **LAGRANGE),
    "policy_kl": dict(penalty="policy_kl", cql_n_actions=3, cql_temp=0.5),
    "mean": dict(penalty="mean", cql_n_actions=3, cql_temp=0.5),
    "redq": dict(n_critics=5, n_target_critics=2, seed=[0, 1]),
    "redq_max_backup": dict(
        n_critics=4, n_target_critics=1, cql_max_target_backup=True, backup_entropy=True
    ),
    "redq_of_all": dict(n_critics=3, n_target_critics=3),  # the actor takes the mean
    "states": dict(cql_states=2),
    "states_lagrange": dict(
        LAGRANGE, cql_states=3, cql_clip_diff_min=2.7, cql_clip_diff_max=5.0
    ),
    "states_unweighted": dict(cql_states=1, cql_importance_sample=False),
    "states_cal_ql": dict(cql_states=3, cal_ql=True, seed=[0, 1]),
    "three_seeds": dict(seed=[0, 1, 2]),
    "product": dict(
        LAGRANGE, seed=[3, 4], cql_alpha=[0.5, 2.0], cql_target_action_gap=[1.0, 5.0]
    ),
}


def check_against_loops(agent, batch, noise):
    """Losses, metrics and gradients of every run. A tensor's gradient is compared along
    a random direction, and is that of one loss alone: what a loss must not train would
    add to it."""
    config = agent.config
    agent.zero_grad()
    losses, metrics = agent(batch, noise, agent.stage()[0])
    losses.sum().backward()
    generator = np.random.default_rng(0)
    for r in range(len(agent.runs)):
        reference = Reference(agent, batch, noise, r)
        expected = reference.temperature() + reference.actor()
        expected += reference.critic() + reference.multiplier()
        torch.testing.assert_close(losses[r].item(), expected.real, **close)
        wanted = reference.metrics()
        assert metrics.keys() == wanted.keys()
        for name, value in wanted.items():
            actual = metrics[name][r].detach().numpy()
            np.testing.assert_allclose(actual, np.real(value), **close, err_msg=name)
        compared = 0
        for name, parameter in agent.named_parameters():
            if not parameter.requires_grad:
                assert name.startswith("target_critic.") and parameter.grad is None
                continue
            direction = generator.standard_normal(parameter[r].shape)
            actual = 0.0
            if parameter.grad is not None:
                actual = float((parameter.grad[r].numpy() * direction).sum())
            expected = reference.derivative(name, direction)
            assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9), name
            compared += expected != 0
        # No comparison was of 0 with 0, but where nothing is learned.
        learned = config.use_automatic_entropy_tuning + config.cql_lagrange
        assert compared == 10 + 2 * (config.q_n_hidden_layers + 1) + learned


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_losses_metrics_and_gradients_match_scalar_loops(flags):
    """Of every flag. Also the faults 'logsumexp over 3 values', 'logsumexp that mixes
    the critics', 'temperature divides log mu too', 'log_prob ignores a' and 'the
    multiplier's sign'."""
    flags = dict(flags)
    updates, log_std = flags.pop("updates", 0), flags.pop("log_std", None)
    agent = tiny_agent(**flags)
    agent.updates = updates
    R, config = len(agent.runs), agent.config
    batch, noise = transitions(R, 4), agent.draw(4)
    if log_std is not None:
        middle = agent.policy(batch.observations)[1].median().item()
        agent.policy.log_std_offset.data += log_std - middle
        clamped = agent.policy(batch.observations)[1] == log_std
        assert clamped.any() and not clamped.all()
    check_against_loops(agent, batch, noise)
    # A case is worth something only where some samples are clamped and some are not,
    # and some proposals bounded and some not.
    clipped, bounded = [], []
    for r in range(R):
        for rows in Reference(agent, batch, noise, r).gaps():
            clipped += [row.gap != row.clamped for row in rows]
            for row in rows:
                K = config.cql_n_actions
                bounded += [x != y for x, y in zip(row.q[K:], row.bounded[K:])]
    bounds = config.cql_clip_diff_min, config.cql_clip_diff_max
    assert (0 < sum(clipped) < len(clipped)) == (bounds != (-INF, INF))
    assert (0 < sum(bounded) < len(bounded)) == config.cal_ql


def test_every_forward_pass_goes_through_the_layer(monkeypatch):
    """The layer is written once: changed, it is changed in all losses, in update and in
    act."""
    agent = tiny_agent()
    batch, noise = transitions(1, 4), agent.draw(4)
    observations, normals = batch.observations, noise.normals[:, :, 0]
    plain = agent.act(observations, normals)
    bend_every_layer(monkeypatch)
    check_against_loops(agent, batch, noise)
    reference = Reference(agent, batch, noise, 0)
    pairs = zip(observations[0].tolist(), normals[0].tolist())
    wanted = np.real([[reference.act(*pair)[0] for pair in pairs]])
    np.testing.assert_allclose(agent.act(observations, normals), wanted, **close)
    assert np.abs(wanted - plain).min() > 1e-3
    updated, metrics = agent.update(batch, noise), reference.metrics()
    for name in ("policy_loss", "qf{j}_loss", "cql_qf{j}_diff"):
        actual, value = updated[name][0].numpy(), np.real(metrics[name])
        np.testing.assert_allclose(actual, value, **close)


def test_losses_are_means_over_the_batch():
    """The losses of a batch are the mean of those of its halves."""
    agent = tiny_agent(**LAGRANGE)
    batch, noise = transitions(1, 6), agent.draw(6)
    whole, _ = agent(batch, noise, False)
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        half = mapped(lambda x, part=part: x[:, part], batch)
        its_noise = mapped(lambda x, part=part: x[:, part], noise)
        halves.append(agent(half, its_noise, False)[0])
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, **close)


# ======================================================================================
# Which loss trains what
# ======================================================================================


def one_loss(agent, name):
    """A single loss of the agent, from the functions that the agent adds up."""
    config, batch, noise = agent.config, transitions(1, 4), agent.draw(4)
    samples = cql.sample_actions(agent.policy, batch, noise)
    alpha = agent.log_alpha.detach().exp()
    if name == "temperature":
        return cql.temperature_loss(agent.log_alpha, samples.log_pi, -ACT)[0]
    if name == "actor":
        return cql.actor_loss(agent.critic, batch, samples, alpha, config)[0]
    if name == "cloning":
        return cql.cloning_loss(batch, samples, alpha)[0]
    args = batch, samples, alpha, noise.subset_keys, config
    target, _ = cql.td_target(agent.target_critic, *args)
    args = batch, samples, noise, target, agent.log_alpha_prime, agent.sweep, config
    return cql.critic_loss(agent.critic, *args)[0]


@pytest.mark.parametrize(
    "name, trained",
    [
        ("temperature", {"log_alpha"}),
        ("actor", {"policy"}),
        ("cloning", {"policy"}),
        ("critic", {"critic", "log_alpha_prime"}),
    ],
)
def test_each_loss_reaches_its_own_parameters_only(name, trained):
    """The actor's leaves the critics alone, the critics' leaves the policy alone, none
    but its own touches alpha, and nothing the targets."""
    agent = tiny_agent(**LAGRANGE)
    one_loss(agent, name).sum().backward()
    for parameter_name, parameter in agent.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert reached == (parameter_name.split(".")[0] in trained), parameter_name


def test_targets_and_proposals_carry_no_graph():
    """log mu is a constant of the penalty, and the TD target one of the error."""
    agent = tiny_agent()
    batch, noise = transitions(1, 4), agent.draw(4)
    agent.target_critic.requires_grad_(True)  # even so
    samples = cql.sample_actions(agent.policy, batch, noise)
    args = batch, samples, agent.log_alpha.exp(), noise.subset_keys, agent.config
    target, _ = cql.td_target(agent.target_critic, *args)
    constants = samples.proposals, samples.log_mu, samples.target_log_pi, target
    assert not any(tensor.requires_grad for tensor in constants)
    assert samples.actions.requires_grad and samples.log_pi.requires_grad


def test_critics_train_again_after_the_actor_loss():
    """The actor freezes the critics for itself only, and even if it fails."""
    agent, batch = tiny_agent(), transitions(1, 4)
    before = list(agent.critic.parameters())
    one_loss(agent, "actor")
    samples = cql.sample_actions(agent.policy, batch, agent.draw(4))
    broken = samples._replace(actions=samples.actions[..., :1])
    with pytest.raises(RuntimeError):
        cql.actor_loss(agent.critic, batch, broken, torch.ones(1), agent.config)
    for parameter, old in zip(agent.critic.parameters(), before):
        assert parameter is old and parameter.requires_grad


# ======================================================================================
# The penalty in closed form
# ======================================================================================


def gap_of(q, log_mu, q_data=0.0, temperature=1.0, **flags):
    """conservative_gap of one run and one state, q a list per critic."""
    q = torch.as_tensor(q, dtype=torch.float64)[None, :, None, :]
    if log_mu is not None:
        log_mu = torch.as_tensor(log_mu, dtype=torch.float64)[None, None, None, :]
    q_data = torch.full(q.shape[:3], float(q_data))
    temperature = torch.tensor([temperature])
    config = cql.TrainConfig(**flags)
    return cql.conservative_gap(q, log_mu, q_data, temperature, config)[0, :, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("n_actions", [1, 4, 12])
def test_equal_values_leave_the_logarithm_of_the_count(n_actions, temperature):
    """Fault 'logsumexp over 3 values instead of 3K': M equal Q's, density 1, are
    T log M above each of them; the data action makes it M + 1 where it joins."""
    q = [[0.7] * n_actions] * 2
    gap = gap_of(q, [0.0] * n_actions, 0.2, temperature)
    expected = 0.5 + temperature * math.log(n_actions)
    torch.testing.assert_close(gap, torch.full((2,), expected), **close)
    gap = gap_of(q, None, 0.7, temperature)
    expected = temperature * math.log(n_actions + 1)
    torch.testing.assert_close(gap, torch.full((2,), expected), **close)


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_temperature_divides_q_and_not_log_mu(temperature):
    """Fault 'temperature divides log mu too': one action of density mu has the soft
    maximum Q - T log mu."""
    gap = gap_of([[2.0]], [math.log(0.1)], 0.0, temperature)
    assert gap.item() == pytest.approx(2.0 - temperature * math.log(0.1), abs=1e-12)


def test_critics_do_not_mix_in_the_soft_maximum():
    """Fault 'logsumexp that mixes the critics': each critic's gap is as if alone."""
    q, log_mu = [[1.0, -2.0, 0.5], [30.0, 4.0, 2.0]], [-1.0, 0.3, -0.2]
    together = gap_of(q, log_mu)
    alone = torch.cat([gap_of([row], log_mu) for row in q])
    torch.testing.assert_close(together, alone, **close)


def test_gap_is_clamped_per_sample_before_the_mean():
    """Of the gaps 4, -2 and 1, bounds of 0 and 2 leave 2, 0 and 1."""
    q = torch.tensor([4.0, -2.0, 1.0]).reshape(1, 1, 3, 1)
    config = cql.TrainConfig(cql_clip_diff_min=0.0, cql_clip_diff_max=2.0)
    zeros = torch.zeros(1, 1, 3, 1)
    gap = cql.conservative_gap(q, zeros, zeros[..., 0], torch.ones(1), config)
    assert gap.flatten().tolist() == [2.0, 0.0, 1.0]


def test_all_proposals_reach_the_critics_at_the_states_of_the_data(monkeypatch):
    """Fault 'logsumexp over 3 values': 3K proposals, K uniform, K from pi(.|s) and K
    from pi(.|s'), are evaluated beside the data's action at s, not s'; each counts."""
    agent, calls = tiny_agent(cql_n_actions=4), []
    batch, noise = transitions(1, 5), agent.draw(5)
    forward = agent.critic.forward

    def recorded(observations, actions, dtype=None):
        q = forward(observations, actions, dtype)
        calls.append((observations, actions, q))
        return q

    monkeypatch.setattr(agent.critic, "forward", recorded)
    losses, _ = agent(batch, noise, False)
    states, actions, q = calls[-1]
    assert torch.equal(states, batch.observations)
    assert actions.shape == (1, 5, 1 + 12, ACT)
    assert torch.equal(actions[:, :, 0], batch.actions)
    assert torch.equal(actions[:, :, 1:5], noise.uniforms)
    for first, states, normals in (
        (5, batch.observations, noise.proposal_normals[:, :, :4]),
        (9, batch.next_observations, noise.proposal_normals[:, :, 4:]),
    ):
        mean, log_std = agent.policy(states)
        drawn = (mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * normals).tanh()
        torch.testing.assert_close(actions[:, :, first : first + 4], drawn, **close)
    (gradient,) = torch.autograd.grad(losses.sum(), q)
    assert (gradient[..., 1:] > 0).all()  # the penalty pushes every one of them down
    # ... with softmax weights, which sum to cql_alpha over the batch, critic by critic.
    total = torch.full((1, 2), agent.config.cql_alpha)
    torch.testing.assert_close(gradient[..., 1:].sum((-1, -2)), total, **close)


def test_terminal_transitions_do_not_bootstrap_and_others_do():
    """A batch that holds only terminal transitions has its rewards for targets."""
    agent = tiny_agent(discount=0.9)
    batch, noise = transitions(1, 6), agent.draw(6)
    samples = cql.sample_actions(agent.policy, batch, noise)
    args = batch, samples, torch.ones(1), None, agent.config
    target, metrics = cql.td_target(agent.target_critic, *args)
    ended = batch.terminations == 1
    assert 0 < ended.sum() < 6
    assert torch.equal(target[ended], batch.rewards[ended])
    q = agent.target_critic(batch.next_observations, samples.target_actions)
    expected = batch.rewards + 0.9 * q[..., 0].amin(1)
    torch.testing.assert_close(target[~ended], expected[~ended], **close)
    assert metrics["average_target_q"].item() == pytest.approx(q.amin(1).mean().item())


# ======================================================================================
# The sampled backward pass, and bf16
# ======================================================================================

SAMPLED = {
    "importance": {},
    "unweighted": dict(cql_importance_sample=False),
    "temperature": dict(cql_temp=0.5),
    "lagrange": LAGRANGE,
    "clip": dict(LAGRANGE, cql_clip_diff_min=2.7, cql_clip_diff_max=3.5),
    "four": dict(cql_backward_actions=4, cql_clip_diff_max=3.5),
    "cal_ql": dict(cal_ql=True),
    "two_proposals": dict(penalty="two_proposals"),
    "policy_kl": dict(penalty="policy_kl", cql_temp=0.5),
    "mean": dict(penalty="mean", cal_ql=True),
    "states": dict(LAGRANGE, cql_states=3, cql_clip_diff_max=3.5),
    "states_cal_ql": dict(cql_states=2, cal_ql=True),
}


def gradients(agent, batch, noise):
    """Losses and metrics, and the critics' gradients flattened to [R, parameters]."""
    agent.zero_grad()
    losses, metrics = agent(batch, noise, False)
    losses.sum().backward()
    grads = [p.grad.flatten(1) for p in agent.critic.parameters()]
    return losses.detach(), metrics, torch.cat(grads, 1)


def repeated(n, batch, noise):
    """The batch n times over, its noise with it, but with new offsets."""
    R, N, B = noise.resampling_offset.shape
    batch = mapped(lambda x: x.repeat_interleave(n, 1), batch)
    noise = mapped(lambda x: x.repeat_interleave(n, 1), noise)
    return batch, noise._replace(resampling_offset=torch.rand(R, N, n * B))


STATES = {
    "exact": {},
    "lagrange": LAGRANGE,
    "clip": dict(cql_clip_diff_min=2.7, cql_clip_diff_max=3.5),
    "unweighted": dict(cql_importance_sample=False),
    "cal_ql": dict(cal_ql=True),
    "sampled": dict(cql_backward_actions=2),
    "policy_kl": dict(penalty="policy_kl", cql_temp=0.5),
}


@pytest.mark.parametrize("flags", STATES.values(), ids=STATES)
def test_the_penalty_on_part_of_the_batch_is_unbiased(flags):
    """Over all turns of the batch, by which each state is among the first n equally
    often, loss and gradient average to those of the whole batch."""
    flags = {"seed": [0, 1], **flags}
    whole = tiny_agent(**flags)
    agent = tiny_agent(**flags, cql_states=2)
    batch, noise = transitions(2, 5), whole.draw(5)
    wanted_loss, _, wanted = gradients(whole, batch, noise)
    losses, grads = [], []
    for turn in range(5):
        turned = mapped(lambda x: x.roll(turn, 1), noise)  # noqa: B023
        offset = noise.resampling_offset
        parts = {
            "uniforms": turned.uniforms[:, :2],
            "proposal_normals": turned.proposal_normals[:, :2],
            "resampling_offset": None if offset is None else offset.roll(turn, 2),
        }
        if offset is not None:
            parts["resampling_offset"] = parts["resampling_offset"][..., :2]
        turned_batch = mapped(lambda x: x.roll(turn, 1), batch)  # noqa: B023
        loss, _, gradient = gradients(agent, turned_batch, turned._replace(**parts))
        losses.append(loss)
        grads.append(gradient)
    torch.testing.assert_close(torch.stack(losses).mean(0), wanted_loss, **close)
    torch.testing.assert_close(torch.stack(grads).mean(0), wanted, **close)
    assert (grads[0] - grads[1]).norm() > 0.01 * wanted.norm()


@pytest.mark.parametrize("flags", SAMPLED.values(), ids=SAMPLED)
def test_the_sampled_gradient_is_unbiased(flags):
    """With k of the actions in the graph, the mean of 12,000 gradients is the exact one
    within its standard error, parameter by parameter."""
    torch.manual_seed(0)
    flags = {"cql_backward_actions": 1, "seed": [0, 1], **flags}
    agent = tiny_agent(**flags)
    exact = tiny_agent(**{**flags, "cql_backward_actions": 0})
    batch, noise = transitions(2, 4), agent.draw(4)
    wanted = gradients(exact, batch, noise)[2]
    draws = [gradients(agent, *repeated(300, batch, noise))[2] for _ in range(40)]
    draws = torch.stack(draws)  # [40, R, parameters], each a mean of 300
    error = draws.std(0) / math.sqrt(len(draws))
    random = error > 1e-7 * wanted.abs().max()
    assert random.float().mean() > 0.1  # others: dead units, data alone, all clamped
    z = (draws.mean(0) - wanted)[random] / error[random]
    assert z.abs().max() < 5  # some hundred, correlated
    rare = 1e-4 * wanted.abs().max()  # actions too improbable to be among 12,000
    assert (draws.mean(0) - wanted)[~random].abs().max() < rare
    assert error.norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("flags", SAMPLED.values(), ids=SAMPLED)
def test_the_sampled_backward_logs_what_the_exact_one_does(flags):
    flags = {"cql_backward_actions": 1, **flags}
    agent, exact = (
        tiny_agent(**flags),
        tiny_agent(**{**flags, "cql_backward_actions": 0}),
    )
    batch, noise = transitions(1, 6), agent.draw(6)
    losses, metrics, _ = gradients(agent, batch, noise)
    wanted, others, _ = gradients(exact, batch, noise)
    torch.testing.assert_close(losses, wanted, **close)
    torch.testing.assert_close(metrics, others, **close)


@pytest.mark.parametrize("k", [0, 2])
def test_a_bound_of_minus_infinity_is_plain_cql(k):
    """Cal-QL is data, not a branch."""
    bounded = tiny_agent(cal_ql=True, cql_backward_actions=k)
    plain = tiny_agent(cql_backward_actions=k)
    batch, noise = transitions(1, 6), plain.draw(6)
    batch = batch._replace(mc_returns=torch.full((1, 6), -INF))
    losses, metrics, slopes = gradients(bounded, batch, noise)
    assert metrics.pop("bound_rate").item() == 0
    for actual, wanted in zip((losses, metrics, slopes), gradients(plain, batch, noise)):
        torch.testing.assert_close(actual, wanted, **close)


def test_systematic_resampling():
    """Counts of k equally spaced points differ from k p by less than one, over all
    offsets they average to k p, and what has no weight is never drawn."""
    torch.manual_seed(0)
    weights, k, n = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.27, 0.03, 0.0]), 4, 1000
    q = torch.randn(8).expand(1, 1, n, 8)
    offsets = (torch.arange(n) / n).expand(1, 1, n)  # with 0, where a tie could err

    def gap_of(q):
        return (q[..., 1:] * weights).sum(-1) - 0.7 * q[..., 0]

    gap, indices, slopes = cql.sampled_backward(gap_of, q, offsets, k)
    assert torch.equal(gap, gap_of(q)) and indices.shape == (1, 1, n, k)
    counts = torch.nn.functional.one_hot(indices, 7).sum(-2)[0, 0]
    assert ((counts - k * weights).abs() < 1).all()
    mean = counts.double().mean(0)
    torch.testing.assert_close(mean, k * weights, rtol=0, atol=2 / n)
    assert (counts[:, weights == 0] == 0).all()
    torch.testing.assert_close(slopes[0, 0, 0], torch.tensor([-0.7] + [0.25] * 4))


def test_a_falling_slope_keeps_its_sign():
    """A penalty that rewards some actions: their Q is pushed up, not down."""
    weights, n = torch.tensor([0.6, -0.3, 0.1]), 1000
    offsets = ((torch.arange(n) + 0.5) / n).expand(1, 1, n)
    q = torch.zeros(1, 1, n, 4)
    _, indices, slopes = cql.sampled_backward(
        lambda q: (q[..., 1:] * weights).sum(-1), q, offsets, 2
    )
    mean = torch.zeros(1, 1, n, 3).scatter_add_(-1, indices, slopes[..., 1:]).mean(2)
    torch.testing.assert_close(mean.flatten(), weights, rtol=0, atol=2 / n)


@pytest.mark.parametrize("k", [0, 2])
def test_bf16_rounds_the_critics_and_nothing_else(k):
    """float32 weights, gradients, targets and log densities; Q and the critics'
    gradients within bf16's rounding, which must show."""
    torch.set_default_dtype(torch.float32)
    flags = dict(cql_backward_actions=k, hidden_dim=64, **LAGRANGE)
    agents = [tiny_agent(precision=name, **flags) for name in ("fp32", "bf16")]
    batch, noise = transitions(1, 64), agents[0].draw(64)
    results = [gradients(agent, batch, noise) for agent in agents]
    (_, exact, slopes), (_, rounded, others) = results
    assert others.dtype == torch.float32
    rounding = {"qf{j}_loss", "average_qf{j}", "cql_std_q{j}", "alpha_prime_loss"}
    for name, value in exact.items():
        assert rounded[name].dtype == torch.float32
        same = torch.equal(rounded[name], value)
        assert same != (name in rounding or name.startswith("cql_")), name
        torch.testing.assert_close(rounded[name], value, rtol=0.03, atol=0.01)
    assert 1e-4 < (others - slopes).norm() / slopes.norm() < 0.03
    policies = [[p.grad for p in agent.policy.parameters()] for agent in agents]
    torch.testing.assert_close(*policies, rtol=0, atol=0)


# ======================================================================================
# Squashed Gaussians
# ======================================================================================


def tanh_gaussian(mean, log_std):
    base = Independent(Normal(mean, log_std.exp()), 1)
    return TransformedDistribution(base, TanhTransform(cache_size=1))


def test_squash_and_data_log_prob_agree_with_torch_distributions():
    """Also the fault 'log_prob ignores a': densities of given actions are theirs."""
    mean, log_std = 0.3 * torch.randn(2, 2, 5, ACT)
    normals = torch.randn(2, 5, 7, ACT).clamp(-2, 2)  # atanh finds its way back to them
    actions, log_prob = cql.squash(mean, log_std, normals)
    assert actions.shape == (2, 5, 7, ACT) and log_prob.shape == (2, 5, 7)
    distribution = tanh_gaussian(mean.unsqueeze(2), log_std.unsqueeze(2))
    pre_tanh = mean.unsqueeze(2) + log_std.unsqueeze(2).exp() * normals
    torch.testing.assert_close(actions, pre_tanh.tanh(), **close)
    torch.testing.assert_close(
        log_prob, distribution.log_prob(actions), rtol=1e-6, atol=1e-6
    )
    given = torch.rand(2, 5, ACT) * 1.98 - 0.99
    expected = tanh_gaussian(mean, log_std).log_prob(given)
    torch.testing.assert_close(
        cql.data_log_prob(mean, log_std, given), expected, **close
    )
    again = cql.data_log_prob(mean, log_std, actions[:, :, 0])
    torch.testing.assert_close(again, log_prob[:, :, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_std", [-20.0, 2.0])
@pytest.mark.parametrize("centre", [-50.0, 0.0, 50.0])
def test_extreme_gaussians_have_finite_densities_and_gradients(centre, log_std, dtype):
    """Saturated actions, either clamp of log std, data on the very bounds."""
    mean = torch.full((1, 3, 1), centre, dtype=dtype, requires_grad=True)
    log_stds = torch.full((1, 3, 1), log_std, dtype=dtype, requires_grad=True)
    normals = torch.tensor([-5.0, 0.0, 5.0], dtype=dtype).expand(1, 3, 3).unsqueeze(-1)
    actions, log_prob = cql.squash(mean, log_stds, normals)
    data = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype).reshape(1, 3, 1)
    of_data = cql.data_log_prob(mean, log_stds, data)
    gradients = torch.autograd.grad((log_prob.sum(), of_data.sum()), (mean, log_stds))
    for tensor in (actions, log_prob, of_data, *gradients):
        assert torch.isfinite(tensor).all()
    # 1 - tanh(50)^2 is 0 in float64; its logarithm is 2 log 2 - 100.
    u = centre + math.exp(log_std) * normals[0, 0, :, 0].double()
    exact = (
        -0.5 * normals[0, 0, :, 0].double() ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    )
    exact = exact - (
        2 * math.log(2) - 2 * u.abs() - 2 * torch.log1p((-2 * u.abs()).exp())
    )
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        log_prob[0, 0].double(), exact, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("mean, log_std", [(0.0, -1.0), (0.8, -0.3), (-1.5, 0.2)])
def test_density_integrates_to_one(mean, log_std):
    edges = torch.linspace(-1, 1, 200_001)
    actions = ((edges[1:] + edges[:-1]) / 2).reshape(1, -1, 1)
    mean, log_std = torch.full_like(actions, mean), torch.full_like(actions, log_std)
    mass = cql.data_log_prob(mean, log_std, actions).exp().sum() * 1e-5
    assert mass.item() == pytest.approx(1.0, abs=1e-4)


# ======================================================================================
# Ensembles
# ======================================================================================


@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3)])
@pytest.mark.parametrize("with_state", [False, True])
def test_ensemble_linear_is_every_members_own_product(lead, with_state):
    """Values and gradients, also where the first part of the input is a state that two
    rows share."""
    layer, members = cql.EnsembleLinear(lead, 5, 4), math.prod(lead)
    weight, bias = torch.randn(*lead, 5, 4), torch.randn(*lead, 1, 4)
    x, state = torch.randn(members, 6, 5), None
    if with_state:
        x, state = x[..., :3], torch.randn(members, 3, 2)

    def of_layer(weight, bias, x, state):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, parameters, (x, state))

    y = of_layer(weight, bias, x, state)
    for m in range(members):
        whole = x[m]
        if with_state:
            whole = torch.cat([state[m].repeat_interleave(2, 0), x[m]], 1)
        w, b = weight.view(members, 5, 4)[m], bias.view(members, 4)[m]
        torch.testing.assert_close(y[m], whole @ w + b, **close)
    inputs = [weight, bias, x, state]
    for tensor in inputs[: 3 + with_state]:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(of_layer, inputs)


@pytest.mark.parametrize("n_members", [1, 3])
def test_inputs_for_other_members_are_refused(n_members):
    """Two layers have no answer to one input or to three."""
    with pytest.raises(RuntimeError):
        cql.EnsembleLinear((2,), 3, 4)(torch.randn(n_members, 6, 3))


@pytest.mark.parametrize("q_n_hidden_layers", [1, 2, 5])
@pytest.mark.parametrize("n_critics", [1, 2, 4])
def test_all_critics_have_the_layers_asked_for(n_critics, q_n_hidden_layers):
    """Fault 'the second critic ignores q_n_hidden_layers'. The critics, whose first
    layer is split, equal plain networks on [s, a], each with its own weights."""
    depth = dict(q_n_hidden_layers=q_n_hidden_layers, hidden_dim=16)
    agent = tiny_agent(n_critics=n_critics, seed=[0, 1], **depth)
    assert len(agent.critic.layers) == q_n_hidden_layers + 1
    states, actions = torch.randn(2, 5, OBS), torch.randn(2, 5, 3, ACT)
    q = agent.critic(states, actions)
    assert q.shape == (2, n_critics, 5, 3)
    x = torch.cat([states.unsqueeze(2).expand(2, 5, 3, OBS), actions], -1)
    for r in range(2):
        for j in range(n_critics):
            y = x[r]
            for layer in agent.critic.layers:
                y = y.relu() if layer is not agent.critic.layers[0] else y
                y = y @ layer.weight[r, j] + layer.bias[r, j]
            torch.testing.assert_close(q[r, j], y.squeeze(-1), **close)
    q.sum().backward()
    for parameter in agent.critic.parameters():
        per_member = parameter.grad.flatten(2).abs().sum(-1)
        assert (per_member > 0).all()  # every layer of every critic is used
