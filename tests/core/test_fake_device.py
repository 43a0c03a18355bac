"""A plain step never waits for a GPU, and launches few kernels; proven without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mmprecond import optimizers
from mmprecond.core import LayerStack
from mmprecond.core.directions import transform
from mmprecond.engine import launch
from mmprecond.engine.synthetic import random_model
from mmprecond.optimizers import NKFAC, Preconditioned, PreconditionedOptimizer
from tests.support.fake_device import Launches, load_operators, plain_step, to_fake_device
from tests.support.mixed import Net

STEP = 301  # no interval divides it, nor the next one

KINDS = [
    kind
    for name in optimizers.__all__
    if isinstance(kind := getattr(optimizers, name), type)
    and issubclass(kind, PreconditionedOptimizer)
    # The last three capture at every step.
    and kind.__name__
    not in ('PreconditionedOptimizer', 'Preconditioned', 'AdaAct', 'SOAP', 'Shampoo')
]


def step_of(model: nn.Module, make: Any) -> tuple[Counter[str], PreconditionedOptimizer]:
    """Operations of a plain step of an optimizer of the trained parameters, on the fake GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake_device(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make(trained, model=model, check_memory=False)
        load_operators(optimizer, STEP)
        return plain_step(model, optimizer), optimizer


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_no_optimizer_waits_for_the_device(kind: type[PreconditionedOptimizer]) -> None:
    seen, _ = step_of(Net(), lambda params, **options: kind(params, lr=0.1, **options))
    assert seen.total() > 10


@pytest.mark.parametrize('words', ['AFOpt+NKFAC', 'AFOpt+AdamR'])
def test_no_hybrid_waits_for_the_device(words: str) -> None:
    rule = dict(type='AdamW', lr=0.1)
    step_of(Net(), lambda p, **options: Preconditioned(p, rule=rule, layers=words, **options))


def test_the_proof_sees_what_waits() -> None:
    with FakeTensorMode():
        value = torch.zeros(3, device='cuda')
        with Launches() as launches, pytest.raises(Exception, match='local_scalar'):
            value.sum().item()
        with Launches(), pytest.raises(AssertionError, match='one device to another'):
            value.cpu()
        with Launches() as launches:
            (value * torch.tensor(2.0)).view(1, 3)
        assert launches.seen == Counter(mul=1)


def test_launches_of_a_detector() -> None:
    """Faster R-CNN R50 with the defaults: at most 250 in all."""
    pytest.importorskip('mmdet')
    cfg = launch.load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    seen, optimizer = step_of(
        random_model(cfg), lambda params, **options: NKFAC(params, lr=0.1, **options)
    )
    stacks = [stack for stack in optimizer.curvature.stacks if stack.members]
    assert sum(len(stack.members) for stack in stacks) == 57
    assert seen.total() <= 250 and seen.total() <= 12 * len(stacks)
    assert seen['_foreach_norm'] == 2 and 'linalg_vector_norm' not in seen
    counts = {stack: launches_of(stack) for stack in stacks}
    assert max(counts.values()) <= 16
    # Only k x k convolutions take more than 12, those with a joint bias more than 13.
    above = {stack.members[0].layer: count for stack, count in counts.items() if count > 12}
    assert all(layer.kernel_positions > 1 for layer in above) and len(above) <= 4
    assert all(layer.bias is not None for layer, count in above.items() if count > 13)


def launches_of(stack: LayerStack) -> int:
    """Number of operations that turn the gradients of a stack into directions."""
    layers = [member.layer for member in stack.members]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        gradients: dict[Tensor, Tensor] = {
            p: torch.zeros_like(p) for layer in layers for p in layer.parameters
        }
        with Launches() as launches:
            batch = transform(stack, stack.method.apply, gradients)
    return launches.seen.total() + len(batch)  # and the factor of the norm
