"""Spectra by Lanczos, against whole matrices and curvlinops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmprecond.loss_surface import find_spectrum, inverse_root, lanczos


def symmetric(size: int, seed: int, definite: bool = False) -> torch.Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return matrix @ matrix.T / size + 0.1 * torch.eye(size) if definite else matrix + matrix.T


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 12), seed=st.integers(0, 10**6), preconditioned=st.booleans())
def test_as_many_steps_as_dimensions_find_all_eigenvalues(
    size: int, seed: int, preconditioned: bool
) -> None:
    matrix, metric = symmetric(size, seed), symmetric(size, seed + 1, definite=True)
    like = torch.zeros(size).double()
    found = find_spectrum(
        lambda v: matrix @ v,
        like,
        size,
        1,
        seed,
        (lambda v: metric @ v) if preconditioned else None,
    )
    product = metric @ matrix if preconditioned else matrix
    exact = torch.linalg.eigvals(product).real.sort().values
    torch.testing.assert_close(found.values[0], exact, atol=1e-7 * size, rtol=1e-6)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(1).double())
    # The Ritz vector of the largest value is an eigenvector of the product.
    value = exact[exact.abs().argmax()]
    image = product @ found.vectors[0]
    torch.testing.assert_close(image, value * found.vectors[0], atol=1e-4, rtol=1e-3)


def test_the_tridiagonal_matrix_is_the_projection() -> None:
    matrix = symmetric(30, 0)
    start = torch.randn(30, generator=torch.Generator().manual_seed(5)).double()
    diagonal, off, basis = lanczos(lambda v: matrix @ v, start, 8)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8).double())
    expected = diagonal.diag() + off.diag(1) + off.diag(-1)
    torch.testing.assert_close(basis @ matrix @ basis.T, expected)


def test_a_start_in_an_invariant_space_ends_early() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
    start = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    diagonal, off, _ = lanczos(lambda v: matrix @ v, start, 4)
    assert len(diagonal) == 2 and len(off) == 1
    torch.testing.assert_close(
        torch.linalg.eigvalsh(diagonal.diag() + off.diag(1) + off.diag(-1)),
        torch.tensor([1.0, 2.0]).double(),
    )


@pytest.mark.parametrize('preconditioned', [False, True])
def test_the_density_is_that_of_the_eigenvalues(preconditioned: bool) -> None:
    """Averaged over many runs; the weights are those of an isotropic start."""
    matrix, metric = symmetric(40, 2), symmetric(40, 3, definite=True)
    product = metric @ matrix if preconditioned else matrix
    exact = torch.linalg.eigvals(product).real
    width = float(exact.abs().max()) / 10
    points = torch.linspace(float(exact.min()), float(exact.max()), 40).double()
    found = find_spectrum(
        lambda v: matrix @ v,
        points,
        40,
        400,
        0,
        (lambda v: metric @ v) if preconditioned else None,
    )
    bumps = torch.exp(-(((points - exact[:, None]) / width) ** 2) / 2)
    expected = bumps.mean(0) / (width * (2 * torch.pi) ** 0.5)
    assert (found.density(points, width) - expected).abs().max() < 0.05 * expected.max()
    assert found.mean == pytest.approx(float(product.trace()) / 40, abs=0.1 * float(exact.std()))


def test_the_density_agrees_with_curvlinops() -> None:
    curvlinops = pytest.importorskip('curvlinops')
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    data = [(torch.randn(20, 4).double(), torch.randint(3, (20,)))]
    function = torch.nn.CrossEntropyLoss()
    operator = curvlinops.HessianLinearOperator(model, function, list(model.parameters()), data)
    from mmprecond.loss_surface import Loss

    loss = Loss.of_batches(model, function, data)
    vector = torch.randn(loss.size).double()
    torch.testing.assert_close(loss.hessian_vector_product(vector), operator @ vector)
    found = find_spectrum(loss.hessian_vector_product, vector, loss.size, 1)
    exact = torch.linalg.eigvalsh(operator @ torch.eye(loss.size).double())
    assert found.largest == pytest.approx(float(exact[-1]))
    assert found.smallest == pytest.approx(float(exact[0]))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_inverse_roots(size: int, seed: int) -> None:
    matrix = symmetric(size, seed, definite=True)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
    root = inverse_root(lambda v: matrix @ v, vector, size)
    values, vectors = torch.linalg.eigh(matrix)
    exact = vectors @ (values.rsqrt()[:, None] * vectors.T) @ vector
    torch.testing.assert_close(root, exact, atol=1e-7, rtol=1e-6)
