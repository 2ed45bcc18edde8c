"""How well policies are chosen without a simulator, over a product of cql_alpha.

    python cql.py --config_path configs/quickstart.yaml --seed '[0,1]' \\
        --cql_alpha '[0,1,5,20,50,200]' --fqe_updates 12000 --resume runs/alphas
    python benchmarks/judge.py runs/alphas --episodes 100 --out runs/alphas/judge.csv

Each policy's true discounted return is the mean over so many episodes in the data's
environment. Beside it stand four ways to choose without one: the value of fitted Q
evaluation (fqe.csv), the final Q of the policy's actions, the final gap (the smallest)
and chance. Of each way, over all policies:

    rank      Spearman's correlation with the true discounted return
    regret    (best - chosen) / (best - worst), of true returns
    episodes  how many real ones a bandit needs for as good a choice: UCB1 over the
              policies, a pull is one episode, chosen is the arm of highest mean;
              the first n at which the mean regret of 500 resamplings is as low
"""

import argparse
import csv
import math
import sys
from pathlib import Path
from typing import Dict, List

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

RESAMPLINGS = 500
MOST_PULLS = 2000


def true_returns(directory: Path, episodes: int) -> np.ndarray:
    """Discounted returns [R, episodes] of every run's deterministic policy."""
    policy = cql.load_policy(directory)
    config = policy.agent.config
    config.n_episodes = episodes
    env = cql.make_env(config, policy.task)
    evaluator = cql.Evaluator(config, policy.task, env)
    runs = list(range(len(policy.agent.runs)))
    results = evaluator.episodes(policy.agent, 0, runs, [])
    returns = np.zeros((len(runs), episodes))
    for place, (_, _, _, discounted) in results.items():
        returns[place] = discounted
    return returns


def last_rows(path: Path) -> pd.DataFrame:
    """Each run's last row, by run."""
    return pd.read_csv(path).groupby("run").last()


def estimates(directory: Path) -> Dict[str, np.ndarray]:
    """What each way to choose thinks of each run, [R]; the largest is chosen."""
    metrics = last_rows(directory / "metrics.csv")
    values = last_rows(directory / "fqe.csv")
    q = metrics.filter(regex=r"^cql_q\d+_current_actions$").mean(axis=1)
    gap = metrics.filter(regex=r"^cql_qf\d+_diff$").mean(axis=1)
    return {
        "fqe": values["value"].to_numpy(),
        "final Q of the policy": q.to_numpy(),
        "smallest gap": -gap.to_numpy(),
    }


def regret_of(chosen: int, means: np.ndarray) -> float:
    return float((means.max() - means[chosen]) / np.ptp(means))


def bandit_regrets(returns: np.ndarray) -> np.ndarray:
    """Mean regret [MOST_PULLS] of UCB1's choice after each number of pulls."""
    means = returns.mean(axis=1)
    scaled = (returns - returns.min()) / np.ptp(returns)
    n_arms, n_episodes = returns.shape
    regrets = np.zeros(MOST_PULLS)
    for resampling in range(RESAMPLINGS):
        rng = np.random.default_rng(resampling)
        sums = np.zeros(n_arms)
        counts = np.zeros(n_arms)
        for pull in range(MOST_PULLS):
            arm = pull
            if pull >= n_arms:
                bonus = np.sqrt(2 * math.log(pull) / counts)
                arm = int(np.argmax(sums / counts + bonus))
            sums[arm] += scaled[arm, rng.integers(n_episodes)]
            counts[arm] += 1
            average = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
            regrets[pull] += regret_of(int(np.argmax(average)), means)
    return regrets / RESAMPLINGS


def judge(directory: Path, episodes: int) -> List[dict]:
    """A row for each way to choose."""
    returns = true_returns(directory, episodes)
    means = returns.mean(axis=1)
    bandit = bandit_regrets(returns)
    rows = []
    for name, values in estimates(directory).items():
        regret = regret_of(int(np.argmax(values)), means)
        rank = pd.Series(values).rank().corr(pd.Series(means).rank())
        rows.append({"chosen by": name, "rank": rank, "regret": regret})
    chance = float((means.max() - means.mean()) / np.ptp(means))
    rows.append({"chosen by": "chance", "rank": math.nan, "regret": chance})
    for row in rows:
        reached = np.flatnonzero(bandit <= row["regret"])
        row["episodes"] = int(reached[0]) + 1 if len(reached) else f">{MOST_PULLS}"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = judge(options.directory, options.episodes)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
