"""Conservative Q-Learning (CQL) in one file: read it, run it, sweep it, fork it.

Learns a policy from recorded data alone. The algorithm is Kumar et al., "Conservative
Q-Learning for Offline Reinforcement Learning", NeurIPS 2020 (arXiv 2006.04779), on the
soft actor-critic of Haarnoja et al. (arXiv 1812.05905); flags and defaults are those of
CORL's offline cql.py. Several runs (seeds, penalty weights) train at once as one more
dimension of every tensor.

    python cql.py --config_path configs/quickstart.yaml          # minutes on a laptop
    python cql.py --env mujoco/hopper/medium-v0 --seed '[0,1,2]' --cql_alpha '[1,5,10]'
    python cql.py --config_path configs/hopper.yaml --resume runs/hopper   # start or go on
    python cql.py --load_model runs/hopper/checkpoint.pt --max_timesteps 0 --n_episodes 100

Letters in shape comments: R runs, N critics, B batch, K = cql_n_actions, M actions per
state, T target actions per state (1 or K), O observation dims, A action dims, E episodes.
Actions inside the algorithm live in [-1, 1]; the environment's own bounds are applied
where data comes in and where `act` goes out.
"""

import csv
import dataclasses
import difflib
import fcntl
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import uuid
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import gymnasium as gym
import h5py
import minari
import numpy as np
import pyrallis
import torch
import torch.nn as nn
import torch.nn.functional as F
import wandb
import yaml
from minari.dataset.minari_storage import MinariStorage, is_image_space
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
    otherwise; flags marked [list] also take a list, and the product is trained at once."""

    # Minari id, directory of a Minari dataset, D4RL .hdf5 file, or a list of those (joined)
    env: Union[List[str], str] = "mujoco/hopper/medium-v0"
    device: str = "auto"  # auto, cpu, cuda, cuda:N (CORL's default: cuda)
    seed: Union[int, List[int]] = 0  # Seed of initialization and training noise [list]
    eval_freq: int = 5000  # Updates between evaluations
    n_episodes: int = 10  # Episodes of one evaluation
    max_timesteps: int = 1_000_000  # Updates in all
    # Where run directories go; null writes nothing (CORL's default: null)
    checkpoints_path: Optional[str] = "runs"
    # Checkpoint to start from: weights, optimizers, observation statistics
    load_model: Optional[str] = ""
    buffer_size: int = 2_000_000  # Capacity of the online buffer; data is loaded whole
    batch_size: int = 256  # Transitions per update and run
    discount: float = 0.99  # Discount factor
    alpha_multiplier: float = 1.0  # Factor on the entropy temperature
    use_automatic_entropy_tuning: bool = True  # Learn the entropy temperature
    backup_entropy: bool = False  # Subtract alpha * log pi in the TD target
    policy_lr: float = 3e-5  # Learning rate of policy and temperature
    qf_lr: float = 3e-4  # Learning rate of critics and Lagrange multiplier
    soft_target_update_rate: float = 5e-3  # Step of the target critics towards the critics
    target_update_period: int = 1  # Updates between target steps
    cql_n_actions: int = 10  # Actions per proposal and state: 3 x this enter the penalty
    cql_importance_sample: bool = True  # Divide each proposal by its density
    cql_lagrange: bool = False  # Learn the penalty weight towards the target gap
    cql_target_action_gap: Union[float, List[float]] = -1.0  # Gap that Lagrange aims at [list]
    cql_temp: Union[float, List[float]] = 1.0  # Temperature of the logsumexp [list]
    cql_alpha: Union[float, List[float]] = 10.0  # Penalty weight, twice the paper's [list]
    cql_max_target_backup: bool = False  # TD target takes the best of K actions
    cql_clip_diff_min: float = -math.inf  # Lower clamp of a sample's gap
    cql_clip_diff_max: float = math.inf  # Upper clamp of a sample's gap
    orthogonal_init: bool = True  # Orthogonal critic weights (the policy's never are)
    normalize: bool = True  # Standardize observations by the dataset's statistics
    # Divide rewards by the spread of returns, times 1000 (hopper, halfcheetah, walker2d)
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
    online_iterations: int = 0  # Environment steps after the offline phase
    cql_alpha_online: Optional[float] = None  # Penalty weight of the online phase
    mixing_ratio: float = -1.0  # Offline share of an online batch; -1: one buffer
    is_sparse_reward: bool = False  # Cal-QL: return-to-go of a failed episode
    # Ours, not CORL's:
    log_freq: int = 1000  # Updates between rows of metrics.csv
    eval_env: Optional[str] = None  # Environment to evaluate in, if not the dataset's own
    resume: Optional[str] = None  # Run directory to continue, or to start in if empty
    hidden_dim: int = 256  # Width of every hidden layer
    n_critics: int = 2  # Critics; targets take their minimum
    n_target_critics: Optional[int] = None  # Random critics in the target; null: all
    penalty: str = "logsumexp"  # Form of the conservative penalty
    cql_backward_actions: int = 0  # Sampled actions to backpropagate through; 0: all
    precision: str = "fp32"  # Arithmetic of matrix products
    cal_ql: bool = False  # Cal-QL: bound Q from below by the return-to-go
    utd: int = 1  # Updates per environment step in the online phase
    record_dataset: Optional[str] = None  # Where to write the online episodes


SWEPT = ("seed", "cql_alpha", "cql_temp", "cql_target_action_gap")  # may be lists
NOT_YET = (  # declared in the contract, refused until they do something
    "online_iterations cql_alpha_online mixing_ratio is_sparse_reward n_target_critics "
    "penalty cql_backward_actions precision cal_ql utd record_dataset"
).split()
AT_LEAST = dict(  # lowest value of each numeric flag
    eval_freq=1, n_episodes=1, max_timesteps=0, buffer_size=1, batch_size=1, discount=0,
    alpha_multiplier=0, policy_lr=0, qf_lr=0, soft_target_update_rate=0,
    target_update_period=1, cql_n_actions=1, cql_alpha=0, q_n_hidden_layers=1, bc_steps=0,
    eval_seed=0, offline_iterations=0, log_freq=1, hidden_dim=1, n_critics=1, seed=0,
)  # fmt: skip
AT_MOST = dict(discount=1, soft_target_update_rate=1, seed=2**63 - 1, eval_seed=2**63 - 1)
# What a resumed run may change; checkpoints_path has no effect on it.
RESUMABLE = set(
    "max_timesteps offline_iterations online_iterations device eval_freq n_episodes "
    "eval_seed eval_env log_freq project group name checkpoints_path resume".split()
)
# What load_model takes from the checkpoint when the command leaves it out: the data,
# and all that decides the shape of a tensor.
INHERITED = ("env", "eval_env", "hidden_dim", "q_n_hidden_layers", "n_critics")


class UserError(Exception):
    """The user's input is at fault: one line on stderr, exit status 2."""


class MachineError(Exception):
    """The machine failed while running (disk, simulator): one line, exit status 1."""


def nearest(name: str, names) -> str:
    """' (did you mean X?)' for the closest of names, or ''."""
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def strict_int(value) -> int:
    """An int, or a number written like 1e6; never a truncated or boolean one."""
    number = strict_float(value)
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, int) else int(number)


def strict_float(value) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def strict_bool(value) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def strict_str(value) -> str:
    if value is None or isinstance(value, (list, dict)):
        raise ValueError
    return str(value)


for _kind in (strict_int, strict_float, strict_bool, strict_str):
    pyrallis.decode.register(_kind.__annotations__["return"], _kind)


