"""Batches of noise for models of every toolbox, and forecasts on them."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel, ImgDataPreprocessor
from torch import Tensor, nn

from mmprecond import diagnostics
from mmprecond.engine import launch, synthetic
from mmprecond.engine.synthetic import own_size, random_model, synthetic_batch
from mmprecond.optimizers import NKFAC

POSE = 'mmpose::body_2d_keypoint'
MODELS = {
    'mmdet::retinanet/retinanet_r18_fpn_1xb8-1x_coco.py': ('loss', (224, 224)),
    'mmdet::detr/detr_r50_8xb2-150e_coco.py': ('loss', (224, 224)),
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': ('loss', (224, 224)),
    'mmdet::htc/htc_r50_fpn_1x_coco.py': ('loss', (224, 224)),
    'mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py': ('loss', (224, 224)),
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py': ('loss', (224, 224)),
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': ('loss', (512, 512)),
    'mmrotate::s2anet/s2anet-le135_r50_fpn_1x_dota.py': ('loss', (224, 224)),
    'mmrotate::oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py': ('loss', (224, 224)),
    'mmrotate::gliding_vertex/gliding-vertex-rbox_r50_fpn_1x_dota.py': ('loss', (224, 224)),
    f'{POSE}/topdown_heatmap/coco/td-hm_hrnet-w32_8xb64-210e_coco-256x192.py': (
        'tensor',
        (256, 192),
    ),
    f'{POSE}/rtmpose/coco/rtmpose-t_8xb256-420e_coco-256x192.py': ('tensor', (256, 192)),
}


def forecast(model: nn.Module, size: tuple[int, int] | None = None) -> tuple[Any, ...]:
    curvature = NKFAC(model, lr=0.1).curvature
    return diagnostics.forecast_on_noise(model, curvature.layers, curvature.capture, 2, size)


@pytest.mark.parametrize('config', MODELS)
def test_a_model_of_a_toolbox_takes_its_batch(config: str) -> None:
    pytest.importorskip(config.partition('::')[0])
    mode, size = MODELS[config]
    torch.manual_seed(0)
    model = random_model(launch.load_config(config))
    small = config.startswith(('mmdet', 'mmrotate'))
    batch, costs, own = forecast(model, (64, 96) if small else None)
    assert batch['mode'] == mode and own > 0
    assert sum(cost.calls > 0 for cost in costs.values()) > 0.9 * len(costs) > 10
    assert own_size(model) == size
    assert batch['inputs'].shape == (2, 3, *((64, 96) if small else size))


class Toy(BaseModel):
    """A model of no toolbox, with a layer for training alone."""

    def __init__(self, preprocessor: BaseDataPreprocessor | None = None) -> None:
        super().__init__(preprocessor)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 1)
        self.auxiliary = nn.Conv2d(8, 4, 1)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = 'tensor') -> Any:
        features = self.stem(inputs)
        if mode == 'loss':
            return dict(loss=(self.head(features) + self.auxiliary(features) - labels).sum())
        return self.head(features)


@pytest.mark.parametrize('preprocessor', [None, ImgDataPreprocessor([0.5] * 3, [2.0] * 3)])
def test_any_base_model_takes_images_without_a_loss(preprocessor: Any) -> None:
    model = Toy(preprocessor)
    batch = synthetic_batch(model, 2, (32, 48))
    assert batch['mode'] == 'tensor' and batch['labels'] is None
    assert batch['inputs'].shape == (2, 3, 32, 48) and batch['inputs'].is_floating_point()
    layers = NKFAC(model, lr=0.1).curvature.layers
    batch, costs, own = forecast(model)
    # Forward, and twice as much backward.
    assert own == 3 * 2 * 2 * 224 * 224 * (3 * 9 * 8 + 8 * 4)
    assert sorted(layer.name for layer in costs) == ['head.weight', 'stem.weight']
    line = diagnostics.intro(model, {layer: layers[layer] for layer in layers}, {}, batch)
    assert line.startswith('Toy, batch 2 of 224 x 224 px, on cpu')
    assert line.endswith('forward without the loss: layers used only in training are not counted')


def test_the_size_of_a_model_is_its_codecs_or_its_preprocessors() -> None:
    pose, segmentor, other = Toy(), Toy(), Toy()
    pose.head.decoder = argparse.Namespace(input_size=(192, 256))  # width first
    segmentor.data_preprocessor.size = (512, 384)
    assert [own_size(model) for model in (pose, segmentor, other)] == [
        (256, 192),
        (512, 384),
        (224, 224),
    ]


def test_a_loss_that_takes_no_noise_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def pack(model: nn.Module, images: int, size: tuple[int, int]) -> dict[str, Any]:
        return dict(inputs=torch.rand(images, 3, *size), labels=None)

    monkeypatch.setitem(synthetic.PACKERS, 'tests', pack)
    model = Toy()
    assert synthetic_batch(model, 2, (8, 8))['mode'] == 'loss'
    with caplog.at_level('WARNING', 'mmprecond'):
        batch, costs, _ = forecast(model, (8, 8))
    assert batch['mode'] == 'tensor' and len(costs) == 2
    assert 'The loss takes no batch of noise (TypeError' in caplog.text


class Points(Toy):
    """A model that takes no images."""

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Tensor:  # type: ignore[override]
        return self.stem(inputs.flatten(1))


class Plain(Toy):
    """A model whose forward takes no mode."""

    def forward(self, inputs: Tensor) -> Tensor:  # type: ignore[override]
        return self.stem(inputs)


@pytest.mark.parametrize('kind, reason', [(Points, 'RuntimeError: '), (Plain, 'takes no mode')])
def test_a_model_that_takes_no_noise_ends_in_one_line(kind: type[Toy], reason: str) -> None:
    with pytest.raises(ValueError, match=f'{kind.__name__} takes no batch of noise') as caught:
        forecast(kind())
    text = str(caught.value)
    assert reason in text and 'diagnostics.forecast with a batch of your data' in text
    assert '\n' not in text
