"""Tests of scripts/from_table.py, with synthetic logs and loops over their rows."""

import csv
import io
import json
import os
import random
import re
import subprocess
import sys
from collections import namedtuple
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path

import minari
import numpy as np
import pandas as pd
import pytest
from make_data import datasets_path

import cql

SCRIPT = Path(cql.__file__).parent / "scripts" / "from_table.py"
sys.path.insert(0, str(SCRIPT.parent))
import from_table  # noqa: E402

CLINICAL = (
    "--episode patient_id --time t --observations vital_*,age,sex --categorical sex "
    "--actions dose --rewards r --terminal died"
).split()


def convert(path, *flags, out):
    """Run from_table.main, and return its exit status, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        status = from_table.main([str(path), *map(str, flags), "--out", str(out)])
    return status, stdout.getvalue(), stderr.getvalue()


def converted(path, *flags, out):
    """Convert a log. Return episodes and task as cql.py reads them, and stdout."""
    status, stdout, stderr = convert(path, *flags, out=out)
    assert status == 0 and stderr == "", stderr
    episodes, task = cql.read_episodes(str(out))
    episodes = list(episodes)
    for episode in episodes:
        cql.check_episode(episode, task)
    return episodes, task, stdout


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def patients(n=150, seed=0):
    """Return the shuffled rows of n patients, each with 1 to 50 rows.

    One third of the patients die."""
    rng = random.Random(seed)
    rows = []
    for patient in range(n):
        length = 1 + patient % 50
        sex = rng.choice(["F", "M", "other"])
        for t in range(length):
            row = {
                "patient_id": f"P{patient:03}",
                "t": 0.25 * t,
                "vital_hr": rng.gauss(80, 12),
                "age": rng.randrange(20, 95),
                "sex": sex,
                "dose": rng.uniform(0, 7.5),
                "vital_bp": rng.gauss(120, 15),
                "r": rng.gauss(0, 1),
                "died": int(t == length - 1 and patient % 3 == 0),
                "note": "free text",
            }
            rows.append(row)
    rng.shuffle(rows)
    return rows


def expected_episodes(rows, episode_of, observe, act, reward, terminal):
    """Compute the expected episodes with plain loops over ordered rows.

    The last row of an episode is a transition if it is terminal, otherwise the final
    observation."""
    by_episode = {}
    for row in rows:
        by_episode.setdefault(episode_of(row), []).append(row)
    episodes = []
    for stay in by_episode.values():
        observations = [observe(row) for row in stay]
        actions = [act(row) for row in stay]
        rewards = [reward(row) for row in stay]
        ended = bool(terminal(stay[-1]))
        if ended:
            observations.append(observations[-1])
        else:
            actions.pop()
            rewards.pop()
        if actions:
            terminations = [False] * (len(actions) - 1) + [ended]
            episodes.append((observations, actions, rewards, terminations))
    return episodes


def assert_same(episodes, expected):
    assert len(episodes) == len(expected)
    for episode, (observations, actions, rewards, terminations) in zip(
        episodes, expected
    ):
        n = len(actions)
        np.testing.assert_array_equal(episode.observations, np.float32(observations))
        actions = np.asarray(actions).reshape(n, -1).astype(episode.actions.dtype)
        np.testing.assert_array_equal(episode.actions, actions)
        np.testing.assert_array_equal(episode.rewards, rewards)
        np.testing.assert_array_equal(episode.terminations, terminations)
        assert episode.whole  # terminated or truncated


def test_a_clinical_log(tmp_path):
    """Convert a log with shuffled rows and a continuous action.

    It has an id, a time, a column pattern and a categorical column."""
    rows = patients()
    path = write_csv(tmp_path / "log.csv", rows)
    out = tmp_path / "deep" / "mine-v0"
    episodes, task, printed = converted(path, *CLINICAL, out=out)

    first = {}
    for i, row in enumerate(rows):
        first.setdefault(row["patient_id"], i)
    expected = expected_episodes(
        sorted(rows, key=lambda row: (first[row["patient_id"]], row["t"])),
        lambda row: row["patient_id"],
        lambda row: (
            [row["vital_hr"], row["vital_bp"], row["age"]]
            + [float(row["sex"] == value) for value in ("F", "M", "other")]
        ),
        lambda row: row["dose"],
        lambda row: row["r"],
        lambda row: row["died"],
    )
    assert_same(episodes, expected)
    assert not task.discrete and task.action_shape == [1]
    doses = [row["dose"] for row in rows]
    assert task.action_low == [np.float32(min(doses))]
    assert task.action_high == [np.float32(max(doses))]

    lengths = [len(episode[1]) for episode in expected]
    n_died = sum(row["died"] for row in rows)
    mean_return = sum(sum(episode[2]) for episode in expected) / len(expected)
    assert len(rows) > 3000 and n_died == 50 and lengths.count(1) > 0
    for text in (
        f"log.csv: {len(rows):,} rows, 150 episodes\n",
        f"{sum(lengths):,} steps in {len(lengths)} episodes of 1 to 50 steps, median",
        f"mean return {mean_return:.4g}\n",
        f"50 episodes terminate; {len(lengths) - 50} are truncated, so their last",
        "dropped: 2 of 150 episodes, which are one row that is not terminal\n",
        "left out: the last rows of 100 truncated episodes, because their next obs",
        f"next: python cql.py --config_path configs/table.yaml --env {out}",
    ):
        assert text in printed, text
    assert "nonzero reward" not in printed  # most rows have one
    columns = json.loads((out / "columns.json").read_text())
    assert columns["names"] == "vital_hr vital_bp age sex=F sex=M sex=other".split()
    assert [line.split(" ")[0] for line in printed.splitlines()[2:8]] == columns["names"]


def sessions(n=300, seed=1):
    """Return the ordered rows of n sessions, and of one more that is not done."""
    rng = random.Random(seed)
    rows = []
    for session in range(n + 1):
        length = rng.randrange(1, 20)
        for i in range(length):
            row = {
                "session_id": session,
                "item": rng.choice([3, 4, 6, 9]),
                "title": rng.choice(["tea", "coffee", "água"]),
                "returning": rng.random() < 0.5,
                "hour": rng.randrange(24),
                "click": int(rng.random() < 0.3),
                "done": i == length - 1 and session < n,
            }
            rows.append(row)
    return rows


@pytest.mark.parametrize("name", ["item", "title"])
def test_a_recommender_log(name, tmp_path):
    """A Parquet log whose done column is also terminal; an integer or text action."""
    rows = sessions()
    path = tmp_path / "log.parquet"
    types = {"title": "category", "hour": "Int64"}
    pd.DataFrame(rows).astype(types).to_parquet(path)
    flags = f"--done done --terminal done --actions {name} --rewards click".split()
    flags += ["--observations", "returning,hour"]
    out = tmp_path / "clicks"
    episodes, task, printed = converted(path, *flags, out=out)
    titles = ["coffee", "tea", "água"]
    expected = expected_episodes(
        rows,
        lambda row: row["session_id"],
        lambda row: [row["returning"], row["hour"]],
        lambda row: titles.index(row["title"]) if name == "title" else row["item"],
        lambda row: row["click"],
        lambda row: row["done"],
    )
    assert_same(episodes, expected)
    assert task.discrete and len(expected) in (300, 301) and len(rows) > 2500
    kept = [row for row in rows if row is not rows[-1]]
    values = json.loads((out / "columns.json").read_text())["action_values"]
    if name == "item":
        assert (task.action_low, task.action_high) == ([3], [9]) and values is None
        assert "action item: 7 discrete actions, 4 of them in the data:\n" in printed
        n = sum(row["item"] == 6 for row in kept)
        assert f"\n6    {n}\n" in printed
    else:
        assert (task.action_low, task.action_high) == ([0], [2]) and values == titles
        n = sum(row["title"] == "tea" for row in kept)
        assert f"\n1 (tea)       {n}\n" in printed


def arrays(n=2000, seed=2):
    rng = np.random.default_rng(seed)
    return {
        "state": rng.normal(size=(n, 12)),
        "control": rng.uniform(-0.9, 0.9, (n, 2)).astype(np.float32),
        "valve": rng.integers(0, 5, n),
        "gain": rng.normal(size=n),
        "run": np.repeat(np.arange(n // 40), 40),
    }


def test_npz_arrays(tmp_path):
    """Convert an npz log with arrays [n, k] and several action columns.

    Rows are in file order and all other columns are observations; with given bounds
    and without."""
    data = arrays()
    path = tmp_path / "log.npz"
    np.savez(path, **data)
    flags = ["--episode", "run", "--rewards", "gain", "--observations", "*"]
    flags += ["--actions", "control_*,valve", "--all-terminal"]
    episodes, task, _ = converted(path, *flags, out=tmp_path / "data")
    actions = np.column_stack([data["control"], data["valve"]])
    expected = expected_episodes(
        range(2000),
        lambda i: data["run"][i],
        lambda i: data["state"][i],
        lambda i: actions[i],
        lambda i: data["gain"][i],
        lambda i: True,
    )
    assert_same(episodes, expected)
    assert task.action_low == actions.min(axis=0).tolist()
    assert task.action_high == actions.max(axis=0).tolist()
    assert (len(episodes), len(episodes[0].rewards)) == (50, 40)

    flags += ["--overwrite", "--action-low=-1,-1,0", "--action-high", "5"]
    _, task, _ = converted(path, *flags, out=tmp_path / "data")
    assert (task.action_low, task.action_high) == ([-1, -1, 0], [5, 5, 5])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "log.npz"]


SMALL = """id,t,when,x,sex,far,a,dose,who,same,r,end
u,2,2024-01-10,1.5,F,1700000002,4,0.1,ann,8,1,1
v,1,2024-02-01 00:00,2.5,M,1700000001,7,0.2,bob,8,2,0
u,1,2024-01-09 23:59,3.5,F,1700000003,7,0.4,bob,8,3,0
v,2,2024-02-01T08:00:00+09:00,,M,1700000004,4,0.3,bob,8,4,0
v,3,2025-01-01T00:00:00Z,4.5,M,1700000006,4,0.1,bob,8,5,0
"""
FLAGS = {
    "--episode": "id",
    "--time": "t",
    "--observations": "t",
    "--actions": "a",
    "--rewards": "r",
    "--terminal": "end",
}


def small(tmp_path, text=SMALL, **changed):
    """Write the small log, and return its path and FLAGS with changes.

    None removes a flag, and "" gives it no value."""
    path = tmp_path / "small.csv"
    path.write_text(text)
    flags = []
    changed = {f"--{name.replace('_', '-')}": changed[name] for name in changed}
    for name, value in {**FLAGS, **changed}.items():
        if value is not None:
            flags += [name, value] if value else [name]
    return path, flags


def read_small(tmp_path, **changed):
    path, flags = small(tmp_path, **changed)
    return converted(path, *flags, out=tmp_path / "small-v0")


def test_fill_forward(tmp_path):
    """A missing value is filled with the previous one of its episode in time order.

    The x of v at time 2 is its x at time 1."""
    (u, v), _, printed = read_small(tmp_path, observations="x", fill="forward")
    assert u.observations.tolist() == [[3.5], [1.5], [1.5]]
    assert v.observations.tolist() == [[2.5], [2.5], [4.5]]
    assert "small.csv: 5 rows, 2 episodes; 1 missing observations filled\n" in printed


def test_center(tmp_path):
    """The mean over all rows is subtracted, recorded and printed."""
    flags = {"observations": "t,far", "center": "f*"}
    (u, v), _, printed = read_small(tmp_path, **flags)
    mean = 1700000003.2
    np.testing.assert_allclose(u.observations[:, 1], [-0.2, -1.2, -1.2], atol=1e-6)
    np.testing.assert_allclose(v.observations[:, 1], [-2.2, 0.8, 2.8], atol=1e-6)
    columns = json.loads((tmp_path / "small-v0" / "columns.json").read_text())
    assert columns["centers"] == {"far": mean}
    assert f"far: its mean {mean} is subtracted\n" in printed


def test_integer_actions(tmp_path):
    """Integer actions are discrete.

    Flags make them categorical or a box, or set their bounds."""
    _, task, _ = read_small(tmp_path)
    assert task.discrete and (task.action_low, task.action_high) == ([4], [7])
    flags = {"overwrite": ""}
    (u, v), task, _ = read_small(tmp_path, categorical="a", **flags)
    assert task.discrete and (task.action_low, task.action_high) == ([0], [1])
    assert u.actions.tolist() == [[1], [0]] and v.actions.tolist() == [[1], [0]]
    columns = json.loads((tmp_path / "small-v0" / "columns.json").read_text())
    assert columns["action_values"] == [4, 7]
    (u, _), task, _ = read_small(tmp_path, continuous="", **flags)
    assert not task.discrete and (task.action_low, task.action_high) == ([4], [7])
    assert u.actions.tolist() == [[7], [4]] and u.actions.dtype == np.float32
    _, task, _ = read_small(tmp_path, action_low="0", action_high="9", **flags)
    assert task.discrete and (task.action_low, task.action_high) == ([0], [9])
    _, task, _ = read_small(tmp_path, action_low="-0.5", action_high="8.5", **flags)
    assert task.discrete and (task.action_low, task.action_high) == ([0], [8])


def test_nullable_columns_and_unknown_categories(tmp_path):
    """columns.json keeps the types of categories, so that `encode` recognizes them."""
    rows = {"id": [1] * 4, "ward": [3, 1, 2, 3], "on": [True, False, True, True]}
    frame = pd.DataFrame({**rows, "a": [5, 6, 5, 6], "r": [0, 1, 2, 3]})
    frame = frame.astype({"ward": "Int64", "on": "boolean", "a": "Int64"})
    frame.to_parquet(tmp_path / "log.parquet")
    flags = "--episode id --observations ward,on --actions a --rewards r".split()
    flags += ["--categorical", "*"]
    out = tmp_path / "mine-v0"
    (episode,), _, _ = converted(tmp_path / "log.parquet", *flags, out=out)
    columns = json.loads((out / "columns.json").read_text())
    assert columns["categories"] == {"ward": [1, 2, 3], "on": [False, True]}
    assert columns["action_values"] == [5, 6]
    expected = [[0, 0, 1, 0, 1], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 1]]
    assert from_table.encode(frame, columns).tolist() == expected
    assert episode.observations.tolist() == expected
    frame.loc[2, "ward"] = 7
    with pytest.raises(from_table.UserError, match="^column ward: 7 is not one of "):
        from_table.encode(frame, columns)


def test_text_that_looks_missing(tmp_path):
    """NA, None and null are text in a text column. NA is missing in a numeric column."""
    text = SMALL.replace("ann", "None").replace(",,", ",NA,").replace("F", "NA")
    text = text.replace("4,0.3,bob", "4,0.3,null")
    flags = {"text": text, "actions": "who", "fill": "forward", "categorical": "sex"}
    (u, v), _, printed = read_small(tmp_path, observations="x,sex", **flags)
    columns = json.loads((tmp_path / "small-v0" / "columns.json").read_text())
    assert columns["categories"] == {"sex": ["M", "NA"]}
    assert columns["action_values"] == ["None", "bob", "null"]
    assert u.observations.tolist() == [[3.5, 0, 1], [1.5, 0, 1], [1.5, 0, 1]]
    assert v.observations.tolist() == [[2.5, 1, 0], [2.5, 1, 0], [4.5, 1, 0]]
    assert v.actions.tolist() == [[1], [2]] and "; 1 missing observations" in printed


def test_columns_without_a_name(tmp_path):
    """A pattern does not match the index that pandas writes; its name selects it."""
    frame = pd.read_csv(io.StringIO(SMALL))[["id", "t", "a", "r", "end"]]
    frame = frame.iloc[[4, 2, 3, 1, 0]].assign(x=1.5)
    frame.to_csv(tmp_path / "small.csv")
    _, flags = small(tmp_path, (tmp_path / "small.csv").read_text(), observations="*")
    converted(tmp_path / "small.csv", *flags, out=tmp_path / "a")
    frame.to_parquet(tmp_path / "small.parquet")
    converted(tmp_path / "small.parquet", *flags, out=tmp_path / "b")
    for name in ("a", "b"):
        columns = json.loads((tmp_path / name / "columns.json").read_text())
        assert columns["names"] == ["x"]
    flags[flags.index("*")] = "x,Unnamed: 0"
    (_, u), _, _ = converted(tmp_path / "small.csv", *flags, out=tmp_path / "c")
    assert u.observations.tolist() == [[1.5, 2], [1.5, 0], [1.5, 0]]


def test_without_terminal(tmp_path):
    """Without --terminal no episode terminates, and both last rows are left out.

    Spaces after commas are not part of names."""
    text = SMALL.replace(",", ", ")
    (u, v), _, printed = read_small(tmp_path, text=text, terminal=None)
    assert u.rewards.tolist() == [3] and v.rewards.tolist() == [2, 4]
    assert not u.terminations.any() and not v.terminations.any()
    assert "  0 episodes terminate; 2 are truncated, so their last targets" in printed


def test_times_as_text(tmp_path):
    """ISO 8601 text is sorted as times: v's second row is one hour before its first."""
    (u, v), _, _ = read_small(tmp_path, time="when")
    assert u.rewards.tolist() == [3, 1] and v.rewards.tolist() == [4, 2]


