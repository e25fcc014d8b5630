"""Mixup and CutMix (timm's), of pairs that stay together however a batch is cut."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from normfree.training.data.batches import Batch, Example, collate, reseedable


class Mixing:
    """Stacks examples and mixes neighbours in the epoch's order, at random from (seed, epoch, index of the first)."""

    def __init__(self, mixup: float, cutmix: float, classes: int, seed: int) -> None:
        from timm.data import Mixup

        self.classes = classes
        self.seed = seed
        self.mixup: Any = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0, num_classes=classes)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Mixed images and the distributions of their labels."""
        batch = collate(examples)
        images = batch.images.float()
        targets = F.one_hot(batch.targets, self.classes).to(images.dtype)
        with reseedable() as seed:
            for first in range(0, len(examples) - 1, 2):
                pair = slice(first, first + 2)
                key = examples[first].key
                seed(self.seed, key.epoch, key.example, 1)  # 1: other draws than those of the image's transform
                images[pair], targets[pair] = self.mixup(images[pair], batch.targets[pair])
        return batch._replace(images=images, targets=targets)
