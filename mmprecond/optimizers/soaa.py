"""SOAA: Adam with a diagonal Fisher and a trust region that depends on the training loss."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..checks import argument_names, reject_unexpected
from ..rules.soaa import TrustRegionAdam
from .length_input import LengthInput
from .loss_input import LossInput
from .rule_optimizer import RuleOptimizer, split_module
from .settings import takes_settings

#: Key of the trust region in `state_dict()`.
REGION_KEY = 'trust_region'


class SOAA(LossInput, LengthInput, RuleOptimizer):
    """Second-order adaptive Adam.

    m and v are Adam's bias-corrected moments, d is the trust radius, and sums are over all
    parameters. A step computes::

        F = (1 + sum m^2 / sum(v + eps)) v        (the corrected diagonal Fisher)
        u = d m / (max(d F, sqrt(v)) + eps)
        p <- p - lr (weight_decay p + u)

    It then updates d and the predicted reduction of the loss. q is the completed part of the run, l
    is the loss of the step, and l' is its bias-corrected moving average (with betas[0])::

        d <- d (l' - l) / max(predicted, eps),  within [(1 - gamma)^q, 1 + gamma^q]
        predicted <- lr (<m, u> - <v, u^2> / 2)

    F is about g^2, so sqrt(v) is larger wherever gradients are small. There the optimizer is AdamW
    with its learning rate times d.

    SOAA needs the loss of every step: set ``optimizer.loss = loss`` before ``step()``, or give
    `step` a closure that returns the loss. MMEngine's wrapper does so. Data-parallel ranks take the
    mean of their losses. A loss that is not finite leaves d unchanged.

    Source: arXiv 2410.02293. The full text was not available. F, u and d follow two independent
    accounts; the average of the loss and the predicted reduction follow only one of them.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        betas: Decays of the moments. The average loss has the first decay of the first group.
        eps: Added to denominators; greater than 0.
        weight_decay: Decoupled weight decay.
        model: The module, if `params` are its parameters; it is not used.
        gamma: Largest distance of d from 1 at the end of the run, in (0, 1).
        radius: d of the first step; 1 makes that step AdamW's.
        total_steps: Number of optimizer steps of the run. MMEngine supplies it if it is not given.
        sums: 'global', or 'parameter' for a sum over each parameter separately.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Other arguments, which are refused.

    Raises:
        ValueError: If a value is out of range; in `step`, if the loss or `total_steps` is missing.
        TypeError: If a setting is unknown.
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
        _, params = split_module(params, model)
        self._request_steps(total_steps)
        super().__init__(
            params,
            TrustRegionAdam(gamma, radius, sums),
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
        )
        self.rule.move_to(next(p.device for group in self.param_groups for p in group['params']))

    @property
    def radius(self) -> Tensor:
        """The trust radius d of the next step, a scalar of float64."""
        return self.rule.region['radius']

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
            ValueError: If another optimizer saved the state.
        """
        self.check_state_dict(state_dict)
        region = state_dict[REGION_KEY]
        super().load_state_dict(state_dict)
        self.t = int(region['steps'])
        self.rule.load_region(region)

    # ---------------------------------------------------------------- step

    def _update_curvature(self) -> None:
        loss = self._use_loss('SOAA', self.radius.device)
        if self.total_steps is None:
            raise ValueError(
                'SOAA needs the length of the run; give total_steps=..., the number '
                'of optimizer steps'
            )
        self.rule.begin_step(loss, self.t, self.total_steps, self.param_groups[0])
