"""Attention preconditioners: operators for W_Q, W_K and W_V of an attention module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_flag
from ..curvature import INPUT, WEIGHT, AttentionReading, Layer, Moment, Statistic
from ..curvature.attention import (
    KEY_CURVATURE,
    KEY_FEATURE_MOMENT,
    OUTPUT_MOMENT,
    QUERY_CURVATURE,
    QUERY_MOMENT,
    VALUE_FEATURE_MOMENT,
)
from ..curvature.conv import ConvLayer
from ..linalg import Dense, Operators, stacked_product
from .base import Factors
from .input_feature import InputFeature, damped_inverse
from .registry import register_preconditioner

VARIANTS = ('thesis', 'gauss_newton')


@dataclass(frozen=True, eq=False)
class ProjectionMatrix(Dense):
    """Matrix of one projection (k, heads or 1, n, n), named after its slot in checkpoints."""

    suffixes: ClassVar[tuple[str, ...]] = ('',)

    def right(self, matrices: Tensor) -> Tensor:
        """``M A``; heads with one common matrix are rows of one product."""
        if self.matrix.shape[1] > 1:
            return matrices @ self.matrix
        return stacked_product(matrices.flatten(1, 2), self.matrix[:, 0]).view(matrices.shape)

    def left(self, matrices: Tensor) -> Tensor:
        """``A M`` as one batched product, because the products of heads are small."""
        return self.matrix @ matrices


@register_preconditioner
@dataclass(frozen=True, kw_only=True)
class AttentionFeature(InputFeature):
    """AFOpt: separate operators for the projections of attention, ``G R^-1`` on other layers.

    R = mean x'x over the input rows of the projections. `curvature.attention` defines T. Each
    matrix is damped by damping times its lambda_max before the inversion:

    ============ ============================== ==========================================
    projection   variant 'thesis'               variant 'gauss_newton'
    ============ ============================== ==========================================
    W_Q (head)   (K'TK)^-1 G R^-1               the same
    W_K (head)   (Q'TQ)^-1 G R^-1               (mean q'q)^-1 G (X'TX)^-1
    W_V          G D, see `value_operator`      G (mean of (s_i X)'(s_i X))^-1, by head
    ============ ============================== ==========================================

    The direction of each projection is scaled to the norm of its gradient. In
    `nn.MultiheadAttention` the numbers of queries and keys may differ. The thesis has no form of
    W_K for that case, so W_K takes G R^-1 there. Convolutions take G R^-1 too; the thesis leaves
    them to the plain rule (5.3.4), as `convolutions=False` does.

    Source: thesis chapter 5, (5.7)-(5.10) and (5.15), Algorithm 7, with the true softmax in place
    of the one recomputed without bias and mask. 'gauss_newton' is this project's own variant with
    the exact Gauss-Newton factors of each projection.

    State: C^2 numbers for each of R, D and their statistics; 2 heads d^2 for W_Q and for W_K,
    statistic and operator together.
    'gauss_newton' has 2 heads C^2 for each of W_K and W_V in place of D. At C = 768 with 24 heads
    that is 57 MB in float32 for each statistic, and as much for each operator.

    Attributes:
        variant: 'thesis' or 'gauss_newton'.
        max_windows: Most windows measured in one call, drawn at random.
        convolutions: Whether convolutions are preconditioned.
    """

    variant: str = 'thesis'
    max_windows: int = 64
    convolutions: bool = True

    sources: ClassVar[tuple[str, ...]] = ('activation',)
    word: ClassVar[str] = 'AFOpt'
    published: ClassVar[dict[str, Any]] = {
        **InputFeature.published,
        **dict(count_from=1, variant='thesis', max_windows=256, convolutions=False),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('variant', self.variant, VARIANTS)
        check_count('max_windows', self.max_windows)
        check_flag('convolutions', self.convolutions)
        if self.exponent != 1:
            raise ValueError(
                f'exponent={self.exponent!r} is not for attention, whose operators '
                'are inverses; leave it at 1'
            )

    @property
    def attention_reading(self) -> AttentionReading:
        """Reading of attention modules as a whole; their biases take the plain rule."""
        return AttentionReading(self.max_windows)

    def exclusion_setting(self, layer: Layer) -> str:
        """'convolutions=False' for a convolution that it excludes, or ''."""
        omitted = isinstance(layer, ConvLayer) and not self.convolutions
        return 'convolutions=False' if omitted else ''

    def candidate_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """Statistics of an attention module, or the input moment of another layer."""
        if self.exclusion_setting(layer):
            return ()
        if not _is_attention(layer):
            return self.statistics
        common = (Statistic(INPUT, Moment()), QUERY_CURVATURE)
        if self.variant == 'gauss_newton':
            return *common, QUERY_MOMENT, KEY_FEATURE_MOMENT, VALUE_FEATURE_MOMENT
        keys = (KEY_CURVATURE,) if layer.has_side(KEY_CURVATURE.side) else ()
        return *common, *keys, OUTPUT_MOMENT

    def selected_statistics(self, layer: Layer) -> tuple[Statistic, ...]:
        """All statistics, or none if one of them is over `max_dim`."""
        selected = super().selected_statistics(layer)
        return selected if len(selected) == len(self.candidate_statistics(layer)) else ()

    def note(self, layer: Layer) -> str:
        """Variant and heads of an attention module, or the side of another layer."""
        if not _is_attention(layer):
            return super().note(layer) or 'input side'
        partial = self.variant == 'thesis' and not layer.has_side(KEY_CURVATURE.side)
        return f'{self.variant}, {layer.blocks // 3} heads' + (
            '; W_K by G R^-1, as keys and queries may differ in number' if partial else ''
        )

    def must_be_nonzero(self, layer: Layer) -> tuple[Statistic, ...]:
        """Input moment alone; W_Q and W_K of saturated heads have no curvature and no gradient."""
        return self.selected_statistics(layer)[:1]

    def reads_weight(self, layer: Layer) -> bool:
        """True for the thesis's operator of W_V."""
        return _is_attention(layer) and self.variant == 'thesis'

    def outline(self, layer: Layer) -> Operators:
        """Operators of the table above."""
        if not _is_attention(layer):
            return super().outline(layer)
        blocks, rows, columns = layer.shape
        heads, exact = blocks // 3, self.variant == 'gauss_newton'
        inputs, _ = layer.size_of(INPUT)
        shapes = {'query_left': (heads, rows, rows), 'query_right': (1, columns, columns)}
        if exact or layer.has_side(KEY_CURVATURE.side):
            shapes['key_left'] = (heads, rows, rows)
        if exact or inputs > 1:
            shapes['key_right'] = (heads if exact else 1, columns, columns)
        shapes['value_right'] = (heads if exact else 1, columns, columns)
        return {slot: ProjectionMatrix.outline(shape) for slot, shape in shapes.items()}

    def refresh(
        self,
        factors: Factors,
        previous: Operators | None = None,
        damping: Tensor | float | None = None,
    ) -> tuple[Operators, Tensor]:
        """Inverts the matrices of the table above (see the base class)."""
        if QUERY_CURVATURE.side not in factors:
            return super().refresh(factors, previous, damping)
        damping = self.damping if damping is None else damping
        moments = {side: factor.tensor for side, factor in factors.items()}
        inputs = moments[INPUT]
        sources = {'query_left': moments[QUERY_CURVATURE.side], 'query_right': inputs[:, :1]}
        if self.variant == 'gauss_newton':
            sources['key_left'] = moments[QUERY_MOMENT.side]
            sources['key_right'] = moments[KEY_FEATURE_MOMENT.side]
            sources['value_right'] = moments[VALUE_FEATURE_MOMENT.side]
        else:
            if KEY_CURVATURE.side in moments:
                sources['key_left'] = moments[KEY_CURVATURE.side]
            if inputs.shape[1] > 1:
                sources['key_right'] = inputs[:, 1:]
        results = {slot: damped_inverse(moment, damping) for slot, moment in sources.items()}
        if self.variant == 'thesis':
            weight = moments[WEIGHT].chunk(3, dim=1)[2].flatten(1, 2)[:, None]
            results['value_right'] = value_operator(weight, moments[OUTPUT_MOMENT.side], damping)
        succeeded = torch.stack([valid.all(-1) for _, valid in results.values()]).all(0)
        return {slot: ProjectionMatrix(matrix) for slot, (matrix, _) in results.items()}, succeeded

    def apply(self, operators: Operators, gradients: Tensor) -> Tensor:
        """Applies the operators of the table above."""
        if 'query_left' not in operators:
            return super().apply(operators, gradients)
        heads = gradients.shape[1] // 3
        first, value = gradients.split([2 * heads, heads], 1)  # W_Q and W_K; W_V
        return torch.cat(
            [_query_key_directions(operators, first), operators['value_right'].right(value)], 1
        )

    def norm_parts(self, layer: Layer) -> int:
        """One norm for each projection of an attention module."""
        return super().norm_parts(layer) * (3 if _is_attention(layer) else 1)


def _query_key_directions(operators: Operators, gradients: Tensor) -> Tensor:
    """Directions of W_Q and W_K from their gradients (k, 2 heads, d, c), without norm recovery."""
    right, left = operators['query_right'], operators['query_left']
    if 'key_right' in operators:
        query, key = gradients.chunk(2, 1)
        directions = torch.cat([right.right(query), operators['key_right'].right(key)], 1)
    else:
        directions = right.right(gradients)
    if 'key_left' in operators:
        pairs = zip(left.tensors, operators['key_left'].tensors, strict=True)
        return ProjectionMatrix(*(torch.cat(pair, 1) for pair in pairs)).left(directions)
    query, key = directions.chunk(2, 1)
    return torch.cat([left.left(query), key], 1)


def _is_attention(layer: Layer) -> bool:
    """True if a layer is an attention module that is read as a whole."""
    return layer.has_side(QUERY_CURVATURE.side)


def value_operator(
    weight: Tensor, moment: Tensor, damping: Tensor | float = 0.01, shift: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The thesis's operator of W_V: ``D = S (W'P W + damping lambda_max I)^-1 S``.

    S = W'W + shift I. D replaces the inverse second moment of the rows s_i X, which the thesis does
    not measure. Both are equal for one head, an invertible W and neither damping nor shift.

    Source: thesis (5.15); (5.23) and Algorithm 7 omit the outer factors.

    Args:
        weight: W_V (..., o, i).
        moment: P = mean o'o of the output projection's input (..., o, o).
        damping: Relative damping.
        shift: Added to the diagonal of W'W.

    Returns:
        D (..., i, i), and a bool tensor (...) that is False where it failed.
    """
    gram = weight.mT @ weight
    gram.diagonal(dim1=-2, dim2=-1).add_(shift)
    inverse, succeeded = damped_inverse(weight.mT @ moment @ weight, damping)
    return gram @ inverse @ gram, succeeded
