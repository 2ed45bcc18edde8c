"""Networks and losses against scalar loops, closed forms and autograd's own checks."""

import copy
import math

import numpy as np
import pytest
import torch
from reference import (
    ACT,
    OBS,
    Reference,
    answers,
    assert_close,
    bend_every_network,
    in_float64,
    losses_of,
    mapped,
    tiny,
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
    "clip_lagrange": dict(
        LAGRANGE, cql_clip_diff_min=2.7, cql_clip_diff_max=5.0, seed=1
    ),
    "max_backup": dict(cql_max_target_backup=True, cql_n_actions=4),
    "max_backup_entropy": dict(
        cql_max_target_backup=True, backup_entropy=True, cql_n_actions=4
    ),
    "backup_entropy": dict(backup_entropy=True, alpha_multiplier=0.3),
    "cloning": dict(bc_steps=1),
    "cloning_over": dict(bc_steps=1, update=1),
    "bc_weight": dict(bc_weight=0.4, seed=[0, 1]),
    "bc_weight_cloning": dict(bc_weight=0.4, bc_steps=1),
    "bc_weight_redq": dict(bc_weight=2.0, n_critics=3, n_target_critics=2),
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
    "n_steps": dict(n_steps=3, seed=[0, 1]),
    "one_action": dict(cql_n_actions=1, cql_max_target_backup=True),
    "four_actions": dict(cql_n_actions=4),
    "orthogonal_off": dict(orthogonal_init=False),
    "wide_policy": dict(log_std=2.0),  # some states at the upper clamp
    "narrow_policy": dict(log_std=-20.0),  # some at the lower one
    "cal_ql": dict(cal_ql=True, cql_n_actions=3, seed=7),
    "cal_ql_unweighted": dict(cal_ql=True, cql_importance_sample=False, seed=7),
    "cal_ql_mean": dict(cal_ql=True, penalty="mean", cql_temp=2.0, seed=7),
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


def check_against_loops(agent, batch, noise, cloning=False):
    """Compare losses, metrics and gradients of every run with the loops. A tensor's
    gradient is compared along a random direction. The reference has the gradient of one
    loss alone, so any other loss that reaches the tensor makes the check fail."""
    config = agent.config
    agent.zero_grad()
    losses, metrics = losses_of(agent, batch, noise, cloning)
    losses.sum().backward()
    generator = np.random.default_rng(0)
    for r in range(len(agent.runs)):
        reference = Reference(agent, batch, noise, r, cloning)
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
                fixed = ["log_alpha_prime"] * (not config.cql_lagrange)
                fixed += ["log_alpha"] * (not config.use_automatic_entropy_tuning)
                assert name.startswith("target_critic.") or name in fixed
                assert parameter.grad is None
                continue
            direction = generator.standard_normal(parameter[r].shape)
            actual = 0.0
            if parameter.grad is not None:
                actual = float((parameter.grad[r].numpy() * direction).sum())
            expected = reference.derivative(name, direction)
            assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9), name
            compared += expected != 0
        # Only where nothing is learned was 0 compared with 0.
        learned = config.use_automatic_entropy_tuning + config.cql_lagrange
        assert compared == 10 + 2 * (config.q_n_hidden_layers + 1) + learned


