"""Names that torch keeps private, taken away one by one: a slower path with one warning, or a clear error."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from normfree import ScaledWSConv2d, SignalError, _torch, characterize
from normfree.nn import PreActivationBlock, recompute_weights

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def warned_anew():
    """Each name warns once in a process."""
    _torch._warn.cache_clear()
    yield
    _torch._warn.cache_clear()


def lacking(place, path):
    """The module, or a part of it, without what stands at the path; torch itself keeps it."""
    first, _, rest = path.partition(".")

    class Lacking:
        def __getattr__(self, name):
            if name != first:
                return getattr(place, name)
            if not rest:
                raise AttributeError(name)
            return lacking(getattr(place, name), rest)

    return Lacking()


def gradients():
    torch.manual_seed(0)
    conv = ScaledWSConv2d(3, 4, 3, in_scale=1.7, skip_gain=0.5)
    block = PreActivationBlock(
        pre=[nn.ReLU(), nn.ReLU()], conv=[conv, ScaledWSConv2d(4, 3, 3, padding=2)], shortcut=None
    )
    recompute_weights(block)
    block(X).square().sum().backward()
    return [parameter.grad for parameter in block.parameters()]


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        ("torch", "_C._are_functorch_transforms_active", "standardized and kept the slower way"),
        ("torch", "_C._autograd._top_saved_tensors_default_hooks", "kept rather than computed again"),
        ("torch", "_C._autograd._saved_tensors_hooks_is_enabled", "kept rather than computed again"),
        ("nn", "modules.module._has_any_global_hook", "copy what they could overwrite"),
    ],
)
def test_without_it_a_layer_is_slower_equal_and_warns_once(owner, name, words, monkeypatch):
    expected = gradients()
    monkeypatch.setattr(_torch, owner, lacking(getattr(_torch, owner), name))
    with pytest.warns(UserWarning, match=words) as warned:
        found = gradients()
    assert len(warned) == 1
    assert f"torch {torch.__version__} has no" in str(warned[0].message)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_without_the_stack_of_modes_fused_kernels_are_left_alone(monkeypatch):
    assert _torch.only_observed()
    monkeypatch.delattr(torch.utils._python_dispatch, "_get_current_dispatch_mode_stack")
    with pytest.warns(UserWarning, match="without the fused kernels"):
        assert not _torch.only_observed()


def test_without_the_number_of_a_storage_its_address_serves(monkeypatch):
    class Storage:
        def __init__(self, storage):
            self.data_ptr = storage.data_ptr

    class Tensor:
        layout = torch.strided

        def __init__(self, tensor):
            self.tensor = tensor

        def untyped_storage(self):
            return Storage(self.tensor.untyped_storage())

    with pytest.warns(UserWarning, match="told apart by their address"):
        assert (
            _torch.storage_key(Tensor(X)) == _torch.storage_key(Tensor(X[0])) != _torch.storage_key(Tensor(X.clone()))
        )


@pytest.mark.parametrize("name", ["tree_leaves", "tree_map"])
def test_without_pytree_plain_containers_are_looked_into(name, monkeypatch):
    nested = {"a": [1, (2, 3)], "b": 4}
    monkeypatch.delattr(torch.utils._pytree, name)
    looks, expected = {
        "tree_leaves": (_torch.leaves, [1, 2, 3, 4]),
        "tree_map": (lambda value: _torch.map_leaves(lambda leaf: -leaf, value), {"a": [-1, (-2, -3)], "b": -4}),
    }[name]
    with pytest.warns(UserWarning, match="only lists, tuples and dictionaries"):
        assert looks(nested) == expected


def test_without_dispatch_modes_a_measurement_says_which_versions_have_them():
    code = """
import torch._dynamo  # of which torch's own parts need the name
import torch.utils._python_dispatch as private
del private.TorchDispatchMode
import normfree, torch
net = normfree.create_model("nf_resnet26", width=0.5, num_classes=3)
net(torch.randn(1, 3, 32, 32)).sum().backward()
try:
    normfree.characterize(net, torch.randn(1, 3, 32, 32))
except normfree.SignalError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TorchDispatchMode, which torch" in done.stdout
    assert "torch 2.13 to 2.15 has it" in done.stdout


def test_with_all_names_nothing_warns(recwarn):
    gradients()
    characterize(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), X)
    assert not recwarn.list
    with pytest.raises(SignalError):
        characterize(nn.ReLU(), X)
