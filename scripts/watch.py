"""Render trained policies side by side as one GIF.

    python scripts/watch.py runs/quick other/run --out hopper.gif

The first policy of each run (`--run 1`: the second one) acts deterministically,
as in evaluation. All policies start from the same seed, and a new episode
starts when one ends. The caption shows the penalty weight and the return of the
episode so far. No display is needed. If rendering fails, set MUJOCO_GL=egl or
MUJOCO_GL=osmesa (Debian packages: libegl1, libosmesa6).
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Callable, Iterator, List, Optional

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

SIZE = 200  # height of a frame in pixels; MuJoCo frames are square


def make_env(directory: str, policy: Callable) -> gym.Env:
    """Return the environment that the run was evaluated in, with rendering enabled.

    Raise UserError if the run has none or if it cannot be made."""
    config = policy.agent.config
    task = policy.task
    name = config.eval_env
    if name in (None, "none"):
        name = task.env_id
    if name is None:
        problem = "the run was trained without an environment"
        raise cql.UserError(f"{directory}: {problem}; pass a run evaluated in one")
    env_id = name.rpartition(":")[2]
    if env_id != task.env_id:  # the recorded settings belong to another environment
        task.env_id = env_id
        task.env_kwargs = {}
        task.max_episode_steps = None
    task.env_kwargs["render_mode"] = "rgb_array"
    spec = gym.registry.get(env_id)
    if spec and "mujoco" in str(spec.entry_point):
        task.env_kwargs |= {"width": SIZE, "height": SIZE, "camera_name": "track"}
    return cql.make_env(dataclasses.replace(config, eval_env=name), task)


def render_episodes(directory: str, options) -> Iterator[Image.Image]:
    """Yield a run's rendered frames, episode after episode, without end.

    Raise UserError if the policy or its environment cannot be loaded or rendered."""
    policy = cql.load_policy(directory, options.run)
    weight = policy.agent.runs[options.run]["cql_alpha"]
    env = make_env(directory, policy)
    seed = options.seed
    while True:
        observation, _ = env.reset(seed=seed)
        seed += 1
        total = 0.0
        t = 0
        done = False
        while not done:
            if t % options.every == 0:
                problem = "the environment cannot be rendered"
                hint = "MuJoCo: set MUJOCO_GL=egl"
                with cql.errors_as(cql.UserError, f"{directory}: {problem} ({hint})"):
                    image = Image.fromarray(env.render())
                image = image.resize((image.width * SIZE // image.height, SIZE))
                caption = f"cql_alpha {weight:g}: {total:.0f}"
                ImageDraw.Draw(image).text((6, 4), caption)
                yield image
            action = policy(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            t += 1
            done = terminated or truncated


def write_gif(options) -> None:
    """Render all runs and write them as one GIF to options.out. Raise UserError."""
    for name in ("frames", "every"):
        value = getattr(options, name)
        if value < 1:
            raise cql.UserError(f"--{name} {value}: must be at least 1")
    runs = [render_episodes(directory, options) for directory in options.directories]
    frames = []
    for _ in range(options.frames):
        images = [np.asarray(next(run)) for run in runs]
        frame = np.concatenate(images, axis=1)
        frames.append(Image.fromarray(frame).quantize(32))
    with cql.errors_as(cql.UserError, f"--out {options.out}"):
        frames[0].save(
            options.out, save_all=True, append_images=frames[1:], duration=40, loop=0
        )
    print(f"wrote {options.out}")


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
    add("directories", nargs="+", metavar="DIR", help="run directories or checkpoints")
    add("--out", default="policies.gif", help="GIF file to write")
    add("--run", type=int, default=0, help="index of the policy in a stacked run")
    add("--seed", type=int, default=0, help="seed of the first episode")
    add("--frames", type=int, default=100, help="number of frames")
    add("--every", type=int, default=5, help="environment steps between two frames")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status: 0 done, 2 invalid input."""
    try:
        write_gif(parse(argv))
    except cql.UserError as error:
        # cql.py's messages name a flag that this script does not have.
        text = str(error).replace("--eval_env", "environment")
        print(f"watch.py: error: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
