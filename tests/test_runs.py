"""A run from its command to its directory: resume, signals, kills, evaluation,
checkpoints, divergence, the terminal, tables. Most runs are cql.main in this process;
those that must die are forked from a server that has imported this module."""

import csv
import dataclasses
import errno
import fcntl
import json
import math
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
    deadline,
    hopper_dataset,
    minari_dataset,
    random_episodes,
    toy_dataset,
    toy_episodes,
)

import cql

SCRIPT = Path(cql.__file__)
BOUNDS = {"low": [-2.0, 0.0], "high": [1.0, 4.0]}  # lopsided: ignoring them shows
REFERENCE = {"ref_min_score": -5.0, "ref_max_score": 15.0}
BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    policy_lr=1e-2, qf_lr=1e-2, cql_alpha=1, max_timesteps=12, eval_freq=4, log_freq=3,
    n_episodes=2,
)  # fmt: skip
# State of every kind: stacked, Lagrange, a phase, a period that the update decides.
FULL = dict(
    seed=[0, 1], cql_alpha=[1, 5], cql_lagrange=True, cql_target_action_gap=1,
    bc_steps=8, target_update_period=3, backup_entropy=True,
)  # fmt: skip
TABLES = ("metrics.csv", "evaluations.csv")


class Hooked(Toy):
    """The toy environment, which notes its reset seeds and asks a hook for each info,
    except when it is tried before training."""

    resets, hook = [], staticmethod(lambda env: None)

    def reset(self, seed=None, options=None):
        self.tried = seed == 2**31 - 1
        if not self.tried:
            Hooked.resets.append(seed)
        self.episode, self.steps = len(Hooked.resets) - 1, 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        info = {} if self.tried else Hooked.hook(self) or {}
        self.steps += 1
        return *super().step(action)[:4], info


class Few(Toy):
    """The toy as a simulator of which `most` can be open at once."""

    most, opened, live = 1, 0, 0

    def __init__(self, **settings):
        if Few.live >= Few.most:
            raise RuntimeError("a simulator is open already")
        Few.opened, Few.live = Few.opened + 1, Few.live + 1
        super().__init__(**settings)

    def close(self):
        Few.live -= 1


gym.register("CqlHooked-v0", f"{__name__}:Hooked", max_episode_steps=20, kwargs=BOUNDS)
gym.register("CqlFew-v0", Few, max_episode_steps=20)
gym.register("CqlStill-v0", Toy, kwargs={"push": 0.0})  # its episodes never end
gym.register("CqlHopper-v0", gym.spec("Hopper-v5").entry_point, max_episode_steps=100)


@pytest.fixture
def hooked(monkeypatch):
    """Sets what is called with the environment in every step, whose result is the info;
    returns the reset seeds from now on."""

    def set_hook(function=lambda env: None):
        monkeypatch.setattr(Hooked, "resets", [])
        monkeypatch.setattr(Hooked, "hook", staticmethod(function))
        return Hooked.resets

    return set_hook


@pytest.fixture
def few(monkeypatch):
    """The simulator that allows `most` instances, none of them open."""

    def allow(most):
        for name, value in (("most", most), ("opened", 0), ("live", 0)):
            monkeypatch.setattr(Few, name, value)
        return Few

    return allow


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    return toy_dataset(root, env_kwargs=BOUNDS, **REFERENCE)


@pytest.fixture(scope="session")
def square(tmp_path_factory):
    """The same with actions in [-1, 1], for environments of this module."""
    return toy_dataset(tmp_path_factory.mktemp("square"))


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


def plain_dataset(root, episodes=None):
    """Data that records no environment."""
    episodes = random_episodes([30] * 3) if episodes is None else episodes
    return minari_dataset(root, "plain/random-v0", episodes)


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
    """Return all that must be equal: each value of the checkpoints, including best.pt,
    and each byte of the tables."""
    values = {}
    for path in directory.glob("[bc]*.pt"):  # not what a run that diverged left
        values |= flattened(torch.load(path, weights_only=True), path.name)
    private = r"config/(env|resume|checkpoints_path|eval_env|load_model)|wandb_ids.*"
    private = rf"[^/]*/({private})|checkpoint_\d+.pt/config/.*"
    values = {k: v for k, v in values.items() if not re.fullmatch(private, k)}
    tables = {name: (directory / name).read_bytes() for name in TABLES}
    steps = [row["step"] for row in rows(directory, "timing.csv")]
    repeated = [step for step in steps if steps.count(step) > 1]
    return {**values, **tables, "repeated in timing.csv": repeated}


def without_step(table, step):
    """Return a table's bytes without the rows of that step."""
    lines = table.splitlines(keepends=True)
    return b"".join(line for line in lines if not line.startswith(b"%d," % step))


def differences(one, other, first_end=None):
    """Return the names of what differs between two runs' directories. first_end: the
    step at which the other run ended first. Its rows stay there, off the schedule, and
    such an evaluation may be its best."""
    ours, theirs = state(one), state(other)
    if first_end is not None:
        extra = []
        for name in TABLES:
            if not rows(one, name, step=first_end):
                theirs[name] = without_step(theirs[name], first_end)
                extra.append(name)
        if "evaluations.csv" in extra:
            for values in (ours, theirs):
                for key in list(values):
                    if re.match(r"best\.pt/|[^/]*/best/", key):
                        del values[key]
    return [k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)]


def check_best(directory):
    """Assert that each run's best step is that of its highest return in the table."""
    best = torch.load(directory / "best.pt", weights_only=True)["best"]
    for run, step in enumerate(best["steps"]):
        table = rows(directory, "evaluations.csv", run=run)
        returns = [float(row["return_mean"]) for row in table]
        assert step == int(table[np.argmax(returns)]["step"])
        assert best["returns"][run] == pytest.approx(max(returns), rel=1e-6)


def rows(directory, name, **which):
    """The rows of a table, all or those of, say, run=1."""
    path, found = directory / name, []
    if path.exists():
        with open(path, newline="") as file:
            found = list(csv.DictReader(file))
    chosen = {column: str(value) for column, value in which.items()}.items()
    return [row for row in found if chosen <= row.items()]


def numbers(table, without=("run", "seed", "cql_alpha")):
    """Rows as an array; what is blank is NaN."""
    values = []
    for row in table:
        values.append([float(v or "nan") for k, v in row.items() if k not in without])
    return np.array(values)


def listing(directory):
    """Every file and its bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def check_refusal(error, *fragments):
    """What bad input gets is one line that holds the fragments."""
    assert re.fullmatch(r"cql\.py: error: [^\n]+\n", error), error
    missing = [part for part in map(str, fragments) if part not in error]
    assert not missing, f"{missing} not in: {error}"


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


def finish(process, seconds=300):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the run does not end")
    return process.exitcode


def wait_for(directory, name, count, process, seconds=300):
    """Until a table has that many lines, or the process has ended."""
    table, latest = directory / name, time.monotonic() + seconds
    while not table.exists() or table.read_text().count("\n") < count:
        if process.exitcode is not None:
            return
        assert time.monotonic() < latest, f"{name} does not grow"
        time.sleep(0.002)


def die_at(call):
    """This process is killed at its call-th use of the file system, and writes a
    checkpoint after every update. What it was to write then is half there."""
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

    def half_a_text(path, text):
        write(path, text[: len(text) // 2])

    def half_a_copy(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:1000])

    def half_a_checkpoint(payload, file):
        file.write(b"half a checkpoint")
        file.flush()

    write = Path.write_text
    os.fsync, os.replace = fatal(os.fsync), fatal(os.replace)
    torch.save = fatal(torch.save, half_a_checkpoint)
    shutil.copyfile = fatal(shutil.copyfile, half_a_copy)
    Path.write_text = fatal(write, half_a_text)
    cql.Run.CHECKPOINT_SECONDS = -1


def limit_file_size(size):
    """The kernel lets no file of this process grow beyond it; returns what it was."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    return before


def slow_down(seconds):
    """Every update takes as long, so that a busy machine does not miss the moment."""
    update = cql.ContinuousCQL.update

    def slow(self, *arguments):
        time.sleep(seconds)
        return update(self, *arguments)

    cql.ContinuousCQL.update = slow


