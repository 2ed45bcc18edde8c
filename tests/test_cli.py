"""Tests of the command line: flags, files of flags, and the refusal of mistakes."""

import ast
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
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

# The flags of CORL's offline and finetune scripts, in the groups of --help. Defaults are
# those of the offline script; flags that only the finetune scripts have are off.
CORL = {
    "data": {
        "env": "halfcheetah-medium-expert-v2",
        "normalize": True,
        "normalize_reward": False,
        "reward_scale": 5.0,
        "reward_bias": -1.0,
    },
    "run": {
        "device": "cuda",
        "seed": 0,
        "max_timesteps": 1_000_000,
        "offline_iterations": None,
        "checkpoints_path": None,
        "load_model": "",
        "project": "CORL",
        "group": "CQL-D4RL",
        "name": "CQL",
    },
    "evaluation": {"eval_freq": 5000, "n_episodes": 10, "eval_seed": 0},
    "algorithm": {
        "batch_size": 256,
        "discount": 0.99,
        "policy_lr": 3e-5,
        "qf_lr": 3e-4,
        "soft_target_update_rate": 5e-3,
        "target_update_period": 1,
        "alpha_multiplier": 1.0,
        "use_automatic_entropy_tuning": True,
        "backup_entropy": False,
        "bc_steps": 0,
        "cql_alpha": 10.0,
        "cql_n_actions": 10,
        "cql_importance_sample": True,
        "cql_temp": 1.0,
        "cql_lagrange": False,
        "cql_target_action_gap": -1.0,
        "cql_max_target_backup": False,
        "cql_clip_diff_min": -inf,
        "cql_clip_diff_max": inf,
        "is_sparse_reward": False,
    },
    "networks": {
        "q_n_hidden_layers": 3,
        "orthogonal_init": True,
        "policy_log_std_multiplier": 1.0,
    },
    "online": {
        "online_iterations": 0,
        "buffer_size": 2_000_000,
        "mixing_ratio": -1.0,
        "cql_alpha_online": None,
    },
    "speed": {},
}
# Defaults that differ from CORL's; the flag's comment says so.
DIFFERENT = {
    "env": "mujoco/hopper/medium-v0",
    "reward_scale": 1.0,
    "reward_bias": 0.0,
    "device": "auto",
    "checkpoints_path": "runs",
}
# Our own flags, with their defaults.
OURS = {
    "data": {},
    "run": {"resume": None, "log_freq": 1000, "checkpoint_freq": 0},
    "evaluation": {"eval_env": None, "max_episode_steps": None},
    "algorithm": {"penalty": "logsumexp", "cal_ql": False},
    "networks": {"hidden_dim": 256, "n_critics": 2, "n_target_critics": None},
    "online": {"utd": 1, "exploration_epsilon": 0.1},
    "speed": {
        "cql_backward_actions": 0,
        "cql_states": 0,
        "precision": "fp32",
        "compile": None,
    },
}
GROUPS = {name: {**flags, **OURS[name]} for name, flags in CORL.items()}
FLAGS = {flag: default for flags in GROUPS.values() for flag, default in flags.items()}
FLAGS |= DIFFERENT
OPTIONAL = [
    flag for flag, field in cql.FIELDS.items() if type(None) in cql.get_args(field.type)
]
LISTS = {"seed": int, "cql_alpha": float, "cql_temp": float}
LISTS |= {"cql_target_action_gap": float}


def read(argv):
    """Return the config of a command line."""
    return cql.read_config(shlex.split(argv) if isinstance(argv, str) else argv)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Make downloads fail, so that an accepted mistake does not start one."""

    def fail(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_dataset(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """Return the directory of a finished run on the toy dataset."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    assert run(env=toy, resume=directory, name="007")[0] == 0
    return directory


# --------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_and_its_default(flag):
    """Every flag of CORL and of this project exists; a fork may add more."""
    value = getattr(cql.TrainConfig(), flag)
    assert value == FLAGS[flag] and type(value) is type(FLAGS[flag])


@pytest.fixture(scope="module")
def help_texts():
    """Return the text of --help for each flag, in its order."""
    status, out, err = run(["--help"])
    assert status == 0 and err == ""
    texts, flag = {}, None
    for line in out.splitlines():
        start = re.match(r"  --(\w+) \S+ *(.*)", line)
        if start:
            flag, line = start.groups()
            texts[flag] = ""
        if re.match(r"\w+:$", line):
            flag = None
        if flag:
            texts[flag] = f"{texts[flag]} {line.strip()}".strip()
    return texts


def test_help_lists_the_flags_in_the_dataclass_s_order(help_texts):
    names = [field.name for field in dataclasses.fields(cql.TrainConfig)]
    assert [flag for flag in help_texts if flag != "config_path"] == names


def test_help_has_the_groups_of_flags_and_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(["--help"])
    words = re.findall(r"^(\w+):$|^  --(\w+) ", out, re.M)
    found, heading = {}, ""
    for title, flag in words:
        heading = title or heading
        if flag:
            found.setdefault(heading.lower(), set()).add(flag)
    for name, flags in GROUPS.items():  # a fork may add more
        assert set(flags) <= found[name]
    assert max(map(len, out.splitlines())) <= 80


def test_the_groups_of_flags_follow_each_other():
    names, last = list(cql.FIELDS), -1
    for group, flags in GROUPS.items():
        places = [names.index(flag) for flag in flags]
        assert min(places) > last, group
        last = max(places)


@pytest.mark.parametrize("flag", FLAGS)
def test_help_tells_meaning_and_default(flag, help_texts):
    meaning, _, default = help_texts[flag].partition("(default: ")
    assert default == f"{FLAGS[flag]})"
    assert len(meaning.split()) >= 2
    corl = {name: x for flags in CORL.values() for name, x in flags.items()}
    if flag in DIFFERENT and flag != "env":
        shown = {None: "null"}.get(corl[flag], f"{corl[flag]}".removesuffix(".0"))
        assert re.search(rf"CORL\S*:? (default: )?{shown}\b", meaning)


def test_every_flag_is_read():
    """Every flag is read outside of its validation, so none is accepted and unused."""
    checks = "check_number algorithm_mistakes phase_mistakes validate_algorithm".split()
    tree, used = ast.parse(Path(cql.__file__).read_text()), set(cql.SWEPT)
    for body in tree.body:
        if getattr(body, "name", "") in checks:
            continue
        for node in ast.walk(body):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                if getattr(owner, "attr", getattr(owner, "id", "")) == "config":
                    used.add(node.attr)
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
                used |= {getattr(argument, "value", None) for argument in node.args}
    used |= {"max_timesteps", "offline_iterations"}  # read in the dataclass
    assert set(FLAGS) - used == set()


