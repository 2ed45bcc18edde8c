"""Tests of scripts/from_ogbench.py with the real package and small files in its format.

The files hold random observations. qpos and button_states are random too, and those of
the goal in known rows."""

import io
import json
import os
import subprocess
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import minari
import numpy as np
import pytest
from make_data import run

import cql

SCRIPT = Path(cql.__file__).parent / "scripts" / "from_ogbench.py"
sys.path.insert(0, str(SCRIPT.parent))
import from_ogbench  # noqa: E402
import judge  # noqa: E402

with cql.quiet():
    import ogbench

LENGTHS = (7, 1, 12, 2, 5)  # transitions of the trajectories
# Transitions at the goal. The second trajectory is one of them, and the third ends in
# two; the fourth reaches the goal in its first step, and the last never does.
AT_GOAL = (2, 3, 6, 7, 12, 18, 19, 20)
NAMES = {
    "cube": "cube-double-play-singletask-task2-v0",
    "scene": "scene-play-singletask-v0",
    "puzzle": "puzzle-3x3-noisy-singletask-task5-v0",
    "maze": "pointmaze-medium-navigate-singletask-task3-v0",
    "ant": "antmaze-teleport-explore-singletask-v0",
    "soccer": "antsoccer-arena-stitch-singletask-v0",
}


def make(name):
    """Return the environment that the package makes for the dataset, after a reset."""
    with cql.quiet():
        env = ogbench.make_env_and_datasets(name, env_only=True)
        env.reset(seed=0)
    return env


def goal_of(env, qpos, buttons):
    """Set the rows qpos and buttons to states at the goal."""
    task = env.unwrapped
    name = env.spec.id
    if "maze" in name:
        qpos[:, :2] = task.cur_goal_xy
    elif "soccer" in name:
        qpos[:, 15:17] = task.cur_goal_xy
    else:
        if "cube" in name or "scene" in name:
            places = task._data.mocap_pos
            for i in range(task._num_cubes):
                qpos[:, 14 + 7 * i : 17 + 7 * i] = places[i]
        if "scene" in name:
            qpos[:, -2] = task._target_drawer_pos
            qpos[:, -1] = task._target_window_pos
        if buttons is not None:
            buttons[:] = task._target_button_states


def arrays(name, at_goal=AT_GOAL, lengths=LENGTHS):
    """Return the arrays of a dataset's file. at_goal are numbers of transitions."""
    env = make(name)
    rng = np.random.default_rng(0)
    n = sum(lengths) + len(lengths)
    with cql.quiet():
        n_actions = env.action_space.shape[0]
    terminals = np.zeros(n, bool)
    terminals[np.cumsum(np.array(lengths) + 1) - 1] = True
    data = {
        "observations": rng.normal(size=(n, env.observation_space.shape[0])),
        "actions": rng.uniform(-1, 1, (n, n_actions)),
        "terminals": terminals,
        "qpos": 30 + rng.normal(size=(n, env.unwrapped.model.nq)),
    }
    buttons = None
    if "scene" in name or "puzzle" in name:
        # No state of a button is 2.
        buttons = np.full((n, env.unwrapped._num_buttons), 2)
        buttons[:, 0] = rng.integers(0, 2, n)
    rows = np.flatnonzero(~terminals)[list(at_goal)]
    reached = None if buttons is None else buttons[rows]
    qpos = data["qpos"][rows]
    goal_of(env, qpos, reached)
    data["qpos"][rows] = qpos
    if buttons is not None:
        buttons[rows] = reached
        data["button_states"] = buttons
    for key in ("observations", "actions"):
        data[key] = data[key].astype("f4")
    return data


def write_file(path, name, without=(), **changed):
    """Write a dataset's file, without some arrays or with others; return its path."""
    data = {**arrays(name), **changed}
    np.savez(path, **{key: data[key] for key in data if key not in without})
    return path


