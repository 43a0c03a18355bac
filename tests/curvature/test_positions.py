"""Moments of kernel positions alone: what is measured, and what methods make of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    Conv2dLayer,
    Factor,
    Moment,
    Positions,
    Separable,
    Statistic,
)
from mmprecond.curvature import positions as module
from mmprecond.curvature.conv import ConvTranspose2dLayer
from mmprecond.linalg import position_power
from mmprecond.optimizers import FSGD, NKFAC, AdamR
from tests.reference.factors import plain_copy
from tests.support.capture import loss_of
from tests.support.every_optimizer import net, train
from tests.support.patches import METHODS, layer_of, measured

EACH: dict[str, Any] = dict(stat_interval=1, refresh_interval=1, settings='published')


def test_layers_that_lack_it() -> None:
    conv = layer_of(nn.Conv2d(4, 3, 3))
    assert Positions.of(layer_of(nn.Conv2d(4, 3, 1))) is None
    assert Positions.of(layer_of(nn.ConvTranspose2d(4, 3, 3), kind=ConvTranspose2dLayer)) is None
    assert conv.lacks(Statistic(INPUT, Positions(4, 9, True))) == ''
    for wrong in (Statistic(INPUT, Positions(4, 9, False)), Statistic(GRADIENT, conv_form(conv))):
        assert 'must be Positions.of(layer)' in conv.lacks(wrong)


def conv_form(layer: Conv2dLayer) -> Positions:
    form = Positions.of(layer)
    assert form is not None
    return form


@pytest.mark.parametrize('form', ['kernel', 'auto'])
def test_which_layers_take_it(form: str) -> None:
    """'auto' takes none; layers without patches keep the moment."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 8, 1), nn.Flatten(), nn.Linear(8, 2))
    optimizer = NKFAC(model, lr=0.1, input_factor=form, settings='published')
    forms = [stack.kept[0].form.suffix for stack in optimizer.curvature.layers.values()]
    assert forms == ['kernel' if form == 'kernel' else 'moment', 'moment', 'moment']
    note = 'input side by its 9 positions, 3 channels left alone'
    assert (note in optimizer.table()) == (form == 'kernel')


def test_the_norm_and_the_largest_eigenvalue_are_those_of_the_whole() -> None:
    """Without the 1 of a joint bias in the norm, and with it elsewhere."""
    torch.manual_seed(0)
    layer = layer_of(nn.Conv2d(5, 4, (2, 3)).double())
    form = conv_form(layer)
    positions, ones = measured(
        layer, Statistic(INPUT, form), torch.randn(3, 5, 6, 6).double()
    ).values()
    patches = torch.kron(torch.eye(5).double(), positions[0])
    torch.testing.assert_close(form.norm([positions, ones], None).squeeze(), patches.norm())
    for scale in (1.0, 1e-3):  # the 1 above and below the patch's eigenvalues
        whole = torch.block_diag(patches, ones[0] * scale)
        factor = Factor(form, (positions[None], scale * ones[None]))
        torch.testing.assert_close(factor.trace().squeeze(), whole.trace())
        share = float(factor.largest_eigenvalue() / torch.linalg.eigvalsh(whole)[-1])
        assert 0.8 < share < 1 + 1e-12  # an estimate from below
        assert factor.length == len(whole) == 31


# ------------------------------------------------------------------- methods


def white_patches(conv: nn.Conv2d) -> Tensor:
    """Inputs, one patch each, whose second moment is I (x) K exactly."""
    generator = torch.Generator().manual_seed(0)
    c, p = conv.in_channels, conv.weight[0, 0].numel()
    first = torch.linalg.qr(torch.randn(c, c, generator=generator).double())[0]
    second = torch.linalg.qr(torch.randn(p, p, generator=generator).double())[0]
    second *= torch.linspace(0.2, 1, p).double()
    return torch.einsum('ci,pj->ijcp', first, second).reshape(c * p, c, *conv.kernel_size)


def weights_after(model: nn.Module, x: Tensor, name: str, form: str) -> Tensor:
    """Weights of the first layer of a copy after three steps."""
    model = copy.deepcopy(model)
    kind, settings = METHODS[name]
    optimizer = kind(
        model, lr=0.1, stat_interval=1, refresh_interval=1, input_factor=form, **settings
    )
    for step in range(3):
        optimizer.zero_grad()
        (model(x) - step).square().mean().backward()
        optimizer.step()
    return model[0].weight.detach()


