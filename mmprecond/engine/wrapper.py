"""Mixins that let any OptimWrapper serve a preconditioned optimizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.optim import AmpOptimWrapper, ApexOptimWrapper, OptimWrapper
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..optimizers import PreconditionedOptimizer, RuleOptimizer
from ..optimizers.peers import PeerHessian

#: Iterations between two counts of zero filters.
SPARSITY_INTERVAL = 50


class CompiledMixin:
    """Keeps what is around the model's forward pass out of a compiled training step.

    MMEngine's ``compile=`` compiles `train_step` as a whole; the forward pass stays compiled.
    """

    @_disable_dynamo
    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The base class's, outside of compiled code."""
        with super().optim_context(model):  # type: ignore[misc]
            yield

    @_disable_dynamo
    def update_params(self, *args: Any, **kwargs: Any) -> None:
        """The base class's, outside of compiled code."""
        super().update_params(*args, **kwargs)  # type: ignore[misc]


class LossNotingMixin(CompiledMixin):
    """Mixin that passes the loss of each step to an optimizer that wants it.

    The loss is the unscaled mean over the micro-batches of the step.
    """

    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._losses: list[torch.Tensor] = []

    @_disable_dynamo
    def update_params(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Passes the model's loss to the optimizer before it is scaled."""
        if not self.optimizer.needs_loss:
            super().update_params(loss, *args, **kwargs)
            return
        if loss.numel() != 1:
            raise ValueError(
                f'the loss has the shape {tuple(loss.shape)}; '
                f'{type(self.optimizer).__name__} needs its mean, one number'
            )
        self._losses.append(loss.detach().double().reshape(()))
        self.optimizer.take_loss(torch.stack(self._losses).mean())
        try:
            super().update_params(loss, *args, **kwargs)
        finally:
            if self.should_update():  # type: ignore[attr-defined]
                self._losses = []


class PrecondMixin(LossNotingMixin):
    """Brackets capture by MMEngine's own training step, and tells the loss scale.

    Hooks are on the model from the start of a training forward pass to the end of its backward
    pass (a checkpointed forward runs again in there), so that validation, EMA copies and saving
    never see them. A loop that does without `optim_context` is measured as plain PyTorch is: the
    optimizer arms itself until the first `optim_context`.
    """

    optimizer: PreconditionedOptimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.optimizer, PreconditionedOptimizer):
            raise TypeError(
                f'{type(self).__name__} is for optimizers that precondition, not for '
                f"{type(self.optimizer).__name__}; write type='OptimWrapper' or 'AmpOptimWrapper'"
            )
        self.optimizer.take_loss_scale(getattr(self, 'loss_scaler', None))

    @_disable_dynamo
    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Arms the capture for one training step."""
        if self.optimizer.auto_arm:
            self.optimizer.arm_by_hand()
        self.optimizer.arm()
        with super().optim_context(model):
            yield

    @_disable_dynamo
    def update_params(self, *args: Any, **kwargs: Any) -> None:
        """The base class's; logs the factor of dampings that follow the gradient."""
        super().update_params(*args, **kwargs)
        if (control := self.optimizer.curvature.dampings.gradient) is not None:
            hub = MessageHub.get_current_instance()
            hub.update_scalar('train/damping_factor', control.factor)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Disarms the capture after the backward pass, if `optim_context` armed it."""
        try:
            super().backward(loss, **kwargs)  # type: ignore[misc]
        finally:
            if not self.optimizer.auto_arm:
                self.optimizer.disarm()


class DoubleBackwardMixin(CompiledMixin):
    """Makes backward passes differentiable where the optimizer asks for it.

    The synchronisation of DistributedDataParallel has no second derivative. Every backward pass is
    therefore local, and the optimizer averages gradients and Hessian over the ranks.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        is_rule_optimizer = isinstance(self.optimizer, RuleOptimizer)
        self._twice: Any = self.optimizer if is_rule_optimizer else PeerHessian(self.optimizer)

    @_disable_dynamo
    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Runs a training step with twice differentiable attention and local gradients."""
        with ExitStack() as stack:
            if self._twice.needs_graph:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if isinstance(model, nn.parallel.DistributedDataParallel):
                stack.enter_context(model.no_sync())
            stack.enter_context(super().optim_context(model))
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


class StepCountMixin(CompiledMixin):
    """Mixin that tells the optimizer the number of steps of the run."""

    optimizer: Any

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Passes the number of optimizer steps of the run; a step may take several iterations."""
        super().initialize_count_status(model, init_counts, max_counts)  # type: ignore[misc]
        if max_counts > 0:
            accumulated: int = self._accumulative_counts  # type: ignore[attr-defined]
            self.optimizer.plan_steps(math.ceil(max_counts / accumulated))


class LossMixin(StepCountMixin, LossNotingMixin):
    """Mixin that passes the number of steps to the optimizer, beside the loss of each."""


class SparsityMixin(StepCountMixin):
    """Mixin that logs the share of zero filters, and the report at the end of the run."""

    @_disable_dynamo
    def update_params(self, *args: Any, **kwargs: Any) -> None:
        """The base class's; counts filters every `SPARSITY_INTERVAL` iterations and at the end."""
        super().update_params(*args, **kwargs)
        count, last = self._inner_count, self._max_counts  # type: ignore[attr-defined]
        if count % SPARSITY_INTERVAL == 0 or count == last:
            share = self.optimizer.sparsity().share
            MessageHub.get_current_instance().update_scalar('train/sparsity', share)
        if count == last:
            print_log(self.optimizer.report(), logger='current')


class PrecondOptimWrapper(PrecondMixin, OptimWrapper):
    """`OptimWrapper` for a `PreconditionedOptimizer`."""


class PrecondAmpOptimWrapper(PrecondMixin, AmpOptimWrapper):
    """`AmpOptimWrapper` for a `PreconditionedOptimizer`."""


#: Mixins by the needs of an optimizer (see `RuleOptimizer.needs`).
MIXINS: dict[str, type] = {
    'capture': PrecondMixin,
    'graph': DoubleBackwardMixin,
    'loss': LossMixin,
    'length': SparsityMixin,
}


def mixed_wrapper(base: type[OptimWrapper], needs: str, owner: str) -> type[OptimWrapper]:
    """Returns a wrapper class with the mixin that an optimizer needs.

    Args:
        base: The wrapper class; returned unchanged if the optimizer needs nothing.
        needs: Needs of the optimizer, as in `RuleOptimizer.needs`.
        owner: Name of the optimizer, for errors.

    Raises:
        ValueError: If the wrapper cannot supply these needs.
    """
    if needs and issubclass(base, MIXINS[needs]):
        return base
    if issubclass(base, CompiledMixin):
        raise ValueError(
            f"{base.__name__} is not for {owner}; write type='OptimWrapper' or 'AmpOptimWrapper', "
            'which PrecondOptimWrapperConstructor completes'
        )
    if not needs:
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
    return _build_mixed_type(kind, needs)


@cache
def _build_mixed_type(base: Any, needs: str) -> Any:
    mixin = MIXINS[needs]
    name = f'{mixin.__name__.removesuffix("Mixin")}{base.__name__}'
    known: Any = globals().get(name)
    if known is not None and known.__bases__ == (mixin, base):
        return known
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
