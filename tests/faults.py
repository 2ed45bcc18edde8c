"""What happens to a run when something breaks: the script itself, run and broken many
times, and a table of what was tried, survived and lost.

    python tests/faults.py --times 20 > tests/FAULTS.md    # some ten minutes
    pytest -m slow tests/test_faults.py                    # the same, a few times each

A fault is survived if the exit status and the one line on stderr are those that the
README promises, the last good checkpoint is intact, and the same command afterwards ends
as a run that nothing befell: offline with the same bytes in metrics.csv and
evaluations.csv and the same checkpoint, online with every transition that a checkpoint
held. Nothing here needs a network; a full disk needs Linux's unprivileged mounts.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium as gym  # noqa: E402
import h5py  # noqa: E402
import torch  # noqa: E402
from make_data import Toy, little_memory, run, toy_dataset  # noqa: E402

SCRIPT = HERE.parent / "cql.py"
TABLES = ("metrics.csv", "evaluations.csv")
BASE = dict(
    device="cpu", hidden_dim=8, q_n_hidden_layers=2, batch_size=8, cql_n_actions=2,
    seed="[0,1]", cql_alpha=1, max_timesteps=4000, eval_freq=40, log_freq=10,
    n_episodes=1, eval_env="make_data:CqlToy-v0",
)  # fmt: skip


class Failing(Toy):
    """The toy environment that raises in its 200th step in this process."""

    steps = 0

    def step(self, action):
        Failing.steps += 1
        if Failing.steps == 200:
            raise RuntimeError("the simulator broke")
        return super().step(action)


if "CqlFailing-v0" not in gym.registry:
    gym.register("CqlFailing-v0", entry_point=Failing, max_episode_steps=20)


class Workshop:
    """A temporary directory with a dataset, and commands that train on it."""

    def __init__(self, root: Path, seed: int):
        self.root, self.rng = root, random.Random(seed)
        self.data = toy_dataset(root, ref_min_score=-5.0, ref_max_score=15.0)

    def argv(self, directory, **changes):
        values = {**BASE, "env": self.data, "resume": directory, **changes}
        return [f"--{name}={value}" for name, value in values.items()]

    def start(self, argv, before=(), **variables):
        return subprocess.Popen(
            [*before, sys.executable, str(SCRIPT), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.root,
            env={**os.environ, **variables},
        )

    def end(self, argv, **options):
        """Exit status, stdout and stderr of a run that is left alone."""
        process = self.start(argv, **options)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def whole(self, updates: int) -> Path:
        """The directory of a run that nothing befell."""
        directory = self.root / "whole"
        assert self.end(self.argv(directory, max_timesteps=updates))[0] == 0
        return directory


def saved(directory: Path) -> dict:
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def plain(value, skip=("resume", "wandb_ids", "eval_env")):
    """A checkpoint as something that == compares."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in skip}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.numpy().tobytes()]
    return repr(value)


def same(one: Path, other: Path) -> bool:
    for name in TABLES:
        if (one / name).read_bytes() != (other / name).read_bytes():
            return False
    return plain(saved(one)) == plain(saved(other))


def one_line(err: str, *fragments) -> bool:
    parts = all(part in err for part in fragments)
    return parts and err.count("\n") == 1 and "Traceback" not in err


