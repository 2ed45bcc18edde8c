"""All that wants a GPU, in nine minutes.

    python benchmarks/gpu.py --out gpu --minutes 9

Needs what the tests need (requirements-dev.txt). One after the other, each within its
share of the time, so that all have their turn:

    tests.txt     the tests of graphs, noise and devices
    kernels.txt   kernels of one update, exact and with cql_backward_actions 1
    speed.csv     updates a second of 1, 4 and 16 runs: exact, with the sampled
                  gradient, with 64 penalized states; two of them compiled
    run/          the quickstart's data at CORL's sizes towards a million updates with
                  200 evaluations, stopped when the time is up: its tables and what it
                  printed. timing.csv has the rate, and the share of the evaluations
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TESTS = "tests/test_graph.py tests/test_agent.py tests/test_runs.py -k".split()
CASES = []
for runs in (1, 4, 16):
    CASES += [f"graph-R{runs}{kind}" for kind in ("", "-k1", "-k1-s64")]
CASES += ["graph-R1-compiled", "graph-R16-k1-compiled"]
RUN = (
    "cql.py --env datasets/hopper-medium-small-v0 --max_timesteps 1000000 "
    "--eval_freq 5000 --precision tf32 --cql_backward_actions 1 --device cuda"
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


def count_kernels() -> None:
    """Of a fifth update, by torch's profiler."""
    import torch

    import cql

    for k in (0, 1):
        data_set = str(ROOT / "datasets/hopper-medium-small-v0")
        config = cql.TrainConfig(env=data_set, cql_backward_actions=k)
        data, task, _ = cql.load(config, None, torch.device("cuda"))
        agent = cql.make_agent(config, task, "cuda", data.statistics())
        for _ in range(5):
            noise = agent.draw(config.batch_size)
            batch = data.sample(noise.fractions)
            activities = [torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                agent.update(batch, noise)
                torch.cuda.synchronize()
        kernels = 0
        for event in profile.key_averages():  # calls on the host are among them
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels += event.count
        print(f"cql_backward_actions {k}: {kernels} kernels and copies")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kernels:
        return count_kernels()
    import pytest  # noqa: F401  # the first part would fail without it
    import torch

    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    os.environ["WANDB_MODE"] = "disabled"
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes - 25  # left for the last to save
    share = (end - time.monotonic()) / 20
    tests = ["-m", "pytest", "-q", "-n", "8", *TESTS, "gpu or graph or block or device"]
    within(6 * share, out / "tests.txt", *tests)
    within(1 * share, out / "kernels.txt", "benchmarks/gpu.py", "--kernels")
    speed = ["benchmarks/speed.py", "--peer", "none", "--device", "cuda"]
    speed += ["--rounds", "3", "--seconds", "2", "--warmup", "20"]
    speed += ["--out", str(out / "speed.csv"), "--cases", *CASES]
    within(8 * share, out / "speed.txt", *speed)
    left = max(30.0, end - time.monotonic())
    within(left, out / "run.txt", *RUN, "--resume", str(out / "run"))


if __name__ == "__main__":
    main()
