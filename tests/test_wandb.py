"""What goes to wandb: offline runs read back from their files, and the calls it gets."""

import json
import os
import re
import struct
import time

import pytest
import wandb
from make_data import toy_dataset
from test_runs import checkpoint, command, finish, rows, start, toy, whole
from wandb.proto.wandb_internal_pb2 import Record

import cql

__all__ = ["toy", "whole"]  # fixtures
STACKED = {"seed": [0, 1], "cql_alpha": [1, 5], "max_timesteps": 8}


def records(path):
    """The records of a .wandb file, a log in LevelDB's format: blocks of 32 KiB."""
    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, size, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def offline_runs(directory, patience=20.0):
    """{id: (run record, {step: {metric: value}})} of all offline runs in a directory.

    wandb's own process writes the files, and on a busy machine may outlive ours."""
    found = {}
    for path in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        run, history = None, {}
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                run = record.run
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {
                    i.key or "/".join(i.nested_key): float(i.value_json) for i in items
                }
                history[int(row["_step"])] = {k: row[k] for k in row if k[0] != "_"}
        if run is None and patience > 0:
            time.sleep(0.5)
            return offline_runs(directory, patience - 0.5)
        found.setdefault(run.run_id, []).append((run, history))
    return found


def expected_history(directory, run):
    """{step: {metric: value}} of one stacked run by the tables."""
    history = {}
    for name in ("metrics.csv", "evaluations.csv"):
        for row in rows(directory, name):
            if row["run"] == str(run):
                heads = "step run seed cql_alpha cql_temp cql_target_action_gap episodes"
                values = {
                    k: float(v) for k, v in row.items() if v and k not in heads.split()
                }
                history.setdefault(int(row["step"]), {}).update(values)
    return history


