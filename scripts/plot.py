"""Draw and tabulate any number of runs.

    pip install matplotlib==3.11.2 pandas==3.1.1
    python scripts/plot.py runs/a runs/b --out figures
    python scripts/plot.py runs/sweep --data-score 35.6

Of a directory that holds runs, such as sweep.py's, each run is taken. Runs
that differ only in their seed, by their config.yaml, are one group. Written to
--out, where there is something to show:

    curves.png   score (or return) in the course of training
    drift.png    Q of the policy's actions, how far it and Q of uniform actions
                 are above Q of the data's, and the penalized gap
    weights.png  score, and Q of the policy's and the data's actions, against
                 cql_alpha
    table.md     interquartile mean over seeds and its 95% interval, a row per
    table.csv    group, of the last evaluation, of the mean of the last three,
                 and of the best

Lines are means over seeds, bands their 95% percentile bootstrap intervals,
from five seeds on; fewer are drawn themselves, as thin lines. (That kind of
interval is too narrow for few: of five normal numbers it holds the mean in some
85 of 100 cases, of ten in 90.) The interquartile mean leaves out a quarter of
the seeds, rounded down, at either end, as in Agarwal et al., arXiv 2108.13264.
"Best" is chosen on the episodes that it is measured with, so it flatters. Runs
that stopped before their group's last evaluation, diverged ones say, are drawn
as far as they came and counted apart in the table.
"""

import argparse
import io
import math
import sys
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
import yaml

try:
    import matplotlib
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter
except ModuleNotFoundError as missing:
    install = "pip install matplotlib==3.11.2 pandas==3.1.1"
    print(f"plot.py: error: {missing}: {install}", file=sys.stderr)
    sys.exit(2)

# Flags that cql.py's tables hold, and those of config.yaml that make no difference.
KEYS = ["cql_alpha", "cql_temp", "cql_target_action_gap"]
IDLE = "seed name group project resume checkpoints_path device log_freq".split()
RESAMPLES = 2000
LEAST = 5  # seeds that make an interval
SCORE = "d4rl_normalized_score"
LABELS = {SCORE: "normalized score", "return_mean": "return"}
EVALUATED = ["seed", *KEYS, "return_mean", SCORE]  # columns of evaluations.csv
# Columns of metrics.csv whose means over the critics are drawn.
Q_COLUMNS = {
    "policy": r"cql_q\d+_current_actions",
    "data": r"average_qf\d+",
    "uniform": r"cql_q\d+_rand",
    "gap": r"cql_qf\d+_diff",
}
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "figure.dpi": 140,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


class UserError(Exception):
    """The user's input is at fault: one line on stderr, exit status 2."""


# ---- Reading -------------------------------------------------------------------------


def find_runs(paths: List[Path]) -> List[Path]:
    """The directories of runs among those given and, for one that is no run's own,
    below it. Raises UserError."""
    found = []
    for path in paths:
        below = sorted(table.parent for table in path.glob("*/evaluations.csv"))
        if below and not (path / "config.yaml").exists():
            found += below
        elif (path / "evaluations.csv").exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no evaluations.csv there (yet?)")
    if len({path.resolve() for path in found}) < len(found):
        raise UserError("a directory twice")
    return found


def read_table(path: Path, columns=()) -> pd.DataFrame:
    """A table of cql.py's, with a column `id` that tells all runs apart; without rows
    if there is none. Raises UserError, also where it lacks some of the columns."""
    if not path.exists():
        return pd.DataFrame()
    try:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # a row being written, or torn, is not
        if not whole:
            return pd.DataFrame()
        table = pd.read_csv(io.StringIO(whole))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not {"step", "run", *columns} <= set(table):
        raise UserError(f"{path}: not a table of cql.py's")
    table["id"] = str(path.parent) + "/" + table["run"].astype(str)
    return table


def read_config(directory: Path) -> dict:
    """Of config.yaml; empty without one. Raises UserError."""
    path = directory / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a config of cql.py's")
    return config


def read_flags(directory: Path) -> Dict[str, str]:
    """The flags in config.yaml that tell groups apart; the directory without one.
    Raises UserError."""
    config = read_config(directory)
    if not config:
        return {"directory": str(directory)}
    flags = {}
    for name, value in config.items():
        if name not in IDLE + KEYS:
            text = str(value)
            flags[name] = text.lower() if isinstance(value, bool) else text
    return flags


def count_seeds(directory: Path) -> int:
    """How many seeds were to be trained; 0 if that is not known. Raises UserError."""
    config = read_config(directory)
    if not config:
        return 0
    seeds = config.get("seed")
    return len(seeds) if isinstance(seeds, list) else 1


