"""Model and optimizer of a cost forecast."""

from __future__ import annotations

from typing import Any

import pytest

from mmprecond.engine import attach, forecast_inputs, launch
from mmprecond.engine.forecast_inputs import build_model
from mmprecond.optimizers import Preconditioned
from tests.support.paths import ROOT

CONFIG = str(ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_shapes_narrow.py')


@pytest.fixture
def cfg() -> Any:
    cfg = launch.load_config(CONFIG)
    attach(cfg, 'NKFAC')
    return cfg


@pytest.mark.parametrize('kind', ['OptimWrapper', 'AmpOptimWrapper'])
def test_mixed_precision_needs_no_gpu(kind: str, cfg: Any) -> None:
    cfg.optim_wrapper.type = kind
    if kind != 'OptimWrapper':
        cfg.optim_wrapper.loss_scale = 'dynamic'
    model, optimizer = build_model(cfg)
    assert isinstance(optimizer, Preconditioned) and model.training
    assert cfg.optim_wrapper.type == kind


def test_a_model_that_cannot_be_built_is_one_line(
    cfg: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cfg: Any) -> None:
        raise RuntimeError('transformers is not installed,\n  please install it')

    monkeypatch.setattr(forecast_inputs, 'random_model', fail)
    with pytest.raises(ValueError, match='cannot be built: transformers is not installed, please'):
        build_model(cfg)


@pytest.mark.parametrize('missing', ['model', 'optim_wrapper'])
def test_a_config_without_a_part_is_one_line(missing: str, cfg: Any) -> None:
    cfg.pop(missing)
    with pytest.raises(ValueError, match='no model or no optim_wrapper'):
        build_model(cfg)


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', (800, 1333)),
        ('mmpretrain::resnet/resnet18_8xb32_in1k.py', (224, 224)),
        ('configs/quickstart/faster-rcnn_r18_fpn_shapes.py', (160, 160)),
    ],
)
def test_images_have_the_size_of_the_config(config: str, size: tuple[int, int]) -> None:
    cfg = launch.load_config(str(ROOT / config) if '::' not in config else config)
    assert forecast_inputs.image_size(cfg.train_dataloader.dataset) == size
