"""The losses of one CQL update in scalar arithmetic, with a loop for every dimension.

The formulas are those of Kumar et al. (arXiv 2006.04779) and Haarnoja et al. (arXiv
1812.05905). Nothing comes from cql.py except the names and shapes of its parameters.
Every function is for one run. A number may be complex: add i * h to a parameter, and the
imaginary part of a loss divided by h is its derivative, exact to rounding. So the same
lines give values and gradients, and nothing is detached: each loss is differentiated
with respect to the parameters that it trains, whatever else they feed.

The tiny agents and batches that the tests share follow below.
"""

import cmath
import functools
import math
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch.utils._pytree import tree_map

import cql

# The loss that trains a parameter, by the first part of the parameter's name.
TRAINED_BY = {
    "policy": "actor",
    "critic": "critic",
    "log_alpha": "temperature",
    "log_alpha_prime": "multiplier",
}


def clamp(x, low, high):
    return low if x.real < low else high if x.real > high else x


def less(x, y):
    return x.real < y.real


def least(values):
    return min(values, key=lambda x: x.real)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def logsumexp(values):
    top = max(x.real for x in values)
    return top + cmath.log(sum(cmath.exp(x - top) for x in values))


def activation(x):
    """The activation of all networks, and `output` below, are what `bend_every_network`
    changes."""
    return x if x.real > 0 else 0.0


def output(x):
    """What a network does to its last number: nothing."""
    return x


def layer(weight, bias, x):
    """A weight [out][in] and a bias [out] applied to x [in]."""
    y = []
    for row, constant in zip(weight, bias):
        y.append(constant + sum(w * v for w, v in zip(row, x)))
    return y


def mlp(layers, x):
    """Apply layers, pairs of a weight and a bias, with the activation between them."""
    *hidden, last = layers
    for weight, bias in hidden:
        x = [activation(v) for v in layer(weight, bias, x)]
    return layer(*last, x)


def network_layers(parameters: dict, network: str, member=None):
    """The layers of a network; with member, of the critic of that number."""
    layers = []
    while f"{network}.net.{2 * len(layers)}.weight" in parameters:  # ReLUs between them
        name = f"{network}.net.{2 * len(layers)}"
        weight = parameters[f"{name}.weight"]
        bias = parameters[f"{name}.bias"]
        if member is not None:
            weight, bias = weight[member], bias[member]
        layers.append((weight.tolist(), bias.tolist()))
    return layers


def critic_outputs(parameters: dict, network: str, n_critics: int, x):
    """The outputs of every critic for the input x, [N][outputs]."""
    outputs = []
    for j in range(n_critics):
        values = mlp(network_layers(parameters, network, j), x)
        outputs.append([output(value) for value in values])
    return outputs


def least_of_targets(values, keys, n):
    """The minimum of all values, or of the n with the largest keys (REDQ's subset)."""
    if n is not None:
        order = sorted(range(len(values)), key=lambda j: -keys[j])
        values = [values[j] for j in order[:n]]
    return least(values)


def of_run(tensors: dict, r: int) -> dict:
    """Run r's part of a batch or of noise, as nested lists by name."""
    return {name: tensor[r].tolist() for name, tensor in tensors.items()}


class Row(NamedTuple):
    """One critic's values in one state, and the penalty's numbers from them."""

    q_data: complex
    q: list  # of the 3K proposals
    bounded: list  # the same under Cal-QL's bound
    gap: complex
    clamped: complex


