"""Damped powers of matrices, represented by a few columns instead of n x n entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .eigen import checked_eigh
from .inverse import all_finite
from .matrices import add_to_diagonal, identity_like, trace
from .products import add_product, stacked_product

#: Least number of extra random columns, which find new directions.
MARGIN = 16
#: Numbers of power iterations and of vectors in the estimate of the largest omitted eigenvalue.
CHECKS, PROBES = 5, 4
#: Largest omitted eigenvalue that ends the search, relative to the bound. Eigenvalues close to the
#: bound take many columns to find and change the result little.
SLACK = 1.5


@dataclass(frozen=True)
class RankSearch:
    """Settings of the search for a low-rank form of a dense moment's power.

    Attributes:
        tolerance: Relative error allowed in any direction.
        max_rank: Most columns kept, whatever the tolerance.
        rank_share: The same as a share of the side's length. If both are None, half the side's
            length is allowed, and a dense operator where that is not enough.
    """

    tolerance: float = 0.1
    max_rank: int | None = None
    rank_share: float | None = None

    #: Sides shorter than this stay dense.
    smallest_side: ClassVar[int] = 256
    #: Expected rank as a share of n, for the memory forecast.
    usual_share: ClassVar[float] = 1 / 8

    def takes(self, side: int) -> bool:
        """True if the power of a moment of this size may be low-rank."""
        return side >= self.smallest_side

    def limit(self, side: int) -> int | None:
        """Most columns for a side of this length, or None."""
        limits = [self.max_rank] if self.max_rank is not None else []
        if self.rank_share is not None:
            limits.append(max(1, int(side * self.rank_share)))
        return min(limits, default=None)

    def usual(self, side: int) -> int:
        """Expected rank for a side of this length."""
        limit = self.limit(side)
        return min(int(side * self.usual_share), side if limit is None else limit)


def power_of_columns(
    columns: Tensor, damping: Tensor, exponent: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``(A A' + mu I)^-p`` for tall A, as ``mu^-p (I - U U')``.

    The inverse uses the Cholesky factor C of the small matrix A'A + mu I: U = A C'^-1. Other powers
    use the eigenvalues s of A'A: U U' has the eigenvalues 1 - (mu / (s + mu))^p.

    Source: the Sherman-Morrison-Woodbury identity, as used by SKFAC (Tang et al., CVPR 2021).

    Args:
        columns: A (..., n, m); float32 or float64.
        damping: mu > 0 (...).
        exponent: p > 0.

    Returns:
        U (..., n, m), the scale mu^-p (..., 1, 1), and a bool tensor (...) that is False where the
        result is meaningless.
    """
    gram = columns.mT @ columns
    scale = damping[..., None, None].pow(-exponent)
    valid = (damping > 0) & scale.isfinite()[..., 0, 0]
    if exponent == 1:
        factor, info = torch.linalg.cholesky_ex(add_to_diagonal(gram, damping))
        factor = torch.where((info == 0)[..., None, None], factor, identity_like(gram))
        basis = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
        return basis, scale, valid & (info == 0) & all_finite(basis)
    values, vectors, succeeded = checked_eigh(gram)
    values = values.clamp_min(0)
    floor = torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
    removed = -torch.expm1(-exponent * torch.log1p(values / damping[..., None]))
    weights = torch.where(values > floor, removed / values.clamp_min(floor), 0)
    basis = columns @ (vectors * weights.nan_to_num(posinf=0).sqrt()[..., None, :])
    return basis, scale, valid & succeeded & all_finite(basis)


def apply_columns(matrix: Tensor, basis: Tensor, scale: Tensor) -> Tensor:
    """``scale M (I - U U')`` for M (..., o, n), U (..., n, m), scale (..., 1, 1): (..., o, n)."""
    total = (matrix * scale).contiguous()
    add_product(total, stacked_product(total, basis), basis.mT, sign=-1)
    return total


