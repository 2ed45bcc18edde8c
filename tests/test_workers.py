"""Evaluation beside the training, in processes of its own."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from make_data import deadline, toy_dataset

import cql

BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-2, qf_lr=1e-2, cql_alpha=[1, 5], max_timesteps=12, eval_freq=4,
    log_freq=3, n_episodes=3, eval_env="make_data:CqlToy-v0",
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


def command(data, directory, **changes):
    values = {"env": data, "resume": directory, **BASE, **changes}
    return [f"--{name}={value}" for name, value in values.items()]


def children(pid):
    """Processes whose parent is pid."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition, seconds=60):
    with deadline(seconds):
        while not condition():
            time.sleep(0.05)


def test_workers_evaluate_as_the_process_itself(toy, tmp_path):
    """Three runs of a command: in this process, in two workers, and in two workers with
    a stop half way."""
    assert cql.main(command(toy, tmp_path / "alone")) == 0
    assert cql.main(command(toy, tmp_path / "beside", eval_workers=2)) == 0
    halves = command(toy, tmp_path / "halves", eval_workers=2)
    assert cql.main([*halves, "--max_timesteps=8"]) == 0
    assert cql.main(halves) == 0
    tables, weights = [], []
    for name in ("alone", "beside", "halves"):
        with open(tmp_path / name / "evaluations.csv") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["step"]) for row in rows] == [4, 4, 8, 8, 12, 12]
        tables.append([[float(x or "nan") for x in row.values()] for row in rows])
        weights.append(torch.load(tmp_path / name / "checkpoint.pt")["agent"])
    # A worker's share has fewer rows, which a matrix product may round otherwise.
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-5)
    np.testing.assert_array_equal(tables[2], tables[1])
    metrics = [(tmp_path / d / "metrics.csv").read_text() for d in ("alone", "beside")]
    assert metrics[0] == metrics[1]
    for name, tensor in weights[0].items():
        if torch.is_tensor(tensor):
            assert all(torch.equal(tensor, other[name]) for other in weights[1:])


def test_training_goes_on_meanwhile(toy, tmp_path, monkeypatch):
    """Updates are made between an evaluation's start and its end; what it evaluates is
    the policy at its start; a checkpoint meanwhile waits for it."""
    finish, steps, waits = cql.Evaluator.finish, [], []

    def finish_late(evaluator, wait):
        if evaluator.pending:
            waits.append(wait)
        if evaluator.pending and not wait and len(waits) % 4:
            return None  # as if it took three updates
        result = finish(evaluator, True)
        steps.append((result[0], waits.copy()) if result else None)
        return result

    monkeypatch.setattr(cql.Evaluator, "finish", finish_late)
    directory = tmp_path / "late"
    assert cql.main(command(toy, directory, eval_workers=1, eval_freq=6)) == 0
    done = [step for step in steps if step]
    assert [step for step, _ in done] == [6, 12]
    assert len(done[0][1]) == 4  # asked at 6, 7, 8, 9
    monkeypatch.undo()
    assert cql.main(command(toy, tmp_path / "prompt", eval_freq=6)) == 0
    table, prompt = (
        np.genfromtxt(tmp_path / name / "evaluations.csv", delimiter=",")[1:]
        for name in ("late", "prompt")
    )
    np.testing.assert_allclose(table, prompt, rtol=1e-5)


def test_a_worker_that_dies(toy, tmp_path, monkeypatch, capsys):
    start = cql.Evaluator.start

    def start_and_kill(evaluator, agent, step, *rest):
        start(evaluator, agent, step, *rest)
        if step == 8:
            (process,) = evaluator.workers[0]._processes.values()
            os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(cql.Evaluator, "start", start_and_kill)
    argv = command(toy, tmp_path / "run", eval_workers=1)
    assert cql.main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("cql.py: failed: ") and err.count("\n") == 1, err
    assert "failed at update 8" in err
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] >= 4
    monkeypatch.undo()
    assert cql.main(argv) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_run(toy, tmp_path, number):
    argv = command(toy, tmp_path / "run", eval_workers=2, max_timesteps=10**7)
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, cql.__file__, *argv], stdout=out, stderr=out
        )
    try:
        table = tmp_path / "run" / "evaluations.csv"
        wait_until(lambda: table.exists() or process.poll() is not None, 120)
        found = children(process.pid)
        assert len(found) >= 2, (tmp_path / "out").read_text()
        process.send_signal(number)
        expected = 143 if number == signal.SIGTERM else -number
        assert process.wait(60) == expected, (tmp_path / "out").read_text()
    finally:
        process.kill()
    wait_until(lambda: not any(map(alive, found)))


def test_a_late_evaluation_is_not_taken_for_the_next(toy, tmp_path, monkeypatch, capsys):
    """A run that fails where one evaluation has come in and the next begins does that
    one when it is resumed."""
    finish, start = cql.Evaluator.finish, cql.Evaluator.start

    def finish_late(evaluator, wait):
        return finish(evaluator, wait) if wait else None

    def start_once(evaluator, agent, step, *rest):
        if step == 8:
            raise OSError("no more processes")
        start(evaluator, agent, step, *rest)

    directory = tmp_path / "run"
    monkeypatch.setattr(cql.Evaluator, "finish", finish_late)
    monkeypatch.setattr(cql.Evaluator, "start", start_once)
    assert cql.main(command(toy, directory)) == 1
    assert cql.read_checkpoint(directory)["step"] == 8
    monkeypatch.undo()
    assert cql.main(command(toy, directory)) == 0
    with open(directory / "evaluations.csv") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [4, 4, 8, 8, 12, 12]


def test_workers_by_default(toy, monkeypatch):
    """On a GPU one for each core that this process may use, but one, and 16 at most."""
    config = cql.TrainConfig(env=str(toy), batch_size=8, n_episodes=100)
    task = cql.Dataset(config).task
    for cores, expected in ((1, 0), (4, 3), (128, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert len(cql.Evaluator(task, config, "cuda").workers) == expected
        assert len(cql.Evaluator(task, config, "cpu").workers) == 0
