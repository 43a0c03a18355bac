"""States of models and optimizers: through a file, compared to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.optimizers import PreconditionedOptimizer


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """A state through a file, as plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def walk(value: Any, path: str = 'state') -> list[str]:
    """Paths of everything that is no plain value."""
    if isinstance(value, dict) and type(value) is dict:
        return [bad for k, v in value.items() for bad in [*walk(k, path), *walk(v, f'{path}/{k}')]]
    if type(value) in (list, tuple):
        return [bad for k, v in enumerate(value) for bad in walk(v, f'{path}/{k}')]
    return [] if type(value) in (int, float, str, bool, type(None), Tensor) else [path]


def everything(model: nn.Module, optimizer: PreconditionedOptimizer) -> dict[str, Any]:
    return copy.deepcopy({'model': dict(model.state_dict()), 'optimizer': optimizer.state_dict()})


def differences(ours: Any, theirs: Any, path: str = '') -> list[str]:
    """Paths at which two nested states differ in any bit."""
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return [f'{path}: {list(ours)} != {list(theirs)}']
        return [d for k in ours for d in differences(ours[k], theirs[k], f'{path}/{k}')]
    if isinstance(ours, (list, tuple)):
        if len(ours) != len(theirs):
            return [path]
        return [
            d
            for k, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for d in differences(a, b, f'{path}/{k}')
        ]
    if isinstance(ours, Tensor):
        return [] if ours.dtype == theirs.dtype and torch.equal(ours, theirs) else [path]
    return [] if ours == theirs else [path]


def curvature(optimizer: PreconditionedOptimizer) -> dict[str, Tensor]:
    """All statistics and operators, flat, copied."""
    layers = optimizer.state_dict()['precond']['layers']
    return {
        f'{name}/{kind}/{key}': value.clone()
        for name, entry in layers.items()
        for kind in ('statistics', 'operator')
        for key, value in entry[kind].items()
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