def convert(path, name, out, *flags):
    """Run from_ogbench.main. Return its exit status, stdout and stderr."""
    stdout, stderr = io.StringIO(), io.StringIO()
    argv = [str(path), "--env", name, "--out", str(out), *flags]
    with redirect_stdout(stdout), redirect_stderr(stderr):
        status = from_ogbench.main(argv)
    return status, stdout.getvalue(), stderr.getvalue()


def converted(path, name, out, *flags):
    """Convert a file. Return episodes and task as cql.py reads them, and stdout."""
    status, stdout, stderr = convert(path, name, out, *flags)
    assert status == 0 and stderr == "", stderr
    episodes, task = cql.read_episodes(str(out))
    episodes = list(episodes)
    for episode in episodes:
        cql.check_episode(episode, task)
    return episodes, task, stdout


def package_data(path, name):
    """Return the transitions that the package itself gives for the file."""
    np.savez(str(path).replace(".npz", "-val.npz"), **np.load(path))
    with cql.quiet():
        return ogbench.make_env_and_datasets(name, dataset_path=str(path))[1]


def transitions(observations, actions, rewards, following, masks):
    """Return the set of (s, a, r, s', mask), each as bytes, and their number."""
    columns = [observations, actions, np.c_[rewards], following, np.c_[masks]]
    rows = np.concatenate(columns, axis=1).astype("f4")
    return {row.tobytes() for row in rows}, len(rows)


def metadata_of(out):
    """Return Minari's metadata of each episode."""
    dataset = minari.dataset.minari_dataset.MinariDataset(out / "data")
    return list(dataset.storage.get_episode_metadata(dataset.episode_indices))


@pytest.mark.parametrize("kind", NAMES)
def test_the_package_s_transitions(kind, tmp_path):
    """The dataset has the package's transitions, split after each mask 0."""
    name = NAMES[kind]
    path = write_file(tmp_path / "file.npz", name)
    episodes, task, printed = converted(path, name, tmp_path / "data-v0")
    expected = package_data(path, name)
    keys = ["observations", "actions", "rewards", "next_observations", "masks"]
    wanted, n = transitions(*[expected[key] for key in keys])
    masks = expected["masks"]
    assert np.flatnonzero(masks == 0).tolist() == list(AT_GOAL)
    assert n == len(wanted) == sum(LENGTHS)

    join = np.concatenate
    found, n_found = transitions(
        join([each.observations[:-1] for each in episodes]),
        join([each.actions for each in episodes]),
        join([each.rewards for each in episodes]),
        join([each.observations[1:] for each in episodes]),
        1 - join([each.terminations for each in episodes]),
    )
    assert found == wanted and n_found == n
    ends = [bool(each.terminations[-1]) for each in episodes]
    lengths = [len(each.rewards) for each in episodes]
    assert lengths == [3, 1, 3, 1, 5, 6, 1, 1, 1, 5]
    assert ends == [True] * 8 + [False] * 2
    for each in episodes:
        assert each.whole and not each.terminations[:-1].any()

    starts = np.cumsum(LENGTHS) - LENGTHS
    firsts = np.cumsum(lengths) - lengths
    marks = [each.get("continued", False) for each in metadata_of(tmp_path / "data-v0")]
    assert marks == [first not in starts for first in firsts]
    returns = [each.rewards.sum() for each, mark in zip(episodes, marks) if not mark]
    assert [not each.initial for each in episodes] == marks
    config = cql.TrainConfig(env=str(tmp_path / "data-v0"), batch_size=4)
    data = judge.Data(config, cql.read_data(config)[0], task)
    np.testing.assert_allclose(data.dataset.returns, returns)
    recorded = [each.observations[0] for each in episodes if each.initial]
    np.testing.assert_array_equal(data.dataset.observations[data.first_rows], recorded)
    assert len(recorded) == len(LENGTHS)
    values = []
    for each in episodes:
        if each.initial:
            values.append(cql.discounted_sum(each.rewards, config.discount))
    assert data.value == pytest.approx(np.mean(values), rel=1e-5)
    for text in (
        f"{path}: 27 transitions in 5 trajectories\n",
        "10 episodes of 1 to 6 steps; 5 of them have one step\n",
        "  8 terminate (mask 0); 2 are truncated\n  5 continue a trajectory after a",
        f"goal: mean return {np.mean(returns):.1f}, 4 of 5 reach it\n",
    ):
        assert text in printed, text
    env = make(name)
    assert (task.env_id, task.env_kwargs) == (env.spec.id, env.spec.kwargs)
    assert task.max_episode_steps == env.spec.max_episode_steps
    assert task.observation_dim == env.observation_space.shape[0]
    assert f"--eval_env ogbench:{env.spec.id}\n" in printed


