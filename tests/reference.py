"""The losses of one CQL update, slowly: scalars, and a loop for every dimension.

Written from the formulas (Kumar et al., arXiv 2006.04779; Haarnoja et al., 1812.05905)
and from nothing of cql.py but the names and layout of its parameters. Every function is
for one run. A number may be complex: perturb a parameter by i * h, and the imaginary
part of a loss over h is its derivative, exact to rounding. So the lines that give the
values give the gradients too, and nothing is ever detached: a loss is differentiated
with respect to the parameters it trains, whatever else they feed.

Below them, the tiny agents and batches that the tests share.
"""

import cmath
import math

import numpy as np
import torch

import cql

# What each loss trains, by the first part of a parameter's name.
TRAINED_BY = {
    "policy": "actor",
    "critic": "critic",
    "log_alpha": "temperature",
    "log_alpha_prime": "multiplier",
}


def clamp(x, low, high):
    return low if x.real < low else high if x.real > high else x


def least(values):
    return min(values, key=lambda x: x.real)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def logsumexp(values):
    top = max(x.real for x in values)
    return top + cmath.log(sum(cmath.exp(x - top) for x in values))


def mlp(layers, x):
    """layers: pairs of a weight [in][out] and a bias [1][out]; ReLU between them."""
    for depth, (weight, bias) in enumerate(layers):
        y = []
        for o in range(len(bias[0])):
            y.append(bias[0][o] + sum(x[i] * weight[i][o] for i in range(len(x))))
        x = [v if v.real > 0 else 0.0 for v in y] if depth + 1 < len(layers) else y
    return x


