"""Convert a log (CSV, Parquet or npz) to a Minari dataset that cql.py can read.

    pip install pandas==3.1.1 pyarrow==26.0.1
    python scripts/from_table.py log.csv --out datasets/mine-v0 \\
        --episode patient_id --time t --observations 'vital_*,age,sex' \\
        --categorical sex --actions dose --rewards r --terminal died
    python cql.py --config_path configs/table.yaml --env datasets/mine-v0

A row is one step: the observation, the action taken then, and the reward that
followed. The next observation is in the next row of the episode. The last row
of an episode has no next row. If the task ended there (--terminal), the row is
a transition like the others. If only the log ended there, the row is the final
observation, and its action and reward are dropped.

Flags take column names or patterns, separated by commas. A pattern skips the
columns that other flags name and columns without a name ("Unnamed: 0"), so
--observations '*' selects all the others. An array [n, k] of an npz file
becomes k columns, name_0 to name_{k-1}; arrays that no flag selects are not
read. A single action column of integers or of text is discrete; other actions
are a box. Columns of decimals, of a partitioned Parquet file and of pandas'
Categorical type have the type of their values. In the numeric columns of a CSV
file, "NA", "nan" and similar words are missing values; in text columns only an
empty cell is. Messages count rows from 1, without the header.

The file columns.json beside the data describes the encoding of observations. To
query a trained policy, with cql.py's directory and scripts/ on the path:

    columns = json.loads(Path("datasets/mine-v0/columns.json").read_text())
    observations = from_table.encode(pandas.DataFrame([row]), columns)
    action = cql.load_policy("runs/mine")(observations)[0]
    # for text actions: columns["action_values"][action]
"""

import argparse
import difflib
import json
import math
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
except ModuleNotFoundError:  # `main` reports it, so that --help works without pandas
    pd = DataFrame = Series = None


LARGEST = 3e38  # close to the largest float32


class UserError(Exception):
    """Error in the user's input, reported in one line on stderr with exit status 2."""


@dataclass
class Rows:
    """The n rows of the log, sorted by episode."""

    observations: np.ndarray  # [n, O]
    actions: np.ndarray  # [n, A]; discrete: [n]
    rewards: np.ndarray  # [n]
    ends: np.ndarray  # [n] bool: the last row of its episode
    terminal: np.ndarray  # [n] bool: the task ended after this row

    def known(self) -> np.ndarray:
        """Return a mask [n] of the rows that are transitions.

        Their next observation is known, or the task ended. The other rows only hold a
        final observation."""
        return ~self.ends | self.terminal


# ---- The command line ----


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError with one line, without the usage text."""

    def error(self, message):
        raise UserError(f"{message} (see --help for an example)")


def floats(text: str) -> List[float]:
    """Parse numbers separated by commas.

    Raises ArgumentTypeError unless they are finite in float32."""
    values = [float(part) for part in text.split(",")]
    if not (np.abs(values) < LARGEST).all():
        raise argparse.ArgumentTypeError(f"{text}: must be finite in float32")
    return values


def read_flags(argv: Optional[List[str]]) -> Namespace:
    """Return the parsed command line. Raise UserError for invalid flags."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    text = ".csv, .csv.gz, .parquet or .npz, or a directory of Parquet files"
    add("table", type=Path, help=text)
    add("--out", type=Path, required=True, help="directory of the new dataset")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    episodes = parser.add_mutually_exclusive_group(required=True)
    episodes.add_argument("--episode", help="column that identifies the episode")
    text = "alternative to --episode: column that is true on each episode's last row"
    episodes.add_argument("--done", help=text)
    add("--time", help="column that sorts an episode's rows; default: file order")
    ends = parser.add_mutually_exclusive_group()
    text = "column that is true on a last row where the task ended; --done's is allowed"
    ends.add_argument("--terminal", help=text)
    text = "the task ended at the last row of every episode"
    ends.add_argument("--all-terminal", action="store_true", help=text)
    add("--observations", required=True, help="columns that the policy observes")
    add("--actions", required=True, help="one column, or several numeric columns")
    add("--rewards", required=True, help="column of the reward after the action")
    text = "observation columns to encode one-hot; an action column to make discrete"
    add("--categorical", help=text)
    text = "columns whose mean is subtracted, for example timestamps"
    add("--center", help=text)
    text = "fill a missing observation with the value in the episode's previous row"
    add("--fill", choices=["forward"], help=text)
    text = "a single action column of integers is a box instead of discrete"
    add("--continuous", action="store_true", help=text)
    text = "one number, or one for each action column, for example --action-low=-1,0"
    text = f"lower bound of the actions: {text}; default: the data's minimum"
    add("--action-low", type=floats, help=text)
    text = "upper bound of the actions, in the same form; default: the data's maximum"
    add("--action-high", type=floats, help=text)
    flags = parser.parse_args(argv)
    if flags.done and flags.time:
        problem = "cannot be combined with --done, which uses the file's order"
        raise UserError(f"--time: {problem}; pass --episode instead of --done")
    return flags


