"""A run from its command to its directory: resume, signals, kills, evaluation,
checkpoints, divergence, the terminal. Most runs are cql.main in this process; those
that must die are forked from a server that has imported this module; two are real."""

import csv
import dataclasses
import errno
import fcntl
import io
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._dynamo  # the optimizer would; here, so that no forked process has to
import yaml
from make_data import (
    Toy,
    d4rl_file,
    hopper_dataset,
    minari_dataset,
    random_episodes,
    toy_dataset,
)

import cql

SCRIPT = Path(cql.__file__)
BOUNDS = {
    "low": [-2.0, 0.0],
    "high": [1.0, 4.0],
}  # lopsided, so that ignoring them shows
REFERENCE = {"ref_min_score": -5.0, "ref_max_score": 15.0}
BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-2, qf_lr=1e-2, cql_alpha=1, max_timesteps=12, eval_freq=4, log_freq=3,
    n_episodes=2,
)  # fmt: skip
# State of every kind: stacked, Lagrange, a phase, a period that the step decides.
FULL = dict(
    seed=[0, 1], cql_alpha=[1, 5], cql_lagrange=True, cql_target_action_gap=1,
    bc_steps=8, target_update_period=3, backup_entropy=True,
)  # fmt: skip
TABLES = ("metrics.csv", "evaluations.csv")


class Hooked(Toy):
    """The toy environment, with a record of reset seeds and a hook in every step."""

    resets, hook = [], staticmethod(lambda: None)

    def reset(self, seed=None, options=None):
        Hooked.resets.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        Hooked.hook()
        return super().step(action)


gym.register("CqlHooked-v0", Hooked, max_episode_steps=20, kwargs=BOUNDS)
gym.register("CqlHopper-v0", gym.spec("Hopper-v5").entry_point, max_episode_steps=100)


@pytest.fixture
def hooked(monkeypatch):
    """Sets what every environment step calls first; returns the reset seeds so far."""

    def set_hook(function=lambda: None):
        monkeypatch.setattr(Hooked, "resets", [])
        monkeypatch.setattr(Hooked, "hook", staticmethod(function))
        return Hooked.resets

    return set_hook


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    return toy_dataset(root, env_kwargs=BOUNDS, **REFERENCE)


def flags(**changes):
    return [f"--{name}={value}" for name, value in changes.items()]


def command(data, directory, **changes):
    return flags(env=data, resume=directory, **{**BASE, **changes})


