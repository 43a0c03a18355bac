"""Rotations: a rule that works in a Kronecker eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number
from ..curvature import (
    GRADIENT,
    INPUT,
    Layer,
    Moment,
    RunningAverage,
    Side,
    Statistic,
)
from ..linalg import (
    Operators,
    assign_columns,
    eigenbasis,
    identity_like,
    orthogonal_iteration,
)
from .base import WHOLE_LAYERS, Factors
from .inverse import PatchPreconditioner
from .registry import register_preconditioner
from .two_sided import two_sided

BASIS_SOLVERS = ('eigh', 'qr')


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class EigenRotation(PatchPreconditioner):
    """AdamR: Adam on ``U1' G U2``, with the update D rotated back to ``U1 D U2'``.

    U1 and U2 are eigenvectors of L (o x o) and R (i x i). L and R are the plain means of all
    captures of the gradient and input second moments. Before the first basis the rule takes the
    gradients themselves.

    Source: thesis chapter 4, Algorithm 6, (4.25). This project adds `rotate_moments`, `align_bases`
    and 'qr' (from SOAP).

    State: 2 (o^2 + i^2) numbers per block. A refresh costs about 9 n^3 FLOPs per factor ('qr':
    4 n^3). A step costs 4 o i (o + i) FLOPs.

    Attributes:
        basis_eps: Added to the diagonal for the decomposition, relative to the largest entry. It
            changes no eigenvector.
        basis_solver: 'eigh'; or 'qr' for one step of orthogonal iteration at each refresh after
            the first.
        rotate_moments: Whether to rotate both moments into each new basis. The thesis leaves them
            as they are.
        align_bases: Whether a new basis takes the order and signs of the old one, so that the
            entries of the second moment keep their positions. Without it, columns of 'eigh' are in
            decreasing order of their eigenvalues, with the solver's signs.
    """

    stat_interval: int = 100
    refresh_interval: int = 1000
    count_from: int = 1
    basis_eps: float = 0.01
    basis_solver: str = 'eigh'
    rotate_moments: bool = True
    align_bases: bool = True

    statistics: ClassVar[tuple[Statistic, ...]] = (
        Statistic(INPUT, Moment()),
        Statistic(GRADIENT, Moment()),
    )
    rotates: ClassVar[bool] = True
    acts_after_rule: ClassVar[bool] = True

    word: ClassVar[str] = 'AdamR'
    #: Thesis chapter 4, where moments stay as they are.
    published: ClassVar[dict[str, Any]] = {
        **WHOLE_LAYERS,
        **dict(
            stat_interval=100,
            refresh_interval=1000,
            count_from=1,
            basis_eps=0.01,
            basis_solver='eigh',
            rotate_moments=False,
            align_bases=False,
            input_factor='patch',
            source='activation',
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('basis_eps', self.basis_eps)
        check_choice('basis_solver', self.basis_solver, BASIS_SOLVERS)
        check_flag('rotate_moments', self.rotate_moments)
        check_flag('align_bases', self.align_bases)

    @property
    def moves_moments(self) -> bool:
        """True with `rotate_moments`."""
        return self.rotate_moments

    def is_exact(self, refreshes: int) -> bool:
        """True for all refreshes of 'eigh' and the first one of 'qr'."""
        return self.basis_solver == 'eigh' or refreshes == 0

    def average(self) -> RunningAverage:
        """Plain mean of all captures (4.25)."""
        return RunningAverage(decay=None)

    def refresh(
        self, factors: Factors, previous: Operators | None, damping: Tensor | float | None = None
    ) -> tuple[Operators, Tensor]:
        """Computes bases of the moments; `damping` has no effect (see the base class)."""
        operators: Operators = {}
        outcomes = []
        for side, factor in factors.items():
            kind = factor.form.basis
            last = previous[side.name].tensors if previous else [None] * len(kind.suffixes)
            bases = []
            # The basis of a joint bias, a last tensor of its own in forms of patches, is 1.
            for moment, last_basis in zip(factor.tensors, last, strict=False):
                if last_basis is None:
                    basis, succeeded = eigenbasis(moment, self.basis_eps)
                else:
                    basis, succeeded = orthogonal_iteration(moment, last_basis)
                bases.append(basis)
                outcomes.append(succeeded)
            operators[side.name] = kind(*bases)
        return operators, torch.stack(outcomes).all(0).all(-1)

    def align(self, operators: Operators, previous: Operators | None) -> Operators:
        """Gives the bases the order and signs of the previous ones, or first of the identity.

        With ``align_bases=False`` the bases stay as they are.
        """
        if not self.align_bases:
            return operators
        aligned: Operators = {}
        for slot, operator in operators.items():
            last = previous[slot].tensors if previous else [None] * len(operator.tensors)
            pairs = zip(operator.tensors, last, strict=True)
            aligned[slot] = type(operator)(
                *(assign_columns(basis, _reference_basis(old, basis)) for basis, old in pairs)
            )
        return aligned

    def outline(self, layer: Layer) -> Operators:
        """Bases of one layer, on the meta device (see the base class)."""
        outline: Operators = {}
        for statistic in self.selected_statistics(layer):
            kind = statistic.form.basis
            shapes = list(layer.shapes(statistic).values())[: len(kind.suffixes)]
            outline[statistic.side.name] = kind.outline(*shapes)
        return outline

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """``U1' G U2``; a side without a basis is left alone."""
        return two_sided(_transpose_side(operators, GRADIENT), gradients)

    def restore(self, operators: Operators, updates: Tensor) -> Tensor:
        """``U1 D U2'``."""
        return two_sided(_transpose_side(operators, INPUT), updates)


def _transpose_side(operators: Operators, side: Side) -> Operators:
    """Operators with the basis of one side transposed, if there is one."""
    if side.name not in operators:
        return operators
    transposed = operators[side.name].map(lambda basis: basis.mT)
    return {**operators, side.name: transposed}


def _reference_basis(previous: Tensor | None, like: Tensor) -> Tensor:
    """Previous bases, with the identity for layers that had none."""
    identity = identity_like(like).expand_as(like)
    if previous is None:
        return identity
    missing = (previous == 0).flatten(-2).all(-1)[..., None, None]
    return torch.where(missing, identity, previous)
