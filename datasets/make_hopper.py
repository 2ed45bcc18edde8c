"""Record datasets/hopper-medium-small-v0: half-trained SAC policies hopping.

    pip install stable-baselines3==2.9.2     # a development dependency, only for this
    python datasets/make_hopper.py           # some 25 minutes on one core

SAC (Stable-Baselines3's defaults, seed 0) trains on Hopper-v5 for 130,000 steps. Three
snapshots of it, actions sampled, are recorded in whole episodes: 10,000 steps with that
after 110,000, 10,000 with that after 125,000, 30,000 with that after 130,000. No episode
is selected or left out. The dataset in the repository was made so, trained with mujoco
4.0.0 and recorded with 3.11.0; gymnasium 1.4.0, torch 2.13.0, minari 0.5.4, Python 3.11.
"""

import argparse
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

HERE = Path(__file__).parent
STEPS = {110_000: 10_000, 125_000: 10_000, 130_000: 30_000}  # by training step
REFERENCE = (-20.272305, 3234.3)  # D4RL's random and expert returns on Hopper


class Snapshots(BaseCallback):
    """Measure the sampling policy every 5,000 steps, and keep it. (Measuring draws from
    the same generator as training, so it belongs to the recipe.)"""

    def __init__(self, directory: Path):
        super().__init__()
        self.directory = directory

    def _on_step(self) -> bool:
        if self.num_timesteps % 5000 == 0:
            env = gym.make("Hopper-v5")
            env.reset(seed=1)
            env, step = Monitor(env), self.num_timesteps
            mean, std = evaluate_policy(self.model, env, 10, deterministic=False)
            print(f"step {step}: return {mean:.0f} +- {std:.0f}", flush=True)
            self.model.save(self.directory / f"sac_0_{step}")
        return True


def record(policy, steps: int, first: int):
    """Whole episodes of the sampling policy on Hopper-v5, seeds first, first + 1, ..."""
    from minari.data_collector import EpisodeBuffer

    env, episodes, total = gym.make("Hopper-v5"), [], 0
    while total < steps:
        number = first + len(episodes)
        observation, _ = env.reset(seed=number)
        keys = "observations actions rewards terminations truncations".split()
        episode = {key: [] for key in keys}
        episode["observations"].append(observation)
        done = False
        while not done:
            action, _ = policy.predict(observation, deterministic=False)
            observation, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            step = (observation, action, reward, terminated, truncated)
            for key, value in zip(keys, step, strict=True):
                episode[key].append(value)
        arrays = {key: np.asarray(values) for key, values in episode.items()}
        for key in ("observations", "actions", "rewards"):
            arrays[key] = arrays[key].astype(np.float32)
        episodes.append(EpisodeBuffer(id=number, seed=number, **arrays))
        total += len(arrays["rewards"])
    return episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", help="a directory of snapshots: record only")
    parser.add_argument("--dataset", default="hopper-medium-small-v0")
    arguments = parser.parse_args()
    os.environ["MINARI_DATASETS_PATH"] = str(HERE)
    import minari  # reads the variable above

    torch.set_num_threads(1)
    directory = Path(arguments.policies or "hopper_snapshots")
    if not arguments.policies:
        policy = SAC("MlpPolicy", gym.make("Hopper-v5"), seed=0, device="cpu")
        policy.learn(max(STEPS), callback=Snapshots(directory))
    torch.manual_seed(0)
    episodes = []
    for step, steps in STEPS.items():
        policy = SAC.load(directory / f"sac_0_{step}", device="cpu")
        episodes += record(policy, steps, len(episodes))
    returns = [float(episode.rewards.sum()) for episode in episodes]
    score = 100 * (np.mean(returns) - REFERENCE[0]) / (REFERENCE[1] - REFERENCE[0])
    minari.create_dataset_from_buffers(
        arguments.dataset,
        episodes,
        env="Hopper-v5",
        observation_space=gym.spaces.Box(-np.inf, np.inf, (11,), np.float32),
        ref_min_score=REFERENCE[0],
        ref_max_score=REFERENCE[1],
        algorithm_name="SAC of Stable-Baselines3, three half-trained snapshots, sampled",
        description="Hopper-v5, 50,000 steps of half-trained policies, float32",
        author="The cql.py authors",
        author_email="none",
        code_permalink="datasets/make_hopper.py",
    )
    steps = sum(len(episode.rewards) for episode in episodes)
    text = f"return {np.mean(returns):.1f} +- {np.std(returns):.1f}, score {score:.1f}"
    print(f"{len(episodes)} episodes, {steps} steps, {text}")


if __name__ == "__main__":
    main()
