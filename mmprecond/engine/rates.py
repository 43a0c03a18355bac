"""Learning rates for another batch size than the config's."""

from __future__ import annotations

import math
from typing import Any

from mmengine.optim import OptimWrapperDict


def scale_rates(runner: Any) -> None:
    """Scales rates to the batch size, where `auto_scale_lr` of the config asks for it.

    MMEngine scales all rates by the ratio of the batch sizes. This suits rules like SGD (Goyal et
    al., arXiv 1706.02677) and is left to it. Rules like Adam divide by the root of the gradient's
    second moment, whose noise falls with the root of the batch size: their rates are scaled by the
    root of the ratio (Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms, arXiv 2205.10287). Either way the log has a line.

    Args:
        runner: MMEngine's runner, before `train`, with its optim wrapper built.
    """
    settings = runner.auto_scale_lr
    if not settings or not settings.get('enable'):
        return
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    groups = [group for one in wrappers for group in one.optimizer.param_groups]
    adaptive = [group for group in groups if 'betas' in group]
    size = runner.world_size * runner.cfg.train_dataloader['batch_size']
    ratio = size / settings['base_batch_size']
    for group in adaptive:
        group['lr'] *= math.sqrt(ratio)
    if len(adaptive) < len(groups):
        # MMEngine will scale all groups by the ratio.
        for group in adaptive:
            group['lr'] /= ratio
    else:
        settings['enable'] = False
    if adaptive:
        runner.logger.info(
            f'rates of rules like Adam are scaled by {math.sqrt(ratio):.4g}, the square root of '
            f'the batch size {size} over {settings["base_batch_size"]}'
        )
