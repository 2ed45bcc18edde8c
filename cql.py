"""Conservative Q-Learning (CQL) in one file: read it, run it, sweep it, fork it.

Learns a policy from recorded data alone. The algorithm is Kumar et al., "Conservative
Q-Learning for Offline Reinforcement Learning", NeurIPS 2020 (arXiv 2006.04779), on the
soft actor-critic of Haarnoja et al. (arXiv 1812.05905); flags and defaults are those of
CORL's offline cql.py. Several runs (seeds, penalty weights) train at once as one more
dimension of every tensor.

    python cql.py --config_path configs/quickstart.yaml          # minutes on a laptop
    python cql.py --env mujoco/hopper/medium-v0 --seed '[0,1,2]' --cql_alpha '[1,5,10]'
    python cql.py --config_path configs/hopper.yaml --resume runs/hopper   # or go on
    python cql.py --load_model runs/hopper --max_timesteps 0     # only evaluate

Where to look: `train` is the loop, `Agent.update` one update, `Replay.sample` the batch,
`critic_loss` the critics' loss (`q_and_gap` its Q, `conservative_gap` the penalty),
`fitted_q_loss` fitted Q evaluation, `Evaluator` the episodes, `Run.checkpoint` what is
saved. A metric is one more entry of a loss's dictionary: [R], or [R, N] under a name
with {j}.

Letters in shape comments: R runs, N critics, B batch, K = cql_n_actions, M actions of a
state, T target actions of a state (1 or K; in a dataset, steps of an episode), n states
that are penalized, the batch's first (cql_states, else all; elsewhere any number), O
observation dims, A action dims. Actions inside the algorithm live in [-1, 1]; the
environment's own bounds are applied where data comes in and where `act` goes out.
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
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
import uuid
import warnings
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Union, get_args
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
from tqdm import tqdm

# ======================================================================================
# Configuration
# ======================================================================================


@dataclass
class TrainConfig:
    """Every flag. Names and defaults are CORL's offline cql.py's unless a comment says
    otherwise; those marked [list] also take a list, whose product trains at once."""

    # ---- Data ----

    # Minari id, directory of a Minari dataset, D4RL .hdf5 file, or a list of those;
    # null: no data, only what is gathered online in eval_env
    env: Union[List[str], str, None] = "mujoco/hopper/medium-v0"
    normalize: bool = True  # Standardize observations by the dataset's statistics
    # Divide rewards by returns' spread / 1000 (hopper, halfcheetah, walker2d)
    normalize_reward: bool = False
    reward_scale: float = 1.0  # Rewards are r * reward_scale + reward_bias (CORL: 5)
    reward_bias: float = 0.0  # See reward_scale; always applied (CORL: -1)

    # ---- Run ----

    # auto, cpu, cuda, cuda:N (CORL's default: cuda)
    device: str = "auto"
    seed: Union[int, List[int]] = 0  # Seed of initialization and training noise [list]
    max_timesteps: int = 1_000_000  # Updates of the offline phase
    offline_iterations: Optional[int] = None  # Another name for max_timesteps
    # Where run directories go; null writes nothing, to wandb neither (CORL: null)
    checkpoints_path: Optional[str] = "runs"
    resume: Optional[str] = None  # Run directory to continue, or to start in if empty
    # Checkpoint or run directory to start from: weights, optimizers, statistics
    load_model: Optional[str] = ""
    log_freq: int = 1000  # Updates between rows of metrics.csv
    # Updates between checkpoint_<step>.pt, which are kept; 0: checkpoint.pt alone
    checkpoint_freq: int = 0
    project: str = "CORL"  # wandb project
    group: str = "CQL-D4RL"  # wandb group
    name: str = "CQL"  # Run name, first part of the run directory's

    # ---- Evaluation ----

    # Environment to evaluate in: an id or module:id; null: the dataset's; none: no
    # evaluation
    eval_env: Optional[str] = None
    eval_freq: int = 5000  # Updates between evaluations
    n_episodes: int = 10  # Episodes of one evaluation
    # Updates of fitted Q evaluation after training: policies' value by the data alone
    fqe_updates: int = 0
    eval_seed: int = 0  # With a run's own seed, the seed of its evaluation episodes
    # Time limit of evaluation and online episodes; null: the environment's, else the
    # data's longest episode, at least 1000
    max_episode_steps: Optional[int] = None

    # ---- Algorithm ----

    # Transitions per update and run
    batch_size: int = 256
    discount: float = 0.99  # Discount factor
    policy_lr: float = 3e-5  # Learning rate of policy and temperature
    qf_lr: float = 3e-4  # Learning rate of critics and Lagrange multiplier
    soft_target_update_rate: float = 5e-3  # Step of target critics to the critics
    target_update_period: int = 1  # Updates between target steps
    alpha_multiplier: float = 1.0  # Factor on the entropy temperature
    use_automatic_entropy_tuning: bool = True  # Learn the entropy temperature
    backup_entropy: bool = False  # Subtract alpha * log pi in the TD target
    bc_steps: int = 0  # First updates in which the policy clones the data
    cql_alpha: Union[float, List[float]] = 10.0  # Penalty, twice the paper's [list]
    cql_n_actions: int = 10  # Actions a proposal; 3 x this enter the penalty
    cql_importance_sample: bool = True  # Divide each proposal by its density
    cql_temp: Union[float, List[float]] = 1.0  # Softmax temperature [list]
    cql_lagrange: bool = False  # Learn the penalty weight towards the target gap
    cql_target_action_gap: Union[float, List[float]] = -1.0  # Aim of cql_lagrange [list]
    cql_max_target_backup: bool = False  # TD target takes the best of K actions
    cql_clip_diff_min: float = -math.inf  # Lower clamp of a sample's gap
    cql_clip_diff_max: float = math.inf  # Upper clamp of a sample's gap
    penalty: str = "logsumexp"  # logsumexp, two_proposals, policy_kl or mean
    cal_ql: bool = False  # Cal-QL: penalize no Q that is below the return-to-go
    is_sparse_reward: bool = False  # Cal-QL: failed episodes count as going on for ever

    # ---- Networks ----

    # Width of every hidden layer
    hidden_dim: int = 256
    q_n_hidden_layers: int = 3  # Hidden layers of a critic
    orthogonal_init: bool = True  # Orthogonal critic weights (the policy's never are)
    policy_log_std_multiplier: float = 1.0  # Initial factor on the policy's log std
    n_critics: int = 2  # Critics; targets take their minimum (fqe_updates: mean)
    # Critics, drawn for each update, whose least is the target; null: all (else REDQ)
    n_target_critics: Optional[int] = None

    # ---- Online ----

    # Environment steps after the offline updates
    online_iterations: int = 0
    buffer_size: int = 2_000_000  # Capacity of the online buffer; data is loaded whole
    mixing_ratio: float = -1.0  # Offline share of an online batch; -1: one buffer
    cql_alpha_online: Optional[float] = None  # Online penalty weight; null: cql_alpha
    utd: int = 1  # Updates per environment step
    exploration_epsilon: float = 0.1  # Share of uniform discrete actions

    # ---- Speed ----

    # Sampled actions to backpropagate the penalty through; 0: all
    cql_backward_actions: int = 0
    cql_states: int = 0  # States of the batch that are penalized; 0: all
    precision: str = "fp32"  # Of products: fp32, tf32 (GPU), bf16 (critics; avx512_bf16)
    compile: bool = False  # torch.compile: fewer kernels, a minute's start

    def __post_init__(self):
        if self.offline_iterations is not None:
            self.max_timesteps = self.offline_iterations
            self.offline_iterations = None


FIELDS = {each.name: each for each in dataclasses.fields(TrainConfig)}
SWEPT = ("seed", "cql_alpha", "cql_temp", "cql_target_action_gap")  # may be lists
PRECISIONS = ("fp32", "tf32", "bf16")
PENALTIES = ("logsumexp", "two_proposals", "policy_kl", "mean")  # conservative_gap
AT_LEAST_ONE = (
    "eval_freq n_episodes buffer_size batch_size target_update_period cql_n_actions "
    "q_n_hidden_layers log_freq hidden_dim n_critics n_target_critics utd "
    "max_episode_steps"
).split()
NOT_NEGATIVE = (
    "max_timesteps alpha_multiplier policy_lr qf_lr cql_alpha bc_steps seed eval_seed "
    "cql_backward_actions cql_states online_iterations cql_alpha_online "
    "checkpoint_freq fqe_updates"
).split()
# What a resumed run may change, and what load_model does not take from the checkpoint.
RESUMABLE = (
    "max_timesteps offline_iterations online_iterations fqe_updates device eval_freq "
    "n_episodes eval_seed eval_env max_episode_steps log_freq checkpoint_freq project "
    "group name checkpoints_path resume env"
).split()
NOT_INHERITED = (
    "max_timesteps offline_iterations online_iterations fqe_updates device project "
    "group name checkpoints_path resume load_model"
).split()
# What only an agent of continuous actions reads; DiscreteCQL refuses three more.
CONTINUOUS = (
    "alpha_multiplier use_automatic_entropy_tuning backup_entropy policy_lr bc_steps "
    "cql_n_actions cql_importance_sample cql_max_target_backup cql_backward_actions "
    "policy_log_std_multiplier"
).split()


class UserError(Exception):
    """The user's input is at fault: one line on stderr, exit status 2."""


class MachineError(Exception):
    """The machine failed while running (disk, simulator): one line, exit status 1."""


