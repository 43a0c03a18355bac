"""One AdamR step, layer by layer, as spec/algorithms.md 7 writes it, in float64.

A layer's raw gradients are kept, each with the basis of its step: nothing is ever carried from one
basis to the next. The first moment that is turned into each new basis is the mean of the raw
gradients, seen in the basis of now.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .factors import Loss, Recorder, blocks_of, is_conv, measure
from .nkfac import ReferenceNKFAC
from .rules import believed, deviations, rectified, weighted_mean


def assigned(basis: Tensor, old: Tensor) -> Tensor:
    """The columns (n, n) in the places and with the signs of the old ones, closest pairs first."""
    result, overlap = torch.zeros_like(basis), old.t() @ basis
    left = overlap.abs()
    for _ in range(len(old)):
        place, column = divmod(int(left.argmax()), len(old))
        result[:, place] = basis[:, column] * (1 if overlap[place, column] >= 0 else -1)
        left[place], left[:, column] = -1, -1
    return result


def iterated(matrix: Tensor, basis: Tensor) -> Tensor:
    """One orthogonal iteration: each A u, made orthogonal from the largest u'Au down."""
    result = torch.zeros_like(basis)
    done: list[Tensor] = []
    for place in (basis * (matrix @ basis)).sum(0).argsort(descending=True):
        column = matrix @ basis[:, place]
        for _ in range(3):  # repeated, as rounding asks
            for other in done:
                column = column - (other @ column) * other
            column = column / column.norm()
        done.append(column)
        result[:, place] = column
    return result


def moments(
    model: nn.Module, losses: list[Loss], weight: nn.Parameter, joint: bool
) -> tuple[Tensor, Tensor]:
    """R and L as `factors.measure`, but for many rows at once where the layer is one block."""
    modules = [m for m in model.modules() if getattr(m, 'weight', None) is weight]
    if blocks_of(modules[0]) > 1 or getattr(modules[0], 'padding_mode', 'zeros') != 'zeros':
        return measure(model, losses, weight, joint)[:2]
    inputs, gradients = [], []
    for loss in losses:
        with Recorder(modules) as recorder:
            value = loss(model)
        probes = [probe for *_, probe in recorder.calls]
        slopes = torch.autograd.grad(value, probes, allow_unused=True) if probes else []
        for (module, x, _), slope in zip(recorder.calls, slopes, strict=True):
            if slope is None:
                continue
            if is_conv(module):
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                x, slope = x.mT, slope.flatten(2).mT
            x = x.flatten(0, -2)
            inputs.append(torch.cat([x, torch.ones(len(x), 1).double()], 1) if joint else x)
            gradients.append(slope.flatten(0, -2))
    x, g = (torch.cat(rows) if rows else torch.zeros(0, 1) for rows in (inputs, gradients))
    return (x.t() @ x / max(1, len(x)))[None].detach(), (g.t() @ g)[None]


class Side:
    """One side of one block of a layer: its captures, and its basis, at first the identity."""

    def __init__(self, size: int, solver: str, kept: bool) -> None:
        self.captures: list[Tensor] = []
        self.basis = torch.eye(size).double()
        self.turns: list[Tensor] = []
        self.solver, self.kept, self.refreshes = solver, kept, 0

    def refresh(self) -> None:
        if not self.kept:
            return
        mean = sum(self.captures) / len(self.captures)
        new = (
            iterated(mean, self.basis)
            if self.solver == 'qr' and self.refreshes
            else torch.linalg.svd(mean)[0]
        )
        new = assigned(new, self.basis)
        self.turns.append(self.basis.t() @ new)
        self.basis = new
        self.refreshes += 1


class Seen:
    """A gradient (blocks, o, i) and the bases of its step (blocks, o, o), (blocks, i, i)."""

    def __init__(self, gradient: Tensor, left: Tensor, right: Tensor, turns: int) -> None:
        self.gradient, self.left, self.right, self.turns = gradient, left, right, turns

    def turn(self, gradient: Tensor) -> Tensor:
        return self.left.mT @ gradient @ self.right

    def restore(self, direction: Tensor) -> Tensor:
        return self.left @ direction @ self.right.mT