def log_std_of(agent, batch):
    """The policy's log std at the batch's observations, [R, B, A]."""
    policy = agent.weights["policy"]
    pairs = policy, batch["observations"]
    return agent.layout(lambda w, x: cql.call(agent.policy, w, x)[1], *pairs).detach()


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_losses_metrics_and_gradients_match_scalar_loops(flags):
    """Every flag. Also the faults 'logsumexp over 3 values', 'logsumexp that mixes
    the critics', 'temperature divides log mu too', 'log_prob ignores a' and 'the
    multiplier's sign'."""
    flags = dict(flags)
    update, log_std = flags.pop("update", 0), flags.pop("log_std", None)
    agent = tiny_agent(**flags)
    R, config = len(agent.runs), agent.config
    batch, noise = transitions(R, 4), agent.draw(update, 4)
    if log_std is not None:
        middle = log_std_of(agent, batch).median().item()
        agent.policy.log_std_offset.data += log_std - middle
        clamped = log_std_of(agent, batch) == log_std
        assert clamped.any() and not clamped.all()
    cloning, _ = cql.stage_of(config, update)
    check_against_loops(agent, batch, noise, cloning)
    # A case tests clamps and bounds only if they change some samples, but not all.
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


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["single", "stacked"])
def test_every_forward_pass_goes_through_the_network(monkeypatch, seed):
    """Each network is written once: a change of its activation or forward is a change in
    all losses, in update, in act and in q."""
    agent = tiny_agent(seed=seed)
    R = len(agent.runs)
    batch, noise = transitions(R, 4), agent.draw(0, 4)
    observations, normals = batch["observations"], noise["normals"][:, :, 0]
    plain = agent.act(observations, normals)
    bend_every_network(monkeypatch)
    check_against_loops(agent, batch, noise)
    acted, q = agent.act(observations, normals), agent.q(observations, batch["actions"])
    updated = agent.update(batch, noise)
    assert np.abs(acted - plain).min() > 1e-3
    agent = tiny_agent(seed=seed)  # as it was before the update
    for r in range(R):
        reference = Reference(agent, batch, noise, r)
        pairs = zip(observations[r].tolist(), normals[r].tolist())
        wanted = np.real([reference.act(*pair)[0] for pair in pairs])
        np.testing.assert_allclose(acted[r], wanted, **close)
        np.testing.assert_allclose(q[r], np.real(reference.q_data()), **close)
        metrics = reference.metrics()
        for name in ("policy_loss", "qf{j}_loss", "cql_qf{j}_diff"):
            actual, value = updated[name][r].numpy(), np.real(metrics[name])
            np.testing.assert_allclose(actual, value, **close)


def test_losses_are_means_over_the_batch():
    """The losses of a batch are the mean of those of its halves."""
    agent = tiny_agent(**LAGRANGE)
    batch, noise = transitions(1, 6), agent.draw(0, 6)
    whole, _ = losses_of(agent, batch, noise)
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        half = mapped(lambda x, part=part: x[:, part], batch)
        its_noise = mapped(lambda x, part=part: x[:, part], noise)
        halves.append(losses_of(agent, half, its_noise)[0])
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, **close)


# ======================================================================================
# Which loss trains what
# ======================================================================================


def one_loss(agent, name):
    """One of the losses that the agent adds up, with its graph."""
    batch, noise = transitions(1, 4), agent.draw(0, 4)
    _, metrics = losses_of(agent, batch, noise, cloning=name == "cloning")
    if name == "critic":
        return metrics["qf{j}_loss"] + metrics["cql_min_qf{j}_loss"]
    names = {"temperature": "alpha_loss", "multiplier": "alpha_prime_loss"}
    return metrics[names.get(name, "policy_loss")]


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize(
    "name, trained",
    [
        ("temperature", "log_alpha"),
        ("actor", "policy"),
        ("cloning", "policy"),
        ("critic", "critic"),
        ("multiplier", "log_alpha_prime"),
    ],
)
def test_each_loss_reaches_its_own_parameters_only(name, trained, k):
    """The actor's loss leaves the critics alone, the critics' losses leave the policy
    alone, only alpha's own loss reaches it, and no loss reaches the targets."""
    agent = tiny_agent(cql_backward_actions=k, **LAGRANGE)
    one_loss(agent, name).sum().backward()
    for parameter_name, parameter in agent.named_parameters():
        reached = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert reached == (parameter_name.split(".")[0] == trained), parameter_name


def sampled(agent, batch, noise):
    """The samples of a single run's update, without R."""
    inputs = agent.weights["policy"], batch, noise
    inputs = torch.utils._pytree.tree_map(lambda x: x[0], inputs)
    return agent.sample(*inputs)