def without_account(home, **variables):
    """The environment of someone whom wandb does not know."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    paths = {"HOME": str(home), "NETRC": str(home / "netrc")}
    os.environ.update({**paths, "WANDB_CONFIG_DIR": str(home / "config"), **variables})


def offline(home):
    without_account(home, WANDB_MODE="offline")


def account(home, variables):
    without_account(home, **variables)


def trial(home):
    offline(home)
    os.environ.update(WANDB_SWEEP_ID="sweep1", WANDB_RUN_ID="trial1")


class Tracker:
    """What wandb.init returns, as far as cql.py may use it."""

    def __init__(self, options):
        self.options, self.rows, self.finished = options, [], False
        self.offline, self.id = options.get("mode") == "offline", options.get("id")
        self.url = f"https://wandb.test/{self.id}"

    def log(self, row, step=None):
        self.rows.append((step, dict(row)))

    def finish(self, *arguments, **options):
        self.finished = True


@pytest.fixture
def trackers(monkeypatch):
    """The trackers that cql.py starts, offline, with wandb itself out of the way."""
    made = []

    def init(**options):
        made.append(Tracker(options))
        return made[-1]

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_offline_runs_in_one_group_and_over_resume(toy, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    for steps in (4, 8):
        argv = command(toy, run, **{**STACKED, "max_timesteps": steps, "group": "study"})
        assert finish(start(argv, out, offline, tmp_path)) == 0
    found = offline_runs(run)
    assert list(found) and set(found) == set(checkpoint(run)["wandb_ids"])
    assert len(found) == 4
    assert [len(parts) for parts in found.values()] == [2] * 4  # the same ids again
    seen = {}
    for first, second in found.values():
        record = first[0]
        assert (record.run_group, record.project) == ("study", "CORL")
        config = {u.key: json.loads(u.value_json) for u in record.config.update}
        seen[config["seed"], config["cql_alpha"]] = {**first[1], **second[1]}
        assert config["hidden_dim"] == 8
    for number, key in enumerate([(0, 1), (0, 5), (1, 1), (1, 5)]):
        expected = expected_history(run, number)
        assert expected.keys() == {3, 4, 6, 8}
        # The first command's last row was of a shorter interval; the tables have
        # dropped it, wandb has kept it, under the step that the evaluation has too.
        assert seen[key].keys() == expected.keys()
        for step, row in expected.items():
            assert {k: seen[key][step][k] for k in row} == pytest.approx(row, rel=1e-6)
    text = out.read_text()
    assert "offline" in text and "wandb sync" in text and "Traceback" not in text


def test_sweep_trial_is_one_run(toy, tmp_path):
    run = tmp_path / "run"
    argv = command(toy, run, **STACKED)
    assert finish(start(argv, tmp_path / "out", trial, tmp_path)) == 0
    found = offline_runs(run)
    assert list(found) == ["trial1"]
    ((_, history),) = found["trial1"]
    expected = {}
    for number in range(4):
        for step, row in expected_history(run, number).items():
            named = {f"{name}/{number}": value for name, value in row.items()}
            expected.setdefault(step, {}).update(named)
    score = "d4rl_normalized_score"
    for step in (4, 8):
        scores = [expected[step][f"{score}/{number}"] for number in range(4)]
        expected[step] |= {score: sum(scores) / 4, "evaluation_step": step}
    assert history.keys() == expected.keys() == {3, 4, 6, 8}
    for step in expected:
        assert history[step] == pytest.approx(expected[step], rel=1e-6)


def test_names_and_options(toy, tmp_path, trackers):
    argv = command(toy, tmp_path, project="p", group="g", name="n", **STACKED)
    assert cql.main(argv) == 0
    assert len(trackers) == 4 and all(tracker.finished for tracker in trackers)
    options = [tracker.options for tracker in trackers]
    assert {(o["project"], o["group"], o["mode"]) for o in options} == {
        ("p", "g", "offline")
    }
    assert len({o["name"] for o in options}) == len({o["id"] for o in options}) == 4
    assert all(o["reinit"] == "create_new" and o["resume"] == "allow" for o in options)
    assert [(o["config"]["seed"], o["config"]["cql_alpha"]) for o in options] == [
        (0, 1), (0, 5), (1, 1), (1, 5),
    ]  # fmt: skip
    for number, tracker in enumerate(trackers):
        logged, steps = {}, [step for step, _ in tracker.rows]
        assert steps == sorted(steps)  # wandb drops a step that goes back
        for step, row in tracker.rows:
            logged.setdefault(step, {}).update(row)
        expected = expected_history(tmp_path, number)
        assert logged.keys() == expected.keys()
        for step, row in expected.items():
            row |= {"evaluation_step": step} if "return_mean" in row else {}
            assert logged[step] == pytest.approx(row, rel=1e-6)


def test_ids_are_kept(toy, tmp_path, trackers):
    for steps in (3, 6, 6):
        argv = command(toy, tmp_path, **{**STACKED, "max_timesteps": steps})
        assert cql.main(argv) == 0
    ids = [tracker.options["id"] for tracker in trackers]
    assert ids == checkpoint(tmp_path)["wandb_ids"] * 3 and len(set(ids)) == 4


@pytest.mark.parametrize("sweep", [False, True])
def test_no_score_without_reference_returns(toy, tmp_path, trackers, monkeypatch, sweep):
    """A score that is not known is left out, of every run, never logged as NaN."""
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
        monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    data = toy_dataset(tmp_path / "data")
    assert cql.main(command(data, tmp_path / "run", **STACKED)) == 0
    assert len(rows(tmp_path / "run", "evaluations.csv")) == 8
    assert len(trackers) == (1 if sweep else 4)
    for tracker in trackers:
        names = {name for _, row in tracker.rows for name in row}
        assert [name for name in names if "return_mean" in name]
        assert [name for name in names if "score" in name] == []


def test_a_diverged_run_gets_no_more_rows(toy, tmp_path, trackers):
    """Its own stop; the others', and under a sweep the mean of those that are left."""
    argv = command(toy, tmp_path, cql_alpha=[1, 3e38, 2], max_timesteps=8)
    assert cql.main(argv) == 3
    assert [len(tracker.rows) for tracker in trackers] == [5, 0, 5]
    assert all(tracker.finished for tracker in trackers)


def test_finished_even_when_the_run_fails(toy, tmp_path, trackers, monkeypatch):
    def fail(*arguments):
        raise cql.MachineError("no")

    monkeypatch.setattr(cql.Evaluator, "start", fail)
    assert cql.main(command(toy, tmp_path)) == 1
    assert [tracker.finished for tracker in trackers] == [True]


@pytest.mark.parametrize(
    "variables",
    [{}, {"WANDB_MODE": "online"}, {"WANDB_API_KEY": "short"}],
    ids=["nothing", "asked for", "malformed key"],
)
def test_no_account(toy, tmp_path, whole, variables):
    argv = command(toy, tmp_path / "run", max_timesteps=8)
    out = tmp_path / "out"
    process = start(argv, out, account, tmp_path, variables)
    assert finish(process) == 0
    lines = out.read_text().splitlines()
    said = [line for line in lines if "wandb" in line]
    assert said and all(line.startswith("wandb: ") for line in said)
    assert "Traceback" not in out.read_text()
    for name in ("metrics.csv", "evaluations.csv"):
        mine = (tmp_path / "run" / name).read_bytes()
        assert mine == (whole(max_timesteps=8) / name).read_bytes()