def unknown_column(name: str, columns: List[str], flag: str) -> UserError:
    """Make the error for a name or pattern that matches no column.

    columns are those that the flag may select."""
    expected = "column"
    if flag == "center":
        expected = "numeric column of --observations"
    elif flag == "categorical":
        expected = "column of --observations or --actions"
    hint = ""
    lowered = {column.lower(): column for column in columns}
    near = difflib.get_close_matches(name.lower(), lowered, 1, 0)
    if near:
        hint = f"; did you mean {lowered[near[0]]!r}?"
    return UserError(f"--{flag}: no {expected} matches {name!r}{hint}")


def choose(columns: List[str], text: str, flag: str, skipped=()) -> List[str]:
    """Return the columns that the names and patterns in text select, in order.

    Patterns do not match skipped columns. Raise UserError if one of them selects
    nothing."""
    chosen = []
    for pattern in text.split(","):
        pattern = pattern.strip()
        found = [pattern]
        if pattern not in columns:
            rest = [name for name in columns if name not in skipped]
            found = [name for name in rest if fnmatchcase(name, pattern)]
            # pandas gives this name to a column without one, such as a saved index.
            found = [name for name in found if not name.startswith("Unnamed: ")]
        if not found:
            raise unknown_column(pattern, columns, flag)
        chosen += found
    return list(dict.fromkeys(chosen))


def choose_columns(names: List[str], flags: Namespace) -> dict:
    """Return the content of columns.json as far as the flags determine it.

    names are those of the table's columns. learn_columns adds the rest. Raise UserError
    for unknown or conflicting columns."""
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
            problem = "is an action, or known only after the action"
            raise UserError(f"--observations: {name!r} {problem}; leave it out")
    categorical = []
    centered = []
    if flags.categorical:
        both = observations + actions
        categorical = choose(both, flags.categorical, "categorical")
    if len(actions) > 1 and set(actions) & set(categorical):
        problem = "a categorical action needs a single column"
        raise UserError(f"--actions: {len(actions)} columns, but {problem}; pass one")
    if flags.center:
        numeric = [name for name in observations if name not in categorical]
        centered = choose(numeric, flags.center, "center")
    return {
        "observations": observations,
        "names": [],  # of the encoded observation; one for each value of a category
        "categories": dict.fromkeys(categorical),
        "centers": dict.fromkeys(centered, 0.0),
        "actions": actions,
        "action_values": None,  # of categorical actions, in the order of their numbers
    }


def selected(columns: dict, flags: Namespace) -> List[str]:
    """Return the names of all columns that the flags select."""
    single = (flags.episode, flags.done, flags.time, flags.terminal, flags.rewards)
    names = [*columns["observations"], *columns["actions"], *single]
    return [name for name in dict.fromkeys(names) if name is not None]


# ---- Reading and checking ----


def read_header(arrays: np.lib.npyio.NpzFile, name: str) -> Tuple[tuple, np.dtype]:
    """Return the shape and type of an array of an npz file without reading its data."""
    with arrays.zip.open(f"{name}.npy") as file:
        if np.lib.format.read_magic(file) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    return shape, dtype


def check_array(name: str, shape: tuple, dtype: np.dtype) -> None:
    """Raise UserError if an array does not hold numbers or text for each row."""
    if dtype.names:
        found = "is structured"
        hint = "save each of its fields as an array"
    elif dtype.hasobject:
        found = "holds Python objects, for example one array for each episode"
        hint = "concatenate the episodes, and save each row's episode in another array"
    elif not shape:
        found = "is a single value"
        hint = "name the arrays to use, or save one value for each step"
    else:
        return
    expected = "expected numbers or text, with one row for each step"
    raise UserError(f"array {name} {found}; {expected}; {hint}")


