"""Record nine locomotion datasets in D4RL's manner with public policies.

    git clone --depth 1 https://github.com/openai/imitation policies/imitation
    git clone --depth 1 https://github.com/DLR-RM/rl-trained-agents \\
        policies/rl-trained-agents
    python benchmarks/sets.py --policies policies --out datasets/sets
    python cql.py --env datasets/sets/trpo-hopper-replay-v0

Hopper, HalfCheetah and Walker2d (v5) have three sets of 100,000 steps each. `medium`
comes from one policy. `replay` comes from snapshots of one training run up to about
that level. `medium-expert` is half medium and half expert. D4RL's policies are not
public, so its sets cannot be repeated. These sets have other levels, and their names
say whose policies they are: `trpo` from openai/imitation, `sac` (Stable-Baselines3)
from DLR-RM/rl-trained-agents. Scores on them and on D4RL's sets are not comparable.

Actions are sampled. Each set is a Minari dataset with D4RL's reference returns. The
same command records the same arrays on the same machine. Five more sets, which --only
names, test a preset that was chosen on the nine. The table on the screen, and
in the file of --table, describes each set: the return of complete episodes, its
normalized score, and the fraction of these episodes that a termination ended.
"""

import argparse
import csv
import io
import math
import os
import sys
import time
import zipfile
from pathlib import Path
from typing import Callable, Dict, List, Optional, Union

# Several threads would slow down products with one observation. NumPy reads this
# variable when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium as gym
import h5py
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import record

import cql

# Streams of random numbers. cql.py and scripts/record.py have smaller numbers.
EPISODES, ACTIONS = range(20, 22)
# The policies of each set and their shares of the steps. A number is the iteration of a
# TRPO snapshot; the snapshots are 20 iterations apart.
SETS: Dict[str, Dict[Union[int, str], int]] = {
    "hopper-medium": {"sac": 1},
    # Nothing lies between iteration 20 (a return of some 600) and 40 (some 2,200). Most
    # steps are those of 20, so that the data stays below the medium level.
    "hopper-replay": {0: 1, 20: 3, 40: 1},
    "hopper-medium-expert": {"sac": 1, 500: 1},
    "halfcheetah-medium": {500: 1},
    "halfcheetah-replay": dict.fromkeys(range(0, 501, 20), 1),
    "halfcheetah-medium-expert": {500: 1, "sac": 1},
    "walker2d-medium": {60: 1},
    "walker2d-replay": dict.fromkeys(range(0, 61, 20), 1),
    "walker2d-medium-expert": {60: 1, 500: 1},
    # No setting was chosen on these. They are recorded if --only names them.
    "hopper-mixed": {20: 1, 60: 1, 100: 1, "sac": 1},
    "hopper-history": dict.fromkeys(range(0, 501, 20), 1),
    "halfcheetah-early": {100: 1},
    "walker2d-expert": {"sac": 1},
    "walker2d-history": dict.fromkeys(range(0, 501, 20), 1),
}
NINE = list(SETS)[:9]
ROBOTS = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d"}
TRPO_RUNS = {"hopper": "v1_4", "halfcheetah": "v1_2", "walker2d": "v1_1"}
OWNERS = {"imitation": "openai", "rl-trained-agents": "DLR-RM"}
COLUMNS = ["set", "environment", "policies", "steps", "episodes"]
COLUMNS += ["return_mean", "return_std", "score", "terminated"]


def policy_path(robot: str, policy: Union[int, str]) -> Path:
    """Return the file of a policy, relative to the directory of both repositories."""
    name = ROBOTS[robot]
    if policy == "sac":
        return Path(f"rl-trained-agents/sac/{name}-v3_1/{name}-v3.zip")
    return Path(f"imitation/expert_policies/modern/log_{name}-{TRPO_RUNS[robot]}.h5")


def read_trpo(path: Path, iteration: int, space: gym.spaces.Box) -> Callable:
    """Read a snapshot of a TRPO run.

    Return the function (observation, standard normal noise) -> action."""
    with h5py.File(path) as file:
        group = file[f"snapshots/iter{iteration:07d}/GaussianPolicy"]
        hidden = group["hidden/FeedforwardNet"]
        names = sorted(hidden, key=lambda name: int(name.removeprefix("layer_")))
        groups = [hidden[name]["AffineLayer"] for name in names]
        groups.append(group["out/AffineLayer"])
        layers = [(layer["W"][()], layer["b"][0]) for layer in groups]
        statistics = group["obsnorm/Standardizer"]
        mean = statistics["mean_1_D"][0]
        variance = statistics["meansq_1_D"][0] - mean**2
        spread = np.exp(group["logstdevs_1_Da"][0])
    scale = np.sqrt(np.maximum(variance, 0)) + 1e-6
    *inner, (last_weight, last_bias) = layers

    def sample(observation, noise):
        features = (observation - mean) / scale
        for weight, bias in inner:
            features = np.tanh(features @ weight + bias)
        action = features @ last_weight + last_bias + spread * noise
        return action.clip(space.low, space.high)

    return sample


