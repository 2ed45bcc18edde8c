"""Time of an evaluation beside that of stepping its environments alone.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --env Hopper-v5 --rounds 20 --out hopper.csv
    git show bd30250:cql.py > OLD.py
    python benchmarks/evaluation.py --old OLD.py --runs 3 --out old.csv

Ten episodes, in HalfCheetah-v5, which never ends early, of 1,000 steps each: once as
cql.py evaluates (networks of the default size, untrained), once with the same actions
ready-made, and once with them ready-made and the policy called beside them for nothing:
the least that an evaluation of these networks can take, since a forward pass also cools
the caches that the environments live in. In alternating rounds on one thread. Prints
each round, then the medians of the ratios.

--old compares with an older cql.py instead: both evaluate as many episodes with the same
flags, in alternating rounds of CPU seconds. Its weights and initial states are others.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from speed import load_cql  # noqa: E402

import cql  # noqa: E402

COLUMNS = "evaluation", "environments", "environments_and_policy"
EPISODES = 10


def alone(envs, seeds, actions, act=None) -> None:
    """Step the environments with ready-made actions."""
    for seed, each in zip(seeds, envs):
        each.reset(seed=seed)
    observations = np.zeros((1, len(seeds), each.observation_space.shape[0]))
    for row in actions:
        if act:
            act(observations)
        for each, action in zip(envs, row):
            each.step(action)


def record(evaluator, agent) -> list:
    """The actions of an evaluation, [episodes, ...] a step; makes its environments."""
    act, actions = agent.act, []

    def recording(observations):
        chosen = act(observations)
        actions.append(agent.task.to_environment(chosen[0]))
        return chosen

    agent.act = recording
    evaluator.episodes(agent, 0, [0], [])
    del agent.act
    return actions


def prepare(cql, env: str, n_runs: int):
    """Return the evaluator and the untrained agent of a cql.py, their environments made
    and the allocator set as `train` does."""
    cql.keep_freed_memory()
    flags = {"env": None, "max_timesteps": 0, "normalize": False}
    flags |= {"eval_env": env, "n_episodes": EPISODES, "seed": list(range(n_runs))}
    config = cql.TrainConfig(**flags)
    _, task, evaluator = cql.load(config, None, torch.device("cpu"))
    agent = cql.make_agent(config, task)
    evaluator.make_players(n_runs * EPISODES)
    return evaluator, agent


def compare(old: Path, env: str, n_runs: int, rounds: int) -> list:
    """Time evaluations of cql.py and of an older one in alternating rounds."""
    sides = {"cql.py": cql, "old": load_cql(old)}
    sides = {name: prepare(module, env, n_runs) for name, module in sides.items()}
    rows = []
    for i in range(-1, rounds):
        row = {"round": i, "runs": n_runs}
        for name, (evaluator, agent) in sides.items():
            start = time.process_time()
            evaluator.episodes(agent, 0, list(range(n_runs)), [])
            row[name] = time.process_time() - start
        if i >= 0:  # the first warms up
            rows.append(row)
            print(
                f"round {i}: {row['cql.py']:.2f} s, old {row['old']:.2f} s", flush=True
            )
    report(f"{env}, {n_runs} runs", [row["cql.py"] / row["old"] for row in rows])
    return rows


def beside_environments(env: str, rounds: int) -> list:
    """Time evaluations and the stepping of their environments alone."""
    evaluator, agent = prepare(cql, env, 1)
    actions, rows = record(evaluator, agent), []
    envs = [player.env for player in evaluator.players]
    numbers = [cql.EVALUATE, agent.config.eval_seed, agent.config.seed[0], 0]
    seeds = [cql.environment_seed([*numbers, i]) for i in range(EPISODES)]
    for i in range(rounds):
        start = time.perf_counter()
        evaluator.episodes(agent, 0, [0], [])
        middle = time.perf_counter()
        alone(envs, seeds, actions)
        end = time.perf_counter()
        alone(envs, seeds, actions, agent.act)
        last = time.perf_counter()
        seconds = middle - start, end - middle, last - end
        rows.append({"round": i, **dict(zip(COLUMNS, seconds))})
        print(f"round {i}:", *(f"{each:.2f} s" for each in seconds), flush=True)
    for column in COLUMNS[::2]:
        ratios = [row[column] / row["environments"] for row in rows]
        report(f"{env}: {column}", ratios)
    return rows


def report(name: str, ratios: list) -> None:
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"{name}: median ratio {np.median(ratios):.3f} ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="HalfCheetah-v5", help="the environment")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--old", type=Path, help="an older cql.py to compare with")
    parser.add_argument("--runs", type=int, default=1, help="stacked runs, with --old")
    parser.add_argument("--out", default="evaluation.csv", help="the table to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.old:
        rows = compare(options.old, options.env, options.runs, options.rounds)
    else:
        rows = beside_environments(options.env, options.rounds)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
