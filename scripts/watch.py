"""Film trained policies, side by side, as one GIF.

    python scripts/watch.py runs/quick other/run --out hopper.gif

Each run's first policy (`--run 1`: its second) acts as in evaluation,
deterministic, from the same seed; an episode that ends is followed by the next
one. The caption says the penalty weight and the return of the episode so far.
Needs no display: where rendering fails, set MUJOCO_GL=egl or MUJOCO_GL=osmesa
(Debian: libegl1, libosmesa6).
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

SIZE = 200  # pixels, the height of a picture


def make_env(directory: str, policy: Callable) -> gym.Env:
    """The environment that the run was evaluated in, with pictures. Raises UserError."""
    config = policy.agent.config
    task = policy.task
    name = config.eval_env
    if name in (None, "none"):
        name = task.env_id
    if name is None:
        raise cql.UserError(f"{directory}: of no known environment")
    env_id = name.rpartition(":")[2]
    if env_id != task.env_id:  # then the recorded settings are not its own
        task.env_id = env_id
        task.env_kwargs = {}
        task.max_episode_steps = None
    task.env_kwargs["render_mode"] = "rgb_array"
    spec = gym.registry.get(env_id)
    if spec and "mujoco" in str(spec.entry_point):
        task.env_kwargs |= {"width": SIZE, "height": SIZE, "camera_name": "track"}
    return cql.make_env(dataclasses.replace(config, eval_env=name), task)


def film(directory: str, options) -> Iterator[Image.Image]:
    """A policy's frames, for ever. Raises UserError."""
    policy = cql.load_policy(directory, options.run)
    weight = policy.agent.runs[options.run]["cql_alpha"]
    env = make_env(directory, policy)
    seed = options.seed
    while True:
        observation, _ = env.reset(seed=seed)
        seed += 1
        total = 0.0
        t = 0
        over = False
        while not over:
            if t % options.every == 0:
                where = f"{directory}: cannot be rendered (MuJoCo: set MUJOCO_GL=egl)"
                with cql.errors_as(cql.UserError, where):
                    image = Image.fromarray(env.render())
                image = image.resize((image.width * SIZE // image.height, SIZE))
                caption = f"cql_alpha {weight:g}: {total:.0f}"
                ImageDraw.Draw(image).text((6, 4), caption)
                yield image
            action = policy(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            t += 1
            over = terminated or truncated


def watch(options) -> None:
    """What the command line asks for. Raises UserError."""
    for name in ("frames", "every"):
        if getattr(options, name) < 1:
            raise cql.UserError(f"--{name}: must be at least 1")
    films = [film(directory, options) for directory in options.directories]
    strips = []
    for _ in range(options.frames):
        images = [np.asarray(next(each)) for each in films]
        strip = np.concatenate(images, axis=1)
        strips.append(Image.fromarray(strip).quantize(32))
    with cql.errors_as(cql.UserError, f"--out {options.out}"):
        strips[0].save(
            options.out, save_all=True, append_images=strips[1:], duration=40, loop=0
        )
    print(f"wrote {options.out}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str):
        raise cql.UserError(message)


def parse(argv: Optional[List[str]]) -> argparse.Namespace:
    """The options. Raises UserError."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("directories", nargs="+", metavar="DIR", help="run directories or checkpoints")
    add("--out", default="policies.gif", help="the film")
    add("--run", type=int, default=0, help="of a stacked run's policies")
    add("--seed", type=int, default=0, help="of the first episode")
    add("--frames", type=int, default=100, help="how many")
    add("--every", type=int, default=5, help="steps a frame")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """The command line; returns the exit status."""
    try:
        watch(parse(argv))
    except cql.UserError as error:
        text = str(error).replace("--eval_env", "environment")  # which cql.py names
        print(f"watch.py: error: {text}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