def read_yaml(text: str, where: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def decode(field: dataclasses.Field, value, where: str):
    """The value of a flag in the field's type; a mistake becomes a UserError."""
    kind = str(field.type).replace("typing.", "").replace("<class '", "")
    kind = kind.rstrip("'>")
    try:
        return pyrallis.decode(field.type, value)
    except Exception:
        raise UserError(f"{where}: expected {kind}, got {value!r}") from None


def read_config_file(path: str) -> dict:
    """Field values from a YAML file of flags."""
    try:
        values = read_yaml(Path(path).read_text(), path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"--config_path {path}: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config_path {path}: empty, or not a mapping of flags to values")
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for key in values:
        if key not in fields:
            raise UserError(f"{path}: unknown flag {key}{nearest(str(key), fields)}")
    return {k: decode(fields[k], v, f"{path}: {k}") for k, v in values.items()}


class Parser(ArgumentParser):
    """pyrallis's parser, with raw values out and one-line errors."""

    def _postprocessing(self, namespace):
        return namespace

    def error(self, message):
        raise UserError(message.replace("argument --", "--", 1))


def read_command_line(argv: List[str]) -> dict:
    """Field values given on the command line, `--config_path`'s below them."""
    argv = ["--help" if argument == "-h" else argument for argument in argv]
    for i in range(len(argv) - 1, 0, -1):  # argparse takes a value like -.inf for a flag
        if re.match(r"-[.\d]", argv[i]) and re.fullmatch(r"--\w+", argv[i - 1]):
            argv[i - 1 : i + 1] = [f"{argv[i - 1]}={argv[i]}"]
    parser = Parser(TrainConfig, prog="cql.py", allow_abbrev=False)
    namespace, unknown = parser.parse_known_args(argv)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    if unknown:
        flag = unknown[0].split("=")[0]
        hint = nearest(flag.lstrip("-"), fields).replace("mean ", "mean --")
        raise UserError(f"unknown argument {flag}{hint}")
    raw = vars(namespace)
    path = raw.pop("config_path", None)
    values = read_config_file(path) if path is not None else {}
    for name, text in raw.items():
        value = text
        if "str" not in str(fields[name].type) or text.startswith("["):
            value = read_yaml(text, f"--{name}")
        elif text in ("null", "~") and "None" in str(fields[name].type):
            value = None  # any other text stays as typed: --name 007 is "007"
        values[name] = decode(fields[name], value, f"--{name}")
    return values


def layered_config(given: dict) -> Tuple[TrainConfig, Optional[dict]]:
    """The config, what is not given filled from a run to resume or a model to load.

    Returns it and the checkpoint to start from, if any."""
    base, checkpoint = {}, None
    if given.get("resume"):
        directory = Path(given["resume"])
        if (directory / "config.yaml").exists():
            base = read_config_file(str(directory / "config.yaml"))
            defaults = dataclasses.asdict(TrainConfig())
            for name, value in given.items():
                saved = base.get(name, defaults[name])
                if name not in RESUMABLE and value != saved:
                    raise UserError(
                        f"--{name} {value} differs from {directory}/config.yaml, which "
                        f"says {saved}: a resumed run cannot change it"
                    )
        if (directory / "checkpoint.pt").exists():
            checkpoint = read_checkpoint(directory / "checkpoint.pt")
    load_model = {**base, **given}.get("load_model")
    if load_model and checkpoint is None:
        checkpoint = read_checkpoint(load_model)
        saved = checkpoint["config"]
        lists = [name for name in SWEPT if isinstance(saved[name], list)]
        base = {**{name: saved[name] for name in (*INHERITED, *lists)}, **base}
    return TrainConfig(**{**base, **given}), checkpoint


def validate(config: TrainConfig, given) -> None:
    """Raise UserError for values out of range and for flags that contradict."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        values = value if isinstance(value, list) else [value]
        if not values or len(set(values)) < len(values):
            problem = "an empty list" if not values else "the same value twice"
            raise UserError(f"--{name} {value}: {problem}")
        if name in NOT_YET and value != field.default:
            raise UserError(f"--{name} {value}: not yet implemented; leave it out")
        low, high = AT_LEAST.get(name, -math.inf), AT_MOST.get(name, math.inf)
        for number in (v for v in values if isinstance(v, (int, float))):
            if not low <= number <= high:
                bounds = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
                raise UserError(f"--{name} {number}: must be {bounds}")
            if math.isinf(number) and not name.startswith("cql_clip_diff"):
                raise UserError(f"--{name} {number}: must be finite")
    if min(runs_of(config, "cql_temp")) <= 0:
        raise UserError("--cql_temp: must be > 0")
    if config.cql_clip_diff_min > config.cql_clip_diff_max:
        raise UserError("--cql_clip_diff_min is above --cql_clip_diff_max")
    if "max_timesteps" in given and config.offline_iterations is not None:
        raise UserError("--max_timesteps and --offline_iterations say the same: give one")
    for flag in ("checkpoints_path", "resume"):
        path = getattr(config, flag)
        if path is not None and (not path or Path(path).is_file()):
            raise UserError(f"--{flag} {path!r}: not a directory")


def product_of_runs(config: TrainConfig) -> List[dict]:
    """One dict of the swept flags per run: the product of their lists."""
    values = [getattr(config, name) for name in SWEPT]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [dict(zip(SWEPT, values)) for values in itertools.product(*lists)]


def runs_of(config: TrainConfig, name: str) -> list:
    """The values of one swept flag, run by run."""
    return [run[name] for run in product_of_runs(config)]


def pick_device(config: TrainConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such GPU here; pass --device cpu")
    return device


def say(text: str) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


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
    """What a dataset says of its environment; plain values, saved in checkpoints."""

    observation_space: str  # Minari's JSON
    action_low: List[float]  # [A]
    action_high: List[float]  # [A]
    env_id: Optional[str] = None
    env_kwargs: Optional[dict] = None
    max_episode_steps: Optional[int] = None
    reference: Optional[List[float]] = None  # returns scored 0 and 100

    @property
    def observation_dim(self) -> int:
        return gym.spaces.flatdim(deserialize_space(self.observation_space))


class Recording(NamedTuple):
    """Episodes end to end; each stores its T + 1 observations once."""

    observations: np.ndarray  # [n + E, O]
    actions: np.ndarray  # [n, A]
    rewards: np.ndarray  # [n]
    terminations: np.ndarray  # [n] bool
    lengths: np.ndarray  # [E] transitions per episode
    whole: np.ndarray  # [E] bool: ended by termination or time limit, not by a cut


class Batch(NamedTuple):
    """Transitions of R runs; arrays without the leading R are taken as R = 1."""

    observations: Tensor  # [R, B, O] raw
    actions: Tensor  # [R, B, A] in the environment's bounds
    rewards: Tensor  # [R, B]
    next_observations: Tensor  # [R, B, O] raw
    terminations: Tensor  # [R, B] 1 where the episode terminated, not truncated


def supported_spaces(observation_space, action_space, where: str) -> None:
    """Raise UserError unless observations flatten to a vector and actions are a box."""
    leaves, unchecked = [], [observation_space]
    while unchecked:
        space = unchecked.pop()
        if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
            spaces = space.spaces
            unchecked += spaces.values() if isinstance(spaces, dict) else spaces
        else:
            leaves.append(space)
    for space in leaves:
        if not isinstance(space, gym.spaces.Box) or is_image_space(space):
            kind = "images" if isinstance(space, gym.spaces.Box) else str(space)
            raise UserError(
                f"{where}: observations of {kind} are not supported, only Box vectors "
                "and dictionaries or tuples of them"
            )
    if not isinstance(action_space, gym.spaces.Box):
        raise UserError(
            f"{where}: actions in {action_space} are not supported yet, only Box"
        )
    if not action_space.is_bounded() or (action_space.low >= action_space.high).any():
        raise UserError(f"{where}: {action_space}: action bounds must be finite, low < high")


def flat(space, value) -> np.ndarray:
    """Observations of one episode as [T + 1, O], in the order of gym.spaces.flatten."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([flat(s, value[k]) for k, s in space.spaces.items()], 1)
    if isinstance(space, gym.spaces.Tuple):
        return np.concatenate([flat(s, v) for s, v in zip(space.spaces, value)], 1)
    value = np.asarray(value)
    return value.reshape(len(value), math.prod(space.shape))


def read_hdf5(node):
    """An HDF5 node as arrays; Minari stores a tuple's parts as _index_0, _index_1, ..."""
    if isinstance(node, h5py.Dataset):
        return node[()]
    if "_index_0" in node:
        return [read_hdf5(node[f"_index_{i}"]) for i in range(len(node))]
    return {key: read_hdf5(node[key]) for key in node}


def minari_episodes(directory: Path, metadata: dict):
    """Iterate over the episodes of a dataset as dicts of arrays.

    HDF5 is read directly: Minari's reader decodes `infos` too, most of a file's bytes."""
    if metadata.get("data_format", "hdf5") != "hdf5":
        yield from MinariStorage.read(directory).get_episodes(
            range(metadata["total_episodes"])
        )
        return
    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    with h5py.File(directory / "main_data.hdf5", "r") as file:
        for i in range(metadata["total_episodes"]):
            episode = file[f"episode_{i}"]
            yield {key: read_hdf5(episode[key]) for key in keys}


def read_minari(directory: Path, name: str) -> Tuple[Recording, Task]:
    """A Minari dataset. It is data: spaces must be recorded, because Minari would make
    the recorded environment, entry point included, to find them out."""
    try:
        metadata = json.loads((directory / "metadata.json").read_text())
        spaces = [metadata[f"{key}_space"] for key in ("observation", "action")]
        observation_space, action_space = map(deserialize_space, spaces)
        specs = [metadata.get(key) for key in ("eval_env_spec", "env_spec")]
        spec = json.loads(next((s for s in specs if s), "{}"))
        reference = [metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    except KeyError as error:
        raise UserError(f"{name}: metadata.json records no {error.args[0]}") from None
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{name}: unreadable metadata.json: {error}") from None
    supported_spaces(observation_space, action_space, name)
    episodes = []
    try:
        for i, raw in enumerate(minari_episodes(directory, metadata)):
            raw["observations"] = flat(observation_space, raw["observations"])
            raw["actions"] = flat(action_space, raw["actions"])
            length = len(raw["rewards"])
            others = [len(raw[k]) for k in ("actions", "terminations", "truncations")]
            if len(raw["observations"]) != length + 1 or set(others) != {length}:
                raise UserError(
                    f"{name}: episode {i}: {len(raw['observations'])} observations for "
                    f"{length} rewards and {others} actions, terminations, truncations"
                )
            if length:
                episodes.append(raw)
    except (OSError, KeyError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"{name}: damaged or foreign data: {error}") from None
    if not episodes:
        raise UserError(f"{name}: no episodes")
    joined = {key: [episode[key] for episode in episodes] for key in episodes[0]}
    ends = [(e["terminations"][-1] or e["truncations"][-1]) for e in episodes]
    recording = Recording(
        *(np.concatenate(joined[k]) for k in Recording._fields[:4]),
        lengths=np.array([len(rewards) for rewards in joined["rewards"]]),
        whole=np.array(ends, bool),
    )
    kwargs = {k: v for k, v in spec.get("kwargs", {}).items() if k != "render_mode"}
    task = Task(
        serialize_space(observation_space),
        *(bound.ravel().tolist() for bound in (action_space.low, action_space.high)),
        env_id=spec.get("id"),
        env_kwargs=kwargs,
        max_episode_steps=spec.get("max_episode_steps"),
        reference=None if None in reference else reference,
    )
    return recording, task


def read_d4rl(path: Path) -> Tuple[Recording, Task]:
    """D4RL's flat HDF5: observations, actions, rewards, terminals and, where present,
    timeouts and next_observations.

    Without next_observations, what follows an episode's last observation is unknown:
    the last transition of an episode that a time limit cut is left out, as in
    d4rl.qlearning_dataset; a terminal one bootstraps nothing and stays."""
    needed, optional = ("observations", "actions", "rewards", "terminals"), ("timeouts",)
    try:
        with h5py.File(path, "r") as file:
            missing = [key for key in needed if key not in file]
            if missing:
                raise UserError(f"{path}: not a D4RL file: no {', '.join(missing)}")
            wanted = (*needed, *optional, "next_observations")
            raw = {key: file[key][()] for key in wanted if key in file}
    except OSError as error:
        raise UserError(f"{path}: truncated, or not HDF5: {error}") from None
    n = len(raw["rewards"])
    if any(len(value) != n for value in raw.values()) or raw["observations"].ndim != 2:
        shapes = {key: value.shape for key, value in raw.items()}
        raise UserError(f"{path}: shapes do not match: {shapes}")
    if n == 0:
        raise UserError(f"{path}: no episodes")
    actions = raw["actions"].reshape(n, -1)
    terminals = raw["terminals"].reshape(n).astype(bool)
    done = terminals | raw.get("timeouts", np.zeros(n)).reshape(n).astype(bool)
    following = raw.get("next_observations")
    ends = done.copy()
    if following is not None:  # a jump is an episode's end, flagged or not
        ends[:-1] |= (following[:-1] != raw["observations"][1:]).any(1)
    ends[-1] = True
    last = np.flatnonzero(ends)
    lengths = np.diff(last, prepend=-1)
    whole = done[last]
    keep = np.ones(n, bool)
    if following is None:
        cut = last[~terminals[last]]
        keep[cut] = False  # its observation becomes the episode's last
        lengths = lengths - ~terminals[last]
    # Rows of s for every transition; each episode has one row more than transitions.
    n_rows = lengths + 1
    rows = np.arange(keep.sum()) + np.repeat(np.arange(len(last)), lengths)
    observations = np.empty((n_rows.sum(), raw["observations"].shape[1]), np.float32)
    observations[rows] = raw["observations"][keep]
    source = raw["observations"] if following is None else following
    observations[np.cumsum(n_rows) - 1] = source[last]
    space = gym.spaces.Box(-np.inf, np.inf, observations.shape[1:], np.float32)
    env_id, kwargs = D4RL_ENVIRONMENTS.get(path.stem.split("-")[0].split("_")[0], (None, {}))
    bounds = [[-1.0] * actions.shape[1], [1.0] * actions.shape[1]]
    task = Task(serialize_space(space), *bounds, env_id=env_id, env_kwargs=kwargs)
    kept = (actions[keep], raw["rewards"].reshape(n)[keep], terminals[keep])
    return Recording(observations, *kept, lengths=lengths, whole=whole), task


def download(name: str) -> None:
    """Fetch a Minari dataset, in silence; failure is one clear line."""
    say(f"downloading {name} ...")
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            minari.download_dataset(name)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"--env {name}: not on disk under {get_dataset_path()}, and the download failed "
            f"({reason}); pass a directory or .hdf5 file, or set MINARI_DATASETS_PATH"
        ) from None


def read_recording(name: str) -> Tuple[Recording, Task]:
    """One entry of `env`: a directory, an .hdf5 file or a Minari id."""
    path = Path(name)
    for directory in (path, path / "data"):
        if (directory / "metadata.json").is_file():
            return read_minari(directory, name)
    if path.suffix in (".hdf5", ".h5"):
        if not path.is_file():
            raise UserError(f"--env {name}: no such file")
        return read_d4rl(path)
    if path.exists() or name.startswith((".", "/", "~")):
        raise UserError(f"--env {name}: holds no Minari dataset (no metadata.json)")
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", name):
        raise UserError(
            f"--env {name}: neither a directory, nor an .hdf5 file, nor a Minari id "
            "such as mujoco/hopper/medium-v0"
        )
    data = get_dataset_path(name) / "data"
    if not data.is_dir():
        d4rl = D4RL_NAME.fullmatch(name)
        if d4rl:
            env = d4rl["env"]
            other = f"Minari's other data, mujoco/{env}/medium-v0" if env else "a Minari id"
            raise UserError(
                f"--env {name} is D4RL's name for data that Minari does not hold: pass the "
                f"file itself, --env path/to/{name}.hdf5, or {other}"
            )
        download(name)
    return read_minari(data, name)


class Dataset:
    """Transitions on the device. The next observation is found by index, not stored
    twice: the row after the observation's own."""

    def __init__(self, config: TrainConfig, device="cpu"):
        names = config.env if isinstance(config.env, list) else [config.env]
        parts, tasks = zip(*map(read_recording, names))
        self.task = next((task for task in tasks if task.env_id), tasks[0])
        if config.eval_env and all(name.endswith((".hdf5", ".h5")) for name in names):
            space = make_env(self.task, config.eval_env).action_space
            supported_spaces(gym.spaces.Box(0, 1), space, f"--eval_env {config.eval_env}")
            self.task.action_low = space.low.ravel().tolist()
            self.task.action_high = space.high.ravel().tolist()
        for name, part, task in zip(names, parts, tasks):
            check_recording(name, part, task, self.task)
        recording = Recording(*map(np.concatenate, zip(*parts)))
        if len(recording.rewards) < config.batch_size:
            raise UserError(
                f"--env {config.env}: {len(recording.rewards)} transitions are fewer than "
                f"a batch (--batch_size {config.batch_size})"
            )
        starts = np.cumsum(recording.lengths) - recording.lengths
        self.episode_returns = np.add.reduceat(recording.rewards.astype(float), starts)
        self.rewards_raw = recording.rewards
        self.whole, self.lengths = recording.whole, recording.lengths
        rows = np.arange(starts[-1] + recording.lengths[-1])
        rows += np.repeat(np.arange(len(starts)), recording.lengths)
        rewards = transformed_rewards(recording, self.episode_returns, self.task, config)
        self.observations = torch.as_tensor(recording.observations, device=device).float()
        self.actions = torch.as_tensor(recording.actions, device=device).float()
        self.rewards = torch.as_tensor(rewards, device=device).float()
        self.terminations = torch.as_tensor(recording.terminations, device=device).float()
        self.rows = torch.as_tensor(rows, device=device)
        # No two values of any policies can be further apart, the data's rewards granted.
        spread = max(rewards.max(), 0) - min(rewards.min(), 0)
        self.q_range = float(spread / max(1 - config.discount, 1e-9))

    def __len__(self) -> int:
        return len(self.rows)

    def statistics(self) -> Tuple[Tensor, Tensor]:
        """Mean and std + 1e-3 of s over the transitions, [O] each (CORL's form)."""
        chosen = self.observations[self.rows].double()
        return chosen.mean(0), chosen.std(0, correction=0) + 1e-3

    def gather(self, indices: Tensor) -> Batch:
        """Transitions at indices [R, B]."""
        rows = self.rows[indices]
        return Batch(
            self.observations[rows],
            self.actions[indices],
            self.rewards[indices],
            self.observations[rows + 1],
            self.terminations[indices],
        )


def check_recording(name: str, part: Recording, task: Task, first: Task) -> None:
    """Raise UserError if a dataset is not finite, in bounds, and like the first one."""
    bounds = (first.action_low, first.action_high)
    shapes = (task.observation_dim, len(task.action_low))
    if shapes != (first.observation_dim, len(first.action_low)):
        raise UserError(f"--env {name}: observations and actions of {shapes} dimensions, unlike the first dataset's")
    if task.env_id and first.env_id and task.env_id != first.env_id:
        raise UserError(f"--env {name}: recorded in {task.env_id}, not {first.env_id}")
    if (task.action_low, task.action_high) != bounds and task.env_id:
        raise UserError(f"--env {name}: its action bounds differ from the first dataset's")
    ends = np.cumsum(part.lengths)
    for field in ("observations", "actions", "rewards"):
        values = getattr(part, field).reshape(len(getattr(part, field)), -1)
        bad = ~np.isfinite(values).all(1)
        if bad.any():
            row = np.flatnonzero(bad)[0]
            last = ends + np.arange(1, len(ends) + 1) if field == "observations" else ends
            episode = np.searchsorted(last, row, side="right")
            raise UserError(f"{name}: episode {episode}: {field} hold NaN or infinity")
    low, high = np.array(bounds)
    rounding = 1e-4 * (high - low)
    bad = ((part.actions < low - rounding) | (part.actions > high + rounding)).any(1)
    if bad.any():
        row = np.flatnonzero(bad)[0]
        raise UserError(
            f"{name}: episode {np.searchsorted(ends, row, side='right')}: action "
            f"{part.actions[row].tolist()} is outside the bounds {bounds}"
        )


def transformed_rewards(recording, episode_returns, task: Task, config) -> np.ndarray:
    """Rewards [n] as trained on: normalize_reward, then reward_scale and reward_bias."""
    rewards = recording.rewards.astype(np.float64)
    if config.normalize_reward:
        if not re.match("Hopper|HalfCheetah|Walker2d", task.env_id or ""):
            say("normalize_reward has no effect here: hopper, halfcheetah, walker2d only")
        elif not recording.whole.any() or np.ptp(episode_returns[recording.whole]) == 0:
            raise UserError("--normalize_reward: needs whole episodes of different returns")
        else:
            rewards *= 1000 / np.ptp(episode_returns[recording.whole])
    return rewards * config.reward_scale + config.reward_bias


# ======================================================================================
# Networks
# ======================================================================================


class MemberwiseProduct(torch.autograd.Function):
    """x @ w + b, one plain matrix product per member, written into one tensor.

    On a CPU this beats a batched product and, unlike stacking, copies nothing."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        y = x.new_empty(*x.shape[:-1], w.shape[-1])
        for i in itertools.product(*map(range, w.shape[:-2])):
            if b is None:
                torch.mm(x[i], w[i], out=y[i])
            else:
                torch.addmm(b[i], x[i], w[i], out=y[i])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        for i in itertools.product(*map(range, w.shape[:-2])):
            if grad_x is not None:
                torch.mm(grad[i], w[i].mT, out=grad_x[i])
            if grad_w is not None:
                torch.mm(x[i].mT, grad[i], out=grad_w[i])
        grad_b = grad.sum(-2, keepdim=True) if ctx.needs_input_grad[2] else None
        return grad_x, grad_w, grad_b


def member_product(x: Tensor, w: Tensor, b: Optional[Tensor] = None) -> Tensor:
    """x [*lead, n, in] @ w [*lead, in, out] + b [*lead, 1, out] -> [*lead, n, out]."""
    if not x.is_cuda:
        return MemberwiseProduct.apply(x, w, b)
    y = torch.matmul(x, w)  # one batched launch
    return y if b is None else y + b


class EnsembleLinear(nn.Module):
    """Linear layers of all members: weight [*lead, in, out], bias [*lead, 1, out]."""

    def __init__(self, lead: Tuple[int, ...], n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(*lead, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        return member_product(x, self.weight, self.bias)


class EnsembleMLP(nn.Module):
    """ReLU networks of all members, x [*lead, n, in] -> [*lead, n, out]."""

    def __init__(self, lead: Tuple[int, ...], sizes: List[int]):
        super().__init__()
        layers = [EnsembleLinear(lead, *pair) for pair in zip(sizes, sizes[1:])]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x), inplace=True)
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
                        for tensor in (w, b):
                            tensor.uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)


class Policy(EnsembleMLP):
    """Tanh-squashed Gaussian, three hidden layers: [R, B, O] -> mean and log std."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, action_dim: int):
        super().__init__((n_runs,), [obs_dim] + [config.hidden_dim] * 3 + [2 * action_dim])
        multiplier = torch.full((n_runs, 1, 1), config.policy_log_std_multiplier)
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
    jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))
    return (gaussian - jacobian).sum(-1)


