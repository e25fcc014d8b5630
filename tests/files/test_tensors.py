"""Tensors with a checksum."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from normfree.files.tensors import load_state, read_tensors, write_tensors
from tests.helpers import assert_same_state


def tensors():
    torch.manual_seed(0)
    shared = torch.randn(3, 4)
    return {
        "a": shared, "b": torch.arange(3), "empty": torch.empty(0, 2), "scalar": torch.tensor(1.5),
        "half": torch.ones(2, dtype=torch.bfloat16), "flag": torch.tensor([True, False]), "view": shared[1:],
        "column": torch.randn(4, 4)[:, 1],
    }  # fmt: skip


def test_tensors_are_read_as_they_were_written_and_no_other_way(tmp_path):
    path = tmp_path / "it.safetensors"
    write_tensors(path, tensors(), {"what": "some"})
    read, described = read_tensors(path)
    assert described == {"what": "some"}
    assert_same_state(read, tensors())
    whole = path.read_bytes()
    for place in (len(whole) - 1, whole.index(b"some"), whole.index(b"BF16")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"it\.safetensors is (not what was written|no \.safetensors file)"):
            read_tensors(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"it\.safetensors is no \.safetensors file, or cut off"):
        read_tensors(path)


def test_tensors_of_others_are_read_unless_they_are_no_numbers(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.tensor(float("inf"))}, tmp_path / "it.safetensors")
    assert set(read_tensors(tmp_path / "it.safetensors")[0]) == {"a", "b"}
    save_file({"a": torch.tensor(float("nan"))}, tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="has values that are no numbers in a"):
        read_tensors(tmp_path / "it.safetensors")


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for state, words in (
        ({"weight": torch.ones(2, 2)}, "it lacks bias, and has nothing besides"),
        ({**before, "more": torch.ones(1)}, "it lacks nothing, and has more besides"),
        ({"bias": torch.ones(2), "weight": torch.ones(2, 3)}, r"weight is \(2, 3\) there and \(2, 2\) here"),
    ):
        with pytest.raises(ValueError, match=words):
            load_state(model, state)
        assert_same_state(model.state_dict(), before)
    with pytest.raises(ValueError, match="a of the state is a dict"):
        write_tensors(Path("never"), {"a": {}})
