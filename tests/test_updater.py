"""The captured update: blocks of noise, stages, resume within a block, and the graph.

A CUDA graph cannot be made without a GPU. Here a stand-in records what the captured
function launches and launches it again; it refuses to in another stage than that of the
capture."""

import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_data import d4rl_file, random_episodes
from reference import in_float64, tiny, trained
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cql

double = pytest.fixture(in_float64)
STAGES = dict(bc_steps=5, target_update_period=3)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# The online phase changes what a graph reads: the buffer, its sizes, the weight.
ONLINE = dict(online_iterations=40, cql_alpha_online=0.5, cal_ql=True)
REDQ = dict(n_critics=3, n_target_critics=2)


MODES = [
    {},
    STAGES,
    dict(cql_backward_actions=1),
    dict(precision="bf16"),
    dict(cql_lagrange=True, cql_target_action_gap=1.0),
    dict(cql_max_target_backup=True, backup_entropy=True, penalty="policy_kl"),
    REDQ,
    ONLINE,
    {**ONLINE, "mixing_ratio": 0.5},
    {**REDQ, "discrete": True},
]


@pytest.fixture(scope="module")
def discrete_file(tmp_path_factory):
    """The same, with three discrete actions."""
    episodes, rng = random_episodes([30, 20]), np.random.default_rng(0)
    for episode in episodes:
        episode["actions"] = rng.integers(3, size=len(episode["rewards"]))
    return str(d4rl_file(tmp_path_factory.mktemp("data") / "d.hdf5", episodes))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(
        d4rl_file(tmp_path_factory.mktemp("data") / "x.hdf5", random_episodes([30, 20]))
    )


def updater_of(file, block=1, captures=False, device="cpu", **flags):
    """A fresh agent's updater."""
    config = tiny(env=file, batch_size=8, seed=[0, 1], **flags)
    data = cql.Dataset(config, device)
    agent = cql.make_agent(config, data.task, device)
    replay = cql.Replay(config, data, agent, device)
    updater = cql.Updater(agent, replay, cql.Metrics())
    updater.block = updater.used = block
    updater.captures = captures
    return updater


def run(updater, n):
    for _ in range(n):
        updater()
    return updater


def go_online(updater, n=12):
    """Episodes for both runs, and the online weight, between updates."""
    agent, replay = updater.agent, updater.data
    agent.sweep.cql_alpha.fill_(agent.config.cql_alpha_online)
    rng = np.random.default_rng(n)
    for r in (0, 1):
        shapes = (n + 1, agent.observation_dim), (n, agent.action_dim), n, n
        episode = [rng.uniform(-1, 1, shape) for shape in shapes]
        replay.add(r, *episode[:3], episode[3] < -0.9)


def assert_same(updater, other, **tolerance):
    mine, own = ({**trained(u.agent), "sums": u.metrics.sums} for u in (updater, other))
    torch.testing.assert_close(mine, own, **(tolerance or dict(rtol=0, atol=0)))
    for name in ("count", "names"):
        assert getattr(updater.metrics, name) == getattr(other.metrics, name)
    assert updater.agent.step == other.agent.step


class Recorded(TorchDispatchMode):
    """A CUDA graph's stand-in: what the captured function launched, to be launched
    again on the same memory with the same numbers, whatever Python would do by then."""

    def __init__(self, function):
        super().__init__()
        self.calls, self.before = [], []
        with self:
            function()
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
                place.copy_(result)


@pytest.fixture
def replays(monkeypatch):
    """Captures and replays, by stage."""
    seen = {}

    def capture(body):
        agent = body.__self__.agent
        stage = agent.stage()
        assert stage not in seen  # one graph a stage
        seen[stage], graph = 0, Recorded(body)

        def replay():
            assert agent.stage() == stage
            seen[stage] += 1
            graph.replay()

        return replay

    monkeypatch.setattr(cql, "capture", capture)
    return seen


def test_replays_are_updates(file, replays):
    """40 updates in four stages of blocks of 4: each stage is warmed up by three eager
    updates, then replayed, and all is as without graphs."""
    plain = run(updater_of(file, block=4, **STAGES), 40)
    assert replays == {}
    captured = run(updater_of(file, block=4, captures=True, **STAGES), 40)
    # Of 5 cloning updates 1 moves targets, of 35 others 12 do.
    assert replays == {(True, False): 1, (False, False): 20, (False, True): 9}
    assert_same(captured, plain)
    assert captured.agent.step == captured.metrics.count == 40


