"""AdamR: whole trajectories against a slow reference in float64, and what holds of each step.

The reference needs second moments of full rank: a null space has no basis of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.curvature import Factor, Side
from mmprecond.linalg import Dense
from mmprecond.optimizers import AdamR
from mmprecond.preconditioners import EigenRotation
from tests.reference.factors import Loss, plain_copy
from tests.support.networks import ConvNet, TokenNet, squared_error
from tests.support.rotation import (
    ADAMW,
    EVERY,
    LATE,
    MORE_RULES,
    RULES,
    SECOND,
    both,
    entry,
    equals,
    run,
    tokens,
)
from tests.support.trajectories import Convs, Tokens, follow, make_loss
from tests.support.trajectories import batch as rows


def batches(make: Any, size: int = 16) -> Callable[[int], list[Loss]]:
    """Batches so large that all second moments have full rank."""

    def losses(step: int) -> list[Loss]:
        generator = torch.Generator().manual_seed(step)
        shape = (size, 3, 5, 6) if make is ConvNet else (size, 4, 16)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3
        y = torch.randint(0, 10, (size,), generator=generator)
        return [lambda model: squared_error(model(x), y)]

    return losses


# ------------------------------------------------------------------- trajectories


@pytest.mark.parametrize('rotate', [True, False], ids=['turned', 'thesis'])
@pytest.mark.parametrize('solver', ['eigh', 'qr'])
@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('intervals', [(1, 1), (2, 4), (3, 6)], ids=str)
@pytest.mark.parametrize('make', [ConvNet, TokenNet])
def test_trajectories(
    make: Any, intervals: tuple[int, int], rule: str, solver: str, rotate: bool
) -> None:
    """Through two bases at least."""
    stat, refresh = intervals
    model, optimizer, reference = both(
        make,
        RULES[rule],
        stat_interval=stat,
        basis_solver=solver,
        refresh_interval=refresh,
        rotate_moments=rotate,
    )
    follow(model, optimizer, reference, batches(make), max(5, 2 * refresh + 1))
    assert all(e['refreshes'] >= 2 for e in optimizer.state_dict()['precond']['layers'].values())


@pytest.mark.parametrize('rotate', [True, False], ids=['turned', 'thesis'])
@pytest.mark.parametrize('rule', MORE_RULES)
@pytest.mark.parametrize('intervals', [(1, 1), (2, 4)], ids=str)
def test_other_adaptive_rules(intervals: tuple[int, int], rule: str, rotate: bool) -> None:
    """A network without dead units, as eigenvectors of a null space are not unique."""
    stat, refresh = intervals
    model, optimizer, reference = both(
        ConvNet,
        MORE_RULES[rule],
        stat_interval=stat,
        refresh_interval=refresh,
        rotate_moments=rotate,
    )
    follow(model, optimizer, reference, batches(ConvNet), 2 * refresh + 3)


@pytest.mark.parametrize('rule', RULES)
def test_grouped_convolutions(rule: str) -> None:
    """Two bases a group."""
    model, optimizer, reference = both(Convs, RULES[rule], **SECOND)
    follow(model, optimizer, reference, lambda t: [make_loss(rows(t, 6))], 9)


@pytest.mark.parametrize('solver', ['eigh', 'qr'])
def test_a_layer_used_now_and_then(solver: str) -> None:
    """It gets its first basis at a refresh, never between; pauses leave its moments in a basis."""
    model, optimizer, reference = both(Tokens, basis_solver=solver, **SECOND)
    used = lambda t: t in (0, 5, 6, 8, 9, 10, 15, 16)
    follow(model, optimizer, reference, lambda t: tokens(t, use_second=used(t)), 18)
    for name, samples, refreshes in (('first.weight', 9, 4), ('second.weight', 3, 3)):
        found = entry(optimizer, name)
        assert (found['samples'], found['refreshes']) == (samples, refreshes)


@pytest.mark.parametrize('rule', RULES)
def test_settings_of_single_parameters(rule: str) -> None:
    """A bias with lr and decay of its own stays in its layer's basis."""
    overrides = {
        'first.bias': dict(lr=0.08, weight_decay=0.0),
        'second.bias': dict(lr=0.0),
        'third.bias': dict(precondition=False),
        'last.weight': dict(precondition=False),
    }
    model, optimizer, reference = both(Tokens, RULES[rule], overrides, **SECOND)
    follow(model, optimizer, reference, tokens, 9)


@pytest.mark.parametrize('max_dim', [6, 3])
def test_one_sided(max_dim: int) -> None:
    """A side over max_dim keeps the identity; with none left the layer takes the plain rule."""
    model, optimizer, reference = both(Tokens, max_dim=max_dim, oversize='one_sided', **SECOND)
    follow(model, optimizer, reference, tokens, 9)
    assert (
        set(entry(optimizer, 'last.weight')['operator'])
        == {6: {'input_moment', 'gradient_moment'}, 3: {'gradient_moment'}}[max_dim]
    )
    assert ('first.weight' in {layer.name for layer in optimizer.curvature.layers}) == (
        max_dim == 6
    )


