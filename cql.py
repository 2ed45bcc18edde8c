"""Conservative Q-Learning (CQL) in one file: read it, run it, sweep it, fork it.

Learns a policy from recorded data alone. The algorithm is Kumar et al., "Conservative
Q-Learning for Offline Reinforcement Learning", NeurIPS 2020 (arXiv 2006.04779), on the
soft actor-critic of Haarnoja et al. (arXiv 1812.05905); flags and defaults are those of
CORL's offline cql.py. Several runs (seeds, penalty weights) train at once as one more
dimension of every tensor.

    python cql.py --config_path configs/quickstart.yaml          # minutes on a laptop
    python cql.py --env mujoco/hopper/medium-v0 --seed '[0,1,2]' --cql_alpha '[1,5,10]'
    python cql.py --config_path configs/hopper.yaml --resume runs/hopper   # or go on
    python cql.py --load_model runs/hopper/checkpoint.pt --max_timesteps 0
    torchrun --nproc_per_node 2 cql.py --seed '[0,1,2,3]' --resume runs/split

Letters in shape comments: R runs, N critics, B batch, K = cql_n_actions, M actions of a
state, T target actions of a state (1 or K), O observation dims, A action dims.
Actions inside the algorithm live in [-1, 1]; the environment's own bounds are applied
where data comes in and where `act` goes out.
"""

import argparse
import copy
import csv
import ctypes
import dataclasses
import difflib
import fcntl
import io
import itertools
import json
import math
import multiprocessing
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
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Union, get_args
from unittest import mock

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
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
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

    # Minari id, directory of a Minari dataset, D4RL .hdf5 file, or a list of those;
    # null: no data, only what is gathered online in eval_env
    env: Union[List[str], str, None] = "mujoco/hopper/medium-v0"
    device: str = "auto"  # auto, cpu, cuda, cuda:N (CORL's default: cuda)
    seed: Union[int, List[int]] = 0  # Seed of initialization and training noise [list]
    eval_freq: int = 5000  # Updates between evaluations
    n_episodes: int = 10  # Episodes of one evaluation
    max_timesteps: int = 1_000_000  # Updates in all
    # Where run directories go; null writes nothing, to wandb neither (CORL: null)
    checkpoints_path: Optional[str] = "runs"
    # Checkpoint or run directory to start from: weights, optimizers, statistics
    load_model: Optional[str] = ""
    buffer_size: int = 2_000_000  # Capacity of the online buffer; data is loaded whole
    batch_size: int = 256  # Transitions per update and run
    discount: float = 0.99  # Discount factor
    alpha_multiplier: float = 1.0  # Factor on the entropy temperature
    use_automatic_entropy_tuning: bool = True  # Learn the entropy temperature
    backup_entropy: bool = False  # Subtract alpha * log pi in the TD target
    policy_lr: float = 3e-5  # Learning rate of policy and temperature
    qf_lr: float = 3e-4  # Learning rate of critics and Lagrange multiplier
    soft_target_update_rate: float = 5e-3  # Step of target critics to the critics
    target_update_period: int = 1  # Updates between target steps
    cql_n_actions: int = 10  # Actions a proposal; 3 x this enter the penalty
    cql_importance_sample: bool = True  # Divide each proposal by its density
    cql_lagrange: bool = False  # Learn the penalty weight towards the target gap
    cql_target_action_gap: Union[float, List[float]] = -1.0  # Aim of cql_lagrange [list]
    cql_temp: Union[float, List[float]] = 1.0  # Softmax temperature [list]
    cql_alpha: Union[float, List[float]] = 10.0  # Penalty, twice the paper's [list]
    cql_max_target_backup: bool = False  # TD target takes the best of K actions
    cql_clip_diff_min: float = -math.inf  # Lower clamp of a sample's gap
    cql_clip_diff_max: float = math.inf  # Upper clamp of a sample's gap
    orthogonal_init: bool = True  # Orthogonal critic weights (the policy's never are)
    normalize: bool = True  # Standardize observations by the dataset's statistics
    # Divide rewards by returns' spread / 1000 (hopper, halfcheetah, walker2d)
    normalize_reward: bool = False
    q_n_hidden_layers: int = 3  # Hidden layers of a critic
    bc_steps: int = 0  # First updates in which the policy clones the data
    reward_scale: float = 1.0  # Rewards are r * reward_scale + reward_bias (CORL: 5)
    reward_bias: float = 0.0  # See reward_scale; always applied (CORL: -1)
    policy_log_std_multiplier: float = 1.0  # Initial factor on the policy's log std
    project: str = "CORL"  # wandb project
    group: str = "CQL-D4RL"  # wandb group
    name: str = "CQL"  # Run name, first part of the run directory's
    eval_seed: int = 0  # Seed of the evaluation episodes, the same for all runs
    offline_iterations: Optional[int] = None  # Another name for max_timesteps
    online_iterations: int = 0  # Environment steps after the offline updates
    cql_alpha_online: Optional[float] = None  # Online penalty weight; null: cql_alpha
    mixing_ratio: float = -1.0  # Offline share of an online batch; -1: one buffer
    is_sparse_reward: bool = False  # Cal-QL: failed episodes count as going on for ever
    log_freq: int = 1000  # Updates between rows of metrics.csv
    eval_env: Optional[str] = None  # Environment to evaluate in; null: the dataset's
    resume: Optional[str] = None  # Run directory to continue, or to start in if empty
    hidden_dim: int = 256  # Width of every hidden layer
    n_critics: int = 2  # Critics; targets take their minimum
    # Critics, drawn for each update, whose least is the target; null: all (else REDQ)
    n_target_critics: Optional[int] = None
    penalty: str = "logsumexp"  # The penalty: or two_proposals, policy_kl, mean
    cql_backward_actions: int = 0  # Sampled actions to backpropagate through; 0: all
    precision: str = "fp32"  # Of matrix products: fp32, tf32 (GPU), bf16 (critics)
    cal_ql: bool = False  # Cal-QL: penalize no Q that is below the return-to-go
    utd: int = 1  # Updates per environment step
    record_dataset: Optional[str] = None  # Minari id or ./path for the online episodes
    compile: bool = False  # torch.compile the losses: fewer kernels, a minute's start
    # Processes that evaluate beside the training; null: on a GPU a core each, up to 16
    eval_workers: Optional[int] = None


SWEPT = ("seed", "cql_alpha", "cql_temp", "cql_target_action_gap")  # may be lists
PENALTIES = ("logsumexp", "two_proposals", "policy_kl", "mean")  # conservative_gap
# What a dataset of discrete actions does without.
CONTINUOUS = (
    "alpha_multiplier use_automatic_entropy_tuning backup_entropy policy_lr "
    "cql_n_actions cql_importance_sample cql_max_target_backup bc_steps precision "
    "policy_log_std_multiplier cql_backward_actions"
).split()
RANGES = {  # lowest and highest value of the flags that have one
    (1, math.inf): "eval_freq n_episodes buffer_size batch_size target_update_period "
    "cql_n_actions q_n_hidden_layers log_freq hidden_dim n_critics n_target_critics "
    "utd",
    (0, math.inf): "max_timesteps offline_iterations alpha_multiplier policy_lr qf_lr "
    "cql_alpha bc_steps cql_backward_actions eval_workers online_iterations "
    "cql_alpha_online",
    (-1, 1): "mixing_ratio",
    (0, 1): "discount soft_target_update_rate",
    (0, 2**63 - 1): "seed eval_seed",
    (1e-8, math.inf): "cql_temp",
}
# What a resumed run may change.
RESUMABLE = set(
    "max_timesteps offline_iterations online_iterations device eval_freq n_episodes "
    "eval_seed eval_env eval_workers log_freq project group name checkpoints_path "
    "resume record_dataset".split()
)
# What load_model takes from the checkpoint when the command leaves it out, besides the
# flags of SWEPT: the data, and all that decides the shape of a tensor.
INHERITED = (
    *("env", "eval_env", "hidden_dim", "q_n_hidden_layers", "n_critics"),
    *("cql_lagrange", "use_automatic_entropy_tuning"),
)


class UserError(Exception):
    """The user's input is at fault: one line on stderr, exit status 2."""


class MachineError(Exception):
    """The machine failed while running (disk, simulator): one line, exit status 1."""


def brief(error) -> str:
    """An exception's first words, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def blaming(kind: type, where: str, errors=Exception, but=()):
    """Raise what goes wrong, errors `but` some, as a UserError or MachineError."""
    try:
        yield
    except but:
        raise
    except errors as error:
        name = f"{type(error).__name__}: " if kind is MachineError else ""
        raise kind(f"{where}: {name}{brief(error)}") from None


def strict(kind: type, value):
    """`value` as kind; ValueError for a fraction as int, a string as bool."""
    if kind is int and not isinstance(value, int):  # 1e6 is a string in YAML
        value = float(value)
    wrong = isinstance(value, (list, dict, type(None))) or (kind is int and value % 1)
    if wrong or isinstance(value, bool) != (kind is bool):
        raise ValueError(value)
    return kind(value)


for _kind in (bool, int, float, str):
    pyrallis.decode.register(_kind, partial(strict, _kind))
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def decoded(name: str, value, where: str, parse: bool = False):
    """A flag's value in its field's type, from YAML if `parse`. Raises UserError."""
    if name not in FIELDS:
        close = difflib.get_close_matches(str(name), FIELDS, 1, 0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{where}: unknown flag{hint}")
    kind = FIELDS[name].type
    try:
        return pyrallis.decode(kind, yaml.safe_load(value) if parse else value)
    except Exception:
        lists = " (a list is written '[0, 1]')" if "List" in str(kind) else ""
        kind = re.sub(r"typing\.|<class '|'>", "", str(kind))
        raise UserError(f"{where}: expected {kind}{lists}, got {value!r}") from None


def read_config_file(path: Union[str, Path]) -> dict:
    """Field values from a YAML file of flags. Raises UserError."""
    with blaming(UserError, f"--config_path {path}"):
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    if not isinstance(values, dict):
        raise UserError(f"--config_path {path}: empty, or not a mapping of flags")
    if "program" in values:
        raise UserError(f"--config_path {path}: a wandb sweep; try `wandb sweep {path}`")
    return {key: decoded(key, v, f"{path}: {key}") for key, v in values.items()}


def read_command_line(argv: List[str]) -> dict:
    """Field values given on the command line, `--config_path`'s below them."""
    if {"-h", "--help"} & set(argv):  # pyrallis takes a second to find the comments
        ArgumentParser(TrainConfig, prog="cql.py").parse_args(["--help"])
    argv = list(argv)
    for i in range(len(argv) - 1, 0, -1):  # argparse takes -.inf for a flag
        if re.match(r"-[.\d]|-inf\b", argv[i]) and re.fullmatch(r"--\w+", argv[i - 1]):
            argv[i - 1 : i + 1] = [f"{argv[i - 1]}={argv[i]}"]
    options = {"allow_abbrev": False, "add_help": False, "exit_on_error": False}
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, **options)
    for name in ("config_path", *FIELDS):
        parser.add_argument(f"--{name}")
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error).replace("argument --", "--", 1)) from None
    if unknown:
        if unknown[0].startswith("--"):
            decoded(unknown[0][2:].split("=")[0], None, unknown[0])
        hint = "; a file of flags needs --config_path" if ".y" in unknown[0] else ""
        hint = hint or "; a list is written '[0, 1]'"
        raise UserError(f"unexpected argument {unknown[0]!r}{hint}")
    raw = vars(namespace)
    path = raw.pop("config_path", None)
    values = {} if path is None else read_config_file(path)
    for name, text in raw.items():
        null = text in ("null", "~") and type(None) in get_args(FIELDS[name].type)
        textual = "str" in str(FIELDS[name].type) and not text.startswith("[")
        value = None if null else text  # a name stays as typed: 007 is "007"
        values[name] = decoded(name, value, f"--{name}", parse=not (textual or null))
    return values


def layered_config(given: dict) -> Tuple[TrainConfig, Optional[dict]]:
    """The config, what is not given taken from a run to resume or a model to load, and
    the checkpoint to start from, if any. Raises UserError."""
    base, checkpoint = {}, None
    if given.get("resume"):
        directory = Path(given["resume"])
        if os.path.exists(directory / "config.yaml"):
            base = read_config_file(directory / "config.yaml")
        elif os.path.exists(directory / "checkpoint.pt"):
            base = read_checkpoint(directory / "checkpoint.pt")["config"]
        elif os.path.isdir(directory) and any(  # a log beside it may be; wandb's too
            path.is_dir() and path.name != "wandb" for path in directory.iterdir()
        ):
            raise UserError(f"--resume {directory}: holds other things, and no run")
        for name in set(given) - RESUMABLE if base else ():
            was = base.get(name, FIELDS[name].default)  # a fork's flag may be new
            if given[name] != was:
                where = f"--{name} {given[name]}: {directory}/config.yaml says {was!r}"
                raise UserError(f"{where}, and a resumed run cannot change it")
        if os.path.exists(directory / "checkpoint.pt"):
            checkpoint = read_checkpoint(directory / "checkpoint.pt")
    if base and {"max_timesteps", "offline_iterations"} & given.keys():
        base.update(max_timesteps=TrainConfig.max_timesteps, offline_iterations=None)
    load_model = {**base, **given}.get("load_model")
    if load_model and checkpoint is None:
        checkpoint = read_checkpoint(load_model)
        base = {k: checkpoint["config"][k] for k in INHERITED + SWEPT} | base
    return TrainConfig(**{**base, **given}), checkpoint


def check_ranges(config: TrainConfig) -> None:
    """Raise UserError for values out of range."""
    ranges = {name: ends for ends, names in RANGES.items() for name in names.split()}
    for name in FIELDS:
        value = getattr(config, name)
        values = value if isinstance(value, list) else [value]
        if "\0" in "".join(v for v in values if isinstance(v, str)):
            raise UserError(f"--{name} {value!r}: holds a NUL character")
        if not values or len(set(values)) < len(values):
            problem = "the same value twice" if values else "an empty list"
            raise UserError(f"--{name} {value}: {problem}")
        low, high = ranges.get(name, (-math.inf, math.inf))
        for number in (v for v in values if isinstance(v, (int, float))):
            if not low <= number <= high:
                ends = f"lie in [{low}, {high}]" if number == number else "be a number"
                raise UserError(f"--{name} {number}: must {ends}")
            if math.isinf(number) and "clip" not in name:
                raise UserError(f"--{name} {number}: must be finite")


def check_online(config: TrainConfig) -> None:
    """Raise UserError for flags of the online phase that contradict."""
    ratio = config.mixing_ratio
    if ratio != -1 and not 0 < ratio < 1:
        raise UserError(f"--mixing_ratio {ratio}: must be -1 or inside (0, 1)")
    if config.online_iterations and config.buffer_size < config.batch_size:
        raise UserError(f"--buffer_size {config.buffer_size}: less than a batch")
    if config.env is None:
        if 0 < config.online_iterations < config.batch_size:
            n = config.online_iterations
            raise UserError(f"--online_iterations {n}: no batch of {config.batch_size}")
        model = config.load_model
        for name, wrong, hint in (
            ("eval_env", config.eval_env is None, "an environment's id"),
            ("online_iterations", not (config.online_iterations or model), "above 0"),
            ("max_timesteps", offline_updates(config) > 0, "0"),
            ("normalize", config.normalize and not model, "false"),
            ("normalize_reward", config.normalize_reward, "false"),
        ):
            if wrong:
                raise UserError(f"--env null: without data --{name} must be {hint}")
    if config.record_dataset is not None:
        where = f"--record_dataset {config.record_dataset}"
        try:
            root, name = recorded_place(config)
            parse_dataset_id(name)
        except (ValueError, TypeError):  # the latter without a version
            hint = "an id or a path like my/data-v0 or ./data-v0"
            raise UserError(f"{where}: must be {hint}") from None
        if config.online_iterations == 0:
            raise UserError(f"{where}: needs --online_iterations above 0")
        begun = config.resume and os.path.exists(Path(config.resume, "checkpoint.pt"))
        if (root / name).exists() and not begun:
            raise UserError(f"{where}: exists already")


def validate(config: TrainConfig) -> None:
    """Raise UserError for values out of range and for flags that contradict."""
    check_ranges(config)
    check_online(config)
    if config.precision not in ("fp32", "tf32", "bf16"):
        raise UserError(f"--precision {config.precision}: must be fp32, tf32 or bf16")
    if config.cql_backward_actions > 3 * config.cql_n_actions:
        k, most = config.cql_backward_actions, 3 * config.cql_n_actions
        raise UserError(f"--cql_backward_actions {k}: of {most} proposals; 0 takes all")
    if config.penalty not in PENALTIES:
        raise UserError(f"--penalty {config.penalty}: must be one of {PENALTIES}")
    if config.penalty != "logsumexp" and not config.cql_importance_sample:
        raise UserError(f"--penalty {config.penalty} needs --cql_importance_sample true")
    if (config.n_target_critics or 1) > config.n_critics:
        n = config.n_target_critics
        raise UserError(f"--n_target_critics {n}: more than --n_critics has")
    if config.is_sparse_reward and config.discount == 1:
        raise UserError("--is_sparse_reward: needs a --discount below 1")
    if config.cql_clip_diff_min > config.cql_clip_diff_max:
        raise UserError("--cql_clip_diff_min is above --cql_clip_diff_max")
    ranks, n_runs = rank_and_ranks()[1], len(product_of_runs(config))
    if ranks > n_runs:
        raise UserError(f"torchrun: {ranks} processes for {n_runs} runs")
    twice = config.offline_iterations is not None
    if twice and config.max_timesteps != FIELDS["max_timesteps"].default:
        raise UserError("--max_timesteps or --offline_iterations: give one, not both")
    if isinstance(config.cql_target_action_gap, list) and not config.cql_lagrange:
        raise UserError("--cql_target_action_gap: a list needs --cql_lagrange true")
    if re.search(r"[/\\#?%:]", config.project) or len(config.project) > 128:
        raise UserError(f"--project {config.project}: no name for wandb: /\\#?%: in it?")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "offline", "disabled", "dryrun", "shared"):
        raise UserError(f"WANDB_MODE {mode}: must be online, offline or disabled")
    for path in (config.checkpoints_path, config.resume):
        if path is not None and (not path or os.path.isfile(path)):
            raise UserError(f"{path!r} is not a directory to write runs in")


