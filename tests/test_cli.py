"""The command line: every flag, every file, and what each mistake gets."""

import ast
import dataclasses
import fcntl
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import h5py
import make_data
import minari
import numpy as np
import pytest
import torch
import yaml
from make_data import d4rl_file, minari_dataset, random_episodes, run, toy_dataset
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import cql

ROOT = Path(cql.__file__).resolve().parent
inf = math.inf

# Every flag of the contract, its default, and a word of its meaning that --help shows.
FLAGS = {
    # CORL's offline cql.py
    "device": ("auto", "cuda"),
    "env": ("mujoco/hopper/medium-v0", "Minari"),
    "seed": (0, "noise"),
    "eval_freq": (5000, "between evaluations"),
    "n_episodes": (10, "Episodes of one"),
    "max_timesteps": (1_000_000, "Updates"),
    "checkpoints_path": ("runs", "directories"),
    "load_model": ("", "Checkpoint"),
    "buffer_size": (2_000_000, "online buffer"),
    "batch_size": (256, "per update"),
    "discount": (0.99, "Discount"),
    "alpha_multiplier": (1.0, "temperature"),
    "use_automatic_entropy_tuning": (True, "entropy"),
    "backup_entropy": (False, "target"),
    "policy_lr": (3e-5, "policy"),
    "qf_lr": (3e-4, "critics"),
    "soft_target_update_rate": (5e-3, "target critics"),
    "target_update_period": (1, "between target"),
    "cql_n_actions": (10, "proposal"),
    "cql_importance_sample": (True, "density"),
    "cql_lagrange": (False, "gap"),
    "cql_target_action_gap": (-1.0, "lagrange"),
    "cql_temp": (1.0, "temperature"),
    "cql_alpha": (10.0, "penalty"),
    "cql_max_target_backup": (False, "best of"),
    "cql_clip_diff_min": (-inf, "Lower"),
    "cql_clip_diff_max": (inf, "Upper"),
    "orthogonal_init": (True, "Orthogonal"),
    "normalize": (True, "observations"),
    "normalize_reward": (False, "returns"),
    "q_n_hidden_layers": (3, "critic"),
    "bc_steps": (0, "clones"),
    "reward_scale": (1.0, "reward_bias"),
    "reward_bias": (0.0, "reward_scale"),
    "policy_log_std_multiplier": (1.0, "log std"),
    "project": ("CORL", "wandb"),
    "group": ("CQL-D4RL", "wandb"),
    "name": ("CQL", "Run name"),
    # its finetune scripts
    "eval_seed": (0, "evaluation"),
    "offline_iterations": (None, "max_timesteps"),
    "online_iterations": (0, "Environment steps"),
    "cql_alpha_online": (None, "online"),
    "mixing_ratio": (-1.0, "Offline share"),
    "is_sparse_reward": (False, "failed"),
    # ours
    "log_freq": (1000, "metrics.csv"),
    "eval_env": (None, "Environment to evaluate"),
    "resume": (None, "Run directory"),
    "hidden_dim": (256, "Width"),
    "n_critics": (2, "Critics"),
    "n_target_critics": (None, "target"),
    "penalty": ("logsumexp", "penalty"),
    "cql_backward_actions": (0, "backprop"),
    "precision": ("fp32", "products"),
    "cal_ql": (False, "Cal-QL"),
    "utd": (1, "per environment step"),
    "record_dataset": (None, "online episodes"),
    "compile": (False, "torch.compile"),
    "eval_workers": (None, "beside the training"),
}
LISTS = {"env", "seed", "cql_alpha", "cql_temp", "cql_target_action_gap"}


def parsed(argv):
    config, _ = cql.layered_config(cql.read_command_line(list(argv)))
    return config


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The directory of a finished run on the toy dataset."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert run(env=toy, resume=directory)[0] == 0
    return directory


# --------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------


def test_the_flags_are_the_contract_s_with_its_defaults():
    config = cql.TrainConfig()
    assert dataclasses.asdict(config) == {name: row[0] for name, row in FLAGS.items()}
    types = {field.name: str(field.type) for field in dataclasses.fields(config)}
    assert {name for name in types if "List" in types[name]} == LISTS


@pytest.fixture(scope="module")
def help_texts():
    """What --help says of each flag."""
    status, out, err = run(["--help"])
    assert status == 0 and err == ""
    texts, flag = {}, None
    for line in out.splitlines():
        start = re.match(r"  --(\w+) \S+ *(.*)", line)
        flag, line = start.groups() if start else (flag, line)
        texts[flag] = f"{texts.get(flag, '')} {line.strip()}".strip()
    return texts


@pytest.mark.parametrize("flag", FLAGS)
def test_help_shows_meaning_and_default(flag, help_texts):
    default, meaning = FLAGS[flag]
    text = help_texts[flag]
    assert meaning.lower() in text.lower()
    assert f"(default: {default})" in text
    assert text.split("(default")[0] not in ("", "Ours, not CORL's: ")


