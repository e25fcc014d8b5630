"""Weights that a training begins with, of files of every kind that people have."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from normfree.errors import TrainingError
from normfree.training.initial_weights import load_initial


class Named(nn.Module):
    """A network whose modules are called as a file calls them, or not."""

    def __init__(self, names=("conv", "norm", "fc"), classes=3, norm=nn.BatchNorm2d):
        super().__init__()
        conv, affine, head = names
        self.add_module(conv, nn.Conv2d(1, 4, 3))
        self.add_module(affine, norm(4))
        self.add_module(head, nn.Linear(4, classes))


def trained(**arguments):
    torch.manual_seed(1)
    model = Named(**arguments)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.float32) * 5)
    return model


def same(model, other, *, but=()):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name not in but)


HEAD = ("fc.weight", "fc.bias")


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module."])
def test_files_of_torch_are_read_as_people_wrap_them(wrap, tmp_path):
    source, model = trained(), Named()
    state = source.state_dict()
    if wrap == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save({wrap: state, "epoch": 3} if wrap in ("state_dict", "model") else state, tmp_path / "a.pth")
    load_initial(model, tmp_path / "a.pth")
    assert same(model, source)


def test_a_classifier_of_other_classes_stays_new_and_nothing_else(tmp_path):
    source = trained(classes=1000)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        model = Named()
        before = {name: model.state_dict()[name].clone() for name in HEAD}
        load_initial(model, tmp_path / name)
        assert same(model, source, but=HEAD)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    wide = trained()
    wide.conv = nn.Conv2d(1, 5, 3)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    model = Named()
    with pytest.raises(TrainingError, match=r"wide\.pth does not fit Named: conv\.weight is \(5, 1, 3, 3\) there"):
        load_initial(model, tmp_path / "wide.pth")


def test_another_packages_names_are_taken_in_their_order_with_a_warning(tmp_path):
    source = trained(names=("stem", "bn", "head"))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model = Named()
    with pytest.warns(UserWarning, match=r"other names, and is taken in its order: stem\.weight as conv\.weight, …, "):
        load_initial(model, tmp_path / "a.pth")
    pairs = zip(model.state_dict().values(), source.state_dict().values(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs if mine.ndim)
    turned = dict(reversed(source.state_dict().items()))
    torch.save(turned, tmp_path / "turned.pth")
    with pytest.raises(TrainingError, match=r"does not fit Named: it lacks conv\.weight, "):
        load_initial(Named(), tmp_path / "turned.pth")
    save_file(source.state_dict(), tmp_path / "a.safetensors")  # which has no order
    with pytest.raises(TrainingError, match=r"does not fit Named: it lacks conv\.weight, "):
        load_initial(Named(), tmp_path / "a.safetensors")


def test_counters_of_batches_may_be_missing(tmp_path):
    source = trained()
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "a.pth")
    model = Named()
    load_initial(model, tmp_path / "a.pth")
    assert same(model, source, but=("norm.num_batches_tracked",))
    assert model.norm.num_batches_tracked == 0


class Runs:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"fc.weight": Runs()}, "holds no weights that can be read"),
        ([1, 2], "it holds a list, not the names and tensors"),
        ({}, "it holds a dict, not the names and tensors"),
        ({"epoch": 3}, "'epoch' of it is a int: give a state_dict"),
    ],
)
def test_what_holds_no_weights_is_refused_and_runs_nothing(content, words, tmp_path, capsys):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(TrainingError, match=words):
        load_initial(Named(), tmp_path / "a.pth")
    assert "it ran" not in capsys.readouterr().out


def test_files_that_are_damaged_or_not_there_are_named(tmp_path):
    torch.save(trained().state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    for name, data in (("cut.pth", whole[: len(whole) // 2]), ("empty.pth", b""), ("text.pt", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TrainingError, match=name):
            load_initial(Named(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_initial(Named(), tmp_path / "none.pth")
    broken = trained()
    broken.conv.weight.data[0] = torch.nan
    torch.save(broken.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(TrainingError, match=r"nan\.pth has values that are no numbers in conv\.weight"):
        load_initial(Named(), tmp_path / "nan.pth")


def test_what_the_model_does_not_have_is_refused_and_frozen_normalizers_need_no_counters(tmp_path):
    source = trained()
    more = source.state_dict() | {
        "conv.gain": torch.ones(4)
    }  # as a converted network's, whose weight is not the filter
    torch.save(more, tmp_path / "more.pth")
    save_file(more, tmp_path / "more.safetensors")
    for name in ("more.pth", "more.safetensors"):
        with pytest.raises(TrainingError, match=r"it lacks nothing, and has conv\.gain besides"):
            load_initial(Named(), tmp_path / name)
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    shuffled = dict(sorted(source.state_dict().items(), reverse=True))  # by their names all the same
    torch.save(shuffled, tmp_path / "a.pth")
    frozen = Named(norm=FrozenBatchNorm2d)
    load_initial(frozen, tmp_path / "a.pth")
    assert all(torch.equal(value, frozen.state_dict()[name]) for name, value in state.items())
