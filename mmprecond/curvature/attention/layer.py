"""Attention as one layer: what is measured of its queries, keys and values.

One head: Q (n_q, d), K and V (n_k, d), logits A = scale Q K' + bias + mask, S = softmax(A) by row,
O = S V, and J_i = diag(s_i) - s_i s_i' for query i. X are the rows that the projection multiplies.
A window is one independent attention: a Swin window, or the tokens of one image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import MEAN, Call, Layer


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
    kept = scores if keep is None else scores * keep[..., None]
    # Half of the last term joins each of the two before it.
    size = outputs.square().sum(-1, keepdim=True)
    cross = scores.mT @ (kept * (outputs @ values.mT - size / 2))
    return (scores.mT @ kept) * (values @ values.mT) - cross - cross.mT


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


def _moment(rows: Tensor) -> Tensor:
    """Sum of x'x over windows and tokens (w, n, c): (1, c, c)."""
    rows = rows.flatten(0, 1)
    return (rows.t() @ rows)[None]


def _head_moment(rows: Tensor) -> Tensor:
    """Sum of x'x over windows and tokens (w, h, n, c): (h, c, c)."""
    rows = rows.transpose(0, 1).flatten(1, 2)
    return rows.mT @ rows


def _input_moment(heads: Heads) -> Tensor:
    query = _moment(heads.inputs)
    return query if heads.memory is heads.inputs else torch.cat([query, _moment(heads.memory)])