class Reference:
    """One run: its parameters, name -> array; flags; batch and noise without the R."""

    def __init__(self, parameters, config, sweep: dict, batch, noise, step: int = 0):
        self.parameters, self.config, self.sweep = parameters, config, sweep
        self.batch = [array.tolist() for array in batch]
        self.noise = [array.tolist() for array in noise]
        self.cloning = step < config.bc_steps

    # Networks

    def layers(self, network, member=None):
        layers, i = [], 0
        while f"{network}.layers.{i}.weight" in self.parameters:
            names = (f"{network}.layers.{i}.{kind}" for kind in ("weight", "bias"))
            arrays = [self.parameters[name] for name in names]
            layers.append(
                [(a if member is None else a[member]).tolist() for a in arrays]
            )
            i += 1
        return layers

    def gaussian(self, state):
        outputs = mlp(self.layers("policy"), state)
        A = len(outputs) // 2
        multiplier, offset = (
            self.parameters[f"policy.log_std_{name}"].item()
            for name in ("multiplier", "offset")
        )
        return outputs[:A], [
            clamp(multiplier * x + offset, -20.0, 2.0) for x in outputs[A:]
        ]

    def log_prob(self, state, pre_tanh, normals):
        """Of tanh(pre_tanh): a Gaussian's log density minus log(1 - tanh^2)."""
        _, log_stds = self.gaussian(state)
        total = 0.0
        for u, log_std, z in zip(pre_tanh, log_stds, normals):
            total += -z * z / 2 - log_std - math.log(2 * math.pi) / 2
            total += 2 * cmath.log(cmath.cosh(u))  # 1 - tanh^2 = 1 / cosh^2
        return total

    def act(self, state, normals):
        """An action and its log density."""
        means, log_stds = self.gaussian(state)
        pre_tanh = [m + cmath.exp(s) * n for m, s, n in zip(means, log_stds, normals)]
        return [cmath.tanh(u) for u in pre_tanh], self.log_prob(state, pre_tanh, normals)

    def log_prob_of_data(self, state, action):
        """Actions are pulled off the bounds, where atanh is infinite."""
        pre_tanh = [math.atanh(clamp(x, -1 + 1e-5, 1 - 1e-5)) for x in action]
        means, log_stds = self.gaussian(state)
        z = [(u - m) / cmath.exp(s) for u, m, s in zip(pre_tanh, means, log_stds)]
        return self.log_prob(state, pre_tanh, z)

    def critics(self, network, state, action):
        """Q of every critic."""
        n_critics = len(self.parameters[f"{network}.layers.0.weight"])
        return [
            mlp(self.layers(network, j), state + action)[0] for j in range(n_critics)
        ]

    # Losses

    @property
    def alpha(self):
        if not self.config.use_automatic_entropy_tuning:
            return self.config.alpha_multiplier
        log_alpha = self.parameters["log_alpha"].item()
        return self.config.alpha_multiplier * cmath.exp(log_alpha).real

    def log_pi(self):
        """Of the actor's own action, state by state."""
        states, normals = self.batch[0], self.noise[0]
        return [self.act(s, normals[b][0])[1] for b, s in enumerate(states)]

    def temperature(self):
        if not self.config.use_automatic_entropy_tuning:
            return 0.0
        log_alpha, A = self.parameters["log_alpha"].item(), len(self.batch[1][0])
        return -mean(log_alpha * (log_pi - A) for log_pi in self.log_pi())

    def actor(self):
        losses = []
        for b, (state, data_action) in enumerate(zip(*self.batch[:2])):
            action, log_pi = self.act(state, self.noise[0][b][0])
            if self.cloning:
                worth = self.log_prob_of_data(state, data_action)
            else:
                qs = self.critics("critic", state, action)
                n = self.config.n_target_critics
                worth = least(qs) if n in (None, len(qs)) else mean(qs)
            losses.append(self.alpha * log_pi - worth)
        return mean(losses)

    def targets(self):
        """TD targets, and the values of the next states in them."""
        targets, values = [], []
        _, _, rewards, next_states, terminations, _ = self.batch
        n_targets = self.config.cql_n_actions if self.config.cql_max_target_backup else 1
        for b, state in enumerate(next_states):
            best, best_log_pi = -math.inf, None
            for normals in self.noise[1][b][:n_targets]:
                action, log_pi = self.act(state, normals)
                qs = self.critics("target_critic", state, action)
                if self.config.n_target_critics is not None:  # REDQ's subset
                    keys = self.noise[4] or [0.0] * len(qs)
                    order = sorted(range(len(qs)), key=lambda j: -keys[j])
                    qs = [qs[j] for j in order[: self.config.n_target_critics]]
                q = least(qs).real
                if q > best:
                    best, best_log_pi = q, log_pi.real
            if self.config.backup_entropy:
                best -= self.alpha * best_log_pi
            kept = 0.0 if terminations[b] else 1.0
            targets.append(rewards[b] + self.config.discount * kept * best)
            values.append(best)
        return targets, values

    def proposals(self, b):
        """Actions and log densities: K uniform, K from pi(.|s), K from pi(.|s')."""
        K, A = self.config.cql_n_actions, len(self.batch[1][b])
        found = [(action, -A * math.log(2.0)) for action in self.noise[2][b]]
        found += [self.act(self.batch[0][b], n) for n in self.noise[0][b][1:]]
        found += [self.act(self.batch[3][b], n) for n in self.noise[1][b][-K:]]
        assert len(found) == 3 * K
        return found

    def gaps(self):
        """Q of the data and of the proposals, gap before and after the clamp; each by
        critic, then by state."""
        T, rows = self.sweep["cql_temp"], []
        for b, state in enumerate(self.batch[0]):
            data = self.critics("critic", state, self.batch[1][b])
            proposals = self.proposals(b)
            others = [self.critics("critic", state, action) for action, _ in proposals]
            K = self.config.cql_n_actions
            for j, q_data in enumerate(data):
                q = [other[j] for other in others]
                bounded = list(q)
                if self.config.cal_ql:
                    returns = self.batch[5][b]
                    bounded = [
                        x if i < K or x.real > returns else returns
                        for i, x in enumerate(q)
                    ]
                log_mu = [density for _, density in proposals]
                if self.config.penalty == "mean":
                    gap = mean(bounded[K : 2 * K]) - q_data
                elif self.config.penalty == "policy_kl":
                    logits = [x / T for x in bounded[K : 2 * K]]
                    gap = T * (logsumexp(logits) - math.log(K)) - q_data
                elif self.config.penalty == "two_proposals":
                    pairs = list(zip(bounded, log_mu))[: 2 * K]
                    logits = [x / T - density for x, density in pairs]
                    gap = T * (logsumexp(logits) - math.log(2 * K)) - q_data
                elif self.config.cql_importance_sample:
                    logits = [x / T - density for x, density in zip(bounded, log_mu)]
                    gap = T * logsumexp(logits) - q_data
                else:
                    logits = [x / T for x in [*bounded, q_data]]
                    gap = T * logsumexp(logits) - q_data
                bounds = self.config.cql_clip_diff_min, self.config.cql_clip_diff_max
                rows.append((j, (q_data, q, gap, clamp(gap, *bounds))))
        n_critics = 1 + max(j for j, _ in rows)
        return [[row for i, row in rows if i == j] for j in range(n_critics)]

    def alpha_prime(self):
        value = cmath.exp(self.parameters["log_alpha_prime"].item())
        return clamp(value, 0.0, 1e6)

    def critic(self):
        """Sum over the critics of the TD error and the weighted penalty."""
        total, weight, gap_target = 0.0, self.sweep["cql_alpha"], 0.0
        if self.config.cql_lagrange:
            weight = weight * self.alpha_prime().real
            gap_target = self.sweep["cql_target_action_gap"]
        targets, _ = self.targets()
        for rows in self.gaps():
            total += mean((row[0] - y) ** 2 for row, y in zip(rows, targets))
            total += weight * (mean(row[3] for row in rows) - gap_target)
        return total

    def multiplier(self):
        if not self.config.cql_lagrange:
            return 0.0
        weight, target = self.sweep["cql_alpha"], self.sweep["cql_target_action_gap"]
        gaps = [mean(row[3] for row in rows).real for rows in self.gaps()]
        return -mean(self.alpha_prime() * weight * (gap - target) for gap in gaps)

    def metrics(self):
        """What CORL logs under these names; {j} is the list over the critics."""
        K, gaps, (targets, values) = (
            self.config.cql_n_actions,
            self.gaps(),
            self.targets(),
        )
        lagrange, weight, gap_target = (
            self.config.cql_lagrange,
            self.sweep["cql_alpha"],
            0,
        )
        if lagrange:
            weight = weight * self.alpha_prime().real
            gap_target = self.sweep["cql_target_action_gap"]
        shares = {"rand": 0, "current_actions": K, "next_actions": 2 * K}
        by_share = {
            f"cql_q{{j}}_{name}": [
                mean(x for row in rows for x in row[1][first : first + K])
                for rows in gaps
            ]
            for name, first in shares.items()
        }
        spreads = [
            mean(np.std([row[0], *row[1]], ddof=1) for row in rows) for rows in gaps
        ]
        errors = [mean((r[0] - y) ** 2 for r, y in zip(rows, targets)) for rows in gaps]
        diffs = [mean(row[3] for row in rows) for rows in gaps]
        return {
            **by_share,
            "alpha_loss": self.temperature(),
            "alpha": self.alpha,
            "policy_loss": self.actor(),
            "log_pi": mean(self.log_pi()),
            "average_target_q": mean(values),
            "qf{j}_loss": errors,
            "average_qf{j}": [mean(row[0] for row in rows) for rows in gaps],
            "cql_std_q{j}": spreads,
            "cql_qf{j}_diff": diffs,
            "cql_min_qf{j}_loss": [weight * (diff - gap_target) for diff in diffs],
            "alpha_prime": self.alpha_prime() if lagrange else 0.0,
            "alpha_prime_loss": self.multiplier(),
        }

    def derivative(self, name, direction, h=1e-30):
        """Of the loss that trains the parameter, along a direction of its shape."""
        loss = TRAINED_BY[name.split(".")[0]]
        original = self.parameters[name]
        self.parameters[name] = original + 1j * h * direction
        value = complex(getattr(self, loss)())
        self.parameters[name] = original
        return value.imag / h


