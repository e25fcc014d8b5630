"""Federated averaging on clients that are mixed or sorted: BatchNorm, GroupNorm, converted.

    python -m normfree.studies.federated --out docs/results/federated-digits [--seeds 3]

Ten clients share the training digits, drawn at random or sorted by class. In each of twenty rounds every client trains
the common network on its own images for an epoch; then their parameters are averaged (McMahan et al. 2017). BatchNorm's
statistics are no parameters: a row averages them too, another keeps those of the server, which never trains.
"""

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.conversion import convert
from normfree.errors import NotFiniteError
from normfree.studies.cifar_resnets import CifarResNet
from normfree.studies.in_memory import InMemory
from normfree.studies.runner import run_cells
from normfree.studies.study import Cell, Rates, Study
from normfree.training.data.datasets import load

CLIENTS, BATCH = 10, 16
PARAMETERS_ONLY = "BatchNorm, parameters averaged"
KINDS = (PARAMETERS_ONLY, "BatchNorm, statistics averaged too", "GroupNorm", "converted")


@dataclass(frozen=True)
class Federation:
    """Everything that decides how a network is trained."""

    kind: str  # one of KINDS
    clients: str  # mixed or sorted
    rounds: int
    lr: float  # of SGD with momentum 0.9, on each client
    seed: int = 0


def make_network(federation: Federation, images: Tensor) -> nn.Module:
    """Make a ResNet-20 of the federation's kind; a conversion sets its signal on the images, (N, 1, H, W)."""
    torch.manual_seed(federation.seed)
    norm = "group" if federation.kind == "GroupNorm" else "batch"
    network = CifarResNet(20, 8, norm, in_channels=1)
    return convert(network, images).model if federation.kind == "converted" else network


def split(labels: Tensor, clients: str, seed: int) -> list[Tensor]:
    """Return the indices of each client's images: of all classes, or of one or two."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if clients == "sorted":
        order = order[labels[order].argsort(stable=True)]
    return list(order.tensor_split(CLIENTS))


def average(states: Sequence[Mapping[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Average tensors, weighted by the clients' sizes; integers are the first client's."""
    shares = [size / sum(sizes) for size in sizes]
    return {
        name: sum((s[name] * share for s, share in zip(states, shares, strict=True)), torch.zeros_like(first))
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }


def federate(federation: Federation, images: Tensor, labels: Tensor) -> nn.Module:
    """Train for all rounds; return the server's network in eval mode. Raises NotFiniteError for a loss that is not."""
    server = make_network(federation, images[:64])
    parts = split(labels, federation.clients, federation.seed)
    for number in range(federation.rounds):
        lr = federation.lr * 0.5 * (1 + math.cos(math.pi * number / federation.rounds))
        states = []
        for client, part in enumerate(parts):
            network = copy.deepcopy(server).train()
            _train(network, images[part], labels[part], lr, (federation.seed * 1000 + number) * CLIENTS + client)
            state = dict(network.named_parameters() if federation.kind == PARAMETERS_ONLY else network.state_dict())
            states.append({name: tensor.detach() for name, tensor in state.items()})
        server.load_state_dict(average(states, list(map(len, parts))), strict=False)
    return server.eval()


def _train(network: nn.Module, images: Tensor, labels: Tensor, lr: float, seed: int) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for chosen in order.split(BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[chosen]), labels[chosen])
        if not loss.isfinite():
            raise NotFiniteError("the loss of a client is not finite")
        loss.backward()
        optimizer.step()


class Federations(InMemory):
    """Trainings and tests on one data set."""

    def make(self, recipe: Federation) -> nn.Module:
        """Make the network, new."""
        return make_network(recipe, self.training[0][:64])

    def fit(self, recipe: Federation) -> nn.Module:
        """Train it."""
        return federate(recipe, *self.training)


def define(rounds: int) -> Study:
    """Define the table: normalizers as rows, kinds of clients as columns."""
    cells = [
        Cell(kind, clients, Federation(kind, clients, rounds, 0.05))
        for clients in ("mixed", "sorted")
        for kind in KINDS
    ]
    return Study(
        "federated",
        "On sorted clients the statistics of BatchNorm are those of none of the others; a converted network has none.",
        "clients", tuple(cells), Rates(0.05),
    )  # fmt: skip


def main() -> None:
    """Train and test what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=(), help="rows and columns")
    options = parser.parse_args()
    work = Federations(options.out, load("digits"))
    run_cells(define(options.rounds), options.out, work, seeds=options.seeds, only=options.only, on_message=print)


if __name__ == "__main__":
    main()
