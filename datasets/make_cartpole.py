"""Record datasets/cartpole-mixed-v0 and datasets/cartpole-narrow-v0.

    pip install stable-baselines3==2.9.2     # a development dependency, only for this
    python datasets/make_cartpole.py         # a minute on one core

DQN (Stable-Baselines3, rl-zoo's settings for CartPole, seed 0) trains on CartPole-v1 for
50,000 steps. `mixed`: 2,000 steps of uniform actions, 3,000 of the policy after 20,000
steps (which balances for some 100) with 30 % uniform actions, 10,000 of the policy after
15,000 (500) with 20 %. `narrow`: 10,000 steps of the policy after 25,000 (some 130) with
5 %. Whole episodes, none selected or left out, float32. Made with gymnasium 1.4.0, torch
2.13.0, minari 0.5.4, Python 3.11.
"""

import dataclasses
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import CheckpointCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import record

HERE = Path(__file__).resolve().parent
REFERENCE = (22.0, 500.0)  # mean return of uniform actions, and the most possible
# Steps to record, DQN's training steps (0: uniform actions) and share of random actions.
DATASETS = {
    "cartpole-mixed-v0": [(2000, 0, 1.0), (3000, 20_000, 0.3), (10_000, 15_000, 0.2)],
    "cartpole-narrow-v0": [(10_000, 25_000, 0.05)],
}


def record_episodes(env, policy, steps: int, epsilon: float, first: int, rng) -> list:
    """Whole episodes of the greedy policy, mixed with uniform actions; of seeds first,
    first + 1, ..."""
    episodes = []
    total = 0

    def act(observation):
        action = rng.integers(2)
        if rng.random() >= epsilon:
            action = policy.predict(observation, deterministic=True)[0]
        return action

    while total < steps:
        episode = record.play_episode(env, act, seed=first + len(episodes))
        rewards = episode.rewards.astype(np.float32)
        episodes.append(dataclasses.replace(episode, rewards=rewards))
        total += len(episode)
    return episodes


def main() -> None:
    for name in DATASETS:
        if (HERE / name).exists():
            sys.exit(f"{HERE / name}: is there already; move it away first")
    torch.set_num_threads(1)
    policy = DQN(
        "MlpPolicy", gym.make("CartPole-v1"), learning_rate=2.3e-3, batch_size=64,
        buffer_size=100_000, learning_starts=1000, target_update_interval=10,
        train_freq=256, gradient_steps=128, exploration_fraction=0.16,
        exploration_final_eps=0.04, policy_kwargs={"net_arch": [256, 256]}, seed=0,
        device="cpu",
    )  # fmt: skip
    directory = "cartpole_snapshots"
    policy.learn(50_000, callback=CheckpointCallback(5000, directory))
    for name, parts in DATASETS.items():
        env = gym.make("CartPole-v1")
        episodes = []
        rng = np.random.default_rng(0)
        for steps, trained, epsilon in parts:
            path = f"{directory}/rl_model_{trained}_steps"
            snapshot = DQN.load(path, device="cpu") if trained else None
            first = len(episodes)
            episodes += record_episodes(env, snapshot, steps, epsilon, first, rng)
        returns = [float(episode.rewards.sum()) for episode in episodes]
        record.write_dataset(
            HERE / name,
            episodes,
            env,
            ref_min_score=REFERENCE[0],
            ref_max_score=REFERENCE[1],
            algorithm_name="DQN of Stable-Baselines3, with uniform actions",
            description="CartPole-v1, policies of several qualities",
            author={"The cql.py authors"},
            author_email={"none"},
            code_permalink="datasets/make_cartpole.py",
        )
        steps = sum(len(episode) for episode in episodes)
        text = f"return {np.mean(returns):.1f} +- {np.std(returns):.1f}"
        print(f"{name}: {len(episodes)} episodes, {steps} steps, {text}")


if __name__ == "__main__":
    main()
