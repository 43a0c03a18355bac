"""Products of stacks of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

#: Least number of multiplications in a product that keeps all threads of a CPU busy.
LARGE = 2**25


def stacked_product(first: Tensor, second: Tensor) -> Tensor:
    """``A B`` for stacks A (..., m, k) and B (..., k, n).

    In a batched product each thread of a CPU takes whole matrices, and some threads wait for the
    last one. Large or single matrices are therefore multiplied one after the other, without
    autograd.
    """
    if first.dim() < 3 or first.shape[:-2] != second.shape[:-2]:
        return first @ second
    if not _should_loop(first, second):  # a call of bmm makes fewer views than @
        product = torch.bmm(_in_batch(first), _in_batch(second))
        return product.view(*first.shape[:-1], second.shape[-1])
    result = first.new_empty(*first.shape[:-1], second.shape[-1])
    for left, right, out in _zip_matrices(first, second, result):
        torch.mm(left, right, out=out)
    return result


def add_product(
    total: Tensor, first: Tensor, second: Tensor, old: bool = True, sign: int = 1
) -> None:
    """``T += sign A B`` in place, for contiguous T (..., m, n), A (..., m, k) and B (..., k, n).

    If `old` is false, T is overwritten: ``T = sign A B``.
    """
    if not _should_loop(first, second):
        left, right = _in_batch(first), _in_batch(second)
        _in_batch(total).baddbmm_(left, right, beta=int(old), alpha=sign)
        return
    for left, right, out in _zip_matrices(first, second, total):
        out.addmm_(left, right, beta=int(old), alpha=sign)


def _in_batch(stack: Tensor) -> Tensor:
    """Matrices (..., m, n) as (b, m, n)."""
    if stack.dim() == 3:
        return stack
    return stack.flatten(0, -3) if stack.dim() > 3 else stack[None]


def _should_loop(first: Tensor, second: Tensor) -> bool:
    if first.device.type != 'cpu' or first.shape[:-2] != second.shape[:-2] or first.dim() < 3:
        return False
    size = first.shape[-2] * first.shape[-1] * second.shape[-1]
    return size >= LARGE or first.shape[:-2].numel() == 1


def _zip_matrices(first: Tensor, second: Tensor, result: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(
        first.flatten(0, -3).unbind(),
        second.flatten(0, -3).unbind(),
        result.view(-1, *result.shape[-2:]).unbind(),
        strict=True,
    )
