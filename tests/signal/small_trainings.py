"""Trainings of a few steps, watched by a monitor."""

import torch
from torch import nn

from normfree.signal import SignalMonitor


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return x + 0.5 * self.act(self.inner(x))


def trained(monitor_of, *, steps=3, optimizer_of=None, loss_of=None, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(), nn.Flatten(), nn.Linear(256, 2))
    optimizer = (optimizer_of or (lambda parameters: torch.optim.SGD(parameters, 0.1)))(model.parameters())
    x = torch.randn(4, 3, 8, 8)
    with monitor_of(model, optimizer) as monitor:
        for _ in range(steps):
            (loss_of or (lambda out: out.square().mean()))(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, x, monitor


def everything(model, optimizer):
    return SignalMonitor(model, every=1, statistics="all", optimizer=optimizer)
