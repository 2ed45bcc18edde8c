"""Tests of scripts/plot.py, with statistics computed by hand."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import cql

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
import plot


def write(directory, name, rows):
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sum_of(alpha, seed, step):
    return alpha + seed + step


def made(directory, alphas=(0, 5), seeds=range(5), score=sum_of, **flags):
    """Make a run directory with four evaluations. Flags also make a config.yaml."""
    evaluations, metrics = [], []
    runs = [(seed, alpha) for seed in seeds for alpha in alphas]
    for step in (10, 20, 30, 40):
        for run, (seed, alpha) in enumerate(runs):
            row = {"step": step, "run": run, "seed": seed, "cql_alpha": alpha}
            row |= {"cql_temp": 1, "cql_target_action_gap": -1}
            row["return_mean"] = -score(alpha, seed, step)
            row["d4rl_normalized_score"] = score(alpha, seed, step)
            evaluations.append(row)
            row = {"step": step, "run": run}
            row |= {"average_qf1": 1, "average_qf2": 3}
            row |= {"cql_q1_rand": 0, "cql_q2_rand": 2}
            row |= {"cql_qf1_diff": -1, "cql_qf2_diff": -3}
            row["cql_q1_current_actions"] = 10 + seed + step
            row["cql_q2_current_actions"] = 20 + seed + step
            metrics.append(row)
    write(directory, "evaluations.csv", evaluations)
    write(directory, "metrics.csv", metrics)
    if flags:
        config = {"seed": list(seeds), "cql_alpha": list(alphas), **flags}
        (directory / "config.yaml").write_text(json.dumps(config))
    return directory


def unevaluated(directory, alphas=(0, 5), seeds=range(5), **flags):
    """Make a run directory like that of `--eval_env none`."""
    keys = {"cql_temp": 1.0, "cql_target_action_gap": -1.0}
    made(directory, alphas, seeds, **{**keys, **flags})
    (directory / "evaluations.csv").unlink()
    return directory


def groups(*directories):
    """Return the number of runs of each group by its label, in order."""
    _, evaluations, _ = plot.read_runs(list(directories))
    return evaluations.groupby("group", sort=False)["id"].nunique().to_dict()


def test_interquartile_mean():
    mean = plot.interquartile_mean
    assert mean(np.array([100.0, 1, 2, 3, -50])) == 2  # without one at each end
    assert mean(np.array([4.0, 1, 7])) == 4  # a quarter of three is no value
    values = np.array([9.0, 1, 2, 3, 4, 5, 6, 7])
    assert mean(values) == np.mean([3, 4, 5, 6])
    np.testing.assert_array_equal(mean(np.stack([values, -values])), [4.5, -4.5])


def test_interval():
    """The interval of a mean over many values is the normal one.

    Equal values give a width of zero, and too few values no interval."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = plot.interval(values, plot.mean)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert plot.interval([2.0] * 5, plot.interquartile_mean) == (2.0, 2.0)
    assert np.isnan(plot.interval([2.0] * 4, plot.mean)).all()


def test_few_seeds_are_drawn_as_lines():
    steps = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 6.0]}, index=[10, 20])
    _, panel = plot.plt.subplots()
    plot.draw(panel, steps, "C0")
    assert ys(panel.lines) == [[1, 2], [3, 6], [2, 4]]


def test_figures_of_an_earlier_command_are_deleted(tmp_path):
    out = str(tmp_path / "out")
    assert plot.main([str(made(tmp_path / "two")), "--out", out]) == 0
    assert (tmp_path / "out" / "weights.png").exists()
    one = str(made(tmp_path / "one", (5,)))
    assert plot.main([one, "--out", out]) == 0
    assert not (tmp_path / "out" / "weights.png").exists()


def test_interval_of_a_run_that_stopped():
    """The mean and the interval are over the runs that have a value at the step."""
    values = np.array([[1.0, 2, 3, 4, 5], [1, 2, np.nan, np.nan, np.nan]])
    low, high = plot.interval(values, plot.mean)
    assert plot.mean(values).tolist() == [3, 1.5]
    assert (low[1], high[1]) == (1, 2)


