"""The file of a conversion: the tensors, and the plan by which another network of the class is converted again."""

from pathlib import Path

from torch import nn

from normfree.arguments import checked
from normfree.conversion.plan import Plan
from normfree.conversion.replacement import apply_plan
from normfree.files.tensors import load_state, read_tensors, write_tensors

_PLAN = "normfree_plan"


def save(model: nn.Module, plan: Plan, path: Path) -> Path:
    """Write the file.

    Raises ValueError for another suffix than .safetensors, OSError where it cannot be written; the file before is then
    as it was.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot write {path}: the suffix must be .safetensors")
    write_tensors(path, model.state_dict(), {_PLAN: plan.to_json()})
    return path


@checked
def load_converted(model: nn.Module, path: str | Path) -> nn.Module:
    """Convert `model` again as `Conversion.save` wrote it; in place.

    Args:
        model: Fresh network of the class that was converted.
        path: File that `Conversion.save` has written.

    Returns:
        The model, with the saved tensors.

    Raises:
        ValueError: For a file that is no conversion, of another network, cut off, or not what was written.
        FileNotFoundError: Where there is no file.
        OSError: Where it cannot be read.
    """
    tensors, described = read_tensors(path)
    if _PLAN not in described:
        raise ValueError(f"{path} is no conversion: it has tensors, but no plan")
    plan = Plan.from_json(described[_PLAN], str(path))
    try:
        for name, parameter in model.named_parameters():
            here, there = tuple(parameter.shape), tuple(tensors[name].shape) if name in tensors else None
            if there not in (None, here):
                raise ValueError(f"{name} is {there} there and {here} here")
        apply_plan(plan, model)
        load_state(model, tensors)
    except Exception as error:  # of a plan that does not fit
        raise ValueError(f"{path} is no conversion of a {type(model).__name__} ({error})") from error
    return model
