"""Updates by CUDA graphs, and what a graph asks of an update.

A graph cannot be made without a GPU. Here tensordict's own CudaGraphModule runs with a
stand-in for the driver: it records what the captured function launches and launches it
again, on the same memory with the same numbers."""

import copy
import importlib.util
import io
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
    ONLINE,
    {**ONLINE, "mixing_ratio": 0.5, "cql_backward_actions": 1},
    {**REDQ, "discrete": True, "cql_lagrange": True},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """D4RL files of box actions and, by the key True, of three discrete ones."""
    root = tmp_path_factory.mktemp("data")
    episodes, rng = random_episodes([30, 20]), np.random.default_rng(0)
    files = {False: d4rl_file(root / "x.hdf5", episodes)}
    for episode in episodes:
        episode["actions"] = rng.integers(3, size=len(episode["rewards"]))
    files[True] = d4rl_file(root / "d.hdf5", episodes)
    return files


def trainer_of(files, device="cpu", discrete=False, **flags):
    """A fresh agent of two runs, and its `step` as `train` has it."""
    values = dict(env=str(files[discrete]), batch_size=8, seed=[0, 1])
    config = tiny(**values, **flags)
    episodes, task = cql.read_data(config)
    data = cql.Dataset(config, episodes, task, device)
    agent = cql.make_agent(config, task, device)
    replay, metrics = cql.Replay(config, data, agent), cql.Metrics(device)

    def step(noise):
        metrics.add(agent.update(replay.sample(noise.fractions), noise))

    return SimpleNamespace(agent=agent, replay=replay, metrics=metrics, step=step)


def graphed(trainer, step=None):
    """The same trainer, whose step goes by graphs."""
    trainer.step = cql.GraphedStep(step or trainer.step, trainer.agent, trainer.metrics)
    return trainer


def run(trainer, n):
    for _ in range(n):
        trainer.step(trainer.agent.draw(8))
    return trainer


def go_online(trainer, n=12):
    """Steps of both runs, of which the first half is an episode, and the online weight,
    between updates."""
    agent, replay = trainer.agent, trainer.replay
    agent.sweep.cql_alpha.fill_(agent.config.cql_alpha_online)
    rng = np.random.default_rng(n)
    for t in range(n):
        columns = {}
        for name in cql.Batch._fields[:5]:
            columns[name] = rng.uniform(-1, 1, (2, *agent.column_sizes.get(name, ())))
        replay.add([0, 1], cql.Batch(**columns))
        if t == n // 2:
            replay.end_episode(0, [1.0] * t)


def assert_same(trainer, other, **tolerance):
    """Parameters, moments and metrics; to the last bit unless told otherwise."""
    exact = dict(rtol=0, atol=0)
    states = []
    for each in (trainer, other):
        moments = each.agent.get_extra_state()["optimizer"]
        sums = each.metrics.sums
        states.append([trained(each.agent), moments, sums, each.metrics.count])
    torch.testing.assert_close(*states, **(tolerance or exact))
    assert trainer.metrics.names == other.metrics.names
    assert trainer.agent.updates == other.agent.updates


# --- the stand-in ---------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """What is launched inside, to be launched again on the same memory with the same
    numbers, whatever Python would do by then."""

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
    """Of the driver; on the CPU all runs in turn anyway."""

    def wait_stream(self, other):
        pass


class GraphOnCPU(tensordict.nn.CudaGraphModule):
    """The real one, told that there is CUDA; counts its replays."""

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
    """Graphs on the CPU for the rest of the test."""
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
    """40 updates in four stages: each is warmed up by three eager updates, then
    replayed, and all is as without graphs."""
    plain = run(trainer_of(files, **STAGES), 40)
    captured = run(graphed(trainer_of(files, **STAGES)), 40)
    # Of 5 cloning updates 1 moves targets, of 35 others 12 do.
    counts = {(True, False): 1, (True, True): 0, (False, False): 20, (False, True): 9}
    assert replays(captured) == counts
    assert_same(captured, plain)
    assert captured.agent.updates == captured.metrics.count == 40
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_replays_in_every_mode(files, on_cpu, flags):
    """With what comes between updates: a row of metrics, and an agent's state loaded."""
    plain, captured = trainer_of(files, **flags), graphed(trainer_of(files, **flags))
    for trainer in (plain, captured):
        run(trainer, 8)
        state = copy.deepcopy(trainer.agent.state_dict())
        trainer.metrics.reset()
        run(trainer, 6)
        trainer.agent.load_state_dict(state)
        run(trainer, 6)
    assert_same(captured, plain)
    assert captured.step.works and sum(replays(captured).values()) >= 6


