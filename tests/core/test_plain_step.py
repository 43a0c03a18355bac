"""Invariants 9 and 11: no waiting for the device at plain steps, and bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import NKFAC, AdaNKFAC, PreconditionedOptimizer
from mmprecond.preconditioners import NewtonKronecker
from tests.support.hooks import Net, Waits, train


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC])
def test_a_plain_step_never_waits_for_the_device(kind: type[PreconditionedOptimizer]) -> None:
    model = Net()
    optimizer = kind(
        model, lr=0.01, weight_decay=0.1, stat_interval=3, refresh_interval=3, settings='published'
    )
    for step in range(5):
        with Waits() as waits:
            train(model, optimizer, range(step, step + 1))
        assert bool(waits.seen) == (step % 3 == 0), waits.seen


# ------------------------------------------------------------------- 11: large factors


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, 3),
        nn.Tanh(),
        nn.Linear(3, 50),
        nn.Tanh(),
        nn.Linear(50, 60),
        nn.Tanh(),
        nn.Linear(60, 2),
    ).double()


def test_an_oversized_side_is_left_alone() -> None:
    model = wide()
    optimizer = NKFAC(
        model, lr=1.0, momentum=0.0, max_dim=45, oversize='one_sided', settings='published'
    )
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.randn(30, 40).double()) ** 2).mean().backward()
    optimizer.step()
    kept = {
        name: entry['statistics']
        for name, entry in optimizer.state_dict()['precond']['layers'].items()
    }
    assert {name: sorted(s) for name, s in kept.items()} == {
        '0.weight': ['gradient_moment', 'input_moment'],
        '2.weight': ['input_moment'],
        '6.weight': ['gradient_moment'],
    }
    lines = {line.split()[0]: line for line in optimizer.table().splitlines()}
    assert '41x41 + 3x3' in lines['0'] and 'max_dim=45' not in lines['0']
    assert '4x4' in lines['2'] and '50x50' not in lines['2'] and 'max_dim=45' in lines['2']
    assert '2x2' in lines['6'] and '61' not in lines['6'] and 'max_dim=45' in lines['6']
    assert 'plain rule' in lines['4'] and 'max_dim=45' in lines['4'] and '60 x 51' in lines['4']
    moved = [(b - p).detach() for b, p in zip(before, model.parameters(), strict=True)]
    assert torch.allclose(moved[4], model[4].weight.grad)  # no side fits: the plain rule
    gradient = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], 1)
    direction = torch.cat([moved[2], moved[3][:, None]], 1)
    factor = kept['2.weight']['input_moment'][0]
    damped = factor + 0.01 * torch.linalg.eigvalsh(factor)[-1] * torch.eye(4).double()
    expected = gradient @ torch.linalg.inv(damped)
    expected *= gradient.norm() / expected.norm()
    assert torch.allclose(direction, expected, rtol=1e-3, atol=1e-6)


def test_an_oversized_layer_is_skipped() -> None:
    model = wide()
    optimizer = NKFAC(
        model, lr=1.0, momentum=0.0, max_dim=45, oversize='skip', settings='published'
    )
    (model(torch.randn(30, 40).double()) ** 2).mean().backward()
    optimizer.step()
    assert [layer.name for layer in optimizer.curvature.layers] == ['0.weight']
    text = optimizer.table()
    assert text.count('max_dim=45') == 3 and text.count('plain rule') >= 3


def test_large_matrices_of_a_stack_are_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = [], []
    plain = NewtonKronecker.apply

    def counted(self: Any, operators: Any, gradients: Tensor) -> Tensor:
        calls.append(len(gradients))
        return plain(self, operators, gradients)

    monkeypatch.setattr(NewtonKronecker, 'apply', counted)
    for least in (1, 10**9):
        monkeypatch.setattr('mmprecond.core.directions.LARGE_MATRIX', least)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
        optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=1, settings='published')
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(9, 6).double()).square().mean().backward()
            optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    assert calls == [1] * 6 + [2] * 3
    for one, stacked in zip(*found, strict=True):
        torch.testing.assert_close(one, stacked, rtol=1e-12, atol=1e-12)
