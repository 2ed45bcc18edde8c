"""Every fault of faults.py, a few times each; the table of a long run is FAULTS.md."""

import pytest
from faults import FAULTS, broken, disk_full


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault(fault):
    tried, survived = broken(fault, times=4, seed=1)
    if tried == 0 and fault is disk_full:
        pytest.skip("no unprivileged mounts here")
    assert survived == tried > 0
