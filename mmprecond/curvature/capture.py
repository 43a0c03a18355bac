"""Capture: sums over a step's input rows and output-gradient rows, read by hooks.

Hooks exist between `arm` and `disarm` alone. A call is measured when its output's gradient
arrives, and counts once the same backward pass has accumulated into the weight's ``.grad``. So a
recomputed forward pass (activation checkpointing), a forward pass without backward, validation,
and backward passes that are not the step's leave nothing behind.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from ..checks import check_number
from ..linalg import matmul_precision, rounded
from .calls import Call, Tap
from .eager import Eager
from .layer import Layer
from .staging import Staged, Staging, Visit
from .statistic import Statistic

logger = logging.getLogger('mmprecond')

#: Warning of torch.compile that does not matter here: once a module is called the hook is gone.
GLOBAL_HOOKS = 'Using .torch.compile.* global hooks'


class Capture:
    """Measures the statistics of each layer while it is armed.

    Args:
        around: Function that returns the context in which products are computed.

    Attributes:
        loss_scale: By what the loss was multiplied before backward: None, a number, a
            tensor of one, or a `torch.amp.GradScaler`.
        seen: Layers whose module was called while armed.
    """

    def __init__(self, around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._statistics: Mapping[Layer, Sequence[Statistic]] = {}
        self._product_context = around
        self._staging = Staging()
        self.loss_scale: Any = None
        self.seen: set[Layer] = set()
        self._handles: list[RemovableHandle] = []
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._eager = Eager()
        self._forward_is_new = False
        self._warned: set[Layer] = set()

    @property
    def staged(self) -> dict[Layer, Staged]:
        """Sums of each layer since the last `drop`."""
        return self._staging.staged

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no hooks and nothing staged, as its parameters have no gradients."""
        fresh: dict[str, Any] = dict(_handles=[], _finalizer=None, _eager=Eager())
        return {**self.__dict__, **fresh, '_statistics': {}, '_staging': Staging()}

    def arm(
        self,
        statistics: Mapping[Layer, Sequence[Statistic]],
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        *,
        at_forward: bool = False,
    ) -> None:
        """Installs forward hooks on the modules of these layers, in place of earlier hooks.

        Until they are taken off again, compiled models run eagerly: their code knows no hooks.

        Args:
            statistics: The layers to measure, and what of them.
            seed: Seeds what is sampled, apart from the user's own random numbers.
            share: Rank and number of ranks, each of which fills other slots with columns first.
            at_forward: True to install them when a module is next called with gradients enabled,
                so that until then the model may be copied, saved or scripted as it is.
        """
        self.disarm()
        self._statistics = statistics
        self._staging.seed(seed, share)
        if statistics:
            self._eager.enter()
            self._install_hooks(at_forward)

    def expect(self, statistics: Mapping[Layer, Sequence[Statistic]]) -> None:
        """Lets compiled models run eagerly from now on if there is something to measure.

        For callers who arm inside a function that may be compiled itself.
        """
        if statistics:
            self._eager.enter()

    def disarm(self) -> None:
        """Removes the hooks; the measured sums stay."""
        _remove(self._handles)
        self._eager.leave()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspends the measurement of forward passes inside the context."""
        armed = bool(self._handles)
        self.disarm()
        try:
            yield
        finally:
            if armed:
                self._eager.enter()
                self._install_hooks()

    def _install_hooks(self, at_forward: bool = False) -> None:
        if at_forward:
            _ignore_warning(GLOBAL_HOOKS)
            begin = _weak(self._begin)
            self._handles.append(register_module_forward_pre_hook(Tap(lambda *_: begin())))
        else:
            observe, warn = _weak(self.observe), _weak(self._warn_unmeasured)
            for layer in self._statistics:
                self._handles += layer.watch(observe, warn)
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _release, self._handles, self._staging)

    def _begin(self) -> None:
        """Installs the hooks, at the first call of a module whose graph is recorded."""
        if torch.is_grad_enabled() and not _is_traced():
            _remove(self._handles)
            self._install_hooks()

    def scale_by(self, scale: Any) -> None:
        """Sets the factor of the loss (see `loss_scale`)."""
        scaler = hasattr(scale, 'is_enabled') and hasattr(scale, 'get_scale')
        single = isinstance(scale, Tensor) and scale.numel() == 1  # on a device: it is not read
        if isinstance(scale, Real):
            check_number('loss_scale', scale, open_low=True)
        elif not (scale is None or scaler or single):
            raise TypeError(
                f'loss_scale is a {type(scale).__name__}; give a number, a GradScaler, or None'
            )
        self.loss_scale = scale

    def restart(self) -> None:
        """Forgets sums and seed, so that a resumed step draws the same random numbers."""
        self._staging.restart()

    def drop(self) -> None:
        """Forgets the measured sums."""
        self._staging.drop()

    def observe(self, call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        """Prepares the measurement of one call, for when the gradient of its output arrives."""
        if _is_traced():
            return
        layer = call.layer
        self.seen.add(layer)
        if torch._C._current_graph_task_id() == -1:  # not a recomputation inside backward
            self._forward_is_new = True
        trained = layer.weight.requires_grad and output.requires_grad
        if not (torch.is_grad_enabled() and trained):
            return
        shape, statistics = output.shape, self._statistics[layer]
        visit = Visit(_SavedTensors.apply(layer.weight, *(tensor.detach() for tensor in kept)))

        def measure(gradient: Tensor) -> None:
            if self._forward_is_new:  # once, when the first gradient after a forward pass arrives
                self._forward_is_new = False
                self._staging.drop_cleared()
            self._staging.listen(layer)
            anchor: Any = visit.take()  # its node lives as long as it does
            if anchor is None:
                self._warn_unmeasured(layer, 'its graph was walked backward twice')
                return
            try:
                saved_tensors = anchor.grad_fn.saved_tensors
            except RuntimeError:
                self._warn_unmeasured(
                    layer, 'its input was changed in place after the forward pass'
                )
                return
            self._measure_call(visit, call, saved_tensors, gradient.reshape(shape), statistics)

        self._hooked_tensor(output, statistics).register_hook(measure)

    @staticmethod
    def _hooked_tensor(output: Tensor, statistics: Sequence[Statistic]) -> Tensor:
        """The tensor whose gradient is the output's, before anything changes it in place.

        A linear layer's output with more than two dimensions is a view. An in-place operation on
        a view moves the view's hooks to its own result, so the hook goes to the base tensor.
        """
        base = output._base
        if base is None or not base.requires_grad or base.numel() != output.numel():
            return output
        ordered = output.is_contiguous() and base.is_contiguous()
        return base if ordered or not _needs_gradient(statistics) else output

    @torch.no_grad()
    def _measure_call(
        self,
        visit: Visit,
        call: Call,
        kept: tuple[Tensor, ...],
        gradient: Tensor,
        statistics: Sequence[Statistic],
    ) -> None:
        layer = call.layer
        if visit.counted:  # another loss of the same forward pass: its rows are counted
            statistics = [statistic for statistic in statistics if statistic.side.of_gradient]
        full = layer.needs_full_precision
        around = matmul_precision('highest') if full else self._product_context()
        with torch.autocast(gradient.device.type, enabled=False), around:
            if _needs_gradient(statistics):
                gradient = self._unscale(layer, gradient)
            if any(statistic.form.is_product for statistic in statistics):
                gradient, kept = rounded(gradient), tuple(map(rounded, kept))
            self._staging.begin()
            draws = self._staging.draws(layer)
            sums = layer.measure(call, kept, gradient, statistics, draws)
            rows = 0 if visit.counted else layer.count_rows(call, gradient, statistics)
            self._staging.add(visit, layer, sums, rows, statistics)

    def _unscale(self, layer: Layer, gradient: Tensor) -> Tensor:
        """Gradient of the unscaled loss; the division comes first, so that no product overflows."""
        gradient = gradient.to(layer.working_dtype)
        scale = self.loss_scale
        if hasattr(scale, 'is_enabled'):
            # The private accessor reads the scale without waiting for the device.
            read = getattr(scale, '_get_scale_async', scale.get_scale)
            scale = read() if scale.is_enabled() else None
        return gradient if scale is None else gradient / scale

    def _warn_unmeasured(self, layer: Layer, reason: str) -> None:
        self.seen.add(layer)
        if layer not in self._warned:
            logger.warning('%s: a call was not measured, %s', layer.name, reason)
        self._warned.add(layer)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _ignore_warning(message: str) -> None:
    """Adds a filter once, because each addition makes Python forget which warnings it showed."""
    if not any(getattr(known, 'pattern', None) == message for _, known, *_ in warnings.filters):
        warnings.filterwarnings('ignore', message=message)


def _release(handles: list[RemovableHandle], staging: Staging) -> None:
    """Removes the hooks on modules and weights of a deleted optimizer."""
    _remove(handles)
    staging.drop()


def _weak(method: Callable[..., None]) -> Callable[..., None]:
    """The method, which does not keep its object alive: hooks outlive a deleted optimizer."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*args)

    return call


def _is_traced() -> bool:
    """True while a module is traced or transformed, where nothing of a step is measured."""
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _needs_gradient(statistics: Sequence[Statistic]) -> bool:
    return any(statistic.side.of_gradient for statistic in statistics)


class _SavedTensors(torch.autograd.Function):
    """Holds tensors as autograd holds them: under checkpointing they are recomputed, not kept.

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
