"""Batches for hooks, apart from those of the training."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from torch.utils.data import DataLoader, RandomSampler


def fresh_loader(loader: Any, workers: int | None = None, joint: bool = False) -> DataLoader[Any]:
    """Builds a loader with its own sampler. Reading the training's would consume its sampler.

    Args:
        loader: The loader of the training.
        workers: Processes; default: as many as the training's loader has.
        joint: Whether all ranks get the same batches; by default each has a part of the data.
    """
    generator = torch.Generator().manual_seed(0)
    sampler = (
        RandomSampler(loader.dataset, generator=generator)
        if joint
        else DefaultSampler(loader.dataset, seed=0)
    )
    return DataLoader(
        loader.dataset,
        loader.batch_size or loader.batch_sampler.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers if workers is None else workers,
        collate_fn=loader.collate_fn,
    )
