"""Eigenbases of second moments, and the order and signs of consecutive bases."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigen import checked_eigh
from .matrices import identity_like
from .products import stacked_product


def eigenbasis(matrix: Tensor, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvectors of symmetric positive semi-definite matrices, as columns.

    Args:
        matrix: (..., n, n).
        shift: Added to the diagonal, relative to the largest entry; it changes no eigenvector.

    Returns:
        Orthogonal matrices (..., n, n) with columns by decreasing eigenvalue, and a bool tensor
        (...) that is False where the matrix or the result is not finite.
    """
    identity = identity_like(matrix)
    scale = matrix.abs().amax((-2, -1), keepdim=True)
    scaled = matrix / torch.where(scale > 0, scale, 1) + shift * identity
    _, vectors, succeeded = checked_eigh(scaled)
    return vectors.flip(-1), succeeded


def orthogonal_iteration(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step towards the eigenvectors: the Q factor of A U, with its columns in U's order.

    Args:
        matrix: A (..., n, n), symmetric positive semi-definite.
        basis: U (..., n, n), the last basis.

    Returns:
        Orthogonal matrices (..., n, n) whose columns have the old ones' signs, and a bool tensor
        (...) that is False where the result is not finite.
    """
    # The largest entry of a semi-definite matrix is on its diagonal.
    scale = matrix.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    # A small multiple of U keeps columns in the null space.
    shift = 1e3 * torch.finfo(matrix.dtype).eps * torch.where(scale > 0, scale, 1)
    image = stacked_product(matrix, basis).addcmul_(shift, basis)
    # In decreasing order; other orders are fixed points too, but unstable.
    order = (basis * image).sum(-2).argsort(-1, descending=True)
    # The steps of torch.linalg.qr without a copy of R.
    reflectors, scales = torch.geqrf(image.gather(-1, _repeat_for_rows(order, image)))
    factor = torch.linalg.householder_product(reflectors, scales)
    signs = reflectors.diagonal(dim1=-2, dim2=-1).sign()
    places = order.argsort(-1)
    result = factor.gather(-1, _repeat_for_rows(places, factor))
    result *= torch.where(signs == 0, 1, signs).gather(-1, places)[..., None, :]
    return result, result.sum((-2, -1)).isfinite()  # entries of Q are at most 1


def _repeat_for_rows(columns: Tensor, like: Tensor) -> Tensor:
    """Indices of columns (..., n), repeated for each row of matrices (..., n, n)."""
    return columns[..., None, :].expand_as(like)


def assign_columns(basis: Tensor, old: Tensor) -> Tensor:
    """Gives the columns of a basis the order and signs of an old basis.

    Each round matches the pairs of remaining columns whose overlap |u_old' u| is mutually largest.

    Args:
        basis: (..., n, n), orthogonal.
        old: (..., n, n), orthogonal.

    Returns:
        The columns of `basis`, each with the position and sign of its match.
    """
    overlap = old.mT @ basis
    shape, size = overlap.shape, overlap.shape[-1]
    left = overlap.abs().reshape(-1, size, size).nan_to_num()
    partner = torch.full(left.shape[:2], -1, device=left.device)
    rows = torch.arange(size, device=left.device).expand_as(partner)
    while bool((partner < 0).any()):  # each round matches the largest overlap that is left
        best = left.argmax(2)
        mutual = (left.argmax(1).gather(1, best) == rows) & (partner < 0)
        partner = torch.where(mutual, best, partner)
        taken = torch.zeros_like(left, dtype=torch.bool).scatter_(
            2, best[..., None], mutual[..., None]
        )
        left = left.masked_fill(taken.any(1, keepdim=True) | mutual[..., None], -1)
    order = partner.reshape(shape[:-1])[..., None, :]
    signs = torch.take_along_dim(overlap, order.mT, -1).mT.sign()
    return torch.take_along_dim(basis, order.expand_as(basis), -1) * torch.where(
        signs == 0, 1, signs
    )