@pytest.mark.parametrize('rule', RULES)
def test_accumulation(rule: str) -> None:
    """Micro-batches of unequal size, against the reference and against the joint batch."""
    model, optimizer, reference = both(Tokens, RULES[rule], **SECOND)
    joint = copy.deepcopy(model)
    whole = AdamR(joint, **RULES[rule], **SECOND, **LATE)
    for step in range(9):
        x = rows(step, 15, 6)
        parts = [make_loss(x[:3], 15 / 3), make_loss(x[3:], 15 / 12)]
        follow(model, optimizer, reference, lambda _, parts=parts: parts, 1)
        whole.zero_grad()
        make_loss(x)(joint).backward()
        whole.step()
        for a, b in zip(model.parameters(), joint.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_float32_follows_float64() -> None:
    model, _, reference = both(TokenNet, ADAMW | dict(eps=1e-3), **SECOND)
    model = model.float()
    optimizer = AdamR(model, **ADAMW | dict(eps=1e-3), **SECOND, **LATE)
    for step in range(9):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 4, 16, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (32,), generator=generator)
        optimizer.zero_grad()
        squared_error(model(x.float()), y).backward()
        optimizer.step()
        reference.step(lambda m, x=x, y=y: squared_error(m(x), y))
    theirs = dict(reference.model.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), theirs[name], rtol=0, atol=2e-3, msg=name)


# ------------------------------------------------------------------- equal to Adam


def inject(patch: pytest.MonkeyPatch, choose: Callable[[str, Tensor], Tensor]) -> None:
    """Chooses the bases (k, b, n, n), by the statistics' name and value."""

    def refresh(
        method: EigenRotation, factors: dict[Side, Factor], previous: Any, damping: Any = None
    ) -> Any:
        fine = torch.ones(len(next(iter(factors.values())).tensor), dtype=torch.bool)
        return {
            side.name: Dense(choose(f'{side.name}_moment', factor.tensor))
            for side, factor in factors.items()
        }, fine

    patch.setattr(EigenRotation, 'refresh', refresh)
    patch.setattr(EigenRotation, 'align', lambda method, operator, previous: operator)


def eyes(name: str, statistic: Tensor) -> Tensor:
    return torch.eye(statistic.shape[-1]).to(statistic).expand_as(statistic).clone()


def test_it_is_adamw_until_the_first_basis() -> None:
    model, optimizer, _ = both(Tokens, stat_interval=3, refresh_interval=6)
    other = plain_copy(model)
    theirs = torch.optim.AdamW(other.parameters(), **ADAMW)
    for step in range(6):
        layers = optimizer.state_dict()['precond']['layers']
        assert {e['samples'] for e in layers.values()} == (set() if step < 3 else {1})
        assert not any(e['refreshes'] or e['operator'] for e in layers.values())
        run(model, optimizer, range(step, step + 1)), run(other, theirs, range(step, step + 1))
        assert equals(model, other) == (step < 5)
    assert {
        (e['samples'], e['refreshes']) for e in optimizer.state_dict()['precond']['layers'].values()
    } == {(2, 1)}


@pytest.mark.parametrize('settings', [EVERY, SECOND | dict(rotate_moments=False)], ids=str)
def test_with_identity_bases_it_is_adamw(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, eyes)
    model, optimizer, _ = both(Tokens, **settings)
    other = plain_copy(model)
    theirs = torch.optim.AdamW(other.parameters(), **ADAMW)
    run(model, optimizer, range(12)), run(other, theirs, range(12))
    assert equals(model, other)
    assert entry(optimizer, 'first.weight')['refreshes'] == 12 // settings['refresh_interval']


class Quadratic(nn.Module):
    """1/2 tr((W - W*)' A (W - W*) B) as a linear layer on the rows of B^1/2."""

    def __init__(self, left: Tensor, right: Tensor, start: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(*reversed(start.shape), bias=False).double()
        self.layer.weight.data = start.clone()
        values, vectors = torch.linalg.eigh(right)
        self.rows = (vectors * values.sqrt()) @ vectors.mT
        self.left = left

    def forward(self) -> Tensor:
        error = self.layer(self.rows)
        return 0.5 * (error @ self.left * error).sum()


def orthogonal(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize('source', ['injected', 'measured', 'measured by qr'])
def test_a_rotated_quadratic_is_adams_unrotated_one(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adam alone takes another way on it."""
    o, i = (5, 7) if source == 'injected' else (5, 5)
    u1, u2 = orthogonal(o, 1), orthogonal(i, 2)
    a, b = torch.linspace(1, 3, o).double(), torch.linspace(0.3, 1, i).double()
    # A large eps: Adam normalises what is next to 0 too, here rounding off the diagonal.
    eps = 1e-8 if source == 'injected' else 0.3
    start = torch.randn(o, i, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if source == 'injected':
        bases = {'gradient_moment': u1, 'input_moment': u2}
        inject(monkeypatch, lambda name, s: bases[name].expand_as(s).clone())
    else:  # then L = A E B E' A has A's eigenvectors
        start = 2 * torch.eye(5).double()
    rotated, plain, naive = (
        Quadratic(*parts)
        for parts in (
            (u1 @ a.diag() @ u1.mT, u2 @ b.diag() @ u2.mT, u1 @ start @ u2.mT),
            (a.diag(), b.diag(), start),
            (u1 @ a.diag() @ u1.mT, u2 @ b.diag() @ u2.mT, u1 @ start @ u2.mT),
        )
    )
    ours = AdamR(
        rotated, lr=0.01, eps=eps, **EVERY, basis_solver='qr' if source.endswith('qr') else 'eigh'
    )
    theirs, other = (torch.optim.Adam(m.parameters(), lr=0.01, eps=eps) for m in (plain, naive))
    losses: list[list[float]] = []
    for _ in range(100):
        losses.append([])
        for model, optimizer in ((rotated, ours), (plain, theirs), (naive, other)):
            optimizer.zero_grad()
            loss = model()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        torch.testing.assert_close(
            u1.mT @ rotated.layer.weight @ u2,
            plain.layer.weight,
            rtol=0,
            atol=1e-9 if source == 'injected' else 1e-8,
        )
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=1e-6)
    assert losses[-1][0] < 0.5 * losses[0][0] and abs(losses[-1][2] / losses[-1][0] - 1) > 0.01