def test_every_flag_is_read():
    """As config.flag outside validate, or by name from one of the script's tables."""
    tree, read = ast.parse(Path(cql.__file__).read_text()), set()
    bodies = [node for node in tree.body if getattr(node, "name", "") != "validate"]
    for node in (n for body in bodies for n in ast.walk(body)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if getattr(owner, "attr", getattr(owner, "id", "")) == "config":
                read.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
            read |= {getattr(argument, "value", None) for argument in node.args}
    assert set(FLAGS) - read - set(cql.SWEPT) == set()


@pytest.mark.parametrize(
    "argv, flag, expected",
    [
        ("--max_timesteps 1e6", "max_timesteps", 1_000_000),
        ("--max_timesteps=2e3", "max_timesteps", 2000),
        ("--buffer_size 10_000", "buffer_size", 10_000),
        ("--policy_lr 1e-4", "policy_lr", 1e-4),
        ("--discount 1", "discount", 1.0),
        ("--name 007", "name", "007"),
        ("--name true", "name", "true"),
        ("--name 1e6", "name", "1e6"),
        ("--name 'a b: c'", "name", "a b: c"),
        ("--group ''", "group", ""),
        ("--load_model ''", "load_model", ""),
        ("--load_model=", "load_model", ""),
        ("--checkpoints_path null", "checkpoints_path", None),
        ("--cql_clip_diff_min -.inf", "cql_clip_diff_min", -inf),
        ("--cql_clip_diff_min -200", "cql_clip_diff_min", -200.0),
        ("--cql_clip_diff_min=-.5", "cql_clip_diff_min", -0.5),
        ("--cql_clip_diff_max .inf", "cql_clip_diff_max", inf),
        ("--cql_target_action_gap -1e-1", "cql_target_action_gap", -0.1),
        ("--normalize false", "normalize", False),
        ("--normalize=True", "normalize", True),
        ("--seed [0,1,2]", "seed", [0, 1, 2]),
        ("--seed=[3]", "seed", [3]),
        ("--cql_alpha '[1, 5e-1, 1e1]'", "cql_alpha", [1.0, 0.5, 10.0]),
        ("--seed 9223372036854775807", "seed", 2**63 - 1),
        ("--env '[\"a\", b c]'", "env", ["a", "b c"]),
        ("--env a/b-v0", "env", "a/b-v0"),
        ("--env 'my data/é.hdf5'", "env", "my data/é.hdf5"),
        ("--offline_iterations null", "offline_iterations", None),
        ("--offline_iterations 7", "offline_iterations", 7),
    ],
)
def test_values_are_read_as_written(argv, flag, expected):
    value = getattr(parsed(shlex.split(argv)), flag)
    assert value == expected and type(value) is type(expected)
    if isinstance(expected, list):
        assert [type(v) for v in value] == [type(v) for v in expected]


@pytest.mark.parametrize(
    "argv, fragments",
    [
        ("--normalize flase", "--normalize expected bool 'flase'"),
        ("--normalize 1", "--normalize expected bool"),
        ("--normalize", "--normalize"),
        ("--seed 1.5", "--seed 1.5 expected int"),
        ("--seed true", "--seed expected int true"),
        ("--seed one", "--seed expected int"),
        ("--seed ''", "--seed expected int"),
        ("--seed -1", "--seed -1"),
        ("--seed 9223372036854775808", "--seed"),
        ("--seed 1e400", "--seed"),
        ("--seed []", "--seed empty"),
        ("--seed [0,0]", "--seed twice"),
        ("--seed [0,1.0,1]", "--seed twice"),
        ("--seed [0,true]", "--seed"),
        ("--seed [[0,1]]", "--seed"),
        ("--seed [0,", "--seed"),
        ("--seed {a:1}", "--seed"),
        ("--cql_alpha [1,1.0]", "--cql_alpha twice"),
        ("--cql_alpha []", "--cql_alpha empty"),
        ("--cql_alpha -1", "--cql_alpha -1"),
        ("--cql_alpha [1,.nan]", "--cql_alpha nan"),
        ("--cql_alpha .inf", "--cql_alpha inf"),
        ("--cql_temp 0", "--cql_temp"),
        ("--cql_temp [1,-1]", "--cql_temp"),
        ("--cql_target_action_gap .nan", "--cql_target_action_gap"),
        ("--env []", "--env empty"),
        ("--env [1]", "--env"),
        ("--env ''", "--env"),
        ("--batch_size [8,16]", "--batch_size expected int"),
        ("--discount [0.9,0.99]", "--discount expected float"),
        ("--name [a,b]", "--name"),
        ("--discount 1.5", "--discount 1.5"),
        ("--discount -0.1", "--discount -0.1"),
        ("--discount .nan", "--discount nan"),
        ("--batch_size 0", "--batch_size 0"),
        ("--batch_size 8.5", "--batch_size expected int"),
        ("--batch_size null", "--batch_size expected int"),
        ("--n_episodes 0", "--n_episodes 0"),
        ("--max_timesteps -1", "--max_timesteps -1"),
        ("--max_timesteps 1e-3", "--max_timesteps"),
        ("--eval_freq 0", "--eval_freq 0"),
        ("--log_freq 0", "--log_freq 0"),
        ("--buffer_size 0", "--buffer_size 0"),
        ("--policy_lr -1e-4", "--policy_lr -0.0001"),
        ("--policy_lr .nan", "--policy_lr nan"),
        ("--qf_lr .inf", "--qf_lr inf"),
        ("--soft_target_update_rate 2", "--soft_target_update_rate 2"),
        ("--target_update_period 0", "--target_update_period 0"),
        ("--cql_n_actions 0", "--cql_n_actions 0"),
        ("--q_n_hidden_layers 0", "--q_n_hidden_layers 0"),
        ("--hidden_dim 0", "--hidden_dim 0"),
        ("--n_critics 0", "--n_critics 0"),
        ("--bc_steps -1", "--bc_steps -1"),
        ("--eval_seed -1", "--eval_seed -1"),
        ("--utd 0", "--utd 0"),
        ("--online_iterations -1", "--online_iterations -1"),
        ("--cql_alpha_online -1", "--cql_alpha_online -1"),
        ("--mixing_ratio 1.5", "--mixing_ratio 1.5"),
        ("--mixing_ratio -2", "--mixing_ratio -2"),
        ("--cql_backward_actions -1", "--cql_backward_actions -1"),
        ("--n_target_critics 3", "--n_target_critics 3"),
        ("--penalty logsumexpp", "--penalty logsumexpp"),
        ("--precision fp8", "--precision fp8"),
        ("--precision tf32 --device cpu", "--precision tf32"),
        ("--cql_backward_actions 31", "--cql_backward_actions 31"),
        ("--reward_scale .nan", "--reward_scale nan"),
        ("--reward_bias .inf", "--reward_bias inf"),
        ("--policy_log_std_multiplier .inf", "--policy_log_std_multiplier inf"),
        ("--cql_clip_diff_min .nan", "--cql_clip_diff_min nan"),
        (
            "--cql_clip_diff_min 1 --cql_clip_diff_max 0",
            "--cql_clip_diff_min --cql_clip_diff_max",
        ),
        (
            "--max_timesteps 5 --offline_iterations 5",
            "--max_timesteps --offline_iterations",
        ),
        ("--max_timestep 5", "--max_timestep max_timesteps"),
        ("--max-timesteps 5", "--max-timesteps max_timesteps"),
        ("--cql_alhpa=5", "--cql_alhpa cql_alpha"),
        ("--zzz 5", "--zzz"),
        ("--project a/b", "--project a/b"),
        (f"--project {'x' * 129}", "--project"),
        ("--seed 0 1 2", "'1' '[0, 1]'"),
        ("--seed 0,1", "--seed '[0, 1]'"),
        ("configs/hopper.yaml", "configs/hopper.yaml --config_path"),
        ("--policy_log_std_multiplier .nan", "number"),
        ("-s 5", "-s"),
        ("surplus", "surplus"),
        ("seed", "seed argument"),
        ("--device", "--device"),
        ("--device gpu", "--device gpu auto cpu cuda"),
        ("--device cuda:99", "--device cuda:99 cpu"),
        ("--device cuda:99999999999999999999", "--device"),
        ("--config_path", "--config_path"),
    ],
)
def test_a_mistake_on_the_command_line(argv, fragments, refused):
    refused(shlex.split(argv), *fragments.split())


@pytest.mark.parametrize(
    "content, fragments",
    [
        ("max_timestep: 5", "max_timestep max_timesteps"),
        ("5: 5", "5"),
        ("normalize: flase", "normalize bool flase"),
        ("normalize: 'true'", "normalize bool"),
        ("seed: 1.5", "seed int 1.5"),
        ("seed: true", "seed int True"),
        ("seed:", "seed int None"),
        ("seed: [0, 0]", "seed twice"),
        ("seed: {a: 1}", "seed"),
        ("batch_size: [8, 16]", "batch_size int"),
        ("discount: 1.5", "discount 1.5"),
        ("discount: .nan", "discount nan"),
        ("env: []", "env empty"),
        ("max_timesteps: 5\noffline_iterations: 5", "max_timesteps offline_iterations"),
        ("config_path: other.yaml", "config_path"),
        ("", "config.yaml empty"),
        ("# only a comment", "config.yaml empty"),
        ("- seed", "config.yaml"),
        ("seed", "config.yaml"),
        ("seed: [0", "config.yaml"),
        ("seed: 0\n\tname: x", "config.yaml"),
        ("seed: !!python/object/apply:os.system ['touch owned']", "config.yaml"),
        (b"\x80\x03\xff\xfe", "config.yaml"),
        (b"\x00\x01", "config.yaml"),
    ],
)
def test_a_mistake_in_a_yaml_file(content, fragments, refused, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["--config_path", str(file)], *fragments.split())


def test_a_yaml_file_that_is_none(refused, tmp_path):
    for path in ("nowhere.yaml", tmp_path, ""):
        refused(["--config_path", str(path)], "--config_path", path)


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "a b.yaml"
    file.write_text("seed: [3, 4]\nmax_timesteps: 2e3\nname: 007\n")
    config = parsed(["--config_path", str(file), "--seed", "5"])
    assert (config.seed, config.max_timesteps) == (5, 2000)


def command(directory, *argv):
    """Exit status, stdout and stderr as a shell sees them."""
    argv = [sys.executable, ROOT / "cql.py", *argv]
    options = {"capture_output": True, "text": True, "cwd": directory}
    done = subprocess.run(argv, timeout=300, **options)
    return done.returncode, done.stdout, done.stderr


def test_as_a_command(tmp_path):
    status, out, err = command(tmp_path, "--normalize", "flase")
    assert status == 2 and out == "" and list(tmp_path.iterdir()) == []
    assert err.startswith("cql.py: error: --normalize") and err.count("\n") == 1
    file = d4rl_file(tmp_path / "toy.hdf5")
    flags = make_data.arguments(env=file.name, eval_env="make_data:CqlToy-v0")
    status, out, err = command(tmp_path, *flags)
    assert (status, err) == (0, "") and "return" in out
    [directory] = (tmp_path / "runs").iterdir()
    assert (directory / "checkpoint.pt").exists()


def test_reading_the_command_line_is_quick():
    """pyrallis looks through the whole script for each flag's comment if it may."""
    start = time.process_time()
    cql.read_command_line(["--seed", "1"])
    assert time.process_time() - start < 1


# --------------------------------------------------------------------------------------
# Files of flags: ours, wandb's, CORL's
# --------------------------------------------------------------------------------------


def test_our_configs_are_valid():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    files = [file for file in files if "sweeps" not in file.parts]
    assert files
    for file in files:
        given = cql.read_command_line(["--config_path", str(file)])
        config, _ = cql.layered_config(given)
        cql.validate(config)


def test_our_sweeps_generate_commands_that_parse():
    files = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
    assert files
    for file in files:
        sweep = yaml.safe_load(file.read_text())
        for pick in (0, -1):
            chosen = {}
            for flag, options in sweep["parameters"].items():
                ends = [options.get("min"), options.get("max")]
                values = options.get("values") or [options.get("value", ends[pick])]
                chosen[flag] = {"value": values[pick]}
            arguments = create_sweep_command_args({"args": chosen})
            default = ["${env}", "python", "${program}", "${args}"]
            argv = []
            for part in sweep.get("command", default):
                name = part.removeprefix("${").removesuffix("}")
                argv += arguments.get(name, [part]) if part != name else [part]
            assert (ROOT / sweep["program"]).samefile(ROOT / "cql.py")
            known = ("${env}", "${interpreter}", "${program}", "python", "cql.py")
            argv = [part for part in argv if part not in known]
            for i in (i for i, part in enumerate(argv) if part == "--config_path"):
                argv[i + 1] = str(ROOT / argv[i + 1])
            config = parsed(argv)
            for flag, option in chosen.items():
                assert getattr(config, flag) == option["value"], (file, flag)


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "corl").glob("*.yaml")))
def test_corl_s_files_load_unchanged(file, refused):
    values = yaml.safe_load(file.read_text())
    config = parsed(["--config_path", str(file)])
    for flag, value in values.items():
        if isinstance(value, str) and "e" in value and isinstance(FLAGS[flag][0], float):
            value = float(value)  # 1e-4 is text to YAML, and a number to everybody else
        if flag in ("offline_iterations", "online_iterations"):
            value = int(float(value))
        assert getattr(config, flag) == value, flag
    if torch.cuda.is_available():
        pytest.skip("the file's device exists here")
    refused(["--config_path", file], "--device cpu")