WALK = (
    "--episode id --time t --observations x,ward --categorical ward --actions a "
    "--rewards r --terminal end"
).split()


def walk():
    """Return the shuffled rows of two episodes of 12 steps; the second one terminates.

    Their times have another order as text."""
    rows = []
    for episode in (7, 8):
        for t in range(12):
            row = {
                "id": episode,
                "t": t,
                "x": t / 4 - episode,
                "ward": 7 * t % 3,
                "a": 2 + 5 * t % 4,
                "r": 100.0 * episode + t,
                "end": episode == 8 and t == 11,
            }
            rows.append(row)
    random.Random(3).shuffle(rows)
    return pd.DataFrame(rows)


def assert_walk(path, tmp_path):
    """Convert a file with the rows of `walk`, and compare with loops over them.

    Return the content of columns.json."""
    episodes, task, _ = converted(path, *WALK, out=tmp_path / "mine-v0")
    expected = expected_episodes(
        walk().sort_values(["id", "t"]).to_dict("records"),
        lambda row: row["id"],
        lambda row: [row["x"]] + [float(row["ward"] == ward) for ward in range(3)],
        lambda row: row["a"],
        lambda row: row["r"],
        lambda row: row["end"],
    )
    assert_same(sorted(episodes, key=lambda episode: episode.rewards[0]), expected)
    assert task.discrete and (task.action_low, task.action_high) == ([2], [5])
    return json.loads((tmp_path / "mine-v0" / "columns.json").read_text())


