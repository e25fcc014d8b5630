"""Definitions of the studies: the paper's claims, each as networks that are trained beside each other."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from normfree.errors import suggest
from normfree.studies.columns import cost_columns, largest_rate_column, signal_columns
from normfree.studies.study import Cell, Rates, Study
from normfree.training import RECIPES, Recipe

Budget = Literal["toy", "small", "full"]

_BATCH_NORM, _NF = "BatchNorm", "NF"


def define_study(name: str, data: str, budget: Budget) -> Study:
    """Define the study of a name, on `data`: "toy" to see that it runs, "small" for one machine, "full" for a cluster.

    Raises ValueError for a name that is not known.
    """
    if name not in STUDIES:
        raise ValueError(f"no study is called {name!r}{suggest(name, STUDIES)}; there are {', '.join(STUDIES)}")
    return STUDIES[name](_base(data, budget), budget)


# "small" shows about 50,000 images, if a study does not say otherwise.
_EPOCHS = {"digits": 35, "fashion_mnist": 1}


def _base(data: str, budget: Budget) -> Recipe:
    """Make the recipe that all cells vary. At 32 pixels the last stage has one position: statistics run out there."""
    if budget == "full":
        return replace(RECIPES["nf_resnet50"], data=data, test_on="validation", evaluate_every=10)
    epochs = 1 if budget == "toy" else _EPOCHS.get(data.partition(":")[0], 4)
    return replace(
        RECIPES["digits"], model_args=("width=0.5",), data=data, test_on="validation", epochs=epochs, batch=64,
        crop_scale=0.35, flip=data != "digits", warmup_epochs=0.1 * epochs, evaluate_every=epochs, log_every=20,
        keep=1, workers=0,
    )  # fmt: skip


def _rates(budget: Budget) -> Rates | None:
    """Return the learning rates (at a batch of 256) that each cell chooses from; on ImageNet there is the paper's."""
    return Rates(0.8) if budget == "small" else None


def _network(base: Recipe, name: str, *arguments: str, **changes: object) -> Recipe:
    """Give `base` the network of that name and the depth of `base`, where the name or an argument leaves it open."""
    depth = base.model.removeprefix("nf_resnet")
    given = (*base.model_args, *(argument.format(depth) for argument in arguments))
    return replace(base, model=name.format(depth), model_args=given, **changes)  # type: ignore[arg-type]


_SUCCESSORS = {"DyT": "dyt", "Derf": "derf"}
_PAIR = ((_BATCH_NORM, "bn_resnet{}"), (_NF, "nf_resnet{}"))


def _microbatch(base: Recipe, budget: Budget) -> Study:
    cells = [
        Cell(row, column, _network(base, model, cut=cut, accumulate=8))
        for row, model in _PAIR
        for column, cut in (("mixed", "dealt"), ("one class each", "by_class"))
    ]
    return Study(
        "microbatch",
        "The same batches, accumulated from eight parts that are mixed or of one class each: normalizer-free networks "
        "do not notice, BatchNorm fails.",
        "parts", tuple(cells), _rates(budget),
    )  # fmt: skip


def _batch_size(base: Recipe, budget: Budget) -> Study:
    sizes = {"toy": (256, 64), "small": (256, 64, 16, 8, 4, 2, 1), "full": (1024, 256, 64, 32, 16, 8)}[budget]
    cells = [Cell(row, str(size), _network(base, model, batch=size)) for size in sizes for row, model in _PAIR]
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
    if budget == "small":
        base = replace(base, model_args=("width=0.25",))
    cells = [Cell(row, str(d), _network(base, name.format(d))) for d in depths for row, name in rows.items()]
    return Study(
        "depth",
        "Normalizer-free networks keep up with BatchNorm at every depth; the others fall behind or fail.",
        "depth", tuple(cells), _rates(budget),
    )  # fmt: skip


