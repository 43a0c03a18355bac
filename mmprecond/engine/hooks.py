"""Hooks for MMEngine's runner."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from ..checks import check_count
from ..curvature import unwrap
from ..optimizers import MAC


class CalibrationHook(Hook):  # type: ignore[misc]
    """Calibrates the first layer of `MAC` or `SMAC` on training batches before the first step.

    A resumed run has it in its checkpoint, and reads nothing.

    Args:
        batches: How many batches each rank reads; the published code reads the whole data set.
    """

    priority = 'VERY_HIGH'

    def __init__(self, batches: int = 100) -> None:
        check_count('batches', batches)
        self.batches = batches

    def before_train(self, runner: Any) -> None:
        """Reads the batches; raises ValueError with another optimizer."""
        optimizer = runner.optim_wrapper.optimizer
        if not isinstance(optimizer, MAC):
            raise ValueError(f'CalibrationHook is for MAC and SMAC, not {type(optimizer).__name__};'
                             ' take it out of custom_hooks')
        if not optimizer.t and not optimizer.calibrated:
            module = optimizer.first_layer.modules[0]
            batches = islice(runner.train_dataloader, self.batches)
            optimizer.calibrate_first_layer(
                _inputs_of(module, unwrap(runner.model), data) for data in batches)


class _ReachedError(Exception):
    """The forward pass came to the module that was waited for."""


@torch.no_grad()
def _inputs_of(module: nn.Module, model: Any, data: Any) -> Tensor:
    """What a module takes when the model is given a batch; the pass ends there."""
    found: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        found.append(args[0] if args else next(iter(kwargs.values())))
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        model(**model.data_preprocessor(data, True), mode='tensor')
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if not found:
        raise ValueError(f'{type(module).__name__} is the first layer by its place in the model, '
                         "but mode='tensor' never calls it; train without CalibrationHook")
    return found[0]
