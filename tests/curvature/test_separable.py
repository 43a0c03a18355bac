"""Separable moments of convolutions: partial traces, and what methods make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.curvature import INPUT, SampledRows, Separable, Statistic
from mmprecond.curvature.conv import ConvTranspose2dLayer
from mmprecond.optimizers import FSGD, NKFAC, AdamR
from tests.reference.factors import plain_copy
from tests.support.capture import loss_of
from tests.support.errors import refused, warnings_of
from tests.support.every_optimizer import net, train
from tests.support.patches import METHODS, RESUMED, layer_of, measured
from tests.support.states import differences, everything, saved


@pytest.mark.parametrize('groups', [1, 2])
def test_sampled_rows_draw_maps_for_the_positions_alone(groups: int) -> None:
    """Their mean is right, and channels are measured over all rows."""
    torch.manual_seed(0)
    layer = layer_of(nn.Conv2d(4, 4, 3, padding=1, groups=groups).double())
    x = torch.randn(4, 4, 12, 12).double() * torch.arange(1, 5).double()[:, None, None]
    whole = Statistic(INPUT, Separable.of(layer))
    wanted = list(measured(layer, whole, x).values())
    few = whole.over(SampledRows(most_rows=4))
    draws = [list(measured(layer, few, x, seed=seed).values()) for seed in range(300)]
    for part in (0, 2):
        torch.testing.assert_close(draws[0][part], wanted[part], rtol=1e-12, atol=1e-12)
    positions = torch.stack([draw[1] for draw in draws])
    spread = positions.std(0) / 300**0.5
    assert bool(((positions.mean(0) - wanted[1]).abs() <= 5 * spread).all())
    assert not torch.allclose(positions[0], wanted[1], rtol=1e-3)


def test_layers_without_patches_have_no_such_form() -> None:
    pointwise, linear = nn.Conv2d(4, 3, 1), nn.Linear(4, 3)
    assert Separable.of(layer_of(pointwise)) is None
    assert Separable.of(layer_of(nn.ConvTranspose2d(4, 3, 3), kind=ConvTranspose2dLayer)) is None
    optimizer = NKFAC(nn.Sequential(linear), lr=0.1, input_factor='separable', settings='published')
    (stack,) = optimizer.curvature.stacks
    assert [s.key for s in stack.kept] == ['input_moment', 'gradient_moment']
    wrong = Statistic(INPUT, Separable(2, 9, True))
    assert 'Separable.of(layer)' in layer_of(nn.Conv2d(4, 3, 3)).lacks(wrong)


# ------------------------------------------------------------------- methods


def separable_patches(conv: nn.Conv2d, rows: int = 24) -> Tensor:
    """Inputs, one patch each, whose second moment is a Kronecker product exactly."""
    generator = torch.Generator().manual_seed(0)
    c, p = conv.in_channels, conv.weight[0, 0].numel()
    first = torch.linalg.qr(torch.randn(c, c, generator=generator).double())[0]
    second = torch.linalg.qr(torch.randn(p, p, generator=generator).double())[0]
    first *= torch.linspace(0.3, 2, c).double()
    second *= torch.linspace(0.2, 1, p).double()
    patches = torch.einsum('ci,pj->ijcp', first, second).reshape(c * p, c, *conv.kernel_size)
    return patches


@pytest.mark.parametrize('name', METHODS)
def test_it_equals_the_whole_patch_where_its_moment_is_separable(name: str) -> None:
    """Without a bias; gradients are those of a later layer."""
    kind, settings = METHODS[name]
    found = []
    for form in ('patch', 'separable'):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, (2, 3), bias=False)
        model = nn.Sequential(conv, nn.Flatten(), nn.Tanh(), nn.Linear(4, 2)).double()
        x = separable_patches(conv)
        optimizer = kind(
            model, lr=0.1, stat_interval=1, refresh_interval=1, input_factor=form, **settings
        )
        for step in range(3):
            optimizer.zero_grad()
            (model(x) - step).square().mean().backward()
            optimizer.step()
        found.append(conv.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    assert not torch.equal(*found)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('groups', [1, 2])
def test_nkfac_uses_the_dense_product_of_the_traces(bias: bool, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=bias, groups=groups).double()
    model = nn.Sequential(conv, nn.Tanh()).double()
    start = plain_copy(model)
    optimizer = NKFAC(
        model,
        lr=0.1,
        stat_interval=1,
        refresh_interval=1,
        input_factor='separable',
        solver='cholesky',
        damping=0.03,
        settings='published',
    )
    x = torch.randn(5, 4, 7, 6).double()
    out = start(x)
    hooked: list[Tensor] = []
    first = start[0](x)
    first.register_hook(hooked.append)
    loss_of(torch.tanh(first)).backward()
    loss_of(model(x)).backward()
    optimizer.step()
    c, n = 4 // groups, 6 // groups
    patches = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (groups, c, 9))
    slopes = hooked[0].flatten(2).unflatten(1, (groups, n))
    rows = patches.shape[0] * patches.shape[-1]
    directions = []
    for g in range(groups):
        own = patches[:, g].permute(0, 3, 1, 2).flatten(0, 1)
        channels = torch.einsum('rcp,rdp->cd', own, own) / rows
        positions = torch.einsum('rcp,rcq->pq', own, own) / rows
        moment = torch.kron(channels, positions) / channels.trace()
        norm = channels.norm() * positions.norm() / channels.trace()
        if bias:
            moment = torch.block_diag(moment, torch.ones(1, 1).double())
        right = moment / (norm + 1e-12)
        slope = slopes[:, g].permute(0, 2, 1).flatten(0, 1)
        left = slope.T @ slope
        left = left / (left.norm() + 1e-12)
        gradient = start[0].weight.grad[g * n : (g + 1) * n].flatten(1)
        if bias:
            gradient = torch.cat([gradient, start[0].bias.grad[g * n : (g + 1) * n, None]], 1)
        for side in (left, right):
            side += 0.03 * torch.linalg.eigvalsh(side)[-1] * torch.eye(len(side)).double()
        directions.append(torch.linalg.solve(left, gradient) @ torch.linalg.inv(right))
        directions[-1] = torch.stack([directions[-1], gradient])
    whole = torch.cat([pair[0].flatten() for pair in directions])
    raw = torch.cat([pair[1].flatten() for pair in directions])
    scale = raw.norm() / whole.norm()
    for g, pair in enumerate(directions):
        step = 0.1 * scale * pair[0]
        moved = start[0].weight[g * n : (g + 1) * n] - conv.weight[g * n : (g + 1) * n]
        wanted = step[:, : c * 9].reshape(moved.shape)
        # The largest eigenvalue is an estimate from below, a little off.
        assert float((moved - wanted).norm() / wanted.norm()) < 0.02
        if bias:
            other = (start[0].bias - conv.bias)[g * n : (g + 1) * n]
            assert float((other - step[:, -1]).norm() / step[:, -1].norm()) < 0.05
    assert out.shape == first.shape


@pytest.mark.parametrize('form', ['separable', 'kernel'])
@pytest.mark.parametrize('name', RESUMED)
def test_a_resumed_run_continues_bit_for_bit(name: str, form: str) -> None:
    kind, settings = RESUMED[name]

    def make(model: nn.Module) -> Any:
        return kind(
            model,
            lr=0.01,
            stat_interval=2,
            refresh_interval=4,
            input_factor=form,
            **settings,
        )

    model = net()
    optimizer = make(model)
    train(name, model, optimizer, range(5))
    twin = copy.deepcopy(model)
    resumed = make(twin)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    train(name, model, optimizer, range(5, 11))
    train(name, twin, resumed, range(5, 11))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


@pytest.mark.parametrize('form', ['separable', 'kernel'])
def test_micro_batches_are_the_joint_batch(form: str) -> None:
    found = []
    for sizes in ((6,), (4, 2)):
        model = net()
        optimizer = NKFAC(
            model,
            lr=0.01,
            stat_interval=1,
            refresh_interval=2,
            input_factor=form,
            settings='published',
        )
        train('NKFAC', model, optimizer, range(4), sizes)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


@pytest.mark.parametrize('form', ['separable', 'kernel'])
def test_the_state_of_another_form_is_measured_anew(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, stat_interval=1, refresh_interval=2, settings='published')
    train('NKFAC', model, optimizer, range(3))
    other = NKFAC(
        model, lr=0.01, stat_interval=1, refresh_interval=2, input_factor=form, settings='published'
    )
    other.load_state_dict(saved(optimizer.state_dict()))
    assert len(warnings_of(caplog)) == 1
    train('NKFAC', model, other, range(3, 5))
    assert all(state['samples'] for state in other.state_dict()['precond']['layers'].values())


def test_auto_takes_it_for_long_patches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 32, 3), nn.Conv2d(32, 16, 1))
    optimizer = NKFAC(model, lr=0.1, input_factor='auto', settings='published')
    keys = {
        layer.name: stack.kept[0].form.suffix for layer, stack in optimizer.curvature.layers.items()
    }
    assert keys == {'0.weight': 'moment', '1.weight': 'separable', '2.weight': 'moment'}
    assert 'as 64 channels x 9 positions' in optimizer.table()
    refused(
        ValueError,
        lambda: NKFAC(model, lr=0.1, input_factor='channel', settings='published'),
        'input_factor',
    )


def test_it_keeps_a_hundredth_of_the_memory() -> None:
    """512 channels, 3 x 3: the forecast, and what is held."""
    held = []
    for form in ('patch', 'separable'):
        model = nn.Conv2d(96, 8, 3, bias=False)
        optimizer = FSGD(
            model,
            lr=0.1,
            stat_interval=1,
            refresh_interval=1,
            input_factor=form,
            settings='published',
        )
        model(torch.randn(1, 96, 4, 4)).square().mean().backward()
        optimizer.step()
        (stack,) = optimizer.curvature.stacks
        tensors = [*stack.statistics.values(), *stack.operator_tensors.values()]
        held.append(sum(t.numel() for t in tensors))
        (kept, _) = next(iter(optimizer.curvature.forecast().values()))
        assert kept * 2**20 / 4 == pytest.approx(held[-1], rel=0.35)
    assert held[1] < held[0] / 50


# ------------------------------------------------------------------- AdamR


def laid_out(operator: Any, joint: bool) -> Tensor:
    """A basis U (x) V as one matrix; U is the identity where channels are left alone."""
    channels = operator.channels[0, 0] if hasattr(operator, 'channels') else torch.eye(3).double()
    basis = torch.kron(channels, operator.positions[0, 0])
    return torch.block_diag(basis, torch.ones(1, 1).double()) if joint else basis


@pytest.mark.parametrize('form', ['separable', 'kernel'])
@pytest.mark.parametrize('rotate_moments', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_adamr_is_adam_between_rotations_by_the_product_of_bases(
    bias: bool, rotate_moments: bool, form: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, (2, 3), bias=bias), nn.Tanh()).double()
    optimizer = AdamR(
        model,
        lr=0.01,
        eps=1e-4,
        stat_interval=1,
        refresh_interval=2,
        input_factor=form,
        rotate_moments=rotate_moments,
        settings='published',
    )
    conv: Any = model[0]
    matrix = lambda tensors: torch.cat(
        [tensors[0].flatten(1), *(t[:, None] for t in tensors[1:])], 1
    )
    first, second = (torch.zeros(5, 18 + bias).double() for _ in range(2))
    left, right = torch.eye(5).double(), torch.eye(18 + bias).double()
    parameters = list(conv.parameters())
    for step in range(1, 7):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 6, 7, generator=torch.Generator().manual_seed(step)).double()
        loss_of(model(x)).backward()
        before = matrix([p.detach().clone() for p in parameters])
        gradient = matrix([p.grad.clone() for p in parameters])
        optimizer.step()
        (stack,) = optimizer.curvature.stacks
        if stack.operators:
            new = [stack.operators['gradient'].matrix[0, 0]]
            new.append(laid_out(stack.operators['input'], bias))
            if rotate_moments:
                turns = left.T @ new[0], right.T @ new[1]
                first = turns[0].T @ first @ turns[1]
                second = turns[0].square().T @ second @ turns[1].square()
            left, right = new
        turned = left.T @ gradient @ right
        first = 0.9 * first + 0.1 * turned
        second = 0.999 * second + 0.001 * turned**2
        scaled = (second / (1 - 0.999**step)).sqrt() + 1e-4
        update = left @ (first / (1 - 0.9**step) / scaled) @ right.T
        moved = before - matrix([p.detach() for p in parameters])
        torch.testing.assert_close(moved, 0.01 * update, rtol=1e-7, atol=1e-10)
    assert stack.operators['input'].positions.shape[-1] == 6


def test_the_basis_diagonalises_both_factors() -> None:
    model = net()
    optimizer = AdamR(
        model,
        lr=0.01,
        stat_interval=1,
        refresh_interval=1,
        input_factor='separable',
        settings='published',
    )
    train('AdamR', model, optimizer, range(4))
    for stack in optimizer.curvature.stacks:
        operator = stack.operators['input']
        if not hasattr(operator, 'positions'):
            continue
        for basis, key in ((operator.channels, 'channels'), (operator.positions, 'positions')):
            moment = stack.statistics[f'input_separable_{key}']
            turned = basis.mT @ moment @ basis
            off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
            assert float(off.norm() / turned.norm()) < 1e-9