def close_the_reader():
    """Standard output becomes a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def after_update(monkeypatch, function):
    """function(number, agent, metrics) after each update, numbered from 1."""
    update, count = cql.ContinuousCQL.update, iter(range(1, 10**9))

    def wrapped(self, *arguments, **options):
        metrics = update(self, *arguments, **options)
        function(next(count), self, metrics)
        return metrics

    monkeypatch.setattr(cql.ContinuousCQL, "update", wrapped)


def signal_at(update, number=signal.SIGTERM):
    """A hook for after_update that interrupts this process."""

    def interrupt(now, agent, metrics):
        if now == update:
            os.kill(os.getpid(), number)

    return interrupt


# --- resume ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "half, off_schedule",  # log_freq is 3, eval_freq 4
    [
        (0, ["evaluations.csv"]),
        (4, ["metrics.csv"]),
        (5, TABLES),
        (6, ["evaluations.csv"]),
    ],
)
def test_a_run_made_longer_in_another_process_is_bit_exact(
    toy, tmp_path, whole, half, off_schedule
):
    """The rows of its first end stay, on the schedule or off it."""
    assert cql.main(command(toy, tmp_path, **{**FULL, "max_timesteps": half})) == 0
    assert checkpoint(tmp_path)["step"] == half
    assert len(rows(tmp_path, "evaluations.csv", step=half)) == 4
    written = {}
    for name in TABLES:
        if (tmp_path / name).exists():  # there is no metrics.csv at update 0
            written[name] = (tmp_path / name).read_bytes()
    assert finish(start(flags(resume=tmp_path, max_timesteps=12))) == 0
    reference = whole(**FULL)
    assert differences(reference, tmp_path, first_end=half) == []
    for name, table in written.items():
        assert (tmp_path / name).read_bytes().startswith(table)
    check_best(tmp_path)
    names = " ".join(state(reference))
    parts = "policy target_critic exp_avg_sq log_alpha_prime updates sums fingerprint"
    parts += " replay best.pt/agent/critic best/tensors/policy"
    for part in parts.split():
        assert part in names
    for name, n_regular in zip(TABLES, (4, 3)):
        assert len(rows(tmp_path, name)) == 4 * (n_regular + (name in off_schedule))


def test_killed_at_random_moments(toy, tmp_path, whole):
    changes = {**FULL, "max_timesteps": 90, "eval_freq": 6, "n_episodes": 1}
    argv, rng, killed = command(toy, tmp_path, **changes), random.Random(0), 0
    for lines in (2, 4, 8, 12, 17, 23):  # a line every three updates
        process = start(argv, os.devnull, slow_down, 0.005)
        wait_for(tmp_path, "timing.csv", lines, process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3
    assert finish(start(argv)) == 0
    assert differences(whole(**changes), tmp_path) == []


@pytest.mark.parametrize("done", [0, 2])
def test_killed_at_every_file_operation(toy, tmp_path, done):
    """Of a fresh run, and of a resumed one, which rewrites its tables first."""
    changes = {"eval_freq": 2, "log_freq": 2, "n_episodes": 1, "cql_lagrange": True}
    changes |= {"max_timesteps": done + 2, "checkpoint_freq": 2}
    reference, begun, wrong = tmp_path / "whole", tmp_path / "begun", {}
    assert cql.main(command(toy, reference, **changes)) == 0
    begun.mkdir()
    if done:
        argv = command(toy, begun, **{**changes, "max_timesteps": done})
        assert cql.main(argv) == 0
    for call in range(1, 1000):
        directory = shutil.copytree(begun, tmp_path / str(call))
        argv = command(toy, directory, **changes)
        code = finish(start(argv, os.devnull, die_at, call))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        code = cql.main(argv)
        if code or (found := differences(reference, directory)):
            wrong[call] = code or found
        assert not list(directory.glob("*.tmp"))
    assert call > 12
    assert wrong == {}, f"of {call - 1} moments"


@pytest.mark.parametrize("torn", ["step,run,al", "whole\n3,0,0.99", "whole\n3"])
def test_a_torn_table(train, whole, monkeypatch, torn):
    """The machine stopped within the first row of metrics.csv, after a checkpoint."""
    with monkeypatch.context() as patch:
        after_update(patch, signal_at(2))
        code, directory = train("run")
    assert code == 143
    header = (whole() / "metrics.csv").read_text().splitlines()[0]
    (directory / "metrics.csv").write_text(torn.replace("whole", header))
    assert train("run")[0] == 0
    assert differences(whole(), directory) == []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_a_process(toy, tmp_path, whole, number, status):
    """Then again, by a command that leaves all else out."""
    changes = {**FULL, "max_timesteps": 200, "eval_freq": 50, "n_episodes": 1}
    output = tmp_path / "output"
    argv = command(toy, tmp_path / "run", **changes)
    process = start(argv, output, slow_down, 0.02)
    wait_for(tmp_path / "run", "metrics.csv", 13, process)
    os.kill(process.pid, number)
    assert finish(process) == status
    step, text = checkpoint(tmp_path / "run")["step"], output.read_text()
    assert 9 <= step < 200 and f"interrupted at update {step}" in text
    assert "Traceback" not in text
    assert cql.main(flags(resume=tmp_path / "run")) == 0
    assert differences(whole(**changes), tmp_path / "run") == []


@pytest.mark.parametrize("update", range(1, 13))
def test_a_signal_during_an_update(train, whole, monkeypatch, update):
    with monkeypatch.context() as patch:
        after_update(patch, signal_at(update))
        code, directory = train("run", **FULL)
    assert code == 143
    assert checkpoint(directory)["step"] == update
    assert train("run", **FULL)[0] == 0
    assert differences(whole(**FULL), directory) == []


@pytest.mark.parametrize("evaluation", [1, 2, 3])  # at 4, 8 and 12, the last
def test_a_signal_during_an_evaluation(train, whole, hooked, evaluation):
    def interrupt(env):
        if len(Hooked.resets) == 8 * evaluation:  # four runs, two episodes
            os.kill(os.getpid(), signal.SIGTERM)

    hooked(interrupt)
    code, directory = train("run", eval_env="CqlHooked-v0", **FULL)
    assert code == 143
    assert checkpoint(directory)["step"] == 4 * evaluation
    assert len(rows(directory, "evaluations.csv")) == 4 * (evaluation - 1)
    hooked()
    assert train("run", eval_env="CqlHooked-v0", **FULL)[0] == 0
    assert differences(whole(**FULL), directory) == []


def test_a_second_signal_is_not_held_back():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt), cql.stop_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupted_without_a_directory(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    after_update(monkeypatch, signal_at(1))
    assert cql.main(flags(env=toy, checkpoints_path="null", **BASE)) == 143
    out = capsys.readouterr().out
    assert "interrupted at update 1" in out and "None" not in out
    assert list(tmp_path.iterdir()) == []


def test_resume_in_a_simulator(tmp_path):
    """MuJoCo starts anew at a reset: no evaluation leaves a trace in the next."""
    data = hopper_dataset(tmp_path / "data", episodes=4)
    for name, stops in (("whole", [8]), ("halves", [4, 8])):
        for steps in stops:
            argv = command(data, tmp_path / name, max_timesteps=steps, seed=[0, 1])
            assert cql.main(argv) == 0
    assert differences(tmp_path / "whole", tmp_path / "halves", first_end=4) == []
    assert len(rows(tmp_path / "halves", "evaluations.csv")) == 4


def test_a_preemptible_command_repeats(toy, tmp_path, whole, monkeypatch):
    config = {**BASE, **FULL, "env": str(toy), "cql_clip_diff_min": -np.inf}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    argv = flags(config_path=tmp_path / "job.yaml", resume=tmp_path / "run")
    codes = []
    for update in (1, 4, 5, 3):
        with monkeypatch.context() as patch:
            after_update(patch, signal_at(update, signal.SIGINT))
            codes.append(cql.main(argv))
    assert codes == [130, 130, 130, 0]  # 1 + 4 + 5 of 12 updates, then the last two
    assert differences(whole(**FULL), tmp_path / "run") == []


def test_a_complete_run_stays_as_it_is(toy, train, capsys):
    code, directory = train("run", **FULL)
    before, closing = listing(directory), closing_lines(capsys.readouterr().out)
    assert code == 0 and len(closing) == 4
    for argv in (flags(resume=directory), command(toy, directory, **FULL)):
        assert cql.main(argv) == 0
        after = listing(directory)
        assert before.keys() == after.keys()
        assert [name for name in before if before[name] != after[name]] == []
        assert closing_lines(capsys.readouterr().out) == closing


class Prioritized(cql.Replay):
    """A fork's replay: each draw of a transition halves its priority."""

    def __init__(self, config, data, agent):
        super().__init__(config, data, agent)
        self.priorities = torch.ones(len(agent.runs), len(data), dtype=torch.float64)

    def sample(self, fractions):
        total = self.priorities.cumsum(1)
        drawn = torch.searchsorted(total, fractions * total[:, -1:])
        self.priorities.scatter_(1, drawn, self.priorities.gather(1, drawn) / 2)
        return self.data.gather(drawn)

    def state(self):
        return {**super().state(), "priorities": self.priorities}

    def load(self, state):
        super().load(state)
        self.priorities.copy_(state["priorities"])


def test_the_replay_s_state_is_resumed(train, whole, monkeypatch):
    """Also offline, where this project's own replay has no state."""
    plain = rows(whole(**FULL), "metrics.csv")[-1]["qf1_loss"]
    monkeypatch.setattr(cql, "Replay", Prioritized)
    _, reference = train("whole", **FULL)
    for update in (5, 2):  # ends after 5 and after 7 updates
        with monkeypatch.context() as patch:
            after_update(patch, signal_at(update))
            assert train("run", **FULL)[0] == 143
    payload = checkpoint(train("run", **FULL)[1])
    assert differences(reference, reference.with_name("run")) == []
    drawn = -payload["replay"]["priorities"].log2()  # how often, [R, n]
    assert drawn.shape[0] == 4 and 12 < drawn.sum(1).min() <= 12 * BASE["batch_size"]
    # Of runs that share a seed, and of runs that do not.
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert plain != rows(reference, "metrics.csv")[-1]["qf1_loss"]


# --- what a resumed run may change ----------------------------------------------------

