"""Damping that is proportional to the gradient's norm (``damping_form='gradient'``)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger('mmprecond')

#: Key in a checkpoint.
CHECKPOINT_KEY = 'gradient_damping'
#: Entries of its value.
PARTS = {'factor', 'smoothness', 'counted', 'before', 'norms', 'sums'}
#: Bounds of the factor.
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e3
#: Decay of the moving average of the gradient's norm.
DECAY = 0.9


class GradientDamping:
    """Common factor of all dampings: the gradient's norm, divided by its first value and gamma.

    The source adds ``|g| / gamma`` to the curvature, with a smoothness gamma that it doubles after
    a step with ``f - f' >= |g'|^2 / (8 |g| / gamma)`` and halves after another, where f' and g' are
    the loss and gradient at the new point. In stochastic training a step is not a full Newton step,
    and a single difference of losses is mostly noise. So gamma changes once in a window of steps.
    The mean loss of the window is compared with that of the window before, and the right-hand side
    is the sum over the window's steps of ``|g'|^2 |d| / (8 |g|)`` for a step d: the same for a full
    step ``d = g / (|g| / gamma)``. |g| in the factor is a moving average. gamma starts so that the
    first damping equals the setting.

    Source: Gradient-Normalized Smoothness for Optimization with Approximate Hessians (arXiv
    2506.13710), Algorithm 1.

    Args:
        window: Steps of a window.

    Attributes:
        factor: Factor of the dampings.
        smoothness: gamma, in units of its first value.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._start()

    def _start(self) -> None:
        """Sets the state before the first step."""
        self.factor = 1.0
        self.smoothness = 1.0
        self._norms: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counted = 0
        self._previous_loss: float | None = None

    @torch.no_grad()
    def record_gradients(self, gradients: Iterable[Tensor], loss: Tensor) -> None:
        """Takes the gradients and the loss of a step, before a refresh.

        A loss or gradient that is not finite is left out.
        """
        norm = _norms(gradients).norm()
        loss = loss.to(norm.device, torch.float64)
        if self._norms and self._norms['first'].device != norm.device:  # of a checkpoint
            self._norms, self._sums = (
                {name: value.to(norm.device) for name, value in held.items()}
                for held in (self._norms, self._sums)
            )
        if not self._norms:
            zero = torch.zeros_like(norm)
            self._norms = dict(first=norm, average=norm, last=norm, length=zero)
            self._sums = dict(loss=zero.clone(), bound=zero.clone(), count=zero.clone())
        norms = self._norms
        for name in ('first', 'average', 'last'):  # until one is finite
            known = norms[name].isfinite() & (norms[name] > 0)
            norms[name] = torch.where(known, norms[name], norm)
        average = DECAY * norms['average'] + (1 - DECAY) * norm
        bound = norm**2 * norms['length'] / (8 * norms['last'].clamp(min=1e-300))
        finite = norm.isfinite() & loss.isfinite()
        norms['average'] = torch.where(finite, average, norms['average'])
        norms['last'] = torch.where(finite, norm, norms['last'])
        self._sums['loss'] += torch.where(finite, loss, 0.0)
        self._sums['bound'] += torch.where(finite, bound, 0.0)
        self._sums['count'] += finite
        self._counted += 1

    @torch.no_grad()
    def record_updates(self, updates: Iterable[Tensor], rates: Iterable[float]) -> None:
        """Takes the updates of a step, each with its learning rate: the step is their product."""
        norms = _norms(updates)
        self._norms['length'] = (norms * torch.tensor(list(rates)).to(norms)).norm()

    def update_factor(self) -> float:
        """The factor for a refresh; a full window changes the smoothness first."""
        if not self._norms:
            return self.factor
        if self._counted >= self.window:
            mean = float(self._sums['loss'] / self._sums['count'].clamp(min=1))
            if self._previous_loss is not None:
                enough = self._previous_loss - mean >= float(self._sums['bound'])
                self.smoothness *= 2.0 if enough else 0.5
            self._previous_loss, self._counted = mean, 0
            for total in self._sums.values():
                total.zero_()
        first = float(self._norms['first'])
        share = float(self._norms['average']) / first if first else 1.0
        self.factor = min(max(share / self.smoothness, MIN_FACTOR), MAX_FACTOR)
        self.smoothness = share / self.factor if share else self.smoothness  # within the bounds too
        return self.factor

    def state_dict(self) -> dict[str, Any]:
        """State under the key of the checkpoint."""
        plain = dict(
            factor=self.factor,
            smoothness=self.smoothness,
            counted=self._counted,
            before=self._previous_loss,
        )
        return {CHECKPOINT_KEY: {**plain, 'norms': dict(self._norms), 'sums': dict(self._sums)}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned; without it, or if parts are missing, starts anew."""
        self._start()
        state = saved.get(CHECKPOINT_KEY)
        if state is None:
            return
        if not isinstance(state, Mapping) or not PARTS <= state.keys():
            logger.warning('the checkpoint has no complete %s, which starts anew', CHECKPOINT_KEY)
            return
        self.factor, self.smoothness = state['factor'], state['smoothness']
        self._counted, self._previous_loss = state['counted'], state['before']
        self._norms, self._sums = (
            {name: value.clone() for name, value in state[part].items()}
            for part in ('norms', 'sums')
        )


def _norms(tensors: Iterable[Tensor]) -> Tensor:
    """Norms (k,) of k tensors, in float64 on the device of the first."""
    norms = torch._foreach_norm(list(tensors))
    return torch.stack([norm.to(norms[0].device) for norm in norms]).double()
