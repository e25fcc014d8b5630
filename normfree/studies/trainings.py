"""The paper's claims as studies: which networks, trained how, beside each other."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from normfree.errors import suggest
from normfree.studies.runner import Cell, Study
from normfree.training import RECIPES, Recipe

Budget = Literal["toy", "small", "full"]

_BATCH_NORM, _NF = "BatchNorm", "NF"


def study(name: str, data: str, budget: Budget) -> Study:
    """The study of a name, on `data`: "toy" to see that it runs, "small" for one machine, "full" for a cluster.

    Raises ValueError for a name that is not known.
    """
    if name not in STUDIES:
        raise ValueError(f"no study is called {name!r}{suggest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    return STUDIES[name](_base(data, budget), budget)


def _base(data: str, budget: Budget) -> Recipe:
    """What all cells share. On images of 32 pixels the last stage has one position: statistics run out there."""
    if budget == "full":
        return replace(RECIPES["nf_resnet50"], data=data, evaluate_every=10)
    epochs = {"toy": 1, "small": 4}[budget]
    return replace(
        RECIPES["digits"], data=data, epochs=epochs, batch=64, crop_scale=0.35, flip=data != "digits",
        warmup_epochs=0.5, evaluate_every=epochs, log_every=20, keep=1, workers=0, lr=0.4,
    )  # fmt: skip


def _rates(budget: Budget) -> tuple[float, ...]:
    """Learning rates (at a batch of 256) that each cell chooses from."""
    return {"toy": (0.4,), "small": (0.1, 0.4, 1.6), "full": (0.1,)}[budget]  # on ImageNet the paper's


def _network(base: Recipe, name: str, **changes: object) -> Recipe:
    return replace(base, model=name, **changes)  # type: ignore[arg-type]


def _depth_of(base: Recipe) -> int:
    return int(base.model.removeprefix("nf_resnet"))


def _microbatch(base: Recipe, budget: Budget) -> Study:
    depth = _depth_of(base)
    cells = [
        Cell(row, column, _network(base, f"{model}{depth}", cut=cut, accumulate=8))
        for row, model in ((_BATCH_NORM, "bn_resnet"), (_NF, "nf_resnet"))
        for column, cut in (("mixed", "dealt"), ("one class each", "by_class"))
    ]
    return Study(
        "microbatch",
        "The same batches, accumulated from eight parts that are mixed or of one class each: normalizer-free networks "
        "do not notice, BatchNorm fails.",
        "parts", tuple(cells), _rates(budget),
    )  # fmt: skip


def _batch_size(base: Recipe, budget: Budget) -> Study:
    depth = _depth_of(base)
    sizes = {"toy": (256, 64), "small": (256, 64, 16, 8, 4, 2, 1), "full": (1024, 256, 64, 32, 16, 8)}[budget]
    cells = [
        Cell(row, str(size), _network(base, f"{model}{depth}", batch=size))
        for size in sizes
        for row, model in ((_BATCH_NORM, "bn_resnet"), (_NF, "nf_resnet"))
    ]
    return Study(
        "batch-size",
        "At equal epochs, the learning rate scaled linearly: normalizer-free networks hold at small batches, where "
        "BatchNorm breaks.",
        "batch", tuple(cells), _rates(budget),
    )  # fmt: skip


def _depth(base: Recipe, budget: Budget) -> Study:
    rows = {
        _BATCH_NORM: "bn_resnet{}", _NF: "nf_resnet{}", "NF without weight standardization":
        "nf_resnet{}_unstandardized", "SkipInit": "skipinit_resnet{}", "FixUp": "fixup_resnet{}",
        "nothing": "unnormalized_resnet{}",
    }  # fmt: skip
    depths = (26,) if budget == "toy" else (26, 50, 101, 288)
    cells = [Cell(row, str(d), _network(base, name.format(d))) for d in depths for row, name in rows.items()]
    return Study(
        "depth",
        "Normalizer-free networks keep up with BatchNorm at every depth; the others fall behind or fail.",
        "depth", tuple(cells), _rates(budget),
    )  # fmt: skip


STUDIES: dict[str, Callable[[Recipe, Budget], Study]] = {
    "microbatch": _microbatch,
    "batch-size": _batch_size,
    "depth": _depth,
}
"""The studies by name."""
