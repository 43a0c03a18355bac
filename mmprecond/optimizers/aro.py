"""ARO: a normalised momentum step in a rotated basis, for matrices."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..rules.aro import ARORule
from .matrix_optimizer import MatrixOptimizer
from .settings import takes_settings


class ARO(MatrixOptimizer):
    """Momentum updates of matrices, normalised in an adaptively rotated basis.

    Each matrix W (m, n) keeps its momentum M and a rotation R (m, m) of its left side. Convolutions
    are matrices of filters by all else. A step computes ``C = M f(R' M)'``, then
    ``R <- Q factor of C``, where the triangular factor has a positive diagonal. The update is
    ``U = R f(R' M)``, scaled to a root mean square of 0.2, and
    ``W <- (1 - lr weight_decay) W - lr U``. AdamW's updates have about the same root mean square,
    so all other parameters take AdamW at the same lr.

    The paper rotates the side of the residual stream. This is the left side of weights that write
    to the stream (a block's last projection, the output of attention). It is the right side of
    weights that read from it (queries, keys, values, a block's first linear layer). Give the latter
    ``side='right'`` in a group of their own, in a config by `custom_keys`. 'smaller' takes the
    least memory and time. With ``precondition=False`` in their group, embeddings and the head take
    AdamW, as in the paper's hybrid.

    Source: ARO (arXiv 2602.09006), with these differences from the published code. U is scaled by
    its own norm; the code's factor is for orthogonal updates and makes U sqrt(max(m, n)) times as
    long. Convolutions are flattened. QR has fixed signs. Null columns of QR, and rows of R' M that
    are rounding errors, count as zero; the code normalises them to full length. 'sinkhorn' is the
    default, as in the paper. All state is in `state_dict()`. Layers do not share rotations, and
    there is no look-ahead.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        momentum: mu, for matrices.
        weight_decay: Decoupled weight decay.
        model: The module, for the parameters' names in `table`.
        betas: Decays of AdamW's moments, for parameters that are no matrices.
        eps: AdamW's eps.
        norm: The normalisation f: 'sinkhorn', 'row_norm' or 'sign'.
        side: The rotated side: 'left' (m x m), 'right' (n x n) or 'smaller'. Groups may differ.
        max_dim: A matrix whose rotated side is larger takes AdamW; `table` names it.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Other arguments, which are refused.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If a setting is unknown.
    """

    published: ClassVar[dict[str, Any]] = dict(
        momentum=0.95, betas=(0.9, 0.95), eps=1e-8, norm='sinkhorn', side='left', max_dim=8192
    )

    @takes_settings
    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        norm: str = 'sinkhorn',
        side: str = 'left',
        max_dim: int = 8192,
        **unexpected: Any,
    ) -> None:
        super().__init__(
            params,
            ARORule(norm, max_dim),
            dict(
                lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay, side=side
            ),
            model,
            unexpected,
        )