def offline_updates(config: TrainConfig) -> int:
    """Updates of the offline phase."""
    given = config.offline_iterations
    return config.max_timesteps if given is None else given


def recorded_place(config: TrainConfig) -> Tuple[Path, str]:
    """Minari's root for record_dataset, a path that starts with . or /, or an id; and
    the id below it."""
    name = config.record_dataset
    if name[:1] in ("", *"./"):
        return Path(name).parent, Path(name).name
    return get_dataset_path(), name


def product_of_runs(config: TrainConfig) -> List[dict]:
    """Number and swept flags of each run: the product of their lists."""
    values = (getattr(config, name) for name in SWEPT)
    lists = (value if isinstance(value, list) else [value] for value in values)
    product = enumerate(itertools.product(*lists))
    return [{"run": i, **dict(zip(SWEPT, run))} for i, run in product]


def rank_and_ranks() -> Tuple[int, int]:
    """This process's place among those that torchrun started; (0, 1) without it."""
    rank, ranks = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdigit() and ranks.isdigit() and int(ranks) > 1):
        return 0, 1
    return int(rank), int(ranks)


def split_over_ranks(given: dict) -> dict:
    """The flags of this process: under torchrun every rank has a directory of its own
    in `resume`'s, from which the same command goes on. Raises UserError."""
    rank, ranks = rank_and_ranks()
    if ranks == 1:
        return given
    if rank >= ranks:
        raise UserError(f"torchrun: RANK {rank} of WORLD_SIZE {ranks}")
    if "WANDB_SWEEP_ID" in os.environ:
        raise UserError("torchrun: not under a sweep agent, whose trial is one process")
    if given.get("record_dataset"):
        raise UserError("--record_dataset: not under torchrun, for one process only")
    if not given.get("resume"):
        raise UserError("torchrun: needs --resume DIR, one directory for all ranks")
    directory = Path(given["resume"])
    if any((directory / name).exists() for name in ("config.yaml", "checkpoint.pt")):
        raise UserError(f"--resume {directory}: holds the run of a single process")
    own = {"resume": str(directory / f"rank{rank}")}
    model = Path(given.get("load_model") or "", f"rank{rank}")
    if given.get("load_model") and model.is_dir():
        own["load_model"] = str(model)
    return {**given, **own}


def settle_ranks(directory: Path) -> None:
    """Refuse another number of ranks than the directory was begun with, whose runs
    would be others. Raises UserError."""
    ranks, path = str(rank_and_ranks()[1]), directory / ".ranks"
    with holding(directory, wait=True):
        before = path.read_text() if path.exists() else ranks
        path.write_text(before)
    if ranks != before:
        raise UserError(f"torchrun: {ranks} processes; {directory} begun by {before}")


def share_of_runs(config: TrainConfig, checkpoint: Optional[dict], resumed: bool):
    """The runs that this process trains: all, those of a checkpoint of the same
    product, or under torchrun every n-th. Raises UserError."""
    (rank, ranks), runs = rank_and_ranks(), product_of_runs(config)
    same = checkpoint and runs == product_of_runs(TrainConfig(**checkpoint["config"]))
    share = checkpoint["runs"] if same and ranks == 1 else runs[rank::ranks]
    if resumed and checkpoint["runs"] != share:
        held, here = ([run["run"] for run in x] for x in (checkpoint["runs"], share))
        where = f"--resume {config.resume}"
        raise UserError(f"{where}: holds runs {held}, this process would train {here}")
    return share


def pick_device(name: str, precision: str = "fp32") -> torch.device:
    """The device that `--device` names, set to the precision. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and rank_and_ranks()[1] > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such GPU; pass --device cpu")
    if precision == "tf32" and device.type != "cuda":
        raise UserError("--precision tf32: only GPUs have it; pass fp32 or bf16")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return device


def keep_freed_memory() -> None:
    """Stop glibc from handing freed tensors back to the system, which faults them in
    again, page by page, at the next update: a quarter of its time with four runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD


def say(text: str) -> None:
    """Print a line without breaking the progress bar."""
    rank, ranks = rank_and_ranks()
    try:
        tqdm.write(f"[rank {rank}] {text}" if ranks > 1 else text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads any longer (`| head`): train on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ======================================================================================
# Data
# ======================================================================================

# D4RL's reference returns (random policy, expert), by gymnasium id; for datasets that
# record none. Source: D4RL's infos.py, as collected in its normalized scores.
REFERENCE_RETURNS = {
    r"Hopper-.*": (-20.272305, 3234.3),
    r"HalfCheetah-.*": (-280.178953, 12135.0),
    r"Walker2d-.*": (1.629008, 4592.3),
    r"Ant-.*": (-325.6, 3879.7),
    r"AntMaze_.*": (0.0, 1.0),
    r"FrankaKitchen-.*": (0.0, 4.0),
    r"PointMaze_UMaze-.*": (23.85, 161.86),
    r"PointMaze_Medium-.*": (13.13, 277.39),
    r"PointMaze_Large-.*": (6.7, 273.99),
    r"AdroitHandPen-.*": (96.262799, 3076.8331),
    r"AdroitHandHammer-.*": (-274.856578, 12794.1348),
    r"AdroitHandDoor-.*": (-56.512833, 2880.5693),
    r"AdroitHandRelocate-.*": (-6.425911, 4233.8778),
}
# A D4RL file carries no environment; for these names the nearest one is known.
D4RL_ENVIRONMENTS = {
    "hopper": ("Hopper-v4", {}),
    "halfcheetah": ("HalfCheetah-v4", {}),
    "walker2d": ("Walker2d-v4", {}),
    "ant": ("Ant-v4", {"use_contact_forces": True}),
}
D4RL_NAME = re.compile(
    r"(?P<env>hopper|halfcheetah|walker2d|ant)-(?P<level>[a-z-]+)-v[0-2]"
    r"|(antmaze|maze2d|kitchen|pen|hammer|door|relocate)-[a-z-]+-v[0-2]"
)


@dataclass
class Task:
    """What a dataset says of its environment; plain values, kept in checkpoints."""

    observation_space: str  # Minari's JSON
    action_low: List[float]  # [A]
    action_high: List[float]  # [A]
    env_id: Optional[str] = None
    env_kwargs: dict = dataclasses.field(default_factory=dict)
    max_episode_steps: Optional[int] = None
    reference: Optional[List[float]] = None  # returns scored 0 and 100
    action_shape: Optional[List[int]] = None  # null: [A]
    discrete: bool = False  # then actions are the integers from low to high
    longest: int = 1000  # steps of the data's longest episode

    @property
    def observation_dim(self) -> int:
        return gym.spaces.flatdim(recorded_space(self.observation_space))


class Episode(NamedTuple):
    observations: np.ndarray  # [T + 1, O]
    actions: np.ndarray  # [T, A]
    rewards: np.ndarray  # [T]
    terminations: np.ndarray  # [T] bool
    whole: bool  # ended by termination or time limit, not by a cut
    total: float  # return, that of a last step left out included
    cut: bool = False  # a last step is left out


class Batch(NamedTuple):
    """Transitions of R runs; arrays without the leading R are taken as R = 1."""

    observations: Tensor  # [R, B, O] raw
    actions: Tensor  # [R, B, A] in the environment's bounds; discrete: [R, B, 1]
    rewards: Tensor  # [R, B]
    next_observations: Tensor  # [R, B, O] raw
    terminations: Tensor  # [R, B] 1 where the episode terminated, not truncated
    mc_returns: Optional[Tensor] = None  # [R, B] discounted return-to-go, for Cal-QL


def check_spaces(observation_space, action_space) -> None:
    """Raise UserError unless observations flatten to a vector and actions are a box or
    discrete."""
    leaves, nested = [observation_space], (gym.spaces.Dict, gym.spaces.Tuple)
    while leaves:
        space = leaves.pop()
        array = isinstance(space, gym.spaces.Box) and len(space.shape) <= 2
        if isinstance(space, nested):
            leaves += space.values() if isinstance(space, nested[0]) else list(space)
        elif not array or is_image_space(space):
            hint = "only Box vectors (no images) and dictionaries or tuples of them"
            raise UserError(f"observations in {brief(space)} are not supported, {hint}")
    bounded = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded()
    if isinstance(action_space, gym.spaces.Discrete) and action_space.n > 1:
        return
    if not bounded or (action_space.low >= action_space.high).any():
        what = f"actions in {brief(action_space)} are not supported"
        raise UserError(f"{what}, only a bounded Box and Discrete")


def action_bounds(space) -> dict:
    """Task's fields of an action space."""
    discrete = isinstance(space, gym.spaces.Discrete)
    low = space.start if discrete else space.low
    high = space.start + space.n - 1 if discrete else space.high
    low, high = (np.ravel(bound).astype(float).tolist() for bound in (low, high))
    shape = {"action_shape": list(space.shape), "discrete": discrete}
    return {"action_low": low, "action_high": high, **shape}


def recorded_space(text) -> gym.Space:
    """A space from Minari's JSON, keys in the recorded order, which is flatten's own;
    Minari's reader sorts them."""
    space = json.loads(text) if isinstance(text, str) else text
    parts = space.get("subspaces")
    if space["type"] == "Dict":
        return gym.spaces.Dict([(key, recorded_space(parts[key])) for key in parts])
    if space["type"] == "Tuple":
        return gym.spaces.Tuple([recorded_space(part) for part in parts])
    return deserialize_space(space)


def entire(group: h5py.Group, key: str) -> np.ndarray:
    """All of an array, by HDF5's own calls: h5py's take twice as long, mostly not in
    reading. Raises ValueError where its bytes in the file cannot unpack to what it
    announces, because it is damaged; that may be more than the memory."""
    array = h5py.h5d.open(group.id, key.encode())
    size = math.prod(array.shape) * array.dtype.itemsize
    packed = array.get_storage_size() + 4096
    if size > 1100 * packed:  # gzip packs 1032 to 1 at most
        raise ValueError(f"{key} of {size:,} bytes, from {packed:,}")
    values = np.empty(array.shape, array.dtype)
    array.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values


def flat(space, group: h5py.Group, key: str) -> np.ndarray:
    """Observations of one episode as [T + 1, O], in the order of gym.spaces.flatten."""
    if isinstance(space, gym.spaces.Box):
        array = entire(group, key)
        return array.reshape(len(array), math.prod(space.shape))
    parts = space.spaces
    if isinstance(space, gym.spaces.Tuple):  # Minari's names of its parts
        parts = {f"_index_{i}": part for i, part in enumerate(parts)}
    return np.concatenate([flat(part, group[key], k) for k, part in parts.items()], 1)


def read_task(directory: Path) -> Tuple[Task, int]:
    """The task and number of episodes from a Minari dataset's metadata.json. That is
    data: without recorded spaces Minari would make the recorded environment, with its
    entry point, to learn them, so such a dataset is refused. Raises UserError."""
    if not (directory / "metadata.json").is_file():
        raise UserError("holds no Minari dataset: no metadata.json")
    with blaming(UserError, "metadata.json lacks or garbles something", but=UserError):
        metadata = json.loads((directory / "metadata.json").read_text())
        if metadata.get("data_format", "hdf5") != "hdf5":
            raise UserError("only Minari's hdf5 format is supported")
        names = ("observation_space", "action_space")
        spaces = [recorded_space(metadata[name]) for name in names]
        check_spaces(*spaces)
        recorded = (metadata.get("eval_env_spec"), metadata.get("env_spec"), "{}")
        spec = json.loads(next(text for text in recorded if text))
        reference = [metadata.get(f"ref_{end}_score") for end in ("min", "max")]
        if None not in reference and not float(reference[0]) < float(reference[1]):
            raise UserError(f"reference scores {reference}, which are not min and max")
        text, limit = metadata["observation_space"], spec.get("max_episode_steps")
        text = text if isinstance(text, str) else json.dumps(text)
        task = Task(text, **action_bounds(spaces[1]))
        task.env_id, task.env_kwargs = spec.get("id"), dict(spec.get("kwargs") or {})
        task.env_kwargs.pop("render_mode", None)
        task.max_episode_steps = None if limit is None else int(limit)
        task.reference = None if None in reference else [float(x) for x in reference]
        return task, int(metadata["total_episodes"])


def single(array) -> np.ndarray:
    """As float32, too large numbers as infinity. Raises ValueError for text and complex
    numbers."""
    if np.iscomplexobj(array):
        raise ValueError("complex numbers")
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def minari_episodes(directory: Path, task: Task, n_episodes: int):
    """Iterate over a Minari dataset's episodes. The file is read directly, because
    Minari's reader decodes `infos` too, most of its bytes."""
    space = recorded_space(task.observation_space)
    with h5py.File(directory / "main_data.hdf5", "r") as file:
        for i in range(n_episodes):
            raw = file[f"episode_{i}"]
            keys = ("actions", "rewards", "terminations", "truncations")
            actions, rewards, ended, cut = (single(entire(raw, key)) for key in keys)
            if len(cut) != len(rewards):
                raise UserError(f"episode {i}: {len(cut)} truncations")
            whole = bool(len(rewards) and (ended[-1] or cut[-1]))
            observations = single(flat(space, raw, "observations"))
            actions = actions.reshape(len(actions), math.prod(actions.shape[1:]))
            total = float(rewards.sum(dtype=np.float64))
            yield Episode(observations, actions, rewards, ended, whole, total)


def d4rl_episodes(path: Path):
    """Iterate over the episodes of D4RL's flat HDF5: observations, actions, rewards,
    terminals and, where present, timeouts and next_observations.

    Without next_observations, what follows an episode's last observation is unknown:
    the last transition of an episode that a time limit cut is left out, as in
    d4rl.qlearning_dataset; a terminal one bootstraps nothing and stays."""
    keys = "observations actions rewards terminals timeouts next_observations".split()
    with h5py.File(path, "r") as file:
        found = [key for key in keys if isinstance(file.get(key), h5py.Dataset)]
        lacking = [key for key in keys[:4] if key not in found]
        if lacking:
            raise UserError(f"lacks {', '.join(lacking)}; holds {list(file)}")
        data = {key: single(entire(file, key)) for key in found}
    n = len(data["rewards"])
    if n == 0:
        raise UserError("no episodes")
    if not {"timeouts", "next_observations"} & data.keys():
        say(f"{path.name}: without timeouts, so only terminals end an episode")
    if any(len(value) != n for value in data.values()):
        raise ValueError(f"lengths differ: { {key: len(data[key]) for key in data} }")
    observations, terminals = data["observations"], data["terminals"].reshape(n)
    if observations.ndim != 2:
        raise UserError(f"observations of shape {observations.shape}, not [n, O]")
    following = data.get("next_observations")
    done = (terminals != 0) | (data.get("timeouts", terminals).reshape(n) != 0)
    ends = done.copy()
    if following is not None:  # a jump is an episode's end, flagged or not
        with np.errstate(all="ignore"):  # check_episodes refuses NaN and infinity
            spread = observations.std(0, dtype=np.float64).astype(np.float32)
            rounding = 1e-5 * np.abs(observations[1:]) + 1e-4 * spread
            ends[:-1] |= ~(np.abs(following[:-1] - observations[1:]) <= rounding).all(1)
    ends[n - 1 :] = True
    cuts = ends & (terminals == 0) & (following is None)
    rewards, actions = data["rewards"].reshape(n), data["actions"]
    actions = actions.reshape(n, math.prod(actions.shape[1:]))
    first = 0
    for last in np.flatnonzero(ends):
        kept = slice(first, last + (not cuts[last]))
        end = (observations if following is None else following)[last : last + 1]
        total = float(rewards[first : last + 1].sum(dtype=np.float64))
        parts = actions[kept], rewards[kept], terminals[kept], bool(done[last]), total
        yield Episode(np.concatenate([observations[kept], end]), *parts, cuts[last])
        first = last + 1


def read_episodes(name: str) -> Tuple[List[Episode], Task]:
    """One entry of `env`: a directory, a file or a Minari id. Raises UserError."""
    path = Path(name)
    for directory in (path, path / "data"):
        if os.path.isfile(directory / "metadata.json"):  # False for impossible names
            path = directory
    if not os.path.exists(path):
        path = minari_directory(name)
    try:
        if not name:
            raise UserError("empty")
        if path.is_dir():
            task, n_episodes = read_task(path)
            episodes = list(minari_episodes(path, task, n_episodes))
        else:
            episodes = list(d4rl_episodes(path))
            dims = [array.shape[1] for array in episodes[0][:2]]
            space = gym.spaces.Box(-np.inf, np.inf, dims[:1], np.float32)
            actions = gym.spaces.Box(-1, 1, dims[1:])
            with h5py.File(path, "r") as file:
                if file["actions"].dtype.kind in "iu":
                    actions = gym.spaces.Discrete(int(np.max(file["actions"])) + 1)
            check_spaces(space, actions)
            env = D4RL_ENVIRONMENTS.get(re.split("[-_]", path.stem)[0], (None, {}))
            task = Task(serialize_space(space), **action_bounds(actions))
            task.env_id, task.env_kwargs = env
    except UserError as error:
        raise UserError(f"--env {name}: {error}") from None
    except Exception as error:
        raise UserError(f"--env {name}: damaged or foreign: {brief(error)}") from None
    if 0 in (task.observation_dim, len(task.action_low)):
        raise UserError(f"--env {name}: no observations or no actions in it")
    if not any(len(episode.rewards) for episode in episodes):
        raise UserError(f"--env {name}: no episodes")
    return episodes, task


def minari_directory(name: str) -> Path:
    """Where a Minari id's data lies, downloaded if it must be. Raises UserError."""
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", name):
        hint = "nor a Minari id such as mujoco/hopper/medium-v0"
        raise UserError(f"--env {name}: no such directory or .hdf5 file, {hint}")
    directory, d4rl = get_dataset_path(name) / "data", D4RL_NAME.fullmatch(name)
    if d4rl and not directory.is_dir():
        other = f", or Minari's own mujoco/{d4rl[1]}/medium-v0" if d4rl[1] else ""
        where = f"--env {name} is a name of D4RL's, whose data Minari does not hold"
        hint = f"pass the file, --env path/to/{name}.hdf5{other} (which is other data)"
        raise UserError(f"{where}: {hint}")

    def missing():  # or half there: a download killed, or another rank's
        return not directory.is_dir() or len(os.listdir(directory)) < 2

    if missing():
        say(f"downloading {name} ...")
        where = f"--env {name}: no directory here, not under {get_dataset_path()}"
        hint = "pass a directory or .hdf5 file, as its download failed"
        with blaming(UserError, f"{where}; {hint}"):
            if "MINARI_REMOTE" not in os.environ:  # offline, Minari retries for minutes
                urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=20)
            with holding(get_dataset_path(), wait=True), quiet():
                if missing():
                    minari.download_dataset(name)
    return directory


