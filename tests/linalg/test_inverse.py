"""Inverses and eigenvalues of stacks of symmetric matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.linalg import (
    add_product,
    cholesky_inverse,
    definite_newton_inverse,
    largest_eigenvalue,
    newton_inverse,
    stacked_product,
)

DTYPES = [torch.float32, torch.float64]


def spd(n: int, low: float = 0.1, seed: int = 0, count: int = 1) -> Tensor:
    """Symmetric positive definite (count, n, n) with eigenvalues from low to 1."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(count, n, n, generator=generator).double())[0]
    values = torch.logspace(torch.tensor(low).log10(), 0, n).double() if n > 1 else torch.ones(1)
    return basis @ (values[:, None] * basis.mT)


def residual(matrix: Tensor, inverse: Tensor) -> Tensor:
    """||I - B A||_F."""
    return torch.linalg.matrix_norm(torch.eye(matrix.shape[-1]).to(matrix) - inverse @ matrix)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """One random symmetric positive definite matrix, well or badly conditioned, of any scale."""
    scale = 10.0 ** draw(st.integers(-6, 6))
    return (
        scale
        * spd(draw(st.integers(1, 8)), 10.0 ** -draw(st.floats(0, 6)), draw(st.integers(0, 10**6)))[
            0
        ]
    )


# ------------------------------------------------------------------- Cholesky


@settings(max_examples=80, deadline=None, derandomize=True)
@given(matrices())
def test_cholesky_inverts(matrix: Tensor) -> None:
    before = matrix.clone()
    inverse, good = cholesky_inverse(matrix)
    assert good.shape == () and bool(good)
    assert residual(matrix, inverse) < 1e-7
    assert torch.allclose(inverse, torch.linalg.inv(matrix), rtol=1e-6)
    assert torch.allclose(inverse, inverse.mT, rtol=1e-8)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize('dtype', DTYPES)
def test_cholesky_of_a_batch_is_that_of_each(dtype: torch.dtype) -> None:
    stack = spd(6, count=12).to(dtype).reshape(3, 4, 6, 6)
    inverse, good = cholesky_inverse(stack)
    assert inverse.shape == stack.shape and good.shape == (3, 4) and inverse.dtype == dtype
    assert good.dtype == torch.bool and good.all()
    for k in range(3):
        for b in range(4):
            one, fine = cholesky_inverse(stack[k, b])
            assert fine and torch.allclose(
                inverse[k, b], one, rtol=1e-5 if dtype.itemsize == 4 else 1e-12, atol=1e-6
            )


BAD = {
    'singular': torch.ones(3, 3),
    'negative': -torch.eye(3),
    'indefinite': torch.diag(torch.tensor([1.0, -1e-3, 2.0])),
    'zero': torch.zeros(3, 3),
    'nan': torch.full((3, 3), float('nan')),
    'infinite': torch.diag(torch.tensor([1.0, float('inf'), 1.0])),
    'one nan': torch.eye(3).index_put(
        (torch.tensor(1), torch.tensor(0)), torch.tensor(float('nan'))
    ),
}


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', BAD)
def test_cholesky_reports_a_bad_matrix_among_good_ones(name: str, dtype: torch.dtype) -> None:
    stack = torch.stack([spd(3)[0], BAD[name].double(), spd(3, seed=1)[0]]).to(dtype)[:, None]
    inverse, good = cholesky_inverse(stack)
    assert good.tolist() == [[True], [False], [True]]
    assert (residual(stack[[0, 2]], inverse[[0, 2]]) < 1e-4).all()


# ------------------------------------------------------------------- Newton


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('steps', [1, 3])
def test_newton_of_a_batch_is_that_of_each(steps: int, dtype: torch.dtype) -> None:
    """Matrices of both branches in one batch."""
    stack = spd(5, count=6).to(dtype).reshape(3, 2, 5, 5)
    start = torch.linalg.inv(stack) * torch.tensor([1.01, 3.0]).to(dtype)[:, None, None]
    before = start.clone()
    refined, good = newton_inverse(stack, start, steps)
    assert good.shape == (3, 2) and good.all() and torch.equal(start, before)
    inside = residual(stack, start) < 1
    assert inside.any() and not inside.all()
    for k in range(3):
        for b in range(2):
            one, fine = newton_inverse(stack[k, b], start[k, b], steps)
            assert fine and one.dtype == dtype
            assert torch.allclose(refined[k, b], one, rtol=1e-4 if dtype.itemsize == 4 else 1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(0, 10**6), st.floats(1e-3, 0.9))
