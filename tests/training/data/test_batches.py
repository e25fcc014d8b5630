"""Batches: every example once, and its randomness a function of (seed, epoch, index)."""

import contextlib
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normfree.errors import TrainingError
from normfree.training.data.batches import Examples, Order, Parts, _start_method, collate, loader, reseedable
from normfree.training.data.mixing import Mixing
from tests.helpers import SEEDS, assert_allclose, assert_equal


class Noisy:
    """Images whose pixels are their index; some cannot be read."""

    def __init__(self, count, unreadable=()):
        self.count = count
        self.unreadable = unreadable

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise OSError("truncated")
        return Image.new("L", (4, 4), index), index % 10

    def name(self, index):
        return f"{index}.png"


def random_transform(image):
    pixels = torch.from_numpy(np.asarray(image, np.float32).copy())[None]
    return pixels + random.random() + torch.rand(1) + float(np.random.rand())


def run(order, processes, workers=0, collate=collate, images=None):
    """Batches of an epoch, in the order of steps and parts."""
    examples = Examples(images or Noisy(order.examples), random_transform, order.seed, training=True)
    found = []
    for process in range(processes):
        parts = Parts(order, process, processes)
        parts.epoch = 1
        found.append(list(loader(examples, parts, workers=workers, pin=False, collate=collate)))
    return found


@settings(deadline=None)
@given(
    examples=st.integers(1, 60), batch=st.integers(1, 30), processes=st.integers(1, 3), accumulate=st.integers(1, 3),
    shuffle=st.booleans(), even=st.booleans(), epoch=st.integers(0, 2), seed=SEEDS,
)  # fmt: skip
def test_every_example_comes_once_an_epoch(examples, batch, processes, accumulate, shuffle, even, epoch, seed):
    order = Order(examples, batch, processes * accumulate, seed=seed, shuffle=shuffle, even=even)
    real = []
    for process in range(processes):
        parts = Parts(order, process, processes)
        parts.epoch = epoch
        keys = list(parts)
        assert len(keys) == len(parts) == order.steps * accumulate
        for step in range(order.steps):
            sizes = {len(part) for part in keys[step * accumulate : (step + 1) * accumulate]}
            assert len(sizes) == 1
            assert not even or sizes.pop() % 2 == 0
        real += [key.example for part in keys for key in part if key.weight]
    assert sorted(real) == list(range(examples))
    assert sum(order.count(step) for step in range(order.steps)) == examples


@pytest.mark.parametrize("dealt", [False, True])
def test_parts_of_one_class_and_the_same_batches_dealt_out(dealt):
    labels = [i * 7 % 5 for i in range(203)]
    order, other = (Order(203, 24, 4, seed=1, labels=labels, dealt=d) for d in (dealt, not dealt))
    seen, pure = [], 0
    for step in range(order.steps):
        examples = [key.example for key in order.step(2, step)]
        assert sorted(examples) == sorted(key.example for key in other.step(2, step))
        real = [key.example for key in order.step(2, step) if key.weight]
        seen += real
        pure += sum(len({labels[e] for e in examples[i : i + 6]}) == 1 for i in range(0, len(examples), 6))
    assert sorted(seen) == list(range(203))
    assert (pure <= 4) if dealt else (pure >= 30), pure
    with pytest.raises(ValueError, match="multiple of 4"):
        Order(203, 22, 4, seed=1, labels=labels)


