"""Convert a network that was trained with BatchNorm, and train it on: how much more training does it take?

    pip install 'normfree[train]'
    python examples/finetune_converted.py [--data digits] [--epochs 10] [--then 1 2 5] [--seeds 1] [--out runs/finetune]

A ResNet-20 is trained with BatchNorm, then converted in both ways and trained on, beside a converted network that
begins with new weights. `keep="function"` goes on from what the original computes, at a low rate. `keep="weights"`
begins from its weights alone, as a network of the paper's, at the rate that such a network is trained at.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from normfree.training import RECIPES, Recipe, train
from normfree.training.data.datasets import load

RATES = {"function": 0.02, "weights": 0.1}


def main() -> None:
    """Train as the command line says, and print what was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epochs", type=float, default=10, help="of the original")
    parser.add_argument("--then", type=float, nargs="+", default=[1, 2, 5], help="epochs of the converted network")
    parser.add_argument("--rate", type=float, default=0.4, help="of the original, at a batch of 256")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    options = parser.parse_args()
    data = load(options.data)
    base = replace(
        RECIPES["digits"], model="normfree.studies.cifar_resnets:CifarResNet", model_args=("depth=20", "width=8"),
        data=options.data, batch=64, lr=options.rate,
    )  # fmt: skip

    def accuracy(recipe: Recipe, epochs: float, folder: Path) -> float:
        """After so many epochs, in percent of the test set; a run that has ended is not repeated."""
        whole = math.ceil(epochs)
        images = round(len(data.train) * epochs / whole)
        recipe = replace(recipe, epochs=whole, train_images=images, warmup_epochs=min(0.5, whole / 4))
        result = train(recipe, folder, resume="auto", quiet=True, data=data)
        if result.accuracy is None:
            raise SystemExit("interrupted; the same command goes on")
        return result.accuracy.top1

    for seed in range(options.seeds):
        base, out = replace(base, seed=seed), options.out / f"seed_{seed}"
        reached = accuracy(base, options.epochs, out / "original")
        print(f"seed {seed}: with BatchNorm, {options.epochs:g} epochs: {reached:.1f} %", flush=True)
        for epochs in options.then:
            found = []
            for keep, rate in RATES.items():
                kept = replace(
                    base, convert=True, convert_args=(f"keep={keep}",), lr=rate,
                    initial=str(out / "original" / "model.safetensors"),
                )  # fmt: skip
                found.append(f"{accuracy(kept, epochs, out / f'{keep}_{epochs:g}'):.1f} % (its {keep} kept)")
            new = replace(base, convert=True, lr=RATES["weights"])
            found.append(f"{accuracy(new, epochs, out / f'new_{epochs:g}'):.1f} % (new)")
            print(f"  converted, {epochs:g} epochs: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