def test_newton_from_a_near_inverse_converges_quadratically(n: int, seed: int, size: float) -> None:
    """||I - B'A|| <= ||I - BA||^2, for any B, symmetric or not."""
    matrix = spd(n, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    error = torch.randn(1, n, n, generator=generator).double()
    error *= size / error.norm()
    start = (torch.eye(n).double() - error) @ torch.linalg.inv(matrix)
    before = residual(matrix, start)
    assert torch.allclose(before, torch.tensor(size).double(), rtol=1e-6)
    for _ in range(8):
        start, good = newton_inverse(matrix, start, 1)
        after = residual(matrix, start)
        assert good.all() and (after <= before**2 * (1 + 1e-6) + 1e-10).all()
        before = after
    assert size > 0.6 or (before < 1e-8).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(0, 3), st.floats(-4, 6))
def test_the_damped_branch_never_increases_the_residual_of_a_commuting_start(
    n: int, seed: int, spread: float, scale: float
) -> None:
    """I - B'A = (I - P)(I - P / ||P||), and 0 < P / ||P|| <= I where B commutes with A."""
    matrix = spd(n, seed=seed)
    values, basis = torch.linalg.eigh(matrix)
    generator = torch.Generator().manual_seed(seed + 1)
    factors = 10**scale * torch.exp(spread * torch.randn(1, n, generator=generator).double())
    start = basis @ ((factors / values)[..., None] * basis.mT)
    before = residual(matrix, start)
    assume(bool(before >= 1))
    refined, good = newton_inverse(matrix, start, 1)
    assert good.all() and (residual(matrix, refined) <= before * (1 + 1e-6)).all()


def eigenvalues_of_product(matrix: Tensor, inverse: Tensor) -> Tensor:
    """Eigenvalues of B A, real and positive for positive definite A and B."""
    factor = torch.linalg.cholesky(matrix)
    return torch.linalg.eigvalsh(factor.mT @ inverse @ factor)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(-3, 3))
def test_a_damped_step_brings_every_direction_nearer(n: int, seed: int, scale: float) -> None:
    """For any positive definite A and B: |1 - eigenvalue of BA| shrinks, and B stays definite."""
    matrix, start = spd(n, seed=seed), 10**scale * spd(n, 0.05, seed=seed + 1)
    assume(bool(residual(matrix, start) >= 1))
    before = (1 - eigenvalues_of_product(matrix, start)).abs().sort()[0]
    refined, good = newton_inverse(matrix, start, 1)
    after = (1 - eigenvalues_of_product(matrix, (refined + refined.mT) / 2)).abs().sort()[0]
    assert good.all() and torch.allclose(refined, refined.mT, rtol=1e-6, atol=1e-9)
    assert (after <= before * (1 + 1e-6) + 1e-9).all()
    assert (eigenvalues_of_product(matrix, refined) > 0).all()


def test_the_damped_branch_may_increase_the_frobenius_residual() -> None:
    """What cannot be claimed: for B that does not commute with A the norm may grow."""
    matrix = torch.tensor([[1.0, 0.0], [0.0, 1e-4]]).double()
    start = torch.tensor([[0.01, 0.9], [0.9, 100.0]]).double()
    assert (torch.linalg.eigvalsh(start) > 0).all() and residual(matrix, start) >= 1
    refined, good = newton_inverse(matrix, start, 1)
    assert good and residual(matrix, refined) > 1.3 * residual(matrix, start)


@pytest.mark.parametrize('spread', [1.5, 5.0, 100.0])
def test_damped_steps_reach_the_inverse(spread: float) -> None:
    matrix = spd(6, 0.2)
    start = torch.eye(6).double()[None] * spread
    assert (residual(matrix, start) >= 1).all()
    refined, good = newton_inverse(matrix, start, 60)
    assert good.all() and (residual(matrix, refined) < 1e-9).all()


