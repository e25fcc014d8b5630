"""Mixup and CutMix (timm's), of pairs that stay together however a batch is cut."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F

from normfree.training.batches import Batch, Example, collate, seeded


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
        targets = F.one_hot(batch.targets, self.classes).to(batch.images.dtype)
        for first in range(0, len(examples) - 1, 2):
            pair = slice(first, first + 2)
            key = examples[first].key
            # The last number tells these from the draws of the image's own transform.
            with seeded(self.seed, key.epoch, key.example, 1):
                batch.images[pair], targets[pair] = self.mixup(batch.images[pair], batch.targets[pair])
        return batch._replace(targets=targets)