@pytest.mark.parametrize(
    "argv, flag, expected",
    [
        ("--max_timesteps 1e6", "max_timesteps", 1_000_000),
        ("--max_timesteps=2e3", "max_timesteps", 2000),
        ("--buffer_size 10_000", "buffer_size", 10_000),
        ("--offline_iterations 1e6", "max_timesteps", 1_000_000),
        ("--offline_iterations 7", "max_timesteps", 7),
        ("--policy_lr 1e-4", "policy_lr", 1e-4),
        ("--discount 1", "discount", 1.0),
        # A text flag keeps the text as typed.
        ("--name 007", "name", "007"),
        ("--name true", "name", "true"),
        ("--name 1e6", "name", "1e6"),
        ("--name null", "name", "null"),
        ("--name [a,b]", "name", "[a,b]"),
        ("--name 'a b: c'", "name", "a b: c"),
        ("--name=a=b", "name", "a=b"),
        ("--group ''", "group", ""),
        ("--group -x", "group", "-x"),
        ("--load_model ''", "load_model", ""),
        ("--load_model=", "load_model", ""),
        ("--checkpoints_path none", "checkpoints_path", "none"),
        ("--eval_env none", "eval_env", "none"),
        ("--env 007", "env", "007"),
        ("--env 'my data/é.hdf5'", "env", "my data/é.hdf5"),
        # Numbers may start with a minus or be infinite.
        ("--cql_clip_diff_min -inf", "cql_clip_diff_min", -inf),
        ("--cql_clip_diff_min -.inf", "cql_clip_diff_min", -inf),
        ("--cql_clip_diff_min -200", "cql_clip_diff_min", -200.0),
        ("--cql_clip_diff_min=-.5", "cql_clip_diff_min", -0.5),
        ("--cql_clip_diff_max inf", "cql_clip_diff_max", inf),
        ("--cql_target_action_gap -1e-1", "cql_target_action_gap", -0.1),
        # A boolean flag without a value is true.
        ("--cql_lagrange", "cql_lagrange", True),
        ("--cql_lagrange --seed 1", "seed", 1),
        ("--seed 1 --cql_lagrange", "cql_lagrange", True),
        ("--normalize false", "normalize", False),
        ("--normalize=True", "normalize", True),
        ("--seed [0,1,2]", "seed", [0, 1, 2]),
        ("--seed=[3]", "seed", [3]),
        ("--seed 9223372036854775807", "seed", 2**63 - 1),
        ("--cql_alpha '[1, 5e-1, 1e1]'", "cql_alpha", [1.0, 0.5, 10.0]),
        ("--cql_temp [1,2]", "cql_temp", [1.0, 2.0]),
        ("--env '[\"a\", b c]'", "env", ["a", "b c"]),
        ("--env a/b-v0", "env", "a/b-v0"),
    ],
)
def test_values_are_read_as_written(argv, flag, expected):
    value = getattr(read(argv), flag)
    assert value == expected and type(value) is type(expected)
    if isinstance(expected, list):
        assert [type(v) for v in value] == [type(v) for v in expected]


@pytest.mark.parametrize("word", ["null", "~", "None"])
@pytest.mark.parametrize("flag", OPTIONAL)
def test_words_that_mean_null(flag, word, tmp_path):
    """Words for null work in a file, too, although None is text in YAML."""
    others = {}
    if flag == "env":  # flags that training without data needs
        others = {"eval_env": "CartPole-v1", "online_iterations": 9, "max_timesteps": 0}
        others |= {"normalize": False, "batch_size": 8}
    argv = [f"--{name}={value}" for name, value in others.items()]
    assert getattr(read([*argv, f"--{flag}={word}"]), flag) is None
    assert getattr(read([*argv, f"--{flag}", word]), flag) is None
    file = tmp_path / "flags.yaml"
    file.write_text(f"{flag}: {word}\n")
    assert getattr(read([*argv, "--config_path", str(file)]), flag) is None


@pytest.mark.parametrize("flag", LISTS)
def test_flags_that_take_a_list(flag):
    lagrange = ["--cql_lagrange"] if flag == "cql_target_action_gap" else []
    config = read([f"--{flag}", "[3, 1, 2]", *lagrange])
    runs = cql.product_of_runs(config)
    assert [each[flag] for each in runs] == [3, 1, 2]
    assert {type(each[flag]) for each in runs} == {LISTS[flag]}


def test_the_product_of_lists():
    runs = cql.product_of_runs(read("--seed [0,1] --cql_alpha [1,5,10]"))
    assert [each["run"] for each in runs] == list(range(6))
    pairs = [(each["seed"], each["cql_alpha"]) for each in runs]
    assert pairs == [(0, 1), (0, 5), (0, 10), (1, 1), (1, 5), (1, 10)]


