"""The READMEs' commands parse, their Python runs, and the fork recipe trains."""

import csv
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from make_data import arguments

import cql

ROOT = Path(cql.__file__).parent
README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "benchmarks" / "README.md").read_text()


def blocks(language: str):
    return re.findall(rf"^```{language}\n(.*?)^```", README + MEASURED, re.M | re.S)


LINES = [
    line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [line for line in LINES if line.startswith("python cql.py")]


def test_there_are_commands():
    assert len(COMMANDS) >= 5 and len(blocks("diff")) == 1


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    """Each `python cql.py` line is a valid config (its checkpoint need not exist)."""
    monkeypatch.chdir(ROOT)
    given = cql.read_command_line(shlex.split(line, comments=True)[2:])
    given.pop("load_model", None)
    given.pop("resume", None)
    cql.validate(cql.make_config(given))


def test_the_readme_stays_short_enough_to_be_read():
    assert len(README.splitlines()) <= 300


def test_named_files_are_there():
    """Scripts, configs, datasets, pictures and tables that the pages name."""
    named = re.findall(r"(?:scripts|benchmarks|tests)/\w+\.py", README + MEASURED)
    named += re.findall(r"(?:configs|datasets)/[\w/.-]*\w", README)
    named += re.findall(r"\((benchmarks/results/\S+?)\)", README)
    for name in re.findall(r"\((results/\S+?)\)|`(results/[\w/.-]+)`", MEASURED):
        named += [f"benchmarks/{path}" for path in name if path]
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("line", [line for line in LINES if "scripts/" in line])
def test_flags_of_scripts_exist(line):
    """Each long option of a script's command is in its source, or cql.py's."""
    script = re.search(r"scripts/\w+\.py", line)[0]
    source = (ROOT / script).read_text()
    for flag in re.findall(r"--([\w-]+)", line):
        known = f'"--{flag}"' in source
        assert known or (
            script == "scripts/sweep.py" and flag in cql.FIELDS | {"config_path": 0}
        ), flag


def test_python_blocks_run(capsys):
    """The library example runs as it stands; load_policy's needs a trained run."""
    first = next(block for block in blocks("python") if "agent.update" in block)
    exec(compile(first, "README.md", "exec"), {})
    assert "average_qf{j}" in capsys.readouterr().out


def load_fork(directory, monkeypatch):
    """The fork in the directory, as a module."""
    spec = importlib.util.spec_from_file_location("forked_cql", directory / "cql.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_fork_recipe(tmp_path, monkeypatch):
    """The README's diff applies; then stacked runs, logging and resume work with it."""
    shutil.copy(ROOT / "cql.py", tmp_path)
    (tmp_path / "fork.diff").write_text(blocks("diff")[0])
    subprocess.run(["git", "apply", "--recount", "fork.diff"], cwd=tmp_path, check=True)
    fork = load_fork(tmp_path, monkeypatch)
    data = str(ROOT / "datasets" / "hopper-medium-small-v0")

    def train(name, max_timesteps=10, **flags):
        flags |= {"max_timesteps": max_timesteps, "log_freq": 5, "eval_freq": 5}
        argv = arguments(env=data, seed=[0, 1], resume=tmp_path / name, **flags)
        assert fork.main(argv) == 0
        rows = list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
        assert [row["run"] for row in rows] == ["0", "1"] * (len(rows) // 2)
        return [(row["step"], float(row["cql_qf1_diff"])) for row in rows]

    plain = train("plain")
    forked = train("forked", gap_margin=1.5)
    train("half", max_timesteps=5, gap_margin=1.5)
    assert train("half", gap_margin=1.5) == forked  # resumed equals uninterrupted
    sampled = train("sampled", gap_margin=1.5, cql_backward_actions=1)
    assert sampled[0][1] == pytest.approx(forked[0][1], abs=0.3)
    assert [step for step, _ in forked] == ["5", "5", "10", "10"]
    assert forked[0][1] == pytest.approx(plain[0][1] - 1.5, abs=0.3)  # the margin bites
