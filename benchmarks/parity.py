"""Scores of d3rlpy's CQL on the quickstart's data, at the quickstart's settings.

    OTHER_ENV/bin/python benchmarks/parity.py --out DIR --seeds 0 1 2 3 4

OTHER_ENV holds d3rlpy 2.8.1, mujoco 3.11.0 and imageio; cql.py is not imported. Written
are the columns of cql.py's tables that both have, by the same protocol: ten
deterministic episodes in Hopper-v5 every 2,000 updates, from cql.py's own evaluation
seeds. Q of the data is the critics' mean over 10,000 transitions, the same each time.

Set alike: data, sizes, batch size, Adam and its rates, discount, target rate, K, penalty
weight, importance sampling, fixed entropy temperature 1, fixed Lagrange multiplier 1, no
entropy in the target, standardized observations. What d3rlpy has no switch for: its TD
target takes the policy's mode, where cql.py samples; its actor steps after its critics;
its weights start as torch's default and its policy lacks the two scalars on log_std; an
episode's last step before a time limit is left out. The penalty's gradient is exact.
"""

import argparse
import csv
import json
from pathlib import Path

import d3rlpy
import gymnasium as gym
import h5py
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "datasets/hopper-medium-small-v0/data"
EPISODES, EVERY = 10, 2000


def read_data():
    """The embedded data as d3rlpy's, its arrays, and the returns scored 0 and 100."""
    metadata = json.loads((DATA / "metadata.json").read_text())
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    columns = {name: [] for name in names}
    with h5py.File(DATA / "main_data.hdf5") as file:
        for i in range(metadata["total_episodes"]):
            for name in names:
                rows = file[f"episode_{i}"][name][()]
                columns[name].append(rows[:-1] if name == "observations" else rows)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    ends = arrays.pop("terminations"), arrays.pop("truncations")
    dataset = d3rlpy.dataset.MDPDataset(
        **arrays, terminals=ends[0].astype("f4"), timeouts=ends[1].astype("f4")
    )
    return dataset, arrays, [metadata[f"ref_{end}_score"] for end in ("min", "max")]


def make_agent(weight: float, observations):
    scaler = d3rlpy.preprocessing.StandardObservationScaler(
        mean=observations.mean(0), std=observations.std(0)
    )
    encoder = d3rlpy.models.VectorEncoderFactory
    config = d3rlpy.algos.CQLConfig(
        batch_size=256, gamma=0.99, tau=0.01, n_critics=2, n_action_samples=4,
        conservative_weight=weight, alpha_threshold=0.0, initial_alpha=1.0,
        alpha_learning_rate=0.0, initial_temperature=1.0, temp_learning_rate=0.0,
        actor_learning_rate=1e-4, critic_learning_rate=1e-3, soft_q_backup=False,
        actor_encoder_factory=encoder([128] * 3),
        critic_encoder_factory=encoder([128] * 2),
        observation_scaler=scaler,
    )  # fmt: skip
    return config.create(device="cpu")


def evaluate(agent, envs, step: int):
    """Returns of an episode in each environment, stepped together."""
    observations = []
    for i, env in enumerate(envs):
        state = np.random.SeedSequence([0, step, i]).generate_state(1)
        observations.append(env.reset(seed=int(state[0]))[0])
    returns, lengths, running = (
        np.zeros(EPISODES),
        np.zeros(EPISODES),
        [*range(EPISODES)],
    )
    while running:
        actions = agent.predict(np.array(observations, np.float32))
        for i in running.copy():
            observations[i], reward, ended, cut, _ = envs[i].step(actions[i])
            returns[i] += reward
            lengths[i] += 1
            if ended or cut:
                running.remove(i)
    return returns, lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cql_alpha", type=float, default=20.0)
    parser.add_argument("--max_timesteps", type=int, default=12_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, arrays, (low, high) = read_data()
    rows = np.random.default_rng(0).choice(len(arrays["rewards"]), 10_000, replace=False)
    probe = arrays["observations"][rows], arrays["actions"][rows]
    envs = [gym.make("Hopper-v5") for _ in range(EPISODES)]
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for run, seed in enumerate(options.seeds):
        d3rlpy.seed(seed)
        agent = make_agent(options.cql_alpha, arrays["observations"])
        agent.build_with_dataset(dataset)
        for step in range(1, options.max_timesteps + 1):
            agent.update(dataset.sample_transition_batch(256))
            if step % EVERY:
                continue
            returns, lengths = evaluate(agent, envs, step)
            score = 100 * (returns.mean() - low) / (high - low)
            keys = {"step": step, "run": run}
            row = {**keys, "seed": seed, "cql_alpha": options.cql_alpha}
            row |= {"episodes": EPISODES, "return_mean": returns.mean()}
            row |= {"return_std": returns.std(), "length_mean": lengths.mean()}
            tables.setdefault("evaluations", []).append(
                row | {"d4rl_normalized_score": score}
            )
            q = float(agent.predict_value(*probe).mean())
            tables.setdefault("metrics", []).append(keys | {"average_qf1": q})
            print(
                f"seed {seed}, update {step}: score {score:.1f}, Q {q:.1f}", flush=True
            )
    for name, table in tables.items():
        table.sort(key=lambda row: (row["step"], row["run"]))
        with open(options.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
