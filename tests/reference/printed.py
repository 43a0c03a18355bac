"""The thesis's algorithms as they are printed, step by step, in float64.

Layers have their bias as one more column. Parameters that no statistic belongs to take the plain
rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factors import Loss, all_rows
from .nkfac import newton, power_iteration
from .rules import ReferenceRule


class Printed:
    """Base of the printed algorithms; a subclass computes a layer's direction.

    Args:
        model: The model, trained in place.
        rule: Rule that updates the parameters.
        lr: Learning rate.
        weight_decay: Weight decay of the rule.
        first: Number of the first step.
        settings: Settings of the algorithm.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: ReferenceRule,
        lr: float,
        weight_decay: float = 0.0,
        first: int = 1,
        **settings: Any,
    ) -> None:
        self.model, self.rule, self.lr, self.decay = model, rule, lr, weight_decay
        self.t, self.settings = first, settings
        self.layers = [m for m in model.modules() if self.takes(m)]
        self.state: dict[nn.Module, dict[str, Any]] = {m: {} for m in self.layers}

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, nn.Conv2d))

    def every(self, name: str) -> bool:
        return self.t % self.settings[name] == 0

    def step(self, loss: Loss) -> None:
        if self.every('stat_interval'):
            for module in self.layers:
                inputs, gradients = all_rows(self.model, [loss], module.weight, True)
                x, delta = inputs[0], gradients[0]
                self.take(self.state[module], delta.t() @ delta, x.t() @ x / len(x))
        for module in self.layers:
            self.refresh(self.state[module])
        params = dict(self.model.named_parameters())
        slopes = torch.autograd.grad(loss(self.model), list(params.values()))
        gradients_of = dict(zip(params.values(), slopes, strict=True))
        with torch.no_grad():
            for module in self.layers:
                weight, bias = module.weight, module.bias
                whole = torch.cat(
                    [gradients_of.pop(weight).flatten(1), gradients_of[bias][:, None]], 1
                )
                gradients_of.pop(bias)
                before = torch.cat([weight.flatten(1), bias[:, None]], 1)
                moved = self.move(self.state[module], before, whole)
                weight.copy_(moved[:, :-1].view_as(weight))
                bias.copy_(moved[:, -1])
            for p, gradient in gradients_of.items():
                self.rule.step(p, gradient, self.lr, self.decay)
        self.t += 1

    def take(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        """Statistics of a step: sums over output gradients, means over inputs."""
        raise NotImplementedError

    def refresh(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def move(self, state: dict[str, Any], before: Tensor, gradient: Tensor) -> Tensor:
        """The weight and bias after the step."""
        direction = self.direction(state, gradient)
        held = state.setdefault('parameter', before.clone())
        held.copy_(before)
        self.rule.step(held, direction, self.lr, self.decay)
        return held

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        raise NotImplementedError


def damped(matrix: Tensor, damping: float) -> Tensor:
    """``A + damping lambda_max I``."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    return matrix + damping * power_iteration(matrix) * eye


def recovered(direction: Tensor, gradient: Tensor) -> Tensor:
    """The direction at the length of the gradient (3.7)."""
    return direction * (gradient.norm() / direction.norm())


class PrintedNKFAC(Printed):
    """Algorithms 3 and 4: (3.8), (3.9), exact inverses at the start, Newton's steps later."""

    def take(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        decay = self.settings['stat_decay']
        for name, sample in (('left', left), ('right', right)):
            state[name] = decay * state.get(name, 0.0) + (1 - decay) * sample

    def refresh(self, state: dict[str, Any]) -> None:
        often, rarely = self.settings['stat_interval'], self.settings['refresh_interval']
        start = self.t < 2 * rarely and self.t % often == 0
        exact = start or self.t % (self.settings['exact_interval'] * rarely) == 0
        if 'left' not in state or not (exact or self.t % rarely == 0):
            return
        for name in ('left', 'right'):
            matrix = damped(state[name], self.settings['damping'])
            inverse = f'{name}_inverse'
            if exact:
                state[inverse] = torch.linalg.inv(matrix)
            else:
                optimal = self.settings.get('newton_step_size') == 'optimal'
                steps = self.settings['newton_steps']
                state[inverse] = newton(matrix, state[inverse], steps, optimal)

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        if 'left_inverse' not in state:
            return gradient
        return recovered(state['left_inverse'] @ gradient @ state['right_inverse'], gradient)


class PrintedAdamR(Printed):
    """Algorithm 6: the rule on U1' G U2; its moments stay as they are when the bases change."""

    def take(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        weight = self.settings['stat_interval'] / self.t
        for name, sample in (('left', left), ('right', right)):
            state[name] = (1 - weight) * state.get(name, 0.0) + weight * sample

    def refresh(self, state: dict[str, Any]) -> None:
        if self.every('refresh_interval'):
            for name in ('left', 'right'):
                eye = torch.eye(len(state[name])).double()
                scale = state[name].abs().max()
                vectors = torch.linalg.eigh(state[name] / scale + self.settings['eps'] * eye)[1]
                state[f'{name}_basis'] = vectors.flip(1)  # as a singular value decomposition

    def move(self, state: dict[str, Any], before: Tensor, gradient: Tensor) -> Tensor:
        first = state.get('left_basis', torch.eye(len(gradient)).double())
        second = state.get('right_basis', torch.eye(gradient.shape[1]).double())
        held = state.setdefault('parameter', torch.zeros_like(gradient))
        held.zero_()
        self.rule.step(held, first.t() @ gradient @ second, 1.0, 0.0)
        return before + self.lr * (first @ held @ second.t() - self.decay * before)


class PrintedFeature(Printed):
    """Algorithms 7 and 8 on linear layers: G R^-1; convolutions take the plain rule (5.3.4)."""

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def take(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        decay = self.settings['stat_decay']
        state['right'] = decay * state.get('right', 0.0) + (1 - decay) * right

    def refresh(self, state: dict[str, Any]) -> None:
        if self.every('refresh_interval'):
            state['inverse'] = torch.linalg.inv(damped(state['right'], self.settings['damping']))

    def direction(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        if 'inverse' not in state:
            return gradient
        return recovered(gradient @ state['inverse'], gradient)


class PrintedPartialHessian:
    """(2.7) with the round-robin of the published code, on a model with 1-D parameters.

    Args:
        model: The model, trained in place.
        settings: lr, momentum, weight_decay, hessian_decay, rate (tau), eps.
    """

    def __init__(self, model: nn.Module, **settings: float) -> None:
        self.params = list(model.parameters())
        self.model, self.settings, self.t = model, settings, 0
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self.vectors = [k for k, p in enumerate(self.params) if p.dim() == 1]
        self.diagonals = {k: torch.zeros_like(self.params[k]) for k in self.vectors[:-1]}

    def step(self, loss: Loss) -> None:
        s, count = self.settings, len(self.vectors)
        gradients = torch.autograd.grad(loss(self.model), self.params, create_graph=True)
        due = self.vectors[self.t % count]
        if due in self.diagonals:
            (row,) = torch.autograd.grad(gradients[due].sum(), self.params[due], retain_graph=True)
            old = self.diagonals[due]
            self.diagonals[due] = s['hessian_decay'] * old + (1 - s['hessian_decay']) * row.abs()
        self.t += 1
        cycle = self.t // count + 1
        with torch.no_grad():
            for k, (p, gradient) in enumerate(zip(self.params, gradients, strict=True)):
                self.buffers[k] = s['momentum'] * self.buffers[k] + gradient.detach()
                direction = self.buffers[k]
                if k in self.diagonals:
                    scale = s['rate'] * (1 - s['momentum'] ** cycle)
                    direction = scale * direction / (self.diagonals[k] + s['eps'])
                p -= s['lr'] * (direction + s['weight_decay'] * p)
