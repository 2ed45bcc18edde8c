"""Tests of scripts/sweep.py.

Killed trials and lost machines are tested on a real Ray cluster of two nodes."""

import json
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from make_data import arguments, run, toy_dataset

import cql

sys.path.insert(0, str(Path(cql.__file__).parent / "scripts"))
import sweep

SCRIPT = Path(sweep.__file__)
PRODUCT = {"seed": [0, 1], "cql_alpha": [1, 5]}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    return toy_dataset(root, ref_min_score=-5.0, ref_max_score=15.0)


def plan(line, per_trial=(), directory=Path("/sweep")):
    return sweep.plan(shlex.split(line), list(per_trial), directory)


def test_a_product_is_split_into_trials():
    """Runs have the numbers that one process gives them.

    Flags that are not swept are passed on unchanged."""
    trials = plan("--seed '[3,4]' --cql_alpha='[1,0.5]' --cql_lagrange --env data")
    assert [trial.name for trial in trials] == [
        "seed_3-cql_alpha_1",
        "seed_3-cql_alpha_0.5",
        "seed_4-cql_alpha_1",
        "seed_4-cql_alpha_0.5",
    ]
    assert [trial.numbers for trial in trials] == [[0], [1], [2], [3]]
    assert trials[1].command == [
        "--cql_lagrange",
        "--env",
        "data",
        "--seed=3",
        "--cql_alpha=0.5",
        "--resume=/sweep/seed_3-cql_alpha_0.5",
    ]


def test_flags_of_one_trial_stay_stacked():
    """The runs of a stacked trial have the numbers that one process gives them."""
    line = "--env data --seed '[0,1,2]' --cql_alpha '[1,5]' --cql_temp '[1,2]'"
    trials = plan(line, ["seed", "cql_temp"])
    whole = cql.product_of_runs(cql.read_config(shlex.split(line)))
    assert len(trials) == 2
    for trial in trials:
        runs = cql.product_of_runs(cql.read_config(trial.command))
        assert len(runs) == len(trial.numbers) == 6
        for mine, number in zip(runs, trial.numbers):
            assert {**mine, "run": number} == whole[number]


def test_any_other_flag_may_be_swept(tmp_path):
    """A list is swept also in a config file.

    A list of env is one dataset, so it is not swept."""
    (tmp_path / "c.yaml").write_text("qf_lr: [0.001, 0.0001]\nenv: [a, b]\nseed: [0, 1]")
    trials = plan(f"--config_path {tmp_path}/c.yaml --penalty '[mean, logsumexp]'")
    assert len(trials) == 8
    last = cql.read_config(trials[-1].command)
    assert (last.qf_lr, last.penalty, last.seed) == (1e-4, "logsumexp", 1)
    assert last.env == ["a", "b"]
    assert trials[-1].extra == {"qf_lr": 1e-4, "penalty": "logsumexp"}


