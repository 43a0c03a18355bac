"""A small model with a config of `Preconditioned`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper

from tests.support.classifier import Classifier

RULE = dict(type='AdamW', lr=0.01, weight_decay=0.1)
LAYERS = [
    dict(
        match=dict(name='fc'),
        preconditioner=dict(type='NewtonKronecker', stat_interval=1, refresh_interval=2),
    ),
    dict(
        match=dict(module_type=['Conv2d']),
        preconditioner=dict(type='InputFeature', stat_interval=2, refresh_interval=2),
    ),
]


OPTIMIZER = dict(type='Preconditioned', rule=RULE, layers=LAYERS)


def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def build(built: Classifier, **cfg: Any) -> OptimWrapper:
    given = dict(constructor='PrecondOptimWrapperConstructor', optimizer=OPTIMIZER) | cfg
    return build_optim_wrapper(built, given)


def rates(wrapper: OptimWrapper, built: Classifier, key: str = 'lr') -> dict[str, float]:
    """A setting of each parameter by name."""
    names = {p: name for name, p in built.named_parameters()}
    return {
        names[p]: group[key] for group in wrapper.optimizer.param_groups for p in group['params']
    }


def config() -> Config:
    return Config(
        dict(
            optim_wrapper=dict(
                type='OptimWrapper',
                constructor='PrecondOptimWrapperConstructor',
                paramwise_cfg=dict(norm_decay_mult=0.0),
                optimizer=copy.deepcopy(OPTIMIZER),
            )
        )
    )