@pytest.mark.parametrize('name', METHODS)
def test_it_equals_the_whole_patch_where_channels_are_white(name: str) -> None:
    """Without a bias; gradients are those of a later layer."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, (2, 3), bias=False)
    model = nn.Sequential(conv, nn.Flatten(), nn.Tanh(), nn.Linear(4, 2)).double()
    x = white_patches(conv)
    ours, theirs = (weights_after(model, x, name, form) for form in ('kernel', 'patch'))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    x = x * torch.tensor([0.5, 1, 2])[:, None, None]
    ours, theirs = (weights_after(model, x, name, form) for form in ('kernel', 'patch'))
    assert float((ours - theirs).abs().max()) > 1e-4


@pytest.mark.parametrize('name', METHODS)
def test_depthwise_convolutions_have_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, groups=3, bias=False)
    model = nn.Sequential(conv, nn.Flatten(), nn.Tanh(), nn.Linear(54, 2)).double()
    x = torch.randn(4, 3, 5, 5).double()
    ours, theirs = (weights_after(model, x, name, form) for form in ('kernel', 'patch'))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('groups', [1, 2])
def test_nkfac_uses_the_dense_product(bias: bool, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=bias, groups=groups).double()
    start = plain_copy(conv)
    settings = dict(stat_interval=1, refresh_interval=1, solver='cholesky', damping=0.03)
    optimizer = NKFAC(conv, lr=0.1, input_factor='kernel', **settings, settings='published')
    x = torch.randn(5, 4, 7, 6).double()
    hooked: list[Tensor] = []
    out = start(x)
    out.register_hook(hooked.append)
    loss_of(torch.tanh(out)).backward()
    loss_of(torch.tanh(conv(x))).backward()
    optimizer.step()
    c, n = 4 // groups, 6 // groups
    patches = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (groups, c, 9))
    slopes = hooked[0].flatten(2).unflatten(1, (groups, n))
    raw, directions = [], []
    for g in range(groups):
        own = patches[:, g].permute(0, 3, 1, 2).flatten(0, 1)
        positions = torch.einsum('rcp,rcq->pq', own, own) / len(own) / c
        moment = torch.kron(torch.eye(c).double(), positions)
        norm = moment.norm()
        if bias:
            moment = torch.block_diag(moment, torch.ones(1, 1).double())
        slope = slopes[:, g].permute(0, 2, 1).flatten(0, 1)
        left = slope.T @ slope
        sides = [left / (left.norm() + 1e-12), moment / (norm + 1e-12)]
        for side in sides:
            side += 0.03 * torch.linalg.eigvalsh(side)[-1] * torch.eye(len(side)).double()
        gradient = start.weight.grad[g * n : (g + 1) * n].flatten(1)
        if bias:
            gradient = torch.cat([gradient, start.bias.grad[g * n : (g + 1) * n, None]], 1)
        raw.append(gradient)
        directions.append(torch.linalg.solve(sides[0], gradient) @ torch.linalg.inv(sides[1]))
    step = 0.1 * torch.cat(directions) * torch.cat(raw).norm() / torch.cat(directions).norm()
    moved = (start.weight - conv.weight).detach().flatten(1)
    # The largest eigenvalue is an estimate from below, a little off.
    assert float((moved - step[:, : c * 9]).norm() / moved.norm()) < 0.02
    if bias:
        moved = (start.bias - conv.bias).detach()
        assert float((moved - step[:, -1]).norm() / moved.norm()) < 0.05


def test_a_failed_decomposition_is_tried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def fails(positions: Tensor, damping: Tensor, function: Any) -> tuple[Tensor, Tensor]:
        seen.append(positions.dtype)
        power, succeeded = position_power(positions, damping, function)
        return power, succeeded & (positions.dtype == torch.float64)

    monkeypatch.setattr(module, 'position_power', fails)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3)
    optimizer = FSGD(model, lr=0.1, input_factor='kernel', **EACH)
    model(torch.randn(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    (stack,) = optimizer.curvature.stacks
    assert seen == [torch.float32, torch.float64] and stack.members[0].refreshes == 1
    assert stack.operators['input'].positions.dtype == torch.float32


def test_it_keeps_next_to_nothing() -> None:
    """96 channels, 3 x 3: the forecast, and what is held."""
    model = nn.Conv2d(96, 8, 3)
    optimizer = FSGD(model, lr=0.1, input_factor='kernel', **EACH)
    model(torch.randn(1, 96, 4, 4)).square().mean().backward()
    optimizer.step()
    (stack,) = optimizer.curvature.stacks
    tensors = [*stack.statistics.values(), *stack.operator_tensors.values()]
    assert sum(t.numel() for t in tensors) == 2 * (81 + 1)
    (kept, _) = next(iter(optimizer.curvature.forecast().values()))
    assert kept * 2**20 / 4 == pytest.approx(164, rel=0.05)


def test_the_basis_diagonalises_the_positions() -> None:
    model = net()
    optimizer = AdamR(
        model,
        lr=0.01,
        stat_interval=1,
        refresh_interval=1,
        input_factor='kernel',
        settings='published',
    )
    train('AdamR', model, optimizer, range(4))
    found = 0
    for stack in optimizer.curvature.stacks:
        operator: Any = stack.operators['input']
        if 'input_kernel_positions' in stack.statistics:
            moment = stack.statistics['input_kernel_positions']
            turned = operator.positions.mT @ moment @ operator.positions
            off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
            assert float(off.norm() / turned.norm()) < 1e-9
            found += 1
    assert found == 2


def test_separable_keeps_the_same_positions() -> None:
    """Up to the number of channels."""
    layer = layer_of(nn.Conv2d(3, 4, 3, padding=1).double())
    x = torch.randn(2, 3, 5, 5).double()
    ours = measured(layer, Statistic(INPUT, Positions.of(layer)), x)
    theirs = measured(layer, Statistic(INPUT, Separable.of(layer)), x)
    torch.testing.assert_close(
        3 * ours['input_kernel_positions'], theirs['input_separable_positions']
    )
    assert layer.lacks(Statistic(INPUT, Moment())) == ''