def data_log_prob(mean, log_std, actions) -> Tensor:
    """Log density [R, B] of given actions [R, B, A] under the squashed Gaussian."""
    # clipped because atanh(+-1) is infinite; differs from CORL, which ignores `actions`
    pre_tanh = actions.clamp(-1 + 1e-5, 1 - 1e-5).atanh()
    return squashed_log_prob((pre_tanh - mean) / log_std.exp(), log_std, pre_tanh)


class Critic(EnsembleMLP):
    """N critics: observations [R, B, O], actions [R, B, M, A] -> Q [R, N, B, M]."""

    def __init__(self, config: TrainConfig, n_runs: int, obs_dim: int, action_dim: int):
        hidden = [config.hidden_dim] * config.q_n_hidden_layers
        super().__init__((n_runs, config.n_critics), [obs_dim + action_dim, *hidden, 1])
        self.split = [obs_dim, action_dim]
        self.n_critics = config.n_critics

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        first, *rest = self.layers
        by_observation, by_action = first.weight.split(self.split, dim=-2)
        n_actions = actions.shape[2]
        shared = (-1, self.n_critics, -1, -1)  # all critics see the same inputs
        # The observation's share of the first layer, once per state: [R, N, B, 1, H].
        s = observations.unsqueeze(1).expand(shared)
        s = member_product(s, by_observation, first.bias).unsqueeze(-2)
        a = actions.flatten(1, 2).unsqueeze(1).expand(shared)  # [R, N, B * M, A]
        x = member_product(a, by_action).unflatten(2, (-1, n_actions))
        x = F.relu(x + s, inplace=True).flatten(2, 3)  # [R, N, B * M, H]
        for layer in rest[:-1]:
            x = F.relu(layer(x), inplace=True)
        return rest[-1](x).squeeze(-1).unflatten(2, (-1, n_actions))


