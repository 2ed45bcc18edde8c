"""Draw learning curves of any number of runs, and tabulate their scores.

    pip install matplotlib==3.11.2 pandas==3.1.1
    python scripts/plot.py runs/a runs/b --out figures
    python scripts/plot.py runs/sweep --data-score 35.6

DIR is the directory of a run, or one that contains runs, such as sweep.py's.
Runs whose config.yaml differs only in the seed form one group. These files are
written to --out if there are data for them:

    curves.png   score (or return) against the training step
    drift.png    Q of policy actions; Q of policy and uniform actions minus Q of
                 dataset actions; the conservative gap
    weights.png  score, and Q of policy and dataset actions, against cql_alpha
    table.md     for each group the interquartile mean over seeds and its 95%
    table.csv    interval: of the last evaluation, the mean of the last three,
                 and the best

Runs without evaluations, such as those of --eval_env none, are only in
drift.png and weights.png.

Lines are means over seeds. Bands are 95% percentile bootstrap intervals, drawn
for five or more seeds; with fewer, each seed is a thin line. Such intervals are
too narrow for few seeds: with five normally distributed values they cover the
mean in about 85% of cases, with ten in 90%. The interquartile mean drops a
quarter of the seeds, rounded down, at each end (Agarwal et al., arXiv
2108.13264). "Best" is selected on the same episodes that measure it, so it is
biased upward. A run that stopped before its group's last evaluation, for
example because it diverged, is drawn until then; the table only counts it.
"""

import argparse
import io
import itertools
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

# KEYS are flags that are columns of evaluations.csv. IGNORED flags of config.yaml do not
# separate groups.
KEYS = ["cql_alpha", "cql_temp", "cql_target_action_gap"]
IGNORED = "seed name group project resume checkpoints_path device log_freq".split()
RESAMPLES = 2000
MIN_SEEDS = 5  # fewest seeds for a bootstrap interval
SCORE = "d4rl_normalized_score"
LABELS = {SCORE: "normalized score", "return_mean": "return"}
TABLES = ["evaluations.csv", "metrics.csv"]
EVALUATED = ["seed", *KEYS, "return_mean", SCORE]  # columns of evaluations.csv
# Columns of metrics.csv, one for each critic; their means over the critics are drawn.
Q_COLUMNS = {
    "policy": r"cql_q\d+_current_actions",
    "data": r"average_qf\d+",
    "uniform": r"cql_q\d+_rand",
    "gap": r"cql_qf\d+_diff",
}
# The reason if a figure is not drawn
ABSENT = {
    "curves.png": "no run has been evaluated, so there is no table either",
    "drift.png": "metrics.csv holds no Q of policy actions",
    "weights.png": "all runs have the same cql_alpha",
}
# Okabe and Ito's palette, which is safe for color-blind readers.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
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
    """Error in the user's input, reported in one line on stderr with exit status 2."""


# ---- Reading -------------------------------------------------------------------------


def find_runs(paths: List[Path]) -> List[Path]:
    """Return the run directories.

    A path that is not a run stands for the runs one level below it. Raise UserError if
    a path has no run or is given twice."""
    found = []
    for path in paths:
        below = set()
        for name in TABLES:
            below |= {table.parent for table in path.glob(f"*/{name}")}
        if below and not (path / "config.yaml").exists():
            found += sorted(below)
        elif any((path / name).exists() for name in TABLES):
            found.append(path)
        else:
            problem = f"neither {TABLES[0]} nor {TABLES[1]}"
            raise UserError(f"{path}: {problem}; pass the directory of a trained run")
    seen = set()
    for path in found:
        if path.resolve() in seen:
            raise UserError(f"{path}: given twice; pass each directory once")
        seen.add(path.resolve())
    return found


