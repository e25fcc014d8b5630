"""Convert a network that was trained with BatchNorm, and train it on: what is kept of what it has learned?

    pip install 'normfree[train]'
    python examples/finetune_converted.py [--data digits] [--epochs 10] [--then 1 3] [--out runs/finetune]

Its weights are kept, its function is not: the printed table says how much of the original's training it takes to be
where that was, beside a converted network that begins with new weights.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from normfree.training import RECIPES, Recipe, train


def accuracy(recipe: Recipe, folder: Path) -> float:
    """Of a run, in percent of the test set; one that has ended is not repeated."""
    result = train(recipe, folder, resume="auto", quiet=True)
    if result.accuracy is None:
        raise SystemExit("interrupted; the same command goes on")
    return result.accuracy.top1


def main() -> None:
    """Train as the command line says, and print what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=int, default=10, help="of the original")
    parser.add_argument("--then", type=int, nargs="+", default=[1, 3], help="epochs of the converted network")
    parser.add_argument("--rate", type=float, default=0.4, help="learning rate at a batch of 256, with BatchNorm")
    parser.add_argument("--converted-rate", type=float, default=0.4)
    parser.add_argument("--alpha", type=float, default=0.2, help="what branches are multiplied by")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    options = parser.parse_args()
    base = replace(
        RECIPES["digits"], model="normfree.studies.small_resnets:CifarResNet", model_args=("depth=20", "width=8"),
        data=options.data, batch=64, lr=options.rate,
    )  # fmt: skip
    for seed in range(options.seeds):
        base, out = replace(base, seed=seed), options.out / f"seed_{seed}"
        original = accuracy(replace(base, epochs=options.epochs), out / "original")
        print(f"seed {seed}: with BatchNorm, {options.epochs} epochs: {original:.1f} %", flush=True)
        for epochs in options.then:
            new = replace(
                base, convert=True, convert_args=(f"alpha={options.alpha}",), lr=options.converted_rate, epochs=epochs,
                warmup_epochs=min(base.warmup_epochs, epochs / 4),
            )  # fmt: skip
            kept = replace(new, initial=str(out / "original" / "model.safetensors"))
            reached = accuracy(kept, out / f"converted_{epochs}"), accuracy(new, out / f"new_{epochs}")
            print(f"  converted, {epochs} more: {reached[0]:.1f} %; from new weights: {reached[1]:.1f} %", flush=True)


if __name__ == "__main__":
    main()
