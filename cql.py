"""Conservative Q-Learning (CQL) in one file: read it, run it, sweep it, fork it.

CQL learns a policy from recorded data alone. The algorithm is Kumar et al.,
"Conservative Q-Learning for Offline Reinforcement Learning", NeurIPS 2020 (arXiv
2006.04779), on the soft actor-critic of Haarnoja et al. (arXiv 1812.05905). Flags and
defaults are those of CORL's offline cql.py. Several runs (seeds, penalty weights) train
at once.

    python cql.py --config_path configs/quickstart.yaml        # minutes on a laptop
    python cql.py --env mujoco/hopper/medium-v0 --seed '[0,1,2]' --cql_alpha '[1,5,10]'
    python cql.py --config_path configs/hopper.yaml --resume runs/hopper  # or continue
    python cql.py --load_model runs/hopper --max_timesteps 0              # only evaluate

Where to look. `train` has the loop, `ContinuousCQL.losses` the losses,
`conservative_gap` the penalty, `Replay.sample` the batch, `Agent.update` the optimizer's
step, `Evaluator` the episodes, `Run.payload` the content of a checkpoint.

Networks, losses, `action` and `q_of` are written for one run, in the shapes of the
paper: `.mean()` is the mean over the batch. torch.func.vmap applies them to all runs
(`Layout`). Only what surrounds them has the leading dimension R. A metric is one more
entry of the dictionary that a loss returns.

Letters in shapes: R runs, N critics, B batch, O observation dimensions, A action
dimensions (discrete: number of actions), K = cql_n_actions, M actions of a state, n any
number of rows, in the penalty the states that it uses, which are the first ones of the
batch. In the losses T is the number of target actions of a state (1 or K), in the data
the number of steps of an episode. Inside the algorithm, actions are in [-1, 1]; `Units`
converts them from and to the environment's bounds.
"""

import copy
import csv
import ctypes
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import json
import logging
import math
import operator
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
import uuid
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import (
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
    get_args,
    get_origin,
)
from unittest import mock

import filelock
import gymnasium as gym
import h5py
import huggingface_hub.constants
import minari
import numpy as np
import pyrallis
import torch
import torch.nn as nn
import torch.nn.functional as F
import wandb
import yaml
from minari.dataset._storages import hdf5_storage
from minari.dataset.minari_dataset import MinariDataset
from minari.dataset.minari_storage import is_image_space
from minari.serialization import deserialize_space, serialize_space
from minari.storage.datasets_root_dir import get_dataset_path
from pyrallis.argparsing import ArgumentParser
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

# ======================================================================================
# Configuration
# ======================================================================================


@dataclass
class TrainConfig:
    """All flags. Names and defaults are those of CORL's offline cql.py unless a comment
    says otherwise. A flag marked [list] also takes a list of values; all combinations
    of the values train at once."""

    # ---- Data ----

    # Minari id, directory of a Minari dataset, D4RL .hdf5 file, or a list of these;
    # null: no data, only transitions that are collected online in eval_env
    env: Union[List[str], str, None] = "mujoco/hopper/medium-v0"
    normalize: bool = True  # Standardize observations with the dataset's mean and std
    # Multiply rewards by 1000 / (largest - smallest return of an episode); only hopper,
    # halfcheetah and walker2d
    normalize_reward: bool = False
    # Rewards become r * reward_scale + reward_bias (CORL: 5); null: scale them so that
    # the largest discounted return-to-go of the data is 100
    reward_scale: Optional[float] = 1.0
    reward_bias: float = 0.0  # See reward_scale; always applied (CORL: -1)

    # ---- Run ----

    # auto, cpu, cuda or cuda:N (CORL's default: cuda)
    device: str = "auto"
    seed: Union[int, List[int]] = 0  # Seed of initialization and training noise [list]
    max_timesteps: int = 1_000_000  # Number of offline updates
    offline_iterations: Optional[int] = None  # Another name for max_timesteps
    # Parent of new run directories; null: write no files and do not log to wandb
    # (CORL: null)
    checkpoints_path: Optional[str] = "runs"
    # Run directory to continue; a run starts there if the directory is new or empty
    resume: Optional[str] = None
    # Checkpoint or run directory to start from: weights, optimizers, statistics
    load_model: Optional[str] = ""
    log_freq: int = 1000  # Updates between rows of metrics.csv
    # Updates between checkpoint_<step>.pt files, which are kept; 0: only checkpoint.pt
    checkpoint_freq: int = 0
    project: str = "CORL"  # wandb project
    group: str = "CQL-D4RL"  # wandb group
    name: str = "CQL"  # Name of the run, first part of its directory's name

    # ---- Evaluation ----

    # Environment to evaluate in: a registered id or module:id; null: the environment
    # that the dataset records; none: no evaluation
    eval_env: Optional[str] = None
    eval_freq: int = 5000  # Updates between evaluations
    n_episodes: int = 10  # Episodes of one evaluation
    eval_seed: int = 0  # Seed of evaluation episodes, beside the run's own
    # Time limit of evaluation and online episodes; null: the environment's own limit or,
    # if it has none, the length of the data's longest episode, at least 1000
    max_episode_steps: Optional[int] = None

    # ---- Algorithm ----

    # Transitions per update and run
    batch_size: int = 256
    discount: float = 0.99  # Discount factor
    # Rewards of the data that a target sums before it bootstraps; online steps have 1
    n_steps: int = 1
    # Sample a transition of the data in proportion to exp(trajectory_weighting * A),
    # where A is its episode's return minus a prediction of that return from the first
    # observation, divided by the range of returns (advantage weighting, arXiv
    # 2306.13085); 0: all equally likely
    trajectory_weighting: float = 0.0
    policy_lr: float = 3e-5  # Learning rate of policy and temperature
    qf_lr: float = 3e-4  # Learning rate of critics and Lagrange multiplier
    soft_target_update_rate: float = 5e-3  # Polyak averaging rate of the target critics
    target_update_period: int = 1  # Updates between target steps
    alpha_multiplier: float = 1.0  # Factor on the entropy temperature
    use_automatic_entropy_tuning: bool = True  # Learn the entropy temperature
    backup_entropy: bool = False  # Subtract alpha * log pi from the bootstrapped target
    # Number of initial updates that train the policy by behavior cloning
    bc_steps: int = 0
    # Weight, in the policy's loss, of the mean squared difference between the policy's
    # mean action and the batch's, times the mean |Q|: TD3+BC's 1 / alpha, there 0.4
    # (arXiv 2106.06860)
    bc_weight: float = 0.0
    # Weight of the penalty, twice the paper's alpha [list]
    cql_alpha: Union[float, List[float]] = 10.0
    # Actions sampled from each of the three proposal distributions
    cql_n_actions: int = 10
    cql_importance_sample: bool = True  # Weight actions by 1 / their proposal density
    cql_temp: Union[float, List[float]] = 1.0  # Temperature of log-sum-exp [list]
    cql_lagrange: bool = False  # Learn the penalty weight as a Lagrange multiplier
    # Gap at which cql_lagrange holds the penalty [list]
    cql_target_action_gap: Union[float, List[float]] = -1.0
    cql_max_target_backup: bool = False  # Bootstrap from the best of several actions
    cql_clip_diff_min: float = -math.inf  # Lower bound on a transition's gap
    cql_clip_diff_max: float = math.inf  # Upper bound on a transition's gap
    penalty: str = "logsumexp"  # logsumexp, two_proposals, policy_kl or mean
    cal_ql: bool = False  # Cal-QL: penalized Q is at least the return-to-go
    is_sparse_reward: bool = False  # Cal-QL: treat failed episodes as infinitely long

    # ---- Networks ----

    # Width of every hidden layer
    hidden_dim: int = 256
    q_n_hidden_layers: int = 3  # Hidden layers of a critic
    orthogonal_init: bool = True  # Initialize critics orthogonally (policies never are)
    policy_log_std_multiplier: float = 1.0  # Initial factor on the policy's log std
    # Rate at which an average of the policy's weights follows them, of which the average
    # then acts: in evaluation, online and in every use of the policy; 0: no average
    policy_average_rate: float = 0.0
    n_critics: int = 2  # Critics; targets take their minimum
    # Size of the random subset of critics whose minimum is the target (REDQ); null: all
    # of them
    n_target_critics: Optional[int] = None

    # ---- Online ----

    # Environment steps after the offline updates
    online_iterations: int = 0
    buffer_size: int = 2_000_000  # Capacity of the online buffer, without the dataset
    mixing_ratio: float = -1.0  # Offline fraction of an online batch; -1: one buffer
    cql_alpha_online: Optional[float] = None  # Online penalty weight; null: cql_alpha
    utd: int = 1  # Updates per environment step
    exploration_epsilon: float = 0.1  # Probability of a random action (discrete, online)

    # ---- Speed ----

    # Sampled actions to backpropagate the penalty through; 0: all
    cql_backward_actions: int = 0
    cql_states: int = 0  # States of the batch that are penalized; 0: all
    # Precision of matrix products: fp32, tf32 (GPU only) or bf16 (critics only; fp32 on
    # processors without avx512_bf16, where bf16 is slow)
    precision: str = "fp32"
    # Use torch.compile; null: only for runs long enough to amortize the compile time of
    # about a minute
    compile: Optional[bool] = None

    def __post_init__(self):
        if self.offline_iterations is not None:
            self.max_timesteps = self.offline_iterations
            self.offline_iterations = None


FIELDS = {each.name: each for each in dataclasses.fields(TrainConfig)}
SWEPT = ("seed", "cql_alpha", "cql_temp", "cql_target_action_gap")  # may be lists
PRECISIONS = ("fp32", "tf32", "bf16")
PENALTIES = ("logsumexp", "two_proposals", "policy_kl", "mean")  # conservative_gap
FROM_0 = (0, math.inf)
FROM_1 = (1, math.inf)
FRACTION = (0, 1)
# The smallest and the largest value of each flag that has such limits.
RANGES = {
    "max_timesteps": FROM_0,
    "seed": FROM_0,
    "log_freq": FROM_1,
    "checkpoint_freq": FROM_0,
    "eval_freq": FROM_1,
    "n_episodes": FROM_1,
    "eval_seed": FROM_0,
    "max_episode_steps": FROM_1,
    "batch_size": FROM_1,
    "discount": FRACTION,
    "n_steps": FROM_1,
    "trajectory_weighting": FROM_0,
    "policy_lr": FROM_0,
    "policy_average_rate": FRACTION,
    "qf_lr": FROM_0,
    "soft_target_update_rate": FRACTION,
    "target_update_period": FROM_1,
    "alpha_multiplier": FROM_0,
    "bc_steps": FROM_0,
    "bc_weight": FROM_0,
    "cql_alpha": FROM_0,
    "cql_n_actions": FROM_1,
    "hidden_dim": FROM_1,
    "q_n_hidden_layers": FROM_1,
    "n_critics": FROM_1,
    "n_target_critics": FROM_1,
    "online_iterations": FROM_0,
    "buffer_size": FROM_1,
    "cql_alpha_online": FROM_0,
    "utd": FROM_1,
    "exploration_epsilon": FRACTION,
    "cql_backward_actions": FROM_0,
    "cql_states": FROM_0,
}
BOOLEAN = (bool, Optional[bool])
MAY_BE_INFINITE = ("cql_clip_diff_min", "cql_clip_diff_max")
# Flags that a resumed run may change, and flags that load_model does not inherit.
RESUMABLE = (
    "max_timesteps offline_iterations online_iterations device eval_freq "
    "n_episodes eval_seed eval_env max_episode_steps log_freq checkpoint_freq project "
    "group name checkpoints_path resume env"
).split()
NOT_INHERITED = (
    "max_timesteps offline_iterations online_iterations device compile project "
    "group name checkpoints_path resume load_model"
).split()
# Flags that have no effect on discrete actions. DiscreteCQL refuses two more.
CONTINUOUS = (
    "alpha_multiplier use_automatic_entropy_tuning backup_entropy policy_lr bc_steps "
    "cql_n_actions cql_importance_sample cql_max_target_backup cql_backward_actions "
    "cql_states policy_log_std_multiplier policy_average_rate bc_weight"
).split()


class UserError(Exception):
    """Bad input of the user: one line on stderr, exit status 2."""


class MachineError(Exception):
    """Failure of the machine, such as a full disk: one line on stderr, exit status 1."""


def brief(error) -> str:
    """Return the first 200 characters of an exception's text, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def errors_as(kind: type, where: str, errors=Exception):
    """Raise any exception of the block as `kind` (UserError or MachineError)."""
    try:
        yield
    except (UserError, MachineError):
        raise
    except errors as error:
        raise kind(f"{where}: {brief(error)}") from None


def parse_as(kind: type, value):
    """Return the value as `kind`. Raise ValueError for a fraction as int or for text as
    bool."""
    if isinstance(value, (list, dict, type(None))):
        raise ValueError(value)
    if isinstance(value, bool) != (kind is bool):
        raise ValueError(value)
    if kind is int and not isinstance(value, int):  # YAML reads 1e6 as text
        value = float(value)
        if value % 1:
            raise ValueError(value)
    return kind(value)


KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    List[int]: "a list of whole numbers, written as '[0, 1]'",
    List[float]: "a list of numbers, written as '[0, 1]'",
    List[str]: "a list of texts, written as '[a, b]'",
}
for _kind in (bool, int, float, str):
    pyrallis.decode.register(_kind, functools.partial(parse_as, _kind))


def check_name(name: str, where: str) -> None:
    """Raise UserError, with the most similar flag, unless `name` is a flag."""
    if name == "fqe_updates":
        raise UserError(f"{where}: gone; scripts/judge.py evaluates finished runs")
    if name not in FIELDS:
        known = [*FIELDS, "config_path"]
        near = difflib.get_close_matches(str(name).replace("-", "_"), known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists all flags"
        raise UserError(f"{where}: unknown flag; {hint}")


def make_config(values: dict, where: str = "") -> TrainConfig:
    """Return the config of these flags, each converted to its field's type. Raise
    UserError for an unknown flag or a wrong type."""
    decoded = {}
    for name, value in values.items():
        check_name(name, f"{where}--{name}")
        kind = FIELDS[name].type
        try:
            decoded[name] = pyrallis.decode(kind, value)
        except Exception:
            kinds = get_args(kind) if get_origin(kind) is Union else (kind,)
            expected = " or ".join(KINDS.get(each, str(each)) for each in kinds)
            raise UserError(f"{where}--{name} {value!r}: expected {expected}") from None
    return TrainConfig(**decoded)


def merge_aliases(values: dict, where: str) -> dict:
    """Rename offline_iterations to max_timesteps, so that flags override a file."""
    n = values.pop("offline_iterations", None)
    if n is not None:
        if "max_timesteps" in values:
            raise UserError(
                f"{where}--max_timesteps and --offline_iterations are the same flag; "
                "pass one of them"
            )
        values["max_timesteps"] = n
    return values


class DecimalLoader(yaml.SafeLoader):
    """YAML with decimal integers: 010, as `seq -w` writes it, is 10 and not octal."""

    def construct_yaml_int(self, node: yaml.Node) -> int:
        """Return the integer of a scalar."""
        if re.fullmatch(r"[+-]?\d+", node.value):
            return int(node.value)
        return super().construct_yaml_int(node)


DecimalLoader.add_constructor("tag:yaml.org,2002:int", DecimalLoader.construct_yaml_int)


def read_yaml(text: str):
    """Return the plain values of a YAML text."""
    return yaml.load(text, DecimalLoader)


def read_config_file(path: Union[str, Path]) -> dict:
    """Return the flags in a YAML file. Raise UserError."""
    where = f"--config_path {path}"
    if not Path(path).exists():
        raise UserError(f"{where}: no such file; pass a YAML file of flags")
    with errors_as(UserError, where):
        values = read_yaml(Path(path).read_text("utf-8"))
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: empty, or not a mapping of flags; "
            "expected lines such as `seed: 0`"
        )
    for name, value in values.items():
        check_name(name, f"{path}: {name}")
        if is_null(name, value):
            values[name] = None
    return merge_aliases(values, f"{path}: ")


def is_null(name: str, value) -> bool:
    """Return whether the value is a word for null and the flag may be null."""
    optional = type(None) in get_args(FIELDS[name].type)
    return optional and value in ("null", "~", "None")  # wandb's sweeps write None


def read_text(name: str, text: str):
    """Return a flag's value on the command line: null, the text itself for a text flag
    (so that a name may be 007 or true), or parsed YAML."""
    kinds = get_args(FIELDS[name].type) or (FIELDS[name].type,)
    if is_null(name, text):
        return None
    if str in kinds and not (List[str] in kinds and text.startswith("[")):
        return text
    with errors_as(UserError, f"--{name} {text}"):
        return read_yaml(text)


def read_command_line(argv: List[str]) -> dict:
    """Return the flags of a command line, which override those of --config_path. A flag
    is `--name value`, `--name=value`, or `--name` alone if it is boolean. Raise
    UserError."""
    texts = {}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise UserError(
                f"unexpected argument {argument!r}; "
                "write a list as '[0, 1]', and pass a file with --config_path"
            )
        if name != "config_path":
            check_name(name, argument)
        if name in texts:
            raise UserError(f"--{name}: given twice; pass it once")
        if not equals and arguments and not arguments[0].startswith("--"):
            text = arguments.pop(0)
        elif not equals and name in FIELDS and FIELDS[name].type in BOOLEAN:
            text = "true"
        elif not equals:
            raise UserError(f"--{name}: expected a value; pass --{name} VALUE")
        texts[name] = text
    file = {}
    if "config_path" in texts:
        file = read_config_file(texts.pop("config_path"))
    values = {name: read_text(name, text) for name, text in texts.items()}
    return {**file, **merge_aliases(values, "")}


def print_help() -> None:
    """Print pyrallis's list of flags, in the groups of TrainConfig."""
    usage = "cql.py [--config_path FILE.yaml] [--FLAG VALUE ...]"
    # pyrallis reads the source once per flag, which takes seconds without a cache.
    source = functools.cache(inspect.getsource)
    with mock.patch.object(inspect, "getsource", source):
        parser = ArgumentParser(TrainConfig, usage=usage)
    title = "Command line"
    groups = {}
    for action in parser._actions:
        heading = re.match("---- (.*) ----\\s*", action.help)
        if heading:
            title = heading[1]
            action.help = action.help[heading.end() :]
        groups.setdefault(title, []).append(action)
    parser._action_groups = []
    for title, actions in groups.items():
        parser.add_argument_group(title)._group_actions = actions
    parser.print_help()


def config_of_run(directory: Path) -> dict:
    """Return the flags of the run in a directory; empty if there is none. Raise
    UserError."""
    if directory.is_file():
        raise UserError(f"--resume {directory}: a file; pass the run's directory")
    if (directory / "checkpoint.pt").exists():
        return read_checkpoint(directory)["config"]
    if (directory / "config.yaml").exists():
        return read_config_file(directory / "config.yaml")
    return {}


def read_config(argv: List[str]) -> TrainConfig:
    """Return the config of a command line. Flags that are not given come from the run to
    resume or the model to load. Raise UserError."""
    values = read_command_line(argv)
    given = make_config(values)
    base = {}
    if given.resume:
        base = config_of_run(Path(given.resume))
    resumed = bool(base)
    if given.load_model and not resumed:
        base = read_checkpoint(given.load_model)["config"]
        for name in NOT_INHERITED:
            base.pop(name, None)
    before = make_config(base)
    config = make_config({**base, **values})
    if resumed and config.compile is None:
        config.compile = before.compile
    for name in FIELDS:
        was = getattr(before, name)
        now = getattr(config, name)
        if resumed and name not in RESUMABLE and now != was:
            raise UserError(
                f"--{name} {now}: the run has {was!r}; "
                "a resumed run keeps it; leave the flag out"
            )
    return config


def check_number(name: str, number: float) -> None:
    """Raise UserError unless the number lies in the flag's range."""
    if not math.isfinite(number) and name not in MAY_BE_INFINITE:
        raise UserError(f"--{name} {number}: must be a finite number")
    low, high = RANGES.get(name, (-math.inf, math.inf))
    if not low <= number <= high:
        limits = f"lie in [{low}, {high}]" if high < math.inf else f"be at least {low}"
        raise UserError(f"--{name} {number}: must {limits}")


def algorithm_mistakes(config: TrainConfig) -> Dict[str, bool]:
    """Return messages about flags of the algorithm, and whether each applies."""
    penalty = config.penalty
    n_backward = config.cql_backward_actions
    n_targets = config.n_target_critics
    low = config.cql_clip_diff_min
    return {
        f"--precision {config.precision}: must be one of {', '.join(PRECISIONS)}": (
            config.precision not in PRECISIONS
        ),
        f"--penalty {penalty}: must be one of {', '.join(PENALTIES)}": (
            penalty not in PENALTIES
        ),
        f"--penalty {penalty}: needs --cql_importance_sample true": (
            penalty != "logsumexp" and not config.cql_importance_sample
        ),
        f"--cql_backward_actions {n_backward}: must be at most 3 * cql_n_actions": (
            n_backward > 3 * config.cql_n_actions
        ),
        f"--cql_states {config.cql_states}: must be at most --batch_size": (
            config.cql_states > config.batch_size
        ),
        f"--n_target_critics {n_targets}: must be at most --n_critics": (
            n_targets is not None and n_targets > config.n_critics
        ),
        f"--cql_temp {config.cql_temp}: must be above 0": np.min(config.cql_temp) <= 0,
        f"--cql_clip_diff_min {low}: must be at most --cql_clip_diff_max": (
            low > config.cql_clip_diff_max
        ),
        "--cql_target_action_gap: a list needs --cql_lagrange true": (
            isinstance(config.cql_target_action_gap, list) and not config.cql_lagrange
        ),
        "--is_sparse_reward true: needs a --discount below 1": (
            config.is_sparse_reward and config.discount == 1
        ),
    }


