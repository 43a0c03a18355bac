"""The state of a preconditioner on layers of equal shape, stacked so that one product serves all.

A layer joins its stack with its first captured statistics: one that is frozen or never used
costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..curvature import BLOCKS, COLUMNS, SKETCH, Layer
from ..linalg import nystrom_columns
from ..preconditioners import Preconditioner
from ..preconditioners.sides import Stacked, alike

logger = logging.getLogger('mmprecond')

#: Consecutive failed refreshes of a layer after which training stops.
TOLERATED_FAILURES = 3

#: Names of a slot's counters.
COUNTERS = ('samples', 'refreshes', 'failures')


class RefreshError(RuntimeError):
    """A layer's refresh failed too often in a row."""


@dataclass
class Slot:
    """Counters of one layer: samples merged, refreshes that succeeded, failures in a row."""

    layer: Layer
    samples: int = 0
    refreshes: int = 0
    failures: int = 0

    @property
    def waiting(self) -> bool:
        """Whether no refresh was tried yet; after a failure the next one comes on schedule."""
        return self.refreshes == 0 and self.failures == 0


class LayerStack:
    """Statistics and operators of layers with one shape, device and preconditioner.

    Attributes:
        method: The preconditioner.
        requires: The statistics kept.
        owner: The rank that refreshes it, where that work is shared out, or None for all.
        archive: Operators in host memory, for a checkpoint by a rank that has no others.
        slots: The layers that joined, in the order of the stacked tensors.
        statistics: Running statistics (k, b, n, n) by name.
        operator: Operators by name, leading dimension k; rows of layers that were never refreshed
            are meaningless.
    """

    #: Refreshes work on so many bytes of statistics at a time.
    chunk_bytes = 2**29

    def __init__(self, method: Preconditioner, requires: tuple[str, ...],
                 owner: int | None = None) -> None:
        self.method = method
        self.requires = requires
        self.owner = owner
        self.archive: Stacked = {}
        self.slots: list[Slot] = []
        self.statistics: Stacked = {}
        self.operator: Stacked = {}
        self._index: dict[Layer, int] = {}

    def merge(self, samples: dict[Layer, dict[str, Tensor]],
              sizes: Mapping[Layer, Mapping[str, float]] = MappingProxyType({})) -> None:
        """Merges samples into the running statistics, emptying `samples` as it goes.

        Args:
            samples: By layer and statistic.
            sizes: Their Frobenius norms, where they are known.
        """
        newcomers = [layer for layer in samples if layer not in self._index]
        if newcomers:
            self._join(newcomers, samples[newcomers[0]])
        average = self.method.average()
        for layer in list(samples):
            slot = self.slots[self._index[layer]]
            known = sizes.get(layer, {})
            for name, sample in samples.pop(layer).items():
                average.merge(self.statistics[name][self._index[layer]], sample, slot.samples,
                              joint=BLOCKS in name, size=known.get(name))
            slot.samples += 1

    def holds(self, layer: Layer) -> bool:
        """Whether the layer has statistics here."""
        return layer in self._index

    def captures(self, layer: Layer, step: int) -> bool:
        """Whether a layer is measured at a step; one without statistics waits for no refresh."""
        if self.method.given:
            return False
        interval = (self.method.capture_interval if self.holds(layer)
                    else self.method.stat_interval)
        return self._count(layer, step) % interval == 0

    def due(self, step: int) -> list[int]:
        """Positions that are refreshed at a step: on schedule, or for the first time.

        A first refresh is tried as soon as there are statistics, if the method is eager.
        """
        return [k for k, slot in enumerate(self.slots)
                if self.method.eager and slot.waiting or self._scheduled(slot.layer, step)]

    def _count(self, layer: Layer, step: int) -> int:
        """What must be divisible by an interval; the phase and the layer's offset are in it."""
        return step + self.method.phase - layer.offset

    def _scheduled(self, layer: Layer, step: int) -> bool:
        count = self._count(layer, step)
        due = count >= self.method.phase and count % self.method.refresh_interval == 0
        return due and not self.method.given

    def start_refresh(self, positions: list[int]) -> Tensor:
        """Refreshes operators where that succeeds, without waiting for the device.

        Returns:
            Whether each succeeded (a bool tensor), to be passed to `finish_refresh`.
        """
        outcomes = torch.zeros(len(positions), dtype=torch.bool,
                               device=next(iter(self.statistics.values())).device)
        place = {position: at for at, position in enumerate(positions)}
        for chunk, exact in self._chunks(positions):
            previous = self.operators(chunk) if self.operator else None
            operator, good = self.method.refresh(self._source(chunk), None if exact else previous,
                                                 self._damping(chunk))
            operator = self.method.align(operator, previous)
            self._write(chunk, operator, good)
            outcomes[[place[k] for k in chunk]] = good
        return outcomes

    def finish_refresh(self, positions: list[int], good: Sequence[bool]) -> list[bool]:
        """Retries failures in float64; says what succeeded in the end."""
        return [fine or self._retry(k) for k, fine in zip(positions, good, strict=True)]

    def count_refresh(self, positions: list[int], good: Sequence[bool]) -> None:
        """Counts outcomes; a layer that failed keeps its last good operator.

        Raises:
            RefreshError: If a layer failed for the third time in a row.
        """
        for position, fine in zip(positions, good, strict=True):
            slot = self.slots[position]
            if fine:
                slot.refreshes += 1
                slot.failures = 0
                continue
            slot.failures += 1
            kept = 'its last good operator stays' if slot.refreshes else 'it takes the plain rule'
            logger.warning('%s: refresh failed (%d in a row), %s', slot.layer.name,
                           slot.failures, kept)
            if slot.failures >= TOLERATED_FAILURES:
                advice = 'raise `damping`, ' if hasattr(self.method, 'damping') else ''
                raise RefreshError(
                    f'{slot.layer.name}: {slot.failures} refreshes in a row failed although its '
                    f'statistics are finite; {advice}lower `lr`, or leave the layer out with '
                    'custom_keys={name: dict(precondition=False)}')

    def ready(self) -> list[tuple[int, Layer]]:
        """Positions and layers that have an operator."""
        return [(k, slot.layer) for k, slot in enumerate(self.slots) if slot.refreshes]

    def operators(self, positions: list[int]) -> Stacked:
        """The operators of some positions."""
        return {name: take(stacked, positions) for name, stacked in self.operator.items()}

    def export(self) -> Iterator[tuple[Layer, dict[str, Any]]]:
        """Each layer's state as plain tensors and numbers."""
        operator = self.operator or self.archive
        for k, slot in enumerate(self.slots):
            yield slot.layer, {
                'statistics': {name: s[k] for name, s in self.statistics.items()},
                'operator': {name: o[k] for name, o in operator.items()},
                'samples': slot.samples, 'refreshes': slot.refreshes,
                'failures': slot.failures}

    def load(self, states: dict[Layer, dict[str, Any]], hold: bool = True,
             archive: bool = False) -> None:
        """Replaces the stack's state by exported states, on each weight's own device.

        Args:
            states: The layers' states.
            hold: Whether operators are to be held on the device.
            archive: Whether they are otherwise to be kept in host memory.
        """
        self.slots, self._index = [], {}
        self.statistics, self.operator, self.archive = {}, {}, {}
        rows: dict[str, list[Stacked]] = {'statistics': [], 'operator': []}
        for layer, state in states.items():
            self._index[layer] = len(self.slots)
            self.slots.append(Slot(layer, *(int(state[name]) for name in COUNTERS)))
            for kind, found in rows.items():
                device = layer.weight.device if hold or kind == 'statistics' else 'cpu'
                found.append({name: tensor[None].to(device, layer.working_dtype)
                              for name, tensor in sorted(state[kind].items())})
        if states:
            self.statistics = _joined(rows['statistics'])
            if hold:
                self.operator = _joined(rows['operator'])
            elif archive:
                self.archive = _joined(rows['operator'])

    def _join(self, layers: list[Layer], sample: dict[str, Tensor]) -> None:
        for layer in layers:
            self._index[layer] = len(self.slots)
            self.slots.append(Slot(layer))
        for name in self.requires:
            empty = sample[name].new_zeros(len(layers), *sample[name].shape)
            old = self.statistics.get(name)
            self.statistics[name] = empty if old is None else torch.cat([old, empty])
        for name, old in self.operator.items():
            self.operator[name] = torch.cat([old, old.new_zeros(len(layers), *old.shape[1:])])

    def _chunks(self, chosen: list[int]) -> Iterator[tuple[list[int], bool]]:
        """Positions to refresh together, and whether exactly."""
        one = sum(s[0].numel() * s.element_size() for s in self.statistics.values())
        size = max(1, self.chunk_bytes // one)
        parts: dict[bool, list[int]] = {}
        for k in chosen:
            exact = self.slots[k].failures > 0 or self.method.is_exact(self.slots[k].refreshes)
            parts.setdefault(exact, []).append(k)
        for exact, positions in parts.items():
            for start in range(0, len(positions), size):
                yield positions[start:start + size], exact

    def _source(self, positions: list[int], dtype: torch.dtype | None = None) -> Stacked:
        """What operators are made of: statistics, and weights where the method reads them.

        Of a sketch, the columns that it gives.
        """
        layers = [self.slots[k].layer for k in positions]
        source = {name: layers[0].finished(name, take(s, positions))
                  for name, s in self.statistics.items()}
        if self.method.reads_weight(layers[0]):
            source['weight'] = torch.stack([layer.join(layer.weight) for layer in layers])
        if dtype is not None:
            source = {name: s.to(dtype) for name, s in source.items()}
        for name in [name for name in source if SKETCH in name]:
            sketch = source.pop(name)
            test = torch.stack([layer.test_matrix(name) for layer in layers]).to(sketch.dtype)
            source[name.replace(SKETCH, COLUMNS)] = nystrom_columns(sketch, test)
        return source

    def _damping(self, positions: list[int]) -> Tensor | None:
        """Dampings (k, 1) where a layer of these overrides the setting."""
        values = [self.slots[k].layer.damping for k in positions]
        if all(value is None for value in values):
            return None
        default = getattr(self.method, 'damping', 0.)
        like = next(iter(self.statistics.values()))
        return like.new_tensor([[default if v is None else v] for v in values])

    def _write(self, positions: list[int], operator: Stacked, good: Tensor) -> None:
        """Stores operators where the refresh succeeded."""
        whole = len(positions) == len(self.slots)
        if self.method.low_rank is not None:
            if whole and bool(good.all()):  # nothing of the old is kept, and fewer columns may do
                self.operator = {name: new.contiguous() for name, new in operator.items()}
                return
            operator, self.operator = alike(operator, self.operator)
        for name, new in operator.items():
            if name not in self.operator:
                self.operator[name] = new.new_zeros(len(self.slots), *new.shape[1:])
            old = self.operator[name]
            chosen = good.reshape(-1, *[1] * (new.dim() - 1))
            # Row-major, as a loaded state is: products round alike before and after a resume.
            merged = torch.where(chosen, new, take(old, positions)).contiguous()
            if whole:
                self.operator[name] = merged
            else:
                old[positions] = merged

    def _retry(self, position: int) -> bool:
        """One exact refresh in float64."""
        statistics = self._source([position], torch.float64)
        operator, good = self.method.refresh(statistics, None, self._damping([position]))
        previous = {name: o.double() for name, o in self.operators([position]).items()}
        operator = self.method.align(operator, previous or None)
        dtype = next(iter(self.statistics.values())).dtype
        self._write([position], {n: o.to(dtype) for n, o in operator.items()}, good)
        return bool(good)


def take(stacked: Tensor, positions: list[int]) -> Tensor:
    """Rows of a stacked tensor; all of them without a copy."""
    return stacked if len(positions) == len(stacked) else stacked[positions]


def _joined(rows: list[Stacked]) -> Stacked:
    """Rows of layers as one, in a common form; zeros for a layer that has none yet."""
    common: Stacked = {}
    for row in rows:
        common = alike(common, row)[0] if common else row
    parts = [alike(row, common)[0] if row else {n: torch.zeros_like(o) for n, o in common.items()}
             for row in rows]
    return {name: torch.cat([part[name] for part in parts]) for name in common}
