"""Batches for hooks, apart from those of the training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from torch.utils.data import DataLoader


def fresh_loader(loader: Any, workers: int | None = None) -> DataLoader[Any]:
    """Builds a loader with its own sampler. Reading the training's would consume its sampler.

    Args:
        loader: The loader of the training.
        workers: Processes; default: as many as the training's loader has.
    """
    size = loader.batch_size or loader.batch_sampler.batch_size
    return DataLoader(
        loader.dataset,
        size,
        sampler=DefaultSampler(loader.dataset, seed=0),
        num_workers=loader.num_workers if workers is None else workers,
        collate_fn=loader.collate_fn,
    )


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seeds all generators inside the context, and restores them after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