def phase_mistakes(config: TrainConfig) -> Dict[str, bool]:
    """Return messages about flags of data and phases, and whether each applies."""
    no_data = config.env is None
    ratio = config.mixing_ratio
    online = config.online_iterations
    needed = 0
    if no_data:
        needed = config.batch_size
    elif 0 < ratio < 1:
        needed = n_online_rows(config)
    too_few = f"a batch needs {needed} online transitions; pass at least that"
    statistics = config.normalize and not config.load_model
    offline = config.max_timesteps > 0 or config.normalize_reward or statistics
    no_env = config.eval_env in (None, "none")
    nothing_to_do = no_env or (not online and not config.load_model)
    return {
        f"--mixing_ratio {ratio}: must be -1 or lie between 0 and 1": (
            ratio != -1 and not 0 < ratio < 1
        ),
        f"--buffer_size {config.buffer_size}: {too_few}": (
            online and config.buffer_size < needed
        ),
        f"--online_iterations {online}: {too_few}": 0 < online < needed,
        "--online_iterations: needs an environment, not --eval_env none": (
            online and config.eval_env == "none"
        ),
        "--env null: without data, --eval_env and --online_iterations are needed": (
            no_data and nothing_to_do
        ),
        "--env null: without data, pass --max_timesteps 0, --normalize false and "
        "--normalize_reward false": no_data and offline,
        "--env null: without data, pass a number as --reward_scale": (
            no_data and online and config.reward_scale is None
        ),
        "--normalize_reward true: no effect with --reward_scale null; pass one": (
            config.normalize_reward and config.reward_scale is None
        ),
    }


def validate_algorithm(config: TrainConfig) -> None:
    """Raise UserError for values of another type or out of range, and for flags of the
    algorithm that contradict."""
    decoded = make_config(vars(config))
    for name, value in vars(config).items():
        values = value if isinstance(value, list) else [value]
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"--{name} {value}: empty, or a value twice; "
                "pass one or more different values"
            )
        for each in values:
            if isinstance(each, (int, float)):
                check_number(name, each)
        if value != getattr(decoded, name):
            raise UserError(f"--{name} {value!r}: pass {getattr(decoded, name)!r}")
    refuse(algorithm_mistakes(config))


def validate(config: TrainConfig) -> None:
    """Raise UserError for values out of range and for flags that contradict."""
    validate_algorithm(config)
    refuse(phase_mistakes(config))


def refuse(mistakes: Dict[str, bool]) -> None:
    """Raise UserError with the first message that applies."""
    for message, applies in mistakes.items():
        if applies:
            raise UserError(message)


def product_of_runs(config: TrainConfig) -> List[dict]:
    """Return number and swept flags of each run: the product of the flags' lists."""
    lists = []
    for name in SWEPT:
        value = getattr(config, name)
        lists.append(value if isinstance(value, list) else [value])
    runs = []
    for number, values in enumerate(itertools.product(*lists)):
        runs.append({"run": number, **dict(zip(SWEPT, values))})
    return runs


def pick_device(config: TrainConfig) -> torch.device:
    """Return the device that --device names, and apply --precision. Raise UserError."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    with errors_as(UserError, f"--device {name}: not available, pass --device cpu"):
        device = torch.empty(0, device=name).device  # cuda becomes cuda:0
    on_gpu = device.type == "cuda"
    if config.precision == "tf32" and not on_gpu:
        raise UserError("--precision tf32: needs a GPU; pass fp32 or bf16")
    if config.precision == "bf16" and not fast_bf16(device):
        say("precision: this processor lacks avx512_bf16, so fp32 is used")
    if on_gpu:
        torch.cuda.set_device(device)
    products = "high" if config.precision == "tf32" else "highest"
    torch.set_float32_matmul_precision(products)
    return device


def fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 is faster than float32 on the device."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def worth_compiling(config: TrainConfig, device: torch.device, discrete: bool) -> bool:
    """Return whether faster updates win back the start of torch.compile, which is taken
    to be a minute. Measured (benchmarks/README.md):

    On two CPU cores compiling saves some 1.5 ms an update, and with the exact gradient
    of continuous actions 0 to 2.9 ns for each activation of the critics' hidden layers;
    0.6 is used. Stacked runs gain nothing. On a GPU it saves half a millisecond."""
    updates = config.max_timesteps + config.online_iterations * config.utd
    if device.type == "cuda":
        return 0.5e-3 * updates > 60
    if len(product_of_runs(config)) > 1:
        return False
    states = config.cql_states or config.batch_size
    actions = 1 + 3 * config.cql_n_actions
    width = config.n_critics * config.q_n_hidden_layers * config.hidden_dim
    exact = not discrete and config.cql_backward_actions == 0
    activations = states * actions * width if exact else 0
    return (1.5e-3 + 0.6e-9 * activations) * updates > 60


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works; if not, for example without a C++ compiler,
    print why. A tiny function shows it within seconds."""
    try:
        torch.compile(lambda x: 2 * x)(torch.ones(8, device=device))
    except Exception as error:
        reason = brief(str(error).split("\n\n")[0])  # the rest is for debugging torch
        say(f"torch.compile does not work here, so it is not used: {reason}")
        return False
    return True


def keep_freed_memory() -> None:
    """Keep freed memory in this process. Otherwise glibc returns it to the system, and
    the page faults of the next update take a third of its time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def say(text: str) -> None:
    """Print a line without breaking the progress bar. Letters that the terminal's
    encoding lacks become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has ended (`| head`); keep training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def quiet():
    """Suppress warnings and what libraries print."""
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        with redirect_stderr(io.StringIO()):
            yield


# ======================================================================================
# Data
# ======================================================================================

# Returns of a random policy and of an expert, by the start of an environment's id, for
# datasets that record none. Source: D4RL's infos.py.
REFERENCE_RETURNS = {
    "Hopper-": (-20.272305, 3234.3),
    "HalfCheetah-": (-280.178953, 12135.0),
    "Walker2d-": (1.629008, 4592.3),
    "Ant-": (-325.6, 3879.7),
    "AntMaze_": (0.0, 1.0),
    "FrankaKitchen-": (0.0, 4.0),
    "PointMaze_UMaze-": (23.85, 161.86),
    "PointMaze_Medium-": (13.13, 277.39),
    "PointMaze_Large-": (6.7, 273.99),
    "AdroitHandPen-": (96.262799, 3076.8331),
    "AdroitHandHammer-": (-274.856578, 12794.1348),
    "AdroitHandDoor-": (-56.512833, 2880.5693),
    "AdroitHandRelocate-": (-6.425911, 4233.8778),
}
# The environment that the name of a D4RL file suggests, as the file records none: id,
# settings, observation and action dims.
D4RL_ENVIRONMENTS = {
    "hopper": ("Hopper-v4", {}, 11, 3),
    "halfcheetah": ("HalfCheetah-v4", {}, 17, 6),
    "walker2d": ("Walker2d-v4", {}, 17, 6),
    "ant": ("Ant-v4", {"use_contact_forces": True}, 111, 8),
}
D4RL_NAMES = (
    "ant antmaze door halfcheetah hammer hopper kitchen maze2d pen relocate walker2d"
).split()


@dataclass
class Task:
    """Spaces and environment of a dataset, as plain values that checkpoints keep."""

    observation_space: str  # Minari's JSON
    action_low: List[float]  # [A]
    action_high: List[float]  # [A]
    action_shape: List[int]
    action_dtype: str = "float32"
    discrete: bool = False  # if so, actions are the integers from low to high
    env_id: Optional[str] = None
    env_kwargs: dict = field(default_factory=dict)
    max_episode_steps: Optional[int] = None
    reference: Optional[List[float]] = None  # returns that score 0 and 100
    longest: int = 1000  # steps of the longest recorded episode, at least 1,000

    @functools.cached_property
    def observation_dim(self) -> int:
        return gym.spaces.flatdim(recorded_space(self.observation_space))

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Convert actions [..., A] to the environment's type, [n, *action_shape]."""
        if np.dtype(self.action_dtype).kind in "iu":
            actions = np.rint(actions)
        return actions.reshape(-1, *self.action_shape).astype(self.action_dtype)


class Episode(NamedTuple):
    """One recorded episode of T steps."""

    observations: np.ndarray  # [T + 1, O]
    actions: np.ndarray  # [T, A]
    rewards: np.ndarray  # [T]
    terminations: np.ndarray  # [T] 0 or 1
    where: str  # file and number, for messages
    whole: bool  # it ended by termination or time limit
    recorded_rewards: np.ndarray  # rewards, with those of steps that are left out
    # False: it continues a trajectory that a termination has split, so that its first
    # state is no initial state of the task (scripts/from_ogbench.py)
    initial: bool = True


@dataclass
class Episodes:
    """Episodes of one dataset after another. Each iteration reads them again, because
    all of them in the recorded type may take several times the memory of a Dataset."""

    sources: list  # of iterables of Episode
    lengths: List[int]  # steps of each episode, with those that are left out

    def __iter__(self) -> Iterator[Episode]:
        return itertools.chain.from_iterable(self.sources)

    def __len__(self) -> int:
        return len(self.lengths)


class Source:
    """Iterable that calls a generator function on each iteration."""

    def __init__(self, read: Callable[[], Iterator[Episode]]):
        self.read = read

    def __iter__(self) -> Iterator[Episode]:
        return self.read()


# A batch is a dictionary of these tensors of R runs, [R, B, ...]; without R, of one run.
# Functions of one run get it prepared: standardized observations, actions in [-1, 1] or
# counted from 0.
COLUMNS = (
    "observations",  # [R, B, O] raw
    "actions",  # [R, B, A] in the environment's bounds; discrete: [R, B, 1]
    "rewards",  # [R, B]
    "next_observations",  # [R, B, O] raw
    "terminations",  # [R, B] 1 where the episode terminated, not truncated
    "mc_returns",  # [R, B] discounted return-to-go; with cal_ql alone
    "discounts",  # [R, B] discount of the next observation's value; with n_steps > 1
)


def check_observation_space(space: gym.Space) -> None:
    """Raise UserError unless observations can be flattened to a vector."""
    if isinstance(space, gym.spaces.Dict):
        for part in space.values():
            check_observation_space(part)
        return
    if isinstance(space, gym.spaces.Tuple):
        for part in space:
            check_observation_space(part)
        return
    counted = gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary
    supported = isinstance(space, counted)
    if isinstance(space, gym.spaces.Box):
        supported = len(space.shape) <= 2 and not is_image_space(space)
    if not supported:
        raise UserError(
            f"observations in {brief(space)} are not supported; "
            "expected vectors, integers, or dictionaries and tuples of them"
        )


def action_fields(space: gym.Space) -> dict:
    """Return the fields of Task that an action space sets. Raise UserError if the space
    is not supported."""
    discrete = isinstance(space, gym.spaces.Discrete)
    low = high = np.zeros(1)
    if discrete:
        low = np.array([space.start])
        high = np.array([space.start + space.n - 1])
    elif isinstance(space, gym.spaces.Box) and space.is_bounded():
        low = space.low.ravel()
        high = space.high.ravel()
    if low.size == 0 or (low >= high).any():
        raise UserError(
            f"actions in {brief(space)} are not supported; "
            "expected a bounded Box, or a Discrete of two or more"
        )
    return {
        "action_low": low.astype(float).tolist(),
        "action_high": high.astype(float).tolist(),
        "action_shape": list(space.shape),
        "action_dtype": str(space.dtype),
        "discrete": discrete,
    }


def make_task(observation_space: gym.Space, action_space: gym.Space, **more) -> Task:
    """Return the task of these spaces. Raise UserError if they are not supported."""
    check_observation_space(observation_space)
    if gym.spaces.flatdim(observation_space) == 0:
        raise UserError("observations are empty; expected one number or more")
    text = serialize_space(observation_space)
    return Task(text, **action_fields(action_space), **more)


def recorded_space(text) -> gym.Space:
    """Return the space that Minari's JSON describes. Keys stay in the recorded order,
    which `flatten` follows; Minari's own reader sorts them."""
    space = json.loads(text) if isinstance(text, str) else text
    parts = space.get("subspaces")
    if space["type"] == "Dict":
        return gym.spaces.Dict([(key, recorded_space(parts[key])) for key in parts])
    if space["type"] == "Tuple":
        return gym.spaces.Tuple([recorded_space(part) for part in parts])
    return deserialize_space(json.dumps(space))


def flatten(space: gym.Space, value) -> np.ndarray:
    """Flatten all observations of an episode to [T + 1, O], as gym.spaces.flatten does
    with one observation."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        keys = list(space) if isinstance(space, gym.spaces.Dict) else range(len(space))
        parts = [flatten(space[key], value[key]) for key in keys]
        return np.concatenate(parts, axis=1)
    value = np.asarray(value)
    value = value.reshape(len(value), -1)
    if isinstance(space, gym.spaces.Discrete):
        return one_hot(value - space.start, np.array([space.n]))
    if isinstance(space, gym.spaces.MultiDiscrete):
        return one_hot(value - space.start.ravel(), space.nvec.ravel())
    return value


def one_hot(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return one-hot vectors [n, sum of sizes] of integers [n, k] below sizes [k]."""
    if (values < 0).any() or (values >= sizes).any():
        raise UserError("observations lie outside the recorded space; correct the space")
    columns = []
    for column, size in zip(values.T, sizes):
        columns.append(np.eye(size, dtype=np.float32)[column])
    return np.concatenate(columns, axis=1)


def minari_task(directory: Path) -> Task:
    """Return the task of a Minari dataset, from its metadata.json. Raise UserError.

    Nothing in the dataset runs. Minari would create the recorded environment, whose
    entry point may be any code, to find spaces that are missing; they are refused."""
    metadata = json.loads((directory / "metadata.json").read_text("utf-8"))
    spaces = {}
    for name in ("observation_space", "action_space"):
        if not metadata.get(name):
            raise UserError(f"metadata.json has no {name}; add it")
        spaces[name] = recorded_space(metadata[name])
    spec = metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}"
    spec = json.loads(spec)
    env_id = spec.get("id")
    if env_id is not None and not re.fullmatch(r"[\w/.-]+", env_id):
        raise UserError(
            f"records the environment {env_id!r}; "
            "expected a registered id, without a module"
        )
    settings = dict(spec.get("kwargs") or {})
    settings.pop("render_mode", None)
    low = metadata.get("ref_min_score")
    high = metadata.get("ref_max_score")
    reference = None
    if low is not None and high is not None:
        reference = [float(low), float(high)]
        if not reference[0] < reference[1]:
            raise UserError(f"reference scores {reference}: expected [min, max]")
    return make_task(
        **spaces,
        env_id=env_id,
        env_kwargs=settings,
        max_episode_steps=spec.get("max_episode_steps"),
        reference=reference,
    )


def read_minari(directory: Path) -> Tuple[Source, Task]:
    """Return episodes and task in a Minari dataset's data directory. Raise UserError."""
    task = minari_task(directory)
    return Source(functools.partial(minari_episodes, directory, task)), task


def minari_episodes(directory: Path, task: Task) -> Iterator[Episode]:
    """Read one episode of a Minari dataset after the other."""
    space = recorded_space(task.observation_space)
    dataset = MinariDataset(directory)
    ids = dataset.episode_indices
    # Reopen the file every ten episodes: HDF5 caches metadata while it is open.
    for first in range(0, len(ids), 10):
        # Most of the bytes are infos, which are not used here.
        with mock.patch.object(hdf5_storage, "_decode_info"):
            recorded = list(dataset.iterate_episodes(ids[first : first + 10]))
        metadata = list(dataset.storage.get_episode_metadata(ids[first : first + 10]))
        for each, about in zip(recorded, metadata):
            n = len(each.rewards)
            yield Episode(
                observations=flatten(space, each.observations),
                actions=np.asarray(each.actions).reshape(n, -1),
                rewards=each.rewards,
                terminations=each.terminations,
                where=f"{directory}, episode {each.id}",
                whole=bool(each.terminations[-1] or each.truncations[-1]),
                recorded_rewards=each.rewards,
                initial=not about.get("continued", False),
            )


def table_action_space(actions: np.ndarray) -> gym.Space:
    """Return the space of actions [n, ...] without a recorded space: discrete for one
    column of integers or booleans, otherwise a box in [-1, 1], as in D4RL."""
    if actions.size == len(actions) and actions.dtype.kind in "iub":
        low = int(actions.min())
        high = int(actions.max())
        return gym.spaces.Discrete(max(high - low + 1, 2), start=low)
    return gym.spaces.Box(-1, 1, actions.shape[1:])


def read_arrays(file: h5py.File) -> Dict[str, np.ndarray]:
    """Return the arrays [n, ...] of a D4RL file, except those of observations, which are
    large. Raise UserError."""
    needed = "observations", "actions", "rewards", "terminals"
    missing = [key for key in needed if key not in file]
    if missing:
        raise UserError(f"lacks D4RL's {missing}; it has {brief(list(file))}")
    arrays = {}
    lengths = {}
    for key in (*needed, "timeouts", "next_observations"):
        if key in file:
            kind = getattr(file[key], "dtype", np.dtype(object))
            if kind.kind not in "biuf" or file[key].ndim == 0:
                raise UserError(f"damaged or foreign: {key} are {brief(file[key])}")
            lengths[key] = len(file[key])
            if not key.endswith("observations"):
                arrays[key] = file[key][()]
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        found = ", ".join(f"{key} {n:,}" for key, n in lengths.items())
        raise UserError(f"rows differ: {found}; expected one row per step in each")
    for key in ("rewards", "terminals", "timeouts"):
        if key in arrays:
            if arrays[key].size != len(arrays[key]):
                shape = arrays[key].shape
                raise UserError(
                    f"{key} have shape {shape}; expected one number per step"
                )
            arrays[key] = arrays[key].ravel()
    shape = file["observations"].shape
    if "next_observations" in file and file["next_observations"].shape != shape:
        other = file["next_observations"].shape
        raise UserError(f"next_observations have shape {other}; expected {shape}")
    return arrays


def chunk_rows(array) -> int:
    """Return a number of rows of an array [n, ...] that hold about 2^18 numbers."""
    return max(1, 2**18 // math.prod(array.shape[1:]))


def find_ends(stored: h5py.Dataset, following: h5py.Dataset, ends) -> np.ndarray:
    """Add to the mask `ends` [n] the rows whose next observation (following) is not the
    observation (stored) of the next row. Return the next observations at all ends.

    Two observations are the same if they differ by a few roundings of the type in which
    the file stores them."""
    eps = np.finfo(np.float32).eps
    for array in (stored, following):
        if array.dtype.kind == "f":
            eps = max(eps, np.finfo(array.dtype).eps)
    rows = chunk_rows(stored)
    last = []
    scale = None
    for first in range(0, len(stored), rows):
        chunk = following[first : first + rows]
        here = stored[first + 1 : first + rows + 1].astype(np.float64)
        with np.errstate(all="ignore"):  # check_episode refuses NaN and infinity
            if scale is None:
                scale = here.std(axis=0) if len(here) else 0.0
            distance = np.abs(chunk[: len(here)] - here)
            same = distance <= 4 * eps * (np.abs(here) + scale)
        same = same.all(axis=tuple(range(1, same.ndim)))
        ends[first : first + len(here)] |= ~same
        last.append(chunk[ends[first : first + rows]])
    return np.concatenate(last)


def read_d4rl(path: Path) -> Tuple[Source, Task]:
    """Return episodes and task of a D4RL file, HDF5 with the arrays observations,
    actions, rewards, terminals and optionally timeouts and next_observations. Raise
    UserError.

    Without next_observations, the last next observation of an episode is unknown. If a
    time limit ended the episode, its last transition is left out, as in
    d4rl.qlearning_dataset. After a termination it stays, as its target does not
    bootstrap."""
    with h5py.File(path, "r") as file:
        arrays = read_arrays(file)
        space = gym.spaces.Box(-np.inf, np.inf, file["observations"].shape[1:])
        task = make_task(space, table_action_space(arrays["actions"]))
        terminals = arrays["terminals"] != 0
        done = terminals | (arrays.get("timeouts", terminals) != 0)
        ends = done.copy()
        ends[-1] = True
        following = None
        if "next_observations" in file:
            following = find_ends(file["observations"], file["next_observations"], ends)
    n_found = int((ends & ~done)[:-1].sum())
    if n_found:
        say(f"{path.name}: {n_found:,} episodes end without terminals or timeouts:")
        say("  their last next observation is not the observation of the next row")
    elif following is None and "timeouts" not in arrays:
        say(f"{path.name}: has no timeouts, so only terminals end an episode;")
        say("  if time limits ended episodes, add timeouts: without these, the next")
        say("  episode counts as a continuation")
    last = np.flatnonzero(ends)
    read = functools.partial(d4rl_episodes, path, arrays, done, last, following)
    return Source(read), task


def d4rl_episodes(path: Path, arrays, done, ends, following) -> Iterator[Episode]:
    """Split a D4RL file at the rows `ends`, whose next observations are `following`."""
    rewards = arrays["rewards"]
    actions = arrays["actions"].reshape(len(rewards), -1)
    first = 0
    with h5py.File(path, "r") as file:
        stored = file["observations"]
        chunk = stored[:0]
        chunk_start = 0
        for number, last in enumerate(ends.tolist()):
            if last >= chunk_start + len(chunk):
                chunk_start = first
                chunk = stored[first : max(last + 1, first + chunk_rows(stored))]
            observations = chunk[first - chunk_start : last + 1 - chunk_start]
            end = observations[-1] if following is None else following[number]
            known = arrays["terminals"][last] != 0 or following is not None
            kept = slice(first, last + 1 if known else last)
            n_kept = kept.stop - first
            yield Episode(
                observations=np.concatenate([observations[:n_kept], end[None]]),
                actions=actions[kept],
                rewards=rewards[kept],
                terminations=arrays["terminals"][kept],
                where=f"{path}, episode {number}",
                whole=bool(done[last]),
                recorded_rewards=rewards[first : last + 1],
            )
            first = last + 1


def guess_environment(task: Task, name: str) -> None:
    """Set the environment that a D4RL file's name suggests, if its sizes match."""
    name = Path(name).name
    guess = D4RL_ENVIRONMENTS.get(re.split("[-_]", name)[0])
    if task.env_id is None and guess is not None:
        env_id, settings, observation_dim, action_dim = guess
        sizes = task.observation_dim, len(task.action_low)
        if sizes == (observation_dim, action_dim):
            task.env_id = env_id
            task.env_kwargs = settings
            say(f"{name}: the name suggests {env_id}, which is used for evaluation")
        else:
            say(f"{name}: the name suggests {env_id}, whose sizes differ; not used")


def minari_directory(name: str) -> Path:
    """Return the data directory of a Minari id; download it if needed. Raise
    UserError."""
    where = "the directory of Minari's datasets cannot be made"
    if os.path.expanduser("~") == "~" and "MINARI_DATASETS_PATH" not in os.environ:
        raise UserError(f"{where}, as there is no home; set MINARI_DATASETS_PATH")
    with errors_as(UserError, f"{where}; set MINARI_DATASETS_PATH", OSError):
        root = get_dataset_path()
    directory = get_dataset_path(name) / "data"
    if (directory / "metadata.json").exists():
        return directory
    if re.fullmatch(f"({'|'.join(D4RL_NAMES)})-[a-z-]+-v[0-2]", name):
        raise UserError(
            "an id of D4RL, whose data Minari does not have; "
            "pass D4RL's .hdf5 file, or an id that `minari list remote` shows"
        )
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", name):
        raise UserError(
            "no such directory or .hdf5 file; pass one, or a Minari id such as "
            "mujoco/hopper/medium-v0; for a table, see scripts/from_table.py"
        )
    with errors_as(
        UserError,
        f"no such directory or .hdf5 file, not in {root}, and the download failed",
    ):
        if "MINARI_REMOTE" not in os.environ:
            # Without a network, Minari would retry for minutes.
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=20)
        if not os.access(root, os.W_OK):
            raise UserError(f"{root} is not writable; set MINARI_DATASETS_PATH")
        say(f"downloading {name} ...")
        with filelock.FileLock(root / ".lock"), quiet():
            # Minari does nothing if another process has just downloaded it.
            minari.download_dataset(name)
    return directory


