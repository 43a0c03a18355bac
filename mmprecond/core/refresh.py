"""Refreshes: operators from a stack's statistics, with a second attempt in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ..curvature import Layer
from ..linalg import map_tensors
from .stack import LayerStack


def start_refresh(
    stack: LayerStack,
    positions: Sequence[int],
    reached: float = 1.0,
    dampings: Mapping[Layer, float] = MappingProxyType({}),
) -> Tensor:
    """Refreshes operators where that succeeds, without waiting for the device.

    Args:
        stack: The stack.
        positions: Positions in the stack.
        reached: Share of its target that the learning rate has reached.
        dampings: Dampings of layers whose damping is not their method's.

    Returns:
        Bool tensor of successes, for `finish_refresh`.
    """
    outcomes = torch.zeros(len(positions), dtype=torch.bool, device=stack.like.device)
    place = {position: at for at, position in enumerate(positions)}
    for chunk, exact in _chunks(stack, positions):
        previous = stack.operators_of(chunk) if stack.operators else None
        operators, succeeded = stack.method.refresh(
            stack.factors(chunk),
            None if exact else previous,
            stack.damping(chunk, reached, dampings),
        )
        stack.write(chunk, stack.method.align(operators, previous), succeeded)
        outcomes[[place[k] for k in chunk]] = succeeded
    return outcomes


def finish_refresh(
    stack: LayerStack,
    positions: Sequence[int],
    succeeded: Sequence[bool],
    reached: float = 1.0,
    dampings: Mapping[Layer, float] = MappingProxyType({}),
) -> list[bool]:
    """Retries failures in float64; returns the final successes."""
    pairs = zip(positions, succeeded, strict=True)
    return [
        outcome or _retry(stack, k, stack.damping([k], reached, dampings)) for k, outcome in pairs
    ]


def _retry(stack: LayerStack, position: int, damping: Tensor | None) -> bool:
    """Refreshes one layer from scratch in float64."""
    operators, succeeded = stack.method.refresh(
        stack.factors([position], torch.float64), None, damping
    )
    previous = map_tensors(stack.operators_of([position]), Tensor.double)
    operators = stack.method.align(operators, previous or None)
    dtype = stack.like.dtype
    stack.write([position], map_tensors(operators, lambda tensor: tensor.to(dtype)), succeeded)
    return bool(succeeded)


def _chunks(stack: LayerStack, positions: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
    """Yields positions to refresh together, with True for a refresh from scratch."""
    positions_by_mode: dict[bool, list[int]] = {}
    for k in positions:
        member = stack.members[k]
        exact = member.failures > 0 or stack.method.is_exact(member.refreshes)
        positions_by_mode.setdefault(exact, []).append(k)
    for exact, members in positions_by_mode.items():
        for chunk in stack.chunks(members):
            yield chunk, exact
