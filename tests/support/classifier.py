"""A small MMEngine model, its batches and wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset


class Classifier(BaseModel):
    """A small MMEngine model; 'tensor' mode is never trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        out = self.fc(torch.relu(self.norm(self.conv(inputs))).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(out, data_samples))
        return out


def build(model: nn.Module, **cfg: Any) -> OptimWrapper:
    cfg.setdefault(
        'optimizer',
        dict(
            type='NKFAC',
            lr=0.1,
            weight_decay=0.0,
            stat_interval=2,
            refresh_interval=4,
            early_refreshes=False,
        ),
    )
    return build_optim_wrapper(model, dict(constructor='PrecondOptimWrapperConstructor', **cfg))


def batch(size: int = 8, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return dict(
        inputs=torch.randn(size, 3, 8, 8, generator=generator),
        data_samples=torch.randint(0, 4, (size,), generator=generator),
    )


class Labelled(OptimWrapper):
    """A user's own wrapper."""

    def __init__(self, label: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label = label


class OneBatch(Dataset):
    """The same eight samples at every iteration, whatever the sampler does after a resume."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(8, 3, 8, 8, generator=generator)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=self.images[index], data_samples=index % 4)


def train_on_one_batch(
    model: BaseModel,
    folder: Path,
    *,
    batch_size: int = 8,
    sampler: str = 'DefaultSampler',
    **cfg: Any,
) -> Runner:
    """Trains a model on `OneBatch` by a runner with these settings, and returns the runner."""
    runner = Runner(
        model=model,
        work_dir=str(folder),
        experiment_name=folder.name,
        train_dataloader=dict(
            dataset=OneBatch(),
            batch_size=batch_size,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type=sampler, shuffle=batch_size < len(OneBatch())),
        ),
        **cfg,
    )
    runner.train()
    return runner


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class HalfRateConstructor:
    """A user's constructor, with `add_params` of its own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        from mmengine.optim import DefaultOptimWrapperConstructor

        class Halved(DefaultOptimWrapperConstructor):
            def add_params(self, params: list, module: nn.Module, **kwargs: Any) -> None:
                params += [dict(params=[p], lr=self.base_lr / 2) for p in module.parameters()]

        return Halved(*args, **kwargs)