def read_episodes(name: str) -> Tuple[Episodes, Task]:
    """Return episodes and task of one entry of `env`: a directory, a file or a Minari
    id. Raise UserError."""
    path = Path(name)
    where = f"--env {name}"
    try:
        # Your own source goes here, as the first branch. It returns a list of Episode
        # and make_task(observation_space, action_space).
        if (path / "metadata.json").is_file():
            source, task = read_minari(path)
        elif (path / "data").is_dir():
            source, task = read_minari(path / "data")
        elif path.is_file():
            if not h5py.is_hdf5(path):
                way = "for a table, make a dataset with scripts/from_table.py"
                raise UserError(f"not an HDF5 file; {way}")
            source, task = read_d4rl(path)
        elif path.is_dir():
            what = "a directory without a Minari dataset (data/metadata.json)"
            raise UserError(f"{what}; pass a dataset, or a list of datasets")
        else:
            source, task = read_minari(minari_directory(name))
        if isinstance(source, Iterator):
            source = list(source)
        lengths = [len(each.recorded_rewards) for each in source]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except BlockingIOError:
        raise UserError(f"{where}: locked by a process that writes it; wait") from None
    except Exception as error:
        raise UserError(f"{where}: damaged or foreign: {brief(error)}") from None
    task.longest = max([1000] + lengths)
    return Episodes([source], lengths), task


def read_data(config: TrainConfig) -> Tuple[Episodes, Task]:
    """Return joined episodes and task of all entries of `env`. Raise UserError."""
    names = config.env if isinstance(config.env, list) else [config.env]
    joined_episodes = Episodes([], [])
    tasks = []
    for name in names:
        episodes, task = read_episodes(name)
        joined_episodes.sources += episodes.sources
        joined_episodes.lengths += episodes.lengths
        tasks.append(task)
    known = [task for task in tasks if task.env_id is not None]
    joined = (known or tasks)[0]
    for name, task in zip(names, tasks):
        join_task(joined, task, f"--env {name}")
        if config.eval_env is None:
            guess_environment(joined, name)
    return joined_episodes, joined


def join_task(joined: Task, task: Task, where: str) -> None:
    """Extend `joined` to the data of `task`. Raise UserError if they do not match."""
    joined.longest = max(joined.longest, task.longest)
    same_low = task.action_low == joined.action_low
    same = same_low and task.action_high == joined.action_high
    known = task.env_id is not None
    if task.discrete != joined.discrete or (known and not same):
        raise UserError(
            f"{where}: actions are {describe_actions(task)}, in the other data "
            f"{describe_actions(joined)}; join datasets of one action space"
        )
    if known and task.env_id != joined.env_id:
        raise UserError(
            f"{where}: recorded in {task.env_id}, not in {joined.env_id}; "
            "join datasets of one environment"
        )
    if known and task.env_kwargs != joined.env_kwargs:
        say(f"{where}: recorded with settings {task.env_kwargs}; evaluation takes")
        say(f"  the first dataset's, {joined.env_kwargs}")
    if joined.env_id is None and joined.discrete:  # each file may lack some actions
        joined.action_low = np.minimum(joined.action_low, task.action_low).tolist()
        joined.action_high = np.maximum(joined.action_high, task.action_high).tolist()


def check_episode(episode: Episode, task: Task) -> None:
    """Raise UserError unless the arrays have the task's sizes and finite numbers, and
    actions lie in its bounds."""
    n = len(episode.rewards)
    where = episode.where
    sizes = {
        "observations": (n + 1, task.observation_dim),
        "actions": (n, len(task.action_low)),
        "rewards": (n,),
        "terminations": (n,),
    }
    for name, size in sizes.items():
        array = np.asarray(getattr(episode, name))
        if array.shape != size or array.dtype.kind not in "biuf":
            raise UserError(
                f"{where}: {name} have shape {array.shape} and type {array.dtype}; "
                f"expected numbers of shape {size}"
            )
        # 3e38 is about the largest float32. NaN fails each comparison.
        low, high = (float(array.min()), float(array.max())) if array.size else (0, 0)
        if not (low > -3e38 and high < 3e38):
            row = np.argwhere(~((array > -3e38) & (array < 3e38)))[0, 0]
            raise UserError(
                f"{where}: {name} contain NaN or infinity, first in step {row}; "
                "remove the episode, or correct it"
            )
    if len(episode.recorded_rewards) < n:
        found = f"{len(episode.recorded_rewards)} recorded_rewards"
        raise UserError(f"{where}: {found}; expected one for each reward, or more")
    actions = np.asarray(episode.actions)
    if task.discrete and (actions % 1).any():
        raise UserError(f"{where}: discrete actions must be whole numbers; round them")
    low, high = np.array([task.action_low, task.action_high])
    middle = (low + high) / 2
    reach = 0.5001 * (high - low)
    if (np.abs(actions - middle) > reach).any():
        raise UserError(
            f"{where}: actions are not {describe_actions(task)}; "
            "rescale them, or name their environment with --eval_env"
        )


class Resolution:
    """Check that float32 resolves observations: raise UserError for a column of large
    numbers that differ by little, such as unix time. A column that is almost constant
    passes."""

    def __init__(self):
        self.n = 0
        self.first = None
        # Sums over the observations x: of x - first, which is exactly 0 for a constant
        # column, of its square, and of the size of x.
        self.moved = self.squared = self.size = 0.0

    def add(self, observations: np.ndarray) -> None:
        rows = chunk_rows(observations)
        for start in range(0, len(observations), rows):
            x = observations[start : start + rows].astype(np.float64)
            if self.first is None:
                self.first = x[0]
            moves = x - self.first
            self.n += len(x)
            self.moved = self.moved + moves.sum(axis=0)
            self.squared = self.squared + np.square(moves).sum(axis=0)
            self.size = self.size + np.abs(x).sum(axis=0)

    def check(self) -> None:
        variance = self.squared / self.n - np.square(self.moved / self.n)
        std = np.sqrt(np.maximum(variance, 0))
        size = self.size / self.n
        for column in np.flatnonzero((std > 1e-3) & (std < 1e-5 * size)):
            raise UserError(
                f"--env: column {column} of the observations has mean size "
                f"{size[column]:.6g} and std {std[column]:.3g}, which float32 cannot "
                "resolve; subtract a constant from it"
            )


def check_bounds(actions: np.ndarray, task: Task) -> None:
    """Print a line if the bounds are far wider than an action [n, A], since the policy
    acts within the bounds. Raise UserError if float32 cannot resolve the action within
    them."""
    if task.discrete:
        return
    largest = np.abs(actions).max(axis=0)
    for column, (low, high) in enumerate(zip(task.action_low, task.action_high)):
        wider = (high - low) / largest[column] if largest[column] > 0 else 0.0
        found = f"action {column} is at most {largest[column]:.3g} in size, but its "
        found += f"bounds are [{low:g}, {high:g}]"
        if wider > 1e5:
            way = "record the data with narrower bounds"
            raise UserError(f"--env: {found}, too wide for float32; {way}")
        if wider > 50:
            say(f"{found}; the policy may choose actions that the data do not have")


class Dataset:
    """All transitions, on the device. An observation is stored once: the next one of a
    transition is the row below its own."""

    def __init__(
        self, config: TrainConfig, episodes, task: Task, device="cpu", factor=None
    ):
        """Join the episodes (Episodes or a list). Raise UserError for too few
        transitions and for numbers out of bounds.

        factor: of the rewards, for normalize_reward or reward_scale null; None computes
        it from these episodes. A second dataset, for validation, takes the reward_factor
        of the first."""
        if not isinstance(episodes, Episodes):
            episodes = list(episodes)
            lengths = [len(each.recorded_rewards) for each in episodes]
            episodes = Episodes([episodes], lengths)
        arrays = self.join(episodes, task)
        n = int(self.lengths.sum())
        self.left_out = sum(episodes.lengths) - n
        self.check_size(config)
        check_bounds(arrays["actions"], task)
        self.cumulative = None  # [n] probabilities up to each transition; None: uniform
        if config.trajectory_weighting:
            probabilities = self.weigh_trajectories(config, arrays["observations"])
            self.cumulative = torch.as_tensor(np.cumsum(probabilities), device=device)
        self.columns = {}  # of a batch, [n, ...], except observations
        for name, array in arrays.items():
            self.columns[name] = torch.as_tensor(array, device=device)
        self.observations = self.columns.pop("observations")
        whole = self.all_returns[self.whole]
        self.returns = whole if len(whole) else self.all_returns  # not as `lengths`
        rewards = self.columns["rewards"]
        self.r_min = float(rewards.min())
        self.reward_factor = factor or reward_factor(self, whole, task, config)
        rewards = transform_rewards(rewards, self.reward_factor, config)
        self.columns["rewards"] = rewards
        self.r_min = float(rewards.min())
        self.r_max = float(rewards.max())
        # A resumed run compares this to learn whether its data are still the same.
        self.fingerprint = [n, float(rewards.double().sum()), self.size]
        if config.cal_ql:
            self.columns["mc_returns"] = self.all_returns_to_go(config)
        # An episode has one more observation than transitions.
        rows = np.arange(n) + np.repeat(np.arange(len(self.lengths)), self.lengths)
        self.rows = torch.as_tensor(rows, device=device)
        self.steps = None  # [n] to the next observation; None: always 1
        if config.n_steps > 1:
            self.sum_rewards(config)

    def check_size(self, config: TrainConfig) -> None:
        """Raise UserError if the data have fewer transitions than a batch."""
        n = int(self.lengths.sum())
        if n >= config.batch_size:
            return
        hint = "pass a smaller --batch_size"
        if self.left_out and n == 0:
            hint = "each episode is one row without a next observation; if the task "
            hint += "ends there, mark the rows as terminals (scripts/from_table.py: "
            hint += "--all-terminal)"
        what = f"--batch_size {config.batch_size}: the dataset has {n} transitions"
        raise UserError(f"{what}; {hint}")

    def join(self, episodes: Episodes, task: Task) -> Dict[str, np.ndarray]:
        """Return the columns of a batch in float32, all episodes after each other. Set
        all_returns and whole, of every episode, and lengths, kept_returns, initial and
        ended, of those that have transitions, and size. Raise UserError."""
        n = sum(episodes.lengths)
        arrays = {
            "observations": np.empty((n + len(episodes), task.observation_dim), "f4"),
            "actions": np.empty((n, len(task.action_low)), "f4"),
            "rewards": np.empty(n, "f4"),
            "terminations": np.empty(n, "f4"),
        }
        about = []  # of every episode
        resolution = Resolution()
        first = 0  # transition
        row = 0  # observation
        for each in episodes:
            check_episode(each, task)
            total = np.asarray(each.recorded_rewards).sum(dtype=np.float64)
            about.append((len(each.rewards), total, each.initial, each.whole))
            if len(each.rewards) == 0:
                continue
            resolution.add(np.asarray(each.observations))
            last = first + len(each.rewards)
            last_row = row + len(each.observations)
            arrays["observations"][row:last_row] = each.observations
            arrays["actions"][first:last] = each.actions
            arrays["rewards"][first:last] = each.rewards
            arrays["terminations"][first:last] = np.asarray(each.terminations) != 0
            first = last
            row = last_row
        if first > 0:
            resolution.check()
        self.size = float(np.sum(resolution.size))  # of all observations
        about = np.array(about, float).reshape(-1, 4)
        kept = about[about[:, 0] > 0]
        self.all_returns = about[:, 1]
        self.whole = about[:, 2:].all(1)
        self.lengths = kept[:, 0].astype(int)
        self.kept_returns = kept[:, 1]
        self.initial, self.ended = kept[:, 2:].T > 0
        arrays["observations"] = arrays["observations"][:row]
        for name in ("actions", "rewards", "terminations"):
            arrays[name] = arrays[name][:first]
        return arrays

    def __len__(self) -> int:
        return len(self.rows)

    def all_returns_to_go(self, config: TrainConfig) -> Tensor:
        """Return the discounted return-to-go of every transition, [n]."""
        ends = np.cumsum(self.lengths)[:-1]
        rewards = self.columns["rewards"].cpu().double().numpy()
        terminations = self.columns["terminations"].cpu().numpy()
        returns = []
        for columns in zip(np.split(rewards, ends), np.split(terminations, ends)):
            returns.append(returns_to_go(*columns, config, self.r_min))
        return torch.as_tensor(np.concatenate(returns)).to(self.observations)

    def sum_rewards(self, config: TrainConfig) -> None:
        """Let a transition span n_steps steps, or what is left of its episode. The
        actions after the first are the data's and not the policy's, which is not
        corrected, as in Rainbow (arXiv 1710.02298)."""
        rewards = self.columns["rewards"].clone()
        self.steps = torch.ones_like(self.rows)
        for k in range(1, config.n_steps):
            same_episode = self.rows[k:] == self.rows[:-k] + k
            later = config.discount**k * self.columns["rewards"][k:]
            rewards[:-k] += torch.where(same_episode, later, 0)
            self.steps[:-k] += same_episode
        last = torch.arange(len(self), device=rewards.device) + self.steps - 1
        self.columns["rewards"] = rewards
        self.columns["terminations"] = self.columns["terminations"][last]
        self.columns["discounts"] = config.discount ** self.steps.to(rewards)

    def weigh_trajectories(self, config: TrainConfig, observations) -> np.ndarray:
        """Return the probability of every transition, [n], by trajectory_weighting. An
        episode that continues another one belongs to the same trajectory. A trajectory
        whose end is unknown counts as an average one."""
        initial = self.initial.copy()
        initial[0] = True
        firsts = np.flatnonzero(initial)
        lengths = np.add.reduceat(self.lengths, firsts)
        returns = np.add.reduceat(self.kept_returns, firsts)
        whole = self.ended[np.append(firsts[1:], len(initial)) - 1]
        if not whole.any():
            whole[:] = True
        rows = (np.cumsum(self.lengths) - self.lengths + np.arange(len(initial)))[firsts]
        states = observations[rows[whole]].astype(np.float64)
        states -= states.mean(0)
        states /= states.std(0) + 1e-8
        # Ridge regression, so that many observations do not explain few returns.
        square = states.T @ states + states.shape[1] * np.eye(states.shape[1])
        centered = returns[whole] - returns[whole].mean()
        advantages = np.zeros(len(returns))
        weights = np.linalg.solve(square, states.T @ centered)
        advantages[whole] = centered - states @ weights
        # Not the range alone: rounding errors are not differences of returns.
        size = max(np.ptp(returns[whole]), 1e-5 * np.abs(returns[whole]).max()) or 1.0
        scaled = config.trajectory_weighting * (advantages - advantages.max()) / size
        likely = np.repeat(np.exp(scaled), lengths)
        return likely / likely.sum()

    def statistics(self) -> Tuple[Tensor, Tensor]:
        """Return mean and std + 1e-3 of the observations, [O] each, as in CORL."""
        # In chunks, because float64 observations would take twice the dataset's memory.
        chunks = self.rows.split(chunk_rows(self.observations))
        total = 0.0
        for rows in chunks:
            total = total + self.observations[rows].double().sum(0)
        mean = total / len(self)
        squares = 0.0
        for rows in chunks:
            squares = squares + (self.observations[rows] - mean).square().sum(0)
        return mean, (squares / len(self)).sqrt() + 1e-3

    def gather(self, index: Tensor) -> Dict[str, Tensor]:
        """Return the batch of the transitions at index [R, B]."""
        rows = self.rows[index]
        batch = {name: column[index] for name, column in self.columns.items()}
        batch["observations"] = self.observations[rows]
        steps = 1 if self.steps is None else self.steps[index]
        batch["next_observations"] = self.observations[rows + steps]
        return batch

    def index(self, fractions: Tensor) -> Tensor:
        """Map uniform numbers [R, B] in [0, 1) to transitions [R, B], equally likely or
        by trajectory_weighting. Both phases select offline rows by this function. The
        dataset is shared by all runs and not saved: priorities that change in training
        belong to `Replay`."""
        if self.cumulative is None:
            index = (fractions * len(self)).long()
        else:
            fractions = fractions.contiguous()
            index = torch.searchsorted(self.cumulative, fractions, right=True)
        return index.clamp(max=len(self) - 1)


def transform_rewards(rewards: Tensor, factor: float, config: TrainConfig) -> Tensor:
    """Return the rewards that the agent learns from; `original_returns` inverts this."""
    scale = 1.0 if config.reward_scale is None else config.reward_scale
    return rewards * factor * scale + config.reward_bias


def original_returns(returns, factor: float, config: TrainConfig):
    """Return returns of transformed rewards in units of the data's own rewards; NaN with
    a reward_bias, whose part in a return depends on the episode's length."""
    scale = factor if config.reward_scale is None else factor * config.reward_scale
    if config.reward_bias != 0 or scale == 0:
        return returns * math.nan
    return returns / scale


def discounted_sum(rewards, discount: float) -> float:
    """Return the discounted sum of an episode's rewards [T]."""
    return float(np.dot(rewards, discount ** np.arange(len(rewards))))


