"""Windows of an attention call, and the matrix T of their curvature."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Number of entries of score matrices whose T is computed at a time: they stay in a CPU's cache.
CACHED = 2**18


def softmax_gram(scores: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
    """``T = sum_i J_i V V' J_i``, the common part of the attention statistics of W_Q and W_K.

    Let B = S o (O V'), where o is the elementwise product. The closed form needs n x n matrices
    only: ``T = (S'S) o (V V') - B'S - S'B + S' diag(|o_i|^2) S``.

    Source: thesis chapter 5, (5.7)-(5.10), with the true Jacobian of the softmax. The closed form
    is this project's.

    Args:
        scores: S (..., n_q, n_k), with rows that sum to one.
        values: V (..., n_k, d).
        keep: Mask (..., n_q), 0 for queries to omit from the sum and 1 for the others; default:
            all queries.

    Returns:
        T (..., n_k, n_k), symmetric positive semi-definite.
    """
    masked_scores = scores if keep is None else scores * keep[..., None]
    # A batched product copies whatever has more than one dimension of matrices.
    batches = [t.flatten(0, -3) for t in (scores[None], masked_scores[None], values[None])]
    size = _chunk_size(scores)
    chunks = zip(*(batch.split(size) for batch in batches), strict=True)
    grams = [_gram_of_chunk(*chunk) for chunk in chunks]
    gram = grams[0] if len(grams) == 1 else torch.cat(grams)
    return gram.view(*scores.shape[:-2], *gram.shape[-2:])


def _chunk_size(scores: Tensor) -> int:
    """Number of matrices for which T is computed at a time; all of them on a GPU."""
    matrices, entries = scores[..., 0, 0].numel(), scores.shape[-2] * scores.shape[-1]
    return max(1, matrices if scores.device.type != 'cpu' else CACHED // max(1, entries))


def _gram_of_chunk(scores: Tensor, masked_scores: Tensor, values: Tensor) -> Tensor:
    """T of some windows and heads (m, n_k, n_k), with few temporary matrices."""
    # T depends only on differences of the values; without their mean less cancels in rounding. The
    # first value is taken away before, so that equal values make zeros, not rounding errors.
    values = values - values[..., :1, :]
    values -= values.mean(-2, keepdim=True)
    outputs = scores @ values
    # Half of the last term joins each of the two before it.
    weights = outputs @ values.mT
    weights -= outputs.square().sum(-1, keepdim=True) / 2
    weights *= masked_scores
    cross = scores.mT @ weights
    gram = scores.mT @ masked_scores
    gram *= values @ values.mT
    gram -= cross
    gram -= cross.mT
    return gram


@dataclass
class Heads:
    """Some windows of one attention call, in the working dtype, with w windows and h heads.

    Attributes:
        inputs: Input rows of W_Q (w, n_q, c).
        memory: Input rows of W_K (w, n_k, c); in self-attention the same tensor as `inputs`.
        values_in: Input rows of W_V (w, n_k, c), which may differ from those of W_K.
        query: Q (w, h, n_q, d).
        key: K (w, h, n_k, d).
        value: V (w, h, n_k, d).
        scores: S (w, h, n_q, n_k).
        outputs: Input rows of the output projection (w, n_q, h d).
        keep: Mask (w, n_q), 0 for padded queries, whose outputs are cut off, and 1 for others.
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
