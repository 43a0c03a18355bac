"""Values and derivatives of a loss, against whole matrices."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from mmprecond.loss_surface import Loss, choose_product
from tests.reference.landscape import dense, full_gauss_newton, full_hessian

cross_entropy = nn.functional.cross_entropy


def small(seed: int = 0) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A float64 network with batch normalisation and a frozen layer, and two batches."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(3, 3)
    ).double()
    model[4].requires_grad_(False)
    model(torch.randn(32, 5).double())  # running statistics that are not those of the start
    return model, [(torch.randn(7, 5).double(), torch.randint(3, (7,))) for _ in range(2)]


def test_the_product_is_that_of_the_whole_hessian() -> None:
    model, batches = small()
    model.train()
    loss = Loss.of_batches(model, cross_entropy, batches)
    model.eval()
    exact = full_hessian(model, cross_entropy, batches)
    model.train()
    assert loss.size == len(exact) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(dense(loss.hessian_vector_product, loss.size), exact)
    differences = dense(loss.difference_vector_product, loss.size)
    torch.testing.assert_close(differences, exact, atol=1e-8, rtol=0)
    assert model.training


def test_a_quadratic_is_exact() -> None:
    """The Hessian of |X w - y|^2 / 2 is X'X; differences are exact too."""
    torch.manual_seed(1)
    model = nn.Linear(4, 1, bias=False).double()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 1).double()
    loss = Loss.of_batches(model, lambda out, target: ((out - target) ** 2).sum() / 2, [(x, y)])
    torch.testing.assert_close(dense(loss.hessian_vector_product, 4), x.T @ x)
    torch.testing.assert_close(dense(loss.difference_vector_product, 4), x.T @ x)
    torch.testing.assert_close(loss.gradient(), (x.T @ (x @ model.weight.T - y)).flatten())


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_evaluations_leave_no_trace_and_repeat(mode: str) -> None:
    """Also with dropout, and where batch normalisation would move its statistics."""
    model, batches = small()
    model.insert(2, nn.Dropout(0.5))
    loss = Loss.of_batches(model, cross_entropy, batches, mode)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    first = loss.value(), loss.gradient()
    with loss.displaced(torch.ones_like(loss.parameter_vector())):
        assert loss.value() != first[0]
    assert loss.value() == first[0] and torch.equal(loss.gradient(), first[1])
    assert torch.equal(torch.get_rng_state(), generator) and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    other = Loss.of_batches(model, cross_entropy, batches, 'eval' if mode == 'train' else 'train')
    assert other.value() != first[0]


def test_a_parameter_without_influence_and_a_linear_loss() -> None:
    model = nn.ModuleDict(dict(used=nn.Linear(2, 1), idle=nn.Linear(2, 1)))
    loss = Loss(model, [lambda: model['used'](torch.ones(1, 2)).sum()])
    assert loss.gradient().tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert not loss.hessian_vector_product(torch.ones(6)).any()
    assert not loss.difference_vector_product(torch.zeros(6)).any()


def test_bad_input_is_one_line() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='at least one batch'):
        Loss(model, [])
    with pytest.raises(ValueError, match="mode='val' is unknown"):
        Loss(model, [lambda: torch.zeros(())], 'val')
    with pytest.raises(ValueError, match='no trainable parameter'):
        Loss(model.requires_grad_(False), [lambda: torch.zeros(())])


def test_equal_parameters_have_equal_values_under_any_random_numbers() -> None:
    """Those of NumPy and Python too, whose states stay."""
    model = nn.Linear(2, 1)
    drawn = lambda: float(np.random.rand() + random.random())  # noqa: E731
    loss = Loss(model, [lambda: model(torch.ones(1, 2)).sum() * drawn()])
    np.random.seed(3)
    before = np.random.get_state()[1].copy(), random.getstate()
    assert loss.value() == loss.value()
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_the_gauss_newton_matrix_is_that_of_its_definition(mode: str) -> None:
    """The mean of J' L J over the batches, with whole Jacobians; buffers stay."""
    pytest.importorskip('curvlinops')
    model, batches = small()
    loss = Loss.of_batches(model, cross_entropy, batches, mode)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = dense(loss.gauss_newton_vector_product, loss.size)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, full_gauss_newton(model, cross_entropy, batches, mode))


def test_a_loss_of_unknown_outputs_has_no_gauss_newton_matrix() -> None:
    model = nn.Linear(2, 1)
    loss = Loss(model, [lambda: model(torch.ones(1, 2)).sum()])
    with pytest.raises(ValueError, match="needs a loss of a network's outputs"):
        loss.gauss_newton_vector_product(loss.parameter_vector())
    with pytest.raises(ValueError, match="needs a loss of a network's outputs"):
        choose_product(loss, matrix='gauss-newton')
