"""Swin-T at its real size: memory of a capture, and Mask R-CNN as MMDetection configures it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmprecond import AFOpt
from mmprecond.curvature import AttentionLayer

pytest.importorskip('mmdet')
CONFIG = 'configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco_afopt-nkfac.py'
MB = 2**20


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), given)
        return result

    def _enter(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in given:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize('variant', ['thesis', 'gauss_newton'])
@pytest.mark.parametrize(
    ('width', 'heads', 'height', 'length'),
    [(96, 3, 200, 334), (768, 24, 25, 42)],  # most windows, and the widest
)
def test_a_capture_stays_within_its_memory(
    monkeypatch: pytest.MonkeyPatch, width: int, heads: int, height: int, length: int, variant: str
) -> None:
    """Beside activations: `capture_mb`, and the statistics twice."""
    from mmdet.models.backbones.swin import ShiftWindowMSA

    block = ShiftWindowMSA(
        width, heads, 7, shift_size=3, dropout_layer=dict(type='DropPath', drop_prob=0.0)
    )
    optimizer = AFOpt(block, lr=0.1, variant=variant)
    measure, peaks = AttentionLayer.measure, []

    def watched(*args: Any) -> dict[str, Tensor]:
        with PeakMemory() as memory:
            result = measure(*args)
        peaks.append(memory.peak / MB)
        return result

    monkeypatch.setattr(AttentionLayer, 'measure', watched)
    inputs = torch.randn(1, height * length, width)
    block(inputs, (height, length)).square().mean().backward()
    layer = next(layer for layer in optimizer.curvature.layers if isinstance(layer, AttentionLayer))
    statistics = sum(
        s.numel() * 4 / MB for s in optimizer.curvature.capture.staged[layer].sums.values()
    )
    assert len(peaks) == 1 and statistics < peaks[0] < 64 + 2 * statistics


def build() -> tuple[nn.Module, Any]:
    """The detector and its optimizer wrapper as configured, but without pretrained weights."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper

    register_all_modules(init_default_scope=True)
    config = Config.fromfile(CONFIG)
    config.model.backbone.init_cfg = None
    config.model.backbone.drop_path_rate = 0.0  # so that every layer is called
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    return model.train(), build_optim_wrapper(model, config.optim_wrapper)


def batch(seed: int, height: int = 800, width: int = 1333, objects: int = 6) -> dict[str, Any]:
    """One image of noise with boxes and box-shaped masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(objects, 2, generator=random) * torch.tensor([width - 200, height - 200])
    size = 60 + 130 * torch.rand(objects, 2, generator=random)
    boxes = torch.cat([corner, corner + size], 1)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(height, width),
            ori_shape=(height, width),
            pad_shape=(height, width),
            batch_input_shape=(height, width),
            scale_factor=(1.0, 1.0),
            img_id=seed,
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.randint(0, 80, (objects,), generator=random),
        masks=BitmapMasks(masks.numpy(), height, width),
    )
    image = torch.randint(0, 255, (3, height, width), generator=random, dtype=torch.uint8)
    return dict(inputs=[image], data_samples=[sample])


@pytest.mark.slow
def test_mask_rcnn_swin_t_trains_at_its_real_size() -> None:
    """Two iterations, each with statistics and an early refresh (about 6.5 GB)."""
    model, wrapper = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(2):
        losses = model.train_step(batch(seed), wrapper)
        assert all(torch.isfinite(value) for value in losses.values())
    assert len(wrapper.optimizer.curvature.layers) > 60
    assert all(
        stack.members and all(member.refreshes == 2 for member in stack.members)
        for stack in wrapper.optimizer.curvature.stacks
    )
    assert all(p.isfinite().all() for p in model.parameters())
    unchanged = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and torch.equal(p, before[name])
    ]
    assert not unchanged