def test_newton_steps_are_the_written_formula() -> None:
    matrix, eye = spd(4), torch.eye(4).double()
    for start in (1.1 * torch.linalg.inv(matrix), 4 * torch.linalg.inv(matrix)):
        product = start @ matrix
        size = torch.linalg.matrix_norm(product)
        step = torch.tensor(1.0) if residual(matrix, start) < 1 else 1 / size
        expected = ((1 + step) * eye - step * product) @ start
        assert torch.allclose(newton_inverse(matrix, start, 1)[0], expected, rtol=1e-12)


def test_an_inverse_that_the_optimal_step_makes_indefinite_is_computed_anew() -> None:
    first = torch.diag(torch.tensor([2.0] + [0.6] * 63).double())
    matrices = torch.stack([first, first / 2])
    start = torch.eye(64).double().expand_as(matrices)
    plain, _ = newton_inverse(matrices, start, 1, optimal=True)
    assert (
        float(torch.linalg.eigvalsh(plain[0]).min())
        < 0
        < float(torch.linalg.eigvalsh(plain[1]).min())
    )
    refined, good = definite_newton_inverse(matrices, start, 1)
    assert good.tolist() == [True, True]
    torch.testing.assert_close(refined[0], torch.linalg.inv(first), rtol=1e-12, atol=0)
    assert torch.equal(refined[1], plain[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 7), st.integers(0, 10**6), st.floats(0.3, 3))
def test_the_optimal_step_has_the_least_residual(n: int, seed: int, scale: float) -> None:
    """Proposition 3.2: along D = B (A B - I), of the inverse B of another matrix A."""
    matrix = spd(n, 0.05, seed)[0]
    start = scale * torch.linalg.inv(spd(n, 0.05, seed + 1)[0])
    assume(float(residual(matrix, start)) > 1)
    refined, good = newton_inverse(matrix, start, 1, optimal=True)
    direction = start @ (matrix @ start - torch.eye(n).double())

    def left_over(step: float) -> Tensor:
        error = matrix @ (start - step * direction) - torch.eye(n).double()
        return torch.linalg.matrix_norm(error)

    reached = torch.linalg.matrix_norm(matrix @ refined.mT - torch.eye(n).double())
    assert bool(good) and float(reached) <= min(
        float(left_over(10.0**k)) + 1e-9 for k in torch.linspace(-4, 1, 60).tolist()
    )
    change = matrix @ direction
    best = float(((matrix @ start - torch.eye(n).double()) * change).sum() / (change**2).sum())
    torch.testing.assert_close(refined.mT, start - best * direction, rtol=1e-8, atol=1e-10)
    norm, _ = newton_inverse(matrix, start, 1)
    assert not torch.allclose(norm, refined, rtol=1e-3) or n < 3


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_newton_reports_what_is_not_finite(bad: float) -> None:
    stack = spd(3, count=3)
    start = torch.linalg.inv(stack)
    stack[1, 0, 0] = bad
    refined, good = newton_inverse(stack, start, 1)
    assert good.tolist() == [True, False, True]
    assert (residual(stack[[0, 2]], refined[[0, 2]]) < 1e-8).all()


def test_newton_from_zero_is_reported() -> None:
    _, good = newton_inverse(spd(3), torch.zeros(1, 3, 3).double(), 1)
    assert good.tolist() == [False]


# ------------------------------------------------------------------- the largest eigenvalue


@settings(max_examples=80, deadline=None, derandomize=True)
@given(matrices())
def test_the_estimate_is_a_lower_bound_and_not_far(matrix: Tensor) -> None:
    """Of random matrices; there is no bound where the ones miss the top eigenvector."""
    true = torch.linalg.eigvalsh(matrix)[-1]
    estimate = largest_eigenvalue(matrix)
    assert estimate.shape == () and estimate.dtype == matrix.dtype
    assert 0.5 * true <= estimate <= true * (1 + 1e-9)


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_eigenvalue_of_a_batch_is_that_of_each(dtype: torch.dtype) -> None:
    centred = torch.eye(5).double() - 0.2
    stack = torch.stack(
        [
            spd(5)[0],
            centred,
            torch.zeros(5, 5).double(),
            1e-6 * spd(5)[0],
            1e6 * spd(5, seed=2)[0],
            torch.eye(5).double(),
        ]
    ).to(dtype)
    together = largest_eigenvalue(stack.reshape(3, 2, 5, 5))
    assert together.shape == (3, 2) and together.dtype == dtype
    apart = torch.stack([largest_eigenvalue(matrix) for matrix in stack])
    assert torch.allclose(together.flatten(), apart, rtol=1e-5, atol=0)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('n', [1, 2, 64])
