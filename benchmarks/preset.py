"""Tries of settings for configs/fast.yaml on several datasets, by successive halving.

    python benchmarks/preset.py --sets datasets/sets/* \
        --settings '{}' '{"n_steps": 5, "cql_alpha": 20}'
    python benchmarks/preset.py --table tries.csv

Each try is one training: a setting, which is a JSON object of flags beside those of
COMMON, a dataset and a seed, by the functions of cql.py that `train` uses. Beside the
policy itself, averages of its weights over the last updates are evaluated: exponential
ones of the rates in AVERAGES. A row of the table is a try and an average; it has the
score of every evaluation (ten deterministic episodes), the mean of the last three, the
best, the mean score of the dataset, and the CPU seconds of training. Tries whose rows
exist are not repeated, so the command can be stopped and run again. --table prints the
mean of the last three evaluations of each setting on each dataset, over the seeds.
"""

import argparse
import copy
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import cql  # noqa: E402

COLUMNS = (
    "setting average set seed last_three best data seconds threads evaluations flags "
    "commit"
).split()
AVERAGES = (0.0, 1e-3, 2.5e-4)  # rates; 0 is the policy itself
# Flags of all settings, unless they name others: CORL's sizes (3 x 256, K 10), with the
# fast gradient and the rates of a short run.
COMMON = {
    "max_timesteps": 12000,
    "eval_freq": 2000,
    "cql_backward_actions": 1,
    "cql_states": 128,
    "precision": "bf16",
    "soft_target_update_rate": 0.01,
    "qf_lr": 1e-3,
    "policy_lr": 1e-4,
    "compile": False,
}


def commit() -> str:
    """Return the commit of this tree."""
    command = f"git -C {ROOT} describe --always --dirty --exclude=*".split()
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def evaluate(agent, evaluator, step: int, policy: dict) -> float:
    """Return the score of an agent with these weights of the policy."""
    own = copy.deepcopy(agent.policy.state_dict())
    agent.policy.load_state_dict(policy)
    row = evaluator.evaluate(agent, step, [0], [])[0]
    agent.policy.load_state_dict(own)
    return row["d4rl_normalized_score"]


def attempt(setting: str, dataset: str, seed: int) -> list:
    """Train once. Return a row of the table for each average."""
    flags = {**COMMON, **json.loads(setting)}
    config = cql.TrainConfig(env=dataset, seed=seed, **flags)
    device = cql.pick_device(config)
    data, task, evaluator = cql.load(config, None, device)
    agent = cql.make_agent(config, task, device, data.statistics())
    replay = cql.Replay(config, data, agent)
    averages = [copy.deepcopy(agent.policy) for _ in AVERAGES]
    scores = [[] for _ in AVERAGES]
    start = time.process_time()
    for update in range(config.max_timesteps):
        noise = agent.draw(update, config.batch_size)
        batch = replay.sample(noise["fractions"])
        agent.update(batch, noise, *cql.stage_of(config, update))
        step = update + 1
        with torch.no_grad():
            for rate, average in zip(AVERAGES, averages):
                # At first it is the mean of all policies so far.
                rate = max(rate, 1 / step) if rate else 1.0
                for old, new in zip(average.parameters(), agent.policy.parameters()):
                    old.lerp_(new, rate)
        if step % config.eval_freq == 0:
            for each, average in zip(scores, averages):
                weights = average.state_dict()
                each.append(evaluate(agent, evaluator, step, weights))
    seconds = time.process_time() - start
    low, high = evaluator.reference or (0.0, 100.0)
    rows = []
    for rate, each in zip(AVERAGES, scores):
        row = {
            "setting": setting,
            "average": rate,
            "set": Path(dataset).name,
            "seed": seed,
            "last_three": round(float(np.mean(each[-3:])), 2),
            "best": round(max(each), 2),
            "data": round(float(100 * (data.returns.mean() - low) / (high - low)), 2),
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "evaluations": " ".join(f"{score:.1f}" for score in each),
            "flags": json.dumps(flags),
            "commit": commit(),
        }
        print({name: row[name] for name in COLUMNS[:10]}, flush=True)
        rows.append(row)
    return rows


def print_table(path: str) -> None:
    """Print the mean of the last three evaluations by setting and dataset."""
    table = pd.read_csv(path)
    means = table.pivot_table("last_three", ["setting", "average"], "set")
    means["mean"] = means.mean(axis=1)
    print(table.groupby("set")["data"].first().to_string())
    print(means.sort_values("mean").to_string(float_format="{:.1f}".format))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sets", nargs="+", default=[], help="directories of datasets")
    add("--settings", nargs="+", default=["{}"], help="flags, as JSON objects")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--threads", type=int, default=1, help="of each try")
    add("--out", default="tries.csv", help="the table to write or continue")
    add("--table", help="print this table instead")
    options = parser.parse_args()
    if options.table:
        return print_table(options.table)
    torch.set_num_threads(options.threads)
    cql.keep_freed_memory()
    out = Path(options.out)
    known = set()
    if out.exists():
        for row in csv.DictReader(out.open(newline="")):
            known.add((row["setting"], row["set"], int(row["seed"])))
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not known:
            writer.writeheader()
        for seed in options.seeds:
            for setting in options.settings:
                for dataset in options.sets:
                    if (setting, Path(dataset).name, seed) not in known:
                        writer.writerows(attempt(setting, dataset, seed))
                        file.flush()


if __name__ == "__main__":
    main()
