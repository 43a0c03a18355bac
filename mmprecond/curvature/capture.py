"""Capture: sums over a step's input rows and output-gradient rows, read by hooks.

Hooks exist only between `arm` and `disarm`. A call counts once the gradient of its output arrives.
Validation, a forward pass without backward and a recomputed forward pass (activation
checkpointing) therefore leave nothing behind.
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
        sums: Sums by tensor name, in the layer's `shapes`.
        rows: Number of input rows.
        slots: Slots of placed columns by tensor name.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    slots: dict[str, Slots] = field(default_factory=dict)

    def add(self, sums: Mapping[str, Tensor], rows: int) -> None:
        """Adds the sums of one call and its number of rows."""
        for key, total in sums.items():
            if key in self.sums:
                self.sums[key] += total
            else:
                self.sums[key] = total
        self.rows += rows


class Capture:
    """Measures the statistics of each layer while it is armed.

    Args:
        around: Function that returns the context in which products are computed.

    Attributes:
        staged: Sums measured since the last `drop`, by layer.
        loss_scale: Factor of the loss in the backward pass: None, a number, or a
            `torch.amp.GradScaler`.
        seen: Layers whose module was called while armed.
    """

    def __init__(self, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._statistics: Mapping[Layer, Sequence[Statistic]] = {}
        self._around = around
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
        """Installs forward hooks on the modules of these layers, in place of earlier hooks.

        Args:
            statistics: Statistics to measure, by layer.
            seed: Seed of the sampling, which is separate from the user's random numbers.
            share: Rank and number of ranks; each rank fills its own share of the slots first.
        """
        self.disarm()
        self._statistics = statistics
        self._share = share
        if seed != self._seed:  # micro-batches of one step continue the same sequence
            self._seed = seed
            self._generator.manual_seed(seed)
            self._signs.manual_seed(seed ^ 0x5BD1E995)  # differs from the positions' seed
        self._watch()

    def disarm(self) -> None:
        """Removes the hooks; the measured sums stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspends the measurement of forward passes inside the context."""
        armed = bool(self._handles)
        self.disarm()
        try:
            yield
        finally:
            if armed:
                self._watch()

    def _watch(self) -> None:
        for layer in self._statistics:
            self._handles += layer.watch(self.observe, self._warn_lost)

    def scale_by(self, scale: Any) -> None:
        """Sets the factor of the loss (see `loss_scale`)."""
        self.loss_scale = scale

    def restart(self) -> None:
        """Forgets sums and seed, so that a resumed step draws the same random numbers."""
        self._seed = None
        self.drop()

    def drop(self) -> None:
        """Forgets the measured sums."""
        self.staged.clear()

    def observe(self, call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        """Prepares the measurement of one call, for when the gradient of its output arrives."""
        layer = call.layer
        self.seen.add(layer)
        if torch._C._current_graph_task_id() == -1:  # not a recomputation inside backward
            self._forward_is_new = True
        trained = layer.weight.requires_grad and output.requires_grad
        if not (torch.is_grad_enabled() and trained):
            return
        shape, statistics = output.shape, self._statistics[layer]
        pending = [_Saved.apply(layer.weight, *(tensor.detach() for tensor in kept))]

        def measure(gradient: Tensor) -> None:
            self._drop_abandoned()
            if not pending:
                self._warn_lost(layer, 'its graph was walked backward twice')
                return
            saved = pending.pop()  # the autograd node lives as long as this tensor
            try:
                held = saved.grad_fn.saved_tensors
            except RuntimeError:
                self._warn_lost(layer, 'its input was changed in place after the forward pass')
                return
            self._stage(call, held, gradient.reshape(shape), statistics)

        self._source(output, statistics).register_hook(measure)

    @staticmethod
    def _source(output: Tensor, statistics: Sequence[Statistic]) -> Tensor:
        """Tensor whose gradient is that of the output before any in-place change.

        A linear layer's output with more than two dimensions is a view. An in-place operation on
        a view moves the view's hooks to its own result, so the hook goes to the base tensor.
        """
        base = output._base
        if base is None or not base.requires_grad or base.numel() != output.numel():
            return output
        ordered = output.is_contiguous() and base.is_contiguous()
        return base if ordered or not _needs_gradient(statistics) else output

    @torch.no_grad()
    def _stage(
        self,
        call: Call,
        kept: tuple[Tensor, ...],
        gradient: Tensor,
        statistics: Sequence[Statistic],
    ) -> None:
        layer = call.layer
        staged = self.staged.setdefault(layer, Staged())
        full = layer.needs_full_precision
        around = matmul_precision('highest') if full else self._around()
        with torch.autocast(gradient.device.type, enabled=False), around:
            if _needs_gradient(statistics):
                gradient = self._unscaled(layer, gradient)
            if any(statistic.form.is_product for statistic in statistics):
                gradient, kept = rounded(gradient), tuple(map(rounded, kept))
            measured = layer.measure(call, kept, gradient, statistics, self._generator)
            for statistic in statistics:
                if statistic.form.is_placed:
                    measured |= {
                        key: statistic.form.stage(measured[key], self._slots(staged, key, width))
                        for key, (_, _, width) in layer.shapes(statistic).items()
                    }
            staged.add(measured, layer.count_rows(call, gradient, statistics))

    def _slots(self, staged: Staged, key: str, width: int) -> Slots:
        """Slots for the columns of a statistic; this rank's share comes first."""
        if key not in staged.slots:
            rank, ranks = self._share
            staged.slots[key] = Slots(width, rank * width // ranks, self._signs)
        return staged.slots[key]

    def _unscaled(self, layer: Layer, gradient: Tensor) -> Tensor:
        """Gradient of the unscaled loss; the division comes first, so that no product overflows."""
        gradient = gradient.to(layer.working_dtype)
        scale = self.loss_scale
        if hasattr(scale, 'is_enabled'):
            # The private accessor reads the scale without waiting for the device.
            read = getattr(scale, '_get_scale_async', scale.get_scale)
            scale = read() if scale.is_enabled() else None
        return gradient if scale is None else gradient / scale

    def _drop_abandoned(self) -> None:
        """Drops the sums of an earlier backward pass if its gradients were cleared since.

        The check runs once, when the first gradient after a forward pass arrives.
        """
        if not self._forward_is_new:
            return
        self._forward_is_new = False
        gradients = [layer.weight.grad for layer in self.staged]
        if gradients and not any(g is not None and bool(g.any()) for g in gradients):
            self.drop()

    def _warn_lost(self, layer: Layer, reason: str) -> None:
        self.seen.add(layer)
        if layer not in self._warned:
            logger.warning('%s: a call was not measured, %s', layer.name, reason)
        self._warned.add(layer)


def _needs_gradient(statistics: Sequence[Statistic]) -> bool:
    return any(statistic.side.of_gradient for statistic in statistics)


class _Saved(torch.autograd.Function):
    """Saves tensors in autograd, where checkpointing recomputes them instead of keeping them.

    The anchor makes autograd create a node. The tensors are detached: a node that leads to the
    output whose gradient it waits for would never be freed.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)
