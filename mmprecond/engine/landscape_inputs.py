"""Loss and optimizer of a config and a checkpoint, for `mmprecond.landscape`."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner, load_checkpoint, set_random_seed
from torch import Tensor, nn

from ..core.checkpoint import CURVATURE_KEY
from ..loss_surface import Loss, OutputLoss
from ..optimizers import PreconditionedOptimizer
from . import launch
from .synthetic import random_model

logger = logging.getLogger('mmprecond')


class LandscapeInputs(NamedTuple):
    """Loss of some training batches, and the optimizer of the checkpoint if it has curvature."""

    loss: Loss
    optimizer: PreconditionedOptimizer | None


def build(args: argparse.Namespace) -> LandscapeInputs:
    """Builds the model, its loss on the first training batches, and its optimizer.

    Args:
        args: `config`, `checkpoint`, `batches`, `mode`, `seed`, `cfg_options` of the command line.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the config has no training data.
    """
    if '://' not in args.checkpoint and not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f'there is no checkpoint {args.checkpoint}')
    cfg = launch.load_config(args.config)
    launch.merge_options(cfg, args.cfg_options)
    launch.check_mmcv(cfg.get('default_scope'))
    launch.check_training_data(cfg)
    model = random_model(cfg)
    checkpoint = load_checkpoint(model, args.checkpoint, map_location='cpu')
    model.to(get_device())
    set_random_seed(args.seed)  # of the order of images and of their augmentation
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=args.seed)
    batches = list(islice(loader, args.batches))
    return LandscapeInputs(
        loss_of(model, batches, args.mode), _optimizer(model, cfg, checkpoint.get('optimizer'))
    )


def loss_of(model: Any, batches: list[Any], mode: str = 'eval') -> Loss:
    """Loss of a model of MMEngine on batches of its data loader.

    Args:
        model: A model derived from MMEngine's `BaseModel`.
        batches: Batches of its data loader. Each is preprocessed once.
        mode: See `Loss`.
    """
    prepared = []
    for batch in batches:
        with torch.no_grad():
            prepared.append(model.data_preprocessor(batch, training=True))

    def closure(data: dict[str, Any]) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            total: Tensor = model.parse_losses(model(**data, mode='loss'))[0]
            return total

        return loss

    loss = Loss(model, [closure(data) for data in prepared], mode)
    parts = [part for data in prepared if (part := _output_loss(model, data))]
    if parts:
        try:
            output_loss = Loss.of_output_losses(model, parts, mode)
            if math.isclose(output_loss.value(), loss.value(), rel_tol=1e-4):
                return output_loss
        except Exception as error:  # of a head that is none of a classifier
            logger.info('the loss is no criterion of scores (%s)', error)
    return loss


class _Scores(nn.Module):
    """Scores (samples, classes) of a classifier as a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.model(inputs, mode='tensor')
        return scores


def _output_loss(model: Any, data: dict[str, Any]) -> OutputLoss | None:
    """Loss of a classifier of MMPretrain as a criterion of its scores; None for another model."""
    criterion = getattr(getattr(model, 'head', None), 'loss_module', None)
    samples: Any = data.get('data_samples')
    labelled = isinstance(samples, (list, tuple)) and samples and 'gt_label' in samples[0]
    if criterion is None or not labelled:
        return None
    mixed = 'gt_score' in samples[0]  # of mixup and its kind
    targets = (
        torch.stack([sample.gt_score for sample in samples])
        if mixed
        else torch.cat([sample.gt_label for sample in samples])
    )

    def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = criterion(scores, targets, avg_factor=len(scores))
        return loss

    return OutputLoss(_Scores(model), mean_loss, data['inputs'], targets)


def _optimizer(model: nn.Module, cfg: Any, state: Any) -> PreconditionedOptimizer | None:
    """The config's optimizer with its state, or None if it has no curvature."""
    if state is None or not cfg.get('optim_wrapper'):
        return None
    optimizer = build_optim_wrapper(model, launch.in_full_precision(cfg.optim_wrapper)).optimizer
    if not isinstance(optimizer, PreconditionedOptimizer):
        if CURVATURE_KEY in state:
            logger.warning(
                "the checkpoint has curvature and the config's optimizer has none: take the copy "
                'of the config in the work folder, which has the options of the training'
            )
        return None
    optimizer.load_state_dict(state)
    return optimizer
