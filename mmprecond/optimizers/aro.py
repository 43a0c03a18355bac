"""ARO: a normalised momentum step in a rotated basis, for matrices."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..rules.aro import ARORule
from .matrix_optimizer import MatrixOptimizer
from .settings import takes_settings


class ARO(MatrixOptimizer):
    """Matrices move along their momentum, normalised in an adaptively rotated basis.

    Each matrix W (m, n; convolutions as filters by all else) keeps its momentum M and a rotation R
    (m, m) of its left side: ``C = M f(R' M)'``, ``R <- Q factor of C`` with a positive diagonal of
    the triangular one, ``W <- (1 - lr weight_decay) W - lr U`` with ``U = R f(R' M)`` scaled to a
    root mean square of 0.2, about that of AdamW, which all other parameters take at the same lr.

    Which side: the paper rotates the dimension of the residual stream. That is the left one of
    weights that write to it (a block's last projection, the output of attention) and the right one
    of those that read from it (queries, keys, values, a block's first linear layer); give these
    ``side='right'`` in a group of their own, in a config by `custom_keys`. 'smaller' takes the
    least memory and time. Embeddings and the head may stay with AdamW, as in the paper's hybrid:
    ``precondition=False`` in their group.

    Source: ARO (arXiv 2602.09006). Different from the published code: U is scaled by itself (there
    a factor made for orthogonal updates makes it sqrt(max(m, n)) times as long); convolutions are
    flattened; QR has fixed signs, and its null columns, with the rows of R' M that are rounding,
    count as zero (there they are normalised to full length); 'sinkhorn' is the default, as in the
    paper; all state is in `state_dict()`. No sharing of rotations over layers, no look-ahead.

    Args:
        params: Parameters or groups, or the module itself.
        lr: Learning rate.
        momentum: mu, of matrices.
        weight_decay: Decoupled weight decay.
        model: The module, for the parameters' names in `table`.
        betas: Decays of AdamW's moments, for what is no matrix.
        eps: AdamW's.
        norm: f: 'sinkhorn', 'row_norm' or 'sign'.
        side: The rotated one: 'left' (m x m), 'right' (n x n) or 'smaller'. Groups may differ.
        max_dim: A matrix whose rotated side is larger takes AdamW; `table` names it.
        settings: 'default', or 'published' for the literal settings of the source.
        **unexpected: Refused.

    Raises:
        ValueError: For values out of range.
        TypeError: For unknown settings.
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
