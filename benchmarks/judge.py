"""Measure how well policies are chosen without a simulator, over values of cql_alpha.

    python cql.py --config_path configs/quickstart.yaml --seed '[0,1]' \\
        --cql_alpha '[0,1,5,20,50,200]' --resume runs/alphas
    python scripts/judge.py runs/alphas --out runs/alphas
    python benchmarks/judge.py runs/alphas/judge.csv --episodes 100 --out judged
    python benchmarks/judge.py --figure judge.png judged.csv [more.csv ...]

The true discounted return of a policy is the mean over so many episodes in the data's
environment. It is compared with five ways to choose without one: the value of fitted
Q evaluation (scripts/judge.py's table), the same without runs whose Q diverged in
training (cql.py warned of them), the final Q of the policy's actions, the smallest
final gap, and chance. For each way:

    rank      Spearman's correlation with the true discounted return, over the
              policies that the way does not leave out
    regret    (best - chosen) / (best - worst), of true returns, over all policies
    episodes  number of real episodes that a bandit needs for as good a choice. The
              bandit is UCB1 over all policies, after one episode of each in random
              order, and chooses the highest mean. The number is the first at which
              the mean regret of 500 resamplings is as low, or 0.01

Writes judged.csv, a row for each policy, and judged-ways.csv, a row for each way. The
figure shows value against true return, one panel for each judged.csv.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import List, Tuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

RESAMPLINGS = 500
MOST_PULLS = 2000
NEGLIGIBLE = 0.01  # regret; a bandit's is 0 only if no resampling errs
NOT_AWAY = "fqe, where Q did not run away"  # column of judged.csv


def last_rows(path: Path, keys: List[str]) -> pd.DataFrame:
    """Return the last row of each policy in a table, in the order of the table."""
    return pd.read_csv(path).groupby(keys, sort=False).tail(1).set_index(keys)


def true_returns(checkpoint: str, runs: List[int], episodes: int) -> np.ndarray:
    """Return discounted returns [runs, episodes] of a checkpoint's deterministic
    policies."""
    policy = cql.load_policy(checkpoint, runs[0])
    config = policy.agent.config
    config.n_episodes = episodes
    env = cql.make_env(config, policy.task)
    evaluator = cql.Evaluator(config, policy.task, env)
    results = evaluator.episodes(policy.agent, 0, runs, [])
    returns = np.zeros((len(runs), episodes))
    for (run, episode), (_, _, _, discounted) in results.items():
        returns[runs.index(run), episode] = discounted
    return returns


def training_metrics(checkpoint: str, runs: List[int]) -> pd.DataFrame:
    """Return the final Q of the policy's actions and the final gap of each run."""
    path = Path(checkpoint).parent / "metrics.csv"
    metrics = last_rows(path, ["run"]).loc[runs]
    q = metrics.filter(regex=r"^cql_q\d+_current_actions$").mean(axis=1)
    gap = metrics.filter(regex=r"^cql_qf\d+_diff$").mean(axis=1)
    return pd.DataFrame({"q": q, "gap": gap})


def regret_of(chosen: int, means: np.ndarray) -> float:
    return float((means.max() - means[chosen]) / np.ptp(means))


def bandit_regrets(returns: np.ndarray) -> np.ndarray:
    """Return the mean regret [MOST_PULLS] of UCB1's choice after each pull."""
    means = returns.mean(axis=1)
    scaled = (returns - returns.min()) / np.ptp(returns)
    n_arms, n_episodes = returns.shape
    regrets = np.zeros(MOST_PULLS)
    for resampling in range(RESAMPLINGS):
        rng = np.random.default_rng(resampling)
        order = rng.permutation(n_arms)
        sums = np.zeros(n_arms)
        counts = np.zeros(n_arms)
        for pull in range(MOST_PULLS):
            if pull < n_arms:
                arm = order[pull]
            else:
                bonus = np.sqrt(2 * math.log(pull) / counts)
                arm = int(np.argmax(sums / counts + bonus))
            sums[arm] += scaled[arm, rng.integers(n_episodes)]
            counts[arm] += 1
            average = np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
            regrets[pull] += regret_of(int(np.argmax(average)), means)
    return regrets / RESAMPLINGS


