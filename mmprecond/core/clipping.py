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
    pairs = [_at_least_float32([held[p] for p in clipped]) for held in (directions, raw)]
    sums = [product.sum(dtype=torch.float64) for product in torch._foreach_mul(*pairs)]
    terms = torch._foreach_mul(sums, [rates[p] ** 2 for p in clipped])
    total = torch.stack([term.to(terms[0].device) for term in terms]).sum()
    factor = (bound / total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().clamp(max=1)
    _scale(directions, clipped, factor)


def clip_norm(directions: dict[Tensor, Tensor], largest: float) -> None:
    """Scales all directions by min(1, largest / joint norm), without a wait for the device.

    Args:
        directions: Directions by parameter; the tensors are replaced in the dict.
        largest: Bound of the joint norm.
    """
    if not directions:
        return
    norms = torch._foreach_norm(_at_least_float32(list(directions.values())))
    total = torch.stack([norm.to(norms[0].device) for norm in norms]).double().norm()
    factor = (largest / total.clamp_min(torch.finfo(torch.float64).tiny)).clamp(max=1)
    _scale(directions, list(directions), factor)


def _at_least_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.to(at_least_float32(tensor.dtype)) for tensor in tensors]


def _scale(directions: dict[Tensor, Tensor], params: Sequence[Tensor], factor: Tensor) -> None:
    """Replaces the directions of some parameters by their products with a factor."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        alike.setdefault((directions[p].device, directions[p].dtype), []).append(p)
    for (device, dtype), members in alike.items():
        scaled = torch._foreach_mul([directions[p] for p in members], factor.to(device, dtype))
        directions.update(zip(members, scaled, strict=True))