@contextmanager
def frozen(module: nn.Module):
    """Gradients pass through the module inside, and reach none of its parameters."""
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)


# ======================================================================================
# Losses: pure functions that return (loss [R], metrics); means over the batch, sums over
# the critics. "CQL" is arXiv 2006.04779, "SAC" is arXiv 1812.05905.
# ======================================================================================


class Noise(NamedTuple):
    """All randomness of one update, drawn outside the losses."""

    normals: Tensor  # [R, B, 1 + K, A] at s: the actor's action, then K proposals
    next_normals: Tensor  # [R, B, T + K, A] at s': target actions, then K proposals
    uniforms: Tensor  # [R, B, K, A] in [-1, 1]


class Samples(NamedTuple):
    """Actions of one update and their log densities."""

    actions: Tensor  # [R, B, 1, A] from pi(.|s), with graph
    log_pi: Tensor  # [R, B] with graph
    log_pi_data: Tensor  # [R, B] of the data's actions, with graph
    target_actions: Tensor  # [R, B, T, A] from pi(.|s')
    target_log_pi: Tensor  # [R, B, T]
    proposals: Tensor  # [R, B, 3K, A]: uniform, pi(.|s), pi(.|s')
    log_mu: Tensor  # [R, B, 3K]


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
        actions,
        log_pi.squeeze(2),
        data_log_prob(*here, batch.actions),
        following[:, :, :T],
        next_log_pi[:, :, :T],
        torch.cat([noise.uniforms, current, following[:, :, T:]], 2),
        torch.cat([uniform_log_mu, current_log_pi, next_log_pi[:, :, T:]], 2),
    )


def temperature_loss(log_alpha: Tensor, log_pi: Tensor, target_entropy: float):
    """SAC eq. 18, with log alpha in alpha's place as in the authors' code."""
    loss = -(log_alpha.unsqueeze(1) * (log_pi.detach() + target_entropy)).mean(1)
    return loss, {"alpha_loss": loss}


def actor_loss(critic: Critic, batch: Batch, samples: Samples, alpha: Tensor):
    """SAC eq. 9: alpha [R] weighs the entropy against the least of the critics."""
    with frozen(critic):
        q = critic(batch.observations, samples.actions).amin(1).squeeze(2)  # [R, B]
    loss = (alpha.unsqueeze(1) * samples.log_pi - q).mean(1)
    return loss, {"policy_loss": loss, "log_pi": samples.log_pi.mean(1)}


def cloning_loss(samples: Samples, alpha: Tensor):
    """Behaviour cloning with entropy, for the first bc_steps updates (CQL's code)."""
    log_pi, log_pi_data = samples.log_pi, samples.log_pi_data
    loss = (alpha.unsqueeze(1) * log_pi - log_pi_data).mean(1)
    return loss, {"policy_loss": loss, "log_pi": log_pi.mean(1)}


