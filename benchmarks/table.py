"""The table of scores on ten datasets, and its figure.

    python benchmarks/table.py --measure datasets/sets/* datasets/hopper-medium-small-v0
    python benchmarks/table.py benchmarks/results/table --figure table.png

The directory holds data.csv, the mean score of each dataset's episodes, which --measure
prints, and for each dataset a directory of methods. A method's directory holds the
tables of benchmarks/compare.py or, in a directory of each seed, those of cql.py. A cell
is the mean of the last three evaluations, averaged over the seeds; --best has the best
evaluation of each seed in its place, --seeds the numbers of the seeds. Evaluations after
--updates are left out, so that all methods made as many.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "bc": "cloning",
    "bc10": "cloning, best tenth",
    "d3rlpy": "d3rlpy CQL",
    "fast": "cql.py",
    "exact": "cql.py, exact gradient",
    "zero": "cql.py without the penalty",
}
COLORS = {"bc": "0.6", "bc10": "0.35", "d3rlpy": "C1", "fast": "C0"}


def measure(datasets: list) -> None:
    """Print the mean score of each dataset's episodes, as CSV."""
    sys.path.insert(0, str(ROOT))
    import cql

    print("set,score")
    for directory in datasets:
        config = cql.TrainConfig(env=directory)
        episodes, task = cql.read_data(config)
        data = cql.Dataset(config, episodes, task)
        score = cql.normalized_score(data.returns.mean(), task.reference)
        print(f"{Path(directory).name},{score:.2f}")


def scores_of(directory: Path, updates: int) -> np.ndarray:
    """Return the scores of a method's evaluations, [seeds, evaluations]."""
    table = pd.concat(map(pd.read_csv, sorted(directory.rglob("evaluations.csv"))))
    table = table[table["step"] <= updates]
    scores = table.pivot(index="seed", columns="step", values="d4rl_normalized_score")
    if updates not in scores or scores.isna().any(axis=None):
        raise SystemExit(f"{directory}: a seed has no evaluation at update {updates}")
    return scores.values


def read(root: Path, updates: int) -> dict:
    """Return the scores by dataset and method."""
    found = {}
    with open(root / "data.csv", newline="") as file:
        for row in csv.DictReader(file):
            methods = {"data": np.array([[float(row["score"])]])}
            for method in METHODS:
                if (root / row["set"] / method).is_dir():
                    methods[method] = scores_of(root / row["set"] / method, updates)
            found[row["set"]] = methods
    return found


def cells(found: dict, best: bool, seeds: bool) -> pd.DataFrame:
    """Return the table's numbers as text, and their mean over the datasets."""
    table = {}
    for name, methods in found.items():
        for method, scores in methods.items():
            of_seeds = scores.max(1) if best else scores[:, -3:].mean(1)
            table.setdefault(method, {})[name] = of_seeds
    text = pd.DataFrame(index=[*found, "mean"])
    for method, column in table.items():
        for name, of_seeds in column.items():
            cell = f"{of_seeds.mean():.1f}"
            if seeds and len(of_seeds) > 1:
                cell += f" ({', '.join(f'{x:.1f}' for x in of_seeds)})"
            text.loc[name, METHODS.get(method, method)] = cell
        if len(column) == len(found):
            mean = np.mean([of_seeds.mean() for of_seeds in column.values()])
            text.loc["mean", METHODS.get(method, method)] = f"{mean:.1f}"
    return text.fillna("")


def draw(found: dict, path: Path) -> None:
    """Draw each dataset's methods: seeds as points, their mean as a line."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    drawn = [name for name in COLORS if any(name in each for each in found.values())]
    fig, panel = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    shift = 0.8 / len(drawn)
    for y, methods in enumerate(found.values()):
        level = methods["data"][0, 0]
        panel.plot([level, level], [y - 0.45, y + 0.45], color="k", linewidth=1.5)
        for i, method in enumerate(drawn):
            if method not in methods:
                continue
            of_seeds = methods[method][:, -3:].mean(1)
            place = y - 0.4 + (i + 0.5) * shift
            panel.barh(place, of_seeds.mean(), 0.85 * shift, color=COLORS[method])
            points = [place] * len(of_seeds)
            panel.plot(of_seeds, points, "o", color="k", mfc="w", ms=3, mew=0.6)
    handles = [panel.plot([], [], color="k", linewidth=1.5, label="data")[0]]
    handles += [Patch(color=COLORS[name], label=METHODS[name]) for name in drawn]
    legend = {"loc": "outside upper right", "ncols": len(handles), "frameon": False}
    fig.legend(handles=handles, fontsize=8, **legend)
    panel.set_yticks(range(len(found)), found)
    panel.invert_yaxis()
    panel.set_xlabel("normalized score, mean of the last three evaluations")
    panel.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="?", help="the directory of the runs' tables")
    add("--measure", nargs="+", help="print the scores of these datasets")
    add("--updates", type=int, default=10000)
    add("--best", action="store_true", help="the best evaluations, not the last three")
    add("--seeds", action="store_true", help="the score of every seed")
    add("--figure", type=Path, help="the figure to draw")
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure)
    if not options.results:
        parser.error("name the directory of the runs' tables, or pass --measure")
    found = read(options.results, options.updates)
    text = cells(found, options.best, options.seeds)
    print("| | " + " | ".join(text) + " |\n" + "|---" * (len(text.columns) + 1) + "|")
    for name, row in text.iterrows():
        print(f"| {name} | {' | '.join(row)} |")
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
