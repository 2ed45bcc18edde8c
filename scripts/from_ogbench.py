"""Convert an OGBench single-task dataset to a Minari dataset that cql.py can read.

    pip install ogbench==1.2.2 dm_control==1.0.44
    python -c "import ogbench; \\
        ogbench.download_datasets(['cube-single-play-v0'])"
    python scripts/from_ogbench.py ~/.ogbench/data/cube-single-play-v0.npz \\
        --env cube-single-play-singletask-task2-v0 --out datasets/cube-v0
    python cql.py --env datasets/cube-v0 \\
        --eval_env ogbench:cube-single-singletask-task2-v0

Without a network on this machine, download the file elsewhere, from
https://rail.eecs.berkeley.edu/datasets/ogbench/cube-single-play-v0.npz. --env
is the dataset's name in OGBench. The environment's name lacks the word for the
kind of data, here "play"; the script prints it. The package labels the rewards
and masks of the task from qpos and button_states, which the file must hold.
Image observations (visual-...) are not supported.

An episode of the Minari dataset is a part of a recorded trajectory. A step with
mask 0 (the goal is reached) terminates its episode. The step after it begins
another one, so a trajectory that stays at the goal becomes many episodes of one
step. The last episode of a trajectory is truncated unless its mask is 0.

An episode that does not begin its trajectory has `continued` = True in Minari's
episode metadata. The states in which these begin are not initial states of the
task, and their returns are not those of the task. The printed mean return is
that of the other episodes: of a trajectory until it first reaches the goal.
So are cql.py's mean return, and judge.py's initial states and returns.
"""

import argparse
import os
import pickle
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

INSTALL = "pip install ogbench==1.2.2 dm_control==1.0.44"
EXAMPLE = "cube-single-play-singletask-task2-v0"


@dataclass
class Parts:
    """Episodes of the dataset, and where they begin."""

    episodes: List[EpisodeBuffer]
    continued: np.ndarray  # [episodes] bool: does not begin its trajectory

    def of_trajectories(self) -> List[EpisodeBuffer]:
        """Return the episodes that begin a trajectory."""
        chosen = []
        for episode, continued in zip(self.episodes, self.continued):
            if not continued:
                chosen.append(episode)
        return chosen


def import_ogbench():
    """Return the package. Raise UserError if it is missing or lacks what is needed."""
    try:
        with cql.quiet():
            import ogbench
            import ogbench.relabel_utils
        _ = ogbench.load_dataset, ogbench.relabel_utils.relabel_dataset
    except (ImportError, AttributeError) as error:
        problem = f"ogbench cannot be used ({cql.brief(error)})"
        raise cql.UserError(f"{problem}; install it: {INSTALL}") from None
    return ogbench


def environment_name(dataset_name: str) -> str:
    """Return the environment of a single-task dataset: the name without the word for
    the kind of data, as in ogbench.make_env_and_datasets.

    Raise UserError if the name is not that of a single-task dataset of vectors."""
    where = f"--env {dataset_name}"
    words = dataset_name.split("-")
    if "singletask" not in words:
        hint = f"expected, for example, {EXAMPLE}"
        raise cql.UserError(f"{where}: not a single-task dataset; {hint}")
    place = words.index("singletask")
    name = "-".join(words[: max(place - 1, 0)] + words[place:])
    if name not in gym.registry:
        hint = f"expected a name such as {EXAMPLE}"
        raise cql.UserError(f"{where}: OGBench has no environment {name}; {hint}")
    if gym.spec(name).kwargs.get("ob_type") == "pixels":
        hint = "pass a dataset whose name does not begin with visual-"
        raise cql.UserError(f"{where}: observations are images; {hint}")
    return name


