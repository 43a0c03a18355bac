"""A network that counts as hooks come and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmprecond.optimizers import PreconditionedOptimizer

HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 3)
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv(x)
        out = self.fc(self.relu(self.norm(conv)).mean((2, 3)))
        self.outputs = [conv, out]
        return out


def images(step: int = 0) -> Tensor:
    return torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int = 0, factor: float = 1.0) -> None:
    (factor * (model(images(step)) ** 2).mean()).backward()


def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def hooks_of(model: nn.Module) -> int:
    """Hooks on all modules and parameters."""
    count = sum(len(getattr(m, name)) for m in model.modules() for name in HOOKS)
    for p in model.parameters():
        count += len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
    return count


#: Methods of a tensor that wait for its device.
WAITING = {
    'item',
    'tolist',
    'cpu',
    'numpy',
    'nonzero',
    'equal',
    'unique',
    '__bool__',
    '__float__',
    '__int__',
    '__index__',
}


class Waits(TorchFunctionMode):
    """Notes every call that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__name__', '') in WAITING:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))
