"""Record a policy's episodes as a Minari dataset, for cql.py to train on.

    python scripts/record.py runs/sac --env Pendulum-v1 --steps 20000 \\
        --noise 0.3 --out datasets/medium-v0
    python scripts/record.py random --env Pendulum-v1 --steps 20000 \\
        --out datasets/random-v0
    python cql.py --env '[datasets/medium-v0, datasets/random-v0]'

The policy is a run's directory or a checkpoint, or the word `random` for
uniform actions. The dataset holds everything that the environment told, but
for its infos, and returns to score by. The same command records the same
episodes. As Python: `play_episode` and `write_dataset`, with an `act` of your
own.
"""

import argparse
import copy
import dataclasses
import math
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Callable, List, Optional, Tuple

import gymnasium as gym
import minari
import numpy as np
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from gymnasium.wrappers import TransformObservation
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

# Streams of random numbers, beside cql.py's own.
START, DRAW, MEASURE = range(10, 13)
MEASURED = 20  # episodes for a reference return


def stack(space: gym.Space, values: list):
    """Values of a space as one array, or as a dictionary or tuple of arrays."""
    return concatenate(space, values, create_empty_array(space, len(values)))


def play_episode(
    env: gym.Env,
    act: Callable,
    seed: int,
    most_steps: float = math.inf,
    observation_space: Optional[gym.Space] = None,
) -> EpisodeBuffer:
    """One episode of act(observation) -> action. One that is cut after most_steps is
    truncated. observation_space: how observations are kept, if not as in env's."""
    observation, _ = env.reset(seed=seed)
    observations = [copy.deepcopy(observation)]  # some environments change theirs
    actions = []
    rewards = []
    over = False
    while not over:
        action = act(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        observations.append(copy.deepcopy(observation))
        actions.append(action)
        rewards.append(float(reward))
        over = terminated or truncated or len(actions) >= most_steps
    last = np.arange(len(actions)) == len(actions) - 1
    return EpisodeBuffer(
        seed=seed,
        observations=stack(observation_space or env.observation_space, observations),
        actions=stack(env.action_space, actions),
        rewards=np.array(rewards),
        terminations=last & terminated,
        truncations=last & (not terminated),
        infos={},
    )


def check_space(directory: Path, episodes: List[EpisodeBuffer]) -> None:
    """Raise OSError where they may not fit: HDF5 ends badly on a full disk."""
    n_bytes = sum(len(pickle.dumps(episode)) for episode in episodes)
    needed = 2 * n_bytes + 20_000 * len(episodes)
    free = shutil.disk_usage(directory).free
    if free < needed:
        sizes = f"{free / 1e6:,.2f} MB free, {needed / 1e6:,.2f} MB may be needed"
        raise OSError(f"{directory}: {sizes}")


def write_dataset(
    out: Path,
    episodes: List[EpisodeBuffer],
    env: gym.Env,
    observation_space: Optional[gym.Space] = None,
    **metadata,
) -> None:
    """Write the Minari dataset out/data of episodes in env, or nothing; one that is
    there is replaced. metadata: by Minari's names, such as description. Raises OSError,
    RuntimeError or ValueError where the disk fails."""
    check_space(out.parent, episodes)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        new = Path(beside) / "data"
        storage = MinariStorage.new(
            new,
            observation_space=observation_space or env.observation_space,
            action_space=env.action_space,
            env_spec=env.spec,
        )
        names = {"dataset_id": out.name, "minari_version": minari.__version__}
        storage.update_metadata({**names, **metadata})
        storage.update_episodes(episodes)
        out.mkdir(exist_ok=True)
        if (out / "data").exists():
            shutil.rmtree(out / "data")
        os.rename(new, out / "data")


def check_out(out: Path, overwrite: bool) -> None:
    """Make the directory above. Raises UserError where no dataset can be put."""
    where = f"--out {out}"
    if out.exists() and not overwrite:
        raise cql.UserError(f"{where}: is there already; --overwrite replaces it")
    if out.exists() and not (out / "data" / "metadata.json").exists():
        raise cql.UserError(f"{where}: no dataset, so --overwrite leaves it as it is")
    with cql.errors_as(cql.UserError, where, OSError):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out.parent, os.W_OK):
            raise cql.UserError(f"{where}: that directory cannot be written")