def test_orders_differ_by_epoch_and_seed():
    first, second = (Order(50, 50, 1, seed=0).step(epoch, 0) for epoch in (0, 1))
    other = Order(50, 50, 1, seed=1).step(0, 0)
    orders = [[key.example for key in keys] for keys in (first, second, other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("processes", "accumulate", "workers"), [(1, 1, 2), (1, 4, 0), (2, 1, 0), (2, 2, 1)])
def test_randomness_does_not_depend_on_the_cut_or_the_workers(processes, accumulate, workers, mixed):
    def images(processes, accumulate, workers):
        order = Order(21, 12, processes * accumulate, seed=5, even=mixed)
        stack = Mixing(0.5, 1.0, 10, seed=5) if mixed else collate
        per_process = run(order, processes, workers, stack)
        rows = []
        for step in range(order.steps):
            for batches in per_process:
                for batch in batches[step * accumulate : (step + 1) * accumulate]:
                    real = batch.weights > 0
                    targets = batch.targets if mixed else batch.targets[:, None]
                    rows.append(torch.cat([batch.images.flatten(1), targets], 1)[real])
        return torch.cat(rows)

    assert_equal(images(processes, accumulate, workers), images(1, 1, 0))


def test_mixtures_are_those_of_neighbours():
    order = Order(8, 8, 1, seed=0, even=True)
    ((plain,),), ((mixed,),) = run(order, 1), run(order, 1, collate=Mixing(1.0, 0.0, 10, seed=0))
    assert_allclose(mixed.targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)
    for i in range(0, 8, 2):
        labels = plain.targets[i : i + 2].tolist()
        weight = float(mixed.targets[i, labels[0]])
        expected = weight * plain.images[i] + (1 - weight) * plain.images[i + 1]
        assert_allclose(mixed.images[i], expected, atol=1e-4)


def test_the_state_outside_is_untouched():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    with reseedable() as seed:
        seed(1, 2)
        first = torch.rand(1)
        seed(1, 2)
        assert_equal(torch.rand(1), first)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_loading_draws_nothing_from_the_global_state():
    before = torch.get_rng_state()
    run(Order(6, 3, 1, seed=0), 1, workers=1)
    assert_equal(torch.get_rng_state(), before)


def test_unreadable_images_are_replaced_in_training_and_left_out_in_testing():
    images = Noisy(6, unreadable=(2, 3))
    for training, weight in ((True, 1.0), (False, 0.0)):
        examples = Examples(images, lambda i: torch.tensor([float(np.asarray(i)[0, 0])]), 0, training=training)
        keys = Order(6, 6, 1, seed=0, shuffle=False).step(0, 0)
        batch = collate([examples[key] for key in keys])
        assert batch.images.flatten().tolist() == [0, 1, 4, 4, 4, 5]
        assert batch.weights.tolist() == [1, 1, weight, weight, 1, 1]
        assert batch.unreadable == ("2.png (OSError)", "3.png (OSError)")
    with pytest.raises(TrainingError, match="none of 2 images in a row"):
        Examples(Noisy(2, (0, 1)), random_transform, 0, training=True)[keys[0]]


def test_what_a_worker_cannot_do_is_said_in_its_words():
    examples = Examples(Noisy(2, (0, 1)), random_transform, 0, training=True)
    parts = Parts(Order(2, 2, 1, seed=0), 0, 1)
    words = r"^none of 2 images in a row can be read, the first is [01]\.png \(OS"
    for workers in (0, 1):
        batches = loader(examples, parts, workers=workers, pin=False)
        with (
            contextlib.closing(batches),
            pytest.raises(TrainingError, match=words),
        ):
            list(batches)


def test_workers_do_not_start_by_a_fork_amid_other_threads(monkeypatch):
    """CPython before 3.11.10 may wait for ever in such a child."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        for version, method in (((3, 11, 9), "forkserver"), ((3, 12, 0), None)):
            patch.setattr(sys, "version_info", version)
            assert _start_method() == method
    assert _start_method() is None  # alone
    examples, parts = Examples(Noisy(4), grey, 0, training=True), Parts(Order(4, 2, 1, seed=0), 0, 1)
    expected = [batch.images for batch in loader(examples, parts, workers=0, pin=False)]
    monkeypatch.setattr("normfree.training.data.batches._start_method", lambda: "forkserver")
    with contextlib.closing(loader(examples, parts, workers=1, pin=False)) as loaded:
        for found, images in zip(loaded, expected, strict=True):
            assert_equal(found.images, images)


def grey(image):
    return torch.from_numpy(np.asarray(image).copy())[None]