def task_of(env_name: str) -> Task:
    """The task of an environment without data. Raises UserError."""
    env = make_env(Task("", [], []), env_name)
    raw, flat_space = env.unwrapped.observation_space, env.observation_space
    space = flat_space if isinstance(raw, gym.spaces.Box) else raw
    return Task(serialize_space(space), **action_bounds(env.action_space))


def check_episodes(name: str, episodes: List[Episode], task: Task) -> None:
    """Raise UserError unless the episodes fit the task, in bounds and finite."""
    bounds = [task.action_low, task.action_high]
    low, high = np.array(bounds)
    rounding, n = 1e-4 * (high - low), task.observation_dim
    for i, episode in enumerate(episodes):
        T, where = len(episode.rewards), f"--env {name}: episode {i}"
        shapes = [(T + 1, n), (T, len(low)), (T,), (T,)]
        found = [np.shape(array) for array in episode[:4]]
        if found != shapes:
            raise UserError(f"{where}: arrays of shapes {found}; expected {shapes}")
        for field, array in zip(Episode._fields, episode[:4]):
            if not np.isfinite(array).all():
                raise UserError(f"{where}: {field} hold NaN or infinity")
        actions = episode.actions
        if task.discrete and (actions % 1).any():
            raise UserError(f"{where}: discrete actions that are no whole numbers")
        if (actions < low - rounding).any() or (actions > high + rounding).any():
            hint = "rescale them, or name their environment with --eval_env"
            raise UserError(f"{where}: actions outside {bounds}; {hint}")


class Dataset:
    """Transitions on the device. The next observation is found by index, not stored
    twice: it is the row after the observation's own."""

    def __init__(self, config: TrainConfig, device="cpu"):
        names = config.env if isinstance(config.env, list) else [config.env]
        parts, tasks = zip(*map(read_episodes, names))
        self.task = next((task for task in tasks if task.env_id), tasks[0])
        if config.eval_env and self.task.env_id is None:  # then its bounds count
            new = action_bounds(make_env(self.task, config.eval_env).action_space)
            if len(new["action_low"]) == len(self.task.action_low):  # else refused later
                self.task = dataclasses.replace(self.task, **new)
        for name, part, task in zip(names, parts, tasks):
            if task.env_id not in (None, self.task.env_id):
                raise UserError(f"--env {name}: {task.env_id} is not {self.task.env_id}")
            ends = [(t.action_low, t.action_high, t.discrete) for t in (task, self.task)]
            if task.env_id and ends[0] != ends[1]:
                where = f"--env {name}: actions in {ends[0][:2]}"
                raise UserError(f"{where}, unlike the first's")
            if task.env_id and task.env_kwargs != self.task.env_kwargs:
                say(f"{name}: recorded with settings {task.env_kwargs};")
                say(f"  evaluation is in those of the first, {self.task.env_kwargs}")
            check_episodes(name, part, self.task)
        self.left_out = sum(episode.cut for part in parts for episode in part)
        episodes = [e for part in parts for e in part if len(e.rewards)]
        self.lengths = np.array([len(e.rewards) for e in episodes], int)
        if self.lengths.sum() < config.batch_size:
            n = f"{self.lengths.sum()} transitions in {len(episodes)} episodes"
            what = f"{n} are no batch of {config.batch_size}"
            raise UserError(f"--env {names}: {what}; pass a smaller --batch_size")
        self.task.longest = int(self.lengths.max())
        whole = np.array([e.total for e in episodes if e.whole])
        self.returns = whole if len(whole) else np.array([e.total for e in episodes])
        self.reward_factor = reward_factor(whole, self.task, config)

        def joined(arrays) -> Tensor:
            return torch.as_tensor(single(np.concatenate([*arrays])), device=device)

        self.observations = joined(e.observations for e in episodes)
        self.actions = joined(e.actions for e in episodes)
        rewards = joined(e.rewards for e in episodes)
        self.rewards = transformed(rewards, self.reward_factor, config)
        self.terminations = joined(e.terminations for e in episodes)
        self.mc_returns = None
        if config.cal_ql:
            columns = self.rewards.cpu().double().numpy(), self.terminations.cpu()
            cuts, worst = np.cumsum(self.lengths)[:-1], float(self.rewards.min())
            parts = zip(*(np.split(np.asarray(column), cuts) for column in columns))
            self.mc_returns = joined(returns_to_go(*p, config, worst) for p in parts)
        rows = np.repeat(np.arange(len(episodes)), self.lengths)  # one more per episode
        self.rows = torch.as_tensor(rows + np.arange(len(rows)), device=device)
        # No two policies' values are further apart, going by the data's rewards.
        spread = self.rewards.max().clamp(min=0) - self.rewards.min().clamp(max=0)
        self.q_range = float(spread) / max(1 - config.discount, 1e-9)

    def __len__(self) -> int:
        return len(self.rows)

    def statistics(self) -> Tuple[Tensor, Tensor]:
        """Mean and std + 1e-3 of s over the transitions, [O] each (CORL's form)."""
        observations = self.observations[self.rows].double()
        return observations.mean(0), observations.std(0, correction=0) + 1e-3

    def sample(self, rows: Tensor) -> Batch:
        """Transitions at rows [R, B] in [0, 1) of the whole."""
        return self.gather((rows * len(self)).long().clamp(max=len(self) - 1))

    def gather(self, indices: Tensor) -> Batch:
        """Transitions at indices [R, B]."""
        rows = self.rows[indices]
        actions, rewards = self.actions[indices], self.rewards[indices]
        after, terminations = self.observations[rows + 1], self.terminations[indices]
        batch = self.observations[rows], actions, rewards, after, terminations
        mc_returns = self.mc_returns
        return Batch(*batch, None if mc_returns is None else mc_returns[indices])


def transformed(rewards, factor: float, config: TrainConfig):
    """Rewards as they are learned from."""
    return rewards * factor * config.reward_scale + config.reward_bias


def returns_to_go(rewards, terminations, config: TrainConfig, worst) -> np.ndarray:
    """Discounted sum of an episode's rewards [T] from each step on (Cal-QL, section 4).

    What follows a time limit is left out, and a termination ends the sum. Under
    `is_sparse_reward`, an episode that earned nothing but the data's least reward is
    taken to go on so for ever."""
    if config.is_sparse_reward and (rewards == worst).all():
        return np.full(len(rewards), worst / (1 - config.discount))
    factors = config.discount * (1 - np.asarray(terminations, float))
    steps = zip(rewards[::-1], factors[::-1])
    returns = itertools.accumulate(steps, lambda G, s: s[0] + s[1] * G, initial=0.0)
    return np.array([*returns][:0:-1])


def reward_factor(returns, task: Task, config: TrainConfig) -> float:
    """What normalize_reward multiplies rewards by; returns of whole episodes."""
    if not config.normalize_reward:
        return 1.0
    name = task.env_id or config.eval_env or ""
    if not re.match("Hopper|HalfCheetah|Walker2d", name):
        say("normalize_reward has no effect here: hopper, halfcheetah, walker2d only")
        return 1.0
    if len(returns) == 0 or np.ptp(returns) == 0:
        raise UserError("--normalize_reward: needs whole episodes of unequal returns")
    return 1000 / np.ptp(returns)


class Replay:
    """What updates draw from: the dataset, and on top of it each run's own online
    transitions, of which the first in go first out."""

    def __init__(self, config, data: Optional[Dataset], agent: "Agent", device="cpu"):
        self.config, self.data = config, data
        self.offline = 0 if data is None else len(data)
        self.worst = -math.inf if data is None else float(data.rewards.min())
        self.factor = 1.0 if data is None else data.reward_factor
        lead = len(agent.runs), min(config.buffer_size, config.online_iterations)
        shapes = (agent.observation_dim,), (agent.action_dim,), ()
        shapes = [(*lead, *shape) for shape in (*shapes, shapes[0], (), ())]
        where = f"--buffer_size {config.buffer_size}: no room for {lead[1]} transitions"
        with blaming(UserError, where, RuntimeError):
            self.own = Batch(*(torch.zeros(shape, device=device) for shape in shapes))
        self.added = torch.zeros(lead[0], dtype=torch.long)  # in all
        self.sizes = self.added.clone().to(device)  # present

    def ready(self) -> bool:
        """Whether there is a batch for every run: updates are joint, so without data
        stacked runs wait for the slowest."""
        return self.offline + int(self.added.min()) >= self.config.batch_size

    def add(self, r: int, observations, actions, rewards, terminations) -> None:
        """An episode of run r, or a part of one: [T + 1, O], [T, A], [T], [T]."""
        rewards = torch.as_tensor(np.asarray(rewards, np.float32))  # as the data's
        rewards = transformed(rewards, self.factor, self.config).double().numpy()
        returns = returns_to_go(rewards, terminations, self.config, self.worst)
        whole = observations[:-1], actions, rewards, observations[1:], terminations
        capacity, T = self.own.rewards.shape[1], len(rewards)
        kept = slice(max(T - capacity, 0), T)
        rows = (int(self.added[r]) + np.arange(T)[kept]) % capacity
        for column, values in zip(self.own, (*whole, returns)):
            values = torch.as_tensor(np.asarray(values, np.float32)[kept])
            column[r, torch.as_tensor(rows)] = values.to(column.device)
        self.added[r] += T
        self.sizes[r] = min(int(self.added[r]), capacity)

    def sample(self, rows: Tensor) -> Batch:
        """Transitions at rows [R, B] in [0, 1); without online ones, the dataset's."""
        if self.own.rewards.shape[1] == 0:
            return self.data.sample(rows)
        sizes, ratio = self.sizes.unsqueeze(1), self.config.mixing_ratio  # [R, 1]
        if ratio < 0:  # one buffer, the dataset's rows first
            total = self.offline + sizes
            index = torch.minimum((rows * total).long(), total - 1)
            own, mine = index >= self.offline, index - self.offline
        else:
            place = torch.arange(rows.shape[1], device=rows.device)
            own = (place >= round(ratio * len(place))) & (sizes > 0)
            mine = torch.minimum((rows * sizes).long(), sizes - 1)
            index = (rows * self.offline).long()
        run = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        found = Batch(*(column[run, mine.clamp(min=0)] for column in self.own))
        if self.data is None:
            return found
        data = self.data.gather(index.clamp(max=self.offline - 1))
        pairs = [(x, y) for x, y in zip(found, data) if y is not None]
        masks = (own.unsqueeze(-1) if x.ndim == 3 else own for x, _ in pairs)
        return Batch(*(torch.where(mask, *pair) for mask, pair in zip(masks, pairs)))

    def state(self) -> dict:
        """The online transitions, for a checkpoint."""
        size = int(self.sizes.max())
        own = [column[:, :size].clone() for column in self.own]  # else all of it
        return {"own": own, "added": self.added}

    def load(self, state: dict) -> None:
        capacity, size = self.own.rewards.shape[1], state["own"][0].shape[1]
        for column, saved in zip(self.own, state["own"]):
            column[:, :size] = saved.to(column.device)
        self.added = state["added"]
        self.sizes.copy_(self.added.clamp(max=capacity))


# ======================================================================================
# Networks
# ======================================================================================


def turns(x: Tensor) -> list:
    """Indices of the members that are served together: on a CPU each by itself, which
    keeps its rows in the cache from product to ReLU; on a GPU all, in few launches."""
    return [*range(len(x))] if x.device.type == "cpu" else [slice(None)]


class MemberLayer(torch.autograd.Function):
    """x @ w + b and, if wanted, ReLU, members first, in the type of x. By hand, because
    autograd of a ReLU in place, on a view, copies the gradient whole several times."""

    @staticmethod
    def forward(ctx, x, w, b, relu):
        y = x.new_empty(*x.shape[:-1], w.shape[-1])
        for i in turns(x):
            y[i].unflatten(-2, (b.shape[-2], -1)).copy_(b[i].unsqueeze(-2))
            add_product = y[i].addmm_ if y[i].ndim == 2 else y[i].baddbmm_
            add_product(x[i], w[i].to(x.dtype))
            if relu:
                y[i].relu_()
        ctx.save_for_backward(x, w, b, y)
        ctx.relu = relu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w, b, y = ctx.saved_tensors
        needed = zip((x, w, b), ctx.needs_input_grad)
        grad_x, grad_w, grad_b = (torch.empty_like(t) if n else None for t, n in needed)
        for i in turns(x):
            g = grad[i]
            if ctx.relu:
                g = torch.ops.aten.threshold_backward(g, y[i], 0)
            if grad_x is not None:
                torch.matmul(g, w[i].mT.to(g.dtype), out=grad_x[i])
            if grad_w is not None:
                grad_w[i] = x[i].mT @ g
            if grad_b is not None and b[i].shape[:-1] == (1,):
                grad_b[i] = g.new_ones(1, len(g)) @ g  # faster than g.sum(0)
            elif grad_b is not None:
                g = g.unflatten(-2, (b.shape[-2], -1))
                torch.sum(g, -2, dtype=b.dtype, out=grad_b[i])
        return grad_x, grad_w, grad_b, None


def member_layer(x: Tensor, w: Tensor, b: Tensor, relu: bool) -> Tensor:
    """x [*lead, n, in] @ w [*lead, in, out] + b [*lead, m, out] -> [*lead, n, out], in
    the type of x. Each row of b serves n / m rows of x: all of them (m = 1) or one
    state's actions."""
    if x.shape[:-2] != w.shape[:-2]:
        raise ValueError(f"input of members {x.shape[:-2]} for {w.shape[:-2]}")
    n_members = math.prod(w.shape[:-2])
    members = (t.reshape(n_members, *t.shape[-2:]) for t in (x, w, b))
    return MemberLayer.apply(*members, relu).unflatten(0, x.shape[:-2])


class EnsembleLinear(nn.Module):
    """Linear layers of all members: weight [*lead, in, out], bias [*lead, 1, out]."""

    def __init__(self, lead: Tuple[int, ...], n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(*lead, 1, n_out))

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return member_layer(x, self.weight, self.bias, relu)