def read_sac(path: Path, space: gym.spaces.Box) -> Callable:
    """Read the actor of a SAC agent of Stable-Baselines3.

    Return the function (observation, standard normal noise) -> action."""
    with zipfile.ZipFile(path) as archive:
        # The other members of the archive are pickles and are not read.
        content = io.BytesIO(archive.read("policy.pth"))
    state = torch.load(content, map_location="cpu", weights_only=True)
    layers = {}
    for name, values in state.items():
        module, _, kind = name.rpartition(".")
        layers.setdefault(module, {})[kind] = values.numpy()
    inner = [name for name in layers if name.startswith("actor.latent_pi.")]
    mean = layers["actor.mu"]
    log_std = layers["actor.log_std"]
    center = (space.high + space.low) / 2
    half = (space.high - space.low) / 2

    def sample(observation, noise):
        features = observation.astype(np.float32)
        for name in inner:
            values = layers[name]["weight"] @ features + layers[name]["bias"]
            features = np.maximum(values, 0)
        spread = np.exp((log_std["weight"] @ features + log_std["bias"]).clip(-20, 2))
        action = mean["weight"] @ features + mean["bias"] + spread * noise
        return (center + half * np.tanh(action)).clip(space.low, space.high)

    return sample


def read_policy(root: Path, env: gym.Env, robot: str, policy) -> Callable:
    """Return the function (observation, noise) -> action of a policy.

    Raise UserError if its file is missing or invalid."""
    path = root / policy_path(robot, policy)
    clone = policy_path(robot, policy).parts[0]
    address = f"https://github.com/{OWNERS[clone]}/{clone}"
    hint = f"git clone --depth 1 {address} {root / clone}"
    if not path.is_file():
        problem = f"does not exist; expected a file of {address}"
        raise cql.UserError(f"{path}: {problem}; run {hint}")
    where = f"{path}: is not the file of {address}; remove it and run {hint}"
    with cql.errors_as(cql.UserError, where):
        if policy == "sac":
            sample = read_sac(path, env.action_space)
        else:
            sample = read_trpo(path, policy, env.action_space)
        # A trial raises an exception if the weights have other sizes.
        sample(np.zeros(env.observation_space.shape), np.zeros(env.action_space.shape))
    return sample


def open_set(root: Path, name: str):
    """Return the environment and the policies of a set. Raise UserError."""
    robot = name.partition("-")[0]
    env = gym.make(f"{ROBOTS[robot]}-v5")
    return env, [read_policy(root, env, robot, policy) for policy in SETS[name]]


def make_act(sample: Callable, space: gym.spaces.Box, seed: int) -> Callable:
    """Return the function observation -> sampled action of the space's type."""
    rng = np.random.default_rng(seed)

    def act(observation):
        noise = rng.standard_normal(space.shape)
        return sample(observation, noise).astype(space.dtype)

    return act


def set_name(name: str) -> str:
    """Return the directory's name of a set, which says whose policies it comes from."""
    owners = ["sac" if policy == "sac" else "trpo" for policy in SETS[name]]
    return "-".join([*dict.fromkeys(owners), name, "v0"])


def describe(name: str) -> str:
    """Describe the policies of a set and their shares of the steps."""
    shares = SETS[name]
    texts = ["SAC" if key == "sac" else f"TRPO {key}" for key in shares]
    if len(texts) == 1:
        return texts[0]
    if shares == dict.fromkeys(range(0, 20 * len(shares), 20), 1):
        return f"{texts[0]} to {list(shares)[-1]}, every 20, equal shares"
    if len(set(shares.values())) > 1:
        percent = [100 * share / sum(shares.values()) for share in shares.values()]
        return ", ".join(f"{a} ({b:.0f} %)" for a, b in zip(texts, percent))
    if len(texts) == 2:
        return f"{texts[0]} and {texts[1]}, half each"
    return f"{', '.join(texts[:-1])} and {texts[-1]}, equal shares"


def split(total: int, shares: List[int]) -> List[int]:
    """Split a number of steps by shares; the sum is exact."""
    ends = np.rint(total * np.cumsum(shares) / sum(shares)).astype(int)
    return np.diff(ends, prepend=0).tolist()


def summarize(episodes: list, limit: int, reference: List[float]) -> dict:
    """Return the numbers of steps and episodes, and statistics of complete episodes.

    An episode that the number of steps truncated is not complete."""
    whole = [e for e in episodes if e.terminations[-1] or len(e) == limit]
    numbers = {"steps": sum(map(len, episodes)), "episodes": len(episodes)}
    returns = [episode.rewards.sum() for episode in whole] or [math.nan]
    ended = [episode.terminations[-1] for episode in whole] or [math.nan]
    numbers["return_mean"] = np.mean(returns)
    numbers["return_std"] = np.std(returns)
    numbers["score"] = cql.normalized_score(numbers["return_mean"], reference)
    numbers["terminated"] = np.mean(ended)
    return numbers


