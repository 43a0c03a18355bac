"""Attention curvature by brute force, in float64: one token at a time, by differentiating.

Nothing here knows the closed forms. J_i is the Jacobian of torch's softmax at the logits of row
i, and V' J_i Z is the Jacobian of t -> V' softmax(a_i + Z t) at t = 0, for Z = K, Q or X.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.functional import jacobian, jvp

from .nkfac import power_iteration

PARTS = ('query', 'key', 'value')


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def softmax(row: Tensor) -> Tensor:
    return row.softmax(-1)


def gram(logits: Tensor, values: Tensor, keep: Tensor | None = None) -> Tensor:
    """T = sum of J_i V V' J_i of one window and head, over the rows i that are kept.

    Args:
        logits: (n_q, n_k), before the softmax.
        values: (n_k, d).
        keep: (n_q,) of 0 and 1.
    """
    total = values.new_zeros(len(values), len(values))
    for i, row in enumerate(logits):
        if keep is None or keep[i]:
            product = jacobian(softmax, row) @ values
            total += product @ product.t()
    return total


def slopes(row: Tensor, values: Tensor, along: Tensor) -> Tensor:
    """V' J Z (d, m) at one row of logits (n), for V (n, d) and Z (n, m)."""
    return jacobian(lambda t: softmax(row + along @ t) @ values, along.new_zeros(along.shape[1]))


def reduction(
    function: Callable[[Tensor], Tensor], weight: Tensor, target: Tensor, direction: Tensor
) -> float:
    """What the best step along a direction takes off ||J D - target||^2, over ||target||^2.

    J is the Jacobian of the function at the weight: the linearised objective, in which the
    gradient is G = J' target and <G, D> = <target, J D>. Not positive for an ascent direction.
    """
    change = jvp(function, weight, direction)[1]
    slope = (target * change).sum()
    return float(slope * slope.abs() / change.square().sum() / target.square().sum())


@dataclass
class Block:
    """Windows of one attention block, with a loss <target, output>.

    Attributes:
        inputs: X (windows, n, C), C = heads * d.
        weight: (3 * heads, d, C): heads of W_Q, of W_K, of W_V.
        bias: (3 * heads, d), of the same projections.
        offset: (windows, heads, n, n), added to the logits: relative position bias and mask.
        target: (windows, n, C), gradient of the loss by the output before the projection.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor
    offset: Tensor
    target: Tensor

    @property
    def heads(self) -> int:
        return len(self.weight) // 3

    @property
    def tokens(self) -> int:
        return self.inputs.shape[0] * self.inputs.shape[1]

    @property
    def scale(self) -> float:
        return self.weight.shape[1] ** -0.5

    def qkv(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Q, K and V, each (heads, windows, n, d)."""
        rows = torch.einsum('bdc,wnc->bwnd', weight, self.inputs) + self.bias[:, None, None]
        return rows.split(self.heads)

    def logits(self, weight: Tensor) -> Tensor:
        """(heads, windows, n, n)."""
        q, k, _ = self.qkv(weight)
        return self.scale * q @ k.mT + self.offset.movedim(1, 0)

    def output(self, weight: Tensor) -> Tensor:
        """Heads side by side (windows, n, C)."""
        heads = self.logits(weight).softmax(-1) @ self.qkv(weight)[2]
        return torch.cat(list(heads), -1)

    def gradient(self) -> Tensor:
        """Gradient of the loss by the weight."""
        weight = self.weight.clone().requires_grad_(True)
        return torch.autograd.grad((self.output(weight) * self.target).sum(), weight)[0]

    def jacobian(self) -> Tensor:
        """Of the output by the weight (windows, n, C, 3 * heads, d, C)."""
        return jacobian(self.output, self.weight)

    def reduction(self, direction: Tensor) -> float:
        """See `reduction`, for the output of the block."""
        return reduction(self.output, self.weight, self.target, direction)


