"""Logits, features and gradients of the authors' networks, with the recipe's parameters."""

import json

import numpy as np
import pytest
import torch

from normfree import characterize
from normfree.models.checkpoints import haiku_key, load_haiku
from tests.fixtures.recipe import make_param
from tests.helpers import FIXTURES, assert_close, reference_arrays, reference_network

CASES = {
    "nf_resnet50_w1_relu_64": ("nf_resnet50", {"gains": "reference"}),
    "nf_resnet50_w1_relu_se_64": ("nf_resnet50", {"gains": "reference", "se_ratio": 0.25}),
    "nf_regnet_B0_w0.25_silu_64": ("nf_regnet_b0", {"gains": "reference"}),
    "nf_regnet_B0_w0.75_silu_64": ("nf_regnet_b0", {"gains": "reference"}),
    "nfnet_F0_w1_gelu_64": ("nfnet_f0", {"gains": "reference"}),
    "skipinit_resnet50_w1_64": ("skipinit_resnet50", {}),
    "resnet50_bn_preact_w1_64": ("bn_resnet50", {}),
}
WITH_GRADIENTS = [case for case in CASES if (FIXTURES / f"grads_{case}.npz").exists()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_features(case, dtype):
    name, arguments = CASES[case]
    model, x = reference_network(case, name, dtype, **arguments)
    expected = reference_arrays(f"forward_{case}.npz")
    features = model.forward_features(x)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4 if name.startswith("bn") else 1e-5
    assert_close(model.forward_head(features, pre_logits=True).detach(), expected["f64/pool"], tolerance, "pool")
    assert_close(model.forward_head(features).detach(), expected["f64/logits"], tolerance, "logits")


def test_batch_norm_in_eval_mode():
    case = "resnet50_bn_preact_w1_64"
    arrays = reference_arrays(f"forward_{case}.npz")
    model, x = reference_network(case, "bn_resnet50", torch.float32)
    shapes = json.loads(str(arrays["shapes"]))
    state = {key.removeprefix("state_after/"): value for key, value in arrays.items() if key.startswith("state_after/")}
    load_haiku(model, {key: make_param(key, shape) for key, shape in shapes.items()}, state).eval()
    assert_close(model(x).detach(), arrays["eval_after/logits"], 3e-4, "logits")


@pytest.mark.parametrize("case", CASES)
def test_signal_metrics(case):
    name, arguments = CASES[case]
    model, x = reference_network(case, name, torch.float64, **arguments)
    expected = reference_arrays(f"forward_{case}.npz")
    for k, record in enumerate(characterize(model, x, open_branches=False)):
        for value, key in (
            (record.squared_mean, f"avg_sq_mean_{k + 1}"),
            (record.variance, f"avg_var_{k + 1}"),
            (record.residual_variance, f"res_avg_var_{k}"),
        ):
            assert value == pytest.approx(float(expected[f"f64/{key}"]), rel=1e-9), f"{key} ({record.name})"


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_gradients(case):
    name, arguments = CASES[case]
    model, x = reference_network(case, name, torch.float64, **arguments)
    expected = reference_arrays(f"grads_{case}.npz")
    meta = json.loads(str(expected["meta"]))
    logits = model(x.requires_grad_())
    targets = torch.full_like(logits, 0.01)
    targets[range(len(targets)), meta["labels"]] += 0.9
    loss = -(targets * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-12)
    actual = {"input": x.grad.permute(0, 2, 3, 1)} | _haiku_gradients(model)
    for key, gradient in expected.items():
        kind, _, parameter = key.partition("/")
        if key == "grad_input":
            _assert_gradient(actual["input"].numpy(), gradient, key)
        elif kind == "grad":
            _assert_gradient(actual[parameter].numpy().reshape(gradient.shape), gradient, key)
        elif kind == "grad_sample":
            flat = np.ascontiguousarray(actual[parameter].numpy()).ravel()
            _assert_gradient(flat[np.linspace(0, flat.size - 1, 2048).astype(np.int64)], gradient, key)
        elif kind == "grad_norm":
            assert np.linalg.norm(actual[parameter].numpy()) == pytest.approx(gradient[0], rel=1e-5), key


def _assert_gradient(actual, expected, what):
    scale = max(np.abs(expected).max(), 1e-12)
    assert_close(actual / scale, expected / scale, 1e-6, what)


def _haiku_gradients(model):
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        layout = {4: (2, 3, 1, 0), 2: (1, 0)}.get(gradient.ndim)
        gradients[haiku_key(model, name)] = gradient if layout is None else gradient.permute(layout)
    return gradients