class ReferenceRotation(ReferenceNKFAC):
    """AdamR on a float64 model without hooks, with any of its rules.

    Args:
        model: The model, trained in place.
        rule: Name of the rule.
        overrides: As in `ReferenceNKFAC`.
        settings: As the optimizer's, all intervals 1 by default.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        betas: tuple[float, ...] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rule: str = 'AdamW',
        overrides: dict[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        settings = dict(basis_solver='eigh', rotate_moments=True, max_dim=8192) | settings
        super().__init__(
            model,
            lr,
            weight_decay=weight_decay,
            betas=betas,
            eps=eps,
            overrides=overrides,
            **settings,
        )
        self.rule = rule
        self.sides: dict[nn.Parameter, tuple[list[Side], list[Side]]] = {}
        self.history: dict[nn.Parameter, list[Seen]] = {}

    def step(self, *losses: Loss) -> None:
        """One step on the sum of the losses (several: micro-batches)."""
        self.t += 1
        if self.t % self.settings['stat_interval'] == 0:
            for weight, module in self.layers.items():
                if weight.requires_grad:
                    self._capture(weight, self.is_joint(module), list(losses))
        if self.t % self.settings['refresh_interval'] == 0:
            for sides in self.sides.values():
                for side in (*sides[0], *sides[1]):
                    side.refresh()
        trained = [p for p in self.names if p.requires_grad]
        slopes = torch.autograd.grad(
            sum(loss(self.model) for loss in losses), trained, allow_unused=True
        )
        gradients = {p: g for p, g in zip(trained, slopes, strict=True) if g is not None}
        with torch.no_grad():
            joint = {
                weight: module.bias
                for weight, module in self.layers.items()
                if self.is_joint(module)
                and (weight in gradients or (weight in self.history and module.bias in gradients))
            }
            for p in {*gradients, *joint} - {*joint.values()}:
                self._update(p, gradients)

    def _capture(self, weight: nn.Parameter, joint: bool, losses: list[Loss]) -> None:
        right, left = moments(self.model, losses, weight, joint)
        if left.norm() == 0:
            return
        if weight not in self.sides:
            solver, most = self.settings['basis_solver'], self.settings['max_dim']
            self.sides[weight] = tuple(
                [Side(len(block), solver, len(block) <= most) for block in sample]
                for sample in (left, right)
            )
        for sides, sample in zip(self.sides[weight], (left, right), strict=True):
            for side, block in zip(sides, sample, strict=True):
                side.captures.append(block)

    def _update(self, p: nn.Parameter, gradients: dict[nn.Parameter, Tensor]) -> None:
        """Moves a parameter, or a weight together with its joint bias."""
        module = self.layers.get(p)
        joint = module is not None and self.is_joint(module)
        gradient = gradients.get(p, torch.zeros_like(p))
        matrix = gradient.reshape(len(p), -1) if p.dim() else gradient.reshape(1, 1)
        if joint:
            column = gradients.get(module.bias, torch.zeros(len(p)).double())
            matrix = torch.cat([matrix, column[:, None]], 1)
        pieces = torch.stack(matrix.chunk(1 if module is None else blocks_of(module)))
        if p in self.sides:
            left, right = (torch.stack([s.basis for s in sides]) for sides in self.sides[p])
            turns = max(len(s.turns) for sides in self.sides[p] for s in sides)
        else:
            left, right = (
                torch.eye(n).double().repeat(len(pieces), 1, 1) for n in pieces.shape[1:]
            )
            turns = 0
        seen = self.history.setdefault(p, [])
        seen.append(Seen(pieces, left, right, turns))
        direction = seen[-1].restore(self._direction(p, seen)).reshape(matrix.shape)
        width = matrix.shape[1] - joint
        if p in gradients:
            self._move(p, direction[:, :width].reshape(p.shape))
        if joint and module.bias in gradients:
            self._move(module.bias, direction[:, -1])

    def _direction(self, p: nn.Parameter, seen: list[Seen]) -> Tensor:
        """The rule's direction in the basis of now."""
        if self.settings['rotate_moments']:
            # Raw gradients in one basis; squares in that of their own step, spread since then.
            linear = [seen[-1].turn(s.gradient) for s in seen]
            own = [
                (s.turn(s.gradient), s.turn(before.gradient))
                for s, before in zip(seen, [seen[0], *seen], strict=False)
            ]
        else:
            linear = [s.turn(s.gradient) for s in seen]
            own = list(zip(linear, [linear[0], *linear], strict=False))
        mean = linear[-1] if self.rule == 'AdaGrad' else weighted_mean(linear, self.betas[0])
        square_beta = self.betas[-1] if self.betas else 1.0
        if self.rule == 'Adan':
            beta = self.betas[1]
            changes = [new - old for new, old in zip(linear, [linear[0], *linear], strict=False)]
            mean = mean + beta * weighted_mean(changes, beta)
            squares = [(new + beta * (new - old)) ** 2 for new, old in own]
        elif self.rule == 'AdaBelief':
            squares = [deviation**2 for deviation in self._deviations(seen)]
        else:
            squares = [new**2 for new, _ in own]
        if self.settings['rotate_moments']:
            squares = [
                self._spread(p, s.turns, square) for s, square in zip(seen, squares, strict=True)
            ]
        square = weighted_mean(squares, square_beta)
        if self.rule == 'AdaGrad':
            square = square * len(squares)
        if self.rule == 'RAdam':
            return rectified(mean, square, len(squares), square_beta, self.eps)
        if self.rule == 'AdaBelief':
            return believed(mean, square, square_beta, self.eps)
        return mean / (square.sqrt() + self.eps)

    def _deviations(self, seen: list[Seen]) -> list[Tensor]:
        """Deviation of each gradient from the momentum of its step, in that step's basis."""
        if not self.settings['rotate_moments']:
            return deviations([s.turn(s.gradient) for s in seen], self.betas[0])
        raw = deviations([s.gradient for s in seen], self.betas[0])
        return [s.turn(deviation) for s, deviation in zip(seen, raw, strict=True)]

    def _spread(self, p: nn.Parameter, since: int, square: Tensor) -> Tensor:
        """A square after all changes of the basis since then, as if entries were uncorrelated."""
        for k in range(
            since,
            max((len(side.turns) for sides in self.sides.get(p, ()) for side in sides), default=0),
        ):
            left, right = (
                torch.stack([s.turns[k] if s.turns else s.basis for s in sides]) ** 2
                for sides in self.sides[p]
            )
            square = left.mT @ square @ right
        return square

    def _move(self, p: nn.Parameter, direction: Tensor) -> None:
        lr, decay = self.option(p, 'lr'), self.option(p, 'weight_decay')
        if self.rule == 'Adan':
            p.copy_((p - lr * direction) / (1 + lr * decay))
        else:
            p.copy_(p - lr * (direction + decay * p))
