"""Literal settings: whole trajectories of the thesis's algorithms as printed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import (
    NKFAC,
    SGDPH,
    SOAP,
    AdaAFOpt,
    AdamR,
    AdaNKFAC,
    AFOpt,
    Preconditioned,
)
from tests.reference.factors import plain_copy
from tests.reference.printed import (
    PrintedAdamR,
    PrintedFeature,
    PrintedNKFAC,
    PrintedPartialHessian,
)
from tests.reference.rules import (
    ReferenceAdaBelief,
    ReferenceAdaGrad,
    ReferenceAdamW,
    ReferenceRAdam,
    ReferenceRule,
    ReferenceSGDM,
)
from tests.support.errors import refused

STEPS = 20


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)).double()


class ConvNet(nn.Module):
    """A convolution whose output is flattened for a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 3, 2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def loss_at(step: int, *shape: int) -> Callable[[nn.Module], Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, *(shape or (5,)), generator=generator, dtype=torch.float64) + 0.3
    y = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    return lambda model: ((model(x) - y) ** 2).mean()


def compare(model: nn.Module, optimizer: Any, reference: Any, *shape: int) -> None:
    """Both trajectories, parameter by parameter, to 1e-10."""
    start = plain_copy(model)
    for step in range(STEPS):
        loss = loss_at(step, *shape)
        optimizer.zero_grad()
        loss(model).backward(create_graph=getattr(optimizer, 'needs_graph', False))
        optimizer.step()
        reference.step(loss)
        theirs = dict(reference.model.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), theirs[name].detach(), rtol=0, atol=1e-10)
    moved = zip(model.parameters(), start.parameters(), strict=True)
    assert all(float((p - q).detach().abs().max()) > 1e-3 for p, q in moved)


@pytest.mark.parametrize('first', [0, 1])
@pytest.mark.parametrize('size', ['norm', 'optimal'])
@pytest.mark.parametrize('intervals', [(1, 2), (2, 4), (1, 1)], ids=str)
def test_algorithms_3_and_4(intervals: tuple[int, int], size: str, first: int) -> None:
    """NKFAC without normalised captures and floor, with the exact start."""
    common = dict(
        stat_interval=intervals[0],
        refresh_interval=intervals[1],
        stat_decay=0.8,
        damping=0.05,
        newton_steps=2,
        newton_step_size=size,
        exact_interval=3,
    )
    model = net()
    reference = PrintedNKFAC(
        plain_copy(model), ReferenceSGDM(0.9), 0.05, 0.01, first=first, **common
    )
    literal = dict(normalise=False, damping_floor=0.0, exact_start=True, count_from=first)
    optimizer = NKFAC(model, lr=0.05, weight_decay=0.01, settings='published', **literal, **common)
    compare(model, optimizer, reference)


def test_algorithm_5_with_decoupled_decay() -> None:
    """AdaNKFAC as `Preconditioned`, whose AdamW decays as printed; AdaNKFAC itself does not."""
    common = dict(stat_interval=2, refresh_interval=4, stat_decay=0.8, damping=0.05)
    common |= dict(newton_steps=1, exact_interval=3)
    hyper = dict(betas=(0.8, 0.95), eps=1e-7, weight_decay=0.1)
    model, other = net(), net()

    def reference(model: nn.Module) -> PrintedNKFAC:
        rule = ReferenceAdamW((0.8, 0.95), 1e-7)
        return PrintedNKFAC(plain_copy(model), rule, 0.01, 0.1, first=0, **common)

    literal = dict(settings='published', normalise=False, damping_floor=0.0, exact_start=True)
    optimizer = Preconditioned(
        model,
        rule=dict(type='AdamW', lr=0.01, **hyper),
        layers=dict(elsewhere=dict(type='NKFAC', **literal, **common)),
    )
    compare(model, optimizer, reference(model))
    with pytest.raises(AssertionError):
        compare(other, AdaNKFAC(other, lr=0.01, **hyper, **literal, **common), reference(other))
    alike = net()  # the decay alone differs
    hyper['weight_decay'] = 0.0
    rule = ReferenceAdamW((0.8, 0.95), 1e-7)
    plain = PrintedNKFAC(plain_copy(alike), rule, 0.01, 0.0, first=0, **common)
    compare(alike, AdaNKFAC(alike, lr=0.01, **hyper, **literal, **common), plain)


def test_settings_without_effect_are_refused() -> None:
    for setting in (dict(exact_start=True), dict(newton_step_size='optimal')):
        refused(ValueError, lambda s=setting: NKFAC(net(), lr=0.1, **s), "solver='newton'")
    refused(ValueError, lambda: SOAP(net(), lr=0.1, align_bases=False), "basis_solver='eigh'")
    limit = dict(max_dim=None, oversize='block')
    refused(ValueError, lambda: NKFAC(net(), lr=0.1, **limit), 'give max_dim a number')
    for count in (2, -1, 1.0, True):
        refused(ValueError, lambda c=count: NKFAC(net(), lr=0.1, count_from=c), 'count_from=')