def test_values_of_a_group(tmp_path):
    _, evaluations, metrics = plot.read_runs([made(tmp_path / "one")])
    scores = evaluations[evaluations["group"] == "cql_alpha 5"]
    values = plot.over_runs(scores, plot.SCORE)
    assert values.index.tolist() == [10, 20, 30, 40]
    assert values.to_numpy()[1].tolist() == [25, 26, 27, 28, 29]
    q = metrics[metrics["group"] == "cql_alpha 5"]
    assert plot.over_runs(q, "policy").to_numpy()[0].tolist() == [25, 26, 27, 28, 29]
    for name, value in {"data": 2, "uniform": 1, "gap": -2}.items():
        assert (q[name] == value).all(), name


def test_labels_name_the_flags_that_differ(tmp_path):
    one = made(tmp_path / "one", discount=0.9, cal_ql=True)
    assert groups(one) == {"cql_alpha 0": 5, "cql_alpha 5": 5}
    five = made(tmp_path / "five", alphas=(5,), discount=0.9)
    none = made(tmp_path / "none", alphas=(0,), discount=0.9)
    assert list(groups(five, none)) == ["cql_alpha 0", "cql_alpha 5"]
    assert groups(made(tmp_path / "alone", alphas=(5,))) == {"alone": 5}
    other = made(tmp_path / "two", (5,), discount=0.9, cal_ql=False)
    assert groups(one, other) == {
        "cal_ql true, cql_alpha 0": 5,
        "cal_ql true, cql_alpha 5": 5,
        "cal_ql false, cql_alpha 5": 5,
    }
    older = made(tmp_path / "three", (5,), discount=0.9)
    assert "cal_ql unset" in groups(other, older)
    unlike = made(tmp_path / "four", (5,), discount=0.8, cal_ql=True, qf_lr=1)
    # Three flags differ, which would make a long label.
    assert list(groups(other, unlike)) == [str(other), str(unlike)]


def test_directories_of_the_same_settings_are_one_group(tmp_path):
    paths = []
    for seed, discount in ((4, 0.5), (5, 0.5), (6, 0.9)):
        path = tmp_path / f"s{seed}"
        paths.append(made(path, (1,), (seed,), discount=discount, resume=str(path)))
    assert groups(*paths) == {"discount 0.5": 2, "discount 0.9": 1}


def test_the_same_seed_twice(tmp_path, capsys):
    """A seed in two directories of the same settings is refused.

    It would count as two seeds."""
    one = made(tmp_path / "one", (1,), (0, 1), discount=0.5)
    two = made(tmp_path / "two", (1,), (1, 2), discount=0.5)
    assert plot.main([str(one), str(two), "--out", str(tmp_path / "out")]) == 2
    problem = "both hold seed 1 of the same settings; pass one of them"
    assert capsys.readouterr().err == f"plot.py: error: {one} and {two}: {problem}\n"
    made(two, (1,), (1, 2), discount=0.6)
    assert groups(one, two) == {"discount 0.5": 2, "discount 0.6": 2}


def test_an_incomplete_row_is_left_out(tmp_path):
    """A last row without its newline is left out, also if all its columns are there."""
    directory = made(tmp_path / "one", (1,), (0,))
    for incomplete in ("50,0,0,1", "50,0,0,1,1,-1,-51,5"):
        with open(directory / "evaluations.csv", "a") as file:
            file.write(incomplete)
        _, evaluations, _ = plot.read_runs([directory])
        assert evaluations["step"].tolist() == [10, 20, 30, 40]
        assert evaluations["group"].unique().tolist() == ["one"]
        made(directory, (1,), (0,))


def test_runs_with_different_numbers_of_critics(tmp_path):
    """Q is the mean over the critics that the run has."""
    two = made(tmp_path / "two", (1,), (0,), n_critics=2)
    three = made(tmp_path / "three", (1,), (0,), n_critics=3)
    table = pd.read_csv(three / "metrics.csv").assign(average_qf3=5)
    table.to_csv(three / "metrics.csv", index=False)
    _, _, metrics = plot.read_runs([two, three])
    assert metrics.groupby("group")["data"].unique().map(list).to_dict() == {
        "n_critics 2": [2],
        "n_critics 3": [3],
    }