@pytest.fixture
def train(toy, tmp_path):
    """Trains in tmp_path / name on the toy data; returns (exit status, directory)."""

    def run(name, **changes):
        return cql.main(command(toy, tmp_path / name, **changes)), tmp_path / name

    return run


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory):
    """The directory of a run in one go, by its flags; made once."""
    made = {}

    def run(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp("whole")
            assert cql.main(command(toy, directory, **changes)) == 0
            made[key] = directory
        return made[key]

    return run


def flattened(value, name=""):
    """Nested dicts, lists and tensors as {path: plain value}."""
    if isinstance(value, torch.Tensor):
        kind = (str(value.dtype), *value.shape)
        return {name: (kind, value.contiguous().numpy().tobytes())}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = {"": (name, len(value))} if not value else {}
        for key, part in items:
            parts.update(flattened(part, f"{name}/{key}"))
        return parts
    return {name: value}


def checkpoint(directory):
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def state(directory):
    """All that must be equal: each value of the checkpoint, each byte of the tables."""
    values = flattened(checkpoint(directory))
    private = r"/config/(resume|checkpoints_path|eval_env|load_model)|/wandb_ids.*"
    values = {k: v for k, v in values.items() if not re.fullmatch(private, k)}
    tables = {name: (directory / name).read_bytes() for name in TABLES}
    steps = [row["step"] for row in rows(directory, "timing.csv")]
    repeated = [step for step in steps if steps.count(step) > 1]
    return {**values, **tables, "repeated in timing.csv": repeated}


def differences(one, other):
    one, other = state(one), state(other)
    return [k for k in one.keys() | other.keys() if one.get(k) != other.get(k)]


def rows(directory, name):
    path = directory / name
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def numbers(table, run, without=("run", "seed", "cql_alpha")):
    """The rows of one stacked run as an array."""
    mine = [row for row in table if row["run"] == str(run)]
    return np.array([[float(v) for k, v in r.items() if k not in without] for r in mine])


def listing(directory):
    """Every file and its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


# --- processes ------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_runs"])


def child(argv, output, prepare, *arguments):
    """cql.main in a process of its own, both streams to `output`."""
    descriptor = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*arguments)
    sys.exit(cql.main(argv))


def start(argv, output=os.devnull, prepare=None, *arguments):
    process = SERVER.Process(target=child, args=(argv, str(output), prepare, *arguments))
    process.start()
    return process


def real(argv, cwd):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = [sys.executable, *map(str, argv)]
    return subprocess.Popen(argv, cwd=cwd, text=True, **pipes)


def finish(process, seconds=300):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the run does not end")
    return process.exitcode


def wait_for(directory, name, count, process, seconds=300):
    """Until a table has that many lines, or the process has ended."""
    table, deadline = directory / name, time.monotonic() + seconds
    while not table.exists() or table.read_text().count("\n") < count:
        ended = process.poll() if hasattr(process, "poll") else process.exitcode
        if ended is not None:
            return
        assert time.monotonic() < deadline, f"{name} does not grow"
        time.sleep(0.002)


def die_at(call):
    """This process is killed at its call-th use of os.fsync, os.replace or write_text
    (which leaves half a text), and writes a checkpoint after every update."""
    calls = 0

    def fatal(function, last=lambda *_: None):
        def wrapped(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == call:
                last(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    os.fsync, os.replace = fatal(os.fsync), fatal(os.replace)
    write = Path.write_text
    Path.write_text = fatal(
        write, lambda path, text: write(path, text[: len(text) // 2])
    )
    cql.Run.CHECKPOINT_SECONDS = -1


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def after_update(monkeypatch, function):
    """function(number, agent, metrics) after each update, numbered from 1."""
    update, count = cql.ContinuousCQL.learn, iter(range(1, 10**9))

    def wrapped(self, *arguments, **options):
        metrics = update(self, *arguments, **options)
        function(next(count), self, metrics)
        return metrics

    monkeypatch.setattr(cql.ContinuousCQL, "learn", wrapped)


# --- 1. resume ------------------------------------------------------------------------


@pytest.mark.parametrize("half", [6, 5, 4])  # log_freq is 3, eval_freq 4
def test_resume_in_another_process_is_bit_exact(toy, tmp_path, whole, half):
    first = command(toy, tmp_path, **{**FULL, "max_timesteps": half})
    assert finish(start(first)) == 0
    assert checkpoint(tmp_path)["step"] == half
    assert finish(start(flags(resume=tmp_path, max_timesteps=12))) == 0
    reference = whole(**FULL)
    assert differences(reference, tmp_path) == []
    names = " ".join(state(reference))
    for (
        part
    ) in "policy target_critic exp_avg_sq log_alpha_prime generators sums".split():
        assert part in names
    assert len(rows(tmp_path, "metrics.csv")) == 4 * 4
    assert len(rows(tmp_path, "evaluations.csv")) == 4 * 3


def test_killed_at_random_moments(toy, tmp_path, whole):
    changes = {**FULL, "max_timesteps": 90, "eval_freq": 6, "n_episodes": 1}
    argv, rng, killed = command(toy, tmp_path, **changes), random.Random(0), 0
    for lines in (3, 9, 21, 29, 41, 49):
        process = start(argv)
        wait_for(tmp_path, rng.choice(["metrics.csv", "timing.csv"]), lines, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 4
    assert finish(start(argv)) == 0
    assert differences(whole(**changes), tmp_path) == []


def test_killed_at_every_file_operation(toy, tmp_path, whole):
    changes = {
        **FULL,
        "max_timesteps": 5,
        "eval_freq": 2,
        "log_freq": 2,
        "n_episodes": 1,
    }
    reference, wrong = whole(**changes), {}
    for call in range(1, 1000):
        directory = tmp_path / str(call)
        argv = command(toy, directory, **changes)
        code = finish(start(argv, os.devnull, die_at, call))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        code = cql.main(argv)
        if code or (found := differences(reference, directory)):
            wrong[call] = code or found
        assert not list(directory.glob("*.tmp"))
    assert call > 20
    assert wrong == {}, f"of {call - 1} moments"


@pytest.mark.parametrize("torn", ["step,run,al", "whole\n3,0,0.99", "whole\n3"])
def test_torn_table(train, whole, monkeypatch, torn):
    """The machine stopped within the first row of metrics.csv, after a checkpoint."""

    def interrupt(number, agent, metrics):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        after_update(patch, interrupt)
        code, directory = train("run")
    assert code == 143
    header = (whole() / "metrics.csv").read_text().splitlines()[0]
    (directory / "metrics.csv").write_text(torn.replace("whole", header))
    assert train("run")[0] == 0
    assert differences(whole(), directory) == []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_a_command(toy, tmp_path, whole, number, status):
    """A real command, interrupted; then again, in a process that leaves all else out."""
    changes = {**FULL, "max_timesteps": 200, "eval_freq": 50, "n_episodes": 1}
    argv = command(toy, "run", eval_env="test_runs:CqlHooked-v0", **changes)
    process = real([SCRIPT, *argv], tmp_path)
    wait_for(tmp_path / "run", "metrics.csv", 13, process)
    process.send_signal(number)
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (status, "")
    step = checkpoint(tmp_path / "run")["step"]
    assert 9 <= step < 200 and f"interrupted at update {step}" in out
    assert finish(start(flags(resume=tmp_path / "run"))) == 0
    assert differences(whole(**changes), tmp_path / "run") == []


def test_resume_in_a_simulator(tmp_path):
    """MuJoCo starts anew at a reset: no evaluation leaves a trace in the next."""
    data = hopper_dataset(tmp_path / "data", episodes=4)
    for name, stops in (("whole", [8]), ("halves", [4, 8])):
        for steps in stops:
            argv = command(data, tmp_path / name, max_timesteps=steps, seed=[0, 1])
            assert cql.main(argv) == 0
    assert differences(tmp_path / "whole", tmp_path / "halves") == []
    assert len(rows(tmp_path / "halves", "evaluations.csv")) == 4


@pytest.mark.parametrize("update", range(1, 13))
def test_signal_during_an_update(train, whole, monkeypatch, update):
    def interrupt(number, agent, metrics):
        if number == update:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        after_update(patch, interrupt)
        code, directory = train("run", **FULL)
    assert code == 143
    assert checkpoint(directory)["step"] == update
    assert train("run", **FULL)[0] == 0
    assert differences(whole(**FULL), directory) == []


@pytest.mark.parametrize("evaluation", [1, 2, 3])  # at 4, 8 and 12, the last
def test_signal_during_an_evaluation(train, whole, hooked, monkeypatch, evaluation):
    def interrupt():
        if len(Hooked.resets) == 8 * evaluation:  # four runs, two episodes
            os.kill(os.getpid(), signal.SIGTERM)

    hooked(interrupt)
    code, directory = train("run", eval_env="CqlHooked-v0", **FULL)
    assert checkpoint(directory)["step"] == 4 * evaluation
    assert len(rows(directory, "evaluations.csv")) == 4 * (evaluation - 1)
    assert code == 143
    hooked()
    assert train("run", eval_env="CqlHooked-v0", **FULL)[0] == 0
    assert differences(whole(**FULL), directory) == []


# --- 2. what --resume takes -----------------------------------------------------------

ALLOWED = dict(
    max_timesteps=8, eval_freq=3, n_episodes=3, eval_seed=1, eval_env="CqlHooked-v0",
    log_freq=5, device="auto", eval_workers=0, project="other", group="other",
    name="other",
)  # fmt: skip


@pytest.fixture
def resumable(whole, tmp_path):
    """A copy of a complete run of four updates."""
    source = whole(max_timesteps=4, eval_freq=2)
    return shutil.copytree(source, tmp_path / "resumable")


@pytest.mark.parametrize("name", ALLOWED)
def test_resume_may_change(resumable, name):
    assert cql.main(flags(resume=resumable, **{name: ALLOWED[name]})) == 0
    config = yaml.safe_load((resumable / "config.yaml").read_text())
    assert config[name] == ALLOWED[name]
    assert checkpoint(resumable)["step"] == config["max_timesteps"]


def test_resume_takes_offline_iterations(resumable):
    assert cql.main(flags(resume=resumable, offline_iterations=8)) == 0
    assert checkpoint(resumable)["step"] == 8
    assert cql.main(flags(resume=resumable)) == 0
    assert checkpoint(resumable)["step"] == 8


def test_resume_with_fewer_updates_than_done(resumable, monkeypatch):
    def trained(number, agent, metrics):
        pytest.fail("trains on, past max_timesteps")

    before = state(resumable)
    after_update(monkeypatch, trained)
    assert cql.main(flags(resume=resumable, max_timesteps=3)) in (0, 2)
    assert {k: v for k, v in state(resumable).items() if v != before[k]} == {}


def other_value(field):
    """A value of the field's type that is neither its default nor in BASE."""
    used, kind = BASE.get(field.name, field.default), str(field.type)
    if isinstance(used, bool):
        return not used
    if isinstance(used, (int, float)):
        whole = "float" not in kind
        return (
            used + 1 if whole else 0.5 if used in (-1, 0, np.inf, -np.inf) else used / 2
        )
    return 7 if "int" in kind else 0.5 if "float" in kind else "other"


NOT_RESUMABLE = [
    field
    for field in dataclasses.fields(cql.TrainConfig)
    if field.name not in {*ALLOWED, "resume", "checkpoints_path", "record_dataset"}
    and not field.name.endswith("iterations")
]


@pytest.mark.parametrize("field", NOT_RESUMABLE, ids=lambda field: field.name)
def test_resume_refuses_another(resumable, capsys, field):
    before = listing(resumable)
    assert cql.main(flags(resume=resumable, **{field.name: other_value(field)})) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cql.py: error: --{field.name} ") and error.count("\n") == 1
    assert str(resumable) in error
    assert listing(resumable) == before


def test_a_complete_run_stays_as_it_is(toy, train, whole, capsys):
    code, directory = train("run", **FULL)
    before = listing(directory)
    for argv in (flags(resume=directory), command(toy, directory, **FULL)):
        assert cql.main(argv) == code == 0
        after = listing(directory)
        assert before.keys() == after.keys()
        assert [name for name in before if before[name] != after[name]] == []
    table = capsys.readouterr().out.split("\n run ")
    assert len(table) == 4 and len({t.split("files:")[0] for t in table[1:]}) == 1


def test_a_preemptible_command_repeats(toy, tmp_path, whole, monkeypatch):
    config = {**BASE, **FULL, "env": str(toy), "cql_clip_diff_min": -np.inf}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    argv = flags(config_path=tmp_path / "job.yaml", resume=tmp_path / "run")
    codes = []
    for update in (1, 4, 5, 3):

        def interrupt(number, agent, metrics, last=update):
            if number == last:
                os.kill(os.getpid(), signal.SIGINT)

        with monkeypatch.context() as patch:
            after_update(patch, interrupt)
            codes.append(cql.main(argv))
    assert codes == [130, 130, 130, 0]  # 1 + 4 + 5 of 12 updates, then the last two
    assert differences(whole(**FULL), tmp_path / "run") == []


# --- 3. a run directory is enough to run it again -------------------------------------


def test_run_directory_runs_again(toy, tmp_path, whole):
    """Two real commands: cql.py, then the copy and config.yaml that it left."""
    changes = {**BASE, **FULL, "eval_env": "test_runs:CqlHooked-v0"}
    first = real([SCRIPT, *flags(env=toy, name="a b", **changes)], tmp_path)
    out, err = first.communicate(timeout=300)
    assert (first.returncode, err) == (0, "")
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"a-b-.*random-v0-[0-9a-f]{8}", directory.name)
    assert f"files: runs/{directory.name}" in out
    names = (
        ".lock config.yaml cql.py metrics.csv evaluations.csv timing.csv checkpoint.pt"
    )
    assert {path.name for path in directory.iterdir()} == set(names.split())
    assert (directory / "cql.py").read_bytes() == SCRIPT.read_bytes()
    again = [directory / "cql.py", "--config_path", directory / "config.yaml"]
    second = real(again, tmp_path)
    out, err = second.communicate(timeout=300)
    assert (second.returncode, err) == (0, "")
    (copy,) = set((tmp_path / "runs").iterdir()) - {directory}
    for path in ("config.yaml", *TABLES):
        assert (copy / path).read_bytes() == (directory / path).read_bytes()
    for path in TABLES:  # and this process writes the same
        assert (whole(**FULL) / path).read_bytes() == (directory / path).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"offline_iterations": 4}, {"cql_clip_diff_max": 2.0}, {"seed": [3, 1]}],
    ids=lambda changes: next(iter(changes)),
)
def test_config_file_is_runnable(toy, tmp_path, changes):
    settings = {k: v for k, v in BASE.items() if k != "max_timesteps"}
    if "offline_iterations" not in changes:
        settings["max_timesteps"] = 4
    argv = flags(env=toy, checkpoints_path=tmp_path / "a", **{**settings, **changes})
    assert cql.main(argv) == 0
    (first,) = (tmp_path / "a").iterdir()
    again = flags(config_path=first / "config.yaml", checkpoints_path=tmp_path / "b")
    assert cql.main(again) == 0
    (second,) = (tmp_path / "b").iterdir()
    assert differences(first, second) == []
    assert checkpoint(second)["step"] == 4