def read_metrics(path: Path) -> pd.DataFrame:
    """The table with Q_COLUMNS' means. Raises UserError."""
    metrics = read_table(path)
    if len(metrics):
        for name, pattern in Q_COLUMNS.items():
            critics = metrics.filter(regex=f"^{pattern}$")
            metrics[name] = critics.mean(axis=1, skipna=False)
    return metrics


def read_runs(paths: List[Path]) -> Tuple[pd.DataFrame, pd.DataFrame]:
    """All evaluations and all metrics, with the columns of `label_groups`. Raises
    UserError."""
    evaluations = []
    metrics = []
    settings = []
    for directory in find_runs(paths):
        table = read_table(directory / "evaluations.csv", EVALUATED)
        if len(table):
            flags = read_flags(directory)
            settings += [name for name in flags if name not in settings]
            more = {"origin": str(directory), "asked": count_seeds(directory)}
            evaluations.append(table.assign(**flags, **more))
            metrics.append(read_metrics(directory / "metrics.csv"))
    if not evaluations:
        raise UserError(f"{paths[0]}: no evaluations yet")
    evaluations = pd.concat(evaluations).sort_values(KEYS, kind="stable")
    evaluations = evaluations.reset_index(drop=True)
    evaluations[settings] = evaluations[settings].fillna("unset")
    label_groups(evaluations, settings)
    check_seeds(evaluations)
    metrics = pd.concat(metrics)
    if len(metrics):
        labels = evaluations.drop_duplicates("id").set_index("id")
        labels = labels[["group", "others", *KEYS]]
        metrics = metrics.join(labels, on="id", how="inner")
        metrics = metrics.sort_values(KEYS, kind="stable")
    return evaluations, metrics


def label_groups(evaluations: pd.DataFrame, settings: List[str]) -> None:
    """Add the columns `group`, what tells a run's group from the others, and `others`,
    the same but for cql_alpha."""
    varying = []
    for name in settings + KEYS:
        if evaluations[name].nunique(dropna=False) > 1:
            varying.append(name)
    flags = [name for name in varying if name not in KEYS]
    several = evaluations.groupby(varying or KEYS, sort=False, dropna=False)
    for _, rows in several:
        first = rows.iloc[0]
        words = [f"{name} {first[name]}" for name in flags]
        if len(flags) > 2 or flags == ["directory"]:  # too many words
            words = [first["origin"]]
        alpha = []
        for name in varying:
            if name in KEYS:
                word = f"{name} {first[name]:g}"
                if name == "cql_alpha":
                    alpha.append(word)
                else:
                    words.append(word)
        label = ", ".join(words + alpha) or Path(first["origin"]).resolve().name
        evaluations.loc[rows.index, "group"] = label
        evaluations.loc[rows.index, "others"] = ", ".join(words)


def check_seeds(evaluations: pd.DataFrame) -> None:
    """Raise UserError where two directories hold the same seed of a group: it would
    count as two."""
    for (_, seed), rows in evaluations.groupby(["group", "seed"]):
        origins = rows["origin"].unique()
        if len(origins) > 1:
            both = f"{origins[0]} and {origins[1]}"
            raise UserError(f"{both}: the same settings and seed, {seed:g}")


