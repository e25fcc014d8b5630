"""A sample of every trial of `python -m tests.trials`."""

import pytest
import torch

from tests.trials.__main__ import TRIALS, run

COUNTS = {"files": 300, "commands": 60, "calls": 300, "kills": 8, "processes": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_no_trial_ends_in_a_fault(name, request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forks have no others
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    verdicts, _ = run(TRIALS[name][0], COUNTS[name], seed=2)
    faults = [f"{kind}: {words}" for kind, verdict, words in verdicts if not verdict]
    assert len(verdicts) >= COUNTS[name]
    assert not faults, "\n".join(faults)
