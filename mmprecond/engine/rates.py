"""Learning rates for another batch size than the config's."""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim import OptimWrapperDict


def scale_rates(runner: Any) -> None:
    """Scales rates to the batch size, where `auto_scale_lr` of the config asks for it.

    MMEngine would scale all rates by the ratio of the batch sizes. This suits rules like SGD (Goyal
    et al., arXiv 1706.02677). Rules like Adam divide by the root of the gradient's
    second moment, whose noise falls with the root of the batch size: their rates are scaled by the
    root of the ratio (Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms, arXiv 2205.10287). The log has a line.

    Args:
        runner: MMEngine's runner, before `train`, with its optim wrapper built.
    """
    settings = runner.auto_scale_lr
    if not settings or not settings.get('enable'):
        return
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    groups = [group for one in wrappers for group in one.optimizer.param_groups]
    size = runner.world_size * runner.cfg.train_dataloader['batch_size']
    ratio = size / settings['base_batch_size']
    for group in groups:
        group['lr'] *= math.sqrt(ratio) if 'betas' in group else ratio
    settings['enable'] = False  # MMEngine would scale them again
    runner.logger.info(
        f'rates are scaled from {settings["base_batch_size"]} to {size} images a step: by '
        f'{ratio:.4g} for rules like SGD, by its square root {math.sqrt(ratio):.4g} for rules like '
        'Adam'
    )