def test_a_sweeps_directory(tmp_path):
    """A sweep's directory stands for its trials, grouped by their flags.

    If only its joined tables exist, these are used."""
    sweep = made(tmp_path / "sweep", (1, 5), seeds=(0, 1))
    assert groups(sweep) == {"cql_alpha 1": 2, "cql_alpha 5": 2}
    for alpha in (1, 5):
        trial = sweep / f"cql_alpha_{alpha}"
        trial.mkdir()
        (trial / "config.yaml").write_text(json.dumps({"cql_alpha": alpha}))
    assert groups(sweep) == {"cql_alpha 1": 2, "cql_alpha 5": 2}
    for alpha in (1, 5):
        made(sweep / f"cql_alpha_{alpha}", (alpha,), (0, 1), qf_lr=alpha / 10)
    expected = {"qf_lr 0.1, cql_alpha 1": 2, "qf_lr 0.5, cql_alpha 5": 2}
    assert groups(sweep) == expected
    for name in ("evaluations.csv", "metrics.csv"):  # a wandb sweep has no joined tables
        (sweep / name).unlink()
    assert groups(sweep) == expected


def test_table(tmp_path):
    _, evaluations, _ = plot.read_runs([made(tmp_path / "one")])
    row = plot.tabulate(evaluations, plot.measure(evaluations)).iloc[1]
    assert row["measure"] == "d4rl_normalized_score" and row["seeds"] == 5
    assert row["last"] == 5 + 2 + 40 and row["last three"] == 5 + 2 + 30
    assert row["best"] == row["last"]
    assert 45 < row["last low"] < row["last"] < row["last high"] < 49


def test_runs_that_stopped_early(tmp_path):
    """A stopped run is drawn until it stopped, and the table only counts it.

    The table also counts a run without any evaluation."""
    directory = made(tmp_path / "one", (1,), discount=1)
    config = json.loads((directory / "config.yaml").read_text())
    config["seed"] = [0, 1, 2, 3, 4, 5]
    (directory / "config.yaml").write_text(json.dumps(config))
    for name in ("evaluations.csv", "metrics.csv"):
        table = pd.read_csv(directory / name)
        gone = (table["run"] == 4) & (table["step"] >= 30)
        table[~gone].to_csv(directory / name, index=False)
    _, evaluations, _ = plot.read_runs([directory])
    row = plot.tabulate(evaluations, plot.SCORE).iloc[0]
    assert (row["seeds"], row["stopped"]) == (4, 2)
    assert row["last"] == 1 + 1.5 + 40 and np.isnan(row["last low"])
    values = plot.over_runs(evaluations, plot.SCORE).to_numpy()
    assert plot.mean(values).tolist() == [13, 23, 1 + 1.5 + 30, 42.5]
    assert plot.main([str(directory), "--out", str(tmp_path / "out")]) == 0
    assert "| one | 4 | 2 | 42.5 |" in (tmp_path / "out" / "table.md").read_text()


def lines_drawn(monkeypatch):
    """Collect the lines of means that plot.save gets.

    The result has by file name a list for each panel. Lines of single seeds and error
    bars are not collected."""
    drawn = {}

    def spy(figure, path):
        drawn[path.name] = []
        for panel in figure.axes:
            means = []
            for line in panel.lines:
                mean = line.get_alpha() is None and line.get_marker() != "_"
                if mean and len(line.get_xdata()):
                    means.append(line)
            drawn[path.name].append(means)
        save(figure, path)

    save = plot.save
    monkeypatch.setattr(plot, "save", spy)
    return drawn


def xs(panel):
    return [list(line.get_xdata()) for line in panel]


def ys(panel):
    return [list(line.get_ydata()) for line in panel]


