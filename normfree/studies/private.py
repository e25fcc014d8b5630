"""Differentially private training: what Opacus puts in BatchNorm's place, and the converted network.

    pip install 'normfree[train,privacy]'
    python -m normfree.studies.private --data digits --out docs/results/private-digits [--seeds 3]

DP-SGD (Abadi et al. 2016) at ε of 1, 3 and 8, δ the inverse of ten times the training images, by Opacus' accountant; of
each image one view, or the mean gradient of four (augmentation multiplicity, De et al. 2022). Scales of a conversion
are set on noise, not on the images. Learning rates are chosen by validation images, which costs no ε here.
"""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from normfree.conversion import convert
from normfree.errors import NotFiniteError
from normfree.nn.surgery import replace_modules
from normfree.optim import param_groups
from normfree.privacy import per_sample_gradients
from normfree.studies.cifar_resnets import CifarResNet
from normfree.studies.in_memory import InMemory
from normfree.studies.runner import run_cells
from normfree.studies.study import Cell, Rates, Study
from normfree.training.data.datasets import Data, load

FIXED = "ModuleValidator.fix"
_NORM = 1.0  # to which an image's gradient is clipped
_BATCH = 256  # expected


@dataclass(frozen=True)
class Private:
    """Everything that decides how a network is trained."""

    kind: str  # FIXED or converted
    views: int  # of an image, whose gradients are averaged
    epsilon: float
    images: int
    epochs: int
    lr: float  # of SGD with momentum 0.9
    seed: int = 0
    data: str = "digits"


def make_network(recipe: Private, size: int) -> nn.Module:
    """Make a ResNet-20 for images (N, 1, size, size) without BatchNorm, in training mode."""
    from opacus.validators import ModuleValidator

    torch.manual_seed(recipe.seed)
    network = CifarResNet(20, 8, in_channels=1)
    if recipe.kind == FIXED:
        fixed: nn.Module = ModuleValidator.fix(network)
        norms = [module for module in fixed.modules() if isinstance(module, nn.GroupNorm)]
        # torchvision's blocks write into what a layer puts out, which hooks forbid: a copy, as in a converted network.
        return replace_modules(fixed, {norm: nn.Sequential(norm, nn.Identity()) for norm in norms}).train()
    return convert(network, torch.randn(64, 1, size, size)).model.train()


def train_network(recipe: Private, images: Tensor, labels: Tensor) -> nn.Module:
    """Train with differential privacy; return the network in eval mode."""
    from opacus import PrivacyEngine

    network = make_network(recipe, images.shape[-1])
    wrapped = per_sample_gradients(network)
    loader = DataLoader(
        TensorDataset(images, labels), _BATCH, shuffle=True, generator=torch.Generator().manual_seed(recipe.seed)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of randomness that is not cryptographic
        private, optimizer, batches = PrivacyEngine().make_private_with_epsilon(
            module=wrapped,
            optimizer=torch.optim.SGD(param_groups(wrapped, 0.0), recipe.lr, momentum=0.9),
            data_loader=loader,
            target_epsilon=recipe.epsilon,
            target_delta=0.1 / len(images),
            epochs=recipe.epochs,
            max_grad_norm=_NORM,
            noise_generator=torch.Generator().manual_seed(recipe.seed),
        )
        for _ in range(recipe.epochs):
            for pixels, targets in batches:
                optimizer.zero_grad()
                if len(targets):
                    views = torch.stack([shifted(pixels) for _ in range(recipe.views)], 1).flatten(0, 1)
                    repeated = targets.repeat_interleave(recipe.views)
                    F.cross_entropy(private(views), repeated).backward()
                    _average(private, len(targets), recipe.views)
                optimizer.step()
    return network.eval()


def shifted(images: Tensor) -> Tensor:
    """Shift each image, (N, C, H, W), by up to two pixels, at random."""
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    height, width = images.shape[2:]
    places = torch.randint(0, 5, (len(images), 2)).tolist()
    return torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, places, strict=True)])


def _average(network: Any, images: int, views: int) -> None:
    """Make of gradients per view those per image."""
    for parameter in network.parameters():
        if getattr(parameter, "grad_sample", None) is not None:
            parameter.grad_sample = parameter.grad_sample.view(images, views, *parameter.shape).mean(1)


class PrivateTrainings(InMemory):
    """Trainings and tests on one data set, of which the first images are trained on."""

    def __init__(self, out: Path, data: Data, images: int) -> None:
        super().__init__(out, data)
        self.training = (self.training[0][:images], self.training[1][:images])

    def make(self, recipe: Private) -> nn.Module:
        """Make the network, new."""
        return make_network(recipe, self.training[0].shape[-1])

    def fit(self, recipe: Private) -> nn.Module:
        """Train it. Raises NotFiniteError for a parameter that is not."""
        network = train_network(recipe, *self.training)
        if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
            raise NotFiniteError("a parameter is not finite")
        return network


def define(images: int, epochs: int, data: str = "digits") -> Study:
    """Define the table: networks and numbers of views as rows, ε as columns."""
    cells = [
        Cell(f"{kind}, {views} view{'s' * (views > 1)}", f"{epsilon:g}",
             Private(kind, views, epsilon, images, epochs, 0.5, data=data))
        for epsilon in (1.0, 3.0, 8.0) for kind in (FIXED, "converted") for views in (1, 4)
    ]  # fmt: skip
    return Study(
        "private",
        "With differential privacy a converted network reaches at least what Opacus' own replacement does.",
        "ε", tuple(cells), Rates(0.5, by_first_seed=True),
    )  # fmt: skip


def main() -> None:
    """Train and test what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits or fashion_mnist")
    parser.add_argument("--images", type=int, default=10000, help="training images, at most")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=(), help="rows and columns")
    options = parser.parse_args()
    work = PrivateTrainings(options.out, load(options.data), options.images)
    study = define(len(work.training[1]), options.epochs, options.data)
    run_cells(study, options.out, work, seeds=options.seeds, only=options.only, on_message=print)


if __name__ == "__main__":
    main()
