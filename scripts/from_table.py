"""Turn a log (CSV, Parquet or npz) into a Minari dataset, which cql.py reads.

    pip install pandas==3.1.1 pyarrow==26.0.1
    python scripts/from_table.py log.csv --out datasets/mine-v0 \\
        --episode patient_id --time t --observations 'vital_*,age,sex' \\
        --categorical sex --actions dose --rewards r --terminal died
    python cql.py --config_path configs/table.yaml --env datasets/mine-v0

A row is one step: what was observed, the action then taken, and the reward
that followed. What is observed next is in the episode's row below. Below its
last row there is nothing: if the task ended there (--terminal), nothing is
missing and the row counts; if only the log ended there, the last row is the
final observation, and its action and reward are left out.

Columns are named one by one or by a pattern, separated by commas; a pattern
passes over columns that other flags name, or nobody did ("Unnamed: 0"), so
--observations '*' is all the rest. An array [n, k] of an npz file is k columns,
name_0 to name_{k-1}. An action of one column of integers or of names is
discrete, others are a box. In a CSV file's columns of numbers "NA", "nan" and
the like are missing; among names only what is empty is. Messages count rows
from 1, the header left out.

Beside the data, columns.json says how a row becomes an observation. To ask a
trained policy, with cql.py's directory and scripts/ on the path:

    columns = json.loads(Path("datasets/mine-v0/columns.json").read_text())
    observations = from_table.encode(pandas.DataFrame([row]), columns)
    action = cql.load_policy("runs/mine")(observations)[0]
    # named actions: columns["action_values"][action]
"""

import argparse
import difflib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import List, Optional, Tuple

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

try:
    import pandas as pd
    from pandas import DataFrame, Series
except ModuleNotFoundError:  # `main` says so; --help works without
    pd = DataFrame = Series = None


LARGEST = 3e38  # about float32's


class UserError(Exception):
    """The user's input is at fault: one line on stderr, exit status 2."""


@dataclass
class Rows:
    """The log, episode by episode."""

    observations: np.ndarray  # [n, O]
    actions: np.ndarray  # [n, A]; discrete: [n]
    rewards: np.ndarray  # [n]
    ends: np.ndarray  # [n] bool: the last row of its episode
    terminal: np.ndarray  # [n] bool: the task ended after this row

    def known(self) -> np.ndarray:
        """[n] bool: what followed the row is known; the others are left out."""
        return ~self.ends | self.terminal


# ---- The command line ----


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help shows an example)")


def floats(text: str) -> List[float]:
    values = [float(part) for part in text.split(",")]
    if not (np.abs(values) < LARGEST).all():
        raise argparse.ArgumentTypeError(f"{text}: must be finite in float32")
    return values