TIMES = {
    "integers": lambda t: t,
    "fractions": lambda t: t / 4,
    "large integers": lambda t: t * 10**9,
    "dates": lambda t: f"2024-01-{1 + t:02}",
}


@pytest.mark.parametrize("name", ["log.parquet", "log"])
@pytest.mark.parametrize("times", TIMES)
def test_partitioned_parquet(times, name, tmp_path):
    """The column of a partition is sorted as numbers or dates, not as text."""
    frame = walk()
    frame["t"] = frame["t"].map(TIMES[times])
    path = tmp_path / name
    frame.to_parquet(path, partition_cols=["t"])
    assert path.is_dir()
    assert_walk(path, tmp_path)


def to_decimals(column):
    return column.map(lambda value: Decimal(str(value)))


def to_categories(column):
    """Return a Categorical whose categories are not in the order of their values."""
    return pd.Categorical(column, column.unique())


NUMBERS = ["id", "t", "x", "ward", "a", "r"]
ALL = [*NUMBERS, "end"]
STORED = {
    "decimals": (NUMBERS, to_decimals),
    "categories": (ALL, to_categories),
    "decimal categories": (NUMBERS, lambda column: to_categories(to_decimals(column))),
    "Arrow": (ALL, lambda column: column.convert_dtypes(dtype_backend="pyarrow")),
    "nullable": (ALL, lambda column: column.convert_dtypes()),
    "float16": (["t", "x", "r"], lambda column: column.astype("float16")),
    "objects": (ALL, lambda column: column.astype(object)),
}


