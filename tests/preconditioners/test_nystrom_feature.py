"""NysAct: the error of its sketches, and that it follows and keeps no more than them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmprecond.linalg import columns_to_matrix, nystrom_columns, power_of_columns
from mmprecond.optimizers import NysAct
from tests.support.networks import TokenNet, token_batches, train


def moment_of(count: int, power: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(count, count, generator=generator).double())[0]
    values = torch.arange(1, count + 1).double() ** -power
    return (basis * values) @ basis.t()


def error(moment: Tensor, inverse: Tensor, rho: float) -> float:
    """Of an inverse of moment + rho I, relative to it."""
    exact = torch.linalg.inv(moment + rho * torch.eye(len(moment)).double())
    return float((inverse - exact).norm() / exact.norm())


def nystrom_inverse(moment: Tensor, test: Tensor, rho: float) -> Tensor:
    columns = nystrom_columns((moment @ test)[None], test[None])
    basis, scale, good = power_of_columns(columns, torch.tensor([rho]).double())
    assert good.all()
    return columns_to_matrix(basis, scale)[0]


def official_inverse(captures: list[Tensor], tests: list[Tensor], rho: float) -> Tensor:
    """The published code's: sketches with different test matrices averaged, the last one's core,
    a shift in the core alone, the triangular solve on the wrong side, rho twice."""
    decay, weight = 0.95, 0.0
    sketch = torch.zeros_like(captures[0] @ tests[0])
    for capture, test in zip(captures, tests, strict=True):
        sketch = decay * sketch + (1 - decay) * capture @ test
        weight = decay * weight + 1 - decay
    test = tests[-1]
    shifted = sketch / weight + rho * test
    values, vectors = torch.linalg.eigh((test.t() @ shifted + shifted.t() @ test) / 2)
    shift = values.min().abs() + rho
    core = (vectors * (values + shift)) @ vectors.t()
    factor = torch.linalg.cholesky(core)
    left, singular, _ = torch.linalg.svd(
        torch.linalg.solve(factor, shifted, left=False), full_matrices=False
    )
    found = (singular**2 - shift).clamp_min(0)
    rest = torch.eye(len(left)).double() - left @ left.t()
    return (left / (found + rho)) @ left.t() + rest / rho


def test_the_error_falls_with_the_rank_and_the_published_forms_are_worse() -> None:
    size, rho = 60, 0.02
    moment = moment_of(size, 1.5)
    mean: dict[int, list[float]] = {}
    for rank in (5, 10, 20, 40, 60):
        ours, theirs = [], []
        for seed in range(8):
            generator = torch.Generator().manual_seed(100 * rank + seed)
            tests = [
                torch.randn(size, rank, generator=generator).double() / size**0.5 for _ in range(6)
            ]
            ours.append(error(moment, nystrom_inverse(moment, tests[-1], rho), rho))
            theirs.append(error(moment, official_inverse([moment] * 6, tests, rho), rho))
        mean[rank] = [sum(ours) / 8, sum(theirs) / 8]
    errors = [ours for ours, _ in mean.values()]
    assert all(after < 0.85 * before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 1e-6
    assert all(ours < 0.9 * theirs for ours, theirs in mean.values()), mean


@pytest.mark.parametrize('rank', [3, 8, 15])
def test_the_trace_error_is_within_the_bound(rank: int) -> None:
    """Mean over draws: (1 + k / (m - k - 1)) times the eigenvalues after the k-th, any k."""
    size, draws = 40, 40
    moment = moment_of(size, 1.0)
    values = torch.linalg.eigvalsh(moment).flip(0)
    total = 0.0
    for seed in range(draws):
        test = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed)).double()
        columns = nystrom_columns((moment @ test)[None], test[None])[0]
        total += float(moment.trace() - columns.square().sum()) / draws
    bound = min((1 + k / (rank - k - 1)) * values[k:].sum() for k in range(rank - 1))
    assert 0 < total <= bound


@pytest.mark.parametrize('sketch', ['gaussian', 'columns'])
def test_nysact_follows_its_sketch(sketch: str) -> None:
    """The operator in use is that of the running sketch of the whole moment."""
    torch.manual_seed(0)
    model = TokenNet().double()
    dense, optimizer = copy.deepcopy(model), None
    options = dict(stat_interval=1, refresh_interval=1, damping=0.1)
    optimizer = NysAct(model, lr=0.0, rank=6, sketch=sketch, **options, settings='published')
    whole = NysAct(dense, lr=0.0, rank=1000, **options, settings='published')
    batches = token_batches(4)
    train(model, optimizer, batches)
    train(dense, whole, batches)
    moments = {
        layer.name: stack.statistics['input_moment'][k, 0]
        for stack in whole.curvature.stacks
        for k, layer in stack.ready()
    }
    for stack in optimizer.curvature.stacks:
        for k, layer in stack.ready():
            assert stack.statistics['input_sketch'].shape[-1] == 6
            (kept,) = stack.kept
            test = kept.form.test_matrix(layer, kept.key, layer.columns)[0]
            if sketch == 'columns':
                assert ((test == 0) | (test == 1)).all() and (test.sum(0) == 1).all()
                assert (test.sum(1) <= 1).all()
            operator = {name: o[k] for name, o in stack.operator_tensors.items()}
            ours = columns_to_matrix(operator['input_columns'], operator['input_scale'])[0]
            torch.testing.assert_close(ours, nystrom_inverse(moments[layer.name], test, 0.1))


def test_nysact_keeps_nothing_of_a_side_squared() -> None:
    model = nn.Linear(600, 5)
    optimizer = NysAct(model, lr=0.1, rank=7, settings='published')
    model(torch.randn(9, 600)).sum().backward()
    optimizer.step()
    (stack,) = optimizer.curvature.stacks
    numbers = sum(t.numel() for t in (*stack.statistics.values(), *stack.operator_tensors.values()))
    assert numbers == 2 * 601 * 7 + 1
    assert {tuple(p.shape) for p in model.parameters()} == {(5, 600), (5,)}


def test_sketches_may_be_sampled() -> None:
    model = TokenNet().double()
    optimizer = NysAct(model, lr=0.1, rank=4, max_rows=8, settings='published')
    assert [s.key for s in optimizer.curvature.stacks[0].kept] == ['input_sketch_sampled']
    train(model, optimizer, token_batches(3))
    assert all(member.refreshes for stack in optimizer.curvature.stacks for member in stack.members)