def read_flags(argv: Optional[List[str]]) -> Namespace:
    """Raises UserError."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("table", type=Path, help=".csv, .csv.gz, .parquet or .npz")
    add("--out", type=Path, required=True, help="directory of the new dataset")
    add("--overwrite", action="store_true", help="replace the dataset that is there")
    episodes = parser.add_mutually_exclusive_group(required=True)
    episodes.add_argument("--episode", help="column that is the same in an episode")
    episodes.add_argument("--done", help="or: column true on each episode's last row")
    add("--time", help="column to sort an episode's rows by; default: as in the file")
    ends = parser.add_mutually_exclusive_group()
    text = "column true on a last row where the task ended; may be --done's"
    ends.add_argument("--terminal", help=text)
    text = "the task ended at the last row of every episode"
    ends.add_argument("--all-terminal", action="store_true", help=text)
    add("--observations", required=True, help="columns that the policy sees")
    add("--actions", required=True, help="one column or, of numbers, several")
    add("--rewards", required=True, help="column of the reward after the action")
    add("--categorical", help="columns to make one-hot; of an action: discrete")
    add("--center", help="columns to subtract the mean of, as of times")
    text = "missing observations become the value in the episode's row above"
    add("--fill", choices=["forward"], help=text)
    text = "an action of one column of integers is a box, not discrete"
    add("--continuous", action="store_true", help=text)
    text = "a number, or one for each column of actions, as in --action-low=-1,0"
    text = f"lower bound: {text}; default: the data's least"
    add("--action-low", type=floats, help=text)
    text = "upper bound, likewise; default: the data's largest"
    add("--action-high", type=floats, help=text)
    flags = parser.parse_args(argv)
    if flags.done and flags.time:
        raise UserError("--time goes with --episode; --done takes the file's order")
    return flags


def unknown_column(name: str, columns: List[str], flag: str) -> UserError:
    near = difflib.get_close_matches(name, columns, 1, 0)
    return UserError(f"--{flag}: no column {name!r} (nearest: {', '.join(near)})")


def choose(columns: List[str], text: str, flag: str, passed_over=()) -> List[str]:
    """The columns that names and patterns stand for, in the order given. Raises
    UserError for one that stands for none."""
    chosen = []
    for pattern in text.split(","):
        pattern = pattern.strip()
        found = [pattern]
        if pattern not in columns:
            rest = [name for name in columns if name not in passed_over]
            found = [name for name in rest if fnmatchcase(name, pattern)]
            # A column without a name, such as the index that pandas writes.
            found = [name for name in found if not name.startswith("Unnamed: ")]
        if not found:
            raise unknown_column(pattern, columns, flag)
        chosen += found
    return list(dict.fromkeys(chosen))


def choose_columns(table: DataFrame, flags: Namespace) -> dict:
    """What columns.json holds, as far as the flags say it. Raises UserError."""
    names = list(table.columns)
    single = []
    for flag in ("episode", "done", "time", "terminal", "rewards"):
        name = getattr(flags, flag)
        if name is not None:
            if name not in names:
                raise unknown_column(name, names, flag)
            single.append(name)
    actions = choose(names, flags.actions, "actions", single)
    observations = choose(names, flags.observations, "observations", single + actions)
    for name in observations:
        if name in (flags.done, flags.terminal, flags.rewards, *actions):
            what = f"{name!r} is the action, or known only after it"
            raise UserError(f"--observations: {what}")
    categorical = []
    centered = []
    if flags.categorical:
        both = observations + actions
        categorical = choose(both, flags.categorical, "categorical")
    if len(actions) == 1 and is_text(table[actions[0]]) and not flags.continuous:
        categorical += actions
    if len(actions) > 1 and set(actions) & set(categorical):
        raise UserError("--actions: of several columns none can be categorical")
    if flags.center:
        numeric = [name for name in observations if name not in categorical]
        centered = choose(numeric, flags.center, "center")
    return {
        "observations": observations,
        "names": [],  # of what they become: a categorical one has one for each value
        "categories": dict.fromkeys(categorical),
        "centers": dict.fromkeys(centered, 0.0),
        "actions": actions,
        "action_values": None,  # of named actions
    }


# ---- Reading and checking ----


def read_npz(path: Path) -> DataFrame:
    """An array [n] as a column, [n, k] as k columns."""
    columns = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name, array in arrays.items():
            if array.ndim == 1:
                columns[name] = array
                continue
            flat = array.reshape(len(array), -1)
            for k in range(flat.shape[1]):
                columns[f"{name}_{k}"] = flat[:, k]
    return DataFrame(columns)


def read_csv(path: Path) -> DataFrame:
    """Among numbers "NA", "nan" and the like are missing; among names they are names,
    and only what is empty is missing. Raises UserError."""
    settings = {"skipinitialspace": True, "low_memory": False}
    table = pd.read_csv(path, **settings)
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{path}: rows have more fields than the header")
    literal = pd.read_csv(path, keep_default_na=False, na_values=[""], **settings)
    for name in table:
        if pd.api.types.is_string_dtype(table[name]):
            table[name] = literal[name]
    return table


def read_table(path: Path) -> DataFrame:
    """The file's rows, indexed from 1. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        if path.name.endswith((".csv", ".csv.gz")):
            table = read_csv(path)
        elif path.name.endswith(".parquet"):
            table = pd.read_parquet(path)
            if not isinstance(table.index, pd.RangeIndex):
                unnamed = set(table.index.names) == {None}
                table = table.reset_index(drop=unnamed)
        elif path.name.endswith(".npz"):
            table = read_npz(path)
        else:
            raise UserError(f"{path}: expected a .csv, .csv.gz, .parquet or .npz file")
    except UserError:
        raise
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install pyarrow==26.0.1") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {str(error)[:200]}") from None
    if len(table) == 0:
        raise UserError(f"{path}: no rows")
    table.columns = table.columns.astype(str)
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def numbers(column: Series) -> np.ndarray:
    return column.to_numpy(float, na_value=np.nan)