def draw_block(
    seed: int,
    heads: int = 2,
    d: int = 3,
    n: int = 6,
    windows: int = 5,
    sharp: float = 1.0,
    bias: bool = True,
    mask: bool = True,
) -> Block:
    """A random block; sharper weights make attention less uniform."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = heads * d
    offset = (draw(1, heads, n, n) * bias).repeat(windows, 1, 1, 1)
    if mask:
        # As a shifted window: two groups of tokens that do not see each other.
        group = torch.arange(n) < n // 3
        offset[windows // 2 :] += -100.0 * (group[:, None] != group)
    mixing = draw(channels, channels) / channels**0.5 + torch.eye(channels)
    return Block(
        inputs=(draw(windows, n, channels) + 0.5 * draw(channels)) @ mixing,
        weight=sharp * draw(3 * heads, d, channels) / channels**0.5,
        bias=0.3 * draw(3 * heads, d) * bias,
        offset=offset,
        target=draw(windows, n, channels),
    )


def moment(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows (n, m), one by one."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1])
    for row in rows:
        total += torch.outer(row, row)
    return total


def head_factors(block: Block, head: int) -> dict[str, Tensor]:
    """The statistics of one head, token by token: sums over windows and tokens."""
    logits, (q, k, v) = block.logits(block.weight), block.qkv(block.weight)
    d = q.shape[-1]
    grams: dict[str, list[Tensor]] = {
        'query_curvature': [],
        'key_curvature': [],
        'key_feature_moment': [],
    }
    rows: dict[str, list[Tensor]] = {'query_moment': [], 'value_feature_moment': []}
    for w, x in enumerate(block.inputs):
        along = torch.cat([k[head, w], q[head, w], x], 1)
        for i, row in enumerate(logits[head, w]):
            parts = slopes(row, v[head, w], along).split([d, d, x.shape[1]], 1)
            for kept, part in zip(grams.values(), parts, strict=True):
                kept.append(part.t() @ part)
            rows['query_moment'].append(q[head, w, i])
            rows['value_feature_moment'].append(softmax(row) @ x)
    return {name: torch.stack(parts).sum(0) for name, parts in grams.items()} | {
        name: moment(torch.stack(parts)) for name, parts in rows.items()
    }


def statistics(block: Block) -> dict[str, Tensor]:
    """All statistics of both variants (blocks, n, n), as means over windows and tokens."""
    heads = [head_factors(block, head) for head in range(block.heads)]
    found = {name: torch.stack([factors[name] for factors in heads]) for name in heads[0]}
    found['input_moment'] = moment(block.inputs.flatten(0, 1))[None]
    found['output_moment'] = moment(block.output(block.weight).flatten(0, 1))[None]
    return {name: total / block.tokens for name, total in found.items()} | {'weight': block.weight}


def stacked(*blocks: Block) -> dict[str, Tensor]:
    """Statistics of several layers (k, blocks, n, n)."""
    found = [statistics(block) for block in blocks]
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def only(matrices: Tensor, *blocks: int) -> Tensor:
    """What is left of matrices (b, o, i) when all but some blocks are zero."""
    kept = torch.zeros_like(matrices)
    kept[list(blocks)] = matrices[list(blocks)]
    return kept


def part(matrices: Tensor, number: int) -> Tensor:
    """W_Q's, W_K's or W_V's heads alone, of (3 * heads, d, C)."""
    heads = len(matrices) // 3
    return only(matrices, *range(number * heads, (number + 1) * heads))


def damped(statistic: Tensor, damping: float) -> Tensor:
    """A + damping * lambda_max I, with lambda_max as the published code estimates it."""
    lowest = damping * power_iteration(statistic)
    return statistic + lowest * torch.eye(len(statistic), dtype=statistic.dtype)


def kronecker_solve(left: Tensor, gradient: Tensor, right: Tensor) -> Tensor:
    """The D of left D right = gradient, as one linear system in its entries."""
    system = torch.kron(left.contiguous(), right.contiguous())
    return torch.linalg.solve(system, gradient.flatten()).view_as(gradient)


def value_right(weight: Tensor, moment: Tensor, damping: float, shift: float) -> Tensor:
    """The matrix that the thesis's W_V form divides by: W_VV^-1 (W_V'PW_V + damping) W_VV^-1."""
    outer = weight.t() @ weight + shift * torch.eye(weight.shape[1], dtype=weight.dtype)
    inner = damped(weight.t() @ moment @ weight, damping)
    return torch.linalg.solve(outer, torch.linalg.solve(outer, inner).t())


def directions(
    found: dict[str, Tensor], gradient: Tensor, variant: str, damping: float, shift: float = 1e-4
) -> Tensor:
    """Preconditioned gradients of W_Q, W_K, W_V, without norm recovery."""
    heads = len(gradient) // 3
    thesis = variant == 'thesis'
    eye = torch.eye(gradient.shape[1], dtype=gradient.dtype)
    inputs = damped(found['input_moment'][0], damping)
    result = []
    for block, matrix in enumerate(gradient):
        part, head = PARTS[block // heads], block % heads
        if part == 'query' or (part == 'key' and thesis):
            left, right = damped(found[f'{part}_curvature'][head], damping), inputs
        elif part == 'key':
            left = damped(found['query_moment'][head], damping)
            right = damped(found['key_feature_moment'][head], damping)
        elif thesis:
            weight = found['weight'][2 * heads :].flatten(0, 1)
            left, right = eye, value_right(weight, found['output_moment'][0], damping, shift)
        else:
            left, right = eye, damped(found['value_feature_moment'][head], damping)
        result.append(kronecker_solve(left, matrix, right))
    return torch.stack(result)
