"""Tiny environments and datasets for the tests, and the command that trains on them.

Importing this module registers "CqlToy-v0", whose episodes are 20 steps at most, and
"CqlEndless-v0", the same without a time limit. In another process, the user's own word
does it: `--eval_env make_data:CqlToy-v0` with tests/ on PYTHONPATH.

    path = toy_dataset(root)                  # a Minari dataset: root / "toy/random-v0"
    path = d4rl_file(tmp_path / "toy.hdf5")   # D4RL's flat file of the same episodes

    status, out, err = run(env=path, seed=[0, 1])    # cql.main with TINY flags

`root` is what MINARI_DATASETS_PATH must say if the dataset is asked for by its id; the
path itself can be asked for always. An episode is a dict of arrays: observations [T + 1,
...], actions [T, ...], rewards, terminations and truncations [T].
"""

import io
import json
import os
import resource
import signal
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

TINY = {
    "device": "cpu",
    "hidden_dim": 8,
    "batch_size": 8,
    "cql_n_actions": 2,
    "max_timesteps": 3,
    "n_episodes": 1,
}


def arguments(**flags):
    """argv of TINY and flags; a flag that is None is left out (give null as "null")."""
    argv = []
    for flag, value in {**TINY, **flags}.items():
        if value is not None:
            typed = isinstance(value, (list, bool))
            argv.append(f"--{flag}={json.dumps(value, default=str) if typed else value}")
    return argv


def run(argv=None, **flags):
    """cql.main(argv or arguments(**flags)) -> exit status, stdout, stderr."""
    import cql

    argv = arguments(**flags) if argv is None else list(map(str, argv))
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cql.main(argv)
        except SystemExit as end:  # --help
            status = end.code or 0
    return status, out.getvalue(), err.getvalue()


