"""Tests of logging to wandb, by its calls and by the files of an offline run."""

import csv
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
import wandb
from make_data import TINY, arguments, run, toy_dataset
from wandb.proto.wandb_internal_pb2 import Record

import cql

STACKED = {"seed": [0, 1], "cql_alpha": [1, 5]}
SCHEDULE = {"max_timesteps": 8, "eval_freq": 4, "log_freq": 3}
SCORE = "d4rl_normalized_score"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Return a dataset with reference returns, so that evaluations have scores."""
    root = tmp_path_factory.mktemp("toy")
    return toy_dataset(root, ref_min_score=-5.0, ref_max_score=15.0)


@pytest.fixture
def train(toy, tmp_path):
    """Return a function that trains in tmp_path / "run": status, stdout, stderr."""

    def train(**flags):
        given = {"env": toy, "resume": tmp_path / "run", **SCHEDULE, **flags}
        return run(**given)

    return train


def rows(directory, name):
    with open(directory / name, newline="") as file:
        return list(csv.DictReader(file))


def wandb_ids(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)["wandb_ids"]


def history_by_tables(directory, number):
    """Return {step: {metric: value}} of one stacked run, from its tables."""
    history = {}
    for name in ("metrics.csv", "evaluations.csv"):
        for row in rows(directory, name):
            if row["run"] == str(number):
                values = history.setdefault(int(row["step"]), {})
                for column in row.keys() - {"step", "run", *cql.SWEPT}:
                    if row[column]:
                        values[column] = float(row[column])
    return history


def without_account(monkeypatch, home, **variables):
    """Set the environment variables of a user without a wandb account."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    paths = {"HOME": home, "NETRC": home / "netrc", "WANDB_CONFIG_DIR": home / "config"}
    for name, value in {**paths, **variables}.items():
        monkeypatch.setenv(name, str(value))


class Tracker:
    """A stand-in for the run that wandb.init returns, with what cql.py may use."""

    def __init__(self, options):
        self.options, self.rows, self.finished = options, [], False
        self.id, self.dir = options["id"], "offline-run"
        self.url = f"https://wandb.test/{self.id}"

    def log(self, row, step=None):
        self.rows.append((step, dict(row)))

    def finish(self, *arguments, **options):
        self.finished = True

    def history(self):
        """Return {step: {metric: value}}."""
        history = {}
        for step, row in self.rows:
            history.setdefault(step, {}).update(row)
        return history


