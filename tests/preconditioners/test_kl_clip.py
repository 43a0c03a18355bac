"""The KL clip of KFAC."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import KFAC, Preconditioned
from tests.support.hooks import Waits
from tests.support.kfac import STAR, both, tokens
from tests.support.states import differences
from tests.support.trajectories import Tokens, follow, make_loss
from tests.support.trajectories import batch as rows


def one_step(optimizer: torch.optim.Optimizer, model: nn.Module, step: int = 0) -> list[Tensor]:
    """Changes of the parameters by one step."""
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    make_loss(rows(step, features=6))(model).backward()
    optimizer.step()
    return [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]


def twins(count: int = 2) -> list[nn.Module]:
    model = Tokens().double()
    return [copy.deepcopy(model) for _ in range(count)]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(params=[p], lr=0.1 * (k + 1)) for k, p in enumerate(model.parameters())]


@pytest.mark.parametrize('kl_clip', [1e-3, 1e-6])
def test_where_it_bites_the_quadratic_form_is_the_bound(kl_clip: float) -> None:
    """With V = F^-1 G: sum of lr^2 <V, G> scale^2, over weights and biases of all layers."""
    clipped, free = twins()
    settings = dict(momentum=0.0, lr=1.0)
    ours = one_step(
        KFAC(groups_of(clipped), model=clipped, kl_clip=kl_clip, **settings, settings='published'),
        clipped,
    )
    theirs = one_step(
        KFAC(groups_of(free), model=free, scaling='none', **settings, settings='published'), free
    )
    gradients = [p.grad for p in free.parameters()]
    lrs = [group['lr'] for group in groups_of(free)]
    total = sum(-lr * (d * g).sum() for lr, d, g in zip(lrs, theirs, gradients, strict=True))
    scales = torch.cat([(a / b).flatten() for a, b in zip(ours, theirs, strict=True)])
    assert total > 2 * kl_clip
    torch.testing.assert_close(
        scales, (kl_clip / total).sqrt().expand_as(scales), rtol=1e-9, atol=0
    )
    assert float(scales[0] ** 2 * total) == pytest.approx(kl_clip, rel=1e-9)


@pytest.mark.parametrize('lr, kl_clip', [(0.1, 1e6), (1e-7, 1e-3), (0.0, 1e-3), (0.1, 1e300)])
def test_where_it_does_not_bite_nothing_changes(lr: float, kl_clip: float) -> None:
    clipped, free = twins()
    ours, theirs = (
        KFAC(clipped, lr=lr, kl_clip=kl_clip, settings='published'),
        KFAC(free, lr=lr, scaling='none', settings='published'),
    )
    for step in range(3):
        one_step(ours, clipped, step), one_step(theirs, free, step)
    assert differences(dict(clipped.state_dict()), dict(free.state_dict())) == []


def mixed(model: nn.Module, *layers: tuple[str, dict[str, Any] | None]) -> Preconditioned:
    entries = [dict(match=dict(name=name), preconditioner=p) for name, p in layers]
    return Preconditioned(model, rule=dict(type='SGDM', lr=0.5, momentum=0.0), layers=entries)


def test_other_methods_are_neither_clipped_nor_counted() -> None:
    fisher = lambda **settings: dict(type='FisherKronecker', **settings, settings='published')
    rest = [('second', dict(type='NewtonKronecker', settings='published')), ('last', None)]
    a, b, c = twins(3)
    clipped = one_step(mixed(a, ('first', fisher(kl_clip=1e-7)), ('third', fisher()), *rest), a)
    free = one_step(
        mixed(b, ('first', fisher(scaling='none')), ('third', fisher(scaling='none')), *rest), b
    )
    only = one_step(
        mixed(c, ('first', fisher(kl_clip=1e-7)), ('third', fisher(scaling='none')), *rest), c
    )
    names = [name for name, _ in a.named_parameters()]
    found = {name: (x / y, z / y) for name, x, y, z in zip(names, clipped, free, only, strict=True)}
    total = sum(
        -0.5 * (d * p.grad).sum()
        for (name, p), d in zip(b.named_parameters(), free, strict=True)
        if name[:5] in ('first', 'third')
    )
    for name, (both_, alone) in found.items():
        theirs = name.startswith(('first', 'third'))  # the least bound counts for both
        wanted = (1e-7 / total).sqrt() if theirs else torch.ones(()).double()
        torch.testing.assert_close(both_, wanted.expand_as(both_), rtol=1e-9, atol=0)
        if not name.startswith('first'):
            torch.testing.assert_close(alone, torch.ones_like(alone), rtol=1e-12, atol=0)
        else:
            assert float(alone.max()) < 0.1


def test_the_bias_of_a_frozen_weight_takes_the_plain_rule() -> None:
    model, optimizer, reference = both(Tokens, kl_clip=1e-6, stat_interval=2, refresh_interval=2)
    follow(model, optimizer, reference, tokens, 1)
    model.second.weight.requires_grad_(False)
    reference.model.second.weight.requires_grad_(False)
    optimizer.t, reference.t = 1, 1
    follow(model, optimizer, reference, lambda t: tokens(1), 1)


def test_a_plain_step_never_waits_for_the_device() -> None:
    for settings in (dict(), dict(reduction='reduce'), STAR):
        model = Tokens()
        optimizer = KFAC(
            model, lr=0.1, stat_interval=3, refresh_interval=3, **settings, settings='published'
        )
        for step in range(5):
            loss = make_loss(rows(step, features=6).float())(model)
            with Waits() as waits:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert bool(waits.seen) == (step % 3 == 0), waits.seen
