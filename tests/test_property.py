"""Random bad input: flags, files and datasets. For any input the script ends with status
0, 2 (one line) or 3 (a run diverged), without a traceback, and without NaN in the logs
of a finished run.

The examples are few, and the same each time. CQL_EXAMPLES=20 tries twenty times as many,
and others."""

import csv
import json
import os
import tempfile
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_data import (
    d4rl_file,
    little_memory,
    minari_dataset,
    random_episodes,
    run,
    toy_dataset,
)

import cql

TIMES = int(os.environ.get("CQL_EXAMPLES", 1))


def examples(n):
    return settings(
        max_examples=n * TIMES,
        deadline=None,
        database=None,
        derandomize=TIMES == 1,
        suppress_health_check=list(HealthCheck),
    )


def honest(outcome, allowed=(0, 2)):
    """Check what the script promises of every end."""
    status, out, err = outcome
    assert status in allowed, outcome
    if status == 2:
        assert err.startswith("cql.py: error: ") and err.count("\n") == 1, err
        assert err.endswith("\n") and len(err) < 1500, err
    else:
        assert err == "", err
    assert "Traceback" not in out + err


# --- flags and files ------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 12),
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1e-300, 1e300, 2**63, 2**64, -0.0, 1e6]),
)
words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        "true false null ~ None nan inf -inf .inf -.inf 1e6 1_000 0x10 007 '' [] {} "
        "[0,1] [0,0] [[0]] {a:1} cpu cuda cuda:0 ../x / . - -- -x = --seed --seed=1 "
        "--cql_lagrange --config_path logsumexp mean fp32 bf16 2001-01-01 nul\0".split()
    ),
)
scalars = st.one_of(numbers, words, st.booleans(), st.none())
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=4), scalars, max_size=2),
)
names = st.one_of(st.sampled_from(sorted(cql.FIELDS)), st.text(max_size=10))


@contextmanager
def empty_directory():
    """Enter a temporary directory, and check that nothing is written to it."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        try:
            yield
            assert not os.listdir(directory)
        finally:
            os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def memory():
    with little_memory():
        yield


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Let every download fail."""

    def fail(*_, **__):
        raise OSError("no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", fail)
        yield


@pytest.fixture
def untrained(monkeypatch):
    """The script without its training."""
    monkeypatch.setattr(cql, "train", lambda _: 0)


@examples(200)
@given(flags=st.dictionaries(names, values, max_size=4), joined=st.booleans())
def test_command_lines(untrained, flags, joined):
    argv = []
    for name, value in flags.items():
        text = value if isinstance(value, str) else json.dumps(value)
        argv += [f"--{name}={text}"] if joined else [f"--{name}", text]
    with empty_directory():
        honest(run(argv))


@examples(200)
@given(argv=st.lists(words, max_size=4))
def test_loose_words(untrained, argv):
    with empty_directory():
        honest(run(argv))


@examples(200)
@given(flags=st.dictionaries(names, values, max_size=5))
def test_config_files(untrained, flags):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "flags.yaml")
        path.write_text(yaml.safe_dump(flags), "utf-8")
        with empty_directory():
            honest(run(["--config_path", str(path)]))


@examples(100)
@given(content=st.binary(max_size=60))
def test_any_bytes_as_a_config_file(untrained, content):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "flags.yaml")
        path.write_bytes(content)
        honest(run([f"--config_path={path}"]))


@examples(100)
@given(content=st.binary(max_size=60), suffix=st.sampled_from(["", ".hdf5", ".csv"]))
def test_any_bytes_as_a_dataset_or_a_model(content, suffix):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"file{suffix}")
        path.write_bytes(content)
        with empty_directory():
            honest(run([f"--env={path}", "--device=cpu"]), allowed=(2,))
            honest(run([f"--load_model={path}", "--device=cpu"]), allowed=(2,))


# --- training -------------------------------------------------------------------------