class Reference:
    """One run: its parameters by name, its flags, its part of batch and noise."""

    def __init__(self, agent, batch, noise, r, cloning=False):
        """Take run r of an agent, with copies of its parameters."""
        self.parameters = {}
        for name, value in agent.named_parameters():
            self.parameters[name] = value.detach()[r].numpy().copy()
        self.config, self.sweep = agent.config, agent.runs[r]
        self.batch, self.noise = of_run(batch, r), of_run(noise, r)
        self.cloning = cloning

    # Networks

    def gaussian(self, state):
        outputs = mlp(network_layers(self.parameters, "policy"), state)
        A = len(outputs) // 2
        multiplier = self.parameters["policy.log_std_multiplier"].item()
        offset = self.parameters["policy.log_std_offset"].item()
        log_stds = [clamp(multiplier * x + offset, -20.0, 2.0) for x in outputs[A:]]
        return [output(x) for x in outputs[:A]], [output(x) for x in log_stds]

    def log_prob(self, state, pre_tanh, normals):
        """Log-density of tanh(pre_tanh): a Gaussian's, minus log(1 - tanh^2)."""
        _, log_stds = self.gaussian(state)
        total = 0.0
        for u, log_std, z in zip(pre_tanh, log_stds, normals):
            total += -z * z / 2 - log_std - math.log(2 * math.pi) / 2
            total += 2 * cmath.log(cmath.cosh(u))  # 1 - tanh^2 = 1 / cosh^2
        return total

    def act(self, state, normals):
        """An action and its log-density."""
        means, log_stds = self.gaussian(state)
        pre_tanh = [m + cmath.exp(s) * n for m, s, n in zip(means, log_stds, normals)]
        return [cmath.tanh(u) for u in pre_tanh], self.log_prob(state, pre_tanh, normals)

    def log_prob_of_data(self, state, action):
        """Log-density of a dataset action, clipped because atanh(+-1) is infinite."""
        pre_tanh = [math.atanh(clamp(x, -1 + 1e-5, 1 - 1e-5)) for x in action]
        means, log_stds = self.gaussian(state)
        z = [(u - m) / cmath.exp(s) for u, m, s in zip(pre_tanh, means, log_stds)]
        return self.log_prob(state, pre_tanh, z)

    def critics(self, network, state, action):
        """Q of every critic, [N]."""
        n = self.config.n_critics
        outputs = critic_outputs(self.parameters, network, n, state + action)
        return [values[0] for values in outputs]

    # Losses

    @property
    def alpha(self):
        if not self.config.use_automatic_entropy_tuning:
            return self.config.alpha_multiplier
        log_alpha = self.parameters["log_alpha"].item()
        return self.config.alpha_multiplier * cmath.exp(log_alpha).real

    def log_pi(self):
        """Log-density of the actor's own action in each state."""
        pairs = zip(self.batch["observations"], self.noise["normals"])
        return [self.act(state, normals[0])[1] for state, normals in pairs]

    def temperature(self):
        if not self.config.use_automatic_entropy_tuning:
            return 0.0
        log_alpha, A = self.parameters["log_alpha"].item(), len(self.batch["actions"][0])
        return -mean(log_alpha * (log_pi - A) for log_pi in self.log_pi())

    def actor(self):
        losses, sizes, distances = [], [], []
        for b, state in enumerate(self.batch["observations"]):
            action, log_pi = self.act(state, self.noise["normals"][b][0])
            if self.cloning:
                worth = self.log_prob_of_data(state, self.batch["actions"][b])
            else:
                least_or_mean = least if self.config.n_target_critics is None else mean
                worth = least_or_mean(self.critics("critic", state, action))
            losses.append(self.alpha * log_pi - worth)
            sizes.append(abs(complex(worth).real))  # a constant of the loss
            means, _ = self.gaussian(state)
            for u, recorded in zip(means, self.batch["actions"][b]):
                distances.append((cmath.tanh(u) - recorded) ** 2)
        weight = 0.0 if self.cloning else self.config.bc_weight
        return mean(losses) + weight * mean(sizes) * mean(distances)

    def targets(self):
        """TD targets, and the values of next states that they hold."""
        targets, values = [], []
        n_targets = self.config.cql_n_actions if self.config.cql_max_target_backup else 1
        n, keys = self.config.n_target_critics, self.noise.get("subset_keys")
        for b, state in enumerate(self.batch["next_observations"]):
            best, best_log_pi = -math.inf, None
            for normals in self.noise["next_normals"][b][:n_targets]:
                action, log_pi = self.act(state, normals)
                qs = self.critics("target_critic", state, action)
                q = least_of_targets(qs, keys, n).real
                if q > best:
                    best, best_log_pi = q, log_pi.real
            if self.config.backup_entropy:
                best -= self.alpha * best_log_pi
            kept = 0.0 if self.batch["terminations"][b] else 1.0
            reward = self.batch["rewards"][b]
            discount = self.config.discount
            if self.config.n_steps > 1:
                discount = self.batch["discounts"][b]
            targets.append(reward + discount * kept * best)
            values.append(best)
        return targets, values

    def proposals(self, b):
        """Actions and log-densities: K uniform, K from pi(.|s), K from pi(.|s')."""
        K, A = self.config.cql_n_actions, len(self.batch["actions"][b])
        state, following = (
            self.batch["observations"][b],
            self.batch["next_observations"][b],
        )
        found = [(action, -A * math.log(2.0)) for action in self.noise["uniforms"][b]]
        normals = self.noise["proposal_normals"][b]
        found += [self.act(state, z) for z in normals[:K]]
        found += [self.act(following, z) for z in normals[K:]]
        assert len(found) == 3 * K
        return found

    def bounded(self, q, b):
        """Q under Cal-QL: that of policy proposals is at least the return-to-go."""
        if not self.config.cal_ql:
            return q
        K, returns = self.config.cql_n_actions, self.batch["mc_returns"][b]
        return q[:K] + [x if x.real > returns else returns for x in q[K:]]

    def gap(self, q, q_data, log_mu):
        """The soft maximum of q minus q_data, in the form that config.penalty names."""
        K, T = self.config.cql_n_actions, self.sweep["cql_temp"]
        weighted = [x / T - density for x, density in zip(q, log_mu)]
        if self.config.penalty == "mean":
            return mean(q[K : 2 * K]) - q_data
        if self.config.penalty == "policy_kl":
            logits = [x / T for x in q[K : 2 * K]]
            return T * (logsumexp(logits) - math.log(K)) - q_data
        if self.config.penalty == "two_proposals":
            return T * (logsumexp(weighted[: 2 * K]) - math.log(2 * K)) - q_data
        if self.config.cql_importance_sample:
            return T * logsumexp(weighted) - q_data
        return T * logsumexp([x / T for x in [*q, q_data]]) - q_data

    def gaps(self):
        """A Row for every critic and every penalized state."""
        n = len(self.noise["uniforms"])
        assert n == (self.config.cql_states or len(self.batch["rewards"]))
        critics = [[] for _ in range(self.config.n_critics)]
        for b, state in enumerate(self.batch["observations"][:n]):
            data = self.critics("critic", state, self.batch["actions"][b])
            proposals = self.proposals(b)
            others = [self.critics("critic", state, action) for action, _ in proposals]
            log_mu = [density for _, density in proposals]
            for j, rows in enumerate(critics):
                q = [other[j] for other in others]
                bounded = self.bounded(q, b)
                gap = self.gap(bounded, data[j], log_mu)
                bounds = self.config.cql_clip_diff_min, self.config.cql_clip_diff_max
                rows.append(Row(data[j], q, bounded, gap, clamp(gap, *bounds)))
        return critics

    def alpha_prime(self):
        value = cmath.exp(self.parameters["log_alpha_prime"].item())
        return clamp(value, 0.0, 1e6)

    def weight(self):
        """The weight of the gap, and the target that is subtracted from the gap."""
        if not self.config.cql_lagrange:
            return self.sweep["cql_alpha"], 0.0
        weight = self.sweep["cql_alpha"] * self.alpha_prime().real
        return weight, self.sweep["cql_target_action_gap"]

    def critic(self):
        """Sum over critics of the TD error and the weighted penalty."""
        total = sum(self.td_errors())
        weight, gap_target = self.weight()
        for rows in self.gaps():
            total += weight * (mean(row.clamped for row in rows) - gap_target)
        return total

    def q_data(self):
        """Q of the dataset actions, [N][B]."""
        pairs = zip(self.batch["observations"], self.batch["actions"])
        return list(zip(*[self.critics("critic", *pair) for pair in pairs]))

    def td_errors(self):
        """Mean squared TD error of each critic."""
        targets, _ = self.targets()
        errors = []
        for values in self.q_data():
            errors.append(mean((q - y) ** 2 for q, y in zip(values, targets)))
        return errors

    def multiplier(self):
        if not self.config.cql_lagrange:
            return 0.0
        weight, target = self.sweep["cql_alpha"], self.sweep["cql_target_action_gap"]
        gaps = [mean(row.clamped for row in rows).real for rows in self.gaps()]
        return -mean(self.alpha_prime() * weight * (gap - target) for gap in gaps)

    def metrics(self):
        """What CORL logs under these names; {j} stands for a list over critics."""
        K, gaps = self.config.cql_n_actions, self.gaps()
        _, values = self.targets()

        def by_critic(value):
            return [mean(value(row) for row in rows) for rows in gaps]

        weight, gap_target = self.weight()
        diffs = by_critic(lambda row: row.clamped)
        found = {
            "alpha_loss": self.temperature(),
            "alpha": self.alpha,
            "policy_loss": self.actor(),
            "log_pi": mean(self.log_pi()),
            "average_target_q": mean(values),
            "qf{j}_loss": self.td_errors(),
            "average_qf{j}": [mean(values) for values in self.q_data()],
            "cql_q{j}_rand": by_critic(lambda row: mean(row.bounded[:K])),
            "cql_q{j}_current_actions": by_critic(
                lambda row: mean(row.bounded[K : 2 * K])
            ),
            "cql_q{j}_next_actions": by_critic(lambda row: mean(row.bounded[2 * K :])),
            "cql_std_q{j}": by_critic(
                lambda row: np.std([row.q_data, *row.bounded], ddof=1)
            ),
            "cql_qf{j}_diff": diffs,
            "cql_min_qf{j}_loss": [weight * (diff - gap_target) for diff in diffs],
            "alpha_prime": self.alpha_prime() if self.config.cql_lagrange else 0.0,
            "alpha_prime_loss": self.multiplier(),
        }
        if self.config.cal_ql:
            lifted = by_critic(lambda row: 1.5 * mean(map(less, row.q, row.bounded)))
            found["bound_rate"] = mean(lifted)  # it can lift 2K of the 3K
        return found

    def derivative(self, name, direction, h=1e-30):
        """Derivative of the loss that trains a parameter, along a direction of its
        shape."""
        loss = TRAINED_BY[name.split(".")[0]]
        original = self.parameters[name]
        self.parameters[name] = original + 1j * h * direction
        value = complex(getattr(self, loss)())
        self.parameters[name] = original
        return value.imag / h


