"""RAMDA against a slow reference, its closed forms, and a regression with planted zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmprecond import RAMDA, Preconditioned
from mmprecond.linalg import shrink_rows
from mmprecond.rules import RAMDARule
from tests.reference.ramda import Reference, minimizer
from tests.support.errors import refused


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), weight=st.floats(0, 5), spread=st.floats(0, 3))
def test_rows_are_shrunk_to_the_minimizer(seed: int, weight: float, spread: float) -> None:
    """The gradient of the objective is zero at a row that is not, and small at one that is."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randn(6, 5, generator=generator).double()
    diagonal = (spread * torch.randn(6, 5, generator=generator)).exp().double()
    found = shrink_rows(linear, diagonal, weight)
    norms = found.norm(dim=1, keepdim=True)
    zero = (norms == 0).squeeze(1)
    assert torch.equal(zero, linear.norm(dim=1) <= weight)
    slopes = diagonal * found - linear + weight * found / norms.clamp(min=1e-300)
    assert float(slopes[~zero].abs().max() if (~zero).any() else 0) < 1e-4


def test_the_minimizer_is_that_of_many_proximal_steps() -> None:
    torch.manual_seed(0)
    linear, diagonal = torch.randn(4, 3).double(), torch.rand(4, 3).double() + 0.1
    found = shrink_rows(linear, diagonal, 0.7)
    expected = torch.stack([minimizer(b, d, 0.7) for b, d in zip(linear, diagonal, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_steps_and_rounds_follow_the_reference() -> None:
    """With a fall of the rate that starts another round."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2, 2).double())
    optimizer = RAMDA([weight], lr=0.1, momentum=0.3, group_lasso=0.02)
    reference = Reference(weight.detach(), 0.3, 0.02)
    for step in range(8):
        rate = 0.1 if step < 5 else 0.01
        optimizer.param_groups[0]['lr'] = rate
        gradient = torch.randn(3, 2, 2).double()
        weight.grad = gradient
        optimizer.step()
        reference.step(gradient, rate)
        torch.testing.assert_close(weight.detach(), reference.p, atol=1e-5, rtol=1e-5)


def test_without_sparsity_it_is_the_closed_form() -> None:
    """One step from p0: p0 - momentum s g / ((s g^2)^(1/3) + eps), also for a bias."""
    bias = nn.Parameter(torch.tensor([1.0, -2.0]).double())
    weight = nn.Parameter(torch.ones(2, 1, 1).double())
    optimizer = RAMDA([bias, weight], lr=0.01, momentum=0.5, group_lasso=0.0)
    bias.grad, weight.grad = torch.tensor([0.3, -4.0]).double(), torch.ones(2, 1, 1).double()
    optimizer.step()
    gradient = torch.tensor([0.3, -4.0]).double()
    moved = 0.5 * 0.01 * gradient / ((0.01 * gradient**2) ** (1 / 3) + 1e-6)
    torch.testing.assert_close(bias.detach(), torch.tensor([1.0, -2.0]).double() - moved)


def regression() -> tuple[nn.Conv1d, torch.Tensor, torch.Tensor]:
    """A convolution of 8 filters to recover, of which 5 are zero."""
    torch.manual_seed(0)
    truth = torch.randn(8, 3, 2).double()
    truth[[0, 2, 3, 5, 7]] = 0
    inputs = torch.randn(64, 3, 6).double()
    targets = nn.functional.conv1d(inputs, truth) + 0.1 * torch.randn(64, 8, 5).double()
    return nn.Conv1d(3, 8, 2, bias=False).double(), inputs, targets


def train(model: nn.Module, optimizer: RAMDA, batch: tuple, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        optimizer.step()


def test_planted_zeros_are_found() -> None:
    """Exactly those filters, once the momentum is 1; nothing is zero without regularization."""
    model, *batch = regression()
    optimizer = RAMDA(model, lr=0.1, group_lasso=0.01, total_steps=300)
    assert optimizer.sparsity() == (0, 8)
    train(model, optimizer, tuple(batch), 300)
    zero = (model.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist()
    assert zero == [0, 2, 3, 5, 7]
    assert optimizer.sparsity() == (5, 8) and optimizer.sparsity().share == 5 / 8
    assert '5 of 8 filters are zero (62.5 %)' in optimizer.report()
    assert float(nn.functional.mse_loss(model(batch[0]), batch[1])) < 0.05

    plain, *batch = regression()
    optimizer = RAMDA(plain, lr=0.1, group_lasso=0.0, momentum=1.0)
    train(plain, optimizer, tuple(batch), 300)
    assert optimizer.sparsity() == (0, 0) and float(plain.weight.abs().min()) > 0


def test_a_resumed_run_continues_to_the_bit() -> None:
    model, *batch = regression()
    optimizer = RAMDA(model, lr=0.1, group_lasso=0.01)
    train(model, optimizer, tuple(batch), 5)
    other = copy.deepcopy(model)
    resumed = RAMDA(other, lr=0.1, group_lasso=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, by in ((model, optimizer), (other, resumed)):
        by.param_groups[0]['lr'] = 0.005
        train(one, by, tuple(batch), 5)
    assert torch.equal(model.weight, other.weight)


def test_the_momentum_rises_in_the_last_third() -> None:
    rule = RAMDARule()
    assert [rule.momentum_at(step, 0.1) for step in (1, 1000)] == [0.1, 0.1]
    rule.plan_steps(30)
    values = [rule.momentum_at(step, 0.1) for step in range(1, 31)]
    assert values[:20] == pytest.approx([0.1] * 20) and values[29] == 1.0
    assert values[20:] == pytest.approx([0.1 + 0.09 * k for k in range(1, 11)])
    optimizer = RAMDA(list(nn.Linear(2, 2).parameters()))
    optimizer.plan_steps(7)
    assert optimizer.rule.total_steps == 7
    given = RAMDA(list(nn.Linear(2, 2).parameters()), total_steps=9)
    given.plan_steps(7)
    assert given.rule.total_steps == 9


def test_rows_of_matrices_and_groups() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.Flatten(), nn.Linear(8, 3))
    assert RAMDA(model, prune_matrices=True).sparsity().filters == 7
    groups = [
        dict(params=model[0].parameters(), group_lasso=0.0),
        dict(params=model[2].parameters()),
    ]
    assert RAMDA(groups, prune_matrices=True).sparsity().filters == 3


def test_it_is_a_rule_for_preconditioned_directions() -> None:
    model, *batch = regression()
    optimizer = Preconditioned(
        model, rule=dict(type='RAMDA', lr=0.01, group_lasso=0.0), layers='NKFAC'
    )
    before = float(nn.functional.mse_loss(model(batch[0]), batch[1]))
    train(model, optimizer, tuple(batch), 60)
    assert float(nn.functional.mse_loss(model(batch[0]), batch[1])) < before / 2


def test_as_a_rule_it_asks_for_the_length() -> None:
    model, *batch = regression()
    rule = dict(type='RAMDA', lr=0.01, total_steps=3)
    optimizer = Preconditioned(model, rule=rule, layers='NKFAC')
    assert optimizer.rule.momentum_at(3, 0.1) == 1.0
    assert 'RAMDA does not know' not in optimizer.report()
    del rule['total_steps']
    assert 'total_steps=' in Preconditioned(model, rule=rule, layers='NKFAC').report()
    rule['total_steps'] = 0
    refused(ValueError, lambda: Preconditioned(model, rule=rule, layers='NKFAC'), 'total_steps=0')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_state_in_float32(dtype: torch.dtype) -> None:
    """So do those that were loaded; a step with lr=0 leaves the weights."""
    torch.manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(4, 3, 2)).to(dtype))
    optimizer = RAMDA([weight], lr=0.0, group_lasso=0.01)
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = optimizer.state[weight]
    assert {state[name].dtype for name in ('start', 'sum', 'squares')} == {torch.float32}


def test_a_rotation_is_refused() -> None:
    """The starting point and the weights would be in different bases."""
    model = nn.Sequential(nn.Linear(3, 2))
    for method in ('AdamR', 'SOAP'):
        rule = dict(type='RAMDA', lr=0.01)
        refused(
            ValueError, lambda r=rule, m=method: Preconditioned(model, rule=r, layers=m), 'RAMDA'
        )


def test_what_is_refused() -> None:
    params = list(nn.Linear(2, 2).parameters())
    refused(ValueError, lambda: RAMDA(params, momentum=0.0), 'momentum')
    refused(ValueError, lambda: RAMDA(params, momentum=1.5), 'above 1')
    refused(ValueError, lambda: RAMDA(params, group_lasso=-1.0), 'group_lasso')
    refused(ValueError, lambda: RAMDA(params, restart=1.0), 'restart')
    refused(ValueError, lambda: RAMDA(params, total_steps=0), 'total_steps')
    with pytest.raises(TypeError, match='betas'):
        RAMDA(params, betas=(0.9, 0.999))
