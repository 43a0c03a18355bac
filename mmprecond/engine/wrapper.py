"""Mixins that let any OptimWrapper serve a preconditioned optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, ApexOptimWrapper, OptimWrapper
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..optimizers import SOAA, PreconditionedOptimizer, RuleOptimizer
from .peers import PeerHessian


class PrecondMixin:
    """Mixin that arms the capture for MMEngine's training steps, and sets the loss scale.

    Hooks are on the model from the start of a training forward pass to the end of its backward
    pass, which repeats a checkpointed forward pass. Validation, EMA copies and checkpoints never
    see the hooks.
    """

    optimizer: PreconditionedOptimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer.arm_by_hand(getattr(self, 'loss_scaler', None))

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Arms the capture for one training step."""
        self.optimizer.arm()
        with super().optim_context(model):  # type: ignore[misc]
            yield

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Disarms the capture after the backward pass."""
        try:
            super().backward(loss, **kwargs)  # type: ignore[misc]
        finally:
            self.optimizer.disarm()


class DoubleBackwardMixin:
    """Mixin that makes backward passes differentiable where the optimizer needs it.

    The synchronisation of DistributedDataParallel has no second derivative. Every backward pass is
    therefore local, and the optimizer averages gradients and Hessian over the ranks.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ours = isinstance(self.optimizer, RuleOptimizer)
        self._twice: Any = self.optimizer if ours else PeerHessian(self.optimizer)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Runs a training step with twice differentiable attention and local gradients."""
        with ExitStack() as stack:
            if self._twice.needs_graph:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if isinstance(model, nn.parallel.DistributedDataParallel):
                stack.enter_context(model.no_sync())
            stack.enter_context(super().optim_context(model))  # type: ignore[misc]
            yield

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Builds the gradients' graph where needed, and measures before gradients are clipped."""
        with warnings.catch_warnings():
            # `measure` breaks the reference cycle of this warning.
            warnings.filterwarnings('ignore', message='Using backward.. with create_graph=True')
            super().backward(  # type: ignore[misc]
                loss, create_graph=self._twice.needs_graph, **kwargs
            )
        if self.should_update():  # type: ignore[attr-defined]
            self._twice.measure()


class LossMixin:
    """Mixin that passes the loss of each step and the number of steps to the optimizer.

    The loss is the unscaled mean over the micro-batches of the step.
    """

    optimizer: SOAA

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[torch.Tensor] = []

    def update_params(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Passes the model's loss to the optimizer before it is scaled."""
        if loss.numel() != 1:
            raise ValueError(
                f'the loss has the shape {tuple(loss.shape)}; '
                f'{type(self.optimizer).__name__} needs its mean, one number'
            )
        self._losses.append(loss.detach().double().reshape(()))
        self.optimizer.take_loss(torch.stack(self._losses).mean())
        try:
            super().update_params(loss, *args, **kwargs)  # type: ignore[misc]
        finally:
            if self.should_update():  # type: ignore[attr-defined]
                self._losses = []

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Passes the number of optimizer steps of the run; a step may take several iterations."""
        super().initialize_count_status(model, init_counts, max_counts)  # type: ignore[misc]
        if max_counts > 0:
            accumulated: int = self._accumulative_counts  # type: ignore[attr-defined]
            self.optimizer.plan_steps(math.ceil(max_counts / accumulated))


#: Mixins by the needs of an optimizer (see `RuleOptimizer.needs`).
MIXINS: dict[str, type] = {'capture': PrecondMixin, 'graph': DoubleBackwardMixin, 'loss': LossMixin}


def mixed_wrapper(base: type[OptimWrapper], needs: str, owner: str) -> type[OptimWrapper]:
    """Returns a wrapper class with the mixin that an optimizer needs.

    Args:
        base: The wrapper class; returned unchanged if the optimizer needs nothing.
        needs: Needs of the optimizer, as in `RuleOptimizer.needs`.
        owner: Name of the optimizer, for errors.

    Raises:
        ValueError: If the wrapper cannot supply these needs.
    """
    if not needs or issubclass(base, MIXINS[needs]):
        return base
    if not issubclass(base, OptimWrapper):
        raise ValueError(
            f'{base.__name__} does its own backward and step, which {owner} must see; '
            'use OptimWrapper or AmpOptimWrapper'
        )
    if issubclass(base, ApexOptimWrapper):
        raise ValueError(
            'ApexOptimWrapper swaps the parameters under the optimizer; use AmpOptimWrapper'
        )
    if needs == 'graph' and issubclass(base, AmpOptimWrapper):
        raise ValueError(
            f'{owner} differentiates twice and needs float32; use OptimWrapper (train '
            'without --amp)'
        )
    kind: Any = base
    return _mixed(kind, needs)


@cache
def _mixed(base: Any, needs: str) -> Any:
    mixin = MIXINS[needs]
    name = f'{mixin.__name__.removesuffix("Mixin")}{base.__name__}'
    mixed = type(name, (mixin, base), {'__module__': __name__})
    globals()[mixed.__name__] = mixed  # makes the class picklable, like its base
    return mixed


def refuse_sharding(wrapper: dict[str, Any], base: type[OptimWrapper]) -> None:
    """Raises ValueError if settings of the wrapper shard the parameters."""
    if issubclass(base, AmpOptimWrapper) and wrapper.get('use_fsdp'):
        raise ValueError(
            'use_fsdp=True shards the weights, which are preconditioned whole; '
            'use DistributedDataParallel'
        )
