"""`normfree sweep`: the signal of a network over widths, depths or any argument."""

import functools
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from normfree.cli.arguments import Input, Size, height_and_width, image_function
from normfree.cli.output import Json, announce, check_writable, show_json
from normfree.signal import sweep as measure
from normfree.sources import model_factory


def sweep(
    model: Annotated[str, tyro.conf.Positional],
    /,
    *,
    over: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE,VALUE,...", help_behavior_hint="")],
    input: Input = "noise",
    batch: int = 16,
    size: Size = (),
    optimizer: Literal["adam", "adamw", "sgd"] = "adam",
    lr: float = 1e-3,
    steps: int = 1,
    seeds: int = 3,
    processes: int = 0,
    table: Annotated[Path | None, tyro.conf.arg(metavar="FILE.csv")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.html|.png|.svg|.csv|.json")] = None,
    json_output: Json = False,
) -> None:
    """Signal at initialisation and after some steps, over the values of an argument, with the slope of each layer.

    Args:
        model: nf_resnet50 (ours), timm:NAME, torchvision:NAME or package.module:factory; arguments go to the factory.
        over: An argument and its values, such as width=0.25,0.5,1; batch and lr are those of this command. Slopes are
            over the first argument.
        input: White noise, crops of two real photographs, or images of a folder.
        batch: Number of examples.
        size: Height and width, or one number for both; the model's own if not given.
        optimizer: What takes the steps, on the cross-entropy with one batch.
        lr: Its learning rate.
        steps: How many; 0 for the signal at initialisation alone.
        seeds: Networks at each value.
        processes: That measure at once; 0 for none but this one.
        table: File that grows by each network; what it holds is not measured again.
        out: Also write a figure, or the numbers.
        json_output: Print slopes and verdicts as JSON.
    """
    if out is not None:
        check_writable(out, (".html", ".png", ".svg", ".csv", ".json"))
    if table is not None:
        check_writable(table, (".csv",))
    report = measure(
        model_factory(model),
        dict(map(_values, over)),
        data=functools.partial(_examples, source=input, image_size=height_and_width(size), batch=batch),
        optimizer=functools.partial(_optimizer, rule=optimizer, lr=lr),
        steps=steps,
        seeds=seeds,
        processes=processes,
        path=table,
    )
    if json_output:
        slopes = [vars(slope) for slope in report.slopes]
        show_json({"model": report.model, "slopes": slopes, "verdicts": report.verdicts})
    else:
        print(report)
    if out is not None:
        report.save(out)
        if not json_output:
            announce([out])


def _values(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not (name.isidentifier() and equals and values):
        raise ValueError(f"--over {text}: give an argument and its values, such as width=0.25,0.5,1")
    return name, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _examples(
    model: nn.Module, batch: int, *, source: str, image_size: tuple[int, int] | None
) -> tuple[Tensor, Tensor | None]:
    return image_function(source, batch, image_size)(model), None


def _optimizer(model: nn.Module, lr: float, *, rule: str) -> torch.optim.Optimizer:
    makers: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer: torch.optim.Optimizer = makers[rule](model.parameters(), lr)
    return optimizer
