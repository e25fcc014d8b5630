"""Trainings on small images that are held in memory, in a loop of their own."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.errors import NotFiniteError
from normfree.files.tensors import load_state, read_tensors, write_tensors
from normfree.studies.runner import Trained, Work
from normfree.studies.study import Cell
from normfree.studies.trainings import fingerprint
from normfree.training.data.datasets import Data, Images, hold_out

_SIZE = 16


def tensors_of(images: Images, data: Data) -> tuple[Tensor, Tensor]:
    """Return all images, (N, 1, 16, 16), normalized, and their labels."""
    pixels = torch.stack([torch.from_numpy(np.array(images[i][0])) for i in range(len(images))])
    scaled = F.interpolate(pixels[:, None].float() / 255, _SIZE, mode="bilinear", align_corners=False)
    return (scaled - data.mean[0]) / data.std[0], torch.tensor(images.labels)


@torch.no_grad()
def accuracies(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy and balanced accuracy, in percent."""
    right = (network(images).argmax(1) == labels).float()
    classes = [right[labels == label].mean() for label in labels.unique()]
    return float(right.mean() * 100), float(torch.stack(classes).mean() * 100)


class InMemory(Work):
    """Trainings, validations and tests on one data set; weights in `out`/runs."""

    def __init__(self, out: Path, data: Data) -> None:
        self.out = out
        held = hold_out(data)
        self.training, self.validation, self.testing = (
            tensors_of(images, data) for images in (held.train, held.test, data.test)
        )
        (out / "runs").mkdir(parents=True, exist_ok=True)

    def make(self, recipe: Any) -> nn.Module:
        """Make the network of a recipe, new."""
        raise NotImplementedError

    def fit(self, recipe: Any) -> nn.Module:
        """Train it; return it in eval mode. Raises NotFiniteError where that fails."""
        raise NotImplementedError

    def train(self, cell: Cell, recipe: Any) -> Trained:
        """Train one, and validate it."""
        start = time.perf_counter()
        try:
            network = self.fit(recipe)
        except NotFiniteError as error:
            return Trained(None, time.perf_counter() - start, str(error))
        seconds = time.perf_counter() - start
        write_tensors(self._weights(recipe), network.state_dict())
        return Trained(accuracies(network, *self.validation)[0], seconds)

    def test(self, cell: Cell, recipe: Any) -> tuple[float, float]:
        """Test one that has been trained, here or elsewhere."""
        if not self._weights(recipe).exists():
            self.train(cell, recipe)
        network = self.make(recipe)
        load_state(network, read_tensors(self._weights(recipe))[0])
        return accuracies(network.eval(), *self.testing)

    def _weights(self, recipe: Any) -> Path:
        return self.out / "runs" / f"{fingerprint(recipe)}.safetensors"