@pytest.mark.parametrize("ratio", [-1, 0.5])
def test_replays_see_the_online_phase(files, on_cpu, ratio):
    """What changes between updates changes in place, where a graph reads it."""
    flags = {**ONLINE, "mixing_ratio": ratio}
    plain, captured = trainer_of(files, **flags), graphed(trainer_of(files, **flags))
    for trainer in (plain, captured):
        run(trainer, 8)
        go_online(trainer)
        run(trainer, 4)
        go_online(trainer, 35)  # the buffer goes round
        run(trainer, 8)
    assert captured.step.works and sum(replays(captured).values()) == 17
    assert_same(captured, plain)
    offline = run(trainer_of(files, **flags), 20)
    weights = [each.agent.critic.layers[0].weight for each in (offline, plain)]
    assert not torch.equal(*weights)


def test_a_diverged_run_does_not_end_the_graph(files, on_cpu, capsys):
    """Its metrics are NaN in either way; the other run trains on by replays."""
    plain, captured = trainer_of(files), graphed(trainer_of(files))
    for trainer in (plain, captured):
        with torch.no_grad():
            trainer.agent.policy.layers[0].weight[1].fill_(torch.nan)
        run(trainer, 10)
    assert captured.metrics.sums[1].isnan().any()
    assert_same(captured, plain, rtol=0, atol=0, equal_nan=True)
    assert sum(replays(captured).values()) == 7 and capsys.readouterr().out == ""


