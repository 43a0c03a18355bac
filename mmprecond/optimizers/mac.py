"""MAC and SMAC: gradients without their part along the mean input."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..curvature import AttentionLayer, Call, Layer
from ..distributed import sum_over_ranks
from ..preconditioners import ActivationMean, CalibratedInput, Preconditioner
from . import checkpoint
from .families import PreconditionedSGDM

logger = logging.getLogger('mmprecond')


class MAC(PreconditionedSGDM):
    """SGD with momentum on G (I - a a' / (rho + a'a)), a the mean input (arXiv 2506.08464).

    Call `calibrate_first_layer` before the first step, as published; in a config
    ``custom_hooks=[dict(type='CalibrationHook')]`` does. Else the first layer is treated like any
    other. Arguments as in `PreconditionedSGDM`; settings as in `ActivationMean`.
    """

    preconditioner = ActivationMean

    @property
    def first_layer(self) -> Layer:
        """The layer whose weight comes first in the model."""
        return next(iter(self.layers))

    @property
    def calibrated(self) -> bool:
        """Whether the first layer has its own second moment."""
        return isinstance(self.layers[self.first_layer].method, CalibratedInput)

    @torch.no_grad()
    def calibrate_first_layer(self, inputs: Tensor | Iterable[Tensor]) -> None:
        """Gives the first layer the exact inverse of its inputs' second moment, for good.

        With several ranks each gives its own share.

        Args:
            inputs: What the layer takes (for most networks the images), in one or many batches.

        Raises:
            ValueError: After the first step, for no inputs or ones that are not finite, or a first
                layer that is too large or reads other things than its input.
        """
        layer = self.first_layer
        module = layer.modules[0]
        method = self.layers[layer].method
        if self.t or isinstance(layer, AttentionLayer) or not isinstance(method, ActivationMean):
            raise ValueError('calibrate_first_layer is for a first Linear or Conv2d, before the '
                             f'first step; this is {layer.name} after {self.t} steps')
        if layer.columns > method.max_dim:
            raise ValueError(f'{layer.name} takes {layer.columns} numbers, more than '
                             f'max_dim={method.max_dim}; leave it uncalibrated')
        moment = layer.empty('input_moment')
        rows = moment.new_zeros((), dtype=torch.float64)
        for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
            batch = batch.to(layer.weight.device, layer.weight.dtype)
            moment += layer.input_moment(module, batch)
            rows += layer.count_rows(Call(layer, module), module(batch), ())
        sum_over_ranks([moment, rows])
        if not float(rows) or not bool(moment.isfinite().all()):
            raise ValueError(f'{layer.name} was to be calibrated on {int(rows)} rows of input, '
                             'which must be finite and more than none')
        self._treat_first(CalibratedInput(damping=method.damping, compat=method.compat,
                                          max_dim=method.max_dim))
        self.layers[layer].merge({layer: {'input_moment': moment / float(rows)}})
        logger.info('%s: calibrated on %d rows', layer.name, int(rows))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, with the first layer as it was treated there."""
        layers = (state_dict.get(checkpoint.KEY) or {}).get('layers') or {}
        saved = layers.get(self.first_layer.name) or {}
        usual = self._usual
        if saved.get('method') == CalibratedInput.__name__:
            self._treat_first(CalibratedInput(damping=usual.damping, compat=usual.compat,
                                              max_dim=usual.max_dim))
        elif self.calibrated:
            self._treat_first(usual)
        super().load_state_dict(state_dict)

    def _measure(self) -> None:
        if self.t == 0 and not self.calibrated:
            logger.info('%s: the first layer is treated like any other, as calibrate_first_layer '
                        'was not called', self.first_layer.name)
        super()._measure()

    @property
    def _usual(self) -> ActivationMean:
        """How all other layers are treated."""
        found = [stack.method for stack in self.stacks
                 if isinstance(stack.method, ActivationMean)]
        return found[0]

    def _treat_first(self, method: Preconditioner) -> None:
        """Gives the first layer another method, and all layers empty stacks."""
        taken = {layer: stack.method for layer, stack in self.layers.items()}
        self.layers = self._stack({**taken, self.first_layer: method})
        self._capture.requires = {layer: stack.requires for layer, stack in self.layers.items()}
        self._arm_if_automatic()


class SMAC(MAC):
    """MAC with the gradients' side: Z G (I - ...), Z = diag(1 / (z + rho)).

    Arguments and settings as in `MAC`; `gradient_scale` says how the gradients are counted.
    """

    preset = dict(output=True)
