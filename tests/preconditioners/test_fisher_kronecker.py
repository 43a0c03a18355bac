"""KFAC: whole trajectories against a slow reference, the KL clip, settings, resumption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import mmprecond.optimizers
from mmprecond.optimizers import KFAC
from tests.reference.factors import Loss
from tests.support.errors import refused, warnings_of
from tests.support.kfac import STAR, both, tokens
from tests.support.late_layers import Net
from tests.support.late_layers import train as train_net
from tests.support.networks import ConvNet, TokenNet, classification
from tests.support.states import differences, everything, saved, walk
from tests.support.trajectories import SGD, Convs, Tokens, follow, make_loss
from tests.support.trajectories import batch as rows


class Unbiased(TokenNet):
    """`TokenNet`, the linear layers without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.bias = self.fc2.bias = None


@pytest.mark.parametrize('scaling', ['kl_clip', 'norm_recovery', 'none'])
@pytest.mark.parametrize('form', ['pi', 'relative'])
@pytest.mark.parametrize(
    'make, reduction',
    [
        (ConvNet, 'expand'),
        (ConvNet, 'reduce'),
        (TokenNet, 'expand'),
        (Unbiased, 'reduce'),
        (TokenNet, 'reduce'),
    ],
)
def test_trajectories(make: Any, reduction: str, form: str, scaling: str) -> None:
    model, optimizer, reference = both(
        make, reduction=reduction, damping_form=form, scaling=scaling
    )
    follow(model, optimizer, reference, classification(ConvNet if make is ConvNet else TokenNet), 3)
    if scaling == 'kl_clip':
        assert reference.factor < 0.9


@pytest.mark.parametrize(
    'settings',
    [
        dict(stat_interval=2, refresh_interval=4),
        dict(stat_interval=3, refresh_interval=3),
        dict(refresh_interval=2),
        dict(stat_decay=0.0),
        dict(stat_decay=0.5, damping=1.0),
        dict(damping=1 / 2**20, kl_clip=1e-6),
        dict(kl_clip=1e-5),
        dict(kl_clip=1e3),
        STAR,
        dict(**STAR, stat_interval=2, refresh_interval=4),
        dict(STAR, scaling='none', lr=1e-5),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    settings = dict(settings)
    rule = dict(SGD, lr=settings.pop('lr', 0.05))
    follow(*both(Tokens, rule, **settings), tokens, 9)


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(reduction='reduce'),
        dict(STAR, reduction='reduce'),
        dict(reduction='reduce', stat_interval=2, refresh_interval=2),
    ],
    ids=str,
)
def test_convolutions(settings: dict[str, Any]) -> None:
    """Grouped, strided and dilated ones, and one that is called three times a step."""
    follow(*both(Convs, **settings), lambda t: [make_loss(rows(t))], 3)


def test_the_default_damping_is_exact() -> None:
    model, optimizer, reference = both(Tokens, damping=0.03)
    follow(model, optimizer, reference, tokens, 4, atol=1e-12)


def test_accumulation() -> None:
    model, optimizer, reference = both(Convs, reduction='reduce')

    def losses(step: int) -> list[Loss]:
        x = rows(step, 5)
        return [make_loss(part, 2.0) for part in (x[:2], x[2:])]

    follow(model, optimizer, reference, losses, 3)


@pytest.mark.parametrize('scaling', ['kl_clip', 'norm_recovery'])
@pytest.mark.parametrize(
    'overrides',
    [
        {'second.weight': dict(damping=0.5)},
        {'first.bias': dict(damping=9.0)},
        {
            f'{name}.weight': dict(damping=10.0**-k)
            for k, name in enumerate(('first', 'second', 'last'))
        },
        {'first.bias': dict(lr=0.08, weight_decay=0.0), 'third.weight': dict(lr=0.3)},
        {'second.weight': dict(precondition=False), 'second.bias': dict(precondition=False)},
        {'third.bias': dict(precondition=False)},
    ],
    ids=str,
)
def test_settings_of_single_parameters(overrides: dict[str, Any], scaling: str) -> None:
    """A damping of a layer's own, an lr of each parameter's own in the clip, the plain rule."""
    model, optimizer, reference = both(Tokens, overrides=overrides, scaling=scaling)
    follow(model, optimizer, reference, tokens, 4)
    assert scaling != 'kl_clip' or reference.factor < 1


