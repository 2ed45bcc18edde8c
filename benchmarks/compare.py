"""d3rlpy's CQL and behaviour cloning beside cql.py: scores, Q, seconds.

    OTHER_ENV/bin/python benchmarks/compare.py --train ours --data DATASET --out DIR
    python benchmarks/compare.py --probe RUN_DIR  # Q of a run of cql.py
    python benchmarks/compare.py --figure compare.png DIR/hopper DIR/pendulum

OTHER_ENV holds d3rlpy 2.8.1, mujoco 3.11.0 and imageio; DATASET is a Minari dataset's
directory, or several. --train writes the columns of cql.py's tables that both have, by
the same protocol: ten deterministic episodes every 2,000 updates, from cql.py's own
evaluation seeds. Q of the data is the critics' mean over 10,000 transitions, the same
each time and those of --probe. Networks are of 2 x 128 (policy 3 x 128) unless flags say
otherwise; actions are scaled from the environment's bounds.

    ours      CQL at the settings of benchmarks/small.yaml, unless flags say otherwise,
              as far as d3rlpy has them: batch size, Adam and its rates, discount, target
              rate, K, penalty weight, importance sampling, entropy temperature, fixed
              Lagrange multiplier 1, no entropy in the target, standardized observations,
              the exact gradient
    alike     likewise, and what Q depends on besides: d3rlpy's TD target takes the
              policy's mode, where cql.py samples an action as the paper does; and its
              policy's last layer begins larger, with log_std at 0 and not at -1
    defaults  CQL as d3rlpy has it
    bc        behaviour cloning as d3rlpy has it; with --best 0.1, of the best episodes
              alone, as many as hold a tenth of the steps

What still differs with `alike`: its actor steps after its critics; its critics start as
torch's default; its policy lacks the two scalars on log_std; an episode's last step
before a time limit is left out.

--figure takes directories of datasets, in which the runs are called as above, and those
of cql.py `exact` and `fast`. It prints a table and draws scores, a panel each. The
table's seconds are those of 12,000 updates, evaluations left out: the median over other
runs, on an idle machine, which lie in DIR/seconds/ROUND/DATASET under the same names.
"""

import argparse
import csv
import dataclasses
import json
import math
import sys
import time
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
DATA = ROOT / "datasets/hopper-medium-small-v0"
EPISODES, EVERY = 10, 2000
NAMES = {
    "exact": "cql.py, exact",
    "fast": "cql.py, fast",
    "ours": "d3rlpy CQL, our settings",
    "alike": "d3rlpy CQL, made alike",
    "defaults": "d3rlpy CQL, its defaults",
    "bc": "d3rlpy behaviour cloning",
}


def read_data(directories: list):
    """The arrays, the ends, the environment's id, and the returns scored 0 and 100, of
    the first dataset."""
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    columns = {name: [] for name in names}
    about = []
    for directory in directories:
        about.append(json.loads((directory / "data/metadata.json").read_text()))
        with h5py.File(directory / "data/main_data.hdf5") as file:
            for i in range(about[-1]["total_episodes"]):
                for name in names:
                    rows = file[f"episode_{i}"][name][()].astype(np.float32)
                    columns[name].append(rows[:-1] if name == "observations" else rows)
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    ends = {"terminals": arrays.pop("terminations")}
    ends |= {"timeouts": arrays.pop("truncations")}
    task = json.loads(about[0]["env_spec"])["id"]
    return arrays, ends, task, [about[0][f"ref_{end}_score"] for end in ("min", "max")]


def best_episodes(arrays: dict, ends: dict, share: float):
    """The episodes of highest return that hold this share of all steps."""
    episode = np.cumsum(np.maximum(*ends.values())) - np.maximum(*ends.values())
    episode = episode.astype(int)  # of each step
    returns = np.bincount(episode, arrays["rewards"])
    lengths = np.bincount(episode)
    order = np.argsort(-returns)
    n_kept = np.searchsorted(np.cumsum(lengths[order]), share * len(episode)) + 1
    kept = np.isin(episode, order[:n_kept])
    steps = int(kept.sum())
    print(
        f"{n_kept} episodes of {len(returns)}, {steps} steps, return at least "
        f"{returns[order[n_kept - 1]]:.1f}, mean {returns[order[:n_kept]].mean():.1f}"
    )
    return tuple({k: v[kept] for k, v in each.items()} for each in (arrays, ends))


