"""Learning rates for another batch size than the config's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmengine.optim import OptimWrapperDict

#: Entries of groups of Adam and its kin, torch's Adagrad, RMSprop and Adadelta.
ROOT_KEYS = {'betas', 'initial_accumulator_value', 'centered', 'rho'}


def scale_rates(runner: Any) -> None:
    """Scales rates to the batch size, where `auto_scale_lr` of the config asks for it.

    MMEngine would scale all rates by the ratio of the batch sizes. This suits rules like SGD (Goyal
    et al., arXiv 1706.02677). Rules like Adam divide by the root of the gradient's
    second moment, whose noise falls with the root of the batch size: their rates are scaled by the
    root of the ratio (Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms, arXiv 2205.10287). The log has a line.

    Args:
        runner: MMEngine's runner, before `train`, with its optim wrapper built. Its
            `accumulative_counts` counts as a part of the batch size.
    """
    settings = runner.auto_scale_lr
    if not settings or not settings.get('enable'):
        return
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    batch = runner.world_size * runner.cfg.train_dataloader['batch_size']
    for one in wrappers:
        size = batch * getattr(one, '_accumulative_counts', 1)
        ratio = size / settings['base_batch_size']
        for group in one.optimizer.param_groups:
            group['lr'] *= math.sqrt(ratio) if divides_by_root(one.optimizer, group) else ratio
        runner.logger.info(
            f'rates are scaled from {settings["base_batch_size"]} to {size} images a step: by '
            f'{ratio:.4g} for rules like SGD, by its square root {math.sqrt(ratio):.4g} for rules '
            'like Adam'
        )
    settings['enable'] = False  # MMEngine would scale them again


def divides_by_root(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """True if a group's updates are divided by the root of a second moment of the gradients."""
    rule = getattr(optimizer, 'rule', None)
    return getattr(rule, 'elementwise', False) or not ROOT_KEYS.isdisjoint(group)