def make_env(options, policy: Optional[Callable]) -> Tuple[gym.Env, cql.Task, str]:
    """The environment, with observations as it gives them, its task, and its name as
    given. Raises UserError."""
    name = options.env
    if policy is not None and name is None:
        name = policy.agent.config.eval_env
        if name in (None, "none"):
            name = policy.task.env_id
    if name is None:
        raise cql.UserError(f"{options.policy}: of no known environment; pass --env")
    if policy is None:
        env = cql.make_env(cql.TrainConfig(eval_env=name))
        settings = dict(env.spec.kwargs)
        task = cql.make_task(
            env.observation_space,
            env.action_space,
            env_id=env.spec.id,
            env_kwargs=settings,
        )
    else:
        task = policy.task
        config = dataclasses.replace(policy.agent.config, eval_env=name)
        env = cql.make_env(config, task)
        cql.check_match(task, env, name)
    if isinstance(env, TransformObservation):  # which flattens, outermost
        env = env.env
    return env, task, name


def random_act(env: gym.Env, seed: int) -> Callable:
    """Uniform actions: a function of an observation."""
    env.action_space.seed(seed)
    return lambda observation: env.action_space.sample()


def policy_act(policy: Callable, run: int, seed: int, noise=0.0, stochastic=False):
    """The policy's actions, with noise: a function of an observation. Its draws are the
    seed's, where those of load_policy with deterministic=False are always the same."""
    rng = np.random.default_rng(seed)
    agent = policy.agent
    task = policy.task
    space = cql.recorded_space(task.observation_space)
    low = np.array(task.action_low)
    high = np.array(task.action_high)

    def act(observation):
        if task.discrete and rng.random() < noise:
            return task.to_environment(rng.integers(low, high + 1))[0]
        normals = None
        if stochastic:
            normals = torch.as_tensor(rng.standard_normal((1, len(low))))
        row = gym.spaces.flatten(space, observation)
        everywhere = np.stack([row[None]] * len(agent.runs))  # [R, 1, O]
        action = agent.act(everywhere, normals)[run, 0]
        if noise and not task.discrete:
            spread = noise * (high - low) / 2
            action = action + spread * rng.standard_normal(len(low))
            action = action.clip(low, high)
        return task.to_environment(action)[0]

    return act


def record(env: gym.Env, act: Callable, steps: int, seed: int) -> List[EpisodeBuffer]:
    """Episodes of so many steps in all; the last one is cut there."""
    episodes = []
    left = steps
    with tqdm(total=steps, unit=" steps", disable=None) as bar:
        while left > 0:
            start = cql.seed_from([START, seed, len(episodes)])
            episode = play_episode(env, act, start, left)
            episodes.append(episode)
            left -= len(episode)
            bar.update(len(episode))
    return episodes


def mean_return(env: gym.Env, act: Callable, seed: int) -> float:
    returns = []
    for number in range(MEASURED):
        episode = play_episode(env, act, cql.seed_from([MEASURE, seed, number]))
        returns.append(episode.rewards.sum())
    return float(np.mean(returns))


def find_reference(options, env: gym.Env, task: cql.Task, policy):
    """Returns scored 0 and 100, or None, and a line that says whose they are."""
    if options.reference:
        return options.reference, "scored by the --reference given"
    name = env.spec.id
    if task.env_id not in (None, name):
        task = dataclasses.replace(task, reference=None)  # another environment's
    reference, whose = cql.reference_returns(task, name)
    if reference is None and policy is None:
        whose += "; --reference LOW HIGH records some"
    if reference is not None or policy is None:
        return reference, whose
    print("measuring reference returns", flush=True)
    seed = options.seed
    low = mean_return(env, random_act(env, cql.seed_from([MEASURE, seed])), seed)
    high = mean_return(env, policy_act(policy, options.run, seed), seed)
    measured = f"random actions return {low:.1f}, the policy without noise {high:.1f}"
    if not low < high:
        return None, f"not scored, as no better than random: {measured}"
    return [low, high], f"scored by {MEASURED} episodes each: {measured}"


def describe(options) -> str:
    """What chose the actions, for metadata.json."""
    if options.policy == "random":
        return "uniform random actions"
    text = f"cql.py's policy of {options.policy}, run {options.run}"
    if options.stochastic:
        text += ", sampled"
    if options.noise:
        text += f", noise {options.noise:g}"
    return text