def test_rewards_and_ends_are_the_environment_s(tmp_path):
    """What the environment pays and where it ends is what the dataset says."""
    name = NAMES["maze"]
    env = make(name)
    rng = np.random.default_rng(0)
    rows = {"observations": [], "actions": [], "terminals": [], "qpos": []}
    rewards = []
    ended = []
    for trajectory in range(3):
        observation, _ = env.reset(seed=trajectory)
        goal = np.array(env.unwrapped.cur_goal_xy)
        env.unwrapped.set_xy(goal + [1.5, 0])
        observation = env.unwrapped.get_ob()
        for step in range(30):
            action = rng.uniform([-1, -0.3], [0.4, 0.3]).astype("f4")
            rows["observations"].append(observation)
            rows["actions"].append(action)
            rows["terminals"].append(step == 29)
            rows["qpos"].append(env.unwrapped.data.qpos.copy())
            observation, reward, terminated, _, _ = env.unwrapped.step(action)
            if step < 29:
                rewards.append(reward)
                ended.append(terminated)
    path = tmp_path / "file.npz"
    np.savez(path, **{key: np.array(rows[key]) for key in rows})
    episodes, _, _ = converted(path, name, tmp_path / "data-v0")
    assert 0 < sum(ended) < len(ended)
    assert np.concatenate([each.rewards for each in episodes]).tolist() == rewards
    found = np.concatenate([each.terminations for each in episodes])
    assert found.tolist() == ended


def test_training_and_evaluation(tmp_path):
    """cql.py trains on the dataset and evaluates in the package's environment."""
    name = NAMES["maze"]
    path = write_file(tmp_path / "file.npz", name)
    out = tmp_path / "maze-v0"
    converted(path, name, out)
    eval_env = "ogbench:pointmaze-medium-singletask-task3-v0"
    flags = {"env": out, "eval_env": eval_env, "max_episode_steps": 9, "n_episodes": 2}
    flags["resume"] = tmp_path / "run"
    status, printed, err = run(**flags)
    assert status == 0, err
    assert "data: 10 episodes, 27 transitions, mean return" in printed
    assert "evaluation: pointmaze-medium-singletask-task3-v0 with " in printed
    assert ", at most 9 steps, not scored" in printed
    last = (tmp_path / "run" / "evaluations.csv").read_text().splitlines()
    row = dict(zip(last[0].split(","), last[-1].split(",")))
    assert (float(row["return_mean"]), float(row["success_rate"])) == (-9, 0)


def test_a_module_is_asked_for(tmp_path):
    """Without --eval_env, cql.py names the flag: recorded ids name no module."""
    name = NAMES["maze"]
    path = write_file(tmp_path / "file.npz", name)
    out = tmp_path / "maze-v0"
    converted(path, name, out)
    code = "import cql, sys; sys.exit(cql.main(sys.argv[1:]))"
    flags = ["--env", out, "--max_timesteps", "3", "--checkpoints_path", "null"]
    command = [sys.executable, "-c", code, *flags, "--batch_size", "8"]
    where = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=where)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "or --eval_env module:ID for yours" in result.stderr