def over_runs(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """A column by step and run; NaN where a run had stopped."""
    return table.pivot(index="step", columns="id", values=column)


# ---- Statistics ----------------------------------------------------------------------


def mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis, the runs that are there."""
    with warnings.catch_warnings():  # a resample may hold none
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=-1)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis without its lowest and highest quarter, rounded down."""
    n = values.shape[-1]
    middle = np.sort(values, axis=-1)[..., n // 4 : n - n // 4]
    return mean(middle)


def interval(values, statistic: Callable) -> Tuple[np.ndarray, np.ndarray]:
    """Ends of the 95% percentile bootstrap interval of a statistic over the last axis,
    the runs; NaN for fewer than LEAST. The resamples are the same every time."""
    values = np.asarray(values, float)
    n = values.shape[-1]
    if n < LEAST:
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing
    chosen = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    draws = statistic(values[..., chosen])
    with warnings.catch_warnings():  # a step may have no number
        warnings.simplefilter("ignore", RuntimeWarning)
        low = np.nanquantile(draws, 0.025, axis=-1)
        high = np.nanquantile(draws, 0.975, axis=-1)
    return low, high


def measure(evaluations: pd.DataFrame) -> str:
    """The column to show: scores where all are known, else returns."""
    return SCORE if evaluations[SCORE].notna().all() else "return_mean"


def tabulate(evaluations: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row per group, over the runs that came to its last evaluation."""
    rows = []
    for group, table in evaluations.groupby("group", sort=False):
        values = over_runs(table, column)
        whole = values.loc[:, values.iloc[-1].notna()]
        asked = table.drop_duplicates("origin")["asked"].sum()
        stopped = max(asked, values.shape[1]) - whole.shape[1]
        row = {"group": group, "seeds": whole.shape[1], "stopped": stopped}
        ends = {
            "last": whole.iloc[-1],
            "last three": whole.tail(3).mean(),
            "best": whole.max(),
        }
        for name, of_runs in ends.items():
            of_runs = of_runs.to_numpy()
            low, high = interval(of_runs, interquartile_mean)
            row[name] = interquartile_mean(of_runs)
            row[f"{name} low"] = float(low)
            row[f"{name} high"] = float(high)
        row["measure"] = column
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table as text."""
    names = ["last", "last three", "best"]
    counts = ["group", "seeds"]
    if table["stopped"].any():
        counts.append("stopped")
    head = "IQM [95%]" if (table["seeds"] >= LEAST).any() else "IQM"
    heads = counts + [f"{name}, {head}" for name in names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for _, row in table.iterrows():
        cells = [str(row[name]) for name in counts]
        for name in names:
            text = f"{row[name]:.1f}"
            if row["seeds"] >= LEAST:
                text += f" [{row[f'{name} low']:.1f}, {row[f'{name} high']:.1f}]"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---- Figures -------------------------------------------------------------------------


def choose_colours(labels) -> dict:
    """A colour for each label; shades in order for many."""
    labels = list(labels)
    colours = COLOURS
    if len(labels) > len(COLOURS):
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(labels)))
    return dict(zip(labels, colours))


def add_legend(figure, lines: Dict[str, Line2D]) -> None:
    """Above the panels, in as many columns as fit."""
    letters = 14 * figure.get_figwidth()  # of a line, about
    longest = max(len(label) for label in lines)
    columns = max(1, int(letters // (longest + 8)))
    rows = math.ceil(len(lines) / columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=columns)


def add_style_legend(panel, styles: Dict[str, str]) -> None:
    """Below the panel, what its kinds of lines are."""
    for label, style in styles.items():
        panel.plot([], [], style, color="0.3", label=label)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(styles))


def draw(panel, values: pd.DataFrame, colour, style: str = "-") -> Line2D:
    """The mean over runs with its interval, or with the runs where they are few."""
    array = values.to_numpy()
    marker = "." if len(values) <= 30 else ""
    if 1 < values.shape[1] < LEAST:
        panel.plot(values.index, array, style, color=colour, alpha=0.35, linewidth=0.8)
    (line,) = panel.plot(values.index, mean(array), style, marker=marker, color=colour)
    low, high = interval(array, mean)
    panel.fill_between(values.index, low, high, color=colour, alpha=0.2, linewidth=0)
    return line


def choose_scale(panel, values: pd.DataFrame) -> None:
    """Logarithmic, but around 0, where the largest dwarfs most others."""
    sizes = pd.Series(values.abs().to_numpy().ravel())
    if sizes.max() > 100 * max(sizes.median(), 1):
        panel.set_yscale("symlog", linthresh=10)


def name_steps(evaluations: pd.DataFrame) -> str:
    """What a step of these runs is."""
    online = {"0"}
    offline = {"unset"}
    if "online_iterations" in evaluations:
        online |= set(evaluations["online_iterations"])
        offline = set(evaluations["max_timesteps"])
    if online <= {"0", "unset"}:
        return "gradient updates"
    if offline == {"0"}:
        return "environment steps"
    return "gradient updates, then environment steps"


def save(figure, path: Path) -> None:
    for panel in figure.axes:
        if panel.get_xlabel() != "cql_alpha":
            panel.xaxis.set_major_locator(
                plt.MaxNLocator(6, steps=[1, 2, 2.5, 4, 5, 10])
            )
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M
    figure.savefig(path)
    plt.close(figure)


def draw_curves(evaluations, column: str, out: Path, data_score=None) -> None:
    figure, panel = plt.subplots(figsize=(7, 3.8))
    colours = choose_colours(evaluations["group"].unique())
    lines = {}
    for group, table in evaluations.groupby("group", sort=False):
        values = over_runs(table, column)
        n = values.shape[1]
        label = f"{group} ({n} seeds)" if n > 1 else f"{group} (1 seed)"
        lines[label] = draw(panel, values, colours[group])
    if data_score is not None:
        lines["the data's mean"] = panel.axhline(data_score, color="0.4", dashes=(4, 2))
    panel.set(xlabel=name_steps(evaluations), ylabel=LABELS[column])
    add_legend(figure, lines)
    save(figure, out / "curves.png")


def draw_drift(evaluations, metrics, out: Path) -> None:
    if not len(metrics) or metrics["policy"].isna().all():
        return
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8))
    q, above, gap = panels
    colours = choose_colours(evaluations["group"].unique())
    differences = metrics[["policy", "uniform"]].sub(metrics["data"], axis=0)
    metrics = metrics.assign(drift=differences["policy"], fall=differences["uniform"])
    lines = {}
    for group, table in metrics.groupby("group", sort=False):
        colour = colours[group]
        lines[group] = draw(q, over_runs(table, "policy"), colour)
        draw(above, over_runs(table, "drift"), colour)
        draw(above, over_runs(table, "fall"), colour, "--")
        draw(gap, over_runs(table, "gap"), colour)
    choose_scale(q, metrics[["policy"]])
    choose_scale(above, differences)
    choose_scale(gap, metrics[["gap"]])
    q.set_title("Q of the policy's actions")
    above.set_title("Q minus Q of the data's actions")
    gap.set_title("conservative gap, which cql_alpha multiplies")
    add_style_legend(above, {"policy's actions": "-", "uniform actions": "--"})
    for panel in panels:
        panel.set_xlabel(name_steps(evaluations))
    add_legend(figure, lines)
    save(figure, out / "drift.png")


def draw_weights(evaluations, metrics, column: str, out: Path) -> None:
    """Ends of all runs against the weight; a colour for each other setting."""
    alphas = sorted(evaluations["cql_alpha"].unique())
    if len(alphas) < 2:
        return
    figure, (scores, q) = plt.subplots(1, 2, figsize=(10, 4))
    colours = choose_colours(evaluations["others"].unique())
    last = evaluations.sort_values("step").groupby("id").tail(3)
    last = last.groupby(["others", "cql_alpha", "id"], as_index=False)[column].mean()
    lines = {}
    for others, table in last.groupby("others", sort=False):
        lines[others] = draw_ends(scores, table, alphas, column, colours[others])
    if len(metrics) and metrics["policy"].notna().any():
        last = metrics.dropna(subset="policy").sort_values("step")
        last = last.groupby("id").tail(1)
        for others, table in last.groupby("others", sort=False):
            colour = colours[others]
            draw_ends(q, table, alphas, "policy", colour, "o", -0.1)
            draw_ends(q, table, alphas, "data", colour, "s", 0.1)
        choose_scale(q, last[["policy", "data"]])
    add_style_legend(q, {"policy's actions": "o", "data's actions": "s"})
    scores.set_title("mean of the last three evaluations")
    scores.set_ylabel(LABELS[column])
    q.set_title("Q at the end")
    for panel in (scores, q):
        names = [f"{alpha:g}" for alpha in alphas]
        panel.set(xlabel="cql_alpha", xticks=range(len(alphas)), xticklabels=names)
    if len(lines) > 1:
        add_legend(figure, lines)
    save(figure, out / "weights.png")


def draw_ends(panel, table, alphas, column, colour, marker="o", shift=0.0) -> Line2D:
    """A faint point for each run, and their mean with its interval, for each weight:
    not joined, as weights are seldom evenly spaced."""
    places = []
    means = []
    errors = []
    for alpha, rows in table.groupby("cql_alpha"):
        values = rows[column].to_numpy()
        low, high = interval(values, mean)
        places.append(alphas.index(alpha) + shift)
        means.append(mean(values))
        errors.append([means[-1] - low, high - means[-1]])
        points = [places[-1]] * len(values)
        panel.plot(points, values, marker, color=colour, ms=3, alpha=0.4)
    errors = np.transpose(errors)
    return panel.errorbar(places, means, errors, fmt=marker, capsize=3, color=colour)


# ---- Command line --------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The options. Raises UserError."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "directories", nargs="+", type=Path, metavar="DIR", help="of a run or of several"
    )
    add("--out", type=Path, default=Path("figures"), help="directory of the figures")
    add("--data-score", type=float, help="where to draw a line at the data's own score")
    return parser.parse_args(argv)


def plot(options) -> None:
    """What the command line asks for. Raises UserError."""
    evaluations, metrics = read_runs(options.directories)
    column = measure(evaluations)
    out = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error}") from None
    for name in ("curves.png", "drift.png", "weights.png"):  # of an earlier call
        (out / name).unlink(missing_ok=True)
    with matplotlib.rc_context(STYLE):
        draw_curves(evaluations, column, out, options.data_score)
        draw_drift(evaluations, metrics, out)
        draw_weights(evaluations, metrics, column, out)
    table = tabulate(evaluations, column)
    table.to_csv(
        out / "table.csv", index=False, float_format="%.6g", lineterminator="\n"
    )
    (out / "table.md").write_text(markdown(table))
    print(markdown(table), end="")
    print(f"figures and tables: {out}")


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status."""
    matplotlib.use("Agg")
    try:
        plot(parse(argv))
    except UserError as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
