"""All that wants a GPU, in nine minutes.

    python benchmarks/gpu.py --out gpu --minutes 9

Needs what the tests need (requirements-dev.txt). One after the other, each within its
share of the time, so that all have their turn:

    tests.txt      the tests of graphs, noise and devices
    speed.csv      one process: updates a second, kernels of an update and how long
                   they are busy, of 1, 4 and 16 runs at CORL's sizes, in tf32: exact,
                   with the sampled gradient, with 64 penalized states; the last two
                   compiled too
    stacked/       16 runs on the quickstart's data at CORL's sizes, compiled
    run/           one run likewise, towards a million updates with 200 evaluations;
                   both are stopped when their time is up. timing.csv has rates, and the
                   seconds of evaluations
"""

import argparse
import csv
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TESTS = "tests/test_graph.py tests/test_agent.py tests/test_runs.py -k".split()
FLAGS = {
    "exact": {},
    "k1": {"cql_backward_actions": 1},
    "k1-s64": {"cql_backward_actions": 1, "cql_states": 64},
}
RUN = (
    "cql.py --env datasets/hopper-medium-small-v0 --max_timesteps 1000000 "
    "--eval_freq 5000 --precision tf32 --cql_backward_actions 1 --compile true "
    "--device cuda"
).split()


def within(seconds: float, path: Path, *command: str) -> None:
    """Run a Python command for so long at most; its output goes to the path. A SIGTERM
    lets it save."""
    print(f"{path.name}: {' '.join(command)}", flush=True)
    with open(path, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its own processes end with it
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                status = process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
    last = path.read_text().splitlines()[-3:]
    print(f"  ended with {status}:", *last, sep="\n  ", flush=True)


def measure(path: Path, device: str, precision: str) -> None:
    """speed.csv: of each case three rounds, after the graph's capture; then the kernels
    of each, since the profiler slows what comes after it."""
    import torch
    from speed import Case, cql_py

    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    cases = [(*each, False) for each in itertools.product(FLAGS, (1, 4, 16))]
    cases += [(name, n, True) for name in ("k1", "k1-s64") for n in (1, 16)]
    rows, steps = [], []
    for name, n_runs, compiled in cases:
        flags = {**FLAGS[name], "precision": precision, "compile": compiled}
        case = Case(n_runs=n_runs, loading=True, flags=flags)
        start = time.perf_counter()
        version, _, step = cql_py(case, device)
        seconds = timed(step, 10) / 10  # captured at the third
        started = time.perf_counter() - start
        updates = max(5, round(0.4 / seconds))
        about = {"case": name, "runs": n_runs, "compiled": compiled}
        about |= {"start_seconds": f"{started:.3g}", "precision": precision}
        about |= {"kernels": "", "busy_us": "", "gpu": gpu, "torch": version}
        for i in range(3):
            rate = updates / timed(step, updates)
            rows.append({**about, "round": i, "updates_per_s": f"{rate:.5g}"})
        steps.append(step)
        print(rows[-1], flush=True)
        write(path, rows)
    for i, step in enumerate(steps):
        counts = kernels(step, 5)
        for row in rows[3 * i : 3 * i + 3]:
            row.update(counts)
        write(path, rows)


def write(path: Path, rows: list) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def timed(step, n: int) -> float:
    """Seconds of n updates, to the end of the last."""
    import torch

    start = time.perf_counter()
    for _ in range(n):
        step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kernels(step, n: int) -> dict:
    """Kernels and copies of an update, and their microseconds, by torch's profiler."""
    import torch

    with torch.profiler.profile(acc_events=True) as profile:
        timed(step, n)
    count, busy = 0, 0.0
    for event in profile.events():  # calls on the host are among them
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count += 1
            busy += event.time_range.elapsed_us()
    return {"kernels": f"{count / n:.4g}", "busy_us": f"{busy / n:.4g}"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.out, *options.measure)
    try:
        import torch
        import xdist  # noqa: F401  # pytest's; the first part would fail without it
    except ImportError as error:
        parser.error(f"{error}: pip install -r requirements-dev.txt")
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    os.environ["WANDB_MODE"] = "disabled"
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes - 25  # left for the last to save
    share = (end - time.monotonic()) / 20
    tests = ["-m", "pytest", "-q", "-n", "8", *TESTS, "gpu or graph or block or device"]
    within(5 * share, out / "tests.txt", *tests)
    table = str(out / "speed.csv")
    arguments = ["--measure", "cuda", "tf32", "--out", table]
    within(6 * share, out / "speed.txt", "benchmarks/gpu.py", *arguments)
    seeds = ["--seed", str(list(range(16)))]
    stacked = [*RUN, *seeds, "--resume", str(out / "stacked")]
    within(3 * share, out / "stacked.txt", *stacked)
    left = max(30.0, end - time.monotonic())
    within(left, out / "run.txt", *RUN, "--resume", str(out / "run"))


if __name__ == "__main__":
    main()