class Toy(gym.Env):
    """A point in the plane, pushed by the action; reward 1 - |point|, the end at |1|.

    Observations are the point and the last reward, in one vector or, `layout` being
    "dict" or "tuple", in parts. Actions live in [low, high], two numbers or two lists;
    the middle of the bounds leaves the point where it is."""

    def __init__(self, low=-1.0, high=1.0, layout="box", push=0.3, render_mode=None):
        self.low, self.high = np.full(2, low, np.float32), np.full(2, high, np.float32)
        self.action_space = gym.spaces.Box(self.low, self.high)
        self.layout, self.push = layout, push
        last, point = (gym.spaces.Box(-2, 2, (n,)) for n in (1, 2))
        self.observation_space = {
            "box": gym.spaces.Box(-2, 2, (3,)),
            "dict": gym.spaces.Dict(point=point, last=last),
            "tuple": gym.spaces.Tuple((point, last)),
        }[layout]

    def _observation(self, reward):
        point, last = self.point.astype(np.float32), np.float32([reward])
        parts = {"dict": {"point": point, "last": last}, "tuple": (point, last)}
        return parts.get(self.layout, np.concatenate([point, last]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.point = self.np_random.uniform(-0.5, 0.5, 2)
        return self._observation(0.0), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        unit = 2 * (np.asarray(action) - self.low) / (self.high - self.low) - 1
        self.point = np.clip(self.point + self.push * unit, -1.2, 1.2)
        distance = float(np.linalg.norm(self.point))
        return self._observation(1 - distance), 1 - distance, distance > 1, False, {}


for _id, _limit in (("CqlToy-v0", 20), ("CqlEndless-v0", None)):
    if _id not in gym.registry:
        gym.register(_id, entry_point=f"{__name__}:Toy", max_episode_steps=_limit)


@contextmanager
def deadline(seconds):
    """TimeoutError inside, if what stands there does not end."""

    def stop(*_):
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def stacked(values):
    """A list of observations as one array, or as a dict or tuple of arrays."""
    if isinstance(values[0], dict):
        return {key: stacked([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(map(stacked, zip(*values)))
    return np.stack(values)


def rollout(env, n_episodes, seed=0):
    """Episodes of uniform random actions."""
    env.action_space.seed(seed)
    episodes = []
    for i in range(n_episodes):
        steps, observations = [], [env.reset(seed=1000 * seed + i)[0]]
        while not steps or not (steps[-1][2] or steps[-1][3]):
            action = env.action_space.sample()
            observation, *outcome, _ = env.step(action)
            observations.append(observation)
            steps.append((action, *outcome))
        actions, rewards, terminations, truncations = map(np.array, zip(*steps))
        episodes.append(
            {
                "observations": stacked(observations),
                "actions": actions,
                "rewards": rewards.astype(float),
                "terminations": terminations,
                "truncations": truncations,
            }
        )
    return episodes


def toy_episodes(episodes=8, seed=0, **kwargs):
    """Random episodes of the toy environment, made with kwargs (see Toy)."""
    return rollout(gym.make("CqlToy-v0", **kwargs), episodes, seed)


def random_episodes(lengths, seed=0, obs_dim=3, action_dim=2, ends="mixed"):
    """Episodes of given lengths, every number in them another one.

    `ends`: "terminal", "timeout", "cut" (neither: the recording just stops), or "mixed",
    these three in turn."""
    rng = np.random.default_rng(seed)
    kinds = ("terminal", "timeout", "cut") if ends == "mixed" else (ends,)
    episodes = []
    for i, length in enumerate(lengths):
        kind, last = kinds[i % len(kinds)], np.arange(length) == length - 1
        episodes.append(
            {
                "observations": rng.normal(size=(length + 1, obs_dim)).astype(
                    np.float32
                ),
                "actions": rng.uniform(-1, 1, (length, action_dim)).astype(np.float32),
                "rewards": rng.normal(size=length),
                "terminations": last & (kind == "terminal"),
                "truncations": last & (kind == "timeout"),
            }
        )
    return episodes


@contextmanager
def little_memory():
    """At most 10 GiB of addresses inside: a size that damage has made of some bytes must
    fail here as it would elsewhere, and not take the machine's memory along."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (10 << 30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def datasets_path(root):
    """MINARI_DATASETS_PATH, for as long as it lasts."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def minari_dataset(root, id, episodes, env=None, **kw):
    """Write episodes as the Minari dataset `id` under root; returns its directory.

    Without `env` (an id or an environment, which is recorded) the spaces are boxes of
    the episodes' shapes, actions in [-1, 1], unless kw gives `observation_space` and
    `action_space`. Other kw: minari.create_dataset_from_buffers's, such as eval_env,
    ref_min_score, ref_max_score, data_format."""
    if env is None:
        for key, bound in (("observation", np.inf), ("action", 1.0)):
            space = kw.get(f"{key}_space")
            if space is None:
                shape = np.shape(episodes[0][f"{key}s"])[1:]
                kw[f"{key}_space"] = gym.spaces.Box(-bound, bound, shape, np.float32)
    buffers = [EpisodeBuffer(infos={}, **episode) for episode in episodes]
    root = Path(root).resolve()  # Minari mistakes relative paths
    root.mkdir(parents=True, exist_ok=True)
    with datasets_path(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(id, buffers, env=env, **kw)
    return root / id


def toy_dataset(root, id="toy/random-v0", episodes=8, seed=0, env_kwargs=None, **kw):
    """Random episodes of CqlToy-v0, which the dataset records; returns its directory.

    `env_kwargs` go to the environment (see Toy), kw to `minari_dataset`."""
    env = gym.make("CqlToy-v0", **(env_kwargs or {}))
    return minari_dataset(root, id, rollout(env, episodes, seed), env=env, **kw)


def hopper_dataset(root, id="mujoco/hopper/medium-v0", episodes=16, seed=0, **kw):
    """Random episodes of Hopper-v5, some 20 steps each; returns its directory. The real
    thing and slow to evaluate: most tests are as well off with `toy_dataset`."""
    env = gym.make("Hopper-v5")
    return minari_dataset(root, id, rollout(env, episodes, seed), env=env, **kw)


def d4rl_file(path, episodes=None, **replaced):
    """Write episodes (default: `toy_episodes()`) as D4RL's flat .hdf5; returns the path.

    `replaced` arrays go into the file for the episodes' or beside them; None leaves
    an array out: `d4rl_file(path, next_observations=None, timeouts=None)`."""
    episodes = toy_episodes() if episodes is None else episodes
    arrays = {
        "observations": np.concatenate([e["observations"][:-1] for e in episodes]),
        "actions": np.concatenate([e["actions"] for e in episodes]),
        "rewards": np.concatenate([e["rewards"] for e in episodes]),
        "terminals": np.concatenate([e["terminations"] for e in episodes]),
        "next_observations": np.concatenate([e["observations"][1:] for e in episodes]),
        "timeouts": np.concatenate([e["truncations"] for e in episodes]),
    }
    with h5py.File(path, "w") as file:
        for key, value in {**arrays, **replaced}.items():
            if value is not None:
                file[key] = value
    return Path(path)