ALLOWED = dict(
    max_timesteps=8, eval_freq=3, n_episodes=3, eval_seed=1, eval_env="CqlHooked-v0",
    max_episode_steps=5, log_freq=5, device="auto", project="other", group="other",
    name="other", checkpoints_path="elsewhere", checkpoint_freq=2,
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
    for argv in (flags(offline_iterations=8), []):
        assert cql.main([*argv, *flags(resume=resumable)]) == 0
        assert checkpoint(resumable)["step"] == 8


def test_fewer_updates_than_done_are_refused(resumable, capsys):
    before = listing(resumable)
    assert cql.main(flags(resume=resumable, max_timesteps=3)) == 2
    check_refusal(capsys.readouterr().err, "--max_timesteps 3", 4)
    assert listing(resumable) == before
    assert cql.main(flags(resume=resumable, max_timesteps=5)) == 0  # it is not held


def other_value(field):
    """A value of the field's type that is neither its default nor in BASE."""
    used, kind = BASE.get(field.name, field.default), str(field.type)
    if isinstance(used, bool):
        return not used
    if isinstance(used, (int, float)) and "float" not in kind:
        return used + 1
    if isinstance(used, (int, float)):
        return 0.5 if used in (-1, 0, np.inf, -np.inf) else used / 2
    if "int" in kind:
        return 7
    return 0.5 if "float" in kind else "other"


NOT_RESUMABLE = [
    field
    for field in dataclasses.fields(cql.TrainConfig)
    if field.name not in {*ALLOWED, "env", "resume"} and "iterations" not in field.name
]


@pytest.mark.parametrize("field", NOT_RESUMABLE, ids=lambda field: field.name)
def test_resume_refuses_another(resumable, capsys, field):
    before = listing(resumable)
    assert cql.main(flags(resume=resumable, **{field.name: other_value(field)})) == 2
    check_refusal(capsys.readouterr().err, f"--{field.name} ")
    assert listing(resumable) == before


def test_data_that_was_moved(toy, tmp_path, whole):
    """The run goes on with the new path, bit for bit, and keeps it."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(toy, here)
    assert cql.main(command(here, tmp_path / "run", max_timesteps=5)) == 0
    here.rename(there)
    argv = flags(resume=tmp_path / "run", max_timesteps=12, env=there)
    assert cql.main(argv) == 0
    assert differences(whole(), tmp_path / "run", first_end=5) == []
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["env"] == str(there)


def more_episodes(episodes):
    return episodes + episodes[:1]


def other_rewards(episodes):
    episodes[0]["rewards"] = episodes[0]["rewards"] + 0.001
    return episodes


def negated_rewards(episodes):
    """As great, each of them, as before."""
    for episode in episodes:
        episode["rewards"] = -episode["rewards"]
    return episodes


def other_observations(episodes):
    episodes[-1]["observations"][0] *= 1.01
    return episodes


@pytest.mark.parametrize(
    "change", [more_episodes, other_rewards, negated_rewards, other_observations]
)
def test_other_data_is_refused(tmp_path, capsys, change):
    """Under the same name, or another."""
    episodes, run = toy_episodes(), tmp_path / "run"
    data = plain_dataset(tmp_path / "data", episodes)
    assert cql.main(command(data, run)) == 0
    changed = change(episodes)
    there = plain_dataset(tmp_path / "there", changed)
    shutil.rmtree(data)
    plain_dataset(tmp_path / "data", changed)
    before = listing(run)
    for name in (data, there):
        capsys.readouterr()
        assert cql.main(flags(resume=run, max_timesteps=16, env=name)) == 2
        check_refusal(capsys.readouterr().err, "--env", name)
        assert listing(run) == before


def test_the_environment_of_an_evaluation_does_not_change_what_is_learned(tmp_path):
    """Of this file without an environment, the name of --eval_env says how rewards are
    normalized. Without evaluation the run learns on as before, or is refused."""
    episodes = random_episodes([20] * 4, obs_dim=11, action_dim=3, ends="terminal")
    data, runs = d4rl_file(tmp_path / "mine.hdf5", episodes), []
    for name, more in (("whole", {}), ("halves", {"eval_env": "none"})):
        changes = {"normalize_reward": True, "eval_env": "Hopper-v5"}
        runs.append(tmp_path / name)
        argv = command(data, runs[-1], **{**changes, "max_timesteps": 4})
        assert cql.main(argv) == 0
        status = cql.main(flags(resume=runs[-1], max_timesteps=12, **more))
    if status != 2:
        one, other = (run / "metrics.csv" for run in runs)
        assert one.read_bytes() == other.read_bytes()


def test_a_new_metric_on_resume(train, monkeypatch):
    """A fork's new metric adds a column, and the sums of the interval start again."""
    seen = []

    def note(number, agent, metrics):
        metrics["mine"] = torch.full((1,), 4.0 + number)  # the number of the update
        seen.append(float(metrics["policy_loss"]))

    _, directory = train("run", max_timesteps=4)
    after_update(monkeypatch, note)
    code, _ = train("run", max_timesteps=9)
    assert code == 0
    table = rows(directory, "metrics.csv")
    assert [row["step"] for row in table] == ["3", "4", "6", "9"]
    mine = [row["mine"] for row in table]
    assert mine == ["", "", "5.5", "8"]  # of 5, 6 and 7, 8, 9
    losses = [float(row["policy_loss"]) for row in table[2:]]
    means = [np.mean(seen[:2]), np.mean(seen[2:])]
    np.testing.assert_allclose(losses, means, rtol=1e-6)


def test_a_new_swept_flag_on_resume(train, whole, capsys):
    """One that the run was begun without counts as at its default until now."""
    directory = train("run", max_timesteps=3)[1]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    payload, table = checkpoint(directory), rows(directory, "evaluations.csv")
    del config["cql_temp"], payload["config"]["cql_temp"]
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save(payload, directory / "checkpoint.pt")
    with open(directory / "evaluations.csv", "w") as file:
        names = [name for name in table[0] if name != "cql_temp"]
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    (directory / "cql.py").write_text("# an older one\n")
    assert cql.main(flags(resume=directory, cql_temp="[1,2]", max_timesteps=12)) == 2
    check_refusal(capsys.readouterr().err, "--cql_temp [1")
    assert cql.main(flags(resume=directory, cql_temp=1, max_timesteps=12)) == 0
    metrics = [run / "metrics.csv" for run in (directory, whole())]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()
    temperatures = [row["cql_temp"] for row in rows(directory, "evaluations.csv")]
    assert temperatures[0] == "" and [float(t) for t in temperatures[1:]] == [1, 1, 1]
    assert (directory / "cql.py").read_text() == SCRIPT.read_text()


# --- a run directory is enough to run it again ----------------------------------------


def test_a_run_directory_runs_again(toy, tmp_path, whole, monkeypatch, capsys):
    """By a real command: the cql.py and config.yaml that a run left."""
    monkeypatch.chdir(tmp_path)
    assert cql.main(flags(env=toy, name="a b", **{**BASE, **FULL})) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"a-b\W.*random-v0-[0-9a-f]{8}", directory.name)
    assert f"files: runs/{directory.name}" in capsys.readouterr().out
    names = ".lock config.yaml cql.py checkpoint.pt best.pt timing.csv".split()
    assert {path.name for path in directory.iterdir()} == {*names, *TABLES}
    assert (directory / "cql.py").read_bytes() == SCRIPT.read_bytes()
    module = ["--eval_env", "make_data:CqlToy-v0"]  # which a new process has to import
    again = [directory / "cql.py", "--config_path", directory / "config.yaml", *module]
    process = subprocess.run([sys.executable, *again], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    (copy,) = set((tmp_path / "runs").iterdir()) - {directory}
    for path in TABLES:
        assert (copy / path).read_bytes() == (directory / path).read_bytes()
        assert (whole(**FULL) / path).read_bytes() == (directory / path).read_bytes()


def test_another_cql_py_that_continues_a_run_is_reported(train, capsys):
    """A fork's run, for example, continued by the original file."""
    _, directory = train("run", max_timesteps=2, eval_freq=2)
    line = f"{directory / 'cql.py'}: differs from this cql.py"
    train("run", max_timesteps=3, eval_freq=2)
    assert line not in capsys.readouterr().out
    with open(directory / "cql.py", "a") as file:
        file.write("# a fork\n")
    train("run", max_timesteps=4, eval_freq=2)
    assert capsys.readouterr().out.count(line) == 1
    assert (directory / "cql.py").read_bytes() == SCRIPT.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"offline_iterations": 4}, {"cql_clip_diff_max": 2.0}, {"seed": [3, 1]}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_config_file_can_be_run(toy, tmp_path, changes):
    settings = {**BASE, "max_timesteps": 4, **changes}
    if "offline_iterations" in changes:
        del settings["max_timesteps"]
    assert cql.main(flags(env=toy, checkpoints_path=tmp_path / "a", **settings)) == 0
    (first,) = (tmp_path / "a").iterdir()
    again = flags(config_path=first / "config.yaml", checkpoints_path=tmp_path / "b")
    assert cql.main(again) == 0
    (second,) = (tmp_path / "b").iterdir()
    assert differences(first, second) == []
    assert checkpoint(second)["step"] == 4


# --- stacked runs, evaluation ---------------------------------------------------------


def test_stacked_equals_solo(train):
    changes = {"eval_env": "CqlHooked-v0", "cql_lagrange": True}
    stacked = train("stacked", seed=[0, 1], cql_alpha=[0, 5], **changes)[1]
    pairs, last = [(0, 0), (0, 5), (1, 0), (1, 5)], []
    for run, (seed, alpha) in enumerate(pairs):
        solo = train(f"solo{run}", seed=seed, cql_alpha=alpha, **changes)[1]
        for name in TABLES:
            mine = numbers(rows(stacked, name, run=run))
            own = numbers(rows(solo, name))
            assert len(own) >= 3
            np.testing.assert_allclose(mine, own, rtol=1e-4, atol=1e-5)
        last.append(numbers(rows(stacked, "metrics.csv", run=run))[-1])
    table = rows(stacked, "evaluations.csv")
    heads = [(int(row["seed"]), float(row["cql_alpha"])) for row in table]
    assert heads == pairs * 3
    # The penalty weight and the seed both matter, or equality would prove nothing.
    for one, other in ((0, 1), (0, 2), (1, 3)):
        assert not np.allclose(last[one], last[other])