def is_number(column: Series) -> bool:
    """Whether it is stored as numbers or truth values."""
    return pd.api.types.is_numeric_dtype(column)


def no_number(column: Series) -> np.ndarray:
    """[n] bool: what keeps a column from being stored as numbers; all of it, if every
    entry could be one."""
    other = pd.to_numeric(column, errors="coerce").isna() & column.notna()
    if not other.any():
        return np.ones(len(column), bool)
    return other.to_numpy()


def is_text(column: Series) -> bool:
    """Whether it holds names, and not numbers with a few words among them."""
    return not is_number(column) and no_number(column).mean() > 0.5


def refuse(column: Series, wrong, what: str) -> None:
    """Raise UserError that names the file's first row where wrong [n] is true."""
    rows = sorted(column.index[np.asarray(wrong, bool)])
    if rows:
        where = f"row {rows[0]}, column {column.name}"
        raise UserError(f"{where}: {column[rows[0]]} {what}; such rows: {len(rows):,}")


def check(
    column: Series,
    categorical: bool = False,
    if_missing: str = "is missing",
    if_text: str = "is no number",
) -> None:
    """Raise UserError for what is missing, and for text, unless it may be."""
    refuse(column, column.isna(), if_missing)
    if is_number(column):
        sizes = np.abs(numbers(column))
        refuse(column, np.isinf(sizes), "is infinite")
        refuse(column, sizes >= LARGEST, "is too large for float32")
    elif not categorical:
        refuse(column, no_number(column), if_text)


def check_observations(table: DataFrame, columns: dict, flags: Namespace) -> None:
    """Raises UserError, with a hint at the flag that helps."""
    if_missing = "is missing (--fill forward takes the value in the row above)"
    if flags.fill:
        if_missing = "is missing, and nothing above it in its episode"
    if_text = "is no number (--categorical makes it one-hot)"
    for name in columns["observations"]:
        check(table[name], name in columns["categories"], if_missing, if_text)


def check_resolution(name: str, values: np.ndarray) -> None:
    """Raise UserError for values [n] that float32 would flatten: cql.py's own rule."""
    std = values.std()
    size = np.abs(values).mean()
    if 1e-3 < std < 1e-5 * size:
        what = f"column {name} is {size:.6g} in size and moves by {std:.3g}"
        hint = f"--center {name} subtracts its mean"
        raise UserError(f"{what}: float32 would lose it; {hint}")


# ---- From rows to episodes ----


def times(column: Series) -> Series:
    """A column of numbers or times, sortable. Raises UserError for other text."""
    if not pd.api.types.is_string_dtype(column):
        return column
    parsed = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    what = "is neither a number nor a time like 2024-12-31 23:59"
    refuse(column, parsed.isna(), what)
    return parsed


def sort_rows(table: DataFrame, flags: Namespace) -> Series:
    """Each row's episode, counted in the order of the file. Rows come episode by
    episode, and the index tells which rows of the file they are. Raises UserError."""
    if flags.episode:
        episode = pd.factorize(table[flags.episode])[0]
    else:
        done = (numbers(table[flags.done]) != 0).astype(int)
        episode = np.cumsum(done) - done  # a row that is done is of what it ends
    keys = DataFrame({"episode": episode}, index=table.index)
    if flags.time:
        keys["time"] = times(table[flags.time])
        again = keys.duplicated()
        refuse(table[flags.time], again, "occurs twice in its episode")
    return keys.sort_values(list(keys), kind="stable")["episode"]


