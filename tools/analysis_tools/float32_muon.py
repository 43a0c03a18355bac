"""tools/train.py, where Muon of pytorch_optimizer orthogonalizes in float32 if that is faster.

Its Newton-Schulz iterations are in bfloat16. A processor without units for bfloat16 emulates them,
at 15 to 50 times the price of float32.
"""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import torch
from pytorch_optimizer.optimizer.muon import base

from mmprecond.linalg.precision import has_bfloat16_units

#: Function of that package whose `dtype` no setting reaches.
NAME = 'zero_power_via_newton_schulz_5'


def multiply_in_float32() -> None:
    """Makes Muon of pytorch_optimizer orthogonalize in float32."""
    setattr(base, NAME, functools.partial(getattr(base, NAME), dtype=torch.float32))


if __name__ == '__main__':
    if not has_bfloat16_units():
        multiply_in_float32()
    train = Path(__file__).resolve().parents[1] / 'train.py'
    runpy.run_path(str(train), run_name='__main__')