def test_without_cuda_the_real_one_passes_through(files):
    """Noise, a NamedTuple some of whose fields are None, goes through its trees."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    plain, captured = trainer_of(files), graphed(trainer_of(files))
    assert plain.agent.draw(8).subset_keys is None
    with pytest.warns(UserWarning, match="CUDA"):
        run(captured, 8)
    assert_same(captured, run(plain, 8))


def load_copy(path, text):
    """The module of a copy of cql.py."""
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"copy_{path.parent.name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_graphs(text):
    """A copy of cql.py whose training goes by graphs on any device."""
    condition = 'if device.type == "cuda":\n        do_step'
    assert text.count(condition) == 1
    return text.replace(condition, "if True:\n        do_step")


def train_copy(module, directory, **flags):
    """Trains by a copy of cql.py; returns the checkpoint and the lines of the tables."""
    values = {**flags, "resume": directory}
    with redirect_stdout(io.StringIO()) as out:
        status = module.main(arguments(**values))
    assert status == 0 and "no CUDA graph" not in out.getvalue(), out.getvalue()
    tables = []
    for name in ("metrics.csv", "evaluations.csv"):
        path = Path(directory) / name
        tables.append(path.read_text() if path.exists() else "")
    payload = torch.load(Path(directory) / "checkpoint.pt", weights_only=True)
    return payload["agent"], tables


@pytest.mark.parametrize("flags", [STAGES, {**ONLINE, "utd": 2}], ids=str)
def test_the_command_by_graphs(files, on_cpu, tmp_path, flags):
    """Its rows and weights are those of plain updates, interrupted or not."""
    text = with_graphs(Path(cql.__file__).read_text())
    captured = load_copy(tmp_path / "cql.py", text)
    flags = {**flags, "env": files[False], "seed": [0, 1], "max_timesteps": 50}
    flags |= {"eval_env": "CqlToy-v0", "eval_freq": 20, "log_freq": 7}
    if "online_iterations" not in flags:
        train_copy(captured, tmp_path / "graphs", **{**flags, "max_timesteps": 31})
    agent, tables = train_copy(captured, tmp_path / "graphs", **flags)
    plain, plain_tables = train_copy(cql, tmp_path / "plain", **flags)
    assert tables == plain_tables
    torch.testing.assert_close(agent, plain, rtol=0, atol=0)


# --- the check of the first replays ---------------------------------------------------


@pytest.mark.parametrize("network", ["policy", "critic", "target_critic"])
def test_a_graph_that_loses_a_step_is_found(files, on_cpu, capsys, network):
    """The metrics are of before the step, so they alone would not tell."""
    plain, captured = trainer_of(files), trainer_of(files)
    step = captured.step
    graphed(captured)

    def forgetful(noise):
        weights = list(getattr(captured.agent, network).parameters())
        before = [weight.detach().clone() for weight in weights]
        step(noise)
        with torch.no_grad():
            for weight, value in zip(weights, before):
                weight.copy_(value)

    run(plain, 2)
    run(captured, 1)
    captured.step.checked(forgetful, captured.agent.draw(8))
    assert not captured.step.works and "differ" in capsys.readouterr().out
    torch.testing.assert_close(trained(captured.agent), trained(plain.agent))


@pytest.mark.parametrize("changes_at", [3, 4])
@pytest.mark.parametrize("sums_of", [2, 2000])
def test_a_number_that_a_graph_froze_is_found(
    files, on_cpu, capsys, changes_at, sums_of
):
    """At either of the first two replays, calls 4 and 5, of however many updates the
    metrics are sums already: training goes on as without graphs, the update at hand
    made once, and one line says so."""
    trainers = plain, captured = trainer_of(files), trainer_of(files)

    def step_of(trainer):
        agent, replay, metrics = trainer.agent, trainer.replay, trainer.metrics

        def step(noise):
            batch = replay.sample(noise.fractions)
            scale = 1.0 if trainer.n < changes_at else 1.2  # a number of Python's
            batch = batch._replace(rewards=batch.rewards * scale)
            metrics.add(agent.update(batch, noise))

        return step

    plain.step = step_of(plain)
    graphed(captured, step_of(captured))
    for trainer in trainers:
        for trainer.n in range(10):
            run(trainer, 1)
            if trainer.n == 1:
                trainer.metrics.sums *= sums_of / 2
    assert_same(captured, plain)
    assert not captured.step.works
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "graph" in out and "differ" in out


@pytest.mark.parametrize("when", ["before the capture", "at its end", "at a replay"])
@pytest.mark.parametrize("flags", [{}, STAGES], ids=str)
def test_where_a_graph_fails_updates_go_on(
    files, on_cpu, capsys, monkeypatch, when, flags
):
    """Whatever it had done of the update at hand."""
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
    """One that lives while a graph is captured ties the parameters to the stream that
    it was made on, the default one, which a capture may not touch."""
    trainer = graphed(run(trainer_of(files), 1))
    weight = trainer.agent.critic.layers[0].weight
    held = []

    def capture(noise):
        for _ in range(2):  # a mark that outlives its node's last user is another's
            node = weight.view_as(weight).grad_fn.next_functions[0][0]
            held.append(node.metadata.get("seen"))
            node.metadata["seen"] = True
            del node
        trainer.step.step(noise)

    trainer.step.checked(capture, trainer.agent.draw(8))
    assert held == [None, None]


# --- what a graph asks of an update ---------------------------------------------------


class NoHost(TorchDispatchMode):
    """Refuses tensors of the host, single numbers too, which mix with all devices and
    which a graph would freeze."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, f"{op}: {x.device} {x}"
        return op(*args, **(kwargs or {}))


