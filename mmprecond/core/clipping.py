"""Clips of directions: one factor for many layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import at_least_float32


def kl_clip(
    bound: float,
    layers: Sequence[Layer],
    rates: Mapping[Tensor, float],
    raw: Mapping[Tensor, Tensor],
    directions: dict[Tensor, Tensor],
) -> None:
    """Scales directions V by nu = min(1, sqrt(bound / sum lr^2 <V, G>)), in place.

    V is F^-1 G. Twice the KL divergence of the step, nu^2 sum lr^2 <V, G>, therefore stays within
    the bound. The function does not wait for the device.

    Source: as in the public KFAC baselines (Ba, Grosse and Martens, 2017, section 5).

    Args:
        bound: The bound.
        layers: The layers whose parameters are summed over and scaled, where they are trained.
        rates: Learning rates by parameter.
        raw: Gradients G by parameter.
        directions: Preconditioned gradients V by parameter; those of the layers are replaced.
    """
    clipped = [
        p
        for layer in layers
        if layer.weight in directions
        for p in layer.parameters
        if p in directions
    ]
    if not clipped:
        return
    products = [rates[p] ** 2 * (directions[p].double() * raw[p].double()).sum() for p in clipped]
    total = torch.stack([product.to(products[0].device) for product in products]).sum()
    factor = (bound / total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp(max=1)
    for p in clipped:
        directions[p] = directions[p] * factor.to(directions[p])


def clip_norm(directions: dict[Tensor, Tensor], largest: float) -> None:
    """Scales all directions by min(1, largest / joint norm), without a wait for the device.

    Args:
        directions: Directions by parameter; the tensors are replaced in the dict.
        largest: Bound of the joint norm.
    """
    if not directions:
        return
    device = next(iter(directions.values())).device
    wide = [d.to(at_least_float32(d.dtype)) for d in directions.values()]
    norms = torch._foreach_norm(wide)
    total = torch.stack([norm.to(device, torch.float64) for norm in norms]).norm()
    factor = (largest / total.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1)
    for p, direction in directions.items():
        directions[p] = direction * factor.to(direction)
