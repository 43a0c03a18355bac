"""A surgery from a config: which losses it sees, and what it does to a run of MMEngine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmprecond.surgery import PCGrad
from tests.support.classifier import batch, train_on_one_batch
from tests.support.errors import refused

SGD = dict(type='SGD', lr=0.1)
NKFAC = dict(type='NKFAC', lr=0.05, stat_interval=1, refresh_interval=2)


class Detector(BaseModel):
    """A model with three losses on a shared body, one of them a list, as heads with levels have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.classify, self.regress = nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        features = torch.relu(self.conv(inputs)).mean((2, 3))
        scores, boxes = self.classify(features), self.regress(features)
        if mode != 'loss':
            return scores
        return dict(
            loss_cls=nn.functional.cross_entropy(scores, data_samples),
            loss_bbox=[(boxes - 1).square(), (boxes[:4] + 2).square()],
            loss_rpn=2 - features.mean(),
            acc=scores.mean().detach(),
        )


def build(surgery: Any, optimizer: dict[str, Any] = SGD, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Detector()
    if optimizer is SGD:
        settings['precondition'] = None
    cfg = dict(constructor='PrecondOptimWrapperConstructor', optimizer=optimizer, **settings)
    return model, build_optim_wrapper(model, dict(cfg, surgery=surgery))


def gradients(model: Any, seed: int, groups: list[list[str]]) -> Tensor:
    """Gradients (k, n) of groups of losses by the convolution's parameters."""
    rows = []
    for group in groups:
        losses = model(**batch(seed=seed), mode='loss')
        total, _ = model.parse_losses({name: losses[name] for name in group})
        found = torch.autograd.grad(total, list(model.conv.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


@pytest.mark.parametrize('groups', [None, [['loss_rpn'], ['loss_cls', 'loss_b*']]])
@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_the_step_follows_the_combined_gradient(
    groups: list[list[str]] | None, accumulative_counts: int
) -> None:
    surgery = dict(type='PCGrad', seed=3, **({'groups': groups} if groups else {}))
    model, wrapper = build(surgery, accumulative_counts=accumulative_counts)
    names = [['loss_rpn'], ['loss_cls', 'loss_bbox']]
    each = names if groups else [['loss_cls'], ['loss_bbox'], ['loss_rpn']]
    parts = sum(gradients(model, k, each) for k in range(accumulative_counts))
    expected = PCGrad(seed=3).combine(parts / accumulative_counts)
    before = torch.cat([p.detach().flatten() for p in model.conv.parameters()])
    for k in range(accumulative_counts):
        model.train_step(batch(seed=k), wrapper)
    after = torch.cat([p.detach().flatten() for p in model.conv.parameters()])
    torch.testing.assert_close((before - after) / 0.1, expected, atol=1e-5, rtol=1e-4)


def test_mixed_precision_scales_and_unscales(amp_on_cpu: None) -> None:
    """With a scale of the loss, the step is that without one, up to bfloat16."""
    steps = []
    for more in ({}, dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=512.0)):
        model, wrapper = build('PCGrad', **more)
        before = model.conv.weight.detach().clone()
        model.train_step(batch(), wrapper)
        steps.append(model.conv.weight.detach() - before)
    assert float((steps[0] - steps[1]).norm() / steps[0].norm()) < 0.05


def test_an_overflow_leaves_everything(amp_on_cpu: None) -> None:
    model, wrapper = build('GCond', NKFAC, type='AmpOptimWrapper', dtype='bfloat16')
    before = model.conv.weight.detach().clone()
    bad = batch()
    bad['inputs'][0, 0, 0, 0] = float('inf')
    model.train_step(bad, wrapper)
    assert torch.equal(model.conv.weight, before) and wrapper.surgery.diagnostics == {}
    model.train_step(batch(), wrapper)
    assert not torch.equal(model.conv.weight, before) and wrapper.surgery.diagnostics


def trained(folder: Path, iterations: int, **more: Any) -> Runner:
    torch.manual_seed(0)
    return train_on_one_batch(
        Detector(),
        folder,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(
            constructor='PrecondOptimWrapperConstructor', optimizer=NKFAC, surgery='GCond'
        ),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False),
        ),
        randomness=dict(seed=0),
        **more,
    )


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_logs_conflicts(tmp_path: Path) -> None:
    whole = trained(tmp_path / 'whole', 6)
    trained(tmp_path / 'parts', 3)
    second = trained(tmp_path / 'parts', 6, resume=True)
    for (name, p), q in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    (scalars,) = tmp_path.glob('whole/*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    names = {
        'surgery/min_cosine',
        'surgery/conflicts',
        'surgery/norm_ratio',
        'surgery/norm_loss_cls',
    }
    assert names <= set(lines[0])


def test_a_checkpoint_without_a_surgery_is_taken() -> None:
    _, plain = build(None, NKFAC)
    model, wrapper = build('SAMGS', NKFAC)
    wrapper.load_state_dict(plain.state_dict())
    model.train_step(batch(), wrapper)


def test_what_is_refused() -> None:
    refused(ValueError, lambda: build('CAGrad'), 'CAGrad')
    names = dict(type='PCGrad', groups=['loss_a', 'loss_b'])
    refused(ValueError, lambda: build(names), "write groups=[['loss_rpn_*'], ...]")
    refused(ValueError, lambda: build('GCond', dict(type='SGDPH', lr=0.1)), 'differentiate twice')
    model, wrapper = build(dict(type='PCGrad', groups=[['loss_cls'], ['loss_box']]))
    refused(ValueError, lambda: model.train_step(batch(), wrapper), 'each of the losses')
    model, wrapper = build('PCGrad')
    with wrapper.optim_context(model):
        losses = model(**batch(), mode='loss')
    halved = model.parse_losses(losses)[0] / 2
    refused(ValueError, lambda: wrapper.update_params(halved), 'needs their sum')
    model, wrapper = build('PCGrad')
    loss = model.parse_losses(model(**batch(), mode='loss'))[0]
    refused(ValueError, lambda: wrapper.update_params(loss), 'saw no losses')
