"""Measure where the seconds of a run go.

    python benchmarks/breakdown.py
    python benchmarks/breakdown.py --out ant.csv --config_path configs/ant.yaml

Runs cql.py with these flags (the quickstart without any) in this process, with a clock
around its parts. The run is on a CPU, where a call ends when its work does. Prints the
seconds and the share of each part, without the parts inside it; `the rest` is outside
all of them.
"""

import argparse
import csv
import functools
import sys
import tempfile
import time
from pathlib import Path

START = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import cql  # noqa: E402

seconds, running = {"imports": time.perf_counter() - START}, []


def clocked(owner, name: str, label: str) -> None:
    """Replace owner.name by a function that adds its own time to the label's."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def timed(*arguments, **options):
        start = time.perf_counter()
        running.append(0.0)  # seconds of the parts inside this one
        try:
            return function(*arguments, **options)
        finally:
            spent = time.perf_counter() - start
            seconds[label] = seconds.get(label, 0.0) + spent - running.pop()
            if running:
                running[-1] += spent

    setattr(owner, name, timed)


PARTS = (
    (cql, "read_config", "flags"),
    (cql, "load", "data and environment"),
    (cql.Replay, "sample", "batches"),
    (cql.Agent, "draw", "noise"),
    (cql.ContinuousCQL, "sample", "policy, forward"),
    (cql.ContinuousCQL, "q_values", "Q for actor and target"),
    (cql.ContinuousCQL, "critic_loss", "critics' losses, forward"),
    (cql.ContinuousCQL, "losses", "the rest of the losses"),
    (cql.DiscreteCQL, "losses", "losses, discrete actions"),
    (torch.Tensor, "backward", "backward"),
    (torch.optim.Adam, "step", "Adam"),
    (torch, "_foreach_lerp_", "target networks"),
    (cql.Metrics, "add", "metrics"),
    (cql.Evaluator, "evaluate", "evaluation"),
    (cql.Run, "checkpoint", "checkpoints"),
    (cql.Run, "log", "log rows"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="breakdown.csv", help="the table to write")
    options, argv = parser.parse_known_args()
    argv = argv or ["--config_path", str(ROOT / "configs/quickstart.yaml")]
    for part in PARTS:
        clocked(*part)
    with tempfile.TemporaryDirectory() as directory:
        status = cql.main([*argv, "--resume", f"{directory}/run", "--device", "cpu"])
    if status == 2:
        sys.exit(2)
    total = time.perf_counter() - START
    rows = dict(sorted(seconds.items(), key=lambda pair: -pair[1]))
    rows |= {"the rest": total - sum(seconds.values()), "total": total}
    for label, spent in rows.items():
        print(f"{label:24} {spent:8.2f} s {100 * spent / total:5.1f} %")
    with open(options.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "seconds", "share", *argv])
        for label, spent in rows.items():
            writer.writerow([label, f"{spent:.3f}", f"{spent / total:.4f}"])
    sys.exit(status)


if __name__ == "__main__":
    main()