@pytest.mark.parametrize("ratio", [-1, 0.5])
def test_replays_see_the_online_phase(file, replays, ratio):
    """What changes between updates changes in place, where a graph reads it."""
    runs = [
        updater_of(file, 4, captures, mixing_ratio=ratio, **ONLINE)
        for captures in (False, True)
    ]
    for updater in runs:
        tensors = [*updater.data.own, updater.data.sizes, *updater.agent.sweep]
        places = [tensor.data_ptr() for tensor in tensors]
        run(updater, 8)
        go_online(updater)
        before = updater.agent.critic.layers[0].weight.detach().clone()
        run(updater, 4)
        go_online(updater, 35)  # the buffer goes round
        run(updater, 8)
        assert not torch.equal(before, updater.agent.critic.layers[0].weight)
        tensors = [*updater.data.own, updater.data.sizes, *updater.agent.sweep]
        assert places == [tensor.data_ptr() for tensor in tensors]
    assert sum(replays.values()) > 10
    assert_same(*runs)
    offline = run(updater_of(file, 4, mixing_ratio=ratio, **ONLINE), 20)
    weights = [u.agent.critic.layers[0].weight for u in (offline, runs[0])]
    assert not torch.equal(*weights)


def test_an_update_is_update(file):
    """The updater does what `update` does with the same noise, block by block."""
    updater, other = (updater_of(file, block=b, **STAGES) for b in (4, 4))
    agent, data = other.agent, other.data
    for _ in range(3):
        block = agent.draw(8, 4)
        for i in range(4):
            noise = cql.Noise(*(x[i] for x in block))
            agent.update(data.sample(noise.rows), noise)
    run(updater, 12)
    torch.testing.assert_close(trained(updater.agent), trained(agent), rtol=0, atol=0)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("n", [0, 4, 6])
def test_resume_within_a_block(file, block, n):
    whole, first = (updater_of(file, block=block, **STAGES) for _ in range(2))
    run(whole, 12), run(first, n)
    second = updater_of(file, block=block, **STAGES)
    second.agent.load_state_dict(first.agent.state_dict())
    second.load(first.state())
    vars(second.metrics).update(vars(first.metrics))
    assert_same(run(second, 12 - n), whole)


def test_without_a_graph_updates_go_on(file, monkeypatch, capsys):
    def capture(body):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = run(updater_of(file), 8)
    monkeypatch.setattr(cql, "capture", capture)
    assert_same(run(updater_of(file, captures=True), 8), plain)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no CUDA graph" in out and "not permitted" in out


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_replays_in_every_mode(file, discrete_file, replays, flags):
    flags = dict(flags)
    source = discrete_file if flags.pop("discrete", False) else file
    runs = [updater_of(source, 4, captures, **flags) for captures in (False, True)]
    for updater in runs:
        run(updater, 14)
        # A checkpoint in which a diverged run keeps its part of the one before.
        old, payload = updater.agent.state_dict(), updater.agent.state_dict()
        cql.keep_slices(payload, old, torch.tensor([1]))
        run(updater, 14)
    assert sum(replays.values()) >= 10
    assert_same(*runs)


def pair(file, discrete_file, flags, **more):
    """Two alike, but that the second has more flags."""
    flags = dict(flags)
    source = discrete_file if flags.pop("discrete", False) else file
    return updater_of(source, 4, **flags), updater_of(source, 4, **flags, **more)


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_all_members_at_once(file, discrete_file, flags, double, monkeypatch):
    """A GPU's products of all members, here on the CPU, equal those in turn."""
    close = 1e-2 if "precision" in flags else 1e-9  # bfloat16's rounding
    one_by_one, at_once = pair(file, discrete_file, flags)
    run(one_by_one, 12)
    seen = []
    monkeypatch.setattr(cql, "turns", lambda x: seen.append(x) or [slice(None)])
    run(at_once, 12)
    assert len(seen) > 100
    assert_same(one_by_one, at_once, rtol=close, atol=close)