class EnsembleMLP(nn.Module):
    """ReLU networks of all members, x [*lead, n, in] -> [*lead, n, out]."""

    def __init__(self, lead: Tuple[int, ...], sizes: List[int]):
        super().__init__()
        layers = [EnsembleLinear(lead, *pair) for pair in zip(sizes, sizes[1:])]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x, relu=True)
        return self.layers[-1](x)

    @torch.no_grad()
    def initialize(self, generators: List[torch.Generator], orthogonal: bool) -> None:
        """CORL's init_module_weights; run r draws from generators[r] alone."""
        for r, generator in enumerate(generators):
            for layer in self.layers:
                last = layer is self.layers[-1]
                n_in, n_out = layer.weight.shape[-2:]
                weights = layer.weight[r].view(-1, n_in, n_out)
                for w, b in zip(weights, layer.bias[r].view(-1, n_out)):
                    if orthogonal:
                        gain = 1e-2 if last else math.sqrt(2)
                        nn.init.orthogonal_(w, gain, generator)
                    elif last:
                        nn.init.xavier_uniform_(w, 1e-2, generator)
                    else:  # nn.Linear's own default
                        bound = n_in**-0.5
                        for tensor in (w, b):
                            tensor.uniform_(-bound, bound, generator=generator)


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
    pre_tanh = mean.unsqueeze(2) + log_std.exp().unsqueeze(2) * normals
    return pre_tanh.tanh(), squashed_log_prob(normals, log_std.unsqueeze(2), pre_tanh)


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

    Actions [R, N, B, M, A] are each critic's own. dtype is that of the hidden layers
    after the observation's; the last one keeps the weights' type."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, action_dim: int):
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        super().__init__((n_runs, config.n_critics), [obs_dim + action_dim, *hidden, 1])
        self.split = [obs_dim, action_dim]
        self.n_critics = config.n_critics

    def forward(self, observations, actions, dtype: Optional[torch.dtype] = None):
        first, *hidden, last = self.layers
        by_observation, by_action = first.weight.split(self.split, dim=-2)
        shared = (-1, self.n_critics, -1, -1)  # what all critics see
        # The observation's share of the first layer, once per state: [R, N, B, H].
        s = observations.unsqueeze(1).expand(shared)
        s = member_layer(s, by_observation, first.bias, relu=False)
        x = actions.flatten(-3, -2)  # [R, B * M, A] or [R, N, B * M, A]
        x = x.unsqueeze(1).expand(shared) if actions.ndim == 4 else x
        x = member_layer(x.to(dtype or x.dtype), by_action, s, relu=True)
        for layer in hidden:
            x = layer(x, relu=True)  # [R, N, B * M, H]
        x = last(x.to(last.weight.dtype))
        return x.squeeze(-1).unflatten(2, actions.shape[-3:-1])


class DiscreteCritic(EnsembleMLP):
    """N critics of A discrete actions: observations [R, B, O] -> Q [R, N, B, A]."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, n_actions: int):
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        super().__init__((n_runs, config.n_critics), [obs_dim, *hidden, n_actions])
        self.n_critics = config.n_critics

    def forward(self, observations: Tensor) -> Tensor:
        shared = (-1, self.n_critics, -1, -1)
        return super().forward(observations.unsqueeze(1).expand(shared))


# ======================================================================================
# Losses: pure functions that return (loss [R], metrics): means over the batch, sums
# over the critics. "CQL" is arXiv 2006.04779, "SAC" is arXiv 1812.05905.
# ======================================================================================


class Noise(NamedTuple):
    """All randomness of one update, drawn outside the losses."""

    normals: Tensor  # [R, B, 1 + K, A] at s: the actor's action, then K proposals
    next_normals: Tensor  # [R, B, T + K, A] at s': target actions, then K proposals
    uniforms: Tensor  # [R, B, K, A] in [-1, 1]
    offsets: Tensor  # [R, N, B] in [0, 1) of the sampled backward pass, else [R, 0, B]
    keys: Tensor  # [R, N], whose largest choose the target's critics, else [R, 0]
    rows: Tensor  # [R, B] in [0, 1), float64: which transitions make the batch


class Samples(NamedTuple):
    """Actions of one update and their log densities."""

    policy: Tuple[Tensor, Tensor]  # mean and log std at s, [R, B, A], with graph
    actions: Tensor  # [R, B, 1, A] from pi(.|s), with graph
    log_pi: Tensor  # [R, B] with graph
    target_actions: Tensor  # [R, B, T, A] from pi(.|s')
    target_log_pi: Tensor  # [R, B, T]
    proposals: Tensor  # [R, B, 3K, A]: uniform, pi(.|s), pi(.|s')
    log_mu: Tensor  # [R, B, 3K]
    offsets: Tensor  # [R, N, B], see sampled_backward
    keys: Tensor  # [R, N], see pessimistic


class Sweep(NamedTuple):
    """The flags that take a list, as one value per run."""

    cql_alpha: Tensor  # [R]
    cql_temp: Tensor  # [R]
    cql_target_action_gap: Tensor  # [R]


def sample_actions(policy: Policy, batch: Batch, noise: Noise) -> Samples:
    """Every action of an update, from one pass of the policy over [s; s']."""
    B, K = batch.rewards.shape[1], noise.uniforms.shape[2]
    A, T = noise.uniforms.shape[3], noise.next_normals.shape[2] - K
    mean, log_std = policy(torch.cat([batch.observations, batch.next_observations], 1))
    here = mean[:, :B], log_std[:, :B]
    actions, log_pi = squash(*here, noise.normals[:, :, :1])
    with torch.no_grad():
        current, current_log_pi = squash(*here, noise.normals[:, :, 1:])
        following, next_log_pi = squash(mean[:, B:], log_std[:, B:], noise.next_normals)
        uniform_log_mu = torch.full_like(current_log_pi, -A * math.log(2))
    return Samples(
        here,
        actions,
        log_pi.squeeze(2),
        following[:, :, :T],
        next_log_pi[:, :, :T],
        torch.cat([noise.uniforms, current, following[:, :, T:]], 2),
        torch.cat([uniform_log_mu, current_log_pi, next_log_pi[:, :, T:]], 2),
        noise.offsets,
        noise.keys,
    )


def temperature_loss(log_alpha: Tensor, log_pi: Tensor, target_entropy: float):
    """SAC eq. 18, with log alpha in alpha's place as in the authors' code."""
    loss = -(log_alpha.unsqueeze(1) * (log_pi.detach() + target_entropy)).mean(1)
    return loss, {"alpha_loss": loss}


def actor_loss(critic: Critic, batch: Batch, samples: Samples, alpha: Tensor):
    """SAC eq. 9: alpha [R] weighs the entropy against the least of the critics, or, with
    REDQ's targets, their mean (arXiv 2101.05982, algorithm 1)."""
    weights = {name: weight.detach() for name, weight in critic.named_parameters()}
    inputs = batch.observations, samples.actions
    q = torch.func.functional_call(critic, weights, inputs).squeeze(3)  # [R, N, B]
    q = q.mean(1) if samples.keys.shape[1] else q.amin(1)
    loss = (alpha.unsqueeze(1) * samples.log_pi - q).mean(1)
    return loss, {"policy_loss": loss, "log_pi": samples.log_pi.mean(1)}


def cloning_loss(batch: Batch, samples: Samples, alpha: Tensor):
    """Behaviour cloning with entropy, for the first bc_steps updates (CQL's code)."""
    log_pi_data = data_log_prob(*samples.policy, batch.actions)  # [R, B]
    loss = (alpha.unsqueeze(1) * samples.log_pi - log_pi_data).mean(1)
    return loss, {"policy_loss": loss, "log_pi": samples.log_pi.mean(1)}


def pessimistic(q: Tensor, keys: Tensor, config: TrainConfig) -> Tensor:
    """The least Q of all target critics or, given keys, of n_target_critics drawn at
    random (REDQ, arXiv 2101.05982, algorithm 1). q [R, N, ...] -> [R, ...]."""
    if keys.shape[1]:
        chosen = keys.topk(config.n_target_critics, 1).indices  # [R, n_target_critics]
        q = q.take_along_dim(chosen[(...,) + (None,) * (q.ndim - 2)], 1)
    return q.amin(1)


@torch.no_grad()
def td_target(target_critic: Critic, batch: Batch, samples: Samples, alpha, config):
    """SAC eq. 2-3 with the least of the target critics; [R, B]. A time limit is no
    terminal and bootstraps; with cql_max_target_backup the best of K actions counts."""
    q = target_critic(batch.next_observations, samples.target_actions)
    q = pessimistic(q, samples.keys, config)
    q, best = q.max(-1)  # [R, B, T] -> [R, B]
    if config.backup_entropy:
        log_pi = samples.target_log_pi.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        q = q - alpha.unsqueeze(1) * log_pi
    target = batch.rewards + config.discount * (1 - batch.terminations) * q
    return target, {"average_target_q": q.mean(1)}


def conservative_gap(q, log_mu, q_data, temperature, config) -> Tensor:
    """The soft maximum of Q over actions above Q of the data: CQL eq. 4 and appendix F.

    q [R, N, B, M], log_mu [R, 1, B, M] or None for unweighted actions, which the data's
    own joins; q_data [R, N, B]; temperature [R]. Returns [R, N, B], clamped.
    Differs from all code with a temperature: T divides Q alone, not log mu, so that
    T * logsumexp estimates T * log(integral of exp(Q / T)). No 1 / 3K, as in CORL.

    Other forms of config.penalty take part of the 3K proposals: `two_proposals` the
    uniform ones and pi(.|s)'s, with 1 / 2K (appendix F as printed; DI-engine's text);
    `policy_kl` pi(.|s)'s, unweighted, with 1 / K: mu proportional to pi exp(Q / T)
    (CQL(rho), section 3.2); `mean` their mean (eq. 2, the tutorials')."""
    T, K = temperature[:, None, None], config.cql_n_actions
    parts = {"logsumexp": (None, None), "two_proposals": (0, 2 * K)}
    part = slice(*parts.get(config.penalty, (K, 2 * K)))
    logits = q[..., part] / T.unsqueeze(-1)
    if log_mu is None:
        logits = torch.cat([logits, q_data.unsqueeze(-1) / T.unsqueeze(-1)], -1)
    elif config.penalty in ("logsumexp", "two_proposals"):
        logits = logits - log_mu[..., part]
    constant = 0.0 if config.penalty == "logsumexp" else math.log(logits.shape[-1])
    gap = T * (logits.logsumexp(-1) - constant) - q_data
    if config.penalty == "mean":
        gap = q[..., part].mean(-1) - q_data
    return gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)


def sampled_backward(gap_of, q: Tensor, offsets: Tensor, k: int):
    """k of M actions per state and critic to differentiate gap_of(q) through.

    The gap's gradient is sum_m slope_m dQ_m, slope_m = d gap / d Q_m. Actions drawn in
    proportion to |slope_m| by systematic resampling (one offset, k equally spaced
    points of the cdf) estimate it without bias, whatever form gap_of has: a clamped
    gap, say, has no slopes. q [R, N, B, 1 + M], the data's action first, whose slope
    stays exact; offsets [R, N, B]. Returns the gap [R, N, B], indices [R, N, B, k] of
    the M, and for Q of the data and of those k the slopes [R, N, B, 1 + k]."""
    gap, pull = torch.func.vjp(gap_of, q.detach())
    (slopes,) = pull(torch.ones_like(gap))
    slope_of_data, slopes = slopes[..., :1], slopes[..., 1:]
    cdf = slopes.abs().cumsum(-1)
    each = cdf[..., -1:] / k
    points = (torch.arange(k, device=q.device) + offsets.unsqueeze(-1)) * each
    indices = torch.searchsorted(cdf, points, right=True).clamp(max=cdf.shape[-1] - 1)
    slopes = slopes.gather(-1, indices).sign() * each
    return gap.detach(), indices, torch.cat([slope_of_data, slopes], -1)


def q_and_gap(critic: Critic, batch, samples, sweep, config):
    """Q [R, N, B, 1 + 3K] of the data's action and the proposals, Q of the former with
    a graph and the gap, [R, N, B] each. All actions go through the critics in one call;
    with cql_backward_actions without a graph, and the few with one in a second call."""
    k, K = config.cql_backward_actions, config.cql_n_actions
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    log_mu = samples.log_mu.unsqueeze(1) if config.cql_importance_sample else None
    actions = torch.cat([batch.actions.unsqueeze(2), samples.proposals], 2)

    def gap_of(q):
        q_data, q = q[..., 0], q[..., 1:]
        if config.cal_ql:  # arXiv 2303.05479, section 5: bounds the policy's proposals
            bounded = torch.maximum(q[..., K:], batch.mc_returns[:, None, :, None])
            q = torch.cat([q[..., :K], bounded], -1)
        return conservative_gap(q, log_mu, q_data, sweep.cql_temp, config)

    with torch.set_grad_enabled(k == 0):
        q = critic(batch.observations, actions, dtype)  # [R, N, B, 1 + 3K]
    if k == 0:
        return q, q[..., 0], gap_of(q)
    gap, indices, slopes = sampled_backward(gap_of, q, samples.offsets, k)
    indices = F.pad(indices + 1, (1, 0)).unsqueeze(-1)  # [R, N, B, 1 + k, 1]
    actions = actions.unsqueeze(1).expand(-1, q.shape[1], -1, -1, -1)
    q_k = critic(batch.observations, actions.take_along_dim(indices, 3), dtype)
    linear = (slopes * q_k).sum(-1)  # has the gap's gradient, not its value
    return q, q_k[..., 0], gap + linear - linear.detach()


def penalized_td_loss(q_data, target, gap, log_alpha_prime, sweep, config):
    """TD error and weighted gap: CQL eq. 4 times 2, so cql_alpha is twice its alpha.
    With cql_lagrange (appendix F) also the loss of log alpha', whose alpha' grows while
    the gap exceeds its target. q_data, gap [R, N, B], target [R, B]."""
    gap = gap.mean(-1)  # [R, N]
    td = (q_data - target.unsqueeze(1)).square().mean(-1)  # [R, N]
    weight = sweep.cql_alpha.unsqueeze(1)  # [R, 1]
    excess, multiplier = gap, gap.new_zeros(len(gap))
    multiplier_loss = multiplier
    if config.cql_lagrange:
        multiplier = log_alpha_prime.exp().clamp(0.0, 1e6)  # [R]
        excess = gap - sweep.cql_target_action_gap.unsqueeze(1)
        multiplier_loss = -(multiplier.unsqueeze(1) * weight * excess.detach()).mean(1)
        weight = weight * multiplier.detach().unsqueeze(1)
    penalty = weight * excess
    metrics = {
        "qf{j}_loss": td,
        "average_qf{j}": q_data.mean(-1),
        "cql_qf{j}_diff": gap,
        "cql_min_qf{j}_loss": penalty,
        "alpha_prime": multiplier,
        "alpha_prime_loss": multiplier_loss,
    }
    return (td + penalty).sum(1) + multiplier_loss, metrics


def critic_loss(critic: Critic, batch, samples, target, log_alpha_prime, sweep, config):
    """Of continuous actions; target [R, B], log_alpha_prime [R]."""
    q, q_data, gap = q_and_gap(critic, batch, samples, sweep, config)
    parts = q_data, target, gap, log_alpha_prime, sweep, config
    loss, metrics = penalized_td_loss(*parts)
    q_mean = q[..., 1:].mean(2).unflatten(-1, (3, -1)).mean(-1)  # [R, N, 3]
    names = "cql_q{j}_rand", "cql_q{j}_current_actions", "cql_q{j}_next_actions"
    metrics |= dict(zip(names, q_mean.unbind(-1)))
    return loss, metrics | {"cql_std_q{j}": q.std(-1).mean(-1)}


def discrete_loss(critic, target_critic, batch, keys, log_alpha_prime, sweep, config):
    """Of discrete actions, on double DQN (arXiv 1509.06461): the critics' mean chooses
    the next action, the target critics' least values it. The gap is exact."""
    actions = batch.actions.long().unsqueeze(1)  # [R, 1, B, 1]
    q = critic(batch.observations)  # [R, N, B, A]
    q_data = q.take_along_dim(actions, -1).squeeze(-1)
    with torch.no_grad():
        best = critic(batch.next_observations).mean(1, keepdim=True).argmax(-1, True)
        q_next = target_critic(batch.next_observations).take_along_dim(best, -1)
        q_next = pessimistic(q_next.squeeze(-1), keys, config)  # [R, B]
        target = batch.rewards + config.discount * (1 - batch.terminations) * q_next
    gap = conservative_gap(q, torch.zeros_like(q), q_data, sweep.cql_temp, config)
    parts = q_data, target, gap, log_alpha_prime, sweep, config
    loss, metrics = penalized_td_loss(*parts)
    metrics |= {
        "average_target_q": q_next.mean(1),
        "cql_std_q{j}": q.std(-1).mean(-1),
        "cql_q{j}_rand": q.mean(-1).mean(-1),
        "cql_q{j}_current_actions": q.amax(-1).mean(-1),
    }
    return loss, metrics


# ======================================================================================
# Agents
# ======================================================================================