def test_starts_of_episodes(train, hooked):
    """Runs that differ in seed start apart, runs that differ in cql_alpha alone as
    one; what was evaluated before, or beside it, changes no start."""

    def seeds(name, **changes):
        """Reset seeds by evaluation, run and episode."""
        resets = hooked()
        changes = {"eval_env": "CqlHooked-v0", "n_episodes": 3, **changes}
        directory = train(name, **changes)[1]
        steps = {row["step"] for row in rows(directory, "evaluations.csv")}
        return np.array(resets).reshape(len(steps), -1, 3)

    stacked = seeds("stacked", seed=[0, 5], cql_alpha=[1, 2])
    assert stacked.shape == (3, 4, 3)
    np.testing.assert_array_equal(stacked[:, 0], stacked[:, 1])
    np.testing.assert_array_equal(stacked[:, 2], stacked[:, 3])
    assert len(np.unique(stacked)) == 3 * 2 * 3  # each step, seed and episode its own
    np.testing.assert_array_equal(seeds("solo", seed=5)[:, 0], stacked[:, 2])
    assert not np.isin(seeds("other", eval_seed=1), stacked).any()
    np.testing.assert_array_equal(seeds("rare", eval_freq=8)[:, 0], stacked[1:, 0])


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
def test_the_score_equals_a_loop_over_load_policy(train, hooked):
    resets = hooked()
    changes = {"eval_env": "CqlHooked-v0", "n_episodes": 5, "max_timesteps": 30}
    directory = train("run", seed=[0, 1], **changes)[1]
    last, env = np.array(resets[-10:]).reshape(2, 5), gym.make("CqlToy-v0", **BOUNDS)
    for run, row in enumerate(rows(directory, "evaluations.csv")[-2:]):
        policy = cql.load_policy(directory / "checkpoint.pt", run=run)
        returns = returns_of(policy, env, last[run])
        assert returns.std() > 0
        expected = returns.mean(), returns.std(), 100 * (returns.mean() + 5) / 20
        names = "return_mean", "return_std", "d4rl_normalized_score"
        shown = [float(row[name]) for name in names]
        np.testing.assert_allclose(shown, expected, rtol=1e-6)
        assert (int(row["run"]), int(row["episodes"])) == (run, 5)
    with pytest.raises(cql.UserError, match=r"\b2\b"):
        cql.load_policy(directory / "checkpoint.pt", run=2)


def test_statistics_and_bounds_matter(train):
    """Statistics other than 0 and 1 in the checkpoint, and they change the actions: the
    test above would see an evaluation without them."""
    directory = train("run", max_timesteps=30)[1]
    payload = checkpoint(directory)
    x, agent = np.random.default_rng(0).normal(size=(4, 3)), payload["agent"]
    raw = cql.load_policy(directory / "checkpoint.pt")(x)
    assert raw.shape == (4, 2) and (raw >= BOUNDS["low"]).all()
    assert (raw <= BOUNDS["high"]).all()
    mean, std = agent["units.observation_mean"], agent["units.observation_std"]
    agent["units.observation_mean"] = torch.zeros_like(mean)
    agent["units.observation_std"] = torch.ones_like(std)
    torch.save(payload, directory / "plain.pt")
    plain = cql.load_policy(directory / "plain.pt")
    assert np.abs(plain(x) - raw).max() > 1e-3
    np.testing.assert_allclose(plain((x - mean.numpy()) / std.numpy()), raw, atol=1e-5)


@pytest.mark.parametrize("layout", ["dict", "tuple"])
def test_structured_observations(tmp_path, hooked, layout):
    kwargs = {**BOUNDS, "layout": layout}
    env = gym.make("CqlToy-v0", **kwargs)
    episodes = toy_episodes(**kwargs)
    recorded = gym.make("CqlHooked-v0", **kwargs)
    data = minari_dataset(tmp_path / "data", "toy/parts-v0", episodes, recorded)
    resets = hooked()
    assert cql.main(command(data, tmp_path / "run", max_timesteps=20)) == 0
    policy = cql.load_policy(tmp_path / "run")
    row = rows(tmp_path / "run", "evaluations.csv")[-1]
    expected = pytest.approx(float(row["return_mean"]), rel=1e-6)
    assert returns_of(policy, env, resets[-2:]).mean() == expected
    assert row["d4rl_normalized_score"] == ""  # no reference returns are known
    observation = env.reset(seed=0)[0]
    samples = [policy(observation, deterministic=False) for _ in range(20)]
    assert np.ptp(samples, axis=0).min() > 0
    assert all(env.action_space.contains(np.float32(sample)) for sample in samples)


def test_load_policy_takes_and_gives_matrices(tmp_path):
    """A box of observations [2, 2], and one of actions [2, 1]."""
    episodes = random_episodes([30] * 3, obs_dim=4)
    for episode in episodes:
        episode["observations"] = episode["observations"].reshape(-1, 2, 2)
        episode["actions"] = episode["actions"].reshape(-1, 2, 1)
    data = plain_dataset(tmp_path / "data", episodes)
    assert cql.main(command(data, tmp_path / "run")) == 0
    policy = cql.load_policy(tmp_path / "run")
    one = policy(np.ones((2, 2)))
    assert one.shape == (2, 1)
    several = policy(np.ones((5, 4)))
    assert several.shape == (5, 2, 1)
    np.testing.assert_allclose(several[0], one, rtol=1e-5)


@pytest.mark.parametrize("changes, limit", [({}, 1200), ({"max_episode_steps": 7}, 7)])
def test_the_time_limit_of_evaluation(tmp_path, capsys, changes, limit):
    """Of episodes that do not end: the data's longest, whose last step is left out of
    the data, or what the user says; the opening line tells."""
    episodes = random_episodes([1200, 20], ends="timeout")
    data = d4rl_file(tmp_path / "mine.hdf5", episodes, next_observations=None)
    changes = {"eval_env": "CqlStill-v0", "n_episodes": 1, "max_timesteps": 0, **changes}
    assert cql.main(command(data, tmp_path / "run", **changes)) == 0
    [opening] = re.findall("^evaluation: .*", capsys.readouterr().out, re.M)
    assert f" {limit:,} steps" in opening
    assert len(rows(tmp_path / "run", "evaluations.csv", length_mean=limit)) == 1


def test_a_module_of_the_recorded_environment(tmp_path, capsys):
    """As if the environment were left out: with the recorded settings, time limit and
    reference returns, which the opening line tells."""
    env = gym.make("CqlToy-v0", max_episode_steps=7, **BOUNDS)
    data = minari_dataset(
        tmp_path / "data", "toy/own-v0", toy_episodes(**BOUNDS), env, **REFERENCE
    )
    for name, changes in (("out", {}), ("named", {"eval_env": "make_data:CqlToy-v0"})):
        assert cql.main(command(data, tmp_path / name, **changes)) == 0
        out = capsys.readouterr().out
        [opening] = re.findall("^evaluation: .*", out, re.M)
        for part in ("CqlToy-v0", "'low': [-2", "7 steps", "the dataset's reference"):
            assert part in opening
    assert differences(tmp_path / "out", tmp_path / "named") == []
    for row in rows(tmp_path / "named", "evaluations.csv"):
        score = 5 * (float(row["return_mean"]) + 5)
        assert float(row["d4rl_normalized_score"]) == pytest.approx(score, rel=1e-5)
        assert float(row["length_mean"]) <= 7


def test_another_environment_is_told(train, capsys):
    """Its own settings and limit; whose references score is said."""
    assert train("run", eval_env="CqlHooked-v0")[0] == 0
    [opening] = re.findall("^evaluation: .*", capsys.readouterr().out, re.M)
    for part in ("CqlHooked-v0", "20 steps", "returns for CqlToy-v0"):
        assert part in opening


def test_a_recorded_environment_that_is_not_installed(
    tmp_path, monkeypatch, capsys, refused
):
    gym.register("CqlGone-v0", "make_data:Toy", max_episode_steps=20)
    env = gym.make("CqlGone-v0", push=0.0, **BOUNDS)  # its episodes take all 20 steps
    data = minari_dataset(
        tmp_path / "data", "toy/gone-v0", toy_episodes(**BOUNDS), env, **REFERENCE
    )
    del gym.registry["CqlGone-v0"]
    argv = command(data, tmp_path / "run")
    refused(argv, "CqlGone-v0", "--eval_env none", "module:ID")
    assert cql.main([*argv, "--eval_env=none"]) == 0
    assert rows(tmp_path / "run", "evaluations.csv") == []
    assert [row["step"] for row in rows(tmp_path / "run", "metrics.csv")][-1] == "12"
    assert "evaluation: none" in capsys.readouterr().out
    # The user's own module, in the directory where the command is given.
    lines = "import gymnasium, make_data\n"
    lines += "gymnasium.register('CqlGone-v0', make_data.Toy, max_episode_steps=5)\n"
    (tmp_path / "cql_gone.py").write_text(lines)
    monkeypatch.setattr(sys, "path", list(sys.path))
    argv = command(data, tmp_path / "own", eval_env="cql_gone:CqlGone-v0")
    assert cql.main(argv) == 0
    del gym.registry["CqlGone-v0"]
    for row in rows(tmp_path / "own", "evaluations.csv"):
        assert row["d4rl_normalized_score"] != "" and row["length_mean"] == "20"


