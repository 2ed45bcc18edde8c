"""Evaluate a policy of cql.py by d3rlpy's fitted Q evaluation, for comparison.

    python cql.py --env datasets/hopper-medium-small-v0 --n_critics 1 --hidden_dim 64 \\
        --q_n_hidden_layers 2 --cql_n_actions 4 --cql_backward_actions 1 \\
        --cql_alpha 20 --policy_lr 1e-4 --qf_lr 1e-3 --max_timesteps 3000 \\
        --resume runs/judged
    for seed in 0 1 2; do python scripts/judge.py runs/judged --seed $seed \\
        --n_critics 1 --hidden_dim 64 --lr 3e-4 --soft_target_update_rate 0.01 \\
        --out runs/judged/judge-$seed.csv; done
    OTHER_ENV/bin/python benchmarks/fqe.py runs/judged --updates 10000 --seeds 0 1 2

OTHER_ENV holds d3rlpy 2.8.1. scripts/judge.py is that of commit e0451ee, whose method
was plain fitted Q evaluation. The policy, the data, standardized observations, network
sizes, batch size, Adam and its learning rate, the discount and one critic are the same
for both. Different are the targets: d3rlpy copies them every 100 updates and does not
clip them, and it leaves out the last step before a time limit. The value is the mean
of Q(s0, pi(s0)) over the episodes of the data.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare
from compare import d3rlpy  # None where it is missing

DATA = Path(__file__).resolve().parents[1] / "datasets/hopper-medium-small-v0"


class Policy:
    """The first run's policy of a checkpoint, on standardized observations [n, O]."""

    impl = True  # d3rlpy asks whether there is one

    def __init__(self, directory: str):
        path = Path(directory) / "checkpoint.pt"
        self.state = torch.load(path, weights_only=True)["agent"]

    @torch.no_grad()
    def predict_best_action(self, x: torch.Tensor) -> torch.Tensor:
        names = [name for name in self.state if name.startswith("policy.net")]
        weights = [name for name in names if name.endswith("weight")]
        for name in weights:  # in the order of the layers
            weight = self.state[name][0]
            bias = self.state[name.replace("weight", "bias")][0]
            x = x @ weight.T + bias
            if name != weights[-1]:
                x = x.relu()
        return x.chunk(2, dim=-1)[0].tanh()

    def standardize(self, observations: np.ndarray) -> np.ndarray:
        mean = self.state["units.observation_mean"].numpy()
        std = self.state["units.observation_std"].numpy()
        return ((observations - mean) / std).astype("f4")


def evaluate(policy: Policy, updates: int, seed: int, hidden: int) -> float:
    """Return the value at the first observations after so many updates."""
    d3rlpy.seed(seed)
    arrays, ends, *_ = compare.read_data([DATA])
    arrays["observations"] = policy.standardize(arrays["observations"])
    dataset = d3rlpy.dataset.MDPDataset(**arrays, **ends)
    encoder = d3rlpy.models.VectorEncoderFactory([hidden, hidden])
    config = d3rlpy.ope.FQEConfig(
        learning_rate=3e-4,
        encoder_factory=encoder,
        batch_size=256,
        gamma=0.99,
        target_update_interval=100,
    )
    judge = d3rlpy.ope.FQE(algo=policy, config=config)
    policy.impl = policy  # what it asks for actions
    judge.fit(
        dataset,
        n_steps=updates,
        n_steps_per_epoch=updates,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
        show_progress=False,
    )
    first = np.stack([episode.observations[0] for episode in dataset.episodes])
    actions = policy.predict_best_action(torch.as_tensor(first)).numpy()
    return float(judge.predict_value(first, actions).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--updates", type=int, default=10000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("fqe-d3rlpy.csv"))
    options = parser.parse_args()
    if d3rlpy is None:
        parser.error("needs d3rlpy 2.8.1")
    policy = Policy(options.directory)
    with open(options.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["seed", "updates", "value"])
        for seed in options.seeds:
            value = evaluate(policy, options.updates, seed, options.hidden)
            writer.writerow([seed, options.updates, f"{value:.6g}"])
            print(f"seed {seed}: {value:.4f}", flush=True)


if __name__ == "__main__":
    main()