def check_file(path: Path, name: str) -> None:
    """Raise UserError unless the file has the arrays that relabeling needs, and complete
    trajectories."""
    needed = ["observations", "actions", "terminals"]
    if "puzzle" not in name:
        needed.append("qpos")
    if "puzzle" in name or "scene" in name:
        needed.append("button_states")
    if not path.is_file():
        hint = "pass the .npz file of an OGBench dataset"
        raise cql.UserError(f"{path}: no such file; {hint}")
    with cql.errors_as(cql.UserError, f"{path}: not a readable .npz file"):
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with file:
            missing = [each for each in needed if each not in file.files]
            terminals = file["terminals"] if "terminals" in file.files else None
    if missing:
        text = f"has no {', '.join(missing)}; expected {', '.join(needed)}"
        hint = "download the file again with a current version of OGBench"
        raise cql.UserError(f"{path}: {text}; {hint}")
    if terminals.ndim != 1 or not len(terminals) or not terminals[-1]:
        problem = "the last row is not terminal; expected complete trajectories"
        raise cql.UserError(f"{path}: {problem}; download the file again")


def load(path: Path, name: str, ogbench) -> Tuple[Dict[str, np.ndarray], gym.Space]:
    """Return the package's dataset with rewards and masks, and the action space.

    Raise UserError if the file does not fit the environment."""
    with cql.errors_as(cql.UserError, f"{name}: cannot be made"), cql.quiet():
        env = gym.make(name)
        env.reset(seed=0)
        action_space = env.action_space
    with cql.errors_as(cql.UserError, f"{path}: damaged or foreign"), cql.quiet():
        data = ogbench.load_dataset(path, add_info=True)
        sizes = {
            "observations": env.observation_space.shape,
            "actions": action_space.shape,
            "qpos": (env.unwrapped.model.nq,),
        }
        n = len(data["observations"])
        if n == 0:
            raise cql.UserError(f"{path}: no transitions; expected trajectories")
        for key, size in sizes.items():
            if key in data and data[key].shape != (n, *size):
                found = f"{key} have shape {data[key].shape}"
                expected = f"expected {(n, *size)} for {name}"
                hint = "pass the file of the dataset that --env names"
                raise cql.UserError(f"{path}: {found}; {expected}; {hint}")
        ogbench.relabel_utils.relabel_dataset(name, env, data)
        env.close()
    return data, action_space


def split(data: Dict[str, np.ndarray]) -> Parts:
    """Split the trajectories into episodes, each of which ends at its first mask 0.

    Episodes have T actions and T + 1 observations."""
    reached = data["masks"] == 0
    recording_ends = data["terminals"] != 0
    episodes = []
    continued = []
    first = 0
    for last in np.flatnonzero(reached | recording_ends).tolist():
        rows = slice(first, last + 1)
        at_end = np.arange(first, last + 1) == last
        final = data["next_observations"][last : last + 1]
        episode = EpisodeBuffer(
            observations=np.concatenate([data["observations"][rows], final]),
            actions=data["actions"][rows],
            rewards=data["rewards"][rows],
            terminations=at_end & reached[last],
            truncations=at_end & (not reached[last]),
        )
        episodes.append(episode)
        continued.append(first > 0 and not recording_ends[first - 1])
        first = last + 1
    return Parts(episodes, np.array(continued))


def check_space(directory: Path, episodes: List[EpisodeBuffer]) -> None:
    """Raise OSError if the disk may be too small for the episodes.

    The check comes before writing because HDF5 does not fail cleanly on a full disk."""
    n_bytes = sum(len(pickle.dumps(episode)) for episode in episodes)
    needed = 2 * n_bytes + 20_000 * len(episodes)
    free = shutil.disk_usage(directory).free
    if free < needed:
        sizes = f"{free / 1e6:,.2f} MB free, up to {needed / 1e6:,.2f} MB needed"
        raise OSError(f"{directory}: {sizes}; free some disk space")