def test_what_is_drawn(tmp_path, monkeypatch, capsys):
    drawn = lines_drawn(monkeypatch)
    out = tmp_path / "out"
    argv = [str(made(tmp_path / "run")), "--out", str(out), "--data-score", "30"]
    assert plot.main(argv) == 0
    (curves,) = drawn["curves.png"]
    assert xs(curves)[:2] == [[10, 20, 30, 40]] * 2
    assert ys(curves) == [[12, 22, 32, 42], [17, 27, 37, 47], [30, 30]]
    q, difference, gap = drawn["drift.png"]
    assert ys(q) == [[27, 37, 47, 57]] * 2
    assert ys(difference) == [[25, 35, 45, 55], [-1] * 4] * 2  # policy, then uniform
    assert ys(gap) == [[-2] * 4] * 2
    scores, ends = drawn["weights.png"]
    assert ys(scores) == [[32, 37]]
    assert ys(ends) == [[57, 57], [2, 2]]

    names = {"curves.png", "drift.png", "weights.png", "table.md", "table.csv"}
    assert {path.name for path in out.iterdir()} == names
    for name in names:
        assert (out / name).stat().st_size > 100
    printed = capsys.readouterr().out
    assert printed == (out / "table.md").read_text() + f"figures and tables: {out}\n"
    assert "| cql_alpha 5 | 5 | 47.0 [45.7, 48.7] |" in printed
    assert pd.read_csv(out / "table.csv")["last three"].tolist() == [32, 37]


def files_in(directory):
    return {path.name for path in directory.iterdir()}


def test_a_run_without_evaluations(tmp_path, monkeypatch, capsys):
    """Drift and the Q panel of weights.png are drawn, and a line says why no others."""
    drawn = lines_drawn(monkeypatch)
    out = tmp_path / "out"
    assert plot.main([str(made(tmp_path / "before")), "--out", str(out)]) == 0
    directory = unevaluated(tmp_path / "run", (0.0, 5.0))
    capsys.readouterr()
    assert plot.main([str(directory), "--out", str(out)]) == 0
    assert files_in(out) == {"drift.png", "weights.png"}
    assert ys(drawn["drift.png"][0]) == [[27, 37, 47, 57]] * 2
    (ends,) = drawn["weights.png"]
    assert ys(ends) == [[57, 57], [2, 2]]
    assert capsys.readouterr().out == (
        "drawn: drift.png and weights.png; "
        "no curves.png: no run has been evaluated, so there is no table either\n"
        f"figures and tables: {out}\n"
    )


def test_one_seed_and_weight_without_evaluations(tmp_path, capsys):
    directory = unevaluated(tmp_path / "run", (5,), (3,))
    text = json.dumps(
        {"seed": 3, "cql_alpha": 5, "cql_temp": 1, "cql_target_action_gap": -1}
    )
    (directory / "config.yaml").write_text(text)
    runs, _, metrics = plot.read_runs([directory])
    assert runs[["seed", "group"]].values.tolist() == [[3, "run"]]
    assert metrics["policy"].tolist() == [28, 38, 48, 58]
    assert plot.main([str(directory), "--out", str(tmp_path / "out")]) == 0
    assert files_in(tmp_path / "out") == {"drift.png"}
    assert capsys.readouterr().out.startswith("drawn: drift.png; no curves.png: ")


def test_labels_without_evaluations_are_those_with_them(tmp_path):
    """The runs of config.yaml are numbered as cql.py numbers them."""
    lists = {"seed": [0, 1], "cql_alpha": [0.0, 5.0], "cql_temp": [1.0, 2.0]}
    config = cql.TrainConfig(**lists, cql_target_action_gap=-1.0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cql.asdict(config)))
    planned = plot.planned_runs(tmp_path)
    columns = ["seed", *plot.KEYS]
    expected = [[run[key] for key in columns] for run in cql.product_of_runs(config)]
    assert planned[columns].values.tolist() == expected
    assert planned["id"].tolist() == [f"{tmp_path}/{run}" for run in range(8)]


def test_runs_with_and_without_evaluations(tmp_path, monkeypatch, capsys):
    """A run without evaluations is in drift.png and in the Q panel of weights.png.

    Its color is the same in both figures."""
    drawn = lines_drawn(monkeypatch)
    evaluated = str(made(tmp_path / "a", (0,), discount=0.5))
    other = str(unevaluated(tmp_path / "b", (1,), discount=0.9))
    out = tmp_path / "out"
    assert plot.main([evaluated, other, "--out", str(out)]) == 0
    assert len(drawn["curves.png"][0]) == 1 and len(drawn["drift.png"][0]) == 2
    scores, ends = drawn["weights.png"]
    assert xs(scores) == [[0]] and xs(ends) == [[-0.1], [0.1], [0.9], [1.1]]
    colors = [line.get_color() for line in drawn["drift.png"][0]]
    assert drawn["curves.png"][0][0].get_color() == colors[0] != colors[1]
    printed = capsys.readouterr().out
    assert f"not evaluated, so not in the table: {other}\n" in printed
    assert len(pd.read_csv(out / "table.csv")) == 1
    assert groups(Path(evaluated), Path(other)) == {"discount 0.5, cql_alpha 0": 5}