class NoHost(TorchDispatchMode):
    """Refuses tensors of the host, single numbers too, which mix with all devices and
    which a graph would freeze."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            assert not isinstance(x, torch.Tensor) or x.is_meta, f"{op}: {x.device} {x}"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", MODES, ids=str)
def test_no_tensor_is_left_on_the_host(file, discrete_file, flags, monkeypatch):
    """An update in a place that has shapes alone: whatever stayed on the CPU does not
    mix with it, and nothing can be read back from it."""
    updater, _ = pair(file, discrete_file, flags)
    agent, replay = updater.agent.to("meta"), updater.data
    agent.device, agent.generators = "meta", [None] * len(agent.runs)
    agent.sweep = cql.Sweep(*(x.to("meta") for x in agent.sweep))
    agent.optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    replay.own = cql.Batch(*(x if x is None else x.to("meta") for x in replay.own))
    for thing in (replay, replay.data):
        for name, x in vars(thing).items():
            if isinstance(x, torch.Tensor) and name != "added":
                setattr(thing, name, x.to("meta"))
    updater.noise, updater.cursor = agent.draw(8, 4), updater.cursor.to("meta")
    monkeypatch.setattr(cql, "turns", lambda x: [slice(None)])
    with NoHost():
        updater.body()
    assert updater.metrics.sums.is_meta and updater.metrics.broken.is_meta
    trained = [p for p in agent.parameters() if p.requires_grad]
    assert sum(p.grad is not None for p in trained) > len(trained) / 2
    for stray in (torch.ones(1), torch.tensor(1.0)):  # would be seen
        with pytest.raises((RuntimeError, AssertionError), match="device|cpu"), NoHost():
            updater.metrics.sums + stray


LAUNCH_NOTHING = {"_unsafe_view", "new_empty", "empty_like", "new_empty_strided"}


def kernels(calls):
    """About as many as a GPU would launch: all but views and allocations."""
    names = (op._schema.name.removeprefix("aten::") for op, *_ in calls)
    return sum(name not in LAUNCH_NOTHING for name in names)


@pytest.mark.parametrize(
    "flags, most", [({}, 310), (dict(cql_backward_actions=1), 350)], ids=str
)
def test_kernels_of_an_update(file, flags, most, monkeypatch):
    monkeypatch.setattr(cql, "turns", lambda x: [slice(None)])
    updater = run(updater_of(file, 4, **flags), 5)
    count = kernels(Recorded(updater.body).calls)
    print(f"{flags}: {count} kernels")
    assert 200 < count <= most


FEW = [  # since compiling takes its time
    STAGES,
    dict(cql_backward_actions=1, cql_lagrange=True, cal_ql=True),
    {**REDQ, "discrete": True},
]


@pytest.fixture
def compiling(monkeypatch):
    """compiling(**options) sets those of torch.compile, with nothing compiled so far."""
    torch._dynamo.reset()
    cql.compiled.cache_clear()

    def set_options(**options):
        monkeypatch.setattr(torch, "compile", partial(torch.compile, **options))

    yield set_options
    cql.compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", FEW, ids=str)
def test_losses_compile_whole(file, discrete_file, flags, compiling, capsys):
    """In one graph, without a break, and to the same updates."""
    compiling(backend="aot_eager", fullgraph=True)
    updaters = pair(file, discrete_file, flags, compile=True)
    plain, compiled = (run(each, 7) for each in updaters)  # on into another stage
    assert_same(plain, compiled, rtol=1e-4, atol=1e-5)
    assert "not compiled" not in capsys.readouterr().out


def fails(*_):
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize("bad", ["fw_compiler", "bw_compiler"])
def test_where_nothing_compiles_updates_go_on(file, compiling, capsys, bad):
    compilers = dict.fromkeys(("fw_compiler", "bw_compiler"), lambda graph, _: graph)
    compiling(backend=aot_autograd(**{**compilers, bad: fails}))
    plain, compiled = (run(each, 4) for each in pair(file, None, {}, compile=True))
    assert_same(plain, compiled)
    first, second = capsys.readouterr().out.splitlines()
    assert "a minute" in first
    assert "not compiled" in second and "no compiler here" in second


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("flags", [*FEW, dict(precision="bf16")], ids=str)
def test_compiled_equals_eager(file, discrete_file, flags, compiling, capsys):
    """By Inductor, whose kernels round otherwise."""
    updaters = pair(file, discrete_file, flags, compile=True)
    plain, compiled = (run(each, 4) for each in updaters)
    assert_same(plain, compiled, rtol=1e-3, atol=1e-4)
    assert "not compiled" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_kernels_of_compiled_losses(file, compiling, monkeypatch):
    """That Inductor makes for the GPU's layers; matrix products come on top."""
    monkeypatch.setattr(cql, "turns", lambda x: [slice(None)])
    torch._inductor.metrics.reset()
    run(updater_of(file, 4, compile=True), 1)
    count = torch._inductor.metrics.generated_kernel_count
    print(f"{count} kernels")
    assert 0 < count <= 120


@NEEDS_GPU
@pytest.mark.parametrize("flags", MODES, ids=str)
def test_a_graph_equals_eager_updates(file, discrete_file, flags):
    flags = dict(flags)
    source = discrete_file if flags.pop("discrete", False) else file
    eager, captured = (
        updater_of(source, 32, captures, "cuda", **flags) for captures in (False, True)
    )
    for updater in (eager, captured):
        run(updater, 50)
        if "online_iterations" in flags:
            go_online(updater)
        run(updater, 50)
    assert captured.graphs and not eager.graphs
    assert_same(captured, eager, rtol=1e-5, atol=1e-5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(captured, 40)
    finally:
        torch.cuda.set_sync_debug_mode("default")