def read_table(path: Path, columns=()) -> pd.DataFrame:
    """Read a table of cql.py and add the column `id`.

    An id identifies a run among all directories. The result is empty if there is no
    file or no row. Raise UserError if the file cannot be read or lacks one of the
    columns."""
    if not path.exists():
        return pd.DataFrame()
    try:
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]  # without an incomplete last row
        if not whole:
            return pd.DataFrame()
        table = pd.read_csv(io.StringIO(whole))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    missing = [name for name in ("step", "run", *columns) if name not in table]
    if missing:
        problem = f"column {missing[0]} is missing"
        raise UserError(f"{path}: {problem}; expected a table that cql.py wrote")
    table["id"] = str(path.parent) + "/" + table["run"].astype(str)
    return table


def read_config(directory: Path) -> dict:
    """Return the flags in a run's config.yaml, or {} without one.

    Raise UserError if the file does not hold flags."""
    path = directory / "config.yaml"
    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a mapping; expected a config that cql.py wrote")
    return config


def read_flags(directory: Path) -> Dict[str, str]:
    """Return the flags of config.yaml that separate groups.

    Without the file, each directory is its own group. Raise UserError if the file does
    not hold flags."""
    config = read_config(directory)
    if not config:
        return {"directory": str(directory)}
    flags = {}
    for name, value in config.items():
        if name not in IGNORED + KEYS:
            text = str(value)
            flags[name] = text.lower() if isinstance(value, bool) else text
    return flags


def count_seeds(directory: Path) -> int:
    """Return the number of seeds that config.yaml asks for, or 0 without one.

    Raise UserError if the file does not hold flags."""
    config = read_config(directory)
    if not config:
        return 0
    seeds = config.get("seed")
    return len(seeds) if isinstance(seeds, list) else 1


def read_metrics(path: Path) -> pd.DataFrame:
    """Read metrics.csv and add the means over critics of Q_COLUMNS.

    Raise UserError if it cannot be read."""
    metrics = read_table(path)
    if len(metrics):
        for name, pattern in Q_COLUMNS.items():
            critics = metrics.filter(regex=f"^{pattern}$")
            metrics[name] = critics.mean(axis=1, skipna=False)
    return metrics


def planned_runs(directory: Path) -> pd.DataFrame:
    """Return the runs that config.yaml asks for, in the order of their numbers.

    Raise UserError if the file is missing or does not hold a run's flags."""
    config = read_config(directory)
    lists = []
    for name in ["seed", *KEYS]:
        if name not in config:
            problem = f"no evaluations, and no {name} in config.yaml"
            raise UserError(f"{directory}: {problem}; pass a directory of cql.py")
        value = config[name]
        lists.append(value if isinstance(value, list) else [value])
    runs = pd.DataFrame(itertools.product(*lists), columns=["seed", *KEYS])
    runs["id"] = [f"{directory}/{run}" for run in runs.index]
    return runs