@pytest.mark.parametrize(
    "argv, fragments",
    [
        # Types
        ("--normalize flase", "--normalize true 'flase'"),
        ("--normalize 1", "--normalize true"),
        ("--normalize null", "--normalize true"),
        ("--seed 1.5", "--seed 1.5 whole"),
        ("--seed true", "--seed whole"),
        ("--seed one", "--seed whole"),
        ("--seed ''", "--seed whole"),
        ("--seed None", "--seed whole"),
        ("--seed 1e400", "--seed"),
        ("--seed", "--seed value"),
        ("--seed --name x", "--seed value"),
        ("--device", "--device value"),
        ("--config_path", "--config_path value"),
        ("--batch_size [8,16]", "--batch_size whole"),
        ("--batch_size 8.5", "--batch_size whole"),
        ("--batch_size null", "--batch_size whole"),
        ("--n_target_critics none", "--n_target_critics whole"),
        ("--max_timesteps 1e-3", "--max_timesteps whole"),
        ("--discount [0.9,0.99]", "--discount number"),
        # Lists
        ("--seed 0 1 2", "'1' '[0, 1]'"),
        ("--seed 0,1", "--seed '[0, 1]'"),
        ("--seed []", "--seed empty"),
        ("--seed [0,0]", "--seed twice"),
        ("--seed [0,1.0,1]", "--seed twice"),
        ("--seed [0,true]", "--seed"),
        ("--seed [[0,1]]", "--seed"),
        ("--seed [0,", "--seed"),
        ("--seed {a:1}", "--seed"),
        ("--cql_alpha [1,1.0]", "--cql_alpha twice"),
        ("--cql_alpha []", "--cql_alpha empty"),
        ("--cql_alpha [1,null]", "--cql_alpha"),
        ("--env []", "--env empty"),
        ("--env ''", "--env"),
        ("--env ['']", "--env"),
        # Ranges
        ("--seed -1", "--seed -1"),
        ("--cql_alpha -1", "--cql_alpha -1"),
        ("--cql_alpha [1,.nan]", "--cql_alpha nan"),
        ("--cql_alpha .inf", "--cql_alpha inf"),
        ("--cql_temp 0", "--cql_temp"),
        ("--cql_temp [1,-1]", "--cql_temp"),
        ("--cql_target_action_gap .nan", "--cql_target_action_gap nan"),
        ("--discount 1.5", "--discount 1.5: must lie in [0, 1]"),
        ("--discount -0.1", "--discount 0"),
        ("--discount .nan", "--discount"),
        ("--batch_size 0", "--batch_size 0: must be at least 1"),
        ("--n_episodes 0", "--n_episodes 0"),
        ("--max_episode_steps 0", "--max_episode_steps 0"),
        ("--max_timesteps -1", "--max_timesteps -1"),
        ("--offline_iterations -1", "-1"),
        ("--eval_freq 0", "--eval_freq 0"),
        ("--log_freq 0", "--log_freq 0"),
        ("--checkpoint_freq -1", "--checkpoint_freq -1"),
        ("--fqe_updates 1", "--fqe_updates scripts/judge.py"),
        ("--buffer_size 0", "--buffer_size 0"),
        ("--policy_lr -1e-4", "--policy_lr -0.0001"),
        ("--policy_lr .nan", "--policy_lr nan"),
        ("--qf_lr .inf", "--qf_lr inf"),
        ("--soft_target_update_rate 2", "--soft_target_update_rate"),
        ("--target_update_period 0", "--target_update_period 0"),
        ("--cql_n_actions 0", "--cql_n_actions 0"),
        ("--q_n_hidden_layers 0", "--q_n_hidden_layers 0"),
        ("--hidden_dim 0", "--hidden_dim 0"),
        ("--n_critics 0", "--n_critics 0"),
        ("--n_target_critics 0", "--n_target_critics 0"),
        ("--bc_steps -1", "--bc_steps -1"),
        ("--eval_seed -1", "--eval_seed -1"),
        ("--utd 0", "--utd 0"),
        ("--exploration_epsilon 1.1", "--exploration_epsilon"),
        ("--exploration_epsilon -0.1", "--exploration_epsilon"),
        ("--online_iterations -1", "--online_iterations -1"),
        ("--cql_alpha_online -1", "--cql_alpha_online -1"),
        ("--mixing_ratio 1.5", "--mixing_ratio"),
        ("--mixing_ratio -2", "--mixing_ratio"),
        ("--cql_backward_actions -1", "--cql_backward_actions -1"),
        ("--reward_scale .nan", "--reward_scale nan: must be a finite number"),
        ("--reward_scale .inf", "--reward_scale inf: must be a finite number"),
        ("--reward_scale null --normalize_reward true", "--normalize_reward true null"),
        (
            "--reward_scale null --env null --normalize false --eval_env CartPole-v1 "
            "--online_iterations 300 --max_timesteps 0",
            "--env null --reward_scale",
        ),
        ("--reward_bias .nan", "--reward_bias nan"),
        ("--policy_log_std_multiplier .nan", "--policy_log_std_multiplier nan"),
        ("--cql_clip_diff_min .nan", "--cql_clip_diff_min nan"),
        ("--penalty logsumexpp", "--penalty logsumexp mean"),
        ("--precision fp8", "--precision fp32 bf16"),
        # Contradictions
        ("--n_target_critics 3", "--n_target_critics --n_critics"),
        ("--cql_backward_actions 31", "--cql_backward_actions cql_n_actions"),
        ("--cql_states -1", "--cql_states -1"),
        ("--cql_states 257", "--cql_states batch_size"),
        ("--precision tf32 --device cpu", "--precision tf32"),
        ("--penalty mean --cql_importance_sample false", "--penalty importance"),
        ("--cql_target_action_gap [1,2]", "--cql_target_action_gap cql_lagrange"),
        ("--is_sparse_reward --discount 1", "--is_sparse_reward discount"),
        ("--cql_clip_diff_min 1 --cql_clip_diff_max 0", "--cql_clip_diff_min max"),
        ("--max_timesteps 5 --offline_iterations 6", "max_timesteps offline_iterations"),
        # Names
        ("--max_timestep 5", "--max_timestep max_timesteps"),
        ("--max-timesteps 5", "--max-timesteps max_timesteps"),
        ("--cql_alhpa=5", "--cql_alhpa cql_alpha"),
        ("--se 1", "--se unknown"),  # a prefix is no flag
        ("--zzz 5", "--zzz"),
        ("-s 5", "-s"),
        ("surplus", "surplus"),
        ("''", "argument"),
        ("--", "--"),
        ("seed", "'seed'"),
        ("seed=5", "'seed=5'"),
        ("configs/hopper.yaml", "configs/hopper.yaml --config_path"),
        # Devices
        ("--device gpu", "--device gpu cpu"),
        ("--device ''", "--device"),
        ("--device meta", "--device meta"),
        ("--device cuda:99", "--device cuda:99 cpu"),
        ("--device cuda:99999999999999999999", "--device"),
    ],
)
def test_a_mistake_on_the_command_line(argv, fragments, refused):
    refused(shlex.split(argv), *fragments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(device, refused, toy):
    refused(None, f"--device {device}", "--device cpu", env=toy, device=device)


@pytest.mark.parametrize(
    "argv",
    [
        "--seed 1 --seed 2",
        "--seed=1 --seed 1",
        "--cql_lagrange --cql_lagrange false",
        "--offline_iterations null --offline_iterations 3",
        "--config_path nowhere.yaml --config_path nowhere.yaml",
    ],
)
def test_a_flag_given_twice(argv, refused, tmp_path):
    (tmp_path / "nowhere.yaml").write_text("seed: 3\n")
    flag = argv.split()[0].split("=")[0]
    refused(shlex.split(argv), flag, "twice")


def test_as_a_command(tmp_path):
    """The script runs as a command, with exit status and output streams."""
    file = d4rl_file(tmp_path / "toy.hdf5")
    flags = make_data.arguments(env=file.name, eval_env="make_data:CqlToy-v0")
    argv = [sys.executable, ROOT / "cql.py", *flags]
    options = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(argv, timeout=300, **options)
    assert (done.returncode, done.stderr) == (0, "") and "return" in done.stdout
    [directory] = (tmp_path / "runs").iterdir()
    assert (directory / "checkpoint.pt").exists()


def test_reading_flags_looks_through_no_source(monkeypatch):
    """pyrallis does not read the script's source for each flag, which takes seconds."""
    calls, getsource = [], cql.inspect.getsource

    def counted(thing):
        calls.append(thing)
        return getsource(thing)

    monkeypatch.setattr(cql.inspect, "getsource", counted)
    read("--seed 1")
    assert calls == []
    assert run(["--help"])[0] == 0
    assert len(calls) <= 1


# --------------------------------------------------------------------------------------
# Layers: a resumed run's config.yaml or a loaded model's, --config_path, flags
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["name", "resume"])
def test_a_text_that_is_a_number_to_yaml(flag, tmp_path):
    """A text flag in a file takes a number without quotes, for example a year."""
    (tmp_path / "file.yaml").write_text(f"{flag}: 2024\n")
    config = read(["--config_path", str(tmp_path / "file.yaml")])
    assert getattr(config, flag) == "2024"


