"""`normfree export`: a network for another runtime."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from normfree.cli.arguments import Size, height_and_width, network_factory
from normfree.cli.output import Json, announce, check_writable, show_json, working
from normfree.exporting import Format
from normfree.exporting import export as export_model


def export(
    model: Annotated[str, tyro.conf.Positional],
    /,
    *,
    to: Format,
    out: Path | None = None,
    size: Size = (224,),
    json_output: Json = False,
) -> None:
    """Fold a network and write it as ONNX or as an exported PyTorch program; batch and image size stay dynamic.

    The file is run and compared with the network at two batch sizes and two image sizes.

    Args:
        model: The folder of a run or one written by save_pretrained, hub:USER/NAME, or a name with new parameters:
            nf_resnet50, timm:NAME, torchvision:NAME, package.module:factory.
        to: Format of the file.
        out: File to write, by default MODEL.onnx or MODEL.pt2 in the current folder.
        size: Height and width, or one number for both, of the example that the program is made from.
        json_output: Print the result as JSON.
    """
    path = out or Path(f"{Path(model).name.replace(':', '_').replace('/', '_')}.{to}")
    check_writable(path, [f".{to}"])
    with working(f"exporting {model}"):
        result = export_model(network_factory(model)(), path, to=to, size=height_and_width(size) or 224)
    if json_output:
        show_json(asdict(result))
        return
    print(f"largest difference {result.difference:.2g}, of outputs up to {result.largest:.3g}")
    announce([result.path])
