"""Updates per second of cql.py and of another implementation of CQL at the same sizes.

    python benchmarks/speed.py --peer-python PATH/TO/ITS/bin/python --peer d3rlpy
    python benchmarks/speed.py --peer-python ... --peer torchrl --cases hopper K50 R4
    git show bd30250:cql.py > OLD.py
    python benchmarks/speed.py --peer old --old OLD.py --cases hopper hopper-k1

Each side runs in its own process and interpreter on random data in memory. In a
`-loading` case it also draws its batches from a dataset, cql.py as its `train` does, by
CUDA graphs on a GPU (benchmarks/gpu.py measures those). The sides take turns (A B A B
...) and the idle one is stopped, so that a slow spell of the machine hits both. The
result is the median of the rounds' ratios. `--peer none` times cql.py alone.

--peer old compares with an older cql.py, which makes the same updates with the same
flags: that of commit bd30250, or one with the same functions. --peer eager compares a
`-compiled` case with the same one that is not compiled; start_s has the seconds of the
first updates, in which compiling happens.

d3rlpy 2.8.1 is set to the same sizes, Adam, learning rates, K, importance sampling and
penalty weight, without Lagrange (alpha_learning_rate 0) and entropy in the target; on a
GPU with compile_graph, its fastest mode. What its API has no switch for: its TD target
takes the policy's mode, where cql.py samples an action. Its critics step before its
actor, so the policy runs at s twice more. The proposals go through its critics in three
calls, the data's actions in two; in cql.py all in one, but for a `-k1` case. Its actor's
step also computes gradients of the critics and drops them. Its policy lacks the two
scalars on log_std, its weights start as torch's default. It reads each loss back to the
host. It has no stacked runs: with n_runs > 1 that many agents are updated in turn.

torchrl's CQLLoss (0.14) is set likewise and stepped as in torchrl's own offline example:
critics, then actor, then temperature. It evaluates the actions that the policy takes at
s' in s', not in s, and its policy has no scalars on log_std either.
"""

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WEIGHT, POLICY_LR, CRITIC_LR = 10.0, 3e-5, 3e-4
POOL, STORED = 16, 100_000  # prepared batches; transitions


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one comparison, and flags for cql.py alone."""

    observation_dim: int = 11
    action_dim: int = 3
    n_runs: int = 1
    n_actions: int = 10  # K
    batch_size: int = 256
    hidden: tuple = (256, 256, 256)
    n_critics: int = 2
    loading: bool = False
    flags: dict = dataclasses.field(default_factory=dict)


CASES = {
    "hopper": Case(),
    "hopper-loading": Case(loading=True),
    "hopper-4-runs": Case(n_runs=4),
    "hopper-K4": Case(n_actions=4),
    "ant": Case(observation_dim=111, action_dim=8),
    "humanoid": Case(observation_dim=348, action_dim=17),
    # Fewer digits, or a sampled gradient, against the peer's exact float32:
    "hopper-bf16": Case(flags={"precision": "bf16"}),
    "hopper-k1": Case(flags={"cql_backward_actions": 1}),
    "hopper-bf16-k1": Case(flags={"precision": "bf16", "cql_backward_actions": 1}),
    "hopper-k1-s128": Case(flags={"cql_backward_actions": 1, "cql_states": 128}),
    "hopper-k1-s64": Case(flags={"cql_backward_actions": 1, "cql_states": 64}),
    "hopper-bf16-k1-s64": Case(
        flags={"precision": "bf16", "cql_backward_actions": 1, "cql_states": 64}
    ),
    "hopper-4-runs-k1-s64": Case(
        n_runs=4, flags={"cql_backward_actions": 1, "cql_states": 64}
    ),
    # The quickstart's sizes, where there is less to save:
    **{
        f"quickstart{name}": Case(n_actions=4, hidden=(128, 128), flags=flags)
        for name, flags in {
            "": {},
            "-bf16": {"precision": "bf16"},
            "-k1": {"cql_backward_actions": 1},
            "-k1-s128": {"cql_backward_actions": 1, "cql_states": 128},
            "-k1-s64": {"cql_backward_actions": 1, "cql_states": 64},
            "-compiled": {"compile": True},
            "-k1-compiled": {"compile": True, "cql_backward_actions": 1},
        }.items()
    },
    # Stacked, as a sweep of the quickstart:
    "quickstart-5-runs": Case(
        n_runs=5, n_actions=4, hidden=(128, 128), flags={"cql_backward_actions": 1}
    ),
    # By torch.compile, whose minutes of start fall into the warm-up:
    "hopper-compiled": Case(flags={"compile": True}),
    "hopper-k1-compiled": Case(flags={"compile": True, "cql_backward_actions": 1}),
    "hopper-bf16-k1-s64-compiled": Case(
        flags={
            "compile": True,
            "precision": "bf16",
            "cql_backward_actions": 1,
            "cql_states": 64,
        }
    ),
    # One size at a time, the others as in "hopper" (R = 1, K = 10, O = 11):
    **{f"R{n}": Case(n_runs=n) for n in (4, 16)},
    **{f"K{n}": Case(n_actions=n) for n in (4, 50)},
    **{f"O{n}": Case(observation_dim=n) for n in (17, 111, 348)},
}


def random_data(case: Case, *shape: int) -> dict:
    """float32 transitions of the leading shape, under D4RL's names."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((2, *shape, case.observation_dim), np.float32)
    actions = rng.uniform(-1, 1, (*shape, case.action_dim)).astype(np.float32)
    rewards = rng.standard_normal(shape, np.float32)
    ends = (np.arange(rewards.size) % 1000 == 999).reshape(shape).astype(np.float32)
    names = "observations actions rewards next_observations terminals".split()
    return dict(zip(names, (states[0], actions, rewards, states[1], ends)))


