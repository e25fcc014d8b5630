"""Parameters in Haiku's form, nested, flat or in a published file."""

import json

import numpy as np
import pytest

from normfree import create_model
from normfree.models.haiku import haiku_key, load_haiku
from tests.fixtures.recipe import make_param
from tests.helpers import assert_same_state, reference_arrays


@pytest.fixture
def params():
    shapes = json.loads(str(reference_arrays("forward_nf_resnet50_w1_relu_64.npz")["shapes"]))
    return {key: make_param(key, shape) for key, shape in shapes.items()}


@pytest.fixture
def model():
    return create_model("nf_resnet50", width=1, num_classes=10)


def test_nested_and_flat_are_the_same(model, params):
    flat = {name: value.clone() for name, value in load_haiku(model, params).state_dict().items()}
    nested = {}
    for key, value in params.items():
        module, name = key.split("//")
        nested.setdefault(module, {})[name] = value
    again = load_haiku(create_model("nf_resnet50", width=1, num_classes=10), nested).state_dict()
    assert_same_state(again, flat)


def test_one_error_lists_everything_and_changes_nothing(model, params):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del params["NF_ResNet/~/linear//b"]
    params["NF_ResNet/~/initial_conv//gain"] = np.ones(7, np.float32)
    params["NF_ResNet/~/extra//w"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_haiku(model, params)
    for words in (
        "missing: NF_ResNet/~/linear//b",
        "unexpected: NF_ResNet/~/extra//w",
        "shape: NF_ResNet/~/initial_conv",
    ):
        assert words in str(error.value)
    assert_same_state(model.state_dict(), before)


def test_a_published_file_brings_the_authors_gains(model, params, tmp_path):
    """A pickled object array, as F0_haiku.npz; the gains become the authors' constants."""
    nested = {}
    for key, value in params.items():
        module, name = key.split("//")
        nested.setdefault(module, {})[name] = value
    with (tmp_path / "haiku.npz").open("wb") as file:
        np.save(file, np.array(nested, dtype=object), allow_pickle=True)
    assert load_haiku(model, tmp_path / "haiku.npz") is model
    assert model.config.gains == "reference"
    built = create_model("nf_resnet50", width=1, num_classes=10, gains="reference")
    expected = load_haiku(built, params).state_dict()
    assert_same_state(model.state_dict(), expected)


@pytest.mark.parametrize("value", ["text", None, [[1.0], [1.0, 2.0]], np.array(["x"])])
def test_what_is_no_array_is_listed(model, params, value):
    params["NF_ResNet/~/linear//b"] = value
    with pytest.raises(ValueError, match="no array: NF_ResNet/~/linear//b"):
        load_haiku(model, params)


@pytest.mark.parametrize(
    "name", ["nf_regnet_b0", "nfnet_f0", "skipinit_resnet50", "fixup_resnet50", "bn_resnet50", "bn_resnet50_postact"]
)
def test_every_parameter_of_every_family_has_a_key_of_its_own(name):
    model = create_model(name, device="meta")
    names = [n for n, _ in model.named_parameters()]
    keys = {haiku_key(model, n) for n in names}
    assert len(keys) == len(names)