def read_runs(paths: List[Path]) -> Tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Read the flags, the evaluations and the metrics of all runs.

    The first table has one row for each run. The columns `group` and `others` label
    the groups in all three. Raise UserError for files that are not cql.py's and for a
    seed that occurs twice."""
    runs = []
    evaluations = []
    metrics = []
    settings = []
    for directory in find_runs(paths):
        evaluated = read_table(directory / "evaluations.csv", EVALUATED)
        trained = read_metrics(directory / "metrics.csv")
        if len(evaluated):
            found = evaluated.drop_duplicates("id")[["id", "seed", *KEYS]]
        elif len(trained):
            found = planned_runs(directory)
        else:
            continue
        flags = read_flags(directory)
        settings += [name for name in flags if name not in settings]
        more = {"origin": str(directory), "n_seeds": count_seeds(directory)}
        more["evaluated"] = len(evaluated) > 0
        runs.append(found.assign(**flags, **more))
        evaluations.append(evaluated.drop(columns=["seed", *KEYS], errors="ignore"))
        metrics.append(trained.drop(columns=["seed", *KEYS], errors="ignore"))
    if not runs:
        problem = f"no rows in {TABLES[0]} or {TABLES[1]} yet"
        raise UserError(f"{paths[0]}: {problem}; wait for the first ones")
    runs = pd.concat(runs).sort_values(KEYS, kind="stable").reset_index(drop=True)
    runs[settings] = runs[settings].fillna("unset")
    label_groups(runs, settings)
    runs = check_seeds(runs)
    return runs, add_flags(evaluations, runs), add_flags(metrics, runs)


def add_flags(tables: List[pd.DataFrame], runs: pd.DataFrame) -> pd.DataFrame:
    """Return the joined tables with the columns of `runs`, sorted by KEYS."""
    table = pd.concat(tables)
    if not len(table):
        return table
    labels = ["seed", "origin", "n_seeds", "group", "others", *KEYS]
    table = table.join(runs.set_index("id")[labels], on="id", how="inner")
    return table.sort_values(KEYS, kind="stable").reset_index(drop=True)


def label_groups(runs: pd.DataFrame, settings: List[str]) -> None:
    """Add the columns `group` and `others`.

    `group` is a label of the flags that differ between groups; `others` is the same
    label without cql_alpha."""
    varying = []
    for name in settings + KEYS:
        if runs[name].nunique(dropna=False) > 1:
            varying.append(name)
    flags = [name for name in varying if name not in KEYS]
    several = runs.groupby(varying or KEYS, sort=False, dropna=False)
    for _, rows in several:
        first = rows.iloc[0]
        words = [f"{name} {first[name]}" for name in flags]
        if len(flags) > 2 or flags == ["directory"]:  # flags would make a long label
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
        runs.loc[rows.index, "group"] = label
        runs.loc[rows.index, "others"] = ", ".join(words)


def check_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Raise UserError if two directories hold the same seed of a group.

    It would count as two seeds. But a run without evaluations that another one repeats
    with evaluations was stopped early, so the result is without it."""
    seeds = pd.MultiIndex.from_frame(runs[["group", "seed"]])
    repeated = seeds.isin(seeds[runs["evaluated"]])
    runs = runs[runs["evaluated"] | ~repeated]
    for (_, seed), rows in runs.groupby(["group", "seed"]):
        origins = rows["origin"].unique()
        if len(origins) > 1:
            both = f"{origins[0]} and {origins[1]}"
            problem = f"both hold seed {seed:g} of the same settings"
            raise UserError(f"{both}: {problem}; pass one of them")
    return runs


def has_q(metrics: pd.DataFrame) -> bool:
    """Return whether there is any Q of policy actions."""
    return len(metrics) > 0 and bool(metrics["policy"].notna().any())


