"""tools/train.py as the suite calls it.

Muon of pytorch_optimizer orthogonalizes in float32 if that is faster: its Newton-Schulz iterations
are in bfloat16, which a processor without units for it emulates, at 15 to 50 times the price. With
a `TurnHook` in the config (``default_hooks.turns.type=TurnHook``) every iteration waits for its
turn.
"""

from __future__ import annotations

import functools
import os
import runpy
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmprecond.linalg.precision import has_bfloat16_units

#: Function of pytorch_optimizer whose `dtype` no setting reaches.
NAME = 'zero_power_via_newton_schulz_5'


@HOOKS.register_module()
class TurnHook(Hook):
    """Waits for a byte before each iteration, and writes the seconds of each to a pipe.

    Args:
        turns: File descriptor to read a byte from before each iteration.
        seconds: File descriptor to write to: a line when training begins, and the seconds of each
            iteration, with its data and all other hooks.
    """

    priority = 'LOWEST'

    def __init__(self, turns: int, seconds: int) -> None:
        self._turns, self._seconds = turns, seconds
        self._begun = 0.0

    def before_train(self, runner: Any) -> None:
        """Reports that the start-up is over, and waits."""
        self._report('ready')

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Reports the seconds of the iteration, and waits."""
        self._report(repr(time.perf_counter() - self._begun))

    def _report(self, text: str) -> None:
        os.write(self._seconds, f'{text}\n'.encode())
        os.read(self._turns, 1)
        self._begun = time.perf_counter()


def multiply_in_float32() -> None:
    """Makes Muon of pytorch_optimizer orthogonalize in float32."""
    from pytorch_optimizer.optimizer.muon import base

    setattr(base, NAME, functools.partial(getattr(base, NAME), dtype=torch.float32))


if __name__ == '__main__':
    if not has_bfloat16_units():
        multiply_in_float32()
    runpy.run_path(str(Path(__file__).resolve().parents[1] / 'train.py'), run_name='__main__')