@pytest.mark.parametrize("stored", STORED)
def test_storage_types(stored, tmp_path):
    """Numbers and booleans are read by their values, whatever type stores them."""
    names, convert_column = STORED[stored]
    frame = walk()
    for name in names:
        frame[name] = convert_column(frame[name])
    frame.to_parquet(tmp_path / "log.parquet")
    columns = assert_walk(tmp_path / "log.parquet", tmp_path)
    assert columns["categories"] == {"ward": [0, 1, 2]}
    assert columns["names"] == ["x", "ward=0", "ward=1", "ward=2"]
    encoded = from_table.encode(frame, columns)
    assert (encoded == from_table.encode(walk(), columns)).all()


def test_missing_values_of_objects(tmp_path):
    """Decimals and booleans with missing values are numbers; --fill completes them."""
    frame = pd.DataFrame({"id": [1] * 4, "a": [0, 1, 0, 1], "r": [1, 2, 3, 4]})
    frame["x"] = [Decimal("1.5"), None, Decimal("2.5"), Decimal("0.5")]
    frame["up"] = [True, None, False, None]
    frame.to_parquet(tmp_path / "log.parquet")
    flags = "--episode id --observations x,up --fill forward --actions a --rewards r"
    out = tmp_path / "mine-v0"
    (episode,), _, _ = converted(tmp_path / "log.parquet", *flags.split(), out=out)
    assert episode.observations.tolist() == [[1.5, 1], [1.5, 1], [2.5, 0], [0.5, 0]]