def read_terminal(table: DataFrame, ends: np.ndarray, flags: Namespace) -> np.ndarray:
    """[n] bool: the task ended after this row. Raises UserError if rows follow."""
    if flags.all_terminal:
        return ends
    if not flags.terminal:
        return np.zeros(len(ends), bool)
    terminal = numbers(table[flags.terminal]) != 0
    what = "before the last row of its episode, where alone it may be"
    refuse(table[flags.terminal], terminal & ~ends, what)
    return terminal


def categories_of(column: Series) -> list:
    """Its values in order, as what JSON keeps. Raises UserError for others."""
    values = []
    for value in column.unique():
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, (str, int, float)):
            kind = type(value).__name__
            raise UserError(f"column {column.name}: {value} is a {kind}, no category")
        values.append(value)
    return sorted(values)


def learn_columns(table: DataFrame, columns: dict) -> None:
    """Fill in what the data say: categories, centers, names. Raises UserError."""
    for name in columns["categories"]:
        columns["categories"][name] = categories_of(table[name])
    for name in columns["observations"]:
        if name in columns["categories"]:
            values = columns["categories"][name]
            columns["names"] += [f"{name}={value}" for value in values]
            continue
        values = numbers(table[name])
        if name in columns["centers"]:
            columns["centers"][name] = float(values.mean())
        check_resolution(name, values - columns["centers"].get(name, 0.0))
        columns["names"].append(name)
    action = columns["actions"][0]
    columns["action_values"] = columns["categories"].pop(action, None)


def encode(table: DataFrame, columns: dict) -> np.ndarray:
    """Observations [n, O] of a table's rows, as columns.json describes them. Raises
    UserError for a category that is not in it."""
    parts = []
    for name in columns["observations"]:
        if name in columns["categories"]:
            known = columns["categories"][name]
            unknown = table[name][~table[name].isin(known)]
            if len(unknown):
                what = f"is none of its {len(known):,} categories"
                raise UserError(f"column {name}: {unknown.iloc[0]} {what}")
            for value in known:
                parts.append((table[name] == value).to_numpy(float))
        else:
            parts.append(numbers(table[name]) - columns["centers"].get(name, 0.0))
    return np.stack(parts, axis=1).astype(np.float32)


def bounds(
    actions: np.ndarray, table: DataFrame, names: List[str], flags: Namespace
) -> Tuple[np.ndarray, np.ndarray]:
    """The least and the largest of each column of actions [n, A], as given or as in
    the data. Raises UserError."""
    low = flags.action_low or actions.min(axis=0)
    high = flags.action_high or actions.max(axis=0)
    for flag, given in ("--action-low", low), ("--action-high", high):
        if len(given) not in (1, len(names)):
            raise UserError(f"{flag}: expected one number or {len(names)}")
    kind = np.result_type(actions, np.float32)  # float32 would blur large integers
    low = np.broadcast_to(low, len(names)).astype(kind)
    high = np.broadcast_to(high, len(names)).astype(kind)
    for k, name in enumerate(names):
        outside = (actions[:, k] < low[k]) | (actions[:, k] > high[k])
        refuse(table[name], outside, f"is outside {low[k]:g} to {high[k]:g}")
        if not low[k] < high[k]:
            raise UserError(f"--actions: {name} is the same in every row: no choice")
    return low, high


def read_actions(
    table: DataFrame, columns: dict, flags: Namespace
) -> Tuple[np.ndarray, gym.Space]:
    """Actions, [n] integers or [n, A], and their space. Raises UserError."""
    names = columns["actions"]
    single = table[names[0]]
    discrete = len(names) == 1 and single.dtype.kind in "iub" and not flags.continuous
    if columns["action_values"] is not None:
        if flags.action_low or flags.action_high:
            raise UserError("--action-low, --action-high: not for categorical actions")
        numbered = {value: i for i, value in enumerate(columns["action_values"])}
        table = DataFrame({names[0]: single.astype(object).map(numbered)})
        discrete = True
    actions = np.stack([numbers(table[name]) for name in names], axis=1)
    if not discrete:
        actions = actions.astype(np.float32)
        low, high = bounds(actions, table, names, flags)
        return actions, gym.spaces.Box(low, high)
    actions = actions.astype(int)
    low, high = bounds(actions, table, names, flags)
    start = int(np.ceil(low[0]))
    n = int(np.floor(high[0])) - start + 1
    if n > 100_000:
        hint = f"--categorical {names[0]} takes those alone that occur"
        raise UserError(f"--actions: {names[0]} spans {n:,} integers; {hint}")
    return actions[:, 0], gym.spaces.Discrete(n, start=start)


