"""Recommend a policy of finished runs from the recorded data alone.

    python scripts/judge.py runs/alphas
    python scripts/judge.py runs/a runs/b --checkpoint best.pt --out runs/ab
    python scripts/judge.py runs/sweep --figure values.png

RUN is a run directory, a checkpoint file, or a directory of runs such as
sweep.py's. Each stacked run is one policy. All policies are judged together, with the
same initial critics and the same batches, so the value of a policy does not depend on
the others (up to rounding). Runs that are compared must have the same
data, discount, reward transformation and action space; network sizes and
observation statistics may differ. `--env` names other data of the same task to
judge on. Online runs are judged on their offline data.

The method is fitted Q evaluation (Le et al. 2019, arXiv 1903.08738) with one change.
The policies are frozen, and new critics learn from the data what return each policy
would get. Where the data do not support the policy's action, its Q counts as at most
that of the action that was recorded. Without this, policies that leave the data can
get the highest values, because nothing holds Q down there.

An action is supported unless a model of the recorded actions finds it more unusual
than 95 % of these (`--support`). An action that is at least 0.3 times as likely as the
likeliest one is always supported. The model takes dimensions of an action as
independent, so it cannot see that two usual doses were never given together.

The script prints a ranking, from the highest value to the lowest. Marked policies come
last:

    value      mean Q(s0, pi(s0)) over the first observations of the recorded
               episodes: the discounted return, in rewards as training on these
               data would transform them. "return" is the same in the data's own
               rewards, where they differ and reward_bias is 0
    se_episodes, se_critics
               standard errors of the value over the episodes and over the critics
               (value_error and value_error_critics in judge.csv)
    behind, se_behind
               how far the value is below the first one, and the standard error of this
               difference over episodes and critics, or the median of these errors if
               that is larger, because few critics may agree by chance (behind_error)
    within     yes if the policy is within the errors of the first one (see below); -
               for the first one itself and for marked ones
    unsupported
               share of the recorded states in which the data do not support the
               policy's action
    settled    yes after at least 3 / (soft_target_update_rate * (1 - discount))
               updates (the rate is this script's own flag), if the value moved over the
               last quarter of the updates by no more than the larger one of its errors,
               or 2 % of its size (of the recorded episodes' value, if that is larger).
               For discount 1 the mean length of the episodes takes the place of
               1 / (1 - discount)
    policy     run and swept flags, then perhaps a mark: "Q diverged" if cql.py warned of
               this in training, "unsupported" if the policy leaves the data in more than
               half of the states

judge.csv also has `recommended`, 1 for the policy that would be recommended after so
many updates, and, as means since the last row, the loss and `clipped`. That is the share
of targets outside the range of possible returns, [min(r_min, 0), max(r_max, 0)] /
(1 - discount).

Two lines follow for comparison: the value of the recorded actions by the same method,
and the mean discounted return of the recorded episodes, which lacks what would
follow a time limit.

A policy without a mark is within the errors of the first one if it is behind by at most
four standard errors plus `moved` (in judge.csv), and so are all that are ranked above
it. `moved` is what the difference moved over the last quarter of the updates, because
it may move as much again. Four standard errors, because the first one is the best of
several. With four, one of about fifteen tables of twelve equally good policies, whose
errors are independent, has some outside.

The values do not tell the first policy and those within its errors apart. The script
recommends the one of them with the fewest unsupported actions, because the data say
least about policies that leave them. Of those with the same share, to 0.1 %, it takes
the highest value. It passes over values that have not settled.

The script recommends none, and gives the reason, if

    - the first policy is marked, or no value is finite
    - the first policy's value has not settled
    - there are others without a mark, and all of them are within the errors, so that the
      values tell nothing; it then names the one with the fewest unsupported actions
    - a single critic, whose error is unknown, would have to tell policies apart

The errors are those of learning: each critic of a policy learns on its own, from its own
batches. They do not include what other recorded transitions would change, nor what all
critics get wrong together, so a policy that is behind by more may still be better. The
value of a policy with many unsupported actions is a cautious one: such a policy may be
better than the script thinks, because the data cannot show it. benchmarks/README.md has
the results of fifteen sets ("Without a simulator").

`--out` is a .csv file, or a directory for judge.csv, which gets a row for each policy
every `--log_freq` updates, or every quarter of fewer updates. `--figure` draws these
values.

From Python: `policies, data = load([Path("runs/a")])` and `options = Options()`, then
`table = judge(policies, data, options)`; `last_rows(table)` is the ranking, and
`recommend(table, data.enough_updates(options))` the recommended row and the reason.

Exit status: 0 done, 1 the machine failed, 2 invalid input, 3 a value is not
finite, 130 interrupted (the rows so far are in judge.csv).
"""

import argparse
import copy
import csv
import functools
import itertools
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

# Rewards and returns that are learned from depend on these flags.
SHARED_FLAGS = ("discount", "reward_scale", "reward_bias", "normalize_reward")
CHUNK = 4096  # observations that a policy acts on at once
TOLERANCE = 0.02  # change of a settled value, relative to its size
MOSTLY = 0.5  # share of unsupported actions above which no policy is recommended

# The model of the recorded actions
BEHAVIOR_UPDATES = 1000
LOOK = 50  # updates between two looks at the data that it has not seen
BLOCK = 100  # steps
BINS = 21  # parts of a continuous action's range
NARROW = 0.02  # least width of a part, where actions lie in [-1, 1]
OUTSIDE = 0.005  # share of the recorded actions below their range, and above it
# An action whose probability is at least this share of the likeliest one's is supported
# (BCQ, arXiv 1910.01708, tries actions from 0.3 on).
RATIO = 0.3


@dataclass
class Options:
    """Settings of the critics, and of the model of the recorded actions. The defaults
    judge twelve policies within minutes."""

    updates: int = 10_000
    batch_size: int = 256
    hidden_dim: int = 64
    n_hidden_layers: int = 2
    n_critics: int = 4
    lr: float = 1e-3
    soft_target_update_rate: float = 0.05  # Polyak averaging rate of the target critics
    support: float = 0.95  # least share of the recorded actions that are supported
    log_freq: int = 500  # updates between two rows of the table
    seed: int = 0  # of the initial networks and the batches