def probe_run(directory: str, observations, actions) -> None:
    """Print the mean Q of the data for each run in a directory of cql.py."""
    sys.path.insert(0, str(ROOT))
    import cql

    agent = cql.load_policy(directory).agent
    n_runs = len(agent.runs)
    q = agent.q(np.stack([observations] * n_runs), np.stack([actions] * n_runs))
    q = q.mean((1, 2)).tolist()  # [R, N, n] -> [R]
    print(f"Q {' '.join(f'{x:.1f}' for x in q)}, mean {np.mean(q):.1f}")


def make_agent(options, observations, space):
    """d3rlpy's agent. The entropy temperature is fixed, or learned from its start."""
    kind = options.train
    encoder = d3rlpy.models.VectorEncoderFactory
    width = options.hidden_dim
    scale = d3rlpy.preprocessing.MinMaxActionScaler(space.low, space.high)
    if kind == "bc":
        config = d3rlpy.algos.BCConfig(
            encoder_factory=encoder([width] * 3), action_scaler=scale
        )
        return config.create(device="cpu")
    config = d3rlpy.algos.CQLConfig(
        actor_encoder_factory=encoder([width] * 3),
        critic_encoder_factory=encoder([width] * options.q_n_hidden_layers),
        action_scaler=scale,
    )
    if kind != "defaults":
        config.observation_scaler = d3rlpy.preprocessing.StandardObservationScaler(
            mean=observations.mean(0), std=observations.std(0)
        )
        settings = dict(
            batch_size=256, gamma=0.99, tau=0.01, n_critics=2,
            n_action_samples=options.cql_n_actions,
            conservative_weight=options.cql_alpha, alpha_threshold=0.0,
            initial_alpha=1.0, alpha_learning_rate=0.0,
            initial_temperature=options.temperature,
            temp_learning_rate=options.policy_lr if options.learn_temperature else 0.0,
            actor_learning_rate=options.policy_lr, critic_learning_rate=1e-3,
            soft_q_backup=False,
        )  # fmt: skip
        config = dataclasses.replace(config, **settings)
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
        number = int(sequence.generate_state(1, np.uint64)[0] >> 1) % 2**31
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


def train(options) -> None:
    """Train and evaluate a peer; the tables are written after each seed."""
    arrays, ends, task, (low, high) = read_data(options.data)
    probe = probe_rows(arrays)
    if options.best < 1:
        arrays, ends = best_episodes(arrays, ends, options.best)
    picker = d3rlpy.dataset.MultiStepTransitionPicker(options.n_steps, 0.99)
    picker = {} if options.n_steps == 1 else {"transition_picker": picker}
    dataset = d3rlpy.dataset.MDPDataset(**arrays, **ends, **picker)
    if options.train == "alike":
        CQLImpl._compute_deterministic_target = sampled_target
    torch.set_num_threads(options.threads)
    envs = [gym.make(task) for _ in range(EPISODES)]
    options.out.mkdir(parents=True, exist_ok=True)
    tables = {"evaluations": [], "metrics": [], "timing": []}
    for run, seed in enumerate(options.seeds):
        d3rlpy.seed(seed)
        space = envs[0].action_space
        observations = arrays["observations"]
        agent = make_agent(options, observations, space)
        agent.build_with_dataset(dataset)
        if options.train == "alike":
            start_alike(agent.impl.policy)
        start, evaluating = time.monotonic(), 0.0
        for step in range(1, options.max_timesteps + 1):
            agent.update(dataset.sample_transition_batch(agent.config.batch_size))
            if step % EVERY:
                continue
            before = time.monotonic()
            returns, lengths = evaluate(agent, envs, seed, step)
            evaluating += time.monotonic() - before
            score = 100 * (returns.mean() - low) / (high - low)
            keys = {"step": step, "run": run}
            row = {**keys, "seed": seed, "cql_alpha": options.cql_alpha}
            row |= {"episodes": EPISODES, "return_mean": returns.mean()}
            row |= {"return_std": returns.std(), "length_mean": lengths.mean()}
            tables["evaluations"].append(row | {"d4rl_normalized_score": score})
            q = math.nan
            if options.train != "bc":
                q = float(agent.predict_value(*probe).mean())
            tables["metrics"].append(keys | {"average_qf1": q})
            seconds = {"seconds": time.monotonic() - start}
            tables["timing"].append(keys | seconds | {"evaluation_seconds": evaluating})
            print(
                f"seed {seed}, update {step}: score {score:.1f}, Q {q:.1f}", flush=True
            )
        write(tables, options.out)