def read_rows(flags: Namespace) -> Tuple[Rows, gym.Space, dict]:
    """Rows, the space of their actions, and columns.json. Raises UserError."""
    table = read_table(flags.table)
    columns = choose_columns(table, flags)
    observed = columns["observations"]
    categories = columns["categories"]
    if flags.episode:
        check(table[flags.episode], categorical=True)
    if flags.time:
        check(table[flags.time], categorical=is_text(table[flags.time]))
    for name in (*columns["actions"], flags.rewards, flags.terminal, flags.done):
        if name:
            check(table[name], name in categories)
    episode = sort_rows(table, flags)
    table = table.loc[episode.index].copy()
    n_missing = int(table[observed].isna().sum().sum())
    if flags.fill:
        table[observed] = table[observed].groupby(episode).ffill()
    check_observations(table, columns, flags)
    learn_columns(table, columns)
    ends = np.append(np.diff(episode) != 0, True)
    actions, space = read_actions(table, columns, flags)
    rows = Rows(
        observations=encode(table, columns),
        actions=actions,
        rewards=numbers(table[flags.rewards]),
        ends=ends,
        terminal=read_terminal(table, ends, flags),
    )
    print(f"{flags.table}: {len(table):,} rows, {ends.sum():,} episodes", end="")
    print(f"; {n_missing:,} missing observations filled" if n_missing else "")
    return rows, space, columns


def cut(rows: Rows) -> List[EpisodeBuffer]:
    """Episodes of one more observation than actions: after a terminal row, which
    nothing follows, its own; else that of the last row. One without an action goes."""
    episodes = []
    first = 0
    for last in np.flatnonzero(rows.ends).tolist():
        terminal = rows.terminal[last]
        stop = last + 1 if terminal else last
        if stop > first:
            truncations = np.zeros(stop - first, bool)
            truncations[-1] = not terminal
            observations = rows.observations[first:stop]
            final = rows.observations[last : last + 1]
            episode = EpisodeBuffer(
                observations=np.concatenate([observations, final]),
                actions=rows.actions[first:stop],
                rewards=rows.rewards[first:stop],
                terminations=rows.terminal[first:stop],
                truncations=truncations,
            )
            episodes.append(episode)
        first = last + 1
    return episodes


def check_space(directory: Path, episodes: List[EpisodeBuffer]) -> None:
    """Raise OSError where they may not fit: HDF5 ends badly on a full disk."""
    n_bytes = sum(len(pickle.dumps(episode)) for episode in episodes)
    needed = 2 * n_bytes + 20_000 * len(episodes)
    free = shutil.disk_usage(directory).free
    if free < needed:
        sizes = f"{free / 1e6:,.2f} MB free, {needed / 1e6:,.2f} MB may be needed"
        raise OSError(f"{directory}: {sizes}")


def write(
    out: Path, episodes: List[EpisodeBuffer], space: gym.Space, columns: dict
) -> None:
    """Make the dataset's data/ and columns.json, both of them before either replaces an
    old one; what else is in the directory stays. Raises OSError."""
    name = re.sub(r"[^-\w]", "_", out.name)  # what Minari takes for an id
    if not re.search(r"-v\d+$", name):
        name += "-v0"
    n = len(columns["names"])
    out = out.absolute()  # Minari mistakes relative paths
    out.parent.mkdir(parents=True, exist_ok=True)
    check_space(out.parent, episodes)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".from_table-") as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        storage = MinariStorage.new(
            new / "data",
            observation_space=gym.spaces.Box(-np.inf, np.inf, (n,)),
            action_space=space,
        )
        version = minari.__version__
        storage.update_metadata({"dataset_id": name, "minari_version": version})
        try:
            storage.update_episodes(episodes)
        except (RuntimeError, ValueError) as error:  # h5py's, of a failing disk
            raise OSError(str(error)) from None
        (new / "columns.json").write_text(json.dumps(columns, indent=2) + "\n")
        out.mkdir(exist_ok=True)
        for part in ("data", "columns.json"):
            if (out / part).exists():
                os.replace(out / part, Path(temporary, part))
            os.replace(new / part, out / part)