@pytest.mark.parametrize("stored", ["category", "bytes"])
def test_stored_text(stored, tmp_path):
    """Categories and bytes of text are text."""
    frame = walk()
    frame["t"] = frame["t"].map(TIMES["dates"])
    frame["ward"] = frame["ward"].map(["A", "B", "C"].__getitem__)
    for name in ("t", "ward"):
        if stored == "bytes":
            frame[name] = frame[name].map(str.encode)
        else:
            frame[name] = pd.Categorical(frame[name], sorted(set(frame[name]))[::-1])
    frame.to_parquet(tmp_path / "log.parquet")
    columns = assert_walk(tmp_path / "log.parquet", tmp_path)
    assert columns["categories"] == {"ward": ["A", "B", "C"]}


def test_large_decimal_ids(tmp_path):
    """Ids that are equal in float64 are different episodes."""
    frame = walk()
    frame["id"] = frame["id"].map(lambda i: Decimal(10**20 + i))
    frame.to_parquet(tmp_path / "log.parquet")
    assert_walk(tmp_path / "log.parquet", tmp_path)


def test_lists_refused(tmp_path, refused_line):
    """One line names a column of lists; other such columns do not matter."""
    frame = walk().assign(state=[[1.0, 2.0]] * 24)
    frame.to_parquet(tmp_path / "log.parquet")
    assert_walk(tmp_path / "log.parquet", tmp_path)
    flags = [*WALK, "--observations", "state,ward"]
    expected = "column state holds lists; expected a number or text in each row; save"
    refused_line(tmp_path / "log.parquet", flags, expected)


@pytest.mark.parametrize("name", ["LOG.CSV", "log.csv.GZ", "Log.Parquet", "LOG.NPZ"])
def test_suffixes_without_regard_to_case(name, tmp_path):
    if "CSV" in name:
        walk().to_csv(tmp_path / name, index=False)
    elif "csv" in name:
        walk().to_csv(tmp_path / name, index=False, compression="gzip")
    elif "Parquet" in name:
        walk().to_parquet(tmp_path / name)
    else:
        with open(tmp_path / name, "wb") as file:
            np.savez(file, **{column: walk()[column].to_numpy() for column in walk()})
    assert_walk(tmp_path / name, tmp_path)


def save_npz(path):
    """Save the rows of `walk` in big-endian arrays, beside arrays of other kinds."""
    arrays = {"ragged": np.array([np.zeros(3), np.zeros(4)], object)}
    for name, column in walk().items():
        array = column.to_numpy()
        arrays[name] = array.astype(array.dtype.newbyteorder(">"))
    arrays["who"] = np.array(["ann"] * 24).astype(">U3")
    arrays["short"] = np.zeros((23, 2))
    arrays["gamma"] = 0.99
    arrays["config"] = np.array({"seed": 1})
    arrays["records"] = np.zeros(24, [("x", "f4"), ("y", "f4")])
    np.savez(path, **arrays)


def test_npz_reads_only_named_arrays(tmp_path):
    """Arrays that no flag names do not matter. Big-endian arrays are read."""
    save_npz(tmp_path / "log.npz")
    assert_walk(tmp_path / "log.npz", tmp_path)
    flags = [*WALK, "--episode", "who", "--time", "r"]
    (episode,), _, _ = converted(tmp_path / "log.npz", *flags, out=tmp_path / "one-v0")
    assert episode.rewards.tolist() == sorted(walk()["r"])


def test_advice_on_rows_that_are_left_out(tmp_path):
    _, _, printed = read_small(tmp_path, terminal=None)
    assert "ended there, pass --terminal or --all-terminal\n" in printed
    assert "dropped" not in printed


def test_advice_on_rewards_at_ends_that_are_not_terminal(tmp_path):
    """Of six rows two have a reward: the last ones of two truncated episodes."""
    text = "id,t,a,r,end\n"
    for episode in range(2):
        for t in range(3):
            text += f"{episode},{t},{t / 2},{int(t == 2)},0\n"
    _, _, printed = read_small(tmp_path, text=text, actions="a")
    assert "  2 of these rows have a nonzero reward; if the task\n" in printed
    assert "  ended there, correct the column end\n" in printed


@pytest.mark.parametrize("continuous", [None, ""])
def test_whole_numbers_that_are_a_box(tmp_path, continuous):
    text = SMALL.replace(",0.1,", ",1.0,").replace(",0.2,", ",0.0,")
    text = text.replace(",0.4,", ",3.0,").replace(",0.3,", ",0.0,")
    _, task, printed = read_small(
        tmp_path, text=text, actions="dose", continuous=continuous
    )
    assert not task.discrete
    assert ("pass --categorical dose" in printed) == (continuous is None)