def probe_rows(arrays: dict):
    """Observations and actions of which Q is told."""
    n = min(10_000, len(arrays["rewards"]))
    rows = np.random.default_rng(0).choice(len(arrays["rewards"]), n, replace=False)
    return arrays["observations"][rows], arrays["actions"][rows]


def last_three(directory: Path) -> list:
    """Mean scores of the last three evaluations by seed, of runs of cql.py or a peer."""
    scores = {}
    with open(directory / "evaluations.csv") as file:
        for row in csv.DictReader(file):
            score = float(row["d4rl_normalized_score"])
            scores.setdefault(row["run"], []).append(score)
    return [np.mean(values[-3:]) for values in scores.values()]


def seconds_of(directory: Path) -> float:
    """Of 12,000 updates at a run's rate, evaluations left out."""
    with open(directory / "timing.csv") as file:
        last = [*csv.DictReader(file)][-1]
    training = float(last["seconds"]) - float(last["evaluation_seconds"])
    return 12_000 / int(last["step"]) * training


def show(options) -> None:
    """The table, and the figure: a panel for each dataset, seeds as points."""
    import matplotlib.pyplot as plt

    fig, panels = plt.subplots(
        1, len(options.show), figsize=(3.6 * len(options.show), 3), squeeze=False
    )
    print("| data | | mean of last three | by seed | seconds |\n" + "|---" * 5 + "|")
    names = []
    for name in NAMES:
        if any((directory / name).is_dir() for directory in options.show):
            names.append(name)
    for panel, directory in zip(panels[0], options.show):
        for y, name in enumerate(names):
            if not (directory / name).is_dir():
                continue
            means = last_three(directory / name)
            panel.plot(means, [-y] * len(means), "o", color="C0", alpha=0.5)
            panel.plot(np.mean(means), -y, "k|", markersize=14)
            cells = [directory.name, NAMES[name], f"{np.mean(means):.1f}"]
            cells.append(", ".join(f"{x:.1f}" for x in means))
            rounds = directory.parent.glob(f"seconds/*/{directory.name}/{name}")
            seconds = [seconds_of(each) for each in rounds]
            cells.append(f"{np.median(seconds):.0f}" if seconds else "")
            print(f"| {' | '.join(cells)} |")
        labels = [NAMES[name] for name in names]
        panel.set(title=directory.name, xlabel="normalized score")
        panel.set_yticks(range(0, -len(names), -1), labels)
        panel.tick_params(labelleft=panel is panels[0, 0])
        panel.margins(y=0.15)
    fig.tight_layout()
    fig.savefig(options.figure, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    kinds = ["ours", "alike", "defaults", "bc"]
    add("--train", choices=kinds, help="d3rlpy's, as above")
    add("--data", type=Path, nargs="+", default=[DATA], help="Minari datasets")
    add("--out", type=Path, default=Path("compare"), help="of --train")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--cql_alpha", type=float, default=20.0)
    add("--max_timesteps", type=int, default=12_000)
    add("--hidden_dim", type=int, default=128, help="width, of both networks")
    add("--q_n_hidden_layers", type=int, default=2)
    add("--cql_n_actions", type=int, default=4)
    add("--n_steps", type=int, default=1, help="of the TD target")
    add("--policy_lr", type=float, default=1e-4, help="of ours and alike")
    add("--best", type=float, default=1.0, help="share of the data, by return")
    add("--temperature", type=float, default=1.0, help="of the entropy, at first")
    add("--learn_temperature", action="store_true")
    add("--threads", type=int, default=1, help="torch's, of --train; 1 if left out")
    add("--probe", help="a run of cql.py, whose Q to tell")
    add("--figure", type=Path, help="the figure to draw")
    add("show", type=Path, nargs="*", help="of --figure: directories of runs")
    options = parser.parse_args()
    if options.figure:
        return show(options)
    if options.probe:
        return probe_run(options.probe, *probe_rows(read_data(options.data)[0]))
    if d3rlpy is None or not options.train:
        parser.error("give --probe, --figure, or --train, which needs d3rlpy 2.8.1")
    train(options)


if __name__ == "__main__":
    main()
