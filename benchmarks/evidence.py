"""Compare learning curves of a fast way to update with those of the exact one.

    python benchmarks/evidence.py OUT.png EXACT_DIR OTHER_DIR [OTHER_DIR ...]

Each directory is a run of the same seeds. Prints, for each: mean Q of the data's actions
and mean gap over the last quarter of the updates (means over critics and seeds, with the
standard error over seeds), their ratios to the exact runs', and likewise the mean score
after the first half. Draws the three, a line a seed and the mean of the seeds.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
from plot import read

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def mean_over_critics(columns, name):
    return np.mean([v for k, v in columns.items() if k in names(name, columns)], 0)


def names(pattern, columns):
    return {pattern.format(j) for j in range(1, 1 + len(columns))}


def last(steps, values, share):
    """Mean of the values over the last share of the steps."""
    return values[steps > (1 - share) * steps[-1]].mean()


def main(out: str, *directories: str) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    patterns = {"Q of the data's actions": "average_qf{}", "gap": "cql_qf{}_diff"}
    base = None
    print("| run | Q | to exact | gap | to exact | score |\n|---|---|---|---|---|---|")
    for i, directory in enumerate(map(Path, directories)):
        metrics = read(directory, "metrics.csv")
        evaluations = read(directory, "evaluations.csv")
        ends = []
        for panel, (title, pattern) in zip(panels, patterns.items()):
            steps = metrics[0]["step"]
            curves = [mean_over_critics(run, pattern) for run in metrics.values()]
            ends.append(over_seeds(last(steps, curve, 0.25) for curve in curves))
            panel.set(title=title, xlabel="updates")
            draw(panel, steps, curves, f"C{i}", directory.name)
        steps = evaluations[0]["step"]
        curves = [run["d4rl_normalized_score"] for run in evaluations.values()]
        draw(panels[2], steps, curves, f"C{i}", directory.name)
        score, error = over_seeds(last(steps, curve, 0.5) for curve in curves)
        base, cells = base or ends, [directory.name]
        for (value, spread), (exact, _) in zip(ends, base):
            cells += [f"{value:.2f} +- {spread:.2f}", f"{value / exact:.4f}"]
        print(f"| {' | '.join(cells)} | {score:.1f} +- {error:.1f} |")
    panels[2].set(title="D4RL score, 10 episodes each", xlabel="updates")
    panels[2].legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def over_seeds(values):
    """Mean and its standard error."""
    values = list(values)
    return np.mean(values), np.std(values, ddof=1) / len(values) ** 0.5


def draw(panel, steps, curves, colour, label) -> None:
    for curve in curves:
        panel.plot(steps, curve, color=colour, alpha=0.2)
    panel.plot(steps, np.mean(curves, 0), color=colour, label=label)


if __name__ == "__main__":
    main(*sys.argv[1:])
