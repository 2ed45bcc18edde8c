"""Evaluation in several processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from make_data import arguments

import cql

ONLINE = dict(env=None, eval_env="Pendulum-v1", max_timesteps=0, online_iterations=1000)
ONLINE |= dict(
    normalize=False, hidden_dim=8, q_n_hidden_layers=1, batch_size=8, eval_freq=1000
)


@pytest.fixture
def make(monkeypatch):
    """make(threads) -> evaluator and agent of two runs, the same each time."""

    def make(threads, **flags):
        values = {**ONLINE, "seed": [0, 1], "n_episodes": 3, **flags}
        config = cql.TrainConfig(**values)
        _, task, evaluator = cql.load(config, None, torch.device("cpu"))
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return evaluator, cql.make_agent(config, task)

    return make


def children(pid: int) -> list:
    """Processes that a process has begun and that are still there."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if alive(int(child))]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_processes_play_the_same_episodes(make):
    """To the last bit, whoever plays; and again, and when a run is no longer alive."""
    results = []
    before = children(os.getpid())
    for threads, processes in ((1, 0), (4, 4), (9, 6)):
        evaluator, agent = make(threads)
        parts = []
        for step, runs in ((0, [0, 1]), (7, [0, 1]), (9, [1])):
            parts.append(evaluator.episodes(agent, step, runs, []))
        results.append(parts)
        assert len(evaluator.pipes) == processes
        assert len(children(os.getpid())) == len(before) + processes
        del evaluator
        wait_until(lambda: children(os.getpid()) == before)
    assert results[0] == results[1] == results[2]
    assert [len(part) for part in results[0]] == [6, 6, 3]


class Mine(gymnasium.Wrapper):
    pass


gymnasium.register("CqlMine-v0", lambda: Mine(PendulumEnv()), max_episode_steps=5)


@pytest.mark.parametrize("name", ["CqlToy-v0", "CqlMine-v0"])
def test_environments_of_others_stay_here(make, name):
    """Which may use torch: a copied process would wait for its threads for ever."""
    evaluator, agent = make(3, eval_env=name)
    assert len(evaluator.episodes(agent, 0, [0, 1], [])) == 6
    assert evaluator.pipes == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_environment(make, monkeypatch, threads):
    monkeypatch.setattr(PendulumEnv, "step", lambda *_: 1 / 0)
    evaluator, agent = make(threads)
    with pytest.raises(cql.MachineError) as error:
        evaluator.evaluate(agent, 5, [0, 1], [])
    assert str(error.value) == "Pendulum-v1 failed at update 5: division by zero"


def test_a_killed_process(make):
    evaluator, agent = make(2)
    before = children(os.getpid())
    evaluator.evaluate(agent, 0, [0, 1], [])
    (victim, _) = [pid for pid in children(os.getpid()) if pid not in before]
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(cql.MachineError, match="Pendulum-v1 failed at update 5"):
        evaluator.evaluate(agent, 5, [0, 1], [])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_they_end_with_the_command(tmp_path, number):
    """Whatever ends it: none is left behind, and a Ctrl-C still saves."""
    flags = {**ONLINE, "env": "null", "online_iterations": 100_000, "n_episodes": 2}
    flags |= {"resume": tmp_path / "run", "log_freq": 20}
    command = [sys.executable, cql.__file__, *arguments(**flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "WANDB_MODE": "disabled"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    try:
        wait_until(lambda: len(children(process.pid)) == 2, 60)
        left = children(process.pid)
        wait_until((tmp_path / "run/metrics.csv").exists, 60)
        if number == signal.SIGINT:  # as a terminal sends it
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    wait_until(lambda: not any(map(alive, left)))
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, out
        assert "interrupted" in out and (tmp_path / "run/checkpoint.pt").exists()
