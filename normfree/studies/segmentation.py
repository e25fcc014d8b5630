"""Segmentation of a brain in 3-D, one and two patches at a time: BatchNorm, GroupNorm, InstanceNorm, converted.

    apt-get install mricron-data
    pip install monai nibabel
    python -m normfree.studies.segmentation --out docs/results/segmentation-brain [--only converted] [--seeds 3]

MONAI's residual U-Net learns the 54 regions of the AAL atlas, left and right merged and the vermis left out, on the
left half of Debian's T1 volume (2 mm). A coronal slab of that half, of which no patch is trained, chooses the learning
rate by the first seed, as `normfree study` does; the right half, mirrored, tests once. All kinds see the same patches,
and as many at either batch. Accuracies are Dice coefficients in percent, means over the regions.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.benchmarks.measure import added_peak
from normfree.conversion import convert
from normfree.errors import NotFiniteError
from normfree.files.tensors import load_state, read_tensors, write_tensors
from normfree.studies.peaks import measure_peak, read_peaks
from normfree.studies.runner import Trained, Work, run_cells
from normfree.studies.study import Cell, Entry, Rates, Study
from normfree.studies.trainings import fingerprint

TEMPLATES = Path("/usr/share/mricron/templates")
CLASSES = 56  # 0 is what is no region, 1 to 54 are regions; 55 is none: GroupNorm's eight groups divide the outputs
SLAB = slice(50, 66)  # coronal planes of the left half that validate
BATCHES = (1, 2)
_VERMIS = 108  # labels above it
_PATCH = (32, 32, 32)
_NORMS: dict[str, Any] = {
    "BatchNorm": "batch",
    "GroupNorm": ("group", {"num_groups": 8}),
    "InstanceNorm": ("instance", {"affine": True}),
    "converted": "batch",
}
KINDS = tuple(_NORMS)


@dataclass(frozen=True)
class Half:
    """Half of a brain: image (1, X, Y, Z), of mean 0 and deviation 1 in the brain, and labels (X, Y, Z)."""

    image: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Training:
    """Everything that decides how a network is trained."""

    kind: str  # one of KINDS
    batch: int
    patches: int  # that it sees
    lr: float  # AdamW's
    seed: int = 0


def read_halves(templates: Path = TEMPLATES) -> tuple[Half, Half]:
    """Read the left half of the brain, and the right one mirrored, every second millimetre.

    Raises ImportError without nibabel, FileNotFoundError where there are no templates.
    """
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("reading brains needs nibabel: pip install monai nibabel") from error
    if not (templates / "aal.nii.gz").exists():
        raise FileNotFoundError(f"there is no aal.nii.gz in {templates}: install Debian's mricron-data")
    files: list[Any] = [nibabel.load(templates / f"{name}.nii.gz") for name in ("ch2bet", "aal")]
    image, labels = (np.asarray(file.dataobj) for file in files)
    middle = image.shape[0] // 2  # the plane between the halves, which belongs to neither
    return _half(image[:middle], labels[:middle]), _half(image[:middle:-1], labels[:middle:-1])


def _half(image: np.ndarray, labels: np.ndarray) -> Half:
    """Halve the resolution: means of the image, every second label; sides are multiples of four, as the U-Net asks."""
    sides = [side // 8 * 8 for side in image.shape]
    box = tuple(slice(0, side) for side in sides)
    pixels = F.avg_pool3d(torch.from_numpy(image[box].astype(np.float32))[None, None], 2)[0]
    inside = pixels[pixels > 0]
    numbers = torch.from_numpy(labels[box][::2, ::2, ::2].astype(np.int64))
    merged = torch.where(numbers > _VERMIS, 0, (numbers + 1) // 2)
    return Half((pixels - inside.mean()) / inside.std(), merged)


class Patches:
    """Patches of the left half that lie outside of the slab and hold a region: the same for every kind."""

    def __init__(self, half: Half, seed: int) -> None:
        self.half = half
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw images (N, 1, X, Y, Z) and labels (N, X, Y, Z)."""
        found = [self._one() for _ in range(count)]
        return torch.stack([image for image, _ in found]), torch.stack([labels for _, labels in found])

    def _one(self) -> tuple[Tensor, Tensor]:
        while True:
            spaces = [side - patch + 1 for side, patch in zip(self.half.labels.shape, _PATCH, strict=True)]
            starts = [int(torch.randint(space, (), generator=self.generator)) for space in spaces]
            box = tuple(slice(start, start + patch) for start, patch in zip(starts, _PATCH, strict=True))
            labels = self.half.labels[box]
            if (box[1].stop <= SLAB.start or box[1].start >= SLAB.stop) and bool((labels > 0).any()):
                return self.half.image[:, *box], labels


def make_network(training: Training, left: Half) -> nn.Module:
    """Make MONAI's U-Net of the training's kind; a conversion sets its signal on eight patches."""
    from monai.networks import nets

    torch.manual_seed(training.seed)
    norm = _NORMS[training.kind]
    network: Any = nets.UNet(3, 1, CLASSES, (16, 32, 64), (2, 2), num_res_units=2, act="RELU", norm=norm)  # type: ignore[attr-defined]
    if training.kind != "converted":
        return network
    return convert(network, Patches(left, training.seed + 1000).draw(8)[0]).model