def returns_to_go(rewards, terminations, config: TrainConfig, r_min) -> np.ndarray:
    """Return the discounted sum of an episode's rewards [T] from each step on (Cal-QL,
    section 4).

    A termination ends the sum. Rewards after a time limit are unknown and left out. With
    is_sparse_reward, an episode whose rewards all equal the dataset's smallest counts as
    an episode that never ends. (CORL looks at the last reward only.)"""
    if config.is_sparse_reward and (rewards == r_min).all():
        return np.full(len(rewards), r_min / (1 - config.discount))
    factors = config.discount * (1 - np.asarray(terminations, float))
    returns = np.zeros(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + factors[t] * following
        returns[t] = following
    return returns


def reward_factor(data: Dataset, returns: np.ndarray, task: Task, config) -> float:
    """Return the factor of reward_scale null, or that of normalize_reward, from the
    returns of whole episodes. Raise UserError if the data do not determine it."""
    if config.reward_scale is None:
        largest = float(data.all_returns_to_go(config).abs().max())
        if largest == 0:
            raise UserError(
                "--reward_scale null: all rewards of the dataset are 0; pass a number"
            )
        return 100 / largest
    if not config.normalize_reward:
        return 1.0
    names = f"{task.env_id} {config.env} {config.eval_env}".lower()
    if not re.search("hopper|halfcheetah|walker2d", names):
        say("normalize_reward: no effect; only for hopper, halfcheetah and walker2d")
        return 1.0
    if len(returns) == 0 or np.ptp(returns) == 0:
        raise UserError(
            "--normalize_reward: the dataset lacks complete episodes of different "
            "returns; pass --normalize_reward false"
        )
    return 1000 / float(np.ptp(returns))


def offline_places(config: TrainConfig, device="cpu") -> Tensor:
    """Return which rows [B] of an online batch are offline data under mixing_ratio. They
    are spread evenly, so that any first n rows (cql_states) have the same fraction."""
    steps = torch.arange(config.batch_size + 1, dtype=torch.float64, device=device)
    steps = (steps * config.mixing_ratio + 1e-9).floor()
    return steps[1:] > steps[:-1]


def n_online_rows(config: TrainConfig) -> int:
    """Return the number of rows of an online batch that are not offline data."""
    return int((~offline_places(config)).sum())


class Replay:
    """The source of batches: the dataset, if there is one, and in the online phase a
    ring buffer with the transitions of each run."""

    def __init__(self, config: TrainConfig, data: Optional[Dataset], agent: "Agent"):
        """Allocate the ring buffer. Raise UserError if memory is too small for it."""
        self.config = config
        self.data = data
        self.n_offline = 0 if data is None else len(data)
        self.r_min = -math.inf if data is None else data.r_min
        self.factor = 1.0 if data is None else data.reward_factor
        self.capacity = min(config.buffer_size, config.online_iterations)
        n_runs = len(agent.runs)
        device = agent.device
        where = (
            f"--buffer_size {config.buffer_size}: no memory for {self.capacity} steps"
        )
        self.columns = {}
        for name, size in agent.column_sizes.items():
            with errors_as(UserError, where, RuntimeError):
                column = torch.zeros(n_runs, self.capacity, *size, device=device)
            self.columns[name] = column
        self.added = np.zeros(n_runs, int)  # steps of each run, overwritten ones too
        self.filled = torch.zeros(n_runs, 1, dtype=torch.long, device=device)
        self.offline_rows = offline_places(config, device)

    def ready(self) -> bool:
        """Return whether every run has enough transitions for a batch."""
        return self.n_offline + self.added.min() >= self.config.batch_size

    def add(self, runs: List[int], transitions: Dict[str, np.ndarray]) -> None:
        """Add one step of each of these runs, [len(runs), ...], with the environment's
        rewards. Its return-to-go is unknown until the episode ends: -inf, no bound."""
        rewards = torch.as_tensor(np.asarray(transitions["rewards"], np.float32))
        transitions = {
            **transitions,
            "rewards": transform_rewards(rewards, self.factor, self.config),
            "mc_returns": np.full(len(runs), -np.inf),
            "discounts": np.full(len(runs), self.config.discount),
        }
        places = self.added[runs] % self.capacity
        for name, column in self.columns.items():
            column[runs, places] = torch.as_tensor(transitions[name]).to(column)
        self.added[runs] += 1
        self.count_filled()

    def count_filled(self) -> None:
        sizes = np.minimum(self.added, self.capacity)
        self.filled.copy_(torch.as_tensor(sizes).unsqueeze(1))

    def end_episode(self, r: int, rewards: List[float]) -> None:
        """Set the returns-to-go of run r's last len(rewards) steps, an episode."""
        if not self.config.cal_ql:
            return
        rewards = torch.as_tensor(np.asarray(rewards, np.float32))
        rewards = transform_rewards(rewards, self.factor, self.config).double().numpy()
        not_ended = np.zeros(len(rewards))  # a last step's termination changes nothing
        returns = returns_to_go(rewards, not_ended, self.config, self.r_min)
        kept = min(len(returns), self.capacity)
        places = np.arange(self.added[r] - kept, self.added[r]) % self.capacity
        column = self.columns["mc_returns"]
        column[r, places] = torch.as_tensor(returns[-kept:]).to(column)

    def sample(self, fractions: Tensor) -> Dict[str, Tensor]:
        """Return the batch that uniform numbers [R, B] in [0, 1) select; until a run has
        steps of its own, from the dataset. A captured CUDA graph replays this, so
        nothing here reads a number back from the device."""
        if self.capacity == 0:
            return self.data.gather(self.data.index(fractions))
        if self.config.mixing_ratio < 0 or self.data is None:
            # One buffer: the dataset's rows, then the run's own.
            total = self.n_offline + self.filled  # [R, 1]
            place = fractions * total
            from_replay = place >= self.n_offline  # [R, B]
            offline = place / max(self.n_offline, 1)
            index = torch.minimum(place.long(), total - 1) - self.n_offline
        else:
            enough = self.filled >= (~self.offline_rows).sum()
            from_replay = ~self.offline_rows & enough
            offline = fractions
            index = torch.minimum((fractions * self.filled).long(), self.filled - 1)
        runs = torch.arange(len(fractions), device=fractions.device).unsqueeze(1)
        index = index.clamp(min=0)
        batch = {name: column[runs, index] for name, column in self.columns.items()}
        if self.data is not None:
            data = self.data.gather(self.data.index(offline))
            for name, values in batch.items():
                mask = from_replay.unsqueeze(-1) if values.ndim == 3 else from_replay
                batch[name] = torch.where(mask, values, data[name])
        return batch

    def state(self) -> dict:
        """Return what a checkpoint keeps: the online transitions, offline nothing.
        tests/forks/prioritized.diff adds priorities."""
        size = int(self.filled.max())
        columns = {name: x[:, :size].clone() for name, x in self.columns.items()}
        return {"columns": columns, "added": self.added.tolist()}

    def load(self, state: dict) -> None:
        for name, saved in state["columns"].items():
            self.columns[name][:, : saved.shape[1]] = saved.to(self.filled.device)
        self.added[:] = state["added"]
        self.count_filled()


# ======================================================================================
# Networks: plain modules of one run
# ======================================================================================


def mlp(sizes: List[int], orthogonal: bool = False) -> nn.Sequential:
    """Return linear layers of these sizes with ReLU between them, initialized as in
    CORL: orthogonal, or torch's default with a small last layer."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:-1]):
        linear = nn.Linear(n_in, n_out)
        if orthogonal:
            nn.init.orthogonal_(linear.weight, math.sqrt(2))
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(inplace=True)]
    last = nn.Linear(*sizes[-2:])
    initialize = nn.init.orthogonal_ if orthogonal else nn.init.xavier_uniform_
    initialize(last.weight, 1e-2)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


class Policy(nn.Module):
    """Tanh-squashed Gaussian policy with three hidden layers: observations [n, O] ->
    mean and log std before the tanh, [n, A] each."""

    def __init__(self, config: TrainConfig, obs_dim: int, action_dim: int):
        super().__init__()
        hidden = [config.hidden_dim] * 3
        # Never orthogonal, as in CORL.
        self.net = mlp([obs_dim, *hidden, 2 * action_dim])
        multiplier = torch.tensor(float(config.policy_log_std_multiplier))
        self.log_std_multiplier = nn.Parameter(multiplier)
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))  # as in CORL

    def forward(self, observations: Tensor) -> Tuple[Tensor, Tensor]:
        mean, log_std = self.net(observations).chunk(2, dim=-1)
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return mean, log_std.clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Critic for continuous actions: observations [n, O], M actions at each of them,
    [n, M, A] -> Q [n, M]. bf16: run the hidden layers in bfloat16."""

    def __init__(self, config: TrainConfig, obs_dim: int, action_dim: int):
        super().__init__()
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        self.net = mlp([obs_dim + action_dim, *hidden, 1], config.orthogonal_init)
        self.input_dims = [obs_dim, action_dim]

    def forward(self, observations: Tensor, actions: Tensor, bf16: bool = False):
        # The state's part of the first layer is computed once for all M actions. The
        # result is self.net(torch.cat([observation, action])) for each action.
        first, *hidden, last = self.net
        of_state, of_action = first.weight.split(self.input_dims, dim=1)
        states = F.linear(observations, of_state, first.bias)  # [n, H]
        rows = actions.flatten(0, 1)  # [n * M, A]; two-dimensional products are fastest
        if bf16:  # the hidden layers' weights are cast by `round_hidden_layers`
            rows = rows.bfloat16()
            of_action = of_action.bfloat16()
        x = F.linear(rows, of_action)
        x.unflatten(0, actions.shape[:2]).add_(states.to(x.dtype).unsqueeze(1))
        for layer in hidden:
            x = layer(x).to(x.dtype)  # buffers, for example, are not rounded
        return last(x.to(last.weight.dtype)).view(actions.shape[:2])

    def round_hidden_layers(self, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Return the weights with the parameters of all but the first and the last layer
        in bfloat16. Buffers stay as they are, because they change in place."""
        ends = "net.0.", f"net.{len(self.net) - 1}."
        rounded = dict(weights)
        for name, _ in self.named_parameters():
            if not name.startswith(ends):
                rounded[name] = weights[name].bfloat16()
        return rounded


class DiscreteCritic(nn.Module):
    """Critic for discrete actions: observations [n, O] -> Q [n, A] of every action."""

    def __init__(self, config: TrainConfig, obs_dim: int, n_actions: int):
        super().__init__()
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        self.net = mlp([obs_dim, *hidden, n_actions], config.orthogonal_init)

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)


# ======================================================================================
# Runs side by side: everything above and every loss below is written for one run
# ======================================================================================


def tensors_of(network: nn.Module) -> Dict[str, Tensor]:
    """Return the network's parameters and buffers by name."""
    tensors = dict(network.named_parameters(remove_duplicate=False))
    return tensors | dict(network.named_buffers(remove_duplicate=False))


def stack(networks: List[nn.Module], lead: Tuple[int, ...]) -> nn.Module:
    """Return one module that holds the parameters and buffers of all networks, each
    [*lead, ...]. `call` runs it with the part of one network."""
    stacked = copy.deepcopy(networks[0])
    parts = [tensors_of(network) for network in networks]
    for name, tensor in tensors_of(stacked).items():
        values = [part[name].detach() for part in parts]
        tensor.data = torch.stack(values).unflatten(0, lead)
    return stacked


def call(network: nn.Module, weights: Dict[str, Tensor], *inputs):
    """Return network(*inputs) with these parameters and buffers. Raise UserError if the
    network rebinds a buffer, whose new value would be lost."""
    given = dict(weights)
    output = torch.func.functional_call(network, given, inputs, tie_weights=False)
    for name, tensor in weights.items():
        if given[name] is not tensor:
            raise UserError(
                f"{type(network).__name__}: assigns a new tensor to its buffer {name}; "
                "change the buffer in place, for example by copy_"
            )
    return output


class Layout(nn.Module):
    """Application of one run's functions to all runs, and of one critic's to all
    critics.

    Batched: torch.func.vmap over runs and critics, which launches few large kernels.
    Not batched: a single run without vmap, its critics in a loop, because on a CPU two
    plain products are faster than a batched one. The results are the same."""

    def __init__(self, batched: bool):
        super().__init__()
        self.batched = batched

    def forward(self, function: Callable, *inputs):
        """Apply a function of one run's tensors to all runs. Inputs and outputs are
        trees of tensors that lead with R here and lack R inside the function."""
        if self.batched:
            return torch.func.vmap(function)(*inputs)
        inputs = tree_map(lambda x: x.squeeze(0), inputs)
        return tree_map(lambda x: x.unsqueeze(0), function(*inputs))

    def critics(self, function: Callable, own, *shared):
        """Apply a function of one critic to the N critics of a run. Its own tensors lead
        with N here, like the outputs; the shared ones are the same for all critics."""
        leaves, tree = tree_flatten(own)
        if self.batched:
            # Expanded, because the product of an unbatched input and batched weights is
            # folded into one whose output has a slow memory layout.
            n = len(leaves[0])
            shared = tree_map(lambda x: x.expand(n, *x.shape), shared)
            return torch.func.vmap(function)(own, *shared)
        outputs = []
        for leaves_of_one in zip(*[leaf.unbind() for leaf in leaves]):
            outputs.append(function(tree_unflatten(leaves_of_one, tree), *shared))
        return tree_map(lambda *each: torch.stack(each), *outputs)


# ======================================================================================
# Losses of one run. "CQL" is arXiv 2006.04779, "SAC" is arXiv 1812.05905.
# ======================================================================================


def squash(mean, log_std, normals) -> Tuple[Tensor, Tensor]:
    """Return n actions tanh(mean + std * normals) per state and their log-densities:
    mean, log_std [B, A], normals [B, n, A] -> [B, n, A], [B, n]."""
    mean = mean.unsqueeze(1)
    log_std = log_std.unsqueeze(1)
    pre_tanh = mean + log_std.exp() * normals
    return pre_tanh.tanh(), squashed_log_prob(normals, log_std, pre_tanh)


def squashed_log_prob(normals, log_std, pre_tanh) -> Tensor:
    """Return the log-density of tanh(pre_tanh), pre_tanh = mean + std * normals, summed
    over the action dimensions."""
    gaussian = -0.5 * normals.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(x)^2) without cancellation (SAC, appendix C)
    jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh, threshold=40))
    return (gaussian - jacobian).sum(-1)


def data_log_prob(mean, log_std, actions) -> Tensor:
    """Return the log-density [B] of given actions [B, A]. (CORL ignores the actions.)"""
    # atanh(+-1) is infinite.
    pre_tanh = actions.clamp(-1 + 1e-5, 1 - 1e-5).atanh()
    return squashed_log_prob((pre_tanh - mean) / log_std.exp(), log_std, pre_tanh)


def add_cloning(policy_loss: Tensor, samples, batch, q: Tensor, config) -> Tensor:
    """Add behavior cloning to the policy's loss (TD3+BC, arXiv 2106.06860, eq. 3 and 5,
    times the mean |Q| and bc_weight). q: [B], of the policy's actions."""
    if config.bc_weight == 0:
        return policy_loss
    distance = (samples["mean"].tanh() - batch["actions"]).square().mean()
    return policy_loss + config.bc_weight * q.detach().abs().mean() * distance


def td_target(batch: dict, next_q: Tensor, config: TrainConfig) -> Tensor:
    """Return the target of Q(s, a): the reward and the discounted value next_q of the
    next observation, unless the episode has ended; a time limit is not an end. With
    n_steps, the discounted sum of n rewards and the observation n steps later."""
    discount = batch["discounts"] if config.n_steps > 1 else config.discount
    return batch["rewards"] + discount * (1 - batch["terminations"]) * next_q


def minimum_of_targets(q: Tensor, noise: dict, config: TrainConfig) -> Tensor:
    """Return the minimum over the target critics of Q [N, ...]; with n_target_critics,
    over the random subset of largest keys (REDQ, arXiv 2101.05982, algorithm 1)."""
    if config.n_target_critics is not None:
        chosen = noise["subset_keys"].topk(config.n_target_critics).indices
        q = q[chosen]
    return q.amin(0)


def conservative_gap(q, log_mu, temperature, config, mc_returns=None) -> Tensor:
    """Return the soft maximum of Q over actions minus Q of the dataset action, clamped:
    CQL eq. 4 and appendix F.

    q [n, 1 + M], the dataset action first; log_mu [n, M], the log-densities of the other
    actions, or None, with which the actions have no weights and the dataset action joins
    them; mc_returns [n] for Cal-QL. Returns [n]. The temperature T divides Q and not
    log mu, so that T * logsumexp estimates T * log(integral of exp(Q / T)). (All
    published code with a temperature divides both.) There is no 1 / 3K, as in CORL.

    The other forms of config.penalty use some of the 3K proposals. two_proposals: the
    uniform actions and those of pi(.|s), with 1 / 2K (appendix F as printed; DI-engine's
    documentation). policy_kl: pi(.|s), unweighted, with 1 / K, so that mu is
    proportional to pi * exp(Q / T) (CQL(rho), section 3.2). mean: the mean over pi(.|s)
    (eq. 2; the tutorials)."""
    K = config.cql_n_actions
    T = temperature
    if mc_returns is not None:
        q = bounded_q(q, mc_returns, config)
    q_data = q[:, 0]
    q_policy = q[:, 1 + K : 1 + 2 * K]  # the order: dataset, uniform, pi(.|s), pi(.|s')
    if config.penalty == "mean":
        soft_maximum = q_policy.mean(-1)
    elif config.penalty == "policy_kl":
        soft_maximum = T * ((q_policy / T).logsumexp(-1) - math.log(K))
    elif config.penalty == "two_proposals":
        logits = q[:, 1 : 1 + 2 * K] / T - log_mu[:, : 2 * K]
        soft_maximum = T * (logits.logsumexp(-1) - math.log(2 * K))
    elif log_mu is None:
        soft_maximum = T * (q / T).logsumexp(-1)
    else:
        soft_maximum = T * (q[:, 1:] / T - log_mu).logsumexp(-1)
    gap = soft_maximum - q_data
    return gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)


def bounded_q(q: Tensor, mc_returns: Tensor, config: TrainConfig) -> Tensor:
    """Return Q [n, 1 + 3K] with the values of the policy's proposals raised to the
    return-to-go [n] where they are below it: Cal-QL (arXiv 2303.05479, section 5)."""
    free = 1 + config.cql_n_actions
    bounded = torch.maximum(q[:, free:], mc_returns.unsqueeze(-1))
    return torch.cat([q[:, :free], bounded], dim=-1)


def sampled_backward(gap_of: Callable, q: Tensor, offset: Tensor, k: int):
    """Draw k of M actions per state through which to differentiate gap_of(q).

    The gradient of the gap is sum_m slope_m dQ_m with slope_m = d gap / d Q_m.
    Systematic resampling (one offset, k equally spaced points of the cdf) draws actions
    with probabilities proportional to |slope_m|, which makes the estimate unbiased for
    every gap_of. The dataset action's slope stays exact. q [n, 1 + M], the dataset
    action first; offset [n] in [0, 1). Returns the gap [n], the indices [n, k] among the
    M actions, and the slopes [n, 1 + k] of the dataset action and the drawn ones."""
    gap, pull_back = torch.func.vjp(gap_of, q)
    (slopes,) = pull_back(torch.ones_like(gap))
    cdf = slopes[:, 1:].abs().cumsum(-1)  # [n, M]
    spacing = cdf[:, -1:] / k
    points = (torch.arange(k, device=q.device) + offset.unsqueeze(-1)) * spacing
    indices = (cdf.unsqueeze(1) <= points.unsqueeze(2)).sum(-1)  # [n, k]
    indices = indices.clamp(max=cdf.shape[-1] - 1)
    drawn = slopes[:, 1:].gather(-1, indices).sign() * spacing
    return gap, indices, torch.cat([slopes[:, :1], drawn], dim=-1)


def multiplier(log_alpha_prime: Tensor) -> Tensor:
    """Return alpha', the factor on cql_alpha that cql_lagrange learns."""
    return log_alpha_prime.exp().clamp(0.0, 1e6)


def multiplier_loss(log_alpha_prime, gap, sweep: dict, config: TrainConfig):
    """Loss of log alpha', which cql_lagrange learns: alpha' grows while the gaps [N] of
    the critics exceed their target."""
    alpha_prime = loss = torch.zeros_like(log_alpha_prime)
    if config.cql_lagrange:
        alpha_prime = multiplier(log_alpha_prime)
        excess = gap.detach() - sweep["cql_target_action_gap"]
        loss = -(alpha_prime * sweep["cql_alpha"] * excess).mean()
    return loss, {"alpha_prime": alpha_prime, "alpha_prime_loss": loss}


def proposal_metrics(q: Tensor, config: TrainConfig) -> Dict[str, Tensor]:
    """Return the metrics of Q [n, 1 + 3K]: of the dataset action, then of uniform
    actions, of the policy's at s and of the policy's at s'."""
    if q.shape[1] != 1 + 3 * config.cql_n_actions:
        hint = "keep 3 x cql_n_actions, and select those that you need in the penalty"
        raise UserError(f"losses: {q.shape[1] - 1} proposals; {hint}")
    uniform, current, following = q[:, 1:].chunk(3, dim=-1)  # [n, K] each
    return {
        "cql_q{j}_rand": uniform.mean(),
        "cql_q{j}_current_actions": current.mean(),
        "cql_q{j}_next_actions": following.mean(),
        "cql_std_q{j}": q.std(-1).mean(),
    }


def penalized_td_loss(q_data, target, gap, log_alpha_prime, sweep, config):
    """Loss of one critic: TD error and weighted gap, CQL eq. 4 times 2, so that
    cql_alpha is twice its alpha; with cql_lagrange as in appendix F. q_data, target [B];
    gap [n] of the penalized states. Its mean is an unbiased estimate of the batch's."""
    if q_data.shape != target.shape:  # they would broadcast
        shapes = f"{tuple(target.shape)} for Q {tuple(q_data.shape)}"
        raise UserError(f"losses: the TD target has shape {shapes}; return one a row")
    td = (q_data - target).square().mean()
    gap = gap.mean()
    penalty = sweep["cql_alpha"] * gap
    if config.cql_lagrange:
        alpha_prime = multiplier(log_alpha_prime.detach())
        excess = gap - sweep["cql_target_action_gap"]
        penalty = alpha_prime * sweep["cql_alpha"] * excess
    metrics = {
        "qf{j}_loss": td,
        "average_qf{j}": q_data.mean(),
        "cql_qf{j}_diff": gap,
        "cql_min_qf{j}_loss": penalty,
    }
    return td + penalty, metrics


# ======================================================================================
# Agents
# ======================================================================================

# Every draw is a function of (stream, seed of the run, counter). So checkpoints hold no
# generator state, and the draws of a run do not depend on the other runs. The stream
# comes first because SeedSequence treats [0, 1] and [0, 1, 0] as equal.
INIT, UPDATE, EXPLORE, RESET, EVALUATE, JUDGE = range(6)  # append new ones


def seed_from(numbers: List[int]) -> int:
    """Return the seed for [stream, seed, counter, ...]."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return int(state >> 1)


def environment_seed(numbers: List[int]) -> int:
    """Return the seed of an episode for [stream, seed, counter, ...], below 2^31: an
    environment may seed NumPy with it or keep it in 32 bits."""
    return seed_from(numbers) % 2**31


def generator_of(numbers: List[int], device="cpu") -> torch.Generator:
    """Return the generator for [stream, seed, counter, ...]."""
    return torch.Generator(device).manual_seed(seed_from(numbers))


@contextmanager
def seeded(numbers: List[int]):
    """Seed torch's global generator inside the block, for the weights of new modules."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(numbers))
        yield


@contextmanager
def no_global_randomness(what: str, hint: str):
    """Raise UserError if the block draws from torch's global generator, whose numbers
    depend on the other runs and are not those of a resumed run."""
    before = torch.random.get_rng_state().numpy().tobytes()
    yield
    if before != torch.random.get_rng_state().numpy().tobytes():
        raise UserError(f"{what}: draws from torch's global generator; {hint}")


