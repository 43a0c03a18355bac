"""Rotations: a rule that works in a Kronecker eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number
from ..curvature import RunningAverage
from ..linalg import assign_columns, eigenbasis, orthogonal_iteration
from .base import Preconditioner
from .sides import Stacked, side_name, two_sided

BASIS_SOLVERS = ('eigh', 'qr')


@dataclass(frozen=True, kw_only=True)
class EigenRotation(Preconditioner):
    """AdamR: Adam on ``U1' G U2``, its direction D turned back to ``U1 D U2'``.

    U1 and U2 are eigenvectors of L (o x o) and R (i x i), the plain means of all captures of the
    gradient and input second moments. Until the first basis the rule is on its own.

    Source: thesis chapter 4, Algorithm 6, (4.25). Ours: a new basis takes the order and signs of
    the old one, so that the second moment stays where it is; `rotate_moments`; 'qr' (as SOAP).

    State: 2 (o^2 + i^2) numbers a block. A refresh costs about 9 n^3 FLOPs a factor ('qr': 4 n^3),
    a step 4 o i (o + i).

    Attributes:
        basis_eps: Added to the diagonal for the decomposition, relative to the largest entry; it
            changes no eigenvector.
        basis_solver: 'eigh', or 'qr': after the first basis one step of orthogonal iteration.
        rotate_moments: Whether both moments follow into each new basis. The thesis leaves them as
            they are.
    """

    stat_interval: int = 100
    refresh_interval: int = 1000
    basis_eps: float = 0.01
    basis_solver: str = 'eigh'
    rotate_moments: bool = True

    requires: ClassVar[tuple[str, ...]] = ('input_moment', 'gradient_moment')
    rules: ClassVar[tuple[str, ...]] = ('AdamW', 'Adan')
    phase: ClassVar[int] = 1
    eager: ClassVar[bool] = False
    rotates: ClassVar[bool] = True
    restores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('basis_eps', self.basis_eps)
        check_choice('basis_solver', self.basis_solver, BASIS_SOLVERS)
        check_flag('rotate_moments', self.rotate_moments)

    def is_exact(self, refreshes: int) -> bool:
        """All refreshes with eigh, else the first."""
        return self.basis_solver == 'eigh' or refreshes == 0

    def average(self) -> RunningAverage:
        """The plain mean of all captures (4.25)."""
        return RunningAverage(decay=None)

    def refresh(self, statistics: Stacked, previous: Stacked | None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """Bases of the moments; `damping` means nothing here (see the base class)."""
        operator: Stacked = {}
        fine = []
        for measured, statistic in statistics.items():
            name = side_name(measured)
            if previous is None:
                operator[name], good = eigenbasis(statistic, self.basis_eps)
            else:
                operator[name], good = orthogonal_iteration(statistic, previous[name])
            fine.append(good)
        return operator, torch.stack(fine).all(0).all(-1)

    def align(self, operator: Stacked, previous: Stacked | None) -> Stacked:
        """Orders and signs the bases by the previous ones, the first by the identity."""
        return {name: assign_columns(basis, _previous_basis(previous, name, basis))
                for name, basis in operator.items()}

    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """``U1' G U2``; a side without a basis is left alone."""
        return two_sided({**operator, **_turned(operator, 'gradient_moment')}, gradients)

    def restore(self, operator: Stacked, directions: Tensor) -> Tensor:
        """``U1 D U2'``."""
        return two_sided({**operator, **_turned(operator, 'input_moment')}, directions)


def _turned(operator: Stacked, name: str) -> Stacked:
    return {name: operator[name].mT} if name in operator else {}


def _previous_basis(previous: Stacked | None, name: str, like: Tensor) -> Tensor:
    """The old bases by name; the identity where a layer had none."""
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)
    if previous is None:
        return identity
    missing = (previous[name] == 0).flatten(-2).all(-1)[..., None, None]
    return torch.where(missing, identity, previous[name])
