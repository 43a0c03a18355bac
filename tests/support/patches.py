"""Forms of the patches' moment: captures of single layers, and the methods that choose a form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmprecond.curvature import INPUT, Moment, PatchForm, Statistic
from mmprecond.curvature.capture import Capture
from mmprecond.curvature.conv import Conv2dLayer
from mmprecond.optimizers import FSGD, KFAC, NKFAC, SGDMBK, AdaAFOpt, AdamR, AdaNKFAC, FAdam
from tests.support.capture import loss_of

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    'NKFAC': (NKFAC, dict(solver='cholesky')),
    'AdaNKFAC': (AdaNKFAC, dict(solver='cholesky')),
    'KFAC': (KFAC, {}),
    'FSGD': (FSGD, dict(solver='exact')),
    'FAdam': (FAdam, dict(solver='exact', exponent=0.5)),
    'AdaAFOpt': (AdaAFOpt, dict(solver='exact')),
    'SGDMBK': (SGDMBK, dict(solver='eigh')),
    'SGDMBK, newton_schulz': (SGDMBK, dict(root_steps=6)),
}
RESUMED = {
    **METHODS,
    'AdamR': (AdamR, {}),
    'AdamR, qr': (AdamR, dict(basis_solver='qr')),
    'lowrank': (NKFAC, dict(solver='lowrank')),
}


def layer_of(module: nn.Module, capture_mb: float = 64.0, kind: Any = Conv2dLayer) -> Any:
    weight: Any = module.weight
    return kind('weight', [module], weight, module.bias, capture_mb=capture_mb)


def measured(layer: Any, statistic: Statistic, *inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    capture = Capture()
    capture.arm({layer: (statistic,)}, seed)
    for x in inputs:
        loss_of(layer.modules[0](x)).backward()
    capture.disarm()
    return capture.staged[layer].sums


def traces(form: PatchForm, moment: Tensor) -> list[Tensor]:
    """The partial traces (b, c, c) and (b, p, p) of a moment of whole patches, and its ones."""
    c, p = form.channels, form.positions
    patches = moment[:, : c * p, : c * p].reshape(-1, c, p, c, p)
    parts = [torch.einsum('bcpdp->bcd', patches), torch.einsum('bcpcq->bpq', patches)]
    return [*parts, moment[:, -1:, -1:]] if form.joint else parts


def sums_and_traces(
    layer: Any, form: PatchForm, *inputs: Tensor, rows: Any = None
) -> tuple[list[Tensor], list[Tensor]]:
    """What is measured in a form, and the partial traces of the whole moment."""
    own, whole = Statistic(INPUT, form), Statistic(INPUT, Moment())
    if rows is not None:
        own, whole = own.over(rows), whole.over(rows)
    assert layer.lacks(own) == ''
    found = measured(layer, own, *inputs)
    assert list(found) == list(own.keys)
    (moment,) = measured(layer, whole, *inputs).values()
    return list(found.values()), traces(form, moment)
