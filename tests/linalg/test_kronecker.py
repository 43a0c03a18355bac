"""Kronecker operators against the matrices that they stand for, laid out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmprecond.linalg import Kronecker, KroneckerBasis, RankSearch, join, kronecker_power


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(k: int, b: int, c: int, p: int, seed: int = 0, fall: float = 0.0) -> list[Tensor]:
    """C and K of patches, which have one trace; the channels' eigenvalues fall."""
    patches = draw(k, b, c, p, 3 * c * p, seed=seed)
    patches *= torch.arange(1, c + 1, dtype=torch.float64)[:, None, None] ** -fall
    return [
        torch.einsum('kbcpr,kbdpr->kbcd', patches, patches),
        torch.einsum('kbcpr,kbcqr->kbpq', patches, patches),
    ]


def laid_out(channels: Tensor, positions: Tensor) -> Tensor:
    """C (x) K / tr as (k, b, c p, c p)."""
    trace = channels.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    product = torch.einsum('kbcd,kbpq->kbcpdq', channels, positions)
    return product.flatten(4, 5).flatten(2, 3) / trace


def exact_power(matrix: Tensor, damping: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values + damping[..., None])[..., None, :] ** -exponent) @ vectors.mT


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1.0, 0.5, 2.0]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_all_directions_are_exact(
    k: int, b: int, c: int, p: int, exponent: float, joint: bool, seed: int
) -> None:
    channels, positions = moments(k, b, c, p, seed)
    damping = 0.1 + torch.rand(k, b, generator=torch.Generator().manual_seed(seed)).double()
    *parts, succeeded = kronecker_power(channels, positions, damping, exponent)
    ones = 0.5 + draw(k, b, 1, int(joint), seed=seed).abs()
    operator = Kronecker(*parts, ones)
    assert bool(succeeded.all())
    matrices = draw(k, b, 3, c * p + joint, seed=seed + 1)
    wanted = matrices.clone()
    wanted[..., : c * p] @= exact_power(laid_out(channels, positions), damping, exponent)
    wanted[..., c * p :] *= ones
    torch.testing.assert_close(operator.right(matrices), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(operator.left(matrices.mT), wanted.mT, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('exponent', [1.0, 0.5])
@pytest.mark.parametrize('tolerance', [0.3, 0.1, 0.01])
def test_no_direction_is_wrong_by_more_than_the_tolerance(
    exponent: float, tolerance: float
) -> None:
    channels, positions = moments(2, 1, 24, 4, fall=2.0)
    matrix = laid_out(channels, positions)
    damping = 0.02 * torch.linalg.eigvalsh(matrix)[..., -1]
    *parts, _ = kronecker_power(channels, positions, damping, exponent, RankSearch(tolerance))
    assert 1 <= parts[0].shape[-1] <= 12  # fewer than half of the channels
    operator = Kronecker(*parts, parts[0].new_empty(2, 1, 1, 0))
    found = operator.right(torch.eye(96, dtype=torch.float64).expand(2, 1, 96, 96))
    root = exact_power(matrix, damping, -exponent / 2)
    errors = torch.linalg.eigvalsh(root @ found @ root) - 1
    assert float(errors.abs().max()) <= tolerance * (1 + 1e-9)


def test_flat_spectra_keep_all_channels() -> None:
    channels, positions = moments(1, 1, 8, 4)
    damping = torch.full((1, 1), 1e-6, dtype=torch.float64)
    vectors, *_ = kronecker_power(channels, positions, damping, 1.0, RankSearch(0.1))
    assert vectors.shape[-1] == 8


def test_layers_of_different_ranks_are_stacked() -> None:
    rows = []
    for seed, fall in ((0, 3.0), (1, 0.0)):
        channels, positions = moments(1, 1, 16, 3, seed, fall)
        damping = 0.01 * channels.diagonal(dim1=-2, dim2=-1).sum(-1)
        *parts, _ = kronecker_power(channels, positions, damping, 1.0, RankSearch(0.1))
        rows.append(Kronecker(*parts, draw(1, 1, 1, 1, seed=seed)))
    assert rows[0].channels.shape[-1] < rows[1].channels.shape[-1]
    joined = join([{'input': row} for row in rows])['input']
    matrices = draw(2, 1, 5, 49)
    wanted = torch.cat([row.right(matrices[k : k + 1]) for k, row in enumerate(rows)])
    torch.testing.assert_close(joined.right(matrices), wanted)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('which', [0, 1])
def test_bad_factors_are_reported_where_they_are(bad: float, which: int) -> None:
    factors = moments(3, 1, 4, 3)
    factors[which][1, 0, 0, 0] = bad
    damping = torch.ones(3, 1, dtype=torch.float64)
    *_, succeeded = kronecker_power(*factors, damping, 1.0)
    assert succeeded.flatten().tolist() == [True, False, True]


def test_a_dead_layer_is_damped_alone() -> None:
    zeros = [torch.zeros(1, 1, n, n, dtype=torch.float64) for n in (4, 3)]
    damping = torch.full((1, 1), 0.5, dtype=torch.float64)
    *parts, succeeded = kronecker_power(*zeros, damping, 1.0)
    operator = Kronecker(*parts, parts[0].new_empty(1, 1, 1, 0))
    matrices = draw(1, 1, 2, 12)
    assert bool(succeeded.all())
    torch.testing.assert_close(operator.right(matrices), matrices / 0.5)


@pytest.mark.parametrize('joint', [0, 1])
def test_a_basis_rotates_weights_and_leaves_the_bias(joint: int) -> None:
    channels = torch.linalg.qr(draw(2, 1, 4, 4))[0]
    positions = torch.linalg.qr(draw(2, 1, 3, 3, seed=1))[0]
    operator = KroneckerBasis(channels, positions)
    matrices = draw(2, 1, 5, 12 + joint)
    for k in range(2):
        product = torch.kron(channels[k, 0], positions[k, 0])
        whole = torch.block_diag(product, torch.eye(joint).double())
        torch.testing.assert_close(operator.right(matrices)[k, 0], matrices[k, 0] @ whole)
        left = operator.left(matrices.mT)[k, 0]
        torch.testing.assert_close(left, whole @ matrices[k, 0].T)


def test_a_share_of_the_channels_stands_for_all() -> None:
    """For each direction of the positions, the mean replaces eigenvalues that are left out."""
    channels, positions = moments(2, 1, 16, 3)
    damping = torch.full((2, 1), 1e-3, dtype=torch.float64)
    *parts, succeeded = kronecker_power(
        channels, positions, damping, 1.0, RankSearch(rank_share=0.25)
    )
    assert bool(succeeded.all()) and parts[0].shape[-1] == 4
    found = Kronecker(*parts, parts[0].new_empty(2, 1, 1, 0)).right(
        torch.eye(48, dtype=torch.float64).expand(2, 1, 48, 48)
    )
    for k in range(2):
        values, vectors = torch.linalg.eigh(channels[k, 0])
        values[:12] = values[:12].mean()
        flattened = (vectors * values) @ vectors.T
        wanted = torch.kron(flattened, positions[k, 0]) / channels[k, 0].trace()
        wanted.diagonal().add_(1e-3)
        torch.testing.assert_close(found[k, 0], torch.linalg.inv(wanted))
