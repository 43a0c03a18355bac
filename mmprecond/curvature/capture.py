"""Capture: sums over a step's input rows and output-gradient rows, read by hooks.

Hooks exist between `arm` and `disarm` alone. A call is counted when its output's gradient
arrives, so a recomputed forward pass (activation checkpointing), a forward pass without backward,
and validation leave nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layers import Layer

logger = logging.getLogger('mmprecond')


@dataclass
class Staged:
    """Sums over the calls of one layer since the last step.

    Attributes:
        sums: By statistic name: (blocks, n, n).
        rows: Number of input rows.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0


class Capture:
    """Measures the statistics that each layer needs, while armed.

    Args:
        requires: The statistics of each layer: 'input_moment', 'gradient_moment' or both.

    Attributes:
        staged: What was measured since the last `drop`.
        loss_scale: By what the loss was multiplied before backward: None, a number, or a
            `torch.amp.GradScaler`.
        seen: Layers whose module was called while armed.
    """

    def __init__(self, requires: dict[Layer, tuple[str, ...]]) -> None:
        self.requires = requires
        self.staged: dict[Layer, Staged] = {}
        self.loss_scale: Any = None
        self.seen: set[Layer] = set()
        self._layers = {module: layer for layer in requires for module in layer.modules}
        self._handles: list[RemovableHandle] = []
        self._forward_is_new = False
        self._warned = False

    def arm(self, layers: Iterable[Layer]) -> None:
        """Installs forward hooks on the modules of these layers, in place of earlier ones."""
        self.disarm()
        hook = _ForwardHook(self)
        for layer in layers:
            for module in layer.modules:
                # First, before a user's hook that may replace the output.
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True,
                                                                  prepend=True))

    def disarm(self) -> None:
        """Removes the hooks; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def drop(self) -> None:
        """Forgets what was measured."""
        self.staged.clear()

    def observe_forward(self, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        """Prepares the measurement of one call, to be done when its gradient arrives."""
        layer = self._layers.get(module)
        if layer is None:  # a deep copy of the model, which took the hooks along
            return
        self.seen.add(layer)
        if torch._C._current_graph_task_id() == -1:  # not a recomputation inside backward
            self._forward_is_new = True
        trained = layer.weight.requires_grad and output.requires_grad
        if not (torch.is_grad_enabled() and trained):
            return
        pending = [_Saved.apply(layer.weight, inputs)]

        def measure(gradient: Tensor) -> None:
            self._drop_abandoned()
            if not pending:
                self._warn_lost(layer, 'its graph was walked backward twice')
                return
            saved = pending.pop()  # its node lives as long as it does
            try:
                (kept,) = saved.grad_fn.saved_tensors
            except RuntimeError:
                self._warn_lost(layer, 'its input was changed in place after the forward pass')
                return
            self._stage(layer, module, kept, gradient)

        output.register_hook(measure)

    @torch.no_grad()
    def _stage(self, layer: Layer, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        staged = self.staged.setdefault(layer, Staged())
        with torch.autocast(gradient.device.type, enabled=False):
            for name in self.requires[layer]:
                if name == 'input_moment':
                    measured = layer.input_moment(module, inputs)
                else:
                    measured = layer.gradient_moment(self._unscaled(layer, gradient))
                if name in staged.sums:
                    staged.sums[name] += measured
                else:
                    staged.sums[name] = measured
        staged.rows += gradient.numel() // max(1, layer.blocks * layer.rows)

    def _unscaled(self, layer: Layer, gradient: Tensor) -> Tensor:
        """The gradient of the loss itself; divided before any product, so that none overflows."""
        gradient = gradient.to(layer.working_dtype)
        scale = self.loss_scale
        if hasattr(scale, 'is_enabled'):
            # The private accessor reads the scale without waiting for the device.
            read = getattr(scale, '_get_scale_async', scale.get_scale)
            scale = read() if scale.is_enabled() else None
        return gradient if scale is None else gradient / scale

    def _drop_abandoned(self) -> None:
        """Drops the staging of an earlier backward pass whose gradients were cleared since.

        Looks once, when the first gradient after a forward pass arrives.
        """
        if not self._forward_is_new:
            return
        self._forward_is_new = False
        gradients = [layer.weight.grad for layer in self.staged]
        if gradients and not any(g is not None and bool(g.any()) for g in gradients):
            self.drop()

    def _warn_lost(self, layer: Layer, reason: str) -> None:
        if not self._warned:
            logger.warning('%s: a call was not measured, %s', layer.name, reason)
        self._warned = True


class _ForwardHook:
    """A forward hook that can be deep-copied and pickled with the model without its capture."""

    def __init__(self, capture: Capture | None) -> None:
        self.capture = capture

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 output: Tensor) -> None:
        if self.capture is not None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            self.capture.observe_forward(module, inputs, output)

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return _ForwardHook, (None,)


class _Saved(torch.autograd.Function):
    """Holds an input as autograd holds it: under checkpointing it is recomputed, not kept.

    The anchor only makes the node exist when the input needs no gradient (an image).
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        return None, None