def column_names(name: str, shape: tuple) -> List[str]:
    """Return the names of the columns that an array of an npz file becomes."""
    if len(shape) < 2:
        return [name]
    return [f"{name}_{k}" for k in range(math.prod(shape[1:]))]


def read_npz(path: Path, flags: Namespace) -> DataFrame:
    """Read the arrays of an npz file that the flags select.

    An array [n] becomes one column, an array [n, k] k columns. Raise UserError for an
    array that cannot be columns, and for arrays of different lengths."""
    table = {}
    lengths = {}
    with np.load(path, allow_pickle=False) as arrays:
        headers = {name: read_header(arrays, name) for name in arrays.files}
        names = []
        for name, (shape, _) in headers.items():
            names += column_names(name, shape)
        used = selected(choose_columns(names, flags), flags)
        for name, (shape, dtype) in headers.items():
            columns = column_names(name, shape)
            if set(columns).isdisjoint(used):
                continue
            check_array(name, shape, dtype)
            # pandas only supports the native byte order.
            array = arrays[name].astype(dtype.newbyteorder("="), copy=False)
            lengths[name] = len(array)
            table.update(zip(columns, array.reshape(len(array), len(columns)).T))
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {n:,} rows" for name, n in lengths.items())
        problem = "expected one row for each step in all of them"
        raise UserError(f"{path}: {found}; {problem}; save arrays of the same length")
    return DataFrame(table)


def read_csv(path: Path) -> DataFrame:
    """Read a CSV file.

    The words "NA", "nan" and similar ones are missing values in a numeric column, but
    text in a text column. Raise UserError for a header that is too short or names a
    column twice, and for another separator."""
    settings = {"skipinitialspace": True, "low_memory": False}
    header = pd.read_csv(path, header=None, nrows=1, dtype=str, **settings).iloc[0]
    if len(header) == 1:
        for separator in (";", "\t"):
            if separator in str(header[0]):
                problem = f"columns are separated by {separator!r}, but a comma is"
                raise UserError(f"{path}: {problem} expected; convert the file")
    twice = header[header.duplicated() & header.notna()]
    if len(twice):
        problem = f"two columns are named {twice.iloc[0]!r}"
        raise UserError(f"{path}: {problem}; rename one of them")
    table = pd.read_csv(path, **settings)
    if not isinstance(table.index, pd.RangeIndex):
        problem = "rows have more fields than the header"
        raise UserError(f"{path}: {problem}; name every column")
    literal = pd.read_csv(path, keep_default_na=False, na_values=[""], **settings)
    for name in table:
        if pd.api.types.is_string_dtype(table[name]):
            table[name] = literal[name]
    return table


def read_table(flags: Namespace) -> DataFrame:
    """Return the rows of the file, indexed from 1.

    Raise UserError if the file is missing, empty, unreadable or of another type."""
    path = flags.table
    name = path.name.lower()
    if not path.exists():
        raise UserError(f"{path}: no such file")
    try:
        if name.endswith((".csv", ".csv.gz")):
            table = read_csv(path)
        elif name.endswith(".parquet") or any(path.rglob("*.parquet")):
            table = pd.read_parquet(path)
            if not isinstance(table.index, pd.RangeIndex):
                unnamed = set(table.index.names) == {None}
                table = table.reset_index(drop=unnamed)
        elif name.endswith(".npz"):
            table = read_npz(path, flags)
        else:
            expected = "expected a .csv, .csv.gz, .parquet or .npz file, or a directory"
            raise UserError(f"{path}: {expected} of Parquet files")
    except UserError:
        raise
    except ImportError:
        install = "pip install pyarrow==26.0.1"
        raise UserError(f"{path}: reading Parquet needs pyarrow: {install}") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read: {str(error)[:200]}") from None
    if len(table) == 0:
        raise UserError(f"{path}: no rows; expected one row for each step")
    table.columns = table.columns.astype(str)
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def by_value(column: Series) -> Series:
    """Return a column with the type of its values, whatever type stores them.

    Categoricals, decimals and Python objects become numbers or text. Decimals that are
    stored without a fraction become integers. Raise UserError for a column of lists."""
    if column.dtype.kind != "O":  # a type of numbers or times
        return column
    values = column.astype(object)
    kind = pd.api.types.infer_dtype(values)
    if kind == "decimal":
        exponents = values.dropna().map(lambda value: value.as_tuple().exponent)
        if exponents.min() >= 0:
            values = values.map(int, na_action="ignore")
    if kind in ("boolean", "integer", "floating", "mixed-integer-float", "decimal"):
        return pd.to_numeric(values)
    if kind == "bytes":
        values = values.str.decode("utf-8", errors="backslashreplace")
    elif kind == "mixed" and values.map(pd.api.types.is_list_like).any():
        problem = "holds lists; expected a number or text in each row"
        hint = "save one column for each element"
        raise UserError(f"column {column.name} {problem}; {hint}")
    return values.infer_objects()


