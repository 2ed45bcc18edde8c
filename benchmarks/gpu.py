"""Run every GPU measurement within nine minutes.

    python benchmarks/gpu.py --out gpu --minutes 9
    git show bd30250:cql.py > OLD.py
    python benchmarks/gpu.py --out gpu --old OLD.py --parts speed old

Needs the packages of the tests (requirements-dev.txt). The parts run one after another,
each within its share of the time:

    tests      tests.txt: the tests of graphs, noise and devices
    speed      speed.csv: updates per second, kernels of an update and how long they are
               busy, with 1, 4 and 16 runs at CORL's sizes in tf32: the exact gradient,
               the sampled one, 64 penalized states; compiled and not
    old        old.csv: the same with an older cql.py, --old: that of commit bd30250, or
               one with the same functions. Ratios are printed at the end
    stacked    stacked/: 16 runs on the quickstart's data at CORL's sizes, compiled
    run        run/: one such run, towards a million updates with 200 evaluations. Both
               are stopped when their time is up; timing.csv has the rates and how long
               evaluations took
"""

import argparse
import csv
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
# Case, runs, compiled or not: first what matters most, because time may run out.
CASES = [(name, runs, False) for runs in (1, 16) for name in FLAGS]
CASES += [(name, runs, True) for name in ("k1", "exact", "k1-s64") for runs in (1, 16)]
CASES += [(name, 4, False) for name in FLAGS]
PRECISIONS = {"cuda": "tf32", "cpu": "fp32"}
SHARES = {"tests": 4, "speed": 7, "old": 7, "stacked": 3, "run": 4}
RUN = (
    "cql.py --env datasets/hopper-medium-small-v0 --max_timesteps 1000000 "
    "--eval_freq 5000 --cql_backward_actions 1 --compile true"
).split()


def within(seconds: float, path: Path, *command: str) -> None:
    """Run a Python command for so many seconds at most, with its output in the path. At
    the end a SIGTERM lets it save."""
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


def measure(path: Path, device: str, file: Path, seconds: float) -> None:
    """Write a table of three rounds of each case, after the graph's capture. The kernels
    are counted at the end, because the profiler slows what comes after it. No case
    begins in the last quarter of the time."""
    import torch
    from speed import Case, cql_py

    end = time.monotonic() + 0.75 * seconds
    precision = PRECISIONS[device]
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    rows, steps = [], []
    for name, n_runs, compiled in CASES:
        if time.monotonic() > end:
            break
        torch._dynamo.reset()  # it compiles the same code for a few agents only
        flags = {**FLAGS[name], "precision": precision, "compile": compiled}
        case = Case(n_runs=n_runs, loading=True, flags=flags)
        start = time.perf_counter()
        version, _, step = cql_py(case, device, file)
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


def rates(path: Path) -> dict:
    """Return the middle of each case's rounds."""
    found = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            case = row["case"], row["runs"], row["compiled"]
            found.setdefault(case, []).append(float(row["updates_per_s"]))
    return {case: sorted(rounds)[len(rounds) // 2] for case, rounds in found.items()}


def compare(new: Path, old: Path) -> None:
    """Print the ratios of the cases that both tables have."""
    of_old = rates(old)
    print("| case | runs | compiled | cql.py | older | ratio |\n" + "|---" * 6 + "|")
    for case, rate in rates(new).items():
        if case in of_old:
            numbers = f"{rate:.4g} | {of_old[case]:.4g} | {rate / of_old[case]:.3f}"
            print(f"| {' | '.join(case)} | {numbers} |", flush=True)


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
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu"), help="the directory to write")
    add("--minutes", type=float, default=9.0, help="time for all parts")
    add("--old", type=Path, help="an older cql.py to compare with")
    add("--parts", nargs="+", choices=SHARES, help="some of the parts; all by default")
    add(
        "--device",
        default="cuda",
        help="cpu tries the script without a GPU",
        choices=PRECISIONS,
    )
    # In a process of its own, which takes --minutes too:
    add("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        seconds = 60 * options.minutes
        return measure(options.out, options.device, options.measure, seconds)
    try:
        import torch
        import xdist  # noqa: F401  # pytest's; the first part would fail without it
    except ImportError as error:
        parser.error(f"{error}: pip install -r requirements-dev.txt")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the script")
    if options.old and not options.old.is_file():
        parser.error(f"--old {options.old}: no such file; the docstring has the command")
    os.environ["WANDB_MODE"] = "disabled"
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)

    tests = ["-m", "pytest", "-q", "-n", "8", *TESTS, "gpu or graph or block or device"]
    seeds = ["--seed", str(list(range(16)))]
    device = ["--device", options.device]
    run = [*RUN, *device, "--precision", PRECISIONS[options.device], "--resume"]

    def measurement(file: Path, table: str) -> list:
        words = ["benchmarks/gpu.py", "--measure", file.absolute(), "--out", out / table]
        return [*map(str, words), *device]

    commands = {
        "tests": tests,
        "speed": measurement(ROOT / "cql.py", "speed.csv"),
        "old": measurement(options.old or ROOT, "old.csv"),
        "stacked": [*run, str(out / "stacked"), *seeds],
        "run": [*run, str(out / "run")],
    }
    parts = [part for part in SHARES if part in (options.parts or SHARES)]
    if not options.old:
        parts = [part for part in parts if part != "old"]
    end = time.monotonic() + 60 * options.minutes - 25  # left for the last to save
    for i, part in enumerate(parts):
        # A part gets its share of what the parts before it have left.
        left = sum(SHARES[each] for each in parts[i:])
        seconds = (end - time.monotonic()) * SHARES[part] / left
        command = commands[part]
        if part in ("speed", "old"):
            command += ["--minutes", f"{seconds / 60:.3f}"]
        within(max(5.0, seconds), out / f"{part}.txt", *command)
    if "old" in parts and (out / "speed.csv").exists() and (out / "old.csv").exists():
        compare(out / "speed.csv", out / "old.csv")


if __name__ == "__main__":
    main()