def stored_data(case: Case) -> dict:
    """A dataset, whose next observations both sides find by index."""
    data = random_data(case, STORED)
    del data["next_observations"]
    return data


# A peer takes a case and a device. It returns its version, the number of parameters that
# it trains, and the function to time, which makes one update of every run.


def load_cql(file: Path):
    """Import a cql.py from its file."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_by_path", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eager(case: Case, device: str):
    """cql.py without torch.compile."""
    return cql_py(
        dataclasses.replace(case, flags={**case.flags, "compile": False}), device
    )


def cql_py(case: Case, device: str, file: Path = ROOT / "cql.py"):
    import torch
    from gymnasium.spaces import Box

    cql = load_cql(Path(file))
    config = cql.TrainConfig(
        seed=list(range(case.n_runs)), batch_size=case.batch_size, cql_alpha=WEIGHT,
        hidden_dim=case.hidden[0], q_n_hidden_layers=len(case.hidden),
        cql_n_actions=case.n_actions, n_critics=case.n_critics, policy_lr=POLICY_LR,
        qf_lr=CRITIC_LR, device=device, **{"compile": False, **case.flags},
    )  # fmt: skip
    cql.keep_freed_memory()  # as `train` does
    device = cql.pick_device(config)
    observation_space = Box(-np.inf, np.inf, (case.observation_dim,))
    task = cql.make_task(observation_space, Box(-1, 1, (case.action_dim,)))
    agent = cql.make_agent(config, task, device)
    size = sum(p.numel() for g in agent.optimizer.param_groups for p in g["params"])
    numbers = itertools.count()

    def draw():
        if hasattr(agent, "updates"):  # an older agent counts by itself
            return agent.draw(case.batch_size)
        return agent.draw(next(numbers), case.batch_size)

    if case.loading:
        return (
            torch.__version__,
            size,
            training_step(cql, agent, draw, stored_data(case)),
        )
    arrays = random_data(case, POOL, case.n_runs, case.batch_size)
    arrays["terminations"] = arrays.pop("terminals")
    tensors = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
    batches = [{k: v[i] for k, v in tensors.items()} for i in range(POOL)]
    if hasattr(cql, "Batch"):  # an older file's
        batches = [cql.Batch(**batch) for batch in batches]
    pool = itertools.cycle(batches)
    return torch.__version__, size, lambda: agent.update(next(pool), draw())


def training_step(cql, agent, draw, arrays: dict):
    """Return a step of `train` on these arrays, on a GPU by its CUDA graphs."""
    import h5py

    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/random.hdf5"
        with h5py.File(path, "w") as file:
            file.update(arrays)
        episodes, _ = cql.read_episodes(path)
    data = cql.Dataset(agent.config, episodes, agent.task, agent.device)
    replay = cql.Replay(agent.config, data, agent)
    metrics = cql.Metrics(agent.device)
    older = hasattr(agent, "updates")
    stage = () if older else ((False, True),)  # no cloning; the targets move

    def step(noise, stage=None):
        fractions = noise.fractions if older else noise["fractions"]
        metrics.add(agent.update(replay.sample(fractions), noise))

    do_step = step
    if agent.device.type == "cuda":
        parts = (agent, metrics) if older else (agent, metrics, replay)
        do_step = cql.GraphedStep(step, *parts)
    return lambda: do_step(draw(), *stage)


def d3rlpy(case: Case, device: str):
    import d3rlpy
    import torch

    encoder = d3rlpy.models.VectorEncoderFactory
    config = d3rlpy.algos.CQLConfig(
        batch_size=case.batch_size, n_critics=case.n_critics, conservative_weight=WEIGHT,
        n_action_samples=case.n_actions, alpha_learning_rate=0.0, soft_q_backup=False,
        actor_learning_rate=POLICY_LR, temp_learning_rate=POLICY_LR,
        critic_learning_rate=CRITIC_LR, critic_encoder_factory=encoder([*case.hidden]),
        actor_encoder_factory=encoder([case.hidden[0]] * 3),
        compile_graph=device.startswith("cuda"),
    )  # fmt: skip
    agents = [config.create(device=device) for _ in range(case.n_runs)]
    for agent in agents:
        agent.create_impl((case.observation_dim,), case.action_dim)
    nets = [(a.impl.policy, a.impl.q_function, a.impl.modules.log_temp) for a in agents]
    size = sum(p.numel() for net in itertools.chain(*nets) for p in net.parameters())
    if case.loading:
        dataset = d3rlpy.dataset.MDPDataset(**stored_data(case))
        draw = lambda: dataset.sample_transition_batch(case.batch_size)  # noqa: E731
    else:
        shape = (POOL * case.n_runs, case.batch_size)
        data = {k: v.reshape(*shape, -1) for k, v in random_data(case, *shape).items()}
        data |= {"next_actions": data["actions"], "intervals": data["rewards"] ** 0}
        rows = [{k: v[i] for k, v in data.items()} for i in range(shape[0])]
        batch = d3rlpy.dataset.TransitionMiniBatch
        draw = itertools.cycle([batch(**row, transitions=[]) for row in rows]).__next__
    version = f"{torch.__version__}, d3rlpy {d3rlpy.__version__}"
    return version, size, lambda: [agent.update(draw()) for agent in agents]


def torchrl(case: Case, device: str):
    import torch
    import torchrl
    from tensordict import TensorDict
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.data import Bounded
    from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import CQLLoss, SoftUpdate

    if case.n_critics != 2 or case.loading or case.flags:
        raise SystemExit("torchrl: two critics and prepared batches only")
    O, A = case.observation_dim, case.action_dim  # noqa: E741

    def one():
        def mlp(n_in, n_out, cells):
            relu = torch.nn.ReLU
            net = {"in_features": n_in, "out_features": n_out, "num_cells": cells}
            return MLP(**net, activation_class=relu, device=device)

        outputs = {"in_keys": ["observation"], "out_keys": ["loc", "scale"]}
        net = mlp(O, 2 * A, [case.hidden[0]] * 3)
        net = TensorDictModule(
            torch.nn.Sequential(net, NormalParamExtractor()), **outputs
        )
        actor = ProbabilisticActor(
            net, in_keys=["loc", "scale"], spec=Bounded(-1, 1, (A,), device=device),
            distribution_class=TanhNormal, return_log_prob=True,
        )  # fmt: skip
        critic = mlp(O + A, 1, list(case.hidden))
        critic = ValueOperator(critic, in_keys=["observation", "action"])
        loss = CQLLoss(
            actor, critic, loss_function="l2", num_random=case.n_actions,
            min_q_weight=WEIGHT,
        ).to(device)  # fmt: skip
        loss.make_value_estimator(gamma=0.99)
        target, adam = SoftUpdate(loss, tau=0.005), torch.optim.Adam
        critics = list(loss.qvalue_network_params.flatten_keys().values())
        actors = list(loss.actor_network_params.flatten_keys().values())
        steps = adam(critics, CRITIC_LR), adam(actors, POLICY_LR)
        steps = *steps, adam([loss.log_alpha], POLICY_LR)

        def update(batch):
            batch = batch.copy()

            def descend(step, loss):
                step.zero_grad()
                loss.backward()
                step.step()

            descend(steps[0], loss.q_loss(batch)[0] + loss.cql_loss(batch)[0])
            actor_loss, metadata = loss.actor_loss(batch)
            descend(steps[1], actor_loss)
            descend(steps[2], loss.alpha_loss(metadata)[0])
            target.step()

        return sum(p.numel() for p in critics + actors) + 1, update

    agents = [one() for _ in range(case.n_runs)]
    arrays = random_data(case, POOL * case.n_runs, case.batch_size)
    tensors = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
    batches = []
    for i in range(POOL * case.n_runs):
        row = {k: v[i] for k, v in tensors.items()}
        done = row["terminals"].bool().unsqueeze(-1)
        following = {"observation": row["next_observations"], "done": done}
        following |= {"terminated": done, "reward": row["rewards"].unsqueeze(-1)}
        state = {"observation": row["observations"], "action": row["actions"]}
        batches.append(TensorDict(state | {"next": following}, [case.batch_size]))
    draw = itertools.cycle(batches).__next__
    version = f"{torch.__version__}, torchrl {torchrl.__version__}"
    size = sum(size for size, _ in agents)
    return version, size, lambda: [update(draw()) for _, update in agents]


PEERS = {
    "cql.py": cql_py,
    "old": cql_py,
    "eager": eager,
    "d3rlpy": d3rlpy,
    "torchrl": torchrl,
}


def work(peer: str, case: dict, device: str, threads: int, old: str) -> None:
    """Be a worker: say what it is, then answer `run N` with the seconds of N updates and
    the peak memory so far, in MiB of the process and of the GPU."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like
    import torch

    torch.set_num_threads(threads)
    file = {"file": Path(old)} if peer == "old" else {}
    version, size, step = PEERS[peer](Case(**case), device, **file)
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    about = {"torch": version, "parameters": size, "gpu": gpu}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line.split()[1])):
            step()
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10]
        peaks += [torch.cuda.max_memory_allocated() / 2**20] if gpu else [0.0]
        print(json.dumps([seconds, *peaks]), file=answers, flush=True)