@pytest.mark.parametrize("where", ["login", "init"])
def test_no_network(toy, tmp_path, trackers, monkeypatch, capsys, where):
    """An account, but nobody answers: offline, with a line, and training goes on."""
    reached, tried = wandb.init, []

    def login(**options):
        if where == "login":  # it verifies a key that comes from the environment
            raise wandb.errors.AuthenticationError(
                "Failed to authenticate with X\nagain"
            )
        return True

    def init(**options):
        tried.append(options["mode"])
        if options["mode"] != "offline":
            raise wandb.errors.CommError("Run initialization has timed out\nafter 20 s")
        return reached(**options)

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", login)
    monkeypatch.setattr(wandb, "init", init)
    assert cql.main(command(toy, tmp_path, **STACKED)) == 0
    # One wait, not one for each of the four.
    assert tried == ["online"] * (where == "init") + ["offline"] * 4
    assert [{step for step, _ in t.rows} for t in trackers] == [{3, 4, 6, 8}] * 4
    out = capsys.readouterr().out
    said = {"login": "Failed to authenticate", "init": "timed out"}[where]
    assert re.search(f"^wandb: .*{said}.*$", out, re.M) and "wandb: offline" in out


@pytest.mark.parametrize("mode", ["dryrun", "offline"])
def test_offline_modes(toy, tmp_path, trackers, monkeypatch, mode):
    """dryrun is wandb's older word for offline."""
    monkeypatch.setenv("WANDB_MODE", mode)
    assert cql.main(command(toy, tmp_path)) == 0
    assert len(trackers) == 1 and trackers[0].rows


def test_disabled_starts_nothing(toy, tmp_path, trackers, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert cql.main(command(toy, tmp_path)) == 0
    assert trackers == [] and not (tmp_path / "wandb").exists()


@pytest.mark.slow
def test_no_network_for_real(toy, tmp_path):
    """A key in the right form and a server that nobody listens at: wandb's own wait."""
    variables = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    argv, out = command(toy, tmp_path / "run", seed=[0, 1]), tmp_path / "out"
    process = start(argv, out, account, tmp_path, variables)
    assert finish(process) == 0
    text = out.read_text()
    assert "offline" in text and "Traceback" not in text
    assert len(offline_runs(tmp_path / "run")) == 2
    assert len(rows(tmp_path / "run", "metrics.csv")) == 8


def test_a_trial_that_is_resumed_by_hand(toy, tmp_path, trackers, monkeypatch):
    """One wandb run under the agent, with its id; one for each stacked run after it."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "trial1")
    run = tmp_path / "run"
    assert cql.main(command(toy, run, **{**STACKED, "max_timesteps": 4})) == 0
    assert [tracker.id for tracker in trackers] == ["trial1"]
    assert checkpoint(run)["wandb_ids"] == ["trial1"]
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert cql.main([f"--resume={run}", "--max_timesteps=8"]) == 0
    assert len({tracker.id for tracker in trackers[1:]}) == 4


@pytest.mark.parametrize("call", ["log", "finish"])
def test_training_survives_wandb(toy, tmp_path, trackers, monkeypatch, capsys, call):
    """Its service may die in the middle of a run."""

    def fail(self, *arguments, **options):
        failures.append(call)
        raise ConnectionError("wandb-core is gone")

    failures = []
    monkeypatch.setattr(Tracker, call, fail)
    assert cql.main(command(toy, tmp_path / "run", **STACKED)) == 0
    out = capsys.readouterr().out
    assert out.count("wandb: wandb-core is gone; not logging to it any longer") == 1
    assert failures == [call]
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations.csv")][-1] == "8"


def test_the_run_says_where_it_logs(toy, tmp_path, trackers, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    assert cql.main(command(toy, tmp_path / "one")) == 0
    assert f"wandb: online; {trackers[0].url}\n" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert cql.main(command(toy, tmp_path / "two")) == 0
    assert "wandb: disabled\n" in capsys.readouterr().out and len(trackers) == 1


def test_the_step_of_a_late_evaluation(toy, tmp_path, trackers, monkeypatch):
    """With workers an evaluation is logged when it is done: later than it began, which
    its row tells."""
    finish, asked = cql.Evaluator.finish, []

    def finish_late(evaluator, wait):
        asked.append(wait)
        return finish(evaluator, wait) if wait else None

    monkeypatch.setattr(cql.Evaluator, "finish", finish_late)
    assert cql.main(command(toy, tmp_path / "run")) == 0
    logged = [
        (s, r["evaluation_step"]) for s, r in trackers[0].rows if "return_mean" in r
    ]
    assert logged == [(8, 4), (12, 8), (12, 12)] and not all(asked)
