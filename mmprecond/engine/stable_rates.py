"""Largest stable rate of a config in its first steps, for `mmprecond.diagnostics --suggest-lr`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import Runner, load_checkpoint, set_random_seed

from ..loss_surface.stability import StableRate, largest_rate, stability_bound
from ..optimizers import Preconditioned
from ..rules import rule_name
from . import forecast_inputs, launch
from .landscape_inputs import loss_of
from .synthetic import random_model

#: Steps before the first measurement, at `FIRST_SHARE` of the config's rate.
FIRST_STEPS, FIRST_SHARE = 10, 0.01
#: Steps between two measurements, at `SHARE` of the rate found last, as a warm-up would take them.
STEPS_BETWEEN, SHARE = 15, 1 / 16
#: Measurements.
ROUNDS = 4
#: Arnoldi vectors, and accuracy of the eigenvalue: enough for a start of a search.
VECTORS, TOLERANCE = 12, 0.1


def suggest(args: argparse.Namespace) -> str:
    """Text with the largest stable rates that were found in the first steps of a training.

    Args:
        args: Arguments of `mmprecond.diagnostics`.

    Raises:
        ValueError: If the config has no training data, or its optimizer has no known bound.
    """
    cfg = forecast_inputs.load(args, attach=False)
    launch.check_training_data(cfg)
    set_random_seed(0)
    model: Any = random_model(cfg)
    model.init_weights()
    if cfg.get('load_from'):
        load_checkpoint(model, cfg.load_from, map_location='cpu')
    model.to(get_device())
    settings = {**launch.in_full_precision(cfg.optim_wrapper), 'accumulative_counts': 1}
    wrapper = build_optim_wrapper(model, settings)
    stability_bound(wrapper.optimizer)  # before anything slow
    own = max(group['lr'] for group in wrapper.optimizer.param_groups)
    if not own:
        raise ValueError('all learning rates of the config are 0; write optimizer=dict(lr=...)')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    found = measure_stable_rates(model, wrapper, _endless(loader))
    steps = [FIRST_STEPS + k * STEPS_BETWEEN for k in range(len(found))]
    shown = ', '.join(
        f'{one.rate:.2g} after {n} steps' for one, n in zip(found, steps, strict=True)
    )
    return (
        f'{_name(wrapper.optimizer)}: the largest stable learning rate is {shown} (the '
        f'config has {own:g}); start a search at {found[-1].rate:.1g}'
    )


def measure_stable_rates(
    model: Any, wrapper: OptimWrapper, batches: Iterator[Any]
) -> list[StableRate]:
    """Largest stable rates between the first steps of a training whose rate follows them.

    Args:
        model: A model derived from MMEngine's `BaseModel`.
        wrapper: Wrapper of its optimizer.
        batches: Batches of its data loader.
    """
    groups = wrapper.optimizer.param_groups
    relative = [group['lr'] for group in groups]
    largest = max(relative)
    found: list[StableRate] = []
    rate, steps = FIRST_SHARE * largest, FIRST_STEPS
    for _ in range(ROUNDS):
        for group, own in zip(groups, relative, strict=True):
            group['lr'] = rate * own / largest
        for _ in range(steps):
            model.train_step(next(batches), optim_wrapper=wrapper)
        loss = loss_of(model, [next(batches)], mode='train')
        found.append(largest_rate(loss, wrapper.optimizer, vectors=VECTORS, tolerance=TOLERANCE))
        if not math.isfinite(found[-1].rate):
            raise ValueError('no direction of the loss curves upwards, so that no rate is a limit')
        rate, steps = SHARE * found[-1].rate, STEPS_BETWEEN
    return found


def _name(optimizer: torch.optim.Optimizer) -> str:
    """Name of an optimizer; methods and rule where they were chosen layer by layer."""
    if not isinstance(optimizer, Preconditioned):
        return type(optimizer).__name__
    methods = {stack.method.title for stack in optimizer.curvature.stacks}
    return f'{"+".join(sorted(methods))} on {rule_name(type(optimizer.rule))}'


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
