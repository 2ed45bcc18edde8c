"""Draw scores and Q of some runs, and print each run's last evaluations as a table.

    python benchmarks/curves.py OUT.png DATA_SCORE RUN_DIR [RUN_DIR ...]

The table's "last three" is the mean of a run's last three evaluations. DATA_SCORE is the
mean score of the data, drawn as a line; cql.py prints it when it starts."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(directory: Path, name: str):
    """A table's columns by run: {run: {column: array over steps}}."""
    runs = defaultdict(lambda: defaultdict(list))
    with open(directory / name, newline="") as file:
        for row in csv.DictReader(file):
            for column, value in row.items():
                runs[int(row["run"])][column].append(float(value or "nan"))
    return {
        r: {k: np.array(v) for k, v in columns.items()} for r, columns in runs.items()
    }


def main(out: str, data_score: str, *directories: str) -> None:
    figure, (scores, values) = plt.subplots(1, 2, figsize=(11, 4))
    colours = {}
    print("| cql_alpha | seed | last three | last | best |\n|---|---|---|---|---|")
    for directory in map(Path, directories):
        metrics = read(directory, "metrics.csv")
        for r, table in read(directory, "evaluations.csv").items():
            alpha, seed = table["cql_alpha"][0], int(table["seed"][0])
            label = f"cql_alpha {alpha:g}" if alpha not in colours else None
            style = {"color": colours.setdefault(alpha, f"C{len(colours)}")}
            score = table["d4rl_normalized_score"]
            ends = f"{score[-3:].mean():.1f} | {score[-1]:.1f} | {score.max():.1f}"
            print(f"| {alpha:g} | {seed} | {ends} |")
            scores.plot(table["step"], score, alpha=0.7, label=label, **style)
            columns = metrics[r]
            names = ("cql_q1_current_actions", "average_qf1")
            for name, dashes in zip(names, ("-", ":")):
                values.plot(columns["step"], columns[name], dashes, alpha=0.7, **style)
    scores.axhline(float(data_score), color="grey", dashes=(4, 2), label="data's mean")
    scores.set(xlabel="updates", ylabel="D4RL score", title="Return, 10 episodes each")
    scores.legend()
    values.set(
        xlabel="updates", title="Q of the policy's actions (line), of the data's (dots)"
    )
    values.set_yscale("symlog", linthresh=100)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
