"""Draw and tabulate any number of runs.

    python benchmarks/plot.py RUN_DIR [RUN_DIR ...] --out figures

Runs that differ only in their seed are one group. Written to --out, where there is
something to show:

    curves.png   score (or return) against updates
    drift.png    Q of the policy's, the data's and uniform actions; how far the first is
                 above the second; the gap: each against updates
    weights.png  score, and Q of the policy's and the data's actions, against cql_alpha
    table.md     interquartile mean over seeds and its 95% interval, a row per group, of
    table.csv    the last evaluation, of the mean of the last three, and of the best

Lines are means over seeds, bands their 95% percentile bootstrap intervals (a group of
one seed has none). The interquartile mean leaves out a quarter of the seeds, rounded
down, at either end, as in Agarwal et al., arXiv 2108.13264. "Best" is chosen on the
episodes that it is measured with, so it flatters. --data-score draws a line at the
data's own score.
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEYS = ("cql_alpha", "cql_temp", "cql_target_action_gap")
RESAMPLES = 2000
Table = Dict[str, np.ndarray]  # a column over the steps


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    label: str
    alpha: float
    evaluations: List[Table]
    metrics: List[Table]


def read(directory: Path, name: str) -> Dict[int, Table]:
    """A table's columns by run."""
    runs = defaultdict(lambda: defaultdict(list))
    with open(directory / name, newline="") as file:
        for row in csv.DictReader(file):
            for column, value in row.items():
                runs[int(row["run"])][column].append(float(value or "nan"))
    return {r: {k: np.array(v) for k, v in run.items()} for r, run in runs.items()}


def read_groups(directories: List[Path]) -> List[Group]:
    """Groups in order of directory, weight, temperature and gap; labels say only what
    tells them apart."""
    found = defaultdict(lambda: ([], []))
    for directory in directories:
        evaluations = read(directory, "evaluations.csv")
        metrics = read(directory, "metrics.csv")
        for run, table in evaluations.items():
            key = (directory, *(float(table[name][0]) for name in KEYS))
            found[key][0].append(table)
            found[key][1].append(metrics.get(run, {}))
    differs = [len({key[i] for key in found}) > 1 for i in range(1 + len(KEYS))]
    groups = []
    for key in sorted(found, key=lambda key: (directories.index(key[0]), *key[1:])):
        parts = [f"{name} {x:g}" for name, x, d in zip(KEYS, key[1:], differs[1:]) if d]
        parts = [key[0].resolve().name] * differs[0] + parts
        label = ", ".join(parts) or key[0].resolve().name
        groups.append(Group(label, key[1], *found[key]))
    return groups


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without its lowest and highest quarter, rounded down."""
    n = values.shape[-1]
    return np.sort(values, -1)[..., n // 4 : n - n // 4].mean(-1)


def interval(values, statistic, level=0.95) -> Tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of statistic over the last axis (the seeds); the
    same resamples every time."""
    values = np.asarray(values, float)
    n, rng = values.shape[-1], np.random.default_rng(0)
    draws = statistic(values[..., rng.integers(n, size=(RESAMPLES, n))])
    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(draws, ends, axis=-1)
    return low, high


def joined(tables: List[Table], column: str) -> Tuple[np.ndarray, np.ndarray]:
    """Steps that all tables have [S], and their values [S, seeds]."""
    steps = [set(table["step"]) for table in tables]
    steps = np.array(sorted(set.intersection(*steps)))
    values = [t[column][np.isin(t["step"], steps)] for t in tables]
    return steps, np.stack(values, -1)


def mean_over_critics(table: Table, name: str) -> np.ndarray:
    """Mean of the columns name.format(1), name.format(2), ..."""
    names = [name.format(j) for j in range(1, 1 + len(table))]
    return np.mean([table[name] for name in names if name in table], 0)


def draw(panel, steps, values, label, colour, dashes="-") -> None:
    """The mean over seeds with its band."""
    panel.plot(steps, values.mean(-1), dashes, color=colour, label=label)
    if values.shape[-1] > 1:
        band = interval(values, lambda draws: draws.mean(-1))
        panel.fill_between(steps, *band, color=colour, alpha=0.2, linewidth=0)


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(groups: List[Group]) -> str:
    """The column to show: scores where every group has them, else returns."""
    score = "d4rl_normalized_score"
    scored = (np.isfinite(t[score]).all() for g in groups for t in g.evaluations)
    return score if all(scored) else "return_mean"


def draw_curves(groups: List[Group], column: str, out: Path, data_score=None) -> None:
    figure, panel = plt.subplots(figsize=(7, 4))
    for i, group in enumerate(groups):
        steps, values = joined(group.evaluations, column)
        n = values.shape[-1]
        label = f"{group.label} ({n} seed{'s' * (n > 1)})"
        draw(panel, steps, values, label, f"C{i}")
    if data_score is not None:
        panel.axhline(data_score, color="grey", dashes=(4, 2), label="the data")
    names = {"d4rl_normalized_score": "D4RL score", "return_mean": "return"}
    panel.set(xlabel="updates", ylabel=names[column])
    panel.legend()
    save(figure, out / "curves.png")


