"""Files for other runtimes, with batch and image sizes that the program was not made from."""

import pytest
import torch
from torch import nn

from normfree import create_model, export, exporting
from tests.helpers import assert_allclose, shaken, slow_but

NETWORKS = {
    "nf_resnet26": {"width": 0.5},
    "nf_resnet26 symmetric": {"width": 0.5, "padding": "symmetric", "se_ratio": 0.25},
    "nf_regnet_b0": {"width": 0.25},
    "nfnet_f0": {"width": 0.25, "group_size": 32},
    "bn_resnet26": {"width": 0.5},
}


PAIRS = [*((name, "onnx") for name in NETWORKS), ("nf_resnet26", "pt2"), ("nf_regnet_b0", "pt2")]  # of one program


@pytest.mark.parametrize("pair", slow_but({PAIRS[0]}, PAIRS), ids=" ".join)
def test_a_file_computes_the_same_on_batches_and_images_of_other_sizes(pair, tmp_path):
    name, to = pair
    model = shaken(create_model(name.split()[0], num_classes=4, **NETWORKS[name])).train()
    result = export(model, tmp_path / f"net.{to}", to=to, size=64)
    assert result.difference <= 1e-4 * max(1, result.largest), result
    assert model.training
    run = _runner(result.path, to)
    model.eval()
    for shape in ((1, 3, 64, 64), (4, 3, 97, 110)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert_allclose(run(x), model(x), rtol=0, atol=1e-4 * max(1, result.largest))


def _runner(path, to):
    if to == "pt2":
        return torch.export.load(path).module()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("wrong", [float("nan"), 1.0])
def test_a_file_that_computes_something_else_is_no_success(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_runner", lambda content, to: lambda x: [torch.full((len(x), 4), wrong)])
    (tmp_path / "net.pt2").write_text("before")
    with pytest.raises(ValueError, match="nothing written: the program's outputs differ by"):
        export(create_model("nf_resnet26", width=0.25, num_classes=4), tmp_path / "net.pt2", to="pt2", size=64)
    assert (tmp_path / "net.pt2").read_text() == "before"


def test_what_cannot_be_exported_is_refused_and_named(tmp_path):
    model = create_model("nf_resnet26", width=0.25)
    with pytest.raises(ValueError, match="to is 'tflite'"):
        export(model, tmp_path / "net.tflite", to="tflite")
    with pytest.raises(ValueError, match="size is 0"):
        export(model, tmp_path / "net.pt2", to="pt2", size=0)
    with pytest.raises(ValueError, match="takes no images of 65x50: made from an example of 32x32"):
        export(create_model("nf_resnet26", width=0.25), tmp_path / "net.pt2", to="pt2", size=32)
    with pytest.raises(ValueError, match="no 2-D convolution"):
        export(nn.Linear(2, 2), tmp_path / "net.pt2", to="pt2")