@pytest.mark.parametrize("most", [1, 2])
def test_a_simulator_that_allows_few_instances(few, square, tmp_path, capsys, most):
    """Episodes run in turn, which is said once; the numbers are those of any other."""
    assert cql.main(command(square, tmp_path / "many", seed=[0, 1])) == 0
    capsys.readouterr()
    few(most)
    argv = command(square, tmp_path / "few", seed=[0, 1], eval_env="CqlFew-v0")
    assert cql.main(argv) == 0
    assert (Few.opened, Few.live) == (most, 0)  # and they are closed
    out = capsys.readouterr().out
    assert len(re.findall("a simulator is open already", out)) == 1
    for name in TABLES:
        one, other = (tmp_path / run / name for run in ("many", "few"))
        assert one.read_bytes() == other.read_bytes()


def test_one_episode_opens_one_simulator(few, square, tmp_path):
    few(1)
    one = {"eval_env": "CqlFew-v0", "n_episodes": 1}
    assert cql.main(command(square, tmp_path / "run", **one)) == 0
    assert (Few.opened, Few.live) == (1, 0)
    assert len(rows(tmp_path / "run", "evaluations.csv")) == 3


def test_online_needs_a_second_simulator(few, square, tmp_path, refused):
    few(1)
    more = {"eval_env": "CqlFew-v0", "n_episodes": 1, "online_iterations": 30}
    argv = command(square, tmp_path / "run", **more)
    refused(argv, "CqlFew-v0", "a simulator is open already")
    assert Few.opened == 1
    few(2)
    assert cql.main(argv) == 0
    assert (Few.opened, Few.live) == (2, 0)


def test_simulators_are_closed_when_one_fails(few, square, tmp_path, monkeypatch):
    few(4)
    step, taken = Few.step, []

    def fail(self, action):
        taken.append(action)
        if len(taken) > 1:  # not when it is tried before training
            raise RuntimeError("broken")
        return step(self, action)

    monkeypatch.setattr(Few, "step", fail)
    argv = command(square, tmp_path / "run", eval_env="CqlFew-v0")
    assert cql.main(argv) == 1
    assert (Few.opened, Few.live) == (2, 0)


@pytest.mark.parametrize(
    "told, rates",
    [
        ({}, ["", ""]),  # of nothing: no rate
        ({2: True}, ["0", "0.5"]),  # told only when it comes: absent is not yet
        ({0: True, 2: True, 3: True}, ["0.5", "1"]),
        ({1: False}, ["0", "0"]),  # told, and not reached
        ({1: math.nan}, ["", ""]),  # not told
    ],
)
@pytest.mark.parametrize("key", ["success", "is_success"])
def test_success(train, hooked, told, rates, key):
    """Two runs of two episodes, of which some are told of success, in one step."""

    def tell(env):
        if env.episode in told and env.steps == 1:
            return {key: told[env.episode]}

    hooked(tell)
    changes = {"eval_env": "CqlHooked-v0", "seed": [0, 1], "max_timesteps": 0}
    table = rows(train("run", **changes)[1], "evaluations.csv")
    assert [row["success_rate"] for row in table] == rates


class Faulty(Toy):
    """The toy environment with one fault in its first reset or step."""

    fault = None

    def reset(self, seed=None, options=None):
        if Faulty.fault == "reset":
            raise RuntimeError("no license")
        if Faulty.fault == "seed" and seed >= 2**31 - 1:  # one less than possible
            raise ValueError("no int32")
        observation, info = super().reset(seed=seed, options=options)
        if Faulty.fault == "first observation":
            observation = np.zeros(1)
        return observation, info

    def step(self, action):
        observation, reward, *rest = super().step(action)
        if Faulty.fault == "step":
            raise RuntimeError("no license")
        if Faulty.fault == "reward":
            reward = np.zeros(2)
        if Faulty.fault == "no reward":
            reward = None
        if Faulty.fault == "nan reward":
            reward = math.nan
        if Faulty.fault == "observation":
            observation = np.zeros(4)
        if Faulty.fault == "nan observation":
            observation = np.full(3, np.nan)
        return observation, reward, *rest


