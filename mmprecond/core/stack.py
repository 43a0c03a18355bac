"""State of a preconditioner on layers of equal shape, stacked so that one product serves all.

A layer joins its stack with its first captured statistics. A layer that is frozen or never used
costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..curvature import WEIGHT, Factor, Layer, Moment, RunningAverage, Side
from ..linalg import (
    Operators,
    from_tensors,
    join,
    map_tensors,
    named_tensors,
    take,
    write,
)
from ..preconditioners import Preconditioner

#: Number of bytes of statistics in a group of layers that are refreshed together.
CHUNK_BYTES = 2**29
#: Names of a member's counters.
COUNTERS = ('samples', 'refreshes', 'failures')


@dataclass
class Member:
    """One layer of a stack, with its samples merged, refreshes done, and failures in a row."""

    layer: Layer
    samples: int = 0
    refreshes: int = 0
    failures: int = 0

    @property
    def waiting(self) -> bool:
        """True before the first refresh; after a failure the next refresh comes on schedule."""
        return self.refreshes == 0 and self.failures == 0

    def count_sample(self) -> None:
        """Counts a sample that was merged."""
        self.samples += 1

    def forget_refreshes(self) -> None:
        """Makes the next refresh start from scratch."""
        self.refreshes = 0

    def count_refresh(self, succeeded: bool) -> None:
        """Counts the outcome of a refresh."""
        self.refreshes += succeeded
        self.failures = 0 if succeeded else self.failures + 1


class LayerStack:
    """Statistics and operators of layers with one shape, device and preconditioner.

    Args:
        method: The preconditioner.
        layer: The first layer of the stack.
        owner: Rank that refreshes the stack, or None if every rank does.

    Attributes:
        method: The preconditioner, at the intervals of now.
        original: The preconditioner, at the intervals of the start.
        kept: Statistics that the stack keeps.
        needed: Statistics that must be nonzero for a sample to count.
        outline: Operators of one layer in their likely shapes, on the meta device.
        archive: Another rank's operators in host memory, for checkpoints only.
        members: Layers of the stack with their counters, in the order of the stacked tensors.
        statistics: Running statistics (k, b, n, m) by tensor name.
        operators: Operators by slot, with leading dimension k. Rows of layers that were never
            refreshed are meaningless.
    """

    def __init__(self, method: Preconditioner, layer: Layer, owner: int | None = None) -> None:
        self.method = self.original = method
        self.owner = owner
        self.kept = method.selected_statistics(layer)
        self.needed = method.must_be_nonzero(layer)
        self.outline = method.outline(layer)
        shapes = tuple(tuple(layer.shapes(statistic).items()) for statistic in self.kept)
        operators = tuple(
            (slot, type(operator), tuple(t.shape for t in operator.tensors))
            for slot, operator in self.outline.items()
        )
        self._layout = (
            layer.shape,
            operators,
            self.kept,
            shapes,
            layer.working_dtype,
            layer.weight.device,
            owner,
        )
        self.clear()

    @property
    def key(self) -> tuple[Any, ...]:
        """Key that is equal for all layers of one stack."""
        return (self.original, *self._layout)

    def change_intervals(self, applied: Callable[[Preconditioner], Preconditioner]) -> None:
        """Takes the method at other intervals, made from the one of the start."""
        self.method = applied(self.original)

    def clear(self) -> None:
        """Forgets all layers."""
        self.members: list[Member] = []
        self.statistics: dict[str, Tensor] = {}
        self.operators: Operators = {}
        self.archive: Operators = {}
        self._index: dict[Layer, int] = {}

    @property
    def operator_tensors(self) -> dict[str, Tensor]:
        """The tensors of the operators (k, b, n, m) by their names in checkpoints."""
        return named_tensors(self.operators)

    @property
    def like(self) -> Tensor:
        """A tensor of the statistics' dtype and device."""
        return next(iter(self.statistics.values()))

    def holds(self, layer: Layer) -> bool:
        """True if the layer has statistics here."""
        return layer in self._index

    def leave(self, layer: Layer) -> None:
        """Forgets one layer."""
        if layer not in self._index:
            return
        rest = [k for k, member in enumerate(self.members) if member.layer is not layer]
        self.statistics = {name: s[rest] for name, s in self.statistics.items()} if rest else {}
        self.operators, self.archive = (
            map_tensors(held, lambda stacked: stacked[rest]) if rest else {}
            for held in (self.operators, self.archive)
        )
        self.members = [self.members[k] for k in rest]
        self._index = {member.layer: k for k, member in enumerate(self.members)}

    def ready(self) -> list[tuple[int, Layer]]:
        """Positions and layers that have an operator."""
        return [(k, member.layer) for k, member in enumerate(self.members) if member.refreshes]

    def chunks(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Yields positions in groups of limited memory."""
        layer_bytes = sum(s[0].numel() * s.element_size() for s in self.statistics.values())
        size = max(1, CHUNK_BYTES // layer_bytes)
        for start in range(0, len(positions), size):
            yield list(positions[start : start + size])

    # ---------------------------------------------------------------- statistics

    def merge(
        self,
        samples: dict[Layer, dict[str, Tensor]],
        sizes: Mapping[Layer, Mapping[str, float]] = MappingProxyType({}),
    ) -> None:
        """Merges samples into the running statistics and removes them from `samples`.

        Args:
            samples: Samples by layer and tensor name.
            sizes: Frobenius norms of the samples, where they are known.
        """
        newcomers = [layer for layer in samples if layer not in self._index]
        if newcomers:
            self._add_members(newcomers, samples[newcomers[0]])
        average = self.method.average()
        for layer in list(samples):
            self._merge_sample(layer, samples.pop(layer), sizes.get(layer, {}), average)

    def _merge_sample(
        self,
        layer: Layer,
        sample: dict[str, Tensor],
        sizes: Mapping[str, float],
        average: RunningAverage,
    ) -> None:
        position = self._index[layer]
        member = self.members[position]
        for statistic in self.kept:
            tensors = [sample[key] for key in statistic.keys]
            norm: Tensor | float = 1.0
            if average.normalise == 'norm':
                known = [sizes[key] for key in statistic.keys if key in sizes]
                norm = statistic.form.norm(tensors, known)
            for key, tensor in zip(statistic.keys, tensors, strict=True):
                average.merge(self.statistics[key][position], tensor, member.samples, norm)
        member.count_sample()

    def _add_members(self, layers: list[Layer], sample: dict[str, Tensor]) -> None:
        for layer in layers:
            self._index[layer] = len(self.members)
            self.members.append(Member(layer))
        for statistic in self.kept:
            for key in statistic.keys:
                empty = sample[key].new_zeros(len(layers), *sample[key].shape)
                old = self.statistics.get(key)
                self.statistics[key] = empty if old is None else torch.cat([old, empty])
        self.operators, self.archive = (
            map_tensors(held, _with_rows(len(layers))) for held in (self.operators, self.archive)
        )

    def factors(
        self, positions: Sequence[int], dtype: torch.dtype | None = None
    ) -> dict[Side, Factor]:
        """Factors for a refresh, with the weights if the method reads them.

        Args:
            positions: Positions of the layers.
            dtype: Dtype of the result; default: that of the statistics.
        """
        layers = [self.members[k].layer for k in positions]
        factors = {}
        for statistic in self.kept:
            tensors = tuple(take(self.statistics[key], positions) for key in statistic.keys)
            if dtype is not None:
                tensors = tuple(tensor.to(dtype) for tensor in tensors)
            factors[statistic.side] = Factor(
                statistic.form, statistic.form.finalize(tensors, layers, statistic.key)
            )
        if self.method.reads_weight(layers[0]):
            weights = torch.stack([layer.join(layer.weight) for layer in layers])
            factors[WEIGHT] = Factor(Moment(), (weights.to(dtype or weights.dtype),))
        return factors

    def damping(
        self,
        positions: Sequence[int],
        reached: float = 1.0,
        dampings: Mapping[Layer, float] = MappingProxyType({}),
    ) -> Tensor | None:
        """Dampings (k, 1) if they differ from the setting, else None.

        Args:
            positions: Positions of the layers.
            reached: Share of its target that the learning rate has reached.
            dampings: Dampings of layers whose damping is not their method's.
        """
        values = [dampings.get(self.members[k].layer) for k in positions]
        default = getattr(self.method, 'damping', None)
        if all(value is None for value in values) and (
            default is None or self.method.warmed(default, reached) == default
        ):
            return None
        own = [(default or 0.0) if value is None else value for value in values]
        return self.like.new_tensor([[self.method.warmed(value, reached)] for value in own])

    # ---------------------------------------------------------------- operators

    def operators_of(self, positions: Sequence[int]) -> Operators:
        """Operators of the layers at some positions."""
        if len(positions) == len(self.members):
            return self.operators
        return map_tensors(self.operators, lambda stacked: take(stacked, positions))

    def write(self, positions: Sequence[int], operators: Operators, succeeded: Tensor) -> None:
        """Stores operators where the refresh succeeded."""
        if (
            self.method.rank_search is not None
            and len(positions) == len(self.members)
            and bool(succeeded.all())
        ):  # all old operators are replaced, so the number of columns may shrink
            self.operators = map_tensors(operators, Tensor.contiguous)
            return
        self.operators = write(self.operators, operators, positions, len(self.members), succeeded)

    def receive(self, operators: Operators, archive: bool = False) -> None:
        """Stores another rank's operators; an archive serves checkpoints only."""
        if archive:
            self.archive = operators
        else:
            self.operators = operators

    def refresh_anew(self) -> None:
        """Makes the next step refresh all operators from scratch, as after new settings."""
        for member in self.members:
            member.forget_refreshes()

    # ---------------------------------------------------------------- checkpoints

    def export(self) -> Iterator[tuple[Layer, dict[str, Any]]]:
        """Yields each layer's state as plain tensors and numbers."""
        operators = named_tensors(self.operators or self.archive)
        for k, member in enumerate(self.members):
            yield (
                member.layer,
                {
                    'statistics': {name: s[k] for name, s in self.statistics.items()},
                    'operator': {name: o[k] for name, o in operators.items()},
                    **{name: getattr(member, name) for name in COUNTERS},
                },
            )

    def load(
        self, states: Mapping[Layer, Mapping[str, Any]], hold: bool = True, archive: bool = False
    ) -> None:
        """Replaces the stack's state with exported states, on the device of each weight.

        Args:
            states: States by layer.
            hold: Whether to hold the operators on the device.
            archive: Whether to keep the operators in host memory if `hold` is false.
        """
        self.clear()
        rows: list[Operators] = []
        statistics: dict[str, list[Tensor]] = {}
        for layer, state in states.items():
            self._index[layer] = len(self.members)
            self.members.append(Member(layer, *(int(state[name]) for name in COUNTERS)))
            for name, tensor in state['statistics'].items():
                statistics.setdefault(name, []).append(
                    tensor[None].to(layer.weight.device, layer.working_dtype)
                )
            saved = from_tensors(self.outline, state['operator'])
            place = layer.weight.device if hold else torch.device('cpu')
            rows.append(map_tensors(saved, _move_to(place, layer.working_dtype)))
        self.statistics = {name: torch.cat(parts) for name, parts in statistics.items()}
        if hold or archive:
            self.receive(join(rows), archive=not hold)


def _with_rows(count: int) -> Callable[[Tensor], Tensor]:
    return lambda old: torch.cat([old, old.new_zeros(count, *old.shape[1:])])


def _move_to(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device, dtype)