COMMAS = re.sub(r",0\.(\d),", r',"0,\1",', SMALL)
FOREIGN = {
    "semicolon": (SMALL.replace(",", ";"), "columns are separated by ';', but a comma"),
    "tab": (SMALL.replace(",", "\t"), "columns are separated by '\\t', but a comma"),
    "name": (SMALL.replace(",far,", ",x,"), "two columns are named 'x'; rename one"),
    "action": (COMMAS, "row 1, column dose: 0,1 has a decimal comma; expected a po"),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_foreign_csv(fault, tmp_path, refused_line):
    text, fragment = FOREIGN[fault]
    path, flags = small(tmp_path, text=text, actions="dose")
    refused_line(path, flags, fragment)


def test_a_decimal_comma_in_an_observation(tmp_path, refused_line):
    path, flags = small(tmp_path, text=COMMAS, observations="dose")
    refused_line(path, flags, "column dose: 0,1 has a decimal comma; expected a point")


def test_another_case_is_meant(tmp_path, refused_line):
    path, flags = small(tmp_path, text=SMALL.replace(",x,", ",X,"), observations="x")
    refused_line(path, flags, "no column matches 'x'; did you mean 'X'?")


NPZ_REFUSALS = {
    "ragged": (
        "array ragged holds Python objects, for example one array for each episode; ",
        "; expected numbers or text, with one row for each step; concatenate the epis",
        "; concatenate the episodes, and save each row's episode in another array\n",
    ),
    "config": ("array config holds Python objects, ",),
    "gamma": (
        "array gamma is a single value; expected numbers or text, with one row for",
        "; name the arrays to use, or save one value for each step\n",
    ),
    "records": (
        "array records is structured; expected numbers or text, with one row for each",
        "; save each of its fields as an array\n",
    ),
    "short_0": (
        "log.npz: id has 24 rows, a has 24 rows, r has 24 rows, short has 23 rows; expe",
        "; expected one row for each step in all of them; save arrays of the same lengt",
    ),
    "x,short_*": ("x has 24 rows, ", "short has 23 rows"),
    "*": ("array ragged holds Python objects",),
    "shirt": ("--observations: no column matches 'shirt'; did you mean 'short_",),
}


@pytest.mark.parametrize("observations", NPZ_REFUSALS)
def test_npz_refusals(observations, tmp_path, refused_line):
    save_npz(tmp_path / "log.npz")
    flags = "--episode id --actions a --rewards r --observations".split()
    fragments = NPZ_REFUSALS[observations]
    refused_line(tmp_path / "log.npz", [*flags, observations], *fragments)


def test_bandits(tmp_path):
    """With --all-terminal, episodes of one row are transitions."""
    flags = {"episode": "far", "terminal": None, "all_terminal": ""}
    episodes, _, _ = read_small(tmp_path, **flags)
    rewards = [episode.rewards.tolist() for episode in episodes]
    assert rewards == [[1], [2], [3], [4], [5]]
    assert all(episode.terminations.all() for episode in episodes)


def test_ids_that_are_not_contiguous(tmp_path):
    """One line reports ids whose rows are not contiguous; each is still one episode."""
    line = "rows of 2 ids are not contiguous in the file; each id is one episode in "
    line += "file order; if that is wrong, pass --time or make the ids unique\n"
    flags = {"terminal": None, "overwrite": ""}
    (u, v), _, printed = read_small(tmp_path, time=None, **flags)
    assert u.rewards.tolist() == [1] and v.rewards.tolist() == [2, 4]
    assert line in printed
    _, _, printed = read_small(tmp_path, **flags)
    assert "contiguous" not in printed
    header, *rows = SMALL.splitlines(keepends=True)
    text = "".join([header, *sorted(rows)])
    _, _, printed = read_small(tmp_path, text=text, time=None, **flags)
    assert "contiguous" not in printed
    text = "".join([header, *sorted(rows), rows[0]])
    _, _, printed = read_small(tmp_path, text=text, time=None, **flags)
    assert "rows of 1 ids are not contiguous" in printed


def test_one_transition(tmp_path):
    """The standard deviation of a single transition is 0."""
    rows = SMALL.splitlines(keepends=True)
    text = "".join([rows[0], rows[1], rows[3]])
    _, _, printed = read_small(tmp_path, text=text, terminal=None)
    assert "1 steps in 1 episodes" in printed and "NaN" not in printed
    assert "\nt            1    0    1   1    1    1\n" in printed


@pytest.fixture
def refused_line(tmp_path):
    """Return a function (path, flags, *fragments) that checks a refusal.

    A refusal has exit status 2, prints one line that contains the fragments, and
    writes no file."""

    def check(path, flags, *fragments):
        before = sorted(tmp_path.rglob("*"))
        status, _, err = convert(path, *flags, out=tmp_path / "no-v0")
        assert status == 2 and err.startswith("from_table.py: error: "), (status, err)
        assert err.count("\n") == 1 and sorted(tmp_path.rglob("*")) == before
        for text in fragments:
            assert text in err, f"{text} not in: {err}"

    return check


def edited(old, new, **flags):
    assert old in SMALL
    return {"text": SMALL.replace(old, new), **flags}


REFUSALS = [
    # Rows and columns
    (
        {"observations": "t,x"},
        "row 4, column x: nan is a missing value; --fill forward uses the value in the",
    ),
    (
        edited(",,M", ",-inf,M", observations="x"),
        "row 4, column x: -inf is infinite; replace it by a finite number; rows",
    ),
    (
        edited(",,M", ",1e39,M", observations="x"),
        "row 4, column x: 1e+39 is too large for float32; scale the column; rows",
    ),
    (
        edited(",1.5", ",", observations="x"),
        "row 1, column x: nan is a missing value;",
        "; rows affected: 2\n",
    ),
    (
        edited(",2.5", ",", observations="x", fill="forward"),
        "row 2, column x: nan is a missing value, and no earlier row of its episode",
    ),
    (
        {"rewards": "x"},
        "row 4, column x: nan is a missing value; complete the column; rows affected: 1",
    ),
    (
        edited("v,2,", ",2,"),
        "row 4, column id: nan is a missing value; complete the column; rows affected:",
    ),
    (edited("v,2,", "v,,"), "row 4, column t: nan is a missing value"),
    (edited("2024-01-10", "10.1.24", time="when"), "row 1, column when: 10.1.24 is nei"),
    (edited("v,3,", "v,2,"), "row 5, column t: 2 occurs twice in its episode; times"),
    (edited("v,1,", "v,noon,"), "row 2, column t: noon is not a number"),
    (edited("2,0\n", "2,1\n"), "row 2, column end: 1 marks an end before the last row"),
    (edited("0.2", "?", actions="dose"), "row 2, column dose: ? is not a number; make"),
    (
        {"observations": "t,sex"},
        "row 1, column sex: F is not a number; pass --categorical to encode",
    ),
    ({"actions": "dose,who"}, "row 1, column who: ann is not a number", "affected: 5"),
    ({"actions": "who", "continuous": ""}, "row 1, column who: ann is not a number"),
    (
        {"actions": "dose", "action_high": "0.3"},
        "row 3, column dose: 0.4 is outside [0.1, 0.3]; change --action-low or",
    ),
    # Columns
    (
        {"observations": "t,far"},
        "column far: mean size 1.7e+09 and standard deviation",
        "; pass --center far to subtract the mean",
    ),
    (
        {"observations": "vital*"},
        "--observations: no column matches 'vital*'; did you mean '",
    ),
    ({"rewards": "reward"}, "--rewards: no column matches 'reward'; did you mean 'far'"),
    (
        {"center": "far"},
        "--center: no numeric column of --observations matches 'far'; did you mean 't'?",
    ),
    (
        {"categorical": "sex"},
        "--categorical: no column of --observations or --actions matches 'sex'",
    ),
    ({"observations": "t,a"}, "--observations: 'a' is an action, or known only after"),
    ({"observations": "t,r"}, "--observations: 'r' is an action, or known only after"),
    (
        {"actions": "dose,a", "categorical": "a"},
        "--actions: 2 columns, but a categorical action needs a single column; pass one",
    ),
    (
        {"actions": "same"},
        "--actions: same is the same in every row, so there is no choice to learn; pass",
    ),
    (
        edited(",7,0.4", ",900000,0.4"),
        "--actions: a spans 899,997 integers; pass --categorical a to use only those",
    ),
    (
        {"actions": "dose", "action_low": "1,2"},
        "--action-low: 2 numbers; pass one number\n",
    ),
    (
        {"actions": "dose,a", "action_high": "1,2,3"},
        "--action-high: 3 numbers; pass one number, or one for each of the 2 action",
    ),
    ({"actions": "dose", "action_low": "low"}, "argument --action-low: invalid"),
    ({"actions": "dose", "action_low": "inf"}, "--action-low: inf: must be finite"),
    ({"actions": "dose", "action_high": "nan"}, "--action-high: nan: must be finite"),
    (
        {"actions": "who", "action_low": "0"},
        "--action-low, --action-high: categorical actions have no bounds; leave these",
    ),
    # Flags
    ({"rewards": None}, "the following arguments are required: --rewards"),
    ({"episode": None}, "one of the arguments --episode --done is required"),
    ({"done": "end"}, "not allowed with argument --episode"),
    (
        {"episode": None, "done": "end"},
        "--time: cannot be combined with --done, which uses the file's order; pass",
    ),
    ({"all_terminal": ""}, "not allowed with argument --terminal"),
    ({"fill": "backward"}, "invalid choice: 'backward'"),
    # Files
    ({"text": ""}, "small.csv: cannot be read: No columns"),
    ({"text": "id,t,a,r,end\n"}, "small.csv: no rows; expected one row for each step"),
    (
        {"text": "t,a,r,end\nu,1,2,3,0\n"},
        "small.csv: rows have more fields than the header; name every column",
    ),
    (
        {"episode": "far", "terminal": None},
        "small.csv: no transitions, because each episode is one row that is not",
        "; if every row is a complete episode (a bandit), pass --all-terminal; other",
        "; otherwise check --episode\n",
    ),
    (
        edited(",1,1\n", ",1,0\n", episode="far"),
        "(a bandit), pass --all-terminal instead of --terminal; otherwise check",
    ),
    (
        {"episode": None, "time": None, "done": "same", "terminal": None},
        "(a bandit), pass --all-terminal; otherwise check --done\n",
    ),
]


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, tmp_path, refused_line):
    changed, *fragments = case
    path, flags = small(tmp_path, **changed)
    refused_line(path, flags, *fragments)