def numbers(column: Series) -> np.ndarray:
    """Return a column as float64 [n], with NaN for missing values."""
    return column.to_numpy(float, na_value=np.nan)


def is_numeric(column: Series) -> bool:
    """Return whether a column is stored as numbers or booleans."""
    return column.dtype.kind in "iufb"


def not_numeric(column: Series) -> np.ndarray:
    """Return a mask [n] of the entries that keep a column from being numeric.

    If every entry could be a number, all entries are in the mask."""
    other = pd.to_numeric(column, errors="coerce").isna() & column.notna()
    if not other.any():
        return np.ones(len(column), bool)
    return other.to_numpy()


def decimal_commas(column: Series) -> np.ndarray:
    """Return a mask [n] of the entries that are numbers with a decimal comma."""
    return column.astype(str).str.fullmatch(r"\s*[-+]?\d+,\d+\s*").to_numpy()


def is_text(column: Series) -> bool:
    """Return whether a column holds mostly text.

    A few words in a column of numbers are mistakes to report, not text; so are numbers
    with a decimal comma."""
    if is_numeric(column) or decimal_commas(column).mean() > 0.5:
        return False
    return not_numeric(column).mean() > 0.5


def refuse(column: Series, wrong, problem: str) -> None:
    """Raise UserError if the mask wrong [n] is true anywhere.

    The message names the first such row of the file and the number of such rows."""
    rows = sorted(column.index[np.asarray(wrong, bool)])
    if rows:
        where = f"row {rows[0]}, column {column.name}"
        found = f"{column[rows[0]]} {problem}"
        raise UserError(f"{where}: {found}; rows affected: {len(rows):,}")


def check(
    column: Series,
    categorical: bool = False,
    if_missing: str = "is a missing value; complete the column",
    if_text: str = "is not a number; make the column numeric",
) -> None:
    """Raise UserError if a column has values that cannot be used.

    These are missing and infinite values, and text if the column is not categorical.
    if_missing and if_text are the messages."""
    refuse(column, column.isna(), if_missing)
    if is_numeric(column):
        sizes = np.abs(numbers(column))
        refuse(column, np.isinf(sizes), "is infinite; replace it by a finite number")
        refuse(column, sizes >= LARGEST, "is too large for float32; scale the column")
    elif not categorical:
        problem = "has a decimal comma; expected a point; convert the column"
        refuse(column, decimal_commas(column), problem)
        refuse(column, not_numeric(column), if_text)


def check_observations(table: DataFrame, columns: dict, flags: Namespace) -> None:
    """Raise UserError for missing, infinite or text values in observation columns.

    The message names the flag that helps."""
    if_missing = "is a missing value; --fill forward uses the value in the previous row"
    if flags.fill:
        if_missing = "is a missing value, and no earlier row of its episode has one"
        if_missing += " to fill it with; complete the column"
    if_text = "is not a number; pass --categorical to encode the column one-hot"
    for name in columns["observations"]:
        check(table[name], name in columns["categories"], if_missing, if_text)


def check_resolution(name: str, values: np.ndarray) -> None:
    """Raise UserError if float32 cannot resolve the variation of values [n].

    The rule is the same as in cql.py."""
    std = values.std()
    size = np.abs(values).mean()
    if 1e-3 < std < 1e-5 * size:
        found = f"mean size {size:.6g} and standard deviation {std:.3g}"
        problem = "float32 cannot resolve the differences"
        hint = f"pass --center {name} to subtract the mean"
        raise UserError(f"column {name}: {found}, so {problem}; {hint}")


# ---- From rows to episodes ----


def times(column: Series) -> Series:
    """Return a column of numbers or ISO 8601 times in a sortable form.

    Numbers stored as text are sorted as numbers. Raise UserError for other text."""
    if not pd.api.types.is_string_dtype(column):
        return column
    parsed = pd.to_numeric(column, errors="coerce")
    if parsed.notna().all():
        return parsed
    parsed = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    problem = "is neither a number nor a time; expected a form like 2024-12-31 23:59"
    refuse(column, parsed.isna(), problem)
    return parsed