def target_of(agent, batch, noise, monkeypatch):
    """The TD target [B] that the losses of a single run hand to its critics."""
    targets = []
    critic_loss = agent.critic_loss

    def recorded(own, batch, samples, target, *rest):
        targets.append(target)
        return critic_loss(own, batch, samples, target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(agent, "critic_loss", recorded)
        _, metrics = losses_of(agent, batch, noise)
    assert len(targets) == agent.config.n_critics
    assert all(target is targets[0] for target in targets)
    return targets[0], metrics


def test_targets_and_proposals_carry_no_graph(monkeypatch):
    """log mu is a constant of the penalty, and the TD target one of the error."""
    agent = tiny_agent(backup_entropy=True)
    batch, noise = transitions(1, 4), agent.draw(0, 4)
    agent.target_critic.requires_grad_(True)  # even so
    samples = sampled(agent, batch, noise)
    target, _ = target_of(agent, batch, noise, monkeypatch)
    constants = [target]
    constants += [samples[name] for name in ("proposals", "log_mu")]
    constants += [samples[name] for name in ("next_actions", "next_log_pi")]
    assert not any(tensor.requires_grad for tensor in constants)
    assert samples["actions"].requires_grad and samples["log_pi"].requires_grad


def test_critics_train_again_after_the_actor_loss():
    """The actor's loss detaches the critics for itself only, even if it fails."""
    agent = tiny_agent()
    before = list(agent.critic.parameters())
    one_loss(agent, "actor")
    noise = agent.draw(0, 4)
    noise["normals"] = noise["normals"][..., :1].expand(1, 4, 1, 3)
    with pytest.raises(RuntimeError):
        losses_of(agent, transitions(1, 4), noise)
    for parameter, old in zip(agent.critic.parameters(), before):
        assert parameter is old and parameter.requires_grad
    one_loss(agent, "critic").sum().backward()
    assert all(parameter.grad is not None for parameter in before)


# ======================================================================================
# The penalty in closed form
# ======================================================================================


def gap_of(q, log_mu, q_data=0.0, temperature=1.0, **flags):
    """conservative_gap of one critic in one state, q a list of the proposals' values."""
    q = torch.tensor([[float(q_data), *q]])
    if log_mu is not None:
        log_mu = torch.tensor([log_mu])
    config = cql.TrainConfig(**flags)
    gap = cql.conservative_gap(q, log_mu, torch.tensor(temperature), config)
    assert gap.shape == (1,)
    return gap.item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("n_actions", [1, 4, 12])
def test_equal_values_leave_the_logarithm_of_the_count(n_actions, temperature):
    """Fault 'logsumexp over 3 values instead of 3K': the soft maximum of M equal values
    of density 1 is T log M above each of them; with the data's action, T log(M + 1)."""
    q = [0.7] * n_actions
    gap = gap_of(q, [0.0] * n_actions, 0.2, temperature)
    assert gap == pytest.approx(0.5 + temperature * math.log(n_actions), abs=1e-9)
    gap = gap_of(q, None, 0.7, temperature)
    assert gap == pytest.approx(temperature * math.log(n_actions + 1), abs=1e-9)


@pytest.mark.parametrize("temperature", [0.25, 4.0])
def test_temperature_divides_q_and_not_log_mu(temperature):
    """Fault 'temperature divides log mu too': the soft maximum of one action of density
    mu is Q - T log mu."""
    gap = gap_of([2.0], [math.log(0.1)], 0.0, temperature)
    assert gap == pytest.approx(2.0 - temperature * math.log(0.1), abs=1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_critics_do_not_mix_in_the_penalty(k, batched):
    """Fault 'logsumexp that mixes the critics': values and gradients of one critic do
    not change with the weights of another."""
    agent = tiny_agent(n_critics=3, cql_backward_actions=k)
    agent.layout.batched = batched
    batch, noise = transitions(1, 5), agent.draw(0, 5)

    def by_critic():
        _, metrics, _ = gradients(agent, batch, noise)
        found = {name: x.clone() for name, x in metrics.items() if "{j}" in name}
        for name, parameter in agent.critic.named_parameters():
            found[name] = parameter.grad.flatten(2)
        return found

    before = by_critic()
    with torch.no_grad():
        for parameter in agent.critic.parameters():
            parameter[:, 1] += 0.5
    after = by_critic()
    assert len(before) == 8 + 2 * 4
    for name, value in before.items():
        same = (value == after[name]).reshape(3, -1).all(-1)
        assert same.tolist() == [True, False, True], name


def test_gap_is_clamped_per_sample_before_the_mean():
    """Bounds of 0 and 2 turn the gaps 4, -2 and 1 into 2, 0 and 1."""
    q = torch.tensor([[0.0, 4.0], [0.0, -2.0], [0.0, 1.0]])
    config = cql.TrainConfig(cql_clip_diff_min=0.0, cql_clip_diff_max=2.0)
    gap = cql.conservative_gap(q, torch.zeros(3, 1), torch.ones(()), config)
    assert gap.tolist() == [2.0, 0.0, 1.0]


def test_all_proposals_reach_the_critics_at_the_states_of_the_data(monkeypatch):
    """Fault 'logsumexp over 3 values': 3K proposals, K uniform, K from pi(.|s) and K
    from pi(.|s'), are evaluated beside the data's action at s, not s'; each counts."""
    agent, calls = tiny_agent(cql_n_actions=4), []
    batch, noise = transitions(1, 5), agent.draw(0, 5)
    forward = agent.critic.forward

    def recorded(observations, actions, bf16=False):
        q = forward(observations, actions, bf16)
        calls.append((observations, actions, q))
        return q

    monkeypatch.setattr(agent.critic, "forward", recorded)
    losses, _ = losses_of(agent, batch, noise)
    calls = calls[-2:]  # one of each critic
    own, following = batch["observations"][0], batch["next_observations"][0]
    policy = mapped(lambda x: x[0], agent.weights["policy"])
    for states, actions, _ in calls:
        assert torch.equal(states, own)
        assert actions.shape == (5, 1 + 12, ACT)
        assert torch.equal(actions[:, 0], batch["actions"][0])
        assert torch.equal(actions[:, 1:5], noise["uniforms"][0])
        for first, at in ((5, own), (9, following)):
            normals = noise["proposal_normals"][0, :, first - 5 : first - 1]
            mean, log_std = cql.call(agent.policy, policy, at)
            drawn = (mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * normals).tanh()
            torch.testing.assert_close(actions[:, first : first + 4], drawn, **close)
    gradients = torch.autograd.grad(losses.sum(), [q for _, _, q in calls])
    for gradient in gradients:
        assert (gradient[:, 1:] > 0).all()  # the penalty pushes every one of them down
        # ... with softmax weights, which sum to cql_alpha over the batch.
        total = torch.tensor(agent.config.cql_alpha)
        torch.testing.assert_close(gradient[:, 1:].sum(), total, **close)


def test_terminal_transitions_do_not_bootstrap_and_others_do(monkeypatch):
    """The target of a terminal transition is its reward."""
    agent = tiny_agent(discount=0.9)
    batch, noise = transitions(1, 6), agent.draw(0, 6)
    target, metrics = target_of(agent, batch, noise, monkeypatch)
    rewards, ended = batch["rewards"][0], batch["terminations"][0] == 1
    assert 0 < ended.sum() < 6
    assert torch.equal(target[ended], rewards[ended])
    targets = mapped(lambda x: x[0], agent.weights["target_critic"])
    actions = sampled(agent, batch, noise)["next_actions"]
    q = agent.q_values(targets, batch["next_observations"][0], actions)  # [N, B, 1]
    expected = rewards + 0.9 * q[..., 0].amin(0)
    torch.testing.assert_close(target[~ended], expected[~ended], **close)
    assert metrics["average_target_q"].item() == pytest.approx(q.amin(0).mean().item())


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
    "cal_ql": dict(cal_ql=True, seed=[5, 7]),
    "two_proposals": dict(penalty="two_proposals"),
    "policy_kl": dict(penalty="policy_kl", cql_temp=0.5),
    "mean": dict(penalty="mean", cal_ql=True, seed=[5, 7]),
    "states": dict(LAGRANGE, cql_states=3, cql_clip_diff_max=3.5),
    "states_cal_ql": dict(cql_states=2, cal_ql=True, seed=[5, 7]),
}


def gradients(agent, batch, noise):
    """Losses and metrics, and the critics' gradients flattened to [R, parameters]."""
    agent.zero_grad()
    losses, metrics = losses_of(agent, batch, noise)
    losses.sum().backward()
    grads = [p.grad.flatten(1) for p in agent.critic.parameters()]
    return losses.detach(), metrics, torch.cat(grads, 1)


def repeated(n, batch, noise):
    """The batch and its noise n times over, with new resampling offsets."""
    R, N, B = noise["resampling_offset"].shape
    batch = mapped(lambda x: x.repeat_interleave(n, 1), batch)
    noise = mapped(lambda x: x.repeat_interleave(n, 1), noise)
    return batch, {**noise, "resampling_offset": torch.rand(R, N, n * B)}


STATES = {
    "exact": {},
    "lagrange": LAGRANGE,
    "clip": dict(cql_clip_diff_min=2.7, cql_clip_diff_max=3.5),
    "unweighted": dict(cql_importance_sample=False),
    "cal_ql": dict(cal_ql=True, seed=[5, 7]),
    "sampled": dict(cql_backward_actions=2),
    "policy_kl": dict(penalty="policy_kl", cql_temp=0.5),
}


@pytest.mark.parametrize("flags", STATES.values(), ids=STATES)
def test_the_penalty_on_part_of_the_batch_is_unbiased(flags):
    """Loss and gradient average to those of the whole batch over all rotations of the
    batch, in which each state is among the first n equally often."""
    flags = {"seed": [0, 1], **flags}
    whole = tiny_agent(**flags)
    agent = tiny_agent(**flags, cql_states=2)
    batch, noise = transitions(2, 5), whole.draw(0, 5)
    wanted_loss, _, wanted = gradients(whole, batch, noise)
    losses, grads = [], []
    for turn in range(5):
        turned = mapped(lambda x: x.roll(turn, 1), noise)  # noqa: B023
        parts = {
            "uniforms": turned["uniforms"][:, :2],
            "proposal_normals": turned["proposal_normals"][:, :2],
        }
        if "resampling_offset" in noise:  # [R, N, B]
            offset = noise["resampling_offset"].roll(turn, 2)
            parts["resampling_offset"] = offset[..., :2]
        turned_batch = mapped(lambda x: x.roll(turn, 1), batch)  # noqa: B023
        loss, _, gradient = gradients(agent, turned_batch, {**turned, **parts})
        losses.append(loss)
        grads.append(gradient)
    torch.testing.assert_close(torch.stack(losses).mean(0), wanted_loss, **close)
    torch.testing.assert_close(torch.stack(grads).mean(0), wanted, **close)
    assert (grads[0] - grads[1]).norm() > 0.01 * wanted.norm()


@pytest.mark.parametrize("flags", SAMPLED.values(), ids=SAMPLED)
def test_the_sampled_gradient_is_unbiased(flags):
    """With k of the actions in the graph, the mean of 12,000 gradients equals the exact
    gradient within its standard error, for each parameter."""
    torch.manual_seed(0)
    flags = {"cql_backward_actions": 1, "seed": [0, 1], **flags}
    agent = tiny_agent(**flags)
    exact = tiny_agent(**{**flags, "cql_backward_actions": 0})
    batch, noise = transitions(2, 4), agent.draw(0, 4)
    wanted = gradients(exact, batch, noise)[2]
    draws = [gradients(agent, *repeated(300, batch, noise))[2] for _ in range(40)]
    draws = torch.stack(draws)  # [40, R, parameters], each a mean of 300
    error = draws.std(0) / math.sqrt(len(draws))
    random = error > 1e-7 * wanted.abs().max()
    assert random.float().mean() > 0.1  # the others: dead units, data alone, all clamped
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
    batch, noise = transitions(len(agent.runs), 6), agent.draw(0, 6)
    losses, metrics, _ = gradients(agent, batch, noise)
    wanted, others, _ = gradients(exact, batch, noise)
    torch.testing.assert_close(losses, wanted, **close)
    torch.testing.assert_close(metrics, others, **close)


@pytest.mark.parametrize("k", [0, 2])
def test_a_bound_of_minus_infinity_is_plain_cql(k):
    """Without bounds Cal-QL is plain CQL: losses, metrics and gradients."""
    bounded = tiny_agent(cal_ql=True, cql_backward_actions=k)
    plain = tiny_agent(cql_backward_actions=k)
    batch, noise = transitions(1, 6), plain.draw(0, 6)
    batch["mc_returns"] = torch.full((1, 6), -INF)
    losses, metrics, slopes = gradients(bounded, batch, noise)
    assert metrics.pop("bound_rate").item() == 0
    for actual, wanted in zip((losses, metrics, slopes), gradients(plain, batch, noise)):
        torch.testing.assert_close(actual, wanted, **close)


def test_systematic_resampling():
    """The counts of k equally spaced points differ from k p by less than one and average
    to k p over all offsets; an action without weight is never drawn."""
    torch.manual_seed(0)
    weights, k, n = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.27, 0.03, 0.0]), 4, 1000
    q = torch.randn(8).expand(n, 8)
    offsets = torch.arange(n) / n  # 0 is among them, where a tie could err

    def gap_of(q):
        return (q[:, 1:] * weights).sum(-1) - 0.7 * q[:, 0]

    gap, indices, slopes = cql.sampled_backward(gap_of, q, offsets, k)
    assert torch.equal(gap, gap_of(q)) and indices.shape == (n, k)
    counts = torch.nn.functional.one_hot(indices, 7).sum(-2)
    assert ((counts - k * weights).abs() < 1).all()
    mean = counts.double().mean(0)
    torch.testing.assert_close(mean, k * weights, rtol=0, atol=2 / n)
    assert (counts[:, weights == 0] == 0).all()
    torch.testing.assert_close(slopes[0], torch.tensor([-0.7] + [0.25] * 4))