def wait(shop: Workshop, process, ready) -> None:
    """Until ready() or the process has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "the run does not get on"


def kill(shop: Workshop, directory: Path, argv, in_a_save: bool) -> bool:
    """Start the command and kill it at a random moment; whether it was still alive."""
    path, rng = directory / "timing.csv", shop.rng
    lines = path.read_text().count("\n") if path.exists() else 0
    process, more = shop.start(argv), rng.randint(1, 12)
    count = lambda: path.read_text().count("\n") if path.exists() else 0  # noqa: E731
    wait(shop, process, lambda: count() >= lines + more)
    if in_a_save:
        wait(shop, process, (directory / "checkpoint.tmp").exists)
    time.sleep(rng.uniform(0, 0.002 if in_a_save else 0.05))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def killed_offline(shop: Workshop, times: int):
    """SIGKILL offline, every other one during a save; the end bit for bit"""
    whole, directory = shop.whole(BASE["max_timesteps"]), shop.root / "killed"
    argv = shop.argv(directory)
    killed = sum(kill(shop, directory, argv, bool(i % 2)) for i in range(times))
    assert shop.end(argv)[0] == 0
    return killed, killed * same(whole, directory)


def killed_online(shop: Workshop, times: int):
    """SIGKILL online; every transition that a checkpoint held is in the last"""
    directory = shop.root / "online"
    changes = {"max_timesteps": 80, "online_iterations": 6000, "eval_freq": 40}
    argv, held = shop.argv(directory, **changes, cql_alpha="1"), []
    killed = 0
    for i in range(times):
        killed += kill(shop, directory, argv, bool(i % 2))
        if (directory / "checkpoint.pt").exists():
            held.append(saved(directory)["replay"])
    status = shop.end(argv)[0]
    final, lost = saved(directory)["replay"], 0
    for replay in held:
        for r, n in enumerate(replay["added"]):
            lost += final["added"][r] < n
            for name, column in replay["columns"].items():
                lost += not torch.equal(column[r, :n], final["columns"][name][r, :n])
    return killed, killed * (status == 0 and lost == 0 and len(held) > 0)


def signalled(shop: Workshop, times: int):
    """SIGTERM and SIGINT: exit 143 and 130 after a checkpoint; the end bit for bit"""
    whole, survived = shop.whole(800), 0
    for i in range(times):
        directory = shop.root / f"signal{i}"
        number = (signal.SIGTERM, signal.SIGINT)[i % 2]
        argv = shop.argv(directory, max_timesteps=800)
        process = shop.start(argv)
        wait(shop, process, (directory / "timing.csv").exists)
        time.sleep(shop.rng.uniform(0, 0.3))
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        said = "interrupted at update" in out and err == ""
        noted = process.returncode == 128 + number and said
        survived += noted and shop.end(argv)[0] == 0 and same(whole, directory)
    return times, survived


def disk_full(shop: Workshop, times: int):
    """A full disk (a mount of some hundred kB): exit 1, one line; with room, on from
    the last checkpoint"""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        return 0, 0
    survived = 0
    for i in range(times):
        directory, copy = shop.root / f"disk{i}", shop.root / f"copy{i}"
        directory.mkdir()
        size = SCRIPT.stat().st_size // 1000 + shop.rng.randint(190, 340)
        mount = f"mount -t tmpfs -o size={size}k none {directory} && "
        mount += f'"$@"; status=$?; cp -r {directory} {copy}; exit $status'
        argv = shop.argv(directory, max_timesteps=10**6)
        before = ("unshare", "-rm", "sh", "-c", mount, "sh")
        status, _, err = shop.end(argv, before=before)
        said = status == 1 and one_line(err, "No space left")
        step = saved(copy)["step"]
        again = shop.end(shop.argv(copy, max_timesteps=step + 40))[0]
        survived += said and again == 0 and saved(copy)["step"] == step + 40
    return times, survived


def flipped(shop: Workshop, times: int):
    """A byte of a checkpoint changed: exit 2, one line, or a byte that says nothing"""
    directory, survived = shop.root / "flipped", 0
    argv = shop.argv(directory, max_timesteps=40)
    assert shop.end(argv)[0] == 0
    path = directory / "checkpoint.pt"
    good, want = path.read_bytes(), plain(saved(directory))
    for _ in range(times):
        place = shop.rng.randrange(len(good))
        bad = bytearray(good)
        bad[place] ^= 1 << shop.rng.randrange(8)
        path.write_bytes(bad)
        status, _, err = run(shop.argv(directory, max_timesteps=40))
        refused = status == 2 and one_line(err, "checkpoint")
        survived += refused or (status == 0 and plain(saved(directory)) == want)
    return times, survived


def truncated(shop: Workshop, times: int):
    """A checkpoint or dataset cut short: exit 2 and one line"""
    directory, survived = shop.root / "cut", 0
    assert shop.end(shop.argv(directory, max_timesteps=40))[0] == 0
    files = [directory / "checkpoint.pt", *shop.data.rglob("*.hdf5")]
    for i in range(times):
        path = files[i % 2]
        good = path.read_bytes()
        path.write_bytes(good[: shop.rng.randrange(len(good))])
        changes = {"resume": directory} if i % 2 == 0 else {"resume": shop.root / "n"}
        status, _, err = run(shop.argv(**{"directory": 0, **changes}, max_timesteps=40))
        path.write_bytes(good)
        survived += status == 2 and one_line(err)
    return times, survived


def damaged(shop: Workshop, times: int):
    """Bytes of a dataset changed: exit 2 and one line, or training (HDF5 has no
    checksums), or divergence; no traceback"""
    [path] = shop.data.rglob("*.hdf5")
    good, survived = path.read_bytes(), 0
    for i in range(times):
        bad = bytearray(good)
        for _ in range(20):
            bad[shop.rng.randrange(len(good))] = shop.rng.randrange(256)
        path.write_bytes(bad)
        changes = {"max_timesteps": 20, "log_freq": 5}
        status, _, err = run(shop.argv(shop.root / f"damaged{i}", **changes))
        survived += (status == 2 and one_line(err)) or (status in (0, 3) and err == "")
    path.write_bytes(good)
    return times, survived


def broken_simulator(shop: Workshop, times: int):
    """The environment raises during an evaluation: exit 1, one line; then on, bit for
    bit"""
    whole, survived = shop.whole(800), 0
    for i in range(times):
        directory = shop.root / f"broken{i}"
        bad = shop.argv(directory, max_timesteps=800, eval_env="faults:CqlFailing-v0")
        status, _, err = shop.end(bad)
        said = status == 1 and one_line(err, "the simulator broke")
        begun = saved(directory)["step"] > 0
        good = shop.argv(directory, max_timesteps=800)
        survived += said and begun and shop.end(good)[0] == 0 and same(whole, directory)
    return times, survived


def no_network(shop: Workshop, times: int):
    """wandb's server is out of reach: training goes on without it, and says so"""
    directory = shop.root / "wandb"
    variables = {"WANDB_MODE": "online", "WANDB_API_KEY": "a" * 40}
    variables |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "no_proxy": "*"}
    argv = shop.argv(directory, max_timesteps=80, seed=0)
    status, out, _ = shop.end(argv, **variables)
    said = "wandb: " in out and "not logging to it" in out
    return 1, int(status == 0 and said and saved(directory)["step"] == 80)