def brief(error) -> str:
    """An exception's first words, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def errors_as(kind: type, where: str, errors=Exception):
    """Raise what goes wrong inside as a UserError or MachineError of one line."""
    try:
        yield
    except (UserError, MachineError):
        raise
    except errors as error:
        raise kind(f"{where}: {brief(error)}") from None


def parse_as(kind: type, value):
    """`value` as kind; ValueError for a fraction as int, a text as bool."""
    if isinstance(value, (list, dict, type(None))):
        raise ValueError(value)
    if isinstance(value, bool) != (kind is bool):
        raise ValueError(value)
    if kind is int and not isinstance(value, int):  # 1e6 is a text in YAML
        value = float(value)
        if value % 1:
            raise ValueError(value)
    return kind(value)


for _kind in (bool, int, float, str):
    pyrallis.decode.register(_kind, functools.partial(parse_as, _kind))


def check_name(name: str, where: str) -> None:
    """Raise UserError, with the nearest name, unless it is a flag's."""
    if name not in FIELDS:
        near = difflib.get_close_matches(str(name), FIELDS, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{where}: unknown flag{hint}")


def make_config(values: dict, where: str = "") -> TrainConfig:
    """Flags as pyrallis decodes them, each to its field's type. Raises UserError."""
    decoded = {}
    for name, value in values.items():
        check_name(name, f"{where}--{name}")
        kind = FIELDS[name].type
        try:
            decoded[name] = pyrallis.decode(kind, value)
        except Exception:
            expected = re.sub(r"typing\.|<class '|'>", "", str(kind))
            if "List" in expected:
                expected += " (a list is written '[0, 1]')"
            what = f"expected {expected}, got {value!r}"
            raise UserError(f"{where}--{name}: {what}") from None
    return TrainConfig(**decoded)


def merge_aliases(values: dict, where: str) -> dict:
    """offline_iterations as max_timesteps, so that a layer can override another."""
    n = values.pop("offline_iterations", None)
    if n is not None:
        if "max_timesteps" in values:
            raise UserError(f"{where}--max_timesteps or --offline_iterations, not both")
        values["max_timesteps"] = n
    return values


def read_config_file(path: Union[str, Path]) -> dict:
    """Flags from a YAML file. Raises UserError."""
    where = f"--config_path {path}"
    with errors_as(UserError, where):
        values = yaml.safe_load(Path(path).read_text("utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"{where}: empty, or not a mapping of flags")
    for name, value in values.items():
        check_name(name, f"{path}: {name}")
        if is_null(name, value):
            values[name] = None
    return merge_aliases(values, f"{path}: ")


def is_null(name: str, value) -> bool:
    """Whether a word for nothing is given to a flag that may be null."""
    optional = type(None) in get_args(FIELDS[name].type)
    return optional and value in ("null", "~", "None")  # wandb's sweeps write the last


def read_text(name: str, text: str):
    """A flag's value from the command line: null, a text as it stands (a name may be
    007 or true), or YAML."""
    kinds = get_args(FIELDS[name].type) or (FIELDS[name].type,)
    if is_null(name, text):
        return None
    if str in kinds and not (List[str] in kinds and text.startswith("[")):
        return text
    with errors_as(UserError, f"--{name} {text}"):
        return yaml.safe_load(text)


def read_command_line(argv: List[str]) -> dict:
    """Flags from `--name value`, `--name=value` and a bare `--name` of a boolean, above
    those of --config_path. Raises UserError."""
    texts = {}
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            hint = "a list is written '[0, 1]', a file needs --config_path"
            raise UserError(f"unexpected argument {argument!r}; {hint}")
        if name != "config_path":
            check_name(name, argument)
        if name in texts:
            raise UserError(f"--{name}: given twice")
        if not equals and arguments and not arguments[0].startswith("--"):
            text = arguments.pop(0)
        elif not equals and name in FIELDS and FIELDS[name].type is bool:
            text = "true"
        elif not equals:
            raise UserError(f"--{name}: expected a value")
        texts[name] = text
    file = {}
    if "config_path" in texts:
        file = read_config_file(texts.pop("config_path"))
    values = {name: read_text(name, text) for name, text in texts.items()}
    return {**file, **merge_aliases(values, "")}


def print_help() -> None:
    """pyrallis's page of flags, in TrainConfig's groups."""
    usage = "cql.py [--config_path FILE.yaml] [--FLAG VALUE ...]"
    source = functools.cache(inspect.getsource)  # else read anew for each flag
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
    """Flags of the run in a directory; none where none has begun. Raises UserError."""
    if (directory / "checkpoint.pt").exists():
        return read_checkpoint(directory)["config"]
    if (directory / "config.yaml").exists():
        return read_config_file(directory / "config.yaml")
    return {}


def read_config(argv: List[str]) -> TrainConfig:
    """The flags given, above those of a run to resume or of a model to load. Raises
    UserError."""
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
    for name in FIELDS:
        was = getattr(before, name)
        now = getattr(config, name)
        if resumed and name not in RESUMABLE and now != was:
            raise UserError(
                f"--{name} {now}: the run to resume has {was!r}, and keeps it"
            )
    validate(config)
    return config


def check_values(config: TrainConfig) -> None:
    """Raise UserError for numbers out of range and for lists that are no product."""
    for name, value in vars(config).items():
        values = value if isinstance(value, list) else [value]
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} {value}: empty, or the same value twice")
        for number in values:
            if isinstance(number, (int, float)):
                if math.isnan(number):
                    raise UserError(f"--{name} {number}: must be a number")
                if name in AT_LEAST_ONE and not number >= 1:
                    raise UserError(f"--{name} {number}: must be at least 1")
                if name in NOT_NEGATIVE and not 0 <= number < math.inf:
                    raise UserError(f"--{name} {number}: must be finite, at least 0")


def algorithm_mistakes(config: TrainConfig) -> Dict[str, bool]:
    """What may be wrong with the flags of the algorithm, and whether it is."""
    importance = config.cql_importance_sample
    target_gap = config.cql_target_action_gap
    subset_too_large = (config.n_target_critics or 1) > config.n_critics
    bounds = config.cql_clip_diff_min, config.cql_clip_diff_max
    return {
        "--precision: one of fp32, tf32, bf16": config.precision not in PRECISIONS,
        f"--penalty: one of {', '.join(PENALTIES)}": config.penalty not in PENALTIES,
        "--penalty: this one needs --cql_importance_sample true": (
            config.penalty != "logsumexp" and not importance
        ),
        "--cql_backward_actions: at most 3 * cql_n_actions; 0 takes all": (
            config.cql_backward_actions > 3 * config.cql_n_actions
        ),
        "--cql_states: at most --batch_size; 0 takes all": (
            config.cql_states > config.batch_size
        ),
        "--n_target_critics: at most --n_critics": subset_too_large,
        "--discount: must lie in [0, 1]": not 0 <= config.discount <= 1,
        "--soft_target_update_rate: must lie in [0, 1]": (
            not 0 <= config.soft_target_update_rate <= 1
        ),
        "--exploration_epsilon: must lie in [0, 1]": (
            not 0 <= config.exploration_epsilon <= 1
        ),
        "--cql_temp: must be above 0": not np.min(config.cql_temp) > 0,
        "--cql_clip_diff_min: above --cql_clip_diff_max": bounds[0] > bounds[1],
        "--cql_target_action_gap: a list needs --cql_lagrange true": (
            isinstance(target_gap, list) and not config.cql_lagrange
        ),
        "--is_sparse_reward: needs a --discount below 1": (
            config.is_sparse_reward and config.discount == 1
        ),
    }


def phase_mistakes(config: TrainConfig) -> Dict[str, bool]:
    """The same for the flags of data, environments and phases."""
    no_data = config.env is None
    ratio = config.mixing_ratio
    online = config.online_iterations
    needed = 0
    if no_data:
        needed = config.batch_size
    elif 0 < ratio < 1:
        needed = n_online_rows(config)
    statistics = config.normalize and not config.load_model
    offline = config.max_timesteps > 0 or config.normalize_reward or statistics
    return {
        "--mixing_ratio: must be -1 or in (0, 1)": ratio != -1 and not 0 < ratio < 1,
        "--buffer_size: less than a batch": online and config.buffer_size < needed,
        "--online_iterations: too few for a batch": 0 < online < needed,
        "--online_iterations: needs an --eval_env": online and config.eval_env == "none",
        "--env null: without data, --eval_env and --online_iterations are needed": (
            no_data and config.eval_env in (None, "none")
        )
        or (no_data and not online and not config.load_model),
        "--fqe_updates: needs data, by --env": no_data and config.fqe_updates > 0,
        "--env null: without data, pass --max_timesteps 0, --normalize false and "
        "--normalize_reward false": no_data and offline,
    }


def validate(config: TrainConfig) -> None:
    """Raise UserError for values out of range and for flags that contradict."""
    check_values(config)
    for mistakes in (algorithm_mistakes(config), phase_mistakes(config)):
        for problem, wrong in mistakes.items():
            if wrong:
                raise UserError(problem)


def product_of_runs(config: TrainConfig) -> List[dict]:
    """Number and swept flags of each run: the product of their lists."""
    lists = []
    for name in SWEPT:
        value = getattr(config, name)
        lists.append(value if isinstance(value, list) else [value])
    runs = []
    for number, values in enumerate(itertools.product(*lists)):
        runs.append({"run": number, **dict(zip(SWEPT, values))})
    return runs


def pick_device(config: TrainConfig) -> torch.device:
    """The device that --device names, set to --precision. Raises UserError."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with errors_as(UserError, f"--device {name}: not here; pass --device cpu"):
        device = torch.empty(0, device=name).device  # cuda becomes cuda:0
        if device.type not in ("cpu", "cuda"):
            raise ValueError("no device to train on")
    on_gpu = device.type == "cuda"
    if config.precision == "tf32" and not on_gpu:
        raise UserError("--precision tf32: only GPUs have it; pass fp32 or bf16")
    if on_gpu:
        torch.cuda.set_device(device)
    products = "high" if config.precision == "tf32" else "highest"
    torch.set_float32_matmul_precision(products)
    return device


def keep_freed_memory() -> None:
    """Stop glibc from handing freed tensors back to the system, which faults them in
    again, page by page, at the next update: a third of its time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


def say(text: str) -> None:
    """Print a line without breaking the progress bar."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any longer (`| head`): train on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def quiet():
    """Without the notes that libraries write on both streams."""
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        with redirect_stderr(io.StringIO()):
            yield


# ======================================================================================
# Data
# ======================================================================================

# D4RL's reference returns (random policy, expert), by the beginning of a gymnasium id;
# for datasets that record none. Source: D4RL's infos.py.
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
# A D4RL file carries no environment; by the file's name the nearest one is guessed:
# id, settings, observation and action dims.
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
    """What must be known of an environment; plain values, kept in checkpoints."""

    observation_space: str  # Minari's JSON
    action_low: List[float]  # [A]
    action_high: List[float]  # [A]
    action_shape: List[int]
    action_dtype: str = "float32"
    discrete: bool = False  # then actions are the integers from low to high
    env_id: Optional[str] = None
    env_kwargs: dict = field(default_factory=dict)
    max_episode_steps: Optional[int] = None
    reference: Optional[List[float]] = None  # returns scored 0 and 100
    longest: int = 1000  # steps of the data's longest recorded episode, at least 1,000

    @functools.cached_property
    def observation_dim(self) -> int:
        return gym.spaces.flatdim(recorded_space(self.observation_space))

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Actions [..., A] as the environment takes them, [n, *action_shape]."""
        if np.dtype(self.action_dtype).kind in "iu":
            actions = np.rint(actions)
        return actions.reshape(-1, *self.action_shape).astype(self.action_dtype)


class Episode(NamedTuple):
    observations: np.ndarray  # [T + 1, O]
    actions: np.ndarray  # [T, A]
    rewards: np.ndarray  # [T]
    terminations: np.ndarray  # [T] 0 or 1
    where: str  # file and number, for messages
    whole: bool  # ended by termination or time limit, not by a cut
    recorded_rewards: np.ndarray  # that of a last step left out included


class Batch(NamedTuple):
    """Transitions of R runs; arrays without the leading R are taken as R = 1. Losses get
    them prepared: standardized observations, actions in [-1, 1] or counted from 0."""

    observations: Tensor  # [R, B, O] raw
    actions: Tensor  # [R, B, A] in the environment's bounds; discrete: [R, B, 1]
    rewards: Tensor  # [R, B]
    next_observations: Tensor  # [R, B, O] raw
    terminations: Tensor  # [R, B] 1 where the episode terminated, not truncated
    mc_returns: Optional[Tensor] = None  # [R, B] discounted return-to-go, for Cal-QL


def check_observation_space(space: gym.Space) -> None:
    """Raise UserError unless observations flatten to a vector."""
    if isinstance(space, gym.spaces.Dict):
        for part in space.values():
            check_observation_space(part)
    elif isinstance(space, gym.spaces.Tuple):
        for part in space:
            check_observation_space(part)
    else:
        vector = isinstance(space, gym.spaces.Box) and len(space.shape) <= 2
        counted = gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary
        if not vector and not isinstance(space, counted) or is_image_space(space):
            what = f"observations in {brief(space)} are not supported"
            raise UserError(f"{what}: vectors, integers and dictionaries of them are")


def action_fields(space: gym.Space) -> dict:
    """Task's fields of an action space. Raises UserError for an unsupported one."""
    if isinstance(space, gym.spaces.Discrete):
        low = np.array([space.start])
        high = np.array([space.start + space.n - 1])
    elif isinstance(space, gym.spaces.Box) and space.is_bounded():
        low = space.low.ravel()
        high = space.high.ravel()
    else:
        low = high = np.zeros(1)
    if low.size == 0 or (low >= high).any():
        what = f"actions in {brief(space)} are not supported"
        raise UserError(f"{what}: a bounded Box and a Discrete of two or more are")
    return {
        "action_low": low.astype(float).tolist(),
        "action_high": high.astype(float).tolist(),
        "action_shape": list(space.shape),
        "action_dtype": str(space.dtype),
        "discrete": isinstance(space, gym.spaces.Discrete),
    }


def make_task(observation_space: gym.Space, action_space: gym.Space, **more) -> Task:
    """The task of these spaces. Raises UserError for unsupported ones."""
    check_observation_space(observation_space)
    if gym.spaces.flatdim(observation_space) == 0:
        raise UserError("observations of no numbers")
    text = serialize_space(observation_space)
    return Task(text, **action_fields(action_space), **more)


def recorded_space(text) -> gym.Space:
    """A space from Minari's JSON, keys in the recorded order, which is flatten's own;
    Minari's reader sorts them."""
    space = json.loads(text) if isinstance(text, str) else text
    parts = space.get("subspaces")
    if space["type"] == "Dict":
        return gym.spaces.Dict([(key, recorded_space(parts[key])) for key in parts])
    if space["type"] == "Tuple":
        return gym.spaces.Tuple([recorded_space(part) for part in parts])
    return deserialize_space(json.dumps(space))


def flatten(space: gym.Space, value) -> np.ndarray:
    """gym.spaces.flatten of all observations of an episode at once, as [T + 1, O]."""
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
    """Numbers [n, k], each below its size [k], as [n, sum of sizes] of 0 and 1."""
    if (values < 0).any() or (values >= sizes).any():
        raise UserError("observations outside their recorded space")
    table = np.zeros((len(values), sizes.sum()), np.float32)
    np.put_along_axis(table, values + np.cumsum(sizes) - sizes, 1, axis=1)
    return table


def minari_task(directory: Path) -> Task:
    """The task in a Minari dataset's metadata.json, which is data: without recorded
    spaces Minari would make the recorded environment, with its entry point, to learn
    them, so such a dataset is refused. Raises UserError."""
    metadata = json.loads((directory / "metadata.json").read_text())
    spaces = {}
    for name in ("observation_space", "action_space"):
        if not metadata.get(name):
            raise UserError(f"metadata.json lacks {name}")
        spaces[name] = recorded_space(metadata[name])
    spec = metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}"
    spec = json.loads(spec)
    env_id = spec.get("id")
    settings = dict(spec.get("kwargs") or {})
    settings.pop("render_mode", None)
    if env_id is not None and not re.fullmatch(r"[\w/.-]+", env_id):
        raise UserError(f"the recorded environment {env_id!r} is no plain id")
    reference = [metadata.get("ref_min_score"), metadata.get("ref_max_score")]
    if None not in reference and not float(reference[0]) < float(reference[1]):
        raise UserError(f"reference scores {reference} are not min and max")
    return make_task(
        **spaces,
        env_id=env_id,
        env_kwargs=settings,
        max_episode_steps=spec.get("max_episode_steps"),
        reference=None if None in reference else [float(end) for end in reference],
    )


def read_minari(directory: Path) -> Tuple[List[Episode], Task]:
    """Episodes and task of a Minari dataset's data directory. Raises UserError."""
    task = minari_task(directory)
    space = recorded_space(task.observation_space)
    # Infos are most of the bytes, and nothing here reads them.
    with mock.patch.object(hdf5_storage, "_decode_info"):
        recorded = list(MinariDataset(directory).iterate_episodes())
    episodes = []
    for each in recorded:
        n = len(each.rewards)
        episodes.append(
            Episode(
                observations=flatten(space, each.observations),
                actions=np.asarray(each.actions).reshape(n, -1),
                rewards=each.rewards,
                terminations=each.terminations,
                where=f"{directory}, episode {each.id}",
                whole=n > 0 and bool(each.terminations[-1] or each.truncations[-1]),
                recorded_rewards=each.rewards,
            )
        )
    return episodes, task


def table_action_space(actions: np.ndarray) -> gym.Space:
    """The space of a table's actions [n, ...]: one column of integers or truth values is
    discrete, other numbers are a box in [-1, 1], D4RL's bounds."""
    if actions.size == len(actions) and actions.dtype.kind in "iub":
        low = int(actions.min())
        high = int(actions.max())
        return gym.spaces.Discrete(max(high - low + 1, 2), start=low)
    return gym.spaces.Box(-1, 1, actions.shape[1:])


def read_arrays(path: Path) -> Dict[str, np.ndarray]:
    """The arrays of D4RL's flat HDF5, [n, ...] each. Raises UserError."""
    needed = "observations", "actions", "rewards", "terminals"
    arrays = {}
    with h5py.File(path, "r") as file:
        for key in (*needed, "timeouts", "next_observations"):
            if isinstance(file.get(key), h5py.Dataset):
                arrays[key] = file[key][()]
        missing = [key for key in needed if key not in arrays]
        if missing:
            raise UserError(f"lacks {', '.join(missing)}; holds {brief(list(file))}")
    lengths = {len(array) for array in arrays.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise UserError(f"arrays of {lengths} rows")
    for key in ("rewards", "terminals", "timeouts"):
        if key in arrays:
            arrays[key] = arrays[key].ravel()
    return arrays


def episode_ends(arrays: Dict[str, np.ndarray], done: np.ndarray) -> np.ndarray:
    """[n] bool: the rows after which another episode begins. A jump from the next
    observation to the row below is an end, flagged or not."""
    ends = done.copy()
    if "next_observations" in arrays:
        observations = arrays["observations"]
        with np.errstate(all="ignore"):  # check_episode refuses NaN and infinity
            size = np.abs(observations[1:]) + observations.std(axis=0)
            distance = np.abs(arrays["next_observations"][:-1] - observations[1:])
            same = distance <= 4 * np.finfo(np.float32).eps * size  # a few roundings
        ends[:-1] |= ~same.all(axis=1)
    ends[-1] = True
    return ends


def read_d4rl(path: Path) -> Tuple[List[Episode], Task]:
    """Episodes and task of D4RL's flat HDF5: observations, actions, rewards, terminals
    and, where present, timeouts and next_observations. Raises UserError.

    Without next_observations, what follows an episode's last observation is unknown:
    the last transition of an episode that a time limit cut is left out, as in
    d4rl.qlearning_dataset; a terminal one bootstraps nothing and stays."""
    arrays = read_arrays(path)
    observations = arrays["observations"]
    rewards = arrays["rewards"]
    terminals = arrays["terminals"] != 0
    done = terminals | (arrays.get("timeouts", terminals) != 0)
    following = arrays.get("next_observations")
    if following is None and "timeouts" not in arrays:
        say(f"{path.name}: without timeouts, so only terminals end an episode")
    space = gym.spaces.Box(-np.inf, np.inf, observations.shape[1:])
    task = make_task(space, table_action_space(arrays["actions"]))
    actions = arrays["actions"].reshape(len(rewards), -1)
    episodes = []
    first = 0
    for last in np.flatnonzero(episode_ends(arrays, done)).tolist():
        known = terminals[last] or following is not None
        kept = slice(first, last + 1 if known else last)
        end = observations[last] if following is None else following[last]
        episodes.append(
            Episode(
                observations=np.concatenate([observations[kept], end[None]]),
                actions=actions[kept],
                rewards=rewards[kept],
                terminations=arrays["terminals"][kept],
                where=f"{path}, episode {len(episodes)}",
                whole=bool(done[last]),
                recorded_rewards=rewards[first : last + 1],
            )
        )
        first = last + 1
    return episodes, task


def guess_environment(task: Task, name: str) -> None:
    """Take the environment that a D4RL file's name suggests, if the sizes are its."""
    name = Path(name).name
    guess = D4RL_ENVIRONMENTS.get(re.split("[-_]", name)[0])
    if task.env_id is None and guess is not None:
        env_id, settings, *sizes = guess
        if sizes == [task.observation_dim, len(task.action_low)]:
            task.env_id = env_id
            task.env_kwargs = settings
            say(f"{name}: taken for data of {env_id}, by its name")
        else:
            say(f"{name}: not of {env_id}, as its name suggests: sizes differ")


def minari_directory(name: str) -> Path:
    """Where a Minari id's data lies, downloaded if it must be. Raises UserError."""
    root = get_dataset_path()
    directory = get_dataset_path(name) / "data"
    if (directory / "metadata.json").exists():
        return directory
    if re.fullmatch(f"({'|'.join(D4RL_NAMES)})-[a-z-]+-v[0-2]", name):
        what = "a name of D4RL's, whose data Minari does not hold: pass the .hdf5 file"
        raise UserError(f"{what}; `minari list remote` shows what there is")
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", name):
        hint = "nor a Minari id such as mujoco/hopper/medium-v0"
        raise UserError(f"no such directory or .hdf5 file, {hint}")
    where = f"no directory here, not under {root}; pass a directory or .hdf5 file, as"
    with errors_as(UserError, f"{where} its download failed"):
        if "MINARI_REMOTE" not in os.environ:  # offline, Minari retries for minutes
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=20)
        say(f"downloading {name} ...")
        with filelock.FileLock(root / ".lock"), quiet():
            minari.download_dataset(name)  # nothing, if another process just did
    return directory


def read_episodes(name: str) -> Tuple[List[Episode], Task]:
    """One entry of `env`: a directory, a file or a Minari id. Add your own source here:
    a list of Episode, and make_task(observation_space, action_space). Raises
    UserError."""
    path = Path(name)
    try:
        if path.suffix in (".csv", ".json", ".npz", ".parquet", ".pkl"):
            raise UserError("a table: scripts/from_table.py makes a dataset of it")
        if path.is_file():
            episodes, task = read_d4rl(path)
        elif (path / "metadata.json").is_file():
            episodes, task = read_minari(path)
        elif (path / "data").is_dir():
            episodes, task = read_minari(path / "data")
        else:
            episodes, task = read_minari(minari_directory(name))
    except UserError as error:
        raise UserError(f"--env {name}: {error}") from None
    except BlockingIOError:
        raise UserError(f"--env {name}: locked by a process that writes it") from None
    except Exception as error:
        raise UserError(f"--env {name}: damaged or foreign: {brief(error)}") from None
    task.longest = max([1000] + [len(each.recorded_rewards) for each in episodes])
    return episodes, task


def read_data(config: TrainConfig) -> Tuple[List[Episode], Task]:
    """Episodes and task of all that --env names, joined. Raises UserError."""
    names = config.env if isinstance(config.env, list) else [config.env]
    episodes = []
    tasks = []
    for name in names:
        part, task = read_episodes(name)
        episodes += part
        tasks.append(task)
    known = [task for task in tasks if task.env_id is not None]
    joined = (known or tasks)[0]
    for name, task in zip(names, tasks):
        join_task(joined, task, f"--env {name}")
        if config.eval_env is None:
            guess_environment(joined, name)
    return episodes, joined


def join_task(joined: Task, task: Task, where: str) -> None:
    """Let `joined` speak for `task` too. Raises UserError where it cannot."""
    joined.longest = max(joined.longest, task.longest)
    if task.discrete != joined.discrete:
        raise UserError(f"{where}: discrete and continuous actions do not join")
    same = (
        task.action_low == joined.action_low and task.action_high == joined.action_high
    )
    if task.env_id is not None and not same:
        raise UserError(f"{where}: actions {describe_actions(task)}, unlike the first's")
    if task.env_id not in (None, joined.env_id):
        raise UserError(f"{where}: {task.env_id} is not {joined.env_id}")
    if task.env_id is not None and task.env_kwargs != joined.env_kwargs:
        say(f"{where}: recorded with settings {task.env_kwargs}; evaluation is in")
        say(f"  those of the first, {joined.env_kwargs}")
    if joined.env_id is None and joined.discrete:  # ids that one of the files lacks
        joined.action_low = np.minimum(joined.action_low, task.action_low).tolist()
        joined.action_high = np.maximum(joined.action_high, task.action_high).tolist()


def check_episode(episode: Episode, task: Task) -> None:
    """Raise UserError unless it holds finite numbers of the task's sizes and bounds."""
    n = len(episode.rewards)
    n_actions = len(task.action_low)
    where = episode.where
    sizes = {
        "observations": (n + 1, task.observation_dim),
        "actions": (n, n_actions),
        "rewards": (n,),
        "terminations": (n,),
    }
    for name, size in sizes.items():
        array = getattr(episode, name)
        if array.shape != size or array.dtype.kind not in "biuf":
            what = f"{name} of shape {array.shape}, type {array.dtype}"
            raise UserError(f"{where}: {what}, expected numbers of shape {size}")
        if not (np.abs(array) < 3e38).all():  # the largest number of float32
            raise UserError(f"{where}: {name} hold NaN or infinity")
    if task.discrete and (episode.actions % 1).any():
        raise UserError(f"{where}: discrete actions that are no whole numbers")
    low, high = np.array([task.action_low, task.action_high])
    middle = (low + high) / 2
    reach = 0.5001 * (high - low)
    if (np.abs(episode.actions - middle) > reach).any():
        hint = "rescale them, or name their environment with --eval_env"
        raise UserError(f"{where}: actions outside {describe_actions(task)}; {hint}")


def check_resolution(observations: np.ndarray) -> None:
    """Raise UserError for a column [n, O] that float32 would flatten: unix time, say.
    One that hardly moves at all carries nothing, and passes."""
    moves = observations - observations[0].astype(float)  # exactly 0 for a constant
    std = moves.std(axis=0, dtype=np.float64)
    size = np.abs(observations).mean(axis=0, dtype=np.float64)
    for column in np.flatnonzero((std > 1e-3) & (std < 1e-5 * size)):
        what = f"column {column} of the observations is {size[column]:.6g} in size"
        hint = "subtract a constant: float32 would lose it"
        raise UserError(f"--env: {what} and moves by {std[column]:.3g}; {hint}")


class Dataset:
    """Transitions on the device. The next observation is found by index, not stored
    twice: it is the row after the observation's own."""

    def __init__(self, config: TrainConfig, episodes, task: Task, device="cpu"):
        """Raises UserError for too little data, and for numbers out of bounds."""
        self.columns = {}  # of a Batch, [n, ...], but for observations
        arrays = {}
        returns = []
        whole = []
        n_recorded = 0
        for each in episodes:
            check_episode(each, task)
            n_recorded += len(each.recorded_rewards)
            returns.append(each.recorded_rewards.sum(dtype=np.float64))
            if each.whole:
                whole.append(returns[-1])
        self.returns = np.array(whole or returns)
        episodes = [each for each in episodes if len(each.rewards)]
        self.lengths = np.array([len(each.rewards) for each in episodes], int)
        n = int(self.lengths.sum())
        self.left_out = n_recorded - n
        if n < config.batch_size:
            what = f"{n} transitions are no batch of {config.batch_size}"
            raise UserError(f"--env: {what}; pass a smaller --batch_size")
        for name in ("observations", "actions", "rewards", "terminations"):
            arrays[name] = np.concatenate([getattr(each, name) for each in episodes])
            if name == "terminations":
                arrays[name] = arrays[name] != 0
            array = arrays[name].astype(np.float32)
            self.columns[name] = torch.as_tensor(array, device=device)
        check_resolution(arrays["observations"])
        self.reward_factor = reward_factor(whole, task, config)
        self.observations = self.columns.pop("observations")
        rewards = transformed(self.columns["rewards"], self.reward_factor, config)
        self.columns["rewards"] = rewards
        self.r_min = float(rewards.min())
        self.r_max = float(rewards.max())
        # What tells on resume whether the run learns from what it began with.
        size = float(np.abs(arrays["observations"]).sum(dtype=np.float64))
        self.fingerprint = [n, float(rewards.double().sum()), size]
        if config.cal_ql:
            self.columns["mc_returns"] = self.all_returns_to_go(config)
        episode_number = np.repeat(np.arange(len(episodes)), self.lengths)
        rows = np.arange(n) + episode_number  # an episode has one more observation
        self.rows = torch.as_tensor(rows, device=device)

    def __len__(self) -> int:
        return len(self.rows)

    def all_returns_to_go(self, config: TrainConfig) -> Tensor:
        """Every transition's return-to-go, [n]."""
        rewards = self.columns["rewards"].cpu().double().numpy()
        terminations = self.columns["terminations"].cpu().numpy()
        returns = np.zeros(len(rewards))
        for end, length in zip(np.cumsum(self.lengths), self.lengths):
            part = slice(end - length, end)
            columns = rewards[part], terminations[part]
            returns[part] = returns_to_go(*columns, config, self.r_min)
        return torch.as_tensor(returns).to(self.observations)

    def first_observations(self) -> Tensor:
        """Of every episode, raw, [episodes, O]."""
        starts = np.cumsum(self.lengths) - self.lengths
        return self.observations[self.rows[torch.as_tensor(starts)]]

    def discounted_return(self, discount: float) -> float:
        """Mean over the episodes, in rewards as they are learned from; what would have
        followed a time limit is left out."""
        rewards = self.columns["rewards"].cpu().double().numpy()
        parts = np.split(rewards, np.cumsum(self.lengths)[:-1])
        return float(np.mean([discounted_sum(part, discount) for part in parts]))

    def statistics(self) -> Tuple[Tensor, Tensor]:
        """Mean and std + 1e-3 of s over the transitions, [O] each (CORL's form)."""
        observations = self.observations[self.rows].double()
        return observations.mean(0), observations.std(0, correction=0) + 1e-3

    def gather(self, index: Tensor) -> Batch:
        """Transitions at index [R, B]."""
        rows = self.rows[index]
        columns = {name: column[index] for name, column in self.columns.items()}
        columns["observations"] = self.observations[rows]
        columns["next_observations"] = self.observations[rows + 1]
        return Batch(**columns)

    def sample(self, fractions: Tensor) -> Batch:
        """Transitions at fractions [R, B] in [0, 1) of the whole."""
        return self.gather((fractions * len(self)).long().clamp(max=len(self) - 1))


def transformed(rewards: Tensor, factor: float, config: TrainConfig) -> Tensor:
    """Rewards as they are learned from."""
    return rewards * factor * config.reward_scale + config.reward_bias


def discounted_sum(rewards, discount: float) -> float:
    """Of an episode's rewards [T]."""
    return float(np.dot(rewards, discount ** np.arange(len(rewards))))


def returns_to_go(rewards, terminations, config: TrainConfig, r_min) -> np.ndarray:
    """Discounted sum of an episode's rewards [T] from each step on (Cal-QL, section 4).

    What follows a time limit is left out, and a termination ends the sum. Under
    `is_sparse_reward`, an episode that earned nothing but the data's least reward is
    taken to go on so for ever. Differs from CORL, which looks at the last reward
    only."""
    if config.is_sparse_reward and (rewards == r_min).all():
        return np.full(len(rewards), r_min / (1 - config.discount))
    factors = config.discount * (1 - np.asarray(terminations, float))
    returns = np.zeros(len(rewards))
    following = 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + factors[t] * following
        returns[t] = following
    return returns


def reward_factor(returns: np.ndarray, task: Task, config: TrainConfig) -> float:
    """What normalize_reward multiplies rewards by; returns of whole episodes."""
    if not config.normalize_reward:
        return 1.0
    names = f"{task.env_id} {config.env} {config.eval_env}".lower()
    if not re.search("hopper|halfcheetah|walker2d", names):
        say("normalize_reward has no effect here: hopper, halfcheetah, walker2d only")
        return 1.0
    if len(returns) == 0 or np.ptp(returns) == 0:
        raise UserError("--normalize_reward: needs whole episodes of unequal returns")
    return 1000 / float(np.ptp(returns))


def offline_places(config: TrainConfig, device="cpu") -> Tensor:
    """[B] bool: which rows of an online batch are offline data under mixing_ratio,
    spread evenly, so that of any first n rows (cql_states) the share is right to
    within a row."""
    steps = torch.arange(config.batch_size + 1, dtype=torch.float64, device=device)
    steps = (steps * config.mixing_ratio + 1e-9).floor()
    return steps[1:] > steps[:-1]


def n_online_rows(config: TrainConfig) -> int:
    """Rows of an online batch that are no offline data."""
    return int((~offline_places(config)).sum())


class Replay:
    """What updates draw from: the dataset, if any, and online each run's own transitions
    too, of which the first in go first out."""

    def __init__(self, config: TrainConfig, data: Optional[Dataset], agent: "Agent"):
        """Raises UserError where the buffer does not fit the memory."""
        self.config = config
        self.data = data
        self.n_offline = 0 if data is None else len(data)
        self.r_min = -math.inf if data is None else data.r_min
        self.factor = 1.0 if data is None else data.reward_factor
        self.capacity = min(config.buffer_size, config.online_iterations)
        n_runs = len(agent.runs)
        device = agent.device
        where = f"--buffer_size {config.buffer_size}: no room for {self.capacity} steps"
        self.columns = {}
        for name in Batch._fields:
            if name != "mc_returns" or config.cal_ql:
                size = agent.column_sizes.get(name, ())
                with errors_as(UserError, where, RuntimeError):
                    column = torch.zeros(n_runs, self.capacity, *size, device=device)
                self.columns[name] = column
        self.added = np.zeros(n_runs, int)  # steps of each run in all
        self.filled = torch.zeros(n_runs, 1, dtype=torch.long, device=device)  # present
        self.offline_rows = offline_places(config, agent.device)

    def ready(self) -> bool:
        """Whether every run has a batch; updates are joint, so they wait for all."""
        return self.n_offline + self.added.min() >= self.config.batch_size

    def add(self, runs: List[int], transitions: Batch) -> None:
        """A step of each of these runs, [len(runs), ...], rewards as they came. Until
        its episode ends nothing is known of a step's return-to-go: -inf is no bound."""
        columns = transitions._asdict()
        rewards = torch.as_tensor(np.asarray(transitions.rewards, np.float32))
        columns["rewards"] = transformed(rewards, self.factor, self.config)
        columns["mc_returns"] = np.full(len(runs), -np.inf)
        places = self.added[runs] % self.capacity
        for name, column in self.columns.items():
            column[runs, places] = torch.as_tensor(columns[name]).to(column)
        self.added[runs] += 1
        self.count_filled()

    def count_filled(self) -> None:
        sizes = np.minimum(self.added, self.capacity)
        self.filled.copy_(torch.as_tensor(sizes).unsqueeze(1))

    def end_episode(self, r: int, rewards: List[float]) -> None:
        """Fill in the returns-to-go of run r's last len(rewards) steps."""
        if not self.config.cal_ql:
            return
        rewards = torch.as_tensor(np.asarray(rewards, np.float32))
        rewards = transformed(rewards, self.factor, self.config).double().numpy()
        going_on = np.zeros(len(rewards))  # a last step's termination changes nothing
        returns = returns_to_go(rewards, going_on, self.config, self.r_min)
        kept = min(len(returns), self.capacity)
        places = np.arange(self.added[r] - kept, self.added[r]) % self.capacity
        column = self.columns["mc_returns"]
        column[r, places] = torch.as_tensor(returns[-kept:]).to(column)

    def sample(self, fractions: Tensor) -> Batch:
        """Transitions at fractions [R, B] in [0, 1); without own ones, the dataset's.
        Nothing here asks the device for a number, as a captured graph requires."""
        if self.capacity == 0:
            return self.data.sample(fractions)
        if self.config.mixing_ratio < 0 or self.data is None:
            # one buffer, the dataset's rows first
            total = self.n_offline + self.filled  # [R, 1]
            index = torch.minimum((fractions * total).long(), total - 1)
            from_replay = index >= self.n_offline
            replay_index = (index - self.n_offline).clamp(min=0)
        else:
            enough = self.filled >= (~self.offline_rows).sum()
            from_replay = ~self.offline_rows & enough  # [R, B]
            index = (fractions * self.n_offline).long()
            own = (fractions * self.filled).long()
            replay_index = torch.minimum(own, (self.filled - 1).clamp(min=0))
        runs = torch.arange(len(fractions), device=fractions.device).unsqueeze(1)
        columns = {}
        data = None
        if self.data is not None:
            data = self.data.gather(index.clamp(max=self.n_offline - 1))
        for name, column in self.columns.items():
            values = column[runs, replay_index]
            if data is not None:
                mask = from_replay.unsqueeze(-1) if values.ndim == 3 else from_replay
                values = torch.where(mask, values, getattr(data, name))
            columns[name] = values
        return Batch(**columns)

    def state(self) -> dict:
        """The online transitions that are there, for a checkpoint."""
        size = int(self.filled.max())
        columns = {name: x[:, :size].clone() for name, x in self.columns.items()}
        return {"columns": columns, "added": self.added.tolist()}

    def load(self, state: dict) -> None:
        for name, saved in state["columns"].items():
            self.columns[name][:, : saved.shape[1]] = saved.to(self.filled.device)
        self.added[:] = state["added"]
        self.count_filled()


# ======================================================================================
# Networks: every parameter leads with the run dimension R, a critic's with [R, N]
# ======================================================================================


class EnsembleLinear(nn.Module):
    """A linear layer of every member: weight [*lead, in, out], bias [*lead, 1, out].
    Every forward pass goes through here: training, `act`, evaluation, export."""

    def __init__(self, lead: Tuple[int, ...], n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(*lead, 1, n_out))

    def forward(self, x: Tensor, state: Optional[Tensor] = None) -> Tensor:
        """x [members, n, in] -> [members, n, out], in the type of x. With state
        [members, B, O] the input is [state; x], where the n = B * M rows of x are M
        actions of each state: a state's share is computed once for all of them."""
        weight = self.weight.flatten(0, -3)
        bias = self.bias.flatten(0, -3)
        if state is not None:
            of_state, weight = weight.split([state.shape[-1], x.shape[-1]], dim=-2)
            bias = torch.baddbmm(bias, state, of_state)  # [members, B, out]
            bias = bias.repeat_interleave(x.shape[1] // state.shape[1], dim=1)
        if x.dtype != weight.dtype:  # bf16
            bias = bias.to(x.dtype)
            weight = weight.to(x.dtype)
        if torch.compiler.is_compiling():  # which joins the addition with what follows
            return torch.bmm(x, weight) + bias
        return torch.baddbmm(bias, x, weight)


class EnsembleMLP(nn.Module):
    """ReLU networks of every member: x [*lead, n, in] -> [*lead, n, out]."""

    def __init__(self, lead: Tuple[int, ...], sizes: List[int]):
        super().__init__()
        self.layers = nn.ModuleList()
        for n_in, n_out in zip(sizes, sizes[1:]):
            self.layers.append(EnsembleLinear(lead, n_in, n_out))

    def forward(self, x: Tensor, state: Optional[Tensor] = None) -> Tensor:
        """For state see EnsembleLinear. The last layer keeps the weights' type."""
        lead = x.shape[:-2]
        x = x.flatten(0, -3)
        if state is not None:
            state = state.flatten(0, -3)
        for layer in self.layers[:-1]:
            x = layer(x, state).relu_()
            state = None
        last = self.layers[-1]
        return last(x.to(last.weight.dtype)).unflatten(0, lead)

    @torch.no_grad()
    def initialize(self, generators: List[torch.Generator], orthogonal: bool) -> None:
        """CORL's init_module_weights; run r draws from generators[r] alone."""
        for r, generator in enumerate(generators):
            for layer in self.layers:
                last = layer is self.layers[-1]
                n_in, n_out = layer.weight.shape[-2:]
                weights = layer.weight[r].view(-1, n_in, n_out)
                biases = layer.bias[r].view(-1, n_out)
                for weight, bias in zip(weights, biases):
                    if orthogonal:
                        gain = 1e-2 if last else math.sqrt(2)
                        nn.init.orthogonal_(weight, gain, generator)
                    elif last:
                        nn.init.xavier_uniform_(weight, 1e-2, generator)
                    else:  # nn.Linear's own default
                        bound = n_in**-0.5
                        weight.uniform_(-bound, bound, generator=generator)
                        bias.uniform_(-bound, bound, generator=generator)


class Policy(EnsembleMLP):
    """Tanh-squashed Gaussian, three hidden layers: [R, B, O] -> mean and log std."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, action_dim: int):
        hidden = [config.hidden_dim] * 3
        super().__init__((n_runs,), [obs_dim, *hidden, 2 * action_dim])
        multiplier = torch.full((n_runs, 1, 1), float(config.policy_log_std_multiplier))
        self.log_std_multiplier = nn.Parameter(multiplier)
        self.log_std_offset = nn.Parameter(torch.full((n_runs, 1, 1), -1.0))  # as CORL

    def forward(self, observations: Tensor) -> Tuple[Tensor, Tensor]:
        mean, log_std = super().forward(observations).chunk(2, dim=-1)  # [R, B, A]
        log_std = self.log_std_multiplier * log_std + self.log_std_offset
        return mean, log_std.clamp(-20.0, 2.0)


def squash(mean, log_std, normals) -> Tuple[Tensor, Tensor]:
    """Actions tanh(mean + std * normals) and their log densities.

    mean, log_std [R, B, A], normals [R, B, n, A] -> [R, B, n, A], [R, B, n]."""
    mean = mean.unsqueeze(2)
    log_std = log_std.unsqueeze(2)
    pre_tanh = mean + log_std.exp() * normals
    return pre_tanh.tanh(), squashed_log_prob(normals, log_std, pre_tanh)


def squashed_log_prob(normals, log_std, pre_tanh) -> Tensor:
    """Log density of tanh(pre_tanh), pre_tanh = mean + std * normals; sums over A."""
    gaussian = -0.5 * normals.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh(x)^2) without cancellation (SAC, appendix C)
    jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh, threshold=40))
    return (gaussian - jacobian).sum(-1)


def data_log_prob(mean, log_std, actions) -> Tensor:
    """Log density [R, B] of given actions [R, B, A] under the squashed Gaussian."""
    # clipped because atanh(+-1) is infinite; differs from CORL, which ignores `actions`
    pre_tanh = actions.clamp(-1 + 1e-5, 1 - 1e-5).atanh()
    return squashed_log_prob((pre_tanh - mean) / log_std.exp(), log_std, pre_tanh)


class Critic(EnsembleMLP):
    """N critics: observations [R, B, O], actions [R, B, M, A] -> Q [R, N, B, M].

    Actions [R, N, B, M, A] are each critic's own. dtype is that of the hidden layers."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, action_dim: int):
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        super().__init__((n_runs, config.n_critics), [obs_dim + action_dim, *hidden, 1])
        self.n_critics = config.n_critics

    def forward(self, observations, actions, dtype: Optional[torch.dtype] = None):
        state = observations.unsqueeze(1).expand(-1, self.n_critics, -1, -1)
        if actions.ndim == 4:  # the same for all critics
            actions = actions.unsqueeze(1).expand(-1, self.n_critics, -1, -1, -1)
        x = actions.to(dtype or actions.dtype).flatten(2, 3)  # [R, N, B * M, A]
        q = super().forward(x, state)  # [R, N, B * M, 1]
        return q.squeeze(-1).unflatten(2, actions.shape[2:4])


class DiscreteCritic(EnsembleMLP):
    """N critics of A discrete actions: observations [R, B, O] -> Q [R, N, B, A]."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, n_actions: int):
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        super().__init__((n_runs, config.n_critics), [obs_dim, *hidden, n_actions])
        self.n_critics = config.n_critics

    def forward(self, observations: Tensor) -> Tensor:
        shared = observations.unsqueeze(1).expand(-1, self.n_critics, -1, -1)
        return super().forward(shared)


# ======================================================================================
# Losses: pure functions that return (loss [R], metrics): means over the batch, sums
# over the critics. "CQL" is arXiv 2006.04779, "SAC" is arXiv 1812.05905.
# ======================================================================================


class Noise(NamedTuple):
    """All randomness of one update, drawn outside the losses. What an agent has no use
    for is None."""

    fractions: Tensor  # [R, B] in [0, 1), float64: which transitions make the batch
    normals: Optional[Tensor] = None  # [R, B, 1, A] at s, of the actor
    next_normals: Optional[Tensor] = None  # [R, B, T, A] at s', of the target
    proposal_normals: Optional[Tensor] = None  # [R, n, 2K, A] at s, then at s'
    uniforms: Optional[Tensor] = None  # [R, n, K, A] in [-1, 1]
    resampling_offset: Optional[Tensor] = None  # [R, N, n] in [0, 1), sampled_backward
    subset_keys: Optional[Tensor] = None  # [R, N], least_of_targets


class Samples(NamedTuple):
    """Actions of one update and their log densities."""

    mean: Tensor  # [R, B, A] of pi(.|s), with graph
    log_std: Tensor  # [R, B, A] of pi(.|s), with graph
    actions: Tensor  # [R, B, 1, A] from pi(.|s), with graph: the actor's
    log_pi: Tensor  # [R, B] with graph
    target_actions: Tensor  # [R, B, T, A] from pi(.|s')
    target_log_pi: Tensor  # [R, B, T]
    proposals: Tensor  # [R, n, 3K, A]: uniform, pi(.|s), pi(.|s')
    log_mu: Tensor  # [R, n, 3K]


class Sweep(NamedTuple):
    """The flags that take a list, as one value per run. Tensors, because cql_alpha
    changes when the online phase begins, and a captured graph keeps Python's numbers."""

    cql_alpha: Tensor  # [R]
    cql_temp: Tensor  # [R]
    cql_target_action_gap: Tensor  # [R]


def sample_actions(policy: Policy, batch: Batch, noise: Noise) -> Samples:
    """Every action of an update, from one pass of the policy over [s; s']."""
    B = batch.rewards.shape[1]
    n, K, A = noise.uniforms.shape[1:]
    states = torch.cat([batch.observations, batch.next_observations], dim=1)
    mean, log_std = policy(states)  # [R, 2B, A]
    mean, next_mean = mean.split(B, dim=1)
    log_std, next_log_std = log_std.split(B, dim=1)
    actions, log_pi = squash(mean, log_std, noise.normals)
    with torch.no_grad():
        targets, target_log_pi = squash(next_mean, next_log_std, noise.next_normals)
        normals, next_normals = noise.proposal_normals.chunk(2, dim=2)  # [R, n, K, A]
        current, log_mu = squash(mean[:, :n], log_std[:, :n], normals)
        following, next_log_mu = squash(
            next_mean[:, :n], next_log_std[:, :n], next_normals
        )
    uniform_log_mu = torch.full_like(log_mu, -A * math.log(2))
    return Samples(
        mean=mean,
        log_std=log_std,
        actions=actions,
        log_pi=log_pi.squeeze(2),
        target_actions=targets,
        target_log_pi=target_log_pi,
        proposals=torch.cat([noise.uniforms, current, following], dim=2),
        log_mu=torch.cat([uniform_log_mu, log_mu, next_log_mu], dim=2),
    )


def temperature_loss(log_alpha: Tensor, log_pi: Tensor, target_entropy: float):
    """SAC eq. 18, with log alpha in alpha's place as in the authors' code."""
    loss = -(log_alpha.unsqueeze(1) * (log_pi.detach() + target_entropy)).mean(1)
    return loss, {"alpha_loss": loss}


def actor_loss(critic: Critic, batch: Batch, samples: Samples, alpha: Tensor, config):
    """SAC eq. 9: alpha [R] weighs the entropy against the least of the critics, or, with
    REDQ's targets, their mean (arXiv 2101.05982, algorithm 1)."""
    weights = {name: weight.detach() for name, weight in critic.named_parameters()}
    inputs = batch.observations, samples.actions
    q = torch.func.functional_call(critic, weights, inputs).squeeze(3)  # [R, N, B]
    q = q.amin(1) if config.n_target_critics is None else q.mean(1)
    loss = (alpha.unsqueeze(1) * samples.log_pi - q).mean(1)
    return loss, {"policy_loss": loss, "log_pi": samples.log_pi.mean(1)}


def cloning_loss(batch: Batch, samples: Samples, alpha: Tensor):
    """Behaviour cloning with entropy, for the first bc_steps updates (CQL's code)."""
    log_pi_data = data_log_prob(samples.mean, samples.log_std, batch.actions)  # [R, B]
    loss = (alpha.unsqueeze(1) * samples.log_pi - log_pi_data).mean(1)
    return loss, {"policy_loss": loss, "log_pi": samples.log_pi.mean(1)}


def least_of_targets(q: Tensor, subset_keys: Optional[Tensor], config) -> Tensor:
    """The least Q of the target critics, all of them or the n_target_critics of largest
    key, which is a random subset (REDQ, arXiv 2101.05982, algorithm 1).

    q [R, N, B, T], subset_keys [R, N] or None -> [R, B, T]."""
    if subset_keys is not None:
        chosen = subset_keys.topk(config.n_target_critics, dim=1).indices
        q = q.take_along_dim(chosen[:, :, None, None], dim=1)
    return q.amin(1)


@torch.no_grad()
def td_target(
    target_critic: Critic, batch: Batch, samples: Samples, alpha, keys, config
):
    """SAC eq. 2-3 with the least of the target critics; [R, B]. A time limit is no
    terminal and bootstraps; with cql_max_target_backup the best of K actions counts."""
    q = target_critic(batch.next_observations, samples.target_actions)
    q = least_of_targets(q, keys, config)
    q, best = q.max(-1)  # [R, B, T] -> [R, B]
    if config.backup_entropy:
        log_pi = samples.target_log_pi.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        q = q - alpha.unsqueeze(1) * log_pi
    target = batch.rewards + config.discount * (1 - batch.terminations) * q
    return target, {"average_target_q": q.mean(1)}


def conservative_gap(q, log_mu, q_data, temperature, config) -> Tensor:
    """The soft maximum of Q over actions above Q of the data: CQL eq. 4 and appendix F.

    q [R, N, n, M], log_mu [R, 1, n, M] or None for unweighted actions, which the data's
    own joins; q_data [R, N, n]; temperature [R]. Returns [R, N, n], clamped.
    Differs from all code with a temperature: T divides Q alone, not log mu, so that
    T * logsumexp estimates T * log(integral of exp(Q / T)). No 1 / 3K, as in CORL.

    Other forms of config.penalty take part of the 3K proposals: `two_proposals` the
    uniform ones and pi(.|s)'s, with 1 / 2K (appendix F as printed; DI-engine's text);
    `policy_kl` pi(.|s)'s, unweighted, with 1 / K: mu proportional to pi exp(Q / T)
    (CQL(rho), section 3.2); `mean` their mean (eq. 2, the tutorials')."""
    K = config.cql_n_actions
    penalty = config.penalty
    T = temperature[:, None, None]  # [R, 1, 1]
    if penalty == "two_proposals":
        q = q[..., : 2 * K]
        log_mu = log_mu[..., : 2 * K]
    elif penalty in ("policy_kl", "mean"):
        q = q[..., K : 2 * K]
        log_mu = log_mu[..., K : 2 * K]
    if penalty == "mean":
        soft_maximum = q.mean(-1)
    elif penalty == "policy_kl":
        soft_maximum = T * ((q / T.unsqueeze(-1)).logsumexp(-1) - math.log(K))
    elif log_mu is None:
        q = torch.cat([q, q_data.unsqueeze(-1)], dim=-1)
        soft_maximum = T * (q / T.unsqueeze(-1)).logsumexp(-1)
    else:
        soft_maximum = T * (q / T.unsqueeze(-1) - log_mu).logsumexp(-1)
    if penalty == "two_proposals":
        soft_maximum = soft_maximum - T * math.log(2 * K)
    gap = soft_maximum - q_data
    return gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)


def sampled_backward(gap_of: Callable, q: Tensor, resampling_offset: Tensor, k: int):
    """k of M actions per state and critic to differentiate gap_of(q) through.

    The gap's gradient is sum_m slope_m dQ_m, slope_m = d gap / d Q_m. Actions drawn in
    proportion to |slope_m| by systematic resampling (one offset, k equally spaced
    points of the cdf) estimate it without bias, whatever form gap_of has: a clamped
    gap, say, has no slopes. q [R, N, n, 1 + M], the data's action first, whose slope
    stays exact; resampling_offset [R, N, n]. Returns the gap [R, N, n], indices
    [R, N, n, k] of the M, and for Q of the data and of those k the slopes
    [R, N, n, 1 + k]."""
    gap, pull = torch.func.vjp(gap_of, q.detach())
    (slopes,) = pull(torch.ones_like(gap))
    slope_of_data = slopes[..., :1]
    slopes = slopes[..., 1:]
    cdf = slopes.abs().cumsum(-1)
    spacing = cdf[..., -1:] / k
    points = torch.arange(k, device=q.device) + resampling_offset.unsqueeze(-1)
    indices = torch.searchsorted(cdf, points * spacing, right=True)
    indices = indices.clamp(max=cdf.shape[-1] - 1)
    slopes = slopes.gather(-1, indices).sign() * spacing
    return gap.detach(), indices, torch.cat([slope_of_data, slopes], dim=-1)


def bounded_q(q: Tensor, mc_returns: Tensor, config: TrainConfig) -> Tensor:
    """Cal-QL (arXiv 2303.05479, section 5): Q [R, N, n, 1 + 3K] of the policy's
    proposals no lower than the return-to-go [R, n]; the data's and uniform actions' as
    they are."""
    free = 1 + config.cql_n_actions
    bounded = torch.maximum(q[..., free:], mc_returns[:, None, :, None])
    return torch.cat([q[..., :free], bounded], dim=-1)


def q_and_gap(critic: Critic, batch, samples, noise, sweep, config):
    """Q [R, N, B] of the data's actions; of the first n states, which are penalized, Q
    [R, N, n, 1 + 3K] of the data's action and the proposals, and the gap [R, N, n].
    They go through the critics in one call, with cql_backward_actions without a graph,
    and the few actions that are drawn in a second one, with it; the data's actions of
    states that are not penalized in a last one."""
    k = config.cql_backward_actions
    n = samples.proposals.shape[1]
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    log_mu = samples.log_mu.unsqueeze(1) if config.cql_importance_sample else None
    observations = batch.observations[:, :n]
    actions = torch.cat([batch.actions[:, :n].unsqueeze(2), samples.proposals], dim=2)

    def gap_of(q):
        if config.cal_ql:
            q = bounded_q(q, batch.mc_returns[:, :n], config)
        q_data = q[..., 0]
        q_proposals = q[..., 1:]
        return conservative_gap(q_proposals, log_mu, q_data, sweep.cql_temp, config)

    with torch.set_grad_enabled(k == 0):
        q = critic(observations, actions, dtype)  # [R, N, n, 1 + 3K]
    if k == 0:
        q_data = q[..., 0]
        gap = gap_of(q)
    else:
        offset = noise.resampling_offset
        gap, indices, slopes = sampled_backward(gap_of, q, offset, k)
        indices = F.pad(indices + 1, (1, 0)).unsqueeze(-1)  # [R, N, n, 1 + k, 1]
        actions = actions.unsqueeze(1).expand(-1, q.shape[1], -1, -1, -1)
        q_k = critic(observations, actions.take_along_dim(indices, 3), dtype)
        q_data = q_k[..., 0]
        surrogate = (slopes * q_k).sum(-1)  # has the gap's gradient, not its value
        gap = gap + surrogate - surrogate.detach()
    if n < batch.rewards.shape[1]:
        others = batch.observations[:, n:], batch.actions[:, n:].unsqueeze(2)
        q_data = torch.cat([q_data, critic(*others, dtype).squeeze(-1)], dim=-1)
    return q_data, q, gap


def penalized_td_loss(q_data, target, gap, log_alpha_prime, sweep, config):
    """TD error and weighted gap: CQL eq. 4 times 2, so cql_alpha is twice its alpha.
    With cql_lagrange (appendix F) also the loss of log alpha', whose alpha' grows while
    the gap exceeds its target. q_data [R, N, B], target [R, B], gap [R, N, n]: of n
    states of the batch, which estimate its mean without bias."""
    gap = gap.mean(-1)  # [R, N]
    td = (q_data - target.unsqueeze(1)).square().mean(-1)  # [R, N]
    weight = sweep.cql_alpha.unsqueeze(1)  # [R, 1]
    if config.cql_lagrange:
        multiplier = log_alpha_prime.exp().clamp(0.0, 1e6)  # [R]
        excess = gap - sweep.cql_target_action_gap.unsqueeze(1)
        multiplier_loss = -(multiplier.unsqueeze(1) * weight * excess.detach()).mean(1)
        penalty = weight * multiplier.detach().unsqueeze(1) * excess
    else:
        multiplier = multiplier_loss = gap.new_zeros(len(gap))
        penalty = weight * gap
    metrics = {
        "qf{j}_loss": td,
        "average_qf{j}": q_data.mean(-1),
        "cql_qf{j}_diff": gap,
        "cql_min_qf{j}_loss": penalty,
        "alpha_prime": multiplier,
        "alpha_prime_loss": multiplier_loss,
    }
    return (td + penalty).sum(1) + multiplier_loss, metrics


def critic_loss(
    critic: Critic, batch, samples, noise, target, log_alpha_prime, sweep, config
):
    """Of continuous actions; target [R, B], log_alpha_prime [R]. The logged Q is the
    penalty's: with cal_ql the bounded one, as CORL's."""
    q_data, q, gap = q_and_gap(critic, batch, samples, noise, sweep, config)
    loss, metrics = penalized_td_loss(
        q_data, target, gap, log_alpha_prime, sweep, config
    )
    q = q.detach()  # it has no graph anyway with cql_backward_actions
    if config.cal_ql:
        free = 1 + config.cql_n_actions
        bounds = batch.mc_returns[:, : q.shape[2]]  # [R, n]
        below = q[..., free:] < bounds[:, None, :, None]
        metrics["bound_rate"] = below.to(q.dtype).mean((1, 2, 3))
        q = bounded_q(q, bounds, config)
    uniform, current, following = q[..., 1:].chunk(3, dim=-1)  # [R, N, n, K] each
    metrics["cql_q{j}_rand"] = uniform.mean((2, 3))
    metrics["cql_q{j}_current_actions"] = current.mean((2, 3))
    metrics["cql_q{j}_next_actions"] = following.mean((2, 3))
    metrics["cql_std_q{j}"] = q.std(-1).mean(-1)
    return loss, metrics


def discrete_loss(critic, target_critic, batch, noise, log_alpha_prime, sweep, config):
    """Of discrete actions, on double DQN (arXiv 1509.06461): the critics' mean chooses
    the next action, the target critics' least values it. The gap is exact."""
    actions = batch.actions.long().unsqueeze(1)  # [R, 1, B, 1]
    q = critic(batch.observations)  # [R, N, B, A]
    q_data = q.take_along_dim(actions, -1).squeeze(-1)  # [R, N, B]
    with torch.no_grad():
        next_q = critic(batch.next_observations).mean(1, keepdim=True)
        best = next_q.argmax(-1, keepdim=True)  # [R, 1, B, 1]
        q_next = target_critic(batch.next_observations).take_along_dim(best, -1)
        q_next = least_of_targets(q_next, noise.subset_keys, config)  # [R, B, 1]
        q_next = q_next.squeeze(-1)
        target = batch.rewards + config.discount * (1 - batch.terminations) * q_next
    gap = conservative_gap(q, torch.zeros_like(q), q_data, sweep.cql_temp, config)
    loss, metrics = penalized_td_loss(
        q_data, target, gap, log_alpha_prime, sweep, config
    )
    metrics["average_target_q"] = q_next.mean(1)
    metrics["cql_std_q{j}"] = q.std(-1).mean(-1)
    metrics["cql_q{j}_rand"] = q.mean(-1).mean(-1)
    metrics["cql_q{j}_current_actions"] = q.amax(-1).mean(-1)
    return loss, metrics


def fitted_q_loss(agent, critic, target_critic, batch, bounds, config):
    """Of fitted Q evaluation (arXiv 1903.08738), of either kind of actions: the value of
    the agent's deterministic policy, [R]. No return lies outside the bounds. All critics
    have one target, of the target critics' mean (d3rlpy: their least)."""
    with torch.no_grad():
        actions = agent.best_actions(batch.next_observations)
        next_q = agent.q_of(target_critic, batch.next_observations, actions).mean(1)
        target = batch.rewards + config.discount * (1 - batch.terminations) * next_q
        bounded = target.clamp(*bounds)  # [R, B]
        clipped = (bounded != target).to(target.dtype).mean(1)
    q = agent.q_of(critic, batch.observations, batch.actions)  # [R, N, B]
    loss = (q - bounded.unsqueeze(1)).square().mean(-1)  # [R, N]
    metrics = {"fqe_loss{j}": loss, "fqe_q{j}": q.mean(-1), "clipped": clipped}
    return loss.sum(1), metrics


# ======================================================================================
# Agents
# ======================================================================================

# Every draw is a function of (stream, seed of the run, counter): nothing of it stands in
# a checkpoint, and what a run draws does not depend on who shares the device. The stream
# comes first, because SeedSequence takes [0, 1] and [0, 1, 0] for the same.
INIT, UPDATE, EXPLORE, RESET, EVALUATE, FQE = range(6)  # new ones at the end


def seed_from(numbers: List[int]) -> int:
    """The seed of a stream's draw, from [stream, seed, counter, ...]."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return int(state >> 1)


def generator_of(numbers: List[int], device="cpu") -> torch.Generator:
    """The generator of a stream's draw, from [stream, seed, counter, ...]."""
    return torch.Generator(device).manual_seed(seed_from(numbers))


class Agent(nn.Module):
    """What both agents share, for R runs at once: `update` learns from a Batch of raw
    observations and the environment's actions, `act` returns such actions. The
    state_dict holds all that training needs, optimizer and observation statistics
    included. `updates` counts; noise, bc_steps and target_update_period go by it.

    A subclass makes its networks in `build`, and has `draw_actions`, `unit_actions`,
    `forward`, its losses, `best_actions` and `choose`, `make_critic` and `q_of`."""

    stream = UPDATE  # of its noise

    def __init__(self, config: TrainConfig, task: Task, device="cpu", statistics=None):
        """statistics: mean and std [O] that standardize observations. Raises UserError
        for flags that are not for such actions."""
        super().__init__()
        self.config = config
        self.task = task
        self.device = torch.device(device)
        self.action_dim = len(task.action_low)
        self.column_sizes = {  # of a Batch's columns after [R, B]
            "observations": (task.observation_dim,),
            "next_observations": (task.observation_dim,),
            "actions": (self.action_dim,),
        }
        self.runs = product_of_runs(config)
        self.updates = 0
        policy_parameters, critic_parameters = self.build(
            [generator_of([INIT, x["seed"]]) for x in self.runs]
        )
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha_prime = nn.Parameter(torch.ones(len(self.runs)))
        if config.cql_lagrange:
            critic_parameters.append(self.log_alpha_prime)
        kind = torch.get_default_dtype()
        mean, std = statistics or (torch.zeros(self.column_sizes["observations"]), 1.0)
        constants = {"observation_mean": mean, "observation_std": std + 0 * mean}
        constants |= {"action_low": task.action_low, "action_high": task.action_high}
        for name, value in constants.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=kind))
        self.register_buffer("center", (self.action_high + self.action_low) / 2)
        self.to(device)
        sweep = {}
        for name in Sweep._fields:
            values = [run[name] for run in self.runs]
            sweep[name] = torch.tensor(values, dtype=kind, device=device)
        self.sweep = Sweep(**sweep)
        self.optimizer = self.make_optimizer(policy_parameters, critic_parameters)
        self.block = None
        self.block_noise = None  # see draw
        if config.compile:
            say("compiling the losses: the first update takes a minute or so")
            torch._dynamo.config.suppress_errors = True  # else as they are
            self.compile()

    def make_optimizer(self, actor: list, critic: list) -> torch.optim.Adam:
        """One Adam for all: it is elementwise, so neither runs nor networks mix. A
        network that sits an update out must have no gradient then (None): a zero one
        would move it. On a GPU a captured graph keeps the learning rates as they are; a
        schedule needs them as tensors, changed in place."""
        groups = [
            {"params": actor, "lr": self.config.policy_lr},
            {"params": critic, "lr": self.config.qf_lr},
        ]
        on_gpu = self.device.type == "cuda"
        compiled = on_gpu and self.config.compile
        optimizer = torch.optim.Adam(
            groups, fused=not compiled, foreach=compiled, capturable=on_gpu
        )
        if compiled:  # 11 microseconds on an H200; the fused one 82: its blocks are long
            bare = torch.optim.Adam.step.__wrapped__  # without the profiler's hook
            optimizer.step = torch.compile(functools.partial(bare, optimizer))
        for parameter in actor + critic:
            optimizer.state[parameter] = {  # now, so that loading only ever copies
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def draw(self, batch_size: int) -> Noise:
        """Noise of the next update; run r draws by its own seed alone. On a GPU a block
        of updates is drawn at once, to spare launches."""
        n = 32 if self.device.type == "cuda" else 1
        block, place = divmod(self.updates, n)
        if self.block != (block, batch_size):
            draws = []
            for run in self.runs:
                numbers = [self.stream, run["seed"], block]
                generator = generator_of(numbers, self.device)
                draws.append(self.draw_run((n, batch_size), generator))
            stacked = {}
            for name in draws[0]:
                stacked[name] = torch.stack([draw[name] for draw in draws], dim=1)
            self.block = (block, batch_size)
            self.block_noise = stacked
        return Noise(**{name: x[place] for name, x in self.block_noise.items()})

    def draw_run(self, shape: Tuple[int, int], generator) -> Dict[str, Tensor]:
        """One run's noise [updates, B, ...] of shape[0] updates, by Noise's names."""
        on = {"generator": generator, "device": self.device}
        draws = {"fractions": torch.rand(shape, dtype=torch.float64, **on)}
        draws |= self.draw_actions(shape, on)
        if self.config.n_target_critics is not None:
            draws["subset_keys"] = torch.rand((shape[0], self.config.n_critics), **on)
        return draws

    def prepare(self, batch: Batch) -> Batch:
        """With the R dimension, standardized observations and unit actions. Raises
        ValueError for other shapes, which might broadcast into a wrong answer."""
        if self.config.cal_ql and batch.mc_returns is None:
            raise ValueError("cal_ql needs a batch with mc_returns")
        kind = {"dtype": self.observation_mean.dtype, "device": self.device}
        n_runs = len(self.runs)
        shape = np.shape(batch.rewards)
        columns = {}
        for name, values in batch._asdict().items():
            if values is not None:
                values = torch.as_tensor(values, **kind)
                if len(shape) == 1:
                    values = values.unsqueeze(0)
                expected = (n_runs, shape[-1], *self.column_sizes.get(name, ()))
                if values.shape != expected:
                    what = f"{name} {tuple(values.shape)}, expected {expected}"
                    raise ValueError(f"a batch of {what}")
                columns[name] = values
        for name in ("observations", "next_observations"):
            columns[name] = self.standardize(columns[name])
        columns["actions"] = self.unit_actions(columns["actions"])
        return Batch(**columns)

    def standardize(self, observations) -> Tensor:
        """Raw observations [..., O] as the networks take them."""
        x = torch.as_tensor(observations).to(self.observation_mean)
        return (x - self.observation_mean) / self.observation_std

    def update(self, batch: Batch, noise: Optional[Noise] = None) -> Dict[str, Tensor]:
        """One step on every network, from a batch whose rows are in random order;
        returns metrics, each [R] (or [R, N] where the name holds {j}), on the device and
        without a sync. Every loss is of the parameters as they stand before the step.
        What else changes from one update to the next must be a tensor that is changed
        outside, in place: a captured graph freezes the rest."""
        if noise is None:
            noise = self.draw(np.shape(batch.rewards)[-1])
        cloning, target_step = self.stage()
        loss, metrics = self(self.prepare(batch), noise, cloning)
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        if target_step:
            targets = list(self.target_critic.parameters())
            critics = list(self.critic.parameters())
            with torch.no_grad():
                rate = self.config.soft_target_update_rate
                torch._foreach_lerp_(targets, critics, rate)
        self.updates += 1
        return {name: value.detach() for name, value in metrics.items()}

    def stage(self) -> Tuple[bool, bool]:
        """Whether the next update clones, and whether it moves the targets: all that the
        count of updates decides, so each stage has a graph of its own."""
        cloning = self.updates < self.config.bc_steps
        return cloning, (self.updates + 1) % self.config.target_update_period == 0

    @torch.inference_mode()
    def act(self, observations, normals: Optional[Tensor] = None) -> np.ndarray:
        """Environment actions [R, n, A] for raw observations [R, n, O]; without the
        leading dimensions (R = 1), actions without them. With standard normals
        [R, n, A] they are sampled from the policy, else its mode."""
        x = torch.as_tensor(observations, dtype=self.observation_mean.dtype)
        n_runs = x.shape[0] if x.ndim == 3 else 1
        if n_runs != len(self.runs) or x.shape[-1:] != self.column_sizes["observations"]:
            expected = f"{len(self.runs)} runs of {self.column_sizes['observations']}"
            raise ValueError(f"observations {tuple(x.shape)} for {expected}")
        rows = x.reshape(n_runs, -1, x.shape[-1]).to(self.device)
        actions = self.choose(rows, normals)
        return actions.reshape(*x.shape[:-1], self.action_dim).cpu().numpy()

    def get_extra_state(self) -> dict:
        moments = self.optimizer.state_dict()["state"]
        return {"updates": self.updates, "optimizer": moments}

    def set_extra_state(self, state: dict) -> None:
        """Copies into the live tensors; rebinding them would freeze what they feed. The
        best policies, of best.pt, come without an optimizer's."""
        self.updates = state["updates"]
        if state["optimizer"] is None:
            return
        live = self.optimizer.state_dict()["state"]
        if live.keys() != state["optimizer"].keys():
            raise ValueError("its optimizer trains other parameters")
        for index, tensors in state["optimizer"].items():
            for name, tensor in tensors.items():
                live[index][name].copy_(tensor)


class ContinuousCQL(Agent):
    """CQL on soft actor-critic; actions in [action_low, action_high], both [A]."""

    def build(self, generators: List[torch.Generator]) -> Tuple[list, list]:
        """Networks; the parameters that train at policy_lr and at qf_lr."""
        config = self.config
        n_runs = len(generators)
        sizes = n_runs, self.task.observation_dim, self.action_dim
        self.policy = Policy(config, *sizes)
        self.policy.initialize(generators, orthogonal=False)  # as CORL, always
        self.critic = self.make_critic(generators)
        self.log_alpha = nn.Parameter(torch.zeros(n_runs))
        actor = list(self.policy.parameters())
        if config.use_automatic_entropy_tuning:
            actor.append(self.log_alpha)
        return actor, list(self.critic.parameters())

    def make_critic(self, generators: List[torch.Generator]) -> Critic:
        sizes = self.task.observation_dim, self.action_dim
        critic = Critic(self.config, len(generators), *sizes)
        critic.initialize(generators, self.config.orthogonal_init)
        return critic

    def draw_actions(self, shape: Tuple[int, int], on: dict) -> Dict[str, Tensor]:
        config = self.config
        updates, B = shape
        n = min(config.cql_states or B, B)
        K = config.cql_n_actions
        A = self.action_dim
        T = K if config.cql_max_target_backup else 1
        draws = {
            "normals": torch.randn((updates, B, 1, A), **on),
            "next_normals": torch.randn((updates, B, T, A), **on),
            "proposal_normals": torch.randn((updates, n, 2 * K, A), **on),
            "uniforms": torch.rand((updates, n, K, A), **on) * 2 - 1,
        }
        if config.cql_backward_actions:
            sizes = (updates, config.n_critics, n)
            draws["resampling_offset"] = torch.rand(sizes, **on)
        return draws

    def unit_actions(self, actions: Tensor) -> Tensor:
        return (actions - self.center) / (self.action_high - self.center)

    def forward(self, batch: Batch, noise: Noise, cloning: bool):
        """All losses of a prepared batch at the present parameters, summed, [R]: no
        graph joins two of them, so one backward pass serves every network. With
        `cloning` the policy's is that of behaviour cloning."""
        config = self.config
        samples = sample_actions(self.policy, batch, noise)
        if config.use_automatic_entropy_tuning:
            alpha = config.alpha_multiplier * self.log_alpha.detach().exp()  # [R]
            target_entropy = -self.action_dim
            alpha_loss, metrics = temperature_loss(
                self.log_alpha, samples.log_pi, target_entropy
            )
        else:
            alpha = torch.full_like(self.log_alpha, config.alpha_multiplier)
            alpha_loss = torch.zeros_like(alpha)
            metrics = {"alpha_loss": alpha_loss}
        if cloning:
            policy_loss, more = cloning_loss(batch, samples, alpha)
        else:
            policy_loss, more = actor_loss(self.critic, batch, samples, alpha, config)
        metrics = {"alpha": alpha, **metrics, **more}
        target, more = td_target(
            self.target_critic, batch, samples, alpha, noise.subset_keys, config
        )
        metrics |= more
        q_loss, more = critic_loss(
            self.critic,
            batch,
            samples,
            noise,
            target,
            self.log_alpha_prime,
            self.sweep,
            config,
        )
        return alpha_loss + policy_loss + q_loss, metrics | more

    @torch.inference_mode()
    def q(self, observations, actions) -> Tensor:
        """Q [R, N, n] of raw observations [R, n, O] and the environment's actions
        [R, n, A]."""
        x = self.standardize(observations)
        actions = self.unit_actions(torch.as_tensor(actions).to(x))
        return self.q_of(self.critic, x, actions)

    def q_of(self, critic: Critic, observations: Tensor, actions: Tensor) -> Tensor:
        """Q [R, N, n] of standardized observations [R, n, O] and unit actions."""
        return critic(observations, actions.unsqueeze(2)).squeeze(3)

    def best_actions(self, observations: Tensor) -> Tensor:
        """The policy's mode, unit actions [R, n, A], at standardized observations."""
        mean, _ = self.policy(observations)
        return mean.tanh()

    def choose(self, observations: Tensor, normals: Optional[Tensor] = None) -> Tensor:
        """`act` on the device: raw [R, n, O] -> the environment's [R, n, A]."""
        x, log_std = self.policy(self.standardize(observations))
        if normals is not None:
            x = x + log_std.exp() * normals.to(x)
        actions = self.center + (self.action_high - self.center) * x.tanh()
        return actions.clamp(self.action_low, self.action_high)


class DiscreteCQL(Agent):
    """CQL on double DQN; actions are the integers from action_low to action_high, and
    act takes the one of highest mean Q over the critics."""

    def build(self, generators: List[torch.Generator]) -> Tuple[list, list]:
        """Networks; no parameters that train at policy_lr, and those at qf_lr."""
        for name in ("penalty", "cal_ql", "cql_states"):
            if getattr(self.config, name) != FIELDS[name].default:
                raise UserError(f"--{name}: not for discrete actions")
        self.critic = self.make_critic(generators)
        return [], list(self.critic.parameters())

    def make_critic(self, generators: List[torch.Generator]) -> DiscreteCritic:
        n_actions = int(self.task.action_high[0] - self.task.action_low[0]) + 1
        sizes = self.task.observation_dim, n_actions
        critic = DiscreteCritic(self.config, len(generators), *sizes)
        critic.initialize(generators, self.config.orthogonal_init)
        return critic

    def draw_actions(self, shape: Tuple[int, int], on: dict) -> Dict[str, Tensor]:
        return {}

    def unit_actions(self, actions: Tensor) -> Tensor:
        return actions - self.action_low

    def forward(self, batch: Batch, noise: Noise, cloning: bool):
        """The loss of a prepared batch at the present parameters, [R]; no policy clones
        here."""
        return discrete_loss(
            self.critic,
            self.target_critic,
            batch,
            noise,
            self.log_alpha_prime,
            self.sweep,
            self.config,
        )

    @torch.inference_mode()
    def q(self, observations, actions=None) -> Tensor:
        """Q [R, N, n, A] of every action at raw observations [R, n, O]; with the
        environment's actions [R, n, 1], theirs, [R, N, n]."""
        x = self.standardize(observations)
        if actions is None:
            return self.critic(x)
        return self.q_of(
            self.critic, x, self.unit_actions(torch.as_tensor(actions).to(x))
        )

    def q_of(self, critic: DiscreteCritic, observations: Tensor, actions: Tensor):
        """Q [R, N, n] of standardized observations [R, n, O] and actions [R, n, 1] that
        count from 0."""
        actions = actions.long().unsqueeze(1)
        return critic(observations).take_along_dim(actions, -1).squeeze(-1)

    def best_actions(self, observations: Tensor) -> Tensor:
        """The greedy actions [R, n, 1], from 0, at standardized observations."""
        return self.critic(observations).mean(1).argmax(-1, keepdim=True)

    def choose(self, observations: Tensor, normals: Optional[Tensor] = None) -> Tensor:
        """`act` on the device: raw [R, n, O] -> the environment's [R, n, 1]."""
        best = self.best_actions(self.standardize(observations))
        return best + self.action_low.long()


class FittedQ(Agent):
    """Fitted Q evaluation of a trained agent of either kind: critics of their own, with
    their target critics and optimizer, that learn from the data by `update`."""

    stream = FQE

    def __init__(self, agent: Agent, data: Dataset):
        self.judged = [agent]  # in a list: its parameters are not trained here
        self.bounds = -math.inf, math.inf
        discount = agent.config.discount
        if discount < 1:
            least = min(data.r_min, 0) / (1 - discount)
            top = torch.finfo(torch.float32).max
            self.bounds = max(least, -top), min(max(data.r_max, 0) / (1 - discount), top)
        statistics = agent.observation_mean, agent.observation_std
        super().__init__(agent.config, agent.task, agent.device, statistics)

    def build(self, generators: List[torch.Generator]) -> Tuple[list, list]:
        generators = [generator_of([INIT, run["seed"], 1]) for run in self.runs]
        self.critic = self.judged[0].make_critic(generators)
        return [], list(self.critic.parameters())

    def draw_actions(self, shape: Tuple[int, int], on: dict) -> Dict[str, Tensor]:
        return {}

    def unit_actions(self, actions: Tensor) -> Tensor:
        return self.judged[0].unit_actions(actions)

    def forward(self, batch: Batch, noise: Noise, cloning: bool):
        """The loss of a prepared batch at the present parameters, [R]."""
        return fitted_q_loss(
            self.judged[0],
            self.critic,
            self.target_critic,
            batch,
            self.bounds,
            self.config,
        )

    @torch.no_grad()
    def values(self, observations: Tensor) -> Tensor:
        """Q [R, N, n] of the policy's actions at raw observations [n, O]."""
        agent = self.judged[0]
        x = self.standardize(observations).expand(len(self.runs), -1, -1)
        return agent.q_of(self.critic, x, agent.best_actions(x))


def make_agent(config: TrainConfig, task: Task, device="cpu", statistics=None) -> Agent:
    """The agent of a task's action space. Raises UserError for flags not for it."""
    kind = DiscreteCQL if task.discrete else ContinuousCQL
    return kind(config, task, device, statistics)


class GraphedStep:
    """`step` by CUDA graphs, one a stage: hundreds of kernels in one launch. Nothing
    that Python counts or branches on inside changes once a graph is captured.

    A capture and its first two replays are done over again without the graph, from
    clones: if metrics or changes part, or a capture fails, training goes on without."""

    WARM_UP = 3  # CudaGraphModule captures at this call, and runs eagerly before
    CHECKED = WARM_UP + 2

    def __init__(self, step: Callable, agent: Agent, metrics: "Metrics"):
        import tensordict.nn  # takes a second, and warns on a CPU

        logging.getLogger("tensordict").setLevel("WARNING")
        self.make_graph = tensordict.nn.CudaGraphModule
        self.step = step
        self.agent = agent
        self.metrics = metrics
        self.graphs = {}
        self.calls = {}
        self.works = True

    def __call__(self, noise: Noise) -> None:
        stage = self.agent.stage()
        if stage not in self.graphs:
            self.graphs[stage] = self.make_graph(self.uncounted, warmup=self.WARM_UP)
            self.calls[stage] = 0
        self.calls[stage] += 1
        if not self.works:
            self.uncounted(noise)
        elif self.WARM_UP <= self.calls[stage] <= self.CHECKED:
            self.checked(self.graphs[stage], noise)
        else:
            self.graphs[stage](noise)
        self.agent.updates += 1

    def uncounted(self, noise: Noise) -> None:
        """`step` at the same count of updates, however often Python runs it: a capture
        runs it twice, a replay never."""
        updates = self.agent.updates
        try:
            self.step(noise)
        finally:
            self.agent.updates = updates

    def checked(self, graph: Callable, noise: Noise) -> None:
        """One update by the graph, and from the same state again without. The metrics,
        which are of before the step, and what the step changed must agree."""
        tensors = self.live_tensors()
        # Detached: what holds a graph of the parameters ties them to a stream, and a
        # capture may not touch the default one.
        before = [tensor.detach().clone() for tensor in tensors]
        sums = self.metrics.sums.clone()
        problem = ""
        try:
            graph(noise)
        except (RuntimeError, ValueError) as error:
            problem = brief(error)
        replayed = [tensor.detach().clone() for tensor in tensors]
        replayed_metrics = self.metrics.sums - sums
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
        self.uncounted(noise)
        metrics = self.metrics.sums - sums
        same = torch.allclose(replayed_metrics, metrics, rtol=1e-3, equal_nan=True)
        for old, tensor, value in zip(before, tensors, replayed):
            change = (tensor - old).norm()
            if (tensor - value).norm() > 0.1 * change + 1e-6:
                same = False
        if not problem and not same:
            problem = "its first replays differ from plain updates"
        if problem:
            self.works = False
            say(f"no CUDA graph, each kernel is launched by itself: {problem}")

    def live_tensors(self) -> List[Tensor]:
        """All that an update changes."""
        tensors = [*self.agent.parameters(), *self.agent.buffers()]
        tensors += [self.metrics.sums, self.metrics.count]
        for state in self.agent.optimizer.state.values():
            tensors += state.values()
        return tensors


# ======================================================================================
# Environments: evaluation and the online phase
# ======================================================================================


def make_env(config: TrainConfig, task: Optional[Task] = None) -> gym.Env:
    """The task's environment by its registered id, or `eval_env`; observations flat.
    If that names the recorded one, with the recorded settings and limit.

    A recorded id is data, so it cannot name a module to import; `eval_env` is the
    user's own word and may. Raises UserError."""
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
        where = f"environment {name} cannot be made (--eval_env none trains without"
        where += " it, --eval_env module:ID takes yours)"
    with errors_as(UserError, where), quiet():
        if ":" in name:
            sys.path.append(os.getcwd())  # where the user's module may be
        elif name not in gym.registry:
            import gymnasium_robotics  # slow to import, and rarely needed

            gym.register_envs(gymnasium_robotics)
        env = gym.make(name, disable_env_checker=True, **settings)
        if env.spec.max_episode_steps is None:  # it might never end
            env = gym.wrappers.TimeLimit(env, task.longest if task else 1000)
        space = env.observation_space
        check_observation_space(space)
        if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
            return env
        if task and not isinstance(space, gym.spaces.Box):
            space = recorded_space(task.observation_space)  # parts by names, in order
        gym.spaces.flatten(space, env.observation_space.sample())
        flat = functools.partial(gym.spaces.flatten, space)
        flat_space = gym.spaces.flatten_space(space)
        return gym.wrappers.TransformObservation(env, flat, flat_space)


def check_match(task: Task, env: gym.Env, name: str) -> None:
    """Raise UserError unless the environment is of the data's sizes and bounds."""
    here = make_task(env.observation_space, env.action_space)
    same = here.observation_dim == task.observation_dim
    for field_name in ("action_low", "action_high", "discrete"):
        same = same and getattr(here, field_name) == getattr(task, field_name)
    if not same:
        what = (
            f"{here.observation_dim} observations and actions {describe_actions(here)}"
        )
        data = f"the data's {task.observation_dim} and {describe_actions(task)}"
        raise UserError(f"--eval_env {name}: {what} do not match {data}")


def describe_actions(task: Task) -> str:
    """As "3 in [-1, 1]" or "2 discrete, 0 and 1"."""
    low = min(task.action_low)
    high = max(task.action_high)
    if task.discrete:
        n = int(high - low) + 1
        between = "and" if n == 2 else "to"
        return f"{n} discrete, {low:g} {between} {high:g}"
    return f"{len(task.action_low)} in [{low:g}, {high:g}]"


def reference_returns(task: Task, name: str) -> Tuple[Optional[List[float]], str]:
    """Returns scored 0 and 100, and whose they are: the dataset's own, else D4RL's by
    environment, unless its settings pay other returns than D4RL's."""
    recorded = name == task.env_id
    if task.reference is not None and (recorded or task.env_id is None):
        return task.reference, "scored by the data's reference returns"
    settings = task.env_kwargs if recorded else {}
    continuing = "AntMaze" in name and settings.get("continuing_task", True)
    if continuing or not settings.get("remove_task_when_completed", True):
        return None, "not scored: its settings pay other returns than D4RL's references"
    for prefix, reference in REFERENCE_RETURNS.items():
        if name.startswith(prefix):
            return list(reference), "scored by D4RL's returns, as the data records none"
    if task.reference is not None:
        return task.reference, f"scored by the data's returns, which are {task.env_id}'s"
    return None, "not scored: no reference returns are known"


def normalized_score(mean_return: float, reference: Optional[List[float]]) -> float:
    """100 * (mean return - low) / (high - low), as D4RL; NaN without a reference."""
    low, high = reference or (math.nan, math.nan)
    return 100 * (mean_return - low) / (high - low)


class Player:
    """An environment and the episode in progress in it."""

    def __init__(self, env: gym.Env):
        self.env = env
        self.over = True

    def reset(self, seed: int) -> None:
        self.observation, _ = self.env.reset(seed=seed)
        self.rewards = []
        self.over = False
        self.success = None  # null until the environment tells of it

    def step(self, action: np.ndarray) -> None:
        """One step; an action as the environment takes it."""
        self.observation, reward, ended, cut, info = self.env.step(action)
        self.rewards.append(float(reward))
        self.terminated = ended
        self.over = ended or cut
        told = info.get("success", info.get("is_success"))
        if told is not None:
            self.success = bool(told or self.success)


class Evaluator:
    """Deterministic episodes of every live run's policy, side by side."""

    def __init__(self, config: TrainConfig, task: Task, probe: gym.Env):
        """`probe`, made to read its spaces, is the first environment; the others are
        made when they are needed. Raises UserError where it does not fit the task."""
        self.config = config
        self.task = task
        self.name = (config.eval_env or task.env_id).rpartition(":")[2]
        check_match(task, probe, self.name)
        self.players = [Player(probe)]
        self.limited = False
        self.reference, self.whose = reference_returns(task, self.name)

    def describe(self) -> str:
        """The opening line: environment, settings, time limit, reference."""
        env = self.players[0].env
        limit = env.get_wrapper_attr("_max_episode_steps")
        settings = ""
        if env.spec.kwargs:
            settings = f" with {brief(env.spec.kwargs)}"
        return (
            f"evaluation: {self.name}{settings}, {limit:,} steps at most, {self.whose}"
        )

    def make_players(self, n: int) -> None:
        """Up to n environments; where only some can be made, episodes run in turn."""
        while len(self.players) < n and not self.limited:
            try:
                self.players.append(Player(make_env(self.config, self.task)))
            except UserError as error:
                self.limited = True
                say(f"evaluation in {len(self.players)} at a time, as a further {error}")

    def episodes(self, agent: Agent, step: int, alive: List[int], stop: list):
        """Return, length, success (null: not told of any) and discounted return of each
        episode of each live run; None if a signal stops it. Episode i of a run starts
        from the run's seed, so runs that differ in cql_alpha alone are paired."""
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
                player = playing[r, i] = idle.pop(0)
                numbers = [self.config.eval_seed, agent.runs[r]["seed"], step, i]
                player.reset(seed_from([EVALUATE] + numbers))
                observations[r, i] = player.observation
            actions = self.task.to_environment(agent.act(observations))
            for place, player in list(playing.items()):
                player.step(actions[place[0] * n + place[1]])
                observations[place] = player.observation
                if player.over:
                    rewards = player.rewards
                    discounted = discounted_sum(rewards, self.config.discount)
                    results[place] = (
                        sum(rewards),
                        len(rewards),
                        player.success,
                        discounted,
                    )
                    idle.append(playing.pop(place))
        return results

    def evaluate(self, agent: Agent, step: int, alive: List[int], stop: list):
        """A row of evaluations.csv for each live run; None if a signal stops it. Raises
        MachineError."""
        with errors_as(MachineError, f"{self.name} failed at update {step}"):
            results = self.episodes(agent, step, alive, stop)
        if results is None:
            return None
        rows = {}
        n = self.config.n_episodes
        told = any(success is not None for _, _, success, _ in results.values())
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
                "success_rate": successes.count(True) / n if told else math.nan,
                "discounted_return_mean": float(np.mean(discounted)),
            }
        return rows