def test_flags_stand_above_the_file(tmp_path):
    file = tmp_path / "a b.yaml"
    file.write_text("seed: [3, 4]\nmax_timesteps: 2e3\nname: '007'\n")
    for argv in (
        ["--config_path", file, "--seed=5"],
        ["--seed=5", "--config_path", file],
    ):
        config = read(list(map(str, argv)))
        assert (config.seed, config.max_timesteps, config.name) == (5, 2000, "007")


@pytest.mark.parametrize(
    "file, argv, updates",
    [
        ("offline_iterations: 1e3", "--max_timesteps 7", 7),
        ("max_timesteps: 1e3", "--offline_iterations 7", 7),
        ("max_timesteps: 1e3", "--offline_iterations null", 1000),
        ("offline_iterations: 1e3", "--seed 7", 1000),
        ("max_timesteps: 7\noffline_iterations: null", "", 7),
    ],
)
def test_two_names_of_one_number_in_two_layers(file, argv, updates, tmp_path):
    """A flag of either name overrides a file, such as CORL's finetune files."""
    path = tmp_path / "file.yaml"
    path.write_text(file)
    config = read(["--config_path", str(path), *shlex.split(argv)])
    assert config.max_timesteps == updates


def saved(directory, **flags):
    """Return the directory of a run whose config.yaml has these flags."""
    directory.mkdir(exist_ok=True)
    values = dataclasses.asdict(cql.TrainConfig(**flags))
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    return directory


def test_three_layers(tmp_path):
    run_directory = saved(tmp_path / "run", seed=3, name="007", n_episodes=1, log_freq=1)
    file = tmp_path / "file.yaml"
    file.write_text("n_episodes: 2\nlog_freq: 2\neval_freq: 2\n")
    argv = f"--resume {run_directory} --config_path {file} --log_freq 3"
    config = read(argv)
    assert (config.seed, config.name) == (3, "007")
    assert (config.n_episodes, config.eval_freq, config.log_freq) == (2, 2, 3)
    assert config.resume == str(run_directory)


@pytest.mark.parametrize("text", ["010", "+010", "0010"])
def test_zero_padded_integers_are_decimal(text, tmp_path):
    """As `seq -w` writes them, on the command line, in lists and in YAML."""
    (tmp_path / "c.yaml").write_text(f"seed: {text}\ncql_n_actions: {text}\n")
    config = cql.read_config(["--config_path", str(tmp_path / "c.yaml")])
    assert (config.seed, config.cql_n_actions) == (10, 10)
    assert cql.read_config(["--seed", text]).seed == 10
    assert cql.read_config(["--seed", f"[{text}, 007]"]).seed == [10, 7]
    assert cql.read_config(["--seed", "008"]).seed == 8
    assert cql.read_config(["--seed", "0x10"]).seed == 16
    assert cql.read_config(["--name", text]).name == text


def test_resuming_a_file_is_refused(refused, toy, tmp_path):
    """The checkpoint instead of its directory, for example."""
    (tmp_path / "checkpoint.pt").write_text("")
    path = tmp_path / "checkpoint.pt"
    refused(None, "--resume", "a file; pass the run's directory", env=toy, resume=path)


def test_a_file_may_not_change_a_resumed_run_either(tmp_path):
    """A file may repeat a flag's value but not change it."""
    directory, file = saved(tmp_path / "run", cql_alpha=5.0), tmp_path / "file.yaml"
    argv = f"--resume {directory} --config_path {file}"
    file.write_text("cql_alpha: 5\nseed: 0\n")
    assert read(argv).cql_alpha == 5
    file.write_text("cql_alpha: 10\n")
    with pytest.raises(cql.UserError, match="--cql_alpha 10.*5"):
        read(argv)


@pytest.mark.parametrize("given", ["max_timesteps", "offline_iterations"])
@pytest.mark.parametrize("before", ["max_timesteps", "offline_iterations"])
def test_a_resumed_run_is_made_longer_by_either_name(before, given, tmp_path):
    directory = saved(tmp_path / "run", **{before: 5})
    assert read(f"--resume {directory}").max_timesteps == 5
    assert read(f"--resume {directory} --offline_iterations null").max_timesteps == 5
    assert read(f"--resume {directory} --{given} 9").max_timesteps == 9


@pytest.mark.parametrize("lost", [None, "config.yaml"])
def test_a_resumed_run_keeps_its_flags(lost, finished, tmp_path):
    directory = shutil.copytree(finished, tmp_path / "run")
    if lost:
        (directory / lost).unlink()
    config = read(f"--resume {directory} --n_episodes 3")
    assert (config.name, config.batch_size, config.n_episodes) == ("007", 8, 3)


def test_resume_of_nothing_begins_there(tmp_path):
    config = read(f"--resume {tmp_path / 'new'} --cql_alpha 5 --seed 3")
    assert (config.cql_alpha, config.seed) == (5, 3)


INHERITED = {
    "hidden_dim": 8,
    "q_n_hidden_layers": 1,
    "batch_size": 4,
    "seed": 3,
    "cql_alpha": [1.0, 5.0],
    "cql_lagrange": True,
    "cql_target_action_gap": 2.0,
    "normalize": False,
    "discount": 0.5,
    "reward_scale": 2.0,
    "eval_seed": 7,
    "n_episodes": 3,
    "eval_freq": 2,
    "log_freq": 2,
    "checkpoint_freq": 2,
    "exploration_epsilon": 0.5,
    "n_target_critics": 1,
    "cql_clip_diff_min": -9.0,
}


@pytest.fixture(scope="module")
def model(toy, tmp_path_factory):
    """Return the directory of a run with INHERITED and other flags."""
    directory = tmp_path_factory.mktemp("model")
    flags = {"name": "n", "project": "p", "group": "g", "offline_iterations": 2}
    flags = {**INHERITED, **flags, "max_timesteps": None}
    assert run(env=toy, resume=directory, **flags)[0] == 0
    return directory