def test_a_run_that_was_begun_again(tmp_path, capsys):
    """An attempt without evaluations is left out if another run has its seeds.

    Two such attempts are refused."""
    first = unevaluated(tmp_path / "first", (1,), (0, 1), discount=1)
    second = made(tmp_path / "second", (1,), (0, 1), discount=1)
    runs, _, _ = plot.read_runs([tmp_path])
    assert runs["origin"].unique().tolist() == [str(second)]
    (second / "evaluations.csv").unlink()
    unevaluated(second, (1,), (0, 1), discount=1)
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{first} and {second}: both hold seed 0 of the same settings" in error


def test_other_flags_have_different_colors_in_weights_png(tmp_path, monkeypatch):
    drawn = lines_drawn(monkeypatch)
    directories = []
    for qf_lr in (1, 2):
        directories.append(str(made(tmp_path / str(qf_lr), (0, qf_lr), qf_lr=qf_lr)))
    assert plot.main([*directories, "--out", str(tmp_path / "out")]) == 0
    scores, _ = drawn["weights.png"]
    assert len({line.get_color() for line in scores}) == 2
    assert xs(scores) == [[0, 1], [0, 2]]
    assert ys(scores) == [[32, 33], [32, 34]]


def test_diverged_runs(tmp_path, monkeypatch):
    """The final Q of a diverged run is its last one that is not NaN.

    A run that was never evaluated is left out."""
    drawn = lines_drawn(monkeypatch)
    directory = made(tmp_path / "run", (0, 5), (0, 1))
    table = pd.read_csv(directory / "metrics.csv")
    gone = (table["run"] == 2) & (table["step"] >= 30)
    table.loc[gone, "cql_q1_current_actions"] = np.nan
    table.loc[table["run"] == 1, "cql_q2_current_actions"] = 1e9
    table.to_csv(directory / "metrics.csv", index=False)
    evaluations = pd.read_csv(directory / "evaluations.csv")
    kept = evaluations["run"] != 1
    evaluations[kept].to_csv(directory / "evaluations.csv", index=False)
    assert plot.main([str(directory), "--out", str(tmp_path / "out")]) == 0
    _, ends = drawn["weights.png"]
    assert ys(ends)[0] == [(55 + 36) / 2, 56]
    assert ys(drawn["drift.png"][0]) == [[25.5, 35.5, 45, 55], [26, 36, 46, 56]]


@pytest.mark.filterwarnings("error")
def test_steps_without_a_number(tmp_path, monkeypatch):
    """A step at which all seeds are NaN is missing in the line, without a warning."""
    drawn = lines_drawn(monkeypatch)
    directory = made(tmp_path / "run", (0, 5))
    table = pd.read_csv(directory / "metrics.csv")
    table.loc[table["step"] == 20, "cql_q1_current_actions"] = np.nan
    table["cql_qf1_diff"] = np.nan
    table.to_csv(directory / "metrics.csv", index=False)
    assert plot.main([str(directory), "--out", str(tmp_path / "out")]) == 0
    q, _, gap = drawn["drift.png"]
    np.testing.assert_array_equal(ys(q), [[27, np.nan, 47, 57]] * 2)
    assert np.isnan(ys(gap)).all()


def test_steps_are_named(tmp_path):
    def name(**flags):
        directory = made(tmp_path / str(flags), (1,), (0,), **flags)
        return plot.name_steps(plot.read_runs([directory])[0])

    assert name() == name(online_iterations=0, max_timesteps=9) == "gradient updates"
    assert name(online_iterations=9, max_timesteps=0) == "environment steps"
    both = "gradient updates, then environment steps"
    assert name(online_iterations=9, max_timesteps=9) == both