class Online:
    """The online phase: an environment for each run, whose every step enters the replay
    at once. What the returns of its episodes were is told in metrics.csv."""

    def __init__(self, config: TrainConfig, task: Task, agent: Agent, replay: Replay):
        """Raises UserError where the environments cannot be made."""
        n = len(agent.runs)
        self.config = config
        self.task = task
        self.agent = agent
        self.replay = replay
        self.players = [Player(make_env(config, task)) for _ in range(n)]
        self.begun = [0] * n  # episodes
        self.told = False  # whether success was ever told of
        self.finished = [[] for _ in range(n)]  # episodes since a row: return, success

    def step(self, alive: List[int], step: int) -> None:
        """One environment step of every live run. Raises MachineError."""
        if self.config.cql_alpha_online is not None:
            self.agent.sweep.cql_alpha.fill_(self.config.cql_alpha_online)
        with errors_as(MachineError, f"the environment failed at step {step}"):
            for r in alive:
                if self.players[r].over:
                    seed = [RESET, self.agent.runs[r]["seed"], self.begun[r]]
                    self.players[r].reset(seed_from(seed))
                    self.begun[r] += 1
            actions = self.act(alive, step)  # [R, A]
            alive = [r for r in alive if np.isfinite(actions[r]).all()]
            players = [self.players[r] for r in alive]
            before = [player.observation for player in players]
            taken = self.task.to_environment(actions)
            for r, player in zip(alive, players):
                player.step(taken[r])
        transitions = Batch(
            observations=np.array(before),
            actions=actions[alive],
            rewards=np.array([player.rewards[-1] for player in players]),
            next_observations=np.array([player.observation for player in players]),
            terminations=np.array([player.terminated for player in players]),
        )
        if alive:  # else all have diverged, as the next row tells
            self.replay.add(alive, transitions)
        for r, player in zip(alive, players):
            self.told = self.told or player.success is not None
            if player.over:
                self.replay.end_episode(r, player.rewards)
                success = float(player.success or False)
                self.finished[r].append((sum(player.rewards), success))

    def act(self, alive: List[int], step: int) -> np.ndarray:
        """Actions [R, A]: sampled from the policy; discrete ones the best, but for a
        share of exploration_epsilon; uniform while there is no batch."""
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
        """Actions [R, A] of uniform numbers in [0, 1)."""
        low, high = np.array([self.task.action_low, self.task.action_high])
        if self.task.discrete:
            return low + np.floor(uniforms * (high - low + 1))
        return (low + (high - low) * uniforms).astype(np.float32)

    def metrics(self, r: int, reset: bool) -> Dict[str, float]:
        """Means of the episodes that ended since the last row."""
        mean = rate = math.nan
        if self.finished[r]:
            mean, rate = np.mean(self.finished[r], axis=0).tolist()
        if reset:
            self.finished[r] = []
        return {"train_return": mean, "train_success": rate if self.told else math.nan}

    def state(self) -> dict:
        state = {"replay": self.replay.state()}
        for name in ("begun", "told", "finished"):
            state[name] = getattr(self, name)
        return state

    def load(self, state: dict) -> None:
        """Episodes that were in progress are begun anew."""
        self.begun = state["begun"]
        self.told = state["told"]
        self.finished = state["finished"]
        self.replay.load(state["replay"])


