"""Placement of the tests: on the CPU, but for those that are marked `gpu`."""

import pytest
import torch

GPU = torch.cuda.is_available()  # asked here: later on in this process none of them is hidden


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not GPU:
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Trainings and the processes that a test starts: on a GPU they repeat themselves only nearly."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
