"""Classes that tests register."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmprecond.curvature import INPUT, Layer, Moment, RunningAverage, Statistic
from mmprecond.linalg import Diagonal, Operators
from mmprecond.preconditioners import Preconditioner
from mmprecond.rules import Rule


class SignSGD(Rule):
    hyper = ('lr', 'weight_decay')
    defaults = dict(weight_decay=0.0)

    def compute_updates(
        self, params: Any, directions: list[Tensor], states: Any, group: Any
    ) -> list[Tensor]:
        return [direction.sign() for direction in directions]

    def apply_updates(
        self, params: list[Tensor], updates: list[Tensor], states: Any, group: Any
    ) -> None:
        torch._foreach_add_(params, updates, alpha=-group['lr'])


@dataclass(frozen=True, kw_only=True)
class InputScale(Preconditioner):
    """G times the diagonal of R."""

    statistics: ClassVar[tuple[Statistic, ...]] = (Statistic(INPUT, Moment()),)

    def average(self) -> RunningAverage:
        return RunningAverage(0.0)

    def outline(self, layer: Layer) -> Operators:
        blocks, _, columns = layer.shape
        return {'input': Diagonal.outline((blocks, 1, columns))}

    def refresh(self, factors: Any, previous: Any, damping: Any) -> Any:
        diagonal = factors[INPUT].tensor.diagonal(dim1=-2, dim2=-1)[:, :, None]
        return {'input': Diagonal(diagonal.clone())}, diagonal.isfinite().flatten(1).all(1)

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        return operators['input'].right(gradients)


def method(name: str = 'Other', **members: Any) -> type:
    return dataclass(frozen=True, kw_only=True)(type(name, (InputScale,), members))


class MyLinear(nn.Linear):
    """Computes what its base class does."""


class Grouped(nn.Module):
    """Grouped-query attention: two heads of queries share one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 8 + 2 * 4)
        self.softmax = nn.Softmax(-1)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([8, 4, 4], -1)
        q = q.unflatten(-1, (2, 4)).transpose(1, 2)
        out = self.softmax(q @ k[:, None].mT) @ v[:, None]
        return self.proj(out.transpose(1, 2).flatten(2))
