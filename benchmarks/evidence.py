"""Compare learning curves of a fast way to update with those of the exact one.

    python benchmarks/evidence.py EXACT_DIR OTHER_DIR [OTHER_DIR ...] --out FILE.png

Each directory is a run of the same seeds. Prints, for each: mean Q of the data's
actions, mean gap and mean score over the last quarter of the updates (means over critics
and seeds, with the standard error over seeds), and ratios to the exact runs'. Draws the
three by scripts/plot.py: means over the seeds and their 95% intervals, against updates,
and with --rates, the updates a second of each run, against seconds too.
"""

import argparse
import sys
from pathlib import Path
from typing import Optional

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
    parser.add_argument("--rates", nargs="+", type=float, help="one for each directory")
    options = parser.parse_args()
    if options.rates and len(options.rates) != len(options.directories):
        parser.error("--rates: give one for each directory")
    try:
        compare(plot.find_runs(options.directories), options.out, options.rates)
    except plot.UserError as error:
        parser.error(str(error))


def compare(directories: list, out: Path, rates: Optional[list] = None) -> None:
    """The table and the figure of these runs. Raises plot.UserError."""
    plt.switch_backend("Agg")
    plt.rcParams.update(plot.STYLE)
    n_rows = 2 if rates else 1
    figure, panels = plt.subplots(
        n_rows, 3, figsize=(12, 3.8 * n_rows), sharey="col", squeeze=False
    )
    colours = plot.choose_colors(directories)
    lines = {}
    exact = None
    print("| run | Q | to exact | gap | to exact | score |\n|---|---|---|---|---|---|")
    for i, directory in enumerate(directories):
        curves = read(directory)
        name = directory.name
        q, q_error = end(curves[0], 0.25)
        gap, gap_error = end(curves[1], 0.25)
        score, score_error = end(curves[2], 0.25)
        exact = exact or (q, gap)
        cells = [name, f"{q:.2f} +- {q_error:.2f}", f"{q / exact[0]:.4f}"]
        cells += [f"{gap:.2f} +- {gap_error:.2f}", f"{gap / exact[1]:.4f}"]
        cells.append(f"{score:.1f} +- {score_error:.1f}")
        print(f"| {' | '.join(cells)} |")
        for j, values in enumerate(curves):
            lines[name] = plot.draw(panels[0, j], values, colours[directory])
            if rates:
                values.index = values.index / rates[i]
                plot.draw(panels[1, j], values, colours[directory])
    for row, unit in zip(panels, ["gradient updates", "seconds"]):
        for panel, title in zip(row, TITLES):
            panel.set(title=title, xlabel=unit)
    plot.add_legend(figure, lines)
    plot.save(figure, out)


if __name__ == "__main__":
    main()
