"""Eigenvalues and spectral density of a loss's curvature, plain or preconditioned, by Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count

#: Function that maps a vector (n,) to a vector (n,).
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """Ritz values of several Lanczos runs, with their weights in the spectral density.

    Attributes:
        values: Ritz values (runs, steps), ascending in each run.
        weights: Weights (runs, steps); each run's sum to 1.
        vectors: Ritz vectors (m, n) of the values largest in absolute size, of the first run; m is
            2, or 1 if the run had one step.
    """

    values: Tensor
    weights: Tensor
    vectors: Tensor

    @property
    def largest(self) -> float:
        """Largest eigenvalue found."""
        return float(self.values.max())

    @property
    def smallest(self) -> float:
        """Smallest (most negative) eigenvalue found."""
        return float(self.values.min())

    @property
    def mean(self) -> float:
        """Mean eigenvalue, the trace divided by n, as the runs' mean of ``v' A v``."""
        return float((self.values * self.weights).sum(1).mean())

    def density(self, points: Tensor, width: float) -> Tensor:
        """Density (points,) of the eigenvalues: Gaussians of a width at the Ritz values.

        Args:
            points: Values at which the density is taken.
            width: Standard deviation of a Gaussian.
        """
        distances = (points - self.values.flatten()[:, None]) / width
        bumps = torch.exp(-(distances**2) / 2) / (width * (2 * torch.pi) ** 0.5)
        return self.weights.flatten() @ bumps / len(self.values)


def lanczos(
    product: Product, start: Tensor, steps: int, precondition: Product | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs Lanczos with full reorthogonalisation.

    Without `precondition` it tridiagonalises a symmetric A. With a symmetric positive definite P it
    does so for ``P^1/2 A P^1/2``, whose eigenvalues are those of ``P A``, from products with A and
    P alone: vectors v stand for ``P^-1/2`` of the basis, ``P v`` for ``P^1/2`` of it.

    Args:
        product: Product of A and a vector (n,).
        start: Start vector (n,). With P it is ``P^-1/2`` of the start.
        steps: Largest number of steps.
        precondition: Product of P and a vector (n,).

    Returns:
        Diagonal (m,), off-diagonal (m - 1,) and ``P v`` of the basis (m, n), for m steps. It ends
        early where the start lies in a small invariant subspace.
    """
    check_count('steps', steps)
    apply = precondition or (lambda vector: vector)
    steps = min(steps, len(start))
    images = start.new_empty(steps, len(start))
    vectors = torch.empty_like(images) if precondition else images
    diagonal: list[Tensor] = []
    lengths: list[Tensor] = []
    residual, image = start, apply(start)
    length = (residual @ image).sqrt()
    scale = 0.0
    for step in range(steps):
        vectors[step], images[step] = residual / length, image / length
        residual = product(images[step])
        diagonal.append(residual @ images[step])
        for _ in range(2):  # a second pass removes what rounding leaves
            residual = residual - vectors[: step + 1].T @ (images[: step + 1] @ residual)
        image = apply(residual)
        length = (residual @ image).clamp(min=0).sqrt()
        scale = max(scale, float(diagonal[-1].abs()), float(length))
        if step + 1 == steps or length <= scale * _tiny(start.dtype):
            break
        lengths.append(length)
    off = torch.stack(lengths) if lengths else start.new_zeros(0)
    return torch.stack(diagonal), off, images[: len(diagonal)]


def _ritz(diagonal: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m,), ascending, and eigenvectors (m, m) of a tridiagonal matrix."""
    values, vectors = torch.linalg.eigh(diagonal.diag() + off.diag(1) + off.diag(-1))
    return values, vectors


def inverse_root(product: Product, vector: Tensor, steps: int) -> Tensor:
    """Product (n,) of ``P^-1/2`` and a vector (n,) by Lanczos, for a symmetric positive definite P.

    Source: Higham, Functions of Matrices (2008), section 13.2.
    """
    diagonal, off, basis = lanczos(product, vector, steps)
    values, vectors = _ritz(diagonal, off)
    floor = values[-1] * _tiny(vector.dtype)
    return vector.norm() * (basis.T @ (vectors @ (vectors[0] / values.clamp(min=floor).sqrt())))


def _tiny(dtype: torch.dtype) -> float:
    return 10 * torch.finfo(dtype).eps


def find_spectrum(
    product: Product,
    like: Tensor,
    steps: int = 40,
    runs: int = 4,
    seed: int = 0,
    precondition: Product | None = None,
) -> Spectrum:
    """Estimates a spectrum by stochastic Lanczos quadrature (Golub and Meurant; Papyan, 2020).

    Args:
        product: Product of a symmetric matrix A and a vector (n,).
        like: Tensor (n,) with the dtype and device of the vectors.
        steps: Lanczos steps of a run. Each takes a product and keeps a vector (n,), or two with P.
        runs: Runs with random start vectors.
        seed: Seed of the start vectors.
        precondition: Product of a symmetric positive definite P and a vector (n,): the spectrum is
            then that of P A. Start vectors take ``P^-1/2``, by as many Lanczos steps on P.

    Returns:
        The spectrum. Its extreme values converge first.
    """
    check_count('runs', runs)
    generator = torch.Generator(like.device).manual_seed(seed)
    values, weights, leading = [], [], None
    for _ in range(runs):
        start = torch.randn(len(like), generator=generator, dtype=like.dtype, device=like.device)
        if precondition:
            start = inverse_root(precondition, start, steps)
        diagonal, off, images = lanczos(product, start, steps, precondition)
        ritz, vectors = _ritz(diagonal, off)
        if leading is None:
            leading = vectors[:, ritz.abs().topk(min(2, len(ritz))).indices].T @ images
        missing = min(steps, len(like)) - len(ritz)
        # A run that ended early has found all that its start contains.
        values.append(torch.cat([ritz, ritz[-1:].expand(missing)]))
        weights.append(torch.cat([vectors[0] ** 2, ritz.new_zeros(missing)]))
    assert leading is not None
    return Spectrum(torch.stack(values), torch.stack(weights), leading)