def to_meta(thing):
    """Its tensors, and those in its dictionaries, on the meta device."""
    for name, x in vars(thing).items():
        if isinstance(x, torch.Tensor):
            setattr(thing, name, x.to("meta"))
        elif isinstance(x, dict):
            moved = {
                k: v.to("meta") for k, v in x.items() if isinstance(v, torch.Tensor)
            }
            x.update(moved)


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_no_tensor_is_left_on_the_host(files, flags, monkeypatch):
    """An update in a place that has shapes alone: whatever stayed on the CPU does not
    mix with it, and nothing can be read back from it."""
    trainer = trainer_of(files, **flags)
    agent, replay = trainer.agent.to("meta"), trainer.replay
    agent.device = torch.device("meta")
    agent.sweep = cql.Sweep(*(x.to("meta") for x in agent.sweep))
    agent.optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    for thing in (replay, replay.data, trainer.metrics):
        to_meta(thing)
    monkeypatch.setattr(cql, "generator_of", lambda numbers, device: None)
    with NoHost():
        trainer.step(agent.draw(8))
    assert trainer.metrics.sums.is_meta
    learned = [p for p in agent.parameters() if p.requires_grad]
    assert sum(p.grad is not None for p in learned) > len(learned) / 2
    for stray in (torch.ones(1), torch.tensor(1.0)):  # would be seen
        with pytest.raises((RuntimeError, AssertionError), match="device|cpu"), NoHost():
            trainer.metrics.sums + stray


LAUNCH_NOTHING = {"_unsafe_view", "new_empty", "empty_like", "new_empty_strided"}


@pytest.mark.parametrize(
    "flags, most", [({}, 310), (dict(cql_backward_actions=1), 350)], ids=str
)
def test_kernels_of_an_update(files, flags, most):
    """About as many as a GPU would launch: all but views and allocations."""
    trainer = run(trainer_of(files, **flags), 5)
    noise = trainer.agent.draw(8)
    with Recorded() as recorded:
        trainer.step(noise)
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
    """compiling(**options) sets those of torch.compile, with nothing compiled so far."""
    torch._dynamo.reset()

    def set_options(**options):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, **options))

    with torch._dynamo.config.patch(suppress_errors=False):
        yield set_options
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", FEW, ids=str)
def test_losses_compile_whole(files, flags, compiling):
    """In one graph, without a break, and to the same updates."""
    compiling(backend="eager", fullgraph=True)
    compiled = trainer_of(files, **flags, compile=True)
    torch._dynamo.config.suppress_errors = False
    run(compiled, 7)  # on into another stage
    # Not to the last bit: compiled, a layer's bias is added after the product.
    other = run(trainer_of(files, **flags), 7)
    assert_same(compiled, other, rtol=1e-4, atol=1e-6)


def test_where_nothing_compiles_updates_go_on(files, compiling, capsys):
    tried = []

    def backend(graph, inputs):
        tried.append(graph)
        raise RuntimeError("no compiler here")

    compiling(backend=backend)
    compiled = run(trainer_of(files, discrete=True, compile=True), 4)
    assert tried and "compil" in capsys.readouterr().out
    assert_same(compiled, run(trainer_of(files, discrete=True), 4))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("flags", [*FEW, dict(precision="bf16")], ids=str)
def test_compiled_equals_eager(files, flags, compiling):
    """By Inductor, whose kernels round otherwise. In bf16 that may change the sign of a
    gradient near zero, for which Adam steps as far as for any."""
    compiled = trainer_of(files, **flags, compile=True)
    torch._dynamo.config.suppress_errors = False
    run(compiled, 4)
    eager = run(trainer_of(files, **flags), 4)
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
    """A GPU draws 32 updates at once: what an update gets does not depend on which were
    drawn before it."""
    agent = trainer_of(files, "cuda").agent
    drawn = []
    for agent.updates in range(70):
        drawn.append(agent.draw(8))
    for agent.updates in (40, 69, 3, 31, 32):
        other = trainer_of(files, "cuda").agent
        other.updates = agent.updates
        for ours, theirs in zip(agent.draw(8), other.draw(8)):
            assert ours is theirs is None or torch.equal(ours, theirs)
        for ours, theirs in zip(agent.draw(8), drawn[agent.updates]):
            assert ours is theirs is None or torch.equal(ours, theirs)


@NEEDS_GPU
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_command_on_a_gpu(files, tmp_path, precision):
    """Trains by graphs; interrupted and resumed within a block it ends the same."""
    flags = {"env": files[False], "device": "cuda", "eval_env": "none"}
    flags |= {"precision": precision, "log_freq": 5}
    tables = []
    for name, parts in (("whole", [60]), ("parts", [41, 60])):
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
