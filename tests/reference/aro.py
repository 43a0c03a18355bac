"""ARO on one matrix at a time, in float64: loops over rows, columns and reflections."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.rules import ReferenceAdamW


def unit(vector: Tensor) -> Tensor:
    norm = sum(float(x) ** 2 for x in vector) ** 0.5
    return vector / norm if norm else vector


def rows_to(matrix: Tensor, length: float) -> Tensor:
    return torch.stack([length * unit(row) for row in matrix])


def sinkhorn(matrix: Tensor) -> Tensor:
    m, n = matrix.shape
    for _ in range(5):
        matrix = rows_to(matrix, n**0.5)
        matrix = rows_to(matrix.T, m**0.5).T
    return matrix


NORMS = {
    'sinkhorn': sinkhorn,
    'row_norm': lambda x: rows_to(x, x.shape[1] ** 0.5),
    'sign': lambda x: (x > 0).double() - (x < 0).double(),
}


def without_noise(matrix: Tensor) -> Tensor:
    """Rows that are zero but for rounding are zero."""
    return torch.stack([row if row.norm() > 1e-11 * matrix.norm() else 0 * row for row in matrix])


def reflections(columns: Tensor, positive: bool = True) -> Tensor:
    """Q of the full QR of (m, r) columns by Householder's reflections, r <= m.

    Where not `positive`, signs are those of the reflections: a complement depends on them.
    """
    m, r = columns.shape
    total, rest = torch.eye(m).double(), columns.clone()
    for j in range(r):
        x = rest[j:, j].clone()
        x[0] += (1 if x[0] >= 0 else -1) * x.norm()
        mirror = torch.eye(m).double()
        if x.norm() > 0:
            mirror[j:, j:] -= 2 * torch.outer(x, x) / (x @ x)
        total, rest = total @ mirror, mirror @ rest
    for j in range(r):
        if positive and rest[j, j] < 0:
            total[:, j] *= -1
    return total


def q_factor(m: Tensor, x: Tensor) -> Tensor:
    """Q of M X'; rows of X that are zero, and columns beyond the rank, get what is left."""
    count, rank = len(m), min(m.shape)
    frame = reflections(m, False) if count > rank else torch.eye(count).double()
    live = [j for j in range(count) if x[j].any()]
    order = [*live, *(j for j in range(count) if j not in live)]
    inner = frame[:, :rank].T @ m @ x[order[:rank]].T
    found = torch.cat([frame[:, :rank] @ reflections(inner), frame[:, rank:]], 1)
    q = torch.zeros(count, count).double()
    for place, j in enumerate(order):
        q[:, j] = found[:, place]
    return q


class ReferenceARO(ReferenceAdamW):
    """Matrices by ARO, all else by AdamW."""

    def __init__(
        self, momentum: float, betas: tuple[float, float], eps: float, norm: str, side: str
    ) -> None:
        super().__init__(betas, eps)
        self.momentum, self.norm, self.side = momentum, NORMS[norm], side
        self.rotations: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, parameter: Tensor, direction: Tensor, lr: float, weight_decay: float) -> None:
        if parameter.dim() < 2:
            super().step(parameter, direction, lr, weight_decay)
            return
        seen = self.history.setdefault(parameter, [])
        seen.append(direction.double().clone())
        ages = reversed(range(len(seen)))
        total = sum(
            (1 - self.momentum) * self.momentum**age * g for age, g in zip(ages, seen, strict=True)
        )
        move = self.matrix(parameter, total.reshape(len(total), -1))
        parameter.copy_((1 - lr * weight_decay) * parameter - lr * move.reshape(parameter.shape))

    def matrix(self, key: Tensor, total: Tensor) -> Tensor:
        right = self.side == 'right' or (self.side == 'smaller' and total.shape[1] < len(total))
        m = total.T if right else total
        old = self.rotations.get(key, torch.eye(len(m)).double())
        if not m.any():
            return 0 * total
        new = self.rotations[key] = q_factor(m, self.norm(without_noise(old.T @ m)))
        u = new @ self.norm(without_noise(new.T @ m))
        u = 0.2 * u / (u**2).mean().sqrt()
        return u.T if right else u