def q_of(group: Group) -> List[Table]:
    """Q of the policy's, the data's and uniform actions, and the gap, by seed."""
    columns = {
        "policy": "cql_q{}_current_actions",
        "data": "average_qf{}",
        "uniform": "cql_q{}_rand",
        "gap": "cql_qf{}_diff",
    }
    tables = []
    for table in group.metrics:
        if "step" in table:
            means = {k: mean_over_critics(table, name) for k, name in columns.items()}
            drift = means["policy"] - means["data"]
            tables.append({"step": table["step"], **means, "drift": drift})
    return tables


def draw_drift(groups: List[Group], out: Path) -> None:
    figure, (values, drift, gap) = plt.subplots(1, 3, figsize=(13, 4))
    for i, group in enumerate(groups):
        tables = q_of(group)
        if not tables:
            continue
        for name, dashes in (("policy", "-"), ("data", ":"), ("uniform", "--")):
            label = group.label if name == "policy" else None
            draw(values, *joined(tables, name), label, f"C{i}", dashes)
        draw(drift, *joined(tables, "drift"), group.label, f"C{i}")
        draw(gap, *joined(tables, "gap"), group.label, f"C{i}")
    values.set(title="Q: policy's (line), data's (dots), uniform (dashes)")
    drift.set(title="Q of the policy's actions - Q of the data's")
    gap.set(title="gap: soft maximum of Q - Q of the data")
    for panel in (values, drift, gap):
        panel.set_xlabel("updates")
        panel.set_yscale("symlog", linthresh=100 if panel is values else 10)
        panel.locator_params(axis="x", nbins=6)
    values.legend()
    save(figure, out / "drift.png")


def draw_weights(groups: List[Group], column: str, out: Path) -> None:
    """Against cql_alpha: where other settings differ too, they are pooled."""
    alphas = sorted({group.alpha for group in groups})
    if len(alphas) < 2:
        return
    figure, (scores, values) = plt.subplots(1, 2, figsize=(10, 4))
    places, ticks = range(len(alphas)), [f"{alpha:g}" for alpha in alphas]

    def show(panel, columns, label):
        means = np.array([np.mean(column) for column in columns])
        several = (len(c) > 1 for c in columns)
        ends = [
            interval(c, lambda draws: draws.mean(-1)) if s else (np.mean(c),) * 2
            for c, s in zip(columns, several)
        ]
        errors = np.abs(np.array(ends).T - means)
        panel.errorbar(places, means, errors, fmt="o-", capsize=3, label=label)

    mine = [[g for g in groups if g.alpha == alpha] for alpha in alphas]
    tables = [[t for g in gs for t in g.evaluations] for gs in mine]
    lasts = [[np.mean(t[column][-3:]) for t in part] for part in tables]
    show(scores, lasts, "mean of the last three evaluations")
    qs = [[t for g in gs for t in q_of(g)] for gs in mine]
    for name in ("policy", "data") if all(qs) else ():
        show(values, [[t[name][-1] for t in part] for part in qs], f"{name}'s actions")
    scores.set(title=f"{column}, last three evaluations")
    values.set(title="Q at the end")
    values.set_yscale("symlog", linthresh=100)
    for panel in (scores, values):
        panel.set(xlabel="cql_alpha", xticks=places, xticklabels=ticks)
    values.legend()
    save(figure, out / "weights.png")


def tabulate(groups: List[Group], column: str) -> List[dict]:
    """A row per group."""
    rows = []
    for group in groups:
        values = [table[column] for table in group.evaluations]
        row = {"group": group.label, "seeds": len(values), "measure": column}
        ends = {
            "last": [v[-1] for v in values],
            "last three": [np.mean(v[-3:]) for v in values],
            "best": [np.max(v) for v in values],
        }
        for name, of_seeds in ends.items():
            low, high = interval(of_seeds, interquartile_mean)
            mean = interquartile_mean(np.array(of_seeds))
            row |= {name: mean, f"{name} low": low, f"{name} high": high}
        rows.append(row)
    return rows


def write_tables(rows: List[dict], out: Path) -> str:
    """table.csv and table.md; returns the latter's text."""
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.6g}" for k, v in row.items() if not isinstance(v, str)}
            writer.writerow({**row, **numbers})
    names = ("last", "last three", "best")
    heads = ["group", "seeds", *(f"{name}, IQM [95%]" for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["group"], str(row["seeds"])]
        for name in names:
            ends = f" [{row[f'{name} low']:.1f}, {row[f'{name} high']:.1f}]"
            cells.append(f"{row[name]:.1f}" + ends * (row["seeds"] > 1))
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (out / "table.md").write_text(text)
    return text


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    parser.add_argument("--data-score", type=float)
    arguments = parser.parse_args(argv)
    for directory in arguments.directories:
        if not (directory / "evaluations.csv").is_file():
            parser.error(f"{directory}: no evaluations.csv there")
    groups = read_groups(arguments.directories)
    if not groups:
        parser.error("no evaluations yet")
    column, out = measure(groups), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(groups, column, out, arguments.data_score)
    draw_drift(groups, out)
    draw_weights(groups, column, out)
    print(write_tables(tabulate(groups, column), out), end="")


if __name__ == "__main__":
    main()