def test_a_falling_slope_keeps_its_sign():
    """A penalty that rewards some actions pushes their Q up, not down."""
    weights, n = torch.tensor([0.6, -0.3, 0.1]), 1000
    offsets = (torch.arange(n) + 0.5) / n
    q = torch.zeros(n, 4)
    _, indices, slopes = cql.sampled_backward(
        lambda q: (q[:, 1:] * weights).sum(-1), q, offsets, 2
    )
    mean = torch.zeros(n, 3).scatter_add_(-1, indices, slopes[:, 1:]).mean(0)
    torch.testing.assert_close(mean, weights, rtol=0, atol=2 / n)


@pytest.mark.parametrize("k", [1, 3])
def test_a_gap_without_slopes_draws_an_action_of_no_weight(k):
    """A clamped gap has no slopes: indices stay in range, and all slopes are 0."""
    q, offsets = torch.randn(5, 7), torch.rand(5)
    result = cql.sampled_backward(lambda q: 0 * q.sum(-1) + 2.0, q, offsets, k)
    gap, indices, slopes = result
    assert (gap == 2).all() and (slopes == 0).all() and slopes.shape == (5, 1 + k)
    assert ((0 <= indices) & (indices < 6)).all()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("k", [0, 2])
def test_bf16_rounds_the_critics_and_nothing_else(k, batched):
    """Weights, gradients, targets and log-densities are float32. Q and the critics'
    gradients differ by bf16's rounding, no more and no less."""
    torch.set_default_dtype(torch.float32)
    flags = dict(cql_backward_actions=k, hidden_dim=64, seed=1, **LAGRANGE)
    agents = [tiny_agent(precision=name, **flags) for name in ("fp32", "bf16")]
    batch, noise = transitions(1, 64), agents[0].draw(0, 64)
    for agent in agents:
        agent.layout.batched = batched
    kinds = []
    for layer in agents[1].critic.net:
        layer.register_forward_hook(
            lambda layer, inputs, x: kinds.append((layer, inputs[0].dtype, x.dtype))
        )
    results = [gradients(agent, batch, noise) for agent in agents]
    last = agents[1].critic.net[-1]
    assert {kind[1:] for kind in kinds if kind[0] is last} == {(torch.float32,) * 2}
    assert torch.bfloat16 in {kind[2] for kind in kinds if kind[0] is not last}
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
    """Also the fault 'log_prob ignores a': the log-density is that of given actions."""
    mean, log_std = 0.3 * torch.randn(2, 5, ACT)
    normals = torch.randn(5, 7, ACT).clamp(-2, 2)  # atanh inverts tanh exactly enough
    actions, log_prob = cql.squash(mean, log_std, normals)
    assert actions.shape == (5, 7, ACT) and log_prob.shape == (5, 7)
    distribution = tanh_gaussian(mean.unsqueeze(1), log_std.unsqueeze(1))
    pre_tanh = mean.unsqueeze(1) + log_std.unsqueeze(1).exp() * normals
    torch.testing.assert_close(actions, pre_tanh.tanh(), **close)
    torch.testing.assert_close(
        log_prob, distribution.log_prob(actions), rtol=1e-6, atol=1e-6
    )
    given = torch.rand(5, ACT) * 1.98 - 0.99
    expected = tanh_gaussian(mean, log_std).log_prob(given)
    torch.testing.assert_close(
        cql.data_log_prob(mean, log_std, given), expected, **close
    )
    again = cql.data_log_prob(mean, log_std, actions[:, 0])
    torch.testing.assert_close(again, log_prob[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_std", [-20.0, 2.0])
@pytest.mark.parametrize("center", [-50.0, 0.0, 50.0])
def test_extreme_gaussians_have_finite_densities_and_gradients(center, log_std, dtype):
    """Saturated actions, both clamps of log std, and data on the bounds."""
    mean = torch.full((3, 1), center, dtype=dtype, requires_grad=True)
    log_stds = torch.full((3, 1), log_std, dtype=dtype, requires_grad=True)
    normals = torch.tensor([-5.0, 0.0, 5.0], dtype=dtype).expand(3, 3).unsqueeze(-1)
    actions, log_prob = cql.squash(mean, log_stds, normals)
    data = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype).reshape(3, 1)
    of_data = cql.data_log_prob(mean, log_stds, data)
    gradients = torch.autograd.grad((log_prob.sum(), of_data.sum()), (mean, log_stds))
    for tensor in (actions, log_prob, of_data, *gradients):
        assert torch.isfinite(tensor).all()
    # 1 - tanh(50)^2 is 0 in float64; its logarithm is 2 log 2 - 100.
    u = center + math.exp(log_std) * normals[0, :, 0].double()
    exact = -0.5 * normals[0, :, 0].double() ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    exact = exact - (
        2 * math.log(2) - 2 * u.abs() - 2 * torch.log1p((-2 * u.abs()).exp())
    )
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(
        log_prob[0].double(), exact, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("mean, log_std", [(0.0, -1.0), (0.8, -0.3), (-1.5, 0.2)])
def test_density_integrates_to_one(mean, log_std):
    edges = torch.linspace(-1, 1, 200_001)
    actions = ((edges[1:] + edges[:-1]) / 2).reshape(-1, 1)
    mean, log_std = torch.full_like(actions, mean), torch.full_like(actions, log_std)
    mass = cql.data_log_prob(mean, log_std, actions).exp().sum() * 1e-5
    assert mass.item() == pytest.approx(1.0, abs=1e-4)


# ======================================================================================
# Plain networks, stacked
# ======================================================================================


def weights_of(network):
    return dict(network.named_parameters())


def assert_same_gradients(actual, expected):
    """Compare two lists of gradients."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3)])
@pytest.mark.parametrize("kind", [cql.Policy, cql.Critic, cql.DiscreteCritic])
def test_stacked_networks_are_every_members_own(kind, lead):
    """Values and gradients, of parameters and inputs, equal those of each member's plain
    module, called as any module is."""
    torch.manual_seed(0)
    members = [kind(tiny(), OBS, ACT) for _ in range(math.prod(lead))]
    for member in members:
        for parameter in member.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
    copies = copy.deepcopy(members)
    stacked = cql.stack(members, lead)
    weights = weights_of(stacked)
    assert all(x.shape[: len(lead)] == lead for x in weights.values())
    sizes = [(5, OBS)] + [(5, 7, ACT)] * (kind is cql.Critic)
    inputs = [torch.randn(*lead, *size, requires_grad=True) for size in sizes]

    def function(*args):
        return cql.call(stacked, *args)

    for _ in lead:
        function = torch.func.vmap(function)
    outputs = function(weights, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    directions = [torch.randn_like(output) for output in outputs]
    leaves = [*weights.values(), *inputs]
    found = torch.autograd.grad(outputs, leaves, directions)
    flat = [
        x.flatten(0, len(lead) - 1) for x in (*outputs, *directions, *inputs, *found)
    ]
    n = len(outputs)
    for m, member in enumerate(copies):
        own = [x[m].detach().requires_grad_() for x in flat[2 * n : 2 * n + len(inputs)]]
        wanted = member(*own)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for output, expected in zip(flat[:n], wanted, strict=True):
            torch.testing.assert_close(output[m], expected, **close)
        leaves = [*member.parameters(), *own]
        downstream = [x[m] for x in flat[n : 2 * n]]
        expected = torch.autograd.grad(wanted, leaves, downstream)
        assert_same_gradients([x[m] for x in flat[2 * n + len(inputs) :]], expected)


def test_stack_copies():
    """The members keep their own weights, and the stacked module is not theirs."""
    members = [cql.Policy(tiny(), OBS, ACT) for _ in range(2)]
    before = copy.deepcopy([member.state_dict() for member in members])
    stacked = cql.stack(members, (2,))
    for parameter in stacked.parameters():
        assert parameter.requires_grad and parameter.is_leaf
        parameter.data.zero_()
    for member, values in zip(members, before):
        for name, value in member.state_dict().items():
            assert torch.equal(value, values[name])


@pytest.mark.parametrize("n", [1, 3])
def test_inputs_of_another_number_of_runs_are_refused(n):
    """Two runs have no answer to inputs of one run or of three."""
    agent = tiny_agent(seed=[0, 1])
    with pytest.raises(ValueError):
        agent.layout(agent.action, agent.weights, torch.randn(n, 6, OBS))
    with pytest.raises(ValueError):
        agent.q(torch.randn(n, 6, OBS), torch.randn(n, 6, ACT))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("q_n_hidden_layers", [1, 2, 5])
@pytest.mark.parametrize("n_critics", [1, 2, 4])
def test_all_critics_have_the_layers_asked_for(n_critics, q_n_hidden_layers, batched):
    """Fault 'the second critic ignores q_n_hidden_layers'. The critics, whose first
    layer is split, equal plain networks on [s, a], each with its own weights, in values
    and in gradients of weights and actions."""
    depth = dict(q_n_hidden_layers=q_n_hidden_layers, hidden_dim=16)
    seed = [0, 1] if batched else 0
    agent = tiny_agent(n_critics=n_critics, seed=seed, **depth)
    R = len(agent.runs)
    assert agent.layout.batched == batched
    layers = [x for x in agent.critic.net if isinstance(x, torch.nn.Linear)]
    assert len(layers) == q_n_hidden_layers + 1
    assert len(agent.critic.net) == 2 * q_n_hidden_layers + 1
    states = torch.randn(R, 5, OBS, requires_grad=True)
    actions = torch.randn(R, 5, 3, ACT, requires_grad=True)
    q = agent.layout(agent.q_values, agent.weights["critic"], states, actions)
    assert q.shape == (R, n_critics, 5, 3)
    x = torch.cat([states.unsqueeze(2).expand(R, 5, 3, OBS), actions], -1)
    plain = []
    for r in range(R):
        for j in range(n_critics):
            y = x[r]
            for layer in layers:
                y = y.relu() if layer is not layers[0] else y
                y = y @ layer.weight[r, j].T + layer.bias[r, j]
            plain.append(y.squeeze(-1))
    plain = torch.stack(plain).view_as(q)
    torch.testing.assert_close(q, plain, **close)
    direction = torch.randn_like(q)
    inputs = [*agent.critic.parameters(), states, actions]
    found = torch.autograd.grad(q, inputs, direction)
    assert_same_gradients(found, torch.autograd.grad(plain, inputs, direction))
    for gradient in found[:-2]:
        assert (gradient.flatten(2).abs().sum(-1) > 0).all()  # all layers are used


def test_gradients_of_a_network_pass_autograds_own_check():
    """The split first layer included."""
    critic = cql.Critic(tiny(q_n_hidden_layers=2), OBS, ACT)
    weights = [x.detach().requires_grad_() for x in critic.parameters()]
    names = list(weights_of(critic))

    def q(states, actions, *weights):
        return cql.call(critic, dict(zip(names, weights)), states, actions)

    inputs = torch.randn(4, OBS), torch.randn(4, 2, ACT)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(q, (*inputs, *weights))


# ======================================================================================
# Both layouts of a single run
# ======================================================================================


def of_single_runs():
    """CASES and SAMPLED without lists and without what only the loops need."""
    cases = dict(CASES)
    for name, flags in SAMPLED.items():
        cases[f"sampled_{name}"] = {"cql_backward_actions": 2, **flags}
    for name, flags in cases.items():
        kept = {}
        for flag, value in flags.items():
            if flag not in ("update", "log_std"):
                kept[flag] = value[0] if isinstance(value, list) else value
        cases[name] = kept
    return cases


SINGLE = of_single_runs()
PRECISE = dict(rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("flags", SINGLE.values(), ids=SINGLE)
def test_both_layouts_of_a_single_run_are_equal(flags):
    """Losses, metrics, gradients, act and q with vmap and with critics in a loop."""
    agent = tiny_agent(**flags)
    batch, noise = transitions(1, 6), agent.draw(0, 6)
    cloning, _ = cql.stage_of(agent.config, 0)
    found = []
    for batched in (False, True):
        agent.layout.batched = batched
        found.append(answers(agent, batch, noise, cloning))
    assert_close(found[1], found[0], **PRECISE)


@pytest.mark.parametrize("flags", SINGLE.values(), ids=SINGLE)
def test_one_run_of_three_answers_as_it_does_alone(flags):
    """Losses, metrics, gradients, act and q of a stacked run equal those of a solo run
    with the same weights."""
    stacked, solo = tiny_agent(**{**flags, "seed": [0, 1, 2]}), tiny_agent(**flags)
    batch, noise = transitions(3, 6), stacked.draw(0, 6)
    cloning, _ = cql.stage_of(solo.config, 0)
    of_three = answers(stacked, batch, noise, cloning)
    for r in range(3):
        with torch.no_grad():
            for name, value in solo.run_tensors().items():
                value.copy_(stacked.run_tensors()[name][r : r + 1])
        parts = [mapped(lambda x: x[r : r + 1], x) for x in (batch, noise)]  # noqa: B023
        alone = answers(solo, *parts, cloning)
        own = mapped(lambda x: x[r : r + 1], of_three)  # noqa: B023
        assert_close(own, alone, **PRECISE)
