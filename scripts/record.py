"""Record a policy's episodes as a Minari dataset that cql.py can train on.

    python scripts/record.py runs/sac --env Pendulum-v1 --steps 20000 \\
        --noise 0.3 --out datasets/medium-v0
    python scripts/record.py random --env Pendulum-v1 --steps 20000 \\
        --out datasets/random-v0
    python cql.py --env '[datasets/medium-v0, datasets/random-v0]'

The policy is a run's directory, a checkpoint, or the word `random` for uniform
actions. The dataset holds observations, actions, rewards, terminations and
truncations, but no infos. It also holds the reference returns that normalize a
score, where they are known or can be measured. The same command records the
same episodes. From Python, call `play_episode` and `write_dataset` with your
own `act`.
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
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector.utils import concatenate, create_empty_array
from gymnasium.wrappers import TransformObservation
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

# Streams of random numbers. cql.py's own streams have numbers below 10.
START, DRAW, MEASURE = range(10, 13)
REFERENCE_EPISODES = 20  # episodes that measure one reference return


def stack(space: gym.Space, values: list):
    """Stack values of a space into one array, or a dictionary or tuple of arrays."""
    return concatenate(space, values, create_empty_array(space, len(values)))


def play_episode(
    env: gym.Env,
    act: Callable,
    seed: int,
    max_steps: float = math.inf,
    observation_space: Optional[gym.Space] = None,
) -> EpisodeBuffer:
    """Play one episode of T steps with act(observation) -> action.

    The result holds T + 1 observations and T actions, rewards, terminations and
    truncations. An episode that reaches max_steps without a termination is truncated.
    observation_space sets the space, and thus the dtype, of the stored observations;
    the default is the environment's own."""
    player = cql.Player(env)
    player.reset(seed)
    # Some environments reuse the array that they return, so each one is copied.
    observations = [copy.deepcopy(player.observation)]
    actions = []
    while not player.over and len(actions) < max_steps:
        action = act(player.observation)
        player.step(action)
        observations.append(copy.deepcopy(player.observation))
        actions.append(action)
    terminated = bool(player.terminated)
    last = np.arange(len(actions)) == len(actions) - 1
    return EpisodeBuffer(
        seed=seed,
        observations=stack(observation_space or env.observation_space, observations),
        actions=stack(env.action_space, actions),
        rewards=np.array(player.rewards),
        terminations=last & terminated,
        truncations=last & (not terminated),
        infos={},
    )


def check_space(directory: Path, episodes: List[EpisodeBuffer]) -> None:
    """Raise OSError if the disk may be too small for the episodes.

    The check comes before writing because HDF5 does not fail cleanly on a full disk."""
    n_bytes = sum(len(pickle.dumps(episode)) for episode in episodes)
    needed = 2 * n_bytes + 20_000 * len(episodes)
    free = shutil.disk_usage(directory).free
    if free < needed:
        sizes = f"{free / 1e6:,.2f} MB free, up to {needed / 1e6:,.2f} MB needed"
        raise OSError(f"{directory}: {sizes}; free some disk space")


def importable_name(creator: Callable, env_id: str) -> str:
    """Return the class or function that makes an environment as module:name.

    Raise UserError unless other programs can import it under this name."""
    module = getattr(creator, "__module__", None)
    name = getattr(creator, "__name__", "")
    found = getattr(sys.modules.get(module), name, None)
    if found is not creator or module == "__main__":
        problem = f"entry_point {creator} cannot be imported by its name"
        hint = "pass entry_point='module:name' to gymnasium.register"
        raise cql.UserError(f"{env_id}: {problem}, so it cannot be recorded; {hint}")
    return f"{module}:{name}"


def recorded_spec(env: gym.Env) -> Optional[EnvSpec]:
    """Return the environment's spec as the dataset records it.

    Classes and functions are replaced by their names. The result is None for an
    environment that gymnasium.make did not make. Raise UserError if the spec cannot be
    written as JSON."""
    spec = env.spec
    if spec is None:
        return None
    names = {}
    for field in ("entry_point", "vector_entry_point"):
        creator = getattr(spec, field)
        if callable(creator):
            names[field] = importable_name(creator, spec.id)
    spec = dataclasses.replace(spec, **names)
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        problem = f"settings or wrappers that are not JSON ({cql.brief(error)})"
        hint = "expected numbers, text, lists and dictionaries; register it with these"
        raise cql.UserError(f"{spec.id}: {problem}; {hint}") from None
    return spec


def write_dataset(
    out: Path,
    episodes: List[EpisodeBuffer],
    env: gym.Env,
    observation_space: Optional[gym.Space] = None,
    **metadata,
) -> None:
    """Write the episodes as the Minari dataset out/data, replacing an existing one.

    metadata holds entries under Minari's names, for example description. Raises
    OSError, RuntimeError or ValueError if the disk fails, and UserError if the
    environment cannot be recorded; nothing is then written."""
    spec = recorded_spec(env)
    check_space(out.parent, episodes)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        new = Path(beside) / "data"
        storage = MinariStorage.new(
            new,
            observation_space=observation_space or env.observation_space,
            action_space=env.action_space,
            env_spec=spec,
        )
        names = {"dataset_id": out.name, "minari_version": minari.__version__}
        storage.update_metadata({**names, **metadata})
        storage.update_episodes(episodes)
        out.mkdir(exist_ok=True)
        if (out / "data").exists():
            shutil.rmtree(out / "data")
        os.rename(new, out / "data")