@pytest.mark.parametrize(
    "flag, value", [("mixing_ratio", 0.5), ("is_sparse_reward", True)]
)
def test_cal_ql_s_flags_alone_say_that_it_is_off(flag, value, toy):
    status, out, _ = run(env=toy, checkpoints_path="null", **{flag: value})
    lines = [line for line in out.splitlines() if flag in line and "cal_ql" in line]
    assert status == 0 and len(lines) == 1


def test_corl_s_files_say_what_to_pass_for_their_env(refused):
    files = sorted((ROOT / "tests" / "corl").glob("offline_*.yaml"))
    assert len(files) == 3
    for file in files:
        name = yaml.safe_load(file.read_text())["env"]
        refused(["--config_path", file, "--device", "cpu"], f"--env {name}", "hdf5")


# --------------------------------------------------------------------------------------
# Datasets at fault
# --------------------------------------------------------------------------------------


def edited(path, edit):
    """The dataset after edit(its metadata, its open HDF5 file)."""
    metadata = json.loads((path / "data" / "metadata.json").read_text())
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        edit(metadata, file)
    (path / "data" / "metadata.json").write_text(json.dumps(metadata))
    return path


@pytest.fixture
def fresh(tmp_path):
    return toy_dataset(tmp_path / "datasets")


@pytest.mark.parametrize(
    "name, fragments",
    [
        ("hopper-medium-v2", "D4RL hopper-medium-v2.hdf5 mujoco/hopper/medium-v0"),
        ("halfcheetah-medium-expert-v2", "D4RL .hdf5 mujoco/halfcheetah/medium-v0"),
        ("antmaze-umaze-diverse-v2", "D4RL antmaze-umaze-diverse-v2.hdf5"),
        ("pen-human-v1", "D4RL pen-human-v1.hdf5"),
        ("kitchen-complete-v0", "D4RL .hdf5"),
        ("nowhere.hdf5", "no such file"),
        ("./nowhere", "nowhere"),
        ("/nowhere/at/all", "/nowhere/at/all"),
        ("hopper", "hopper mujoco/hopper/medium-v0"),
        ("mujoco/hopper/medium", "mujoco/hopper/medium-v0"),
        ("a b/c-v0", "Minari id"),
        ("../up-v0", "../up-v0"),
        ("two\nlines", "two"),
        ("x" * 300, "x" * 300),
    ],
)
def test_a_dataset_s_name(name, fragments, refused):
    refused(None, "--env", *fragments.split(), env=name)


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), ImportError("hf")]
)
def test_a_dataset_that_cannot_be_downloaded(error, monkeypatch, tmp_path):
    def fails(*_, **__):
        print("noise")
        print("noise", file=sys.stderr)
        raise error

    monkeypatch.setattr(minari, "download_dataset", fails)
    monkeypatch.setenv(
        "MINARI_REMOTE", "hf://nobody"
    )  # asked without a look at the network
    monkeypatch.chdir(tmp_path)
    status, out, err = run(env="nobody/nothing-v0")
    assert status == 2 and err.count("\n") == 1 and "noise" not in out + err
    assert err.startswith("cql.py: error: --env nobody/nothing-v0")
    for part in (str(error).split("\n")[0], os.environ["MINARI_DATASETS_PATH"], ".hdf5"):
        assert part in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_dataset_that_minari_does_not_know(tmp_path):
    """The real thing: an unknown id where there is a network, silence where is none."""
    status, out, err = command(tmp_path, "--env", "cql-tests/nothing-v0")
    assert status == 2 and err.count("\n") == 1 and out.count("\n") <= 1
    assert err.startswith("cql.py: error: --env cql-tests/nothing-v0")
    assert "attribute" not in err and "import" not in err  # the download was tried


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_files(refused, fresh, tmp_path):
    file = d4rl_file(tmp_path / "toy.hdf5")
    for path, name in ((file, file), (fresh / "data" / "main_data.hdf5", fresh)):
        truncated(path)
        refused(None, name, env=name)
        path.write_bytes(b"not HDF5 at all")
        refused(None, name, env=name)
        path.write_bytes(b"")
        refused(None, name, env=name)
    (fresh / "data" / "main_data.hdf5").unlink()
    refused(None, fresh, env=fresh)
    (fresh / "data" / "metadata.json").unlink()
    refused(None, fresh, "metadata.json", env=fresh)


