"""One KFAC step, layer by layer and sample by sample, with every switch, in float64.

Thesis (3.4); damping and clip as in spec/algorithms.md 3; 'reduce' as in arXiv 2311.00636.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .factors import (
    Loss,
    Recorder,
    blocks_of,
    gradient_rows,
    input_rows,
    is_conv,
    second_moment,
)
from .nkfac import ReferenceNKFAC, power_iteration


def samples_of(module: nn.Module, tensor: Tensor) -> list[Tensor]:
    """A batch's samples, each a batch of one."""
    unbatched = 3 if is_conv(module) else 1
    return [tensor[None]] if tensor.dim() == unbatched else list(tensor.split(1))


def kfac_factors(
    model: nn.Module, losses: list[Loss], weight: nn.Parameter, joint: bool, reduction: str
) -> tuple[Tensor, Tensor, int]:
    """R = mean of x x', L = rows * sum of g g' of one weight over several losses, and the rows.

    The rows are those of all positions ('expand'), or one a sample: the mean of its positions'
    inputs and the sum of their gradients ('reduce').
    """
    modules = [m for m in model.modules() if getattr(m, 'weight', None) is weight]
    blocks, width = blocks_of(modules[0]), weight[0].numel() + joint
    inputs = [weight.new_zeros(blocks, 0, width)]
    gradients = [weight.new_zeros(blocks, 0, len(weight) // blocks)]
    for loss in losses:
        with Recorder(modules) as recorder:
            value = loss(model)
        for module, given, probe in recorder.calls:
            (slope,) = torch.autograd.grad(value, [probe], retain_graph=True, allow_unused=True)
            if slope is None:
                continue
            for x, g in zip(samples_of(module, given), samples_of(module, slope), strict=True):
                x, g = input_rows(module, x, joint), gradient_rows(module, g)
                if reduction == 'reduce' and x.shape[1]:
                    x, g = x.mean(1, keepdim=True), g.sum(1, keepdim=True)
                inputs.append(x)
                gradients.append(g)
    x, g = torch.cat(inputs, 1).detach(), torch.cat(gradients, 1)
    rows = x.shape[1]
    return second_moment(x) / max(1, rows), rows * second_moment(g), rows


class Block:
    """Running factors of one block, and their damped inverses."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.running: list[Tensor] = []
        self.inverses: list[Tensor] = []
        self.refreshes = 0

    def merge(self, *samples: Tensor) -> None:
        decay = self.settings['stat_decay']
        old = self.running or samples
        self.running = [decay * a + (1 - decay) * b for a, b in zip(old, samples, strict=True)]

    def refresh(self, damping: float) -> None:
        if self.settings['damping_form'] == 'relative':
            amounts = [damping * power_iteration(factor) for factor in self.running]
        else:
            right, left = (float(torch.linalg.eigvalsh(factor).mean()) for factor in self.running)
            pi = (right / left) ** 0.5
            amounts = [pi * damping**0.5, damping**0.5 / pi]
        self.inverses = [
            torch.linalg.inv(factor + amount * torch.eye(len(factor)).double())
            for factor, amount in zip(self.running, amounts, strict=True)
        ]
        self.refreshes += 1


class ReferenceKFAC(ReferenceNKFAC):
    """KFAC on a float64 model without hooks.

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
        overrides: dict[str, dict[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        settings = (
            dict(
                stat_decay=0.95,
                damping=0.03,
                damping_form='pi',
                reduction='expand',
                scaling='kl_clip',
                kl_clip=1e-3,
            )
            | settings
        )
        super().__init__(model, lr, momentum, weight_decay, overrides=overrides, **settings)
        self.blocks: dict[nn.Parameter, list[Block]] = {}
        self.total, self.factor = 0.0, 1.0  # of the last KL clip: sum lr^2 <V, G> before it, scale

    def step(self, *losses: Loss) -> None:
        """One step on the sum of the losses (several: micro-batches)."""
        if self.t % self.settings['stat_interval'] == 0:
            for weight, module in self.layers.items():
                if weight.requires_grad:
                    self._capture(weight, self.is_joint(module), list(losses))
        for weight, blocks in self.blocks.items():
            if self.t % self.settings['refresh_interval'] == 0 or blocks[0].refreshes == 0:
                for block in blocks:
                    block.refresh(self.option(weight, 'damping') or self.settings['damping'])
        trained = [p for p in self.names if p.requires_grad]
        slopes = torch.autograd.grad(
            sum(loss(self.model) for loss in losses), trained, allow_unused=True
        )
        raw = {p: g for p, g in zip(trained, slopes, strict=True) if g is not None}
        directions = {}
        for weight in self.blocks:
            if weight in raw:
                directions.update(self._direction(weight, self.layers[weight], raw))
        if self.settings['scaling'] == 'kl_clip':
            self._clip(directions, raw)
        with torch.no_grad():
            for p, g in raw.items():
                self._sgd(p, directions.get(p, g))
        self.t += 1

    def _capture(self, weight: nn.Parameter, joint: bool, losses: list[Loss]) -> None:
        right, left, rows = kfac_factors(
            self.model, losses, weight, joint, self.settings['reduction']
        )
        if rows == 0 or left.norm() == 0:
            return
        blocks = self.blocks.setdefault(weight, [Block(self.settings) for _ in right])
        for block, *samples in zip(blocks, right, left, strict=True):
            block.merge(*samples)

    def _direction(
        self, weight: nn.Parameter, module: nn.Module, raw: dict[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """V = L^-1 G R^-1 block by block on [W | b]."""
        joint = self.is_joint(module)
        matrix = raw[weight].reshape(len(weight), -1)
        if joint:
            column = raw.get(module.bias, torch.zeros(len(weight), dtype=matrix.dtype))
            matrix = torch.cat([matrix, column[:, None]], 1)
        blocks = self.blocks[weight]
        pieces = []
        for block, piece in zip(blocks, matrix.chunk(len(blocks)), strict=True):
            right, left = block.inverses
            # Column by column, (L (x) R)^-1 vec(G): what a Fisher block of that form asks for.
            pieces.append((torch.kron(left, right) @ piece.flatten()).reshape(piece.shape))
        direction = torch.cat(pieces)
        if self.settings['scaling'] == 'norm_recovery' and direction.any():
            direction = direction * (matrix.norm() / direction.norm())
        found = {weight: direction[:, : weight[0].numel()].reshape(weight.shape)}
        if joint and module.bias in raw:
            found[module.bias] = direction[:, -1]
        return found

    def _clip(
        self, directions: dict[nn.Parameter, Tensor], raw: dict[nn.Parameter, Tensor]
    ) -> None:
        self.total, self.factor = 0.0, 1.0
        for p, direction in directions.items():
            self.total += self.option(p, 'lr') ** 2 * float((direction * raw[p]).sum())
        if self.total > self.settings['kl_clip']:
            self.factor = (self.settings['kl_clip'] / self.total) ** 0.5
        for p in directions:
            directions[p] = directions[p] * self.factor