# ======================================================================================
# Logging and checkpoints
# ======================================================================================

VERSION = 6  # of the checkpoint's layout; those before the redesign are 4 and less


class Table:
    """A CSV file that only grows, but for what a resumed run will write again."""

    def __init__(self, directory: Optional[Path], name: str, last: float):
        """Of a file that is there, rows of steps up to `last` are kept."""
        self.path = directory / name if directory else None
        self.names = []
        self.kept = []
        if self.path and self.path.exists():
            self.kept = self.read(last)
            self.rewrite(self.kept)

    def read(self, last: float) -> List[dict]:
        """The rows of steps up to `last`, but for a torn one."""
        with open(self.path, newline="") as file:
            rows = list(csv.DictReader(file))
        whole = [row for row in rows if None not in row.values()]
        return [row for row in whole if int(row["step"]) <= last]

    def rewrite(self, rows: List[dict], new_names=()) -> None:
        """Replace the file by these rows, with new columns."""
        self.names = list(rows[0]) + list(new_names) if rows else []
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as file:
            self.write(file, rows)
        os.replace(temporary, self.path)

    def write(self, file, rows: List[dict]) -> None:
        """Floats with 8 digits, NaN as nothing."""
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
        """Write rows through to the disk. Raises MachineError."""
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
    """Each run's parameters at its best evaluation by return, which best.pt holds."""

    def __init__(self, agent: Agent):
        self.steps = [-1] * len(agent.runs)  # -1: not evaluated yet
        self.returns = [-math.inf] * len(agent.runs)
        self.weights = {}
        for name, parameter in agent.named_parameters():
            self.weights[name] = parameter.detach().clone()

    def update(self, agent: Agent, step: int, rows: Dict[int, dict]) -> None:
        """Take over what is better; rows: an evaluation's, by run."""
        for r, row in rows.items():
            if row["return_mean"] > self.returns[r]:
                self.steps[r] = step
                self.returns[r] = row["return_mean"]
                for name, parameter in agent.named_parameters():
                    self.weights[name][r] = parameter.detach()[r]

    def load(self, state: dict) -> None:
        self.steps = state["steps"]
        self.returns = state["returns"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])


