"""Attention preconditioners: operators for W_Q, W_K and W_V of an attention module."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, check_count
from ..curvature import AttentionLayer, Layer
from .input_feature import InputFeature, damped_power
from .sides import Stacked, recover_norm

VARIANTS = ('thesis', 'gauss_newton')


@dataclass(frozen=True, kw_only=True)
class AttentionFeature(InputFeature):
    """AFOpt: one operator for each projection of attention, ``G R^-1`` on any other layer.

    With R = mean x'x of the projections' input, T as in `curvature.attention` and every matrix
    damped by damping * its lambda_max before it is inverted:

    ============ ============================== ==========================================
    projection   variant 'thesis'               variant 'gauss_newton'
    ============ ============================== ==========================================
    W_Q (head)   (K'TK)^-1 G R^-1               the same
    W_K (head)   (Q'TQ)^-1 G R^-1               (mean q'q)^-1 G (X'TX)^-1
    W_V          G D, see `value_operator`      G (mean of (s_i X)'(s_i X))^-1, by head
    ============ ============================== ==========================================

    The direction of each of the three is scaled to the norm of its gradient. Where the number of
    queries may differ from that of keys (`nn.MultiheadAttention`) the thesis has no form for W_K,
    which then takes G R^-1.

    Source: thesis chapter 5, (5.7)-(5.10) and (5.15), Algorithm 7, with the true softmax in place
    of the one recomputed without bias and mask; 'gauss_newton' is this project's: the exact
    Gauss-Newton factors of each projection.

    State: C^2 for each of R, D and their statistics, 2 heads d^2 for W_Q and for W_K;
    'gauss_newton' has 2 heads C^2 for each of W_K and W_V in place of D (57 MB each in float32 for
    a statistic, and again for its operator, at C = 768 with 24 heads).

    Attributes:
        variant: 'thesis' or 'gauss_newton'.
        max_windows: Windows measured at a capture and call, drawn at random.
    """

    variant: str = 'thesis'
    max_windows: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice('variant', self.variant, VARIANTS)
        check_count('max_windows', self.max_windows)
        if self.exponent != 1:
            raise ValueError(f'exponent={self.exponent!r} is not for attention, whose operators '
                             'are inverses; leave it at 1')

    @property
    def attention_windows(self) -> int:
        """`max_windows`."""
        return self.max_windows

    def wanted(self, layer: Layer) -> tuple[str, ...]:
        """The statistics of an attention module, or the input's of any other layer."""
        if not isinstance(layer, AttentionLayer):
            return self.requires
        common = ('input_moment', 'query_curvature')
        if self.variant == 'gauss_newton':
            return *common, 'query_moment', 'key_feature_moment', 'value_feature_moment'
        return (*common, *(('key_curvature',) if layer.is_square else ()), 'output_moment')

    def required(self, layer: Layer) -> tuple[str, ...]:
        """All statistics, or none where one of them is over `max_dim`."""
        kept = super().required(layer)
        return kept if len(kept) == len(self.wanted(layer)) else ()

    def note(self, layer: Layer) -> str:
        """What the layer is taken for."""
        if not isinstance(layer, AttentionLayer):
            return super().note(layer) or 'input side'
        partial = self.variant == 'thesis' and not layer.is_square
        return f'{self.variant}, {layer.heads} heads' + (
            '; W_K by G R^-1, as keys and queries may differ in number' if partial else '')

    def essential(self, layer: Layer) -> tuple[str, ...]:
        """The input's: W_Q and W_K of saturated heads have no curvature, and no gradient."""
        return self.required(layer)[:1]

    def reads_weight(self, layer: Layer) -> bool:
        """The thesis's operator of W_V does."""
        return isinstance(layer, AttentionLayer) and self.variant == 'thesis'

    def operator_shapes(self, layer: Layer) -> dict[str, tuple[int, int, int]]:
        """Shapes (b, n, n) of a layer's operators by name."""
        if not isinstance(layer, AttentionLayer):
            return super().operator_shapes(layer)
        heads, rows, columns = layer.heads, layer.rows, layer.columns
        exact = self.variant == 'gauss_newton'
        shapes = {'query_left': (heads, rows, rows), 'query_right': (1, columns, columns)}
        if exact or layer.is_square:
            shapes['key_left'] = (heads, rows, rows)
        if exact or layer.inputs > 1:
            shapes['key_right'] = (heads if exact else 1, columns, columns)
        shapes['value_right'] = (heads if exact else 1, columns, columns)
        return shapes

    def apply_flops(self, layer: Layer) -> float:
        """Operations of one step (see the base class): each operator serves a third."""
        if not isinstance(layer, AttentionLayer):
            return super().apply_flops(layer)
        shapes = self.operator_shapes(layer)
        shapes.setdefault('key_right', shapes['query_right'])
        return 2 / 3 * math.prod(layer.shape) * sum(width for _, _, width in shapes.values())

    def refresh(self, statistics: Stacked, previous: Stacked | None = None,
                damping: Tensor | float | None = None) -> tuple[Stacked, Tensor]:
        """Inverts what the table shows (see the base class)."""
        if 'query_curvature' not in statistics:
            return super().refresh(statistics, previous, damping)
        damping = self.damping if damping is None else damping
        inputs = statistics['input_moment']
        sources = {'query_left': statistics['query_curvature'], 'query_right': inputs[:, :1]}
        if self.variant == 'gauss_newton':
            sources['key_left'] = statistics['query_moment']
            sources['key_right'] = statistics['key_feature_moment']
            sources['value_right'] = statistics['value_feature_moment']
        else:
            if 'key_curvature' in statistics:
                sources['key_left'] = statistics['key_curvature']
            if inputs.shape[1] > 1:
                sources['key_right'] = inputs[:, 1:]
        results = {name: damped_power(matrix, damping) for name, matrix in sources.items()}
        if self.variant == 'thesis':
            weight = statistics['weight'].chunk(3, dim=1)[2].flatten(1, 2)[:, None]
            results['value_right'] = value_operator(weight, statistics['output_moment'], damping)
        good = torch.stack([fine.all(-1) for _, fine in results.values()]).all(0)
        return {name: matrix for name, (matrix, _) in results.items()}, good

    def apply(self, operator: Stacked, gradients: Tensor) -> Tensor:
        """The operators of the table, with norm recovery for each projection."""
        if 'query_left' not in operator:
            return super().apply(operator, gradients)
        query, key, value = gradients.chunk(3, dim=1)
        directions = [
            operator['query_left'] @ query @ operator['query_right'],
            key @ operator.get('key_right', operator['query_right']),
            value @ operator['value_right']]
        if 'key_left' in operator:
            directions[1] = operator['key_left'] @ directions[1]
        if self.norm_recovery:
            directions = [recover_norm(direction, gradient) for direction, gradient
                          in zip(directions, (query, key, value), strict=True)]
        return torch.cat(directions, dim=1)


def value_operator(weight: Tensor, moment: Tensor, damping: Tensor | float = 0.01,
                   shift: float = 1e-4) -> tuple[Tensor, Tensor]:
    """The thesis's operator of W_V: ``D = S (W'P W + damping lambda_max I)^-1 S``.

    S = W'W + shift I. It stands for the inverse second moment of the rows s_i X, which the thesis
    does not read: it equals that with one head, an invertible W and neither damping nor shift.

    Source: thesis (5.15); (5.23) and Algorithm 7 leave the outer factors away.

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
    inverse, good = damped_power(weight.mT @ moment @ weight, damping)
    return gram @ inverse @ gram, good