def ask(worker: subprocess.Popen, *words):
    """Send words, wait for the answer, stop the worker: its idle threads might spin."""
    worker.send_signal(signal.SIGCONT)
    print(*words, file=worker.stdin, flush=True, end="\n" if words else "")
    answer = worker.stdout.readline()
    worker.send_signal(signal.SIGSTOP)
    return json.loads(answer)


def compare(name: str, options):
    """Measure one case; yields a row for each round and peer."""
    peers = {"cql.py": sys.executable}
    if options.peer != "none":
        peers[options.peer] = options.peer_python
    workers, abouts, updates, ratios = {}, {}, {}, []
    case = dataclasses.asdict(CASES[name])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    cache = tempfile.TemporaryDirectory()  # so that compiling starts from nothing
    env["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    try:
        for peer, python in peers.items():
            spec = [peer, case, options.device, options.threads, str(options.old)]
            spec = json.dumps(spec)
            command = [python, __file__, "--work", spec]
            workers[peer] = worker = subprocess.Popen(command, env=env, **pipes)
            abouts[peer] = ask(worker)
            abouts[peer]["start_s"] = round(ask(worker, "run", options.warmup)[0], 2)
            rate = options.warmup / ask(worker, "run", options.warmup)[0]
            updates[peer] = max(1, round(options.seconds * rate))
            print(f"{name}: {peer}: {abouts[peer]}, {updates[peer]} updates a round")
        for i in range(options.rounds):
            rates = {}
            for peer, worker in workers.items():
                seconds, *peaks = ask(worker, "run", updates[peer])
                rates[peer] = rate = updates[peer] / seconds
                row = {"case": name, "round": i, "peer": peer, "updates": updates[peer]}
                row |= {"seconds": f"{seconds:.6g}", "updates_per_s": f"{rate:.6g}"}
                row |= dict(zip(("peak_mb", "peak_gpu_mb"), map(round, peaks)))
                yield row | abouts[peer]
            text = ", ".join(f"{peer} {rate:.2f}/s" for peer, rate in rates.items())
            if options.peer != "none":
                ratios.append(rates["cql.py"] / rates[options.peer])
                text += f", ratio {ratios[-1]:.3f}"
            print(f"{name}: round {i}: {text}", flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
        cache.cleanup()
    if ratios:
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{name}: median ratio {np.median(ratios):.3f} ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--peer", default="d3rlpy", choices=["d3rlpy", "torchrl", "old", "eager", "none"]
    )
    add("--peer-python", default=sys.executable, help="interpreter that has the peer")
    add("--old", type=Path, help="the older cql.py, of --peer old")
    add(
        "--cases",
        nargs="+",
        default=["hopper"],
        choices=CASES,
        metavar="CASE",
        help=f"of {', '.join(CASES)}",
    )
    add("--threads", type=int, default=os.cpu_count(), help="of each side")
    add("--device", default="cpu")
    add("--rounds", type=int, default=10)
    add("--warmup", type=int, default=5, help="updates, twice, before the rounds")
    add("--seconds", type=float, default=5.0, help="of a turn, about")
    add("--out", type=Path, default=Path("speed.csv"), help="the table to write")
    add("--work", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    if options.peer == "old" and not (options.old and options.old.is_file()):
        parser.error(f"--old {options.old}: no such file; pass the older cql.py")
    module = options.peer if options.peer in ("d3rlpy", "torchrl") else "torch"
    check = [options.peer_python, "-c", f"import {module}"]
    try:
        subprocess.run(check, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        parser.error(f"--peer-python {options.peer_python}: has no {module}")
    check = [sys.executable, "-c", f"import torch; torch.ones(1).to('{options.device}')"]
    if subprocess.run(check, capture_output=True).returncode:
        parser.error(f"--device {options.device}: not here")
    describe = f"git -C {ROOT} describe --always --dirty --exclude=*".split()
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    about = {"device": options.device, "threads": options.threads, "cpu": cpu}
    about |= {"cores": os.cpu_count(), "commit": commit}
    print(about)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.cases:  # the table after each case, for who stops in the middle
        rows += [row | about for row in compare(name, options)]
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