def test_load_model_inherits(model, toy):
    """load_model inherits all flags but iterations, paths, names, device and resume."""
    for path in (model, model / "checkpoint.pt"):
        config = read(f"--load_model {path}")
        for flag, value in {**INHERITED, "env": str(toy)}.items():
            assert getattr(config, flag) == value, flag
        for flag in (
            "max_timesteps offline_iterations online_iterations name "
            "project group checkpoints_path device resume"
        ).split():
            assert getattr(config, flag) == FLAGS[flag], flag
        assert config.load_model == str(path)


def test_load_model_s_flags_stand_below_the_command_s(model, tmp_path):
    (tmp_path / "file.yaml").write_text("discount: 0.25\nreward_scale: 3\n")
    argv = f"--load_model {model} --config_path {tmp_path / 'file.yaml'} "
    config = read(argv + "--reward_scale 4 --cql_clip_diff_min -inf --max_timesteps 1")
    assert (config.discount, config.reward_scale) == (0.25, 4)
    assert (config.cql_clip_diff_min, config.max_timesteps) == (-inf, 1)
    assert (config.seed, config.cql_alpha) == (3, [1, 5])


def test_a_resumed_run_does_not_inherit_again(model, tmp_path):
    """A resumed run takes its flags from config.yaml, also if the model is gone."""
    directory = saved(tmp_path / "run", load_model="gone", seed=5)
    config = read(f"--resume {directory}")
    assert (config.load_model, config.seed, config.discount) == ("gone", 5, 0.99)


# --------------------------------------------------------------------------------------
# Files of flags: any, ours, wandb's, CORL's
# --------------------------------------------------------------------------------------


def effective(values):
    """Return a file's values with numbers for texts such as 1e-4, and with max_timesteps
    for offline_iterations."""
    if values.get("offline_iterations") is not None:
        values["max_timesteps"] = values.pop("offline_iterations")
    for flag, value in values.items():
        if isinstance(value, str) and flag not in ("name", "group", "project"):
            try:
                values[flag] = float(value)
            except ValueError:
                continue
    return values


