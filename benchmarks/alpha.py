"""Draw return and Q against cql_alpha, of one run over a list of weights.

    python cql.py --config_path configs/discrete/cartpole.yaml \\
        --env datasets/cartpole-narrow-v0 --seed '[0,1,2]' \\
        --cql_alpha '[0,0.05,0.5,1.0,1.5]' --resume runs/alpha
    python benchmarks/alpha.py OUT.png runs/alpha

Prints, for each weight, means and standard deviations over the seeds: the return (last
three evaluations), and at the end Q of the policy's and of the data's actions.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from curves import read

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(out: str, directory: str) -> None:
    metrics, groups = read(Path(directory), "metrics.csv"), defaultdict(list)
    for r, table in read(Path(directory), "evaluations.csv").items():
        last = {name: column[-1] for name, column in metrics[r].items()}
        row = [table["return_mean"][-3:].mean()]
        row += [last["cql_q1_current_actions"], last["average_qf1"]]
        groups[table["cql_alpha"][0]].append(row)
    alphas = sorted(groups)
    values = np.array([[np.mean(groups[a], 0), np.std(groups[a], 0)] for a in alphas])
    print("| cql_alpha | return | Q, policy | Q, data |\n|---|---|---|---|")
    for alpha, (means, deviations) in zip(alphas, values):
        cells = (f"{m:.1f} +- {d:.1f}" for m, d in zip(means, deviations))
        print(f"| {alpha:g} | {' | '.join(cells)} |")
    figure, (returns, qs) = plt.subplots(1, 2, figsize=(9, 3.5))
    ticks, places = [f"{alpha:g}" for alpha in alphas], range(len(alphas))
    returns.errorbar(places, *values[:, :, 0].T, fmt="o-", capsize=3)
    for i, label in ((1, "policy's actions"), (2, "data's actions")):
        qs.errorbar(places, *values[:, :, i].T, fmt="o-", capsize=3, label=label)
    for panel, title in ((returns, "return, last three evaluations"), (qs, "Q")):
        panel.set(xlabel="cql_alpha", xticks=places, xticklabels=ticks, title=title)
    qs.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
