"""The product of runs over torchrun's ranks: what each trains, where it writes, and that
together they are one process."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from make_data import toy_dataset
from test_runs import (
    BASE,
    REFERENCE,
    SCRIPT,
    TABLES,
    command,
    finish,
    numbers,
    rows,
    start,
    wait_for,
)

import cql

PRODUCT = dict(
    seed=[0, 1, 2], cql_alpha=[0, 5], cql_lagrange=True, eval_env="make_data:CqlToy-v0"
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    return toy_dataset(root, **REFERENCE)


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """The directory of one process that trains the whole product."""
    directory = tmp_path_factory.mktemp("one")
    assert cql.main(command(toy, directory, **PRODUCT)) == 0
    return directory


def be(rank, ranks):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))


def equal(one, other):
    """Tables of the same rows, in the same order, to float order."""
    for name in TABLES:
        a, b = rows(one, name), rows(other, name)
        keys = [[row[key] for key in ("step", "run")] for row in a]
        assert keys == [[row[key] for key in ("step", "run")] for row in b]
        assert list(a[0]) == list(b[0])
        for run in range(6):
            np.testing.assert_allclose(
                numbers(a, run, ()), numbers(b, run, ()), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_are_one_process(toy, one, tmp_path, ranks):
    argv = command(toy, tmp_path, **PRODUCT)
    outs = [tmp_path.parent / f"{tmp_path.name}-{rank}" for rank in range(ranks)]
    processes = [start(argv, outs[rank], be, rank, ranks) for rank in range(ranks)]
    assert [finish(process) for process in processes] == [0] * ranks
    equal(one, tmp_path)
    for rank in range(ranks):
        table = rows(tmp_path / f"rank{rank}", "evaluations.csv")
        assert {int(row["run"]) for row in table} == set(range(6)[rank::ranks])
        lines = outs[rank].read_text().splitlines()
        assert lines and all(line.startswith(f"[rank {rank}] ") for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        *(".lock", ".ranks", "evaluations.csv", "metrics.csv")
    ]


def test_a_killed_rank_goes_on(toy, one, tmp_path):
    argv = command(toy, tmp_path, **PRODUCT)
    assert finish(start(argv, os.devnull, be, 0, 2)) == 0
    process = start(argv, os.devnull, be, 1, 2)
    wait_for(tmp_path / "rank1", "evaluations.csv", 4, process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = rows(tmp_path, "evaluations.csv")
    assert {row["run"] for row in before} >= {
        "0",
        "2",
        "4",
    }  # what there is, stands there
    assert finish(start(argv, os.devnull, be, 0, 2)) == 0  # a complete one stays so
    assert finish(start(argv, os.devnull, be, 1, 2)) == 0
    equal(one, tmp_path)


def test_torchrun_itself(toy, one, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    argv = [*torchrun, "--nproc_per_node=2", SCRIPT, *command(toy, tmp_path, **PRODUCT)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    equal(one, tmp_path)


def refused(monkeypatch, capsys, argv, *fragments, rank=0, ranks=2):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert cql.main(argv) == 2
    err = capsys.readouterr().err
    assert all(part in err for part in fragments) and err.count("\n") == 1, err


def test_bad_use(toy, tmp_path, monkeypatch, capsys):
    argv = command(toy, tmp_path / "run", **PRODUCT)
    without = [flag for flag in argv if not flag.startswith("--resume")]
    refused(monkeypatch, capsys, without, "torchrun", "--resume DIR")
    refused(monkeypatch, capsys, argv, "7 processes for 6 runs", ranks=7)
    refused(monkeypatch, capsys, argv, "RANK 5 of WORLD_SIZE 2", rank=5)
    record = [*argv, "--online_iterations=9", "--record_dataset=./mine-v0"]
    refused(monkeypatch, capsys, record, "--record_dataset", "torchrun")
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_SWEEP_ID", "1")
        refused(patch, capsys, argv, "sweep agent")
    assert not (tmp_path / "run").exists()


def test_a_directory_of_one_process(toy, one, monkeypatch, capsys):
    before = (one / "metrics.csv").read_bytes()
    argv = command(toy, one, **PRODUCT)
    refused(monkeypatch, capsys, argv, "holds the run of a single process")
    assert (one / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    "rank, ranks",
    [("1", None), (None, "2"), ("", ""), ("0", "0"), ("0", "1"), ("x", "2")],
)
def test_variables_that_are_not_torchrun_s(monkeypatch, rank, ranks):
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cql.rank_and_ranks() == (0, 1)
    assert cql.split_over_ranks({"seed": 1}) == {"seed": 1}


def test_another_number_of_ranks(toy, tmp_path, monkeypatch, capsys):
    argv = command(toy, tmp_path, **PRODUCT)
    be_rank = {"RANK": "1", "WORLD_SIZE": "2"}
    for name, value in be_rank.items():
        monkeypatch.setenv(name, value)
    assert cql.main(argv) == 0
    capsys.readouterr()
    refused(monkeypatch, capsys, argv, "holds runs [1, 3, 5]", "[1, 4]", rank=1, ranks=3)
    refused(monkeypatch, capsys, argv, "3 processes", "begun by 2", rank=2, ranks=3)
    merged = rows(tmp_path, "evaluations.csv")
    assert [row["run"] for row in merged] == ["1", "3", "5"] * 3
    for name in be_rank:
        monkeypatch.delenv(name)
    alone = command(toy, tmp_path / "rank1", **{**PRODUCT, "max_timesteps": 16})
    assert cql.main(alone) == 0  # a rank may go on by itself
    table = rows(tmp_path / "rank1", "evaluations.csv")
    assert {(row["step"], row["run"]) for row in table} >= {("16", "1"), ("16", "5")}


def test_a_diverged_rank_stops_no_other(toy, tmp_path, monkeypatch, capsys):
    """torchrun ends all ranks when one ends with another status than 0."""
    changes = {"seed": [0], "cql_alpha": [1, 3e38], "eval_env": PRODUCT["eval_env"]}
    argv = command(toy, tmp_path, **changes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert cql.main(argv) == 0
        out = capsys.readouterr().out
        assert ("run 1 diverged" in out) == ("exit status 0 all the same" in out)
        assert ("run 1 diverged" in out) == (rank == "1")
    assert {row["run"] for row in rows(tmp_path, "evaluations.csv")} == {"0"}


def test_a_model_of_a_rank(toy, tmp_path, monkeypatch):
    """Evaluated alone, and fine-tuned by as many ranks; each from its own share."""
    argv = command(toy, tmp_path / "first", **PRODUCT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert cql.main(argv) == 0
        model = {"load_model": tmp_path / "first", "max_timesteps": 4}
        again = command(toy, tmp_path / "second", **{**BASE, **PRODUCT, **model})
        assert cql.main(again) == 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    model = tmp_path / "first" / "rank1"
    argv = [f"--load_model={model}", "--max_timesteps=0", "--n_episodes=2"]
    argv += ["--device=cpu", f"--resume={tmp_path / 'third'}"]
    for _ in range(2):  # and the same command again
        assert cql.main(argv) == 0
        found = [row["run"] for row in rows(tmp_path / "third", "evaluations.csv")]
        assert found == ["1", "3", "5"]
    policy = cql.load_policy(model, run=3)
    assert [run["run"] for run in policy.agent.runs] == [1, 3, 5]
    with pytest.raises(cql.UserError, match="holds runs .1, 3, 5., no 0"):
        cql.load_policy(model)
    assert len(rows(tmp_path / "second", "evaluations.csv")) == 6
