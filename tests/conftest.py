"""What every test module needs: the script on the path, one thread, no wandb, and no
dataset but those that the tests make."""

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for subprocesses
os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MINARI_DATASETS_PATH"] = tempfile.mkdtemp(prefix="cql-datasets-")


def pytest_configure(config):
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def bf16_everywhere(monkeypatch):
    """bf16 is tested on processors that are slow at it, too."""
    import cql

    monkeypatch.setattr(cql, "fast_bf16", lambda device: True)


def files_below(path):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*")}


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(argv or None, *fragments, **flags): what bad input gets. Exit status 2 and
    one line that holds the fragments; nothing is trained, and no file written."""
    from make_data import run

    monkeypatch.chdir(tmp_path)

    def check(argv, *fragments, **flags):
        before = files_below(tmp_path)
        status, out, err = run(argv, **flags)
        assert status == 2, (status, out, err)
        assert err.startswith("cql.py: error: ") and err.count("\n") == 1, err
        assert err.endswith("\n") and "Traceback" not in err and len(err) < 1000, err
        missing = [part for part in fragments if str(part) not in err]
        assert not missing, f"{missing} not in: {err}"
        assert not re.search("^training ", out, re.M) and files_below(tmp_path) == before
        return err

    return check