gym.register("CqlFaulty-v0", Faulty, max_episode_steps=20, kwargs=BOUNDS)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("reset", "no license"),
        ("seed", "no int32"),
        ("step", "no license"),
        ("reward", "reward of shape (2,)"),
        ("no reward", "reward of shape () and type object; expected one number"),
        ("nan reward", "reward nan"),
        ("observation", "observation of shape (4,); its space has (3,)"),
        ("first observation", "observation of shape (1,); its space has (3,)"),
        ("nan observation", "observation with NaN"),
    ],
)
def test_a_faulty_environment_is_refused_before_training(
    toy, tmp_path, monkeypatch, capsys, fault, message
):
    """Offline, online and from nothing: exit 2, one line, no directory."""
    monkeypatch.setattr(Faulty, "fault", fault)
    nothing = {"max_timesteps": 0, "normalize": False}
    for data, changes in ((toy, {"online_iterations": 0}), (toy, {}), ("null", nothing)):
        changes = {"eval_env": "CqlFaulty-v0", "online_iterations": 20, **changes}
        argv = command(data, tmp_path / "run", **changes)
        assert cql.main(argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
        assert "CqlFaulty-v0 fails in its first reset or step; correct it" in error
        assert not (tmp_path / "run").exists()


def test_an_environment_that_raises(train, whole, hooked, capsys):
    def fail(env):
        if env.episode >= 8:  # in the second evaluation
            raise RuntimeError("the simulator\nis unstable")

    hooked(fail)
    code, directory = train("run", eval_env="CqlHooked-v0", **FULL)
    out, error = capsys.readouterr()
    assert code == 1
    assert re.fullmatch(r"cql\.py: failed: .*CqlHooked-v0.*the simulator.*\n", error)
    assert "Traceback" not in out
    # A checkpoint was saved before the evaluation, which the resumed run makes first.
    payload = checkpoint(directory)
    assert (payload["step"], payload["evaluated"]) == (8, 4)
    hooked()
    assert train("run", eval_env="CqlHooked-v0", **FULL)[0] == 0
    assert differences(whole(**FULL), directory) == []


def test_an_environment_that_seeds_numpy(train, hooked):
    """Its seeds are below 2^31, in evaluations and online (openai/gym issue 2210)."""
    seeds = hooked()
    flags = {"online_iterations": 12, "eval_env": "CqlHooked-v0"}
    assert train("run", **{**FULL, **flags})[0] == 0
    assert len(set(seeds)) > 8
    for seed in seeds:
        np.random.RandomState(np.int32(seed))


class Global(Hooked):
    """The toy environment, which draws from NumPy's global generator."""

    def reset(self, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        self.point = np.random.uniform(-0.5, 0.5, 2)
        observation[:2] = self.point
        return observation, info

    def step(self, action):
        self.point = self.point + np.random.uniform(-0.1, 0.1, 2)
        return super().step(action)


gym.register("CqlGlobal-v0", f"{__name__}:Global", max_episode_steps=20, kwargs=BOUNDS)


def test_an_environment_that_draws_from_numpy(train):
    """Its episodes are functions of their seeds, in evaluations and online, whatever is
    played beside them. The draws of the process itself stay as they are."""
    flags = {"eval_env": "CqlGlobal-v0", "n_episodes": 3, "online_iterations": 30}
    np.random.seed(7)
    stacked = train("stacked", seed=[0, 1], **flags)[1]
    drawn = np.random.uniform()
    np.random.seed(7)
    assert np.random.uniform() == drawn
    again = train("again", seed=[0, 1], **flags)[1]
    assert differences(stacked, again) == []
    for name in TABLES:
        solo = train(f"solo_{name}", seed=1, **flags)[1]
        mine = numbers(rows(stacked, name, run=1))
        np.testing.assert_allclose(mine, numbers(rows(solo, name)), rtol=1e-4, atol=1e-5)
    evaluations = rows(stacked, "evaluations.csv")
    assert len({row["return_mean"] for row in evaluations}) == len(evaluations) > 3


def test_data_without_an_environment(tmp_path, capsys):
    data, directory = plain_dataset(tmp_path / "data"), tmp_path / "run"
    assert cql.main(command(data, directory, seed=[0, 1])) == 0
    assert rows(directory, "evaluations.csv") == []
    assert len(rows(directory, "metrics.csv")) == 2 * 4
    out = capsys.readouterr().out
    assert "evaluation: none" in out
    assert closing_lines(out) == {"0": None, "1": None}
    assert cql.load_policy(directory, run=1)(np.zeros(3)).shape == (2,)
    half = tmp_path / "half"
    for steps in (5, 12):
        assert cql.main(command(data, half, seed=[0, 1], max_timesteps=steps)) == 0
    one, other = flattened(checkpoint(directory)), flattened(checkpoint(half))
    assert one.keys() == other.keys()
    unequal = {key for key in one if one[key] != other[key]}
    assert unequal <= {"/config/resume", "/wandb_ids/0", "/wandb_ids/1"}
    metrics = [(run / "metrics.csv").read_bytes() for run in (directory, half)]
    assert len(rows(half, "metrics.csv", step=5)) == 2
    assert metrics[0] == without_step(metrics[1], 5)


# --- load_model -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"n_critics": 3, "seed": [0, 1]},
        {"cql_lagrange": True},
        {"use_automatic_entropy_tuning": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_loaded_model_is_evaluated_without_the_dataset(toy, tmp_path, hooked, changes):
    data, source = shutil.copytree(toy, tmp_path / "data"), tmp_path / "run"
    assert cql.main(command(data, source, eval_env="CqlHooked-v0", **changes)) == 0
    shutil.rmtree(data)
    evaluate = flags(load_model=source, max_timesteps=0, n_episodes=20, device="cpu")
    resets = hooked()
    assert cql.main([*evaluate, *flags(resume=tmp_path / "again")]) == 0
    one, other = (checkpoint(d)["agent"] for d in (source, tmp_path / "again"))
    one, other = flattened(one), flattened(other)
    assert one.keys() == other.keys()
    # Weights, optimizers and statistics are taken over; the counts start at 0.
    assert [k for k in one if one[k] != other[k]] == []
    payload = checkpoint(tmp_path / "again")
    assert (payload["step"], payload["updates"]) == (0, 0)
    env = gym.make("CqlToy-v0", **BOUNDS)
    for run, row in enumerate(rows(tmp_path / "again", "evaluations.csv")):
        policy = cql.load_policy(source, run=run)
        expected = returns_of(policy, env, resets[20 * run :][:20]).mean()
        assert float(row["return_mean"]) == pytest.approx(expected, rel=1e-6)
        assert (row["episodes"], row["run"], row["step"]) == ("20", str(run), "0")


def test_a_loaded_model_keeps_its_statistics(toy, whole, tmp_path):
    source = whole(**FULL) / "checkpoint.pt"
    other = toy_dataset(tmp_path / "other", seed=7, env_kwargs={**BOUNDS, "push": 0.05})
    changes = {**BASE, **FULL, "max_timesteps": 4}
    argv = flags(env=other, load_model=source, resume=tmp_path / "run", **changes)
    assert cql.main(argv) == 0
    mine, own = (checkpoint(d)["agent"] for d in (whole(**FULL), tmp_path / "run"))
    config = cql.TrainConfig(env=str(other), batch_size=8)
    data = cql.Dataset(config, *cql.read_data(config))
    for name, value in zip(("observation_mean", "observation_std"), data.statistics()):
        kept, given = own[f"units.{name}"], mine[f"units.{name}"]
        assert torch.equal(given, kept)
        assert not torch.allclose(kept.double(), value.double(), rtol=0.05)


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


def test_a_loaded_model_with_other_action_bounds(square, whole, tmp_path, capsys):
    """The policy's actions would be another environment's."""
    source = whole() / "checkpoint.pt"
    assert cql.main(command(square, tmp_path / "run", load_model=source)) == 2
    check_refusal(capsys.readouterr().err, source, "[-1, 1]", "[-2, 4]")


def test_a_loaded_model_brings_its_flags(square, tmp_path, capsys):
    """All but iterations, paths and names; what the command names counts."""
    weights = {"cql_alpha": 7, "seed": 3, "cql_temp": 0.5, "name": "mine"}
    assert cql.main(command(square, tmp_path / "run", **weights)) == 0
    evaluate = flags(load_model=tmp_path / "run", max_timesteps=0, device="cpu")
    again = tmp_path / "again"
    assert cql.main([*evaluate, f"--resume={again}", "--eval_seed=4"]) == 0
    (row,) = rows(again, "evaluations.csv")
    assert (row["cql_alpha"], row["seed"], row["cql_temp"]) == ("7", "3", "0.5")
    config = yaml.safe_load((again / "config.yaml").read_text())
    assert (config["max_timesteps"], config["name"]) == (0, "CQL")
    assert (config["n_episodes"], config["eval_seed"]) == (2, 4)
    capsys.readouterr()
    assert cql.main([*evaluate, "--env=no/such/thing"]) == 2
    check_refusal(capsys.readouterr().err, "--env", "no/such/thing")
    other = tmp_path / "other"
    assert cql.main([*evaluate, "--eval_env=CqlStill-v0", f"--resume={other}"]) == 0
    (row,) = rows(other, "evaluations.csv")
    assert row["length_mean"] == "1000"


@pytest.mark.parametrize("flag", ["resume", "load_model"])
def test_a_checkpoint_of_an_older_version(toy, tmp_path, capsys, flag):
    """A checkpoint of another version, with flags that no longer exist, is refused."""
    run = tmp_path / "run"
    assert cql.main(command(toy, run)) == 0
    payload = checkpoint(run)
    payload["version"] = 6
    payload["config"] |= {"eval_workers": 0, "fqe_updates": 0}
    torch.save(payload, run / "checkpoint.pt")
    (run / "config.yaml").write_text(yaml.safe_dump(payload["config"]))
    capsys.readouterr()
    before = listing(tmp_path)
    argv = flags(env=toy, checkpoints_path=tmp_path / "new", **{**BASE, flag: run})
    assert cql.main(argv) == 2
    check_refusal(capsys.readouterr().err, run, "an older one or a fork")
    assert listing(tmp_path) == before
    with pytest.raises(cql.UserError, match="an older one or a fork"):
        cql.load_policy(run)


def test_a_forks_checkpoint(toy, tmp_path):
    """A checkpoint of the current version with an unknown flag is refused."""
    run = tmp_path / "run"
    assert cql.main(command(toy, run)) == 0
    payload = checkpoint(run)
    payload["config"]["gap_margin"] = 1.5
    torch.save(payload, run / "checkpoint.pt")
    with pytest.raises(cql.UserError, match="a fork; use the "):
        cql.load_policy(run)


def test_flags_of_discrete_actions_say_that_they_do_nothing(toy, capsys):
    argv = flags(env=toy, checkpoints_path="null", **BASE, exploration_epsilon=0.5)
    assert cql.main(argv) == 0
    said = "no effect on continuous actions: exploration_epsilon"
    assert said in capsys.readouterr().out


# --- checkpoints ----------------------------------------------------------------------


def disk_full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(payload, file):
    file.write(b"half a checkpoint")
    disk_full()


def full_for(pattern, function):
    """function, failing where its first argument is a file whose name matches."""

    def wrapped(target, *arguments, **options):
        path = target
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")
        if re.search(pattern, str(path)):
            disk_full()
        return function(target, *arguments, **options)

    return wrapped


FAULTS = {
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
    if fault == "evaluations.csv":  # written after the checkpoint before an evaluation
        assert checkpoint(directory)["step"] == 8
    else:
        assert (directory / "checkpoint.pt").read_bytes() == before
    assert not (directory / "checkpoint.tmp").exists()  # it would take up the space
    assert train("run")[0] == 0
    assert differences(whole(), directory, first_end=4) == []


def test_no_space_for_the_first_files(train, monkeypatch, capsys):
    """config.yaml and the copy of cql.py are written at the start."""
    for owner, target in ((Path, "write_text"), (shutil, "copyfile")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, target, disk_full)
            assert train(target)[0] == 1
        error = capsys.readouterr().err
        assert re.fullmatch(r"cql\.py: failed: .*No space left.*\n", error)


def test_a_file_system_that_stops_growing(toy, tmp_path):
    """The kernel's own refusal: files may not exceed half a checkpoint."""
    argv = command(toy, tmp_path, max_timesteps=4, hidden_dim=128)
    assert cql.main(argv) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    output, limit = tmp_path / "output", len(before) // 2
    assert limit > 2 * SCRIPT.stat().st_size
    argv = flags(resume=tmp_path, max_timesteps=8)
    code = finish(start(argv, output, limit_file_size, limit))
    text = output.read_text()
    assert re.search(r"^cql\.py: failed: .*checkpoint", text, re.M), text
    assert code == 1 and "Traceback" not in text
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_that_does_not_fit(whole, tmp_path):
    """Wherever in it the space ends, the system's own words say so: torch words them
    anew, most of the time."""
    payload, path = checkpoint(whole()), tmp_path / "checkpoint.pt"
    size = (whole() / "checkpoint.pt").stat().st_size
    path.write_bytes(b"the one before")
    for room in range(0, size, size // 60):
        before = limit_file_size(room)
        try:
            with pytest.raises(cql.MachineError, match="File too large.*intact"):
                cql.save_checkpoint(path, payload)
        finally:
            limit_file_size(before)
        assert path.read_bytes() == b"the one before"
        assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_every_five_minutes(train, whole, monkeypatch, tmp_path):
    """Due by the clock alone, in the middle of an interval of either table."""
    assert cql.Run.CHECKPOINT_SECONDS == 300
    for seconds, expected in ((300, [0] * 4 + [4] * 4 + [8] * 4), (-1, list(range(12)))):
        directory, seen = tmp_path / str(seconds), []

        def look(number, agent, metrics, directory=directory, seen=seen):
            saved = (directory / "checkpoint.pt").exists()
            seen.append(checkpoint(directory)["step"] if saved else 0)

        with monkeypatch.context() as patch:
            patch.setattr(cql.Run, "CHECKPOINT_SECONDS", seconds)
            after_update(patch, look)
            train(str(seconds), **FULL)
        assert seen == expected
        assert differences(whole(**FULL), directory) == []


def test_a_checkpoint_leaves_the_live_tensors(train, monkeypatch):
    """A CUDA graph writes to the addresses that it has seen."""
    places, checkpoint_of = [], cql.Run.checkpoint

    def watched(run):
        checkpoint_of(run)
        tensors = [*run.agent.state_dict().values(), run.metrics.sums]
        for moments in run.agent.optimizer.state.values():
            tensors += moments.values()
        places.append([x.data_ptr() for x in tensors if torch.is_tensor(x)])

    monkeypatch.setattr(cql.Run, "checkpoint", watched)
    assert train("run", cql_alpha=[1, 3e38], seed=[0])[0] == 3
    assert len(places) > 1 and all(place == places[0] for place in places)


def test_the_directory_of_a_live_run_is_refused(toy, tmp_path, capsys):
    run = tmp_path / "run"
    argv = command(toy, run, max_timesteps=10**6)
    process = start(argv)
    wait_for(run, "evaluations.csv", 3, process)
    os.kill(process.pid, signal.SIGSTOP)  # so that nothing but this one writes
    try:
        before = listing(run)
        assert cql.main(argv) == 2
        check_refusal(capsys.readouterr().err, run, "in use")
        assert listing(run) == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert process.is_alive()
    process.terminate()
    assert finish(process) == 143
    step = checkpoint(run)["step"]
    assert cql.main(flags(resume=run, max_timesteps=step + 1)) == 0  # free again


def test_a_run_that_ends_while_another_reads_the_data(
    toy, tmp_path, capsys, monkeypatch
):
    """Two of one command: the later one must not begin again what the first one did."""
    argv, read = command(toy, tmp_path / "run"), cql.read_episodes

    def read_slowly(name):
        monkeypatch.setattr(cql, "read_episodes", read)
        assert cql.main(argv) == 0
        return read(name)

    monkeypatch.setattr(cql, "read_episodes", read_slowly)
    assert cql.main(argv) == 2
    check_refusal(capsys.readouterr().err, tmp_path / "run", "another process")
    assert checkpoint(tmp_path / "run")["step"] == 12


# --- divergence -----------------------------------------------------------------------


def poison(update, run, parameters_only=False):
    """From an update on, a run's losses and weights, or its weights alone, are NaN."""

    def function(number, agent, metrics):
        if number == update:
            for parameter in agent.policy.parameters():
                parameter.data[run] = np.nan
        if number >= update and not parameters_only:
            metrics["policy_loss"][run] = np.nan

    return function


def agent_of_run(path, run, n_runs):
    """The tensors of one stacked run in a checkpoint."""
    parts = {}

    def visit(value, name):
        if isinstance(value, dict):
            for key, part in value.items():
                visit(part, f"{name}/{key}")
        elif isinstance(value, torch.Tensor) and value.ndim and len(value) == n_runs:
            parts[name] = value[run]

    visit(torch.load(path, weights_only=True)["agent"], "")
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
    [said] = re.findall(r"^run \d diverged.*$", out, re.M)
    assert said.startswith("run 1 diverged by update 6") and "policy_loss" in said
    assert re.search(r"^run 1 .*diverged\D*6$", out, re.M)  # the closing line
    healthy, early = whole(**changes), train("early", max_timesteps=4, **changes)[1]
    for run in (0, 2, 3, 4):
        for name in TABLES:
            assert rows(directory, name, run=run) == rows(healthy, name, run=run)
        saved = [d / "checkpoint.pt" for d in (directory, healthy)]
        assert equal_parts(*(agent_of_run(path, run, 5) for path in saved))
    # It was last finite at 4: the checkpoint of then is kept, whole.
    kept, then = directory / "run1_before_6.pt", early / "checkpoint.pt"
    assert torch.load(kept, weights_only=True)["step"] == 4
    for run in range(5):
        assert equal_parts(agent_of_run(kept, run, 5), agent_of_run(then, run, 5))
    assert [row["step"] for row in rows(directory, "metrics.csv", run=1)] == ["3"]
    assert [row["step"] for row in rows(directory, "evaluations.csv", run=1)] == ["4"]
    with pytest.raises(cql.UserError, match="run 1 diverged.*run1_before_6.pt"):
        cql.load_policy(directory, run=1)
    assert np.isfinite(cql.load_policy(directory, run=2)(np.ones(3))).all()
    assert np.isfinite(cql.load_policy(kept, run=1)(np.ones(3))).all()
    # Resumed, it stays stopped, and the status says so again.
    files = set(directory.iterdir())
    assert train("run", **{**changes, "max_timesteps": 16})[0] == 3
    assert set(directory.iterdir()) == files
    assert [row["step"] for row in rows(directory, "metrics.csv", run=1)] == ["3"]
    longer = whole(**{**changes, "max_timesteps": 16})
    assert rows(directory, "metrics.csv", run=0) == rows(longer, "metrics.csv", run=0)


def test_a_run_that_diverges_before_the_first_checkpoint(train, monkeypatch):
    """Nothing finite can be kept, and nobody is sent to a file that is not there."""
    after_update(monkeypatch, poison(2, 1))
    code, directory = train("run", seed=[0, 1])
    assert code == 3 and not list(directory.glob("run1_before_*"))
    with pytest.raises(cql.UserError, match="run 1 diverged") as refusal:
        cql.load_policy(directory, run=1)
    assert "run1_before" not in str(refusal.value)


def test_overflow_diverges(train, capsys):
    """No patching: this weight times any gap is not a number of 32 bits."""
    code, directory = train("run", cql_alpha=[1, 3e38], seed=[0])
    assert code == 3
    healthy = train("healthy", cql_alpha=[1, 2], seed=[0])[1]
    for name in TABLES:
        mine, own = rows(directory, name), rows(healthy, name, run=0)
        assert mine == own != []
    assert re.search("run 1 diverged by update 3.*cql_min_qf1", capsys.readouterr().out)


def test_huge_rewards_diverge(tmp_path, capsys):
    episodes = random_episodes([20] * 4)
    for episode in episodes:
        episode["rewards"] *= 1e30
    data = plain_dataset(tmp_path / "data", episodes)
    assert cql.main(command(data, tmp_path / "run", seed=[0, 1])) == 3
    out, error = capsys.readouterr()
    assert re.findall(r"run (\d) diverged by.*qf1_loss", out) == ["0", "1"]
    assert error == "" and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_single_run_that_diverges(train, whole, monkeypatch, capsys):
    """The last finite checkpoint stays, and nothing is evaluated any more."""
    with monkeypatch.context() as patch:
        after_update(patch, poison(6, 0))
        code, directory = train("run")
    assert code == 3 and checkpoint(directory)["step"] == 4
    early = train("early", max_timesteps=4)[1]
    one, other = (flattened(checkpoint(d)["agent"]) for d in (directory, early))
    assert one == other
    assert [row["step"] for row in rows(directory, "evaluations.csv")] == ["4"]
    assert train("run")[0] == 0  # what made it diverge was not in the checkpoint
    assert differences(whole(), directory) == []


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["solo", "stacked"])
def test_weights_that_go_before_the_loss(train, monkeypatch, seed):
    """The last update before a checkpoint spoils the weights; its losses were finite."""
    after_update(monkeypatch, poison(8, 0, parameters_only=True))
    code, directory = train("run", seed=seed)
    assert code == 3
    kept = torch.load(directory / "run0_before_8.pt", weights_only=True)
    assert kept["step"] == 4
    weights = [x for x in kept["agent"].values() if torch.is_tensor(x)]
    assert weights and all(x.isfinite().all() for x in weights)
    latest = checkpoint(directory)
    assert latest["step"] == (4 if seed == 0 else 12)
    assert (latest["diverged"][0] < 0) == (seed == 0)


# --- Q that runs away -----------------------------------------------------------------

BETWEEN = {
    "cost": (-16.0, 0.0),
    "gain": (0.0, 1.0),
    "both": (-1.0, 1.0),
    "only cost": (-16.0, -1.0),  # an episode may end, so Q of 0 is possible
    "only gain": (1.0, 16.0),
}


@pytest.mark.parametrize(
    "rewards, policy, data, changes, alarm",
    [
        ("cost", 1000.0, 1000.0, {}, True),  # no reward is above 0, so no Q is
        ("cost", 1000.0, -1000.0, {}, True),
        ("cost", -1000.0, 50.0, {}, True),
        ("cost", -2000.0, -100.0, {}, True),  # apart by more than 16 / (1 - 0.99)
        ("cost", -1000.0, -500.0, {}, False),
        ("gain", 110.0, 90.0, {}, True),
        ("gain", 90.0, 50.0, {}, False),
        ("gain", -60.0, 50.0, {}, True),
        ("gain", 90.0, 50.0, {"discount": 0.5}, True),
        ("both", 90.0, -90.0, {}, False),
        ("only cost", -50.0, -60.0, {}, False),  # above -1 / (1 - 0.99)
        ("only cost", -1580.0, -20.0, {}, False),  # apart by less than 16 / (1 - 0.99)
        ("only cost", 10.0, -60.0, {}, True),
        ("only cost", -1650.0, -20.0, {}, True),
        ("only gain", 1580.0, 20.0, {}, False),
        ("only gain", 20.0, 50.0, {}, False),
        ("only gain", 1610.0, 1500.0, {}, True),
        ("only gain", -60.0, 1580.0, {}, True),
        ("cost", 1000.0, 1000.0, {"backup_entropy": True}, False),  # sets no bound
    ],
)
def test_the_alarm_for_q(
    tmp_path, monkeypatch, capsys, rewards, policy, data, changes, alarm
):
    """The rewards bound Q of the data, Q of the policy and their distance."""

    def set_q(number, agent, metrics):
        metrics["cql_q{j}_current_actions"][:] = policy
        metrics["average_qf{j}"][:] = data

    episodes = random_episodes([30] * 3)
    for episode in episodes:
        episode["rewards"] = np.linspace(*BETWEEN[rewards], 30)
    after_update(monkeypatch, set_q)
    name = plain_dataset(tmp_path / "data", episodes)
    assert cql.main(command(name, tmp_path / "run", max_timesteps=3, **changes)) == 0
    assert ("Q diverges" in capsys.readouterr().out) == alarm


def test_the_alarm_is_given_once(train, monkeypatch, capsys):
    """From update 5 on, for run 1; not again when that is resumed."""

    def inflate(number, agent, metrics):
        if number >= 5:
            metrics["cql_q{j}_current_actions"][1] += 1e6

    after_update(monkeypatch, inflate)
    train("run", seed=[0, 1, 2], max_timesteps=8)
    assert train("run", seed=[0, 1, 2])[0] == 0
    out = capsys.readouterr().out
    assert re.findall(r"^run (\d) \(.*\): Q diverges", out, re.M) == ["1"]
    assert "cql_alpha" in out.partition("Q diverges")[2].partition("update ")[0]
    closing = re.findall(r"^run (\d) .*  Q diverged$", out, re.M)
    assert closing == ["1", "1"]  # of both calls


# --- the terminal ---------------------------------------------------------------------


def closing_lines(out):
    """{run: (last, best, its step)} of the closing lines; None without evaluations."""
    found = {}
    for run, text in re.findall(r"^run (\d+) +seed (.*)$", out, re.M):
        values = re.search(r"last (\S+), best (\S+) at (\S+)", text)
        found[run] = values and values.groups()
    return found


def test_closing_lines_and_plain_output(train, capsys):
    directory = train("run", seed=[0, 1], max_timesteps=20)[1]
    out, error = capsys.readouterr()
    assert error == "" and not re.search(r"[\r\x1b]", out)
    closing = closing_lines(out)
    assert closing.keys() == {"0", "1"}
    for run, line in closing.items():
        table = rows(directory, "evaluations.csv", run=run)
        scores = [float(row["d4rl_normalized_score"]) for row in table]
        best = table[np.argmax(scores)]["step"]
        assert line == (f"{scores[-1]:.2f}", f"{max(scores):.2f}", best)
        assert len(scores) == 5
    assert out.splitlines()[-1] == f"files: {directory}"


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"seed": [20240101, 20240102]}, "seed 20240102 "),
        ({"cql_alpha": [1, 0.5]}, "cql_alpha 0.5 "),
        ({"cql_temp": [1, 0.25]}, "cql_temp 0.25 "),
    ],
)
def test_closing_lines_tell_runs_apart(train, capsys, changes, expected):
    assert train("run", max_timesteps=4, **changes)[0] == 0
    [line] = re.findall("^run 1 .*", capsys.readouterr().out, re.M)
    assert expected in line


