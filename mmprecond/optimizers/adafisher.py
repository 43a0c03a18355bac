"""AdaFisher and AdaFisherW: momentum divided by a diagonal of Kronecker factors."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..linalg import at_least_float32
from ..preconditioners import FisherDiagonal
from ..rules import EMASGD
from .base import PreconditionedOptimizer
from .settings import split_settings


class FisherEMASGD(EMASGD):
    """EMASGD whose `AdaFisher` averages, of parameters without inputs, stay in float32."""

    exact = ('fisher_gradient', 'fisher_input')


class AdaFisher(PreconditionedOptimizer):
    """Moving average of the gradients divided by s h' + lambda, with L2 decay.

    Updates of parameters outside Linear layers and convolutions (norms, tokens) are divided by
    s h + lambda too, with s from their own squared gradients and h from ones. The published code
    divides them by 1, so that their steps are a thousand times smaller than all others. Its norm
    layers have a factor that is always 0 or 1.

    Source: AdaFisher (arXiv 2405.16397).

    Args:
        params: Parameters or groups, with `model`; or the module itself.
        lr: Learning rate.
        momentum: Decay of the gradients' average.
        weight_decay: L2 decay, added to the gradient.
        model: The module that owns the parameters.
        **settings: Settings of `FisherDiagonal` (`stat_decay`, `damping`, `ema`, `stat_interval`,
            ...) and of `PreconditionedOptimizer`. ``settings='published'`` starts from those of the
            published code.

    Raises:
        ValueError: If a value is out of range or the model is missing.
        TypeError: If a setting is unknown.
    """

    preconditioner = FisherDiagonal
    decay: ClassVar[str] = 'added'

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        method, options = split_settings(self, self.preconditioner, settings)
        super().__init__(
            params,
            model=model,
            rule=FisherEMASGD(self.decay),
            method=method,
            defaults=dict(lr=lr, momentum=momentum, weight_decay=weight_decay),
            **options,
        )
        self._layer_params = {p for layer in self.curvature.layers for p in layer.parameters}

    @property
    def method(self) -> FisherDiagonal:
        """The method of all layers, at its present intervals."""
        return cast(FisherDiagonal, self.curvature.stacks[0].method)

    def _precondition(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if self.curvature.schedule.captures_others(self.method, self.t):
            for p, gradient in gradients.items():
                if p not in self._layer_params:
                    self._update_own_factors(self.state[p], gradient)
        return super()._precondition(gradients)

    def _update_own_factors(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Merges the squared gradient of a parameter, with ones as its inputs."""
        sample = gradient.to(at_least_float32(gradient.dtype)).square()
        if 'fisher_gradient' not in state:
            state['fisher_gradient'] = torch.zeros_like(sample)
            state['fisher_input'] = sample.new_zeros(())
            state['fisher_samples'] = 0
        average, merged = self.method.average(), state['fisher_samples']
        average.merge(state['fisher_gradient'], sample, merged)
        average.merge_plain(state['fisher_input'], torch.ones_like(state['fisher_input']), merged)
        state['fisher_samples'] += 1

    def _restore_updates(self, updates: dict[Tensor, Tensor]) -> None:
        super()._restore_updates(updates)
        for group in self.param_groups:
            damping = group.get('damping') or self.method.damping
            damping = self.method.warmed(damping, self.curvature.warm_up.reached)
            for p in group['params']:
                if p in updates and p not in self._layer_params and 'fisher_input' in self.state[p]:
                    state = self.state[p]
                    fisher = state['fisher_gradient'] * state['fisher_input'] + damping
                    updates[p] = updates[p] / fisher.to(updates[p])


class AdaFisherW(AdaFisher):
    """AdaFisher with decoupled weight decay."""

    decay = 'decoupled'
