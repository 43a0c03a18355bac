"""Running statistics as a refresh takes them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmprecond import curvature
from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    WEIGHT,
    Columns,
    Factor,
    Mean,
    Moment,
    Side,
    Square,
    Statistic,
)


def factors_of(tensors: Mapping[str, Tensor]) -> dict[Side, Factor]:
    """Running statistics as a refresh takes them, from stacked tensors by their names."""
    attention = {
        statistic.key: statistic
        for statistic in vars(curvature.attention).values()
        if isinstance(statistic, Statistic)
    }
    forms = {'moment': Moment(), 'columns': Columns(), 'mean': Mean(), 'square': Square()}
    found: dict[Side, Factor] = {}
    for name, tensor in tensors.items():
        if name == 'weight':
            found[WEIGHT] = Factor(Moment(), (tensor,))
        elif name in attention:
            found[attention[name].side] = Factor(attention[name].form, (tensor,))
        else:
            side, form = name.split('_')
            found[{'input': INPUT, 'gradient': GRADIENT}[side]] = Factor(forms[form], (tensor,))
    return found
