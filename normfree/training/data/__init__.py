"""Data sets of images with labels: which there are, in what order, made ready how."""

from normfree.training.data.datasets import load

__all__ = ["load"]