class Units(nn.Module):
    """Conversion between the environment's units and the networks': observations are
    standardized; actions are in [-1, 1] or, discrete ones, counted from 0."""

    def __init__(self, task: Task, statistics=None):
        """Store the units. statistics: mean and std [O] of the observations; None leaves
        observations as they are."""
        super().__init__()
        self.discrete = task.discrete
        mean, std = statistics or (torch.zeros(task.observation_dim), 1.0)
        constants = {"observation_mean": mean, "observation_std": std + 0 * mean}
        constants |= {"action_low": task.action_low, "action_high": task.action_high}
        for name, value in constants.items():
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            self.register_buffer(name, value)
        self.register_buffer("center", (self.action_high + self.action_low) / 2)

    def standardize(self, observations) -> Tensor:
        """Convert raw observations [..., O] for the networks."""
        x = torch.as_tensor(observations).to(self.observation_mean)
        return (x - self.observation_mean) / self.observation_std

    def unit_actions(self, actions) -> Tensor:
        """Convert the environment's actions [..., A] for the networks."""
        actions = torch.as_tensor(actions).to(self.center)
        if self.discrete:
            return actions - self.action_low
        return (actions - self.center) / (self.action_high - self.center)

    def environment_actions(self, actions: Tensor) -> Tensor:
        """Convert the networks' actions [..., A] for the environment."""
        if self.discrete:
            return actions + self.action_low.long()
        actions = self.center + (self.action_high - self.center) * actions
        return actions.clamp(
            self.action_low, self.action_high
        )  # rounding may exceed them


def refuse_statistics(agent: nn.Module) -> None:
    """Raise UserError for layers that change their statistics in every call."""
    refused = (
        nn.modules.batchnorm._BatchNorm,
        nn.utils.parametrizations._SpectralNorm,
    )
    for module in agent.modules():
        if isinstance(module, refused):
            raise UserError(
                f"{type(module).__name__.strip('_')}: cannot be stacked, because it "
                "updates its statistics in every call; use LayerNorm or weight_norm"
            )


