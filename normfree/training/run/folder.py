"""Descriptions in a run's folder: its recipe, the data that its network knows, and its conversion."""

import dataclasses
from pathlib import Path
from typing import Any

from normfree.conversion import Plan
from normfree.files.documents import LARGEST, check_types, document_text, read_document
from normfree.files.whole import read_whole, write_whole
from normfree.training.data.datasets import Data, Description
from normfree.training.recipes import UNBOUND, Recipe

RECIPE, DATA, PLAN = "config.json", "data.json", "plan.json"


def check_free(recipe: Recipe, out: Path, resume: str) -> None:
    """Raise ValueError where `out` is no place for this recipe: no folder, or the run of another one."""
    path = out / RECIPE
    if not path.exists():
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is no folder")
        if list(out.glob("checkpoints/step_*")):
            raise ValueError(f"{out} holds checkpoints, but no {RECIPE} that says of what: choose another folder")
        return
    if resume == "never":
        raise ValueError(f"{out} holds a run already: choose another folder, or --resume auto to go on with it")
    check_recipe(recipe, out)


def check_recipe(recipe: Recipe, holder: Path) -> None:
    """Raise ValueError where the run, or the checkpoint, in `holder` is of another recipe."""
    before = Recipe.from_json(holder / RECIPE)
    changed = [
        f"{f.name} is {getattr(recipe, f.name)!r}, was {getattr(before, f.name)!r}"
        for f in dataclasses.fields(Recipe)
        if f.name not in UNBOUND and getattr(recipe, f.name) != getattr(before, f.name)
    ]
    if changed:
        raise ValueError(f"{holder} is of another recipe ({'; '.join(changed)}): it cannot go on with this one")


def check_data(spec: str, data: Data, out: Path) -> None:
    """Raise ValueError where the run in `out` has been trained on other data."""
    if not list(out.glob("checkpoints/step_*")):
        return
    before, now = _read_description(out), _description(data)
    changed = [
        f"{value} {name.replace('_', ' ')}, but had {before.get(name)}" if isinstance(value, int) else f"other {name}"
        for name, value in now.items()
        if value != before.get(name)
    ]
    if changed:
        raise ValueError(f"{spec} has {'; '.join(changed)} when {out} was begun: the run cannot go on as it began")


def check_plan(plan: Plan | None, out: Path) -> None:
    """Raise ValueError where the run in `out` was converted otherwise, as by an earlier version."""
    if plan is not None and list(out.glob("checkpoints/step_*")) and read_plan(out) != plan:
        raise ValueError(f"{out} was converted otherwise than it would be now: go on with the version that began it")


def write_run(out: Path, recipe: Recipe, data: Data, plan: Plan | None) -> None:
    """Write the descriptions. Raises TrainingError where they cannot be written."""
    texts = {RECIPE: recipe.to_json(), DATA: document_text(_description(data))}
    if plan is not None:
        texts[PLAN] = plan.to_json()
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(out / name, text)


def read_run(run: Path) -> tuple[Recipe, Description]:
    """Read the recipe and the description of the data. Raises ValueError for a folder that lacks them."""
    recipe = Recipe.from_json(run / RECIPE)
    known = _read_description(run)
    try:
        description = Description(*(known[name] for name in ("classes", "mean", "std", "names")))
        check_types(description)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{run} has no {DATA} of a run ({error!r})") from error
    return recipe, description


def read_plan(run: Path) -> Plan:
    """Read the plan of the run's conversion. Raises ValueError for one that is damaged, OSError where it is not."""
    return Plan.from_json(read_whole(run / PLAN, largest=LARGEST), str(run / PLAN))


def _description(data: Data) -> dict[str, Any]:
    return {
        "training_images": len(data.train), "test_images": len(data.test), "classes": data.classes,
        "mean": list(data.mean), "std": list(data.std), "names": list(data.names),
    }  # fmt: skip


def _read_description(run: Path) -> dict[str, Any]:
    try:
        return read_document(run / DATA, "description of a run's data")
    except OSError as error:
        raise ValueError(f"{run} has no {DATA} of a run ({error})") from error
