"""A sample of every trial of `python -m tests.trials`."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNTS = {"files": 300, "commands": 60, "calls": 300, "kills": 8, "processes": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_no_trial_ends_in_a_fault(name):
    """In a process of its own: forks of one that has computed gradients cannot."""
    command = [sys.executable, "-m", "tests.trials", "--only", name, "--count", str(COUNTS[name]), "--seed", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| 0 | 2 |" in done.stdout