@pytest.fixture
def trackers(monkeypatch):
    """Replace wandb for a user who has an account. Return the list of trackers that
    cql.py starts."""
    made = []

    def init(**options):
        made.append(Tracker(options))
        return made[-1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    for name in ("WANDB_MODE", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def agent(monkeypatch, trackers):
    """Set the variables that a sweep agent sets for a trial."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")


@pytest.fixture
def real(monkeypatch, tmp_path):
    """Reset the real wandb, for a user without an account."""
    without_account(monkeypatch, tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


# --------------------------------------------------------------------------------------
# A run on wandb for each stacked run
# --------------------------------------------------------------------------------------


def test_a_run_for_each_stacked_run(train, trackers, tmp_path):
    status, out, err = train(project="p", group="g", **STACKED)
    assert (status, err) == (0, "")
    assert len(trackers) == 4 and all(tracker.finished for tracker in trackers)
    options = [tracker.options for tracker in trackers]
    assert {(each["project"], each["group"]) for each in options} == {("p", "g")}
    assert len({each["name"] for each in options}) == 4
    assert [each["id"] for each in options] == wandb_ids(tmp_path / "run")
    assert len({each["id"] for each in options}) == 4
    configs = [each["config"] for each in options]
    pairs = [(config["seed"], config["cql_alpha"]) for config in configs]
    assert pairs == [(0, 1), (0, 5), (1, 1), (1, 5)]
    assert {config["hidden_dim"] for config in configs} == {TINY["hidden_dim"]}
    for number, tracker in enumerate(trackers):
        steps = [step for step, _ in tracker.rows]
        assert steps == sorted(steps)  # wandb drops a step that goes back
        expected = history_by_tables(tmp_path / "run", number)
        assert list(expected) == [3, 6, 8, 4] and SCORE in expected[4]
        assert tracker.history().keys() == expected.keys()
        for step, row in expected.items():
            assert tracker.history()[step] == pytest.approx(row, rel=1e-6)


def test_ids_are_kept_on_resume(train, trackers, tmp_path):
    for updates in (3, 6, 6):
        assert train(max_timesteps=updates, **STACKED)[0] == 0
    ids = [tracker.id for tracker in trackers]
    assert ids == wandb_ids(tmp_path / "run") * 3 and len(set(ids)) == 4
    assert {tracker.options["resume"] for tracker in trackers} == {"allow"}


def test_the_run_says_where_it_logs(train, trackers):
    status, out, _ = train()
    [said] = [line for line in out.splitlines() if line.startswith("wandb: ")]
    assert status == 0 and trackers[0].url in said


def test_a_diverged_run_gets_no_more_rows(train, trackers):
    """Rows of a diverged run stop; those of the other runs continue."""
    assert train(cql_alpha=[1, 3e38, 2])[0] == 3
    assert [len(tracker.rows) for tracker in trackers] == [5, 0, 5]
    assert all(tracker.finished for tracker in trackers)


@pytest.mark.parametrize("sweep", [False, True])
def test_what_is_not_known_is_left_out(sweep, trackers, request, tmp_path):
    """A metric that is NaN, such as a score without references, is not logged."""
    if sweep:
        request.getfixturevalue("agent")
    data = toy_dataset(tmp_path / "data")
    assert run(env=data, resume=tmp_path / "run", **SCHEDULE, **STACKED)[0] == 0
    assert len(trackers) == (1 if sweep else 4)
    for tracker in trackers:
        names = {name for _, row in tracker.rows for name in row}
        assert [name for name in names if "return_mean" in name]
        assert [name for name in names if "score" in name] == []


def test_finished_even_when_the_run_fails(train, trackers, monkeypatch):
    def fail(*_):
        raise cql.MachineError("no")

    monkeypatch.setattr(cql.Evaluator, "evaluate", fail)
    assert train()[0] == 1
    assert [tracker.finished for tracker in trackers] == [True]


@pytest.mark.parametrize("how", ["disabled", "no directory"])
def test_nothing_is_started(how, train, trackers, monkeypatch, tmp_path):
    if how == "disabled":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        assert train()[0] == 0
    else:
        monkeypatch.chdir(tmp_path)
        assert train(resume=None, checkpoints_path="null")[0] == 0
    assert trackers == [] and not list(tmp_path.rglob("wandb"))


@pytest.mark.parametrize("mode", ["offline", "dryrun"])  # dryrun is its older name
def test_offline_asks_for_no_account(mode, train, trackers, monkeypatch):
    def login(**_):
        raise AssertionError("asked for an account")

    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setenv("WANDB_MODE", mode)
    status, out, _ = train()
    assert status == 0 and trackers[0].rows and "account" not in out


# --------------------------------------------------------------------------------------
# One run under a sweep agent
# --------------------------------------------------------------------------------------


def test_a_trial_is_one_run_with_the_mean_score(train, trackers, agent, tmp_path):
    assert train(**STACKED)[0] == 0
    [tracker] = trackers
    assert tracker.id == "trial1" and tracker.finished
    expected = {}
    for number in range(4):
        for step, row in history_by_tables(tmp_path / "run", number).items():
            named = {f"{name}/{number}": value for name, value in row.items()}
            expected.setdefault(step, {}).update(named)
    for step in (4, 8):
        scores = [expected[step][f"{SCORE}/{number}"] for number in range(4)]
        expected[step][SCORE] = sum(scores) / 4
    history = tracker.history()
    assert history.keys() == expected.keys() == {3, 4, 6, 8}
    for step in expected:
        assert history[step] == pytest.approx(expected[step], rel=1e-6)


def test_the_mean_is_of_the_runs_that_are_left(train, trackers, agent):
    assert train(cql_alpha=[1, 3e38])[0] == 3
    history = trackers[0].history()
    assert history[8][SCORE] == pytest.approx(history[8][f"{SCORE}/0"])
    assert f"{SCORE}/1" not in history[8]


def test_a_trial_that_is_resumed_by_hand(train, trackers, agent, monkeypatch, tmp_path):
    """The agent's id is used under the agent, new ids without it."""
    assert train(max_timesteps=4, **STACKED)[0] == 0
    assert train(max_timesteps=4, **STACKED)[0] == 0  # the agent restarts the trial
    assert [tracker.id for tracker in trackers] == ["trial1"] * 2
    assert wandb_ids(tmp_path / "run") == ["trial1"]
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert train(**STACKED)[0] == 0
    ids = [tracker.id for tracker in trackers[2:]]
    assert len(set(ids)) == 4 and ids == wandb_ids(tmp_path / "run")


# --------------------------------------------------------------------------------------
# Training goes on without wandb
# --------------------------------------------------------------------------------------


def said_by_wandb(out):
    return [line for line in out.splitlines() if "wandb" in line]


def complete(directory):
    """Return whether every stacked run has its last evaluation."""
    table = rows(directory, "evaluations.csv")
    return [row["step"] for row in table[-4:]] == ["8"] * 4


@pytest.mark.parametrize(
    "variables, word",
    [({}, "wandb login"), ({"WANDB_API_KEY": "short"}, "key")],
    ids=["nothing", "malformed key"],
)
def test_no_account(variables, word, train, real, monkeypatch, tmp_path):
    """Without an account, one line gives the reason, and training continues."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, out, err = train(**STACKED)
    assert (status, err) == (0, "") and complete(tmp_path / "run")
    [said] = said_by_wandb(out)
    assert said.startswith("wandb: ") and word in said


@pytest.mark.parametrize("where", ["login", "init"])
def test_no_network(where, train, trackers, monkeypatch, tmp_path):
    """Without a network, cql.py waits once, not once per stacked run."""
    tried = []

    def fail(**_):
        tried.append(where)
        raise wandb.errors.CommError("timed out\nafter 20 s")

    monkeypatch.setattr(wandb, where, fail)
    status, out, err = train(**STACKED)
    assert (status, err) == (0, "") and complete(tmp_path / "run")
    assert tried == [where] and trackers == []
    [said] = said_by_wandb(out)
    assert said.startswith("wandb: timed out after 20 s")


@pytest.mark.parametrize("call", ["log", "finish"])
def test_training_survives_wandb(call, train, trackers, monkeypatch, tmp_path):
    """Training continues if wandb's service ends during the run."""
    failures = []

    def fail(self, *_, **__):
        failures.append(call)
        raise ConnectionError("wandb-core is gone")

    monkeypatch.setattr(Tracker, call, fail)
    status, out, err = train(**STACKED)
    assert (status, err) == (0, "") and complete(tmp_path / "run")
    assert failures == [call] and out.count("wandb-core is gone") == 1


@pytest.mark.slow
def test_no_network_for_real(toy, tmp_path, monkeypatch):
    """Training continues after wandb's own timeout, with an unreachable server."""
    variables = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    without_account(monkeypatch, tmp_path, **variables)
    flags = {**SCHEDULE, "eval_env": "make_data:CqlToy-v0", **STACKED}
    argv = arguments(env=toy, resume=tmp_path / "run", **flags)
    argv = [sys.executable, cql.__file__, *argv]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "") and complete(tmp_path / "run")
    [said] = said_by_wandb(done.stdout)
    assert said.startswith("wandb: ") and "not logging" in said


# --------------------------------------------------------------------------------------
# wandb itself, offline
# --------------------------------------------------------------------------------------


def records(path):
    """Yield the records of a .wandb file, in LevelDB's log format of 32 KiB blocks."""
    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(record)
            record = b""


def offline_run(path):
    """Return the run record and history {step: {metric: value}} of a .wandb file."""
    found, history = None, {}
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            found = record.run
        elif record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                row[name] = float(item.value_json)
            step = int(row["_step"])
            history[step] = {name: row[name] for name in row if name[0] != "_"}
    return found, history


def test_offline_runs_and_a_resume(train, real, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for updates in (4, 8):
        status, out, err = train(seed=[0, 1], max_timesteps=updates, group="study")
        assert (status, err) == (0, "")
        [said] = said_by_wandb(out)
        assert "offline" in said
    wandb.teardown()  # waits until wandb's process has written everything
    found = {}
    for path in sorted(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb")):
        record, history = offline_run(path)
        assert (record.run_group, record.project) == ("study", "CORL")
        config = {each.key: json.loads(each.value_json) for each in record.config.update}
        assert config["hidden_dim"] == TINY["hidden_dim"]
        found.setdefault((config["seed"], record.run_id), []).append(history)
    ids = wandb_ids(tmp_path / "run")
    assert found.keys() == {(0, ids[0]), (1, ids[1])}
    for (seed, _), parts in found.items():
        assert len(parts) == 2  # both commands used the same id
        expected = history_by_tables(tmp_path / "run", seed)
        # The first command's last row covers a shorter interval. The resumed run drops
        # it from the tables; wandb keeps it at the step of the evaluation.
        history = parts[0] | parts[1]
        assert history.keys() == expected.keys() == {3, 4, 6, 8}
        for step, row in expected.items():
            shown = {name: history[step][name] for name in row}
            assert shown == pytest.approx(row, rel=1e-6)