class Metrics:
    """Means over an interval: sums on the device, which cross to the host when a row is
    due, not before. All in place, as a captured graph requires."""

    def __init__(self, device="cpu"):
        self.names = []
        self.sums = None  # [R, columns]
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, metrics: Dict[str, Tensor]) -> None:
        """Metrics [R], or [R, N] under a name with {j}, one for each critic."""
        names = []
        columns = []
        for name, values in metrics.items():
            if values.ndim == 1:
                values = values.unsqueeze(1)
            columns.append(values)
            for j in range(1, 1 + values.shape[1]):
                names.append(name.replace("{j}", str(j)))
        values = torch.cat(columns, dim=1)
        if names != self.names:  # the first, or a fork's that the checkpoint lacks
            self.names = names
            self.sums = torch.zeros_like(values, dtype=torch.float64)
            self.count.zero_()
        self.sums += values
        self.count += 1

    def means(self) -> List[Dict[str, float]]:
        """One dictionary per run; none before the first update."""
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
    """One wandb run per stacked run; under a sweep agent, which has already chosen an
    id, one for them all. Should wandb fail, training goes on."""

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
        if directory is None or mode == "disabled":
            return
        with self.dispensable():
            if mode == "online" and not self.sweep:
                with quiet():
                    known = wandb.login(prompt=False)
                if not known:
                    return say("wandb: no account here (`wandb login`), not logging")
            for run, key in zip(runs, self.ids):
                several = len(runs) > 1
                tracker = wandb.init(
                    project=config.project,
                    group=config.group,
                    name=f"{directory.name}-{run['run']}" if several else directory.name,
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
        """rows: the metrics of each live run; what is not a number is left out."""
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
        with self.dispensable():
            for tracker in self.trackers:
                tracker.finish()

    @contextmanager
    def dispensable(self):
        try:
            yield
        except Exception as error:
            self.trackers = []
            say(f"wandb: {brief(error)}; not logging to it")


def save_checkpoint(path: Path, payload: dict) -> None:
    """Replace path atomically; if that fails the old file stays. Raises MachineError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns the former into the latter
        temporary.unlink(missing_ok=True)
        while error.__context__:
            error = error.__context__
        reason = brief(error)
        if path.exists():
            reason += "; the checkpoint before it is intact"
        raise MachineError(f"could not save {path}: {reason}") from None


def read_checkpoint(path: Union[str, Path]) -> dict:
    """A checkpoint, or a run directory's, as tensors and plain values; no code in it
    runs. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    where = f"checkpoint {path}"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None  # torch checks no checksums
            for entry in archive.infolist():
                if entry.external_attr:  # a directory to torch, which holds no tensor
                    damaged = True
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read: {brief(error)}") from None
    except Exception:  # torch's own words advise to let it run code
        raise UserError(f"{where}: damaged, or not one of cql.py's") from None
    if damaged or not isinstance(payload, dict) or payload.get("format") != "cql.py":
        raise UserError(f"{where}: damaged, or not one of cql.py's")
    with errors_as(UserError, f"{where}: garbled"):
        foreign = set(payload["config"]) - set(FIELDS)
        if foreign or payload["version"] != VERSION:
            what = "of another cql.py: of before its redesign, or a fork"
            hint = "take it up with the cql.py that lies beside it"
            raise UserError(f"{where}: {what}; {hint}")
        payload["config"] = asdict(make_config(payload["config"], f"{where}: "))
        payload["task"] = pyrallis.decode(Task, payload["task"])
    payload["path"] = str(path)
    return payload


def load_agent(agent: Agent, checkpoint: dict) -> None:
    """Copy a checkpoint's state into the agent. Raises UserError."""
    where = f"checkpoint {checkpoint['path']}"
    old = checkpoint["task"]
    new = agent.task
    if (old.action_low, old.action_high) != (new.action_low, new.action_high):
        bounds = f"{describe_actions(old)}, here {describe_actions(new)}"
        raise UserError(f"{where}: its actions are {bounds}")
    n_runs = len(product_of_runs(TrainConfig(**checkpoint["config"])))
    if n_runs != len(agent.runs):
        raise UserError(f"{where}: holds {n_runs} runs, not {len(agent.runs)}")
    with errors_as(UserError, f"{where}: does not fit"):
        agent.load_state_dict(checkpoint["agent"])


class QValues(NamedTuple):
    """Q of an observation's action, or of each discrete one, [...]: a discounted sum of
    rewards as they were trained on (reward_scale, reward_bias, normalize_reward)."""

    least: np.ndarray  # [...] of the critics, as targets have it
    mean: np.ndarray  # [...]
    each: np.ndarray  # [N, ...]


class TrainedPolicy:
    """One run's policy for use, by load_policy. An observation is raw, [O], or several
    [n, O], or the environment's dictionary or tuple."""

    def __init__(self, agent: Agent, run: int):
        self.agent = agent
        self.task = agent.task
        self.run = run
        self.space = recorded_space(self.task.observation_space)
        self.generator = generator_of([EXPLORE, agent.runs[run]["seed"]])

    def __call__(self, observation, deterministic: bool = True) -> np.ndarray:
        """The environment's action, or several; else sampled from the policy."""
        x, one = self.rows(observation)
        normals = None
        if not deterministic:
            size = (*x.shape[:2], self.agent.action_dim)
            normals = torch.randn(size, generator=self.generator)
        actions = self.task.to_environment(self.agent.act(x, normals)[self.run])
        return actions[0] if one else actions

    def q(self, observation, action=None) -> QValues:
        """What the critics think of the environment's action; without one, of every
        discrete action."""
        x, one = self.rows(observation)
        if action is None and not self.task.discrete:
            raise ValueError("continuous actions: of which one?")
        if action is not None:
            action = np.reshape(action, (1, x.shape[1], self.agent.action_dim))
            low, high = self.task.action_low, self.task.action_high
            known = (action >= low) & (action <= high) & (action % 1 == 0)
            if self.task.discrete and not known.all():
                raise ValueError(f"actions are {describe_actions(self.task)}")
            action = np.repeat(action, len(x), axis=0)
        each = self.agent.q(x, action)[self.run].cpu().numpy()
        if one:
            each = each[:, 0]
        return QValues(each.min(axis=0), each.mean(axis=0), each)

    def rows(self, observation) -> Tuple[np.ndarray, bool]:
        """Observations for every run, [R, n, O], and whether it is but one."""
        structured = isinstance(observation, (dict, tuple))
        if structured or np.shape(observation) == self.space.shape:  # a matrix, maybe
            observation = gym.spaces.flatten(self.space, observation)
        one = np.ndim(observation) == 1
        return np.stack([np.atleast_2d(observation)] * len(self.agent.runs)), one


def load_policy(
    path: Union[str, Path], run: int = 0, device: str = "cpu"
) -> TrainedPolicy:
    """A checkpoint's policy, a function of observations. Raises UserError."""
    checkpoint = read_checkpoint(path)
    agent = make_agent(TrainConfig(**checkpoint["config"]), checkpoint["task"], device)
    load_agent(agent, checkpoint)
    n_runs = len(agent.runs)
    if run not in range(n_runs):
        raise UserError(f"checkpoint {path}: holds runs 0 to {n_runs - 1}, no {run}")
    if checkpoint["diverged"][run] >= 0:
        what = f"run {run} diverged"
        for kept in Path(checkpoint["path"]).parent.glob(f"run{run}_before_*.pt"):
            what += f"; {kept.name} is of before"
        raise UserError(f"checkpoint {path}: {what}")
    return TrainedPolicy(agent, run)


def run_directory(config: TrainConfig) -> Optional[Path]:
    """The run's directory: `resume`'s, or a new one under checkpoints_path."""
    if config.resume:
        return Path(config.resume)
    if config.checkpoints_path is None:
        return None
    names = config.eval_env if config.env is None else config.env
    if not isinstance(names, list):
        names = [names]
    label = "+".join([config.name] + [name.removesuffix(".hdf5") for name in names])
    safe = re.sub(r"[^\w.+-]+", "-", label).strip(".-")[:120]
    return Path(config.checkpoints_path) / f"{safe}-{uuid.uuid4().hex[:8]}"


def lock_directory(directory: Path) -> filelock.BaseFileLock:
    """Hold a run's directory while this process lives. Raises UserError."""
    lock = filelock.FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{directory}: in use by another live process") from None
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {brief(error)}") from None
    return lock


@contextmanager
def stop_signals():
    """The SIGINTs and SIGTERMs so far; the loop saves and stops at its next update. A
    Ctrl-C after the first is not held back."""
    stop = []
    previous = {}

    def note(number, _):
        stop.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    if threading.current_thread() is threading.main_thread():
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
    """What a training leaves behind: tables, checkpoints, wandb, lines."""

    CHECKPOINT_SECONDS = 300

    def __init__(self, config, agent, data, evaluator, online, directory, lock):
        self.config = config
        self.agent = agent
        self.data = data
        self.evaluator = evaluator
        self.online = online
        self.directory = directory
        self.lock = lock
        self.offline = config.max_timesteps
        self.total = config.max_timesteps + config.online_iterations
        self.metrics = Metrics(agent.device)
        self.best = Best(agent)
        self.best_before = None  # an evaluation that a longer run does not have
        self.fitted = None  # of fitted Q evaluation
        self.fitted_metrics = Metrics(agent.device)
        self.step = 0  # updates offline, environment steps online
        self.logged = self.evaluated = -1  # steps of the last rows
        self.diverged = [-1] * len(agent.runs)  # step by which a run went non-finite
        self.warned = [False] * len(agent.runs)  # of Q running away
        self.started = self.saved_at = self.logged_at = time.monotonic()
        self.seconds = {"evaluation_seconds": 0.0, "checkpoint_seconds": 0.0}
        self.wandb = None

    def open(self, checkpoint: Optional[dict]) -> None:
        """Take up a resumed run's state, or start anew; then write the first files."""
        ids = []
        config = self.config
        directory = self.directory
        if directory is not None:
            self.lock = self.lock or lock_directory(directory)
            if checkpoint is None and (directory / "checkpoint.pt").exists():
                raise UserError(f"{directory}: begun by another process meanwhile")
        garbled = LookupError, RuntimeError, TypeError, ValueError
        with errors_as(UserError, f"{directory}: no run to go on with", garbled):
            if checkpoint is not None:
                self.take_up(checkpoint)
                ids = checkpoint["wandb_ids"]
            self.metrics_table = Table(directory, "metrics.csv", self.logged)
            self.timing_table = Table(directory, "timing.csv", self.logged)
            self.evaluations_table = Table(directory, "evaluations.csv", self.evaluated)
            updates = self.fitted.updates if self.fitted else -1
            if updates % config.eval_freq and updates < config.fqe_updates:
                updates -= 1  # made longer: as above
            self.fqe_table = Table(directory, "fqe.csv", updates)
        self.evaluations = self.evaluations_table.kept
        self.values = self.fqe_table.kept
        self.logged_updates = self.agent.updates
        if directory is not None:
            text = yaml.safe_dump({**asdict(config), "resume": None}, sort_keys=False)
            (directory / "config.tmp").write_text(text)
            os.replace(directory / "config.tmp", directory / "config.yaml")
            if Path(__file__).resolve() != (directory / "cql.py").resolve():
                shutil.copyfile(__file__, directory / "cql.py")
        self.wandb = WandbLogger(config, directory, self.agent.runs, ids)
        runs = f"{len(self.agent.runs)} run(s) on {self.agent.device}"
        steps = f"updates {self.step:,} to {self.total:,}"
        if self.online:
            steps += f", online after {self.offline:,}"
        say(f"training {runs}, {steps}, in {directory or 'no directory'}")
        if checkpoint is not None:  # best.pt may lack what a kill came before
            self.save_best(self.payload())

    def take_up(self, checkpoint: dict) -> None:
        """The state of a run to go on with, but for its agent's."""
        before = checkpoint["config"]
        self.step = checkpoint["step"]
        self.logged = checkpoint["logged"]
        self.evaluated = checkpoint["evaluated"]
        self.diverged = checkpoint["diverged"]
        self.warned = checkpoint["warned"]
        self.metrics.load(checkpoint["metrics"])
        state = checkpoint["fqe"]
        if state is not None and self.step == self.total and self.data is not None:
            self.fitted = FittedQ(self.agent, self.data)
            self.fitted.load_state_dict(state["agent"])
            self.fitted_metrics.load(state["metrics"])
        if self.online and checkpoint["online"]:
            self.online.load(checkpoint["online"])
        # A run that is made longer writes the last rows again if they stood between two
        # regular ones.
        if self.logged % before["log_freq"] and self.logged < self.total:
            self.logged -= 1
        regular = self.evaluated > 0 and self.evaluated % before["eval_freq"] == 0
        best = checkpoint["best"]
        if not regular and self.evaluated not in (self.offline, self.total):
            self.evaluated -= 1
            best = checkpoint["best_before"] or best
        else:
            self.best_before = checkpoint["best_before"]
        self.best.load(best)

    def alive(self) -> List[int]:
        """The runs that have not diverged."""
        return [r for r, step in enumerate(self.diverged) if step < 0]

    def check_finite(self) -> Dict[int, Dict[str, float]]:
        """Metric means of the live runs; one in which a mean or a weight is not finite
        stops, and what it was at the last checkpoint is kept."""
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
                say(f"{what}: {', '.join(broken[:4])} not finite")
                self.keep_checkpoint(f"run{r}_before_{self.step}.pt")
        return rows

    def keep_checkpoint(self, name: str) -> None:
        """A copy of the last checkpoint, in which a run that diverged was finite."""
        path = self.directory and self.directory / "checkpoint.pt"
        if path and path.exists():
            with errors_as(MachineError, f"could not write {name}", OSError):
                shutil.copyfile(path, self.directory / name)

    def log(self) -> None:
        """A row of metrics.csv per live run: means since the last regular one."""
        regular = self.step % self.config.log_freq == 0
        rows = self.check_finite()
        table = []
        for r, row in rows.items():
            if self.online:
                row.update(self.online.metrics(r, reset=regular))
            table.append({"step": self.step, "run": r, **row})
            if self.step <= self.offline:  # online, rewards unlike the data's may come
                self.warn_of_drift(r, row)
        self.metrics_table.append(table)
        self.wandb.log(self.step, rows)
        now = time.monotonic()
        updates = self.agent.updates
        rate = (updates - self.logged_updates) / max(now - self.logged_at, 1e-9)
        timing = {"seconds": now - self.started, "updates_per_s": rate, **self.seconds}
        self.timing_table.append([{"step": self.step, **timing}])
        self.logged = self.step
        self.logged_at = now
        self.logged_updates = updates
        if regular:
            self.metrics.reset()

    def warn_of_drift(self, r: int, means: Dict[str, float]) -> None:
        """Say once when Q exceeds what the data's rewards allow. With the entropy in the
        target, they set no bound."""
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
            here = f"{policy:.4g} for the policy's actions, {data:.4g} for the data's"
            allowed = f"rewards allow {low:.4g} to {high:.4g}"
            say(f"run {r}: Q runs away: {here}, and {allowed}")
            say("  Poor returns follow; a larger cql_alpha holds Q down")

    def checkpoint_due(self) -> bool:
        """Whether one is to be kept, or the last one is too long ago."""
        often = self.config.checkpoint_freq
        kept = often > 0 and self.step % often == 0
        return kept or time.monotonic() - self.saved_at > self.CHECKPOINT_SECONDS

    def evaluation_due(self) -> bool:
        """Whether the present step's evaluation is still to come."""
        regular = self.step > 0 and self.step % self.config.eval_freq == 0
        due = regular or self.step in (self.offline, self.total)
        return due and self.evaluated != self.step

    def evaluate(self, stop: list) -> None:
        """Rows of evaluations.csv, a line on the terminal, and a checkpoint."""
        before = time.monotonic()
        self.check_finite()
        alive = self.alive()
        rows = {}
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
        self.best_before = None
        if self.step % self.config.eval_freq or self.step == 0:
            self.best_before = copy.deepcopy(vars(self.best))
        self.best.update(self.agent, self.step, rows)
        self.wandb.log(self.step, rows)
        if table:
            self.say_evaluation(table)
        self.checkpoint()

    def say_evaluation(self, table: List[dict]) -> None:
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
        """What a checkpoint holds."""
        return {
            "format": "cql.py",
            "version": VERSION,
            "config": asdict(self.config),
            "task": asdict(self.agent.task),
            "fingerprint": self.data.fingerprint if self.data else None,
            "agent": self.agent.state_dict(),
            "online": self.online.state() if self.online else None,
            "metrics": self.metrics.state(),
            "best": vars(self.best),
            "best_before": self.best_before,
            "fqe": self.fitted_state(),
            "wandb_ids": self.wandb.ids,
            "step": self.step,
            "logged": self.logged,
            "evaluated": self.evaluated,
            "diverged": self.diverged,
            "warned": self.warned,
        }

    def checkpoint(self) -> None:
        """Write checkpoint.pt; when no run is left alive the file stays as it is."""
        before = time.monotonic()
        self.check_finite()
        if self.directory is None or not self.alive():
            return
        payload = self.payload()
        often = self.config.checkpoint_freq
        if often and self.step % often == 0 and self.step and not self.fitted:
            save_checkpoint(self.directory / f"checkpoint_{self.step}.pt", payload)
        save_checkpoint(self.directory / "checkpoint.pt", payload)
        self.save_best(payload)
        self.saved_at = time.monotonic()
        self.seconds["checkpoint_seconds"] += self.saved_at - before

    def fitted_state(self) -> Optional[dict]:
        if self.fitted is None:
            return None
        metrics = self.fitted_metrics.state()
        return {"agent": self.fitted.state_dict(), "metrics": metrics}

    def log_values(self) -> None:
        """A row of fqe.csv per live run: the value of its policy at the episodes' first
        observations, mean and standard errors over episodes and over critics."""
        data = self.data
        config = self.config
        fitted = self.fitted
        q = fitted.values(data.first_observations()).double()  # [R, N, episodes]
        means = self.fitted_metrics.means()
        factor = data.reward_factor * config.reward_scale
        own = math.nan
        if config.reward_bias == 0 and factor != 0:
            own = 1 / factor  # the data's rewards
        in_data = data.discounted_return(config.discount)
        table = []
        for r in self.alive():
            value = q[r].mean().item()
            n_critics, n_episodes = q[r].shape
            error = q[r].mean(0).std().item() / math.sqrt(n_episodes)
            error_critics = q[r].mean(1).std().item() / math.sqrt(n_critics)
            row = {
                "value": value,
                "value_error": error,
                "value_error_critics": error_critics,  # blank for one critic
                "discounted_return": own * value,
                "discounted_return_error": abs(own) * error,
                "data_value": in_data,
                "data_discounted_return": own * in_data,
                **means[r],
            }
            table.append({"step": fitted.updates, **self.agent.runs[r], **row})
        self.fqe_table.append(table)
        self.values += table
        rows = {}
        for row in table:
            rows[row["run"]] = {f"fqe/{name}": row[name] for name in row}
        self.wandb.log(self.step + fitted.updates, rows)
        texts = [f"{row['value']:.4g} +- {row['value_error']:.2g}" for row in table]
        text = f"fqe    {fitted.updates:>9,}  value {' | '.join(texts)}"
        say(f"{text} (the data's: {in_data:.4g})")
        if fitted.updates % config.eval_freq == 0:
            self.fitted_metrics.reset()

    def save_best(self, payload: dict) -> None:
        """Write best.pt: a checkpoint of each run's best policy, without optimizer."""
        best = payload["best"]
        if max(best["steps"]) < 0:
            return
        diverged = list(payload["diverged"])
        for r, step in enumerate(best["steps"]):
            if step >= 0:
                diverged[r] = -1
        agent = {**payload["agent"], **best["weights"]}
        agent["_extra_state"] = {"updates": 0, "optimizer": None}
        changed = {"agent": agent, "online": None, "fqe": None, "diverged": diverged}
        save_checkpoint(self.directory / "best.pt", {**payload, **changed})

    def summary(self) -> None:
        """The closing table: last and best evaluation of each run, and the files."""
        column = "return_mean"
        if self.evaluator and self.evaluator.reference is not None:
            column = "d4rl_normalized_score"
        names = ["seed", "cql_alpha"]
        for name in SWEPT[2:]:
            if isinstance(getattr(self.config, name), list):
                names.append(name)
        for r, run in enumerate(self.agent.runs):
            text = f"run {r:<3}"
            for name in names:
                text += f"  {name} {run[name]}"
            rows = [row for row in self.evaluations if int(row["run"]) == r]
            rows = [row for row in rows if row[column] != ""]
            values = [float(row[column]) for row in rows]
            if values:
                best = int(rows[np.argmax(values)]["step"])
                text += f"  {column} last {values[-1]:.2f}, best {max(values):.2f}"
                text += f" at {best:,}"
            rows = [row for row in self.values if int(row["run"]) == r]
            if rows:
                value = rows[-1]["value"]
                text += f"  fqe {math.nan if value == '' else float(value):.4g}"
            if self.warned[r]:
                text += "  Q ran away"
            if self.diverged[r] >= 0:
                text += f"  diverged by {self.diverged[r]}"
            say(text)
        say(f"files: {self.directory or 'none'}")

    def end(self, stop: list) -> int:
        """The last lines; returns the exit status."""
        if stop:
            self.checkpoint()
            text = f"interrupted at update {self.step:,}"
            if self.directory:
                text += f"; --resume {self.directory} goes on"
            say(text)
            return 128 + stop[0]
        self.summary()
        return 0 if len(self.alive()) == len(self.agent.runs) else 3

    @contextmanager
    def opened(self, checkpoint: Optional[dict]):
        """Between `open` and the end, whatever that is."""
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
    """Data (None where nothing is learned from any), task, and evaluator (None without
    an environment). Raises UserError."""
    learns = config.max_timesteps + config.online_iterations + config.fqe_updates > 0
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
        raise UserError("--online_iterations: needs an --eval_env, as none is recorded")
    if task is None:
        space = probe.unwrapped.observation_space
        flat_space = probe.observation_space
        structured = not isinstance(space, gym.spaces.Box)
        task = make_task(space if structured else flat_space, probe.action_space)
    elif probe is not None:
        fields = action_fields(probe.action_space)
        if task.env_id is not None:  # bounds are the data's; types as it takes them
            fields = {name: fields[name] for name in ("action_shape", "action_dtype")}
        n_actions = math.prod(fields["action_shape"])
        if n_actions == len(task.action_low):  # else refused below
            task = dataclasses.replace(task, **fields)
    evaluator = Evaluator(config, task, probe) if probe else None
    data = None
    if episodes is not None:
        data = Dataset(config, episodes, task, device)
        if config.fqe_updates > 0 and data.lengths.mean() < 2:
            raise UserError("--fqe_updates: needs episodes of two steps, on average")
    return data, task, evaluator


def check_resume(config: TrainConfig, checkpoint: dict, data: Optional[Dataset]) -> None:
    """Raise UserError where a resumed run is to do less than it has done, or to learn
    from something else than before."""
    before = checkpoint["config"]
    step = checkpoint["step"]
    online = step > before["max_timesteps"]
    planned = config.max_timesteps
    if online and planned != before["max_timesteps"]:
        what = f"the run went online after {before['max_timesteps']} updates"
        raise UserError(f"--max_timesteps {planned}: {what}")
    if not online and step > planned:
        raise UserError(f"--max_timesteps {planned}: the run is at {step}")
    if step > planned + config.online_iterations:
        n = config.online_iterations
        raise UserError(f"--online_iterations {n}: the run is at {step - planned}")
    fqe = checkpoint["fqe"]
    judged = fqe["agent"]["_extra_state"]["updates"] if fqe else 0
    if step == planned + config.online_iterations and config.fqe_updates < judged:
        raise UserError(f"--fqe_updates {config.fqe_updates}: {judged} are done")
    for name in ("eval_env", "max_episode_steps"):
        if online and getattr(config, name) != before[name]:
            raise UserError(f"--{name}: the run learns online with {before[name]}")
    was = checkpoint["fingerprint"]
    if data is not None and was and not np.allclose(data.fingerprint, was, rtol=1e-9):
        what = f"{was[0]} transitions, here are {data.fingerprint[0]}, or other numbers"
        raise UserError(f"--env {config.env}: other data: the run had {what}")


def describe(config: TrainConfig, task: Task, data, evaluator) -> None:
    """The opening lines: what was read, what actions were taken to be, what is
    evaluated where; and flags that do not what their names say here."""
    reference = evaluator.reference if evaluator else task.reference
    if data is not None:
        text = f"data: {len(data):,} transitions, {len(data.lengths):,} episodes"
        if data.left_out:
            unknown = "transitions whose next observations are unknown"
            text += f" ({data.left_out:,} left out: {unknown})"
        text += f", mean return {data.returns.mean():.1f}"
        if reference is not None:
            text += f" (score {normalized_score(data.returns.mean(), reference):.1f})"
        say(text)
    say(f"actions: {describe_actions(task)}")
    if data is not None:
        describe_seen_actions(task, data.columns["actions"])
    if evaluator is not None:
        say(evaluator.describe())
    else:
        say("evaluation: none; metrics.csv holds Q of the data's, the policy's and")
        say("  uniform actions. --eval_env names an environment")
    changed = {name for name, x in vars(config).items() if x != FIELDS[name].default}
    kind = "discrete" if task.discrete else "continuous"
    idle = CONTINUOUS if task.discrete else ["exploration_epsilon"]
    unused = sorted(changed.intersection(idle))
    if unused:
        say(f"without effect on {kind} actions: {', '.join(unused)}")
    pace = config.soft_target_update_rate * (1 - config.discount)
    if 0 < pace * config.fqe_updates < 3 * config.target_update_period:
        enough = 3 * config.target_update_period / pace
        say(f"fqe_updates: values have settled after some {enough:,.0f}, not before")
    if config.cql_lagrange and np.min(config.cql_target_action_gap) < 0:
        say("cql_target_action_gap < 0 is a real target here, not 'off'")


def describe_seen_actions(task: Task, actions: Tensor) -> None:
    """A word where the data's actions [n, A] are not what one may take them for."""
    if task.discrete:
        n = int(task.action_high[0] - task.action_low[0]) + 1
        n_seen = len(actions.unique())
        if n_seen < n:
            say(f"  {n - n_seen} of them never occur in the data")
    elif not (actions % 1).any():
        say("  whole numbers, taken as a box: stored as one column of integers, or with")
        say("  a Discrete --eval_env, they are discrete")


def judge(run: Run, stop: list) -> None:
    """Fitted Q evaluation of every run's policy, by the same updates as training."""
    config = run.config
    if run.fitted is None:
        run.fitted = FittedQ(run.agent, run.data)
    fitted = run.fitted

    def step(noise: Noise) -> None:
        batch = run.data.sample(noise.fractions)
        run.fitted_metrics.add(fitted.update(batch, noise))

    do_step = step
    if fitted.device.type == "cuda":
        do_step = GraphedStep(step, fitted, run.fitted_metrics)
    while fitted.updates < config.fqe_updates and not stop:
        do_step(fitted.draw(config.batch_size))
        last = fitted.updates == config.fqe_updates
        if last or fitted.updates % config.eval_freq == 0:
            run.log_values()
            run.checkpoint()
        elif time.monotonic() - run.saved_at > run.CHECKPOINT_SECONDS:
            run.checkpoint()


def train(config: TrainConfig) -> int:
    """Train every run of the config; returns the exit status. Raises UserError for bad
    input, before anything is written, and MachineError."""
    keep_freed_memory()
    device = pick_device(config)
    directory = run_directory(config)

    # What to start from: a run to resume, a model to load, or nothing.
    lock = None
    checkpoint = None
    resumed = False
    if directory is not None and (directory / "checkpoint.pt").exists():
        lock = lock_directory(directory)
        checkpoint = read_checkpoint(directory)
        resumed = True
    elif config.load_model:
        checkpoint = read_checkpoint(config.load_model)

    # Data and environment; agent; what its batches come from.
    data, task, evaluator = load(config, checkpoint, device)
    statistics = None
    if data is not None and config.normalize:
        statistics = data.statistics()
    agent = make_agent(config, task, device, statistics)
    if resumed:
        with errors_as(UserError, f"checkpoint {checkpoint['path']}: garbled"):
            check_resume(config, checkpoint, data)
    if checkpoint is not None:
        load_agent(agent, checkpoint)
        if checkpoint["agent"]["_extra_state"]["optimizer"] is None:
            say(f"{checkpoint['path']}: holds no optimizer, so Adam begins anew")
    if not resumed:
        agent.updates = 0  # count and draw as a fresh run does
    replay = Replay(config, data, agent)
    online = None
    if config.online_iterations > 0:
        online = Online(config, task, agent, replay)
    run = Run(config, agent, data, evaluator, online, directory, lock)

    def step(noise: Noise) -> None:
        """An update of every run, as a CUDA graph captures it."""
        batch = replay.sample(noise.fractions)
        run.metrics.add(agent.update(batch, noise))

    do_step = step
    if device.type == "cuda":
        do_step = GraphedStep(step, agent, run.metrics)  # keeps Python's numbers as now
    describe(config, task, data, evaluator)

    with stop_signals() as stop, run.opened(checkpoint if resumed else None):
        look = {"unit": "update", "leave": False, "dynamic_ncols": True}
        bar = tqdm(total=run.total, initial=run.step, disable=None, **look)
        if run.evaluation_due():  # all there is to do, or what a signal cut short
            run.evaluate(stop)
        while run.step < run.total and run.alive() and not stop:
            # Online, a step of each run's environment enters the replay first; no
            # update until that holds a batch.
            updates = 1
            if run.step >= run.offline:
                online.step(run.alive(), run.step)
                updates = config.utd if replay.ready() else 0

            # Draw all randomness of an update; then batch, losses and optimizers.
            for _ in range(updates):
                noise = agent.draw(config.batch_size)
                do_step(noise)
            run.step += 1
            bar.update()

            # Log the means since the last row.
            if run.step % config.log_freq == 0 or run.step == run.total:
                run.log()

            # Evaluate and save; save in between, so that a kill costs minutes at most.
            if run.evaluation_due():
                run.evaluate(stop)
            elif run.checkpoint_due():
                run.checkpoint()
        bar.close()
        if config.fqe_updates > 0 and run.alive() and not stop:
            judge(run, stop)
        return run.end(stop)


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status (0, 1, 2, 3, 130 or 143)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if {"-h", "--help"} & set(argv):
            print_help()
            return 0
        return train(read_config(argv))
    except UserError as error:
        print("cql.py: error:", str(error).replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training takes the signal
        return 130
    except (MachineError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        print(f"cql.py: failed: {brief(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