# --- 4. stacked runs, evaluation ------------------------------------------------------


def test_stacked_equals_solo(train):
    changes = {"eval_env": "CqlHooked-v0", "cql_lagrange": True}
    stacked = train("stacked", seed=[0, 1], cql_alpha=[0, 5], **changes)[1]
    pairs = [(0, 0), (0, 5), (1, 0), (1, 5)]
    for run, (seed, alpha) in enumerate(pairs):
        solo = train(f"solo{run}", seed=seed, cql_alpha=alpha, **changes)[1]
        for name in TABLES:
            mine, own = rows(stacked, name), rows(solo, name)
            assert len(numbers(own, 0)) >= 3
            np.testing.assert_allclose(
                numbers(mine, run), numbers(own, 0), rtol=1e-4, atol=1e-5
            )
    heads = [
        (r["seed"], float(r["cql_alpha"])) for r in rows(stacked, "evaluations.csv")
    ]
    assert heads == [(str(seed), alpha) for seed, alpha in pairs] * 3
    # The penalty weight and the seed both matter, or equality would prove nothing.
    spread = [numbers(rows(stacked, "metrics.csv"), run)[-1] for run in range(4)]
    assert not any(
        np.allclose(spread[a], spread[b]) for a, b in [(0, 1), (0, 2), (1, 3)]
    )


def test_episodes_of_an_evaluation(train, hooked):
    def seeds(name, **changes):
        """Reset seeds by evaluation, run and episode."""
        resets = hooked()
        directory = train(name, eval_env="CqlHooked-v0", n_episodes=3, **changes)[1]
        steps = {row["step"] for row in rows(directory, "evaluations.csv")}
        resets = [seed for seed in resets if seed is not None]
        return np.array(resets).reshape(len(steps), -1, 3)

    stacked = seeds("stacked", seed=[0, 1], cql_alpha=[1, 5])
    assert stacked.shape == (3, 4, 3)
    assert (stacked == stacked[:, :1]).all()  # the same for all runs
    assert len(np.unique(stacked[:, 0])) == 9  # other ones at each step and episode
    np.testing.assert_array_equal(seeds("solo", seed=5)[:, 0], stacked[:, 0])
    assert not np.isin(seeds("other", eval_seed=1), stacked).any()
    # What is evaluated at a step does not depend on what was evaluated before.
    sparse = seeds("sparse", eval_freq=8)
    np.testing.assert_array_equal(sparse[:, 0], stacked[1:, 0])


def returns_of(policy, env, seeds):
    """Undiscounted returns by a plain gymnasium loop."""
    returns = []
    for seed in seeds:
        (observation, _), total, over = env.reset(seed=int(seed)), 0.0, False
        while not over:
            observation, reward, ended, cut, _ = env.step(policy(observation))
            total, over = total + reward, ended or cut
        returns.append(total)
    return np.array(returns)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_score_equals_a_loop_over_load_policy(train, hooked):
    resets = hooked()
    changes = {"eval_env": "CqlHooked-v0", "n_episodes": 5, "max_timesteps": 30}
    directory = train("run", seed=[0, 1], **changes)[1]
    last, env = (
        [seed for seed in resets if seed is not None][-5:],
        gym.make("CqlToy-v0", **BOUNDS),
    )
    for run, row in enumerate(rows(directory, "evaluations.csv")[-2:]):
        policy = cql.load_policy(directory / "checkpoint.pt", run=run)
        returns = returns_of(policy, env, last)
        assert returns.std() > 0
        score = 100 * (returns.mean() + 5) / 20
        assert [float(row[k]) for k in ("return_mean", "return_std")] == pytest.approx(
            [returns.mean(), returns.std()], rel=1e-6
        )
        assert float(row["d4rl_normalized_score"]) == pytest.approx(score, rel=1e-6)
        assert (int(row["run"]), int(row["episodes"])) == (run, 5)
    with pytest.raises(cql.UserError, match=r"\b2\b"):
        cql.load_policy(directory / "checkpoint.pt", run=2)


