"""Vectors that are measured: means and squares of inputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from mmprecond.curvature import GRADIENT, INPUT, Capture, Mean, Square, Statistic, find_layers
from mmprecond.optimizers import AdaAct
from tests.reference.factors import gradient_rows, input_rows, plain_copy
from tests.support.capture import CONVS, EMPTY, geometries, loss_of
from tests.support.networks import ConvNet

VECTORS = (Statistic(INPUT, Mean()), Statistic(INPUT, Square()), Statistic(GRADIENT, Square()))


def check(module: nn.Module, *inputs: Tensor) -> None:
    """The three vectors of some calls, against rows one by one."""
    module = module.double()
    found, _ = find_layers(module, [dict(params=list(module.parameters()))])
    (layer,) = found.values()
    capture = Capture()
    capture.arm({layer: VECTORS})
    joint = module.bias is not None
    rows, slopes = [], []
    for x in inputs:
        x = x.double()
        loss_of(module(x)).backward()
        rows.append(input_rows(module, x, joint))
        out = plain_copy(module)(x)
        slopes.append(gradient_rows(module, torch.autograd.grad(loss_of(out), out)[0]))
    capture.disarm()
    right, left = torch.cat(rows, 1), torch.cat(slopes, 1)
    wanted = {
        'input_mean': right.sum(1),
        'input_square': right.square().sum(1),
        'gradient_square': left.square().sum(1),
    }
    staged = capture.staged[layer]
    assert staged.rows == right.shape[1]
    shapes = {key: shape for one in VECTORS for key, shape in layer.shapes(one).items()}
    for name, vector in wanted.items():
        assert staged.sums[name].shape == shapes[name]
        torch.testing.assert_close(staged.sums[name][..., 0], vector, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(4,), (5, 4), (2, 3, 4)])
def test_vectors_of_linear_layers(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    check(nn.Linear(4, 3, bias=bias), torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', CONVS)
def test_vectors_of_convolutions(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    check(
        nn.Conv2d(**{'in_channels': 4, 'out_channels': 4, 'bias': bias, **CONVS[name]}),
        torch.randn(2, 4, 5, 6),
        torch.randn(4, 6, 5),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(geometries())
def test_vectors_of_any_geometry(case: tuple[dict[str, Any], tuple[int, ...], float]) -> None:
    conv, shape, _ = case
    torch.manual_seed(0)
    check(nn.Conv2d(**conv), torch.randn(shape))


@pytest.mark.parametrize('make, shape', EMPTY)
def test_vectors_of_empty_calls(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(make(), torch.randn(shape), torch.randn(2, *shape[1:]))


def test_a_capture_lays_out_no_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over images comes first."""
    from mmprecond.curvature import Conv2dLayer

    monkeypatch.setattr(Conv2dLayer, 'input_rows', lambda *_: pytest.fail('laid out'))
    model = ConvNet()
    optimizer = AdaAct(model, lr=0.1)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert all(
        member.refreshes == 1 for stack in optimizer.curvature.stacks for member in stack.members
    )