def bend_every_network(monkeypatch):
    """Make the sine the activation of every network and the last operation of its
    forward, in cql.py and here."""

    def bent_activation(self, x):
        return x.sin()

    monkeypatch.setattr(torch.nn.ReLU, "forward", bent_activation)
    for network in (cql.Policy, cql.Critic, cql.DiscreteCritic):

        def forward(*inputs, original=network.forward):
            return tree_map(torch.sin, original(*inputs))

        monkeypatch.setattr(network, "forward", forward)
    monkeypatch.setitem(globals(), "activation", cmath.sin)
    monkeypatch.setitem(globals(), "output", cmath.sin)


# Tiny agents, batches and noise

OBS, ACT = 3, 2


def in_float64():
    """Body of a fixture: set a seed, and float64 as the default type for the test."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(**flags) -> cql.TrainConfig:
    """A config with small networks and high learning rates."""
    small = dict(hidden_dim=6, cql_n_actions=2, policy_lr=1e-2, qf_lr=1e-2)
    return cql.TrainConfig(**{**small, **flags})


def box_task(low=-1.0, high=1.0, observation_dim=OBS, action_dim=ACT) -> cql.Task:
    """A task of continuous actions between two numbers, or two arrays [A]."""
    observations = gym.spaces.Box(-np.inf, np.inf, (observation_dim,))
    low, high = np.full(action_dim, low, float), np.full(action_dim, high, float)
    return cql.make_task(observations, gym.spaces.Box(low, high, dtype=np.float64))


def scrambled(agent, scale: float = 0.7):
    """Add noise to every parameter of the agent, so that target critics differ from
    critics and no bias is 0; return the agent."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))
    return agent


