"""DCTAdamW on one matrix at a time, in float64: sums over columns of cosines."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.rules import ReferenceAdamW


def cosines(size: int) -> Tensor:
    """The basis entry by entry."""
    basis = torch.tensor(
        [
            [math.cos(math.pi * i * (2 * j + 1) / (2 * size)) for j in range(size)]
            for i in range(size)
        ],
        dtype=torch.float64,
    )
    basis[0] /= 2**0.5
    return (2 / size) ** 0.5 * basis


class ReferenceDCT(ReferenceAdamW):
    """Matrices in a subspace of cosines, all else by AdamW.

    The moments of all columns of the basis are kept, those of columns that are not chosen at zero;
    without `rotate` those of the first, second, ... chosen column.
    """

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        rank: int,
        interval: int,
        rotate: bool,
        feedback: bool,
        norm: str,
    ) -> None:
        super().__init__(betas, eps)
        self.rank, self.interval, self.rotate = rank, interval, rotate
        self.feedback, self.power = feedback, int(norm[1])
        self.kept: dict[Tensor, dict] = {}

    @torch.no_grad()
    def step(self, parameter: Tensor, direction: Tensor, lr: float, weight_decay: float) -> None:
        if parameter.dim() < 2:
            super().step(parameter, direction, lr, weight_decay)
            return
        a = direction.double().reshape(len(direction), -1)
        wide = a.shape[0] < a.shape[1]
        move = self.tall(parameter, a.T if wide else a)
        move = (move.T if wide else move).reshape(parameter.shape)
        parameter.copy_((1 - lr * weight_decay) * parameter - lr * move)

    def tall(self, key: Tensor, a: Tensor) -> Tensor:
        size = a.shape[1]
        basis, rank = cosines(size), min(self.rank, size)
        kept = self.kept.setdefault(key, dict(t=0, error=0 * a, places=[], moments={}))
        a = a + kept['error']
        if kept['t'] % self.interval == 0:
            lengths = [float(((a @ q).abs() ** self.power).sum()) for q in basis.T]
            chosen = sorted(range(size), key=lambda j: -lengths[j])[:rank]
            kept['columns'] = sorted(chosen)
        kept['t'] += 1
        b1, b2 = self.betas
        old, move, seen = kept['moments'], 0 * a, 0 * a
        kept['moments'] = {}
        for place, j in enumerate(kept['columns']):
            name = j if self.rotate else place
            q = basis[:, j]
            m, v = old.get(name, (0 * a[:, 0], 0 * a[:, 0]))
            m, v = b1 * m + (1 - b1) * (a @ q), b2 * v + (1 - b2) * (a @ q) ** 2
            kept['moments'][name] = m, v
            u = (m / (1 - b1 ** kept['t'])) / ((v / (1 - b2 ** kept['t'])).sqrt() + self.eps)
            move += torch.outer(u, q)
            seen += torch.outer(a @ q, q)
        if self.feedback:
            kept['error'] = a - seen
        return move
