"""MAC and SMAC: gradients with a smaller part along the mean input."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checkpoint
from ..curvature import INPUT, Call, Factor, Layer, Moment, Statistic, layer_type, unwrap
from ..distributed import sum_over_ranks
from ..linalg import matmul_precision
from ..preconditioners import ActivationMean, CalibratedInput
from .families import PreconditionedSGDM

logger = logging.getLogger('mmprecond')


class MAC(PreconditionedSGDM):
    """SGD with momentum on G (I - a a' / (rho + a'a)), a the mean input (arXiv 2506.08464).

    The published method calls `calibrate_first_layer` before the first step. In a config
    ``custom_hooks=[dict(type='CalibrationHook')]`` does so. Without the call the first layer is
    treated like any other. Arguments are those of `PreconditionedSGDM`, settings those of
    `ActivationMean`.
    """

    preconditioner = ActivationMean

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, model=model, **settings)
        owner: Any = params if isinstance(params, nn.Module) else model
        first = next((m for m in unwrap(owner).modules() if layer_type(m) is not None), None)
        self.first_layer: Layer | None = next(
            (layer for layer in self.curvature.layers if first in layer.modules), None
        )
        self._usual: Any = self.curvature.stacks[0].method

    @property
    def calibrated(self) -> bool:
        """True if the first layer has a calibrated second moment."""
        return self.first_layer is not None and isinstance(
            self.curvature.layers[self.first_layer].method, CalibratedInput
        )

    @property
    def calibration_blocker(self) -> str:
        """Reason why the first layer cannot be calibrated now, or ''."""
        layer = self.first_layer
        if layer is None:
            return "the model's first Linear or convolution is not preconditioned"
        if self.calibrated:
            return f'{layer.name} is calibrated already'
        if self.t and any(s.holds(known) for known, s in self.curvature.layers.items()):
            return f'this is after {self.t} steps, not before the first'
        if not layer.weight.requires_grad:
            return f'{layer.name} is frozen'
        if len(layer.modules) > 1:
            return f'{layer.name} belongs to several modules'
        limit = self._usual.max_dim
        if limit is not None and layer.columns > limit:
            return f'{layer.name} takes {layer.columns} numbers, over max_dim={limit}'
        return ''

    @torch.no_grad()
    def calibrate_first_layer(self, inputs: Tensor | Iterable[Tensor]) -> None:
        """Gives the first layer the exact inverse of its inputs' second moment, permanently.

        It comes before the first step, or after a resume that brought no statistics.

        With several ranks each rank passes its own share of the inputs.

        Args:
            inputs: Inputs of the model's first Linear or convolution (mostly the images), in one
                or many batches.

        Raises:
            ValueError: If a layer was measured already, there are no inputs, an input is not
                finite, the moment cannot be inverted, or the first layer is left out, frozen,
                shared or too large.
        """
        layer = self.first_layer
        if layer is None or self.calibration_blocker:
            raise ValueError(f'calibrate_first_layer is not possible: {self.calibration_blocker}')
        moment, rows = self._moment_of_inputs(layer, inputs)
        if not rows or not bool(moment.isfinite().all()):
            raise ValueError(
                f'{layer.name} cannot be calibrated on {int(rows)} rows of input; '
                'give at least one row, and only finite numbers'
            )
        method, mean = self._build_calibrated_method(), moment / rows
        factors = {INPUT: Factor(Moment(), (mean[None],))}
        damping = self.curvature.dampings.current(self.param_groups).get(layer)
        if not bool(method.refresh(factors, None, damping)[1].all()):
            raise ValueError(
                f'the second moment of the inputs of {layer.name} cannot be inverted; raise damping'
            )
        self.curvature.precompute(layer, method, {Statistic(INPUT, Moment()).key: mean})
        self._prepare_next_step()
        logger.info('%s: calibrated on %d rows', layer.name, int(rows))

    @staticmethod
    def _moment_of_inputs(layer: Layer, inputs: Tensor | Iterable[Tensor]) -> tuple[Tensor, float]:
        """Sum of x x' over all input rows of all ranks, and their number."""
        module = layer.modules[0]
        moment = layer.unwritten_moment().zero_()
        rows = moment.new_zeros((), dtype=torch.float64)
        for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
            if not isinstance(batch, Tensor):
                raise ValueError(
                    f'calibrate_first_layer was given a {type(batch).__name__}; give '
                    'tensors, such as (x for x, y in loader)'
                )
            batch = batch.to(layer.weight.device, layer.weight.dtype)
            with matmul_precision('highest'):
                moment += layer.input_moment(module, batch)
            rows += layer.count_rows(Call(layer, module), module(batch), ())
        sum_over_ranks([moment, rows])
        return moment, float(rows)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, including the treatment of the first layer.

        A calibration stays if the state has no entry for the first layer.
        """
        self.check_state_dict(state_dict)
        layer = self.first_layer
        if layer is not None:
            saved = checkpoint.method_of(state_dict.get(checkpoint.CURVATURE_KEY), layer)
            if saved == CalibratedInput.__name__:
                self.curvature.reassign(layer, self._build_calibrated_method())
            elif saved == ActivationMean.__name__ and self.calibrated:
                self.curvature.reassign(layer, self._usual)
        super().load_state_dict(state_dict)
        if layer is not None and self.calibrated:
            self._reinvert_calibration(layer)

    def _reinvert_calibration(self, layer: Layer) -> None:
        """Schedules a new inverse for a calibrated first layer, as `damping` may have changed."""
        stack = self.curvature.layers[layer]
        if stack.holds(layer):
            stack.refresh_anew()
            return
        logger.warning('%s: its calibration is lost; it is treated like any other', layer.name)
        self.curvature.reassign(layer, self._usual)
        self._prepare_next_step()

    def _update_curvature(self) -> None:
        if self.t == 0 and self.first_layer is not None and not self.calibrated:
            logger.info(
                '%s: the first layer is treated like any other, as calibrate_first_layer '
                'was not called',
                self.first_layer.name,
            )
        super()._update_curvature()

    def _build_calibrated_method(self) -> CalibratedInput:
        usual = self._usual
        return CalibratedInput(damping=usual.damping, compat=usual.compat, max_dim=usual.max_dim)


class SMAC(MAC):
    """MAC with an output side: Z G (I - ...), Z = diag(1 / (z + rho)).

    Arguments and settings are those of `MAC`; `gradient_scale` sets the scale of the gradients.
    """

    preset = ActivationMean.variants['SMAC']
    published = preset
