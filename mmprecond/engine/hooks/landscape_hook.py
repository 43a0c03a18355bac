"""Hook that computes loss landscapes during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...checks import check_choice, check_count
from ...loss_surface import Spectrum, explore
from ...loss_surface.explore import check_settings
from ...loss_surface.loss import MODES
from ...loss_surface.randomness import isolated_rng
from ..landscape_inputs import loss_of
from .loading import fresh_loader


class LandscapeHook(Hook):  # type: ignore[misc]
    """Hook that finds the spectrum of the Hessian after given epochs or iterations.

    It writes the files of `mmprecond.landscape.explore` to ``landscape/epoch_N`` (or ``iter_N``) in
    the run's folder, and the scalars ``landscape/largest``, ``landscape/smallest`` and
    ``landscape/mean`` to the visualizer (TensorBoard and others), with
    ``landscape/preconditioned_...`` where the optimizer has a map P. All ranks evaluate the same
    training batches each time, because a loss may contain collective operations; the first one
    writes. The run goes on as without the hook, bit for bit.

    Args:
        epochs: Epochs after which it looks, counted from 1.
        iters: Iterations after which it looks, counted from 1.
        batches: Training batches of the loss.
        mode: See `Loss`.
        **settings: Arguments of `explore`, such as `steps`, `runs`, `matrix` and `plane`; the
            default of `plane` is 'none' here, and no progress bar is shown.

    Raises:
        ValueError: If neither epochs nor iters are given, one is no number from 1 or beyond the end
            of the run, or a setting is invalid.
        TypeError: If a setting is unknown.
    """

    priority = 'LOW'

    def __init__(
        self,
        epochs: Sequence[int] = (),
        iters: Sequence[int] = (),
        batches: int = 1,
        mode: str = 'eval',
        **settings: Any,
    ) -> None:
        if not epochs and not iters:
            raise ValueError('LandscapeHook has nothing to do: write epochs=[1, 12] or iters=[500]')
        for number in (*epochs, *iters, batches):
            check_count('a number of LandscapeHook', number)
        check_choice('mode', mode, MODES)
        check_settings({'progress': False, **settings})
        self.epochs, self.iters = set(epochs), set(iters)
        self.batches = batches
        self.mode = mode
        self.settings = {'plane': 'none', 'progress': False, **settings}

    def before_train(self, runner: Any) -> None:
        """Checks that the run is long enough."""
        self.check_length(runner.train_loop)

    def check_length(self, loop: Any) -> None:
        """Raises ValueError if a run has fewer epochs or iterations than the hook waits for."""
        for name, wanted in (('epochs', self.epochs), ('iters', self.iters)):
            length = getattr(loop, f'max_{name}', math.inf)
            if wanted and max(wanted) > length:
                raise ValueError(
                    f'LandscapeHook has {name}={sorted(wanted)}, and the run ends after {length}'
                    + ('; give iters instead' if name == 'epochs' and length == 1 else '')
                )

    def after_train_epoch(self, runner: Any) -> None:
        """Looks after one of the epochs."""
        if runner.epoch + 1 in self.epochs:
            self._write_landscape(runner, f'epoch_{runner.epoch + 1}', runner.iter)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Looks after one of the iterations."""
        if runner.iter + 1 in self.iters:
            self._write_landscape(runner, f'iter_{runner.iter + 1}', runner.iter + 1)

    def _write_landscape(self, runner: Any, name: str, step: int) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
        folder = Path(runner.log_dir) / 'landscape' / name if is_main_process() else None
        with isolated_rng(0, (p.device for p in model.parameters())):
            loader = fresh_loader(runner.train_dataloader, workers=0, joint=True)
            loss = loss_of(model, list(islice(loader, self.batches)), self.mode)
            spectra = explore(loss, folder, optimizer, **self.settings)
        runner.visualizer.add_scalars(spectrum_scalars(list(spectra.values())), step=step)


def spectrum_scalars(spectra: Sequence[Spectrum]) -> dict[str, float]:
    """Scalars of the plain spectrum, and of the preconditioned one if there is one."""
    prefixes = ('landscape/', 'landscape/preconditioned_')
    return {
        f'{prefix}{name}': getattr(spectrum, name)
        for prefix, spectrum in zip(prefixes, spectra, strict=False)
        for name in ('largest', 'smallest', 'mean')
    }