class Agent(nn.Module):
    """Base class of both agents, for R runs: `update` learns from a batch of raw
    observations and environment actions, `act` returns environment actions.

    A subclass makes its networks by `stack` and defines three functions of one run:
    `losses`, `action` and `q_of`. `layout` applies them to all runs. They get the
    tensors of the run in `weights`: every network, parameter and buffer that the agent
    has when its constructor calls `finish`. All of those lead with R; only the constants
    in `units` do not. A parameter trains only if it is passed to `finish`. The
    state_dict holds everything that training needs, including the optimizer and the
    observation statistics."""

    def __init__(self, config: TrainConfig, task: Task, statistics=None):
        """Store what both agents need. statistics: mean and std [O] of observations."""
        super().__init__()
        self.config = config
        self.task = task
        self.action_dim = len(task.action_low)
        self.column_sizes = dict.fromkeys(COLUMNS, ())  # of a batch, after [R, B]
        for name in ("observations", "next_observations"):
            self.column_sizes[name] = (task.observation_dim,)
        self.column_sizes["actions"] = (self.action_dim,)
        if not config.cal_ql:
            del self.column_sizes["mc_returns"]
        if config.n_steps == 1:
            del self.column_sizes["discounts"]
        self.runs = product_of_runs(config)
        self.units = Units(task, statistics)
        ones = torch.ones(len(self.runs))
        self.log_alpha_prime = nn.Parameter(ones, requires_grad=config.cql_lagrange)
        self.block = None
        self.block_noise = None  # see draw

    def make_critics(self, kind: Callable, *sizes: int) -> List[nn.Module]:
        """Return the critics of one run, with weights from torch's global generator."""
        return [kind(self.config, *sizes) for _ in range(self.config.n_critics)]

    def finish(self, actor: list, critic: list, device) -> None:
        """Complete the construction: device, layout, optimizer. actor and critic are the
        parameters that train at policy_lr and at qf_lr. Raise UserError for networks
        that cannot be stacked."""
        if self.config.cql_lagrange:
            critic.append(self.log_alpha_prime)
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.layout = Layout(batched=on_gpu or len(self.runs) > 1)
        self.to(device)
        self.check_networks()
        kind = torch.get_default_dtype()
        self.sweep = {}
        # Tensors, because cql_alpha changes when the online phase begins, and a captured
        # CUDA graph does not see a Python number change. The losses read these, and a
        # change of config.cql_alpha has no effect. No checkpoint holds them: a schedule
        # computes them anew from the count of updates.
        for name in SWEPT[1:]:
            values = [run[name] for run in self.runs]
            self.sweep[name] = torch.tensor(values, dtype=kind, device=device)
        self.optimizer = self.make_optimizer(actor, critic)
        passed = {id(parameter) for parameter in [*actor, *critic]}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in passed:
                hint = "pass it to `finish`, or call requires_grad_(False) on it"
                raise UserError(f"{name}: no optimizer trains it; {hint}")
        if self.config.compile and self.layout.batched and not on_gpu:
            say("--compile: not used, because it slows down stacked runs on a CPU")
        elif self.config.compile and can_compile(self.device):
            say("compiling the losses: the first update takes a minute or so")
            torch._dynamo.config.suppress_errors = True  # then they run uncompiled
            self.layout.compile()

    def run_tensors(self) -> Dict[str, Tensor]:
        """Return all parameters and buffers that lead with R, by their state_dict
        names."""
        tensors = tensors_of(self)
        return {k: x for k, x in tensors.items() if not k.startswith("units.")}

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute. Raise UserError for a buffer that `weights` holds."""
        if "weights" in vars(self) and name in self._buffers:
            raise UserError(
                f"agent.{name}: a new tensor; change it in place, as by copy_"
            )
        super().__setattr__(name, value)

    @functools.cached_property
    def weights(self) -> dict:
        """`run_tensors` in the form that the functions of one run get: a dictionary for
        each network; the agent's own parameters and buffers by name."""
        weights = {}
        for name, tensor in self.run_tensors().items():
            network, dot, rest = name.partition(".")
            if dot:
                weights.setdefault(network, {})[rest] = tensor
            else:
                weights[name] = tensor
        return weights

    @torch.no_grad()
    def check_networks(self) -> None:
        """Run the functions of one run on dummy data. Raise UserError for networks and
        losses that cannot be stacked or that draw random numbers without a seed."""
        refuse_statistics(self)
        for name, tensor in self.run_tensors().items():
            if tensor.shape[:1] != (len(self.runs),):
                shape = f"shape {tuple(tensor.shape)}, expected ({len(self.runs)}, ...)"
                raise UserError(f"{name}: {shape}; lead with the runs")
        inputs = weights, batch, _, _ = self.dummy_inputs()
        batched = self.layout.batched
        self.layout.batched = True  # in a loop, one critic could change another's input
        try:
            for cloning in (True, False):
                losses = functools.partial(self.checked_losses, cloning=cloning)
                torch.func.vmap(losses, randomness="error")(*inputs)
            acting = {name: weights[name] for name in self.acts_with}
            before = [x._version for x in tree_flatten(acting)[0]]
            observations = batch["observations"]
            torch.func.vmap(self.action, randomness="error")(acting, observations)
        except RuntimeError as error:
            if "functorch" in str(error) or "does not require grad" in str(error):
                problem = (
                    "losses: torch.autograd.grad fails in vmap; use torch.func.grad"
                )
                problem += ", as in tests/forks/edac.diff"
            elif "randomness" in str(error):
                problem = "the networks or losses draw random numbers; draw noise in "
                problem += (
                    "draw_run, which passes it to losses; dropout is not supported"
                )
            else:
                raise
            raise UserError(problem) from None
        finally:
            self.layout.batched = batched
        if before != [x._version for x in tree_flatten(acting)[0]]:
            raise UserError(
                "a network changes a buffer in forward, so evaluation would change it "
                "too; change it in losses, for example weights['policy']['mean'].copy_"
            )

    def dummy_inputs(self) -> tuple:
        """Return weights, a batch of two rows of zeros, noise and sweep of one run."""
        noise = self.draw_run((1, 2), generator_of([INIT, 0]))
        noise = {name: x.to(self.device) for name, x in noise.items()}
        batch = {}
        for name, size in self.column_sizes.items():
            batch[name] = torch.zeros(1, 2, *size).to(self.units.center)
        sweep = {name: torch.ones_like(self.log_alpha_prime[:1]) for name in SWEPT[1:]}
        return tree_map(lambda x: x[:1].clone(), self.weights), batch, noise, sweep

    def checked_losses(self, weights: dict, *inputs, cloning: bool):
        """Return `losses`. Raise UserError if they replace a tensor of `weights`, whose
        new value would be lost, if they count in an attribute, which neither a resumed
        run nor a CUDA graph continues, or if a metric has another shape."""
        before = tree_flatten(weights)[0]
        numbers = {k: x for k, x in vars(self).items() if isinstance(x, (int, float))}
        loss, metrics = self.losses(weights, *inputs, cloning)
        after = tree_flatten(weights)[0]
        if len(after) != len(before) or any(map(operator.is_not, before, after)):
            raise UserError(
                "losses: replace a tensor of `weights`; change it in place, as by copy_"
            )
        for name, number in numbers.items():
            if vars(self)[name] != number:
                raise UserError(f"losses: change self.{name}; change a buffer in place")
        if loss.shape != ():
            shape = tuple(loss.shape)
            raise UserError(f"losses: the loss has shape {shape}; return a mean or sum")
        for name, value in metrics.items():
            expected = (self.config.n_critics,) if "{j}" in name else ()
            if not isinstance(value, Tensor):
                raise UserError(f"metric {name}: {value!r}; expected a tensor")
            if value.shape != expected:
                shapes = f"shape {tuple(value.shape)}, expected {expected}"
                raise UserError(f"metric {name}: {shapes}; return its mean")
        return loss, metrics

    def make_optimizer(self, actor: list, critic: list) -> torch.optim.Adam:
        """Return one Adam for all runs and networks: it is elementwise, so nothing
        mixes. A network that skips an update must have gradients of None, because Adam
        moves parameters whose gradients are zero. A learning rate schedule on a GPU
        needs tensors changed in place, because a captured CUDA graph keeps Python
        numbers."""
        groups = [
            {"params": actor, "lr": self.config.policy_lr},
            {"params": critic, "lr": self.config.qf_lr},
        ]
        on_gpu = self.device.type == "cuda"
        compiled = on_gpu and self.config.compile
        optimizer = torch.optim.Adam(
            groups, fused=not compiled, foreach=compiled, capturable=on_gpu
        )
        if compiled:  # takes 11 microseconds on an H200, fused Adam 82
            bare = torch.optim.Adam.step.__wrapped__  # without the profiler's hook
            optimizer.step = torch.compile(functools.partial(bare, optimizer))
        for parameter in actor + critic:
            optimizer.state[parameter] = {  # now, so that loading a state only copies
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def draw(self, update: int, batch_size: int) -> Dict[str, Tensor]:
        """Return the noise of the update with this number, each [R, ...] by name. A
        run's noise depends on its own seed alone. On a GPU the noise of 32 updates is
        drawn at once, to save kernel launches."""
        n = 32 if self.device.type == "cuda" else 1
        block, place = divmod(update, n)
        if self.block != (block, batch_size):
            draws = []
            for run in self.runs:
                generator = generator_of([UPDATE, run["seed"], block], self.device)
                draws.append(self.draw_run((n, batch_size), generator))
            self.block_noise = {}
            for name in draws[0]:
                stacked = torch.stack([draw[name] for draw in draws], dim=1)
                self.block_noise[name] = stacked
            self.block = (block, batch_size)
        return {name: values[place] for name, values in self.block_noise.items()}

    def draw_run(self, shape: Tuple[int, int], generator) -> Dict[str, Tensor]:
        """Return one run's noise for shape[0] updates with batches of shape[1] rows.
        Each entry leads with the updates; entries that no flag asks for are absent:

        fractions [B] in [0, 1), float64: select the transitions of the batch

        normals [B, 1, A], for the actor at s

        next_normals [B, T, A], for the target at s'

        proposal_normals [n, 2K, A], for the penalty at s, then at s'

        uniforms [n, K, A] in [-1, 1], for the penalty

        resampling_offset [N, n] in [0, 1), for sampled_backward

        subset_keys [N], for minimum_of_targets"""
        config = self.config
        updates, B = shape
        n = min(config.cql_states or B, B)
        K = config.cql_n_actions
        T = K if config.cql_max_target_backup else 1
        A = self.action_dim
        on = {"generator": generator, "device": generator.device}
        draws = {"fractions": torch.rand(shape, dtype=torch.float64, **on)}
        if not self.task.discrete:
            draws["normals"] = torch.randn((updates, B, 1, A), **on)
            draws["next_normals"] = torch.randn((updates, B, T, A), **on)
            draws["proposal_normals"] = torch.randn((updates, n, 2 * K, A), **on)
            draws["uniforms"] = torch.rand((updates, n, K, A), **on) * 2 - 1
            if config.cql_backward_actions:
                size = (updates, config.n_critics, n)
                draws["resampling_offset"] = torch.rand(size, **on)
        if config.n_target_critics is not None:
            draws["subset_keys"] = torch.rand((updates, config.n_critics), **on)
        return draws

    def prepare(self, batch: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Convert a batch for the networks: add R if it lacks it, standardize
        observations, rescale actions. Raise ValueError for other shapes, which might
        broadcast."""
        missing = self.column_sizes.keys() - batch.keys()
        if missing:
            raise ValueError(f"a batch without {', '.join(sorted(missing))}")
        n_runs = len(self.runs)
        shape = np.shape(batch["rewards"])
        prepared = {}
        for name, size in self.column_sizes.items():
            values = torch.as_tensor(batch[name]).to(self.units.center)
            if len(shape) == 1:
                values = values.unsqueeze(0)
            expected = (n_runs, shape[-1], *size)
            if values.shape != expected:
                what = f"{name} {tuple(values.shape)}, expected {expected}"
                raise ValueError(f"a batch of {what}")
            prepared[name] = values
        for name in ("observations", "next_observations"):
            prepared[name] = self.units.standardize(prepared[name])
        prepared["actions"] = self.units.unit_actions(prepared["actions"])
        return prepared

    def update(self, batch: dict, noise: dict, cloning=False, move_targets=True) -> dict:
        """Update every run once, from a batch whose rows are in random order; without R,
        of one run. Return the metrics, each [R], or [R, N] under a name with {j}, on the
        device.

        All losses use the weights from before the step. cloning: train the policy by
        behavior cloning. What changes from update to update must be a tensor changed in
        place between updates, because a captured CUDA graph keeps Python numbers. A
        count or an average must be a buffer, which checkpoints hold; a schedule must be
        a function of the count of updates."""
        losses = functools.partial(self.losses, cloning=cloning)
        inputs = self.weights, self.prepare(batch), noise, self.sweep
        loss, metrics = self.layout(losses, *inputs)  # [R]
        self.optimizer.zero_grad()
        loss.sum().backward()  # runs share nothing, so each gets its own gradients
        # The place to clip gradients, [R, ...] or [R]: by the norm of each run alone. A
        # metric that no loss computes, such as that norm, is one more entry of
        # `metrics`, [R].
        self.optimizer.step()
        self.move_average()
        if move_targets:
            self.move_targets()
        return {name: value.detach() for name, value in metrics.items()}

    def move_average(self) -> None:
        """Move the average of the weights that act, if there is one."""

    @torch.no_grad()
    def move_targets(self) -> None:
        """Move the target critics by Polyak averaging; buffers are copied."""
        targets = list(self.target_critic.parameters())
        critics = list(self.critic.parameters())
        torch._foreach_lerp_(targets, critics, self.config.soft_target_update_rate)
        for target, buffer in zip(self.target_critic.buffers(), self.critic.buffers()):
            target.copy_(buffer)

    @torch.inference_mode()
    def act(self, observations, normals: Optional[Tensor] = None) -> np.ndarray:
        """Return environment actions [R, n, A] for raw observations [R, n, O]; with R =
        1 both may lack leading dimensions. normals [R, n, A], standard normal numbers,
        sample from the policy; without them actions are deterministic."""
        x = torch.as_tensor(observations, dtype=self.units.center.dtype)
        n_runs = x.shape[0] if x.ndim == 3 else 1
        if n_runs != len(self.runs) or x.shape[-1:] != self.column_sizes["observations"]:
            expected = f"{len(self.runs)} runs of {self.column_sizes['observations']}"
            raise ValueError(f"observations {tuple(x.shape)} for {expected}")
        rows = x.reshape(n_runs, -1, x.shape[-1]).to(self.device)
        actions = self.actions(rows, normals)
        return actions.reshape(*x.shape[:-1], self.action_dim).cpu().numpy()

    def actions(self, observations: Tensor, normals: Optional[Tensor] = None) -> Tensor:
        """Return environment actions [R, n, A] for raw observations [R, n, O], on the
        device; `act` does the same for arrays."""
        weights = {name: self.weights[name] for name in self.acts_with}
        inputs = [weights, self.units.standardize(observations)]
        if normals is not None:
            inputs.append(normals.to(inputs[1]).expand(*observations.shape[:2], -1))
        # `forward` is the layout without torch.compile.
        actions = self.layout.forward(self.action, *inputs)
        return self.units.environment_actions(actions)

    @torch.inference_mode()
    def q(self, observations, actions=None) -> Tensor:
        """Return Q [R, N, n] of raw observations [R, n, O] and environment actions
        [R, n, A]; without actions, of every discrete action, [R, N, n, A]."""
        critics = self.weights["critic"]
        observations = self.units.standardize(observations)
        if actions is None:
            return self.layout(self.q_values, critics, observations)
        actions = self.units.unit_actions(actions)
        return self.layout(self.q_of, critics, observations, actions)

    def get_extra_state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict()["state"]}

    def set_extra_state(self, state: dict) -> None:
        """Copy the optimizer's state into its tensors, which it keeps. best.pt has
        none."""
        if state["optimizer"] is None:
            return
        live = self.optimizer.state_dict()["state"]
        if live.keys() != state["optimizer"].keys():
            raise ValueError("its optimizer trains other parameters")
        for index, tensors in state["optimizer"].items():
            for name, tensor in tensors.items():
                live[index][name].copy_(tensor)


class ContinuousCQL(Agent):
    """CQL on soft actor-critic, for continuous actions."""

    acts_with = ["policy"]  # the part of `weights` that `action` gets

    def __init__(self, config: TrainConfig, task: Task, device="cpu", statistics=None):
        super().__init__(config, task, statistics)
        self.bf16 = config.precision == "bf16" and fast_bf16(torch.device(device))
        policies = []
        critics = []
        for run in self.runs:
            with seeded([INIT, run["seed"]]):
                policies.append(Policy(config, task.observation_dim, self.action_dim))
                sizes = task.observation_dim, self.action_dim
                critics += self.make_critics(Critic, *sizes)
        n_runs = len(self.runs)
        self.policy = stack(policies, (n_runs,))
        self.critic = stack(critics, (n_runs, config.n_critics))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        tuned = config.use_automatic_entropy_tuning
        self.log_alpha = nn.Parameter(torch.zeros(n_runs), requires_grad=tuned)
        if config.policy_average_rate:
            self.average_policy = copy.deepcopy(self.policy).requires_grad_(False)
            self.register_buffer("averaged", torch.zeros(n_runs))  # policies so far
            self.acts_with = ["average_policy"]
        actor = list(self.policy.parameters())
        if config.use_automatic_entropy_tuning:
            actor.append(self.log_alpha)
        self.finish(actor, list(self.critic.parameters()), device)

    @torch.no_grad()
    def move_average(self) -> None:
        """Move the average policy towards the policy, at first to the mean of all
        policies so far; buffers are copied."""
        if not self.config.policy_average_rate:
            return
        self.averaged.add_(1)
        rate = (1 / self.averaged).clamp(min=self.config.policy_average_rate)  # [R]
        policies = self.policy.parameters()
        for average, policy in zip(self.average_policy.parameters(), policies):
            average.lerp_(policy, rate.view(-1, *[1] * (policy.ndim - 1)))
        for average, buffer in zip(self.average_policy.buffers(), self.policy.buffers()):
            average.copy_(buffer)

    # ---- Functions of one run: tensors lack R ----

    def q_values(self, critics: dict, observations, actions) -> Tensor:
        """Return Q [N, n, M] of actions [n, M, A] at observations [n, O]."""
        one = functools.partial(call, self.critic)
        return self.layout.critics(one, critics, observations, actions)

    def q_of(self, critics: dict, observations: Tensor, actions: Tensor) -> Tensor:
        """Return Q [N, n] of one action [n, A] at each observation [n, O]."""
        return self.q_values(critics, observations, actions.unsqueeze(1)).squeeze(-1)

    def action(self, weights: dict, observations, normals=None) -> Tensor:
        """Return actions [n, A] in [-1, 1]: deterministic, or sampled by normals [n, A].
        Online steps, evaluation, load_policy, export and judge.py all use this
        function."""
        (acting,) = self.acts_with
        mean, log_std = call(self.policy, weights[acting], observations)
        if normals is not None:
            mean = mean + log_std.exp() * normals
        return mean.tanh()

    def sample(self, policy: dict, batch: dict, noise: dict) -> dict:
        """Sample every action of an update, from one pass of the policy over [s; s'].

        With gradients: mean, log_std, actions [B, A], log_pi [B] of pi(.|s).
        Without: next_actions [B, T, A], next_log_pi [B, T] of pi(.|s'); the proposals
        [n, 3K, A], uniform, from pi(.|s) and from pi(.|s'), and their log-densities
        log_mu [n, 3K]."""
        n = len(noise["uniforms"])
        states = torch.cat([batch["observations"], batch["next_observations"]])
        mean, log_std = call(self.policy, policy, states)
        mean, next_mean = mean.chunk(2)
        log_std, next_log_std = log_std.chunk(2)
        actions, log_pi = squash(mean, log_std, noise["normals"])
        with torch.no_grad():
            next_actions, next_log_pi = squash(
                next_mean, next_log_std, noise["next_normals"]
            )
            normals, next_normals = noise["proposal_normals"].chunk(2, dim=1)
            current, log_mu = squash(mean[:n], log_std[:n], normals)
            following, next_log_mu = squash(
                next_mean[:n], next_log_std[:n], next_normals
            )
        uniform_log_mu = torch.full_like(log_mu, -self.action_dim * math.log(2))
        return {
            "mean": mean,
            "log_std": log_std,
            "actions": actions.squeeze(1),
            "log_pi": log_pi.squeeze(1),
            "next_actions": next_actions,
            "next_log_pi": next_log_pi,
            "proposals": torch.cat([noise["uniforms"], current, following], dim=1),
            "log_mu": torch.cat([uniform_log_mu, log_mu, next_log_mu], dim=1),
        }

    def losses(self, weights: dict, batch: dict, noise: dict, sweep: dict, cloning):
        """Return the sum of all losses and the metrics. Every tensor comes from
        `weights`. No two losses share a graph, so one backward pass serves them all."""
        config = self.config
        samples = self.sample(weights["policy"], batch, noise)
        log_pi = samples["log_pi"]

        # Temperature: SAC eq. 18, as a loss of log alpha as in the authors' code.
        log_alpha = weights["log_alpha"]
        alpha = torch.full_like(log_alpha, config.alpha_multiplier)
        alpha_loss = torch.zeros_like(log_alpha)
        if config.use_automatic_entropy_tuning:
            alpha = config.alpha_multiplier * log_alpha.detach().exp()
            target_entropy = -self.action_dim
            alpha_loss = -(log_alpha * (log_pi.detach() + target_entropy)).mean()

        # Actor: SAC eq. 9, or behavior cloning with entropy (CQL's code).
        if cloning:
            gaussian = samples["mean"], samples["log_std"]
            log_prob = data_log_prob(*gaussian, batch["actions"])
            policy_loss = (alpha * log_pi - log_prob).mean()
        else:
            frozen = {name: x.detach() for name, x in weights["critic"].items()}
            q = self.q_of(frozen, batch["observations"], samples["actions"])  # [N, B]
            # The mean in REDQ (arXiv 2101.05982, algorithm 1).
            q = q.amin(0) if config.n_target_critics is None else q.mean(0)
            policy_loss = (alpha * log_pi - q).mean()
            policy_loss = add_cloning(policy_loss, samples, batch, q, config)

        # TD target: SAC eq. 2-3; with cql_max_target_backup the best of K actions.
        with torch.no_grad():
            inputs = batch["next_observations"], samples["next_actions"]
            next_q = self.q_values(weights["target_critic"], *inputs)  # [N, B, T]
            next_q, best = minimum_of_targets(next_q, noise, config).max(-1)
            if config.backup_entropy:
                next_log_pi = samples["next_log_pi"].gather(-1, best.unsqueeze(-1))
                next_q = next_q - alpha * next_log_pi.squeeze(-1)
            target = td_target(batch, next_q, config)

        # Critics: TD error and penalty.
        log_alpha_prime = weights["log_alpha_prime"]
        own = {"critic": weights["critic"]}
        if config.cql_backward_actions:
            own["offset"] = noise["resampling_offset"]
        shared = batch, samples, target, log_alpha_prime, sweep
        q_losses, q_metrics = self.layout.critics(self.critic_loss, own, *shared)
        if config.cal_ql:
            q_metrics["bound_rate"] = q_metrics["bound_rate"].mean()
        gap = q_metrics["cql_qf{j}_diff"]
        prime_loss, prime_metrics = multiplier_loss(log_alpha_prime, gap, sweep, config)
        metrics = {
            "alpha": alpha,
            "alpha_loss": alpha_loss,
            "policy_loss": policy_loss,
            "log_pi": log_pi.mean(),
            "average_target_q": next_q.mean(),
            **q_metrics,
            **prime_metrics,
        }
        return alpha_loss + policy_loss + q_losses.sum() + prime_loss, metrics

    def critic_loss(self, own, batch, samples, target, log_alpha_prime, sweep):
        """Critic loss for continuous actions, of one critic. own: its weights, "critic",
        and with cql_backward_actions its "offset" [n] for sampled_backward; the other
        inputs are the same for all critics. The logged Q values are those of the
        penalty; with cal_ql, after its lower bound, as in CORL."""
        config = self.config
        k = config.cql_backward_actions
        proposals = samples["proposals"]
        n = len(proposals)
        bf16 = self.bf16
        weights = own["critic"]
        if bf16:
            weights = self.critic.round_hidden_layers(weights)
        critic = functools.partial(call, self.critic, weights)
        observations = batch["observations"][:n]
        # The dataset action first, then the proposals.
        actions = torch.cat([batch["actions"][:n].unsqueeze(1), proposals], dim=1)
        mc_returns = batch["mc_returns"][:n] if config.cal_ql else None
        gap_of = functools.partial(
            conservative_gap,
            log_mu=samples["log_mu"] if config.cql_importance_sample else None,
            temperature=sweep["cql_temp"],
            config=config,
            mc_returns=mc_returns,
        )
        if k == 0:
            q = critic(observations, actions, bf16)  # [n, 1 + 3K]
            q_data = q[:, 0]
            gap = gap_of(q)
        else:
            with torch.no_grad():
                q = critic(observations, actions, bf16)
                gap, indices, slopes = sampled_backward(gap_of, q, own["offset"], k)
            indices = F.pad(indices + 1, (1, 0)).unsqueeze(-1)  # [n, 1 + k, 1]
            drawn = actions.take_along_dim(indices, dim=1)
            q_drawn = critic(observations, drawn, bf16)
            q_data = q_drawn[:, 0]
            surrogate = (slopes * q_drawn).sum(-1)  # the gap's gradient, not its value
            gap = gap + surrogate - surrogate.detach()
        if n < len(target):  # states without penalty
            others = batch["observations"][n:], batch["actions"][n:].unsqueeze(1)
            q_data = torch.cat([q_data, critic(*others, bf16).squeeze(-1)])
        loss, metrics = penalized_td_loss(
            q_data, target, gap, log_alpha_prime, sweep, config
        )

        q = q.detach()
        if config.cal_ql:
            free = 1 + config.cql_n_actions
            below = q[:, free:] < mc_returns.unsqueeze(-1)
            metrics["bound_rate"] = below.to(q.dtype).mean()
            q = bounded_q(q, mc_returns, config)
        return loss, {**metrics, **proposal_metrics(q, config)}


class DiscreteCQL(Agent):
    """CQL on double DQN, for discrete actions. The agent takes the action of highest Q,
    averaged over the critics."""

    acts_with = ["critic"]

    def __init__(self, config: TrainConfig, task: Task, device="cpu", statistics=None):
        """Make the critics. Raise UserError for flags that need continuous actions."""
        super().__init__(config, task, statistics)
        for name in ("penalty", "cal_ql"):
            if getattr(config, name) != FIELDS[name].default:
                raise UserError(
                    f"--{name}: actions are discrete; this flag needs continuous ones"
                )
        n_actions = int(task.action_high[0] - task.action_low[0]) + 1
        critics = []
        for run in self.runs:
            with seeded([INIT, run["seed"]]):
                sizes = task.observation_dim, n_actions
                critics += self.make_critics(DiscreteCritic, *sizes)
        self.critic = stack(critics, (len(self.runs), config.n_critics))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.finish([], list(self.critic.parameters()), device)

    # ---- Functions of one run: tensors lack R ----

    def q_values(self, critics: dict, observations: Tensor) -> Tensor:
        """Return Q [N, n, A] of every action at observations [n, O]."""
        one = functools.partial(call, self.critic)
        return self.layout.critics(one, critics, observations)

    def q_of(self, critics: dict, observations: Tensor, actions: Tensor) -> Tensor:
        """Return Q [N, n] of one action [n, 1], counted from 0, at each observation."""
        actions = actions.long().unsqueeze(0)
        q = self.q_values(critics, observations)
        return q.take_along_dim(actions, dim=-1).squeeze(-1)

    def action(self, weights: dict, observations, normals=None) -> Tensor:
        """Return the greedy actions [n, 1], counted from 0, at observations [n, O].
        Online steps, evaluation, load_policy, export and judge.py all use this
        function."""
        q = self.q_values(weights["critic"], observations)
        return q.mean(0).argmax(-1, keepdim=True)

    def losses(self, weights: dict, batch: dict, noise: dict, sweep: dict, cloning):
        """Return the critics' loss at the present weights, and the metrics. Double DQN
        (arXiv 1509.06461): the critics choose the next action, the target critics value
        it. There is no policy to clone."""
        config = self.config
        next_observations = batch["next_observations"]
        with torch.no_grad():
            best = self.action(weights, next_observations)  # [B, 1]
            next_q = self.q_of(
                weights["target_critic"], next_observations, best
            )  # [N, B]
            next_q = minimum_of_targets(next_q, noise, config)
            target = td_target(batch, next_q, config)
        log_alpha_prime = weights["log_alpha_prime"]
        shared = batch, target, log_alpha_prime, sweep
        q_losses, metrics = self.layout.critics(
            self.critic_loss, weights["critic"], *shared
        )
        gap = metrics["cql_qf{j}_diff"]
        prime_loss, more = multiplier_loss(log_alpha_prime, gap, sweep, config)
        metrics = {**metrics, **more, "average_target_q": next_q.mean()}
        return q_losses.sum() + prime_loss, metrics

    def critic_loss(self, critic, batch, target, log_alpha_prime, sweep):
        """Critic loss for discrete actions, of one critic; the gap is exact."""
        config = self.config
        q = call(self.critic, critic, batch["observations"])  # [B, A]
        q_data = q.gather(1, batch["actions"].long())  # [B, 1]
        every = torch.cat([q_data, q], dim=1)
        gap = conservative_gap(every, torch.zeros_like(q), sweep["cql_temp"], config)
        loss, metrics = penalized_td_loss(
            q_data.squeeze(1), target, gap, log_alpha_prime, sweep, config
        )
        metrics["cql_std_q{j}"] = q.std(-1).mean()
        metrics["cql_q{j}_rand"] = q.mean()
        metrics["cql_q{j}_current_actions"] = q.amax(-1).mean()
        return loss, metrics


def make_agent(config: TrainConfig, task: Task, device="cpu", statistics=None) -> Agent:
    """Return the agent for the task's kind of actions. Raise UserError for flags of the
    other kind or out of range, and for networks that cannot be stacked."""
    validate_algorithm(config)
    kind = DiscreteCQL if task.discrete else ContinuousCQL
    with no_global_randomness("a network", "make networks inside `seeded`"):
        return kind(config, task, device, statistics)


def stage_of(config: TrainConfig, update: int) -> Tuple[bool, bool]:
    """Return whether the update with this number clones and whether it moves the
    targets: everything that depends on the number, so that each pair has its own CUDA
    graph."""
    cloning = update < config.bc_steps
    return cloning, (update + 1) % config.target_update_period == 0


class GraphedStep:
    """Updates by CUDA graphs, one for each stage: hundreds of kernels in one launch. A
    captured graph repeats what Python counted or branched on when it was captured.

    Therefore a capture, its first two replays and every thousandth call of a stage are
    repeated without the graph, from the same state. If the results differ or a capture
    fails, training continues without graphs."""

    WARM_UP = 3  # the call at which CudaGraphModule captures
    CHECKED = WARM_UP + 2
    CHECK_EVERY = 1000

    def __init__(self, step: Callable, agent: Agent, metrics: "Metrics", replay: Replay):
        import tensordict.nn  # takes a second, and warns on a CPU

        logging.getLogger("tensordict").setLevel("WARNING")
        self.make_graph = tensordict.nn.CudaGraphModule
        self.step = step
        self.agent = agent
        self.metrics = metrics
        self.replay = replay
        self.graphs = {}
        self.calls = {}
        self.checked_at = {}
        self.works = True
        self.updates = 0

    def __call__(self, noise: dict, stage: Tuple[bool, bool]) -> None:
        if stage not in self.graphs:
            step = functools.partial(self.step, stage=stage)
            self.graphs[stage] = self.make_graph(step, warmup=self.WARM_UP)
            self.calls[stage] = 0
        self.calls[stage] += 1
        self.updates += 1
        calls = self.calls[stage]
        first = self.WARM_UP <= calls <= self.CHECKED
        if not self.works:
            self.step(noise, stage)
        elif first or calls % self.CHECK_EVERY == 0:
            self.checked(noise, stage)
        else:
            self.graphs[stage](noise)

    def checked(self, noise: dict, stage: Tuple[bool, bool]) -> None:
        """Make one update by the graph, then the same one again without it. The metrics
        and the changes of all tensors must agree."""
        tensors = self.live_tensors()
        # Detached, because an autograd graph of the parameters ties their gradients to
        # the default stream, which a capture must not use.
        before = [tensor.detach().clone() for tensor in tensors]
        sums = self.metrics.sums.clone()
        problem = ""
        try:
            self.graphs[stage](noise)
        except (RuntimeError, ValueError) as error:
            problem = brief(error)
        replayed = [tensor.detach().clone() for tensor in tensors]
        replayed_metrics = self.metrics.sums - sums
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
        self.step(noise, stage)
        metrics = self.metrics.sums - sums
        same = torch.allclose(replayed_metrics, metrics, rtol=1e-3, equal_nan=True)
        for old, tensor, value in zip(before, tensors, replayed):
            change = (tensor - old).nan_to_num()  # of a run that has diverged
            error = (tensor - value).nan_to_num()
            if error.norm() > 1e-3 * change.norm() + 1e-6:
                same = False
        if not problem and not same:
            problem = "a replayed update differs from a plain one"
            if stage in self.checked_at:
                since = self.checked_at[stage]
                problem += f", since some update after number {since:,} of this process"
        if problem:
            self.works = False
            say(f"continuing without CUDA graphs: {problem}")
        self.checked_at[stage] = self.updates

    def live_tensors(self) -> List[Tensor]:
        """Return all tensors that an update changes."""
        tensors = [*self.agent.parameters(), *self.agent.buffers()]
        tensors += [self.metrics.sums, self.metrics.count]
        for value in vars(self.replay).values():  # a fork's priorities, for example
            if isinstance(value, Tensor) and value.is_floating_point():
                tensors.append(value)
        for state in self.agent.optimizer.state.values():
            tensors += state.values()
        return tensors


# ======================================================================================
# Environments: evaluation and the online phase
# ======================================================================================


def make_env(config: TrainConfig, task: Optional[Task] = None) -> gym.Env:
    """Return the environment of `eval_env`, else the one that the task records, with
    flat observations. The recorded environment has the recorded settings and time limit,
    also where `eval_env` names it. Raise UserError.

    A recorded id is data, so it cannot name a module to import; `eval_env` can."""
    recorded_id = task.env_id if task else None
    name = config.eval_env or recorded_id
    settings = {}
    limit = config.max_episode_steps
    if name.rpartition(":")[2] == recorded_id:
        settings = dict(task.env_kwargs)
        limit = limit or task.max_episode_steps
    if limit is not None:
        settings["max_episode_steps"] = limit
    where = f"--eval_env {name}: cannot be made"
    if config.eval_env is None:
        where = f"the recorded environment {name} cannot be made; pass --eval_env none "
        where += "to train without it, or --eval_env module:ID for yours"
    with errors_as(UserError, where), quiet():
        if ":" in name:
            sys.path.append(os.getcwd())  # the user's module may be there
        elif name not in gym.registry:
            import gymnasium_robotics  # imported only if needed, as it is slow

            gym.register_envs(gymnasium_robotics)
        env = gym.make(name, disable_env_checker=True, **settings)
        if env.spec.max_episode_steps is None:  # its episodes might never end
            env = gym.wrappers.TimeLimit(env, task.longest if task else 1000)
        # Your own wrapper goes here. Its observations are flattened below.
        env = flatten_observations(env, task)
    return env


def flatten_observations(env: gym.Env, task: Optional[Task]) -> gym.Env:
    """Wrap the environment so that its observations are vectors, in the order of the
    task's. Raise an exception if they do not match."""
    space = env.observation_space
    check_observation_space(space)
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return env
    if task and not isinstance(space, gym.spaces.Box):
        space = recorded_space(task.observation_space)
    gym.spaces.flatten(space, env.observation_space.sample())  # fails if parts differ
    flat = functools.partial(gym.spaces.flatten, space)
    flat_space = gym.spaces.flatten_space(space)
    return gym.wrappers.TransformObservation(env, flat, flat_space)


def check_match(task: Task, env: gym.Env, name: str) -> None:
    """Raise UserError unless the environment has the data's sizes and bounds."""
    here = make_task(env.observation_space, env.action_space)
    for field_name in ("observation_dim", "action_low", "action_high", "discrete"):
        if getattr(here, field_name) != getattr(task, field_name):
            raise UserError(
                f"--eval_env {name}: {here.observation_dim} observations and actions "
                f"{describe_actions(here)} do not match the data's "
                f"{task.observation_dim} and {describe_actions(task)}; "
                "name another environment"
            )


def describe_actions(task: Task) -> str:
    """Describe the action space, for example "3 numbers in [-1, 1]" or "2 discrete,
    0 and 1"."""
    low = min(task.action_low)
    high = max(task.action_high)
    if task.discrete:
        n = int(high - low) + 1
        between = "and" if n == 2 else "to"
        return f"{n} discrete, {low:g} {between} {high:g}"
    n = len(task.action_low)
    return f"{n} number{'s' * (n > 1)} in [{low:g}, {high:g}]"


def reference_returns(
    task: Task, name: str, limit: Optional[int] = None
) -> Tuple[Optional[List[float]], str]:
    """Return the returns that score 0 and 100 in an environment, and their origin: the
    dataset, or else D4RL if the settings pay the same returns as D4RL's. limit is the
    time limit of its episodes."""
    recorded = name == task.env_id
    if task.reference is not None and (recorded or task.env_id is None):
        return task.reference, "scored by the dataset's reference returns"
    settings = task.env_kwargs if recorded else {}
    continuing = "AntMaze" in name and settings.get("continuing_task", True)
    if continuing or not settings.get("remove_task_when_completed", True):
        return None, "not scored: its settings pay other returns than D4RL's"
    if name.startswith("AdroitHandPen-") and limit != 100:
        return None, f"not scored: D4RL's episodes have 100 steps, not {limit}"
    for prefix, reference in REFERENCE_RETURNS.items():
        if name.startswith(prefix):
            origin = "scored by D4RL's reference returns, as the dataset has none"
            return list(reference), origin
    if task.reference is not None:
        origin = f"scored by the dataset's reference returns for {task.env_id}"
        return task.reference, origin
    return None, "not scored: no reference returns are known"


def normalized_score(mean_return: float, reference: Optional[List[float]]) -> float:
    """Return D4RL's score, 100 * (mean return - low) / (high - low). It is NaN without a
    reference."""
    low, high = reference or (math.nan, math.nan)
    return 100 * (mean_return - low) / (high - low)


class Player:
    """An environment and its current episode."""

    def __init__(self, env: gym.Env):
        self.env = env
        self.over = True
        self.generator = np.random.MT19937()

    @contextmanager
    def own_randomness(self):
        """Let NumPy's global generator be the player's inside the block. Some
        environments draw from it, and their episodes take turns."""
        before = np.random.get_bit_generator()
        np.random.set_bit_generator(self.generator)
        try:
            yield
        finally:
            np.random.set_bit_generator(before)

    def reset(self, seed: int) -> None:
        """Start an episode."""
        with self.own_randomness():
            np.random.seed(seed)
            self.observation, _ = self.env.reset(seed=seed)
        self.rewards = []
        self.over = False
        self.success = None  # unknown until the environment reports it

    def step(self, action: np.ndarray) -> None:
        """Take one step with an action of the environment's type."""
        with self.own_randomness():
            self.observation, reward, ended, cut, info = self.env.step(action)
        reward = np.asarray(reward)
        if reward.size != 1 or reward.dtype.kind not in "biuf":
            found = f"reward of shape {reward.shape} and type {reward.dtype}"
            raise ValueError(f"{found}; expected one number")
        self.rewards.append(float(reward.item()))
        self.terminated = ended
        self.over = ended or cut
        reported = info.get("success", info.get("is_success"))
        if reported is not None and str(reported) != "nan":
            self.success = bool(reported or self.success)

    def result(self, discount: float) -> tuple:
        """Return the episode's return, length, success and discounted return."""
        discounted = discounted_sum(self.rewards, discount)
        return sum(self.rewards), len(self.rewards), self.success, discounted


def try_environment(env: gym.Env, task: Task, name: str) -> None:
    """Reset the environment and take one step, so that an environment that fails does so
    before anything is trained or recorded. Raise UserError."""
    player = Player(env)
    action = np.array(task.action_low)
    if not task.discrete:
        action = (action + task.action_high) / 2
    where = f"the environment {name} fails in its first reset or step; correct it, or "
    with errors_as(UserError, f"{where}name another by --eval_env"), quiet():
        player.reset(2**31 - 1)  # the largest seed that it will get
        check_observation(env, player.observation)
        player.step(task.to_environment(action)[0])
        check_observation(env, player.observation)
        if not math.isfinite(player.rewards[0]):
            raise ValueError(f"reward {player.rewards[0]}; expected a finite number")


def check_observation(env: gym.Env, observation) -> None:
    """Raise ValueError unless an observation of a vector space is a finite vector."""
    shape = env.observation_space.shape
    if shape is None or isinstance(observation, (dict, tuple)):
        return
    if np.shape(observation) != shape:
        found = np.shape(observation)
        raise ValueError(f"observation of shape {found}; its space has {shape}")
    if not np.isfinite(observation).all():
        raise ValueError("observation with NaN or infinity; expected finite numbers")


class Evaluator:
    """Evaluation of every live run's policy by deterministic episodes, in parallel."""

    def __init__(self, config: TrainConfig, task: Task, probe: gym.Env):
        """Raise UserError unless `probe`, the first environment, matches the task.
        Further environments are made when they are needed."""
        self.config = config
        self.task = task
        self.name = (config.eval_env or task.env_id).rpartition(":")[2]
        check_match(task, probe, self.name)
        self.players = [Player(probe)]
        self.limited = False
        limit = probe.get_wrapper_attr("_max_episode_steps")
        self.reference, self.whose = reference_returns(task, self.name, limit)

    def describe(self) -> str:
        """Return the opening line: environment, settings, time limit, reference."""
        env = self.players[0].env
        limit = env.get_wrapper_attr("_max_episode_steps")
        settings = ""
        if env.spec.kwargs:
            settings = f" with {brief(env.spec.kwargs)}"
        where = f"{self.name}{settings}"
        return f"evaluation: {where}, at most {limit:,} steps, {self.whose}"

    def make_players(self, n: int) -> None:
        """Make up to n environments. If only fewer can be made, they take turns."""
        while len(self.players) < n and not self.limited:
            try:
                self.players.append(Player(make_env(self.config, self.task)))
            except UserError as error:
                self.limited = True
                n_made = len(self.players)
                say(f"evaluation: {n_made} episodes at a time, as another {error}")

    def episodes(self, agent: Agent, step: int, alive: List[int], stop: list):
        """Play the episodes of every live run. Return their results by (run, episode),
        or None if a signal stops them.

        Episode i of a run starts from a state that depends on eval_seed, the run's seed,
        the step and i. Runs that differ only in cql_alpha start from the same states."""
        n = self.config.n_episodes
        waiting = [(r, i) for r in alive for i in range(n)]
        self.make_players(len(waiting))
        idle = list(self.players)
        playing = {}
        results = {}
        observations = np.zeros((len(agent.runs), n, self.task.observation_dim))
        while waiting or playing:
            if stop:
                return None
            while waiting and idle:
                r, i = waiting.pop(0)
                player = idle.pop(0)
                numbers = [self.config.eval_seed, agent.runs[r]["seed"], step, i]
                player.reset(environment_seed([EVALUATE] + numbers))
                observations[r, i] = player.observation
                playing[r, i] = player
            actions = self.task.to_environment(agent.act(observations))
            for (r, i), player in list(playing.items()):
                player.step(actions[r * n + i])
                observations[r, i] = player.observation
                if player.over:
                    results[r, i] = player.result(self.config.discount)
                    idle.append(playing.pop((r, i)))
        return results

    def evaluate(self, agent: Agent, step: int, alive: List[int], stop: list):
        """Return a row of evaluations.csv for each live run, or None if a signal stops
        the episodes. Raise MachineError."""
        with errors_as(MachineError, f"{self.name} failed at update {step}"):
            results = self.episodes(agent, step, alive, stop)
        if results is None:
            return None
        rows = {}
        n = self.config.n_episodes
        reported = any(success is not None for _, _, success, _ in results.values())
        for r in alive:
            of_run = [results[r, i] for i in range(n)]
            returns, lengths, successes, discounted = zip(*of_run)
            mean = float(np.mean(returns))
            rows[r] = {
                "episodes": n,
                "return_mean": mean,
                "return_std": float(np.std(returns)),
                "length_mean": float(np.mean(lengths)),
                "d4rl_normalized_score": normalized_score(mean, self.reference),
                "success_rate": successes.count(True) / n if reported else math.nan,
                "discounted_return_mean": float(np.mean(discounted)),
            }
        return rows


class Online:
    """The online phase: one environment for each run. Every step enters the replay
    immediately; metrics.csv has the returns of the training episodes."""

    def __init__(self, config: TrainConfig, task: Task, agent: Agent, replay: Replay):
        """Make the environments. Raise UserError if one cannot be made."""
        n = len(agent.runs)
        self.config = config
        self.task = task
        self.agent = agent
        self.replay = replay
        self.players = [Player(make_env(config, task)) for _ in range(n)]
        self.begun = [0] * n  # episodes begun
        self.reports_success = False  # whether the environment has reported success
        self.finished = [[] for _ in range(n)]  # (return, success) since the last row

    def step(self, alive: List[int], step: int) -> None:
        """Take one environment step for every live run. Raise MachineError if it
        fails."""
        if self.config.cql_alpha_online is not None:
            self.agent.sweep["cql_alpha"].fill_(self.config.cql_alpha_online)
        with errors_as(MachineError, f"the environment failed at step {step}"):
            for r in alive:
                if self.players[r].over:
                    seed = [RESET, self.agent.runs[r]["seed"], self.begun[r]]
                    self.players[r].reset(environment_seed(seed))
                    self.begun[r] += 1
            actions = self.act(alive, step)  # [R, A]
            alive = [r for r in alive if np.isfinite(actions[r]).all()]
            players = [self.players[r] for r in alive]
            before = [player.observation for player in players]
            taken = self.task.to_environment(actions)
            for r, player in zip(alive, players):
                player.step(taken[r])
        transitions = {
            "observations": np.array(before),
            "actions": actions[alive],
            "rewards": np.array([player.rewards[-1] for player in players]),
            "next_observations": np.array([player.observation for player in players]),
            "terminations": np.array([player.terminated for player in players]),
        }
        if alive:  # empty if all actions are NaN; the next row reports the divergence
            self.replay.add(alive, transitions)
        for r, player in zip(alive, players):
            self.reports_success |= player.success is not None
            if player.over:
                self.replay.end_episode(r, player.rewards)
                success = float(player.success or False)
                self.finished[r].append((sum(player.rewards), success))

    def act(self, alive: List[int], step: int) -> np.ndarray:
        """Return actions [R, A]: uniform until there is a batch; then sampled from the
        policy or, if discrete, greedy and uniform with probability
        exploration_epsilon."""
        observations = np.zeros((len(self.players), 1, self.task.observation_dim))
        for r in alive:
            observations[r, 0] = self.players[r].observation
        generators = []
        for run in self.agent.runs:
            generators.append(generator_of([EXPLORE, run["seed"], step]))
        size = (1, self.agent.action_dim)
        ready = self.replay.ready()
        if ready and not self.task.discrete:
            normals = [torch.randn(size, generator=each) for each in generators]
            return self.agent.act(observations, torch.stack(normals))[:, 0]
        uniforms = [torch.rand(size, generator=each) for each in generators]
        explored = self.uniform_actions(torch.cat(uniforms).numpy())
        if not ready:
            return explored
        draws = [torch.rand(1, generator=each) for each in generators]
        explores = torch.stack(draws).numpy() < self.config.exploration_epsilon  # [R, 1]
        return np.where(explores, explored, self.agent.act(observations)[:, 0])

    def uniform_actions(self, uniforms: np.ndarray) -> np.ndarray:
        """Map uniform numbers [R, A] in [0, 1) to actions."""
        low, high = np.array([self.task.action_low, self.task.action_high])
        if self.task.discrete:
            return low + np.floor(uniforms * (high - low + 1))
        return (low + (high - low) * uniforms).astype(np.float32)

    def metrics(self, r: int, reset: bool) -> Dict[str, float]:
        """Return the means over the episodes that ended since the last row."""
        mean = rate = math.nan
        if self.finished[r]:
            mean, rate = np.mean(self.finished[r], axis=0).tolist()
        if reset:
            self.finished[r] = []
        if not self.reports_success:
            rate = math.nan
        return {"train_return": mean, "train_success": rate}

    def state(self) -> dict:
        """Return what a checkpoint keeps. Episodes in progress restart after it."""
        names = "begun", "reports_success", "finished"
        return {name: getattr(self, name) for name in names}


# ======================================================================================
# Logging and checkpoints
# ======================================================================================

VERSION = 8  # layout of checkpoints


class Table:
    """A CSV file with a column `step`. Rows are appended; a resumed run first drops the
    rows that it will write again."""

    def __init__(self, directory: Optional[Path], name: str, last: float):
        """Keep the rows of an existing file up to step `last`."""
        self.path = directory / name if directory else None
        self.names = []
        self.kept = []
        if self.path and self.path.exists():
            self.kept = self.read(last)
            self.rewrite(self.kept)

    def read(self, last: float) -> List[dict]:
        """Return the complete rows up to step `last`."""
        with open(self.path, newline="") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if None not in row.values()]
        return [row for row in whole if int(row["step"]) <= last]

    def rewrite(self, rows: List[dict], new_names=()) -> None:
        """Replace the file by these rows, with additional columns."""
        self.names = list(rows[0]) + list(new_names) if rows else []
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            self.write(file, rows)
        os.replace(temporary, self.path)

    def write(self, file, rows: List[dict]) -> None:
        """Write rows with 8 digits for floats and nothing for NaN."""
        writer = csv.DictWriter(file, self.names, restval="", lineterminator="\n")
        if file.tell() == 0 and rows:
            writer.writeheader()
        for row in rows:
            texts = dict(row)
            for name, value in row.items():
                if isinstance(value, float):
                    texts[name] = "" if math.isnan(value) else f"{value:.8g}"
            writer.writerow(texts)
        file.flush()
        os.fsync(file.fileno())

    def append(self, rows: List[dict]) -> None:
        """Append rows and wait until they are on the disk. Raise MachineError."""
        if self.path is None or not rows:
            return
        with errors_as(MachineError, f"could not write {self.path}", OSError):
            new_names = [name for name in rows[0] if name not in self.names]
            if not self.names:
                self.names = new_names
            elif new_names:
                self.rewrite(self.read(math.inf), new_names)
            with open(self.path, "a", newline="") as file:
                self.write(file, rows)


class Best:
    """The tensors of each run at its evaluation of highest return, for best.pt."""

    def __init__(self, agent: Agent):
        self.steps = [-1] * len(agent.runs)  # -1: not evaluated yet
        self.returns = [-math.inf] * len(agent.runs)
        self.tensors = {}
        for name, tensor in agent.run_tensors().items():
            self.tensors[name] = tensor.detach().clone()

    def update(self, agent: Agent, step: int, rows: Dict[int, dict]) -> None:
        """Keep the tensors of the runs that improved; rows: an evaluation's, by run."""
        for r, row in rows.items():
            if row["return_mean"] > self.returns[r]:
                self.steps[r] = step
                self.returns[r] = row["return_mean"]
                for name, tensor in agent.run_tensors().items():
                    self.tensors[name][r] = tensor.detach()[r]

    def load(self, state: dict) -> None:
        self.steps = state["steps"]
        self.returns = state["returns"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])


class Metrics:
    """Means of metrics over an interval. The sums stay on the device until a row is due,
    and change in place, as a captured CUDA graph requires."""

    def __init__(self, device="cpu"):
        self.names = []
        self.sums = None  # [R, columns]
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, metrics: Dict[str, Tensor]) -> None:
        """Add metrics [R], or [R, N] under a name with {j}: the number of the critic."""
        names = []
        columns = []
        for name, values in metrics.items():
            if values.ndim == 1:
                values = values.unsqueeze(1)
            columns.append(values)
            for j in range(1, 1 + values.shape[1]):
                names.append(name.replace("{j}", str(j)))
        values = torch.cat(columns, dim=1)
        if names != self.names:  # the first ones, or the checkpoint had others
            self.names = names
            self.sums = torch.zeros_like(values, dtype=torch.float64)
            self.count.zero_()
        self.sums += values
        self.count += 1

    def means(self) -> List[Dict[str, float]]:
        """Return a dictionary for each run; an empty list before the first update."""
        if self.sums is None or not self.count:
            return []
        return [dict(zip(self.names, row)) for row in (self.sums / self.count).tolist()]

    def reset(self) -> None:
        self.count.zero_()
        if self.sums is not None:
            self.sums.zero_()

    def state(self) -> dict:
        return {"names": self.names, "sums": self.sums, "count": self.count}

    def load(self, state: dict) -> None:
        self.names = state["names"]
        self.count.copy_(state["count"])
        if state["sums"] is not None:
            self.sums = state["sums"].to(self.count.device)


class WandbLogger:
    """Logging to wandb: one wandb run per stacked run, or a single one under a sweep
    agent, which has chosen its id. Training continues if wandb fails."""

    def __init__(self, config: TrainConfig, directory: Optional[Path], runs, ids: list):
        self.trackers = []
        self.ids = ids
        self.sweep = "WANDB_SWEEP_ID" in os.environ
        if self.sweep:
            self.ids = [os.environ["WANDB_RUN_ID"]]
            runs = [{}]
        elif len(ids) != len(runs):
            self.ids = [uuid.uuid4().hex[:8] for _ in runs]
        mode = os.environ.get("WANDB_MODE", "online")
        if directory is not None and mode != "disabled":
            with self.dispensable():
                self.start(config, directory, runs, mode)

    def start(self, config: TrainConfig, directory: Path, runs, mode: str) -> None:
        """Start the wandb runs, or say that there is no account."""
        if mode == "online" and not self.sweep:
            with quiet():
                known = wandb.login(prompt=False)
            if not known:
                return say("wandb: no account here (`wandb login`), not logging to it")
        for run, key in zip(runs, self.ids):
            name = directory.name
            if len(runs) > 1:
                name += f"-{run['run']}"
            tracker = wandb.init(
                project=config.project,
                group=config.group,
                name=name,
                id=key,
                config={**vars(config), **run},
                dir=str(directory),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, init_timeout=20),
            )
            self.trackers.append(tracker)
        where = f"`wandb sync {directory}/wandb/offline-run-*` uploads"
        if mode == "online":
            where = " ".join(str(tracker.url) for tracker in self.trackers)
        say(f"wandb: {mode}, {where}")

    def log(self, step: int, rows: Dict[int, dict]) -> None:
        """Log the metrics of each live run; NaN is left out."""
        if self.sweep and rows:
            joined = {}
            scores = []
            for r, row in rows.items():
                scores.append(row.get("d4rl_normalized_score", math.nan))
                for name, value in row.items():
                    joined[f"{name}/{r}"] = value
            joined["d4rl_normalized_score"] = float(np.mean(scores))
            rows = {0: joined}
        with self.dispensable():
            for r, row in rows.items():
                if self.trackers:
                    known = {k: v for k, v in row.items() if not math.isnan(v)}
                    self.trackers[r].log(known, step=step)

    def finish(self) -> None:
        """Finish the wandb runs."""
        with self.dispensable():
            for tracker in self.trackers:
                tracker.finish()

    @contextmanager
    def dispensable(self):
        """Stop logging to wandb if the block raises an exception."""
        try:
            yield
        except Exception as error:
            self.trackers = []
            say(f"wandb: {brief(error)}; not logging to it")


def save_checkpoint(path: Path, payload: dict) -> None:
    """Replace the file atomically. If that fails, the old file stays. Raise
    MachineError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        while error.__context__:  # torch raises RuntimeError in place of the OSError
            error = error.__context__
        reason = brief(error)
        if path.exists():
            reason += "; the previous checkpoint is intact"
        raise MachineError(f"could not save {path}: {reason}") from None


def read_checkpoint(path: Union[str, Path]) -> dict:
    """Return a checkpoint, given its file or run directory, as tensors and plain values.
    No code in it runs. Raise UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    where = f"checkpoint {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch ignores checksums
                raise ValueError("a checksum differs")
        payload = torch.load(path, map_location="cpu", weights_only=True)
        if payload["format"] != "cql.py":
            raise ValueError("another format")
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {brief(error)}") from None
    except Exception:  # torch's message advises to let the file run code
        raise UserError(f"{where}: damaged, or not written by cql.py") from None
    with errors_as(UserError, f"{where}: damaged"):
        foreign = set(payload["config"]) - set(FIELDS)
        if foreign or payload["version"] != VERSION:
            raise UserError(
                f"{where}: written by another cql.py, an older one or a fork; use the "
                "cql.py in the run's directory"
            )
        payload["config"] = asdict(make_config(payload["config"], f"{where}: "))
        payload["task"] = pyrallis.decode(Task, payload["task"])
    payload["path"] = str(path)
    return payload


def load_agent(agent: Agent, checkpoint: dict) -> None:
    """Copy a checkpoint's state into the agent. Raise UserError if it does not fit."""
    where = f"checkpoint {checkpoint['path']}"
    old = checkpoint["task"]
    new = agent.task
    if (old.action_low, old.action_high) != (new.action_low, new.action_high):
        raise UserError(
            f"{where}: its actions are {describe_actions(old)}, but those of the "
            f"dataset or environment {describe_actions(new)}"
        )
    n_runs = len(product_of_runs(TrainConfig(**checkpoint["config"])))
    if n_runs != len(agent.runs):
        raise UserError(
            f"{where}: holds {n_runs} runs, but the flags ask for {len(agent.runs)}; "
            "pass as many values of seed and the other lists"
        )
    with errors_as(UserError, f"{where}: does not fit"):
        agent.load_state_dict(checkpoint["agent"])


class QValues(NamedTuple):
    """Q values [...] of one action per observation, or of every discrete action:
    discounted sums of the transformed rewards (reward_scale, reward_bias,
    normalize_reward)."""

    least: np.ndarray  # minimum over the critics, as in the TD target
    mean: np.ndarray  # mean over the critics
    each: np.ndarray  # [N, ...]


class TrainedPolicy:
    """The policy of one run, made by load_policy. It takes a raw observation [O],
    several [n, O], or the environment's dictionary or tuple."""

    def __init__(self, agent: Agent, run: int):
        self.agent = agent
        self.task = agent.task
        self.run = run
        self.space = recorded_space(self.task.observation_space)
        self.generator = generator_of([EXPLORE, agent.runs[run]["seed"]])

    def __call__(self, observation, deterministic: bool = True) -> np.ndarray:
        """Return the environment's action for each observation."""
        x, one = self.rows(observation)
        normals = None
        if not deterministic:
            size = (*x.shape[:2], self.agent.action_dim)
            normals = torch.randn(size, generator=self.generator)
        actions = self.task.to_environment(self.agent.act(x, normals)[self.run])
        return actions[0] if one else actions

    def q(self, observation, action=None) -> QValues:
        """Return the Q values of the environment's action, or without one, of every
        discrete action. Raise ValueError for other actions."""
        x, one = self.rows(observation)
        if action is None and not self.task.discrete:
            raise ValueError("q: actions are continuous; pass the action")
        if action is not None:
            action = np.reshape(action, (1, x.shape[1], self.agent.action_dim))
            low, high = self.task.action_low, self.task.action_high
            known = (action >= low) & (action <= high) & (action % 1 == 0)
            if self.task.discrete and not known.all():
                raise ValueError(f"q: actions are {describe_actions(self.task)}")
            action = np.repeat(action, len(x), axis=0)
        each = self.agent.q(x, action)[self.run].cpu().numpy()
        if one:
            each = each[:, 0]
        return QValues(each.min(axis=0), each.mean(axis=0), each)

    def rows(self, observation) -> Tuple[np.ndarray, bool]:
        """Return the observations for every run, [R, n, O], and whether it is one."""
        structured = isinstance(observation, (dict, tuple))
        if structured or np.shape(observation) == self.space.shape:
            observation = gym.spaces.flatten(self.space, observation)
        one = np.ndim(observation) == 1
        return np.stack([np.atleast_2d(observation)] * len(self.agent.runs)), one


def load_policy(
    path: Union[str, Path], run: Optional[int] = None, device: str = "cpu"
) -> TrainedPolicy:
    """Return the policy of one run of a checkpoint or run directory: without `run`, the
    first, and a line names it if there are more. Raise UserError if the checkpoint
    cannot be read, holds no such run, or the run diverged."""
    checkpoint = read_checkpoint(path)
    config = TrainConfig(**{**checkpoint["config"], "compile": False})
    agent = make_agent(config, checkpoint["task"], device)
    load_agent(agent, checkpoint)
    n_runs = len(agent.runs)
    if run is None:
        run = 0
        if n_runs > 1:
            about = ", ".join(describe_run(config, agent.runs[0]))
            say(f"{path}: run 0 of {n_runs} ({about}), as no other is named")
    if run not in range(n_runs):
        raise UserError(f"checkpoint {path}: holds runs 0 to {n_runs - 1}, no {run}")
    if checkpoint["diverged"][run] >= 0:
        what = f"run {run} diverged"
        for kept in Path(checkpoint["path"]).parent.glob(f"run{run}_before_*.pt"):
            what += f"; {kept.name} was saved before that"
        raise UserError(f"checkpoint {path}: {what}")
    return TrainedPolicy(agent, run)


def describe_run(config: TrainConfig, run: dict) -> List[str]:
    """Return the seed, cql_alpha and other swept flags of a run: ["seed 0", ...]."""
    names = ["seed", "cql_alpha"]
    names += [name for name in SWEPT[2:] if isinstance(getattr(config, name), list)]
    return [f"{name} {run[name]}" for name in names]


def run_directory(config: TrainConfig) -> Optional[Path]:
    """Return the directory of `resume`, or a new one below checkpoints_path."""
    if config.resume:
        return Path(config.resume)
    if config.checkpoints_path is None:
        return None
    names = config.eval_env if config.env is None else config.env
    if not isinstance(names, list):
        names = [names]
    label = "+".join([config.name] + [name.removesuffix(".hdf5") for name in names])
    safe = re.sub(r"[^\w.+-]+", "-", label).strip(".-")
    short = safe.encode()[:120].decode(errors="ignore")  # a name has at most 255 bytes
    return Path(config.checkpoints_path) / f"{short}-{uuid.uuid4().hex[:8]}"


def lock_directory(directory: Path) -> filelock.BaseFileLock:
    """Lock a run's directory while this process lives. Raise UserError."""
    lock = filelock.FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{directory}: in use by another process; "
            "wait until it has ended, or pass another directory"
        ) from None
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {brief(error)}") from None
    return lock