@torch.no_grad()
def td_target(target_critic: Critic, batch: Batch, samples: Samples, alpha, config):
    """SAC eq. 2-3 with the least of the target critics; [R, B]. A time limit is no
    terminal and bootstraps; with cql_max_target_backup, the best of K actions counts."""
    q = target_critic(batch.next_observations, samples.target_actions).amin(1)
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
    T * logsumexp estimates T * log(integral of exp(Q / T)). No 1 / 3K, as in CORL."""
    T = temperature[:, None, None]
    if log_mu is None:
        logits = torch.cat([q, q_data.unsqueeze(-1)], -1) / T.unsqueeze(-1)
    else:
        logits = q / T.unsqueeze(-1) - log_mu
    gap = T * logits.logsumexp(-1) - q_data
    return gap.clamp(config.cql_clip_diff_min, config.cql_clip_diff_max)


def critic_loss(critic: Critic, batch, samples, target, log_alpha_prime, sweep, config):
    """TD error and weighted gap, CQL eq. 4 times 2 (so cql_alpha is twice its alpha).

    target [R, B]. Returns loss [R], the multiplier's loss [R] and metrics."""
    K = samples.proposals.shape[2] // 3
    actions = torch.cat([batch.actions.unsqueeze(2), samples.proposals], 2)
    q = critic(batch.observations, actions)  # [R, N, B, 1 + 3K]
    q_data, q_proposals = q[..., 0], q[..., 1:]
    log_mu = samples.log_mu.unsqueeze(1) if config.cql_importance_sample else None
    gap = conservative_gap(q_proposals, log_mu, q_data, sweep.cql_temp, config).mean(-1)
    td = (q_data - target.unsqueeze(1)).square().mean(-1)  # [R, N]
    weight = sweep.cql_alpha.unsqueeze(1)  # [R, 1]
    excess, multiplier, multiplier_loss = gap, gap.new_zeros(len(gap)), None
    if config.cql_lagrange:  # CQL eq. 30; alpha' grows while the gap is above its target
        multiplier = log_alpha_prime.exp().clamp(0.0, 1e6)  # [R]
        excess = gap - sweep.cql_target_action_gap.unsqueeze(1)
        multiplier_loss = -(multiplier.unsqueeze(1) * weight * excess.detach()).mean(1)
        weight = weight * multiplier.detach().unsqueeze(1)
    penalty = weight * excess
    loss = (td + penalty).sum(1)
    uniform, current, following = (part.mean((-1, -2)) for part in q_proposals.split(K, -1))
    metrics = {
        "qf{j}_loss": td,
        "average_qf{j}": q_data.mean(-1),
        "cql_std_q{j}": q.std(-1).mean(-1),
        "cql_q{j}_rand": uniform,
        "cql_q{j}_current_actions": current,
        "cql_q{j}_next_actions": following,
        "cql_qf{j}_diff": gap,
        "cql_min_qf{j}_loss": penalty,
        "alpha_prime": multiplier,
        "alpha_prime_loss": gap.new_zeros(len(gap)),
    }
    if multiplier_loss is None:
        return loss, metrics
    return loss + multiplier_loss, {**metrics, "alpha_prime_loss": multiplier_loss}


# ======================================================================================
# Agents
# ======================================================================================


def seeded(seed: int, stream: int, device="cpu") -> torch.Generator:
    """A generator of its own for each use of a run's seed."""
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


class ContinuousCQL(nn.Module):
    """CQL on soft actor-critic, for R runs at once.

    Takes raw observations and actions in the environment's bounds: `update` learns from
    a Batch, `act` returns actions. Its state_dict holds all that training needs,
    optimizer, generators and observation statistics included."""

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
    ):
        super().__init__()
        self.config, self.device, self.action_dim = config, device, action_dim
        seeds = runs_of(config, "seed")
        self.policy = Policy(config, len(seeds), observation_dim, action_dim)
        self.critic = Critic(config, len(seeds), observation_dim, action_dim)
        generators = [seeded(seed, 0) for seed in seeds]
        self.policy.initialize(generators, orthogonal=False)  # as CORL, whatever the flag
        self.critic.initialize(generators, config.orthogonal_init)
        self.target_critic = Critic(config, len(seeds), observation_dim, action_dim)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.target_critic.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(len(seeds)))
        self.log_alpha_prime = nn.Parameter(torch.ones(len(seeds)))
        vectors = (
            ("observation_mean", observation_mean, observation_dim),
            ("observation_std", observation_std, observation_dim),
            ("action_low", action_low, action_dim),
            ("action_high", action_high, action_dim),
        )
        for name, value, size in vectors:
            value = torch.as_tensor(value, dtype=torch.get_default_dtype())
            self.register_buffer(name, value.expand(size).clone())
        self.to(device)
        self.sweep = Sweep(
            *(torch.tensor(runs_of(config, name), device=device) for name in Sweep._fields)
        )
        self.restart()
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Adam:
        """One Adam (elementwise, so runs do not mix) over what the flags train."""
        actor, critic = list(self.policy.parameters()), list(self.critic.parameters())
        if self.config.use_automatic_entropy_tuning:
            actor.append(self.log_alpha)
        if self.config.cql_lagrange:
            critic.append(self.log_alpha_prime)
        groups = [
            {"params": actor, "lr": self.config.policy_lr},
            {"params": critic, "lr": self.config.qf_lr},
        ]
        optimizer = torch.optim.Adam(groups, fused=True)
        for parameter in actor + critic:  # now, so that loading only ever copies
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return optimizer

    def draw(self, batch_size: int) -> Noise:
        """Noise of one update; run r draws from its own generator alone."""
        config = self.config
        K, T = config.cql_n_actions, config.cql_n_actions if config.cql_max_target_backup else 1
        draws = []
        for generator in self.generators:
            options = {"generator": generator, "device": self.device}
            here = torch.randn(batch_size, 1 + K, self.action_dim, **options)
            following = torch.randn(batch_size, T + K, self.action_dim, **options)
            uniforms = torch.rand(batch_size, K, self.action_dim, **options)
            draws.append((here, following, uniforms * 2 - 1))
        return Noise(*map(torch.stack, zip(*draws)))

    def sample_indices(self, size: int, batch_size: int) -> Tensor:
        """Indices [R, B] below size, from each run's own generator."""
        draws = [
            torch.randint(size, (batch_size,), generator=generator, device=self.device)
            for generator in self.generators
        ]
        return torch.stack(draws)

    def _prepared(self, batch: Batch) -> Batch:
        """Tensors with the R dimension, standardized observations, actions in [-1, 1]."""
        dtype = self.observation_mean.dtype
        batch = Batch(*(torch.as_tensor(x, dtype=dtype, device=self.device) for x in batch))
        if batch.rewards.ndim == 1:
            batch = Batch(*(x.unsqueeze(0) for x in batch))
        mean, std = self.observation_mean, self.observation_std
        center = (self.action_high + self.action_low) / 2
        return batch._replace(
            observations=(batch.observations - mean) / std,
            next_observations=(batch.next_observations - mean) / std,
            actions=(batch.actions - center) / (self.action_high - center),
        )

    def losses(self, batch: Batch, noise: Noise) -> Tuple[Tensor, Dict[str, Tensor]]:
        """All losses at the present parameters, summed, [R]; no graph joins two of
        them, so one backward pass serves every optimizer group. `batch` is prepared."""
        config = self.config
        samples = sample_actions(self.policy, batch, noise)
        alpha = torch.full_like(self.log_alpha, config.alpha_multiplier)
        total, metrics = torch.zeros_like(alpha), {"alpha_loss": torch.zeros_like(alpha)}
        if config.use_automatic_entropy_tuning:
            alpha = config.alpha_multiplier * self.log_alpha.detach().exp()
            args = (self.log_alpha, samples.log_pi, -self.action_dim)
            total, metrics = temperature_loss(*args)
        if self.step < config.bc_steps:
            loss, more = cloning_loss(samples, alpha)
        else:
            loss, more = actor_loss(self.critic, batch, samples, alpha)
        total, metrics = total + loss, {"alpha": alpha, **metrics, **more}
        target, more = td_target(self.target_critic, batch, samples, alpha, config)
        metrics.update(more)
        args = (target, self.log_alpha_prime, self.sweep, config)
        loss, more = critic_loss(self.critic, batch, samples, *args)
        return total + loss, {**metrics, **more}

    def update(self, batch: Batch, noise: Optional[Noise] = None) -> Dict[str, Tensor]:
        """One step on every network; returns metrics, each [R] (or [R, N] where the
        name holds {j}), on the device and without a sync."""
        batch = self._prepared(batch)
        noise = self.draw(batch.rewards.shape[1]) if noise is None else noise
        loss, metrics = self.losses(batch, noise)
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        self.step += 1
        if self.step % self.config.target_update_period == 0:
            pairs = list(self.target_critic.parameters()), list(self.critic.parameters())
            rate = self.config.soft_target_update_rate
            with torch.no_grad():
                torch._foreach_lerp_(*pairs, rate)
        return {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(self, observations, deterministic: bool = True) -> np.ndarray:
        """Environment actions [R, n, A] for raw observations [R, n, O]; without the
        leading dimensions (R = 1), actions without them."""
        dtype = self.observation_mean.dtype
        x = torch.as_tensor(np.asarray(observations), dtype=dtype).to(self.device)
        shape = x.shape[:-1]
        x = x.reshape(len(self.generators), -1, x.shape[-1])
        mean, log_std = self.policy((x - self.observation_mean) / self.observation_std)
        if not deterministic:
            draws = zip(mean, self.generators)
            normals = [torch.randn(m.shape, generator=g, device=m.device) for m, g in draws]
            mean = mean + log_std.exp() * torch.stack(normals).to(dtype)
        center = (self.action_high + self.action_low) / 2
        actions = center + (self.action_high - center) * mean.tanh()
        actions = actions.clamp(self.action_low, self.action_high)
        return actions.reshape(*shape, self.action_dim).cpu().numpy()

    def restart(self) -> None:
        """Count and draw as a fresh run does, with the weights as they are."""
        self.step = 0
        self.generators = [seeded(s, 1, self.device) for s in runs_of(self.config, "seed")]

    def get_extra_state(self) -> dict:
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict()["state"],
            "generators": [generator.get_state() for generator in self.generators],
        }

    def set_extra_state(self, state: dict) -> None:
        """Copies into the live tensors; rebinding them would freeze what they feed."""
        self.step = state["step"]
        own = self.optimizer.state_dict()["state"]
        if own.keys() != state["optimizer"].keys():
            raise ValueError("its optimizer holds other parameters (entropy or Lagrange)")
        for index, tensors in state["optimizer"].items():
            for name, tensor in tensors.items():
                own[index][name].copy_(tensor)
        for generator, saved in zip(self.generators, state["generators"]):
            if saved.shape == generator.get_state().shape:  # else another kind of device
                generator.set_state(saved)


