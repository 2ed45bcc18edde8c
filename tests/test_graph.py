"""Tests of updates by CUDA graphs, and of what a graph requires of an update.

A graph cannot be made without a GPU. Here tensordict's CudaGraphModule runs with a
substitute for the driver: it records what the captured function launches and launches it
again, on the same memory with the same numbers."""

import copy
import importlib.util
import io
import re
import shutil
import sys
import warnings
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensordict.nn
import torch
import torch._inductor.config
import yaml
from make_data import arguments, d4rl_file, random_episodes
from make_data import run as command
from reference import tiny, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cql

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STAGES = dict(bc_steps=5, target_update_period=3)
# The online phase changes what a graph reads: the buffer, its sizes, the weight.
ONLINE = dict(online_iterations=40, cql_alpha_online=0.5, cal_ql=True)
REDQ = dict(n_critics=3, n_target_critics=2)
MODES = [
    {},
    STAGES,
    dict(cql_backward_actions=1),
    dict(cql_backward_actions=1, cql_states=3),
    dict(precision="bf16"),
    dict(cql_lagrange=True, cql_target_action_gap=1.0),
    dict(cql_max_target_backup=True, backup_entropy=True, penalty="policy_kl"),
    dict(use_automatic_entropy_tuning=False, penalty="mean"),
    REDQ,
    dict(n_steps=3, policy_average_rate=0.2, trajectory_weighting=5.0, bc_weight=0.4),
    ONLINE,
    {**ONLINE, "n_steps": 2, "policy_average_rate": 0.1},
    {**ONLINE, "mixing_ratio": 0.5, "trajectory_weighting": 5.0},
    {**ONLINE, "mixing_ratio": 0.5, "cql_backward_actions": 1},
    {**REDQ, "discrete": True, "cql_lagrange": True},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """D4RL files with continuous actions (False) and three discrete ones (True)."""
    root = tmp_path_factory.mktemp("data")
    episodes, rng = random_episodes([30, 20]), np.random.default_rng(0)
    files = {False: d4rl_file(root / "x.hdf5", episodes)}
    for episode in episodes:
        episode["actions"] = rng.integers(3, size=len(episode["rewards"]))
    files[True] = d4rl_file(root / "d.hdf5", episodes)
    return files


def trainer_of(files, device="cpu", discrete=False, **flags):
    """A new agent of two runs, with the `step` that `train` has."""
    values = dict(env=str(files[discrete]), batch_size=8, seed=[0, 1])
    config = tiny(**{**values, **flags})
    episodes, task = cql.read_data(config)
    data = cql.Dataset(config, episodes, task, device)
    agent = cql.make_agent(config, task, device)
    replay, metrics = cql.Replay(config, data, agent), cql.Metrics(device)

    def step(noise, stage):
        batch = replay.sample(noise["fractions"])
        metrics.add(agent.update(batch, noise, *stage))

    parts = dict(agent=agent, replay=replay, metrics=metrics, step=step, updates=0)
    return SimpleNamespace(**parts)


def graphed(trainer, step=None):
    """The same trainer, but its step runs by graphs."""
    parts = trainer.agent, trainer.metrics, trainer.replay
    trainer.step = cql.GraphedStep(step or trainer.step, *parts)
    return trainer


def run(trainer, n):
    """Make n updates."""
    for _ in range(n):
        noise = trainer.agent.draw(trainer.updates, 8)
        trainer.step(noise, cql.stage_of(trainer.agent.config, trainer.updates))
        trainer.updates += 1
    return trainer


def go_online(trainer, n=12):
    """Set the online weight and add n steps of both runs, as between updates; the first
    half of run 0's steps is an episode."""
    agent, replay = trainer.agent, trainer.replay
    agent.sweep["cql_alpha"].fill_(agent.config.cql_alpha_online)
    rng = np.random.default_rng(n)
    for t in range(n):
        columns = {}
        for name in cql.COLUMNS[:5]:
            columns[name] = rng.uniform(-1, 1, (2, *agent.column_sizes[name]))
        replay.add([0, 1], columns)
        if t == n // 2:
            replay.end_episode(0, [1.0] * t)


def assert_same(trainer, other, **tolerance):
    """Assert equal parameters, moments and metrics; without tolerance, bit for bit."""
    exact = dict(rtol=0, atol=0)
    states = []
    for each in (trainer, other):
        moments = each.agent.get_extra_state()["optimizer"]
        sums = each.metrics.sums
        states.append([trained(each.agent), moments, sums, each.metrics.count])
    torch.testing.assert_close(*states, **(tolerance or exact))
    assert trainer.metrics.names == other.metrics.names
    assert trainer.updates == other.updates


# --- a substitute for the driver ------------------------------------------------------


class Recorded(TorchDispatchMode):
    """Records what is launched inside. `replay` launches it again on the same memory
    with the same numbers, whatever Python would do by then."""

    def __enter__(self):
        self.calls, self.before = [], []
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():  # a capture runs nothing
            for tensor, value in reversed(self.before):
                tensor.copy_(value)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, op._schema
        if op.namespace == "profiler":
            return op(*args, **kwargs)
        assert op is not torch.ops.aten._local_scalar_dense.default  # a host sync
        assert torch.Tag.nondeterministic_seeded not in op.tags  # drawn outside
        slots = {argument.name: argument.alias_info for argument in schema.arguments}
        given = {**dict(zip(slots, args)), **kwargs}
        writes = [name for name in given if slots[name] and slots[name].is_write]
        for name in writes:
            for tensor in tree_leaves(given[name]):
                self.before.append((tensor, tensor.detach().clone()))
        out = op(*args, **kwargs)
        view = any(result.alias_info for result in schema.returns)
        if writes or not view:
            self.calls.append((op, args, kwargs, [] if writes else tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self):
        for op, args, kwargs, places in self.calls:
            for place, result in zip(places, tree_leaves(op(*args, **kwargs))):
                if place is not None:  # an output that was not asked for
                    place.copy_(result)


class Stream:
    """A stream of the driver. On a CPU everything is in order without it."""

    def wait_stream(self, other):
        pass


class GraphOnCPU(tensordict.nn.CudaGraphModule):
    """tensordict's module, which believes that there is CUDA; counts its replays."""

    def __init__(self, module, warmup):
        with warnings.catch_warnings(action="ignore"):  # that there is none
            super().__init__(module, warmup=warmup)
        self._has_cuda, self.replays = True, 0
        self._warmup_stream = self._capture_stream = Stream()
        self._warmup_stream_cm = nullcontext

    _check_device_and_clone = tensordict.nn.CudaGraphModule._clone

    def __call__(self, *args):
        self.replays += self.counter == self._warmup
        return super().__call__(*args)


def use_cpu(monkeypatch):
    """Run graphs on the CPU for the rest of the test."""
    monkeypatch.setattr(tensordict.nn, "CudaGraphModule", GraphOnCPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)


@pytest.fixture
def on_cpu(monkeypatch):
    use_cpu(monkeypatch)


def replays(trainer):
    return {stage: graph.replays for stage, graph in trainer.step.graphs.items()}


# --- replays --------------------------------------------------------------------------


def test_replays_are_updates(files, on_cpu, capsys):
    """40 updates in four stages equal plain ones. Each stage is warmed up by three eager
    updates and then replayed."""
    plain = run(trainer_of(files, **STAGES), 40)
    captured = run(graphed(trainer_of(files, **STAGES)), 40)
    # Of 5 cloning updates 1 moves targets, of 35 others 12 do.
    counts = {(True, False): 1, (True, True): 0, (False, False): 20, (False, True): 9}
    assert replays(captured) == counts
    assert_same(captured, plain)
    assert captured.updates == captured.metrics.count == 40
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_replays_in_every_mode(files, on_cpu, flags):
    """Also across a row of metrics and the loading of an agent's state."""
    plain, captured = trainer_of(files, **flags), graphed(trainer_of(files, **flags))
    for trainer in (plain, captured):
        run(trainer, 8)
        state = copy.deepcopy(trainer.agent.state_dict())
        trainer.metrics.reset()
        run(trainer, 6)
        trainer.agent.load_state_dict(state)
        trainer.updates = 8
        run(trainer, 6)
    assert_same(captured, plain)
    assert captured.step.works and sum(replays(captured).values()) >= 6


@pytest.mark.parametrize("ratio", [-1, 0.5])
def test_replays_see_the_online_phase(files, on_cpu, ratio):
    """What changes between updates changes in place, so that a graph reads it."""
    flags = {**ONLINE, "mixing_ratio": ratio}
    plain, captured = trainer_of(files, **flags), graphed(trainer_of(files, **flags))
    for trainer in (plain, captured):
        run(trainer, 8)
        go_online(trainer)
        run(trainer, 4)
        go_online(trainer, 35)  # the ring buffer starts over
        run(trainer, 8)
    assert captured.step.works and sum(replays(captured).values()) == 17
    assert_same(captured, plain)
    offline = run(trainer_of(files, **flags), 20)
    weights = [each.agent.critic.net[0].weight for each in (offline, plain)]
    assert not torch.equal(*weights)


def test_a_diverged_run_does_not_end_the_graph(files, on_cpu, capsys):
    """Its metrics are NaN with and without a graph; the other run trains by replays."""
    plain, captured = trainer_of(files), graphed(trainer_of(files))
    for trainer in (plain, captured):
        with torch.no_grad():
            trainer.agent.policy.net[0].weight[1].fill_(torch.nan)
        run(trainer, 10)
    assert captured.metrics.sums[1].isnan().any()
    assert_same(captured, plain, rtol=0, atol=0, equal_nan=True)
    assert sum(replays(captured).values()) == 7 and capsys.readouterr().out == ""


def test_without_cuda_the_real_one_passes_through(files):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    plain, captured = trainer_of(files), graphed(trainer_of(files))
    with pytest.warns(UserWarning, match="CUDA"):
        run(captured, 8)
    assert_same(captured, run(plain, 8))


def load_copy(path, text):
    """Write a copy of cql.py and return its module."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"copy_{path.parent.name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_graphs(text):
    """Change the text of cql.py so that it trains by graphs on any device."""
    condition = r'if device.type == "cuda":(?=\s+\w+ = GraphedStep)'
    text, n = re.subn(condition, "if True:", text)
    assert n == 1
    return text


def train_copy(module, directory, **flags):
    """Train by a copy of cql.py; return the agent's state and the tables' text."""
    values = {**flags, "resume": directory}
    with redirect_stdout(io.StringIO()) as out:
        status = module.main(arguments(**values))
    assert status == 0 and "CUDA graph" not in out.getvalue(), out.getvalue()
    tables = []
    for name in ("metrics.csv", "evaluations.csv"):
        path = Path(directory) / name
        tables.append(path.read_text() if path.exists() else "")
    payload = torch.load(Path(directory) / "checkpoint.pt", weights_only=True)
    return payload["agent"], tables


@pytest.mark.parametrize("flags", [STAGES, {**ONLINE, "utd": 2}], ids=str)
def test_the_command_by_graphs(files, on_cpu, tmp_path, flags):
    """Rows and weights are those of plain updates, also of a resumed run, and across
    several checks of the graphs."""
    text = with_graphs(Path(cql.__file__).read_text())
    captured = load_copy(tmp_path / "cql.py", text)
    captured.GraphedStep.CHECK_EVERY = 7
    flags = {**flags, "env": files[False], "seed": [0, 1], "max_timesteps": 50}
    flags |= {"eval_env": "CqlToy-v0", "eval_freq": 14, "log_freq": 7}
    if "online_iterations" not in flags:  # 28 is on the schedule of both tables
        train_copy(captured, tmp_path / "graphs", **{**flags, "max_timesteps": 28})
    agent, tables = train_copy(captured, tmp_path / "graphs", **flags)
    plain, plain_tables = train_copy(cql, tmp_path / "plain", **flags)
    assert tables == plain_tables
    torch.testing.assert_close(agent, plain, rtol=0, atol=0)


# --- the check of replays -------------------------------------------------------------


@pytest.mark.parametrize("network", ["policy", "critic", "target_critic"])
def test_a_graph_that_loses_a_step_is_found(files, on_cpu, capsys, network):
    """The metrics are those before the step, so they alone would not tell."""
    plain, captured = trainer_of(files), trainer_of(files)
    step, stage = captured.step, (False, True)
    graphed(captured)

    def forgetful(noise):
        weights = list(getattr(captured.agent, network).parameters())
        before = [weight.detach().clone() for weight in weights]
        step(noise, stage)
        with torch.no_grad():
            for weight, value in zip(weights, before):
                weight.copy_(value)

    run(plain, 2)
    run(captured, 1)
    captured.step.graphs[stage] = forgetful
    captured.step.checked(captured.agent.draw(1, 8), stage)
    assert not captured.step.works and "differ" in capsys.readouterr().out
    torch.testing.assert_close(trained(captured.agent), trained(plain.agent))


@pytest.mark.parametrize("changes_at", [3, 4])
@pytest.mark.parametrize("sums_of", [2, 2000])
def test_a_number_that_a_graph_froze_is_found(
    files, on_cpu, capsys, changes_at, sums_of
):
    """At either of the first two replays, calls 4 and 5, however many updates the sums
    of the metrics hold. Training then equals training without graphs, and one line
    reports it."""
    trainers = plain, captured = trainer_of(files), trainer_of(files)

    def step_of(trainer):
        agent, replay, metrics = trainer.agent, trainer.replay, trainer.metrics

        def step(noise, stage):
            batch = replay.sample(noise["fractions"])
            scale = 1.0 if trainer.updates < changes_at else 1.2  # a Python float
            batch["rewards"] = batch["rewards"] * scale
            metrics.add(agent.update(batch, noise, *stage))

        return step

    plain.step = step_of(plain)
    graphed(captured, step_of(captured))
    for trainer in trainers:
        run(trainer, 2)
        trainer.metrics.sums *= sums_of / 2
        run(trainer, 8)
    assert_same(captured, plain)
    assert not captured.step.works
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "graph" in out and "differ" in out


def check_every(monkeypatch, n):
    """Check graphs every n calls; return the list that the numbers of checks go to."""
    assert cql.GraphedStep.CHECK_EVERY == 1000
    monkeypatch.setattr(cql.GraphedStep, "CHECK_EVERY", n)
    checked, check = [], cql.GraphedStep.checked

    def noted(step, noise, stage):
        checked.append(step.calls[stage])
        check(step, noise, stage)

    monkeypatch.setattr(cql.GraphedStep, "checked", noted)
    return checked


LATER = [
    ({}, 3),
    (STAGES, 2),
    ({**REDQ, "discrete": True, "cql_lagrange": True}, 3),
    ({**ONLINE, "mixing_ratio": 0.5}, 3),
]


@pytest.mark.parametrize("flags, n_checks", LATER, ids=str)
def test_later_checks_change_nothing(
    files, on_cpu, monkeypatch, capsys, flags, n_checks
):
    """A run across several checks is bit for bit that of plain updates, and silent."""
    checked = check_every(monkeypatch, 10)
    plain, captured = trainer_of(files, **flags), graphed(trainer_of(files, **flags))
    for trainer in (plain, captured):
        run(trainer, 17)
        if "online_iterations" in flags:
            go_online(trainer)
        run(trainer, 16)
    assert_same(captured, plain)
    assert sum(call % 10 == 0 for call in checked) == n_checks
    assert captured.step.works and capsys.readouterr().out == ""


def penalty_schedule(trainer, weight_at):
    """Scale the penalty by a Python float inside the losses."""
    losses = trainer.agent.losses

    def scheduled(weights, batch, noise, sweep, cloning):
        weight = sweep["cql_alpha"] * weight_at(trainer.updates)
        sweep = {**sweep, "cql_alpha": weight}
        return losses(weights, batch, noise, sweep, cloning)

    trainer.agent.losses = scheduled


def learning_rate_schedule(trainer, weight_at):
    """Scale the critics' learning rate, a Python float, before each update."""
    update, group = trainer.agent.update, trainer.agent.optimizer.param_groups[1]

    def scheduled(*inputs):
        group["lr"] = 1e-2 * weight_at(trainer.updates)
        return update(*inputs)

    trainer.agent.update = scheduled


def target_rate_schedule(trainer, weight_at):
    """Scale the rate of the targets' Polyak averaging, a Python float."""
    agent, move, config = trainer.agent, trainer.agent.move_targets, trainer.agent.config

    def scheduled():
        config.soft_target_update_rate = 0.5 * weight_at(trainer.updates)
        move()

    agent.move_targets = scheduled


SCHEDULES = [penalty_schedule, learning_rate_schedule, target_rate_schedule]


@pytest.mark.parametrize("change", [0.5, 0.005])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_a_schedule_that_a_graph_froze_is_found(
    files, on_cpu, monkeypatch, capsys, schedule, change
):
    """Checks are at updates 3, 4, 5, 10, 20 and 30; the schedule starts at update 13.
    The check at 20 finds it. From there on updates are plain ones, and one line reports
    that the graph was right up to update 10."""
    checked = check_every(monkeypatch, 10)

    def weight_at(update):
        return 1.0 if update < 12 else 1.0 - change

    def trainer_with_schedule():
        trainer = trainer_of(files)
        schedule(trainer, weight_at)
        return trainer

    plain, captured = trainer_with_schedule(), graphed(trainer_with_schedule())
    run(plain, 12)
    assert_same(run(captured, 12), plain)
    run(plain, 7)
    run(captured, 7)
    assert capsys.readouterr().out == "" and captured.step.works
    with pytest.raises(AssertionError):
        assert_same(captured, plain)  # the graph is wrong by now
    # A plain trainer continues from the captured one's state as that does.
    plain.agent.load_state_dict(copy.deepcopy(captured.agent.state_dict()))
    plain.metrics.sums.copy_(captured.metrics.sums)
    run(plain, 1)
    run(captured, 1)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "without CUDA graphs" in out and "differ" in out
    assert re.findall(r"\d+", out.partition("differ")[2]) == ["10"]
    assert_same(captured, plain)
    n_replays = replays(captured)
    assert_same(run(captured, 15), run(plain, 15))
    assert replays(captured) == n_replays and checked == [3, 4, 5, 10, 20]
    assert capsys.readouterr().out == ""


def test_the_line_names_the_last_check_of_the_same_stage(
    files, on_cpu, monkeypatch, capsys
):
    """Every third update moves the targets, at a rate that changes at update 18. Their
    graph is checked at updates 15 and 30, the other one in between, at 14 and 29."""
    checked = check_every(monkeypatch, 10)
    captured = trainer_of(files, target_update_period=3)
    target_rate_schedule(captured, lambda update: 1.0 if update < 17 else 0.5)
    run(graphed(captured), 30)
    assert checked[-4:] == [10, 5, 20, 10]
    out = capsys.readouterr().out
    assert re.findall(r"\d+", out.partition("differ")[2]) == ["15"]


@pytest.mark.parametrize("when", ["before the capture", "at its end", "at a replay"])
@pytest.mark.parametrize("flags", [{}, STAGES], ids=str)
def test_where_a_graph_fails_updates_go_on(
    files, on_cpu, capsys, monkeypatch, when, flags
):
    """Whatever part of the update the graph had done."""
    plain, captured = trainer_of(files, **flags), trainer_of(files, **flags)

    def refuse(*_):
        raise RuntimeError("operation not permitted")

    class Failing(Recorded):
        def __exit__(self, *error):
            super().__exit__(*error)
            if when == "at its end":
                refuse()

        def replay(self):
            super().replay()
            refuse()

    graph = refuse if when == "before the capture" else Failing
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    run(graphed(captured), 12)
    assert_same(captured, run(plain, 12))
    assert not captured.step.works
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "graph" in out and "not permitted" in out


def test_the_check_holds_no_graph_of_the_parameters(files):
    """An autograd graph that lives during a capture ties the parameters to the stream
    that it was made on, the default one, which a capture must not use."""
    trainer = graphed(run(trainer_of(files), 1))
    weight = trainer.agent.critic.net[0].weight
    held = []

    def capture(noise):
        for _ in range(2):  # a mark that is still there means that the node was held
            node = weight.view_as(weight).grad_fn.next_functions[0][0]
            held.append(node.metadata.get("seen"))
            node.metadata["seen"] = True
            del node
        trainer.step.step(noise, stage)

    stage = (False, True)
    trainer.step.graphs[stage] = capture
    trainer.step.checked(trainer.agent.draw(1, 8), stage)
    assert held == [None, None]


# --- what a graph requires of an update -----------------------------------------------


class NoHost(TorchDispatchMode):
    """Refuses tensors on the host, also single numbers, which mix with all devices and
    which a graph would freeze. vmap passes Python's numbers as such tensors, so they are
    allowed where asked for."""

    def __init__(self, allow_numbers=False):
        super().__init__()
        self.allow_numbers = allow_numbers

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not (self.allow_numbers and x.ndim == 0):
                assert x.is_meta, f"{op}: {x.device} {x}"
        return op(*args, **(kwargs or {}))


def to_meta(thing):
    """Move an object's tensors, and those in its dictionaries, to the meta device."""
    for name, x in vars(thing).items():
        if isinstance(x, torch.Tensor):
            setattr(thing, name, x.to("meta"))
        elif isinstance(x, dict):
            moved = {
                k: v.to("meta") for k, v in x.items() if isinstance(v, torch.Tensor)
            }
            x.update(moved)


@pytest.mark.parametrize("seed", [0, [0, 1]], ids=["solo", "stacked"])
@pytest.mark.parametrize("flags", MODES, ids=str)
def test_no_tensor_is_left_on_the_host(files, flags, seed, monkeypatch):
    """An update on the meta device, which has shapes alone: a tensor on the CPU does not
    mix with it, and nothing can be read back from it."""
    trainer = trainer_of(files, **flags, seed=seed)
    noise = trainer.agent.draw(0, 8)
    noise = {name: x.to("meta") for name, x in noise.items()}
    agent, replay = trainer.agent.to("meta"), trainer.replay
    del agent.weights  # which names the tensors of before
    agent.device = torch.device("meta")
    agent.sweep = {name: x.to("meta") for name, x in agent.sweep.items()}
    agent.optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    for thing in (replay, replay.data, trainer.metrics):
        to_meta(thing)
    autocast = torch.autocast  # which does not know the meta device
    monkeypatch.setattr(
        torch, "autocast", lambda _, *more, **on: autocast("cpu", *more, **on)
    )
    assert agent.layout.batched == (seed != 0)
    with NoHost(allow_numbers=agent.layout.batched):
        trainer.step(noise, cql.stage_of(agent.config, 0))
    assert trainer.metrics.sums.is_meta
    learned = [p for p in agent.parameters() if p.requires_grad]
    assert sum(p.grad is not None for p in learned) > len(learned) / 2
    for stray in (torch.ones(1), torch.tensor(1.0)):  # would be seen
        with pytest.raises((RuntimeError, AssertionError), match="device|cpu"), NoHost():
            trainer.metrics.sums + stray


LAUNCH_NOTHING = {"_unsafe_view", "new_empty", "empty_like", "new_empty_strided"}


@pytest.mark.parametrize(
    "flags, most", [({}, 340), (dict(cql_backward_actions=1), 380)], ids=str
)
def test_kernels_of_an_update(files, flags, most):
    """About as many kernels as a GPU would launch: all but views and allocations."""
    trainer = run(trainer_of(files, **flags), 5)
    noise = trainer.agent.draw(5, 8)
    with Recorded() as recorded:
        trainer.step(noise, (False, True))
    names = [op._schema.name.removeprefix("aten::") for op, *_ in recorded.calls]
    count = sum(name not in LAUNCH_NOTHING for name in names)
    print(f"{flags}: {count} kernels")
    assert 100 < count <= most


# --- compiled losses ------------------------------------------------------------------

FEW = [  # since compiling takes its time
    dict(cql_backward_actions=1, cql_lagrange=True, cal_ql=True, **STAGES),
    {**REDQ, "discrete": True},
]


@pytest.fixture
def compiling(monkeypatch):
    """compiling(**options) sets options of torch.compile; nothing is compiled before."""
    torch._dynamo.reset()

    def set_options(**options):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, **options))

    cql.can_compile.cache_clear()
    with torch._dynamo.config.patch(suppress_errors=False):
        yield set_options
    torch._dynamo.reset()
    cql.can_compile.cache_clear()