def judge(path: Path, episodes: int) -> Tuple[List[dict], pd.DataFrame]:
    """Return a row for each way to choose, and one for each policy of judge.csv."""
    judged = last_rows(path, ["checkpoint", "run"])
    returns = []
    metrics = []
    for checkpoint in judged.index.unique("checkpoint"):
        runs = judged.loc[checkpoint].index.tolist()
        returns.append(true_returns(checkpoint, runs, episodes))
        metrics.append(training_metrics(checkpoint, runs))
    returns = np.concatenate(returns)
    metrics = pd.concat(metrics)
    means = returns.mean(axis=1)
    bandit = bandit_regrets(returns)
    # What each way thinks of each policy: the largest is chosen, NaN never.
    thought = {
        "fqe": judged["value"].to_numpy(),
        NOT_AWAY: judged["value"].mask(judged["ran_away"] == 1).to_numpy(),
        "final Q of the policy": metrics["q"].to_numpy(),
        "smallest gap": -metrics["gap"].to_numpy(),
    }
    policies = judged[["seed", "cql_alpha", "value", "value_error"]].reset_index()
    policies = policies.assign(true=means, **thought)
    policies["true_error"] = returns.std(axis=1, ddof=1) / math.sqrt(episodes)
    rows = []
    for name, values in thought.items():
        regret = regret_of(int(np.nanargmax(values)), means)
        known = ~np.isnan(values)
        ranks = pd.Series(values[known]).rank()
        rank = ranks.corr(pd.Series(means[known]).rank())
        rows.append({"chosen by": name, "rank": rank, "regret": regret})
    chance = float((means.max() - means.mean()) / np.ptp(means))
    rows.append({"chosen by": "chance", "rank": math.nan, "regret": chance})
    for row in rows:
        reached = np.flatnonzero(bandit <= max(row["regret"], NEGLIGIBLE))
        row["episodes"] = int(reached[0]) + 1 if len(reached) else f">{MOST_PULLS}"
    return rows, policies


def draw(tables: List[Path], path: Path) -> None:
    """Draw value against true return, with hollow points where Q diverged."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    import plot

    plt = plot.plt
    plt.switch_backend("Agg")
    plt.rcParams.update(plot.STYLE)
    width = 3.3 * len(tables)
    figure, panels = plt.subplots(1, len(tables), figsize=(width, 3.4), squeeze=False)
    lines = {}
    for panel, table in zip(panels[0], tables):
        policies = pd.read_csv(table)
        alphas = sorted(policies["cql_alpha"].unique())
        shades = plt.colormaps["viridis"](np.linspace(0, 0.95, len(alphas)))
        for alpha, shade in zip(alphas, shades):
            rows = policies[policies["cql_alpha"] == alpha]
            held = rows[NOT_AWAY].notna()
            style = {"color": shade, "linestyle": "", "ms": 6}
            for part, face in (rows[held], shade), (rows[~held], "none"):
                panel.plot(part["true"], part["value"], "o", mfc=face, **style)
            place = f"{alpha:g} (least)" if alpha == alphas[0] else ""
            place = "largest" if alpha == alphas[-1] else place
            if place and table == tables[0]:
                (lines[f"cql_alpha {place}"],) = panel.plot([], [], "o", **style)
        low, high = panel.get_xlim()
        panel.axline((low, low), slope=1, color="0.6", linewidth=0.8)
        panel.set_xlim(low, high)
        panel.set_title(table.stem)
        panel.set_xlabel("true discounted return")
    panels[0, 0].set_ylabel("value by fitted Q evaluation")
    style = {"mfc": "none", "color": "0.3", "linestyle": "", "ms": 6}
    (lines["Q diverged in training"],) = panels[0, 0].plot([], [], "o", **style)
    plot.add_legend(figure, lines)
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "judge.csv of scripts/judge.py, or tables to draw"
    parser.add_argument("paths", nargs="+", type=Path, help=text)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", default="judged", help="the tables, without .csv")
    parser.add_argument("--figure", type=Path, help="draw tables instead")
    options = parser.parse_args()
    for path in options.paths:
        if not path.is_file():
            parser.error(f"{path}: no such table; scripts/judge.py writes judge.csv")
    if options.figure:
        return draw(options.paths, options.figure)
    if len(options.paths) > 1:
        parser.error("several tables: pass one judge.csv, or --figure")
    rows, policies = judge(options.paths[0], options.episodes)
    write = {"index": False, "float_format": "%.6g", "lineterminator": "\n"}
    policies.to_csv(f"{options.out}.csv", **write)
    ways = pd.DataFrame(rows)
    ways.to_csv(f"{options.out}-ways.csv", **write)
    print(ways.to_string(index=False, float_format="{:.3f}".format))
    print(f"wrote {options.out}.csv, {options.out}-ways.csv")


if __name__ == "__main__":
    main()
