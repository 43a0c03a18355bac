"""SOAA: Adam with a diagonal Fisher and a trust region that the training loss widens or narrows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    argument_names,
    check_choice,
    check_count,
    check_number,
    reject_unexpected,
)
from ..distributed import sum_over_ranks, world_size
from ..rules import AdamW, Group, State
from .rule_optimizer import RuleOptimizer

logger = logging.getLogger('mmprecond')

#: Over what the correction of the Fisher sums.
SUMS = ('global', 'parameter')
KEY = 'trust_region'

#: Parameters, their first and second moments, their group, and how many steps they took.
Moments = tuple[list[Tensor], list[Tensor], list[Tensor], Group, int]


class TrustRegionAdam(AdamW):
    """Adam's moments and decoupled decay; `SOAA` makes the directions, from all moments together.

    Attributes:
        found: The moments of this step, one entry a batch of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Moments] = []

    @classmethod
    def check(cls, group: Group) -> None:
        super().check(group)
        check_number('eps', group['eps'], open_low=True)

    def directions(self, params: list[Tensor], gradients: list[Tensor], states: list[State],
                   group: Group) -> list[Tensor]:
        first, second, step = self.moments(params, gradients, states, group)
        self.found.append((params, first, second, group, step))
        return first


class SOAA(RuleOptimizer):
    """Second-order adaptive Adam.

    With Adam's bias-corrected moments m and v, the trust radius d and sums over all parameters::

        F = (1 + sum m^2 / sum(v + eps)) v        (the corrected diagonal Fisher)
        u = d m / (max(d F, sqrt(v)) + eps)
        p <- p - lr (weight_decay p + u)

    after which, with q the part of the run that is over, the loss l of the step, its bias-corrected
    moving average l' (with betas[0]) and the reduction that the last step predicted::

        d <- d (l' - l) / max(predicted, eps),  within [(1 - gamma)^q, 1 + gamma^q]
        predicted <- lr (<m, u> - <v, u^2> / 2)

    As F is about g^2, sqrt(v) is the larger wherever gradients are small: there it is AdamW with
    its rate times d.

    It needs the loss of every step: set ``optimizer.loss = loss`` before ``step()``, or give `step`
    a closure that returns it; MMEngine's wrapper does. Ranks of data parallelism take the mean of
    their losses. A loss that is not finite leaves d as it is.

    Source: arXiv 2410.02293. Its body was not at hand: F, u and d are as two independent accounts
    have them, the average of the loss and the predicted reduction as one of them alone.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        betas: Decays of the moments; the first also of the average loss (that of the first group).
        eps: Added to denominators; greater than 0.
        weight_decay: Decoupled decay.
        model: The module, if `params` are its parameters; of no use here.
        gamma: How far d may stay from 1 at the end of the run, in (0, 1).
        radius: d of the first step; 1 makes that step AdamW's.
        total_steps: Optimizer steps of the run. Under MMEngine it is known unless given here.
        sums: 'global', or 'parameter' for sums over each parameter by itself.

        **unexpected: Refused.

    Raises:
        ValueError: For values out of range; in `step`, for a missing loss or `total_steps`.
        TypeError: For unknown settings.
    """

    rule: TrustRegionAdam
    needs = 'loss'

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0., *, model: nn.Module | None = None,
                 gamma: float = 0.1, radius: float = 10., total_steps: int | None = None,
                 sums: str = 'global', **unexpected: Any) -> None:
        reject_unexpected('SOAA', unexpected, argument_names(SOAA))
        if isinstance(params, nn.Module):
            params = params.parameters()
        check_number('gamma', gamma, high=1, open_low=True)
        check_number('radius', radius, open_low=True)
        check_choice('sums', sums, SUMS)
        if total_steps is not None:
            check_count('total_steps', total_steps)
        self.gamma = gamma
        self.sums = sums
        self._given_steps = total_steps
        self._planned_steps: int | None = None
        self._loss: Tensor | float | None = None
        super().__init__(params, TrustRegionAdam(),
                         dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        # In float64 on the parameters' device: the loss's average, how much of it is there (the
        # bias correction), the predicted reduction, and the losses that were not finite.
        self._region = {'radius': self._number(radius), 'loss': self._number(0.),
                        'weight': self._number(0.), 'predicted': self._number(0.),
                        'skipped': self._number(0.)}
        self._skipped = torch.zeros((), dtype=torch.float64,
                                    pin_memory=self._region['skipped'].is_cuda)
        self._warned = False

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run, or None where nobody has said."""
        return self._planned_steps if self._given_steps is None else self._given_steps

    def plan_steps(self, count: int) -> None:
        """Says how many optimizer steps the run has; a `total_steps` of the user's wins."""
        self._planned_steps = count

    @property
    def radius(self) -> Tensor:
        """The trust radius d of the next step, a scalar of float64."""
        return self._region['radius']

    @property
    def loss(self) -> Tensor | float | None:
        """The loss of this step, None once `step` has used it; the mean over its samples."""
        return self._loss

    @loss.setter
    def loss(self, loss: Tensor | float | None) -> None:
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f'loss has the shape {tuple(loss.shape)}; give its mean, a number '
                                 'or a tensor of one')
            loss = loss.detach().reshape(())
        elif loss is not None and not isinstance(loss, (int, float)):
            raise ValueError(f'loss={loss!r} is no number; give the loss of the step')
        self._loss = loss

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One optimizer step.

        Args:
            closure: Evaluates the loss again, as in torch; what it returns is the step's loss.

        Returns:
            The closure's loss.
        """
        if closure is None:
            return super().step()

        def heard() -> Any:
            loss = closure()
            if loss is not None:
                self.loss = loss
            return loss

        return super().step(heard)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state with one more key, 'trust_region': tensors and the number of steps."""
        return {**super().state_dict(), KEY: {'steps': self.t, **self._region}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state.

        Raises:
            ValueError: For the state of another optimizer.
        """
        region = state_dict.get(KEY)
        if region is None:
            raise ValueError(f'the state was saved by another optimizer than SOAA: it has no {KEY};'
                             ' start afresh from the weights alone (load_from without resume)')
        super().load_state_dict({key: v for key, v in state_dict.items() if key != KEY})
        self.t = int(region['steps'])
        self._region = {name: region[name].to(value, copy=True)
                        for name, value in self._region.items()}

    # ---------------------------------------------------------------- step

    def _number(self, value: float) -> Tensor:
        device = next(p.device for group in self.param_groups for p in group['params'])
        return torch.full((), value, dtype=torch.float64, device=device)

    def _measure(self) -> None:
        if self._loss is None:
            raise ValueError('SOAA needs the loss of each step; write `optimizer.loss = loss` '
                             'before `optimizer.step()`, give step a closure that returns the loss,'
                             " or in a config set constructor='PrecondOptimWrapperConstructor'")
        if self.total_steps is None:
            raise ValueError('SOAA needs the length of the run; give total_steps=..., the number '
                             'of optimizer steps')
        self.rule.found = []  # an earlier step may have failed

    def _turn_back(self, directions: dict[Tensor, Tensor]) -> None:
        loss = self._joint_loss()
        found, self.rule.found = self.rule.found, []
        if not found:
            return
        predicted = self._number(0.)
        for (params, first, second, group, step), correction in zip(
                found, self._corrections(found), strict=True):
            bias1, bias2 = (1 - beta**step for beta in group['betas'])
            scale = torch._foreach_sqrt(second)
            torch._foreach_div_(scale, bias2**0.5)
            factor = (correction * self.radius.to(correction.device) / bias2).to(first[0].dtype)
            fisher = (torch._foreach_mul(second, list(factor)) if factor.ndim
                      else torch._foreach_mul(second, factor))
            torch._foreach_maximum_(scale, fisher)
            torch._foreach_add_(scale, group['eps'])
            u = torch._foreach_div(first, scale)
            torch._foreach_mul_(u, (self.radius / bias1).to(first[0]))
            bend = torch._foreach_mul(second, u)
            torch._foreach_mul_(bend, u)
            gain = _sums(torch._foreach_mul(first, u)) / bias1 - _sums(bend) / (2 * bias2)
            predicted += group['lr'] * gain.sum().to(predicted.device)
            directions.update(zip(params, u, strict=True))
        self._adapt(loss, predicted)

    def _joint_loss(self) -> Tensor:
        """The mean of the ranks' losses, which forgets this rank's."""
        given, self._loss = self._loss, None
        loss = (given.to(self.radius, copy=True) if isinstance(given, Tensor)
                else self._number(float(given or 0.)))
        sum_over_ranks([loss])
        return loss / world_size()

    def _corrections(self, found: list[Moments]) -> list[Tensor]:
        """``1 + sum m^2 / sum(v + eps)`` of each batch: a scalar, or one value a parameter."""
        squares, sums = [], []
        for _, first, second, group, step in found:
            bias1, bias2 = (1 - beta**step for beta in group['betas'])
            squares.append(torch.stack(torch._foreach_norm(first)).double().square() / bias1**2)
            shifts = [moment.numel() * bias2 * group['eps'] for moment in second]
            sums.append(_sums(second, shifts) / bias2)
        if self.sums == 'parameter':
            return [1 + square / total for square, total in zip(squares, sums, strict=True)]
        home = self.radius.device
        square = torch.stack([batch.sum().to(home) for batch in squares]).sum()
        total = torch.stack([batch.sum().to(home) for batch in sums]).sum()
        return [(1 + square / total).to(batch.device) for batch in squares]

    def _adapt(self, loss: Tensor, predicted: Tensor) -> None:
        """The radius of the next step, and what it is made with; what is not finite stays out."""
        old, group = self._region, self.param_groups[0]
        share = 1 - group['betas'][0]
        finite = loss.isfinite()
        average = old['loss'] + share * (loss - old['loss'])
        weight = old['weight'] + share * (1 - old['weight'])
        over = min(self.t / (self.total_steps or 1), 1.)
        radius = old['radius'] * (average / weight - loss) / old['predicted'].clamp(group['eps'])
        radius = radius.clamp((1 - self.gamma)**over, 1 + self.gamma**over)
        self._region = {
            'radius': torch.where(radius.isfinite(), radius, old['radius']),
            'loss': torch.where(finite, average, old['loss']),
            'weight': torch.where(finite, weight, old['weight']),
            'predicted': torch.where(predicted.isfinite(), predicted, old['predicted']),
            'skipped': old['skipped'] + finite.logical_not()}
        self._warn()

    def _warn(self) -> None:
        """Says once that a loss was not finite; on a GPU a step later, so as not to wait for it."""
        self._skipped.copy_(self._region['skipped'], non_blocking=True)
        if not self._warned and self._skipped:
            self._warned = True
            logger.warning('SOAA: the loss of step %d, or of one just before, is not finite; the '
                           'trust radius stays as it was (said once)', self.t)


def _sums(tensors: Sequence[Tensor], shifts: list[float] | None = None) -> Tensor:
    """The sum of each tensor, none of whose entries is negative, in float64."""
    sums = torch._foreach_norm(list(tensors), 1)
    if shifts is not None:
        torch._foreach_add_(sums, shifts)
    return torch.stack(sums).double()