def test_episodes_repeat():
    """An episode is a function of its seed, whatever is played beside it.

    The mazes draw their starts from NumPy's global generator, and those with
    teleports draw in steps as well."""
    ids = [
        "pointmaze-teleport-singletask-v0",
        "antsoccer-arena-singletask-v0",
        "cube-single-singletask-v0",
        "scene-singletask-v0",
        "puzzle-3x3-singletask-v0",
    ]
    for env_id in ids:
        config = cql.TrainConfig(eval_env=f"ogbench:{env_id}")
        rng = np.random.default_rng(0)
        seen = [[], [], []]
        with cql.quiet():
            players = [cql.Player(cql.make_env(config)) for _ in seen]
            shape = players[0].env.action_space.shape
            for player, rows, seed in zip(players, seen, (5, 6, 5)):
                player.reset(seed)
                rows.append(player.observation)
            for _ in range(20):
                action = rng.uniform(-1, 1, shape).astype("f4")
                for player, rows in zip(players, seen):
                    task = player.env.unwrapped
                    if "teleport" in env_id:  # into one, so that the step draws
                        task.set_xy(np.array(task._teleport_info["teleport_in_xys"][0]))
                        player.step(action)
                        rows.append(task.get_ob())
                    else:
                        player.step(action)
                        rows.append(player.observation)
        np.testing.assert_array_equal(seen[0], seen[2])
        assert not np.array_equal(seen[0], seen[1]), env_id


@pytest.fixture
def refused_line(tmp_path):
    """Return a function (path, name, *fragments, flags, out) that checks a refusal.

    A refusal has exit status 2, prints one line that contains the fragments, and
    writes no file."""

    def check(path, name, *fragments, flags=(), out=tmp_path / "no-v0"):
        before = sorted(tmp_path.rglob("*"))
        status, printed, err = convert(path, name, out, *flags)
        assert status == 2 and printed == "", (status, printed, err)
        assert err.startswith("from_ogbench.py: error: ") and err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        for text in fragments:
            assert text in err, f"{text} not in: {err}"

    return check


@pytest.mark.parametrize(
    "kind, missing",
    [
        ("cube", "qpos"),
        ("maze", "qpos"),
        ("soccer", "qpos"),
        ("scene", "qpos"),
        ("scene", "button_states"),
        ("puzzle", "button_states"),
        ("maze", "terminals"),
    ],
)
def test_a_file_without_an_array(kind, missing, tmp_path, refused_line):
    path = write_file(tmp_path / "file.npz", NAMES[kind], without=[missing])
    expected = "expected observations, actions, terminals, "
    found = f"{path}: has no {missing}; "
    refused_line(path, NAMES[kind], found, expected, "; download the file again")


def test_puzzles_need_no_qpos(tmp_path):
    path = write_file(tmp_path / "file.npz", NAMES["puzzle"], without=["qpos"])
    episodes, _, _ = converted(path, NAMES["puzzle"], tmp_path / "data-v0")
    assert len(episodes) == 10


def test_files_refused(tmp_path, refused_line):
    name = NAMES["maze"]
    path = tmp_path / "file.npz"
    refused_line(path, name, f"{path}: no such file; pass the .npz file of an OGBench")
    refused_line(tmp_path, name, f"{tmp_path}: no such file; ")
    path.write_bytes(b"\x00 no such thing")
    refused_line(path, name, f"{path}: not a readable .npz file: ")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused_line(tmp_path / "one.npy", name, "not a readable .npz file: a single array")

    n = sum(LENGTHS) + len(LENGTHS)
    write_file(path, name, terminals=np.zeros(n))
    refused_line(path, name, "last row is not terminal; expected complete traj")
    write_file(path, name, terminals=np.ones(n))
    refused_line(path, name, f"{path}: no transitions; expected trajectories")
    write_file(path, name, actions=np.zeros((n - 5, 2)))
    refused_line(path, name, f"{path}: damaged or foreign: ")
    write_file(path, name, actions=np.zeros((n, 5)))
    refused_line(path, name, "actions have shape (27, 5); expected (27, 2) for pointm")
    write_file(path, name, qpos=np.zeros((n, 3)))
    refused_line(path, name, "qpos have shape (27, 3); expected (27, 2) for pointm")
    write_file(path, NAMES["cube"])
    other = "cube-single-play-singletask-v0"
    hint = "; pass the file of the dataset that --env names"
    refused_line(path, other, "have shape (27, 37); expected (27, 28) for", hint)
    name = NAMES["scene"]
    write_file(path, name, button_states=np.zeros((n, 3)))
    refused_line(path, name, f"{path}: damaged or foreign: ")


