"""Contract of a surgery, which combines the gradients of several losses into one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Surgery(ABC):
    """Combination of the gradients of several losses into one gradient."""

    @abstractmethod
    def combine(self, gradients: Tensor) -> Tensor:
        """Combines the gradients (k, n) of k losses into one (n,).

        Where no two of them are in conflict, by the method's own measure, and the method does not
        rescale, it is their sum.

        Args:
            gradients: The gradients, which may be changed.
        """

    def state_dict(self) -> dict[str, Any]:
        """State that the next call depends on: tensors, numbers, strings and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Loads what `state_dict` returned."""


def gram(gradients: Tensor) -> Tensor:
    """Products (k, k) of the gradients (k, n), in float64 on the CPU."""
    return (gradients @ gradients.T).double().cpu()


def cosines(products: Tensor) -> Tensor:
    """Cosines (k, k) from products; those with a zero gradient are 0."""
    norms = products.diagonal().clamp(min=0).sqrt()
    sizes = norms[:, None] * norms
    return torch.where(sizes > 0, products / sizes.clamp(min=1e-300), 0.0)
