"""One FSGD or FAdam step, layer by layer, as spec/algorithms.md 8 writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factors import Loss, measure
from .nkfac import Factor, ReferenceNKFAC, power_iteration
from .rules import ReferenceRule


def root(matrix: Tensor) -> Tensor:
    """A^1/2 by the iteration of Denman and Beavers."""
    y, z = matrix, torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(60):
        y, z = (y + torch.linalg.inv(z)) / 2, (z + torch.linalg.inv(y)) / 2
    return y


def inverse_power(matrix: Tensor, exponent: float) -> Tensor:
    """A^-exponent, by products and roots alone."""
    if exponent < 1:
        return inverse_power(root(matrix), 2 * exponent)
    return torch.linalg.matrix_power(torch.linalg.inv(matrix), int(exponent))


class Feature(Factor):
    """Running R of one block, and its damped inverse power."""

    def merge(self, sample: Tensor) -> None:
        decay = self.settings['stat_decay']
        self.running = decay * self.running + (1 - decay) * sample

    def refresh(self, damping: float) -> None:
        eye = torch.eye(len(self.running), dtype=self.running.dtype)
        damped = self.running + damping * power_iteration(self.running) * eye
        self.inverse = inverse_power(damped, self.settings['exponent'])
        self.refreshes += 1


class ReferenceFeature(ReferenceNKFAC):
    """G R^-exponent on a float64 model without hooks, with any rule.

    Args:
        model: The model, trained in place.
        rule: What moves a parameter along its direction.
        overrides: As in `ReferenceNKFAC`.
        settings: As the optimizer's, all intervals 1 by default; exponent 2, 1, 1/2 or 1/4.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: ReferenceRule,
        lr: float,
        weight_decay: float = 0.0,
        overrides: dict[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        settings = dict(exponent=1.0, norm_recovery=True) | settings
        super().__init__(model, lr, weight_decay=weight_decay, overrides=overrides, **settings)
        self.rule = rule

    def _capture(self, weight: nn.Parameter, joint: bool, losses: list[Loss]) -> None:
        right, _, rows = measure(self.model, losses, weight, joint)
        if rows:
            blocks, _ = self.factors.setdefault(
                weight, ([Feature(self.settings) for _ in right], [])
            )
            for feature, sample in zip(blocks, right, strict=True):
                feature.merge(sample)

    def _precondition(
        self, weight: nn.Parameter, module: nn.Module, gradients: dict[nn.Parameter, Tensor]
    ) -> None:
        """V = G R^-exponent block by block on [W | b], norm recovery over the whole layer."""
        joint = self.is_joint(module)
        matrix = gradients[weight].reshape(len(weight), -1)
        if joint:
            column = gradients.get(module.bias, torch.zeros(len(weight), dtype=matrix.dtype))
            matrix = torch.cat([matrix, column[:, None]], dim=1)
        blocks, _ = self.factors[weight]
        direction = torch.cat(
            [
                piece @ block.inverse
                for piece, block in zip(matrix.chunk(len(blocks)), blocks, strict=True)
            ]
        )
        if self.settings['norm_recovery'] and direction.any():
            direction = direction * matrix.norm() / direction.norm()
        gradients[weight] = direction[:, : weight[0].numel()].reshape(weight.shape)
        if joint and module.bias in gradients:
            gradients[module.bias] = direction[:, -1]

    def _sgd(self, p: nn.Parameter, direction: Tensor) -> None:
        self.rule.step(p, direction, self.option(p, 'lr'), self.option(p, 'weight_decay'))