def nystrom_columns(sketch: Tensor, test: Tensor) -> Tensor:
    """Columns B with B B' close to the symmetric A >= 0 of a sketch ``Y = A Omega``.

    B B' = Y (Omega' Y)^+ Y'. The pseudo-inverse omits eigenvalues that are rounding errors.

    For m columns and any k < m - 1, the expected error in the trace is at most
    1 + k / (m - k - 1) times the sum of the eigenvalues after the k-th.

    Source: the Nystroem approximation as in Tropp, Yurtsever, Udell and Cevher, SIAM J. Matrix
    Anal. Appl. 38(4), 2017.

    Args:
        sketch: Y (..., n, m).
        test: Omega, broadcast to Y.

    Returns:
        B (..., n, m); NaN where it failed.
    """
    core = test.mT @ sketch
    values, vectors, succeeded = checked_eigh((core + core.mT) / 2)
    smallest = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:]
    significant = values > smallest.clamp_min(0)
    weights = torch.where(significant, values, 1).rsqrt() * significant
    columns = sketch @ (vectors * weights[..., None, :])
    return torch.where(succeeded[..., None, None], columns, torch.nan)


def columns_to_matrix(basis: Tensor, scale: Tensor) -> Tensor:
    """Dense matrix ``scale (I - U U')`` (..., n, n)."""
    matrix = -(basis @ basis.mT)
    matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    return scale * matrix