def tiny_agent(**flags) -> cql.ContinuousCQL:
    return scrambled(cql.ContinuousCQL(tiny(**flags), box_task()))


def transitions(*shape: int, seed: int = 1, observation_dim=OBS, action_dim=ACT) -> dict:
    """Random transitions of the given leading shape; a third of them terminate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*shape, *size, generator=generator)

    return {
        "observations": normal(observation_dim),
        "actions": normal(action_dim).clamp(-1, 1),  # some on the bounds
        "rewards": normal(),
        "next_observations": normal(observation_dim),
        "terminations": (torch.rand(shape, generator=generator) < 1 / 3).to(normal()),
        "mc_returns": normal() / 3,
        "discounts": torch.rand(shape, generator=generator).to(normal()),
    }


def mapped(function, tensors: dict) -> dict:
    """Apply a function to every tensor of a batch or of noise."""
    return {name: function(tensor) for name, tensor in tensors.items()}


def rows(data: dict, fractions) -> dict:
    """The transitions of one-dimensional data at fractions [R, B] of its length."""
    indices = (fractions * len(data["rewards"])).long()
    return mapped(lambda tensor: tensor[indices], data)


def losses_of(agent, batch: dict, noise: dict, cloning=False):
    """The losses [R] of a prepared batch of all runs, and the metrics."""
    losses = functools.partial(agent.losses, cloning=cloning)
    return agent.layout(losses, agent.weights, batch, noise, agent.sweep)


def answers(agent, batch: dict, noise: dict, cloning=False) -> dict:
    """All that an agent computes from a prepared batch, by name: losses, metrics,
    gradients, actions and Q values, each [R, ...]."""
    agent.zero_grad()
    losses, metrics = losses_of(agent, batch, noise, cloning)
    losses.sum().backward()
    found = {"losses": losses.detach()}
    found |= {name: value.detach() for name, value in metrics.items()}
    for name, parameter in agent.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    observations = batch["observations"]
    found["act"] = torch.as_tensor(agent.act(observations))
    if not agent.task.discrete:
        normals = noise["normals"].squeeze(2)
        found["act, sampled"] = torch.as_tensor(agent.act(observations, normals))
    else:
        found["q of all actions"] = agent.q(observations)
    found["q"] = agent.q(observations, batch["actions"])
    return found


def assert_close(actual: dict, expected: dict, **tolerance):
    """Compare two dictionaries of tensors."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name}: {actual[name]} is not {value}"
        torch.testing.assert_close(actual[name], value, **tolerance, msg=message)


def train(agent, data: dict, n_updates: int, batch_size: int = 8, first: int = 0):
    """Make updates as the script does, counted from `first`, with batches and noise from
    the agent's draws. Return the last one's metrics."""
    for update in range(first, first + n_updates):
        noise = agent.draw(update, batch_size)
        stage = cql.stage_of(agent.config, update)
        metrics = agent.update(rows(data, noise["fractions"]), noise, *stage)
    return metrics


def trained(agent) -> dict:
    """Copies of all parameters, which are what an update changes, by name."""
    return {name: value.detach().clone() for name, value in agent.named_parameters()}
