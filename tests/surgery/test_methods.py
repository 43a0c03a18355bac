"""The surgeries against explicit vectors, closed forms, and their properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.surgery import SAMGS, Aggregator, GCond, PCGrad, build_aggregator
from tests.reference.surgery import GCondReference, SAMGSReference, pcgrad
from tests.support.errors import refused


def draw(count: int, size: int, seed: int) -> Tensor:
    """Gradients with a common part of either sign, so that there are all kinds of conflict."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(count, 1, generator=generator).double() * 2
    common = torch.randn(size, generator=generator).double()
    return signs * common + torch.randn(count, size, generator=generator).double()


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_pcgrad_projects_in_its_orders(count: int, seed: int) -> None:
    gradients = draw(count, 8, seed)
    drawn = torch.Generator().manual_seed(7)
    orders = [torch.randperm(count, generator=drawn).tolist() for _ in range(count)]
    expected = pcgrad(list(gradients), orders)
    torch.testing.assert_close(PCGrad(seed=7).combine(gradients.clone()), expected)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 4), seed=st.integers(0, 10**6), steps=st.integers(1, 6))
def test_gcond_resolves_pair_by_pair(count: int, seed: int, steps: int) -> None:
    method, reference = GCond(), GCondReference(count)
    for step in range(steps):
        gradients = draw(count, 6, seed + step)
        expected = reference(list(gradients.clone()))
        torch.testing.assert_close(
            method.combine(gradients.clone()), expected, atol=1e-6, rtol=1e-5
        )


@settings(max_examples=50, deadline=None)
@given(count=st.integers(2, 4), seed=st.integers(0, 10**6), threshold=st.floats(0.1, 0.9))
def test_samgs_equalises_or_modulates(count: int, seed: int, threshold: float) -> None:
    method, reference = SAMGS(threshold), SAMGSReference(threshold)
    for step in range(4):
        gradients = draw(count, 6, seed + step)
        expected = reference(list(gradients.clone()))
        torch.testing.assert_close(
            method.combine(gradients.clone()), expected, atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize('method', [PCGrad, GCond])
def test_gradients_without_conflict_are_added(method: type[Aggregator]) -> None:
    gradients = torch.eye(3).double() + 0.1
    torch.testing.assert_close(method().combine(gradients.clone()), gradients.sum(0))


def test_two_quadratics_in_conflict() -> None:
    """|w - a|^2 / 2 and |w - b|^2 / 2 at a point between them, a little aside.

    With g = (x, y) and h = (-x, y), PCGrad's result has no first entry, by symmetry, and the second
    is 2 y - 2 y (y^2 - x^2) / (x^2 + y^2) = 4 x^2 y / (x^2 + y^2).
    """
    x, y = 1.0, 0.4
    gradients = torch.tensor([[x, y], [-x, y]]).double()
    expected = torch.tensor([0.0, 4 * x**2 * y / (x**2 + y**2)]).double()
    torch.testing.assert_close(PCGrad().combine(gradients.clone()), expected)
    weak = torch.tensor([[1.0, 0.9], [-1.0, 0.9]]).double()  # cosine -0.1
    expected = torch.tensor([0.0, 4 * 0.9 / (1 + 0.81)]).double()
    torch.testing.assert_close(GCond().combine(weak.clone()), expected)


def test_the_critical_zone_leaves_one_out_and_nobody_always_wins() -> None:
    """The longer one wins three times; then the other one does."""
    gradients = torch.tensor([[1.0, 0.01], [-0.5, 0.01]]).double()
    method = GCond()
    results = [method.combine(gradients.clone()) for _ in range(4)]
    for result in results[:3]:
        torch.testing.assert_close(result, gradients[0])
    torch.testing.assert_close(results[3], gradients[1])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(['PCGrad', 'GCond', 'SAMGS']))
def test_a_saved_state_continues_to_the_bit(seed: int, name: str) -> None:
    method = build_aggregator(name)
    for step in range(3):
        method.combine(draw(3, 5, seed + step))
    other = build_aggregator(name)
    other.load_state_dict(method.state_dict())
    after = draw(3, 5, seed + 9)
    assert torch.equal(method.combine(after.clone()), other.combine(after.clone()))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pcgrad_of_two_helps_both(seed: int) -> None:
    """The result points against neither of two gradients."""
    gradients = draw(2, 5, seed)
    result = PCGrad().combine(gradients.clone())
    assert float((gradients @ result).min()) > -1e-9


def test_a_zero_gradient_is_no_conflict() -> None:
    gradients = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double()
    for name in ('PCGrad', 'GCond'):
        torch.testing.assert_close(build_aggregator(name).combine(gradients.clone()), gradients[0])
    assert bool(build_aggregator('SAMGS').combine(gradients.clone()).isfinite().all())


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(type='CAGrad'), 'CAGrad'),
        (dict(type='GCond', thresholds=(0.0, -0.5, 0.0)), 'ascending'),
        (dict(type='GCond', window=-1), 'window'),
        (dict(type='SAMGS', momentum=1.0), 'momentum'),
    ],
)
def test_what_is_refused(settings: dict[str, Any], words: str) -> None:
    refused(ValueError, lambda: build_aggregator(settings), words)