def low_rank_power(
    matrix: Tensor,
    start: Tensor | None,
    damping: Tensor | Callable[[Tensor], Tensor],
    exponent: float = 1.0,
    tolerance: float = 0.1,
    max_rank: int | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(A + mu I)^-p`` from the eigenvectors of A that stand out from the damping mu.

    One value tau replaces all eigenvalues that are not kept. It is their mean, shifted until the
    relative error in every direction is at most the tolerance t. Eigenvalues up to
    ``(((1 + t) / (1 - t))^(1 / p) - 1) mu`` may therefore be omitted. The cosine between the result
    and the exact direction is then at least sqrt(1 - t^2).

    The method is subspace iteration, with one product with A per call. V spans the last result and
    a few random columns. The eigenvectors are those of B B' with ``B = A V (V'A V)^-1/2``
    (Nystroem). V gets more columns until the estimated largest eigenvalue of A - B B' is at most
    `SLACK` times the bound above. If eigenvalues lie in between, the error may be a few t.

    Args:
        matrix: A (..., n, n), symmetric positive semi-definite; float32 or float64.
        start: U (..., n, m) of an earlier result for a similar matrix, or None.
        damping: mu > 0 (...), or a function that returns mu for columns B (..., n, m) with B B'
            close to A.
        exponent: p > 0.
        tolerance: t, less than 1.
        max_rank: Most columns kept, whatever is omitted. None (default) allows n / 2 columns; with
            more a dense matrix is as cheap.

    Returns:
        U (..., n, r), the scale (mu + tau)^-p (..., 1, 1), and a bool tensor (...) that is False
        where the result is meaningless. The power is scale (I - U U'). None if `max_rank` is None
        and n / 2 columns are not enough.
    """
    rank_limit = matrix.shape[-1] // 2 if max_rank is None else max_rank
    bound_ratio = negligible_ratio(exponent, tolerance)
    columns, residual, damping = _dominant_columns(matrix, start, damping, bound_ratio, rank_limit)
    bound = bound_ratio * damping
    if max_rank is None and bool((residual > SLACK * bound).any()):
        return None
    values, vectors, succeeded = checked_eigh(columns.mT @ columns)
    values, vectors = values.flip(-1), vectors.flip(-1)
    counts = (values > bound[..., None]).sum(-1)
    needed_rank = int(counts.amax()) if values.numel() else 0
    if max_rank is None and needed_rank > rank_limit:
        return None
    rank = max(1, min(needed_rank, rank_limit))
    kept_values = torch.where(values > bound[..., None], values, 0)[..., :rank]
    rest = (trace(matrix) - kept_values.sum(-1)).clamp_min(0)
    rest = rest / (matrix.shape[-1] - (kept_values > 0).sum(-1)).clamp_min(1)
    largest = torch.maximum(residual, torch.where(values > bound[..., None], 0, values).amax(-1))
    bound_exceeded = (counts > rank) | (residual > SLACK * bound)
    tail = tail_eigenvalue(rest, largest, damping, exponent, tolerance, bound_exceeded)
    basis, scale = _power_of_eigenvectors(
        columns, kept_values, vectors[..., :rank], damping, tail, exponent
    )
    succeeded = succeeded & (damping > 0) & scale.isfinite()[..., 0, 0] & all_finite(basis)
    return basis, scale, succeeded


def _dominant_columns(
    matrix: Tensor,
    start: Tensor | None,
    damping: Tensor | Callable[[Tensor], Tensor],
    bound_ratio: float,
    rank_limit: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """B with ``A - B B' >= 0`` below `SLACK` bounds, if `rank_limit` columns are enough.

    Returns:
        B (..., n, m), about the largest eigenvalue of A - B B' (...), and the damping (...), of
        which the bound is `bound_ratio` times as much.
    """
    size = matrix.shape[-1]
    if start is None:
        vectors = _range_basis(matrix, size // 16)
    else:
        vectors = _warm_start_columns(start, _oversampling(start.shape[-1], size))
    probes = _random_columns(matrix, PROBES).expand(*matrix.shape[:-1], -1)
    image, probed = _symmetric_product(matrix, torch.cat([vectors.mT, probes.mT], -2).mT).split(
        [vectors.shape[-1], PROBES], -1
    )
    while True:
        columns = _nystrom_of_image(image, vectors.mT @ image)
        amount = damping(columns) if callable(damping) else damping
        residual = _residual_eigenvalue(matrix, columns, probes, probed)
        width = vectors.shape[-1]
        # NaN compares false: a matrix that is not finite is reported, not searched.
        if not bool((residual > SLACK * bound_ratio * amount).any()) or width >= min(
            rank_limit + MARGIN, size
        ):
            return columns, residual, amount
        added = _range_basis(matrix, min(max(MARGIN, width // 2), size - width), columns)
        vectors = torch.cat([vectors, added], -1)
        image = torch.cat([image, _symmetric_product(matrix, added)], -1)


def _symmetric_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """``A V`` for symmetric A, as ``(V' A)'``: faster for narrow V, by up to half on CPU."""
    return stacked_product(columns.mT, matrix).mT


def _oversampling(rank: int, size: int) -> int:
    """Number of random columns in addition to those of an earlier result."""
    return min(max(MARGIN, rank // 8), size - min(rank, size))


def _nystrom_of_image(image: Tensor, core: Tensor) -> Tensor:
    """B with ``B B' = A V (V'A V)^-1 V'A`` for image A V and core V'A V; NaN where it failed."""
    peak = core.diagonal(dim1=-2, dim2=-1).amax(-1)
    shift = core.shape[-1] * torch.where(peak > 0, peak, 1)
    core = (core + core.mT) / 2
    factor = identity_like(core).expand_as(core)
    failed = torch.ones_like(peak, dtype=torch.bool)[..., None, None]
    # A moment summed in float32 has float32's rounding errors, even if it is given in float64.
    for dtype in dict.fromkeys((core.dtype, torch.float32)):
        damped = add_to_diagonal(core, torch.finfo(dtype).eps * shift)
        candidate, info = torch.linalg.cholesky_ex(damped)
        succeeded = ((info == 0) & all_finite(candidate))[..., None, None]
        factor = torch.where(succeeded & failed, candidate, factor)
        failed = failed & ~succeeded
    columns = torch.linalg.solve_triangular(factor, image.mT, upper=False).mT
    return columns.mul_(torch.where(failed, torch.nan, 1))


def _random_columns(like: Tensor, width: int, seed: int = 0) -> Tensor:
    """Random normal columns (n, width) of about unit length for matrices (..., n, m)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(
        like.shape[-2], width, generator=generator, dtype=torch.float32, device='cpu'
    )
    return (drawn / like.shape[-2] ** 0.5).to(like)


def _warm_start_columns(start: Tensor, oversampling: int) -> Tensor:
    """The columns of an earlier result at unit length, and random ones beside them.

    Random columns also replace zero columns, which pad layers of lower rank.
    """
    norms = torch.linalg.vector_norm(start, dim=-2, keepdim=True)
    width = start.shape[-1]
    drawn = _random_columns(start, width + oversampling, seed=width).expand(*start.shape[:-1], -1)
    vectors = torch.cat([start.mT, drawn[..., width:].mT], -2).mT  # columns are contiguous
    vectors[..., :width].div_(torch.where(norms > 0, norms, 1))
    vectors[..., :width].addcmul_(drawn[..., :width], (norms == 0).to(norms))
    return vectors


def _range_basis(matrix: Tensor, width: int, columns: Tensor | None = None) -> Tensor:
    """Random orthonormal columns (..., n, width) in the range of A, or of ``A - B B'``."""
    seed = matrix.shape[-1] if columns is None else columns.shape[-1]  # not the check's numbers
    drawn = _random_columns(matrix, max(width, MARGIN), seed)
    image = _symmetric_product(matrix, drawn.expand(*matrix.shape[:-1], -1))
    if columns is not None:
        image -= columns @ (columns.mT @ drawn)
    return torch.linalg.qr(image)[0]


def _residual_eigenvalue(matrix: Tensor, columns: Tensor, probes: Tensor, probed: Tensor) -> Tensor:
    """Estimate of the largest eigenvalue of ``A - B B'`` (...), from vectors P and A P."""
    tiny = torch.finfo(matrix.dtype).tiny
    vector = probed - columns @ (columns.mT @ probes)
    norms = torch.linalg.vector_norm(vector, dim=-2)
    for _ in range(CHECKS - 1):
        vector = vector / norms.clamp_min(tiny)[..., None, :]
        vector = _symmetric_product(matrix, vector) - columns @ (columns.mT @ vector)
        norms = torch.linalg.vector_norm(vector, dim=-2)
    return norms.amax(-1)


def negligible_ratio(exponent: float, tolerance: float) -> float:
    """Largest e / mu for which one tau replaces all eigenvalues in [0, e] within the tolerance."""
    return ((1 + tolerance) / (1 - tolerance)) ** (1 / exponent) - 1


def tail_eigenvalue(
    rest: Tensor,
    largest: Tensor,
    damping: Tensor,
    exponent: float,
    tolerance: float,
    bound_exceeded: Tensor,
) -> Tensor:
    """Damped value mu + tau (...) that replaces all eigenvalues that are not kept.

    Args:
        rest: Mean of the eigenvalues that are not kept (...).
        largest: Largest eigenvalue that is not kept (...).
        damping: mu (...).
        exponent: p.
        tolerance: t.
        bound_exceeded: Whether eigenvalues above the bound are among them (...): then tau is their
            mean.
    """
    mean = damping + rest
    lowest = (damping + largest) * (1 + tolerance) ** (-1 / exponent)
    highest = damping * (1 - tolerance) ** (-1 / exponent)
    return torch.where(bound_exceeded, mean, torch.minimum(torch.maximum(mean, lowest), highest))


def _power_of_eigenvectors(
    columns: Tensor,
    values: Tensor,
    vectors: Tensor,
    damping: Tensor,
    tail: Tensor,
    exponent: float,
) -> tuple[Tensor, Tensor]:
    """The damped power of B B' from eigenvalues and eigenvectors of B'B; of all else tail^-p."""
    weights = 1 - (tail[..., None] / (values + damping[..., None])).pow(exponent)
    factors = torch.where(values > 0, weights.clamp_min(0) / torch.where(values > 0, values, 1), 0)
    return (
        columns @ (vectors * factors.sqrt()[..., None, :]),
        tail[..., None, None].pow(-exponent),
    )