def sort_rows(table: DataFrame, flags: Namespace) -> Series:
    """Sort the rows by episode and time, and return the episode of each row.

    Episodes are numbered in the order of the file. The index of the result holds the
    rows' numbers in the file. Raise UserError for a time that occurs twice."""
    if flags.episode:
        episode = pd.factorize(table[flags.episode])[0]
    else:
        done = (numbers(table[flags.done]) != 0).astype(int)
        episode = np.cumsum(done) - done  # a done row belongs to the episode it ends
    keys = DataFrame({"episode": episode}, index=table.index)
    if flags.time:
        keys["time"] = times(table[flags.time])
        repeated = keys.duplicated()
        problem = "occurs twice in its episode; times must differ, and two episodes "
        problem += "need two ids"
        refuse(table[flags.time], repeated, problem)
    return keys.sort_values(list(keys), kind="stable")["episode"]


def read_terminal(table: DataFrame, ends: np.ndarray, flags: Namespace) -> np.ndarray:
    """Return a mask [n] of the rows after which the task ended.

    Raise UserError for a row that is not the last one of its episode."""
    if flags.all_terminal:
        return ends
    if not flags.terminal:
        return np.zeros(len(ends), bool)
    terminal = numbers(table[flags.terminal]) != 0
    problem = "marks an end before the last row of its episode; check --episode"
    refuse(table[flags.terminal], terminal & ~ends, problem)
    return terminal


def categories_of(column: Series) -> list:
    """Return the sorted distinct values of a column.

    Raise UserError for a value that is neither text nor a number, because JSON could
    not store it."""
    values = []
    for value in column.unique():
        if isinstance(value, np.generic):
            value = value.item()
        if not isinstance(value, (str, int, float)):
            found = f"{value} has the type {type(value).__name__}"
            problem = "a category must be text or a number; convert the column"
            raise UserError(f"column {column.name}: {found}; {problem}")
        values.append(value)
    return sorted(values)


def learn_columns(table: DataFrame, columns: dict) -> None:
    """Add the categories, centers and names that the data determine to columns.

    Raise UserError for values that cannot be encoded."""
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
    """Encode the rows of a table as observations, float32 [n, O].

    The argument columns is the content of columns.json. Raise UserError for an
    unknown category."""
    parts = []
    for name in columns["observations"]:
        column = by_value(table[name])
        if name in columns["categories"]:
            known = columns["categories"][name]
            unknown = column[~column.isin(known)]
            if len(unknown):
                problem = f"is not one of the {len(known):,} categories in columns.json"
                raise UserError(f"column {name}: {unknown.iloc[0]} {problem}")
            for value in known:
                parts.append((column == value).to_numpy(float))
        else:
            parts.append(numbers(column) - columns["centers"].get(name, 0.0))
    return np.stack(parts, axis=1).astype(np.float32)