def train_network(training: Training, left: Half) -> nn.Module:
    """Train on patches of the left half; return the network in eval mode. Raises NotFiniteError for such a loss."""
    from monai import losses

    network, patches = make_network(training, left).train(), Patches(left, training.seed)
    steps = training.patches // training.batch
    optimizer = torch.optim.AdamW(network.parameters(), training.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=steps, pct_start=0.1)
    loss = losses.DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)  # type: ignore[attr-defined]
    for _ in range(steps):
        images, labels = patches.draw(training.batch)
        optimizer.zero_grad()
        found = loss(network(images), labels[:, None])
        if not found.isfinite():
            raise NotFiniteError("the loss of a patch is not finite")
        found.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def dice(network: nn.Module, half: Half, planes: slice = slice(None)) -> float:
    """Return the Dice coefficient in percent, the mean over the regions that occur in the coronal planes."""
    found = network(half.image[None])[0].argmax(0)[:, planes].flatten()
    wanted = half.labels[:, planes].flatten()
    both = torch.bincount(wanted[found == wanted], minlength=CLASSES)[1:]
    sizes = [torch.bincount(labels, minlength=CLASSES)[1:] for labels in (found, wanted)]
    return float((200 * both / (sizes[0] + sizes[1]))[sizes[1] > 0].mean())


def define(patches: int) -> Study:
    """Define the table: normalizers as rows, batches as columns."""
    cells = [Cell(kind, str(batch), Training(kind, batch, patches, 2e-3)) for batch in BATCHES for kind in KINDS]
    return Study(
        "segmentation",
        "One and two patches at a time, a converted network segments as well as one that normalizes each example.",
        "batch", tuple(cells), Rates(2e-3, 4.0, by_first_seed=True), extra_columns=_costs,
    )  # fmt: skip


class Segmentations(Work):
    """Trainings on the left half, tests on the right one; weights in `out`/runs, peaks of memory in memory.csv."""

    def __init__(self, out: Path, templates: Path) -> None:
        self.out = out
        self.left, self.right = read_halves(templates)
        (out / "runs").mkdir(parents=True, exist_ok=True)

    def train(self, cell: Cell, recipe: Training) -> Trained:
        """Train one, and validate it on the slab."""
        start = time.perf_counter()
        try:
            network = train_network(recipe, self.left)
        except NotFiniteError as error:
            return Trained(None, time.perf_counter() - start, str(error))
        seconds = time.perf_counter() - start
        write_tensors(_weights(self.out, recipe), network.state_dict())
        return Trained(dice(network, self.left, SLAB), seconds)

    def test(self, cell: Cell, recipe: Training) -> tuple[float, float]:
        """Test one, and measure what its kind takes."""
        measure_peak(self.out, cell, _peak, recipe, self.left)
        if not _weights(self.out, recipe).exists():
            self.train(cell, recipe)
        found = dice(load_network(self.out, recipe, self.left), self.right)
        return found, found


def _weights(out: Path, training: Training) -> Path:
    return out / "runs" / f"{fingerprint(training)}.safetensors"


def load_network(out: Path, training: Training, left: Half) -> nn.Module:
    """Load a network that `run` has trained, in eval mode. Raises FileNotFoundError where its weights are not."""
    network = make_network(training, left)
    load_state(network, read_tensors(_weights(out, training))[0])
    return network.eval()


def _peak(training: Training, left: Half) -> int:
    images = Patches(left, 0).draw(training.batch)[0]
    network = make_network(training, left).train()
    return added_peak(lambda: network(images).square().mean().backward())


def _costs(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, str]]:
    """List seconds and peak memory of a step, batch by batch."""
    peaks = read_peaks(folder)
    seconds: dict[str, list[str]] = {}
    memory: dict[str, list[str]] = {}
    for entry in entries:
        training, taken = entry.cell.recipe, [row.seconds for row in entry.trainings]
        steps = training.patches // training.batch
        seconds.setdefault(training.kind, []).append(f"{statistics.median(taken) / steps:.2f}" if taken else "missing")
        peak = peaks.get((entry.cell.row, entry.cell.column))
        memory.setdefault(training.kind, []).append("missing" if peak is None else f"{peak:.0f}")
    titled = {"seconds of a step": seconds, "MiB that a step adds": memory}
    return {title: {kind: ", ".join(texts) for kind, texts in found.items()} for title, found in titled.items()}


def main() -> None:
    """Train and test what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=())
    parser.add_argument("--templates", type=Path, default=TEMPLATES)
    parser.add_argument("--patches", type=int, default=600, help="that a training sees")
    options = parser.parse_args()
    work = Segmentations(options.out, options.templates)
    study = define(options.patches)
    run_cells(study, options.out, work, seeds=options.seeds, only=options.only, on_message=print)


if __name__ == "__main__":
    main()