@pytest.mark.parametrize(
    "content, fragments",
    [
        ("max_timestep: 5", "max_timestep max_timesteps"),
        ("5: 5", "5 unknown"),
        ("normalize: flase", "normalize true flase"),
        ("normalize: 'true'", "normalize true"),
        ("seed: 1.5", "seed whole 1.5"),
        ("seed: true", "seed whole True"),
        ("seed:", "seed whole None"),
        ("seed: [0, 0]", "seed twice"),
        ("seed: {a: 1}", "seed"),
        ("name: true", "name text"),
        ("batch_size: [8, 16]", "batch_size whole"),
        ("discount: 1.5", "discount"),
        ("discount: .nan", "discount"),
        ("env: []", "env empty"),
        ("env: {a: b}", "env"),
        ("load_model: [a]", "load_model"),
        ("resume: [a]", "resume"),
        ("max_timesteps: 5\noffline_iterations: 6", "max_timesteps offline_iterations"),
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


def test_a_sweep_file_is_no_file_of_flags(refused):
    path = ROOT / "configs" / "sweeps" / "cql_alpha.yaml"
    refused([f"--config_path={path}"], path, "unknown")


@pytest.mark.parametrize(
    "file",
    [f for f in sorted((ROOT / "configs").rglob("*.yaml")) if "sweeps" not in f.parts],
    ids=lambda file: file.stem,
)
def test_our_configs_are_valid(file):
    values = effective(yaml.safe_load(file.read_text()))
    config = read(["--config_path", str(file)])
    assert values == {flag: getattr(config, flag) for flag in values}


SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("pick", [0, -1])
@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_our_sweeps_generate_commands_that_parse(file, pick, monkeypatch):
    """The commands with the first and the last value of each parameter are valid."""
    monkeypatch.chdir(ROOT)
    sweep = yaml.safe_load(file.read_text())
    chosen = {}
    for flag, options in sweep["parameters"].items():
        ends = [options.get("min"), options.get("max")]
        values = options.get("values") or [options.get("value", ends[pick])]
        chosen[flag] = {"value": values[pick]}
    argv, arguments = [], create_sweep_command_args({"args": chosen})
    for part in sweep["command"]:
        name = part.removeprefix("${").removesuffix("}")
        argv += arguments.get(name, [part])
    start = argv.index("${program}")
    assert argv[:start] == ["${env}", "python"] and sweep["program"] == "cql.py"
    config = read(argv[start + 1 :])
    for flag, option in chosen.items():
        assert getattr(config, flag) == option["value"], flag


@pytest.mark.parametrize("style", ["args", "args_no_boolean_flags"])
def test_what_wandb_s_agents_write(style):
    """wandb writes None for null, True or a bare flag for true, lists, and 1e-05."""
    values = {
        "checkpoints_path": None,
        "n_target_critics": None,
        "cql_alpha_online": None,
        "cql_lagrange": True,
        "seed": [0, 1],
        "cql_alpha": 1e-05,
        "max_timesteps": 1_000_000,
        "penalty": "mean",
    }
    parameters = {"args": {flag: {"value": value} for flag, value in values.items()}}
    argv = create_sweep_command_args(parameters)[style]
    assert "--checkpoints_path=None" in argv
    assert ("--cql_lagrange" in argv) == (style == "args_no_boolean_flags")
    config = read(argv)
    assert {flag: getattr(config, flag) for flag in values} == values


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests" / "corl").glob("*.yaml")), ids=lambda file: file.stem
)
def test_corl_s_files_load_unchanged(file, refused):
    """CORL's files set the values that they name; other flags keep the defaults."""
    values = effective(yaml.safe_load(file.read_text()))
    defaults = {flag: field.default for flag, field in cql.FIELDS.items()}
    assert vars(read(["--config_path", str(file)])) == {**defaults, **values}
    name = values["env"]
    hints = ["hdf5", f"--env {name}"]
    refused(["--config_path", str(file), "--device", "cpu"], *hints)


# --------------------------------------------------------------------------------------
# Bad datasets
# --------------------------------------------------------------------------------------


def edited(path, edit):
    """Change a dataset by edit(metadata, open HDF5 file); return its path."""
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
        ("nowhere.hdf5", "nowhere.hdf5 no such"),
        ("./nowhere", "./nowhere Minari"),
        ("/nowhere/at/all", "/nowhere/at/all"),
        ("hopper", "hopper mujoco/hopper/medium-v0"),
        ("mujoco/hopper/medium", "mujoco/hopper/medium-v0"),
        ("a b/c-v0", "Minari id"),
        ("../up-v0", "../up-v0"),
        ("two\nlines", "two"),
        ("x" * 250, "x" * 250),
        *[
            (f"table{suffix}", "scripts/from_table.py")
            for suffix in (".csv", ".npz", ".parquet", ".pkl")
        ],
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
    monkeypatch.setenv("MINARI_REMOTE", "hf://nobody")  # skips the test of the network
    monkeypatch.chdir(tmp_path)
    status, out, err = run(env="nobody/nothing-v0")
    assert status == 2 and err.count("\n") == 1 and "noise" not in out + err
    assert err.startswith("cql.py: error: --env nobody/nothing-v0")
    for part in (str(error).split("\n")[0], os.environ["MINARI_DATASETS_PATH"], ".hdf5"):
        assert part in err
    assert not (tmp_path / "runs").exists()


def test_no_network(refused):
    refused(None, "--env nobody/nothing-v0", "no network", env="nobody/nothing-v0")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_files(refused, fresh, tmp_path):
    file = d4rl_file(tmp_path / "toy.hdf5")
    for path, name in ((file, file), (fresh / "data" / "main_data.hdf5", fresh)):
        truncated(path)
        refused(None, name, "damaged", env=name)
        path.write_bytes(b"not HDF5 at all")
        refused(None, name, "damaged", env=name)
        path.write_bytes(b"")
        refused(None, name, env=name)
    (fresh / "data" / "main_data.hdf5").unlink()
    refused(None, fresh, env=fresh)
    (fresh / "data" / "metadata.json").unlink()
    refused(None, fresh, "metadata.json", env=fresh)


NOTHING = {key: np.zeros((54, 0)) for key in ("observations", "next_observations")}
EMPTY = {"actions": np.zeros((0, 2)), "rewards": np.zeros(0), "terminals": np.zeros(0)}
FOREIGN_D4RL = {
    "no rewards": ({"rewards": None}, "rewards"),
    "no terminals": ({"terminals": None}, "terminals"),
    "another name": (
        {"observations": None, "obs": np.zeros((54, 3))},
        "lacks observations obs",
    ),
    "too few actions": ({"actions": np.zeros((53, 2))}, "53"),
    "observations of two dimensions": ({"observations": np.zeros((54, 3, 4))}, ""),
    "next observations of other sizes": ({"next_observations": np.zeros((54, 4))}, ""),
    "two rewards": ({"rewards": np.zeros((54, 2))}, ""),
    "three terminals": ({"terminals": np.zeros((54, 3))}, ""),
    "one reward in all": ({"rewards": 0.0}, ""),
    "text": ({"observations": np.array([b"text"] * 54)}, ""),
    "text for rewards": ({"rewards": np.array([b"text"] * 54)}, "rewards"),
    "no action": ({"actions": np.zeros((54, 0))}, ""),
    "a group": ({"observations/group": np.zeros(3), "observations": None}, "damaged"),
    "observations of nothing": (NOTHING, ""),
    "no rows": ({**EMPTY, **{key: np.zeros((0, 3)) for key in NOTHING}}, ""),
}


@pytest.mark.parametrize("kind", FOREIGN_D4RL)
def test_a_foreign_d4rl_file(kind, refused, tmp_path):
    replaced, fragments = FOREIGN_D4RL[kind]
    if kind == "no rows":
        replaced = {**replaced, "timeouts": None}
    file = d4rl_file(tmp_path / "toy.hdf5", **replaced)
    refused(None, file, *fragments.split(), env=file)


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
    """Return an edit that sets these values in the metadata; None deletes the key."""

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


FOREIGN_MINARI = {
    "no episodes": (drop_episodes, "0 transitions"),
    "short observations": (short("observations"), "episode 3 observations"),
    "short actions": (short("actions"), ""),
    "short rewards": (short("rewards"), ""),
    "short terminations": (short("terminations"), "episode 3 terminations"),
    "no episode 3": (delete("episode_3"), "episode_3"),
    "no rewards": (delete("episode_3/rewards"), "rewards"),
    "no observations": (delete("episode_3/observations"), "observations"),
    "one reward in all": (replace("episode_3/rewards", 1.0), ""),
    "one action in all": (replace("episode_3/actions", 1.0), ""),
    "other dimensions": (replace("episode_3/observations", np.zeros((18, 4))), ""),
    "a group": (group("episode_3/observations"), ""),
    "text": (replace("episode_3/rewards", [b"a", b"b", b"c", b"d"]), ""),
    "too many episodes": (record(total_episodes=99), "episode_8"),
    "text for episodes": (record(total_episodes="all"), ""),
    "negative episodes": (record(total_episodes=-1), "0 transitions"),
    "no number of episodes": (record(total_episodes=None), "total_episodes"),
    "no observation space": (record(observation_space=None), "observation_space"),
    "no action space": (record(action_space=None), "action_space"),
    "space {}": (record(observation_space="{}"), ""),
    "space []": (record(observation_space="[]"), ""),
    "space 5": (record(action_space=5), ""),
    "unknown space": (record(action_space='{"type": "Wrong"}'), ""),
    "incomplete space": (record(action_space='{"type": "Box"}'), ""),
    "unknown format": (record(data_format="zip"), "zip"),
    "spec {": (record(env_spec="{"), ""),
    "spec []": (record(env_spec="[]"), ""),
    "spec with id 5": (record(env_spec='{"id": 5}'), ""),
    "text for a score": (record(ref_min_score="low", ref_max_score=1.0), "low"),
    "equal scores": (record(ref_min_score=1.0, ref_max_score=1.0), "reference"),
}


@pytest.mark.parametrize("kind", FOREIGN_MINARI)
def test_a_foreign_minari_dataset(kind, refused, fresh):
    edit, fragments = FOREIGN_MINARI[kind]
    named = "" if "transitions" in fragments else fresh
    refused(None, named, *fragments.split(), env=edited(fresh, edit))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "5", '"text"'])
def test_metadata_that_is_none(text, refused, fresh):
    (fresh / "data" / "metadata.json").write_text(text)
    refused(None, fresh, "damaged", env=fresh)


def recorded_spec(**changes):
    """Return an edit that changes the recorded environment."""

    def edit(metadata, _):
        spec = {**json.loads(metadata["env_spec"]), **changes}
        metadata["env_spec"] = json.dumps(spec)

    return edit


def test_recorded_settings_that_the_environment_refuses(refused, fresh):
    """The message says how to train without the environment or with another one."""
    edited(fresh, recorded_spec(kwargs={"wrong": 1}))
    refused(None, "CqlToy-v0", "--eval_env none", "module:ID", env=fresh)
    assert run(env=fresh, eval_env="none", checkpoints_path="null")[0] == 0
    assert run(env=fresh, eval_env="CqlEndless-v0", checkpoints_path="null")[0] == 0


