"""Weight normalisation: weights as length times unit vector (thesis 2.3.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm as parametrise


class Length(nn.Parameter):
    """Lengths of a weight's filters; copies of a model keep the type."""


def is_vector(parameter: Tensor) -> bool:
    """True if a parameter counts as 1-D: vectors, and lengths."""
    return parameter.dim() == 1 or isinstance(parameter, Length)


def weight_norm(model: nn.Module) -> nn.Module:
    """Parametrises the weight of every convolution as length times unit vector.

    The function is for networks without normalisation layers. Call it before the optimizer is
    built, so that SGDPH treats the lengths as 1-D parameters. Configs use `WeightNormConv2d`.

    Source: thesis 2.3.4, with torch's own parametrization.

    Args:
        model: The model, changed in place.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            _parametrise_weight(module)
    return model


class WeightNormConv2d(nn.Conv2d):
    """Convolution whose weight is length times unit vector: ``conv_cfg=dict(type=...)``.

    The arguments are those of `nn.Conv2d`. The initial weight follows Kaiming's rule (normal, fan
    out), because a config's `init_cfg` does not reach a computed weight. Checkpoints of plain
    convolutions load. The module cannot be fused with a batch normalisation (mmcv's
    `fuse_conv_bn`), nor pickled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        nn.init.kaiming_normal_(self.weight, mode='fan_out', nonlinearity='relu')
        _parametrise_weight(self)

    def init_weights(self) -> None:
        """Keeps the constructor's initial weight; MMCV would write to the computed weight."""


def _parametrise_weight(module: nn.Module) -> None:
    parametrised: Any = parametrise(module)
    parts = parametrised.parametrizations.weight
    parts.original0 = Length(parts.original0.detach())
    module.register_load_state_dict_pre_hook(_split_plain_weight)


def _split_plain_weight(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Splits the weight of a checkpoint that was saved without lengths."""
    weight = state.pop(f'{prefix}weight', None)
    if weight is not None:
        parts = module.parametrizations.weight[0].right_inverse(weight)
        for number, part in enumerate(parts):
            state[f'{prefix}parametrizations.weight.original{number}'] = part