def _budget(base: Recipe, budget: Budget) -> Study:
    families = {
        "EfficientNet": ("timm:efficientnet_b0", "timm:efficientnet_b1", "timm:efficientnet_b2"),
        "RegNetY": ("timm:regnety_004", "timm:regnety_006", "timm:regnety_008"),
        "NF-RegNet": ("nf_regnet_b0", "nf_regnet_b1", "nf_regnet_b2"),
    }
    # Image sizes at which the networks of a level take about the same multiply-accumulates, NF-RegNet not more.
    sizes = {"toy": (32, 32), "small": (56, 48), "full": (224, 192)}[budget]
    if budget == "small":  # EfficientNet takes so many to learn at all; of 60,000 images, fewer
        epochs = max(base.epochs // 2, 1) if base.data.partition(":")[0] in _EPOCHS else 20
        base = replace(base, epochs=epochs, warmup_epochs=0.1 * epochs, evaluate_every=epochs)
    base = (
        replace(RECIPES["nf_regnet_b0"], data=base.data, test_on=base.test_on, ema=0.9999) if budget == "full" else base
    )
    cells = [
        Cell(family, f"B{level}", replace(
            base, model=names[level], model_args=(), drop_rate=0.0 if budget != "full" else None,
            image_size=sizes[family == "NF-RegNet"], test_size=sizes[family == "NF-RegNet"],
        ))
        for level in range(1 if budget == "toy" else 3)
        for family, names in families.items()
    ]  # fmt: skip
    return Study(
        "budget",
        "At equal multiply-accumulates normalizer-free RegNets compete with EfficientNets, and are cheaper in time.",
        "level", tuple(cells), _rates(budget), extra_columns=cost_columns, chart_axes=("macs", "seconds", "memory"),
    )  # fmt: skip


def _ablation(base: Recipe, budget: Budget) -> Study:
    rows = {
        _NF: ("nf_resnet{}", ()),
        "without weight standardization": ("nf_resnet{}_unstandardized", ()),
        "without γ": ("nf_resnet{}", ("gamma=false",)),
        "without β": ("nf_resnet{}", ("beta=false",)),
        "without SkipInit gains": ("nf_resnet{}", ("skip_gain=null",)),
        "without filter gains": ("nf_resnet{}", ("filter_gains=false",)),
        **{f"α = {alpha}": ("nf_resnet{}", (f"alpha={alpha}",)) for alpha in (0.1, 0.5, 1)},
        **{
            f"{name}, not NF": ("normfree.studies.successors:bn_resnet", (f"norm={norm}", "depth={}"))
            for name, norm in _SUCCESSORS.items()
        },
    }
    cells = [
        Cell(row, "accuracy", _network(base, name, *arguments, signal_every=20 if budget == "toy" else 60))
        for row, (name, arguments) in rows.items()
    ]
    return Study(
        "ablation",
        "What each part of the method is worth (α is 0.2 unless it says otherwise), and the signal while it trains.",
        "network", tuple(cells), _rates(budget), extra_columns=signal_columns,
    )  # fmt: skip


def _large_rate(base: Recipe, budget: Budget) -> Study:
    rates = (0.4, 0.8) if budget == "toy" else (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
    rows: dict[str, tuple[str, float]] = {name: (model, 0.0) for name, model in _PAIR}
    rows["NF, adaptive gradient clipping"] = ("nf_resnet{}", 0.01)
    cells = [
        Cell(row, f"{rate:g}", _network(base, model, lr=rate, clip_adaptive=clip))
        for rate in rates
        for row, (model, clip) in rows.items()
    ]
    return Study(
        "large-rate",
        "The largest learning rate that trains: BatchNorm makes large rates possible; adaptive gradient clipping gives "
        "some of that back.",
        "learning rate", tuple(cells), extra_columns=largest_rate_column,
    )  # fmt: skip


def _regularization(base: Recipe, budget: Budget) -> Study:
    none = {"label_smoothing": 0.0, "stochastic_depth_rate": 0.0, "drop_rate": 0.0}
    columns: dict[str, dict[str, float]] = {
        "none": {},
        "stochastic depth": {"stochastic_depth_rate": 0.25},
        "dropout": {"drop_rate": 0.25},
        "label smoothing": {"label_smoothing": 0.1},
    }
    columns["all"] = {name: value for chosen in columns.values() for name, value in chosen.items()}
    cells = [
        Cell(row, column, _network(base, model, **none | changes))
        for column, changes in columns.items()
        for row, model in _PAIR
    ]
    return Study(
        "regularization",
        "BatchNorm regularizes by itself; normalizer-free networks need it to be explicit.",
        "regularization", tuple(cells), _rates(budget),
    )  # fmt: skip


def _convert(base: Recipe, budget: Budget) -> Study:
    networks = {
        "ResNet-20": ("normfree.studies.cifar_resnets:CifarResNet", ("depth=20", "width=8")),
        "ResNet-56": ("normfree.studies.cifar_resnets:CifarResNet", ("depth=56", "width=8")),
        "timm's ResNet-18": ("normfree.studies.cifar_resnets:timm_resnet18", ("width=16",)),
    }
    # A step of one image takes nearly as long as one of eight: fewer of them, for all networks alike.
    epochs = 2 * base.epochs
    few: dict[str, Any] = {}
    longer_few: dict[str, Any] = {"epochs": epochs, "warmup_epochs": 0.1 * epochs, "evaluate_every": epochs}
    longer = {**longer_few, "train_images": None}
    if budget == "small" and base.data.startswith("fashion_mnist"):
        base = replace(base, train_images=30000)
        few, longer_few = {"train_images": 5000}, {"train_images": 20000}
    columns: dict[str, dict[str, Any]] = {
        "batch 64": {}, "batch 64, longer": longer, "batch 2": {"batch": 2, **few},
        "batch 2, longer": {"batch": 2, **longer_few}, "batch 1": {"batch": 1, **few},
        "8 mixed parts": {"cut": "dealt", "accumulate": 8},
        "8 parts of one class": {"cut": "by_class", "accumulate": 8},
    }  # fmt: skip
    kinds: dict[str, tuple[tuple[str, ...], bool]] = {
        _BATCH_NORM: ((), False), "converted": ((), True), "without either": (("norm=none",), False),
        **{name: ((f"norm={norm}",), False) for name, norm in _SUCCESSORS.items()},
    }  # fmt: skip
    if budget == "full":
        networks = {"torchvision's ResNet-50": ("torchvision:resnet50", ())}
        kinds = {name: kinds[name] for name in (_BATCH_NORM, "converted")}  # which torchvision can build
    if budget == "toy":
        base, networks = replace(base, train_images=480), {"ResNet-20": networks["ResNet-20"]}
    if budget != "small":
        for name in ("batch 64, longer", "batch 2", "batch 2, longer", "batch 1"):
            del columns[name]
    # What all are compared on, and what those that need no batch are; how batches are cut, by one network alone.
    plain, of_successors = next(iter(columns)), {"batch 64", "batch 2", "batch 1"}
    cells = [
        Cell(f"{network}, {kind}", column, replace(
            base, model=model, model_args=(*arguments, *more), convert=converted, **changes,
        ))
        for network, (model, arguments) in networks.items()
        for kind, (more, converted) in kinds.items()
        for column, changes in columns.items()
        if column == plain
        or (kind in _SUCCESSORS and column in of_successors)
        or (kind in (_BATCH_NORM, "converted") and ("cut" not in changes or network == next(iter(networks))))
    ]  # fmt: skip
    return Study(
        "convert",
        "A converted network trains as well as with BatchNorm, and where BatchNorm does not: on small batches, and on "
        "parts of one class.",
        "batches", tuple(cells), _rates(budget),
    )  # fmt: skip


def _finetune(base: Recipe, budget: Budget) -> Study:
    networks = {"MobileNetV2": "mobilenet_v2", "EfficientNet-Lite0": "efficientnet_lite0"}
    kinds: dict[str, dict[str, Any]] = {
        _BATCH_NORM: {},
        "frozen BatchNorm": {"model_args": ("norm=frozen",)},
        "GroupNorm": {"model_args": ("norm=group",)},
        "converted, function kept": {"convert": True, "convert_args": ("keep=function",)},
        "converted, weights kept": {"convert": True},
    }
    sizes = {"toy": (16,), "small": (16, 4, 2, 1), "full": (64, 16, 4, 2, 1)}[budget]
    epochs, size = {"toy": (1, 32), "small": (3, 96), "full": (30, 224)}[budget]
    base = replace(
        base, model_args=(), image_size=size, test_size=size, epochs=epochs, warmup_epochs=0.1 * epochs,
        evaluate_every=epochs, crop_scale=0.5, flip=True, weight_decay=None, drop_rate=0.2, stochastic_depth_rate=None,
        signal_every=0, workers=0, train_images=160 if budget == "toy" else None,
    )  # fmt: skip
    cells = [
        Cell(f"{network}, {kind}", str(batch), replace(
            base, model=f"normfree.studies.pretrained:{factory}", batch=batch, **changes,
        ))
        for network, factory in networks.items()
        for batch in sizes
        for kind, changes in kinds.items()
        if batch != 1 or network == "MobileNetV2"
    ]  # fmt: skip
    return Study(
        "finetune",
        "A pretrained network that is converted with its function kept trains on as with frozen BatchNorm, and on "
        "small batches at least as well as with BatchNorm.",
        "batch", tuple(cells), Rates(0.025, 4.0, by_first_seed=True) if budget != "toy" else None, balanced=True,
    )  # fmt: skip


STUDIES: dict[str, Callable[[Recipe, Budget], Study]] = {
    "microbatch": _microbatch,
    "batch-size": _batch_size,
    "depth": _depth,
    "budget": _budget,
    "ablation": _ablation,
    "large-rate": _large_rate,
    "regularization": _regularization,
    "convert": _convert,
    "finetune": _finetune,
}
"""The studies by name."""
