"""Products of stacks of matrices."""

from __future__ import annotations

import torch
from torch import Tensor

#: Multiplications in one product from which on it occupies all threads of a CPU.
LARGE = 2**25


def stacked_product(first: Tensor, second: Tensor) -> Tensor:
    """``A B`` for stacks A (..., m, k) and B (..., k, n).

    A batched product gives each thread of a CPU whole matrices, and some wait for the last: large
    ones are multiplied one after the other instead.
    """
    count = first.shape[:-2].numel()
    size = first.shape[-2] * first.shape[-1] * second.shape[-1]
    alike = first.shape[:-2] == second.shape[:-2]
    if first.device.type != 'cpu' or count < 2 or size < LARGE or not alike:
        return first @ second
    result = first.new_empty(*first.shape[:-1], second.shape[-1])
    parts = zip(first.flatten(0, -3), second.flatten(0, -3), result.view(-1, *result.shape[-2:]),
                strict=True)
    for left, right, out in parts:
        torch.mm(left, right, out=out)
    return result
