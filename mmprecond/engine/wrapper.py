"""What an OptimWrapper must do for a preconditioned optimizer, mixed into any wrapper class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, ApexOptimWrapper, OptimWrapper
from torch import nn

from ..optimizers import PreconditionedOptimizer


class PrecondMixin:
    """Brackets capture by MMEngine's own training step, and tells the loss scale.

    Hooks are on the model from the start of a training forward pass to the end of its backward
    pass (a checkpointed forward runs again in there), so that validation, EMA copies and saving
    never see them.
    """

    optimizer: PreconditionedOptimizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer.auto_arm = False
        self.optimizer.disarm()
        self.optimizer.loss_scale = getattr(self, 'loss_scaler', None)

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


@cache
def mixed_wrapper(base: type[OptimWrapper]) -> type[OptimWrapper]:
    """The wrapper class that adds `PrecondMixin` to a wrapper class; one for each.

    Raises:
        ValueError: For wrappers under which capture cannot be right.
    """
    if not issubclass(base, OptimWrapper):
        raise ValueError(f'{base.__name__} does its own backward and step, where nothing can be '
                         'captured; use OptimWrapper or AmpOptimWrapper')
    if issubclass(base, ApexOptimWrapper):
        raise ValueError('ApexOptimWrapper swaps the parameters under the optimizer; use '
                         'AmpOptimWrapper')
    mixed = type(f'Precond{base.__name__}', (PrecondMixin, base), {'__module__': __name__})
    globals()[mixed.__name__] = mixed  # picklable, as its base is
    return mixed


def refuse_sharding(wrapper: dict[str, Any], base: type[OptimWrapper]) -> None:
    """Raises ValueError for settings that shard the parameters."""
    if issubclass(base, AmpOptimWrapper) and wrapper.get('use_fsdp'):
        raise ValueError('use_fsdp=True shards the weights, which cannot be preconditioned as '
                         'matrices; use DistributedDataParallel')
