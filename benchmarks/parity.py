"""Compare ten updates of cql.py with ten of an older cql.py, from the same weights.

    git show bd30250:cql.py > OLD.py
    python benchmarks/parity.py OLD.py

Both files get the same initial weights, the same data and the same noise, in float64, in
each of the settings below. The table has the largest difference in any metric of the ten
updates, in any parameter after them (target critics included), and in any optimizer
moment, each divided by the larger of 1 and the size of the value. OLD.py must be the
file of commit bd30250 or have the same layout.
"""

import argparse
import csv
import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict, List

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

UPDATES, BATCH, OBS, ACT = 10, 16, 5, 2
LAGRANGE = {"cql_lagrange": True, "cql_target_action_gap": 1.0}
ONLINE = {"online_iterations": 40, "cal_ql": True, "cql_alpha_online": 0.5}
SETTINGS = {
    "CORL": {},
    "four stacked runs": {"seed": [0, 1], "cql_alpha": [1.0, 10.0]},
    "backward through 1 action": {"cql_backward_actions": 1},
    "backward through 3 actions, two runs": {"cql_backward_actions": 3, "seed": [0, 1]},
    "penalty on 5 states": {"cql_states": 5},
    "penalty on 5 states through 1 action": {"cql_states": 5, "cql_backward_actions": 1},
    "Lagrange": LAGRANGE,
    "Lagrange, two gap targets": {**LAGRANGE, "cql_target_action_gap": [0.5, 3.0]},
    "max target backup, entropy backup": {
        "cql_max_target_backup": True,
        "backup_entropy": True,
    },
    "no importance weights": {"cql_importance_sample": False},
    "no importance weights, through 2 actions": {
        "cql_importance_sample": False,
        "cql_backward_actions": 2,
    },
    "two proposals, temperature 0.5": {"penalty": "two_proposals", "cql_temp": 0.5},
    "policy_kl, two temperatures": {"penalty": "policy_kl", "cql_temp": [0.5, 2.0]},
    "mean, through 1 action": {"penalty": "mean", "cql_backward_actions": 1},
    "clipped gap": {"cql_clip_diff_min": 4.5, "cql_clip_diff_max": 6.0},
    "warm-up, targets every third update": {"bc_steps": 4, "target_update_period": 3},
    "fixed temperature": {
        "use_automatic_entropy_tuning": False,
        "alpha_multiplier": 0.3,
    },
    "REDQ": {"n_critics": 4, "n_target_critics": 2, "seed": [0, 1]},
    "Cal-QL": {"cal_ql": True},
    "Cal-QL through 2 actions": {"cal_ql": True, "cql_backward_actions": 2},
    "Cal-QL online, one buffer": {**ONLINE, "seed": [0, 1]},
    "Cal-QL online, half offline data": {**ONLINE, "mixing_ratio": 0.5},
    "default initialization, one layer": {
        "orthogonal_init": False,
        "q_n_hidden_layers": 1,
    },
    "discrete": {"discrete": True},
    "discrete, Lagrange, REDQ, two runs": {
        "discrete": True,
        **LAGRANGE,
        "seed": [0, 1],
        "n_critics": 3,
        "n_target_critics": 2,
    },
}


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("old_cql", path)
    module = sys.modules["old_cql"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Side:
    """The agent of one file, with its data and its replay."""

    def __init__(self, module: ModuleType, flags: dict, discrete: bool):
        sizes = {"hidden_dim": 32, "batch_size": BATCH, "policy_lr": 1e-3, "qf_lr": 1e-3}
        config = module.TrainConfig(**{"cql_alpha": 5.0, **sizes, **flags})
        actions = gym.spaces.Box(-1, 1, (ACT,))
        if discrete:
            actions = gym.spaces.Discrete(3)
        observations = gym.spaces.Box(-np.inf, np.inf, (OBS,))
        task = module.make_task(observations, actions)
        episodes = [self.episode(module, seed, discrete) for seed in range(3)]
        self.module = module
        self.data = module.Dataset(config, episodes, task)
        # Datasets are of float32; the update is of float64.
        for name, column in self.data.columns.items():
            self.data.columns[name] = column.double()
        self.data.observations = self.data.observations.double()
        statistics = self.data.statistics()
        self.agent = module.make_agent(config, task, "cpu", statistics)
        self.replay = module.Replay(config, self.data, self.agent)
        if config.online_iterations:
            self.go_online(config, discrete)

    def episode(self, module: ModuleType, seed: int, discrete: bool):
        rng = np.random.default_rng(seed)
        rewards = rng.normal(size=20)
        actions = rng.uniform(-1, 1, (20, ACT))
        if discrete:
            actions = rng.integers(3, size=(20, 1))
        return module.Episode(
            observations=rng.normal(size=(21, OBS)),
            actions=actions,
            rewards=rewards,
            terminations=np.arange(20) == 19,
            where="here",
            whole=True,
            recorded_rewards=rewards,
        )

    def go_online(self, config, discrete: bool) -> None:
        """Add twenty steps of every run to the replay: an episode and a half."""
        rng = np.random.default_rng(9)
        runs = list(range(len(self.agent.runs)))
        for step in range(20):
            batch = {
                "observations": rng.normal(size=(len(runs), OBS)),
                "actions": rng.uniform(-1, 1, (len(runs), ACT)),
                "rewards": rng.normal(size=len(runs)),
                "next_observations": rng.normal(size=(len(runs), OBS)),
                "terminations": np.zeros(len(runs)),
            }
            if hasattr(self.module, "Batch"):
                batch = self.module.Batch(**batch)
            self.replay.add(runs, batch)
            if step == 12:
                for run in runs:
                    self.replay.end_episode(run, rng.normal(size=13).tolist())


def old_layers(name: str) -> str:
    """The old file's name of a parameter of the new one."""
    network, layers, rest = name.partition(".net.")
    if not layers:
        return name
    place, kind = rest.split(".")
    return f"{network}.layers.{int(place) // 2}.{kind}"  # every other one is a ReLU


def new_form(name: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """An old parameter in the new file's shape, which is [..., out, in] for weights."""
    if name.endswith("weight"):
        tensor = tensor.transpose(-1, -2)
    return tensor.reshape(like.shape)


def difference(new: torch.Tensor, old: torch.Tensor) -> float:
    size = old.detach().abs().max().clamp(min=1)
    return float((new.detach() - old.detach()).abs().max() / size)


def compare(old_module: ModuleType, flags: dict) -> Dict[str, float]:
    """The largest differences between both files in one setting."""
    flags = dict(flags)
    discrete = flags.pop("discrete", False)
    new = Side(cql, flags, discrete)
    old = Side(old_module, flags, discrete)
    old_parameters = dict(old.agent.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in old_parameters.values():  # fresh critics hardly differ
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise)
        for name, parameter in new.agent.named_parameters():
            value = old_parameters[old_layers(name)]
            parameter.copy_(new_form(name, value, parameter))
    in_metrics = 0.0
    for update in range(UPDATES):
        noise = old.agent.draw(BATCH)
        batch = old.replay.sample(noise.fractions)
        wanted = old.agent.update(batch, noise)
        noise = {name: x for name, x in noise._asdict().items() if x is not None}
        batch = new.replay.sample(noise["fractions"])
        stage = cql.stage_of(new.agent.config, update)
        metrics = new.agent.update(batch, noise, *stage)
        if metrics.keys() != wanted.keys():
            raise SystemExit(f"metrics differ: {metrics.keys() ^ wanted.keys()}")
        for name, value in metrics.items():
            in_metrics = max(in_metrics, difference(value, wanted[name]))
    in_parameters = in_moments = 0.0
    for name, parameter in new.agent.named_parameters():
        value = old_parameters[old_layers(name)]
        changed = difference(parameter, new_form(name, value, parameter))
        in_parameters = max(in_parameters, changed)
        if parameter in new.agent.optimizer.state:
            moments = new.agent.optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                moment = old.agent.optimizer.state[value][key]
                moment = new_form(name, moment, parameter)
                in_moments = max(in_moments, difference(moments[key], moment))
    return {
        "runs": len(new.agent.runs),
        "metrics": in_metrics,
        "parameters": in_parameters,
        "moments": in_moments,
    }


def write(path: Path, rows: List[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="the older cql.py")
    parser.add_argument("--out", type=Path, default=Path("parity.csv"), help="the table")
    options = parser.parse_args()
    if not options.old.is_file():
        parser.error(f"{options.old}: no such file; the docstring has the command")
    torch.set_default_dtype(torch.float64)
    old = load_module(options.old)
    known = {each.name for each in dataclasses.fields(old.TrainConfig)}
    rows = []
    for name, flags in SETTINGS.items():
        unknown = set(flags) - known - {"discrete"}
        if unknown:
            parser.error(f"{options.old}: has no flag {', '.join(sorted(unknown))}")
        row = {"setting": name, **compare(old, flags)}
        for key in ("metrics", "parameters", "moments"):
            row[key] = f"{row[key]:.1e}"
        rows.append(row)
        numbers = f"metrics {row['metrics']}  parameters {row['parameters']}"
        print(f"{name:42} {numbers}  moments {row['moments']}", flush=True)
    write(options.out, rows)


if __name__ == "__main__":
    main()
