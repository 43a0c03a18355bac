"""SOAA: Adam with a diagonal Fisher and a trust region that the training loss widens or narrows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import argument_names, check_count, reject_unexpected
from ..distributed import sum_over_ranks, world_size
from ..rules.soaa import TrustRegionAdam
from .rule_optimizer import RuleOptimizer
from .settings import takes_settings

#: Key of the trust region in `state_dict()`.
REGION_KEY = 'trust_region'


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

        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Refused.

    Raises:
        ValueError: For values out of range; in `step`, for a missing loss or `total_steps`.
        TypeError: For unknown settings.
    """

    rule: TrustRegionAdam
    needs = 'loss'
    adds_to_state = True

    published: ClassVar[dict[str, Any]] = dict(
        betas=(0.9, 0.999), eps=1e-8, gamma=0.1, radius=10.0, sums='global'
    )

    @takes_settings
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        gamma: float = 0.1,
        radius: float = 10.0,
        total_steps: int | None = None,
        sums: str = 'global',
        **unexpected: Any,
    ) -> None:
        reject_unexpected('SOAA', unexpected, argument_names(SOAA))
        if isinstance(params, nn.Module):
            params = params.parameters()
        if total_steps is not None:
            check_count('total_steps', total_steps)
        self._requested_steps = total_steps
        self._planned_steps: int | None = None
        self._loss: Tensor | float | None = None
        super().__init__(
            params,
            TrustRegionAdam(gamma, radius, sums),
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        )
        self.rule.move_to(next(p.device for group in self.param_groups for p in group['params']))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run, or None where nobody has said."""
        return self._planned_steps if self._requested_steps is None else self._requested_steps

    def plan_steps(self, count: int) -> None:
        """Says how many optimizer steps the run has; a `total_steps` of the user's wins."""
        self._planned_steps = count

    @property
    def radius(self) -> Tensor:
        """The trust radius d of the next step, a scalar of float64."""
        return self.rule.region['radius']

    @property
    def loss(self) -> Tensor | float | None:
        """The loss of this step, None once `step` has used it; the mean over its samples."""
        return self._loss

    @loss.setter
    def loss(self, loss: Tensor | float | None) -> None:
        self.take_loss(loss)

    def take_loss(self, loss: Tensor | float | None) -> None:
        """Takes the loss of this step, as setting `loss` does.

        Raises:
            ValueError: For what is no single number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f'loss has the shape {tuple(loss.shape)}; give its mean, a number '
                    'or a tensor of one'
                )
            loss = loss.detach().reshape(())
        elif loss is not None and not isinstance(loss, (int, float)):
            raise ValueError(f'loss={loss!r} is no number; give the loss of the step')
        self._loss = loss

    def state_dict(self) -> dict[str, Any]:
        """Torch's state with one more key, 'trust_region': tensors and the number of steps."""
        return {**super().state_dict(), REGION_KEY: {'steps': self.t, **self.rule.region}}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state that `load_state_dict` refuses."""
        self._refuse_distributed_checkpoints()
        missing = {'steps', *self.rule.region} - set(state_dict.get(REGION_KEY, self.rule.region))
        if REGION_KEY not in state_dict or missing:
            lacking = ', '.join(sorted(missing)) if REGION_KEY in state_dict else REGION_KEY
            raise ValueError(
                f'the state was saved by another optimizer than SOAA: it has no '
                f'{lacking}; start afresh from the weights alone (load_from without '
                'resume)'
            )
        super().check_state_dict(state_dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state.

        Raises:
            ValueError: For the state of another optimizer.
        """
        self.check_state_dict(state_dict)
        region = state_dict[REGION_KEY]
        super().load_state_dict(state_dict)
        self.t = int(region['steps'])
        self.rule.load_region(region)

    # ---------------------------------------------------------------- step

    def _receive_loss(self, loss: Any) -> None:
        if loss is not None:
            self.take_loss(loss)

    def _update_curvature(self) -> None:
        if self._loss is None:
            raise ValueError(
                'SOAA needs the loss of each step; write `optimizer.loss = loss` '
                'before `optimizer.step()`, give step a closure that returns the loss,'
                " or in a config set constructor='PrecondOptimWrapperConstructor'"
            )
        if self.total_steps is None:
            raise ValueError(
                'SOAA needs the length of the run; give total_steps=..., the number '
                'of optimizer steps'
            )
        loss = torch.as_tensor(self._loss, dtype=torch.float64).to(self.radius.device, copy=True)
        self._loss = None
        sum_over_ranks([loss])  # to their mean
        self.rule.begin_step(loss / world_size(), self.t, self.total_steps, self.param_groups[0])
