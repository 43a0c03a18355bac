"""DCTAdamW: AdamW on a few columns of each gradient's cosine transform."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..rules.dct import DCTAdamWRule
from .matrix_optimizer import MatrixOptimizer
from .settings import takes_settings


class DCTAdamW(MatrixOptimizer):
    """AdamW with moments in a low-rank subspace of cosines, for each matrix.

    The gradient of a matrix is A (m, s), transposed if m < s. Convolutions are matrices of filters
    by all else. Q_c (s, r) has the columns of the orthonormal cosine basis Q that are largest in
    ``A Q``, and the reduced gradient is ``a = A Q_c``. The moments of a take 2 m r numbers, those
    of AdamW 2 m s. AdamW's update u for a gives ``W <- (1 - lr weight_decay) W - lr u Q_c'``. At
    full rank this is AdamW in the cosine basis. All other parameters take AdamW.

    Source: DCT-AdamW (arXiv 2505.17967), with these differences from the published code.
    Convolutions are trained; in the code they only decay. Each size has its own basis. The rank is
    at most s. The sizes alone decide the side, without exceptions for some shapes. The columns keep
    the order of the basis. Choices come at steps 1, 1 + k, 1 + 2k, ... for interval k. The
    remaining error is kept in float32 and not quantised. All state is in `state_dict()`, except for
    the bases, which are rebuilt. All ranks compute the same instead of sharing the work.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        model: The module, for the parameters' names in `table`.
        rank: Largest r.
        refresh_interval: Steps between choices of the columns.
        rotate_subspace: Whether columns that stay chosen keep their moments and new columns start
            at zero. Otherwise the moments keep their positions, whatever columns are now there.
        error_feedback: Whether the part of a gradient outside the columns is added to the next
            gradient. It takes m s more numbers.
        norm: Norm that decides which columns of ``A Q`` are largest, 'l1' or 'l2'.
        max_dim: A matrix with a larger side takes AdamW; `table` names it. The default is the
            published bound, which excludes sides from 32,000 on.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Other arguments, which are refused.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a setting is unknown.
    """

    published: ClassVar[dict[str, Any]] = dict(
        betas=(0.9, 0.999),
        eps=1e-8,
        rank=128,
        refresh_interval=1,
        rotate_subspace=True,
        error_feedback=False,
        norm='l1',
        max_dim=31999,
    )

    @takes_settings
    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        rank: int = 128,
        refresh_interval: int = 1,
        rotate_subspace: bool = True,
        error_feedback: bool = False,
        norm: str = 'l1',
        max_dim: int = 31999,
        **unexpected: Any,
    ) -> None:
        rule = DCTAdamWRule(rank, refresh_interval, rotate_subspace, error_feedback, norm, max_dim)
        super().__init__(
            params,
            rule,
            dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay),
            model,
            unexpected,
        )
