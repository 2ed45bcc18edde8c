"""Draw and tabulate any number of runs.

    python benchmarks/plot.py RUN_DIR [RUN_DIR ...] --out figures

Runs that differ only in their seed, by their directories' config.yaml, are one group.
Written to --out, where there is something to show:

    curves.png   score (or return) against updates
    drift.png    Q of the policy's, the data's and uniform actions; how far the first is
                 above the second; the gap: each against updates
    weights.png  score, and Q of the policy's and the data's actions, against cql_alpha
    table.md     interquartile mean over seeds and its 95% interval, a row per group, of
    table.csv    the last evaluation, of the mean of the last three, and of the best

Lines are means over seeds, bands their 95% percentile bootstrap intervals, from five
seeds on. (That kind of interval is too narrow for few: of five normal numbers it holds
the mean in some 85 of 100 cases, of ten in 90.) The interquartile mean leaves out a
quarter of the seeds, rounded down, at either end, as in Agarwal et al., arXiv
2108.13264. "Best" is chosen on the episodes that it is measured with, so it flatters.
Runs that stopped before their group's last evaluation, diverged ones say, are drawn as
far as they came and counted apart in the table. --data-score draws a line at the data's
own score.
"""

import argparse
import csv
import math
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEYS = ("cql_alpha", "cql_temp", "cql_target_action_gap")
# What of config.yaml does not tell two groups apart: KEYS do, from the tables.
OTHER = "seed name group project resume checkpoints_path device log_freq"
RESAMPLES, LEAST = 2000, 5  # the latter: seeds that make an interval
Table = Dict[str, np.ndarray]  # a column over the steps


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    label: str
    alpha: float
    asked: int  # how many were to be trained
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


def settings(directory: Path) -> Tuple[str, int]:
    """What makes the directory's runs comparable with another's, and how many seeds."""
    path = directory / "config.yaml"
    if not path.exists():
        return str(directory.resolve()), 0
    config = yaml.safe_load(path.read_text())
    seeds = config.get("seed")
    rest = {k: v for k, v in config.items() if k not in (*OTHER.split(), *KEYS)}
    return repr(sorted(rest.items())), len(seeds) if isinstance(seeds, list) else 1


def read_groups(directories: List[Path]) -> List[Group]:
    """Groups in order of directory, weight, temperature and gap; labels say only what
    tells them apart."""
    found, asked, names = {}, defaultdict(int), {}
    for directory in directories:
        evaluations = read(directory, "evaluations.csv")
        metrics = {}
        if (directory / "metrics.csv").exists():
            metrics = read(directory, "metrics.csv")
        kind, seeds = settings(directory)
        names.setdefault(kind, directory.resolve().name)
        mine = set()
        for run, table in evaluations.items():
            key = (kind, *(float(table[name][0]) for name in KEYS))
            tables = found.setdefault(key, ([], []))
            tables[0].append(table)
            tables[1].append(metrics.get(run, {}))
            mine.add(key)
        for key in mine:
            asked[key] += seeds
    differs = [len({key[i] for key in found}) > 1 for i in range(1 + len(KEYS))]
    kinds, groups = list(names), []
    for key in sorted(found, key=lambda key: (kinds.index(key[0]), *key[1:])):
        parts = [f"{name} {x:g}" for name, x, d in zip(KEYS, key[1:], differs[1:]) if d]
        parts = [names[key[0]]] * differs[0] + parts
        label, n = ", ".join(parts) or names[key[0]], len(found[key][0])
        groups.append(Group(label, key[1], max(asked[key], n), *found[key]))
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
    low, high = np.nanquantile(draws, ends, axis=-1)
    return low, high


def joined(tables: List[Table], column: str) -> Tuple[np.ndarray, np.ndarray]:
    """Steps that any table has [S], and their values [S, seeds], NaN where a run had
    stopped."""
    steps = np.array(sorted(set().union(*(table["step"] for table in tables))))
    values = np.full((len(steps), len(tables)), np.nan)
    for i, table in enumerate(tables):
        values[np.searchsorted(steps, table["step"]), i] = table[column]
    return steps, values


def mean_over_critics(table: Table, name: str) -> np.ndarray:
    """Mean of the columns name.format(1), name.format(2), ..."""
    names = [name.format(j) for j in range(1, 1 + len(table))]
    return np.mean([table[name] for name in names if name in table], 0)


def mean(values: np.ndarray) -> np.ndarray:
    """Over the seeds that are there."""
    with warnings.catch_warnings():  # a resample may hold none
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, -1)


def draw(panel, steps, values, label, colour, dashes="-") -> None:
    """The mean over seeds with its band."""
    panel.plot(steps, mean(values), dashes, color=colour, label=label)
    if values.shape[-1] >= LEAST:
        low, high = interval(values, mean)
        panel.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


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
    panel.set(xlabel="step", ylabel=names[column])
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
    found = [(i, group, q_of(group)) for i, group in enumerate(groups)]
    found = [each for each in found if each[2]]
    if not found:
        return
    figure, (values, drift, gap) = plt.subplots(1, 3, figsize=(13, 4))
    for i, group, tables in found:
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
        ends = [
            interval(c, mean) if len(c) >= LEAST else (np.mean(c),) * 2 for c in columns
        ]
        errors = np.abs(np.array(ends).T - means)
        line = panel.errorbar(places, means, errors, fmt="o-", capsize=3, label=label)
        for place, column in zip(places, columns):  # and each seed
            panel.plot([place] * len(column), column, ".", color=line[0].get_color())

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
    """A row per group, over the runs that came to its last evaluation."""
    rows = []
    for group in groups:
        last = max(table["step"][-1] for table in group.evaluations)
        values = [t[column] for t in group.evaluations if t["step"][-1] == last]
        n = len(values)
        row = {"group": group.label, "seeds": n, "stopped": group.asked - n}
        ends = {
            "last": [v[-1] for v in values],
            "last three": [np.mean(v[-3:]) for v in values],
            "best": [np.max(v) for v in values],
        }
        for name, of_seeds in ends.items():
            low, high = (math.nan, math.nan)
            if n >= LEAST:
                low, high = interval(of_seeds, interquartile_mean)
            center = interquartile_mean(np.array(of_seeds))
            row |= {name: center, f"{name} low": low, f"{name} high": high}
        rows.append({**row, "measure": column})
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
    stopped = any(row["stopped"] for row in rows)
    heads = ["group", "seeds", *["stopped"] * stopped]
    heads += [f"{name}, IQM [95%]" for name in names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["group"], str(row["seeds"]), *[str(row["stopped"])] * stopped]
        for name in names:
            ends = f" [{row[f'{name} low']:.1f}, {row[f'{name} high']:.1f}]"
            cells.append(f"{row[name]:.1f}" + ends * (row["seeds"] >= LEAST))
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
            parser.error(f"{directory}: no evaluations.csv there (yet?)")
    if len({path.resolve() for path in arguments.directories}) < len(
        arguments.directories
    ):
        parser.error("a directory twice")
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