def check_options(options: Options) -> None:
    """Raise UserError for numbers out of range."""
    for name, value in vars(options).items():
        low = 0 if name == "seed" else 1
        if isinstance(value, int) and value < low:
            raise cql.UserError(f"--{name} {value}: must be at least {low}")
    if not 0 < options.lr < math.inf:
        raise cql.UserError(f"--lr {options.lr}: must be above 0 and finite")
    rate = options.soft_target_update_rate
    if not 0 < rate <= 1:
        raise cql.UserError(f"--soft_target_update_rate {rate}: must lie in (0, 1]")
    if not 0 < options.support < 1:
        raise cql.UserError(f"--support {options.support}: must lie in (0, 1)")


# ---- Data and policies ---------------------------------------------------------------


class Data:
    """Recorded transitions as the critics take them, on the device."""

    def __init__(self, config: cql.TrainConfig, episodes, task: cql.Task, device="cpu"):
        """config: flags of the judged runs, which transform the rewards.

        Raise UserError if there is too little data."""
        self.config = config
        self.task = task
        self.dataset = cql.Dataset(config, episodes, task, device)
        lengths = self.dataset.lengths
        if lengths.mean() < 2:
            what = f"episodes have {lengths.mean():.3g} steps on average"
            hint = "fitted Q evaluation needs at least 2; judge on longer episodes"
            raise cql.UserError(f"--env {config.env}: {what}; {hint}")
        # Rewards and terminations come from the episodes, because a fork's Dataset may
        # turn its columns into something else, such as n-step returns.
        episodes = [each for each in episodes if len(each.rewards)]
        rewards = np.concatenate([each.rewards for each in episodes])
        ended = np.concatenate([each.terminations for each in episodes]) != 0
        rewards = torch.as_tensor(rewards.astype(np.float32))
        rewards = cql.transform_rewards(rewards, self.dataset.reward_factor, config)
        kind = torch.get_default_dtype()
        self.rewards = rewards.to(device, kind)  # [n]
        self.terminations = torch.as_tensor(ended).to(device, kind)  # [n]

        # Standardized by the data alone, whatever statistics the policies have.
        self.rows = self.dataset.rows  # [n] of the observation before each transition
        of_transitions = self.dataset.observations[self.rows].double()
        mean = of_transitions.mean(0)
        std = of_transitions.std(0, correction=0) + 1e-3
        self.units = cql.Units(task, (mean, std)).to(device)
        self.observations = self.units.standardize(self.dataset.observations)
        self.actions = self.units.unit_actions(self.dataset.columns["actions"])  # [n, A]
        # The action taken at each observation, [all observations, A]. An episode's last
        # observation has none; `judge` puts the likeliest action there.
        count = len(self.observations), self.actions.shape[1]
        self.recorded = self.actions.new_zeros(count)
        self.recorded[self.rows] = self.actions
        starts = (np.cumsum(lengths) - lengths)[self.dataset.initial]
        self.first_rows = self.rows[torch.as_tensor(starts, device=device)]

        # No return lies outside these bounds.
        self.bounds = [-math.inf, math.inf]
        if config.discount < 1:
            largest = torch.finfo(kind).max
            ends = min(float(rewards.min()), 0), max(float(rewards.max()), 0)
            ends = np.array(ends) / (1 - config.discount)
            self.bounds = np.clip(ends, -largest, largest).tolist()

        returns = []
        self.ends = np.cumsum(lengths)[:-1]  # where the next episode begins
        parts = np.split(rewards.double().numpy(), self.ends)
        for part, initial in zip(parts, self.dataset.initial):
            if initial:
                returns.append(cql.discounted_sum(part, config.discount))
        self.value = float(np.mean(returns))
        self.value_error = standard_error(np.array(returns))

    def own_rewards(self, value: float) -> float:
        """Return a value in the data's own rewards, NaN if that is impossible."""
        factor = self.dataset.reward_factor
        return cql.original_returns(value, factor, self.config)

    def enough_updates(self, options: Options) -> int:
        """Return the number of updates before which no value counts as settled: three
        times the updates in which the target critics see one horizon ahead."""
        if self.config.discount == 1:
            horizon = self.dataset.lengths.mean()
        else:
            horizon = 1 / (1 - self.config.discount)
        number = 3 * horizon / options.soft_target_update_rate
        return math.ceil(round(number, 6))  # not 601 for 600.0000000000001


@dataclass
class Policy:
    """A frozen policy: its deterministic action at every observation of the data."""

    actions: Tensor  # [all observations, A] in [-1, 1] or counted from 0
    checkpoint: str = ""  # path of the file
    run: int = 0  # index in the checkpoint
    flags: dict = field(default_factory=dict)  # seed, cql_alpha and other swept flags
    ran_away: bool = False  # whether cql.py warned that Q diverged
    supported: Optional[Tensor] = None  # [all observations] bool; None: `judge` finds it


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean, NaN for a single value."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def find_checkpoints(paths: List[Path], name: str) -> List[Path]:
    """Return the checkpoint files: a path itself, the file of this name in a run
    directory, or those of all runs one level below.

    Raise UserError if a path has none or a file is found twice."""
    found = []
    for path in paths:
        below = sorted(path.glob(f"*/{name}"))
        if path.is_file():
            found.append(path)
        elif (path / name).is_file():
            found.append(path / name)
        elif below:
            found += below
        elif not path.exists():
            raise cql.UserError(f"{path}: does not exist; pass a run directory")
        else:
            hint = "pass a run directory, or a directory of runs"
            raise cql.UserError(f"{path}: no {name} in it or one level below; {hint}")
    seen = set()
    for path in found:
        if path.resolve() in seen:
            raise cql.UserError(f"{path}: found twice; pass each run once")
        seen.add(path.resolve())
    return found


