"""`normfree train`: train a recipe; `normfree eval`: test what was trained."""

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from normfree.cli.output import Json, first_process, progress, show_json, show_table

_USAGE = """Train a network as a recipe says, into a folder, as in: normfree train digits --out runs/first

RECIPE is a name from `normfree train --list`, or `--from FILE` with the config.json of a run.

Every field of the recipe is an option; the defaults below are those of {name}."""


def train(
    arguments: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE ...")] = (), /
) -> None:
    """Train a network as a recipe says: `normfree train digits --out runs/first`.

    `normfree train --list` shows the recipes, `normfree train RECIPE --help` their fields.

    Args:
        arguments: Name of a recipe, and its fields as options, such as --epochs 3.
    """
    train_command(list(arguments))


def train_command(arguments: list[str]) -> None:
    """Run `normfree train …`: the fields' defaults depend on the recipe, so the recipe is read first."""
    from normfree.training import Recipe, recipe

    if arguments[:1] == ["--list"] and arguments[1:] in ([], ["--json"]):
        _list_recipes(json_output=arguments[1:] == ["--json"])
        return
    if not arguments:
        _list_recipes(json_output=False)
        raise ValueError("name a recipe, as in: normfree train digits (normfree train RECIPE --help shows its options)")
    if arguments[0] in ("--help", "-h"):
        tyro.cli(
            _command(recipe("digits"), Path("runs/RECIPE")), args=["--help"], prog="normfree train RECIPE",
            description=_USAGE.format(name="digits"),
        )  # fmt: skip
    if arguments[0].startswith("--from="):
        arguments = ["--from", arguments[0].removeprefix("--from="), *arguments[1:]]
    if arguments[0] == "--from":
        if len(arguments) < 2:
            raise ValueError("--from needs the config.json of a run")
        name, default, rest = "--from FILE", Recipe.from_json(arguments[1]), arguments[2:]
    elif arguments[0].startswith("-"):
        raise ValueError(f"the recipe comes first, as in: normfree train digits {' '.join(arguments)}")
    else:
        name, default, rest = arguments[0], recipe(arguments[0]), arguments[1:]
    command = _command(default, Path("runs") / name.strip("-").split()[0])
    tyro.cli(command, args=rest, prog=f"normfree train {name}", description=_USAGE.format(name=name))


def _command(default: Any, folder: Path) -> Callable[..., None]:
    from normfree.training import Recipe
    from normfree.training import train as run

    def command(
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = default,
        *,
        out: Path = folder,
        resume: Literal["never", "auto"] = "never",
        quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
        json_output: Json = False,
    ) -> None:
        """Train into a folder: config.json, metrics.csv, checkpoints/, and at the end the weights and curves.png.

        Args:
            recipe: Everything that decides how the network is trained.
            out: Folder of the run.
            resume: "auto" goes on after the newest checkpoint in the folder, or begins.
            quiet: Print nothing but the result.
            json_output: Print the result as JSON.
        """
        result = run(recipe, out, resume=resume, quiet=quiet)
        if first_process():
            if json_output:
                show_json(asdict(result))
            else:
                _show(result)

    return command


def _list_recipes(*, json_output: bool) -> None:
    from normfree.training import RECIPES

    if json_output:
        show_json({name: asdict(recipe) for name, recipe in RECIPES.items()})
        return
    show_table(
        ("recipe", "model", "data", "epochs", "batch"),
        [(name, r.model, r.data, str(r.epochs), str(r.batch)) for name, r in RECIPES.items()],
    )
    sys.stdout.flush()


def _show(result: Any) -> None:
    if not result.finished:
        print(f"interrupted after step {result.step}: --resume auto goes on")
    elif result.accuracy is not None:
        show_table(
            ("run", "steps", "loss", "top-1 %", "top-5 %", "best top-1 %"),
            [(str(result.out), str(result.step), f"{result.accuracy.loss:.4f}", f"{result.accuracy.top1:.2f}",
              f"{result.accuracy.top5:.2f}", f"{result.best:.2f}")],
        )  # fmt: skip


def evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    data: str | None = None,
    weights: Path | None = None,
    trusted_model: str | None = None,
    json_output: Json = False,
) -> None:
    """Test a trained network.

    Args:
        run: Folder of a run, or of one of its checkpoints.
        data: Another data set than the run's, with the same classes.
        weights: Another .safetensors file than the run's averaged weights or, where there are none, its last.
        trusted_model: The run's model again, where that is a function of a package, which is imported and called.
        json_output: Print the result as JSON.
    """
    from normfree.training import evaluate_run

    with progress() as bar:
        task = bar.add_task("testing", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        found = evaluate_run(run, data=data, weights=weights, trusted_model=trusted_model, advance=advance)
    if not first_process():
        return
    if json_output:
        show_json({"run": run, **asdict(found)})
        return
    show_table(
        ("run", "images", "loss", "top-1 %", "top-5 %", "balanced %"),
        [
            (
                str(run),
                str(found.examples),
                f"{found.loss:.4f}",
                f"{found.top1:.2f}",
                f"{found.top5:.2f}",
                f"{found.balanced:.2f}",
            )
        ],
    )
