"""One NKFAC or AdaNKFAC step, layer by layer, as spec/algorithms.md 1.1, 5 and 6 write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factors import Loss, measure


def power_iteration(matrix: Tensor) -> float:
    """Ten rounds from the ones (1.1); the true eigenvalue where the ones are in the null space."""
    v = torch.ones(1, len(matrix), dtype=matrix.dtype)
    if (v @ matrix).norm() <= 1e-7 * matrix.norm():
        return float(torch.linalg.eigvalsh(matrix)[-1].clamp_min(0))
    for _ in range(10):
        u = v @ matrix
        u = u / u.norm()
        v = (matrix @ u.t()).t()
    return float(v.norm())


def newton(matrix: Tensor, inverse: Tensor, steps: int, optimal: bool = False) -> Tensor:
    """K steps of the Newton inverse (1.1), or with the step size of Proposition 3.2."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    for _ in range(steps):
        product = inverse @ matrix
        if (eye - product).norm() < 1:
            inverse = (2 * eye - product) @ inverse
        else:
            alpha = 1 / product.norm()
            if optimal:  # two evaluations and the one between: a parabola, and its lowest point
                error = eye - product
                ends = [(error + a * product @ -error).norm() ** 2 for a in (0.0, 0.5, 1.0)]
                curve = 2 * ends[0] - 4 * ends[1] + 2 * ends[2]
                slope = -3 * ends[0] + 4 * ends[1] - ends[2]
                alpha = -slope / (2 * curve)
            inverse = ((1 + alpha) * eye - alpha * product) @ inverse
    return inverse


