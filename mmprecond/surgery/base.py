"""Contract of an aggregator, which combines the gradients of several losses into one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Aggregator(ABC):
    """Combination of the gradients of several losses into one gradient."""

    @abstractmethod
    def combine(self, gradients: Tensor) -> Tensor:
        """Combines the gradients of k losses into one (n,).

        Returns their sum if the method finds no conflict; methods that rescale say so.

        Args:
            gradients: Gradients (k, n), float32 or float64; they may be overwritten.
        """

    def state_dict(self) -> dict[str, Any]:
        """State that the next call depends on: tensors, numbers, strings and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Loads what `state_dict` returned."""


def gram(gradients: Tensor) -> Tensor:
    """Gram matrix (k, k) of the gradients (k, n), in float64.

    It is on the CPU: the branches that follow read single entries of this small matrix.
    """
    return (gradients @ gradients.T).double().cpu()


def cosines(products: Tensor) -> Tensor:
    """Cosines (k, k) from a Gram matrix; those with a zero gradient are 0."""
    norms = products.diagonal().clamp(min=0).sqrt()
    sizes = norms[:, None] * norms
    return torch.where(sizes > 0, products / sizes.clamp(min=1e-300), 0.0)