def record_dataset(options) -> None:
    """What the command line asks for. Raises cql.UserError."""
    policy = None
    if options.policy != "random":
        policy = cql.load_policy(options.policy, options.run)
    check_options(options, policy)
    env, task, name = make_env(options, policy)
    check_out(options.out, options.overwrite)

    seed = cql.seed_from([DRAW, options.seed])
    if policy is None:
        act = random_act(env, seed)
    else:
        act = policy_act(policy, options.run, seed, options.noise, options.stochastic)
    print(f"recording in {name}: {describe(options)}", flush=True)
    episodes = record(env, act, options.steps, options.seed)
    reference, whose = find_reference(options, env, task, policy)
    metadata = {
        "algorithm_name": describe(options),
        "description": f"{options.steps} steps in {name}, seed {options.seed}",
        "code_permalink": "scripts/record.py",
    }
    if reference is not None:
        metadata["ref_min_score"] = reference[0]
        metadata["ref_max_score"] = reference[1]
    where = f"could not write {options.out}"
    with cql.errors_as(cql.MachineError, where, (OSError, RuntimeError, ValueError)):
        write_dataset(options.out.absolute(), episodes, env, **metadata)
    env.close()
    print_summary(options, episodes, env, reference, whose)
    command = f"python cql.py --env {options.out}"
    if ":" in name:
        command += f" --eval_env {name}"
    print(f"train on it: {command}")


def print_summary(options, episodes: List[EpisodeBuffer], env, reference, whose) -> None:
    """Counts, and return and score of the episodes that --steps did not cut."""
    last = episodes[-1]
    cut = last.truncations[-1] and len(last) < env.spec.max_episode_steps
    whole = episodes[:-1] if cut else episodes
    text = f"{options.out}: {len(episodes)} episodes, {options.steps:,} steps"
    if whole:
        returns = [episode.rewards.sum() for episode in whole]
        mean = np.mean(returns)
        text += f", return {mean:.1f} +- {np.std(returns):.1f}"
        if reference is not None:
            text += f", score {cql.normalized_score(mean, reference):.1f}"
    print(text)
    print(whose)


def check_options(options, policy: Optional[Callable]) -> None:
    """Raise cql.UserError for numbers out of range and options that do not fit."""
    discrete = policy is not None and policy.task.discrete
    low, high = options.reference or (0.0, 1.0)
    mistakes = {
        f"--steps {options.steps}: must be at least 1": options.steps < 1,
        f"--seed {options.seed}: must be at least 0": options.seed < 0,
        f"--noise {options.noise}: must be finite, at least 0": (
            not 0 <= options.noise < math.inf
        ),
        f"--noise {options.noise}: a share of discrete actions, so at most 1": (
            discrete and options.noise > 1
        ),
        "--stochastic: a discrete policy is greedy; pass --noise": (
            discrete and options.stochastic
        ),
        "random: takes neither --noise nor --stochastic": policy is None
        and (options.noise > 0 or options.stochastic),
        f"--reference {low:g} {high:g}: LOW must be below HIGH, both finite": (
            not -math.inf < low < high < math.inf
        ),
    }
    for problem, wrong in mistakes.items():
        if wrong:
            raise cql.UserError(problem)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The options. Raises cql.UserError."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("policy", help="a run's directory, a checkpoint, or the word random")
    add("--out", required=True, type=Path, help="directory of the new dataset")
    add("--overwrite", action="store_true", help="replace a dataset that is there")
    add("--env", help="id or module:id; left out: where the policy was evaluated")
    add("--steps", type=int, default=10_000, help="the last episode is cut there")
    add("--seed", type=int, default=0, help="of starts and noise")
    add("--run", type=int, default=0, help="of a stacked run's policies")
    add(
        "--noise",
        type=float,
        default=0.0,
        help="standard deviation of Gaussian noise, in halves of the action range; for "
        "discrete actions the share of uniform ones",
    )
    add("--stochastic", action="store_true", help="sample from the policy")
    add(
        "--reference",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="returns scored 0 and 100; left out: those known of the environment, else "
        f"measured, {MEASURED} episodes each of random actions and of the policy",
    )
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status."""
    try:
        record_dataset(parse(argv))
    except cql.UserError as error:
        # cql.py's messages are about training.
        text = str(error).replace("--eval_env", "--env")
        text = text.replace("match the data's", "match the policy's")
        print(f"record.py: error: {text}", file=sys.stderr)
        return 2
    except cql.MachineError as error:
        print(f"record.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
