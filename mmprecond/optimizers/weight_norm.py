"""Weights as length times direction, for networks without normalisation (thesis 2.3.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as parametrise


def is_vector(parameter: Tensor) -> bool:
    """Whether a parameter counts as 1-D: vectors, and the lengths made here."""
    return parameter.dim() == 1 or getattr(parameter, 'is_length', False)


def weight_norm(model: nn.Module) -> nn.Module:
    """Writes every convolution's weight as length times direction, for networks without norms.

    Call it before the optimizer is built: SGDPH then treats the lengths as 1-D parameters. A config
    takes `WeightNormConv2d` instead.

    Source: thesis 2.3.4, with torch's own parametrization.

    Args:
        model: Changed in place.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            _split_off_length(module)
    return model


class WeightNormConv2d(nn.Conv2d):
    """A convolution whose weight is length times direction: ``conv_cfg=dict(type=...)``.

    Arguments as for `nn.Conv2d`. It starts from Kaiming's rule (normal, fan out); a config's
    `init_cfg` does not reach a weight that is computed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        _split_off_length(self)

    def init_weights(self) -> None:
        """Keeps what the constructor chose, where MMCV would fill the computed weight."""


def _split_off_length(module: nn.Module) -> None:
    made: Any = parametrise(module)
    made.parametrizations.weight.original0.is_length = True