FOREIGN_D4RL = {
    "no rewards": {"rewards": None},
    "no terminals": {"terminals": None},
    "no observations": {"observations": None, "obs": np.zeros((54, 3))},
    "too few actions": {"actions": np.zeros((53, 2))},
    "observations of two dimensions": {"observations": np.zeros((54, 3, 4))},
    "next observations of other dims": {"next_observations": np.zeros((54, 4))},
    "two rewards": {"rewards": np.zeros((54, 2))},
    "three terminals": {"terminals": np.zeros((54, 3))},
    "one reward in all": {"rewards": 0.0},
    "text": {"observations": np.array([b"text"] * 54)},
    "text for rewards": {"rewards": np.array([b"text"] * 54)},
    "no action": {"actions": np.zeros((54, 0))},
    "a group": {"observations/group": np.zeros(3), "observations": None},
}
for _n in (0, 54):
    _two = ("observations", "next_observations")
    FOREIGN_D4RL[f"{_n} of nothing"] = {key: np.zeros((_n, 0)) for key in _two}


@pytest.mark.parametrize("kind", FOREIGN_D4RL)
def test_a_foreign_d4rl_file(kind, refused, tmp_path):
    file = d4rl_file(tmp_path / "toy.hdf5", **FOREIGN_D4RL[kind])
    missing = [kind.split()[1]] if kind.startswith("no ") and kind != "no action" else []
    refused(None, file, *missing, env=file)


