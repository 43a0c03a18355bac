"""Samples of a step: summed over ranks, checked, and merged into the running statistics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import first_names
from ..curvature import Capture, Layer, Statistic, measure_matrix
from ..distributed import start_sum, sum_over_ranks, world_size
from .guard import SilenceGuard, has_gradient
from .stack import LayerStack

logger = logging.getLogger('mmprecond')

#: Tensors of one layer's statistics by name.
Sample = dict[str, Tensor]


def by_hooks(
    due: Mapping[Layer, tuple[Statistic, ...]],
) -> dict[Layer, tuple[Statistic, ...]]:
    """Layers that hooks measure, with their statistics; others are of the gradient matrix."""
    return {layer: kept for layer, kept in due.items() if not kept[0].of_matrix}


@dataclass(frozen=True)
class _Pending:
    """Samples of a step whose sums over ranks are under way.

    Attributes:
        samples: Samples by layer.
        rows: Number of rows of each layer that was due.
        layers: Stack of each layer.
        step: The step.
        wait: Function that completes the sums.
    """

    samples: dict[Layer, Sample]
    rows: dict[Layer, float]
    layers: Mapping[Layer, LayerStack]
    step: int
    wait: Callable[[], None]


class SampleCollector:
    """Takes the sums of a step from a capture and merges those that are valid, layer by layer.

    Args:
        capture: The capture.
        collect_uncalled: Whether to collect layers whose weights are used by hand, for
            `take_uncalled`. Otherwise a warning tells of them.

    Attributes:
        dropped: Number of samples that were dropped because they were not finite.
    """

    def __init__(self, capture: Capture, collect_uncalled: bool = False) -> None:
        self.dropped = 0
        self._collects = collect_uncalled
        self._uncalled: list[Layer] = []
        self._capture = capture
        self._pending: _Pending | None = None
        self._late: _Pending | None = None
        self._zero_reported: set[Layer] = set()
        self._guard = SilenceGuard()

    def start(self, due: Sequence[Layer], layers: Mapping[Layer, LayerStack], step: int) -> None:
        """Takes the samples of the layers that are due, and starts to sum them over ranks.

        Args:
            due: Layers that the step measures, the same on all ranks.
            layers: Stack of each layer.
            step: The step.
        """
        self.finish()  # those of a step that ended in an error
        rows, seen = self._count_calls(due)
        staged = self._capture.staged
        samples: dict[Layer, Sample] = {}
        for layer, count in rows.items():
            if count:
                sums = staged.pop(layer).sums if layer in staged else {}
                samples[layer] = _fill_missing(layer, layers[layer], sums)
            else:
                self._warn_uncalled(layer, seen)
            self._guard.note(layer, bool(count))
        self._guard.warn()
        self._capture.drop()
        wait = start_sum([s for sample in samples.values() for s in sample.values()])
        self._pending = _Pending(samples, rows, layers, step, wait)

    def finish(self) -> None:
        """Merges the samples that were started, if there are any.

        The method waits for the device once, for the norms that show which samples are valid.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.wait()
        for layer, sample in pending.samples.items():
            _rescale(sample, pending.layers[layer], pending.rows[layer])
        self._merge(pending.samples, pending.layers, pending.step)

    def take_matrices(
        self,
        due: Sequence[Layer],
        layers: Mapping[Layer, LayerStack],
        step: int,
        gradients: Mapping[Tensor, Tensor],
    ) -> None:
        """Takes the statistics of gradient matrices; those that count later wait for `finish_late`.

        Args:
            due: Layers that the step measures.
            layers: Stack of each layer.
            step: The step.
            gradients: Gradients by parameter, the same on all ranks.
        """
        samples: dict[Layer, Sample] = {}
        for layer in due:
            if layer.weight in gradients:
                bias = [gradients.get(p) for p in layer.parameters[1:]]
                matrix = layer.join(gradients[layer.weight], *bias)
                samples[layer] = measure_matrix(layer, matrix, layers[layer].kept)
        later = {layer: s for layer, s in samples.items() if layers[layer].method.counts_later}
        self._late = _Pending(later, {}, layers, step, lambda: None) if later else None
        self._merge({k: s for k, s in samples.items() if k not in later}, layers, step)

    def hold_back(self, directions: dict[Tensor, Tensor]) -> None:
        """Removes the directions of layers that wait for their first statistics to count."""
        if self._late is None:
            return
        for layer in self._late.samples:
            stack = self._late.layers[layer]
            if stack.method.waits and not stack.holds(layer):
                for p in layer.parameters:
                    directions.pop(p, None)

    def take_uncalled(self) -> list[Layer]:
        """Layers found since the last call that have gradients although no module was called."""
        found, self._uncalled = self._uncalled, []
        return found

    def finish_late(self) -> None:
        """Merges the statistics of gradient matrices that count from the next step on."""
        late, self._late = self._late, None
        if late is not None:
            self._merge(late.samples, late.layers, late.step)

    def _merge(
        self, samples: dict[Layer, Sample], layers: Mapping[Layer, LayerStack], step: int
    ) -> None:
        """Merges the valid ones of some samples, after one wait for the device."""
        if not samples:
            return
        sums = [s for sample in samples.values() for s in sample.values()]
        norms = iter(to_host(torch._foreach_norm(sums) if sums else []))
        sizes = {layer: {name: next(norms) for name in sample} for layer, sample in samples.items()}
        zero = []
        for layer in list(samples):
            stack, norms_of = layers[layer], sizes[layer]
            finite = self._is_finite(layer, norms_of, step)
            # A zero sample (a dropped block, no positives) has no information.
            if finite and all(norms_of[key] for s in stack.needed for key in s.keys):
                continue
            del samples[layer]
            if not finite:
                continue
            if layer not in self._zero_reported and not stack.holds(layer):
                zero.append(layer.name)
            self._zero_reported.add(layer)
        if zero:
            logger.info(
                '%d layers have zero statistics at step %d and take the plain rule until they have '
                'others: %s',
                len(zero),
                step,
                first_names(zero),
            )
        for stack in dict.fromkeys(layers.values()):
            stack.merge(
                {layer: samples.pop(layer) for layer in list(samples) if layers[layer] is stack},
                sizes,
            )

    def _is_finite(self, layer: Layer, sizes: Mapping[str, float], step: int) -> bool:
        """True if the norms of a sample's tensors are finite; a warning tells of others."""
        if all(size < float('inf') for size in sizes.values()):
            return True
        self.dropped += 1
        logger.warning(
            '%s: non-finite statistics at step %d were dropped (%d so far)',
            layer.name,
            step,
            self.dropped,
        )
        return False

    def _count_calls(self, due: Sequence[Layer]) -> tuple[dict[Layer, float], set[Layer]]:
        """Number of rows of each layer on all ranks, and the layers that some rank called.

        All layers that are due count as called if no layer was.
        """
        staged, seen = self._capture.staged, self._capture.seen
        rows = [float(staged[layer].rows) if layer in staged else 0.0 for layer in due]
        called = [float(layer in seen) for layer in due]
        if world_size() > 1:
            numbers = [*rows, *called, float(bool(seen))]
            counts = torch.tensor(numbers, dtype=torch.float64, device=due[0].weight.device)
            sum_over_ranks([counts])
            *numbers, some = counts.tolist()
            rows, called = numbers[: len(due)], numbers[len(due) :]
        else:
            some = float(bool(seen))
        known = {layer for layer, count in zip(due, called, strict=True) if count or not some}
        return dict(zip(due, rows, strict=True)), known

    def _warn_uncalled(self, layer: Layer, called: set[Layer]) -> None:
        """Warns once that a weight is trained although no rank calls its module."""
        if layer not in called and has_gradient(layer):
            self._capture.seen.add(layer)
            self._guard.excuse(layer)
            if self._collects:
                self._uncalled.append(layer)
                logger.info(
                    '%s: its module was not called; statistics of its gradient take over',
                    layer.name,
                )
                return
            logger.warning(
                '%s: it has a gradient although its module was not called (its weight '
                'is used elsewhere); without statistics it takes the plain rule',
                layer.name,
            )


def _rescale(sample: Sample, stack: LayerStack, rows: float) -> None:
    """Turns sums over all ranks, in place, into L = sum g'g for the joint loss, and means."""
    for statistic in stack.kept:
        factor = 1 / rows
        if statistic.side.of_gradient:
            # A rank's loss is a share 1 / ranks of the joint mean loss.
            factor = stack.method.gradient_factor(rows) / world_size() ** 2
        for key in statistic.keys:
            statistic.form.rescale(sample[key], factor)


def _fill_missing(layer: Layer, stack: LayerStack, sums: Mapping[str, Tensor]) -> Sample:
    """Sums of a layer on this rank, with zeros for statistics that were not measured."""
    sample: Sample = {}
    for statistic in stack.kept:
        known = all(key in sums for key in statistic.keys)
        tensors = sums if known else layer.empty(statistic)
        sample.update((key, tensors[key]) for key in statistic.keys)
    return sample


def to_host(values: Sequence[Tensor]) -> list[float]:
    """Copies the numbers of small tensors to the host, with one wait for the device."""
    if not values:
        return []
    flat = [value.reshape(-1).to(values[0].device, torch.float64) for value in values]
    return torch.cat(flat).tolist()