def record_set(options, name: str, out: Path, env: gym.Env, policies: list) -> dict:
    """Record one set and write it to the directory out. Return its row of the table.

    Raise MachineError if the environment or the disk fails."""
    robot = name.partition("-")[0]
    limit = env.spec.max_episode_steps
    reference = list(cql.REFERENCE_RETURNS[f"{ROBOTS[robot]}-"])
    shares = split(options.steps, list(SETS[name].values()))
    print(f"{out.name}: {describe(name)}", flush=True)
    episodes = []
    for part, (policy, sample, steps) in enumerate(zip(SETS[name], policies, shares)):
        numbers = [options.seed, list(SETS).index(name), part]
        act = make_act(sample, env.action_space, cql.seed_from([ACTIONS, *numbers]))
        start = time.perf_counter()
        # record.record derives the seed of each episode from its argument.
        played = record.record(env, act, steps, cql.seed_from([EPISODES, *numbers]))
        seconds = time.perf_counter() - start
        row = summarize(played, limit, reference)
        text = f"{policy}: {steps:,} steps, {len(played)} episodes, "
        text += f"return {row['return_mean']:.1f} +- {row['return_std']:.1f}"
        print(f"  {text}, {seconds:.1f} s", flush=True)
        episodes += played
    clones = sorted({policy_path(robot, policy).parts[0] for policy in SETS[name]})
    sources = " and ".join(f"github.com/{OWNERS[clone]}/{clone}" for clone in clones)
    metadata = {
        "algorithm_name": describe(name),
        "description": f"{options.steps} steps in {env.spec.id}, seed {options.seed}. "
        f"Actions sampled from {describe(name)}. Policies of {sources} (MIT license).",
        "code_permalink": "benchmarks/sets.py",
        "ref_min_score": reference[0],
        "ref_max_score": reference[1],
    }
    where = f"cannot write {out}"
    with cql.errors_as(cql.MachineError, where, (OSError, RuntimeError, ValueError)):
        record.write_dataset(out.absolute(), episodes, env, **metadata)
    row = {"set": out.name, "environment": env.spec.id, "policies": describe(name)}
    row.update(summarize(episodes, limit, reference))
    for column in ("return_mean", "return_std", "score"):
        row[column] = f"{row[column]:.1f}"
    row["terminated"] = f"{row['terminated']:.2f}"
    return row


def markdown(rows: List[dict]) -> str:
    """Return the table as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    lines += [[str(row[column]) for column in COLUMNS] for row in rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def record_sets(options) -> None:
    """Record the sets that the options name and write the table.

    Raise UserError for invalid options or files, before anything is recorded."""
    # 26 policies share the steps of a set.
    if options.steps < 100:
        problem = "expected at least 100, so that each policy has a share"
        raise cql.UserError(f"--steps {options.steps}: {problem}; pass more")
    if options.seed < 0:
        hint = "expected an integer of at least 0; pass another seed"
        raise cql.UserError(f"--seed {options.seed}: {hint}")
    opened = {name: open_set(options.policies, name) for name in options.only}
    places = {name: options.out / set_name(name) for name in opened}
    for out in places.values():
        record.check_out(out, options.overwrite)
    rows = [record_set(options, name, places[name], *opened[name]) for name in opened]
    print("\n" + markdown(rows), end="")
    if options.table:
        where = f"cannot write --table {options.table}"
        with cql.errors_as(cql.MachineError, where, OSError):
            with open(options.table, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """Return the parsed options. Raise UserError for invalid ones."""
    parser = record.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "directory that holds imitation/ and rl-trained-agents/"
    add("--policies", type=Path, required=True, metavar="DIR", help=text)
    text = "directory of the new datasets"
    add("--out", type=Path, default="datasets/sets", metavar="DIR", help=text)
    text = f"record these sets only: {', '.join(SETS)}"
    add("--only", nargs="+", choices=SETS, default=NINE, metavar="SET", help=text)
    add("--steps", type=int, default=100_000, help="number of steps of each set")
    add("--seed", type=int, default=0, help="seed of the initial states and actions")
    add("--overwrite", action="store_true", help="replace existing datasets")
    add("--table", type=Path, help="CSV file to write the table to")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when done, 1 if the environment or the disk failed, 2 for invalid
    input, 130 if interrupted."""
    try:
        record_sets(parse(argv))
    except cql.UserError as error:
        print(f"sets.py: error: {error}", file=sys.stderr)
        return 2
    except cql.MachineError as error:
        print(f"sets.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