def check_comparable(checkpoints: List[dict], other_data: bool) -> None:
    """Raise UserError unless values of these checkpoints' policies are comparable.

    other_data: whether they are judged on data other than their own."""
    first = checkpoints[0]
    apart = "judge them in separate commands"
    for each in checkpoints[1:]:
        for name in SHARED_FLAGS:
            ours = each["config"][name]
            theirs = first["config"][name]
            if ours != theirs:
                what = f"{name} {ours}, but {theirs} in {first['path']}"
                raise cql.UserError(f"{each['path']}: {what}; {apart}")
        ours = describe_spaces(each["task"])
        theirs = describe_spaces(first["task"])
        if ours != theirs:
            what = f"{ours}, but {theirs} in {first['path']}"
            raise cql.UserError(f"{each['path']}: {what}; {apart}")
        if not other_data and not same_data(each, first):
            ours = each["config"]["env"]
            theirs = first["config"]["env"]
            what = f"data {ours}, but {first['path']} has {theirs}, or other numbers"
            hint = f"{apart}, or pass --env"
            raise cql.UserError(f"{each['path']}: {what}; {hint}")
    for each in checkpoints:
        if not other_data and each["config"]["env"] is None:
            what = "the run had no dataset; judging needs one"
            raise cql.UserError(f"{each['path']}: {what}; pass --env")


def describe_spaces(task: cql.Task) -> str:
    """Describe a task's observations and actions; equal tasks have equal texts."""
    kind = "discrete" if task.discrete else "continuous"
    bounds = f"{task.action_low} to {task.action_high}"
    return f"{task.observation_dim} observations, {kind} actions {bounds}"


def same_data(one: dict, other: dict) -> bool:
    """Return whether two checkpoints were trained on the same data, wherever it lay."""
    prints = one["fingerprint"], other["fingerprint"]
    if None in prints:  # nothing was trained after load_model
        return one["config"]["env"] == other["config"]["env"]
    return np.allclose(*prints, rtol=1e-9)


def load(
    paths: List[Path],
    name: str = "checkpoint.pt",
    env=None,
    device="cpu",
    batch_size: int = Options.batch_size,
) -> Tuple[List[Policy], Data]:
    """Load the policies of runs and the data to judge them on: the runs' own, or `env`.

    Raise UserError for runs that cannot be read or compared, and if all diverged."""
    checkpoints = [cql.read_checkpoint(path) for path in find_checkpoints(paths, name)]
    check_comparable(checkpoints, env is not None)
    first = checkpoints[0]
    flags = {**first["config"], "batch_size": batch_size, "cal_ql": False}
    if env is not None:
        flags["env"] = env
    config = cql.TrainConfig(**flags)
    episodes, _ = cql.read_data(config)
    data = Data(config, episodes, first["task"], device)
    was = first["fingerprint"]
    now = data.dataset.fingerprint
    if env is None and was is not None and not np.allclose(was, now, rtol=1e-9):
        what = f"{now[0]} transitions; {first['path']} had {was[0]}, or other numbers"
        hint = f"pass --env {config.env} to judge on the data as it is"
        raise cql.UserError(f"{config.env}: {what}; {hint}")
    policies = []
    for checkpoint in checkpoints:
        policies += freeze(checkpoint, data, device)
    if not policies:
        what = "all runs diverged; no policy is left"
        hint = "pass a run<k>_before_<step>.pt of a run directory"
        raise cql.UserError(f"{first['path']}: {what}; {hint}")
    return policies, data


@torch.no_grad()
def freeze(checkpoint: dict, data: Data, device) -> List[Policy]:
    """Return the policies of a checkpoint's runs, without those that diverged."""
    path = checkpoint["path"]
    config = replace(cql.TrainConfig(**checkpoint["config"]), compile=False)
    task = checkpoint["task"]
    agent = cql.make_agent(config, task, device)
    cql.load_agent(agent, checkpoint)
    agent.eval()
    parts = []
    for observations in data.dataset.observations.split(CHUNK):
        parts.append(agent.actions(observations.expand(len(agent.runs), -1, -1)))
    actions = torch.cat(parts, dim=1)  # [R, all observations, A]
    if np.dtype(task.action_dtype).kind in "iu":
        actions = actions.round()  # as Task.to_environment does
    policies = []
    for r, flags in enumerate(agent.runs):
        step = checkpoint["diverged"][r]
        if step >= 0:
            cql.say(f"{path} run {r}: diverged by update {step:,}, so it is left out")
            continue
        flags = {name: value for name, value in flags.items() if name != "run"}
        unit_actions = data.units.unit_actions(actions[r])
        ran_away = bool(checkpoint["warned"][r])
        policies.append(Policy(unit_actions, path, r, flags, ran_away))
    return policies


# ---- Support -------------------------------------------------------------------------