def test_normaliser_and_bounds_matter(train):
    """Statistics other than 0 and 1 in the checkpoint, and they change the actions: the
    test above would see an evaluation without them."""
    directory = train("run", max_timesteps=30)[1]
    payload = checkpoint(directory)
    x, agent = np.random.default_rng(0).normal(size=(4, 3)), payload["agent"]
    raw = cql.load_policy(directory / "checkpoint.pt")(x)
    assert raw.shape == (4, 2) and (raw >= BOUNDS["low"]).all()
    assert (raw <= BOUNDS["high"]).all()
    mean, std = agent["observation_mean"].clone(), agent["observation_std"].clone()
    agent["observation_mean"].zero_(), agent["observation_std"].fill_(1)
    torch.save(payload, directory / "plain.pt")
    plain = cql.load_policy(directory / "plain.pt")
    assert np.abs(plain(x) - raw).max() > 1e-3
    np.testing.assert_allclose(plain((x - mean.numpy()) / std.numpy()), raw, atol=1e-5)


@pytest.mark.parametrize("layout", ["dict", "tuple"])
def test_load_policy_on_structured_observations(tmp_path, layout):
    kwargs = {**BOUNDS, "layout": layout}
    data = toy_dataset(tmp_path / "data", env_kwargs=kwargs)
    assert cql.main(command(data, tmp_path / "run", max_timesteps=20)) == 0
    policy = cql.load_policy(tmp_path / "run" / "checkpoint.pt")
    env = gym.make("CqlToy-v0", **kwargs)
    row = rows(tmp_path / "run", "evaluations.csv")[-1]
    seeds = [np.random.SeedSequence([0, 20, i]).generate_state(1)[0] for i in range(2)]
    expected = float(row["return_mean"])
    assert returns_of(policy, env, seeds).mean() == pytest.approx(expected, rel=1e-6)
    assert row["d4rl_normalized_score"] == ""  # no reference returns are known
    observation = env.reset(seed=0)[0]
    samples = [policy(observation, deterministic=False) for _ in range(20)]
    assert np.ptp(samples, axis=0).min() > 0
    assert all(env.action_space.contains(np.float32(sample)) for sample in samples)


# --- 5. load_model --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"n_critics": 3, "seed": [0, 1]},
        {"cql_lagrange": True},
        {"use_automatic_entropy_tuning": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_load_model_evaluates_without_the_dataset(toy, tmp_path, changes):
    data = shutil.copytree(toy, tmp_path / "data")
    assert cql.main(command(data, tmp_path / "run", **changes)) == 0
    shutil.rmtree(data)
    source = tmp_path / "run"  # its checkpoint.pt
    evaluate = flags(load_model=source, max_timesteps=0, n_episodes=20, device="cpu")
    assert cql.main([*evaluate, *flags(resume=tmp_path / "again")]) == 0
    mine, own = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "again")
    mine, own = flattened(mine["agent"]), flattened(own["agent"])
    assert mine.keys() == own.keys()
    unequal = {re.sub(r"/\d+$", "", k) for k in mine if mine[k] != own[k]}
    # Weights, optimizers, statistics are taken over; counting and drawing start anew.
    assert {"step" in k or "generators" in k for k in unequal} == {True}
    last = rows(tmp_path / "again", "evaluations.csv")
    assert {row["episodes"] for row in last} == {"20"}
    env = gym.make("CqlToy-v0", **BOUNDS)
    seeds = [np.random.SeedSequence([0, 0, i]).generate_state(1)[0] for i in range(20)]
    for row in last:
        policy = cql.load_policy(source, run=int(row["run"]))
        expected = returns_of(policy, env, seeds).mean()
        assert float(row["return_mean"]) == pytest.approx(expected, rel=1e-6)


def test_load_model_keeps_the_statistics(toy, whole, tmp_path):
    source = whole(**FULL) / "checkpoint.pt"
    other = toy_dataset(tmp_path / "other", seed=7, env_kwargs={**BOUNDS, "push": 0.05})
    changes = {**BASE, **FULL, "max_timesteps": 4}
    argv = flags(env=other, load_model=source, resume=tmp_path / "run", **changes)
    assert cql.main(argv) == 0
    mine, own = (checkpoint(d)["agent"] for d in (whole(**FULL), tmp_path / "run"))
    data = cql.Dataset(cql.TrainConfig(env=str(other), batch_size=8))
    for name, value in zip(("observation_mean", "observation_std"), data.statistics()):
        assert torch.equal(mine[name], own[name])
        assert not torch.allclose(own[name].double(), value.double(), rtol=0.05)


def test_temperature_and_multiplier_still_move(toy, whole, tmp_path):
    """After --resume, and after --load_model, alpha and alpha' go on learning."""
    resumed = shutil.copytree(whole(**FULL), tmp_path / "resumed")
    before = checkpoint(resumed)["agent"]
    source, fresh = resumed / "checkpoint.pt", tmp_path / "fresh"
    argv = flags(env=toy, load_model=source, resume=fresh, **{**BASE, **FULL})
    assert cql.main(argv) == 0
    assert cql.main(flags(resume=resumed, max_timesteps=24)) == 0
    for directory in (resumed, fresh):
        after = checkpoint(directory)["agent"]
        for name in ("log_alpha", "log_alpha_prime"):
            assert ((after[name] - before[name]).abs() > 1e-3).all()
        column = [row["alpha_prime"] for row in rows(directory, "metrics.csv")]
        assert len(set(column[-4:])) == 4


def test_load_model_with_other_action_bounds(whole, tmp_path, capsys):
    """The policy's actions would be another environment's."""
    other = toy_dataset(tmp_path / "other", env_kwargs={"low": -1.0, "high": 1.0})
    source = whole() / "checkpoint.pt"
    assert cql.main(command(other, tmp_path / "run", load_model=source)) == 2
    error = capsys.readouterr().err
    assert error.startswith("cql.py: error: ") and error.count("\n") == 1
    assert "bounds" in error


# --- 6. checkpoints -------------------------------------------------------------------


def disk_full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(payload, file):
    file.write(b"half a checkpoint")
    disk_full()


class FullFile(io.BytesIO):
    """Room for some kilobytes."""

    def write(self, data):
        return super().write(data) if self.tell() < 4096 else disk_full()


def full_file(payload, file):
    """As on a real disk: torch's own writer meets the error and words it anew."""
    torch_save(payload, FullFile())


def full_for(pattern, function):
    """function, failing where its first argument is a file whose name matches."""

    def wrapped(target, *arguments, **options):
        path = (
            os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
        )
        if re.search(pattern, str(path)):
            disk_full()
        return function(target, *arguments, **options)

    return wrapped