@pytest.mark.parametrize('stagger', [False, True])
def test_all_captures_of_an_exact_start_are_followed_by_exact_inverses(stagger: bool) -> None:
    """Also where layers take turns."""
    model = net()
    settings = dict(stat_interval=2, refresh_interval=4, exact_start=True, count_from=1)
    optimizer = NKFAC(model, lr=0.01, settings='published', stagger=stagger, **settings)
    (method,) = {stack.method for stack in optimizer.curvature.stacks}
    for step in range(7):  # counts 1 to 7
        optimizer.zero_grad()
        loss_at(step)(model).backward()
        optimizer.step()
        for stack in optimizer.curvature.stacks:
            for member in stack.members:
                assert member.refreshes == member.samples or stagger
                assert all(method.is_exact(k) for k in range(member.refreshes))
                assert member.refreshes > 0 or step < 6


RULES: dict[str, tuple[dict[str, Any], Callable[[], ReferenceRule]]] = {
    'AdamW': (dict(betas=(0.8, 0.95), eps=1e-6), lambda: ReferenceAdamW((0.8, 0.95), 1e-6)),
    'AdaGrad': (dict(eps=1e-6), lambda: ReferenceAdaGrad(1e-6)),
    'RAdam': (dict(betas=(0.8, 0.9), eps=1e-6), lambda: ReferenceRAdam((0.8, 0.9), 1e-6)),
    'AdaBelief': (dict(betas=(0.8, 0.9), eps=1e-7), lambda: ReferenceAdaBelief((0.8, 0.9), 1e-7)),
}


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('intervals', [(1, 3), (2, 4)], ids=str)
def test_algorithm_6(intervals: tuple[int, int], rule: str) -> None:
    """AdamR as published: bases are not aligned, and moments are not rotated."""
    hyper, make = RULES[rule]
    common = dict(stat_interval=intervals[0], refresh_interval=intervals[1])
    model = net()
    reference = PrintedAdamR(plain_copy(model), make(), 0.02, 0.1, eps=0.01, **common)
    settings = dict(settings='published', basis_eps=0.01, **common)
    optimizer = AdamR(model, lr=0.02, weight_decay=0.1, rule=rule, **hyper, **settings)
    method = optimizer.curvature.stacks[0].method
    assert not method.rotate_moments and not method.align_bases
    compare(model, optimizer, reference)


@pytest.mark.parametrize(
    'kind, rule, hyper',
    [
        (AFOpt, lambda: ReferenceSGDM(0.9), dict(lr=0.02, momentum=0.9)),
        (AdaAFOpt, lambda: ReferenceAdamW((0.9, 0.99), 1e-8), dict(lr=0.01, betas=(0.9, 0.99))),
    ],
    ids=['7', '8'],
)
def test_algorithms_7_and_8_without_attention(
    kind: Any, rule: Callable[[], ReferenceRule], hyper: dict[str, Any]
) -> None:
    """Convolutions keep the plain gradient; the first inverse comes at T_u, from all captures."""
    common = dict(stat_interval=2, refresh_interval=6, stat_decay=0.7, damping=0.05)
    model = ConvNet().double()
    reference = PrintedFeature(plain_copy(model), rule(), hyper['lr'], 0.05, **common)
    optimizer = kind(model, weight_decay=0.05, settings='published', **hyper, **common)
    assert [layer.name for layer in optimizer.curvature.layers] == ['head.weight']
    assert 'convolutions=False' in optimizer.table()
    compare(model, optimizer, reference, 2, 3, 3)


def test_equation_2_7() -> None:
    settings = dict(lr=0.05, momentum=0.9, weight_decay=0.05, hessian_decay=0.9, eps=1e-3)
    model = net()
    reference = PrintedPartialHessian(plain_copy(model), rate=0.1, **settings)
    optimizer = SGDPH(model, hessian_lr=0.1, decay='decoupled', **settings)
    compare(model, optimizer, reference)


def test_the_published_decay_is_another() -> None:
    for decay in (0.05, 0.0):
        settings = dict(lr=0.05, momentum=0.9, weight_decay=decay)
        model = net()
        reference = PrintedPartialHessian(
            plain_copy(model), rate=1e-3, hessian_decay=0.9, eps=1e-4, **settings
        )
        with pytest.raises(AssertionError) if decay else nullcontext():
            compare(model, SGDPH(model, **settings), reference)