@pytest.mark.parametrize(
    "name, problem",
    [
        (
            "cube-single-play-v0",
            "not a single-task dataset; expected, for example, cube",
        ),
        ("cube-single-play-oraclerep-v0", "not a single-task dataset; expected"),
        ("singletask-v0", "OGBench has no environment singletask-v0; expected a name"),
        (
            "cube-single-singletask-task2-v0",
            "OGBench has no environment cube-singletask-task2-v0; expected a name such",
        ),
        (
            "cube-single-play-singletask-task9-v0",
            "OGBench has no environment cube-single-singletask-task9-v0; expected",
        ),
        (
            "visual-cube-single-play-singletask-v0",
            "observations are images; pass a dataset whose name does not begin with",
        ),
    ],
)
def test_names_refused(name, problem, tmp_path, refused_line):
    refused_line(tmp_path / "file.npz", name, f"--env {name}: {problem}")


def test_out(tmp_path, refused_line, monkeypatch):
    """An existing dataset is replaced only with --overwrite, another directory never.

    If the disk fails, the old dataset stays."""
    name = NAMES["maze"]
    path = write_file(tmp_path / "file.npz", name)
    out = tmp_path / "data-v0"
    out.mkdir()
    hint = "choose another directory"
    problem = f"--out {out}: exists but is not a dataset, so it is not overwritten"
    refused_line(path, name, f"{problem}; {hint}\n", out=out, flags=["--overwrite"])
    out.rmdir()
    converted(path, name, out)
    problem = f"--out {out}: already exists; {hint} or pass --overwrite\n"
    refused_line(path, name, problem, out=out)
    refused_line(path, name, "cannot be written; choose", out=path / "data-v0")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    np.savez(path, **arrays(name, at_goal=(2,)))
    with monkeypatch.context() as patch:
        patch.setattr(from_ogbench.MinariStorage, "update_metadata", full)
        status, printed, err = convert(path, name, out, "--overwrite")
    assert (status, printed) == (1, "") and err.count("\n") == 1
    assert err.startswith(f"from_ogbench.py: failed: cannot write {out}: [Errno 28] No")
    assert len(cql.read_episodes(str(out))[0]) == 10
    monkeypatch.chdir(tmp_path)  # a relative path
    episodes, _, _ = converted(path, name, Path("data-v0"), "--overwrite")
    assert len(episodes) == 6
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data-v0", "file.npz"]
    metadata = json.loads((out / "data" / "metadata.json").read_text())
    assert metadata["description"] == f"OGBench's {name}, relabeled for its task"


def test_another_package(tmp_path, refused_line, monkeypatch):
    """A package that is called ogbench and lacks what is needed is refused."""
    monkeypatch.setitem(sys.modules, "ogbench", types.ModuleType("ogbench"))
    hint = "; install it: pip install ogbench=="
    path = tmp_path / "file.npz"
    refused_line(path, NAMES["maze"], "ogbench cannot be used (", hint)


def test_without_the_package(tmp_path):
    """One line names the command that installs it. --help works without it."""
    code = "import runpy, sys; sys.modules['ogbench'] = None; sys.argv = sys.argv[1:]"
    code += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT]
    flags = ["file.npz", "--env", NAMES["maze"], "--out", tmp_path / "no-v0"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "; install it: pip install ogbench==" in result.stderr
    result = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "python scripts/from_ogbench.py" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_pins():
    """The script's command installs what the tests run with."""
    text = (SCRIPT.parents[1] / "requirements-dev.txt").read_text()
    for pin in from_ogbench.INSTALL.split()[2:]:
        assert pin in text.split()
        assert pin in from_ogbench.__doc__