def seeded(seed: int, stream: int, device="cpu") -> torch.Generator:
    """A generator of its own for each use of a run's seed."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


@cache
def compiled(function: Callable) -> Callable:
    """The function by torch.compile; where that fails, as it is, with a line of why."""
    # Both passes at the first call: a failure of the second would come too late.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    chosen = [torch.compile(function)]
    say("compiling the losses: the first update takes a minute or so")

    def call(*arguments):
        try:
            return chosen[0](*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = brief(str(error).partition("\n\n")[0])  # the rest is advice
            say(f"not compiled, training goes on without: {reason}")
            chosen[0] = function
            return function(*arguments)

    return call


class Agent(nn.Module):
    """What both agents share, for R runs at once: `update` learns from a Batch of raw
    observations and the environment's actions, `act` returns such actions. The
    state_dict holds all that training needs, optimizer, generators and observation
    statistics included.

    A subclass makes `critic`, and whatever else it trains, in `build`."""

    def __init__(
        self,
        config: TrainConfig,
        observation_dim: int,
        action_dim: int,
        device: Union[str, torch.device] = "cpu",
        action_low=-1.0,
        action_high=1.0,
        observation_mean=0.0,
        observation_std=1.0,
        runs: Optional[List[dict]] = None,  # of the product; null: all
    ):
        super().__init__()
        self.config, self.device = config, device
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.runs = product_of_runs(config) if runs is None else runs
        generators = [seeded(run["seed"], 0) for run in self.runs]
        groups = self.build(generators, config, len(self.runs))
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha_prime = nn.Parameter(torch.ones(len(self.runs)))
        for name, value, size in (
            ("observation_mean", observation_mean, observation_dim),
            ("observation_std", observation_std, observation_dim),
            ("action_low", action_low, action_dim),
            ("action_high", action_high, action_dim),
        ):
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            self.register_buffer(name, value.expand(size).clone())
        self.to(device)
        columns = ([run[name] for run in self.runs] for name in Sweep._fields)
        kind = {"dtype": torch.get_default_dtype(), "device": device}
        self.sweep = Sweep(*(torch.tensor(column, **kind) for column in columns))
        self.restart()
        # One Adam for all: it is elementwise, so neither runs nor networks mix.
        groups[-1]["params"] += [self.log_alpha_prime] * config.cql_lagrange
        on_gpu = torch.device(device).type == "cuda"
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=on_gpu)
        for parameter in itertools.chain(*(group["params"] for group in groups)):
            self.optimizer.state[parameter] = {  # now, so that loading only ever copies
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def restart(self) -> None:
        """Count and draw as a fresh run does, with the weights as they are."""
        self.step = 0
        self.generators = [seeded(run["seed"], 1, self.device) for run in self.runs]
        self.explorers = [seeded(run["seed"], 2) for run in self.runs]

    def draw(self, batch_size: int, n: Optional[int] = None) -> Noise:
        """Noise of an update, or of n of them in a block [n, R, ...]; run r draws from
        its own generator alone."""
        draws = []
        for generator in self.generators:
            on = {"generator": generator, "device": self.device}
            rows = torch.rand((n or 1, batch_size), dtype=torch.float64, **on)
            draw = self.draw_actions((n or 1, batch_size), on)
            subset = (self.config.n_target_critics or math.inf) < self.config.n_critics
            keys = torch.rand((n or 1, self.config.n_critics * subset), **on)
            draws.append((*draw, keys, rows))
        block = Noise(*(torch.stack(draw, 1) for draw in zip(*draws)))
        return block if n else Noise(*(x[0] for x in block))

    def prepare(self, batch: Batch) -> Batch:
        """With the R dimension, standardized observations and unit actions. Raises
        ValueError for other shapes, which might broadcast into a wrong answer."""
        kind = {"dtype": self.observation_mean.dtype, "device": self.device}
        if batch.mc_returns is None:  # Cal-QL's bound that bounds nothing
            none = torch.full(np.shape(batch.rewards), -math.inf, **kind)
            batch = batch._replace(mc_returns=none)
        batch = Batch(*(torch.as_tensor(array, **kind) for array in batch))
        if batch.rewards.ndim == 1:
            batch = Batch(*(x.unsqueeze(0) for x in batch))
        lead = len(self.runs), batch.rewards.shape[-1]
        states, actions = (*lead, self.observation_dim), (*lead, self.action_dim)
        shapes = [states, actions, lead, states, lead, lead]
        if [x.shape for x in batch] != shapes:
            raise ValueError(f"batch of {[tuple(x.shape) for x in batch]}, not {shapes}")
        mean, std = self.observation_mean, self.observation_std
        return batch._replace(
            observations=(batch.observations - mean) / std,
            next_observations=(batch.next_observations - mean) / std,
            actions=self.unit_actions(batch.actions),
        )

    def update(self, batch: Batch, noise: Optional[Noise] = None) -> Dict[str, Tensor]:
        """One step on every network; returns metrics, each [R] (or [R, N] where the
        name holds {j}), on the device and without a sync."""
        batch = self.prepare(batch)
        noise = self.draw(batch.rewards.shape[1]) if noise is None else noise
        metrics = self.learn(batch, noise)
        self.step += 1
        return metrics

    def stage(self) -> Tuple[bool, bool]:
        """Whether the next update clones, and whether it moves the targets: all that
        the step decides in `learn`."""
        period = self.config.target_update_period
        return self.step < self.config.bc_steps, (self.step + 1) % period == 0

    def learn(self, batch: Batch, noise: Noise) -> Dict[str, Tensor]:
        """`update` on a prepared batch, but for the counting: a CUDA graph holds it."""
        losses = type(self).losses
        losses = compiled(losses) if self.config.compile else losses
        loss, metrics = losses(self, batch, noise, self.stage()[0])
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        if self.stage()[1]:
            targets, critics = self.target_critic.parameters(), self.critic.parameters()
            rate = self.config.soft_target_update_rate
            with torch.no_grad():
                torch._foreach_lerp_(list(targets), list(critics), rate)
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, observations, deterministic: bool = True) -> np.ndarray:
        """Environment actions [R, n, A] for raw observations [R, n, O]; without the
        leading dimensions (R = 1), actions without them."""
        dtype = self.observation_mean.dtype
        x = torch.tensor(np.asarray(observations), dtype=dtype).to(self.device)
        shape, n_runs = x.shape[:-1], len(self.runs)
        lead = x.shape[0] if x.ndim == 3 else 1
        if (lead, x.shape[-1]) != (n_runs, self.observation_dim):
            expected = f"{n_runs} runs of {self.observation_dim} dimensions"
            raise ValueError(f"observations {tuple(x.shape)} for {expected}")
        x = x.reshape(n_runs, -1, x.shape[-1])
        x = (x - self.observation_mean) / self.observation_std
        actions = self.choose(x, deterministic)
        return actions.reshape(*shape, self.action_dim).cpu().numpy()

    def get_extra_state(self) -> dict:
        names, optimizer = ("generators", "explorers"), self.optimizer.state_dict()
        states = {k: [g.get_state() for g in getattr(self, k)] for k in names}
        moments = {i: {**state} for i, state in optimizer["state"].items()}
        return {"step": self.step, "optimizer": moments, **states}

    def set_extra_state(self, state: dict) -> None:
        """Copies into the live tensors; rebinding them would freeze what they feed."""
        self.step, own = state["step"], self.optimizer.state_dict()["state"]
        if own.keys() != state["optimizer"].keys():
            raise ValueError("its optimizer trains other temperatures")
        for index, tensors in state["optimizer"].items():
            for name, tensor in tensors.items():
                own[index][name].copy_(tensor)
        mine = self.generators + self.explorers
        for generator, saved in zip(mine, state["generators"] + state["explorers"]):
            if saved.shape == generator.get_state().shape:  # else another device kind
                generator.set_state(saved)


class ContinuousCQL(Agent):
    """CQL on soft actor-critic; actions in [action_low, action_high], both [A]."""

    def build(self, generators, config: TrainConfig, n_runs: int) -> List[dict]:
        dims = config, n_runs, self.observation_dim, self.action_dim
        self.policy, self.critic = Policy(*dims), Critic(*dims)
        self.policy.initialize(generators, orthogonal=False)  # as CORL, always
        self.critic.initialize(generators, config.orthogonal_init)
        self.log_alpha = nn.Parameter(torch.zeros(n_runs))
        actor, critic = list(self.policy.parameters()), list(self.critic.parameters())
        actor += [self.log_alpha] * config.use_automatic_entropy_tuning
        groups = [(actor, config.policy_lr), (critic, config.qf_lr)]
        return [{"params": parameters, "lr": rate} for parameters, rate in groups]

    def draw_actions(self, shape: Tuple[int, int], on: dict) -> Tuple[Tensor, ...]:
        K, A, config = self.config.cql_n_actions, self.action_dim, self.config
        T = K if config.cql_max_target_backup else 1
        N = config.n_critics if config.cql_backward_actions else 0
        normals = torch.randn((*shape, 1 + K + T + K, A), **on)
        uniforms = torch.rand((*shape, K * A + N), **on)
        actions = uniforms[..., : K * A].unflatten(-1, (K, A)) * 2 - 1
        return *normals.split([1 + K, T + K], 2), actions, uniforms[..., K * A :].mT

    def unit_actions(self, actions: Tensor) -> Tensor:
        center = (self.action_high + self.action_low) / 2
        return (actions - center) / (self.action_high - center)

    def losses(self, batch: Batch, noise: Noise, cloning: bool):
        """All losses of a prepared batch at the present parameters, summed, [R]: no
        graph joins two of them, so one backward pass serves every network. With
        `cloning` the policy's is that of behaviour cloning."""
        config = self.config
        samples = sample_actions(self.policy, batch, noise)
        alpha = torch.full_like(self.log_alpha, config.alpha_multiplier)
        total = torch.zeros_like(alpha)
        metrics = {"alpha_loss": total}
        if config.use_automatic_entropy_tuning:
            alpha = alpha * self.log_alpha.detach().exp()
            log_pi, target_entropy = samples.log_pi, -self.action_dim
            total, metrics = temperature_loss(self.log_alpha, log_pi, target_entropy)
        if cloning:
            loss, more = cloning_loss(batch, samples, alpha)
        else:
            loss, more = actor_loss(self.critic, batch, samples, alpha)
        total, metrics = total + loss, {"alpha": alpha, **metrics, **more}
        target, more = td_target(self.target_critic, batch, samples, alpha, config)
        metrics.update(more)
        multiplier = (self.log_alpha_prime, self.sweep, config)
        loss, more = critic_loss(self.critic, batch, samples, target, *multiplier)
        return total + loss, {**metrics, **more}

    def choose(self, observations: Tensor, deterministic: bool) -> Tensor:
        x, log_std = self.policy(observations)
        if not deterministic:
            shape, kind = x.shape[1:], {"dtype": x.dtype}
            draws = [torch.randn(shape, generator=g, **kind) for g in self.explorers]
            x = x + log_std.exp() * torch.stack(draws).to(x.device)
        center = (self.action_high + self.action_low) / 2
        actions = center + (self.action_high - center) * x.tanh()
        return actions.clamp(self.action_low, self.action_high)

    def on_host(self) -> Callable[[np.ndarray], np.ndarray]:
        """`act` as it is now, deterministic, in NumPy, which another process can take:
        for a few rows at a time, torch takes longer than the environments."""
        *hidden, (w, b) = host_layers(self.policy)
        last = w[..., : self.action_dim], b[..., : self.action_dim]  # the mean's part
        names = "action_low action_high observation_mean observation_std".split()
        arrays = (getattr(self, name).cpu().numpy() for name in names)
        return partial(host_policy, *arrays, [*hidden, last])


class DiscreteCQL(Agent):
    """CQL on double DQN; actions are the integers from action_low to action_low +
    n_actions - 1, and act takes the one of highest mean Q over the critics."""

    def __init__(
        self,
        config: TrainConfig,
        observation_dim: int,
        n_actions: int,
        device: Union[str, torch.device] = "cpu",
        action_low=0,
        observation_mean=0.0,
        observation_std=1.0,
        runs: Optional[List[dict]] = None,
    ):
        self.n_actions = n_actions
        high = float(np.ravel(action_low)[0]) + n_actions - 1
        rest = (action_low, high, observation_mean, observation_std, runs)
        super().__init__(config, observation_dim, 1, device, *rest)

    def build(self, generators, config: TrainConfig, n_runs: int) -> List[dict]:
        dims = config, n_runs, self.observation_dim, self.n_actions
        self.critic = DiscreteCritic(*dims)
        self.critic.initialize(generators, config.orthogonal_init)
        return [{"params": list(self.critic.parameters()), "lr": config.qf_lr}]

    def draw_actions(self, shape: Tuple[int, int], on: dict) -> Tuple[Tensor, ...]:
        return (torch.empty(shape[0], 0, device=self.device),) * 4

    def unit_actions(self, actions: Tensor) -> Tensor:
        return actions - self.action_low

    def losses(self, batch: Batch, noise: Noise, cloning: bool):
        """The loss of a prepared batch at the present parameters, [R]; no policy clones
        here."""
        networks = self.critic, self.target_critic
        multiplier = (self.log_alpha_prime, self.sweep, self.config)
        return discrete_loss(*networks, batch, noise.keys, *multiplier)

    def choose(self, observations: Tensor, deterministic: bool) -> Tensor:
        best = self.critic(observations).mean(1).argmax(-1, keepdim=True)  # [R, n, 1]
        return best + self.action_low.long()

    def on_host(self) -> Callable[[np.ndarray], np.ndarray]:
        """`act` as it is now, in NumPy, which another process can take."""
        names = "action_low observation_mean observation_std".split()
        arrays = (getattr(self, name).cpu().numpy() for name in names)
        return partial(host_greedy, *arrays, host_layers(self.critic))


def make_agent(config, task: Task, device="cpu", statistics=(0.0, 1.0), runs=None):
    """The agent of a dataset's action space."""
    dims, low, high = (config, task.observation_dim), task.action_low, task.action_high
    if task.discrete:
        for name in ("penalty", "cal_ql"):
            if getattr(config, name) != FIELDS[name].default:
                raise UserError(f"--{name}: not for discrete actions")
        n_actions = int(high[0] - low[0]) + 1
        return DiscreteCQL(*dims, n_actions, device, low, *statistics, runs)
    return ContinuousCQL(*dims, len(low), device, low, high, *statistics, runs)


def host_layers(network: EnsembleMLP) -> List[Tuple[np.ndarray, np.ndarray]]:
    """Copies of weights and biases."""
    pairs = ((layer.weight, layer.bias) for layer in network.layers)
    return [tuple(p.detach().cpu().numpy().copy() for p in pair) for pair in pairs]


def host_forward(mean, std, layers, x: np.ndarray) -> np.ndarray:
    """EnsembleMLP.forward in NumPy, on raw observations."""
    x = (x.astype(mean.dtype) - mean) / std
    for weight, bias in layers[:-1]:
        x = np.matmul(x, weight)
        x += bias
        np.maximum(x, 0, out=x)
    return np.matmul(x, layers[-1][0]) + layers[-1][1]


def host_policy(low, high, mean, std, layers, observations: np.ndarray) -> np.ndarray:
    """[R, n, O] -> [R, n, A]."""
    center = (high + low) / 2
    x = np.tanh(host_forward(mean, std, layers, observations))
    actions = center + (high - center) * x
    return np.minimum(np.maximum(actions, low), high)  # np.clip takes three times it


def host_greedy(low, mean, std, layers, observations: np.ndarray) -> np.ndarray:
    """[R, n, O] -> [R, n]."""
    q = host_forward(mean, std, layers, observations[:, None])  # [R, N, n, A]
    return q.mean(1).argmax(-1) + low.astype(int)


# ======================================================================================
# Captured update
# ======================================================================================


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what function launches: one launch for hundreds."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        function()
    return graph.replay


class Updater:
    """Updates the agent with batches of the data. On a GPU the whole of it, from the
    choice of the batch to the sums of the metrics, is one CUDA graph for each stage."""

    WARM_UP = 3  # eager updates before a capture, as PyTorch asks for

    def __init__(self, agent: Agent, data: Union[Dataset, Replay], metrics: "Metrics"):
        self.agent, self.data, self.metrics = agent, data, metrics
        on_gpu = torch.device(agent.device).type == "cuda"
        if on_gpu:  # from here on, because the default stream cannot be captured
            stream = torch.cuda.Stream(agent.device)
            stream.wait_stream(torch.cuda.current_stream(agent.device))
            torch.cuda.set_stream(stream)
        self.captures, self.block = on_gpu, 32 if on_gpu else 1  # updates drawn at once
        self.used, self.noise, self.before = self.block, None, None
        self.cursor = torch.zeros(1, dtype=torch.long, device=agent.device)
        self.seen, self.graphs = {}, {}

    def refill(self) -> None:
        """Draw a block's noise, into the same memory each time."""
        self.before = [generator.get_state() for generator in self.agent.generators]
        noise = self.agent.draw(self.agent.config.batch_size, self.block)
        self.noise = self.noise or noise
        for old, new in zip(self.noise, noise):
            old.copy_(new)
        self.used = 0
        self.cursor.zero_()

    def body(self) -> None:
        """One update without host state, so that it can be replayed."""
        noise = Noise(*(x.index_select(0, self.cursor).squeeze(0) for x in self.noise))
        batch = self.agent.prepare(self.data.sample(noise.rows))
        self.metrics.add(self.agent.learn(batch, noise))
        self.cursor += 1

    def __call__(self) -> None:
        if self.used == self.block:
            self.refill()
        stage = self.agent.stage()
        self.seen[stage] = self.seen.get(stage, 0) + 1
        if self.captures and self.seen[stage] == self.WARM_UP + 1:
            try:
                self.graphs[stage] = capture(self.body)
            except RuntimeError as error:
                self.captures = False
                say(f"no CUDA graph, each kernel is launched by itself: {brief(error)}")
        self.graphs.get(stage, self.body)()
        self.used += 1
        self.agent.step += 1
        self.metrics.count += 1

    def state(self) -> dict:
        """The unspent noise, as what draws it again."""
        before = self.before if self.used < self.block else None
        return {"used": self.used, "block": self.block, "generators": before}

    def load(self, state: dict) -> None:
        if state["used"] < state["block"] == self.block:
            for generator, before in zip(self.agent.generators, state["generators"]):
                generator.set_state(before)
            self.refill()
            self.used = state["used"]
            self.cursor.fill_(self.used)


# ======================================================================================
# Environments and evaluation
# ======================================================================================


@contextmanager
def quiet():
    """Without the notes that libraries write on both streams."""
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
        with redirect_stderr(io.StringIO()):
            yield


