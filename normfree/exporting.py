"""Networks for other runtimes: ONNX, and PyTorch's exported programs."""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normfree.arguments import checked
from normfree.extras import require_extra
from normfree.files.whole import write_whole
from normfree.folding import fold, has_scaled_layers
from normfree.trace.inputs import first_layer, tensors
from normfree.trace.preparation import in_eval_mode, isolated_rng
from normfree.trace.watched import exclusively

Format = Literal["onnx", "pt2"]


@dataclass(frozen=True)
class Exported:
    """Exported file, and how far its outputs are from the network's."""

    path: Path
    difference: float  # largest absolute, over two batch sizes and two image sizes
    largest: float  # absolute value among the network's outputs


@exclusively
@checked
def export(model: nn.Module, path: str | Path, *, to: Format, size: int | tuple[int, int] = 224) -> Exported:
    """Write `model`, folded where it can be, as ONNX or as a program of `torch.export`, once that is run and compared.

    Batch size, height and width are dynamic. The number of channels is the model's first convolution's. Outputs may be
    tensors in dictionaries, tuples and lists; all are compared, and ONNX has them in order. The model stays as it is.

    Args:
        model: Network of images.
        path: File to write.
        to: "onnx", which needs `pip install 'normfree[export]'`, or "pt2".
        size: Height and width, or one number for both, in pixels, of the example that the program is made from.

    Returns:
        The file, and how far its outputs are from the network's.

    Raises:
        ValueError: For another format, for a model without convolutions or that torch.export cannot take, for a program
            whose outputs differ by more than 1e-4 (of the largest output, if that is above 1) and for one that takes no
            other image size, as where the example is so small that a stage has one position; nothing is then written.
        ImportError: Where a package is missing.
        OSError: Where the file cannot be written; the one before is then as it was.
    """
    if to not in ("onnx", "pt2"):
        raise ValueError(f"to is {to!r}; it must be 'onnx' or 'pt2'")
    if to == "onnx":
        require_extra("export", "ONNX")
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    first = first_layer(model, nn.Conv2d)
    if not isinstance(first, nn.Conv2d):
        raise ValueError(f"{type(model).__name__} has no 2-D convolution: the shape of its images is not known")
    model = fold(model) if has_scaled_layers(model) else model
    path = Path(path)
    with isolated_rng(), in_eval_mode(model), torch.no_grad():
        like = first.weight.detach()
        x = like.new_empty(2, first.in_channels, height, width).normal_()
        axes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        program = _exported_program(model, x, axes)
        # In memory, since torch's own writer ends the process where the disk is full; written once it is checked.
        content = _to_pt2(program) if to == "pt2" else _to_onnx(program, len(tensors(model(x))))
        difference, largest = _check(model, _runner(content, to), x)
        write_whole(path, content)
        return Exported(path, difference, largest)


def _exported_program(model: nn.Module, x: Tensor, axes: dict[int, Any]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(model, (x,), dynamic_shapes=(axes,))
    except Exception as error:  # of many kinds, none of which is documented
        raise ValueError(
            f"torch.export cannot take {type(model).__name__} with batch size, height and width that vary: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _to_pt2(program: torch.export.ExportedProgram) -> bytes:
    packed = io.BytesIO()
    torch.export.save(program, packed)
    return packed.getvalue()


def _to_onnx(program: torch.export.ExportedProgram, outputs: int) -> bytes:
    names = ["output"] if outputs == 1 else [f"output_{index}" for index in range(outputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(program, (), dynamo=True, input_names=["images"], output_names=names, verbose=False)
    assert made is not None
    return made.model_proto.SerializeToString()


def _check(model: nn.Module, run: Callable[[Tensor], list[Tensor]], x: Tensor) -> tuple[float, float]:
    """Compare a program's outputs with the network's: the largest difference, and the largest output."""
    difference = largest = 0.0
    height, width = x.shape[-2:]
    for images in (x, x.new_empty(3, x.shape[1], height + 33, width + 18).normal_()):
        expected = tensors(model(images))
        try:
            outputs = run(images)
        except (AssertionError, RuntimeError) as error:  # a guard of the program
            shape = "x".join(map(str, images.shape[-2:]))
            raise ValueError(
                f"nothing written: the program takes no images of {shape}: made from an example of {height}x{width} in "
                f"which a stage may have one position, which then counts as constant; take a larger size ({error})"
            ) from error
        if [tuple(out.shape) for out in outputs] != [tuple(out.shape) for out in expected]:
            raise ValueError(
                f"nothing written: the program gives {len(outputs)} outputs of other shapes than the network"
            )
        for out, other in zip(outputs, expected, strict=True):
            distance = (out.to(other.device) - other).abs().max().item() if out.numel() else 0.0
            difference = distance if math.isnan(distance) else max(difference, distance)
            largest = max(largest, other.abs().max().item() if out.numel() else 0.0)
    if not difference <= 1e-4 * max(1.0, largest):  # nor NaN
        raise ValueError(f"nothing written: the program's outputs differ by {difference:.3g} from the network's")
    return difference, largest


def _runner(content: bytes, to: Format) -> Callable[[Tensor], list[Tensor]]:
    if to == "pt2":
        program = torch.export.load(io.BytesIO(content)).module()
        return lambda images: tensors(program(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]