def check_out(out: Path, overwrite: bool) -> None:
    """Make the parent directory of the dataset.

    Raise UserError if the dataset cannot be written to out."""
    where = f"--out {out}"
    hint = "choose another directory"
    with cql.errors_as(cql.UserError, f"{where}: cannot be written; {hint}", OSError):
        if out.exists() and not overwrite:
            raise cql.UserError(f"{where}: already exists; {hint} or pass --overwrite")
        if out.exists() and not (out / "data" / "metadata.json").exists():
            problem = "exists but is not a dataset, so it is not overwritten"
            raise cql.UserError(f"{where}: {problem}; {hint}")
        out.parent.mkdir(parents=True, exist_ok=True)
        # os.access does not detect every directory that cannot be written.
        tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent).cleanup()


def make_env(options, policy: Optional[Callable]) -> Tuple[gym.Env, cql.Task, str]:
    """Return the environment, its task, and its name as given.

    Observations are not flattened. Raise UserError if no environment is known or if
    it cannot be made."""
    name = options.env
    if policy is not None and name is None:
        name = policy.agent.config.eval_env
        if name in (None, "none"):
            name = policy.task.env_id
    if name is None:
        raise cql.UserError(f"{options.policy}: records no environment; pass --env")
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
    # The dataset keeps the original observations, so the wrapper that flattens them,
    # which is the outermost one, is removed.
    if isinstance(env, TransformObservation):
        env = env.env
    return env, task, name


def random_act(env: gym.Env, seed: int) -> Callable:
    """Return a function that samples uniform actions."""
    env.action_space.seed(seed)
    return lambda observation: env.action_space.sample()


def policy_act(policy: Callable, run: int, seed: int, noise=0.0, stochastic=False):
    """Return a function observation -> action of a stacked run's policy.

    Continuous actions get Gaussian noise with a standard deviation of noise times half
    the action range, and are clipped to the bounds. Discrete actions are uniform with
    probability noise. stochastic samples continuous actions from the policy. All
    random numbers depend on the seed."""
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
        rows = np.stack([row[None]] * len(agent.runs))  # [R, 1, O]
        action = agent.act(rows, normals)[run, 0]
        if noise and not task.discrete:
            spread = noise * (high - low) / 2
            action = action + spread * rng.standard_normal(len(low))
            action = action.clip(low, high)
        return task.to_environment(action)[0]

    return act


def record(env: gym.Env, act: Callable, steps: int, seed: int) -> List[EpisodeBuffer]:
    """Record episodes with a total number of steps; the last episode is truncated.

    Raise cql.MachineError if the environment fails."""
    episodes = []
    left = steps
    with tqdm(total=steps, unit=" steps", disable=None) as bar:
        while left > 0:
            start = cql.environment_seed([START, seed, len(episodes)])
            where = (
                f"{env.spec.id} failed in episode {len(episodes)}; nothing is written"
            )
            with cql.errors_as(cql.MachineError, where):
                episode = play_episode(env, act, start, left)
            episodes.append(episode)
            left -= len(episode)
            bar.update(len(episode))
    return episodes


def mean_return(env: gym.Env, act: Callable, seed: int) -> float:
    """Return the mean undiscounted return over REFERENCE_EPISODES episodes."""
    returns = []
    for number in range(REFERENCE_EPISODES):
        start = cql.environment_seed([MEASURE, seed, number])
        episode = play_episode(env, act, start)
        returns.append(episode.rewards.sum())
    return float(np.mean(returns))


def find_reference(options, env: gym.Env, task: cql.Task, policy):
    """Find the returns with the normalized scores 0 and 100.

    Returns them as [low, high], or None if there are none, and a line that says where
    they come from. Measures them if they are unknown and there is a policy. Raise
    cql.MachineError if the environment then fails."""
    if options.reference:
        return options.reference, "scored by the returns of --reference"
    name = env.spec.id
    if task.env_id not in (None, name):
        # The recorded reference returns belong to another environment.
        task = dataclasses.replace(task, reference=None)
    limit = env.spec.max_episode_steps
    reference, source = cql.reference_returns(task, name, limit)
    if reference is None and policy is None:
        source += "; pass --reference LOW HIGH to record some"
    if reference is not None or policy is None:
        return reference, source
    print("measuring reference returns", flush=True)
    seed = options.seed
    random = random_act(env, cql.seed_from([MEASURE, seed]))
    greedy = policy_act(policy, options.run, seed)
    where = f"{name} failed while reference returns were measured"
    hint = "pass --reference LOW HIGH instead"
    with cql.errors_as(cql.MachineError, f"{where}; {hint}"):
        low = mean_return(env, random, seed)
        high = mean_return(env, greedy, seed)
    measured = f"random actions return {low:.1f}, the policy without noise {high:.1f}"
    if not low < high:
        return None, f"not scored: the policy is no better than random: {measured}"
    source = f"scored by returns measured in {REFERENCE_EPISODES} episodes each"
    return [low, high], f"{source}: {measured}"