def test_fewer_transitions_than_a_batch(refused, toy, tmp_path):
    refused(None, "--batch_size 55", "54 ", env=toy, batch_size=55)
    file = d4rl_file(tmp_path / "toy.hdf5", random_episodes([3, 4]))
    refused(None, "--batch_size 8", "7 ", env=file)
    cut = random_episodes([1], ends="cut")  # its only next observation is unknown
    file = d4rl_file(tmp_path / "none.hdf5", cut, next_observations=None)
    refused(None, "0 transitions; each episode is one row", env=file, batch_size=1)


def test_the_episode_named_counts_those_left_out(refused, tmp_path):
    """Episode numbers in messages count episodes without a transition."""
    episodes = random_episodes([5, 1, 7], ends="timeout")
    episodes[2]["rewards"][3] = math.nan
    file = d4rl_file(tmp_path / "toy.hdf5", episodes, next_observations=None)
    refused(None, file, "episode 2", "rewards", env=file)


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
            refused(None, env, "episode 1", "actions", "[-1, 1]", env=env)


Box = gym.spaces.Box
ACTIONS = {
    "unbounded": Box(-inf, inf, (2,)),
    "half bounded": Box(np.float32([-inf, -1]), np.float32([1, 1])),
    "a point": Box(np.float32([0, -1]), np.float32([0, 1])),
    "one discrete": gym.spaces.Discrete(1),
    "mixed": gym.spaces.Dict(a=Box(-1, 1, (2,)), b=gym.spaces.Discrete(2)),
    "tuple": gym.spaces.Tuple((Box(-1, 1, (1,)), Box(-1, 1, (1,)))),
    "multi-discrete": gym.spaces.MultiDiscrete([2, 2]),
    "multi-binary": gym.spaces.MultiBinary(2),
}
OBSERVATIONS = {
    "images": Box(0, 255, (32, 32, 3), np.uint8),
    "images, channels first": Box(0, 1, (3, 16, 16), np.float32),
    "images within": gym.spaces.Dict(
        a=Box(-1, 1, (2,)), b=Box(0, 255, (64, 64), np.uint8)
    ),
    "text": gym.spaces.Text(4),
    "graph": gym.spaces.Graph(Box(-1, 1, (2,)), None),
}


@pytest.mark.parametrize(
    "name, space",
    [("action_space", space) for space in ACTIONS.values()]
    + [("observation_space", space) for space in OBSERVATIONS.values()],
    ids=[*ACTIONS, *OBSERVATIONS],
)
def test_spaces_that_are_not_supported(name, space, refused, tmp_path):
    """A dataset with an unsupported space in its metadata is refused."""
    episodes = random_episodes([9, 9])
    for episode in episodes:
        episode["actions"] *= 0  # zeros are within all bounds
    path = minari_dataset(tmp_path / "datasets", "toy/spaces-v0", episodes)
    try:
        text = minari.serialization.serialize_space(space)
    except NotImplementedError:  # Minari does not support the space
        text = json.dumps({"type": type(space).__name__})
    noun = name.removesuffix("_space")
    refused(
        None,
        path,
        noun if "type" not in text else "",
        env=edited(path, record(**{name: text})),
    )


@pytest.fixture(scope="module")
def wide():
    """Register the toy environment with other bounds of actions."""
    gym.register("CqlWide-v0", entry_point="make_data:Toy", kwargs={"low": -2})
    yield "CqlWide-v0"
    del gym.registry["CqlWide-v0"]


@pytest.mark.parametrize(
    "name, fragments",
    [
        ("Pendulum-v1", "match"),  # one action
        ("CartPole-v1", "match discrete"),
        ("MountainCarContinuous-v0", "match"),  # two observations
        ("CqlWide-v0", "[-2, [-1,"),  # other bounds
        ("Nowhere-v0", "Nowhere"),
        ("no_module:CqlToy-v0", "no_module"),
        ("make_data:Nowhere-v0", "Nowhere"),
        ("a b", "a b"),
        (":", ":"),
    ],
)
def test_an_eval_env_that_does_not_fit(name, fragments, refused, toy, wide, tmp_path):
    refused(None, name, *fragments.split(), env=toy, eval_env=name)
    if name != wide:  # a D4RL file would take its bounds
        file = d4rl_file(tmp_path / "bare.hdf5")
        refused(None, name, env=file, eval_env=name)


@pytest.mark.parametrize("kind", ["actions", "observations", "environment"])
def test_datasets_that_cannot_be_joined(kind, refused, toy, tmp_path):
    """Both orders are refused."""
    root = tmp_path / "datasets"
    if kind == "actions":
        other = toy_dataset(root, "toy/wide-v0", env_kwargs={"low": -2})
    elif kind == "observations":
        other = minari_dataset(root, "toy/tall-v0", random_episodes([9, 9], obs_dim=4))
    else:
        other = edited(toy_dataset(root), recorded_spec(id="Pendulum-v1"))
    refused(None, other, env=[toy, other])
    refused(None, env=[other, toy])


# --------------------------------------------------------------------------------------
# Checkpoints and directories
# --------------------------------------------------------------------------------------


