"""A made-up clinic: the log of 200 patients, and the truth about policies for them.

    python benchmarks/clinic.py log.csv          # the README's example begins so
    python benchmarks/clinic.py --judge runs/clinic

A patient's pulse rises by itself and falls with the hourly dose. The reward is highest
at a pulse of 75. Above 130 or below 40 the patient dies. The log's doses are random.
`--judge` reads the values that scripts/judge.py wrote to runs/clinic/judge.csv. It
treats new patients by each of these policies, and prints the mean discounted return
and the share that died in the first day beside the value from the log alone.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COLUMNS = ["patient", "hour", "pulse", "sex", "dose", "reward", "died"]
LOGGED, JUDGED = 200, 1000  # patients
DAY, LONG = 24, 200  # hours; a discount of 0.95 leaves nothing of later ones


def admit(n: int, rng: np.random.Generator):
    """The first pulse of n patients, and their sex, which makes no difference."""
    return rng.normal(90, 20, n), rng.choice(["F", "M"], n)


def treat(pulse: np.ndarray, dose: np.ndarray, rng: np.random.Generator):
    """The next pulse, the reward and who died, of an hour."""
    pulse = pulse + rng.normal(5, 2, len(pulse)) - 2 * dose
    died = (pulse < 40) | (pulse > 130)
    return pulse, np.where(died, -10, 1 - abs(pulse - 75) / 25), died


def write_log(path: str) -> None:
    rng = np.random.default_rng(0)
    pulse, sex = admit(LOGGED, rng)
    alive = np.ones(LOGGED, bool)
    rows = []
    for hour in range(DAY):
        dose = rng.uniform(0, 5, LOGGED)
        after, reward, died = treat(pulse, dose, rng)
        for i in np.flatnonzero(alive):
            row = [i, hour, f"{pulse[i]:.1f}", sex[i], f"{dose[i]:.2f}"]
            rows.append([*row, f"{reward[i]:.3f}", int(died[i])])
        pulse = after
        alive &= ~died
    rows.sort(key=lambda row: row[:2])
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"wrote {path}: {len(rows):,} rows")


def play(policy, discount: float):
    """Mean discounted return, its error and the share that died in a day, of new
    patients."""
    rng = np.random.default_rng(1)
    pulse, sex = admit(JUDGED, rng)
    alive = np.ones(JUDGED, bool)
    returns = np.zeros(JUDGED)
    dead = 0.0
    for hour in range(LONG):
        observation = np.stack([pulse, sex == "F", sex == "M"], axis=1)
        pulse, reward, died = treat(pulse, policy(observation)[:, 0], rng)
        returns += discount**hour * alive * reward
        alive &= ~died
        if hour == DAY - 1:
            dead = 1 - alive.mean()
    return returns.mean(), returns.std(ddof=1) / math.sqrt(JUDGED), dead


def judge(path: Path, out: str) -> None:
    """Write the true return of each policy in judge.csv beside its value."""
    import cql

    with open(path, newline="") as file:
        last = {}
        for row in csv.DictReader(file):
            last[row["checkpoint"], row["run"]] = row
    table = []
    for (checkpoint, run), row in last.items():
        policy = cql.load_policy(checkpoint, int(run))
        truth, error, dead = play(policy, policy.agent.config.discount)
        value = float(row["discounted_return"])
        text = f"run {run}  seed {row['seed']}  cql_alpha {row['cql_alpha']:5}"
        text += f"  value {value:6.2f}"
        print(f"{text}  true {truth:6.2f} +- {error:.2f}  died {dead:.1%}")
        keys = [row["seed"], row["cql_alpha"], row["discounted_return"]]
        numbers = [truth, error, dead]
        table.append([*keys, *[f"{number:.6g}" for number in numbers]])
    with open(out, "w", newline="") as file:
        heads = ["seed", "cql_alpha", "value", "true", "true_error", "died"]
        csv.writer(file, lineterminator="\n").writerows([heads, *table])
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", nargs="?", default="log.csv", help="the table to write")
    text = "judge.csv of scripts/judge.py, or the directory that holds it"
    parser.add_argument("--judge", type=Path, metavar="PATH", help=text)
    text = "table of true returns that --judge writes"
    parser.add_argument("--out", default="clinic-judged.csv", help=text)
    options = parser.parse_args()
    if options.judge:
        path = options.judge
        if path.is_dir():
            path = path / "judge.csv"
        if not path.is_file():
            hint = f"python scripts/judge.py {path.parent} --out {path.parent} writes it"
            parser.error(f"{path}: does not exist; {hint}")
        judge(path, options.out)
    else:
        write_log(options.log)


if __name__ == "__main__":
    main()
