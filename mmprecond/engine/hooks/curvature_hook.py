"""Hook that shows the curvature of a run in MMEngine's visualizer."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from ...checks import check_count
from ...core import Monitor, RefreshReport
from ...optimizers import PreconditionedOptimizer

#: Number of refreshes in a heat map.
SHOWN_REFRESHES = 200
#: Values that have a heat map; True for a logarithm.
MAPS = {'cosine': False, 'largest': True, 'damping': True, 'residual': True, 'rank': False}


class CurvatureHook(Hook):  # type: ignore[misc]
    """Hook that logs each refresh to TensorBoard and all other visualizer backends of the run.

    The scalars ``curvature/...`` have the mean and the largest value over the layers, by side, of
    the damping, the largest eigenvalue, and the residual of Newton's inverses or the rank. Other
    scalars are the cosine between gradient and direction, failed refreshes, seconds and megabytes.
    After every `map_interval` refreshes of all layers the hook also logs a heat map of each value.
    A heat map has a row per layer and a column for each of the last 200 refreshes. Other steps
    compute nothing. Under sharding='apply' the values of operators are those of the first rank's
    share.

    Args:
        map_interval: Refreshes of all layers between heat maps; None for no heat maps.
    """

    priority = 'LOW'

    def __init__(self, map_interval: int | None = 10) -> None:
        if map_interval is not None:
            check_count('map_interval', map_interval)
        self.map_interval = map_interval
        self.history: deque[RefreshReport] = deque(maxlen=SHOWN_REFRESHES)
        self._refreshed = 0

    def before_train(self, runner: Any) -> None:
        """Sets the optimizer's monitor; raises ValueError if it measures no curvature."""
        optimizer = getattr(runner.optim_wrapper, 'optimizer', runner.optim_wrapper)
        if not isinstance(optimizer, PreconditionedOptimizer):
            raise ValueError(
                f'CurvatureHook has nothing to show of {type(optimizer).__name__}; '
                'take it out of custom_hooks'
            )
        if is_main_process():
            optimizer.curvature.watch_refreshes(Monitor())

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Logs the step's refreshes, if there were any."""
        curvature = runner.optim_wrapper.optimizer.curvature
        # Each report is shown once, though a step may take several iterations.
        report = curvature.monitor.take_report() if curvature.monitor else None
        if report is None:
            return
        if not any(report.layers.values()) and not report.failures:
            return  # methods with vectors as operators have nothing to show
        step = runner.iter + 1
        runner.visualizer.add_scalars(
            {f'curvature/{name}': value for name, value in report.summary().items()}, step=step
        )
        self.history.append(report)
        self._refreshed += len(report.layers)
        layers = len(curvature.layers)
        if self.map_interval and self._refreshed >= self.map_interval * layers:
            self._refreshed = 0
            for name, logarithm in MAPS.items():
                image = heat_map(list(self.history), name, logarithm)
                if image is not None:
                    runner.visualizer.add_image(f'curvature_{name}', image, step=step)


def heat_map(history: list[RefreshReport], name: str, logarithm: bool) -> Any:
    """Heat map of one value, layers by refreshes, as bytes (height, width, 3), or None.

    Args:
        history: The reports.
        name: Name of the value; a value by side has rows for both sides.
        logarithm: Whether to show the logarithm.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(
        {
            (layer, key)
            for report in history
            for layer, values in report.layers.items()
            for key in values
            if key.split('/')[0] == name
        }
    )
    if not rows:
        return None
    table = np.array(
        [
            [report.layers.get(layer, {}).get(key, np.nan) for report in history]
            for layer, key in rows
        ]
    )
    if logarithm:
        table = np.log10(np.maximum(table, 1e-30))
    figure = Figure(figsize=(8, 1.5 + 0.2 * len(rows)), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    picture = axes.imshow(table, aspect='auto', interpolation='nearest')
    axes.set_yticks(
        range(len(rows)),
        [f'{layer.removesuffix(".weight")} {key[len(name) + 1 :]}' for layer, key in rows],
        fontsize=6,
    )
    ticks = range(0, len(history), max(1, len(history) // 10))
    axes.set_xticks(ticks, [str(history[k].step) for k in ticks], fontsize=6)
    axes.set_xlabel('step')
    figure.colorbar(picture, label=f'log10 {name}' if logarithm else name)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