def foreign_checkpoints(good):
    """Yield bytes and payloads that are not checkpoints of cql.py."""
    payload = torch.load(good, weights_only=True)
    raw = good.read_bytes()
    yield raw[: len(raw) // 2]
    yield b""
    yield b"hello"
    yield [1, 2]
    yield {"actor": torch.zeros(3)}
    for key in ("format", "version", "config", "task", "agent"):
        yield {k: v for k, v in payload.items() if k != key}
    yield {**payload, "agent": {}}
    yield {**payload, "config": {"hidden_dim": "wide"}}


def test_a_checkpoint_that_is_none(finished, toy, refused, tmp_path):
    path = tmp_path / "other.pt"
    for content in foreign_checkpoints(finished / "checkpoint.pt"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        refused(None, f"checkpoint {path}", env=toy, load_model=path)
    refused(None, "nowhere.pt", env=toy, load_model="nowhere.pt")
    (tmp_path / "empty").mkdir()
    refused(None, "empty/checkpoint.pt", env=toy, load_model="empty")


PARTS = "config task agent metrics step logged evaluated diverged".split()


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpoint_without_a_part_is_not_taken_up(part, finished, refused, tmp_path):
    payload = torch.load(finished / "checkpoint.pt", weights_only=True)
    del payload[part]
    for name in ("config.yaml", ".lock"):
        shutil.copy(finished / name, tmp_path)
    torch.save(payload, tmp_path / "checkpoint.pt")
    argv = [f"--resume={tmp_path}", "--max_timesteps=9"]
    refused(argv, str(tmp_path))


class Planted:
    """An object that creates a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_checkpoint_runs_no_code(finished, toy, refused, tmp_path):
    payload = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save({**payload, "agent": Planted()}, tmp_path / "bad.pt")
    refused(None, "bad.pt", env=toy, load_model="bad.pt")
    with pytest.raises(cql.UserError, match="bad.pt"):
        cql.load_policy("bad.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "flags",
    [
        {"hidden_dim": 16},
        {"n_critics": 3},
        {"q_n_hidden_layers": 2},
        {"seed": [0, 1]},
        {"cql_lagrange": True},
        {"use_automatic_entropy_tuning": False},
    ],
)
def test_a_checkpoint_of_another_shape(flags, finished, toy, refused):
    path = finished / "checkpoint.pt"
    refused(None, f"checkpoint {path}", **{"env": toy, "load_model": path, **flags})


def test_a_checkpoint_of_another_task(finished, refused, tmp_path):
    path = finished / "checkpoint.pt"
    for name, sizes in (("tall", {"obs_dim": 4}), ("broad", {"action_dim": 3})):
        file = d4rl_file(tmp_path / name, random_episodes([9, 9], **sizes))
        refused(None, f"checkpoint {path}", env=file, load_model=path)


def test_a_damaged_run_cannot_be_resumed(refused, toy, tmp_path):
    directory = tmp_path / "run"
    assert run(env=toy, resume=directory)[0] == 0
    truncated(directory / "checkpoint.pt")
    refused(["--resume", directory], directory / "checkpoint.pt")
    (directory / "checkpoint.pt").unlink()
    (directory / "config.yaml").write_text("sead: 1")
    refused(["--resume", directory], "config.yaml", "sead", "seed")


def test_foreign_tables_are_left_alone(toy, tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text("epoch,loss\n1,0.5\n")
    status, _, err = run(env=toy, resume=tmp_path)
    assert status == 2 and str(tmp_path) in err and err.count("\n") == 1
    assert table.read_text() == "epoch,loss\n1,0.5\n"


@pytest.mark.parametrize("flag", ["checkpoints_path", "resume"])
def test_places_that_cannot_be_written(flag, refused, toy, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below", "/proc/nowhere/below"):
        refused(None, path, env=toy, **{flag: path})


def test_null_writes_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(env=toy, checkpoints_path="null")
    assert (status, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert "no directory" in out


# --------------------------------------------------------------------------------------
# Opening lines
# --------------------------------------------------------------------------------------


def notes(out):
    """Return the opening lines except those on data, actions and evaluation."""
    lines = out.split("\ntraining ")[0].splitlines()
    known = "data: ", "actions: ", "evaluation: "
    return [line for line in lines if not line.startswith(known)]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"cql_lagrange": True, "cql_target_action_gap": 0.8},
        {"cql_lagrange": True, "cql_target_action_gap": [0.8, 2]},
        {"cql_target_action_gap": -1.0},
        {"cql_n_actions": 3, "cql_max_target_backup": True},
        {"n_steps": 3, "policy_average_rate": 0.1},
        {"bc_steps": 2, "n_target_critics": 2, "penalty": "mean"},
        {"cql_clip_diff_min": -200, "reward_scale": 10.0, "reward_bias": -5.0},
        {"cal_ql": True, "is_sparse_reward": True, "mixing_ratio": 0.5},
    ],
    ids=str,
)
def test_no_note_where_all_is_well(flags, toy):
    status, out, err = run(env=toy, checkpoints_path="null", **flags)
    assert (status, err) == (0, "") and notes(out) == []


def test_a_negative_gap_is_a_target(toy):
    flags = {"cql_lagrange": True, "cql_target_action_gap": -1.0}
    status, out, _ = run(env=toy, checkpoints_path="null", **flags)
    assert status == 0 and "cql_target_action_gap" in notes(out)[0]


@pytest.mark.parametrize("asked", [None, "none"])
def test_nothing_is_evaluated(asked, toy, tmp_path):
    """A run without evaluation says so, and gives no wrong reason."""
    env = toy if asked else d4rl_file(tmp_path / "bare.hdf5")
    status, out, err = run(env=env, eval_env=asked, resume=tmp_path / "run")
    assert (status, err) == (0, "") and "evaluation: none" in out
    if asked:
        assert "recorded" not in out


# --------------------------------------------------------------------------------------
# From Python, other terminals, other places
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, fragment",
    [
        ({"penalty": "foo"}, "--penalty foo: must be one of"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"seed": []}, "--seed []"),
        ({"normalize": "false"}, "--normalize 'false': expected true or false"),
        ({"batch_size": "256"}, "--batch_size '256': pass 256"),
    ],
)
def test_a_config_from_python_is_validated(tmp_path, flags, fragment):
    config = cql.TrainConfig(env=str(tmp_path), checkpoints_path=str(tmp_path), **flags)
    task = cql.make_task(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Box(-1, 1, (2,)))
    for start in (lambda: cql.train(config), lambda: cql.make_agent(config, task)):
        with pytest.raises(cql.UserError, match=re.escape(fragment)):
            start()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_that_lacks_letters(tmp_path, encoding):
    path = d4rl_file(
        tmp_path / "\u6570\u636e.hdf5",
        random_episodes([20]),
        timeouts=None,
        next_observations=None,
    )
    argv = make_data.arguments(env=path, eval_env="none", resume=tmp_path / "l\u00e4uft")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, cql.__file__, *argv],
        env=environment,
        capture_output=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode(encoding)
    assert ("\u6570\u636e" if encoding == "utf-8" else "??") in out
    assert ("l?uft" if encoding == "ascii" else "l\u00e4uft") in out


def test_a_long_name_of_a_directory(tmp_path):
    """A name has at most 255 bytes, of which these letters take three each."""
    names = ["\u6570\u636e" * 60 + f"{i}.hdf5" for i in range(2)]
    config = cql.TrainConfig(env=names, checkpoints_path=str(tmp_path))
    directory = cql.run_directory(config)
    directory.mkdir()
    assert directory.name.startswith("CQL+\u6570\u636e")
    assert cql.run_directory(config) != directory


@pytest.mark.parametrize("name", ["LOG.CSV", "log.csv.gz", "b.tsv", "c.hdf5.gz"])
def test_a_table_is_sent_to_from_table(refused, tmp_path, name):
    (tmp_path / name).write_bytes(b"a,b")
    refused(None, name, "scripts/from_table.py", env=name)


def test_a_home_that_cannot_be_written(refused, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    error = refused(None, "set MINARI_DATASETS_PATH", env="mujoco/hopper/medium-v0")
    assert "damaged" not in error


def test_without_a_home(refused, monkeypatch):
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    refused(None, "set MINARI_DATASETS_PATH", env="mujoco/hopper/medium-v0")


def test_datasets_that_cannot_be_written(refused, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(None, "not writable; set MINARI_DATASETS_PATH", env="mujoco/hopper/x-v0")
