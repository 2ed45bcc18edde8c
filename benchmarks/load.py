"""Seconds and bytes that cql.py takes to load a million hopper-sized transitions.

    python benchmarks/load.py

Writes the same random episodes (500 to 1000 steps, float64 observations and the infos
of Minari's mujoco sets) as a Minari dataset and as D4RL's flat HDF5, and reads each in a
fresh process twice, the second time with the file in the page cache. MB is what the
arrays occupy, the limit 1.2 times s, a, r, d and s' in float32. Target: 3 s warm.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TRANSITIONS, O_DIM, A_DIM = 1_000_000, 11, 3
INFOS = "x_position z_distance_from_origin x_velocity reward_survive reward_forward"


def write(directory: str) -> list:
    """Both files; returns their paths."""
    os.environ["MINARI_DATASETS_PATH"] = directory
    warnings.simplefilter("ignore")  # Minari misses the author's name
    import h5py
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    rng, buffers, flat, left = np.random.default_rng(0), [], [], TRANSITIONS
    while left > 0:
        T = int(rng.integers(500, 1001))
        s, a = rng.standard_normal((T + 1, O_DIM)), rng.uniform(-1, 1, (T, A_DIM))
        last = np.arange(1, T + 1) == T
        terminals, timeouts = last & (T < 1000), last & (T == 1000)
        common = {"actions": a.astype("f"), "rewards": rng.standard_normal(T)}
        ends = {"terminations": terminals, "truncations": timeouts}
        infos = {key: rng.standard_normal(T + 1) for key in INFOS.split()}
        buffers.append(EpisodeBuffer(observations=s, **common, **ends, infos=infos))
        states = {"observations": s[:-1], "next_observations": s[1:]}
        flat.append({**states, **common, "terminals": terminals, "timeouts": timeouts})
        left -= T
    name = "load/hopper-v0"
    spaces = {"observation_space": Box(-np.inf, np.inf, (O_DIM,), np.float64)}
    spaces["action_space"] = Box(-1, 1, (A_DIM,), np.float32)
    minari.create_dataset_from_buffers(name, buffers, description="", **spaces)
    with h5py.File(f"{directory}/hopper.hdf5", "w") as file:
        for key in flat[0]:
            joined = np.concatenate([part[key] for part in flat])
            file[key] = joined if joined.dtype == bool else joined.astype(np.float32)
    return [f"{directory}/{name}", f"{directory}/hopper.hdf5"]


def read(path: str) -> str:
    """Load it; returns what that took."""
    sys.path.insert(0, str(ROOT))
    import cql

    start, config = time.perf_counter(), cql.TrainConfig(env=path)
    episodes, task = cql.read_data(config)
    data = cql.Dataset(config, episodes, task)
    seconds, n = time.perf_counter() - start, len(data)
    tensors = [data.observations, data.rows, *data.columns.values()]
    size = sum(tensor.nbytes for tensor in tensors)
    limit = 1.2 * 4 * n * (2 * O_DIM + A_DIM + 2)
    return f"{n:,} in {seconds:.2f} s, {size / 1e6:.1f} MB of {limit / 1e6:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--read", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.read:
        return print(read(options.read))
    with tempfile.TemporaryDirectory() as directory:
        for path in write(directory):
            for when in ("first", "warm"):
                command = [sys.executable, __file__, "--read", path]
                done = subprocess.run(
                    command, check=True, stdout=subprocess.PIPE, text=True
                )
                result = done.stdout.splitlines()[-1]  # after what cql.py says
                print(f"{Path(path).name}, {when}: {result}", flush=True)


if __name__ == "__main__":
    main()
