"""MAC, SMAC, AdaAct, NysAct and AdaFisher, layer by layer, as spec/algorithms.md 11-16 writes them.

All samples are kept: an average with weights decay^age is formed anew from them, and no running
quantity exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .factors import Loss, all_rows
from .rules import weighted_mean

Operator = Callable[[Tensor], Tensor]


def mac(inputs: list[Tensor], gradients: list[Tensor], s: dict[str, Any]) -> Operator:
    """rho G (rho I + a a')^-1, and Z of SMAC."""
    mean = weighted_mean([rows.mean(0) for rows in inputs], s['stat_decay'])
    matrix = torch.outer(mean, mean) + s['damping'] * torch.eye(len(mean), dtype=mean.dtype)
    inverse = s['damping'] * torch.linalg.inv(matrix)
    if not s.get('output'):
        return lambda g: g @ inverse
    scale = [len(rows) if s.get('gradient_scale', 'rows') == 'rows' else 1.0 for rows in gradients]
    squares = [
        (factor * rows).square().mean(0) for factor, rows in zip(scale, gradients, strict=True)
    ]
    z = torch.diag(1 / (weighted_mean(squares, s['stat_decay']) + s['damping']))
    return lambda g: z @ g @ inverse


def nysact(inputs: list[Tensor], gradients: list[Tensor], s: dict[str, Any]) -> Operator:
    """G (R + rho I)^-1 of the whole R."""
    moment = weighted_mean([rows.t() @ rows / len(rows) for rows in inputs], s['stat_decay'])
    return lambda g: (
        g @ torch.linalg.inv(moment + s['damping'] * torch.eye(len(moment), dtype=moment.dtype))
    )


def adaact(inputs: list[Tensor], gradients: list[Tensor], s: dict[str, Any]) -> Operator:
    """D / sqrt(v), column by column."""
    square = weighted_mean([rows.square().mean(0) for rows in inputs], s['stat_decay'])
    return lambda d: torch.stack(
        [column / (v.sqrt() + s['eps']) for column, v in zip(d.unbind(1), square, strict=True)], 1
    )


def from_ones(samples: list[Tensor], s: dict[str, Any]) -> Tensor:
    """AdaFisher's averages: of samples between 0 and 1, from ones."""
    gamma = s['stat_decay']
    old, new = (
        (gamma, 1 - gamma) if s.get('ema', 'paper') == 'paper' else (0.1 * gamma, 0.01 * gamma)
    )
    value = torch.ones_like(samples[0])
    for sample in samples:
        spread = sample.max() - sample.min()
        ranged = (sample - sample.min()) / spread if spread else torch.ones_like(sample)
        value = old * value + new * ranged
    return value


def adafisher(inputs: list[Tensor], gradients: list[Tensor], s: dict[str, Any]) -> Operator:
    """D / (s h' + lambda)."""
    right = from_ones([rows.square().mean(0) for rows in inputs], s)
    left = from_ones([rows.square().mean(0) for rows in gradients], s)
    return lambda d: d / (torch.outer(left, right) + s['damping'])


class ReferenceActivation:
    """One of the methods on a float64 model without hooks, all convolutions of one group.

    Args:
        model: The model, trained in place.
        method: One of the functions above.
        after: Whether it acts on the bias-corrected average of the gradients (AdaAct, AdaFisher),
            rather than on the gradients before heavy-ball momentum.
        alone: What a parameter of no layer is divided by, given its squared gradients; None leaves
            it to the rule (without momentum where `after`).
        settings: lr, momentum, weight_decay, decay ('added' or 'decoupled') and the method's.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Callable[..., Operator],
        after: bool = False,
        alone: Callable[[list[Tensor], dict[str, Any]], Tensor] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.method, self.after, self.alone = model, method, after, alone
        self.settings = (
            dict(momentum=0.9, weight_decay=0.0, stat_interval=1, refresh_interval=1, decay='added')
            | settings
        )
        self.t = 0
        self.inputs: dict[Tensor, list[Tensor]] = {}
        self.gradients: dict[Tensor, list[Tensor]] = {}
        self.squares: dict[Tensor, list[Tensor]] = {}
        self.operators: dict[Tensor, Operator] = {}
        self.history: dict[Tensor, list[Tensor]] = {}

    def step(self, *losses: Loss) -> None:
        """One step on the sum of the losses."""
        s = self.settings
        layers = {m.weight: m for m in self.model.modules() if type(m) in (nn.Linear, nn.Conv2d)}
        for weight, module in layers.items():
            if self.t % s['stat_interval'] == 0:
                right, left = all_rows(self.model, list(losses), weight, module.bias is not None)
                self.inputs.setdefault(weight, []).append(right[0])
                self.gradients.setdefault(weight, []).append(left[0])
            if self.t % s['refresh_interval'] == 0:
                self.operators[weight] = self.method(self.inputs[weight], self.gradients[weight], s)
        params = list(self.model.parameters())
        slopes = torch.autograd.grad(sum(loss(self.model) for loss in losses), params)
        found = {p: g.detach() for p, g in zip(params, slopes, strict=True)}
        joint = {p for m in layers.values() for p in m.parameters(recurse=False)}
        if self.t % s['stat_interval'] == 0:
            for p in found.keys() - joint:
                self.squares.setdefault(p, []).append(found[p].square())
        with torch.no_grad():
            self._move(layers, joint, found)
        self.t += 1

    def _move(
        self, layers: dict[Tensor, Any], joint: set[Tensor], found: dict[Tensor, Tensor]
    ) -> None:
        s = self.settings
        if not self.after:
            self._transform(layers, found)
        if s['decay'] == 'added':
            found = {p: g + s['weight_decay'] * p for p, g in found.items()}
        steps = {}
        for p, g in found.items():
            self.history.setdefault(p, []).append(g.clone())
            if not self.after:
                steps[p] = sum(
                    s['momentum'] ** age * old for age, old in enumerate(reversed(self.history[p]))
                )
            elif p in joint or self.alone is not None:
                steps[p] = weighted_mean(self.history[p], s['momentum'])
            else:
                steps[p] = g
        if self.after:
            self._transform(layers, steps)
            for p in steps.keys() - joint:
                if self.alone is not None:
                    steps[p] = steps[p] / self.alone(self.squares[p], s)
        for p, step in steps.items():
            if s['decay'] == 'decoupled':
                p.mul_(1 - s['lr'] * s['weight_decay'])
            p.sub_(s['lr'] * step)

    def _transform(self, layers: dict[Tensor, Any], tensors: dict[Tensor, Tensor]) -> None:
        """Replaces weights' and biases' tensors by the operator of their joint matrix."""
        for weight, module in layers.items():
            matrix = tensors[weight].reshape(len(weight), -1)
            if module.bias is not None:
                matrix = torch.cat([matrix, tensors[module.bias][:, None]], 1)
            result = self.operators[weight](matrix)
            width = weight[0].numel()
            tensors[weight] = result[:, :width].reshape(weight.shape)
            if module.bias is not None:
                tensors[module.bias] = result[:, width]