def _key_feature_moment(heads: Heads) -> Tensor:
    memory = heads.memory
    weighted = (heads.gram @ memory[:, None]).transpose(0, 1).flatten(1, 2)
    return memory.flatten(0, 1).t() @ weighted


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum of rows (w, n, c), with a trailing 1, times weights (w, n): (1, c + 1, 1)."""
    total = torch.einsum('wnc,wn->c', rows, weights)
    return torch.cat([total, weights.sum()[None]])[None, :, None]


def _key_mean(heads: Heads) -> Tensor:
    share = heads.inputs.shape[1] / heads.memory.shape[1]
    return _weighted_sum(heads.memory, torch.full_like(heads.memory[..., 0], share))


def _value_mean(heads: Heads) -> Tensor:
    attended = (heads.scores * heads.keep[:, None, :, None]).sum(2).mean(1)
    return _weighted_sum(heads.values_in, attended)


def _value_parts(heads: Heads) -> Tensor:
    attended = heads.scores.sum((0, 2)).mean(0)
    return torch.cat([heads.values_in.sum(0), attended[:, None]], 1)


#: Sums over windows and queries, by name: the statistic of some windows.
MEASURES: dict[str, Callable[[Heads], Tensor]] = {
    # sum x'x: of W_Q's inputs, and of W_K's where they differ
    'input_moment': _input_moment,
    # sum M_i'M_i with M_i = V' J_i K
    'query_curvature': lambda h: (h.key.mT @ h.gram @ h.key).sum(0),
    # the same with Q in the place of K
    'key_curvature': lambda h: (h.query.mT @ h.gram @ h.query).sum(0),
    # sum o'o of the output projection's input
    'output_moment': lambda h: _moment(h.outputs * h.keep[..., None]),
    # sum q'q
    'query_moment': lambda h: _head_moment(h.query * h.keep[:, None, :, None]),
    # sum Y_i'Y_i with Y_i = V' J_i X
    'key_feature_moment': _key_feature_moment,
    # sum of (s_i X)'(s_i X), the exact features of W_V
    'value_feature_moment': lambda h: _head_moment((h.scores @ h.values_in[:, None])
                                                   * h.keep[:, None, :, None]),
    # sums of the rows that W_Q and W_K multiply, and of the s_i X; the last entry counts them
    'query_mean': lambda h: _weighted_sum(h.inputs, h.keep),
    'key_mean': _key_mean,
    'value_mean': _value_mean,
    # of each key: the sum of its rows, and of the softmax it gets (n_k, c + 1)
    'value_product_mean': _value_parts,
}


def _product_of_means(parts: Tensor, windows: int) -> Tensor:
    """Mean rows of the keys times the softmax they get: as `_weighted_sum`, for all queries."""
    means = parts[:, :-1] / max(1, windows)
    return _weighted_sum(means[None], parts[None, :, -1])


class AttentionLayer(Layer):
    """The projections W_Q, W_K, W_V of an attention module, in one weight (3 h d, c).

    Its blocks are the heads of W_Q, then of W_K, then of W_V, each a matrix (d, c). The bias is
    left to the rule, unless it is given: it then takes part in the means, and in no other
    statistic.

    Attributes:
        heads: Number of heads.
        max_windows: Windows measured a call, drawn afresh at each; sums are scaled to all windows.
    """

    cancels = True  # softmax_gram

    def __init__(self, name: str, modules: list[nn.Module], weight: nn.Parameter,
                 bias: nn.Parameter | None = None, *, max_windows: int = 256,
                 **options: Any) -> None:
        block: Any = modules[0]
        self.heads = int(block.num_heads)
        self.max_windows = max_windows
        super().__init__(name, modules, weight, bias, **options)

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        """Why this module cannot be read, or ''."""
        return ''

    @classmethod
    def weight_owner(cls, module: nn.Module) -> tuple[str, str]:
        """Relative name of the submodule that owns the weight, and the weight's name there."""
        return 'qkv', 'weight'

    @property
    def has_positions(self) -> bool:
        """It draws windows instead."""
        return False

    @property
    def compressible(self) -> bool:
        """It has but the forms of `MEASURES`."""
        return False

    @property
    def inputs(self) -> int:
        """Number of different input moments: 1 where Q and K multiply the same rows."""
        return 1

    @property
    def is_square(self) -> bool:
        """Whether there is one query for each key, as the thesis's form of W_K needs."""
        return True

    def statistic_shape(self, statistic: str) -> tuple[int, int, int]:
        """(b, n, n) of a statistic: b is 1 (or 2 inputs) where heads share it."""
        width = self.heads * self.rows
        if statistic.endswith(MEAN):
            return 1, self.weight.shape[1] + 1, 1
        return {'input_moment': (self.inputs, self.columns, self.columns),
                'output_moment': (1, width, width),
                'key_feature_moment': (self.heads, self.columns, self.columns),
                'value_feature_moment': (self.heads, self.columns, self.columns),
                }.get(statistic, (self.heads, self.rows, self.rows))

    def count_rows(self, call: Call, gradient: Tensor, statistics: tuple[str, ...]) -> int:
        """Queries of one call."""
        return gradient.numel() // max(1, gradient.shape[-1])

    def measure_flops(self, call: Call, kept: tuple[Tensor, ...], output: Tensor,
                      name: str) -> float:
        """About the floating-point operations of one call's statistic (see the base class)."""
        windows, queries, keys = self.sizes(call, kept)
        heads, size, width = self.heads, self.rows, self.columns
        pairs = 2 * heads * queries * keys
        gram = pairs * (2 * keys + 3 * size)  # made once, for two statistics
        reading = self.read_flops(queries, keys)
        one = {'input_moment': 2 * self.inputs * keys * width**2 + reading,
               # of the thesis's form, which without W_K's curvature has all of T for W_Q's
               'output_moment': (2 * queries * (heads * size)**2
                                 + (0 if self.is_square else gram / 2)),
               'query_moment': 2 * heads * queries * size**2,
               'key_feature_moment': gram / 2 + 2 * heads * (keys * keys * width
                                                             + keys * width**2),
               'value_feature_moment': 2 * heads * (queries * keys * width + queries * width**2),
               'query_mean': 2 * queries * width + reading,
               'key_mean': 2 * keys * width,
               'value_mean': 2 * keys * width,
               'value_product_mean': keys * width,
               }.get(name, gram / 2 + 2 * heads * (keys * keys * size + keys * size**2))
        return min(windows, self.max_windows) * one

    def measure(self, call: Call, kept: tuple[Tensor, ...], gradient: Tensor,
                statistics: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Sums over all windows, estimated from at most `max_windows` of them."""
        windows, queries, keys = self.sizes(call, kept)
        chosen = torch.arange(windows if keys else 0, device='cpu')
        if windows > self.max_windows:
            drawn = torch.randperm(windows, generator=generator, device='cpu')
            chosen = drawn[:self.max_windows].sort().values
        sums = {name: self.empty(name) for name in statistics}
        if 'value_product_mean' in sums:
            sums['value_product_mean'] = self.weight.new_zeros(
                keys, self.weight.shape[1] + 1, dtype=self.working_dtype)
        for chunk in chosen.split(self._chunk(queries, keys, statistics)):
            heads = self.read(call, kept, chunk.to(gradient.device))
            for name, total in sums.items():
                total += MEASURES[name](heads)
        if 'value_product_mean' in sums:
            sums['value_product_mean'] = _product_of_means(sums['value_product_mean'], len(chosen))
        for total in sums.values():
            total *= windows / max(1, len(chosen))
        return sums

    def finished(self, name: str, statistic: Tensor) -> Tensor:
        """Sums of rows (..., c + 1, 1) divided by their number, which a joint bias takes for 1."""
        if not name.endswith(MEAN):
            return statistic
        means = statistic / statistic[..., -1:, :]
        return means[..., :self.columns, :]

    def read_flops(self, queries: int, keys: int) -> float:
        """About the operations by which `read` makes, of a window, what the module did not keep."""
        return 0.

    def sizes(self, call: Call, kept: tuple[Tensor, ...]) -> tuple[int, int, int]:
        """Windows, queries and keys a window."""
        windows, tokens = kept[0].shape[:2]
        return windows, tokens, tokens

    def read(self, call: Call, kept: tuple[Tensor, ...], chosen: Tensor) -> Heads:
        """Some windows of a call."""
        raise TypeError(f'{type(self).__name__} must say how it is read')

    def _blocks(self, module: nn.Module) -> int:
        return 3 * self.heads

    def _chunk(self, queries: int, keys: int, statistics: tuple[str, ...]) -> int:
        """Windows that are measured at a time, within `capture_mb`."""
        tokens = max(queries, keys)
        numbers = 8 * self.heads * keys * tokens + 8 * tokens * (self.columns + 2 * self.rows)
        if {'key_feature_moment', 'value_feature_moment'} & set(statistics):
            numbers += 3 * self.heads * tokens * self.columns
        size = numbers * self.working_dtype.itemsize
        return max(1, int(min(self.capture_mb * 2**20 / max(1, size), self.max_windows)))
