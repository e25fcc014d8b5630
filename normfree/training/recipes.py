"""Recipes: every choice of a training in one frozen dataclass, and the paper's choices by name."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from normfree.arguments import checked
from normfree.errors import suggest
from normfree.files.documents import check_types, document_text, from_values, read_document

FORMAT = 1
"""Number of config.json's format; it grows when a field changes its meaning."""

MOVED_FACTORIES = {
    f"normfree.studies.small_resnets:{name}": f"normfree.studies.cifar_resnets:{name}"
    for name in ("CifarResNet", "timm_resnet18")
}
"""Models that were given another name after runs had been made of them: old name -> name."""

Precision = Literal["no", "bf16", "fp16", "double"]
TestOn = Literal["test", "validation"]
Cut = Literal["shuffled", "by_class", "dealt"]
OnNonfinite = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides how a network is trained. A value that cannot be raises ValueError."""

    model: str  # as on the command line: nf_resnet50 (ours), timm:NAME, torchvision:NAME, package.module:factory
    model_args: tuple[str, ...] = ()  # arguments of the model, such as width=0.5
    initial: str = ""  # weights to begin with, before a conversion: another run's .safetensors, or a .pth; "": new
    convert: bool = False  # first replace the model's normalizers, its signal set on training images
    convert_args: tuple[str, ...] = ()  # arguments of the conversion, such as alpha=1 or keep=function
    data: str  # digits, fashion_mnist, instances:PATH, wds/NAME:PATH, imagefolder:PATH, torch/NAME:PATH or hfds/…
    test_on: TestOn = "test"  # "validation": images to choose by, held out of training where the data has none for it
    train_images: int | None = None  # how many of the training images, evenly spaced; None: all
    image_size: int | None = None  # pixels; None: the model's own
    test_size: int | None = None  # pixels of test images; None: the model's own, or those of training
    epochs: int = 90  # passes over the training images
    batch: int = 256  # of one optimizer step, over all processes and accumulated parts
    accumulate: int = 1  # parts that each process's share of a batch is cut into
    cut: Cut = "shuffled"  # "by_class": parts of one class each (sorted shards); "dealt": the same batches, parts mixed
    optimizer: str = "sgd"  # of timm; "sgd" is Nesterov's
    momentum: float = 0.9  # of optimizers that have one
    lr: float = 0.1  # peak learning rate at a batch of 256; it is scaled linearly with the batch
    warmup_epochs: float = 5.0  # linear, from 0; after it a cosine to 0
    weight_decay: float | None = None  # without gains, biases and skip gains; None: the model's own, or 5e-5
    label_smoothing: float = 0.1  # share of a label's weight that all classes get
    stochastic_depth_rate: float | None = None  # None: the model's own
    drop_rate: float | None = None  # dropout before the classifier; None: the model's own
    crop_scale: float = 0.08  # least area of a training crop, as a fraction of the image's; 1: the whole image
    flip: bool = True  # mirror half of the training images
    auto_augment: str = ""  # of timm, such as rand-m9-mstd0.5
    mixup: float = 0.0  # α of the Beta distribution of mixed images; 0: none
    cutmix: float = 0.0  # α of the Beta distribution of pasted parts; 0: none
    ema: float = 0.0  # decay of an exponential moving average of the parameters; 0: none
    clip_adaptive: float = 0.0  # adaptive gradient clipping (as NFNets'), without the classifier; 0: none
    clip_norm: float = 0.0  # global gradient norm; 0: not clipped
    precision: Precision = "no"  # mixed precision, or float64 throughout
    channels_last: bool = False
    seed: int = 0
    workers: int = 2  # processes that load images
    evaluate_every: int = 1  # epochs
    checkpoint_every: int = 0  # optimizer steps; 0: at the end of every epoch only
    keep: int = 2  # newest checkpoints that are kept, besides the best
    log_every: int = 10  # optimizer steps
    log: tuple[Literal["csv", "tensorboard", "wandb", "trackio"], ...] = ()  # metrics.csv is always written
    signal_every: int = 0  # optimizer steps between measurements of the signal; 0: none
    on_nonfinite: OnNonfinite = "stop"  # what a loss or gradient that is not finite does
    max_unreadable: int = 100  # images that cannot be read before the training stops

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**63:  # nor NaN
                raise ValueError(f"{name} is {value}; it must be at least {least}, and finite")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; it must be in (0, 1]")
        if self.clip_adaptive and self.clip_norm:
            raise ValueError("clip_adaptive and clip_norm are both given; choose one")
        self._check_arguments()

    def _check_arguments(self) -> None:
        for name in ("model_args", "convert_args"):
            for argument in getattr(self, name):
                if not argument.partition("=")[0].isidentifier() or "=" not in argument:
                    raise ValueError(f"{name} has {argument!r}; it must be of the form name=value")
        if self.convert_args and not self.convert:
            raise ValueError("convert_args are given, but convert is not")

    @property
    def peak_lr(self) -> float:
        """The learning rate at this batch, by the linear rule."""
        return self.lr * self.batch / 256

    def to_json(self) -> str:
        """Write the recipe as the text of a file that `from_json` reads."""
        return document_text(dataclasses.asdict(self), format=FORMAT)

    @classmethod
    def from_json(cls, path: str | Path) -> "Recipe":
        """Read the recipe of a config.json; fields that it lacks have their defaults.

        Raises ValueError for another file or format and for one that is not what was written, OSError where unreadable.
        """
        values = read_document(Path(path), "recipe", format=FORMAT)
        try:
            recipe = from_values(cls, values)
        except ValueError as error:
            raise ValueError(f"{path} is no recipe: {error}") from error
        return replace(recipe, model=MOVED_FACTORIES.get(recipe.model, recipe.model))


_LEAST = {
    "train_images": 1, "image_size": 1, "test_size": 1, "epochs": 1, "batch": 1, "accumulate": 1,
    "lr": 0, "momentum": 0, "warmup_epochs": 0, "weight_decay": 0, "mixup": 0, "cutmix": 0, "clip_adaptive": 0,
    "clip_norm": 0, "seed": 0, "workers": 0, "evaluate_every": 1, "checkpoint_every": 0, "keep": 1, "log_every": 1,
    "signal_every": 0, "max_unreadable": 0,
}  # fmt: skip

# Fields that may differ when a run is taken up again, since the result of a normalizer-free network does not depend on
# them. One exception: `accumulate` changes what dropout draws, and the order of batches that are cut by class.
UNBOUND = (
    "accumulate", "workers", "evaluate_every", "checkpoint_every", "keep", "log_every", "log", "signal_every",
    "on_nonfinite", "max_unreadable",
)  # fmt: skip


_IMAGENET = "imagefolder:imagenet"
_RESNET = Recipe(model="nf_resnet50", data=_IMAGENET)
# The paper's appendix: batch 1024 and rate 0.4, which the linear rule makes of 0.1; weight decay is the variant's.
_REGNET = Recipe(
    model="nf_regnet_b0", data=_IMAGENET, epochs=360, batch=1024, ema=0.99999, mixup=0.2, cutmix=1.0,
    auto_augment="rand-m9-mstd0.5",
)  # fmt: skip
_NFNET = replace(_REGNET, batch=4096, clip_adaptive=0.01)
# Gains that start at 0 keep the branches closed for most of three epochs; without them 97 % are reached, not 30 to 80.
_DIGITS = Recipe(
    model="nf_resnet26", model_args=("width=0.5", "skip_gain=null"), data="digits", image_size=32, test_size=32,
    epochs=3, batch=16, lr=0.4, warmup_epochs=0.5, crop_scale=0.7, flip=False, stochastic_depth_rate=0.0, workers=0,
)  # fmt: skip
_FASHION_MNIST = replace(
    _DIGITS, model_args=("width=0.5",), data="fashion_mnist", epochs=10, batch=64, crop_scale=0.5, flip=True, workers=2
)

RECIPES: dict[str, Recipe] = {
    "digits": _DIGITS,
    "fashion_mnist": _FASHION_MNIST,
    **{
        f"nf_resnet{depth}": replace(_RESNET, model=f"nf_resnet{depth}", drop_rate=0.25 if depth > 50 else 0.0)
        for depth in (50, 101, 152, 200, 288)
    },
    **{f"nf_regnet_b{level}": replace(_REGNET, model=f"nf_regnet_b{level}") for level in range(6)},
    **{f"nfnet_f{level}": replace(_NFNET, model=f"nfnet_f{level}") for level in range(7)},
}
"""The recipes by name. "digits" needs no download; the networks' are the paper's, for ImageNet."""


@checked
def recipe(name: str) -> Recipe:
    """The recipe of a name. Raises ValueError for one that is not known, with near misses."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}{suggest(name, RECIPES)} (`normfree train --list`)")
    return RECIPES[name]


def parse_arguments(arguments: Iterable[str]) -> dict[str, Any]:
    """Read arguments of the form name=value."""
    return {name: _parse(text) for name, _, text in (argument.partition("=") for argument in arguments)}


def _parse(text: str) -> Any:
    """Read a number, true, false, null or a list as JSON writes them; else return the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