# ======================================================================================
# Environments and evaluation
# ======================================================================================


def make_env(task: Task, eval_env: Optional[str] = None) -> gym.Env:
    """The dataset's environment by its registered id, or `eval_env`, flattened.

    A recorded id is data, so it cannot name a module to import; `eval_env` is the
    user's own word and may. Raises UserError."""
    name, kwargs = eval_env or task.env_id, {}
    if not eval_env:
        if ":" in name:
            raise UserError(
                f"the dataset records the environment {name!r}, which names a module to "
                "import: refused; pass --eval_env if you trust it"
            )
        kwargs = dict(task.env_kwargs or {})
        if isinstance(task.max_episode_steps, int):
            kwargs["max_episode_steps"] = task.max_episode_steps
    try:
        with quiet():
            if ":" not in name and name not in gym.registry:
                import gymnasium_robotics  # slow to import, and rarely needed

                gym.register_envs(gymnasium_robotics)
            env = gym.make(name, disable_env_checker=True, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--eval_env {name}: cannot be made: {reason}") from None
    if not isinstance(env.observation_space, gym.spaces.Box) or (
        env.observation_space.shape != gym.spaces.flatten_space(env.observation_space).shape
    ):
        env = gym.wrappers.FlattenObservation(env)
    return env


@contextmanager
def quiet():
    """Without the deprecation notes that environments write on both streams."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with redirect_stderr(io.StringIO()):
            yield


class Evaluator:
    """All episodes of all runs, stepped together, one policy call per step."""

    def __init__(self, task: Task, config: TrainConfig, n_runs: int, longest: int):
        self.task, self.config = task, config
        self.n_runs, self.longest, self.envs = n_runs, longest, []
        env = self._make()
        spaces = (env.observation_space.shape, env.action_space)
        bounds = np.array([task.action_low, task.action_high])
        box = isinstance(env.action_space, gym.spaces.Box)
        if spaces[0] != (task.observation_dim,) or not box or (
            env.action_space.low.size != bounds.shape[1]
        ):
            raise UserError(
                f"--eval_env {config.eval_env or task.env_id}: observations {spaces[0]} and "
                f"actions {spaces[1]} do not match the dataset's, {(task.observation_dim,)} "
                f"and {bounds.shape[1]} dimensions"
            )
        if not np.allclose([env.action_space.low.ravel(), env.action_space.high.ravel()], bounds):
            raise UserError(
                f"--eval_env {config.eval_env or task.env_id}: its action bounds "
                f"{env.action_space} differ from the dataset's {bounds.tolist()}"
            )
        self.action_shape = env.action_space.shape
        self.name = env.spec.id if env.spec else config.eval_env
        self.envs = [[env]]

    def _make(self) -> gym.Env:
        env = make_env(self.task, self.config.eval_env)
        if env.spec is None or env.spec.max_episode_steps is None:
            env = gym.wrappers.TimeLimit(env, max(self.longest, 1))  # or it may never end
        return env

    def evaluate(self, agent, step: int, alive, interrupted: Callable[[], bool]):
        """Undiscounted returns and lengths, [R, n_episodes] each; NaN for runs not
        alive. Episode i at step t resets alike in every run. None if interrupted."""
        n = self.config.n_episodes
        first = self.envs[0][0]
        if len(self.envs) != self.n_runs or len(self.envs[0]) != n:
            count = itertools.count()
            self.envs = [
                [first if next(count) == 0 else self._make() for _ in range(n)]
                for _ in range(self.n_runs)
            ]
        seeds = [np.random.SeedSequence([self.config.eval_seed, step, i]) for i in range(n)]
        seeds = [int(seed.generate_state(1)[0]) for seed in seeds]
        active = np.repeat(np.asarray(alive)[:, None], n, 1)  # [R, n]
        returns = np.where(active, 0.0, np.nan)
        lengths = np.where(active, 0.0, np.nan)
        observations = np.zeros((self.n_runs, n, self.task.observation_dim))
        try:
            for r, i in np.argwhere(active):
                observations[r, i] = self.envs[r][i].reset(seed=seeds[i])[0]
            while active.any():
                if interrupted():
                    return None
                actions = agent.act(observations)
                for r, i in np.argwhere(active):
                    action = actions[r, i].reshape(self.action_shape)
                    observation, reward, ended, cut, _ = self.envs[r][i].step(action)
                    observations[r, i] = observation
                    returns[r, i] += reward
                    lengths[r, i] += 1
                    active[r, i] = not (ended or cut)
        except Exception as error:
            raise MachineError(f"{self.name} failed at step {step}: {error!r}") from error
        return returns, lengths


def reference_returns(task: Task, env_name: Optional[str]) -> Optional[List[float]]:
    """Returns scored 0 and 100: the dataset's own, else D4RL's by environment."""
    if task.reference is not None:
        return task.reference
    for pattern, reference in REFERENCE_RETURNS.items():
        if re.fullmatch(pattern, env_name or ""):
            say(f"scores: D4RL's reference returns for {env_name}; the data records none")
            return list(reference)
    say("scores: no reference returns are known here, returns only")
    return None


def normalized_score(returns, reference) -> float:
    """100 * (mean return - low) / (high - low), D4RL's score; NaN without reference."""
    if reference is None:
        return math.nan
    low, high = reference
    return 100 * (float(np.mean(returns)) - low) / (high - low)


# ======================================================================================
# Logging and checkpoints
# ======================================================================================

VERSION = 1  # of the checkpoint's layout
EVALUATION_COLUMNS = (
    "step run seed cql_alpha cql_temp cql_target_action_gap episodes return_mean "
    "return_std length_mean d4rl_normalized_score"
).split()


def save_checkpoint(path: Path, payload: dict) -> None:
    """Replace path atomically; on failure the previous file stays. Raises MachineError."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
    except (OSError, RuntimeError) as error:  # torch turns some of the former into latter
        temporary.unlink(missing_ok=True)
        raise MachineError(
            f"could not save {path}: {error}; the previous checkpoint is intact"
        ) from None


def read_checkpoint(path: Union[str, Path]) -> dict:
    """A checkpoint as tensors and plain values; no code in it is run. Raises UserError."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: damaged, or not a checkpoint: {reason}") from None
    if not isinstance(payload, dict) or payload.get("format") != "cql.py":
        raise UserError(f"{path}: not a checkpoint of cql.py")
    if payload["version"] != VERSION:
        raise UserError(f"{path}: of version {payload['version']}, this cql.py reads {VERSION}")
    return payload


def load_agent(agent: nn.Module, checkpoint: dict, where) -> None:
    """Copy a checkpoint's state into the agent. Raises UserError."""
    if checkpoint["kind"] != type(agent).__name__:
        raise UserError(f"{where}: holds a {checkpoint['kind']}, not a {type(agent).__name__}")
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, ValueError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise UserError(f"{where}: of another shape: {lines[min(1, len(lines) - 1)]}") from None


def load_policy(path: Union[str, Path], run: int = 0, device: str = "cpu"):
    """A checkpoint's policy for use: raw observation (or [n, O] of them, or the
    environment's dictionary) in, action within the environment's bounds out.

    Raises UserError. `deterministic=False` samples."""
    checkpoint = read_checkpoint(path)
    config, task = TrainConfig(**checkpoint["config"]), Task(**checkpoint["task"])
    agent = ContinuousCQL(config, task.observation_dim, len(task.action_low), device)
    load_agent(agent, checkpoint, path)
    space, n_runs = deserialize_space(task.observation_space), len(agent.generators)
    if not 0 <= run < n_runs:
        raise UserError(f"{path}: run {run} of {n_runs}")

    def policy(observation, deterministic: bool = True) -> np.ndarray:
        if isinstance(observation, (dict, tuple)):
            observation = gym.spaces.flatten(space, observation)
        x = np.broadcast_to(observation, (n_runs, *np.shape(observation)))
        return agent.act(x, deterministic)[run]

    return policy