def make_env(task: Task, eval_env: Optional[str] = None) -> gym.Env:
    """The dataset's environment by its registered id, or `eval_env`; observations flat.

    A recorded id is data, so it cannot name a module to import; `eval_env` is the
    user's own word and may. Raises UserError."""
    eval_env = None if eval_env == task.env_id else eval_env  # then with its settings
    name, kwargs = eval_env or task.env_id, {} if eval_env else dict(task.env_kwargs)
    if not eval_env and not re.fullmatch(r"[\w/.-]+", str(name)):
        raise UserError(f"the data's environment {name!r}: no plain id; see --eval_env")
    if not eval_env and isinstance(task.max_episode_steps, int):
        kwargs["max_episode_steps"] = task.max_episode_steps
    where = f"--eval_env {name}" if eval_env else f"environment {name} (--eval_env)"
    with blaming(UserError, f"{where} cannot be made"), quiet():
        if ":" in name:
            sys.path.append(os.getcwd())  # where the user's module may be
        elif name not in gym.registry:
            import gymnasium_robotics  # slow to import, and rarely needed

            gym.register_envs(gymnasium_robotics)
        env = gym.make(name, disable_env_checker=True, **kwargs)
        check_spaces(env.observation_space, env.action_space)
        if not isinstance(env.observation_space, gym.spaces.Box):
            space = env.observation_space
            if "subspaces" in task.observation_space:
                space = recorded_space(task.observation_space)  # parts by names
            gym.spaces.flatten(space, env.observation_space.sample())
            flatten = partial(gym.spaces.flatten, space), gym.spaces.flatten_space(space)
            env = gym.wrappers.TransformObservation(env, *flatten)
    return env


class Simulator:
    """Evaluation environments of this process, made on first use, stepped together with
    one policy call per step."""

    def __init__(self, task: Task, config: TrainConfig):
        self.task, self.config, self.envs = task, config, {}

    def reset(self, r: int, i: int, seed: int) -> np.ndarray:
        """First observation of run r's i-th episode here."""
        if (r, i) not in self.envs:
            env = make_env(self.task, self.config.eval_env)
            if (env.spec and env.spec.max_episode_steps) is None:  # it might never end
                env = gym.wrappers.TimeLimit(env, self.task.longest)
            self.envs[r, i] = env
        return self.envs[r, i].reset(seed=seed)[0].ravel()

    def episodes(self, act, alive, seeds: List[int], noted=()):
        """Undiscounted returns, lengths and successes (NaN where the environment tells
        none), [R, n] each, of an episode of each live run from each seed; None if
        interrupted."""
        shape, n = (len(alive), len(seeds)), len(seeds)
        observations = np.zeros((*shape, self.task.observation_dim))
        rows = [*observations.reshape(len(alive) * n, -1)]  # views
        running = [r * n + i for r in np.flatnonzero(alive) for i in range(n)]
        for j in running:
            rows[j][:] = self.reset(*divmod(j, n), seeds[j % n])
        steps = {j: self.envs[divmod(j, n)].step for j in running}
        returns, lengths, t = [0.0] * len(rows), [0] * len(rows), 0
        successes = [math.nan] * len(rows)
        while running:
            if noted:
                return None
            actions = act(observations).reshape(-1, *self.task.action_shape)
            t += 1
            for j in running.copy():
                observation, reward, ended, cut, info = steps[j](actions[j])
                rows[j][:] = observation.ravel()
                returns[j] += float(reward)
                if info:
                    successes[j] = succeeded(info, successes[j])
                if ended or cut:
                    lengths[j] = t
                    running.remove(j)
        return [np.reshape(x, shape) for x in (returns, lengths, successes)]


def succeeded(info: dict, before: float) -> float:
    """1 once an episode's info has told of success, 0 if it tells of none, else NaN."""
    told = info.get("success", info.get("is_success"))
    return before if told is None else float(bool(told) or before == 1)


def serve(*arguments) -> None:
    """Make a process an evaluation worker, which ends with the one that it serves."""
    parent = multiprocessing.parent_process()
    watch = lambda: (parent.join(), os._exit(1))  # noqa: E731
    threading.Thread(target=watch, daemon=True).start()
    serve.simulator = Simulator(*arguments)


def served(*arguments):
    """`Simulator.episodes` in an evaluation worker."""
    return serve.simulator.episodes(*arguments)