# ---- What was read ----


def describe_columns(rows: Rows, space: gym.Space, columns: dict, reward: str) -> None:
    """A line for each column and each discrete action, for the user to recognize."""
    known = rows.known()
    names = columns["actions"]
    actions = rows.actions[known]
    discrete = isinstance(space, gym.spaces.Discrete)
    table = DataFrame(rows.observations[known], columns=columns["names"])
    if not discrete:
        table[[f"action {name}" for name in names]] = actions
    table[f"reward {reward}"] = rows.rewards[known]
    shown = ["mean", "std", "min", "1%", "99%", "max"]
    summary = table.describe(percentiles=[0.01, 0.99]).T[shown]
    print(summary.to_string(max_rows=24, float_format="{:.4g}".format))
    for name, center in columns["centers"].items():
        print(f"{name} is less its mean, {center!r}")
    if discrete:
        counts = Series(actions).value_counts()
        print(f"action {names[0]}: {space.n:,} discrete, {len(counts):,} of them occur:")
        values = columns["action_values"]
        if values is not None:
            counts.index = [f"{i} ({values[i]})" for i in counts.index]
        print(counts.to_string(max_rows=10))


def describe_episodes(rows: Rows, episodes: List[EpisodeBuffer]) -> None:
    """What became of the rows, and what of them is left out."""
    n = len(episodes)
    n_terminal = int(rows.terminal.sum())
    lengths = [len(each.rewards) for each in episodes]
    returns = [each.rewards.sum() for each in episodes]
    print(f"{sum(lengths):,} steps in {n:,} episodes, {min(lengths)} to", end=" ")
    print(f"{max(lengths)} long, median {np.median(lengths):g}", end="; ")
    print(f"mean return {np.mean(returns):.4g}")
    print(f"  {n_terminal:,} ended (terminal); {n - n_terminal:,} only stop", end=" ")
    print("(truncated: they bootstrap)")
    left_out = ~rows.known()
    if left_out.any():
        n_rewarded = np.count_nonzero(rows.rewards[left_out])
        n_dropped = int(rows.ends.sum()) - n
        print(
            f"left out: {left_out.sum():,} last rows of episodes that only stop", end=""
        )
        print(f" ({n_dropped:,} had no other),")
        print(f"  {n_rewarded:,} of them with a reward; where the task did end there,")
        print("  say so by --terminal or --all-terminal")


def convert(flags: Namespace) -> None:
    """Read, write, describe. Raises UserError before anything is written."""
    if flags.out.exists():
        if not (flags.out / "data" / "metadata.json").exists():
            raise UserError(f"--out {flags.out}: exists, and is no dataset")
        if not flags.overwrite:
            raise UserError(f"--out {flags.out}: exists; --overwrite replaces it")
    rows, space, columns = read_rows(flags)
    episodes = cut(rows)
    if not episodes:
        raise UserError(f"{flags.table}: no step of which it is known what followed")
    write(flags.out, episodes, space, columns)
    describe_columns(rows, space, columns, flags.rewards)
    describe_episodes(rows, episodes)
    print(f"wrote {flags.out}; columns.json in it says how rows become observations")
    print(f"next: python cql.py --config_path configs/table.yaml --env {flags.out}")


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status (0, 1 or 2)."""
    try:
        flags = read_flags(argv)
        if pd is None:
            raise UserError("needs pandas: pip install pandas==3.1.1 pyarrow==26.0.1")
        convert(flags)
    except UserError as error:
        print("from_table.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print("from_table.py: failed:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