class Table:
    """A CSV file that only grows, but for what a resumed run will write again."""

    def __init__(self, directory: Optional[Path], name: str):
        self.path = directory and directory / name

    def keep(self, wanted: Callable[[int], bool]) -> List[dict]:
        """Drop rows whose step is not wanted, and a torn last line; return the rest."""
        if self.path is None or not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            rows = list(csv.reader(file))
        header, body = (rows[0], rows[1:]) if rows else ([], [])
        body = [row for row in body if len(row) == len(header) and row[0].isdigit()]
        body = [row for row in body if wanted(int(row[0]))]
        if header:
            temporary = self.path.with_suffix(".tmp")
            with open(temporary, "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([header, *body])
            os.replace(temporary, self.path)
        return [dict(zip(header, row)) for row in body]

    def append(self, rows: List[dict]) -> None:
        if self.path is None:
            return
        new = not self.path.exists() or self.path.stat().st_size == 0
        try:
            with open(self.path, "a", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerows(rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise MachineError(f"could not write {self.path}: {error.strerror}") from None


def number(value: float) -> str:
    """A float for a CSV: 8 digits; empty when it is not known."""
    return "" if math.isnan(value) else f"{value:.8g}"


class Metrics:
    """Sums on the device; they cross to the host when a row is due, not before."""

    def __init__(self, n_runs: int):
        self.n_runs, self.names, self.sums, self.count = n_runs, [], None, 0

    def add(self, metrics: Dict[str, Tensor]) -> None:
        columns = [v if v.ndim == 2 else v.unsqueeze(1) for v in metrics.values()]
        values = torch.cat(columns, 1)  # [R, columns]
        if self.sums is None:
            self.sums = torch.zeros_like(values, dtype=torch.float64)
        if not self.names:
            for name, value in metrics.items():
                each = range(1, value.shape[1] + 1) if value.ndim == 2 else [0]
                self.names += [name.replace("{j}", str(j)) for j in each]
        self.sums += values
        self.count += 1

    def finite(self) -> np.ndarray:
        """[R] bool: no loss or value of the interval was NaN or infinite."""
        if self.sums is None:
            return np.ones(self.n_runs, bool)
        return torch.isfinite(self.sums).all(1).cpu().numpy()

    def means(self) -> List[Dict[str, float]]:
        """Interval means, one dict per run."""
        rows = (self.sums / self.count).tolist()
        return [dict(zip(self.names, row)) for row in rows]

    def reset(self) -> None:
        self.sums.zero_()
        self.count = 0

    def state_dict(self) -> dict:
        return {"names": self.names, "sums": self.sums, "count": self.count}

    def load_state_dict(self, state: dict, device) -> None:
        self.names, self.count, self.sums = state["names"], state["count"], state["sums"]
        self.sums = None if self.sums is None else self.sums.to(device)


class WandbLogger:
    """One wandb run per stacked run; under a sweep agent, one for them all, because the
    agent has already chosen its id."""

    def __init__(self, config: TrainConfig, directory, runs: List[dict], ids: List[str]):
        self.trackers, self.ids, self.sweep = [], ids, "WANDB_SWEEP_ID" in os.environ
        mode = os.environ.get("WANDB_MODE", "online")
        if directory is None or mode in ("disabled", "dryrun"):
            return
        with quiet():
            known = mode == "offline" or self.sweep or wandb.login(prompt=False)
        if not known:
            say("wandb: no account here (`wandb login`), not logging to it")
            return
        if self.sweep:
            ids, runs = [os.environ.get("WANDB_RUN_ID")], [{}]
        elif len(ids) != len(runs):
            ids = [uuid.uuid4().hex[:8] for _ in runs]
        for i, (run, run_id) in enumerate(zip(runs, ids)):
            options = {
                "project": config.project,
                "group": config.group,
                "name": directory.name + (f"-{i}" if len(runs) > 1 else ""),
                "config": {**dataclasses.asdict(config), **run},
                "dir": str(directory),
                "id": run_id,
                "resume": "allow",
                "reinit": "create_new",
            }
            self.trackers.append(self._start(mode, options))
        self.ids = [] if self.sweep else ids
        if any(tracker.offline for tracker in self.trackers):
            say(f"wandb: offline; later `wandb sync {directory}/wandb/offline-run-*`")

    @staticmethod
    def _start(mode: str, options: dict):
        settings = wandb.Settings(silent=True, init_timeout=20)
        try:
            return wandb.init(mode=mode, settings=settings, **options)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            say(f"wandb: {str(error).splitlines()[0][:100]}; logging offline")
            return wandb.init(mode="offline", settings=settings, **options)

    def log(self, step: int, rows: Dict[int, dict]) -> None:
        """rows: for each run's index, its metrics."""
        if self.sweep and self.trackers:
            joined = {f"{k}/{r}": v for r, row in rows.items() for k, v in row.items()}
            scores = [row.get("d4rl_normalized_score") for row in rows.values()]
            if scores and None not in scores:
                joined["d4rl_normalized_score"] = float(np.mean(scores))
            self.trackers[0].log(joined, step=step)
        else:
            for r, row in rows.items():
                if r < len(self.trackers):
                    self.trackers[r].log(row, step=step)

    def finish(self) -> None:
        for tracker in self.trackers:
            tracker.finish(quiet=True)


def run_directory(config: TrainConfig) -> Optional[Path]:
    """The run's directory: `resume`'s, or a new one under checkpoints_path."""
    if config.resume:
        return Path(config.resume)
    if config.checkpoints_path is None:
        return None
    names = config.env if isinstance(config.env, list) else [config.env]
    label = "+".join(name.removesuffix(".hdf5").strip("./") for name in names)
    safe = re.sub(r"[^\w.+-]+", "-", f"{config.name}-{label}").strip(".-")[:120]
    return Path(config.checkpoints_path) / f"{safe}-{uuid.uuid4().hex[:8]}"


def lock_directory(directory: Path) -> int:
    """Make the directory and hold it until this process ends. Raises UserError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{directory}: in use by another live process") from None
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror}") from None
    return descriptor


class Interrupted:
    """Remembers SIGINT or SIGTERM; the loop stops at the next update, with a checkpoint."""

    def __init__(self):
        self.signal, self.previous = 0, {}

    def __call__(self) -> bool:
        return self.signal != 0

    def _note(self, number, frame):
        self.signal = number

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are not ours to take
                pass
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Run:
    """What a training leaves behind: tables, evaluations, checkpoints, wandb, lines."""

    CHECKPOINT_SECONDS = 300

    def __init__(self, config, agent, task: Task, evaluator, directory, q_range: float):
        self.config, self.agent, self.task, self.evaluator = config, agent, task, evaluator
        self.directory, self.q_range = directory, q_range
        self.runs = product_of_runs(config)
        self.metrics = Metrics(len(self.runs))
        self.step, self.evaluated = 0, -1
        self.diverged = [-1] * len(self.runs)  # step at which a run went non-finite
        self.warned = [False] * len(self.runs)  # of Q running away
        self.evaluations, self.tables, self.wandb = [], {}, None
        self.started = self.saved_at = time.monotonic()
        self.seconds = {"evaluation": 0.0, "checkpoint": 0.0}
        self.logged = (self.started, 0)

    def open(self, checkpoint: Optional[dict], total: int) -> None:
        """Take up a resumed run's state, or start anew; then write the first files."""
        ids = []
        if checkpoint is not None:
            self.step, self.evaluated = checkpoint["step"], checkpoint["evaluated"]
            self.diverged, self.warned = checkpoint["diverged"], checkpoint["warned"]
            self.metrics.load_state_dict(checkpoint["metrics"], self.agent.device)
            ids = checkpoint["wandb_ids"]
        for name, flag in (("metrics", "log"), ("evaluations", "eval"), ("timing", "log")):
            self.tables[name] = Table(self.directory, f"{name}.csv")
            # A last row between two regular ones goes when the run is made longer.
            every = checkpoint["config"][f"{flag}_freq"] if checkpoint else 1
            last = self.step - bool(total > self.step and self.step % every)
            rows = self.tables[name].keep(lambda step, last=last: 0 < step <= last)
            if name == "evaluations":
                self.evaluations = rows
        self.logged = (time.monotonic(), self.step)
        if self.directory is not None:
            config = dataclasses.asdict(self.config)
            text = yaml.safe_dump({**config, "resume": None}, sort_keys=False)
            (self.directory / "config.yaml").write_text(text)
            if not (self.directory / "cql.py").exists():
                shutil.copyfile(__file__, self.directory / "cql.py")
        self.wandb = WandbLogger(self.config, self.directory, self.runs, ids)

    def alive(self) -> np.ndarray:
        return np.array(self.diverged) < 0

    def check_finite(self) -> None:
        """Stop the runs whose losses went non-finite; the others are not touched."""
        for r in np.flatnonzero(self.alive() & ~self.metrics.finite()):
            self.diverged[r] = self.step
            means = self.metrics.means()[r]
            name = next(name for name, value in means.items() if not math.isfinite(value))
            say(f"run {r} diverged: {name} is not finite by update {self.step}; stopped")

    def log(self, reset: bool = True) -> None:
        """A row of metrics.csv per live run: means since the last one."""
        self.check_finite()
        means, rows = self.metrics.means(), {}
        for r in np.flatnonzero(self.alive()):
            rows[int(r)] = means[r]
            self.warn_of_drift(r, means[r])
        if rows:
            table = [
                {"step": self.step, "run": r, **{k: number(v) for k, v in row.items()}}
                for r, row in rows.items()
            ]
            self.tables["metrics"].append(table)
            self.wandb.log(self.step, rows)
        now, (before, step) = time.monotonic(), self.logged
        timing = {"step": self.step, "seconds": now - self.started}
        timing["updates_per_s"] = (self.step - step) / max(now - before, 1e-9)
        timing.update({f"{k}_seconds": v for k, v in self.seconds.items()})
        self.tables["timing"].append([{k: f"{v:.8g}" for k, v in timing.items()}])
        self.logged = (now, self.step)
        if reset:
            self.metrics.reset()

    def warn_of_drift(self, r: int, means: Dict[str, float]) -> None:
        """Say once when Q prefers the policy's actions by more than rewards allow."""
        critics = range(1, self.config.n_critics + 1)
        drift = [means[f"cql_q{j}_current_actions"] - means[f"average_qf{j}"] for j in critics]
        if np.mean(drift) > self.q_range and not self.warned[r]:
            self.warned[r] = True
            say(
                f"run {r}: Q runs away: it puts the policy's actions {np.mean(drift):.3g} "
                f"above the data's, more than the data's rewards allow ({self.q_range:.3g}); "
                "returns will suffer. A larger cql_alpha holds it down."
            )

    def evaluate(self, interrupted: Callable[[], bool]) -> None:
        """Rows of evaluations.csv, one line on the terminal."""
        self.check_finite()
        before = time.monotonic()
        results = self.evaluator.evaluate(self.agent, self.step, self.alive(), interrupted)
        self.seconds["evaluation"] += time.monotonic() - before
        if results is None:
            return
        self.evaluated, rows, parts = self.step, {}, []
        for r in np.flatnonzero(self.alive()):
            returns, lengths = results[0][r], results[1][r]
            score = normalized_score(returns, self.task.reference)
            rows[int(r)] = {
                "return_mean": float(returns.mean()),
                "return_std": float(returns.std()),
                "length_mean": float(lengths.mean()),
                "d4rl_normalized_score": score,
            }
            parts.append(f"{returns.mean():.0f} +- {returns.std():.0f}")
        table = []
        for r, row in rows.items():
            values = {k: number(v) for k, v in row.items()}
            keys = {"step": self.step, "run": r, **self.runs[r]}
            table.append({**keys, "episodes": self.config.n_episodes, **values})
        if not table:
            return
        self.tables["evaluations"].append(table)
        self.evaluations += table
        if self.task.reference is None:
            del rows[next(iter(rows))]["d4rl_normalized_score"]
        self.wandb.log(self.step, rows)
        scores = [row.get("d4rl_normalized_score", math.nan) for row in rows.values()]
        text = f"update {self.step:>9,}  return " + " | ".join(parts)
        if self.task.reference is not None:
            text += "  score " + " | ".join(f"{score:.1f}" for score in scores)
            text += f"  mean {np.mean(scores):.1f}" if len(scores) > 1 else ""
        say(text)

    def checkpoint(self) -> None:
        """Write checkpoint.pt. A diverged run keeps its last finite state there; when
        none is left alive the file stays as it is."""
        self.check_finite()
        if self.directory is None or not self.alive().any():
            return
        before, path = time.monotonic(), self.directory / "checkpoint.pt"
        agent = self.agent.state_dict()
        if not self.alive().all() and path.exists():
            dead = torch.as_tensor(np.flatnonzero(~self.alive()))
            keep_slices(agent, read_checkpoint(path)["agent"], dead)
        payload = {
            "format": "cql.py",
            "version": VERSION,
            "kind": type(self.agent).__name__,
            "config": dataclasses.asdict(self.config),
            "task": dataclasses.asdict(self.task),
            "agent": agent,
            "phase": "offline",
            "step": self.step,
            "evaluated": self.evaluated,
            "diverged": self.diverged,
            "warned": self.warned,
            "metrics": self.metrics.state_dict(),
            "wandb_ids": self.wandb.ids,
        }
        save_checkpoint(path, payload)
        self.saved_at = time.monotonic()
        self.seconds["checkpoint"] += self.saved_at - before

    def overdue(self) -> bool:
        return time.monotonic() - self.saved_at > self.CHECKPOINT_SECONDS

    def summary(self) -> None:
        """The closing table: last and best evaluation of each run, and the files."""
        scored = self.task.reference is not None
        column = "d4rl_normalized_score" if scored else "return_mean"
        say(f"{'run':>4} {'seed':>6} {'cql_alpha':>10} {'last':>9} {'best':>9}  {column}")
        for r, run in enumerate(self.runs):
            rows = [row for row in self.evaluations if int(row["run"]) == r]
            values = [float(row[column]) for row in rows]
            ends = f"{values[-1]:9.2f} {max(values):9.2f}" if values else f"{'-':>9} {'-':>9}"
            note = f"  diverged at {self.diverged[r]}" if self.diverged[r] >= 0 else ""
            say(f"{r:>4} {run['seed']:>6} {run['cql_alpha']:>10g} {ends}{note}")
        say(f"files: {self.directory}" if self.directory else "files: none were written")


def keep_slices(new: dict, old: dict, dead: Tensor) -> None:
    """Put old tensors' slices of the dead runs into new; vectors without a run
    dimension (observation statistics) are the same in both."""
    for key, value in new.items():
        if isinstance(value, dict):
            keep_slices(value, old[key], dead)
        elif isinstance(value, Tensor) and value.ndim and len(value) > dead.max():
            new[key] = value.clone()
            new[key][dead] = old[key][dead].to(value.device)


# ======================================================================================
# Training
# ======================================================================================


def describe(config: TrainConfig, task: Task, data: Optional[Dataset], evaluator) -> None:
    """The opening lines, warnings included; resolves the reference returns."""
    if evaluator is None:
        say("no environment is recorded and --eval_env is not given: no evaluation;")
        say("  metrics.csv shows Q on data, policy and uniform actions")
    else:
        task.reference = reference_returns(task, evaluator.name)
    if data is not None:
        whole = data.episode_returns[data.whole] if data.whole.any() else data.episode_returns
        score = normalized_score(whole, task.reference)
        score = "" if math.isnan(score) else f" (score {score:.1f})"
        text = f"data: {len(data):,} transitions, {len(data.lengths)} episodes"
        say(f"{text}, mean return {whole.mean():.1f}{score}")
    if config.cql_lagrange and min(runs_of(config, "cql_target_action_gap")) < 0:
        say("cql_target_action_gap < 0 with cql_lagrange: a real target here, not 'off'; it")
        say("  pushes Q of the data above the soft maximum")
    if config.checkpoints_path is None and not config.resume:
        say("checkpoints_path is null: nothing will be written")


def train(config: TrainConfig, checkpoint: Optional[dict] = None) -> int:
    """Train every run of the config from the checkpoint on; returns the exit status."""
    device = pick_device(config)
    total = config.offline_iterations
    total = config.max_timesteps if total is None else total
    resumed = config.resume and (Path(config.resume) / "checkpoint.pt").exists()
    data = None if checkpoint and total == 0 else Dataset(config, device)
    task = data.task if data else Task(**checkpoint["task"])
    evaluator = None
    if task.env_id or config.eval_env:
        longest = int(data.lengths.max()) if data else 1000
        evaluator = Evaluator(task, config, len(product_of_runs(config)), longest)
    mean, std = data.statistics() if data and config.normalize else (0.0, 1.0)
    agent = ContinuousCQL(
        config, task.observation_dim, len(task.action_low), device,
        task.action_low, task.action_high, mean, std,
    )  # fmt: skip
    if checkpoint is not None:
        load_agent(agent, checkpoint, config.resume if resumed else config.load_model)
        if not resumed:
            agent.restart()
    directory = run_directory(config)
    lock = lock_directory(directory) if directory else None
    describe(config, task, data, evaluator)
    run = Run(config, agent, task, evaluator, directory, data.q_range if data else math.inf)
    run.open(checkpoint if resumed else None, total)
    n_runs = len(run.runs)
    say(f"training {n_runs} run{'s' * (n_runs > 1)} on {device}, update {run.step:,} to {total:,}")
    bar = tqdm(
        total=total, initial=run.step, unit="update", disable=not sys.stderr.isatty(),
        dynamic_ncols=True, leave=False,
    )  # fmt: skip
    try:
        with Interrupted() as interrupted:
            while run.alive().any():
                due = run.step == total or (run.step and run.step % config.eval_freq == 0)
                if due and run.evaluated != run.step:
                    if run.step == total and run.metrics.count:
                        run.log(reset=False)
                    if evaluator is not None:
                        run.evaluate(interrupted)
                    else:
                        run.evaluated = run.step
                    run.checkpoint()
                if interrupted() or run.step == total:
                    break
                batch = data.gather(agent.sample_indices(len(data), config.batch_size))
                run.metrics.add(agent.update(batch))
                run.step += 1
                bar.update()
                if run.step % config.log_freq == 0:
                    run.log()
                if run.overdue():
                    run.checkpoint()
            bar.close()
            if interrupted() and run.step < total:
                run.checkpoint()
                say(f"interrupted at update {run.step:,}; --resume {directory} continues")
                return 128 + interrupted.signal
        run.summary()
    finally:
        bar.close()
        run.wandb.finish()
        if lock is not None:
            os.close(lock)
    return 0 if run.alive().all() else 3


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status (0, 1, 2, 3, 130 or 143)."""
    try:
        given = read_command_line(sys.argv[1:] if argv is None else argv)
        config, checkpoint = layered_config(given)
        validate(config, given)
        return train(config, checkpoint)
    except UserError as error:
        print(f"cql.py: error: {error}", file=sys.stderr)
        return 2
    except MachineError as error:
        print(f"cql.py: failed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
