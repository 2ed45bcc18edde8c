"""Compare learning curves of a fast way to update with those of the exact one.

    python benchmarks/evidence.py EXACT_DIR OTHER_DIR [OTHER_DIR ...] --out FILE.png

Each directory is a run of the same seeds. Prints, for each: mean Q of the data's actions
and mean gap over the last quarter of the updates (means over critics and seeds, with the
standard error over seeds), their ratios to the exact runs', and likewise the mean score
after the first half. Draws the three by scripts/plot.py: means over the seeds and their
95% intervals.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import plot  # which says what is missing
from plot import plt

TITLES = ["Q of the data's actions", "conservative gap", plot.LABELS[plot.SCORE]]


def read(directory: Path) -> list:
    """Q, gap and score of a run's directory, each by step and run."""
    metrics = plot.read_table(directory / "metrics.csv")
    for name in ("data", "gap"):
        critics = metrics.filter(regex=f"^{plot.Q_COLUMNS[name]}$")
        metrics[name] = critics.mean(axis=1)
    evaluations = plot.read_table(directory / "evaluations.csv")
    return [
        plot.over_runs(metrics, "data"),
        plot.over_runs(metrics, "gap"),
        plot.over_runs(evaluations, plot.SCORE),
    ]


def end(values: plot.pd.DataFrame, share: float) -> tuple:
    """Mean over the last share of the steps, and its standard error over the seeds."""
    last = values[values.index > (1 - share) * values.index[-1]]
    of_seeds = last.mean()
    return of_seeds.mean(), of_seeds.sem()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path, help="the exact run first")
    parser.add_argument("--out", required=True, type=Path, help="the figure to write")
    options = parser.parse_args()
    try:
        compare(plot.find_runs(options.directories), options.out)
    except plot.UserError as error:
        parser.error(str(error))


def compare(directories: list, out: Path) -> None:
    """The table and the figure of these runs. Raises plot.UserError."""
    plt.switch_backend("Agg")
    plt.rcParams.update(plot.STYLE)
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8))
    colours = plot.choose_colours(directories)
    lines = {}
    exact = None
    print("| run | Q | to exact | gap | to exact | score |\n|---|---|---|---|---|---|")
    for directory in directories:
        curves = read(directory)
        name = directory.name
        for panel, values in zip(panels, curves):
            lines[name] = plot.draw(panel, values, colours[directory])
        q, q_error = end(curves[0], 0.25)
        gap, gap_error = end(curves[1], 0.25)
        score, score_error = end(curves[2], 0.5)
        exact = exact or (q, gap)
        cells = [name, f"{q:.2f} +- {q_error:.2f}", f"{q / exact[0]:.4f}"]
        cells += [f"{gap:.2f} +- {gap_error:.2f}", f"{gap / exact[1]:.4f}"]
        cells.append(f"{score:.1f} +- {score_error:.1f}")
        print(f"| {' | '.join(cells)} |")
    for panel, title in zip(panels, TITLES):
        panel.set(title=title, xlabel="gradient updates")
    plot.add_legend(figure, lines)
    plot.save(figure, out)


if __name__ == "__main__":
    main()