class Evaluator:
    """Episodes of the policy as it is at a step: at once in this process, or, beside the
    training, in workers that share the episodes."""

    def __init__(self, task: Task, config: TrainConfig, device="cpu"):
        self.config, self.name = config, config.eval_env or task.env_id
        env = make_env(task, config.eval_env)
        space = action_bounds(env.action_space)
        task = dataclasses.replace(task, action_shape=space["action_shape"])
        dims = math.prod(env.observation_space.shape), len(space["action_low"])
        bounds = [space["action_low"], space["action_high"]]
        expected = [task.action_low, task.action_high]
        sizes = task.observation_dim, len(task.action_low), task.discrete
        if (*dims, space["discrete"]) != sizes or not np.allclose(bounds, expected):
            kind = "discrete actions" if space["discrete"] else "actions"
            here = f"{dims[0]} observations and {kind} in {bounds}"
            data = f"the data's, {sizes[0]} and {expected}"
            raise UserError(f"--eval_env {self.name}: {here} do not match {data}")
        arguments = task, config
        self.reference = None  # returns scored 0 and 100
        self.pending, self.simulator = None, Simulator(*arguments)
        n_workers = config.eval_workers
        if n_workers is None:  # on a CPU they would take training's cores
            on_gpu = torch.device(device).type == "cuda"
            mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
            cores = len(mine(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            n_workers = min(max(cores - 1, 0), 16) if on_gpu else 0
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # of the workers' NumPy
        options = multiprocessing.get_context("spawn"), serve, arguments
        n_workers = min(n_workers, config.n_episodes)
        self.workers = [ProcessPoolExecutor(1, *options) for _ in range(n_workers)]

    def start(self, agent, step: int, alive, noted: List[int]) -> None:
        """Begin the evaluation at a step, of which one may be pending; episode i starts
        alike in every run."""
        n, n_workers = self.config.n_episodes, len(self.workers)
        entropies = ([self.config.eval_seed, step, i] for i in range(n))
        states = (np.random.SeedSequence(each).generate_state(1) for each in entropies)
        act, seeds = agent.on_host(), [int(state[0]) for state in states]
        shares = [(act, alive, seeds[w::n_workers]) for w in range(n_workers)]
        pairs, futures = zip(self.workers, shares), [Future()]
        signals = {signal.SIGINT, signal.SIGTERM}  # workers inherit their blocking
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals if shares else ())
        try:
            if shares:
                futures = [worker.submit(served, *share) for worker, share in pairs]
            else:
                futures[0].set_result(self.simulator.episodes(act, alive, seeds, noted))
        except Exception as error:  # `finish` will raise it
            futures[0].set_exception(error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pending = step, alive, futures

    def finish(self, wait: bool):
        """The pending evaluation's step, [R] whether a run was alive, and undiscounted
        returns, lengths and successes, [R, n_episodes] each. None if there is none, if
        it was interrupted, or if it is not done and `wait` is not set. Raises
        MachineError."""
        if self.pending is None:
            return None
        step, alive, futures = self.pending
        if not wait and not all(future.done() for future in futures):
            return None
        self.pending, n = None, len(futures)
        with blaming(MachineError, f"{self.name} failed at update {step}"):
            parts = [future.result() for future in futures]
        if parts[0] is None:
            return None
        results = np.empty((3, len(alive), self.config.n_episodes))
        for w, part in enumerate(parts):
            results[:, :, w::n] = part
        return step, alive, *results

    def close(self) -> None:
        """Let the workers go, whatever they are at."""
        for worker in self.workers:
            for process in [*(worker._processes or {}).values()]:
                process.kill()
            worker.shutdown(wait=False, cancel_futures=True)


def regret(score: float, success: float) -> float:
    """How far short of the best: 1 - success rate, as published for AntMaze and Adroit,
    or, where the environment tells of no success, 1 - score / 100."""
    return 1 - (score / 100 if math.isnan(success) else success)


class Online:
    """The online phase: an environment for each run. An episode enters the replay when
    it ends, since its return-to-go (Cal-QL) is known only then."""

    def __init__(self, task: Task, config: TrainConfig, agent: Agent, replay: Replay):
        n = len(agent.runs)
        self.config, self.agent, self.replay, self.task = config, agent, replay, task
        self.simulator = Simulator(task, config)
        self.started, self.begun = False, [0] * n  # episodes
        self.steps = [[] for _ in range(n)]  # of the episode in progress
        self.observations = np.zeros((n, 1, task.observation_dim))
        self.success = [math.nan] * n
        self.finished = [[] for _ in range(n)]  # returns and successes since a row
        if config.record_dataset is not None:
            parent = Path(*recorded_place(config)).parent
            where = f"--record_dataset {config.record_dataset}"
            with blaming(UserError, where, OSError):
                parent.mkdir(parents=True, exist_ok=True)
        self.totals = np.zeros((n, 3))  # episodes, sums of their returns, successes
        self.recorded = []

    def act(self) -> np.ndarray:
        """Actions [R, A] of the policy, sampled; uniform while there is no batch."""
        if self.replay.ready():
            return self.agent.act(self.observations, deterministic=False)[:, 0]
        low, high = np.array([self.task.action_low, self.task.action_high])
        explorers = self.agent.explorers
        draws = [torch.rand(len(low), generator=g).numpy() for g in explorers]
        return (low + (high - low) * np.stack(draws)).astype(np.float32)

    def start(self) -> None:
        """What changes for the agent with the phase."""
        self.started = True
        if self.config.cql_alpha_online is not None:
            self.agent.sweep.cql_alpha.fill_(self.config.cql_alpha_online)

    def step(self, alive) -> None:
        """One environment step of every live run. Raises MachineError."""
        with blaming(MachineError, "the environment failed"):
            if not self.started:
                self.start()
            for r in np.flatnonzero(alive).tolist():
                if not self.steps[r]:
                    seed = self.agent.runs[r]["seed"]
                    sequence = np.random.SeedSequence([seed, 3, self.begun[r]])
                    seed = int(sequence.generate_state(1)[0])
                    self.observations[r, 0] = self.simulator.reset(r, 0, seed)
                    self.begun[r] += 1
                    self.success[r] = math.nan
            actions = self.act()
            for r in np.flatnonzero(alive).tolist():
                if np.isfinite(actions[r]).all():  # else it has diverged
                    self.step_one(r, actions[r])

    def step_one(self, r: int, action: np.ndarray) -> None:
        step, shape = self.simulator.envs[r, 0].step, self.task.action_shape
        observation, reward, ended, cut, info = step(action.reshape(shape))
        before = self.observations[r, 0].copy()
        self.steps[r].append((before, action, float(reward), bool(ended)))
        self.observations[r, 0] = observation.ravel()
        self.success[r] = succeeded(info, self.success[r])
        if ended or cut:
            episode = self.partial(r)
            self.keep(r, episode)
            total = float(episode[2].sum())
            self.finished[r].append((total, self.success[r]))
            self.totals[r] += 1, total, self.success[r]
            self.steps[r] = []

    def partial(self, r: int) -> List[Tensor]:
        """The episode in progress: [T + 1, O], [T, A], [T], [T]."""
        observations, *columns = zip(*self.steps[r])
        observations = np.stack([*observations, self.observations[r, 0]])
        return [torch.as_tensor(np.array(x)) for x in (observations, *columns)]

    def keep(self, r: int, episode: List[Tensor]) -> None:
        """Into the replay, and into what record_dataset will write."""
        self.replay.add(r, *episode)
        if self.config.record_dataset is not None:
            self.recorded.append(episode)

    def metrics(self, r: int, reference, reset: bool) -> Dict[str, float]:
        """Of the episodes that ended since the last row, and regret of all so far."""
        mean, rate = np.mean(self.finished[r] or [[math.nan] * 2], 0).tolist()
        count, *sums = self.totals[r]
        total, success = (x / count if count else math.nan for x in sums)
        self.finished[r] = [] if reset else self.finished[r]
        return {
            "train_return": mean,
            "train_score": normalized_score(mean, reference),
            "train_success": rate,
            "train_regret": regret(normalized_score(total, reference), success),
        }

    def state(self) -> dict:
        partial = [self.partial(r) if x else None for r, x in enumerate(self.steps)]
        state = {"totals": self.totals.tolist(), "replay": self.replay.state()}
        names = ("started", "begun", "finished", "recorded")
        return {**{k: getattr(self, k) for k in names}, **state, "partial": partial}

    def load(self, state: dict) -> None:
        """Episodes that were in progress end where the checkpoint found them."""
        if state["started"]:
            self.start()
        self.replay.load(state["replay"])
        names, n = ("begun", "finished", "partial"), len(self.agent.runs)
        fours = all(len(episode) == 4 for episode in state["recorded"])
        if not fours or any(len(state[name]) != n for name in names):
            raise ValueError("an online state of other runs")
        self.begun, self.recorded = state["begun"], state["recorded"]
        self.totals = np.reshape(state["totals"], (n, 3))
        self.finished = [[(x, y) for x, y in each] for each in state["finished"]]
        before = sum(len(episode[2]) for episode in self.recorded)
        if self.config.record_dataset and before < int(self.replay.added.sum()):
            say("record_dataset: the episodes before this resume are not recorded")
        for r, episode in enumerate(state["partial"]):
            if episode is not None:
                self.keep(r, episode)

    def write(self, reference) -> None:
        """Write the recorded episodes, cut ones included, as a Minari dataset. Raises
        MachineError."""
        root, name = recorded_place(self.config)
        path = (root / name).resolve()
        self.recorded += [self.partial(r) for r, steps in enumerate(self.steps) if steps]
        if not self.recorded:
            return say("recorded: nothing, as no run got online")
        steps = sum(len(episode[2]) for episode in self.recorded)
        if path.exists():  # by this run, when it ended before?
            metadata = (path / "data" / "metadata.json").read_text()
            there = json.loads(metadata)["total_steps"]
            if there == steps:
                return say(f"recorded: {path} exists already")
            hint = "move it away and repeat the command"
            raise MachineError(f"{path} holds {there} steps, this run {steps}: {hint}")
        env, buffers = make_env(self.task, self.config.eval_env), []
        spec = copy.deepcopy(env.spec)
        spec.additional_wrappers = ()  # what flattens cannot be written
        space = recorded_space(self.task.observation_space)
        for observations, actions, rewards, ended in self.recorded:
            cut = torch.zeros_like(ended)
            cut[-1] = not ended[-1]
            columns = {"rewards": rewards, "terminations": ended, "truncations": cut}
            columns |= {"actions": actions.reshape(-1, *self.task.action_shape)}
            columns = {key: column.numpy() for key, column in columns.items()}
            parts = [gym.spaces.unflatten(space, row) for row in observations.numpy()]
            empty = gym.vector.utils.create_empty_array(space, len(parts))
            parts = gym.vector.utils.concatenate(space, parts, empty)
            buffers.append(EpisodeBuffer(observations=parts, infos={}, **columns))
        options = {"env": spec, "algorithm_name": "CQL, cql.py"}
        options |= {"observation_space": space, "action_space": env.action_space}
        options |= zip(("ref_min_score", "ref_max_score"), reference or ())
        try:
            place = {"MINARI_DATASETS_PATH": str(root.resolve())}
            with mock.patch.dict(os.environ, place), quiet():
                minari.create_dataset_from_buffers(name, buffers, **options)
        except Exception as error:
            shutil.rmtree(path, ignore_errors=True)  # it was not there before
            raise MachineError(f"could not write {path}: {brief(error)}") from None
        say(f"recorded: {len(buffers)} episodes, {steps:,} steps, in {path}")


def reference_returns(task: Task, env_name: str) -> Optional[List[float]]:
    """Returns scored 0 and 100: the dataset's own, else D4RL's by environment, unless
    its settings pay other returns than D4RL's."""
    recorded = env_name == task.env_id
    if task.reference is not None and (recorded or task.env_id is None):
        return task.reference
    kwargs = task.env_kwargs if recorded else {}
    endless = "AntMaze" in env_name and kwargs.get("continuing_task", True)
    if endless or not kwargs.get("remove_task_when_completed", True):
        setting = "continuing_task" if endless else "remove_task_when_completed"
        return say(f"scores: none, as D4RL's do not hold for {env_name}'s {setting}")
    for pattern, reference in REFERENCE_RETURNS.items():
        if re.fullmatch(pattern, env_name):
            say(f"scores: by D4RL's returns for {env_name}; the data records none")
            return list(reference)
    if task.reference is not None:
        say(f"scores: by the data's reference returns, which are {task.env_id}'s")
        return task.reference
    return say(f"scores: none, as no reference returns are known for {env_name}")


def normalized_score(returns, reference) -> float:
    """100 * (mean return - low) / (high - low), as D4RL; NaN without a reference."""
    low, high = reference or (math.nan, math.nan)
    return 100 * (float(np.mean(returns)) - low) / (high - low)


# ======================================================================================
# Logging and checkpoints
# ======================================================================================

VERSION = 4  # of the checkpoint's layout
NATURAL, FROM_NONE = range(2**63), range(-1, 2**63)
LAYOUT = dict(  # see check_layout
    kind=str,
    config=dict,
    task=dict,
    runs=[dict],
    phase=str,
    step=NATURAL,
    transitions=NATURAL,
    evaluated=FROM_NONE,
    diverged=[FROM_NONE],
    warned=[bool],
    wandb_ids=[str],
    agent={"_extra_state": dict(step=NATURAL, optimizer={}, generators=[Tensor])},
    updater=dict(used=NATURAL, block=NATURAL, generators=([Tensor],)),
    metrics=dict(names=[str], count=NATURAL, sums=(Tensor,), broken=(Tensor,)),
    online=(
        dict(
            started=bool,
            begun=[NATURAL],
            totals=[[float]],
            finished=[[tuple]],
            partial=[([Tensor],)],
            recorded=[[Tensor]],
            replay=dict(own=[Tensor], added=Tensor),
        ),
    ),
)


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
        kept = "; the checkpoint before it is intact" * path.exists()
        reason = brief(error.__context__ or error)
        raise MachineError(f"could not save {path}: {reason}{kept}") from None


def read_checkpoint(path: Union[str, Path]) -> dict:
    """A checkpoint, or a run directory's, as tensors and plain values; no code in it
    runs. Raises UserError."""
    try:
        path = Path(path, "checkpoint.pt") if os.path.isdir(path) else path
        written = os.stat(path).st_mtime_ns
        if zipfile.ZipFile(path).testzip():  # torch checks no checksums
            raise RuntimeError
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path}: cannot be read: {brief(error)}") from None
    except Exception:  # torch's own words advise to let it run code
        raise UserError(f"checkpoint {path}: damaged, or not one of cql.py's") from None
    if not isinstance(payload, dict) or payload.get("format") != "cql.py":
        raise UserError(f"checkpoint {path}: not one of cql.py's")
    version = payload.get("version")
    if version != VERSION:
        raise UserError(f"checkpoint {path}: of version {version}, not {VERSION}")
    with blaming(UserError, f"checkpoint {path}: garbled"):
        check_layout(payload, LAYOUT)
        config = pyrallis.decode(TrainConfig, payload["config"])
        task = pyrallis.decode(Task, payload["task"])
        check_spaces(recorded_space(task.observation_space), gym.spaces.Discrete(2))
        n_low, n_high = len(task.action_low), len(task.action_high)
        if n_low != n_high or not n_low:
            raise ValueError("bounds that do not go together")
        runs = [run for run in product_of_runs(config) if run in payload["runs"]]
        if not runs or runs != payload["runs"]:
            raise ValueError("runs that are not its config's")
        n_out = int(task.action_high[0] - task.action_low[0]) + 1 if task.discrete else 1
        pattern, agent = re.compile(r"critic\.layers\.\d+\.bias"), payload["agent"]
        shapes = [[*agent[key].shape] for key in agent if pattern.fullmatch(key)]
        hidden = [len(runs), config.n_critics, 1, config.hidden_dim]
        shape = [hidden] * min(config.q_n_hidden_layers, len(shapes))
        if shapes != [*shape, [*hidden[:3], n_out]]:  # found before any is made
            raise ValueError("critics that are not its config's")
    plain = {"config": dataclasses.asdict(config), "task": dataclasses.asdict(task)}
    return {**payload, **plain, "runs": runs, "path": str(path), "written": written}


def check_layout(value, layout, name: str = "") -> None:
    """Raise ValueError unless value is as the layout says: of a type, an int in a range,
    a list of one layout, a dictionary with these keys, or, in a tuple, maybe None."""
    if isinstance(layout, tuple):
        return None if value is None else check_layout(value, layout[0], name)
    if isinstance(layout, range):
        fits = type(value) is int and value in layout
    else:
        fits = isinstance(value, layout if isinstance(layout, type) else type(layout))
    if not fits:
        raise ValueError(f"{name} is {brief(repr(value))}")
    if isinstance(layout, dict):
        for key in layout:
            inner = f"{name} {key}".strip()
            if key not in value:
                raise ValueError(f"no {inner}")
            check_layout(value[key], layout[key], inner)
    for each in value if isinstance(layout, list) else ():
        check_layout(each, layout[0], name)


def load_agent(agent: nn.Module, checkpoint: dict) -> None:
    """Copy a checkpoint's state into the agent. Raises UserError."""
    kind, where = type(agent).__name__, f"checkpoint {checkpoint['path']}"
    if checkpoint["kind"] != kind:
        raise UserError(f"{where}: holds a {checkpoint['kind']}, not a {kind}")
    try:
        agent.load_state_dict(checkpoint["agent"])
    except Exception as error:  # torch has many for what does not fit
        saved, now = checkpoint["config"], vars(agent.config)
        other = [f"its --{k} is {saved[k]}" for k in INHERITED if saved[k] != now[k]]
        n, n_here = len(checkpoint["runs"]), len(agent.runs)
        other += [f"it holds {n} of the runs, not {n_here}"] * (n != n_here)
        reason = ", ".join(other) or brief(error)
        raise UserError(f"{where}: of another shape: {reason}") from None


def load_policy(path: Union[str, Path], run: int = 0, device: str = "cpu"):
    """A checkpoint's policy for use: a function of a raw observation [O], several
    [n, O], or the environment's dictionary, that returns an environment action (sampled
    with deterministic=False). Its attributes are the agent and the task. Raises
    UserError."""
    checkpoint = read_checkpoint(path)
    config, task = TrainConfig(**checkpoint["config"]), Task(**checkpoint["task"])
    agent = make_agent(config, task, device, runs=checkpoint["runs"])
    load_agent(agent, checkpoint)
    space, n_runs = recorded_space(task.observation_space), len(agent.runs)
    numbers = [each["run"] for each in agent.runs]
    if run not in numbers:
        raise UserError(f"checkpoint {path}: holds runs {numbers}, no {run}")

    def policy(observation, deterministic: bool = True) -> np.ndarray:
        whole = isinstance(observation, (dict, tuple))
        if whole or np.shape(observation) == space.shape:  # a matrix, maybe
            observation = gym.spaces.flatten(space, observation)
        one = np.ndim(observation) == 1
        everywhere = np.stack([np.atleast_2d(observation)] * n_runs)  # [R, n, O]
        actions = agent.act(everywhere, deterministic)[numbers.index(run)]
        actions = actions.reshape(-1, *task.action_shape)
        return actions[0] if one else actions

    policy.agent, policy.task = agent, task
    return policy


class Table:
    """A CSV file that only grows, but for what a resumed run will write again."""

    def __init__(self, directory: Optional[Path], name: str):
        self.path, self.names = directory and directory / name, []

    def keep(self, last: int, columns: Tuple[str, ...] = ()) -> List[dict]:
        """Drop the rows of steps after `last` and a torn line, and add columns that are
        new; return the rows left."""
        if self.path is None or not self.path.exists():
            return []
        header, *lines = self.path.read_text().splitlines(keepends=True) or [""]
        if not header.startswith("step,"):
            raise UserError(f"{self.path}: not a table of cql.py's")
        rows = list(csv.DictReader([header, *lines]))
        whole = [None not in row.values() and int(row["step"]) <= last for row in rows]
        temporary = self.path.with_suffix(".tmp")
        lines = list(itertools.compress(lines, whole))
        if columns and not header.endswith(",".join(("", *columns)) + "\n"):
            empty = "," * len(columns)
            header = header.rstrip() + empty[:1] + ",".join(columns) + "\n"
            lines = [line.rstrip() + empty + "\n" for line in lines]
        temporary.write_text("".join([header, *lines] if lines else []))
        os.replace(temporary, self.path)
        self.names = header.rstrip().split(",") if lines else []
        return list(itertools.compress(rows, whole))

    def append(self, rows: List[dict]) -> None:
        """Write rows through to the disk; floats with 8 digits, NaN as nothing."""
        if self.path is None or not rows:
            return
        with blaming(MachineError, f"could not write {self.path}", OSError):
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    writer.writerow(rows[0])
                for row in ({**dict.fromkeys(self.names), **row} for row in rows):
                    floats = {k: f"{v:.8g}" for k, v in row.items() if type(v) is float}
                    values = {**row, **floats}.values()
                    writer.writerow("" if value == "nan" else value for value in values)
                file.flush()
                os.fsync(file.fileno())


def merge_tables(directory: Path) -> None:
    """Join the tables of the ranks, whose directories this one holds."""
    with holding(directory, wait=True):
        for name in ("metrics.csv", "evaluations.csv"):
            paths = (directory / f"rank{r}" / name for r in range(rank_and_ranks()[1]))
            texts = [path.read_text() for path in paths if path.exists()]
            tables = [text.splitlines(keepends=True) for text in texts if text]
            rows = [row for table in tables for row in table[1:] if row.endswith("\n")]
            rows.sort(key=lambda row: [int(number) for number in row.split(",")[:2]])
            temporary = directory / f"{name}.tmp"
            temporary.write_text("".join([*tables[0][:1], *rows] if tables else []))
            os.replace(temporary, directory / name)


class Metrics:
    """Sums on the device; they cross to the host when a row is due, not before."""

    def __init__(self):
        self.names, self.sums, self.count = [], None, 0
        self.broken = None  # [R, columns] bool: what was not finite first

    def add(self, metrics: Dict[str, Tensor]) -> None:
        columns = [v if v.ndim == 2 else v.unsqueeze(1) for v in metrics.values()]
        values = torch.cat(columns, 1)  # [R, columns]
        if self.sums is None:
            self.sums = torch.zeros_like(values, dtype=torch.float64)
            self.broken = torch.zeros_like(values, dtype=torch.bool)
            for name, column in zip(metrics, columns):
                js = range(1, 1 + column.shape[1])
                self.names += [name.replace("{j}", str(j)) for j in js]
        self.sums += values
        # An update later all else is not finite either.
        self.broken |= ~values.isfinite() & ~self.broken.any(1, keepdim=True)

    def load(self, state: dict, n_runs: int, device) -> None:
        """The sums of a checkpoint, which is `vars` of them."""
        vars(self).update(state)
        if self.sums is not None:
            shape = n_runs, len(self.names)
            self.sums = self.sums.reshape(shape).to(device, torch.float64)
            self.broken = self.broken.reshape(shape).to(device, torch.bool)

    def means(self) -> List[Dict[str, float]]:
        """Interval means, one dict per run."""
        rows = [] if self.sums is None else (self.sums / max(self.count, 1)).tolist()
        return [dict(zip(self.names, row)) for row in rows]


class WandbLogger:
    """One wandb run per stacked run; under a sweep agent, which has already chosen an
    id, one for them all."""

    def __init__(self, config: TrainConfig, directory, runs: List[dict], ids: List[str]):
        self.trackers, self.ids, self.sweep = [], ids, "WANDB_SWEEP_ID" in os.environ
        mode = os.environ.get("WANDB_MODE", "online").replace("dryrun", "offline")
        if directory is None:
            return
        if mode == "disabled":
            return say("wandb: disabled")
        try:
            with quiet():
                known = self.sweep or mode == "offline" or wandb.login(prompt=False)
        except wandb.errors.Error as error:  # a malformed key, or no network
            say(f"wandb: {brief(error)}")
            known, mode = True, "offline"
        if not known:
            return say("wandb: no account here (`wandb login`), not logging to it")
        runs = [{}] if self.sweep else runs
        fresh = ids if len(ids) == len(runs) else [uuid.uuid4().hex[:8] for _ in runs]
        self.ids = [os.environ["WANDB_RUN_ID"]] if self.sweep else fresh
        ranked = rank_and_ranks()[1] > 1
        base = (directory.parent if ranked else directory).name
        several = ranked or len(runs) > 1
        same = {"project": config.project, "group": config.group, "dir": str(directory)}
        same |= {"resume": "allow", "reinit": "create_new"}
        for run, key in zip(runs, self.ids):
            name = f"{base}-{run['run']}" if several else base
            options = same | {"name": name, "id": key, "config": {**vars(config), **run}}
            settings = wandb.Settings(silent=True, init_timeout=20, finish_timeout=60)
            try:
                self.trackers.append(wandb.init(mode=mode, settings=settings, **options))
            except wandb.errors.Error as error:
                say(f"wandb: {brief(error)}")
                mode = "offline"
                self.trackers.append(wandb.init(mode=mode, settings=settings, **options))
        where = " ".join(str(tracker.url) for tracker in self.trackers)
        if mode == "offline":
            where = f"`wandb sync {directory}/wandb/offline-run-*` uploads"
        say(f"wandb: {mode}; {where}")

    def log(self, step: int, rows: Dict[int, dict], **more) -> None:
        """rows: the metrics of each live run; more: what all runs share."""
        if self.sweep and rows:
            joined = {f"{k}/{r}": v for r, row in rows.items() for k, v in row.items()}
            scores = [row.get("d4rl_normalized_score", np.nan) for row in rows.values()]
            if not np.isnan(scores).any():
                joined["d4rl_normalized_score"] = float(np.mean(scores))
            rows = {0: joined}
        with self.dispensable():
            for r, row in rows.items() if self.trackers else ():
                self.trackers[r].log({**row, **more}, step=step)

    def finish(self) -> None:
        with self.dispensable():
            for tracker in self.trackers:
                tracker.finish()

    @contextmanager
    def dispensable(self):
        """Without wandb, should it fail, training goes on."""
        try:
            yield
        except Exception as error:
            self.trackers = []
            say(f"wandb: {brief(error)}; not logging to it any longer")


def run_directory(config: TrainConfig) -> Optional[Path]:
    """The run's directory: `resume`'s, or a new one under checkpoints_path."""
    if config.resume or config.checkpoints_path is None:
        return config.resume and Path(config.resume)
    names = config.env or config.eval_env
    names = names if isinstance(names, list) else [names]
    names = (re.sub(r"\.hdf5$|^[./]+", "", name).split("/") for name in names)
    label = "+".join("-".join(parts[-3:]) for parts in names)
    safe = re.sub(r"[^\w.+-]+", "-", f"{config.name}-{label}").strip(".-")[:120]
    return Path(config.checkpoints_path) / f"{safe}-{uuid.uuid4().hex[:8]}"


@contextmanager
def holding(directory: Path, wait: bool):
    """Make the directory and hold its lock. Raises BlockingIOError if another process
    does and `wait` is not set."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as file:  # NFS locks no directory
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@contextmanager
def locked(directory: Optional[Path]):
    """Hold a run's directory, while this process lives at most. Raises UserError."""
    with ExitStack() as stack:
        try:
            if directory is not None:
                stack.enter_context(holding(directory, wait=False))
        except BlockingIOError:
            raise UserError(f"{directory}: in use by another live process") from None
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {brief(error)}") from None
        yield


@contextmanager
def noted_signals():
    """The SIGINTs and SIGTERMs so far; the loop saves and stops at its next update. A
    Ctrl-C after the first is not held back."""
    noted, previous = [], {}

    def note(number, _):
        noted.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """What a training leaves behind: tables, evaluations, checkpoints, wandb, lines."""

    CHECKPOINT_SECONDS = 300
    SAVED = ("step", "evaluated", "diverged", "warned")
    ONLINE = {  # the last columns, where there is an online phase
        "metrics": ("train_return", "train_score", "train_success", "train_regret"),
        "evaluations": ("success_rate", "eval_regret"),
    }

    def __init__(self, config, agent, task: Task, data, evaluator, directory):
        self.config, self.agent, self.task = config, agent, task
        self.evaluator, self.directory = evaluator, directory
        self.q_range = data.q_range if data else math.inf
        self.transitions = len(data) if data else 0
        self.metrics, self.online = Metrics(), None
        self.offline = offline_updates(config)
        replay = Replay(config, data, agent, agent.device)
        self.updater = Updater(agent, replay, self.metrics)
        if config.online_iterations > 0:
            self.online = Online(task, config, agent, replay)
        self.step, self.evaluated = 0, -1
        self.numbers = [run["run"] for run in agent.runs]  # under torchrun not 0, 1, ...
        self.diverged = [-1] * len(agent.runs)  # update by which a run went non-finite
        self.warned = [False] * len(agent.runs)  # of Q running away
        self.started = self.saved_at = self.logged_at = time.monotonic()
        self.seconds = {"evaluation_seconds": 0.0, "checkpoint_seconds": 0.0}

    def open(self, checkpoint: Optional[dict], total: int) -> None:
        """Take up a resumed run's state, or start anew; then write the first files."""
        ids, every = [], {"log_freq": 1, "eval_freq": 1}
        if checkpoint:
            ids, every = checkpoint["wandb_ids"], checkpoint["config"]
            with blaming(UserError, f"checkpoint {checkpoint['path']}: garbled"):
                self.take_up(checkpoint)
        self.logged_step, self.tables, kept = self.agent.step, {}, {}
        freqs = {"metrics": "log_freq", "evaluations": "eval_freq", "timing": "log_freq"}
        for name, freq in freqs.items():
            # A last row between two regular ones goes when the run is made longer.
            extra = total > self.step and self.step % every[freq] > 0
            if name == "evaluations" and self.step == self.offline:
                extra = False  # the offline phase's last one stays
            self.tables[name] = Table(self.directory, f"{name}.csv")
            # So does one whose evaluation the checkpoint does not know to be done.
            again = name == "evaluations" or self.metrics.count > 0
            again = again and self.evaluated < self.step
            last = self.step - (extra or again) if checkpoint else -1
            columns = self.ONLINE.get(name, ()) if self.online else ()
            kept[name] = self.tables[name].keep(last, columns)
        self.evaluations = kept["evaluations"]
        if self.directory is not None:
            config = {**dataclasses.asdict(self.config), "resume": None}
            text = yaml.safe_dump(config, sort_keys=False)
            (self.directory / "config.tmp").write_text(text)
            os.replace(self.directory / "config.tmp", self.directory / "config.yaml")
            if Path(__file__).resolve() != (self.directory / "cql.py").resolve():
                shutil.copyfile(__file__, self.directory / "cql.py")
        self.wandb = WandbLogger(self.config, self.directory, self.agent.runs, ids)

    def take_up(self, checkpoint: dict) -> None:
        """The state of a run to go on with, but for its agent's."""
        vars(self).update({name: checkpoint[name] for name in self.SAVED})
        if not len(self.diverged) == len(self.warned) == len(self.agent.runs):
            raise ValueError("diverged or warned of other runs")
        self.metrics.load(checkpoint["metrics"], len(self.agent.runs), self.agent.device)
        self.updater.load(checkpoint["updater"])
        if checkpoint["online"] is not None and self.online is not None:
            self.online.load(checkpoint["online"])

    def advance(self) -> None:
        """An update, or online a step of the environments and utd updates."""
        n = 1
        if self.step >= self.offline:
            self.online.step(self.alive())
            n = self.config.utd if self.updater.data.ready() else 0
        for _ in range(n):
            self.updater()
        self.step += 1

    def alive(self) -> np.ndarray:
        """[R] bool: the runs that have not diverged."""
        return np.array(self.diverged) < 0

    def check_finite(self) -> Dict[int, Dict[str, float]]:
        """Metric means of the live runs; one in which a mean is not finite stops."""
        rows = {r: row for r, row in enumerate(self.metrics.means()) if self.alive()[r]}
        for r in list(rows):
            broken = list(itertools.compress(self.metrics.names, self.metrics.broken[r]))
            finite = (w[r].isfinite().all() for w in self.agent.parameters())
            if not broken and not all(finite):
                broken = ["a weight"]
            if broken:
                del rows[r]
                self.diverged[r] = self.step
                where = f"run {self.numbers[r]} diverged by update {self.step}"
                more = ", ..." * (len(broken) > 4)
                say(f"{where}: first {', '.join(broken[:4])}{more} not finite")
        return rows

    def log(self, reset: bool = True) -> None:
        """A row of metrics.csv per live run: means since the last regular one."""
        rows, reference = self.check_finite(), self.reference()
        for r, row in rows.items() if self.online else ():
            row.update(self.online.metrics(r, reference, reset))
        table = [{"step": self.step, "run": self.numbers[r], **rows[r]} for r in rows]
        self.tables["metrics"].append(table)
        self.wandb.log(self.step, rows)
        if self.metrics.count and not (self.online and self.online.started):
            for r, row in rows.items():  # online, rewards unlike the data's may come
                self.warn_of_drift(r, row)
        now = time.monotonic()
        rate = (self.agent.step - self.logged_step) / max(now - self.logged_at, 1e-9)
        timing = {"seconds": now - self.started, "updates_per_s": rate, **self.seconds}
        self.tables["timing"].append([{"step": self.step, **timing}])
        self.logged_at, self.logged_step = now, self.agent.step
        if reset and self.metrics.sums is not None:
            self.metrics.sums.zero_()
            self.metrics.count = 0

    def warn_of_drift(self, r: int, means: Dict[str, float]) -> None:
        """Say once when Q of the policy's actions exceeds what rewards allow."""
        names = ("cql_q{}_current_actions", "average_qf{}")
        js, nan = range(1, self.config.n_critics + 1), math.nan  # a fork's may lack one
        lists = ([means.get(name.format(j), nan) for j in js] for name in names)
        policy, data = map(np.mean, lists)
        if max(policy, policy - data) > self.q_range and not self.warned[r]:
            self.warned[r] = True
            here = f"{policy:.4g} for the policy's actions, {data:.4g} for the data's"
            here += f", and rewards allow {self.q_range:.4g}"
            hint = "Poor returns follow; a larger cql_alpha holds Q down"
            say(f"run {self.numbers[r]}: Q runs away: {here}. {hint}")

    def evaluate(self, noted: List[int]) -> None:
        """Evaluate the present policy, maybe beside the updates that follow."""
        self.collect(wait=True)
        self.check_finite()
        if self.evaluator is None or not self.alive().any():
            self.evaluated = self.step
            return self.checkpoint()
        before = time.monotonic()
        self.evaluator.start(self.agent, self.step, self.alive(), noted)
        self.seconds["evaluation_seconds"] += time.monotonic() - before

    def collect(self, wait: bool) -> None:
        """Rows of evaluations.csv, one line on the terminal and a checkpoint, once an
        evaluation is done."""
        before = time.monotonic()
        done = self.evaluator and self.evaluator.finish(wait)
        if not done:
            return
        self.seconds["evaluation_seconds"] += time.monotonic() - before
        step, alive, *results = done
        self.evaluated, reference, rows, table = step, self.evaluator.reference, {}, []
        for r in np.flatnonzero(alive).tolist():
            returns, lengths, successes = (result[r] for result in results)
            rows[r] = {
                "return_mean": float(returns.mean()),
                "return_std": float(returns.std()),
                "length_mean": float(lengths.mean()),
                "d4rl_normalized_score": normalized_score(returns, reference),
            }
            if self.online:
                rows[r] = self.online_results(r, step, rows[r], successes)
            keys = {"step": step, **self.agent.runs[r]}
            table.append({**keys, "episodes": len(returns), **rows[r]})
        self.tables["evaluations"].append(table)
        self.evaluations += table
        if reference is None:
            for row in rows.values():
                del row["d4rl_normalized_score"]
        self.wandb.log(self.step, rows, evaluation_step=step)
        returns = [f"{e['return_mean']:.0f} +- {e['return_std']:.0f}" for e in table]
        scores = [e["d4rl_normalized_score"] for e in table]
        text = f"update {step:>9,}  return {' | '.join(returns)}"
        if reference is not None:
            text += "  score " + " | ".join(f"{score:.1f}" for score in scores)
            text += f" (mean {np.mean(scores):.1f})" if len(scores) > 1 else ""
        say(text)
        self.checkpoint()

    def reference(self):
        """Returns scored 0 and 100, if known."""
        return self.evaluator.reference if self.evaluator else self.task.reference

    def online_results(self, r: int, step: int, row: dict, successes) -> dict:
        """The row with success rate, and regret of the online phase's evaluations."""
        row, first = {**row, "success_rate": float(successes.mean())}, self.offline
        mine = [e for e in self.evaluations if int(e["run"]) == self.numbers[r]]
        mine = [e for e in (*mine, {"step": step, **row}) if int(e["step"]) > first]
        means = []
        for column in ("d4rl_normalized_score", "success_rate"):
            values = [float(e[column]) for e in mine if e[column] != ""]
            means.append(float(np.mean(values)) if values else math.nan)
        return {**row, "eval_regret": regret(*means)}

    def checkpoint(self) -> None:
        """Write checkpoint.pt. A diverged run keeps its last finite state there; when
        none is left alive the file stays as it is."""
        if self.evaluator and self.evaluator.pending:  # no checkpoint can hold it
            return self.collect(wait=True)
        self.check_finite()
        if self.directory is None or not self.alive().any():
            return
        before, path = time.monotonic(), self.directory / "checkpoint.pt"
        payload = {
            "format": "cql.py",
            "version": VERSION,
            "kind": type(self.agent).__name__,
            "config": dataclasses.asdict(self.config),
            "task": dataclasses.asdict(self.task),
            "agent": self.agent.state_dict(),
            "runs": self.agent.runs,
            "phase": "online" if self.online and self.online.started else "offline",
            "online": self.online.state() if self.online else None,
            "metrics": vars(self.metrics),
            "updater": self.updater.state(),
            "transitions": self.transitions,
            "wandb_ids": self.wandb.ids,
            **{name: getattr(self, name) for name in self.SAVED},
        }
        if not self.alive().all() and path.exists():
            dead = torch.as_tensor(np.flatnonzero(~self.alive()))
            keep_slices(payload["agent"], read_checkpoint(path)["agent"], dead)
        save_checkpoint(path, payload)
        if rank_and_ranks()[1] > 1:
            merge_tables(self.directory.parent)
        self.saved_at = time.monotonic()
        self.seconds["checkpoint_seconds"] += self.saved_at - before

    def summary(self) -> None:
        """The closing table: last and best evaluation of each run, and the files."""
        scored = self.evaluator is not None and self.evaluator.reference is not None
        column = "d4rl_normalized_score" if scored else "return_mean"
        lists = (k for k in SWEPT[2:] if isinstance(getattr(self.config, k), list))
        names = [*SWEPT[:2], *lists]
        head = " ".join(f"{name:>9}" for name in (*names, "last", "best"))
        say(f" run {head}  {column}")
        for r, run in enumerate(self.agent.runs):
            mine = [e[column] for e in self.evaluations if int(e["run"]) == run["run"]]
            values = [float(value) for value in mine if value != ""]
            ends = (values[-1], max(values)) if values else ()
            last, best = [f"{value:.2f}" for value in ends] or "--"
            note = f"  diverged by {self.diverged[r]}" if self.diverged[r] >= 0 else ""
            texts = [str(run["seed"]), *(f"{run[name]:g}" for name in names[1:])]
            keys = " ".join(f"{t:>{max(9, len(n))}}" for t, n in zip(texts, names))
            say(f"{run['run']:>4} {keys} {last:>9} {best:>9}{note}")
        say(f"files: {self.directory or 'none'}")


def keep_slices(new: dict, old: dict, dead: Tensor) -> None:
    """Put old tensors' slices of the dead runs into new; what has no run dimension
    (observation statistics, Adam's counts) is the same in both or a scalar."""
    for key, value in new.items():
        if isinstance(value, dict):
            keep_slices(value, old[key], dead)
        elif isinstance(value, Tensor) and value.ndim and len(value) > dead.max():
            new[key] = value.clone()
            new[key][dead] = old[key][dead].to(value.device)


# ======================================================================================
# Training
# ======================================================================================


def describe(config, task: Task, data: Optional[Dataset], evaluator, device) -> None:
    """The opening lines, warnings included; settles the reference returns."""
    if evaluator is None:
        say("no environment recorded, no --eval_env: training without evaluation, Q on")
        say("  the data's, the policy's and uniform actions is in metrics.csv")
    else:
        evaluator.reference = reference_returns(task, evaluator.name)
    if data is not None:
        reference = evaluator.reference if evaluator else task.reference
        score = normalized_score(data.returns, reference)
        score = "" if math.isnan(score) else f" (score {score:.1f})"
        cuts = f" ({data.left_out:,} left out, of unknown next observations)"
        size = f"{len(data):,} transitions{cuts * bool(data.left_out)}"
        size += f", {len(data.lengths):,} episodes"
        say(f"data: {size}, mean return {data.returns.mean():.1f}{score}")
    changed = {k for k, v in vars(config).items() if v != FIELDS[k].default}
    changed -= {"precision"} if config.precision == "tf32" else set()
    for name in sorted({"mixing_ratio", "is_sparse_reward"} & changed):
        if not config.cal_ql:
            say(f"{name} is set and cal_ql is not: this is CQL, not Cal-QL")
    for name in sorted(changed.intersection(CONTINUOUS)) if task.discrete else ():
        say(f"{name} has no effect on discrete actions")
    chip = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    native = chip.get("avx512_bf16", True) or chip.get("amx_bf16", True)
    if config.precision == "bf16" and not (task.discrete or native):
        say("precision bf16 is slower than fp32 here: this CPU has no avx512_bf16")
    gaps = [run["cql_target_action_gap"] for run in product_of_runs(config)]
    if config.cql_lagrange and min(gaps) < 0:
        say("cql_target_action_gap < 0 with cql_lagrange is a real target, not 'off':")
        say("  it pushes Q of the data above the soft maximum")
    elif "cql_target_action_gap" in changed:
        say("cql_target_action_gap has no effect without cql_lagrange")
    for name in ("buffer_size", "cql_alpha_online", "utd"):
        if config.online_iterations == 0 and name in changed:
            say(f"{name} has no effect offline")
    if 0 < offline_updates(config) + config.online_iterations <= config.bc_steps:
        say("bc_steps covers every update: this clones behaviour, and Q plays no part")
    if config.cal_ql and not np.any(config.cql_alpha):
        say("cal_ql has no effect with cql_alpha 0")
    if config.checkpoints_path is None and not config.resume:
        say("checkpoints_path is null: nothing will be written")


def load(config: TrainConfig, checkpoint: Optional[dict], resumed: bool, device):
    """Data (None where none is needed), task, evaluator (None without an environment)
    and agent, as the checkpoint has it. Raises UserError."""
    same = checkpoint and checkpoint["config"]["env"] == config.env
    nothing = same and offline_updates(config) == config.online_iterations == 0
    if config.env is None or nothing:
        data = None
        task = Task(**checkpoint["task"]) if checkpoint else task_of(config.eval_env)
    else:
        data = Dataset(config, device)
        task = data.task
        if resumed and checkpoint["transitions"] not in (0, len(data)):
            was = f"{len(data)} transitions; the run had {checkpoint['transitions']}"
            raise UserError(f"--env {config.env}: {was}")
    has_env = task.env_id or config.eval_env
    evaluator = Evaluator(task, config, device) if has_env else None
    if config.online_iterations > 0 and evaluator is None:
        raise UserError("--online_iterations: no environment; name an --eval_env")
    if config.online_iterations > 0 and task.discrete:
        raise UserError("--online_iterations: not yet for discrete actions")
    statistics = data.statistics() if data and config.normalize else (0.0, 1.0)
    runs = share_of_runs(config, checkpoint, resumed)
    agent = make_agent(config, task, device, statistics, runs)
    if checkpoint:
        load_agent(agent, checkpoint)
        bounds = task.action_low, task.action_high
        old = checkpoint["task"]["action_low"], checkpoint["task"]["action_high"]
        if old != bounds:
            where = f"checkpoint {checkpoint['path']}"
            raise UserError(f"{where}: action bounds {old}, here {bounds}")
        if not resumed:
            agent.restart()
    return data, task, evaluator, agent


def train(config: TrainConfig, checkpoint: Optional[dict] = None) -> int:
    """Train every run of the config from the checkpoint on; returns the exit status."""
    keep_freed_memory()
    device = pick_device(config.device, config.precision)
    offline = offline_updates(config)
    total = offline + config.online_iterations
    latest = Path(config.resume or "", "checkpoint.pt")
    resumed = bool(checkpoint and config.resume and Path(checkpoint["path"]) == latest)
    online = resumed and checkpoint["phase"] == "online"
    flag = "online_iterations" if online else "max_timesteps"
    if resumed and checkpoint["step"] > (total if online else offline):
        where = f"--{flag} {total - offline if online else offline}"
        raise UserError(f"{where}: the run is at {checkpoint['step']}")
    now, was = config.eval_env, checkpoint and checkpoint["config"]["eval_env"]
    if resumed and now != was and (online or config.normalize_reward):
        raise UserError(f"--eval_env {now}: the run learns from rewards of {was}")
    if online:
        before = offline_updates(TrainConfig(**checkpoint["config"]))
        if offline != before:
            where = f"--max_timesteps {offline}"
            raise UserError(f"{where}: the run went online after {before} updates")
    data, task, evaluator, agent = load(config, checkpoint, resumed, device)
    directory, n_runs = run_directory(config), len(agent.runs)
    run = Run(config, agent, task, data, evaluator, directory)
    rank, ranks = rank_and_ranks()
    hidden = rank > 0 or not sys.stderr.isatty()
    look = {"unit": "update", "disable": hidden, "leave": False, "dynamic_ncols": True}
    with locked(directory), noted_signals() as noted, tqdm(total=total, **look) as bar:
        if config.resume and latest.exists():  # by another process, while this one read?
            if not resumed or latest.stat().st_mtime_ns != checkpoint["written"]:
                raise UserError(f"{directory}: changed meanwhile; try once more")
        if ranks > 1:
            settle_ranks(directory.parent)
        describe(config, task, data, evaluator, device)
        if checkpoint and not resumed:
            say(f"model: {checkpoint['path']}, update {checkpoint['step']:,}")
        elif config.resume and not resumed:
            say(f"no checkpoint in {directory} yet: starting there")
        run.open(checkpoint if resumed else None, total)
        bar.initial = bar.n = run.step
        plural = f"{n_runs} runs" if n_runs > 1 else "1 run"
        where = f", in {directory}" if directory else ""
        more = f", online after {offline:,}" if run.online else ""
        more = f"updates {run.step:,} to {total:,}{more}"
        say(f"training {plural} on {device}{where}, {more}")
        try:
            while run.alive().any():
                due = run.step and run.step % config.eval_freq == 0
                due = due or run.step in (offline, total)
                if due and run.evaluated != run.step:
                    if run.step == total and run.metrics.count:
                        run.log(reset=False)
                    run.evaluate(noted)
                run.collect(wait=run.step == total)
                if noted or run.step == total:
                    break
                run.advance()
                bar.update()
                if run.step % config.log_freq == 0:
                    run.log()
                if time.monotonic() - run.saved_at > run.CHECKPOINT_SECONDS:
                    run.checkpoint()
            bar.close()
            if noted:
                run.checkpoint()
                again = directory and (directory.parent if ranks > 1 else directory)
                more = f"; --resume {again} goes on" if directory else ""
                say(f"interrupted at update {run.step:,}{more}")
                return 128 + noted[0]
            if config.record_dataset is not None:
                run.online.write(run.reference())
            if ranks > 1:  # again, for a rank that left no checkpoint
                merge_tables(directory.parent)
            run.summary()
        finally:
            run.wandb.finish()
            if evaluator:
                evaluator.close()
    if ranks > 1 and not run.alive().all():
        say("exit status 0 all the same: at any other torchrun stops the other ranks")
    return 0 if run.alive().all() or ranks > 1 else 3


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status (0, 1, 2, 3, 130 or 143)."""
    try:
        given = read_command_line(sys.argv[1:] if argv is None else argv)
        config, checkpoint = layered_config(split_over_ranks(given))
        validate(config)
        return train(config, checkpoint)
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
