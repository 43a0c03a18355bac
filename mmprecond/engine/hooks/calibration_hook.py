"""Hook that calibrates MAC's first layer before training."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import torch
from mmengine.hooks import Hook
from torch import Tensor, nn

from ...checks import check_count
from ...curvature import unwrap
from ...optimizers import MAC
from .loading import fresh_loader

logger = logging.getLogger('mmprecond')


class CalibrationHook(Hook):  # type: ignore[misc]
    """Hook that calibrates the first layer of `MAC` or `SMAC` before the first step.

    The hook has a sampler of its own, so it does not change the order of the training data. A
    resumed run has the result in its checkpoint and reads no batches, unless its checkpoint holds
    no curvature. A first layer that is frozen
    or left out is not calibrated, and the log says so.

    Args:
        batches: Number of batches that each rank reads. The published code reads the whole data
            set.
    """

    priority = 'VERY_HIGH'

    def __init__(self, batches: int = 100) -> None:
        check_count('batches', batches)
        self.batches = batches

    def before_train(self, runner: Any) -> None:
        """Calibrates the first layer; raises ValueError for other optimizers."""
        optimizer = getattr(runner.optim_wrapper, 'optimizer', runner.optim_wrapper)
        if not isinstance(optimizer, MAC):
            raise ValueError(
                f'CalibrationHook is for MAC and SMAC, not {type(optimizer).__name__};'
                ' take it out of custom_hooks'
            )
        if optimizer.calibrated:
            return
        if optimizer.first_layer is None or optimizer.calibration_blocker:
            logger.info('the first layer is not calibrated: %s', optimizer.calibration_blocker)
            return
        module = optimizer.first_layer.modules[0]
        batches = islice(fresh_loader(runner.train_dataloader), self.batches)
        optimizer.calibrate_first_layer(
            _inputs_of(module, unwrap(runner.model), data) for data in batches
        )


class _ReachedError(Exception):
    """The forward pass reached the awaited module."""


@torch.no_grad()
def _inputs_of(module: nn.Module, model: Any, data: Any) -> Tensor:
    """Input of a module in the model's forward pass on a batch; the pass ends there."""
    captured: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        captured.append(args[0] if args else next(iter(kwargs.values())))
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        model(**model.data_preprocessor(data, True), mode='tensor')
    except _ReachedError:
        pass
    finally:
        handle.remove()
    if not captured:
        raise ValueError(
            f'{type(module).__name__} is the first layer by its place in the model, '
            "but mode='tensor' never calls it; train without CalibrationHook"
        )
    return captured[0]
