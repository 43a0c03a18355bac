"""Windows of an attention call, and the matrix that its curvature is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


def softmax_gram(scores: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
    """``T = sum_i J_i V V' J_i``: what every attention statistic of W_Q and W_K is made of.

    In closed form, with B = S o (O V') and o the elementwise product,
    ``T = (S'S) o (V V') - B'S - S'B + S' diag(|o_i|^2) S``: n x n matrices alone.

    Source: thesis chapter 5, (5.7)-(5.10), with the softmax's true Jacobian; the closed form is
    this project's.

    Args:
        scores: S (..., n_q, n_k), rows that sum to one.
        values: V (..., n_k, d).
        keep: (..., n_q), 0 for queries to leave out of the sum and 1 for the others; default all.

    Returns:
        T (..., n_k, n_k), symmetric positive semi-definite.
    """
    # Of values, T sees their differences alone; without their mean less cancels in rounding.
    values = values - values.mean(-2, keepdim=True)
    outputs = scores @ values
    masked_scores = scores if keep is None else scores * keep[..., None]
    # Half of the last term joins each of the two before it.
    size = outputs.square().sum(-1, keepdim=True)
    cross = scores.mT @ (masked_scores * (outputs @ values.mT - size / 2))
    return (scores.mT @ masked_scores) * (values @ values.mT) - cross - cross.mT


@dataclass
class Heads:
    """Some windows of one attention call, in the working dtype. w windows, h heads.

    Attributes:
        inputs: Input rows of W_Q (w, n_q, c).
        memory: Input rows of W_K and W_V (w, n_k, c); the inputs themselves in self-attention.
        values_in: Input rows of W_V where they are not those of W_K.
        query: Q (w, h, n_q, d).
        key: K (w, h, n_k, d).
        value: V (w, h, n_k, d).
        scores: S (w, h, n_q, n_k).
        outputs: What the output projection multiplies (w, n_q, h d).
        keep: 1 for real queries and 0 for padding, whose outputs are cut off (w, n_q).
    """

    inputs: Tensor
    memory: Tensor
    values_in: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    outputs: Tensor
    keep: Tensor

    @cached_property
    def gram(self) -> Tensor:
        """T of each window and head (w, h, n_k, n_k)."""
        return softmax_gram(self.scores, self.value, self.keep[:, None])
