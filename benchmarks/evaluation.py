"""Time of an evaluation beside that of stepping its environments alone.

    python benchmarks/evaluation.py [ENVIRONMENT] [ROUNDS]

Ten episodes of HalfCheetah-v5, which never ends early, so 1,000 steps each: once as
cql.py evaluates (networks of the default size, untrained), once with the same actions
ready-made, and once with them ready-made and the policy called beside them for nothing:
the least that an evaluation of these networks can take, since a forward pass also cools
the caches that the environments live in. In alternating rounds on one thread. Prints
each round, then the medians of the ratios."""

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


def main(name: str = "HalfCheetah-v5", rounds: str = "10") -> None:
    torch.set_num_threads(1)
    task = cql.task_of(name)
    config = cql.TrainConfig(n_episodes=10)
    config.eval_env = name
    agent, simulator = cql.make_agent(config, task), cql.Simulator(task, config)
    act, rows = agent.on_host(), []
    states = (np.random.SeedSequence([0, 0, i]).generate_state(1) for i in range(10))
    seeds, actions = [int(state[0]) for state in states], []

    def recording(observations):
        actions.append(act(observations)[0])
        return actions[-1]

    simulator.episodes(recording, [True], seeds)  # makes the environments
    for i in range(int(rounds)):
        start = time.perf_counter()
        simulator.episodes(agent.on_host(), [True], seeds)
        middle = time.perf_counter()
        alone(simulator.envs.values(), seeds, actions)
        end = time.perf_counter()
        alone(simulator.envs.values(), seeds, actions, act)
        last = time.perf_counter()
        seconds = middle - start, end - middle, last - end
        rows.append({"round": i, **dict(zip(COLUMNS, seconds))})
        print(f"round {i}:", *(f"{each:.2f} s" for each in seconds), flush=True)
    for column in COLUMNS[::2]:
        ratios = [row[column] / row["environments"] for row in rows]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name}: {column}: median ratio {np.median(ratios):.3f} ({spread})")
    with open(ROOT / "benchmarks/results/evaluation.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
