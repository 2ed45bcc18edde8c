"""benchmarks/plot.py: its statistics against numbers worked out by hand, its groups and
its files."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "plot.py"
spec = importlib.util.spec_from_file_location("plot", PATH)
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def write(directory, name, rows):
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def made(directory, alphas=(0, 5), seeds=range(5), score=lambda a, s, t: a + s + t):
    evaluations, metrics = [], []
    runs = [(seed, alpha) for seed in seeds for alpha in alphas]
    for step in (10, 20, 30, 40):
        for run, (seed, alpha) in enumerate(runs):
            keys = {"step": step, "run": run}
            rest = {"seed": seed, "cql_alpha": alpha, "cql_temp": 1}
            rest |= {
                "cql_target_action_gap": -1,
                "return_mean": -score(alpha, seed, step),
            }
            value = score(alpha, seed, step)
            evaluations.append({**keys, **rest, "d4rl_normalized_score": value})
            q = {"average_qf1": 1, "average_qf2": 3, "cql_q1_rand": 0, "cql_q2_rand": 2}
            q |= {
                "cql_q1_current_actions": 10 + seed,
                "cql_q2_current_actions": 20 + seed,
            }
            metrics.append({**keys, **q, "cql_qf1_diff": -1, "cql_qf2_diff": -3})
    write(directory, "evaluations.csv", evaluations)
    write(directory, "metrics.csv", metrics)
    return directory


def test_interquartile_mean():
    mean = plot.interquartile_mean
    assert mean(np.array([100.0, 1, 2, 3, -50])) == 2  # one goes at either end
    assert mean(np.array([4.0, 1, 7])) == 4  # too few to leave any out
    values = np.array([9.0, 1, 2, 3, 4, 5, 6, 7])
    assert mean(values) == np.mean([3, 4, 5, 6])
    np.testing.assert_array_equal(mean(np.stack([values, -values])), [4.5, -4.5])


def test_interval():
    """Of a mean over many: the normal one. Of equal values: no width."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = plot.interval(values, lambda draws: draws.mean(-1))
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert plot.interval([2.0, 2.0, 2.0], plot.interquartile_mean) == (2.0, 2.0)


def test_groups_and_table(tmp_path):
    directory = made(tmp_path / "one")
    groups = plot.read_groups([directory])
    assert [group.label for group in groups] == ["cql_alpha 0", "cql_alpha 5"]
    assert [len(group.evaluations) for group in groups] == [5, 5]
    row = plot.tabulate(groups, plot.measure(groups))[1]
    assert row["measure"] == "d4rl_normalized_score" and row["seeds"] == 5
    assert row["last"] == 5 + 2 + 40 and row["last three"] == 5 + 2 + 30
    assert row["best"] == row["last"] and row["best low"] < row["best"]
    q = plot.q_of(groups[1])[3]
    assert q["policy"][0] == 15 + 3 and q["data"][0] == 2 and q["drift"][0] == 16
    assert q["gap"][0] == -2 and q["uniform"][0] == 1
    two = plot.read_groups([directory, made(tmp_path / "two", alphas=(5,))])
    assert [g.label for g in two] == [
        *("one, cql_alpha 0", "one, cql_alpha 5", "two, cql_alpha 5")
    ]


def config(directory, **flags):
    (directory / "config.yaml").write_text(json.dumps({"cql_alpha": 1, **flags}))
    return directory


def test_directories_of_the_same_settings_are_one_group(tmp_path):
    runs = [(4, 0.5), (5, 0.5), (6, 0.9)]
    paths = [made(tmp_path / f"s{seed}", (1,), (seed,)) for seed, _ in runs]
    for path, (seed, discount) in zip(paths, runs):
        config(path, seed=seed, resume=str(path), discount=discount)
    groups = plot.read_groups(paths)
    assert [(g.label, len(g.evaluations)) for g in groups] == [("s4", 2), ("s6", 1)]


def test_runs_that_stopped_early(tmp_path):
    """Drawn as far as they came, in the table only counted; so is one without any."""
    directory = config(made(tmp_path / "one", (1,)), seed=[0, 1, 2, 3, 4, 5])
    for name in ("evaluations.csv", "metrics.csv"):
        head, *lines = (directory / name).read_text().splitlines()
        lines = [x for x in lines if not x.startswith(("30,4,", "40,4,"))]
        (directory / name).write_text("\n".join([head, *lines]))
    groups = plot.read_groups([directory])
    [row] = plot.tabulate(groups, plot.measure(groups))
    assert (row["seeds"], row["stopped"]) == (4, 2)
    assert row["last"] == 1 + 1.5 + 40 and np.isnan(row["last low"])
    steps, values = plot.joined(groups[0].evaluations, "d4rl_normalized_score")
    assert steps.tolist() == [10, 20, 30, 40]
    assert plot.mean(values).tolist() == [1 + 2 + 10, 1 + 2 + 20, 1 + 1.5 + 30, 42.5]
    plot.main([str(directory), "--out", str(tmp_path / "out")])
    assert "| one | 4 | 2 | 42.5 |" in (tmp_path / "out" / "table.md").read_text()


def test_files(tmp_path, capsys):
    argv = [str(made(tmp_path / "run")), "--out", str(tmp_path / "out")]
    plot.main([*argv, "--data-score", "30"])
    names = {"curves.png", "drift.png", "weights.png", "table.md", "table.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "table.md").read_text()
    assert printed.count("\n") == 4 and "| cql_alpha 5 | 5 | 47.0 [" in printed
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["last three"]) for row in rows] == [32, 37]


def test_without_scores_returns_count(tmp_path, capsys):
    one_alpha = made(tmp_path / "run", alphas=(1,), score=lambda *_: float("nan"))
    text = (one_alpha / "evaluations.csv").read_text().replace("nan", "")
    (one_alpha / "evaluations.csv").write_text(text.replace(",,", ",7,"))
    plot.main([str(one_alpha), "--out", str(tmp_path / "out")])
    assert "return_mean" in (tmp_path / "out" / "table.csv").read_text()
    assert not (tmp_path / "out" / "weights.png").exists()
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "no evaluations.csv there" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(one_alpha), f"{one_alpha}/"])
    assert "a directory twice" in capsys.readouterr().err
    (one_alpha / "metrics.csv").unlink()  # of a run of no updates
    plot.main([str(one_alpha), "--out", str(tmp_path / "bare")])
    assert not (tmp_path / "bare" / "drift.png").exists()