# Tiny agents, batches and noise

OBS, ACT = 3, 2


def in_float64():
    """Body of a fixture: a seed, and all floats in float64 until the test is over."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tiny(**flags) -> cql.TrainConfig:
    """Networks that a test can afford; learning rates that a few updates can show."""
    small = dict(hidden_dim=6, cql_n_actions=2, policy_lr=1e-2, qf_lr=1e-2)
    return cql.TrainConfig(**{**small, **flags})


def scrambled(agent, scale: float = 0.7):
    """The agent with noise on every parameter: targets unlike critics, biases not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter))
    return agent


def tiny_agent(**flags) -> cql.ContinuousCQL:
    return scrambled(cql.ContinuousCQL(tiny(**flags), OBS, ACT))


def transitions(*shape: int, seed: int = 1, observation_dim=OBS, action_dim=ACT):
    """Random transitions of the given leading shape; a third of them terminate."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*shape, *size, generator=generator)

    return cql.Batch(
        observations=normal(observation_dim),
        actions=normal(action_dim).clamp(-1, 1),  # some on the bounds
        rewards=normal(),
        next_observations=normal(observation_dim),
        terminations=(torch.rand(shape, generator=generator) < 1 / 3).to(normal()),
        mc_returns=normal() / 3,
    )


def rows(data: cql.Batch, fractions) -> cql.Batch:
    """The transitions of one-dimensional data at fractions [R, B] of its length."""
    indices = (fractions * len(data.rewards)).long()
    return cql.Batch(*(array[indices] for array in data))


def train(agent, data: cql.Batch, n_updates: int, batch_size: int = 8):
    """Updates as the script makes them: indices and noise from each generator."""
    for _ in range(n_updates):
        noise = agent.draw(batch_size)
        metrics = agent.update(rows(data, noise.rows), noise)
    return metrics


def trained(agent) -> dict:
    """Copies of all that an update changes in its networks, by name."""
    return {name: value.detach().clone() for name, value in agent.named_parameters()}