torch_save = torch.save
FAULTS = {
    "within torch.save": ("torch.save", full_file),
    "torch.save": ("torch.save", disk_full),
    "half written": ("torch.save", half_written),
    "fsync": ("os.fsync", full_for(r"\.tmp$|checkpoint", os.fsync)),
    "replace": ("os.replace", full_for("checkpoint", os.replace)),
    "metrics.csv": ("os.fsync", full_for(r"metrics\.csv$", os.fsync)),
    "evaluations.csv": ("os.fsync", full_for(r"evaluations\.csv$", os.fsync)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_space_left(train, whole, monkeypatch, capsys, fault):
    _, directory = train("run", max_timesteps=4)
    before = (directory / "checkpoint.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        capsys.readouterr()
        code, _ = train("run")
    out, error = capsys.readouterr()
    assert code == 1
    assert re.fullmatch(r"cql\.py: failed: .*No space left.*\n", error)
    assert "Traceback" not in out
    assert (directory / "checkpoint.pt").read_bytes() == before
    assert not list(directory.glob("*.tmp"))
    assert cql.read_checkpoint(directory / "checkpoint.pt")["step"] == 4
    assert train("run")[0] == 0
    assert differences(whole(), directory) == []


def test_no_space_for_the_first_files(toy, train, tmp_path, monkeypatch, capsys):
    """config.yaml and the copy of cql.py are written at the start."""
    for target, name in (("write_text", "config.yaml"), ("write_bytes", "cql.py")):
        code = "not run"
        with monkeypatch.context() as patch:
            patch.setattr(Path, target, disk_full)
            patch.setattr(shutil, "copyfile", disk_full)
            try:
                code = train(name)[0]
            except OSError:
                code = "a traceback"
        assert code == 1, name
        assert capsys.readouterr().err.startswith("cql.py: failed: ")


def test_file_system_that_stops_growing(toy, tmp_path):
    """The kernel's own refusal: files may not exceed half a checkpoint."""
    argv = command(toy, tmp_path, max_timesteps=4, hidden_dim=32)
    assert cql.main(argv) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert len(before) > 60_000
    output, limit = tmp_path / "output", len(before) // 2
    argv = flags(resume=tmp_path, max_timesteps=8)
    code = finish(start(argv, output, limit_file_size, limit))
    assert re.search(r"^cql\.py: failed: .*", output.read_text(), re.M)
    assert code == 1 and "Traceback" not in output.read_text()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["load_model", "resume"])
def test_code_in_a_checkpoint_is_refused(toy, tmp_path, capsys, where):
    planted, file = tmp_path / "planted", tmp_path / "checkpoint.pt"
    torch.save({"format": "cql.py", "version": 1, "agent": Planted(planted)}, file)
    source = {"load_model": file, "resume": tmp_path}[where]
    assert cql.main(flags(env=toy, **{**BASE, where: source})) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"cql\.py: error: .*checkpoint\.pt.*\n", error)
    with pytest.raises(cql.UserError):
        cql.load_policy(file)
    assert not planted.exists()
    torch.load(file, weights_only=False)  # it would have run
    assert planted.exists()


def test_checkpoint_every_five_minutes(train, whole, monkeypatch):
    """Due by the clock alone, in the middle of an interval of either table."""
    assert cql.Run.CHECKPOINT_SECONDS == 300
    seen = []

    def look(number, agent, metrics):
        file = Path(directory) / "checkpoint.pt"
        seen.append(cql.read_checkpoint(file)["step"] if file.exists() else 0)

    for seconds, expected in ((300, [0] * 4 + [4] * 4 + [8] * 4), (-1, list(range(12)))):
        directory, seen = train("none", max_timesteps=0)[1].parent / str(seconds), []
        with monkeypatch.context() as patch:
            patch.setattr(cql.Run, "CHECKPOINT_SECONDS", seconds)
            after_update(patch, look)
            train(str(seconds), **FULL)
        assert seen == expected
        assert differences(whole(**FULL), directory) == []


def test_nothing_is_written_without_checkpoints_path(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cql.main(flags(env=toy, checkpoints_path="null", **BASE)) == 0
    out = capsys.readouterr().out
    assert re.search(r"nothing .*written", out) and "files: none" in out
    assert len(re.findall(r"^update .* return ", out, re.M)) == 3
    assert list(tmp_path.iterdir()) == []


def test_directory_of_a_live_run_is_refused(toy, tmp_path):
    argv, output = (
        command(toy, tmp_path / "run", max_timesteps=10**6),
        tmp_path / "output",
    )
    process = start(argv)
    wait_for(tmp_path / "run", "evaluations.csv", 3, process)
    assert finish(start(argv, output)) == 2
    error = output.read_text()
    assert error.startswith("cql.py: error: ") and error.count("\n") == 1
    assert str(tmp_path / "run") in error and "in use" in error
    assert process.is_alive()
    process.terminate()
    assert finish(process) == 143
    descriptor = os.open(tmp_path / "run" / ".lock", os.O_WRONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again
    os.close(descriptor)
    step = checkpoint(tmp_path / "run")["step"]
    assert cql.main(flags(resume=tmp_path / "run", max_timesteps=step + 1)) == 0


def test_interrupted_without_a_directory(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    after_update(monkeypatch, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert cql.main(flags(env=toy, checkpoints_path="null", **BASE)) == 143
    out = capsys.readouterr().out
    assert "interrupted at update 1" in out and "None" not in out
    assert list(tmp_path.iterdir()) == []


# --- 7. divergence --------------------------------------------------------------------


def poison(update, run, parameters_only=False):
    """From an update on, a run's losses and weights, or its weights alone, are NaN."""

    def function(number, agent, metrics):
        if number == update:
            for parameter in agent.policy.parameters():
                parameter.data[run] = np.nan
        if number >= update and not parameters_only:
            next(iter(metrics.values()))[run] = np.nan

    return function


def agent_of_run(directory, run, n_runs):
    """The tensors of one stacked run."""
    parts = {}

    def visit(value, name):
        if isinstance(value, dict):
            for key, part in value.items():
                visit(part, f"{name}/{key}")
        elif isinstance(value, torch.Tensor) and value.ndim and len(value) == n_runs:
            parts[name] = value[run]

    visit(checkpoint(directory)["agent"], "")
    assert len(parts) > 20
    return parts


def equal_parts(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_one_of_several_runs_diverges(train, whole, monkeypatch, capsys):
    """Run 1 of five goes non-finite at update 6: after the checkpoint at 4."""
    changes = {"seed": [0, 1, 2, 3, 4]}
    with monkeypatch.context() as patch:
        after_update(patch, poison(6, 1))
        code, directory = train("run", **changes)
    out = capsys.readouterr().out
    assert code == 3
    assert len(re.findall(r"^run 1 diverged.*$", out, re.M)) == 1
    assert re.search(r"^ +1 +1 .*diverged\D*6$", out, re.M)  # the closing table
    assert "run 0 diverged" not in out
    healthy, early = whole(**changes), train("early", max_timesteps=4, **changes)[1]
    for run in (0, 2, 3, 4):
        for name in TABLES:
            mine = [r for r in rows(directory, name) if r["run"] == str(run)]
            assert mine == [r for r in rows(healthy, name) if r["run"] == str(run)]
        parts = [agent_of_run(d, run, 5) for d in (directory, healthy)]
        assert equal_parts(*parts)
    assert {r["step"] for r in rows(directory, "metrics.csv") if r["run"] == "1"} == {
        "3"
    }
    evaluated = [r for r in rows(directory, "evaluations.csv") if r["run"] == "1"]
    assert [row["step"] for row in evaluated] == ["4"]
    assert equal_parts(agent_of_run(directory, 1, 5), agent_of_run(early, 1, 5))
    assert not equal_parts(agent_of_run(healthy, 1, 5), agent_of_run(early, 1, 5))
    # Resumed, it stays stopped, and the status says so again.
    assert train("run", **{**changes, "max_timesteps": 16})[0] == 3
    assert {r["step"] for r in rows(directory, "metrics.csv") if r["run"] == "1"} == {
        "3"
    }
    assert equal_parts(agent_of_run(directory, 1, 5), agent_of_run(early, 1, 5))
    longer = whole(**{**changes, "max_timesteps": 16})
    mine, own = (numbers(rows(d, "metrics.csv"), 0) for d in (directory, longer))
    np.testing.assert_array_equal(mine, own)


def test_a_checkpoint_leaves_the_live_tensors(train, monkeypatch):
    """A CUDA graph writes to the addresses that it has seen."""
    places, checkpoint_of = [], cql.Run.checkpoint

    def watched(run):
        checkpoint_of(run)
        moments = run.agent.optimizer.state.values()
        tensors = [*run.agent.state_dict().values(), *(x["exp_avg"] for x in moments)]
        places.append([x.data_ptr() for x in tensors if torch.is_tensor(x)])

    monkeypatch.setattr(cql.Run, "checkpoint", watched)
    assert train("run", cql_alpha=[1, 3e38], seed=[0])[0] == 3
    assert len(places) > 1 and all(place == places[0] for place in places)


def test_overflow_diverges(train, capsys):
    """No patching: this weight times any gap is not a number of 32 bits."""
    code, directory = train("run", cql_alpha=[1, 3e38], seed=[0])
    assert code == 3
    healthy = train("healthy", cql_alpha=[1, 2], seed=[0])[1]
    for name in TABLES:
        mine, own = rows(directory, name), rows(healthy, name)
        assert mine == [row for row in own if row["run"] == "0"] != []
    # Of this update's quantities only the weighted gap; a row later everything.
    out = capsys.readouterr().out
    assert (
        "run 1 diverged by update 3: first cql_min_qf1_loss, cql_min_qf2_loss not" in out
    )


def test_huge_rewards_diverge(tmp_path, capsys):
    episodes = random_episodes([20] * 4)
    for episode in episodes:
        episode["rewards"] *= 1e30
    data = minari_dataset(tmp_path / "data", "huge/random-v0", episodes)
    assert cql.main(command(data, tmp_path / "run", seed=[0, 1])) == 3
    out, error = capsys.readouterr()
    assert re.findall(r"run (\d) diverged", out) == ["0", "1"] and error == ""
    assert out.count(": first qf1_loss, qf2_loss not finite") == 2


def test_a_solo_divergence_keeps_the_last_finite_checkpoint(train, whole, monkeypatch):
    with monkeypatch.context() as patch:
        after_update(patch, poison(6, 0))
        code, directory = train("run")
    assert code == 3
    assert checkpoint(directory)["step"] == 4
    early = train("early", max_timesteps=4)[1]
    mine, own = (flattened(checkpoint(d)["agent"]) for d in (directory, early))
    assert mine == own
    assert train("run")[0] == 0  # what made it diverge was not in the checkpoint
    assert differences(whole(), directory) == []


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["solo", "stacked"])
def test_weights_that_go_before_the_loss(train, monkeypatch, seed):
    """The last update before a checkpoint spoils the weights; its losses were finite."""
    with monkeypatch.context() as patch:
        after_update(patch, poison(8, 0, parameters_only=True))
        code, directory = train("run", seed=seed)
    assert code == 3
    payload = flattened(checkpoint(directory)["agent"])
    weights = [v for k, v in payload.items() if "float" in str(v) and "policy" in k]
    arrays = [np.frombuffer(data, np.float32) for _, data in weights]
    assert arrays and all(np.isfinite(array).all() for array in arrays)


@pytest.mark.parametrize("both", [False, True], ids=["policy", "policy and data"])
def test_runaway_is_said_once(train, monkeypatch, capsys, both):
    """From update 5 on, Q on run 1's policy actions (on the data's too: what happens
    without a penalty) exceeds what rewards can pay."""

    def inflate(number, agent, metrics):
        if agent.step >= 4:
            metrics["cql_q{j}_current_actions"][1] += 1e6
            metrics["average_qf{j}"][1] += 1e6 * both

    after_update(monkeypatch, inflate)
    train("run", seed=[0, 1, 2], max_timesteps=8)
    assert train("run", seed=[0, 1, 2])[0] == 0  # resumed: not said again
    said = re.findall(
        r"^run (\d): Q runs away.*cql_alpha.*$", capsys.readouterr().out, re.M
    )
    assert said == ["1"]


# --- 8. faults of the environment -----------------------------------------------------


def test_environment_that_raises(train, whole, hooked, capsys):
    def fail():
        if len(Hooked.resets) > 8:  # in the second evaluation
            raise RuntimeError("the simulator\nis unstable")

    hooked(fail)
    code, directory = train("run", eval_env="CqlHooked-v0", **FULL)
    out, error = capsys.readouterr()
    assert code == 1
    assert re.fullmatch(r"cql\.py: failed: .*CqlHooked-v0.*the simulator.*\n", error)
    assert "Traceback" not in out
    assert checkpoint(directory)["step"] == 4
    hooked()
    assert train("run", eval_env="CqlHooked-v0", **FULL)[0] == 0
    assert differences(whole(**FULL), directory) == []


def test_table_without_evaluations(tmp_path, capsys):
    episodes = random_episodes([30] * 3)
    data = minari_dataset(tmp_path / "data", "plain/random-v0", episodes)
    assert cql.main(command(data, tmp_path / "run")) == 0
    assert closing_table(capsys.readouterr().out) == {"0": ["0", "1", "-", "-"]}


def test_dataset_without_environment(tmp_path, capsys):
    data = minari_dataset(
        tmp_path / "data", "plain/random-v0", random_episodes([30] * 3)
    )
    directory = tmp_path / "run"
    assert cql.main(command(data, directory, seed=[0, 1])) == 0
    assert rows(directory, "evaluations.csv") == []
    assert len(rows(directory, "metrics.csv")) == 2 * 4
    assert re.search("no evaluation|without evaluation", capsys.readouterr().out)
    assert cql.load_policy(directory / "checkpoint.pt", 1)(np.zeros(3)).shape == (2,)
    half = tmp_path / "half"
    for steps in (5, 12):
        argv = command(data, half, seed=[0, 1], max_timesteps=steps)
        assert cql.main(argv) == 0
    mine, own = flattened(checkpoint(directory)), flattened(checkpoint(half))
    assert [k for k in mine if mine[k] != own[k]] == ["/config/resume"]
    names = [d / "metrics.csv" for d in (directory, half)]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_reference_returns_that_come_with_another_environment(tmp_path, capsys):
    """The first evaluations have no score, the later ones have: the table shows them."""
    data, run = hopper_dataset(tmp_path / "data", episodes=4), tmp_path / "run"
    first = {"max_timesteps": 4, "eval_freq": 2, "eval_env": "CqlHopper-v0"}
    assert cql.main(command(data, run, **first)) == 0
    capsys.readouterr()
    assert cql.main(flags(resume=run, max_timesteps=8, eval_env="Hopper-v5")) == 0
    table = closing_table(capsys.readouterr().out)
    scores = [row["d4rl_normalized_score"] for row in rows(run, "evaluations.csv")]
    assert scores[:2] == ["", ""] and len(scores) == 4
    known = [float(score) for score in scores[2:]]
    assert table["0"][2:] == [f"{known[-1]:.2f}", f"{max(known):.2f}"]


# --- 9. the terminal ------------------------------------------------------------------


def closing_table(out):
    """{run: (seed, cql_alpha, last, best)} as printed."""
    table = re.search(r"^ *run +seed +cql_alpha +last +best.*\n((?: .*\n)+)", out, re.M)
    lines = [line.split() for line in table[1].splitlines()]
    return {line[0]: line[1:5] for line in lines}


def test_nobody_reads_the_terminal(tmp_path):
    """`python cql.py ... | head -1`: the run goes on to its end, without a traceback."""
    episodes, directory = random_episodes([30] * 3), tmp_path / "run"
    data = minari_dataset(tmp_path / "data", "plain/random-v0", episodes)
    argv = [sys.executable, str(SCRIPT), *command(data, directory)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read().decode()
    assert (process.wait(), error) == (0, "")
    assert checkpoint(directory)["step"] == 12


def test_closing_table_and_plain_output(train, capsys):
    directory = train("run", seed=[0, 1], max_timesteps=20)[1]
    out, error = capsys.readouterr()
    assert error == "" and not re.search(r"[\r\x1b]", out)
    table, evaluations = closing_table(out), rows(directory, "evaluations.csv")
    assert table.keys() == {"0", "1"}
    for run, line in table.items():
        mine = [row for row in evaluations if row["run"] == run]
        scores = [float(row["d4rl_normalized_score"]) for row in mine]
        assert line == [run, "1", f"{scores[-1]:.2f}", f"{max(scores):.2f}"]
        assert len(scores) == 5
    assert out.splitlines()[-1] == f"files: {directory}"


def on_screen(text):
    """What a terminal shows: a carriage return goes back to the line's beginning."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown).rstrip())
    return lines


def test_bar_on_a_terminal(toy, tmp_path, whole):
    changes = {"max_timesteps": 300, "eval_freq": 50}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, 0x5414, b"\x18\0\x78\0\0\0\0\0")  # TIOCSWINSZ: 24 x 120
    process = start(command(toy, tmp_path / "run", **changes), os.ttyname(slave))
    output = b""
    os.set_blocking(master, False)
    while process.is_alive() or not output.endswith(b"run\r\n"):
        try:
            output += os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(master)
    os.close(slave)
    assert finish(process) == 0
    text = output.decode()
    bars = re.findall(r"\d+%\|[^|\r\n]*\| \d+/300 \[[^]\r\n]*\]", text)
    left = [
        bar for bar in bars if re.search(r"\d\d:\d\d<\d\d:\d\d, +[\d.]+update/s", bar)
    ]
    assert len(left) >= 3, bars
    lines = [line for line in on_screen(text) if line.startswith("update ")]
    returns = [
        float(row["return_mean"]) for row in rows(tmp_path / "run", "evaluations.csv")
    ]
    assert len(lines) == len(returns) == 6
    for line, value in zip(lines, returns):
        pattern = r"update +\d+ +return (-?\d+) \+- \d+ +score -?[\d.]+"
        assert float(re.fullmatch(pattern, line)[1]) == pytest.approx(value, abs=0.51)
    assert not any("%|" in line for line in on_screen(text)[-4:])  # it clears itself
    assert differences(whole(**changes), tmp_path / "run") == []


# --- 10. metrics ----------------------------------------------------------------------

ONCE = (
    "log_pi policy_loss alpha_loss alpha average_target_q alpha_prime_loss alpha_prime"
)
PER_CRITIC = (
    "qf{}_loss average_qf{} cql_std_q{} cql_q{}_rand cql_q{}_current_actions "
    "cql_q{}_next_actions cql_min_qf{}_loss cql_qf{}_diff"
)
EVALUATION = (
    "step run seed cql_alpha cql_temp cql_target_action_gap episodes return_mean "
    "return_std length_mean d4rl_normalized_score"
)


def test_columns_of_the_tables(train):
    directory = train("run", n_critics=3)[1]
    names = list(rows(directory, "metrics.csv")[0])
    expected = ONCE.split() + [
        n.format(j) for n in PER_CRITIC.split() for j in (1, 2, 3)
    ]
    assert names[:2] == ["step", "run"] and sorted(names[2:]) == sorted(expected)
    assert list(rows(directory, "evaluations.csv")[0]) == EVALUATION.split()
    steps = [row["step"] for row in rows(directory, "metrics.csv")]
    assert steps == "3 6 9 12".split()
    assert "step" in rows(directory, "timing.csv")[0]


def test_rows_are_interval_means(toy, train):
    """Against an agent driven by hand, update by update."""
    changes = {**BASE, **FULL, "log_freq": 4, "max_timesteps": 10}
    directory = train("run", **changes)[1]
    config = cql.TrainConfig(env=str(toy), **changes)
    data, bounds = cql.Dataset(config), (BOUNDS["low"], BOUNDS["high"])
    agent = cql.ContinuousCQL(config, 3, 2, "cpu", *bounds, *data.statistics())
    values = []
    for _ in range(10):
        noise = agent.draw(config.batch_size)
        metrics = agent.update(data.sample(noise.rows), noise)
        values.append({k: v.double().numpy().copy() for k, v in metrics.items()})
    table = rows(directory, "metrics.csv")
    assert [(r["step"], r["run"]) for r in table] == [
        (step, run) for step in ("4", "8", "10") for run in "0123"
    ]
    for row in table:
        end, r = int(row["step"]), int(row["run"])
        interval = values[(end - 1) // 4 * 4 : end]
        for name in interval[0]:
            mean = np.mean([v[name][r] for v in interval], 0)
            keys = [name.format(j=j) for j in range(1, mean.size + 1)]
            shown = [float(row[key]) for key in dict.fromkeys(keys)]
            np.testing.assert_allclose(shown, np.atleast_1d(mean), rtol=1e-6, atol=1e-9)


# --- 11. what others have done meanwhile ----------------------------------------------


def test_a_run_that_ends_while_another_reads_the_data(
    toy, tmp_path, capsys, monkeypatch
):
    """Two of one command: the later one must not begin again what the first one did."""
    argv, read = command(toy, tmp_path / "run"), cql.read_episodes

    def read_slowly(name):
        monkeypatch.setattr(cql, "read_episodes", read)
        assert cql.main(argv) == 0
        return read(name)

    for earlier in (False, True):  # the directory's first checkpoint, or a later one
        if earlier:
            argv = command(toy, tmp_path / "run", max_timesteps=16)
        monkeypatch.setattr(cql, "read_episodes", read_slowly)
        assert cql.main(argv) == 2
        assert "meanwhile" in capsys.readouterr().err
        assert checkpoint(tmp_path / "run")["step"] == (16 if earlier else 12)


def test_other_data_under_the_same_name(tmp_path, capsys):
    data = toy_dataset(tmp_path / "data")
    assert cql.main(command(data, tmp_path / "run")) == 0
    shutil.rmtree(tmp_path / "data")
    toy_dataset(tmp_path / "data", episodes=30)
    assert cql.main(flags(resume=tmp_path / "run", max_timesteps=16)) == 2
    assert "transitions; the run had" in capsys.readouterr().err


def test_a_directory_of_other_things_is_no_run(toy, tmp_path, capsys):
    (tmp_path / "runs" / "walker").mkdir(parents=True)
    assert cql.main(command(toy, tmp_path / "runs")) == 2
    assert "holds other things" in capsys.readouterr().err
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "log.txt").write_text("")  # `> job/log.txt`
    assert cql.main(command(toy, tmp_path / "job")) == 0
    assert "no checkpoint in" in capsys.readouterr().out


def test_a_second_signal_is_not_held_back():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt), cql.noted_signals() as noted:
            signal.raise_signal(signal.SIGINT)
            assert noted == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_flag_that_the_run_did_not_have(train, capsys):
    """A fork's: it counts as at its default until now."""
    directory = train("run", max_timesteps=4)[1]
    path = directory / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config.pop("cql_temp")
    path.write_text(yaml.safe_dump(config))
    (directory / "cql.py").write_text("# an older one\n")
    assert cql.main(flags(resume=directory, cql_temp=2, max_timesteps=8)) == 2
    assert "--cql_temp 2" in capsys.readouterr().err
    assert cql.main(flags(resume=directory, cql_temp=1, max_timesteps=8)) == 0
    assert (directory / "cql.py").read_text() == SCRIPT.read_text()


# --- 12. a model elsewhere ------------------------------------------------------------


def test_load_model_evaluates_what_it_is_told_to(tmp_path, capsys):
    """Its own flags in the tables, another env only if that exists, and references and
    episode length of the environment at hand."""
    toy = toy_dataset(tmp_path / "toy", **REFERENCE)
    weights = {"cql_alpha": 7, "seed": 3, "cql_temp": 0.5}
    assert cql.main(command(toy, tmp_path / "run", **weights)) == 0
    evaluate = flags(load_model=tmp_path / "run", max_timesteps=0, device="cpu")
    again = tmp_path / "again"
    assert cql.main([*evaluate, f"--resume={again}"]) == 0
    (row,) = rows(again, "evaluations.csv")
    assert (row["cql_alpha"], row["seed"], row["cql_temp"]) == ("7", "3", "0.5")
    assert row["d4rl_normalized_score"] != ""
    assert "model: " in capsys.readouterr().out
    assert cql.main([*evaluate, "--env=no/such/thing"]) == 2
    assert "no/such/thing" in capsys.readouterr().err
    other, endless = tmp_path / "other", ["--eval_env=CqlEndless-v0"]
    assert cql.main([*evaluate, *endless, f"--resume={other}"]) == 0
    assert "returns, which are CqlToy-v0's" in capsys.readouterr().out
    (row,) = rows(other, "evaluations.csv")
    assert (
        float(row["length_mean"])
        == cql.Dataset(cql.TrainConfig(env=str(toy), batch_size=1)).task.longest
    )


def test_load_policy_takes_and_gives_matrices(tmp_path):
    """A box of observations [2, 2], and one of actions [2, 1]."""
    episodes = random_episodes([30] * 3, obs_dim=4)
    for episode in episodes:
        episode["observations"] = episode["observations"].reshape(-1, 2, 2)
        episode["actions"] = episode["actions"].reshape(-1, 2, 1)
    data = minari_dataset(tmp_path / "data", "matrix/random-v0", episodes)
    assert cql.main(command(data, tmp_path / "run")) == 0
    policy = cql.load_policy(tmp_path / "run")
    one = policy(np.ones((2, 2)))
    assert one.shape == (2, 1)
    several = policy(np.ones((5, 4)))
    assert several.shape == (5, 2, 1)
    np.testing.assert_allclose(several[0], one, rtol=1e-5)


def test_the_closing_table_tells_runs_apart(train, capsys):
    code, _ = train("run", cql_lagrange=True, cql_target_action_gap=[1, 5])
    out = capsys.readouterr().out
    assert code == 0 and re.search(r"run +seed +cql_alpha +cql_target_action_gap", out)
    assert re.search(r"^ +1 +0 +1 +5 ", out, re.M)


def test_an_evaluation_without_survivors(train, monkeypatch, capsys):
    after_update(monkeypatch, poison(2, 0))
    code, directory = train("run")
    out = capsys.readouterr().out
    assert (
        code == 3 and "return  " not in out and rows(directory, "evaluations.csv") == []
    )


def test_flags_that_make_another_useless_are_named(train, capsys):
    quiet = dict(max_timesteps=4, cal_ql=True, bc_steps=3, cql_alpha=[0, 1])
    assert train("quiet", **quiet)[0] == 0
    assert "bc_steps" not in (out := capsys.readouterr().out) and "cal_ql" not in out
    loud = {**quiet, "bc_steps": 4, "cql_alpha": [0]}
    assert train("loud", **loud)[0] == 0
    out = capsys.readouterr().out
    assert "bc_steps covers every update" in out
    assert "cal_ql has no effect with cql_alpha 0" in out


def test_the_environment_of_normalized_rewards_stays(tmp_path, capsys):
    episodes = random_episodes([20] * 4, obs_dim=11, action_dim=3, ends="terminal")
    path = tmp_path / "mine.hdf5"
    argv = command(d4rl_file(path, episodes), tmp_path / "run", normalize_reward=True)
    argv = [word for word in argv if "eval_env" not in word]
    assert cql.main([*argv, "--eval_env=Hopper-v5", "--max_timesteps=4"]) == 0
    capsys.readouterr()
    assert cql.main([*argv, "--eval_env=CqlHopper-v0"]) == 2
    assert "--eval_env CqlHopper-v0: the run learns" in capsys.readouterr().err


def test_the_closing_table_writes_seeds_in_full(train, capsys):
    train("run", seed=[20240101, 20240102])
    assert re.search(r"^ +0  20240101 ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("chip", ["none", "avx512_bf16", "amx_bf16", "another"])
def test_bf16_where_the_processor_has_none(train, monkeypatch, capsys, chip):
    names = () if chip == "another" else ("avx512_bf16", "amx_bf16")
    flags = {name: name == chip for name in names}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    train("run", precision="bf16")
    said = "precision bf16 is slower than fp32 here" in capsys.readouterr().out
    assert said == (chip == "none")
