"""Render trained policies side by side as one GIF.

    python scripts/watch.py runs/quick other/run --out hopper.gif

The first policy of each run (`--run 1`: the second one) acts deterministically,
as in evaluation. All policies start from the same seed, and a new episode
starts when one ends. The caption shows the penalty weight and the return of the
episode so far. No display is needed. If rendering MuJoCo fails, set
MUJOCO_GL=egl or MUJOCO_GL=osmesa (Debian packages: libegl1, libosmesa6).
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
    if spec and "gymnasium.envs.mujoco" in str(spec.entry_point):
        task.env_kwargs |= {"width": SIZE, "height": SIZE, "camera_name": "track"}
    return cql.make_env(dataclasses.replace(config, eval_env=name), task)


def uses_mujoco(env: gym.Env) -> bool:
    """Return whether MuJoCo renders the environment.

    Its class then is, or is derived from, one of Gymnasium's or Gymnasium-Robotics'."""
    modules = [kind.__module__ for kind in type(env.unwrapped).__mro__]
    return any("mujoco" in name or "gymnasium_robotics" in name for name in modules)


def render(env: gym.Env, directory: str) -> Image.Image:
    """Return the environment's present frame. Raise UserError if it has none."""
    where = f"{directory}: the environment cannot be rendered"
    if uses_mujoco(env):
        where += " (set MUJOCO_GL=egl or MUJOCO_GL=osmesa)"
    with cql.errors_as(cql.UserError, where):
        frame = env.render()
        if frame is None:
            raise ValueError("render() returned None; expected an array")
        return Image.fromarray(frame).convert("RGB")


def render_episodes(directory: str, options) -> Iterator[Image.Image]:
    """Yield a run's rendered frames, episode after episode, without end.

    Raise UserError if the policy or its environment cannot be loaded or rendered."""
    policy = cql.load_policy(directory, options.run)
    weight = policy.agent.runs[options.run]["cql_alpha"]
    env = make_env(directory, policy)
    player = cql.Player(env)
    seed = options.seed
    while True:
        player.reset(seed % 2**31)  # environments may keep a seed in 32 bits
        seed += 1
        t = 0
        while not player.over:
            if t % options.every == 0:
                image = render(env, directory)
                image = image.resize((image.width * SIZE // image.height, SIZE))
                caption = f"cql_alpha {weight:g}: {sum(player.rewards):.0f}"
                ImageDraw.Draw(image).text((6, 4), caption)
                yield image
            player.step(policy(player.observation))
            t += 1


def check_options(options) -> None:
    """Raise UserError for numbers out of range and a file that cannot be written."""
    for name, least in {"frames": 1, "every": 1, "seed": 0}.items():
        value = getattr(options, name)
        if value < least:
            raise cql.UserError(f"--{name} {value}: must be at least {least}")
    out = options.out
    with cql.errors_as(cql.UserError, f"--out {out}", OSError):
        if out.is_dir() or out.suffix.lower() != ".gif":
            raise cql.UserError(f"--out {out}: not a file name that ends in .gif")
        if not out.absolute().parent.is_dir():
            raise cql.UserError(f"--out {out}: no such directory; create it first")


def write_gif(options) -> None:
    """Render all runs and write them as one GIF to options.out.

    Raise UserError for bad input and cql.MachineError if an environment or the disk
    fails."""
    check_options(options)
    runs = [render_episodes(directory, options) for directory in options.directories]
    frames = []
    for _ in range(options.frames):
        images = []
        for directory, run in zip(options.directories, runs):
            where = f"{directory}: the environment failed"
            with cql.errors_as(cql.MachineError, where):
                images.append(np.asarray(next(run)))
        frame = np.concatenate(images, axis=1)
        frames.append(Image.fromarray(frame).quantize(32))
    with cql.errors_as(cql.MachineError, f"cannot write {options.out}"):
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
    add("--out", type=Path, default=Path("policies.gif"), help="GIF file to write")
    add("--run", type=int, default=0, help="index of the policy in a stacked run")
    add("--seed", type=int, default=0, help="seed of the first episode")
    add("--frames", type=int, default=100, help="number of frames")
    add("--every", type=int, default=5, help="environment steps between two frames")
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line and return its exit status.

    The status is 0 when done, 1 if an environment or the disk failed, 2 for invalid
    input, 130 if interrupted."""
    try:
        write_gif(parse(argv))
    except cql.UserError as error:
        # cql.py's messages name a flag that this script does not have.
        text = str(error).replace("--eval_env", "environment")
        print(f"watch.py: error: {text}", file=sys.stderr)
        return 2
    except cql.MachineError as error:
        print(f"watch.py: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every name
    sys.exit(main())
