"""Record datasets/hopper-medium-small-v0: a half-trained SAC policy hopping, 50,000 steps.

    pip install stable-baselines3==2.9.2     # a development dependency, only for this
    python datasets/make_hopper.py           # some 20 minutes on one core

SAC (Stable-Baselines3's defaults, seed 0) trains on Hopper-v5. Every 5,000 steps it is
measured over 10 episodes, its actions sampled; training stops when their mean return
first reaches 1,400 (a D4RL score of 44). That policy, its actions still sampled, is
recorded in whole episodes until 50,000 steps are in. Nothing is selected or left out.
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

TARGET_RETURN, STEPS, HERE = 1400, 50_000, Path(__file__).parent
REFERENCE = (-20.272305, 3234.3)  # D4RL's random and expert returns on Hopper


class StopAtMedium(BaseCallback):
    """Measure the sampling policy every 5,000 steps; stop at TARGET_RETURN."""

    def _on_step(self) -> bool:
        if self.num_timesteps % 5000:
            return True
        env = Monitor(gym.make("Hopper-v5"))
        env.reset(seed=1)
        mean, std = evaluate_policy(self.model, env, n_eval_episodes=10, deterministic=False)
        print(f"step {self.num_timesteps}: return {mean:.0f} +- {std:.0f}", flush=True)
        return mean < TARGET_RETURN


def record(policy, steps: int):
    """Whole episodes of the sampling policy on Hopper-v5, seeds 0, 1, 2, ..."""
    from minari.data_collector import EpisodeBuffer

    env, episodes, total = gym.make("Hopper-v5"), [], 0
    while total < steps:
        observation, _ = env.reset(seed=len(episodes))
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
        episodes.append(EpisodeBuffer(id=len(episodes), seed=len(episodes), **arrays))
        total += len(arrays["rewards"])
    return episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", help="a policy this script saved: record only")
    parser.add_argument("--dataset", default="hopper-medium-small-v0")
    arguments = parser.parse_args()
    os.environ["MINARI_DATASETS_PATH"] = str(HERE)
    import minari  # reads the variable above

    torch.set_num_threads(1)
    if arguments.policy:
        policy = SAC.load(arguments.policy, device="cpu")
    else:
        policy = SAC("MlpPolicy", gym.make("Hopper-v5"), seed=0, device="cpu")
        policy.learn(300_000, callback=StopAtMedium())
        policy.save("hopper_medium_sac")
    torch.manual_seed(0)
    episodes = record(policy, STEPS)
    returns = [float(episode.rewards.sum()) for episode in episodes]
    score = 100 * (np.mean(returns) - REFERENCE[0]) / (REFERENCE[1] - REFERENCE[0])
    minari.create_dataset_from_buffers(
        arguments.dataset,
        episodes,
        env="Hopper-v5",
        observation_space=gym.spaces.Box(-np.inf, np.inf, (11,), np.float32),
        ref_min_score=REFERENCE[0],
        ref_max_score=REFERENCE[1],
        algorithm_name="SAC, Stable-Baselines3 defaults, stopped at medium, sampled",
        description="Hopper-v5, some 50,000 steps of one half-trained policy, float32",
        author="The cql.py authors",
        author_email="none",
        code_permalink="datasets/make_hopper.py",
    )
    print(
        f"{len(episodes)} episodes, {sum(len(e.rewards) for e in episodes)} steps, return "
        f"{np.mean(returns):.1f} +- {np.std(returns):.1f}, score {score:.1f}"
    )


if __name__ == "__main__":
    main()
