"""Types of arguments and fields."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

import normfree
from normfree.arguments import checked, is_of, require_moderate, require_positive


@checked
def function(
    model: nn.Module, number: float = 1.0, count: int = 1, flag: bool = True, path: str | Path | None = None,
    sizes: int | tuple[int, ...] = 1, kind: Literal["a", "b"] = "a", call: Callable[..., Any] | None = None,
    names: Sequence[str] = (), table: Mapping[str, Any] | None = None, anything: Any = None, *more: int, **others: int,
):  # fmt: skip
    return "done"


MODEL = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "given",
    [
        {}, {"number": 2}, {"number": np.float32(2)}, {"count": np.int64(3)}, {"flag": 1}, {"flag": np.int64(0)},
        {"path": Path()}, {"path": ""}, {"sizes": [1, 2]}, {"sizes": (np.int64(1),)}, {"kind": "c"}, {"call": len},
        {"names": ["a"]}, {"table": {}}, {"anything": object()}, {"other": "x"},
    ],
)  # fmt: skip
def test_arguments_of_the_declared_types_pass(given):
    assert function(MODEL, **given) == "done"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"model": 3}, "model is 3; it must be torch's Module"),
        ({"model": nn.Linear}, "model is a type; it must be torch's Module"),
        ({"number": True}, "number is True; it must be float"),
        ({"number": torch.ones(2)}, "number is a Tensor; it must be float"),
        ({"count": 1.0}, r"count is 1\.0; it must be int"),
        ({"flag": "False"}, "flag is 'False'; it must be bool"),
        ({"flag": torch.ones(2)}, "flag is a Tensor; it must be bool"),
        ({"path": 3}, r"path is 3; it must be str \| pathlib's Path \| None"),
        ({"sizes": (1, "a")}, r"sizes is a tuple; it must be int \| tuple\[int, \.\.\.\]"),
        ({"call": 3}, r"call is 3; it must be a function \| None"),
        ({"names": 3}, r"names is 3; it must be Sequence\[str\]"),
        ({"table": []}, "table is a list; it must be Mapping"),
    ],
)
def test_arguments_of_other_types_are_refused_by_name(given, sentence):
    with pytest.raises(TypeError, match=sentence):
        function(**{"model": MODEL, **given})


def test_calls_that_python_refuses_are_refused_in_its_words():
    with pytest.raises(TypeError, match=r"function\(\) missing 1 required positional argument: 'model'"):
        function()


def test_fields_are_stricter_than_arguments():
    assert not is_of(1, bool)
    assert not is_of("c", Literal["a", "b"])
    assert is_of([1, 2], tuple[int, ...])


def test_sizes_and_scales_are_refused_by_name():
    require_positive(size=1, sizes=(1, 2))
    require_moderate(scale=-1e17, nothing=None)
    for size in (0, -1, (1, 0)):
        with pytest.raises(ValueError, match=r"size is .*; it must be at least 1"):
            require_positive(size=size)
    for scale in (float("nan"), float("-inf"), 1e300, 10**30):
        with pytest.raises(ValueError, match=r"scale is .*; it must be finite"):
            require_moderate(scale=scale)


@pytest.mark.parametrize(
    "call",
    [
        lambda: normfree.ScaledWSConv2d(3, 0, 3),
        lambda: normfree.ScaledWSConv2d(3, 4, (3, -1)),
        lambda: normfree.ScaledWSConv2d(3, 4, 3, in_scale=float("nan")),
        lambda: normfree.nn.ScaledWSLinear(0, 4),
        lambda: normfree.nn.SqueezeExcite(8, 0),
        lambda: normfree.nn.VarianceLedger(1e300),
        lambda: normfree.create_model("nf_resnet26", depths=(0,) * 4),
        lambda: normfree.create_model("nf_resnet26", depths=(1, 1, 1, -1)),
        lambda: normfree.create_model("nf_resnet26", alpha=1e300),
        lambda: normfree.create_model("nf_resnet26", width=float("inf")),
        lambda: normfree.create_model("nfnet_f0", group_size=0),
    ],
)
def test_networks_and_layers_that_cannot_be_are_refused(call):
    with pytest.raises(ValueError, match="must be"):
        call()