@pytest.mark.parametrize(
    'used',
    [lambda t: t >= 1, lambda t: t % 3 == 0, lambda t: t % 2 == 1],
    ids=['from 1', '3rd', 'odd'],
)
def test_a_layer_without_statistics_is_not_clipped(used: Callable[[int], bool]) -> None:
    """Nor counted; measured and refreshed later, it is both."""
    model, optimizer, reference = both(Tokens, kl_clip=1e-4, stat_interval=2, refresh_interval=4)
    follow(
        model,
        optimizer,
        reference,
        lambda t: [make_loss(rows(t, features=6), use_second=used(t))],
        9,
    )


def test_default_settings() -> None:
    (method,) = {
        stack.method for stack in KFAC(TokenNet(), lr=0.1, settings='published').curvature.stacks
    }
    assert (method.stat_interval, method.refresh_interval) == (20, 200)
    assert (method.stat_decay, method.damping, method.kl_clip) == (0.95, 0.03, 1e-3)
    assert (method.damping_form, method.reduction, method.scaling) == ('pi', 'expand', 'kl_clip')


# ------------------------------------------------------------------- damping


def test_pi_splits_the_damping_by_the_factors_mean_eigenvalues() -> None:
    """L and R get amounts whose product is rho, in the ratio of their mean eigenvalues."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    optimizer = KFAC(model, lr=0.0, damping=0.25, settings='published')
    (model(torch.randn(9, 5).double()) ** 2).sum().backward()
    optimizer.step()
    entry = optimizer.state_dict()['precond']['layers']['weight']
    added, means = {}, {}
    for name, factor in entry['statistics'].items():
        difference = torch.linalg.inv(entry['operator'][name][0]) - factor[0]
        added[name] = difference.diagonal().mean()
        torch.testing.assert_close(
            difference, added[name] * torch.eye(len(difference)).double(), rtol=1e-9, atol=1e-9
        )
        means[name] = torch.linalg.eigvalsh(factor[0]).mean()
    right, left = 'input_moment', 'gradient_moment'
    assert float(added[right] * added[left]) == pytest.approx(0.25, rel=1e-9)
    assert float(added[right] / added[left]) == pytest.approx(
        float(means[right] / means[left]), rel=1e-9
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('dead', ['input', 'gradient', 'both'])
@pytest.mark.parametrize('settings', [{}, dict(reduction='reduce'), STAR], ids=str)
def test_a_block_of_zeros(settings: dict[str, Any], dead: str, dtype: torch.dtype) -> None:
    """A dead channel of a depthwise convolution: the others are preconditioned as without it."""
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 3, groups=4, bias=False).to(dtype)
    optimizer = KFAC(
        model, lr=0.1, stat_interval=1, refresh_interval=1, **settings, settings='published'
    )
    alive = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=dtype)[:, None, None]
    for _ in range(4):
        x = torch.randn(2, 4, 5, 5, dtype=dtype)
        optimizer.zero_grad()
        out = model(x if dead == 'gradient' else x * alive)
        (out if dead == 'input' else out * alive).square().sum().backward()
        optimizer.step()
    entry = optimizer.state_dict()['precond']['layers']['weight']
    assert entry['refreshes'] == 4
    for inverse in entry['operator'].values():
        assert (torch.linalg.eigvalsh(inverse) > 0).all() and inverse.isfinite().all()
    optimizer.zero_grad()
    model(torch.randn(2, 4, 5, 5, dtype=dtype)).square().sum().backward()  # the dead one wakes up
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('scale', [1e-4, 1e3])
def test_scales_of_loss_and_input(scale: float) -> None:
    """Scaled gradients or inputs, and rho by their square: V is scaled by their inverse."""
    x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
    moved = []
    for loss, size, rho in (
        (1.0, 1.0, 0.25),
        (scale, 1.0, 0.25 * scale**2),
        (1.0, scale, 0.25 * scale**2),
    ):
        torch.manual_seed(1)
        model = nn.Linear(4, 3, bias=False).double()
        model.weight.data /= size
        start = model.weight.detach().clone()
        optimizer = KFAC(
            model, lr=1.0, momentum=0.0, damping=rho, scaling='none', settings='published'
        )
        (loss * model(x * size).square().mean()).backward()
        optimizer.step()
        moved.append((model.weight.detach() - start) * loss * size)
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-6, atol=1e-9)


def test_kfac_star_ignores_the_scale_of_loss_and_input() -> None:
    directions = []
    for loss, size in ((1.0, 1.0), (1e-5, 1.0), (1e4, 1.0), (1.0, 1e3)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2)).double()
        model[0].weight.data /= size
        before = [p.detach().clone() for p in model.parameters()]
        x = size * torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).double()
        optimizer = KFAC(model, lr=1.0, momentum=0.0, **STAR, settings='published')
        (loss * model(x).square().mean()).backward()
        optimizer.step()
        changes = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
        directions.append([d / d.norm() for d in changes])
        for names in ([0], [1, 2]):  # norm recovery, layer by layer
            norm = lambda tensors: torch.cat([tensors[k].flatten() for k in names]).norm()
            torch.testing.assert_close(norm(changes), norm([p.grad for p in model.parameters()]))
    for other in directions[1:]:
        for a, b in zip(other, directions[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# ------------------------------------------------------------------- settings and state


@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('damping', 0, 'greater than 0'),
        ('damping', float('nan'), 'give a number'),
        ('kl_clip', 0, 'greater than 0'),
        ('kl_clip', -1e-3, 'greater than 0'),
        ('kl_clip', None, 'give a number'),
        ('kl_clip', float('inf'), 'give a number'),
        ('stat_decay', 1, 'less than 1'),
        ('stat_decay', -0.1, 'at least 0'),
        ('damping_form', 'trace', 'pi, relative'),
        ('reduction', 'mean', 'expand, reduce'),
        ('scaling', None, 'kl_clip, norm_recovery, none'),
        ('refresh_interval', 30, 'multiple'),
        ('lr', -1.0, 'at least 0'),
        ('momentum', 1.0, 'less than 1'),
    ],
)
def test_values_out_of_range(name: str, value: Any, remedy: str) -> None:
    refused(
        ValueError,
        lambda: KFAC(nn.Linear(2, 2), **{'lr': 0.1, name: value}, settings='published'),
        name,
        remedy,
    )


def test_wrong_keys_and_a_missing_model() -> None:
    for key in ('betas', 'newton_steps', 'exponent', 'norm_recovery'):
        refused(
            TypeError,
            lambda: KFAC(nn.Linear(2, 2), lr=0.1, **{key: 1}, settings='published'),
            'KFAC',
            key,
            '`_delete_=True`',
            'damping_form',
        )
    refused(
        ValueError,
        lambda: KFAC(nn.Linear(2, 2).parameters(), lr=0.1, settings='published'),
        'KFAC',
        'model=',
    )
    assert 'KFAC' in mmprecond.optimizers.__all__


STATES: dict[str, dict[str, Any]] = {
    'expand': {},
    'reduce': dict(reduction='reduce'),
    'star': STAR,
    'one-sided': dict(max_dim=8, oversize='one_sided'),
}


def resumable(model: nn.Module, **settings: Any) -> KFAC:
    return KFAC(
        model,
        lr=0.05,
        weight_decay=0.01,
        stat_interval=1,
        refresh_interval=2,
        **settings,
        settings='published',
    )


@pytest.mark.parametrize('name', STATES)
@pytest.mark.parametrize('at', [1, 4])
def test_a_resumed_run_continues_bit_for_bit(name: str, at: int) -> None:
    model = Net()
    optimizer = resumable(model, **STATES[name])
    train_net(model, optimizer, range(at))
    state = optimizer.state_dict()
    assert walk(state) == [] and set(state) == {'state', 'param_groups', 'precond'}
    suffix = '_reduced' if name == 'reduce' else ''
    for entry in state['precond']['layers'].values():
        sides = set(entry['operator'])
        assert entry['method'] == 'FisherKronecker' and entry['samples'] >= entry['refreshes']
        assert {f'{side}{suffix}' for side in sides} == set(entry['statistics'])
        assert sides == {'input_moment', 'gradient_moment'} or name == 'one-sided'
    twin = copy.deepcopy(model)
    resumed = resumable(twin, **STATES[name])
    resumed.load_state_dict(saved(state))
    train_net(model, optimizer, range(at, 8)), train_net(twin, resumed, range(at, 8))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


def test_a_state_of_the_other_reduction_is_measured_anew(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    optimizer = resumable(model)
    train_net(model, optimizer, range(2))
    other = resumable(model, reduction='reduce')
    other.load_state_dict(saved(optimizer.state_dict()))
    (message,) = warnings_of(caplog)
    assert 'input_moment_reduced' in message and other.state_dict()['precond']['layers'] == {}
    train_net(model, other, range(2, 4))
    assert all(p.isfinite().all() for p in model.parameters())
