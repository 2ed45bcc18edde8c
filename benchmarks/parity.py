"""Scores of d3rlpy's CQL on the quickstart's data, at the quickstart's settings.

    OTHER_ENV/bin/python benchmarks/parity.py --out DIR --seeds 0 1 2 3 4
    python benchmarks/parity.py --probe RUN_DIR  # Q of a run of cql.py, on the same rows

OTHER_ENV holds d3rlpy 2.8.1, mujoco 3.11.0 and imageio. Written are the columns of
cql.py's tables that both have, by the same protocol: ten deterministic episodes in
Hopper-v5 every 2,000 updates, from cql.py's own evaluation seeds. Q of the data is the
critics' mean over 10,000 transitions, the same each time.

Set alike: data, sizes, batch size, Adam and its rates, discount, target rate, K, penalty
weight, importance sampling, fixed entropy temperature 1, fixed Lagrange multiplier 1, no
entropy in the target, standardized observations, the exact gradient of the penalty. Two
things that Q depends on are made alike too, unless `--as_it_stands`: d3rlpy's TD target
takes the policy's mode, where cql.py samples an action as the paper does; and its
policy's last layer begins larger, with log_std at 0 and not at -1. What still differs:
its actor steps after its critics; its critics start as torch's default; its policy lacks
the two scalars on log_std; an episode's last step before a time limit is left out.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import torch

try:
    import d3rlpy
    from d3rlpy.algos.qlearning.torch.cql_impl import CQLImpl
except ImportError:  # --probe does without
    d3rlpy = None

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "datasets/hopper-medium-small-v0/data"
EPISODES, EVERY = 10, 2000


def read_data():
    """The embedded data's arrays, the ends, and the returns scored 0 and 100."""
    metadata = json.loads((DATA / "metadata.json").read_text())
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    columns = {name: [] for name in names}
    with h5py.File(DATA / "main_data.hdf5") as file:
        for i in range(metadata["total_episodes"]):
            for name in names:
                rows = file[f"episode_{i}"][name][()]
                columns[name].append(rows[:-1] if name == "observations" else rows)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    ends = {"terminals": arrays.pop("terminations").astype("f4")}
    ends |= {"timeouts": arrays.pop("truncations").astype("f4")}
    return arrays, ends, [metadata[f"ref_{end}_score"] for end in ("min", "max")]


@torch.no_grad()
def probe_run(directory: str, observations, actions) -> None:
    """Print Q of the data for each run of cql.py in a directory."""
    sys.path.insert(0, str(ROOT))
    import cql

    agent = cql.load_policy(directory).agent
    states = (
        torch.tensor(observations) - agent.observation_mean
    ) / agent.observation_std
    states = states.expand(len(agent.runs), -1, -1)
    actions = agent.unit_actions(torch.tensor(actions)).unsqueeze(1)
    q = agent.critic(states, actions.expand(len(agent.runs), -1, -1, -1))
    q = q.mean((1, 2, 3)).tolist()
    print(f"Q {' '.join(f'{x:.1f}' for x in q)}, mean {np.mean(q):.1f}")


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


def sampled_target(impl, batch):
    """CQLImpl's target with an action of the policy in its mode's place."""
    actions = impl.inner_sample_action(batch.next_observations)
    forward = impl._targ_q_func_forwarder.compute_target
    return forward(batch.next_observations, actions, reduction="min")


@torch.no_grad()
def start_alike(policy):
    """The policy's last layer as cql.py's."""
    for head, value in ((policy._mu, 0.0), (policy._logstd, -1.0)):
        torch.nn.init.xavier_uniform_(head.weight, 1e-2)
        head.bias.fill_(value)


def evaluate(agent, envs, seed: int, step: int):
    """Returns of an episode in each environment, stepped together; seeds are those of
    cql.py: of the stream EVALUATE (4), eval_seed 0, the run's seed, step and episode."""
    observations = []
    for i, env in enumerate(envs):
        sequence = np.random.SeedSequence([4, 0, seed, step, i])
        number = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        observations.append(env.reset(seed=number)[0])
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


def write(tables: dict, directory: Path) -> None:
    for name, table in tables.items():
        table.sort(key=lambda row: (row["step"], row["run"]))
        with open(directory / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("parity"))
    parser.add_argument("--probe", help="a run of cql.py, instead of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cql_alpha", type=float, default=20.0)
    parser.add_argument("--max_timesteps", type=int, default=12_000)
    parser.add_argument(
        "--as_it_stands", action="store_true", help="no change to d3rlpy"
    )
    options = parser.parse_args()
    arrays, ends, (low, high) = read_data()
    rows = np.random.default_rng(0).choice(len(arrays["rewards"]), 10_000, replace=False)
    probe = arrays["observations"][rows], arrays["actions"][rows]
    if options.probe:
        return probe_run(options.probe, *probe)
    if d3rlpy is None:
        parser.error("needs d3rlpy 2.8.1")
    dataset = d3rlpy.dataset.MDPDataset(**arrays, **ends)
    if not options.as_it_stands:
        CQLImpl._compute_deterministic_target = sampled_target
    torch.set_num_threads(1)
    envs = [gym.make("Hopper-v5") for _ in range(EPISODES)]
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for run, seed in enumerate(options.seeds):
        d3rlpy.seed(seed)
        agent = make_agent(options.cql_alpha, arrays["observations"])
        agent.build_with_dataset(dataset)
        if not options.as_it_stands:
            start_alike(agent.impl.policy)
        for step in range(1, options.max_timesteps + 1):
            agent.update(dataset.sample_transition_batch(256))
            if step % EVERY:
                continue
            returns, lengths = evaluate(agent, envs, seed, step)
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
        write(tables, options.out)


if __name__ == "__main__":
    main()
