"""Seconds and memory that cql.py takes to load a million transitions.

    python benchmarks/load.py --out load.csv
    python benchmarks/load.py --observations 376 --actions 17 --out load-376.csv

Writes the same random episodes of 1,000 steps (float64 observations and the infos of
Minari's MuJoCo sets) as a Minari dataset and as D4RL's flat HDF5 of float32 numbers.
Each is read in a fresh process twice, the second time with the file in the page cache:
data, Dataset and the statistics of the observations, as `train` does. `tensors` is the
memory of the Dataset, `peak` the largest resident memory of the process while it loads,
without that of the process when the libraries have been imported and a single episode
has been read.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS = 1000  # of an episode
INFOS = "x_position z_distance_from_origin x_velocity reward_survive reward_forward"


def random_episode(rng, sizes) -> dict:
    """Return the arrays of an episode that a time limit ends."""
    n_observations, n_actions = sizes
    return {
        "observations": rng.standard_normal((STEPS + 1, n_observations)),
        "actions": rng.uniform(-1, 1, (STEPS, n_actions)).astype(np.float32),
        "rewards": rng.standard_normal(STEPS),
        "terminations": np.zeros(STEPS, bool),
        "truncations": np.arange(1, STEPS + 1) == STEPS,
    }


def write(directory: str, n_episodes: int, sizes) -> list:
    """Write both files, episode by episode. Return their paths."""
    os.environ["MINARI_DATASETS_PATH"] = directory
    warnings.simplefilter("ignore")  # Minari misses the author's name
    import h5py
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    folder = Path(directory, f"load-{n_episodes}-v0", "data")
    folder.mkdir(parents=True)
    storage = MinariStorage.new(
        folder,
        observation_space=Box(-np.inf, np.inf, sizes[:1], np.float64),
        action_space=Box(-1, 1, sizes[1:], np.float32),
    )
    version = minari.__version__
    storage.update_metadata(
        {"dataset_id": folder.parent.name, "minari_version": version}
    )
    rng = np.random.default_rng(0)
    flat = Path(directory, f"load-{n_episodes}.hdf5")
    rows = n_episodes * STEPS
    shapes = {
        "observations": (rows, sizes[0]),
        "next_observations": (rows, sizes[0]),
        "actions": (rows, sizes[1]),
        "rewards": (rows,),
        "terminals": (rows,),
        "timeouts": (rows,),
    }
    with h5py.File(flat, "w") as file:
        for name, shape in shapes.items():
            kind = bool if name in ("terminals", "timeouts") else np.float32
            file.create_dataset(name, shape, kind)
        for i in range(n_episodes):
            episode = random_episode(rng, sizes)
            infos = {key: rng.standard_normal(STEPS + 1) for key in INFOS.split()}
            storage.update_episodes([EpisodeBuffer(**episode, infos=infos)])
            here = slice(i * STEPS, (i + 1) * STEPS)
            file["observations"][here] = episode["observations"][:-1]
            file["next_observations"][here] = episode["observations"][1:]
            file["timeouts"][here] = episode["truncations"]
            for name in ("actions", "rewards"):
                file[name][here] = episode[name]
    return [str(folder.parent), str(flat)]


def resident() -> float:
    """Return the present resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def read(small: str, path: str) -> dict:
    """Load a small dataset, then the large one. Return what that took."""
    sys.path.insert(0, str(ROOT))
    import cql

    def load(path):
        config = cql.TrainConfig(env=path)
        episodes, task = cql.read_data(config)
        data = cql.Dataset(config, episodes, task)
        del episodes
        data.statistics()
        return data

    cql.keep_freed_memory()
    load(small)
    before = resident()
    start = time.perf_counter()
    data = load(path)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    tensors = [data.observations, data.rows, *data.columns.values()]
    size = sum(tensor.nbytes for tensor in tensors)
    return {
        "transitions": len(data),
        "seconds": round(seconds, 2),
        "tensors_mb": round(size / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "ratio": round(peak / size, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--episodes", type=int, default=1000, help="of 1,000 steps")
    add("--observations", type=int, default=11, help="observation dimensions")
    add("--actions", type=int, default=3, help="action dimensions")
    add("--out", default="load.csv", help="the table to write")
    add("--read", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.read:
        return print(json.dumps(read(*options.read)))
    sizes = options.observations, options.actions
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        small = write(directory, 1, sizes)
        large = write(directory, options.episodes, sizes)
        for pair in zip(small, large):
            for when in ("first", "warm"):
                command = [sys.executable, __file__, "--read", *pair]
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True
                )
                result = json.loads(done.stdout.splitlines()[-1])
                kind = "hdf5" if pair[1].endswith(".hdf5") else "minari"
                row = {"format": kind, "observations": sizes[0], "read": when, **result}
                print(row, flush=True)
                rows.append(row)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
