"""Hook that makes what is random in an iteration depend on the iteration alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SeedHook(Hook):
    """Seeds all generators before each iteration, so that a resumed run draws the same numbers.

    Args:
        seed: Seed of the run.
    """

    priority = 'VERY_HIGH'

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds Python, NumPy and torch by the run's seed and the iteration."""
        number = 10**6 * self.seed + runner.iter
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.manual_seed(number)
