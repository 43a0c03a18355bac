"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..checks import check_number
from ..curvature import RunningAverage
from ..linalg import Operators
from .base import WHOLE_LAYERS
from .eigen_rotation import EigenRotation
from .registry import register_preconditioner


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class GradientRotation(EigenRotation):
    """SOAP: Adam on ``U1' G U2``, with the update D rotated back to ``U1 D U2'``.

    U1 and U2 are eigenvectors of running averages of GG' (o x o) and G'G (i x i). The first bases
    are exact; later ones come from one step of orthogonal iteration. A step's gradient counts in
    the averages from the next step on, and the first step of a layer makes no update, because it
    has no basis yet. The momentum is rotated into each new basis, second moments into the first one
    and into those of `early_refreshes`. Later second moments keep their places, as in the source.

    Source: SOAP (Vyas et al., 2024, arXiv 2409.11321, Algorithm 3) and its code. Theirs rotates
    each dimension of a convolution's weight. 'separable' does so for outputs, channels and all
    kernel positions as one dimension; 'patch' merges channels and positions. Biases take the plain
    rule, as there, but from the first step on.

    State: 2 (o^2 + i^2) numbers per block. A capture costs 2 o i (o + i) FLOPs, a refresh about
    4 n^3 FLOPs per factor, a step 4 o i (o + i) FLOPs.

    Attributes:
        stat_decay: Weight of the old average, in [0, 1).
        count_from: Always -1: refreshes come one step later than from 0.
    """

    stat_interval: int = 1
    refresh_interval: int = 10
    count_from: int = -1
    basis_solver: str = 'qr'
    basis_eps: float = 0.0
    source: str = 'gradient'
    stat_decay: float = 0.95

    sources: ClassVar[tuple[str, ...]] = ('gradient',)
    first_counts: ClassVar[tuple[int, ...]] = (-1,)
    counts_later: ClassVar[bool] = True
    joins_bias: ClassVar[bool] = False
    waits: ClassVar[bool] = True

    word: ClassVar[str] = 'SOAP'
    #: The authors' code.
    published: ClassVar[dict[str, Any]] = {
        **WHOLE_LAYERS,
        **dict(
            stat_interval=1,
            refresh_interval=10,
            count_from=-1,
            basis_solver='qr',
            basis_eps=0.0,
            rotate_moments=True,
            align_bases=True,
            input_factor='separable',
            source='gradient',
            stat_decay=0.95,
            max_dim=10000,
            oversize='one_sided',
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number('stat_decay', self.stat_decay, high=1)
        if not self.align_bases and self.basis_solver == 'qr':
            raise ValueError(
                "align_bases=False is for basis_solver='eigh': columns of 'qr' keep their places"
            )

    def moves_squares(self, refreshes: int) -> bool:
        """True for the first basis and the early ones, which turn far.

        Second moments of few samples have entries near zero. If these kept their places, they could
        meet large gradients in a new basis.
        """
        # Early refreshes come at the powers of two below the interval: 1, 2, 4, 8 of 10.
        early = (self.refresh_interval - 1).bit_length() if self.early_refreshes else 0
        return refreshes <= early

    def average(self) -> RunningAverage:
        """Moving average from zero, without bias correction."""
        return RunningAverage(self.stat_decay)

    def align(self, operators: Operators, previous: Operators | None) -> Operators:
        """Leaves the columns where orthogonal iteration has them (see the base class)."""
        return operators if self.basis_solver == 'qr' else super().align(operators, previous)