def test_reference_returns_that_come_with_another_environment(tmp_path, capsys):
    """The first evaluations have no score, the later ones have: those are told."""
    data, run = hopper_dataset(tmp_path / "data", episodes=4), tmp_path / "run"
    first = {"max_timesteps": 4, "eval_freq": 2, "eval_env": "CqlHopper-v0"}
    assert cql.main(command(data, run, **first)) == 0
    capsys.readouterr()
    assert cql.main(flags(resume=run, max_timesteps=8, eval_env="Hopper-v5")) == 0
    closing = closing_lines(capsys.readouterr().out)
    scores = [row["d4rl_normalized_score"] for row in rows(run, "evaluations.csv")]
    assert scores[:2] == ["", ""] and len(scores) == 4
    known = [float(score) for score in scores[2:]]
    best = str(6 + 2 * np.argmax(known))
    assert closing == {"0": (f"{known[-1]:.2f}", f"{max(known):.2f}", best)}


def test_nobody_reads_the_terminal(toy, tmp_path):
    """`python cql.py ... | head -1`: the run goes on to its end, without a traceback."""
    directory, output = tmp_path / "run", tmp_path / "output"
    assert finish(start(command(toy, directory), output, close_the_reader)) == 0
    assert output.read_text() == ""
    assert checkpoint(directory)["step"] == 12


