"""Measure how well policies are chosen without a simulator, over values of cql_alpha.

    python cql.py --config_path configs/quickstart.yaml --env SET --eval_env none \\
        --seed '[0,1]' --cql_alpha '[0,1,5,20,100,500]' --max_timesteps 5000 \\
        --resume runs/SET
    python benchmarks/judge.py runs/SET --episodes 50 --out results/SET
    python benchmarks/judge.py --table results/A results/B
    python benchmarks/judge.py --figure judge.png results/A results/B

The true discounted return of a policy is the mean over so many episodes in the data's
environment. It is compared with what each way to choose without one thinks of it:

    supported      scripts/judge.py: fitted Q evaluation that gives no credit for actions
                   the data do not support; policies that it marks come last. Its choice
                   is the policy within the errors of the highest value that has the
                   fewest unsupported actions
    highest        the same values; its choice is the highest one
    plain          fitted Q evaluation
    conservative   fitted Q evaluation plus CQL's penalty (eq. 1 and 2 of the paper), of
                   weight (1 - discount) times the deviation of the data's returns-to-go
    least          fitted Q evaluation with the least of the critics
    support first  plain, without policies that leave the data's support in more than a
                   tenth of the states
    one step       mean of Q(s, pi(s)) - Q(s, a) over the recorded states, with Q of the
                   recorded behavior, and no credit for unsupported actions
    not diverged   plain, without policies whose Q diverged in training
    final Q        of the policy's actions, in training
    smallest gap   the penalty's, at the end of training
    workflow       of Kumar et al. 2021 (arXiv 2109.10813): the smallest weight whose Q
                   of the data's actions does not fall late in training

For each way:

    rank      Spearman's correlation with the true discounted return, over the policies
              that the way does not leave out; `supported` and `highest` leave out none
    regret    (best - chosen) / (best - worst), of true returns, over all policies
    episodes  number of real episodes that a bandit needs for as good a choice. The
              bandit is UCB1 over all policies, after one episode of each in random
              order, and chooses the highest mean. The number is the first at which the
              mean regret of 500 resamplings is as low, or 0.01

Writes DIR/policies.csv, a row for each policy, and DIR/ways.csv, a row for each way.
True returns and values that DIR holds already are not computed again. `--table` prints
rank and regret, and last how many policies without a mark are outside the errors of
scripts/judge.py, and how many of these have in truth a lower return than the policy of
the highest value.
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import List

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cql

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("script", ROOT / "scripts/judge.py")
script = importlib.util.module_from_spec(spec)
sys.modules["script"] = script  # dataclasses look it up
spec.loader.exec_module(script)

RESAMPLINGS = 500
MOST_PULLS = 2000
NEGLIGIBLE = 0.01  # regret; a bandit's is 0 only if no resampling errs
FEW = 0.1  # share of unsupported actions that "support first" admits
FALLS = 0.02  # by how much Q of the data falls in an overfit run, as a share of its most


# ---- Ways to choose ------------------------------------------------------------------


class Conservative(script.SupportedQ):
    """A lower bound of a policy's value: CQL's own evaluation, for one fixed policy."""

    def __init__(self, data):
        super().__init__(data)
        parts = np.split(data.rewards.double().cpu().numpy(), data.ends)
        config = data.config
        togo = []
        for rewards in parts:
            sums = np.zeros(len(rewards) + 1)
            for t in reversed(range(len(rewards))):
                sums[t] = rewards[t] + config.discount * sums[t + 1]
            togo.append(sums[:-1])
        self.weight = (1 - config.discount) * float(np.concatenate(togo).std())

    def loss(self, q_of, batch, target):
        q = q_of(batch["observations"], batch["actions"])
        gap = q_of(batch["observations"], batch["policy_actions"]) - q
        return (q - target).square().mean() + self.weight * gap.mean()


class Least(script.SupportedQ):
    """The least of the critics, in targets and values."""

    shares_batches = True

    def target(self, next_q, recorded_q, batch):
        least = next_q.amin(0).expand_as(next_q)
        return super().target(least, recorded_q, batch)

    def value(self, q, recorded_q, supported):
        return q.amin(0, keepdim=True)


def fitted(policies, data, options, estimator) -> List[float]:
    """Return a value for each policy."""
    table = script.judge(policies, data, options, estimator=estimator)
    rows = sorted(script.last_rows(table), key=lambda row: row["policy"])
    return [row["value"] for row in rows]


def one_step(policies, data, options) -> List[float]:
    """Return the mean gain of each policy's actions over the recorded ones, by Q of the
    recorded behavior; policies have `supported`."""
    everywhere = torch.ones_like(policies[0].supported)
    recorded = script.Policy(data.recorded, supported=everywhere)
    critics = script.Critics([recorded], data, options)
    for update in range(options.updates):
        critics.update(update)
    weights = {name: x[0] for name, x in critics.weights.items()}

    @torch.no_grad()
    def q(actions):
        found = []
        for rows in data.rows.split(script.CHUNK):
            inputs = data.observations[rows], actions[rows]
            found.append(critics.all_q(weights, *inputs).mean(0))
        return torch.cat(found)

    base = q(data.recorded)
    gains = []
    for policy in policies:
        gain = q(policy.actions) - base
        supported = policy.supported[data.rows]
        gains.append(torch.where(supported, gain, gain.clamp(max=0)).mean().item())
    return gains


def judged(policies, data, options, known: pd.DataFrame, save) -> None:
    """Fill the columns of `known` that fitted Q evaluation and its kin give, calling
    save after each."""
    found = script.mark_supported(policies, data, options)
    everywhere = torch.ones_like(found[0].supported)
    plain = [script.replace(each, supported=everywhere) for each in policies]
    known["unsupported"] = [script.describe(each, data)["unsupported"] for each in found]
    ways = {
        "supported": lambda: recommended(found, data, options, known),
        "plain": lambda: fitted(plain, data, options, script.SupportedQ),
        "conservative": lambda: fitted(plain, data, options, Conservative),
        "least": lambda: fitted(plain, data, options, Least),
        "one step": lambda: one_step(found, data, options),
    }
    for name, way in ways.items():
        if name not in known:
            known[name] = way()
            save()


def recommended(policies, data, options, known: pd.DataFrame) -> List[float]:
    """Return the values of scripts/judge.py, and note what it recommends, or would
    recommend if it did not abstain."""
    table = script.judge(policies, data, options)
    rows = sorted(script.last_rows(table), key=lambda row: row["policy"])
    chosen, reason = script.recommend(table, data.enough_updates(options))
    top = script.candidate_of(rows)["policy"]
    known["recommended"] = [int(row["policy"] == top) for row in rows]
    known["settled"] = [row["settled"] for row in rows]
    near = [row["policy"] for row in script.within_errors(rows)]
    outside = [script.trusted(row) and row["policy"] not in near for row in rows]
    known["outside"] = np.array(outside).astype(int)
    known["abstains"] = "" if chosen else reason
    return [row["value"] for row in rows]


def training_metrics(checkpoint: str, runs: List[int]) -> pd.DataFrame:
    """Return the final Q of the policy's actions, the final gap, and whether Q of the
    data's actions falls late in training, of each run."""
    metrics = pd.read_csv(Path(checkpoint).parent / "metrics.csv")
    found = []
    for run in runs:
        rows = metrics[metrics["run"] == run]
        q = rows.filter(regex=r"^cql_q\d+_current_actions$").mean(axis=1)
        gap = rows.filter(regex=r"^cql_qf\d+_diff$").mean(axis=1)
        of_data = rows.filter(regex=r"^average_qf\d+$").mean(axis=1)
        late = of_data.iloc[len(of_data) // 2 :]
        falls = late.max() - late.iloc[-1] > FALLS * abs(late.max())
        found.append({"final Q": q.iloc[-1], "gap": gap.iloc[-1], "falls": int(falls)})
    return pd.DataFrame(found)


# ---- Truth ---------------------------------------------------------------------------


def true_returns(checkpoint: str, runs: List[int], episodes: int) -> np.ndarray:
    """Return discounted returns [runs, episodes] of a checkpoint's deterministic
    policies, in the environment that the data record."""
    policy = cql.load_policy(checkpoint, runs[0])
    config = policy.agent.config
    config.n_episodes = episodes
    config.eval_env = None
    env = cql.make_env(config, policy.task)
    evaluator = cql.Evaluator(config, policy.task, env)
    results = evaluator.episodes(policy.agent, 0, runs, [])
    returns = np.zeros((len(runs), episodes))
    for (run, episode), (_, _, _, discounted) in results.items():
        returns[runs.index(run), episode] = discounted
    return returns


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


# ---- Tables --------------------------------------------------------------------------


def marked(policies: pd.DataFrame) -> pd.Series:
    """Return which policies scripts/judge.py marks, and so does not recommend."""
    away = policies["unsupported"] > script.MOSTLY
    return away | (policies["ran_away"] == 1)


def compare(policies: pd.DataFrame, returns: np.ndarray) -> pd.DataFrame:
    """Return a row for each way to choose. returns: true ones [policies, episodes]."""
    means = returns.mean(axis=1)
    bandit = bandit_regrets(returns)
    few = policies["unsupported"] <= max(FEW, policies["unsupported"].min())
    not_overfit = (policies["falls"] == 0) & (policies["ran_away"] == 0)
    # The ranking that scripts/judge.py prints has policies that it marks last.
    below = policies["supported"].max() - policies["supported"].min() + 1
    printed = policies["supported"] - marked(policies) * below
    # What each way thinks of each policy: the largest is chosen, NaN never.
    thought = {"supported": printed, "highest": printed}
    for name in "plain", "conservative", "least", "one step":
        thought[name] = policies[name]
    thought["support first"] = policies["plain"].where(few)
    thought["not diverged"] = policies["plain"].where(policies["ran_away"] == 0)
    thought["final Q"] = policies["final Q"]
    thought["smallest gap"] = -policies["gap"]
    thought["workflow"] = -policies["cql_alpha"].where(not_overfit)
    rows = []
    for name, values in thought.items():
        values = values.to_numpy(float)
        known = ~np.isnan(values)
        if not known.any():  # it leaves out all policies, so it chooses none
            rows.append({"chosen by": name, "rank": math.nan, "regret": math.nan})
            continue
        chosen = int(np.nanargmax(values))
        if name == "supported":
            chosen = int(policies["recommended"].argmax())
        ranks = pd.Series(values[known]).rank()
        rank = ranks.corr(pd.Series(means[known]).rank())
        row = {"chosen by": name, "rank": rank, "regret": regret_of(chosen, means)}
        rows.append(
            {
                **row,
                "seed": policies["seed"][chosen],
                "cql_alpha": policies["cql_alpha"][chosen],
            }
        )
    chance = float((means.max() - means.mean()) / np.ptp(means))
    rows.append({"chosen by": "chance", "rank": math.nan, "regret": chance})
    for row in rows:
        if math.isnan(row["regret"]):
            continue
        reached = np.flatnonzero(bandit <= max(row["regret"], NEGLIGIBLE))
        row["episodes"] = int(reached[0]) + 1 if len(reached) else f">{MOST_PULLS}"
    return pd.DataFrame(rows)


def measure(runs: List[Path], out: Path, episodes: int, options) -> None:
    """Write out/policies.csv and out/ways.csv."""
    out.mkdir(parents=True, exist_ok=True)
    policies, data = script.load(runs)
    path = out / "policies.csv"
    write = {"index": False, "float_format": "%.6g", "lineterminator": "\n"}
    identity = []
    for policy in policies:
        row = {"checkpoint": policy.checkpoint, "run": policy.run, **policy.flags}
        identity.append({**row, "ran_away": int(policy.ran_away)})
    known = (
        pd.read_csv(path, keep_default_na=False)
        if path.is_file()
        else pd.DataFrame(identity)
    )
    for name in known.columns.difference(["checkpoint", "abstains"]):
        known[name] = pd.to_numeric(known[name], errors="coerce")
    groups = {}
    for policy in policies:
        groups.setdefault(policy.checkpoint, []).append(policy.run)
    truth = out / "returns.csv"
    if not truth.is_file():
        found = [true_returns(name, of, episodes) for name, of in groups.items()]
        table = pd.DataFrame(np.concatenate(found))
        table.to_csv(truth, header=False, **write)
    returns = pd.read_csv(truth, header=None).to_numpy()
    known["true"] = returns.mean(axis=1)
    known["true_error"] = returns.std(axis=1, ddof=1) / math.sqrt(returns.shape[1])
    metrics = pd.concat([training_metrics(name, of) for name, of in groups.items()])
    for name in metrics:
        known[name] = metrics[name].to_numpy()
    judged(policies, data, options, known, lambda: known.to_csv(path, **write))
    known.to_csv(path, **write)
    ways = compare(known, returns)
    ways.to_csv(out / "ways.csv", **write)
    print(ways.to_string(index=False, float_format="{:.3f}".format))
    print(f"{known['abstains'][0] or 'recommends'}; wrote {path}, {out / 'ways.csv'}")


def claims(policies: pd.DataFrame) -> str:
    """Return how many policies without a mark are outside the errors of the highest
    value, and how many of them are worse than its policy."""
    outside = policies[policies["outside"] == 1]
    highest = policies["supported"].where(~marked(policies)).idxmax()
    return f"{len(outside)}, {(outside['true'] < policies['true'][highest]).sum()}"


def show_table(directories: List[Path]) -> None:
    """Print rank and regret of each way on each set, as Markdown."""
    ways = [pd.read_csv(each / "ways.csv") for each in directories]
    ranks = pd.concat([each["rank"] for each in ways], axis=1)
    regrets = pd.concat([each["regret"] for each in ways], axis=1)

    def cell(rank: float, regret: float) -> str:
        return f"{rank:.2f}, {regret:.3f}".replace("nan", "-")

    names = [each.name for each in directories]
    lines = [["chosen by", *names, "mean rank, most regret"]]
    lines.append(["---"] * len(lines[0]))
    for i, name in enumerate(ways[0]["chosen by"]):
        cells = [cell(*pair) for pair in zip(ranks.iloc[i], regrets.iloc[i])]
        lines.append([name, *cells, cell(ranks.iloc[i].mean(), regrets.iloc[i].max())])
    found = [claims(pd.read_csv(each / "policies.csv")) for each in directories]
    lines.append(["outside the errors, worse", *found, ""])
    for cells in lines:
        print("|", " | ".join(cells), "|")


def draw(directories: List[Path], path: Path) -> None:
    """Draw value against true return, a panel for each set."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import plot

    plt = plot.plt
    plt.switch_backend("Agg")
    plt.rcParams.update(plot.STYLE)
    columns = min(5, len(directories))
    lines = -(-len(directories) // columns)
    size = 2.6 * columns, 2.8 * lines + 0.3
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False)
    dark, light = plt.colormaps["viridis"]([0.08, 0.95])
    for panel, directory in zip(panels.flat, directories):
        policies = pd.read_csv(directory / "policies.csv")
        away = marked(policies)
        colors = plt.colormaps["viridis"](policies["cql_alpha"].rank(pct=True) * 0.95)
        for i, color in enumerate(colors):
            face = "none" if away[i] else color
            point = policies["true"][i], policies["supported"][i]
            panel.plot(*point, "o", color=color, mfc=face, ms=5)
        chosen = policies[policies["recommended"] == 1]
        panel.plot(chosen["true"], chosen["supported"], "k+", ms=11)
        ends = [policies["true"].min(), policies["true"].max()]
        panel.plot(ends, ends, color="0.6", lw=0.8, zorder=0)
        panel.set_title(directory.name)
        panel.set_xlabel("true discounted return")
    for panel in panels[:, 0]:
        panel.set_ylabel("value by scripts/judge.py")
    for panel in panels.flat[len(directories) :]:
        panel.set_visible(False)
    styles = {
        "smallest weight": {"color": dark, "marker": "o", "ls": ""},
        "largest": {"color": light, "marker": "o", "ls": ""},
        "marked": {"color": "0.3", "marker": "o", "mfc": "none", "ls": ""},
        "chosen": {"color": "k", "marker": "+", "ms": 11, "ls": ""},
        "the truth": {"color": "0.6", "lw": 0.8},
    }
    handles = [plt.Line2D([], [], label=name, **of) for name, of in styles.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "runs to measure, or directories of results to draw"
    parser.add_argument("paths", nargs="+", type=Path, help=text)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--updates", type=int, default=script.Options.updates)
    parser.add_argument("--out", type=Path, default=Path("judged"), metavar="DIR")
    parser.add_argument("--table", action="store_true", help="print results instead")
    parser.add_argument("--figure", type=Path, help="draw results instead")
    options = parser.parse_args()
    if options.table:
        return show_table(options.paths)
    if options.figure:
        return draw(options.paths, options.figure)
    of_judge = script.Options(updates=options.updates)
    measure(options.paths, options.out, options.episodes, of_judge)


if __name__ == "__main__":
    main()