def over_runs(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column as a table [steps, runs], with NaN after a run has stopped."""
    return table.pivot(index="step", columns="id", values=column)


# ---- Statistics ----------------------------------------------------------------------


def mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis (runs), without NaN."""
    with warnings.catch_warnings():  # NumPy warns if all values are NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=-1)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis (runs) without its outer quarters.

    The number of runs that are dropped at each end is rounded down."""
    n = values.shape[-1]
    middle = np.sort(values, axis=-1)[..., n // 4 : n - n // 4]
    return mean(middle)


def interval(values, statistic: Callable) -> Tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95% percentile bootstrap interval of a statistic.

    values [..., runs] are resampled over the runs with a fixed seed. Both ends have the
    shape [...]; they are NaN for fewer than MIN_SEEDS runs."""
    values = np.asarray(values, float)
    n = values.shape[-1]
    if n < MIN_SEEDS:
        unknown = np.full(values.shape[:-1], np.nan)
        return unknown, unknown
    chosen = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    draws = statistic(values[..., chosen])
    with warnings.catch_warnings():  # NumPy warns if all values of a step are NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        low = np.nanquantile(draws, 0.025, axis=-1)
        high = np.nanquantile(draws, 0.975, axis=-1)
    return low, high


def measure(evaluations: pd.DataFrame) -> str:
    """Return the name of the column to show.

    It is the score if all scores are known, otherwise the return."""
    return SCORE if evaluations[SCORE].notna().all() else "return_mean"


def tabulate(evaluations: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a table with one row for each group.

    Its statistics are over the runs that reached the group's last evaluation; the others
    are counted as stopped."""
    rows = []
    for group, table in evaluations.groupby("group", sort=False):
        values = over_runs(table, column)
        whole = values.loc[:, values.iloc[-1].notna()]
        n_seeds = table.drop_duplicates("origin")["n_seeds"].sum()
        stopped = max(n_seeds, values.shape[1]) - whole.shape[1]
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
    """Return the table of `tabulate` as Markdown."""
    names = ["last", "last three", "best"]
    counts = ["group", "seeds"]
    if table["stopped"].any():
        counts.append("stopped")
    head = "IQM [95%]" if (table["seeds"] >= MIN_SEEDS).any() else "IQM"
    heads = counts + [f"{name}, {head}" for name in names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for _, row in table.iterrows():
        cells = [str(row[name]) for name in counts]
        for name in names:
            text = f"{row[name]:.1f}"
            if row["seeds"] >= MIN_SEEDS:
                text += f" [{row[f'{name} low']:.1f}, {row[f'{name} high']:.1f}]"
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---- Figures -------------------------------------------------------------------------


def choose_colors(labels) -> dict:
    """Return a color for each label, from a continuous color map if there are many."""
    labels = list(labels)
    colors = COLORS
    if len(labels) > len(COLORS):
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(labels)))
    return dict(zip(labels, colors))


def add_legend(figure, lines: Dict[str, Line2D]) -> None:
    """Add a legend above the panels, with as many columns as fit."""
    letters = 14 * figure.get_figwidth()  # approximate number in one line
    longest = max(len(label) for label in lines)
    columns = max(1, int(letters // (longest + 8)))
    rows = math.ceil(len(lines) / columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=columns)


def add_style_legend(panel, styles: Dict[str, str]) -> None:
    """Add a legend of the line styles below the panel."""
    for label, style in styles.items():
        panel.plot([], [], style, color="0.3", label=label)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(styles))


def draw(panel, values: pd.DataFrame, color, style: str = "-") -> Line2D:
    """Draw the mean over runs of values [steps, runs] and return its line.

    Add the bootstrap interval, or each run if there are too few for an interval."""
    array = values.to_numpy()
    marker = "." if len(values) <= 30 else ""
    if 1 < values.shape[1] < MIN_SEEDS:
        panel.plot(values.index, array, style, color=color, alpha=0.35, linewidth=0.8)
    (line,) = panel.plot(values.index, mean(array), style, marker=marker, color=color)
    low, high = interval(array, mean)
    panel.fill_between(values.index, low, high, color=color, alpha=0.2, linewidth=0)
    return line


def choose_scale(panel, values: pd.DataFrame) -> None:
    """Use a symmetric logarithmic y-axis if the largest value is an outlier.

    The largest value is then far above the median."""
    sizes = pd.Series(values.abs().to_numpy().ravel())
    if sizes.max() > 100 * max(sizes.median(), 1):
        panel.set_yscale("symlog", linthresh=10)


def name_steps(runs: pd.DataFrame) -> str:
    """Return the label of the x-axis: the unit that the steps of these runs count."""
    online = {"0"}
    offline = {"unset"}
    if "online_iterations" in runs:
        online |= set(runs["online_iterations"])
        offline = set(runs["max_timesteps"])
    if online <= {"0", "unset"}:
        return "gradient updates"
    if offline == {"0"}:
        return "environment steps"
    return "gradient updates, then environment steps"


def save(figure, path: Path) -> None:
    """Write the figure and close it."""
    for panel in figure.axes:
        if panel.get_xlabel() != "cql_alpha":
            panel.xaxis.set_major_locator(
                plt.MaxNLocator(6, steps=[1, 2, 2.5, 4, 5, 10])
            )
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1M
    figure.savefig(path)
    plt.close(figure)


def draw_curves(runs, evaluations, column: str, out: Path, data_score=None) -> None:
    """Write curves.png: a column of the evaluations against the step."""
    figure, panel = plt.subplots(figsize=(7, 3.8))
    colors = choose_colors(runs["group"].unique())
    lines = {}
    for group, table in evaluations.groupby("group", sort=False):
        values = over_runs(table, column)
        n = values.shape[1]
        label = f"{group} ({n} seeds)" if n > 1 else f"{group} (1 seed)"
        lines[label] = draw(panel, values, colors[group])
    if data_score is not None:
        line = panel.axhline(data_score, color="0.4", dashes=(4, 2))
        lines["mean of the dataset"] = line
    panel.set(xlabel=name_steps(runs), ylabel=LABELS[column])
    add_legend(figure, lines)
    save(figure, out / "curves.png")


def draw_drift(runs, metrics, out: Path) -> None:
    """Write drift.png, if there are metrics.

    It shows Q of policy actions, the differences to Q of dataset actions, and the
    conservative gap, against the step."""
    if not has_q(metrics):
        return
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8))
    q, difference, gap = panels
    colors = choose_colors(runs["group"].unique())
    differences = metrics[["policy", "uniform"]].sub(metrics["data"], axis=0)
    metrics = metrics.assign(
        policy_difference=differences["policy"],
        uniform_difference=differences["uniform"],
    )
    lines = {}
    for group, table in metrics.groupby("group", sort=False):
        color = colors[group]
        lines[group] = draw(q, over_runs(table, "policy"), color)
        draw(difference, over_runs(table, "policy_difference"), color)
        draw(difference, over_runs(table, "uniform_difference"), color, "--")
        draw(gap, over_runs(table, "gap"), color)
    choose_scale(q, metrics[["policy"]])
    choose_scale(difference, differences)
    choose_scale(gap, metrics[["gap"]])
    q.set_title("Q of policy actions")
    difference.set_title("Q minus Q of dataset actions")
    gap.set_title("conservative gap, before cql_alpha")
    add_style_legend(difference, {"policy actions": "-", "uniform actions": "--"})
    for panel in panels:
        panel.set_xlabel(name_steps(runs))
    add_legend(figure, lines)
    save(figure, out / "drift.png")


def draw_weights(runs, evaluations, metrics, column: str, out: Path) -> None:
    """Write weights.png, if there are several values of cql_alpha.

    It shows the final score, if there are evaluations, and the final Q of all runs
    against cql_alpha, with one color for each combination of the other flags."""
    alphas = sorted(runs["cql_alpha"].unique())
    if len(alphas) < 2:
        return
    n_panels = 2 if len(evaluations) else 1
    size = (5 * n_panels, 4)
    figure, panels = plt.subplots(1, n_panels, figsize=size, sharex=True, squeeze=False)
    scores, q = panels[0, 0], panels[0, -1]
    colors = choose_colors(runs["others"].unique())
    lines = {}
    if len(evaluations):
        last = evaluations.sort_values("step").groupby("id").tail(3)
        last = last.groupby(["others", "cql_alpha", "id"], as_index=False)[column].mean()
        for others, table in last.groupby("others", sort=False):
            lines[others] = draw_ends(scores, table, alphas, column, colors[others])
        scores.set_title("mean of the last three evaluations")
        scores.set_ylabel(LABELS[column])
    if has_q(metrics):
        last = metrics.dropna(subset="policy").sort_values("step")
        last = last.groupby("id").tail(1)
        for others, table in last.groupby("others", sort=False):
            color = colors[others]
            line = draw_ends(q, table, alphas, "policy", color, "o", -0.1)
            draw_ends(q, table, alphas, "data", color, "s", 0.1)
            lines.setdefault(others, line)
        choose_scale(q, last[["policy", "data"]])
    add_style_legend(q, {"policy actions": "o", "dataset actions": "s"})
    q.set_title("Q at the end")
    for panel in panels[0]:
        names = [f"{alpha:g}" for alpha in alphas]
        panel.set(xlabel="cql_alpha", xticks=range(len(alphas)), xticklabels=names)
    if len(lines) > 1:
        add_legend(figure, lines)
    save(figure, out / "weights.png")


def draw_ends(panel, table, alphas, column, color, marker="o", shift=0.0) -> Line2D:
    """Draw each run as a faint point, and the mean and its interval, for each cql_alpha.

    The means are not connected, because the values are seldom evenly spaced."""
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
        panel.plot(points, values, marker, color=color, ms=3, alpha=0.4)
    errors = np.transpose(errors)
    return panel.errorbar(places, means, errors, fmt=marker, capsize=3, color=color)


# ---- Command line --------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError with one line, without the usage text."""

    def error(self, message: str):
        raise UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """Return the parsed options. Raise UserError for invalid ones."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "directory of a run or of several runs"
    add("directories", nargs="+", type=Path, metavar="DIR", help=text)
    text = "directory of the figures and tables"
    add("--out", type=Path, default=Path("figures"), help=text)
    text = "mean score of the dataset, drawn as a horizontal line"
    add("--data-score", type=float, help=text)
    return parser.parse_args(argv)


def plot(options) -> None:
    """Write the figures and tables, and print the table.

    Raise UserError for runs that cannot be read or shown, and for a directory that
    cannot be written."""
    data_score = options.data_score
    if data_score is not None and not math.isfinite(data_score):
        raise UserError(f"--data-score {data_score}: must be a finite number")
    runs, evaluations, metrics = read_runs(options.directories)
    if not len(evaluations) and not has_q(metrics):
        problem = "no evaluations, and no Q of policy actions in metrics.csv"
        raise UserError(f"{options.directories[0]}: {problem}; nothing can be drawn")
    out = options.out
    try:
        write_files(runs, evaluations, metrics, out, data_score)
    except OSError as error:
        hint = "pass another directory"
        raise UserError(f"--out {out}: cannot be written ({error}); {hint}") from None
    print_files(runs, evaluations, out)


def write_files(runs, evaluations, metrics, out: Path, data_score=None) -> None:
    """Write the figures and tables to the directory out, which is made if needed."""
    out.mkdir(parents=True, exist_ok=True)
    # A file of an earlier command would look like one of these runs.
    for name in (*ABSENT, "table.csv", "table.md"):
        (out / name).unlink(missing_ok=True)
    column = measure(evaluations) if len(evaluations) else None
    with matplotlib.rc_context(STYLE):
        draw_drift(runs, metrics, out)
        draw_weights(runs, evaluations, metrics, column, out)
        if column:
            draw_curves(runs, evaluations, column, out, data_score)
    if column:
        table = tabulate(evaluations, column)
        form = {"float_format": "%.6g", "lineterminator": "\n"}
        table.to_csv(out / "table.csv", index=False, **form)
        (out / "table.md").write_text(markdown(table), "utf-8")


def print_files(runs, evaluations, out: Path) -> None:
    """Print the table, and the reasons for figures that are not drawn."""
    if len(evaluations):
        print((out / "table.md").read_text("utf-8"), end="")
        without = runs[~runs["evaluated"]]["origin"].unique()
        if len(without):
            print(f"not evaluated, so not in the table: {', '.join(without)}")
    drawn = [name for name in ABSENT if (out / name).exists()]
    if len(drawn) < len(ABSENT):
        line = f"drawn: {' and '.join(drawn)}"
        for name, reason in ABSENT.items():
            if name not in drawn:
                line += f"; no {name}: {reason}"
        print(line)
    print(f"figures and tables: {out}")


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status: 0 done, 2 invalid input."""
    matplotlib.use("Agg")
    try:
        plot(parse(argv))
    except UserError as error:
        print("plot.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