def bounds(
    actions: np.ndarray, table: DataFrame, names: List[str], flags: Namespace
) -> Tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper bounds [A] of actions [n, A].

    They come from the flags, otherwise from the data. Raise UserError if they do not
    fit the actions."""
    low = flags.action_low or actions.min(axis=0)
    high = flags.action_high or actions.max(axis=0)
    for flag, given in ("--action-low", low), ("--action-high", high):
        if len(given) not in (1, len(names)):
            expected = "one number"
            if len(names) > 1:
                expected += f", or one for each of the {len(names)} action columns"
            raise UserError(f"{flag}: {len(given)} numbers; pass {expected}")
    kind = np.result_type(actions, np.float32)  # float32 cannot hold large integers
    low = np.broadcast_to(low, len(names)).astype(kind)
    high = np.broadcast_to(high, len(names)).astype(kind)
    for k, name in enumerate(names):
        outside = (actions[:, k] < low[k]) | (actions[:, k] > high[k])
        problem = f"is outside [{low[k]:g}, {high[k]:g}]"
        hint = "change --action-low or --action-high"
        refuse(table[name], outside, f"{problem}; {hint}")
        if not low[k] < high[k]:
            problem = f"{name} is the same in every row, so there is no choice to learn"
            raise UserError(f"--actions: {problem}; pass another column")
    return low, high


def read_actions(
    table: DataFrame, columns: dict, flags: Namespace
) -> Tuple[np.ndarray, gym.Space]:
    """Return the actions and their space.

    They are integers [n] of a Discrete, or float32 [n, A] of a Box. Raise UserError
    for actions that fit neither."""
    names = columns["actions"]
    single = table[names[0]]
    discrete = len(names) == 1 and single.dtype.kind in "iub" and not flags.continuous
    if columns["action_values"] is not None:
        if flags.action_low or flags.action_high:
            problem = "categorical actions have no bounds; leave these flags out"
            raise UserError(f"--action-low, --action-high: {problem}")
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
        hint = f"pass --categorical {names[0]} to use only those in the data"
        raise UserError(f"--actions: {names[0]} spans {n:,} integers; {hint}")
    return actions[:, 0], gym.spaces.Discrete(n, start=start)


def read_rows(flags: Namespace) -> Tuple[Rows, gym.Space, dict]:
    """Read the table.

    Return its rows, the action space and the content of columns.json. Raise UserError
    for invalid data."""
    table = read_table(flags)
    columns = choose_columns(list(table.columns), flags)
    used = selected(columns, flags)
    table = DataFrame({name: by_value(table[name]) for name in used})
    observed = columns["observations"]
    categories = columns["categories"]
    action = columns["actions"][0]
    if len(columns["actions"]) == 1 and is_text(table[action]) and not flags.continuous:
        categories[action] = None
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
    if not flags.time:
        print_split(episode)
    return rows, space, columns


def split_episodes(rows: Rows) -> List[EpisodeBuffer]:
    """Split the rows into episodes of T actions and T + 1 observations.

    A terminal row has no next observation, so its own observation is repeated. Without
    a terminal row, the last row only gives the final observation. An episode without
    an action is dropped."""
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
    """Raise OSError if the disk may be too small for the episodes.

    The check comes before writing because HDF5 does not fail cleanly on a full disk."""
    n_bytes = sum(len(pickle.dumps(episode)) for episode in episodes)
    needed = 2 * n_bytes + 20_000 * len(episodes)
    free = shutil.disk_usage(directory).free
    if free < needed:
        sizes = f"{free / 1e6:,.2f} MB free, up to {needed / 1e6:,.2f} MB needed"
        raise OSError(f"{directory}: {sizes}; free some disk space")


def write(
    out: Path, episodes: List[EpisodeBuffer], space: gym.Space, columns: dict
) -> None:
    """Write data/ and columns.json of the dataset into out.

    Both are complete before they replace existing ones. Other files in the directory
    stay. Raises OSError if the disk fails."""
    name = re.sub(r"[^-\w]", "_", out.name)  # Minari allows no other characters
    if not re.search(r"-v\d+$", name):
        name += "-v0"
    n = len(columns["names"])
    out = out.absolute()  # Minari does not handle relative paths correctly
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
        except (RuntimeError, ValueError) as error:  # from h5py if the disk fails
            raise OSError(str(error)) from None
        (new / "columns.json").write_text(json.dumps(columns, indent=2) + "\n")
        out.mkdir(exist_ok=True)
        for part in ("data", "columns.json"):
            if (out / part).exists():
                os.replace(out / part, Path(temporary, part))
            os.replace(new / part, out / part)


# ---- Summary ----


def print_split(episode: Series) -> None:
    """Print the number of episodes whose rows are not contiguous in the file.

    The argument is the result of sort_rows."""
    in_file = episode.sort_index()
    starts = in_file[in_file.diff() != 0]  # the first row of each contiguous part
    n_split = starts[starts.duplicated()].nunique()
    if n_split:
        print(f"rows of {n_split:,} ids are not contiguous in the file;", end=" ")
        print("each id is one episode in file order;", end=" ")
        print("if that is wrong, pass --time or make the ids unique")


def print_columns(rows: Rows, space: gym.Space, columns: dict, flags: Namespace) -> None:
    """Print statistics of each column and the counts of discrete actions.

    The user can thus check how the table was read."""
    known = rows.known()
    names = columns["actions"]
    actions = rows.actions[known]
    discrete = isinstance(space, gym.spaces.Discrete)
    table = DataFrame(rows.observations[known], columns=columns["names"])
    if not discrete:
        table[[f"action {name}" for name in names]] = actions
    table[f"reward {flags.rewards}"] = rows.rewards[known]
    shown = ["mean", "std", "min", "1%", "99%", "max"]
    summary = table.describe(percentiles=[0.01, 0.99]).T[shown]
    summary["std"] = table.std(ddof=0)  # 0 instead of NaN for a single transition
    print(summary.to_string(max_rows=24, float_format="{:.4g}".format))
    for name, center in columns["centers"].items():
        print(f"{name}: its mean {center!r} is subtracted")
    whole = not discrete and len(names) == 1 and not (actions % 1).any()
    if whole and not flags.continuous:
        print(f"action {names[0]}: a box, though all values are whole numbers;", end=" ")
        print(f"for discrete actions, pass --categorical {names[0]}")
    if discrete:
        counts = Series(actions).value_counts()
        used = f"{len(counts):,} of them in the data"
        print(f"action {names[0]}: {space.n:,} discrete actions, {used}:")
        values = columns["action_values"]
        if values is not None:
            counts.index = [f"{i} ({values[i]})" for i in counts.index]
        print(counts.to_string(max_rows=10))


def print_episodes(rows: Rows, episodes: List[EpisodeBuffer], flags: Namespace) -> None:
    """Print the numbers of steps, episodes and ends, and of the rows left out."""
    n = len(episodes)
    n_terminal = int(rows.terminal.sum())
    lengths = [len(each.rewards) for each in episodes]
    returns = [each.rewards.sum() for each in episodes]
    print(f"{sum(lengths):,} steps in {n:,} episodes of {min(lengths)} to", end=" ")
    print(f"{max(lengths)} steps, median {np.median(lengths):g}", end="; ")
    print(f"mean return {np.mean(returns):.4g}")
    print(f"  {n_terminal:,} episodes terminate; {n - n_terminal:,} are", end=" ")
    print("truncated, so their last targets are bootstrapped")
    left_out = ~rows.known()
    if left_out.any():
        n_all = int(rows.ends.sum())
        if n < n_all:
            print(f"dropped: {n_all - n:,} of {n_all:,} episodes,", end=" ")
            print("which are one row that is not terminal")
        print(f"left out: the last rows of {left_out.sum():,} truncated", end=" ")
        print("episodes, because their next observation is not in the table")
        n_rewarded = np.count_nonzero(rows.rewards[left_out])
        # Rewards that are mostly at the ends may be those of tasks that ended there.
        rare = n_rewarded > 2 * left_out.sum() * np.mean(rows.rewards != 0)
        if rare or not flags.terminal:
            way = "pass --terminal or --all-terminal"
            if flags.terminal:
                way = f"correct the column {flags.terminal}"
            print(f"  {n_rewarded:,} of these rows have a nonzero reward; if the task")
            print(f"  ended there, {way}")


def convert(flags: Namespace) -> None:
    """Read the table, write the dataset and print a summary.

    Raise UserError for invalid input before anything is written, and OSError if the
    disk fails."""
    if flags.out.exists():
        where = f"--out {flags.out}"
        hint = "choose another directory"
        if not (flags.out / "data" / "metadata.json").exists():
            raise UserError(f"{where}: exists but is not a dataset; {hint}")
        if not flags.overwrite:
            raise UserError(f"{where}: already exists; {hint} or pass --overwrite")
    for parent in flags.out.absolute().parents:
        if parent.is_file():
            problem = f"{parent} is a file, not a directory; choose another directory"
            raise UserError(f"--out {flags.out}: {problem}")
    rows, space, columns = read_rows(flags)
    episodes = split_episodes(rows)
    if not episodes:
        problem = "no transitions, because each episode is one row that is not terminal"
        hint = "if every row is a complete episode (a bandit), pass --all-terminal"
        if flags.terminal:
            hint += " instead of --terminal"
        hint += f"; otherwise check --{'episode' if flags.episode else 'done'}"
        raise UserError(f"{flags.table}: {problem}; {hint}")
    write(flags.out, episodes, space, columns)
    print_columns(rows, space, columns, flags)
    print_episodes(rows, episodes, flags)
    print(f"wrote {flags.out}; its columns.json describes the observations")
    print(f"next: python cql.py --config_path configs/table.yaml --env {flags.out}")


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when done, 1 if the disk failed, 2 for invalid input."""
    try:
        flags = read_flags(argv)
        if pd is None:
            install = "pip install pandas==3.1.1 pyarrow==26.0.1"
            raise UserError(f"pandas is not installed: {install}")
        convert(flags)
    except UserError as error:
        print("from_table.py: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print("from_table.py: failed:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
