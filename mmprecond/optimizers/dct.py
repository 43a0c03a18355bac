"""DCTAdamW: AdamW on a few columns of each gradient's cosine transform."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..rules.dct import DCTAdamWRule
from .matrix_optimizer import MatrixOptimizer
from .settings import takes_settings


class DCTAdamW(MatrixOptimizer):
    """AdamW whose moments live in a low-rank subspace of cosines, matrix by matrix.

    Each matrix (convolutions as filters by all else) has its gradient A (m, s), m >= s, transposed
    where need be, expressed in the columns Q_c (s, r) of the orthonormal cosine basis that are
    largest in ``A Q``: ``a = A Q_c``. The moments of a take 2 m r numbers, AdamW's 2 m s; then
    ``W <- (1 - lr weight_decay) W - lr u Q_c'`` with AdamW's direction u. At full rank this is
    AdamW in the cosine basis. All other parameters take AdamW.

    Source: DCT-AdamW (arXiv 2505.17967). Different from the published code: convolutions are
    trained (there they only decay); each size has a basis of its own; rank is cut to s; sizes alone
    decide on the side, with no shape excepted; the columns keep the basis' order; choices are made
    at steps 1, 1 + k, 1 + 2k, ... of interval k; the remaining error is kept in float32 and not
    quantised; all state is in `state_dict()`, bases apart, which are rebuilt; ranks all compute the
    same instead of sharing the work out.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        model: The module, for the parameters' names in `table`.
        rank: r, at most.
        refresh_interval: Steps between choices of the columns.
        rotate_subspace: Whether columns that stay chosen keep their moments and new ones start at
            zero; otherwise the moments stay in place, whatever column that is now.
        error_feedback: Whether what the columns leave out is added to the next gradient; takes m s
            numbers more.
        norm: Which columns of ``A Q`` are largest: by 'l1' or 'l2'.
        max_dim: A matrix with a larger side takes AdamW; `table` names it. The default is the
            published bound: from 32,000 on.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Refused.

    Raises:
        ValueError: For values out of range.
        TypeError: For unknown settings.
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
