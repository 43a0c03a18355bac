"""Memory forecast of the curvature, and a check against the free memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..curvature import Layer
from .sharding import Sharding
from .stack import CHUNK_BYTES, LayerStack

#: Number of copies of the statistics in a refresh: damped, factorised, inverted.
REFRESH_COPIES = 3


def megabytes(layer: Layer, stack: LayerStack, operators: bool = True) -> float:
    """Megabytes of a layer's statistics and, if `operators`, of its operators."""
    numbers = sum(
        b * n * m for statistic in stack.kept for b, n, m in layer.shapes(statistic).values()
    )
    if operators:
        numbers += sum(
            tensor.numel() for operator in stack.outline.values() for tensor in operator.tensors
        )
    return numbers * layer.working_dtype.itemsize / 2**20


def held_megabytes(stacks: Sequence[LayerStack], sharding: Sharding) -> float:
    """Megabytes of what is held now on this rank."""
    return sum(
        megabytes(member.layer, stack, sharding.holds(stack))
        for stack in stacks
        for member in stack.members
    )


def forecast(
    layers: Mapping[Layer, LayerStack], sharding: Sharding
) -> dict[torch.device, tuple[float, float]]:
    """Megabytes by device: kept once all trained layers were measured, and extra at a refresh.

    The extra memory of a refresh is that of the largest stack. The forecast does not include
    activations and the rule's moments.
    """
    persistent: dict[torch.device, float] = {}
    working: dict[torch.device, float] = {}
    statistics: dict[LayerStack, float] = {}
    for layer, stack in layers.items():
        if not layer.weight.requires_grad:
            continue
        device = layer.weight.device
        held = megabytes(layer, stack, sharding.holds(stack))
        persistent[device] = persistent.get(device, 0.0) + held
        if sharding.mine(stack):
            own = megabytes(layer, stack, False)
            statistics[stack] = statistics.get(stack, 0.0) + own
            size = REFRESH_COPIES * min(statistics[stack], max(CHUNK_BYTES / 2**20, own))
            working[device] = max(working.get(device, 0.0), size)
    return {device: (size, working.get(device, 0.0)) for device, size in persistent.items()}


def available(device: torch.device) -> float:
    """Free megabytes of a device; infinite if they are unknown."""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + unused) / 2**20
    if device.type != 'cpu':
        return float('inf')
    try:
        with open('/proc/meminfo', encoding='ascii') as lines:
            meminfo = dict(line.split(':') for line in lines)
        return int(meminfo['MemAvailable'].split()[0]) / 2**10
    except (OSError, KeyError, ValueError):
        return float('inf')


def check_memory_budget(layers: Mapping[Layer, LayerStack], sharding: Sharding, owner: str) -> None:
    """Raises ValueError, with the numbers, if a device lacks the memory for the forecast.

    Args:
        layers: The layers and their stacks.
        sharding: Distribution of the operators over ranks.
        owner: Name of the optimizer.
    """
    for device, (persistent, working) in forecast(layers, sharding).items():
        free = available(device)
        if persistent + working <= free:
            continue
        sizes = sorted(
            (
                (megabytes(layer, stack, sharding.holds(stack)), layer.name)
                for layer, stack in layers.items()
                if layer.weight.device == device
            ),
            reverse=True,
        )
        largest = ', '.join(f'{name} {size:,.0f} MB' for size, name in sizes[:3])
        raise ValueError(
            f'{owner} would keep {persistent:,.0f} MB of statistics and operators on '
            f'{device} and take {working:,.0f} MB more at a refresh, but {free:,.0f} MB are free '
            f'(the largest: {largest}); {_memory_advice(layers, sharding)}'
        )


def _memory_advice(layers: Mapping[Layer, LayerStack], sharding: Sharding) -> str:
    """Advice on settings that lower the memory of these methods."""
    methods = {stack.method for stack in layers.values()}
    advice = ['lower max_dim']
    if any(not m.rotates and m.oversize != 'lowrank' for m in methods):
        advice[0] += " and set oversize='lowrank'"
    advice.append('leave layers out with custom_keys={name: dict(precondition=False)}')
    if sharding.requested != 'apply' and not any(m.acts_after_rule for m in methods):
        advice.append("with several GPUs set sharding='apply'")
    return '; '.join([*advice, 'or set check_memory=False where layers are never used'])
