"""Random numbers apart from those of a training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_rng(seed: int, devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Seeds torch, NumPy and Python inside the context, and restores their states after it.

    Args:
        seed: The seed.
        devices: CUDA devices whose random numbers are drawn too.
    """
    cuda = [device for device in dict.fromkeys(devices) if device.type == 'cuda']
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(seed)
        for device in cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