def drop_episodes(metadata, file):
    metadata["total_episodes"] = 0
    file.clear()


def short(key):
    def edit(_, file):
        values = file["episode_3"][key][()]
        del file["episode_3"][key]
        file["episode_3"][key] = values[:-1]

    return edit


def delete(key):
    return lambda _, file: file.__delitem__(key)


def replace(key, value):
    def edit(_, file):
        del file[key]
        file[key] = value

    return edit


def record(**values):
    """Metadata with these values; None deletes the key."""

    def edit(metadata, _):
        metadata.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del metadata[key]

    return edit


def group(key):
    def edit(_, file):
        del file[key]
        file[f"{key}/point"] = np.zeros(18)

    return edit


def spec(text):
    return record(env_spec=text)


FOREIGN_MINARI = {
    "no episodes": (drop_episodes, "no episodes"),
    "short observations": (short("observations"), "episode 3"),
    "short actions": (short("actions"), "episode 3"),
    "short rewards": (short("rewards"), "episode 3"),
    "short terminations": (short("terminations"), "episode 3"),
    "short truncations": (short("truncations"), "episode 3"),
    "no episode 3": (delete("episode_3"), "episode_3"),
    "no rewards": (delete("episode_3/rewards"), "rewards"),
    "no observations": (delete("episode_3/observations"), "observations"),
    "one reward in all": (replace("episode_3/rewards", 1.0), ""),
    "one action in all": (replace("episode_3/actions", 1.0), ""),
    "other dimensions": (replace("episode_3/observations", np.zeros((18, 4))), ""),
    "a group": (group("episode_3/observations"), ""),
    "text": (replace("episode_3/rewards", [b"a", b"b", b"c", b"d"]), ""),
    "too many episodes": (record(total_episodes=99), "episode_8"),
    "text for episodes": (record(total_episodes="all"), "metadata"),
    "negative episodes": (record(total_episodes=-1), "no episodes"),
    "no number of episodes": (record(total_episodes=None), "total_episodes"),
    "no observation space": (record(observation_space=None), "observation_space"),
    "no action space": (record(action_space=None), "action_space"),
    "space {}": (record(observation_space="{}"), "metadata"),
    "space []": (record(observation_space="[]"), "metadata"),
    "space null": (record(observation_space="null"), "metadata"),
    "space 5": (record(action_space=5), "metadata"),
    "unknown space": (record(action_space='{"type": "Wrong"}'), "metadata"),
    "incomplete space": (record(action_space='{"type": "Box"}'), "metadata"),
    "unknown format": (record(data_format="zip"), "hdf5"),
    "spec {": (spec("{"), "metadata"),
    "spec []": (spec("[]"), "metadata"),
    "spec with id 5": (spec('{"id": 5}'), ""),
    "spec of wrong kwargs": (spec('{"id": "CqlToy-v0", "kwargs": {"wrong": 1}}'), ""),
    "spec unknown": (spec('{"id": "Nowhere-v0"}'), "Nowhere-v0 --eval_env"),
    "text for a score": (record(ref_min_score="low", ref_max_score=1.0), "metadata"),
    "equal scores": (record(ref_min_score=1.0, ref_max_score=1.0), ""),
}