def test_files_refused(tmp_path, refused_line):
    _, flags = small(tmp_path)
    for name in ("log.csv", "log.parquet", "log.npz"):
        refused_line(tmp_path / name, flags, f"{name}: no such file")
    for name in ("log.csv", "log.parquet", "log.npz"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00 no such thing")
        refused_line(tmp_path / name, flags, f"{name}: cannot be read: ")
    (tmp_path / "log.xlsx").touch()
    refused_line(tmp_path / "log.xlsx", flags, "expected a .csv, .csv.gz, .parquet")


def test_an_index_in_parquet(tmp_path):
    """The index that pandas writes to a Parquet file is read as columns."""
    frame = pd.DataFrame(patients(6)).set_index(["patient_id", "t"])
    frame.to_parquet(tmp_path / "log.parquet")
    path = write_csv(tmp_path / "log.csv", patients(6))
    of_index, _, _ = converted(tmp_path / "log.parquet", *CLINICAL, out=tmp_path / "a")
    of_columns, _, _ = converted(path, *CLINICAL, out=tmp_path / "b")
    for one, other in zip(of_index, of_columns, strict=True):
        np.testing.assert_array_equal(one.observations, other.observations)


def test_out(tmp_path, monkeypatch):
    """An existing dataset is replaced only with --overwrite.

    Another directory is never replaced. If the disk fails, the old dataset stays."""
    path, flags = small(tmp_path)
    out = tmp_path / "mine-v0"
    out.mkdir()
    status, _, err = convert(path, *flags, "--overwrite", out=out)
    hint = "choose another directory"
    assert status == 2 and f"--out {out}: exists but is not a dataset; {hint}\n" in err
    out.rmdir()
    episodes, _, _ = converted(path, *flags, out=out)
    with datasets_path(tmp_path):
        loaded = minari.load_dataset("mine-v0")
    assert (loaded.spec.dataset_id, loaded.total_steps) == ("mine-v0", 4)
    status, _, err = convert(path, *flags, out=out)
    assert status == 2
    assert err.endswith(f"--out {out}: already exists; {hint} or pass --overwrite\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    def failing(*_):
        raise RuntimeError("Unable to flush\nfile")

    flags += ["--overwrite"]
    flags[flags.index("--rewards") + 1] = "same"
    monkeypatch.chdir(tmp_path)  # a relative path
    with monkeypatch.context() as patch:
        patch.setattr(from_table.MinariStorage, "update_metadata", full)
        status, _, err = convert(path, *flags, out="mine-v0")
    assert status == 1 and err.startswith("from_table.py: failed: [Errno 28] No space")
    storage = type(from_table.MinariStorage.read(out / "data"))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "update_episodes", failing)
        status, _, err = convert(path, *flags, out="mine-v0")
    assert (status, err) == (1, "from_table.py: failed: Unable to flush file\n")
    with monkeypatch.context() as patch:
        usage = namedtuple("Usage", "free")(30_000)
        patch.setattr(from_table.shutil, "disk_usage", lambda _: usage)
        status, _, err = convert(path, *flags, out="mine-v0")
    sizes = "0.03 MB free, up to 0.04 MB needed; free some disk space"
    assert (status, err) == (1, f"from_table.py: failed: {tmp_path}: {sizes}\n")
    unchanged, _ = cql.read_episodes(str(out))
    assert list(unchanged)[0].rewards.tolist() == episodes[0].rewards.tolist() == [3, 1]
    (out / "thesis.tex").touch()
    replaced, _, _ = converted(path, *flags, out="mine-v0")
    assert replaced[0].rewards.tolist() == [8, 8]
    names = ["columns.json", "data", "thesis.tex"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine-v0", "small.csv"]


def test_out_cannot_be_written(tmp_path, monkeypatch):
    """One line is printed for a file as a parent directory and for a read-only disk."""
    path, flags = small(tmp_path)
    for out in (path / "mine-v0", path / "deep" / "mine-v0"):
        status, printed, err = convert(path, *flags, out=out)
        problem = f"{path} is a file, not a directory; choose another directory"
        assert (status, printed) == (2, "")
        assert err == f"from_table.py: error: --out {out}: {problem}\n"

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(from_table.tempfile, "TemporaryDirectory", denied)
    status, _, err = convert(path, *flags, out=tmp_path / "mine-v0")
    problem = f"[Errno 13] Permission denied: '{tmp_path}'"
    assert (status, err) == (1, f"from_table.py: failed: {problem}\n")
    assert [p.name for p in tmp_path.iterdir()] == ["small.csv"]


def test_a_terminal_without_unicode(tmp_path):
    """Characters that the terminal cannot show are replaced."""
    walk().rename(columns={"x": "água"}).to_csv(tmp_path / "log.csv", index=False)
    flags = [*WALK, "--observations", "água,ward", "--out", tmp_path / "mine-v0"]
    command = [sys.executable, SCRIPT, tmp_path / "log.csv", *flags]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and result.stderr == "" and "\n?gua " in result.stdout


@pytest.mark.parametrize("action", ["dose", "who"])
def test_training_on_the_dataset(action, tmp_path):
    """cql.py trains on the dataset, and its policy acts on a row of the log."""
    rows = patients(20)
    for row in rows:
        row["who"] = "doctor" if row["dose"] < 3 else "nurse"
    path = write_csv(tmp_path / "log.csv", rows)
    out = tmp_path / "mine-v0"
    converted(path, *CLINICAL, "--actions", action, out=out)
    flags = {
        "env": out,
        "eval_env": "none",
        "hidden_dim": 8,
        "batch_size": 16,
        "max_timesteps": 20,
        "resume": tmp_path / "run",
    }
    with redirect_stdout(io.StringIO()):
        assert cql.main([f"--{name}={flags[name]}" for name in flags]) == 0
    columns = json.loads((out / "columns.json").read_text())
    row = {"vital_hr": 80, "vital_bp": 120, "age": 50, "sex": "M", "ward": "B"}
    observation = from_table.encode(pd.DataFrame([row]), columns)
    assert observation.tolist() == [[80, 120, 50, 0, 1, 0]]
    policy = cql.load_policy(tmp_path / "run")
    if action == "dose":
        assert 0 <= policy(observation)[0, 0] <= 7.5
    else:
        assert columns["action_values"][policy(observation)[0]] in ("doctor", "nurse")


@pytest.mark.parametrize("missing", ["pandas", "pyarrow"])
def test_without_its_packages(missing, tmp_path):
    """One line names the command that installs a missing package.

    --help works without the package."""
    path = tmp_path / "log.parquet"
    pd.DataFrame(sessions(3)).to_parquet(path)
    code = f"import runpy, sys; sys.modules['{missing}'] = None; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT]
    flags = "--done done --observations hour --actions item --rewards click".split()
    arguments = [path, *flags, "--out", tmp_path / "no-v0"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"pip install {missing}==" in result.stderr
    result = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert (
        result.returncode == 0
        and "python scripts/from_table.py log.csv" in result.stdout
    )
    assert max(map(len, result.stdout.splitlines())) <= 80
