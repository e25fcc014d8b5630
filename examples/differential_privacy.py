"""Train a converted ResNet-18 with differential privacy: DP-SGD needs a gradient per example, which BatchNorm has not.

    pip install 'normfree[train,privacy]'
    python examples/differential_privacy.py [--epochs 1] [--noise 0.8] [--images 1438]

On the digits that scikit-learn ships, as RGB images of 32 pixels. `ModuleValidator` refuses the original and finds no
error in the converted network; the privacy that an epoch costs is printed as ε at δ = 1e-4.
"""

import argparse
import warnings

import torch
import torch.nn.functional as F
import torchvision
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normfree
from normfree.privacy import per_sample_gradients


def digits(count: int) -> tuple[TensorDataset, TensorDataset]:
    """The first `count` training images, and the test images, (N, 3, 32, 32), with labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16 - 0.305
    images = F.interpolate(images, 32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(data.target)
    test = torch.arange(len(images)) % 5 == 4
    return TensorDataset(images[~test][:count], labels[~test][:count]), TensorDataset(images[test], labels[test])


def private_network() -> nn.Module:
    """Make torchvision's ResNet-18 for small images, without BatchNorm, its scales set on noise, not on the images."""
    network = torchvision.models.resnet18(num_classes=10)
    network.maxpool = nn.Identity()
    print(f"the original: {len(ModuleValidator.validate(network))} errors")
    converted = normfree.convert(network, torch.randn(64, 3, 32, 32)).model
    print(f"converted: {len(ModuleValidator.validate(converted))} errors")
    return converted


def train(count: int, epochs: int, batch: int, rate: float, noise: float) -> float:
    """Accuracy on the test images, in percent."""
    training, test = digits(count)
    network = private_network()
    engine = PrivacyEngine()
    network, optimizer, loader = engine.make_private(
        module=per_sample_gradients(network.train()),
        optimizer=torch.optim.SGD(normfree.param_groups(network, weight_decay=0.0), rate, momentum=0.9),
        data_loader=DataLoader(training, batch_size=batch, shuffle=True),
        noise_multiplier=noise,
        max_grad_norm=1.0,
    )
    for epoch in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: ε = {engine.get_epsilon(delta=1e-4):.2f}")
    network.eval()
    with torch.no_grad():
        right = network(test.tensors[0]).argmax(1) == test.tensors[1]
    return 100 * right.float().mean().item()


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1438)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--noise", type=float, default=0.8, help="standard deviation, over the gradient's norm")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of opacus: that its random numbers are not those of a cryptographer
    torch.manual_seed(0)
    accuracy = train(options.images, options.epochs, options.batch, options.rate, options.noise)
    print(f"test accuracy {accuracy:.1f} %")


if __name__ == "__main__":
    main()