def compiled_trainer(files, **flags):
    """A single run with --compile, which raises where something does not compile."""
    trainer = trainer_of(files, **flags, seed=0, compile=True)
    torch._dynamo.config.suppress_errors = False
    return trainer


@pytest.mark.parametrize("flags", FEW, ids=str)
def test_losses_compile_whole(files, flags, compiling):
    """In one graph, without a break, and to the same updates."""
    compiling(backend="eager", fullgraph=True)
    compiled = run(compiled_trainer(files, **flags), 7)  # on into another stage
    # Not to the last bit: compiled, a layer's bias is added after the product.
    other = run(trainer_of(files, **flags, seed=0), 7)
    assert_same(compiled, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", FEW, ids=str)
def test_stacked_losses_compile_whole(files, flags, compiling):
    """As on a GPU, where several runs are compiled, too."""
    compiled = trainer_of(files, **flags)
    compiled.agent.layout.compile(backend="eager", fullgraph=True)
    assert compiled.agent.layout.batched
    other = run(trainer_of(files, **flags), 7)
    assert_same(run(compiled, 7), other, rtol=1e-4, atol=1e-6)


LIGHT = dict(hidden_dim=128, q_n_hidden_layers=2, cql_n_actions=4)


@pytest.mark.parametrize(
    "flags, updates, worth",
    [
        ({}, 6_000, False),  # CORL's sizes: 8.8 ms an update are saved
        ({}, 8_000, True),
        ({"cql_backward_actions": 1}, 36_000, False),  # 1.5 ms
        ({"cql_backward_actions": 1}, 44_000, True),
        ({"seed": [0, 1]}, 1_000_000, False),
        ({"cql_alpha": [1, 5]}, 1_000_000, False),
        (LIGHT, 12_000, False),
        ({**LIGHT, "cql_states": 64}, 32_000, False),
        (LIGHT, 32_000, True),
        ({"discrete": True}, 36_000, False),
        ({"discrete": True}, 44_000, True),
        ({"device": "cuda"}, 100_000, False),
        ({"device": "cuda", "seed": [0, 1]}, 200_000, True),
    ],
)
def test_which_runs_are_worth_compiling(flags, updates, worth):
    """The seconds that compiling saves, offline and online, against a minute."""
    flags = dict(flags)
    device = torch.device(flags.pop("device", "cpu"))
    discrete = flags.pop("discrete", False)
    offline = cql.TrainConfig(max_timesteps=updates, **flags)
    half = dict(max_timesteps=updates // 2, online_iterations=updates // 4, utd=2)
    online = cql.TrainConfig(**half, **flags)
    for config in (offline, online):
        assert cql.worth_compiling(config, device, discrete) == worth


@pytest.mark.parametrize("worth", [False, True])
def test_what_was_decided_is_kept(files, compiling, tmp_path, monkeypatch, worth):
    """It is decided before the first update and recorded; the same command resumes the
    run and a longer one, whatever the rule would say then."""
    compiling(backend="eager")
    monkeypatch.chdir(tmp_path)
    flags = {"env": files[False], "eval_env": "none", "seed": 0, "resume": "run"}
    asked = []

    def decide(config, device, discrete):
        asked.append(config.max_timesteps)
        return worth if len(asked) == 1 else not worth

    monkeypatch.setattr(cql, "worth_compiling", decide)
    outs = []
    for updates in (4, 4, 8):
        status, out, err = command(**flags, max_timesteps=updates)
        assert (status, err) == (0, "")
        outs.append("compiling the losses" in out)
        recorded = yaml.safe_load(Path("run/config.yaml").read_text())["compile"]
        saved = torch.load("run/checkpoint.pt", weights_only=True)["config"]["compile"]
        assert recorded is saved is worth
    assert outs == [worth] * 3 and asked == [4]
    status, _, err = command(**flags, max_timesteps=8, compile=not worth)
    assert status == 2 and "--compile" in err
    assert command(**flags, max_timesteps=8, compile="null")[0] == 0
    loaded = {**flags, "resume": "other", "load_model": "run", "max_timesteps": 3}
    assert command(**loaded)[0] == 0 and asked == [4, 3]  # decided anew


@pytest.mark.parametrize("asked", [True, None])
def test_without_a_compiler_one_line_and_eager(
    files, compiling, tmp_path, monkeypatch, asked
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cql, "worth_compiling", lambda *_: True)
    missing = {"cpp.cxx": ("no-compiler",), "fx_graph_cache": False}
    flags = {"env": files[False], "eval_env": "none", "seed": 0, "max_timesteps": 4}
    with torch._inductor.config.patch(missing):
        status, out, err = command(**flags, compile=asked, resume="a")
    assert (status, err) == (0, "")
    [line] = [line for line in out.splitlines() if "compil" in line]
    assert line.startswith("torch.compile does not work here")
    assert "TORCHDYNAMO_VERBOSE" not in line
    assert command(**flags, compile=False, resume="b")[0] == 0
    assert Path("a/metrics.csv").read_bytes() == Path("b/metrics.csv").read_bytes()
    # What the user asked for is kept; what was decided is what happened.
    recorded = yaml.safe_load(Path("a/config.yaml").read_text())["compile"]
    assert recorded is bool(asked)


def test_where_nothing_compiles_updates_go_on(files, compiling, capsys):
    tried = []

    def backend(graph, inputs):
        tried.append(graph)
        raise RuntimeError("no compiler here")

    compiling(backend=backend)
    flags = {"discrete": True, "seed": 0}
    compiled = run(trainer_of(files, compile=True, **flags), 4)
    assert tried and "compil" in capsys.readouterr().out
    assert_same(compiled, run(trainer_of(files, **flags), 4))


@pytest.mark.parametrize("discrete", [False, True])
def test_stacked_runs_on_a_cpu_are_not_compiled(
    files, compiling, tmp_path, monkeypatch, discrete
):
    """One line says so, and training is as without --compile."""

    def refuse(*inputs):
        raise AssertionError("compiled")

    compiling(backend=refuse)
    flags = {"env": files[discrete], "eval_env": "none", "max_timesteps": 4}
    flags |= {"log_freq": 1, "seed": [0, 1], "checkpoints_path": "null"}
    lines = []
    for compile in (False, True):
        monkeypatch.chdir(tmp_path)
        directory = tmp_path / str(compile)
        status, out, err = command(**flags, compile=compile, resume=directory)
        assert (status, err) == (0, "")
        lines.append([line for line in out.splitlines() if "compil" in line])
    assert lines[0] == [] and len(lines[1]) == 1
    assert "--compile" in lines[1][0] and "CPU" in lines[1][0]
    tables = [tmp_path / name / "metrics.csv" for name in ("False", "True")]
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("flags", [*FEW, dict(precision="bf16")], ids=str)
def test_compiled_equals_eager(files, flags, compiling):
    """By Inductor, whose kernels round otherwise. In bf16 that may change the sign of a
    gradient near zero, for which Adam steps as far as for any."""
    compiled = run(compiled_trainer(files, **flags), 4)
    eager = run(trainer_of(files, **flags, seed=0), 4)
    if "precision" not in flags:
        assert_same(compiled, eager, rtol=1e-3, atol=1e-4)
        return
    sums = compiled.metrics.sums, eager.metrics.sums
    torch.testing.assert_close(*sums, rtol=2**-8, atol=2**-8)  # bf16's last bit
    states = compiled.agent.optimizer.state, eager.agent.optimizer.state
    for state, other in zip(*(each.values() for each in states)):
        gradient, expected = state["exp_avg"], other["exp_avg"]
        assert (gradient - expected).norm() <= 0.1 * expected.norm()


# --- on a GPU -------------------------------------------------------------------------


@NEEDS_GPU
@pytest.mark.parametrize("flags", MODES, ids=str)
def test_a_graph_equals_eager_updates(files, flags):
    eager = trainer_of(files, "cuda", **flags)
    captured = graphed(trainer_of(files, "cuda", **flags))
    for trainer in (eager, captured):
        run(trainer, 50)
        if "online_iterations" in flags:
            go_online(trainer)
        run(trainer, 50)
    assert captured.step.works and captured.step.graphs
    assert_same(captured, eager, rtol=1e-5, atol=1e-5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(captured, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
@pytest.mark.parametrize("flags", [{}, STAGES], ids=str)
def test_a_compiled_graph_equals_eager_updates(files, flags):
    """Losses and Adam compiled, and captured."""
    eager = run(trainer_of(files, "cuda", **flags), 30)
    compiled = run(graphed(trainer_of(files, "cuda", compile=True, **flags)), 30)
    assert compiled.step.works and compiled.step.graphs
    assert_same(compiled, eager, rtol=1e-3, atol=1e-4)


@NEEDS_GPU
def test_noise_within_a_block(files):
    """A GPU draws 32 updates at once: an update's noise does not depend on which were
    drawn before it."""
    agent = trainer_of(files, "cuda").agent
    drawn = [agent.draw(update, 8) for update in range(70)]
    for update in (40, 69, 3, 31, 32):
        other = trainer_of(files, "cuda").agent
        ours, theirs = agent.draw(update, 8), other.draw(update, 8)
        for name, values in drawn[update].items():
            assert torch.equal(ours[name], theirs[name])
            assert torch.equal(ours[name], values)


@NEEDS_GPU
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_command_on_a_gpu(files, tmp_path, precision):
    """Training by graphs that is resumed within a block ends the same."""
    flags = {"env": files[False], "device": "cuda", "eval_env": "none"}
    flags |= {"precision": precision, "log_freq": 5}
    tables = []
    for name, parts in (("whole", [60]), ("parts", [45, 60])):
        for n in parts:
            flags |= {"resume": tmp_path / name, "max_timesteps": n}
            status, out, err = command(**flags)
            assert status == 0 and "graph" not in out, (out, err)
        tables.append((tmp_path / name / "metrics.csv").read_text().splitlines())
    for ours, theirs in zip(*tables, strict=True):
        if ours[0].isdigit():
            ours = [float(x or 0) for x in ours.split(",")]
            theirs = [float(x or 0) for x in theirs.split(",")]
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
