"""Capture: sums over a step's input rows and output-gradient rows, read by hooks.

Hooks exist between `arm` and `disarm` alone. A call is counted when its output's gradient
arrives, so a recomputed forward pass (activation checkpointing), a forward pass without backward,
and validation leave nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..linalg import matmul_precision, rounded
from .calls import Call
from .form import Slots
from .layer import Layer
from .statistic import Statistic

logger = logging.getLogger('mmprecond')


@dataclass
class Staged:
    """Sums over the calls of one layer since the last step.

    Attributes:
        sums: By tensor name, shaped as the layer's `shapes`.
        rows: Number of input rows.
        slots: Where columns were placed, by tensor name.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    slots: dict[str, Slots] = field(default_factory=dict)

    def add(self, sums: Mapping[str, Tensor], rows: int) -> None:
        """Adds the sums of a call over so many rows."""
        for key, total in sums.items():
            if key in self.sums:
                self.sums[key] += total
            else:
                self.sums[key] = total
        self.rows += rows


class Capture:
    """Measures the statistics that each layer needs, while armed.

    Args:
        around: Makes the context in which products are formed.

    Attributes:
        staged: What was measured since the last `drop`.
        loss_scale: By what the loss was multiplied before backward: None, a number, or a
            `torch.amp.GradScaler`.
        seen: Layers whose module was called while armed.
    """

    def __init__(self, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._statistics: Mapping[Layer, Sequence[Statistic]] = {}
        self._product_context = around
        self.staged: dict[Layer, Staged] = {}
        self.loss_scale: Any = None
        self.seen: set[Layer] = set()
        self._handles: list[RemovableHandle] = []
        self._generator = torch.Generator()
        self._signs = torch.Generator()
        self._seed: int | None = None
        self._share = (0, 1)
        self._forward_is_new = False
        self._warned: set[Layer] = set()

    def arm(
        self,
        statistics: Mapping[Layer, Sequence[Statistic]],
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Installs forward hooks on the modules of these layers, in place of earlier ones.

        Args:
            statistics: The layers to measure, and what of them.
            seed: Seeds what is sampled, apart from the user's own random numbers.
            share: Rank and number of ranks, each of which fills other slots with columns first.
        """
        self.disarm()
        self._statistics = statistics
        self._share = share
        if seed != self._seed:  # the micro-batches of one step draw on
            self._seed = seed
            self._generator.manual_seed(seed)
            self._signs.manual_seed(seed ^ 0x5BD1E995)  # other numbers than the positions'
        self._install_hooks()

    def disarm(self) -> None:
        """Removes the hooks; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leaves forward passes inside unmeasured."""
        armed = bool(self._handles)
        self.disarm()
        try:
            yield
        finally:
            if armed:
                self._install_hooks()

    def _install_hooks(self) -> None:
        for layer in self._statistics:
            self._handles += layer.watch(self.observe, self._warn_unmeasured)

    def scale_by(self, scale: Any) -> None:
        """Says by what the loss is multiplied (see `loss_scale`)."""
        self.loss_scale = scale

    def restart(self) -> None:
        """Forgets what was measured and drawn, so that a loaded step draws as it did before."""
        self._seed = None
        self.drop()

    def drop(self) -> None:
        """Forgets what was measured."""
        self.staged.clear()

    def observe(self, call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        """Prepares the measurement of one call, to be done when its output's gradient arrives."""
        layer = call.layer
        self.seen.add(layer)
        if torch._C._current_graph_task_id() == -1:  # not a recomputation inside backward
            self._forward_is_new = True
        trained = layer.weight.requires_grad and output.requires_grad
        if not (torch.is_grad_enabled() and trained):
            return
        shape, statistics = output.shape, self._statistics[layer]
        pending = [_SavedTensors.apply(layer.weight, *(tensor.detach() for tensor in kept))]

        def measure(gradient: Tensor) -> None:
            self._drop_stale()
            if not pending:
                self._warn_unmeasured(layer, 'its graph was walked backward twice')
                return
            anchor = pending.pop()  # its node lives as long as it does
            try:
                saved_tensors = anchor.grad_fn.saved_tensors
            except RuntimeError:
                self._warn_unmeasured(
                    layer, 'its input was changed in place after the forward pass'
                )
                return
            self._measure_call(call, saved_tensors, gradient.reshape(shape), statistics)

        self._hooked_tensor(output, statistics).register_hook(measure)

    @staticmethod
    def _hooked_tensor(output: Tensor, statistics: Sequence[Statistic]) -> Tensor:
        """The tensor whose gradient is the output's, before anything changes it in place.

        An in-place operation on a view (a linear layer's output of more than two dimensions) would
        take the view's hooks to its own result.
        """
        base = output._base
        if base is None or not base.requires_grad or base.numel() != output.numel():
            return output
        ordered = output.is_contiguous() and base.is_contiguous()
        return base if ordered or not _needs_gradient(statistics) else output

    @torch.no_grad()
    def _measure_call(
        self,
        call: Call,
        kept: tuple[Tensor, ...],
        gradient: Tensor,
        statistics: Sequence[Statistic],
    ) -> None:
        layer = call.layer
        staged = self.staged.setdefault(layer, Staged())
        needs_full = layer.needs_full_precision
        context = matmul_precision('highest') if needs_full else self._product_context()
        with torch.autocast(gradient.device.type, enabled=False), context:
            if _needs_gradient(statistics):
                gradient = self._unscale(layer, gradient)
            if any(statistic.form.is_product for statistic in statistics):
                gradient, kept = rounded(gradient), tuple(map(rounded, kept))
            measured = layer.measure(call, kept, gradient, statistics, self._generator)
            for statistic in statistics:
                if statistic.form.is_placed:
                    measured |= {
                        key: statistic.form.stage(
                            measured[key], self._column_slots(staged, key, width)
                        )
                        for key, (_, _, width) in layer.shapes(statistic).items()
                    }
            staged.add(measured, layer.count_rows(call, gradient, statistics))

    def _column_slots(self, staged: Staged, key: str, width: int) -> Slots:
        """Slots for the columns of a statistic, from this rank's share of them on."""
        if key not in staged.slots:
            rank, ranks = self._share
            staged.slots[key] = Slots(width, rank * width // ranks, self._signs)
        return staged.slots[key]

    def _unscale(self, layer: Layer, gradient: Tensor) -> Tensor:
        """The gradient of the loss itself; divided before any product, so that none overflows."""
        gradient = gradient.to(layer.working_dtype)
        scale = self.loss_scale
        if hasattr(scale, 'is_enabled'):
            # The private accessor reads the scale without waiting for the device.
            read = getattr(scale, '_get_scale_async', scale.get_scale)
            scale = read() if scale.is_enabled() else None
        return gradient if scale is None else gradient / scale

    def _drop_stale(self) -> None:
        """Drops the staging of an earlier backward pass whose gradients were cleared since.

        Looks once, when the first gradient after a forward pass arrives.
        """
        if not self._forward_is_new:
            return
        self._forward_is_new = False
        gradients = [layer.weight.grad for layer in self.staged]
        if gradients and not any(g is not None and bool(g.any()) for g in gradients):
            self.drop()

    def _warn_unmeasured(self, layer: Layer, reason: str) -> None:
        self.seen.add(layer)
        if layer not in self._warned:
            logger.warning('%s: a call was not measured, %s', layer.name, reason)
        self._warned.add(layer)


def _needs_gradient(statistics: Sequence[Statistic]) -> bool:
    return any(statistic.side.of_gradient for statistic in statistics)


class _SavedTensors(torch.autograd.Function):
    """Holds tensors as autograd holds them: under checkpointing they are recomputed, not kept.

    The anchor makes the node exist; the tensors come detached, as a node that leads to the output
    it waits for would never be freed.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)
