"""SOAA's rule: Adam with a diagonal Fisher and a trust region that depends on the loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from .adam import AdamW
from .base import Group, State

logger = logging.getLogger('mmprecond')

#: Range of the sums in the correction of the Fisher.
SUMS = ('global', 'parameter')


@dataclass(frozen=True)
class Moments:
    """Moments of a batch of parameters, stored until those of all batches are known.

    Attributes:
        params: The parameters.
        first: First moments of the parameters.
        second: Second moments of the parameters.
        group: Group of the parameters.
        step: Number of steps of the parameters.
    """

    params: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    group: Group
    step: int

    @property
    def biases(self) -> tuple[float, float]:
        """Sums of the weights in the averages of the two moments."""
        first, second = (1 - beta**self.step for beta in self.group['betas'])
        return first, second


class TrustRegionAdam(AdamW):
    """Adam's moments and decoupled decay, with updates from all moments jointly (see `SOAA`).

    Args:
        gamma: Largest distance of the radius from 1 at the end of the run, in (0, 1).
        radius: Trust radius of the first step.
        sums: 'global', or 'parameter' for a sum over each parameter separately.

    Attributes:
        region: Scalars in float64: the radius, the average of the loss, the sum of its weights (for
            the bias correction), the predicted reduction, and the number of non-finite losses.
    """

    elementwise: ClassVar[bool] = False

    def __init__(self, gamma: float = 0.1, radius: float = 10.0, sums: str = 'global') -> None:
        super().__init__()
        check_number('gamma', gamma, high=1, open_low=True)
        check_number('radius', radius, open_low=True)
        check_choice('sums', sums, SUMS)
        self.gamma = gamma
        self.sums = sums
        self.region = {
            name: torch.zeros((), dtype=torch.float64)
            for name in ('radius', 'loss', 'weight', 'predicted', 'skipped')
        }
        self.region['radius'] += radius
        self._pending_moments: list[Moments] = []
        self._loss: Tensor | None = None
        self._step: tuple[int, float, Group] = 0, 0.0, {}
        self._reported = torch.zeros((), dtype=torch.float64)
        self._warned = False

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('eps', group['eps'], open_low=True)

    def move_to(self, device: torch.device) -> None:
        """Moves the region to a device."""
        self.region = {name: value.to(device) for name, value in self.region.items()}
        self._reported = torch.zeros((), dtype=torch.float64, pin_memory=device.type == 'cuda')

    def load_region(self, saved: Mapping[str, Tensor]) -> None:
        """Loads the region of a saved run."""
        self.region = {
            name: saved[name].to(value, copy=True) for name, value in self.region.items()
        }

    def begin_step(self, loss: Tensor, step: int, total_steps: int, first: Group) -> None:
        """Sets the values that the next updates need in addition to directions.

        Args:
            loss: Loss of the step, a float64 scalar on the region's device.
            step: Number of steps taken.
            total_steps: Number of steps of the run.
            first: The first parameter group, whose `betas` and `eps` the region uses.
        """
        self._pending_moments = []  # an earlier step may have failed
        self._step = step, min(step / total_steps, 1.0), first
        self._loss = loss

    def compute_updates(
        self, params: list[Tensor], directions: list[Tensor], states: list[State], group: Group
    ) -> list[Tensor]:
        """Returns first moments as placeholders, which `combine` replaces."""
        first, second, step = self.moments(params, directions, states, group)
        self._pending_moments.append(Moments(params, first, second, group, step))
        return first

    def combine(self, updates: dict[Tensor, Tensor]) -> None:
        """Computes the updates from all moments, and the radius of the next step."""
        pending, self._pending_moments = self._pending_moments, []
        if not pending:
            return
        if self._loss is None:
            raise ValueError('TrustRegionAdam needs the loss of each step, by begin_step; use SOAA')
        radius, predicted = self.region['radius'], torch.zeros_like(self.region['predicted'])
        for moments, correction in zip(pending, self._fisher_corrections(pending), strict=True):
            u, gain = _trusted_updates(moments, correction, radius)
            predicted += moments.group['lr'] * gain.to(predicted.device)
            updates.update(zip(moments.params, u, strict=True))
        self.adapt(self._loss, predicted)

    def _fisher_corrections(self, pending: list[Moments]) -> list[Tensor]:
        """``1 + sum m^2 / sum(v + eps)`` of each batch: a scalar, or one value per parameter."""
        squares, sums = [], []
        for moments in pending:
            bias1, bias2 = moments.biases
            norms = torch.stack(torch._foreach_norm(moments.first)).double()
            squares.append(norms.square() / bias1**2)
            shifts = [v.numel() * bias2 * moments.group['eps'] for v in moments.second]
            sums.append(_sums(moments.second, shifts) / bias2)
        if self.sums == 'parameter':
            return [1 + square / total for square, total in zip(squares, sums, strict=True)]
        device = self.region['radius'].device
        square = torch.stack([batch.sum().to(device) for batch in squares]).sum()
        total = torch.stack([batch.sum().to(device) for batch in sums]).sum()
        return [(1 + square / total).to(batch.device) for batch in squares]

    def adapt(self, loss: Tensor, predicted: Tensor) -> None:
        """Updates the region for the next step; values that are not finite are ignored."""
        old = self.region
        step, progress, group = self._step
        new_weight = 1 - group['betas'][0]
        finite = loss.isfinite()
        average = old['loss'] + new_weight * (loss - old['loss'])
        weight = old['weight'] + new_weight * (1 - old['weight'])
        radius = old['radius'] * (average / weight - loss) / old['predicted'].clamp(group['eps'])
        radius = radius.clamp((1 - self.gamma) ** progress, 1 + self.gamma**progress)
        self.region = {
            'radius': torch.where(radius.isfinite(), radius, old['radius']),
            'loss': torch.where(finite, average, old['loss']),
            'weight': torch.where(finite, weight, old['weight']),
            'predicted': torch.where(predicted.isfinite(), predicted, old['predicted']),
            'skipped': old['skipped'] + finite.logical_not(),
        }
        self._warn_nonfinite_loss(step)

    def _warn_nonfinite_loss(self, step: int) -> None:
        """Warns once of a non-finite loss; on a GPU one step later, to avoid a wait."""
        self._reported.copy_(self.region['skipped'], non_blocking=True)
        if not self._warned and self._reported:
            self._warned = True
            logger.warning(
                'SOAA: the loss of step %d, or of one just before, is not finite; the '
                'trust radius stays as it was (reported once)',
                step,
            )


def _trusted_updates(
    moments: Moments, correction: Tensor, radius: Tensor
) -> tuple[list[Tensor], Tensor]:
    """``u = d m / (max(d F, sqrt(v)) + eps)`` of one batch, and ``<m, u> - <v, u^2> / 2``."""
    first, second = moments.first, moments.second
    bias1, bias2 = moments.biases
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, bias2**0.5)
    factor = (correction * radius.to(correction.device) / bias2).to(first[0].dtype)
    fisher = (
        torch._foreach_mul(second, list(factor))
        if factor.ndim
        else torch._foreach_mul(second, factor)
    )
    torch._foreach_maximum_(scale, fisher)
    torch._foreach_add_(scale, moments.group['eps'])
    u = torch._foreach_div(first, scale)
    torch._foreach_mul_(u, (radius / bias1).to(first[0]))
    quadratic_term = torch._foreach_mul(second, u)
    torch._foreach_mul_(quadratic_term, u)
    gain = _sums(torch._foreach_mul(first, u)) / bias1 - _sums(quadratic_term) / (2 * bias2)
    return list(u), gain.sum()


def _sums(tensors: Sequence[Tensor], shifts: list[float] | None = None) -> Tensor:
    """Sum of each tensor in float64; no entry may be negative."""
    sums = torch._foreach_norm(list(tensors), 1)
    if shifts is not None:
        torch._foreach_add_(sums, shifts)
    return torch.stack(sums).double()