def test_scales(tmp_path):
    """The axis is logarithmic only if the largest value is far above the median."""
    figure, panel = plot.plt.subplots()
    plot.choose_scale(panel, pd.DataFrame({"q": [-3, 0, 900, 1200]}))
    assert panel.get_yscale() == "linear"
    plot.choose_scale(panel, pd.DataFrame({"q": [-3, 1, 20, 1e6]}))
    assert panel.get_yscale() == "symlog"
    plot.plt.close(figure)


def test_returns_are_shown_if_a_score_is_missing(tmp_path):
    directory = made(tmp_path / "run", alphas=(1,))
    table = pd.read_csv(directory / "evaluations.csv")
    table.loc[3, "d4rl_normalized_score"] = np.nan
    table.to_csv(directory / "evaluations.csv", index=False)
    (directory / "metrics.csv").unlink()  # a run without updates has no metrics
    assert plot.main([str(directory), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["measure"].tolist() == ["return_mean"]
    assert table["last"].tolist() == [-43]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"curves.png"}


def test_invalid_input_gives_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(Path("run"))
    Path("empty").mkdir()
    Path("begun").mkdir()
    (Path("begun") / "evaluations.csv").touch()
    write(Path("foreign"), "evaluations.csv", [{"a": 1}])
    write(Path("short"), "evaluations.csv", [{"step": 1, "run": 0}])
    made(Path("blank"), discount=1)
    (Path("blank") / "config.yaml").write_text("")
    made(Path("broken"), discount=1)
    (Path("broken") / "config.yaml").write_text("a: [1,\n")
    Path("file").touch()
    Path("full/table.csv").mkdir(parents=True)
    Path("folder/evaluations.csv").mkdir(parents=True)
    Path("onlyconfig").mkdir()
    made(Path("ragged"))
    (Path("ragged") / "evaluations.csv").write_text("step,run\n1,0\n2,0,5,6\n")
    (Path("onlyconfig") / "config.yaml").write_text("seed: 0")
    write(Path("moved"), "metrics.csv", [{"step": 1, "run": 0}])
    unevaluated(Path("unknown"), discount=1)
    write(Path("unknown"), "metrics.csv", [{"step": 1, "run": 0}])
    cases = {
        "empty: neither evaluations.csv nor metrics.csv; pass": ["empty"],
        "nothing: neither evaluations.csv nor metrics.csv; pass": ["nothing"],
        "onlyconfig: neither evaluations.csv nor metrics.csv; pass": ["onlyconfig"],
        "begun: no rows in evaluations.csv or metrics.csv yet": ["begun"],
        "moved: no evaluations, and no seed in config.yaml": ["moved"],
        "unknown: no evaluations, and no Q of policy actions": ["unknown"],
        "folder/evaluations.csv: .*directory": ["folder"],
        "ragged/evaluations.csv: .*line 3": ["ragged"],
        "run: given twice; pass each directory once": ["run", "run/"],
        "foreign/evaluations.csv: column step is missing": ["foreign"],
        "short/evaluations.csv: column seed is missing": ["short"],
        "blank/config.yaml: not a mapping; expected a config": ["blank"],
        "broken/config.yaml: not a mapping; expected a config": ["broken"],
        "--data-score nan: must be a finite number": ["run", "--data-score", "nan"],
        "--out file: cannot be written .*exists": ["run", "--out", "file"],
        "--out file/x: cannot be written .*Not a dir": ["run", "--out", "file/x"],
        "--out /proc/x: cannot be written": ["run", "--out", "/proc/x"],
        "--out full: .*Is a directory: 'full/table.csv'": ["run", "--out", "full"],
        "unrecognized arguments: --color": ["run", "--color"],
        "argument --out: expected one argument": ["run", "--out"],
    }
    before = sorted(tmp_path.rglob("*"))
    for words, argv in cases.items():
        assert plot.main(argv) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(f"plot.py: error: .*{words}.*\n", error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_the_terminal_cannot_show(tmp_path):
    """The table has them, and the terminal question marks."""
    directories = [made(tmp_path / name, (1,), (0,)) for name in ("跑", "é")]
    command = [sys.executable, plot.__file__, *directories, "--out", tmp_path / "out"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "/? | 1 |" in result.stdout
    assert "/跑 | 1 |" in (tmp_path / "out" / "table.md").read_text("utf-8")


def test_without_its_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(plot.__file__)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch("plot.py: error: .*pandas.*: pip install .*\n", error), error