def test_a_zero_matrix_has_eigenvalue_zero(n: int, dtype: torch.dtype) -> None:
    estimate = largest_eigenvalue(torch.zeros(2, 1, n, n, dtype=dtype))
    assert torch.equal(estimate, torch.zeros(2, 1, dtype=dtype))


@pytest.mark.parametrize('scale', [1e-18, 1e-12, 1e6, 1e18])
def test_the_scale_does_not_matter(scale: float) -> None:
    matrix = spd(6).float()
    wanted = largest_eigenvalue(matrix) * scale
    assert torch.allclose(largest_eigenvalue(matrix * scale), wanted, rtol=1e-4, atol=0)


def softmax_fisher(classes: int, samples: int, spread: float, seed: int) -> Tensor:
    """Mean of diag(p) - pp' over samples: the ones are in its null space."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(samples, classes, generator=generator).double()
    p = logits.softmax(1)
    return torch.diag(p.mean(0)) - p.t() @ p / samples


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(2, 40),
    st.integers(1, 30),
    st.floats(0, 4),
    st.integers(0, 10**6),
    st.sampled_from(DTYPES),
)
def test_a_softmax_classifier_is_not_rounding_noise(
    classes: int, samples: int, spread: float, seed: int, dtype: torch.dtype
) -> None:
    matrix = softmax_fisher(classes, samples, spread, seed)
    true = float(torch.linalg.eigvalsh(matrix)[-1])
    assume(true > 1e-12)
    estimate = float(largest_eigenvalue(matrix.to(dtype)))
    assert 0.75 * true <= estimate <= true * (1 + 1e-5)


@pytest.mark.parametrize('dtype', DTYPES)
def test_gradient_moments_of_a_softmax_classifier(dtype: torch.dtype) -> None:
    """L = sum g'g with g = softmax - target, through a classifier of eight classes."""
    torch.manual_seed(0)
    logits = torch.randn(200, 8, dtype=dtype, requires_grad=True)
    torch.nn.functional.cross_entropy(logits, torch.arange(200) % 8).backward()
    moment = logits.grad.t() @ logits.grad
    true = float(torch.linalg.eigvalsh(moment.double())[-1])
    assert 0.75 * true <= float(largest_eigenvalue(moment)) <= true * (1 + 1e-5)


@pytest.mark.parametrize(
    'shapes',
    [
        ((3, 2, 4, 5), (3, 2, 5, 6)),
        ((1, 4, 5), (1, 5, 6)),
        ((4, 5), (5, 6)),
        ((3, 4, 5), (1, 5, 6)),
        ((0, 4, 5), (0, 5, 6)),
        ((2, 4, 0), (2, 0, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize('large', [0, 10**9])
def test_products_of_stacks(
    shapes: tuple[tuple[int, ...], ...], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmprecond.linalg.products.LARGE', large)
    first, second = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    torch.testing.assert_close(stacked_product(first, second), first @ second)
    torch.testing.assert_close(stacked_product(first.mT.contiguous().mT, second), first @ second)


@pytest.mark.parametrize('large', [0, 10**9])
@pytest.mark.parametrize('inner', [False, True])
def test_products_are_added_in_place(
    large: int, inner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmprecond.linalg.products.LARGE', large)
    first, second = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 4, 5), (2, 5, 6)))
    around = torch.ones(2, 5, 8, dtype=torch.float64)
    total = around[:, :4, :6] if inner else torch.ones(2, 4, 6, dtype=torch.float64)
    add_product(total, first, second)
    torch.testing.assert_close(total, 1 + first @ second)
    total.fill_(float('nan'))
    add_product(total, first, second, old=False)
    torch.testing.assert_close(total, first @ second)
    assert bool((around[:, 4] == 1).all()) and bool((around[..., 6:] == 1).all())
