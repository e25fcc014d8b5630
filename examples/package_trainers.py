"""Train converted networks of other packages by their own trainers and losses, on small data drawn here.

    pip install --no-deps -r docs/packages.txt, and what an import then asks for
    python examples/package_trainers.py [ultralytics] [transformers] [monai] [torchvision]

ultralytics trains its detector for an epoch, and merges layers at the end of that, in predict and in export;
transformers trains one image a batch; MONAI infers by a sliding window; torchvision's detectors take two steps at one
and at two images.
"""

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import normfree


def ultralytics() -> str:
    """Train a YOLO11n for an epoch, predict and export."""
    import cv2
    import numpy as np
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        """Converts the model that it has made."""

        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            """Make and convert it."""
            return normfree.convert(super().get_model(*args, **kwargs), torch.rand(4, 3, 96, 96)).model

    folder, drawn = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for index in range(8):
        image, (x, y) = drawn.integers(0, 80, (96, 96, 3), dtype=np.uint8), map(int, drawn.integers(10, 50, 2))
        boxed = cv2.rectangle(image, (x, y), (x + 30, y + 30), (255, 255, 255), -1)
        cv2.imwrite(str(folder / "images" / f"{index}.png"), boxed)
        (folder / "labels" / f"{index}.txt").write_text(f"0 {(x + 15) / 96} {(y + 15) / 96} {30 / 96} {30 / 96}\n")
    (folder / "data.yaml").write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: box}}\n")
    common = {"imgsz": 96, "device": "cpu", "verbose": False}
    settings = {"model": "yolo11n.yaml", "data": str(folder / "data.yaml"), "epochs": 1, "batch": 2, "workers": 0}
    trainer = Trainer(overrides={**settings, **common, "plots": False, "project": str(folder / "runs")})
    trainer.train()
    trained = YOLO(str(trainer.best))
    results = trained.predict(str(folder / "images" / "0.png"), **common)
    written = trained.export(format="torchscript", imgsz=96, device="cpu")
    return f"trained, {len(results)} image predicted, {Path(written).name} written"


def transformers() -> str:
    """Train a ResNet of transformers' with its Trainer, one image a batch."""
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=3)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 3} for index in range(8)]
    free = normfree.convert(ResNetForImageClassification(config), DataLoader(data, batch_size=8)).model
    arguments = TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=1, num_train_epochs=1, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    loss = Trainer(model=free, args=arguments, train_dataset=data).train().training_loss
    assert math.isfinite(loss)
    return f"trained to a loss of {loss:.2f}"


def monai() -> str:
    """Infer by MONAI's sliding window, on a volume larger than what the network was converted on."""
    from monai.inferers import sliding_window_inference
    from monai.networks.nets import UNet

    volumes = [{"image": torch.randn(1, 32, 32, 32), "label": torch.zeros(1, 32, 32, 32)} for _ in range(4)]
    network = UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2, norm="batch")
    free = normfree.convert(network, DataLoader(volumes, batch_size=2)).model.eval()
    with torch.no_grad():
        out = sliding_window_inference(torch.randn(1, 1, 48, 48, 48), (32, 32, 32), 1, free, overlap=0.25)
    assert bool(out.isfinite().all())
    return f"output {'×'.join(map(str, out.shape))}"


def torchvision() -> str:
    """Take two steps with torchvision's detectors and their losses, at one and two images."""
    from torchvision.models import get_model

    words = []
    for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"):
        model = get_model(name, weights=None, weights_backbone=None, num_classes=3)
        free = normfree.convert(model, [torch.rand(3, 160, 160) for _ in range(2)]).model.train()
        optimizer = torch.optim.SGD(free.parameters(), 1e-4)
        target = {"boxes": torch.tensor([[10.0, 10.0, 80.0, 80.0]]), "labels": torch.tensor([1])}
        for batch in (1, 1, 2, 2):
            losses = free([torch.rand(3, 160, 160) for _ in range(batch)], [target] * batch)
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert bool(loss.isfinite())
        words.append(f"{name} at a loss of {float(loss.detach()):.2f}")
    return ", ".join(words)


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {function.__name__: function for function in (ultralytics, transformers, monai, torchvision)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all by default")
    wanted = parser.parse_args().parts or list(parts)
    if unknown := set(wanted) - parts.keys():
        parser.error(f"no part is called {', '.join(sorted(unknown))}; they are {', '.join(parts)}")
    for name in wanted:
        torch.manual_seed(0)
        print(f"{name}: {parts[name]()}", flush=True)


if __name__ == "__main__":
    main()
