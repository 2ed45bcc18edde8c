"""The README's commands parse, its Python runs, and its fork recipe trains."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cql

ROOT = Path(cql.__file__).parent
README = (ROOT / "README.md").read_text()
SMALL = (
    "--hidden_dim 8 --batch_size 8 --cql_n_actions 2 --log_freq 5 --n_episodes 1 "
    "--max_timesteps 10 --eval_freq 10 --seed [0,1]"
).split()


def blocks(language: str):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


COMMANDS = [
    line
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("python cql.py")
]


def test_there_are_commands():
    assert len(COMMANDS) >= 5 and len(blocks("diff")) == 1


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line, monkeypatch):
    """Each `python cql.py` line is a valid config (its checkpoint need not exist)."""
    monkeypatch.chdir(ROOT)
    given = cql.read_command_line(shlex.split(line, comments=True)[2:])
    given.pop("load_model", None)
    given.pop("resume", None)
    config, checkpoint = cql.layered_config(given)
    cql.validate(config)
    assert checkpoint is None


def test_python_blocks_run(capsys):
    """The library example runs as it stands; load_policy's needs a trained run."""
    first = next(block for block in blocks("python") if "agent.update" in block)
    exec(compile(first, "README.md", "exec"), {})
    assert "average_qf{j}" in capsys.readouterr().out


def test_fork_recipe(tmp_path):
    """The README's diff applies; then stacked runs, logging and resume work with it."""
    shutil.copy(ROOT / "cql.py", tmp_path)
    (tmp_path / "fork.diff").write_text(blocks("diff")[0])
    subprocess.run(["git", "apply", "--recount", "fork.diff"], cwd=tmp_path, check=True)
    data = str(ROOT / "datasets" / "hopper-medium-small-v0")

    def train(*argv):
        command = [sys.executable, "cql.py", "--env", data, *SMALL, *argv]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        rows = list(csv.DictReader((tmp_path / argv[-1] / "metrics.csv").open()))
        assert [row["run"] for row in rows] == ["0", "1"] * (len(rows) // 2)
        return [(row["step"], float(row["cql_qf1_diff"])) for row in rows]

    plain = train("--resume", "plain")
    margin = ("--gap_margin", "1.5")
    forked = train(*margin, "--resume", "forked")
    train(*margin, "--max_timesteps", "5", "--eval_freq", "5", "--resume", "half")
    assert train(*margin, "--resume", "half") == forked  # resumed equals uninterrupted
    sampled = train(*margin, "--cql_backward_actions", "1", "--resume", "sampled")
    assert sampled[0][1] == pytest.approx(forked[0][1], abs=0.3)
    assert [step for step, _ in forked] == ["5", "5", "10", "10"]
    assert forked[0][1] == pytest.approx(plain[0][1] - 1.5, abs=0.3)  # the margin bites
