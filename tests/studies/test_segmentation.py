"""The study of a segmented brain, on one that the tests make, and tiles put together."""

import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from normfree.studies.seams import in_tiles, seam
from normfree.studies.segmentation import CLASSES, SLAB, Half, Patches, dice, read_halves
from tests.helpers import assert_allclose


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A head of two halves that mirror each other, regions in layers, one of each side, and a vermis."""
    folder = tmp_path_factory.mktemp("templates")
    x, y, _ = np.meshgrid(np.arange(141), np.arange(204), np.arange(72), indexing="ij")
    left = np.minimum(x, 140 - x)
    labels = np.where(y > 8, 2 * (left // 18) + 1 + (x > 70), 0)
    labels[50:91, :, :8] = 112
    image = np.where(y > 8, 20 * (left // 18) + 30, 0)
    for name, volume in (("ch2bet", image), ("aal", labels)):
        nibabel.save(nibabel.Nifti1Image(volume.astype(np.uint8), np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_halves_mirror_each_other_and_left_and_right_are_one_region(templates):
    left, right = read_halves(templates)
    assert left.labels.shape == left.image.shape[1:] == (32, 100, 36)
    assert torch.equal(left.labels, right.labels)
    assert_allclose(left.image, right.image)
    assert left.labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert (left.labels[:, 10:, 6:] > 0).all()
    assert not left.labels[-1, :, :3].any()  # the vermis is no region
    inside = left.image[left.image > left.image.min()]
    assert inside.std() == pytest.approx(1, abs=0.05)


def test_no_patch_touches_the_slab_that_validates(templates):
    left, _ = read_halves(templates)
    marked = Half(torch.arange(100.0).view(1, 1, 100, 1).expand(1, *left.labels.shape), left.labels)
    planes = [set(Patches(marked, seed).draw(2)[0].flatten().tolist()) for seed in range(30)]
    assert not set.union(*planes) & set(range(SLAB.start, SLAB.stop))
    assert torch.equal(Patches(left, 3).draw(2)[0], Patches(left, 3).draw(2)[0])


def test_dice_is_the_mean_over_the_regions_that_occur():
    labels = torch.zeros(4, 4, 4, dtype=torch.long)
    labels[:2], labels[2, :2] = 1, 2
    found = labels.clone()
    found[0] = 0  # half of region 1 is missed; region 3, which is not there, is found once
    found[3, 3, 3] = 3

    class Says(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(found, CLASSES).permute(3, 0, 1, 2)[None].float()

    half = Half(torch.zeros(1, 4, 4, 4), labels)
    assert dice(Says(), half) == pytest.approx((100 * 2 * 16 / (16 + 32) + 100) / 2)
    assert dice(Says(), half, slice(2, 4)) == pytest.approx(100 * 2 * 8 / (8 + 16))


@pytest.mark.parametrize("norm", [None, nn.InstanceNorm3d])
def test_tiles_with_a_halo_are_exact_but_for_statistics(norm):
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 4, 3, 2, padding=1), nn.ReLU(), nn.ConvTranspose3d(4, 2, 4, 2, padding=1)]
    network = nn.Sequential(*layers[:1], *([] if norm is None else [norm(4)]), *layers[1:])
    image = torch.randn(1, 22, 20, 18)  # no multiples of the tiles
    tiles = in_tiles(network, image, core=8, halo=4)
    whole = network(image[None])[0].detach()
    assert tiles.shape == whole.shape
    assert torch.allclose(tiles, whole, atol=1e-5) is (norm is None)
    assert (float(seam(network, image, core=8, halo=4).max()) < 1e-4) is (norm is None)
    with pytest.raises(ValueError, match="core is 7 and halo 4; they must be multiples of 4"):
        in_tiles(network, image, core=7, halo=4)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="install Debian's mricron-data"):
        read_halves(tmp_path)


@pytest.mark.slow
def test_trained_tested_once_and_tiled(templates, tmp_path):
    """In processes of their own: MONAI warns when it is imported."""
    command = [sys.executable, "-m"]
    places = ["--templates", str(templates), "--patches", "4", "--out", str(tmp_path)]
    for module, more in (
        ("segmentation", ["--seeds", "1", "--only", "converted", "GroupNorm", "InstanceNorm"]),
        ("seams", ["--trained", str(tmp_path)]),
    ):
        done = subprocess.run(
            [*command, f"normfree.studies.{module}", *places, *more], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| batch | 1 | 2 | seconds of a step | MiB that a step adds |"
    assert [row.split(" | ")[0] for row in table[2:]] == ["| BatchNorm", "| GroupNorm", "| InstanceNorm", "| converted"]
    assert table[2].count("missing") >= 2
    assert not [row for row in table[3:] if "missing" in row]
    found = dict(line.split("\t")[:2] for line in done.stdout.splitlines())
    assert float(found["InstanceNorm"]) > 0.01
    assert float(found["converted"]) < 1e-4
    assert (tmp_path / "seams.png").stat().st_size > 1000
