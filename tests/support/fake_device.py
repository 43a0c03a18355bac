"""A plain step on a GPU that is not there: fake tensors, counted operations, no waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmprecond.linalg import named_tensors
from mmprecond.optimizers import PreconditionedOptimizer

#: Operations that launch nothing: allocations, and what asks for types.
SILENT = ('new_empty', 'empty', 'empty_like', 'promote_types', 'detach', 'alias', '_unsafe_view')


class Launches(TorchDispatchMode):
    """Counts operations that launch kernels; raises where tensors of two devices meet.

    Numbers (0-dimensional tensors on the CPU) may meet any device. A fake tensor raises by itself
    where its value is read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.dim() or t.device.type != 'cpu'}
        name = function.overloadpacket.__name__
        if len(devices) > 1:
            raise AssertionError(f'{name} takes tensors from one device to another')
        if not function.is_view and name not in SILENT and function.namespace == 'aten':
            self.seen[name] += 1
        return result


def to_fake_device(model: nn.Module) -> nn.Module:
    """Replaces parameters and buffers by fake ones on a GPU; called in a `FakeTensorMode`."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(p.shape, device='cuda', dtype=p.dtype), p.requires_grad)
            setattr(module, name, fake)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device='cuda', dtype=buffer.dtype))
    return model


def load_operators(optimizer: PreconditionedOptimizer, step: int) -> None:
    """Gives each trained layer statistics and operators in their likely shapes."""
    curvature = optimizer.curvature
    for stack in curvature.stacks:
        layers = [
            layer
            for layer, held in curvature.layers.items()
            if held is stack and layer.weight.requires_grad
        ]
        states = {
            layer: dict(
                statistics={
                    name: torch.zeros(*shape)
                    for statistic in stack.kept
                    for name, shape in layer.shapes(statistic).items()
                },
                operator={
                    name: torch.zeros(*t.shape[1:])
                    for name, t in named_tensors(stack.outline).items()
                },
                samples=1,
                refreshes=1,
                failures=0,
            )
            for layer in layers
        }
        if states:
            stack.load(states)
    optimizer.t = step
    assert not curvature.due(step)


def plain_step(model: nn.Module, optimizer: PreconditionedOptimizer) -> Counter[str]:
    """Operations of the second of two plain steps, by name."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    with Launches() as launches:
        optimizer.step()
    return launches.seen