@pytest.mark.parametrize(
    "line, fragment",
    [
        ("--lok_freq 3", "log_freq"),
        ("--seed '[0,1]' --cql_alpha -1", "--cql_alpha"),
        ("--qf_lr '[0.1,x]'", "--qf_lr"),
        ("--resume there", "--resume"),
        ("--cql_alpha '[1,1.0]'", "--cql_alpha"),
        ("--qf_lr '[1e-3,0.001]'", "--qf_lr"),
        ("--seed '[]'", "--seed"),
        ("--penalty '[mean'", "--penalty"),
        ("--cql_target_action_gap '[1,2]'", "--cql_lagrange"),
        ("--cpus many", "--cpus"),
        ("--cpus -1", "--cpus -1: must be finite and at least 0"),
        ("--cpus nan", "--cpus nan: must be finite and at least 0"),
        ("--gpus -0.5", "--gpus -0.5: must be finite and at least 0"),
        ("--dir file", "/file: cannot be written"),
        ("--dir file/x", "/file/x: cannot be written"),
        ("--dir /proc/x", "/proc/x: cannot be written"),
        (f"--dir {'中' * 90}", "File name too long"),
        ("--config_path nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_invalid_flags_give_one_line(line, fragment, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    argv = ["--dir", str(tmp_path / "sweep"), *shlex.split(line)]
    assert sweep.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("sweep.py: error: ") and error.count("\n") == 1
    assert fragment in error and not (tmp_path / "sweep").exists()


def test_long_names_are_cut_by_bytes():
    """Files named after a trial exist, and two long names stay different."""
    flags = " ".join(f"--{name} [0.001,0.002]" for name in ("qf_lr", "policy_lr"))
    numbers = "discount soft_target_update_rate alpha_multiplier".split()
    numbers += "policy_log_std_multiplier reward_scale reward_bias".split()
    numbers += "cql_clip_diff_min exploration_epsilon".split()
    flags += "".join(f" --{name} [0.123456789]" for name in numbers)
    trials = plan(f"--env data {flags} --seed [0,1]")
    names = {trial.name for trial in trials}
    assert len(names) == len(trials) == 8
    for trial in trials:
        assert 200 < len(trial.end_file().name.encode()) <= 255
        assert trial.directory.name == trial.name
        assert trial.name.startswith("qf_lr_0.00")
    assert [trial.name for trial in plan(f"--env data {flags} --seed [0,1]")] == (
        [trial.name for trial in trials]
    )
    assert sweep.short_name("中" * 66) == "中" * 66
    cut = sweep.short_name("中" * 67 + "x")
    assert cut.startswith("中" * 66 + "-") and len(cut.encode()) == 198 + 9


def test_per_trial_names_a_swept_flag(tmp_path, capsys):
    argv = ["--dir", str(tmp_path / "sweep"), "--per_trial", "qf_lr"]
    assert sweep.main(argv) == 2
    assert "--per_trial qf_lr" in capsys.readouterr().err


def test_an_end_counts_for_the_same_command_only(tmp_path):
    """A trial that ended has to run again if the command trains it for longer."""
    (trial,) = plan("--env data --max_timesteps 10", directory=tmp_path)
    trial.write_end(3)
    assert trial.end() == 3
    (longer,) = plan("--env data --max_timesteps 20", directory=tmp_path)
    assert longer.end_file() == trial.end_file() and longer.end() is None
    trial.write_end(sweep.STOPPED)
    assert trial.end(asha=True) == sweep.STOPPED and trial.end(asha=False) is None


def test_an_end_counts_for_the_same_config_file_only(tmp_path):
    """A trial has to run again if the config file changes.

    A run's config.yaml, which holds `resume: null`, is accepted."""
    file = tmp_path / "config.yaml"
    file.write_text("resume: null\nmax_timesteps: 10\nenv: data")
    (trial,) = plan(f"--config_path {file}", directory=tmp_path / "sweep")
    (tmp_path / "sweep").mkdir()
    trial.write_end(0)
    file.write_text("max_timesteps: 20\nenv: data")
    (again,) = plan(f"--config_path {file}", directory=tmp_path / "sweep")
    assert trial.end() == 0 and again.end() is None


def test_a_loaded_model_s_lists_are_split(toy, tmp_path):
    assert run(env=toy, resume=tmp_path / "model", seed=[0, 1])[0] == 0
    trials = plan(f"--load_model {tmp_path / 'model'} --cql_alpha '[1,5]'", ["seed"])
    assert [trial.numbers for trial in trials] == [[0, 2], [1, 3]]


def test_an_alias_is_swept_like_its_flag():
    trials = plan("--env data --offline_iterations '[10,20]'")
    configs = [cql.read_config(trial.command) for trial in trials]
    assert [config.max_timesteps for config in configs] == [10, 20]


def test_a_run_directory_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("seed: 0")
    assert sweep.main(["--dir", str(tmp_path), "--env", "data"]) == 2
    assert "--dir" in capsys.readouterr().err


def test_tables_that_cannot_be_written(tmp_path, capsys):
    """A finished sweep only joins its tables, for which Ray is not needed."""
    argv = ["--dir", str(tmp_path), "--env", "data"]
    (trial,) = plan("--env data", directory=tmp_path)
    trial.directory.mkdir()
    (trial.directory / "metrics.csv").write_text("step,run\n1,0\n")
    trial.write_end(0)
    (tmp_path / "metrics.csv").mkdir()
    assert sweep.main(argv) == 1
    error = capsys.readouterr().err
    where = f"cannot write the tables in {tmp_path}"
    assert re.fullmatch(f"sweep.py: failed: {where}: .*Is a directory.*\n", error)


def test_without_ray(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch("sweep.py: error: .*ray.*: pip install -r .*\n", error), error


def test_tables_are_joined_by_step_and_number(tmp_path):
    trials = plan("--env data --seed '[0,1]' --qf_lr '[0.1,0.2]'", ["seed"], tmp_path)
    for trial, steps in zip(trials, (["10", "5"], ["5"])):
        trial.directory.mkdir()
        lines = ["step,run,q"]
        lines += [f"{step},{r},0.{step}{r}" for step in steps for r in (0, 1)]
        (trial.directory / "metrics.csv").write_text("\n".join(lines))
    table = sweep.join_tables(trials, "metrics.csv")
    rows = [tuple(row) for row in table.itertuples(index=False)]
    assert rows == [
        (5, 0, "0.50", "0.1"),
        (5, 1, "0.51", "0.1"),
        (5, 2, "0.50", "0.2"),
        (5, 3, "0.51", "0.2"),
        (10, 0, "0.100", "0.1"),
        (10, 1, "0.101", "0.1"),
    ]


def test_the_summary_has_a_row_for_each_combination():
    columns = "run step cql_alpha cql_temp cql_target_action_gap".split()
    rows = [(0, 5, 1, 1, -1, 2.0), (1, 5, 9, 1, -1, 7.0), (2, 5, 1, 1, -1, 3.0)]
    rows += [(0, 10, 1, 1, -1, 6.0), (1, 10, 9, 1, -1, 1.0), (2, 10, 1, 1, -1, 5.0)]
    table = pd.DataFrame(rows, columns=[*columns, "return_mean"]).astype(str)
    table[sweep.SCORE] = ""
    lines = sweep.summary(table.astype({"run": int}), []).splitlines()
    assert lines[0].startswith("return_mean")
    assert lines[1].split() == "cql_alpha runs last step last last three best".split()
    assert lines[2].split() == ["1", "2", "10", "5.5", "4.0", "5.5"]
    assert lines[3].split() == ["9", "1", "10", "1.0", "4.0", "7.0"]


# ---- Sweeps on a real Ray cluster ----


def flags_of(toy, **more):
    """Return the flags of a short training on the toy dataset."""
    given = {"env": toy, "eval_env": "make_data:CqlToy-v0", "log_freq": 100}
    return {**given, "max_timesteps": 2000, "eval_freq": 100, **more}


def start(directory, flags, *options):
    """Start the sweep as a user does, in its own process."""
    argv = [sys.executable, str(SCRIPT), "--dir", str(directory), *options]
    log = open(f"{directory}.out", "ab")
    argv += arguments(**flags)
    return subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def wait_for(condition, seconds=300):
    """Wait until condition() is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.1)


def process_of(directory):
    """Return the id of the cql.py process of a trial's directory, or None."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # the process has just ended
            continue
        if f"--resume={directory}".encode() in words:
            return int(path.parent.name)
    return None


def is_like_one_process(directory, toy, tmp_path, **more):
    """Assert that the sweep's tables equal those of uninterrupted training.

    All runs stacked in one process give the same numbers up to rounding errors. These
    grow with the number of updates, so only the first 400 updates are compared. Each
    trial in one uninterrupted process gives the same bytes."""
    flags = flags_of(toy, **PRODUCT, max_timesteps=400)
    status, _, error = run(resume=tmp_path / "one", **flags)
    assert status == 0, error
    for name in ("evaluations.csv", "metrics.csv"):
        joined = pd.read_csv(directory / name)
        first = joined[joined["step"] <= 400]
        one = pd.read_csv(tmp_path / "one" / name)
        pd.testing.assert_frame_equal(first, one, rtol=1e-3, atol=1e-5)
    for alpha in PRODUCT["cql_alpha"]:
        solo = tmp_path / f"solo{alpha}"
        flags = flags_of(toy, seed=PRODUCT["seed"], cql_alpha=alpha, **more)
        assert run(resume=solo, **flags)[0] == 0
        for name in ("evaluations.csv", "metrics.csv"):
            trial = directory / f"cql_alpha_{alpha}" / name
            assert trial.read_bytes() == (solo / name).read_bytes()


def test_a_killed_trial_and_a_lost_machine(toy, tmp_path):
    """Each of two nodes has a trial.

    One node is removed, and the other trial's process gets SIGKILL. Both trials continue
    from their checkpoints, and the tables equal those of uninterrupted training."""
    from ray.cluster_utils import Cluster

    directory = tmp_path / "sweep"
    trials = [directory / "cql_alpha_1", directory / "cql_alpha_5"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    options = ["--per_trial", "seed", "--address", cluster.address]
    short = {"max_timesteps": 800}
    process = start(directory, flags_of(toy, **PRODUCT, **short), *options)
    try:
        for trial in trials:
            wait_for((trial / "checkpoint.pt").exists)
        before = [process_of(trial) for trial in trials]
        assert None not in before, "a trial ended before it could be killed"
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: None in [process_of(trial) for trial in trials])
        if process_of(trials[0]) == before[0]:
            os.kill(before[0], signal.SIGKILL)
        else:
            os.kill(before[1], signal.SIGKILL)
        assert process.wait(400) == 0, Path(f"{directory}.out").read_text()
    finally:
        process.kill()
        cluster.shutdown()
    for trial in trials:
        assert trial.with_suffix(".log").read_text().count("training ") >= 2
    is_like_one_process(directory, toy, tmp_path, **short)


@pytest.mark.slow
def test_a_diverged_trial_and_a_machine_that_is_too_small(toy, tmp_path):
    """A diverged trial gives exit status 3, is named, and is not retried.

    A trial that needs more CPUs than any machine has gives exit status 2."""
    directory = tmp_path / "sweep"
    flags = flags_of(toy, qf_lr=[1e-3, 1e30], max_timesteps=200)
    assert start(directory, flags).wait(120) == 3
    out = Path(f"{directory}.out").read_text()
    assert "qf_lr_1e+30: a run diverged" in out
    log = (directory / "qf_lr_1e+30.log").read_text()
    assert log.count("training ") == 1
    process = start(tmp_path / "large", flags, "--cpus", "1000")
    assert process.wait(60) == 2
    assert "--cpus 1000" in Path(f"{tmp_path}/large.out").read_text()


@pytest.mark.slow
def test_a_trial_that_fails_before_its_first_result(toy, tmp_path):
    """It is named with the last line of its log, after all retries."""
    directory = tmp_path / "sweep"
    (directory / "seed_0" / "checkpoint.tmp").mkdir(parents=True)
    flags = flags_of(toy, seed=[0, 1], eval_env="none", max_timesteps=30)
    assert start(directory, flags).wait(200) == 1
    out = Path(f"{directory}.out").read_text()
    assert re.search(
        "^seed_0 failed 4 times: .*Is a directory.*see seed_0.log$", out, re.M
    )
    assert json.loads((directory / "seed_1.json").read_text())["end"] == 0


@pytest.mark.slow
def test_poor_trials_are_stopped_early(toy, tmp_path):
    """ASHA stops trials with low scores.

    The same command without --asha completes them."""
    directory = tmp_path / "sweep"
    flags = flags_of(toy, seed=[0, 1, 2, 3], max_timesteps=900, eval_freq=100)
    assert start(directory, flags, "--asha").wait(200) == 0
    trials = [directory / f"seed_{seed}" for seed in range(4)]
    ends = [
        json.loads(trial.with_suffix(".json").read_text())["end"] for trial in trials
    ]
    assert set(ends) == {0, sweep.STOPPED}
    assert start(directory, flags).wait(200) == 0
    table = pd.read_csv(directory / "evaluations.csv")
    assert table.groupby("run")["step"].max().tolist() == [900] * 4


@pytest.mark.slow
def test_interrupted_and_killed_sweeps_continue(toy, tmp_path):
    """The sweep's process gets SIGINT, SIGKILL and SIGTERM at random times.

    The same command continues the sweep after each of them."""
    directory = tmp_path / "sweep"
    trials = [directory / "cql_alpha_1", directory / "cql_alpha_5"]
    flags = flags_of(toy, **PRODUCT, max_timesteps=8000)

    def starts():
        logs = [trial.with_suffix(".log") for trial in trials]
        return [log.exists() and log.read_text().count("training ") for log in logs]

    for times, number in enumerate((signal.SIGINT, signal.SIGKILL, signal.SIGTERM), 1):
        process = start(directory, flags, "--per_trial", "seed")
        wait_for(lambda n=times: starts() == [n, n])
        time.sleep(random.uniform(0, 3))
        process.send_signal(number)
        status = process.wait(60)
        assert status == (-number if number == signal.SIGKILL else 130)
        wait_for(lambda: not any(process_of(trial) for trial in trials))
    process = start(directory, flags, "--per_trial", "seed")
    assert process.wait(300) == 0
    again = start(directory, flags, "--per_trial", "seed")
    assert again.wait(180) == 0
    assert starts() == [4, 4]  # the last command had nothing left to train