@pytest.mark.parametrize("kind", FOREIGN_MINARI)
def test_a_foreign_minari_dataset(kind, refused, fresh):
    edit, fragments = FOREIGN_MINARI[kind]
    refused(None, *fragments.split(), env=edited(fresh, edit))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "5", '"text"'])
def test_metadata_that_is_none(text, refused, fresh):
    (fresh / "data" / "metadata.json").write_text(text)
    refused(None, fresh, "metadata.json", env=fresh)


def test_fewer_transitions_than_a_batch(refused, toy, tmp_path):
    refused(None, "--env", "54 ", "batch", "55", env=toy, batch_size=55)
    file = d4rl_file(tmp_path / "toy.hdf5", random_episodes([3, 4]))
    refused(None, "--env", "7 ", "batch", "8", env=file)
    cut = random_episodes([1], ends="cut")  # of which no s' is known
    file = d4rl_file(tmp_path / "none.hdf5", cut, next_observations=None)
    refused(None, file, env=file, batch_size=1)


FIELDS = ("observations", "actions", "rewards", "terminations")


@pytest.mark.parametrize("value", [math.nan, inf, -inf, 1e300])  # 1e300 in float32: inf
@pytest.mark.parametrize("field", FIELDS)
def test_values_that_are_not_finite(field, value, refused, tmp_path):
    lengths = [5, 1, 6, 1, 7]
    for row in (0, -1):  # the last observation is that after the last action
        episodes = random_episodes(lengths)
        episodes = [{**e, field: e[field].astype(float)} for e in episodes]
        episodes[3][field][row, ...] = value
        name = f"toy/{field}{-row}-v0"
        path = minari_dataset(tmp_path / "datasets", name, episodes)
        refused(None, path, "episode 3", field, env=path)
        file = d4rl_file(tmp_path / "toy.hdf5", episodes)
        # An infinite s' is not the next s, so that episodes may be counted otherwise.
        named = "episode" if field == "observations" else "episode 3"
        refused(None, file, named, "termina" if "term" in field else field, env=file)
    good = minari_dataset(tmp_path / "datasets", "toy/good-v0", random_episodes(lengths))
    refused(None, path, "episode 3", field, env=[good, path])


def test_the_episode_named_counts_empty_ones(refused, tmp_path):
    episodes = random_episodes([5, 6, 7])
    episodes[2]["rewards"][3] = math.nan
    path = minari_dataset(tmp_path / "datasets", "toy/nan-v0", episodes)
    nothing = {"observations": np.zeros((1, 3)), "actions": np.zeros((0, 2))}
    nothing |= {key: np.zeros(0) for key in ("rewards", "terminations", "truncations")}

    def empty_the_first(_, file):
        for key, value in nothing.items():
            replace(f"episode_0/{key}", value)(_, file)

    refused(None, path, "episode 2", "rewards", env=edited(path, empty_the_first))


@pytest.mark.parametrize("excess, accepted", [(1e-6, True), (1e-2, False), (9.0, False)])
def test_actions_out_of_bounds(excess, accepted, refused, tmp_path):
    episodes = random_episodes([5, 6, 7])
    episodes[1]["actions"][2, 1] = -1 - excess
    space = gym.spaces.Box(-1, 1, (2,))
    path = minari_dataset(
        tmp_path / "datasets", "toy/far-v0", episodes, action_space=space
    )
    file = d4rl_file(tmp_path / "toy.hdf5", episodes)
    for env in (path, file):
        if accepted:
            status, _, err = run(env=env, checkpoints_path="null")
            assert (status, err) == (0, "")
        else:
            refused(None, env, "episode 1", "action", "bounds", env=env)


Box = gym.spaces.Box
ACTIONS = {
    "unbounded": Box(-inf, inf, (2,)),
    "half bounded": Box(np.float32([-inf, -1]), np.float32([1, 1])),
    "a point": Box(np.float32([0, -1]), np.float32([0, 1])),
    "mixed": gym.spaces.Dict(a=Box(-1, 1, (2,)), b=gym.spaces.Discrete(2)),
    "tuple": gym.spaces.Tuple((Box(-1, 1, (1,)), Box(-1, 1, (1,)))),
    "multi-discrete": gym.spaces.MultiDiscrete([2, 2]),
    "multi-binary": gym.spaces.MultiBinary(2),
    "discrete": gym.spaces.Discrete(3),
}
OBSERVATIONS = {
    "images": Box(0, 255, (32, 32, 3), np.uint8),
    "images, channels first": Box(0, 1, (3, 16, 16), np.float32),
    "images within": gym.spaces.Dict(
        a=Box(-1, 1, (2,)), b=Box(0, 255, (64, 64), np.uint8)
    ),
    "text": gym.spaces.Text(4),
    "discrete": gym.spaces.Discrete(3),
}