class Behavior:
    """Model of the recorded actions, which says how unusual an action is: by how much
    its log-probability is below that of the likeliest one, given the observation.

    A network gives a probability to each discrete action, or to each of BINS parts of a
    continuous action's range; logarithms are summed over the dimensions, as if they were
    independent. The data are cut into blocks of at most BLOCK steps of one episode. One
    network learns from half of the blocks and judges the rest; a second one learns from
    those and judges the first half. So no network judges an action it learned from."""

    def __init__(self, data: Data, options: Options):
        self.data = data
        self.options = options
        task = data.task
        device = data.observations.device
        if task.discrete:
            self.n_bins = int(task.action_high[0] - task.action_low[0]) + 1
        else:
            # The first and the last part hold what is far outside these quantiles
            # [2, A], so that a single far action does not widen the parts.
            self.n_bins = BINS
            ends = torch.tensor([OUTSIDE, 1 - OUTSIDE], dtype=data.actions.dtype)
            low, high = torch.quantile(data.actions, ends.to(device), dim=0)
            short = ((BINS - 2) * NARROW - (high - low)).clamp(min=0)
            self.ends = torch.stack([low - short / 2, high + short / 2])
        self.half = self.halves()  # [all observations] 0 or 1
        self.networks = []
        for half in range(2):
            with cql.seeded([cql.JUDGE, options.seed, 0, 1 + half]):
                n_outputs = len(task.action_low) * self.n_bins
                network = Network(task.observation_dim, n_outputs, options).to(device)
            self.fit(network, half)
            self.networks.append(network)
        own = self.unusual(data.recorded)[data.rows]
        # [] An action is supported unless it is more unusual than this.
        self.limit = own.quantile(options.support).clamp(min=-math.log(RATIO))

    def halves(self) -> Tensor:
        """Return the half [all observations] that each observation belongs to. Small
        data have shorter blocks, at least twenty."""
        rows = self.data.rows
        size = min(BLOCK, max(1, len(rows) // 20))
        blocks = []
        n_blocks = 0
        for length in self.data.dataset.lengths:
            number = np.arange(length) // size
            number = np.append(number, number[-1])  # of the last observation
            blocks.append(n_blocks + number)
            n_blocks += number[-1] + 1
        blocks = torch.as_tensor(np.concatenate(blocks))
        generator = cql.generator_of([cql.JUDGE, self.options.seed, 0, 3])
        order = torch.randperm(n_blocks, generator=generator)
        return (order % 2)[blocks].to(rows.device)

    def bins(self, actions: Tensor) -> Tensor:
        """Return the numbers [n, A] of the parts in which actions [n, A] lie."""
        if self.data.task.discrete:
            return actions.long()
        low, high = self.ends
        inner = BINS - 2
        place = (actions - low) / (high - low) * inner
        # The inner parts at the ends are twice as wide, so that they hold the last few
        # recorded actions.
        outside = (place < -1).long() - (place > inner + 1).long()
        return place.floor().clamp(0, inner - 1).long() + 1 - outside

    def logits(self, network: nn.Module, rows: Tensor) -> Tensor:
        """Return unnormalized log-probabilities [n, A, bins] at these observations."""
        return network(self.data.observations[rows]).unflatten(-1, (-1, self.n_bins))

    def loss(self, network: nn.Module, rows: Tensor) -> Tensor:
        """Return the mean negative log-likelihood [] of the actions recorded there."""
        logits = self.logits(network, rows).flatten(0, 1)
        bins = self.bins(self.data.recorded[rows]).flatten()
        return nn.functional.cross_entropy(logits, bins)

    def fit(self, network: nn.Module, half: int) -> None:
        """Train a network on one half of the data; keep the weights that are best on the
        other half, because networks overfit small data soon."""
        of_half = self.half[self.data.rows] == half
        rows = self.data.rows[of_half]
        others = self.data.rows[~of_half]
        others = others[:: max(1, len(others) // CHUNK)]
        optimizer = torch.optim.Adam(network.parameters(), self.options.lr)
        least = math.inf
        best = None
        for update in range(BEHAVIOR_UPDATES):
            key = [cql.JUDGE, self.options.seed, 1 + update, 1 + half]
            size = (self.options.batch_size,)
            index = torch.randint(len(rows), size, generator=cql.generator_of(key))
            loss = self.loss(network, rows[index.to(rows.device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (update + 1) % LOOK == 0:
                with torch.no_grad():
                    now = self.loss(network, others).item()
                if now < least:
                    least = now
                    best = copy.deepcopy(network.state_dict())
        if best is not None:
            network.load_state_dict(best)

    def log_ratios(self) -> Iterator[Tuple[Tensor, Tensor]]:
        """Yield observations' numbers [n] and, for each part, by how much its
        log-probability is below the likeliest one's, [n, A, bins]."""
        for half, network in enumerate(self.networks):
            for rows in torch.nonzero(self.half != half).squeeze(1).split(CHUNK):
                logits = self.logits(network, rows)
                yield rows, logits.amax(-1, keepdim=True) - logits

    @torch.no_grad()
    def unusual(self, actions: Tensor) -> Tensor:
        """Return how unusual actions [all observations, A] are, [all observations]."""
        found = torch.zeros_like(actions[:, 0])
        for rows, ratios in self.log_ratios():
            bins = self.bins(actions[rows]).unsqueeze(-1)
            found[rows] = ratios.gather(-1, bins).squeeze(-1).sum(-1)
        return found

    @torch.no_grad()
    def likeliest(self) -> Tensor:
        """Return the most likely actions [all observations, A]."""
        found = torch.zeros_like(self.data.recorded)
        for rows, ratios in self.log_ratios():
            found[rows] = ratios.argmin(-1).to(found.dtype)
        if self.data.task.discrete:
            return found
        low, high = self.ends
        return (low + (high - low) * (found - 0.5) / (BINS - 2)).clamp(-1, 1)


# ---- Estimation ----------------------------------------------------------------------


class SupportedQ:
    """Fitted Q evaluation (arXiv 1903.08738) of one policy, which gets no credit for
    actions that the data do not support: Q of such an action counts as at most Q of the
    recorded action. (SPIBB, arXiv 1712.06924, takes the recorded behavior's Q there. The
    smaller of the two ranks a policy that leaves the data below the data.)

    For another estimator, subclass it, override what differs, and pass the class to
    `judge`. All tensors are those of one policy; `Critics` stacks the policies."""

    # True: the N critics get the same batches, for targets that compare critics. False:
    # each gets its own, so that they differ by all that chance does in training.
    shares_batches = False

    def __init__(self, data: Data):
        self.discount = data.config.discount

    def credited(self, q: Tensor, recorded_q: Tensor, supported: Tensor) -> Tensor:
        """Q that counts, from Q of the policy's and of the recorded actions, [..., n]
        each, and from where [n] the former are supported."""
        return torch.where(supported, q, torch.minimum(q, recorded_q))

    def target(self, next_q: Tensor, recorded_q: Tensor, batch: Dict[str, Tensor]):
        """Bootstrapped target [N, B] of each critic, from its own target critic alone.
        So critics differ by their errors. next_q and recorded_q [N, B] are of the target
        critics at s', for the policy's and the recorded action there; what the batch
        holds is [N, B, ...]."""
        q = self.credited(next_q, recorded_q, batch["next_supported"])
        not_ended = 1 - batch["terminations"]  # a time limit bootstraps
        return batch["rewards"] + self.discount * not_ended * q

    def loss(self, q_of: Callable, batch: Dict[str, Tensor], target: Tensor) -> Tensor:
        """Loss [] of one critic, whose Q is q_of(observations, actions); target [B]. The
        policy's actions at s are batch["policy_actions"]."""
        q = q_of(batch["observations"], batch["actions"])
        return (q - target).square().mean()

    def value(self, q: Tensor, recorded_q: Tensor, supported: Tensor) -> Tensor:
        """Value [N, E] by each critic at the first observations of episodes, from Q
        [N, E] of the policy's and of the recorded actions."""
        return self.credited(q, recorded_q, supported)


class Network(nn.Module):
    """A plain multilayer perceptron, independent of cql.py's networks.

    As a critic of continuous actions it takes these as a part of its input [n, O + A],
    and returns [n, 1]; for discrete actions it takes [n, O] and returns [n, actions]."""

    def __init__(self, n_inputs: int, n_outputs: int, options: Options):
        super().__init__()
        sizes = [n_inputs, *[options.hidden_dim] * options.n_hidden_layers]
        layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Critics:
    """N critics for each of P policies, their target critics and their optimizer.

    The critics and batches of all policies start from one seed, so policies with equal
    actions get equal values."""

    def __init__(self, policies, data: Data, options: Options, estimator=SupportedQ):
        self.data = data
        self.options = options
        self.estimator = estimator(data)
        self.n_policies = len(policies)
        self.policy_actions = torch.stack([each.actions for each in policies])
        self.supported = torch.stack([each.supported for each in policies])
        device = data.observations.device
        task = data.task
        n_inputs = task.observation_dim
        n_outputs = 1
        if task.discrete:
            n_outputs = int(task.action_high[0] - task.action_low[0]) + 1
        else:
            n_inputs += len(task.action_low)
        critics = []
        with cql.seeded([cql.JUDGE, options.seed, 0]):
            for _ in range(options.n_critics):
                critics.append(Network(n_inputs, n_outputs, options))
        lead = (self.n_policies, options.n_critics)
        self.critic = cql.stack(critics * self.n_policies, lead).to(device)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.weights = dict(self.critic.named_parameters())  # [P, N, ...] each
        self.target_weights = dict(self.target_critic.named_parameters())
        self.optimizer = torch.optim.Adam(self.weights.values(), options.lr, fused=True)

    def q_of(self, weights: dict, observations: Tensor, actions: Tensor) -> Tensor:
        """Q [n] of one critic at standardized observations [n, O] and actions [n, A]."""
        call = functools.partial(torch.func.functional_call, self.critic, weights)
        if self.data.task.discrete:
            return call(observations).gather(-1, actions.long()).squeeze(-1)
        return call(torch.cat([observations, actions], dim=-1)).squeeze(-1)

    def all_q(self, weights: dict, observations: Tensor, actions: Tensor) -> Tensor:
        """Q [N, n] of one policy's critics at observations [n, O] and actions [n, A]."""
        n = self.options.n_critics
        # Expanded, because products of shared rows and stacked weights are slow.
        shared = expand((observations, actions), n)
        return torch.func.vmap(self.q_of)(weights, *shared)

    def losses(self, weights: dict, target_weights: dict, batch: dict):
        """Return the loss [] of one policy's critics, and which share [] of its targets
        was clipped."""
        q_of_each = torch.func.vmap(self.q_of)
        following = batch["next_observations"]
        with torch.no_grad():
            next_q = q_of_each(target_weights, following, batch["next_policy_actions"])
            recorded = batch["next_recorded_actions"]
            recorded_q = q_of_each(target_weights, following, recorded)
            target = self.estimator.target(next_q, recorded_q, batch)  # [N, B]
            bounded = target.clamp(*self.data.bounds)
            clipped = (bounded != target).to(target.dtype).mean()

        def loss_of_one(weights, batch, target):
            q_of = functools.partial(self.q_of, weights)
            return self.estimator.loss(q_of, batch, target)

        loss = torch.func.vmap(loss_of_one)(weights, batch, bounded)  # [N]
        return loss.sum(), clipped

    def batch(self, update: int) -> Dict[str, Tensor]:
        """Return the batch of the update of this number, [P, N, B, ...] each. All
        policies get the same transitions, which are drawn on the CPU, so they are the
        same on every device."""
        data = self.data
        generator = cql.generator_of([cql.JUDGE, self.options.seed, 1 + update])
        n = self.options.n_critics
        size = (1 if self.estimator.shares_batches else n, self.options.batch_size)
        index = torch.randint(len(data.rows), size, generator=generator)
        index = index.expand(n, -1).to(data.rows.device)
        rows = data.rows[index]
        shared = {
            "observations": data.observations[rows],
            "actions": data.actions[index],
            "rewards": data.rewards[index],
            "terminations": data.terminations[index],
            "next_observations": data.observations[rows + 1],
            "next_recorded_actions": data.recorded[rows + 1],
        }
        return {
            **expand(shared, self.n_policies),
            "policy_actions": self.policy_actions[:, rows],
            "next_policy_actions": self.policy_actions[:, rows + 1],
            "next_supported": self.supported[:, rows + 1],
        }

    def update(self, update: int) -> Tuple[Tensor, Tensor]:
        """Make one step of all critics; return losses and clipped shares, [P] each."""
        inputs = self.weights, self.target_weights, self.batch(update)
        loss, clipped = torch.func.vmap(self.losses)(*inputs)
        self.optimizer.zero_grad()
        loss.sum().backward()  # policies share nothing
        self.optimizer.step()
        with torch.no_grad():
            targets = list(self.target_weights.values())
            rate = self.options.soft_target_update_rate
            torch._foreach_lerp_(targets, list(self.weights.values()), rate)
        return loss.detach(), clipped

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the value [P, N, E] of each policy by each critic at the episodes'
        first observations."""
        rows = self.data.first_rows
        found = []
        for actions in self.policy_actions[:, rows], self.data.recorded[rows]:
            inputs = self.data.observations[rows], actions
            expanded = [x.expand(self.n_policies, *x.shape[-2:]) for x in inputs]
            found.append(torch.func.vmap(self.all_q)(self.weights, *expanded))
        return torch.func.vmap(self.estimator.value)(*found, self.supported[:, rows])


def expand(tensors, n: int):
    """Give a tensor, or a tuple, list or dictionary of them, a first dimension n."""
    if isinstance(tensors, dict):
        return {name: expand(tensor, n) for name, tensor in tensors.items()}
    if isinstance(tensors, (tuple, list)):
        return [expand(tensor, n) for tensor in tensors]
    return tensors.expand(n, *tensors.shape)


def judge(
    policies: List[Policy],
    data: Data,
    options: Optional[Options] = None,
    report: Optional[Callable] = None,
    estimator=SupportedQ,
) -> List[dict]:
    """Train critics for all policies; return a row for each policy every log_freq
    updates and at the end, in the order of the policies; every quarter, if log_freq is
    more than three quarters.

    report: is called with all rows so far whenever there are new ones."""
    options = options or Options()
    every = options.log_freq
    if every > 0.75 * options.updates:  # no row could be compared with an earlier one
        every = max(1, options.updates // 4)
    policies = mark_supported(policies, data, options)
    everywhere = torch.ones_like(data.recorded[:, 0], dtype=torch.bool)
    recorded = Policy(data.recorded, supported=everywhere)
    critics = Critics([*policies, recorded], data, options, estimator)
    table = []
    sums = 0.0
    since = 0
    look = {"unit": "update", "leave": False, "dynamic_ncols": True, "disable": None}
    for update in tqdm(range(options.updates), **look):
        sums = sums + torch.stack(critics.update(update))  # [2, P + 1]
        since += 1
        done = update + 1
        if done % every == 0 or done == options.updates:
            means = (sums / since).tolist()
            sums = 0.0
            since = 0
            *values, of_recorded = critics.values().double().cpu().numpy()
            rows = []
            for p, policy in enumerate(policies):
                row = {"policy": p, "update": done, **describe(policy, data)}
                row |= summarize(values[p], data)
                row["recorded_value"] = float(of_recorded.mean())
                row |= {"loss": means[0][p], "clipped": means[1][p]}
                before = [each for each in table if each["policy"] == p]
                row["settled"] = int(has_settled([*before, row], data, options))
                rows.append(row)
            compare_with_best(rows, values)
            best = best_of(rows)["policy"]
            then = quarter_ago(table, done)
            for p, row in enumerate(rows):
                row["moved"] = math.nan  # unknown until values can have settled
                if then and done >= data.enough_updates(options):
                    was = then[best]["value"] - then[p]["value"]
                    row["moved"] = row["behind"] - was
            table += rows
            chosen, _ = recommend(table, data.enough_updates(options))
            for row in rows:
                row["recommended"] = int(row is chosen)
            if report is not None:
                report(table)
    return table


def mark_supported(policies: List[Policy], data: Data, options: Options) -> List[Policy]:
    """Return the policies with `supported`. Also put the likeliest action where
    data.recorded has none, at the episodes' last observations."""
    behavior = Behavior(data, options)
    last = torch.ones(len(data.recorded), dtype=torch.bool, device=data.rows.device)
    last[data.rows] = False
    data.recorded[last] = behavior.likeliest()[last]
    found = []
    for policy in policies:
        supported = policy.supported
        if supported is None:
            supported = behavior.unusual(policy.actions) <= behavior.limit
        found.append(replace(policy, supported=supported))
    return found


def describe(policy: Policy, data: Data) -> dict:
    """Return the columns of the table that identify a policy, and which share of its
    actions at the recorded states the data do not support."""
    return {
        "checkpoint": policy.checkpoint,
        "run": policy.run,
        **policy.flags,
        "ran_away": int(policy.ran_away),
        "unsupported": 1 - float(policy.supported[data.rows].double().mean()),
    }


def summarize(values: np.ndarray, data: Data) -> dict:
    """Return the columns of a value and its errors, from a policy's values [N, E]."""
    value = float(values.mean())
    error = standard_error(values.mean(0))
    return {
        "value": value,
        "value_error": error,
        "value_error_critics": standard_error(values.mean(1)),
        "discounted_return": data.own_rewards(value),
        "discounted_return_error": abs(data.own_rewards(error)),
        "data_value": data.value,
        "data_discounted_return": data.own_rewards(data.value),
    }


def compare_with_best(rows: List[dict], values: List[np.ndarray]) -> None:
    """Write into the row of each policy how far its value is below the best one, and the
    error of this difference, from the values [N, E] of each policy."""
    best = best_of(rows)["policy"]
    differences = [values[best] - each for each in values]
    errors = [error_of(each) for each in differences]
    # Few critics may agree by chance, so no error is below the median of the others'.
    others = errors[:best] + errors[best + 1 :] or errors
    usual = np.median([x for x in others if not math.isnan(x)] or [math.nan])
    for row, difference, error in zip(rows, differences, errors):
        row["behind"] = float(difference.mean())
        row["behind_error"] = float(max(error, usual))
    rows[best]["behind_error"] = 0.0


def error_of(values: np.ndarray) -> float:
    """Return the standard error of the mean of values [N, E] over critics and over
    episodes, NaN for a single critic. It does not include what other recorded
    transitions would have changed, and nothing of episodes if there is only one."""
    of_episodes = standard_error(values.mean(0))
    if math.isnan(of_episodes):
        of_episodes = 0.0
    return math.hypot(of_episodes, standard_error(values.mean(1)))


def quarter_ago(table: List[dict], update: int) -> List[dict]:
    """Return the rows of one update, at least a quarter of so many updates ago; an empty
    list if there are none."""
    early = [row for row in table if row["update"] <= 0.75 * update]
    return [row for row in early if row["update"] == early[-1]["update"]]


def trusted(row: dict) -> bool:
    """Return whether a policy may be recommended: its value is finite, Q did not diverge
    in training, and most of its actions are supported."""
    finite = math.isfinite(row["value"])
    return finite and not row["ran_away"] and row["unsupported"] <= MOSTLY


def best_of(rows: List[dict]) -> dict:
    """Return the row of the highest value among the trusted ones, or among all."""
    return ranked(rows)[0]


def has_settled(rows: List[dict], data: Data, options: Options) -> bool:
    """Return whether a policy's value has settled by its last row, by the rule in the
    module's docstring. A single row cannot tell."""
    last = rows[-1]
    then = quarter_ago(rows, last["update"])
    errors = [last["value_error"], last["value_error_critics"]]
    size = max(abs(last["value"]), abs(data.value))
    # The error over a single episode or critic is NaN.
    allowed = max(x for x in (*errors, TOLERANCE * size, 0) if not math.isnan(x))
    enough = last["update"] >= data.enough_updates(options)
    return enough and bool(then) and abs(last["value"] - then[0]["value"]) <= allowed


def ranked(rows: List[dict]) -> List[dict]:
    """Return rows from the highest value to the lowest, those that are not trusted after
    all others, and values that are not finite last."""

    def key(row):
        finite = math.isfinite(row["value"])
        return not trusted(row), not finite, -row["value"] if finite else 0

    return sorted(rows, key=key)


def last_rows(table: List[dict]) -> List[dict]:
    """Return the last row of each policy, ranked."""
    end = table[-1]["update"]
    return ranked([row for row in table if row["update"] == end])


def within_errors(rows: List[dict]) -> List[dict]:
    """Return the trusted rows that values do not tell apart from the best one, itself
    included: down to the first one that is behind by more than the errors."""
    trusted_rows = filter(trusted, ranked(rows))
    return list(itertools.takewhile(lambda row: not is_behind(row), trusted_rows))


def candidate_of(rows: List[dict]) -> dict:
    """Return the row to recommend, if any is: of those within the errors that have
    settled, the one with the fewest unsupported actions; of equal ones, the highest.
    Breiman et al. (1984) choose the size of a tree by a similar rule: of those within
    one standard error of the best, the simplest."""
    near = within_errors(rows) or ranked(rows)[:1]
    settled = [row for row in near if row["settled"]]
    # To 0.1 %, as printed: what differs by less is equally supported.
    return min(settled or near, key=lambda row: round(row["unsupported"], 3))


def recommend(table: List[dict], enough: int) -> Tuple[Optional[dict], str]:
    """Return the last row of the recommended policy and the reason, or None and the
    reason why none is recommended. enough: updates before which no value has settled,
    for the advice."""
    rows = last_rows(table)
    best = best_of(rows)
    if not math.isfinite(best["value"]):
        return None, "no value is finite; pass a smaller --lr"
    if not trusted(best):
        why = "each policy's Q diverged, or the data do not support its action in more "
        why += f"than {MOSTLY:.0%} of the states"
        return None, f"{why}; train with a larger --cql_alpha"
    others = len([row for row in rows if trusted(row)]) - 1
    within = len(within_errors(rows)) - 1
    if others and math.isnan(best["value_error_critics"]):
        return None, "the error of a single critic is unknown; pass --n_critics 4"
    if not best["settled"]:
        updates = max(2 * best["update"], enough, Options.updates)
        what = "the value of the best policy has not settled"
        return None, f"{what}; pass --updates {updates} or more"
    chosen = candidate_of(rows)
    share = f"{chosen['unsupported']:.1%}"
    if others and within == others:
        text = f"all policies without a mark ({others + 1}) are within the errors, so "
        text += "the values do not tell which is best; if one has to be chosen: "
        text += f"{name_of(chosen)} has the fewest unsupported actions ({share})"
        return None, text
    text = "the highest value"
    if any(row["value"] > best["value"] for row in rows):
        text += " without a mark"
    near = "the settled ones within its errors"
    if chosen is not best:
        text = f"of {text} and {near}, this one has the fewest unsupported actions "
        text += f"({share}); its value is {format_number(chosen['behind'])} lower"
    elif within:
        text += f"; none of {near} has fewer unsupported actions ({share})"
    else:
        text += f"; {share} of its actions are unsupported"
    if others:
        count = f"{others - within} of {others}"
        text += f"; others without a mark that are outside the errors: {count}"
    text += "; the recorded actions are worth "
    if chosen["value"] < chosen["recorded_value"]:
        text += "more: "
    text += format_number(chosen["recorded_value"])
    return chosen, text


def is_behind(row: dict) -> bool:
    """Return whether a value is below the best one by more than the errors, as the
    module's docstring explains; False if that is unknown (NaN)."""
    return row["behind"] > 4 * row["behind_error"] + abs(row["moved"])


# ---- Output --------------------------------------------------------------------------


def write_table(table: List[dict], path: Path) -> None:
    """Write the table, floats with 8 digits and NaN as nothing. Raise MachineError."""
    with cql.errors_as(cql.MachineError, f"could not write {path}", OSError):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            for row in table:
                texts = dict(row)
                for name, value in row.items():
                    if isinstance(value, float):
                        texts[name] = "" if math.isnan(value) else f"{value:.8g}"
                writer.writerow(texts)


def labels(rows: List[dict]) -> Dict[int, str]:
    """Return a name for each policy: its run and the swept flags that tell it apart."""
    names = ["seed", "cql_alpha"]
    for name in cql.SWEPT:
        if name not in names and len({row.get(name) for row in rows}) > 1:
            names.append(name)
    found = {}
    for row in rows:
        words = [f"{row['checkpoint']} run {row['run']}"]
        words += [f"{name} {row[name]}" for name in names if name in row]
        found[row["policy"]] = "  ".join(words)
    return found


def name_of(row: dict) -> str:
    return labels([row])[row["policy"]]


def format_ranking(table: List[dict], data: Data) -> str:
    """Return the ranking that is printed."""
    rows = last_rows(table)
    names = labels(rows)
    near = [row["policy"] for row in within_errors(rows)]
    converted = data.own_rewards(1.0)
    own = math.isfinite(converted) and converted != 1
    heads = ["rank", "value", "se_episodes", "se_critics"] + ["return"] * own
    heads += ["behind", "se_behind", "within", "unsupported", "settled"]
    lines = [[*heads, "policy"]]
    for rank, row in enumerate(rows, 1):
        numbers = [row["value"], row["value_error"], row["value_error_critics"]]
        numbers += [row["discounted_return"]] * own
        numbers += [row["behind"], row["behind_error"]]
        within = "yes" if row["policy"] in near else "no"
        if rank == 1 or not trusted(row):
            within = "-"
        share = f"{row['unsupported']:.1%}"
        cells = [str(rank), *map(format_number, numbers), within, share]
        note = "  unsupported" if row["unsupported"] > MOSTLY else ""
        note = "  Q diverged" if row["ran_away"] else note
        settled = "yes" if row["settled"] else "no"
        lines.append([*cells, settled, names[row["policy"]] + note])
    recorded = rows[0]["recorded_value"]
    for what, value, error in (
        ("the recorded actions, judged the same way", recorded, math.nan),
        ("the recorded episodes' mean discounted return", data.value, data.value_error),
    ):
        numbers = [value, error, math.nan] + [data.own_rewards(value)] * own
        lines.append(["", *map(format_number, numbers), "", "", "", "", "", what])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    texts = []
    for *cells, last in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        texts.append("  ".join([*padded, last]))
    return "\n".join(texts)


def format_number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def draw(table: List[dict], data: Data, path: Path) -> None:
    """Draw the value of each policy against the updates. Raise UserError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 4), constrained_layout=True, dpi=140)
    ranked = sorted(last_rows(table), key=lambda row: row.get("cql_alpha", 0))
    weights = sorted({row.get("cql_alpha", 0) for row in ranked})
    shades = plt.colormaps["viridis"](np.linspace(0, 0.9, len(weights)))
    shown = set()
    for last in ranked:
        rows = [row for row in table if row["policy"] == last["policy"]]
        weight = last.get("cql_alpha", 0)
        label = f"cql_alpha {weight:g}" + (", Q diverged" if last["ran_away"] else "")
        panel.plot(
            [row["update"] for row in rows],
            [row["value"] for row in rows],
            ":" if last["ran_away"] else "-",
            color=shades[weights.index(weight)],
            label=None if label in shown else label,
        )
        shown.add(label)
    panel.axhline(data.value, color="0.5", linewidth=0.8, label="recorded episodes")
    panel.set_xlabel("updates")
    panel.set_ylabel("value")
    panel.spines[["top", "right"]].set_visible(False)
    if len(shown) <= 12:
        figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    with cql.errors_as(cql.UserError, f"--figure {path}"):
        figure.savefig(path)
    plt.close(figure)


def check_figure(path: Path) -> None:
    """Raise UserError, before minutes of work, if the figure could not be drawn."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as missing:
        hint = "pip install matplotlib==3.11.2"
        raise cql.UserError(f"--figure {path}: {missing}; {hint}") from None
    known = FigureCanvasBase.filetypes
    if path.suffix[1:] not in known:
        what = f"cannot draw {path.suffix or 'a file without a suffix'}"
        raise cql.UserError(f"--figure {path}: {what}; pass a .png or .pdf file")
    if not path.absolute().parent.is_dir():
        what = "its directory does not exist"
        raise cql.UserError(f"--figure {path}: {what}; create it first")


def table_path(out: Path) -> Path:
    """Return the file that --out names, and make its directory. Raise UserError."""
    path = out if out.suffix == ".csv" else out / "judge.csv"
    with cql.errors_as(cql.UserError, f"--out {out}: cannot be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    return path


# ---- Command line --------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError with one line, without the usage text."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """Return the parsed options. Raise UserError for invalid ones."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name, **more):
        default = getattr(Options, name.removeprefix("--"), None)
        if default is not None:
            more |= {"type": type(default), "default": default}
            more["help"] += f" ({default})"
        parser.add_argument(name, **more)

    text = "run directory, checkpoint file, or directory of runs"
    add("runs", nargs="+", type=Path, metavar="RUN", help=text)
    text = "which file of a run directory: checkpoint.pt, the last, or best.pt"
    add("--checkpoint", default="checkpoint.pt", metavar="NAME", help=text)
    text = "data to judge on, as cql.py's --env; default: the runs' own"
    add("--env", help=text)
    text = "table to write: a .csv file, or a directory for judge.csv (default: .)"
    add("--out", type=Path, default=Path("."), help=text)
    add("--figure", type=Path, help="figure of value against updates to write")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--updates", help="updates of the critics")
    text = "of the critics and of the model of the recorded actions"
    add("--batch_size", help=f"transitions of an update {text}")
    add("--hidden_dim", help=f"width of hidden layers {text}")
    add("--n_hidden_layers", help=f"hidden layers {text}")
    add("--n_critics", help="critics for each policy")
    add("--lr", help=f"learning rate of Adam {text}")
    add("--soft_target_update_rate", help="Polyak averaging rate of the target critics")
    add("--support", help="least share of the recorded actions that are supported")
    add("--log_freq", help="updates between rows of the table")
    add("--seed", help="seed of initial networks and batches")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Judge, print and write; return the exit status. Raise UserError."""
    names = Options.__dataclass_fields__
    options = Options(**{name: getattr(arguments, name) for name in names})
    check_options(options)
    if arguments.figure is not None:
        check_figure(arguments.figure)
    env = arguments.env
    if env is not None:
        env = cql.read_text("env", env)
        if env is None:
            raise cql.UserError("--env null: judging needs data; pass a dataset")
    cql.keep_freed_memory()
    device = cql.pick_device(cql.TrainConfig(device=arguments.device))
    more = {"env": env, "device": device, "batch_size": options.batch_size}
    policies, data = load(arguments.runs, arguments.checkpoint, **more)
    path = table_path(arguments.out)

    n_files = len({policy.checkpoint for policy in policies})
    cql.say(f"policies: {len(policies)}, of {n_files} checkpoint(s)")
    n_episodes = len(data.dataset.lengths)
    text = f"data: {len(data.rows):,} transitions, {n_episodes:,} episodes"
    cql.say(f"{text}, mean discounted return {format_number(data.value)}")
    enough = data.enough_updates(options)
    if options.updates < enough:
        text = f"--updates {options.updates}: too few for values to settle"
        cql.say(f"{text}; pass {max(enough, Options.updates)} or more")
    text = f"{options.updates:,} updates of {options.n_critics} critic(s) each"
    cql.say(f"fitted Q evaluation on the data's support: {text}, on {device}")

    def report(table: List[dict]) -> None:
        rows = last_rows(table)
        known = [row["value"] for row in rows if not math.isnan(row["value"])]
        low, high = [format_number(f(known or [math.nan])) for f in (min, max)]
        settled = sum(row["settled"] for row in rows)
        text = f"update {rows[0]['update']:>9,}  values {low} to {high}"
        cql.say(f"{text}, {settled} of {len(rows)} settled")
        write_table(table, path)

    table = judge(policies, data, options, report)
    cql.say(format_ranking(table, data))
    chosen, reason = recommend(table, data.enough_updates(options))
    if chosen is None:
        cql.say(f"no recommendation: {reason}")
    else:
        cql.say(f"recommended: {name_of(chosen)}: {reason}")
        export = f"scripts/export_onnx.py {chosen['checkpoint']} policy.onnx"
        cql.say(f"next: python {export} --run {chosen['run']}")
    if arguments.figure is not None:
        draw(table, data, arguments.figure)
        cql.say(f"wrote {path}, {arguments.figure}")
    else:
        cql.say(f"wrote {path}")
    finite = [math.isfinite(row["value"]) for row in last_rows(table)]
    return 0 if all(finite) else 3


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status."""
    try:
        return run(parse(argv))
    except cql.UserError as error:
        text = str(error).replace("\n", " ")
        print(f"judge.py: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (cql.MachineError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"judge.py: failed: {cql.brief(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