def finite(directory):
    """Check that no row of a finished run holds NaN or infinity."""
    if not (directory / "metrics.csv").exists():  # no update
        return
    with open(directory / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            row = {k: v for k, v in row.items() if not k.startswith("train_")}
            numbers = np.array([float(value or "nan") for value in row.values()])
            assert np.isfinite(numbers).all(), row


def trained(directory, data, **flags):
    tiny = {"hidden_dim": 4, "q_n_hidden_layers": 1, "batch_size": 4, "log_freq": 1}
    outcome = run(env=data, resume=directory, **{**tiny, **flags})
    honest(outcome, allowed=(0, 2, 3))
    if outcome[0] == 0:
        finite(Path(directory))
    return outcome[0]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


rates = st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 1e4])
weights = st.sampled_from([0.0, 1e-3, 1.0, 1e3, 1e12])
kinds = {
    "seed": st.sampled_from([0, 7, [0, 1]]),
    "cql_alpha": st.one_of(weights, st.just([0.0, 5.0])),
    "cql_temp": st.sampled_from([1e-8, 0.1, 1.0, 100.0, [0.5, 1.0]]),
    "cql_target_action_gap": st.sampled_from([-1e6, -1.0, 0.0, 5.0]),
    "discount": st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    "soft_target_update_rate": st.sampled_from([0.0, 5e-3, 1.0]),
    "target_update_period": st.integers(1, 3),
    "policy_lr": rates,
    "qf_lr": rates,
    "alpha_multiplier": weights,
    "cql_n_actions": st.integers(1, 4),
    "cql_backward_actions": st.integers(0, 12),
    "cql_states": st.integers(0, 12),
    "cql_clip_diff_min": st.sampled_from([-1e6, -1.0, 0.0, "-.inf"]),
    "cql_clip_diff_max": st.sampled_from([-1.0, 0.0, 1e6, ".inf"]),
    "n_critics": st.integers(1, 3),
    "n_target_critics": st.integers(1, 3),
    "penalty": st.sampled_from(cql.PENALTIES),
    "reward_scale": st.sampled_from([0.0, -1.0, 1.0, 1e20, 1e38, "null"]),
    "reward_bias": st.sampled_from([0.0, -5.0, 1e38]),
    "policy_log_std_multiplier": st.sampled_from([0.0, 1.0, -3.0, 1e6]),
    "bc_steps": st.integers(0, 3),
    "mixing_ratio": st.sampled_from([-1, 0.5, 0.01, 0.99]),
    "online_iterations": st.integers(0, 6),
    "cql_alpha_online": weights,
    "utd": st.integers(1, 3),
    "buffer_size": st.integers(1, 30),
    "precision": st.sampled_from(["fp32", "bf16"]),
    "n_steps": st.integers(1, 40),
    "bc_weight": st.sampled_from([0.0, 0.4, 1e6]),
    "trajectory_weighting": st.sampled_from([0.0, 5.0, 1e6]),
    "policy_average_rate": st.sampled_from([0.0, 0.1, 1.0]),
    "max_timesteps": st.integers(0, 4),
    "max_episode_steps": st.integers(1, 30),
    "eval_freq": st.integers(1, 4),
    "checkpoint_freq": st.integers(0, 3),
    "exploration_epsilon": st.sampled_from([0.0, 0.1, 1.0]),
    **dict.fromkeys(
        "use_automatic_entropy_tuning backup_entropy cql_importance_sample cql_lagrange "
        "cql_max_target_backup orthogonal_init normalize cal_ql "
        "is_sparse_reward".split(),
        st.booleans(),
    ),
}


def test_settings(toy):
    ends = []

    @examples(40)
    @given(st.fixed_dictionaries({}, optional=kinds))
    def settings(flags):
        for name, most in (
            ("n_target_critics", flags.get("n_critics", 2)),
            ("cql_backward_actions", 3 * flags.get("cql_n_actions", 2)),
            ("cql_states", flags.get("batch_size", 4)),
        ):
            if name in flags:  # or half of the examples would be refused for it
                flags[name] = min(flags[name], most)
        with tempfile.TemporaryDirectory() as directory:
            ends.append(trained(directory, toy, **flags))

    settings()
    assert ends.count(2) < len(ends) / 2  # most examples train