@contextmanager
def stop_signals():
    """Collect SIGINT and SIGTERM in a list, so that the loop can save and stop. A second
    Ctrl-C interrupts at once."""
    stop = []
    previous = {}

    def note(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ======================================================================================
# Training
# ======================================================================================


class Run:
    """The counts of a training and its outputs: tables, checkpoints, wandb, terminal."""

    CHECKPOINT_SECONDS = 300  # the longest time between two checkpoints

    def __init__(self, config, agent, replay, evaluator, online, directory, lock):
        self.config = config
        self.agent = agent
        self.replay = replay
        self.data = replay.data
        self.evaluator = evaluator
        self.online = online
        self.directory = directory
        self.lock = lock
        self.offline = config.max_timesteps
        self.total = config.max_timesteps + config.online_iterations
        self.metrics = Metrics(agent.device)
        self.best = Best(agent)
        self.step = 0  # updates offline, environment steps online
        self.updates = 0
        self.logged = self.evaluated = -1  # steps of the last rows
        self.saved = -1  # step of the last checkpoint
        self.diverged = [-1] * len(agent.runs)  # step at which a run was not finite
        self.warned = [False] * len(agent.runs)  # whether Q has diverged from the data
        self.started = self.saved_at = self.logged_at = time.monotonic()
        self.seconds = {"evaluation_seconds": 0.0, "checkpoint_seconds": 0.0}
        self.wandb = None

    def open(self, checkpoint: Optional[dict]) -> None:
        """Restore the state of a resumed run, if there is one, and write the first
        files. Raise UserError if the directory cannot be used."""
        ids = []
        config = self.config
        directory = self.directory
        if directory is not None:
            self.lock = self.lock or lock_directory(directory)
            if checkpoint is None and (directory / "checkpoint.pt").exists():
                raise UserError(f"{directory}: another process began a run there")
        damage = LookupError, RuntimeError, TypeError, ValueError
        with errors_as(UserError, f"{directory}: the run there is damaged", damage):
            if checkpoint is not None:
                self.restore(checkpoint)
                ids = checkpoint["wandb_ids"]
            self.metrics_table = Table(directory, "metrics.csv", self.logged)
            self.timing_table = Table(directory, "timing.csv", self.logged)
            self.evaluations_table = Table(directory, "evaluations.csv", self.evaluated)
        self.evaluations = self.evaluations_table.kept
        self.logged_updates = self.updates
        if directory is not None:
            text = yaml.safe_dump({**asdict(config), "resume": None}, sort_keys=False)
            (directory / "config.tmp").write_text(text)
            os.replace(directory / "config.tmp", directory / "config.yaml")
            source = directory / "cql.py"
            if source.exists() and source.read_bytes() != Path(__file__).read_bytes():
                say(f"{source}: differs from this cql.py, which continues the run")
            if Path(__file__).resolve() != source.resolve():
                shutil.copyfile(__file__, source)
        self.wandb = WandbLogger(config, directory, self.agent.runs, ids)
        runs = f"{len(self.agent.runs)} run(s) on {self.agent.device}"
        steps = f"updates {self.step:,} to {self.total:,}"
        if self.step == self.total:
            steps = f"no updates left ({self.step:,} of {self.total:,})"
        elif self.online:
            steps += f", online after {self.offline:,}"
        say(f"training {runs}, {steps}, in {directory or 'no directory'}")
        if checkpoint is not None:  # a kill may have come before the last best.pt
            self.save_best(self.payload())

    def restore(self, checkpoint: dict) -> None:
        """Restore everything that a checkpoint holds, except the agent."""
        for name in ("step", "updates", "logged", "evaluated", "diverged", "warned"):
            setattr(self, name, checkpoint[name])
        self.metrics.load(checkpoint["metrics"])
        self.replay.load(checkpoint["replay"])
        if self.online and checkpoint["online"]:
            vars(self.online).update(checkpoint["online"])
        self.best.load(checkpoint["best"])

    def alive(self) -> List[int]:
        """Return the runs that have not diverged."""
        return [r for r, step in enumerate(self.diverged) if step < 0]

    def check_finite(self) -> Dict[int, Dict[str, float]]:
        """Return the mean metrics of the live runs. A run with a mean or a weight that
        is not finite has diverged; a copy of the last checkpoint is kept for it."""
        means = self.metrics.means()
        rows = {}
        for r in self.alive():
            rows[r] = means[r] if means else {}
            broken = [name for name, x in rows[r].items() if not math.isfinite(x)]
            for weight in self.agent.parameters():
                if not broken and not weight[r].isfinite().all():
                    broken = ["a weight"]
            if broken:
                del rows[r]
                self.diverged[r] = self.step
                what = f"run {r} diverged by update {self.step}"
                say(f"{what}: not finite: {', '.join(broken[:4])}")
                self.keep_checkpoint(f"run{r}_before_{self.step}.pt")
        return rows

    def keep_checkpoint(self, name: str) -> None:
        """Copy the last checkpoint, in which a run that diverged was still finite."""
        path = self.directory and self.directory / "checkpoint.pt"
        if path and path.exists():
            with errors_as(MachineError, f"could not write {name}", OSError):
                shutil.copyfile(path, self.directory / name)

    def log(self) -> None:
        """Write a row of metrics.csv for each live run: means since the last regular
        row."""
        regular = self.step % self.config.log_freq == 0
        rows = self.check_finite()
        table = []
        for r, row in rows.items():
            if self.online:
                row.update(self.online.metrics(r, reset=regular))
            table.append({"step": self.step, **self.agent.runs[r], **row})
            if self.step <= self.offline:  # online rewards may exceed those of the data
                self.warn_of_drift(r, row)
        self.metrics_table.append(table)
        self.wandb.log(self.step, rows)
        if not self.evaluator:
            names = {"Q of data": "average_qf1", "of policy": "cql_q1_current_actions"}
            self.say_means(table, names)
        now = time.monotonic()
        updates = self.updates
        rate = (updates - self.logged_updates) / max(now - self.logged_at, 1e-9)
        timing = {"seconds": now - self.started, "updates_per_s": rate, **self.seconds}
        self.timing_table.append([{"step": self.step, **timing}])
        self.logged = self.step
        self.logged_at = now
        self.logged_updates = updates
        if regular:
            self.metrics.reset()

    def warn_of_drift(self, r: int, means: Dict[str, float]) -> None:
        """Warn once when Q exceeds every return that the rewards of the data allow. With
        an entropy backup they do not bound Q."""
        config = self.config
        if self.data is None or config.backup_entropy or config.discount == 1:
            return
        policy = means.get("cql_q1_current_actions", math.nan)
        data = means.get("average_qf1", math.nan)
        high = max(self.data.r_max, 0) / (1 - config.discount)
        low = min(self.data.r_min, 0) / (1 - config.discount)
        runs_away = max(policy, data) > high or abs(policy - data) > high - low
        if runs_away and not self.warned[r]:
            self.warned[r] = True
            about = ", ".join(describe_run(config, self.agent.runs[r]))
            say(
                f"run {r} ({about}): Q diverges: {policy:.4g} for policy actions, "
                f"{data:.4g} for dataset actions, but returns lie in {low:.4g} to "
                f"{high:.4g}"
            )
            say("  Low scores follow; a larger cql_alpha keeps Q down")

    def checkpoint_due(self) -> bool:
        """Return whether a numbered checkpoint is due, or the last one is too old."""
        often = self.config.checkpoint_freq
        kept = often > 0 and self.step % often == 0
        return kept or time.monotonic() - self.saved_at > self.CHECKPOINT_SECONDS

    def evaluation_due(self) -> bool:
        """Return whether this step has an evaluation that has not been made."""
        regular = self.step > 0 and self.step % self.config.eval_freq == 0
        due = regular or self.step in (self.offline, self.total)
        return due and self.evaluated != self.step

    def evaluate(self, stop: list) -> None:
        """Evaluate all live runs: rows of evaluations.csv, a printed line, a
        checkpoint."""
        self.check_finite()
        alive = self.alive()
        rows = {}
        if self.evaluator and self.saved != self.step:
            self.checkpoint()  # the environment may fail; a resumed run evaluates first
        before = time.monotonic()
        if self.evaluator and alive:
            rows = self.evaluator.evaluate(self.agent, self.step, alive, stop)
            if rows is None:
                return
        self.evaluated = self.step
        self.seconds["evaluation_seconds"] += time.monotonic() - before
        table = []
        for r, row in rows.items():
            table.append({"step": self.step, **self.agent.runs[r], **row})
        self.evaluations_table.append(table)
        self.evaluations += table
        self.best.update(self.agent, self.step, rows)
        self.wandb.log(self.step, rows)
        if table:
            self.say_evaluation(table)
        self.checkpoint()

    def say_means(self, table: List[dict], names: Dict[str, str]) -> None:
        """Print means over the runs that differ in the seed alone, by setting. names:
        columns of the table by what is printed."""
        settings = {}
        for row in table:
            about = "  ".join(describe_run(self.config, row)[1:])
            settings.setdefault(about, []).append(row)
        lines = []
        for about, rows in settings.items():
            for text, name in names.items():
                values = [row.get(name, math.nan) for row in rows]
                about += f"  {text} {np.mean(values):.4g}"
            lines.append(about + f"  (mean of {len(rows)} runs)" * (len(rows) > 1))
        say(f"update {self.step:>9,}  " + "\n  ".join([""] * (len(lines) > 1) + lines))

    def say_evaluation(self, table: List[dict]) -> None:
        """Print returns and scores of each run, or of many runs, means by setting."""
        if len(table) > 4:
            names = {"return": "return_mean"}
            if self.evaluator.reference is not None:
                names["score"] = "d4rl_normalized_score"
            return self.say_means(table, names)
        returns = []
        scores = []
        for row in table:
            returns.append(f"{row['return_mean']:.0f} +- {row['return_std']:.0f}")
            scores.append(row["d4rl_normalized_score"])
        text = f"update {self.step:>9,}  return {' | '.join(returns)}"
        if self.evaluator.reference is not None:
            text += "  score " + " | ".join(f"{score:.1f}" for score in scores)
            if len(scores) > 1:
                text += f" (mean {np.mean(scores):.1f})"
        say(text)

    def payload(self) -> dict:
        """Return the content of a checkpoint."""
        return {
            "format": "cql.py",
            "version": VERSION,
            "config": asdict(self.config),
            "task": asdict(self.agent.task),
            "fingerprint": self.data.fingerprint if self.data else None,
            "agent": self.agent.state_dict(),
            "replay": self.replay.state(),
            "online": self.online.state() if self.online else None,
            "metrics": self.metrics.state(),
            "best": vars(self.best),
            "wandb_ids": self.wandb.ids,
            "step": self.step,
            "updates": self.updates,
            "logged": self.logged,
            "evaluated": self.evaluated,
            "diverged": self.diverged,
            "warned": self.warned,
        }

    def checkpoint(self) -> None:
        """Write checkpoint.pt. If all runs have diverged, the last one stays as it
        is."""
        before = time.monotonic()
        self.check_finite()
        if self.directory is None or not self.alive():
            return
        payload = self.payload()
        often = self.config.checkpoint_freq
        if often and self.step % often == 0 and self.step:
            save_checkpoint(self.directory / f"checkpoint_{self.step}.pt", payload)
        save_checkpoint(self.directory / "checkpoint.pt", payload)
        self.save_best(payload)
        self.saved = self.step
        self.saved_at = time.monotonic()
        self.seconds["checkpoint_seconds"] += self.saved_at - before

    def save_best(self, payload: dict) -> None:
        """Write best.pt: the checkpoint with each run's best tensors, no optimizer."""
        best = payload["best"]
        if max(best["steps"]) < 0:
            return
        diverged = list(payload["diverged"])
        for r, step in enumerate(best["steps"]):
            if step >= 0:
                diverged[r] = -1
        agent = {**payload["agent"], **best["tensors"]}
        agent["_extra_state"] = {"optimizer": None}
        changed = {"agent": agent, "online": None, "replay": None, "diverged": diverged}
        save_checkpoint(self.directory / "best.pt", {**payload, **changed})

    def summary(self) -> None:
        """Print the last and the best evaluation of each run, and where the files
        are."""
        column = "return_mean"
        if self.evaluator and self.evaluator.reference is not None:
            column = "d4rl_normalized_score"
        for r, run in enumerate(self.agent.runs):
            text = "  ".join([f"run {r:<3}", *describe_run(self.config, run)])
            rows = [row for row in self.evaluations if int(row["run"]) == r]
            rows = [row for row in rows if row[column] != ""]
            values = [float(row[column]) for row in rows]
            if values:
                best = int(rows[np.argmax(values)]["step"])
                text += f"  {column} last {values[-1]:.2f}, best {max(values):.2f}"
                text += f" at {best:,}"
            if self.warned[r]:
                text += "  Q diverged"
            if self.diverged[r] >= 0:
                text += f"  diverged by {self.diverged[r]}"
            say(text)
        say(f"files: {self.directory or 'none'}")
        if self.directory and not self.evaluator:
            say(f"compare the policies: python scripts/judge.py {self.directory}")

    def end(self, stop: list) -> int:
        """Print the last lines. Return the exit status."""
        if stop:
            self.checkpoint()
            text = f"interrupted at update {self.step:,}"
            if self.directory:
                text += f"; continue with --resume {self.directory}"
            say(text)
            return 128 + stop[0]
        self.summary()
        return 0 if len(self.alive()) == len(self.agent.runs) else 3

    @contextmanager
    def opened(self, checkpoint: Optional[dict]):
        """Open the run, and close everything however the block ends."""
        try:
            self.open(checkpoint)
            yield
        finally:
            if self.wandb:
                self.wandb.finish()
            for each in (self.evaluator, self.online):
                for player in each.players if each else []:
                    player.env.close()
            if self.lock:
                self.lock.release()


def load(config: TrainConfig, checkpoint: Optional[dict], device):
    """Return data, task and evaluator. Data is None if nothing is learned from it, and
    the evaluator if there is no environment. Raise UserError for bad input."""
    learns = config.max_timesteps + config.online_iterations > 0
    task = checkpoint["task"] if checkpoint else None
    other_data = not checkpoint or checkpoint["config"]["env"] != config.env
    episodes = None
    if config.env is not None and (learns or other_data):
        episodes, task = read_data(config)
    probe = None
    env_id = task.env_id if task else None
    if config.eval_env != "none" and (config.eval_env or env_id):
        probe = make_env(config, task)
    elif config.online_iterations > 0:
        raise UserError(
            "--online_iterations: the dataset records no environment; pass --eval_env"
        )
    if task is None:
        space = probe.unwrapped.observation_space
        flat_space = probe.observation_space
        structured = not isinstance(space, gym.spaces.Box)
        task = make_task(space if structured else flat_space, probe.action_space)
    elif probe is not None:
        fields = action_fields(probe.action_space)
        if task.env_id is not None:  # the dataset has recorded the bounds
            fields = {name: fields[name] for name in ("action_shape", "action_dtype")}
        n_actions = math.prod(fields["action_shape"])
        if n_actions == len(task.action_low):  # otherwise Evaluator refuses it
            task = dataclasses.replace(task, **fields)
    evaluator = None
    if probe is not None:
        evaluator = Evaluator(config, task, probe)
        try_environment(probe, task, config.eval_env or env_id)
    data = None
    if episodes is not None:
        data = Dataset(config, episodes, task, device)
    return data, task, evaluator


def check_resume(config: TrainConfig, checkpoint: dict, data: Optional[Dataset]) -> None:
    """Raise UserError if a resumed run would end before its present step, or learn from
    other data or another environment."""
    before = checkpoint["config"]
    step = checkpoint["step"]
    online = step > before["max_timesteps"]
    planned = config.max_timesteps
    if online and planned != before["max_timesteps"]:
        what = f"the run went online after {before['max_timesteps']} updates"
        raise UserError(f"--max_timesteps {planned}: {what}")
    if not online and step > planned:
        raise UserError(f"--max_timesteps {planned}: the run is already at {step}")
    if step > planned + config.online_iterations:
        n = config.online_iterations
        done = step - planned
        raise UserError(f"--online_iterations {n}: the run is already at {done}")
    for name in ("eval_env", "max_episode_steps"):
        if online and getattr(config, name) != before[name]:
            raise UserError(f"--{name}: the run learns online with {before[name]}")
    was = checkpoint["fingerprint"]
    if data is not None and was and not np.allclose(data.fingerprint, was, rtol=1e-9):
        raise UserError(
            f"--env {config.env}: {data.fingerprint[0]} transitions, but the run began "
            f"with {was[0]}, or with other values; pass the same data"
        )


def describe(config: TrainConfig, task: Task, data, evaluator) -> None:
    """Print the opening lines: the data, the actions, the environment of evaluations,
    and the flags that have no effect here."""
    reference = evaluator.reference if evaluator else task.reference
    if data is not None:
        text = f"data: {len(data.lengths):,} episodes, {len(data):,} transitions"
        if data.left_out:
            text += f" ({data.left_out:,} more lack a next observation and are left out)"
        text += f", mean return {data.returns.mean():.1f}"
        if reference is not None:
            text += f" (score {normalized_score(data.returns.mean(), reference):.1f})"
        say(text)
        if data.reward_factor != 1:
            cause = "reward_scale null"
            if config.normalize_reward:
                cause = "normalize_reward"
            say(f"rewards: multiplied by {data.reward_factor:.4g} ({cause})")
        if data.cumulative is not None:
            likely = data.cumulative.diff(prepend=data.cumulative.new_zeros(1))
            size = f"{1 / likely.square().sum():,.0f} of {len(data):,} transitions"
            say(f"trajectory_weighting: effective sample size {size}")
    say(f"actions: {describe_actions(task)}")
    if data is not None:
        describe_seen_actions(task, data.columns["actions"])
    if evaluator is not None:
        say(evaluator.describe())
    else:
        why = "no environment is known; pass one by --eval_env"
        if config.eval_env == "none":
            why = "--eval_env none"
        say(f"evaluation: none ({why}); scripts/judge.py compares policies without one")
    changed = {name for name, x in vars(config).items() if x != FIELDS[name].default}
    kind = "discrete" if task.discrete else "continuous"
    idle = CONTINUOUS if task.discrete else ["exploration_epsilon"]
    unused = sorted(changed.intersection(idle))
    if unused:
        say(f"no effect on {kind} actions: {', '.join(unused)}")
    if config.cql_lagrange and np.min(config.cql_target_action_gap) < 0:
        say("cql_target_action_gap below 0: a real target; here it does not mean 'off'")


def describe_seen_actions(task: Task, actions: Tensor) -> None:
    """Print a line if the data's actions [n, A] may not be what the user expects."""
    if task.discrete:
        n = int(task.action_high[0] - task.action_low[0]) + 1
        n_seen = len(actions.unique())
        if n_seen < n:
            say(f"  {n - n_seen} of them do not occur in the data")
    elif not (actions % 1).any():
        say("  All are whole numbers, but treated as continuous. For discrete actions,")
        say("  store one column of integers or pass an --eval_env with a Discrete space")


def train(config: TrainConfig) -> int:
    """Train all runs of the config. Return the exit status. Raise UserError for bad
    input, before anything is written, and MachineError."""
    validate(config)
    keep_freed_memory()
    device = pick_device(config)
    directory = run_directory(config)

    # The start: a run to resume, a model to load, or neither.
    lock = None
    checkpoint = None
    resumed = False
    if directory is not None and (directory / "checkpoint.pt").exists():
        lock = lock_directory(directory)
        checkpoint = read_checkpoint(directory)
        resumed = True
    elif config.load_model:
        checkpoint = read_checkpoint(config.load_model)

    # Data and environment, agent, source of batches.
    data, task, evaluator = load(config, checkpoint, device)
    # Decided once, because a compiled update rounds otherwise than an eager one.
    if config.compile is None and resumed:
        config = dataclasses.replace(config, compile=checkpoint["config"]["compile"])
    elif config.compile is None:
        worth = worth_compiling(config, device, task.discrete)
        config = dataclasses.replace(config, compile=worth and can_compile(device))
    statistics = None
    if data is not None and config.normalize:
        statistics = data.statistics()
    agent = make_agent(config, task, device, statistics)
    if resumed:
        with errors_as(UserError, f"checkpoint {checkpoint['path']}: damaged"):
            check_resume(config, checkpoint, data)
    if checkpoint is not None:
        load_agent(agent, checkpoint)
        if checkpoint["agent"]["_extra_state"]["optimizer"] is None:
            say(f"{checkpoint['path']}: holds no optimizer state; Adam starts afresh")
    replay = Replay(config, data, agent)
    online = None
    if config.online_iterations > 0:
        online = Online(config, task, agent, replay)
    run = Run(config, agent, replay, evaluator, online, directory, lock)

    def one_update(noise: dict, stage: Tuple[bool, bool]) -> None:
        """Update all runs on a batch: what a CUDA graph captures."""
        with no_global_randomness("an update", "draw noise in draw_run"):
            batch = replay.sample(noise["fractions"])
            run.metrics.add(agent.update(batch, noise, *stage))

    if device.type == "cuda":
        one_update = GraphedStep(one_update, agent, run.metrics, replay)
    describe(config, task, data, evaluator)

    with stop_signals() as stop, run.opened(checkpoint if resumed else None):
        look = {"unit": "update", "leave": False, "dynamic_ncols": True}
        bar = tqdm(total=run.total, initial=run.step, disable=None, **look)
        if run.evaluation_due():  # for example with --max_timesteps 0
            run.evaluate(stop)
        while run.step < run.total and run.alive() and not stop:
            # Online, first take a step in the environment of each run. Updates wait
            # until the replay holds a batch.
            updates = 1
            if run.step >= run.offline:
                online.step(run.alive(), run.step)
                updates = config.utd if replay.ready() else 0

            # Update. All randomness is drawn here, none inside the losses.
            for _ in range(updates):
                noise = agent.draw(run.updates, config.batch_size)
                one_update(noise, stage_of(config, run.updates))
                run.updates += 1
            run.step += 1
            bar.update()

            # Log the means since the last row.
            if run.step % config.log_freq == 0 or run.step == run.total:
                run.log()

            # Evaluate and save; also save in between, so that a kill costs minutes.
            if run.evaluation_due():
                run.evaluate(stop)
            elif run.checkpoint_due():
                run.checkpoint()
        bar.close()
        return run.end(stop)


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command line. Return the exit status: 0, 1, 2, 3, 130 or 143."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if {"-h", "--help"} & set(argv):
            print_help()
            return 0
        return train(read_config(argv))
    except UserError as error:
        print("cql.py: error:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before `train` handles the signal
        return 130
    except (MachineError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"cql.py: failed: {brief(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
