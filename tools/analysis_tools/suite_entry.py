"""tools/train.py as the suite calls it.

Muon of pytorch_optimizer orthogonalizes in float32 on a CPU without units for bfloat16, which would
emulate its Newton-Schulz iterations at 15 to 50 times the price. With a `TurnHook` in the config
(``default_hooks.turns.type=TurnHook``) every iteration waits for its turn.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmprecond.linalg.precision import has_bfloat16_units

MUON = 'pytorch_optimizer.Muon'
#: Function of that package whose `dtype` no setting reaches.
NEWTON_SCHULZ = 'zero_power_via_newton_schulz_5'


@HOOKS.register_module()
class TurnHook(Hook):
    """Waits for a byte before each iteration, and writes the seconds of each to a pipe.

    Args:
        turn_fd: File descriptor with a byte for each iteration.
        report_fd: File descriptor for a line when training begins, and for the seconds of each
            iteration, with its data and all other hooks.
    """

    priority = 'LOWEST'

    def __init__(self, turn_fd: int, report_fd: int) -> None:
        self._turn_fd, self._report_fd = turn_fd, report_fd
        self._begun = 0.0

    def before_train(self, runner: Any) -> None:
        """Reports that the start-up is over, and waits."""
        self._report('ready')

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Reports the seconds of the iteration, and waits."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._report(repr(time.perf_counter() - self._begun))

    def _report(self, text: str) -> None:
        os.write(self._report_fd, f'{text}\n'.encode())
        if not os.read(self._turn_fd, 1):
            raise SystemExit('the command that grants turns has ended')
        self._begun = time.perf_counter()


def multiply_in_float32() -> None:
    """Makes Muon of pytorch_optimizer orthogonalize in float32."""
    from pytorch_optimizer.optimizer.muon import base

    original = getattr(base, NEWTON_SCHULZ)
    setattr(base, NEWTON_SCHULZ, functools.partial(original, dtype=torch.float32))


if __name__ == '__main__':
    if MUON in sys.argv and not (torch.cuda.is_available() or has_bfloat16_units()):
        multiply_in_float32()
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'train.py'), run_name='__main__')