@examples(40)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    dims=st.tuples(st.sampled_from([1, 2, 11, 348]), st.sampled_from([1, 3, 17])),
    scales=st.tuples(*[st.sampled_from([0.0, 1e-6, 1.0, 1e6, 1e18, 1e37])] * 2),
    ends=st.sampled_from(["terminal", "timeout", "cut", "mixed"]),
    batch=st.sampled_from([1, 4, 30]),
    normalize=st.booleans(),
    flat=st.booleans(),
)
def test_datasets(lengths, dims, scales, ends, batch, normalize, flat):
    """Datasets of odd shapes and sizes: no or single transitions, huge numbers."""
    episodes = random_episodes(lengths, 0, *dims, ends=ends)
    for episode in episodes:
        episode["observations"] *= np.float32(scales[0])
        episode["rewards"] *= scales[1]
    with tempfile.TemporaryDirectory() as root:
        if flat:
            none = {"observations": np.zeros((1, dims[0])), "actions": np.zeros((0, 1))}
            for name in ("rewards", "terminations", "truncations"):
                none[name] = np.zeros(0)
            data = d4rl_file(Path(root, "data.hdf5"), episodes or [none])
        elif sum(lengths) == 0 or 0 in lengths:
            return  # Minari writes no such dataset
        else:
            data = minari_dataset(root, "random/data-v0", episodes)
        flags = {"batch_size": batch, "normalize": normalize}
        status = trained(Path(root, "run"), data, **flags)
        tame = max(scales) <= 1e6 and batch <= sum(lengths)
        assert status == 0 or not tame


@examples(60)
@given(data=st.data())
def test_damaged_arrays(data):
    """Files in which another array replaces one of the arrays."""
    arrays = "observations actions rewards terminals timeouts next_observations".split()
    name = data.draw(st.sampled_from(arrays))
    shapes = [(), (0,), (1,), (40,), (40, 1), (40, 3), (40, 0), (9, 2, 2)]
    shape = data.draw(st.sampled_from(shapes))
    fill = st.sampled_from([0.0, 1.0, 0.5, -2.0, np.nan, np.inf, 1e300])
    kind = data.draw(st.sampled_from(["f4", "f8", "i4", "u1", "?", "S5", "c8"]))
    value = data.draw(fill)
    with np.errstate(all="ignore"):
        array = np.full(shape, b"x" if kind == "S5" else 0, kind)
        if kind in ("f4", "f8") or value in (0.0, 1.0):
            array = np.full(shape, str(value) if kind == "S5" else value).astype(kind)
    with tempfile.TemporaryDirectory() as root:
        path = d4rl_file(Path(root, "data.hdf5"), random_episodes([20, 20]))
        with h5py.File(path, "a") as file:
            del file[name]
            file[name] = array
        trained(Path(root, "run"), path)


# --- checkpoints ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("finished")
    outcome = run(env=toy, resume=directory, hidden_dim=4, batch_size=8, max_timesteps=3)
    assert outcome[0] == 0, outcome
    return directory


@examples(60)
@given(
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["one bit", "cut", "zeros", "twice"]),
    resumed=st.booleans(),
)
def test_damaged_checkpoints(finished, place, change, resumed):
    """Damage is refused, or changes no byte of a tensor or a number."""
    content = bytearray((finished / "checkpoint.pt").read_bytes())
    position = int(place * len(content))
    if change == "one bit":
        content[position] ^= 1
    elif change == "cut":
        del content[position:]
    elif change == "zeros":
        content[position : position + 64] = bytes(64)
    else:
        content[position:position] = content[position : position + 64]
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "checkpoint.pt")
        path.write_bytes(content)
        argv = [f"--load_model={path}", "--max_timesteps=0", "--checkpoints_path=null"]
        if resumed:
            text = (finished / "config.yaml").read_text()
            Path(root, "config.yaml").write_text(text)
            argv = [f"--resume={root}", "--max_timesteps=5"]
        outcome = run([*argv, "--n_episodes=1", "--device=cpu"])
        honest(outcome)
        if outcome[0] == 0:
            good = torch.load(finished / "checkpoint.pt", weights_only=True)
            found = good if resumed else torch.load(path, weights_only=True)
            same(found["agent"], good["agent"])


def same(found, expected):
    """Raise AssertionError unless two states hold the same numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
