"""Gains of activations: exact, the authors' constants, and functions that have none."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree import gain
from normfree.nn.gains import ACTIVATIONS, make_activation
from tests.helpers import reference_json

ROWS = {
    row["name"]: row for row in reference_json("gamma_reference.json")["rows"] if not row["name"].startswith("glu(")
}
KINKED = {"celu", "elu", "relu", "relu6", "selu", "hardswish", "hardsigmoid", "hardtanh", "softshrink_0.5"}
FUNCTIONS = {
    "gelu_erf": "gelu",
    "leaky_relu_0.01": "leaky_relu",
    "leaky_relu_0.1": nn.LeakyReLU(0.1),
    "leaky_relu_0.2": nn.LeakyReLU(0.2),
    "silu_1.702(quick_gelu)": lambda x: x * torch.sigmoid(1.702 * x),
    "relu_squared": lambda x: F.relu(x).square(),
    "softshrink_0.5": nn.Softshrink(0.5),
}


@pytest.mark.parametrize("name", ROWS)
def test_equals_the_exact_gain(name):
    value, exact = gain(FUNCTIONS.get(name, name)), float(ROWS[name]["exact"])
    kinked = name in KINKED or name.startswith(("leaky", "relu"))
    limit = 1e-8 if kinked else 1e-10
    assert abs(value / exact - 1) <= limit, f"{name}: gain={value!r}, expected {exact!r}"


def test_gains_that_have_a_closed_form_equal_it():
    assert gain(torch.exp) == pytest.approx((math.e**2 - math.e) ** -0.5, rel=1e-12)
    third = 0.5 * (1 - math.erf(1 / 3 / math.sqrt(2)))
    assert gain(lambda x: (x > 1 / 3).to(x)) == pytest.approx((third * (1 - third)) ** -0.5, rel=1e-8)


@pytest.mark.parametrize(("name", "constant"), reference_json("gamma_reference.json")["reference_only"].items())
def test_reference_gains_are_the_authors_constants(name, constant):
    assert gain(name, source="reference") == constant


@pytest.mark.parametrize(
    ("activation", "name"), [(F.relu, "relu"), (nn.SiLU(), "silu"), (nn.LogSigmoid(), "log_sigmoid")]
)
def test_functions_and_modules_have_the_reference_gain_of_their_name(activation, name):
    assert gain(activation, source="reference") == gain(name, source="reference")


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        (nn.Softmax(-1), "not elementwise"),
        (nn.GLU(), "not elementwise"),
        (lambda x: x + x.mean(), "not elementwise"),
        (torch.randn_like, "random"),
        (nn.PReLU(8), "not an elementwise function"),
        (lambda x: torch.exp(x * x), "no finite variance"),
        (lambda x: torch.exp(0.26 * x * x), "no finite variance"),
        (torch.log, "not finite"),
        (torch.reciprocal, "has no finite variance .* near z = -?[0-9.]+e-"),
        (lambda x: x.abs() ** -0.5, "no finite variance"),
        (torch.tan, "no finite variance"),
        (lambda x: torch.exp(-(((x - 1) * 1e6) ** 2)), "or all but constant"),
        (lambda x: 0 * x + 3, "constant"),
        ("rleu", "rleu"),
        (3, "give a name"),
    ],
)
def test_refuses_what_has_no_gain(activation, words):
    with pytest.raises(ValueError, match=words):
        gain(activation)


def test_refuses_a_reference_gain_that_is_another_function_s():
    with pytest.raises(ValueError, match="its own is"):
        gain(nn.LeakyReLU(0.2), source="reference")
    with pytest.raises(ValueError, match="no gain for mish"):
        gain("mish", source="reference")
    with pytest.raises(ValueError, match="'exact' or 'reference'"):
        gain("relu", source="authors")


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), lambda x: x.tanh_()])
def test_activations_in_place_have_the_gain_of_the_others(activation):
    name = {"ReLU": "relu", "SiLU": "silu"}.get(type(activation).__name__, "tanh")
    assert gain(activation) == pytest.approx(gain(name), rel=1e-12)


def test_functions_that_return_truth_values_have_a_gain():
    assert gain(lambda x: x > 0) == pytest.approx(2, rel=1e-10)


def test_leaves_modules_as_they_were():
    module = nn.PReLU().train()
    gain(module)
    assert module.training
    assert module.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gives_unit_variance(name):
    z = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance = (gain(name) * make_activation(name)(z)).var()
    assert variance.item() == pytest.approx(1, abs=0.02), f"{name}: var={variance.item():.3f}"