def write(out: Path, parts: Parts, name: str, action_space, **metadata) -> None:
    """Write the episodes as the Minari dataset out/data, replacing an existing one.

    Raises OSError, RuntimeError or ValueError if the disk fails; an existing dataset
    then stays."""
    check_space(out.parent, parts.episodes)
    n = parts.episodes[0].observations.shape[1]
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        new = Path(beside) / "data"
        storage = MinariStorage.new(
            new,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (n,)),
            action_space=action_space,
            env_spec=gym.spec(name),
        )
        names = {"dataset_id": out.name, "minari_version": minari.__version__}
        storage.update_metadata({**names, **metadata})
        storage.update_episodes(parts.episodes)
        later = np.flatnonzero(parts.continued).tolist()
        storage.update_episode_metadata([{"continued": True}] * len(later), later)
        out.mkdir(exist_ok=True)
        if (out / "data").exists():
            shutil.rmtree(out / "data")
        os.rename(new, out / "data")


def check_out(out: Path, overwrite: bool) -> None:
    """Make the parent directory of the dataset.

    Raise UserError if the dataset cannot be written to out."""
    where = f"--out {out}"
    hint = "choose another directory"
    with cql.errors_as(cql.UserError, f"{where}: cannot be written; {hint}", OSError):
        if out.exists() and not overwrite:
            raise cql.UserError(f"{where}: already exists; {hint} or pass --overwrite")
        if out.exists() and not (out / "data" / "metadata.json").exists():
            problem = "exists but is not a dataset, so it is not overwritten"
            raise cql.UserError(f"{where}: {problem}; {hint}")
        out.parent.mkdir(parents=True, exist_ok=True)
        # os.access does not detect every directory that cannot be written.
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent).cleanup()


def print_summary(path: Path, parts: Parts, n_trajectories: int) -> None:
    """Print the numbers of transitions and episodes, and the trajectories' returns."""
    lengths = np.array([len(each) for each in parts.episodes])
    n = len(lengths)
    print(f"{path}: {lengths.sum():,} transitions in {n_trajectories:,} trajectories")
    print(f"{n:,} episodes of {lengths.min():,} to {lengths.max():,} steps", end="; ")
    print(f"{(lengths == 1).sum():,} of them have one step")
    n_terminal = sum(bool(each.terminations[-1]) for each in parts.episodes)
    print(f"  {n_terminal:,} terminate (mask 0); {n - n_terminal:,} are truncated")
    print(f"  {parts.continued.sum():,} continue a trajectory after a mask 0")
    starts = parts.of_trajectories()
    returns = [each.rewards.sum(dtype=np.float64) for each in starts]
    n_reached = sum(bool(each.terminations[-1]) for each in starts)
    print(f"trajectories up to the goal: mean return {np.mean(returns):.1f}", end=", ")
    print(f"{n_reached:,} of {len(starts):,} reach it")


def convert(options: argparse.Namespace) -> None:
    """Read the file, write the dataset and print a summary.

    Raise UserError for invalid input before anything is written, and MachineError if
    the disk fails."""
    ogbench = import_ogbench()
    name = environment_name(options.env)
    check_file(options.file, name)
    check_out(options.out, options.overwrite)
    data, action_space = load(options.file, name, ogbench)
    parts = split(data)
    metadata = {
        "description": f"OGBench's {options.env}, relabeled for its task",
        "code_permalink": "scripts/from_ogbench.py",
    }
    where = f"cannot write {options.out}"
    with cql.errors_as(cql.MachineError, where, (OSError, RuntimeError, ValueError)):
        write(options.out.absolute(), parts, name, action_space, **metadata)
    print_summary(options.file, parts, int(data["terminals"].sum()))
    print(f"wrote {options.out}")
    print(f"next: python cql.py --env {options.out} --eval_env ogbench:{name}")


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
    add = parser.add_argument
    add("file", type=Path, help=".npz file of an OGBench dataset")
    text = f"name of the single-task dataset, for example {EXAMPLE}"
    add("--env", required=True, metavar="NAME", help=text)
    add("--out", required=True, type=Path, help="directory of the new dataset")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when done, 1 if the disk failed, 2 for invalid input, 130 if
    interrupted."""
    try:
        convert(parse(argv))
    except cql.UserError as error:
        print(f"from_ogbench.py: error: {error}", file=sys.stderr)
        return 2
    except cql.MachineError as error:
        print(f"from_ogbench.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