def recorded(tmp_path, **spaces):
    """A dataset whose metadata claims these spaces."""
    episodes = random_episodes([9, 9])
    for episode in episodes:
        episode["actions"] *= 0  # within all bounds
    path = minari_dataset(tmp_path / "datasets", "toy/spaces-v0", episodes)
    texts = {key: minari.serialization.serialize_space(s) for key, s in spaces.items()}
    return edited(path, record(**texts))


@pytest.mark.parametrize("kind", ACTIONS)
def test_action_spaces_that_are_not_supported(kind, refused, tmp_path):
    if kind == "discrete" and hasattr(cql, "DiscreteCQL"):
        pytest.skip("supported")
    path = recorded(tmp_path, action_space=ACTIONS[kind])
    refused(None, path, "action", "Box", env=path)


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_observation_spaces_that_are_not_supported(kind, refused, tmp_path):
    path = recorded(tmp_path, observation_space=OBSERVATIONS[kind])
    err = refused(None, path, "observations", "Box", env=path)
    assert "image" in err or not kind.startswith("images")


@pytest.fixture(scope="module")
def wide():
    """An environment like the toy but for the bounds of its actions."""
    gym.register("CqlWide-v0", entry_point="make_data:Toy", kwargs={"low": -2})
    yield "CqlWide-v0"
    del gym.registry["CqlWide-v0"]


@pytest.mark.parametrize(
    "name, fragments",
    [
        ("Pendulum-v1", "match"),  # one action
        ("CartPole-v1", "match discrete"),
        ("MountainCarContinuous-v0", "match"),  # two observations
        ("CqlWide-v0", "-2.0 -1.0"),  # other bounds
        ("Nowhere-v0", "Nowhere"),
        ("no_module:CqlToy-v0", "no_module"),
        ("make_data:Nowhere-v0", "Nowhere"),
    ],
)
def test_an_eval_env_that_does_not_fit(name, fragments, refused, toy, wide, tmp_path):
    refused(None, "--eval_env", name, *fragments.split(), env=toy, eval_env=name)
    if name != wide:  # whose bounds a bare file would take
        file = d4rl_file(tmp_path / "bare.hdf5")
        refused(None, "--eval_env", name, env=file, eval_env=name)


def test_datasets_that_cannot_be_joined(refused, toy, tmp_path):
    root = tmp_path / "datasets"
    wide = toy_dataset(root, "toy/wide-v0", env_kwargs={"low": -2})
    taller = minari_dataset(root, "toy/tall-v0", random_episodes([9, 9], obs_dim=4))
    stranger = toy_dataset(root, "toy/stranger-v0")
    edited(stranger, record(env_spec='{"id": "Pendulum-v1", "kwargs": {}}'))
    for other in (wide, taller, stranger):
        refused(None, other, env=[toy, other])
    refused(None, toy, env=[wide, toy])


# --------------------------------------------------------------------------------------
# Checkpoints, directories, devices
# --------------------------------------------------------------------------------------


