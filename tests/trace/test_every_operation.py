"""Every operation that torch has samples for runs under the recorder as without, without a warning of ours."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree import _torch
from normfree.trace.recorder import recording
from normfree.trace.tape import Tape

_SAMPLES = 4
# What they return is uninitialised memory, or is drawn.
UNINITIALISED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
# Not run: they compile or change the state of the process.
LEFT_OUT = {"nn.functional.scaled_dot_product_attention_with_graph"}


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def operations():
    database = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
    return [info for info in database if info.name not in LEFT_OUT]


def samples_of(info):
    dtypes = info.supported_dtypes("cpu")
    dtype = next(
        (d for d in (torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool) if d in dtypes), None
    )
    if dtype is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(itertools.islice(info.sample_inputs("cpu", dtype, requires_grad=False), _SAMPLES))


def run(info, sample, mode):
    torch.manual_seed(0)
    copied = sample.transform(lambda t: t.clone() if isinstance(t, Tensor) else t)
    with mode(copied) as note_outputs:
        out = info.op(copied.input, *copied.args, **copied.kwargs)
        if callable(note_outputs):
            note_outputs(tensors(out))
    return out


def tensors(value):
    return [leaf for leaf in _torch.leaves(value) if isinstance(leaf, Tensor)]


def recorder(sample):
    taken = tensors((sample.input, sample.args, sample.kwargs))
    return recording(Tape(), nn.Identity(), taken, reduce_weight_layers=True)


def differ(one, other):
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return True
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.is_complex():
        one, other = one.to(torch.complex128), other.to(torch.complex128)
    equal = (one == other) | ((one != one) & (other != other))
    return not bool(equal.all())


@pytest.mark.slow
def test_every_operation_runs_as_without():
    failed, ran = [], 0
    for info in operations():
        for number, sample in enumerate(samples_of(info)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    expected = tensors(run(info, sample, lambda _: Nothing()))
                except Exception:
                    continue  # it does not run under any mode
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = tensors(run(info, sample, recorder))
                except Exception as error:
                    failed.append(f"{info.name} {number}: {type(error).__name__} {error}")
                    continue
            failed += [f"{info.name} {number}: {w.message}" for w in caught if "measurement" in str(w.message)]
            pairs = zip(found, expected, strict=False)
            exact = info.name not in UNINITIALISED
            if len(found) != len(expected) or any(
                differ(*pair) if exact else pair[0].shape != pair[1].shape for pair in pairs
            ):
                failed.append(f"{info.name} {number}: another result")
            ran += 1
    assert not failed, "\n".join(failed)
    assert ran > 1500
