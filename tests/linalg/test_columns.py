"""Powers of matrices that are given by columns, and the columns of a sketch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmprecond.linalg import apply_columns, nystrom_columns, power_of_columns
from tests.support.oversize import normal


def dense_power(matrix: Tensor, damping: Tensor, exponent: float) -> Tensor:
    """(A + mu I)^-p by the singular vectors of A (..., n, n)."""
    left, values, _ = torch.linalg.svd(matrix)
    return left @ torch.diag_embed((values + damping[..., None]) ** -exponent) @ left.mT


def laid_out(columns: Tensor, damping: Tensor, exponent: float) -> Tensor:
    """What `power_of_columns` means, as a dense matrix."""
    basis, scale, good = power_of_columns(columns, damping, exponent)
    assert good.all() and good.shape == damping.shape and scale.shape[-2:] == (1, 1)
    return apply_columns(
        torch.eye(columns.shape[-2]).to(columns).expand(*columns.shape[:-2], -1, -1), basis, scale
    )


@pytest.mark.parametrize('exponent', [1.0, 0.5, 0.25, 2.0])
@pytest.mark.parametrize('shape', [(9, 4), (2, 3, 9, 4), (2, 4, 9), (5, 5), (7, 1)], ids=str)
def test_powers_of_columns(shape: tuple[int, ...], exponent: float) -> None:
    columns = normal(*shape)
    columns[..., -1] = columns[..., 0]  # rank deficient
    if shape[-1] > 2:
        columns[..., 1] = 0.0
    damping = 0.1 + normal(*shape[:-2], seed=1).abs()
    ours = laid_out(columns, damping, exponent)
    torch.testing.assert_close(
        ours, dense_power(columns @ columns.mT, damping, exponent), rtol=1e-9, atol=1e-10
    )
    gone = laid_out(torch.zeros_like(columns), damping, exponent)
    eye = torch.eye(shape[-2], dtype=torch.float64)
    torch.testing.assert_close(gone, eye * damping[..., None, None] ** -exponent)


@pytest.mark.parametrize('relative', [1e-2, 1e-5])
@pytest.mark.parametrize('exponent', [1.0, 0.5])
def test_powers_of_columns_in_float32(exponent: float, relative: float) -> None:
    """The error beside the largest value of the operator is rounding over the damping."""
    columns = normal(60, 20) * torch.logspace(0, -3, 20).double()
    top = torch.linalg.matrix_norm(columns, 2) ** 2
    exact = dense_power(columns @ columns.mT, relative * top, exponent)
    ours = laid_out(columns.float(), (relative * top).float(), exponent).double()
    error = torch.linalg.matrix_norm(ours - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    assert error < 2**-23 / relative + 2e-6


@pytest.mark.parametrize('exponent', [1.0, 0.5])
def test_bad_columns_say_so(exponent: float) -> None:
    columns = normal(3, 6, 2)
    columns[1, 2, 0] = float('nan')
    _, _, good = power_of_columns(columns, torch.ones(3).double(), exponent)
    assert good.tolist() == [True, False, True]


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    return basis @ values.diag() @ basis.t()


@pytest.mark.parametrize('m', [3, 5, 12])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_low_rank_is_recovered(m: int, dtype: torch.dtype, tolerance: float) -> None:
    values = torch.tensor([5.0, 2.0, 1.0] + 9 * [0.0]).double()
    matrices = torch.stack([spectrum(values), 1e-6 * spectrum(values, 1), torch.zeros(12, 12)])
    test = normal(12, m, seed=5)
    found = nystrom_columns((matrices @ test).to(dtype), test.to(dtype)).double()
    sizes = torch.linalg.matrix_norm(matrices)
    errors = torch.linalg.matrix_norm(found @ found.mT - matrices)
    assert bool((errors <= tolerance * sizes).all()) and found.shape == (3, 12, m)


@pytest.mark.parametrize('decay', [0.5, 0.8])
def test_the_bound_of_the_low_rank_error_in_the_mean(decay: float) -> None:
    n, m = 24, 8
    values = decay ** torch.arange(n).double()
    matrix = spectrum(values)
    tests = normal(200, n, m, seed=3)
    found = nystrom_columns(matrix @ tests, tests)
    rest = matrix - found @ found.mT
    assert float(torch.linalg.eigvalsh(rest)[:, 0].min()) > -1e-10  # never more than the matrix
    mean = float(rest.diagonal(dim1=-2, dim2=-1).sum(-1).mean())
    bound = min((1 + k / (m - k - 1)) * float(values[k:].sum()) for k in range(m - 1))
    assert float(values[m:].sum()) <= mean <= bound


def test_a_bad_sketch_is_nan_alone() -> None:
    test, sketch = normal(6, 2), spectrum(torch.ones(6).double()) @ normal(6, 2)
    found = nystrom_columns(torch.stack([sketch, sketch * float('nan')]), test)
    assert found[0].isfinite().all() and found[1].isnan().all()
