"""Record datasets/hopper-medium-small-v0: a half-trained SAC policy hops, noisily.

    pip install stable-baselines3==2.9.2     # a development dependency, only for this
    python datasets/make_hopper.py           # some 45 minutes on one core

SAC (Stable-Baselines3's defaults, seed 0) trains on Hopper-v5 for 130,000 steps. What
it has become is recorded in whole episodes, 50,000 steps: actions are sampled, with
twice the policy's own standard deviation before the tanh, so that the data show what
becomes of actions on either side of its mean. No episode is selected or left out. The
dataset in the repository was made so with mujoco 3.11.0, gymnasium 1.4.0, torch 2.13.0,
minari 0.5.4, Python 3.11.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import record

HERE = Path(__file__).resolve().parent
TRAINING_STEPS, STEPS, NOISE = 130_000, 50_000, 2.0
REFERENCE = (-20.272305, 3234.3)  # D4RL's random and expert returns on Hopper
OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (11,), np.float32)


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


@torch.no_grad()
def sampled(policy: SAC, observation: np.ndarray) -> np.ndarray:
    """The policy's action with NOISE times its standard deviation."""
    observations = torch.as_tensor(observation, dtype=torch.float32).unsqueeze(0)
    mean, log_std, _ = policy.actor.get_action_dist_params(observations)
    pre_tanh = mean + NOISE * log_std.exp() * torch.randn_like(mean)
    return pre_tanh.tanh().squeeze(0).numpy()


def record_episodes(env: gym.Env, policy: SAC) -> list:
    """Whole episodes, of seeds 0, 1, ..., STEPS or a few more in all."""
    episodes = []
    total = 0
    while total < STEPS:
        episode = record.play_episode(
            env,
            lambda observation: sampled(policy, observation),
            seed=len(episodes),
            observation_space=OBSERVATIONS,
        )
        rewards = episode.rewards.astype(np.float32)
        episodes.append(dataclasses.replace(episode, rewards=rewards))
        total += len(episode)
    return episodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", help="a directory of snapshots: record only")
    parser.add_argument("--dataset", default="hopper-medium-small-v0")
    arguments = parser.parse_args()
    out = HERE / arguments.dataset
    if out.exists():
        sys.exit(f"{out}: is there already; move it away first")
    torch.set_num_threads(1)
    directory = Path(arguments.policies or "hopper_snapshots")
    if not arguments.policies:
        policy = SAC("MlpPolicy", gym.make("Hopper-v5"), seed=0, device="cpu")
        policy.learn(TRAINING_STEPS, callback=Snapshots(directory))
    torch.manual_seed(0)
    policy = SAC.load(directory / f"sac_0_{TRAINING_STEPS}", device="cpu")
    env = gym.make("Hopper-v5")
    episodes = record_episodes(env, policy)
    returns = [float(episode.rewards.sum()) for episode in episodes]
    score = 100 * (np.mean(returns) - REFERENCE[0]) / (REFERENCE[1] - REFERENCE[0])
    record.write_dataset(
        out,
        episodes,
        env,
        observation_space=OBSERVATIONS,
        ref_min_score=REFERENCE[0],
        ref_max_score=REFERENCE[1],
        algorithm_name="SAC of Stable-Baselines3, half-trained; its noise doubled",
        description="Hopper-v5, 50,000 steps of a half-trained policy, float32",
        author={"The cql.py authors"},
        author_email={"none"},
        code_permalink="datasets/make_hopper.py",
    )
    steps = sum(len(episode) for episode in episodes)
    text = f"return {np.mean(returns):.1f} +- {np.std(returns):.1f}, score {score:.1f}"
    print(f"{len(episodes)} episodes, {steps} steps, {text}")


if __name__ == "__main__":
    main()