def describe(options) -> str:
    """Describe the policy that chose the actions, for metadata.json."""
    if options.policy == "random":
        return "uniform random actions"
    text = f"policy of {options.policy} (cql.py), run {options.run}"
    if options.stochastic:
        text += ", sampled actions"
    if options.noise:
        text += f", noise {options.noise:g}"
    return text


def record_dataset(options) -> None:
    """Record, write and summarize the dataset that the options describe.

    Raise UserError for invalid options and cql.MachineError if the environment or the
    disk fails."""
    policy = None
    if options.policy != "random":
        policy = cql.load_policy(options.policy, options.run)
    check_options(options, policy)
    env, task, name = make_env(options, policy)
    recorded_spec(env)  # raises UserError if it cannot be written later
    cql.try_environment(env, task, name)
    check_out(options.out, options.overwrite)
    reference, source = find_reference(options, env, task, policy)

    seed = cql.seed_from([DRAW, options.seed])
    if policy is None:
        act = random_act(env, seed)
    else:
        act = policy_act(policy, options.run, seed, options.noise, options.stochastic)
    print(f"recording in {name}: {describe(options)}", flush=True)
    episodes = record(env, act, options.steps, options.seed)
    metadata = {
        "algorithm_name": describe(options),
        "description": f"{options.steps} steps in {name}, seed {options.seed}",
        "code_permalink": "scripts/record.py",
    }
    if reference is not None:
        metadata["ref_min_score"] = reference[0]
        metadata["ref_max_score"] = reference[1]
    where = f"cannot write {options.out}"
    with cql.errors_as(cql.MachineError, where, (OSError, RuntimeError, ValueError)):
        write_dataset(options.out.absolute(), episodes, env, **metadata)
    env.close()
    print_summary(options, episodes, env, reference, source)
    command = "python cql.py"
    if not task.discrete:
        command += " --config_path configs/fast.yaml"
    command += f" --env {options.out}"
    if ":" in name:
        command += f" --eval_env {name}"
    print(f"train on it: {command}")


def print_summary(
    options, episodes: List[EpisodeBuffer], env, reference, source: str
) -> None:
    """Print the numbers of episodes and steps, and the mean return and score.

    Returns and scores are those of complete episodes: an episode that --steps
    truncated does not count."""
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
    print(source)


def check_options(options, policy: Optional[Callable]) -> None:
    """Raise cql.UserError for numbers out of range and options that do not apply."""
    discrete = policy is not None and policy.task.discrete
    low, high = options.reference or (0.0, 1.0)
    mistakes = {
        f"--steps {options.steps}: must be at least 1": options.steps < 1,
        f"--seed {options.seed}: must be at least 0": options.seed < 0,
        f"--noise {options.noise}: must be finite and at least 0": (
            not 0 <= options.noise < math.inf
        ),
        f"--noise {options.noise}: a probability for discrete actions, at most 1": (
            discrete and options.noise > 1
        ),
        "--stochastic: a discrete policy is always greedy; pass --noise instead": (
            discrete and options.stochastic
        ),
        "random: --noise and --stochastic need a trained policy; leave them out": (
            policy is None and (options.noise > 0 or options.stochastic)
        ),
        f"--reference {low:g} {high:g}: LOW and HIGH must be finite, LOW below HIGH": (
            not -math.inf < low < high < math.inf
        ),
    }
    for problem, wrong in mistakes.items():
        if wrong:
            raise cql.UserError(problem)


class Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError with one line, without the usage text."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """Return the parsed options. Raise UserError for invalid ones."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("policy", help="a run's directory, a checkpoint, or the word random")
    add("--out", required=True, type=Path, help="directory of the new dataset")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    text = "id or module:id; default: the environment that evaluated the policy"
    add("--env", help=text)
    text = "total number of steps; the last episode is truncated"
    add("--steps", type=int, default=10_000, help=text)
    add("--seed", type=int, default=0, help="seed of the initial states and the noise")
    add("--run", type=int, default=0, help="index of the policy in a stacked run")
    add(
        "--noise",
        type=float,
        default=0.0,
        help="standard deviation of Gaussian noise, in units of half the action range; "
        "for discrete actions: the probability of a uniform action",
    )
    text = "sample continuous actions from the policy"
    add("--stochastic", action="store_true", help=text)
    add(
        "--reference",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="returns with the scores 0 and 100; default: the known ones of the "
        f"environment, otherwise the mean returns of {REFERENCE_EPISODES} episodes of "
        f"random actions and {REFERENCE_EPISODES} of the policy without noise",
    )
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when done, 1 if the environment or the disk failed, 2 for invalid
    input, 130 if interrupted."""
    try:
        record_dataset(parse(argv))
    except cql.UserError as error:
        # cql.py's messages name its own flags and the dataset of a training run.
        text = str(error)
        text = text.replace("--eval_env", "--env")
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
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
