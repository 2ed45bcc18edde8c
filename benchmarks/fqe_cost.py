"""Time of an update of fitted Q evaluation beside that of an exact update of CQL.

    python benchmarks/fqe_cost.py --out cost.csv

On the embedded Hopper data, batches included, on one thread of a CPU: at the sizes of
configs/hopper.yaml, the same with four stacked runs, and at the quickstart's. Prints the
median of the ratios of eight alternating rounds, and the least and the largest.
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

QUICKSTART = {"hidden_dim": 128, "q_n_hidden_layers": 2, "cql_n_actions": 4}
CASES = {
    "hopper": {},
    "hopper, four runs": {"cql_alpha": [1.0, 5.0, 10.0, 20.0]},
    "quickstart, exact": QUICKSTART,
}


def seconds(agent: cql.Agent, data: cql.Dataset, updates: int) -> float:
    """Of one update, with its noise and batch."""
    size = agent.config.batch_size
    start = time.perf_counter()
    for _ in range(updates):
        noise = agent.draw(size)
        agent.update(data.sample(noise.fractions), noise)
    return (time.perf_counter() - start) / updates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="cost.csv", help="the table of all rounds")
    options = parser.parse_args()
    rows = [["case", "round", "ratio"]]
    torch.set_num_threads(1)
    cql.keep_freed_memory()  # as `train` does
    for name, flags in CASES.items():
        data_set = str(ROOT / "datasets/hopper-medium-small-v0")
        config = cql.TrainConfig(env=data_set, fqe_updates=1, **flags)
        data, task, _ = cql.load(config, None, torch.device("cpu"))
        agent = cql.make_agent(config, task, "cpu", data.statistics())
        fitted = cql.FittedQ(agent, data)
        ratios = []
        for _ in range(9):
            ratios.append(seconds(fitted, data, 20) / seconds(agent, data, 5))
        ratios = ratios[1:]  # the first round warms up
        rows += [[name, i, f"{ratio:.4f}"] for i, ratio in enumerate(ratios)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name}: {np.median(ratios):.3f} ({spread})", flush=True)
    with open(options.out, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
