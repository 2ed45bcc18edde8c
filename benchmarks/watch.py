"""Film trained policies, side by side, as one GIF.

    python benchmarks/watch.py runs/quick other/run --out hopper.gif

Each run's first policy (`--run 1`: its second) acts as in evaluation, deterministic,
from the same seed; an episode that ends is followed by the next one. The caption says
the penalty weight and the return of the episode so far. Needs no display: where
rendering fails, set MUJOCO_GL=egl or MUJOCO_GL=osmesa (Debian: libegl1, libosmesa6).
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

SIZE = 200  # pixels, either way


def make_env(directory: str, policy) -> gym.Env:
    """The environment that the run was evaluated in, with pictures."""
    config, task = policy.agent.config, policy.task
    name = config.eval_env
    if name in (None, "none"):
        name = task.env_id
    if name is None:
        raise cql.UserError(f"{directory}: its data records no environment")
    env_id = name.rpartition(":")[2]
    if env_id != task.env_id:  # then the recorded settings are not its own
        task.env_id, task.env_kwargs, task.max_episode_steps = env_id, {}, None
    task.env_kwargs["render_mode"] = "rgb_array"
    spec = gym.registry.get(env_id)
    if spec and "mujoco" in str(spec.entry_point):
        picture = {"width": SIZE, "height": SIZE, "camera_name": "track"}
        task.env_kwargs |= picture
    return cql.make_env(dataclasses.replace(config, eval_env=name), task)


def film(directory: str, options):
    """Iterate over a policy's frames, for ever."""
    policy = cql.load_policy(directory, options.run)
    weight = policy.agent.runs[options.run]["cql_alpha"]
    env = make_env(directory, policy)
    seed = options.seed
    while True:
        observation, total, ended, t = env.reset(seed=seed)[0], 0.0, False, 0
        seed += 1
        while not ended:
            if t % options.every == 0:
                image = Image.fromarray(env.render())
                ImageDraw.Draw(image).text((6, 4), f"cql_alpha {weight:g}: {total:.0f}")
                yield image
            observation, reward, terminated, cut, _ = env.step(policy(observation))
            total, ended, t = total + float(reward), terminated or cut, t + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", help="run directories or checkpoints")
    parser.add_argument("--out", default="policies.gif")
    parser.add_argument("--run", type=int, default=0, help="of the stacked runs")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="steps a frame")
    options = parser.parse_args()
    films = [film(directory, options) for directory in options.directories]
    strips = []
    try:
        for _ in range(options.frames):
            strip = np.concatenate([np.asarray(next(each)) for each in films], 1)
            strips.append(Image.fromarray(strip).quantize(32))
    except cql.UserError as error:
        parser.error(str(error))
    first, *rest = strips
    first.save(options.out, save_all=True, append_images=rest, duration=40, loop=0)


if __name__ == "__main__":
    main()
