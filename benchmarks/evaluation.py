"""Time of an evaluation beside that of stepping its environments alone.

    python benchmarks/evaluation.py
    python benchmarks/evaluation.py --env Hopper-v5 --rounds 20 --out hopper.csv

Ten episodes, in HalfCheetah-v5, which never ends early, of 1,000 steps each: once as
cql.py evaluates (networks of the default size, untrained), once with the same actions
ready-made, and once with them ready-made and the policy called beside them for nothing:
the least that an evaluation of these networks can take, since a forward pass also cools
the caches that the environments live in. In alternating rounds on one thread. Prints
each round, then the medians of the ratios.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="HalfCheetah-v5", help="the environment")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", default="evaluation.csv", help="the table to write")
    options = parser.parse_args()
    name = options.env
    torch.set_num_threads(1)
    cql.keep_freed_memory()  # as `train` does
    flags = {"env": None, "max_timesteps": 0, "normalize": False}
    config = cql.TrainConfig(eval_env=name, n_episodes=EPISODES, **flags)
    _, task, evaluator = cql.load(config, None, torch.device("cpu"))
    agent = cql.make_agent(config, task)
    actions, rows = record(evaluator, agent), []
    envs = [player.env for player in evaluator.players]
    numbers = [cql.EVALUATE, config.eval_seed, config.seed, 0]
    seeds = [cql.environment_seed([*numbers, i]) for i in range(EPISODES)]
    for i in range(options.rounds):
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
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name}: {column}: median ratio {np.median(ratios):.3f} ({spread})")
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