def on_screen(text):
    """What a terminal shows: a carriage return goes back to the line's beginning."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown).rstrip())
    return lines


def test_the_bar_on_a_terminal(toy, tmp_path):
    changes = {"max_timesteps": 300, "eval_freq": 50}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, 0x5414, b"\x18\0\x78\0\0\0\0\0")  # TIOCSWINSZ: 24 x 120
    process = start(command(toy, tmp_path / "run", **changes), os.ttyname(slave))
    output = b""
    os.set_blocking(master, False)
    with deadline(200):
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
    assert re.search(r"\d\d:\d\d<\d\d:\d\d, +[\d.]+update/s", " ".join(bars)), bars
    lines = [line for line in on_screen(text) if line.startswith("update ")]
    table = rows(tmp_path / "run", "evaluations.csv")
    assert len(lines) == len(table) == 6
    for line, row in zip(lines, table):
        shown = re.search(r"return (-?\d+) \+- \d+ +score -?[\d.]+", line)
        assert abs(float(shown[1]) - float(row["return_mean"])) < 0.51
    assert not any("%|" in line for line in on_screen(text)[-4:])  # it clears itself


# --- tables ---------------------------------------------------------------------------

ONCE = (
    "log_pi policy_loss alpha_loss alpha average_target_q alpha_prime_loss alpha_prime"
)
PER_CRITIC = (
    "qf{}_loss average_qf{} cql_std_q{} cql_q{}_rand cql_q{}_current_actions "
    "cql_q{}_next_actions cql_min_qf{}_loss cql_qf{}_diff"
)
EVALUATION = (
    "step run seed cql_alpha cql_temp cql_target_action_gap episodes return_mean "
    "return_std length_mean d4rl_normalized_score success_rate discounted_return_mean"
)
TIMING = "step seconds updates_per_s evaluation_seconds checkpoint_seconds"


@pytest.mark.parametrize("changes, more", [({}, []), ({"cal_ql": True}, ["bound_rate"])])
def test_columns_of_the_tables(train, changes, more):
    directory = train("run", n_critics=3, **changes)[1]
    names = list(rows(directory, "metrics.csv")[0])
    expected = ONCE.split() + more
    for name in PER_CRITIC.split():
        expected += [name.format(j) for j in (1, 2, 3)]
    assert names[:6] == EVALUATION.split()[:6]
    assert sorted(names[6:]) == sorted(expected)
    assert set(EVALUATION.split()) <= set(rows(directory, "evaluations.csv")[0])
    assert set(TIMING.split()) <= set(rows(directory, "timing.csv")[0])
    for name in ("metrics.csv", "timing.csv"):
        assert [row["step"] for row in rows(directory, name)] == "3 6 9 12".split()


def test_rows_are_interval_means(toy, train):
    """Against an agent driven by hand, update by update."""
    changes = {**BASE, **FULL, "log_freq": 4, "max_timesteps": 10}
    table = rows(train("run", **changes)[1], "metrics.csv")
    config = cql.TrainConfig(env=str(toy), **changes)
    episodes, task = cql.read_data(config)
    data = cql.Dataset(config, episodes, task)
    agent = cql.make_agent(config, task, "cpu", data.statistics())
    values = []
    for update in range(10):
        noise = agent.draw(update, config.batch_size)
        batch = data.gather(data.index(noise["fractions"]))
        metrics = agent.update(batch, noise, *cql.stage_of(config, update))
        values.append({k: v.double().numpy().copy() for k, v in metrics.items()})
    places = [(int(row["step"]), int(row["run"])) for row in table]
    assert places == [(step, run) for step in (4, 8, 10) for run in range(4)]
    for row, (end, run) in zip(table, places):
        interval = values[(end - 1) // 4 * 4 : end]
        for name in interval[0]:
            mean = np.mean([v[name][run] for v in interval], 0)
            keys = [name.format(j=j) for j in range(1, mean.size + 1)]
            shown = [float(row[key]) for key in keys]
            np.testing.assert_allclose(shown, np.atleast_1d(mean), rtol=1e-6, atol=1e-9)


def test_many_runs_print_means_by_setting(train, capsys):
    """Six runs: two lines an evaluation, each the mean over three seeds."""
    changes = {"seed": [0, 1, 2], "cql_alpha": [1, 5], "max_timesteps": 2}
    directory = train("run", **changes)[1]
    out = capsys.readouterr().out
    table = rows(directory, "evaluations.csv")
    last = [row for row in table if row["step"] == "2"]
    for alpha in ("1.0", "5.0"):
        means = []
        for name in ("return_mean", "d4rl_normalized_score"):
            values = [
                float(row[name])
                for row in last
                if float(row["cql_alpha"]) == float(alpha)
            ]
            assert len(values) == 3
            means.append(np.mean(values))
        line = f"  cql_alpha {alpha}  return {means[0]:.4g}  score {means[1]:.4g}  "
        assert line + "(mean of 3 runs)\n" in out


def test_a_run_without_evaluation_prints_q(train, capsys):
    changes = {"eval_env": "none", "max_timesteps": 4, "log_freq": 2}
    directory = train("run", **changes)[1]
    out = capsys.readouterr().out
    for row in rows(directory, "metrics.csv"):
        q = float(row["average_qf1"]), float(row["cql_q1_current_actions"])
        line = f"Q of data {q[0]:.4g}  of policy {q[1]:.4g}\n"
        step = f"update {int(row['step']):>9,}  "
        assert step in out and line in out


def test_metrics_name_seed_and_weight(train):
    directory = train("run", seed=[3, 4], cql_alpha=[1, 5], max_timesteps=2)[1]
    found = []
    for row in rows(directory, "metrics.csv"):
        found.append((row["run"], row["seed"], row["cql_alpha"]))
    assert found[-4:] == [
        ("0", "3", "1"), ("1", "3", "5"), ("2", "4", "1"), ("3", "4", "5")
    ]  # fmt: skip


def test_load_policy_names_the_run_that_it_takes(train, capsys):
    """If there are several and none is named."""
    directory = train("run", seed=[3, 4], max_timesteps=1)[1]
    capsys.readouterr()
    assert cql.load_policy(directory).run == 0
    assert f"{directory}: run 0 of 2 (seed 3, cql_alpha " in capsys.readouterr().out
    assert cql.load_policy(directory, run=1).run == 1
    assert capsys.readouterr().out == ""