def foreign_checkpoints(good):
    """Bytes or payloads that are no checkpoint of this script's; what to say of each."""
    payload = torch.load(good, weights_only=True)
    raw = good.read_bytes()
    yield raw[: len(raw) // 2], "checkpoint"
    yield b"", "checkpoint"
    yield b"hello", "checkpoint"
    yield [1, 2], "checkpoint"
    yield {"actor": torch.zeros(3)}, "checkpoint"
    yield {**payload, "version": payload["version"] + 1}, "version"
    yield {**payload, "kind": "OtherCQL"}, "OtherCQL"
    for key in ("version", "kind", "config", "task", "agent"):
        yield {k: v for k, v in payload.items() if k != key}, "checkpoint"


def test_a_checkpoint_that_is_none(finished, toy, refused, tmp_path):
    path = tmp_path / "other.pt"
    for content, fragment in foreign_checkpoints(finished / "checkpoint.pt"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        refused(None, path, fragment, env=toy, load_model=path)
    refused(None, "nowhere.pt", env=toy, load_model="nowhere.pt")
    (tmp_path / "empty").mkdir()
    refused(None, "empty/checkpoint.pt", env=toy, load_model="empty")


class Planted:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_runs_no_code(toy, refused, tmp_path):
    torch.save(
        {"format": "cql.py", "version": 1, "agent": Planted()}, tmp_path / "bad.pt"
    )
    refused(None, "bad.pt", env=toy, load_model="bad.pt")


@pytest.mark.parametrize(
    "flags",
    [{"hidden_dim": 16}, {"n_critics": 3}, {"q_n_hidden_layers": 2}, {"seed": [0, 1]}],
)
def test_a_checkpoint_of_another_shape(flags, finished, toy, refused):
    path = finished / "checkpoint.pt"
    refused(None, path, "shape", **{"env": toy, "load_model": path, **flags})


@pytest.mark.parametrize(
    "flags", [{"hidden_dim": 10**9}, {"q_n_hidden_layers": 10**9}, {"n_critics": 10**9}]
)
def test_a_checkpoint_that_claims_another_shape(flags, finished, toy, refused, tmp_path):
    """Refused before networks of that size are made, which might take all memory."""
    payload = torch.load(finished / "checkpoint.pt", weights_only=True)
    payload["config"] |= flags
    torch.save(payload, tmp_path / "other.pt")
    refused(None, "other.pt: garbled", "critics", env=toy, load_model="other.pt")


def test_a_checkpoint_of_another_task(finished, refused, tmp_path):
    taller = d4rl_file(tmp_path / "tall.hdf5", random_episodes([9, 9], obs_dim=4))
    path = finished / "checkpoint.pt"
    refused(None, path, "shape", env=taller, load_model=path)


@pytest.mark.parametrize(
    "flags",
    [
        {"cql_alpha": 5},
        {"seed": 1},
        {"seed": [0, 1]},
        {"batch_size": 4},
        {"env": "toy/other-v0"},
        {"normalize": False},
    ],
)
def test_a_resumed_run_cannot_change(flags, finished, refused):
    [(flag, value)] = flags.items()
    given = {**dict.fromkeys(make_data.TINY), "max_timesteps": 9, "resume": finished}
    refused(None, f"--{flag} {value}", finished, **{**given, **flags})


def test_a_damaged_run_cannot_be_resumed(refused, toy, tmp_path):
    directory = tmp_path / "run"
    assert run(env=toy, resume=directory)[0] == 0
    truncated(directory / "checkpoint.pt")
    refused(["--resume", directory], directory / "checkpoint.pt")
    (directory / "config.yaml").write_text("sead: 1")
    refused(["--resume", directory], "config.yaml", "sead", "seed")
    (directory / "config.yaml").unlink()
    refused(["--resume", directory], directory)


def test_a_run_without_its_config_resumes_from_the_checkpoint_s(toy, tmp_path):
    directory = tmp_path / "run"
    assert run(env=toy, resume=directory)[0] == 0
    (directory / "config.yaml").unlink()
    status, out, err = run(["--resume", directory, "--max_timesteps", "5"])
    assert (status, err) == (0, "") and "5" in out
    assert torch.load(directory / "checkpoint.pt", weights_only=True)["step"] == 5


def test_a_finished_run_is_not_trained_on(toy, tmp_path):
    """Asked for fewer updates than it has had, it ends; it does not run for ever."""
    directory = tmp_path / "run"
    assert run(env=toy, resume=directory)[0] == 0
    with make_data.deadline(20):
        status, _, err = run(["--resume", directory, "--max_timesteps", "1"])
    assert status == 0 or (status == 2 and "--max_timesteps 1" in err)
    assert torch.load(directory / "checkpoint.pt", weights_only=True)["step"] == 3


def test_foreign_tables_are_left_alone(toy, tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,loss\n1,0.5\n")
    status, _, err = run(env=toy, resume=tmp_path)
    assert status == 2 and str(table) in err and err.count("\n") == 1
    assert table.read_text() == "epoch,loss\n1,0.5\n"


def test_the_written_config_can_be_run_again(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"offline_iterations": 2, "max_timesteps": None, "seed": [0, 1]}
    flags |= {"name": "007", "cql_clip_diff_min": "-.inf", "eval_env": "CqlToy-v0"}
    assert run(env=toy, resume="first", **flags)[0] == 0
    status, out, err = run(["--config_path", "first/config.yaml", "--resume", "second"])
    assert (status, err) == (0, "")
    first, second = (Path(d, "config.yaml").read_text() for d in ("first", "second"))
    assert first == second and "name: '007'" in first
    tables = (Path(d, "evaluations.csv").read_text() for d in ("first", "second"))
    assert next(tables) == next(tables)


def test_null_writes_nothing_and_says_so(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(env=toy, checkpoints_path="null")
    assert (status, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert "checkpoints_path" in out and "nothing" in out


def test_a_directory_in_use(refused, finished):
    descriptor = os.open(finished / ".lock", os.O_WRONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        refused(["--resume", finished, "--max_timesteps", "9"], finished, "in use")
    finally:
        os.close(descriptor)
    assert run(["--resume", str(finished), "--max_timesteps", "4"])[0] == 0


def test_places_that_cannot_be_written(refused, toy, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for flag in ("checkpoints_path", "resume"):
        refused(None, file, env=toy, **{flag: file})
        refused(None, file / "below", env=toy, **{flag: file / "below"})
        refused(None, "/proc/nowhere", env=toy, **{flag: "/proc/nowhere/below"})
        refused(None, "directory", env=toy, **{flag: ""})
        refused(None, "x" * 300, env=toy, **{flag: "x" * 300})
        refused(None, f"--{flag}", "NUL", env=toy, **{flag: "a\0b"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there(device, refused, toy):
    refused(None, f"--device {device}", "--device cpu", env=toy, device=device)


def test_a_mode_that_wandb_does_not_have(refused, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offlien")
    refused([], "WANDB_MODE offlien")


def test_a_sweep_file_is_no_file_of_flags(refused):
    path = ROOT / "configs" / "sweeps" / "cql_alpha.yaml"
    refused([f"--config_path={path}"], path, "wandb sweep")
