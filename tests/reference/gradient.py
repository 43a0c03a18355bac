"""SOAP and Shampoo, slow and obvious, on tensors of any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unfold(gradient: Tensor, dim: int) -> Tensor:
    """The gradient as a matrix with one of its dimensions as rows."""
    return gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1)


def turn(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The tensor with each dimension multiplied by a matrix's transpose."""
    for dim, matrix in enumerate(matrices):
        tensor = torch.tensordot(tensor, matrix, dims=([dim], [0])).movedim(-1, dim)
    return tensor


class ReferenceSOAP:
    """SOAP (arXiv 2409.11321, Algorithm 3, with the first step of its code) on one tensor."""

    def __init__(
        self,
        p: Tensor,
        lr: float,
        betas: tuple[float, float],
        decay: float = 0.0,
        shampoo_beta: float = 0.95,
        frequency: int = 10,
        eps: float = 1e-8,
    ) -> None:
        self.p, self.lr, self.betas, self.decay = p, lr, betas, decay
        self.beta, self.frequency, self.eps = shampoo_beta, frequency, eps
        self.moments = [torch.zeros(n, n, dtype=p.dtype) for n in p.shape]
        self.bases: list[Tensor] = []
        self.momentum, self.square = torch.zeros_like(p), torch.zeros_like(p)
        self.steps = 0

    def step(self, gradient: Tensor) -> None:
        if self.bases:
            self.steps += 1
            turned = turn(gradient, self.bases)
            self.momentum = self.betas[0] * self.momentum + (1 - self.betas[0]) * gradient
            self.square = self.betas[1] * self.square + (1 - self.betas[1]) * turned**2
            mean = turn(self.momentum, self.bases) / (1 - self.betas[0] ** self.steps)
            root = (self.square / (1 - self.betas[1] ** self.steps)).sqrt() + self.eps
            self.p *= 1 - self.lr * self.decay
            self.p -= self.lr * turn(mean / root, [basis.mT for basis in self.bases])
        for dim, moment in enumerate(self.moments):
            rows = unfold(gradient, dim)
            moment += (1 - self.beta) * (rows @ rows.mT - moment)
        if not self.bases:
            self.bases = [torch.linalg.eigh(moment)[1].flip(1) for moment in self.moments]
        elif self.steps % self.frequency == 0:
            for dim, moment in enumerate(self.moments):
                image = moment @ self.bases[dim]
                order = (self.bases[dim] * image).sum(0).argsort(descending=True)
                self.square = self.square.index_select(dim, order)
                self.bases[dim] = torch.linalg.qr(image[:, order])[0]


class ReferenceShampoo:
    """Shampoo for a matrix (arXiv 1802.09568, Algorithm 1)."""

    def __init__(self, p: Tensor, lr: float, eps: float) -> None:
        self.p, self.lr = p, lr
        self.left = eps * torch.eye(p.shape[0], dtype=p.dtype)
        self.right = eps * torch.eye(p.shape[1], dtype=p.dtype)

    @staticmethod
    def fourth_root(moment: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment)
        return vectors @ (values**-0.25).diag() @ vectors.mT

    def step(self, gradient: Tensor) -> None:
        self.left += gradient @ gradient.mT
        self.right += gradient.mT @ gradient
        roots = self.fourth_root(self.left), self.fourth_root(self.right)
        self.p -= self.lr * roots[0] @ gradient @ roots[1]