class Factor:
    """One running factor (n x n) of one block, and its inverse."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.running: Tensor | float = 0.0
        self.inverse: Tensor | None = None
        self.refreshes = 0

    def merge(self, sample: Tensor) -> None:
        sample = sample / (sample.norm() + 1e-12)
        decay = self.settings['stat_decay']
        self.running = decay * self.running + (1 - decay) * sample

    def refresh(self, damping: float) -> None:
        lowest = max(1e-4, damping * power_iteration(self.running))
        damped = self.running + lowest * torch.eye(len(self.running), dtype=self.running.dtype)
        s = self.settings
        exact = self.refreshes <= 2 or self.refreshes % s['exact_interval'] == 0
        if exact or s['solver'] == 'cholesky':
            self.inverse = torch.linalg.inv(damped)
        else:
            self.inverse = newton(damped, self.inverse, s['newton_steps'])
        self.refreshes += 1


class ReferenceNKFAC:
    """NKFAC on a float64 model without hooks; AdaNKFAC where `betas` are given.

    Args:
        model: The model, trained in place.
        overrides: Settings of single parameters by name: lr, weight_decay, damping, or
            precondition=False.
        settings: As the optimizer's, all intervals 1 by default.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        overrides: dict[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.momentum, self.betas, self.eps = model, momentum, betas, eps
        self.defaults = dict(lr=lr, weight_decay=weight_decay)
        self.overrides = overrides or {}
        self.settings = (
            dict(
                stat_decay=0.95,
                damping=0.01,
                stat_interval=1,
                refresh_interval=1,
                exact_interval=500,
                newton_steps=1,
                solver='newton',
            )
            | settings
        )
        self.t = 0
        self.names = {p: name for name, p in model.named_parameters()}
        self.layers: dict[nn.Parameter, nn.Module] = {}
        for module in model.modules():
            if type(module) in (nn.Linear, nn.Conv2d) and self._takes_part(module.weight):
                self.layers.setdefault(module.weight, module)
        self.factors: dict[nn.Parameter, tuple[list[Factor], list[Factor]]] = {}
        self.state: dict[nn.Parameter, dict[str, Any]] = {}

    def option(self, parameter: nn.Parameter, name: str) -> Any:
        return self.overrides.get(self.names[parameter], {}).get(name, self.defaults.get(name))

    def _takes_part(self, parameter: nn.Parameter | None) -> bool:
        if parameter is None:
            return False
        return bool(self.overrides.get(self.names[parameter], {}).get('precondition', True))

    def is_joint(self, module: nn.Module) -> bool:
        return self._takes_part(module.bias)

    def step(self, *losses: Loss) -> None:
        """One step on the sum of the losses (several: micro-batches)."""
        if self.t % self.settings['stat_interval'] == 0:
            for weight, module in self.layers.items():
                if weight.requires_grad:
                    self._capture(weight, self.is_joint(module), list(losses))
        for weight, sides in self.factors.items():
            due = self.t % self.settings['refresh_interval'] == 0
            if due or sides[0][0].refreshes == 0:
                damping = self.option(weight, 'damping') or self.settings['damping']
                for factor in [*sides[0], *sides[1]]:
                    factor.refresh(damping)
        trained = [p for p in self.names if p.requires_grad]
        slopes = torch.autograd.grad(
            sum(loss(self.model) for loss in losses), trained, allow_unused=True
        )
        gradients = {p: g for p, g in zip(trained, slopes, strict=True) if g is not None}
        for weight in self.factors:
            if weight in gradients:
                self._precondition(weight, self.layers[weight], gradients)
        with torch.no_grad():
            for p, g in gradients.items():
                (self._sgd if self.betas is None else self._adam)(p, g)
        self.t += 1

    def _capture(self, weight: nn.Parameter, joint: bool, losses: list[Loss]) -> None:
        right, left, rows = measure(self.model, losses, weight, joint)
        if rows == 0 or left.norm() == 0:
            return
        if weight not in self.factors:
            self.factors[weight] = (
                [Factor(self.settings) for _ in left],
                [Factor(self.settings) for _ in right],
            )
        for factors, samples in zip(self.factors[weight], (left, right), strict=True):
            for factor, sample in zip(factors, samples, strict=True):
                factor.merge(sample)

    def _precondition(
        self, weight: nn.Parameter, module: nn.Module, gradients: dict[nn.Parameter, Tensor]
    ) -> None:
        """V = L^-1 G R^-1 block by block on [W | b], norm recovery over the whole layer."""
        joint = self.is_joint(module)
        matrix = gradients[weight].reshape(len(weight), -1)
        if joint:
            column = gradients.get(module.bias, torch.zeros(len(weight), dtype=matrix.dtype))
            matrix = torch.cat([matrix, column[:, None]], dim=1)
        left, right = self.factors[weight]
        pieces = [
            a.inverse @ piece @ b.inverse
            for a, piece, b in zip(left, matrix.chunk(len(left)), right, strict=True)
        ]
        direction = torch.cat(pieces)
        direction = direction * (matrix.norm() / (direction.norm() + 1e-12))
        gradients[weight] = direction[:, : weight[0].numel()].reshape(weight.shape)
        if joint and module.bias in gradients:
            gradients[module.bias] = direction[:, -1]

    def _sgd(self, p: nn.Parameter, direction: Tensor) -> None:
        direction = direction + self.option(p, 'weight_decay') * p
        state = self.state.setdefault(p, {'buffer': torch.zeros_like(p)})
        state['buffer'] = self.momentum * state['buffer'] + direction
        p -= self.option(p, 'lr') * state['buffer']

    def _adam(self, p: nn.Parameter, direction: Tensor) -> None:
        beta1, beta2 = self.betas
        zero = torch.zeros_like(p)
        state = self.state.setdefault(p, {'step': 0, 'm': zero, 'v': zero})
        state['step'] += 1
        state['m'] = beta1 * state['m'] + (1 - beta1) * direction
        state['v'] = beta2 * state['v'] + (1 - beta2) * direction**2
        first, second = 1 - beta1 ** state['step'], 1 - beta2 ** state['step']
        ratio = state['m'] / ((state['v'] / second).sqrt() + self.eps)
        decay = self.option(p, 'weight_decay')
        p -= self.option(p, 'lr') / first * (ratio + decay * p)