def two_at_once(shop: Workshop, times: int):
    """A second process at a live run: exit 2, one line; the first unharmed"""
    whole, survived = shop.whole(2000), 0
    for i in range(times):
        directory = shop.root / f"two{i}"
        argv = shop.argv(directory, max_timesteps=2000)
        first = shop.start(argv)
        wait(shop, first, (directory / "timing.csv").exists)
        first.send_signal(signal.SIGSTOP)  # so that it lives while the other looks
        status, _, err = shop.end(argv)
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=300)
        fine = first.returncode == 0 and same(whole, directory)
        survived += fine and status == 2 and one_line(err, "in use")
    return times, survived


# How often each is tried, as a share of --times, and at the least once.
FAULTS = {
    killed_offline: 1,
    killed_online: 1,
    signalled: 0.3,
    disk_full: 0.3,
    flipped: 10,
    truncated: 5,
    damaged: 5,
    broken_simulator: 0.1,
    no_network: 0.05,
    two_at_once: 0.1,
}


def broken(fault, times: int, seed: int = 0):
    """How often the fault was tried, and survived."""
    times = max(2, round(times * FAULTS[fault]))  # of two kinds, where there are
    with tempfile.TemporaryDirectory(prefix="cql-faults-") as root, little_memory():
        return fault(Workshop(Path(root), seed), times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        nargs="+",
        default=names,
        choices=names,
        metavar="FAULT",
        help=f"of {', '.join(names)}",
    )
    arguments = parser.parse_args()
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    print("What happens to a run when something breaks; see faults.py, which wrote this")
    print(f"with --times {arguments.times} --seed {arguments.seed}; {versions}, h5py")
    print(f"{h5py.__version__}.\n")
    print(
        "| fault, and what is asked for | tried | survived | lost |\n|---|---|---|---|"
    )
    total = 0
    for fault in FAULTS:
        if fault.__name__ in arguments.only:
            tried, survived = broken(fault, arguments.times, arguments.seed)
            total += tried - survived
            text = " ".join(fault.__doc__.split())
            print(f"| {text} | {tried} | {survived} | {tried - survived} |", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
